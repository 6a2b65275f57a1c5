"""Counters in a sysfs that a test writes, so that it can be garbage."""

import errno

import pytest

from fanwise.kernel.mounts import Mount
from fanwise.sources import counters
from fanwise.sources.counters import Layer, Place, advance, place_of, read

EXT4 = {
    "errors_count": "3",
    "warning_count": "1",
    "msg_count": "5",
    "first_error_time": "1795000000",
    "first_error_func": "ext4_lookup",
    "first_error_line": "1787",
    "first_error_ino": "14",
    "first_error_block": "0",
    "first_error_errcode": "5",
    "last_error_time": "1795000001",
    "last_error_func": "__ext4_remount",
    "last_error_line": "6600",
    "last_error_ino": "0",
    "last_error_block": "8",
    "last_error_errcode": "16",
}


def mount(dev, fstype, source=b"none"):
    return Mount(1, 0, dev, b"/", b"/mnt", (), (), fstype, source, ())


def write(directory, files):
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text + "\n")


@pytest.fixture
def sys(tmp_path):
    """loop7 with a file, sda with sda1, and dm-0 on both."""
    devices = tmp_path / "devices"
    write(devices / "loop7", {"dev": "7:7", "stat": " 10 0 80 1 20 0 160 2 0 3 3 0 0 0 0 0 0"})
    write(devices / "loop7/loop", {"backing_file": "/images/a b.img"})
    write(devices / "sda", {"dev": "8:0", "stat": "1 2 3 4 5 6 7 8 9 10 11"})
    write(devices / "sda/device", {"ioerr_cnt": "0x1f"})
    write(devices / "sda/sda1", {"dev": "8:1", "partition": "1", "stat": "1 0 0 0 2 0"})
    write(devices / "dm-0", {"dev": "253:0", "stat": "garbage"})
    write(devices / "dm-0/dm", {"name": "vg-home"})
    slaves = devices / "dm-0/slaves"
    slaves.mkdir()
    (slaves / "sda1").symlink_to(devices / "sda/sda1")
    (slaves / "loop7").symlink_to(devices / "loop7")
    block = tmp_path / "dev/block"
    block.mkdir(parents=True)
    for dev, name in (("7:7", "loop7"), ("8:0", "sda"), ("8:1", "sda/sda1"), ("253:0", "dm-0")):
        (block / dev).symlink_to(devices / name)
    for name in ("loop7", "dm-0"):
        write(tmp_path / "fs/ext4" / name, EXT4)
    return tmp_path


def test_the_place_of_an_ext4_on_a_stack(sys):
    place = place_of(mount((253, 0), "ext4"), sys)
    assert place.directory == str(sys / "fs/ext4/dm-0")
    assert place.layers == (
        Layer("dm-0", "253:0", "dm", "vg-home"),
        Layer("loop7", "7:7", "loop", "/images/a b.img"),
        Layer("sda1", "8:1", "partition", "sda"),
        Layer("sda", "8:0", "disk"),
    )


def test_no_place(sys):
    assert place_of(mount((99, 9), "ext4"), sys) == Place(fstype="ext4", directory=None, layers=())
    assert place_of(mount((0, 40), "btrfs"), sys).directory is None
    assert read(place_of(mount((99, 9), "ext4"), sys), sys).ext4 is None


def test_counters_of_ext4(sys):
    reading = read(place_of(mount((7, 7), "ext4"), sys), sys)
    assert reading.garbage == ()
    assert (reading.ext4.errors, reading.ext4.warnings, reading.ext4.messages) == (3, 1, 5)
    first, last = reading.ext4.first, reading.ext4.last
    assert (first.function, first.line, first.ino) == ("ext4_lookup", 1787, 14)
    assert first.errno == errno.EUCLEAN
    assert (last.errno, last.block) == (errno.ESHUTDOWN, 8)
    assert reading.block == {"loop7": counters.BlockDevice(10, 20, None)}


def test_scsi_counts_in_hexadecimal(sys):
    reading = read(place_of(mount((8, 1), "ext4"), sys), sys)
    assert reading.block["sda"].io_errors == 31
    assert reading.block["sda1"] == counters.BlockDevice(1, 2, None)


@pytest.mark.parametrize("name", sorted(EXT4))
@pytest.mark.parametrize("text", ["", "-1", "9" * 30, "\0\0", "\xff", "1\n2", "x" * 9999, "0x10"])
def test_garbage_is_told_and_stops_nothing(sys, name, text):
    (sys / "fs/ext4/loop7" / name).write_bytes(text.encode("latin-1"))
    place = place_of(mount((7, 7), "ext4"), sys)
    reading = read(place, sys)
    garbage = [g.path for g in reading.garbage]
    allowed = name.endswith("func") and text in ("", "-1", "9" * 30, "0x10")
    if not allowed or text == "-1":
        assert garbage == [str(sys / "fs/ext4/loop7" / name)]
        assert repr(text[:1])[1:-1] in reading.garbage[0].why or not text or text == "\xff"
    assert reading.ext4.errors == (None if name == "errors_count" else 3)
    assert reading.block["loop7"].reads == 10


def test_a_directory_that_is_a_file_and_a_file_that_is_a_directory(sys):
    path = sys / "fs/ext4/loop7/errors_count"
    path.unlink()
    path.mkdir()
    reading = read(place_of(mount((7, 7), "ext4"), sys), sys)
    assert [g.path for g in reading.garbage] == [str(path)]


def test_an_older_kernel_has_fewer_files(sys):
    for name in ("msg_count", "warning_count", "first_error_errcode"):
        (sys / "fs/ext4/loop7" / name).unlink()
    reading = read(place_of(mount((7, 7), "ext4"), sys), sys)
    assert reading.garbage == ()
    assert (reading.ext4.messages, reading.ext4.first.errno) == (None, 0)


def test_no_errors_yet(sys):
    write(sys / "fs/ext4/loop7", {"errors_count": "0", "first_error_time": "0"})
    assert read(place_of(mount((7, 7), "ext4"), sys), sys).ext4.first is None


def test_btrfs_is_found_by_its_device(sys):
    at = sys / "fs/btrfs/0a-1b-2c"
    text = "write_errs 15\nread_errs 1\nflush_errs 0\ncorruption_errs 4\ngeneration_errs 0"
    write(at / "devinfo/1", {"error_stats": text})
    write(at / "devinfo/2", {"error_stats": "invalid"})
    write(at / "devinfo/3", {"error_stats": "write_errs -3\nread_errs 2"})
    (at / "devices").mkdir()
    (at / "devices/loop7").symlink_to(sys / "devices/loop7")
    place = counters._btrfs_place(sys, "loop7")
    assert (place.uuid, place.layers[0].name) == ("0a-1b-2c", "loop7")
    reading = read(place, sys)
    assert reading.btrfs[0] == counters.BtrfsDevice(1, 15, 1, 0, 4, 0)
    assert reading.btrfs[1] == counters.BtrfsDevice(2, None, None, None, None, None)
    assert (reading.btrfs[2].write, reading.btrfs[2].read) == (None, 2)
    assert len(reading.garbage) == 1


@pytest.mark.parametrize(
    ("before", "now", "step"),
    [
        (None, 5, (0, False)),
        (5, None, (0, False)),
        (5, 5, (0, False)),
        (5, 8, (3, False)),
        (5, 0, (0, True)),
        (5, 2, (2, True)),
    ],
)
def test_a_counter_moves(before, now, step):
    assert advance(before, now) == step
