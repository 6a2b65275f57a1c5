"""Lab: designs as models, and an explorer that runs their interleavings.

from fanwise.lab import Mutex, Scenario, World, explore

SCENARIO = Scenario("counter", "A counter", "Two tasks add.", {"sum": "Nothing is lost."})

@SCENARIO.design("racy", "Read, then write.")
def racy(world):
    state = {"n": 0}

    def add():
        yield "read"
        n = state["n"]
        yield "write"
        state["n"] = n + 1

    for name in ("one", "two", "three"):
        world.task(name, add())
    world.at_end("sum", lambda: state["n"] == 3)

print(explore(SCENARIO["racy"]).schedule)   # replays the loss
"""

from ._explore import BOUND, explore, replay, replayed, sample
from ._follow import Followed, Told
from ._pages import chart, design_markdown, scenario_markdown, tasks
from ._result import Bounds, Result
from ._scenario import Design, NoSuchDesign, Scenario, find, load, load_file, names
from ._schedule import WrongSchedule, parse, render
from ._schedulers import DepthFirst, Pct, RandomWalk, Replay, RoundRobin, Scheduler
from ._telling import draw, summary, tell
from ._template import template
from ._world import STANDARD, Broken, ModelError, World
from .locks import Mutex, RwLock, Spin
from .memory import Block, Memory, Refcount
from .waiting import Srcu, WaitQueue, Worker

__all__ = [
    "BOUND",
    "STANDARD",
    "Block",
    "Bounds",
    "Broken",
    "DepthFirst",
    "Design",
    "Followed",
    "Memory",
    "ModelError",
    "Mutex",
    "NoSuchDesign",
    "Pct",
    "RandomWalk",
    "Refcount",
    "Replay",
    "Result",
    "RoundRobin",
    "RwLock",
    "Scenario",
    "Scheduler",
    "Spin",
    "Srcu",
    "Told",
    "WaitQueue",
    "Worker",
    "World",
    "WrongSchedule",
    "chart",
    "design_markdown",
    "draw",
    "explore",
    "find",
    "load",
    "load_file",
    "names",
    "parse",
    "render",
    "replay",
    "replayed",
    "sample",
    "scenario_markdown",
    "summary",
    "tasks",
    "tell",
    "template",
]
