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
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

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
