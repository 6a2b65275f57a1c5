"""A group of a watch: one superblock, seen through one mount, and the roots on it.

REFS      owns the source (kernel group, drain), the scanner, and the resolver with its tree; the
          helpers, if there are any, are the watch's.
LIFETIME  open() marks, then finds the roots, then scans: nothing between is missed.
"""

import os
import select
from collections.abc import Callable, Iterable
from typing import Any

from fanwise._errors import NotWatchable
from fanwise.kernel.mounts import Mount
from fanwise.kernel.native import Parts
from fanwise.names.child import ChildLookup, Helpers
from fanwise.names.directories import Directories, Root
from fanwise.names.lookup import Lookup, open_mount
from fanwise.names.resolver import Resolver, Settings
from fanwise.names.scan import Scanner, scan_mount
from fanwise.sources.fanotify import FanotifySource

_SYNC_SECONDS = 2.0


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
    ) -> None:
        self.mount = mount
        self.paths = roots
        self.source = FanotifySource(roots[0], mask, ring, parts)
        self._parts, self._settings = parts, settings
        self._exclude, self._recursive, self._wake = exclude, recursive, wake
        self._helpers = helpers
        self.resolver: Resolver
        self.scanner: Scanner
        self._farewell: str | None = None
        self._armed = False
        self._read_all = False  # the drain ended, and what it had read was taken

    def open(self) -> None:
        """Mark the filesystem and begin. Raises NotWatchable, OSError."""
        self.source.open()
        try:
            scan_dirs, helpers = self._parts.scan_dirs, self._helpers
            lookup = ChildLookup(self.mount, helpers) if helpers else Lookup(self.mount)
            dirs = Directories(
                self._parts.Tree(self._recursive),
                self.mount,
                [Root.open(path) for path in self.paths],
                lookup,
                self._exclude,
            )
            self.scanner = Scanner(
                lambda keys: (
                    helpers.scan(lookup.mount, keys)
                    if helpers
                    else scan_mount(scan_dirs, lookup.mount, keys)
                ),
                self._wake,
            )
            drain = self.source.drain
            self.resolver = Resolver(
                self._parts,
                dirs,
                self.scanner,
                drain.take,
                lambda: bool(drain.sync(_SYNC_SECONDS)),
                self._settings,
            )
            self.resolver.start()
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor that is readable while there are records."""
        fd: int = self.source.drain.fileno()
        return fd

    def arm(self, epoll: select.epoll) -> None:
        """Let the next record wake the consumer directly, once."""
        if self.source.state != "MARKED":
            return
        flags = select.EPOLLIN | select.EPOLLONESHOT
        if self._armed:
            epoll.modify(self.source.fd, flags)
        else:
            epoll.register(self.source.fd, flags)
            self._armed = True

    def step(self, limit: int) -> list[Any]:
        """Return the next slice of changes."""
        last = bool(self.source.drain.ended)
        if self._helpers is None:
            rows = self.resolver.step(limit)
        else:
            self._helpers.check()
            rows = self._helpers.drop(self.resolver.step(limit))
        if last:
            # A window with nothing to tell may have others behind it: `pending` counts them now.
            self.resolver.intake.pull()
            self._read_all = True
        if not rows and self._farewell and not self.pending:
            self.resolver.tell_roots(rows, self._farewell)
            self._farewell = None
            self.resolver.dirs.roots.clear()
        return rows

    @property
    def pending(self) -> bool:
        """Whether step() has more to do."""
        return self.resolver.pending

    @property
    def ended(self) -> bool:
        """Whether nothing more can come."""
        if self.pending or self._farewell:
            return False
        return not self.resolver.dirs.roots or self._read_all

    def sync(self) -> bool:
        """Take all that was raised before this call; False when that cannot be said."""
        return self.resolver.intake.sync()

    def resume(self) -> None:
        """Mark again and tell that changes were lost; or say goodbye where there is no way back."""
        try:
            fd = open_mount(self.mount)
        except NotWatchable:
            self.unmounted()
            return
        try:
            self.source.resume(fd)
        finally:
            os.close(fd)
        self.resolver.intake.push_stop()

    def unmounted(self) -> None:
        """Say goodbye once everything read before is delivered."""
        self._farewell = "unmounted"
        self.source.stop()

    def close(self) -> None:
        """Stop the threads and close the kernel group; idempotent."""
        self.source.close()
        if hasattr(self, "scanner"):
            self.scanner.stop()
