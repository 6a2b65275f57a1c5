"""Operations on names: create, mkdir, link, unlink, rmdir, rename, and what asks about one.

LOCKING   each takes freeze protection first, then the directory's lock (a rename's two, the
          ancestor first, under the filesystem's rename mutex), then the locks of the objects.
Linux reference: fs/namei.c.
"""

import errno
from functools import partial
from typing import NamedTuple

from fanwise.notify import mask as m

from .dentry import Dentry
from .disk import DIR, FILE
from .inode import Inode
from .locks import NOTHING, Held
from .mount import Mount, Path
from .namespace import AnyPath, Namespace
from .protocol import Op, T, fail
from .superblock import WRITE

NOREPLACE = 1
EXCHANGE = 2
_DOTS = (b"", b".", b"..")


class Stat(NamedTuple):
    """What `stat` says of an object."""

    key: bytes
    kind: str
    mode: int
    nlink: int
    size: int


class Names(Namespace):
    """The layer of names."""

    # -- asking --

    def lookup(self, path: AnyPath) -> Op[Path]:
        """Return the place a path leads to; give it back with `put`. Raises ENOENT, ENOTDIR."""
        return (yield from self.walk(path))

    def stat(self, path: AnyPath) -> Op[Stat]:
        """Return what an object is. Raises ENOENT, ENOTDIR."""
        here = yield from self.walk(path)
        found = stat_of(here.dentry.target)
        yield from self.put(here)
        return found

    # -- making names --

    def create(self, path: AnyPath, mode: int = 0o644) -> Op[None]:
        """Make an empty file and open nothing (mknod). Raises EEXIST, ENOENT, ENOTDIR, EROFS."""
        yield from self._make(path, FILE, mode)

    def mkdir(self, path: AnyPath, mode: int = 0o755) -> Op[None]:
        """Make a directory. Raises EEXIST, ENOENT, ENOTDIR, EROFS."""
        yield from self._make(path, DIR, mode)

    def _make(self, path: AnyPath, kind: str, mode: int) -> Op[None]:
        here, name = yield from self.walk_parent(path)
        yield from self.then_put(self._make_in(here, name, kind, mode), here)

    def _make_in(self, here: Path, name: bytes, kind: str, mode: int) -> Op[None]:
        if name in _DOTS:
            fail(errno.EEXIST)
        held, code = yield from self.try_want_write(here.mount)
        folder = here.dentry.target
        with held:
            yield from folder.lock.take("lock directory")
            with folder.lock:
                dentry = yield from self._look_to_make(here.dentry, name, code)
                made = self.make_node(here.dentry, dentry, kind, mode)
                yield from self.then_dput(made, dentry)

    # A name that exists is told before a filesystem that cannot be written (``code``).
    def _look_to_make(self, parent: Dentry, name: bytes, code: int) -> Op[Dentry]:
        dentry = yield from self.look_locked(parent, name)
        if dentry.inode is not None:
            code = errno.EEXIST
        if code:
            yield from self.dput(dentry)
            fail(code)
        return dentry

    def make_node(self, parent: Dentry, dentry: Dentry, kind: str, mode: int) -> Op[None]:
        """Make an object for a negative dentry. The caller holds the directory's lock."""
        yield "create"
        sb = parent.sb
        node = sb.disk.make(kind, mode)
        sb.disk.enter(parent.target.node, dentry.name, node)
        inode = Inode(sb, node, self.current)
        self.instantiate(dentry, inode)
        yield from self.tell_entry(m.CREATE, parent, dentry.name, inode)

    def link(self, old: AnyPath, new: AnyPath) -> Op[None]:
        """Give a file another name.

        Raises ENOENT, ENOTDIR, EEXIST, EROFS, EXDEV for another mount and EPERM for a directory.
        """
        source = yield from self.walk(old)
        yield from self.then_put(self._link(source, new), source)

    def _link(self, source: Path, new: AnyPath) -> Op[None]:
        here, name = yield from self.walk_parent(new)
        yield from self.then_put(self._link_in(source, here, name), here)

    def _link_in(self, source: Path, here: Path, name: bytes) -> Op[None]:
        if name in _DOTS:
            fail(errno.EEXIST)
        held, code = yield from self.try_want_write(here.mount)
        folder = here.dentry.target
        with held:
            yield from folder.lock.take("lock directory")
            with folder.lock:
                dentry = yield from self._look_to_make(here.dentry, name, code)
                yield from self.then_dput(self._link_node(source, here, dentry), dentry)

    def _link_node(self, source: Path, here: Path, dentry: Dentry) -> Op[None]:
        inode = source.dentry.target
        if source.mount is not here.mount:
            fail(errno.EXDEV)
        if inode.is_dir:
            fail(errno.EPERM)
        yield from inode.lock.take("lock inode")
        with inode.lock:
            if not inode.links:
                fail(errno.ENOENT)
            yield "link"
            inode.sb.disk.enter(here.dentry.target.node, dentry.name, inode.node)
            self.ihold(inode)
            self.instantiate(dentry, inode)
        yield from self.tell_inode(m.ATTRIB, inode)
        yield from self.tell_entry(m.CREATE, here.dentry, dentry.name, inode)

    # -- removing names --

    def unlink(self, path: AnyPath) -> Op[None]:
        """Remove a file's name. Raises ENOENT, ENOTDIR, EISDIR, EROFS, EBUSY for a mount point."""
        here, name = yield from self.walk_parent(path)
        code = errno.EISDIR if name in _DOTS else 0
        yield from self.then_put(self._remove_in(here, name, False, code), here)

    def rmdir(self, path: AnyPath) -> Op[None]:
        """Remove an empty directory.

        Raises ENOENT, ENOTDIR, ENOTEMPTY, EROFS, EINVAL for a dot, EBUSY for a root or mount point.
        """
        here, name = yield from self.walk_parent(path)
        codes = {b"": errno.EBUSY, b".": errno.EINVAL, b"..": errno.ENOTEMPTY}
        yield from self.then_put(self._remove_in(here, name, True, codes.get(name, 0)), here)

    def _remove_in(self, here: Path, name: bytes, is_dir: bool, code: int) -> Op[None]:
        if code:
            fail(code)
        held = yield from self.want_write(here.mount)
        folder = here.dentry.target
        with held:
            yield from folder.lock.take("lock directory")
            with folder.lock:
                dentry = yield from self.look_locked(here.dentry, name)
                inode = yield from self.then_dput(self._remove(here.dentry, dentry, is_dir), dentry)
            if inode is not None:
                yield from self.iput(inode)  # what it held on the disk goes without the lock

    # The inode, for the caller to let go of; None for a directory's.
    def _remove(self, parent: Dentry, dentry: Dentry, is_dir: bool) -> Op[Inode | None]:
        inode = dentry.inode
        if inode is None:
            fail(errno.ENOENT)
        if inode.is_dir != is_dir:
            fail(errno.ENOTDIR if is_dir else errno.EISDIR)
        take_away = partial(self._take_away, parent, dentry)
        if is_dir:
            yield from self.deleting.remove(parent, dentry, take_away)
            return None
        self.ihold(inode)
        try:
            yield from self.deleting.remove(parent, dentry, take_away)
        except OSError:
            yield from self.iput(inode)
            raise
        return inode

    def _take_away(self, parent: Dentry, dentry: Dentry) -> Op[None]:
        inode = dentry.target
        yield from inode.lock.take("lock inode")
        with inode.lock:
            if dentry.mounted:
                fail(errno.EBUSY)
            if inode.is_dir and inode.node.entries:
                fail(errno.ENOTEMPTY)
            yield "remove name"
            dentry.sb.disk.remove(parent.target.node, dentry.name)
            self._unpin(dentry)
            if inode.is_dir:
                inode.dead = True
                yield from self.shrink(dentry.sb, dentry)
        if not inode.is_dir:
            yield from self.tell_inode(m.ATTRIB, inode)

    def _unpin(self, dentry: Dentry) -> None:
        if dentry.sb.disk.memory:
            dentry.refs -= 1

    # -- moving names --

    def rename(self, old: AnyPath, new: AnyPath, flags: int = 0) -> Op[None]:
        """Move a name. ``flags``: NOREPLACE or EXCHANGE.

        Raises ENOENT, ENOTDIR, EISDIR, ENOTEMPTY, EEXIST, EROFS, EXDEV for another mount, EBUSY for
        dots and mount points, EINVAL for a directory into itself.
        """
        if flags not in (0, NOREPLACE, EXCHANGE):
            fail(errno.EINVAL)
        here, name = yield from self.walk_parent(old)
        yield from self.then_put(self._rename_from(here, name, new, flags), here)

    def _rename_from(self, here: Path, name: bytes, new: AnyPath, flags: int) -> Op[None]:
        there, new_name = yield from self.walk_parent(new)
        yield from self.then_put(self._rename_in(here, name, there, new_name, flags), there)

    def _rename_in(
        self, here: Path, name: bytes, there: Path, new_name: bytes, flags: int
    ) -> Op[None]:
        if here.mount is not there.mount:
            fail(errno.EXDEV)
        if name in _DOTS:
            fail(errno.EBUSY)
        if new_name in _DOTS:
            fail(errno.EEXIST if flags == NOREPLACE else errno.EBUSY)
        held = yield from self.want_write(here.mount)
        old, new = here.dentry, there.dentry
        work = self._rename_names(old, name, new, new_name, flags)
        with held:
            if old is new:
                yield from self.under([old.target], "lock directory", work)
                return
            yield from here.mount.sb.rename.take("lock renames")
            with here.mount.sb.rename:
                folders = [new, old] if old.within(new) else [old, new]
                inodes = [folder.target for folder in folders]
                yield from self.under(inodes, "lock directory", work)

    def _rename_names(
        self, old: Dentry, name: bytes, new: Dentry, new_name: bytes, flags: int
    ) -> Op[None]:
        dentry = yield from self.look_locked(old, name)
        work = self._rename_to(old, dentry, new, new_name, flags)
        yield from self.then_dput(work, dentry)

    def _rename_to(
        self, old: Dentry, dentry: Dentry, new: Dentry, new_name: bytes, flags: int
    ) -> Op[None]:
        if dentry.inode is None:
            fail(errno.ENOENT)
        victim = yield from self.look_locked(new, new_name)
        yield from self.then_dput(self._rename_pair(old, dentry, new, victim, flags), victim)

    def _rename_pair(
        self, old: Dentry, dentry: Dentry, new: Dentry, victim: Dentry, flags: int
    ) -> Op[None]:
        source, target = dentry.target, victim.inode
        if flags == NOREPLACE and target is not None:
            fail(errno.EEXIST)
        if flags == EXCHANGE and target is None:
            fail(errno.ENOENT)
        if new.within(dentry):
            fail(errno.EINVAL)
        if old.within(victim):
            fail(errno.EINVAL if flags == EXCHANGE else errno.ENOTEMPTY)
        if source is target:
            return
        replaced = target if flags != EXCHANGE else None
        if replaced is not None and source.is_dir != replaced.is_dir:
            fail(errno.ENOTDIR if source.is_dir else errno.EISDIR)
        name, new_name = dentry.name, victim.name
        work = self._rename_node(old, dentry, new, victim, replaced)
        yield from self.under(_to_lock(source, target, old is new, flags), "lock inode", work)
        yield from self._tell_move(old, name, new, new_name, source, replaced)
        if flags == EXCHANGE and target is not None:
            yield from self._tell_move(new, new_name, old, name, target, None)

    def _rename_node(
        self, old: Dentry, dentry: Dentry, new: Dentry, victim: Dentry, replaced: Inode | None
    ) -> Op[None]:
        if dentry.mounted or victim.mounted:
            fail(errno.EBUSY)
        if replaced is not None and replaced.is_dir and replaced.node.entries:
            fail(errno.ENOTEMPTY)
        yield "rename"
        disk, ours, theirs = old.sb.disk, old.target.node, new.target.node
        if replaced is not None:
            disk.remove(theirs, victim.name)
            self._unpin(victim)
            if replaced.is_dir:
                replaced.dead = True
                yield from self.shrink(old.sb, victim)
        elif victim.inode is not None:
            disk.exchange(ours, dentry.name, theirs, victim.name)
            self.d_exchange(dentry, victim)
            return
        disk.move(ours, dentry.name, theirs, victim.name)
        self.d_move(dentry, victim)

    # As fsnotify_move: the two directories, what was replaced, what was moved.
    def _tell_move(
        self,
        old: Dentry,
        name: bytes,
        new: Dentry,
        new_name: bytes,
        source: Inode,
        replaced: Inode | None,
    ) -> Op[None]:
        if self.notify is None:
            return
        yield "tell RENAME"
        self.report(self.of_rename(old, name, new, new_name, source))
        yield from self.tell_entry(m.MOVED_FROM, old, name, source)
        yield from self.tell_entry(m.MOVED_TO, new, new_name, source)
        if replaced is not None:
            yield from self.tell_inode(m.ATTRIB, replaced)
        yield from self.tell_inode(m.MOVE_SELF, source)

    # -- attributes --

    def setattr(self, path: AnyPath, mode: int) -> Op[None]:
        """Change an object's mode (chmod). Raises ENOENT, ENOTDIR, EROFS."""
        here = yield from self.walk(path)
        yield from self.then_put(self._setattr(here, mode), here)

    def _setattr(self, here: Path, mode: int) -> Op[None]:
        held = yield from self.want_write(here.mount)
        inode = here.dentry.target
        with held:
            yield from inode.lock.take("lock inode")
            with inode.lock:
                yield "set attributes"
                inode.node.mode = mode
                yield from self.tell_object(m.ATTRIB, here.dentry)

    # -- parts --

    def want_write(self, mount: Mount) -> Op[Held]:
        """Take freeze protection for a change through a mount (mnt_want_write). Raises EROFS."""
        held = yield from self.guard.start(mount.sb, WRITE)
        if mount.read_only or mount.sb.read_only:
            held.release()
            fail(errno.EROFS)
        return held

    def try_want_write(self, mount: Mount) -> Op[tuple[Held, int]]:
        """As `want_write`; what failed is returned, because something else may be told first."""
        try:
            held = yield from self.want_write(mount)
        except OSError as error:
            return NOTHING, error.errno or 0
        return held, 0

    def under(self, inodes: list[Inode], step: str, work: Op[T]) -> Op[T]:
        """Run an operation under the locks of inodes, taken in this order."""
        if not inodes:
            return (yield from work)
        first = inodes[0]
        yield from first.lock.take(step)
        with first.lock:
            return (yield from self.under(inodes[1:], step, work))

    def then_dput(self, work: Op[T], dentry: Dentry) -> Op[T]:
        """Run an operation, then let go of a dentry, also when it fails."""
        try:
            result = yield from work
        except OSError:
            yield from self.dput(dentry)
            raise
        yield from self.dput(dentry)
        return result


def stat_of(inode: Inode) -> Stat:
    """Return what an object is."""
    node = inode.node
    return Stat(inode.key, inode.kind, node.mode, node.nlink, 0 if inode.is_dir else node.size)


# A directory is locked where its parent changes or it is replaced, everything else always.
def _to_lock(source: Inode, target: Inode | None, same: bool, flags: int) -> list[Inode]:
    locked = []
    if source.is_dir:
        if not same:
            locked.append(source)
        if target is not None and not (target.is_dir and same and flags == EXCHANGE):
            locked.append(target)
    elif target is None:
        locked.append(source)
    elif target.is_dir:
        if not same or flags != EXCHANGE:
            locked.append(target)
        locked.append(source)
    else:
        locked += sorted((source, target), key=lambda inode: inode.number)
    return locked
