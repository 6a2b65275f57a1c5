"""Every misuse of the primitives is found, and right use is not."""

import pytest

from fanwise.lab import (
    Memory,
    Mutex,
    Refcount,
    RwLock,
    Scenario,
    Spin,
    Srcu,
    WaitQueue,
    Worker,
    explore,
    replay,
)
from fanwise.lifetime import Lifetime, Steps, Until

CASES = {}


def case(prop):
    def add(build):
        CASES[build.__name__] = (build, prop)
        return build

    return add


def task(world, name, *work):
    """A task of which each function is one step; what is a generator is done in its steps."""

    def body():
        for do in work:
            made = do()
            if hasattr(made, "send"):
                yield from made
            elif do is not work[-1]:
                yield "next"

    def first():
        yield "begin"
        yield from body()

    world.task(name, first())


@case("lock-order")
def releases_what_another_holds(world):
    mutex = Mutex(world, "m")
    task(world, "one", mutex.lock, lambda: None, mutex.unlock)
    task(world, "two", mutex.unlock)


@case("lock-order")
def ends_with_a_lock(world):
    mutex = Mutex(world, "m")
    task(world, "one", mutex.lock)


@case("no-deadlock")
def takes_a_lock_twice(world):
    mutex = Mutex(world, "m")
    task(world, "one", mutex.lock, mutex.lock)


@case(None)
def try_lock_asks_no_order(world):
    a, b = Mutex(world, "a"), Mutex(world, "b")

    def other():
        if a.try_lock():
            a.unlock()

    task(world, "one", a.lock, b.lock, b.unlock, a.unlock)
    task(world, "two", b.lock, other, b.unlock)


@case("lock-order")
def three_locks_in_a_circle(world):
    locks = [Mutex(world, name) for name in "abc"]
    for at in range(3):
        one, two = locks[at], locks[(at + 1) % 3]
        task(world, f"t{at}", one.lock, two.lock, two.unlock, one.unlock)


@case("atomic-context")
def sleeps_under_a_spin_lock(world):
    spin, mutex = Spin(world, "s"), Mutex(world, "m")
    task(world, "one", spin.lock, mutex.lock)


@case("atomic-context")
def waits_for_readers_in_atomic_context(world):
    srcu = Srcu(world, "srcu")

    def body():
        yield "begin"
        with world.atomic():
            yield from srcu.synchronize()

    world.task("one", body())


@case(None)
def allocates_atomically_under_a_spin_lock(world):
    spin, memory = Spin(world, "s"), Memory(world)

    def body():
        yield from spin.lock()
        thing = memory.alloc("thing", may_sleep=False)
        yield "free"
        memory.free(thing)
        spin.unlock()
        yield "allocate"
        memory.free(memory.alloc("another"))

    world.task("one", body())
    world.task("two", body())


@case(None)
def readers_and_writers(world):
    lock = RwLock(world, "rw")
    seen = {"readers": 0, "writers": 0}

    def reader():
        yield from lock.read()
        seen["readers"] += 1
        yield "leave"
        seen["readers"] -= 1
        lock.unlock()

    def writer():
        yield from lock.write()
        seen["writers"] += 1
        yield "leave"
        seen["writers"] -= 1
        lock.unlock()

    world.task("r1", reader())
    world.task("r2", reader())
    world.task("w", writer())
    world.always("p", lambda: seen["writers"] == 0 or seen["readers"] == 0)


@case("no-deadlock")
def a_reader_reads_again_behind_a_writer(world):
    lock = RwLock(world, "rw")
    task(world, "reader", lock.read, lock.read, lock.unlock, lock.unlock)
    task(world, "writer", lock.write, lock.unlock)


@case(None)
def a_reader_reads_again_where_readers_go_first(world):
    lock = RwLock(world, "rw", fair=False)
    task(world, "reader", lock.read, lock.read, lock.unlock, lock.unlock)
    task(world, "writer", lock.write, lock.unlock)


class Thing:
    def __init__(self):
        self.name, self.value = "thing", 1


@case("no-use-after-free")
def an_object_is_used_after_it_was_freed(world):
    memory = Memory(world)
    thing = memory.alloc(Thing())

    def write():
        thing.value = 2

    task(world, "free", lambda: memory.free(thing))
    task(world, "write", write)
    world.always("p", lambda: thing.value)  # predicates may look


@case("no-use-after-free")
def use_says_so_too(world):
    memory = Memory(world)
    thing = memory.alloc("thing")
    task(world, "free", lambda: memory.free(thing))
    task(world, "use", lambda: memory.use(thing))


@case("refcount")
def a_reference_from_zero(world):
    refs = Refcount(world, "r")
    task(world, "put", refs.put)
    task(world, "get", refs.get)


@case("refcount")
def a_reference_too_few(world):
    refs = Refcount(world, "r")
    task(world, "one", refs.put)
    task(world, "two", refs.put)


@case(None)
def a_reference_unless_it_is_gone(world):
    memory = Memory(world)
    thing = memory.alloc("thing", value=1)
    refs = Refcount(world, "r", on_zero=lambda: memory.free(thing))

    def user():
        yield "get"
        if not refs.get_not_zero():
            return
        yield "use"
        assert thing.value == 1
        refs.put()

    world.task("one", user())
    world.task("two", user())
    task(world, "owner", refs.put)


@case("no-deadlock")
def waits_for_itself_as_a_reader(world):
    srcu = Srcu(world, "srcu")
    task(world, "one", srcu.read_lock, srcu.synchronize)


@case("lock-order")
def leaves_twice(world):
    srcu = Srcu(world, "srcu")

    def body():
        yield "in"
        inside = srcu.read_lock()
        yield "out"
        srcu.read_unlock(inside)
        yield "out again"
        srcu.read_unlock(inside)

    world.task("one", body())


@case("lock-order")
def never_leaves(world):
    srcu = Srcu(world, "srcu")
    task(world, "one", srcu.read_lock)


@case("no-deadlock")
def a_reader_waits_for_who_waits_for_readers(world):
    srcu, mutex = Srcu(world, "srcu"), Mutex(world, "m")

    def reader():
        yield "in"
        inside = srcu.read_lock()
        yield from mutex.lock()
        mutex.unlock()
        srcu.read_unlock(inside)

    world.task("reader", reader())
    task(world, "writer", mutex.lock, srcu.synchronize, mutex.unlock)


@case("no-lost-wake-up")
def changes_and_does_not_wake(world):
    queue, state = WaitQueue(world, "q"), {"n": 0}

    def change():
        state["n"] = 1

    world.task("waiter", queue.wait(lambda: state["n"]))
    task(world, "changer", change)


@case("no-deadlock")
def nobody_ever_wakes(world):
    world.task("waiter", WaitQueue(world, "q").wait(lambda: False))


@case("no-lost-wake-up")
def one_is_woken_where_two_wait(world):
    queue, state = WaitQueue(world, "q"), {"n": 0}

    def change():
        state["n"] = 1
        queue.wake_one()

    world.task("one", queue.wait(lambda: state["n"]))
    world.task("two", queue.wait(lambda: state["n"]))
    task(world, "changer", change)


@case(None)
def work_is_done_once_and_flushed(world):
    worker, state = Worker(world, "kworker"), {"done": 0, "queued": 0}

    def work():
        yield "work"
        state["done"] += 1

    def queues():
        state["queued"] += worker.queue(work)

    def check():
        world.check("p", state["done"] >= 1)

    task(world, "one", queues, worker.flush, check)
    task(world, "two", queues)
    world.at_end("p", lambda: worker.idle() and state["done"] == state["queued"])


@case("no-deadlock")
def a_worker_that_never_ends_its_work(world):
    worker = Worker(world, "kworker")

    def work():
        yield Until("never", lambda: False)

    task(world, "one", lambda: worker.queue(work))


LIFE = Lifetime("Life", states=("NEW", "OLD"), transitions={"age": "NEW -> OLD"})


@case("declared-lifetimes")
def a_transition_that_is_not_declared(world):
    thing = Thing()
    LIFE.start(thing)
    task(world, "one", lambda: LIFE.advance(thing, "age"))
    task(world, "two", lambda: LIFE.advance(thing, "age"))


@case("no-crash")
def an_error_that_nobody_expects(world):
    task(world, "one", lambda: {}["missing"])


PROTOCOL = Steps("Protocol", {"one": "one is done", "two": "two is done"})


@case("p")
def the_steps_of_a_run_are_interleaved(world):
    state = {"n": 0}

    @PROTOCOL
    def add():
        yield "one"
        n = state["n"]
        yield PROTOCOL.until("two", lambda: True)
        state["n"] = n + 1

    world.task("a", add())
    world.task("b", add())
    world.at_end("p", lambda: state["n"] == 2)


@case("no-deadlock")
def a_task_that_waits_for_ever(world):
    world.task("one", iter_until(lambda: False))


@case(None)
def a_daemon_that_waits_for_ever(world):
    world.task("one", iter_until(lambda: False), daemon=True)
    task(world, "two", lambda: None)


def iter_until(ready):
    yield Until("wait", ready)


@case("no-leak")
def a_task_made_by_a_task_leaks(world):
    memory = Memory(world)

    def child():
        yield "allocate"
        memory.alloc("thing")

    def parent():
        yield "spawn"
        world.spawn("child", child())
        yield "go on"

    world.task("parent", parent())


def design_of(build):
    scenario = Scenario("case", "A case", "", {"p": "It holds."})
    scenario.design("it", "It.")(build)
    return scenario["it"]


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_misuse_is_found_and_replayed(name, reduce):
    build, prop = CASES[name]
    design = design_of(build)
    result = explore(design, bound=2, reduce=reduce, twice=4)
    assert (result.verdict, result.property, result.not_keyed) == (
        "breaks" if prop else "holds",
        prop,
        None,
    )
    if prop:
        again = replay(design, result.schedule).broken
        assert (again.property, again.seen) == (result.property, result.seen or "")


def test_a_circle_is_named_through_a_grace_period():
    seen = explore(design_of(a_reader_waits_for_who_waits_for_readers)).seen
    assert "reader waits before 'lock m' for m, held by writer" in seen
    assert "writer waits before 'synchronize srcu' for srcu, held by reader" in seen
