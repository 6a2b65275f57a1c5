"""The end of one of our own groups, while everybody still uses it. Runs `fanwise.notify` itself."""

import errno
from collections.abc import Callable, Generator

from fanwise._errors import ClosedError, MarkRefused
from fanwise.lab import Scenario, World
from fanwise.lifetime import Until
from fanwise.notify import mask as m
from fanwise.notify.access import ACCESS, ASK, Access
from fanwise.notify.connector import CONNECTOR
from fanwise.notify.event import ErrorEvent, Event, PermissionEvent
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.group import CLOSE, CONTENT, GROUP, PRE_CONTENT, Group
from fanwise.notify.mark import FILESYSTEM, INODE, MARK, Mark, On
from fanwise.notify.reader import READ, READER, Reader
from fanwise.notify.reserve import RESERVE, SLOT
from fanwise.notify.verdict import ALLOW, QUESTION, Policy

Task = Generator[str | Until, None, None]

FS, OTHER = 1, 2
WHOLE = On(FILESYSTEM, FS)
FOLDER = On(INODE, FS, b"d", True)
FILE = On(INODE, FS, b"f")

SCENARIO = Scenario(
    "group-teardown",
    "The end of a group",
    """\
Closing a notification group is where most of its bugs were: marks that are still found while the
group goes, events that hold what the group waits for, a permission event whose process sleeps on
after its listener has gone. Linux ends a group in a strict order: stop queueing, answer who waits,
detach the marks, wait until nobody waits any more, wait until every mark is freed, then free the
events. An error event that held its mark turned that order round, and was a use after free.

`fanwise.notify` keeps the same order in `Group.close`. The designs below are its own code, in
worlds of tasks that send, read, mark, ask, answer, fail and close at once; nothing is a copy. A
mutation test seeds faults into that code, and each one is found here.

The first run found one that nobody had seeded: of two who close one group, the slower could stand
before `free events` while the other closed the reserve, and then freed events into it.
""",
    properties={
        "no-event-after-close": "Nobody reads an event once the end of the group has begun.",
        "every-event-counted": "What was sent is read, or queued, or counted in an overflow.",
        "no-freed-mark": "Nobody has a mark that was freed.",
        "nothing-left": "A closed group has no mark, event, slot, reader, waiter or asker.",
        "others-undisturbed": "A group on the same objects gets every event, whoever else ends.",
        "every-error-counted": "Each error is delivered, queued, held or counted as abandoned.",
        "one-verdict": "An access gets what was answered to it, and otherwise what policy says.",
        "asked-in-order": "PRE_CONTENT is asked before CONTENT, each once; a denial ends it.",
        "late-is-told": "Who answers an access that did not wait for it is told so.",
    },
)


class Bell:
    """What wakes a reader, as an eventfd: it stays rung until it is answered."""

    name = "its bell"
    holders = ()

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rung = True  # look first

    def ring(self) -> None:
        """Wake, or let the next look find something."""
        self.rung = True

    def lost(self, task: str) -> bool:
        """Whether somebody sleeps although there is something for him."""
        return bool(len(self.group.queue)) or self.group.state != "OPEN"


# -- what is demanded of every design --


def demand(world: World, group: Group) -> None:
    """Demand that the group ends, and that nothing of it is left then."""

    def nothing_left() -> bool:
        return group.state != "CLOSED" or not (
            group.marks
            or group.dying
            or len(group.queue)
            or group._waiters
            or group.errors.size
            or group.errors.readers
            or group.verdicts.open
            or group.verdicts.held
            or group.verdicts.askers
        )

    world.always("nothing-left", nothing_left)
    world.at_end("nothing-left", lambda: group.state == "CLOSED")


def read(world: World, group: Group, use: Callable[[list[Event]], None]) -> Task:
    """Wait for events and read them, until the group ends."""
    bell = Bell(group)
    group.wait(bell.ring)
    while True:
        yield Until("read", lambda: bell.rung, bell)
        bell.rung = False
        try:
            events = group.read()
        except ClosedError:
            break
        world.check("no-event-after-close", group.state == "OPEN", group.state)
        use(events)
    yield "leave"
    group.leave(bell.ring)


# -- marks and events --


def counted(events: list[Event]) -> int:
    """How many events these stand for."""
    return sum(event.count or 0 if event.mask & m.Q_OVERFLOW else 1 for event in events)


@SCENARIO.design(
    "ours",
    "Events, a reader, and who marks, holds and unmarks, while the group is closed.",
    lifetimes=[GROUP, CLOSE, MARK, CONNECTOR],
)
def ours(world: World) -> None:
    """Build it."""
    core = Fsnotify()
    group, other = core.group(queue_limit=1), core.group()
    other.add(WHOLE, m.MODIFY)
    group.add(FOLDER, m.MODIFY | m.EVENT_ON_CHILD)
    state = {"wanted": 0, "got": 0}
    held: list[Mark] = []

    def send() -> Task:
        for name in (b"1", b"2"):
            yield "send"
            state["wanted"] += group.state == "OPEN" and FOLDER in group.marks
            core.send([Event(m.MODIFY, FS, name, b"d", name)])

    def use(events: list[Event]) -> None:
        state["got"] += counted(events)

    def hold() -> Task:
        yield "find a mark"
        mark = group.marks.get(FOLDER)
        yield "take it"
        if mark is None or not mark.get():
            return
        held.append(mark)
        yield "put it"
        held.remove(mark)
        mark.put()

    def unmark() -> Task:
        yield "remove a mark"
        try:
            group.remove(FOLDER, m.MODIFY | m.EVENT_ON_CHILD)
        except (ClosedError, MarkRefused):
            world.case("remove", "too late")
        yield "mark again"
        try:
            group.add(FOLDER, m.MODIFY | m.EVENT_ON_CHILD)
        except ClosedError:
            world.case("mark", "too late")

    world.task("sender", send())
    world.task("reader", read(world, group, use))
    world.task("holder", hold())
    world.task("marker", unmark())
    world.task("closer", group.close())
    demand(world, group)

    def every_event() -> bool:
        if group.state != "OPEN":
            return True
        return state["wanted"] == state["got"] + counted([e for e, _ in group.queue._events])

    world.always("every-event-counted", every_event)
    world.always("no-freed-mark", lambda: all(mark.state != "FREED" for mark in held))
    world.at_end("others-undisturbed", lambda: len(other.read()) == 2)


@SCENARIO.design(
    "ours-cut-off",
    "Two who close one group, and one of them is cut off somewhere.",
    lifetimes=[GROUP, CLOSE, MARK],
)
def ours_cut_off(world: World) -> None:
    """Build it."""
    core = Fsnotify()
    group = core.group()
    mark = group.add(FILE, m.MODIFY)
    group.add(WHOLE, m.MODIFY)
    state = {"cut": False}

    def close_and_die() -> Task:
        run = group.close()
        while run.at is not None:
            yield Until(run.at, lambda: run.ready or state["cut"])
            if state["cut"]:
                world.case("cut off before", run.at)
                run.kill()
                return
            run.step()

    def cut() -> Task:
        yield "cut off"
        state["cut"] = True

    def end_the_object() -> Task:
        yield "the file is deleted"
        core.send([Event(m.DELETE_SELF | m.MODIFY, FS, b"f")])
        yield "the filesystem is unmounted"
        core.unmount(FS)
        yield "the mark is destroyed"
        mark.destroy()

    world.task("one", close_and_die())
    world.task("other", group.close())
    world.task("death", cut())
    world.task("objects", end_the_object())
    demand(world, group)
    world.at_end("no-freed-mark", lambda: mark.state == "FREED")


# -- errors --


@SCENARIO.design(
    "ours-with-errors",
    "Errors of two filesystems, a reader that fails and one that does not.",
    lifetimes=[GROUP, RESERVE, SLOT, READER, READ],
)
def ours_with_errors(world: World) -> None:
    """Build it."""
    core = Fsnotify()
    group = core.group()
    errors = group.errors
    group.add(On(FILESYSTEM, FS), m.FS_ERROR)
    group.add(On(FILESYSTEM, OTHER), m.FS_ERROR)
    used = {"errors": 0}
    readers: list[Reader] = []

    def use(events: list[Event]) -> None:
        used["errors"] += sum(event.count or 1 for event in events)

    def fail() -> Task:
        for fs in (FS, OTHER):
            yield f"an error of {fs}"
            core.send([ErrorEvent(m.FS_ERROR, fs, error=errno.EIO)])

    def reads(fails: bool) -> Task:
        reader = group.reader()
        readers.append(reader)
        run = reader.read(use)
        try:
            while run.at is not None:
                if fails and run.at == "use":
                    break
                yield Until(run.at, lambda: run.ready)
                done = run.step()
                world.check("no-event-after-close", done != "take" or group.state == "OPEN")
        except ClosedError:
            world.case("take", "too late")
        yield "leave"
        reader.leave()
        readers.remove(reader)

    def unmark() -> Task:
        yield "unmark"
        try:
            group.remove(On(FILESYSTEM, FS), m.FS_ERROR)
        except ClosedError:
            world.case("remove", "too late")

    world.task("errors", fail())
    world.task("fails", reads(True))
    world.task("reads", reads(False))
    world.task("marker", unmark())
    world.task("closer", group.close())
    demand(world, group)

    def counted() -> bool:
        holding = sum(r.slot.event.count or 0 for r in readers if r.slot is not None)
        told = errors.delivered + errors.abandoned + errors.counted + holding
        return errors.raised == told and errors.delivered <= used["errors"]

    world.always("every-error-counted", counted)
    world.at_end(
        "every-error-counted", lambda: errors.raised == errors.delivered + errors.abandoned
    )


@SCENARIO.design(
    "ours-failing-readers",
    "Errors of one filesystem, and two readers that both fail.",
    lifetimes=[GROUP, RESERVE, SLOT, READER],
)
def ours_failing_readers(world: World) -> None:
    """Build it."""
    core = Fsnotify()
    group = core.group()
    errors = group.errors
    group.add(WHOLE, m.FS_ERROR)

    def fail() -> Task:
        for _ in range(3):
            yield "an error"
            core.send([ErrorEvent(m.FS_ERROR, FS, error=errno.EIO)])

    def read_and_fail() -> Task:
        reader = group.reader()
        yield "take"
        try:
            reader.take()
        except ClosedError:
            world.case("take", "too late")
        yield "leave"
        reader.leave()

    world.task("errors", fail())
    world.task("one", read_and_fail())
    world.task("other", read_and_fail())
    world.task("closer", group.close())
    demand(world, group)
    world.at_end("every-error-counted", lambda: errors.raised == errors.abandoned)


@SCENARIO.design(
    "ours-woken",
    "Events and errors, a reader that fails with some, and one that has to get them all.",
    lifetimes=[READER, SLOT],
)
def ours_woken(world: World) -> None:
    """Build it."""
    core = Fsnotify()
    group = core.group()
    group.add(WHOLE, m.FS_ERROR | m.MODIFY)
    state = {"got": 0}
    bell = Bell(group)

    def send() -> Task:
        for name in (b"1", b"2"):
            yield "send"
            core.send([Event(m.MODIFY, FS, name, b"d", name)])

    def fail() -> Task:
        yield "an error"
        core.send([ErrorEvent(m.FS_ERROR, FS, error=errno.EIO)])

    def read_an_error_and_fail() -> Task:
        reader = group.reader()
        yield "take"
        state["got"] += sum(not event.mask & m.FS_ERROR for event in reader.take())
        bell.ring()  # who took less than all passes it on
        yield "leave"
        reader.leave()

    def read_all() -> Task:
        reader = group.reader()
        group.wait(bell.ring)
        while state["got"] < 3:
            yield Until("read", lambda: bell.rung, bell)
            bell.rung = False
            while events := reader.take():
                state["got"] += counted(events)
                reader.done()
        group.leave(bell.ring)
        reader.leave()

    world.task("sender", send())
    world.task("errors", fail())
    world.task("fails", read_an_error_and_fail())
    world.task("reads", read_all())
    world.at_end("every-event-counted", lambda: state["got"] == 3 and not len(group.queue))


# -- verdicts --

BEFORE: dict[str, tuple[str, ...]] = {PRE_CONTENT: (), CONTENT: (PRE_CONTENT,)}


class Asker:
    """An access, and what was answered to it in time, by class."""

    def __init__(self, core: Fsnotify, pid: int, groups: list[Group]) -> None:
        self.access: Access = core.access(PermissionEvent(m.OPEN_PERM, FS, b"f", b"d", pid=pid))
        self.pid = pid
        self.groups = groups
        self.asked: set[str] = set()
        self.answers: dict[str, int] = {}
        self.killed = self.late = False

    def fine(self) -> bool:
        """Whether its verdict is what was answered, or what policy says where nobody did."""
        verdict = self.access.verdict
        denied = [answer for answer in self.answers.values() if answer != ALLOW]
        if denied or verdict == errno.EINTR:
            return verdict == (errno.EINTR if self.killed else denied[0] if denied else None)
        if verdict == ALLOW:  # a group that ended is not asked
            return all(
                g.cls in self.answers or (g.state != "OPEN" and g.cls not in self.asked)
                for g in self.groups
            )
        if verdict == errno.EAGAIN:
            return self.late
        return any(
            verdict == CLOSING[g.cls] and g.cls not in self.answers and g.state != "OPEN"
            for g in self.groups
        )

    def waits(self, number: int) -> bool:
        """Whether it waits for an answer under this number."""
        question = self.access.question
        return question is not None and question.number == number and question.verdict is None


CLOSING = {PRE_CONTENT: errno.EIO, CONTENT: errno.EPERM}


def asked(core: Fsnotify, cls: str, patience: float | None = None) -> Group:
    """Make a group that is asked before the file is opened."""
    late = errno.EAGAIN if cls == PRE_CONTENT else errno.EPERM
    group = core.group(cls, policy=Policy(late, CLOSING[cls], patience))
    group.add(FILE, m.OPEN_PERM)
    return group


def ask(world: World, asker: Asker) -> Task:
    """Open the file."""
    for step in asker.access.asking():
        if asker.access.question is not None:
            asker.asked.add(asker.access.question.verdicts.cls)
        yield step
    world.check("one-verdict", asker.fine(), f"{asker.access.verdict} after {asker.answers}")


def answer(
    world: World,
    group: Group,
    askers: list[Asker],
    verdicts: dict[int, int],
    quits: bool = False,
    reader: Reader | None = None,
) -> Task:
    """Read permission events, by a reader if it has one, and answer each; or quit with them."""
    bell = Bell(group)
    group.wait(bell.ring)
    while True:
        yield Until("read", lambda: bell.rung, bell)
        bell.rung = False
        try:
            events = group.read() if reader is None else reader.take()
        except ClosedError:
            break
        world.check("no-event-after-close", group.state == "OPEN", group.state)
        if events and quits:
            break
        for event in events:
            assert isinstance(event, PermissionEvent)
            asker = next(it for it in askers if it.pid == event.pid)
            fine = group.cls not in asker.answers and all(
                asker.answers.get(cls, ALLOW) == ALLOW for cls in BEFORE[group.cls]
            )
            world.check("asked-in-order", fine, f"{group.cls} after {asker.answers}")
            yield "answer"
            waited = asker.waits(event.number)
            try:
                counted = group.answer(event.number, verdicts[event.pid])
            except ClosedError:
                world.case("answer", "too late")
                break
            world.check("late-is-told", counted == waited)
            if counted:
                asker.answers[group.cls] = verdicts[event.pid]
            else:
                world.case("answer", "nobody waited")
    yield "leave"
    group.leave(bell.ring)
    if reader is not None:
        reader.leave()


@SCENARIO.design(
    "ours-with-verdicts",
    "Two accesses, one of which is allowed and one denied.",
    lifetimes=[GROUP, CLOSE, ACCESS, ASK, QUESTION],
)
def ours_with_verdicts(world: World) -> None:
    """Build it."""
    core = Fsnotify()
    group = asked(core, PRE_CONTENT)
    askers = [Asker(core, pid, [group]) for pid in (1, 2)]
    for asker in askers:
        world.task(f"access {asker.pid}", ask(world, asker))
    world.task("answers", answer(world, group, askers, {1: ALLOW, 2: errno.EBUSY}))
    world.task("closer", group.close())
    demand(world, group)


@SCENARIO.design(
    "ours-quits",
    "An access, who answers it, and who reads and leaves without an answer.",
    lifetimes=[GROUP, CLOSE, ACCESS, ASK, QUESTION, READER],
)
def ours_quits(world: World) -> None:
    """Build it."""
    core = Fsnotify()
    group = asked(core, PRE_CONTENT)
    asker = Asker(core, 1, [group])
    world.task("access", ask(world, asker))
    world.task("answers", answer(world, group, [asker], {1: ALLOW}, reader=group.reader()))
    world.task("quits", answer(world, group, [asker], {}, quits=True, reader=group.reader()))
    world.task("closer", group.close())
    demand(world, group)


@SCENARIO.design(
    "ours-killed",
    "An access that is killed, and who may have read its event.",
    lifetimes=[GROUP, CLOSE, ACCESS, ASK, QUESTION],
)
def ours_killed(world: World) -> None:
    """Build it."""
    core = Fsnotify()
    group = asked(core, PRE_CONTENT)
    asker = Asker(core, 1, [group])

    def kill() -> Task:
        yield "kill"
        asker.killed = asker.access.verdict is None
        asker.access.interrupt()

    world.task("access", ask(world, asker))
    world.task("answers", answer(world, group, [asker], {1: ALLOW}))
    world.task("killer", kill())
    world.task("closer", group.close())
    demand(world, group)


@SCENARIO.design(
    "ours-late",
    "An access that waits beyond its deadline, and an answer that may come too late.",
    lifetimes=[GROUP, CLOSE, ACCESS, ASK, QUESTION],
)
def ours_late(world: World) -> None:
    """Build it."""
    core = Fsnotify()
    group = asked(core, PRE_CONTENT, patience=1)
    asker = Asker(core, 1, [group])

    def clock() -> Task:
        for now in (0, 1):
            yield f"{now} s"
            asker.late = now == 1
            core.tick(now)

    world.task("access", ask(world, asker))
    world.task("answers", answer(world, group, [asker], {1: ALLOW}, reader=group.reader()))
    world.task("clock", clock())
    world.task("closer", group.close())
    demand(world, group)


def two_classes(world: World, closing: str, first_says: int, second_says: int) -> None:
    """Let two groups have a say in one access, and close one of them."""
    core = Fsnotify()
    second, first = asked(core, CONTENT), asked(core, PRE_CONTENT)
    asker = Asker(core, 1, [first, second])
    world.task("access", ask(world, asker))
    for name, group, says in (("filler", first, first_says), ("scanner", second, second_says)):
        stays = group.cls != closing
        world.task(name, answer(world, group, [asker], {1: says}), daemon=stays)
        if not stays:
            world.task("closer", group.close())
            demand(world, group)


@SCENARIO.design(
    "ours-two-classes",
    "One access that the first group allows and the second denies, and the second is closed.",
    lifetimes=[GROUP, CLOSE, ACCESS, ASK, QUESTION],
)
def ours_two_classes(world: World) -> None:
    """Build it."""
    two_classes(world, CONTENT, ALLOW, errno.EPERM)


@SCENARIO.design(
    "ours-denied",
    "One access that the first group denies unless it is closed first; then the second is asked.",
    lifetimes=[GROUP, CLOSE, ACCESS, ASK, QUESTION],
)
def ours_denied(world: World) -> None:
    """Build it."""
    two_classes(world, PRE_CONTENT, errno.EBUSY, ALLOW)
