"""scan_dirs on real filesystems: native and pure list the same, and leave nothing open."""

import ctypes
import errno
import os
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fanwise.kernel import _pure_scan
from fanwise.kernel.contract import LISTED, LISTED_DIR, LISTED_HIDDEN
from fanwise.kernel.handles import name_to_handle
from tests.kernel.conftest import mounted, unmount
from tests.wire.twins import PURE, native_parts

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["native", "pure"])
def scan(request, cannot_run):
    return (PURE if request.param == "pure" else native_parts(cannot_run)).scan_dirs


@pytest.fixture(params=["tmpfs", "ext4"])
def point(request, tmp_path):
    with mounted(request.param, tmp_path) as where:
        yield where


@pytest.fixture
def mount_fd(point):
    fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def key(path):
    return name_to_handle(path)[0]


def other(handle):
    """A handle of nothing: another generation, or number."""
    return handle[:-1] + bytes([handle[-1] ^ 0x80])


def is_leaf(path):
    with os.scandir(path) as entries:
        return not any(entry.is_dir(follow_symlinks=False) for entry in entries)


def listed(path):
    """What a scan of one directory must find."""
    with os.scandir(os.fsencode(path)) as entries:
        return {
            (key(entry.path), key(path), entry.name, is_leaf(entry.path))
            for entry in entries
            if entry.is_dir(follow_symlinks=False)
        }


def open_descriptors():
    return sorted(os.listdir("/proc/self/fd"))


def test_a_nested_tree(scan, point, mount_fd):
    made = []
    for name in (b"a", b"a/b", b"a/b/c", b"d", b"\xff\xfe\n", b"\xff\xfe\n/x", b"n" * 255, b".hid"):
        os.mkdir(os.path.join(os.fsencode(point), name))
        made.append(os.path.join(os.fsencode(point), name))
    (point / "file").touch()
    (point / "link").symlink_to("a")
    os.mkfifo(point / "a" / "fifo")
    before = open_descriptors()
    keys = [key(point), *(key(path) for path in made)]
    found, failed, _ = scan(mount_fd, keys)
    assert failed == []
    assert len(found) == len(set(found))
    assert set(found) == set().union(*(listed(path) for path in (point, *made)))
    assert {child for child, *_ in found} >= set(keys[1:])
    order = [keys.index(parent) for _, parent, *_ in found]
    assert order == sorted(order)
    assert scan(mount_fd, tuple(keys)) == (found, [], [])
    assert scan(mount_fd, []) == ([], [], [])
    assert open_descriptors() == before


def test_many_entries(scan, point, mount_fd):
    # More than fit into one buffer of getdents.
    names = {b"%04d" % i + b"x" * 120 for i in range(1500)}
    for name in names:
        os.mkdir(os.path.join(os.fsencode(point), name))
    for i in range(500):
        (point / f"file{i}").touch()
    found, failed, _ = scan(mount_fd, [key(point)])
    assert failed == []
    assert len(found) == len(listed(point))
    assert set(found) == listed(point)
    assert names <= {name for _, _, name, _ in found}


def test_a_mount_point_is_passed_over(scan, point, mount_fd):
    for name in ("a", "over", "z"):
        (point / name).mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "inner", point / "over"], check=True)
    try:
        found, failed, _ = scan(mount_fd, [key(point)])
    finally:
        unmount(point / "over")
    assert failed == []
    assert {"a", "z"} <= {os.fsdecode(name) for _, _, name, _ in found}
    assert b"over" not in {name for _, _, name, _ in found}
    found, _, _ = scan(mount_fd, [key(point)])
    assert b"over" in {name for _, _, name, _ in found}


def test_what_fails(scan, point, mount_fd):
    (point / "gone").mkdir()
    (point / "there" / "below").mkdir(parents=True)
    (point / "file").touch()
    gone, there, file = key(point / "gone"), key(point / "there"), key(point / "file")
    (point / "gone").rmdir()
    before = open_descriptors()
    made_up = (b"\1\0\0\0", b"\x77\0\0\0" + bytes(8), b"\1\0\0\0" + bytes(128))
    found, failed, _ = scan(mount_fd, [gone, there, file, *made_up])
    assert found == [(key(point / "there" / "below"), there, b"below", True)]
    told = dict(failed)
    assert [k for k, _ in failed] == [gone, file, *made_up]
    assert (told[gone], told[file]) == (errno.ESTALE, errno.ENOTDIR)
    assert all(code in (errno.ESTALE, errno.EINVAL) for code in told.values() if code != told[file])
    assert open_descriptors() == before
    assert scan(-1, [there]) == ([], [(there, errno.EBADF)], [])
    path_fd = os.open(point, os.O_PATH)
    try:
        assert scan(path_fd, [there]) == ([], [(there, errno.EBADF)], [])
    finally:
        os.close(path_fd)
    null = os.open("/proc/self/status", os.O_RDONLY)
    try:
        found, failed, _ = scan(null, [there])
        assert (found, [k for k, _ in failed]) == ([], [there])
    finally:
        os.close(null)


def test_a_leaf_is_only_what_has_no_subdirectory(scan, point, mount_fd):
    (point / "empty").mkdir()
    (point / "files").mkdir()
    (point / "files" / "f").touch()
    (point / "files" / "l").symlink_to("..")
    (point / "dirs" / "d").mkdir(parents=True)
    found, _, _ = scan(mount_fd, [key(point)])
    leaves = {name: leaf for _, _, name, leaf in found if name != b"lost+found"}
    assert leaves == {b"empty": True, b"files": True, b"dirs": False}
    (point / "dirs" / "d").rmdir()
    assert {leaf for *_, leaf in scan(mount_fd, [key(point)])[0]} == {True}


def test_where_links_are_not_counted_nothing_is_a_leaf(scan, tmp_path):
    with mounted("btrfs", tmp_path) as point:
        (point / "empty").mkdir()
        fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
        try:
            assert [found[2:] for found in scan(fd, [key(point)])[0]] == [(b"empty", False)]
        finally:
            os.close(fd)


@pytest.mark.parametrize("bad", [b"", b"abc", bytes(133), bytes(1000)])
def test_what_is_no_key(scan, point, mount_fd, bad):
    with pytest.raises(ValueError, match="not a handle key"):
        scan(mount_fd, [key(point), bad])


def test_failures_are_the_same_in_both(cannot_run, point, mount_fd):
    keys = [bytes([kind, 0, 0, 0]) + bytes([fill] * size)
            for kind in (0, 1, 2, 0x4D, 0x81, 0xFF) for fill in (0, 1, 255)
            for size in (0, 1, 8, 12, 20, 128)]  # fmt: skip
    assert native_parts(cannot_run).scan_dirs(mount_fd, keys) == PURE.scan_dirs(mount_fd, keys)


def test_access_times_stay(scan, tmp_path):
    with mounted("tmpfs", tmp_path) as point:
        subprocess.run(["mount", "-o", "remount,strictatime", point], check=True)
        (point / "a").mkdir()
        fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.utime(point, (1, 2))
            scan(fd, [key(point)])
            assert os.stat(point).st_atime == 1
            os.listdir(point)
            assert os.stat(point).st_atime != 1  # a plain listing shows
        finally:
            os.close(fd)


def test_a_directory_that_changes_meanwhile(scan, point, mount_fd, monkeypatch):
    for i in range(50):
        (point / f"d{i}").mkdir()
    if scan is PURE.scan_dirs:  # after its name was read, and after its handle was
        real = _pure_scan.name_to_handle

        def racing(name, fd, **more):
            if name == b"d7":
                (point / "d7").rmdir()
            told = real(name, fd, **more)
            if name == b"d9":
                (point / "d9").rmdir()
            return told

        monkeypatch.setattr(_pure_scan, "name_to_handle", racing)
        found, failed, _ = scan(mount_fd, [key(point)])
        assert failed == []
        assert {b"d%d" % i for i in range(50)} - {name for _, _, name, _ in found} == {b"d7", b"d9"}
        return
    # The native one without a hook: another process makes and removes, and it only has to be sane.
    child = subprocess.Popen(
        [sys.executable, "-c", "import os, sys\nos.chdir(sys.argv[1])\n"
         "while True:\n for i in range(50): os.rmdir(f'd{i}'); os.mkdir(f'd{i}')\n", point]
    )  # fmt: skip
    try:
        for _ in range(300):
            found, failed, _ = scan(mount_fd, [key(point)])
            assert failed == []
            assert {parent for _, parent, *_ in found} == {key(point)}
    finally:
        child.kill()
        child.wait()


REFUSED = """
import ctypes, os, struct, sys
from tests.kernel import refusals
from fanwise.kernel import handles, native
scan = native.parts(pure=sys.argv[2] == "pure").scan_dirs
fd = os.open(sys.argv[1], os.O_RDONLY)
key = handles.name_to_handle(sys.argv[1])[0]
exec(sys.argv[3])
print(scan(fd, [key]) == ([], [(key, int(sys.argv[4]))], []))
"""


@pytest.mark.parametrize("which", ["native", "pure"])
@pytest.mark.parametrize(
    ("how", "code"),
    [("refusals.drop(refusals.CAP_DAC_READ_SEARCH)", errno.EPERM),
     ("refusals.install_filter(['open_by_handle_at'], 38)", errno.ENOSYS),
     ("refusals.install_filter(['open_by_handle_at'], 1)", errno.EPERM),
     ("refusals.install_filter(['name_to_handle_at'], 38)", errno.ENOSYS)],
)  # fmt: skip
def test_refusals_are_failures_of_each_directory(cannot_run, tmp_path, which, how, code):
    native_parts(cannot_run)
    with mounted("tmpfs", tmp_path) as point:
        (point / "a").mkdir()
        done = subprocess.run(
            [sys.executable, "-c", REFUSED, point, which, how, str(code)],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert (done.stdout, done.stderr) == ("True\n", "")


def test_names(scan, point, mount_fd):
    """All names of a directory, of whatever kind; a directory's ends with a slash."""
    (point / "dir").mkdir()
    (point / "empty").mkdir()
    (point / "file").touch()
    (point / "link").symlink_to("dir")
    os.mkfifo(point / "fifo")
    odd = os.fsencode(point) + b"/\xff\n"
    os.close(os.open(odd, os.O_CREAT | os.O_WRONLY))
    gone = other(key(point / "dir"))
    keys = [key(point), gone, key(point / "empty")]
    found, failed, lists = scan(mount_fd, keys, True)
    assert {name for _, _, name, _ in found} - {b"lost+found"} == {b"dir", b"empty"}
    assert [k for k, _ in failed] == [gone]
    assert [k for k, _ in lists] == [keys[0], keys[2]]
    names = lists[0][1].split(b"\0")
    assert names.pop() == b""
    assert set(names) - {b"lost+found/"} == {
        b"dir/", b"empty/", b"file", b"link", b"fifo", b"\xff\n"
    }  # fmt: skip
    assert lists[1][1] == b""


HEAD = struct.calcsize(LISTED)


def unpacked(listing):
    """name -> (identity, size, mtime, ctime, flags)"""
    out, at = {}, 0
    while at < len(listing):
        *data, length, padding = struct.unpack_from(LISTED, listing, at)
        name = listing[at + HEAD : at + HEAD + length]
        assert (len(name), padding, name in out) == (length, 0, False)
        out[name] = tuple(data)
        at += HEAD + length
    return out


def born(path):
    """The birth time in ns; Python does not tell it."""
    run = ["stat", "-c", "%.9W", path]
    seconds, _, ns = subprocess.run(run, capture_output=True, check=True).stdout.partition(b".")
    return int(seconds) * 10**9 + int(ns)


def identity(path):
    return os.lstat(path).st_ino ^ born(path) * 0x9E3779B97F4A7C15 % 2**64


def seen(path, identities=True):
    """What a listing must say of a directory."""
    with os.scandir(os.fsencode(path)) as entries:
        found = {entry.name: (entry.path, entry.stat(follow_symlinks=False)) for entry in entries}
    return {
        name: (identity(where) if identities else 0,
               s.st_size, s.st_mtime_ns, s.st_ctime_ns, int(stat.S_ISDIR(s.st_mode)))
        for name, (where, s) in found.items()
    }  # fmt: skip


def test_entries(scan, point, mount_fd):
    """Each name with its own inode, size and times; of a symbolic link those of the link."""
    (point / "dir" / "sub").mkdir(parents=True)
    (point / "empty").mkdir()
    (point / "file").write_bytes(b"x" * 4321)
    os.truncate(point / "file", 1 << 40)
    os.utime(point / "file", ns=(1, 1_234_567_890_123_456_789))
    (point / "old").touch()
    os.utime(point / "old", ns=(0, -1_500_000_000))
    os.link(point / "file", point / "hard")
    (point / "link").symlink_to("dir")
    (point / "dangling").symlink_to("nowhere")
    os.mkfifo(point / "fifo")
    os.close(os.open(os.fsencode(point) + b"/\xff\n", os.O_CREAT | os.O_WRONLY))
    os.close(os.open(os.fsencode(point) + b"/" + b"n" * 255, os.O_CREAT | os.O_WRONLY))
    gone = other(key(point / "dir"))
    keys = [key(point), gone, key(point / "empty"), key(point / "dir")]
    found, failed, lists = scan(mount_fd, keys, 2)
    plain = scan(mount_fd, keys)
    assert (found, failed) == plain[:2]
    assert [k for k, _ in lists] == [keys[0], keys[2], keys[3]]
    assert [unpacked(listing) for _, listing in lists] == [
        seen(point), {}, seen(point / "dir")
    ]  # fmt: skip


def test_entries_of_a_large_directory(scan, point, mount_fd):
    for number in range(3_000):
        (point / f"{number:04d}{'x' * 100}").touch()
    _, _, lists = scan(mount_fd, [key(point)], 2)
    told = unpacked(lists[0][1])
    assert {name: (0, *data[1:]) for name, data in told.items()} == seen(point, False)
    assert len({data[0] for data in told.values()}) == len(told)


def test_another_file_in_place_of_one_has_another_identity(scan, point, mount_fd):
    """Also where the filesystem gives it the same inode (ext4)."""

    def look():
        return unpacked(scan(mount_fd, [key(point)], 2)[2][0][1])

    for make, drop in ((Path.touch, Path.unlink), (Path.mkdir, Path.rmdir)):
        make(point / "name")
        one = look()
        assert look() == one
        os.chmod(point / "name", 0o700)
        os.rename(point / "name", point / "name2")
        assert look()[b"name2"][0] == one[b"name"][0]
        drop(point / "name2")
        make(point / "name")
        assert look()[b"name"][0] != one[b"name"][0]
        drop(point / "name")


def test_times_beyond_the_range_are_those_of_its_ends(scan, tmp_path):
    with mounted("tmpfs", tmp_path) as point:
        (point / "late").touch()
        (point / "early").touch()
        os.utime(point / "late", (0, 2**62))
        os.utime(point / "early", (0, -(2**62)))
        fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
        try:
            told = unpacked(scan(fd, [key(point)], 2)[2][0][1])
        finally:
            os.close(fd)
    assert (told[b"early"][2], told[b"late"][2]) == (-(2**63), 2**63 - 1)


def test_what_a_mount_lies_over_is_hidden(scan, point, mount_fd):
    for name in ("over", "plain"):
        (point / name).mkdir()
    for name in ("file", "same"):
        (point / name).write_text(name)
    before = seen(point)
    over = [("-t", "tmpfs", "inner"), ("--bind", "/etc/hostname"), ("--bind", point / "plain")]
    where = [point / "over", point / "file", point / "plain"]
    done = []
    try:
        for how, at in zip(over, where, strict=True):
            subprocess.run(["mount", *how, at], check=True)
            done.append(at)
        found, _, lists = scan(mount_fd, [key(point)], 2)
    finally:
        for at in done:
            unmount(at)
    hidden = {
        b"over": (0, 0, 0, 0, LISTED_HIDDEN | LISTED_DIR),
        b"plain": (0, 0, 0, 0, LISTED_HIDDEN | LISTED_DIR),
        b"file": (0, 0, 0, 0, LISTED_HIDDEN),
    }
    assert unpacked(lists[0][1]) == before | hidden
    assert {name for _, _, name, _ in found} <= {b"lost+found"}


REFUSED_LOOK = """
import os, sys
from tests.kernel import refusals
from fanwise.kernel import handles, native
scan = native.parts(pure=sys.argv[2] == "pure").scan_dirs
fd = os.open(sys.argv[1], os.O_RDONLY)
key = handles.name_to_handle(sys.argv[1])[0]
refusals.NUMBERS["statx"] = {"x86_64": 332, "aarch64": 291}[os.uname().machine]
refusals.install_filter(["statx"], int(sys.argv[3]))
print(scan(fd, [key], 2)[2][0][1].hex())
"""


@pytest.mark.parametrize("which", ["native", "pure"])
@pytest.mark.parametrize(
    ("code", "there"),
    [(errno.EACCES, True), (errno.EIO, True), (errno.ENOENT, False), (errno.ESTALE, False)],
)
def test_what_cannot_be_looked_at_is_no_deletion(cannot_run, tmp_path, which, code, there):
    native_parts(cannot_run)
    with mounted("tmpfs", tmp_path) as point:
        (point / "d").mkdir()
        (point / "f").touch()
        done = subprocess.run(
            [sys.executable, "-c", REFUSED_LOOK, point, which, str(code)],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
    assert done.stderr == ""
    hidden = {b"d": (0, 0, 0, 0, LISTED_HIDDEN | LISTED_DIR), b"f": (0, 0, 0, 0, LISTED_HIDDEN)}
    assert unpacked(bytes.fromhex(done.stdout)) == (hidden if there else {})


def test_entries_are_the_same_in_both(cannot_run, point, mount_fd):
    for number in range(50):
        (point / f"d{number % 7}" / f"e{number}").mkdir(parents=True)
        (point / f"d{number % 5}" / f"f{number}").write_bytes(bytes(number))
    keys = [key(point), *(key(point / f"d{number}") for number in range(7))]
    assert native_parts(cannot_run).scan_dirs(mount_fd, keys, 2) == PURE.scan_dirs(
        mount_fd, keys, 2
    )


@pytest.mark.parametrize("names", [-1, 3])
def test_what_is_no_kind_of_listing(scan, point, mount_fd, names):
    with pytest.raises(ValueError, match="names: 0, 1 or 2"):
        scan(mount_fd, [key(point)], names)


def test_the_lock_is_free_meanwhile(cannot_run, point, mount_fd):
    # With the interpreter lock held, no other thread would get to run during the call.
    for i in range(300):
        (point / f"d{i}").mkdir()
    scan, keys = native_parts(cannot_run).scan_dirs, [key(point)] * 200
    ticks, stop = [], threading.Event()
    interval, deadline = sys.getswitchinterval(), time.monotonic() + 60

    def tick():
        while not stop.wait(0.001):
            ticks.append(1)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        sys.setswitchinterval(1000)  # only who waits gives it away
        lib = ctypes.pythonapi  # keeps the lock: the ticks while it sleeps are none
        ticks.clear()
        lib.usleep(20_000)
        assert not ticks
        while not ticks:
            assert time.monotonic() < deadline
            scan(mount_fd, keys)
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
