"""fanwise's own tree, as a model: objects known by numbers, and nothing that holds them.

REFS      the table holds the nodes. What the kernel's cache has are numbers.
LOCKING   the server is one thread. The kernel holds a directory's lock, shared, from a look-up to
          its answer, and alone for an invalidation.
LIFETIME  see NODE: a node that is taken out of the table drains the calls in flight, then goes.
"""

from fanwise.lab import Memory, Mutex, World
from fanwise.lifetime import Lifetime, Until

from ._eventfs_kernel import SOURCE, Source, Task


class Node:
    """A directory of fanwise's own tree, with its one file ``enable``; held by its table alone."""

    __slots__ = ("calls", "children", "made", "name", "number", "source", "state")

    def __init__(self, number: int, made: int, source: Source | None) -> None:
        self.name = "node"
        self.made = made  # who it is, which its number need not tell
        self.number, self.source = number, source
        self.children: dict[str, int] = {}
        self.calls = 0  # in flight in the server
        self.state = ""
        NODE.start(self)


NODE: Lifetime[Node] = Lifetime(
    "Numbered node",
    states=("LIVE", "DRAINING", "FREED", "RELEASED"),
    transitions={
        "remove": "LIVE -> DRAINING",
        "free": "DRAINING -> FREED",
        "release": "FREED -> RELEASED",
    },
    invariants={
        "no call is in flight in a freed node": lambda node: (
            node.state in ("LIVE", "DRAINING") or not node.calls
        )
    },
)


class Directory:
    """The lock of a directory in the kernel: shared by look-ups, alone for an invalidation."""

    __slots__ = ("holders", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.holders: list[object] = []


class Numbers:
    """fanwise's tree: objects known by a number that is never given twice, and no references.

    A directory's number is a multiple of 16, its file has the number after it.
    """

    ROOT = 16

    def __init__(self, world: World) -> None:
        self.world = world
        self.memory = Memory(world, leaks=False)  # `nothing_left` looks
        self.table: dict[int, Node] = {self.ROOT: self.memory.alloc(Node(self.ROOT, 0, None))}
        self.root = self.table[self.ROOT]
        self.last, self.made = self.ROOT, 0
        self.server = Mutex(world, "the server", ordered=False)  # one thread: see `ask`
        self.notices: list[tuple[int, str, int]] = []
        self.cache: dict[tuple[int, str], int] = {}  # the kernel's: it outlives everything here
        self.built: dict[tuple[int, str, int], bool] = {}  # as `Ei.built`
        self.asked: set[tuple[int, str]] = set()  # look-ups under way: a second one waits
        self.lock = Directory("the directory's lock")
        self.create("sched")
        world.at_end("name-leads-to-present", self.leads_to_present)
        world.at_end("no-leak", self.nothing_left)

    def create(self, name: str) -> None:
        number = self.root.children[name] = self.next_number()
        self.world.check(
            "unique-directory-inodes", number not in self.table, f"{number} is given twice"
        )
        source = self.memory.alloc(Source(self.world, self.last_reference))
        self.made += 1
        self.table[number] = self.memory.alloc(Node(number, self.made, source))

    def last_reference(self, source: Source) -> None:
        SOURCE.advance(source, "free")
        self.memory.free(source)

    def next_number(self) -> int:
        self.last += 16
        return self.last

    def call(self, node: Node, what: str) -> None:
        """Call into the code behind a file."""
        if node.source is not None:
            self.world.check(
                "no-callback-after-removal",
                not node.source.removed,
                f"{what} after the removal returned",
            )

    # The server and its notifier.

    def ask(self, what: str, number: int, child: str = "") -> Task[int | dict[str, int] | None]:
        """Ask the server about a number, and wait; what is not in its table has no object.

        The one thread that answers is a lock here, held by whoever is being answered.
        """
        with (yield from self.server.lock(f"ask: {what}")):
            node = self.table.get(number & ~15)
            answer: int | dict[str, int] | None = None
            if node is self.root:  # never removed
                answer = dict(node.children) if what == "list" else node.children.get(child)
            elif node is not None:
                node.calls += 1
                yield f"answer: {what}"
                self.call(node, what)
                answer = node.number + 1 if what == "look-up" else node.made
                node.calls -= 1
            yield from self.answered()
            return answer

    def answered(self) -> Task[None]:
        """Do what the server does before it takes the next request."""
        yield from ()

    def notifier(self) -> Task[None]:
        """A thread of its own, because it waits for look-ups, which wait for the server."""
        while True:
            yield Until(
                "invalidate", lambda: bool(self.notices) and not self.lock.holders, self.lock
            )
            self.invalidate(*self.notices.pop(0))

    def invalidate(self, parent: int, name: str, number: int) -> None:
        """FUSE_NOTIFY_DELETE: the number guards a name that another object has by now."""
        if self.cache.get((parent, name)) == number:
            del self.cache[parent, name]
            self.built[parent, name, number] = False

    # The kernel's side.

    def walk(self, parent: int, name: str) -> Task[int | None]:
        """Look a name up: its number, or None (ENOENT)."""
        key = parent, name
        yield Until(f"find {name}", lambda: key not in self.asked)
        if key in self.cache:
            return self.cache[key]
        self.lock.holders.append(self.world.current())
        self.asked.add(key)
        number = yield from self.ask("look-up", parent, name)
        yield f"enter {name}"
        self.lock.holders.remove(self.world.current())
        self.asked.remove(key)
        if not isinstance(number, int):
            return None
        if (*key, number) in self.built:
            self.world.count("rebuilds")
        self.world.check(
            "cached-stays-cached",
            not self.built.get((*key, number)),
            f"{name} is asked for again, and nothing had gone",
        )
        self.built[*key, number] = True
        self.cache[key] = number
        return number

    # At the end.

    def leads_to_present(self) -> bool:
        number = self.cache.get((self.ROOT, "sched"))
        return bool(self.notices) or number in (None, self.root.children.get("sched"))

    def nothing_left(self) -> bool:
        """What is left is what the tree has; the cache may keep numbers, they cost us nothing."""
        left = {self.ROOT, *self.root.children.values()}
        return set(self.table) == left and len(self.memory.live()) == 2 * len(left) - 1

    # The tasks.

    def opener(self) -> Task[None]:
        """``cat events/sched/enable``."""
        directory = yield from self.walk(self.ROOT, "sched")
        if directory is None:
            return
        number = yield from self.walk(directory, "enable")
        if number is None:
            return
        opened = yield from self.ask("open", number)
        if opened is not None:  # else ENODEV
            read = yield from self.ask("read", number)
            self.world.check(
                "opened-is-read", read in (None, opened), f"{opened} was opened, {read} is read"
            )

    def remover(self) -> Task[None]:
        """The source goes, and another one of the same name comes."""
        yield "take it out"
        number = self.root.children.pop("sched")
        node = self.table.pop(number)
        NODE.advance(node, "remove")
        yield from self.drain(node)
        NODE.advance(node, "free")
        assert node.source is not None
        SOURCE.advance(node.source, "remove")
        node.source.removed = True
        node.source.refs.put()
        NODE.advance(node, "release")
        self.memory.free(node)
        self.notices.append((self.ROOT, "sched", number))
        yield "create it again"
        self.create("sched")

    def drain(self, node: Node) -> Task[None]:
        """Wait for the calls that found the node before it was taken out."""
        yield Until("drain", lambda: not node.calls)

    def shrinker(self) -> Task[None]:
        """Memory is short, twice: the kernel forgets, and nobody here need know."""
        for _ in range(2):
            yield "shrink"
            for (parent, name), number in list(self.cache.items())[:1]:
                del self.cache[parent, name]
                self.built[parent, name, number] = False

    def find(self) -> Task[None]:
        """``find events``: list, stat, go down."""
        listed = yield from self.ask("list", self.ROOT)
        assert isinstance(listed, dict)
        for name, d_ino in listed.items():
            number = yield from self.walk(self.ROOT, name)
            if number is None:
                continue
            self.world.check(
                "loop-free-find",
                number != self.ROOT and (number == d_ino or not {number, d_ino} <= set(self.table)),
                f"{name} has d_ino {d_ino} and st_ino {number}",
            )
            yield from self.ask("list", number)

    def start(self) -> None:
        self.world.count("rebuilds", 0)
        self.world.task("opener", self.opener())
        self.world.task("remover", self.remover())
        self.world.task("shrinker", self.shrinker())
        self.world.task("find", self.find())
        self.world.task("notifier", self.notifier(), daemon=True)
