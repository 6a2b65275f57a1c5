"""Who learns that written data was lost: one field, a counted value, or events.

REFS      a descriptor remembers what it was told; a mapping knows no descriptor.
LOCKING   none: `errseq` is a value that is read, and swapped if it is still the one that was read;
          each of these is a step.
LIFETIME  a mapping's value: WB_ERR. fanwise's group has its own.
Linux reference: lib/errseq.c, file_check_and_advance_wb_err in mm/filemap.c.
"""

from collections.abc import Generator, Iterable
from errno import EIO, ENOSPC, errorcode
from typing import Protocol

from fanwise.lab import Scenario, World
from fanwise.lifetime import Lifetime, Until
from fanwise.notify import group, mark, reader, reserve
from fanwise.notify.event import ErrorEvent, Event
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.mark import FILESYSTEM, On
from fanwise.notify.mask import FS_ERROR

Steps = Generator[str | Until, None, None]

SCENARIO = Scenario(
    "write-back",
    "Who learns that written data was lost",
    """
A write returns when its data is in memory. What becomes of it shows later, in a thread that
writes back for everybody, and there is nobody to whom that thread could return an error. So the
error has to be kept until somebody asks, with fsync: who, and how often is it told?

**One field.** For a long time an inode had an error of its own, and fsync gave it back and
cleared it (`last-error`). It costs nothing, and with one writer it is right. With two, whoever
asks first takes the error along, and the other is told that its data is safe. In 2018 the authors
of a database found that their checkpointer could be the other.

**A value that counts.** Since 4.13 an inode keeps the errno, a counter, and whether anybody has
seen it (`errseq`). Each descriptor remembers the value that it saw last, and is told when it
differs. Its author wanted one word and no lock, no list of descriptors, and no memory to allocate
in an error path; the counter moves only if the error before it was seen, so that it does not run
round. Whoever opens a file is told also of an error that nobody has seen yet (since 4.17). It
says that something was lost since the last time, not how often, and of several errors the last.

One case is left open, and the comment in the code says that either outcome is fine: the value can
change between being read and being marked as seen. Then the descriptor remembers as seen a value
that nobody has marked. If the errno changes, and back, and only then somebody else marks it, the
value is the one that the descriptor remembers, although two errors came in between. Reading again
when the marking fails closes that (`errseq-retry`).

And the value lives in the inode. A file that nobody has open may leave memory, and the error with
it, before anybody has asked (`errseq-evict`); then only the value of the whole filesystem, which
syncfs asks, still knows.

**Events.** An error is queued to everybody who asked for the file's errors, once, and merges with
one that waits there already: the first errno, and how many (`event-merge`, which is what fanwise
does). Nobody has to hold the file open, and an inode that leaves memory takes no error along.
What it takes is a group for each listener, made before the error.
""",
    properties={
        "everyone-told": (
            "Whoever had the file open, or was listening, when data was lost is told when it asks"
            " next."
        ),
        "somebody-told": "No loss is forgotten before anybody was told.",
        "told-once": "Nobody is told again while nothing more was lost.",
        "true-errno": "The errno told is that of a loss that was not told before.",
    },
)


class Keeper(Protocol):
    """Where an inode keeps what was lost."""

    def lose(self, errno: int) -> Steps:
        """Record a loss."""

    def open(self, asker: "Asker") -> None:
        """A descriptor is opened, in one step."""

    def ask(self, asker: "Asker") -> Steps:
        """Ask, as fsync does; says to the asker what it was told."""


class Inode:
    """What was lost of a file, in order: the value under which it was recorded, and its errno."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.losses: list[tuple[int, int]] = []
        self.flushing = 0
        self.known = 0  # losses before it were told to somebody
        self.opened = 0
        world.at_end("somebody-told", lambda: self.known == len(self.losses))

    def begin(self, keeper: Keeper, *, is_open: bool = True) -> None:
        """Make the tasks: two that write back, one descriptor that is open, one that is opened.

        ``is_open``: without the first of these.
        """
        world = self.world
        for number, errnos in enumerate(((EIO, EIO), (ENOSPC,)), start=1):
            self.flushing += 1
            world.task(f"write-back {number}", self._write_back(keeper, errnos))
        if is_open:
            asker = Asker(self, "A")
            keeper.open(asker)
            world.task("descriptor A", asker.ask(keeper, 2))
        world.task("descriptor B", self._late(keeper))

    def _write_back(self, keeper: Keeper, errnos: tuple[int, ...]) -> Steps:
        for errno in errnos:
            yield from keeper.lose(errno)
        self.flushing -= 1

    def _late(self, keeper: Keeper) -> Steps:
        yield "open"
        self.opened += 1
        asker = Asker(self, "B")
        keeper.open(asker)
        yield from asker.ask(keeper, 0)
        self.opened -= 1


class Asker:
    """A descriptor: the losses before ``told`` it knows of, those before ``owed`` it need not.

    ``since`` is what the keeper has it remember.
    """

    def __init__(self, inode: Inode, name: str) -> None:
        self.inode = inode
        self.name = name
        self.since = 0
        self.told = self.owed = len(inode.losses)

    def ask(self, keeper: Keeper, times: int) -> Steps:
        """Ask now and then, once more when no more is lost, and then again."""
        for _ in range(times):
            yield "fsync"
            yield from keeper.ask(self)
        yield Until("last fsync", lambda: not self.inode.flushing)
        yield from keeper.ask(self)
        yield "fsync again"
        yield from keeper.ask(self)

    def tell(self, errno: int, upto: int) -> None:
        """It is told an errno, which stands for the losses before ``upto``."""
        check, losses = self.inode.world.check, self.inode.losses
        new = losses[self.told : upto]
        check("told-once", new, f"{self.name} is told {errorcode[errno]}, and knew")
        check(
            "true-errno",
            any(errno == known for _, known in new),
            f"{self.name} is told {errorcode[errno]}, and lost {_named(known for _, known in new)}",
        )
        if len(new) > 1:
            self.inode.world.case("told", "several losses as one")
        self.told = upto
        self.inode.known = max(self.inode.known, upto)

    def tell_nothing(self) -> None:
        """It is told that nothing was lost."""
        missed = self.inode.losses[max(self.told, self.owed) :]
        self.inode.world.check(
            "everyone-told",
            not missed,
            f"{self.name} is told nothing, and lost {_named(errno for _, errno in missed)}",
        )


def _named(errnos: Iterable[int]) -> str:
    return ", ".join(errorcode[errno] for errno in errnos)


class LastError:
    """One field, which whoever asks takes along."""

    def __init__(self, inode: Inode) -> None:
        self.inode = inode
        self.field = 0

    def lose(self, errno: int) -> Steps:
        """Set the field."""
        yield f"set {errorcode[errno]}"
        self.field = errno
        self.inode.losses.append((errno, errno))

    def open(self, asker: Asker) -> None:
        """Nothing is remembered; what is in the field can be told to whoever asks."""
        if self.field:
            asker.told = 0

    def ask(self, asker: Asker) -> Steps:
        """Take what is in the field, and clear it."""
        errno, self.field = self.field, 0
        if errno:
            asker.tell(errno, len(self.inode.losses))
        else:
            asker.tell_nothing()
        yield from ()


_ERRNO = 0xFFF  # MAX_ERRNO
_SEEN = 1 << 12
_ONE = 1 << 13


class ErrSeq:
    """A value: errno, a bit for seen, a counter (lib/errseq.c).

    ``retry``: who fails to mark what it saw reads again.
    """

    def __init__(self, inode: Inode, *, retry: bool = False) -> None:
        self.inode = inode
        self.retry = retry
        self.value = 0
        self.seen = 0  # losses that somebody has marked as seen
        self.state = ""
        WB_ERR.start(self)

    def lose(self, errno: int) -> Steps:
        """errseq_set."""
        yield f"set {errorcode[errno]}: read"
        old = self.value
        while (new := self._with(old, errno)) != old:
            yield f"set {errorcode[errno]}: swap"
            now = self.value
            if now == old:
                self.value = new
                WB_ERR.advance(self, "set")
            if now in (old, new):
                break
            old = now
        else:
            self.inode.world.case("set", "the value says so already")
        self.inode.losses.append((new, errno))

    def _with(self, old: int, errno: int) -> int:
        new = old & ~(_ERRNO | _SEEN) | errno
        return new + _ONE if old & _SEEN else new

    def open(self, asker: Asker) -> None:
        """errseq_sample."""
        if self.value & _SEEN:
            asker.since = self.value
        else:
            asker.told = self.seen

    def ask(self, asker: Asker) -> Steps:
        """errseq_check_and_advance."""
        while True:
            old = self.value
            if old == asker.since:
                asker.tell_nothing()
                return
            new = old | _SEEN
            if new != old:
                yield "mark as seen"
                if self.value == old:
                    self.value = new
                    WB_ERR.advance(self, "see")
                    self.seen = self._upto(new)
                elif self.retry:
                    continue
                else:
                    self.inode.world.case("asked", "the value has changed before it was marked")
            asker.since = new
            asker.tell(new & _ERRNO, self._upto(new))
            return

    def evict(self) -> Steps:
        """Let the inode leave memory, once all is written back and nobody has the file open."""
        yield Until("evict", lambda: not self.inode.flushing and not self.inode.opened)
        self.value = 0
        WB_ERR.advance(self, "evict")

    # Losses that the value stands for: up to the last one that was recorded under it.
    def _upto(self, value: int) -> int:
        losses = self.inode.losses
        return max(n for n, (under, _) in enumerate(losses, start=1) if under == value & ~_SEEN)


WB_ERR: Lifetime[ErrSeq] = Lifetime(
    "wb_err",
    states=("CLEAN", "UNSEEN", "SEEN"),
    transitions={
        "set": "CLEAN, UNSEEN, SEEN -> UNSEEN",
        "see": "UNSEEN -> SEEN",
        "evict": "CLEAN, UNSEEN, SEEN -> CLEAN",
    },
    invariants={
        "what was seen is marked": lambda e: (e.state == "SEEN") == bool(e.value & _SEEN),
        "a clean value is zero": lambda e: (e.state == "CLEAN") == (e.value == 0),
    },
)


class Listener:
    """A group of fanwise that listens to the file's filesystem."""

    def __init__(self, world: World, name: str, group: group.Group, losses: list[int]) -> None:
        self.world = world
        self.name = name
        self.group = group
        self.losses = losses  # errnos, in order
        self.told = 0

    def read(self, done: "Listening") -> Steps:
        """Read until no more is lost and all is read."""
        reader = self.group.reader()
        while True:
            yield Until("read", lambda: bool(len(self.group.queue)) or not done.flushing)
            if not len(self.group.queue):
                break
            run = reader.read(self._use)
            run.step()
            while run.at is not None:
                yield run.at
                run.step()
        missed = self.losses[self.told :]
        self.world.check(
            "everyone-told", not missed, f"{self.name} is not told of {_named(missed)}"
        )
        reader.leave()

    def _use(self, events: list[Event]) -> None:
        for event in events:
            assert isinstance(event, ErrorEvent)
            count = event.count or 0
            new = self.losses[self.told : self.told + count]
            seen = f"{self.name} is told {errorcode[event.error]} x{count}, and lost {_named(new)}"
            self.world.check("told-once", count and len(new) == count, seen)
            self.world.check("true-errno", event.error == new[0], seen)
            if count > 1:
                self.world.case("told", "several losses as one with their number")
            self.told += count


class Listening:
    """Two groups that listen, and two that write back."""

    def __init__(self, world: World) -> None:
        self.core = Fsnotify()
        self.losses: list[int] = []
        self.flushing = 0
        for number, errnos in enumerate(((EIO, EIO), (ENOSPC,)), start=1):
            self.flushing += 1
            world.task(f"write-back {number}", self._write_back(errnos))
        for name in ("A", "B"):
            group = self.core.group(queue_limit=1)
            group.add(On(FILESYSTEM, "fs"), FS_ERROR)
            world.task(f"listener {name}", Listener(world, name, group, self.losses).read(self))

    def _write_back(self, errnos: tuple[int, ...]) -> Steps:
        for errno in errnos:
            yield f"lose {errorcode[errno]}"
            self.losses.append(errno)
            self.core.send([ErrorEvent(FS_ERROR, "fs", b"file", error=errno)])
        self.flushing -= 1


@SCENARIO.design("last-error", "One field: the last error wins, and whoever asks clears it.")
def last_error(world: World) -> None:
    inode = Inode(world)
    inode.begin(LastError(inode))


@SCENARIO.design(
    "errseq",
    "An errno with a counter that moves when it was seen; each descriptor remembers a value.",
    lifetimes=[WB_ERR],
)
def errseq(world: World) -> None:
    inode = Inode(world)
    inode.begin(ErrSeq(inode))


@SCENARIO.design(
    "errseq-retry",
    "The same, and who fails to mark what it saw reads again.",
    lifetimes=[WB_ERR],
)
def errseq_retry(world: World) -> None:
    inode = Inode(world)
    inode.begin(ErrSeq(inode, retry=True))


@SCENARIO.design(
    "errseq-evict",
    "The same, on a file that nobody has open, so that its inode may leave memory.",
    lifetimes=[WB_ERR],
)
def errseq_evict(world: World) -> None:
    inode = Inode(world)
    keeper = ErrSeq(inode, retry=True)
    inode.begin(keeper, is_open=False)
    world.task("evictor", keeper.evict())


@SCENARIO.design(
    "event-merge",
    "An event to each listener, merged with one that waits there: fanwise's own code.",
    lifetimes=[mark.MARK, group.GROUP, reader.READER, reserve.RESERVE, reserve.SLOT, reader.READ],
)
def event_merge(world: World) -> None:
    Listening(world)
