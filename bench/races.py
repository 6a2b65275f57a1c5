"""Are files in directories made a moment ago named, and named where they are?"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from bench._harness import CONTENDERS, Bench, Json, row, worst

# The peers are judged by `correctness`.
NAMES = ("c lines", "library names", "pure names", "watch --json")


def judge(what: str, right: set[str], told: list[str | None]) -> Json:
    files = {path for path in told if path and Path(path).name.startswith("f")}
    exact = len(right & files)
    wrong = len(files - right)
    none = max(len(right) - exact - wrong, 0)
    return {f"{what}_exact": exact, f"{what}_wrong": wrong, f"{what}_none": none}


def run(bench: Bench) -> Json:
    chains, pairs = (100, 20) if bench.quick else (2000, 200)

    def created(name: str, root: Path, mode: str, count: int) -> list[str | None]:
        contender = CONTENDERS[name]
        with bench.watch(name, root) as watcher:
            watcher.wait_ready()
            bench.storm(mode, root, count)
            if contender.drains:
                # Only so that some read the storm while it runs and some after it.
                time.sleep(0.05)
            else:
                watcher.quiet(20)
            watcher.stop(60)
        return [path for kinds, path, _ in contender.read(watcher.output) if "created" in kinds]

    def once(name: str) -> Json:
        with bench.tmpfs() as root:
            paths = set(created(name, root, "chains", chains))
            heads = [f"{root}/c{n:07d}" for n in range(chains)]
            result: Json = {
                "chain_files": sum(f"{head}/b/c/d/f" in paths for head in heads),
                "chain_directories": sum(
                    f"{head}{part}" in paths
                    for head in heads
                    for part in ("", "/b", "/b/c", "/b/c/d")
                ),
            }
        # Directories of their own, made before the watch: a scan and the storm race for them.
        with bench.tmpfs() as root:
            for number in range(pairs):
                (root / f"p{number:07d}").mkdir()
            right = {f"{root}/q{n:07d}/f" for n in range(pairs)}
            result.update(judge("pairs", right, created(name, root, "pairs", pairs)))
        # One directory renamed again and again: each file was made under another name of it.
        with bench.tmpfs() as root:
            (root / "m0000000").mkdir()
            right = {f"{root}/m{n + 1:07d}/f{n:07d}" for n in range(pairs)}
            result.update(judge("moves", right, created(name, root, "moves", pairs)))
        return result

    runs = bench.each(NAMES, once)
    found = []
    for name in ("library names", "pure names", "watch --json"):
        results = runs.get(name, [])
        files = worst(results, "chain_files", min)
        directories = worst(results, "chain_directories", min)
        c = worst(runs.get("c lines", ()), "chain_files", min)
        found.append(
            row(
                f"mkdir -p race, {chains:,} chains ({name})",
                "all, exact",
                None if files is None else files == chains and directories == 4 * chains,
                "not measured"
                if files is None
                else f"{files:.0f} files, {directories:.0f} of {4 * chains} directories",
                "" if c is None else f"{c:.0f} files",
                note="worst run",
            )
        )
        for what, label in (
            ("pairs", f"rename-then-create, {pairs} pairs"),
            ("moves", f"rename-then-create, one directory {pairs} times"),
        ):
            exact = worst(results, f"{what}_exact", min)
            wrong = worst(results, f"{what}_wrong", max)
            c = worst(runs.get("c lines", ()), f"{what}_exact", min)
            found.append(
                row(
                    f"{label} ({name})",
                    "all, exact",
                    None if exact is None else exact == pairs and not wrong,
                    "not measured" if exact is None else f"{exact:.0f} exact, {wrong:.0f} wrong",
                    "" if c is None else f"{c:.0f} exact",
                    note="worst run; begun as soon as the watch was ready",
                )
            )
    return {"runs": runs, "rows": found}


if __name__ == "__main__":
    from bench.__main__ import main

    main(["races", *sys.argv[1:]])
