"""Accesses: who is about to open or use an object, and may have to wait for verdicts.

Groups of class PRE_CONTENT are asked before those of class CONTENT, and within a class those made
first (Linux orders these by address). The first one that denies ends the asking. Which group is
next is found when it is its turn, from the marks as they are then.

REFS      an access holds its event, the core, and at most one question. No mark is held: what is
          needed to go on is the place in the order.
LOCKING   none: one owner. Others act while an access waits.
LIFETIME  see ACCESS and ASK. A run that was cut off is taken up by the next one, or the access is
          interrupted: until one of both a group that it asks cannot end.
Linux reference: fsnotify() in fs/notify/fsnotify.c, fanotify_get_response in
fs/notify/fanotify/fanotify.c.
"""

import errno
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from fanwise.lifetime import Lifetime, Steps, Until

from .event import PermissionEvent
from .verdict import ALLOW, Question

if TYPE_CHECKING:
    from .fsnotify import Fsnotify

ASK = Steps(
    "Access.ask",
    {
        "ask the next group": "its question is queued; if nobody is left, the access is allowed",
        "take the verdict": "the group waits for this access no longer; a denial ends the asking",
    },
)


class Access:
    """One access that has to be allowed; made by `Fsnotify.access`.

    ``verdict`` is None until it is decided, then ALLOW (0) or the errno with which the access
    fails; EINTR when it was interrupted.
    """

    __slots__ = ("_core", "_order", "_wake", "event", "question", "state", "verdict")

    state: str

    def __init__(
        self, core: "Fsnotify", event: PermissionEvent, wake: Callable[[], None] | None
    ) -> None:
        self.event = event
        self.question: Question | None = None
        self.verdict: int | None = None
        self._core = core
        self._wake = wake
        self._order = (-1, 0)  # of the group that was asked last
        ACCESS.start(self)

    def asking(self) -> Generator[str | Until, None, int]:
        """Ask every group that wants to be, and wait; returns ``verdict``.

        For protocols that ask in the middle: ``verdict = yield from access.asking()``.
        """
        while self.state == "ASKING":
            if self.question is None:
                yield "ask the next group"
                self._ask()
            else:
                yield ASK.until("take the verdict", self._answered, self.question)
                self._take()
        assert self.verdict is not None
        return self.verdict

    @ASK
    def ask(self) -> Generator[str | Until, None, int]:
        """Ask as `asking`, as a run."""
        return (yield from self.asking())

    def interrupt(self) -> None:
        """Go on without a verdict, as an access whose process was killed. Idempotent.

        Its event is withdrawn if nobody read it; otherwise its number awaits a late answer.
        """
        if self.state != "ASKING":
            return
        question, self.question = self.question, None
        if question is not None:
            question.leave()
        self.verdict = errno.EINTR
        ACCESS.advance(self, "interrupt")

    # Two runs may serve one access between them, as after a run that was cut off.
    def _ask(self) -> None:
        if self.state != "ASKING" or self.question is not None:
            return
        found = self._core.next_asked(self.event, self._order)
        if found is None:
            self._decide(ALLOW)
            return
        group, mask = found
        self._order = group.order
        self.question = group.ask(self.event, mask, self._wake)

    def _answered(self) -> bool:
        return self.question is None or self.question.verdict is not None

    def _take(self) -> None:
        question = self.question
        if question is None:
            return
        verdict = question.verdict
        assert verdict is not None
        self.question = None
        question.leave()
        if verdict != ALLOW:
            self._decide(verdict)

    def _decide(self, verdict: int) -> None:
        self.verdict = verdict
        ACCESS.advance(self, "decide")

    def __repr__(self) -> str:
        return f"<Access {self.event} {self.state}>"


ACCESS: Lifetime[Access] = Lifetime(
    "Access",
    states=("ASKING", "DECIDED", "INTERRUPTED"),
    transitions={"decide": "ASKING -> DECIDED", "interrupt": "ASKING -> INTERRUPTED"},
    invariants={
        "it waits in no group once it has its verdict": lambda a: (
            a.state == "ASKING" or a.question is None
        ),
        "it has one verdict from its end on, and none before": lambda a: (
            (a.verdict is None) == (a.state == "ASKING")
        ),
    },
)
