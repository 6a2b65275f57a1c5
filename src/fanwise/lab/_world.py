"""The world of one schedule: its tasks, what is checked, and what was seen.

REFS      the world holds its tasks; tasks and predicates hold the shared state. `close` lets go.
LOCKING   none: one thread. Tasks interleave where they yield, and nowhere else.
LIFETIME  one world for each schedule that is run: a model is built anew every time.
"""

import re
from collections.abc import Callable, Generator
from functools import wraps
from types import GeneratorType
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar, cast

from fanwise._errors import FanwiseError
from fanwise.lifetime import Run, Until

from ._schedule import LETTERS

STANDARD = {
    "no-use-after-free": "Nobody uses memory that was freed.",
    "no-double-free": "No memory is freed twice.",
    "no-leak": "No memory is left at the end.",
    "lock-order": "Locks are taken in one order, and released by who holds them.",
    "no-deadlock": "No task waits for ever.",
    "no-lost-wake-up": "No task sleeps on after what it waits for has come.",
    "refcount": "No reference is taken from zero, and none is dropped below it.",
    "atomic-context": "Nobody sleeps where sleeping is not allowed.",
    "declared-lifetimes": "Objects change their state only as their lifetime declares.",
    "no-crash": "No step ends with an error that nobody expects.",
    "deterministic": "The same schedule does the same steps again.",
}

Step = str | Until
Body = Generator[Step, None, Any] | Run[Any]


class Broken(BaseException):
    """A property does not hold: its slug, and what was seen. Ends the schedule.

    No Exception, so that a task that expects errors does not take it for one of them.
    """

    def __init__(self, broken: str, seen: str = "") -> None:
        seen = re.sub(r"0x[0-9a-f]{6,}", "0x", seen)  # addresses, which no replay repeats
        super().__init__(broken, seen)
        self.property = broken
        self.seen = seen


class ModelError(FanwiseError):
    """A model is wrong in itself: it cannot be built, or says what cannot be."""


class World:
    """What a design builds its shared state and its tasks in.

    A task is a generator that yields the name of the step that it is about to do, or an `Until`
    when it has to wait; what stands before the first yield runs when the task is made. ``current``
    is the name of the task that runs, "" while none does.
    """

    __slots__ = (
        "_alive",
        "_always",
        "_asked",
        "_at",
        "_at_end",
        "_atomic",
        "_cases",
        "_counts",
        "_daemons",
        "_gens",
        "_held",
        "_log",
        "_names",
        "_now",
        "_order",
        "_over",
        "_parts",
        "_waiting",
    )

    def __init__(
        self, cases: set[tuple[str, str]] | None = None, log: list[str] | None = None
    ) -> None:
        self._names: list[str] = []
        self._gens: list[Generator[Step, None, Any]] = []
        self._at: list[Step | None] = []  # before what each task stands; None: it has ended
        self._alive = self._waiting = 0  # bit masks of tasks; waiting: stands before an Until
        self._daemons = 0
        self._now = -1
        self._over = False
        self._always: list[tuple[str, Callable[[], object]]] = []
        self._at_end: list[tuple[str, Callable[[], object]]] = []
        self._counts: dict[str, int] = {}
        self._cases = cases if cases is not None else set()
        self._log = log
        self._atomic: dict[str, int] = {}
        self._held: dict[str, list[Any]] = {}  # task: locks, in the order taken
        self._order: set[tuple[int, int]] = set()  # lock a was held when b was taken
        self._asked: list[Any] = []  # the generators of primitives that wait
        self._parts: list[Any] = []  # primitives, which have their say at the end
        global _active
        _active = self

    # -- what a design calls --

    def task(self, name: str, body: Body, *, daemon: bool = False) -> None:
        """Add a task; it runs up to its first yield now. ``body`` may be a `Run` of `Steps`.

        A daemon may wait for ever at the end without being deadlocked. Raises ValueError for a
        name that is taken.
        """
        if name in self._names:
            raise ValueError(f"two tasks are called {name!r}")
        if len(self._names) == len(LETTERS):
            raise ModelError(f"task {name!r} is one more than {len(LETTERS)}", "keep models small")
        gen = _steps(body) if isinstance(body, Run) else body
        if not is_body(gen):
            raise ModelError(f"task {name!r} is a {type(body).__name__}", "a task is a generator")
        index, before = len(self._gens), self._now
        self._names.append(name)
        self._gens.append(gen)
        self._at.append(None)
        if daemon:
            self._daemons |= 1 << index
        self._now = index
        step = next(gen, None)
        self._now = before
        self._at[index] = step
        if step is None:
            self._ended(index)
        else:
            self._alive |= 1 << index
            if step.__class__ is not str:
                if step.__class__ is not Until:
                    raise self._unknown(index, step)
                self._waiting |= 1 << index

    def spawn(self, name: str, body: Body, *, daemon: bool = False) -> None:
        """Add a task while another runs."""
        self.task(name, body, daemon=daemon)

    def always(self, prop: str, holds: Callable[[], object]) -> None:
        """Demand that ``holds()`` is true after every step."""
        self._always.append((prop, holds))

    def at_end(self, prop: str, holds: Callable[[], object]) -> None:
        """Demand that ``holds()`` is true when all tasks but the daemons have ended."""
        self._at_end.append((prop, holds))

    # -- what a task calls --

    def current(self) -> str:
        """Return the name of the task that runs, "" when none does."""
        return self._names[self._now] if self._now >= 0 else ""

    def check(self, prop: str, holds: object, seen: str = "") -> None:
        """Demand that ``holds`` is true here; ``seen`` says what was there if it is not."""
        if not holds and not self._over:
            raise Broken(prop, seen)

    def fail(self, prop: str, seen: str) -> NoReturn:
        """Say that a property is broken here."""
        raise Broken(prop, seen)

    def count(self, name: str, add: int = 1) -> None:
        """Add to a figure; the least and the most over all schedules that end are told."""
        self._counts[name] = self._counts.get(name, 0) + add

    def case(self, place: str, case: str) -> None:
        """Say that a special case was met at a place; the distinct ones are told."""
        self._cases.add((place, case))

    def note(self, text: str) -> None:
        """Say what is seen here; told when a schedule is replayed, and of no other effect."""
        if self._log is not None:
            self._log.append(text)

    def atomic(self) -> "Atomic":
        """Return a context in which the task must not sleep."""
        return Atomic(self)

    def might_sleep(self, what: str) -> None:
        """Say that what follows may sleep: misuse in an atomic context."""
        if self._atomic and not self._over and self._atomic.get(self.current()):
            raise Broken("atomic-context", f"{self.current()}: {what} may sleep in atomic context")

    # -- what the explorer calls --

    def _misuse(self, prop: str, seen: str) -> None:
        # Generators that were left behind run their `finally` when they are closed.
        if not self._over:
            raise Broken(prop, f"{self.current()}: {seen}" if self._now >= 0 else seen)

    def _enabled(self) -> int:
        """Return the mask of tasks that can do a step."""
        enabled, waiting, at = self._alive, self._waiting, self._at
        while waiting:
            bit = waiting & -waiting
            waiting ^= bit
            step = at[bit.bit_length() - 1]
            if not step.ready():  # type: ignore[union-attr]
                enabled ^= bit
        return enabled

    def _step(self, index: int) -> Step | None:
        """Do one step of a task, which can; return before what it stands then."""
        self._now = index
        step = next(self._gens[index], None)
        self._now = -1
        self._at[index] = step
        bit = 1 << index
        if step is None:
            self._ended(index)
            self._alive &= ~bit
            self._waiting &= ~bit
        elif step.__class__ is str:
            self._waiting &= ~bit
        elif step.__class__ is Until:
            self._waiting |= bit
        else:
            raise self._unknown(index, step)
        return step

    def _ended(self, index: int) -> None:
        """Make sure that a task ended which gave no step: a bare yield looks the same."""
        if getattr(self._gens[index], "gi_frame", None) is not None:
            raise self._unknown(index, None)

    def _unknown(self, index: int, step: object) -> "ModelError":
        return ModelError(
            f"task {self._names[index]!r} yields {step!r}",
            "a task yields the name of the step that it is about to do, or an Until",
        )

    def _check_always(self) -> None:
        for prop, holds in self._always:
            if not holds():
                raise Broken(prop)

    def _check_end(self) -> None:
        """Check what has to hold when no task can do a step."""
        self._now = -1
        for gen in self._asked:
            if gen.gi_frame is not None and not gen.gi_suspended:
                raise ModelError(
                    f"{gen.__qualname__}() was called, and nobody waits for it",
                    "say `yield from` before it",
                )
        stuck = self._alive & ~self._daemons
        if stuck:
            raise _stuck(self, stuck)
        for part in self._parts:
            part._at_end()
        for prop, holds in self._at_end:
            if not holds():
                raise Broken(prop)

    def _close(self) -> None:
        """End the tasks that are left, and let go of them and of the state."""
        if self._over:
            return
        self._over = True
        self._now = -1
        for name, gen, step in zip(self._names, self._gens, self._at, strict=True):
            if step is not None:
                try:
                    gen.close()
                except (Exception, Broken) as error:
                    raise ModelError(
                        f"task {name!r} cannot end before {step!r}: {error}",
                        "no yield in a finally, and nothing there that can fail",
                    ) from error
        self._gens.clear()
        self._at.clear()
        self._always.clear()
        self._at_end.clear()
        self._asked.clear()
        self._parts.clear()
        self._held.clear()


_active: World | None = None  # the world that was made last: one schedule runs at a time


def activate(world: World) -> None:
    """Say that ``world`` is the one that runs, where there are two."""
    global _active
    _active = world


def a_task_runs() -> bool:
    """Whether a task of the world that was made last is in a step, and not the explorer."""
    return _active is not None and _active._now >= 0 and not _active._over


class Atomic:
    """A context in which its task must not sleep; see `World.atomic`."""

    __slots__ = ("_task", "_world")

    def __init__(self, world: World) -> None:
        self._world = world
        self._task = world.current()

    def __enter__(self) -> None:
        atomic = self._world._atomic
        atomic[self._task] = atomic.get(self._task, 0) + 1

    def __exit__(self, *_: object) -> None:
        atomic = self._world._atomic
        atomic[self._task] -= 1
        if not atomic[self._task]:
            del atomic[self._task]


def _steps(run: Run[Any]) -> Generator[Step, None, None]:
    while run.at is not None:
        yield Until(run.at, lambda: run.ready, run.on) if run.waits else run.at
        run.step()


def _stuck(world: World, stuck: int) -> Broken:
    """Say why the tasks in ``stuck`` wait for ever: a lost wake-up, or a circle, or nobody."""
    names, at = world._names, world._at
    waits = {
        names[i]: step
        for i, step in enumerate(at)
        if isinstance(step, Until) and world._alive >> i & 1
    }
    for name, step in waits.items():
        lost = getattr(step.on, "lost", None)
        if world._names.index(name) in _bits(stuck) and lost is not None and lost(name):
            what = getattr(step.on, "name", "it")
            return Broken(
                "no-lost-wake-up", f"{name} sleeps before {step.step!r}: {what} woke nobody"
            )
    for name in waits:
        circle = _circle(name, waits)
        if circle:
            return Broken(
                "no-deadlock", "; ".join(_wait(n, waits[n], names, waits) for n in circle)
            )
    told = (_wait(names[i], waits[names[i]], names, waits) for i in _bits(stuck))
    return Broken("no-deadlock", "; ".join(told))


def _bits(mask: int) -> list[int]:
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


def _holders(step: Until) -> list[str]:
    holders = getattr(step.on, "holders", ())
    # The order of a set of names is another one in each process.
    return sorted(holders) if isinstance(holders, (set, frozenset)) else list(holders)


def _circle(start: str, waits: dict[str, Until]) -> list[str]:
    trail = [start]
    todo = [iter(_holders(waits[start]))]
    seen = {start}
    while todo:
        holder = next(todo[-1], None)
        if holder is None:
            todo.pop()
            trail.pop()
        elif holder == start:
            return trail
        elif holder in waits and holder not in seen:
            seen.add(holder)
            trail.append(holder)
            todo.append(iter(_holders(waits[holder])))
    return []


def _wait(name: str, step: Until, names: list[str], waits: dict[str, Until]) -> str:
    text = f"{name} waits before {step.step!r}"
    what = getattr(step.on, "name", None)
    if what is not None:
        text += f" for {what}"
    holders = _holders(step)
    if holders:
        ended = [f"{h}, which has ended" if h in names and h not in waits else h for h in holders]
        text += f", held by {' and '.join(map(str, ended))}"
    return text


P = ParamSpec("P")
G = TypeVar("G", bound=Generator[Any, None, Any])


def waits(method: Callable[Concatenate[Any, P], G]) -> Callable[Concatenate[Any, P], G]:
    """Make a primitive's method one that the world misses when nobody says ``yield from``."""

    @wraps(method)
    def asked(self: Any, *args: P.args, **kwargs: P.kwargs) -> G:
        waiting = method(self, *args, **kwargs)
        self._world._asked.append(waiting)
        return waiting

    return cast("Callable[Concatenate[Any, P], G]", asked)


def is_body(value: object) -> bool:
    """Whether something can be a task's body, or be waited for with ``yield from``."""
    return isinstance(value, GeneratorType)
