"""Looks at one filesystem, in a process of its own: whoever asks a sick one may never return.

Run as a file, by `fanwise.health._probe`: arguments are the filesystem's type, and its mount point;
the answer is one line of JSON. It opens the root and asks for statistics, UUID and label; nothing
of it needs the disk on a healthy filesystem. xfs refuses even the opening once it is shut down
(xfs_dir_open); on Linux up to 6.18 nothing else shows that.

Imports the standard library only: it must start fast, and whatever the host's path is.
"""

import errno
import fcntl
import json
import os
import sys

_GETFSUUID = 0x80111500  # FS_IOC_GETFSUUID: u8 length, u8 uuid[16] (Linux 6.9)
_GETFSLABEL = 0x81009431  # FS_IOC_GETFSLABEL: char label[256]
_RDONLY = 1  # ST_RDONLY


def look(fstype: str, point: str) -> dict[str, object]:
    """Answer with ``state``, ``errno``, ``uuid`` and ``label``; None is what it does not tell."""
    answer: dict[str, object] = {"state": "ok", "errno": 0, "uuid": None, "label": None}
    try:
        fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        shut = (error.errno == errno.EIO and fstype == "xfs") or error.errno == errno.ESHUTDOWN
        answer["state"] = "shutdown" if shut else "unknown"
        answer["errno"] = error.errno
        return answer
    try:
        os.fstatvfs(fd)
        answer["uuid"] = _uuid(fd)
        answer["label"] = _label(fd)
    except OSError as error:
        answer["state"] = "shutdown" if error.errno == errno.ESHUTDOWN else "unknown"
        answer["errno"] = error.errno
    finally:
        os.close(fd)
    return answer


def _uuid(fd: int) -> str | None:
    try:
        raw = fcntl.ioctl(fd, _GETFSUUID, bytes(17))
    except OSError:
        return None
    if raw[0] != 16:
        return None
    text = raw[1:17].hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def _label(fd: int) -> str | None:
    try:
        raw = fcntl.ioctl(fd, _GETFSLABEL, bytes(256))
    except OSError:
        return None
    return raw.partition(b"\0")[0].decode("utf-8", "replace") or None


if __name__ == "__main__":
    print(json.dumps(look(*sys.argv[1:])), flush=True)
