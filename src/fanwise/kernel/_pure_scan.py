"""What `_scan.c` does, in Python, with the same answers: scan, mark, look."""

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Collection, Sequence
from typing import Any

from fanwise._errors import FanwiseError, NotWatchable

from .contract import LIST_FILES, LISTED, LISTED_DIR, LISTED_HIDDEN
from .handles import identify, name_to_handle, open_by_handle
from .libc import AT_NO_AUTOMOUNT, last_error, libc
from .mounts import mount_id

_AT_SYMLINK_NOFOLLOW = 0x100
_STATX_BASIC_STATS = 0x7FF
_STATX_BTIME = 0x800
_ATTR_MOUNT_ROOT = 0x2000
# Of struct statx: mask, attributes, mode, ino, size; btime, ctime and mtime in seconds and ns.
_statx = struct.Struct("=I4xQ12xH2xQQ16x16xqI4xqI4xqI").unpack_from
_buffer = ctypes.c_char * 256
_pack = struct.Struct(LISTED).pack


def scan_dirs(
    mount_fd: int, keys: Sequence[bytes], names: int = 0
) -> tuple[
    list[tuple[bytes, bytes, bytes, bool]], list[tuple[bytes, int]], list[tuple[bytes, bytes]]
]:
    """List the subdirectories of some directories: [(key, parent key, name, leaf)], [(key, errno)].

    A leaf has no subdirectory itself: two links, "." and the name, so no "..". Filesystems that do
    not count (btrfs: 1) have none.
    A name on which something is mounted is no subdirectory: its handle is hidden.
    With ``names`` 1 also [(key, names)]: all names of each, each with a NUL behind it, and with a
    slash before that if it is a directory's. With 2, entries with identity, size and times, as
    `contract.LISTED`, each with its name behind it; what is gone when it is looked at is left out.
    """
    found: list[tuple[bytes, bytes, bytes, bool]] = []
    failed: list[tuple[bytes, int]] = []
    lists: list[tuple[bytes, bytes]] = []
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOATIME
    if names not in (0, 1, 2):
        raise ValueError("names: 0, 1 or 2")
    for key in keys:
        if not 4 <= len(key) <= 132:
            raise ValueError("not a handle key")
    for key in keys:
        try:
            fd = open_by_handle(mount_fd, key, flags)
        except (OSError, NotWatchable) as error:
            failed.append((key, _errno(error)))
            continue
        try:
            mine = None
            listed: list[bytes] = []
            with os.scandir(fd) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    is_dir = entry.is_dir(follow_symlinks=False)
                    if names == 2:
                        row = _entry(fd, name, is_dir)
                        if row is None:
                            continue
                        listed.append(row)
                    elif names:
                        listed.append(name + (b"/\0" if is_dir else b"\0"))
                    if not is_dir:
                        continue
                    if mine is None:
                        mine = name_to_handle(b"", fd, empty=True)[1]
                    try:
                        child, mount = name_to_handle(name, fd)
                        if mount != mine:
                            continue
                        now = entry.stat(follow_symlinks=False)
                    except (OSError, FanwiseError):
                        continue  # removed meanwhile: the stream tells
                    if stat.S_ISDIR(now.st_mode):
                        found.append((child, key, name, now.st_nlink == 2))
            if names:
                lists.append((key, b"".join(listed)))
        except (OSError, NotWatchable) as error:
            failed.append((key, _errno(error)))
        finally:
            os.close(fd)
    return found, failed, lists


def _entry(fd: int, name: bytes, is_dir: bool) -> bytes | None:
    # A name of a listing with its inode, size and times; None when it is gone.
    data: Any = _buffer()
    flags = _AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT
    if libc.statx(fd, name, flags, _STATX_BASIC_STATS | _STATX_BTIME, data) < 0:
        error = last_error(name)
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        hidden = LISTED_HIDDEN | (LISTED_DIR if is_dir else 0)
        return _pack(0, 0, 0, 0, hidden, len(name), 0) + name
    mask, bits, mode, ino, size, *times = _statx(data)
    what = LISTED_DIR if stat.S_ISDIR(mode) else 0
    if bits & _ATTR_MOUNT_ROOT:
        return _pack(0, 0, 0, 0, what | LISTED_HIDDEN, len(name), 0) + name
    born, ctime, mtime = (_ns(*times[i : i + 2]) for i in (0, 2, 4))
    # Inode numbers are used again at once (ext4): with the birth time, where there is one, it is
    # unlikely that another file looks the same.
    if mask & _STATX_BTIME:
        ino ^= born * 0x9E3779B97F4A7C15 % 2**64
    return _pack(ino, size, mtime, ctime, what, len(name), 0) + name


def _ns(seconds: int, ns: int) -> int:
    return max(-(2**63), min(seconds * 10**9 + ns, 2**63 - 1))


def mark_dirs(
    group: int, inotify: bool, mask: int, items: Sequence[tuple[bytes, bytes]], what: int
) -> tuple[list[tuple[bytes, bytes, bytes, bool]], list[tuple[int, int]]]:
    """Mark directories, each a (key, path), then list them: the mark misses nothing of the list.

    Returns [(key, parent key, name, is directory)] of the subdirectories, or with LIST_FILES in
    ``what`` of everything inside, and an (errno, watch descriptor) for each directory: ESTALE when
    another one stands at the path, -1 where ``group`` is not of inotify. A directory with two links
    is a leaf, and is not listed; with LIST_LEAVES it is.
    """
    found: list[tuple[bytes, bytes, bytes, bool]] = []
    ends: list[tuple[int, int]] = []
    for key, _ in items:
        if not 4 <= len(key) <= 132:
            raise ValueError("not a handle key")
    for key, path in items:
        watch = -1
        try:
            fd = _open_noatime(path)
        except OSError as error:
            ends.append((error.errno or 0, watch))
            continue
        code = 0
        try:
            here, mine = identify(b"", fd, empty=True)
            if here != key:
                raise OSError(errno.ESTALE, "another directory stands there now")
            watch = _mark(group, inotify, mask, fd)
            if what or os.fstat(fd).st_nlink != 2:
                _list(fd, key, mine, bool(what & LIST_FILES), found)
        except (OSError, NotWatchable) as error:
            code = _errno(error)
        finally:
            os.close(fd)
        ends.append((code, watch))
    return found, ends


def present_in(
    items: Sequence[tuple[bytes, bytes, Collection[bytes]]], mount: int
) -> list[int | list[bytes]]:
    """Say which names lead to anything in some directories, each a (key, path, names).

    Returns for each the names, or an errno: ESTALE when another directory, or another mount than
    that of this id, stands at the path. A name at which no look can be taken is among them.
    """
    out: list[int | list[bytes]] = []
    for key, _, _ in items:
        if not 4 <= len(key) <= 132:
            raise ValueError("not a handle key")
    for key, path, names in items:
        try:
            fd = open_long(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            out.append(error.errno or 0)
            continue
        try:
            if identify(b"", fd, empty=True) != (key, mount):
                raise OSError(errno.ESTALE, "another directory stands there now")
            out.append([name for name in names if _maybe(name, fd)])
        except (OSError, NotWatchable) as error:
            out.append(_errno(error))
        finally:
            os.close(fd)
    return out


def mount_at(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> int:
    """Return the id of the mount that a path leads to; links are not followed. Raises OSError."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return mount_id(fd)
    finally:
        os.close(fd)


def _maybe(name: bytes, fd: int) -> bool:
    try:
        os.stat(name, dir_fd=fd, follow_symlinks=False)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
    return True


def _mark(group: int, inotify: bool, mask: int, fd: int) -> int:
    watch = -1
    if inotify:
        done = watch = libc.inotify_add_watch(group, b"/proc/self/fd/%d" % fd, mask)
    else:
        done = libc.fanotify_mark(group, 1, mask, fd, None)
    if done < 0:
        raise last_error()
    return watch


def _list(
    fd: int, key: bytes, mine: int, all: bool, found: list[tuple[bytes, bytes, bytes, bool]]
) -> None:
    with os.scandir(fd) as entries:
        for entry in entries:
            try:
                is_dir = entry.is_dir(follow_symlinks=False)
                if not is_dir and not all:
                    continue
                name = os.fsencode(entry.name)
                child, mount = identify(name, fd)
            except (OSError, FanwiseError):
                continue  # removed meanwhile: the stream tells
            if mount == mine:
                found.append((child, key, name, is_dir))


def _open_noatime(path: bytes) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return open_long(path, flags | os.O_NOATIME)
    except PermissionError as error:
        if error.errno != errno.EPERM:
            raise
        return open_long(path, flags)  # another user's


def open_long(path: bytes, flags: int) -> int:
    """Open a path that may be longer than the kernel takes at once. Raises OSError."""
    at = -1
    try:
        while len(path) > 4000:
            cut = path.rfind(b"/", 1, 4001)
            if cut < 0:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            step = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            below = os.open(path[:cut], step, dir_fd=at if at >= 0 else None)
            at, before = below, at
            if before >= 0:
                os.close(before)
            path = path[cut + 1 :]
        return os.open(path, flags, dir_fd=at if at >= 0 else None)
    finally:
        if at >= 0:
            os.close(at)


def _errno(error: OSError | NotWatchable) -> int:
    # A refusal with a reason keeps the error it began as.
    cause = error if isinstance(error, OSError) else error.__cause__
    return (cause.errno if isinstance(cause, OSError) else None) or 0
