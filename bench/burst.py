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
    json_records,
    last_json,
    median,
    ratio,
    row,
    show,
    worst,
)
from bench._report import down

NAMES = ("c", "library", "library names", "watch --json", "pure", "pure names", *PEERS)
WRITERS, DIRECTORIES = 2, 100
QUIET_S = 30  # a peer that is still busy then is told to end all the same


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


# Peers that fold events by design, or have no word for a rename.
FOLDS = ("watchfiles", "watchman")
OVERFLOW = b"queue overflowed"  # watchdog says so in its log, not to its handlers
ABOUT_A_NAME = (*KINDS, "moved_away")
ABOUT = (
    "Delivered: distinct (kind, path) pairs that were told, of those that happened. watchfiles and "
    "watchman fold what happened to a name by design, so for them `survivors named` is the fair "
    "figure: the share of the files alive at the end that were told at all. The CPU of peers that "
    "are libraries is taken before they print; `library` and `pure` count, the rows with `names` "
    "keep every Change and print it, and their CPU and memory have that in them. The memory of "
    "peers that are libraries has what they were told in it, as that of the rows with `names`."
)


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
    survivors = None
    if contender.name == "c":
        counts = closing["distinct"]
    elif contender.name in ("library", "pure"):
        counts = {kind: min(closing["facts"].get(kind, 0), facts[kind]) for kind in KINDS}
    else:
        expected, found = truth(root, files), named(contender, output)
        if contender.name in FOLDS:
            # A new name is an addition.
            found["renamed"] = found["created"] & expected["renamed"]
        alive = expected["renamed"] - expected["deleted"]
        told = set().union(*(paths for kind, paths in found.items() if kind in ABOUT_A_NAME))
        survivors = len(alive & told) / len(alive)
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
        "survivors": survivors,
        "loss": loss(
            # Of what folds by design only a name that was never told is lost.
            survivors < 1
            if contender.name in FOLDS and survivors is not None
            else sum(counts.get(kind, 0) for kind in KINDS) < total,
            said(contender, output),
        ),
    }


def said(contender: Contender, output: bytes) -> bool:
    """Whether the program that uses this watcher was told, in whatever words, of a loss."""
    if last_json(output).get("lost") or (contender.name == "watchdog" and OVERFLOW in output):
        return True
    if contender.read is json_records:
        return b'"type":"lost"' in output
    return any("lost" in kinds for kinds, _, _ in contender.read(output)) or (
        contender.name == "fsnotifywait" and b"No fid in fanotify event" in output
    )


def loss(is_lost: bool, is_said: bool) -> str:
    if not is_lost:
        return "reported, none of these" if is_said else "none"
    return "reported" if is_said else "not reported"


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
                quiet = True if contender.drains else watcher.quiet(QUIET_S)
                result = watcher.stop(120)
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
    return {
        "runs": runs,
        "rows": rows(runs),
        "charts": charts(runs),
        "files": files,
        "about": ABOUT,
    }


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


def charts(runs: dict[str, list[Json]]) -> Json:
    """The plots: seconds a million delivered facts, and what was delivered."""
    cost, share_of = [], []
    for name, results in runs.items():
        share, value = median(results, "delivered"), median(results, "cpu_s_per_million")
        if share is None:
            continue
        whole = all(result["loss"] == "none" for result in results)
        if not name.endswith("names"):
            text = f"{value:.3g} s, {down(share)} delivered" if value else ""
            if value:
                cost.append({"name": name, "value": value, "label": text, "good": whole})
        if name in PEERS or not name.endswith("names"):
            alive = median(results, "survivors")
            text = down(share) + ("" if alive is None else f"; survivors {down(alive)}")
            share_of.append({"name": name, "value": share * 100, "label": text, "good": whole})
    return {
        "cpu": {
            "title": "processor seconds a million delivered facts",
            "better": "less",
            "log": True,
            "bars": cost,
        },
        "delivered": {
            "title": "facts delivered, per cent",
            "better": "more",
            "log": False,
            "bars": share_of,
        },
    }


if __name__ == "__main__":
    from bench.__main__ import main

    main(["burst", *sys.argv[1:]])
