"""Where an error event's memory lives: the debate of 2021, from the slot of a mark to the reserve.

REFS, LOCKING and LIFETIME of the kernel's designs are in `_kernel_group` and `_error_memory`;
`group-reserve` is fanwise's own group, and has its own.
"""

from contextlib import suppress

from fanwise._errors import ClosedError
from fanwise.lab import Scenario, World
from fanwise.lifetime import Until
from fanwise.notify import group, mark, reader, reserve
from fanwise.notify.event import ErrorEvent, Event
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.mark import FILESYSTEM, On
from fanwise.notify.mask import FS_ERROR

from ._error_memory import (
    CLAIMED_SLOT,
    COUNTED_SLOT,
    POOLED,
    RECORD,
    REPLACED_SLOT,
    SLOT,
    Details,
    Pool,
    SlotBounceBuffer,
    SlotErrCount,
    SlotHoldsMark,
    SlotMarkAlive,
    SlotRefcount,
    SlotReplace,
)
from ._kernel_group import CONNECTOR, GROUP, MARK, Design, Kernel, Steps

SCENARIO = Scenario(
    "error-event",
    "Where an error event's memory lives",
    """
A filesystem finds that something is broken while it holds spin locks, so whoever reports it must
not sleep, and must not fail for want of memory: the first error is the one that matters, and it
is raised when the machine is in trouble. On the other side stands a reader that takes the event
off a queue, copies it to user space, which may fault and sleep, and then lets it go. Between the
two a mark can be removed, the filesystem unmounted, and the group closed. Where does the event
live?

**Slots of marks.** After a notification pipe that carried text, and a group with a ring of its
own that could carry nothing else, the proposal of summer 2021 gave each mark of a filesystem one
event, allocated with the mark. The first error fills it, later ones only count. Its proponents
wanted what a slot gives: no allocation when it hurts, and a cascade of errors told as its
beginning and its length. One version replaced the slot when it was read (`slot-replace`): a
reader dropped the notification lock, allocated, and looked whether another reader had come first.
As it was posted, the event pointed to a mark that nothing kept (`slot-replace-posted`). The next
version copied the slot to the stack under the lock, and let the queued event hold a reference to
the mark, so that the mark could not go before its event (`slot-holds-mark`).

**What went wrong.** The end of a group has an order: marks first, all of them, then events. An
event that holds a mark turns that round: the wait for marks sees only those that nobody refers
to, so it returns, the event is freed, and only now the mark dies, behind the back of a group that
has ended.

The review offered two ways out. One kept the slot and cut the reference: whoever frees either of
mark and event looks whether the other is still there, by a flag (`slot-mark-alive`). But a file
handle must not be encoded under the notification lock, so an insertion drops it, and meanwhile a
slot that is not queued is freed with its mark. A buffer on the raiser's stack mends that
(`slot-bounce-buffer`). So does the number of errors, which is not zero from the moment a raiser
has claimed the slot: it can say that the slot is in use (`slot-err-count`), if each way out of a
claim is thought of, which the sketch did not do (`slot-err-count-posted`). An honest reference
count next to it (`slot-refcount`) needs less thought. A reviewer answered that he could not judge
any of them before he saw the possible states and the rules of going from one to the next. This
page is what he asked for.

**What was merged.** The other way out: the group has a pool of events, grown with its error
marks, and error events merge in the queue as other events do. An event owns copies and refers to
nothing, so there is nothing to order, and both insertion and reading lose their special cases.
The size asked for was one event for each error mark. It is one too few as soon as a reader holds
the event that it has taken off the queue (`group-reserve-short`). The kernel's pool has 32 and
may sleep for more; fanwise's has one for each error mark and one for each reader
(`group-reserve`).

**Details.** Others would rather have had each error told by itself, with its place in the code,
than the first one with a count. Such a record needs no file handle and so no mark, and a ring of
the group can hold it (`detailed-records`); what it cannot say is which file is broken.
""",
    properties={
        "no-lost-error": (
            "Every error that is raised while the filesystem is marked is read, or counted in one"
            " that is read, or dropped because its group ends."
        ),
        "destruction-order": (
            "When the end of a group returns, each of its marks has been freed: nothing of a mark"
            " happens behind the back of a group that has ended."
        ),
        "whole-record": (
            "A record that is read is complete: whoever wrote it has finished, and it stands for"
            " some errors."
        ),
    },
)


def _kernel(
    world: World,
    design: Design,
    *,
    errors: tuple[int, ...] = (1, 1),
    readers: int = 1,
    reads: int = 2,
    remover: bool = True,
    unmount: bool = False,
    order: bool = True,
) -> None:
    """Make the tasks: who raises, who reads, who removes the mark, who closes, and the reaper.

    ``errors``: how many each of those who raise raises, one after the other. ``unmount``: the
    filesystem is unmounted, too. ``order``: whether `destruction-order` is asked.
    """
    kernel = Kernel(world, design)
    kernel.ordered = order
    for number, count in enumerate(errors, start=1):
        world.task(f"errors {number}", kernel.raise_errors(f"object {number}", count))
    for number in range(readers):
        name = f"reader {number + 1}" if readers > 1 else "reader"
        world.task(name, kernel.read(reads))
    if remover:
        world.task("remover", kernel.remove())
    if unmount:
        world.task("unmount", kernel.unmount())
    world.task("closer", kernel.close())
    kernel.begin()
    world.at_end("no-lost-error", lambda: kernel.accepted == kernel.told + kernel.dropped)


@SCENARIO.design(
    "slot-holds-mark",
    "One preallocated event for each mark; the queued event holds the mark.",
    lifetimes=[MARK, GROUP, CONNECTOR, CLAIMED_SLOT],
)
def slot_holds_mark(world: World) -> None:
    _kernel(world, SlotHoldsMark())


@SCENARIO.design(
    "slot-mark-alive",
    "A flag in the slot says whether its mark is alive; the lock is dropped to encode the handle.",
    lifetimes=[MARK, GROUP, CONNECTOR, SLOT],
)
def slot_mark_alive(world: World) -> None:
    _kernel(world, SlotMarkAlive())


@SCENARIO.design(
    "slot-bounce-buffer",
    "The same, with a buffer into which the file handle is encoded first.",
    lifetimes=[MARK, GROUP, CONNECTOR, SLOT],
)
def slot_bounce_buffer(world: World) -> None:
    _kernel(world, SlotBounceBuffer())


@SCENARIO.design(
    "slot-err-count",
    "The error count used as a reference: a slot that counts errors is not freed.",
    lifetimes=[MARK, GROUP, CONNECTOR, CLAIMED_SLOT],
)
def slot_err_count(world: World) -> None:
    _kernel(world, SlotErrCount())


@SCENARIO.design(
    "slot-err-count-posted",
    "The same, as it was sketched: nobody looks after a slot that could not be queued.",
    lifetimes=[MARK, GROUP, CONNECTOR, CLAIMED_SLOT],
)
def slot_err_count_posted(world: World) -> None:
    _kernel(world, SlotErrCount(posted=True))


@SCENARIO.design(
    "slot-replace",
    "The slot is replaced when it is read; the event goes with its reader.",
    lifetimes=[MARK, GROUP, CONNECTOR, REPLACED_SLOT],
)
def slot_replace(world: World) -> None:
    _kernel(world, SlotReplace(), errors=(2,), readers=2, reads=1)


@SCENARIO.design(
    "slot-replace-posted",
    "The same, as it was posted: the event points to a mark that nothing keeps.",
    lifetimes=[MARK, GROUP, CONNECTOR, REPLACED_SLOT],
)
def slot_replace_posted(world: World) -> None:
    _kernel(world, SlotReplace(posted=True), errors=(2,), readers=2, reads=1)


@SCENARIO.design(
    "slot-refcount",
    "A real reference count in the slot, held by the mark and by the queue.",
    lifetimes=[MARK, GROUP, CONNECTOR, COUNTED_SLOT],
)
def slot_refcount(world: World) -> None:
    _kernel(world, SlotRefcount())


class Listening:
    """A group of fanwise with error marks on two filesystems, and what it told of which errors."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.core = Fsnotify()
        self.group = self.core.group()
        self.group.errors.allocate = self._allocate
        self.owed = self.told = 0
        self.marks = {fs: self.group.add(On(FILESYSTEM, fs), FS_ERROR) for fs in ("a", "b")}

    def _allocate(self) -> reserve.Slot:
        self.world.might_sleep("allocating a slot")
        return reserve.Slot()

    def raise_errors(self, *filesystems: str) -> Steps:
        """Raise an error of each filesystem, in atomic context."""
        errors = self.group.errors
        for fs in filesystems:
            yield f"raise an error of {fs}"
            owed = self.group.state == "OPEN" and self.marks[fs].state == "ATTACHED"
            before = errors.raised
            with self.world.atomic():
                self.core.send([ErrorEvent(FS_ERROR, fs, fs.encode(), error=5)])
            self.world.check("no-lost-error", errors.raised - before == owed, "it is not taken in")
            self.owed += owed

    def read(self, times: int) -> Steps:
        """Read, and say of each error that it is done with."""
        reader, pending = self.group.reader(), []

        def use(events: list[Event]) -> None:
            for event in events:
                whole = isinstance(event, ErrorEvent) and event.error == 5 and event.count
                self.world.check("whole-record", whole and event.key == str(event.fs).encode())
                pending.append(event.count or 0)

        for _ in range(times):
            yield Until("wait for an event", self._readable)
            run = reader.read(use)
            try:
                run.step()
            except ClosedError:
                break
            while run.at is not None:
                yield run.at
                run.step()
            self.told += sum(pending)
            pending.clear()
        reader.leave()

    def fail_to_read(self) -> Steps:
        """Take an error, fail to use it, and leave."""
        reader = self.group.reader()
        yield Until("wait for an event", self._readable)
        with suppress(ClosedError):
            reader.take()
        yield "fail, and leave"
        reader.leave()

    def _readable(self) -> bool:
        return bool(len(self.group.queue)) or self.group.state != "OPEN"

    def unmount(self, fs: str) -> Steps:
        """End the mark of a filesystem while holding it, as the kernel's unmounting does."""
        mark = self.marks[fs]
        yield "detach the mark"
        if mark.get():
            mark.detach()
            yield "free the mark"
            mark.free()
            self.world.check("no-use-after-free", mark.state != "FREED", "a held mark is freed")
            mark.put()

    def ordered(self) -> bool:
        """Whether a group whose events are freed has no marks."""
        group = self.group
        ends = group.state in ("REAPED", "FLUSHED", "DRAINED", "CLOSED")
        return not ends or all(mark.state == "FREED" for mark in self.marks.values())

    def exact(self) -> bool:
        """Whether every error was told, or dropped with the group, and no slot is left."""
        errors = self.group.errors
        return self.owed == self.told + errors.abandoned and errors.size == 0


@SCENARIO.design(
    "group-reserve",
    "A reserve of the group, of its error marks and its readers, with merging: fanwise's own code.",
    lifetimes=[mark.MARK, group.GROUP, reader.READER, reserve.RESERVE, reserve.SLOT, group.CLOSE],
)
def group_reserve(world: World) -> None:
    """Build a group with two marks, two readers of which one fails, and an unmounting."""
    listening = Listening(world)
    world.task("errors", listening.raise_errors("a", "b", "a"))
    world.task("reader", listening.read(2))
    world.task("failing reader", listening.fail_to_read())
    world.task("unmount", listening.unmount("b"))
    world.task("closer", listening.group.close())
    world.always("destruction-order", listening.ordered)
    world.at_end("no-lost-error", listening.exact)


@SCENARIO.design(
    "group-reserve-short",
    "A pool of the group with one event for each error mark, and none for a reader that holds one.",
    lifetimes=[MARK, GROUP, CONNECTOR, POOLED],
)
def group_reserve_short(world: World) -> None:
    _kernel(world, Pool(1))


@SCENARIO.design(
    "detailed-records",
    "A second record type without object identity, in a ring of the group.",
    lifetimes=[MARK, GROUP, CONNECTOR, RECORD],
)
def detailed_records(world: World) -> None:
    _kernel(world, Details(1))
