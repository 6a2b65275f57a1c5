import ctypes
import os
import subprocess
import sys

import pytest

from fanwise._errors import NoSuchRoot
from fanwise.kernel import mounts
from fanwise.kernel.libc import libc
from tests.kernel.conftest import unmount


@pytest.fixture
def tmpfs(tmp_path):
    point = tmp_path / "a b"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "one two", point], check=True)
    try:
        yield point
    finally:
        # All that lie on each other, and lazily: a failed test must not keep them.
        while point.is_mount():
            subprocess.run(["umount", "-l", point], check=True)


def test_a_new_mount_is_seen(tmpfs):
    (found,) = [m for m in mounts.mounts() if m.mount_point == os.fsencode(tmpfs)]
    assert (found.fstype, found.source, found.root) == ("tmpfs", b"one two", b"/")
    assert mounts.mount_of(tmpfs) == found
    assert mounts.can_statmount()
    assert found.unique_id is not None
    told = mounts.statmount(found.unique_id)
    assert (told.id, told.parent_id, told.dev) == (found.id, found.parent_id, found.dev)
    assert (told.root, told.mount_point, told.fstype) == (
        found.root,
        found.mount_point,
        found.fstype,
    )
    assert told.source == found.source
    assert found.unique_id in mounts.listmount()


def test_under_mounts_that_cover_each_other_the_one_passed_through(tmpfs):
    below = mounts.mount_of(tmpfs)
    fd = os.open(tmpfs, os.O_RDONLY)
    try:
        subprocess.run(["mount", "-t", "tmpfs", "above", tmpfs], check=True)
        above = mounts.mount_of(tmpfs)
        assert (above.source, above.mount_point) == (b"above", below.mount_point)
        assert mounts.mount_of(fd) == below
    finally:
        os.close(fd)


def test_an_empty_source_of_the_kernel(tmpfs):
    inner = tmpfs / "x"
    inner.mkdir()
    assert libc.mount(b"", os.fsencode(inner), b"tmpfs", 0, None) == 0
    assert mounts.mount_of(inner).source == b""


def test_a_unique_id_is_not_reused_where_the_id_is(tmpfs):
    inner = tmpfs / "x"
    inner.mkdir()
    seen = []
    for _ in range(2):
        subprocess.run(["mount", "-t", "tmpfs", "t", inner], check=True)
        seen.append(mounts.mount_of(inner))
        unmount(inner)
    assert seen[0].unique_id != seen[1].unique_id
    with pytest.raises(FileNotFoundError):
        mounts.statmount(seen[0].unique_id)


def test_a_mount_that_goes_while_mounts_are_listed(monkeypatch):
    listed = [*mounts.listmount(), 2**62]  # an id that no mount has
    monkeypatch.setattr(mounts, "listmount", lambda: listed)
    (proc,) = [mount for mount in mounts.mounts() if mount.mount_point == b"/proc"]
    assert proc.unique_id


def test_where_statx_does_not_tell_the_mount(tmpfs, monkeypatch):
    told = mounts.mount_of(tmpfs)
    monkeypatch.setattr(mounts, "_statx_mount_id", lambda fd, which: None)
    assert mounts.mount_of(tmpfs) == told._replace(unique_id=None)


def test_more_mounts_than_one_call_lists(tmpfs, monkeypatch):
    monkeypatch.setattr(mounts, "_LIST_AT_ONCE", 3)
    ids = mounts.listmount()
    assert len(ids) == len(set(ids)) > 3
    assert mounts.mount_of(tmpfs).unique_id in ids


def test_strings_longer_than_the_first_buffer(tmpfs):
    inner = tmpfs
    for _ in range(8):
        inner = inner / ("n" * 200)
    inner.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "t", inner], check=True)
    found = mounts.mount_of(inner)
    assert mounts.statmount(found.unique_id).mount_point == os.fsencode(inner)


# In a mount namespace of its own: others mount and unmount meanwhile.
WAITING = """
import select, subprocess, sys
from fanwise.kernel import mounts
fd = mounts.open_mountinfo()
poll = select.poll()
poll.register(fd, select.POLLPRI)
assert poll.poll(0) == []
subprocess.run(["mount", "-t", "tmpfs", "t", sys.argv[1]], check=True)
assert poll.poll(20_000)
assert poll.poll(0) == []
subprocess.run(["umount", sys.argv[1]], check=True)
assert poll.poll(20_000)
"""


def test_waiting_for_changes(tmpfs):
    argv = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", WAITING, tmpfs]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_detached_mount_is_not_visible():
    fsopen, fsconfig, fsmount = 430, 431, 432
    config = libc.syscall(ctypes.c_long(fsopen), b"tmpfs", 1)
    assert config >= 0
    try:
        create = libc.syscall(ctypes.c_long(fsconfig), config, 6, None, None, 0)
        assert create == 0
        fd = libc.syscall(ctypes.c_long(fsmount), config, 1, 0)
        assert fd >= 0
        try:
            with pytest.raises(NoSuchRoot, match="detached"):
                mounts.mount_of(fd)
        finally:
            os.close(fd)
    finally:
        os.close(config)
