"""After any storm the paths told are the paths on disk: random operations on real filesystems.

The names are few, so that names and objects recur within one unread window, which is where the
kernel's merging makes the order of records unknowable.
"""

import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from tests.kernel.watching import on_disk, replay, scanned, short, watching

NAMES = ("a", "b", "c")
PATHS = [*NAMES, *(f"{d}/{n}" for d in ("d", "e") for n in NAMES), "d", "e"]

Step = tuple[str, str, str]
steps = st.lists(
    st.tuples(
        st.sampled_from(["write", "unlink", "rename", "link", "mkdir", "rmdir", "rename", "link"]),
        st.sampled_from(PATHS),
        st.sampled_from(PATHS),
    ),
    max_size=40,
)


def do(root: Path, step: Step) -> None:
    """One operation; most make no sense in the state that they meet, and are refused."""
    what, one, two = step[0], root / step[1], root / step[2]
    try:
        if what == "write":
            with open(one, "a") as file:
                file.write("x")
        elif what == "unlink":
            one.unlink()
        elif what == "rename":
            one.rename(two)
        elif what == "link":
            os.link(one, two)
        elif what == "mkdir":
            one.mkdir()
        elif what == "rmdir":
            one.rmdir()
    except OSError:
        return


def clear(root: Path) -> None:
    for path in root.iterdir():
        if path.name != "lost+found":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def one_storm(root: Path, storm: list[Step], pure: bool) -> None:
    clear(root)
    (root / "d").mkdir()
    (root / "a").touch()
    before = on_disk(root)
    with watching(root, pure=pure, kinds=["created", "renamed", "deleted", "modified"]) as r:
        scanned(r)
        # Uses up the drain's tokens, so that what follows stays unread together.
        for _ in range(12):
            (root / ".warm").touch()
            (root / ".warm").unlink()
        for step in storm:
            do(root, step)
        told = [c for c in r.told() if not c.path.endswith("/.warm")]
    assert replay(told, before) == on_disk(root), "\n".join(map(str, short(told, root)))


@given(storm=steps)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_tmpfs(tmpfs: Path, pure: bool, storm: list[Step]) -> None:
    one_storm(tmpfs, storm, pure)


@pytest.mark.parametrize("seed", range(3))
def test_every_filesystem(fs: Path, pure: bool, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(25):
        storm = [
            (
                rng.choice(["write", "unlink", "rename", "link", "mkdir", "rmdir", "rename"]),
                rng.choice(PATHS),
                rng.choice(PATHS),
            )
            for _ in range(rng.randrange(5, 120))
        ]
        one_storm(fs, storm, pure)
