"""Expand: the trees that one record tells of. btrfs snapshots and subvolumes come and go whole.

A snapshot is one creation of a directory, and everything is in it. It is listed, directory by
directory, and each listing is taken back to the moment of the creation: the queue is drained after
it, and what the unread records say of that directory is undone, the last one first. So each name is
told once, here or by the record of its own creation, and the directories below are known. The
deletion of a subvolume is one record as well: what the model knows below it is told, children
first.

A subvolume is known by its root's inode number, 256, which no other object of btrfs has. An inner
subvolume is an empty stub in a snapshot; all stubs have number 2, and so one handle.

REFS: owned by the resolver. LOCKING: none. LIFETIME: work in hand lives until it is told, or until
`reset` after a loss; meanwhile no record is decoded.

Linux reference: fs/btrfs/ioctl.c (create_snapshot), include/uapi/linux/btrfs_tree.h
(BTRFS_FIRST_FREE_OBJECTID, BTRFS_EMPTY_SUBVOL_DIR_OBJECTID).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import fsdecode
from typing import Any

from fanwise.kernel import contract as flags
from fanwise.kernel.contract import CREATE, DELETE, ONDIR, RENAME, Record
from fanwise.kernel.handles import inode_of

from .directories import Directories
from .intake import EVERYTHING, Intake
from .lookup import CannotLook
from .teller import Teller

_SUBVOLUME = 256
_STUB = 2
_AT_ONCE = 64  # directories listed before the queue is drained

# name -> (key, whether it is a directory)
Names = dict[bytes, tuple[bytes | None, bool]]


def undo(names: Names, directory: bytes, records: Sequence[Record]) -> None:
    """Take the names in a directory back to before some records."""
    for mask, _, _, first, name, second, name2, target, _ in reversed(records):
        if mask & RENAME:
            if second == directory and name2 is not None:
                names.pop(name2, None)
            if first == directory and name is not None:
                names[name] = target, bool(mask & ONDIR)
        elif first == directory and name is not None:
            if mask & CREATE:
                names.pop(name, None)
            elif mask & DELETE:
                names[name] = target, bool(mask & ONDIR)


def _sort(records: Iterable[Record], into: dict[bytes, list[Record]]) -> None:
    for record in records:
        for directory in {record[3], record[5]}:
            if directory is not None:
                into.setdefault(directory, []).append(record)


class Expander:
    """Tells what is in a tree that came or went as a whole."""

    def __init__(
        self, teller: Teller, directories: Directories, decoder: Any, intake: Intake
    ) -> None:
        self._teller = teller
        self.dirs = directories
        self.tree = directories.tree
        self._decoder = decoder
        self._intake = intake
        self._on = directories.mount.fstype == "btrfs"
        self._work: deque[Iterator[None]] = deque()
        self._rows: list[Any] = []
        # Where an index of files knows the names in a directory: (name, key) by directory key.
        self.came: Callable[[bytes, bytes, bool, bytes | None], None] | None = None
        self.files_of: Callable[[bytes], Iterable[tuple[bytes, bytes | None]]] | None = None

    def reset(self) -> None:
        """Forget the work: the tree was dropped."""
        self._work.clear()
        self._rows.clear()

    @property
    def pending(self) -> bool:
        """Whether step() has something to tell, before the next record is decoded."""
        return bool(self._work or self._rows)

    def step(self, limit: int) -> list[Any]:
        """Return the next changes, about as many."""
        while self._work and len(self._rows) < limit:
            for _ in self._work[0]:
                break
            else:
                self._work.popleft()
        rows, self._rows = self._rows[:limit], self._rows[limit:]
        return rows

    def comes_whole(self, key: bytes) -> bool:
        """Say whether a directory is the root of a subvolume."""
        return self._on and inode_of(key) == _SUBVOLUME

    # -- created --

    def created(self, record: Record, at: int) -> None:
        """Tell what came with a directory, which is in the tree already."""
        if not self.dirs.inside(at):
            self.dirs.want_scan(at)  # a root may be below
        elif not self._teller.settings.want & CREATE:
            self.tree.flag(at, 0, flags.SCANNED)
            self.dirs.want_scan(at)
        else:
            self._work.append(self._list(record, record[7] or b""))

    def _list(self, record: Record, top: bytes) -> Iterator[None]:
        # What is unread of each directory. Nothing is decoded meanwhile: it only gets more.
        unread: dict[bytes, list[Record]] = {}
        window = self._decoder.name_records(EVERYTHING)
        at = [r[:8] for r in window].index(record[:8])
        _sort(window[at + 1 :], unread)
        chunks = 0
        todo = deque([top])
        while todo:
            listed: list[tuple[bytes, Names]] = []
            complete = True
            for key in [todo.popleft() for _ in range(min(_AT_ONCE, len(todo)))]:
                try:
                    found = self.dirs.lookup.names_in(key)
                except CannotLook:
                    complete = False
                    continue
                listed.append((key, {name: (child, is_dir) for name, child, is_dir in found}))
            complete = self._intake.sync() and not self._intake.gap and complete
            more, chunks = self._intake.names_from(chunks)
            _sort(more, unread)
            for key, names in listed:
                undo(names, key, unread.get(key, ()))
                todo += self._tell_names(record, key, names, complete)
                yield

    def _tell_names(
        self, record: Record, directory: bytes, names: Names, complete: bool
    ) -> list[bytes]:
        below: list[bytes] = []
        at = self.tree.find(directory)
        if at < 0:
            return below
        scope, path = self.tree.resolve(at)
        source = "exact" if complete and not scope & flags.IN_CURRENT else "current"
        for name, (key, is_dir) in names.items():
            text = fsdecode(path.rstrip(b"/") + b"/" + name)
            made = (
                CREATE | (ONDIR if is_dir else 0),
                *record[1:3], directory, name, None, None, key, None,
            )  # fmt: skip
            self._teller.tell(self._rows, made, CREATE, text, None, source)
            if is_dir and key is not None and inode_of(key) != _STUB:
                child = self.dirs.put(key, at, name)
                below_key: bytes | None = key
            else:
                below_key = None
            if self.came is not None:
                self.came(directory, name, is_dir, below_key)
            if below_key is not None and self.dirs.inside(child):
                self.tree.flag(child, flags.SCANNED, 0)
                below.append(below_key)
        return below

    # -- deleted --

    def deleted(
        self,
        record: Record,
        at: int,
        drop: Callable[[int, list[Any]], None],
        last: Callable[[list[Any]], None],
    ) -> None:
        """Tell what went with a directory. ``drop`` forgets one, ``last`` tells of itself."""
        self._work.append(self._gone(record, at, drop, last))

    def _gone(
        self,
        record: Record,
        at: int,
        drop: Callable[[int, list[Any]], None],
        last: Callable[[list[Any]], None],
    ) -> Iterator[None]:
        # Parents stand before their children here, and the children are told first.
        for each in reversed(self._below(at)):
            parent, name, _, key, _ = self.tree.info(each)
            scope, path = self.tree.resolve(each)
            if scope & flags.IN:
                self._tell_files(record, key, scope, path)
                self._tell(record, self.tree.info(parent)[3], name, key, scope, path)
            drop(each, self._rows)
            yield
        _, _, _, key, _ = self.tree.info(at)
        scope, path = self.tree.resolve(at)
        if scope & flags.IN:
            self._tell_files(record, key, scope, path)
        last(self._rows)
        yield

    def _tell_files(self, record: Record, directory: bytes, scope: int, path: bytes) -> None:
        if self.files_of is None:
            return
        for name, key in self.files_of(directory):
            self._tell(record, directory, name, key, scope, path + b"/" + name, ondir=0)

    def _tell(
        self,
        record: Record,
        directory: bytes,
        name: bytes,
        key: bytes | None,
        scope: int,
        path: bytes,
        ondir: int = ONDIR,
    ) -> None:
        gone = DELETE | ondir, *record[1:3], directory, name, None, None, key, None
        source = "current" if scope & flags.IN_CURRENT else "exact"
        self._teller.tell(self._rows, gone, DELETE, fsdecode(path), None, source)

    def _below(self, at: int) -> list[int]:
        children: dict[int, list[int]] = {}
        for each in self.tree.ids():
            children.setdefault(self.tree.info(each)[0], []).append(each)
        found: list[int] = []
        todo = [at]
        while todo:
            more = children.get(todo.pop(), [])
            found += more
            todo += more
        return found
