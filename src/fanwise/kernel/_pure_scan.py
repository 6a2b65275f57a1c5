"""scan_dirs in Python: the twin of `_scan.c`, with the same answers."""

import os
import stat
from collections.abc import Sequence

from fanwise._errors import FanwiseError, NotWatchable

from .handles import name_to_handle, open_by_handle


def scan_dirs(
    mount_fd: int, keys: Sequence[bytes], names: bool = False
) -> tuple[
    list[tuple[bytes, bytes, bytes, bool]], list[tuple[bytes, int]], list[tuple[bytes, bytes]]
]:
    """List the subdirectories of some directories: [(key, parent key, name, leaf)], [(key, errno)].

    A leaf has no subdirectory itself: two links, "." and the name, so no "..". Filesystems that do
    not count (btrfs: 1) have none.
    A name on which something is mounted is no subdirectory: its handle is hidden.
    With ``names`` also [(key, names)]: all names of each, each with a NUL behind it, and with a
    slash before that if it is a directory's.
    """
    found: list[tuple[bytes, bytes, bytes, bool]] = []
    failed: list[tuple[bytes, int]] = []
    lists: list[tuple[bytes, bytes]] = []
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOATIME
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
                    if not entry.is_dir(follow_symlinks=False):
                        listed.append(name + b"\0")
                        continue
                    listed.append(name + b"/\0")
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


def _errno(error: OSError | NotWatchable) -> int:
    # A refusal with a reason keeps the error it began as.
    cause = error if isinstance(error, OSError) else error.__cause__
    return (cause.errno if isinstance(cause, OSError) else None) or 0
