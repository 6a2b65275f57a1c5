"""What does the model cost, and how soon is a change named while it is still being built?"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from bench._harness import Bench, Json, Unavailable, below, last_json, median, row, show, worst

NAMES = ("c", "library", "pure")
LIMIT_S = 120
DEPTH = 20


def deep(root: Path) -> Path:
    """A chain twenty deep, below one of the last directories that a scan reaches."""
    return root.joinpath(*[f"level{number:02d}" for number in range(DEPTH)])


def run(bench: Bench) -> Json:
    directories = 3_000 if bench.quick else 100_000
    names = bench.wanted(NAMES)
    with bench.ext4(directories) as disk:
        bench.say(f"  making {directories} directories")
        bench.storm("tree", disk.path, directories)
        target = deep(disk.path)
        target.mkdir(parents=True)

        def first(name: str) -> Json:
            """The first change at depth 20, made as soon as the watch is ready."""
            disk.cold()
            child = {"c": "c lines", "library": "library names", "pure": "pure names"}[name]
            with bench.watch(child, disk.path) as watcher:
                watcher.wait_ready()
                made = json.loads(bench.storm_lines("touch", target, 1, 0)[0])
                path = target / made["name"]
                time.sleep(1)
                watcher.stop()
            path.unlink()
            for line in watcher.output.splitlines():
                if b'"change"' not in line[:40]:
                    continue
                change = json.loads(line)
                if change["path"] and Path(change["path"]).name == made["name"]:
                    return {
                        "first_ms": (change["ns"] - made["ns"]) / 1e6,
                        "exact": change["path"] == os.fspath(path)
                        and change.get("path_source", "exact") == "exact",
                        "during": not change.get("scanned", True),
                    }
            return {"exact": False, "during": False}

        def model(name: str) -> Json:
            """The whole model; the C reader has none."""
            if name == "c":
                return {}
            disk.cold()
            argv = ["--pure"] if name == "pure" else []
            with bench.watch("library scan", disk.path, None, *argv) as watcher:
                watcher.wait_ready()
                end = time.monotonic() + LIMIT_S
                while watcher.running() and time.monotonic() < end:
                    time.sleep(0.02)
                if watcher.running():
                    raise Unavailable(f"the scan took more than {LIMIT_S} s")
                watcher.stop()
                result = last_json(watcher.output)
            if "scan_cpu_s" not in result:
                raise Unavailable(f"{name}: no result")
            in_names = len("d000001") * directories + len("level00") * DEPTH
            count = directories + DEPTH
            return {
                "cpu_s_per_100k": result["scan_cpu_s"] / count * 100_000,
                "scan_s": result["scan_s"],
                "bytes_per_directory": (result["scan_bytes"] - in_names) / count,
            }

        def once(name: str) -> Json:
            return {**first(name), **model(name)}

        runs = bench.each(names, once)
    return {"runs": runs, "rows": rows(runs)}


def rows(runs: dict[str, list[Json]]) -> list[Json]:
    found = []
    for name, label in (("library", "native"), ("pure", "pure Python")):
        results = runs.get(name, ())
        if name == "library":
            ms = median(results, "first_ms")
            good = all(r.get("exact") and r.get("during") for r in results)
            found.append(
                row(
                    "first change at depth 20 during the scan, exact path",
                    "<= 5 ms",
                    None if not results else ms is not None and ms <= 5 and good,
                    show(ms, "ms"),
                    show(median(runs.get("c", ()), "first_ms"), "ms"),
                    note=f"worst {show(worst(results, 'first_ms', max), 'ms')}; exact path in "
                    f"{sum(bool(r.get('exact')) for r in results)}, during the scan in "
                    f"{sum(bool(r.get('during')) for r in results)} of {len(results)}",
                )
            )
        cpu = median(results, "cpu_s_per_100k")
        bar = 2 if name == "library" else 3
        found.append(
            row(
                f"whole model, CPU per 100,000 directories ({label})",
                f"<= {bar} s",
                below(cpu, bar),
                show(cpu, "s"),
                note="cold ext4, from before the watch until scanned",
            )
        )
        if name == "library":
            size = median(results, "bytes_per_directory")
            found.append(
                row(
                    f"whole model, memory ({label})",
                    "<= 150 bytes a directory beyond its name",
                    below(size, 150),
                    show(size, "bytes"),
                    note="growth of private memory from before the watch until scanned, all of it",
                )
            )
    return found


if __name__ == "__main__":
    from bench.__main__ import main

    main(["scan", *sys.argv[1:]])
