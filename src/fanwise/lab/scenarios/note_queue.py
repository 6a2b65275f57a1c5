"""What a queue of notes does when it is full: slots of a fixed size, an overflow event, a count.

REFS      a model's queue holds its notes.
LOCKING   the queue's lock: a section under it is one step.
LIFETIME  SLOT and OVERFLOW of the designs; fanwise's queue has that of its group.
"""

from collections.abc import Generator
from typing import Protocol

from fanwise.lab import Scenario, World
from fanwise.lifetime import Lifetime, Until
from fanwise.notify import mask as m
from fanwise.notify.event import Event
from fanwise.notify.queue import Queue

Steps = Generator[str | Until, None, None]

SCENARIO = Scenario(
    "note-queue",
    "What a full queue tells",
    """
A queue between the kernel and a reader that may be slow has a bound, so sooner or later something
finds no room. Then the reader has to know two things: that something is missing, and where,
because what it believes about the time before the gap still stands, and what it believes about
the time after it does not. And a note that is longer than others, a path or a text, has to arrive
whole or not at all.

**Slots.** The general notification queue of 2019 and 2020 was built on pipes. Its proponents
wanted a queue that costs nothing when a note is posted: slots of 128 bytes, allocated once, a
pipe that everybody can read and poll, one queue for keys, mounts, block devices and superblocks.
When there is no slot, a flag on the last note says that what came after it is lost, and the
reader finds that as a note of its own once it has read so far (`fixed-slots`). Errors of
filesystems were to come as text. A text that does not fit into a slot has to be spread over
several, each posted by itself. When the second one finds no room, the first one is in the queue
already, and another note may stand between them. And the flag is one bit: it does not say how
many are lost. Sources for mounts and superblocks were never merged.

**One overflow event.** fanotify queues its loss in line: one event of the group, allocated with
it, goes to the end of the queue when something finds no room, and stands there until it is read
(`inline-overflow`). Nothing is marked, there is no flag to carry over, and a long record is an
event of its own. There is one such event, though. While it waits to be read it cannot stand in
two places: once the reader has made room and something newer was queued behind it, a second loss
is told by the first one's place. A reader that starts anew when it finds it is right all the
same, because it finds it after both losses; one that keeps what it read after it is not.

**Counting.** fanwise queues one overflow for each gap, which takes further losses as long as
nothing stands behind it, and counts them (`counted-loss`).
""",
    properties={
        "loss-in-place": (
            "Whoever reads a note knows whether something is missing between it and the one before."
        ),
        "loss-counted": "Where a number of lost notes is told, so many are missing there.",
        "whole-or-absent": "A long note is read whole, or not at all.",
    },
)


class Desk:
    """Two who post, one who reads, and what the reader knows of what was posted.

    A queue gives the notes in the order in which they were posted, so those between two that were
    read one after the other are missing. ``anew``: a reader that is told of a loss finds out by
    itself how things stand then, and so knows of all that was posted before.
    """

    def __init__(self, world: World, *, anew: bool = False) -> None:
        self.world = world
        self.anew = anew
        self.posted: list[str] = []
        self.at = 0  # what is posted before it the reader knows of
        self.told: int | None = 0  # lost since the last note; None: some
        self.posting = 0

    def begin(self, queue: "Notes") -> None:
        """Make the tasks."""
        for name in ("a", "b"):
            self.posting += 1
            self.world.task(f"poster {name}", self._post(queue, name))
        self.world.task("reader", self._read(queue))

    def _post(self, queue: "Notes", name: str) -> Steps:
        for number in (1, 2, 3):
            yield from queue.post(f"{name}{number}", 2 if number == 2 else 1)
        self.posting -= 1

    def _read(self, queue: "Notes") -> Steps:
        while True:
            yield Until("read", lambda: queue.readable() or not self.posting)
            if not queue.readable():
                break
            yield from queue.read()
        self._judge(len(self.posted), "at the end")

    def read(self, note: str) -> None:
        """The reader has a note."""
        where = self.posted.index(note)
        if self.anew and where < self.at:
            return
        self._judge(where, f"before {note}")
        self.at, self.told = where + 1, 0

    def read_loss(self, count: int | None) -> None:
        """The reader is told of a loss, of a number of notes if that is known."""
        if self.anew:
            self.at = len(self.posted)
            return
        self.told = None if count is None or self.told is None else self.told + count

    def _judge(self, until: int, where: str) -> None:
        missing = until - self.at
        told = "some" if self.told is None else str(self.told)
        seen = f"{where}: {missing} missing, told of {told}"
        self.world.check("loss-in-place", (self.told != 0) == (missing != 0), seen)
        self.world.check("loss-counted", self.told is None or self.told == missing, seen)


class Notes(Protocol):
    """A queue of notes, and its reader's side."""

    def post(self, note: str, length: int) -> Steps:
        """Post a note that needs ``length`` slots, where there are slots."""

    def readable(self) -> bool:
        """Whether there is something to read."""

    def read(self) -> Steps:
        """Read once, in the step that calls and those that it yields."""


class Cell:
    """A slot of the pipe: part of a note, and whether something is lost after it."""

    def __init__(self) -> None:
        self.note = ""
        self.more = False  # the note goes on in another slot
        self.loss = False
        self.state = ""
        SLOT.start(self)


SLOT: Lifetime[Cell] = Lifetime(
    "Note slot",
    states=("FREE", "QUEUED", "FLAGGED"),
    transitions={
        "post": "FREE -> QUEUED",
        "lose": "QUEUED, FLAGGED -> FLAGGED",
        "release": "QUEUED, FLAGGED -> FREE",
    },
    invariants={"the flag stands on a queued slot": lambda s: s.loss == (s.state == "FLAGGED")},
)


class Pipe:
    """Slots of a fixed size, allocated once (kernel/watch_queue.c, fs/pipe.c).

    ``longest`` is how many slots a note may need.
    """

    def __init__(self, desk: Desk, slots: int = 2, longest: int = 2) -> None:
        self.desk = desk
        self.longest = longest
        self.free = [Cell() for _ in range(slots)]
        self.queue: list[Cell] = []
        self.loss = False
        self.begun = ""  # of this note the reader has the first part

    def post(self, note: str, length: int) -> Steps:
        """Post each part by itself."""
        parts = min(length, self.longest)
        for part in range(1, parts + 1):
            yield f"post {note}, part {part}" if parts > 1 else f"post {note}"
            if part == parts:
                self.desk.posted.append(note)
            if not self.free:
                self.desk.world.case("enqueue", "last slot flagged")
                last = self.queue[-1]
                last.loss = True
                SLOT.advance(last, "lose")
                continue
            cell = self.free.pop()
            cell.note, cell.more = note, part < parts
            SLOT.advance(cell, "post")
            self.queue.append(cell)

    def readable(self) -> bool:
        """Whether there is a note, or a loss to tell of."""
        return bool(self.queue) or self.loss

    def read(self) -> Steps:
        """Copy the first slot out, and release it."""
        desk = self.desk
        if self.loss:
            desk.world.case("dequeue", "loss told first")
            self.loss = False
            self._whole("")
            desk.read_loss(None)
            return
        cell = self.queue[0]
        self._whole(cell.note)
        if cell.more:
            self.begun = cell.note
        else:
            desk.read(cell.note)
            self.begun = ""
        yield "release the slot"
        self.queue.pop(0)
        if cell.loss:
            desk.world.case("dequeue", "flag carried over")
            self.loss, cell.loss = True, False
        SLOT.advance(cell, "release")
        self.free.append(cell)

    def _whole(self, follows: str) -> None:
        self.desk.world.check(
            "whole-or-absent",
            not self.begun or self.begun == follows,
            f"half of {self.begun} is read, and {follows or 'a loss'} follows",
        )


class Overflow:
    """The one overflow event of a fanotify group."""

    def __init__(self) -> None:
        self.state = ""
        OVERFLOW.start(self)


OVERFLOW: Lifetime[Overflow] = Lifetime(
    "Overflow event",
    states=("IDLE", "QUEUED"),
    transitions={"queue": "IDLE -> QUEUED", "take": "QUEUED -> IDLE"},
)


class Inline:
    """Events of any size, and one overflow event among them (fs/notify/notification.c)."""

    def __init__(self, desk: Desk, limit: int = 2) -> None:
        self.desk = desk
        self.limit = limit
        self.queue: list[str | Overflow] = []
        self.overflow = Overflow()

    def post(self, note: str, length: int) -> Steps:
        """Queue it, or the overflow event if that is not queued yet."""
        yield f"post {note}"
        self.desk.posted.append(note)
        if len(self.queue) < self.limit:
            self.queue.append(note)
        elif self.overflow.state == "IDLE":
            self.desk.world.case("enqueue", "overflow queued")
            OVERFLOW.advance(self.overflow, "queue")
            self.queue.append(self.overflow)
        else:
            self.desk.world.case("enqueue", "overflow queued already")

    def readable(self) -> bool:
        """Whether there is an event."""
        return bool(self.queue)

    def read(self) -> Steps:
        """Take the first event, and copy it out."""
        event = self.queue.pop(0)
        if isinstance(event, Overflow):
            OVERFLOW.advance(event, "take")
            self.desk.read_loss(None)
        else:
            self.desk.read(event)
        yield "copy to user space"


class Counted:
    """fanwise's own queue."""

    def __init__(self, desk: Desk, limit: int = 2) -> None:
        self.desk = desk
        self.queue = Queue(limit)

    def post(self, note: str, length: int) -> Steps:
        """Queue an event whose name is as long as the note."""
        yield f"post {note}"
        self.desk.posted.append(note)
        name = note.encode() * (length * 60)
        self.queue.add(Event(m.CREATE, key=note.encode(), dir=b"dir", name=name), m.CREATE)

    def lose(self) -> Steps:
        """Take in that the source, the kernel's own queue, lost two."""
        yield "the source loses two"
        self.desk.posted += ["lost by the source"] * 2
        self.queue.lose(2, None)
        self.desk.posting -= 1

    def readable(self) -> bool:
        """Whether there is an event."""
        return bool(len(self.queue))

    def read(self) -> Steps:
        """Take one event, and use it."""
        for event in self.queue.pop(1):
            if event.mask & m.Q_OVERFLOW:
                self.desk.world.check("loss-counted", event.count, "an overflow counts nothing")
                self.desk.read_loss(event.count)
                continue
            note = (event.key or b"").decode()
            length = len(event.name or b"") // len(note)
            self.desk.world.check(
                "whole-or-absent", length == (120 if note[1:] == "2" else 60), f"cut: {event}"
            )
            self.desk.read(note)
        yield "use"


@SCENARIO.design(
    "fixed-slots",
    "Slots of 128 bytes; a flag out of band tells of a loss; a long note takes several slots.",
    lifetimes=[SLOT],
)
def fixed_slots(world: World) -> None:
    desk = Desk(world)
    desk.begin(Pipe(desk))


@SCENARIO.design(
    "inline-overflow",
    "One overflow event in line, which is queued once until it is read.",
    lifetimes=[OVERFLOW],
)
def inline_overflow(world: World) -> None:
    desk = Desk(world)
    desk.begin(Inline(desk))


@SCENARIO.design(
    "counted-loss",
    "An overflow in line for each gap, with the number of what is lost there: fanwise's own code.",
)
def counted_loss(world: World) -> None:
    desk = Desk(world)
    queue = Counted(desk)
    desk.begin(queue)
    desk.posting += 1
    world.task("source", queue.lose())
