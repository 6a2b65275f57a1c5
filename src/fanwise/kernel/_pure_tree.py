"""Tree in Python: the twin of `_table.c`, with the same answers.

REFS: a node is named by its index and counts the nodes that have it as parent.
LIFETIME: live -> zombie (`drop`: still found, because later records of one read may name it)
-> free (`sweep`: only once no child is left). An index is used again only after that.
"""

from .contract import (
    CURRENT,
    EXCLUDED,
    FILES,
    FREE,
    IN,
    IN_CURRENT,
    IN_FILES,
    KEY_MAX,
    NAME_MAX,
    ROOT,
    SCANNED,
    SETTABLE,
    TOP,
    ZOMBIE,
)


def _settable(flags: int) -> None:
    if flags & ~SETTABLE:
        raise ValueError("not flags of a directory")


class Tree:
    """Directories keyed by file handle."""

    def __init__(self, recursive: bool = True) -> None:
        self.recursive = bool(recursive)
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._index: dict[bytes, int] = {}
        self._parent: list[int] = []
        self._name: list[bytes] = []
        self._key: list[bytes] = []
        self._flags: list[int] = []
        self._kids: list[int] = []
        self._free: list[int] = []
        self._zombies: list[int] = []
        self._cache: dict[int, tuple[int, bytes]] = {}
        # The decoder's str form of the same; cleared together with _cache.
        self.paths: dict[bytes, tuple[int, str]] = {}

    def __len__(self) -> int:
        return len(self._index)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held (an estimate: 64-bit CPython)."""
        names = sum(len(n) + 33 for n in self._name)
        return len(self._key) * (5 * 8 + 32 + 16 + 33) + len(self._index) * 108 + names

    def _touch(self) -> None:
        self._cache.clear()
        self.paths.clear()

    def _live(self, at: int) -> int:
        if not 0 <= at < len(self._flags) or self._flags[at] & FREE:
            raise KeyError("no such directory")
        return at

    def put(self, key: bytes, parent: int, name: bytes, flags: int) -> int:
        """Insert or move a directory; its index."""
        if len(key) > KEY_MAX:
            raise ValueError(f"handle key longer than {KEY_MAX} bytes")
        if parent != -1:
            self._live(parent)
        if len(name) > NAME_MAX:
            raise ValueError(f"name longer than {NAME_MAX} bytes")
        _settable(flags)
        at = self._index.get(key, -1)
        if at >= 0:
            self.move(at, parent, name)
            self._flags[at] &= ~ZOMBIE
            if flags & ~self._flags[at]:
                self._flags[at] |= flags
                self._touch()
            return at
        if self._free:
            at = self._free.pop()
            self._parent[at], self._name[at], self._key[at] = parent, name, key
            self._flags[at], self._kids[at] = flags, 0
            self._cache.pop(at, None)
        else:
            at = len(self._parent)
            self._parent.append(parent)
            self._name.append(name)
            self._key.append(key)
            self._flags.append(flags)
            self._kids.append(0)
        if parent >= 0:
            self._kids[parent] += 1
        self._index[key] = at
        return at

    def find(self, key: bytes) -> int:
        """The index of a handle key, or -1."""
        return self._index.get(key, -1)

    def move(self, at: int, parent: int, name: bytes) -> None:
        """Give a directory a new parent and name."""
        self._live(at)
        if parent != -1:
            self._live(parent)
        if len(name) > NAME_MAX:
            raise ValueError(f"name longer than {NAME_MAX} bytes")
        old = self._parent[at]
        if old == parent and self._name[at] == name:
            return
        if old >= 0:
            self._kids[old] -= 1
        if parent >= 0:
            self._kids[parent] += 1
        self._parent[at], self._name[at] = parent, name
        self._touch()

    def flag(self, at: int, add: int, clear: int) -> None:
        """Set and clear flags."""
        old = self._flags[self._live(at)]
        _settable(add)
        _settable(clear)
        new = (old & ~clear) | add
        if (old ^ new) & ~SCANNED:
            self._touch()
        self._flags[at] = new

    def info(self, at: int) -> tuple[int, bytes, int, bytes, int]:
        """(parent, name, flags, key, kids) of a directory."""
        self._live(at)
        return self._parent[at], self._name[at], self._flags[at], self._key[at], self._kids[at]

    def resolve(self, at: int) -> tuple[int, bytes]:
        """(scope, path) of a directory."""
        hit = self._cache.get(at)
        if hit is not None:
            return hit
        self._live(at)
        scope, inside, cut, names, here = 0, False, False, [], at
        reached = False
        for depth in range(1, len(self._index) + 1):
            flags = self._flags[here]
            names.append(self._name[here])
            if flags & CURRENT:
                scope |= IN_CURRENT
            if not inside:
                if flags & EXCLUDED:
                    cut = True
                elif flags & ROOT and (self.recursive or depth == 1):
                    inside = not cut
            if flags & TOP or self._parent[here] < 0:
                reached = bool(flags & TOP)
                break
            here = self._parent[here]
        # Not reached: no way up is known, or a loop, which only merged renames can make.
        if reached:
            if names[-1] == b"/":
                names[-1] = b""
            if inside:
                scope |= IN
            elif self._flags[at] & FILES:
                scope |= IN_FILES
            found = scope, b"/".join(reversed(names))
        else:
            found = 0, b""
        self._cache[at] = found
        return found

    def drop(self, at: int) -> None:
        """Mark a directory removed; it is found until sweep()."""
        if not self._flags[self._live(at)] & ZOMBIE:
            self._flags[at] |= ZOMBIE
            self._zombies.append(at)

    def sweep(self) -> int:
        """Free the removed directories that have no child; how many."""
        freed = 0
        for at in self._zombies:
            # One that was revived by put(), or is listed twice, is no zombie. Dropped parents stand
            # before their children or after them: the last child takes them along.
            while at >= 0 and self._flags[at] & ZOMBIE and not self._kids[at]:
                parent = self._parent[at]
                del self._index[self._key[at]]
                if parent >= 0:
                    self._kids[parent] -= 1
                self._flags[at] = FREE
                self._cache.pop(at, None)
                self.paths.pop(self._key[at], None)
                self._key[at] = self._name[at] = b""
                self._free.append(at)
                freed += 1
                at = parent
        self._zombies = [at for at in self._zombies if self._flags[at] & ZOMBIE]
        return freed

    def ids(self) -> list[int]:
        """The indexes of all directories."""
        return [i for i, flags in enumerate(self._flags) if not flags & (FREE | ZOMBIE)]
