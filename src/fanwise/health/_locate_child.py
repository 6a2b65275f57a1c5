"""Finds the path of one inode, in a process of its own: whoever asks a sick disk may never return.

Run as a file by `fanwise.health._locate`: the argument is a question as JSON, the answer one line
of JSON. Ways, the cheapest first; none but the last reads more than a few blocks:

- the handle: gives a path when the entry is cached, and always for a directory;
- the filesystem's own call: xfs tells an inode's generation (XFS_IOC_BULKSTAT), without which it
  takes no handle; btrfs tells every name in every subvolume (BTRFS_IOC_INO_LOOKUP, INO_PATHS);
- a search of directories by inode number, bounded, on the idle class of the disk's scheduler. It
  reads names and looks at no inode, because a broken one may not be readable.

Where only bytes of the device are known, the filesystem is asked whose they are first (GETFSMAP):
xfs knows when it was made with rmapbt. ext4 and btrfs tell no owner of data.

With paths it tells what they lie below, as numbers: names may change, and a directory has others by
other mounts. So it does when it is asked for that alone, of a path.

Imports the standard library only: it must start fast, and whatever the host's path is.
Linux reference: open_by_handle_at(2), ioctl_xfs_bulkstat(2), ioprio_set(2), btrfs-ioctl(2),
ioctl_getfsmap(2);
fs/btrfs/ioctl.c, include/uapi/linux/btrfs.h.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import platform
import struct
import sys
import time
from collections import deque
from typing import Any

_XFS_BULKSTAT = (2 << 30) | (64 << 16) | (ord("X") << 8) | 127
_BTRFS_TREE_SEARCH = (3 << 30) | (4096 << 16) | (0x94 << 8) | 17
_BTRFS_INO_LOOKUP = (3 << 30) | (4096 << 16) | (0x94 << 8) | 18
_BTRFS_INO_PATHS = (3 << 30) | (56 << 16) | (0x94 << 8) | 35
_GETFSMAP = (3 << 30) | (192 << 16) | (ord("X") << 8) | 59
_FSMAP = "=II4Q24x"  # device, flags, physical, owner, offset, length
_SPECIAL = 0x10  # FMR_OF_SPECIAL_OWNER: not an inode
_TOP, _ROOT_TREE, _ROOT_BACKREF, _SUBVOLUME = 5, 1, 144, 256
_OWN_NUMBER = ("ext2", "ext3", "ext4", "xfs")  # that of the superblock is that of its files
_MOST_SUBVOLUMES = 10_000
_MOST_NAMES = 64
_MOST_ABOVE = 256
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273, "s390x": 282}
_IDLE = 3 << 13

_libc = ctypes.CDLL(None, use_errno=True)


class Nothing(Exception):
    """A way that led to no path, and why."""


def ask(question: dict[str, Any]) -> dict[str, Any]:
    """Answer with ``paths`` (hexadecimal), ``source``, ``reason`` and the inode's ``gen``.

    ``above`` has for each path device and inode of the directories above, the nearest first, None
    for one that does not say.
    """
    answer: dict[str, Any] = {"paths": [], "source": None, "reason": None, "gen": None}
    if question.get("path"):
        path = bytes.fromhex(question["path"])
        return answer | {"paths": [path.hex()], "above": [above(path)]}
    try:
        fd = os.open(bytes.fromhex(question["point"]), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        answer["reason"] = f"the mount point cannot be opened: {error.strerror}"
        return answer
    here = os.fstat(fd).st_dev
    # The mount may be gone by now, or covered. (btrfs has a number for each subvolume.)
    if (
        question["fstype"] in _OWN_NUMBER
        and f"{os.major(here)}:{os.minor(here)}" != question["device"]
    ):
        answer["reason"] = "another filesystem is mounted there"
        return answer
    if question.get("start") is not None:
        try:
            question = question | {"ino": _owner(fd, question)}
        except (Nothing, OSError) as error:
            answer["reason"] = f"owner: {error}"
            return answer
    reasons = []
    ways = {"handle": _by_handle, "filesystem": _by_filesystem, "search": _by_search}
    for source in question["ways"]:
        try:
            paths = ways[source](fd, question, answer)
        except Nothing as error:
            reasons.append(f"{source}: {error}")
            if answer.get("gone"):
                break
            continue
        except OSError as error:
            reasons.append(f"{source}: {error.strerror}")
            continue
        answer.update(paths=[path.hex() for path in paths], source=source)
        answer["above"] = [above(path) for path in paths]
        break
    answer["reason"] = "; ".join(reasons) or None
    answer.pop("gone", None)
    return answer


def above(path: bytes) -> list[tuple[int, int] | None]:
    """Device and inode of each directory above a path, as stat has them."""
    found: list[tuple[int, int] | None] = []
    while len(found) < _MOST_ABOVE:
        parent = os.path.dirname(path)
        if parent == path:
            break
        path = parent
        try:
            seen = os.stat(path)
        except OSError:  # gone, or broken
            found.append(None)
        else:
            found.append((seen.st_dev, seen.st_ino))
    return found


# -- the handle --


def _by_handle(fd: int, question: dict[str, Any], answer: dict[str, Any]) -> list[bytes]:
    key = bytes.fromhex(question["key"] or "")
    ino, gen = question["ino"], question["gen"]
    if not key:
        kind = question["fstype"]
        if kind in ("ext2", "ext3", "ext4"):
            key = struct.pack("=iII", 1, ino & 0xFFFFFFFF, gen or 0)  # 0: any
        elif kind == "xfs" and gen is not None:
            key = struct.pack("=iQI", 0x81, ino, gen)
        else:
            raise Nothing("none was told")
    return [_open(fd, key, ino, answer)]


def _open(fd: int, key: bytes, ino: int, answer: dict[str, Any]) -> bytes:
    handle = struct.pack("=I", len(key) - 4) + key
    found = _libc.open_by_handle_at(fd, handle, os.O_PATH | os.O_CLOEXEC)
    if found < 0:
        code = ctypes.get_errno()
        raise Nothing("it is gone, or broken" if code == errno.ESTALE else os.strerror(code))
    try:
        seen = os.fstat(found)
        answer["nlink"] = seen.st_nlink
        if not seen.st_nlink:
            answer["gone"] = True
            raise Nothing("it is deleted, and has no name any more")
        path = os.readlink(f"/proc/self/fd/{found}".encode())
        there = None
        with contextlib.suppress(OSError):
            there = os.lstat(path)
        # An entry that is not cached has no place yet, and says "/".
        if there is None or (there.st_dev, there.st_ino) != (seen.st_dev, seen.st_ino):
            raise Nothing("no entry of it is cached")
        if seen.st_ino != ino:
            raise Nothing("it is another inode")
        return path
    finally:
        os.close(found)


# -- whose bytes of the device are --


def _owner(fd: int, question: dict[str, Any]) -> int:
    if question["fstype"] != "xfs":
        raise Nothing(f"{question['fstype']} tells no owner of a block")
    dev = os.fstat(fd).st_dev
    here = f"/sys/dev/block/{os.major(dev)}:{os.minor(dev)}"
    if os.path.isdir(f"{here}/slaves") and os.listdir(f"{here}/slaves"):
        raise Nothing("its device stands on others, which place bytes elsewhere")
    first = question["start"]
    if os.path.exists(f"{here}/partition"):  # a failed request names the whole disk
        with open(f"{here}/start", encoding="ascii") as file:
            first -= int(file.read()) * 512
    last = first + question["length"] - 1
    number = os.minor(dev) & 0xFF | os.major(dev) << 8 | (os.minor(dev) & ~0xFF) << 12
    most = (1 << 64) - 1
    request = bytearray(64 + 128 + 64 * 64)
    struct.pack_into("=4I", request, 0, 0, 0, 64, 0)
    struct.pack_into(_FSMAP, request, 64, number, 0, first, 0, 0, 0)
    struct.pack_into(_FSMAP, request, 128, number, 0xFFFFFFFF, last, most, most, 0)
    fcntl.ioctl(fd, _GETFSMAP, request)
    (count,) = struct.unpack_from("=I", request, 12)
    owners = set()
    for n in range(min(count, 64)):
        _, flags, physical, owner, _, length = struct.unpack_from(_FSMAP, request, 192 + n * 64)
        if not flags & _SPECIAL and physical <= last and physical + length > first:
            owners.add(owner)
    if len(owners) > 1:
        raise Nothing(f"the bytes are of several files: inodes {sorted(owners)}")
    if not owners:
        raise Nothing("no file has the bytes, or the filesystem was made without rmapbt")
    return int(owners.pop())


# -- the filesystem's own call --


def _by_filesystem(fd: int, question: dict[str, Any], answer: dict[str, Any]) -> list[bytes]:
    if question["fstype"] == "xfs" and question["gen"] is None:
        request = bytearray(struct.pack("=QII48x", question["ino"], 0, 1) + bytes(192))
        fcntl.ioctl(fd, _XFS_BULKSTAT, request)
        (count,) = struct.unpack_from("=I", request, 12)
        (ino,) = struct.unpack_from("=Q", request, 64)
        if not count or ino != question["ino"]:
            answer["gone"] = True
            raise Nothing("there is no such inode")
        (answer["gen"],) = struct.unpack_from("=I", request, 64 + 64)
        key = struct.pack("=iQI", 0x81, ino, answer["gen"])
        return [_open(fd, key, ino, answer)]
    if question["fstype"] == "btrfs":
        return _btrfs(fd, question, answer)
    raise Nothing(f"{question['fstype']} has none")


def _btrfs(fd: int, question: dict[str, Any], answer: dict[str, Any]) -> list[bytes]:
    ino, point = question["ino"], bytes.fromhex(question["point"])
    key = bytes.fromhex(question["key"] or "")
    tree = struct.unpack_from("=Q", key, 12)[0] if len(key) >= 24 else None
    top, _ = _lookup(fd, 0, _SUBVOLUME)
    found, seen = [], 0
    for number, inside in _subvolumes(fd, top):
        if tree not in (None, number):
            continue
        with contextlib.suppress(OSError):
            _lookup(fd, number, ino)
            seen += 1
            folder = os.path.join(point, inside) if inside else point
            with _opened(folder) as sub:
                if number != _lookup(sub, 0, _SUBVOLUME)[0]:
                    continue  # something is mounted over it
                found += [os.path.join(folder, name) for name in _names(sub, ino)]
    if not found:
        # The tree's own number means no file; and what is deleted is in no tree.
        answer["gone"] = not seen
        raise Nothing("no subvolume below the mount point has it")
    if seen > 1:
        answer["ambiguous"] = True
    return found[:_MOST_NAMES]


@contextlib.contextmanager
def _opened(path: bytes) -> Any:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _lookup(fd: int, tree: int, ino: int) -> tuple[int, bytes]:
    """The tree (that of ``fd`` for 0), and one path of an inode in it."""
    args = bytearray(struct.pack("=QQ4080x", tree, ino))
    fcntl.ioctl(fd, _BTRFS_INO_LOOKUP, args)
    (number,) = struct.unpack_from("=Q", args)
    return number, bytes(args[16:]).partition(b"\0")[0].rstrip(b"/")


def _names(fd: int, ino: int) -> list[bytes]:
    """All names of an inode in the subvolume of ``fd``."""
    room = ctypes.create_string_buffer(64 << 10)
    args = bytearray(struct.pack("=QQ32xQ", ino, len(room), ctypes.addressof(room)))
    fcntl.ioctl(fd, _BTRFS_INO_PATHS, args)
    raw = room.raw
    (count,) = struct.unpack_from("=I", raw, 8)
    offsets = struct.unpack_from(f"={count}Q", raw, 16)
    return [raw[16 + at :].partition(b"\0")[0] for at in offsets]


def _subvolumes(fd: int, top: int) -> list[tuple[int, bytes]]:
    """The subvolume ``top`` and those below it: number, path from there."""
    parents: dict[int, tuple[int, int, bytes]] = {}
    at, kind, offset = _SUBVOLUME, 0, 0
    while len(parents) < _MOST_SUBVOLUMES:
        most = (1 << 64) - 1
        # struct btrfs_ioctl_search_key: tree, objectids, offsets, transids, types, items
        head = struct.pack(
            "=7Q4I32x", _ROOT_TREE, at, most, offset, most, 0, most, kind, 255, 64, 0
        )
        args = bytearray(head + bytes(4096 - len(head)))
        fcntl.ioctl(fd, _BTRFS_TREE_SEARCH, args)
        (count,) = struct.unpack_from("=I", args, 64)
        if not count:
            break
        where = 104
        for _ in range(count):
            _, at, offset, kind, length = struct.unpack_from("=QQQII", args, where)
            where += 32
            if kind == _ROOT_BACKREF:
                folder, _, size = struct.unpack_from("=QQH", args, where)
                parents[at] = offset, folder, bytes(args[where + 18 : where + 18 + size])
            where += length
        # The next key: behind the last one.
        offset += 1
        if offset == 1 << 64:
            offset, kind = 0, kind + 1
    paths: dict[int, bytes | None] = {top: b""}

    def path(number: int, depth: int = 0) -> bytes | None:
        if number not in paths:
            paths[number] = None
            if number in parents and depth < 64:
                parent, folder, name = parents[number]
                above = path(parent, depth + 1)
                if above is not None:
                    with contextlib.suppress(OSError):
                        inside = b"" if folder == _SUBVOLUME else _lookup(fd, parent, folder)[1]
                        paths[number] = os.path.join(above, inside, name)
        return paths[number]

    return [(n, p) for n in (top, *parents) if (p := path(n)) is not None]


# -- the search --


def _by_search(fd: int, question: dict[str, Any], answer: dict[str, Any]) -> list[bytes]:
    if question["fstype"] == "btrfs":
        raise Nothing("a number alone says little there")
    point, ino = bytes.fromhex(question["point"]), question["ino"]
    if os.fstat(fd).st_ino == ino:
        return [point]
    links = answer.get("nlink", 1)
    until = time.monotonic() + question["seconds"]
    left, unread = question["entries"], 0
    others = _mount_points()
    found: list[bytes] = []
    queue = deque([point])
    while queue:
        folder = queue.popleft()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    left -= 1
                    if left < 0 or time.monotonic() > until:
                        if found:
                            return found
                        spent = "entries" if left < 0 else "seconds"
                        raise Nothing(f"not among {question[spent]} {spent} of names")
                    if entry.inode() == ino and entry.path not in others:
                        found.append(entry.path)
                        if len(found) >= min(links, _MOST_NAMES):
                            return found
                    if entry.is_dir(follow_symlinks=False) and entry.path not in others:
                        queue.append(entry.path)
        except OSError:
            unread += 1
    if found:
        return found
    raise Nothing(
        f"no name leads to it; {unread} directories cannot be read"
        if unread
        else "no name leads to it"
    )


def _mount_points() -> set[bytes]:
    with open("/proc/self/mountinfo", "rb") as file:
        points = [line.split()[4] for line in file]
    return {
        point.replace(b"\\040", b" ").replace(b"\\011", b"\t").replace(b"\\012", b"\n")
        .replace(b"\\134", b"\\")
        for point in points
    }  # fmt: skip


def _be_humble() -> None:
    os.nice(19)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        _libc.syscall(number, 1, 0, _IDLE)


if __name__ == "__main__":
    _be_humble()
    print(json.dumps(ask(json.loads(sys.argv[1]))), flush=True)
