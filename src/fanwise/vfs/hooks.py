"""Hooks: what operations tell to notify, as fanotify would be told.

Each hook is a step of its own, before which another CPU could run; without a listener there is no
step. An event names its objects by file handle and carries the handles of the directories above as
they are at that step.

REFS      an event owns copies.
LOCKING   none of its own; where it stands among an operation's locks is Linux's.
Linux reference: include/linux/fsnotify.h, fs/notify/fsnotify.c.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import Protocol

from fanwise.notify import mask as m
from fanwise.notify.event import ErrorEvent, Event

from .deleting import Deleting
from .dentry import Dentry
from .file import File
from .guard import Guard
from .inode import Inode
from .locks import Mutex
from .protocol import Current, Op
from .superblock import Superblock


class Listeners(Protocol):
    """Who is told: `fanwise.notify.fsnotify.Fsnotify`, or what a test puts in its place."""

    def send(self, events: Iterable[Event]) -> None:
        """Take events."""

    def unmount(self, fs: Hashable) -> None:
        """Forget a filesystem."""

    def marked(self, fs: Hashable, key: bytes) -> bool:
        """Whether an object has a mark."""


class Hooks:
    """The lowest layer of `Vfs`: who runs, who is told, and what.

    ``current`` names the task that runs, ``pid`` its process as events say it. ``guard`` decides on
    freeze protection, and ``deleting`` on the order in which a name goes and is told.
    """

    def __init__(
        self,
        current: Current = lambda: "task",
        notify: Listeners | None = None,
        pid: Callable[[], int] = lambda: 0,
        guard: Guard | None = None,
        deleting: Deleting | None = None,
    ) -> None:
        self.current = current
        self.notify = notify
        self.pid = pid
        self.guard = Guard() if guard is None else guard
        self.deleting = Deleting() if deleting is None else deleting
        self.namespace = Mutex("namespace", current)

    # -- events --

    def of_entry(self, mask: int, parent: Dentry, name: bytes, inode: Inode) -> Event:
        """Make the event of a change of a directory's entries (fsnotify_name)."""
        return Event(
            mask | (m.ONDIR if inode.is_dir else 0),
            parent.sb.key,
            inode.key,
            parent.target.key,
            name,
            pid=self.pid(),
            ancestors=parent.above(),
        )

    def of_rename(
        self, old: Dentry, name: bytes, new: Dentry, new_name: bytes, inode: Inode
    ) -> Event:
        """Make the event RENAME, which has both places."""
        event = self.of_entry(m.RENAME, old, name, inode)
        event.dir2, event.name2, event.ancestors2 = new.target.key, new_name, new.above()
        return event

    def of_object(self, mask: int, dentry: Dentry) -> Event:
        """Make the event of an object with the place it is seen at (fsnotify_dentry)."""
        inode = dentry.target
        above = dentry.above()
        if inode.is_dir:
            return Event(mask | m.ONDIR, dentry.sb.key, inode.key, pid=self.pid(), ancestors=above)
        if not above:
            return Event(mask, dentry.sb.key, inode.key, pid=self.pid())
        return Event(
            mask,
            dentry.sb.key,
            inode.key,
            above[0],
            dentry.name,
            pid=self.pid(),
            ancestors=above[1:],
        )

    def of_inode(self, mask: int, inode: Inode) -> Event:
        """Make the event of an object alone: no place, and no parent is told (fsnotify_inode)."""
        ondir = m.ONDIR if inode.is_dir else 0
        return Event(mask | ondir, inode.sb.key, inode.key, pid=self.pid())

    # -- telling --

    def report(self, event: Event) -> None:
        """Give an event to notify, now."""
        if self.notify is not None:
            self.notify.send((event,))

    def tell_entry(self, mask: int, parent: Dentry, name: bytes, inode: Inode) -> Op[None]:
        """Tell of a change of a directory's entries."""
        if self.notify is not None:
            yield f"tell {m.show(mask)}"
            self.report(self.of_entry(mask, parent, name, inode))

    def tell_object(self, mask: int, dentry: Dentry) -> Op[None]:
        """Tell of an object, and its parent."""
        if self.notify is not None:
            yield f"tell {m.show(mask)}"
            self.report(self.of_object(mask, dentry))

    def tell_inode(self, mask: int, inode: Inode) -> Op[None]:
        """Tell of an object alone."""
        if self.notify is not None:
            yield f"tell {m.show(mask)}"
            self.report(self.of_inode(mask, inode))

    def tell_file(self, mask: int, file: File) -> Op[None]:
        """Tell of what was done through a file, unless it is silent."""
        if not file.silent:
            yield from self.tell_object(mask, file.path.dentry)

    def tell_error(self, sb: Superblock, error: int, inode: Inode | None) -> Op[None]:
        """Tell of an error of a filesystem (fsnotify_sb_error)."""
        if self.notify is not None:
            yield "tell FS_ERROR"
            key = None if inode is None else inode.key
            place = inode.dentries[:1] if inode is not None else []
            above = place[0].above() if place else ()
            self.report(
                ErrorEvent(m.FS_ERROR, sb.key, key, pid=self.pid(), ancestors=above, error=error)
            )

    # -- asking --

    def ask(
        self, mask: int, file: File, offset: int | None = None, count: int | None = None
    ) -> Op[None]:
        """Ask those who give verdicts; raises OSError with the errno of a denial.

        ``offset`` and ``count`` are the bytes that are about to be used, None for none in
        particular.
        """
        return
        yield
