"""Look-ups on the watched filesystem: where a directory is, what a name leads to.

An idle watch holds no descriptor of a watched filesystem, so that umount works: a Lookup opens one
when it is first asked and closes it when its ``with`` block ends, which is one slice.

Linux reference: open_by_handle_at(2), name_to_handle_at(2). The mount descriptor cannot be O_PATH.
"""

import errno
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any

from fanwise._errors import FanwiseError, FilesystemRefuses, NotWatchable
from fanwise.kernel.handles import name_to_handle, open_by_handle
from fanwise.kernel.mounts import Mount, mount_id

_PATH = os.O_PATH | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

AT = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC  # to point at a directory: it raises no event

# (key, parent key or None where the mount ends, name): one step of the way up.
Link = tuple[bytes, bytes | None, bytes]


def open_mount(mount: Mount, flags: int = _READ) -> int:
    """Open the root of a mount, for reading by default; the caller owns the descriptor.

    Raises NotWatchable when its path leads to another mount now: it was unmounted or covered.
    """
    try:
        fd = os.open(mount.mount_point, flags)
    except OSError as error:
        raise NotWatchable(mount.mount_point, f"cannot be opened: {error.strerror}") from error
    try:
        if mount_id(fd) == mount.id:  # not by a handle: there may be none
            return fd
    except (OSError, FanwiseError):
        os.close(fd)
        raise
    os.close(fd)
    raise NotWatchable(mount.mount_point, "another mount covers it")


def try_handles(mount: Mount) -> None:
    """Open the mount's top by its handle, for a trial. Raises NotWatchable, with the reason."""
    fd = open_mount(mount)
    try:
        key, _ = name_to_handle(b"", fd, empty=True)
        os.close(open_by_handle(fd, key))
    except OSError as error:
        raise FilesystemRefuses(
            mount.mount_point, f"{mount.fstype} has file handles, but does not open them"
        ) from error
    finally:
        os.close(fd)


class CannotLook(FanwiseError):
    """No look could be taken, which says nothing about the disk: it is not "gone"."""


# What these say of an object or a name is that it is not there.
ABSENT = (errno.ENOENT, errno.ESTALE, errno.ENOTDIR)


def _unless_absent(error: OSError) -> None:
    if error.errno not in ABSENT:
        raise CannotLook(f"a look at the filesystem failed: {error.strerror}") from error


class Lookup:
    """Answers about one mount; ``with`` it, or ``close()`` it when the slice ends.

    ``handle`` gives a key and a mount id, as name_to_handle does.
    """

    handle: Callable[..., tuple[bytes, int]] = staticmethod(name_to_handle)

    def __init__(self, mount: Mount) -> None:
        self.mount = mount
        self.held = False  # a descriptor, until close()
        self._fd = -1

    def __enter__(self) -> "Lookup":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; the next question opens another."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.held = False

    def _open(self, key: bytes, flags: int = _PATH) -> int:
        # -1: the object is gone.
        if self._fd < 0:
            try:
                self._fd = open_mount(self.mount)
            except NotWatchable as error:
                raise CannotLook(str(error)) from error
            self.held = True
        try:
            return open_by_handle(self._fd, key, flags)
        except OSError as error:
            _unless_absent(error)
            return -1

    def locate(self, key: bytes, known: Callable[[bytes], bool]) -> list[Link] | None:
        """Give the way from a directory up to the first known one, or to where the mount ends.

        None when the directory is gone. Each step of the way was true during the call.
        Raises CannotLook, as all of these questions do.
        """
        fd = self._open(key, _PATH | os.O_DIRECTORY)
        return None if fd < 0 else self._way(fd, key, known, 16)

    def locate_at(self, path: str, key: bytes, known: Callable[[bytes], bool]) -> list[Link] | None:
        """Do the same for a directory that most likely is at a path.

        If it is there nothing is opened for reading: that raises no event, and needs no helper.
        """
        try:
            fd = os.open(path, _PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            return self.locate(key, known)
        try:
            here = self.handle(b"", fd, empty=True)
        except (OSError, FanwiseError):
            os.close(fd)
            raise
        if here != (key, self.mount.id):
            os.close(fd)
            return self.locate(key, known)
        way = self._way(fd, key, known, 4)
        return self.locate(key, known) if way is None else way

    def _way(
        self, fd: int, key: bytes, known: Callable[[bytes], bool], attempts: int
    ) -> list[Link] | None:
        try:
            # The path gives all names at once, if it is the same before and after the climb. In a
            # tree that keeps moving each name is looked for in its parent.
            for attempt in range(attempts):
                before = _fd_path(fd) if attempt < 4 else None
                try:
                    way = self._climb(fd, key, before, known)
                except OSError as error:
                    _unless_absent(error)
                    way = None
                if not os.fstat(fd).st_nlink:
                    return None
                if way is not None and (before is None or before == _fd_path(fd)):
                    return way
            return None
        finally:
            os.close(fd)

    def _climb(
        self, fd: int, key: bytes, path: bytes | None, known: Callable[[bytes], bool]
    ) -> list[Link] | None:
        # None: the tree changed on the way.
        base = self.mount.mount_point.rstrip(b"/")
        names: list[bytes] | None = None
        if path is not None:
            if path != self.mount.mount_point and not path.startswith(base + b"/"):
                return [(key, None, b"")]  # reachable by handle, but not below this mount
            names = [n for n in path[len(base) :].split(b"/") if n]
        way: list[Link] = []
        here = os.dup(fd)
        try:
            while True:
                up = os.open(b"..", _PATH | os.O_DIRECTORY, dir_fd=here)
                try:
                    try:
                        parent, mount = self.handle(b"", up, empty=True)
                    except NotWatchable:  # no handles there: it is not below this mount any more
                        if mount_id(up) != self.mount.id:
                            return way
                        raise
                    if mount != self.mount.id or parent == key:
                        return way
                    if names is None:
                        name = _name_in(up, here, key, self.handle)
                    else:
                        name = names.pop() if names else None
                    if name is None:
                        return None
                finally:
                    os.close(here)
                    here = up
                way.append((key, parent, name))
                key = parent
                if known(key):
                    return way
        finally:
            os.close(here)

    def key_of(self, directory: bytes, name: bytes) -> bytes | None:
        """Give the key of what a name in a directory leads to; None when it leads to nothing."""
        fd = self._open(directory, _PATH | os.O_DIRECTORY)
        if fd < 0:
            return None
        try:
            return name_to_handle(name, fd)[0]
        except OSError as error:
            _unless_absent(error)
            return None
        except NotWatchable as error:  # what is mounted there has no handles
            raise CannotLook(str(error)) from error
        finally:
            os.close(fd)

    def names_in(self, key: bytes) -> list[tuple[bytes, bytes, bool]]:
        """List a directory: (name, key, whether it is a directory); nothing when it is gone."""
        fd = self._open(key, _READ | os.O_NOATIME)
        if fd < 0:
            return []
        found = []
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    try:
                        found.append(
                            (name, name_to_handle(name, fd)[0], entry.is_dir(follow_symlinks=False))
                        )
                    except FileNotFoundError:
                        continue  # removed meanwhile: the stream tells
        except OSError as error:
            _unless_absent(error)
        except NotWatchable as error:
            raise CannotLook(str(error)) from error
        finally:
            os.close(fd)
        return found

    def links(self, key: bytes) -> int:
        """Count an object's links: 0 when only open files hold it, -1 when it is gone."""
        fd = self._open(key)
        if fd < 0:
            return -1
        try:
            return os.fstat(fd).st_nlink
        finally:
            os.close(fd)


def _fd_path(fd: int) -> bytes | None:
    try:
        return os.readlink(b"/proc/self/fd/%d" % fd)
    except OSError:  # ENAMETOOLONG: deeper than a page of path
        return None


def _name_in(parent: int, child: int, key: bytes, handle: Callable[..., Any]) -> bytes | None:
    inode = os.fstat(child).st_ino
    try:
        fd = os.open(b".", _READ, dir_fd=parent)
    except OSError:
        return None
    try:
        with os.scandir(fd) as entries:
            for entry in entries:
                name = os.fsencode(entry.name)
                try:
                    if entry.inode() == inode and handle(name, fd)[0] == key:
                        return name
                except OSError:
                    continue
    finally:
        os.close(fd)
    return None
