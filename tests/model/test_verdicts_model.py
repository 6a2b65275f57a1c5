"""Verdicts against a model of who waits for what: every asker gets exactly one verdict.

Ends of groups, readers that leave, accesses that are killed and deadlines are interleaved with
everything else, step by step, and cut off at any step.
"""

import errno

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fanwise import AnswerRefused, ClosedError, LifetimeError, MarkRefused
from fanwise.notify import mask as m
from fanwise.notify.event import Event, PermissionEvent
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.group import CONTENT, PRE_CONTENT
from fanwise.notify.mark import FILESYSTEM, IGNORE, INODE, SURV_MODIFY, On
from fanwise.notify.verdict import ALLOW, DENY, Policy

FS = (7, 0)
LIMIT = 3
ONS = [On(FILESYSTEM, FS), On(INODE, FS, b"d", True), On(INODE, FS, b"f"), On(INODE, FS, b"g")]
BITS = [m.OPEN_PERM, m.ACCESS_PERM, m.PRE_ACCESS]
verdicts = {
    PRE_CONTENT: st.sampled_from([ALLOW, DENY, errno.EIO, errno.EAGAIN]),
    CONTENT: st.sampled_from([ALLOW, DENY]),
}


@st.composite
def policies(draw, cls):
    one = verdicts[cls]
    maybe = st.none() | one
    patience = draw(st.sampled_from([None, 2, 5]))
    return Policy(draw(one), draw(one), patience, draw(maybe), draw(maybe))


class Asked:
    """What the model knows of one question: where it is, and the verdict once there is one."""

    def __init__(self, asker, number):
        self.asker, self.number = asker, number
        self.where = "queue"  # then a reader (None: Group.read), then "gone"
        self.verdict = None
        self.left = False  # the asker went on
        self.deadline = None
        self.fresh = True

    @property
    def open(self):
        return self.verdict is None and not self.left


class Listener:
    def __init__(self, group, rank, policy):
        self.group, self.rank, self.policy = group, rank, policy
        self.marks = {}  # on -> [mask, ignore]
        self.queue = []  # Asked, or the key of an event
        self.asked = {}  # number -> Asked: what is open, or its number is known to a reader
        self.readers = {}  # Reader -> None
        self.runs = []
        self.stopped = False
        self.count = 0

    def wants(self, event):
        asked = ignored = 0
        for on, (mask, ignore) in self.marks.items():
            child = on.key == b"d" and on.kind == INODE
            if on.kind == FILESYSTEM or on.key == event.key:
                asked, ignored = asked | mask, ignored | ignore
            elif child and mask & m.EVENT_ON_CHILD:
                asked |= mask
            if child and on.key != event.key and ignore & m.EVENT_ON_CHILD:
                ignored |= ignore
        return bool(asked & ~ignored & event.mask)


class Asker:
    def __init__(self, access):
        self.access = access
        self.runs = [access.ask()]
        self.at = (-1, -1)
        self.asked = None  # its question
        self.verdict = None


class Verdicts(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.core = Fsnotify()
        self.listeners, self.askers = [], []
        self.now = 0
        self.made = 0

    # -- groups and marks --

    @initialize(data=st.data())
    def begin(self, data):
        for cls in (CONTENT, PRE_CONTENT, PRE_CONTENT):
            self._make(cls, data.draw(policies(cls)))
        for listener in self.listeners:
            on = data.draw(st.sampled_from(ONS))
            self._mark(listener, on, m.OPEN_PERM | m.ACCESS_PERM | m.EVENT_ON_CHILD, 0)

    def _make(self, cls, policy):
        group = self.core.group(cls, policy=policy, questions_limit=LIMIT)
        self.made += 1
        self.listeners.append(Listener(group, (cls != PRE_CONTENT, self.made), policy))

    @precondition(lambda self: len(self.listeners) < 5)
    @rule(data=st.data(), cls=st.sampled_from([CONTENT, PRE_CONTENT]))
    def another_group(self, data, cls):
        self._make(cls, data.draw(policies(cls)))

    @rule(
        data=st.data(),
        on=st.sampled_from(ONS),
        bits=st.lists(st.sampled_from(BITS), min_size=1, max_size=2),
        ignore=st.sampled_from([0, 0, IGNORE | SURV_MODIFY]),
    )
    def mark(self, data, on, bits, ignore):
        listener = data.draw(st.sampled_from(self.listeners))
        mask = m.EVENT_ON_CHILD if on.directory else 0
        for bit in bits:
            mask |= bit
        self._mark(listener, on, mask, ignore)

    def _mark(self, listener, on, mask, ignore):
        if on.kind == FILESYSTEM or not on.directory:
            mask &= ~m.EVENT_ON_CHILD
        try:
            listener.group.add(on, mask, ignore)
        except ClosedError:
            assert listener.stopped
            return
        except MarkRefused:
            assert listener.group.cls == CONTENT
            assert mask & m.PRE_ACCESS
            return
        assert not listener.stopped
        listener.marks.setdefault(on, [0, 0])[bool(ignore)] |= mask

    @rule(data=st.data())
    def remove_a_mark(self, data):
        listener = data.draw(st.sampled_from(self.listeners))
        if listener.marks and not listener.stopped:
            on = data.draw(st.sampled_from(sorted(listener.marks)))
            del listener.marks[on]
            listener.group.marks[on].destroy()

    # -- accesses --

    # Sequences in which nobody waits test nothing: most accesses begin to ask at once, readers read
    # where there is something, and ends begin when something can be under way.
    @rule(
        key=st.sampled_from([b"f", b"g"]),
        bit=st.sampled_from([m.OPEN_PERM, *BITS]),
        steps=st.sampled_from([1, 1, 1, 0]),
    )
    def access(self, key, bit, steps):
        event = PermissionEvent(bit, FS, key, b"d", key, pid=len(self.askers))
        if bit == m.PRE_ACCESS:
            event.range = (0, 4096)
        assert self.core.asks(event) == (self._next(event, (-1, -1)) is not None)
        self.askers.append(Asker(self.core.access(event)))
        for _ in range(steps):
            self._step(self.askers[-1], self.askers[-1].runs[0])

    def _next(self, event, after):
        wanting = [
            listener
            for listener in self.listeners
            if listener.rank > after and listener.marks and listener.wants(event)
        ]
        return min(wanting, key=lambda listener: listener.rank, default=None)

    @precondition(lambda self: any(asker.runs for asker in self.askers))
    @rule(data=st.data(), kill=st.sampled_from([False] * 7 + [True]))
    def go_on(self, data, kill):
        asker = data.draw(st.sampled_from([it for it in self.askers if it.runs]))
        run = data.draw(st.sampled_from(asker.runs))
        if kill or run.at is None:
            asker.runs.remove(run)
            run.kill()
            if asker.verdict is None:
                asker.runs.append(asker.access.ask())
            return
        self._step(asker, run)

    def _step(self, asker, run):
        if not run.ready:
            assert run.at == "take the verdict"
            assert asker.asked.open
            with pytest.raises(LifetimeError, match="yet"):
                run.step()
            return
        waited = run.at == "take the verdict"
        run.step()
        if asker.verdict is not None:
            return
        if asker.asked is None:
            if not waited:  # the other run took it, and this one finds nothing to do
                self._ask(asker)
        elif waited:
            asked, asker.asked = asker.asked, None
            assert asked.verdict is not None
            asked.left = True
            if asked.verdict != ALLOW:
                asker.verdict = asked.verdict

    def _ask(self, asker):
        event = asker.access.event
        listener = self._next(event, asker.at)
        if listener is None:
            asker.verdict = ALLOW
            return
        asker.at = listener.rank
        asker.asked = asked = Asked(asker, asker.access.question.number)
        listener.count += 1
        assert asked.number == listener.count
        policy = listener.policy
        if listener.stopped:
            asked.verdict = policy.closing
        elif len(listener.asked) >= LIMIT:
            asked.verdict = policy.late if policy.full is None else policy.full
        else:
            listener.asked[asked.number] = asked
            listener.queue.append(asked)
            return
        asked.where = "gone"

    @precondition(lambda self: self.askers)
    @rule(data=st.data())
    def another_run(self, data):
        asker = data.draw(st.sampled_from(self.askers))
        if len(asker.runs) < 3:
            asker.runs.append(asker.access.ask())

    @precondition(lambda self: self.askers)
    @rule(data=st.data())
    def kill_an_access(self, data):
        asker = data.draw(st.sampled_from(self.askers))
        asker.access.interrupt()
        if asker.verdict is None:
            asker.verdict = errno.EINTR
            asked, asker.asked = asker.asked, None
            if asked is not None:
                asked.left = True
                if asked.where == "queue":
                    self._gone(asked)

    # -- who reads --

    @rule(key=st.sampled_from([b"f", b"g"]))
    def an_event_that_nobody_waits_for(self, key):
        self.core.send([Event(m.OPEN, FS, key, b"d", key)])  # nobody asked for it

    def _any(self, data, having):
        """A listener that has something, if there is one."""
        some = [listener for listener in self.listeners if having(listener)]
        return data.draw(st.sampled_from(some or self.listeners))

    @rule(data=st.data(), most=st.sampled_from([None, 1, 2]), new=st.booleans())
    def read(self, data, most, new):
        listener = self._any(data, lambda it: it.queue)
        reader = None
        readers = [it for it in listener.readers if it.state != "LEFT"]
        try:
            if new and len(readers) < 3:
                reader = listener.group.reader()
                listener.readers[reader] = None
            elif readers:
                reader = data.draw(st.sampled_from(readers))
            found = listener.group.read(most) if reader is None else reader.take(most)
        except ClosedError:
            assert listener.stopped
            return
        assert not listener.stopped, "an event after the end began"
        count = len(listener.queue) if most is None else most
        expected, listener.queue[:count] = listener.queue[:count], []
        assert [(it.number, it.pid) for it in found] == [
            (it.number, it.asker.access.event.pid) for it in expected
        ]
        for event, asked in zip(found, expected, strict=True):
            origin = asked.asker.access.event
            assert (event.mask, event.key, event.range) == (origin.mask, origin.key, origin.range)
            asked.where = reader
            event.number = event.key = event.mask = None  # the reader's own

    @rule(data=st.data())
    def a_reader_leaves(self, data):
        listener = self._any(data, lambda it: it.readers)
        if not listener.readers:
            return
        reader = data.draw(st.sampled_from(list(listener.readers)))
        reader.leave()
        for asked in list(listener.asked.values()):
            if asked.where is not reader:
                continue
            if asked.left or asked.verdict is not None:
                self._gone(asked)
            elif listener.policy.left is not None:
                asked.verdict = listener.policy.left
                self._gone(asked)
            else:
                asked.where = "queue"
                at = 0
                while at < len(listener.queue) and listener.queue[at].number < asked.number:
                    at += 1
                listener.queue.insert(at, asked)

    @rule(data=st.data(), wrong=st.sampled_from([False, False, False, True]))
    def answer(self, data, wrong):
        listener = self._any(data, lambda it: any(a.where != "queue" for a in it.asked.values()))
        read = [number for number, it in listener.asked.items() if it.where != "queue"]
        number = data.draw(st.sampled_from([*read, *read, *listener.asked, 999]))
        verdict = errno.ENOENT if wrong else data.draw(verdicts[listener.group.cls])
        asked = listener.asked.get(number)
        known = asked is not None and asked.where != "queue"
        try:
            counted = listener.group.answer(number, verdict)
        except ClosedError:
            assert listener.stopped
            return
        except AnswerRefused:
            assert wrong or not known
            return
        assert known
        assert not wrong
        assert counted == asked.open
        if counted:
            asked.verdict = verdict
        self._gone(asked)

    def _gone(self, asked):
        asked.where = "gone"
        for listener in self.listeners:
            if listener.asked.get(asked.number) is asked:
                del listener.asked[asked.number]
                if asked in listener.queue:
                    listener.queue.remove(asked)

    # -- time --

    @rule(seconds=st.integers(0, 4))
    def time_goes_by(self, seconds):
        self.now += seconds
        left = []
        for listener in self.listeners:
            patience = listener.policy.patience
            if patience is None or listener.group.state == "CLOSED":
                continue
            for asked in list(listener.asked.values()):
                if asked.fresh:
                    asked.fresh, asked.deadline = False, self.now + patience
                if asked.open and asked.deadline <= self.now:
                    asked.verdict = listener.policy.late
                    if asked.where == "queue":
                        self._gone(asked)
                elif asked.open:
                    left.append(asked.deadline)
        assert self.core.tick(self.now) == min(left, default=None)

    # -- the end --

    @precondition(lambda self: len(self.askers) > 3)
    @rule(data=st.data())
    def begin_to_close(self, data):
        listener = data.draw(st.sampled_from(self.listeners))
        listener.runs.append(listener.group.close())

    @precondition(lambda self: any(listener.runs for listener in self.listeners))
    @rule(
        data=st.data(), kill=st.sampled_from([False, False, False, True]), count=st.integers(1, 5)
    )
    def go_on_closing(self, data, kill, count):
        listener = data.draw(st.sampled_from([x for x in self.listeners if x.runs]))
        run = data.draw(st.sampled_from(listener.runs))
        if run.at is None or kill:
            run.kill()
            listener.runs.remove(run)
            return
        for _ in range(count):
            if run.at is None:
                return
            if not run.ready:
                self._waits(listener, run)
                return
            self._closing(listener, run)

    def _waits(self, listener, run):
        waits = {
            "wait for askers": any(
                it.asked is not None and it.at == listener.rank for it in self.askers
            ),
            "wait for readers": any(it.state != "LEFT" for it in listener.readers),
        }
        assert waits[run.at], run.at

    def _closing(self, listener, run):
        step = run.at
        run.step()
        if step == "stop queueing":
            listener.stopped = True
        elif step == "answer an access":
            asked = next((it for it in listener.asked.values() if it.open), None)
            if asked is not None:
                asked.verdict = listener.policy.closing
                self._gone(asked)
        elif step == "detach a mark":
            listener.marks = {on: listener.marks[on] for on in listener.group.marks}
        elif step == "wait for askers":
            assert not any(it.open for it in listener.asked.values())
        elif step == "free events":
            for asked in list(listener.asked.values()):
                self._gone(asked)
        if run.at is None:
            self._ended(listener)

    def _ended(self, listener):
        group = listener.group
        assert group.state == "CLOSED"
        assert not group.marks
        assert not len(group.queue)
        assert not group.queue.questions
        assert (group.verdicts.askers, group.verdicts.late) == (0, 0)
        assert group.verdicts.open == group.verdicts.held == {}
        assert listener.asked == {}

    # -- what always holds --

    @invariant()
    def every_asker_gets_exactly_one_verdict(self):
        for asker in self.askers:
            assert asker.access.verdict == asker.verdict
            assert (asker.access.question is None) == (asker.asked is None)
            if asker.asked is not None:
                assert asker.access.question.verdict == asker.asked.verdict

    @invariant()
    def every_question_is_where_the_model_has_it(self):
        for listener in self.listeners:
            group, asked = listener.group, listener.asked.values()
            told = group.verdicts
            assert [event.number for event, _ in group.queue._events] == [
                it.number for it in listener.queue
            ]
            assert group.queue.questions == len(listener.queue)
            assert set(told.open) == {it.number for it in asked if it.open}
            assert set(told.held) == {it.number for it in asked if it.where != "queue"}
            assert told.late == sum(not it.open for it in asked)
            assert told.askers == sum(
                it.asked is not None and it.at == listener.rank for it in self.askers
            )
            for reader in listener.readers:
                assert set(reader.questions) == {it.number for it in asked if it.where is reader}

    def teardown(self):
        """Every group can be ended from wherever it is: who waits gets its verdict and goes on."""
        for listener in self.listeners:
            group = listener.group
            for reader in listener.readers:
                reader.leave()
            run = group.close()
            run.run()
            for asker in self.askers:
                access = asker.access
                if access.question is not None and access.question.verdicts is group.verdicts:
                    assert access.question.verdict is not None
                    access.ask().run()
            assert run.run() or group.state == "CLOSED"
            assert group.verdicts.open == group.verdicts.held == {}
            assert group.verdicts.askers == 0
        for asker in self.askers:
            asker.access.ask().run()
            assert asker.access.verdict is not None
        assert not self.core.groups


Verdicts.TestCase.settings = settings(
    max_examples=250,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=False,
    database=None,
)
TestVerdicts = Verdicts.TestCase
