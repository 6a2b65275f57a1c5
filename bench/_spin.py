"""Runs a Promela model through spin: its verdict, what it asserts in vain, and what it took."""

import re
import resource
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

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
    seconds: float  # processor time of the search alone


def lacking():
    """The Debian packages that are needed and are not there."""
    return [package for program, package in NEEDED.items() if shutil.which(program) is None]


def spin(model, directory, *defines, optimise="-O0"):
    """Check every schedule of a model. Raises AssertionError when the search was not complete.

    The search takes milliseconds; compiling it takes a second, or ten with -O2.
    """
    subprocess.run(["spin", *defines, "-a", MODELS / model], cwd=directory, check=True)
    compiler = ["gcc", optimise, "-w", "-DSAFETY", "-o", "pan", "pan.c"]
    subprocess.run(compiler, cwd=directory, check=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    searcher = ["./pan", "-m10000", "-w16"]
    told = subprocess.run(searcher, cwd=directory, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = re.search(r"^pan:\d+: (.*) \(at depth \d+\)$", told.stdout, re.MULTILINE)
    states = re.search(r"(\d+) states, stored", told.stdout)
    assert found or "errors: 0" in told.stdout, told.stdout
    assert "max search depth too small" not in told.stdout, told.stdout
    return Spun(
        found[1].removeprefix("assertion violated").strip() if found else None,
        int(states[1]),
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    )
