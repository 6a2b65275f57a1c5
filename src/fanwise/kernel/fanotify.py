"""fanotify's two system calls and its constants.

`init` and `mark` are thin; the weight is in saying why one failed. The reason is found by asking
the kernel again, in ways that change nothing: both calls check their flags before anything else, so
a call with a flag that cannot exist shows whether calls arrive at all, and a call with one flag
whether the kernel knows it. No version is ever compared.

Linux reference: fanotify_init(2), fanotify_mark(2), fs/notify/fanotify/fanotify_user.c.
"""

import ctypes
import errno
import os
from collections.abc import Mapping
from types import MappingProxyType

from fanwise._errors import (
    FanwiseError,
    FeatureMissing,
    FilesystemRefuses,
    LimitReached,
    NoSuchRoot,
    NotWatchable,
    PermissionNeeded,
    SyscallBlocked,
)
from fanwise.kernel import mounts
from fanwise.kernel.caps import (
    CAP_AUDIT_WRITE,
    CAP_SYS_ADMIN,
    NAMES,
    Credentials,
    credentials,
)
from fanwise.kernel.libc import AT_FDCWD, last_error, libc

# fanotify_init: flags
FAN_CLOEXEC = 0x1
FAN_NONBLOCK = 0x2
FAN_CLASS_NOTIF = 0x0
FAN_CLASS_CONTENT = 0x4
FAN_CLASS_PRE_CONTENT = 0x8
FAN_UNLIMITED_QUEUE = 0x10
FAN_UNLIMITED_MARKS = 0x20
FAN_ENABLE_AUDIT = 0x40
FAN_REPORT_PIDFD = 0x80
FAN_REPORT_TID = 0x100
FAN_REPORT_FID = 0x200
FAN_REPORT_DIR_FID = 0x400
FAN_REPORT_NAME = 0x800
FAN_REPORT_TARGET_FID = 0x1000
FAN_REPORT_FD_ERROR = 0x2000
FAN_REPORT_MNT = 0x4000
FAN_REPORT_DFID_NAME = FAN_REPORT_DIR_FID | FAN_REPORT_NAME
FAN_REPORT_DFID_NAME_TARGET = FAN_REPORT_DFID_NAME | FAN_REPORT_FID | FAN_REPORT_TARGET_FID

# fanotify_mark: what to do, and how
FAN_MARK_ADD = 0x1
FAN_MARK_REMOVE = 0x2
FAN_MARK_DONT_FOLLOW = 0x4
FAN_MARK_ONLYDIR = 0x8
FAN_MARK_IGNORED_MASK = 0x20
FAN_MARK_IGNORED_SURV_MODIFY = 0x40
FAN_MARK_FLUSH = 0x80
FAN_MARK_EVICTABLE = 0x200
FAN_MARK_IGNORE = 0x400
FAN_MARK_IGNORE_SURV = FAN_MARK_IGNORE | FAN_MARK_IGNORED_SURV_MODIFY

# fanotify_mark: on what. Two bits used together: MNTNS is not a MOUNT and a FILESYSTEM.
FAN_MARK_INODE = 0x0
FAN_MARK_MOUNT = 0x10
FAN_MARK_FILESYSTEM = 0x100
FAN_MARK_MNTNS = 0x110
_MARK_TYPE = FAN_MARK_MNTNS

# Events of a mask
FAN_ACCESS = 0x1
FAN_MODIFY = 0x2
FAN_ATTRIB = 0x4
FAN_CLOSE_WRITE = 0x8
FAN_CLOSE_NOWRITE = 0x10
FAN_OPEN = 0x20
FAN_MOVED_FROM = 0x40
FAN_MOVED_TO = 0x80
FAN_CREATE = 0x100
FAN_DELETE = 0x200
FAN_DELETE_SELF = 0x400
FAN_MOVE_SELF = 0x800
FAN_OPEN_EXEC = 0x1000
FAN_Q_OVERFLOW = 0x4000  # reported only, never asked for
FAN_FS_ERROR = 0x8000
FAN_OPEN_PERM = 0x1_0000
FAN_ACCESS_PERM = 0x2_0000
FAN_OPEN_EXEC_PERM = 0x4_0000
FAN_PRE_ACCESS = 0x10_0000
FAN_MNT_ATTACH = 0x100_0000
FAN_MNT_DETACH = 0x200_0000
FAN_EVENT_ON_CHILD = 0x800_0000
FAN_RENAME = 0x1000_0000
FAN_ONDIR = 0x4000_0000

# Answers to permission events: struct fanotify_response is the event's fd and one of these.
FAN_ALLOW = 0x1
FAN_DENY = 0x2
FAN_AUDIT = 0x10
FAN_INFO = 0x20

FAN_NOFD = -1
FAN_NOPIDFD = -1
FAN_EPIDFD = -2


def deny(code: int) -> int:
    """Make the answer that fails the operation with errno ``code`` (FAN_DENY_ERRNO).

    The kernel takes EPERM, EIO, EBUSY, ETXTBSY, EAGAIN, ENOSPC and EDQUOT, for pre-content events.
    """
    return FAN_DENY | (code & 0xFF) << 24


_ENTRIES = FAN_CREATE | FAN_DELETE | FAN_MOVED_FROM | FAN_MOVED_TO | FAN_RENAME
_OF_INODE = _ENTRIES | FAN_ATTRIB | FAN_DELETE_SELF | FAN_MOVE_SELF | FAN_FS_ERROR
_PERMISSION = FAN_OPEN_PERM | FAN_ACCESS_PERM | FAN_OPEN_EXEC_PERM | FAN_PRE_ACCESS
_OF_MOUNTS = FAN_MNT_ATTACH | FAN_MNT_DETACH

_CONSTANTS = [(name, value) for name, value in globals().items() if name.startswith("FAN_")]


def _table(first: str, last: str) -> Mapping[int, str]:
    names = [name for name, _ in _CONSTANTS]
    part = _CONSTANTS[names.index(first) : names.index(last) + 1]
    # One bit each: what is left out is a combination or the absence of bits.
    return MappingProxyType({value: name for name, value in part if value.bit_count() == 1})


# The name of every bit, by value: INIT_FLAGS[0x200] is "FAN_REPORT_FID".
INIT_FLAGS = _table("FAN_CLOEXEC", "FAN_REPORT_MNT")
MARK_FLAGS = _table("FAN_MARK_ADD", "FAN_MARK_FILESYSTEM")
EVENTS = _table("FAN_ACCESS", "FAN_ONDIR")

libc.fanotify_init.argtypes = [ctypes.c_uint, ctypes.c_uint]
libc.fanotify_mark.argtypes = [
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_uint64,
    ctypes.c_int,
    ctypes.c_char_p,
]

_Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]


def init(
    flags: int,
    event_f_flags: int = os.O_RDONLY | os.O_LARGEFILE | os.O_CLOEXEC,
    *,
    path: _Path = "fanotify_init",
) -> int:
    """Create a fanotify group and return its descriptor, which the caller owns.

    ``flags`` are FAN_* of fanotify_init, ``event_f_flags`` the O_* of descriptors inside events;
    ``path`` is only what errors are about. Without CAP_SYS_ADMIN a group must report file handles
    (FAN_REPORT_FID or DIR_FID) and be of class NOTIF, without UNLIMITED, PIDFD, TID or FD_ERROR.

    Raises PermissionNeeded, SyscallBlocked, FeatureMissing (naming the flags that this kernel does
    not know), LimitReached; OSError only for ENOMEM. The OSError is the ``__cause__``.
    """
    fd: int = libc.fanotify_init(flags, event_f_flags)
    if fd < 0:
        error = last_error()
        if error.errno == errno.ENOMEM:
            raise error
        raise _why_init(error, flags, event_f_flags, path) from error
    return fd


def mark(
    fd: int,
    flags: int,
    mask: int,
    dirfd: int = AT_FDCWD,
    path: _Path | None = None,
    *,
    about: _Path | None = None,
) -> None:
    """Add, change or remove a mark of the group ``fd``.

    ``flags`` are FAN_MARK_*, ``mask`` event bits. The object is ``path``, relative to ``dirfd``, or
    with path None ``dirfd`` itself, which must not be of O_PATH then (EBADF); ``about`` is what
    errors name instead of it. The kernel keeps the mark until it is removed, its object dies or the
    group is closed; it does not block an unmount.

    Raises NoSuchRoot, PermissionNeeded, SyscallBlocked, FeatureMissing, FilesystemRefuses,
    LimitReached, or NotWatchable for what is none of these; OSError only for EBADF, EFAULT and
    ENOMEM. The OSError is the ``__cause__``.
    """
    name = None if path is None else os.fsencode(path)
    if libc.fanotify_mark(fd, flags, mask, dirfd, name) < 0:
        error = last_error(name)
        if error.errno in (errno.EBADF, errno.EFAULT, errno.ENOMEM):
            raise error
        place = _place(dirfd, name) if about is None else os.fsencode(about)
        raise _why_mark(error, flags, mask, place) from error


# A flag that does not exist. Both calls refuse it with EINVAL before they look at privileges or
# descriptors (fanotify_init since commit 7cea2a3c505e, "fanotify: support limited functionality for
# unprivileged users", in v5.13, and with a flag that reports handles); any other errno came from
# something in front of the call.
_NO_FLAG = 0x8000_0000

# That commit's release also brought this directory, so where it is absent EPERM proves nothing.
_SYSCTLS = "/proc/sys/fs/fanotify"


def _why_init(error: OSError, flags: int, event_f_flags: int, path: _Path) -> NotWatchable:
    code = error.errno
    assert code is not None
    creds = credentials()
    audit = flags & FAN_ENABLE_AUDIT and not creds.holds(CAP_AUDIT_WRITE)
    capability = CAP_AUDIT_WRITE if audit else CAP_SYS_ADMIN
    arrives = _try_init(_NO_FLAG | FAN_REPORT_FID, 0) == errno.EINVAL
    if _is_blocked(code, arrives, capability, creds):
        return _blocked(path, "fanotify_init")
    if code == errno.EPERM:
        return _needs(path, capability, creds, _init_names(flags))
    if code == errno.EMFILE:
        return _group_limit(path, creds)
    if code == errno.ENFILE:
        return LimitReached(path, "fs.file-max")
    if code == errno.ENOSYS:
        return FeatureMissing(path, "this kernel was built without fanotify (CONFIG_FANOTIFY)")
    if code == errno.EINVAL:
        return FeatureMissing(path, _bad_init(flags, event_f_flags))
    return NotWatchable(path, os.strerror(code))


def _why_mark(error: OSError, flags: int, mask: int, path: bytes) -> NotWatchable:
    code = error.errno
    assert code is not None
    creds = credentials()
    arrives = _try_mark(_NO_FLAG, 0) == errno.EINVAL
    if _is_blocked(code, arrives, CAP_SYS_ADMIN, creds):
        return _blocked(path, "fanotify_mark")
    match code:
        case errno.EPERM:
            return _needs(path, CAP_SYS_ADMIN, creds, _mark_names(flags))
        case errno.EACCES:
            return PermissionNeeded(
                path,
                "a mark needs permission to read the object and to search its directories",
                "change its mode, or run with CAP_DAC_READ_SEARCH",
            )
        case errno.ENOSPC:
            return _limit(path, "max_user_marks", "max_fanotify_marks", "marks", creds)
        case errno.ENOENT if flags & FAN_MARK_REMOVE:
            return NotWatchable(path, "there is no such mark to remove")
        case errno.ENOENT | errno.ENOTDIR | errno.ELOOP | errno.ENAMETOOLONG:
            return NoSuchRoot(path, os.strerror(code))
        case errno.ENOSYS:
            return FeatureMissing(path, "this kernel was built without fanotify (CONFIG_FANOTIFY)")
        case errno.EOPNOTSUPP | errno.ENODEV | errno.EXDEV:
            return _filesystem(code, flags, mask, path)
        case errno.EINVAL:
            return FeatureMissing(path, _bad_mark(flags, mask))
    return NotWatchable(path, os.strerror(code))


# A filter refused the call if calls do not arrive although the kernel has them, or if the call
# failed for a privilege that the process has.
def _is_blocked(code: int, arrives: bool, capability: int, creds: Credentials) -> bool:
    if not creds.filtered:
        return False
    if not arrives:
        return creds.holds(capability) or os.path.isdir(_SYSCTLS)
    return code == errno.EPERM and creds.holds(capability)


def _blocked(path: _Path, call: str) -> SyscallBlocked:
    return SyscallBlocked(
        path,
        f"a seccomp filter refuses {call}",
        f"allow {call} in the profile of the container or service",
    )


def _needs(path: _Path, capability: int, creds: Credentials, what: str) -> PermissionNeeded:
    name = NAMES[capability]
    if creds.holds(capability):
        return PermissionNeeded(
            path,
            f"{what} is refused although {name} is held",
            "look at the security modules; in some kernels a group that was created without "
            "the capability stays limited",
        )
    if creds.effective >> capability & 1 and not creds.initial:
        return PermissionNeeded(
            path,
            f"{what} needs {name} outside of this user namespace, where it does not count",
            "run outside of the user namespace, or watch a filesystem that was mounted inside it",
        )
    return PermissionNeeded(path, f"{what} needs {name}", f"run as root or grant {name}")


def _group_limit(path: _Path, creds: Credentials) -> LimitReached:
    # EMFILE is the limit of groups or that of descriptors; a descriptor tells which.
    try:
        os.close(os.open("/", os.O_PATH | os.O_CLOEXEC))
    except OSError:
        return LimitReached(
            path,
            "RLIMIT_NOFILE",
            "the process's limit of open descriptors is reached",
            "raise it with: ulimit -n NUMBER, or LimitNOFILE= of the service",
        )
    return _limit(path, "max_user_groups", "max_fanotify_groups", "groups", creds)


def _limit(path: _Path, name: str, nested: str, things: str, creds: Credentials) -> LimitReached:
    # Counted for the user in each user namespace up to the first, whose limit is fs.fanotify.*.
    sysctl = f"fs.fanotify.{name}"
    reason = f"this user has as many fanotify {things} as {sysctl}{_value(f'fanotify/{name}')}"
    remedy = f"raise it with: sysctl -w {sysctl}=NUMBER"
    if not creds.initial:
        nested_value = _value(f"../user/{nested}")
        reason += f" or, in this user namespace, user.{nested}{nested_value}"
        remedy += f"; in this user namespace also user.{nested}"
    return LimitReached(path, sysctl, f"{reason} allows", remedy)


def _value(name: str) -> str:
    try:
        with open(f"/proc/sys/fs/{name}", "rb") as file:
            return f" ({file.read().decode().strip()})"
    except OSError:
        return ""


def _filesystem(code: int, flags: int, mask: int, path: bytes) -> FilesystemRefuses:
    try:
        fstype = mounts.mount_of(path).fstype
    except (OSError, FanwiseError):
        fstype = "its filesystem"
    if code == errno.ENODEV:
        return FilesystemRefuses(
            path,
            f"{fstype} has no filesystem id, which this kind of mark needs",
            "use marks on single directories, as a watch of such a path does",
        )
    if code == errno.EXDEV:
        if flags & _MARK_TYPE and fstype == "btrfs":
            return FilesystemRefuses(
                path,
                "this is inside a btrfs subvolume, whose id is not that of the filesystem",
                "mark the top level (subvolid=5); it covers every subvolume",
            )
        return FilesystemRefuses(
            path,
            f"{fstype} and another filesystem of this group cannot be told apart by their ids",
            "use a group of its own for each such filesystem",
        )
    if mask & FAN_PRE_ACCESS:
        return FilesystemRefuses(
            path, f"{fstype} has no pre-content events", "use ext4, xfs or btrfs"
        )
    if flags & _MARK_TYPE:
        return FilesystemRefuses(
            path,
            f"{fstype} cannot open file handles, which this kind of mark needs",
            "use marks on single directories, as a watch of such a path does",
        )
    return FilesystemRefuses(path, f"{fstype} has no file handles")


# Why fanotify_init said EINVAL. Some flags are accepted only together with others.
_TOGETHER = {
    FAN_REPORT_NAME: FAN_REPORT_DFID_NAME,
    FAN_REPORT_TARGET_FID: FAN_REPORT_DFID_NAME_TARGET,
}


def _bad_init(flags: int, event_f_flags: int) -> str:
    unknown = 0
    for bit in _bits(flags):
        if _try_init(_TOGETHER.get(bit, 0) | bit, os.O_RDONLY) == errno.EINVAL:
            unknown |= bit
    if unknown:
        return f"this kernel's fanotify_init does not know {_init_names(unknown)}"
    if _try_init(flags, os.O_RDONLY) != errno.EINVAL:
        return f"fanotify_init does not take {event_f_flags:#x} as flags of event descriptors"
    return f"this kernel's fanotify_init refuses the combination {_init_names(flags)}"


# Why fanotify_mark said EINVAL: with a descriptor that cannot be, a known bit gives EBADF.
def _bad_mark(flags: int, mask: int) -> str:
    kind = flags & _MARK_TYPE
    if _try_mark(FAN_MARK_ADD | kind, FAN_OPEN) == errno.EINVAL and kind != FAN_MARK_MNTNS:
        return f"this kernel's fanotify_mark does not know {_mark_names(kind)}"
    unknown = 0
    # The mode bits exclude each other and are as old as the call.
    for bit in _bits(flags & ~(_MARK_TYPE | FAN_MARK_ADD | FAN_MARK_REMOVE | FAN_MARK_FLUSH)):
        if _try_mark(FAN_MARK_ADD | bit, FAN_OPEN) == errno.EINVAL:
            unknown |= bit
    if unknown:
        return f"this kernel's fanotify_mark does not know {_mark_names(unknown)}"
    for bit in _bits(mask):
        of = FAN_MARK_MNTNS if bit & _OF_MOUNTS else FAN_MARK_INODE
        if _try_mark(FAN_MARK_ADD | of, bit) == errno.EINVAL:
            unknown |= bit
    if unknown:
        return f"this kernel does not know the events {_event_names(unknown)}"
    if kind == FAN_MARK_MOUNT and mask & _OF_INODE:
        return f"a mount mark takes no {_event_names(mask & _OF_INODE)}"
    if mask & FAN_FS_ERROR and kind != FAN_MARK_FILESYSTEM:
        return "FAN_FS_ERROR needs a filesystem mark"
    if bool(mask & _OF_MOUNTS) != (kind == FAN_MARK_MNTNS):
        return "FAN_MNT_ATTACH and FAN_MNT_DETACH go with a mount namespace's mark, and alone"
    if mask & _PERMISSION:
        return (
            f"{_event_names(mask & _PERMISSION)} needs a group of class CONTENT or PRE_CONTENT "
            "and a filesystem that is not the kernel's own"
        )
    if mask & FAN_RENAME:
        return "FAN_RENAME needs a group with FAN_REPORT_NAME"
    if mask & _OF_INODE:
        return f"{_event_names(mask & _OF_INODE)} needs a group that reports file handles"
    return f"this kernel's fanotify_mark refuses {_mark_names(flags)} with {_event_names(mask)}"


# These two return the errno, 0 for success, and leave nothing behind.
def _try_init(flags: int, event_f_flags: int) -> int:
    fd: int = libc.fanotify_init(flags, event_f_flags)
    if fd < 0:
        return ctypes.get_errno()
    os.close(fd)
    return 0


def _try_mark(flags: int, mask: int) -> int:
    libc.fanotify_mark(-1, flags, mask, AT_FDCWD, None)
    return ctypes.get_errno()


def _bits(value: int) -> list[int]:
    return [1 << n for n in range(value.bit_length()) if value >> n & 1]


def _names(table: Mapping[int, str], value: int) -> str:
    return "|".join(table.get(bit, hex(bit)) for bit in _bits(value))


def _init_names(flags: int) -> str:
    return _names(INIT_FLAGS, flags & ~(FAN_CLOEXEC | FAN_NONBLOCK)) or "FAN_CLASS_NOTIF"


def _mark_names(flags: int) -> str:
    if flags & _MARK_TYPE == FAN_MARK_MNTNS:
        rest = _names(MARK_FLAGS, flags & ~FAN_MARK_MNTNS)
        return f"{rest}|FAN_MARK_MNTNS" if rest else "FAN_MARK_MNTNS"
    return _names(MARK_FLAGS, flags) or "FAN_MARK_INODE"


def _event_names(mask: int) -> str:
    return _names(EVENTS, mask) or "no event"


# The path of what was marked, for messages and to find its filesystem.
def _place(dirfd: int, name: bytes | None) -> bytes:
    if name is not None and (dirfd == AT_FDCWD or name.startswith(b"/")):
        return name
    base = b"." if dirfd == AT_FDCWD else b"/proc/self/fd/%d" % dirfd
    return base if name is None else os.path.join(base, name)
