"""Exploring a design: run its schedules, shrink what fails, say what it came to."""

from ._follow import STEPS, Figures, Followed, follow, same_twice
from ._key import Keys, Unkeyable
from ._outside import Outside
from ._result import Bounds, Result
from ._scenario import Build, Design
from ._schedule import WrongSchedule, parse, render
from ._schedulers import RandomWalk, Replay, Scheduler
from ._search import TWICE, Search
from ._shrink import shrink
from ._world import Broken, ModelError

BOUND = 3


def explore(
    design: Design,
    *,
    bound: int | None = BOUND,
    reduce: bool = True,
    steps: int = STEPS,
    seconds: float | None = None,
    twice: int | None = TWICE,
    keep_going: bool = False,
) -> Result:
    """Cover every schedule with at most ``bound`` preemptions (None: every schedule).

    ``reduce=False`` runs each of them. ``steps`` is the most that one schedule may have and
    ``seconds`` the processor time to spend: when either is reached the verdict is not ``holds``.
    One schedule of ``twice`` is run twice (None: none is). ``keep_going`` searches on when
    something broke: the verdict is the same, and the figures are those of the whole search. Raises
    ModelError when the model cannot be built.
    """
    not_keyed = None
    outside = Outside(design.build)  # as it was before the first schedule of all

    def new() -> Search:
        return Search(
            design.build,
            outside,
            bound=bound,
            steps=steps,
            seconds=seconds,
            twice=twice,
            keep_going=keep_going,
        )

    search = new()
    if reduce:
        try:
            search.reduced()
        except Unkeyable as error:
            not_keyed = str(error)
            search = new()
    if not reduce or not_keyed:
        search.plain()
    result = _result(design, Bounds(bound, steps))
    result.schedules, result.steps, result.states = search.schedules, search.steps, search.states
    result.counts, result.reduced = search.figures.counts, reduce and not not_keyed
    result.not_keyed = not_keyed
    if search.broken is not None:
        _breaks(design, result, search.broken, search.picks)
    elif search.whole:
        result.verdict = "holds"
    _cases(result, search.cases)
    return result


def sample(
    design: Design,
    count: int = 1000,
    *,
    scheduler: Scheduler | None = None,
    seed: int = 0,
    steps: int = STEPS,
    twice: int | None = TWICE,
) -> Result:
    """Run ``count`` random schedules, or those of ``scheduler``; one of ``twice`` is run twice."""
    if scheduler is None:
        scheduler = RandomWalk(count, seed)
    result = _result(design, Bounds(None, steps, 0))
    cases: set[tuple[str, str]] = set()
    figures, keys = Figures(), Keys()
    while scheduler.begin():
        done = follow(design.build, scheduler, steps)
        result.schedules += 1
        result.steps += len(done.picks)
        cases |= done.cases
        broken = done.broken
        if broken is None and twice and not result.schedules % twice:
            broken = same_twice(design.build, done.picks, keys)
        if broken is not None:
            _breaks(design, result, broken, done.picks)
            break
        if done.ended:
            figures.end(done.counts)
    result.counts = figures.counts
    result.bounds = Bounds(None, steps, result.schedules)
    _cases(result, cases)
    return result


def replay(design: Design, schedule: str) -> Followed:
    """Run one schedule and return its trace. Raises WrongSchedule."""
    return _follow(design.build, parse(schedule))


def replayed(design: Design, followed: Followed) -> Result:
    """Say what one schedule came to as `explore` does: it ``breaks``, or is a sample of one."""
    result = _result(design, Bounds(None, STEPS, 1))
    result.schedules, result.steps = 1, len(followed.picks)
    result.schedule = render(followed.picks)
    result.counts = {name: (count, count) for name, count in followed.counts.items()}
    _cases(result, followed.cases)
    if followed.broken is not None:
        result.verdict, result.property = "breaks", followed.broken.property
        result.seen = followed.broken.seen or None
    return result


def _follow(build: Build, picks: list[int]) -> Followed:
    scheduler = Replay(picks)
    scheduler.begin()
    return follow(build, scheduler)


def _result(design: Design, bounds: Bounds) -> Result:
    return Result(
        scenario=design.scenario.slug,
        design=design.slug,
        verdict="sampled",
        property=None,
        schedule=None,
        bounds=bounds,
        schedules=0,
        states=0,
    )


def _breaks(design: Design, result: Result, broken: Broken, picks: list[int]) -> None:
    if broken.property != "deterministic":
        broken, picks = _again(design.build, broken, picks)
    try:
        design.sentence(broken.property)
    except KeyError:
        raise ModelError(
            f"{broken.property!r} is not declared", "add it to the scenario's properties"
        ) from None
    if broken.property != "deterministic":
        picks, broken = shrink(design.build, picks, broken)
    result.verdict = "breaks"
    result.property, result.seen = broken.property, broken.seen or None
    result.schedule = render(picks)


def _again(build: Build, broken: Broken, picks: list[int]) -> tuple[Broken, list[int]]:
    """Break it again, which a deterministic model does."""
    try:
        again = _follow(build, picks)
    except WrongSchedule as error:
        return Broken("deterministic", f"{render(picks)} cannot be run again: {error}"), picks
    if again.broken is None or again.broken.property != broken.property:
        seen = f"{render(picks)} broke {broken.property} ({broken.seen}), and not again"
        return Broken("deterministic", seen), picks
    return again.broken, again.picks


def _cases(result: Result, cases: set[tuple[str, str]]) -> None:
    for place, case in sorted(cases):
        result.cases.setdefault(place, []).append(case)
