"""The reserve of a group: room for error events that nothing else can take.

An error never waits for queue room. Each mark that asks for FS_ERROR brings a slot, and so does
each reader in flight; growing can fail, and then the mark or the reader is refused, not the error.
Errors of one filesystem merge: the first one's errno, object and process are kept, the others are
counted. Merging comes before every limit, so a slot is needed only for the first error of a
filesystem since the last was taken:

    slots  = error marks + readers + filesystems whose last mark left while an error was queued
    filled <= filesystems marked + readers (each holds one error at most) + those filesystems

so with a mark on the filesystem of an error that finds no slot of its own to merge into, one is
free. Slots that are no longer needed go as soon as that is so, and one is free then, too.

Linux merges by filesystem and process; here it is by filesystem, because a bound on slots needs a
key that marks bound, and 300 processes that trip over one block are one error. Linux tests its
limit before it merges, and a full queue then loses what could be counted (fs/notify/notification.c,
fsnotify_insert_event); its pool of 32 is a reserve for allocating, not for queueing.

What Python's own numbers and the group's other events need is not reserved.

REFS      slots own copies of what an error said, and no reference to a mark, which may be gone when
          the error is read. The slot of an error belongs to its reader from `take` to `done`.
LOCKING   none: one owner; every method is atomic.
LIFETIME  see SLOT and RESERVE. `close` is a step of the group's end, after every reader has left:
          only then did all slots come back (mempool_exit in fanotify_free_group_priv).
"""

from collections.abc import Callable, Hashable

from fanwise._errors import MarkRefused
from fanwise.lifetime import Lifetime

from .event import ErrorEvent
from .mask import FS_ERROR

ERRORS_LIMIT = 1024
"""How many marks of a group may ask for FS_ERROR, unless it was made with another limit."""

READERS_LIMIT = 64
"""How many readers a group may have in flight."""


class Home:
    """What the reserve knows of one filesystem: how many error marks, and its queued error."""

    __slots__ = ("fs", "marks", "queued")

    def __init__(self, fs: Hashable) -> None:
        self.fs = fs
        self.marks = 0
        self.queued: Slot | None = None


class Slot:
    """Room for one error event. ``behind`` counts the group's other events that go before it."""

    __slots__ = ("behind", "event", "home", "next", "number", "state")

    state: str

    def __init__(self) -> None:
        self.event = ErrorEvent(0)
        self.behind = self.number = 0
        self.home: Home | None = None
        self.next: Slot | None = None
        SLOT.start(self)

    def clear(self) -> None:
        """Forget the error."""
        event = self.event
        event.mask = event.pid = event.error = 0
        event.count = event.fs = event.key = event.dir = event.name = None
        event.ancestors = ()
        self.home = self.next = None


SLOT: Lifetime[Slot] = Lifetime(
    "Slot",
    states=("FREE", "QUEUED", "HELD", "FREED"),
    transitions={
        "fill": "FREE -> QUEUED",
        "take": "QUEUED -> HELD",
        "put back": "HELD -> QUEUED",
        "empty": "QUEUED, HELD -> FREE",
        "free": "FREE -> FREED",
    },
    invariants={
        "a slot holds an error exactly while it is queued or held": lambda s: (
            (s.state in ("QUEUED", "HELD")) == (s.event.mask == FS_ERROR) == bool(s.event.count)
        ),
        "a filesystem has one queued error, and it is this": lambda s: (
            (s.state == "QUEUED") == (s.home is not None and s.home.queued is s)
        ),
    },
)


class Reserve:
    """The slots of a group. ``allocate`` makes one; whatever it raises refuses the growth.

    ``raised`` errors are ``delivered``, or counted in a slot, or ``abandoned`` by the group's end.
    """

    __slots__ = (
        "_first", "_free", "_homes", "_last", "_number", "abandoned", "allocate", "delivered",
        "held", "limit", "marks", "orphans", "queued", "raised", "readers", "readers_limit",
        "size", "state",
    )  # fmt: skip

    state: str

    def __init__(self, limit: int = ERRORS_LIMIT, readers_limit: int = READERS_LIMIT) -> None:
        self.limit, self.readers_limit = limit, readers_limit
        self.allocate: Callable[[], Slot] = Slot
        self.size = self.marks = self.readers = self.orphans = 0
        self.queued = self.held = 0  # slots
        self.raised = self.delivered = self.abandoned = 0  # errors
        self._free: list[Slot] = []
        self._homes: dict[Hashable, Home] = {}
        self._first: Slot | None = None
        self._last: Slot | None = None
        self._number = 0
        RESERVE.start(self)

    # -- growing and shrinking --

    def mark(self, fs: Hashable) -> None:
        """Make room for one more error mark on ``fs``. Raises MarkRefused, with nothing changed."""
        if self.marks >= self.limit:
            raise MarkRefused(
                f"the group has {self.limit} marks for FS_ERROR, its limit",
                "remove some, or make the group with a higher errors_limit",
            )
        home = self._homes.get(fs)
        orphan = home is not None and not home.marks
        if not orphan:
            slot = self._grow("the errors of one more mark")
        if home is None:
            home = Home(fs)
            self._homes[fs] = home
        if orphan:
            self.orphans -= 1  # its slot is the mark's now
        else:
            self._free.append(slot)
            self.size += 1
        home.marks += 1
        self.marks += 1
        RESERVE.advance(self, "grow")

    def unmark(self, fs: Hashable) -> None:
        """Take back the room of an error mark on ``fs``; what is queued stays to be read."""
        home = self._homes[fs]
        home.marks -= 1
        self.marks -= 1
        if not home.marks:
            if home.queued is not None:
                self.orphans += 1
            else:
                del self._homes[fs]
        self._trim()

    def enter(self) -> None:
        """Make room for one more reader. Raises MarkRefused, with nothing changed."""
        if self.readers >= self.readers_limit:
            raise MarkRefused(
                f"the group has {self.readers_limit} readers in flight, its limit",
                "let one leave first",
            )
        self._free.append(self._grow("the error of one more reader"))
        self.size += 1
        self.readers += 1
        RESERVE.advance(self, "grow")

    def leave(self, slot: Slot | None, stopped: bool) -> None:
        """Take back a reader's room. The error that it still holds is queued again, where it was.

        With an error of that filesystem that came since, it merges. ``stopped``: nobody will read
        it any more, so it is abandoned, and counted as such.
        """
        self.readers -= 1
        if slot is not None:
            self.held -= 1
            if stopped:
                self.abandoned += slot.event.count or 0
                self._empty(slot)
            else:
                self._put_back(slot)
        self._trim()

    def _grow(self, purpose: str) -> Slot:
        most = self.limit + self.readers_limit
        if self.size >= most:
            raise MarkRefused(
                f"the group has {most} slots for errors, its limit: {self.orphans} of them hold"
                " errors of filesystems that are not marked any more",
                "read them",
            )
        try:
            return self.allocate()
        except MemoryError as error:
            raise MarkRefused(f"there is no memory for {purpose}") from error

    def _trim(self) -> None:
        # What filled slots need is no more than this, so those beyond it are free.
        while self.size > self.marks + self.readers + self.orphans:
            SLOT.advance(self._free.pop(), "free")
            self.size -= 1
        RESERVE.advance(self, "shrink")

    # -- errors --

    def add(self, event: ErrorEvent, scope: str, behind: int) -> None:
        """Take an error in: merged, or in a slot of its own behind ``behind`` other events."""
        count = event.count or 1
        home = self._homes[event.fs]
        slot = home.queued
        self.raised += count
        if slot is not None:
            slot.event.count = (slot.event.count or 0) + count
            return
        slot = self._free.pop()
        copy = slot.event
        copy.mask, copy.fs, copy.key, copy.pid = FS_ERROR, event.fs, event.key, event.pid
        copy.dir, copy.name, copy.ancestors = event.dir, event.name, event.ancestors
        copy.error, copy.scope, copy.count = event.error, scope, count
        slot.behind = behind
        self._number += 1
        slot.number = self._number
        slot.home, home.queued = home, slot
        if self._last is None:
            self._first = slot
        else:
            self._last.next = slot
        self._last = slot
        self.queued += 1
        SLOT.advance(slot, "fill")

    def moved_up(self, place: int) -> None:
        """One of the group's other events is gone, before which ``place`` others were added."""
        slot = self._first
        while slot is not None:
            if slot.behind > place:
                slot.behind -= 1
            slot = slot.next

    @property
    def first(self) -> Slot | None:
        """The oldest queued error's slot; the next one's is its ``next``."""
        return self._first

    @property
    def counted(self) -> int:
        """Errors that queued slots stand for."""
        total, slot = 0, self._first
        while slot is not None:
            total += slot.event.count or 0
            slot = slot.next
        return total

    def take(self) -> Slot:
        """Give the oldest error's slot to a reader, who holds no other."""
        slot = self._unlink_first()
        self.held += 1
        SLOT.advance(slot, "take")
        self._trim()
        return slot

    def done(self, slot: Slot) -> None:
        """Take a reader's slot back: its error is delivered."""
        self.delivered += slot.event.count or 0
        self.held -= 1
        self._empty(slot)

    def deliver(self, count: int) -> None:
        """Empty the ``count`` oldest slots: their errors were copied out, and are delivered."""
        for _ in range(count):
            slot = self._unlink_first()
            self.delivered += slot.event.count or 0
            self._empty(slot)
        self._trim()

    def flush(self) -> None:
        """Abandon every queued error."""
        while self._first is not None:
            slot = self._unlink_first()
            self.abandoned += slot.event.count or 0
            self._empty(slot)
        self._trim()

    def close(self) -> None:
        """Free every slot, when all have come back. Does nothing the second time."""
        if self.state == "OPEN":
            RESERVE.advance(self, "close")

    def _unlink_first(self) -> Slot:
        slot = self._first
        assert slot is not None
        self._first = slot.next
        if self._first is None:
            self._last = None
        self._forget(slot)
        return slot

    # Off the list already: off its filesystem, too.
    def _forget(self, slot: Slot) -> None:
        home = slot.home
        assert home is not None
        slot.next = home.queued = None
        self.queued -= 1
        if not home.marks:
            self.orphans -= 1
            del self._homes[home.fs]

    def _empty(self, slot: Slot) -> None:
        slot.clear()
        SLOT.advance(slot, "empty")
        self._free.append(slot)

    def _put_back(self, slot: Slot) -> None:
        fs = slot.event.fs
        home = self._homes.get(fs)
        if home is None:
            home = self._homes[fs] = Home(fs)
        other = home.queued
        if other is not None and other.number < slot.number:
            other.event.count = (other.event.count or 0) + (slot.event.count or 0)
            self._empty(slot)
            return
        if other is None:
            self.orphans += not home.marks
        else:
            slot.event.count = (slot.event.count or 0) + (other.event.count or 0)
            self._unlink(other)
            home.queued = None
            self.queued -= 1
            self._empty(other)
        slot.home, home.queued = home, slot
        before, after = None, self._first
        while after is not None and after.number < slot.number:
            before, after = after, after.next
        slot.next = after
        if before is None:
            self._first = slot
        else:
            before.next = slot
        if after is None:
            self._last = slot
        self.queued += 1
        SLOT.advance(slot, "put back")

    def _unlink(self, slot: Slot) -> None:
        before, here = None, self._first
        while here is not slot:
            assert here is not None
            before, here = here, here.next
        if before is None:
            self._first = slot.next
        else:
            before.next = slot.next
        if self._last is slot:
            self._last = before

    def __repr__(self) -> str:
        return (
            f"<Reserve {self.state}, {self.size} slots: {len(self._free)} free,"
            f" {self.queued} queued, {self.held} held>"
        )


RESERVE: Lifetime[Reserve] = Lifetime(
    "Reserve",
    states=("OPEN", "CLOSED"),
    transitions={"grow": "OPEN -> OPEN", "shrink": "OPEN -> OPEN", "close": "OPEN -> CLOSED"},
    invariants={
        "there is a slot for each error mark, reader and error left by its marks": lambda r: (
            r.size == r.marks + r.readers + r.orphans
        ),
        "each slot is free, queued or held": lambda r: r.size == len(r._free) + r.queued + r.held,
        "a reader holds one error at most": lambda r: r.held <= r.readers,
        "a closed reserve has no slots": lambda r: r.state == "OPEN" or not r.size,
    },
)
