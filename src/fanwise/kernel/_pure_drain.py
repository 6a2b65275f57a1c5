"""The drain in Python: what `_native.Drain` does, where no C compiler was at hand.

The contract, the numbers and the tests are those of _drain.c; chunks are kept in a deque and
accounted for as if they lay in the ring. A consumer that keeps the processor busy delays this
thread by the interpreter's switch interval (5 ms), which the native one never waits for.

LOCKING   `_Core.lock` covers all that both sides touch, and is never held over a read or a poll.
LIFETIME  the thread holds the _Core and not the Drain, so that a Drain that is dropped can stop it.
"""

import contextlib
import errno
import fcntl
import os
import select
import signal
import struct
import threading
import time
from collections import deque

from fanwise._errors import DecodeError

from .contract import DELETE_SELF, NAMED, NOTE_NAMES, NOTE_SELF, NOTED, ONDIR, Q_OVERFLOW
from .fanotify import FAN_MARK_FILESYSTEM, FAN_MARK_FLUSH
from .libc import AT_FDCWD, libc
from .records import DFID, DFID_NAME, FID, NEW_DFID_NAME, OLD_DFID_NAME, Fid, decode

_RING_MIN = 64 << 10
_READ_MAX = 1 << 20
_SCRATCH = 256 << 10
_FLOOR_MAX = 64 << 10
_HEADER = 24  # of a chunk in the native ring
_META = 24  # of a record
_TOKENS = 8
_BIG = 256
_STOP_RECORDS = 65536 * 16
_STOP_NS = 2_000_000_000
_RUN, _STOP_DRAIN, _STOP_NOW = range(3)
# How the thread reads: as ever; for a stop, up to its bounds; without marks, all that is left;
# only to count what is left as lost.
_READING, _BOUNDED, _FINITE, _DISCARDING = range(4)
_DIRS = (DFID, DFID_NAME, OLD_DFID_NAME, NEW_DFID_NAME)

_length = struct.Struct("=I").unpack_from


def _count_records(buf: memoryview) -> int:
    """Count by event_len; a malformed rest counts as one, so that it is never no loss."""
    count, at, end = 0, 0, len(buf)
    while end - at >= _META:
        (size,) = _length(buf, at)
        if size < _META or size > end - at:
            break
        at += size
        count += 1
    return count + (at < end)


def _note(noted: dict[bytes, int], data: bytes) -> bool:
    """Note the directories of discarded records; False when all count as affected."""
    try:
        records = decode(data)
    except DecodeError:
        return False
    for record in records:
        if record.mask & Q_OVERFLOW:
            return False
        target = last = None
        dirs = 0
        for info in record.infos:
            if not isinstance(info, Fid) or len(info.key) <= 4:
                continue
            if info.type == FID:
                target = info.key
            elif info.type in _DIRS:
                dirs += 1
                last = info.key
                noted[info.key] = noted.get(info.key, 0) | NOTE_NAMES
        if record.mask & ONDIR and record.mask & NAMED:
            if target is None:
                return False
            noted[target] = noted.get(target, 0) | NOTE_SELF
        elif record.mask & DELETE_SELF and target is None and last:
            noted[last] = noted.get(last, 0) | NOTE_SELF  # a rename put another in its place
        # Of what has no name, only its link count or its last close is told.
        if not dirs and (target is None or record.mask & NAMED):
            return False
        if len(noted) > NOTED:
            return False
    return True


def _chunk_size(length: int) -> int:
    return _HEADER + (length + 7 & ~7)


class _Chunk:
    __slots__ = ("data", "drained", "lost", "time")

    def __init__(self, data: bytes, read_time: int) -> None:
        self.data = data
        self.time = read_time
        self.drained = False
        self.lost = 0


class _Core:
    """What the thread and the Drain share."""

    def __init__(self, fd: int, size: int, pace: int, stop_records: int) -> None:
        self.fd = fd
        self.size = size
        self.floor = min(size // 4 - _HEADER, _FLOOR_MAX)
        self.pace = pace
        self.stop_records = stop_records
        self.evfd = self.ctl = -1
        self.lock = threading.Lock()
        self.cond = threading.Condition(self.lock)  # ended, synced
        # Under the lock.
        self.chunks: deque[_Chunk] = deque()
        self.used = 0
        self.full = self.signalled = False
        self.owed = False  # records were told of, the empty queue after them was not yet
        self.edge = False  # an empty queue to tell without a chunk
        self.lost = 0  # since the last chunk
        self.noting: dict[bytes, int] | None = {}  # of those; None: all
        self.noted: deque[dict[bytes, int] | None] = deque()  # of the losses published
        self.read_time = 0
        self.sync_req = self.sync_done = 0
        self.stop = _RUN
        self.ended = False
        self.error = 0
        self.records = self.bytes = self.reads = self.all_lost = self.peak = self.paced = 0
        # Of the thread alone.
        self.pend: _Chunk | None = None  # read, and waits for what the next read says
        self.want = 0
        self.stopping = _READING
        self.stop_at = self.stop_left = 0
        self.begin = 0
        self.tokens = _TOKENS
        self.stamp = 0

    def signal(self) -> None:
        """Make the eventfd say whether take() has something; under the lock."""
        on = self.used > 0 or self.lost > 0 or self.edge or self.ended
        if on != self.signalled:
            self.signalled = on
            if on:
                os.eventfd_write(self.evfd, 1)
            else:
                os.eventfd_read(self.evfd)

    def asked(self) -> bool:
        with self.lock:
            return self.stop != _RUN or self.sync_req != self.sync_done

    def publish(self, drained: bool) -> None:
        chunk = self.pend
        assert chunk is not None
        chunk.drained = drained
        chunk.lost = self.lost
        self.chunks.append(chunk)
        self.used += _chunk_size(len(chunk.data))
        self.peak = max(self.peak, self.used)
        self.end_note()
        self.lost = 0
        self.edge = False
        self.owed = not drained
        self.pend = None
        self.signal()

    def end_note(self) -> None:
        """The loss up to here is published, or taken; under the lock."""
        if self.lost:
            self.noted.append(self.noting)
            self.noting = {}

    def bound(self, how: int) -> None:
        self.stopping = how
        self.stop_at = time.monotonic_ns() + _STOP_NS
        self.stop_left = self.stop_records

    def over(self) -> bool:
        """At a bound of a stop, where the queue is not known to be empty: whether to end there.

        Without its marks nothing is added to it, and all of it is read. Where they cannot be
        removed (no group, only a stand-in) what is left is read and counted as lost, within the
        same bounds: what stays behind even then is more of a loss that was told.
        """
        if self.stopping == _DISCARDING:
            return True
        flush = FAN_MARK_FLUSH | FAN_MARK_FILESYSTEM  # looks at no path
        if libc.fanotify_mark(self.fd, flush, 0, AT_FDCWD, None) == 0:
            self.stopping = _FINITE
        else:
            self.bound(_DISCARDING)
        return False

    def room(self) -> int:
        """Say how much the next read may store: 0 when the ring is full, -1 to stop now."""
        need = _HEADER + self.floor
        with self.lock:
            if self.stop == _STOP_NOW:
                return -1
            if self.stop == _STOP_DRAIN and self.stopping == _READING:
                self.bound(_BOUNDED)
            discard = self.stopping == _DISCARDING
            self.want = self.sync_req
            free = self.size - self.used
            if self.pend is not None:
                free -= _chunk_size(len(self.pend.data))
                if free < need or discard:
                    self.publish(False)
            elif free >= self.size // 4:
                self.full = False
            return 0 if self.full or discard or free < need else min(free - _HEADER, _READ_MAX)

    def settle(self, drained: bool) -> None:
        """End a series of reads, at an empty queue or before."""
        with self.lock:
            if self.pend is not None:
                self.publish(drained)
            elif drained and self.owed:
                self.owed = False
                if self.used and not self.lost:
                    self.chunks[-1].drained = True
                else:
                    self.edge = True
                self.signal()
            if drained and self.sync_done != self.want:
                self.sync_done = self.want
                self.cond.notify_all()

    def empty(self, scratch: memoryview) -> bool:
        """Read until the queue is empty; False when the descriptor is at its end or failed."""
        self.begin = time.monotonic_ns()
        while True:
            room = self.room()
            if room < 0:
                self.settle(False)
                return True
            try:
                n = os.readv(self.fd, [scratch[: room or _SCRATCH]])
            except BlockingIOError:
                self.settle(True)
                return True
            except OSError as exc:
                self.settle(False)
                with self.lock:
                    self.error = exc.errno or errno.EIO
                return False
            if n == 0:
                self.settle(False)
                return False
            now = time.time_ns()
            count = _count_records(scratch[:n])
            data = bytes(scratch[:n]) if room else b""
            with self.lock:
                self.reads += 1
                self.records += count
                self.bytes += n
                self.read_time = now
                if room:
                    if self.pend is not None:
                        self.publish(False)
                    self.pend = _Chunk(data, now)
                else:
                    self.full = self.owed = True
                    self.edge = False
                    if self.noting is not None and not _note(self.noting, bytes(scratch[:n])):
                        self.noting = None
                    self.lost += count
                    self.all_lost += count
                    self.signal()
            if count >= _BIG:
                self.tokens = 0
                self.stamp = self.begin
            if self.stopping in (_BOUNDED, _DISCARDING):
                self.stop_left -= count
                hit = self.stop_left <= 0 or time.monotonic_ns() >= self.stop_at
                if hit and self.over():
                    self.settle(False)
                    return True

    def refill(self, now: int) -> None:
        back = (now - self.stamp) // self.pace
        self.tokens += back
        self.stamp += back * self.pace
        if self.tokens >= _TOKENS:
            self.tokens = _TOKENS
            self.stamp = now

    def wait_pace(self, control: select.poll) -> None:
        """Under load, let the queue fill for the rest of pace_ns."""
        if not self.pace:
            return
        now = time.monotonic_ns()
        until = self.begin + self.pace
        self.refill(now)
        if not self.tokens and now < until:
            with self.lock:
                self.paced += 1
            while now < until:
                if control.poll((until - now) / 1e6):
                    self.unpost()
                    if self.asked():
                        break
                now = time.monotonic_ns()
            self.refill(time.monotonic_ns())
        if self.tokens:
            self.tokens -= 1

    def unpost(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.ctl)

    def run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        scratch = memoryview(bytearray(min(self.size, _READ_MAX) + _SCRATCH))
        control = select.poll()
        control.register(self.ctl, select.POLLIN)
        both = select.poll()
        both.register(self.ctl, select.POLLIN)
        both.register(self.fd, select.POLLIN)
        self.stamp = time.monotonic_ns()
        alive = True
        while alive:
            ready = {fd for fd, _ in both.poll()}
            if self.ctl in ready:
                self.unpost()
            if not self.asked():
                if self.fd not in ready:
                    continue
                self.wait_pace(control)
            alive = self.empty(scratch)
            with self.lock:
                alive = alive and self.stop != _STOP_NOW and self.stopping == _READING
        with self.lock:
            self.ended = True
            self.signal()
            self.cond.notify_all()


class Drain:
    """Empties a non-blocking fanotify group into a bounded buffer, in a thread."""

    # Of the class, for a __del__ after a constructor that failed.
    _core: _Core | None = None
    _thread: threading.Thread | None = None
    _pid = 0
    _gone = _closed = False

    def __init__(
        self,
        fd: int,
        ring_bytes: int,
        pace_ns: int = 5_000_000,
        stop_records: int = _STOP_RECORDS,
    ) -> None:
        if ring_bytes < _RING_MIN:
            raise ValueError("ring_bytes must be at least 65536")
        if not 0 <= pace_ns <= 10_000_000_000:
            raise ValueError("pace_ns must be from 0 to 10 s")
        if stop_records < 1:
            raise ValueError("stop_records must be at least 1")
        if not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK:
            raise ValueError("the descriptor must be non-blocking")
        page = os.sysconf("SC_PAGESIZE")
        self._core = _Core(fd, -(-ring_bytes // page) * page, pace_ns, stop_records)

    def _ours(self) -> _Core | None:
        """Return what is shared with the thread, or None where that is another process's."""
        if self._pid and self._pid != os.getpid() and not self._gone:
            self._gone = True
            core = self._core
            if core is not None:
                core.chunks.clear()
                core.used = core.lost = 0
                core.edge = False
        return None if self._gone else self._core

    def start(self) -> None:
        """Start the thread; once."""
        core = self._ours()
        if core is None or self._closed:
            raise ValueError("the drain is closed")
        if self._thread is not None:
            raise RuntimeError("the drain was started already")
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        core.evfd = os.eventfd(0, flags)
        try:
            core.ctl = os.eventfd(0, flags)
            thread = threading.Thread(target=core.run, name="fw-drain", daemon=True)
            thread.start()
        except (OSError, RuntimeError):
            self._free(core)
            raise
        self._pid = os.getpid()
        self._thread = thread

    def fileno(self) -> int:
        """Return the eventfd: readable while take() has something, or the drain has ended."""
        core = self._ours()
        if core is None or core.evfd < 0:
            raise ValueError("the drain is not started, or closed")
        return core.evfd

    def take(self) -> tuple[bytes, int, bool, int] | None:
        """Return (data, time_ns, drained, lost), or None."""
        core = self._ours()
        if core is None or self._closed:
            raise ValueError("the drain is closed")
        with core.lock:
            ret = None
            if core.chunks:
                chunk = core.chunks.popleft()
                core.used -= _chunk_size(len(chunk.data))
                ret = chunk.data, chunk.time, chunk.drained, chunk.lost
            elif core.lost or core.edge:
                ret = b"", core.read_time, core.edge, core.lost
                core.end_note()
                core.lost = 0
                core.edge = False
            if self._thread is not None:
                core.signal()
            return ret

    def gap(self) -> dict[bytes, int] | None:
        """What the loss that take() gave last hit: {directory key: 1 names | 2 itself}; None: all.

        Call it once for each loss.
        """
        core = self._ours()
        if core is None:
            return None
        with core.lock:
            return core.noted.popleft() if core.noted else None

    def sync(self, timeout: float) -> bool:
        """Wait until all that was raised before this call can be taken."""
        core = self._ours()
        if core is None:
            return False
        with core.lock:
            if self._thread is None or core.ended:
                return False
            core.sync_req += 1
            want = core.sync_req
            os.eventfd_write(core.ctl, 1)
            core.cond.wait_for(
                lambda: core.ended or core.sync_done >= want, min(max(timeout, 0.0), 1e6)
            )
            return core.sync_done >= want

    def stop(self, drain: bool = True) -> None:
        """End the thread, by default after reading what is queued."""
        core, thread = self._ours(), self._thread
        if core is None or thread is None:
            return
        with core.lock:
            core.stop = max(core.stop, _STOP_DRAIN if drain else _STOP_NOW)
            if not core.ended:
                os.eventfd_write(core.ctl, 1)
        thread.join()

    @property
    def ended(self) -> bool:
        """Whether the thread is gone: stopped, or read() failed."""
        core = self._ours()
        return core is None or self._closed or core.ended

    @property
    def error(self) -> int:
        """The errno that ended the drain, or 0."""
        core = self._ours()
        return 0 if core is None else core.error

    def forget(self) -> None:
        """In a forked child: free the memory, touch no thread and no lock."""
        if self._ours() is not None and self._thread is not None and not self._closed:
            raise RuntimeError("forget() is for a forked child")

    def stats(self) -> dict[str, int]:
        """Return the counters by name."""
        core = self._core
        assert core is not None
        with contextlib.nullcontext() if self._ours() is None else core.lock:
            return {
                "records": core.records,
                "bytes": core.bytes,
                "reads": core.reads,
                "lost": core.all_lost,
                "backlog_bytes": core.used,
                "peak_bytes": core.peak,
                "ring_bytes": core.size,
                "paced": core.paced,
            }

    def close(self) -> None:
        """Stop at once and free everything but the group."""
        core = self._core
        if core is None or self._closed:
            return
        if self._ours() is None:
            self._closed = True
            self._free(core)
            return
        self.stop(drain=False)
        with core.lock:
            self._closed = True
            self._free(core)

    def _free(self, core: _Core) -> None:
        core.chunks.clear()
        core.used = core.lost = 0
        core.edge = False
        core.evfd, evfd = -1, core.evfd
        core.ctl, ctl = -1, core.ctl
        for fd in (evfd, ctl):
            if fd >= 0:
                os.close(fd)

    def __del__(self) -> None:
        self.close()
