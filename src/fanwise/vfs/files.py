"""Operations on files: open, read, write, sendfile, truncate, fsync, close.

LOCKING   freeze protection, then the inode's lock for what changes content; reading takes none.
          Who gives verdicts is asked before either, except where `Guard.inside` says otherwise.
Linux reference: fs/open.c, fs/read_write.c, fs/splice.c, fs/sync.c, fs/file_table.c.
"""

import errno
import os

from fanwise.notify import mask as m

from . import errseq
from .dentry import Dentry
from .disk import FILE
from .file import FILE as LIFE, File
from .guard import SENDING, TRUNCATING, TRUNCATING_OPEN, WRITING
from .mount import Mount, Path
from .namei import Names, Stat, stat_of
from .namespace import AnyPath
from .protocol import Op, fail
from .superblock import PAGEFAULT

_PIPE = 16  # pages that sendfile has in hand


class Files(Names):
    """The layer of open files."""

    # -- opening and closing --

    def open(
        self, path: AnyPath, flags: int = os.O_RDONLY, mode: int = 0o644, silent: bool = False
    ) -> Op[File]:
        """Open what a path leads to, with flags O_CREAT, O_EXCL, O_TRUNC, O_APPEND, O_DIRECTORY.

        Raises ENOENT, ENOTDIR, EISDIR, EEXIST, EROFS, EINVAL, and what a verdict denies with.
        """
        if flags & os.O_CREAT and flags & os.O_DIRECTORY:
            fail(errno.EINVAL)
        here, name = yield from self.walk_parent(path)
        created = False
        if name in (b".", b".."):
            here = yield from self.step(here, name)  # fails for no directory
        elif name:
            dentry, created = yield from self._open_last(here, name, flags, mode)
            if dentry.inode is None:
                yield from self.dput(dentry)
                yield from self.put(here)
                fail(errno.ENOENT)
            yield from self.dput(here.dentry)
            here = yield from self.cross(Path(here.mount, dentry))
        try:
            return (yield from self.open_path(here, flags, silent, created))
        except OSError:
            yield from self.put(here)
            raise

    # The last name's dentry; on failure ``here`` is let go of.
    def _open_last(self, here: Path, name: bytes, flags: int, mode: int) -> Op[tuple[Dentry, bool]]:
        yield "look up"
        if not flags & os.O_CREAT or not flags & os.O_EXCL:
            dentry = self.d_lookup(here.dentry, name)
            if dentry is not None:
                if dentry.inode is not None or not flags & os.O_CREAT:
                    return dentry, False
                yield from self.dput(dentry)
        try:
            return (yield from self._open_slow(here, name, flags, mode))
        except OSError:
            yield from self.put(here)
            raise

    # A name that the cache does not know, or that may have to be made. Protection is taken for what
    # may turn out to change nothing, too.
    def _open_slow(self, here: Path, name: bytes, flags: int, mode: int) -> Op[tuple[Dentry, bool]]:
        folder = here.dentry.target
        if not flags & (os.O_CREAT | os.O_TRUNC | os.O_ACCMODE):
            yield from folder.lock.share("lock directory to look up")
            with folder.lock:
                return (yield from self.look_locked(here.dentry, name)), False
        held, code = yield from self.try_want_write(here.mount)
        with held:
            if not flags & os.O_CREAT:
                yield from folder.lock.share("lock directory to look up")
                with folder.lock:
                    return (yield from self.look_locked(here.dentry, name)), False
            yield from folder.lock.take("lock directory")
            with folder.lock:
                dentry = yield from self.look_locked(here.dentry, name)
                if dentry.inode is not None:
                    if flags & os.O_EXCL:
                        yield from self.dput(dentry)
                        fail(errno.EEXIST)
                    return dentry, False
                if code:
                    yield from self.dput(dentry)
                    fail(code)
                try:
                    yield from self.make_node(here.dentry, dentry, FILE, mode)
                except OSError:
                    yield from self.dput(dentry)
                    raise
                return dentry, True

    def open_path(
        self, path: Path, flags: int, silent: bool = False, created: bool = False
    ) -> Op[File]:
        """Open a place, which the file takes over; on failure it is still the caller's."""
        inode = path.dentry.target
        writes = flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)
        if flags & os.O_CREAT and not created:
            if flags & os.O_EXCL:
                fail(errno.EEXIST)
            if inode.is_dir:
                fail(errno.EISDIR)
        if flags & os.O_DIRECTORY and not inode.is_dir:
            fail(errno.ENOTDIR)
        file = File(path, flags, silent)
        if flags & os.O_TRUNC and not created and not inode.is_dir:
            if _read_only(path.mount):
                fail(errno.EROFS)
            yield from self.guard.guarded(
                path.mount.sb,
                TRUNCATING_OPEN,
                lambda: self._vfs_open(file),
                lambda: self._truncate_opened(file),
            )
            return file
        if inode.is_dir and writes:
            fail(errno.EISDIR)
        if writes and not created and _read_only(path.mount):
            fail(errno.EROFS)
        yield from self._vfs_open(file)
        return file

    def _vfs_open(self, file: File) -> Op[None]:
        if not self.guard.silent(file):
            yield from self.ask(m.OPEN_PERM, file)
        yield "open"
        inode = file.path.dentry.target
        file.wb_err = errseq.sample(inode.wb_err)
        file.sb_err = errseq.sample(inode.sb.wb_err)
        inode.writers += file.writable
        file.asks = self.may_be_asked(file)
        LIFE.advance(file, "open")
        yield from self.tell_file(m.OPEN, file)

    # The caller of open_path lets go of the path, as for a file that never was.
    def _truncate_opened(self, file: File) -> Op[None]:
        yield from self._cut(file.path, 0)

    def close(self, file: File) -> Op[None]:
        """Close a file. Raises EBADF for one that is not open."""
        if file.state != "OPEN":
            fail(errno.EBADF)
        inode = file.path.dentry.target
        yield from self.tell_file(m.CLOSE_WRITE if file.writable else m.CLOSE_NOWRITE, file)
        yield "close"
        inode.writers -= file.writable
        LIFE.advance(file, "close")
        yield from self.put(file.path)

    def fstat(self, file: File) -> Op[Stat]:
        """Return what an open object is. Raises EBADF."""
        self._opened(file)
        yield "stat"
        return stat_of(file.path.dentry.target)

    # -- content --

    def read(self, file: File, count: int, at: int | None = None) -> Op[bytes]:
        """Read up to ``count`` bytes, at the file's position or ``at`` another.

        Raises EBADF, EISDIR, errors of the device, and what a verdict denies with.
        """
        self._opened(file, reading=True)
        start = file.pos if at is None else at
        yield from self._ask_access(file, start, count, reading=True)
        inode = file.path.dentry.target
        if inode.is_dir:
            fail(errno.EISDIR)
        data = yield from self.get_bytes(inode, start, count)
        if at is None:
            file.pos = start + len(data)
        if data:
            yield from self.tell_file(m.ACCESS, file)
        return data

    def readdir(self, file: File) -> Op[list[bytes]]:
        """Return the names in a directory, sorted. Raises EBADF, ENOTDIR, ENOENT if removed."""
        self._opened(file)
        inode = file.path.dentry.target
        if not inode.is_dir:
            fail(errno.ENOTDIR)
        if not self.guard.silent(file):
            yield from self.ask(m.ACCESS_PERM, file)
        yield from inode.lock.share("lock directory to read")
        with inode.lock:
            if inode.dead:
                fail(errno.ENOENT)
            yield "read names"
            names = sorted(inode.node.entries)
            yield from self.tell_file(m.ACCESS, file)
        return names

    def write(self, file: File, data: bytes, at: int | None = None) -> Op[int]:
        """Write bytes, at the file's position, ``at`` another, or at its end; how many.

        Raises EBADF, and what a verdict denies with. Waits while the filesystem is frozen.
        """
        self._opened(file, writing=True)
        start = file.pos if at is None else at
        return (
            yield from self.guard.guarded(
                file.path.mount.sb,
                WRITING,
                lambda: self._ask_access(file, start, len(data), reading=False),
                lambda: self._write(file, data, at),
            )
        )

    def _write(self, file: File, data: bytes, at: int | None) -> Op[int]:
        yield from self._put(file, data, at)
        if data:
            yield from self.tell_file(m.MODIFY, file)
        return len(data)

    def _put(self, file: File, data: bytes, at: int | None) -> Op[None]:
        inode = file.path.dentry.target
        yield from inode.lock.take("lock inode")
        with inode.lock:
            start = file.pos if at is None else at
            if file.flags & os.O_APPEND:
                start = inode.node.size
            yield from self.put_bytes(inode, data, start)
            if at is None:
                file.pos = start + len(data)

    def sendfile(self, out: File, source: File, count: int, at: int | None = None) -> Op[int]:
        """Copy bytes from one file to another; how many.

        Raises EBADF, EINVAL for directories and for appending, and what a verdict denies with.
        """
        self._opened(source, reading=True)
        start = source.pos if at is None else at
        return (
            yield from self.guard.guarded(
                out.path.mount.sb,
                SENDING,
                lambda: self._ask_to_send(out, source, start, count),
                lambda: self._send(out, source, count, at),
            )
        )

    def _ask_to_send(self, out: File, source: File, start: int, count: int) -> Op[None]:
        yield from self._ask_access(source, start, count, reading=True)
        self._opened(out, writing=True)
        yield from self._ask_access(out, out.pos, count, reading=False)

    def _send(self, out: File, source: File, count: int, at: int | None) -> Op[int]:
        if out.flags & os.O_APPEND or (count and source.path.dentry.target.is_dir):
            fail(errno.EINVAL)
        start = source.pos if at is None else at
        done, most = 0, _PIPE * source.path.dentry.sb.disk.page
        while done < count:
            data = yield from self.get_bytes(
                source.path.dentry.target, start + done, min(count - done, most)
            )
            if not data:
                break
            yield from self._put(out, data, None)
            done += len(data)
        if at is None:
            source.pos = start + done
        if done:
            yield from self.tell_file(m.ACCESS, source)
            yield from self.tell_file(m.MODIFY, out)
        return done

    def fault(self, file: File, number: int, data: bytes | None = None) -> Op[bytes]:
        """Touch a page through a mapping, and write ``data`` at its start; the page as it is then.

        Nobody is asked or told. A write takes the page-fault level.
        """
        inode = file.path.dentry.target
        size = inode.sb.disk.page
        if data is not None:
            held = yield from self.guard.start(inode.sb, PAGEFAULT)
            with held:
                yield from self.put_bytes(inode, data, number * size)
        return (yield from self.get_bytes(inode, number * size, size))

    def truncate(self, path: AnyPath, length: int) -> Op[None]:
        """Cut or extend a file. Raises ENOENT, ENOTDIR, EISDIR, EROFS, EINVAL."""
        if length < 0:
            fail(errno.EINVAL)
        here = yield from self.walk(path)
        yield from self.then_put(self._truncate(here, length), here)

    def _truncate(self, here: Path, length: int) -> Op[None]:
        if here.dentry.target.is_dir:
            fail(errno.EISDIR)
        file = File(here, os.O_WRONLY)  # never opened: it only carries the place to the hook
        file.asks = self.may_be_asked(file)
        if _read_only(here.mount):
            fail(errno.EROFS)
        yield from self.guard.guarded(
            here.mount.sb,
            TRUNCATING,
            lambda: self._ask_access(file, length, 0, reading=False),
            lambda: self._cut(here, length),
        )

    def ftruncate(self, file: File, length: int) -> Op[None]:
        """Cut or extend an open file. Raises EBADF, and EINVAL for one not open for writing."""
        self._opened(file)
        if length < 0 or not file.writable:
            fail(errno.EINVAL)
        yield from self.guard.guarded(
            file.path.mount.sb,
            TRUNCATING,
            lambda: self._ask_access(file, length, 0, reading=False),
            lambda: self._cut(file.path, length),
        )

    def _cut(self, path: Path, length: int) -> Op[None]:
        inode = path.dentry.target
        yield from inode.lock.take("lock inode")
        with inode.lock:
            yield "truncate"
            self.cut(inode, length)
            yield from self.tell_object(m.MODIFY, path.dentry)

    # -- syncing --

    def fsync(self, file: File) -> Op[None]:
        """Write a file back. Raises EBADF, and each write-back error once for each open file."""
        self._opened(file)
        inode = file.path.dentry.target
        yield from self.write_back(inode)
        yield "check for errors"
        code, inode_err = errseq.advance(inode.wb_err, file.wb_err)
        if code:
            inode.wb_err = file.wb_err = inode_err
            fail(code)

    def syncfs(self, file: File) -> Op[None]:
        """Write a whole filesystem back; raises as `fsync`, for errors of any of its files."""
        self._opened(file)
        sb = file.path.dentry.sb
        yield from sb.umount.share("lock s_umount to sync")
        with sb.umount:
            yield from self.sync_filesystem(sb)
        yield "check for errors"
        code, sb_err = errseq.advance(sb.wb_err, file.sb_err)
        if code:
            sb.wb_err = file.sb_err = sb_err
            fail(code)

    # -- parts --

    def _opened(self, file: File, reading: bool = False, writing: bool = False) -> None:
        if file.state != "OPEN":
            fail(errno.EBADF)
        if (reading and not file.readable) or (writing and not file.writable):
            fail(errno.EBADF)

    # What may be filled on demand is asked for by range, and then whether it may be read.
    def _ask_access(self, file: File, at: int, count: int, reading: bool) -> Op[None]:
        if self.guard.silent(file):
            return
        yield from self.ask(m.PRE_ACCESS, file, at, count)
        if reading:
            yield from self.ask(m.ACCESS_PERM, file)


def _read_only(mount: Mount) -> bool:
    return mount.read_only or mount.sb.read_only
