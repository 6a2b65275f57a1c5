"""What becomes of memory and of the count when nobody reads for a minute?"""

from __future__ import annotations

import json
import os
import signal
import sys

from bench._harness import Bench, Json, Watcher, last_json, median, row, show, worst

NAMES = ("c", "library", "pure", "watch --json")
RUNS = 1
PER_SECOND = 100_000
# Python, its modules and the model of an idle watch, beside the ring.
BESIDE_MIB = 64


def command_totals(output: bytes) -> tuple[int, int, bool]:
    """Return the renames told of, how many were said to be lost, and whether that was a number."""
    got = lost = 0
    exact = True
    for line in output.splitlines():
        if b'"type":"change"' in line[:40]:
            got += b'"renamed"' in line
        elif b'"type":"lost"' in line[:40]:
            number = json.loads(line)["count"]
            exact = exact and number is not None
            lost += number or 0
    return got, lost, exact


def run(bench: Bench) -> Json:
    seconds, ring = (3, 8 << 20) if bench.quick else (60, 256 << 20)
    names = bench.wanted(NAMES)

    def once(name: str) -> Json:
        # A little longer than the storm, so that all of it happens while nobody reads.
        more = {
            "c": [],
            "library": ["--stall", str(seconds + 2), "--queue", str(ring)],
            "pure": ["--stall", str(seconds + 2), "--queue", str(ring)],
            "watch --json": ["--queue", str(ring)],
        }[name]
        reading = name != "watch --json"
        with (
            bench.tmpfs() as root,
            bench.group("watch") as group,
            bench.watch(name, root, group, *more, reading=reading) as watcher,
        ):
            watcher.wait_ready()
            if name == "c":
                os.kill(watcher.pid, signal.SIGSTOP)
            storm = bench.storm("rate", root, PER_SECOND, seconds, 2)
            stuck = group.peak() / 2**20
            if name == "c":
                os.kill(watcher.pid, signal.SIGCONT)
            watcher.reading.set()
            result = settle(watcher)
            result.update(
                peak_mib=group.peak() / 2**20,
                stuck_mib=stuck,
                done=storm["renamed"],
                per_second=storm["renamed"] / storm["seconds"],
            )
            closing = last_json(watcher.output)
            if name == "watch --json":
                got, lost, exact = command_totals(watcher.output)
            else:
                got, lost = closing["facts"].get("renamed", 0), closing.get("lost", 0)
                exact = closing.get("lost_exact", True)
            result.update(delivered=got, lost=lost, lost_exact=exact)
            # The other facts are the making and closing of one file by each writer, at the start:
            # they come first, so none of them is among the lost.
            result["sum_exact"] = exact and got + lost == storm["renamed"]
        return result

    runs = bench.each(names, once)
    ring_mib = ring / 2**20
    found = []
    for name in ("library", "watch --json", "pure"):
        results = runs.get(name, [])
        peak = worst(results, "peak_mib", max)
        counts = [r["sum_exact"] and r["lost"] > 0 for r in results]
        rate = median(results, "per_second")
        last = results[-1] if results else None
        found.append(
            row(
                f"consumer stuck for {seconds} s under 100,000 facts a second ({name})",
                f"<= ring ({ring_mib:.0f} MiB) + {BESIDE_MIB} MiB; LOST exact",
                None if peak is None else peak <= ring_mib + BESIDE_MIB and all(counts),
                show(peak, "MiB", 4)
                + (
                    f"; {last['delivered']} delivered + {last['lost']} lost, {last['done']} done"
                    if last
                    else ""
                ),
                show(worst(runs.get("c", ()), "peak_mib", max), "MiB", 4),
                note=f"worst peak; count exact in {sum(counts)} of {len(counts)} runs; "
                f"storm at {show(rate, 'a second', 6)}",
            )
        )
    about = (
        "The C reader is stopped for as long; its queue is unlimited, so the kernel keeps it all."
    )
    return {"runs": runs, "rows": found, "about": about}


def settle(watcher: Watcher) -> Json:
    """Let it read on, and end it when it has nothing left to do."""
    watcher.quiet()
    return watcher.stop()


if __name__ == "__main__":
    from bench.__main__ import main

    main(["stuck_consumer", *sys.argv[1:]])
