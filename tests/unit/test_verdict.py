"""What must be up to tell whether a filesystem is healthy."""

import pytest

from fanwise import Exit
from fanwise.cli._health import verdict
from fanwise.health import Filesystem, FilesystemState, Report
from fanwise.health._channels import NAMES
from fanwise.health._look import COVERED, missing
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


def report(*states):
    return Report(
        filesystems=tuple(
            FilesystemState(
                fs=Filesystem(device="7:1", fstype=fstype), covered=fstype in COVERED, state="ok",
                verdict=verdict, why=None, open=0, counters={}, listened=None, writer=None,
                sources={},
            )
            for fstype, verdict in states
        ),
        entries=(), writer=None, listened=None, sources={}, notes=(),
    )  # fmt: skip


def test_a_boot_partition_keeps_no_machine_from_being_healthy():
    boot, root = ("vfat", "cannot tell"), ("ext4", "healthy")
    assert verdict(report(boot, root), named=False) == Exit.OK
    assert verdict(report(boot), named=True) == Exit.CANNOT_TELL
    assert verdict(report(boot, root, ("xfs", "cannot tell")), named=False) == Exit.CANNOT_TELL
    assert verdict(report(), named=False) == Exit.CANNOT_TELL
