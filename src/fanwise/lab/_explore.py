"""Exploring a design: run its schedules, shrink what fails, say what it came to."""

from ._follow import STEPS, Followed, follow
from ._result import Bounds, Result
from ._scenario import Design
from ._schedule import parse, render
from ._schedulers import DepthFirst, RandomWalk, Replay, Scheduler

BOUND = 3


def explore(design: Design, *, bound: int | None = BOUND, steps: int = STEPS) -> Result:
    """Run every schedule with at most ``bound`` preemptions (None: every one)."""
    return _run(design, DepthFirst(bound), Bounds(bound, steps), exhaustive=True)


def sample(design: Design, count: int, *, seed: int = 0, steps: int = STEPS) -> Result:
    """Run ``count`` random schedules."""
    return _run(design, RandomWalk(count, seed), Bounds(None, steps, count), exhaustive=False)


def replay(design: Design, schedule: str) -> Followed:
    """Run one schedule and return its trace. Raises WrongSchedule."""
    scheduler = Replay(parse(schedule))
    scheduler.begin()
    return follow(design.build, scheduler)


def _run(design: Design, scheduler: Scheduler, bounds: Bounds, exhaustive: bool) -> Result:
    result = Result(
        scenario=design.scenario.slug,
        design=design.slug,
        verdict="sampled",
        property=None,
        schedule=None,
        bounds=bounds,
        schedules=0,
        states=0,
    )
    cases: set[tuple[str, str]] = set()
    while scheduler.begin():
        done = follow(design.build, scheduler, bounds.steps)
        result.schedules += 1
        result.steps += len(done.picks)
        cases |= done.cases
        exhaustive = exhaustive and (done.ended or done.broken is not None)
        if done.broken is not None:
            design.sentence(done.broken.property)
            result.verdict = "breaks"
            result.property, result.seen = done.broken.property, done.broken.seen
            result.schedule = render(done.picks)
            break
        for name, value in done.counts.items():
            low, high = result.counts.get(name, (value, value))
            result.counts[name] = (min(low, value), max(high, value))
    else:
        if exhaustive:
            result.verdict = "holds"
    for place, case in sorted(cases):
        result.cases.setdefault(place, []).append(case)
    return result
