"""Verdicts against Linux: the same marks, accesses and answers; who is asked, and what comes of it.

On ext4 on a loop device, never on a filesystem that somebody else uses; who reads and answers is
this process, who accesses is another (`asking`, `_accessor.py`).
"""

import errno
import os
import random
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from asking import FS, InStep, listeners, on, seen

from fanwise import AnswerRefused, MarkRefused, NotWatchable
from fanwise.kernel import fanotify as fan
from fanwise.notify import mask as m
from fanwise.notify.event import PermissionEvent
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.group import CONTENT, NOTIF, PRE_CONTENT
from fanwise.notify.mark import FILESYSTEM, IGNORE, IGNORED_MASK, INODE, SURV_MODIFY
from fanwise.notify.verdict import ALLOW, AS_LINUX, DENY, ERRNOS

PERMISSION = [m.OPEN_PERM, m.ACCESS_PERM, m.OPEN_EXEC_PERM, m.PRE_ACCESS]
SILENT = IGNORE | SURV_MODIFY


class Storm:
    """Random accesses and marks on a small tree."""

    def __init__(self, root, step, rand):
        self.root, self.step, self.random = root, step, rand
        self.slots = {}  # slot -> flags

    def paths(self):
        return [self.root, *sorted(self.root.rglob("*"))]  # opens directories: see setup

    def mask(self, pair):
        rand, mask = self.random, 0
        mine = PERMISSION if pair[1].cls == PRE_CONTENT else PERMISSION[:3]
        for bit in rand.sample(mine, rand.randrange(1, len(mine))):
            mask |= bit
        if rand.random() < 0.04:
            mask |= rand.choice([m.PRE_ACCESS, m.CREATE, m.FS_ERROR])
        for flag in (m.ONDIR, m.EVENT_ON_CHILD):
            if rand.random() < 0.5:
                mask |= flag
        if mask & m.PRE_ACCESS and rand.random() < 0.9:
            mask &= ~m.ONDIR
        return mask

    def mark(self, paths):
        rand = self.random
        pair = rand.choice(self.step.pairs)
        path = rand.choice(paths)
        kind = FILESYSTEM if rand.random() < 0.2 else INODE
        flags = rand.choice([0, 0, 0, SILENT, IGNORED_MASK | SURV_MODIFY])
        return self.step.mark(pair, path, self.mask(pair), kind, flags, rand.random() < 0.3)

    def do(self, files, dirs):
        rand, slots, do = self.random, self.slots, self.step.do
        file, folder = str(rand.choice(files)), str(rand.choice(dirs))
        what = rand.randrange(15)
        slot = rand.choice(list(slots)) if slots else None
        count, at = rand.choice([1, 100, 4096, 9000]), rand.choice([0, 5, 4096, 12345])
        if what < 4 or slot is None:
            if len(slots) < 5:
                slot = next(n for n in range(9) if n not in slots)
                flags = rand.choice([os.O_RDONLY, os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_TRUNC])
                if do("open", slot, file, flags)[0] == "ok":
                    slots[slot] = flags
            else:
                self.close(slot)
        elif what == 4:
            self.close(slot)
        elif what == 5:
            do("read", slot, count)
        elif what == 6:
            do("pread", slot, count, at)
        elif what == 7:
            do("pwrite", slot, count, at)
        elif what == 8:
            do("write", slot, count)
        elif what == 9:
            do(*rand.choice([("truncate", file, at), ("ftruncate", slot, at)]))
        elif what == 10:
            do("fallocate", slot, at, count)
        elif what == 11:
            other = rand.choice(list(slots))
            if other != slot:
                kinds = [("sendfile", other, slot, at, count), ("copy", slot, other, count, at)]
                do(*rand.choice(kinds))
        elif what == 12:
            do("map", slot, 4096)
        elif what == 13:
            do("list", folder)
        else:
            do("run", str(self.root / "d/true"))

    def close(self, slot):
        del self.slots[slot]
        assert self.step.do("close", slot)[0] == "ok"


@pytest.mark.parametrize("seed", range(8))
def test_random_accesses_and_verdicts(ext4, seed):
    """Who is asked of what, in which order, with which range, and the errno the access gets."""
    (ext4 / "d/e").mkdir(parents=True)
    for name in ("a", "b", "d/a", "d/b", "d/e/a"):
        (ext4 / name).write_bytes(b"x" * 10_000)
    shutil.copy("/bin/true", ext4 / "d/true")
    files = sorted(path for path in ext4.rglob("*") if path.is_file())
    dirs = sorted(path for path in ext4.rglob("*") if path.is_dir())
    dirs = [ext4, *(path for path in dirs if path.name != "lost+found")]
    rand = random.Random(seed)
    with listeners() as (kernel, accessor):
        step = InStep(ext4, kernel, accessor, rand)
        storm = Storm(ext4, step, rand)
        taken = sum(storm.mark([*files, *dirs]) for _ in range(8))
        for _ in range(400):
            if rand.random() < 0.15:
                taken += storm.mark([*files, *dirs])
            storm.do(files, dirs)
        assert taken > 20
        assert step.asked > 60
        assert step.denied > 15
        assert step.refused > 5


@pytest.mark.parametrize("cls", [NOTIF, CONTENT, PRE_CONTENT])
def test_the_two_agree_on_which_marks_a_class_can_have(ext4, cls):
    (ext4 / "f").touch()
    (ext4 / "d").mkdir()
    bits = {NOTIF: fan.FAN_CLASS_NOTIF | fan.FAN_REPORT_DFID_NAME_TARGET}
    bits |= {CONTENT: fan.FAN_CLASS_CONTENT, PRE_CONTENT: fan.FAN_CLASS_PRE_CONTENT}
    group = Fsnotify().group(cls, policy=None if cls == NOTIF else AS_LINUX)
    named = [bit for bit in m.NAMES.values() if bit & (m.EVENTS | m.PERMISSION)]
    rand, took = random.Random(3), []
    fd = fan.init(bits[cls] | fan.FAN_CLOEXEC | fan.FAN_NONBLOCK | fan.FAN_UNLIMITED_MARKS)
    try:
        for _ in range(2000):
            mask = rand.choice([0, rand.choice(named), rand.choice(named) | rand.choice(named)])
            if rand.random() < 0.5:
                mask = rand.choice(PERMISSION) | rand.choice([0, m.OPEN, *PERMISSION])
            mask |= rand.choice([0, 0, m.ONDIR, m.EVENT_ON_CHILD, m.FLAGS])
            flags = rand.choice([0, 0, IGNORE, IGNORED_MASK]) | rand.choice([0, SURV_MODIFY])
            kind, path = rand.choice([INODE, INODE, FILESYSTEM]), ext4 / rand.choice("fd")
            remove = rand.random() < 0.4
            command = (fan.FAN_MARK_REMOVE if remove else fan.FAN_MARK_ADD) | flags
            command |= fan.FAN_MARK_FILESYSTEM if kind == FILESYSTEM else 0
            try:
                fan.mark(fd, command, mask, path=path)
                kernel = None
            except NotWatchable as error:
                kernel = error
            try:
                (group.remove if remove else group.add)(on(kind, path), mask, flags)
                ours = None
            except MarkRefused as error:
                ours = error
            assert (kernel is None) == (ours is None), (
                f"{kind} {path.name} {m.show(mask)} {flags:#x} {remove}: {kernel!r}, {ours!r}"
            )
            took.append(ours is None)
    finally:
        os.close(fd)
    assert 200 < sum(took) < 1800


@pytest.mark.parametrize("cls", [CONTENT, PRE_CONTENT])
def test_the_two_agree_on_which_answers_can_be_given(ext4, cls):
    """Every errno there is, and numbers that nobody waits under; what is refused still waits."""
    (ext4 / "f").touch()
    core = Fsnotify()
    group = core.group(cls, policy=AS_LINUX)
    group.add(on(FILESYSTEM, ext4), m.OPEN_PERM)
    with listeners() as (kernel, accessor):
        theirs, opener = kernel(cls), accessor()
        theirs.mark(ext4, m.OPEN_PERM, FILESYSTEM)
        for verdict in range(1, 134):
            access = core.access(PermissionEvent(m.OPEN_PERM, FS, b"f"))
            run = access.ask()
            run.run()
            opener.tell("open", 0, str(ext4 / "f"), os.O_RDONLY)
            (record,) = theirs.wait()
            (event,) = group.read()
            for number, other in ((4000, 4000), (record.fd, event.number)):
                refused = theirs.answer(number, verdict)
                try:
                    group.answer(other, verdict)
                    ours = None
                except AnswerRefused as error:
                    ours = error
                assert (refused is None) == (ours is None), (number, verdict, refused, ours)
            taken = {DENY} if cls == CONTENT else ERRNOS
            assert (refused is None) == (verdict in taken)
            if refused is not None:
                assert theirs.answer(record.fd, DENY) is None
                group.answer(event.number, DENY)
            assert theirs.answer(record.fd, DENY) == errno.ENOENT
            with pytest.raises(AnswerRefused):
                group.answer(event.number, DENY)
            run.run()
            assert opener.outcome() == ("failed", access.verdict)


@pytest.mark.parametrize("cls", [CONTENT, PRE_CONTENT])
def test_a_group_that_closes_lets_what_waits_go(ext4, cls):
    """Two accesses that were read, one that was not, one answered just before, one killed."""
    count = 5
    for n in range(count):
        (ext4 / f"{n}").touch()
    core = Fsnotify()
    group = core.group(cls, policy=AS_LINUX)
    group.add(on(FILESYSTEM, ext4), m.OPEN_PERM)
    with listeners() as (kernel, accessor):
        theirs = kernel(cls)
        theirs.mark(ext4, m.OPEN_PERM, FILESYSTEM)
        openers, accesses, runs = [], [], []

        def begin(n):
            openers.append(accessor())
            openers[-1].tell("open", 0, str(ext4 / f"{n}"), os.O_RDONLY)
            openers[-1].wait_in_kernel()
            accesses.append(core.access(PermissionEvent(m.OPEN_PERM, FS, b"%d" % n)))
            runs.append(accesses[-1].ask())
            runs[-1].run()

        for n in range(4):
            begin(n)
        records, events = theirs.wait(), group.read()
        assert [record.pid for record in records] == [it.process.pid for it in openers]
        assert len(events) == 4
        begin(4)
        openers[1].kill()
        accesses[1].interrupt()
        assert theirs.answer(records[0].fd, DENY) is None
        assert group.answer(events[0].number, DENY)
        theirs.close()
        closing = group.close()
        assert not closing.run()
        assert closing.at == "wait for askers"
        for run in runs:
            run.run()
        assert closing.run()
        kernel_outcomes = [it.outcome() for n, it in enumerate(openers) if n != 1]
        ours = [access.verdict for n, access in enumerate(accesses) if n != 1]
        assert kernel_outcomes == [("failed", DENY)] + [("ok", None)] * 3
        assert ours == [DENY, ALLOW, ALLOW, ALLOW]
        assert accesses[1].verdict == errno.EINTR


@pytest.mark.parametrize("read", [False, True])
def test_a_killed_access_leaves_the_queue_or_its_number(ext4, read):
    (ext4 / "f").touch()
    core = Fsnotify()
    group = core.group(PRE_CONTENT, policy=AS_LINUX)
    group.add(on(FILESYSTEM, ext4), m.OPEN_PERM)
    with listeners() as (kernel, accessor):
        theirs, opener, other = kernel(PRE_CONTENT), accessor(), accessor()
        theirs.mark(ext4, m.OPEN_PERM, FILESYSTEM)

        def begin(process):
            process.tell("open", 0, str(ext4 / "f"), os.O_RDONLY)
            process.wait_in_kernel()
            access = core.access(PermissionEvent(m.OPEN_PERM, FS, b"f"))
            access.ask().run()
            return access

        access = begin(opener)
        if read:
            (record,) = theirs.wait()
            (event,) = group.read()
        opener.kill()
        access.interrupt()
        begin(other)
        (record2,) = theirs.wait()
        (event2,) = group.read()
        assert seen(record2, ext4).pid == other.process.pid
        if read:
            assert theirs.answer(record.fd, DENY) is None  # late, and harmless
            assert not group.answer(event.number, DENY)
            assert theirs.answer(record.fd, DENY) == errno.ENOENT
            with pytest.raises(AnswerRefused):
                group.answer(event.number, DENY)
        assert theirs.answer(record2.fd, ALLOW) is None
        assert group.answer(event2.number, ALLOW)
        assert other.outcome() == ("ok", None)
        assert theirs.read() == group.read() == []
