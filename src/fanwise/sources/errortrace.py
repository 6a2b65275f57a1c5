"""Tracepoints of errors: what filesystems and the block layer find, from a private instance.

Read as text, not raw: ext4 records its function as a pointer to a string of the kernel and xfs the
failing address as a pointer to code. The kernel turns both into names when it prints; so no address
ever reaches this process. Text costs 0.9 us a record, and errors are rare.

An event that this kernel does not have is missing, and said to be; filters stand before events are
enabled. Stack traces are taken for a limited number of records of an event.

LIFETIME  that of TraceSource, whose instance, names and cleaning up after a crash this uses.
"""

import os
import re
import time
from collections.abc import Sequence

import msgspec

from fanwise.sources.fserror import Process, process_of
from fanwise.sources.state import SourceState
from fanwise.sources.trace import TraceEvent, TraceSource

_STACKS = 32  # records of an event that get one
_READ = 64 << 10
_MOST_READS = 4096  # in one take
_LONGEST_LINE = 16 << 10

EVENTS = (
    TraceEvent("ext4/ext4_error", stacks=_STACKS),
    TraceEvent("ext4/ext4_shutdown"),
    TraceEvent("xfs/xfs_force_shutdown", stacks=_STACKS),
    TraceEvent("xfs/xfs_fs_mark_sick", stacks=_STACKS),
    TraceEvent("xfs/xfs_group_mark_sick", stacks=_STACKS),
    TraceEvent("xfs/xfs_inode_mark_sick", stacks=_STACKS),
    # Fires with 0 on every buffer that is got.
    TraceEvent("xfs/xfs_buf_ioerror", filter="error != 0"),
    TraceEvent("filemap/filemap_set_wb_err"),
    TraceEvent("filemap/file_check_and_advance_wb_err"),
    TraceEvent("block/block_rq_error", filter="error != 0"),
)
"""What health listens to."""

# An instance starts with the options of the global one, which somebody may have changed.
_OPTIONS = (
    "context-info", "print-parent", "nobin", "nohex", "noraw", "noverbose", "nofields",
    "nosym-offset", "nosym-addr", "nolatency-format", "norecord-tgid",
)  # fmt: skip

Dev = tuple[int, int]


class TracedError(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One record: its event's name, when (seconds since the epoch), who ran then, and where.

    ``errno`` is positive, 0 where the event has none. ``start`` and ``length`` are bytes of the
    device ``dev``. ``seen`` says that a write-back error was told to a program. ``detail`` is what
    of the event has no field here. ``stack`` are symbols, innermost first. ``process`` is who ran,
    where that means something: who met the error, or was told; None for a kernel thread.
    """

    event: str
    time: float
    pid: int
    dev: Dev
    function: str | None = None
    line: int | None = None
    symbol: str | None = None
    ino: int | None = None
    group: int | None = None
    errno: int = 0
    start: int | None = None
    length: int | None = None
    seen: bool = False
    detail: str | None = None
    stack: tuple[str, ...] = ()
    process: Process | None = None


class TracedLoss(msgspec.Struct, frozen=True, gc=False):
    """``count`` records, of any event, were overwritten before they were read."""

    count: int
    time: float


# What is raised by whoever meets it. Requests and write-back end in whatever ran at the interrupt.
_SYNCHRONOUS = frozenset(
    (
        "ext4_error",
        "ext4_shutdown",
        "xfs_force_shutdown",
        "xfs_fs_mark_sick",
        "xfs_group_mark_sick",
        "xfs_inode_mark_sick",
        "file_check_and_advance_wb_err",
    )
)

_LINE = re.compile(
    r"\s*.*-(?P<pid>\d+)\s+(?:\([ \d-]+\)\s+)?\[\d+\]\s+(?:\S+\s+)?"
    r"(?P<time>\d{1,12}\.\d{1,9}): (?P<event>[\w<> ]+?)(?:: (?P<rest>.*))?$"
)
_LOST = re.compile(r"CPU:\d+ \[LOST (\d+) EVENTS\]$")
_STACK = re.compile(r" => (\S+)$")

_DEV = r"dev[ =](?P<major>\d+)[:,](?P<minor>\d+) "
_EVENTS = {
    "ext4_error": re.compile(_DEV + r"function (?P<function>\S+) line (?P<line>\d+)$"),
    "ext4_shutdown": re.compile(_DEV + r"(?P<detail>flags \d+)$"),
    "xfs_force_shutdown": re.compile(
        _DEV + r"(?P<detail>tag \S* flags \S*) file (?P<file>\S+) line_num (?P<line>\d+)$"
    ),
    "xfs_fs_mark_sick": re.compile(_DEV + r"(?P<detail>flags 0x[0-9a-f]+)$"),
    "xfs_group_mark_sick": re.compile(
        _DEV + r"(?P<kind>\w+?)no (?P<group>0x[0-9a-f]+) (?P<detail>flags 0x[0-9a-f]+)$"
    ),
    # Until the groups had a name in common (commit "xfs: add a generic group pointer", v6.13).
    "xfs_ag_mark_sick": re.compile(
        _DEV + r"agno (?P<group>0x[0-9a-f]+) (?P<detail>flags 0x[0-9a-f]+)$"
    ),
    "xfs_inode_mark_sick": re.compile(
        _DEV + r"ino (?P<hexino>0x[0-9a-f]+) (?P<detail>flags 0x[0-9a-f]+)$"
    ),
    "xfs_buf_ioerror": re.compile(
        _DEV + r"daddr (?P<daddr>0x[0-9a-f]+) bbcount (?P<sectors>0x[0-9a-f]+) .*"
        r"error (?P<errno>-?\d+) (?P<detail>flags \S*) caller (?P<symbol>\S+)$"
    ),
    "filemap_set_wb_err": re.compile(_DEV + r"ino=(?P<hexino>0x[0-9a-f]+) (?P<detail>errseq=\S+)$"),
    "file_check_and_advance_wb_err": re.compile(
        r"file=\S+ " + _DEV + r"ino=(?P<hexino>0x[0-9a-f]+) old=\S+ new=(?P<errseq>0x[0-9a-f]+)$"
    ),
    "block_rq_error": re.compile(
        r"(?P<major>\d+),(?P<minor>\d+) (?P<detail>\w*) \(.*\) (?P<daddr>\d+) \+ (?P<sectors>\d+)"
        r"\b.*\[(?P<errno>-?\d+)\]$"
    ),
}


def parse_line(line: str, wall: float = 0.0) -> TracedError | TracedLoss | str | None:
    """Parse a line of trace_pipe.

    Gives a record (``wall`` is added to its time), a loss, the name of a stack's next function, or
    None for the head of a stack. Raises ValueError for a line that makes no sense.
    """
    stack = _STACK.fullmatch(line)
    if stack:
        return stack[1]
    lost = _LOST.fullmatch(line)
    if lost:
        return TracedLoss(int(lost[1]), wall)
    head = _LINE.fullmatch(line)
    if head is None:
        raise ValueError(f"not a line of a trace: {line[:200]!r}")
    if head["event"] == "<stack trace>":
        return None
    form = _EVENTS.get(head["event"])
    found = form.fullmatch(head["rest"] or "") if form else None
    if found is None:
        raise ValueError(f"not understood: {line[:200]!r}")
    got = found.groupdict()
    code = abs(int(got.get("errno") or 0))
    seen = "errseq" in got
    if seen:
        code = int(got["errseq"], 16) & 0xFFF
    hexino, daddr, sectors = got.get("hexino"), got.get("daddr"), got.get("sectors")
    file, symbol = got.get("file"), got.get("symbol")
    return TracedError(
        event=head["event"],
        time=wall + float(head["time"]),
        pid=int(head["pid"]),
        dev=(int(got["major"]), int(got["minor"])),
        # xfs gives a file where ext4 gives a function; they print alike: name, line.
        function=got.get("function") or file,
        line=int(got["line"]) if got.get("line") else None,
        symbol=symbol,
        ino=None if hexino is None else int(hexino, 16),
        group=int(got["group"], 16) if got.get("group") else None,
        errno=code,
        start=None if daddr is None else int(daddr, 0) * 512,
        length=None if sectors is None else int(sectors, 0) * 512,
        seen=seen,
        detail=got.get("detail") or None,
    )


class ErrorTrace(TraceSource):
    """The error events of the running kernel; a context manager. See TraceSource for its state."""

    def __init__(
        self,
        events: Sequence[TraceEvent] = EVENTS,
        *,
        kb: int = 256,
        tracefs: str | None = None,
    ) -> None:
        super().__init__(events, kb=kb, tracefs=tracefs)
        self.garbage = 0  # lines that made no sense
        self.last_garbage: str | None = None
        self._rest = b""

    def open(self) -> None:
        """Make the instance and record; see `state`."""
        super().open()
        if not self.up:
            return
        # The pipe of all CPUs as text, instead of one a CPU.
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        for option in _OPTIONS:
            try:
                self._write("trace_options", option)
            except OSError:
                if not option.startswith("no"):  # what is not there is not on
                    raise
        self._fds = [self._open("trace_pipe", os.O_RDONLY | os.O_NONBLOCK)]

    def fileno(self) -> int:
        """Readable when there is a record; -1 when it is not up."""
        return self._fds[0] if self._fds else -1

    def errors(self) -> list[TracedError | TracedLoss]:
        """Everything that is there now, in order, without waiting."""
        found: list[TracedError | TracedLoss] = []
        if not self.up:
            return found
        boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        for line in self._lines():
            try:
                one = parse_line(line, boot)
            except ValueError as error:
                self.garbage += 1
                self.last_garbage = str(error)
                continue
            if isinstance(one, str):
                last = found[-1] if found else None
                if isinstance(last, TracedError):
                    found[-1] = msgspec.structs.replace(last, stack=(*last.stack, one))
            elif isinstance(one, TracedLoss):
                self.lost += one.count
                found.append(TracedLoss(one.count, time.time()))
            elif one is not None:
                self.records += 1
                if one.event in _SYNCHRONOUS:
                    one = msgspec.structs.replace(one, process=process_of(one.pid))
                found.append(one)
        return found

    def status(self) -> SourceState:
        """Up, degraded with what is missing, or down with the reason and the remedy."""
        reasons = [text for text in (self.reason, self.remedy, self.disturbed) if text]
        uncounted = self.disturbances > 0
        if self.garbage:
            reasons.append(f"{self.garbage} lines made no sense, the last: {self.last_garbage}")
        if not self.up:
            why = "; ".join(reasons) or "not open"
            return SourceState("trace", "down", why, self.lost, uncounted)
        if not reasons:
            return SourceState("trace", "up", None, self.lost, uncounted)
        return SourceState("trace", "degraded", "; ".join(reasons), self.lost, uncounted)

    def _lines(self) -> list[str]:
        parts = [self._rest]
        for _ in range(_MOST_READS):
            try:
                more = os.read(self._fds[0], _READ)
            except BlockingIOError:
                break
            if not more:
                break
            parts.append(more)
        # A line longer than the reader's buffer comes in two reads.
        *lines, self._rest = b"".join(parts).split(b"\n")
        if len(self._rest) > _LONGEST_LINE:
            lines, self._rest = [*lines, self._rest], b""
        return [line.decode("utf-8", "replace") for line in lines if line.strip()]
