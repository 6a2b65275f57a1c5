"""The searches that cover every schedule within a bound: the plain one, and the reduced one.

Both replay: a generator cannot be copied, so each schedule begins with a model built anew, follows
the way to where it differs, and goes on from there. What was checked on the way is not checked
again, because the same steps do the same (`Doubles` looks for models of which that is not true).

The plain search goes depth first through every schedule. The reduced one visits each state once,
the states that take the fewest preemptions first; docs/adr/0008-the-explorer-s-reduction.md argues
why it misses nothing.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from fanwise.lifetime import Until

from ._follow import Figures, as_broken, built, same_twice
from ._key import Keys, Unkeyable
from ._outside import Outside
from ._schedulers import listed, lowest
from ._world import Broken, ModelError, World

Build = Callable[[World], None]
FREE = 1 << 30  # more preemptions than any schedule has steps
TWICE = 64  # one schedule of so many is run twice, the first one among them
LOOK = 64  # after so many schedules the time is looked at
KEY_AFTER = 64  # steps without a choice: a model that goes round in a circle


class Search:
    """One search: its bounds, and what it came to.

    ``broken`` is what broke first, None if nothing did, and ``picks`` leads to it. ``whole`` says
    that nothing within the bound was left out. ``states`` counts the states that were told apart
    (reduced), or the steps that were taken for the first time (plain). ``keep_going`` searches on
    behind what breaks, to compare how much there is to search.
    """

    def __init__(
        self,
        build: Build,
        outside: Outside,
        *,
        bound: int | None,
        steps: int,
        seconds: float | None = None,
        twice: int | None = TWICE,
        keep_going: bool = False,
    ) -> None:
        self.build = build
        self.bound = FREE if bound is None else bound
        self.limit = steps
        self.until = None if seconds is None else time.process_time() + seconds
        self.twice = twice
        self.keep_going = keep_going
        self.broken: Broken | None = None
        self.picks: list[int] = []
        self.whole = True
        self.schedules = 0
        self.states = 0
        self.steps = 0
        self.figures = Figures()
        self.keys = Keys()
        self._outside = outside
        self._doubles = 0  # schedules that were run twice
        self.cases: set[tuple[str, str]] = set()

    # -- the plain search --

    def plain(self) -> None:
        """Run every schedule, depth first."""
        with _collecting_rarely():
            self._plain()
            self._believe()

    def _plain(self) -> None:
        limit, cases = self.limit, self.cases
        stack: list[tuple[int, int, int]] = []  # depth, tasks to try there, preemptions left then
        picks: list[int] = []
        left = self.bound
        schedules = steps = states = 0
        while True:
            world = World(cases)
            try:
                alive, waiting = self._follow(world, picks)
                gens, at, always = world._gens, world._at, world._always
                k = picks[-1] if picks else -1
                tasks = len(at)
                depth = len(picks)
                while True:
                    enabled = alive
                    if waiting:
                        world._now = -1
                        enabled ^= _asleep(at, waiting)
                    if not enabled:
                        world._alive = alive
                        world._check_end()
                        self.figures.end(world._counts)
                        break
                    if depth >= limit:
                        self.whole = False
                        break
                    if k >= 0 and enabled >> k & 1:
                        if left:
                            rest = enabled & ~(1 << k)
                            if rest:
                                stack.append((depth, rest, left - 1))
                    else:
                        rest = enabled & (enabled - 1)
                        k = (enabled ^ rest).bit_length() - 1
                        if rest:
                            stack.append((depth, rest, left))
                    picks.append(k)
                    depth += 1
                    states += 1
                    world._now = k
                    step = at[k] = next(gens[k], None)
                    if step.__class__ is str:
                        if waiting:
                            waiting &= ~(1 << k)
                    elif step is None:
                        world._ended(k)
                        alive &= ~(1 << k)
                        waiting &= alive
                    elif step.__class__ is Until:
                        waiting |= 1 << k
                    else:
                        raise world._unknown(k, step)
                    if always:
                        world._now = -1
                        for prop, holds in always:
                            if not holds():
                                raise Broken(prop)
                    if len(at) != tasks:
                        alive, waiting = _masks(at)
                        tasks = len(at)
            except (Exception, Broken) as error:
                self._broke(error, picks, world)
                depth = len(picks)
            steps += depth
            schedules += 1
            world._close()
            if self.broken is not None and not self.keep_going:
                break
            if self._stops(schedules, picks):
                break
            if not stack:
                break
            depth, rest, left = stack.pop()
            more = rest & (rest - 1)
            if more:
                stack.append((depth, more, left))
            states += 1
            del picks[depth:]
            picks.append((rest ^ more).bit_length() - 1)
        self.schedules += schedules
        self.steps += steps
        self.states += states

    # -- the reduced search --

    def reduced(self) -> None:
        """Visit every state, by the number of preemptions that it takes. Raises Unkeyable."""
        with _collecting_rarely():
            self._reduced()
            self._believe()

    def _reduced(self) -> None:
        limit, cases = self.limit, self.cases
        free = self.bound >= FREE
        last_level = 0 if free else self.bound
        key = self.keys.key
        # Where each state was seen first: its level, and the tasks that went on from it.
        seen: dict[bytes, tuple[int, int]] = {}
        level = 0
        work: list[tuple[bytes, int]] = [(b"", -1)]  # a way, and the task that goes on from it
        later: list[tuple[bytes, int]] = []
        picks: list[int] = []
        schedules = steps = 0
        while True:
            way, k = work.pop()
            picks = [*way, k] if k >= 0 else []
            world = World(cases)
            try:
                alive, waiting = self._follow(world, picks)
                gens, at, always = world._gens, world._at, world._always
                tasks = len(at)
                depth = len(picks)
                keyed = depth
                while True:
                    enabled = alive
                    if waiting:
                        enabled ^= _asleep(at, waiting)
                    if not enabled:
                        world._alive = alive
                        world._check_end()
                        self.figures.end(world._counts)
                        break
                    if depth >= limit:
                        self.whole = False
                        break
                    goes_on = 0 if k < 0 or free else enabled & 1 << k
                    # Without a choice there is nothing to prune but a tail, which is cheaper to
                    # run than a key is to make; unless it runs in a circle.
                    chooses = level < last_level if goes_on else True
                    if (chooses and enabled & (enabled - 1)) or depth - keyed >= KEY_AFTER:
                        world._alive, world._waiting = alive, waiting
                        state = key(world)
                        keyed = depth
                        least, gone = seen.get(state, (level, 0))
                        ways = enabled & ~gone
                        if least < level or not ways or gone & goes_on:
                            break
                        if goes_on:
                            seen[state] = (level, gone | goes_on)
                            if not gone and level < last_level:
                                here = bytes(picks)
                                later += [(here, i) for i in listed(enabled ^ goes_on)]
                        else:
                            seen[state] = (level, -1)
                            if k < 0 or not ways >> k & 1:
                                k = lowest(ways)
                            ways &= ~(1 << k)
                            if ways:
                                here = bytes(picks)
                                work += [(here, i) for i in reversed(listed(ways))]
                    elif not goes_on:
                        k = lowest(enabled)
                    picks.append(k)
                    depth += 1
                    world._now = k
                    step = at[k] = next(gens[k], None)
                    world._now = -1
                    if step.__class__ is str:
                        if waiting:
                            waiting &= ~(1 << k)
                    elif step is None:
                        world._ended(k)
                        alive &= ~(1 << k)
                        waiting &= alive
                    elif step.__class__ is Until:
                        waiting |= 1 << k
                    else:
                        raise world._unknown(k, step)
                    if always:
                        for prop, holds in always:
                            if not holds():
                                raise Broken(prop)
                    if len(at) != tasks:
                        alive, waiting = _masks(at)
                        tasks = len(at)
            except Unkeyable:
                world._close()
                raise
            except (Exception, Broken) as error:
                self._broke(error, picks, world)
                depth = len(picks)
            steps += depth
            schedules += 1
            world._close()
            if self.broken is not None and not self.keep_going:
                break
            if self._stops(schedules, picks):
                break
            if not work:
                if not later:
                    break
                level += 1
                work, later = later[::-1], []
        self.schedules += schedules
        self.steps += steps
        self.states = len(seen)

    # -- what both do (what comes after each step stands in both: a call would be half of it) --

    def _follow(self, world: World, picks: list[int]) -> tuple[int, int]:
        """Build the model and go a way that was gone before; return who is left, and who waits."""
        built(self.build, world)
        gens, at = world._gens, world._at
        for k in picks:
            world._now = k
            at[k] = next(gens[k], None)
        world._now = -1
        if world._always:
            world._check_always()
        return _masks(at)

    def _stops(self, schedules: int, picks: list[int]) -> bool:
        if self.twice and schedules % self.twice == 1 % self.twice and self._differs(picks):
            return True
        return schedules % LOOK == 1 and self._late()

    def _differs(self, picks: list[int]) -> bool:
        broken = same_twice(self.build, picks, self.keys)
        # What modules hold is much, and what has changed stays so: looked at ever more rarely.
        self._doubles += 1
        if broken is None and not self._doubles & (self._doubles - 1):
            broken = self._outside.changed()
        if broken is not None:
            self.broken, self.picks = broken, picks.copy()
        return broken is not None

    def _believe(self) -> None:
        """See that what was searched can be believed."""
        if self.broken is None:
            self.broken = self._outside.changed()
        if self.broken is None and self.whole and not self.figures.ended:
            raise ModelError(
                "no schedule ends: deadlocks, and what is demanded at the end, cannot be seen",
                "a task that has nothing to do waits: yield Until(step, ready)",
            )

    def _late(self) -> bool:
        if self.until is not None and time.process_time() > self.until:
            self.whole = False
            return True
        return False

    def _broke(self, error: BaseException, picks: list[int], world: World) -> None:
        world._close()
        if isinstance(error, ModelError):
            raise error
        if self.broken is None:
            self.broken = as_broken(error)
            self.picks = picks.copy()


def _masks(at: Sequence[object]) -> tuple[int, int]:
    alive = waiting = 0
    bit = 1
    for step in at:
        if step is not None:
            alive |= bit
            if step.__class__ is not str:
                waiting |= bit
        bit <<= 1
    return alive, waiting


def _asleep(at: Sequence[object], waiting: int) -> int:
    asleep = 0
    while waiting:
        bit = waiting & -waiting
        waiting ^= bit
        if not at[bit.bit_length() - 1].ready():  # type: ignore[attr-defined]
            asleep |= bit
    return asleep


# Every schedule leaves the objects of its model behind, in circles: collecting them every 700
# allocations, as the collector does, costs more than it brings.
@contextmanager
def _collecting_rarely() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(100_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)
