"""Sleeping locks, as operations take them: each has a name and knows its holders.

A lock is taken by a step that waits, and given back by leaving a with block:

    yield from inode.lock.take("lock inode")
    with inode.lock:
        ...

An operation that is abandoned (its generator is closed) keeps its locks, as a task that never runs
again would.

REFS      a lock knows its holders by what ``current()`` said when they took it.
LOCKING   the order is: rename mutex, freeze levels from the outermost in, s_umount, directory,
          inode; of two directories the ancestor first.
Linux reference: Documentation/filesystems/directory-locking.rst, kernel/locking/percpu-rwsem.c.
"""

from collections.abc import Hashable
from types import TracebackType

from fanwise.lifetime import Until

from .protocol import Current, Op


class Held:
    """What a with block gives back. ``release`` is of the subclass."""

    __slots__ = ()

    def release(self) -> None:
        """Give it back."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not GeneratorExit:
            self.release()


NOTHING = Held()
"""Held where a design takes no lock."""


class Mutex(Held):
    """One holder."""

    __slots__ = ("_current", "holders", "name")

    def __init__(self, name: str, current: Current) -> None:
        self.name = name
        self.holders: list[Hashable] = []
        self._current = current

    def free(self) -> bool:
        """Whether nobody holds it."""
        return not self.holders

    def take(self, step: str) -> Op[None]:
        """Wait until it is free, and hold it."""
        yield Until(step, self.free, self)
        self.holders.append(self._current())

    def release(self) -> None:
        """Give it back."""
        self.holders.remove(self._current())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} held by {self.holders}>"


class RwSem(Mutex):
    """Many readers or one writer. A writer that waits holds new readers back, as in Linux."""

    __slots__ = ("exclusive", "waiting")

    def __init__(self, name: str, current: Current) -> None:
        super().__init__(name, current)
        self.exclusive = False
        self.waiting = 0  # writers

    def shareable(self) -> bool:
        """Whether a reader may have it."""
        return not (self.exclusive or self.waiting)

    def take(self, step: str) -> Op[None]:
        """Wait until nobody holds it, and hold it alone."""
        if self.holders:
            self.waiting += 1
            yield Until(step, self.free, self)
            self.waiting -= 1
        else:
            yield Until(step, self.free, self)
        self.exclusive = True
        self.holders.append(self._current())

    def share(self, step: str) -> Op[None]:
        """Wait until no writer holds it or waits for it, and hold it with other readers."""
        yield Until(step, self.shareable, self)
        self.holders.append(self._current())

    def release(self) -> None:
        """Give it back."""
        self.holders.remove(self._current())
        self.exclusive = False


class Gate:
    """Who keeps a freeze level shut; what those wait for who want in."""

    __slots__ = ("holders", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.holders: list[Hashable] = []

    def __repr__(self) -> str:
        return f"<Gate {self.name} shut by {self.holders}>"


class Level(Held):
    """One freeze level: writers hold it while they write.

    A freezer shuts its gate and waits for them. It stays shut until the filesystem is thawed, and
    the gate names who froze it, who need not run any more.
    """

    __slots__ = ("_current", "gate", "holders", "name")

    def __init__(self, name: str, current: Current) -> None:
        self.name = name
        self.holders: list[Hashable] = []  # writers
        self.gate = Gate(f"{name} gate")
        self._current = current

    def open(self) -> bool:
        """Whether no freezer has shut it."""
        return not self.gate.holders

    def empty(self) -> bool:
        """Whether nobody writes."""
        return not self.holders

    def start(self, step: str) -> Op[None]:
        """Wait until the gate is open, and hold the level (sb_start_write)."""
        yield Until(step, self.open, self.gate)
        self.holders.append(self._current())

    def start_now(self) -> bool:
        """Hold the level if its gate is open; whether it is (sb_start_write_trylock)."""
        if self.gate.holders:
            return False
        self.holders.append(self._current())
        return True

    def release(self) -> None:
        """Give it back (sb_end_write)."""
        self.holders.remove(self._current())

    def shut(self) -> None:
        """Let nobody in any more (the first half of percpu_down_write)."""
        self.gate.holders.append(self._current())

    def drain(self, step: str) -> Op[None]:
        """Wait until everybody who is in has left (its second half)."""
        yield Until(step, self.empty, self)

    def unshut(self) -> None:
        """Open the gate."""
        self.gate.holders.clear()

    def __repr__(self) -> str:
        return f"<Level {self.name} held by {self.holders}, {self.gate}>"
