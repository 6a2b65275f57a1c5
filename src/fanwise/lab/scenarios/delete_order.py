"""Whether a delete is told before or after the name is gone, on the VFS with its real operations.

One task removes a file, one reads the event and opens the name at once; others get in between: one
drops the caches, one looks at the file, and in some designs one adds the mark.

Linux reference: vfs_unlink in fs/namei.c, d_delete_notify in include/linux/fsnotify.h (a37d9a17f099
in v5.17), c2262d9f1121 (v5.3, which moved the hook up). fs/notify; LTP inotify11.
"""

import errno
from collections.abc import Callable
from functools import cache

from fanwise.lab import Scenario, World
from fanwise.lifetime import Until
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.group import GROUP
from fanwise.notify.mark import INODE, On
from fanwise.notify.mask import DELETE, Q_OVERFLOW
from fanwise.notify.report import REPORT
from fanwise.vfs import Deleting, Dentry, Disk, Op, Vfs, finish
from fanwise.vfs.dentry import DENTRY
from fanwise.vfs.inode import INODE as INODE_LIFE, Inode

SCENARIO = Scenario(
    "delete-order",
    "When a delete is told",
    """
A watcher that reads "deleted" wants to act on it: forget the file, open the name again, compare.
Up to Linux 5.2 `d_delete()` told the event itself, in the middle of dropping the name: nobody who
read it could open the old file, but the name already led to nothing, so the event could not say
*which* object had gone. When fanotify began to report objects, the hook moved up in 5.3, to where
the name still led to the object. For the cache the name was then still good: a watcher that was
fast enough opened the file whose deletion it had just read. Programs that watch for the removal of
a socket or a lock file, and recreate it, hung on the old one.

What was proposed afterwards: a flag with which a watch asks the hook to drop the cached name first;
an internal event that asks beforehand whether anybody wants the object kept; building the event
first and queueing it later; and what was merged in 5.17: always hold the object, drop the name,
tell, let go. On kernels in between, a program can only hold the news back until the name no longer
leads to that object.

Not covered: an NFS client that renames a busy file instead of removing it keeps the name cached on
purpose; there the event may be read while the name still opens.
""",
    {
        "gone-when-told": "After DELETE was read, no open by that name reaches the old object.",
        "names-its-object": "DELETE names the object that was removed.",
        "told-once": "Whoever had asked before the delete began is told of it, once.",
    },
    lifetimes=(DENTRY, INODE_LIFE, GROUP),
)

NAME = b"f"


class _Files:
    """A filesystem with one file, watched by one group, and what was read."""

    def __init__(self, world: World, deleting: Deleting, watched: bool = True) -> None:
        self.world = world
        self.core = Fsnotify()
        self.vfs = Vfs(world.current, self.core, deleting=deleting)
        self.sb = self.vfs.superblock("fs", Disk({"f": b"old"}))
        self.vfs.mount_root(self.sb)
        self.old = finish(self.vfs.stat("/f")).key
        self.on = On(INODE, "fs", self.sb.root.target.key if self.sb.root else b"", directory=True)
        self.group = self.core.group()
        self.watched = watched
        self.told = 0
        if watched:
            self.watch()

    def watch(self) -> None:
        self.group.add(self.on, DELETE)

    def remover(self) -> Op[None]:
        yield from self.vfs.unlink("/f")

    def marker(self) -> Op[None]:
        yield "add the mark"
        self.watch()

    def shrinker(self) -> Op[None]:
        yield from self.vfs.drop_caches(self.sb)

    def looker(self) -> Op[None]:
        """Look at the file: while it does, the name is in use and cannot just become negative."""
        try:
            yield from self.vfs.stat("/f")
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise

    def reader(self, patient: bool = False) -> Op[None]:
        """Read DELETE, then open the name; a patient one waits until the name is another's."""
        yield Until("wait for an event", lambda: len(self.group.queue) > 0)
        for event in self.group.read():
            self.world.check("told-once", not event.mask & Q_OVERFLOW, "an overflow")
            self.told += 1
            self.world.check(
                "names-its-object",
                event.key == self.old,
                f"DELETE of {event.name!r} names {event.key!r}, which was {self.old!r}",
            )
            if patient:
                while (yield from self.opened()) == self.old:
                    # Nothing in the kernel wakes it: it looks again when it likes.
                    yield Until("look again", self.unhashed)
            found = yield from self.opened()
            self.world.check(
                "gone-when-told",
                found != self.old,
                f"DELETE of {event.name!r} was read, and the name opens {found!r}",
            )

    def opened(self) -> Op[bytes | None]:
        """What the name opens: a file handle."""
        try:
            file = yield from self.vfs.open("/f", silent=True)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return None
        key = file.path.dentry.target.key
        yield from self.vfs.close(file)
        return key

    def unhashed(self) -> bool:
        root = self.sb.root
        dentry = root.children.get(NAME) if root is not None else None
        return dentry is None or dentry.inode is None


def _model(
    world: World, deleting: Callable[[], Deleting], *, patient: bool = False, late: bool = False
) -> _Files:
    files = _Files(world, deleting(), watched=not late)
    world.task("remover", files.remover())
    world.task("reader", files.reader(patient), daemon=late)
    world.task("shrinker", files.shrinker())
    world.task("looker", files.looker())
    if late:
        world.task("marker", files.marker())
    else:
        world.at_end("told-once", lambda: files.told == 1)
    for what, number in _costs(deleting).items():
        world.count(what, number)
    return files


class _Counting(Vfs):
    """Counts what a removal does."""

    held = asked = 0

    def ihold(self, inode: Inode) -> None:
        self.held += 1
        super().ihold(inode)


# What a removal costs when nobody listens. It is the same every time.
@cache
def _costs(deleting: Callable[[], Deleting]) -> dict[str, int]:
    core = Fsnotify()
    vfs = _Counting(notify=core, deleting=deleting())
    vfs.mount_root(vfs.superblock("fs", Disk({"f": b"old"})))
    steps, removal = 0, vfs.unlink("/f")
    while next(removal, None) is not None:
        steps += 1
    strategy = vfs.deleting
    return {
        "steps of a removal that nobody watches": steps,
        "references taken for it": vfs.held,
        "questions asked for it": getattr(strategy, "asked", 0),
        "events built for it": getattr(strategy, "built", 0),
    }


class _First(Deleting):
    """Told in front of the drop."""

    def remove(self, parent: Dentry, dentry: Dentry, take_away: Callable[[], Op[None]]) -> Op[None]:
        inode, name = dentry.target, dentry.name
        yield from take_away()
        yield from self.vfs.tell_entry(DELETE, parent, name, inode)
        yield from self.vfs.d_delete(dentry)


@SCENARIO.design(
    "notify-first",
    "Told before the name is dropped, so that the hook sees the object (kernels 5.3 to 5.16).",
)
def notify_first(world: World) -> None:
    _model(world, _First)


class _Inside(Deleting):
    """Told by the drop itself, which has parted the name from its object by then."""

    def remove(self, parent: Dentry, dentry: Dentry, take_away: Callable[[], Op[None]]) -> Op[None]:
        vfs, name = self.vfs, dentry.name
        yield from take_away()
        yield "d_delete"
        gone = None
        if dentry.refs == 1:
            gone = vfs.make_negative(dentry)
        else:
            vfs.d_drop(dentry)
        # All that the hook is given is the dentry.
        event = vfs.of_entry(DELETE, parent, name, parent.target)
        event.key = None if dentry.inode is None else dentry.inode.key
        event.mask = DELETE
        yield "tell DELETE"
        vfs.report(event)
        if gone is not None:
            yield from vfs.let_go(gone)


@SCENARIO.design(
    "inside-drop",
    "Told inside the drop, when the name leads to nothing already (before 5.3).",
)
def inside_drop(world: World) -> None:
    _model(world, _Inside)


class _Flagged(Deleting):
    """The hook drops the cached name first where a watch asked for that."""

    flagged = True

    def remove(self, parent: Dentry, dentry: Dentry, take_away: Callable[[], Op[None]]) -> Op[None]:
        vfs = self.vfs
        inode, name = dentry.target, dentry.name
        yield from take_away()
        if self.flagged and vfs.marked(parent.target):
            yield "drop the name for a flagged watch"
            vfs.d_drop(dentry)
        yield from vfs.tell_entry(DELETE, parent, name, inode)
        if dentry.state == "POSITIVE":
            yield from vfs.d_delete(dentry)


class _Unflagged(_Flagged):
    """The same kernel, and a program that was written before the flag."""

    flagged = False


@SCENARIO.design(
    "mark-flag",
    "A flag on the watch makes the hook drop the cached name before it tells.",
)
def mark_flag(world: World) -> None:
    _model(world, _Flagged)


@SCENARIO.design(
    "mark-flag-unasked",
    "The same, for a program that does not know the flag.",
)
def mark_flag_unasked(world: World) -> None:
    _model(world, _Unflagged)


class _Asking(Deleting):
    """An internal event asks first whether anybody wants the object kept."""

    asked = 0

    def remove(self, parent: Dentry, dentry: Dentry, take_away: Callable[[], Op[None]]) -> Op[None]:
        vfs = self.vfs
        inode, name = dentry.target, dentry.name
        yield "ask whether to pin"
        self.asked += 1
        pinned = vfs.marked(parent.target)
        if pinned:
            vfs.ihold(inode)
        yield from take_away()
        yield from vfs.d_delete(dentry)
        # Without a pin there may be no object any more that a handle could be made of.
        event = vfs.of_entry(DELETE, parent, name, inode)
        event.key = inode.key if pinned else None
        yield "tell DELETE"
        vfs.report(event)
        if pinned:
            yield from vfs.iput(inode)


@SCENARIO.design(
    "pre-delete-event",
    "An internal event before the delete asks whether to pin the object; nobody asks later.",
)
def pre_delete_event(world: World) -> None:
    _model(world, _Asking)


@SCENARIO.design(
    "pre-delete-event-late-mark",
    "The same, when the mark is added between the question and the event.",
)
def pre_delete_event_late_mark(world: World) -> None:
    _model(world, _Asking, late=True)


class _Preparing(Deleting):
    """The event is built, the name dropped, and only then the event is queued."""

    built = 0

    def remove(self, parent: Dentry, dentry: Dentry, take_away: Callable[[], Op[None]]) -> Op[None]:
        vfs = self.vfs
        assert isinstance(vfs.notify, Fsnotify)
        yield "build the event"
        report = vfs.notify.prepare([vfs.of_entry(DELETE, parent, dentry.name, dentry.target)])
        self.built += len(report.events)
        try:
            yield from take_away()
        except OSError:
            report.abandon()
            raise
        yield from vfs.d_delete(dentry)
        yield "queue the event"
        report.report()


@SCENARIO.design(
    "prepare-report",
    "Build the event, drop the name, then queue the event; no object is held.",
    lifetimes=(*SCENARIO.lifetimes, REPORT),
)
def prepare_report(world: World) -> None:
    _model(world, _Preparing)


@SCENARIO.design(
    "prepare-report-late-mark",
    "The same, when the mark is added in between.",
    lifetimes=(*SCENARIO.lifetimes, REPORT),
)
def prepare_report_late_mark(world: World) -> None:
    _model(world, _Preparing, late=True)


@SCENARIO.design(
    "pin-drop-notify",
    "Hold the object, drop the name, tell, let go (5.17).",
)
def pin_drop_notify(world: World) -> None:
    _model(world, Deleting)


@SCENARIO.design(
    "pin-drop-notify-late-mark",
    "The same, when a mark is added in between.",
)
def pin_drop_notify_late_mark(world: World) -> None:
    _model(world, Deleting, late=True)


@SCENARIO.design(
    "hold-until-gone",
    "What a program can do on 5.3 to 5.16: hold DELETED back until the name leads elsewhere.",
)
def hold_until_gone(world: World) -> None:
    _model(world, _First, patient=True)
