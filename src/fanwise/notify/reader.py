"""Readers: who takes events and may fail before it is done with them.

What `Group.read` gives is the caller's at once. A reader that writes errors to a file, or sends
them somewhere, uses this instead: an error counts as delivered when the reader says `done`; one
that fails, or is cut off, leaves, and the error is queued again with its count. Permission
events that it took and did not answer go by the group's policy when it leaves.

REFS      the reader holds its group, from `take` to `done` the slot of one error, and until they
          are answered the permission events that it took.
LOCKING   none: one owner; `take` and `done` are atomic, others may act between them.
LIFETIME  see READER and READ. The group's end waits for its readers: a slot is freed only when it
          came back. A reader may say `done`, or leave, also after that end began.
"""

from collections.abc import Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING

from fanwise._errors import BusyError, ClosedError
from fanwise.lifetime import Lifetime, Steps, Until

from .event import Event
from .reserve import Slot
from .verdict import Question

if TYPE_CHECKING:
    from .group import Group

READ = Steps(
    "Reader.read",
    {
        "take": "the events are off the queue, and the error among them is the reader's",
        "use": "the caller has dealt with them",
        "done": "the error is delivered, and its slot is free",
    },
)


class Reader:
    """One reader in flight; made by `Group.reader`. A context manager: with an error it gives back.

    Leaving normally says `done`.
    """

    __slots__ = ("group", "questions", "slot", "state")

    state: str

    def __init__(self, group: "Group") -> None:
        self.group = group
        self.questions: dict[int, Question] = {}  # taken, no answer yet
        self.slot: Slot | None = None
        READER.start(self)

    def take(self, most: int | None = None) -> list[Event]:
        """Take up to ``most`` queued events (None: all), up to and with the first error.

        The error's event is the slot's own: use it before `done`, which empties it; the others are
        the caller's. Raises BusyError before the last error is done, and ClosedError once the
        group's end has begun.
        """
        if self.state == "LEFT" or self.group.state != "OPEN":
            raise ClosedError(
                f"the {'reader has left' if self.state == 'LEFT' else 'group is closed'}"
            )
        if self.slot is not None:
            raise BusyError("the reader still has an error", "call done() first")
        asked = self.group.queue.questions
        events, self.slot = self.group.queue.take(most)
        if asked:
            self.group.verdicts.report(events, self, self.group.holders())
        if self.slot is not None:
            READER.advance(self, "take")
        return events

    def done(self) -> None:
        """Say that what was taken is dealt with. Does nothing without an error."""
        slot, self.slot = self.slot, None
        if slot is not None:
            self.group.errors.done(slot)
            READER.advance(self, "done")

    def leave(self) -> None:
        """Give the reader's place back, and what is not done or answered. Idempotent."""
        if self.state == "LEFT":
            return
        slot, self.slot = self.slot, None
        group = self.group
        empty = not len(group.queue)
        group.verdicts.give_back(self)
        group.errors.leave(slot, group.queue.stopped)
        READER.advance(self, "leave")
        if empty and len(group.queue):
            group.wake()

    @READ
    def read(
        self, use: Callable[[list[Event]], object], most: int | None = None
    ) -> Generator[str | Until, None, int]:
        """Take events, let ``use`` have them, and be done; returns how many there were."""
        yield "take"
        events = self.take(most)
        yield "use"
        use(events)
        yield "done"
        self.done()
        return len(events)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.done()
        self.leave()

    def __repr__(self) -> str:
        return f"<Reader {self.state}>"


READER: Lifetime[Reader] = Lifetime(
    "Reader",
    states=("IDLE", "HOLDING", "LEFT"),
    transitions={
        "take": "IDLE -> HOLDING",
        "done": "HOLDING -> IDLE",
        "leave": "IDLE, HOLDING -> LEFT",
    },
    invariants={
        "a reader has a slot exactly while it holds an error": lambda r: (
            (r.slot is not None) == (r.state == "HOLDING")
        ),
        "nobody who left has to answer": lambda r: r.state != "LEFT" or not r.questions,
    },
)
