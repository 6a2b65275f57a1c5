"""What does the repair of a loss cost, against walking the tree oneself?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench._harness import PYTHON, Bench, Json, below, last_json, median, ratio, row, show

DIRECTORIES = 1_000


def run(bench: Bench) -> Json:
    files, changes = (20_000, 2_000) if bench.quick else (1_000_000, 100_000)

    def once(name: str) -> Json:
        with bench.tmpfs() as root:
            _make(root, files)
            argv = [PYTHON, "-m", "bench.repair", name, str(root), str(changes)]
            done = subprocess.run(argv, stdout=subprocess.PIPE, check=True)
            return last_json(done.stdout)

    names = [name for name in ("library", "pure") if not bench.only or name in bench.only]
    runs: dict[str, list[Json]] = {name: [once(name) for _ in range(bench.runs)] for name in names}
    results = runs.get("library", [])
    whole, walk = median(results, "repair_cpu_s"), median(results, "walk_cpu_s")
    names_only = median(results, "names_cpu_s")
    part = median(results, "partial_cpu_s")
    index, index_walk = median(results, "index_cpu_s"), median(results, "index_walk_cpu_s")
    what = f"of {changes:,} lost changes among {files:,} files"
    return {
        "runs": runs,
        "rows": [
            row(
                f"repair of every directory {what}",
                "<= 1.5x os.scandir + os.stat",
                below(ratio(whole, walk), 1.5),
                show(whole, "s"),
                ratio=ratio(whole, walk),
                note=f"CPU from resume to repaired, names told; the walk takes {show(walk, 's')}, "
                f"one that only lists names {show(names_only, 's')}",
            ),
            row(
                f"repair after a full ring, 1 % of the directories hit, {what}",
                "<= 0.1x os.scandir + os.stat",
                below(ratio(part, walk), 0.1),
                show(part, "s"),
                ratio=ratio(part, walk),
                note="CPU from the first read of the loss to repaired",
            ),
            row(
                f"repair with an index {what}, the differences told",
                "<= 1.5x os.scandir + os.stat",
                below(ratio(index, index_walk), 1.5),
                show(index, "s"),
                ratio=ratio(index, index_walk),
                note=f"CPU from resume to repaired; the walk {show(index_walk, 's')}, the first "
                f"scan {show(median(results, 'index_scan_cpu_s'), 's')}",
            ),
            row(
                "memory of the index a file, its name of 10 bytes included",
                "<= 170 bytes",
                below(median(results, "index_bytes_a_name"), 170),
                show(median(results, "index_bytes_a_name"), "bytes"),
            ),
            row(
                "CPU a change with an index, against without",
                "",
                None,
                show(median(results, "live_index_us"), "us"),
                ratio=ratio(median(results, "live_index_us"), median(results, "live_us")),
                note="from read to told, files made, written and removed in known directories",
            ),
            row(
                "a core used within the 5 s after repaired, with an index",
                "<= 1 %",
                below(median(results, "index_after_percent"), 1),
                show(median(results, "index_after_percent"), "%"),
            ),
            row(
                "a core used within the 5 s after repaired",
                "<= 1 %",
                below(median(results, "after_percent"), 1),
                show(median(results, "after_percent"), "%"),
            ),
        ],
    }


def _make(root: Path, files: int) -> None:
    for number in range(DIRECTORIES):
        directory = root / f"d{number:04d}"
        directory.mkdir()
        fd = os.open(directory, os.O_RDONLY)
        for each in range(files // DIRECTORIES):
            os.mknod(f"file{each:06d}", dir_fd=fd)
        os.close(fd)


def _change(root: Path, changes: int) -> None:
    """Half of them remove a name, half make one, in every directory."""
    for number in range(DIRECTORIES):
        fd = os.open(root / f"d{number:04d}", os.O_RDONLY)
        for each in range(changes // DIRECTORIES // 2):
            os.unlink(f"file{each:06d}", dir_fd=fd)
            os.mknod(f"new{each:06d}", dir_fd=fd)
        os.close(fd)


def _flood(root: Path, changes: int) -> None:
    """The same number of changes in 1 % of the directories; the names are gone afterwards."""
    for number in range(DIRECTORIES // 100):
        fd = os.open(root / f"d{number:04d}", os.O_RDONLY)
        for each in range(changes // (DIRECTORIES // 100) // 2):
            os.mknod(f"flood{each:06d}", dir_fd=fd)
            os.unlink(f"flood{each:06d}", dir_fd=fd)
        os.close(fd)


def _walk(root: Path, look: bool) -> float:
    begin = time.process_time()
    todo = [os.fspath(root)]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                if look:
                    os.stat(entry.path, follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
    return time.process_time() - begin


def child(name: str, root: Path, changes: int) -> Json:
    """Measure in one process, one after the other: the same cache."""
    import fanwise

    def until_repaired(watch: fanwise.Watch) -> float:
        begin = time.process_time()
        while not any(change.kinds == ("repaired",) for change in watch.read(60)):
            pass
        return time.process_time() - begin

    result: Json = {}
    with fanwise.watch(root, kinds=["created", "deleted"], pure=name == "pure") as watch:
        while not watch.scanned:
            watch.read(0.05)
        watch.pause()
        _change(root, changes)
        _walk(root, True)  # whoever comes first would pay for the cache
        watch.resume()
        result["repair_cpu_s"] = until_repaired(watch)
        result["walk_cpu_s"] = _walk(root, True)
        result["names_cpu_s"] = _walk(root, False)
        begin, at = time.process_time(), time.monotonic()
        while time.monotonic() - at < 5:
            watch.read(max(0.0, at + 5 - time.monotonic()))
        result["after_percent"] = (time.process_time() - begin) / 5 * 100
    with fanwise.watch(
        root, kinds=["created", "deleted"], pure=name == "pure", queue=64 << 10
    ) as watch:
        while not watch.scanned:
            watch.read(0.05)
        _flood(root, changes)
        time.sleep(0.5)  # the drain discards
        result["partial_cpu_s"] = until_repaired(watch)
    index_child(name, root, changes, result, until_repaired)
    return result


def index_child(
    name: str, root: Path, changes: int, result: Json, until_repaired: Callable[[Any], float]
) -> None:
    """Do the same with an index; the names of the first round make way for another one."""
    import fanwise

    for number in range(DIRECTORIES):
        fd = os.open(root / f"d{number:04d}", os.O_RDONLY)
        for each in range(changes // DIRECTORIES // 2):
            os.rename(f"new{each:06d}", f"file{each:06d}", src_dir_fd=fd, dst_dir_fd=fd)
        os.close(fd)
    kinds = ["created", "deleted", "modified"]
    begin = time.process_time()
    with fanwise.watch(root, kinds=kinds, pure=name == "pure", index=True) as watch:
        while not watch.scanned:
            watch.read(0.05)
        result["index_scan_cpu_s"] = time.process_time() - begin
        result["index_bytes_a_name"] = watch.stats()["index_bytes"] / watch.names
        watch.pause()
        _change(root, changes)
        _walk(root, True)
        watch.resume()
        result["index_cpu_s"] = until_repaired(watch)
        result["index_walk_cpu_s"] = _walk(root, True)
        begin, at = time.process_time(), time.monotonic()
        while time.monotonic() - at < 5:
            watch.read(max(0.0, at + 5 - time.monotonic()))
        result["index_after_percent"] = (time.process_time() - begin) / 5 * 100
    for key, index in (("live_us", False), ("live_index_us", True)):
        with fanwise.watch(root / "d0000", kinds=kinds, pure=name == "pure", index=index) as watch:
            while not watch.scanned:
                watch.read(0.05)
            watch.read(0.1)
            fd = os.open(root / "d0000", os.O_RDONLY)
            for each in range(changes):
                os.mknod(f"live{each:06d}", dir_fd=fd)
            os.close(fd)
            time.sleep(0.2)
            told, begin = 0, time.process_time()
            while told < changes:
                told += len(watch.read(5))
            result[key] = (time.process_time() - begin) / changes * 1e6
        for each in range(changes):
            os.unlink(root / f"d0000/live{each:06d}")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("library", "pure"):
        print(json.dumps(child(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
    else:
        from bench.__main__ import main

        main(["repair", *sys.argv[1:]])
