"""The explorer: schedulers, bounds, figures, hidden nondeterminism, shrinking, what it prints."""

import json
import random
import re
import threading
from pathlib import Path

import pytest

from fanwise.lab import (
    DepthFirst,
    ModelError,
    Mutex,
    NoSuchDesign,
    Pct,
    RandomWalk,
    RoundRobin,
    Scenario,
    Scheduler,
    WrongSchedule,
    draw,
    explore,
    load,
    load_file,
    parse,
    render,
    replay,
    sample,
    summary,
    tell,
)
from fanwise.lab._schedule import switches
from fanwise.lifetime import Until


def design_of(build, **properties):
    scenario = Scenario("case", "A case", "", properties or {"p": "It holds."})
    scenario.design("it", "It.")(build)
    return scenario["it"]


def steps(*counts):
    """A design of tasks that do so many steps each, and nothing else."""

    def build(world):
        def task(count):
            for _ in range(count):
                yield "step"

        for at, count in enumerate(counts):
            world.task(f"t{at}", task(count))

    return design_of(build)


# How many ways there are to interleave them: 3 of 3 and 3 is (6 over 3), and so on.
@pytest.mark.parametrize(
    ("counts", "bound", "schedules"),
    [((3, 3), None, 20), ((2, 2, 2), None, 90), ((3, 3), 0, 2), ((3, 3), 1, 6), ((1, 1, 1), 0, 6)],
)
def test_the_plain_search_runs_each_schedule_once(counts, bound, schedules):
    design = steps(*counts)
    result = explore(design, bound=bound, reduce=False)
    assert (result.verdict, result.schedules) == ("holds", schedules)
    assert result.steps == schedules * sum(counts)
    slow = sample(design, scheduler=DepthFirst(bound))
    assert (slow.verdict, slow.schedules) == ("sampled", schedules)
    assert explore(design, bound=bound).schedules <= schedules


def racy(tasks=3):
    def build(world):
        state = {"n": 0}

        def add():
            yield "begin"
            yield "read"
            n = state["n"]
            yield "write"
            state["n"] = n + 1
            world.count("writes")
            world.case("write", "lost" if state["n"] == n else "kept")

        for at in range(tasks):
            world.task(f"t{at}", add())
        world.at_end("sum", lambda: state["n"] == tasks)

    return design_of(build, sum="Nothing is lost.")


def test_figures_and_cases_are_told():
    def build(world):
        state = {"n": 0}

        def one():
            yield "look"
            if state["n"]:
                world.count("late")
            world.case("look", "late" if state["n"] else "early")

        def two():
            yield "set"
            state["n"] = 1
            world.count("set", 3)

        world.task("one", one())
        world.task("two", two())

    result = explore(design_of(build))
    assert result.counts == {"late": (0, 1), "set": (3, 3)}
    assert result.cases == {"look": ["early", "late"]}
    assert "late: 0 to 1" in summary(result)
    assert "look: 2 cases: early, late" in summary(result)


def test_the_first_failure_found_takes_the_fewest_preemptions():
    result = explore(racy())
    # A reads, B reads and writes, A writes: one preemption; the third task is left to the end.
    assert result.schedule == "A2B3A1C3"
    assert switches(parse(result.schedule)) == 3


@pytest.mark.parametrize(
    "scheduler",
    [RandomWalk(500, seed=3), Pct(500, depth=2, seed=3), Pct(500, seed=4), DepthFirst(1)],
)
def test_every_scheduler_finds_the_race(scheduler: Scheduler):
    result = sample(racy(), scheduler=scheduler)
    assert (result.verdict, result.property) == ("breaks", "sum")
    assert replay(racy(), result.schedule).broken.property == "sum"


def test_round_robin_takes_turns():
    done = sample(steps(2, 2, 1), scheduler=RoundRobin())
    assert done.schedules == 1
    assert sample(racy(2), scheduler=RoundRobin()).schedule is not None
    assert sample(racy(2), scheduler=RoundRobin(3)).verdict == "sampled"


def test_random_draws_are_those_of_the_seed():
    one, two = (sample(racy(), 50, seed=7).schedule for _ in range(2))
    assert one == two


def test_a_failure_is_shrunk_and_breaks_the_same():
    def build(world):
        state = {"armed": False, "n": 0}

        def noise():
            for _ in range(4):
                yield "noise"
                state["n"] += 1

        def arm():
            yield "one"
            yield "arm"
            state["armed"] = True
            yield "disarm"
            state["armed"] = False

        def look():
            yield "look"
            world.check("p", not state["armed"], "it is armed")

        world.task("noise", noise())
        world.task("arm", arm())
        world.task("other", noise())
        world.task("look", look())

    design = design_of(build)
    for seed in range(20):
        result = sample(design, 2000, seed=seed)
        assert (result.schedule, result.property, result.seen) == ("B2D1", "p", "it is armed")
    assert explore(design).schedule == "B2D1"


def test_steps_without_end_are_not_called_exhaustive():
    def build(world):
        state = {"n": 0}

        def runs():
            while True:
                yield "count"
                state["n"] += 1

        world.task("runs", runs())
        world.task("one", one())

    def one():
        yield "once"

    for reduce in (True, False):
        result = explore(design_of(build), bound=1, steps=50, reduce=reduce)
        assert result.verdict == "sampled"
        assert "a limit" in summary(result)


def test_a_circle_of_states_ends_when_states_are_kept():
    def build(world):
        state = {"flag": False}

        def spins():
            while not state["flag"]:
                yield "look"

        def sets():
            yield "set"
            state["flag"] = True

        world.task("spins", spins())
        world.task("sets", sets())

    assert explore(design_of(build)).verdict == "holds"
    assert explore(design_of(build), bound=None).verdict == "holds"


def test_a_limit_of_time_is_not_called_exhaustive():
    result = explore(steps(7, 7, 7), bound=None, reduce=False, seconds=0.01)
    assert result.verdict == "sampled"


LEFT = []


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("what", ["random", "left", "address"])
def test_hidden_nondeterminism_is_a_failure_of_its_own(what, reduce):
    LEFT.clear()

    class Thing:
        pass

    def build(world):
        # So many that two models beside each other do not have them in one order.
        things = {Thing(): name for name in ["a", "b", "c", "d"] * 50}
        state = {"n": 0}

        def task():
            yield "one"
            if what == "random":
                state["n"] = int(random.random() > 0.5)
            elif what == "left":
                LEFT.append(1)
                state["n"] = len(LEFT)
            else:
                order = "".join(things[thing] for thing in set(things))
                state["n"] = sum(order[:100].encode()) % 2
            if state["n"] in ("a", 1):
                yield "two"

        world.task("one", task())
        world.task("two", task())
        world.task("three", task())

    result = explore(design_of(build), bound=2, reduce=reduce, twice=1)
    assert (result.verdict, result.property) == ("breaks", "deterministic")
    assert "twice" in result.seen or "again" in result.seen
    LEFT.clear()
    assert sample(design_of(build), 30, twice=1).property == "deterministic"


def test_what_cannot_be_keyed_runs_without_pruning_and_says_so():
    def build(world):
        lock = threading.Lock()

        def task():
            for _ in range(2):
                yield "step"
                lock.acquire()
                lock.release()

        world.task("one", task())
        world.task("two", task())

    result = explore(design_of(build), bound=None)
    assert (result.verdict, result.schedules, result.reduced) == ("holds", 6, False)
    assert "_thread.lock" in result.not_keyed
    assert "without pruning: the state of a _thread.lock" in summary(result)


def test_a_model_that_cannot_be_built_says_so():
    def build(world):
        world.task("one", one())
        world.task("one", one())

    def one():
        yield "once"

    with pytest.raises(ModelError, match="two tasks are called 'one'"):
        explore(design_of(build))
    with pytest.raises(ModelError, match="two tasks are called 'one'"):
        sample(design_of(build), 1)


def test_a_property_must_be_declared():
    def build(world):
        world.task("one", one())
        world.at_end("unheard-of", lambda: False)

    def one():
        yield "once"

    with pytest.raises(ModelError, match="'unheard-of' is not declared"):
        explore(design_of(build))


def test_a_task_yields_names_of_steps():
    def build(world):
        world.task("one", one())

    def one():
        yield "once"
        yield 7

    for reduce in (True, False):
        with pytest.raises(ModelError, match="task 'one' yields 7"):
            explore(design_of(build), reduce=reduce)


def test_schedules_are_short_strings():
    picks = [0, 0, 0, 1, 0, 2, 2, 27]
    assert render(picks) == "A3B1A1C2b1"
    assert parse("A3B1A1C2b1") == picks
    assert parse("A3BAC2b") == picks
    for wrong in ("3A", "A-1", "A1 B1", "A1é1", "A999999"):
        with pytest.raises(WrongSchedule):
            parse(wrong)


def test_a_schedule_that_cannot_be_followed_says_where():
    with pytest.raises(WrongSchedule, match=r"step 4: task A cannot do a step here.*those .* B, C"):
        replay(racy(), "A5")
    with pytest.raises(WrongSchedule, match="step 1: task Z"):
        replay(racy(), "Z1")


def test_a_schedule_is_told_step_by_step():
    result = explore(racy(2))
    done = replay(racy(2), result.schedule)
    text = tell(racy(2), done)
    assert text.startswith(
        "case/it A2B3A1\n   1  A t0  begin\n   2  A t0  read\n   3  B t1  begin\n"
    )
    assert text.endswith("breaks sum: Nothing is lost.\n")
    diagram = draw(racy(2), done)
    assert diagram.splitlines() == [
        "sequenceDiagram",
        "    participant A as t0",
        "    participant B as t1",
        "    Note over A: begin<br/>read",
        "    Note over B: begin<br/>read<br/>write",
        "    Note over A: write",
        "    Note over A,B: breaks sum",
    ]
    assert "stops here" in tell(racy(2), replay(racy(2), "A1"))
    assert "nothing broke" in tell(racy(2), replay(racy(2), "A3B3"))


def test_notes_are_told_where_they_were_made():
    def build(world):
        def one():
            yield "look"
            world.note("it is # 3; <so>")

        world.task("one", one())
        world.task("two", one())

    done = replay(design_of(build), "A1B1")
    assert "- it is # 3; <so>" in tell(design_of(build), done)
    assert "(it is #35; 3#59; #lt;so#gt;)" in draw(design_of(build), done)


def test_a_result_is_json_of_the_fields_that_are_promised():
    found = json.loads(explore(racy()).json())
    assert list(found)[:8] == [
        "scenario",
        "design",
        "verdict",
        "property",
        "schedule",
        "bounds",
        "schedules",
        "states",
    ]
    assert found["bounds"]["preemptions"] == 3


def test_the_task_that_runs_is_current():
    seen = []

    def build(world):
        def one(name):
            world.check("p", world.current() == name)
            yield "step"
            world.check("p", world.current() == name)
            world.spawn(f"{name}'s child", child(f"{name}'s child"))
            world.check("p", world.current() == name)
            yield Until("wait", lambda: world.current() == "")

        def child(name):
            world.check("p", world.current() == name)
            yield "step"
            world.check("p", world.current() == name)

        seen.append(world.current())
        world.task("a", one("a"))
        world.task("b", one("b"))
        world.always("p", lambda: world.current() == "")

    for reduce in (True, False):
        assert explore(design_of(build), reduce=reduce).verdict == "holds"
    assert set(seen) == {""}


def test_what_is_left_behind_runs_no_checks():
    def build(world):
        mutex = Mutex(world, "m")

        def one():
            with (yield from mutex.lock()), world.atomic():
                yield "inside"
                world.check("p", False)

        world.task("one", one())
        world.task("two", one())

    assert explore(design_of(build)).property == "p"


def test_scenarios_in_files(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from fanwise.lab import Scenario\nSCENARIO = Scenario('mine', '', '', {})\n")
    assert load_file(path).slug == "mine"
    with pytest.raises(NoSuchDesign, match="has no design 'x'"):
        _ = load_file(path)["x"]
    path.write_text("x = 1\n")
    with pytest.raises(NoSuchDesign, match="defines no SCENARIO"):
        load_file(path)
    with pytest.raises(NoSuchDesign, match="is not a Python file"):
        load_file(tmp_path / "none.py")
    with pytest.raises(NoSuchDesign, match="no scenario is called 'none'"):
        load("none")


def test_the_example_of_the_page_does_what_it_says(capsys):
    page = (Path(__file__).parents[2] / "docs/lab.md").read_text()
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], {})
    said = re.search(r"# (breaks .*)", page)[1]
    assert capsys.readouterr().out.startswith(f"{said}\n")


def test_a_task_that_cannot_be_ended_early_is_told():
    def build(world):
        def one():
            try:
                yield "begin"
            finally:
                yield "clean up"

        world.task("one", one())
        world.task("two", one())

    for reduce in (True, False):
        with pytest.raises(ModelError, match=r"task '.*' cannot end before 'begin'.*ignored Gen"):
            explore(design_of(build), reduce=reduce, steps=1)


class Thing:
    def __init__(self):
        self.n = 0


def test_sets_of_objects_that_look_alike_are_not_taken_for_nondeterminism():
    def build(world):
        things = {Thing() for _ in range(20)}

        def one():
            yield "count"
            world.check("p", not any(thing.n for thing in things), repr(Thing()))
            yield "change"
            for thing in things:
                thing.n += 1

        world.task("one", one())
        world.task("two", one())

    design = design_of(build)
    # The second one that counts sees what the first has changed.
    result = explore(design, twice=1)
    assert result.property == "p"
    assert result.seen.endswith("Thing object at 0x>")
    assert result.not_keyed is None
