"""Three designs written in Promela as well: spin (Holzmann) and the explorer agree on them.

The models are in promela/: by hand, step for step what the scenarios say. No search has a bound.
"""

import pytest

from bench._spin import SHARED, lacking, spin
from fanwise.lab import explore, load

# design: what does not hold, to us and to spin
BREAKS = {
    "error-event/slot-holds-mark": ("destruction-order", "(mark==6)"),
    "eventfs/freed-flag": ("no-callback-after-removal", "!(removed[e])"),
}


@pytest.fixture
def check(cannot_run, tmp_path):
    if lacking():
        cannot_run(f"not installed: {', '.join(lacking())}")
    return lambda model, *defines: spin(model, tmp_path, *defines)


@pytest.mark.parametrize("name", SHARED)
def test_spin_agrees(check, name):
    broken, assertion = BREAKS.get(name, (None, None))
    scenario, _, design = name.partition("/")
    ours = explore(load(scenario)[design], bound=None)
    assert (ours.property, ours.verdict) == (broken, "breaks" if broken else "holds")
    assert check(*SHARED[name]).assertion == assertion


def test_the_order_of_destruction_is_all_that_breaks(check):
    """Without that property the slot that holds its mark is sound, in both."""
    assert check("error_event.pml", "-DNO_ORDER").assertion is None
