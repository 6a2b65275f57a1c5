"""The parts of the scenario ``freeze``: guard, VFS, and a filesystem with a sender and a listener.

REFS      none beyond those of `fanwise.vfs` and `fanwise.notify`, whose code this runs.
LOCKING   freeze protection first; whoever holds it and waits for a verdict waits for the listener.
LIFETIME  of the filesystem's freeze, of accesses and of questions: FREEZE, ACCESS, QUESTION.
"""

import errno
import os
from collections.abc import Callable, Collection
from typing import Any

from fanwise.lab import World
from fanwise.lifetime import Until
from fanwise.notify.event import Event, PermissionEvent
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.mark import FILESYSTEM, PRE_CONTENT, On
from fanwise.notify.mask import PRE_ACCESS
from fanwise.notify.verdict import ALLOW, Policy
from fanwise.vfs import Disk, File, Guard, Op, Superblock, Vfs, finish
from fanwise.vfs.guard import SENDING, TRUNCATING, TRUNCATING_OPEN, WRITING
from fanwise.vfs.locks import Held
from fanwise.vfs.protocol import T
from fanwise.vfs.superblock import USER

CONTENT, HOLE = b"data", b"\0\0\0\0"
DATA, ATTRIBUTES, TEMPORARY = "data", "attributes", "temporary file"
EVERYTHING = (DATA, ATTRIBUTES, TEMPORARY)
EVERYWHERE = frozenset({WRITING, SENDING, TRUNCATING, TRUNCATING_OPEN})
AGAIN = errno.EAGAIN


class TryingGuard(Guard):
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


class Answer:
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


class AnsweredVfs(Vfs):
    """Says whom an access waits for."""

    answer = Answer("listener")

    def ask(self, mask: int, file: File, at: int = 0, count: int = 0) -> Op[None]:
        yield from self.answer.owed(super().ask(mask, file, at, count))


class Tier:
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
        self.vfs = AnsweredVfs(world.current, self.core, guard=guard)
        self.sb = self.vfs.superblock("fs", Disk({"stub": HOLE, "index": HOLE, "out": b""}))
        self.vfs.mount_root(self.sb)
        self.out = self.opened("/out", os.O_WRONLY)  # nobody is asked about this one
        self.group.add(On(FILESYSTEM, "fs"), PRE_ACCESS)  # whoever opens a file now asks later
        self.stub = self.opened("/stub", os.O_RDONLY)
        self.fill = self.opened("/stub", os.O_RDWR, silent=True)  # the event's descriptor
        if mask != PRE_ACCESS:
            self.group.remove(On(FILESYSTEM, "fs"), PRE_ACCESS)
            self.group.add(On(FILESYSTEM, "fs"), mask)
        self.frozen = 0
        self.done = False  # the freezer
        self.got: bytes | None = None
        self.jobs: list[PermissionEvent] = []
        self._stood: object = None  # what was stored when it was frozen
        world.always("no-write-when-frozen", self._nobody_writes)

    def opened(self, path: str, flags: int, silent: bool = False) -> File:
        return finish(self.vfs.open(path, flags, silent=silent))

    def _nobody_writes(self) -> bool:
        # Also one that takes no protection: all was written back, and names and attributes stand.
        freeze = self.sb.freeze
        if freeze.state != "FROZEN":
            self._stood = None
            return True
        stored = [
            (node.number, node.mode, node.nlink, node.size, *node.entries.items())
            for node in self.sb.disk.nodes.values()
        ]
        if self._stood is None:
            self._stood = stored
        return (
            stored == self._stood
            and not any(inode.dirty for inode in self.sb.inodes.values())
            and not any(level.holders for level in freeze.levels.values())
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
        if not (isinstance(guard, TryingGuard) and self.tries(way)):
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
        """Make a file, as one to collect content in; to clone from it is a write, too."""
        try:
            yield from self.vfs.create("/new")
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
        yield from self.vfs.write(self.fill, CONTENT, 0)
