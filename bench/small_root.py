"""Does watching a small part of a busy filesystem cost less than watching all of it?"""

from __future__ import annotations

import sys
from pathlib import Path

from bench._harness import (
    CONTENDERS,
    KINDS,
    Bench,
    Json,
    below,
    last_json,
    median,
    ratio,
    row,
    show,
)

DIRECTORIES = 100
ALL, INSIDE = "all of it", "1 % of it"


def run(bench: Bench) -> Json:
    files = 5_000 if bench.quick else 200_000

    def once(what: str) -> Json:
        name, _, part = what.partition(", ")
        with bench.tmpfs() as root, bench.group("watch") as group:
            for side in ("in", "out"):
                for number in range(DIRECTORIES):
                    (root / f"{side}/d{number:03d}").mkdir(parents=True)
            watched: Path = root / "in" if part == INSIDE else root
            with bench.watch(name, watched, group) as watcher:
                watcher.wait_ready()
                storm = bench.storm("split", root, files, DIRECTORIES, 2)
                result = watcher.stop()
            facts = sum(storm[kind] for kind in KINDS)
            got = last_json(watcher.output).get("facts", {})
            result["delivered"] = sum(got.get(kind, 0) for kind in KINDS) / facts
            # From ready on: both start alike, and starting is not a cost of a record.
            result["cost"] = (result["cpu_s"] - result["cpu_ready_s"]) / facts * 1e6
            return result

    names = [f"{name}, {part}" for name in ("library", "pure") for part in (ALL, INSIDE)]
    if bench.only:
        names = [n for n in names if n.partition(", ")[0] in bench.only]
    # The C reader decodes and names everything whatever the root: one figure is enough.
    c = [f"c, {ALL}"] if not bench.only or "c" in bench.only else []
    assert all(n.partition(", ")[0] in CONTENDERS for n in [*c, *names])
    only, bench.only = bench.only, frozenset()
    try:
        runs = bench.each([*c, *names], once)
    finally:
        bench.only = only

    cost = median(runs.get(f"library, {INSIDE}", ()), "cost")
    whole = median(runs.get(f"library, {ALL}", ()), "cost")
    times = ratio(cost, whole)
    found = row(
        "a root with 1 % of a filesystem's changes inside it",
        "<= 0.5x a root with all of them",
        below(times, 0.5),
        f"{show(cost)} against {show(whole, 's a million')}",
        show(median(runs.get(f"c, {ALL}", ()), "cost"), "s a million"),
        times,
        "library, CPU from ready on per fact of the filesystem; the ratio is of the two roots",
    )
    return {"runs": runs, "rows": [found]}


if __name__ == "__main__":
    from bench.__main__ import main

    main(["small_root", *sys.argv[1:]])
