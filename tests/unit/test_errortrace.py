"""Lines of a trace, as Linux 6.18 printed them, whole and cut short."""

import errno
import time

import pytest

from fanwise.health import _intake
from fanwise.sources import errortrace
from fanwise.sources.errortrace import ErrorTrace, TracedError, TracedLoss, parse_line

HEAD = "          <...>-31168   [001] .....  1234.500000: "
LINES = {
    "ext4_error": "dev 7,1 function ext4_lookup line 1787",
    "ext4_shutdown": "dev 7,1 flags 2",
    "xfs_force_shutdown": "dev 7:1 tag none|logerror flags log_io|force_umount"
    " file fs/xfs/xfs_fsops.c line_num 475",
    "xfs_fs_mark_sick": "dev 7:1 flags 0x2",
    "xfs_group_mark_sick": "dev 7:1 agno 0x3 flags 0x40",
    "xfs_inode_mark_sick": "dev 7:1 ino 0x83 flags 0x10",
    "xfs_buf_ioerror": "dev 7:1 daddr 0x78 bbcount 0x8 hold 1 pincount 0 lock 0 error -74"
    " flags READ caller xfs_dir3_data_read_verify+0x71/0x100",
    "filemap_set_wb_err": "dev=7:1 ino=0xc errseq=0x0",
    "file_check_and_advance_wb_err": "file=00000000deadbeef dev=7:1 ino=0xc old=0x0 new=0x1005",
    "block_rq_error": "7,1 WS () 17026 + 8 be,0,4 [-5]",
}


def line(event):
    return parse_line(f"{HEAD}{event}: {LINES[event]}", 1000.0)


@pytest.mark.parametrize(
    ("event", "fields"),
    [
        ("ext4_error", {"function": "ext4_lookup", "line": 1787, "pid": 31168}),
        ("ext4_shutdown", {"detail": "flags 2"}),
        ("xfs_force_shutdown", {"function": "fs/xfs/xfs_fsops.c", "line": 475}),
        ("xfs_fs_mark_sick", {"detail": "flags 0x2"}),
        ("xfs_group_mark_sick", {"group": 3}),
        ("xfs_inode_mark_sick", {"ino": 0x83}),
        (
            "xfs_buf_ioerror",
            {"start": 0x78 * 512, "length": 4096, "errno": errno.EBADMSG},
        ),
        ("filemap_set_wb_err", {"ino": 12, "errno": 0, "seen": False}),
        ("file_check_and_advance_wb_err", {"ino": 12, "errno": errno.EIO, "seen": True}),
        ("block_rq_error", {"start": 17026 * 512, "length": 4096, "errno": errno.EIO}),
    ],
)
def test_events(event, fields):
    record = line(event)
    assert {name: getattr(record, name) for name in fields} == fields
    assert (record.event, record.time, record.dev) == (event, 2234.5, (7, 1))


@pytest.mark.parametrize("event", sorted(LINES))
def test_a_line_cut_short_makes_no_sense_and_nothing_else(event):
    whole = f"{HEAD}{event}: {LINES[event]}"
    for size in range(len(whole)):
        try:
            record = parse_line(whole[:size])
        except ValueError:
            continue
        # A number may lose digits; what it is about stays.
        assert isinstance(record, TracedError)
        assert record.dev == (7, 1)


def test_a_loss_and_stacks():
    assert parse_line("CPU:1 [LOST 19584 EVENTS]", 5.0) == TracedLoss(19584, 5.0)
    assert parse_line(" => xfs_da_read_buf") == "xfs_da_read_buf"
    assert parse_line(HEAD + "<stack trace>") is None


def test_no_address_of_the_kernel_is_kept():
    record = line("file_check_and_advance_wb_err")
    assert "deadbeef" not in str(record)


def test_metadata_of_a_device():
    record = parse_line(f"{HEAD}filemap_set_wb_err: dev=0:3 ino=0x700002 errseq=0x0")
    seen = _intake.from_trace(record)
    assert (seen.dev, seen.scope, seen.operation) == ((7, 2), "device", "metadata write-back")
    # On btrfs, whose superblocks have such numbers too, it is an inode.
    seen = _intake.from_trace(record, lambda dev: "btrfs")
    assert (seen.dev, seen.ino) == ((0, 3), 0x700002)


def test_what_every_buffer_says_after_a_shutdown():
    text = LINES["xfs_buf_ioerror"].replace("xfs_dir3_data_read_verify", "xfs_buf_ioend_fail")
    seen = _intake.from_trace(parse_line(f"{HEAD}xfs_buf_ioerror: {text}"))
    assert (seen.what, seen.state) == ("shutdown", "shutdown")


def test_a_backlog_is_put_together_once(tmp_path, monkeypatch):
    """The pipe gives a page at a time; joined one by one these are 100 GiB of copies."""
    pages = 8192
    backlog = tmp_path / "pipe"
    backlog.write_bytes((b"x" * 4095 + b"\n") * pages)
    trace = ErrorTrace()
    monkeypatch.setattr(errortrace, "_READ", 4096)
    monkeypatch.setattr(errortrace, "_MOST_READS", pages)
    with open(backlog, "rb") as file:
        trace._fds = [file.fileno()]
        began = time.process_time()
        assert len(trace._lines()) == pages
        assert time.process_time() - began < 2
        trace._fds = []
