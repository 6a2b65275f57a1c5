"""The namespace: mounts, walking paths in it, and the life of superblocks.

Paths are absolute, bytes or text, with ``.`` and ``..``; there are no symbolic links, and a slash
at the end is refused as a ValueError.

LOCKING   ``namespace`` over mounting and unmounting. A walk holds what it stands on, and the
          directory's lock only where the cache does not know.
Linux reference: fs/namespace.c, fs/namei.c, fs/super.c (deactivate_super).
"""

import errno
import os
from collections.abc import Hashable
from typing import TypeAlias

from fanwise.lifetime import Until

from .dcache import Dentries
from .dentry import DENTRY, Dentry
from .disk import ROOT, Disk
from .inode import Inode
from .mount import MOUNT, Mount, Path
from .protocol import Op, T, fail
from .superblock import SUPERBLOCK, Superblock

AnyPath: TypeAlias = str | bytes


class Namespace(Dentries):
    """The layer of mounts and paths. ``root`` is the first mount, None before there is one."""

    root: Mount | None = None

    # -- superblocks --

    def superblock(
        self, key: Hashable, disk: Disk | None = None, read_only: bool = False
    ) -> Superblock:
        """Make a superblock over a disk (None: an empty one). At once; mount it next."""
        disk = Disk() if disk is None else disk
        sb = Superblock(key, disk, self.current, self.guard.levels, read_only)
        root = Dentry(sb, None, b"/")
        self._attach(root, Inode(sb, disk.nodes[ROOT], self.current))
        DENTRY.advance(root, "add")
        sb.root = root
        return sb

    def mount_root(self, sb: Superblock, read_only: bool = False) -> Mount:
        """Mount the first filesystem, at ``/``. At once."""
        assert self.root is None
        self.root = self._mount(sb, self._root(sb), None, read_only)
        return self.root

    def _root(self, sb: Superblock) -> Dentry:
        assert sb.root is not None
        return sb.root

    def _mount(self, sb: Superblock, root: Dentry, on: Path | None, read_only: bool) -> Mount:
        sb.active += 1
        if sb.state == "BORN":
            SUPERBLOCK.advance(sb, "activate")
        self.dget(root)
        return Mount(sb, root, on, read_only)

    def mount(self, sb: Superblock, path: AnyPath, read_only: bool = False) -> Op[Mount]:
        """Mount a filesystem on a directory. Raises ENOENT, ENOTDIR, EBUSY for one that ended."""
        on = yield from self.walk(path)
        return (yield from self._attach_mount(sb, None, on, read_only))

    def bind(self, old: AnyPath, new: AnyPath, read_only: bool = False) -> Op[Mount]:
        """Let what is at ``old`` be seen at ``new``, too. Raises ENOENT, ENOTDIR."""
        on = yield from self.walk(new)
        try:
            source = yield from self.walk(old)
        except OSError:
            yield from self.put(on)
            raise
        work = self._attach_mount(source.mount.sb, source.dentry, on, read_only)
        return (yield from self.then_put(work, source))

    # ``place``: what is bound. The mount takes the path ``on`` over; on failure it is let go of.
    def _attach_mount(
        self, sb: Superblock, place: Dentry | None, on: Path, read_only: bool
    ) -> Op[Mount]:
        yield from self.namespace.take("lock namespace")
        with self.namespace:
            on = yield from self.cross(on)  # somebody may have mounted there since (lock_mount)
            inode = on.dentry.inode
            root = sb.root if place is None else place
            if inode is None or inode.dead or on.mount.state != "ATTACHED":
                code = errno.ENOENT
            elif root is None or sb.state not in ("BORN", "ACTIVE"):
                code = errno.EBUSY
            elif inode.is_dir != root.target.is_dir:
                code = errno.ENOTDIR
            else:
                mount = self._mount(sb, root, on, read_only)
                on.mount.covers[on.dentry] = mount
                on.dentry.mounted += 1
                return mount
        yield from self.put(on)
        fail(code)

    def unmount(self, path: AnyPath, lazy: bool = False) -> Op[None]:
        """Unmount what is at a path. ``lazy``: out of sight now, gone with its last user.

        Raises EINVAL when nothing is mounted there, and EBUSY when it is used.
        """
        here = yield from self.walk(path)
        mount = here.mount
        if here.dentry is not mount.root or mount.on is None:
            yield from self.put(here)
            fail(errno.EINVAL)
        yield from self.namespace.take("lock namespace")
        with self.namespace:
            code = 0
            if mount.state != "ATTACHED":
                code = errno.EINVAL
            elif not lazy and mount.refs > 2:  # itself and our path; what is mounted on it has more
                code = errno.EBUSY
            else:
                detached = self._detach_mount(mount)
        yield from self.dput(here.dentry)
        yield from self.mntput(mount)
        if code:
            fail(code)
        for one in detached:
            yield from self.mntput(one)

    def _detach_mount(self, mount: Mount) -> list[Mount]:
        """Take a mount, and those on it, out of sight; their own references are the caller's."""
        found = [mount]
        for one in found:
            found += one.covers.values()
        for one in reversed(found):
            on = one.on
            assert on is not None
            del on.mount.covers[on.dentry]
            on.dentry.mounted -= 1
            MOUNT.advance(one, "detach")
        return found[::-1]

    def mntput(self, mount: Mount) -> Op[None]:
        """Let go of a mount; with the last reference it goes, and the filesystem may, too."""
        mount.refs -= 1
        if mount.refs:
            return
        MOUNT.advance(mount, "free")
        yield from self.dput(mount.root)
        if mount.on is not None:
            yield from self.put(mount.on)
        yield from self.deactivate(mount.sb)

    def deactivate(self, sb: Superblock) -> Op[None]:
        """Let go of an active filesystem; the last one shuts it down."""
        sb.active -= 1
        if sb.active:
            return
        SUPERBLOCK.advance(sb, "shut down")
        yield from sb.umount.take("lock s_umount to shut down")
        with sb.umount:
            yield from self.sync_filesystem(sb)
            if sb.pending:
                yield Until("wait for error reports", sb.quiet, sb)
            if self.notify is not None:
                yield "end marks"
                self.notify.unmount(sb.key)
            for dentry in self.cached(sb):
                if dentry is sb.root:
                    continue
                if sb.disk.memory and dentry.state == "POSITIVE":
                    dentry.refs -= 1  # what it had for being a name
                if not dentry.refs and dentry.state in ("POSITIVE", "NEGATIVE"):
                    yield from self._shut(dentry)
            root, sb.root = self._root(sb), None
            yield from self.dput(root)
            for inode in list(sb.inodes.values()):
                if inode.state == "LIVE" and not inode.refs:
                    yield from self.evict(inode)
            SUPERBLOCK.advance(sb, "free")

    def _shut(self, dentry: Dentry) -> Op[None]:
        parent = yield from self.kill(dentry)
        if parent is not None:
            yield from self.dput(parent)

    # -- paths --

    def walk(self, path: AnyPath) -> Op[Path]:
        """Return the place a path leads to. Raises ENOENT, ENOTDIR, ENAMETOOLONG."""
        parent, last = yield from self.walk_parent(path)
        if not last:
            return parent
        try:
            return (yield from self.step(parent, last))
        except OSError:
            yield from self.put(parent)
            raise

    def walk_parent(self, path: AnyPath) -> Op[tuple[Path, bytes]]:
        """Return the directory in which a path's last name is, and that name.

        The name may be ``b"."`` or ``b".."``; of ``/`` it is ``b""``, and the place is the root.
        """
        names = split(path)
        mount = self.root
        assert mount is not None
        here = Path(mount, mount.root)
        self.path_get(here)
        last = names.pop() if names else b""
        try:
            for name in names:
                here = yield from self.step(here, name)
            if not here.dentry.target.is_dir:
                fail(errno.ENOTDIR)
        except OSError:
            yield from self.put(here)
            raise
        return here, last

    def step(self, here: Path, name: bytes) -> Op[Path]:
        """Go from a directory to what a name in it leads to, which takes the place of ``here``.

        Raises OSError, with ``here`` still the caller's.
        """
        if not here.dentry.target.is_dir:
            fail(errno.ENOTDIR)
        if name == b".":
            return here
        if name == b"..":
            there = self.up(here)
            self.path_get(there)
            yield from self.put(here)
            return (yield from self.cross(there))
        dentry = yield from self.look(here.dentry, name)
        if dentry.inode is None:
            yield from self.dput(dentry)
            fail(errno.ENOENT)
        yield from self.dput(here.dentry)
        return (yield from self.cross(Path(here.mount, dentry)))

    def cross(self, place: Path) -> Op[Path]:
        """Go to what is mounted on a place, which takes its place."""
        while (mount := place.mount.covers.get(place.dentry)) is not None:
            there = Path(mount, mount.root)
            self.path_get(there)
            yield from self.put(place)
            place = there
        return place

    def up(self, here: Path) -> Path:
        """Return the place of the parent; above the root of all is itself."""
        while here.dentry is here.mount.root and here.mount.on is not None:
            here = here.mount.on
        if here.dentry is here.mount.root or here.dentry.parent is None:
            return here
        return Path(here.mount, here.dentry.parent)

    def path_get(self, path: Path) -> None:
        """Reference a place that the caller knows to be referenced."""
        path.mount.refs += 1
        path.dentry.refs += 1

    def put(self, path: Path) -> Op[None]:
        """Let go of a place."""
        yield from self.dput(path.dentry)
        yield from self.mntput(path.mount)

    def then_put(self, work: Op[T], path: Path) -> Op[T]:
        """Run an operation, then let go of a place, also when it fails."""
        try:
            result = yield from work
        except OSError:
            yield from self.put(path)
            raise
        yield from self.put(path)
        return result


def split(path: AnyPath) -> list[bytes]:
    """Return the names of an absolute path. Raises ENOENT for an empty one, and ValueError."""
    data = os.fsencode(path)
    if not data:
        fail(errno.ENOENT)
    if not data.startswith(b"/") or (data.endswith(b"/") and data.strip(b"/")):
        raise ValueError(f"not an absolute path without a slash at its end: {path!r}")
    return [name for name in data.split(b"/") if name]
