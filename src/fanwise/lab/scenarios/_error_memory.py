"""The designs of the error event's memory that were argued about, each as the kernel calls it.

REFS      what an event refers to is what the designs differ in; see each.
LOCKING   the group's notification lock. A section under it is one step; what a design does after
          it has dropped the lock, so as not to encode a file handle or allocate, is another.
LIFETIME  SLOT, CLAIMED_SLOT, COUNTED_SLOT and REPLACED_SLOT of slots that hang on a mark, POOLED
          and RECORD of memory that is the group's.
"""

from fanwise.lab import Refcount
from fanwise.lifetime import Lifetime

from ._kernel_group import Design, Kernel, Mark, Slot, Steps

_IDLE = ("IDLE", "FREED")
_IN_USE = {
    "a slot that counts errors is in use": lambda s: (s.count > 0) == (s.state not in _IDLE),
}

SLOT: Lifetime[Slot] = Lifetime(
    "Error slot",
    states=("IDLE", "QUEUED", "ORPHAN", "FREED"),
    transitions={
        "queue": "IDLE -> QUEUED",
        "take": "QUEUED -> IDLE",
        "mark dies": "QUEUED -> ORPHAN",
        "take orphan": "ORPHAN -> FREED",
        "free": "IDLE -> FREED",
    },
    invariants={
        "only an orphan has lost its mark": lambda s: s.alive or s.state in ("ORPHAN", "FREED")
    },
)
"""A slot whose mark looks only whether it is queued."""

CLAIMED_SLOT: Lifetime[Slot] = Lifetime(
    "Claimed slot",
    states=("IDLE", "CLAIMED", "QUEUED", "FREED"),
    transitions={
        "claim": "IDLE -> CLAIMED",
        "queue": "IDLE, CLAIMED -> QUEUED",
        "give up": "CLAIMED -> IDLE",
        "take": "QUEUED -> IDLE",
        "free": "IDLE -> FREED",
    },
    invariants=_IN_USE,
)
"""A slot that a raiser claims before it drops the lock to fill it."""


def _empty(slot: Slot, transition: str) -> int:
    """Take the errors out of a slot; returns how many there were."""
    count, slot.count, slot.object = slot.count, 0, None
    slot.go(transition)
    return count


def _slot_of(kernel: Kernel, mark: Mark) -> Slot | None:
    """The slot of a mark; None when the mark is dying, and then the error is refused."""
    if mark.slot is None:
        kernel.world.case("enqueue", "no slot: the mark is dying")
        kernel.refuse(mark, "the slot is gone")
    return mark.slot


def _queue(kernel: Kernel, slot: Slot) -> None:
    slot.go("queue")
    kernel.group.queue.append(slot)


def _fill_and_queue(kernel: Kernel, mark: Mark, handle: str) -> None:
    """Count an error in the slot; the first one fills and queues it. All of it under the lock."""
    slot = _slot_of(kernel, mark)
    if slot is None:
        return
    if kernel.group.shutdown:
        kernel.refuse(mark, "the group has stopped")
        return
    kernel.accept()
    slot.count += 1
    if slot.count == 1:
        slot.object = handle
        _queue(kernel, slot)


class OnStack(Design):
    """Designs whose reader copies the slot to its stack under the lock, and so empties it.

    The lock is dropped between looking at the slot and queueing it, to encode a file handle. What
    becomes of the slot meanwhile is what the designs differ in.
    """

    look = "claim the slot"  # the step

    def insert(self, mark: Mark, obj: str) -> Steps:
        """Count the error in the slot. The first one: claim, fill without the lock, queue."""
        kernel, world = self.kernel, self.kernel.world
        yield self.look
        slot = _slot_of(kernel, mark)
        if slot is None:
            return
        kernel.accept()
        slot.count += 1
        if slot.count > 1:
            return
        self.claim(slot)
        world.case("enqueue", "lock dropped to encode")
        yield "encode the file handle"
        slot.object = obj
        yield "queue the slot"
        if self.may_queue(mark):
            _queue(kernel, slot)
        else:
            self.give_up(slot)

    def claim(self, slot: Slot) -> None:
        """Say that the slot is in use. Under the lock."""
        slot.go("claim")

    def may_queue(self, mark: Mark) -> bool:
        """Whether a slot that was filled may be queued. Under the lock."""
        return not self.kernel.group.shutdown

    def give_up(self, slot: Slot) -> None:
        """Let go of a slot that was filled and may not be queued. Under the lock."""
        raise NotImplementedError

    def read(self) -> Steps:
        """Take, copy to user space, let go."""
        kernel = self.kernel
        slot = kernel.group.queue.pop(0)
        obj, count, mark = slot.object, slot.count, slot.mark
        kernel.world.case("dequeue", "copied to the stack")
        self.taken(slot)
        yield "copy to user space"
        kernel.tell(obj, count)
        self.copied(mark)

    def taken(self, slot: Slot) -> None:
        """Empty a slot that was taken off the queue. Under the lock."""
        _empty(slot, "take")

    def copied(self, mark: Mark | None) -> None:
        """Let go of what the event referred to."""

    def free_event(self, slot: Slot) -> None:
        """Empty it; the errors are dropped with the group."""
        self.kernel.dropped += slot.count
        self.taken(slot)


class SlotHoldsMark(OnStack):
    """The mark owns the slot, and the queued event holds the mark.

    ``plainly``: the reference is taken as the proposal did, not caring whether there is one left.
    """

    def __init__(self, *, plainly: bool = False) -> None:
        self.plainly = plainly

    def attach(self, mark: Mark) -> None:
        """Allocate the slot."""
        mark.slot = self.kernel.memory.alloc(Slot(CLAIMED_SLOT))
        mark.slot.mark = mark

    def may_queue(self, mark: Mark) -> bool:
        """Whether there is a mark to hold, and a group that takes events."""
        if self.kernel.group.shutdown:
            return False
        if self.plainly:
            mark.refs.get()
            return True
        return mark.refs.get_not_zero()

    def give_up(self, slot: Slot) -> None:
        """Empty the slot; another's error may have been counted in it."""
        kernel, world = self.kernel, self.kernel.world
        world.case("enqueue", "claim given up")
        dropped = _empty(slot, "give up")
        # One's own error may be taken for raised after the mark's end; another's may not.
        ends = kernel.group.shutdown or dropped == 1
        world.check("no-lost-error", ends, "counted, and given up")
        kernel.dropped += dropped

    def copied(self, mark: Mark | None) -> None:
        """Drop the mark."""
        assert mark is not None
        self.kernel.world.case("dequeue", "mark dropped")
        mark.refs.put()

    def free_event(self, slot: Slot) -> None:
        """Empty it, and drop the mark."""
        mark = slot.mark
        super().free_event(slot)
        self.copied(mark)

    def free_mark(self, mark: Mark) -> None:
        """Free the slot along with the mark."""
        slot = mark.slot
        assert slot is not None
        slot.go("free")
        self.kernel.memory.free(slot)


class Weak(OnStack):
    """Designs that cut the reference: mark and event know whether the other is still there."""

    lifetime = SLOT

    def attach(self, mark: Mark) -> None:
        """Allocate the slot."""
        mark.slot = self.kernel.memory.alloc(Slot(self.lifetime))

    def free(self, slot: Slot, transition: str) -> None:
        """Free a slot."""
        slot.go(transition)
        self.kernel.memory.free(slot)


class SlotMarkAlive(Weak):
    """A flag in the slot says whether its mark is alive; the lock is dropped to fill the slot."""

    look = "look at the slot"

    def claim(self, slot: Slot) -> None:
        """Do nothing: only a slot that is queued is in use."""

    def give_up(self, slot: Slot) -> None:
        """Empty the slot."""
        self.kernel.world.case("enqueue", "slot not queued")
        self.kernel.dropped += slot.count
        slot.count = 0

    def freeing_mark(self, mark: Mark) -> None:
        """Free the slot, or have who takes it off the queue do it."""
        slot, mark.slot = mark.slot, None
        assert slot is not None
        if slot.state == "QUEUED":
            slot.alive = False
            slot.go("mark dies")
        else:
            self.free(slot, "free")

    def taken(self, slot: Slot) -> None:
        """Empty the slot; free it when its mark is gone."""
        if slot.alive:
            _empty(slot, "take")
            return
        self.kernel.world.case("dequeue", "slot of a dead mark freed")
        self.free(slot, "take orphan")


class SlotBounceBuffer(SlotMarkAlive):
    """The same, and the file handle is encoded into a buffer before the lock is taken."""

    def insert(self, mark: Mark, obj: str) -> Steps:
        """Encode, then look, fill and queue under one lock."""
        self.kernel.world.case("enqueue", "encoded into a buffer")
        yield "encode the file handle"
        handle = obj
        yield "fill and queue the slot"
        _fill_and_queue(self.kernel, mark, handle)


class SlotErrCount(Weak):
    """The number of errors says that the slot is in use: whoever makes it zero frees an orphan.

    ``posted``: as it was sketched in the debate, where the mark keeps its pointer to an orphan, and
    an insertion that fails keeps the slot.
    """

    lifetime = CLAIMED_SLOT

    def __init__(self, *, posted: bool = False) -> None:
        self.posted = posted

    def give_up(self, slot: Slot) -> None:
        """Empty the slot; free it when its mark is gone."""
        kernel, world = self.kernel, self.kernel.world
        kernel.dropped += slot.count
        if self.posted:
            return
        world.case("enqueue", "claim given up")
        _empty(slot, "give up")
        if not slot.alive:
            world.case("enqueue", "claim given up and slot freed")
            self.free(slot, "free")

    def freeing_mark(self, mark: Mark) -> None:
        """Free a slot that counts nothing; leave another to who makes it count nothing."""
        slot = mark.slot
        assert slot is not None
        if not self.posted or not slot.count:
            mark.slot = None
        if slot.count:
            slot.alive = False
        else:
            self.free(slot, "free")

    def taken(self, slot: Slot) -> None:
        """Empty the slot; free it when its mark is gone."""
        _empty(slot, "take")
        if not slot.alive:
            self.kernel.world.case("dequeue", "slot of a dead mark freed")
            self.free(slot, "free")


COUNTED_SLOT: Lifetime[Slot] = Lifetime(
    "Counted slot",
    states=("IDLE", "CLAIMED", "QUEUED", "FREED"),
    transitions={
        "claim": "IDLE -> CLAIMED",
        "queue": "CLAIMED -> QUEUED",
        "give up": "CLAIMED -> IDLE",
        "take": "QUEUED -> IDLE",
        "free": "IDLE -> FREED",
    },
    invariants={
        **_IN_USE,
        "a slot in use has references": lambda s: (
            s.state not in ("CLAIMED", "QUEUED") or (s.refs is not None and s.refs.value > 0)
        ),
    },
)
"""A slot with references: one of its mark, and one while it is claimed or queued."""


class SlotRefcount(Weak):
    """A reference count of its own: one reference of the mark, one of who queues and reads."""

    lifetime = COUNTED_SLOT

    def attach(self, mark: Mark) -> None:
        """Allocate the slot."""
        super().attach(mark)
        slot = mark.slot
        assert slot is not None
        slot.refs = Refcount(self.kernel.world, "the slot", 1)

    def claim(self, slot: Slot) -> None:
        """Take a reference."""
        assert slot.refs is not None
        slot.refs.get()
        super().claim(slot)

    def give_up(self, slot: Slot) -> None:
        """Empty the slot, and drop the reference."""
        self.kernel.world.case("enqueue", "claim given up")
        self.kernel.dropped += _empty(slot, "give up")
        self._put(slot)

    def freeing_mark(self, mark: Mark) -> None:
        """Drop the mark's reference."""
        slot, mark.slot = mark.slot, None
        assert slot is not None
        self._put(slot)

    def taken(self, slot: Slot) -> None:
        """Empty the slot, and drop the queue's reference."""
        _empty(slot, "take")
        self._put(slot)

    def _put(self, slot: Slot) -> None:
        assert slot.refs is not None
        if slot.refs.put():
            self.free(slot, "free")


class SlotReplace(Design):
    """Whoever reads takes the slot along, and gives the mark a new one that it allocated first.

    The event points back to its mark, which gets the new slot. ``posted``: nothing keeps that
    mark, and nothing tells the event that it is gone; otherwise the dying mark cuts the pointer.
    """

    def __init__(self, *, posted: bool = False) -> None:
        self.posted = posted

    def attach(self, mark: Mark) -> None:
        """Allocate the first slot."""
        self._give(mark, self.kernel.memory.alloc(Slot(REPLACED_SLOT)))

    def _give(self, mark: Mark, slot: Slot) -> None:
        mark.slot, slot.mark = slot, mark

    def insert(self, mark: Mark, obj: str) -> Steps:
        """Fill and queue under the lock, file handle included."""
        self.kernel.world.case("enqueue", "encoded under the lock")
        yield "fill and queue the slot"
        _fill_and_queue(self.kernel, mark, obj)

    def read(self) -> Steps:
        """Look, allocate without the lock, look again, replace and take, copy, free."""
        kernel, world = self.kernel, self.kernel.world
        queue = kernel.group.queue
        while queue:
            slot = queue[0]
            if slot.mark is None:
                world.case("dequeue", "not replaced: the mark is dead")
                break
            world.case("dequeue", "lock dropped to allocate")
            yield "allocate a new slot"
            new = kernel.memory.alloc(Slot(REPLACED_SLOT))
            yield "replace and take"
            if not queue or queue[0] is not slot:
                world.case("dequeue", "another reader was faster")
                world.count("retries")
                self._free(new)
                continue
            mark = slot.mark
            if mark is None:
                world.case("dequeue", "new slot freed")
                self._free(new)
            else:
                self._give(mark, new)
            break
        else:
            return
        queue.pop(0)
        slot.go("take")
        yield "copy to user space"
        kernel.tell(slot.object, slot.count)
        self._free(slot)

    def free_event(self, slot: Slot) -> None:
        """Free it."""
        self.kernel.dropped += slot.count
        if self.posted and slot.mark is not None and slot.mark.slot is slot:
            slot.mark.slot = None
        slot.go("take")
        self._free(slot)

    def freeing_mark(self, mark: Mark) -> None:
        """Free the slot, or leave it to its reader."""
        if self.posted:
            return
        slot, mark.slot = mark.slot, None
        assert slot is not None
        slot.mark = None
        if slot.state == "IDLE":
            self._free(slot)

    def free_mark(self, mark: Mark) -> None:
        """As posted: free whatever slot there is."""
        if mark.slot is not None:
            self._free(mark.slot)

    def _free(self, slot: Slot) -> None:
        slot.go("free")
        self.kernel.memory.free(slot)


REPLACED_SLOT: Lifetime[Slot] = Lifetime(
    "Replaced slot",
    states=("IDLE", "QUEUED", "TAKEN", "FREED"),
    transitions={
        "queue": "IDLE -> QUEUED",
        "take": "QUEUED -> TAKEN",
        "free": "IDLE, QUEUED, TAKEN -> FREED",
    },
    invariants={"an idle slot counts nothing": lambda s: s.state != "IDLE" or not s.count},
)
"""A slot that is filled once."""

POOLED: Lifetime[Slot] = Lifetime(
    "Pooled event",
    states=("FREE", "QUEUED", "HELD", "FREED"),
    transitions={
        "fill": "FREE -> QUEUED",
        "take": "QUEUED -> HELD",
        "put back": "QUEUED, HELD -> FREE",
        "free": "FREE -> FREED",
    },
    invariants={
        "an event that is queued or held counts errors": lambda s: (
            (s.count > 0) == (s.state in ("QUEUED", "HELD"))
        ),
    },
)
"""An event of a group's pool."""


class Pool(Design):
    """A pool of the group, and merging in the queue; an event refers to nothing.

    ``size`` is how many events the pool has. ``merge_first`` is whether an error looks for one to
    merge with before it needs an event of its own; the kernel allocates first.
    """

    def __init__(self, size: int, *, merge_first: bool = True) -> None:
        self.size = size
        self.merge_first = merge_first
        self.free: list[Slot] = []

    def begin(self, kernel: Kernel) -> None:
        """Fill the pool."""
        super().begin(kernel)
        self.free = [kernel.memory.alloc(Slot(POOLED)) for _ in range(self.size)]

    def insert(self, mark: Mark, obj: str) -> Steps:
        """Merge with the queued error of the filesystem, or queue one of the pool."""
        kernel = self.kernel
        spare = None
        if not self.merge_first:
            yield "allocate an event"
            spare = self._spare()
            if spare is None:
                kernel.refuse(mark, "the pool is empty")
                return
        yield "merge or queue"
        queue = kernel.group.queue
        if kernel.group.shutdown:
            kernel.refuse(mark, "the group has stopped")
        elif queue:
            kernel.accept()
            queue[0].count += 1
        elif (used := spare or self._spare()) is not None:
            spare = None
            kernel.accept()
            used.object, used.count = obj, 1
            used.go("fill")
            queue.append(used)
        else:
            kernel.refuse(mark, "the pool is empty")
        if spare is not None:
            self.free.append(spare)

    def _spare(self) -> Slot | None:
        return self.free.pop() if self.free else None

    def read(self) -> Steps:
        """Take, copy, put back."""
        kernel = self.kernel
        slot = kernel.group.queue.pop(0)
        slot.go("take")
        yield "copy to user space"
        kernel.tell(slot.object, slot.count)
        yield "put back"
        self._put_back(slot)

    def free_event(self, slot: Slot) -> None:
        """Put it back."""
        self.kernel.dropped += slot.count
        self._put_back(slot)

    def _put_back(self, slot: Slot) -> None:
        _empty(slot, "put back")
        self.free.append(slot)

    def free_group(self) -> None:
        """Free the pool, to which every event has come back."""
        for slot in self.free:
            slot.go("free")
            self.kernel.memory.free(slot)


class Details(Design):
    """Records without an object, in a ring of the group; what finds no room is counted in the last.

    A record is small and needs no file handle, so it is written, and copied out, under the lock.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.free: list[Slot] = []

    def begin(self, kernel: Kernel) -> None:
        """Allocate the ring."""
        super().begin(kernel)
        self.free = [kernel.memory.alloc(Slot(RECORD)) for _ in range(self.room)]

    def insert(self, mark: Mark, obj: str) -> Steps:
        """Write a record, or count the error in the last one."""
        kernel = self.kernel
        yield "write a record"
        queue = kernel.group.queue
        if kernel.group.shutdown:
            kernel.refuse(mark, "the group has stopped")
            return
        kernel.accept()
        if self.free:
            record = self.free.pop()
            record.count = 1
            record.go("write")
            queue.append(record)
        else:
            kernel.world.case("enqueue", "counted in the last record")
            queue[-1].count += 1

    def read(self) -> Steps:
        """Take a record as a copy."""
        kernel = self.kernel
        record = kernel.group.queue.pop(0)
        count = _empty(record, "take")
        self.free.append(record)
        yield "copy to user space"
        kernel.world.count("errors told without their object", count)
        kernel.tell("", count)

    def free_event(self, slot: Slot) -> None:
        """Drop it."""
        self.kernel.dropped += _empty(slot, "take")
        self.free.append(slot)

    def free_group(self) -> None:
        """Free the ring."""
        for record in self.free:
            record.go("free")
            self.kernel.memory.free(record)


RECORD: Lifetime[Slot] = Lifetime(
    "Record",
    states=("IDLE", "QUEUED", "FREED"),
    transitions={"write": "IDLE -> QUEUED", "take": "QUEUED -> IDLE", "free": "IDLE -> FREED"},
    invariants=_IN_USE,
)
"""A place in the ring of a group."""
