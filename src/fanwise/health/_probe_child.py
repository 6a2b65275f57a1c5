"""Looks at one filesystem, in a process of its own: whoever asks a sick one may never return.

Run as a file, by `fanwise.health._probe`: arguments are the filesystem's type, and its mount point;
the answer is one line of JSON. It opens the root and asks for statistics, UUID and label; nothing
of it needs the disk on a healthy filesystem. xfs refuses even the opening once it is shut down
(xfs_dir_open); on Linux up to 6.18 nothing else shows that. With a third argument, ``checked``, it
reads from the device when ext4 was checked last, which may need the disk: once for each mount.

Imports the standard library only: it must start fast, and whatever the host's path is.
"""

import errno
import fcntl
import json
import os
import struct
import sys

_GETFSUUID = 0x80111500  # FS_IOC_GETFSUUID: u8 length, u8 uuid[16] (Linux 6.9)
_GETFSLABEL = 0x81009431  # FS_IOC_GETFSLABEL: char label[256]
_RDONLY = 1  # ST_RDONLY


def look(fstype: str, point: str, more: str = "") -> dict[str, object]:
    """Answer with ``state``, ``errno``, ``uuid``, ``label``, ``checked`` and ``mount``.

    ``checked`` is when ext4 was last checked as a whole, with the fields of `Check` (_observe).
    ``mount`` is the id of what is mounted there now. None is what it does not tell.
    """
    answer: dict[str, object] = {"state": "ok", "errno": 0, "uuid": None, "label": None}
    answer["checked"] = answer["mount"] = None
    try:
        root = os.open(point, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            answer["mount"] = _mount(root)
            # The same one: xfs refuses this, and not what only holds the place.
            fd = os.open(f"/proc/self/fd/{root}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        finally:
            os.close(root)
    except OSError as error:
        shut = (error.errno == errno.EIO and fstype == "xfs") or error.errno == errno.ESHUTDOWN
        answer["state"] = "shutdown" if shut else "unknown"
        answer["errno"] = error.errno
        return answer
    try:
        os.fstatvfs(fd)
        answer["uuid"] = _uuid(fd)
        answer["label"] = _label(fd)
        if more == "checked" and fstype in ("ext2", "ext3", "ext4"):
            answer["checked"] = _checked(fd)
    except OSError as error:
        answer["state"] = "shutdown" if error.errno == errno.ESHUTDOWN else "unknown"
        answer["errno"] = error.errno
    finally:
        os.close(fd)
    return answer


def _mount(fd: int) -> int | None:
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        ids = [int(line.split()[1]) for line in file if line.startswith(b"mnt_id:")]
    return ids[0] if ids else None


# struct ext4_super_block: s_mnt_count, s_magic, s_lastcheck and its high byte. The device's cache
# has it.
def _checked(fd: int) -> dict[str, object] | None:
    dev = os.fstat(fd).st_dev
    name = f"{os.major(dev)}:{os.minor(dev)}"
    try:
        with open(f"/sys/dev/block/{name}/uevent", encoding="ascii") as file:
            said = dict(line.strip().partition("=")[::2] for line in file)
        with open(os.path.join("/dev", said["DEVNAME"]), "rb", buffering=0) as device:
            here = os.fstat(device.fileno()).st_rdev
            block = os.pread(device.fileno(), 1024, 1024) if here == dev else b""
    except (OSError, KeyError, ValueError):
        return None  # no right to read it, or no such name: then nobody knows
    if len(block) < 1024 or struct.unpack_from("<H", block, 0x38)[0] != 0xEF53:
        return None
    at = block[0x277] << 32 | struct.unpack_from("<I", block, 0x40)[0]
    if not at:
        return None
    # The open directory keeps this life of the superblock, so that all is of one.
    try:
        life = os.stat("/sys/fs/ext4/" + said["DEVNAME"].replace("/", "!")).st_ino
    except OSError:
        life = 0  # no sysfs: then times alone decide
    (mounts,) = struct.unpack_from("<H", block, 0x34)
    writable = not os.fstatvfs(fd).f_flag & _RDONLY
    return {"at": at, "mounts": mounts, "life": life, "writable": writable}


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
