"""Write-back errors of a program's own files, without calling fsync.

REFS      a WritebackErrors owns a private trace instance, the group of `Below`, the helpers of
          Locate, and a timer. LOCKING  none: one owner.
LIFETIME  see WRITEBACK. Leaving the with block, or `close`, takes the trace instance away; one that
          was killed leaves it to the next start of any (see fanwise.sources.trace). In a forked
          child it is closed.

Kernel source: mm/filemap.c (__filemap_set_wb_err, file_check_and_advance_wb_err), lib/errseq.c.
"""

import contextlib
import errno as codes
import os
import select
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal

import anyio
import msgspec

from fanwise._errors import ClosedError, FeatureMissing, NotWatchable, PermissionNeeded
from fanwise.health._below import Below
from fanwise.health._locate import Above, Answer, Locate, Question
from fanwise.kernel.timer import timer
from fanwise.lifetime import Lifetime
from fanwise.sources.errortrace import ErrorTrace, TracedError, TracedLoss
from fanwise.sources.trace import TraceEvent, TraceSource

_SET, _TOLD = "filemap/filemap_set_wb_err", "filemap/file_check_and_advance_wb_err"
_EVENTS = (
    TraceEvent(_SET),
    TraceEvent(_TOLD),
    TraceEvent("block/block_rq_error", filter="error != 0"),
)
_SYNCFS = TraceEvent("syscalls/sys_exit_syncfs", ("common_pid", "ret"), filter="ret < 0")
_JOIN = 2.0  # seconds between a failed request and the page that it was for
_MOST_TOLD = 64  # of one file
_MOST_FILES = 10_000
_LOOK = 1.0  # seconds between two looks whether the trace is as it was made

_live: "weakref.WeakSet[WritebackErrors]" = weakref.WeakSet()


class Told(msgspec.Struct, frozen=True, gc=False):
    """A program that was told of the error, and when (seconds since the epoch).

    By fsync: of this file. By syncfs: of some filesystem, because which is not in the record; it
    is listed when its errno is the error's.
    """

    pid: int
    time: float
    errno: int
    how: Literal["fsync", "syncfs"] = "fsync"


class WritebackError(msgspec.Struct, frozen=True, kw_only=True):
    """Data of a file did not reach the disk; or, with ``count`` 0, somebody more was told of it.

    ``scope`` is "object" (this file), "fs" (the filesystem's metadata did not reach the device),
    "unplaced" (a file that may be below the path) or "lost" (records were lost: there may be
    errors that nobody tells). ``path`` is None where not known. ``errno`` is EIO, ENOSPC or what
    the device said, None when no record did. ``start`` and ``length`` are bytes of the device that
    failed last, not of the file. ``count`` is how many records this is, of several files when they
    came faster than they were read (then ``ino`` is the first one's). ``told`` is who was told
    since listening began; who will never be told cannot be known.
    """

    scope: Literal["object", "fs", "unplaced", "lost"]
    path: str | None
    ino: int | None
    device: str
    errno: int | None
    count: int | None
    time: float
    start: int | None = None
    length: int | None = None
    told: tuple[Told, ...] = ()


class WritebackErrors:
    """The write-back errors of a file, or of all files below a directory. A context manager.

    Use `writeback_errors`. Iterating waits; so does ``async for``, in asyncio or trio.
    """

    state: str

    def __init__(
        self, path: str | os.PathLike[str], *, syncfs: bool = False, tracefs: str | None = None
    ) -> None:
        self.path = os.fspath(path)
        self._trace = ErrorTrace(_EVENTS, tracefs=tracefs)
        self._syncfs = TraceSource([_SYNCFS], kb=64, tracefs=tracefs) if syncfs else None
        self._below: Below
        self._locate = Locate(seconds=2.0)
        self._poll: select.epoll
        self._timer = -1
        self._pending: dict[str, list[tuple[TracedError, int]]] = {}  # by inode, as text
        self._devices: set[tuple[int, int]] = set()
        self._io: TracedError | None = None
        self._io_at = 0.0
        self._told: dict[int, tuple[Told, ...]] = {}
        self._own = 0  # the inode of the path
        # Paths of files that failed, here or elsewhere.
        self._known: dict[int, tuple[str | None, Above | None]] = {}
        self._failed_here: dict[int, int] = {}  # what was told: inode -> errno
        self._ready: list[WritebackError] = []
        WRITEBACK.start(self)

    def open(self) -> None:
        """Begin to listen. Raises NoSuchRoot, NotWatchable, PermissionNeeded and FeatureMissing."""
        with contextlib.ExitStack() as undo:
            below = Below(self.path)
            undo.callback(below.close)
            if below.target.key is None:
                raise NotWatchable(
                    self.path,
                    "its filesystem does not answer",
                    "see fanwise health: it is shut down, or it hangs",
                )
            self._own = below.target.key[1]
            undo.callback(self._trace.close)
            self._trace.open()
            missing = [name for name in (_SET, _TOLD) if name in self._trace.missing]
            if not self._trace.up or missing:
                reason = f"write-back errors cannot be listened to: {self._trace.reason}"
                kind = FeatureMissing if os.geteuid() == 0 else PermissionNeeded
                remedy = self._trace.remedy or "use a kernel with these events"
                raise kind(self.path, reason, remedy)
            if self._syncfs is not None:
                undo.callback(self._syncfs.close)
                self._syncfs.open()
                if not self._syncfs.up:
                    reason = f"it cannot be listened to who syncfs tells: {self._syncfs.reason}"
                    raise FeatureMissing(self.path, reason, "listen without syncfs=True")
            self._below = below
            self._devices = _devices(below.target.mount.dev, below.target.mount.source)
            try:
                self._poll = select.epoll()
                undo.callback(self._poll.close)
                # Nothing wakes who listens to an instance that somebody switched off.
                self._timer = timer(_LOOK)
                undo.callback(os.close, self._timer)
                for fd in (
                    *self._trace.filenos(),
                    *(self._syncfs.filenos() if self._syncfs else ()),
                    self._timer,
                ):
                    self._poll.register(fd, select.EPOLLIN)
            except OSError as error:
                reason = f"write-back errors cannot be waited for: {error.strerror}"
                remedy = "let the process open more files (ulimit -n)"
                raise FeatureMissing(self.path, reason, remedy) from error
            undo.pop_all()
        WRITEBACK.advance(self, "open")
        _live.add(self)

    def fileno(self) -> int:
        """Return a descriptor that is readable when `read` may give something."""
        return self._poll.fileno()

    def read(self) -> list[WritebackError]:
        """Return what is there now, without waiting.

        Once a second it is looked whether somebody switched the trace instance off: it is switched
        on again, and an error of scope "lost" tells that there may have been some. Raises
        ClosedError; FeatureMissing when it can listen no more, and it is closed then.
        """
        if self.state != "OPEN":
            raise ClosedError("not open")
        self._keep()
        updates: list[int] = []
        for one in self._trace.errors():
            if isinstance(one, TracedLoss):
                self._below.lost(one.count)
            elif one.event == "block_rq_error":
                if one.dev in self._devices:
                    self._io, self._io_at = one, one.time
            elif one.seen:
                updates += self._was_told(one)
            else:
                self._failed(one)
        for answer in self._locate.results():
            path, above = self._choose(answer)
            self._known[int(answer.tag)] = path, above
            for record, code in self._pending.pop(answer.tag):
                self._send(record, code, path, above)
        seen_now = self._below.read()
        reported = {seen.ino: seen.errno for seen in seen_now if seen.ino is not None}
        self._failed_here.update(reported)
        updates += self._told_by_syncfs()
        found = [
            WritebackError(
                scope=seen.scope,
                path=self._name(seen.ino),
                ino=seen.ino,
                device=self._below.device,
                errno=seen.errno or None,
                count=seen.count,
                time=time.time(),
                start=self._io.start if self._io and seen.scope != "lost" else None,
                length=self._io.length if self._io and seen.scope != "lost" else None,
                told=self._told.get(seen.ino or 0, ()),
            )
            for seen in seen_now
        ]
        for ino in dict.fromkeys(updates):
            if ino not in reported and ino in self._failed_here:
                told = self._told[ino]
                found.append(
                    WritebackError(
                        scope="object", path=self._name(ino), ino=ino, device=self._below.device,
                        errno=told[-1].errno, count=0, time=told[-1].time, told=told,
                    )
                )  # fmt: skip
        return found

    def wait(self, seconds: float | None = None) -> list[WritebackError]:
        """Wait up to ``seconds`` (None: for ever) for the next; [] when none came."""
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            found = self.read()
            left = None if end is None else end - time.monotonic()
            if found or (left is not None and left <= 0):
                return found
            # A helper that looks for a path has a deadline, and a descriptor of its own.
            most = 0.05 if self._pending else left
            self._poll.poll(most if left is None or most is None else min(most, left))

    def close(self) -> None:
        """Stop listening; idempotent."""
        if self.state == "OPEN":
            _live.discard(self)
            self._poll.close()
            self._below.close()
            os.close(self._timer)
            self._trace.close()
            if self._syncfs is not None:
                self._syncfs.close()
        if self.state != "CLOSED":
            self._locate.close()
            WRITEBACK.advance(self, "close")

    def _forget(self) -> None:
        # In a forked child: the trace is the parent's, and so is what the timer said.
        self._poll.close()
        os.close(self._timer)
        self._locate.close()
        self.state = "CLOSED"

    def __enter__(self) -> "WritebackErrors":
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[WritebackError]:
        return self

    def __next__(self) -> WritebackError:
        while not self._ready:
            self._ready = self.wait()
        return self._ready.pop(0)

    def __aiter__(self) -> "WritebackErrors":
        return self

    async def __anext__(self) -> WritebackError:
        while not self._ready:
            self._ready = self.read()
            if self._ready:
                break
            if self._pending:
                await anyio.sleep(0.05)
            else:
                await anyio.wait_readable(self._poll.fileno())
        return self._ready.pop(0)

    def _keep(self) -> None:
        try:
            os.read(self._timer, 8)
        except BlockingIOError:
            return
        try:
            for trace in (self._trace, self._syncfs):
                if trace is not None and trace.keep() is not None and trace is self._trace:
                    self._below.lost(None)
        except OSError as error:
            self.close()
            reason = f"its trace instance is gone, or cannot be read: {error.strerror or error}"
            raise FeatureMissing(self.path, reason, "listen again") from error

    def _failed(self, record: TracedError) -> None:
        below, mount = self._below, self._below.target.mount
        io = self._io
        code = io.errno if io is not None and abs(record.time - self._io_at) <= _JOIN else 0
        if record.dev != mount.dev:
            # On the block devices' own filesystem the number is a device's: metadata.
            ino = record.ino or 0
            if record.dev[0] == 0 and (ino >> 20, ino & 0xFFFFF) in self._devices:
                below.send(below.device, None, None, errno=code, pid=record.pid)
            return
        ino = record.ino or 0
        if len(self._known) >= _MOST_FILES:
            self._known.clear()
        if mount.fstype != "btrfs" and ino == self._own:
            self._send(record, code, below.target.path)
        elif mount.fstype != "btrfs" and not below.target.folder:
            return  # another file's
        elif ino in self._known:
            self._send(record, code, *self._known[ino])
        elif str(ino) in self._pending:
            self._pending[str(ino)].append((record, code))
        else:
            self._pending[str(ino)] = [(record, code)]
            self._locate.submit(
                Question(
                    tag=str(ino), device=below.device, fstype=mount.fstype,
                    point=mount.mount_point, ino=ino, ways=("handle", "filesystem"),
                )
            )  # fmt: skip

    # Several paths are hard links, or, where it is ambiguous, different files.
    def _choose(self, answer: Answer) -> tuple[str | None, Above | None]:
        paths = [os.fsdecode(path) for path in answer.paths]
        if answer.ambiguous or not paths:
            return None, None
        both = list(zip(paths, answer.above, strict=True))
        inside = [one for one in both if self._below.target.key in one[1]]
        return (inside or both)[0]

    def _send(
        self, record: TracedError, code: int, path: str | None, above: Above | None = None
    ) -> None:
        below = self._below
        below.send(below.device, record.ino, path, above=above, errno=code, pid=record.pid)

    def _was_told(self, record: TracedError) -> list[int]:
        below = self._below
        ino = record.ino or 0
        ours = ino == self._own or ino in self._known or str(ino) in self._pending
        if record.dev != below.target.mount.dev or not ours:
            return []
        self._tell(ino, Told(record.pid, record.time, record.errno or codes.EIO))
        return [ino]

    def _told_by_syncfs(self) -> list[int]:
        told = []
        for record in self._syncfs.take()[0] if self._syncfs else ():
            pid, code = record.values[0], -record.values[1]
            for ino, errno in self._failed_here.items():
                if errno == code:
                    when = self._syncfs.wall(record.time) if self._syncfs else 0.0
                    self._tell(ino, Told(pid, when, code, "syncfs"))
                    told.append(ino)
        return told

    def _tell(self, ino: int, told: Told) -> None:
        self._told[ino] = (*self._told.get(ino, ()), told)[-_MOST_TOLD:]

    def _name(self, ino: int | None) -> str | None:
        if ino is None:
            return None
        if ino == self._own:
            return self._below.target.path
        return self._known.get(ino, (None, None))[0]


WRITEBACK: Lifetime[WritebackErrors] = Lifetime(
    "WritebackErrors",
    states=("NEW", "OPEN", "CLOSED"),
    transitions={"open": "NEW -> OPEN", "close": "NEW, OPEN -> CLOSED"},
    invariants={
        "an open one has a trace": lambda w: (w.state == "OPEN") == w._trace.up,
    },
)


def writeback_errors(
    path: str | os.PathLike[str], *, syncfs: bool = False, tracefs: str | None = None
) -> WritebackErrors:
    """Listen for data of ``path``, a file or all files below a directory, that fails to be written.

    For databases: a file's dirty pages are written back when the kernel likes, and what fails is
    told by fsync only to whoever asks, once for each open file. Behind that is an errseq_t, a value
    in the inode that holds the last errno, a counter, and a flag that says whether anyone has seen
    it. Each open file remembers the value of when it was opened, or last told; fsync and syncfs
    tell the error when it has changed since. So a second fsync succeeds although nothing was
    written; one who opens the file after somebody was told hears nothing; and when the inode leaves
    the cache unseen, nobody ever will. This tells the error when it happens, to who did not ask.

        with writeback_errors("/srv/db") as errors:
            for error in errors:            # or: async for error in errors
                ...                         # WritebackError

    With ``syncfs`` it is told, too, who syncfs told. That is off because the kernel then takes the
    long way into and out of every system call of the machine: measured 30 to 35 ns more for each,
    which is 10 % of a cached pread of 4 KiB. ``tracefs``: where it is mounted, by default its first
    mount. Entering raises NoSuchRoot; NotWatchable for a filesystem that does not answer;
    PermissionNeeded and FeatureMissing, with the remedy, where there is no right to trace, or no
    tracefs. Nothing is known of errors before it was entered.
    """
    return WritebackErrors(path, syncfs=syncfs, tracefs=tracefs)


# A failed request names the whole disk, not its partition.
def _devices(dev: tuple[int, int], source: bytes) -> set[tuple[int, int]]:
    found = {dev}
    try:
        number = os.stat(source).st_rdev
        found.add((os.major(number), os.minor(number)))
    except OSError:
        pass
    for major, minor in list(found):
        parent = Path(f"/sys/dev/block/{major}:{minor}/../dev")
        if Path(f"/sys/dev/block/{major}:{minor}/partition").exists() and parent.exists():
            text = parent.read_text().strip().split(":")
            found.add((int(text[0]), int(text[1])))
    return found


def _after_fork() -> None:
    for errors in list(_live):
        errors._forget()
    _live.clear()


os.register_at_fork(after_in_child=_after_fork)
