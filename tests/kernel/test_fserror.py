"""FS_ERROR from real filesystems: what arrives, whose it is, how it adds up, what is lost."""

import errno
import os
import select
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from fanwise._errors import LifetimeError
from fanwise.kernel.mounts import mounts
from fanwise.sources.counters import place_of, read as read_counters
from fanwise.sources.fserror import FsErrorReport, FsErrors
from tests.kernel.conftest import unmount
from tests.kernel.faults import code_of, counted, volume

SMALL = {"size": 16 << 20, "mkfs": ("-O", "^has_journal")}
UUID = "6a1f0c52-0d6b-4c1e-9f5e-2d1c0f8e7b33"
COPY = {"size": 16 << 20, "mkfs": ("-O", "^has_journal", "-U", UUID)}


@pytest.fixture
def source():
    with FsErrors() as it:
        yield it


def ours(*volumes):
    """The mounts of these volumes: other tests' filesystems are not marked."""
    points = {os.fsencode(v.point) for v in volumes}
    return [m for m in mounts() if m.mount_point in points]


def told(source, expected=1, within=60.0):
    """Reports until their counts add up to a number, and a moment longer."""
    found, deadline = [], time.monotonic() + within
    while True:
        found += source.read()
        total = sum(r.count for r in found if isinstance(r, FsErrorReport))
        if total >= expected:
            return found + source.read()
        assert time.monotonic() < deadline, found
        select.select([source], [], [], 0.1)


def superblock(it, errors):
    """Its counters, when they have so many."""
    counted(it, errors)
    return read_counters(place_of(it.entry())).ext4


def test_an_error_without_an_object(source, tmp_path):
    with volume("ext4", tmp_path, **SMALL) as it:
        source.follow(ours(it))
        assert source.followed() == {it.dev}
        assert source.status().state == "up"
        it.trigger()
        (report,) = told(source)
        assert (report.dev, report.errno, report.count) == (it.dev, errno.EUCLEAN, 1)
        assert (report.key, report.ino) == (None, None)
        assert report.process.pid == os.getpid()
        assert report.process.comm == Path("/proc/self/comm").read_text().strip()
        counters = superblock(it, 1)
        assert (counters.errors, counters.last.function) == (1, "trigger_test_error")


def test_an_error_on_an_inode_names_it(source, tmp_path):
    with volume(
        "ext4", tmp_path, **SMALL, prepare=lambda at: (at / "f").write_text("x" * 9000)
    ) as it:
        ino = (it.point / "f").stat().st_ino
        with it.unmounted():
            it.debugfs("sif /f block[0] 0x1111")
        source.follow(ours(it))
        for _ in range(3):
            assert code_of((it.point / "f").stat) == "EUCLEAN"
        (report,) = told(source, 3)
        assert (report.errno, report.count, report.ino) == (errno.EUCLEAN, 3, ino)
        assert report.generation
        assert superblock(it, 3).first.ino == ino


def test_2000_errors_of_one_process_are_one_report(source, tmp_path):
    with volume("ext4", tmp_path, **SMALL) as it:
        source.follow(ours(it))
        for _ in range(2000):
            it.trigger()
        found = told(source, 2000)
        assert [r.count for r in found] == [2000]
        assert superblock(it, 2000).errors == 2000


def test_300_processes_are_300_reports(source, tmp_path):
    with volume("ext4", tmp_path, **SMALL) as it:
        source.follow(ours(it))
        trigger = f"/sys/fs/ext4/{it.name}/trigger_fs_error"
        subprocess.run(
            [
                "sh",
                "-c",
                f"i=0; while [ $i -lt 300 ]; do sh -c 'echo x >{trigger}'; i=$((i+1)); done",
            ],
            check=True,
        )
        found = told(source, 300)
        assert len(found) == 300
        assert sum(r.count for r in found) == superblock(it, 300).errors == 300


def test_40_filesystems(source, tmp_path):
    with ExitStack() as stack:
        volumes = [
            stack.enter_context(
                volume("ext4", tmp_path / str(n), size=2 << 20, mkfs=("-O", "^has_journal"))
            )
            for n in range(40)
        ]
        source.follow(ours(*volumes))
        assert source.followed() == {v.dev for v in volumes}
        for turn in range(3):
            for n, it in enumerate(volumes):
                if turn < 2 or n % 2:
                    it.trigger()
        expected = {v.dev: 2 + n % 2 for n, v in enumerate(volumes)}
        counts = dict.fromkeys(expected, 0)
        for report in told(source, sum(expected.values())):
            counts[report.dev] += report.count
        assert counts == expected
        assert counts == {v.dev: superblock(v, expected[v.dev]).errors for v in volumes}


def test_two_filesystems_with_one_uuid_count_apart(source, tmp_path):
    with volume("ext4", tmp_path / "a", **COPY) as a, volume("ext4", tmp_path / "b", **COPY) as b:
        assert os.statvfs(a.point).f_fsid == os.statvfs(b.point).f_fsid
        source.follow(ours(a, b))
        for _ in range(3):
            a.trigger()
        for _ in range(2):
            b.trigger()
        assert {(r.dev, r.count) for r in told(source, 5)} == {(a.dev, 3), (b.dev, 2)}


def test_a_report_outlives_its_filesystem_and_the_next_mount_is_marked(source, tmp_path):
    with volume("ext4", tmp_path, **SMALL) as it:
        source.follow(ours(it))
        it.trigger()
        with it.unmounted():
            source.follow(ours(it))
            assert source.followed() == set()
        (report,) = told(source)
        assert report.dev == it.dev
        source.follow(ours(it))
        it.trigger()
        assert [r.dev for r in told(source)] == [it.dev]


def test_a_pending_report_stays_its_filesystems_when_a_copy_takes_the_fsid(source, tmp_path):
    with volume("ext4", tmp_path / "a", **COPY) as a, volume("ext4", tmp_path / "b", **COPY) as b:
        source.follow(ours(a))
        a.trigger()
        a.unmount()
        source.follow(ours(b))
        b.trigger()
        b.trigger()
        assert [(r.dev, r.count) for r in told(source, 3)] == [(a.dev, 1), (b.dev, 2)]


def test_what_is_covered_is_marked_by_another_way(source, tmp_path):
    with volume("ext4", tmp_path, **SMALL) as it, volume("xfs", tmp_path / "x") as other:
        second = tmp_path / "second"
        second.mkdir()
        subprocess.run(["mount", "--bind", it.point, second], check=True)
        try:
            subprocess.run(["mount", other.device, it.point], check=True)
            try:
                points = {os.fsencode(it.point), os.fsencode(second)}
                found = [m for m in mounts() if m.mount_point in points and m.dev == it.dev]
                assert len(found) == 2
                source.follow(found[:1])
                assert source.followed() == set()
                assert "covers" in source.status().reason
                source.follow(found)
                assert source.followed() == {it.dev}
                assert source.status().state == "up"
            finally:
                unmount(it.point)
        finally:
            unmount(second)


def test_what_is_followed_can_be_unmounted(source, tmp_path):
    with volume("ext4", tmp_path, **SMALL) as it:
        source.follow(ours(it))
        it.unmount()
        assert source.followed() == set()
        it.mount()


def test_a_filesystem_without_an_fsid_is_told(source, tmp_path):
    # ext4 folds its UUID in two halves; these are equal, so nothing is left.
    mkfs = ("-O", "^has_journal", "-U", "01234567-89ab-cdef-0123-456789abcdef")
    with volume("ext4", tmp_path, size=16 << 20, mkfs=mkfs) as it:
        source.follow(ours(it))
        assert source.followed() == set()
        assert source.status().state == "degraded"
        assert "no filesystem id" in source.status().reason


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_the_mark_is_accepted_where_nothing_comes_yet(source, tmp_path, kind):
    with volume(kind, tmp_path) as it:
        source.follow(ours(it))
        assert source.followed() == {it.entry().dev}
        assert source.status().state == "up"


def test_a_shutdown_is_no_event_on_this_kernel_and_an_abort_is(source, tmp_path):
    with volume("ext4", tmp_path, size=16 << 20) as it:
        source.follow(ours(it))
        it.abort()
        assert [(r.errno, r.ino) for r in told(source)] == [(errno.ESHUTDOWN, None)]


def test_errors_before_the_mark_are_in_the_counters(source, tmp_path):
    with volume("ext4", tmp_path, **SMALL) as it:
        it.trigger()
        with it.unmounted():
            pass
        source.follow(ours(it))
        assert source.read() == []
        assert superblock(it, 1).errors == 1


def test_closed(tmp_path):
    source = FsErrors()
    source.close()
    with pytest.raises(LifetimeError):
        source.read()
    with FsErrors() as source:
        pass
    assert source.status().state == "down"
    source.close()


def test_a_forked_child_keeps_nothing(source):
    fd = source._groups[0].fd
    child = os.fork()
    if not child:
        closed = source.status().state == "down" and not os.path.exists(f"/proc/self/fd/{fd}")
        os._exit(0 if closed else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert source.status().state == "up"
