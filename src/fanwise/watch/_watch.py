"""watch and awatch: the public face of change streams.

REFS      a Watch owns its groups, an epoll over their drains, and an eventfd that wakes it.
LOCKING   one consumer; a second one gets BusyError. `stop`, `close`: from anywhere.
LIFETIME  nothing starts before ``with``; an open Watch that is dropped warns (ResourceWarning).
          `close` frees when whoever reads has left.
"""

import contextlib
import functools
import math
import os
import select
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import NamedTuple, TypeVar

from fanwise._errors import (
    BusyError,
    ClosedError,
    FanwiseError,
    FilesystemRefuses,
    NoSuchRoot,
    PermissionNeeded,
)
from fanwise.kernel.mounts import Mount, mount_of
from fanwise.kernel.native import parts
from fanwise.names.child import Helpers
from fanwise.names.globs import Globs
from fanwise.names.teller import Settings
from fanwise.sources.mounts import MountChange, MountSource

from ._answers import Question
from ._change import DEFAULT_KINDS, KIND_TABLE, KINDS, MOUNT_KINDS, Change, mask_of, own_work_shows
from ._group import Group
from ._ladder import check_asked, check_readable, choose, why_not
from ._mounts import Below, UnwatchedMount
from ._who import Who, Windows

_SLICE = 4096  # changes
_AGAIN = 1.0  # seconds
_SOON = 0.01  # seconds without news, after which a watch is idle
_LOOK = 1.0  # seconds, while changes flow, between two looks at where the mounts are
_LONGEST = 86_400.0  # seconds of one wait: the kernel counts milliseconds in an int
_LEAST_QUEUE = 64 << 10  # bytes

_T = TypeVar("_T")


class WatchedRoot(NamedTuple):
    """One watched path: ``path`` as resolved, the ``rung`` that serves it, ``fstype``."""

    path: str
    rung: str
    fstype: str


class _Waker:
    """An eventfd to wake the consumer with; apart from the Watch, so that no thread holds that."""

    # A thread may write while another closes, and a signal handler interrupts either: no lock
    # can be held. Each notes first that it is at it, and whoever is the last one closes.

    def __init__(self) -> None:
        self.fd = -1
        self._fds: list[int] = []  # the one to close
        self._users: list[None] = []
        self._closed = False
        self.written = False

    def open(self) -> None:
        """Make the eventfd."""
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fds.append(self.fd)

    def wake(self) -> None:
        """Call it in any thread, and in a signal handler."""
        self._users.append(None)
        try:
            if not self._closed:
                os.eventfd_write(self.fd, 1)
                self.written = True  # after the write: clear() must find what it takes back
        finally:
            self._leave()

    def clear(self) -> None:
        """Take back every wake() so far."""
        if self.written:
            self._users.append(None)
            try:
                if not self._closed:
                    self.written = False
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self.fd)
            finally:
                self._leave()

    def close(self) -> None:
        """Close it, when nobody is at it; wake() does nothing from now on."""
        self._users.append(None)
        self._closed = True
        self._leave()

    def _leave(self) -> None:
        self._users.pop()
        if self._closed and not self._users:
            with contextlib.suppress(IndexError):  # another one was the last, too
                os.close(self._fds.pop())


class Watch:
    """A stream of changes: a context manager and an iterator, made by `watch`.

    Iterate over it for single changes, over `batches` for lists, or call `read`. One thread
    consumes; `stop` and `close` may be called from any thread and from a signal handler.
    """

    def __init__(
        self,
        paths: tuple[str | os.PathLike[str], ...],
        kinds: Iterable[str] | None,
        exclude: Iterable[str],
        recursive: bool,
        ignore_pids: Iterable[int],
        queue: int,
        timeout: float | None,
        pure: bool | None,
        who: bool = False,
        mounts: bool = True,
        index: bool = False,
    ) -> None:
        if not paths:
            raise FanwiseError("nothing to watch", "give at least one path")
        wanted = _several("kinds", kinds) if kinds is not None else DEFAULT_KINDS
        unknown = [kind for kind in wanted if kind not in (*KINDS, *MOUNT_KINDS)]
        if unknown or not wanted:
            raise FanwiseError(
                f"no such kind: {unknown[0]!r}" if unknown else "no kinds are asked for",
                f"kinds are: {', '.join((*KINDS, *MOUNT_KINDS))}",
            )
        self._given = [os.fspath(path) for path in paths]
        self._wanted = wanted
        self._mask = mask_of(wanted)
        self._exclude = _several("exclude", exclude)
        for glob in self._exclude:
            if not isinstance(glob, str):
                raise FanwiseError(f"exclude: {glob!r} is not a string", "give globs as str")
        Globs(self._exclude, [])  # raises now for what is no glob
        self._recursive = recursive
        self._pids = _several("ignore_pids", ignore_pids)
        for pid in self._pids:
            if not isinstance(pid, int) or isinstance(pid, bool):
                raise FanwiseError(f"ignore_pids: {pid!r} is not a process id", "give integers")
        if not isinstance(queue, int) or isinstance(queue, bool) or queue < _LEAST_QUEUE:
            raise FanwiseError(
                f"queue: {queue!r} is not a number of bytes that will do",
                f"give an integer, at least {_LEAST_QUEUE}",
            )
        self._queue = queue
        if timeout is not None and not _is_time(timeout):
            raise FanwiseError(
                f"timeout: {timeout!r} is no time to wait",
                "give seconds, 0 or more, or None to wait for ever",
            )
        self.timeout = timeout
        self._parts = parts(pure)
        self._who = Who() if who else None
        self._index = index
        self._forced = os.environ.get("FANWISE_RUNG") or None
        self._groups: list[Group] = []
        self._helpers: Helpers | None = None
        self._roots: list[WatchedRoot] = []
        self._ready: deque[Change] = deque()
        self._consumer = threading.Lock()
        self._within: list[int] = []  # threads in `read`: who holds the lock, and who asks for it
        self._to_free = False  # when the thread that closed it leaves `read`
        self._state = "new"
        self._stopping = False
        self._epoll: select.epoll | None = None
        self._waker: _Waker | None = None
        # A kernel group is spent on mounts only where they are followed.
        self._mounts = MountSource(None if recursive and mounts else False)
        self._below = Below(self._groups, self._exclude, recursive, mounts)
        self._rested = False  # nothing was there to read a moment ago
        self._look_at = 0.0  # when to look again at where the mounts are
        self._news: list[MountChange] = []  # of mounts, not yet acted upon
        # What was raised before them, by group: it is told first.
        self._before: list[tuple[Group, int]] = []
        self._paused = False
        self._pid = 0  # of the process that opened it
        self._turn = 0  # whose slice is the next: a storm in one group does not silence the others
        self._asked_at = 0.0  # when mounts were last asked about
        self._due = False  # they are to be asked about before the next slice

    # -- life --

    def open(self) -> None:
        """Set every mark; when it returns, no change is missed. ``with`` calls it.

        Raises NotWatchable (NoSuchRoot, PermissionNeeded, FilesystemRefuses, SyscallBlocked,
        FeatureMissing, LimitReached): the reason and the remedy are in it.
        """
        if self._state != "new":
            raise ClosedError("a watch is opened once", "make another one")
        self._state = "open"
        self._pid = os.getpid()
        try:
            if own_work_shows(self._mask):
                self._helpers = Helpers(self._parts.name)
                self._helpers.start()
            self._waker = _Waker()
            self._waker.open()
            self._epoll = select.epoll()
            self._epoll.register(self._waker.fd, select.EPOLLIN)
            self._mounts.open()
            self._epoll.register(*self._mounts.waits)
            if self._who is not None:
                self._who.open()
                self._epoll.register(self._who.timer, select.EPOLLIN)
            self._below.make = self._maker()
            self._below.look = self._mounts.listed
            self._below.epoll = self._epoll
            self._below.ask = functools.partial(Question, helpers=self._helpers)
            given = self._by_mount()
            for (mount, paths), (_, asked) in zip(self._below.adopt(given), given, strict=True):
                group = self._below.make(mount, paths, None)
                group.open()
                self._groups.append(group)
                self._roots += [WatchedRoot(p, group.source.rung, mount.fstype) for p in asked]
            self._below.open(self._mounts.there)
            for group in self._groups:
                self._epoll.register(group.fileno(), select.EPOLLIN)
        except BaseException:
            self.close()
            raise

    def _maker(self) -> Callable[[Mount, list[str], Callable[[], list[str]] | None], Group]:
        assert self._waker is not None
        settings = Settings(Change, KIND_TABLE, self._mask, self._pids)
        mask, queue, parts, helpers = self._mask, self._queue, self._parts, self._helpers
        exclude, recursive, wake = self._exclude, self._recursive, self._waker.wake
        named, forced, kinds, pids = self._who is not None, self._forced, self._wanted, self._pids
        index = self._index

        def make(mount: Mount, paths: list[str], anchors: Callable[[], list[str]] | None) -> Group:
            choice = choose(paths[0], mount, forced)
            if choice.rung is None:
                raise why_not(paths[0], choice)
            if choice.rung.marks:  # each root is opened by itself there
                for path in paths[1:]:
                    check_readable(path)
            check_asked(paths[0], mount, choice.rung, kinds, pids, named)
            if index and choice.rung.marks:
                raise FilesystemRefuses(
                    paths[0],
                    "the index needs a mark on the whole filesystem, and there is none here",
                    "watch it without an index: after a loss directories are told with their names",
                )
            group = Group(
                mount,
                paths,
                mask,
                queue,
                parts,
                settings,
                exclude,
                recursive,
                wake,
                None if choice.rung.marks else helpers,
                anchors,
                choice.rung,
                index,
            )
            if named:
                group.windows = Windows()
            return group

        return make

    def _by_mount(self) -> list[tuple[Mount, list[str]]]:
        found: dict[tuple[tuple[int, int], int], tuple[Mount, list[str]]] = {}
        for given in self._given:
            path = real_path(given)
            mount = mount_of(path)
            if os.fsencode(path) == mount.mount_point and not os.path.isdir(path):
                raise FilesystemRefuses(
                    path,
                    "a file that is itself a mount point has no name on its filesystem to follow",
                    "watch the file, or its directory, where it was mounted from",
                )
            _, paths = found.setdefault((mount.dev, mount.id), (mount, []))
            if path not in paths:
                paths.append(path)
        return list(found.values())

    def close(self) -> None:
        """End at once and free everything; idempotent.

        A thread that waits in `read` gets ClosedError, and is waited for. In a signal handler that
        interrupts `read` it is that call which frees, when the handler returns.
        """
        if self._state == "closed":
            return
        self._state = "closed"
        if self._pid == os.getpid():  # a forked child has no other thread
            self._wake()
            if threading.get_ident() in self._within:
                self._to_free = True
                return
            self._consumer.acquire()  # for good
        self._free()

    def _free(self) -> None:
        with contextlib.ExitStack() as last:  # the last one first, and all of them whatever fails
            last.callback(self._mounts.close)
            if self._waker is not None:
                last.callback(self._waker.close)
            if self._epoll is not None:
                last.callback(self._epoll.close)
            last.callback(self._below.close)
            if self._who is not None:
                last.callback(self._who.close)
            for group in self._groups:
                last.callback(group.close)
            if self._helpers is not None:
                last.callback(self._helpers.close)  # before the groups: a scan waits for it

    def __enter__(self) -> "Watch":
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_state", "closed") == "open":
            warnings.warn(f"{self!r} was not closed", ResourceWarning, stacklevel=2, source=self)
            self.close()

    def __repr__(self) -> str:
        return f"<fanwise.Watch {' '.join(map(repr, self._given))} {self._state}>"

    # -- consuming --

    def __iter__(self) -> Iterator[Change]:
        return self

    def __next__(self) -> Change:
        while not self._ready:
            rows = self.read(self.timeout)
            if not rows:
                raise StopIteration
            self._ready.extend(rows)
        return self._ready.popleft()

    def batches(self) -> Iterator[list[Change]]:
        """Iterate over lists of changes, each what could be had at once (at most 4,096)."""
        return iter(lambda: self.read(self.timeout), [])

    def read(self, timeout: float | None = None) -> list[Change]:
        """Wait for changes and return them; [] at the end, or when ``timeout`` seconds passed.

        ``timeout=0`` does not wait: with `fileno`, call it until it returns [].
        Raises BusyError when another thread reads, ClosedError after close and in a forked
        process, FanwiseError when the kernel ends the stream with an error: what it gave before is
        returned first.
        """
        self._check()
        self._within.append(threading.get_ident())
        try:
            if not self._consumer.acquire(blocking=False):
                self._check()
                raise BusyError("another thread reads this watch", "read it in one place")
            try:
                self._check()
                if self._ready:
                    rows = list(self._ready)
                    self._ready.clear()
                    return rows
                return self._read(None if timeout is None else time.monotonic() + timeout)
            finally:
                self._consumer.release()
        finally:
            self._within.remove(threading.get_ident())
            if self._to_free and threading.get_ident() not in self._within:
                self._to_free = False
                self._consumer.acquire()
                self._free()

    def _check(self) -> None:
        if self._state != "open":
            raise ClosedError("the watch is not open", "use it in a with block")
        if self._pid != os.getpid():
            raise ClosedError(
                "the watch was opened by the process that this one was forked from",
                "open another one here",
            )

    def _read(self, deadline: float | None) -> list[Change]:
        assert self._epoll is not None
        assert self._waker is not None
        idle = False
        while True:
            # Before looking: what wakes from here on is seen, or leaves fileno() readable.
            if self._waker.written:
                self._waker.clear()
            if self._state != "open":
                self._check()
            if self._who is not None and self._who.due():
                self._tick(self._who)
            if self._below.inner:
                self._below.reap()
            rows = (
                self._mounts_moved()
                or (self._mounts_changed() if self._due else [])
                or self._slice()
                or self._mounts_changed()
            )
            if rows or self.ended:
                return rows
            for group in self._groups:
                group.unplug(self._epoll)
            wait = _SOON if not idle else None
            if idle and not self.scanned:
                wait = _AGAIN  # what could not be scanned is tried again
            if deadline is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    self._rested = True
                    return []
                wait = min(wait if wait is not None else _LONGEST, left)
            if idle:
                self._rested = True
                # The kernel group itself wakes the consumer, at the same time as the drain: one
                # thread after the other would be twice the latency. Once, and only when idle:
                # under load it would be a wake-up a record.
                for group in self._groups:
                    group.arm(self._epoll)
            idle = not self._epoll.poll(wait)

    def _slice(self) -> list[Change]:
        if self._stopping:
            for group in self._groups:
                group.source.stop()
        # Helpers that died, and whether what they did is all taken: the loop decodes it.
        dead = self._helpers.dead if self._helpers is not None else ()
        taken = bool(dead) and all(group.sync() for group in self._groups)
        busy = True
        while busy:
            busy = False
            for at in range(len(self._groups)):
                turn = (self._turn + at) % len(self._groups)
                group = self._groups[turn]
                rows = group.step(_SLICE)
                if rows:
                    self._turn = turn + 1
                    if self._who is not None and group.windows is not None:
                        self._who.name(rows, group.windows)
                    # Whoever waits on fileno() must hear of what is left.
                    if group.pending or len(self._groups) > 1:
                        self._wake()
                    # Behind a slice: the directory that was mounted on is told first.
                    self._due = time.monotonic() >= self._asked_at + _LOOK
                    return rows
                busy = busy or group.pending
        if self._helpers is not None and taken:
            self._helpers.bury(dead)
        if self._who is not None:
            self._who.rested(group.windows for group in self._groups if group.windows is not None)
        return []

    def _tick(self, who: Who) -> None:
        synced = []
        for group in self._groups:
            when = time.time_ns()
            if group.windows is not None and group.empty(_SOON):
                synced.append((group.windows, when, time.time_ns()))
        who.tick(synced)

    def _mounts_moved(self) -> list[Change]:
        # A directory above a mount point was renamed: mountinfo tells where the mount is now, but
        # wakes nobody for it.
        now = time.monotonic()
        if (not self._rested and now < self._look_at) or self._paused:
            return []
        self._rested = False
        self._look_at = now + _LOOK
        rows: list[Change] = []
        astray = []
        for group in self._groups:
            if group.astray():
                astray.append(group)
        if astray:
            self._news += self._mounts.look()
            for group in astray:
                if group.inner:
                    self._below.follow(group, self._mounts.there, rows)
                else:
                    group.follow(self._mounts.there, rows)
        return rows

    def _mounts_changed(self) -> list[Change]:
        rows: list[Change] = []
        self._due = False
        self._asked_at = time.monotonic()
        if self._paused:
            return rows
        if not self._before and self._mounts.changed():
            self._news += self._mounts.read()
            # The directory that was mounted on comes before what was mounted.
            for group in self._groups if self._news else ():
                if not group.inner:
                    group.sync()
                    self._before.append((group, group.resolver.intake.last))
        if any(group.resolver.behind(last) for group, last in self._before):
            rows = self._slice()
            if rows:
                self._due = True
                self._wake()
                return rows
        self._before = []
        stale = self._below.stale
        if stale:
            self._news += self._mounts.look()
        if self._news or stale:
            try:
                self._apply(self._news, rows)
            except BaseException:
                self._ready += rows  # what is known is told, and the rest is tried again
                self._below.again = True
                raise
            self._news = []
            if self._below.again:
                self._wake()
        return rows

    def _apply(self, changes: list[MountChange], rows: list[Change]) -> None:
        there = self._mounts.there
        new = [change.mount for change in changes if change.kind != "detached"]
        for group in self._groups:
            if group.resolver.dirs.roots and not group.inner and group.follow(there, rows):
                group.tell_covered(new, rows)
        if not self._stopping:
            known = set(self._groups)
            self._below.update(there, rows)
            assert self._epoll is not None
            for group in self._groups:
                if group not in known:
                    self._epoll.register(group.fileno(), select.EPOLLIN)

    def _wake(self) -> None:
        if self._waker is not None:
            self._waker.wake()

    # -- control --

    def stop(self) -> None:
        """End the stream: what was queued before is still delivered, then iteration ends."""
        self._stopping = True
        self._wake()

    def pause(self) -> None:
        """Drop the marks, as before the process is stopped: the kernel's queue would grow."""
        self._paused = True  # and what is paused hears of mounts when it is resumed
        for group in self._groups:
            if group.source.state == "MARKED":
                group.source.pause()

    def resume(self) -> None:
        """Mark again after `pause` and tell ``lost`` with source ``"stopped"``."""
        for group in self._groups:
            if group.source.state == "PAUSED":
                group.resume()
        self._paused = False
        self._wake()

    # -- looking --

    def fileno(self) -> int:
        """Return a descriptor that is readable when `read` has something, for foreign loops."""
        self._check()
        assert self._epoll is not None
        return self._epoll.fileno()

    @property
    def ended(self) -> bool:
        """Whether nothing more can come: stopped, or every root is gone."""
        return not self._ready and all(group.ended for group in self._groups)

    @property
    def roots(self) -> tuple[WatchedRoot, ...]:
        """What is watched, and how."""
        return tuple(self._roots)

    def tells(self, path: str) -> bool:
        """Say whether a change at this path, as it stands, would be told: in a root, not excluded.

        ``path`` is absolute and resolved.
        """
        if any(path == m.path or path.startswith(m.path + "/") for m in self.unwatched):
            return False
        return self._below.tells(path)

    @property
    def mounts(self) -> tuple[WatchedRoot, ...]:
        """The mounts below the roots that are followed, and how; see `unwatched`."""
        return tuple(
            WatchedRoot(root.path, group.source.rung, group.mount.fstype)
            for group in self._below.followed
            for root in group.resolver.dirs.roots
        )

    @property
    def unwatched(self) -> tuple[UnwatchedMount, ...]:
        """What below the roots is not told, and why, as of the last read.

        Mounts; and directories that could not be marked when the watch was opened.
        """
        below = self._below.unwatched
        for group in self._groups:
            if group.unwatched:
                below += tuple(
                    UnwatchedMount(path, group.mount.fstype, *why) for path, *why in group.unwatched
                )
        return below

    @property
    def scanned(self) -> bool:
        """Whether every directory below the roots is known; paths are right before that too.

        With ``index``: whether every name is.
        """
        return all(group.resolver.scanned for group in self._groups)

    @property
    def directories(self) -> int:
        """Directories known now."""
        return sum(len(group.resolver.tree) for group in self._groups)

    @property
    def names(self) -> int:
        """Names held in the index; 0 without ``index``."""
        return sum(len(group.resolver.files) for group in self._groups if group.resolver.files)

    @property
    def implementation(self) -> str:
        """``"native"`` or ``"pure"``."""
        return self._parts.name

    @property
    def who_limits(self) -> str | None:
        """With ``who``: why processes that ended early are not named; None when they are."""
        return self._who.limits if self._who is not None else None

    def stats(self) -> dict[str, int]:
        """Return counters: records, bytes, reads, lost, backlog_bytes, peak_bytes, tree_bytes.

        With ``index`` also index_names and index_bytes.
        With ``who`` also who_trace_records, who_trace_lost and who_processes.
        """
        total: dict[str, int] = {"tree_bytes": 0, **self._below.past}
        if self._who is not None:
            total |= self._who.stats()
        if self._index:
            total |= {"index_names": self.names, "index_bytes": 0}
        for group in self._groups:
            if group.resolver.files is not None:
                total["index_bytes"] += group.resolver.files.nbytes
            total["tree_bytes"] += group.resolver.tree.nbytes
            for key, value in group.source.drain.stats().items():
                total[key] = total.get(key, 0) + value
        return total


def real_path(given: str | os.PathLike[str]) -> str:
    """Resolve a path. Raises NoSuchRoot, PermissionNeeded."""
    path = os.path.realpath(given)
    try:
        os.lstat(path)
    except PermissionError as error:
        raise PermissionNeeded(
            given, "a directory above it may not be searched", "run as root, or change its mode"
        ) from error
    except FileNotFoundError as error:
        raise NoSuchRoot(
            given, "it does not exist", "give an existing file or directory"
        ) from error
    except OSError as error:
        raise NoSuchRoot(given, f"it cannot be reached: {error.strerror}") from error
    return path


def _several(name: str, given: Iterable[_T]) -> tuple[_T, ...]:
    # A str is an iterable of str: exclude="*.tmp" would leave out every name.
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise FanwiseError(f"{name}: {given!r} is not a list", f"give a list: {name}=[{given!r}]")
    return tuple(given)


def _is_time(given: object) -> bool:
    if not isinstance(given, (int, float)) or isinstance(given, bool):
        return False
    return not math.isnan(given) and given >= 0


def watch(
    *paths: str | os.PathLike[str],
    kinds: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    recursive: bool = True,
    ignore_pids: Iterable[int] = (),
    queue: int = 256 << 20,
    timeout: float | None = None,
    pure: bool | None = None,
    who: bool = False,
    mounts: bool = True,
    index: bool = False,
) -> Watch:
    """Watch files and directories, with everything below them, for changes.

        with fanwise.watch("/srv/data") as changes:
            for change in changes:
                print(change.kinds, change.path)

    ``paths``: directories or files, on any number of filesystems; a symbolic link is resolved once.
    A file is followed by its name, also when another file is put in its place. ``kinds``: what to
    tell, by default created, modified, written, attributes, renamed and deleted; opened, accessed
    and executed by request. ``exclude``: globs; one without a slash matches a name at any depth,
    one with a slash a path below a root. ``recursive=False``: only the names directly in a root.
    ``ignore_pids``: processes whose changes are not told. ``queue``: bytes of records held for a
    consumer that is slow; beyond them changes are counted and told as ``lost``. ``timeout``:
    iteration ends when nothing came for so many seconds. ``pure``: True for the Python twin of the
    native module. ``who``: find out which process did each change; see `Process`. ``mounts``:
    follow what is mounted below a root, now or later; False stays on the filesystems of the roots.
    ``index``: keep every name with its size and times; after a loss the differences are told then,
    and no ``relisted``.

    Nothing starts before ``with``. Without CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH, and where no mark
    on the whole filesystem can be set, a lower rung serves it (`Watch.roots`). See `Change`, and
    the page on guarantees for what is promised and what breaks it.

    Raises FanwiseError for arguments that make no sense, NotWatchable on entering.
    Linux reference: fanotify(7).
    """
    return Watch(
        paths, kinds, exclude, recursive, ignore_pids, queue, timeout, pure, who, mounts, index
    )
