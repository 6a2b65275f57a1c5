"""How long until a watch of a big tree is set, and what does it keep in the kernel?"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from bench._harness import PEERS, PYTHON, Bench, Json, last_json, median, need, row, show

RUNS = 2
TOUCHED = "t0000000"  # what `storm touch` makes first
NAMES = ("python -c pass", "c", "library", "watch --json", "pure", *PEERS)


def last(root: Path, directories: int) -> Path:
    """The directory that `storm tree` made last: any watcher comes to it late."""
    parts = []
    while directories:
        parts.append(f"d{directories:06d}")
        directories = (directories - 1) // 16
    return root.joinpath(*reversed(parts))


def run(bench: Bench) -> Json:
    directories = 3_000 if bench.quick else 300_000
    with bench.ext4(directories) as disk:
        bench.say(f"  making {directories} directories")
        bench.storm("tree", disk.path, directories)

        def once(name: str) -> Json:
            disk.cold()
            with bench.group("watch") as group:
                if name == "python -c pass":
                    need(PYTHON)
                    start = time.monotonic()
                    with subprocess.Popen(
                        [PYTHON, "-c", "pass"], preexec_fn=group.enter, stdout=subprocess.PIPE
                    ) as child:
                        _, _, usage = os.wait4(child.pid, 0)
                        child.returncode = 0
                    return {
                        "ready_s": time.monotonic() - start,
                        "cpu_s": usage.ru_utime + usage.ru_stime,
                    }
                with bench.watch(name, disk.path, group) as watcher:
                    ready = watcher.wait_ready()
                    # After a scan, if there is one: only what stays counts. One peer never rests.
                    watcher.quiet(20)
                    kernel = group.kernel() / 2**20
                    # Ready must mean something: one peer says so when its watches have failed.
                    bench.storm("touch", last(disk.path, directories), 1, 0)
                    time.sleep(0.5)
                    result = watcher.stop()
                (last(disk.path, directories) / TOUCHED).unlink()
                closing = last_json(watcher.output)
                heard = TOUCHED.encode() in watcher.output
                heard = heard or closing.get("facts", {}).get("created", 0) > 0
                result.update(ready_s=ready, kernel_mib=kernel, cpu_s=result["cpu_ready_s"])
                return {**result, "heard": int(heard)}

        def idle_python(_: str) -> Json:
            """Measure what a process of this kind costs the kernel without any watch."""
            need(PYTHON)
            code = "import fanwise, time; print('READY', flush=True); time.sleep(9)"
            with (
                bench.group("idle") as group,
                subprocess.Popen(
                    [PYTHON, "-c", code], preexec_fn=group.enter, stdout=subprocess.PIPE
                ) as child,
            ):
                try:
                    assert child.stdout
                    child.stdout.readline()
                    return {"kernel_mib": group.kernel() / 2**20}
                finally:
                    child.kill()

        names = list(NAMES)
        runs = bench.each(names, once)
        idle = bench.each(["import fanwise"], idle_python)
    runs.update(idle)

    base = median(runs.get("python -c pass", ()), "ready_s")
    found = []
    for name in ("watch --json", "library"):
        ready = median(runs.get(name, ()), "ready_s")
        after = None if ready is None or base is None else ready - base
        found.append(
            row(
                f"ready, {directories:,} directories ({name})",
                "< 0.15 s after python -c pass",
                None if after is None else after < 0.15,
                show(after, "s"),
                show(median(runs.get("c", ()), "ready_s"), "s"),
                note=f"exec to ready, cold ext4; python -c pass took {show(base, 's')}",
            )
        )
    kept = median(runs.get("library", ()), "kernel_mib")
    without = median(runs.get("import fanwise", ()), "kernel_mib")
    more = None if kept is None or without is None else kept - without
    found.append(
        row(
            f"kernel memory of a watch, {directories:,} directories",
            "< 1 MiB",
            None if more is None else more < 1,
            show(more, "MiB"),
            show(median(runs.get("c", ()), "kernel_mib"), "MiB"),
            note="library when idle again, after reclaim, beyond a Python that imported fanwise; "
            "the C figure is its whole process",
        )
    )
    bars = [
        {
            "name": name,
            "value": value,
            "label": f"{value:.3g} s" + ("" if heard else ", then a change is not delivered"),
            "good": bool(heard),
        }
        for name, results in runs.items()
        if (value := median(results, "ready_s")) is not None
        and (heard := median(results, "heard")) is not None
    ]
    title = f"seconds until a watch of {directories:,} directories is ready"
    chart = {"title": title, "better": "less", "log": True, "bars": bars}
    return {"runs": runs, "rows": found, "charts": {"time": chart}}


if __name__ == "__main__":
    from bench.__main__ import main

    main(["ready", *sys.argv[1:]])
