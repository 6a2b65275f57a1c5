"""Schedulers: who does the next step.

A scheduler is asked for one schedule after the other (`begin`), and in each before every step
(`choose`). The tasks that can do a step are given as a bit mask, bit 0 the first task.
"""

import random
from collections.abc import Sequence
from typing import Protocol

from ._schedule import LETTERS, WrongSchedule


class Scheduler(Protocol):
    """What runs schedules asks it; see `RandomWalk` for the smallest one."""

    def begin(self) -> bool:
        """Begin another schedule; False when there is none left."""

    def choose(self, enabled: int, last: int) -> int:
        """Return the index of the task that does the next step.

        ``enabled`` is the mask of those that can, never 0; ``last`` did the last step, -1 at first.
        Returning -1 ends the schedule there.
        """


def lowest(mask: int) -> int:
    """Return the index of the lowest bit."""
    return (mask & -mask).bit_length() - 1


def listed(mask: int) -> list[int]:
    """Return the indexes of all bits, lowest first."""
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


class DepthFirst:
    """Every schedule with at most ``bound`` preemptions (None: every schedule), depth first.

    A preemption takes the turn from a task that could go on. This is the plain search, which the
    fast one is compared with; it keeps nothing but the way to the schedule at hand.
    """

    def __init__(self, bound: int | None) -> None:
        self._bound = 1 << 30 if bound is None else bound
        self._path: list[list[int]] = []  # at each step the choices left, the one taken last
        self._depth = 0
        self._left = self._bound
        self._first = True

    def begin(self) -> bool:
        """Begin the next schedule; False when all were run."""
        self._depth, self._left = 0, self._bound
        if self._first:
            self._first = False
            return True
        while self._path:
            self._path[-1].pop()
            if self._path[-1]:
                return True
            self._path.pop()
        return False

    def choose(self, enabled: int, last: int) -> int:
        """Choose as the way says, and by default go on with the same task."""
        going = last >= 0 and enabled >> last & 1
        if self._depth == len(self._path):
            if not going:
                choices = listed(enabled)[::-1]
            elif self._left:
                choices = [*listed(enabled & ~(1 << last))[::-1], last]
            else:
                choices = [last]
            self._path.append(choices)
        task = self._path[self._depth][-1]
        self._depth += 1
        self._left -= bool(going and task != last)
        return task


class RandomWalk:
    """``count`` schedules, each step by a task drawn with equal chances, from ``seed``."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self._left = count
        self._random = random.Random(seed)

    def begin(self) -> bool:
        """Begin another one of ``count``."""
        self._left -= 1
        return self._left >= 0

    def choose(self, enabled: int, last: int) -> int:
        """Draw one."""
        return self._random.choice(listed(enabled))


class Pct:
    """``count`` schedules by random priorities, changed at ``depth`` - 1 random steps.

    Finds a fault that takes ``depth`` ordered steps with a chance of at least 1/(n * k^(depth-1))
    in each schedule, with n tasks and k steps (Burckhardt et al., ASPLOS 2010). k is measured as
    schedules are run.
    """

    def __init__(self, count: int, depth: int = 3, seed: int = 0) -> None:
        self._left = count
        self._depth = depth
        self._random = random.Random(seed)
        self._longest = 16
        self._step = 0
        self._priority: dict[int, float] = {}
        self._changes: set[int] = set()

    def begin(self) -> bool:
        """Begin another one of ``count``, with priorities drawn anew."""
        self._longest = max(self._longest, self._step)
        self._left -= 1
        self._step = 0
        self._priority.clear()
        self._changes = {self._random.randrange(self._longest) for _ in range(self._depth - 1)}
        return self._left >= 0

    def choose(self, enabled: int, last: int) -> int:
        """Take the one with the highest priority; at a step of change it becomes the lowest."""
        tasks = listed(enabled)
        for task in tasks:
            if task not in self._priority:
                self._priority[task] = 1 + self._random.random()
        best = max(tasks, key=self._priority.__getitem__)
        if self._step in self._changes:
            self._priority[best] = min(self._priority.values()) - 1
            best = max(tasks, key=self._priority.__getitem__)
        self._step += 1
        return best


class RoundRobin:
    """One schedule: each task in turn does ``steps`` steps."""

    def __init__(self, steps: int = 1) -> None:
        self._steps = steps
        self._done = 0
        self._first = True

    def begin(self) -> bool:
        """Begin the only one."""
        first, self._first = self._first, False
        return first

    def choose(self, enabled: int, last: int) -> int:
        """Go on, or take the next one after the last that can."""
        if last >= 0 and enabled >> last & 1 and self._done < self._steps:
            self._done += 1
            return last
        self._done = 1
        later = enabled & ~((1 << last + 1) - 1)
        return lowest(later or enabled)


class Replay:
    """One schedule, given step by step. Ends where it ends. Raises WrongSchedule."""

    def __init__(self, picks: Sequence[int]) -> None:
        self._picks = picks
        self._step = 0
        self._first = True

    def begin(self) -> bool:
        """Begin the only one."""
        first, self._first = self._first, False
        return first

    def choose(self, enabled: int, last: int) -> int:
        """Do as the schedule says; -1 at its end."""
        if self._step == len(self._picks):
            return -1
        task = self._picks[self._step]
        if not enabled >> task & 1:
            can = ", ".join(LETTERS[i] for i in listed(enabled))
            raise WrongSchedule(
                f"step {self._step + 1}: task {LETTERS[task]} cannot do a step here",
                f"those that can: {can}",
            )
        self._step += 1
        return task
