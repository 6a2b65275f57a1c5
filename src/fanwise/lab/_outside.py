"""State outside of a model: what its modules keep in globals, class attributes and defaults.

A model may read such state. If a schedule changes it, keys do not show it and the next schedule
begins with it, so that neither a cut nor a replay can be trusted: the model is not deterministic.

REFS      holds on to nothing but digests, and what `Keys` holds.
LIFETIME  one for all searches of an exploration, made before the first.
"""

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from ._key import Keys, Unkeyable
from ._world import Broken, World

_TOLD_ELSEWHERE = (types.ModuleType, type, staticmethod, classmethod, property)


class Outside:
    """What the module of a design, and those beside it in its package, hold at one time."""

    def __init__(self, build: Callable[[World], None]) -> None:
        self._modules = _beside(getattr(build, "__module__", None) or "")
        self._keys = Keys()
        self._before: dict[str, bytes] = {}
        self._before = self._told(first=True)

    def changed(self) -> Broken | None:
        """Return what is broken if it has changed."""
        for name, told in self._told().items():
            if told != self._before[name]:
                return Broken(
                    "deterministic",
                    f"a schedule changes {name}, which is outside of the model:"
                    " make in the design's function all that its tasks change",
                )
        return None

    def _told(self, *, first: bool = False) -> dict[str, bytes]:
        told = {}
        for module in self._modules:
            for name, value in _held(module):
                if first or name in self._before:
                    try:
                        told[name] = self._keys.digest(value)
                    except Unkeyable:
                        continue  # a cache of functools, a compiled pattern
        return told


def _beside(name: str) -> list[types.ModuleType]:
    package = name.rpartition(".")[0]
    return [
        module
        for other, module in sorted(sys.modules.items())
        if other == name or (package and other.rpartition(".")[0] == package)
    ]


def _held(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    for name, value in list(vars(module).items()):
        if name.startswith("__"):
            continue
        if isinstance(value, type) and value.__module__ == module.__name__:
            for field, inside in list(vars(value).items()):
                if not field.startswith("__") or isinstance(inside, types.FunctionType):
                    yield from _value(f"{value.__qualname__}.{field}", inside)
        elif getattr(value, "__module__", module.__name__) == module.__name__:
            yield from _value(f"{module.__name__}.{name}", value)


def _value(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, types.FunctionType):
        if value.__defaults__ or value.__kwdefaults__ or value.__dict__:
            yield name, (value.__defaults__, value.__kwdefaults__, value.__dict__)
    elif not isinstance(value, _TOLD_ELSEWHERE) and not hasattr(type(value), "__get__"):
        yield name, value
