"""Process: who did a change; and one look at a process in /proc.

A look opens a pidfd first, reads, and asks the pidfd last: what was read is of one process, which
had the number all the while. The descriptor is closed before the look returns.
"""

import contextlib
import os
import pwd
import signal
import time
from typing import Literal, NamedTuple

import msgspec

_TICK = 10**9 // os.sysconf("SC_CLK_TCK")  # ns; start times in /proc are rounded down to it
_MOST_USERS = 4096

_users: dict[int, str] = {}


class Process(msgspec.Struct, frozen=True, gc=False):
    """The process that did a change, as well as can be told; never another one.

    ``name``: its name (comm, at most 15 bytes). ``exe``: its executable; of a process that was not
    looked at in time it is what was given to execve, so it can be relative, a symbolic link or a
    script. ``user``: the effective user, by name, or by number where it has none. ``cgroup``: its
    path in the unified hierarchy, or else in a hierarchy of version 1. Each is None when it is not
    known. ``state`` says how it is known: ``"seen"`` (it was looked at while it was there),
    ``"traced"`` (it had ended; name and executable are from the kernel's records of fork and exec)
    or ``"gone"`` (not known: it ended before, or its number may have been another's).
    """

    name: str | None
    exe: str | None
    user: str | None
    cgroup: str | None
    state: Literal["seen", "traced", "gone"]


GONE = Process(None, None, None, None, "gone")


class Look(NamedTuple):
    """What one look found; times in ns since boot.

    The process had its number from ``start`` (not later than that) until ``end`` at least; the look
    began at ``begin``.
    """

    pid: int
    begin: int
    end: int
    start: int
    name: str
    exe: str | None
    uid: int
    cgroup: str | None
    zombie: bool


def now() -> int:
    """Return ns since boot, as the records of a trace count them."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def proc_reason() -> str | None:
    """Say why /proc cannot be used to look at processes; None when it can."""
    try:
        if os.readlink("/proc/self") == str(os.getpid()):
            return None
    except OSError as error:
        return f"/proc cannot be read: {error.strerror}"
    return "/proc is that of another pid namespace"


def look(pid: int) -> Look | None:
    """Look at a process; None when there is none of that number, or it cannot be looked at."""
    begin = now()
    try:
        fd = os.pidfd_open(pid)  # of a thread: EINVAL or ENOENT
    except OSError:
        return None
    try:
        with open(f"/proc/{pid}/stat", "rb", 0) as file:
            head, _, rest = file.read(4096).rpartition(b")")
        fields = rest.split()
        zombie = fields[0] in (b"Z", b"X")
        # A directory of /proc belongs to the effective user, whatever the process allows.
        uid = os.stat(f"/proc/{pid}").st_uid
        exe = None if zombie else _exe(pid)
        # On version 1 a zombie seems to be in the root group.
        cgroup = None if zombie else _cgroup(pid)
        with contextlib.suppress(PermissionError):  # which says that it is there
            signal.pidfd_send_signal(fd, 0)
        start = int(fields[19]) * _TICK + _TICK
        name = os.fsdecode(head.partition(b"(")[2])
        return Look(pid, begin, now(), start, name, exe, uid, cgroup, zombie)
    except (OSError, IndexError):
        return None  # it ended meanwhile
    finally:
        os.close(fd)


def uid_of(pid: int) -> int | None:
    """Return the effective user of whoever has this number now; None when nobody has."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def leader_of(tid: int, before: int) -> int | None:
    """Return the process of a thread that began before a time; None when that cannot be said."""
    try:
        with open(f"/proc/{tid}/status", "rb", 0) as file:
            status = file.read(8192)
        with open(f"/proc/{tid}/stat", "rb", 0) as file:
            start = int(file.read(4096).rpartition(b")")[2].split()[19]) * _TICK + _TICK
        tgid = int(status.partition(b"\nTgid:")[2].split(None, 1)[0])
    except (OSError, ValueError, IndexError):
        return None
    return tgid if start <= before else None


def user_name(uid: int) -> str:
    """Return the name of a user, or the number where it has none."""
    name = _users.get(uid)
    if name is None:
        try:
            name = pwd.getpwuid(uid).pw_name
        except KeyError:  # which it also says when no file can be opened: not to be kept
            return str(uid)
        if len(_users) >= _MOST_USERS:
            _users.clear()
        _users[uid] = name
    return name


def _exe(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return None  # a kernel thread has none


def _cgroup(pid: int) -> str | None:
    try:
        with open(f"/proc/{pid}/cgroup", "rb", 0) as file:
            lines = [line.split(b":", 2) for line in file.read(65536).splitlines()]
    except OSError:
        return None
    paths = {line[0]: line[2] for line in lines if len(line) == 3}
    unified = paths.pop(b"0", None)
    if unified is not None and (unified != b"/" or not paths):
        return os.fsdecode(unified)
    other = [path for path in paths.values() if path != b"/"]
    return os.fsdecode(other[0]) if other else "/" if unified or paths else None
