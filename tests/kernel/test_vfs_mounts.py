"""Vfs against Linux: mounts, bind mounts, and when a filesystem can be unmounted."""

import os
import random
import sys
from pathlib import Path

import pytest

from tests.kernel.conftest import unmount

sys.path.insert(0, str(Path(__file__).parent))

from conftest import mounted, run
from vfs_twin import Linux, failed

from fanwise.kernel.libc import last_error, libc
from fanwise.vfs import Disk, Vfs, finish

MS_BIND = 0x1000
MNT_DETACH = 2
TREE = {"a": {"b": {"c": {}}, "f": b"1"}, "d": {"e": {}}, "g": b"2", "m": {}}
INNER = {"b": {"c": {}}, "f": b"3", "x": {}}


def make(top, tree):
    for name, content in tree.items():
        if isinstance(content, bytes):
            (top / name).write_bytes(content)
        else:
            (top / name).mkdir()
            make(top / name, content)


class Mounter(Linux):
    """Linux, with its mounts below the directory."""

    def bind(self, old, new):
        source, target = (os.fsencode(self._at(path)) for path in (old, new))
        if libc.mount(source, target, None, MS_BIND, None) < 0:
            raise last_error(target)

    def unmount(self, path, lazy=False):
        flags = (MNT_DETACH if lazy else 0) | 8  # UMOUNT_NOFOLLOW
        if libc.umount2(os.fsencode(self._at(path)), flags) < 0:
            raise last_error(os.fsencode(path))


class Pair:
    def __init__(self, root):
        self.linux = Mounter(root)
        self.vfs = Vfs()
        outer = self.vfs.superblock("outer", Disk(TREE, memory=False))
        self.vfs.mount_root(outer)
        self.inner = self.vfs.superblock("inner", Disk(INNER))
        finish(self.vfs.mount(self.inner, "/m"))
        self.files = []

    def do(self, name, *args):
        real = self._try(lambda: getattr(self.linux, name)(*args))
        ours = self._try(lambda: finish(getattr(self.vfs, name)(*args)))
        if name == "open" and real[0] == ours[0] == "ok":
            self.files.append((real[1], ours[1]))
        elif name == "stat" and real[0] == ours[0] == "ok":
            assert real[1].kind == ours[1].kind
        elif name == "bind" and ours[0] == "ok":
            assert real[0] == "ok"
        else:
            assert real == ours, f"{name}{args}: Linux {real}, vfs {ours}"
        return ours if isinstance(ours, str) else "ok"

    def close(self, at):
        fd, file = self.files.pop(at)
        self.linux.close(fd)
        finish(self.vfs.close(file))

    def _try(self, call):
        try:
            return "ok", call()
        except OSError as error:
            return failed(error.errno)


@pytest.fixture
def pair(tmp_path):
    with mounted("tmpfs", tmp_path) as point:
        make(point, TREE)
        run("mount", "--make-private", str(point))
        run("mount", "-t", "tmpfs", "fanwise-inner", str(point / "m"))
        made = None
        try:
            make(point / "m", INNER)
            made = Pair(point)
            yield made
        finally:
            for fd in made.linux.opened if made else ():
                os.close(fd)
            # Everything that is mounted below, the newest first.
            while True:
                text = Path("/proc/self/mountinfo").read_text().splitlines()
                points = [line.split()[4] for line in text]
                below = [one for one in points if one.startswith(f"{point}/")]
                if not below:
                    break
                run("umount", "--lazy", below[-1])


PATHS = ["/a", "/a/b", "/a/b/c", "/a/f", "/d", "/d/e", "/g", "/m", "/m/b", "/m/x", "/m/f", "/a/x"]


@pytest.mark.parametrize("seed", range(12))
def test_random_mounts(pair, seed):
    rand = random.Random(seed)
    seen = set()
    for _ in range(150):
        what, one, other = rand.randrange(12), rand.choice(PATHS), rand.choice(PATHS)
        if rand.random() < 0.2 and what > 5:  # never to unmount what is above
            one += rand.choice(["/..", "/.", "/b", "/../d"])
        if what < 3:
            seen.add(("bind", pair.do("bind", one, other)))
        elif what < 5:
            seen.add(("unmount", pair.do("unmount", one)))
        elif what == 5:
            seen.add(("lazy", pair.do("unmount", one, True)))
        elif what == 6 and len(pair.files) < 3:
            pair.do("open", one, os.O_RDONLY)
        elif what == 7 and pair.files:
            pair.close(rand.randrange(len(pair.files)))
        elif what == 8:
            seen.add(("rename", pair.do("rename", one, other)))
            if rand.random() < 0.5:
                pair.do("rename", other, one)
        elif what == 9:
            seen.add(("link", pair.do("link", one, other)))
        elif what == 10:
            name = rand.choice(["rmdir", "unlink", "mkdir"])
            seen.add((name, pair.do(name, one)))
        else:
            pair.do("stat", one)
    for path in PATHS:
        pair.do("stat", path)
    assert {("bind", "ok"), ("unmount", "ok"), ("unmount", "EINVAL")} <= seen


def test_a_filesystem_that_is_used_cannot_be_unmounted(pair):
    pair.do("open", "/m/f", os.O_RDONLY)
    assert pair.do("unmount", "/m") == "EBUSY"
    pair.close(0)
    assert pair.do("bind", "/a", "/m/x") == "ok"
    assert pair.do("unmount", "/m") == "EBUSY"
    assert pair.do("rmdir", "/m/x") == "EBUSY"
    assert pair.do("rename", "/m/x", "/m/y") == "EBUSY"
    assert pair.do("rename", "/m/b", "/a/b") == "EXDEV"
    assert pair.do("link", "/m/x/f", "/a/h") == "EXDEV"  # another mount of the same filesystem
    assert pair.do("unmount", "/m/x") == "ok"
    pair.do("open", "/m/f", os.O_RDONLY)
    assert pair.do("unmount", "/m", True) == "ok"
    assert pair.inner.state == "ACTIVE"
    fd, file = pair.files[0]
    assert os.read(fd, 1) == finish(pair.vfs.read(file, 1)) == b"3"
    assert pair.do("stat", "/m/f") == "ENOENT"
    pair.close(0)
    assert pair.inner.state == "DEAD"
    assert pair.do("unmount", "/m") == "EINVAL"


def test_a_read_only_mount(tmp_path):
    vfs = Vfs()
    vfs.mount_root(vfs.superblock("fs", Disk({"a": {"f": b"1", "d": {}}, "b": {}})))
    finish(vfs.bind("/a", "/b", read_only=True))
    with mounted("tmpfs", tmp_path) as point:
        make(point, {"a": {"f": b"1", "d": {}}, "b": {}})
        run("mount", "--make-private", str(point))
        run("mount", "--bind", str(point / "a"), str(point / "b"))
        linux = Linux(point)
        try:
            run("mount", "-o", "remount,bind,ro", str(point / "b"))
            cases = [
                ("open", "/b/f", os.O_RDONLY),
                ("open", "/b/f", os.O_RDWR),
                ("open", "/b/f", os.O_RDONLY | os.O_TRUNC),
                ("open", "/b/f", os.O_RDONLY | os.O_CREAT),
                ("open", "/b/f", os.O_CREAT | os.O_EXCL),
                ("open", "/b/new", os.O_RDONLY | os.O_CREAT),
                ("open", "/b/new", os.O_RDWR),
                ("open", "/b/d", os.O_WRONLY),
                ("mkdir", "/b/d"),
                ("mkdir", "/b/e"),
                ("create", "/b/f"),
                ("create", "/b/g"),
                ("unlink", "/b/f"),
                ("unlink", "/b/none"),
                ("rmdir", "/b/d"),
                ("rename", "/b/f", "/b/g"),
                ("rename", "/b/none", "/b/g"),
                ("link", "/b/f", "/b/f"),
                ("link", "/b/f", "/b/h"),
                ("truncate", "/b/f", 0),
                ("truncate", "/b/d", 0),
                ("setattr", "/b/f", 0o700),
            ]
            for name, *args in cases:
                try:
                    real = getattr(linux, name)(*args)
                    real = "ok"
                except OSError as error:
                    real = failed(error.errno)
                try:
                    ours = finish(getattr(vfs, name)(*args))
                    ours = "ok"
                except OSError as error:
                    ours = failed(error.errno)
                assert real == ours, (name, args)
                assert real in ("ok", "EROFS", "EEXIST", "ENOENT", "EISDIR")
            levels = vfs.root.sb.freeze.levels.values()
            assert not any(level.holders for level in levels)
        finally:
            for fd in linux.opened:
                os.close(fd)
            unmount(point / "b")
