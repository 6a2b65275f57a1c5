"""Groups: who wants to know. A group has marks, a queue, and an end in a strict order.

REFS      the core holds its groups; a group holds its marks, the dying ones included, and its
          queue. Readers own what they popped, and may keep it beyond the group's end.
LOCKING   none: one owner. A reader elsewhere is woken by what it gave to `wait`, which only posts.
LIFETIME  see GROUP and CLOSE. Marks are gone before events are freed, because a mark that is still
          found could queue one more; each step may be done again, so an end that was cut off is
          finished by closing again.
Linux reference: fs/notify/group.c (fsnotify_destroy_group).
"""

from collections.abc import Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING

from fanwise._errors import BusyError, ClosedError, MarkRefused
from fanwise.lifetime import Lifetime, Steps, Until

from .event import Event, PermissionEvent
from .mark import CLASSES, CONTENT, IGNORES, NOTIF, PRE_CONTENT, Mark, On, checked
from .mask import FS_ERROR, PERMISSION
from .queue import Queue
from .reader import Reader
from .reserve import ERRORS_LIMIT, Reserve
from .verdict import QUESTIONS_LIMIT, Policy, Question, Verdicts

if TYPE_CHECKING:
    from .fsnotify import Fsnotify

__all__ = ["CLOSE", "CONTENT", "GROUP", "NOTIF", "PRE_CONTENT", "Group"]

QUEUE_LIMIT = 16384  # fs.fanotify.max_queued_events
MARKS_LIMIT = 8192  # the least that fs.fanotify.max_user_marks can be by default

CLOSE = Steps(
    "Group.close",
    {
        "stop queueing": "no event is added and none is read (G1)",
        "answer an access": "it goes by the policy; repeated until none waits for a verdict",
        "detach a mark": "it matches nothing; repeated until all are detached (G2)",
        "wake waiters": "whoever waits for events has been told to leave",
        "wait for waiters": "nobody waits for events",
        "wait for askers": "every access that asked has gone on (G3)",
        "wait for marks": "every mark of the group is freed (G4)",
        "free events": "the queue holds no event (G5)",
        "free overflow": "nor an overflow (G6)",
        "wait for readers": "every error's slot came back",
        "free reserve": "the group has no slot",
        "put group": "the core does not know the group (G7)",
    },
)


class Group:
    """One listener; made by `Fsnotify.group`. A context manager that closes it.

    ``cls`` is NOTIF, CONTENT or PRE_CONTENT: which events it can ask for, and who is asked first.
    ``verdicts`` are its permission events (`fanwise.notify.verdict`).
    """

    __slots__ = (
        "_core",
        "_waiters",
        "cls",
        "dying",
        "errors",
        "marks",
        "marks_limit",
        "marks_used",
        "order",
        "queue",
        "state",
        "verdicts",
    )

    state: str

    def __init__(
        self,
        core: "Fsnotify",
        cls: str,
        queue_limit: int,
        marks_limit: int,
        errors_limit: int = ERRORS_LIMIT,
        policy: Policy | None = None,
        questions_limit: int = QUESTIONS_LIMIT,
        number: int = 0,
    ) -> None:
        if cls not in CLASSES:
            raise MarkRefused(f"no class of groups is {cls!r}")
        self.cls = cls
        self.order = (CLASSES.index(cls), number)  # in which groups are asked
        self.errors = Reserve(errors_limit)
        self.queue = Queue(queue_limit, self.errors)
        self.verdicts = Verdicts(cls, policy, questions_limit, self.queue)
        self.marks: dict[On, Mark] = {}  # attached
        self.dying: dict[Mark, None] = {}  # detached, not yet freed
        self.marks_limit, self.marks_used = marks_limit, 0
        self._core = core
        self._waiters: dict[Callable[[], None], None] = {}
        GROUP.start(self)

    # -- marks --

    def add(self, on: On, mask: int, flags: int = 0) -> Mark:
        """Add to the mask of the mark on an object, or to its ignore mask, making it if need be.

        ``flags``: IGNORE or IGNORED_MASK, and SURV_MODIFY, of `fanwise.notify.mark`, as for
        fanotify_mark(2). One difference: an ignore mask that does not survive modifications is
        added although the file is open for writing, which is not known here.
        Raises MarkRefused (also when the group has its number of marks, for FS_ERROR when there is
        no room for one more error, and for permission events without a policy) and ClosedError.
        """
        self._refuse_closed()
        mask = checked(self.cls, on, mask, flags, adding=True)
        if mask & PERMISSION and self.verdicts.policy is None:
            raise MarkRefused(
                "the group has not declared what an access gets that nobody answers",
                "make it with a policy",
            )
        mark = self.marks.get(on)
        if mark is None and self.marks_used >= self.marks_limit:
            raise MarkRefused(
                f"the group has {self.marks_limit} marks, its limit",
                "remove some, or make the group with a higher marks_limit",
            )
        if mask & FS_ERROR and not flags & IGNORES and not (mark and mark.mask & FS_ERROR):
            # First, because it can fail; nothing below does when this is asked for.
            self.errors.mark(on.fs)
        if mark is None:
            connector = self._core.superblock(on.fs).connector(on)
            self.marks_used += 1
            mark = self.marks[on] = Mark(self, on, connector)
        mark.change(mask, flags)
        return mark

    def remove(self, on: On, mask: int, flags: int = 0) -> None:
        """Remove from the mask or the ignore mask; a mark with nothing left is destroyed.

        Raises MarkRefused (also when there is no such mark) and ClosedError.
        """
        self._refuse_closed()
        mask = checked(self.cls, on, mask, flags, adding=False)
        mark = self.marks.get(on)
        if mark is None:
            raise MarkRefused(f"the group has no mark on this {on.kind}")
        if mark.cut(mask, flags):
            mark.destroy()

    # -- events --

    def read(self, most: int | None = None) -> list[Event]:
        """Take up to ``most`` queued events (None: all), oldest first. They are the caller's.

        Permission events among them wait for `answer`. Raises ClosedError once the group's end has
        begun.
        """
        self._refuse_closed()
        asked = self.queue.questions
        events = self.queue.pop(most)
        if asked:
            self.verdicts.report(events, None, self.holders())
        return events

    def holders(self) -> tuple[object, ...]:
        """Return who runs now, as the owner tells it, for what is read now; () when it does not."""
        current = self._core.current
        return () if current is None else (current(),)

    def answer(self, number: int, verdict: int) -> bool:
        """Give the verdict on a permission event that was read: ALLOW or an errno.

        ``number`` is the event's. False when its access did not wait for it: it was interrupted, or
        had its verdict by policy. Raises AnswerRefused, with the event still waiting, for a verdict
        that the class cannot give, and for a number that was not read or was answered; ClosedError.
        """
        self._refuse_closed()
        return self.verdicts.answer(number, verdict)

    def ask(
        self, event: PermissionEvent, mask: int, wake: Callable[[], None] | None = None
    ) -> Question:
        """Put a question, for `Access`. Once the group's end has begun its policy answers."""
        empty = not len(self.queue)
        question = self.verdicts.ask(event, mask, wake)
        if empty and len(self.queue):
            self.wake()
        return question

    def reader(self) -> Reader:
        """Make a reader that says when it is done with an error, with room for that error.

        Raises MarkRefused when there is none, and ClosedError.
        """
        self._refuse_closed()
        self.errors.enter()
        return Reader(self)

    def wait(self, wake: Callable[[], None]) -> None:
        """Register a waiter: ``wake`` is called when an empty queue gets an event, and at the end.

        It must not call back into notify. The group's end waits for `leave`. Raises ClosedError.
        """
        self._refuse_closed()
        self._waiters[wake] = None

    def leave(self, wake: Callable[[], None]) -> None:
        """Unregister a waiter. Does nothing for one that is not registered."""
        self._waiters.pop(wake, None)

    def wake(self) -> None:
        """Call every waiter."""
        for wake in list(self._waiters):
            wake()

    # -- the end --

    @CLOSE
    def close(self) -> Generator[str | Until, None, None]:
        """End the group, in the order of `CLOSE`. An end that was cut off is taken up again."""
        if self.state == "OPEN":
            yield "stop queueing"
            self._once("OPEN", "stop")
            self.queue.stopped = True
        while self.verdicts.open:
            yield "answer an access"
            self.verdicts.close_one()
        while self.marks:
            yield "detach a mark"
            if self.marks:
                next(iter(self.marks.values())).destroy()
        for mark in list(self.dying):
            mark.free()  # one that somebody detached and did not free
        self._once("STOPPED", "unmark")
        if self.state == "UNMARKED":
            yield "wake waiters"
            self.wake()
            yield CLOSE.until("wait for waiters", lambda: not self._waiters)
            yield CLOSE.until("wait for askers", lambda: not self.verdicts.askers)
            self._once("UNMARKED", "release")
        if self.state == "RELEASED":
            yield CLOSE.until("wait for marks", lambda: not self.dying)
            self._once("RELEASED", "reap")
        if self.state == "REAPED":
            yield "free events"
            if self.state == "REAPED":  # the other run may have freed the reserve since
                self.verdicts.forget()
                self.queue.flush()
            yield "free overflow"
            self.queue.free_overflow()
            self._once("REAPED", "flush")
        if self.state == "FLUSHED":
            yield CLOSE.until("wait for readers", lambda: not self.errors.readers)
            yield "free reserve"
            self.errors.close()
            self._once("FLUSHED", "drain")
        if self.state == "DRAINED":
            yield "put group"
            self._core.groups.pop(self, None)
            self._once("DRAINED", "put")

    # Two runs may end one group between them; what one has done the other finds done.
    def _once(self, state: str, transition: str) -> None:
        if self.state == state:
            GROUP.advance(self, transition)

    def _refuse_closed(self) -> None:
        if self.state != "OPEN":
            raise ClosedError("the group is closed")

    def __enter__(self) -> "Group":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        run = self.close()
        if not run.run():
            raise BusyError(
                f"the group cannot be closed yet: it stands before {run.at!r}",
                "let the readers leave, then close it again",
            )

    def __repr__(self) -> str:
        return f"<Group {self.cls} {self.state}, {len(self.marks)} marks, {len(self.queue)} events>"


GROUP: Lifetime[Group] = Lifetime(
    "Group",
    states=("OPEN", "STOPPED", "UNMARKED", "RELEASED", "REAPED", "FLUSHED", "DRAINED", "CLOSED"),
    transitions={
        "stop": "OPEN -> STOPPED",
        "unmark": "STOPPED -> UNMARKED",
        "release": "UNMARKED -> RELEASED",
        "reap": "RELEASED -> REAPED",
        "flush": "REAPED -> FLUSHED",
        "drain": "FLUSHED -> DRAINED",
        "put": "DRAINED -> CLOSED",
    },
    invariants={
        "an unmarked group has no mark attached": lambda g: (
            g.state in ("OPEN", "STOPPED") or not g.marks
        ),
        "a released group has no waiters": lambda g: (
            g.state in ("OPEN", "STOPPED", "UNMARKED") or not g._waiters
        ),
        "no access waits in a released group": lambda g: (
            g.state in ("OPEN", "STOPPED", "UNMARKED") or not g.verdicts.askers
        ),
        "every access is answered before the last mark is gone": lambda g: (
            g.state in ("OPEN", "STOPPED") or not g.verdicts.open
        ),
        "every mark is freed before any event is": lambda g: (
            g.state not in ("REAPED", "FLUSHED", "DRAINED", "CLOSED") or not (g.marks or g.dying)
        ),
        "a flushed group has nothing queued": lambda g: (
            g.state not in ("FLUSHED", "DRAINED", "CLOSED") or not len(g.queue)
        ),
        "a drained group has no slot and no reader": lambda g: (
            g.state not in ("DRAINED", "CLOSED") or g.errors.state == "CLOSED"
        ),
    },
)
