"""Notify without a kernel: names of masks, refusals, the queue, losses, and a group's end."""

import typing

import msgspec
import pytest

from fanwise import BusyError, ClosedError, LifetimeError, MarkRefused
from fanwise.kernel import records
from fanwise.notify import mask as m
from fanwise.notify.event import ErrorEvent, Event, PermissionEvent
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.group import CLOSE, CONTENT, NOTIF, PRE_CONTENT
from fanwise.notify.mark import (
    FILESYSTEM,
    IGNORE,
    IGNORED_MASK,
    INODE,
    MOUNT,
    SUBTREE,
    SURV_MODIFY,
    On,
)
from fanwise.notify.queue import BUCKETS, MERGE_DEPTH, MOST_ROOTS, Queue
from fanwise.notify.verdict import AS_LINUX
from fanwise.sources.events import to_events

WHOLE = On(FILESYSTEM, 1)
DIRECTORY = On(INODE, 1, b"d", True)
FILE = On(INODE, 1, b"f")


@pytest.fixture
def core():
    return Fsnotify()


def change(name=b"f", mask=m.MODIFY, **more):
    return Event(mask, 1, name, b"d", name, **more)


# -- masks --


def test_masks_have_names():
    assert m.show(m.CREATE | m.ONDIR) == "CREATE|ONDIR"
    assert m.parse("CREATE | ONDIR") == m.CREATE | m.ONDIR
    assert m.show(0) == "0"
    assert m.show(1 << 31) == "0x80000000"
    assert all(m.parse(name) == bit and m.show(bit) == name for name, bit in m.NAMES.items())
    assert len(m.NAMES) == 24
    with pytest.raises(MarkRefused, match="no event is named 'create'; valid are: ACCESS"):
        m.parse("create")


# -- refusals; those that Linux has too are compared with Linux in tests/kernel --


@pytest.mark.parametrize(
    ("on", "mask", "flags", "message"),
    [
        (On(MOUNT, 1), m.OPEN, 0, "records do not name the mount; mark a subtree"),
        (On("inodes", 1), m.OPEN, 0, "no mark is on a 'inodes'"),
        (WHOLE, m.MNT_ATTACH, 0, "MNT_ATTACH is of a mount namespace"),
        (WHOLE, m.Q_OVERFLOW, 0, "cannot be asked for"),
        (WHOLE, 0, 0, "not a mask of events: 0"),
        (WHOLE, m.OPEN, 0x200, "unknown flags 0x200"),
        (WHOLE, m.OPEN, IGNORE | IGNORED_MASK, "exclude each other"),
        (FILE, m.CREATE | m.OPEN, 0, "CREATE is about directories"),
        (On(SUBTREE, 1, b"d"), m.OPEN, IGNORED_MASK, "on a subtree survives"),
        (DIRECTORY, m.OPEN, IGNORE, "on a directory survives modifications; add SURV_MODIFY"),
    ],
)
def test_what_a_mark_cannot_be_is_refused(core, on, mask, flags, message):
    refused(core, core.group(), on, mask, flags, message)


@pytest.mark.parametrize(
    ("cls", "mask", "flags", "message"),
    [
        (NOTIF, m.OPEN_PERM, 0, "OPEN_PERM waits for a verdict, and a group of class NOTIF gives"),
        (NOTIF, m.OPEN_PERM, IGNORE | SURV_MODIFY, "gives none; make the group with class CONTENT"),
        (CONTENT, m.PRE_ACCESS, 0, "class CONTENT is asked after that; make the group with"),
        (CONTENT, m.CREATE, 0, "CREATE is not about an open file, and a group of class CONTENT"),
        (PRE_CONTENT, m.FS_ERROR | m.OPEN, 0, "FS_ERROR is not about an open file"),
        (PRE_CONTENT, m.PRE_ACCESS | m.ONDIR, 0, "directories have no PRE_ACCESS; leave out ONDIR"),
        (PRE_CONTENT, m.PRE_ACCESS, 0, "not declared what an access gets that nobody answers"),
    ],
)
def test_what_a_class_cannot_ask_for_is_refused(core, cls, mask, flags, message):
    refused(core, core.group(cls), WHOLE, mask, flags, message)


def refused(core, group, on, mask, flags, message):
    with pytest.raises(MarkRefused, match=message):
        group.add(on, mask, flags)
    assert not group.marks
    assert not core.superblock(1).connectors()


def test_limits_and_classes(core):
    with pytest.raises(MarkRefused, match="no class of groups is 'LATE'"):
        core.group("LATE")
    group = core.group(CONTENT, marks_limit=1)
    mark = group.add(FILE, m.OPEN)
    group.add(FILE, m.MODIFY)  # the same mark
    with pytest.raises(MarkRefused, match="has 1 marks, its limit"):
        group.add(WHOLE, m.OPEN)
    mark.get()
    group.remove(FILE, m.OPEN | m.MODIFY)
    assert mark.state == "DYING"
    group.add(WHOLE, m.OPEN)  # the place is given back although a reader has the mark
    with pytest.raises(MarkRefused, match="no mark on this inode"):
        group.remove(FILE, m.OPEN)
    mark.put()
    assert mark.state == "FREED"


# -- the queue --


def test_merging_ends_with_128_newer_events_in_the_bucket():
    queue = Queue(1 << 20)
    first = change()
    bucket = hash(b"f") % BUCKETS ^ 0
    queue.add(Event(m.OPEN, 1, b"f", b"d", b"f"), m.OPEN)

    def bucket_of(event):
        return (hash(event.key) ^ hash(event.name) ^ event.pid) % BUCKETS

    def fill(count, start):
        number = start
        while count:
            other = Event(m.OPEN, 1, b"%d" % number, b"d", b"name")
            if bucket_of(other) == bucket_of(first):
                queue.add(other, m.OPEN)
                count -= 1
            number += 1
        return number

    assert bucket is not None
    after = fill(MERGE_DEPTH - 1, 0)
    queue.add(first, m.MODIFY)  # the 128th, still seen
    length = len(queue)
    assert length == MERGE_DEPTH
    fill(1, after)
    queue.add(first, m.ATTRIB)
    assert len(queue) == length + 2
    found = queue.pop()
    assert (found[0].mask, found[-1].mask) == (m.OPEN | m.MODIFY, m.ATTRIB)


def test_what_was_read_does_not_merge(core):
    group = core.group()
    group.add(WHOLE, m.MODIFY | m.OPEN)
    for most in (None, 1):
        core.send([change()])
        (first,) = group.read(most)
        core.send([change(mask=m.OPEN)])
        assert [event.mask for event in group.read(most)] == [m.OPEN]
        assert first.mask == m.MODIFY


def test_each_gap_has_one_overflow(core):
    group = core.group(queue_limit=2)
    group.add(WHOLE, m.MODIFY | m.OPEN)
    core.send([change(b"%d" % number) for number in range(5)])
    core.send([change(b"0", m.OPEN)])  # needs no room
    assert [event.mask for event in group.read(1)] == [m.MODIFY | m.OPEN]
    core.send([change(b"6")])  # still no room: an event and the overflow are there
    group.read(1)
    core.send([change(b"7"), change(b"8"), change(b"9")])
    told = [(event.name, event.count, event.roots) for event in group.read()]
    assert told == [(None, 4, (b"d",)), (b"7", None, None), (None, 2, (b"d",))]
    assert group.read() == []


def test_roots_of_an_overflow_are_bounded(core):
    group = core.group(queue_limit=0)
    group.add(WHOLE, m.MODIFY)
    core.send([Event(m.MODIFY, 1, b"f", b"%d" % n, b"f") for n in range(MOST_ROOTS)])
    (lost,) = group.read()
    assert (lost.count, len(lost.roots)) == (MOST_ROOTS, MOST_ROOTS)
    core.send([Event(m.MODIFY, 1, b"f", b"%d" % n, b"f") for n in range(MOST_ROOTS + 1)])
    (lost,) = group.read()
    assert (lost.count, lost.roots) == (MOST_ROOTS + 1, None)


def test_a_loss_of_the_source_is_told_to_whoever_has_a_mark_there(core):
    here, there = core.group(), core.group()
    here.add(DIRECTORY, m.CREATE)
    there.add(On(FILESYSTEM, 2), m.CREATE)
    core.send([Event(m.Q_OVERFLOW, 1)])
    core.lost(1, 3, (b"d",))
    (lost,) = here.read()
    assert (lost.mask, lost.count, lost.roots) == (m.Q_OVERFLOW, None, None)
    assert there.read() == []
    core.lost(1, 3, (b"d",))
    core.lost(1, 2, (b"d", b"e"))
    (lost,) = here.read()
    assert (lost.count, lost.roots) == (5, (b"d", b"e"))


# -- marks and objects that end --


def test_keys_of_two_filesystems_are_apart(core):
    group = core.group()
    group.add(DIRECTORY, m.CREATE)
    core.send([Event(m.CREATE, 2, b"f", b"d", b"f")])
    assert group.read() == []


def test_the_last_event_of_an_object_ends_its_marks(core):
    group = core.group()
    marks = [group.add(FILE, m.DELETE_SELF), group.add(On(SUBTREE, 1, b"f"), m.CREATE)]
    other = group.add(WHOLE, m.OPEN)
    core.send([Event(m.DELETE_SELF, 1, b"f")])
    assert len(group.read()) == 1
    assert [mark.state for mark in (*marks, other)] == ["FREED", "FREED", "ATTACHED"]


def test_a_detached_mark_matches_nothing_and_is_still_on_its_object(core):
    group = core.group()
    mark = group.add(FILE, m.MODIFY)
    core.send([change()])
    group.read()
    mark.detach()
    core.send([change()])
    assert group.read() == []
    assert mark.connector is not None
    assert mark.state == "DETACHED"
    assert group.close().run()
    assert mark.state == "FREED"


def test_one_record_of_two_events_is_matched_bit_by_bit(core):
    """A parent is told of a child's ATTRIB and never of its MOVE_SELF, whatever the record held."""
    group = core.group()
    group.add(DIRECTORY, m.ATTRIB | m.MOVE_SELF | m.FLAGS)
    moved = m.ATTRIB | m.MOVE_SELF | m.ONDIR
    core.send([Event(moved, 1, b"below", ancestors=(b"d",))])
    assert [event.mask for event in group.read()] == [m.ATTRIB | m.ONDIR]
    core.send([Event(moved, 1, b"d", ancestors=(b"r",))])
    assert [event.mask for event in group.read()] == [moved]


def test_unmounting_ends_every_mark_and_keeps_what_is_queued(core):
    group = core.group()
    marks = [group.add(on, m.OPEN) for on in (WHOLE, FILE, On(SUBTREE, 1, b"d"))]
    far = group.add(On(FILESYSTEM, 2), m.OPEN)
    core.send([change(mask=m.OPEN)])
    core.unmount(1)
    assert [mark.state for mark in marks] == ["FREED"] * 3
    assert far.state == "ATTACHED"
    assert len(group.read()) == 1
    core.send([change(mask=m.OPEN)])
    assert group.read() == []


# -- the end of a group --


def full(core):
    """A group with marks, an event, an overflow, and an access that waits."""
    group = core.group(CONTENT, queue_limit=1, policy=AS_LINUX)
    for on in (WHOLE, FILE, DIRECTORY):
        group.add(on, m.MODIFY | m.OPEN_PERM)
    core.send([change(b"1"), change(b"2")])
    access = core.access(PermissionEvent(m.OPEN_PERM, 1, b"f"))
    asking = access.ask()
    assert not asking.run()
    assert asking.at == "take the verdict"
    assert len(group.queue) == 3
    return group, asking


def ended(group, asking):
    """End the group; the access goes on when it can."""

    def wait(run):
        assert run.at == "wait for askers"
        asking.step()

    assert group.close().run(wait=wait)
    assert group.state == "CLOSED"
    asking.run()
    assert asking.result == 0


@pytest.mark.parametrize("step", CLOSE.steps)
def test_an_end_that_is_cut_off_is_finished_by_the_next(core, step):
    group, asking = full(core)
    other = core.group()
    other.add(FILE, m.MODIFY)
    assert not group.close().run(kill=step, wait=lambda run: asking.step())
    assert group.state != "CLOSED"
    core.send([change()])  # the rest goes on
    assert len(other.read()) == 1
    ended(group, asking)
    assert group not in core.groups
    assert len(group.queue) == len(group.marks) == len(group.dying) == 0


@pytest.mark.parametrize("step", [step for step in CLOSE.steps if step != "answer an access"])
def test_the_slower_of_two_ends_finds_all_done(core, step):
    group = group2(core)
    slow, fast = group.close(), group.close()
    while slow.at != step:
        slow.step()
    assert fast.run()
    assert slow.run()
    assert group.state == "CLOSED"


@pytest.mark.parametrize("step", CLOSE.steps)
def test_a_fault_in_a_step_leaves_it_to_the_next(core, step):
    group, asking = full(core)
    with pytest.raises(MemoryError):
        group.close().run(faults={step: MemoryError()}, wait=lambda run: asking.step())
    ended(group, asking)


def test_the_order_of_the_end(core):
    group, asking = full(core)
    run, seen = group.close(), []
    while run.at is not None:
        if run.at == "wait for askers":
            assert not run.ready
            asking.run()
        step = run.step()
        if step not in seen:
            seen.append(step)
        if step == "stop queueing":
            core.send([change(b"3")])  # the marks still match
            with pytest.raises(ClosedError):
                group.read()
        if step == "wait for marks":
            assert len(group.queue) == 2  # events are freed after the marks
    assert seen == list(CLOSE.steps)


def test_events_wait_for_a_mark_that_a_reader_has(core):
    group, asking = full(core)
    mark = group.marks[FILE]
    mark.get()
    run = group.close()
    assert not run.run(kill="wait for askers")
    asking.run()
    run = group.close()
    assert not run.run()
    assert run.at == "wait for marks"
    assert (mark.state, len(group.queue)) == ("DYING", 2)
    mark.put()
    assert run.run()


def test_a_group_is_a_context_manager(core):
    with core.group() as group:
        group.add(FILE, m.MODIFY)
        core.send([change()])
        events = group.read()
    assert group.state == "CLOSED"
    assert events[0].name == b"f"
    with (
        pytest.raises(BusyError, match="before 'wait for marks'; let the readers leave"),
        group2(core) as group,
    ):
        group.marks[FILE].get()


def group2(core):
    group = core.group()
    group.add(FILE, m.MODIFY)
    return group


def test_an_event_refers_to_values_only():
    """An event that held its mark would keep it from being freed before the events are."""
    allowed = {int, bytes, str, type(None), tuple, typing.get_type_hints(Event)["fs"]}
    for event in (ErrorEvent, PermissionEvent):
        hints = typing.get_type_hints(event)
        for field in msgspec.structs.fields(event):
            kinds = typing.get_args(hints[field.name]) or (hints[field.name],)
            for kind in kinds:
                assert (typing.get_origin(kind) or kind) in allowed or kind is Ellipsis


def test_lifetimes_refuse_what_is_out_of_order(core):
    from fanwise.notify.group import GROUP

    group = core.group()
    group.add(FILE, m.MODIFY)
    with pytest.raises(LifetimeError, match="no transition 'flush' from OPEN"):
        GROUP.advance(group, "flush")
    GROUP.advance(group, "stop")
    with pytest.raises(LifetimeError, match="an unmarked group has no mark attached"):
        GROUP.advance(group, "unmark")


# -- from records --


def test_events_of_records():
    def fid(kind, key, name=None):
        return records.Fid(kind, b"fsid", key, name)

    above = {b"d": (b"r",), b"r": (), b"e": (b"r",)}
    got = list(
        to_events(
            [
                records.Record(
                    m.CREATE, 5, -1, (fid(records.DFID_NAME, b"d", b"f"), fid(records.FID, b"f"))
                ),
                records.Record(m.ATTRIB | m.ONDIR, 5, -1, (fid(records.DFID_NAME, b"d", b"."),)),
                records.Record(m.DELETE_SELF, 5, -1, (fid(records.FID, b"f"),)),
                records.Record(
                    m.RENAME,
                    5,
                    -1,
                    (
                        fid(records.OLD_DFID_NAME, b"d", b"f"),
                        fid(records.NEW_DFID_NAME, b"e", b"g"),
                        fid(records.FID, b"f"),
                    ),
                ),
                records.Record(m.Q_OVERFLOW, 0, -1, ()),
            ],
            1,
            above.__getitem__,
        )
    )
    up = (b"r",)
    assert got == [
        Event(m.CREATE, 1, b"f", b"d", b"f", pid=5, ancestors=up),
        Event(m.ATTRIB | m.ONDIR, 1, b"d", pid=5, ancestors=up),
        Event(m.DELETE_SELF, 1, b"f", pid=5),
        Event(m.RENAME, 1, b"f", b"d", b"f", b"e", b"g", 5, up, up),
        Event(m.MOVED_FROM, 1, b"f", b"d", b"f", pid=5, ancestors=up),
        Event(m.MOVED_TO, 1, b"f", b"e", b"g", pid=5, ancestors=up),
        Event(m.Q_OVERFLOW, 1),
    ]


# -- what random sequences meet too rarely --


def test_events_of_a_directory_and_of_a_file_do_not_merge(core):
    group = core.group()
    group.add(WHOLE, m.CREATE | m.DELETE | m.ONDIR)
    core.send([change(mask=m.CREATE | m.ONDIR), change(mask=m.DELETE)])
    assert len(group.read()) == 2


def test_what_was_read_alone_does_not_merge(core):
    group = core.group()
    group.add(WHOLE, m.MODIFY | m.OPEN)
    core.send([change(b"1"), change(b"2")])
    (first,) = group.read(1)
    core.send([change(b"1", m.OPEN)])
    assert first.mask == m.MODIFY
    assert [event.mask for event in group.read()] == [m.MODIFY, m.OPEN]


def test_the_end_wakes_waiters_and_waits_for_them(core):
    group, calls = core.group(), []

    def wake():
        calls.append(1)

    group.wait(wake)
    run = group.close()
    assert not run.run()
    assert (run.at, run.ready, calls) == ("wait for waiters", False, [1])
    group.leave(wake)
    assert run.run()


def test_nothing_is_queued_once_the_end_has_begun(core):
    group = core.group()
    group.add(WHOLE, m.MODIFY)
    run = group.close()
    run.step()
    core.send([change()])
    core.lost(1)
    assert len(group.queue) == 0
    assert run.run()
