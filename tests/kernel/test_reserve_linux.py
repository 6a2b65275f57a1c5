"""The reserve against Linux: count, first errno and first object of errors that really happen."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fanwise.kernel import fanotify as fan
from fanwise.kernel.handles import name_to_handle
from fanwise.kernel.records import decode
from fanwise.notify import mask as m
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.mark import FILESYSTEM, INODE, SUBTREE, On
from fanwise.sources.events import to_events
from tests.kernel.conftest import loop_device, run, unmount

INIT = fan.FAN_CLASS_NOTIF | fan.FAN_CLOEXEC | fan.FAN_NONBLOCK | fan.FAN_REPORT_FID
FS = "the filesystem under test"


class Broken:
    """An ext4 with a broken directory; two kernel groups on it, and ours, fed by the first."""

    def __init__(self, point: Path, device: str) -> None:
        self.point, self.name = point, os.path.basename(device)
        self.fed, self.kernel = fan.init(INIT), fan.init(INIT)
        for fd in (self.fed, self.kernel):
            fan.mark(fd, fan.FAN_MARK_ADD | fan.FAN_MARK_FILESYSTEM, fan.FAN_FS_ERROR, path=point)
        self.core = Fsnotify()
        self.group = self.core.group()

    def close(self) -> None:
        os.close(self.fed)
        os.close(self.kernel)

    def read(self, fd: int):
        found = []
        with contextlib.suppress(BlockingIOError):
            while data := os.read(fd, 1 << 16):
                found += list(to_events(decode(data), FS, lambda key: ()))
        return found

    def feed(self) -> None:
        self.core.send(self.read(self.fed))

    def trigger(self) -> None:
        Path(f"/sys/fs/ext4/{self.name}/trigger_fs_error").write_text("fanwise-test")
        self.feed()

    def trip(self) -> None:
        """Over the inode of ``bad``."""
        with pytest.raises(OSError, match=r"bad"):
            os.stat(self.point / "top/bad")
        self.feed()


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[Broken]:
    image, point = tmp_path / "ext4.img", tmp_path / "mnt"
    point.mkdir()
    with open(image, "wb") as file:
        file.truncate(32 << 20)
    run("mkfs.ext4", "-q", "-F", str(image))
    with loop_device(image) as device:
        run("mount", device, str(point))
        try:
            (point / "top").mkdir()
            (point / "top/bad").write_text("x")
            key = name_to_handle(point / "top/bad")[0]
            top = name_to_handle(point / "top")[0]
            unmount(point)
            run("debugfs", "-w", "-R", "set_inode_field /top/bad mode 0", str(image))
            run("blockdev", "--flushbufs", device)
            run("mount", device, str(point))
            disk = Broken(point, device)
            disk.key, disk.top = key, top
            try:
                yield disk
            finally:
                disk.close()
        finally:
            if os.path.ismount(point):
                unmount(point)


def told(events):
    return [(e.error, e.count, e.key) for e in events]


@pytest.mark.parametrize("first", ["trigger", "trip"])
def test_count_and_the_first_error_are_as_in_linux(broken, first):
    broken.group.add(On(FILESYSTEM, FS), m.FS_ERROR)
    second = "trip" if first == "trigger" else "trigger"
    for name in (first, second, first, second, second):
        getattr(broken, name)()
    ours, kernel = broken.group.read(), broken.read(broken.kernel)
    assert told(ours) == told(kernel)
    assert len(ours) == 1
    assert ours[0].count == 5
    assert ours[0].pid == kernel[0].pid == os.getpid()
    assert (ours[0].key is None) == (first == "trigger")


def test_errors_of_several_processes_are_one_here(broken):
    """Linux gives one event a process: its key has the pid."""
    broken.group.add(On(FILESYSTEM, FS), m.FS_ERROR)
    where = f"/sys/fs/ext4/{broken.name}/trigger_fs_error"
    for _ in range(3):
        code = f"open({where!r}, 'w').write('fanwise-test')"
        subprocess.run([sys.executable, "-IS", "-c", code], check=True)
    broken.feed()
    ours, kernel = broken.group.read(), broken.read(broken.kernel)
    assert [e.count for e in kernel] == [1, 1, 1]
    assert [(e.count, e.pid) for e in ours] == [(3, kernel[0].pid)]


def test_a_queue_full_of_other_events_loses_errors_in_linux_and_none_here(broken):
    limit = int(Path("/proc/sys/fs/fanotify/max_queued_events").read_text())
    group = broken.core.group(queue_limit=limit)
    group.add(On(FILESYSTEM, FS), m.FS_ERROR | m.CREATE)
    shared = fan.init(INIT | fan.FAN_REPORT_DIR_FID | fan.FAN_REPORT_NAME)
    both = fan.FAN_FS_ERROR | fan.FAN_CREATE
    feeder = fan.init(INIT | fan.FAN_REPORT_DFID_NAME_TARGET)
    try:
        fan.mark(shared, fan.FAN_MARK_ADD | fan.FAN_MARK_FILESYSTEM, both, path=broken.point)
        create = fan.FAN_CREATE
        fan.mark(feeder, fan.FAN_MARK_ADD | fan.FAN_MARK_FILESYSTEM, create, path=broken.point)
        broken.trigger()
        for number in range(limit + 50):
            os.symlink("x", broken.point / f"s{number}")
            if not number % 4096:
                broken.core.send(broken.read(feeder))
            os.unlink(broken.point / f"s{number}")
        broken.core.send(broken.read(feeder))
        assert len(group.queue) > limit
        for _ in range(8):
            broken.trigger()
        kernel = [e for e in broken.read(shared) if e.mask & m.FS_ERROR]
        ours = [e for e in group.read() if e.mask & m.FS_ERROR]
    finally:
        os.close(shared)
        os.close(feeder)
    assert [e.count for e in kernel] == [1], "Linux tests its limit before it merges"
    assert [e.count for e in ours] == [9]


def test_an_error_goes_to_the_marks_of_its_object(broken):
    """Of an inode, of the subtree that has it, of one that does not; and one without object."""
    groups = {}
    for name, on in {
        "inode": On(INODE, FS, broken.key),
        "subtree": On(SUBTREE, FS, broken.top),
        "elsewhere": On(SUBTREE, FS, name_to_handle(broken.point / "lost+found")[0]),
        "filesystem": On(FILESYSTEM, FS),
    }.items():
        groups[name] = broken.core.group()
        groups[name].add(on, m.FS_ERROR)
    with pytest.raises(OSError, match="bad"):
        os.stat(broken.point / "top/bad")
    (event,) = broken.read(broken.fed)
    broken.core.send([event])
    assert (event.key, event.scope) == (broken.key, "unplaced")
    assert {name: [e.scope for e in group.read()] for name, group in groups.items()} == {
        "inode": ["object"],
        "subtree": ["unplaced"],
        "elsewhere": ["unplaced"],
        "filesystem": ["object"],
    }
    event.scope, event.dir = "object", broken.top  # whoever calls has found it
    event.ancestors = (name_to_handle(broken.point)[0],)
    broken.core.send([event])
    broken.trigger()
    assert {name: [(e.scope, e.count) for e in g.read()] for name, g in groups.items()} == {
        "inode": [("object", 1)],
        "subtree": [("object", 2)],
        "elsewhere": [("fs", 1)],
        "filesystem": [("object", 2)],
    }
