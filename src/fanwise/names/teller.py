"""Teller: what is told of the records, and what is not.

Makes the changes; applies the kinds and the processes that were asked for, and the globs; and tells
of the watch itself and of its roots, which no kind and no glob hides.

REFS: owned by the resolver. LOCKING: none. LIFETIME: that of the resolver.
"""

import time
from collections.abc import Callable
from os import fsdecode
from typing import Any, NamedTuple

from fanwise.kernel import contract as flags
from fanwise.kernel.contract import CREATE, DELETE, ONDIR, RENAME, Record, kind_index
from fanwise.kernel.handles import identity

from .directories import Directories, Root

_BOTH = CREATE | DELETE


class Settings(NamedTuple):
    """What a watch wants told."""

    make: Callable[..., Any]  # builds a change; see Change
    kinds: list[tuple[str, ...]]  # 512 tuples of kinds by kind_index
    want: int  # mask bits to tell
    pids: tuple[int, ...]  # processes to ignore


class Teller:
    """Makes changes of records and of roots."""

    def __init__(self, settings: Settings, directories: Directories) -> None:
        self.settings = settings
        self.dirs = directories
        self.tree = directories.tree
        self.dev = directories.mount.dev
        # A rename may lead out of an excluded name or into one, which filter() tells otherwise.
        self.want = settings.want | (RENAME if directories.globs else 0)
        self.roots_moved: Callable[[], None] = lambda: None
        self._final: list[Any] = []  # changes of this slice that no glob hides

    def tell(
        self,
        rows: list[Any],
        record: Record,
        bits: int,
        path: str,
        old: str | None,
        source: str,
        *,
        key: bytes | None = None,
        replaced: bytes | None = None,
        unlinked: bool = False,
        exists: bool | None = None,
        correction: bool = False,
    ) -> None:
        """Append one change, unless its kinds or its process are not wanted."""
        mask, pid, when = record[:3]
        bits &= self.want
        if not bits or pid in self.settings.pids:
            return
        if bits & _BOTH != _BOTH:
            exists = None
        key = key or record[7]
        rows.append(
            self.settings.make(
                self.settings.kinds[kind_index(bits)],
                path,
                old,
                bool(mask & ONDIR),
                pid,
                identity(self.dev, key) if key else None,
                when,
                source,
                identity(self.dev, replaced) if replaced else None,
                unlinked,
                exists,
                correction,
            )
        )

    def where(self, directory: bytes | None, name: bytes) -> tuple[bool, str, str] | None:
        """(inside, path, source) of a name in a directory; None when the directory is unknown."""
        at = self.tree.find(directory) if directory else -1
        if at < 0:
            return None
        scope, path = self.tree.resolve(at)
        inside = bool(scope & flags.IN)
        if scope & flags.IN_FILES:
            inside = any(r.key == directory and r.file == name for r in self.dirs.roots)
        text = fsdecode(path + b"/" + name)
        return inside, text, "current" if scope & flags.IN_CURRENT else "exact"

    def say(self, rows: list[Any], *fields: Any) -> None:
        """Append what is told whatever is asked for or excluded: of the watch and its roots."""
        self.say_row(rows, self.settings.make(*fields))

    def say_row(self, rows: list[Any], row: Any) -> None:
        """Do the same with a change that is made."""
        rows.append(row)
        if self.dirs.globs:
            self._final.append(row)

    def end_root(self, rows: list[Any], root: Root, source: str = "exact", pid: int = 0) -> None:
        """Drop a root and tell its end, so that no stream ends without a word."""
        self.dirs.roots.remove(root)
        who = identity(self.dev, root.key) if root.file is None else None
        is_dir = root.file is None
        self.say(rows, ("deleted",), root.path, None, is_dir, pid, who, time.time(), source)

    def follow_roots(
        self, rows: list[Any], pid: int = 0, when: float = 0.0, told: bytes | None = None
    ) -> bool:
        """Tell of roots whose paths changed, or that left what the mount shows; whether any moved.

        ``told`` is the key of the one that was told already.
        """
        moved = False
        for root in list(self.dirs.roots):
            at = self.tree.find(root.key)
            if at < 0:
                continue
            _, path = self.tree.resolve(at)
            if not path and not self.tree.info(at)[2] & flags.TOP:
                self.end_root(rows, root, pid=pid)
                continue
            text = fsdecode(path) or "/"
            if root.file is not None:
                text = text.rstrip("/") + "/" + fsdecode(root.file)
            if text == root.path:
                continue
            moved = True
            if root.key != told or root.file is not None:
                who = identity(self.dev, root.key) if root.file is None else None
                is_dir, at_time = root.file is None, when or time.time()
                self.say(rows, ("renamed",), text, root.path, is_dir, pid, who, at_time, "exact")
            root.path = text
        if moved:
            self.roots_moved()
        return moved

    def tell_roots(self, rows: list[Any], kind: str) -> None:
        """Tell something of every root: what became of its mount."""
        for root in self.dirs.roots:
            rows.append(
                self.settings.make(
                    (kind,), root.path, None, root.file is None, 0, None, time.time(), "exact"
                )
            )

    def filter(self, rows: list[Any]) -> list[Any]:
        """Apply the globs, of which there are some, to a slice."""
        globs = self.dirs.globs
        if not rows:
            return rows
        final = {id(row) for row in self._final}
        self._final.clear()
        roots = {root.path for root in self.dirs.roots}
        want = self.settings.want
        out = []
        for row in rows:
            path, old_path = row.path, row.old_path
            if id(row) in final:
                out.append(row)
                continue
            new = path not in roots and globs.match(path)
            old = old_path is not None and globs.match(old_path)
            if old_path is None or new == old:
                if not new and ("renamed" not in row.kinds or want & RENAME):
                    out.append(row)
                continue
            # It came out of an excluded name, or went into one.
            bits = DELETE if new else CREATE
            if bits & want:
                out.append(
                    self.settings.make(
                        self.settings.kinds[kind_index(bits)],
                        old_path if new else path,
                        None,
                        row.is_dir,
                        row.pid,
                        row.identity,
                        row.time,
                        row.path_source,
                        None if new else row.replaced,
                    )
                )
        return out
