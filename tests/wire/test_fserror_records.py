"""What FS_ERROR groups yield, byte by byte: Linux 6.18 as read, Linux 7.0 as its source says."""

import struct

import pytest

from fanwise._errors import DecodeError
from fanwise.kernel.fanotify import FAN_FS_ERROR, FAN_Q_OVERFLOW
from fanwise.sources.fserror import Process, generation_of, reports
from tests.wire import build

NOBODY = 2**22 + 1  # above the largest pid that Linux gives


def one(data, **expected):
    (report,) = reports(data, lambda: 12.5)
    got = {name: getattr(report, name) for name in expected}
    assert got == expected
    return report


# Read on Linux 6.18, ext4: trigger_fs_error; three looks at an inode with a bad extent header.
WHOLE = bytes.fromhex(
    "38000000 03 00 1800 0080000000000000 ffffffff ee6f0000"
    "01 00 1400 d8a64c435ca9f3be 00000000 ff000000"
    "05 00 0c00 75000000 01000000"
)
INODE = bytes.fromhex(
    "40000000 03 00 1800 0080000000000000 ffffffff ee6f0000"
    "01 00 1c00 d8a64c435ca9f3be 08000000 01000000 0c000000 64a975b4"
    "05 00 0c00 75000000 03000000"
)
FSID = bytes.fromhex("d8a64c435ca9f3be")


def test_an_error_without_an_object():
    one(WHOLE, errno=117, count=1, key=None, ino=None, generation=None, fsid=FSID, time=12.5)


def test_an_error_on_an_inode():
    report = one(INODE, errno=117, count=3, ino=12, generation=0xB475A964)
    assert report.key == INODE[40:52]
    assert report.dev is None


def test_an_inode_that_could_not_be_read_has_generation_0():
    data = build.event(FAN_FS_ERROR, build.fid(build.FID, build.key(41, 0)), build.error(5))
    one(data, errno=5, ino=41, generation=0)


def test_the_process_that_is_gone_is_a_pid():
    data = build.event(FAN_FS_ERROR, build.fid(build.FID, build.key(1)), build.error(5), pid=NOBODY)
    assert one(data).process == Process(NOBODY, None)


def test_the_process_that_is_there_has_a_name():
    data = build.event(FAN_FS_ERROR, build.fid(build.FID, build.key(1)), build.error(5), pid=1)
    process = one(data).process
    assert process.pid == 1
    assert process.comm


# After fs/fserror.c and fs/notify/fanotify of Linux 7.0, which was not run here: a worker raises
# the event (kthreadd, pid 2, is a kernel thread here too), xfs names the inode by its handle of
# type 0x81, and one burst comes in several events.
def test_a_report_by_a_worker_names_no_process():
    key = struct.pack("=iQI", 0x81, 131, 77)
    worker = [
        build.event(FAN_FS_ERROR, build.fid(build.FID, key), build.error(117, n), pid=2)
        for n in (2, 5)
    ]
    found = reports(b"".join(worker))
    assert [(r.ino, r.generation, r.count, r.process) for r in found] == [
        (131, 77, 2, None),
        (131, 77, 5, None),
    ]


def test_a_report_of_another_pid_namespace_names_no_process():
    data = build.event(FAN_FS_ERROR, build.fid(build.FID, build.key(1)), build.error(5), pid=0)
    assert one(data).process is None


def test_a_handle_with_its_parent():
    # Connectable handles (6.13): FILEID_INO32_GEN_PARENT.
    assert generation_of(struct.pack("=iIIII", 2, 12, 7, 2, 0)) == 7
    assert generation_of(struct.pack("=iQIQI", 0x82, 12, 7, 2, 0)) == 7


def test_an_unknown_handle_is_kept_and_says_nothing():
    key = struct.pack("=i", 0x70) + bytes(12)
    report = one(build.event(FAN_FS_ERROR, build.fid(build.FID, key), build.error(5)), ino=None)
    assert report.key == key


def test_information_of_a_later_kernel_in_any_order():
    data = build.event(
        FAN_FS_ERROR,
        build.info(99, b"what"),
        build.error(-5, 0),
        build.pidfd(-1),
        build.fid(build.FID, build.key(12)),
    )
    one(data, errno=5, count=1, ino=12)


def test_an_overflow_and_events_that_are_none():
    data = build.event(FAN_Q_OVERFLOW) + build.event(0x100) + build.event(FAN_FS_ERROR) + WHOLE
    found = reports(data)
    assert found[0] is None
    assert [r.errno for r in found[1:]] == [117]


@pytest.mark.parametrize("size", range(1, len(INODE)))
def test_cut_short(size):
    with pytest.raises(DecodeError):
        reports(INODE[:size])
