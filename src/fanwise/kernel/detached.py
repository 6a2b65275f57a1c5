"""A filesystem's top level, mounted and never attached: fsopen(2), fsconfig(2), fsmount(2).

btrfs gives each subvolume an id of its own, and fanotify refuses a filesystem mark through a
directory whose id is not the superblock's (EXDEV). The directory that it takes is the top level,
subvolume 5, which often is not mounted anywhere. It is mounted here without a place in the tree:
nothing shows in mountinfo, and it is gone when its descriptors are closed.

Read-only, always: a mount that asks for writing makes a superblock writable that was mounted
read-only, for everyone (measured on 6.18; btrfs_reconfigure_for_mount in fs/btrfs/super.c). One
that asks for reading changes nothing.

LIFETIME  one descriptor, the caller's. While it is open the filesystem's device is in use.

Linux reference: include/uapi/linux/mount.h, fs/fsopen.c, fs/notify/fanotify/fanotify_user.c
(fanotify_test_fsid), fs/btrfs/export.c.
"""

import ctypes
import errno
import os
import struct
from typing import NoReturn

from fanwise._errors import (
    FanwiseError,
    FeatureMissing,
    FilesystemRefuses,
    PermissionNeeded,
    SyscallBlocked,
)
from fanwise.kernel.caps import CAP_SYS_ADMIN, credentials
from fanwise.kernel.handles import name_to_handle, open_by_handle
from fanwise.kernel.libc import last_error, libc
from fanwise.kernel.mounts import Mount

# Since v5.1 new system calls have one number on every architecture except alpha, and mips, which
# adds a base.
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_ODD_NUMBERS = os.uname().machine.startswith(("alpha", "mips"))

_FSOPEN_CLOEXEC = 1
_FSMOUNT_CLOEXEC = 1
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6

_READ = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

_REMEDY = "mount its top level (subvolid=5) somewhere and watch the path below that"

# A btrfs handle of a directory: type, inode number, subvolume, generation. 0 is any generation.
_TOP_KEY = struct.pack("=IQQI", 0x4D, 256, 5, 0)


def open_top_level(mount: Mount, fd: int) -> int:
    """Open the top level of the btrfs filesystem that ``mount`` shows a part of, for reading.

    ``fd`` is an open directory on that mount. The caller owns the descriptor that is returned, and
    closes it soon. The device is named as mountinfo names it, any one of several; where that name
    leads to nothing (another mount namespace) the directory is opened by its handle.

    Raises PermissionNeeded, SyscallBlocked, FeatureMissing; FilesystemRefuses when it cannot be
    mounted, or when what is mounted is another filesystem.
    """
    try:
        top = _mounted(mount)
    except FilesystemRefuses as error:
        top = _by_handle(fd, error)
    try:
        if _same_superblock(top, fd):
            return top
    except (OSError, FanwiseError):
        os.close(top)
        raise
    os.close(top)
    return _by_handle(
        fd,
        FilesystemRefuses(
            mount.mount_point, f"{os.fsdecode(mount.source)} is another filesystem now", _REMEDY
        ),
    )


def _mounted(mount: Mount) -> int:
    path = mount.mount_point
    context = _call(_SYS_FSOPEN, "fsopen", path, b"btrfs", _FSOPEN_CLOEXEC)
    try:
        for command, key, value in (
            (_SET_STRING, b"source", mount.source),
            (_SET_STRING, b"subvolid", b"5"),
            (_SET_FLAG, b"ro", None),
            (_CREATE, None, None),
        ):
            try:
                _call(_SYS_FSCONFIG, "fsconfig", path, context, command, key, value, 0)
            except OSError as error:
                raise FilesystemRefuses(
                    path,
                    "the top level of this btrfs cannot be mounted from "
                    f"{os.fsdecode(mount.source)}: {_log(context) or error.strerror}",
                    _REMEDY,
                ) from error
        detached = _call(_SYS_FSMOUNT, "fsmount", path, context, _FSMOUNT_CLOEXEC, 0)
    except OSError as error:
        raise FilesystemRefuses(
            path, f"the top level of this btrfs cannot be mounted: {error.strerror}", _REMEDY
        ) from error
    finally:
        os.close(context)
    try:
        return os.open(b".", _READ, dir_fd=detached)  # fsmount gives one of O_PATH
    finally:
        os.close(detached)


def _by_handle(fd: int, reason: FilesystemRefuses) -> int:
    try:
        return open_by_handle(fd, _TOP_KEY, _READ)
    except OSError as error:
        raise reason from error


def _same_superblock(top: int, fd: int) -> bool:
    # The device number that stat tells belongs to one subvolume of one mounted superblock.
    try:
        other = open_by_handle(top, name_to_handle(b"", fd, empty=True)[0])
    except OSError as error:
        if error.errno == errno.ESTALE:
            return False
        raise
    try:
        return os.path.sameopenfile(other, fd)
    finally:
        os.close(other)


# What the filesystem wrote about its refusal: "e btrfs: open_ctree failed".
def _log(context: int) -> str:
    said = []
    while True:
        try:
            said.append(os.read(context, 4096).decode(errors="replace").strip())
        except OSError:  # ENODATA: that was all
            return "; ".join(line[2:] if line[1:2] == " " else line for line in said)


def _call(number: int, name: str, path: bytes, *arguments: int | bytes | None) -> int:
    if _ODD_NUMBERS:
        raise FeatureMissing(path, f"the number of {name} is not known on this architecture")
    passed = [ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in arguments]
    result: int = libc.syscall(ctypes.c_long(number), *passed)
    if result < 0:
        _refuse(last_error(), name, path)
    return result


def _refuse(error: OSError, name: str, path: bytes) -> NoReturn:
    creds = credentials()
    if error.errno == errno.EPERM and not creds.holds(CAP_SYS_ADMIN):
        raise PermissionNeeded(
            path,
            "mounting the top level of a btrfs needs CAP_SYS_ADMIN",
            "run as root or grant CAP_SYS_ADMIN",
        ) from error
    if error.errno in (errno.ENOSYS, errno.EPERM) and creds.filtered:
        raise SyscallBlocked(
            path, f"a seccomp filter refuses {name}", f"allow {name} in the filter's profile"
        ) from error
    if error.errno == errno.ENOSYS:
        raise FeatureMissing(path, f"this kernel has no {name}", _REMEDY) from error
    raise error
