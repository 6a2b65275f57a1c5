"""What the tests of notify against Linux share.

Kernel group A (a filesystem mark on everything, read after each system call) feeds a group of
`fanwise.notify`. Kernel group B has the same marks as that group. What the two give must be equal.
"""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from fanwise import MarkRefused, NotWatchable
from fanwise.kernel import fanotify as fan
from fanwise.kernel.handles import name_to_handle
from fanwise.kernel.libc import libc
from fanwise.kernel.records import FID, NEW_DFID_NAME, decode
from fanwise.notify import mask as bits
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.mark import FILESYSTEM, INODE, SUBTREE, On
from fanwise.sources.events import to_events

INIT = (
    fan.FAN_CLASS_NOTIF
    | fan.FAN_CLOEXEC
    | fan.FAN_NONBLOCK
    | fan.FAN_UNLIMITED_QUEUE
    | fan.FAN_UNLIMITED_MARKS
    | fan.FAN_REPORT_DFID_NAME_TARGET
)
FS = "the filesystem under test"
# MOVED_FROM and MOVED_TO are made from RENAME.
FED = (bits.EVENTS | bits.ONDIR) & ~(bits.MOVED_FROM | bits.MOVED_TO)

HELPER = """
import json, os, sys
for line in sys.stdin:
    name, *args = json.loads(line)
    try:
        getattr(os, name)(*args)
    except OSError:
        pass
    print(flush=True)
"""


def read_all(fd):
    """Every record that is queued."""
    records = []
    with contextlib.suppress(BlockingIOError):
        while data := os.read(fd, 1 << 18):
            records += decode(data)
    return records


def plain(record):
    """A record as (mask, object, dir, name, dir2, name2, pid): no dot names."""
    key = folder = name = folder2 = name2 = None
    for info in record.infos:
        if info.type == FID:
            key = info.key
        elif info.type == NEW_DFID_NAME:
            folder2, name2 = info.key, info.name
        elif info.name in (None, b"."):
            key = info.key
        else:
            folder, name = info.key, info.name
    return record.mask, key, folder, name, folder2, name2, record.pid


def fields(event):
    return (
        event.mask, event.key, event.dir, event.name, event.dir2, event.name2, event.pid,
    )  # fmt: skip


def shown(found):
    return [
        f"{bits.show(mask)} {name} {name2} {pid} {(key or b'').hex()[-8:]}"
        for mask, key, _, name, _, name2, pid in found
    ]


class Model:
    """Directories by handle, as of the record: who calls notify has such a one."""

    def __init__(self, top):
        self.place = {}  # directory -> (parent, name)
        self.at = {}
        self.top = top

    def above(self, key):
        out = []
        while key in self.place:
            key = self.place[key][0]
            out.append(key)
        return tuple(out)

    def path(self, key):
        names = []
        while key in self.place:
            key, name = self.place[key]
            names.insert(0, os.fsdecode(name))
        return "/".join(names)

    def within(self, top):
        return {key for key in {self.top, *self.place} if key == top or top in self.above(key)}

    def follow(self, event):
        if event.mask & bits.RENAME:
            victim = self.at.pop((event.dir2, event.name2), None)
            if victim is not None:
                self.place.pop(victim, None)
            if self.at.get((event.dir, event.name)) == event.key:
                del self.at[event.dir, event.name]
        if not event.mask & bits.ONDIR:
            return
        if event.mask & bits.RENAME:
            self._put(event.key, event.dir2, event.name2)
        elif event.mask & bits.CREATE:
            self._put(event.key, event.dir, event.name)
        elif event.mask & bits.DELETE:
            self.at.pop((event.dir, event.name), None)
            self.place.pop(event.key, None)

    def _put(self, key, parent, name):
        self.place[key] = parent, name
        self.at[parent, name] = key


class Pair:
    """Our group and the kernel's, with equal marks, on one filesystem."""

    def __init__(self, root):
        self.root = Path(root)
        self.a = fan.init(INIT)
        self.b = fan.init(INIT)
        self.core = Fsnotify()
        self.group = self.core.group(queue_limit=1 << 30, marks_limit=1 << 30)
        self.model = Model(name_to_handle(root)[0])
        self.seen = self.fed = 0
        fan.mark(self.a, fan.FAN_MARK_ADD | fan.FAN_MARK_FILESYSTEM, FED, path=root)
        self._helper = None

    def close(self):
        os.close(self.a)
        os.close(self.b)
        if self._helper is not None:
            self._helper.stdin.close()
            self._helper.wait(20)
            self._helper.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # -- marks --

    def on(self, kind, path):
        if kind == FILESYSTEM:
            return On(FILESYSTEM, FS)
        key = name_to_handle(path)[0]
        return On(kind, FS, key, os.path.isdir(path) and not os.path.islink(path))

    def mark(self, kind, path, mask, flags=0, remove=False):
        """Mark both; whether they took it. They must agree."""
        on = self.on(kind, path)
        command = fan.FAN_MARK_REMOVE if remove else fan.FAN_MARK_ADD
        command |= flags | (fan.FAN_MARK_FILESYSTEM if kind == FILESYSTEM else 0)
        try:
            fan.mark(self.b, command | fan.FAN_MARK_DONT_FOLLOW, mask, path=path)
            kernel = None
        except NotWatchable as error:
            kernel = error
        try:
            (self.group.remove if remove else self.group.add)(on, mask, flags)
            ours = None
        except MarkRefused as error:
            ours = error
        assert (kernel is None) == (ours is None), (
            f"{kind} {bits.show(mask)} flags {flags:#x} remove {remove}: {kernel!r}, {ours!r}"
        )
        return ours is None

    # -- operations --

    def feed(self):
        """Give our group what A has."""
        for event in to_events(read_all(self.a), FS, self.model.above):
            self.fed += 1
            self.core.send([event])
            self.model.follow(event)

    def do(self, call, *args):
        """One system call, then the feed; its result, None if it failed."""
        try:
            return call(*args)
        except OSError:
            return None
        finally:
            self.feed()

    def elsewhere(self, name, *args):
        """One system call in another process."""
        if self._helper is None:
            self._helper = subprocess.Popen(
                [sys.executable, "-c", HELPER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        self._helper.stdin.write(json.dumps([name, *args]) + "\n")
        self._helper.stdin.flush()
        self._helper.stdout.readline()
        self.feed()

    # -- the comparison --

    def compare(self):
        """What both groups have queued must be equal."""
        self.feed()
        ours = [fields(event) for event in self.group.read()]
        kernel = [plain(record) for record in read_all(self.b)]
        self.seen += len(kernel)
        assert Counter(ours) == Counter(kernel), "\n".join(
            ["ours:", *shown(ours), "kernel:", *shown(kernel)]
        )
        # Records without a name merge in A within one system call, and take what comes later to
        # the place of what came first (ATTRIB and DELETE_SELF of what a rename replaced).
        ordered = [[found for found in side if found[3] or found[5]] for side in (ours, kernel)]
        assert ordered[0] == ordered[1], "\n".join(
            ["ours:", *shown(ours), "kernel:", *shown(kernel)]
        )
        return ours


def exchange(a, b):
    """renameat2 with RENAME_EXCHANGE."""
    if libc.renameat2(fan.AT_FDCWD, os.fsencode(a), fan.AT_FDCWD, os.fsencode(b), 2) < 0:
        raise OSError(ctypes.get_errno(), "renameat2")


__all__ = ["FILESYSTEM", "INODE", "SUBTREE", "Pair", "exchange"]
