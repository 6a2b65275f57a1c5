"""Filesystems that look alike are told apart; and what is seen through a bind mount of a part."""

import contextlib
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import fanwise
from fanwise.kernel.handles import name_to_handle
from tests.kernel.conftest import loop_device, mounted, run, unmount
from tests.kernel.test_watch_mounts import rest, until
from tests.kernel.watching import Reader, on_disk, replay, scanned, short, watching, write


def _image(path: Path, *mkfs: str) -> Path:
    with open(path, "wb") as file:
        file.truncate((320 if mkfs[0] == "mkfs.xfs" else 32) << 20)
    run(*mkfs, str(path))
    return path


@contextmanager
def _at(point: Path, *argv: object) -> Iterator[Path]:
    point.mkdir(exist_ok=True)
    run("mount", *map(str, argv), str(point))
    try:
        yield point
    finally:
        if point.is_mount() or "--bind" in argv:
            unmount(point)


@pytest.fixture(params=["ext4", "xfs"])
def twins(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two filesystems with one UUID, below one directory: an image and its copy."""
    mkfs = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q")}[request.param]
    one = _image(tmp_path / "one", *mkfs)
    two = tmp_path / "two"
    shutil.copyfile(one, two)
    options = ["-o", "nouuid"] if request.param == "xfs" else []
    with (
        mounted("tmpfs", tmp_path) as top,
        loop_device(one) as first,
        loop_device(two) as second,
        _at(top / "a", *options, first) as a,
        _at(top / "b", *options, second) as b,
    ):
        if request.param == "ext4":  # that of xfs is the device
            assert os.statvfs(a).f_fsid == os.statvfs(b).f_fsid
        assert name_to_handle(a)[0] == name_to_handle(b)[0]
        yield a, b


def _storm(top: Path, seed: int) -> None:
    rng = random.Random(seed)
    names = [f"{c}{i}" for c in "dxyz" for i in range(4)]
    for _ in range(300):
        at = top / rng.choice(names)
        if rng.random() < 0.3:
            at = at / rng.choice(names)
        with contextlib.suppress(OSError):
            match rng.randrange(4):
                case 0:
                    at.mkdir()
                case 1:
                    write(at)
                case 2:
                    os.rename(at, top / rng.choice(names))
                case 3:
                    at.rmdir() if at.is_dir() else at.unlink()


@pytest.mark.parametrize("below", [False, True], ids=["roots", "below"])
def test_two_filesystems_with_one_uuid(twins: tuple[Path, Path], pure: bool, below: bool) -> None:
    """The same operations on both give the same handles; they never mix."""
    a, b = twins
    roots = [a.parent] if below else [a, b]
    with watching(*roots, pure=pure, sentinel=a) as r:
        assert len(r.watch._groups) == 2 + below
        scanned(r)
        before = {top: on_disk(top) for top in (a, b)}
        for seed, top in enumerate((a, b)):
            _storm(top, seed)
        told = r.told()
        told += Reader(r.watch, b).told()
        for top in (a, b):
            mine = [c for c in told if c.path.startswith(f"{top}/")]
            assert len(mine) > 50
            assert all((c.old_path or c.path).startswith(f"{top}/") for c in mine)
            assert replay(mine, before[top]) == on_disk(top)
            dev = fanwise.identity(top).split("/")[0]
            assert {(c.identity or "").split("/")[0] for c in mine} == {dev}
        assert fanwise.identity(a) != fanwise.identity(b)


def test_one_of_the_two_goes(twins: tuple[Path, Path], pure: bool) -> None:
    a, b = twins
    with watching(a, b, pure=pure) as r:
        scanned(r)
        r.watch.pause()
        unmount(b)
        r.watch.resume()
        told = until(r.watch, b, "unmounted")
        write(a / "f")
        told += until(r.watch, a / "f")
        assert {c.path for c in told if c.kinds == ("lost",)} == {str(a)}


@pytest.mark.parametrize("paused", [False, True])
def test_a_device_is_used_for_another_filesystem(tmp_path: Path, pure: bool, paused: bool) -> None:
    """The device, the mount point, the mount's id and the root's handle are those of the old."""
    one = _image(tmp_path / "one", "mkfs.ext4", "-q", "-F")
    with mounted("tmpfs", tmp_path) as top, loop_device(one) as device:
        with _at(top / "a", device) as point, watching(point, pure=pure) as r:
            old = fanwise.identity(point)
            scanned(r)
            if paused:
                r.watch.pause()
            unmount(point)
            run("mkfs.ext4", "-q", "-F", device)
            run("mount", device, str(point))
            if paused:
                r.watch.resume()
            assert fanwise.identity(point) == old  # valid for as long as it was mounted
            write(point / "other")
            assert {c.kinds for c in rest(r.watch)} == {("unmounted",)}
        # Below a root the new one is followed, by a group of its own.
        with _at(top / "a", device) as point, watching(top, pure=pure) as r:
            scanned(r)
            write(point / "x")
            until(r.watch, point / "x", "written")
            unmount(point)
            run("mkfs.ext4", "-q", "-F", device)
            run("mount", device, str(point))
            told = until(r.watch, point, "unmounted")
            if not any(c.kinds == ("mounted",) for c in told):
                told += until(r.watch, point, "mounted")
            write(point / "y")
            told = until(r.watch, point / "y")
            assert {c.path for c in told} == {str(point / "y")}


# -- a bind mount of a part --


@pytest.fixture(params=["ext4", "btrfs"])
def part(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A directory of a filesystem, and a bind mount of it elsewhere."""
    with mounted(request.param, tmp_path) as top:
        if request.param == "btrfs":
            run("btrfs", "-q", "subvolume", "create", str(top / "part"))
        (top / "part/in").mkdir(parents=True)
        (top / "out").mkdir()
        with _at(tmp_path / "seen", "--bind", top / "part") as seen:
            yield top, seen


def _deep(top: Path) -> None:
    (top / "a/b/c").mkdir(parents=True)
    write(top / "a/b/c/f")


def test_renames_across_the_edge(part: tuple[Path, Path], pure: bool) -> None:
    top, seen = part
    with watching(seen, pure=pure) as r:
        scanned(r)
        before = on_disk(seen)
        _deep(top / "out")
        shutil.move(top / "out/a", top / "part/in/a")
        write(seen / "in/a/b/c/g")
        shutil.move(top / "part/in/a/b", top / "out/b")
        write(top / "out/b/c/h")
        shutil.move(top / "out/b", top / "part/b2")
        write(top / "part/b2/c/i")
        os.rename(top / "part/b2", top / "part/b3")
        told = r.told()
        assert all(c.path.startswith(f"{seen}/") for c in told)
        assert all((c.old_path or c.path).startswith(f"{seen}/") for c in told)
        left = before
        for change in told:
            left = replay([change], left)
            if change.kinds == ("deleted",):  # one for all that is in it
                left = {p for p in left if not p.startswith(f"{change.path}/")}
        # What came in with a directory is not told of by itself.
        assert left <= on_disk(seen)
        assert on_disk(seen) - left <= {
            str(seen / name) for name in ("b3/c", "b3/c/f", "b3/c/g", "b3/c/h")
        }
        write(seen / "b3/c/late")
        assert {c.path for c in r.told()} == {str(seen / "b3/c/late")}


def test_a_storm_across_the_edge(part: tuple[Path, Path], pure: bool) -> None:
    """Files only, whose moves in and out are single names: the replay equals the disk."""
    top, seen = part
    rng = random.Random(5)
    places = [top / "part", top / "part/in", top / "out", seen / "in"]
    with watching(seen, pure=pure) as r:
        scanned(r)
        before = on_disk(seen)
        for _ in range(600):
            one, two = (rng.choice(places) / f"f{rng.randrange(6)}" for _ in range(2))
            with contextlib.suppress(OSError):
                match rng.randrange(3):
                    case 0:
                        write(one)
                    case 1:
                        os.rename(one, two)
                    case 2:
                        one.unlink()
        told = r.told()
        assert replay(told, before) == on_disk(seen)
        assert all(c.path.startswith(f"{seen}/") for c in told)


def test_a_directory_known_inside_goes_out_and_comes_back(
    part: tuple[Path, Path], pure: bool
) -> None:
    top, seen = part
    outside = top / "out"
    with watching(seen, pure=pure) as r:
        _deep(seen)
        scanned(r)
        r.told()
        try:
            os.rename(top / "part/a", outside / "a")
        except OSError:  # btrfs: from one subvolume to another
            assert (top / "part").stat().st_ino == 256
            return
        write(outside / "a/b/c/hidden")
        told = short(r.told(), seen)
        assert told == [("deleted", "a", None)]
        os.rename(outside / "a/b", outside / "b")
        os.rename(outside / "b", top / "part/in/b")
        write(seen / "in/b/c/f2")
        told = short(r.told(), seen)
        assert told[0] == ("created", "in/b", None)
        assert {path for _, path, _ in told} == {"in/b", "in/b/c/f2"}
