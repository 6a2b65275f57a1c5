"""Directories: the tree of a watch, its roots and exclusions, and how a directory gets its place.

The tree is always as of the record being decoded. What is learnt otherwise (by opening a directory,
or by the scan) is as of a later moment: it is put where it was by the first rename or removal that
the records still unread in between tell of it.

REFS: the resolver owns it. LOCKING: none. LIFETIME: `reset` after a loss forgets all but the roots.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any

from fanwise._errors import NotWatchable
from fanwise.kernel import contract as flags
from fanwise.kernel.handles import identify
from fanwise.kernel.mounts import Mount

from .globs import Globs
from .lookup import CannotLook, Link, Lookup


class Root:
    """A watched path: a directory, or a name in a directory. ``path`` follows its moves."""

    __slots__ = ("file", "key", "path", "way")

    def __init__(self, path: str, key: bytes, file: bytes | None) -> None:
        self.path = path
        self.key = key  # of the directory, or of the one that holds the name
        self.file = file
        self.way: list[Link] | None = None  # up to where the mount ends, as last seen

    @classmethod
    def open(cls, path: str, mount: Mount) -> "Root":
        """Make the root of a real path. Raises OSError; NotWatchable when it left the mount."""
        if os.path.isdir(path):
            return cls(path, _key_on(path, mount), None)
        head, tail = os.path.split(path)
        return cls(path, _key_on(head, mount), os.fsencode(tail))


def _key_on(path: str | bytes, mount: Mount) -> bytes:
    key, found = identify(path)
    if found != mount.id:
        raise NotWatchable(path, "another filesystem was mounted or unmounted there meanwhile")
    return key


class Directories:
    """Where the directories of one superblock are."""

    def __init__(
        self,
        tree: Any,
        mount: Mount,
        roots: list[Root],
        lookup: Lookup,
        exclude: Iterable[str] = (),
        anchors: Callable[[], list[str]] | None = None,
        marks: bool = False,
    ) -> None:
        self.tree = tree
        self.mount = mount
        self.roots = roots
        self.lookup = lookup
        self.marks = marks  # on single directories: each that is inside needs one
        # Made under the watch, not marked yet: what is inside them already is told as created.
        self.fresh: list[bytes] = []
        # What is being decoded may be older than the marks set last.
        self.murky = False
        # Found where they went, ahead of the records of their way there: how often those tell that
        # they left for where no mark was.
        self.ahead: dict[bytes, int] = {}
        self._exclude = tuple(exclude)
        # Where globs with a slash begin: at the roots, if nothing else is said.
        self._anchors = anchors or (lambda: [root.path for root in self.roots])
        self.globs = Globs(self._exclude, self._anchors())
        self._top = b""  # the key of the mount's root
        # What was learnt by looking: key -> (parent key, name), as of the look.
        self.observed: dict[bytes, tuple[bytes | None, bytes]] = {}
        self.hidden: set[bytes] = set()  # moved in what was lost ahead: a look says nothing of them
        # Indexes whose subdirectories are wanted.
        self.unscanned: dict[int, None] = {}
        self.born = flags.SCANNED  # what is known of a new directory; 0: it is to be listed
        self.entered: list[bytes] = []  # came in from outside, or from nowhere
        # Told of each directory that is put, and whether names in it are still to be learnt.
        self.came: Callable[[int, bool], None] | None = None
        # Told of one that came in with others below it.
        self.came_with: Callable[[int], None] | None = None
        self.onto: list[tuple[bytes, bytes]] = []  # moved during a repair: (key, new parent's key)
        # Went to where nothing can be placed while a loss stands ahead: to be located behind it.
        self.adrift: set[bytes] = set()
        self.dead: set[bytes] | None = None  # removed while a scan runs; None: no scan

    def reset(self) -> list[Root]:
        """Forget every directory and find the roots anew; those that are gone.

        Raises OSError and CannotLook the first time: the mount cannot be reached. Later the roots
        are put where they were last seen when it cannot: it may be covered for a while.
        """
        tree = self.tree
        tree.clear()
        self.observed.clear()
        self.hidden.clear()
        self.unscanned.clear()
        self.fresh.clear()
        self.ahead.clear()
        self.adrift.clear()
        if not self._top:
            self._top = _key_on(self.mount.mount_point, self.mount)
        tree.put(self._top, -1, self.mount.mount_point, flags.TOP)
        gone = []
        for root in list(self.roots):
            try:
                way = self.lookup.locate_at(
                    root.path if root.file is None else os.path.dirname(root.path),
                    root.key,
                    lambda key: tree.find(key) >= 0,
                )
            except (CannotLook, OSError):
                if root.way is None:
                    raise
                way = root.way
            if way is None:
                gone.append(root)
                continue
            root.way = way
            self.put_way(way)
            self.mark_root(root)
        return gone

    def put_way(self, way: list[Link]) -> None:
        """Put a way up whose end is known, as it is now."""
        for key, parent, name in reversed(way):
            if self.tree.find(key) < 0:
                self.put(key, self.tree.find(parent) if parent is not None else -1, name)

    def mark_root(self, root: Root) -> None:
        """Make a root's directory count as watched."""
        at = self.tree.find(root.key)
        if root.file is not None:
            self.tree.flag(at, flags.FILES, 0)
        else:
            self.tree.flag(at, flags.ROOT, flags.EXCLUDED)
            self.want_scan(at)
        if self.marks and not self.tree.info(at)[2] & flags.SCANNED:
            self.tree.flag(at, flags.SCANNED, 0)
            self.unscanned[at] = None
        if self.came is not None:
            self.came(at, True)

    # -- places --

    def put(self, key: bytes, parent: int, name: bytes, extra: int = 0) -> int:
        """Insert or move a directory; its index."""
        was = self.tree.find(key) if self.came is not None else -1
        below = was >= 0 and bool(self.tree.info(was)[4]) and not self.inside(was)
        at: int = self.tree.put(key, parent, name, extra)
        if self.globs:
            self.judge(at)
        if below and self.came_with is not None and self.inside(at):
            self.came_with(at)
        elif self.came is not None:
            self.came(at, not extra & flags.SCANNED)
        return at

    def judge(self, at: int) -> None:
        """Set or clear the exclusion of one directory."""
        _, _, now, _, _ = self.tree.info(at)
        if now & (flags.ROOT | flags.TOP):
            return
        _, path = self.tree.resolve(at)
        hit = bool(path) and self.globs.match(os.fsdecode(path))
        if hit != bool(now & flags.EXCLUDED):
            self.tree.flag(at, flags.EXCLUDED if hit else 0, 0 if hit else flags.EXCLUDED)
            if not hit:
                self.want_scan(at)

    def moved(self, at: int, root: bool) -> None:
        """Judge anew what is below a directory that moved, where a glob names paths.

        With ``root``, it is a root or something above one: such globs begin at the roots.
        """
        if not self.globs.anchored:
            return
        if root:
            self.globs = Globs(self._exclude, self._anchors())
        if root or self.tree.info(at)[4]:
            for each in self.tree.ids():
                self.judge(each)

    def back(self, at: int) -> None:
        """Want everything below a directory that came back read again: it was out of sight."""
        for each in self.tree.ids():
            above = each
            for _ in range(len(self.tree)):
                if above == at or above < 0:
                    break
                above = self.tree.info(above)[0]
            if above == at:
                self.tree.flag(each, 0, flags.SCANNED)
                self.want_scan(each)

    def note_move(self, key: bytes, parent: bytes) -> None:
        """Note that a directory was given a name: something may be believed below that."""
        if not self.born:
            self.onto.append((key, parent))

    def inside(self, at: int) -> bool:
        """Say whether what happens in a directory is told."""
        return bool(self.tree.resolve(at)[0] & flags.IN)

    def want_scan(self, at: int) -> None:
        """Note that the subdirectories of a directory are not known, unless they are."""
        if self.tree.recursive and not self.tree.info(at)[2] & flags.SCANNED and self.inside(at):
            self.tree.flag(at, flags.SCANNED, 0)
            self.unscanned[at] = None

    def scan_keys(self, most: int) -> list[bytes]:
        """Take directories to scan."""
        keys: list[bytes] = []
        while self.unscanned and len(keys) < most:
            at, _ = self.unscanned.popitem()
            try:
                keys.append(self.tree.info(at)[3])
            except KeyError:
                continue  # removed meanwhile
        return keys

    # -- learning --

    def missing(self, keys: Iterable[bytes], firsts: dict[bytes, Any]) -> set[bytes]:
        """Which directories must be looked at, to place these ones."""
        out = set()
        find, observed, plain = self.tree.find, self.observed, not (firsts or self.hidden)
        for key in keys:
            if plain and (there := observed.get(key)) and there[0] and find(there[0]) >= 0:
                continue  # seen in a directory that is known, and nothing unread speaks of any
            seen = set()
            at: bytes | None = key
            while at is not None and self.tree.find(at) < 0 and at not in seen:
                seen.add(at)
                place = self._place_of(at, firsts)
                if place is None:
                    out.add(at)
                    break
                at = place[0]
        return out

    def look(self, keys: Iterable[bytes]) -> bool:
        """Open directories and note the way up from each; whether every look could be taken."""
        complete = True

        def known(key: bytes) -> bool:
            return key in self.observed or self.tree.find(key) >= 0

        for key in keys:
            if key in self.observed:
                continue
            try:
                way = self.lookup.locate(key, known)
            except CannotLook:
                complete = False
                continue
            for child, parent, name in way or ():
                self.observed[child] = parent, name
        return complete

    def _place_of(self, key: bytes, firsts: dict[bytes, Any]) -> tuple[bytes | None, bytes] | None:
        record = firsts.get(key)
        if record is not None:
            # None, b"": it came from where nothing is known. Its rename will put it.
            return record[3], record[4] or b""
        return None if key in self.hidden else self.observed.get(key)

    def place(self, key: bytes, firsts: dict[bytes, Any], extra: int = 0) -> int:
        """Put a directory, and what is above it, where it was; -1 when that is not known."""
        if not (firsts or self.hidden) and (there := self.observed.get(key)) and there[0]:
            parent = int(self.tree.find(there[0]))
            if parent >= 0 and self.tree.find(key) < 0:
                here: int = self.put(key, parent, there[1], extra)
                self.want_scan(here)
                return here
        way: list[tuple[bytes, bytes]] = []
        at: bytes | None = key
        parent = -1
        while at is not None:
            parent = self.tree.find(at)
            if parent >= 0:
                break
            place = self._place_of(at, firsts)
            if place is None or len(way) > 100_000:
                return -1
            way.append((at, place[1]))
            at = place[0]
        for child, name in reversed(way):
            parent = self.put(child, parent, name, extra if child == key else 0)
            self.want_scan(parent)
        return parent

    def placed(self) -> None:
        """End a round of learning: what was seen is in the tree now, or is of no use."""
        self.observed.clear()
