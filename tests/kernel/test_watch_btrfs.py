"""btrfs: subvolumes watched through their top level; snapshots and deletions told in full."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import fanwise
from fanwise.kernel import detached
from fanwise.kernel.handles import identity
from fanwise.kernel.mounts import mount_of
from tests.kernel.conftest import loop_device, mounted, run, unmount
from tests.kernel.watching import on_disk, replay, scanned, short, watching, write


def _sub(*argv: object) -> None:
    run("btrfs", "-q", "subvolume", *map(str, argv))


@contextmanager
def _at(point: Path, *argv: object) -> Iterator[Path]:
    point.mkdir(exist_ok=True)
    run("mount", *map(str, argv), str(point))
    try:
        yield point
    finally:
        unmount(point)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    """A btrfs with a subvolume ``sv`` that is mounted nowhere; its device."""
    image = tmp_path / "btrfs.img"
    with open(image, "wb") as file:
        file.truncate(256 << 20)
    run("mkfs.btrfs", "-q", "-f", str(image))
    with loop_device(image) as device:
        with _at(tmp_path / "top", device) as top:
            _sub("create", top / "sv")
        yield device


@pytest.fixture
def btrfs(tmp_path: Path) -> Iterator[Path]:
    with mounted("btrfs", tmp_path) as point:
        yield point


def _mountinfo(device: str) -> set[bytes]:
    # Of one device: others mount, too, and what they mount need not have a name that is text.
    lines = Path("/proc/self/mountinfo").read_bytes().split(b"\n")
    return {line for line in lines if os.fsencode(device) in line.split(b" ")}


# -- the rung --


def test_a_subvolume_that_is_mounted_by_itself(device: str, tmp_path: Path, pure: bool) -> None:
    with _at(tmp_path / "mnt", "-o", "subvol=sv", device) as point:
        before = _mountinfo(device)
        assert before
        with watching(point, pure=pure) as r:
            assert [root.rung for root in r.watch.roots] == ["detached-mount"]
            assert _mountinfo(device) == before
            scanned(r)
            (point / "d/e").mkdir(parents=True)
            write(point / "d/e/f")
            os.rename(point / "d", point / "g")
            told = r.told()
            assert replay(told, set()) == on_disk(point)
            assert all(c.path.startswith(str(point)) for c in told)
            # The mark stays without a descriptor, and nothing keeps the filesystem or its device.
            unmount(point)
            assert [c.kinds for c in r.watch.read(10)] == [("unmounted",)]
            assert r.watch.ended
            subprocess.run(["mount", "-o", "subvol=sv", device, str(point)], check=True)


def test_what_is_outside_of_the_subvolume_is_not_told(
    device: str, tmp_path: Path, pure: bool
) -> None:
    with (
        _at(tmp_path / "mnt", "-o", "subvol=sv", device) as point,
        _at(tmp_path / "top", device) as top,
        watching(point, pure=pure) as r,
    ):
        scanned(r)
        _sub("create", top / "other")
        (top / "other/d").mkdir()
        write(top / "other/d/f")
        write(top / "sv/here")
        assert {c.path for c in r.told()} == {str(point / "here")}


def test_a_subvolume_below_a_visible_top_level_needs_no_other_mount(
    btrfs: Path, pure: bool
) -> None:
    _sub("create", btrfs / "sv")
    with watching(btrfs / "sv", pure=pure) as r:
        assert [root.rung for root in r.watch.roots] == ["filesystem-mark"]
        write(btrfs / "sv/f")
        assert {c.path for c in r.told()} == {str(btrfs / "sv/f")}


def test_a_filesystem_that_is_mounted_read_only_stays_so(device: str, tmp_path: Path) -> None:
    """A mount that asks for writing would make it writable, for everyone."""
    with _at(tmp_path / "mnt", "-o", "subvol=sv,ro", device) as point:
        with fanwise.watch(point) as watch:
            assert watch.roots[0].rung == "detached-mount"
            assert mount_of(point).super_options[0] == "ro"
        assert mount_of(point).super_options[0] == "ro"


def test_a_bind_mount_of_a_directory_in_a_subvolume(
    device: str, tmp_path: Path, pure: bool
) -> None:
    with _at(tmp_path / "mnt", "-o", "subvol=sv", device) as point:
        (point / "a/b").mkdir(parents=True)
        with _at(tmp_path / "bind", "--bind", point / "a") as bind, watching(bind, pure=pure) as r:
            assert r.watch.roots[0].rung == "detached-mount"
            scanned(r)
            write(point / "outside")
            write(point / "a/b/f")
            assert {c.path for c in r.told()} == {str(bind / "b/f")}


def test_several_devices(tmp_path: Path) -> None:
    images = [tmp_path / "one", tmp_path / "two"]
    for image in images:
        with open(image, "wb") as file:
            file.truncate(128 << 20)
    with loop_device(images[0]) as one, loop_device(images[1]) as two:
        run("mkfs.btrfs", "-q", "-f", "-d", "raid1", "-m", "raid1", one, two)
        run("btrfs", "-q", "device", "scan", one, two)
        with _at(tmp_path / "top", one) as top:
            _sub("create", top / "sv")
        for device in (one, two):
            with (
                _at(tmp_path / "mnt", "-o", "subvol=sv", device) as point,
                watching(point) as r,
            ):
                assert r.watch.roots[0].rung == "detached-mount"
                write(point / "f")
                assert {c.path for c in r.told()} == {str(point / "f")}
        run("btrfs", "-q", "device", "scan", "--forget")


def test_a_device_whose_name_leads_elsewhere(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another mount namespace it may lead to nothing, or to another filesystem."""
    with (
        _at(tmp_path / "mnt", "-o", "subvol=sv", device) as point,
        mounted("btrfs", tmp_path / "other") as other,
    ):
        mount = mount_of(point)
        fd = os.open(point, os.O_RDONLY)
        try:
            for source in (b"/dev/nothing", mount_of(other).source, device.encode()):
                top = detached.open_top_level(mount._replace(source=source), fd)
                assert os.listdir(top) == ["sv"]
                os.close(top)
            monkeypatch.setattr(detached, "_TOP_KEY", b"\x4d\0\0\0" + bytes(20))
            with pytest.raises(fanwise.FilesystemRefuses, match="subvolid=5") as caught:
                detached.open_top_level(mount._replace(source=b"/dev/nothing"), fd)
            assert "/dev/nothing" in caught.value.reason
            with pytest.raises(fanwise.FilesystemRefuses, match="another filesystem now"):
                detached.open_top_level(mount._replace(source=mount_of(other).source), fd)
        finally:
            os.close(fd)


def test_paused_and_resumed(device: str, tmp_path: Path, pure: bool) -> None:
    with (
        _at(tmp_path / "mnt", "-o", "subvol=sv", device) as point,
        watching(point, pure=pure) as r,
    ):
        scanned(r)
        r.watch.pause()
        r.watch.resume()
        write(point / "f")
        told = r.told()
        assert told[0].kinds == ("lost",)
        assert str(point / "f") in [c.path for c in told]


def test_what_doctor_says(device: str, tmp_path: Path) -> None:
    with _at(tmp_path / "mnt", "-o", "subvol=sv", device) as point:
        found = fanwise.capabilities(point)
        assert (found.rung, found.reason) == ("detached-mount", None)
        assert all(feature.works for feature in found.features.values())


# -- trees that come and go whole --


def _tree(top: Path) -> None:
    (top / "d1/d2/d3").mkdir(parents=True)
    (top / "empty").mkdir()
    for name in ("f", "d1/g", "d1/d2/h", "d1/d2/d3/i"):
        write(top / name)
    (top / "d1/link").symlink_to("nowhere")


def test_a_snapshot_is_told_in_full(btrfs: Path, pure: bool) -> None:
    _sub("create", btrfs / "sv")
    _tree(btrfs / "sv")
    with watching(btrfs, pure=pure) as r:
        scanned(r)
        before = on_disk(btrfs)
        _sub("snapshot", btrfs / "sv", btrfs / "snap")
        told = r.told()
        assert replay(told, before) == on_disk(btrfs)
        paths = [c.path for c in told]
        assert len(paths) == len(set(paths)) == 10
        assert {c.kinds for c in told} == {("created",)}
        assert {c.path_source for c in told} == {"exact"}
        for change in told:
            assert change.identity == fanwise.identity(change.path)
            assert change.is_dir == (Path(change.path).is_dir())
            # Parents before children.
            parent = os.path.dirname(change.path)
            assert parent == str(btrfs) or paths.index(parent) < paths.index(change.path)
        # The directories are known: nothing is opened to find their paths.
        looks: list[object] = []
        r.watch._groups[0].resolver.lookup.locate = lambda *a: looks.append(a)  # type: ignore
        write(btrfs / "snap/d1/d2/d3/new")
        assert {c.path for c in r.told()} == {str(btrfs / "snap/d1/d2/d3/new")}
        assert not looks


def test_a_snapshot_that_changes_before_it_is_read(btrfs: Path, pure: bool) -> None:
    """What the records tell is not told twice, and what they undo is told as it was."""
    _sub("create", btrfs / "sv")
    _tree(btrfs / "sv")
    with watching(btrfs, pure=pure) as r:
        scanned(r)
        before = on_disk(btrfs)
        snap = btrfs / "snap"
        _sub("snapshot", btrfs / "sv", snap)
        made = {p.replace("/sv", "/snap", 1) for p in before if "/sv" in p}
        write(snap / "d1/new")
        (snap / "d1/newdir/deep").mkdir(parents=True)
        (snap / "f").unlink()
        os.rename(snap / "d1/d2", snap / "empty/d2")
        os.rename(snap / "d1/g", snap / "g2")
        shutil.rmtree(snap / "empty/d2/d3")
        told = r.told()
        assert replay(told, before) == on_disk(btrfs)
        first = [c for c in told if c.kinds == ("created",)][: len(made)]
        assert {c.path for c in first} == made
        plain = [(c.kinds, c.path) for c in told]
        assert len(plain) == len(set(plain))
        assert (("deleted",), str(snap / "f")) in plain
        assert (("deleted",), str(snap / "empty/d2/d3/i")) in plain
        assert ("renamed", "snap/g2", "snap/d1/g") in short(told, btrfs)


def test_a_snapshot_with_inner_subvolumes(btrfs: Path, pure: bool) -> None:
    _sub("create", btrfs / "sv")
    for name in ("n1", "n2"):
        _sub("create", btrfs / "sv" / name)
        _tree(btrfs / "sv" / name)
    with watching(btrfs, pure=pure) as r:
        scanned(r)
        before = on_disk(btrfs)
        known = r.watch.directories
        _sub("snapshot", btrfs / "sv", btrfs / "snap")
        told = r.told()
        assert {c.path for c in told} == {str(btrfs / "snap" / n) for n in ("", "n1", "n2")}
        assert r.watch.directories == known + 1  # both stubs have one handle
        (btrfs / "snap/n1").rmdir()
        _sub("delete", btrfs / "sv/n1")
        told += r.told()
        assert [c.path for c in told][-1] == str(btrfs / "sv/n1")
        # Files are not in the model of directories: theirs are the only ones that stay.
        left = replay(told, before) - on_disk(btrfs)
        assert all(Path(p).name in "fghi" or Path(p).name == "link" for p in left)
        assert replay(told, before) >= on_disk(btrfs)


def test_a_subvolume_that_is_deleted(btrfs: Path, pure: bool) -> None:
    """Children before parents, and the model forgets them all."""
    _sub("create", btrfs / "sv")
    _tree(btrfs / "sv")
    with watching(btrfs, pure=pure) as r:
        scanned(r)
        known = r.watch.directories
        _sub("delete", btrfs / "sv")
        told = short(r.told(), btrfs)
        assert told[-1] == ("deleted", "sv", None)
        paths = [path for _, path, _ in told]
        assert set(paths) == {"sv", "sv/d1", "sv/d1/d2", "sv/d1/d2/d3", "sv/empty"}
        assert paths.index("sv/d1/d2/d3") < paths.index("sv/d1/d2") < paths.index("sv/d1")
        assert r.watch.directories == known - 5


def test_an_index_of_files_is_asked(btrfs: Path, pure: bool) -> None:
    _sub("create", btrfs / "sv")
    _tree(btrfs / "sv")
    with watching(btrfs, pure=pure) as r:
        scanned(r)
        keys = {fanwise.identity(base): files for base, _, files in os.walk(btrfs / "sv")}
        resolver = r.watch._groups[0].resolver

        def files_of(key: bytes) -> list[tuple[bytes, None]]:
            return [(os.fsencode(n), None) for n in keys[identity(resolver.dirs.mount.dev, key)]]

        resolver.expander.files_of = files_of
        before = on_disk(btrfs)
        _sub("delete", btrfs / "sv")
        assert replay(r.told(), before) == on_disk(btrfs) == set()


def test_the_root_is_a_snapshot_or_in_one(btrfs: Path, pure: bool) -> None:
    _sub("create", btrfs / "sv")
    _tree(btrfs / "sv")
    for root in ("snap", "snap/d1/d2"):
        _sub("snapshot", btrfs / "sv", btrfs / "snap")
        with watching(btrfs / root, pure=pure) as r:
            scanned(r)
            write(btrfs / root / "new")
            assert {c.path for c in r.told()} == {str(btrfs / root / "new")}
            _sub("delete", btrfs / "snap")
            told = []
            while not r.watch.ended:
                told += r.watch.read(10)
            assert told[-1].path == str(btrfs / root)
            assert {c.kinds for c in told} == {("deleted",)}
            assert [c.path for c in told].count(str(btrfs / root)) == 1


def test_a_subvolume_that_is_empty_and_one_outside(btrfs: Path, pure: bool) -> None:
    (btrfs / "in").mkdir()
    with watching(btrfs / "in", pure=pure) as r:
        scanned(r)
        _sub("create", btrfs / "in/sv")
        _sub("create", btrfs / "out")
        _tree(btrfs / "out")
        _tree(btrfs / "in/sv")
        _sub("snapshot", btrfs / "in/sv", btrfs / "snap")
        told = r.told()
        assert replay(told, set()) == on_disk(btrfs / "in")
        _sub("delete", btrfs / "snap")
        _sub("delete", btrfs / "in/sv")
        assert {c.kinds for c in r.told()} == {("deleted",)}


def test_globs_and_kinds_of_a_snapshot(btrfs: Path, pure: bool) -> None:
    _sub("create", btrfs / "sv")
    _tree(btrfs / "sv")
    with watching(btrfs, pure=pure, exclude=["d2", "link"]) as r:
        scanned(r)
        _sub("snapshot", btrfs / "sv", btrfs / "snap")
        assert {os.path.basename(c.path) for c in r.told()} == {"snap", "f", "d1", "g", "empty"}
        write(btrfs / "snap/d1/d2/d3/x")
        write(btrfs / "snap/d1/x")
        assert {c.path for c in r.told()} == {str(btrfs / "snap/d1/x")}
    _sub("delete", btrfs / "snap")
    for options in ({"kinds": ["written"]}, {"ignore_pids": [0], "recursive": False}):
        with watching(btrfs, pure=pure, sentinel=btrfs, **options) as r:
            scanned(r)
            _sub("snapshot", btrfs / "sv", btrfs / "snap")
            if "kinds" in options:
                write(btrfs / "snap/d1/d2/x")
                told: list[fanwise.Change] = []
                while not told:
                    told += r.watch.read(10)
                assert [c.path for c in told] == [str(btrfs / "snap/d1/d2/x")]
            else:
                assert {c.path for c in r.told()} == {str(btrfs / "snap")}
        _sub("delete", btrfs / "snap")


def test_a_snapshot_while_opens_are_told(btrfs: Path, pure: bool) -> None:
    """Then a helper lists it."""
    _sub("create", btrfs / "sv")
    _tree(btrfs / "sv")
    with watching(btrfs, pure=pure, kinds=["created", "deleted", "opened"]) as r:
        scanned(r)
        before = on_disk(btrfs)
        r.told()
        _sub("snapshot", btrfs / "sv", btrfs / "snap")
        told = r.told()
        assert replay(told, before) == on_disk(btrfs)
        mine = [c for c in told if c.pid == os.getpid() and "opened" in c.kinds]
        assert not mine
