"""Vfs against Linux: what a frozen filesystem lets through, and what sleeps until it is thawed."""

import contextlib
import errno
import os
import select
import struct
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from freezing import FITHAW, PATIENCE, Child, freeze_code, frozen

from fanwise.kernel import fanotify as fan
from fanwise.kernel.records import decode
from fanwise.lifetime import Until
from fanwise.notify import mask as m
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.mark import FILESYSTEM, IGNORE, INODE, PRE_CONTENT, SURV_MODIFY, On
from fanwise.notify.verdict import ALLOW, AS_LINUX
from fanwise.vfs import Disk, Vfs, finish
from fanwise.vfs.superblock import KERNEL


class Task:
    """An operation of vfs that may have to wait."""

    def __init__(self, operation):
        self.operation = operation
        self.result = None
        self.step = None

    def go(self):
        """Run as far as it gets; its result, or "asleep"."""
        while self.result is None:
            if isinstance(self.step, Until) and not self.step.ready():
                return "asleep"
            try:
                self.step = next(self.operation)
            except StopIteration:
                self.result = "ok"
            except OSError as error:
                self.result = errno.errorcode[error.errno]
        return self.result


TREE = dict.fromkeys(("a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "n"), b"content")
TREE |= {
    "dir": {},
    "gone": {},
    "sub": {"x": b"1"},
    "o": b"",
    "p": b"",
    "q": b"",
    "r": b"",
    "s": b"",
}

# Operation and arguments; every object is used by one. What is cached is what the test looked at.
CASES = [
    ("stat", "/a"),
    ("read", "/a"),
    ("fsync", "/a"),
    ("syncfs", "/a"),
    ("open", "/a", os.O_RDONLY),
    ("open", "/b", os.O_RDWR),
    ("open", "/b", os.O_RDWR | os.O_CREAT),
    ("open", "/b", os.O_CREAT | os.O_EXCL),
    ("open", "/c", os.O_RDWR | os.O_TRUNC),
    ("open", "/c", os.O_RDONLY | os.O_TRUNC),
    ("open", "/new", os.O_RDWR | os.O_CREAT),
    ("open", "/none", os.O_RDONLY),
    ("open", "/none2", os.O_RDWR),
    ("open", "/dir", os.O_WRONLY),
    ("write", "/d"),
    ("store", "/e"),
    ("close", "/f"),
    ("ftruncate", "/g"),
    ("truncate", "/h"),
    ("truncate", "/dir"),
    ("setattr", "/i"),
    ("unlink", "/j"),
    ("unlink", "/none3"),
    ("rename", "/k", "/kk"),
    ("link", "/l", "/ll"),
    ("sendfile", "/n", "/a"),
    ("mkdir", "/made"),
    ("mkdir", "/dir"),
    ("rmdir", "/gone"),
    ("create", "/node"),
]


def prepared(vfs, name, *args):
    """As _frozen_child.py: what is done before the filesystem is frozen, and the rest."""
    if name in ("read", "write", "fsync", "syncfs", "store", "close", "ftruncate", "sendfile"):
        file = finish(vfs.open(args[0], os.O_RDWR))
    if name == "close":
        finish(vfs.unlink(args[0]))
    made = {
        "read": lambda: vfs.read(file, 3, 0),
        "write": lambda: vfs.write(file, b"xyz", 0),
        "store": lambda: vfs.fault(file, 0, b"A"),
        "ftruncate": lambda: vfs.ftruncate(file, 1),
        "sendfile": lambda: vfs.sendfile(file, finish(vfs.open(args[1])), 3),
        "truncate": lambda: vfs.truncate(args[0], 1),
        "setattr": lambda: vfs.setattr(args[0], 0o700),
    }
    if name in made:
        return made[name]()
    if name in ("fsync", "syncfs", "close"):
        return getattr(vfs, name)(file)
    return getattr(vfs, name)(*args)


def test_what_sleeps_in_a_frozen_filesystem(ext4):
    vfs = Vfs()
    sb = vfs.superblock("fs", Disk(TREE))
    vfs.mount_root(sb)
    for name, content in TREE.items():
        if isinstance(content, bytes):
            (ext4 / name).write_bytes(content)
        else:
            (ext4 / name).mkdir()
    for name in (*TREE, "none"):  # in the cache, on both sides
        with contextlib.suppress(OSError):
            os.stat(ext4 / name)
        with contextlib.suppress(OSError):
            finish(vfs.stat(f"/{name}"))
    with contextlib.ExitStack() as stack:
        children = []
        for name, *args in CASES:
            paths = [f"{ext4}{arg}" if isinstance(arg, str) else arg for arg in args]
            children.append(Child(name, *paths))
            stack.callback(children[-1].close)
        tasks = [Task(prepared(vfs, *case)) for case in CASES]
        with frozen(ext4) as fd:
            finish(vfs.freeze(sb))
            for child in children:
                child.go()
            linux = [child.settled() for child in children]
            ours = [task.go() for task in tasks]
            assert dict(zip(CASES, ours, strict=True)) == dict(zip(CASES, linux, strict=True))
            assert sb.deferred  # /f has no name and no user, and goes with the thaw
            assert {"ok", "asleep", "ENOENT", "EISDIR"} == set(ours)
            assert freeze_code(fd, FITHAW) == "ok"
            finish(vfs.thaw(sb))
            linux = [
                child.answer() if was == "asleep" else was
                for child, was in zip(children, linux, strict=True)
            ]
            ours = [task.go() for task in tasks]
            assert dict(zip(CASES, ours, strict=True)) == dict(zip(CASES, linux, strict=True))
            assert not sb.deferred


def test_a_freeze_writes_everything_back():
    vfs = Vfs()
    sb = vfs.superblock("fs", Disk({"f": b"old"}))
    vfs.mount_root(sb)
    file = finish(vfs.open("/f", os.O_RDWR))
    finish(vfs.write(file, b"new"))
    node = file.path.dentry.inode.node
    assert node.data == {0: b"old"}
    finish(vfs.freeze(sb))
    assert node.data == {0: b"new"}
    finish(vfs.thaw(sb))


def test_freezing_twice_and_thawing_twice(ext4, tmpfs):
    vfs = Vfs()
    disk, memory = vfs.superblock("ext4", Disk({"t": {}})), vfs.superblock("t", Disk(memory=True))
    vfs.mount_root(disk)
    finish(vfs.mount(memory, "/t"))

    def ours(name, sb):
        return Task(getattr(vfs, name)(sb)).go()

    with frozen(ext4) as fd:
        assert ours("freeze", disk) == "ok"
        assert ours("freeze", disk) == freeze_code(fd) == "EBUSY"
        assert ours("thaw", disk) == freeze_code(fd, FITHAW) == "ok"
        assert ours("thaw", disk) == freeze_code(fd, FITHAW) == "EINVAL"
        assert ours("freeze", disk) == freeze_code(fd) == "ok"
        assert ours("thaw", disk) == freeze_code(fd, FITHAW) == "ok"
    fd = os.open(tmpfs, os.O_RDONLY)
    try:
        assert ours("freeze", memory) == freeze_code(fd) == "ENOTSUP"
        assert ours("thaw", memory) == freeze_code(fd, FITHAW) == "EINVAL"
    finally:
        os.close(fd)
    assert finish(vfs.freeze(disk)) is None
    assert finish(vfs.freeze(disk, KERNEL)) is None
    assert finish(vfs.thaw(disk)) is None
    assert disk.freeze.state == "FROZEN"
    with pytest.raises(OSError, match="Invalid"):
        finish(vfs.thaw(disk))
    finish(vfs.thaw(disk, KERNEL))
    assert disk.freeze.state == "THAWED"


# What is asked of an access, the access, and what it is done to.
ASKED = [
    (m.PRE_ACCESS, "read", "/f"),
    (m.PRE_ACCESS, "write", "/f"),
    (m.PRE_ACCESS, "truncate", "/f"),
    (m.PRE_ACCESS, "ftruncate", "/f"),
    (m.PRE_ACCESS, "sendfile", "/o", "/f"),
    (m.ACCESS_PERM, "read", "/f"),
    (m.ACCESS_PERM, "sendfile", "/o", "/f"),
    (m.OPEN_PERM, "open", "/f", os.O_RDONLY),
    (m.OPEN_PERM, "open", "/f", os.O_RDWR),
    (m.OPEN_PERM, "open", "/f", os.O_RDWR | os.O_CREAT),
    (m.OPEN_PERM, "open", "/new", os.O_RDWR | os.O_CREAT),
    (m.OPEN_PERM, "open", "/f", os.O_RDWR | os.O_TRUNC),
    (m.OPEN_PERM, "open", "/f", os.O_RDWR | os.O_CREAT | os.O_TRUNC),
]


def linux_asked(point, mask, name, *args):
    """How a freeze, the access and the freeze again fare while the access waits for a verdict."""
    (point / "f").write_bytes(b"content")
    (point / "o").touch()
    os.sync()
    with contextlib.ExitStack() as stack:
        group = fan.init(
            fan.FAN_CLASS_PRE_CONTENT | fan.FAN_CLOEXEC | fan.FAN_NONBLOCK | fan.FAN_UNLIMITED_QUEUE
        )
        close = stack.enter_context(contextlib.ExitStack())
        close.callback(os.close, group)
        fan.mark(group, fan.FAN_MARK_ADD | fan.FAN_MARK_FILESYSTEM, mask, path=point)
        if name == "sendfile":  # where it is written to is not what is asked about
            ignored = fan.FAN_MARK_ADD | fan.FAN_MARK_IGNORE_SURV
            fan.mark(group, ignored, mask, path=point / "o")
        freezer = Child("freeze", point)
        stack.callback(freezer.close)
        paths = [f"{point}{arg}" if isinstance(arg, str) else arg for arg in args]
        access = Child(name, *paths)
        stack.callback(access.close)
        stack.callback(close.close)  # on failure: whoever waits goes on, then the freezer thaws
        access.go()
        assert select.select([group], [], [], PATIENCE)[0], "nobody asks"
        (record,) = decode(os.read(group, 4096))
        stack.callback(os.close, record.fd)
        freezer.go()
        said = [freezer.settled()]
        os.write(group, struct.pack("=iI", record.fd, fan.FAN_ALLOW))
        said.append(access.settled())
        if said[0] == "asleep":
            said.append(freezer.answer())
        freezer.go()
        assert freezer.answer() == "thawed"
        if said[1] == "asleep":
            said.append(access.answer())
        return said


def vfs_asked(mask, name, *args):
    core = Fsnotify()
    vfs = Vfs(notify=core)
    sb = vfs.superblock("fs", Disk({"f": b"content", "o": b""}))
    vfs.mount_root(sb)
    keys = {path: finish(vfs.stat(f"/{path}")).key for path in "fo"}
    group = core.group(PRE_CONTENT, policy=AS_LINUX)
    group.add(On(FILESYSTEM, "fs"), mask)
    if name == "sendfile":
        group.add(On(INODE, "fs", keys["o"]), mask, IGNORE | SURV_MODIFY)
    access, freezer = Task(prepared(vfs, name, *args)), Task(vfs.freeze(sb))
    assert access.go() == "asleep"
    (event,) = group.read()
    said = [freezer.go()]
    assert group.answer(event.number, ALLOW)
    said.append(access.go())
    if said[0] == "asleep":
        said.append(freezer.go())
    finish(vfs.thaw(sb))
    if said[1] == "asleep":
        said.append(access.go())
    return said


@pytest.mark.parametrize("case", ASKED, ids=lambda case: f"{m.show(case[0])}-{case[1]}-{case[-1]}")
def test_a_freeze_while_an_access_waits_for_a_verdict(ext4, case):
    ours = vfs_asked(*case)
    assert ours == linux_asked(ext4, *case)
    assert ours[-1] == "ok"


def test_a_hook_under_protection_keeps_the_freezer_waiting():
    seen = {case[1:]: vfs_asked(*case)[0] for case in ASKED if case[1] == "open"}
    assert sorted(seen.values()) == ["asleep"] * 2 + ["ok"] * 4
