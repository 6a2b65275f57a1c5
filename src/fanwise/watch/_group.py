"""A group of a watch: one superblock, seen through one mount, and the roots on it.

REFS      owns the source (kernel group, drain), the scanner, and the resolver with its tree; the
          helpers, if there are any, are the watch's.
LIFETIME  open() marks, then finds the roots, then scans: nothing between is missed.
"""

import errno
import os
import select
import time
from collections.abc import Callable, Iterable
from typing import Any

from fanwise._errors import (
    FanwiseError,
    FilesystemRefuses,
    LimitReached,
    NotWatchable,
    PermissionNeeded,
)
from fanwise.kernel.fanotify import FAN_ACCESS, FAN_OPEN
from fanwise.kernel.mounts import Mount, mounts
from fanwise.kernel.native import Parts
from fanwise.names.bypath import PathLookup
from fanwise.names.child import ChildLookup, Helpers
from fanwise.names.directories import Directories, Root
from fanwise.names.lookup import AT, Lookup, open_mount
from fanwise.names.marker import Marker, marks_of
from fanwise.names.resolver import Resolver
from fanwise.names.scan import Scanner, scan_mount
from fanwise.names.teller import Settings

from ._answers import may_wait
from ._change import own_dropped
from ._ladder import FILESYSTEM_MARK, Rung
from ._who import Windows

_SLICE = 4096  # changes
_ROUNDS = 4096  # of 1,024 directories, before what came is told
_OWN = FAN_OPEN | FAN_ACCESS
_SYNC_SECONDS = 2.0
_COVERED_SECONDS = 1.0  # how often a mount that is covered is looked for in mountinfo


class Group:
    """Watches the roots of one mount."""

    def __init__(
        self,
        mount: Mount,
        roots: list[str],
        mask: int,
        ring: int,
        parts: Parts,
        settings: Settings,
        exclude: Iterable[str],
        recursive: bool,
        wake: Callable[[], None],
        helpers: Helpers | None = None,
        anchors: Callable[[], list[str]] | None = None,
        rung: Rung = FILESYSTEM_MARK,
        index: bool = False,
    ) -> None:
        self.mount = mount
        # Of a mount below a root; then globs with a slash begin at the roots of the watch.
        self.inner = anchors is not None
        self._anchors = anchors
        self.paths = roots
        self.rung = rung
        self.source = rung.source(
            roots[0], mount, lambda: open_mount(self.mount, AT), mask, ring, parts
        )
        if rung.marks:
            self.source.rung = rung.name
        self._parts, self._settings = parts, settings
        self._exclude, self._recursive, self._wake = exclude, recursive, wake
        self._helpers = helpers
        self._index = index
        self.resolver: Resolver
        self.scanner: Scanner | Marker
        self._farewell: str | None = None
        self._armed = self._unplugged = False
        self.windows: Windows | None = None  # to be set before open() by who wants to know
        self._read_all = False  # the drain ended, and what it had read was taken
        self._error = 0  # the errno that ended it, until it is raised
        self._look_again = 0.0
        self._rows: list[Any] = []  # told outside of step()
        self.unwatched: list[tuple[str, str, str]] = []  # directories: path, reason, remedy

    def open(self) -> None:
        """Mark the filesystem and begin. Raises NotWatchable, OSError."""
        self.source.open()
        try:
            tree = self._parts.Tree(self._recursive)
            lookup = self._lookup(tree)
            dirs = Directories(
                tree,
                self.mount,
                [Root.open(path, self.mount) for path in self.paths],
                lookup,
                self._exclude,
                self._anchors,
                self.rung.marks,
            )
            self.scanner = self._scanner(lookup)
            drain = self.source.drain
            self.resolver = Resolver(
                self._parts,
                dirs,
                self.scanner,
                self.windows.taking(drain.take) if self.windows is not None else drain.take,
                lambda: bool(drain.sync(_SYNC_SECONDS)),
                self._settings,
                # What a loss hit cannot be located by its handle there: all of it is read again.
                (lambda: None) if self.rung.marks else drain.gap,
                self._index,
            )
            self.resolver.start()
            if self.rung.marks:
                self._mark_all()
        except BaseException:
            self.close()
            raise

    def _lookup(self, tree: Any) -> Lookup:
        if self.rung.marks:
            return PathLookup(self.mount, tree, self._parts.present_in)
        return ChildLookup(self.mount, self._helpers) if self._helpers else Lookup(self.mount)

    def _scanner(self, lookup: Lookup) -> Scanner | Marker:
        if isinstance(lookup, PathLookup):
            # Many a program that serves a filesystem gives every directory two links; so do cifs
            # where the server does not tell, and proc for what security modules add.
            fstype = self.mount.fstype
            leaves = may_wait(fstype) or fstype == "proc"
            mark = marks_of(self._parts.mark_dirs, self.source, leaves)
            return Marker(mark, lookup, self.source.mark_above)
        scan_dirs, helpers = self._parts.scan_dirs, self._helpers
        return Scanner(
            lambda keys, names: (
                helpers.scan(lookup.mount, keys, names)
                if helpers
                else scan_mount(scan_dirs, lookup.mount, keys, names)
            ),
            self._wake,
        )

    def _mark_all(self) -> None:
        # What is not marked is missed, so the watch is open when all of it is.
        resolver, marker = self.resolver, self.scanner
        assert isinstance(marker, Marker)
        while resolver.unmarked or resolver.dirs.fresh:
            self._rows += self._others(resolver.step(_SLICE))
        for key, code in resolver.refused_at_start():
            path = (
                os.fsdecode(resolver.lookup.path(key))
                if isinstance(resolver.lookup, PathLookup)
                else ""
            )
            if code == errno.ENOSPC:
                raise self.rung.limit(path)
            if code == errno.EMFILE:
                raise LimitReached(
                    path, "RLIMIT_NOFILE", "no descriptor is left", "ulimit -n NUMBER"
                )
            reason, remedy = f"it could not be marked: {os.strerror(code)}", "run as root"
            if code == errno.EXDEV:  # fs/notify/fanotify/fanotify_user.c, fanotify_set_mark_fsid
                reason = (
                    "marks on a subvolume do not go together with those on the top level of"
                    f" {self.mount.fstype}"
                )
                remedy = "watch it in a watch of its own, or run as root"
            elif code == errno.EACCES:
                remedy = "run as root, or change its mode"
            if any(root.key == key for root in resolver.dirs.roots):
                kind = PermissionNeeded if code == errno.EACCES else FilesystemRefuses
                raise kind(path, reason, remedy)
            self.unwatched.append((path, reason, remedy))

    def fileno(self) -> int:
        """Return the descriptor that is readable while there are records."""
        fd: int = self.source.drain.fileno()
        return fd

    def arm(self, epoll: select.epoll) -> None:
        """Let the next record wake the consumer directly, once."""
        if self.source.state != "MARKED" or self._read_all or self.fileno() == self.source.fd:
            return
        flags = select.EPOLLIN | select.EPOLLONESHOT
        if self._armed:
            epoll.modify(self.source.fd, flags)
        else:
            epoll.register(self.source.fd, flags)
            self._armed = True

    def unplug(self, epoll: select.epoll) -> None:
        """Take out of ``epoll`` what stays readable for ever when the group has ended."""
        if self._read_all and self.ended and not self._unplugged:
            self._unplugged = True
            epoll.unregister(self.fileno())
            if self._armed:
                epoll.unregister(self.source.fd)

    def step(self, limit: int) -> list[Any]:
        """Return the next slice of changes.

        Raises FanwiseError, once and behind all that was read, when reading failed.
        """
        if self._rows:
            rows, self._rows = self._rows, []
            return rows
        last = bool(self.source.drain.ended)
        if self._helpers is None:
            rows = self.resolver.step(limit)
            if self.rung.marks:
                rows = self._others(rows)
            # What is done after a loss was told, or a directory's coming, is told: every directory
            # has its mark by then.
            for _ in range(_ROUNDS if rows and self.rung.marks else 0):
                if not self.resolver.unmarked:
                    break
                rows += self._others(self.resolver.step(limit))
        else:
            self._helpers.check()
            rows = self._helpers.drop(self.resolver.step(limit), self._settings.pids)
        if last:
            # A window with nothing to tell may have others behind it: `pending` counts them now.
            self.resolver.intake.pull()
            if not self._read_all:
                self._read_all = True
                self._error = self.source.drain.error
        if not rows and self._error and not self.pending:
            number, self._error = self._error, 0
            raise FanwiseError(
                f"reading the changes of {os.fsdecode(self.mount.mount_point)} failed: "
                f"{os.strerror(number)} ({errno.errorcode.get(number, number)})",
                "nothing more is told of it: open another watch, and list what is there",
            )
        if not rows and self._farewell and not self.pending:
            self.resolver.teller.tell_roots(rows, self._farewell)
            self._farewell = None
            self.resolver.dirs.roots.clear()
        return rows

    def _others(self, rows: list[Any]) -> list[Any]:
        # What marking opened and read is not told.
        if rows and self._settings.want & _OWN:
            return own_dropped(rows)
        return rows

    @property
    def pending(self) -> bool:
        """Whether step() has more to do."""
        return bool(self._rows) or self.resolver.pending

    @property
    def ended(self) -> bool:
        """Whether nothing more can come."""
        if self.pending or self._farewell or self._error:
            return False
        return not self.resolver.dirs.roots or self._read_all

    def sync(self) -> bool:
        """Take all that was raised before this call; False when that cannot be said."""
        return self.resolver.intake.sync()

    def empty(self, timeout: float) -> bool:
        """Read the kernel's queue until it is empty; whether it was seen so."""
        return self.source.state == "MARKED" and bool(self.source.drain.sync(timeout))

    # -- the mount --

    def find(self, there: Iterable[Mount]) -> Mount | None:
        """Find the group's mount among those that are there; None when it is gone.

        Its id and its device may belong to another mount meanwhile.
        """
        for mount in there:
            if (mount.id, mount.dev) != (self.mount.id, self.mount.dev):
                continue
            if mount.unique_id is None or self.mount.unique_id is None:
                same = self._mark_stands()
            else:
                same = mount.unique_id == self.mount.unique_id
            return mount._replace(unique_id=self.mount.unique_id) if same else None
        return None

    def _mark_stands(self) -> bool:
        # A mark goes with its superblock. While there is none it cannot tell.
        with open(f"/proc/self/fdinfo/{self.source.fd}", "rb") as file:
            return b" sdev:" in file.read() or self.source.state != "MARKED"

    def shows(self, path: str | bytes) -> bool:
        """Whether a path leads to the group's mount. It opens nothing."""
        try:
            return self._parts.mount_at(path) == self.mount.id
        except OSError:
            return False

    def astray(self) -> bool:
        """Whether the mount is not where it was, and mountinfo may know where it is."""
        try:  # `shows`, without a call
            if self._parts.mount_at(self.mount.mount_point) == self.mount.id:
                return False
        except OSError:
            pass  # it is not there, in any case
        now = time.monotonic()
        if now < self._look_again or not self.resolver.dirs.roots:
            return False
        self._look_again = now + _COVERED_SECONDS
        return True

    def follow(self, there: Iterable[Mount], rows: list[Any]) -> bool:
        """Learn where the mount is now, or that it is gone; whether it is there."""
        mount = self.find(there)
        if mount is None:
            self.leave("unmounted")
            return False
        if mount.mount_point != self.mount.mount_point:
            self.mount = mount
            self.resolver.remount(mount, rows)
            self._look_again = 0.0
        return True

    def tell_covered(self, over: Iterable[Mount], rows: list[Any]) -> None:
        """Tell of the roots that some mounts cover."""
        points = [mount.mount_point for mount in over]
        for root in self.resolver.dirs.roots:
            path = os.fsencode(root.path)
            if not any(path == p or path.startswith(p.rstrip(b"/") + b"/") for p in points):
                continue
            # What a file's root follows is the name: there may be nothing at it.
            if path not in points and root.file is not None:
                path = os.path.dirname(path)
            if self.shows(path):
                continue  # it was mounted below, or moved with what it is mounted on
            rows.append(
                self._settings.make(
                    ("mounted",), root.path, None, root.file is None, 0, None, time.time(), "exact"
                )
            )

    def resume(self) -> None:
        """Mark again and tell that changes were lost; or say goodbye where there is no way back."""
        if not self.follow(mounts(), self._rows):
            return
        if self.rung.marks:
            self._resume(-1)
            return
        try:
            fd = open_mount(self.mount, AT)
        except NotWatchable:
            if self.shows(self.mount.mount_point):
                raise  # it is there, and cannot be opened just now
            # Covered: there is no path by which to mark it.
            self.leave("mounted" if self.find(mounts()) else "unmounted")
            return
        try:
            self._resume(fd)
        finally:
            os.close(fd)

    def _resume(self, fd: int) -> None:
        # What is still queued is of before: it must be read before the gap, and nothing that is
        # raised after it be merged into it.
        empty = bool(self.source.drain.sync(_SYNC_SECONDS))
        self.source.resume(fd)
        self.resolver.intake.push_stop(empty)

    @property
    def leaving(self) -> bool:
        """Whether it said goodbye, or is about to."""
        return self._farewell is not None or not self.resolver.dirs.roots

    def leave(self, farewell: str) -> None:
        """Say goodbye once everything read before is delivered."""
        self._farewell = farewell
        self.source.stop()

    def close(self) -> None:
        """Stop the threads and close the kernel group; idempotent."""
        self.source.close()
        if hasattr(self, "scanner"):
            self.scanner.stop()
