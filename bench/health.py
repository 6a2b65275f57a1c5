"""How long after an ext4 error does a program know the incident, and what does listening cost?"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench._harness import FANWISE, HERE, PYTHON, Bench, Json, Mount, median, ratio, row, sh, show

NAMES = ("bare reader", "health --json")
# Twice without: what differs between these two is what the measurement itself is good for.
LOADS = ("not listened to", "not listened to, again", "listened to")
ROUNDS = 9
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
        environ["FANWISE_HEALTH_ONLY"] = str(at)  # other filesystems are others' business
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
    sysfs = Path("/sys/fs/ext4", device_of(mount))
    trigger = os.open(sysfs / "trigger_fs_error", os.O_WRONLY)
    times = []
    try:
        with listening(bench, name, mount.path, trace) as child:
            assert child.stdout is not None
            for _ in range(count):
                before = int((sysfs / "errors_count").read_text())
                began = time.monotonic_ns()
                os.pwrite(trigger, b"bench", 0)
                while line := child.stdout.readline():
                    arrived = time.monotonic_ns()
                    if name == "bare reader":
                        break
                    record = json.loads(line)
                    # Not what is told at the start, nor of the error before.
                    if record["type"] == "incident" and record["total"] > before:
                        assert record["total"] == before + 1
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


def load(bench: Bench, name: str, at: Path, trace: Path) -> Json:
    """CPU seconds of a workload of files, synced to the disk, on a filesystem without errors."""
    files = 1_000 if bench.quick else 10_000
    script = (
        "import os, sys\n"
        "at, files = sys.argv[1], int(sys.argv[2])\n"
        "os.mkdir(at)\n"
        "for i in range(files):\n"
        "    fd = os.open(f'{at}/{i}', os.O_CREAT | os.O_RDWR)\n"
        "    os.write(fd, b'x' * 4096); os.pread(fd, 4096, 0); os.close(fd)\n"
        "    os.rename(f'{at}/{i}', f'{at}/r{i}')\n"
        "for i in range(files): os.unlink(f'{at}/r{i}')\n"
        "os.rmdir(at); os.sync()\n"
    )
    with contextlib.ExitStack() as stack:
        if name == "listened to":
            stack.enter_context(listening(bench, "health --json", at, trace))
        began = time.monotonic()
        argv = [str(PYTHON), "-BIS", "-c", script, str(at / "load"), str(files)]
        child = subprocess.Popen(argv)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = status
        if status:
            raise RuntimeError(f"the workload ended with {status}")
        wall = time.monotonic() - began
    return {"cpu_s": usage.ru_utime + usage.ru_stime, "wall_s": wall}


def loads(bench: Bench, trace: Path) -> dict[str, list[Json]]:
    """The same directory and disk for all, in another order each round."""
    found: dict[str, list[Json]] = {name: [] for name in LOADS}
    with bench.ext4(20_000) as mount:
        load(bench, "warm", mount.path, trace)
        for turn in range(3 if bench.quick else ROUNDS):
            order = LOADS[turn % 3 :] + LOADS[: turn % 3]
            for name in order:
                found[name].append(load(bench, name, mount.path, trace))
    for name, runs in found.items():
        bench.say(f"  {name}: {' '.join(format(r['cpu_s'], '.3f') for r in runs)}")
    return found


def run(bench: Bench) -> Json:
    with tracefs(bench) as trace:
        with bench.ext4(100) as mount:
            runs = bench.each(NAMES, lambda name: latency(bench, name, mount, trace))
        if not bench.only:
            runs |= loads(bench, trace)
    bare, ours = (median(runs.get(name, ()), "median_ms") for name in NAMES)
    without, again, with_it = (median(runs.get(name, ()), "cpu_s") for name in LOADS)
    cost, noise = ratio(with_it, without), ratio(again, without)
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
                " instance and without; not a C reader, but the same without, and that measured"
                f" again is {show(noise)} times it",
            ),
        ],
    }


if __name__ == "__main__":
    from bench.__main__ import main

    main(["health", *sys.argv[1:]])
