"""What is told when the watch itself is in trouble, and at the edges of what it may look at."""

import contextlib
import gc
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import fanwise
from tests.kernel.conftest import run, unmount
from tests.kernel.test_watch_changes import link_descriptor
from tests.kernel.watching import on_disk, replay, scanned, short, watching, write


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Use up every descriptor of this process."""
    gc.collect()  # what others left must not give any back meanwhile
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def read_for(watch: fanwise.Watch, count: int) -> list[fanwise.Change]:
    """Read until so many changes were told."""
    told: list[fanwise.Change] = []
    deadline = time.monotonic() + 20
    while len(told) < count and time.monotonic() < deadline and not watch.ended:
        told += watch.read(1)
    return told


def test_no_descriptor_does_not_mean_gone(tmpfs: Path, pure: bool) -> None:
    root = tmpfs / "root"
    (root / "d").mkdir(parents=True)
    write(root / "a")
    before = on_disk(root)
    with watching(root, pure=pure) as r:
        scanned(r)
        with no_descriptors():
            root.chmod(0o700)
            (root / "d").chmod(0o700)
            for source, target in (("a", "b"), ("b", "a"), ("a", "b")):
                (root / source).rename(root / target)
            (root / "n").mkdir()
            told = read_for(r.watch, 5)
        told += r.told()
        assert not any("deleted" in c.kinds for c in told)
        assert not r.watch.ended
        assert replay(told, before) == on_disk(root)


def test_a_scan_without_descriptors_is_not_finished(tmpfs: Path, pure: bool) -> None:
    for i in range(5):
        (tmpfs / f"d{i}/e").mkdir(parents=True)
    with watching(tmpfs, pure=pure) as r:
        with no_descriptors():
            for _ in range(10):
                r.watch.read(0.01)
            assert not r.watch.scanned
        (tmpfs / "d0").rename(tmpfs / "z0")
        write(tmpfs / "z0/e/f")
        assert {c.path for c in r.told()} == {str(tmpfs / "z0"), str(tmpfs / "z0/e/f")}
        scanned(r)
        assert r.watch.directories == 11


def test_no_glob_hides_a_loss_or_a_root(tmpfs: Path, pure: bool) -> None:
    root = tmpfs / ".conf"
    root.mkdir()
    with watching(root, exclude=[".*"], pure=pure) as r:
        r.watch.pause()
        r.watch.resume()
        told = read_for(r.watch, 1)
        while told[-1].kinds != ("repaired",):
            told += read_for(r.watch, 1)
        assert [c.kinds for c in told] == [("lost",), ("relisted",), ("repaired",)]
        root.chmod(0o700)
        assert [c.kinds for c in read_for(r.watch, 1)] == [("attributes",)]
        root.rmdir()
        assert [c.kinds for c in read_for(r.watch, 1)] == [("deleted",)]
        assert r.watch.ended
    file = write(tmpfs / "app.log")
    with fanwise.watch(file, exclude=["*.log"], pure=pure) as watch:
        write(file, "more")
        assert {c.path for c in read_for(watch, 1)} == {str(file)}


def test_a_root_ends_with_a_word_whatever_is_asked_for(tmpfs: Path, pure: bool) -> None:
    for options in ({"kinds": ["created"]}, {"ignore_pids": [os.getpid()]}):
        root = tmpfs / "root"
        root.mkdir()
        with fanwise.watch(root, pure=pure, **options) as watch:  # type: ignore[arg-type]
            root.rename(tmpfs / "moved")
            (tmpfs / "moved").rmdir()
            told = short(read_for(watch, 2), tmpfs)
            assert told == [("renamed", "moved", "root"), ("deleted", "moved", None)]
            assert watch.ended


def test_a_root_moved_in_what_was_lost(tmpfs: Path, pure: bool) -> None:
    (tmpfs / "root").mkdir()
    with watching(tmpfs / "root", pure=pure, sentinel=tmpfs / "moved") as r:
        r.watch.pause()
        (tmpfs / "root").rename(tmpfs / "moved")
        r.watch.resume()
        told = read_for(r.watch, 2)
        assert [c.kinds[0] for c in told[:2]] == ["lost", "renamed"]
        while told[-1].kinds != ("repaired",):
            told += read_for(r.watch, 2)
        assert [c.kinds[0] for c in told[2:]] == ["relisted", "repaired"]
        assert told[1].path == str(tmpfs / "moved")
        write(tmpfs / "moved/f")
        assert {c.path for c in r.told()} == {str(tmpfs / "moved/f")}


def test_out_of_an_excluded_name_when_renames_are_not_asked_for(tmpfs: Path, pure: bool) -> None:
    with watching(tmpfs, exclude=["*.tmp"], kinds=["created", "deleted"], pure=pure) as r:
        write(tmpfs / "x.tmp").rename(tmpfs / "x")
        assert short(r.told(), tmpfs) == [("created", "x", None)]
        (tmpfs / "x").rename(tmpfs / "y")
        assert r.told() == []
        (tmpfs / "y").rename(tmpfs / "y.tmp")
        assert short(r.told(), tmpfs) == [("deleted", "y", None)]


def test_globs_follow_a_root_that_moves(tmpfs: Path, pure: bool) -> None:
    root = tmpfs / "r"
    (root / "sub/x").mkdir(parents=True)
    with watching(root, exclude=["sub/x"], pure=pure, sentinel=tmpfs / "q") as r:
        scanned(r)
        root.rename(tmpfs / "q")
        write(tmpfs / "q/sub/x/f")
        assert short(r.told(), tmpfs) == [("renamed", "q", "r")]


def test_what_becomes_visible_is_scanned(tmpfs: Path, pure: bool) -> None:
    (tmpfs / "a/hidden/deep/er").mkdir(parents=True)
    with watching(tmpfs, exclude=["a/hidden"], pure=pure) as r:
        scanned(r)
        assert r.watch.directories == 3
        (tmpfs / "a").rename(tmpfs / "b")
        r.told()
        scanned(r)
        while r.watch.directories < 5:
            r.watch.read(0.01)
        write(tmpfs / "b/hidden/deep/er/f")
        assert {c.path for c in r.told()} == {str(tmpfs / "b/hidden/deep/er/f")}


def test_a_root_that_leaves_a_bind_mount_ends(tmpfs: Path, pure: bool) -> None:
    (tmpfs / "a/root").mkdir(parents=True)
    (tmpfs / "b").mkdir()
    run("mount", "--bind", str(tmpfs / "a"), str(tmpfs / "b"))
    try:
        with fanwise.watch(tmpfs / "b/root", pure=pure) as watch:
            (tmpfs / "a/root").rename(tmpfs / "out")
            assert short(read_for(watch, 1), tmpfs) == [("deleted", "b/root", None)]
            assert watch.ended
    finally:
        unmount(tmpfs / "b")


def test_a_tree_that_enters_a_bind_mount(tmpfs: Path, pure: bool) -> None:
    (tmpfs / "a").mkdir()
    (tmpfs / "b").mkdir()
    (tmpfs / "x/y").mkdir(parents=True)
    run("mount", "--bind", str(tmpfs / "a"), str(tmpfs / "b"))
    try:
        with watching(tmpfs / "b", pure=pure) as r:
            scanned(r)
            write(tmpfs / "x/y/outside")  # remembered, without a way up
            assert r.told() == []
            (tmpfs / "x").rename(tmpfs / "a/x")
            assert short(r.told(), tmpfs) == [("created", "b/x", None)]
            scanned(r)
            while r.watch._groups[0].resolver.scanner.busy:
                r.watch.read(0.01)
            write(tmpfs / "b/x/y/g")
            write(tmpfs / "b/x/h")
            assert {p for _, p, _ in short(r.told(), tmpfs)} == {"b/x/y/g", "b/x/h"}
    finally:
        unmount(tmpfs / "b")


def test_a_file_root_and_open_files(tmpfs: Path, pure: bool) -> None:
    file = write(tmpfs / "f")
    with watching(file, pure=pure, sentinel=tmpfs) as r:
        with open(file, "a") as old:
            write(tmpfs / "new").rename(file)
            assert [c.kinds for c in read_for(r.watch, 1)] == [("created",)]
            old.write("x")
            old.flush()
            assert [(c.kinds, c.unlinked) for c in read_for(r.watch, 1)] == [(("modified",), True)]
        read_for(r.watch, 1)
        os.link(file, tmpfs / "g")
        file.unlink()
        (tmpfs / "g").rename(file)  # the same object is back at its name
        read_for(r.watch, 2)
        write(file, "more")
        assert not any(c.unlinked for c in read_for(r.watch, 1))


def test_temporary_files_are_forgotten_when_they_are_closed(tmpfs: Path, pure: bool) -> None:
    with watching(tmpfs, pure=pure) as r:
        for i in range(300):
            fd = os.open(tmpfs, os.O_TMPFILE | os.O_RDWR)
            os.write(fd, b"x")
            link_descriptor(fd, tmpfs / f"n{i}")
            os.close(fd)
        told = r.told()
        assert {c.path for c in told} == {str(tmpfs / f"n{i}") for i in range(300)}
        assert not r.watch._groups[0].resolver.settler.unlinked_tmp


def test_renames_of_many_directories_with_a_glob_of_paths(tmpfs: Path) -> None:
    """Only what lies below a directory that moves is judged anew."""
    for i in range(3000):
        (tmpfs / f"d{i}").mkdir()
    with watching(tmpfs, exclude=["build/out"]) as r:
        scanned(r)
        judged = 0
        dirs = r.watch._groups[0].resolver.dirs
        judge = dirs.judge

        def counted(at: int) -> None:
            nonlocal judged
            judged += 1
            judge(at)

        dirs.judge = counted  # type: ignore[method-assign]
        for i in range(100):
            (tmpfs / f"d{i}").rename(tmpfs / f"e{i}")
        r.told()
        assert judged <= 200
