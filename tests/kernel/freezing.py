"""Freezing a scratch filesystem so that it is always thawed, and who sleeps because of it.

The filesystem is thawed when the block is left, and by a watchdog process when this one was killed
or took too long. Never for the root filesystem: the mount point must be one of this run's.
"""

import contextlib
import errno
import fcntl
import os
import select
import subprocess
import sys
import time
from pathlib import Path

FIFREEZE = 0xC0045877
FITHAW = 0xC0045878
PATIENCE = 20.0
CHILD = Path(__file__).parent / "_frozen_child.py"

# Thaws what it has on descriptor 3 when its standard input ends, or after a while.
WATCHDOG = """
import fcntl, select, sys
select.select([sys.stdin], [], [], 60)
try:
    fcntl.ioctl(3, 0xC0045878, 0)
except OSError:
    pass  # it was thawed already
"""


def freeze_code(fd, request=FIFREEZE):
    """What FIFREEZE or FITHAW says: "ok" or the errno's name."""
    try:
        fcntl.ioctl(fd, request, 0)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"


@contextlib.contextmanager
def frozen(point):
    """Freeze a filesystem; give a descriptor of it. Who thaws it earlier thaws it himself."""
    assert os.stat(point).st_dev != os.stat("/").st_dev
    fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
    dog = None
    try:
        dog = subprocess.Popen(
            [
                "/bin/sh",
                "-c",
                f'exec 3<"$1"; exec {sys.executable} -ISc "$2"',
                "sh",
                point,
                WATCHDOG,
            ],
            stdin=subprocess.PIPE,
        )
        assert freeze_code(fd) == "ok"
        yield fd
    finally:
        freeze_code(fd, FITHAW)
        if dog is not None:
            dog.stdin.close()
            dog.wait(PATIENCE)
        os.close(fd)


class Child:
    """One operation of _frozen_child.py."""

    def __init__(self, *argv):
        self.argv = argv
        self._process = subprocess.Popen(
            [sys.executable, "-IS", str(CHILD), *map(str, argv)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._line() == "ready", argv

    def go(self):
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def settled(self):
        """Its answer, or "asleep" when it waits for a thaw."""
        until = time.monotonic() + PATIENCE
        pid = self._process.pid
        while time.monotonic() < until:
            if select.select([self._process.stdout], [], [], 0.02)[0]:
                return self._line()
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            where = Path(f"/proc/{pid}/wchan").read_text()
            if state == "D" and where.startswith(("percpu_", "freeze_super")):
                return "asleep"
        raise AssertionError(f"{self.argv}: neither done nor asleep: {state} in {where}")

    def answer(self):
        return self._line()

    def close(self):
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        self._process.stdout.close()

    def _line(self):
        ready = select.select([self._process.stdout], [], [], PATIENCE)[0]
        assert ready, f"{self.argv} says nothing"
        return self._process.stdout.readline().decode().strip()
