"""Paths: right at once, during the scan, and under every race of moves, on every filesystem."""

import os
import shutil
import threading
from pathlib import Path

import pytest

from tests.kernel.watching import on_disk, replay, scanned, short, watching, write


@pytest.fixture
def no_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan that never comes to anything: every directory must be learnt otherwise."""
    monkeypatch.setattr("fanwise.names.scan.Scanner.give", lambda self, keys, names: None)


def test_mkdir_race(fs: Path, pure: bool) -> None:
    """mkdir -p and a file in the last, all unread, and all gone again before the first read."""
    before = on_disk(fs)
    with watching(fs, pure=pure) as r:
        want = set()
        for i in range(500):
            (fs / f"r{i}/b/c/d").mkdir(parents=True)
            want.add(str(write(fs / f"r{i}/b/c/d/f{i}")))
        for i in range(0, 500, 2):
            shutil.rmtree(fs / f"r{i}")
        told = r.told()
        assert want <= {c.path for c in told if "created" in c.kinds}
        assert {c.path_source for c in told} == {"exact"}
        assert replay(told, before) == on_disk(fs)


def test_rename_then_create(fs: Path, pure: bool) -> None:
    (fs / "p/in").mkdir(parents=True)
    with watching(fs, pure=pure) as r:
        want = []
        old = fs / "p"
        for i in range(200):
            new = fs / f"q{i}"
            old.rename(new)
            want.append(str(write(new / f"in/f{i}")))
            old = new
        told = r.told()
        created = [c for c in told if "created" in c.kinds]
        assert [c.path for c in created] == want
        assert {c.path_source for c in created} == {"exact"}


@pytest.mark.usefixtures("no_scan")
def test_unknown_directories_are_learnt_by_opening(fs: Path, pure: bool) -> None:
    (fs / "a/b/c/d/e").mkdir(parents=True)
    (fs / "x/y").mkdir(parents=True)
    with watching(fs, pure=pure) as r:
        write(fs / "a/b/c/d/e/one")
        (fs / "a/b/c").rename(fs / "x/y/c")  # undone for what was before it
        write(fs / "x/y/c/d/e/two")
        (fs / "x").rename(fs / "z")
        write(fs / "z/y/c/d/e/three")
        told = r.told()
        created = [c.path for c in told if "created" in c.kinds]
        assert created == [
            str(fs / "a/b/c/d/e/one"),
            str(fs / "x/y/c/d/e/two"),
            str(fs / "z/y/c/d/e/three"),
        ]
        assert {c.path_source for c in told} == {"exact"}


@pytest.mark.usefixtures("no_scan")
def test_unknown_and_gone_is_learnt_from_the_stream(fs: Path, pure: bool) -> None:
    deep = fs / "a/b/c"
    deep.mkdir(parents=True)
    write(deep / "f")
    before = on_disk(fs)
    with watching(fs, pure=pure) as r:
        (fs / "a").rename(fs / "m")
        shutil.rmtree(fs / "m")  # no handle of it opens any more
        told = r.told()
        assert short(told, fs) == [
            ("renamed", "m", "a"),
            ("deleted", "m/b/c/f", None),
            ("deleted", "m/b/c", None),
            ("deleted", "m/b", None),
            ("deleted", "m", None),
        ]
        assert {c.path_source for c in told} == {"exact"}
        assert replay(told, before) == on_disk(fs)


def test_moves_while_it_is_scanned(fs: Path, pure: bool) -> None:
    """A tree that keeps moving during the scan: every path is the one of its time."""
    for i in range(40):
        (fs / f"t{i}/a/b/c").mkdir(parents=True)
    before = on_disk(fs)
    want: list[str] = []
    done = threading.Event()

    def storm() -> None:
        # Never back to a name: what such a cycle does in one window is another test's.
        last = {i: fs / f"t{i}/a" for i in range(0, 40, 2)}
        for n in range(6):
            for i, source in last.items():
                target = fs / f"t{i + 1 - n % 2}/m{i}-{n}"
                source.rename(target)
                last[i] = target
                want.append(str(write(target / f"b/c/n{n}")))
        done.set()

    with watching(fs, pure=pure) as r:
        thread = threading.Thread(target=storm)
        thread.start()
        told = []
        while not done.is_set():
            told += r.watch.read(0.01)
        thread.join()
        told += r.told()
        scanned(r)
        assert [c.path for c in told if "created" in c.kinds] == want
        assert {c.path_source for c in told} == {"exact"}
        assert replay(told, before) == on_disk(fs)


def test_moved_in_from_outside(fs: Path, pure: bool) -> None:
    root, out = fs / "root", fs / "out"
    root.mkdir()
    (out / "t/deep/er").mkdir(parents=True)
    with watching(root, pure=pure) as r:
        scanned(r)
        write(out / "t/deep/er/before")  # found outside, remembered as such
        assert r.told() == []
        (out / "t").rename(root / "t")
        write(root / "t/deep/er/after")
        assert short(r.told(), root)[0] == ("created", "t", None)
        write(root / "t/deep/er/later")
        assert {p for _, p, _ in short(r.told(), root)} == {"t/deep/er/later"}
        (root / "t").rename(out / "back")
        write(out / "back/deep/er/gone")
        assert short(r.told(), root) == [("deleted", "t", None)]
        write(out / "f").rename(root / "f")
        (root / "f").rename(out / "f")
        assert short(r.told(), root) == [("created", "f", None), ("deleted", "f", None)]


def test_a_small_root_scans_only_itself(ext4: Path, pure: bool) -> None:
    (ext4 / "root/sub").mkdir(parents=True)
    for i in range(50):
        (ext4 / f"other/d{i}").mkdir(parents=True)
    with watching(ext4 / "root", pure=pure) as r:
        scanned(r)
        assert r.watch.directories == 3  # the filesystem's root, the watched one, and sub
        for i in range(50):
            write(ext4 / f"other/d{i}/f")
        assert r.told() == []


def test_several_roots_of_one_filesystem(tmpfs: Path, pure: bool) -> None:
    for name in ("a/in", "b", "c"):
        (tmpfs / name).mkdir(parents=True)
    with watching(tmpfs / "a", tmpfs / "b", tmpfs / "a/in", pure=pure) as r:
        write(tmpfs / "a/in/f")
        write(tmpfs / "c/f")
        (tmpfs / "a/in/f").rename(tmpfs / "b/f")
        (tmpfs / "b/f").rename(tmpfs / "c/g")
        told = short(r.told(), tmpfs)
        assert {p for _, p, _ in told} == {"a/in/f", "b/f"}
        assert ("renamed", "b/f", "a/in/f") in told
        assert told[-1] == ("deleted", "b/f", None)


def test_merged_renames_of_a_directory_are_corrected(fs: Path, pure: bool) -> None:
    d = fs / "a"
    d.mkdir()
    before = on_disk(fs)
    with watching(fs, pure=pure) as r:
        scanned(r)
        merged = False
        for _ in range(20):
            for source, target in (("a", "b"), ("b", "a"), ("a", "b")):
                (fs / source).rename(fs / target)
            told = r.told()
            assert replay(told, before) == on_disk(fs)
            assert (fs / "b").is_dir()
            merged = merged or any(c.correction for c in told)
            write(fs / "b/f")
            assert {c.path for c in r.told()} == {str(fs / "b/f")}
            (fs / "b/f").unlink()
            (fs / "b").rename(fs / "a")
            r.told()
        assert merged


@pytest.mark.parametrize(
    "steps",
    [
        [("rename", "a", "b"), ("rename", "b", "a"), ("rename", "a", "b")],
        [("link", "a", "l"), ("rename", "l", "m"), ("link", "a", "l")],
        [("rename", "h1", "h3"), ("link", "a", "h1"), ("unlink", "h3"), ("rename", "h1", "h3")],
        [("link", "a", "l"), ("unlink", "l"), ("link", "a", "l")],
        [("link", "a", "l"), ("unlink", "l"), ("link", "a", "l"), ("unlink", "l")],
        [("rename", "a", "b"), ("rename", "b", "c"), ("rename", "c", "a")],
    ],
)
def test_merged_names_of_a_file_are_corrected(
    tmpfs: Path, pure: bool, steps: list[tuple[str, ...]]
) -> None:
    write(tmpfs / "a")
    os.link(tmpfs / "a", tmpfs / "h1")
    with watching(tmpfs, pure=pure) as r:
        for _ in range(10):
            before = on_disk(tmpfs)
            for step in steps:
                paths = [tmpfs / name for name in step[1:]]
                if step[0] == "rename":
                    paths[0].rename(paths[1])
                elif step[0] == "link":
                    os.link(*paths)
                else:
                    paths[0].unlink()
            told = r.told()
            assert replay(told, set(before)) == on_disk(tmpfs), short(told, tmpfs)
            for path in on_disk(tmpfs):
                os.unlink(path)
            write(tmpfs / "a")
            os.link(tmpfs / "a", tmpfs / "h1")
            r.told()


def test_a_window_that_is_cut_is_corrected_too(
    tmpfs: Path, pure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second half of a cycle lies behind the end of a window that was too large."""
    monkeypatch.setattr("fanwise.names.resolver.WINDOW", 50)
    (tmpfs / "a").mkdir()
    write(tmpfs / "f")
    before = on_disk(tmpfs)
    with watching(tmpfs, pure=pure) as r:
        scanned(r)
        for name in ("a", "f"):
            (tmpfs / name).rename(tmpfs / f"{name}2")
        for i in range(200):
            write(tmpfs / f"n{i}").unlink()
        for name in ("a", "f"):
            (tmpfs / f"{name}2").rename(tmpfs / name)
        for name in ("a", "f"):
            (tmpfs / name).rename(tmpfs / f"{name}2")
        told = r.told()
        assert replay(told, before) == on_disk(tmpfs)


def test_directories_come_and_go(tmpfs: Path, pure: bool) -> None:
    """The model forgets what is removed."""
    with watching(tmpfs, pure=pure) as r:
        scanned(r)
        for _ in range(20):
            for i in range(50):
                (tmpfs / f"d{i}/e").mkdir(parents=True)
            for i in range(50):
                shutil.rmtree(tmpfs / f"d{i}")
            r.told()
        assert r.watch.directories == 1
