"""Runs a Promela model through spin: its verdict, what it asserts in vain, and what it took."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench._harness import Bench, Json, Unavailable, row
from fanwise.lab import explore, find

MODELS = Path(__file__).parents[1] / "tests/model/promela"
NEEDED = {"spin": "spin", "gcc": "gcc"}  # program: Debian package

# design: its model, and what that is compiled with
SHARED = {
    "error-event/slot-holds-mark": ("error_event.pml",),
    "eventfs/freed-flag": ("eventfs.pml",),
    "eventfs/freed-recheck": ("eventfs.pml", "-DRECHECK"),
}


class Spun(NamedTuple):
    """What spin said. ``assertion`` is the expression that was false, None when all held."""

    assertion: str | None
    states: int
    compiling: float  # processor time of spin and of the compiler
    seconds: float  # processor time of the search


def lacking() -> list[str]:
    """The Debian packages that are needed and are not there."""
    return [package for program, package in NEEDED.items() if shutil.which(program) is None]


def spin(model: str, directory: Path, *defines: str, optimise: str = "-O0") -> Spun:
    """Check every schedule of a model. Raises AssertionError when the search was not complete.

    The search takes milliseconds; compiling it takes a second, or ten with -O2.
    """
    begun = _children()
    subprocess.run(["spin", *defines, "-a", MODELS / model], cwd=directory, check=True)
    compiler = ["gcc", optimise, "-w", "-DSAFETY", "-o", "pan", "pan.c"]
    subprocess.run(compiler, cwd=directory, check=True)
    compiled = _children()
    searcher = ["./pan", "-m10000", "-w16"]
    told = subprocess.run(
        searcher, cwd=directory, check=True, capture_output=True, text=True
    ).stdout
    searched = _children()
    found = re.search(r"^pan:\d+: (.*) \(at depth \d+\)$", told, re.MULTILINE)
    states = re.search(r"(\d+) states, stored", told)
    assert states, told
    assert found or "errors: 0" in told, told
    assert "max search depth too small" not in told, told
    return Spun(
        found[1].removeprefix("assertion violated").strip() if found else None,
        int(states[1]),
        compiled - begun,
        searched - compiled,
    )


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def by_spin(name: str, bench: Bench) -> Json:
    """What spin says of a shared model, and what it takes."""
    if lacking():
        raise Unavailable(f"not installed: {', '.join(lacking())}")
    model, *defines = SHARED[name]
    with tempfile.TemporaryDirectory() as directory:
        spun = spin(model, Path(directory), *defines, optimise="-O2")
    verdict = f"breaks {spun.assertion}" if spun.assertion else "holds"
    return {
        "verdict": verdict,
        "seconds": spun.seconds,
        "states": spun.states,
        "compiling": spun.compiling,
    }


def by_us(name: str, bench: Bench) -> Json:
    """What the explorer says of the same model, without a bound as spin has none."""
    (design,) = find(name)
    start = time.process_time()
    result = explore(design, bound=None)
    verdict = f"{result.verdict} {result.property or ''}".strip()
    return {
        "verdict": verdict,
        "seconds": time.process_time() - start,
        "states": result.states,
        "steps": result.steps,
    }


# What `bench.lab` runs: name -> what takes the bench and returns figures.
BESIDE = {
    f"{who}, no bound: {name}": partial(how, name)
    for name in SHARED
    for who, how in (("spin", by_spin), ("explorer", by_us))
}


def agreement(runs: dict[str, list[Json]]) -> Json | None:
    """The row that says whether both came to the same; None when either did not run."""
    pairs = [(f"spin, no bound: {name}", f"explorer, no bound: {name}") for name in SHARED]
    both = [(runs[spun][0], runs[ours][0]) for spun, ours in pairs if {spun, ours} <= set(runs)]
    if not both:
        return None
    same = [a["verdict"].split()[0] == b["verdict"].split()[0] for a, b in both]
    return row(
        "shared models on which spin and the explorer agree",
        f"{len(SHARED)} of {len(SHARED)}",
        sum(same) == len(SHARED),
        f"{sum(same)} of {len(both)}",
        note="CPU s to search: "
        + ", ".join(f"{a['seconds']:.3f} and {b['seconds']:.2f}" for a, b in both),
    )
