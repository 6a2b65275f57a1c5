"""Eventfs as the kernel has it, and the caches before it: what designs of ``eventfs`` share.

REFS      an entry holds its ei (``d_fsdata``) and its parent's entry; an ei and an open file hold
          the source. The tree holds an ei until it is removed, and its owner a source.
LOCKING   ``event_mutex`` before ``eventfs_mutex``. Walks of a path are readers of ``rcu``, listings
          of ``srcu``. A section under a lock is one step, but in the removal, of which others see
          the middle.
LIFETIME  see SOURCE, EI and DENTRY. Every object is memory of the world.
Linux reference: fs/tracefs/event_inode.c, fs/tracefs/inode.c, kernel/trace/trace_events.c.
"""

from collections.abc import Callable, Generator
from typing import TypeAlias, TypeVar

from fanwise.lab import Memory, Mutex, Refcount, Srcu, World
from fanwise.lifetime import Lifetime, Until

T = TypeVar("T")
Task: TypeAlias = Generator[str | Until, None, T]

FILE_INO = 0x12C4E37  # EVENTFS_FILE_INODE_INO: what every file of the kernel's tree has


class Source:
    """A trace event: what the callbacks of an event's file work on, and their code."""

    __slots__ = ("name", "refs", "removed", "state")

    def __init__(self, world: World, last: Callable[["Source"], None]) -> None:
        self.name = "source"
        self.refs = Refcount(world, self.name, on_zero=lambda: last(self))
        self.removed = False  # the removal has returned: the code may be gone
        self.state = ""
        SOURCE.start(self)

    @property
    def flagged(self) -> bool:
        """EVENT_FILE_FL_FREED."""
        return self.state != "LIVE"


SOURCE: Lifetime[Source] = Lifetime(
    "Source",
    states=("LIVE", "REMOVED", "FREED"),
    transitions={"remove": "LIVE -> REMOVED", "free": "REMOVED -> FREED"},
    invariants={
        "what is referred to is not freed": lambda source: (
            source.state != "FREED" or not source.refs.value
        )
    },
)


class Ei:
    """A directory as eventfs keeps it (struct eventfs_inode), with its one file ``enable``."""

    __slots__ = ("built", "children", "dentry", "ino", "name", "refs", "source", "state")

    def __init__(self, world: World, source: Source | None, last: Callable[["Ei"], None]) -> None:
        self.name = "ei"
        self.children: dict[str, Ei] = {}
        self.source = source
        self.ino = 0  # given when it is first asked for
        self.refs = Refcount(world, self.name, on_zero=lambda: last(self))
        self.built: dict[str, bool] = {}  # what of it was built: whether the cache ought to have it
        self.dentry: Dentry | None = None  # `Uncounted` alone
        self.state = ""
        EI.start(self)

    @property
    def flagged(self) -> bool:
        """``is_freed``."""
        return self.state != "LIVE"


EI: Lifetime[Ei] = Lifetime(
    "Eventfs inode",
    states=("LIVE", "FREED", "RELEASED", "RECLAIMED"),
    transitions={
        "remove": "LIVE -> FREED",
        "release": "FREED -> RELEASED",
        "reclaim": "RELEASED -> RECLAIMED",
    },
    invariants={
        "what is referred to is not released": lambda ei: (
            ei.state in ("LIVE", "FREED") or not ei.refs.value
        )
    },
)


class Dentry:
    """A cached entry: with no users it stays until memory is short."""

    __slots__ = ("children", "ei", "ino", "name", "parent", "state", "users")

    def __init__(self, parent: "Dentry | None", name: str, ei: Ei, ino: int) -> None:
        self.parent, self.name, self.ei, self.ino = parent, name, ei, ino
        self.children: dict[str, Dentry] = {}  # those that are hashed
        self.users = 1
        self.state = ""
        DENTRY.start(self)


DENTRY: Lifetime[Dentry] = Lifetime(
    "Cached entry",
    states=("HASHED", "UNHASHED", "KILLED", "FREED"),
    transitions={
        "unhash": "HASHED -> UNHASHED",
        "kill": "HASHED, UNHASHED -> KILLED",
        "free": "KILLED -> FREED",
    },
    invariants={
        "a killed entry has no users": lambda dentry: (
            dentry.state in ("HASHED", "UNHASHED") or not dentry.users
        )
    },
)


class Readers(Srcu):
    """Who reads without a lock, and what waits until all who read before have left.

    It runs as soon as the last of them leaves: a later end of a grace period only hides uses.
    """

    __slots__ = ("_waiting",)

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self._waiting: list[tuple[list[object], Callable[[], None]]] = []

    def call(self, run: Callable[[], None]) -> None:
        """``call_rcu`` or ``call_srcu``."""
        if self._readers:
            self._waiting.append((list(self._readers), run))
        else:
            run()

    def read_unlock(self, reader: object) -> None:
        super().read_unlock(reader)
        waiting, self._waiting = self._waiting, []
        for before, run in waiting:
            if reader in before:
                before.remove(reader)
            if before:
                self._waiting.append((before, run))
            else:
                run()


class Eventfs:
    """The merged design: flag, references from entries, revalidation, and an open that rechecks."""

    must_stay = True  # whether "cached-stays-cached" is demanded

    def __init__(self, world: World) -> None:
        self.world = world
        self.memory = Memory(world, leaks=False)  # `nothing_left` looks
        self.event_mutex = Mutex(world, "event_mutex")
        self.eventfs_mutex = Mutex(world, "eventfs_mutex")
        self.rcu, self.srcu = Readers(world, "rcu"), Readers(world, "eventfs_srcu")
        self.inos = 0
        self.entries: list[Dentry] = []  # in the order in which the shrinker takes them
        self.root: Ei = self.memory.alloc(Ei(world, None, self.release))
        self.root.ino = self.next_ino()
        self.top: Dentry = self.memory.alloc(Dentry(None, "events", self.root, self.root.ino))
        self.create("sched")
        world.at_end("name-leads-to-present", self.leads_to_present)
        world.at_end("no-leak", self.nothing_left)

    # What designs differ in.

    def dead(self, ei: Ei) -> bool:
        """Whether a directory has been removed, as look-ups and listings ask."""
        return ei.flagged

    def stale(self, dentry: Dentry) -> bool:
        """``d_revalidate``, the other way round; called without a reference, under RCU."""
        return self.dead(dentry.ei)

    def open(self, source: Source) -> Task[bool]:
        """The open of a file: whether there is one now; it holds the source then."""
        with (yield from self.event_mutex.lock("recheck and get")):
            if source.flagged:
                return False  # ENODEV
            source.refs.get()
            self.call(source, "open")
            return True

    def close(self, source: Source) -> None:
        """The end of an open file."""
        source.refs.put()

    def keep(self, dentry: Dentry) -> bool:
        """``d_delete``, the other way round: whether an entry stays when nobody uses it."""
        return True

    def point(self, ei: Ei, dentry: Dentry) -> None:
        """Tie a new entry to its ei."""
        ei.refs.get()

    def let_go(self, dentry: Dentry) -> None:
        """``d_release``."""
        dentry.ei.refs.put()

    def retire(self, ei: Ei) -> Task[None]:
        """Let a removal take down what the cache has of this ei; runs under eventfs_mutex."""
        yield from ()

    def grace(self, free: Callable[[], None]) -> None:
        """Free an ei after all who may stand on it: who walks a path, and who lists."""
        self.rcu.call(lambda: self.srcu.call(free))

    # Walks.

    def walk(self, parent: Dentry, name: str) -> Task[Dentry | None]:
        """Look a name up: its entry with one user more, or None (ENOENT)."""
        yield f"find {name}"
        reader = self.rcu.read_lock()
        dentry = parent.children.get(name)
        if dentry is not None:
            yield f"revalidate {name}"
            stale = self.stale(dentry)
            if not stale and dentry.state == "HASHED":
                dentry.users += 1
                self.rcu.read_unlock(reader)
                return dentry
        self.rcu.read_unlock(reader)
        with (yield from self.eventfs_mutex.lock(f"look up {name}")):
            return self.look_up(parent, name)

    def look_up(self, parent: Dentry, name: str) -> Dentry | None:
        """``->lookup``, under the directory's lock and eventfs_mutex."""
        dentry = parent.children.get(name)
        if dentry is not None:
            if not self.stale(dentry):
                dentry.users += 1
                return dentry
            self.unhash(dentry)
        ei, ino = parent.ei, FILE_INO
        if self.dead(ei):
            return None
        if parent is self.top:
            if name not in ei.children:
                return None
            ei = ei.children[name]
            ino = self.number(ei)
        elif ei.source is not None:
            self.call(ei.source, "mode")
        if name in ei.built:
            self.world.count("rebuilds")
        self.world.check(
            "cached-stays-cached",
            not (ei.built.get(name) and self.must_stay),
            f"{name} is built again, and nothing had gone",
        )
        ei.built[name] = True
        dentry = Dentry(parent, name, ei, ino)
        self.memory.alloc(dentry)
        self.entries.append(dentry)
        parent.children[name] = dentry
        parent.users += 1
        self.point(ei, dentry)
        return dentry

    def put(self, dentry: Dentry) -> None:
        """``dput``."""
        dentry.users -= 1
        if not dentry.users and (dentry.state == "UNHASHED" or not self.keep(dentry)):
            self.kill(dentry)

    def unhash(self, dentry: Dentry) -> None:
        """``d_invalidate``: no walk finds it any more; it goes with its last user."""
        if dentry.state != "HASHED":
            return
        dentry.users += 1
        for child in list(dentry.children.values()):
            self.unhash(child)
        DENTRY.advance(dentry, "unhash")
        assert dentry.parent is not None
        del dentry.parent.children[dentry.name]
        self.put(dentry)

    def kill(self, dentry: Dentry) -> None:
        """Take an entry without users down, and its parent's reference with it."""
        parent = dentry.parent
        assert parent is not None
        if dentry.state == "HASHED":
            del parent.children[dentry.name]
        DENTRY.advance(dentry, "kill")
        self.entries.remove(dentry)
        self.let_go(dentry)
        self.rcu.call(lambda: self.free(dentry))
        self.put(parent)

    def free(self, dentry: Dentry) -> None:
        DENTRY.advance(dentry, "free")
        self.memory.free(dentry)

    def shrink(self) -> bool:
        """Memory is short: drop the oldest entry that nobody uses."""
        for dentry in self.entries:
            if not dentry.users:
                dentry.ei.built[dentry.name] = False
                self.kill(dentry)
                return True
        return False

    # The tree.

    def create(self, name: str) -> None:
        """``eventfs_create_dir``, under eventfs_mutex."""
        source = self.memory.alloc(Source(self.world, self.last))
        source.refs.get()  # the ei's own
        self.root.children[name] = self.memory.alloc(Ei(self.world, source, self.release))

    def number(self, ei: Ei) -> int:
        """The inode number of a directory, given once; under eventfs_mutex."""
        if not ei.ino:
            ei.ino = self.next_ino()
            others = [other.ino for other in (self.root, *self.root.children.values())]
            self.world.check(
                "unique-directory-inodes",
                others.count(ei.ino) <= 1 and ei.ino != FILE_INO,
                f"{ei.ino} is given twice",
            )
        return ei.ino

    def next_ino(self) -> int:
        self.inos += 1
        return self.inos

    def call(self, source: Source, what: str) -> None:
        """Call into the code behind a file."""
        self.world.check(
            "no-callback-after-removal", not source.removed, f"{what} after the removal returned"
        )

    def release(self, ei: Ei) -> None:
        """The last reference to an ei is gone."""
        EI.advance(ei, "release")
        if ei.source is not None:
            ei.source.refs.put()
        self.grace(lambda: self.reclaim(ei))

    def reclaim(self, ei: Ei) -> None:
        EI.advance(ei, "reclaim")
        self.memory.free(ei)

    def last(self, source: Source) -> None:
        SOURCE.advance(source, "free")
        self.memory.free(source)

    # At the end.

    def leads_to_present(self) -> bool:
        dentry = self.top.children.get("sched")
        return dentry is None or self.stale(dentry) or dentry.ei is self.root.children.get("sched")

    def nothing_left(self) -> bool:
        """Drop the caches: what is left then is what the tree has, and the root's entry."""
        while self.shrink():
            pass
        held: list[object] = [self.root, self.top]
        for ei in self.root.children.values():
            held += [ei, ei.source]
        left = self.memory.live()
        return len(left) == len(held) and all(any(x is y for y in held) for x in left)

    # The tasks.

    def opener(self) -> Task[None]:
        """``cat events/sched/enable``."""
        directory = yield from self.walk(self.top, "sched")
        if directory is None:
            return
        dentry = yield from self.walk(directory, "enable")
        if dentry is not None:
            source = dentry.ei.source
            assert source is not None
            if (yield from self.open(source)):
                with (yield from self.event_mutex.lock("read")):
                    if not source.flagged:
                        self.call(source, "read")
                yield "close"
                self.close(source)
            self.put(dentry)
        self.put(directory)

    def remover(self) -> Task[None]:
        """The event goes, and another one of the same name comes."""
        yield from self.event_mutex.lock()
        yield from self.eventfs_mutex.lock("flag the ei")
        ei = self.root.children["sched"]
        EI.advance(ei, "remove")
        yield from self.retire(ei)
        yield "unlink the ei"
        del self.root.children["sched"]
        source = ei.source
        assert source is not None
        ei.refs.put()
        self.eventfs_mutex.unlock()
        yield "flag the source"
        SOURCE.advance(source, "remove")
        source.removed = True
        source.refs.put()
        self.event_mutex.unlock()
        yield "create it again"
        self.create("sched")

    def shrinker(self) -> Task[None]:
        """Memory is short, twice."""
        for _ in range(2):
            yield "shrink"
            self.shrink()

    def emit(self, name: str, ei: Ei) -> Task[int]:
        """List one directory: its ``d_ino``."""
        with (yield from self.eventfs_mutex.lock(f"emit {name}")):
            return self.number(ei)

    def find(self) -> Task[None]:
        """``find events``: list, stat, go down."""
        with (yield from self.eventfs_mutex.lock("list events")):
            reader = self.srcu.read_lock()
            listed = list(self.root.children.items())
        for name, ei in listed:
            d_ino = yield from self.emit(name, ei)
        self.srcu.read_unlock(reader)
        if not listed:
            return
        directory = yield from self.walk(self.top, name)
        if directory is None:
            return
        st_ino = directory.ino
        self.world.check(
            "loop-free-find",
            st_ino != self.root.ino and (directory.ei is not ei or st_ino == d_ino),
            f"{name} has d_ino {d_ino} and st_ino {st_ino}",
        )
        with (yield from self.eventfs_mutex.lock(f"list {name}")):
            if not self.dead(directory.ei) and directory.ei.source is not None:
                self.call(directory.ei.source, "mode")
            self.put(directory)

    def start(self) -> None:
        self.world.count("rebuilds", 0)
        self.world.task("opener", self.opener())
        self.world.task("remover", self.remover())
        self.world.task("shrinker", self.shrinker())
        self.world.task("find", self.find())
