"""What every test shares: how a test says that it cannot run, and that nothing is left behind."""

import os
import re
import subprocess
from pathlib import Path

import pytest

# Reasons for which a test may be skipped even where CI is set, because the kernel there truly lacks
# what it needs. Each with a comment that says what and why. Empty: nothing is lacking.
CI_LACKS: tuple[str, ...] = ()


@pytest.fixture(scope="session")
def cannot_run():
    """Call it with the reason: the test is skipped, and where CI is set it fails."""

    def stop(reason):
        __tracebackhide__ = True
        if os.environ.get("CI") and reason not in CI_LACKS:
            pytest.fail(f"cannot run, and CI is set: {reason}")
        pytest.skip(reason)

    return stop


@pytest.fixture
def tracefs(tmp_path):
    """The path of a mount of tracefs, which the machine need not have."""
    point = tmp_path / "tracefs"
    point.mkdir()
    subprocess.run(["mount", "-t", "tracefs", "fanwise-test", point], check=True)
    try:
        yield str(point)
    finally:
        # Lazily: another run of tests that looks for a tracefs may have found this one.
        subprocess.run(["umount", "--lazy", point], check=True)


@pytest.fixture(scope="session", autouse=True)
def _nothing_left(tmp_path_factory):
    before = _machine(tmp_path_factory.getbasetemp())
    yield
    left = _machine(tmp_path_factory.getbasetemp()) - before
    assert not left, "left behind by this run: " + "; ".join(sorted(left))


# Mounts and loop devices count when they are below this run's directory, because others may be
# using the machine: other parts of the same tests do (run.py). All in bytes: what others have
# mounted, or how they call their processes, need not be text. A loop device that was detached while
# somebody looked at it, or had a copy of its mount in his namespace, goes when he has done.
def _machine(base):
    below = os.fsencode(f"{base}/")

    def ours(path):
        return path.startswith(below)

    found = set()
    for line in Path("/proc/self/mountinfo").read_bytes().split(b"\n")[:-1]:
        point = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), line.split(b" ")[4])
        if ours(point):
            found.add(f"mount {os.fsdecode(point)!r}")
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            file = backing.read_bytes().rstrip(b"\n")
            detached = (backing.parent / "autoclear").read_bytes() == b"1\n"
        except OSError:  # detached meanwhile
            continue
        if ours(file) and not detached:
            found.add(f"{backing.parts[3]} on {os.fsdecode(file)!r}")
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_bytes().rpartition(b")")
        except OSError:  # ended meanwhile
            continue
        if int(rest.split()[1]) == os.getpid():
            found.add(f"process {os.fsdecode(name)!r})")
    return found
