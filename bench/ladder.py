"""What do the lower rungs cost and miss, beside the tool that does the same with inotify?"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from bench._harness import CONTENDERS, Bench, Json, last_json, median, row, show, worst
from bench.burst import DIRECTORIES, WRITERS, delivered

USER = "nobody"
COST = ("nobody", "inotify", "inotifywait")
NAMES = ("nobody names", "inotify names", "inotifywait")


def run(bench: Bench) -> Json:
    directories = 1_000 if bench.quick else 10_000
    files = 2_000 if bench.quick else 50_000
    chains = 100 if bench.quick else 2000
    bench.scratch.chmod(0o711)  # a user without rights passes through it

    def cost(name: str) -> Json:
        """A tree of many directories, then a burst in some of them, all of it read to the end.

        Processor time is that of the process until it was reaped. Of a Python program the start
        (interpreter, imports) ends where it calls `watch`; inotifywait has none that counts.
        """
        with bench.tmpfs() as root:
            root.chmod(0o777)
            bench.storm("tree", root, directories, user=USER)
            for number in range(DIRECTORIES):
                (root / f"d{number:03d}").mkdir()
                shutil.chown(root / f"d{number:03d}", USER)
            contender = CONTENDERS[name]
            with bench.watch(name, root) as watcher:
                ready = watcher.wait_ready()
                ready_cpu = watcher.cpu_ready
                facts = bench.storm("burst", root, files, DIRECTORIES, WRITERS, user=USER)
                # Of both: what they have not read when they are told to end is not cheap, but lost.
                watcher.quiet()
                reads = calls(watcher.pid)
                result = watcher.stop()
                start = 0.0
                if contender.drains:  # counted, as the library is
                    closing = last_json(watcher.output)
                    counts, start = closing["facts"], closing["start_cpu_s"]
                    total = sum(facts[k] for k in counts if k in facts)
                    result["delivered"] = sum(counts[k] for k in counts if k in facts) / total
                else:
                    result.update(delivered(contender, watcher.output, root, files, facts))
            result.update(
                ready_s=ready,
                start_cpu_s=start,
                ready_cpu_s=ready_cpu - start,
                burst_cpu_s=result["cpu_s"] - ready_cpu,
                watch_cpu_s=result["cpu_s"] - start,
                reads=reads,
                switches=watcher.usage.ru_nvcsw,
            )
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
    theirs = [r for r in runs.get("inotifywait", ()) if r["delivered"] == 1]
    short = len(runs.get("inotifywait", ())) - len(theirs)
    for name in ("nobody", "inotify"):
        mine = runs.get(name, ())
        for key, what in (
            ("ready_cpu_s", f"{directories:,} directories, CPU until ready"),
            ("burst_cpu_s", f"burst of {files:,} files in them, CPU from ready to the end"),
            ("watch_cpu_s", "both, without the start of Python"),
            ("cpu_s", "both, with the start of Python"),
        ):
            cost_, other = median(mine, key), median(theirs, key)
            if cost_ is None or other is None:
                continue
            found.append(
                row(
                    f"{what} ({name})",
                    "<= inotifywait" if key != "cpu_s" else "",
                    None if key == "cpu_s" else cost_ <= other,
                    show(cost_, "s"),
                    show(other, "s"),
                    cost_ / other,
                    note=f"delivered {worst(mine, 'delivered', min):.1%}; of {len(theirs) + short} "
                    f"runs of inotifywait {short} lost events and are left out; it made "
                    f"{worst(theirs, 'reads', min):,.0f} to {worst(theirs, 'reads', max):,.0f} "
                    "system calls that read",
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


def calls(pid: int) -> int:
    """System calls that read, so far: how often a watcher woke for little decides what it costs."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("syscr:"):
            return int(line.split()[1])
    raise RuntimeError("no syscr in /proc/PID/io")


if __name__ == "__main__":
    from bench.__main__ import main

    main(["ladder", *sys.argv[1:]])
