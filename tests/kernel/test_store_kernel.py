"""Databases on real filesystems: full, read-only, and what they stand on."""

import os
import subprocess
from pathlib import Path

import pytest

from fanwise import NoRoom
from fanwise.kernel.stacking import lives_on
from fanwise.store.database import Store
from fanwise.store.schema import Migration, Schema
from tests.kernel.conftest import unmount

from .conftest import loop_device, run

SCHEMA = Schema("test", 0x66610003, [Migration("one", ("CREATE TABLE a (x BLOB)",))])


@pytest.fixture
def small(tmp_path, cannot_run):
    if os.geteuid():
        cannot_run("mounting a tmpfs needs root")
    point = tmp_path / "small"
    point.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "fanwise-test", str(point))
    try:
        yield point
    finally:
        run("umount", "-l", str(point))


def test_a_full_filesystem_is_told_and_what_was_there_stays(small):
    path = small / "x.db"
    with Store(path, SCHEMA, "write") as store:
        store.execute("INSERT INTO a VALUES ('first')")

        def fill():
            while True:
                store.execute("INSERT INTO a VALUES (?)", (b"x" * 3000,))

        with pytest.raises(NoRoom, match="full; make room"):
            fill()
        ((written,),) = store.execute("SELECT count(*) - 1 FROM a")
        assert written > 10
        assert store.execute("SELECT count(*) FROM a") == [(written + 1,)]
    # At its end too, and for the next who opens it.
    with Store(path, SCHEMA, "read") as store:
        assert store.execute("SELECT count(*) FROM a") == [(written + 1,)]


def test_no_room_for_a_new_one(small):
    (small / "filler").write_bytes(b"x" * (248 << 10))
    path = small / "x.db"
    with pytest.raises(NoRoom):
        Store(path, SCHEMA, "write").open()
    (small / "filler").unlink()
    with Store(path, SCHEMA, "write") as store:
        assert store.execute("SELECT count(*) FROM a") == [(0,)]


def test_a_read_only_filesystem(small):
    path = small / "x.db"
    with Store(path, SCHEMA, "write") as store:
        store.execute("INSERT INTO a VALUES (1)")
    run("mount", "-o", "remount,ro", str(small))
    with pytest.raises(NoRoom, match="Read-only"):
        Store(path, SCHEMA, "write").open()
    with pytest.raises(NoRoom, match="Read-only"):
        Store(small / "y.db", SCHEMA, "write").open()
    with Store(path, SCHEMA, "read") as store:
        assert store.execute("SELECT x FROM a") == [(1,)]


def test_what_a_database_stands_on(tmp_path, ext4):
    """A filesystem in an image on a filesystem in an image, and a database at the top."""
    outer = os.stat(ext4).st_dev
    image = ext4 / "inner.img"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    run("mkfs.ext4", "-q", "-F", str(image))
    point = tmp_path / "inner"
    point.mkdir()
    with loop_device(image) as device:
        run("mount", device, str(point))
        try:
            inner = os.stat(device).st_rdev
            with Store(point / "d" / "x.db", SCHEMA, "write") as store:
                for dev in (inner, outer, os.stat(tmp_path).st_dev):
                    assert store.depends_on(f"{os.major(dev)}:{os.minor(dev)}")
                assert not store.depends_on("250:250")
        finally:
            unmount(point)
    name = f"{os.major(inner)}:{os.minor(inner)}"
    assert name not in lives_on(ext4)


def test_a_btrfs_stands_on_each_of_its_devices(tmp_path, cannot_run):
    if os.geteuid():
        cannot_run("mounting needs root")
    images = [tmp_path / "a.img", tmp_path / "b.img"]
    for image in images:
        with image.open("wb") as file:
            file.truncate(128 << 20)
    point = tmp_path / "mnt"
    point.mkdir()
    with loop_device(images[0]) as one, loop_device(images[1]) as two:
        run("mkfs.btrfs", "-q", "-f", "-d", "raid1", "-m", "raid1", one, two)
        subprocess.run(["btrfs", "device", "scan", one, two], check=True, capture_output=True)
        run("mount", one, str(point))
        try:
            found = lives_on(point)
            for device in (one, two):
                text = Path(f"/sys/class/block/{Path(device).name}/dev").read_text().strip()
                assert text in found
        finally:
            unmount(point)


def test_a_filesystem_without_a_device_stands_on_nothing_else():
    dev = os.stat("/proc").st_dev
    assert lives_on("/proc") == {f"{os.major(dev)}:{os.minor(dev)}"}
