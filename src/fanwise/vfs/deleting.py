"""How a name is removed and told: the order is a strategy, and this is Linux's since 5.17.

Unhash first, tell second, and keep the inode alive across both. Whoever reads DELETE can no longer
open the old object by that name, and the event still names it.

Another design is a subclass with its own `remove`.

Linux reference: d_delete_notify in include/linux/fsnotify.h (a37d9a17f099, in v5.17).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from fanwise.notify.mask import DELETE

from .dentry import Dentry
from .protocol import Op

if TYPE_CHECKING:
    from .vfs import Vfs


class Deleting:
    """``pin-drop-notify``: hold the inode, unhash the name, tell, let go."""

    vfs: "Vfs"  # set by the Vfs that it is given to

    def remove(self, parent: Dentry, dentry: Dentry, take_away: Callable[[], Op[None]]) -> Op[None]:
        """Remove a positive name of a directory whose lock the caller holds, and tell.

        ``take_away()`` is the filesystem's part: after it the name is gone from the disk, and a
        file's ATTRIB (its link count) is told. What is left is to unhash the dentry
        (`Vfs.d_delete`, or its parts) and to tell DELETE (`Vfs.tell_entry`, or `Vfs.prepare` and
        `Vfs.tell_report`). Raises what
        ``take_away`` raises; then the name is still there.
        """
        vfs, inode, name = self.vfs, dentry.target, dentry.name
        yield from take_away()
        vfs.ihold(inode)
        report = vfs.prepare(vfs.of_entry(DELETE, parent, name, inode))
        yield from vfs.d_delete(dentry)
        yield from vfs.tell_report(report)
        yield from vfs.iput(inode)
