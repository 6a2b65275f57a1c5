"""An inotify instance that gives the same records as a fanotify group with marks on directories.

inotify names a directory by a watch descriptor and an object by nothing. Directories get their keys
when they are marked, or here: what comes is followed through everything that is there to be read,
and identified where it ends up. What has gone by then gets a key that no handle has. Files have no
key, and no process is told; nothing is merged, so the order is that of the events.

REFS      as FanotifySource; there is no thread: the consumer reads, and the kernel's queue holds
          fs.inotify.max_queued_events for one that does not.
LOCKING   none: one owner.
Linux reference: inotify(7).
"""

import ctypes
import errno
import itertools
import os
import select
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from fanwise._errors import (
    FanwiseError,
    FeatureMissing,
    LimitReached,
    NoSuchRoot,
    NotWatchable,
    PermissionNeeded,
    SyscallBlocked,
)
from fanwise.kernel.caps import credentials
from fanwise.kernel.fanotify import (
    FAN_ACCESS,
    FAN_ATTRIB,
    FAN_CLOSE_WRITE,
    FAN_CREATE,
    FAN_DELETE,
    FAN_DELETE_SELF,
    FAN_MODIFY,
    FAN_ONDIR,
    FAN_OPEN,
    FAN_Q_OVERFLOW,
    FAN_RENAME,
)
from fanwise.kernel.handles import identify
from fanwise.kernel.libc import last_error, libc
from fanwise.kernel.mounts import Mount

from .fanotify import SOURCE, DirectorySource

libc.inotify_init1.argtypes = [ctypes.c_int]
libc.inotify_rm_watch.argtypes = [ctypes.c_int, ctypes.c_int]

IN_ACCESS, IN_MODIFY, IN_ATTRIB, IN_CLOSE_WRITE, IN_OPEN = 0x1, 0x2, 0x4, 0x8, 0x20
IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE, IN_DELETE_SELF = 0x40, 0x80, 0x100, 0x200, 0x400
IN_Q_OVERFLOW, IN_IGNORED, IN_ONLYDIR, IN_ISDIR = 0x4000, 0x8000, 0x0100_0000, 0x4000_0000
_NAMES = IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE
_ALWAYS = _NAMES | IN_ATTRIB | IN_DELETE_SELF | IN_ONLYDIR
# What both speak of has the same bits, but for the two halves of a rename.
_SAME = FAN_ACCESS | FAN_MODIFY | FAN_ATTRIB | FAN_CLOSE_WRITE | FAN_OPEN

_event = struct.Struct("=iIII")
_meta = struct.Struct("=IBBHQii")
_info = struct.Struct("=BBH8xI")
_READ = 256 << 10
_ROUNDS = 8
_OTHER_HALF = 2  # ms, for the second half of a rename
_FID, _DFID_NAME, _OLD, _NEW = 1, 2, 10, 12


class _New:
    # A directory that came, until it is identified.
    __slots__ = ("key",)

    def __init__(self) -> None:
        self.key = b""


_Dir = bytes | _New
_Place = tuple[_Dir, bytes]
_Row = tuple[int, list[tuple[int, _Dir, bytes | None]]]  # mask, [(info type, key, name)]


class InotifySource(DirectorySource):
    """One inotify instance; see DirectorySource for what it stands in for."""

    inotify = True

    def __init__(
        self,
        path: str,
        mount: Mount,
        open_mount: Callable[[], int],
        mask: int,
        ring: int,
        parts: Any,
    ) -> None:
        super().__init__(path, mount, open_mount, mask, ring, parts, False)
        self.mark_mask = _ALWAYS | mask & _SAME
        self.watches: dict[int, bytes] = {}
        self.by_key: dict[bytes, int] = {}

    def _init(self) -> int:
        return init(self.path)

    def _first_mark(self) -> None:
        pass  # the Marker's first is the root

    def _make_drain(self) -> Any:
        return Reader(self)

    def marked(
        self,
        items: Sequence[tuple[bytes, bytes]],
        found: Sequence[tuple[bytes, bytes, bytes, bool]],
        ends: Sequence[tuple[int, int]],
    ) -> None:
        """Learn the watches of some directories, and what is in them."""
        reader: Reader = self._drain
        for (key, path), (_, watch) in zip(items, ends, strict=True):
            if watch >= 0:
                self.watches[watch] = key
                self.by_key[key] = watch
                if key not in reader.places:
                    reader.tops.setdefault(key, path)
        for key, parent, name, is_dir in found:
            if is_dir:
                reader.found(key, parent, name)

    def mark_above(self, path: str) -> bool:
        """Nothing is heard of what is above: there is no key by which to tell a root's name."""
        return False

    def forget(self, key: bytes) -> None:
        """Take the watch off a directory that left."""
        watch = self.by_key.pop(key, -1)
        if watch >= 0:
            self.watches.pop(watch, None)
            libc.inotify_rm_watch(self.fd, watch)

    def pause(self) -> None:
        """Drop every watch."""
        SOURCE.advance(self, "pause")
        for key in list(self.by_key):
            self.forget(key)


class Reader:
    """Reads an inotify instance; to its owner it is a drain."""

    error = 0

    def __init__(self, source: InotifySource) -> None:
        self._source = source
        self._chunks: deque[tuple[bytes, int, bool, int]] = deque()
        self._left = b""
        self.ended = False
        # Directories as of what was read, which is ahead of what is decoded.
        self.places: dict[_Dir, tuple[_Dir, bytes]] = {}
        self._names: dict[tuple[_Dir, bytes], _Dir] = {}
        self.tops: dict[bytes, bytes] = {}
        # Directories that lost their name to a rename: whose it is now, and the name that had.
        self._under: dict[_Dir, tuple[_Place, _Place]] = {}
        self._counts = {"records": 0, "bytes": 0, "reads": 0, "lost": 0, "backlog_bytes": 0}
        self._serial = itertools.count(1)

    def start(self) -> None:
        """There is no thread."""

    def fileno(self) -> int:
        """Return the instance's descriptor."""
        return self._source.fd

    def take(self) -> tuple[bytes, int, bool, int] | None:
        """Give the next chunk, as a drain does."""
        if not self._chunks:
            self._pump()
        return self._chunks.popleft() if self._chunks else None

    def sync(self, timeout: float) -> bool:
        """Read all there is."""
        self._pump()
        return not self.ended

    def stop(self, drain: bool = True) -> None:
        """Read what is there, and no more."""
        if drain:
            self._pump()
        self.ended = True

    def stats(self) -> dict[str, int]:
        """Return the counters."""
        return dict(self._counts)

    def close(self) -> None:
        """Drop what was read."""
        self.ended = True
        self._chunks.clear()

    def forget(self) -> None:
        """In a forked child."""
        self.close()

    # -- directories --

    def put(self, key: _Dir, parent: _Dir, name: bytes) -> None:
        """Learn where a directory is."""
        self._take_out(key)
        before = self._names.get((parent, name))
        # A rename put another in its place, and it is gone.
        if before is not None and self.places.get(before) == (parent, name):
            self.places.pop(before)
        self.places[key] = parent, name
        self._names[parent, name] = key

    def found(self, key: _Dir, parent: _Dir, name: bytes) -> None:
        """Learn where a directory was seen. What is unread may still say that it left elsewhere."""
        before = self.places.get(key)
        self.put(key, parent, name)
        if before is not None and before != (parent, name):
            self._names.setdefault(before, key)

    def _take_out(self, key: _Dir) -> None:
        place = self.places.pop(key, None)
        if place is not None and self._names.get(place) == key:
            del self._names[place]

    def _path(self, key: _Dir) -> bytes | None:
        names: list[bytes] = []
        for _ in range(len(self.places) + 1):
            if isinstance(key, bytes) and key in self.tops:
                return b"/".join([self.tops[key].rstrip(b"/"), *reversed(names)])
            place = self.places.get(key)
            if place is None:
                return None
            names.append(place[1])
            key = place[0]
        return None

    def _leave(self, key: _Dir) -> None:
        # It went to where nothing is watched, with all that is in it.
        children: dict[_Dir, list[_Dir]] = {}
        for child, (parent, _) in self.places.items():
            children.setdefault(parent, []).append(child)
        stack = [key]
        while stack:
            each = stack.pop()
            stack += children.get(each, ())
            self._take_out(each)
            if isinstance(each, bytes):
                self._source.forget(each)

    # -- reading --

    def _pump(self) -> None:
        if self.ended or self._source.fd < 0:
            return
        rows: list[_Row] = []
        fresh: list[_New] = []
        for _ in range(_ROUNDS):
            events = self._events()
            if not events:
                break
            self._translate(events, rows, fresh)
        if not rows:
            return
        for new in fresh:
            self._identify(new)
        data = b"".join(_encode(row) for row in rows)
        self._counts["records"] += len(rows)
        self._counts["bytes"] += len(data)
        self._chunks.append((data, time.time_ns(), True, 0))

    def _events(self) -> list[tuple[int, int, int, bytes]]:
        out: list[tuple[int, int, int, bytes]] = []
        while True:
            try:
                data = os.read(self._source.fd, _READ)
            except BlockingIOError:
                # A rename is two events, and the second may be on its way.
                if not out or not out[-1][1] & IN_MOVED_FROM or not self._wait():
                    return out
                continue
            self._counts["reads"] += 1
            at = 0
            while at < len(data):
                watch, mask, cookie, length = _event.unpack_from(data, at)
                at += _event.size
                out.append((watch, mask, cookie, data[at : at + length].rstrip(b"\0")))
                at += length

    def _wait(self) -> bool:
        poll = select.poll()
        poll.register(self._source.fd, select.POLLIN)
        return bool(poll.poll(_OTHER_HALF))

    def _translate(
        self, events: list[tuple[int, int, int, bytes]], rows: list[_Row], fresh: list[_New]
    ) -> None:
        second = {e[2]: at for at, e in enumerate(events) if e[1] & IN_MOVED_TO and e[2]}
        used: set[int] = set()
        watches = self._source.watches
        for at, (watch, mask, cookie, name) in enumerate(events):
            if mask & IN_Q_OVERFLOW:
                self._under.clear()
                rows.append((FAN_Q_OVERFLOW, []))
                continue
            key = watches.get(watch)
            if key is not None and not name and mask & (IN_ATTRIB | IN_DELETE_SELF | IN_IGNORED):
                self._under.pop(key, None)  # it was put out of its name for good
            if mask & IN_IGNORED:
                if key is not None:
                    del watches[watch]
                    if self._source.by_key.get(key) == watch:
                        del self._source.by_key[key]
                continue
            if key is None or at in used:
                continue
            is_dir = bool(mask & IN_ISDIR)
            if mask & IN_MOVED_FROM:
                to = second.get(cookie, -1)
                other = watches.get(events[to][0]) if to > at else None
                if other is not None:
                    used.add(to)
                rows.append(self._renamed(key, name, other, events[to][3], is_dir))
            elif mask & IN_MOVED_TO:
                rows.append(self._came(FAN_RENAME, key, name, is_dir, fresh))
            elif mask & IN_CREATE:
                rows.append(self._came(FAN_CREATE, key, name, is_dir, fresh))
            elif mask & IN_DELETE:
                rows.append(self._gone(key, name, is_dir))
            elif mask & IN_DELETE_SELF:
                rows.append((FAN_DELETE_SELF | FAN_ONDIR, [(_DFID_NAME, key, b".")]))
            elif not name:  # the directory itself
                if mask & IN_ATTRIB:
                    rows.append((FAN_ATTRIB | FAN_ONDIR, [(_DFID_NAME, key, b".")]))
            elif not is_dir:  # of those inside, each tells of itself
                rows.append((mask & _SAME, [(_DFID_NAME, key, name)]))

    def _renamed(
        self, key: bytes, name: bytes, other: bytes | None, name2: bytes, is_dir: bool
    ) -> _Row:
        infos: list[tuple[int, _Dir, bytes | None]] = [(_OLD, key, name)]
        if other is not None:
            infos.append((_NEW, other, name2))
        if not is_dir:
            return FAN_RENAME, infos
        who = self._exchanged((key, name), (other, name2)) if other is not None else None
        if who is None:
            who = self._names.pop((key, name), None) or self._nobody()
        infos.append((_FID, who, None))
        if other is None:
            self._leave(who)
        else:
            out = self._names.get((other, name2))
            if out is not None and out != who and out in self._source.by_key:
                self._under[out] = (other, name2), (key, name)
            self.put(who, other, name2)
        return FAN_RENAME | FAN_ONDIR, infos

    def _exchanged(self, old: _Place, new: _Place) -> _Dir | None:
        # An exchange of names is two renames. The second is not of the directory that the first put
        # there, but of the one that had the name, and has heard nothing: of a rename over it, it
        # hears that its link count changed (fs/namei.c, vfs_rename; fsnotify_move).
        for key, places in self._under.items():
            if places == (old, new):
                del self._under[key]
                return key
        return None

    def _came(self, bit: int, key: bytes, name: bytes, is_dir: bool, fresh: list[_New]) -> _Row:
        if not is_dir:
            return FAN_CREATE, [(_DFID_NAME, key, name)]
        new = _New()
        fresh.append(new)
        self.put(new, key, name)
        kind = _NEW if bit == FAN_RENAME else _DFID_NAME
        return bit | FAN_ONDIR, [(kind, key, name), (_FID, new, None)]

    def _gone(self, key: bytes, name: bytes, is_dir: bool) -> _Row:
        if not is_dir:
            return FAN_DELETE, [(_DFID_NAME, key, name)]
        who = self._names.get((key, name)) or self._nobody()
        self._take_out(who)
        return FAN_DELETE | FAN_ONDIR, [(_DFID_NAME, key, name), (_FID, who, None)]

    def _nobody(self) -> bytes:
        # A key that no handle has: those of the kernel have small types.
        return struct.pack("=iQ", -1, next(self._serial))

    def _identify(self, new: _New) -> None:
        path = self._path(new)
        place = self.places.get(new)
        self._take_out(new)
        try:
            if path is None:
                raise FileNotFoundError
            new.key = identify(path)[0]
        except (OSError, FanwiseError):
            new.key = self._nobody()
        if place is not None:
            parent = place[0]
            self.put(new.key, parent.key if isinstance(parent, _New) else parent, place[1])
        for child, (parent, name) in list(self.places.items()):
            if parent is new:
                self.put(child, new.key, name)


def init(path: str) -> int:
    """Make an instance. Raises LimitReached, SyscallBlocked, FeatureMissing."""
    fd: int = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    if fd >= 0:
        return fd
    error = last_error()
    if error.errno == errno.EMFILE:
        raise LimitReached(path, "fs.inotify.max_user_instances") from error
    if credentials().filtered:
        raise SyscallBlocked(
            path, "a seccomp filter refuses inotify_init1", "allow it in the filter's profile"
        ) from error
    if error.errno == errno.ENOSYS:
        raise FeatureMissing(path, "this kernel was built without inotify") from error
    raise NotWatchable(path, f"inotify_init1: {error.strerror}") from error


def add(fd: int, path: str) -> None:
    """Watch a directory, as a trial. Raises PermissionNeeded, LimitReached, NotWatchable."""
    if libc.inotify_add_watch(fd, os.fsencode(path), IN_ONLYDIR | IN_DELETE_SELF) >= 0:
        return
    error = last_error(os.fsencode(path))
    if error.errno == errno.EACCES:
        raise PermissionNeeded(
            path,
            "a watch needs permission to read the directory and to search those above",
            "change its mode, or run with CAP_DAC_READ_SEARCH",
        ) from error
    if error.errno == errno.ENOSPC:
        raise LimitReached(path, "fs.inotify.max_user_watches") from error
    if error.errno == errno.ENOENT:
        raise NoSuchRoot(path, "it does not exist") from error
    raise NotWatchable(path, f"inotify_add_watch: {error.strerror}") from error


def _encode(row: _Row) -> bytes:
    mask, infos = row
    body = b""
    for kind, who, name in infos:
        key = who.key if isinstance(who, _New) else who
        text = b"" if name is None else name + b"\0"
        size = -(-(16 + len(key) + len(text)) // 4) * 4
        # The key's first four bytes are the handle's type, which follows its length.
        info = _info.pack(kind, 0, size, len(key) - 4) + key + text
        body += info.ljust(size, b"\0")
    return _meta.pack(24 + len(body), 3, 0, 24, mask, -1, 0) + body
