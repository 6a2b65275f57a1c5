"""What the tests of verdicts against Linux share: listeners, accessors, and both in step.

Nothing here touches the marked filesystem in a way that raises an event (stat and marks do not).
Whatever goes wrong, closing the kernel's groups lets every access go on: `listeners` does that when
a test ends, and when it has taken too long.
"""

import contextlib
import errno
import json
import os
import select
import stat
import struct
import subprocess
import sys
import threading
from pathlib import Path

from fanwise import AnswerRefused, MarkRefused, NotWatchable
from fanwise.kernel import fanotify as fan
from fanwise.kernel.records import Range, decode
from fanwise.notify import mask as m
from fanwise.notify.event import PermissionEvent
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.group import CONTENT, PRE_CONTENT
from fanwise.notify.mark import FILESYSTEM, INODE, On
from fanwise.notify.verdict import ALLOW, AS_LINUX, DENY

ACCESSOR = Path(__file__).with_name("_accessor.py")
FS = "the filesystem under test"
CLASSES = {PRE_CONTENT: fan.FAN_CLASS_PRE_CONTENT, CONTENT: fan.FAN_CLASS_CONTENT}
INIT = fan.FAN_CLOEXEC | fan.FAN_NONBLOCK | fan.FAN_UNLIMITED_QUEUE | fan.FAN_UNLIMITED_MARKS
DEADLINE = 120  # seconds for a test
PATIENCE = 20  # seconds for one thing that has to happen


class Accessor:
    """A process that accesses files."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-BIS", str(ACCESSOR)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
        )

    def tell(self, *words):
        """Let it begin an operation."""
        self.process.stdin.write(json.dumps(words).encode() + b"\n")
        self.process.stdin.flush()

    def outcome(self):
        """What came of it: ("ok", value) or ("failed", errno)."""
        assert select.select([self.process.stdout], [], [], PATIENCE)[0], "no outcome"
        return tuple(json.loads(self.process.stdout.readline()))

    def wait_in_kernel(self):
        """Until its access waits for a verdict."""
        where = Path(f"/proc/{self.process.pid}/stack")
        for _ in range(PATIENCE * 100):
            if "fanotify_handle_event" in where.read_text():
                return
            select.select([], [], [], 0.01)
        raise AssertionError("it does not wait for a verdict")

    def kill(self):
        """End it where it is; returns when it is gone."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def close(self):
        self.process.stdin.close()
        if self.process.poll() is None:
            self.process.wait(PATIENCE)
        self.process.stdout.close()


class Kernel:
    """A kernel group that gives verdicts.

    The descriptor of an event is kept until its answer is taken: as long as it is open no other
    event has its number.
    """

    def __init__(self, cls):
        self.cls = cls
        self.fd = fan.init(INIT | CLASSES[cls])
        self.held = set()

    def mark(self, path, mask, kind=INODE, flags=0, remove=False):
        command = fan.FAN_MARK_REMOVE if remove else fan.FAN_MARK_ADD
        command |= flags | (fan.FAN_MARK_FILESYSTEM if kind == FILESYSTEM else 0)
        fan.mark(self.fd, command, mask, path=path)

    def read(self):
        """The events that are queued."""
        try:
            records = decode(os.read(self.fd, 1 << 16))
        except BlockingIOError:
            return []
        self.held.update(record.fd for record in records)
        return records

    def wait(self):
        """One event or more."""
        assert select.select([self.fd], [], [], PATIENCE)[0], "no event"
        return self.read()

    def answer(self, number, verdict):
        """Answer; the errno with which the kernel refuses it, or None."""
        if verdict == ALLOW:
            response = fan.FAN_ALLOW
        elif self.cls == CONTENT and verdict == DENY:
            response = fan.FAN_DENY
        else:
            response = fan.deny(verdict)
        try:
            os.write(self.fd, struct.pack("=iI", number, response))
        except OSError as error:
            return error.errno
        self.held.remove(number)
        os.close(number)
        return None

    def close(self):
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        while self.held:
            os.close(self.held.pop())


@contextlib.contextmanager
def listeners():
    """Make kernel groups by class, and accessors; all end with the block or after DEADLINE."""
    groups, accessors = [], []

    def close():
        for group in groups:
            group.close()

    def kernel(cls):
        groups.append(Kernel(cls))
        return groups[-1]

    def accessor():
        accessors.append(Accessor())
        return accessors[-1]

    watchdog = threading.Timer(DEADLINE, close)
    watchdog.start()
    try:
        yield kernel, accessor
    finally:
        watchdog.cancel()
        watchdog.join()
        close()
        for it in accessors:
            it.close()


def key(info):
    return b"%d" % info.st_ino


def on(kind, path):
    if kind == FILESYSTEM:
        return On(FILESYSTEM, FS)
    info = os.stat(path)
    return On(INODE, FS, key(info), stat.S_ISDIR(info.st_mode))


def seen(record, root):
    """A kernel's event as one of ours."""
    info = os.fstat(record.fd)
    path = Path(os.readlink(f"/proc/self/fd/{record.fd}").removesuffix(" (deleted)"))
    ranges = [(part.offset, part.length) for part in record.infos if type(part) is Range]
    ancestors = ()
    if path != root:
        ancestors = tuple(key(os.stat(up)) for up in path.parents if up.is_relative_to(root))
    is_dir = stat.S_ISDIR(info.st_mode)
    return PermissionEvent(
        record.mask | (m.ONDIR if is_dir else 0),
        FS,
        key(info),
        None if is_dir else ancestors[0],
        None if is_dir else os.fsencode(path.name),
        pid=record.pid,
        ancestors=ancestors if is_dir else ancestors[1:],
        range=ranges[0] if ranges else None,
    )


def told(event):
    return m.show(event.mask & ~m.ONDIR), event.key, event.pid, event.range


class InStep:
    """The kernel's groups and ours, asked of the same accesses, one at a time.

    `first` are two kernel groups that are asked before the others and allow all: they tell which
    accesses there are (two, because PRE_ACCESS and ONDIR exclude each other). The others and ours
    have equal marks and must be asked the same.
    """

    def __init__(self, root, kernel, accessor, rand):
        self.root, self.random = root, rand
        self.accessor = accessor()
        self.core = Fsnotify()
        self.log = []
        self.asked = self.denied = self.refused = 0
        (root / "probe").touch()
        *self.first, last = self._in_order(kernel, PRE_CONTENT, 3)
        rest = [last]
        rest += self._in_order(kernel, CONTENT, 2)
        self.pairs = [(it, self.core.group(it.cls, policy=AS_LINUX)) for it in rest]
        self.first[0].mark(root, m.PRE_ACCESS, FILESYSTEM)
        self.first[1].mark(root, m.PERMISSION & ~m.PRE_ACCESS | m.ONDIR, FILESYSTEM)
        self.access = self.run = None

    # Linux asks the groups of a class in the order of their addresses.
    def _in_order(self, kernel, cls, count):
        groups = [kernel(cls) for _ in range(count)]
        for group in groups:
            group.mark(self.root, m.OPEN_PERM, FILESYSTEM)
        self.accessor.tell("open", 0, str(self.root / "probe"), os.O_RDONLY)
        order = []
        for _ in groups:
            (fd,) = select.select([it.fd for it in groups], [], [], PATIENCE)[0]
            (group,) = (it for it in groups if it.fd == fd)
            (record,) = group.read()
            order.append(group)
            group.answer(record.fd, ALLOW)
        assert self.accessor.outcome() == ("ok", None)
        self.accessor.tell("close", 0)
        assert self.accessor.outcome() == ("ok", None)
        for group in groups:
            group.mark(self.root, m.OPEN_PERM, FILESYSTEM, remove=True)
        return order

    def mark(self, pair, path, mask, kind=INODE, flags=0, remove=False):
        """Mark both; whether they took it. They must agree."""
        theirs, ours = pair
        try:
            theirs.mark(path, mask, kind, flags, remove)
            kernel = None
        except NotWatchable as error:
            kernel = error
        try:
            (ours.remove if remove else ours.add)(on(kind, path), mask, flags)
            refused = None
        except MarkRefused as error:
            refused = error
        assert (kernel is None) == (refused is None), (
            f"{ours.cls} {kind} {m.show(mask)} {flags:#x} remove {remove}: {kernel!r}, {refused!r}"
        )
        return refused is None

    def do(self, *words):
        """One operation, answered at random; its outcome, which both must agree on."""
        self.log = [words]
        self.access = self.run = None
        self.accessor.tell(*words)
        out = self.accessor.process.stdout
        names = {pair[0].fd: pair for pair in self.pairs}
        first = {group.fd: group for group in self.first}
        while True:
            ready = select.select([out, *first, *names], [], [], PATIENCE)[0]
            assert ready, f"stuck: {self.log}"
            if began := first.keys() & set(ready):
                self._began(first[began.pop()])
            elif ready != [out]:
                self._was_asked(names[next(fd for fd in ready if fd in names)])
            else:
                outcome = self.accessor.outcome()
                self._decided()
                verdict = self.access.verdict if self.access else ALLOW
                if verdict != ALLOW:
                    self.denied += 1
                    if words[0] == "run":
                        # exec makes ENOEXEC of what it cannot read, or ends in a signal.
                        assert outcome != ("ok", 0), self.log
                    else:
                        assert outcome == ("failed", verdict), (outcome, self.log)
                else:
                    assert outcome[0] == "ok" or outcome[1] not in (errno.EBUSY, errno.EIO)
                return outcome

    # All that could be asked was asked.
    def _decided(self):
        assert self.access is None or self.access.verdict is not None, (
            f"ours is still asked, Linux is not: {self.log}"
        )

    def _began(self, group):
        self._decided()
        (record,) = group.read()
        assert self.access is None or self.access.verdict == ALLOW, self.log
        event = seen(record, self.root)
        self.log.append(str(event))
        self.access = self.core.access(event)
        self.run = self.access.ask()
        self.run.run()
        assert group.answer(record.fd, ALLOW) is None

    def _was_asked(self, pair):
        theirs, ours = pair
        (record,) = theirs.read()
        self.log.append(f"{theirs.cls} {m.show(record.mask)}")
        assert self.access.question is not None, f"Linux asks, ours does not: {self.log}"
        waiting = [other.cls for _, other in self.pairs if len(other.queue)]
        found = ours.read()
        assert len(found) == 1, f"not asked by {theirs.cls}, but by {waiting}: {self.log}"
        assert told(seen(record, self.root)) == told(found[0]), self.log
        self.asked += 1
        while True:
            verdict = self._verdict()
            refused = theirs.answer(record.fd, verdict)
            try:
                assert ours.answer(found[0].number, verdict)
            except AnswerRefused:
                assert refused == errno.EINVAL, (theirs.cls, verdict)
                self.refused += 1
                continue
            assert refused is None, (theirs.cls, verdict, refused)
            break
        self.log.append(verdict)
        self.run.run()

    def _verdict(self):
        rand = self.random
        if rand.random() < 0.75:
            return ALLOW
        return rand.choice([DENY, errno.EIO, errno.EBUSY, errno.EACCES, errno.ENOENT, DENY])
