"""The kernel's log: the last resort, for what no other channel tells.

A log is for people: its text changes between releases, ext4's is rate-limited (14 lines for 2,011
errors), and counting its lines counts nothing. So what is recognised is loosely recognised, the
text is kept whole, and every record that was overwritten before it was read is counted by the gap
in the sequence numbers.

REFS      the reader owns its descriptor.
LOCKING   none: one owner.
LIFETIME  see KMSG.

Linux reference: Documentation/ABI/testing/dev-kmsg, fs/ext4/super.c, fs/xfs/xfs_message.c,
fs/btrfs/messages.c, block/blk-mq.c.
"""

import errno
import os
import re
import time
from types import TracebackType
from typing import Literal

import msgspec

from fanwise._errors import FeatureMissing, PermissionNeeded
from fanwise.lifetime import Lifetime
from fanwise.sources.state import SourceState

_PATH = "/dev/kmsg"
_RECORD = 16 << 10  # a record with its dictionary; a shorter buffer gives EINVAL

What = Literal["error", "warning", "io", "writeback", "buffer", "shutdown", "state", "lost", "note"]


class KmsgRecord(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """A message about a filesystem or a block device.

    ``source`` is "ext4", "xfs", "btrfs" or "block", ``device`` a block device's name. ``what`` is
    "note" when nothing more is understood. ``time`` is seconds since the epoch, ``text`` the whole
    message. ``start`` and ``length`` are bytes of the device. The rest is None where not told.
    """

    seq: int
    time: float
    level: int
    text: str
    source: str
    device: str
    what: What
    function: str | None = None
    line: int | None = None
    symbol: str | None = None
    ino: int | None = None
    group: int | None = None
    errno: int = 0
    start: int | None = None
    length: int | None = None
    comm: str | None = None
    root: int | None = None


class KmsgLoss(msgspec.Struct, frozen=True, gc=False):
    """``count`` messages, of any kind, were overwritten before they were read."""

    count: int
    time: float


def parse(record: bytes, boot: float = 0.0) -> tuple[int, KmsgRecord | None]:
    """Parse one record of /dev/kmsg: its sequence number, and what it is, if it concerns us.

    ``boot`` is the time of boot, in seconds since the epoch. Raises ValueError for what is none.
    """
    head, semicolon, rest = record.partition(b";")
    fields = head.split(b",")
    if not semicolon or len(fields) < 4:
        raise ValueError(f"not a record of kmsg: {record[:80]!r}")
    prio, seq, usec = (int(field) for field in fields[:3])
    text = _unescape(rest.split(b"\n", 1)[0])
    return seq, recognise(text, seq, boot + usec / 1e6, prio & 7)


def recognise(text: str, seq: int = 0, at: float = 0.0, level: int = 3) -> KmsgRecord | None:
    """Understand a message as far as it can be; None when it is about something else."""
    for source, prefix in _PREFIXES:
        found = prefix.match(text)
        if found is None:
            continue
        rest = text[found.end() :]
        fields: dict[str, object] = {"what": "note"}
        for pattern, what in _GRAMMAR[source]:
            match = pattern.search(rest if found["device"] else text)
            if match is not None:
                fields = {"what": what, **_fields(match)}
                break
        else:
            if "level" in found.groupdict():
                fields["what"] = _LEVELS.get((found["level"] or "").strip(), "note")
        # btrfs warns of what is broken, too.
        warned = source == "ext4" and found["level"] == "warning"
        if warned and fields["what"] == "error":
            fields["what"] = "warning"
        device = found["device"] or str(fields.pop("device", "") or "")
        fields.pop("device", None)
        return msgspec.convert(
            {
                "seq": seq,
                "time": at,
                "level": level,
                "text": text,
                "source": source,
                "device": device.removeprefix("/dev/"),
                **fields,
            },
            KmsgRecord,
        )
    return None


# The device of a btrfs message may carry a state: (device loop3 state EA).
_PREFIXES = (
    (
        "ext4",
        re.compile(r"EXT4-fs(?: (?P<level>\w+))? \((?:device )?(?P<device>[\w!.-]+)\)(?:: )?"),
    ),
    ("ext4", re.compile(r"(?P<level>)(?P<device>)(?=JBD2: |Aborting journal on device )")),
    ("xfs", re.compile(r"XFS \((?P<device>[\w!.-]+)\): (?P<level>)")),
    (
        "btrfs",
        re.compile(
            r"BTRFS(?::)?(?: (?P<level>\w+))? "
            r"\(device (?P<device>[\w!./-]+)(?: state \w+)?\)(?:: )?"
        ),
    ),
    (
        "block",
        re.compile(r"(?P<level>)(?P<device>)(?=[\w/ -]+ error, dev |Buffer I/O error on dev)"),
    ),
    (
        "fserror",
        re.compile(r"(?P<level>)(?P<device>)(?=.*\blost (?:file I/O|filesystem) error rep)"),
    ),
)
_LEVELS = {"error": "error", "critical": "error", "warning": "warning", "warn": "warning"}

_SYMBOL = r"(?P<symbol>[\w.]+\+0x[0-9a-f]+/0x[0-9a-f]+|[\w.]+)"
_EXT4_OBJECT = r"(?: inode #(?P<ino>\d+):)?(?: block (?P<fsblock>\d+):)?"


def _rules(*rules: tuple[str, What]) -> tuple[tuple[re.Pattern[str], What], ...]:
    return tuple((re.compile(pattern, re.DOTALL), what) for pattern, what in rules)


_GRAMMAR = {
    "ext4": _rules(
        (r"I/O error -?\d+ writing to inode (?P<ino>\d+)", "writeback"),
        (
            r"Delayed block allocation failed for inode (?P<ino>\d+) .*error (?P<errno>\d+)",
            "writeback",
        ),
        (r"potential data loss!\s+\(inode (?P<ino>\d+), error -?(?P<errno>\d+)\)", "writeback"),
        (r"^(?P<function>ext4_end_bio):(?P<line>\d+):", "writeback"),
        (r"Remounting filesystem read-only|shut down requested", "state"),
        (r"Aborting journal on device (?P<device>[\w!.]+?)(?:-\d+)?\.$", "state"),
        (r"(?:updating journal|JBD2:).* for (?P<device>[\w!.]+?)(?:-\d+)?\.?$", "io"),
        (
            r"^\s*(?:in )?(?P<function>\w+):(?P<line>\d+):"
            + _EXT4_OBJECT
            + r"(?: comm (?P<comm>.{1,16}?):)?(?: bg (?P<group>\d+):)?",
            "error",
        ),
    ),
    "xfs": _rules(
        (r"^First \d+ bytes of|^Unmount and run|^Please unmount", "note"),
        (
            rf"Metadata CRC error detected at {_SYMBOL},"
            r" \w+(?: buffer)? block (?P<daddr>0x[0-9a-f]+)",
            "buffer",
        ),
        (
            rf"Metadata corruption detected at {_SYMBOL}, (?:inode (?P<hexino>0x[0-9a-f]+)"
            r"|\w+(?: buffer)? block (?P<daddr>0x[0-9a-f]+))",
            "buffer",
        ),
        (
            rf"metadata I/O error in \"?{_SYMBOL}\"? at daddr (?P<daddr>0x[0-9a-f]+)"
            r" len (?P<sectors>\d+) error (?P<errno>\d+)",
            "buffer",
        ),
        (
            rf"detected at {_SYMBOL} \((?P<file>[\w./]+):(?P<line>\d+)\)\.\s+Shutting down",
            "shutdown",
        ),
        (r"[Ss]hut(?:ting)? down filesystem|has been shut down|initiated shutdown", "shutdown"),
        (
            r"Internal error .* at line (?P<line>\d+) of file (?P<file>[\w./]+)\."
            rf"\s+Caller {_SYMBOL}",
            "error",
        ),
        (r"log I/O error -(?P<errno>\d+)", "error"),
        (rf"[Cc]orrupt(?:ion|ed)\b.* at {_SYMBOL}", "error"),
        (r"[Cc]orrupt(?:ion|ed)\b", "error"),
        (r"writeback error on inode (?P<ino>\d+)", "writeback"),
    ),
    "btrfs": _rules(
        (r"csum failed root (?P<root>-?\d+) ino (?P<ino>\d+) off (?P<off>\d+)", "error"),
        (r"^\s*in (?P<function>\w+):(?P<line>\d+): errno=-(?P<errno>\d+)", "error"),
        (r"forced readonly", "state"),
        (r"errs: wr \d+", "io"),
    ),
    "block": _rules(
        (
            r"^(?P<kind>[\w/ -]+) error, dev (?P<device>[\w!.-]+), sector (?P<daddr>\d+)"
            r"(?: op 0x[0-9a-f]+:\((?P<op>\w+)\))?",
            "io",
        ),
        (r"^Buffer I/O error on dev(?:ice)? (?P<device>[\w!.-]+), logical block \d+", "io"),
    ),
    "fserror": _rules((r"lost (?:file I/O|filesystem) error report", "lost")),
}

# The names that the block layer prints (blk_errors in block/blk-core.c).
_BLOCK_ERRORS = {
    "I/O": errno.EIO,
    "critical medium": errno.ENODATA,
    "critical target": errno.EREMOTEIO,
    "critical space allocation": errno.ENOSPC,
    "critical nexus": errno.EBADE,
    "timeout": errno.ETIMEDOUT,
    "recoverable transport": errno.ENOLINK,
    "protection": errno.EILSEQ,
    "kernel resource": errno.ENOMEM,
    "device offline": errno.ENODEV,
}


def _fields(match: re.Match[str]) -> dict[str, object]:
    given = {name: value for name, value in match.groupdict().items() if value}
    fields: dict[str, object] = {
        name: given[name] for name in ("function", "symbol", "comm", "device") if name in given
    }
    for name in ("line", "ino", "group", "errno", "root"):
        if name in given:
            fields[name] = int(given[name])
    if "hexino" in given:
        fields["ino"] = int(given["hexino"], 16)
    if "daddr" in given:
        fields["start"] = int(given["daddr"], 0) * 512
    if "sectors" in given:
        fields["length"] = int(given["sectors"]) * 512
    if "kind" in given:
        fields["errno"] = _BLOCK_ERRORS.get(given["kind"], errno.EIO)
    if "csum failed" in match[0] or "CRC error" in match[0]:
        fields["errno"] = errno.EBADMSG
    elif "Metadata corruption" in match[0]:
        fields["errno"] = errno.EUCLEAN
    return fields


_ESCAPE = re.compile(rb"\\x([0-9a-f]{2})")


def _unescape(text: bytes) -> str:
    return _ESCAPE.sub(lambda m: bytes((int(m[1], 16),)), text).decode("utf-8", "replace")


class Kmsg:
    """A reader of the kernel's log from now on; a context manager."""

    state: str

    def __init__(self) -> None:
        self._fd = -1
        self._next: int | None = None
        self._lost = 0
        self._broken: str | None = None
        KMSG.start(self)

    def open(self) -> None:
        """Open it at its end. Raises PermissionNeeded, FeatureMissing, OSError."""
        try:
            self._fd = os.open(_PATH, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except PermissionError as error:
            raise PermissionNeeded(
                _PATH,
                "reading the kernel's log needs CAP_SYSLOG here (kernel.dmesg_restrict)",
                "run as root or grant it",
            ) from error
        except FileNotFoundError as error:
            raise FeatureMissing(_PATH, "there is no kernel log here") from error
        os.lseek(self._fd, 0, os.SEEK_END)
        KMSG.advance(self, "open")

    def fileno(self) -> int:
        """Readable when there is a message of any kind."""
        return self._fd

    def read(self) -> list[KmsgRecord | KmsgLoss]:
        """Everything that is there now and concerns us, without waiting."""
        KMSG.advance(self, "read")
        found: list[KmsgRecord | KmsgLoss] = []
        # Its clock is the scheduler's: near that of CLOCK_MONOTONIC, and it does not count sleep.
        boot = time.time() - time.monotonic()
        while True:
            try:
                data = os.read(self._fd, _RECORD)
            except BlockingIOError:
                return found
            except BrokenPipeError:  # overwritten; the next record's number says how many
                continue
            except OSError as error:
                self._broken = f"cannot be read: {error.strerror}"
                return found
            try:
                seq, record = parse(data, boot)
            except ValueError as error:
                self._broken = str(error)
                continue
            if self._next is not None and seq > self._next:
                self._lost += seq - self._next
                found.append(KmsgLoss(seq - self._next, time.time()))
            self._next = seq + 1
            if record is not None:
                found.append(record)

    def status(self) -> SourceState:
        """Up, or degraded with the reason; losses are messages of any kind."""
        if self.state != "OPEN":
            return SourceState("kmsg", "down", "not open", self._lost)
        return SourceState("kmsg", "degraded" if self._broken else "up", self._broken, self._lost)

    def close(self) -> None:
        """Close it; idempotent."""
        if self.state == "CLOSED":
            return
        KMSG.advance(self, "close")
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "Kmsg":
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


KMSG: Lifetime[Kmsg] = Lifetime(
    "Kmsg",
    states=("NEW", "OPEN", "CLOSED"),
    transitions={"open": "NEW -> OPEN", "read": "OPEN -> OPEN", "close": "NEW, OPEN -> CLOSED"},
    invariants={"what is open has a descriptor": lambda k: k.state != "OPEN" or k._fd >= 0},
)
