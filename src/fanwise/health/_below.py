"""Whose errors are those of a path: a `notify` group with an FS_ERROR mark on a file or directory.

For `fanwise health PATH` and for write-back errors. The engine, or whoever has observations or
incidents, sends them; what comes out is of the path, or of its whole filesystem and says so:

    with Below("/srv/db") as below:
        below.send(incident.fs.device, incident.object.ino, incident.object.path,
                   errno=errno.EIO, count=incident.count)
        below.read()            # [Seen]: scope "object", "fs", or "unplaced"

``path`` is the object's absolute path as it is seen where the path of `Below` was given, None when
it is not known (yet): then the error is told as "unplaced", because it may be below. Errors merge
while nobody reads (see `fanwise.notify.reserve`): the first is kept, the others are counted.

A bind mount of a subtree is a path like others: what is sent is matched by the inode numbers of
the directories above, found by a look at the path's parents, which are cached if the path is.

LOCKING   none: one owner. LIFETIME  that of its group.
"""

import os
from types import TracebackType
from typing import Literal

import msgspec

from fanwise._errors import NoSuchRoot
from fanwise.kernel.mounts import Mount, mount_of
from fanwise.notify.event import OBJECT, UNPLACED, ErrorEvent
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.mark import SUBTREE, On
from fanwise.notify.mask import FS_ERROR, Q_OVERFLOW

_MOST_ABOVE = 256


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

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.realpath(path)
        try:
            self.stat = os.stat(self.path)
        except OSError as error:
            raise NoSuchRoot(self.path, f"cannot be watched: {error.strerror}") from error
        self.mount: Mount = mount_of(self.path)
        self.device = "{}:{}".format(*self.mount.dev)
        self._core = Fsnotify()
        self._group = self._core.group()
        # A subtree also of one file: it is told of its filesystem, too, which an inode is not.
        own = _key(self.stat.st_dev, self.stat.st_ino)
        self._group.add(On(SUBTREE, self.device, own), FS_ERROR)

    def send(
        self,
        device: str,
        ino: int | None,
        path: str | None,
        *,
        errno: int,
        count: int = 1,
        pid: int = 0,
    ) -> None:
        """Take an error in. ``device`` is MAJOR:MINOR of the superblock."""
        key, scope = None, OBJECT
        ancestors: tuple[bytes, ...] = ()
        if ino is not None:
            dev = self.stat.st_dev
            own = ino == self.stat.st_ino
            if self.mount.fstype == "btrfs":
                # A number is of one subvolume, which has a device number of its own in stat.
                if path is None:
                    own = False
                else:
                    dev = _device_of(os.path.dirname(path), dev)
                    own = own and dev == self.stat.st_dev
            key = _key(dev, ino)
            if not own and path is None:
                scope = UNPLACED
                key = b"?" + key
            elif not own and path is not None:
                ancestors = self._above(path)
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

    # By inode numbers, so that another mount of the same directory is the same.
    def _above(self, path: str) -> tuple[bytes, ...]:
        above = []
        for _ in range(_MOST_ABOVE):
            parent = os.path.dirname(path)
            if parent == path:
                break
            path = parent
            try:
                seen = os.stat(path)
            except OSError:  # gone, or broken: its name is what is left to go by
                if path != self.path:
                    continue
                seen = self.stat
            above.append(_key(seen.st_dev, seen.st_ino))
        return tuple(above)


def _key(dev: int, ino: int) -> bytes:
    return b"%d:%d" % (dev, ino)


def _device_of(folder: str, otherwise: int) -> int:
    try:
        return os.stat(folder).st_dev
    except OSError:
        return otherwise
