"""What a path stands on: its filesystem's device, and every device below that one.

A loop device stands on the filesystem of its backing file, a partition on its disk, md and dm
devices on their slaves. A write to the path reaches every one of them.

Linux reference: Documentation/ABI/stable/sysfs-block, drivers/block/loop.c (``backing_file``).
"""

import os
from pathlib import Path

from fanwise._errors import FanwiseError
from fanwise.kernel.mounts import mount_of

_SYS = Path("/sys/dev/block")
_MOST = 256  # devices; a stack that is deeper or wider is cut off there


def lives_on(path: str | os.PathLike[str]) -> frozenset[str]:
    """Return the devices, each as ``MAJOR:MINOR``, that content of ``path`` is written to.

    The first is that of the superblock, as mountinfo has it (anonymous on btrfs), then that of
    the mount's source, then all below. ``path`` exists.

    Raises what `mount_of` raises (NoSuchRoot and others).
    """
    found: set[str] = set()
    _add_path(os.fspath(path), found)
    return frozenset(found)


def _add_path(path: str, found: set[str]) -> None:
    mount = mount_of(path)
    _add_device("{}:{}".format(*mount.dev), found)
    try:
        device = os.stat(mount.source).st_rdev
    except (OSError, ValueError):  # a source need not be a path
        return
    if device:
        _add_device(f"{os.major(device)}:{os.minor(device)}", found)
    if mount.fstype == "btrfs":  # the source names one device of possibly many
        for members in Path("/sys/fs/btrfs").glob("*/devices"):
            devices = {member.read_text().strip() for member in members.glob("*/dev")}
            if devices & found:
                for member in devices:
                    _add_device(member, found)


def _add_device(device: str, found: set[str]) -> None:
    if device in found or len(found) >= _MOST:
        return
    found.add(device)
    here = _SYS / device
    try:
        names = [slave / "dev" for slave in (here / "slaves").iterdir()]
    except OSError:  # no block device, or one without slaves
        names = []
    if (here / "partition").exists():
        names.append(here.resolve().parent / "dev")
    for name in names:
        try:
            _add_device(name.read_text().strip(), found)
        except OSError:  # detached meanwhile
            continue
    try:
        backing = (here / "loop/backing_file").read_text().rstrip("\n")
    except OSError:
        return
    try:
        _add_path(backing, found)
    except FanwiseError:  # deleted, or in another mount namespace: nothing more can be known
        return
