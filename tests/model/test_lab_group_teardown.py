"""The end of a group: every design is our own code, and holds."""

import pytest

from fanwise.lab import explore, load
from fanwise.notify.group import CLOSE

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
def test_what_can_come_of_it_comes(slug):
    assert explore(SCENARIO[slug], bound=1).cases == CASES[slug]
