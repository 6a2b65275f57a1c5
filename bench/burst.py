"""Is everything delivered in a burst, at what processor time and memory?"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from bench._harness import (
    CONTENDERS,
    KINDS,
    PEERS,
    Bench,
    Contender,
    Json,
    below,
    last_json,
    median,
    ratio,
    row,
    show,
    worst,
)

NAMES = ("c", "library", "library names", "watch --json", "pure", "pure names", *PEERS)
WRITERS, DIRECTORIES = 2, 100


def truth(root: Path, files: int) -> dict[str, set[str]]:
    """The paths that the storm makes events for, by kind; the same rule as in storm.c."""
    before = [f"{root}/d{(i // 1000 + i) % DIRECTORIES:03d}/f{i:07d}" for i in range(files)]
    after = [f"{path[:-8]}g{path[-7:]}" for path in before]
    made = set(before)
    return {
        "created": made,
        "modified": made,
        "written": made,
        "renamed": set(after),
        "deleted": {path for i, path in enumerate(after) if i % 10},
    }


def named(contender: Contender, output: bytes) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for kinds, path, _ in contender.read(output):
        if path:
            for kind in kinds:
                found[kind].add(path)
    return found


def delivered(contender: Contender, output: bytes, root: Path, files: int, facts: Json) -> Json:
    """Count the facts that were delivered; by name and once each wherever names are kept."""
    closing = last_json(output)
    total = sum(facts[kind] for kind in KINDS)
    absent = {}
    if contender.name == "c":
        counts = closing["distinct"]
    elif contender.name in ("library", "pure"):
        counts = {kind: min(closing["facts"].get(kind, 0), facts[kind]) for kind in KINDS}
    else:
        expected, found = truth(root, files), named(contender, output)
        if contender.name == "watchfiles":
            # It has no renames: a new name is an addition.
            found["renamed"] = found["created"] & expected["renamed"]
        counts = {kind: len(expected[kind] & found[kind]) for kind in KINDS}
        if contender.drains:
            # Which ones, or nobody finds out why: by number, the order in which they were made.
            absent = {
                kind: sorted(expected[kind] - found[kind], key=lambda path: path[-7:])[:3]
                for kind in KINDS
                if counts[kind] < facts[kind]
            }
    by_kind = {kind: counts.get(kind, 0) / facts[kind] for kind in KINDS}
    return {
        "delivered": sum(counts.get(kind, 0) for kind in KINDS) / total,
        "by_kind": by_kind,
        "named": by_kind["created"],
        "facts": sum(counts.get(kind, 0) for kind in KINDS),
        "lost": closing.get("lost"),
        "absent": absent,
    }


def run(bench: Bench) -> Json:
    files = 5_000 if bench.quick else 200_000

    def once(name: str) -> Json:
        contender = CONTENDERS[name]
        with bench.tmpfs() as root, bench.group("watch") as group, bench.group("storm") as writers:
            for number in range(DIRECTORIES):
                (root / f"d{number:03d}").mkdir()
            with bench.watch(name, root, group) as watcher:
                ready = watcher.wait_ready()
                storm = bench.storm("burst", root, files, DIRECTORIES, WRITERS, group=writers)
                quiet = True if contender.drains else watcher.quiet()
                result = watcher.stop()
                result.update(delivered(contender, watcher.output, root, files, storm))
            result["peak_mib"] = group.peak() / 2**20
            result["ready_s"], result["quiet"] = ready, quiet
            result["storm_s"] = storm["seconds"]
            if result["facts"]:
                result["cpu_s_per_million"] = result["cpu_s"] / result["facts"] * 1e6
                running = result["cpu_s"] - result["cpu_ready_s"]
                result["running_cpu_s_per_million"] = running / result["facts"] * 1e6
            return result

    runs = bench.each(NAMES, once)
    return {"runs": runs, "rows": rows(runs), "chart": chart(runs), "files": files}


def rows(runs: dict[str, list[Json]]) -> list[Json]:
    found = []
    c_cost = median(runs.get("c", ()), "cpu_s_per_million")
    c_text = show(c_cost, "s a million")

    for name, label in (("library names", "native"), ("pure names", "pure Python")):
        share = worst(runs.get(name, ()), "delivered", min)
        found.append(
            row(
                f"two-writer burst, delivered ({label}, library)",
                "100 %",
                None if share is None else share == 1,
                "not measured" if share is None else f"{share:.4%}",
                f"{worst(runs.get('c', ()), 'delivered', min) or 0:.4%}",
                note="worst run; distinct paths of each kind against what the storm did",
            )
        )
    share = worst(runs.get("watch --json", ()), "delivered", min)
    found.append(
        row(
            "two-writer burst, delivered (watch --json)",
            "100 %",
            None if share is None else share == 1,
            "not measured" if share is None else f"{share:.4%}",
            note="worst run",
        )
    )
    for name, label, bar in (
        ("library", "CPU per fact, library, full Change objects", 2),
        ("watch --json", "CPU per fact, watch --json", 3),
        ("pure", "CPU per fact, library in pure Python", 8),
    ):
        cost = median(runs.get(name, ()), "cpu_s_per_million")
        times = ratio(cost, c_cost)
        running = ratio(
            median(runs.get(name, ()), "running_cpu_s_per_million"),
            median(runs.get("c", ()), "running_cpu_s_per_million"),
        )
        found.append(
            row(
                label,
                f"<= {bar}x the C reader",
                below(times, bar),
                show(cost, "s a million"),
                c_text,
                times,
                note=f"user + system from exec to exit; {show(running, 'x', 3)} from ready on",
            )
        )
    peak = worst(runs.get("watch --json", ()), "peak_mib", max)
    found.append(
        row(
            "peak memory of watch --json in the burst",
            "< 128 MiB",
            None if peak is None else peak < 128,
            show(peak, "MiB"),
            show(worst(runs.get("c", ()), "peak_mib", max), "MiB"),
            note="memory group of the watcher alone, kernel queue included; worst run",
        )
    )
    return found


def chart(runs: dict[str, list[Json]]) -> Json:
    """Return the bars of the plot: seconds a million delivered facts, and what was delivered."""
    bars = []
    for name in NAMES:
        if name.endswith("names"):
            continue
        cost = median(runs.get(name, ()), "cpu_s_per_million")
        if cost is not None:
            share = median(runs[name], "delivered")
            peak = median(runs[name], "peak_mib")
            bars.append({"name": name, "value": cost, "delivered": share, "peak_mib": peak})
    return {"title": "processor seconds a million delivered facts", "bars": bars}


if __name__ == "__main__":
    from bench.__main__ import main

    main(["burst", *sys.argv[1:]])
