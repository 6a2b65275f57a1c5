"""Look-ups by path: for rungs on which a directory cannot be opened by its handle.

The model says where a directory is as of the record being decoded; what is still unread says where
it went from there. A directory is opened at that path and its handle compared: another one that
stands there is never taken for it.

REFS: owned by a group of a watch; descriptors live for one slice. LOCKING: none, one consumer.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
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

Name = tuple[bytes, bytes]


# present_in([(key, path, names)], mount id) -> [errno, or the names that lead to anything]
Ask = Callable[[Sequence[tuple[bytes, bytes, Collection[bytes]]], int], list[int | list[bytes]]]


class PathLookup(Lookup):
    """Answers about one mount by the paths of a tree.

    ``unread`` reads all there is and gives the name records of directories from the window in hand
    on; ``hints`` are names at which a directory may be, for one whose records contradict.
    """

    handle: Callable[..., tuple[bytes, int]] = staticmethod(identify)

    def __init__(self, mount: Mount, tree: Any, ask: Ask) -> None:
        super().__init__(mount)
        self._tree, self._ask = tree, ask
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
        if at < 0:
            return b""
        path: bytes = self._tree.resolve(at)[1]
        return path or (b"/" if self._tree.info(at)[2] & flags.TOP else b"")

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
            self.held = True
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

    def present(
        self, asked: Mapping[bytes, Mapping[bytes, bytes]]
    ) -> list[tuple[bytes, list[bytes]]]:
        """Say which of some names lead to anything, {directory: names}: [(directory, names)].

        Where that cannot be seen all of them are named.
        """
        items = [(key, self.path(key), names) for key, names in asked.items()]
        out: list[tuple[bytes, list[bytes]]] = []
        for (key, _, names), found in zip(items, self._ask(items, self.mount.id), strict=True):
            if isinstance(found, int):  # it moved, or is gone
                found = self._present(key, names)
            if found:
                out.append((key, found))
        return out

    def _present(self, key: bytes, names: Collection[bytes]) -> list[bytes]:
        try:
            fd = self.directory(key)
        except CannotLook:
            return list(names)
        if fd < 0:
            return []
        (found,) = self._ask([(key, b"/proc/self/fd/%d/." % fd, names)], self.mount.id)
        return list(names) if isinstance(found, int) else found

    def links(self, key: bytes) -> int:
        """See Lookup; directories only, because nothing leads to a file but its names."""
        if self._tree.find(key) < 0:
            raise CannotLook("only directories have a path here")
        fd = self.directory(key)
        return -1 if fd < 0 else os.fstat(fd).st_nlink
