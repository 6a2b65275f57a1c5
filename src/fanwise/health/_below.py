"""Whose errors are those of a path: a `notify` group with an FS_ERROR mark on a file or directory.

For `fanwise health PATH` and for write-back errors. Whoever has incidents or observations sends
them; what comes out is of the path, or of its whole filesystem and says so:

    with Below("/srv/db") as below:
        below.send(incident.fs.device, incident.object.ino, incident.object.path,
                   above=answer.above[0], errno=errno.EIO, count=incident.count)
        below.read()            # [Seen]: scope "object", "fs", or "unplaced"

``path`` is the object's absolute path, ``above`` what it lies below (see `Answer` of _locate): both
are found by helpers. While either is None the error is told as "unplaced", because it may be below.
Errors merge while nobody reads (see `fanwise.notify.reserve`): the first is kept, the others are
counted. What is matched are the inode numbers of directories, not names: so a bind mount of a
subtree is a path like others, and a directory that was renamed is the same. Nothing here asks a
filesystem.

LOCKING   none: one owner. LIFETIME  that of its group.
"""

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Literal

import msgspec

from fanwise.health._target import Target, targets
from fanwise.notify.event import OBJECT, UNPLACED, ErrorEvent
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.mark import FILESYSTEM, SUBTREE, On
from fanwise.notify.mask import FS_ERROR, Q_OVERFLOW


class Seen(msgspec.Struct, frozen=True, gc=False):
    """One error, or several merged: ``count``; of records lost None says that nobody counted.

    ``scope`` is "object" (of the path, or below it), "fs" (of its filesystem), "unplaced" (of an
    object that may be below it) or "lost" (records were lost that may have told of some).
    """

    scope: Literal["object", "fs", "unplaced", "lost"]
    ino: int | None
    errno: int
    count: int | None
    pid: int = 0


class Below:
    """The errors of a path. Raises NoSuchRoot when there is nothing."""

    def __init__(self, path: str | os.PathLike[str] | Target) -> None:
        self.target = path if isinstance(path, Target) else targets([path])[0]
        self.device = self.target.device
        self._core = Fsnotify()
        self._group = self._core.group()
        if self.target.whole:
            on = On(FILESYSTEM, self.device)
        else:
            # A subtree also of one file: it is told of its filesystem, too, which an inode is not.
            own = self.target.key
            on = On(SUBTREE, self.device, b"not known" if own is None else _key(*own))
        self._group.add(on, FS_ERROR)

    def send(
        self,
        device: str,
        ino: int | None,
        path: str | None,
        *,
        above: Sequence[tuple[int, int] | None] | None = None,
        errno: int,
        count: int = 1,
        pid: int = 0,
    ) -> None:
        """Take an error in. ``device`` is MAJOR:MINOR of the superblock."""
        key, scope = None, OBJECT
        ancestors: tuple[bytes, ...] = ()
        if ino is not None:
            dev, mine = self.target.key or (0, None)
            own = ino == mine
            if self.target.mount.fstype == "btrfs":
                # A number is of one subvolume, which has a device number of its own in stat.
                first = above[0] if above else None
                own = own and first is not None and first[0] == dev
                dev = dev if first is None else first[0]
            key = _key(dev, ino)
            if not own and (path is None or above is None):
                scope = UNPLACED
                key = b"?" + key
            elif not own:
                ancestors = self._keys(path or "", above or ())
        self._core.send(
            [
                ErrorEvent(
                    FS_ERROR, device, key, ancestors=ancestors, pid=pid, count=count, error=errno,
                    scope=scope,
                )
            ]
        )  # fmt: skip

    def lost(self, count: int | None) -> None:
        """Tell that records were lost."""
        self._core.lost(self.device, count)

    def read(self) -> list[Seen]:
        """Return what came since; does not wait. Raises ClosedError."""
        found = []
        for event in self._group.read():
            if event.mask & Q_OVERFLOW:
                found.append(Seen("lost", None, 0, event.count))
            elif isinstance(event, ErrorEvent):
                ino = None if event.key is None else int(event.key.rpartition(b":")[2])
                found.append(
                    Seen(event.scope, ino, event.error, event.count, event.pid)  # type: ignore[arg-type]
                )
        return found

    def close(self) -> None:
        """End the group; idempotent."""
        self._group.close().run()

    def __enter__(self) -> "Below":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # What does not say its number any more, gone or broken, may still have the name of the path.
    def _keys(self, path: str, above: Sequence[tuple[int, int] | None]) -> tuple[bytes, ...]:
        found = []
        for each in above:
            path = os.path.dirname(path)
            each = self.target.key if each is None and path == self.target.path else each
            if each is not None:
                found.append(_key(*each))
        return tuple(found)


def _key(dev: int, ino: int) -> bytes:
    return b"%d:%d" % (dev, ino)
