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

from .event import Event
from .mark import IGNORES, Mark, On, checked
from .mask import FS_ERROR
from .queue import Queue
from .reader import Reader
from .reserve import ERRORS_LIMIT, Reserve

if TYPE_CHECKING:
    from .fsnotify import Fsnotify

NOTIF = "NOTIF"
CONTENT = "CONTENT"
PRE_CONTENT = "PRE_CONTENT"

QUEUE_LIMIT = 16384  # fs.fanotify.max_queued_events
MARKS_LIMIT = 8192  # the least that fs.fanotify.max_user_marks can be by default

CLOSE = Steps(
    "Group.close",
    {
        "stop queueing": "no event is added and none is read (G1)",
        "detach a mark": "it matches nothing; repeated until all are detached (G2)",
        "wake waiters": "whoever waits for events has been told to leave",
        "wait for waiters": "nobody waits on the group (G3)",
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

    ``cls`` is NOTIF, CONTENT or PRE_CONTENT: who would be asked first. Verdicts do not exist yet,
    so permission events are refused, and the class changes nothing.
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
        "queue",
        "state",
    )

    state: str

    def __init__(
        self,
        core: "Fsnotify",
        cls: str,
        queue_limit: int,
        marks_limit: int,
        errors_limit: int = ERRORS_LIMIT,
    ) -> None:
        if cls not in (NOTIF, CONTENT, PRE_CONTENT):
            raise MarkRefused(f"no class of groups is {cls!r}")
        self.cls = cls
        self.errors = Reserve(errors_limit)
        self.queue = Queue(queue_limit, self.errors)
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
        Raises MarkRefused (also when the group has its number of marks, and for FS_ERROR when there
        is no room for one more error) and ClosedError.
        """
        self._refuse_closed()
        mask = checked(on, mask, flags, adding=True)
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
        mask = checked(on, mask, flags, adding=False)
        mark = self.marks.get(on)
        if mark is None:
            raise MarkRefused(f"the group has no mark on this {on.kind}")
        if mark.cut(mask, flags):
            mark.destroy()

    # -- events --

    def read(self, most: int | None = None) -> list[Event]:
        """Take up to ``most`` queued events (None: all), oldest first. They are the caller's.

        Raises ClosedError once the group's end has begun.
        """
        self._refuse_closed()
        return self.queue.pop(most)

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
            self._once("UNMARKED", "release")
        if self.state == "RELEASED":
            yield CLOSE.until("wait for marks", lambda: not self.dying)
            self._once("RELEASED", "reap")
        if self.state == "REAPED":
            yield "free events"
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
