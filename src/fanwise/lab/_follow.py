"""One schedule of a model, run under a scheduler with everything checked after every step."""

import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fanwise._errors import LifetimeError
from fanwise.lifetime import Until

from ._key import Keys, Unkeyable
from ._schedule import LETTERS, render
from ._schedulers import Scheduler, listed
from ._world import Broken, ModelError, World, activate

STEPS = 10_000  # of one schedule; more is taken for a model that never ends


class Told(NamedTuple):
    """One step of a schedule: who did what, and what was noted."""

    task: int
    step: str
    notes: tuple[str, ...]


class Figures:
    """The least and the most of each figure over all schedules that ended."""

    __slots__ = ("counts", "ended")

    def __init__(self) -> None:
        self.counts: dict[str, tuple[int, int]] = {}
        self.ended = False

    def end(self, counts: dict[str, int]) -> None:
        """Take in the figures of a schedule that ended; what it did not count is 0."""
        if counts or self.counts:
            for name, value in counts.items():
                if name not in self.counts:  # it was 0 in all that ended before
                    first = 0 if self.ended else value
                    self.counts[name] = (first, first)
            for name, (low, high) in self.counts.items():
                value = counts.get(name, 0)
                if not low <= value <= high:
                    self.counts[name] = (min(low, value), max(high, value))
        self.ended = True


class Followed(NamedTuple):
    """What a schedule led to. ``broken`` is None when nothing broke in it."""

    picks: list[int]
    broken: Broken | None
    ended: bool  # no task can do a step any more
    names: list[str]
    trace: list[Told]
    counts: dict[str, int]
    cases: set[tuple[str, str]]


def follow(build: Callable[[World], None], scheduler: Scheduler, steps: int = STEPS) -> Followed:
    """Run one schedule, which the scheduler has begun.

    Raises WrongSchedule when a replay cannot go on, and whatever building the model raises.
    """
    log: list[str] = []
    cases: set[tuple[str, str]] = set()
    world = World(cases, log)
    picks: list[int] = []
    trace: list[Told] = []
    broken: Broken | None = None
    ended = False
    last = -1
    try:
        try:
            built(build, world)
            world._check_always()
            caught = None
        except (Broken, LifetimeError) as error:
            caught = as_broken(error)
        while caught is None:
            try:
                enabled = world._enabled()
            except (Exception, Broken) as error:
                caught = as_broken(error)
                break
            if not enabled:
                ended = True
                caught = attempt(world._check_end)
                break
            if len(picks) >= steps:
                break
            last = scheduler.choose(enabled, last)
            if last < 0:
                break
            at = world._at[last]
            step = at.step if isinstance(at, Until) else str(at)
            log.clear()
            picks.append(last)
            caught = attempt(partial(_step, world, last))
            trace.append(Told(last, step, tuple(log)))
        broken = caught
        return Followed(picks, broken, ended, world._names, trace, dict(world._counts), cases)
    finally:
        world._close()


def built(build: Callable[[World], None], world: World) -> None:
    """Build a model. Raises ModelError, and what breaks already."""
    try:
        build(world)
    except (Broken, LifetimeError, ModelError):
        raise
    except Exception as error:
        raise ModelError(f"the model cannot be built: {_crash(error)}") from error
    if not world._gens:
        raise ModelError("the model has no task", "make some with world.task(name, body)")


def _step(world: World, task: int) -> None:
    world._step(task)
    world._check_always()


def attempt(do: Callable[[], object]) -> Broken | None:
    """Do something; return what it breaks."""
    try:
        do()
    except ModelError:
        raise
    except (Exception, Broken) as error:
        return as_broken(error)
    return None


def as_broken(error: BaseException) -> Broken:
    """Return the property that an error out of a step breaks."""
    if isinstance(error, Broken):
        return error
    if isinstance(error, LifetimeError):
        broken = Broken("declared-lifetimes", str(error))
    else:
        broken = Broken("no-crash", _crash(error))
    broken.__cause__ = error
    return broken


def _crash(error: BaseException) -> str:
    """What was raised, and the line of the model that did it."""
    lines = [
        f" ({Path(frame.f_code.co_filename).name}:{line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not frame.f_globals.get("__name__", "").startswith("fanwise.")
    ]
    return f"{type(error).__name__}: {error}{lines[-1] if lines else ''}"


def same_twice(build: Callable[[World], None], picks: Sequence[int], keys: Keys) -> Broken | None:
    """Run a schedule on two models side by side; return how they differ, if they do.

    They differ when a model depends on what is no part of it: addresses, clocks, random numbers,
    the order of a set of objects, state that a schedule leaves behind.
    """
    worlds = []
    try:
        for _ in range(2):
            world = World(set(), [])
            worlds.append(world)
            build(world)
        one, two = worlds
        keys.ambiguous = False
        for number in range(len(picks) + 1):
            done = picks[:number]
            seen = [_seen(world) for world in worlds]
            if seen[0] != seen[1]:
                return _differs(done, *seen)
            if not _same(keys, one, two):
                return _differs(done, "one state", "another one")
            if number == len(picks):
                break
            task = picks[number]
            if not one._enabled() >> task & 1:
                can = f"{LETTERS[task]} cannot do a step here"
                return _differs(done, "the first time it could", can)
            came = _both(worlds, partial(_one_step, task))
            if came != ["breaks nothing"] * 2:
                return None if came[0] == came[1] else _differs(picks[: number + 1], *came)
        if not one._enabled():
            came = _both(worlds, World._check_end)
            if came[0] != came[1]:
                return _differs(picks, *came)
        return None
    finally:
        for world in worlds:
            world._close()


def _both(worlds: Sequence[World], do: Callable[[World], object]) -> list[str]:
    came = []
    for world in worlds:
        activate(world)
        broken = attempt(partial(do, world))
        came.append(f"breaks {broken.property}: {broken.seen}" if broken else "breaks nothing")
    return came


def _one_step(task: int, world: World) -> None:
    world._step(task)


def _same(keys: Keys, one: World, two: World) -> bool:
    try:
        return keys.tokens(one) == keys.tokens(two) or keys.ambiguous
    except Unkeyable:
        return True


def _seen(world: World) -> str:
    activate(world)
    steps = [at.step if isinstance(at, Until) else at for at in world._at]
    can = "".join(LETTERS[i] for i in listed(world._enabled()))
    return f"before {steps}, can: {can or 'none'}, {world._counts}, noted {world._log}"


def _differs(picks: Sequence[int], one: str, two: str) -> Broken:
    return Broken(
        "deterministic",
        f"the same schedule twice, after {render(picks) or 'no step'}: {one}; {two}",
    )
