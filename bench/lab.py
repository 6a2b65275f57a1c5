"""How fast is the explorer, what does its reduction save, and how long does the catalogue take?

Steps a second on a toy of 12 to 14 steps (two openers and a remover of one entry), every
interleaving, without checks and with all of them: properties after each step, memory and references
watched, schedules run twice. Then each design of the catalogue: its verdict at a bound of three
preemptions, as a user runs it; and the whole search with the reduction against without, at the
largest bound that the search without it finishes in time. A bound that by the growth so far would
take longer is not begun, and what is begun ends when the time is over.

The catalogue takes an hour. Figures are kept as soon as they are measured, so a run that was ended
goes on where it was, as long as the code that is measured is the same. `--only` names a part:
`toy`, `verdicts`, `spin`, a scenario, a design, or `kept` for what was measured so far. The rows
say which part it is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

from bench._explorer import BOUNDS, Kept, reduction, speed, verdict
from bench._harness import CACHE, Bench, Json, median, row, show
from bench._spin import BESIDE, agreement
from fanwise.lab import Design, find, names

PLAIN, CHECKED = "the toy, without checks", "the toy, with all checks"
BOTH = ", with and without the reduction"
SECONDS = 60.0  # processor time for the search without reduction
CATALOGUE_SECONDS = 180.0
# Other explorers on models that are shared with them: name -> a function that returns a run's
# figures, as `verdict` does.
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


def run(bench: Bench) -> Json:
    designs = {design.name: design for slug in names() for design in find(slug)}
    kept = None if bench.quick else Kept(CACHE / "lab.jsonl")
    bench.only = parts(bench.only, designs, kept.found if kept else ())
    contenders = [PLAIN, CHECKED, *designs, *OTHERS, *(name + BOTH for name in designs)]

    def once(name: str) -> Json:
        figures = kept.take(name) if kept else None
        if figures is None:
            figures = measured(name, designs, bench)
            figures["when"] = time.strftime("%Y-%m-%d %H:%M")
            if kept:
                kept.keep(name, figures)
        return figures

    runs = bench.each(contenders, once)
    if kept and len(runs) + len(bench.missing) == len(contenders):
        kept.path.unlink()  # answered as a whole: the next run measures anew
    for name in designs:
        for one, both in zip(runs.get(name, ()), runs.pop(name + BOTH, ()), strict=False):
            one.update(both)
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
    return {"runs": {**runs, **scenarios(ran)}, "rows": rows}


def measured(name: str, designs: dict[str, Design], bench: Bench) -> Json:
    if name in (PLAIN, CHECKED):
        return speed("plain" if name == PLAIN else "checked", 0.2 if bench.quick else 3.0)
    if name in OTHERS:
        figures: Json = OTHERS[name](bench)
        return figures
    if name.endswith(BOTH):
        return reduction(designs[name.removesuffix(BOTH)], 1.0 if bench.quick else SECONDS)
    return verdict(designs[name])


def parts(only: Iterable[str], designs: Iterable[str], kept: Iterable[str]) -> frozenset[str]:
    """The contenders that are meant."""
    wanted: set[str] = set()
    for part in only:
        inside = [name for name in designs if part in (name, name.partition("/")[0])]
        wanted |= {*inside, *(name + BOTH for name in inside)} or {part}
        if part == "toy":
            wanted |= {PLAIN, CHECKED}
        elif part == "verdicts":
            wanted |= {*designs}
        elif part == "spin":
            wanted |= {*OTHERS}
        elif part == "kept":
            wanted |= {*kept}
    return frozenset(wanted)


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
    cuts = {name: median(found, "cut") for name, found in ran.items() if "next_bound" in found[0]}
    cuts |= {name: median(found, "cut") for name, found in ran.items() if "cut" in found[0]}
    tenfold = [name for name, cut in cuts.items() if cut is not None and cut >= 10]
    larger = sorted(cuts, key=lambda name: -(median(ran[name], "steps_without") or 0))
    larger = larger[: len(cuts) // 2]
    too_large = sum(cut is None for cut in cuts.values())
    total = sum(median(found, "seconds") or 0.0 for found in ran.values())
    slowest = max(ran, key=lambda name: median(ran[name], "seconds") or 0.0, default="none")
    return [
        row(
            "designs whose steps the reduction cuts tenfold",
            "more than half",
            True if len(tenfold) * 2 > of else None if len(cuts) < of else False,
            f"{len(tenfold)} of {len(cuts)}",
            note=f"{_part(len(cuts), of, 'compared')}; of the {len(larger)} with the most steps "
            f"{sum(name in tenfold for name in larger)}; {too_large} too large to compare, "
            f"{BOUNDS[0]} preemptions included",
        ),
        row(
            "the whole catalogue at bound 3, CPU",
            f"< {CATALOGUE_SECONDS:.0f} s",
            False if total >= CATALOGUE_SECONDS else None if len(ran) < of else True,
            show(total, "s"),
            note=f"{_part(len(ran), of, 'run')}; on one core; slowest {slowest}",
        ),
    ]


def _part(some: int, of: int, done: str) -> str:
    return f"all {of} designs" if some == of else f"only {some} of {of} designs were {done}"


RUNS = 1  # the catalogue takes an hour with its comparisons, and its figures hardly vary

if __name__ == "__main__":
    from bench.__main__ import main

    main(["lab", *sys.argv[1:]])
