"""The counters that filesystems and devices keep in sysfs.

They are the truth where there is one: ext4 counts every error in its superblock, also those that no
event tells of, and keeps the first and the last one; btrfs counts per device, on disk. xfs counts
nothing. Block devices count for themselves.

Reading is of files of a few bytes and asks no device. What cannot be understood is told as
`Garbage` beside the rest; nothing stops for it. A counter may go back (e2fsck, `btrfs device
stats -z`): `advance` says so.

Linux reference: Documentation/ABI/testing/sysfs-fs-ext4, fs/ext4/sysfs.c, fs/btrfs/sysfs.c,
Documentation/ABI/stable/sysfs-block.
"""

import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from fanwise.kernel.mounts import Mount

SYS = Path("/sys")
_LIMIT = 4096  # bytes of a sysfs file: it has at most a page

# ext4 has a list of its own for what it writes into its superblock (EXT4_ERR_*, fs/ext4/ext4.h).
# 1 is "unknown"; what is not here is told as unknown too.
_EXT4_CODES = {
    2: errno.EIO,
    3: errno.ENOMEM,
    4: errno.EBADMSG,  # EFSBADCRC
    5: errno.EUCLEAN,  # EFSCORRUPTED
    6: errno.ENOSPC,
    7: errno.ENOKEY,
    8: errno.EROFS,
    9: errno.EFBIG,
    10: errno.EEXIST,
    11: errno.ERANGE,
    12: errno.EOVERFLOW,
    13: errno.EBUSY,
    14: errno.ENOTDIR,
    15: errno.ENOTEMPTY,
    16: errno.ESHUTDOWN,
    17: errno.EFAULT,
}


class Garbage(msgspec.Struct, frozen=True, gc=False):
    """A file that does not say what it should: its ``path``, and ``why`` with what it says."""

    path: str
    why: str


class ErrorPoint(msgspec.Struct, frozen=True, gc=False):
    """ext4's first or last error: when, where in the kernel's code, on what.

    ``time`` is in seconds since the epoch; ``ino``, ``block`` and ``errno`` are 0 when not known.
    """

    time: int
    function: str
    line: int
    ino: int
    block: int
    errno: int


class Ext4Counters(msgspec.Struct, frozen=True, gc=False):
    """``errors`` since the filesystem was last checked, the others since it was mounted.

    None is what the kernel does not tell or could not be understood.
    """

    errors: int | None
    warnings: int | None
    messages: int | None
    first: ErrorPoint | None
    last: ErrorPoint | None


class BtrfsDevice(msgspec.Struct, frozen=True, gc=False):
    """A device's errors since they were last reset; kept on disk. None is what is not told."""

    id: int
    write: int | None
    read: int | None
    flush: int | None
    corruption: int | None
    generation: int | None


class BlockDevice(msgspec.Struct, frozen=True, gc=False):
    """A block device: requests done (its first and fifth column of ``stat``), SCSI's errors."""

    reads: int | None
    writes: int | None
    io_errors: int | None


class Reading(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What one look at a filesystem gave. ``garbage`` is what could not be understood."""

    ext4: Ext4Counters | None = None
    btrfs: tuple[BtrfsDevice, ...] = ()
    block: dict[str, BlockDevice] = {}
    garbage: tuple[Garbage, ...] = ()


class Layer(msgspec.Struct, frozen=True, gc=False):
    """One device below a filesystem: its name, and what it is.

    ``kind`` is "loop" (then ``detail`` is the file), "partition" (the disk), "dm" or "md" (its
    name), or "disk".
    """

    name: str
    dev: str
    kind: str
    detail: str | None = None


class Place(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """Where a filesystem's counters are, and what it stands on.

    ``directory`` is its own below /sys/fs, None when it has none. ``layers`` are its block devices,
    each followed by those below it. ``uuid`` is known here for btrfs only.
    """

    fstype: str
    directory: str | None
    layers: tuple[Layer, ...]
    uuid: str | None = None


def place_of(mount: Mount, sys: Path = SYS) -> Place:
    """Find a mounted filesystem's directories in sysfs; what is not there is None. Raises nothing.

    ext4 and xfs name theirs after the block device, btrfs after its UUID, which is found by the
    device that is mounted (its superblock's device number is an anonymous one).
    """
    device = _block(sys, mount.dev) or _source(sys, mount)
    name = None if device is None else device.name
    if mount.fstype == "btrfs":
        return _btrfs_place(sys, name)
    layers = () if device is None else tuple(_layers(sys, device))
    directory = sys / "fs" / mount.fstype.replace("ext2", "ext4").replace("ext3", "ext4")
    found = None if name is None else directory / name
    return Place(
        fstype=mount.fstype,
        directory=str(found) if found is not None and found.is_dir() else None,
        layers=layers,
    )


def _btrfs_place(sys: Path, name: str | None) -> Place:
    for found in sorted((sys / "fs/btrfs").glob("*-*-*")):
        try:
            devices = sorted(os.listdir(found / "devices"))
        except OSError:
            continue
        if name in devices:
            layers: list[Layer] = []
            for device in devices:
                real = _real(found / "devices" / device)
                if real is not None:
                    layers += _layers(sys, real)
            return Place(
                fstype="btrfs", directory=str(found), layers=tuple(layers), uuid=found.name
            )
    return Place(fstype="btrfs", directory=None, layers=())


def read(place: Place, sys: Path = SYS) -> Reading:
    """Read the counters of a filesystem and of the devices below it. Raises nothing."""
    files = _Files()
    ext4: Ext4Counters | None = None
    btrfs: tuple[BtrfsDevice, ...] = ()
    if place.directory is not None:
        if place.fstype == "btrfs":
            btrfs = tuple(_btrfs(files, Path(place.directory)))
        elif place.directory.startswith(str(sys / "fs/ext4/")):
            ext4 = _ext4(files, Path(place.directory))
    block = {layer.name: _device(files, sys / "dev/block" / layer.dev) for layer in place.layers}
    return Reading(ext4=ext4, btrfs=btrfs, block=block, garbage=tuple(files.garbage))


class Step(NamedTuple):
    """How a counter moved: ``new`` errors, and whether it went back in between."""

    new: int
    went_back: bool


def advance(before: int | None, now: int | None) -> Step:
    """Compare two readings of a counter.

    One that went back was reset: what it shows now is new. A first reading is a baseline, and a
    reading that failed moves nothing.
    """
    if before is None or now is None:
        return Step(0, False)
    if now < before:
        return Step(now, True)
    return Step(now - before, False)


T = TypeVar("T")


class _Files:
    def __init__(self) -> None:
        self.garbage: list[Garbage] = []

    # None when it is not there: kernels have more of them over time.
    def text(self, path: Path) -> str | None:
        try:
            with open(path, "rb") as file:
                data = file.read(_LIMIT)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self.garbage.append(Garbage(str(path), f"cannot be read: {error.strerror}"))
            return None
        return data.decode("utf-8", "replace").strip()

    def parsed(self, path: Path, pattern: str, make: Callable[[re.Match[str]], T]) -> T | None:
        text = self.text(path)
        if text is None:
            return None
        found = re.fullmatch(pattern, text)
        if found is None:
            self.garbage.append(Garbage(str(path), f"does not make sense: {text[:80]!r}"))
            return None
        return make(found)

    def number(self, path: Path) -> int | None:
        return self.parsed(path, r"\d{1,20}", lambda found: int(found[0]))

    def hexadecimal(self, path: Path) -> int | None:
        return self.parsed(path, r"0x[0-9a-fA-F]{1,16}|\d{1,20}", lambda found: int(found[0], 0))


def _ext4(files: _Files, at: Path) -> Ext4Counters:
    return Ext4Counters(
        files.number(at / "errors_count"),
        files.number(at / "warning_count"),
        files.number(at / "msg_count"),
        _point(files, at, "first_error"),
        _point(files, at, "last_error"),
    )


def _point(files: _Files, at: Path, which: str) -> ErrorPoint | None:
    time = files.number(at / f"{which}_time")
    if not time:  # none was recorded
        return None
    code = files.number(at / f"{which}_errcode")
    return ErrorPoint(
        time,
        files.parsed(at / f"{which}_func", r"[\w.]{0,64}", lambda found: found[0]) or "",
        files.number(at / f"{which}_line") or 0,
        files.number(at / f"{which}_ino") or 0,
        files.number(at / f"{which}_block") or 0,
        _EXT4_CODES.get(code or 0, 0),
    )


_BTRFS = ("write_errs", "read_errs", "flush_errs", "corruption_errs", "generation_errs")


def _btrfs(files: _Files, at: Path) -> Iterator[BtrfsDevice]:
    try:
        devices = sorted(os.listdir(at / "devinfo"))
    except OSError as error:
        files.garbage.append(Garbage(str(at / "devinfo"), f"cannot be read: {error.strerror}"))
        return
    for device in devices:
        path = at / "devinfo" / device / "error_stats"
        text = files.text(path)
        if not device.isdigit() or text is None:
            continue
        if text == "invalid":  # the device is missing
            yield BtrfsDevice(int(device), None, None, None, None, None)
            continue
        numbers: dict[str, int] = {}
        for line in text.splitlines():
            found = re.fullmatch(r"(\w+) (\d{1,20})", line)
            if found is None:
                files.garbage.append(Garbage(str(path), f"does not make sense: {line[:80]!r}"))
            else:
                numbers[found[1]] = int(found[2])
        yield BtrfsDevice(int(device), *(numbers.get(name) for name in _BTRFS))


def _device(files: _Files, at: Path) -> BlockDevice:
    columns = files.parsed(at / "stat", r"(\d+)\s+\d+\s+\d+\s+\d+\s+(\d+)\b.*", re.Match.groups)
    reads, writes = (int(columns[0]), int(columns[1])) if columns else (None, None)
    return BlockDevice(reads, writes, files.hexadecimal(at / "device/ioerr_cnt"))


def _block(sys: Path, dev: tuple[int, int]) -> Path | None:
    return _real(sys / f"dev/block/{dev[0]}:{dev[1]}")


def _source(sys: Path, mount: Mount) -> Path | None:
    try:
        number = os.stat(mount.source).st_rdev
    except (OSError, ValueError):
        return None
    return _block(sys, (os.major(number), os.minor(number))) if number else None


def _real(path: Path) -> Path | None:
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError):
        return None


# A device and all below it, each once; a cycle cannot be, but sysfs is not trusted with that.
def _layers(sys: Path, device: Path) -> Iterator[Layer]:
    waiting, seen = [device], set()
    while waiting:
        at = waiting.pop(0)
        if at in seen:
            continue
        seen.add(at)
        files = _Files()
        dev = files.text(at / "dev") or ""
        kind, detail, below = "disk", None, []
        if (at / "partition").exists():
            kind, detail, below = "partition", at.parent.name, [at.parent]
        elif (at / "loop").is_dir():
            kind, detail = "loop", files.text(at / "loop/backing_file")
        elif (at / "dm").is_dir():
            kind, detail = "dm", files.text(at / "dm/name")
        elif (at / "md").is_dir():
            kind, detail = "md", files.text(at / "md/level")
        with_slaves = sorted((at / "slaves").glob("*"))
        below += [real for real in map(_real, with_slaves) if real is not None]
        yield Layer(at.name, dev, kind, detail)
        waiting += below
