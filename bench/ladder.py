"""What do the lower rungs cost and miss, beside the tool that does the same with inotify?"""

from __future__ import annotations

import shutil
import sys
import time

from bench._harness import CONTENDERS, Bench, Json, last_json, median, row, show, worst
from bench.burst import DIRECTORIES, WRITERS, delivered

USER = "nobody"
COST = ("python -c import fanwise", "nobody", "inotify", "inotifywait")
NAMES = ("nobody names", "inotify names", "inotifywait")


def run(bench: Bench) -> Json:
    directories = 1_000 if bench.quick else 10_000
    files = 2_000 if bench.quick else 50_000
    chains = 100 if bench.quick else 2000
    bench.scratch.chmod(0o711)  # a user without rights passes through it

    def cost(name: str) -> Json:
        """A tree of many directories, then a burst in some of them."""
        with bench.tmpfs() as root:
            root.chmod(0o777)
            bench.storm("tree", root, directories, user=USER)
            for number in range(DIRECTORIES):
                (root / f"d{number:03d}").mkdir()
                shutil.chown(root / f"d{number:03d}", USER)
            if name == COST[0]:
                return bare(bench)
            contender = CONTENDERS[name]
            with bench.watch(name, root) as watcher:
                ready = watcher.wait_ready()
                ready_cpu = watcher.cpu_ready
                facts = bench.storm("burst", root, files, DIRECTORIES, WRITERS, user=USER)
                if not contender.drains:
                    watcher.quiet()
                result = watcher.stop()
                if name == "inotify" or name == "nobody":  # counted, as the library is
                    counts = last_json(watcher.output)["facts"]
                    total = sum(facts[k] for k in counts if k in facts)
                    result["delivered"] = sum(counts[k] for k in counts if k in facts) / total
                else:
                    result.update(delivered(contender, watcher.output, root, files, facts))
            result.update(ready_s=ready, ready_cpu_s=ready_cpu)
            result["burst_cpu_s"] = result["cpu_s"] - ready_cpu
            return result

    def race(name: str) -> Json:
        contender = CONTENDERS[name]
        with bench.tmpfs() as root:
            root.chmod(0o777)
            with bench.watch(name, root) as watcher:
                watcher.wait_ready()
                bench.storm("chains", root, chains, user=USER)
                if contender.drains:
                    time.sleep(0.05)  # some read it while it runs and some after it
                else:
                    watcher.quiet(20)
                watcher.stop(60)
            told = {p for k, p, _ in contender.read(watcher.output) if "created" in k and p}
            heads = [f"{root}/c{n:07d}" for n in range(chains)]
            return {
                "chain_files": sum(f"{head}/b/c/d/f" in told for head in heads),
                "chain_directories": sum(
                    f"{head}{part}" in told
                    for head in heads
                    for part in ("", "/b", "/b/c", "/b/c/d")
                ),
            }

    runs = bench.each(COST, cost)
    for name, results in bench.each(NAMES, race).items():
        runs[f"{name}, race"] = results

    found = []
    base = median(runs.get(COST[0], ()), "cpu_s") or 0.0
    theirs = runs.get("inotifywait", ())
    for name in ("nobody", "inotify"):
        mine = runs.get(name, ())
        ready, burst = median(mine, "ready_cpu_s"), median(mine, "burst_cpu_s")
        other, other_burst = median(theirs, "ready_cpu_s"), median(theirs, "burst_cpu_s")
        if None in (ready, burst, other, other_burst):
            continue
        found.append(
            row(
                f"{directories:,} directories, CPU until ready ({name})",
                "<= inotifywait, beyond starting Python",
                ready - base <= other,
                show(ready - base, "s"),
                show(other, "s"),
                note=f"starting Python and importing fanwise takes {show(base, 's')} more",
            )
        )
        found.append(
            row(
                f"burst of {files:,} files in them, CPU ({name})",
                "<= inotifywait",
                burst <= other_burst,
                show(burst, "s"),
                show(other_burst, "s"),
                note=f"delivered {worst(mine, 'delivered', min):.1%}, "
                f"inotifywait {worst(theirs, 'delivered', min):.1%}",
            )
        )
    for name in NAMES[:2]:
        results = runs.get(f"{name}, race", [])
        files_told = worst(results, "chain_files", min)
        directories_told = worst(results, "chain_directories", min)
        them = worst(runs.get("inotifywait, race", ()), "chain_files", min)
        found.append(
            row(
                f"mkdir -p race, {chains:,} chains ({name})",
                "all",
                None
                if files_told is None
                else files_told == chains and directories_told == 4 * chains,
                "not measured"
                if files_told is None
                else f"{files_told:.0f} files, {directories_told:.0f} of {4 * chains} directories",
                "" if them is None else f"{them:.0f} files",
                note="worst run; not the C program beside it, but inotifywait",
            )
        )
    return {"runs": runs, "rows": found}


def bare(bench: Bench) -> Json:
    """What starting the interpreter costs."""
    import os
    import subprocess

    from bench._harness import PYTHON

    with subprocess.Popen([str(PYTHON), "-c", "import fanwise; fanwise.Watch"]) as child:
        _, _, usage = os.wait4(child.pid, 0)
        child.returncode = 0
    return {"cpu_s": usage.ru_utime + usage.ru_stime}


if __name__ == "__main__":
    from bench.__main__ import main

    main(["ladder", *sys.argv[1:]])
