"""A private tracefs instance: its events, read raw from every CPU and merged by time.

Nothing is ever written outside of the instance: not to the global buffer, set_event, tracing_on or
current_tracer. tracefs is used where it is mounted; it is never mounted here.

REFS      the source owns the instance's directory, one raw pipe a CPU, and ``free_buffer``, whose
          last close empties the buffers and stops tracing (disable_on_free): the kernel does that
          for a process that is killed. There is one tracefs, whatever it is mounted on, and the
          mount that was used may go (umount --lazy): so the directory is held open, and everything
          is reached from it.
LOCKING   none: one owner.
LIFETIME  see TRACE. close() disables, closes the pipes (rmdir is EBUSY before) and removes the
          instance. Its name says which process made it (pid, start time, pid namespace): a later
          source removes those whose process is gone, and never one of a live process; in one that
          is not its own it opens nothing (see remove_dead, and ADR 0013). A forked child closes
          its copies at once and removes nothing. Root can switch an instance off, or disable its
          events; nothing tells of that, so `keep` looks, and puts it right. Nobody can remove it
          while its pipes are open.

Order: a record is complete before the task goes on, so whatever a task did before it caused
something else stands in some buffer then. take() notes the time, reads every CPU, and gives what
is not later than that time: all that caused something in it is in it too, or was in one before.

Addresses in records (stacks, callers) stay with the privileged reader; see kernel/tracing.py.

Kernel source: kernel/trace/trace.c; Documentation/trace/events.rst.
"""

import contextlib
import errno
import itertools
import os
import re
import sys
import time
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

from fanwise._errors import FanwiseError
from fanwise.kernel.mounts import mounts
from fanwise.kernel.tracing import (
    UNKNOWN,
    PageHeader,
    Reader,
    parse_format,
    parse_header_page,
    read_page,
    stack_reader,
)
from fanwise.lifetime import Lifetime

STACK = "ftrace/kernel_stack"
"""The name of a record that holds the stack of the one before it on its CPU: ((address, ...),)."""

_NAME = re.compile(r"fanwise-(?P<pid>\d+)-(?P<start>\d+)-(?P<space>\d+)-\d+")
# An instance is gone; or it is just going, and what was found by name opens no more.
_GONE = (errno.ENOENT, errno.ENODEV)
_SMALLEST_KB = 64
_AGAIN = 8  # in a storm the rest comes with what wakes next
_MOST_PAGES = 1 << 14  # of one CPU in one take(): a storm must not hold the caller for ever

_live: "weakref.WeakSet[TraceSource]" = weakref.WeakSet()
_left: set[str] = set()  # names of those of ours that somebody held when they were to be removed
_numbers = itertools.count()


class TraceEvent(NamedTuple):
    """An event to record: ``name`` as "system/event".

    ``fields``: those wanted, in this order; () for all. ``filter``: as in the kernel's filter
    files, set before the event is enabled. ``stacks``: for how many records to take a stack trace,
    at most; each comes as a record STACK behind the one that it belongs to.
    """

    name: str
    fields: tuple[str, ...] = ()
    filter: str | None = None
    stacks: int = 0


class TraceRecord(NamedTuple):
    """One record: ``time`` in ns since boot (CLOCK_BOOTTIME), event's name, fields, CPU."""

    time: int
    event: str
    values: tuple[Any, ...]
    cpu: int


class TraceLoss(NamedTuple):
    """Records were lost between two times, ns since boot; ``records`` None when nobody counted."""

    after: int
    before: int
    records: int | None


class TraceSource:
    """One private instance with some events; a context manager.

    ``kb`` is the size of each CPU's buffer, in KiB; ``wake_percent`` how full one must be to make
    its descriptor readable (0: at each record). ``tracefs``: where it is mounted, by default the
    first mount of it. Opening never raises for what tracefs cannot do here: `state` is then
    DEGRADED (`missing` says which events, and why) or DOWN, and `reason` and `remedy` say why.
    """

    state: str

    def __init__(
        self,
        events: Sequence[TraceEvent],
        *,
        kb: int = 256,
        wake_percent: int = 0,
        tracefs: str | None = None,
    ) -> None:
        self.events = tuple(events)
        self.kb = max(kb, _SMALLEST_KB)
        self.reason: str | None = None
        self.remedy: str | None = None
        self.missing: dict[str, str] = {}
        self.path: str | None = None
        self.complete_to = 0  # ns since boot: all before was given by take(), or told as lost
        self.lost = 0  # records known lost; those that nobody counted count as one
        self.disturbed: str | None = None  # what somebody did to it, as the last `keep` found
        self.disturbances = 0
        self.records = 0
        self.clock_offset = 0  # ns to add to a time for wall time, measured at open()
        self._tracefs, self._wake = tracefs, wake_percent
        self._readers: dict[int, tuple[str, Reader]] = {}
        self._header = PageHeader(8, 8, 16, 4080)
        self._fds: list[int] = []
        self._cpus: list[int] = []
        self._free = self._dir = self._above = -1
        self._size = ""
        self._kept = 0  # when a look began that found all as it was made
        self._found: list[str] = []  # by a look that could not put it right, or not yet
        self._held: list[TraceRecord] = []
        self._known: dict[str, int] = {}  # losses that the counters told, so far
        TRACE.start(self)

    # -- life --

    def open(self) -> None:
        """Make the instance and record; see `state`."""
        found = self._find()
        if found is None:
            TRACE.advance(self, "fail")
            return
        try:
            try:
                self._make(found)
            except FileNotFoundError:
                # Somebody else's mount, and just unmounted: is there another one?
                self._release()  # it may go when the instance is there already
                found, gone = self._find() or found, found
                if self._tracefs is not None or found == gone:
                    raise
                self._make(found)
        except OSError as error:
            self._fail(error, found)
            return
        except (FanwiseError, KeyError) as error:
            self._release()
            self.reason = f"what {found} says of its own format makes no sense: {error}"
            TRACE.advance(self, "fail")
            return
        if len(self.missing) == len(self.events):
            self.reason = "; ".join(f"{name}: {why}" for name, why in self.missing.items())
            self._release()
            TRACE.advance(self, "fail")
            return
        if self.missing:
            self.reason = "; ".join(f"{name}: {why}" for name, why in self.missing.items())
        TRACE.advance(self, "degrade" if self.missing else "up")

    def _find(self) -> str | None:
        if self._tracefs is not None:
            return self._tracefs
        try:
            for mount in mounts():
                point = os.fsdecode(mount.mount_point)
                if mount.fstype == "tracefs" and os.path.isdir(f"{point}/instances"):
                    return point
        except OSError as error:
            self.reason = f"mountinfo cannot be read: {error.strerror}"
            return None
        if os.geteuid() and os.path.isdir("/sys/kernel/tracing"):
            self.reason, self.remedy = "tracefs is for root only", "run as root"
        elif os.path.isdir("/sys/kernel/tracing"):
            self.reason = "tracefs is not mounted"
            self.remedy = "mount it with: mount -t tracefs tracefs /sys/kernel/tracing"
        else:
            self.reason = "there is no tracefs here"
            self.remedy = "use a kernel with CONFIG_TRACING, and a sysfs that shows it"
        return None

    def _fail(self, error: OSError, found: str) -> None:
        self._release()
        self.reason = f"no instance can be made in {found}: {error.strerror}"
        if error.errno in (errno.EPERM, errno.EACCES):
            self.remedy = "run as root, on a kernel that is not locked down (lockdown(7))"
        elif error.errno in (errno.EMFILE, errno.ENFILE):
            self.remedy = "let the process open more files (ulimit -n)"
        elif error.errno == errno.EROFS:
            self.remedy = "mount tracefs writable"
        TRACE.advance(self, "fail")

    def _make(self, found: str) -> None:
        remove_dead(found)
        with open(f"{found}/events/header_page") as file:
            self._header = parse_header_page(file.read())
        above = _directory(f"{found}/instances")
        try:
            name = _new_instance(above)
        except OSError:
            os.close(above)
            raise
        self._above = above
        self.path = f"{found}/instances/{name}"
        _live.add(self)
        self._dir = _directory(name, above)
        self._write("trace_clock", "boot")
        self._write("options/disable_on_free", "1")
        self._free = self._open("free_buffer", os.O_RDONLY)
        # Names of tasks by pid are kept with a probe on each switch of tasks; nobody reads them
        # here. Where the instance does not take it, it costs a little and changes nothing.
        with contextlib.suppress(OSError):
            self._write("trace_options", "norecord-cmd")
        self._write("buffer_size_kb", str(self.kb))
        self._size = self._read("buffer_size_kb")
        self._write("buffer_percent", str(self._wake))
        listed = self._open("per_cpu", os.O_RDONLY | os.O_DIRECTORY)
        try:
            cpus = [n for n in os.listdir(listed) if n.startswith("cpu")]
        finally:
            os.close(listed)
        self._cpus = sorted(int(n[3:]) for n in cpus)
        for cpu in self._cpus:
            pipe = self._open(f"per_cpu/cpu{cpu}/trace_pipe_raw", os.O_RDONLY | os.O_NONBLOCK)
            self._fds.append(pipe)
        self.clock_offset = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        if any(event.stacks for event in self.events):
            with open(f"{found}/events/{STACK}/format") as file:
                form = parse_format(file.read())
            self._readers[form.id] = STACK, stack_reader(form)
        for event in self.events:
            try:
                self._enable(event)
            except FileNotFoundError:
                self.missing[event.name] = "this kernel does not have it, or its module is not in"
            except (OSError, KeyError, FanwiseError) as error:
                why = error.strerror if isinstance(error, OSError) else str(error)
                self.missing[event.name] = f"cannot be recorded: {why}"
        self.complete_to = self._kept = time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def _enable(self, event: TraceEvent) -> None:
        base = f"events/{event.name}"
        form = parse_format(self._read(f"{base}/format"))
        self._readers[form.id] = event.name, form.reader(event.fields)
        if event.filter is not None:
            self._write(f"{base}/filter", event.filter)
        if event.stacks:
            with contextlib.suppress(FileExistsError):  # it stays when an event is disabled
                self._write(f"{base}/trigger", f"stacktrace:{event.stacks}")
        self._write(f"{base}/enable", "1")

    # Only ever below our own instance.
    def _open(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_CLOEXEC, dir_fd=self._dir)

    def _write(self, name: str, text: str) -> None:
        _write(name, text, self._dir)

    def _read(self, name: str) -> str:
        with open(self._open(name, os.O_RDONLY)) as file:
            return file.read()

    def close(self) -> None:
        """Disable, close and remove the instance; idempotent."""
        if self.state == "CLOSED":
            return
        self._release()
        TRACE.advance(self, "close")

    def _release(self) -> None:
        path, self.path = self.path, None
        _live.discard(self)
        try:
            if path is not None:
                try:
                    for name in ("tracing_on", "events/enable") if self._dir >= 0 else ():
                        self._write(name, "0")
                except OSError as error:
                    # Removing it does both. Only where somebody looks at it events stay enabled.
                    if error.errno not in (*_GONE, errno.EMFILE, errno.ENFILE):
                        raise
                finally:
                    self._close_fds()
                    _remove(os.path.basename(path), self._above)
        finally:
            self._close_fds()
            self._let_go()

    def _close_fds(self) -> None:
        for fd in (*self._fds, self._free):
            if fd >= 0:
                os.close(fd)
        self._fds, self._free = [], -1

    def _let_go(self) -> None:
        for fd in (self._dir, self._above):
            if fd >= 0:
                os.close(fd)
        self._dir = self._above = -1

    def _forget(self) -> None:
        # In a forked child: the instance is the parent's.
        self._close_fds()
        self._let_go()
        self.path = None
        self.state = "CLOSED"

    def __enter__(self) -> "TraceSource":
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- reading --

    @property
    def up(self) -> bool:
        """Whether records come: all of what was asked for, or some of it."""
        return self.state in ("UP", "DEGRADED")

    def filenos(self) -> list[int]:
        """Return the descriptors to poll, one a CPU; readable as ``wake_percent`` says."""
        return list(self._fds)

    def take(self) -> tuple[list[TraceRecord], list[TraceLoss]]:
        """Return the records since the last call, in the order of time, and what was lost.

        Does not wait. Raises DecodeError, OSError.
        """
        if not self.up:
            return [], []
        found, losses = self._take()
        # What was written meanwhile is out of its pipe: nothing would wake who waits for it.
        for _ in range(_AGAIN):
            if not self._held:
                break
            more, lost = self._take()
            found += more
            losses += lost
        return found, losses

    def _take(self) -> tuple[list[TraceRecord], list[TraceLoss]]:
        begin = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        found, self._held = self._held, []
        losses = []
        size, header, readers = self._header.size, self._header, self._readers
        for cpu, fd in zip(self._cpus, self._fds, strict=True):
            for _ in range(_MOST_PAGES):
                try:
                    data = os.read(fd, size)
                except BlockingIOError:
                    break
                if not data:
                    break
                page = read_page(data, header)
                if page.missed:
                    count = None if page.missed == UNKNOWN else page.missed
                    self.lost += count or 1
                    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
                    losses.append(TraceLoss(self.complete_to, now, count))
                for when, start, end in page.records:
                    if end - start < 2:
                        continue
                    number = int.from_bytes(data[start : start + 2], sys.byteorder)
                    reader = readers.get(number)
                    if reader is not None:
                        found.append(TraceRecord(when, reader[0], reader[1](data, start, end), cpu))
            else:  # written faster than it is read: what is left may be older than the rest
                losses.append(
                    TraceLoss(self.complete_to, time.clock_gettime_ns(time.CLOCK_BOOTTIME), None)
                )
        # Stable: a stack stays behind its event, which has the same CPU and an earlier time.
        found.sort(key=_time)
        if found and found[-1].time > begin:
            cut = len(found)
            while cut and found[cut - 1].time > begin:
                cut -= 1
            found, self._held = found[:cut], found[cut:]
        self.records += len(found)
        self.complete_to = begin
        return found, losses

    def counters(self) -> dict[str, int]:
        """Return what the kernel counted over all CPUs: overrun, dropped, commit_overrun, entries.

        Costs a file a CPU: for a look now and then.
        """
        total = {"overrun": 0, "dropped": 0, "commit_overrun": 0, "entries": 0}
        for cpu in self._cpus if self.up else ():
            for line in self._read(f"per_cpu/cpu{cpu}/stats").splitlines():
                key, _, value = line.partition(":")
                name = {"dropped events": "dropped", "commit overrun": "commit_overrun"}.get(
                    key, key
                )
                if name in total:
                    total[name] += int(value)
        return total

    @property
    def recording(self) -> bool:
        """Whether nobody has switched the instance off. Raises OSError when that cannot be seen."""
        return self._read("tracing_on").strip() == "1"

    def keep(self) -> TraceLoss | None:
        """Look whether somebody switched it off, and switch it on again; for now and then.

        Gives the time in which records may be lost, which begins at the last look that found all as
        it was made; None when it is now. `disturbed` says what was found. Whether events are still
        enabled, and the size of the buffers, which reading ``free_buffer`` takes away, are looked
        at as well. Costs a file an event, some 0.1 ms in all. Raises OSError when it cannot be seen
        or put right.
        """
        if not self.up:
            return None
        began = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        found = [] if self.recording else ["switched it off (tracing_on)"]
        off = []
        for event in self.events:
            enable = f"events/{event.name}/enable"
            if event.name not in self.missing and not self._read(enable).startswith("1"):
                off.append(event)
        if off:
            found.append(f"disabled {', '.join(event.name for event in off)}")
        size = self._read("buffer_size_kb")
        if size != self._size:
            found.append(f"changed the size of its buffers to {size.strip()} KiB")
        found = self._found = list(dict.fromkeys([*self._found, *found]))
        self.disturbed = None
        if not found:
            self._kept = began
            return None
        if size != self._size:
            self._write("buffer_size_kb", str(self.kb))
            self._size = self._read("buffer_size_kb")
        for event in off:
            try:
                self._enable(event)
            except FanwiseError as error:  # it was understood before
                raise OSError(errno.EIO, str(error), event.name) from error
        self._write("tracing_on", "1")
        self._found = []
        self.disturbances += 1
        self.disturbed = f"somebody {', '.join(found)}; this was put right"
        loss = self.since_kept()
        self._kept = loss.before
        return loss

    @property
    def astray(self) -> bool:
        """Whether a look found it not as it was made, and could not put it right yet."""
        return bool(self._found)

    def since_kept(self) -> TraceLoss:
        """Give the time since the last look that found all as it was made: records may be lost."""
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        return TraceLoss(min(self.complete_to, self._kept), now, None)

    def lost_unseen(self) -> TraceLoss | None:
        """Look at the counters for losses that no page tells of; None when there are none new."""
        found = self.counters()
        new = sum(found[key] - self._known.get(key, 0) for key in ("dropped", "commit_overrun"))
        after, self._known = self.complete_to, found
        if new <= 0:
            return None
        self.lost += new
        return TraceLoss(after, time.clock_gettime_ns(time.CLOCK_BOOTTIME), new)

    def wall(self, when: int) -> float:
        """Convert a record's time to seconds since the epoch, by the clocks as at open()."""
        return (when + self.clock_offset) / 1e9


TRACE: Lifetime[TraceSource] = Lifetime(
    "TraceSource",
    states=("NEW", "UP", "DEGRADED", "DOWN", "CLOSED"),
    transitions={
        "up": "NEW -> UP",
        "degrade": "NEW -> DEGRADED",
        "fail": "NEW -> DOWN",
        "close": "NEW, UP, DEGRADED, DOWN -> CLOSED",
    },
    invariants={
        "only one that records has an instance": lambda s: (
            (s.path is not None) == (s.state in ("UP", "DEGRADED"))
        ),
        "what does not work has a reason": lambda s: (
            s.state not in ("DEGRADED", "DOWN") or s.reason is not None
        ),
    },
)


def _new_instance(above: int) -> str:
    while True:
        name = f"fanwise-{_identity(os.getpid())}-{next(_numbers)}"
        try:
            os.mkdir(name, 0o700, dir_fd=above)
        except FileExistsError:
            continue  # of this process, before it executed another program
        return name


def _time(record: TraceRecord) -> int:
    return record.time


def remove_dead(tracefs: str) -> list[str]:
    """Remove the instances of processes that ended without closing them; return their names.

    One in another pid namespace is left alone: whether it lives cannot be seen from here.
    """
    removed = []
    names = os.listdir(f"{tracefs}/instances")
    above = _directory(f"{tracefs}/instances")
    try:
        for name in list(_left):
            _remove(name, above)
        for name in names:
            match = _NAME.fullmatch(name)
            if match is None:
                continue
            of = f"{match['pid']}-{match['start']}-{match['space']}"
            if int(match["space"]) != _space() or _identity(int(match["pid"])) == of:
                continue
            # Not switched off before: the kernel did that (disable_on_free). And whoever opens a
            # file of an instance that another one removes meanwhile may get the file of that which
            # is made next: the open waits for the lock, and then only the address is compared
            # (trace_array_get). Who looks at it keeps it: the next one removes it.
            if _rmdir(name, above) == 0:
                removed.append(name)
    finally:
        os.close(above)
    return removed


# 0; ENOENT or ENODEV when another one was faster; or EBUSY.
def _rmdir(name: str, above: int) -> int:
    try:
        os.rmdir(name, dir_fd=above)
    except OSError as error:
        if error.errno not in (*_GONE, errno.EBUSY):
            raise
        return error.errno
    return 0


def _remove(name: str, above: int) -> None:
    if _rmdir(name, above) == errno.EBUSY:
        _left.add(name)  # somebody looks at it: stopped and empty it stays until he has done
    else:
        _left.discard(name)


def _write(name: str, text: str, below: int) -> None:
    flags = os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC
    with open(os.open(name, flags, dir_fd=below), "w") as file:
        file.write(text)


def _directory(name: str, below: int | None = None) -> int:
    return os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=below)


def _space() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


# Who a process is, as long as the machine runs: pid, start time and pid namespace.
def _identity(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            start = file.read().rpartition(b")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return f"{pid}-{int(start)}-{_space()}"


def _after_fork() -> None:
    for source in list(_live):
        source._forget()
    _live.clear()
    _left.clear()


os.register_at_fork(after_in_child=_after_fork)
