"""How a listener fills files while somebody freezes the filesystem, on the VFS and real verdicts.

A *sender* copies a file that has no content yet (sendfile); a *listener* of class PRE_CONTENT is
asked first, and fills it; a *freezer* freezes the filesystem and thaws it again. Designs replace
the guard, which decides where hooks stand and who waits for a frozen filesystem.

Linux reference: fs/super.c, fs/splice.c, fs/read_write.c, fs/notify/fanotify; the hooks left freeze
protection in 6.8; page faults were given a hook in 6.14-rc1 and lost it before the release.
"""

import errno
import os
from collections.abc import Callable, Mapping
from typing import Any

from fanwise.lab import Scenario, World
from fanwise.lifetime import Until
from fanwise.notify.access import ACCESS
from fanwise.notify.event import Event, PermissionEvent
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.mask import ONDIR, OPEN_PERM
from fanwise.notify.verdict import ALLOW, QUESTION
from fanwise.vfs import File, Guard, Op, Superblock
from fanwise.vfs.locks import Held
from fanwise.vfs.superblock import FREEZE, FS, KERNEL, PAGEFAULT, USER, WRITE

from ._freeze_tier import (
    ATTRIBUTES,
    CONTENT,
    DATA,
    EVERYTHING,
    EVERYWHERE,
    TEMPORARY,
    Answer,
    Tier,
    TryingGuard,
)

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
    lifetimes=(FREEZE, ACCESS, QUESTION),
)

LISTENING = "for listeners"


def _base(
    world: World,
    tier: Tier,
    access: Callable[[], Op[bytes]] | None = None,
    *,
    listener: Op[None] | None = None,
    others: Mapping[str, Op[None]] | None = None,
) -> None:
    """One who accesses, one who reads the events, one who freezes; ``others`` help or count."""
    world.task("sender", tier.sender(access))
    world.task("listener", listener or tier.listener(), daemon=True)
    world.task("freezer", tier.freezer())
    for name, body in (others or {}).items():
        world.task(name, body, daemon=True)
    _judged(world, tier)


def _judged(world: World, tier: Tier, *, freezes: int = 1) -> None:
    world.at_end("freezer-gets-its-turn", lambda: tier.frozen == freezes)
    world.at_end("filled", lambda: tier.got == CONTENT)


# -- hooks under protection, and outside of it --


@SCENARIO.design(
    "hook-under-protection",
    "The event is raised while freeze protection is held, as by sendfile and splice before 6.8.",
)
def hook_under_protection(world: World) -> None:
    _base(world, Tier(world, TryingGuard(EVERYWHERE)))


@SCENARIO.design(
    "hook-under-protection-loop",
    "The same by way of a loop device: its worker writes to an image on the filesystem.",
)
def hook_under_protection_loop(world: World) -> None:
    tier = Tier(world, TryingGuard(EVERYWHERE))
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

    image = tier.opened("/stub", os.O_WRONLY)
    _base(world, tier, through_loop, others={"loop worker": worker()})


@SCENARIO.design(
    "hook-outside",
    "All hooks moved out of protection.",
)
def hook_outside(world: World) -> None:
    _base(world, Tier(world, TryingGuard(), ways=EVERYTHING))


def _opener(tier: Tier) -> Callable[[], Op[bytes]]:
    def open_and_truncate() -> Op[bytes]:
        file = yield from tier.vfs.open("/out", os.O_WRONLY | os.O_TRUNC)
        yield from tier.vfs.close(file)
        return CONTENT

    return open_and_truncate


@SCENARIO.design(
    "hook-outside-but-truncate",
    "As Linux 6.18 is: the open that truncates asks under protection (OPEN_PERM).",
)
def hook_outside_but_truncate(world: World) -> None:
    tier = Tier(world, Guard(), mask=OPEN_PERM)
    _base(world, tier, _opener(tier))


@SCENARIO.design(
    "hook-outside-but-overlay",
    "An overlay protects its upper layer while it reads the lower one on the same filesystem.",
)
def hook_outside_but_overlay(world: World) -> None:
    tier = Tier(world, TryingGuard())

    def copy_up() -> Op[bytes]:
        held = yield from tier.guard.start(tier.sb, WRITE)
        with held:
            return (yield from tier.vfs.read(tier.stub, len(CONTENT), 0))

    _base(world, tier, copy_up)


# -- listeners that do not wait --


@SCENARIO.design(
    "nowait-write",
    "The listener's writes only try the lock; what else it does waits.",
)
def nowait_write(world: World) -> None:
    tier = Tier(world, TryingGuard(EVERYWHERE), ways=EVERYTHING, tries=lambda way: way == DATA)
    _base(world, tier)


@SCENARIO.design(
    "nowait-write-data-only",
    "The same, for a listener that only ever writes content.",
)
def nowait_write_data_only(world: World) -> None:
    _base(world, Tier(world, TryingGuard(EVERYWHERE), tries=lambda way: way == DATA))


@SCENARIO.design(
    "open-flag",
    "Whatever is done through a descriptor opened with the flag does not wait; names have none.",
)
def open_flag(world: World) -> None:
    tier = Tier(world, TryingGuard(EVERYWHERE), ways=EVERYTHING, tries=lambda way: way != TEMPORARY)
    _base(world, tier)


@SCENARIO.design(
    "task-nowait",
    "A flag of the task: nothing that it does waits for a thaw.",
)
def task_nowait(world: World) -> None:
    _base(world, Tier(world, TryingGuard(EVERYWHERE), ways=EVERYTHING, tries=lambda way: True))


def _handed_on(world: World, declares: bool) -> None:
    # Only who reads the queue, or says so itself, has the context.
    readers: set[str] = set()
    tier = Tier(
        world,
        TryingGuard(EVERYWHERE),
        ways=(DATA, ATTRIBUTES),
        tries=lambda way: world.current() in readers,
    )

    tier.vfs.answer = Answer("worker")

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

    _base(world, tier, listener=reader(), others={"worker": worker()})


@SCENARIO.design(
    "listener-context",
    "Whoever reads the queue does not wait; its workers, which do not read, are not known.",
)
def listener_context(world: World) -> None:
    _handed_on(world, declares=False)


@SCENARIO.design(
    "listener-context-explicit",
    "Whoever fills says so itself, workers included, and does not wait.",
)
def listener_context_explicit(world: World) -> None:
    _handed_on(world, declares=True)


# -- listeners that access files themselves --


class _Nested(Tier):
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
)
def inherited_nonotify(world: World) -> None:
    tier = _Nested(world, TryingGuard())
    tier.silent = True
    _base(world, tier)


@SCENARIO.design(
    "nested-one-thread",
    "Without it: a listener of one thread reads a file that it would have to fill.",
)
def nested_one_thread(world: World) -> None:
    _base(world, _Nested(world, TryingGuard()))


@SCENARIO.design(
    "nested-two-threads",
    "The same with a second thread, which serves the first one: a nested fault, no deadlock.",
)
def nested_two_threads(world: World) -> None:
    tier = _Nested(world, TryingGuard())
    _base(world, tier, others={"second listener": tier.listener()})


class _Rejecting(TryingGuard):
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
)
def auto_reject(world: World) -> None:
    tier = _Rejected(world, _Rejecting())
    _base(world, tier, others={"second listener": tier.listener()})


@SCENARIO.design(
    "look-up-handler",
    "A look-up asks before it takes the directory's lock, and the listener makes the file.",
)
def look_up_handler(world: World) -> None:
    tier = Tier(world, TryingGuard(), ways=(TEMPORARY,), mask=OPEN_PERM | ONDIR)
    _looking(world, tier, locked=False)


@SCENARIO.design(
    "look-up-handler-locked",
    "The same, asked under the directory's lock.",
)
def look_up_handler_locked(world: World) -> None:
    tier = Tier(world, TryingGuard(), ways=(TEMPORARY,), mask=OPEN_PERM | ONDIR)
    _looking(world, tier, locked=True)


def _looking(world: World, tier: Tier, locked: bool) -> None:
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


class _Level(TryingGuard):
    """Listeners have a level of their own between write and page fault."""

    levels = (WRITE, LISTENING, PAGEFAULT, FS)

    def start(self, sb: Superblock, level: str) -> Op[Held]:
        if level == WRITE and self.vfs.current() == "listener":
            level = LISTENING
        return (yield from super().start(sb, level))


@SCENARIO.design(
    "freeze-level",
    "Listeners write at a level of their own, shut after that of other writers.",
)
def freeze_level(world: World) -> None:
    _base(world, Tier(world, _Level(EVERYWHERE), ways=EVERYTHING))


@SCENARIO.design(
    "freeze-level-page-fault",
    "The same, when the event comes from a fault on a mapped page, under the level after it.",
)
def freeze_level_page_fault(world: World) -> None:
    tier = Tier(world, _Level(EVERYWHERE))

    def touch() -> Op[bytes]:
        held = yield from tier.guard.start(tier.sb, PAGEFAULT)
        with held:
            return (yield from tier.vfs.read(tier.stub, len(CONTENT), 0))

    _base(world, tier, touch)


@SCENARIO.design(
    "exclusive-freezer",
    "The listener is the one holder of freezing: user space asks it first; the kernel does not.",
)
def exclusive_freezer(world: World) -> None:
    tier = Tier(world, TryingGuard(EVERYWHERE))
    world.task("sender", tier.sender())
    world.task("listener", tier.listener(), daemon=True)
    world.task("freezer", tier.freezer(USER, lambda: tier.got is not None))
    world.task("device snapshot", tier.freezer(KERNEL))
    _judged(world, tier, freezes=2)


class _Registered(TryingGuard):
    """A filesystem that knows it has a listener refuses to freeze."""

    def may_freeze(self, sb: Superblock, by: str) -> bool:
        notify = self.vfs.notify
        assert isinstance(notify, Fsnotify)
        return not notify.has_marks(sb.key) and super().may_freeze(sb, by)


@SCENARIO.design(
    "listener-registered",
    "The filesystem knows that it has a listener, and refuses to freeze.",
)
def listener_registered(world: World) -> None:
    _base(world, Tier(world, _Registered(EVERYWHERE)))


# -- what fanwise does --


@SCENARIO.design(
    "deadline-workers",
    "Who answers never writes; workers fill; an access whose fill is late is told to try again.",
)
def deadline_workers(world: World) -> None:
    tier = Tier(world, TryingGuard(EVERYWHERE), patience=1.0)
    tier.vfs.answer = Answer("verdict")
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
