"""Run by asan.sh: the wire and scan tests over the sanitized module, then fuzzing for a while."""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from fanwise.kernel import native  # noqa: E402
from tests.wire import test_decode_fuzz as fuzz, test_index as index, test_tree as tree  # noqa: E402

TESTS = ("tests/wire", "tests/kernel/test_scan_dirs.py", "tests/kernel/test_drain_kernel.py")
BOUNDS = (
    "tests/wire/test_tree.py::test_a_leak_of_one_block_is_found",  # malloc does not count blocks
    "tests/wire/test_tree.py::test_long_paths_do_not_pile_up",
    "tests/wire/test_index.py::test_memory_for_a_million_names",
    "tests/wire/test_drain.py::test_an_emptied_ring_gives_its_pages_back",
    "tests/kernel/test_drain_kernel.py::test_memory_stays_within_the_ring",
)


def main() -> int:
    """Exit status: 0, or that of the tests that failed."""
    seconds = float(sys.argv[1])
    parts = native.parts(pure=False)
    import fanwise.kernel._native as module

    assert module.__file__ is not None
    assert not Path(module.__file__).is_relative_to(ROOT), module.__file__
    maps = Path("/proc/self/maps").read_text()
    assert "libasan" in maps
    assert "libubsan" in maps

    # Bounds on memory are not for a program several times as large. A report must not end in the
    # file that pytest keeps of the standard error of a process that is no more.
    status = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout=0",
         "-o", "faulthandler_timeout=0", "--capture=sys", *TESTS,
         *(f"--deselect={test}" for test in BOUNDS)],
        cwd=ROOT,
    ).returncode  # fmt: skip
    if status:
        return status
    end, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        fuzz.run(300, fuzz.check_windows, fuzz.WINDOWS, parts)
        fuzz.run(300, fuzz.check_refused, fuzz.REFUSED, parts)
        fuzz.storm(parts, rounds)
        tree.same_under(parts, 60, 60)
        index.same_under(parts, 60, 60)
        rounds += 1
    print(f"sanitizers: {rounds} rounds of fuzzing, nothing found")
    return 0


sys.exit(main())
