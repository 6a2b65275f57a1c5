"""What health can hear of here: each channel is tried, nothing is guessed, nothing of it stays."""

import ctypes
import errno
import os

import msgspec

from fanwise._errors import FanwiseError
from fanwise.kernel.libc import libc
from fanwise.kernel.mounts import Mount, mount_of
from fanwise.sources.counters import place_of, read
from fanwise.sources.errortrace import ErrorTrace
from fanwise.sources.fserror import FsErrors, is_local
from fanwise.sources.kmsg import Kmsg

# XFS_IOC_HEALTH_MONITOR, _IOW('X', 68, struct xfs_health_monitor) (Linux 7.0).
_MONITOR = 1 << 30 | 32 << 16 | ord("X") << 8 | 68


class Channel(msgspec.Struct, frozen=True):
    """Whether a channel of errors works for a path, else the reason, with what to do about it.

    ``works`` is None where it does not apply, or could not be tried.
    """

    works: bool | None
    reason: str | None = None


def channels(path: str | os.PathLike[str] = "/") -> dict[str, Channel]:
    """Try each channel for the filesystem of ``path``.

    The names are ``fs_error_mark`` (errors by fanotify), ``tracefs`` (a private instance, with
    every event that health wants), ``counters`` (of the filesystem, in sysfs), ``kmsg`` (the
    kernel's log) and ``xfs_health_monitor`` (of Linux 7.0; only whether it is there: it has one
    reader, and health is not it yet).

    Raises NoSuchRoot and others, as `mount_of` does.
    """
    mount = mount_of(path)
    return {
        "fs_error_mark": _mark(mount),
        "tracefs": _trace(),
        "counters": _counters(mount),
        "kmsg": _kmsg(),
        "xfs_health_monitor": _monitor(mount),
    }


def _mark(mount: Mount) -> Channel:
    if not is_local(mount):
        return Channel(None, f"{mount.fstype} is not a filesystem of this machine's devices")
    source = FsErrors()
    try:
        with source:
            source.follow([mount])
            state = source.status()
    except (FanwiseError, OSError) as error:
        return Channel(False, str(error))
    if state.state != "up":
        return Channel(False, state.reason)
    if mount.fstype not in ("ext2", "ext3", "ext4"):
        return Channel(
            True, f"up to Linux 6.18 the mark on {mount.fstype} is taken and told nothing"
        )
    return Channel(True)


def _trace() -> Channel:
    source = ErrorTrace()
    try:
        source.open()
        state = source.status()
    finally:
        source.close()
    return Channel(state.state != "down", state.reason)


def _counters(mount: Mount) -> Channel:
    place = place_of(mount)
    reading = read(place)
    if reading.garbage:
        bad = reading.garbage[0]
        return Channel(False, f"{bad.path} {bad.why}")
    if reading.ext4 is not None and reading.ext4.errors is not None:
        return Channel(True)
    if reading.btrfs:
        return Channel(True)
    return Channel(None, f"{mount.fstype} counts no errors")


def _kmsg() -> Channel:
    try:
        with Kmsg():
            return Channel(True)
    except (FanwiseError, OSError) as error:
        return Channel(False, str(error))


def _monitor(mount: Mount) -> Channel:
    if mount.fstype != "xfs":
        return Channel(None, "it is of xfs")
    try:
        fd = os.open(mount.mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        return Channel(None, f"cannot be tried: {error.strerror}")
    try:
        # Nothing to read the wish from: where it is there, it fails before it takes the one place.
        libc.ioctl(ctypes.c_int(fd), ctypes.c_ulong(_MONITOR), ctypes.c_void_p(None))
        code = ctypes.get_errno()
    finally:
        os.close(fd)
    if code in (errno.ENOTTY, errno.EINVAL):
        return Channel(False, "this kernel has none (Linux 7.0 with XFS has)")
    return Channel(True, "it is there, and not read by fanwise yet")
