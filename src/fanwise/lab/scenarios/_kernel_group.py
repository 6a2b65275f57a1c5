"""The kernel's group, marks and connector, as fs/notify has them: what error-event designs share.

What differs between the designs, where the memory of an error event lives, is a `Design`.

REFS      the file holds the group until its release, and each mark holds it until the mark is
          freed. A mark is held by its group's list while attached, and by whoever destroys it; the
          connector's list holds no reference, so whoever finds a mark there stays inside SRCU.
LOCKING   a section under a spin lock is one step: whoever takes the lock too cannot see its
          middle. Who raises an error holds a spin lock of the filesystem all the time, so it must
          not sleep.
LIFETIME  see MARK, GROUP and CONNECTOR. Every object is memory of the world: used after it was
          freed, it is found.
Linux reference: fs/notify/{mark,group,notification}.c, fs/notify/fanotify/fanotify_user.c.
"""

from collections.abc import Callable, Generator

from fanwise.lab import Memory, Refcount, Srcu, Worker, World
from fanwise.lifetime import Lifetime, Until

Steps = Generator[str | Until, None, None]


class Mark:
    """A mark of the group on the one filesystem. ``slot`` is for designs that hang memory on it."""

    def __init__(self, group: "Group", world: World, unreferenced: Callable[[], object]) -> None:
        self.group = group
        self.refs = Refcount(world, "the mark", 1, unreferenced)
        self.slot: Slot | None = None
        self.state = ""
        MARK.start(self)


MARK: Lifetime[Mark] = Lifetime(
    "Kernel mark",
    states=("M0", "M1", "M2", "M3", "M4", "M5", "M6"),
    transitions={
        "attach": "M0 -> M1",
        "detach": "M1 -> M2",
        "kill": "M2 -> M3",
        "drop": "M3 -> M4",
        "wait": "M4 -> M5",
        "free": "M5 -> M6",
    },
    invariants={
        "a mark has no references from M4 on, and some before": lambda m: (
            (m.refs.value == 0) == (m.state in ("M4", "M5", "M6"))
        ),
    },
)


class Group:
    """A fanotify group: its marks, and its queue under the notification lock."""

    def __init__(self, world: World) -> None:
        self.refs = Refcount(world, "the group", 1)
        self.marks: list[Mark] = []
        self.queue: list[Slot] = []
        self.shutdown = False
        self.state = ""
        GROUP.start(self)


GROUP: Lifetime[Group] = Lifetime(
    "Kernel group",
    states=("OPEN", "STOPPED", "UNMARKED", "REAPED", "FLUSHED", "PUT"),
    transitions={
        "stop (G1)": "OPEN -> STOPPED",
        "unmark (G2)": "STOPPED -> UNMARKED",
        "reap (G4)": "UNMARKED -> REAPED",
        "flush (G5)": "REAPED -> FLUSHED",
        "put (G7)": "FLUSHED -> PUT",
    },
    invariants={
        "a group that is not open takes no event": lambda g: g.shutdown == (g.state != "OPEN"),
        "an unmarked group has no mark attached": lambda g: (
            g.state in ("OPEN", "STOPPED") or not g.marks
        ),
        "a flushed group has nothing queued": lambda g: (
            g.state not in ("FLUSHED", "PUT") or not g.queue
        ),
    },
)


class Connector:
    """The marks on the filesystem, found by whoever raises an error."""

    def __init__(self) -> None:
        self.marks: list[Mark] = []
        self.state = ""
        CONNECTOR.start(self)


CONNECTOR: Lifetime[Connector] = Lifetime(
    "Kernel connector",
    states=("LIVE", "DETACHED", "FREED"),
    transitions={"detach": "LIVE -> DETACHED", "free": "DETACHED -> FREED"},
    invariants={"a detached connector has no marks": lambda c: c.state == "LIVE" or not c.marks},
)


class Slot:
    """Memory for one error event: how many errors it stands for, and the first one's object."""

    def __init__(self, lifetime: "Lifetime[Slot]") -> None:
        self.count = 0
        self.object: str | None = None  # None until its file handle is encoded
        self.alive = True  # the mark that it hangs on
        self.mark: Mark | None = None
        self.lifetime = lifetime
        self.refs: Refcount | None = None
        self.state = ""
        lifetime.start(self)

    def go(self, transition: str) -> None:
        """Change its state."""
        self.lifetime.advance(self, transition)


class Kernel:
    """One filesystem, one group with one mark on it, and the descriptor of the group.

    Errors that were ``accepted`` are ``told``, or were ``dropped`` because their group ends.
    """

    def __init__(self, world: World, design: "Design") -> None:
        self.world = world
        self.design = design
        self.memory = Memory(world)
        self.srcu = Srcu(world, "fsnotify_mark_srcu")
        self.is_open, self.users = True, 0  # the descriptor, and the calls that are inside
        self.ordered = True  # whether the order of the group's end is asked
        self.accepted = self.told = self.dropped = 0
        self.group: Group = self.memory.alloc(Group(world))
        self.connector: Connector | None = self.memory.alloc(Connector())
        self.dead: list[Mark | Connector] = []  # they wait for the reaper
        self.unfreed = 0  # marks
        self._work = self._reap
        self.reaper: Worker  # made last, as the last of the tasks
        design.begin(self)
        self._attach()

    def begin(self) -> None:
        """Start the reaper."""
        self.reaper = Worker(self.world, "reaper")

    def _attach(self) -> None:
        def unreferenced() -> None:
            self._unreferenced(mark)

        mark: Mark = self.memory.alloc(Mark(self.group, self.world, unreferenced))
        self.group.refs.get()
        self.unfreed += 1
        self.group.marks.append(mark)
        assert self.connector is not None
        self.connector.marks.append(mark)
        self.design.attach(mark)
        MARK.advance(mark, "attach")

    # -- who raises errors --

    def raise_errors(self, obj: str, count: int) -> Steps:
        """Raise errors of one object, each in atomic context, as fsnotify() does."""
        for _ in range(count):
            with self.world.atomic():
                yield "find the mark"
                inside = self.srcu.read_lock()
                connector = self.connector
                if connector is not None and connector.marks:
                    yield from self.design.insert(connector.marks[0], obj)
                self.srcu.read_unlock(inside)

    def owed(self, mark: Mark) -> bool:
        """Whether an error that is raised now has to be told."""
        return mark.state == "M1" and not self.group.shutdown

    def accept(self) -> None:
        """One more error is counted in an event."""
        self.accepted += 1

    def refuse(self, mark: Mark, reason: str) -> None:
        """An error is counted nowhere, which is right when nobody asks for it any more."""
        self.world.check("no-lost-error", not self.owed(mark), f"an error is lost: {reason}")

    # -- who reads --

    def read(self, times: int) -> Steps:
        """Read events, one a call, until the descriptor is closed."""
        for _ in range(times):
            yield Until("read", lambda: bool(self.queue) or not self.is_open)
            if not self.is_open:
                return
            self.users += 1
            yield from self.design.read()
            self.users -= 1

    @property
    def queue(self) -> list[Slot]:
        """What the group has queued; nothing once it is freed."""
        group = self.group
        return [] if self.memory.freed(group) else group.queue

    def tell(self, obj: str | None, count: int) -> None:
        """A record was copied to user space."""
        self.world.check(
            "whole-record", obj is not None and count > 0, f"read: {count} errors of {obj}"
        )
        self.told += count

    # -- who ends marks and the group --

    def remove(self) -> Steps:
        """Remove the mark, as fanotify_mark(2) does; it holds the descriptor meanwhile."""
        yield "detach the mark"
        if not self.is_open or not self.group.marks:
            return
        self.users += 1
        yield from self._destroy(self.group.marks[0])
        self.users -= 1

    def unmount(self) -> Steps:
        """End the filesystem's marks. Holds a reference to each meanwhile, and no descriptor."""
        yield "detach the mark"
        if self.connector is not None and self.connector.marks:
            mark = self.connector.marks[0]
            if mark.refs.get_not_zero():
                yield from self._destroy(mark, got=True)

    def close(self) -> Steps:
        """Close the descriptor; with the last call inside gone, end the group."""
        yield "close"
        self.is_open = False
        yield Until("G1: stop queueing", lambda: not self.users)
        group, world = self.group, self.world
        group.shutdown = True
        GROUP.advance(group, "stop (G1)")
        while group.marks:
            yield "G2: detach a mark"
            if group.marks:
                yield from self._destroy(group.marks[0])
        GROUP.advance(group, "unmark (G2)")
        yield from self.reaper.flush("G4: wait for the reaper")
        GROUP.advance(group, "reap (G4)")
        yield "G5: free the events"
        while group.queue:
            self.design.free_event(group.queue.pop(0))
        GROUP.advance(group, "flush (G5)")
        yield "G7: put the group"
        world.check(
            "destruction-order",
            not self.ordered or not self.unfreed,
            "the group's end returns, and a mark is left",
        )
        GROUP.advance(group, "put (G7)")
        self._put_group()

    def _destroy(self, mark: Mark, *, got: bool = False) -> Steps:
        # Both parts happen once, whoever comes first.
        if not got:
            mark.refs.get()
        if mark.state == "M1":
            self.group.marks.remove(mark)
            MARK.advance(mark, "detach")
            mark.refs.put()  # the list's
        yield "free the mark"
        if mark.state == "M2":
            MARK.advance(mark, "kill")
            self.design.freeing_mark(mark)
        mark.refs.put()

    def _unreferenced(self, mark: Mark) -> None:
        MARK.advance(mark, "drop")
        connector = self.connector
        assert connector is not None
        connector.marks.remove(mark)
        self.dead.append(mark)
        if not connector.marks:
            CONNECTOR.advance(connector, "detach")
            self.dead.append(connector)
            self.connector = None
        self.reaper.queue(self._work)

    def _reap(self) -> Steps:
        dead, self.dead = self.dead, []
        for one in dead:
            if isinstance(one, Mark):
                MARK.advance(one, "wait")
        yield from self.srcu.synchronize()
        for one in dead:
            if isinstance(one, Mark):
                self.design.free_mark(one)
                MARK.advance(one, "free")
                self.memory.free(one)
                self.unfreed -= 1
                self._put_group()
            else:
                CONNECTOR.advance(one, "free")
                self.memory.free(one)

    def _put_group(self) -> None:
        if self.group.refs.put():
            self.design.free_group()
            self.memory.free(self.group)


class Design:
    """Where the memory of an error event lives; the kernel calls it at the places named."""

    kernel: Kernel

    def begin(self, kernel: Kernel) -> None:
        """Set up what belongs to the group."""
        self.kernel = kernel

    def attach(self, mark: Mark) -> None:
        """Set up what belongs to a mark."""

    def insert(self, mark: Mark, obj: str) -> Steps:
        """Queue an error, merge it, or refuse it. Inside SRCU, in atomic context."""
        raise NotImplementedError

    def read(self) -> Steps:
        """Take the first event and copy it to user space. The queue is not empty; no lock held."""
        raise NotImplementedError

    def free_event(self, slot: Slot) -> None:
        """Free an event that nobody read (G5); it is off the queue."""
        raise NotImplementedError

    def freeing_mark(self, mark: Mark) -> None:
        """A mark begins to die (M3)."""

    def free_mark(self, mark: Mark) -> None:
        """A mark is freed (M6)."""

    def free_group(self) -> None:
        """The group is freed."""
