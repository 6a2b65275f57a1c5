"""How a listener fills files while somebody freezes the filesystem, on the VFS and real verdicts.

A *sender* copies a file that has no content yet (sendfile); a *listener* of class PRE_CONTENT is
asked first, and fills it; a *freezer* freezes the filesystem and thaws it again. Designs replace
the guard, which decides where hooks stand and who waits for a frozen filesystem.

Linux reference: fs/super.c, fs/splice.c, fs/read_write.c, fs/notify/fanotify; the hooks left freeze
protection in 6.8; page faults were given a hook in 6.14-rc1 and lost it before the release.
"""

import errno
import os
from collections.abc import Callable, Collection
from typing import Any

from fanwise.lab import Scenario, World
from fanwise.lifetime import Lifetime, Until
from fanwise.notify.access import ACCESS
from fanwise.notify.event import Event, PermissionEvent
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.mark import FILESYSTEM, PRE_CONTENT, On
from fanwise.notify.mask import ONDIR, OPEN_PERM, PRE_ACCESS
from fanwise.notify.verdict import ALLOW, QUESTION, Policy
from fanwise.vfs import Disk, File, Guard, Op, Superblock, Vfs, finish
from fanwise.vfs.guard import SENDING, TRUNCATING, TRUNCATING_OPEN, WRITING
from fanwise.vfs.locks import Held
from fanwise.vfs.protocol import T
from fanwise.vfs.superblock import FREEZE, FS, KERNEL, PAGEFAULT, USER, WRITE

SCENARIO = Scenario(
    "freeze",
    "A listener that fills files, and a filesystem that freezes",
    """
Freezing a filesystem shuts it for writers level by level, and waits at each level for those that
are inside. A permission event makes an access wait for a listener. A listener that fills content
*writes to the same filesystem*. If the access already holds freeze protection when it is asked
about, three parties wait for each other: the freezer for the access, the access for the listener,
the listener for the thaw.

The debate went through everything that can be changed. Move the hooks in front of the protection;
this was merged, operation by operation, and each that was overlooked is the old deadlock again: the
open that truncates, an overlay that protects its upper layer while it opens the lower one, a fault
on a mapped page. Or let the listener not wait: by a system call flag, by a flag of its descriptors,
by a flag of its task, by a context that whoever reads the queue gets. Such a flag is as good as
what it reaches: a write that does not wait is no help to who has to create a file. Or give
listeners a freeze level of their own, or let them be the freezer, or refuse to freeze what has a
listener. And a listener that opens files asks itself: descriptors that inherit silence, or
refusing every access of a listener, were the answers to that.

fanwise does not rely on any of it: who answers never writes, who writes has a deadline, and an
access whose fill is late is told to try again.
""",
    {
        "freezer-gets-its-turn": "A freeze that is asked for is carried out.",
        "no-write-when-frozen": "No write lands on a frozen filesystem.",
        "never-a-wrong-byte": "An access that is allowed sees the content, and not the hole.",
        "filled": "An access gets the content in the end; it is told to try again only meanwhile.",
        "all-kinds-of-filling": "The listener can write content and attributes, and make a file.",
        "nested-faults": "A listener's access that another can serve is served, and not refused.",
    },
)

CONTENT, HOLE = b"data", b"\0\0\0\0"
DATA, ATTRIBUTES, TEMPORARY = "data", "attributes", "temporary file"
EVERYTHING = (DATA, ATTRIBUTES, TEMPORARY)
EVERYWHERE = frozenset({WRITING, SENDING, TRUNCATING, TRUNCATING_OPEN})
AGAIN = errno.EAGAIN
LISTENING = "for listeners"

_LIVES: tuple[Lifetime[Any], ...] = (FREEZE, ACCESS, QUESTION)


class _Guard(Guard):
    """Hooks stand where ``inside`` says; tasks in ``trying`` do not wait for a thaw."""

    def __init__(self, inside: Collection[str] = ()) -> None:
        self.inside = frozenset(inside)
        self.trying: set[str] = set()

    def start(self, sb: Superblock, level: str) -> Op[Held]:
        if self.vfs.current() not in self.trying:
            return (yield from super().start(sb, level))
        yield f"try {level}"
        lock = sb.freeze.levels[level]
        if not lock.start_now():
            raise OSError(AGAIN, "frozen")
        return lock


class _Answer:
    """What an access waits for: a verdict, which the listeners owe."""

    name = "the verdict"

    def __init__(self, *holders: str) -> None:
        self.holders = holders

    def owed(self, asking: Op[T]) -> Op[T]:
        """Ask, and say whom the access waits for."""
        while True:
            try:
                step = next(asking)
            except StopIteration as end:
                result: T = end.value
                return result
            yield step if isinstance(step, str) else Until(step.step, step.ready, self)


class _Vfs(Vfs):
    """Says whom an access waits for."""

    answer = _Answer("listener")

    def ask(self, mask: int, file: File, at: int = 0, count: int = 0) -> Op[None]:
        yield from self.answer.owed(super().ask(mask, file, at, count))


class _Tier:
    """A filesystem with a file that has no content yet, and its listeners."""

    def __init__(
        self,
        world: World,
        guard: Guard,
        *,
        ways: Collection[str] = (DATA,),
        tries: Callable[[str], bool] = lambda way: False,
        patience: float | None = None,
        mask: int = PRE_ACCESS,
    ) -> None:
        self.world = world
        self.ways = ways
        self.tries = tries
        self.guard = guard
        self.core = Fsnotify()
        policy = Policy(late=AGAIN, closing=AGAIN, patience=patience)
        self.group = self.core.group(PRE_CONTENT, policy=policy)
        self.vfs = _Vfs(world.current, self.core, guard=guard)
        self.sb = self.vfs.superblock("fs", Disk({"stub": HOLE, "index": HOLE, "out": b""}))
        self.vfs.mount_root(self.sb)
        self.out = self._open("/out", os.O_WRONLY)  # nobody is asked about this one
        self.group.add(On(FILESYSTEM, "fs"), PRE_ACCESS)  # whoever opens a file now asks later
        self.stub = self._open("/stub", os.O_RDONLY)
        self.fill = self._open("/stub", os.O_RDWR, silent=True)  # the event's descriptor
        if mask != PRE_ACCESS:
            self.group.remove(On(FILESYSTEM, "fs"), PRE_ACCESS)
            self.group.add(On(FILESYSTEM, "fs"), mask)
        self.frozen = 0
        self.done = False  # the freezer
        self.got: bytes | None = None
        self.jobs: list[PermissionEvent] = []
        world.always("no-write-when-frozen", self._nobody_writes)

    def _open(self, path: str, flags: int, silent: bool = False) -> File:
        return finish(self.vfs.open(path, flags, silent=silent))

    def _nobody_writes(self) -> bool:
        freeze = self.sb.freeze
        return freeze.state != "FROZEN" or not any(
            level.holders for level in freeze.levels.values()
        )

    # -- who accesses --

    def sender(self, access: Callable[[], Op[bytes]] | None = None) -> Op[None]:
        """Access the file, and try again after the thaw when told so."""
        access = access or self.send
        for last in (False, True):
            try:
                got = yield from access()
            except OSError as error:
                self.world.check("filled", error.errno == AGAIN, f"the access fails: {error}")
                if last:
                    return
                yield Until("try again after the thaw", lambda: self.done)
                continue
            self.world.check("never-a-wrong-byte", got == CONTENT, f"the access got {got!r}")
            self.got = got
            return

    def send(self) -> Op[bytes]:
        """Copy the file to another one on the same filesystem."""
        yield from self.vfs.sendfile(self.out, self.stub, len(CONTENT), 0)
        return self.vfs_bytes(self.out)

    def vfs_bytes(self, file: File) -> bytes:
        pages = file.path.dentry.target.pages
        return pages[0].data if 0 in pages else b""

    def freezer(self, by: str = USER, await_: Callable[[], bool] | None = None) -> Op[None]:
        """Freeze, and thaw."""
        if await_ is not None:
            yield Until("wait for the holder", await_)
        try:
            yield from self.vfs.freeze(self.sb, by)
        except OSError as error:
            self.world.fail("freezer-gets-its-turn", f"the freezer gets {error}")
        self.frozen += 1
        yield from self.vfs.thaw(self.sb, by)
        self.done = True

    # -- who fills --

    def listener(self) -> Op[None]:
        """Read the queue, fill, answer; for ever."""
        while True:
            for event in (yield from self.events()):
                verdict = yield from self.filled(event)
                self.answer(event, verdict)

    def events(self) -> Op[list[PermissionEvent]]:
        """What is read from the queue when there is something."""
        yield Until("read the queue", lambda: len(self.group.queue) > 0)
        return self.asked()

    def asked(self) -> list[PermissionEvent]:
        return [event for event in self.group.read(1) if isinstance(event, PermissionEvent)]

    def answer(self, event: Event, verdict: int) -> bool:
        assert isinstance(event, PermissionEvent)
        return self.group.answer(event.number, verdict)

    def filled(self, event: Event) -> Op[int]:
        """Fill a file in all the ways that are asked for; ALLOW, or the errno to deny with."""
        try:
            for way in self.ways:
                yield from self.trying(way, self.way(way))
        except OSError as error:
            self.world.check("all-kinds-of-filling", error.errno == AGAIN, f"filling: {error}")
            return AGAIN
        return ALLOW

    def trying(self, way: str, work: Op[Any]) -> Op[None]:
        """Do a part of filling, without waiting for a thaw where the design can."""
        guard, me = self.guard, self.world.current()
        if not (isinstance(guard, _Guard) and self.tries(way)):
            yield from work
            return
        guard.trying.add(me)
        try:
            yield from work
        finally:
            guard.trying.discard(me)

    def way(self, way: str) -> Op[Any]:
        if way == ATTRIBUTES:
            return self.vfs.setattr("/stub", 0o600)
        if way == TEMPORARY:
            return self.temporary()
        return self.vfs.write(self.fill, CONTENT, 0)

    def temporary(self) -> Op[None]:
        """Make a file to collect content in, and clone from it."""
        try:
            yield from self.vfs.create("/new")
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
        yield from self.vfs.write(self.fill, CONTENT, 0)


def _base(world: World, tier: _Tier, access: Callable[[], Op[bytes]] | None = None) -> _Tier:
    world.task("sender", tier.sender(access))
    world.task("listener", tier.listener(), daemon=True)
    world.task("freezer", tier.freezer())
    return _judged(world, tier)


def _judged(world: World, tier: _Tier, *, freezes: int = 1) -> _Tier:
    world.at_end("freezer-gets-its-turn", lambda: tier.frozen == freezes)
    world.at_end("filled", lambda: tier.got == CONTENT)
    return tier


# -- hooks under protection, and outside of it --


@SCENARIO.design(
    "hook-under-protection",
    "The event is raised while freeze protection is held, as by sendfile and splice before 6.8.",
    lifetimes=_LIVES,
)
def hook_under_protection(world: World) -> None:
    _base(world, _Tier(world, _Guard(EVERYWHERE)))


@SCENARIO.design(
    "hook-under-protection-loop",
    "The same by way of a loop device: its worker writes to an image on the filesystem.",
    lifetimes=_LIVES,
)
def hook_under_protection_loop(world: World) -> None:
    tier = _Tier(world, _Guard(EVERYWHERE))
    done: list[bytes] = []
    asked: list[str] = []

    def through_loop() -> Op[bytes]:
        yield "submit to the loop device"
        asked.append("write")
        yield Until("wait for the loop device", lambda: bool(done))
        return done[0]

    def worker() -> Op[None]:
        yield Until("take work", lambda: bool(asked))
        yield from tier.vfs.write(image, b"", 0)
        done.append(CONTENT)

    image = tier._open("/stub", os.O_WRONLY)
    world.task("sender", tier.sender(through_loop))
    world.task("listener", tier.listener(), daemon=True)
    world.task("freezer", tier.freezer())
    world.task("loop worker", worker(), daemon=True)
    _judged(world, tier)


@SCENARIO.design(
    "hook-outside",
    "All hooks moved out of protection.",
    lifetimes=_LIVES,
)
def hook_outside(world: World) -> None:
    _base(world, _Tier(world, _Guard(), ways=EVERYTHING))


def _opener(tier: _Tier) -> Callable[[], Op[bytes]]:
    def open_and_truncate() -> Op[bytes]:
        file = yield from tier.vfs.open("/out", os.O_WRONLY | os.O_TRUNC)
        yield from tier.vfs.close(file)
        return CONTENT

    return open_and_truncate


@SCENARIO.design(
    "hook-outside-but-truncate",
    "As Linux 6.18 is: the open that truncates asks under protection (OPEN_PERM).",
    lifetimes=_LIVES,
)
def hook_outside_but_truncate(world: World) -> None:
    tier = _Tier(world, Guard(), mask=OPEN_PERM)
    _base(world, tier, _opener(tier))


@SCENARIO.design(
    "hook-outside-but-overlay",
    "An overlay protects its upper layer while it reads the lower one on the same filesystem.",
    lifetimes=_LIVES,
)
def hook_outside_but_overlay(world: World) -> None:
    tier = _Tier(world, _Guard())

    def copy_up() -> Op[bytes]:
        held = yield from tier.guard.start(tier.sb, WRITE)
        with held:
            return (yield from tier.vfs.read(tier.stub, len(CONTENT), 0))

    _base(world, tier, copy_up)


# -- listeners that do not wait --


@SCENARIO.design(
    "nowait-write",
    "The listener's writes only try the lock; what else it does waits.",
    lifetimes=_LIVES,
)
def nowait_write(world: World) -> None:
    tier = _Tier(world, _Guard(EVERYWHERE), ways=EVERYTHING, tries=lambda way: way == DATA)
    _base(world, tier)


@SCENARIO.design(
    "nowait-write-data-only",
    "The same, for a listener that only ever writes content.",
    lifetimes=_LIVES,
)
def nowait_write_data_only(world: World) -> None:
    _base(world, _Tier(world, _Guard(EVERYWHERE), tries=lambda way: way == DATA))


@SCENARIO.design(
    "open-flag",
    "Whatever is done through a descriptor opened with the flag does not wait; names have none.",
    lifetimes=_LIVES,
)
def open_flag(world: World) -> None:
    tier = _Tier(world, _Guard(EVERYWHERE), ways=EVERYTHING, tries=lambda way: way != TEMPORARY)
    _base(world, tier)


@SCENARIO.design(
    "task-nowait",
    "A flag of the task: nothing that it does waits for a thaw.",
    lifetimes=_LIVES,
)
def task_nowait(world: World) -> None:
    _base(world, _Tier(world, _Guard(EVERYWHERE), ways=EVERYTHING, tries=lambda way: True))


def _handed_on(world: World, declares: bool) -> None:
    # Only who reads the queue, or says so itself, has the context.
    readers: set[str] = set()
    tier = _Tier(
        world,
        _Guard(EVERYWHERE),
        ways=(DATA, ATTRIBUTES),
        tries=lambda way: world.current() in readers,
    )

    tier.vfs.answer = _Answer("worker")

    def reader() -> Op[None]:
        while True:
            events = yield from tier.events()
            readers.add(world.current())
            tier.jobs += events

    def worker() -> Op[None]:
        if declares:
            readers.add(world.current())
        while True:
            yield Until("take a job", lambda: bool(tier.jobs))
            event = tier.jobs.pop(0)
            verdict = yield from tier.filled(event)
            tier.answer(event, verdict)

    world.task("sender", tier.sender())
    world.task("listener", reader(), daemon=True)
    world.task("freezer", tier.freezer())
    world.task("worker", worker(), daemon=True)
    _judged(world, tier)


@SCENARIO.design(
    "listener-context",
    "Whoever reads the queue does not wait; its workers, which do not read, are not known.",
    lifetimes=_LIVES,
)
def listener_context(world: World) -> None:
    _handed_on(world, declares=False)


@SCENARIO.design(
    "listener-context-explicit",
    "Whoever fills says so itself, workers included, and does not wait.",
    lifetimes=_LIVES,
)
def listener_context_explicit(world: World) -> None:
    _handed_on(world, declares=True)


# -- listeners that access files themselves --


class _Nested(_Tier):
    """The listener looks into another file that has no content yet before it fills."""

    silent = False

    def way(self, way: str) -> Op[Any]:
        return super().way(way) if way != "index" else self.look_up_index()

    def look_up_index(self) -> Op[None]:
        file = yield from self.vfs.open("/index", os.O_RDONLY, silent=self.silent)
        yield from self.vfs.read(file, len(CONTENT), 0)
        yield from self.vfs.close(file)

    def filled(self, event: Event) -> Op[int]:
        # The index itself needs no index.
        stub = self.fill.path.dentry.target.key
        self.ways = ("index", DATA) if event.key == stub else (DATA,)
        return (yield from super().filled(event))


@SCENARIO.design(
    "inherited-nonotify",
    "What is opened through the event's directory is silent: the listener does not ask itself.",
    lifetimes=_LIVES,
)
def inherited_nonotify(world: World) -> None:
    tier = _Nested(world, _Guard())
    tier.silent = True
    _base(world, tier)


@SCENARIO.design(
    "nested-one-thread",
    "Without it: a listener of one thread reads a file that it would have to fill.",
    lifetimes=_LIVES,
)
def nested_one_thread(world: World) -> None:
    _base(world, _Nested(world, _Guard()))


@SCENARIO.design(
    "nested-two-threads",
    "The same with a second thread, which serves the first one: a nested fault, no deadlock.",
    lifetimes=_LIVES,
)
def nested_two_threads(world: World) -> None:
    tier = _Nested(world, _Guard())
    world.task("sender", tier.sender())
    world.task("listener", tier.listener(), daemon=True)
    world.task("freezer", tier.freezer())
    world.task("second listener", tier.listener(), daemon=True)
    _judged(world, tier)


class _Rejecting(_Guard):
    """Every access of a listener that somebody would be asked about is refused."""

    listeners = ("listener", "second listener")

    def silent(self, file: File) -> bool:
        if not file.silent and self.vfs.current() in self.listeners:
            raise OSError(errno.EDEADLK, os.strerror(errno.EDEADLK))
        return super().silent(file)


class _Rejected(_Nested):
    def look_up_index(self) -> Op[None]:
        try:
            yield from super().look_up_index()
        except OSError as error:
            self.world.check("nested-faults", error.errno != errno.EDEADLK, "refused: EDEADLK")
            raise


@SCENARIO.design(
    "auto-reject",
    "Accesses by a listener are refused, also where a second one would serve them.",
    lifetimes=_LIVES,
)
def auto_reject(world: World) -> None:
    tier = _Rejected(world, _Rejecting())
    world.task("sender", tier.sender())
    world.task("listener", tier.listener(), daemon=True)
    world.task("freezer", tier.freezer())
    world.task("second listener", tier.listener(), daemon=True)
    _judged(world, tier)


@SCENARIO.design(
    "look-up-handler",
    "A look-up asks before it takes the directory's lock, and the listener makes the file.",
    lifetimes=_LIVES,
)
def look_up_handler(world: World) -> None:
    tier = _Tier(world, _Guard(), ways=(TEMPORARY,), mask=OPEN_PERM | ONDIR)
    _looking(world, tier, locked=False)


@SCENARIO.design(
    "look-up-handler-locked",
    "The same, asked under the directory's lock.",
    lifetimes=_LIVES,
)
def look_up_handler_locked(world: World) -> None:
    tier = _Tier(world, _Guard(), ways=(TEMPORARY,), mask=OPEN_PERM | ONDIR)
    _looking(world, tier, locked=True)


def _looking(world: World, tier: _Tier, locked: bool) -> None:
    root = tier.sb.root
    assert root is not None
    folder = root.target

    def asked() -> Op[None]:
        # Linux has no permission event for looking a name up; this one stands for it.
        event = PermissionEvent(OPEN_PERM | ONDIR, "fs", folder.key)
        access = tier.core.access(event)
        verdict = yield from tier.vfs.answer.owed(access.asking())
        if verdict != ALLOW:
            raise OSError(verdict, os.strerror(verdict))

    def look_up() -> Op[bytes]:
        if locked:
            yield from folder.lock.share("lock directory to look up")
            with folder.lock:
                yield from asked()
        else:
            yield from asked()
        yield from tier.vfs.stat("/new")
        return CONTENT

    _base(world, tier, look_up)


# -- changing the freezer --


class _Level(_Guard):
    """Listeners have a level of their own between write and page fault."""

    levels = (WRITE, LISTENING, PAGEFAULT, FS)

    def start(self, sb: Superblock, level: str) -> Op[Held]:
        if level == WRITE and self.vfs.current() == "listener":
            level = LISTENING
        return (yield from super().start(sb, level))


@SCENARIO.design(
    "freeze-level",
    "Listeners write at a level of their own, shut after that of other writers.",
    lifetimes=_LIVES,
)
def freeze_level(world: World) -> None:
    _base(world, _Tier(world, _Level(EVERYWHERE), ways=EVERYTHING))


@SCENARIO.design(
    "freeze-level-page-fault",
    "The same, when the event comes from a fault on a mapped page, under the level after it.",
    lifetimes=_LIVES,
)
def freeze_level_page_fault(world: World) -> None:
    tier = _Tier(world, _Level(EVERYWHERE))

    def touch() -> Op[bytes]:
        held = yield from tier.guard.start(tier.sb, PAGEFAULT)
        with held:
            return (yield from tier.vfs.read(tier.stub, len(CONTENT), 0))

    _base(world, tier, touch)


@SCENARIO.design(
    "exclusive-freezer",
    "The listener is the one holder of freezing: user space asks it first; the kernel does not.",
    lifetimes=_LIVES,
)
def exclusive_freezer(world: World) -> None:
    tier = _Tier(world, _Guard(EVERYWHERE))
    world.task("sender", tier.sender())
    world.task("listener", tier.listener(), daemon=True)
    world.task("freezer", tier.freezer(USER, lambda: tier.got is not None))
    world.task("device snapshot", tier.freezer(KERNEL))
    _judged(world, tier, freezes=2)


class _Registered(_Guard):
    """A filesystem that knows it has a listener refuses to freeze."""

    def may_freeze(self, sb: Superblock, by: str) -> bool:
        notify = self.vfs.notify
        assert isinstance(notify, Fsnotify)
        return not notify.has_marks(sb.key) and super().may_freeze(sb, by)


@SCENARIO.design(
    "listener-registered",
    "The filesystem knows that it has a listener, and refuses to freeze.",
    lifetimes=_LIVES,
)
def listener_registered(world: World) -> None:
    _base(world, _Tier(world, _Registered(EVERYWHERE)))


# -- what fanwise does --


@SCENARIO.design(
    "deadline-workers",
    "Who answers never writes; workers fill; an access whose fill is late is told to try again.",
    lifetimes=_LIVES,
)
def deadline_workers(world: World) -> None:
    tier = _Tier(world, _Guard(EVERYWHERE), patience=1.0)
    tier.vfs.answer = _Answer("verdict")
    filled: list[tuple[PermissionEvent, int]] = []

    def verdict() -> Op[None]:
        while True:
            yield Until("read or answer", lambda: len(tier.group.queue) > 0 or bool(filled))
            if filled:
                tier.answer(*filled.pop(0))
            else:
                tier.jobs += tier.asked()

    def worker() -> Op[None]:
        while True:
            yield Until("take a job", lambda: bool(tier.jobs))
            event = tier.jobs.pop(0)
            verdict = yield from tier.filled(event)
            filled.append((event, verdict))

    def clock() -> Op[None]:
        yield Until("let a deadline pass", lambda: bool(tier.group.verdicts.open))
        tier.core.tick(0.0)
        tier.core.tick(2.0)

    world.task("sender", tier.sender())
    world.task("verdict", verdict(), daemon=True)
    world.task("freezer", tier.freezer())
    world.task("worker", worker(), daemon=True)
    world.task("clock", clock(), daemon=True)
    _judged(world, tier)
