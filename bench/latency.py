"""How long after a file is made, on an idle machine, does a program know of it?"""

from __future__ import annotations

import json
import statistics
import sys
import time

from bench._harness import (
    CONTENDERS,
    PEERS,
    READY,
    Bench,
    Json,
    Unavailable,
    Watcher,
    median,
    ratio,
    row,
    show,
)

NAMES = ("c lines", "library names", "pure names", "watch --json", *PEERS)
RUNS = 2
GAP_MS = 70  # more than the 50 ms for which one peer waits for silence


def seen(watcher: Watcher, count: int) -> dict[str, int]:
    """When each file was first told of: by the program's own clock, or else when its line came."""
    found: dict[str, int] = {}
    for at, chunk in watcher.chunks:
        for line in chunk.split(b"\n"):
            place = line.find(b"/t0")
            if place < 0:
                continue
            name = line[place + 1 : place + 9].decode()
            stamp = (
                json.loads(line).get("ns", at) if line.startswith(b"{") and b'"ns"' in line else at
            )
            found.setdefault(name, stamp)
    return found


def run(bench: Bench) -> Json:
    count = 20 if bench.quick else 100

    def once(name: str) -> Json:
        if CONTENDERS[name].asked:
            raise Unavailable("it is asked once, at the end: there is no time of an event")
        with bench.tmpfs() as root, bench.watch(name, root) as watcher:
            watcher.wait_ready()
            time.sleep(0.5)
            lines = bench.storm_lines("touch", root, count, GAP_MS)[:-1]
            made = {item["name"]: item["ns"] for item in map(json.loads, lines)}
            time.sleep(0.5)
            watcher.stop()
            # Lines can be cut where the pipe was read; put whole output back together when the
            # program stamps its lines itself.
            if CONTENDERS[name].ready == READY and name != "fatrace":
                watcher.chunks = [(0, watcher.output)]
            arrived = seen(watcher, count)
        times = sorted((arrived[n] - made[n]) / 1e6 for n in made if n in arrived)
        if not times:
            return {"named": 0}
        return {
            "median_ms": statistics.median(times),
            "p99_ms": times[min(int(len(times) * 0.99), len(times) - 1)],
            "named": len(times),
        }

    runs = bench.each(NAMES, once)
    c = median(runs.get("c lines", ()), "median_ms")
    found = []
    for name in ("library names", "watch --json"):
        value = median(runs.get(name, ()), "median_ms")
        times = ratio(value, c)
        found.append(
            row(
                f"idle latency, median ({name.removesuffix(' names')})",
                "<= 1 ms and <= 2x the C reader",
                None if value is None or times is None else value <= 1 and times <= 2,
                show(value, "ms"),
                show(c, "ms"),
                times,
                "from before open() until the program has the Change"
                if name == "library names"
                else "until its line was read from the pipe by the bench, a Python too",
            )
        )
    return {"runs": runs, "rows": found}


if __name__ == "__main__":
    from bench.__main__ import main

    main(["latency", *sys.argv[1:]])
