"""How long after an ext4 error does a program know the incident, and what does listening cost?"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench._harness import FANWISE, HERE, PYTHON, Bench, Json, Mount, median, ratio, row, sh, show

NAMES = ("bare reader", "health --json")
LOADS = ("not listened to", "listened to")
GAP = 0.25  # seconds between two errors


@contextlib.contextmanager
def tracefs(bench: Bench) -> Iterator[Path]:
    point = bench.scratch / "tracefs"
    point.mkdir()
    sh("mount", "-t", "tracefs", "fanwise-bench", point)
    try:
        yield point
    finally:
        sh("umount", point)


@contextlib.contextmanager
def listening(bench: Bench, name: str, at: Path, trace: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A listener that is ready; it ends in order."""
    environ = dict(os.environ)
    argv = [str(PYTHON), str(HERE / "_health_reader.py"), str(at), str(trace)]
    if name != "bare reader":
        where = bench.scratch / f"state{time.monotonic_ns()}"
        environ["FANWISE_HEALTH_STATE"] = str(where)
        environ["FANWISE_HEALTH_SECOND"] = str(where / "second.db")
        environ["FANWISE_HEALTH_TRACEFS"] = str(trace)
        argv = [str(FANWISE), "health", "--follow", "--json", str(at)]
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ)
    assert child.stdout is not None
    assert child.stdin is not None
    try:
        line = child.stdout.readline()
        if b"ready" not in line:
            raise RuntimeError(f"{name} did not get ready: {line!r}")
        if name != "bare reader" and json.loads(line)["sources"]["trace"]["state"] != "up":
            raise RuntimeError(f"no trace: {line!r}")
        yield child
    finally:
        child.stdin.close()
        if name != "bare reader":
            child.terminate()
        child.stdout.read()
        child.wait(30)
        child.stdout.close()


def device_of(mount: Mount) -> str:
    number = os.stat(mount.path).st_dev
    return Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve().name


def latency(bench: Bench, name: str, mount: Mount, trace: Path) -> Json:
    """From before the call that raises the error until its line was read from the pipe."""
    count = 10 if bench.quick else 100
    trigger = os.open(f"/sys/fs/ext4/{device_of(mount)}/trigger_fs_error", os.O_WRONLY)
    times = []
    try:
        with listening(bench, name, mount.path, trace) as child:
            assert child.stdout is not None
            total = 0
            for _ in range(count):
                began = time.monotonic_ns()
                os.pwrite(trigger, b"bench", 0)
                while line := child.stdout.readline():
                    arrived = time.monotonic_ns()
                    if name == "bare reader":
                        break
                    record = json.loads(line)
                    if record["type"] == "incident" and record["total"] > total:
                        total = record["total"]
                        break
                times.append((arrived - began) / 1e6)
                time.sleep(GAP)
    finally:
        os.close(trigger)
    times.sort()
    return {
        "median_ms": statistics.median(times),
        "p99_ms": times[min(int(len(times) * 0.99), len(times) - 1)],
        "told": len(times),
    }


def load(bench: Bench, name: str, trace: Path) -> Json:
    """CPU seconds of a workload of files, synced to the disk, on a filesystem without errors."""
    files = 2_000 if bench.quick else 40_000
    script = (
        "import os, sys\n"
        "at, files = sys.argv[1], int(sys.argv[2])\n"
        "for i in range(files):\n"
        "    if i % 500 == 0: os.mkdir(f'{at}/{i}'); last = i\n"
        "    fd = os.open(f'{at}/{last}/{i}', os.O_CREAT | os.O_RDWR)\n"
        "    os.write(fd, b'x' * 4096); os.pread(fd, 4096, 0); os.close(fd)\n"
        "    os.rename(f'{at}/{last}/{i}', f'{at}/{last}/r{i}')\n"
        "    if i % 2: os.unlink(f'{at}/{last}/r{i}')\n"
        "os.sync()\n"
    )
    with contextlib.ExitStack() as stack:
        mount = stack.enter_context(bench.ext4(files))
        if name == "listened to":
            stack.enter_context(listening(bench, "health --json", mount.path, trace))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.monotonic()
        argv = [str(PYTHON), "-BIS", "-c", script, str(mount.path), str(files)]
        subprocess.run(argv, check=True)
        wall = time.monotonic() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_s": cpu, "wall_s": wall}


def run(bench: Bench) -> Json:
    with tracefs(bench) as trace:
        with bench.ext4(100) as mount:
            runs = bench.each(NAMES, lambda name: latency(bench, name, mount, trace))
        turns = bench.turns
        bench.turns = turns * 3  # CPU seconds of a workload on a disk differ more than times do
        try:
            runs |= bench.each(LOADS, lambda name: load(bench, name, trace))
        finally:
            bench.turns = turns
    bare, ours = (median(runs.get(name, ()), "median_ms") for name in NAMES)
    without, with_it = (median(runs.get(name, ()), "cpu_s") for name in LOADS)
    cost = ratio(with_it, without)
    return {
        "runs": runs,
        "rows": [
            row(
                "ext4 error to incident, median (health --json)",
                "<= 5 ms",
                None if ours is None else ours <= 5,
                show(ours, "ms"),
                show(bare, "ms"),
                ratio(ours, bare),
                "from before the call until its line was read; beside it a bare Python reader of"
                " the same descriptors",
            ),
            row(
                "a workload of files that is listened to, CPU",
                "<= 1.02x not listened to",
                None if cost is None else cost <= 1.02,
                show(with_it, "s"),
                show(without, "s"),
                cost,
                "create, write, read, rename, unlink and sync on ext4, with the private trace"
                " instance and without; no C reader",
            ),
        ],
    }


if __name__ == "__main__":
    from bench.__main__ import main

    main(["health", *sys.argv[1:]])
