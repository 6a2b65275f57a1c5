"""Declared lifetimes: the states of an object, the ways between them, and what always holds.

A class whose objects live through states declares them once, and every change of state goes
through the declaration:

    MARK = Lifetime(
        "Mark",
        states=("ATTACHED", "DETACHED", "FREED"),
        transitions={"detach": "ATTACHED -> DETACHED", "free": "DETACHED -> FREED"},
        invariants={"a freed mark has no readers": lambda m: m.state != "FREED" or not m.readers},
    )

    class Mark:
        def __init__(self):
            self.readers = 0
            MARK.start(self)            # self.state is now "ATTACHED"

        def detach(self):
            MARK.advance(self, "detach")

The state is an attribute of the object itself, so a lifetime adds no object, no lock and no
reference cycle; whoever owns the object calls. For things that live and die, never for events.

A protocol of several steps is a generator that yields each step's name just before the step:

    CLOSE = Steps("Group.close", {"stop queueing": "no event is added", "flush": "none is left"})

    @CLOSE
    def close(self):
        yield "stop queueing"
        self.queueing = False
        yield CLOSE.until("flush", lambda: not self.readers)    # a step that waits
        self.queue.clear()

Calling it gives a `Run`. Step = yield point = crash point: the owner runs it to its end, the
explorer runs one step of it and then one of another, and a test ends it at a step as a crash would.
Such a generator has no ``finally``, because nothing runs after a crash, and each of its steps may
be done again: whoever finds a half-done protocol starts a new run.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from types import MappingProxyType
from typing import Generic, NamedTuple, NoReturn, ParamSpec, Protocol, TypeVar

from fanwise._errors import LifetimeError


class Stateful(Protocol):
    """What an object needs in order to have a lifetime: a writable attribute ``state``."""

    state: str


T = TypeVar("T", bound=Stateful)


class Lifetime(Generic[T]):
    """The declaration of one kind of object's life; immutable, and shared by all its objects.

    ``states`` are in order of life and the first is where objects start. ``transitions`` maps a
    name to ``"FROM -> TO"``, or ``"FROM, FROM -> TO"``. ``invariants`` maps a sentence to a
    predicate over the object; they are checked after every transition.

    Raises ValueError for a declaration that names an unknown state or has an unreachable one.
    """

    __slots__ = ("invariants", "name", "states", "transitions")

    def __init__(
        self,
        name: str,
        *,
        states: Sequence[str],
        transitions: Mapping[str, str],
        invariants: Mapping[str, Callable[[T], bool]] | None = None,
    ) -> None:
        self.name = name
        self.states = tuple(states)
        self.transitions = {key: self._parse(key, text) for key, text in transitions.items()}
        self.invariants = dict(invariants or {})
        reached = {target for _, target in self.transitions.values()} | set(self.states[:1])
        for state in self.states:
            if state not in reached:
                raise ValueError(f"{name}: no transition leads to {state}")

    def start(self, owner: T) -> None:
        """Put ``owner`` into the first state. Call it last in ``__init__``: invariants are checked.

        Raises LifetimeError when an invariant does not hold.
        """
        owner.state = self.states[0]
        self._check(owner, "start")

    def advance(self, owner: T, transition: str) -> None:
        """Move ``owner`` along a declared transition, then check the invariants.

        Raises LifetimeError, with the state unchanged, when the transition does not lead from the
        object's state; and, with the state changed, when an invariant does not hold afterwards.
        """
        sources, target = self.transitions.get(transition, ((), ""))
        if owner.state not in sources:
            raise LifetimeError(
                f"{self.name}: no transition {transition!r} from {owner.state}",
                f"allowed: {', '.join(self.allowed(owner.state)) or 'none, this state is final'}",
            )
        owner.state = target
        self._check(owner, transition)

    def allowed(self, state: str) -> list[str]:
        """Return the names of the transitions that lead from ``state``."""
        return [key for key, (sources, _) in self.transitions.items() if state in sources]

    def render_markdown(self) -> str:
        """Return the table of transitions, and the invariants below it, as Markdown."""
        lines = ["| transition | from | to |", "|---|---|---|"]
        for key, (sources, target) in self.transitions.items():
            lines.append(f"| {key} | {', '.join(sources)} | {target} |")
        if self.invariants:
            lines += ["", *(f"- {sentence}" for sentence in self.invariants)]
        return "\n".join(lines) + "\n"

    def render_mermaid(self) -> str:
        """Return the state diagram as Mermaid text."""
        lines = ["stateDiagram-v2", f"    [*] --> {self.states[0]}"]
        for key, (sources, target) in self.transitions.items():
            lines += [f"    {source} --> {target}: {key}" for source in sources]
        lines += [f"    {state} --> [*]" for state in self.states if not self.allowed(state)]
        return "\n".join(lines) + "\n"

    def __repr__(self) -> str:
        return f"<Lifetime {self.name}: {', '.join(self.states)}>"

    def _parse(self, key: str, text: str) -> tuple[tuple[str, ...], str]:
        left, arrow, right = text.partition("->")
        sources, target = tuple(part.strip() for part in left.split(",")), right.strip()
        if not arrow:
            raise ValueError(f"{self.name}: transition {key!r} is not 'FROM -> TO': {text!r}")
        for state in (*sources, target):
            if state not in self.states:
                raise ValueError(f"{self.name}: transition {key!r} names no state: {state!r}")
        return sources, target

    def _check(self, owner: T, transition: str) -> None:
        for sentence, holds in self.invariants.items():
            if not holds(owner):
                raise LifetimeError(
                    f"{self.name}: after {transition!r}, in {owner.state}, it does not hold that"
                    f" {sentence}"
                )


P = ParamSpec("P")
R = TypeVar("R")


class Until(NamedTuple):
    """A step that can be done once ``ready()`` is true; `Steps.until` makes it.

    ``on`` is what is waited for. If it has a ``name`` and ``holders``, those who have it now as
    ``current()`` names them, a deadlock is told with its circle of waiters and holders.
    """

    step: str
    ready: Callable[[], bool]
    on: object = None


class Steps:
    """The declaration of a protocol: its name, and its steps in order with what holds after each.

    Used as a decorator of generator functions that yield the names of these steps. ``steps`` is in
    the order of a run in which nothing is left out; a run may leave out steps, or repeat one.
    """

    __slots__ = ("name", "steps")

    def __init__(self, name: str, steps: Mapping[str, str]) -> None:
        self.name = name
        self.steps = dict(steps)

    def __call__(
        self, protocol: Callable[P, Generator[str | Until, None, R]]
    ) -> Callable[P, "Run[R]"]:
        """Make calls of a generator function start a `Run` of this protocol."""

        def start(*args: P.args, **kwargs: P.kwargs) -> Run[R]:
            return Run(self, protocol(*args, **kwargs))

        start.__doc__, start.__name__ = protocol.__doc__, protocol.__name__
        start.__qualname__, start.__module__ = protocol.__qualname__, protocol.__module__
        return start

    def until(self, step: str, ready: Callable[[], bool], on: object = None) -> Until:
        """Make what a protocol yields before a step that has to wait for others."""
        return Until(step, ready, on)

    def render_markdown(self) -> str:
        """Return the table of steps as Markdown."""
        lines = ["| step | name | after it |", "|---|---|---|"]
        lines += [f"| {i} | {step} | {holds} |" for i, (step, holds) in self._numbered()]
        return "\n".join(lines) + "\n"

    def render_mermaid(self) -> str:
        """Return the sequence as Mermaid text."""
        lines = ["flowchart LR"]
        lines += [f'    s{i}["{step}"]' for i, (step, _) in self._numbered()]
        lines += [f"    s{i} --> s{i + 1}" for i in range(1, len(self.steps))]
        return "\n".join(lines) + "\n"

    def __repr__(self) -> str:
        return f"<Steps {self.name}: {', '.join(self.steps)}>"

    def _numbered(self) -> list[tuple[int, tuple[str, str]]]:
        return list(enumerate(self.steps.items(), start=1))


class Run(Generic[R]):
    """One run of a protocol, standing before the step ``at`` (None: it has ended).

    REFS      owns the generator. LOCKING  none: one owner.
    LIFETIME  ends with its last step, with an error out of a step, or with `kill`.
    """

    __slots__ = ("_generator", "_ready", "_result", "at", "declared", "on")

    def __init__(self, declared: Steps, generator: Generator[str | Until, None, R]) -> None:
        self.declared = declared
        self.at: str | None = None
        self.on: object = None  # what the step `at` waits for, if that is known
        self._generator = generator
        self._ready: Callable[[], bool] | None = None
        self._result: list[R] = []
        self._go(lambda: next(generator))

    @property
    def ready(self) -> bool:
        """Whether the step ``at`` can be done now; False also at the end."""
        return self.at is not None and (self._ready is None or self._ready())

    @property
    def waits(self) -> bool:
        """Whether the step ``at`` is one that waits for others, whether or not it can be done."""
        return self._ready is not None

    @property
    def result(self) -> R:
        """What the protocol returned. Raises LifetimeError unless it ran to its end."""
        if not self._result:
            self._refuse("has no result", f"it stands before {self.at!r}" if self.at else None)
        return self._result[0]

    def step(self) -> str:
        """Do one step and return its name; stands before the next one then.

        Raises LifetimeError when there is none or it has to wait, and whatever the step raises.
        """
        done = self.at
        if done is None:
            self._refuse("has ended")
        if not self.ready:
            self._refuse(f"cannot do {done!r} yet", "others have to go first")
        self._go(lambda: next(self._generator))
        return done

    def fault(self, error: BaseException) -> None:
        """Let the step ``at`` fail with ``error``, which comes out unless the protocol takes it.

        Raises LifetimeError when the run has ended.
        """
        if self.at is None:
            self._refuse("has ended")
        self._go(lambda: self._generator.throw(error))

    def kill(self) -> None:
        """End here as a crash would: the step ``at`` and what follows are never done."""
        self.at = self._ready = self.on = None
        self._generator.close()

    def run(
        self,
        *,
        kill: str | None = None,
        faults: Mapping[str, BaseException] = MappingProxyType({}),
        wait: Callable[["Run[R]"], object] | None = None,
    ) -> bool:
        """Do the steps up to the end; whether it was reached.

        Ends as by `kill` before the step named ``kill``. A step named in ``faults`` fails with that
        error, once. Where a step has to wait, ``wait`` is called until it need not, and without
        ``wait`` the run stands there and False is returned: call again later.
        Raises LifetimeError for a name that is not declared, and whatever a step raises.
        """
        for name in (*faults, *([kill] if kill else [])):
            if name not in self.declared.steps:
                self._refuse(f"has no step {name!r}")
        left = dict(faults)
        while self.at is not None:
            if self.at == kill:
                self.kill()
                return False
            if self.at in left:
                self.fault(left.pop(self.at))
            elif self.ready:
                self.step()
            elif wait is not None:
                wait(self)
            else:
                return False
        return bool(self._result)

    def __repr__(self) -> str:
        return f"<Run of {self.declared.name}, before {self.at!r}>"

    def _go(self, resume: Callable[[], str | Until]) -> None:
        self.at = self._ready = self.on = None
        try:
            step = resume()
        except StopIteration as end:
            self._result.append(end.value)
            return
        name, self._ready, self.on = step if isinstance(step, Until) else (step, None, None)
        if name not in self.declared.steps:
            self._generator.close()
            self._refuse(f"yields a step that is not declared: {name!r}")
        self.at = name

    def _refuse(self, reason: str, remedy: str | None = None) -> NoReturn:
        raise LifetimeError(f"{self.declared.name}: {reason}", remedy)
