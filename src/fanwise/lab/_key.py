"""State keys: all that the future of a model depends on, in a form free of ids and addresses.

A key is made from what can be reached from the tasks, the predicates and the primitives: objects
are numbered in the order in which a breadth-first walk meets them, generators are told by their
code, their position, the names that are bound and every object of their frame, the hidden ones too
(iterators of loops, contexts of with statements, the generator that they yield from). Two states
with equal keys have equal futures (docs/adr/0008-the-explorer-s-reduction.md); the reverse need not
be: sets of objects, and objects held twice, may make two keys of one state.

REFS      `Keys` holds on to classes, codes and constants: their ids are used as long as it lives.
LIFETIME  one `Keys` for one exploration.
"""

import enum
import gc
import marshal
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from operator import attrgetter
from typing import Any, TypeAlias

import msgspec

from fanwise.lifetime import Lifetime, Steps, Until

from ._world import World

_ATOMS = frozenset({int, str, bool, bytes, type(None)})
_CONSTANTS_LIMIT = 10_000
# Numbers of objects stand among the values of a state, so they need a type of their own.
_REFS = [float(n) for n in range(1000)]
_UNBOUND = object()
_NONE: dict[int, int] = {}
_ITERATORS = [
    *map(type, (iter([]), iter(()), iter(range(0)), iter(set()), reversed(list(_NONE)))),
    *map(type, (iter(_NONE), iter(_NONE.items()), iter(_NONE.values()))),
    *map(type, (iter("a"), iter("\u20ac"), iter(b"a"), iter(bytearray()))),
    *(enumerate, zip, map),
]
# What an instance of a class without fields of its own takes: a reference count and a type.
_BARE = object.__basicsize__
_HEAP = 1 << 9  # a class made by a class statement
_WORD = 8

Plan: TypeAlias = Callable[[Any], tuple[object, Iterable[Any]]]


class Unkeyable(Exception):
    """The state of this object cannot be seen."""


class Keys:
    """Makes the keys of one exploration's states."""

    def __init__(self) -> None:
        self._constants: dict[int, tuple[int, object]] = {}
        self._known: dict[int, float] = {}
        self._globals: set[type] = set()
        self.ambiguous = False  # a set was met whose order depends on addresses
        self._plans: dict[type, Plan] = {
            list: lambda o: (len(o), o),
            tuple: lambda o: (-1 - len(o), o),
            dict: lambda o: (("d", len(o)), (*o, *o.values())),
            set: lambda o: (("s", len(o)), self._sorted(o)),
            frozenset: lambda o: (("z", len(o)), self._sorted(o)),
            deque: lambda o: (("q", o.maxlen, len(o)), o),
            bytearray: lambda o: (("b", bytes(o)), ()),
            float: lambda o: (("f", o), ()),
            types.CellType: _cell,
            types.FunctionType: self._function,
            types.MethodType: lambda o: ("m", (o.__func__, o.__self__)),
            types.BuiltinFunctionType: self._builtin,
            types.MethodWrapperType: lambda o: (("mw", o.__name__), (o.__self__,)),
            types.GeneratorType: self._generator,
            types.MappingProxyType: lambda o: (("p", len(o)), (*o, *o.values())),
            partial: lambda o: ("partial", (o.func, o.args, o.keywords, o.__dict__)),
            range: lambda o: (("r", o.start, o.stop, o.step), ()),
            World: lambda o: ("w", ()),
            Until: lambda o: ("u", o),
            defaultdict: lambda o: (("dd", len(o)), (o.default_factory, *o, *o.values())),
            OrderedDict: lambda o: (("od", len(o)), (*o, *o.values())),
        }
        for cls in _ITERATORS:
            self._plans[cls] = self._iterator
        for cls in (types.ModuleType, types.CodeType, Lifetime, Steps):
            self._plans[cls] = self._constant

    def key(self, world: World) -> bytes:
        """Return the key of the state that ``world`` is in: 16 bytes.

        Digests of different states are taken to be different: 128 bits. Raises Unkeyable.
        """
        return _digest(lambda: self.tokens(world))

    def tokens(self, world: World) -> list[object]:
        """Return the canonical form. Raises Unkeyable."""
        return self._settled(lambda: self._world(world))

    def digest(self, obj: object) -> bytes:
        """Return what one object and all that it reaches come to. Raises Unkeyable."""
        return _digest(lambda: self._settled(lambda: self._walk([[obj]], [])))

    def _settled(self, walk: Callable[[], list[object]]) -> list[object]:
        while True:
            known = len(self._known)
            out = walk()
            # A constant that was met for the first time was told in another way than it will be.
            if len(self._known) == known:
                return out

    def _world(self, world: World) -> list[object]:
        waiting = world._waiting
        queue: list[Any] = [
            world,
            [gen if world._alive >> i & 1 else None for i, gen in enumerate(world._gens)],
            [at if waiting >> i & 1 else None for i, at in enumerate(world._at)],
            world._always,
            world._at_end,
            world._counts,
            world._atomic,
            world._held,
            world._order,
            world._parts,
            # A task is current() by its name, and which one was spawned depends on the way.
            [name for i, name in enumerate(world._names) if world._alive >> i & 1],
        ]
        return self._walk(queue, [world._alive, world._daemons])

    def _walk(self, queue: list[Any], out: list[object]) -> list[object]:
        # What stands for an object among the values: a number of its own type, from 0 for those
        # that the walk meets, below 0 for constants.
        memo = self._known.copy()
        for n, obj in enumerate(queue):
            memo[id(obj)] = _REFS[n]
        emit, plans, refs = out.append, self._plans, _REFS
        self._memo = memo
        for obj in queue:  # which grows
            cls = type(obj)
            plan = plans.get(cls)
            if plan is None:
                plan = self._plan(cls)
            head, children = plan(obj)
            emit(head)
            for child in children:
                if type(child) in _ATOMS:
                    emit(child)
                else:
                    ref = memo.get(id(child))
                    if ref is None:
                        n = len(queue)
                        if n == len(refs):
                            refs.append(float(n))
                        ref = memo[id(child)] = refs[n]
                        queue.append(child)
                    emit(ref)
        return out

    # -- how each type is told: a head, which fixes how many children follow, and the children --

    def _constant(self, obj: object) -> tuple[object, Iterable[Any]]:
        return (("c", self._number(obj)), ())

    def _class(self, cls: type) -> tuple[tuple[str, int], Iterable[Any]]:
        # Each schedule makes its own, and what it keeps in attributes would not be seen.
        if any("<locals>" in base.__qualname__ for base in cls.__mro__):
            raise Unkeyable(f"the state of class {cls.__name__}, made inside of a function")
        return (("c", self._number(cls)), ())

    def _number(self, obj: object) -> int:
        found = self._constants.get(id(obj))
        if found is None:
            if len(self._constants) >= _CONSTANTS_LIMIT:
                raise Unkeyable(f"{obj!r} is made anew in every schedule, and has no state")
            found = self._constants[id(obj)] = (len(self._constants), obj)
            # Codes and classes are told in other places as well, by their numbers.
            if type(obj) is not types.CodeType:
                self._known[id(obj)] = -1.0 - found[0]
        return found[0]

    def _function(self, obj: types.FunctionType) -> tuple[object, Iterable[Any]]:
        closure, defaults, named = obj.__closure__, obj.__defaults__, obj.__kwdefaults__
        if closure is None and defaults is None and named is None and not obj.__dict__:
            return (("c", self._number(obj.__code__)), ())
        head = ("fn", self._number(obj.__code__), len(closure or ()))
        return (head, (*(closure or ()), defaults, named, obj.__dict__ or None))

    def _builtin(self, obj: types.BuiltinFunctionType) -> tuple[object, Iterable[Any]]:
        if obj.__self__ is None or isinstance(obj.__self__, types.ModuleType):
            return self._constant(obj)
        return (("bm", obj.__name__), (obj.__self__,))

    def _generator(self, obj: Any) -> tuple[object, Iterable[Any]]:
        frame = obj.gi_frame
        if frame is None:
            return (("g", 0), ())
        names = frame.f_locals
        bound = tuple(names)
        code = obj.gi_code
        inside = []
        # f_locals does not show what stands on the frame's stack; the collector does.
        function = True
        for child in gc.get_referents(obj):
            cls = type(child)
            if cls is types.FrameType or cls is types.CodeType or child is names:
                continue
            if function and cls is types.FunctionType and child.__code__ is code:
                function = False  # the generator's own, which stands before its variables
                continue
            inside.append(child)
        return (("g", self._number(code), frame.f_lasti, bound, len(inside)), inside)

    def _iterator(self, obj: Any) -> tuple[object, Iterable[Any]]:
        # What it goes over, too: a list that grows is iterated further.
        over = gc.get_referents(obj)
        reduced = obj.__reduce__()
        if type(obj).__name__.startswith(("dict_", "set_")):
            left = list(reduced[1][0])
            return (("i", self._number(type(obj)), len(left), len(over)), (*left, *over))
        return (("i", self._number(type(obj)), len(over), len(reduced)), (*over, *reduced[1:]))

    def _sorted(self, obj: Iterable[Any]) -> Sequence[Any]:
        values = list(obj)
        if len(values) < 2:
            return values
        try:
            kinds = set(map(type, values))
            if kinds == {str}:
                return sorted(values)
            # Equal sets of numbers go in another order if they were filled in another one. (Of
            # strings, too, but that is another one in each process, and no model may depend on it.)
            if kinds <= {int, bool, type(None)}:
                return values
            ranks = sorted((self._rank(value), at) for at, value in enumerate(values))
            for (one, _), (two, _) in pairwise(ranks):
                self.ambiguous |= one == two and one[0] == 2
            return [values[at] for _, at in ranks]
        except TypeError as error:
            raise Unkeyable(f"a set that cannot be ordered: {error}") from error

    def _rank(self, value: Any) -> tuple[int, bytes]:
        if type(value) in _ATOMS or _plain(value):
            return (0, marshal.dumps(value, 2))
        number = self._memo.get(id(value))
        if number is not None:
            return (1, marshal.dumps(int(number) + (1 << 40), 2))
        cls = type(value)
        fields = [v for v in getattr(value, "__dict__", {}).values() if type(v) in _ATOMS]
        return (2, marshal.dumps([cls.__name__, fields], 2))

    def _plan(self, cls: type) -> Plan:
        """Find out how a class is told that is met for the first time."""
        plan = self._planned(cls)
        if plan != self._constant and not issubclass(cls, type):
            plan = self._twins(cls, plan)
        self._plans[cls] = plan
        return plan

    def _planned(self, cls: type) -> Plan:
        if issubclass(cls, type):
            return self._class
        if issubclass(cls, (enum.Enum, types.ModuleType)):
            return self._constant
        number = self._class(cls)[0][1]
        if cls is object:
            return lambda o: self._bare(o, number)
        slots = _slots(cls)
        has_dict = cls.__dictoffset__ != 0
        read = _reader(slots)
        if issubclass(cls, msgspec.Struct):
            names = (*cls.__struct_fields__, *["__dict__"] * has_dict)
            fields = attrgetter(*names) if names else None
            count = len(names)
            if fields is None:
                return lambda o: (("o", number), ())
            if count == 1:
                return lambda o: (("o", number), (fields(o),))
            return lambda o: (("o", number), fields(o))
        for base in (tuple, list, dict, int, str, bytes, BaseException):
            if issubclass(cls, base):
                native = next(b for b in cls.__mro__ if not b.__flags__ & _HEAP)
                if native is not base and base is not BaseException:
                    raise Unkeyable(f"the state of a {cls.__qualname__}, which is {native!r}")
                return _derived(base, number, read if slots else None, has_dict)
        room = _BARE + _WORD * (len(slots) + (cls.__dictoffset__ > 0))
        room += _WORD * any("__weakref__" in vars(base) for base in cls.__mro__)
        if cls.__basicsize__ > room or cls.__itemsize__ or not cls.__flags__ & _HEAP:
            raise Unkeyable(f"the state of a {cls.__module__}.{cls.__qualname__} cannot be seen")
        if not has_dict and not slots:
            return lambda o: self._bare(o, number)
        if not has_dict:
            return lambda o: (("o", number), read(o))
        shapes: dict[tuple[str, ...], tuple[object, ...]] = {}

        def with_dict(o: Any) -> tuple[object, Iterable[Any]]:
            fields = o.__dict__
            names = tuple(fields)
            head = shapes.get(names)
            if head is None:
                head = shapes[names] = ("o", number, names)
            if slots:
                return (head, (*read(o), *fields.values()))
            if not names:
                return self._bare(o, number)
            return (head, fields.values())

        return with_dict

    def _bare(self, obj: object, number: int) -> tuple[object, Iterable[Any]]:
        # No state tells it from its like, so that only where it is held does; if a module holds
        # it, it is itself wherever it is met.
        self._hold(type(obj))
        found = self._constants.get(id(obj))
        return (("c", found[0]), ()) if found else (("o", number), ())

    def _hold(self, cls: type) -> None:
        if cls not in self._globals:
            self._globals.add(cls)
            for held in _held(cls):
                self._number(held)

    def _twins(self, cls: type, plan: Plan) -> Plan:
        """Tell apart what modules hold of a class: alike, they are still not one and the same."""
        which = {id(held): (n, held) for n, held in enumerate(_held(cls))}
        if len(which) < 2:
            return plan

        def told(o: Any) -> tuple[object, Iterable[Any]]:
            head, children = plan(o)
            found = which.get(id(o))
            return ((head, found[0]) if found else head, children)

        return told


# What modules hold, by class: as globals, as attributes of classes, as defaults, and in containers
# of these. One look for as long as no module is loaded.
_holdings: tuple[int, dict[type, list[object]]] = (0, {})


def _held(cls: type) -> list[object]:
    global _holdings
    if _holdings[0] != len(sys.modules):
        _holdings = (len(sys.modules), _look())
    return _holdings[1].get(cls, [])


def _look() -> dict[type, list[object]]:
    found: dict[type, list[object]] = defaultdict(list)
    seen: set[int] = set()
    todo: list[tuple[int, object]] = []
    for module in list(sys.modules.values()):
        todo += [(0, value) for value in list(getattr(module, "__dict__", {}).values())]
    for depth, value in todo:  # which grows
        kind = type(value)
        inside: Iterable[object] = ()
        if kind in (list, tuple, set, frozenset) and depth < 2:
            inside = list(value)  # type: ignore[call-overload]
        elif kind is dict and depth < 2:
            inside = list(value.values())  # type: ignore[attr-defined]
        elif isinstance(value, type):
            inside = () if id(value) in seen else list(vars(value).values())
            seen.add(id(value))
        elif kind is types.FunctionType:
            inside = value.__defaults__ or ()  # type: ignore[attr-defined]
        elif (kind is object or kind.__flags__ & _HEAP) and id(value) not in seen:
            seen.add(id(value))
            found[kind].append(value)
        todo += [(depth + 1, child) for child in inside if type(child) not in _ATOMS]
    return found


def _digest(tokens: Callable[[], list[object]]) -> bytes:
    try:
        return blake2b(marshal.dumps(tokens(), 2), digest_size=16).digest()
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise Unkeyable(f"the state cannot be told: {error}") from error


def _derived(
    base: type, number: int, read: Callable[[Any], Sequence[Any]] | None, has_dict: bool
) -> Plan:
    def told(o: Any) -> tuple[object, Iterable[Any]]:
        own = list(read(o)) if read else []
        if has_dict:
            own.append(o.__dict__)
        if issubclass(base, (tuple, list)):
            items = list(base.__iter__(o))
        elif base is dict:
            items = [*dict.keys(o), *dict.values(o)]
        elif base is BaseException:
            # What its class adds (an OSError's file name) is in its reduced form.
            items = [o.__reduce__()[1:], o.__cause__, o.__context__]
        else:
            items = [_value(base, o)]
        return ((base.__name__, number, len(items), len(own)), (*items, *own))

    return told


def _value(base: type, o: Any) -> object:
    """Return what an instance of a subclass is as an int, a str or bytes, whatever it says."""
    if base is int:
        return int.__int__(o)
    return str.__str__(o) if base is str else bytes.__getitem__(o, slice(None))


def _cell(obj: types.CellType) -> tuple[object, Iterable[Any]]:
    try:
        return ("cell", (obj.cell_contents,))
    except ValueError:
        return ("empty", ())


def _plain(value: Any) -> bool:
    return type(value) is tuple and all(type(v) in _ATOMS or _plain(v) for v in value)


def _slots(cls: type) -> list[str]:
    names = []
    for base in reversed(cls.__mro__):
        own = vars(base).get("__slots__", ())
        for name in (own,) if isinstance(own, str) else own:
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                names.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return names


def _reader(names: list[str]) -> Callable[[Any], Sequence[Any]]:
    if not names:
        return lambda o: ()
    if len(names) == 1:
        return lambda o: (getattr(o, names[0], _UNBOUND),)
    fast = attrgetter(*names)

    def read(o: Any) -> Sequence[Any]:
        try:
            values: Sequence[Any] = fast(o)
        except AttributeError:
            values = [getattr(o, name, _UNBOUND) for name in names]
        return values

    return read


assert sys.implementation.name == "cpython"  # frames are read as CPython keeps them
