"""Look-ups by path: for rungs on which a directory cannot be opened by its handle.

The model says where a directory is as of the record being decoded; what is still unread says where
it went from there. A directory is opened at that path and its handle compared: another one that
stands there is never taken for it.

REFS: owned by a group of a watch; descriptors live for one slice. LOCKING: none, one consumer.
"""

import os
from collections.abc import Callable, Collection
from typing import Any

from fanwise._errors import FanwiseError, NotWatchable
from fanwise.kernel import contract as flags
from fanwise.kernel.contract import CREATE, DELETE, RENAME, Record
from fanwise.kernel.handles import identify
from fanwise.kernel.mounts import Mount
from fanwise.kernel.native import open_long

from .lookup import ABSENT, CannotLook, Link, Lookup

_PATH = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN = 256  # descriptors held within a slice
_TRIES = 4

# So many names are looked for in a list of the directory, if that is not much longer.
_MANY = 8
_LONGER = 4

Name = tuple[bytes, bytes]


def _listed(fd: int, names: Collection[bytes]) -> set[bytes] | None:
    # One list costs less than the look-ups; of names that lead to nothing tmpfs remembers none.
    try:
        reader = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    except OSError:
        return None  # it may not be read, or is gone
    found = set()
    most = _LONGER * len(names)
    try:
        with os.scandir(reader) as entries:
            for count, entry in enumerate(entries):
                if count > most:
                    return None
                name = os.fsencode(entry.name)
                if name in names:
                    found.add(name)
    except OSError:
        return None
    finally:
        os.close(reader)
    return found


class PathLookup(Lookup):
    """Answers about one mount by the paths of a tree.

    ``unread`` reads all there is and gives the name records of directories from the window in hand
    on; ``hints`` are names at which a directory may be, for one whose records contradict.
    """

    handle: Callable[..., tuple[bytes, int]] = staticmethod(identify)

    def __init__(self, mount: Mount, tree: Any) -> None:
        super().__init__(mount)
        self._tree = tree
        self._fds: dict[bytes, int] = {}
        self.unread: Callable[[], list[Record]] = list
        self.hints: dict[bytes, list[Name]] = {}

    def close(self) -> None:
        """Close every descriptor."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        super().close()

    def path(self, key: bytes) -> bytes:
        """Where the tree has a directory; b"" when no way up is known."""
        at = self._tree.find(key)
        return (
            b"" if at < 0 else bytes(self._tree.resolve(at)[1] or b"/" if self._topped(at) else b"")
        )

    def _topped(self, at: int) -> bool:
        return bool(self._tree.resolve(at)[1]) or bool(self._tree.info(at)[2] & flags.TOP)

    def now(self, key: bytes) -> bytes | None:
        """Where a directory is now, as far as the stream tells; None when it is gone or left."""
        places: dict[bytes, Name | None] = {}
        for record in self.unread():
            mask, _, _, directory, name, directory2, name2, target, _ = record
            if target is None:
                continue
            if mask & RENAME:
                place = (directory2, name2)
            elif mask & CREATE and mask & DELETE:
                continue  # an order that only the disk knows
            else:
                place = (directory, name) if mask & CREATE else (None, None)
            places[target] = place if place[0] is not None else None  # type: ignore[assignment]
        names: list[bytes] = []
        seen: set[bytes] = set()
        while key not in seen:
            seen.add(key)
            at = self._tree.find(key)
            if key in places:
                there = places[key]
                if there is None:
                    return None
                key = there[0]
                names.append(there[1])
                continue
            if at < 0:
                return None
            parent, name, now, _, _ = self._tree.info(at)
            if now & flags.TOP:
                names.append(b"" if name == b"/" else name)
                return b"/".join(reversed(names)) or b"/"
            if parent < 0 or now & flags.ZOMBIE:
                return None
            names.append(name)
            key = self._tree.info(parent)[3]
        return None

    def directory(self, key: bytes) -> int:
        """Open a directory; the descriptor is the look-up's. -1 when it is gone or left the view.

        Raises CannotLook.
        """
        fd = self._fds.get(key)
        if fd is not None:
            return fd
        path = self.path(key)
        fd = self._try(path, key) if path else -1
        for _ in range(_TRIES):
            if fd >= 0:
                break
            now = self.now(key)
            if now is None:
                fd = self._by_hint(key, set())
                break
            fd = self._try(now, key)
            if fd < 0:
                fd = self._by_hint(key, set())
        else:
            if fd < 0:
                raise CannotLook("a directory is not where the changes say")
        if fd >= 0:
            if len(self._fds) >= _OPEN:
                self.close()
            self._fds[key] = fd
        return fd

    def _by_hint(self, key: bytes, seen: set[bytes]) -> int:
        for parent, name in self.hints.get(key, ()):
            if parent in seen:
                continue
            path = self.path(parent)
            above = self._try(path, parent) if path else -1
            if above < 0:
                above = self._by_hint(parent, seen | {key})
            if above < 0:
                continue
            try:
                fd = os.open(name, _PATH, dir_fd=above)
            except OSError:
                continue
            finally:
                os.close(above)
            if self._is(fd, key):
                return fd
        return -1

    def _try(self, path: bytes, key: bytes) -> int:
        try:
            fd = open_long(path, _PATH)
        except OSError as error:
            if error.errno not in ABSENT:
                raise CannotLook(f"a look at the filesystem failed: {error.strerror}") from error
            return -1
        return fd if self._is(fd, key) else -1

    def _is(self, fd: int, key: bytes) -> bool:
        # Closes the descriptor of another one.
        try:
            if self.handle(b"", fd, empty=True) == (key, self.mount.id):
                return True
        except (OSError, FanwiseError):
            os.close(fd)
            raise
        os.close(fd)
        return False

    # -- the questions of a Lookup --

    def locate(self, key: bytes, known: Callable[[bytes], bool]) -> list[Link] | None:
        """See Lookup. Only a directory that the tree or a hint leads to is found."""
        fd = self.directory(key)
        return None if fd < 0 else self._way(os.dup(fd), key, known, 4)

    def key_of(self, directory: bytes, name: bytes) -> bytes | None:
        """See Lookup."""
        fd = self.directory(directory)
        if fd < 0:
            return None
        try:
            return self.handle(name, fd)[0]
        except OSError as error:
            if error.errno not in ABSENT:
                raise CannotLook(f"a look at the filesystem failed: {error.strerror}") from error
            return None
        except NotWatchable as error:
            raise CannotLook(str(error)) from error

    def present(self, directory: bytes, names: Collection[bytes]) -> set[bytes]:
        """Say which of some names in a directory lead to anything."""
        fd = self.directory(directory)
        if fd < 0:
            return set()
        found = _listed(fd, names) if len(names) >= _MANY else None
        if found is None:
            found = {n for n in names if os.access(n, os.F_OK, dir_fd=fd, follow_symlinks=False)}
        return found

    def links(self, key: bytes) -> int:
        """See Lookup; directories only, because nothing leads to a file but its names."""
        if self._tree.find(key) < 0:
            raise CannotLook("only directories have a path here")
        fd = self.directory(key)
        return -1 if fd < 0 else os.fstat(fd).st_nlink
