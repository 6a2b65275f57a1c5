"""python -m bench [QUESTION...] [--quick] [--only CONTENDER...]

Answers the questions (all of them when none is named), keeps each answer in bench/results.json,
and writes bench/RESULTS.md and the plots from all answers kept. `report` only writes.

A question is a module here whose name has no underscore in front. Its `run(bench)` returns `runs`,
`rows` and what is to be drawn; it may have `COLUMNS`, what the table of its runs shows.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from bench import _report
from bench._harness import HERE, PYTHON, Bench, machine

FIRST = (
    "burst",
    "correctness",
    "small_root",
    "ready",
    "scan",
    "races",
    "latency",
    "stuck_consumer",
)


def discover(where: Path = HERE) -> tuple[str, ...]:
    """Every question that there is: the oldest in their order, then the others by name."""
    found = {path.stem for path in where.glob("*.py") if not path.name.startswith("_")}
    return (*(name for name in FIRST if name in found), *sorted(found - set(FIRST)))


QUESTIONS = discover()


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "question", nargs="*", choices=[[], *QUESTIONS, "report"], metavar="QUESTION"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small and once: to try the bench itself"
    )
    parser.add_argument("--runs", type=int, help="of each contender (3, or what the question says)")
    parser.add_argument("--only", nargs="+", default=(), metavar="CONTENDER")
    parser.add_argument("--into", type=Path, default=None, help="where the results are kept")
    args = parser.parse_args(argv)
    # A try-out must not replace figures that were measured.
    into = (args.into or (HERE / ".cache/quick" if args.quick or args.only else HERE)).resolve()
    if os.geteuid():
        sys.exit("bench: needs root (filesystem marks, mounts, memory groups)")

    questions = [q for q in args.question if q != "report"]
    if not args.question:
        questions = list(QUESTIONS)
    into.mkdir(parents=True, exist_ok=True)
    kept = into / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for question in questions:
        print(f"{question}:", file=sys.stderr, flush=True)
        load, began = os.getloadavg()[0], time.monotonic()
        module = importlib.import_module(f"bench.{question}")
        turns = args.runs or getattr(module, "RUNS", 3)
        with Bench(quick=args.quick, turns=turns, only=frozenset(args.only)) as bench:
            answer = module.run(bench)
        if hasattr(module, "COLUMNS"):
            answer["columns"] = module.COLUMNS
        answer["took_s"] = round(time.monotonic() - began, 1)
        answer["missing"] = bench.missing
        answer["machine"] = machine()
        answer["load_at_start"] = round(load, 2)
        answer["quick"] = args.quick
        answer["when"] = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        options = [
            *(["--quick"] if args.quick else []),
            *(["--runs", str(args.runs)] if args.runs else []),
            *(["--only", *args.only] if args.only else []),
        ]
        answer["command"] = shlex.join(["python", "-m", "bench", question, *options])
        results[question] = answer
        # After each, so that a later question that fails costs nothing that was measured.
        kept.write_text(json.dumps(results, indent=1) + "\n")
        for row in answer["rows"]:
            print("  " + _report.line(row), file=sys.stderr, flush=True)
    _report.write(results, into)
    if into == HERE and results:
        # The page is made from the results that were just written.
        subprocess.run([PYTHON, HERE.parent / "docs/_generate.py"], check=True)
    print(into / "RESULTS.md")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
