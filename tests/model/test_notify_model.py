"""Notify against a model that loops over every mark of every group, in random order.

Ends of groups are interleaved with everything else, step by step, and cut off at any step.
"""

import functools
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from fanwise import ClosedError, LifetimeError, MarkRefused
from fanwise.notify import mask as m
from fanwise.notify.event import Event
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.mark import FILESYSTEM, IGNORE, IGNORED_MASK, INODE, SUBTREE, SURV_MODIFY, On

FS = (7, 0)
# r has d, d has e; each has files. Directories by key, with those above, nearest first.
ABOVE = {b"r": (), b"d": (b"r",), b"e": (b"d", b"r")}
FILES = (b"f", b"g")
BITS = [m.CREATE, m.DELETE, m.MODIFY, m.OPEN, m.ATTRIB, m.CLOSE_WRITE, m.MOVED_TO, m.MOVE_SELF]
LIMIT = 3


def _or(bits):
    return functools.reduce(int.__or__, bits)


masks = st.one_of(
    st.just(_or([*BITS, m.RENAME])),
    st.lists(st.sampled_from([*BITS, m.RENAME]), min_size=1, max_size=3).map(_or),
)
flags_of_mask = st.sampled_from([m.FLAGS, m.FLAGS, 0, m.ONDIR, m.EVENT_ON_CHILD])
objects = st.sampled_from(
    [
        On(FILESYSTEM, FS),
        On(SUBTREE, FS, b"r"),
        On(SUBTREE, FS, b"e"),
        *(On(INODE, FS, key, True) for key in ABOVE),
        On(INODE, FS, b"f"),
    ]
)


@st.composite
def events(draw):
    pid = draw(st.sampled_from([1, 1, 2]))
    where = draw(st.sampled_from(list(ABOVE)))
    kind = draw(st.sampled_from(["entry", "rename", "child", "self", "nameless"]))
    if kind == "entry":
        mask = draw(st.sampled_from([m.CREATE, m.DELETE, m.MOVED_TO, m.CREATE | m.OPEN]))
        key = draw(st.sampled_from(FILES))
        return Event(mask, FS, key, where, key, pid=pid, ancestors=ABOVE[where])
    if kind == "rename":
        to = draw(st.sampled_from(list(ABOVE)))
        key = draw(st.sampled_from(FILES))
        return Event(
            m.RENAME, FS, key, where, key, to, b"new", pid, ABOVE[where], ABOVE[to]
        )  # fmt: skip
    mask = draw(st.sampled_from([m.MODIFY, m.OPEN, m.ATTRIB, m.OPEN | m.ATTRIB, m.CLOSE_WRITE]))
    if kind == "child":
        key = draw(st.sampled_from(FILES))
        return Event(mask, FS, key, where, key, pid=pid, ancestors=ABOVE[where])
    if kind == "self":
        mask = draw(st.sampled_from([m.OPEN, m.ATTRIB, m.MOVE_SELF, m.ATTRIB | m.MOVE_SELF]))
        return Event(mask | m.ONDIR, FS, where, pid=pid, ancestors=ABOVE[where])
    return Event(draw(st.sampled_from([m.ATTRIB, m.MOVE_SELF])), FS, FILES[0], pid=pid)


class Slow:
    """The rules, by a loop over marks and over the bits of the event, one at a time."""

    def __init__(self):
        self.marks = {}  # on -> [mask, ignore, ignore flags, survives]

    def roles(self, on, event, bit):
        """How a mark meets one bit of an event: self, child, both, as ("old", "new") too."""
        if on.kind == FILESYSTEM:
            return {"self", "old", "new"}
        chain = (event.dir, *event.ancestors) if event.dir is not None else event.ancestors
        chain2 = (event.dir2, *event.ancestors2) if event.dir2 is not None else ()
        if on.kind == INODE:
            chain, chain2 = chain[:1], chain2[:1]
        found = set()
        if bit & m.DIRENT:
            if on.key in chain:
                found |= {"self", "old"}
            if bit == m.RENAME and on.key in chain2:
                found |= {"self", "new"}
            return found
        itself = (event.key,)
        if on.kind == SUBTREE:
            itself = (event.key, *event.ancestors) if event.mask & m.ONDIR else ()
        if on.key in itself:
            found.add("self")
        if bit & m.ON_CHILD and on.key in chain:
            found.add("child")
        return found

    def expected(self, event):
        """What the group gets: (mask, halves), mask 0 for nothing."""
        ondir = bool(event.mask & m.ONDIR)
        for on, mark in self.marks.items():
            mask, ignore, own, survives = mark
            seen = self.roles(on, event, m.MODIFY) if event.mask & m.MODIFY else set()
            watches = (mask | (ignore if own else 0)) & m.EVENT_ON_CHILD
            if ignore and not survives and ("self" in seen or ("child" in seen and watches)):
                mark[1] = 0
        out, halves = 0, set()
        for bit in [*BITS, m.RENAME]:
            if not event.mask & bit:
                continue
            asked = ignored = False
            for on, (mask, ignore, own, _) in self.marks.items():
                roles = self.roles(on, event, bit)
                flags = ignore if own else m.ONDIR | mask & m.EVENT_ON_CHILD
                for role in roles & {"self", "child"}:
                    asked |= bool(mask & bit) and _applies(mask, ondir, role)
                    ignored |= bool(ignore & bit) and _applies(flags, ondir, role)
                if bit == m.RENAME and roles and _applies(mask, ondir, "self"):
                    halves |= roles & {"old", "new"}
            if asked and not ignored:
                out |= bit
        return (out | event.mask & m.ONDIR if out else 0), halves


def _applies(flags, ondir, role):
    return not (ondir and not flags & m.ONDIR) and not (
        role == "child" and not flags & m.EVENT_ON_CHILD
    )


def told(event):
    if event.mask & m.Q_OVERFLOW:
        return ["lost", event.count]
    entry = event.key, event.dir, event.name, event.dir2, event.name2, event.pid
    return [(*entry, event.mask & (m.ONDIR | m.RENAME)), event.mask]


class Listener:
    """A group, what it should have queued, and what of its marks and end is under way."""

    def __init__(self, group):
        self.group = group
        self.slow = Slow()
        self.queue = []  # [key, mask], or ["lost", count]
        self.runs = []
        self.waiters = []
        self.woken = 0


class Notify(RuleBasedStateMachine):
    groups = Bundle("groups")
    held = Bundle("held")

    def __init__(self):
        super().__init__()
        self.core = Fsnotify()
        self.listeners = []
        self.kept = []  # (event, its fields when it was read)

    @initialize(target=groups)
    def begin(self):
        return multiple(self.make_group(), self.make_group())

    # Sequences in which nothing is marked test nothing.
    @initialize(on=objects, other=objects, mask=masks, ignore=masks, new=st.booleans())
    def begin_with_marks(self, on, other, mask, ignore, new):
        listener = self.listeners[0] if self.listeners else None
        if listener is not None:
            self._mark(listener, on, mask, m.FLAGS, 0)
            flags = IGNORE | SURV_MODIFY if new else IGNORED_MASK
            self._mark(listener, other, ignore, m.FLAGS, flags)

    @rule(target=groups)
    def another_group(self):
        return self.make_group() if len(self.listeners) < 5 else multiple()

    def make_group(self):
        listener = Listener(self.core.group(queue_limit=LIMIT, marks_limit=4))
        self.listeners.append(listener)
        return listener

    @rule(
        listener=groups,
        on=objects,
        mask=masks,
        extra=flags_of_mask,
        flags=st.sampled_from(
            [0, 0, 0, IGNORE | SURV_MODIFY, IGNORE, IGNORED_MASK, IGNORED_MASK | SURV_MODIFY]
        ),
    )
    def mark(self, listener, on, mask, extra, flags):
        self._mark(listener, on, mask, extra, flags)

    def _mark(self, listener, on, mask, extra, flags):
        group, slow = listener.group, listener.slow
        mask |= extra
        if on == On(INODE, FS, b"f"):
            mask = (mask & (m.ON_CHILD | m.SELF)) or m.MODIFY
        attached = dict(group.marks)
        try:
            group.add(on, mask, flags)
        except ClosedError:
            assert group.state != "OPEN"
            return
        except MarkRefused:
            assert group.marks == attached
            return
        assert group.state == "OPEN"
        assert group.marks_used <= 4
        mark = slow.marks.setdefault(on, [0, 0, False, False])
        if on.kind == FILESYSTEM or (on.kind == INODE and not on.directory):
            mask &= ~m.EVENT_ON_CHILD
        if flags & IGNORED_MASK:
            mask &= ~m.FLAGS
        if flags & (IGNORE | IGNORED_MASK):
            mark[1] |= mask
            mark[2] |= bool(flags & IGNORE)
            mark[3] |= bool(flags & SURV_MODIFY)
        else:
            mark[0] |= mask

    @rule(target=held, listener=groups, data=st.data())
    def hold_a_mark(self, listener, data):
        marks = list(listener.group.marks.values())
        if not marks:
            return multiple()
        mark = data.draw(st.sampled_from(marks))
        assert mark.get()
        return mark

    @rule(mark=consumes(held))
    def let_a_mark_go(self, mark):
        assert mark.state != "FREED"
        mark.put()
        if not mark.refs:
            assert mark.state in ("ATTACHED", "FREED")

    @rule(listener=groups, data=st.data())
    def remove_a_mark(self, listener, data):
        marks = list(listener.group.marks.values())
        if marks and listener.group.state == "OPEN":
            mark = data.draw(st.sampled_from(marks))
            del listener.slow.marks[mark.on]
            mark.destroy()
            assert (mark.state == "FREED") == (not mark.refs)
            assert not mark.get()
            mark.destroy()  # done once

    @rule(found=st.lists(events(), min_size=1, max_size=4))
    def send(self, found):
        for event in found:
            before = [len(listener.group.queue) for listener in self.listeners]
            woken = [listener.woken for listener in self.listeners]
            self.core.send([event])
            for listener, old, calls in zip(self.listeners, before, woken, strict=True):
                self._expect(listener, event)
                if listener.group.state == "OPEN":
                    queued = [told(event) for event, _ in listener.group.queue._events]
                    assert queued == listener.queue
                if listener.waiters:
                    now = len(listener.group.queue)
                    assert listener.woken - calls == (
                        len(listener.waiters) if now and not old else 0
                    )

    def _expect(self, listener, event):
        if listener.group.state != "OPEN":
            return
        mask, halves = listener.slow.expected(event)
        if not mask:
            return
        folder = event.dir, event.name
        second = event.dir2, event.name2
        if mask & m.RENAME:
            folder = folder if "old" in halves else (None, None)
            second = second if "new" in halves else (None, None)
        key = (event.key, *folder, *second, event.pid, mask & (m.ONDIR | m.RENAME))
        merges = not (mask & m.RENAME and folder[0] is None)
        for entry in reversed(listener.queue):
            if merges and entry[0] == key:
                entry[1] |= mask
                return
        if len(listener.queue) < LIMIT:
            listener.queue.append([key, mask])
        else:
            # A record of a directory's event and an object's is two events, as in Linux.
            count = bool(mask & m.DIRENT) + bool(mask & m.EVENTS & ~m.DIRENT)
            if listener.queue[-1][0] != "lost":
                listener.queue.append(["lost", 0])
            if listener.queue[-1][1] is not None:
                listener.queue[-1][1] += count

    @rule(count=st.sampled_from([None, 3]))
    def the_source_loses(self, count):
        self.core.lost(FS, count, None)
        for listener in self.listeners:
            if listener.group.state == "OPEN" and listener.group.marks:
                last = listener.queue[-1] if listener.queue else [None]
                if last[0] != "lost":
                    listener.queue.append(["lost", 0])
                    last = listener.queue[-1]
                last[1] = None if count is None or last[1] is None else last[1] + count

    @rule(listener=groups, most=st.sampled_from([None, 1, 2]))
    def read(self, listener, most):
        try:
            found = listener.group.read(most)
        except ClosedError:
            assert listener.group.state != "OPEN"
            return
        assert listener.group.state == "OPEN", "an event after the end began"
        count = len(listener.queue) if most is None else min(most, len(listener.queue))
        expected, listener.queue[:count] = listener.queue[:count], []
        assert [told(event) for event in found] == expected
        self.kept += [(event, str(event)) for event in found]

    @rule(listener=groups)
    def wait(self, listener):
        def wake():
            listener.woken += 1

        try:
            listener.group.wait(wake)
        except ClosedError:
            assert listener.group.state != "OPEN"
        else:
            listener.waiters.append(wake)

    @precondition(lambda self: any(listener.waiters for listener in self.listeners))
    @rule(data=st.data())
    def leave(self, data):
        listener = data.draw(st.sampled_from([x for x in self.listeners if x.waiters]))
        listener.group.leave(listener.waiters.pop())

    @rule(listener=groups)
    def begin_to_close(self, listener):
        listener.runs.append(listener.group.close())

    @precondition(lambda self: any(listener.runs for listener in self.listeners))
    @rule(data=st.data(), kill=st.booleans())
    def go_on_closing(self, data, kill):
        listener = data.draw(st.sampled_from([x for x in self.listeners if x.runs]))
        run = data.draw(st.sampled_from(listener.runs))
        group = listener.group
        if run.at is None or kill:
            run.kill()
            listener.runs.remove(run)
            return
        if not run.ready:
            waits = {"wait for waiters": listener.waiters, "wait for marks": group.dying}
            assert waits[run.at]
            with pytest.raises(LifetimeError, match="yet"):
                run.step()
            return
        run.step()
        if run.at is None:
            self._ended(listener)

    def _ended(self, listener):
        group = listener.group
        assert group.state == "CLOSED"
        assert not group.marks
        assert not group.dying
        assert not len(group.queue)
        assert not listener.waiters
        assert group not in self.core.groups
        assert group.marks_used == 0

    @invariant()
    def what_was_read_stays(self):
        for event, text in self.kept:
            assert str(event) == text

    @invariant()
    def the_index_holds_what_is_attached(self):
        indexed = Counter()
        for connector in self.core.superblock(FS).connectors():
            assert connector.marks
            indexed.update(connector.marks.keys())
        attached = Counter(
            mark for listener in self.listeners for mark in listener.group.marks.values()
        )
        assert indexed == attached

    @invariant()
    def no_mark_is_freed_while_a_reader_has_it(self):
        for listener in self.listeners:
            for mark in listener.group.dying:
                assert mark.refs, "a dying mark without readers is freed at once"

    def teardown(self):
        """Every group can be ended from wherever it is, once its readers have left."""
        for listener in self.listeners:
            group = listener.group
            for waiter in listener.waiters:
                group.leave(waiter)
            listener.waiters.clear()
            for mark in [*group.marks.values(), *group.dying]:
                while mark.refs:
                    mark.put()
            assert group.close().run() or group.state == "CLOSED"
            self._ended(listener)
        assert not self.core.groups
        assert not self.core.superblock(FS).connectors()


Notify.TestCase.settings = settings(
    max_examples=250,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=False,
    database=None,
)
TestNotify = Notify.TestCase
