"""A program that uses fanwise as a library: what `library` and `pure` are in the tables.

python _library.py MODE [--pure] [--stall SECONDS] [--queue BYTES] [--check] [--user NAME]
                   [--refuse-fanotify] PATH

count   looks at every Change and keeps only totals: the cost of watching
record  keeps every Change, and prints them when it has been told to end: for truth and times;
        with --check the name of each deletion is opened as soon as it is told
who     asks for processes, and says of how many files the writer is known
scan    ends by itself when the whole model is there, and says what that took
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import gc
import importlib
import json
import os
import pkgutil
import pwd
import signal
import struct
import sys
import time
from collections import Counter
from operator import attrgetter
from pathlib import Path

import fanwise


def anonymous() -> int:
    """Bytes of private memory in use (the ring counts only where it was touched)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def count(watch) -> dict:
    # One pass over every Change, in C: what the loop of a program does with a Change is not the
    # cost of watching. What the changes say is judged in the runs that record them.
    kinds_of = attrgetter("kinds")
    seen: Counter = Counter()
    lost = 0
    lost_exact = True
    for batch in watch.batches():
        before = seen["lost",]
        seen.update(map(kinds_of, batch))
        if seen["lost",] != before:
            for change in batch:
                if change.kinds == ("lost",):
                    lost += change.count or 0
                    lost_exact = lost_exact and change.count is not None
    totals: Counter = Counter()
    for kinds, number in seen.items():
        for kind in kinds:
            totals[kind] += number
    for kind in ("lost", "relisted", "repaired"):
        del totals[kind]
    return {
        "facts": totals,
        "changes": seen.total(),
        "lost": lost,
        "lost_exact": lost_exact,
    }


def opens(path: str | None) -> bool:
    try:
        os.close(os.open(path or "", os.O_RDONLY))
    except OSError:
        return False
    return True


def record(watch, check: bool = False) -> dict:
    kept = []
    deletes = stale = lost = 0
    for batch in watch.batches():
        kept.append((time.monotonic_ns(), watch.scanned, batch))
        if check:
            gone = [change.path for change in batch if "deleted" in change.kinds]
            deletes += len(gone)
            stale += sum(map(opens, gone))
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
            lost += "lost" in change.kinds
            print(json.dumps(line))
    return {"lost": lost, "deletes_told": deletes, "stale": stale}


def who(watch) -> dict:
    """Of each file that a writer of the storm made, what is known of the writer."""
    seen: Counter = Counter()
    files: dict[str, object] = {}
    facts: Counter = Counter()
    for batch in watch.batches():
        for change in batch:
            facts.update(change.kinds)
            # Of the changes of a file that a process did, one says as much as the other.
            if change.pid and not change.is_dir:
                known = files.get(change.path)
                if known is None or known.state == "gone":
                    files[change.path] = change.process
    for process in files.values():
        seen["files"] += 1
        seen["named"] += process.name == "fw-writer"
        seen["exe"] += (process.exe or "").endswith("/fw-writer")
        seen["user"] += process.user == "root"
        seen["gone"] += process.state == "gone"
        seen["wrong"] += process.name not in (None, "fw-writer")
    return {"facts": facts, "who": seen, "stats": watch.stats()}


def scan(watch, entered: dict) -> dict:
    while not watch.scanned:
        watch.read(0.01)  # what the scan finds is taken over when the program reads
    cpu = time.process_time()
    gc.collect()
    return {
        "scan_cpu_s": cpu - entered["cpu"],
        "scan_s": time.monotonic() - entered["at"],
        "scan_bytes": anonymous() - entered["anonymous"],
    }


def become(user: str) -> None:
    entry = pwd.getpwnam(user)
    os.setgroups([])
    os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
    os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)


def refuse_fanotify() -> None:
    """Answer fanotify_init(2) with EPERM from now on, as the filter of a container does."""
    number = {"x86_64": 300, "aarch64": 262}[os.uname().machine]
    load, equal, answer = 0x20, 0x15, 0x06
    program = [
        (load, 0, 0, 0),
        (equal, 0, 1, number),
        (answer, 0, 0, 0x0005_0000 | errno.EPERM),
        (answer, 0, 0, 0x7FFF_0000),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *i) for i in program))
    header = struct.pack("@HP", len(program), ctypes.addressof(code))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for arguments in ((38, 1, 0, 0, 0), (22, 2, header)):  # no new privileges; seccomp, filter
        if prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=("count", "record", "scan", "who"))
    parser.add_argument("--pure", action="store_true")
    parser.add_argument("--stall", type=float, default=0, help="seconds before the first read")
    parser.add_argument("--queue", type=int)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--user")
    parser.add_argument("--refuse-fanotify", action="store_true")
    parser.add_argument("--rung", help="ask for this one")
    parser.add_argument("path")
    args = parser.parse_args()
    more = {"queue": args.queue} if args.queue else {}
    if args.rung:
        os.environ["FANWISE_RUNG"] = args.rung
    gc.collect()
    before = {"cpu": time.process_time(), "at": time.monotonic(), "anonymous": anonymous()}
    if args.user:
        # Another user may not be able to read the modules; everything is imported before.
        for module in pkgutil.walk_packages(fanwise.__path__, "fanwise."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    if args.refuse_fanotify:
        refuse_fanotify()
    if args.user:
        become(args.user)
    # pure=False is an error where the native module is missing, not a silent change of subject.
    with fanwise.watch(args.path, pure=args.pure, who=args.mode == "who", **more) as watch:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: watch.stop())
        print("READY", flush=True)
        if args.mode == "scan":
            result = scan(watch, before)
        else:
            end = time.monotonic() + args.stall
            while (left := end - time.monotonic()) > 0:
                time.sleep(left)
            if args.mode == "record":
                result = record(watch, args.check)
            else:
                result = {"count": count, "who": who}[args.mode](watch)
        rungs = sorted({root.rung for root in watch.roots})
    print(json.dumps({"type": "stopped", "rungs": rungs, **result}))
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except fanwise.FanwiseError as error:
        sys.exit(f"{type(error).__name__}: {error}")
