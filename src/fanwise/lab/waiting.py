"""Waiting: wait queues, worker threads, and the grace periods of readers that take no lock.

REFS      each keeps names of tasks, never tasks.
LOCKING   none.
LIFETIME  of the world that they are made in. A worker is a daemon unless told otherwise.
"""

from collections.abc import Callable, Generator
from typing import Any

from fanwise.lifetime import Until

from ._world import Broken, Step, World, is_body, waits


class WaitQueue:
    """Tasks that sleep until they are woken. Linux reference: kernel/sched/wait.c.

    `wait` enlists before it looks, so no wake-up is lost. `sleep` does not look, and is lost when
    the waking came first: what a model of a wrong order uses.
    """

    __slots__ = ("_asleep", "_missed", "_world", "name")

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self.name = name
        self._asleep: dict[str, Callable[[], object] | None] = {}  # task: what it waits for
        self._missed = False  # somebody woke nobody

    @waits
    def wait(self, condition: Callable[[], object], step: str = "") -> Generator[Step, None, None]:
        """Sleep until woken with ``condition()`` true; the steps are one look for each waking."""
        self._world.might_sleep(f"wait for {self.name}")
        me, step = self._world.current(), step or f"wait for {self.name}"
        yield step
        while not condition():
            self._asleep[me] = condition
            yield Until(step, lambda: me not in self._asleep, self)

    @waits
    def sleep(
        self, step: str = "", condition: Callable[[], object] | None = None
    ) -> Generator[Step, None, None]:
        """Sleep from the running step on until woken, without looking at anything.

        ``condition`` is only asked to tell a lost wake-up from a deadlock.
        """
        self._world.might_sleep(f"sleep on {self.name}")
        me = self._world.current()
        self._asleep[me] = condition
        yield Until(step or f"sleep on {self.name}", lambda: me not in self._asleep, self)

    def wake(self) -> None:
        """Wake all who sleep."""
        self._missed |= not self._asleep
        self._asleep.clear()

    def wake_one(self) -> None:
        """Wake who has slept longest."""
        if self._asleep:
            del self._asleep[next(iter(self._asleep))]
        else:
            self._missed = True

    def asleep(self) -> list[str]:
        """Return the names of the tasks that sleep."""
        return list(self._asleep)

    def lost(self, task: str) -> bool:
        """Whether ``task`` sleeps although what it waits for has come."""
        condition = self._asleep.get(task)
        if condition is None:
            return task in self._asleep and self._missed
        return bool(condition())


class Worker:
    """A thread of its own that does what is queued, one after the other.

    Work is a function; a generator that it returns is done step by step. Linux reference:
    kernel/workqueue.c.
    """

    __slots__ = ("_busy", "_works", "_world", "holders", "name")

    def __init__(self, world: World, name: str, *, daemon: bool = True) -> None:
        self._world = world
        self.name = name
        self.holders = (name,)  # who waits for the worker waits for its task
        self._works: list[_Work] = []
        self._busy: _Work | None = None
        world._parts.append(self)
        world.task(name, self._loop(), daemon=daemon)

    def queue(self, work: Callable[[], Any]) -> bool:
        """Queue work; False when the same function is queued already and not begun."""
        if any(queued.function == work for queued in self._works):
            self._world.note(f"{self.name} has this queued already")
            return False
        self._works.append(_Work(work))
        return True

    @waits
    def flush(self, step: str = "") -> Generator[Until, None, None]:
        """Wait, as one step, until all that is queued now has been done."""
        self._world.might_sleep(f"flush {self.name}")
        left = self._works.copy()
        if self._busy is not None:
            left.append(self._busy)
        yield Until(step or f"flush {self.name}", lambda: all(w.done for w in left), self)

    def idle(self) -> bool:
        """Whether nothing is queued or being done."""
        return not self._works and self._busy is None

    def _at_end(self) -> None:
        if self._busy is not None:
            raise Broken("no-deadlock", f"{self.name} never ends what it does")

    def _loop(self) -> Generator[Step, None, None]:
        while True:
            yield Until(f"{self.name}: take work", lambda: bool(self._works))
            work = self._busy = self._works.pop(0)
            made = work.function()
            if is_body(made):
                yield from made
            self._busy, work.done = None, True


class _Work:
    __slots__ = ("done", "function")

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.done = False


class _Reader:
    __slots__ = ("task",)

    def __init__(self, task: str) -> None:
        self.task = task


class Srcu:
    """Readers without a lock, and those who wait until all who read before have left.

    Linux reference: kernel/rcu/srcutree.c.
    """

    __slots__ = ("_readers", "_world", "name")

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self.name = name
        self._readers: list[_Reader] = []
        world._parts.append(self)

    def read_lock(self) -> object:
        """Begin to read, as part of the step that calls; returns what `read_unlock` takes."""
        reader = _Reader(self._world.current())
        self._readers.append(reader)
        return reader

    def read_unlock(self, reader: object) -> None:
        """End reading. Misuse when it has ended before."""
        for at, inside in enumerate(self._readers):
            if inside is reader:
                del self._readers[at]
                return
        self._world._misuse("lock-order", f"leaves {self.name}, and is not inside")

    @waits
    def synchronize(self, step: str = "") -> Generator[Until, None, None]:
        """Wait, as one step, until all who read now have left. Misuse while one reads oneself."""
        self._world.might_sleep(f"synchronize {self.name}")
        before = list(self._readers)
        if any(reader.task == self._world.current() for reader in before):
            self._world._misuse("no-deadlock", f"waits for {self.name} while it reads itself")
        grace = _Grace(self, before)
        yield Until(step or f"synchronize {self.name}", grace.over, grace)

    def readers(self) -> list[str]:
        """Return the names of the tasks that read."""
        return [reader.task for reader in self._readers]

    def _at_end(self) -> None:
        if self._readers:
            self._world._misuse("lock-order", f"{self.readers()} never left {self.name}")


class _Grace:
    __slots__ = ("_before", "_srcu")

    def __init__(self, srcu: Srcu, before: list[_Reader]) -> None:
        self._srcu = srcu
        self._before = before

    @property
    def name(self) -> str:
        return self._srcu.name

    @property
    def holders(self) -> list[str]:
        inside = self._srcu._readers
        return [reader.task for reader in self._before if any(reader is r for r in inside)]

    def over(self) -> bool:
        return not self.holders
