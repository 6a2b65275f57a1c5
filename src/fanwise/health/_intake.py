"""Records of the sources, each in its own form, become observations. Nothing is asked of a disk.

What write-back errors say: `filemap_set_wb_err` shows the value of before (the first error prints
0), so it has no errno here; the correlator takes it from the device's failed request, or from the
record of whoever was told. On an inode of the block devices' own filesystem, whose number is a
device's, it was metadata that did not reach that device.
"""

import errno
import re
from collections.abc import Callable

from fanwise.health._filesystems import readable
from fanwise.health._incident import Scope, State, TrippedBy
from fanwise.health._observe import Dev, Observation
from fanwise.kernel.mounts import Mount
from fanwise.sources.errortrace import TracedError
from fanwise.sources.fserror import FsErrorReport, Process
from fanwise.sources.kmsg import KmsgRecord

# ext4 shows these among the filesystem's options (Linux 6.15); the mount's stay as they were.
_OPTIONS: tuple[tuple[str, State], ...] = (
    ("shutdown", "shutdown"),
    ("abort", "aborted"),
    ("emergency_ro", "emergency_ro"),
)
# What the kernel calls while it records: no part of what found the error.
# With more than one listener on the machine the tracepoint's own loop over them is on the stack.
_NOT_FINDERS = (
    "trace_", "__traceiter_", "__ext4_error", "__ext4_std", "__ext4_grp", "xfs_do_force_shutdown",
)  # fmt: skip
_BTREE_INODE = 1  # BTRFS_BTREE_INODE_OBJECTID: every tree's blocks
_MARKS = ("xfs_inode_mark_sick", "xfs_group_mark_sick", "xfs_fs_mark_sick", "xfs_ag_mark_sick")


def from_fserror(report: FsErrorReport) -> Observation | None:
    """None when it is of no filesystem that is known."""
    if report.dev is None:
        return None
    process = report.process
    stopped = report.errno == errno.ESHUTDOWN
    return Observation(
        channel="fserror",
        what="error",
        dev=report.dev,
        time=report.time,
        scope="inode" if report.key is not None else "fs",
        errno=report.errno,
        count=report.count,
        ino=report.ino,
        gen=report.generation,
        state="shutdown" if stopped else None,
        process=_tripped(process),
    )


def from_trace(
    record: TracedError, fstype: Callable[[Dev], str | None] = lambda dev: None
) -> Observation:
    """``fstype`` gives the type of the mounted filesystem with this device number, or None."""
    match record.event:
        case "ext4_error":
            return _traced(record, "error", function=record.function, line=record.line)
        case "ext4_shutdown":
            return _traced(
                record, "shutdown", errno=errno.ESHUTDOWN, state="shutdown", text=record.detail
            )
        case "xfs_force_shutdown":
            return _traced(
                record,
                "shutdown",
                errno=errno.ESHUTDOWN,
                state="shutdown",
                function=record.function,
                line=record.line,
                text=record.detail,
            )
        case "xfs_buf_ioerror":
            # What is called for every buffer after a shutdown found nothing.
            if (record.symbol or "").startswith("xfs_buf_ioend_fail"):
                return _traced(record, "shutdown", errno=errno.ESHUTDOWN, state="shutdown")
            reads = "READ" in (record.detail or "")
            return _traced(
                record,
                "buffer",
                scope="block",
                errno=record.errno,
                start=record.start,
                length=record.length,
                symbol=record.symbol,
                operation="metadata read" if reads else "metadata write",
            )
        case "block_rq_error":
            return _traced(
                record,
                "io",
                scope="device",
                errno=record.errno,
                start=record.start,
                length=record.length,
                operation=_operation(record.detail or ""),
            )
        case "filemap_set_wb_err" | "file_check_and_advance_wb_err":
            return _written_back(record, fstype(record.dev))
    scope: Scope = "fs"
    if record.ino is not None:
        scope = "inode"
    elif record.group is not None:
        scope = "group"
    return _traced(
        record,
        "sick",
        scope=scope,
        ino=record.ino,
        group=record.group,
        symbol=_finder(record.stack),
        operation=f"metadata, sick {record.detail}",
    )


def from_kmsg(
    record: KmsgRecord, device: Callable[[str], Dev | None], filesystem: Callable[[Dev], Dev]
) -> Observation | None:
    """None for what is only a note, or of a device that is not there.

    ``device`` gives a block device's number by its name, ``filesystem`` that of the superblock on
    it (which is another one on btrfs).
    """
    if record.what in ("note", "lost") or not record.device:
        return None
    dev = device(record.device)
    if dev is None:
        return None
    if record.source != "block":
        dev = filesystem(dev)
    scope: Scope = "fs"
    what, state, code = record.what, None, record.errno
    if record.what == "io":
        scope = "device"
    elif record.ino is not None:
        scope = "inode"
    elif record.what == "buffer":
        scope = "block"
    elif record.group is not None and record.source != "ext4":
        scope = "group"
    if record.what == "shutdown":
        state, code = "shutdown", code or errno.ESHUTDOWN
    elif record.what == "state":
        state = "emergency_ro" if "read" in record.text else "aborted"
    elif record.what == "warning":
        state = "warning"
    if what == "error" and record.source != "ext4":
        what = "buffer"  # "error" is what ext4's counter counts
    return Observation(
        channel="kmsg",
        what=what,  # type: ignore[arg-type]  # note and lost are gone
        dev=dev,
        time=record.time,
        scope=scope,
        errno=code,
        ino=record.ino,
        start=record.start,
        length=record.length,
        function=record.function,
        line=record.line,
        symbol=record.symbol,
        operation=_asked(record.text) if record.what == "io" else None,
        state=state,  # type: ignore[arg-type]
        text=record.text,
    )


def state_of(mount: Mount) -> State:
    """What a mount's line says of its filesystem; "unknown" where it would not show it."""
    for option, state in _OPTIONS:
        if option in mount.super_options:
            return state
    # The superblock is read-only and the mount is not: nobody asked for that.
    if "ro" in mount.super_options and "rw" in mount.options:
        return "read_only"
    return "ok" if mount.fstype in ("ext2", "ext3", "ext4", "btrfs") else "unknown"


def _traced(record: TracedError, what: str, scope: Scope = "fs", **fields: object) -> Observation:
    return Observation(
        channel="trace",
        what=what,  # type: ignore[arg-type]
        dev=record.dev,
        time=record.time,
        scope=scope,
        process=_tripped(record.process),
        **fields,  # type: ignore[arg-type]
    )


# Whoever runs may call itself what it likes, and JSON carries no bytes that are not UTF-8.
def _tripped(process: Process | None) -> TrippedBy | None:
    if process is None:
        return None
    comm = None if process.comm is None else readable(process.comm)
    return TrippedBy(pid=process.pid, comm=comm)


def _written_back(record: TracedError, fstype: str | None) -> Observation:
    what = "told" if record.seen else "writeback"
    ino = record.ino or 0
    # dev_t as the kernel has it: 12 bits of major, 20 of minor.
    device = (ino >> 20, ino & 0xFFFFF)
    if record.dev[0] == 0 and device[0] and fstype is None:
        return Observation(
            channel="trace",
            what=what,  # type: ignore[arg-type]
            dev=device,
            time=record.time,
            scope="device",
            errno=record.errno,
            operation="metadata write-back",
            process=_tripped(record.process),
        )
    if fstype == "btrfs" and ino == _BTREE_INODE:
        return _traced(record, what, errno=record.errno, operation="metadata write-back")
    return _traced(
        record,
        what,
        scope="inode",
        ino=ino,
        errno=record.errno,
        operation=None if record.seen else "data write-back",
    )


# print_req_error: "I/O error, dev sda, sector 8 op 0x1:(WRITE) flags 0x800 ..."
def _asked(text: str) -> str | None:
    found = re.search(r" op 0x[0-9a-f]+:\(([A-Z_]+)\)", text)
    return None if found is None else f"block {found[1].lower()}"


# blk_fill_rwbs: R read, W write, D discard, F flush; behind that S sync, M metadata.
def _operation(rwbs: str) -> str:
    kind = "metadata" if "M" in rwbs else "block"
    for letter, name in (("D", "discard"), ("W", "write"), ("R", "read"), ("F", "flush")):
        if letter in rwbs:
            return f"{kind} {name}"
    return "block request"


# The function that found it: the first of the stack that is not part of recording it.
def _finder(stack: tuple[str, ...]) -> str | None:
    for symbol in stack:
        if not symbol.startswith(_NOT_FINDERS) and symbol not in _MARKS:
            return symbol
    return None
