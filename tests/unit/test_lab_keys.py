"""State keys: equal for equal futures, whatever the addresses, and different for others."""

import enum
import io
import random
import threading
from collections import deque
from contextlib import contextmanager
from functools import partial

import msgspec
import pytest

from fanwise.lab import World
from fanwise.lab._key import Keys, Unkeyable
from fanwise.lifetime import Lifetime, Steps, Until


class Plain:
    def __init__(self, **fields):
        self.__dict__.update(fields)


class Slots:
    __slots__ = ("__private", "a", "b")

    def __init__(self, a, private=None):
        self.a = a
        self.__private = private


class More(Slots):
    __slots__ = ("c", "name")
    LIFE = Lifetime("More", states=("NEW", "OLD"), transitions={"age": "NEW -> OLD"})


class Pair(msgspec.Struct, gc=False):
    one: int
    two: object


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Bare:
    pass


ONE, TWO = object(), object()
LEFT, RIGHT = Bare(), Bare()
WORK = Steps("work", {"a": "a", "b": "b"})


def keep(value):
    yield "step"
    return value


def state(keys, *values, steps=0):
    """The tokens of a world whose only task holds these values."""
    world = World()
    world.task("t", keep(values))
    for _ in range(steps):
        world._step(0)
    return keys.tokens(world)


def both():
    shared = Plain()
    return [
        (1, True),
        (1, 1.0),
        (0, None),
        ("a", b"a"),
        ([1], (1,)),
        ([1, [2]], [[1], 2]),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
        ({1, 2}, {1, 3}),
        ({1}, frozenset({1})),
        (deque([1], 2), deque([1], 3)),
        (bytearray(b"a"), bytearray(b"b")),
        (1.5, 2.5),
        (Plain(a=1), Plain(a=2)),
        (Plain(a=1), Plain(b=1)),
        (Slots(1), Slots(2)),
        (Slots(1, private=1), Slots(1, private=2)),
        (Slots(1), More(1)),
        (Pair(1, 2), Pair(1, 3)),
        (Pair(1, 2), Pair(1, [2])),
        (Colour.RED, Colour.BLUE),
        (ONE, TWO),
        (LEFT, RIGHT),
        (int, str),
        ((shared, shared), (Plain(), Plain())),
        (partial(keep, 1), partial(keep, 2)),
        ([].append, [1].append),
        (Slots(1).__init__, Slots(2).__init__),
        (lambda: 1, lambda: 2),
        ((lambda n: lambda: n)(1), (lambda n: lambda: n)(2)),
        (lambda n=1: n, lambda n=2: n),
        (ValueError(1), ValueError(2)),
        (ValueError(1), KeyError(1)),
        (iter([1, 2]), after(iter([1, 2]))),
        (iter((0, 0)), after(iter((0, 0)))),
        (iter({1: 2}), after(iter({1: 2}))),
        (iter(range(3)), after(iter(range(3)))),
        (enumerate("ab"), after(enumerate("ab"))),
        (Until("a", bool), Until("b", bool)),
        (range(2), range(3)),
    ]


def after(iterator):
    next(iterator)
    return iterator


@pytest.mark.parametrize("pair", both(), ids=repr)
def test_different_states_have_different_keys(pair):
    keys = Keys()
    one, two = (state(keys, value) for value in pair)
    assert one != two or [type(t) for t in one] != [type(t) for t in two]
    # And the same ones the same.
    assert state(keys, pair[0]) == one


def test_addresses_do_not_matter():
    keys = Keys()
    keep_alive = []

    def made():
        keep_alive.append([object() for _ in range(random.randrange(50))])
        a, b = Plain(n=1), Slots([1])
        a.b = b
        b.b = {"loop": a, (1, 2): [b, b]}
        return [a, {Colour.RED, 3, "x", None, (1, "y")}, lambda: a, WORK, b.a.append, Bare()]

    first = state(keys, made())
    assert all(state(keys, made()) == first for _ in range(20))
    world = World()
    world.task("t", keep(made()))
    one = keys.key(world)
    assert len(one) == 16
    world = World()
    world.task("t", keep(made()))
    assert keys.key(world) == one


def position(body, steps):
    world = World()
    world.task("t", body())
    for _ in range(steps):
        world._step(0)
    return world


def loop():
    for _ in [0, 0, 0, 0]:
        yield "again"


def loop_by_range():
    for _ in range(4):
        yield "again"


@contextmanager
def context(value):
    yield value


def with_block():
    for value in (1, 2):
        with context(value):
            del value
            yield "inside"


def handling():
    for error in (ValueError, KeyError):
        try:
            raise error
        except Exception:
            yield "handling"


def nested():
    yield from loop()
    yield "again"
    yield from loop()


def expression():
    for n in (1, 2):
        m = n
        del n
        total = m + (yield "again") if False else [m, (yield "again")]
        del m, total


@WORK
def run():
    for _ in (0, 0):
        yield "a"
        yield "b"


@pytest.mark.parametrize(
    "body", [loop, loop_by_range, with_block, handling, nested, expression, run]
)
def test_every_position_of_a_generator_is_its_own(body):
    keys = Keys()
    tokens = []
    steps = 0
    while True:
        world = position(body, steps)
        if not world._alive:
            break
        tokens.append(keys.tokens(world))
        steps += 1
    assert steps > 1
    assert all(a != b for i, a in enumerate(tokens) for b in tokens[:i])
    for number, before in enumerate(tokens):
        assert keys.tokens(position(body, number)) == before


def test_a_variable_that_is_not_bound_is_told_from_another():
    def body(first):
        if first:
            a = 1
        else:
            b = 1
        yield "step"
        del a, b

    keys = Keys()
    one, two = World(), World()
    one.task("t", body(True))
    two.task("t", body(False))
    # `first` differs too, so it is taken out of the frame by hand.
    tokens = [[t for t in keys.tokens(w) if t is not True and t is not False] for w in (one, two)]
    assert tokens[0] != tokens[1]


@pytest.mark.parametrize("make", [threading.Lock, lambda: random.Random(1), io.BytesIO])
def test_what_cannot_be_seen_is_refused(make):
    with pytest.raises(Unkeyable, match="cannot be seen"):
        state(Keys(), make())


def test_what_waits_belongs_to_the_state():
    keys = Keys()

    def waits(n):
        left = [n]
        del n
        yield Until("wait", (lambda n: lambda: n > 2)(left.pop()))

    def tokens(n):
        world = World()
        world.task("t", waits(n))
        return keys.tokens(world)

    assert tokens(1) != tokens(2)


def test_what_counts_belongs_to_the_state():
    keys = Keys()
    world = World()
    before = keys.tokens(world)
    world.count("rebuilds")
    assert keys.tokens(world) != before
