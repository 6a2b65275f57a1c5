"""The log's grammar: messages as Linux 6.18 wrote them, and what is near them."""

import errno

import pytest

from fanwise.sources.kmsg import parse, recognise


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        (
            "EXT4-fs error (device loop3): ext4_lookup:1787: inode #12: comm stat: deleted inode"
            " referenced: 14",
            {
                "source": "ext4", "what": "error", "device": "loop3", "function": "ext4_lookup",
                "line": 1787, "ino": 12, "comm": "stat",
            },
        ),
        (
            "EXT4-fs error (device dm-0): ext4_validate_block_bitmap:441: comm a b: bg 3: bad"
            " block bitmap checksum",
            {"device": "dm-0", "comm": "a b", "group": 3, "ino": None, "what": "error"},
        ),
        (
            "EXT4-fs error (device sda1) in ext4_reserve_inode_write:5776: IO failure",
            {"function": "ext4_reserve_inode_write", "line": 5776, "what": "error"},
        ),
        (
            "EXT4-fs error (device loop0): htree_dirblock_to_tree:1083: inode #2: block 33: comm"
            " ls: bad entry in directory",
            {"ino": 2, "comm": "ls", "what": "error"},
        ),
        (
            "EXT4-fs warning (device loop1): ext4_end_bio:343: I/O error 10 writing to inode 12"
            " starting block 8193)",
            {"what": "writeback", "ino": 12},
        ),
        (
            "EXT4-fs (loop2): failed to convert unwritten extents to written extents -- potential"
            " data loss!  (inode 13, error -28)",
            {"what": "writeback", "ino": 13, "errno": errno.ENOSPC},
        ),
        ("EXT4-fs (loop2): Remounting filesystem read-only", {"what": "state"}),
        ("EXT4-fs (loop2): mounted filesystem 0-1 r/w", {"what": "note", "device": "loop2"}),
        ("Aborting journal on device loop3-8.", {"what": "state", "device": "loop3"}),
        (
            "JBD2: I/O error when updating journal superblock for loop3-8.",
            {"what": "io", "device": "loop3", "source": "ext4"},
        ),
        (
            "XFS (loop4): Metadata CRC error detected at xfs_dir3_data_read_verify+0x81/0x100,"
            " xfs_dir3_data block 0x60 ",
            {
                "source": "xfs", "what": "buffer", "start": 0x60 * 512, "errno": errno.EBADMSG,
                "symbol": "xfs_dir3_data_read_verify+0x81/0x100",
            },
        ),
        (
            "XFS (loop4): Metadata corruption detected at xfs_dinode_verify+0x1b/0x6f0, inode 0x83"
            " dinode",
            {"ino": 0x83, "errno": errno.EUCLEAN, "what": "buffer"},
        ),
        (
            'XFS (loop4): metadata I/O error in "xfs_da_read_buf+0xa6/0x1a0" at daddr 0x60 len 8'
            " error 74",
            {"start": 0x60 * 512, "length": 4096, "errno": errno.EBADMSG, "what": "buffer"},
        ),
        (
            "XFS (loop4): Corruption of in-memory data (0x8) detected at"
            " xfs_defer_finish_noroll+0x3b/0x6a0 (fs/xfs/libxfs/xfs_defer.c:588).  Shutting down"
            " filesystem.",
            {"what": "shutdown", "line": 588, "symbol": "xfs_defer_finish_noroll+0x3b/0x6a0"},
        ),
        ("XFS (loop4): log I/O error -5", {"what": "error", "errno": errno.EIO}),
        ("XFS (loop4): User initiated shutdown received.", {"what": "shutdown"}),
        ("XFS (loop4): Mounting V5 Filesystem 0-1", {"what": "note"}),
        (
            "XFS (loop4): Internal error ltrec > x at line 545 of file fs/xfs/libxfs/xfs_alloc.c. "
            " Caller xfs_free_ag_extent+0x7a/0x8b0",
            {"what": "error", "line": 545, "symbol": "xfs_free_ag_extent+0x7a/0x8b0"},
        ),
        (
            "BTRFS warning (device loop5): csum failed root 5 ino 257 off 4096 csum 0x1 expected"
            " csum 0x2 mirror 1",
            {"what": "error", "ino": 257, "root": 5, "errno": errno.EBADMSG},
        ),
        (
            "BTRFS: error (device loop5 state A) in btrfs_commit_transaction:2532: errno=-5 IO"
            " failure (Error while writing out transaction)",
            {"device": "loop5", "errno": 5, "function": "btrfs_commit_transaction", "line": 2532},
        ),
        (
            "BTRFS error (device loop5): bdev /dev/loop5 errs: wr 1, rd 0, flush 0, corrupt 0,"
            " gen 0",
            {"what": "io"},
        ),
        ("BTRFS info (device loop5 state EA): forced readonly", {"what": "state"}),
        (
            "I/O error, dev loop3, sector 264 op 0x0:(READ) flags 0x80700 phys_seg 1 prio class 0",
            {"source": "block", "device": "loop3", "start": 264 * 512, "errno": errno.EIO},
        ),
        (
            "critical medium error, dev sda, sector 8 op 0x0:(READ) flags 0x0",
            {"errno": errno.ENODATA, "device": "sda"},
        ),
        (
            "Buffer I/O error on dev loop3, logical block 1, lost async page write",
            {"what": "io", "device": "loop3"},
        ),
        (
            "Buffer I/O error on device loop3, logical block 8513",
            {"what": "io", "device": "loop3"},
        ),
        (
            "XFS (loop1): First 128 bytes of corrupted metadata buffer:",
            {"what": "note", "device": "loop1"},
        ),
        # After fs/fserror.c of Linux 7.0, not run here.
        ("XFS (sda): lost filesystem error report", {"source": "xfs", "device": "sda"}),
    ],
)  # fmt: skip
def test_messages(text, fields):
    record = recognise(text)
    assert {name: getattr(record, name) for name in fields} == fields
    assert record.text == text


@pytest.mark.parametrize(
    "text",
    ["", "loop3: detected capacity change", "EXT4-fs", "usb 1-1: new device", "XFS", "\0" * 10],
)
def test_messages_about_something_else(text):
    assert recognise(text) is None


def test_a_record():
    data = b"3,1234,5000000,-;EXT4-fs (loop\\x33): a \xff\n SUBSYSTEM=block\n DEVICE=b7:3\n"
    seq, record = parse(data, 100.0)
    assert (seq, record.time, record.level, record.device) == (1234, 105.0, 3, "loop3")
    assert record.text == "EXT4-fs (loop3): a \ufffd"


@pytest.mark.parametrize("data", [b"", b"x", b"3,1;a", b"3,x,1,-;a", b"3,1,2,-"])
def test_what_is_no_record(data):
    with pytest.raises(ValueError, match=r"kmsg|int"):
        parse(data)
