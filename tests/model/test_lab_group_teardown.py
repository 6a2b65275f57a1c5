"""The end of a group: every design is our own code, and holds."""

import pytest

from fanwise.lab import explore, load
from fanwise.notify.group import CLOSE
from tests.model.lab_verdicts import check_reduction

SCENARIO = load("group-teardown")

# What a schedule may come to, and that it did: a model in which nobody is ever late tests little.
CASES = {
    "ours": {"remove": ["too late"], "mark": ["too late"]},
    "ours-cut-off": {"cut off before": sorted(set(CLOSE.steps) - {"answer an access"})},
    "ours-with-errors": {"remove": ["too late"], "take": ["too late"]},
    "ours-failing-readers": {"take": ["too late"]},
    "ours-woken": {},
    "ours-with-verdicts": {"answer": ["too late"]},
    "ours-quits": {"answer": ["too late"]},
    "ours-killed": {"answer": ["nobody waited", "too late"]},
    "ours-late": {"answer": ["nobody waited", "too late"]},
    "ours-two-classes": {"answer": ["too late"]},
    "ours-denied": {"answer": ["too late"]},
}


@pytest.mark.parametrize("slug", SCENARIO.designs)
def test_our_own_code_holds(slug):
    result = explore(SCENARIO[slug])
    assert (result.verdict, result.property, result.seen) == ("holds", None, None)
    assert result.reduced
    assert result.cases == CASES[slug]


@pytest.mark.parametrize("slug", SCENARIO.designs)
def test_the_reduction_changes_no_verdict(slug):
    check_reduction(SCENARIO[slug])
