"""Vfs under random interleavings: nothing leaks, hangs or contradicts itself.

Tasks do random operations and are switched at every step. References are checked at every step by
the declared lifetimes, and counted exactly when all tasks are done; then everything is closed and
unmounted, and nothing may be left.
"""

import os
import random
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from fanwise.lifetime import Until
from fanwise.notify import mask as m
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.mark import FILESYSTEM, INODE, On
from fanwise.vfs import Disk, Vfs, finish
from fanwise.vfs.namei import EXCHANGE, NOREPLACE

NAMES = "ab"
PAGE = 4


class Tasks:
    """Round the tasks at random; ``current`` is who runs."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.running = "nobody"
        self.steps = 0
        self.waits = 0

    def run(self, tasks, check):
        at = {}
        while tasks:
            ready = [
                name for name in tasks if not isinstance(at.get(name), Until) or at[name].ready()
            ]
            self.waits += len(ready) < len(tasks)
            assert ready, {name: (at[name].step, at[name].on) for name in tasks}
            self.running = self.random.choice(ready)
            try:
                at[self.running] = next(tasks[self.running])
            except StopIteration:
                del tasks[self.running]
            self.running = "nobody"
            self.steps += 1
            check()


def path(rand, depth=2):
    return "".join(f"/{rand.choice(NAMES)}" for _ in range(rand.randint(1, depth)))


def operations(vfs, sbs, rand, many):
    """One task: random operations; what it opened and froze it closes and thaws."""
    files = []
    for _ in range(many):
        what = rand.randrange(20)
        try:
            if what < 3:
                flags = rand.choice([os.O_RDWR, os.O_RDONLY]) | rand.choice(
                    [0, os.O_CREAT, os.O_TRUNC, os.O_CREAT | os.O_EXCL]
                )
                files.append((yield from vfs.open(path(rand), flags)))
            elif what < 5 and files:
                yield from vfs.write(rand.choice(files), b"x" * rand.randint(1, 6))
            elif what == 5 and files:
                yield from vfs.read(rand.choice(files), 5, 0)
            elif what == 6 and files:
                yield from vfs.close(files.pop(rand.randrange(len(files))))
            elif what == 7 and len(files) > 1:
                yield from vfs.sendfile(files[0], files[-1], 5)
            elif what == 8 and files:
                yield from rand.choice([vfs.fsync, vfs.syncfs])(rand.choice(files))
            elif what == 9:
                yield from vfs.unlink(path(rand))
            elif what == 10:
                yield from vfs.mkdir(path(rand))
            elif what == 11:
                yield from vfs.rmdir(path(rand))
            elif what < 14:
                flags = rand.choice([0, 0, 0, EXCHANGE, NOREPLACE])
                yield from vfs.rename(path(rand), path(rand), flags)
            elif what == 14:
                yield from vfs.link(path(rand), path(rand))
            elif what == 15:
                yield from rand.choice([vfs.stat, vfs.create])(path(rand))
            elif what == 16:
                yield from vfs.truncate(path(rand), rand.randrange(9))
            elif what == 17:
                yield from vfs.drop_caches(rand.choice(sbs))
            elif what == 18:
                sb = rand.choice(sbs)
                yield from vfs.freeze(sb)
                yield from vfs.thaw(sb)
            elif what == 19 and rand.random() < 0.3:
                yield from vfs.error(rand.choice(sbs), 5)
            elif rand.random() < 0.5:
                at = path(rand)
                if rand.random() < 0.5:
                    yield from vfs.mount(rand.choice(sbs[1:]), at)
                else:
                    yield from vfs.bind("/a", at)
                yield from vfs.unmount(at, lazy=rand.random() < 0.5)
        except OSError:
            pass
    for file in files:
        yield from vfs.close(file)


def dentries(sb):
    """Every dentry of a superblock that is not freed, found from the root and from the inodes."""
    found = {sb.root: None}
    for inode in sb.inodes.values():
        found |= dict.fromkeys(inode.dentries)
    for dentry in list(found):
        while dentry.parent is not None:
            dentry = dentry.parent
            found[dentry] = None
    for dentry in list(found):
        found |= dict.fromkeys(dentry.children.values())
    return list(found)


def mounts(vfs):
    found = [vfs.root]
    for mount in found:
        found += mount.covers.values()
    return found


def accounts(vfs, sb, held=0):
    """References, when no operation is in flight: each has its reason."""
    every = dentries(sb)
    reasons = Counter()
    for dentry in every:
        if dentry.parent is not None:
            reasons[dentry.parent] += 1
        if sb.disk.memory and dentry.state == "POSITIVE" and dentry is not sb.root:
            reasons[dentry] += 1
    reasons[sb.root] += 1
    for mount in mounts(vfs):
        if mount.sb is sb:
            reasons[mount.root] += 1
        if mount.on is not None and mount.on.dentry.sb is sb:
            reasons[mount.on.dentry] += 1
    for dentry in every:
        assert dentry.refs == reasons[dentry], (dentry, reasons[dentry])
        assert dentry.state != "FREED"
    for inode in sb.inodes.values():
        assert inode.refs == len(inode.dentries)
        assert inode.state == "LIVE"
        assert not inode.writers
        assert not inode.lock.holders
        assert not inode.lock.waiting
        if inode.is_dir:
            assert len(inode.dentries) <= 1
    agree(sb)
    assert not sb.deferred
    assert not sb.rename.holders
    assert not sb.umount.holders
    assert sb.freeze.state == "THAWED"
    assert not any(level.holders for level in sb.freeze.levels.values())


def agree(sb):
    """The caches and the disk say the same, and the links are right."""
    names, below = Counter(), Counter()
    nodes = sb.disk.nodes
    todo = [sb.root.target.number]
    for number in todo:
        for child in nodes[number].entries.values():
            names[child] += 1
            if nodes[child].kind == "dir":
                below[number] += 1
                todo.append(child)
    for number, node in nodes.items():
        if node.kind == "dir":
            assert node.nlink == 2 + below[number], node
        else:
            assert node.nlink == names[number], node
        assert names[number] or number == sb.root.target.number, f"{node} is lost"
    for dentry in dentries(sb):
        if dentry.parent is None or dentry.state == "UNHASHED":
            continue
        inside = dentry.parent.target.node.entries
        assert inside.get(dentry.name) == (dentry.inode and dentry.inode.number), dentry


def always(vfs, sbs):
    """What holds at every step."""
    for sb in sbs:
        if sb.root is None:
            continue
        for dentry in dentries(sb):
            assert dentry.refs >= len(dentry.children)
            assert dentry.inode is None or dentry.inode.state == "LIVE"
        for inode in sb.inodes.values():
            assert inode.refs >= len(inode.dentries)
            assert inode.links >= 0
        if sb.freeze.state == "FROZEN":
            assert not any(level.holders for level in sb.freeze.levels.values())


@pytest.mark.parametrize("memory", [False, True], ids=["disk", "memory"])
@settings(max_examples=int(os.environ.get("VFS_EXAMPLES", "150")), deadline=None, database=None)
@given(seed=st.integers(0, 1 << 48), notified=st.booleans())
def test_random_interleavings(memory, seed, notified):
    core = Fsnotify() if notified else None
    tasks = Tasks(seed)
    vfs = Vfs(current=lambda: tasks.running, notify=core)
    tree = None if memory else {"a": {"a": b"12345", "b": {}}, "b": b"678"}
    first = vfs.superblock("first", Disk(tree, page=PAGE, memory=memory))
    second = vfs.superblock("second", Disk({"a": b"x", "b": {}}, page=PAGE))
    third = vfs.superblock("third", Disk({"a": b"x", "b": {"b": {}}}, page=PAGE))
    sbs = first, second, third
    vfs.mount_root(first)
    if core is not None:
        core.group().add(On(FILESYSTEM, "first"), m.EVENTS | m.ONDIR)
    finish(vfs.mkdir("/m"))
    finish(vfs.mount(second, "/m"))  # so that it lives on
    rand = tasks.random
    works = {
        name: operations(vfs, sbs, rand, rand.randint(1, 40))
        for name in "ABCD"[: rand.randint(2, 4)]
    }
    tasks.run(works, lambda: always(vfs, sbs))
    assert len(mounts(vfs)) == 2 or any(mount.on for mount in mounts(vfs))
    while len(mounts(vfs)) > 2:  # what a task could not unmount
        mount = mounts(vfs)[-1]
        finish(unmount(vfs, mount))
    accounts(vfs, first)
    accounts(vfs, second)
    finish(vfs.drop_caches(first))
    accounts(vfs, first)
    if not memory:
        assert set(first.inodes) == {first.root.target.number, *kept(first)}
    finish(vfs.unmount("/m"))
    for sb in (second, third):
        assert sb.state == "DEAD" or (sb is third and sb.state == "BORN")
        assert sb.state == "BORN" or not sb.inodes
    accounts(vfs, first)
    root = vfs.root
    finish(end(vfs, root))
    assert first.state == "DEAD"
    assert not first.inodes


def kept(sb):
    """Inodes that stay cached when caches are dropped: with users, or with pages to write back."""
    return {number for number, inode in sb.inodes.items() if inode.refs or inode.dirty}


def unmount(vfs, mount):
    for one in vfs._detach_mount(mount):
        yield from vfs.mntput(one)


def end(vfs, root):
    root.state = "DETACHED"
    yield from vfs.mntput(root)


def test_an_unmount_waits_for_the_error_that_is_being_told():
    core = Fsnotify()
    group = core.group()
    tasks = Tasks(0)
    vfs = Vfs(current=lambda: tasks.running, notify=core)
    sb, inner = vfs.superblock("outer", Disk({"m": {}})), vfs.superblock("inner", Disk({"f": b""}))
    vfs.mount_root(sb)
    finish(vfs.mount(inner, "/m"))
    group.add(On(FILESYSTEM, "inner"), m.FS_ERROR)
    error, unmount = vfs.error(inner, 5), vfs.unmount("/m")
    assert [next(error), next(error)] == ["find error", "tell FS_ERROR"]
    while not isinstance(step := next(unmount), Until) or step.ready():
        pass
    assert step.step == "wait for error reports"
    assert list(error)[:1] == ["count error"]
    assert step.ready()
    (told,) = group.read()
    assert (told.error, told.key) == (5, None)
    assert list(unmount)
    assert inner.state == "DEAD"
    assert (inner.errors, inner.first_error) == (1, 5)
    finish(vfs.error(inner, 7))
    assert inner.errors == 1


def test_dropped_caches_keep_what_is_nowhere_else_and_what_is_marked():
    core = Fsnotify()
    vfs = Vfs(notify=core)
    sb = vfs.superblock("fs", Disk({"dirty": b"1", "marked": b"2", "clean": b"3"}, page=PAGE))
    vfs.mount_root(sb)
    group = core.group()
    key = finish(vfs.stat("/marked")).key
    group.add(On(INODE, "fs", key), m.MODIFY)
    finish(vfs.stat("/clean"))
    file = finish(vfs.open("/dirty", os.O_RDWR))
    finish(vfs.write(file, b"new"))
    finish(vfs.close(file))
    cached = set(sb.inodes)
    finish(vfs.drop_caches(sb))
    assert len(cached) - len(sb.inodes) == 1
    file = finish(vfs.open("/dirty", os.O_RDWR))
    assert finish(vfs.read(file, 9)) == b"new"
    finish(vfs.fsync(file))
    finish(vfs.close(file))
    group.remove(On(INODE, "fs", key), m.MODIFY)
    finish(vfs.drop_caches(sb))
    assert set(sb.inodes) == {sb.root.target.number}
    file = finish(vfs.open("/dirty"))
    assert finish(vfs.read(file, 9)) == b"new"


@pytest.mark.parametrize("cached", [False, True])
def test_a_file_that_was_cut_grows_by_zeros(cached):
    vfs = Vfs()
    sb = vfs.superblock("fs", Disk({"f": b"123456789"}, page=PAGE))
    vfs.mount_root(sb)
    file = finish(vfs.open("/f", os.O_RDWR))
    if cached:
        finish(vfs.read(file, 9, 0))
    finish(vfs.ftruncate(file, 6))
    finish(vfs.ftruncate(file, 12))
    assert finish(vfs.read(file, 20, 0)) == b"123456" + bytes(6)
    finish(vfs.drop_caches(sb))
    assert finish(vfs.read(file, 20, 0)) == b"123456" + bytes(6)


def until(operation, step):
    """Run an operation up to a step."""
    for at in operation:
        if (at.step if isinstance(at, Until) else at) == step:
            return
    raise AssertionError(step)


def test_two_that_mount_on_one_place_stand_on_each_other():
    vfs = Vfs()
    vfs.mount_root(vfs.superblock("fs", Disk({"a": {}, "b": {}, "m": {}})))
    first, second = vfs.bind("/a", "/m"), vfs.bind("/b", "/m")
    until(first, "lock namespace")
    until(second, "lock namespace")
    one, other = finish(first), finish(second)
    assert (one.on.mount, other.on.mount) == (vfs.root, one)
    finish(vfs.unmount("/m"))
    assert other.state == "FREED"
    finish(vfs.unmount("/m"))
    assert one.state == "FREED"


def test_an_unmount_writes_back_and_ends_the_marks():
    core = Fsnotify()
    vfs = Vfs(notify=core)
    vfs.mount_root(vfs.superblock("outer", Disk({"m": {}})))
    disk = Disk({"f": b"old"})
    finish(vfs.mount(vfs.superblock("inner", disk), "/m"))
    group = core.group()
    group.add(On(FILESYSTEM, "inner"), m.MODIFY)
    file = finish(vfs.open("/m/f", os.O_RDWR))
    finish(vfs.write(file, b"new"))
    finish(vfs.close(file))
    finish(vfs.unmount("/m"))
    assert not group.marks
    assert [event.mask for event in group.read()] == [m.MODIFY]  # what was told stays to be read
    finish(vfs.mount(vfs.superblock("again", disk), "/m"))
    assert finish(vfs.read(finish(vfs.open("/m/f")), 9)) == b"new"


def test_what_lost_its_last_name_gets_no_other():
    vfs = Vfs()
    sb = vfs.superblock("fs", Disk({"f": b"", "d": {}}))
    vfs.mount_root(sb)
    link = vfs.link("/f", "/d/g")
    until(link, "lock directory")  # it has found /f
    finish(vfs.unlink("/f"))
    with pytest.raises(FileNotFoundError):
        finish(link)
    accounts(vfs, sb)
