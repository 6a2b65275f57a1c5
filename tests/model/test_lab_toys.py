"""Toys: known races break with a schedule that replays, and their mended versions hold."""

import pytest

from fanwise.lab import (
    Memory,
    Mutex,
    Refcount,
    Scenario,
    Spin,
    Srcu,
    WaitQueue,
    Worker,
    explore,
    replay,
    sample,
)

TOYS = Scenario("toys", "Toys", "Known races.", {"sum": "Nothing is lost."})


@TOYS.design("racy-counter", "Read, then write.")
def racy_counter(world):
    state = {"n": 0}

    def add():
        yield "read"
        n = state["n"]
        yield "write"
        state["n"] = n + 1

    for name in ("one", "two", "three"):
        world.task(name, add())
    world.at_end("sum", lambda: state["n"] == 3)


@TOYS.design("locked-counter", "The same under a mutex.")
def locked_counter(world):
    state = {"n": 0}
    mutex = Mutex(world, "m")

    def add():
        with (yield from mutex.lock()):
            n = state["n"]
            yield "write"
            state["n"] = n + 1

    for name in ("one", "two", "three"):
        world.task(name, add())
    world.at_end("sum", lambda: state["n"] == 3)


def pair(name, ordered):
    @TOYS.design(name, "Two locks, the other way round in one task.")
    def build(world):
        a, b = Mutex(world, "a", ordered=ordered), Mutex(world, "b", ordered=ordered)

        def both(first, second):
            yield from first.lock()
            yield from second.lock()
            second.unlock()
            first.unlock()

        world.task("one", both(a, b))
        world.task("two", both(b, a))


pair("lock-order", True)
pair("deadlock", False)


@TOYS.design("lost-wake-up", "Looks, then sleeps.")
def lost_wake_up(world):
    queue = WaitQueue(world, "q")
    state = {"ready": False}

    def waiter():
        yield "look"
        if state["ready"]:
            return
        yield "enlist"
        yield from queue.sleep()

    def waker():
        yield "wake"
        state["ready"] = True
        queue.wake()

    world.task("waiter", waiter())
    world.task("waker", waker())


@TOYS.design("waits", "Enlists, then looks.")
def waits(world):
    queue = WaitQueue(world, "q")
    state = {"ready": False}

    def waker():
        yield "set"
        state["ready"] = True
        yield "wake"
        queue.wake()

    world.task("waiter", queue.wait(lambda: state["ready"]))
    world.task("waker", waker())


def memory_toy(name, *, guarded, wait):
    @TOYS.design(name, "A reader, and who frees what it reads.")
    def build(world):
        memory, srcu = Memory(world), Srcu(world, "srcu")
        state = {"at": memory.alloc("thing", value=1)}

        def reader():
            yield "enter"
            inside = srcu.read_lock() if guarded else None
            thing = state["at"]
            yield "read"
            if thing is not None:
                _ = thing.value
            if guarded:
                srcu.read_unlock(inside)

        def freer():
            yield "unlink"
            thing, state["at"] = state["at"], None
            if wait:
                yield from srcu.synchronize()
            yield "free"
            memory.free(thing)

        world.task("reader", reader())
        world.task("other", reader())
        world.task("freer", freer())


memory_toy("use-after-free", guarded=False, wait=True)
memory_toy("no-grace", guarded=True, wait=False)
memory_toy("grace", guarded=True, wait=True)


@TOYS.design("double-free", "Both free.")
def double_free(world):
    memory = Memory(world)
    thing = memory.alloc("thing")

    def free():
        yield "free"
        memory.free(thing)

    world.task("one", free())
    world.task("two", free())


@TOYS.design("leak", "Freed only if one comes first.")
def leak(world):
    memory = Memory(world)
    state = {"thing": None}

    def make():
        yield "make"
        state["thing"] = memory.alloc("thing")

    def free():
        yield "free"
        if state["thing"] is not None:
            memory.free(state["thing"])

    world.task("make", make())
    world.task("free", free())


@TOYS.design("refcount", "One put too many.")
def refcount(world):
    refs = Refcount(world, "r", 1)

    def use():
        yield "get"
        refs.get()
        yield "put"
        refs.put()

    def drop():
        yield "put"
        refs.put()

    world.task("user", use())
    world.task("owner", drop())


@TOYS.design("atomic", "Allocates under a spin lock.")
def atomic(world):
    memory = Memory(world, leaks=False)
    spin = Spin(world, "s")

    def work():
        yield from spin.lock()
        yield "allocate"
        memory.alloc("thing")
        spin.unlock()

    world.task("one", work())


@TOYS.design("flush-under-lock", "Waits for a worker that needs the lock that it holds.")
def flush_under_lock(world):
    mutex = Mutex(world, "m")
    worker = Worker(world, "kworker")

    def work():
        yield from mutex.lock()
        mutex.unlock()

    def flusher():
        yield "queue"
        worker.queue(work)
        yield from mutex.lock()
        yield from worker.flush()
        mutex.unlock()

    world.task("flusher", flusher())


EXPECTED = {
    "racy-counter": "sum",
    "locked-counter": None,
    "lock-order": "lock-order",
    "deadlock": "no-deadlock",
    "lost-wake-up": "no-lost-wake-up",
    "waits": None,
    "use-after-free": "no-use-after-free",
    "no-grace": "no-use-after-free",
    "grace": None,
    "double-free": "no-double-free",
    "leak": "no-leak",
    "refcount": "refcount",
    "atomic": "atomic-context",
    "flush-under-lock": "no-deadlock",
}


@pytest.mark.parametrize("slug", TOYS.designs)
def test_each_toy_has_its_verdict_and_its_schedule_replays(slug):
    design = TOYS[slug]
    result = explore(design, bound=2)
    assert (result.verdict, result.property) == (
        "breaks" if EXPECTED[slug] else "holds",
        EXPECTED[slug],
    )
    if result.schedule is not None:
        again = replay(design, result.schedule)
        assert again.broken is not None
        assert (again.broken.property, again.broken.seen or None) == (result.property, result.seen)


def test_a_deadlock_names_its_circle():
    seen = explore(TOYS["flush-under-lock"]).seen
    assert "flusher waits before 'flush kworker' for kworker, held by kworker" in seen
    assert "kworker waits before 'lock m' for m, held by flusher" in seen


def test_random_schedules_never_say_holds():
    assert sample(TOYS["locked-counter"], 20).verdict == "sampled"
    assert sample(TOYS["racy-counter"], 200).property == "sum"
