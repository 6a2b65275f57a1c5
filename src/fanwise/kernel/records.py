"""The records that reading a fanotify descriptor yields, decoded with every length checked.

A buffer is a row of events. An event is 24 bytes of metadata (event_len, version, metadata_len,
mask, fd, pid) and then information records, each with a 4-byte header (type, padding, length).

Linux reference: include/uapi/linux/fanotify.h; fanotify(7).
"""

import struct
from typing import NamedTuple, TypeAlias

from fanwise._errors import DecodeError

VERSION = 3  # FANOTIFY_METADATA_VERSION

# FAN_EVENT_INFO_TYPE_*; 11 and 13 are reserved for the two DFIDs of a rename without names.
FID = 1
DFID_NAME = 2
DFID = 3
PIDFD = 4
ERROR = 5
RANGE = 6
MNT = 7
OLD_DFID_NAME = 10
NEW_DFID_NAME = 12

_FIDS = frozenset((FID, DFID_NAME, DFID, OLD_DFID_NAME, NEW_DFID_NAME))
_NAMED = frozenset((DFID_NAME, OLD_DFID_NAME, NEW_DFID_NAME))

# Native byte order without padding: what the kernel of this machine writes.
_METADATA = struct.Struct("=IBBHQii")
_HEADER = struct.Struct("=BBH")
_HANDLE_BYTES = struct.Struct("=I")
_PIDFD = struct.Struct("=i")
_ERROR = struct.Struct("=iI")
_RANGE = struct.Struct("=4xQQ")
_U64 = struct.Struct("=Q")

# From the start of an information record about a file: header 4, fsid 8, handle_bytes 4, then the
# handle's type 4 and its bytes, which together are the key.
_FSID = 4
_LENGTH = 12
_KEY = 16
_HANDLE = 20

_MAX_HANDLE = 128  # MAX_HANDLE_SZ
_ALIGN = 4  # FANOTIFY_EVENT_ALIGN: lengths of events and records are multiples of it


class Fid(NamedTuple):
    """An object named by its file handle: a directory, a target, or a directory and a name in it.

    ``type`` is FID, DFID, DFID_NAME, OLD_DFID_NAME or NEW_DFID_NAME. ``fsid`` is 8 bytes and no
    identity (clones share it). ``key`` is the handle's type (4 bytes) and its bytes, as
    `fanwise.kernel.handles` has them. ``name`` is None for FID and DFID.
    """

    type: int
    fsid: bytes
    key: bytes
    name: bytes | None


class Pidfd(NamedTuple):
    """A descriptor of the process that caused the event; the reader owns it and must close it.

    Negative: -1 (FAN_NOPIDFD) when the process is gone, -2 (FAN_EPIDFD) when none could be made.
    """

    fd: int


class FsError(NamedTuple):
    """A filesystem error: the first ``errno`` since the last read, and how many errors since."""

    errno: int
    errors: int


class Range(NamedTuple):
    """The part of a file that is about to be accessed, in bytes."""

    offset: int
    length: int


class MountId(NamedTuple):
    """The unique id (never reused) of the mount that was attached or detached."""

    unique_id: int


Info: TypeAlias = Fid | Pidfd | FsError | Range | MountId


class Record(NamedTuple):
    """One fanotify event.

    ``mask`` holds FAN_* event bits. ``pid`` is 0 when the reader may not know it. ``fd`` is the
    event's descriptor, owned by the reader, or negative when there is none (-1, or -errno in a
    group with FAN_REPORT_FD_ERROR). ``infos`` are in the kernel's order.
    """

    mask: int
    pid: int
    fd: int
    infos: tuple[Info, ...]


def decode(buffer: bytes | bytearray | memoryview, offset: int = 0) -> list[Record]:
    """Decode every event of ``buffer`` from ``offset`` on, in order.

    Information records of an unknown type are skipped. Everything returned is a copy. Raises
    DecodeError, with the position in ``buffer``, when a length, the version or the end of the
    buffer does not fit: the kernel never writes part of an event, so a cut one is an error too.
    Descriptors of the events that precede the malformed one are then not closed.
    """
    data = buffer if type(buffer) is bytes else bytes(buffer)
    end = len(data)
    if not 0 <= offset <= end:
        raise DecodeError(offset, f"not inside a buffer of {end} bytes")
    records = []
    while offset < end:
        if end - offset < _METADATA.size:
            raise DecodeError(offset, f"{end - offset} bytes left, an event has {_METADATA.size}")
        length, version, _, header, mask, fd, pid = _METADATA.unpack_from(data, offset)
        if version != VERSION:
            raise DecodeError(offset, f"metadata version {version}, not {VERSION}")
        if length > end - offset or length % _ALIGN:
            raise DecodeError(offset, f"event length {length} with {end - offset} bytes left")
        if not _METADATA.size <= header <= length or header % _ALIGN:
            raise DecodeError(offset, f"metadata length {header} in an event of {length}")
        records.append(Record(mask, pid, fd, _infos(data, offset + header, offset + length)))
        offset += length
    return records


def _infos(data: bytes, at: int, end: int) -> tuple[Info, ...]:
    infos: list[Info] = []
    while at < end:  # both are multiples of 4 from the event's start, so a header always fits
        kind, _, length = _HEADER.unpack_from(data, at)
        if not _HEADER.size <= length <= end - at or length % _ALIGN:
            raise DecodeError(at, f"information length {length} with {end - at} bytes left")
        if kind in _FIDS:
            infos.append(_fid(data, at, length, kind))
        elif kind == PIDFD:
            _need(at, length, 4 + _PIDFD.size)
            infos.append(Pidfd(*_PIDFD.unpack_from(data, at + 4)))
        elif kind == ERROR:
            _need(at, length, 4 + _ERROR.size)
            infos.append(FsError(*_ERROR.unpack_from(data, at + 4)))
        elif kind == RANGE:
            _need(at, length, 4 + _RANGE.size)
            infos.append(Range(*_RANGE.unpack_from(data, at + 4)))
        elif kind == MNT:
            # The id ends the record; where it starts depends on the machine's alignment of 64 bits.
            _need(at, length, 4 + _U64.size)
            infos.append(MountId(*_U64.unpack_from(data, at + length - _U64.size)))
        at += length
    return tuple(infos)


def _fid(data: bytes, at: int, length: int, kind: int) -> Fid:
    _need(at, length, _HANDLE)
    (size,) = _HANDLE_BYTES.unpack_from(data, at + _LENGTH)
    if size > length - _HANDLE or size > _MAX_HANDLE:
        raise DecodeError(at + _LENGTH, f"handle of {size} bytes in a record of {length}")
    handle_end = at + _HANDLE + size
    name = None
    if kind in _NAMED:
        # Ends at its NUL; behind that is padding. Without a NUL it ends where the record does.
        nul = data.find(b"\0", handle_end, at + length)
        name = data[handle_end : at + length if nul < 0 else nul]
    return Fid(kind, data[at + _FSID : at + _LENGTH], data[at + _KEY : handle_end], name)


def _need(at: int, length: int, least: int) -> None:
    if length < least:
        raise DecodeError(at, f"information record of {length} bytes, needs {least}")
