"""The writer's lock: one process at a time, gone when the process is gone.

REFS      the lock is the descriptor: an open file description lock (fcntl(2), F_OFD_SETLK) on a
          file beside the database. Unlike flock(2) it can be looked at without taking it, so
          a look never makes a writer fail.
LOCKING   whoever has the lock writes its name into the file; others only read it.
LIFETIME  the kernel drops the lock with the last descriptor. A forked child closes its copy at
          once, children that are exec'ed never have one. The file itself is never removed: a
          process that waits on a removed file would hold a lock that nobody else sees.
"""

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from fanwise._errors import BusyError, ForeignFile, NoRoom, StoreError

_MOST_BYTES = 4096


class Holder(msgspec.Struct, frozen=True):
    """Who holds a writer's lock: ``pid``, its ``command`` and ``since`` (unix seconds).

    ``started`` is the process's start time in clock ticks since boot; with it a pid that was
    given to another process is not mistaken for the holder.
    """

    pid: int
    command: str
    since: float
    started: int


def take(path: Path, database: Path) -> int:
    """Take the lock of ``database`` at ``path``; give the descriptor that holds it.

    Raises BusyError, which names the holder, when another process has it; ForeignFile when the
    path is no regular file; NoRoom when it cannot be made.
    """
    while True:
        fd = _open(path)
        try:
            try:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK))
            except BlockingIOError:
                raise _busy(path, database) from None
            if not _same(fd, path):  # somebody removed the file meanwhile
                os.close(fd)
                continue
            _sign(fd, database)
        except BaseException:
            os.close(fd)
            raise
        return fd


def holder(path: Path) -> Holder | None:
    """Return who holds the lock now; None when nobody does, or nobody that can be named."""
    with _looking(path) as fd:
        if fd < 0 or not _locked(fd):
            return None
        found = _signed(fd)
        return found if found and _started(found.pid) == found.started else None


def held(path: Path) -> bool:
    """Say whether any process holds the lock now."""
    with _looking(path) as fd:
        return fd >= 0 and _locked(fd)


@contextmanager
def _looking(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # there is none, or none that this user may look at
        yield -1
        return
    try:
        yield fd
    finally:
        os.close(fd)


# struct flock of a 64-bit off_t: the whole file, and no pid, as F_OFD_* wants it.
_FLOCK = struct.Struct("hhqqi4x")


def _flock(kind: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0)


def _locked(fd: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK))
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def _open(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ForeignFile(path, "is a symbolic link", "remove it") from error
        raise NoRoom(path, f"cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ForeignFile(path, "is not a regular file", "remove it")
    return fd


def _busy(path: Path, database: Path) -> BusyError:
    found = holder(path)
    if found is None:
        who = "another process"
    else:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.since))
        who = f"process {found.pid} ({found.command}) since {when}"
    return BusyError(f"{database} is written by {who}", "end it first, or only read the database")


def _same(fd: int, path: Path) -> bool:
    mine = os.fstat(fd)
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def _sign(fd: int, database: Path) -> None:
    pid = os.getpid()
    started = _started(pid)
    if started is None:
        raise StoreError(database, "/proc does not show this process", "mount /proc")
    name = Path(f"/proc/{pid}/comm").read_bytes().decode(errors="replace").strip()
    text = msgspec.json.encode(Holder(pid, name, time.time(), started))
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, text, 0)
    except OSError as error:
        raise NoRoom(database, f"its lock cannot be written: {error.strerror}") from error


def _signed(fd: int) -> Holder | None:
    try:
        return msgspec.json.decode(os.pread(fd, _MOST_BYTES, 0), type=Holder)
    except (msgspec.DecodeError, UnicodeDecodeError):  # locked a moment ago, not yet signed
        return None


def _started(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    return int(text.rpartition(b")")[2].split()[19])
