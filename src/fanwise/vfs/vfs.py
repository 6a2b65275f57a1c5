"""The whole: every operation, and what is done to a filesystem as such.

REFS      a Vfs holds its root mount; everything else is held by what is below it and by whoever
          has a file or a path open.
Linux reference: fs/ioctl.c, fs/fserror.c, Documentation/filesystems/vfs.rst.
"""

from collections.abc import Callable

from fanwise.notify.fsnotify import Fsnotify

from .deleting import Deleting
from .files import Files
from .guard import Guard
from .inode import Inode
from .protocol import Current, Op
from .superblock import USER, Superblock


class Vfs(Files):
    """An in-memory VFS: objects, names, files, mounts; each operation a generator of steps.

    ``current`` names the task that runs (holders of locks are named by it), ``pid`` is its process
    as events say it, and ``notify`` (an `Fsnotify`) is told what happens, if there is one.
    ``guard`` decides on freeze protection, ``deleting`` on the order in which a name goes. Both are
    Linux's unless others are given; every other step is a method that a subclass may replace.

    `mount_root` and `superblock` act at once; everything else is run by somebody: `finish` when
    nobody else acts, the explorer of the lab otherwise.
    """

    def __init__(
        self,
        current: Current = lambda: "task",
        notify: Fsnotify | None = None,
        pid: Callable[[], int] = lambda: 0,
        guard: Guard | None = None,
        deleting: Deleting | None = None,
    ) -> None:
        super().__init__(current, notify, pid, guard, deleting)
        self.guard.vfs = self.deleting.vfs = self

    def freeze(self, sb: Superblock, by: str = USER) -> Op[None]:
        """Freeze a filesystem. Raises EOPNOTSUPP for a tmpfs, and EBUSY for one frozen so."""
        yield from self.guard.freeze(sb, by)

    def thaw(self, sb: Superblock, by: str = USER) -> Op[None]:
        """Thaw a filesystem. Raises EINVAL for one that is not frozen so."""
        yield from self.guard.thaw(sb, by)

    def error(self, sb: Superblock, code: int, inode: Inode | None = None) -> Op[None]:
        """Let a filesystem find something broken: told first, counted after that, as ext4 does.

        An unmount waits until it is told; what is found after that is told to nobody.
        """
        yield "find error"
        if sb.state != "ACTIVE":
            return
        sb.pending += 1
        yield from self.tell_error(sb, code, inode)
        yield "count error"
        sb.errors += 1
        sb.first_error = sb.first_error or code
        sb.pending -= 1
