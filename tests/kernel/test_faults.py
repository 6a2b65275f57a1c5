"""The fixtures that break filesystems: they break, they mend, and they leave nothing behind."""

import errno
import os
from pathlib import Path

import pytest

from tests.kernel.faults import code_of, fsync, read, small_tmpfs, volume


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_device_that_fails_and_works_again(kind, tmp_path):
    with volume(
        kind, tmp_path, faulty=True, prepare=lambda at: fsync(at / "f", b"x" * 65536)
    ) as broken:
        broken.faults.fail("read", errno.EIO)
        assert code_of(lambda: read(broken.point / "f")) == "EIO"
        assert broken.faults.hits() > 0
        broken.faults.clear()
        assert read(broken.point / "f") == b"x" * 4096
    assert not (tmp_path / f"{kind}.img").exists()


def test_a_write_that_fails_is_told_once_by_fsync(tmp_path):
    with volume("ext4", tmp_path, faulty=True) as broken:
        file = broken.point / "f"
        fsync(file, b"a" * 65536)
        fd = os.open(file, os.O_RDWR)
        try:
            broken.faults.fail("write", errno.EIO, *broken.extent(file))
            os.pwrite(fd, b"b" * 4096, 0)
            assert [code_of(lambda: os.fsync(fd)) for _ in range(2)] == ["EIO", "ok"]
        finally:
            os.close(fd)


def test_a_failing_test_leaves_nothing(tmp_path):
    def fails():
        with volume("xfs", tmp_path, faulty=True) as broken:
            (broken.point / "d").mkdir()  # metadata that cannot be written any more
            broken.faults.fail("any", errno.EIO)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not os.path.ismount(tmp_path / "xfs-mnt")
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def test_a_sparse_image_on_a_full_tmpfs(tmp_path):
    with (
        small_tmpfs(tmp_path / "small") as small,
        volume("ext4", tmp_path, image=small / "i", options="errors=continue") as broken,
    ):
        assert code_of(lambda: fsync(broken.point / "f", os.urandom(12 << 20))) == "ENOSPC"
