"""Locks: a mutex, a spin lock, one for readers and writers; and the order of taking them.

    yield from mutex.lock()                 # one step, once nobody holds it
    ...
    mutex.unlock()

    with (yield from mutex.lock()):         # the same
        ...

Taking a lock is checked as lockdep does (kernel/locking/lockdep.c): whoever takes b while holding a
makes it wrong for anybody to take a while holding b, whether the schedule at hand deadlocks or not.
``ordered=False`` leaves a lock out of that; a try-lock never waits, so it asks no order.
"""

from collections.abc import Generator
from typing import Any, TypeVar

from fanwise.lifetime import Until

from ._world import World, waits

L = TypeVar("L", bound="_Lock")


class _Lock:
    __slots__ = ("_number", "_ordered", "_world", "holders", "name")

    def __init__(self, world: World, name: str, *, ordered: bool = True) -> None:
        self._world = world
        self.name = name
        self.holders: list[str] = []
        self._ordered = ordered
        self._number = len(world._parts)
        world._parts.append(self)

    def held(self) -> bool:
        """Whether the running task holds it."""
        return self._world.current() in self.holders

    def unlock(self) -> None:
        """Release it. Misuse for whoever does not hold it."""
        me = self._world.current()
        if self._world._over:
            return
        if me not in self.holders:
            self._world._misuse("lock-order", f"releases {self.name}, and does not hold it")
        self.holders.remove(me)
        held = self._world._held[me]
        held.remove(self)
        if not held:
            del self._world._held[me]

    def _take(self, waited: bool = True) -> None:
        world, me = self._world, self._world.current()
        held = world._held.setdefault(me, [])
        if waited and self._ordered:
            for other in held:
                if other._ordered and other is not self:
                    self._after(other)
        self.holders.append(me)
        held.append(self)

    def _after(self, other: "_Lock") -> None:
        order = self._world._order
        edge = (other._number, self._number)
        if edge in order:
            return
        reach, todo = {self._number}, [self._number]
        while todo:
            at = todo.pop()
            for a, b in order:
                if a == at and b not in reach:
                    reach.add(b)
                    todo.append(b)
        if other._number in reach:
            self._world._misuse(
                "lock-order", f"takes {self.name} while it holds {other.name}; the other way before"
            )
        order.add(edge)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.unlock()

    def _at_end(self) -> None:
        if self.holders:
            self._world._misuse("lock-order", f"{self.name} is held at the end by {self.holders}")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}, held by {self.holders}>"


class Mutex(_Lock):
    """A lock that one task holds, and that may be slept on. Misuse in an atomic context."""

    __slots__ = ()

    @waits
    def lock(self, step: str = "") -> Generator[Until, None, "Mutex"]:
        """Take it, as a step (named ``lock NAME``) that waits until nobody holds it."""
        self._world.might_sleep(f"lock {self.name}")
        yield Until(step or f"lock {self.name}", lambda: not self.holders, self)
        self._take()
        return self

    def try_lock(self) -> bool:
        """Take it if nobody holds it, as part of the step that calls."""
        if self.holders:
            return False
        self._take(waited=False)
        return True


class Spin(_Lock):
    """A lock that is spun on: whoever holds it is in atomic context."""

    __slots__ = ("_inside",)

    def __init__(self, world: World, name: str, *, ordered: bool = True) -> None:
        super().__init__(world, name, ordered=ordered)
        self._inside: Any = None

    @waits
    def lock(self, step: str = "") -> Generator[Until, None, "Spin"]:
        """Take it, as a step that waits until nobody holds it."""
        yield Until(step or f"lock {self.name}", lambda: not self.holders, self)
        self._take()
        self._enter()
        return self

    def try_lock(self) -> bool:
        """Take it if nobody holds it, as part of the step that calls."""
        if self.holders:
            return False
        self._take(waited=False)
        self._enter()
        return True

    def unlock(self) -> None:
        """Release it. Misuse for whoever does not hold it."""
        super().unlock()
        if self._inside is not None:
            inside, self._inside = self._inside, None
            inside.__exit__()

    def _enter(self) -> None:
        self._inside = self._world.atomic()
        self._inside.__enter__()


class RwLock(_Lock):
    """A lock for many readers or one writer, slept on. A writer that waits keeps new readers out.

    ``fair=False`` lets readers in while a writer waits.
    """

    __slots__ = ("_fair", "_wanted", "writing")

    def __init__(self, world: World, name: str, *, ordered: bool = True, fair: bool = True) -> None:
        super().__init__(world, name, ordered=ordered)
        self.writing = False
        self._wanted: list[str] = []  # writers that wait
        self._fair = fair

    @waits
    def read(self, step: str = "") -> Generator[Until, None, "RwLock"]:
        """Take it for reading, as a step that waits for writers."""
        self._world.might_sleep(f"read {self.name}")
        yield Until(step or f"read {self.name}", self._readable, _Readers(self))
        self._take()
        return self

    @waits
    def write(self, step: str = "") -> Generator[Until, None, "RwLock"]:
        """Take it for writing, as a step that waits until nobody holds it."""
        self._world.might_sleep(f"write {self.name}")
        me = self._world.current()
        self._wanted.append(me)
        yield Until(step or f"write {self.name}", lambda: not self.holders, self)
        self._wanted.remove(me)
        self._take()
        self.writing = True
        return self

    def try_read(self) -> bool:
        """Take it for reading if that need not wait."""
        if not self._readable():
            return False
        self._take(waited=False)
        return True

    def try_write(self) -> bool:
        """Take it for writing if nobody holds it."""
        if self.holders:
            return False
        self._take(waited=False)
        self.writing = True
        return True

    def unlock(self) -> None:
        """Release it. Misuse for whoever does not hold it."""
        super().unlock()
        self.writing = False

    def _readable(self) -> bool:
        return not self.writing and not (self._fair and self._wanted)


class _Readers:
    """Who keeps readers out: the writer, or those that wait to write."""

    __slots__ = ("_lock",)

    def __init__(self, lock: RwLock) -> None:
        self._lock = lock

    @property
    def name(self) -> str:
        return self._lock.name

    @property
    def holders(self) -> list[str]:
        return self._lock.holders if self._lock.writing else self._lock._wanted
