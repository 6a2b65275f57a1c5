"""The tree of directories: native, pure and a plain model give the same answers."""

import contextlib
import ctypes
import random
import resource
import struct

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fanwise.kernel.contract import (
    CURRENT,
    EXCLUDED,
    FILES,
    FREE,
    IN,
    IN_CURRENT,
    IN_FILES,
    ROOT,
    SCANNED,
    TOP,
    ZOMBIE,
)
from tests.wire.twins import PURE, leaks, native_parts

SETTABLE = (ROOT, TOP, EXCLUDED, FILES, CURRENT, SCANNED)


@pytest.fixture(params=["native", "pure"])
def new(request, cannot_run):
    return (PURE if request.param == "pure" else native_parts(cannot_run)).Tree


def key(number, size=12):
    return struct.pack("=iI", 1, number).ljust(size, b"\xfe")[: max(size, 4)]


class Model:
    """What the tree means, without its speed."""

    def __init__(self, recursive):
        self.recursive = recursive
        self.clear()

    def clear(self):
        self.nodes, self.free, self.zombies, self.limit = {}, [], [], 0

    def live(self, at):
        if at not in self.nodes:
            raise KeyError("no such directory")

    def check(self, parent, name, *flags):
        if parent != -1:
            self.live(parent)
        if len(name) > 65535:
            raise ValueError("name longer than 65535 bytes")
        for each in flags:
            if each & ~sum(SETTABLE):
                raise ValueError("not flags of a directory")

    def put(self, key, parent, name, flags):
        if len(key) > 132:
            raise ValueError("handle key longer than 132 bytes")
        self.check(parent, name, flags)
        at = self.find(key)
        if at < 0:
            if self.free:
                at = self.free.pop()
            else:
                at, self.limit = self.limit, self.limit + 1
            self.nodes[at] = [parent, name, flags, key]
        else:
            self.nodes[at] = [parent, name, self.nodes[at][2] & ~ZOMBIE | flags, key]
        return at

    def find(self, key):
        return next((at for at, node in self.nodes.items() if node[3] == key), -1)

    def move(self, at, parent, name):
        self.live(at)
        self.check(parent, name)
        self.nodes[at][:2] = parent, name

    def flag(self, at, add, clear):
        self.live(at)
        self.check(-1, b"", add, clear)
        self.nodes[at][2] = self.nodes[at][2] & ~clear | add

    def info(self, at):
        self.live(at)
        return *self.nodes[at], self.kids(at)

    def kids(self, at):
        return sum(node[0] == at for node in self.nodes.values())

    def resolve(self, at):
        self.live(at)
        way = [at]
        while not self.nodes[way[-1]][2] & TOP:
            above = self.nodes[way[-1]][0]
            if above == -1 or above in way:
                return 0, b""
            way.append(above)
        nodes = [self.nodes[i] for i in way]
        scope = IN_CURRENT if any(node[2] & CURRENT for node in nodes) else 0
        for depth, (_, _, flags, _) in enumerate(nodes):
            if flags & EXCLUDED:
                break
            if flags & ROOT and (self.recursive or depth == 0):
                scope |= IN
                break
        if not scope & IN and nodes[0][2] & FILES:
            scope |= IN_FILES
        names = [node[1] for node in nodes]
        if names[-1] == b"/":
            names[-1] = b""
        return scope, b"/".join(reversed(names))

    def drop(self, at):
        self.live(at)
        if not self.nodes[at][2] & ZOMBIE:
            self.nodes[at][2] |= ZOMBIE
            self.zombies.append(at)

    def sweep(self):
        before = len(self.nodes)
        for at in self.zombies:
            while at in self.nodes and self.nodes[at][2] & ZOMBIE and not self.kids(at):
                self.free.append(at)
                at = self.nodes.pop(at)[0]
        self.zombies = [at for at in self.zombies if self.nodes.get(at, (0, 0, 0))[2] & ZOMBIE]
        return before - len(self.nodes)

    def ids(self):
        return sorted(at for at, node in self.nodes.items() if not node[2] & ZOMBIE)

    def __len__(self):
        return len(self.nodes)


KEYS = st.builds(
    lambda number, size: key(number, size), st.integers(0, 11), st.sampled_from([4, 8, 12, 132])
) | st.sampled_from([b"", b"x", bytes(133)])
NAMES = st.sampled_from([b"a", b"b", b"/", b"", b"\xff\xfe", b"n" * 300]) | st.just(bytes(65536))
IDS = st.integers(-2, 14) | st.sampled_from([2**31, 2**32 - 1, 2**32, 2**63, 2**64, -(2**70)])
FLAGS = st.sets(st.sampled_from(SETTABLE), max_size=2).map(sum) | st.sampled_from(
    [FREE, ZOMBIE, 256, -1, 2**32, 2**64]
)
GOOD_IDS = st.integers(0, 9)
GOOD_FLAGS = st.sets(st.sampled_from(SETTABLE), max_size=2).map(sum)


class Same(RuleBasedStateMachine):
    native = None

    @initialize(recursive=st.booleans())
    def begin(self, recursive):
        self.all = [self.native.Tree(recursive), PURE.Tree(recursive), Model(recursive)]

    def do(self, name, *args):
        told = []
        for tree in self.all:
            try:
                told.append(getattr(tree, name)(*args))
            except (KeyError, ValueError) as error:
                told.append((type(error), error.args))
        assert told[0] == told[1] == told[2], (name, args, told)

    @rule(key=KEYS, parent=st.integers(-1, 9), name=NAMES, flags=GOOD_FLAGS)
    def put(self, key, parent, name, flags):
        self.do("put", key, parent, name, flags)

    @rule(key=KEYS, parent=IDS, name=NAMES, flags=FLAGS)
    def put_anything(self, key, parent, name, flags):
        self.do("put", key, parent, name, flags)

    @rule(at=GOOD_IDS, parent=st.integers(-1, 9), name=NAMES)
    def move(self, at, parent, name):
        self.do("move", at, parent, name)

    @rule(at=IDS, parent=IDS, name=NAMES)
    def move_anything(self, at, parent, name):
        self.do("move", at, parent, name)

    @rule(at=GOOD_IDS, add=GOOD_FLAGS, clear=GOOD_FLAGS)
    def flag(self, at, add, clear):
        self.do("flag", at, add, clear)

    @rule(at=IDS, add=FLAGS, clear=FLAGS)
    def flag_anything(self, at, add, clear):
        self.do("flag", at, add, clear)

    @rule(at=IDS | GOOD_IDS)
    def drop(self, at):
        self.do("drop", at)

    @rule()
    def sweep(self):
        self.do("sweep")

    @rule(odds=st.integers(0, 9))
    def clear(self, odds):
        if not odds:
            self.do("clear")

    @rule(at=IDS)
    def ask_anything(self, at):
        self.do("info", at)
        self.do("resolve", at)

    @rule(key=KEYS)
    def find(self, key):
        self.do("find", key)

    @invariant()
    def the_same(self):
        if not hasattr(self, "all"):
            return
        assert len({len(tree) for tree in self.all}) == 1
        assert len({tuple(tree.ids()) for tree in self.all}) == 1
        for at in range(self.all[2].limit):
            self.do("info", at)
            self.do("resolve", at)
            self.do("resolve", at)


def same_under(found, examples, steps):
    class Machine(Same):
        native = found

    case = Machine.TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    case("runTest").runTest()


def test_any_sequence_of_calls(cannot_run):
    same_under(native_parts(cannot_run), 120, 40)


def chain(tree, length, flags=0):
    at = tree.put(key(0), -1, b"/", TOP | ROOT)
    for number in range(1, length):
        at = tree.put(key(number), at, b"d", flags)
    return at


@pytest.mark.parametrize("length", [1, 2, 1000, 100_000])
def test_a_deep_chain(new, length):
    tree = new()
    end = chain(tree, length)
    path = b"/d" * (length - 1)
    for _ in range(3):
        assert tree.resolve(end) == (IN, path)
    tree.move(0, -1, b"/mnt")
    assert tree.resolve(end) == (IN, b"/mnt" + path)
    tree.flag(0, CURRENT, ROOT)
    assert tree.resolve(end) == (IN_CURRENT, b"/mnt" + path)
    assert tree.resolve(0) == (IN_CURRENT, b"/mnt")
    for at in range(length):  # the top is dropped first, and freed last
        tree.drop(at)
    assert tree.sweep() == length
    assert len(tree) == 0


def test_long_paths_do_not_pile_up(new):
    # Each of them is 12 MB; a cache of them all would be 12 GB.
    tree = new()
    at = tree.put(key(0), -1, b"/", TOP | ROOT)
    for number in range(1, 200):
        at = tree.put(key(number), at, b"n" * 65535, 0)
    for number in range(1000, 2100):
        tree.put(key(number), at, b"x", 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(1000, 1040):
        scope, path = tree.resolve(tree.find(key(number)))
        assert (scope, len(path)) == (IN, 199 * 65536 + 2)
    if new is not PURE.Tree:
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_loop_resolves_to_nothing_until_it_is_undone(new):
    tree = new()
    top = tree.put(key(0), -1, b"/", TOP | ROOT)
    a = tree.put(key(1), top, b"a", 0)
    b = tree.put(key(2), a, b"b", 0)
    c = tree.put(key(3), b, b"c", FILES)
    assert tree.resolve(c) == (IN, b"/a/b/c")
    tree.move(a, b, b"a")
    assert [tree.resolve(at) for at in (a, b, c)] == [(0, b"")] * 3
    assert tree.resolve(top) == (IN, b"")
    tree.move(a, a, b"self")
    assert tree.resolve(c) == (0, b"")
    assert tree.info(a)[4] == 2  # b and itself
    tree.drop(a)
    assert tree.sweep() == 0
    tree.move(a, top, b"x")
    assert tree.resolve(c) == (IN, b"/x/b/c")


@pytest.mark.parametrize("size", range(4, 133))
def test_keys_of_every_length(new, size):
    tree = new()
    one, two = key(7, size), key(7, size)[:-1] + b"\x01"
    assert tree.put(one, -1, b"one", TOP) == 0
    assert tree.find(two) == -1
    assert tree.find(one[:-1]) == tree.find(one + b"\0") == tree.find(b"") == -1
    assert tree.put(two, 0, b"two", 0) == 1
    assert (tree.find(one), tree.find(two)) == (0, 1)
    assert tree.info(1) == (0, b"two", 0, two, 0)
    assert tree.info(0) == (-1, b"one", TOP, one, 1)


def test_an_empty_key_and_name(new):
    tree = new()
    assert tree.put(b"", -1, b"", 0) == 0
    assert (tree.find(b""), tree.info(0)) == (0, (-1, b"", 0, b"", 0))
    assert tree.put(b"", -1, b"", TOP) == 0
    assert tree.resolve(0) == (0, b"")


def test_names_changed_often_do_not_pile_up(new):
    tree, rng, names = new(), random.Random(5), {}
    top = tree.put(key(0), -1, b"/", TOP | ROOT)
    for number in range(1, 400):
        tree.put(key(number, rng.randint(8, 132)), top, b"", 0)
    for turn in range(40_000):
        at = rng.randint(1, 399)
        if turn % 50 == 0:  # freed and made anew, which may leave a hole anywhere
            held = tree.info(at)[3]
            tree.drop(at)
            assert tree.sweep() == 1
            assert tree.find(held) == -1
            assert tree.put(held, top, b"again", 0) == at
            names[at] = b"again"
            continue
        names[at] = bytes([turn & 255]) * rng.randint(0, 260)
        tree.move(at, top, names[at])
    for at, name in names.items():
        parent, held, flags, k, kids = tree.info(at)
        assert (parent, held, flags, kids) == (top, name, 0, 0)
        assert tree.find(k) == at
        assert tree.resolve(at) == (IN, b"/" + name)
    assert tree.nbytes < 1 << 20


def test_many(new):
    tree, count = new(), 30_000
    top = tree.put(key(0), -1, b"/", TOP | ROOT)
    for number in range(1, count):
        assert tree.put(key(number), top, b"%d" % number, 0) == number
    assert len(tree) == count
    assert tree.info(top)[4] == count - 1
    gone = random.Random(3).sample(range(1, count), 15_000)
    for at in gone:
        tree.drop(at)
    assert len(tree) == count
    assert tree.find(key(gone[0])) == gone[0]
    assert len(tree.ids()) == count - 15_000
    assert tree.sweep() == 15_000
    assert len(tree) == count - 15_000
    dead = set(gone)
    for at in range(1, count):
        assert tree.find(key(at)) == (-1 if at in dead else at)
    assert tree.info(top)[4] == count - 1 - 15_000


def test_an_index_is_used_again_after_the_sweep_only(new):
    tree = new()
    top = tree.put(key(0), -1, b"/", TOP | ROOT)
    a = tree.put(key(1), top, b"a", ROOT)
    b = tree.put(key(2), a, b"b", 0)
    assert tree.resolve(b) == (IN, b"/a/b")
    tree.drop(a)
    tree.drop(a)
    assert tree.info(a)[2] == ROOT | ZOMBIE
    assert tree.resolve(b) == (IN, b"/a/b")
    assert tree.sweep() == 0  # b is below it
    assert tree.put(key(3), top, b"c", 0) == 3
    tree.drop(b)
    assert tree.sweep() == 2
    for at in (a, b):
        for ask in (tree.info, tree.resolve, tree.drop):
            with pytest.raises(KeyError):
                ask(at)
        with pytest.raises(KeyError):
            tree.put(key(9), at, b"x", 0)
    # b was freed first: as dropped, but a had to wait for it. The last freed is the first used.
    assert [tree.put(key(4), top, b"d", 0), tree.put(key(5), top, b"e", 0)] == [a, b]
    assert tree.resolve(a) == (IN, b"/d")  # not what was cached for the index
    assert tree.resolve(b) == (IN, b"/e")
    assert tree.info(a) == (top, b"d", 0, key(4), 0)


def test_put_revives_what_was_dropped(new):
    tree = new()
    top = tree.put(key(0), -1, b"/", TOP | ROOT)
    at = tree.put(key(1), top, b"a", SCANNED)
    for _ in range(200):
        tree.drop(at)
        assert tree.put(key(1), top, b"a", 0) == at
    assert tree.sweep() == 0
    assert tree.info(at) == (top, b"a", SCANNED, key(1), 0)
    tree.drop(at)
    tree.put(key(1), top, b"a", 0)
    tree.drop(at)
    assert tree.sweep() == 1
    assert tree.sweep() == 0
    assert len(tree) == 1


def test_indexes_that_share_a_place_in_the_cache(new):
    tree, rng = new(), random.Random(1)
    top = tree.put(key(0), -1, b"/", TOP | ROOT)
    names = {top: b""}
    for number in range(1, 3 * 1024):
        names[tree.put(key(number), top, b"%d" % number, 0)] = b"/%d" % number
    for place in rng.sample(range(1, 1024), 60):
        for _ in range(2):
            for at in (place, place + 1024, place + 2048, place):
                assert tree.resolve(at) == (IN, names[at])
        tree.move(place, place + 1024, b"m")
        names[place] = names[place + 1024] + b"/m"
        assert tree.resolve(place) == (IN, names[place])
        tree.flag(place + 1024, EXCLUDED, 0)
        assert tree.resolve(place) == (0, names[place])
        tree.flag(place + 1024, SCANNED, EXCLUDED)
        assert tree.resolve(place) == (IN, names[place])


@pytest.mark.parametrize("recursive", [True, False])
def test_scopes(new, recursive):
    tree = new(recursive)
    assert tree.recursive is recursive
    top = tree.put(key(0), -1, b"/m", TOP)
    root = tree.put(key(1), top, b"r", ROOT)
    below = tree.put(key(2), root, b"b", 0)
    deep = tree.put(key(3), below, b"c", FILES)
    loose = tree.put(key(4), -1, b"x", ROOT | FILES)
    far = IN if recursive else 0
    assert tree.resolve(top) == (0, b"/m")
    assert tree.resolve(root) == (IN, b"/m/r")
    assert tree.resolve(below) == (far, b"/m/r/b")
    assert tree.resolve(deep) == (far or IN_FILES, b"/m/r/b/c")
    assert tree.resolve(loose) == (0, b"")  # no way up is known
    tree.flag(below, EXCLUDED, 0)
    assert tree.resolve(below)[0] == 0
    assert tree.resolve(deep)[0] == IN_FILES
    tree.flag(deep, ROOT, FILES)  # a root below an exclusion is watched
    assert tree.resolve(deep)[0] == IN
    tree.flag(below, CURRENT, 0)
    assert tree.resolve(deep)[0] == IN | IN_CURRENT
    assert tree.resolve(root)[0] == IN
    tree.flag(root, EXCLUDED, 0)  # both: the exclusion counts
    assert tree.resolve(root)[0] == 0
    tree.clear()
    assert (len(tree), tree.ids(), tree.find(key(0))) == (0, [], -1)
    with pytest.raises(KeyError):
        tree.resolve(0)
    assert tree.put(key(9), -1, b"/", TOP) == 0
    assert tree.resolve(0) == (0, b"")


@pytest.mark.parametrize(
    ("call", "args"),
    [("put", ()), ("put", (b"abcd", -1, b"")), ("move", (0, -1)), ("flag", (0, 0)),
     ("put", (None, -1, b"", 0)), ("put", (b"abcd", -1, b"", None)),
     ("put", (b"abcd", None, b"", 0)), ("move", (0, -1, None)), ("flag", (0, None, 0))],
)  # fmt: skip
def test_wrong_arguments(new, call, args):
    tree = new()
    tree.put(b"abcd", -1, b"/", TOP)
    with pytest.raises(TypeError):
        getattr(tree, call)(*args)
    assert tree.info(0) == (-1, b"/", TOP, b"abcd", 0)


def test_numbers_that_run_code_are_no_numbers(cannot_run):
    tree = native_parts(cannot_run).Tree()
    tree.put(key(0), -1, b"/", TOP)

    class Sly:
        def __index__(self):
            tree.clear()
            return 0

    for call in (lambda: tree.put(key(1), Sly(), b"", 0), lambda: tree.move(0, Sly(), b""),
                 lambda: tree.move(Sly(), 0, b""), lambda: tree.flag(0, Sly(), 0),
                 lambda: tree.resolve(Sly())):  # fmt: skip
        with pytest.raises(TypeError):
            call()
    assert len(tree) == 1


def test_nothing_is_leaked(new):
    def once():
        tree = new()
        chain(tree, 50)
        for at in tree.ids():
            tree.resolve(at)
            tree.info(at)
            tree.move(at, -1, b"other")
            tree.drop(at)
        tree.sweep()
        for call, args in (("info", (99,)), ("put", (bytes(200), -1, b"", 0))):
            with contextlib.suppress(KeyError, ValueError):
                getattr(tree, call)(*args)

    assert not leaks(once)


def test_a_leak_of_one_block_is_found():
    """What `leaks` promises, with a reference that is not given back, as C forgets one."""
    kept = []
    others = [bytes(20) for _ in range(3000)]  # what other parts of the process free meanwhile

    def once():
        text = b"%d" % (1000 + len(kept))
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(text))
        kept.append(id(text))
        if len(kept) == 250:
            others.clear()

    assert leaks(once)
    assert not leaks(lambda: bytes(20))


def test_what_others_allocate_is_no_leak():
    calls, others = [], []

    def once():
        calls.append(None)
        if len(calls) % 170 == 0:
            others.append([bytes(20) for _ in range(200)])

    assert not leaks(once)
