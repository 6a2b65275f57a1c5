"""Scratch filesystems for the tests that need a kernel: made, mounted, and always unmounted."""

import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-O", "^has_journal"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}
_SIZE = {"ext4": 256 << 20, "xfs": 320 << 20, "btrfs": 256 << 20}
FILESYSTEMS = ("ext4", "xfs", "btrfs", "tmpfs")


def run(*argv: str) -> None:
    """Run a command that must succeed; its output is shown when it does not."""
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"


def own_instances(tracefs: str) -> list[str]:
    """The trace instances of this process."""
    mine = f"fanwise-{os.getpid()}-"
    return [name for name in os.listdir(f"{tracefs}/instances") if name.startswith(mine)]


@contextmanager
def loop_device(image: Path) -> Iterator[str]:
    """Attach an image to a free loop device; one lock around finding a free one."""
    with open("/run/lock/fanwise-loop.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            ["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=True
        )
    device = done.stdout.strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextmanager
def mounted(kind: str, where: Path, options: str = "") -> Iterator[Path]:
    """Mount a new filesystem of some kind below ``where``; give its mount point."""
    point = where / f"{kind}-mnt"
    point.mkdir(parents=True)
    if kind == "tmpfs":
        run("mount", "-t", "tmpfs", "-o", f"size=512m{options}", "fanwise-test", str(point))
        try:
            yield point
        finally:
            _unmount(point)
        return
    image = where / f"{kind}.img"
    with open(image, "wb") as file:
        file.truncate(_SIZE[kind])
    run(*_MKFS[kind], str(image))
    with loop_device(image) as device:
        run("mount", device, str(point))
        try:
            yield point
        finally:
            _unmount(point)
    image.unlink()


def unmount(point: Path | str) -> None:
    """Unmount it: who looks at it for a moment (blkid, a scan, other tests) keeps it busy."""
    deadline = time.monotonic() + 20
    while True:
        done = subprocess.run(["umount", str(point)], capture_output=True, text=True)
        if not done.returncode:
            return
        assert "busy" in done.stderr, done.stderr
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.02)  # nothing tells when it is free


def _unmount(point: Path) -> None:
    if os.path.ismount(point):
        unmount(point)


@pytest.fixture(params=FILESYSTEMS)
def fs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A fresh filesystem of each kind, as a mount point."""
    with mounted(request.param, tmp_path) as point:
        yield point


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A fresh tmpfs, as a mount point."""
    with mounted("tmpfs", tmp_path) as point:
        yield point


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Path]:
    """A fresh ext4, as a mount point."""
    with mounted("ext4", tmp_path) as point:
        yield point


@pytest.fixture(params=[False, True], ids=["native", "pure"])
def pure(request: pytest.FixtureRequest) -> bool:
    """Run with the native module, then with its twin."""
    return bool(request.param)
