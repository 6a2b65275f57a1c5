"""After a delete is told nobody reaches the old object by its name: Linux, and vfs as Linux.

On Linux a storm: one process deletes and makes again, this one reads inotify and opens each name
that it is told of. On vfs every point at which the reader can run between the steps of an unlink.
"""

import ctypes
import os
import select
import struct
import subprocess
import sys

import pytest

from fanwise.kernel.libc import libc
from fanwise.lifetime import Until
from fanwise.notify import mask as m
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.mark import FILESYSTEM, On
from fanwise.vfs import Deleting, Disk, Vfs, finish

IN_DELETE = 0x200
COUNT = 2000
# Deletes a file as soon as its number is written to it, while another keeps the name cached.
STORM = """
import os, sys, threading
top, count = sys.argv[1], int(sys.argv[2])
def look():
    while not done.is_set():
        for number in range(at[0], min(at[0] + 4, count)):
            try:
                os.stat(f"{top}/{number}")
            except OSError:
                pass
done, at = threading.Event(), [0]
looker = threading.Thread(target=look)
looker.start()
for number in range(count):
    at[0] = number
    os.unlink(f"{top}/{number}")
done.set()
looker.join()
"""


def test_linux_reaches_no_deleted_object(fs):
    for number in range(COUNT):
        (fs / str(number)).touch()
    fd = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        assert libc.inotify_add_watch(fd, os.fsencode(fs), ctypes.c_uint32(IN_DELETE)) > 0
        told = reached = 0
        with subprocess.Popen([sys.executable, "-ISc", STORM, fs, str(COUNT)]):
            while told < COUNT:
                assert select.select([fd], [], [], 20)[0], f"{told} deletes told"
                data = os.read(fd, 1 << 16)
                while data:
                    size = struct.unpack_from("=12xI", data)[0]
                    name = data[16 : 16 + size].rstrip(b"\0")
                    data = data[16 + size :]
                    told += 1
                    try:
                        os.close(os.open(os.fsencode(fs) + b"/" + name, os.O_RDONLY))
                    except FileNotFoundError:
                        continue
                    reached += 1
        assert (told, reached) == (COUNT, 0)
    finally:
        os.close(fd)


class NotifyFirst(Deleting):
    """Linux 5.3 to 5.16."""

    def remove(self, parent, dentry, take_away):
        name, inode = dentry.name, dentry.target
        yield from take_away()
        yield from self.vfs.tell_entry(m.DELETE, parent, name, inode)
        yield from self.vfs.d_delete(dentry)


def reached_after(deleting, steps, used):
    """Run an unlink for so many steps, then read; whether DELETE is told and the name still opens.

    None when the unlink has fewer steps. ``used``: somebody has the file open.
    """
    core = Fsnotify()
    vfs = Vfs(notify=core, deleting=deleting)
    vfs.mount_root(vfs.superblock("fs", Disk({"f": b"old"})))
    group = core.group()
    group.add(On(FILESYSTEM, "fs"), m.DELETE)
    finish(vfs.stat("/f"))
    if used:
        finish(vfs.open("/f", silent=True))
    unlink = vfs.unlink("/f")
    for _ in range(steps):
        try:
            next(unlink)
        except StopIteration:
            return None
    if not group.read():
        return False
    opening = vfs.open("/f", silent=True)
    while True:
        try:
            step = next(opening)
        except StopIteration:
            return True
        except OSError:
            return False
        if isinstance(step, Until) and not step.ready():
            return False  # the directory is locked: it goes on when the unlink is through


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(("deleting", "reaches"), [(Deleting, False), (NotifyFirst, True)])
def test_vfs_reaches_a_deleted_object_only_when_told_first(deleting, reaches, used):
    found, steps = [], 0
    while (one := reached_after(deleting(), steps, used)) is not None:
        found.append(one)
        steps += 1
    assert steps > 5
    assert any(found) == reaches
