"""Mounts: /proc/self/mountinfo, and statmount(2) and listmount(2) where the kernel has them.

Names are bytes, as everywhere where the kernel speaks of files; types and options are text
(with surrogates for bytes that are not UTF-8).

Linux reference: proc_pid_mountinfo(5), fs/proc_namespace.c, statmount(2), listmount(2),
include/uapi/linux/mount.h.
"""

import ctypes
import errno
import os
import re
import struct
from collections.abc import Iterable
from typing import NamedTuple, NoReturn

from fanwise._errors import DecodeError, FeatureMissing, NoSuchRoot, SyscallBlocked
from fanwise.kernel.caps import credentials
from fanwise.kernel.libc import AT_EMPTY_PATH, AT_NO_AUTOMOUNT, last_error, libc

_MOUNTINFO = "/proc/self/mountinfo"


class Mount(NamedTuple):
    """One mount, as a line of mountinfo describes it.

    ``id`` is reused after an unmount; ``unique_id`` never is, and is None where the kernel does
    not tell it. ``dev`` is the superblock's device (major, minor). ``root`` is the directory of
    the filesystem that the mount shows, ``mount_point`` is relative to the process's root.
    ``options`` are those of the mount, ``super_options`` those of the filesystem; ``fields`` are
    the optional ones, such as ``shared:1``. ``fstype`` may have a subtype (``fuse.sshfs``).
    """

    id: int
    parent_id: int
    dev: tuple[int, int]
    root: bytes
    mount_point: bytes
    options: tuple[str, ...]
    fields: tuple[str, ...]
    fstype: str
    source: bytes
    super_options: tuple[str, ...]
    unique_id: int | None = None


def parse_mountinfo(text: bytes) -> list[Mount]:
    """Decode the text of a mountinfo file. Raises DecodeError at the line that makes no sense."""
    found = []
    offset = 0
    for line in text.split(b"\n"):
        if line:
            found.append(_parse_line(line, offset))
        offset += len(line) + 1
    return found


# Single spaces separate, and a field may be empty: mount(2) takes an empty source.
def _parse_line(line: bytes, offset: int) -> Mount:
    parts = line.split(b" ")
    try:
        dash = parts.index(b"-", 6)
        mount_id, parent_id, dev, root, point, options = parts[:6]
        fstype, source, super_options = parts[dash + 1 :]
        major, minor = dev.split(b":")
        return Mount(
            _number(mount_id),
            _number(parent_id),
            (_number(major), _number(minor)),
            _unescape(root),
            _unescape(point),
            _split_options(options),
            tuple(os.fsdecode(field) for field in parts[6:dash]),
            os.fsdecode(_unescape(fstype)),
            _unescape(source),
            _split_options(super_options),
        )
    except ValueError:
        raise DecodeError(offset, f"not a line of mountinfo: {line[:200]!r}") from None


def _number(text: bytes) -> int:
    # int() alone would take signs, spaces, underscores and any length.
    if not text.isdigit() or len(text) > 10:
        raise ValueError(text)
    return int(text)


_ESCAPE = re.compile(rb"\\([0-3][0-7][0-7])")


# The kernel writes \040 for a space, and so on (mangle_path, seq_escape). A backslash without
# three octal digits is left alone: some filesystems print their options without escaping.
def _unescape(text: bytes) -> bytes:
    if b"\\" not in text:
        return text
    return _ESCAPE.sub(lambda found: bytes((int(found[1], 8),)), text)


# Split first: a comma inside a value is written as \054.
def _split_options(text: bytes) -> tuple[str, ...]:
    return tuple(os.fsdecode(_unescape(option)) for option in text.split(b","))


def open_mountinfo() -> int:
    """Open mountinfo for waiting; the caller owns the descriptor.

    poll(2) with POLLPRI (POLLERR comes with it) says once for each descriptor that mounts changed
    since it was opened or last polled; nothing needs to be read from it.
    """
    return os.open(_MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)


def mounts(fd: int = -1) -> list[Mount]:
    """List the mounts that this process can see, in mountinfo's order.

    With ``fd``, one of `open_mountinfo`, no descriptor is opened: it works when none is left.

    Not a snapshot: a mount or unmount during the reading may or may not show; wait for changes
    with `open_mountinfo`, opened before. Raises DecodeError; OSError when /proc is not mounted.
    """
    found = _read() if fd < 0 else parse_mountinfo(_read_again(fd))
    try:
        unique = _unique_ids()
    except (FeatureMissing, SyscallBlocked):
        return found  # every unique_id is None, which says so
    # The device too: an id may have been reused between the two readings.
    return [mount._replace(unique_id=unique.get((mount.id, mount.dev))) for mount in found]


def _read() -> list[Mount]:
    with open(_MOUNTINFO, "rb") as file:
        return parse_mountinfo(file.read())


def _read_again(fd: int) -> bytes:
    os.lseek(fd, 0, os.SEEK_SET)
    text = []
    while piece := os.read(fd, 1 << 16):
        text.append(piece)
    return b"".join(text)


def _unique_ids() -> dict[tuple[int, tuple[int, int]], int]:
    unique = {}
    for unique_id in listmount():
        try:
            found = statmount(unique_id, STATMOUNT_SB_BASIC | STATMOUNT_MNT_BASIC)
        except FileNotFoundError:
            continue  # unmounted meanwhile
        if found.id is not None and found.dev is not None:
            unique[found.id, found.dev] = unique_id
    return unique


def mount_of(path: str | bytes | os.PathLike[str] | os.PathLike[bytes] | int) -> Mount:
    """Find the mount of an existing path (links are followed) or of a descriptor.

    The mount is the one that a look-up passes through, so this is right under mounts that cover
    each other, where comparing paths is not. Nothing is automounted and no server is asked.

    Raises NoSuchRoot when the path does not exist, or its mount is one that this process cannot
    see (detached, or outside of its root); OSError for other failures of the look-up.
    """
    try:
        found, unique_id = _mount_ids(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoSuchRoot(_shown(path), error.strerror or "it does not exist") from error
    for mount in _read():
        if mount.id == found:
            return mount._replace(unique_id=unique_id)
    raise NoSuchRoot(
        _shown(path),
        f"its mount ({found}) is not visible here: detached, or outside of this process's root",
    )


def mount_id(fd: int) -> int:
    """Return the id of the mount that an open file was found on. Raises OSError."""
    found = _statx_mount_id(fd, _STATX_MNT_ID)
    return _fdinfo_mount_id(fd) if found is None else found


def _shown(path: str | bytes | os.PathLike[str] | os.PathLike[bytes] | int) -> str:
    return f"descriptor {path}" if isinstance(path, int) else os.fsdecode(path)


_STATX_MNT_ID = 0x1000
_STATX_MNT_ID_UNIQUE = 0x4000
_AT_STATX_DONT_SYNC = 0x4000
_STATX_BYTES = 256
_STX_MNT_ID = 144


def _mount_ids(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes] | int,
) -> tuple[int, int | None]:
    # One descriptor for all questions, so that they are about one object. O_PATH opens no device
    # and asks for no permission on the object itself.
    fd = path if isinstance(path, int) else os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        # statx tells it since v5.8, fdinfo since v3.15.
        return mount_id(fd), _statx_mount_id(fd, _STATX_MNT_ID_UNIQUE)
    finally:
        if not isinstance(path, int):
            os.close(fd)


def _statx_mount_id(fd: int, which: int) -> int | None:
    if not hasattr(libc, "statx"):
        return None
    answer = ctypes.create_string_buffer(_STATX_BYTES)
    flags = AT_EMPTY_PATH | AT_NO_AUTOMOUNT | _AT_STATX_DONT_SYNC
    if libc.statx(fd, b"", flags, ctypes.c_uint(which), answer) < 0:
        # An old kernel, or an old filter; EINVAL is the C library's, which then does without.
        if ctypes.get_errno() in (errno.ENOSYS, errno.EPERM, errno.EINVAL):
            return None
        raise last_error()
    (mask,) = struct.unpack_from("=I", answer.raw)
    if not mask & which:
        return None
    return int(struct.unpack_from("=Q", answer.raw, _STX_MNT_ID)[0])


def _fdinfo_mount_id(fd: int) -> int:
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        text = file.read()
    found = re.search(rb"^mnt_id:\t(\d{1,10})$", text, re.MULTILINE)
    if not found:
        raise DecodeError(0, f"no mnt_id in fdinfo: {text[:200]!r}")
    return int(found[1])


# statmount(2) and listmount(2). Since v5.1 new system calls have one number on every architecture
# except alpha, and mips, which adds a base.
_SYS_STATMOUNT = 457
_SYS_LISTMOUNT = 458
_ODD_NUMBERS = os.uname().machine.startswith(("alpha", "mips"))

STATMOUNT_SB_BASIC = 0x1
STATMOUNT_MNT_BASIC = 0x2
STATMOUNT_PROPAGATE_FROM = 0x4
STATMOUNT_MNT_ROOT = 0x8
STATMOUNT_MNT_POINT = 0x10
STATMOUNT_FS_TYPE = 0x20
STATMOUNT_MNT_NS_ID = 0x40
STATMOUNT_MNT_OPTS = 0x80
STATMOUNT_FS_SUBTYPE = 0x100
STATMOUNT_SB_SOURCE = 0x200
_STATMOUNT_ALL = 0x3FF

_LSMT_ROOT = 0xFFFF_FFFF_FFFF_FFFF

_REQUEST = struct.Struct("=IIQQ")  # struct mnt_id_req, MNT_ID_REQ_SIZE_VER0
# struct statmount up to sb_source; the strings begin behind 512 bytes.
_STATMOUNT = struct.Struct("=IIQIIQIIQQIIQQQQQIIQII")
_STRINGS = 512

_LIST_AT_ONCE = 512
_STATMOUNT_LIMIT = 1 << 24  # no mount's strings are longer: an option string has a page or a few


class MountStat(NamedTuple):
    """What statmount(2) says about one mount; None is what the kernel did not tell.

    ``unique_id`` and ``parent_unique_id`` are never reused, ``id`` and ``parent_id`` are those of
    mountinfo. ``attributes`` are MOUNT_ATTR_* bits, ``propagation`` MS_* bits. ``options`` is the
    filesystem's own, as one text.
    """

    unique_id: int | None
    parent_unique_id: int | None
    id: int | None
    parent_id: int | None
    attributes: int | None
    propagation: int | None
    peer_group: int | None
    master: int | None
    dev: tuple[int, int] | None
    magic: int | None
    super_flags: int | None
    propagate_from: int | None
    root: bytes | None
    mount_point: bytes | None
    fstype: str | None
    subtype: str | None
    namespace_id: int | None
    options: bytes | None
    source: bytes | None


def decode_statmount(buffer: bytes) -> MountStat:
    """Decode a struct statmount. Raises DecodeError when a length or an offset does not fit."""
    if len(buffer) < _STRINGS:
        raise DecodeError(0, f"{len(buffer)} bytes, struct statmount has {_STRINGS}")
    (
        size, options, mask, major, minor, magic, super_flags, fstype, unique_id, parent_unique_id,
        mount_id, parent_id, attributes, propagation, peer_group, master, propagate_from, root,
        point, namespace_id, subtype, source,
    ) = _STATMOUNT.unpack_from(buffer)  # fmt: skip
    if not _STRINGS <= size <= len(buffer):
        raise DecodeError(0, f"statmount size {size} in a buffer of {len(buffer)}")

    def text(bit: int, at: int) -> bytes | None:
        if not mask & bit:
            return None
        start = _STRINGS + at
        end = buffer.find(b"\0", start, size)
        if end < 0:
            raise DecodeError(start, f"statmount string outside of its {size} bytes")
        return buffer[start:end]

    sb = bool(mask & STATMOUNT_SB_BASIC)
    mnt = bool(mask & STATMOUNT_MNT_BASIC)
    fs_type, fs_subtype = text(STATMOUNT_FS_TYPE, fstype), text(STATMOUNT_FS_SUBTYPE, subtype)
    return MountStat(
        unique_id=unique_id if mnt else None,
        parent_unique_id=parent_unique_id if mnt else None,
        id=mount_id if mnt else None,
        parent_id=parent_id if mnt else None,
        attributes=attributes if mnt else None,
        propagation=propagation if mnt else None,
        peer_group=peer_group if mnt else None,
        master=master if mnt else None,
        dev=(major, minor) if sb else None,
        magic=magic if sb else None,
        super_flags=super_flags if sb else None,
        propagate_from=propagate_from if mask & STATMOUNT_PROPAGATE_FROM else None,
        root=text(STATMOUNT_MNT_ROOT, root),
        mount_point=text(STATMOUNT_MNT_POINT, point),
        fstype=None if fs_type is None else os.fsdecode(fs_type),
        subtype=None if fs_subtype is None else os.fsdecode(fs_subtype),
        namespace_id=namespace_id if mask & STATMOUNT_MNT_NS_ID else None,
        options=text(STATMOUNT_MNT_OPTS, options),
        source=text(STATMOUNT_SB_SOURCE, source),
    )


# Bits of MountStat, and the words by which mountinfo has them, in its order.
_MOUNT_ATTR_RDONLY = 0x1
_MOUNT_ATTR_ATIME = 0x70  # a field of its own: 0 is relatime
_MOUNT_WORDS = (
    (0x2, 0x2, "nosuid"),
    (0x4, 0x4, "nodev"),
    (0x8, 0x8, "noexec"),
    (_MOUNT_ATTR_ATIME, 0x10, "noatime"),
    (0x80, 0x80, "nodiratime"),
    (_MOUNT_ATTR_ATIME, 0, "relatime"),
    (0x20_0000, 0x20_0000, "nosymfollow"),
    (0x10_0000, 0x10_0000, "idmapped"),
)
_SB_RDONLY = 0x1
_SB_WORDS = ((0x10, "sync"), (0x80, "dirsync"), (0x40, "mand"), (0x200_0000, "lazytime"))
_MS_UNBINDABLE, _MS_SHARED, _MS_SLAVE = 1 << 17, 1 << 20, 1 << 19


def describe(unique_id: int) -> Mount:
    """Describe one mount as `mounts` does, at a cost that does not grow with their number.

    Security modules' options are the one thing that only mountinfo has. Raises NoSuchRoot when it
    is not mounted, or is not below this process's root; FeatureMissing, SyscallBlocked.
    """
    what = f"mount {unique_id}"
    try:
        stat = statmount(unique_id)
    except FileNotFoundError as error:
        raise NoSuchRoot(what, "it is not mounted") from error
    except PermissionError as error:
        raise NoSuchRoot(what, "it is outside of this process's root") from error
    point = stat.mount_point
    if point is None or not point.startswith(b"/"):
        raise NoSuchRoot(what, "it is outside of this process's root")
    if None in (stat.id, stat.parent_id, stat.dev, stat.root, stat.fstype, stat.attributes):
        raise FeatureMissing(what, "this kernel's statmount does not tell enough")
    assert stat.id is not None
    assert stat.parent_id is not None
    assert stat.dev is not None
    assert stat.root is not None
    assert stat.fstype is not None
    attributes = stat.attributes or 0
    supers = stat.super_flags or 0
    fields = []
    if stat.propagation:
        if stat.propagation & _MS_SHARED:
            fields.append(f"shared:{stat.peer_group}")
        if stat.propagation & _MS_SLAVE:
            fields.append(f"master:{stat.master}")
            if stat.propagate_from and stat.propagate_from != stat.master:
                fields.append(f"propagate_from:{stat.propagate_from}")
        if stat.propagation & _MS_UNBINDABLE:
            fields.append("unbindable")
    return Mount(
        stat.id,
        stat.parent_id,
        stat.dev,
        stat.root,
        point,
        (
            "ro" if attributes & _MOUNT_ATTR_RDONLY else "rw",
            *(word for mask, value, word in _MOUNT_WORDS if attributes & mask == value),
        ),
        tuple(fields),
        f"{stat.fstype}.{stat.subtype}" if stat.subtype else stat.fstype,
        stat.source or b"",
        (
            "ro" if supers & _SB_RDONLY else "rw",
            *(word for bit, word in _SB_WORDS if supers & bit),
            *(_split_options(stat.options) if stat.options else ()),
        ),
        unique_id,
    )


def visible(there: Iterable[Mount]) -> set[int]:
    """Which mounts a path leads to: the ids of those that no other mount covers.

    A mount is covered by one on the same point, and by one on a directory above that came later.
    Answered from the list alone: no look-up, so nothing is automounted and no server is asked.
    """
    there = list(there)
    on: dict[int, list[Mount]] = {}
    for mount in there:
        if mount.id != mount.parent_id:
            on.setdefault(mount.parent_id, []).append(mount)
    known = {mount.id for mount in there}
    found: set[int] = set()
    for top in there:
        if top.parent_id in known and top.id != top.parent_id:
            continue
        todo = [top]
        while todo:
            mount = todo.pop()
            below = on.get(mount.id, [])
            # On the root of this one: there is at most one, and it covers all of it.
            over = [each for each in below if each.mount_point == mount.mount_point]
            if over:
                todo += over[:1]
                continue
            found.add(mount.id)
            # Of two on one way down the upper one is passed first, and hides the other.
            points = {each.mount_point for each in below}
            todo += [each for each in below if not _passes(each.mount_point, points)]
    return found


def _passes(point: bytes, points: set[bytes]) -> bool:
    at = point.rfind(b"/")
    while at > 0:
        if point[:at] in points:
            return True
        at = point.rfind(b"/", 0, at)
    return False


def can_statmount() -> bool:
    """Whether statmount(2) works here: the kernel has it and no filter refuses it."""
    if _ODD_NUMBERS:
        return False
    # An address that cannot be read: a kernel that has the call looks there first.
    libc.syscall(ctypes.c_long(_SYS_STATMOUNT), None, None, ctypes.c_size_t(0), ctypes.c_uint(0))
    return ctypes.get_errno() == errno.EFAULT


def statmount(unique_id: int, mask: int = _STATMOUNT_ALL) -> MountStat:
    """Describe the mount with this unique id; ``mask`` (STATMOUNT_*) says what to tell.

    Raises FileNotFoundError when it is not mounted in this mount namespace (a detached mount never
    is), FeatureMissing, SyscallBlocked, DecodeError; OSError (EINVAL) for an id up to 2**31, which
    is none.
    """
    size = 1024
    request = _REQUEST.pack(_REQUEST.size, 0, unique_id, mask)
    while True:
        buffer = ctypes.create_string_buffer(size)
        try:
            _call(_SYS_STATMOUNT, "statmount", request, buffer, size)
        except OSError as error:
            if error.errno != errno.EOVERFLOW or size >= _STATMOUNT_LIMIT:
                raise
            size *= 4
        else:
            return decode_statmount(buffer.raw)


def listmount() -> list[int]:
    """List the unique ids of all mounts below this process's root.

    Raises FeatureMissing, SyscallBlocked.
    """
    ids: list[int] = []
    while True:
        found = (ctypes.c_uint64 * _LIST_AT_ONCE)()
        request = _REQUEST.pack(_REQUEST.size, 0, _LSMT_ROOT, ids[-1] if ids else 0)
        count = _call(_SYS_LISTMOUNT, "listmount", request, found, _LIST_AT_ONCE)
        ids += found[:count]
        if count < _LIST_AT_ONCE:
            return ids


def _call(
    number: int,
    name: str,
    request: bytes,
    answer: object,
    room: int,
) -> int:
    if _ODD_NUMBERS:
        raise FeatureMissing(name, "the system call's number is not known on this architecture")
    result: int = libc.syscall(
        ctypes.c_long(number), request, answer, ctypes.c_size_t(room), ctypes.c_uint(0)
    )
    if result < 0:
        _refuse(last_error(), name)
    return result


def _refuse(error: OSError, name: str) -> NoReturn:
    if error.errno in (errno.ENOSYS, errno.EPERM) and credentials().filtered:
        raise SyscallBlocked(
            name, f"a seccomp filter refuses {name}", f"allow {name} in the filter's profile"
        ) from error
    if error.errno == errno.ENOSYS:
        raise FeatureMissing(name, f"this kernel has no {name}") from error
    raise error
