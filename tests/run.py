"""Run all tests, in two processes side by side: half of what they do is waiting for a kernel.

    python tests/run.py [ARGUMENTS of pytest]

What loses changes on purpose stands in one process with what lowers a limit of the whole machine.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
LOSSES = [TESTS / "kernel" / f"test_watch_{name}.py" for name in ("index", "repair", "below")]
REST = [TESTS / name for name in ("e2e", "model", "unit", "wire")]


def main() -> int:
    pytest = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    kernel = [TESTS / "kernel", *(f"--ignore={path}" for path in LOSSES)]
    with tempfile.TemporaryFile() as output:
        beside = subprocess.Popen(
            [*pytest, "-p", "no:cacheprovider", *map(str, kernel)],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            status = subprocess.run([*pytest, *map(str, LOSSES + REST)]).returncode
        finally:
            # An interrupt reaches both; each unmounts what it mounted.
            other = beside.wait()
            output.seek(0)
            sys.stdout.flush()
            sys.stdout.buffer.write(output.read())
    return status or other


if __name__ == "__main__":
    sys.exit(main())
