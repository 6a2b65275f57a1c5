"""`fanwise lab` as a process: verdicts, replays, scenarios in files."""

import json
import re

import pytest

from fanwise.lab import load, names

BREAKS = "freeze/hook-under-protection"
HOLDS = "delete-order/pin-drop-notify"


def test_every_design_is_listed(run):
    status, out, err = run("lab", "list")
    assert (status, err) == (0, "")
    status, lines, err = run("lab", "list", "--json")
    assert (status, err) == (0, "")
    listed = [(row["scenario"], row["design"]) for row in map(json.loads, lines.splitlines())]
    assert listed == [(slug, design) for slug in names() for design in load(slug).designs]
    for slug, design in listed:
        assert f"{slug}: " in out
        assert re.search(rf"^  {design} +\S", out, re.MULTILINE)


def test_a_run_ends_with_a_line_of_json(run):
    status, out, err = run("lab", "run", "--json", HOLDS, BREAKS)
    assert (status, err) == (1, "")
    holds, breaks = map(json.loads, out.splitlines())
    assert (holds["scenario"], holds["design"]) == tuple(HOLDS.split("/"))
    assert (holds["verdict"], holds["property"], holds["schedule"]) == ("holds", None, None)
    assert holds["bounds"]["preemptions"] == 3
    assert holds["schedules"] > 10
    assert holds["states"] > 10
    assert (breaks["verdict"], breaks["property"]) == ("breaks", "no-deadlock")
    status, out, _ = run("lab", "replay", BREAKS, breaks["schedule"], "--json")
    assert status == 1
    *steps, last = map(json.loads, out.splitlines())
    for key in ("scenario", "design", "verdict", "property", "schedule", "seen"):
        assert last[key] == breaks[key]
    assert (last["schedules"], last["steps"]) == (1, len(steps))
    assert last["bounds"]["sampled"] == 1
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert {step["task"] for step in steps} == {"sender", "listener", "freezer"}


def test_bounds_and_samples(run):
    verdicts = {}
    for options in (
        ["--bound", "0"],
        ["--random", "20"],
        ["--pct", "20"],
        ["--plain", "--bound=1"],
        ["--unbounded"],
    ):
        status, out, err = run("lab", "run", "--json", *options, HOLDS)
        assert (status, err) == (0, "")
        verdicts[options[0]] = json.loads(out)
    assert [v["verdict"] for v in verdicts.values()] == [
        "holds",
        "sampled",
        "sampled",
        *["holds"] * 2,
    ]
    assert verdicts["--bound"]["bounds"]["preemptions"] == 0
    assert verdicts["--unbounded"]["bounds"]["preemptions"] is None
    assert verdicts["--random"]["bounds"]["sampled"] == 20
    assert verdicts["--random"]["schedules"] == verdicts["--pct"]["schedules"] == 20
    assert (verdicts["--bound"]["reduced"], verdicts["--plain"]["reduced"]) == (True, False)


def test_what_cannot_be_covered_cannot_be_told(run):
    status, out, _ = run("lab", "run", "--json", "--seconds", "0", HOLDS)
    assert (status, json.loads(out)["verdict"]) == (3, "sampled")


def test_a_replay_says_what_breaks_and_where(run):
    _, out, _ = run("lab", "run", BREAKS)
    command = out.strip().splitlines()[-1].split()
    assert command[:4] == ["fanwise", "lab", "replay", BREAKS]
    status, out, err = run(*command[1:])
    assert (status, err) == (1, "")
    assert "breaks no-deadlock: No task waits for ever." in out
    assert "listener waits before 'start write' for write gate, held by freezer" in out
    assert re.search(r"^ +1 +A sender +start write$", out, re.MULTILINE)


def test_a_replay_that_breaks_nothing_is_fine(run):
    status, out, _ = run("lab", "replay", BREAKS, "A1")
    assert status == 0
    assert "stops here: the schedule ends before its tasks do" in out
    status, out, _ = run("lab", "replay", BREAKS, "A1", "--json")
    last = json.loads(out.splitlines()[-1])
    assert (status, last["verdict"], last["property"]) == (0, "sampled", None)
    assert last["schedule"] == "A1"


# The line that scripts rest on: the same keys, whoever prints it.
KEYS = ("scenario", "design", "verdict", "property", "schedule", "bounds", "schedules", "states")


@pytest.mark.parametrize(
    "command", [["run", BREAKS], ["run", HOLDS, "--random", "5"], ["replay", BREAKS, "A1"]]
)
def test_the_last_line_of_json_has_the_same_keys(run, command):
    _, out, _ = run("lab", *command, "--json")
    assert tuple(json.loads(out.splitlines()[-1]))[: len(KEYS)] == KEYS


def test_diagrams(run):
    schedule = json.loads(run("lab", "run", "--json", BREAKS)[1])["schedule"]
    _, mermaid, _ = run("lab", "replay", BREAKS, schedule, "--mermaid")
    assert mermaid.startswith("sequenceDiagram\n    participant A as sender\n")
    assert "    Note over A: start write<br/>ask the next group\n" in mermaid
    assert "Note over A,C: breaks no-deadlock" in mermaid
    _, chart, _ = run("lab", "replay", BREAKS, schedule, "--chart")
    assert chart.splitlines()[0].split() == ["sender", "listener", "freezer"]


def test_show(run):
    status, out, _ = run("lab", "show", BREAKS)
    assert status == 0
    assert "stateDiagram-v2" in out
    assert "| begin | THAWED | FREEZING |" in out
    assert "Tasks: A sender, B listener, C freezer.\n" in out
    status, out, _ = run("lab", "show", "freeze")
    assert status == 0
    assert "never-a-wrong-byte: An access that is allowed sees the content" in out
    assert "- deadline-workers: " in out


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_new_scenario_runs_as_it_is_and_is_found_by_its_file(run, here):
    status, out, err = run("lab", "new", "my-debate")
    assert (status, err) == (0, "")
    assert out == "wrote my_debate.py; next: fanwise lab run --file my_debate.py\n"
    status, out, err = run("lab", "run", "--file", "my_debate.py", "--json")
    assert (status, err) == (1, "")
    found = {row["design"]: row for row in map(json.loads, out.splitlines())}
    assert found["look-then-take"]["property"] == "no-use-after-free"
    assert found["take-under-lock"]["verdict"] == "holds"
    schedule = found["look-then-take"]["schedule"]
    for target in ("look-then-take", "my-debate/look-then-take"):
        status, out, _ = run("lab", "replay", "--file", "my_debate.py", target, schedule)
        assert status == 1
        assert "breaks no-use-after-free" in out
        status, out, _ = run("lab", "show", "--file", "my_debate.py", target)
        assert (status, "| remove | LISTED | REMOVED |" in out) == (0, True)
    _, out, _ = run("lab", "run", "--file", "my_debate.py", "look-then-take")
    assert f"fanwise lab replay --file my_debate.py look-then-take {schedule}" in out


def test_a_file_needs_no_target(run, here):
    run("lab", "new", "my-debate")
    status, out, err = run("lab", "list", "--file", "my_debate.py")
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "my-debate: My debate"
    assert len(out.split("\n\n")[0].splitlines()) == 3
    status, out, err = run("lab", "show", "--file", "my_debate.py")
    assert (status, err) == (0, "")
    assert "- take-under-lock: " in out


def test_a_new_scenario_does_not_replace_a_file(run, here):
    (here / "my_debate.py").write_text("mine")
    status, _, err = run("lab", "new", "my-debate")
    assert (status, err) == (4, "fanwise: my_debate.py is there already; choose another name\n")
    assert (here / "my_debate.py").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["run", "nix"], 2, "no scenario is called 'nix'; there are "),
        (["run", "freeze/nix"], 2, "scenario freeze has no design 'nix'; there are "),
        (["replay", "freeze", "A1"], 2, "name one: SCENARIO/DESIGN"),
        (["replay", BREAKS, "?"], 2, "'?' is no schedule; it looks like A3B1A2"),
        (["replay", BREAKS, "A99"], 2, "task A cannot do a step here; those that can: "),
        (["replay", BREAKS, "A99"], 2, "; tasks: A sender, B listener, C freezer"),
        (["run", "my_debate.py"], 2, "A scenario in a file is named by --file my_debate.py"),
        (["show"], 2, "Name a SCENARIO or SCENARIO/DESIGN, or a --file"),
        (["replay", BREAKS, "A1", "--json", "--chart"], 2, "exclude each other"),
        (["run", "--random", "1", "--pct", "1"], 2, "exclude each other"),
        (["run", "--unbounded", "--bound", "3"], 2, "--unbounded excludes --bound"),
        (["run", "--unbounded", "--random", "1"], 2, "--unbounded excludes --bound"),
        (["run", "--file", "there-is-none.py"], 2, "there-is-none.py is not a Python file"),
        (["new", "1st"], 2, "'1st' is no name for a Python module"),
    ],
)
def test_wrong_usage(run, here, arguments, status, said):
    found, _, err = run("lab", *arguments)
    assert (found, said in err) == (status, True), err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\nx = (\n", "wrong.py:2: SyntaxError: '(' was never closed"),
        ("\n\n1 / 0\n", "wrong.py:3: ZeroDivisionError: division by zero"),
        ("SCENARIO = 1\n", "wrong.py defines no SCENARIO"),
    ],
)
def test_a_wrong_file_is_told_with_the_line(run, here, text, said):
    (here / "wrong.py").write_text(text)
    status, _, err = run("lab", "run", "--file", "wrong.py")
    assert status in (2, 4)
    assert said in err
    assert "Traceback" not in err


MODEL = """
from fanwise.lab import Mutex, Scenario

SCENARIO = Scenario("wrong", "Wrong", "", {"p": "It."})


@SCENARIO.design("fine", "Fine.")
def fine(world):
    def task():
        yield "step"

    world.task("one", task())


@SCENARIO.design("wrong", "Wrong.")
def wrong(world):
    lock = Mutex(world, "lock")

    def task():
        yield "step"
        WRONG

    BUILD
"""


@pytest.mark.parametrize(
    ("wrong", "build", "status", "said"),
    [
        ("nonsense()", 'world.task("one", task())', 1, "name 'nonsense' is not defined (wrong.py:"),
        ("pass", "nonsense()", 4, "wrong/wrong: the model cannot be built: NameError"),
        ("pass", "nonsense()", 4, "name 'nonsense' is not defined (wrong.py:23)"),
        ("pass", 'world.task("one", task)', 4, "task 'one' is a function; a task is a generator"),
        ("pass", "pass", 4, "wrong/wrong: the model has no task; make some with world.task("),
        ("yield 1", 'world.task("one", task())', 4, "task 'one' yields 1; a task yields the name"),
    ],
)
def test_a_wrong_model_is_told_with_its_design_and_line(run, here, wrong, build, status, said):
    (here / "wrong.py").write_text(MODEL.replace("WRONG", wrong).replace("BUILD", build))
    found, out, err = run("lab", "run", "--file", "wrong.py")
    assert (found, said in out + err) == (status, True), out + err
    assert out.startswith("wrong/fine: holds\n")
    assert "Traceback" not in err
