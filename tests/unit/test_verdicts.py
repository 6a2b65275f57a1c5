"""Verdicts and reports without a kernel: who is asked, who answers, and what nobody answers."""

import errno

import pytest

from fanwise import AnswerRefused, ClosedError, LifetimeError, MarkRefused
from fanwise.notify import mask as m
from fanwise.notify.access import ACCESS
from fanwise.notify.event import ErrorEvent, Event, PermissionEvent
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.group import CONTENT, NOTIF, PRE_CONTENT
from fanwise.notify.mark import FILESYSTEM, IGNORE, INODE, SUBTREE, SURV_MODIFY, On
from fanwise.notify.verdict import ALLOW, AS_LINUX, DENY, ERRNOS, QUESTION, Policy

WHOLE = On(FILESYSTEM, 1)
FILE = On(INODE, 1, b"f")
DIRECTORY = On(INODE, 1, b"d", True)
CAREFUL = Policy(late=errno.EAGAIN, closing=errno.EIO, patience=10)


@pytest.fixture
def core():
    return Fsnotify()


def listener(core, cls=PRE_CONTENT, mask=m.OPEN_PERM, on=WHOLE, policy=CAREFUL, **limits):
    group = core.group(cls, policy=policy, **limits)
    group.add(on, mask)
    return group


def opening(key=b"f", mask=m.OPEN_PERM, **more):
    return PermissionEvent(mask, 1, key, b"d", b"name", ancestors=(b"r",), **more)


class Opener:
    """An access, as far as it gets."""

    def __init__(self, core, event=None):
        self.wakes = 0
        self.access = core.access(event or opening(), self.wake)
        self.run = self.access.ask()
        self.go()

    def wake(self):
        self.wakes += 1

    def go(self):
        """Its verdict, None while it waits."""
        self.run.run()
        return self.access.verdict


def number(group):
    (event,) = group.read()
    return event.number


# -- who is asked --


def test_an_access_that_nobody_asked_for_is_allowed(core):
    group = core.group()
    group.add(WHOLE, m.OPEN)
    assert not core.asks(opening())
    assert Opener(core).go() == ALLOW
    assert Opener(core, PermissionEvent(m.OPEN_PERM, 2)).go() == ALLOW
    assert group.read() == []


@pytest.mark.parametrize("verdict", [ALLOW, *sorted(ERRNOS)])
def test_an_access_waits_for_its_verdict(core, verdict):
    group = listener(core)
    assert core.asks(opening())
    opener = Opener(core)
    assert (opener.go(), opener.run.ready, opener.wakes) == (None, False, 0)
    (event,) = group.read()
    assert event == opening(number=event.number)
    assert opener.go() is None
    assert group.answer(event.number, verdict)
    assert opener.wakes == 1
    assert (opener.go(), opener.run.result) == (verdict, verdict)


def test_pre_content_is_asked_first_and_a_denial_ends_the_asking(core):
    late, first, second = (
        listener(core, CONTENT, policy=AS_LINUX),
        listener(core),
        listener(core),
    )
    opener = Opener(core)
    for group in (first, second, late):
        assert [len(other.queue) for other in (first, second, late)].count(1) == 1
        assert group.answer(number(group), ALLOW)
        assert (opener.go() is None) == (group is not late)
    assert opener.go() == ALLOW
    opener = Opener(core)
    first.answer(number(first), ALLOW)
    opener.go()
    second.answer(number(second), errno.EBUSY)
    assert opener.go() == errno.EBUSY
    assert late.read() == []


def test_who_is_asked_next_goes_by_the_marks_at_its_turn(core):
    first, gone, silenced = listener(core), listener(core), listener(core)
    opener = Opener(core)
    gone.remove(WHOLE, m.OPEN_PERM)
    silenced.add(FILE, m.OPEN_PERM, IGNORE | SURV_MODIFY)
    new = listener(core, CONTENT, policy=AS_LINUX)
    first.answer(number(first), ALLOW)
    assert opener.go() is None
    assert (len(gone.queue), len(silenced.queue), len(new.queue)) == (0, 0, 1)
    new.answer(number(new), DENY)
    assert opener.go() == errno.EPERM


@pytest.mark.parametrize(
    ("on", "mask", "asked"),
    [
        (FILE, m.OPEN_PERM, True),
        (FILE, m.ACCESS_PERM, False),
        (On(INODE, 1, b"g"), m.OPEN_PERM, False),
        (DIRECTORY, m.OPEN_PERM, False),
        (DIRECTORY, m.OPEN_PERM | m.EVENT_ON_CHILD, True),
        (On(SUBTREE, 1, b"r"), m.OPEN_PERM | m.EVENT_ON_CHILD, True),
        (On(SUBTREE, 1, b"x"), m.OPEN_PERM | m.EVENT_ON_CHILD, False),
        (On(FILESYSTEM, 2), m.OPEN_PERM, False),
    ],
)
def test_which_marks_ask(core, on, mask, asked):
    listener(core, on=on, mask=mask)
    assert core.asks(opening()) == asked


def test_directories_are_asked_for_with_ondir(core):
    group = listener(core)
    folder = PermissionEvent(m.OPEN_PERM | m.ONDIR, 1, b"d", ancestors=(b"r",))
    assert not core.asks(folder)
    group.add(WHOLE, m.ONDIR)
    assert core.asks(folder)


def test_an_ignore_mask_is_not_asked(core):
    group = listener(core, mask=m.OPEN_PERM | m.PRE_ACCESS)
    group.add(FILE, m.OPEN_PERM, IGNORE | SURV_MODIFY)
    assert not core.asks(opening())
    assert core.asks(opening(b"g"))
    assert core.asks(opening(mask=m.PRE_ACCESS, range=(4096, 8192)))


def test_a_range_is_told(core):
    group = listener(core, mask=m.PRE_ACCESS)
    Opener(core, opening(mask=m.PRE_ACCESS, range=(4096, 8192)))
    (event,) = group.read()
    assert event.range == (4096, 8192)
    assert str(event) == "1: PRE_ACCESS b'name' pid 0 [4096, +8192]"


@pytest.mark.parametrize("mask", [0, m.OPEN, m.OPEN_PERM | m.ACCESS_PERM, m.OPEN_PERM | m.OPEN])
def test_an_access_is_one_permission_event(core, mask):
    with pytest.raises(ValueError, match="one permission event at a time"):
        core.access(PermissionEvent(mask, 1))
    with pytest.raises(ValueError, match=r"goes by access\(\)"):
        core.send([PermissionEvent(mask | m.OPEN_PERM, 1)])


def test_who_read_an_event_is_who_its_access_waits_for():
    core = Fsnotify(current=lambda: "the filler")
    group = listener(core)
    opener = Opener(core)
    assert (opener.run.on.name, opener.run.on.holders) == (
        "the verdict of PRE_CONTENT on OPEN_PERM",
        (),
    )
    with group.reader() as reader:
        reader.take()
        assert opener.run.on.holders == ("the filler",)
    assert opener.run.on.holders == ()
    group.read()
    assert opener.run.on.holders == ("the filler",)


# -- answers --


def test_answers_that_cannot_be_taken_change_nothing(core):
    group = listener(core)
    opener = Opener(core)
    with pytest.raises(AnswerRefused, match="no event 1 waits for an answer: it has not been read"):
        group.answer(1, ALLOW)
    at = number(group)
    with pytest.raises(AnswerRefused, match="no event 7 waits for an answer; answer each event"):
        group.answer(7, ALLOW)
    with pytest.raises(AnswerRefused, match="cannot be 2: it is not ALLOW, nor one of EAGAIN, EB"):
        group.answer(at, errno.ENOENT)
    assert opener.go() is None
    assert group.answer(at, ALLOW)
    with pytest.raises(AnswerRefused, match=f"no event {at} waits"):
        group.answer(at, DENY)
    assert opener.go() == ALLOW


def test_class_content_denies_with_eperm_only(core):
    group = listener(core, CONTENT, policy=AS_LINUX)
    opener = Opener(core)
    at = number(group)
    with pytest.raises(AnswerRefused, match="class CONTENT denies with EPERM only"):
        group.answer(at, errno.EIO)
    assert group.answer(at, DENY)
    assert opener.go() == errno.EPERM


def test_numbers_are_never_used_again(core):
    group = listener(core)
    seen = set()
    for _ in range(20):
        opener = Opener(core)
        seen.add(number(group))
        group.answer(max(seen), ALLOW)
        opener.go()
    assert len(seen) == 20


def test_what_a_reader_does_with_its_event_changes_nothing(core):
    group = listener(core, policy=CAREFUL)
    Opener(core)
    with group.reader() as reader:
        (event,) = reader.take()
        event.mask, event.key, event.number = 0, b"other", 99
    (again,) = group.read()
    assert (again.mask, again.key, again.number) == (m.OPEN_PERM, b"f", 1)


# -- policy --


def test_policies_must_be_possible(core):
    with pytest.raises(MarkRefused, match="a group of class NOTIF is never asked"):
        core.group(NOTIF, policy=AS_LINUX)
    with pytest.raises(MarkRefused, match="a policy cannot be 11: class CONTENT denies with EPERM"):
        core.group(CONTENT, policy=CAREFUL)
    with pytest.raises(MarkRefused, match="a policy cannot be 2"):
        core.group(PRE_CONTENT, policy=CAREFUL._replace(left=errno.ENOENT))
    with pytest.raises(MarkRefused, match="a policy cannot be 2"):
        core.group(PRE_CONTENT, policy=CAREFUL._replace(full=errno.ENOENT))


def test_a_deadline_counts_from_the_first_tick(core):
    group = listener(core)
    assert core.tick(0) is None
    first = Opener(core)
    assert core.tick(100) == 110
    second = Opener(core)
    assert core.tick(109) == 110
    number_of_first, _ = (event.number for event in group.read())
    assert core.tick(110) == 119
    assert (first.wakes, first.go()) == (1, errno.EAGAIN)
    assert not group.answer(number_of_first, ALLOW)  # late, and harmless
    with pytest.raises(AnswerRefused):
        group.answer(number_of_first, ALLOW)
    assert second.go() is None
    assert core.tick(119) is None
    assert second.go() == errno.EAGAIN


def test_what_nobody_read_by_its_deadline_is_off_the_queue(core):
    group = listener(core, mask=m.OPEN_PERM | m.OPEN)
    core.send([Event(m.OPEN, 1, b"1")])
    opener = Opener(core)
    core.send([Event(m.OPEN, 1, b"2")])
    core.tick(0)
    core.tick(10)
    assert opener.go() == errno.EAGAIN
    assert [event.key for event in group.read()] == [b"1", b"2"]


def test_without_patience_there_is_no_deadline(core):
    group = listener(core, policy=CAREFUL._replace(patience=None))
    opener = Opener(core)
    assert core.tick(0) is None
    assert core.tick(1e9) is None
    assert opener.go() is None
    group.answer(number(group), ALLOW)


@pytest.mark.parametrize("full", [None, ALLOW, errno.EBUSY])
def test_a_group_with_its_number_of_questions_answers_at_once(core, full):
    group = listener(core, policy=CAREFUL._replace(full=full), questions_limit=2)
    waiting = [Opener(core), Opener(core)]
    one, other = (event.number for event in group.read())
    waiting[0].access.interrupt()  # its number still waits for the reader
    assert Opener(core).go() == (errno.EAGAIN if full is None else full)
    assert not group.answer(one, ALLOW)
    third = Opener(core)
    assert third.go() is None
    group.answer(other, ALLOW)
    assert waiting[1].go() == ALLOW


def test_questions_take_no_room_and_a_full_queue_takes_none(core):
    group = listener(core, mask=m.OPEN_PERM | m.OPEN, queue_limit=2)
    openers = [Opener(core) for _ in range(3)]
    core.send([Event(m.OPEN, 1, b"%d" % n) for n in range(4)])
    openers.append(Opener(core))
    core.send([Event(m.OPEN, 1, b"5")])
    got = [(event.mask, event.count) for event in group.read()]
    ask, lost = (m.OPEN_PERM, None), (m.Q_OVERFLOW, 2)
    assert got == [ask] * 3 + [(m.OPEN, None)] * 2 + [lost, ask, (m.Q_OVERFLOW, 1)]
    assert [opener.go() for opener in openers] == [None] * 4


def test_questions_do_not_merge(core):
    group = listener(core)
    for _ in range(3):
        Opener(core)
    assert [event.number for event in group.read()] == [1, 2, 3]


# -- readers that leave --


@pytest.mark.parametrize("left", [ALLOW, errno.EAGAIN])
def test_a_reader_that_leaves_answers_by_policy(core, left):
    group = listener(core, policy=CAREFUL._replace(left=left))
    opener, other = Opener(core), Opener(core)
    with group.reader() as reader:
        first, _ = reader.take()
        group.answer(first.number, errno.EIO)
    assert (opener.go(), other.go()) == (errno.EIO, left)
    assert group.read() == []


def test_what_a_reader_left_is_asked_again_first(core):
    group = listener(core, mask=m.OPEN_PERM | m.OPEN)
    Opener(core)
    readers = [group.reader(), group.reader()]
    readers[0].take()
    Opener(core)
    readers[1].take()
    Opener(core)
    core.send([Event(m.OPEN, 1, b"1")])
    woken = []
    for reader in (*readers,):
        reader.leave()
    assert [getattr(event, "number", None) for event in group.read()] == [1, 2, 3, None]
    for at in (1, 2, 3):
        assert group.answer(at, ALLOW)
    assert woken == []


def test_a_question_that_is_asked_again_wakes_who_waits(core):
    group, woken = listener(core), []
    Opener(core)
    reader = group.reader()
    reader.take()
    group.wait(lambda: woken.append(1))
    reader.leave()
    assert woken == [1]
    assert len(group.queue) == 1


def test_the_number_of_an_access_that_went_ends_with_its_reader(core):
    group = listener(core)
    opener = Opener(core)
    with group.reader() as reader:
        (event,) = reader.take()
        opener.access.interrupt()
    with pytest.raises(AnswerRefused):
        group.answer(event.number, ALLOW)
    assert group.verdicts.late == 0


def test_errors_stay_where_they_are_among_questions(core):
    group = core.group(PRE_CONTENT, policy=CAREFUL)
    group.add(WHOLE, m.OPEN_PERM | m.OPEN)
    group.errors.mark(1)  # no class that answers can have FS_ERROR; the queue does not know that

    def error():
        group.queue.add_error(ErrorEvent(m.FS_ERROR, 1, count=1, error=5), "object")

    def told():
        return [getattr(event, "number", None) for event in group.read()]

    gone, _ = Opener(core), Opener(core)
    error()
    Opener(core)
    gone.access.interrupt()
    assert told() == [2, None, 3]
    reader = group.reader()
    _, gone = Opener(core), Opener(core)
    assert len(reader.take(1)) == 1
    error()
    Opener(core)
    gone.access.interrupt()
    reader.leave()
    assert told() == [4, None, 6]


# -- accesses that go --


def test_a_killed_access_that_nobody_read_is_withdrawn(core):
    group = listener(core)
    opener = Opener(core)
    question = opener.access.question
    opener.access.interrupt()
    opener.access.interrupt()
    assert question.state == "FREED"
    assert group.read() == []
    assert opener.go() == errno.EINTR
    assert opener.run.result == errno.EINTR


def test_a_killed_access_that_was_read_leaves_its_number(core):
    group = listener(core)
    opener = Opener(core)
    question = opener.access.question
    at = number(group)
    opener.access.interrupt()
    assert question.state == "CANCELLED"
    assert not group.answer(at, DENY)
    assert question.state == "FREED"


def test_a_kill_that_races_with_the_answer(core):
    group = listener(core)
    opener = Opener(core)
    group.answer(number(group), ALLOW)
    opener.access.interrupt()
    assert opener.go() == errno.EINTR
    assert group.close().run()


@pytest.mark.parametrize("step", ["ask the next group", "take the verdict"])
def test_an_asking_that_was_cut_off_is_taken_up(core, step):
    first, second = listener(core), listener(core, CONTENT, policy=AS_LINUX)
    access = core.access(opening())
    access.ask().run(kill=step)
    assert not access.ask().run()
    first.answer(number(first), ALLOW)
    access.ask().run(kill=step)
    assert not access.ask().run()
    second.answer(number(second), ALLOW)
    assert access.ask().run()
    assert access.verdict == ALLOW
    assert first.close().run()
    assert second.close().run()


def test_two_runs_of_one_access_ask_once(core):
    group = listener(core)
    access = core.access(opening())
    one, other = access.ask(), access.ask()
    assert not one.run()
    other.step()
    assert len(group.queue) == 1
    group.answer(number(group), ALLOW)
    assert one.run()
    assert other.run()
    assert group.close().run()


def test_a_protocol_asks_in_the_middle(core):
    group = listener(core)

    def open_it(access):
        yield "look up"
        verdict = yield from access.asking()
        yield "open"
        return verdict

    steps = open_it(core.access(opening()))
    assert next(steps) == "look up"
    assert next(steps) == "ask the next group"
    waits = next(steps)
    assert (waits.step, waits.ready()) == ("take the verdict", False)
    group.answer(number(group), ALLOW)
    assert waits.ready()
    assert next(steps) == "ask the next group"
    assert next(steps) == "open"
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert end.value.value == ALLOW


# -- the end of a group --


def test_the_end_answers_by_policy_and_waits_for_who_asked(core):
    group = listener(core)
    read, queued, gone = Opener(core), Opener(core), Opener(core)
    (event,) = group.read(1)
    late = event.number
    gone.access.interrupt()
    run = group.close()
    assert not run.run()
    assert run.at == "wait for askers"
    with pytest.raises(ClosedError):
        group.answer(late, ALLOW)
    assert (read.go(), queued.go()) == (errno.EIO, errno.EIO)
    assert run.run()
    assert core.tick(1000) is None


def test_between_the_end_and_its_last_mark_the_policy_answers_at_once(core):
    group = listener(core)
    other = listener(core, CONTENT, policy=AS_LINUX)
    run = group.close()
    run.step()
    opener = Opener(core)
    assert opener.go() == errno.EIO
    assert run.run()
    opener = Opener(core)  # now it is not asked
    assert len(other.queue) == 1
    other.answer(number(other), ALLOW)
    assert opener.go() == ALLOW


def test_numbers_that_nobody_can_answer_any_more_are_forgotten(core):
    group = listener(core)
    opener = Opener(core)
    group.read()
    opener.access.interrupt()
    assert group.verdicts.late == 1
    assert group.close().run()
    assert (group.verdicts.late, group.verdicts.held) == (0, {})


def test_a_reader_may_leave_while_the_group_ends(core):
    group = listener(core)
    opener = Opener(core)
    reader = group.reader()
    reader.take()
    run = group.close()
    assert run.step() == "stop queueing"
    reader.leave()  # asked again, in a queue that nobody reads
    assert not run.run()
    assert opener.go() == errno.EIO
    assert run.run()


def test_lifetimes_refuse_what_is_out_of_order(core):
    group = listener(core)
    opener = Opener(core)
    question = opener.access.question
    with pytest.raises(LifetimeError, match="no transition 'take' from WAITING"):
        QUESTION.advance(question, "take")
    with pytest.raises(LifetimeError, match="its number can be answered exactly while a reader"):
        QUESTION.advance(question, "report")
    with pytest.raises(LifetimeError, match="it waits in no group once it has its verdict"):
        ACCESS.advance(opener.access, "decide")
    assert group.state == "OPEN"


# -- reports in two phases --


def deleted():
    return [Event(m.DELETE, 1, b"f", b"d", b"name"), Event(m.DELETE_SELF, 1, b"f")]


def test_a_report_is_told_when_the_operation_is_visible(core):
    group = core.group()
    group.add(WHOLE, m.DELETE | m.DELETE_SELF)
    mark = group.add(FILE, m.OPEN)
    events = deleted()
    with core.prepare(events) as report:
        events[0].name = b"changed"
        assert group.read() == []
        report.report()
        with pytest.raises(ClosedError, match="was reported already"):
            report.report()
    assert group.read() == deleted()
    assert (mark.state, report.state) == ("FREED", "REPORTED")


def test_a_report_of_what_failed_is_abandoned(core):
    group = core.group()
    group.add(WHOLE, m.DELETE | m.DELETE_SELF)
    with core.prepare(deleted()) as report:
        pass
    assert report.state == "ABANDONED"
    with pytest.raises(ClosedError, match="was abandoned already"):
        report.report()
    report.abandon()
    with pytest.raises(OSError, match="ENOTEMPTY"), core.prepare(deleted()):
        raise OSError("ENOTEMPTY")
    assert group.read() == []


def test_a_report_waits_for_nobody_and_nobody_for_it(core):
    group, other = core.group(), core.group()
    group.add(WHOLE, m.DELETE)
    other.add(WHOLE, m.DELETE)
    report = core.prepare(deleted())
    assert group.close().run()
    report.report()
    assert [event.mask for event in other.read()] == [m.DELETE]
    report = core.prepare(deleted())
    core.unmount(1)
    report.report()
    assert other.read() == []


def test_a_report_costs_no_copy_when_nobody_listens(core):
    assert core.prepare(deleted()).events == ()
    core.group().add(On(FILESYSTEM, 2), m.DELETE)
    assert core.prepare(deleted()).events == ()
    core.group().add(FILE, m.OPEN)
    assert len(core.prepare(deleted()).events) == 2
