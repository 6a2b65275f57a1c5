"""What bench/lab.py measures: the toy, a design's verdict, its search in both ways.

Figures that were measured are kept by what measured them: the code of this module, of the explorer,
and of what models run. Figures of other code are measured again.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import fanwise
from bench._harness import Json
from fanwise.lab import Design, Memory, Refcount, Result, Scenario, World, explore

BOUNDS = (0, 1, 2, 3, 4, 5, 6, None)
DOUBT = 1.25  # the growth so far foretells it that well
ROOMS = ("lifetime.py", "lab", "notify", "vfs")
TELLING = ("_pages.py", "_telling.py", "_template.py")  # of the lab; they only show results
TOYS = Scenario("toy", "An entry is opened while it is removed", "", {"linked": "It is linked."})


@TOYS.design("plain", "Nothing is watched.")
def plain(world: World) -> None:
    entry = {"freed": False, "linked": True, "refs": 0}

    def opener() -> Any:
        yield "begin"
        yield "look up"
        if not entry["linked"]:
            return
        yield "get"
        if entry["freed"]:
            return
        entry["refs"] += 1
        yield "call back"
        yield "put"
        entry["refs"] -= 1

    def remover() -> Any:
        yield "begin"
        yield "unlink"
        entry["linked"] = False
        yield "check"
        if entry["refs"]:
            return
        yield "free"
        entry["freed"] = True

    world.task("one", opener())
    world.task("two", opener())
    world.task("remover", remover())


@TOYS.design("checked", "Memory and references are watched, and properties.")
def checked(world: World) -> None:
    memory = Memory(world)
    entry = memory.alloc("entry", linked=True)
    state = {"entry": entry, "freed": False}
    refs = Refcount(world, "entry", on_zero=lambda: memory.free(entry))

    def opener() -> Any:
        yield "begin"
        yield "look up"
        if not state["entry"]:
            return
        yield "get"
        if not refs.get_not_zero():
            return
        yield "call back"
        world.check("linked", entry.name == "entry")
        yield "put"
        refs.put()

    def remover() -> Any:
        yield "begin"
        yield "unlink"
        entry.linked = False
        yield "forget"
        state["entry"] = None
        yield "put"
        refs.put()

    world.task("one", opener())
    world.task("two", opener())
    world.task("remover", remover())
    world.always("linked", lambda: refs.value >= 0)
    world.always("linked", lambda: memory.freed(entry) == (refs.value == 0))
    world.at_end("linked", lambda: not entry.linked)


def timed(design: Design, **how: Any) -> tuple[Result, float]:
    start = time.process_time()
    result = explore(design, **how)
    return result, time.process_time() - start


def speed(slug: str, spend: float) -> Json:
    steps = schedules = 0
    spent = 0.0
    how = {"twice": None} if slug == "plain" else {}
    while spent < spend:
        result, took = timed(TOYS[slug], bound=None, reduce=False, **how)
        if result.verdict != "holds":
            raise RuntimeError(f"the toy breaks: {result}")
        steps, schedules, spent = steps + result.steps, schedules + result.schedules, spent + took
    return {
        "steps_per_s": steps / spent,
        "schedules_per_s": schedules / spent,
        "steps_per_schedule": steps / schedules,
    }


def reduction(design: Design, seconds: float) -> Json:
    """The whole search with and without, at the largest bound that it ends at without."""
    found: Json = {}
    steps: list[int] = []
    for bound in BOUNDS:
        if found and (takes := growth(steps) * found["seconds_without"]) > DOUBT * seconds:
            found["next_bound"] = f"{takes:.0f} s by growth"
            break
        # Nothing is run twice, so that the search without gets as far as it can.
        without, spent = timed(
            design, bound=bound, reduce=False, keep_going=True, seconds=seconds, twice=None
        )
        if spent > seconds:
            found["next_bound"] = f"ended after {spent:.0f} s"
            break
        steps.append(without.steps)
        found = {
            "compared_at": "none" if bound is None else str(bound),
            "steps_without": without.steps,
            "states_without": without.states,
            "schedules_without": without.schedules,
            "seconds_without": spent,
        }
        compared, verdict = bound, without.verdict
        if len(steps) > 1 and steps[-1] == steps[-2]:  # no schedule has that many preemptions
            found["compared_at"] = "none"
            break
    if "compared_at" in found:
        reduced, spent = timed(design, bound=compared, keep_going=True)
        found["steps_with"], found["states_with"] = reduced.steps, reduced.states
        found["seconds_with"] = spent
        found["cut"] = found["steps_without"] / max(reduced.steps, 1)
        if reduced.verdict != verdict:
            raise RuntimeError(f"{design.name}: the reduction changes the verdict")
    return found


def growth(steps: list[int]) -> float:
    """How many times the steps of this bound the next one takes, by the bounds before.

    Schedules with k preemptions are about (places choose k), so each growth is about k / (k + 1)
    of the one before it.
    """
    k = len(steps) - 1
    return 0.0 if k < 1 else steps[k] / steps[k - 1] * k / (k + 1)


def verdict(design: Design) -> Json:
    """The search at a bound of three preemptions, as a user runs it."""
    began = time.monotonic()
    result, spent = timed(design, bound=3)
    figures: Json = {
        "verdict": f"{result.verdict} {result.property or ''}".strip(),
        "seconds": spent,
        "wall_s": time.monotonic() - began,
        "states": result.states,
        "steps": result.steps,
        "schedules": result.schedules,
    }
    if result.not_keyed:
        figures["not_keyed"] = result.not_keyed
    return figures


class Kept:
    """Figures of a run that may be ended, a line each; those of other code are not used."""

    def __init__(self, path: Path) -> None:
        self.path, self.code = path, digest()
        self.found: dict[str, list[Json]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                if entry["code"] == self.code:
                    self.found.setdefault(entry["name"], []).append(entry["figures"])

    def take(self, name: str) -> Json | None:
        """The next figures of that name that were measured before."""
        found = self.found.get(name)
        return found.pop(0) if found else None

    def keep(self, name: str, figures: Json) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps({"name": name, "code": self.code, "figures": figures}) + "\n")


def digest() -> str:
    """What tells the measured code from other code."""
    whole = hashlib.sha256(Path(__file__).read_bytes())
    top = Path(fanwise.__file__).parent
    for room in ROOMS:
        path = top / room
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            if file.name not in TELLING:
                whole.update(f"{file.relative_to(top)}\n".encode() + file.read_bytes())
    return whole.hexdigest()[:16]
