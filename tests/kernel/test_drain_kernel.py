"""The drain on a real fanotify group, marked on a tmpfs of its own."""

import contextlib
import ctypes
import importlib
import os
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from fanwise.kernel import contract
from fanwise.kernel.handles import name_to_handle
from tests.kernel.conftest import unmount

META = struct.Struct("=IBBHQii")
# CLOEXEC NONBLOCK UNLIMITED_QUEUE, REPORT_ FID DIR_FID NAME TARGET_FID
INIT = 0x1 | 0x2 | 0x10 | 0x200 | 0x400 | 0x800 | 0x1000
CREATE = 0x100
AT_FDCWD = -100
KIB = 1 << 10
MIB = 1 << 20

libc = ctypes.CDLL(None, use_errno=True)
libc.fanotify_mark.argtypes = [
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_uint64,
    ctypes.c_int,
    ctypes.c_char_p,
]


@pytest.fixture(params=["native", "pure"], scope="module")
def name(request, cannot_run):
    """The module, by name, because children import it too."""
    if os.geteuid():
        cannot_run("needs root: it marks a whole filesystem")
    if request.param == "pure":
        return "fanwise.kernel._pure_drain"
    try:
        importlib.import_module("fanwise.kernel._native")
    except ImportError:
        if shutil.which("cc") or shutil.which("gcc"):
            raise
        cannot_run("no C compiler")
    return "fanwise.kernel._native"


@pytest.fixture
def twin(name):
    return importlib.import_module(name).Drain


@pytest.fixture
def root(tmp_path):
    point = tmp_path / "fs"
    point.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1g,nr_inodes=0", "fw-test", point], check=True
    )
    try:
        yield str(point)
    finally:
        unmount(point)


@pytest.fixture
def group(root):
    fd = libc.fanotify_init(INIT, os.O_RDONLY)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "fanotify_init")
    try:
        if libc.fanotify_mark(fd, 0x1 | 0x100, CREATE, AT_FDCWD, root.encode()):
            raise OSError(ctypes.get_errno(), "fanotify_mark")
        yield fd
    finally:
        os.close(fd)


def create(root, start, stop):
    directory = os.open(root, os.O_RDONLY)
    try:
        for i in range(start, stop):
            os.mknod(f"f{i}", dir_fd=directory)
    finally:
        os.close(directory)


def names(data):
    """The names in a chunk; every record must end where the next begins."""
    at, out = 0, []
    while at < len(data):
        size, version, _, length, mask, _, _ = META.unpack_from(data, at)
        assert (version, length) == (3, 24)
        assert size >= 24
        assert mask & CREATE
        info = at + length
        while info < at + size:
            kind, _, step = struct.unpack_from("=BBH", data, info)
            if kind == 2:  # FAN_EVENT_INFO_TYPE_DFID_NAME
                handle = 20 + struct.unpack_from("=I", data, info + 12)[0]
                out.append(data[info + handle : info + step].split(b"\0")[0])
            info += step
        at += size
    assert at == len(data)
    return out


def readable(drain, timeout):
    poll = select.poll()
    poll.register(drain.fileno(), select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def child(code, name, group, root, *args):
    """Run code in an exec'ed interpreter that finds the same modules and inherits the group."""
    done = subprocess.run(
        [sys.executable, "-c", code, name, str(group), root, *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        pass_fds=[group],
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@contextlib.contextmanager
def running(twin, fd, ring=64 * MIB, **options):
    drain = twin(fd, ring, **options)
    drain.start()
    try:
        yield drain
    finally:
        drain.close()


def test_every_creation_arrives_in_order(twin, group, root):
    count = 100_000
    with running(twin, group) as drain:
        writer = threading.Thread(target=create, args=(root, 0, count))
        writer.start()
        got = []
        while len(got) < count:
            assert readable(drain, 30), f"nothing after {len(got)}"
            for data, _, _, lost in iter(drain.take, None):
                assert lost == 0
                got += names(data)
        writer.join()
        assert got == [b"f%d" % i for i in range(count)]
        stats = drain.stats()
        assert stats["records"] == count
        assert stats["reads"] < count / 10


def test_under_load_the_queue_fills(twin, group, root):
    create(root, 0, 1_000)  # a read of many means load
    with running(twin, group, pace_ns=10 * 10**9) as drain:
        assert drain.sync(30)
        before = drain.stats()
        create(root, 1_000, 1_001)
        deadline = time.monotonic() + 30
        while drain.stats()["paced"] == before["paced"]:
            assert time.monotonic() < deadline
        create(root, 1_001, 2_000)
        assert drain.stats()["reads"] == before["reads"], "it stays away"
        assert drain.sync(30)
        assert drain.stats()["reads"] == before["reads"] + 1
        got = [n for c in iter(drain.take, None) for n in names(c[0])]
        assert got == [b"f%d" % i for i in range(2_000)]


def test_loss_is_exactly_what_was_not_delivered(twin, group, root):
    count = 20_000
    with running(twin, group, 64 * KIB) as drain:
        create(root, 0, count)
        assert drain.sync(30)
        got, lost = [], []
        for data, _, _, gone in iter(drain.take, None):
            got += names(data)
            lost.append(gone)
        assert 0 < len(got) < count
        assert got == [b"f%d" % i for i in range(len(got))]
        assert [n for n in lost if n] == [count - len(got)], "one loss, told once"
        # the ring is empty: what comes now is stored
        create(root, count, count + 10)
        assert drain.sync(30)
        after = list(iter(drain.take, None))
        assert [n for c in after for n in names(c[0])] == [
            b"f%d" % i for i in range(count, count + 10)
        ]
        assert all(c[3] == 0 for c in after)
        assert drain.stats()["peak_bytes"] <= 64 * KIB


def test_a_loss_says_which_directories_it_hit(twin, group, root):
    mask = CREATE | contract.DELETE | contract.RENAME | contract.DELETE_SELF | contract.ONDIR
    assert libc.fanotify_mark(group, 0x1 | 0x100, mask, AT_FDCWD, root.encode()) == 0
    root = Path(root)
    for name in ("hit", "from/moved", "to", "quiet"):
        (root / name).mkdir(parents=True)
    keys = {p: name_to_handle(root / p)[0] for p in ("hit", "from", "from/moved", "to", "quiet")}
    with running(twin, group, 64 * KIB) as drain:
        for i in range(2_000):
            (root / "hit" / f"f{i}").touch()
        assert drain.sync(30)
        assert drain.stats()["lost"], "the ring is full: what follows is discarded"
        (root / "from/moved").rename(root / "to/moved")
        (root / "to/made").mkdir()
        made = name_to_handle(root / "to/made")[0]
        (root / "to/made").rmdir()
        assert drain.sync(30)
        gaps = [drain.gap() for _, _, _, lost in iter(drain.take, None) if lost]
        names, itself = contract.NOTE_NAMES, contract.NOTE_SELF
        assert gaps == [
            {
                keys["hit"]: names,
                keys["from"]: names,
                keys["to"]: names,
                keys["from/moved"]: itself,
                # Its DELETE_SELF names it as a directory, too.
                made: itself | names,
            }
        ]
        assert drain.gap() is None, "one for each loss"
        # More than are noted: all of them.
        for i in range(contract.NOTED + 2_000):
            (root / f"quiet/d{i}").mkdir()
        assert drain.sync(30)
        assert [drain.gap() for *_, lost in iter(drain.take, None) if lost] == [None]


def test_losses_are_exact_beside_a_slow_consumer(twin, group, root):
    count = 60_000
    with running(twin, group, 128 * KIB) as drain:
        writer = threading.Thread(target=create, args=(root, 0, count))
        writer.start()
        place = losses = 0
        done = False
        while not done:
            done = not writer.is_alive() and drain.sync(30)
            # between two takes the writer goes on, far faster than one chunk a wake-up
            for chunk in [drain.take()] if not done else iter(drain.take, None):
                if chunk is None:
                    readable(drain, 0.05)
                    continue
                place += chunk[3]
                losses += chunk[3]
                for name in names(chunk[0]):
                    assert name == b"f%d" % place
                    place += 1
        writer.join()
        assert place == count
        assert drain.stats()["lost"] == losses


def test_stop_delivers_what_was_queued_before(twin, group, root):
    with running(twin, group) as drain:
        create(root, 0, 30_000)
        drain.stop(drain=True)
        create(root, 30_000, 30_010)
        got = [n for c in iter(drain.take, None) for n in names(c[0])]
        assert got == [b"f%d" % i for i in range(30_000)]


@contextlib.contextmanager
def bounded(twin, group, root, bound, ring=64 * MIB):
    """A drain that is paced for 10 s, so that a stop finds all that is queued from now on."""
    create(root, -300, 0)
    drain = twin(group, ring, 10 * 10**9, stop_records=bound)
    drain.start()
    try:
        assert readable(drain, 10)
        assert sum(len(names(c[0])) for c in iter(drain.take, None)) == 300
        yield drain
    finally:
        drain.close()


def test_a_stop_beyond_its_bound_loses_nothing(twin, group, root):
    with bounded(twin, group, root, 1000) as drain:
        create(root, 0, 30_000)
        drain.stop()
        chunks = list(iter(drain.take, None))
        assert [n for c in chunks for n in names(c[0])] == [b"f%d" % i for i in range(30_000)]
        assert [c[3] for c in chunks if c[3]] == []
        assert chunks[-1][2], "the queue was seen empty"
        assert drain.stats()["lost"] == 0
        create(root, 30_000, 30_001)
        with pytest.raises(BlockingIOError):  # the marks are gone
            os.read(group, 4096)


def test_a_stop_within_its_bound_leaves_the_marks(twin, group, root):
    with bounded(twin, group, root, 1000) as drain:
        create(root, 0, 500)
        drain.stop()
        assert [n for c in iter(drain.take, None) for n in names(c[0])] == [
            b"f%d" % i for i in range(500)
        ]
        create(root, 500, 501)
        assert names(os.read(group, 4096)) == [b"f500"]


def test_a_stop_beyond_its_bound_tells_exactly_what_the_ring_could_not_hold(twin, group, root):
    with bounded(twin, group, root, 1000, 256 * KIB) as drain:
        create(root, 0, 30_000)
        drain.stop()
        chunks = list(iter(drain.take, None))
        got = [n for c in chunks for n in names(c[0])]
        assert got == [b"f%d" % i for i in range(len(got))]
        assert [c[3] for c in chunks if c[3]] == [30_000 - len(got)]
        assert drain.stats()["lost"] == 30_000 - len(got)
        assert chunks[-1][2]


def test_a_drain_that_is_started_and_stopped_at_once_reads_all(twin, group, root):
    create(root, 0, 30_000)
    drain = twin(group, 64 * MIB, stop_records=1000)
    drain.start()
    drain.stop()
    chunks = list(iter(drain.take, None))
    drain.close()
    assert [n for c in chunks for n in names(c[0])] == [b"f%d" % i for i in range(30_000)]
    assert all(c[3] == 0 for c in chunks)


def test_a_stop_ends_beside_a_writer_and_has_all_from_before_it(twin, group, root):
    made, over = [0], threading.Event()

    def write():
        while not over.is_set():
            create(root, made[0], made[0] + 20)
            made[0] += 20

    with bounded(twin, group, root, 100) as drain:
        create(root, 0, 10_000)
        made[0] = 10_000
        writer = threading.Thread(target=write)
        writer.start()
        try:
            before = made[0]
            drain.stop()
        finally:
            over.set()
            writer.join()
        chunks = list(iter(drain.take, None))
        got = [n for c in chunks for n in names(c[0])]
        assert got == [b"f%d" % i for i in range(len(got))]
        assert len(got) >= before
        assert sum(c[3] for c in chunks) == 0


def test_a_drain_started_late_reads_the_backlog(twin, group, root):
    create(root, 0, 50_000)
    with running(twin, group) as drain:
        assert drain.sync(30)
        chunks = list(iter(drain.take, None))
        assert [n for c in chunks for n in names(c[0])] == [b"f%d" % i for i in range(50_000)]
        assert [c[2] for c in chunks] == [False] * (len(chunks) - 1) + [True]
        assert len(chunks) > 1, "more than one read of at most 1 MiB"
        assert max(len(c[0]) for c in chunks) <= MIB


def test_single_events_are_read_at_once(twin, group, root):
    with running(twin, group) as drain:
        for i in range(8):
            create(root, i, i + 1)
            assert readable(drain, 10)
            data, _, drained, lost = drain.take()
            assert names(data) == [b"f%d" % i]
            assert (drained, lost) == (True, 0)
            assert drain.take() is None
        assert drain.stats()["paced"] == 0


def test_the_group_without_its_drain_is_still_the_owner_s(twin, group, root):
    with running(twin, group) as drain:
        assert drain.sync(10)
    create(root, 0, 1)
    assert names(os.read(group, 4096)) == [b"f0"]


EXIT = """
import importlib, os, sys
name, group, root, how = sys.argv[1:]
drain = importlib.import_module(name).Drain(int(group), 1 << 20)
drain.start()
open(os.path.join(root, "x"), "w").close()
assert drain.sync(10)
if how == "exit":
    sys.exit(0)
if how == "cycle":
    drain = [drain]
    drain.append(drain)
if how == "stored":
    sys.drain = drain
"""


@pytest.mark.parametrize("how", ["global", "exit", "cycle", "stored"])
def test_an_interpreter_ends_beside_a_running_drain(name, group, root, how):
    child(EXIT, name, group, root, how)


def test_a_forked_child_forgets_and_closes(twin, group, root):
    with running(twin, group) as drain:
        create(root, 0, 10)
        assert drain.sync(10)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork() beside threads, meant here
            pid = os.fork()
        if pid == 0:
            code = 1
            try:
                drain.forget()
                os.close(group)
                drain.close()
                code = 0
            finally:
                os._exit(code)
        create(root, 10, 20)
        assert os.waitpid(pid, 0)[1] == 0
        create(root, 20, 30)
        assert drain.sync(10)
        got = [n for c in iter(drain.take, None) for n in names(c[0])]
        assert got == [b"f%d" % i for i in range(30)]


MEMORY = """
import importlib, os, sys
name, group, root = sys.argv[1:]
def anon():
    with open("/proc/self/status") as f:
        return int(f.read().partition("RssAnon:")[2].split()[0]) << 10
drain = importlib.import_module(name).Drain(int(group), 4 << 20)
drain.start()
assert drain.sync(10)
directory = os.open(root, os.O_RDONLY)
os.mknod("first", dir_fd=directory)
assert drain.sync(10)
before = anon()
for i in range(200_000):
    os.mknod("f%d" % i, dir_fd=directory)
assert drain.sync(30)
stats = drain.stats()
assert stats["lost"] > 100_000, stats
print(anon() - before)
"""


def test_memory_stays_within_the_ring(name, group, root):
    grown = int(child(MEMORY, name, group, root))
    # the ring, what is read into before it is discarded, and some for the interpreter; the twin
    # reads everything beside its ring (1.25 MiB), and all at once where it comes late
    assert grown < 4 * MIB + (3 if "pure" in name else 2) * MIB
