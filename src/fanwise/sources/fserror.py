"""FS_ERROR: the errors that filesystems report through fanotify.

The groups are for this and nothing else: in a group that shares its queue with other events, a full
queue loses errors, even those that could have been merged (measured: 8 lost, 1 kept). They report
FAN_REPORT_FID: with directory handles alone the mark is accepted and no event ever comes.

An event says: so many errors since the last read, the first one's errno and object. Until it is
read, further errors on the same filesystem raised by the same process are merged into it. So
counts are added up; who raised is part of the key and means "tripped over it", not "did it". From
Linux 7.0 on (fs/fserror.c) filesystems hand errors to a worker: later, in several events, from
the worker's pid, which is then not told at all.

fsid does not identify: copies of a filesystem share it, and the kernel merges their errors within a
group. So no group has two living superblocks of one fsid.

REFS      one descriptor for each group; the marks belong to the kernel. No descriptor on a marked
          filesystem is kept, so unmounting works.
LOCKING   none: one owner.
LIFETIME  see FS_ERRORS. A mark dies with its superblock, in silence: `follow` sets it again, and
          reads what the dead left before it gives their fsid to another. Events outlive the
          filesystem. A forked child closes the groups at once: one that kept them would keep them
          queueing.

Linux reference: fanotify(7), fs/notify/fanotify/fanotify.c, facts measured on 6.18.
"""

import errno
import os
import re
import select
import struct
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType

import msgspec

from fanwise._errors import DecodeError, FanwiseError
from fanwise.kernel import mounts, records
from fanwise.kernel.fanotify import (
    FAN_CLASS_NOTIF,
    FAN_CLOEXEC,
    FAN_FS_ERROR,
    FAN_MARK_ADD,
    FAN_MARK_FILESYSTEM,
    FAN_NONBLOCK,
    FAN_Q_OVERFLOW,
    FAN_REPORT_FID,
    FAN_UNLIMITED_QUEUE,
    init,
    mark,
)
from fanwise.kernel.handles import inode_of
from fanwise.kernel.mounts import Mount
from fanwise.lifetime import Lifetime
from fanwise.sources.state import SourceState

_INIT = FAN_CLASS_NOTIF | FAN_CLOEXEC | FAN_NONBLOCK | FAN_UNLIMITED_QUEUE | FAN_REPORT_FID
_READ = 64 << 10
_KERNEL_THREAD = 0x0020_0000  # PF_KTHREAD, field 9 of /proc/PID/stat

Dev = tuple[int, int]


class Process(msgspec.Struct, frozen=True, gc=False):
    """The process that tripped over an error; ``comm`` is None when it was gone already."""

    pid: int
    comm: str | None


class FsErrorReport(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One record of FS_ERROR.

    ``dev`` is the superblock's device as mountinfo has it, None when the fsid is not one that is
    followed. ``errno`` (positive) and ``key`` (a file handle's, see kernel.handles) are of the
    first error, ``count`` is how many there were; ``key`` is None when the error names no object,
    ``ino`` and ``generation`` are None when the handle does not say; a generation of 0 means that
    the inode could not be read. ``process`` is None when a kernel thread reported. ``time`` is
    that of reading, in seconds since the epoch: the kernel gives none.
    """

    dev: Dev | None
    fsid: bytes
    errno: int
    count: int
    key: bytes | None
    ino: int | None
    generation: int | None
    process: Process | None
    time: float


class FsErrorLoss(msgspec.Struct, frozen=True, gc=False):
    """The kernel dropped reports of these superblocks, it does not say how many."""

    devs: tuple[Dev, ...]
    time: float


def reports(buffer: bytes, clock: Callable[[], float] = time.time) -> list[FsErrorReport | None]:
    """Decode what was read from a group, without knowing devices; None stands for an overflow.

    Events that are neither are passed over, information of unknown types too. Raises DecodeError.
    """
    found: list[FsErrorReport | None] = []
    now = clock()
    for record in records.decode(buffer):
        if record.mask & FAN_Q_OVERFLOW:
            found.append(None)
        elif record.mask & FAN_FS_ERROR:
            report = _report(record, now)
            if report is not None:
                found.append(report)
    return found


def _report(record: records.Record, now: float) -> FsErrorReport | None:
    fid: records.Fid | None = None
    failure: records.FsError | None = None
    for info in record.infos:
        if isinstance(info, records.Fid):
            fid = fid or info
        elif isinstance(info, records.FsError):
            failure = info
        elif isinstance(info, records.Pidfd) and info.fd >= 0:
            os.close(info.fd)
    if failure is None:
        return None
    # FILEID_INVALID and no bytes behind it: the error names no object.
    key = None if fid is None or len(fid.key) <= 4 else fid.key
    return FsErrorReport(
        dev=None,
        fsid=b"" if fid is None else fid.fsid,
        # Older kernels and 7.0 alike give it positive; a negative one would be the same error.
        errno=abs(failure.errno),
        count=max(failure.errors, 1),
        key=key,
        ino=None if key is None else inode_of(key),
        generation=None if key is None else generation_of(key),
        process=process_of(record.pid),
        time=now,
    )


# FILEID_INO32_GEN: ino, generation; FILEID_INO64_GEN: ino (8), generation. With a parent these
# come first as well.
_GENERATION = {(0x01, 8): 4, (0x02, 16): 4, (0x81, 12): 8, (0x82, 24): 8}


def generation_of(key: bytes) -> int | None:
    """Return the inode generation inside a key, or None where the handle has none."""
    at = _GENERATION.get((int.from_bytes(key[:4], sys.byteorder), len(key) - 4))
    return None if at is None else int.from_bytes(key[4 + at : 8 + at], sys.byteorder)


def process_of(pid: int) -> Process | None:
    """Name a process while it may still be there; None for none and for a kernel thread."""
    if pid <= 0:
        return None
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            head, _, rest = file.read().rpartition(b")")
    except OSError:
        return Process(pid, None)
    fields = rest.split()
    if len(fields) > 6 and int(fields[6]) & _KERNEL_THREAD:
        return None
    return Process(pid, os.fsdecode(head.partition(b"(")[2]))


def is_local(mount: Mount) -> bool:
    """Whether a mount is of a filesystem on a device of this machine, whose errors are ours."""
    if mount.fstype.startswith("fuse"):
        return False
    return mount.dev[0] != 0 or mount.fstype in ("btrfs", "bcachefs")


_live: "weakref.WeakSet[FsErrors]" = weakref.WeakSet()


class _Group:
    # One kernel group. `owners` says whose reports a fsid's are.
    def __init__(self) -> None:
        self.fd = init(_INIT)
        self.owners: dict[bytes, Dev] = {}

    # The superblocks whose marks are alive, as the kernel itself lists them.
    def alive(self) -> set[Dev]:
        with open(f"/proc/self/fdinfo/{self.fd}", "rb") as file:
            found = re.findall(rb"^fanotify sdev:([0-9a-f]+) ", file.read(), re.MULTILINE)
        return {(number >> 20, number & 0xFFFFF) for number in (int(n, 16) for n in found)}


class FsErrors:
    """The error reports of many filesystems; a context manager.

    Give it the mounts there are with `follow`, each time when they changed; wait until `fileno` is
    readable; then `read`.
    """

    state: str

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._groups: list[_Group] = []
        self._unread: list[FsErrorReport | FsErrorLoss] = []
        self._refused: dict[Dev, str] = {}
        self._lossy = False
        self._broken: str | None = None
        self._poll: select.epoll | None = None
        FS_ERRORS.start(self)

    def open(self) -> None:
        """Make the first group.

        Raises NotWatchable (PermissionNeeded, FeatureMissing, ...): then there is no such source.
        """
        group = _Group()
        try:
            self._poll = select.epoll()
            self._add(group)
            FS_ERRORS.advance(self, "open")
        except BaseException:
            os.close(group.fd)
            raise
        _live.add(self)

    def fileno(self) -> int:
        """Readable when there is something to read."""
        assert self._poll is not None
        return self._poll.fileno()

    def follow(self, found: Iterable[Mount]) -> None:
        """Mark every local filesystem among these mounts that has no living mark.

        What cannot be marked is in `status`. A filesystem that went keeps its pending reports.
        """
        FS_ERRORS.advance(self, "follow")
        by_dev: dict[Dev, list[Mount]] = {}
        for mount in found:
            if is_local(mount):
                by_dev.setdefault(mount.dev, []).append(mount)
        living = [group.alive() for group in self._groups]
        self._refused = {dev: why for dev, why in self._refused.items() if dev in by_dev}
        for dev, ways in by_dev.items():
            # Also where a mark lives: it may be one of before, in a group that must not have it.
            if not any(dev in marks for marks in living):
                self._mark(dev, ways)
                living = [group.alive() for group in self._groups]

    def read(self) -> list[FsErrorReport | FsErrorLoss]:
        """Everything that is there now, without waiting. Raises nothing: see `status`."""
        FS_ERRORS.advance(self, "read")
        for group in self._groups:
            self._drain(group)
        found, self._unread = self._unread, []
        return found

    def status(self) -> SourceState:
        """Up, or degraded with the reason."""
        reasons = [f"{dev[0]}:{dev[1]}: {why}" for dev, why in sorted(self._refused.items())]
        if self._broken:
            reasons.insert(0, self._broken)
        return SourceState(
            "fserror",
            "down" if self.state != "OPEN" else "degraded" if reasons else "up",
            "; ".join(reasons) or None,
            uncounted=self._lossy,
        )

    def followed(self) -> set[Dev]:
        """The superblocks with a living mark."""
        return {dev for group in self._groups for dev in group.alive()}

    def close(self) -> None:
        """Close the groups; what was not read is dropped. Idempotent."""
        if self.state == "CLOSED":
            return
        FS_ERRORS.advance(self, "close")
        self._release()

    def _release(self) -> None:
        _live.discard(self)
        if self._poll is not None:
            self._poll.close()
            self._poll = None
        for group in self._groups:
            os.close(group.fd)
        self._groups = []

    def _forget(self) -> None:
        # In a forked child: the groups are the parent's.
        self._release()
        self.state = "CLOSED"

    def __enter__(self) -> "FsErrors":
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _add(self, group: _Group) -> None:
        assert self._poll is not None
        self._poll.register(group.fd, select.EPOLLIN)
        self._groups.append(group)

    def _mark(self, dev: Dev, ways: list[Mount]) -> None:
        refused = None
        for mount in ways:
            try:
                self._mark_by(dev, mount)
            except (FanwiseError, OSError) as error:
                refused = str(error)  # perhaps another way: a subvolume, a mount that is covered
            else:
                self._refused.pop(dev, None)
                return
        self._refused[dev] = refused or "it has no mount that can be opened"

    def _mark_by(self, dev: Dev, mount: Mount) -> None:
        fd = os.open(mount.mount_point, os.O_PATH | os.O_CLOEXEC)
        try:
            # Another mount may cover it, and then it is that one's turn, not this one's.
            if mounts.mount_of(fd).dev != dev:
                raise OSError(errno.EXDEV, "another mount covers it", mount.mount_point)
            path = f"/proc/self/fd/{fd}"
            fsid = _fsid(fd)
            group = self._group_for(dev, fsid)
            mark(group.fd, FAN_MARK_ADD | FAN_MARK_FILESYSTEM, FAN_FS_ERROR, path=path)
            group.owners[fsid] = dev
        finally:
            os.close(fd)

    def _group_for(self, dev: Dev, fsid: bytes) -> _Group:
        for group in self._groups:
            owner = group.owners.get(fsid)
            if owner is None or owner == dev or owner not in group.alive():
                self._drain(group)  # by its old owner
                return group
        group = _Group()
        self._add(group)
        return group

    def _drain(self, group: _Group) -> None:
        while True:
            try:
                buffer = os.read(group.fd, _READ)
            except BlockingIOError:
                return
            if not buffer:
                return
            try:
                found = reports(buffer, self._clock)
            except DecodeError as error:
                self._broken = f"the kernel's records make no sense: {error}"
                found = [None]
            for report in found:
                if report is None:
                    self._lossy = True
                    devs = tuple(sorted(group.owners.values()))
                    self._unread.append(FsErrorLoss(devs, self._clock()))
                else:
                    owner = group.owners.get(report.fsid)
                    self._unread.append(msgspec.structs.replace(report, dev=owner))


FS_ERRORS: Lifetime[FsErrors] = Lifetime(
    "FsErrors",
    states=("NEW", "OPEN", "CLOSED"),
    transitions={
        "open": "NEW -> OPEN",
        "follow": "OPEN -> OPEN",
        "read": "OPEN -> OPEN",
        "close": "NEW, OPEN -> CLOSED",
    },
    invariants={
        "what is open has a group": lambda s: s.state != "OPEN" or bool(s._groups),
    },
)


def _fsid(fd: int) -> bytes:
    # What fanotify reports: both halves of statfs's f_fsid, which fstatvfs joins into one number.
    number = os.fstatvfs(fd).f_fsid
    return struct.pack("=II", number & 0xFFFF_FFFF, number >> 32)


def _after_fork() -> None:
    for source in list(_live):
        source._forget()


os.register_at_fork(after_in_child=_after_fork)
