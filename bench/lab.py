"""How fast is the explorer, what does its reduction save, and how long does the catalogue take?

Steps a second on a toy of 12 to 14 steps (two openers and a remover of one entry), every
interleaving, without checks and with all of them: properties after each step, memory and references
watched, schedules run twice. Then each design of the catalogue: the whole search with the reduction
against without, at the largest bound that the search without it finishes in time; and the verdict
at a bound of three preemptions, as a user runs it.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from bench._harness import Bench, Json, median, row, show
from bench._spin import BESIDE, agreement
from fanwise.lab import Design, Memory, Refcount, Result, Scenario, World, explore, find, names

PLAIN, CHECKED = "the toy, without checks", "the toy, with all checks"
BOUNDS = (0, 1, 2, 3, 4, 5, 6, None)
SECONDS = 60.0  # processor time for the search without reduction
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
    ("states", "states", ",.0f"),
    ("compared_at", "compared at bound", ""),
    ("steps_without", "steps without reduction", ",.0f"),
    ("steps_with", "with", ",.0f"),
    ("cut", "cut", ".1f"),
    ("compiling", "CPU s to compile", ".1f"),
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
    while spent < (0.2 if bench.quick else 3.0):
        result, took = timed(TOYS[slug], bound=None, reduce=False)
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
    took: list[float] = []
    for bound in BOUNDS:
        # A search that would take twice as long as it may by the growth so far is not begun.
        if len(took) > 1 and took[-1] * took[-1] / max(took[-2], 0.01) > 2 * seconds:
            break
        without, spent = timed(design, bound=bound, reduce=False, keep_going=True, seconds=seconds)
        took.append(spent)
        if spent > seconds:
            break
        found = {"compared_at": "none" if bound is None else str(bound)}
        found["steps_without"], found["schedules_without"] = without.steps, without.schedules
        compared, verdict = bound, without.verdict
    if found:
        reduced, _ = timed(design, bound=compared, keep_going=True)
        found["steps_with"] = reduced.steps
        found["cut"] = found["steps_without"] / max(reduced.steps, 1)
        if reduced.verdict != verdict:
            raise RuntimeError(f"{design.name}: the reduction changes the verdict")
    return found


def catalogue(design: Design, bench: Bench) -> Json:
    result, spent = timed(design, bound=3)
    figures: Json = {
        "verdict": f"{result.verdict} {result.property or ''}".strip(),
        "seconds": spent,
        "states": result.states,
        "steps": result.steps,
        "schedules": result.schedules,
    }
    if result.not_keyed:
        figures["not_keyed"] = result.not_keyed
    figures.update(reduction(design, 1.0 if bench.quick else SECONDS))
    return figures


def run(bench: Bench) -> Json:
    designs = {design.name: design for slug in names() for design in find(slug)}

    def once(name: str) -> Json:
        if name in (PLAIN, CHECKED):
            return speed("plain" if name == PLAIN else "checked", bench)
        if name in OTHERS:
            figures: Json = OTHERS[name](bench)
            return figures
        return catalogue(designs[name], bench)

    runs = bench.each([PLAIN, CHECKED, *designs, *OTHERS], once)
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
    cuts = [cut for found in ran.values() if (cut := median(found, "cut")) is not None]
    tenfold = sum(cut >= 10 for cut in cuts)
    rows.append(
        row(
            "designs whose steps the reduction cuts tenfold",
            "more than half",
            None if not cuts else tenfold * 2 > len(ran),
            f"{tenfold} of {len(ran)}",
            note=f"{len(ran) - len(cuts)} too large to compare, {BOUNDS[0]} preemptions included",
        )
    )
    total = sum(median(found, "seconds") or 0.0 for found in ran.values())
    rows.append(
        row(
            "the whole catalogue at bound 3, CPU",
            f"< {CATALOGUE_SECONDS:.0f} s",
            None if not ran else total < CATALOGUE_SECONDS,
            show(total, "s"),
            note=f"{len(ran)} designs, on one core",
        )
    )
    if agreed := agreement(runs):
        rows.append(agreed)
    return {"runs": runs, "rows": rows}


RUNS = 1  # the catalogue takes an hour with its comparisons, and its figures hardly vary

if __name__ == "__main__":
    from bench.__main__ import main

    main(["lab", *sys.argv[1:]])
