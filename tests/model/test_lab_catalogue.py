"""Of each design of the catalogue: it is a model, and the reduction does not change its verdict.

Which verdict it is, is told by the test of its scenario.
"""

import pytest

from fanwise.lab import find, load, names
from tests.model.labcheck import replays, same_without_reduction

DESIGNS = [design for slug in names() for design in find(slug)]
designs = pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.name)


@pytest.mark.parametrize("slug", names())
def test_a_scenario_says_what_it_is_about(slug):
    scenario = load(slug)
    assert scenario.slug == slug
    assert scenario.title
    assert scenario.text.strip()
    assert scenario.designs
    assert all(sentence.endswith(".") for sentence in scenario.properties.values())
    assert all(design.title.endswith(".") for design in scenario.designs.values())


@designs
def test_the_reduction_changes_no_verdict_at_one_preemption(design):
    result = same_without_reduction(design, 1)
    if result.verdict == "breaks":
        replays(design, result)


@pytest.mark.soak
@designs
def test_the_reduction_changes_no_verdict_at_two_preemptions(design):
    same_without_reduction(design, 2)
