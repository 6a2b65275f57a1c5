"""What an operator is told: one incident, and what its errno and state mean."""

import errno
from types import MappingProxyType
from typing import Literal, NamedTuple

import msgspec

Scope = Literal["fs", "group", "inode", "block", "device"]
State = Literal[
    "ok", "warning", "read_only", "emergency_ro", "aborted", "shutdown", "hung", "unknown"
]
Status = Literal["open", "resolved", "merged"]

# From good to bad; what was seen last does not hide what was worse.
SEVERITY = MappingProxyType(
    {
        name: rank
        for rank, name in enumerate(
            ("ok", "unknown", "warning", "read_only", "emergency_ro", "aborted", "shutdown", "hung")
        )
    }
)


class Filesystem(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """The filesystem of an incident.

    ``device`` is MAJOR:MINOR of the superblock as mountinfo has it, ``name`` the block device's,
    ``stack`` what it stands on, from the top, as ``KIND NAME (DETAIL)``; ``devices`` are
    MAJOR:MINOR of these. ``mounts`` are its mount points. None and empty are what is not known.
    """

    device: str
    fstype: str | None = None
    uuid: str | None = None
    label: str | None = None
    name: str | None = None
    stack: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()


class Object(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What is broken, as far as it is known.

    ``start`` and ``length`` are bytes of the device. ``path_source`` says how ``path`` was found.
    ``paths`` are all names that were come across: hard links; or, when ``path`` is None, files of
    several subvolumes that have this number, one of which it is.
    """

    ino: int | None = None
    gen: int | None = None
    path: str | None = None
    path_source: str | None = None
    paths: tuple[str, ...] = ()
    group: int | None = None
    start: int | None = None
    length: int | None = None


class Location(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """The code that found it: ext4 gives function and line, others a symbol and an offset."""

    function: str | None = None
    line: int | None = None
    symbol: str | None = None
    kernel: str | None = None


class TrippedBy(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """The process that ran into it. It is not what did it."""

    pid: int
    comm: str | None = None


class Incident(msgspec.Struct, frozen=True, kw_only=True, tag="incident", tag_field="type"):
    """One thing that is wrong with a filesystem; the same ``id`` for as long as it is.

    ``revision`` grows with each change: of two records of one ``id`` the higher is right.
    ``count`` is how many errors since it was told last, ``total`` since it began, by
    ``count_source``, a channel (or two: errors, and failures to write a file's data); with
    ``at_least`` there may have been more. Times are seconds since the epoch. ``heard`` are the last
    programs that were told of a write-back error, by fsync or the like: each open file is told
    once. Who never asked cannot be known.
    ``errno`` is a name, None when no channel told one. ``text`` is the kernel's whole message.
    ``lost`` counts records of the filesystem known to be lost. ``merged_into`` is the incident that
    this one turned out to be a part of.
    """

    id: str
    revision: int = 0
    fs: Filesystem
    scope: Scope
    object: Object
    errno: str | None
    meaning: str
    count: int
    total: int
    count_source: str
    at_least: bool
    first_seen: float
    last_seen: float
    location: Location
    operation: str | None
    state: State
    process: TrippedBy | None
    heard: tuple[TrippedBy, ...]
    channels: tuple[str, ...]
    lost: int
    advice: str
    text: str | None = None
    status: Status = "open"
    resolved: str | None = None
    merged_into: str | None = None


class Meaning(NamedTuple):
    """An errno in a filesystem error: what it says and what to do."""

    meaning: str
    advice: str


# The kernel's names for its own use: EFSCORRUPTED is EUCLEAN, EFSBADCRC is EBADMSG.
MEANINGS = MappingProxyType(
    {
        errno.EBADMSG: Meaning(
            "a checksum does not match what is on disk",
            "suspect the medium or the memory: copy what matters read-only, look at SMART, then"
            " check the filesystem unmounted",
        ),
        errno.EUCLEAN: Meaning(
            "a structure on disk is not valid",
            "keep an image of the device, then check the filesystem unmounted",
        ),
        errno.EIO: Meaning(
            "the device refused",
            "look at the device, its cable and its path; data written after the last successful"
            " fsync may be gone",
        ),
        errno.ENOSPC: Meaning(
            "the device ran out of space below the filesystem",
            "extend the thin pool or free space under the sparse file, then check the filesystem;"
            " it is not a quota",
        ),
        errno.ESHUTDOWN: Meaning(
            "the filesystem was stopped, on purpose or by its policy",
            "unmount it, mount it again so that its log is replayed; then check it",
        ),
        errno.EROFS: Meaning(
            "the filesystem became read-only",
            "remounting does not clear it: unmount it and check it",
        ),
        errno.ENODATA: Meaning(
            "the medium has a defect there",
            "replace the device; restore what lay there from a copy",
        ),
        errno.EREMOTEIO: Meaning("the target of the device failed", "look at the device's target"),
        errno.ETIMEDOUT: Meaning(
            "the device did not answer in time",
            "look at the device, its cable and its path",
        ),
        errno.ENOLINK: Meaning("the path to the device is gone", "look at its cable and its path"),
        errno.ENODEV: Meaning("the device is gone", "attach it again; then check the filesystem"),
        errno.ENXIO: Meaning("the device is gone", "attach it again; then check the filesystem"),
        errno.ENOMEM: Meaning(
            "the kernel had no memory in a place that cannot wait",
            "give the machine memory; then check the filesystem",
        ),
    }
)
_UNKNOWN = Meaning("the kernel told no errno", "look at the kernel's log for this device")

# What a state needs goes before what the errno needs.
_STATE_ADVICE = MappingProxyType(
    {
        "emergency_ro": "errors=remount-ro took effect although it looks writable: remounting does"
        " not clear it; unmount it and check it",
        "aborted": "the journal is aborted: unmount it and check it",
        "shutdown": "it is shut down: unmount it, mount it again so that its log is replayed; then"
        " check it",
        "hung": "it does not answer: look at its device, and for processes in state D",
    }
)


_OF_A_STATE = (errno.ESHUTDOWN, errno.EROFS)


def meaning_of(code: int) -> str:
    """Say what an errno means in a filesystem error; 0 is none."""
    known = MEANINGS.get(code)
    return known.meaning if known else _UNKNOWN.meaning if not code else _named(code)


def advice_for(code: int, state: str) -> str:
    """Say what to do, in one line."""
    first = _STATE_ADVICE.get(state)
    known = MEANINGS.get(code, _UNKNOWN).advice
    if first is None:
        return known
    # That it was stopped, or cannot be written to, is what the state says.
    return first if code in _OF_A_STATE or code not in MEANINGS else f"{first}; {known}"


def name_of(code: int) -> str | None:
    """Name an errno; None for 0, its number for one without a name."""
    return errno.errorcode.get(code, str(code)) if code else None


def _named(code: int) -> str:
    return f"the kernel told {name_of(code)}"
