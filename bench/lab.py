"""How fast is the explorer, what does its reduction save, and how long does the catalogue take?

Steps a second on a toy of 12 to 14 steps (two openers and a remover of one entry), every
interleaving, without checks and with all of them: properties after each step, memory and references
watched, schedules run twice. Then each design of the catalogue: the verdict at a bound of three
preemptions, as a user runs it; and the whole search with the reduction against without, at the
largest bound that the search without it finishes in time. A bound that by the growth so far would
take longer is not begun, and what is begun ends when the time is over.

The catalogue takes an hour. Each design's figures are kept as soon as they are measured, so a run
that was ended goes on where it was, as long as the code that is measured is the same. A part is
named with `--only`: a design, or a scenario for all of its designs. The rows say which part it is.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fanwise
from bench._harness import CACHE, Bench, Json, median, row, show
from bench._spin import BESIDE, agreement
from fanwise.lab import Design, Memory, Refcount, Result, Scenario, World, explore, find, names

PLAIN, CHECKED = "the toy, without checks", "the toy, with all checks"
BOUNDS = (0, 1, 2, 3, 4, 5, 6, None)
SECONDS = 60.0  # processor time for the search without reduction
DOUBT = 1.25  # the growth so far foretells it that well
ROOMS = ("lifetime.py", "lab", "notify", "vfs")  # what the models run, and what runs them
CATALOGUE_SECONDS = 180.0
TOYS = Scenario("toy", "An entry is opened while it is removed", "", {"linked": "It is linked."})
# Other explorers on models that are shared with them: name -> a function that returns a run's
# figures, as `catalogue` does.
OTHERS: dict[str, Any] = {**BESIDE}

COLUMNS = [
    ("verdict", "verdict", ""),
    ("steps_per_s", "steps a second", ",.0f"),
    ("schedules_per_s", "schedules a second", ",.0f"),
    ("seconds", "CPU s at bound 3", ".2f"),
    ("wall_s", "wall s", ".2f"),
    ("states", "states", ",.0f"),
    ("compared_at", "compared at bound", ""),
    ("steps_without", "steps without reduction", ",.0f"),
    ("steps_with", "with", ",.0f"),
    ("cut", "cut", ".1f"),
    ("states_without", "states without reduction", ",.0f"),
    ("states_with", "with", ",.0f"),
    ("next_bound", "the next bound without it", ""),
    ("compiling", "CPU s to compile", ".1f"),
    ("when", "when", ""),
]


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


def speed(slug: str, bench: Bench) -> Json:
    steps = schedules = 0
    spent = 0.0
    how = {"twice": None} if slug == "plain" else {}
    while spent < (0.2 if bench.quick else 3.0):
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


def catalogue(design: Design, bench: Bench) -> Json:
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
    figures.update(reduction(design, 1.0 if bench.quick else SECONDS))
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
            whole.update(f"{file.relative_to(top)}\n".encode() + file.read_bytes())
    return whole.hexdigest()[:16]


def parts(only: Iterable[str], designs: Iterable[str]) -> frozenset[str]:
    """The contenders that are meant: a scenario is all of its designs."""
    wanted = set(only)
    return frozenset(wanted | {name for name in designs if name.partition("/")[0] in wanted})


def run(bench: Bench) -> Json:
    designs = {design.name: design for slug in names() for design in find(slug)}
    bench.only = parts(bench.only, designs)
    kept = None if bench.quick else Kept(CACHE / "lab.jsonl")

    def once(name: str) -> Json:
        figures = kept.take(name) if kept else None
        if figures is None:
            figures = measured(name)
            figures["when"] = time.strftime("%Y-%m-%d %H:%M")
            if kept:
                kept.keep(name, figures)
        return figures

    def measured(name: str) -> Json:
        if name in (PLAIN, CHECKED):
            return speed("plain" if name == PLAIN else "checked", bench)
        if name in OTHERS:
            figures: Json = OTHERS[name](bench)
            return figures
        return catalogue(designs[name], bench)

    runs = bench.each([PLAIN, CHECKED, *designs, *OTHERS], once)
    whole = len(runs) == len(designs) + len(OTHERS) + 2
    rows = []
    for name, bar in ((PLAIN, 1e6), (CHECKED, 3e5)):
        found = median(runs.get(name, ()), "steps_per_s")
        rows.append(
            row(
                f"{name}: steps a second",
                f">= {bar:,.0f}",
                None if found is None else found >= bar,
                show(found, "/s"),
                note=f"{show(median(runs.get(name, ()), 'schedules_per_s'), '/s')} schedules",
            )
        )
    ran = {name: runs[name] for name in designs if name in runs}
    rows += over_all(ran, len(designs))
    if agreed := agreement(runs):
        rows.append(agreed)
    if kept and whole:
        kept.path.unlink()  # answered as a whole: the next run measures anew
    return {"runs": {**runs, **scenarios(ran)}, "rows": rows}


def scenarios(ran: dict[str, list[Json]]) -> dict[str, list[Json]]:
    """What the designs of each scenario that were run take together."""
    found: dict[str, list[Json]] = {}
    for slug in names():
        runs = [run for name, each in ran.items() if name.startswith(f"{slug}/") for run in each]
        if runs:
            verdict = f"{len(runs)} of {len(find(slug))} designs"
            keys = ("seconds", "wall_s", "states")
            found[slug] = [{"verdict": verdict, **{k: sum(run[k] for run in runs) for k in keys}}]
    return found


def over_all(ran: dict[str, list[Json]], of: int) -> list[Json]:
    """The rows on the catalogue. What not all designs were asked is judged only if it is sure."""
    part = "" if len(ran) == of else f"only {len(ran)} of {of} designs were run; "
    cuts = {name: cut for name, found in ran.items() if (cut := median(found, "cut")) is not None}
    tenfold = [name for name, cut in cuts.items() if cut >= 10]
    larger = sorted(ran, key=lambda name: -(median(ran[name], "steps_without") or 0))
    larger = larger[: len(ran) // 2]
    most = sum(name in tenfold for name in larger)
    total = sum(median(found, "seconds") or 0.0 for found in ran.values())
    slowest = max(ran, key=lambda name: median(ran[name], "seconds") or 0.0, default="none")
    return [
        row(
            "designs whose steps the reduction cuts tenfold",
            "more than half",
            True if len(tenfold) * 2 > of else None if part else False,
            f"{len(tenfold)} of {len(ran)}",
            note=f"{part}{most} of the {len(larger)} with the most steps; "
            f"{len(ran) - len(cuts)} too large to compare, {BOUNDS[0]} preemptions included",
        ),
        row(
            "the whole catalogue at bound 3, CPU",
            f"< {CATALOGUE_SECONDS:.0f} s",
            False if total >= CATALOGUE_SECONDS else None if part else True,
            show(total, "s"),
            note=f"{part or f'{of} designs, '}on one core; slowest {slowest}",
        ),
    ]


RUNS = 1  # the catalogue takes an hour with its comparisons, and its figures hardly vary

if __name__ == "__main__":
    from bench.__main__ import main

    main(["lab", *sys.argv[1:]])
