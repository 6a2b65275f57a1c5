"""The reserve against a list: no error is lost or uncounted, whatever happens in which order.

Marks come and go, filesystems are unmounted, memory runs out, readers hold errors, fail, and are
cut off; the queue is full of other events; the group ends step by step, cut off anywhere.
"""

from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fanwise import ClosedError, MarkRefused
from fanwise.notify import mask as m
from fanwise.notify.event import ErrorEvent, Event
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.mark import FILESYSTEM, INODE, SUBTREE, On
from fanwise.notify.reserve import Slot

LIMIT = 3  # of other events
FILESYSTEMS = (1, 2, 3)
filesystems = st.sampled_from(FILESYSTEMS)
objects = st.builds(
    lambda fs, kind: On(kind, fs, b"" if kind == FILESYSTEM else b"k"),
    filesystems,
    st.sampled_from([FILESYSTEM, FILESYSTEM, SUBTREE, INODE]),
)


class Reserved(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.core = Fsnotify()
        self.group = self.core.group(queue_limit=LIMIT, errors_limit=4)
        self.group.add(On(FILESYSTEM, 1), m.FS_ERROR | m.CREATE)
        self.line = []  # what is queued: [number, fs, first errno, count], or a name
        self.readers = {}  # reader -> what it holds
        self.run = None
        self.raised = self.told = self.left = self.number = 0
        self.memory = True

        def allocate():
            if not self.memory:
                raise MemoryError
            return Slot()

        self.group.errors.allocate = allocate

    @property
    def open(self):
        return self.group.state == "OPEN"

    @rule(on=objects, other=st.booleans())
    def mark(self, on, other):
        marks, errors = dict(self.group.marks), self.group.errors
        before = errors.size
        new = on not in marks or not marks[on].mask & m.FS_ERROR
        try:
            self.group.add(on, m.FS_ERROR | (m.CREATE if other and on.kind != INODE else 0))
        except ClosedError:
            assert not self.open
        except MarkRefused:
            assert self.group.marks == marks
            assert errors.size == before
            assert new
            assert not self.memory or errors.marks == 4 or errors.size == 4 + 64
        else:
            assert self.memory or errors.size == before

    @rule(data=st.data(), how=st.sampled_from(["remove", "detach", "destroy"]))
    def unmark(self, data, how):
        marks = list(self.group.marks.values())
        if not marks:
            return
        mark = data.draw(st.sampled_from(marks))
        if how == "remove" and self.open:
            self.group.remove(mark.on, m.FS_ERROR)
        elif how == "detach":
            mark.detach()
        else:
            mark.destroy()

    @rule(fs=filesystems)
    def unmount(self, fs):
        self.core.unmount(fs)

    @rule(memory=st.booleans())
    def memory_comes_and_goes(self, memory):
        self.memory = memory

    @rule(
        fs=filesystems,
        code=st.integers(1, 133),
        count=st.sampled_from([None, 1, 5]),
        named=st.booleans(),
    )
    def an_error(self, fs, code, count, named):
        key = b"k" if named else None
        wanted = self.open and any(
            on.fs == fs and mark.mask & m.FS_ERROR and (named or on.kind != INODE)
            for on, mark in self.group.marks.items()
        )
        self.core.send([ErrorEvent(m.FS_ERROR, fs, key, count=count, error=code)])
        if not wanted:
            return
        count = count or 1
        self.raised += count
        for entry in self.line:
            if isinstance(entry, list) and entry[1] == fs:
                entry[3] += count
                return
        self.number += 1
        self.line.append([self.number, fs, code, count])

    @rule(name=st.binary(min_size=1, max_size=1))
    def something_else(self, name):
        before = self.group.queue._events and self.group.queue._events[-1][0]
        self.core.send([Event(m.CREATE, 1, name, b"k", name)])
        events = self.group.queue._events
        if self.open and events and events[-1][0] is not before:
            self.line.append(events[-1][0].name)

    @rule(most=st.sampled_from([None, 1, 2, 3]))
    def read(self, most):
        try:
            found = self.group.read(most)
        except ClosedError:
            assert not self.open
            return
        expected, self.line[: most or len(self.line)] = self.line[: most or len(self.line)], []
        self._same(found, expected)
        self.told += sum(entry[3] for entry in expected if isinstance(entry, list))

    def _same(self, found, expected):
        got = [
            (event.fs, event.error, event.count) if event.mask & m.FS_ERROR else event.name
            for event in found
        ]
        assert got == [tuple(e[1:]) if isinstance(e, list) else e for e in expected]

    @rule()
    def another_reader(self):
        try:
            self.readers[self.group.reader()] = None
        except ClosedError:
            assert not self.open
        except MarkRefused:
            assert not self.memory or self.group.errors.readers == 64

    @precondition(lambda self: self.open and any(not held for held in self.readers.values()))
    @rule(data=st.data(), most=st.sampled_from([None, 1, 2]))
    def take(self, data, most):
        reader = data.draw(st.sampled_from([r for r, held in self.readers.items() if not held]))
        expected = []
        while self.line and len(expected) < (most or 1 << 30):
            expected.append(self.line.pop(0))
            if isinstance(expected[-1], list):
                self.readers[reader] = expected[-1]
                break
        self._same(reader.take(most), expected)

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), how=st.sampled_from(["done", "leave", "fail"]))
    def a_reader_ends(self, data, how):
        reader = data.draw(st.sampled_from(list(self.readers)))
        held = self.readers.pop(reader)
        if how == "done":
            reader.done()
            self.told += held[3] if held else 0
            self.readers[reader] = None
            return
        if how == "leave":
            reader.done()
            self.told += held[3] if held else 0
            held = None
        reader.leave()
        if held is None:
            return
        if not self.open:
            self.left += held[3]
            return
        for at, entry in enumerate(self.line):
            if isinstance(entry, list) and entry[1] == held[1]:
                if entry[0] < held[0]:
                    entry[3] += held[3]
                    return
                held[3] += entry[3]
                del self.line[at]
                break
        # Before all that came later: behind errors that are older, and what else is at the head.
        places = [i for i, e in enumerate(self.line) if isinstance(e, list) and e[0] < held[0]]
        self.line.insert(places[-1] + 1 if places else 0, held)

    @rule()
    def begin_to_close(self):
        if self.run is None and self.number > 6:
            self.run = self.group.close()

    @precondition(lambda self: self.run is not None)
    @rule(kill=st.sampled_from([False, False, False, True]))
    def go_on_closing(self, kill):
        if kill or self.run.at is None:
            self.run.kill()
            self.run = self.group.close()
        elif self.run.ready:
            step = self.run.step()
            if step == "free events":
                assert not self.group.queue.errors.queued
        else:
            assert self.run.at in ("wait for readers", "wait for waiters")
            assert self.run.at != "wait for readers" or self.readers
        if self.open:
            return
        if not len(self.group.queue):
            self.left += sum(entry[3] for entry in self.line if isinstance(entry, list))
            self.line = []

    @invariant()
    def every_error_is_told_or_held_or_counted(self):
        errors = self.group.errors
        queued = sum(entry[3] for entry in self.line if isinstance(entry, list))
        held = sum(held[3] for held in self.readers.values() if held)
        assert errors.raised == self.raised
        assert errors.delivered == self.told
        assert errors.abandoned + errors.counted == self.left + queued
        assert self.raised == self.told + self.left + queued + held
        for reader, entry in self.readers.items():
            assert (reader.slot.event.count if reader.slot else None) == (entry and entry[3])

    @invariant()
    def the_room_is_what_was_promised(self):
        errors = self.group.errors
        marked = [on.fs for on, mark in self.group.marks.items() if mark.mask & m.FS_ERROR]
        assert errors.marks == len(marked)
        assert errors.readers == len(self.readers)
        orphans = {e[1] for e in self.line if isinstance(e, list)} - set(marked)
        assert errors.orphans == len(orphans)
        assert errors.size == len(marked) + len(self.readers) + len(orphans)
        # So the next error of any marked filesystem finds room.
        waiting = {e[1] for e in self.line if isinstance(e, list)}
        assert len(errors._free) >= len(set(marked) - waiting)

    def teardown(self):
        for reader in self.readers:
            reader.leave()
        assert self.group.close().run() or self.group.state == "CLOSED"
        errors = self.group.errors
        assert errors.size == 0
        assert errors.raised == errors.delivered + errors.abandoned == self.raised


Reserved.TestCase.settings = settings(
    max_examples=250,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=False,
    database=None,
)
TestReserved = Reserved.TestCase
