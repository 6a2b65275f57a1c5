"""File handles: what identifies a file or directory on its filesystem, for as long as it exists.

A **key** is the handle's type (4 bytes) and then the handle's bytes. That is how handles stand
inside fanotify records, so a key is a slice of a record and needs no conversion. The type is in
the machine's byte order, as the kernel writes it. A key means something only together with the
superblock it came from; `identity` joins the two.

Linux reference: open_by_handle_at(2), fs/fhandle.c, include/linux/exportfs.h.
"""

import ctypes
import errno
import os
import re
import struct
from typing import NoReturn

from fanwise._errors import (
    DecodeError,
    FeatureMissing,
    FilesystemRefuses,
    PermissionNeeded,
    SyscallBlocked,
)
from fanwise.kernel.caps import CAP_DAC_READ_SEARCH, credentials
from fanwise.kernel.libc import AT_EMPTY_PATH, AT_FDCWD, AT_SYMLINK_FOLLOW, last_error, libc

MAX_HANDLE = 128  # MAX_HANDLE_SZ, in bytes
AT_HANDLE_FID = 0x200

_HEAD = struct.Struct("=Ii")  # handle_bytes, handle_type
_TYPE = struct.Struct("=i")
_ASK = _HEAD.pack(MAX_HANDLE, 0) + bytes(MAX_HANDLE)

libc.name_to_handle_at.argtypes = [
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_int),
    ctypes.c_int,
]
libc.inotify_add_watch.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32]
libc.open_by_handle_at.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int]


def name_to_handle(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    dirfd: int = AT_FDCWD,
    follow: bool = False,
    empty: bool = False,
    fid: bool = False,
) -> tuple[bytes, int]:
    """Return the key of a file and the id of the mount it was found on.

    ``path`` is relative to ``dirfd``; a symbolic link is followed with ``follow``; with ``empty``
    and an empty path the file is ``dirfd`` itself. With ``fid`` the key only identifies, as in
    fanotify records: filesystems that cannot open handles (proc, overlay) then have keys too.
    Needs no privilege.

    Raises FilesystemRefuses when the filesystem has no handles, SyscallBlocked and FeatureMissing;
    a plain OSError for everything about the path itself (ENOENT, EACCES, ESTALE: a scan races).
    """
    name = os.fsencode(path)
    # Not bytes: the kernel writes into it.
    handle = ctypes.create_string_buffer(_ASK, len(_ASK))
    mount_id = ctypes.c_int()
    flags = (
        (AT_SYMLINK_FOLLOW if follow else 0)
        | (AT_EMPTY_PATH if empty else 0)
        | (AT_HANDLE_FID if fid else 0)
    )
    if libc.name_to_handle_at(dirfd, name, handle, ctypes.byref(mount_id), flags) < 0:
        _refuse_name(last_error(name), fid)
    raw = handle.raw
    (size,) = struct.unpack_from("=I", raw)
    return raw[4 : _HEAD.size + size], mount_id.value


def identify(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    dirfd: int = AT_FDCWD,
    follow: bool = False,
    empty: bool = False,
) -> tuple[bytes, int]:
    """Do what `name_to_handle` does, with a key that need not open: what records hold is enough.

    Kernels without AT_HANDLE_FID give one wherever handles open, and raise FilesystemRefuses
    elsewhere.
    """
    try:
        return name_to_handle(path, dirfd, follow, empty, fid=True)
    except FeatureMissing:
        return name_to_handle(path, dirfd, follow, empty)


def open_by_handle(mount_fd: int, key: bytes, flags: int = os.O_PATH | os.O_CLOEXEC) -> int:
    """Open the file with this key; the caller owns the descriptor.

    ``mount_fd`` is any descriptor on the filesystem, except one opened with O_PATH (EBADF). Its
    mount decides what path the file seems to have: give one of the filesystem's root.
    Needs CAP_DAC_READ_SEARCH (in a user namespace: over the filesystem, and O_DIRECTORY).

    Raises DecodeError for a key that is none, PermissionNeeded, SyscallBlocked, FeatureMissing; a
    plain OSError otherwise: ESTALE when the file is gone, EBADF for the descriptor.
    """
    size = len(key) - _TYPE.size
    if not 0 <= size <= MAX_HANDLE:
        raise DecodeError(0, f"a key has 4 to {4 + MAX_HANDLE} bytes, not {len(key)}")
    fd: int = libc.open_by_handle_at(mount_fd, struct.pack("=I", size) + key, flags)
    if fd < 0:
        _refuse_open(last_error(), mount_fd)
    return fd


def identity(dev: tuple[int, int], key: bytes) -> str:
    """Write a file's identity as ``MAJOR:MINOR/TYPE/HANDLE``, such as ``7:0/1/0b0000001a2b3c4d``.

    ``dev`` is the superblock's device as mountinfo has it (inside a btrfs subvolume st_dev is
    another). Type and handle are hexadecimal. Raises DecodeError for a key that is none.
    """
    if not _TYPE.size <= len(key) <= _TYPE.size + MAX_HANDLE:
        raise DecodeError(0, f"a key has 4 to {4 + MAX_HANDLE} bytes, not {len(key)}")
    return f"{dev[0]}:{dev[1]}/{_type(key):x}/{key[_TYPE.size :].hex()}"


_NUMBER = "(0|[1-9][0-9]{0,9})"
_IDENTITY = re.compile(
    f"{_NUMBER}:{_NUMBER}/(0|[1-9a-f][0-9a-f]{{0,7}})/((?:[0-9a-f]{{2}}){{0,{MAX_HANDLE}}})"
)


def parse_identity(text: str) -> tuple[tuple[int, int], bytes]:
    """Read back what `identity` wrote, and nothing else: one file has one text.

    Returns the device and the key. Raises DecodeError.
    """
    found = _IDENTITY.fullmatch(text)
    if not found:
        raise DecodeError(0, f"not an identity (MAJOR:MINOR/TYPE/HANDLE): {text[:80]!r}")
    major, minor, kind, handle = found.groups()
    key = struct.pack("=I", int(kind, 16)) + bytes.fromhex(handle)
    return (int(major), int(minor)), key


# Where the inode number stands, by the handle's type and length; measured against st_ino on ext4,
# xfs, btrfs, tmpfs, proc and cgroup2. tmpfs (mm/shmem.c, shmem_encode_fh) uses type 1 with the
# generation first and three words; the generic type 1 has two.
_INODE = {
    (0x01, 8): struct.Struct("=I"),  # FILEID_INO32_GEN
    (0x01, 12): struct.Struct("=4xQ"),  # tmpfs
    (0x02, 16): struct.Struct("=I"),  # FILEID_INO32_GEN_PARENT
    (0x81, 12): struct.Struct("=Q"),  # FILEID_INO64_GEN
    (0x82, 24): struct.Struct("=Q"),  # FILEID_INO64_GEN_PARENT
    (0x4D, 20): struct.Struct("=Q"),  # FILEID_BTRFS_WITHOUT_PARENT
    (0x4E, 32): struct.Struct("=Q"),  # FILEID_BTRFS_WITH_PARENT
    (0x4F, 40): struct.Struct("=Q"),  # FILEID_BTRFS_WITH_PARENT_ROOT
    (0xFE, 8): struct.Struct("=Q"),  # FILEID_KERNFS
}


def inode_of(key: bytes) -> int | None:
    """Return the inode number inside a key, or None where the handle's type does not have one.

    A handle does not say which filesystem made it, and FUSE (type 0x81, words swapped), isofs and
    ocfs2 (type 1) use these types for layouts of their own: do not ask about their keys.
    """
    if len(key) < _TYPE.size:
        return None
    layout = _INODE.get((_type(key), len(key) - _TYPE.size))
    return int(layout.unpack_from(key, _TYPE.size)[0]) if layout else None


def _type(key: bytes) -> int:
    return int(struct.unpack_from("=I", key)[0])


def _refuse_name(error: OSError, fid: bool) -> NoReturn:
    path = error.filename
    if error.errno == errno.EOPNOTSUPP:
        what = "file handles" if fid else "file handles that can be opened"
        raise FilesystemRefuses(path, f"its filesystem has no {what}") from error
    # name_to_handle_at asks for no privilege of its own, so this cannot be a capability.
    if error.errno in (errno.EPERM, errno.ENOSYS):
        _refuse_call(error, "name_to_handle_at", path)
    # AT_HANDLE_FID is refused where it is unknown (it came with commit 96b2b072ee62, "exportfs:
    # allow exporting non-decodeable file handles to userspace", in v6.5).
    if error.errno == errno.EINVAL and fid:
        raise FeatureMissing(path, "this kernel does not know AT_HANDLE_FID") from error
    raise error


def _refuse_open(error: OSError, mount_fd: int) -> NoReturn:
    path = f"descriptor {mount_fd}"
    if error.errno == errno.EPERM and not credentials().holds(CAP_DAC_READ_SEARCH):
        raise PermissionNeeded(
            path,
            "opening a file by its handle needs CAP_DAC_READ_SEARCH",
            "run as root or grant it; in a container: --cap-add DAC_READ_SEARCH",
        ) from error
    if error.errno in (errno.EPERM, errno.ENOSYS):
        _refuse_call(error, "open_by_handle_at", path)
    raise error


def _refuse_call(error: OSError, call: str, path: str | bytes) -> NoReturn:
    if credentials().filtered:
        raise SyscallBlocked(
            path, f"a seccomp filter refuses {call}", f"allow {call} in the filter's profile"
        ) from error
    if error.errno == errno.ENOSYS:
        raise FeatureMissing(path, f"this kernel has no {call} (CONFIG_FHANDLE)") from error
    raise error
