"""Of 20,000 writers that end at once, how many are named, and what does asking cost?"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator

from bench._harness import Bench, Json, last_json, median, ratio, row, sh, show, worst

NAMES = ("library", "library who", "library who, no tracefs")


@contextlib.contextmanager
def tracefs(bench: Bench) -> Iterator[None]:
    point = bench.scratch / "tracefs"
    point.mkdir()
    sh("mount", "-t", "tracefs", "fanwise-bench", point)
    try:
        yield
    finally:
        sh("umount", point)


def run(bench: Bench) -> Json:
    count = 500 if bench.quick else 20_000
    names = bench.wanted(NAMES)
    shutil.copy(bench.scratch / "storm", bench.scratch / "fw-writer")

    def once(name: str) -> Json:
        with bench.tmpfs() as root, bench.watch(name, root) as watcher:
            watcher.wait_ready()
            storm = bench.storm("spawn", root, count, 0, 2)
            watcher.quiet()
            result = watcher.stop()
            closing = last_json(watcher.output)
            result.update(
                storm_s=storm["seconds"],
                cpu_storm_s=result["cpu_s"] - result["cpu_ready_s"],
                created=closing["facts"].get("created", 0),
            )
            result["us_each"] = result["cpu_storm_s"] / count * 1e6
            for key, value in closing.get("who", {}).items():
                result[f"who_{key}"] = value
            for key in ("named", "exe", "user"):
                if "who" in closing:
                    result[f"{key}_share"] = closing["who"].get(key, 0) / count
            result["trace_lost"] = closing.get("stats", {}).get("who_trace_lost", 0)
        return result

    with tracefs(bench):
        runs = bench.each(names, once)
    plain = runs.get("library", [])
    cost = median(plain, "us_each")
    found = []
    for name in NAMES[1:]:
        results = runs.get(name, [])
        if not results:
            continue
        shares = {key: worst(results, f"{key}_share", min) for key in ("named", "exe", "user")}
        wrong = worst(results, "who_wrong", max)
        each = median(results, "us_each")
        found.append(
            row(
                f"{count:,} writers that end at once ({name})",
                "no writer is named wrong",
                wrong == 0,
                ", ".join(f"{key} {100 * (value or 0):.2f} %" for key, value in shares.items()),
                ratio=ratio(each, cost),
                note=f"worst run; CPU {show(each, 'us')} a writer, {show(cost, 'us')} without;"
                f" trace records lost: {worst(results, 'trace_lost', max)}",
            )
        )
    about = "Each writer is another program (exec) that makes one file. Shares are of all files."
    return {"runs": runs, "rows": found, "about": about}


if __name__ == "__main__":
    from bench.__main__ import main

    main(["who", *sys.argv[1:]])
