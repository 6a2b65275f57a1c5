"""promtool, as `make promtool` unpacks it from Debian's package."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def find():
    unpacked = ROOT / ".venv/promtool/usr/bin/promtool"
    return str(unpacked) if unpacked.exists() else shutil.which("promtool")


def check(cannot_run, *arguments, text=None):
    """Run it; (status, all that it said)."""
    program = find()
    if program is None:
        cannot_run("no promtool: run make promtool")
    done = subprocess.run([program, *map(str, arguments)], input=text, capture_output=True)
    return done.returncode, (done.stdout + done.stderr).decode()
