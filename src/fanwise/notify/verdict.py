"""Verdicts: a group's permission events, each with one access that waits for ALLOW or an errno.

An access asks one group at a time (`fanwise.notify.access`); what it asks a group is a question.
Nothing waits for ever and nothing is decided in silence: who reads answers, or the group's declared
`Policy` does, when a deadline passed, the group ends, a reader left, or too many questions are
open. Linux has no deadline, allows what waits when the group ends, and allows what finds its queue
full (fsnotify_insert_event): an access that is allowed so reads what nobody filled or scanned.

Questions take no room of other events, and a full queue takes none of them; each has an access that
waits, so their number is bounded by that and by the group's limit. They never merge.

Numbers are counted up and never used again. In Linux they are descriptors of the process that read
the event: a successor that answered for its predecessor allowed another access than it meant.

REFS      `Verdicts` holds the questions without a verdict, and those whose number a reader knows.
          A question is held by its access too, until that has the verdict or goes without it.
LOCKING   none: one owner; every method is atomic.
LIFETIME  see QUESTION: Linux's FAN_EVENT_INIT, REPORTED, ANSWERED and CANCELED. The group's end
          answers them all (`answer an access`), then waits until every asker has gone on.
Linux reference: fanotify_get_response in fs/notify/fanotify/fanotify.c; process_access_response,
finish_permission_event and fanotify_release in fs/notify/fanotify/fanotify_user.c.
"""

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from fanwise._errors import AnswerRefused, MarkRefused
from fanwise.lifetime import Lifetime

from .event import Event, PermissionEvent
from .mark import CONTENT, NOTIF
from .mask import show
from .queue import Queue

if TYPE_CHECKING:
    from .reader import Reader

ALLOW = 0
"""The verdict that lets an access go on. Any other is the errno with which it fails."""

DENY = errno.EPERM
"""What an access gets that is denied without another reason (FAN_DENY)."""

ERRNOS = frozenset(
    (
        errno.EPERM,
        errno.EIO,
        errno.EBUSY,
        errno.ETXTBSY,
        errno.EAGAIN,
        errno.ENOSPC,
        errno.EDQUOT,
    )
)
"""With what class PRE_CONTENT can deny; class CONTENT only with EPERM."""

QUESTIONS_LIMIT = 16384


class Policy(NamedTuple):
    """What an access gets that nobody answered: each ALLOW, or the errno with which it fails.

    ``late`` when ``patience`` seconds have passed (None: no deadline), ``closing`` when the group
    ends, ``full`` when it has its number of open questions (None: as ``late``). ``left`` when its
    reader left with it: None puts it back at the head of the queue for the next reader.
    """

    late: int
    closing: int
    patience: float | None
    full: int | None = None
    left: int | None = None


AS_LINUX = Policy(late=ALLOW, closing=ALLOW, patience=None)
"""What the kernel does."""


class Question:
    """What one access asks one group. ``verdict`` is None until there is one.

    ``wake`` is called when it comes; it must not call back into notify. ``holders`` is who read it,
    as `Fsnotify.current` told then: a deadlock of who waits here is told with it.
    """

    __slots__ = (
        "deadline", "event", "holders", "number", "reader", "state", "verdict", "verdicts", "wake",
    )  # fmt: skip

    state: str

    def __init__(
        self, verdicts: "Verdicts", event: PermissionEvent, wake: Callable[[], None] | None
    ) -> None:
        self.verdicts = verdicts
        self.event = event
        self.number = event.number
        self.wake = wake
        self.verdict: int | None = None
        self.deadline: float | None = None  # from the first tick on
        self.reader: Reader | None = None
        self.holders: tuple[object, ...] = ()
        verdicts.open[self.number] = self
        QUESTION.start(self)

    @property
    def name(self) -> str:
        """What its access waits for."""
        return f"the verdict of {self.verdicts.cls} on {show(self.event.mask)}"

    def leave(self) -> None:
        """The access goes on, with the verdict or without one. To be called once."""
        self.verdicts.left(self)

    def __repr__(self) -> str:
        return f"<Question {self.event} {self.state}>"


QUESTION: Lifetime[Question] = Lifetime(
    "Question",
    states=("WAITING", "REPORTED", "ANSWERED", "CANCELLED", "FREED"),
    transitions={
        "report": "WAITING -> REPORTED",
        "put back": "REPORTED -> WAITING",
        "answer": "WAITING, REPORTED -> ANSWERED",
        "withdraw": "WAITING -> FREED",
        "cancel": "REPORTED -> CANCELLED",
        "take": "ANSWERED -> FREED",
        "drop": "CANCELLED -> FREED",
    },
    invariants={
        "it is open exactly until there is a verdict or the access went without one": lambda q: (
            (q.verdicts.open.get(q.number) is q) == (q.state in ("WAITING", "REPORTED"))
        ),
        "an open one has no verdict, an answered one has": lambda q: (
            (q.state not in ("WAITING", "REPORTED") or q.verdict is None)
            and (q.state != "ANSWERED" or q.verdict is not None)
        ),
        "its number can be answered exactly while a reader may answer": lambda q: (
            (q.verdicts.held.get(q.number) is q) == (q.state in ("REPORTED", "CANCELLED"))
        ),
        "its reader is who has it": lambda q: (
            q.reader is None or q.reader.questions.get(q.number) is q
        ),
    },
)


class Verdicts:
    """The questions of a group, and who waits for them.

    ``open`` are those without a verdict, in the order in which they were asked. ``held`` are those
    whose number a reader knows; one that is not open any more is there until its answer comes,
    ``late`` of them. ``askers`` counts accesses that have not gone on yet (user_waits in Linux).
    """

    __slots__ = (
        "_fresh", "_number", "_queue", "askers", "cls", "held", "late", "limit", "open", "policy",
    )  # fmt: skip

    def __init__(self, cls: str, policy: Policy | None, limit: int, queue: Queue) -> None:
        if policy is not None:
            if cls == NOTIF:
                raise MarkRefused(
                    "a group of class NOTIF is never asked, and has no policy",
                    "leave it out, or make the group with class CONTENT or PRE_CONTENT",
                )
            for verdict in (policy.late, policy.closing, policy.full, policy.left):
                if verdict is not None and (why := _refused(cls, verdict)):
                    raise MarkRefused(f"a policy cannot be {verdict}: {why[0]}", why[1])
        self.cls, self.policy, self.limit = cls, policy, limit
        self.open: dict[int, Question] = {}
        self.held: dict[int, Question] = {}
        self.askers = self.late = 0
        self._queue = queue
        self._number = 0
        self._fresh: list[Question] = []  # no tick has seen them

    # -- the access --

    def ask(self, event: PermissionEvent, mask: int, wake: Callable[[], None] | None) -> Question:
        """Put a copy of ``event`` with ``mask`` to the group; it counts as an asker until it left.

        One that cannot be put has its verdict at once: of a group that ends, or has its number.
        """
        policy = self._policy()
        self._number += 1
        copy: PermissionEvent = event.__copy__()  # type: ignore[attr-defined]
        copy.mask, copy.number = mask, self._number
        full = len(self.open) + self.late >= self.limit
        question = Question(self, copy, wake)
        self.askers += 1
        if self._queue.stopped:
            self._settle(question, policy.closing)
        elif full:
            self._settle(question, policy.late if policy.full is None else policy.full)
        else:
            self._fresh.append(question)
            self._queue.put(copy)
        return question

    def left(self, question: Question) -> None:
        """Let the access go on: what nobody read is withdrawn, what was read awaits its answer."""
        self.askers -= 1
        if question.state == "WAITING":
            del self.open[question.number]
            self._queue.remove(question.event)
            QUESTION.advance(question, "withdraw")
        elif question.state == "REPORTED":
            self._cancel(question)
        elif question.state == "ANSWERED":
            QUESTION.advance(question, "take")

    # -- the reader --

    def report(
        self, events: list[Event], reader: "Reader | None", holders: tuple[object, ...]
    ) -> None:
        """Note that these events were read; they are replaced by copies, which are the reader's."""
        for at, event in enumerate(events):
            if type(event) is PermissionEvent:
                question = self.open[event.number]
                events[at] = event.__copy__()  # type: ignore[attr-defined]
                self.held[event.number] = question
                question.holders = holders
                if reader is not None:
                    question.reader = reader
                    reader.questions[event.number] = question
                QUESTION.advance(question, "report")

    def answer(self, number: int, verdict: int) -> bool:
        """Give the verdict on a question that was read; False when its access did not wait for it.

        That is when it was interrupted, or had its verdict by policy: each such number can be
        answered once. Raises AnswerRefused for a number that nobody reads or that was answered,
        and for a verdict that this class cannot give.
        """
        if why := _refused(self.cls, verdict):
            raise AnswerRefused(f"the verdict cannot be {verdict}: {why[0]}", why[1])
        question = self.held.get(number)
        if question is None:
            raise AnswerRefused(
                f"no event {number} waits for an answer"
                + (": it has not been read" if number in self.open else ""),
                "answer each event once, after it was read",
            )
        if question.state == "CANCELLED":
            self._drop(question)
            return False
        self._answer(question, verdict)
        return True

    def give_back(self, reader: "Reader") -> None:
        """A reader leaves with what it did not answer."""
        left = None if self.policy is None else self.policy.left
        for question in list(reader.questions.values()):
            if question.state == "CANCELLED":
                self._drop(question)
            elif left is not None:
                self._answer(question, left)
            else:
                self._let_go(question)
                self._queue.put_back(question.event)
                QUESTION.advance(question, "put back")

    # -- the policy --

    def tick(self, now: float) -> float | None:
        """Answer what is late at ``now``, in seconds; returns when the next will be, or None.

        A question's time begins with the first tick after it was asked: it is never cut short.
        """
        if self.policy is None or self.policy.patience is None:
            return None
        for question in self._fresh:
            question.deadline = now + self.policy.patience
        self._fresh.clear()
        while self.open:
            question = next(iter(self.open.values()))
            assert question.deadline is not None
            if question.deadline > now:
                return question.deadline
            self._expire(question, self.policy.late)
        return None

    def close_one(self) -> None:
        """Answer the oldest question for the group that ends. Does nothing without one."""
        for question in self.open.values():
            self._answer(question, self._policy().closing)
            return

    def forget(self) -> None:
        """Forget the numbers that readers know: nobody can answer any more."""
        for question in list(self.held.values()):
            self._drop(question)
        self._fresh.clear()

    # -- within --

    def _policy(self) -> Policy:
        assert self.policy is not None, "no mark asks for verdicts without a policy"
        return self.policy

    def _expire(self, question: Question, verdict: int) -> None:
        if question.state == "WAITING":
            self._answer(question, verdict)
            return
        question.verdict = verdict
        self._cancel(question)
        if question.wake is not None:
            question.wake()

    def _cancel(self, question: Question) -> None:
        del self.open[question.number]
        self.late += 1
        QUESTION.advance(question, "cancel")

    def _answer(self, question: Question, verdict: int) -> None:
        if question.state == "REPORTED":
            self._let_go(question)
        else:
            self._queue.remove(question.event)
        self._settle(question, verdict)

    def _settle(self, question: Question, verdict: int) -> None:
        del self.open[question.number]
        question.verdict = verdict
        QUESTION.advance(question, "answer")
        if question.wake is not None:
            question.wake()

    def _drop(self, question: Question) -> None:
        self._let_go(question)
        self.late -= 1
        QUESTION.advance(question, "drop")

    def _let_go(self, question: Question) -> None:
        del self.held[question.number]
        if question.reader is not None:
            del question.reader.questions[question.number]
            question.reader = None
        question.holders = ()

    def __repr__(self) -> str:
        return f"<Verdicts {len(self.open)} open, {len(self.held)} held, {self.askers} askers>"


def _refused(cls: str, verdict: int) -> tuple[str, str] | None:
    if verdict in (ALLOW, DENY):
        return None
    if cls == CONTENT:
        return "class CONTENT denies with EPERM only", "use ALLOW or EPERM"
    if verdict not in ERRNOS:
        names = ", ".join(sorted(errno.errorcode[code] for code in ERRNOS))
        return f"it is not ALLOW, nor one of {names}", "use one of these"
    return None
