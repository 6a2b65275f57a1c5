"""Run all tests, in three processes side by side: most of what they do is waiting for a kernel.

    python tests/run.py [ARGUMENTS of pytest]

What loses changes on purpose stands in one process.
The command comes after it, when the sources of health have been tested beside. What only computes
is nice to those that wait for an event. Each has a mount namespace of its own where that can be
had: what looks at every mount, or is asked by whoever opens something, would meet the others'.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
LOSSES = [TESTS / "kernel" / f"test_watch_{name}.py" for name in ("index", "repair", "below")]
COMMAND = [TESTS / "e2e"]
KERNEL = [TESTS / "kernel", *(f"--ignore={path}" for path in LOSSES)]
COMPUTING = [TESTS / name for name in ("model", "unit", "wire")]


def apart() -> list[str]:
    # A slave: where mounts are shared, what others unmount meanwhile is not kept busy here.
    command = ["unshare", "--mount", "--propagation", "slave"]
    if shutil.which(command[0]) is None:
        return []
    return [] if subprocess.run([*command, "true"], capture_output=True).returncode else command


def main() -> int:
    pytest = [*apart(), sys.executable, "-m", "pytest", *sys.argv[1:], "-p", "no:cacheprovider"]
    beside = []
    for before, part in (([], KERNEL), (["nice"], COMPUTING)):
        output = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
        command = [*before, *pytest, *map(str, part)]
        beside.append((subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT), output))
    statuses = []
    try:
        statuses.append(subprocess.run([*pytest, *map(str, LOSSES + COMMAND)]).returncode)
    finally:
        # An interrupt reaches all of them; each unmounts what it mounted.
        for process, output in beside:
            statuses.append(process.wait())
            output.seek(0)
            sys.stdout.flush()
            sys.stdout.buffer.write(output.read())
            output.close()
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
