"""Builds the bytes that the kernel writes into a fanotify descriptor, well-formed or not.

Each function of an information record returns its bytes; `event` puts them behind metadata.
Lengths are right unless one is given.
"""

import struct

FID, DFID_NAME, DFID, PIDFD, ERROR, RANGE, MNT = 1, 2, 3, 4, 5, 6, 7
OLD_DFID_NAME, NEW_DFID_NAME = 10, 12

FSID = bytes.fromhex("0102030405060708")


def key(ino: int, generation: int = 1, kind: int = 1) -> bytes:
    """An ext4-like key: a handle type and its bytes."""
    return struct.pack("=iII", kind, ino, generation)


def info(kind: int, body: bytes, length: int | None = None) -> bytes:
    """Any information record; the body is padded to a multiple of four."""
    body += bytes(-len(body) % 4)
    return struct.pack("=BBH", kind, 0, len(body) + 4 if length is None else length) + body


def fid(
    kind: int,
    key: bytes,
    name: bytes | None = None,
    fsid: bytes = FSID,
    handle_bytes: int | None = None,
) -> bytes:
    """FID, DFID, and with a name DFID_NAME, OLD_DFID_NAME, NEW_DFID_NAME."""
    size = len(key) - 4 if handle_bytes is None else handle_bytes
    text = b"" if name is None else name + b"\0"
    return info(kind, fsid + struct.pack("=I", size) + key + text)


def pidfd(fd: int) -> bytes:
    return info(PIDFD, struct.pack("=i", fd))


def error(code: int, errors: int = 1) -> bytes:
    return info(ERROR, struct.pack("=iI", code, errors))


def range_(offset: int, length: int) -> bytes:
    return info(RANGE, struct.pack("=IQQ", 0, offset, length))


def mount(unique_id: int) -> bytes:
    return info(MNT, struct.pack("=IQ", 0, unique_id))


def event(
    mask: int,
    *infos: bytes,
    pid: int = 1,
    fd: int = -1,
    length: int | None = None,
    version: int = 3,
    header: int = 24,
) -> bytes:
    """One event; `header` is metadata_len, `length` is event_len."""
    body = bytes(header - 24 if 24 <= header <= 64 else 0) + b"".join(infos)
    size = 24 + len(body) if length is None else length
    return struct.pack("=IBBHQii", size, version, 0, header, mask, fd, pid) + body
