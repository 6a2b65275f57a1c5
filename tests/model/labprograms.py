"""Little programs over shared variables: as models of the lab, and run by brute force beside it.

A program is a list of tasks, a task is a list of operations, and each operation is one step. The
brute force copies its state and knows nothing of generators, keys or replays.
"""

from hypothesis import strategies as st

from fanwise.lab import Scenario
from fanwise.lifetime import Until

VARIABLES = "xyz"
variables = st.sampled_from(VARIABLES)
operations = st.one_of(
    st.tuples(st.just("set"), variables, st.integers(0, 2)),
    st.tuples(st.just("load"), variables),  # into the task's own register
    st.tuples(st.just("store"), variables),  # the register, plus one
    st.tuples(st.just("wait"), variables, st.integers(0, 2)),
    st.tuples(st.just("never"), variables, st.integers(0, 3)),  # the property
    st.tuples(st.just("again"), variables, st.integers(1, 2)),  # add one, so often
    st.tuples(st.just("stop"), variables),  # the task ends here if it is zero
    st.tuples(st.just("spawn"), variables),  # a task that adds one
)
programs = st.lists(st.lists(operations, min_size=1, max_size=4), min_size=2, max_size=3)


def design(program):
    """Make a design of a program: breaks `never`, or tells the states in which it can end."""
    scenario = Scenario("program", "A program", repr(program), {"never": "It is never so."})

    @scenario.design("it", "It.")
    def build(world):
        state = dict.fromkeys(VARIABLES, 0)
        spawned = []

        def again(name, times):
            # What counts is on the frame's stack alone: the values are all the same.
            for _ in [0] * times:
                yield "again"
                state[name] += 1

        def add(name):
            yield "add"
            state[name] += 1

        def task(body):
            register = 0
            for op, name, *more in body:
                if op == "again":
                    yield from again(name, *more)
                    continue
                if op == "wait":
                    yield Until(op, lambda name=name, value=more[0]: state[name] == value)
                else:
                    yield op
                if op == "set":
                    state[name] = more[0]
                elif op == "load":
                    register = state[name]
                elif op == "store":
                    state[name] = register + 1
                elif op == "never":
                    world.check("never", state[name] != more[0])
                elif op == "spawn":
                    spawned.append(name)
                    world.spawn(f"{name}{len(spawned)}", add(name))
                elif op == "stop" and not state[name]:
                    world.count("stops")
                    return

        for number, body in enumerate(program):
            world.task(f"t{number}", task(body), daemon=True)

        def end():
            world.case("end", repr(sorted(state.items())))
            return True

        world.at_end("never", end)

    return scenario["it"]


def brute(program, bound):
    """Return whether `never` can break, every end, and how many stops there are at the ends."""
    flat = [[] for _ in program]
    for steps, body in zip(flat, program, strict=True):
        for op, name, *more in body:
            steps += [("add", name)] * more[0] if op == "again" else [(op, name, *more)]
    ends, seen, counts = set(), set(), set()
    broken = False
    start = (
        tuple((name, 0) for name in VARIABLES),
        tuple((tuple(steps), 0) for steps in flat),
        -1,
        bound,
        0,
    )
    todo = [start]
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        shared, tasks, last, left, stops = at
        state = dict(shared)
        enabled = [
            i
            for i, (steps, _) in enumerate(tasks)
            if steps and not (steps[0][0] == "wait" and state[steps[0][1]] != steps[0][2])
        ]
        if not enabled:
            ends.add(repr(sorted(state.items())))
            counts.add(stops)
        for i in enabled:
            stopped = stops
            cost = last in enabled and i != last
            if cost and left == 0:
                continue
            now, more = dict(state), list(tasks)
            steps, register = tasks[i]
            (op, name, *rest), steps = steps[0], steps[1:]
            if op == "set":
                now[name] = rest[0]
            elif op == "load":
                register = now[name]
            elif op == "store":
                now[name] = register + 1
            elif op == "add":
                now[name] += 1
            elif op == "spawn":
                more.append(((("add", name),), 0))
            elif op == "stop" and not now[name]:
                steps = ()
                stopped += 1
            if op == "never" and now[name] == rest[0]:
                broken = True
                continue
            more[i] = (steps, register)
            spent = None if left is None else left - cost
            todo.append((tuple(sorted(now.items())), tuple(more), i, spent, stopped))
    return broken, ends, counts
