"""Memory and references: what is allocated, used, freed and counted, with every misuse found.

REFS      the memory holds what is allocated; what is freed stays with whoever still points to it.
LOCKING   none.
LIFETIME  ALLOCATED, then FREED: a freed object changes its class, so that whatever a task does with
          it is found, as by KASAN. Predicates, which run between the steps, may look at it.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from ._world import Broken, World, a_task_runs

T = TypeVar("T")


class Block:
    """A piece of memory with a name; its fields are attributes."""

    def __init__(self, name: str, **fields: object) -> None:
        self.name = name
        self.__dict__.update(fields)

    def __getattr__(self, field: str) -> Any:  # for type checkers: fields are free
        raise AttributeError(f"{self.name} has no field {field!r}")

    def __repr__(self) -> str:
        return f"<{self.__dict__.get('name')}>"


class Memory:
    """Where a model's objects live. What is still there at the end is a leak.

    With ``leaks=False`` it is not. Several are fine; each checks its own.
    """

    __slots__ = ("_leaks", "_live", "_world")

    def __init__(self, world: World, *, leaks: bool = True) -> None:
        self._world = world
        self._live: list[Any] = []
        self._leaks = leaks
        world._parts.append(self)

    def alloc(self, what: Any, *, may_sleep: bool = True, **fields: object) -> Any:
        """Allocate a `Block` of the name ``what`` with these fields; or take in an object.

        ``may_sleep`` is misuse in an atomic context. Raises TypeError for an object whose class
        cannot be changed (a tuple, a Struct).
        """
        obj = Block(what, **fields) if isinstance(what, str) else what
        if may_sleep and self._world._atomic:
            self._world.might_sleep(f"allocating {_name(obj)}")
        _freed_class(type(obj))
        self._live.append(obj)
        return obj

    def use(self, obj: Any) -> None:
        """Say that the object is used here: misuse after it was freed.

        Reading or writing an attribute in a task says the same.
        """
        if type(obj) in _FREED_OF:
            self._world._misuse("no-use-after-free", f"uses {_name(obj)}, which was freed")

    def free(self, obj: Any) -> None:
        """Free an object: misuse when it was freed before. Raises ValueError for a stranger."""
        if type(obj) in _FREED_OF:
            self._world._misuse("no-double-free", f"frees {_name(obj)} again")
            return
        for at, live in enumerate(self._live):
            if live is obj:
                del self._live[at]
                break
        else:
            if not self._world._over:
                raise ValueError(f"{obj!r} was not allocated here")
        obj.__class__ = _freed_class(type(obj))

    def freed(self, obj: Any) -> bool:
        """Whether the object was freed."""
        return type(obj) in _FREED_OF

    def live(self) -> list[Any]:
        """Return what is allocated, oldest first."""
        return list(self._live)

    def _at_end(self) -> None:
        if self._leaks and self._live:
            raise Broken("no-leak", f"left at the end: {', '.join(map(_name, self._live))}")


_FREED: dict[type, type] = {}
_FREED_OF: dict[type, type] = {}  # the other way


def _freed_class(cls: type) -> type:
    freed = _FREED.get(cls)
    if freed is None:

        def touched(self: Any, name: str) -> Any:
            if a_task_runs() and not name.startswith("__"):
                raise Broken(
                    "no-use-after-free", f"{_name(self)}.{name} is used after it was freed"
                )
            return object.__getattribute__(self, name)

        def written(self: Any, name: str, value: object) -> None:
            if a_task_runs():
                raise Broken("no-use-after-free", f"{_name(self)}.{name} is set after it was freed")
            object.__setattr__(self, name, value)

        body = {"__slots__": (), "__getattribute__": touched, "__setattr__": written}
        freed = type(f"freed {cls.__name__}", (cls,), body)
        _FREED[cls], _FREED_OF[freed] = freed, cls
    return freed


def _name(obj: Any) -> str:
    try:
        return str(object.__getattribute__(obj, "name"))
    except AttributeError:
        return _FREED_OF.get(type(obj), type(obj)).__name__


class Refcount:
    """A count of references. ``on_zero`` is called when the last one is dropped.

    Linux reference: lib/refcount.c.
    """

    __slots__ = ("_on_zero", "_world", "name", "value")

    def __init__(
        self,
        world: World,
        name: str,
        value: int = 1,
        on_zero: Callable[[], object] | None = None,
    ) -> None:
        self._world = world
        self.name = name
        self.value = value
        self._on_zero = on_zero

    def get(self) -> None:
        """Take a reference; misuse when there is none to take it from."""
        if self.value <= 0:
            self._world._misuse("refcount", f"takes a reference of {self.name} from zero")
        self.value += 1

    def get_not_zero(self) -> bool:
        """Take a reference unless there is none left; whether it was taken."""
        if self.value <= 0:
            return False
        self.value += 1
        return True

    def put(self) -> bool:
        """Drop a reference; whether it was the last. Misuse below zero."""
        if self.value <= 0:
            self._world._misuse("refcount", f"drops a reference of {self.name} below zero")
        self.value -= 1
        if self.value == 0 and self._on_zero is not None:
            self._on_zero()
        return self.value == 0

    def __repr__(self) -> str:
        return f"<Refcount {self.name} {self.value}>"
