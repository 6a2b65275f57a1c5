"""Filesystems that break, for real: what the tests of health provoke errors with.

Nothing is imitated. A device that fails is a loop device over a FUSE file that answers EIO or
ENOSPC for chosen bytes; damage is made in an image with debugfs, xfs_db or by overwriting bytes.
Everything is undone when a test fails, rules first: xfs retries failed metadata writes for ever.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fanwise.kernel.libc import last_error, libc
from fanwise.kernel.mounts import Mount, mounts
from tests.kernel.conftest import loop_device, run, unmount

SERVER = Path(__file__).parent / "_faultfile.py"
EVERYTHING = 1 << 40
# The least that mkfs takes, and for btrfs what leaves room for data.
SIZE = {"ext4": 64 << 20, "xfs": 300 << 20, "btrfs": 160 << 20}
MKFS = {
    "ext4": ("mkfs.ext4", "-q", "-F"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32): EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN
MNT_DETACH = 2


class FaultFile:
    """A file, at ``point``, that fails as it is told: see _faultfile.py."""

    def __init__(self, backing: Path, point: Path) -> None:
        point.touch()
        self.point = point
        self._process = subprocess.Popen(
            [sys.executable, "-BIS", str(SERVER), str(backing), str(point)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
        )
        if self._read() != "ready":  # it said why on its standard error
            self._process.communicate()
            raise AssertionError("no FUSE server")

    def fail(self, op: str, code: int, start: int = 0, end: int = EVERYTHING, count=-1) -> None:
        """Let requests of these bytes fail with an errno, ``count`` of them or all."""
        self._tell(f"fail {op} {errno.errorcode[code]} {start} {end} {count}")

    def hang(self, op: str, start: int = 0, end: int = EVERYTHING) -> None:
        """Let requests of these bytes wait until `clear`."""
        self._tell(f"hang {op} {start} {end}")

    def clear(self) -> None:
        """Work again."""
        self._tell("clear")

    def hits(self) -> int:
        """How many requests failed or waited."""
        return int(self._tell("hits", None))

    def close(self) -> None:
        """Unmount it and end the server."""
        if libc.umount2(os.fsencode(self.point), MNT_DETACH) < 0:
            raise last_error(str(self.point))
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(60)

    def _tell(self, line: str, expected: str | None = "ok") -> str:
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()
        answer = self._read()
        assert expected is None or answer == expected, (line, answer)
        return answer

    def _read(self) -> str:
        return self._process.stdout.readline().decode().strip()


class Volume:
    """A filesystem on an image behind a loop device, and how to break it."""

    def __init__(self, kind: str, image: Path, device: str, point: Path, options: str) -> None:
        self.kind, self.image, self.device, self.point = kind, image, device, point
        self.options = options
        self.faults: FaultFile

    @property
    def name(self) -> str:
        """The device's name below /sys."""
        return os.path.basename(self.device)

    @property
    def dev(self) -> tuple[int, int]:
        """Of the block device; for btrfs see `mount_entry`."""
        number = os.stat(self.device).st_rdev
        return os.major(number), os.minor(number)

    def entry(self) -> Mount:
        """Its line of mountinfo."""
        return next(m for m in mounts() if m.mount_point == os.fsencode(self.point))

    def mount(self, options: str | None = None) -> None:
        text = self.options if options is None else options
        run("mount", "-t", self.kind, *(["-o", text] if text else []), self.device, str(self.point))

    def unmount(self) -> None:
        """Unmount it, and wait until its superblock is gone.

        It outlives the mount while another mount namespace has a copy of that: the device is in
        use until then, and neither checked nor given back.
        """
        unmount(self.point)
        deadline = time.monotonic() + 60
        while True:
            try:
                os.close(os.open(self.device, os.O_RDONLY | os.O_EXCL))
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
            else:
                return
            time.sleep(0.02)  # nothing tells when it is free

    @contextmanager
    def unmounted(self) -> Iterator[None]:
        """For damage: the image alone, then mounted again on the same device with cold caches."""
        self.unmount()
        try:
            yield
            # The loop device's own pages show the image as it was.
            subprocess.run(["blockdev", "--flushbufs", self.device], check=True)
        finally:
            self.mount()

    def sysfs(self, name: str) -> str:
        """A file of the filesystem's directory in sysfs."""
        return Path(f"/sys/fs/{self.kind}/{self.name}/{name}").read_text().strip()

    def trigger(self, text: str = "fanwise-test") -> None:
        """Raise one error of ext4 with no object."""
        Path(f"/sys/fs/ext4/{self.name}/trigger_fs_error").write_text(text)

    def shut_down(self, flags: int = 2) -> None:
        """ext4 and xfs: stop the filesystem by its ioctl."""
        fd = os.open(self.point, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("=I", flags))
        finally:
            os.close(fd)

    def abort(self) -> None:
        """ext4: what remounting with `abort` does."""
        subprocess.run(["mount", "-o", "remount,abort", self.point], capture_output=True)

    def debugfs(self, *requests: str) -> str:
        """ext4: requests of debugfs, writing; the last answer."""
        answer = ""
        for request in requests:
            answer = subprocess.run(
                ["debugfs", "-w", "-R", request, self.image], capture_output=True, text=True
            ).stdout
        return answer

    def xfs_db(self, *commands: str) -> str:
        """xfs: commands of xfs_db, writing and with checksums made right."""
        argv = [word for command in commands for word in ("-c", command)]
        return subprocess.run(
            ["xfs_db", "-x", *argv, self.image], capture_output=True, text=True
        ).stdout

    def xfs_at(self, *commands: str) -> int:
        """The byte at which xfs_db stands after these commands."""
        return int(re.search(r"byte offset (\d+)", self.xfs_db(*commands, "stack"))[1])

    def ext4_block(self, pattern: str) -> int:
        """The byte of a block that dumpe2fs names, such as ``Block bitmap at``."""
        text = subprocess.run(["dumpe2fs", self.image], capture_output=True, text=True).stdout
        size = int(re.search(r"Block size:\s+(\d+)", text)[1])
        return int(re.search(rf"{pattern} (\d+)", text)[1]) * size

    def block_size(self) -> int:
        """Of ext4."""
        text = subprocess.run(["dumpe2fs", "-h", self.image], capture_output=True, text=True).stdout
        return int(re.search(r"Block size:\s+(\d+)", text)[1])

    def scribble(self, at: int, size: int = 64) -> None:
        """Overwrite bytes of the image, so that checksums are wrong."""
        with open(self.image, "r+b") as file:
            file.seek(at)
            file.write(bytes(byte ^ 0xA5 for byte in os.pread(file.fileno(), size, at)))

    def extent(self, path: Path) -> tuple[int, int]:
        """Where the first extent of a file lies in the image, in bytes."""
        text = subprocess.run(
            ["filefrag", "-b512", "-v", path], capture_output=True, text=True, check=True
        ).stdout
        first, last = re.search(
            r"^\s*0:\s+\d+\.\.\s*\d+:\s+(\d+)\.\.\s*(\d+):", text, re.M
        ).groups()
        return int(first) * 512, (int(last) + 1) * 512


@contextmanager
def volume(
    kind: str,
    where: Path,
    *,
    faulty: bool = False,
    size: int | None = None,
    mkfs: tuple[str, ...] = (),
    options: str = "",
    prepare: Callable[[Path], object] | None = None,
    image: Path | None = None,
) -> Iterator[Volume]:
    """Make a filesystem, fill it by ``prepare(point)``, and mount it again with cold caches.

    With ``faulty`` its device is a FaultFile.
    """
    where.mkdir(parents=True, exist_ok=True)
    image = image or where / f"{kind}.img"
    with open(image, "wb") as file:
        file.truncate(size or SIZE[kind])
    run(*MKFS[kind], *mkfs, str(image))
    point = where / f"{kind}-mnt"
    point.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(image.unlink)
        faults, backing = None, image
        if faulty:
            faults = FaultFile(image, where / f"{kind}.faulty")
            stack.callback(faults.close)
            backing = faults.point
        device = stack.enter_context(loop_device(backing))
        it = Volume(kind, image, device, point, options)
        if faults is not None:
            it.faults = faults
        stack.callback(_end, it, faults)
        it.mount()
        if prepare is not None:
            prepare(point)
            it.unmount()
            subprocess.run(["blockdev", "--flushbufs", device], check=True)
            it.mount()
        yield it


def _end(it: Volume, faults: FaultFile | None) -> None:
    if faults is not None:
        faults.clear()
    try:
        while any(m.mount_point == os.fsencode(it.point) for m in mounts()):
            unmount(it.point)  # ismount() would ask a filesystem that may be shut down
    except (AssertionError, OSError):
        run("umount", "--lazy", str(it.point))
        raise


@contextmanager
def small_tmpfs(where: Path, size: str = "6m") -> Iterator[Path]:
    """A tmpfs that is soon full; a sparse image on it makes a device that runs out of space."""
    where.mkdir(parents=True)
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "fanwise-test", str(where))
    try:
        yield where
    finally:
        unmount(where)


def counted(it: Volume, number: int) -> None:
    """Wait until an ext4's superblock counts so many errors: a work queue brings it up to date."""
    deadline = time.monotonic() + 60
    while (found := int(it.sysfs("errors_count"))) != number:
        assert time.monotonic() < deadline, f"{found} errors, not {number}"
        time.sleep(0.01)  # nothing tells


def code_of(call: Callable[[], object]) -> str:
    """The name of the errno that a call fails with, or "ok"."""
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"


def syncfs(fd: int) -> None:
    if libc.syncfs(ctypes.c_int(fd)) < 0:
        raise last_error()


def fsync(path: Path, data: bytes | None = None) -> None:
    """Write to a file (over what it has) and fsync it."""
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        if data is not None:
            os.pwrite(fd, data, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def read(path: Path) -> bytes:
    """Read a file from its start, as the device has it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, 4096, 0)
    finally:
        os.close(fd)
