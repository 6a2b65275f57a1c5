"""Marker: marks directories one by one and lists each behind its mark.

It stands where the scan does on the other rung, but works in the consumer's thread: what is not
marked yet is what is missed. The order is mark, list, then one sync of the stream for all of a
round: what was made before the mark is in the list, what was made after it is in the stream.

The marks are not evictable: one that the kernel drops with a cached inode would end the watch of
that directory without a word. They pin the inode, and an unmount drops them.

REFS: owned by a group of a watch. LOCKING: none, one consumer. LIFETIME: that of the group.
"""

import errno
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from fanwise.kernel.contract import LIST_FILES, LIST_LEAVES

from .bypath import PathLookup
from .lookup import ABSENT
from .scan import Found

ROUND = 1024  # directories between two looks at the stream

# mark([(key, path)], all) -> ([(key, parent key, name, is directory)], [errno])
Mark = Callable[
    [Sequence[tuple[bytes, bytes]], bool],
    tuple[list[tuple[bytes, bytes, bytes, bool]], list[int]],
]


class Marker:
    """A Scanner that marks; `refused` collects what could not be marked."""

    def __init__(
        self, mark: Mark, lookup: PathLookup, above: Callable[[str], bool] = lambda path: False
    ) -> None:
        self._mark, self.lookup, self._above = mark, lookup, above
        self._keys: deque[tuple[int, bytes]] = deque()
        self.refused: list[tuple[bytes, int]] = []  # (key, errno), not told yet

    @property
    def busy(self) -> int:
        """Directories that wait."""
        return len(self._keys)

    def give(self, keys: Sequence[bytes], names: int = 0) -> None:
        """Hand out directories; with ``names``, all their names are wanted."""
        self._keys.extend((names, key) for key in keys)

    def take(self) -> list[tuple[list[bytes], Found]]:
        """Mark and list the next round of them."""
        if not self._keys:
            return []
        names = self._keys[0][0]
        keys: list[bytes] = []
        while self._keys and self._keys[0][0] == names and len(keys) < ROUND:
            keys.append(self._keys.popleft()[1])
        found, failed = self.mark(keys, bool(names))
        children = [(key, parent, name, False) for key, parent, name, is_dir in found if is_dir]
        bad = {key for key, _ in failed}
        # Gone, or in one that is not marked yet: the stream tells, and it is scanned there.
        failed = [each for each in failed if each[1] != errno.ESTALE]
        blobs: dict[bytes, list[bytes]] = {key: [] for key in keys if names and key not in bad}
        for _, parent, name, is_dir in found:
            if parent in blobs:
                blobs[parent].append(name + (b"/\0" if is_dir else b"\0"))
        return [(keys, (children, failed, [(k, b"".join(v)) for k, v in blobs.items()]))]

    def mark(
        self, keys: Sequence[bytes], everything: bool
    ) -> tuple[list[tuple[bytes, bytes, bytes, bool]], list[tuple[bytes, int]]]:
        """Mark and list some directories: what is inside, and (key, errno) of those that failed.

        EAGAIN: it moves, and needs another try. ESTALE: it is gone, or in a directory that is not
        marked yet; the stream tells which.
        """
        items = [(key, path) for key in keys if (path := self.lookup.path(key))]
        found, codes = self._mark(items, everything) if items else ([], [])
        again: list[tuple[bytes, bytes]] = []
        missed = {key for key, _ in items} ^ set(keys)
        failed: list[tuple[bytes, int]] = []
        for (key, _), code in zip(items, codes, strict=True):
            if code in _ELSEWHERE:
                missed.add(key)
            elif code:
                failed.append((key, code))
        for key in missed:  # it moved, and the stream says where to; or it is gone
            now = self.lookup.now(key)
            if now is not None:
                again.append((key, now))
            else:  # or it is in one that is not marked yet: more of the stream tells
                failed.append((key, errno.ESTALE))
        if again:
            more, codes = self._mark(again, everything)
            found += more
            for (key, _), code in zip(again, codes, strict=True):
                if code in _ELSEWHERE:
                    failed.append((key, errno.EAGAIN))  # it moves on, or is gone
                elif code:
                    failed.append((key, code))
        self.refused += [each for each in failed if each[1] not in (errno.EAGAIN, errno.ESTALE)]
        return found, failed

    def mark_above(self, roots: Sequence[str]) -> None:
        """Mark what is above the roots, up to where the mount ends: roots move with it.

        Where that may not be read nothing tells of it, which the guarantees say.
        """
        top = os.fsdecode(self.lookup.mount.mount_point)
        for path in {above for root in roots for above in _above(root, top)}:
            self._above(path)

    def reset(self) -> None:
        """Forget what waits: the tree was dropped."""
        self._keys.clear()
        self.refused.clear()

    def stop(self) -> None:
        """There is no thread to end."""


_ELSEWHERE = (*ABSENT, errno.ELOOP)


def _above(path: str, top: str) -> list[str]:
    found = []
    while path != top and path.startswith(top.rstrip("/") + "/"):
        path = os.path.dirname(path)
        found.append(path)
    return found


def marks_of(mark_dirs: Callable[..., Any], source: Any, leaves: bool = False) -> Mark:
    """Make the step that marks, of the native function or its twin and a source.

    ``leaves``: what the filesystem says of links is not believed, directories without
    subdirectories by their number of links are listed all the same.
    """
    more = LIST_LEAVES if leaves else 0

    def mark(
        items: Sequence[tuple[bytes, bytes]], everything: bool
    ) -> tuple[list[tuple[bytes, bytes, bytes, bool]], list[int]]:
        what = (LIST_FILES if everything else 0) | more
        found, ends = mark_dirs(source.fd, source.inotify, source.mark_mask, items, what)
        source.marked(items, found, ends)
        return found, [code for code, _ in ends]

    return mark


def describe(code: int) -> str:
    """Say in a word why a directory is not watched: "denied", "limit" or the error's name."""
    if code in (errno.EACCES, errno.EPERM):
        return "denied"
    if code == errno.ENOSPC:
        return "limit"
    return errno.errorcode.get(code, os.strerror(code))
