"""State that a key could fail to show: the reduced search ends where the plain one does."""

import functools
import threading
from collections import OrderedDict, defaultdict

import msgspec
import pytest

from fanwise.lab import Memory, ModelError, Mutex, Scenario, Srcu, explore, replay
from fanwise.lifetime import Until


def design_of(build):
    scenario = Scenario("unseen", "Unseen", "State.", {"p": "It holds."})
    scenario.design("it", "It.")(build)
    return scenario["it"]


class Flag:
    pass


class Colour:
    def __init__(self, name):
        self.name = name


class Palette:
    RED, BLUE = Flag(), Flag()


class Moving(OrderedDict):
    pass


class Making(defaultdict):
    pass


class Shy(str):
    def __str__(self):
        return "nobody"


class Open(msgspec.Struct, dict=True):
    value: int = 0


TWINS = Colour("red"), Colour("red")
NAMED = {"one": object(), "two": object()}


def attributed():
    held = functools.partial(max)
    held.value = 0
    return held


def made_inside():
    class Inside:
        value = 0

    return Inside


def cached():
    return functools.cache(lambda n: [n])


def caused(state, n):
    try:
        raise ValueError("same") from KeyError("ab"[n])
    except ValueError as error:
        state["x"] = error


def held(state):
    return state.get("x")


# What is made, what either of two tasks does to it, and what a third one sees of it.
KINDS = {
    "a class's marks": (dict, lambda s, n: s.update(x=(Palette.RED, Palette.BLUE)[n]),
                        lambda s: held(s) is Palette.RED),
    "a module's twins": (dict, lambda s, n: s.update(x=TWINS[n]), lambda s: held(s) is TWINS[0]),
    "objects in a table": (dict, lambda s, n: s.update(x=NAMED[("one", "two")[n]]),
                           lambda s: held(s) is NAMED["one"]),
    "objects of the model": (lambda: {"of": (object(), object())},
                             lambda s, n: s.update(x=s["of"][n]),
                             lambda s: held(s) is s["of"][0]),
    "an error's file": (dict, lambda s, n: s.update(x=OSError(2, "same", "ab"[n])),
                        lambda s: getattr(held(s), "filename", None)),
    "an error's cause": (dict, caused, lambda s: getattr(held(s), "__cause__", None)),
    "an ordered dict": (lambda: Moving(a=1, b=2), lambda s, n: s.move_to_end("ab"[n]), list),
    "a default factory": (lambda: Making(int),
                          lambda s, n: setattr(s, "default_factory", (int, str)[n]),
                          lambda s: s["x"]),
    "a str that hides itself": (dict, lambda s, n: s.update(x=Shy("ab"[n])),
                                lambda s: held(s) == "a"),
    "the order of a set": (set, lambda s, n: s.add(8 * n), list),
    "attributes of a partial": (attributed, lambda s, n: setattr(s, "value", n), lambda s: s.value),
    "attributes of a Struct": (Open, lambda s, n: setattr(s, "more", n),
                               lambda s: getattr(s, "more", None)),
    "a class made inside": (made_inside, lambda s, n: setattr(s, "value", n), lambda s: s.value),
    "a cache": (cached, lambda s, n: s(0).append(n), lambda s: s(0)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_third_task_sees_is_seen_in_both_searches(kind):
    make, change, look = KINDS[kind]

    def build(world):
        state = make()
        done = [0]

        def changes(n):
            yield "change"
            change(state, n)
            done[0] += 1

        def looks():
            yield Until("look", lambda: done[0] == 2)
            world.case("seen", repr(look(state)))

        world.task("one", changes(0))
        world.task("two", changes(1))
        # Two, for without a choice there is no key.
        world.task("looks", looks())
        world.task("looks too", looks())

    for bound in (1, None):
        pruned, whole = (explore(design_of(build), bound=bound, reduce=r) for r in (True, False))
        assert (pruned.verdict, whole.verdict) == ("holds", "holds"), pruned.seen
        assert pruned.cases == whole.cases
        assert len(whole.cases["seen"]) > 1


def test_a_spawned_task_is_told_by_its_name():
    def build(world):
        state = {"n": 0}

        def spawned():
            yield "look"
            world.check("p", world.current() != "number 1")

        def spawns():
            yield "spawn"
            world.spawn(f"number {state['n']}", spawned())

        def changes():
            yield "one"
            state["n"] = 1
            yield "zero"
            state["n"] = 0

        world.task("spawns", spawns())
        world.task("changes", changes())

    for reduce in (True, False):
        assert explore(design_of(build), reduce=reduce).property == "p"


def test_a_condition_that_breaks_a_property_is_replayed():
    def build(world):
        state = {"n": 0}

        def changes():
            yield "change"
            state["n"] = 1

        def waits():
            yield Until("wait", lambda: world.check("p", not state["n"]) or True)

        world.task("changes", changes())
        world.task("waits", waits())

    for reduce in (True, False):
        result = explore(design_of(build), reduce=reduce)
        assert (result.property, result.schedule) == ("p", "A1")
        assert replay(design_of(build), "A1").broken.property == "p"


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_bare_yield_is_not_the_end_of_a_task(first, reduce):
    def build(world):
        def slips():
            if not first:
                yield "step"
            yield
            world.check("p", False)

        world.task("slips", slips())

    with pytest.raises(ModelError, match="task 'slips' yields None"):
        explore(design_of(build), reduce=reduce)


def test_a_task_that_expects_errors_does_not_hide_misuse():
    def build(world):
        memory = Memory(world)
        block = memory.alloc("block", n=1)

        def frees():
            yield "free"
            memory.free(block)

        def uses():
            yield "use"
            try:
                block.n += 1
            except Exception:
                yield "never mind"

        world.task("frees", frees())
        world.task("uses", uses())

    assert explore(design_of(build)).property == "no-use-after-free"


def test_a_search_in_which_nothing_ends_says_so_and_does_not_hold():
    def build(world):
        one, two = Mutex(world, "one", ordered=False), Mutex(world, "two", ordered=False)

        def spins():
            while True:
                yield "spin"

        def takes(first, second):
            with (yield from first.lock()), (yield from second.lock()):
                yield "inside"

        world.task("a", takes(one, two))
        world.task("b", takes(two, one))
        world.task("spins", spins(), daemon=True)

    with pytest.raises(ModelError, match="no schedule ends"):
        explore(design_of(build))


GLOBAL = {}


class Counter:
    last = 0


def grows(n, seen=[]):  # noqa: B006
    seen.append(n)
    return seen[-1]


OUTSIDE = {
    "GLOBAL": (lambda n: GLOBAL.update(n=n), lambda: GLOBAL["n"]),
    "Counter.last": (lambda n: setattr(Counter, "last", n), lambda: Counter.last),
    "grows": (grows, lambda: grows.__defaults__[0][-1]),
}


@pytest.mark.parametrize("where", OUTSIDE)
def test_a_schedule_that_changes_what_is_outside_of_the_model_is_found(where):
    changes, looks = OUTSIDE[where]
    GLOBAL.clear()
    grows.__defaults__[0].clear()
    Counter.last = 0

    def build(world):
        state = {"done": 0}

        def task(n):
            yield "change"
            changes(n)
            state["done"] += 1

        def looker():
            yield Until("look", lambda: state["done"] == 2)
            world.check("p", looks() != 1)

        world.task("one", task(1))
        world.task("two", task(2))
        world.task("looks", looker())
        world.task("looks again", looker())

    result = explore(design_of(build))
    assert (result.verdict, result.property) == ("breaks", "deterministic")
    assert where in result.seen
    assert "outside of the model" in result.seen


def test_also_one_that_was_changed_before_the_model_could_not_be_keyed():
    GLOBAL.clear()

    def build(world):
        def task():
            lock = threading.Lock()
            yield "hold"
            with lock:
                yield "let go"

        def first():
            yield "change"
            GLOBAL["n"] = 1
            world.task("one", task())
            world.task("two", task())

        world.task("first", first())

    result = explore(design_of(build))
    assert "lock" in result.not_keyed
    assert (result.verdict, result.property) == ("breaks", "deterministic")
    assert "GLOBAL" in result.seen


@pytest.mark.parametrize("reduce", [True, False])
def test_a_wait_without_yield_from_is_told(reduce):
    def build(world):
        srcu = Srcu(world, "srcu")

        def removes():
            yield "remove"
            srcu.synchronize()
            yield "free"

        def reads():
            yield "read"
            inside = srcu.read_lock()
            yield "leave"
            srcu.read_unlock(inside)

        world.task("removes", removes())
        world.task("reads", reads())

    with pytest.raises(ModelError, match=r"Srcu.synchronize\(\) was called, and nobody waits"):
        explore(design_of(build), reduce=reduce)
