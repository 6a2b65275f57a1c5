"""What must be up to tell whether a filesystem is healthy."""

import pytest

from fanwise.health._channels import NAMES
from fanwise.health._look import missing
from fanwise.sources.state import SourceState


def states(*down):
    return {
        name: SourceState(name, "down" if name in down else "up", f"no {name}" * (name in down))
        for name in NAMES
    }


@pytest.mark.parametrize(
    ("fstype", "down", "lacks"),
    [
        ("ext4", (), []),
        ("ext4", ("fserror", "trace"), []),
        ("ext4", ("counters", "kmsg"), []),
        ("ext4", ("counters", "fserror"),
         ["counters and fserror are down: no counters; no fserror"]),
        ("ext4", ("trace", "kmsg"), ["trace and kmsg are down: no trace; no kmsg"]),
        ("btrfs", ("fserror", "trace", "kmsg"), []),
        ("btrfs", ("counters",), ["counters is down: no counters"]),
        ("xfs", ("fserror", "counters", "kmsg"), []),
        ("xfs", ("trace",), ["trace is down: no trace"]),
        ("vfat", ("trace",), ["trace is down: no trace"]),
        ("xfs", ("mounts",), ["mounts is down: no mounts"]),
    ],
)  # fmt: skip
def test_what_is_missing(fstype, down, lacks):
    assert missing(fstype, states(*down)) == lacks


def test_of_what_said_nothing_all_is_missing():
    assert missing("xfs", {}) == ["trace is down", "mounts is down"]
