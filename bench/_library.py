"""A program that uses fanwise as a library: what `library` and `pure` are in the tables.

python _library.py MODE [--pure] [--stall SECONDS] [--queue BYTES] PATH

count   looks at the kinds and the path of every Change and keeps only totals: the cost of watching
record  keeps every Change, and prints them when it has been told to end: for truth and times
scan    ends by itself when the whole model is there, and says what that took
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import fanwise


def anonymous() -> int:
    """Bytes of private memory in use (the ring counts only where it was touched)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def count(watch) -> dict:
    kinds: Counter = Counter()
    unknown = lost = losses = 0
    exact = True
    for batch in watch.batches():
        for change in batch:
            kinds[change.kinds] += 1
            if change.path is None:
                unknown += 1
            if change.kinds == ("lost",):
                losses += 1
                if change.count is None:
                    exact = False
                else:
                    lost += change.count
    totals: Counter = Counter()
    for names, number in kinds.items():
        for name in names:
            totals[name] += number
    return {
        "facts": totals,
        "changes": kinds.total(),
        "unknown": unknown,
        "lost": lost,
        "losses": losses,
        "lost_exact": exact,
    }


def record(watch) -> dict:
    kept = []
    for batch in watch.batches():
        kept.append((time.monotonic_ns(), watch.scanned, batch))
    for at, scanned, batch in kept:
        for change in batch:
            line = {
                "type": "change",
                "kinds": change.kinds,
                "path": change.path,
                "old_path": change.old_path,
                "dir": change.is_dir,
                "path_source": change.path_source,
                "scanned": scanned,
                "ns": at,
            }
            print(json.dumps(line))
    return {}


def scan(watch, entered: dict) -> dict:
    while not watch.scanned:
        time.sleep(0.002)
    cpu = time.process_time()
    gc.collect()
    return {
        "scan_cpu_s": cpu - entered["cpu"],
        "scan_s": time.monotonic() - entered["at"],
        "scan_bytes": anonymous() - entered["anonymous"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=("count", "record", "scan"))
    parser.add_argument("--pure", action="store_true")
    parser.add_argument("--stall", type=float, default=0, help="seconds before the first read")
    parser.add_argument("--queue", type=int)
    parser.add_argument("path")
    args = parser.parse_args()
    if args.pure:
        os.environ["FANWISE_PURE"] = "1"
    more = {"queue": args.queue} if args.queue else {}
    gc.collect()
    before = {"cpu": time.process_time(), "at": time.monotonic(), "anonymous": anonymous()}
    with fanwise.watch(args.path, pure=True if args.pure else None, **more) as watch:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: watch.stop())
        print("READY", flush=True)
        if args.mode == "scan":
            result = scan(watch, before)
        else:
            end = time.monotonic() + args.stall
            while (left := end - time.monotonic()) > 0:
                time.sleep(left)
            result = (count if args.mode == "count" else record)(watch)
    print(json.dumps({"type": "stopped", **result}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
