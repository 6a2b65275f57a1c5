import struct

import pytest

from fanwise._errors import DecodeError
from fanwise.kernel import records
from fanwise.kernel.records import Fid, FsError, MountId, Pidfd, Range, Record

# Written by Linux 6.18 on x86-64, as read from the descriptor.
MOUNT_ATTACHED = bytes.fromhex(
    "28000000 03 00 1800 0000000100000000 ffffffff 71130000"
    "07 00 1000 00000000 3900008000000000"
)  # fmt: skip


def event(body=b"", length=None, version=3, header=24, mask=0x100, fd=-1, pid=7):
    size = 24 + len(body) if length is None else length
    return struct.pack("=IBBHQii", size, version, 0, header, mask, fd, pid) + body


def info(kind, body, length=None):
    return struct.pack("=BBH", kind, 0, 4 + len(body) if length is None else length) + body


FSID = b"fsidfsid"
KEY = bytes.fromhex("01000000 0c000000 94e6f763")
HANDLE = struct.pack("=I", 8) + KEY


def refused(data, offset=0):
    with pytest.raises(DecodeError) as caught:
        records.decode(data, offset)
    return caught.value


def test_a_mount_record_of_the_kernel():
    assert records.decode(MOUNT_ATTACHED) == [
        Record(0x100_0000, 0x1371, -1, (MountId(0x8000_0039),))
    ]


def test_a_mount_record_without_alignment_padding():
    # 32-bit machines that align 64 bits to 4.
    (record,) = records.decode(event(info(7, struct.pack("=Q", 5))))
    assert record.infos == (MountId(5),)


def test_nothing_is_no_event():
    assert records.decode(b"") == []
    assert records.decode(event(), 24) == []


def test_every_kind_of_information():
    body = (
        info(2, FSID + HANDLE + b"new\0")
        + info(1, FSID + HANDLE)
        + info(3, FSID + HANDLE)
        + info(10, FSID + HANDLE + b"a\0\0\0")
        + info(12, FSID + HANDLE + b"bcd\0\0\0\0\0")
        + info(4, struct.pack("=i", -2))
        + info(5, struct.pack("=iI", 117, 3))
        + info(6, struct.pack("=IQQ", 0, 4096, 8192))
        + info(7, struct.pack("=IQ", 0, 2**63))
    )
    assert records.decode(event(body, fd=9)) == [
        Record(
            0x100,
            7,
            9,
            (
                Fid(2, FSID, KEY, b"new"),
                Fid(1, FSID, KEY, None),
                Fid(3, FSID, KEY, None),
                Fid(10, FSID, KEY, b"a"),
                Fid(12, FSID, KEY, b"bcd"),
                Pidfd(-2),
                FsError(117, 3),
                Range(4096, 8192),
                MountId(2**63),
            ),
        )
    ]


def test_unknown_information_is_skipped():
    for kind in (0, 8, 9, 11, 13, 200):
        (record,) = records.decode(event(info(kind, b"????") + info(4, b"\1\0\0\0")))
        assert record.infos == (Pidfd(1),)


def test_longer_metadata_and_longer_information_of_a_later_kernel():
    data = event(b"newfield" + info(5, struct.pack("=iI", 5, 1) + b"more"), header=32)
    assert records.decode(data)[0].infos == (FsError(5, 1),)


def test_a_name_without_a_nul_ends_with_its_record():
    (record,) = records.decode(event(info(2, FSID + HANDLE + b"full") + info(4, bytes(4))))
    assert record.infos[0].name == b"full"


def test_an_empty_name_and_a_handle_without_bytes():
    (record,) = records.decode(event(info(2, FSID + struct.pack("=Ii", 0, 0))))
    assert record.infos == (Fid(2, FSID, bytes(4), b""),)


def test_an_error_event_without_an_object():
    (record,) = records.decode(event(info(5, bytes(8)) + info(1, FSID + struct.pack("=Ii", 0, -1))))
    assert record.infos[1].key == b"\xff\xff\xff\xff"


@pytest.mark.parametrize(
    ("data", "at", "says"),
    [
        (event()[:23], 0, "23 bytes left"),
        (event() + b"\0", 24, "1 bytes left"),
        (event(version=2), 0, "version 2"),
        (event(length=28), 0, "event length 28"),
        (event(length=2**32 - 4), 0, "event length"),
        (event(length=20), 0, "metadata length 24"),
        (event(length=0), 0, "metadata length 24"),
        (event(b"\0\0", length=26), 0, "event length 26"),
        (event(header=20), 0, "metadata length 20"),
        (event(header=28), 0, "metadata length 28"),
        (event(bytes(4), header=26), 0, "metadata length 26"),
        (event(info(8, b"", 0)), 24, "information length 0"),
        (event(info(8, b"", 3)), 24, "information length 3"),
        (event(info(8, bytes(4), 12)), 24, "information length 12"),
        (event(info(8, bytes(4), 6)), 24, "information length 6"),
        (event(info(1, FSID + bytes(4))), 24, "16 bytes, needs 20"),
        (event(info(2, FSID + struct.pack("=Ii", 1, 1))), 36, "handle of 1 bytes"),
        (event(info(2, FSID + struct.pack("=Ii", 2**32 - 1, 1) + b"abcd")), 36, "handle of"),
        (event(info(1, FSID + struct.pack("=Ii", 129, 1) + bytes(132))), 36, "handle of 129"),
        (event(info(4, b"")), 24, "4 bytes, needs 8"),
        (event(info(5, bytes(4))), 24, "8 bytes, needs 12"),
        (event(info(6, bytes(16))), 24, "20 bytes, needs 24"),
        (event(info(7, bytes(4))), 24, "8 bytes, needs 12"),
    ],
)
def test_malformed(data, at, says):
    error = refused(data)
    assert error.offset == at
    assert says in error.reason
    # The position counts from the buffer's start wherever decoding begins.
    assert refused(b"?" * 8 + data, 8).offset == at + 8


@pytest.mark.parametrize("offset", [-1, 25])
def test_an_offset_outside_of_the_buffer(offset):
    assert refused(event(), offset).offset == offset


def test_an_error_in_the_second_event_is_an_error():
    assert refused(event() + event(version=9)).offset == 24
