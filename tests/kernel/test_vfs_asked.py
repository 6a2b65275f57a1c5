"""Vfs against Linux: which operation asks what, of which bytes, and what a denial comes to.

Linux's operations run in a thread, because they wait; this one reads the group and answers. The
group is closed when that takes too long, which lets everything go.
"""

import errno
import os
import queue
import select
import stat
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from conftest import mounted
from notifying import read_all
from test_vfs_linux import STEPS, apply, clear
from vfs_twin import FS, GROUPS, Twin, failed

from fanwise.kernel import fanotify as fan
from fanwise.kernel.records import Range, decode
from fanwise.lifetime import Until
from fanwise.notify import mask as m
from fanwise.notify.group import CONTENT, PRE_CONTENT
from fanwise.notify.mark import FILESYSTEM, On
from fanwise.notify.verdict import AS_LINUX
from fanwise.vfs import finish

INIT = fan.FAN_CLOEXEC | fan.FAN_NONBLOCK | fan.FAN_UNLIMITED_QUEUE
CLASS = {CONTENT: fan.FAN_CLASS_CONTENT, PRE_CONTENT: fan.FAN_CLASS_PRE_CONTENT}
PATIENCE = 20.0


class Worker:
    """Does system calls in a thread, one after the other; says when one is done by an eventfd."""

    def __init__(self):
        self.done = os.eventfd(0, os.EFD_CLOEXEC)
        self.outcome = None
        self._calls = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def call(self, function):
        self._calls.put(function)

    def close(self):
        self._calls.put(None)
        self._thread.join(PATIENCE)
        os.close(self.done)

    def _run(self):
        while (function := self._calls.get()) is not None:
            self.outcome = function()
            os.eventfd_write(self.done, 1)


class Asked(Twin):
    """A twin whose operations are asked about; ``deny`` says of an event's number what it gets."""

    def __init__(self, root, memory, cls, mask, deny, event_flags=os.O_RDONLY):
        super().__init__(root, memory)
        self.worker = Worker()
        self.deny = deny
        self.asked = 0
        self.numbers = [0, 0]
        self.flags = INIT | CLASS[cls], event_flags | os.O_CLOEXEC
        self.fd = GROUPS.take(*self.flags)
        self.group = self.core.group(cls, policy=AS_LINUX)
        self.said = [[], []]
        self.mark_all(mask)

    def __exit__(self, kind, *args):
        if kind is None:
            GROUPS.give_back(self.fd, self.flags, self.linux.root)
        else:
            os.close(self.fd)  # whatever still waits goes on
        self.worker.close()
        super().__exit__(kind, *args)

    def mark_all(self, mask):
        root = self.linux.root
        fan.mark(self.fd, fan.FAN_MARK_ADD | fan.FAN_MARK_FILESYSTEM, mask, path=root)
        self.group.add(On(FILESYSTEM, FS), mask)

    def unmark(self, mask):
        root = self.linux.root
        fan.mark(self.fd, fan.FAN_MARK_REMOVE | fan.FAN_MARK_FILESYSTEM, mask, path=root)
        self.group.remove(On(FILESYSTEM, FS), mask)

    def verdict(self, side, fd=None):
        self.numbers[side] += 1
        return self.deny(self.numbers[side])

    def theirs(self, name, *args):
        call = super().theirs
        self.worker.call(lambda: call(name, *args))
        while True:
            ready = select.select([self.fd, self.worker.done], [], [], PATIENCE)[0]
            assert ready, f"{name} neither asks nor ends"
            if self.fd in ready:
                for record in decode(os.read(self.fd, 1 << 16)):
                    self._answer(record)
            elif self.worker.done in ready:
                os.eventfd_read(self.worker.done)
                return self.worker.outcome

    def _answer(self, record):
        name = ""  # of a directory: events of notify have none, and do not say so in Linux
        if not stat.S_ISDIR(os.fstat(record.fd).st_mode):
            path = os.readlink(f"/proc/self/fd/{record.fd}").removesuffix(" (deleted)")
            name = os.path.basename(path)
        ranges = [tuple(info) for info in record.infos if type(info) is Range]
        self.said[0].append((record.mask, name, *ranges))
        code = self.verdict(0, record.fd)
        fan_verdict = fan.FAN_ALLOW
        if code:
            fan_verdict = fan.FAN_DENY if code == errno.EPERM else fan.deny(code)
        os.write(self.fd, record.fd.to_bytes(4, "little") + fan_verdict.to_bytes(4, "little"))
        os.close(record.fd)

    def ours(self, name, *args):
        operation = getattr(self.vfs, name)(*args)
        while True:
            try:
                step = next(operation)
                while isinstance(step, Until) and not step.ready():
                    (event,) = self.group.read()
                    name = b"" if event.name is None else event.name
                    ranges = [] if event.range is None else [event.range]
                    self.said[1].append((event.mask & ~m.ONDIR, os.fsdecode(name), *ranges))
                    assert self.group.answer(event.number, self.verdict(1))
            except StopIteration as end:
                return "ok", end.value
            except OSError as error:
                return failed(error.errno)

    def compare(self, what):
        real, model = self.said
        shown = f"{what}\nLinux asked {real}\nvfs asked {model}"
        assert real == model, shown
        self.asked += len(real)
        self.said = [[], []]
        super().compare(what)


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    with mounted("ext4", tmp_path_factory.mktemp("asked")) as point:
        yield point
        GROUPS.close()


def masks(cls):
    bits = [m.OPEN_PERM, m.ACCESS_PERM] + ([m.PRE_ACCESS] if cls == PRE_CONTENT else [])
    return st.sets(st.sampled_from(bits), min_size=1).map(sum)


groups = st.sampled_from([CONTENT, PRE_CONTENT]).flatmap(
    lambda cls: st.tuples(st.just(cls), masks(cls), st.booleans())
)
denied = st.lists(st.sampled_from([0, 0, 0, 0, errno.EPERM, errno.EBUSY, errno.EIO]), max_size=20)

FIRST = [
    ("mkdir", "/a"),
    ("open", "/a/b", os.O_CREAT | os.O_RDWR),
    ("write", 0, b"x" * 9000, None),
    ("open", "/a", os.O_RDONLY),
]


@settings(
    max_examples=int(os.environ.get("VFS_EXAMPLES", "100")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(group=groups, codes=denied, steps=st.lists(STEPS, min_size=20, max_size=40))
def test_who_is_asked_what(disk, group, codes, steps):
    clear(disk)
    cls, mask, ondir = group
    if cls == CONTENT:
        codes = [code and errno.EPERM for code in codes]
    if ondir and not mask & m.PRE_ACCESS:
        mask |= m.ONDIR

    def deny(number):
        return codes[number] if number < len(codes) else 0

    with Asked(disk, False, cls, mask, deny) as twin:
        for step in [*FIRST, *(step for step in steps if step[0] != "mark")]:
            apply(twin, step)


def test_a_file_opened_before_the_mark_asks_nobody(disk):
    clear(disk)
    flags = os.O_CREAT | os.O_RDWR
    for cls, bits in ((CONTENT, m.ACCESS_PERM), (PRE_CONTENT, m.ACCESS_PERM | m.PRE_ACCESS)):
        with Asked(disk, False, cls, bits, lambda number: 0) as twin:
            twin.do("open", "/f", flags)
            twin.do("write", b"content", on=[0])
            before = twin.asked
            twin.do("read", 3, 0, on=[0])
            assert twin.asked > before
            twin.unmark(bits)
            twin.do("open", "/f", os.O_RDWR)
            twin.mark_all(bits)
            before = twin.asked
            for at, more in ((1, 0), (0, 2 if cls == PRE_CONTENT else 1)):
                twin.do("read", 3, 0, on=[at])
                assert twin.asked == before + more
        clear(disk)


class Filled(Asked):
    """What is about to be read is filled first: on Linux through the event's descriptor."""

    def __init__(self, root):
        super().__init__(root, False, PRE_CONTENT, m.PRE_ACCESS, lambda number: 0, os.O_RDWR)

    def verdict(self, side, fd=None):
        name, (offset, length) = self.said[side][-1][1:]
        content = b"%d" % (offset // 4096) * min(length, 9000 - offset)
        if side:
            file = finish(self.vfs.open(f"/{name}", os.O_WRONLY, silent=True))
            assert finish(self.vfs.write(file, content, offset)) == len(content)
            finish(self.vfs.close(file))
        else:
            assert os.pwrite(fd, content, offset) == len(content)
        return 0

    def compare(self, what):
        for fd, group in self.groups:  # the listener's own events differ: it has another descriptor
            read_all(fd)
            group.read()
        super().compare(what)


def test_who_waits_gets_what_the_listener_filled(disk):
    clear(disk)
    with Filled(disk) as twin:
        twin.unmark(m.PRE_ACCESS)
        twin.do("open", "/f", os.O_CREAT | os.O_RDWR)
        twin.do("ftruncate", 9000, on=[0])
        twin.mark_all(m.PRE_ACCESS)
        twin.do("open", "/f", os.O_RDONLY)
        assert twin.do("read", 3, 4094, on=[1]) == ("ok", b"000")
        assert twin.do("read", 9000, 8000, on=[1]) == ("ok", b"1" * 1000)
        assert twin.do("read", 9000, 0, on=[0])[1][:4096] == b"0" * 4096  # nobody is asked
        assert twin.asked == 2
