"""Hooks: what operations tell to notify, as fanotify would be told.

Each hook is a step of its own, before which another CPU could run; without a listener there is no
step. An event names its objects by file handle and carries the handles of the directories above as
they are at that step.

REFS      an event owns copies.
LOCKING   none of its own; where it stands among an operation's locks is Linux's.
Linux reference: include/linux/fsnotify.h, fs/notify/fsnotify.c.
"""

from collections.abc import Callable

from fanwise.notify import mask as m
from fanwise.notify.event import ErrorEvent, Event, PermissionEvent
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.mark import CONTENT, PRE_CONTENT
from fanwise.notify.report import Report

from .deleting import Deleting
from .dentry import Dentry
from .file import File
from .guard import Guard
from .inode import Inode
from .locks import Mutex
from .protocol import Current, Op, fail
from .superblock import Superblock


class Hooks:
    """The lowest layer of `Vfs`: who runs, who is told, and what.

    ``current`` names the task that runs, ``pid`` its process as events say it. ``guard`` decides on
    freeze protection, and ``deleting`` on the order in which a name goes and is told.
    """

    def __init__(
        self,
        current: Current = lambda: "task",
        notify: Fsnotify | None = None,
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

    def prepare(self, event: Event) -> Report | None:
        """Build a report that is told later, by `tell_report`; None without a listener."""
        return None if self.notify is None else self.notify.prepare((event,))

    def tell_report(self, report: Report | None) -> Op[None]:
        """Tell what was prepared: it is visible now."""
        if report is not None:
            yield "tell report"
            report.report()

    # -- asking --

    def ask(self, mask: int, file: File, at: int = 0, count: int = 0) -> Op[None]:
        """Ask those who give verdicts; raises OSError with the errno of a denial.

        ``at`` and ``count`` are the bytes that are about to be used, of PRE_ACCESS alone, which is
        asked for whole pages. Nobody is asked through a file that was opened before they wanted it.
        """
        notify = self.notify
        if notify is None or (mask != m.OPEN_PERM and not file.asks & mask):
            return
        event = self.of_access(mask, file.path.dentry)
        if mask == m.PRE_ACCESS:
            size = file.path.dentry.sb.disk.page
            start = at - at % size
            event.range = start, -(-(at + count) // size) * size - start
        if not notify.asks(event):
            return
        verdict = yield from notify.access(event).asking()
        if verdict:
            fail(verdict)

    def of_access(self, mask: int, dentry: Dentry) -> PermissionEvent:
        """Make the event of an access that may have to wait."""
        told = self.of_object(mask, dentry)
        return PermissionEvent(
            told.mask,
            told.fs,
            told.key,
            told.dir,
            told.name,
            pid=told.pid,
            ancestors=told.ancestors,
        )

    def may_be_asked(self, file: File) -> int:
        """Return what may be asked through a file that is opened now; later marks change nothing.

        ACCESS_PERM if any group that gives verdicts has a mark on the filesystem, PRE_ACCESS if one
        wants it of this file (file_set_fsnotify_mode_from_watchers).
        """
        notify, dentry = self.notify, file.path.dentry
        if notify is None or file.silent or not notify.has_marks(dentry.sb.key):
            return 0
        found = 0
        for group in notify.groups:
            if group.cls in (CONTENT, PRE_CONTENT) and any(
                on.fs == dentry.sb.key for on in group.marks
            ):
                found = m.ACCESS_PERM
        if found and notify.asks(self.of_access(m.PRE_ACCESS, dentry)):
            found |= m.PRE_ACCESS
        return found
