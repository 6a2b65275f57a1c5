"""A failing schedule made smaller: fewer switches, then fewer steps, and the same property breaks.

A candidate is a list of runs of steps. It is followed as far as it can be: a task that cannot do a
step is passed over, and at the end whoever did the last step goes on, then the lowest. What was
really run, up to where it broke, is what is compared and kept.
"""

from collections.abc import Callable, Iterator
from itertools import groupby

from ._follow import follow
from ._schedule import switches
from ._schedulers import lowest
from ._world import Broken, World

TRIES = 2000


class Lenient:
    """A schedule that is followed as far as it can be, and then to the end with few switches."""

    def __init__(self, picks: list[int]) -> None:
        self._picks = picks
        self._at = 0

    def begin(self) -> bool:
        """Begin anew."""
        self._at = 0
        return True

    def choose(self, enabled: int, last: int) -> int:
        """Return the next of the schedule that can do a step."""
        while self._at < len(self._picks):
            task = self._picks[self._at]
            self._at += 1
            if enabled >> task & 1:
                return task
        return last if last >= 0 and enabled >> last & 1 else lowest(enabled)


def shrink(
    build: Callable[[World], None], picks: list[int], broken: Broken
) -> tuple[list[int], Broken]:
    """Return a smaller schedule that breaks the same property, and how it does."""
    best, size = picks, _size(picks)
    tries = 0
    better = True
    while better:
        better = False
        for candidate in _candidates(best):
            tries += 1
            if tries > TRIES:
                return best, broken
            scheduler = Lenient(candidate)
            scheduler.begin()
            done = follow(build, scheduler, len(picks) + 1)
            if done.broken is None or done.broken.property != broken.property:
                continue
            if _size(done.picks) < size:
                best, size, broken = done.picks, _size(done.picks), done.broken
                better = True
                break
    return best, broken


def _size(picks: list[int]) -> tuple[int, int]:
    return switches(picks), len(picks)


def _candidates(picks: list[int]) -> Iterator[list[int]]:
    runs = [list(steps) for _, steps in groupby(picks)]
    # Without one run of steps; without the end of one; without the first step of one.
    for at in range(len(runs)):
        yield _joined(runs[:at], runs[at + 1 :])
    for at in range(len(runs)):
        # A run joins an earlier or a later one of its task.
        for to in range(len(runs)):
            if to != at and runs[to][0] == runs[at][0]:
                moved = [run + runs[at] if i == to else run for i, run in enumerate(runs)]
                yield _joined(moved[:at], moved[at + 1 :])
    for at in range(len(runs) - 1):
        yield _joined(runs[:at], [runs[at + 1], runs[at]], runs[at + 2 :])
    for at, run in enumerate(runs):
        for less in {1, len(run) // 2} - {0, len(run)}:
            yield _joined(runs[:at], [run[less:]], runs[at + 1 :])


def _joined(*parts: list[list[int]]) -> list[int]:
    return [step for part in parts for run in part for step in run]
