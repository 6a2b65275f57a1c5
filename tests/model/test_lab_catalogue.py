"""Of each scenario of the catalogue: it says what it is about, and its test asks what all ask.

Which verdict each design has, is told by the test of its scenario.
"""

from pathlib import Path

import pytest

from fanwise.lab import find, load, names
from tests.model.lab_verdicts import check_reduction

DESIGNS = [design for slug in names() for design in find(slug)]


@pytest.mark.parametrize("slug", names())
def test_a_scenario_says_what_it_is_about(slug):
    scenario = load(slug)
    assert scenario.slug == slug
    assert scenario.title
    assert scenario.text.strip()
    assert scenario.designs
    assert all(sentence.endswith(".") for sentence in scenario.properties.values())
    assert all(design.title.endswith(".") for design in scenario.designs.values())


@pytest.mark.parametrize("slug", names())
def test_a_scenario_is_searched_without_the_reduction_too(slug):
    test = Path(__file__).parent / f"test_lab_{slug.replace('-', '_')}.py"
    assert "check_reduction(" in test.read_text()


@pytest.mark.soak
@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.name)
def test_the_reduction_changes_no_verdict_at_two_preemptions(design):
    check_reduction(design, 2)
