"""Who did it: the processes behind the pids of changes.

A record holds a number and no time. It was raised in a *window*: after the kernel's queue was last
seen empty, and before it was read. A process is named only if nobody else can have had its number
in that window:

- with a trace of forks, all holders of a number are known since the trace began. One holder in the
  window: it is that one, also when it has ended. Two, or a loss in the trace: see below;
- without it, a process is named if it began before the window and is still there when looked at
  behind it.

Anything else is `gone`. Name and executable are those at the end of the window, by the records of
exec and of changes of name.

REFS      the Who owns the trace source and the timer; holders own nothing.
LOCKING   none: the watch's consumer calls.
LIFETIME  a holder stays until all that was raised before it ended, and some seconds more, is told.
"""

import contextlib
import errno
import os
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from fanwise._errors import FanwiseError
from fanwise.kernel.timer import timer
from fanwise.sources.trace import TraceEvent, TraceLoss, TraceRecord, TraceSource

from ._process import (
    GONE,
    Look,
    Process,
    leader_of,
    look,
    now,
    proc_reason,
    uid_of,
    user_name,
)

NEWTASK, RENAME = "task/task_newtask", "task/task_rename"
EXEC, EXIT = "sched/sched_process_exec", "sched/sched_process_exit"
# task_newtask and not sched_process_fork, which does not tell a thread from a process.
EVENTS = (
    TraceEvent(NEWTASK, ("common_pid", "pid", "comm", "clone_flags")),
    TraceEvent(RENAME, ("pid", "oldcomm", "newcomm")),
    TraceEvent(EXEC, ("pid", "old_pid", "filename")),
    TraceEvent(EXIT, ("pid", "comm")),
)
_CLONE_THREAD = 0x10000
_FIRST_SPACE = 0xEFFFFFFC  # the inode of the initial pid namespace (PROC_PID_INIT_INO)

TICK = 0.5  # seconds between two looks at an idle queue: a window is no longer than that
_GRACE = 5 * 10**9  # ns after its exit in which a process may still close files
_MOST_HOLDERS = 65_536
_MOST_IMAGES = 16  # names and executables of one process
_MOST_MARKS = 512
_KB_CPU, _KB_ALL = 1024, 32768  # of trace buffers: a CPU, all together
_STEP = 10**6  # ns by which the clocks may drift apart between two looks
_STEP_FOR = 10 * 10**9  # ns for which a step of the clock is remembered
_RESOLUTION = 2000  # ns; a float of seconds since the epoch holds some 200
_SNAPSHOT_AGAIN = 5 * 10**9


class Windows:
    """When the queue of one kernel group was seen empty; ns since the epoch."""

    def __init__(self) -> None:
        # (after, since): what is read later than ``after`` was raised later than ``since``.
        self.marks: list[tuple[int, int]] = []
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.marks = [(time.time_ns(),) * 2]

    def taking(
        self, take: Callable[[], tuple[bytes, int, bool, int] | None]
    ) -> Callable[[], tuple[bytes, int, bool, int] | None]:
        """Wrap the drain's take(), noting what it says."""

        def wrapped() -> tuple[bytes, int, bool, int] | None:
            taken = take()
            if taken is not None and taken[2]:
                self.mark(taken[1], taken[1])
            return taken

        return wrapped

    def mark(self, since: int, after: int) -> None:
        """Note that what was raised before ``since`` had all been read at ``after``."""
        if (after, since) > self.marks[-1]:
            self.marks.append((after, since))
            if len(self.marks) > _MOST_MARKS:
                del self.marks[: _MOST_MARKS // 2]

    def begin(self, when: int) -> int | None:
        """Return since when a record that was read at ``when`` can have been raised."""
        at = bisect_left(self.marks, (when - _RESOLUTION,)) - 1
        return self.marks[at][1] if at >= 0 else None


class _Holder:
    """Whoever has, or had, a number, from ``start`` (not later than that)."""

    __slots__ = (
        "alive_at", "cgroup", "ended", "images", "leader", "made", "pid", "queued", "seen_at",
        "start", "sure_until", "uid", "uid_moved",
    )  # fmt: skip

    def __init__(self, pid: int, start: int, leader: "_Holder | None" = None) -> None:
        self.pid, self.start = pid, start
        self.leader = leader  # of a thread: its process
        self.images: list[tuple[int, str | None, str | None]] = []  # since, name, executable
        self.ended: int | None = None
        self.sure_until: int | None = None  # records were lost then: it may have ended since
        self.seen_at = self.alive_at = 0
        self.uid: int | None = None
        self.uid_moved = 0  # when it was last seen to be another one
        self.cgroup: str | None = None
        self.queued = False  # for removal
        self.made: tuple[Any, Process] | None = None

    def image(self, when: int) -> tuple[int, str | None, str | None]:
        """Return what it was at a time."""
        for image in reversed(self.images):
            if image[0] <= when:
                return image
        return 0, None, None

    def run_as(self, uid: int, when: int) -> None:
        """Note whose it was at a time."""
        if self.uid is not None and self.uid != uid:
            self.uid_moved = when
        self.uid = uid

    def become(self, when: int, name: str | None, exe: str | None) -> None:
        """Note that it has another name or executable from now on."""
        self.images.append((when, name, exe))
        if len(self.images) > _MOST_IMAGES:
            del self.images[0]


class Who:
    """Names the processes of changes; made by a watch with ``who=True``, owned by it."""

    def __init__(self) -> None:
        cpus = os.cpu_count() or 1
        self.trace = TraceSource(EVENTS, kb=min(_KB_CPU, _KB_ALL // cpus), wake_percent=50)
        self.reason: str | None = None  # why there is no trace
        self.timer = -1
        self._proc = True
        self._holders: dict[int, list[_Holder]] = {}
        self._count = 0
        self._dead: deque[_Holder] = deque()
        # Between which times forks were not seen, oldest first.
        self._gaps: deque[tuple[int, int]] = deque(maxlen=64)
        self._tracing = False
        self._forgot = 0  # holders that ended before this may have been forgotten
        self._safe = 0  # all that was raised before is told
        self._offset = self._stepped = 0
        self._snapshot_at = 0
        self._lost = False

    def open(self) -> None:
        """Begin. Before the marks are set: then no window is older than the trace."""
        self._proc = proc_reason() is None
        if os.stat("/proc/self/ns/pid").st_ino != _FIRST_SPACE:
            self.reason = "the kernel traces with the pids of the initial pid namespace"
        else:
            self.trace.open()
            if self.trace.state == "UP":
                self._tracing = True
                self._gaps.append((-(1 << 62), self.trace.complete_to))
            else:
                self.reason = self.trace.reason
                self.trace.close()
        self._offset = _offset()
        self.timer = timer(TICK)
        if self._tracing:
            self._snapshot()

    def close(self) -> None:
        """Remove the trace instance and close the timer; idempotent."""
        if self.timer >= 0:
            os.close(self.timer)
            self.timer = -1
        self.trace.close()

    @property
    def limits(self) -> str | None:
        """Why processes that ended before they were looked at are not named; None when they are."""
        if self._tracing:
            return None
        reason = self.reason or "not opened yet"
        return f"{reason}; {self.trace.remedy}" if self.trace.remedy else reason

    def stats(self) -> dict[str, int]:
        """Return counters."""
        return {
            "who_trace_records": self.trace.records,
            "who_trace_lost": self.trace.lost + self.trace.disturbances,
            "who_processes": self._count,
        }

    # -- a batch --

    def name(self, rows: Sequence[Any], windows: Windows) -> None:
        """Set the process of each change."""
        pids: dict[int, float] = {}
        for row in rows:
            if row.pid:
                pids[row.pid] = row.time
        if not pids:
            return
        self._check_clock(windows)
        offset = self._offset
        looks: list[Look] = []
        uids: list[tuple[_Holder, int]] = []
        for pid, when in pids.items():
            self._look(pid, int(when * 1e9) + offset, looks, uids)
        seen = now()
        self._catch_up(looks)
        for holder, uid in uids:
            if self._newest(holder.pid) is holder and holder.ended is None:
                holder.run_as(uid, seen)
        made: dict[tuple[int, float], Process] = {}
        put = msgspec.structs.force_setattr
        stepped = now() < self._stepped
        for row in rows:
            if not row.pid:
                continue
            key = row.pid, row.time
            process = made.get(key)
            if process is None:
                when = int(row.time * 1e9)
                begin = windows.begin(when)
                high = now() if stepped else when + offset
                low = -(1 << 62) if stepped or begin is None else begin + offset
                process = made[key] = self._who(row.pid, low, high)
            put(row, "process", process)

    def _look(
        self, pid: int, high: int, looks: list[Look], uids: list[tuple[_Holder, int]]
    ) -> None:
        if not self._proc:
            return
        holder = self._newest(pid)
        if holder is not None and self._tracing and holder.sure_until is None:
            if holder.ended is not None or holder.leader is not None:
                return
            if holder.images and holder.seen_at > holder.images[-1][0]:
                uid = uid_of(pid)
                if uid is not None:
                    uids.append((holder, uid))
                return
        elif holder is not None and not self._tracing and holder.alive_at >= high:
            return
        found = look(pid)
        if found is not None:
            looks.append(found)

    def _who(self, pid: int, low: int, high: int) -> Process:
        """Name whoever had a number between two times, if it was one."""
        holders = self._holders.get(pid, ())
        following: _Holder | None = None
        found: list[_Holder] = []
        for holder in reversed(holders):
            if (
                holder.leader is None  # a thread's number is in no record
                and holder.start <= high + _STEP
                and (following is None or following.start > low)
                and (holder.ended is None or holder.ended + _GRACE > low)
            ):
                found.append(holder)
            following = holder
        if len(found) != 1:
            return GONE
        holder = found[0]
        if holder.sure_until is not None and holder.sure_until < high:
            return GONE
        whole = low >= self._forgot and self._tracing
        if whole:
            whole = all(end <= low or begin >= high for begin, end in self._gaps)
        if not whole and (holder.start > low or holder.alive_at < high):
            return GONE
        since, name, exe = holder.image(high)
        # It changed after the window began: which of the two it was is not known.
        user = holder.uid if low >= holder.uid_moved else None
        key = since, name, exe, user, holder.seen_at
        if holder.made is None or holder.made[0] != key:
            state: Any = "seen" if holder.seen_at else "traced"
            if state == "traced" and name is None:
                return GONE
            shown = None if user is None else user_name(user)
            holder.made = key, Process(name, exe, shown, holder.cgroup, state)
        return holder.made[1]

    # -- what is known --

    def _newest(self, pid: int) -> _Holder | None:
        holders = self._holders.get(pid)
        return holders[-1] if holders else None

    def _catch_up(self, looks: Iterable[Look] = ()) -> None:
        # The looks are over: what the trace gives now reaches beyond them.
        if self._tracing:
            try:
                records, losses = self.trace.take()
            except (FanwiseError, OSError) as error:
                self._give_up(str(error))
            else:
                for loss in losses:
                    self._lose(loss)
                for record in records:
                    self._apply(record)
                self._keep()
        for found in looks:
            self._attach(found)

    # Behind what was taken, and before anybody is named by it: it is told as a loss, and who is
    # there is looked at again.
    def _keep(self) -> None:
        try:
            loss = self.trace.keep()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                self._give_up(f"it cannot be kept as it was made: {error}")
                return
            # Without a descriptor left it is put right the next time.
            loss = self.trace.since_kept() if self.trace.astray else None
        if loss is not None:
            self._lose(loss)

    def _give_up(self, reason: str) -> None:
        self._lose(self.trace.since_kept())
        self._tracing = False
        self.reason = f"the trace ended: {reason}"
        self.trace.close()

    def _lose(self, loss: TraceLoss) -> None:
        self._lost = True
        begin, end = self._gaps[-1] if self._gaps else (loss.before, 0)
        if loss.after <= end:  # one after the other: one gap
            self._gaps[-1] = min(begin, loss.after), max(end, loss.before)
        else:
            self._gaps.append((loss.after, loss.before))
        for holders in self._holders.values():
            for holder in holders:
                if holder.sure_until is None:
                    holder.sure_until = loss.after
                    self._bury(holder)

    def _since(self) -> int:
        # Since when every fork is known.
        return self._gaps[-1][1] if self._gaps else 1 << 62

    def _add(self, holder: _Holder) -> _Holder:
        if self._count >= _MOST_HOLDERS:
            self._prune(force=True)
        if self._count >= _MOST_HOLDERS:
            # As many live at a time: this one is not remembered, and so no window that it is in
            # can be told apart.
            self._forgot = max(self._forgot, now())
            return holder
        self._holders.setdefault(holder.pid, []).append(holder)
        self._count += 1
        return holder

    def _stub(self, pid: int) -> _Holder:
        # Of one that was there when the trace began, or when it went on after a loss.
        return self._add(_Holder(pid, self._since()))

    def _current(self, pid: int) -> _Holder | None:
        holder = self._newest(pid)
        if holder is not None and holder.sure_until is not None:
            return None  # it may be another one by now
        return holder

    def _apply(self, record: TraceRecord) -> None:
        when, event, values, _ = record
        if event == NEWTASK:
            parent_pid, pid, comm, flags = values
            before = self._newest(pid)
            if before is not None and before.ended is None:
                self._end(before, when)
            parent = self._parent(parent_pid, when)
            if flags & _CLONE_THREAD:
                self._add(_Holder(pid, when, parent or _Holder(parent_pid, 0)))
                return
            holder = self._add(_Holder(pid, when))
            exe = parent.image(when)[2] if parent is not None else None
            holder.become(when, os.fsdecode(comm), exe)
            return
        holder_ = self._current(values[0])
        if event == EXEC:
            pid, old, filename = values
            if old != pid and (thread := self._newest(old)) is not None:
                self._end(thread, when)
            holder_ = holder_ or self._stub(pid)
            holder_.become(when, holder_.image(when)[1], os.fsdecode(filename) or None)
        elif event == RENAME:
            pid, old, new = values
            if holder_ is None:
                holder_ = self._stub(pid)
                holder_.become(0, os.fsdecode(old), None)
            if holder_.leader is None:
                holder_.become(when, os.fsdecode(new), holder_.image(when)[2])
        else:
            pid, comm = values
            if holder_ is None:
                holder_ = self._stub(pid)
            if not holder_.images and holder_.leader is None:
                holder_.become(0, os.fsdecode(comm), None)
            self._end(holder_, when)

    def _parent(self, tid: int, when: int) -> _Holder | None:
        holder = self._current(tid)
        if holder is None:
            # A thread from before the trace, most likely.
            pid = leader_of(tid, when) if self._proc else None
            holder = self._current(pid) if pid is not None else None
        if holder is not None and holder.leader is not None:
            return holder.leader
        return holder

    def _end(self, holder: _Holder, when: int) -> None:
        if holder.ended is None:
            holder.ended = when
            self._bury(holder)

    def _bury(self, holder: _Holder) -> None:
        if not holder.queued:
            holder.queued = True
            self._dead.append(holder)

    def _attach(self, found: Look) -> None:
        if self._tracing and found.begin < self._since():
            return  # what it became until the loss ended is not known: it is looked at again
        holders = self._holders.get(found.pid, ())
        holder = next((h for h in reversed(holders) if h.start <= found.end), None)
        if holder is not None and not self._tracing:
            # One that was there at the last look and began before it is the same.
            if found.start > holder.alive_at:
                self._end(holder, holder.alive_at)
                holder = None
        elif holder is not None and holder.sure_until is not None:
            if found.start <= holder.sure_until and holder.ended is None:
                # What it became meanwhile may have been lost with the rest.
                holder.become(holder.sure_until + 1, None, None)
                holder.sure_until = None
            else:
                holder = None
        if holder is not None and holder.leader is not None:
            return
        if holder is None:
            holder = self._add(_Holder(found.pid, min(found.start, self._since())))
        holder.alive_at = found.end
        since, _, exe = holder.image(found.end)
        if not self._tracing:
            holder.images = [(0, found.name, found.exe)]
        elif since < found.begin:
            # One that is about to end has none any more; the trace knows what it was.
            image = since, found.name, found.exe or exe
            if holder.images:
                at = max(i for i, one in enumerate(holder.images) if one[0] == since)
                holder.images[at] = image
            else:
                holder.images.append(image)
        else:
            return  # exec meanwhile: which of the two was seen is not known
        holder.seen_at = found.end
        holder.run_as(found.uid, found.end)
        if found.cgroup is not None or not found.zombie:
            holder.cgroup = found.cgroup

    def _snapshot(self) -> None:
        # Children of those that were there before have their executable.
        self._snapshot_at = now()
        if not self._proc:
            return
        looks: list[Look] = []
        for name in os.listdir("/proc"):
            if name.isdigit() and len(looks) < _MOST_HOLDERS // 2:
                found = look(int(name))
                if found is not None:
                    looks.append(found)
        self._catch_up(looks)

    # -- now and then --

    def due(self) -> bool:
        """Whether it is time for a tick()."""
        try:
            return bool(os.read(self.timer, 8))
        except BlockingIOError:
            return False

    def tick(self, synced: Iterable[tuple[Windows, int, int]]) -> None:
        """Keep up: ``synced`` are the queues that were seen empty, since when and at what time.

        Both in ns since the epoch.
        """
        for windows, since, after in synced:
            self._check_clock(windows)
            windows.mark(since, after)
        self._catch_up()
        if self._tracing:
            # Without a descriptor left: at the next tick. The counters only grow.
            with contextlib.suppress(OSError):
                loss = self.trace.lost_unseen()
                if loss is not None:
                    self._lose(loss)
                if self._lost and now() > self._snapshot_at + _SNAPSHOT_AGAIN:
                    self._snapshot()
                    self._lost = False
        else:
            for holders in list(self._holders.values()):
                for holder in holders:
                    if holder.alive_at + _GRACE < now():
                        self._end(holder, holder.alive_at)
        self._prune()

    def rested(self, all_windows: Iterable[Windows]) -> None:
        """Note that all that was read is told."""
        self._safe = min((w.marks[-1][1] for w in all_windows), default=0) + self._offset

    def _prune(self, force: bool = False) -> None:
        while self._dead:
            holder = self._dead[0]
            ended = holder.ended if holder.ended is not None else holder.sure_until
            if ended is not None:
                if ended + _GRACE >= self._safe:
                    if not force or self._count < _MOST_HOLDERS * 7 // 8:
                        return
                    self._forgot = max(self._forgot, ended + _GRACE)
                holders = self._holders.get(holder.pid, [])
                if holder in holders:
                    holders.remove(holder)
                    self._count -= 1
                    if not holders:
                        del self._holders[holder.pid]
            holder.queued = False  # sure again, and alive
            self._dead.popleft()

    def _check_clock(self, windows: Windows) -> None:
        offset = _offset()
        if abs(offset - self._offset) > _STEP:
            # The wall clock was set: times from before it cannot be compared.
            self._stepped = now() + _STEP_FOR
            windows.clear()
        self._offset = offset


def _offset() -> int:
    # From wall time to the time since boot.
    return now() - time.time_ns()
