"""The reduction changes no verdict: against the plain search, and against brute force."""

import pytest
from hypothesis import HealthCheck, given, settings

from fanwise.lab import explore
from tests.model.labprograms import brute, design, programs


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
def test_little_programs_end_where_brute_force_ends(bound, program):
    compare(program, bound)


@pytest.mark.soak
@pytest.mark.parametrize("bound", [0, 1, 2, 3, None])
@settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))
@given(program=programs)
def test_many_little_programs_end_where_brute_force_ends(bound, program):
    compare(program, bound)
