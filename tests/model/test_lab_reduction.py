"""The reduction changes no verdict: against the plain search, and against brute force."""

import pytest
from hypothesis import HealthCheck, example, given, settings

from fanwise.lab import Scenario, explore
from tests.model.labprograms import brute, design, programs

# After a step of each, one state is reached by both orders with one preemption. It breaks with a
# second one, and only if the first task goes on from there for free: after the second order.
MEETING = [
    [("set", "x", 0), ("load", "z"), ("store", "y"), ("set", "y", 0)],
    [("set", "z", 1), ("never", "y", 2), ("set", "x", 1)],
]


def compare(program, bound):
    model = design(program)
    broken, ends, stops = brute(program, bound)
    # Without a bound the plain search runs every interleaving: only of what is small.
    small = sum(len(body) for body in program) <= 7 and "spawn" not in repr(program)
    for reduce in (True, False) if small or bound is not None else (True,):
        result = explore(model, bound=bound, reduce=reduce, twice=8)
        assert result.verdict == ("breaks" if broken else "holds"), (reduce, result)
        assert result.not_keyed is None
        if not broken:
            assert set(result.cases["end"]) == ends
            assert result.counts.get("stops", (0, 0)) == (min(stops), max(stops))


@pytest.mark.parametrize("bound", [0, 1, 2, None])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(program=programs)
@example(program=MEETING)
@example(program=MEETING[::-1])
def test_little_programs_end_where_brute_force_ends(bound, program):
    compare(program, bound)


@pytest.mark.parametrize("reduce", [True, False])
def test_what_holds_always_is_checked_after_the_step_of_a_preemption(reduce):
    scenario = Scenario("meeting", "Both at once", "", {"p": "Not both are inside."})

    @scenario.design("it", "It.")
    def build(world):
        inside = []

        def task(name):
            yield "enter"
            inside.append(name)
            yield "leave"
            inside.remove(name)

        for name in "abc":
            world.task(name, task(name))
        world.always("p", lambda: len(inside) < 2)

    for bound, verdict in ((0, "holds"), (1, "breaks")):
        assert explore(scenario["it"], bound=bound, reduce=reduce).verdict == verdict


@pytest.mark.soak
@pytest.mark.parametrize("bound", [0, 1, 2, 3, None])
@settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))
@given(program=programs)
def test_many_little_programs_end_where_brute_force_ends(bound, program):
    compare(program, bound)
