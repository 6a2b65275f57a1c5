"""Vfs against Linux: who is told of a write-back error, on a device that really fails."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from vfs_twin import Linux, failed

from fanwise.vfs import Disk, Vfs, finish
from tests.kernel.faults import volume

PAGES = 4
SIZE = PAGES * 4096


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    with volume("ext4", tmp_path_factory.mktemp("errors"), faulty=True) as it:
        yield it


class Both:
    """One file, on a device that can be broken for its content."""

    def __init__(self, disk, number):
        self.disk = disk
        self.path = f"/f{number}"
        self.linux = Linux(disk.point)
        file = disk.point / self.path[1:]
        file.write_bytes(b"x" * SIZE)
        subprocess.run(["sync", "-f", disk.point], check=True)
        self.extent = extent(file)
        self.vfs = Vfs()
        self.sb = self.vfs.superblock("fs", Disk({self.path[1:]: b"x" * SIZE}))
        self.vfs.mount_root(self.sb)
        self.files = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.disk.faults.clear()
        fd = os.open(self.disk.point, os.O_RDONLY)
        try:
            for _ in range(2):  # the next file begins with a filesystem that has told its error
                self._try(lambda: self.linux.syncfs(fd))
        finally:
            os.close(fd)
            for opened in self.linux.opened:
                os.close(opened)

    def fail(self, broken):
        self.disk.faults.clear()
        if broken:
            self.disk.faults.fail("write", errno.EIO, *self.extent)
        self.sb.disk.write_error = errno.EIO if broken else 0

    def open(self):
        fd = self.linux.open(self.path, os.O_RDWR)
        self.files.append((fd, finish(self.vfs.open(self.path, os.O_RDWR))))

    def close(self, at):
        fd, file = self.files.pop(at)
        self.linux.close(fd)
        finish(self.vfs.close(file))

    def drop_caches(self):
        # Its own pages first, because an inode that has some stays.
        fd = os.open(f"{self.linux.root}{self.path}", os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        Path("/proc/sys/vm/drop_caches").write_text("2")
        finish(self.vfs.drop_caches(self.sb))

    def do(self, name, at, *args):
        fd, file = self.files[at]
        real = self._try(lambda: getattr(self.linux, name)(fd, *args))
        model = self._try(lambda: finish(getattr(self.vfs, name)(file, *args)))
        assert real == model, f"{name} on {at}: Linux {real}, vfs {model}"
        return real

    def _try(self, call):
        try:
            return "ok", call()
        except OSError as error:
            return failed(error.errno)


def extent(path):
    """Where a file's content is on the device, in bytes."""
    text = subprocess.run(
        ["filefrag", "-b512", "-v", path], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"^\s*\d+:\s+\d+\.\.\s*\d+:\s+(\d+)\.\.\s*(\d+):", text, re.M)
    assert len(found) == 1, text
    return int(found[0][0]) * 512, (int(found[0][1]) + 1) * 512


numbers = iter(range(1 << 30))
STEPS = st.one_of(
    st.just(("open",)),
    st.tuples(st.just("fail"), st.booleans()),
    st.tuples(st.just("write"), st.integers(0, 3), st.integers(0, PAGES - 1)),
    st.tuples(st.sampled_from(["fsync", "fsync", "syncfs"]), st.integers(0, 3)),
    st.tuples(st.just("close"), st.integers(0, 3)),
)


@settings(
    max_examples=int(os.environ.get("VFS_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(steps=st.lists(STEPS, min_size=5, max_size=40))
def test_who_is_told_of_an_error(disk, steps):
    with Both(disk, next(numbers)) as both:
        both.open()
        both.fail(True)
        both.do("write", 0, b"y" * 10, 0)
        for name, *args in steps:
            if name == "fail":
                both.fail(*args)
            elif name == "open":
                if len(both.files) < 4:
                    both.open()
            elif args[0] < len(both.files):
                if name == "close":
                    both.close(args[0])
                elif name == "write":
                    both.do(name, args[0], b"z" * 10, args[1] * 4096)
                else:
                    both.do(name, args[0])
        for at in range(len(both.files)):
            both.do("fsync", at)
            both.do("syncfs", at)


def test_each_opener_is_told_once_and_late_ones_if_nobody_was(disk):
    with Both(disk, next(numbers)) as both:
        both.open()
        both.open()
        both.fail(True)
        both.do("write", 0, b"y" * 10, 0)
        assert both.do("syncfs", 0) == "EIO"
        both.fail(False)
        both.open()  # nobody has asked for this file's errors
        for at in (2, 0, 1):
            assert [both.do("fsync", at) for _ in range(2)] == ["EIO", ("ok", None)]
        both.open()
        assert both.do("fsync", 3) == ("ok", None)
        assert both.do("syncfs", 1) == "EIO"
        assert both.do("syncfs", 2) == ("ok", None)


def test_an_error_is_lost_with_the_inode_and_kept_by_the_filesystem(disk):
    with Both(disk, next(numbers)) as both:
        both.open()
        both.fail(True)
        both.do("write", 0, b"y" * 10, 0)
        subprocess.run(["sync", "-f", disk.point], capture_output=True)
        finish(both.vfs.sync_filesystem(both.sb))
        both.close(0)
        both.fail(False)
        both.drop_caches()
        both.open()
        assert both.do("read", 0, 3, 0) == ("ok", b"xxx")  # what was written is gone
        assert both.do("fsync", 0) == ("ok", None)
        assert both.sb.wb_err
