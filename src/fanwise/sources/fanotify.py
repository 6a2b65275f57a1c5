"""A fanotify group, with a filesystem mark or marks on directories, and the drain that empties it.

REFS      the source owns the group's descriptor and the drain; nothing else holds either.
LOCKING   none: one owner. The drain has its own thread.
LIFETIME  see SOURCE. A forked child closes the group at once: a child that keeps it keeps it
          queueing after the parent has gone (measured: 1,000 of 1,000 records). Children that are
          exec'ed have nothing to close (close-on-exec).
"""

import errno
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from fanwise._errors import FilesystemRefuses, NoSuchRoot, PermissionNeeded
from fanwise.kernel.detached import open_top_level
from fanwise.kernel.fanotify import (
    FAN_ATTRIB,
    FAN_CLASS_NOTIF,
    FAN_CLOEXEC,
    FAN_CREATE,
    FAN_DELETE,
    FAN_DELETE_SELF,
    FAN_EVENT_ON_CHILD,
    FAN_MARK_ADD,
    FAN_MARK_FILESYSTEM,
    FAN_MARK_FLUSH,
    FAN_MARK_INODE,
    FAN_NONBLOCK,
    FAN_ONDIR,
    FAN_RENAME,
    FAN_REPORT_DFID_NAME_TARGET,
    FAN_UNLIMITED_MARKS,
    FAN_UNLIMITED_QUEUE,
    init,
    mark,
)
from fanwise.kernel.mounts import Mount
from fanwise.kernel.native import Parts
from fanwise.lifetime import Lifetime

# What the model of directories lives on, asked for or not.
MODEL_MASK = FAN_CREATE | FAN_DELETE | FAN_RENAME | FAN_ATTRIB | FAN_DELETE_SELF | FAN_ONDIR

_INIT = (
    FAN_CLASS_NOTIF | FAN_CLOEXEC | FAN_NONBLOCK | FAN_UNLIMITED_QUEUE | FAN_REPORT_DFID_NAME_TARGET
)

# How the filesystem is marked: by a directory of the mount, or by its top level, mounted for the
# moment and never attached (a btrfs subvolume).
FILESYSTEM_MARK = "filesystem-mark"
DETACHED_MOUNT = "detached-mount"

_live: "weakref.WeakSet[FanotifySource]" = weakref.WeakSet()


def mark_filesystem(group: int, mask: int, mount: Mount, fd: int, path: str) -> str:
    """Mark the filesystem of a mount, whose root ``fd`` is; the rung on which that was possible.

    ``path`` is what errors are about. Raises NotWatchable.
    """
    flags = FAN_MARK_ADD | FAN_MARK_FILESYSTEM
    # The descriptor may be of O_PATH: another group may watch this filesystem, and is to see no
    # open of ours. By itself the call takes none of those, by its link in /proc it does.
    here = f"/proc/self/fd/{fd}"
    try:
        mark(group, flags, mask, path=here, about=path)
        return FILESYSTEM_MARK
    except FilesystemRefuses as error:
        code = error.__cause__.errno if isinstance(error.__cause__, OSError) else None
        if code != errno.EXDEV or mount.fstype != "btrfs":
            raise
    readable = os.open(here, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        top = open_top_level(mount, readable)
    finally:
        os.close(readable)
    try:
        mark(group, flags, mask, top, about=path)
    finally:
        os.close(top)
    return DETACHED_MOUNT


class FanotifySource:
    """One kernel group on one superblock.

    ``path`` is what errors are about, ``mount`` the mount that is watched; ``open_mount`` opens its
    root (O_PATH will do), and the descriptor is closed here. ``mask`` are the events beyond
    MODEL_MASK, ``ring`` is in bytes. ``rung`` says how the filesystem is marked.
    """

    state: str
    kind = FAN_MARK_FILESYSTEM

    def __init__(
        self,
        path: str,
        mount: Mount,
        open_mount: Callable[[], int],
        mask: int,
        ring: int,
        parts: Parts,
    ) -> None:
        self.path = path
        self.mount = mount
        self._open_mount = open_mount
        self.mask = mask | MODEL_MASK
        self.rung = FILESYSTEM_MARK
        self.fd = -1
        self._ring, self._parts = ring, parts
        self._drain: Any = None
        self._owner = os.getpid()
        SOURCE.start(self)

    def open(self) -> None:
        """Make the group, set the mark and start the drain.

        The mark is set by the open mount and not by a path, which may lead elsewhere by then.

        Raises NotWatchable (PermissionNeeded, FilesystemRefuses, ...) when the kernel refuses.
        """
        self.fd = self._init()
        _live.add(self)
        try:
            self._first_mark()
            self._drain = self._make_drain()
            self._drain.start()
        except BaseException:
            SOURCE.advance(self, "close")
            self._release()
            raise
        SOURCE.advance(self, "mark")

    def _init(self) -> int:
        return init(_INIT, path=self.path)

    def _make_drain(self) -> Any:
        return self._parts.Drain(self.fd, self._ring)

    def _first_mark(self) -> None:
        fd = self._open_mount()
        try:
            self._mark(fd)
        finally:
            os.close(fd)

    @property
    def drain(self) -> Any:
        """The running drain."""
        return self._drain

    def pause(self) -> None:
        """Drop the mark: nothing queues in the kernel while the process cannot read."""
        SOURCE.advance(self, "pause")
        mark(self.fd, FAN_MARK_FLUSH | self.kind, 0, path=self.path)

    def resume(self, fd: int) -> None:
        """Set the mark anew, by the open root of the mount: the path may lead elsewhere now.

        The caller tells that changes were lost. Raises NotWatchable.
        """
        self._mark(fd)
        SOURCE.advance(self, "resume")

    def _mark(self, fd: int) -> None:
        self.rung = mark_filesystem(self.fd, self.mask, self.mount, fd, self.path)

    def stop(self) -> None:
        """Read what is queued, then read no more; take() still gives what was read."""
        if self.state in ("MARKED", "PAUSED"):
            SOURCE.advance(self, "stop")
            self._drain.stop(True)

    def close(self) -> None:
        """Close the group and free the ring; idempotent."""
        if self.state == "CLOSED":
            return
        SOURCE.advance(self, "close")
        self._release()

    def _release(self) -> None:
        if self._drain is not None:
            self._drain.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        _live.discard(self)

    def _forget(self) -> None:
        # In a forked child, which has neither the thread nor a right to the records.
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self._drain is not None:
            self._drain.forget()
        self.state = "CLOSED"


class DirectorySource(FanotifySource):
    """One kernel group with a mark on each directory, set by a Marker.

    Without CAP_SYS_ADMIN (``unlimited`` False) the kernel's queue and the marks have limits.
    """

    kind = FAN_MARK_INODE
    inotify = False

    def __init__(
        self,
        path: str,
        mount: Mount,
        open_mount: Callable[[], int],
        mask: int,
        ring: int,
        parts: Parts,
        unlimited: bool,
    ) -> None:
        super().__init__(path, mount, open_mount, mask, ring, parts)
        self.mark_mask = self.mask | FAN_EVENT_ON_CHILD
        self._unlimited = unlimited

    def _init(self) -> int:
        more = FAN_UNLIMITED_QUEUE | FAN_UNLIMITED_MARKS if self._unlimited else 0
        return init(_INIT & ~FAN_UNLIMITED_QUEUE | more, path=self.path)

    def _make_drain(self) -> Any:
        # What a window leaves open is looked up in each directory that it names: that is less in
        # fewer and longer windows. A kernel's queue with an end sets how long.
        pace = _PACE
        if not self._unlimited:
            pace = min(pace, _queue_limit() * _NS_A_RECORD)
        return self._parts.Drain(self.fd, self._ring, pace)

    def _first_mark(self) -> None:
        where = self.path if os.path.isdir(self.path) else os.path.dirname(self.path)
        mark(self.fd, FAN_MARK_ADD, self.mark_mask, path=where)

    def marked(
        self,
        items: Sequence[tuple[bytes, bytes]],
        found: Sequence[tuple[bytes, bytes, bytes, bool]],
        ends: Sequence[tuple[int, int]],
    ) -> None:
        """Learn which directories were marked, and what is in them."""

    def mark_above(self, path: str) -> bool:
        """Hear when a directory above a root moves what is in it; whether that can be heard."""
        try:
            mark(self.fd, FAN_MARK_ADD, _ABOVE, path=path)
        except (PermissionNeeded, NoSuchRoot, FilesystemRefuses):
            return False  # the last: the top level of a btrfs, above a subvolume (EXDEV)
        return True

    def resume(self, fd: int) -> None:
        """Go on; the directories are marked anew when the loss is told."""
        SOURCE.advance(self, "resume")


_PACE = 25_000_000  # ns between two reads under load
_NS_A_RECORD = 1000  # so a million records a second still fit; one busy writer makes a fifth of it


def _queue_limit() -> int:
    try:
        with open("/proc/sys/fs/fanotify/max_queued_events", "rb") as file:
            return int(file.read())
    except FileNotFoundError:  # /proc/sys is hidden
        return 5000


# Of a directory above a root: what moves or removes a directory in it.
_ABOVE = FAN_RENAME | FAN_DELETE | FAN_ONDIR

SOURCE: Lifetime[FanotifySource] = Lifetime(
    "FanotifySource",
    states=("NEW", "MARKED", "PAUSED", "STOPPED", "CLOSED"),
    transitions={
        "mark": "NEW -> MARKED",
        "pause": "MARKED -> PAUSED",
        "resume": "PAUSED -> MARKED",
        "stop": "MARKED, PAUSED -> STOPPED",
        "close": "NEW, MARKED, PAUSED, STOPPED -> CLOSED",
    },
    invariants={
        "a group that is read has a descriptor": lambda s: (
            s.state not in ("MARKED", "PAUSED") or s.fd >= 0
        ),
    },
)


def _after_fork() -> None:
    for source in list(_live):
        source._forget()
    _live.clear()


os.register_at_fork(after_in_child=_after_fork)
