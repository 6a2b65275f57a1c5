"""Mounts below a root: followed, told, named when they cannot be, and closed when they go."""

import contextlib
import os
import resource
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import fanwise
from fanwise import Change
from fanwise.kernel import fanotify as fan
from fanwise.kernel.libc import libc
from fanwise.kernel.mounts import Mount, describe, mounts, visible
from fanwise.sources import mounts as source_mounts
from fanwise.sources.mounts import MountChange, MountSource
from fanwise.watch._group import Group
from fanwise.watch._mounts import Below
from tests.kernel.conftest import mounted, run, unmount
from tests.kernel.test_watch_mounts import rest, until
from tests.kernel.watching import on_disk, replay, scanned, short, watching, write


@pytest.fixture(params=["mountinfo", "events"])
def heard(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of hearing of mounts."""
    monkeypatch.setattr(source_mounts, "MANY", 0 if request.param == "events" else 1 << 30)
    return str(request.param)


@contextmanager
def _on(point: Path, *argv: object) -> Iterator[Path]:
    point.mkdir(parents=True, exist_ok=True)
    run("mount", *map(str, argv or ("-t", "tmpfs", "below")), str(point))
    try:
        yield point
    finally:
        if _is_mounted(point):
            unmount(point)


def _is_mounted(point: Path) -> bool:
    # Not os.path.ismount: a bind mount is on the same device.
    return any(mount.mount_point == os.fsencode(point) for mount in mounts())


def _groups() -> int:
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[fanotify]"
        except FileNotFoundError:
            continue
    return count


# -- there from the beginning --


def test_what_is_mounted_below_is_watched_too(tmpfs: Path, pure: bool, heard: str) -> None:
    with _on(tmpfs / "a/mnt") as one, _on(one / "deep/mnt") as two:
        (two / "old").mkdir()
        with watching(tmpfs, pure=pure) as r:
            assert [(m.path, m.rung, m.fstype) for m in r.watch.mounts] == [
                (str(one), "filesystem-mark", "tmpfs"),
                (str(two), "filesystem-mark", "tmpfs"),
            ]
            assert [root.path for root in r.watch.roots] == [str(tmpfs)]
            assert r.watch.unwatched == ()
            assert r.watch._mounts.events == (heard == "events")
            scanned(r)
            assert r.watch.directories == 2 + 2 + 2  # a covered one is not known
            write(one / "f")
            write(two / "old/g")
            write(tmpfs / "h")
            told = until(r.watch, tmpfs / "h")
            told += until(r.watch, two / "old/g") if str(two / "old/g") not in paths(told) else []
            told += until(r.watch, one / "f") if str(one / "f") not in paths(told) else []
            assert set(paths(told)) == {str(one / "f"), str(two / "old/g"), str(tmpfs / "h")}
            assert all(r.watch.tells(path) for path in paths(told))


def paths(told: list[Change]) -> list[str]:
    return [change.path for change in told]


def test_one_file_system(tmpfs: Path, pure: bool) -> None:
    with _on(tmpfs / "mnt") as mnt, watching(tmpfs, pure=pure, mounts=False) as r:
        ((path, fstype, reason, remedy),) = r.watch.unwatched
        assert (path, fstype, remedy) == (str(mnt), "tmpfs", None)
        assert "as asked" in reason
        assert r.watch.mounts == ()
        assert not r.watch.tells(str(mnt / "f"))
        write(mnt / "f")
        write(tmpfs / "g")
        assert set(paths(r.told())) == {str(tmpfs / "g")}
        with _on(tmpfs / "two"):
            assert short(until(r.watch, tmpfs / "two", "mounted"), tmpfs)[-1][0] == "mounted"
            assert len(r.watch.unwatched) == 2
        until(r.watch, tmpfs / "two", "unmounted")
        assert len(r.watch.unwatched) == 1


def test_a_mount_that_has_a_root_and_is_below_another(tmpfs: Path, pure: bool) -> None:
    """Everything in it is told, once."""
    with _on(tmpfs / "mnt") as mnt:
        (mnt / "sub").mkdir()
        with watching(tmpfs, mnt / "sub", pure=pure) as r:
            assert r.watch.mounts == r.watch.unwatched == ()
            write(mnt / "sub/f")
            write(mnt / "g")
            told = until(r.watch, mnt / "g")
            assert set(paths(told)) == {str(mnt / "sub/f"), str(mnt / "g")}
            assert len([c for c in told if "created" in c.kinds]) == 2
        with watching(tmpfs, mnt, pure=pure) as r:
            assert len(r.watch._groups) == 2


def test_not_recursive(tmpfs: Path) -> None:
    with _on(tmpfs / "mnt") as mnt, watching(tmpfs, recursive=False) as r:
        assert (r.watch.mounts, r.watch.unwatched) == ((), ())
        write(mnt / "f")
        assert paths(r.told()) == []


# -- that come and go --


def test_mounted_and_unmounted(tmpfs: Path, pure: bool, heard: str) -> None:
    with watching(tmpfs, pure=pure) as r:
        scanned(r)
        groups = _groups()
        with _on(tmpfs / "mnt") as mnt:
            until(r.watch, mnt, "mounted")
            assert _groups() == groups + 1
            (mnt / "d/e").mkdir(parents=True)
            write(mnt / "d/e/f")
            told = until(r.watch, mnt / "d/e/f", "written")
            assert {c.path_source for c in told} == {"exact"}
            # All before it is delivered, then the end.
            for i in range(500):
                write(mnt / f"d/n{i}")
            unmount(mnt)
            told = until(r.watch, mnt, "unmounted")
            assert len([c for c in told if "created" in c.kinds]) == 500
            assert told[-1].kinds == ("unmounted",)
            r.watch.read(0)
            assert _groups() == groups
            assert r.watch.mounts == ()
        assert not r.watch.ended
        assert r.watch.stats()["records"] > 500
        write(tmpfs / "after")
        assert set(paths(r.told())) == {str(tmpfs / "after")}


@pytest.mark.parametrize("nested", [False, True])
def test_another_one_at_the_same_place(tmpfs: Path, pure: bool, heard: str, nested: bool) -> None:
    """What went is told before what came."""
    run("mount", "--make-private", str(tmpfs))
    point = tmpfs / "mnt"
    points = [point, point / "deep"] if nested else [point]
    with watching(tmpfs, pure=pure) as r, contextlib.ExitStack() as stack:
        scanned(r)
        for each in points:
            stack.enter_context(_on(each))
            until(r.watch, each, "mounted")
        for i in range(300):
            write(point / f"f{i}")
        for each in reversed(points):
            unmount(each)
        run("mount", "-t", "tmpfs", "other", str(point))
        told = until(r.watch, point, "mounted")
        kinds = [(c.kinds[0], c.path) for c in told if {"mounted", "unmounted"} & set(c.kinds)]
        assert sorted(kinds[:-1]) == [("unmounted", str(each)) for each in points]
        assert kinds[-1] == ("mounted", str(point))
        write(point / "new")
        assert str(point / "new") in paths(until(r.watch, point / "new", "written"))


def test_what_was_there_before_it_is_listed_by_whoever_is_told(
    tmpfs: Path, pure: bool, heard: str
) -> None:
    """``mounted`` is told behind the mark: what a listing does not show is told."""
    with _on(tmpfs / "src") as src, watching(tmpfs, pure=pure) as r:
        for name in ("a", "b"):
            (src / name).mkdir()
        stop = threading.Event()
        point = tmpfs / "mnt"
        point.mkdir()

        def storm() -> None:
            i = 0
            while not stop.is_set() and i < 20_000:
                (src / f"a/{i}").mkdir()
                i += 1

        thread = threading.Thread(target=storm)
        thread.start()
        run("mount", "--bind", str(src), str(point))
        try:
            told = until(r.watch, point, "mounted")
            seen = on_disk(point)
            stop.set()
            thread.join()
            write(point / "end")
            told += until(r.watch, point / "end")
            at = [c.kinds for c in told].index(("mounted",))
            below = [c for c in told[at:] if c.path.startswith(f"{point}/")]
            assert replay(below, seen) == on_disk(point)
        finally:
            stop.set()
            thread.join()
            unmount(point)


def test_a_mount_on_a_mount(tmpfs: Path, pure: bool, heard: str) -> None:
    with watching(tmpfs, pure=pure) as r, _on(tmpfs / "mnt") as mnt:
        until(r.watch, mnt, "mounted")
        write(mnt / "lower")
        until(r.watch, mnt / "lower")
        with _on(mnt):
            told = until(r.watch, mnt, "mounted")
            assert [c.kinds for c in told].count(("mounted",)) == 1
            write(mnt / "upper")
            until(r.watch, mnt / "upper")
            assert len(r.watch.mounts) == 2
        told = until(r.watch, mnt, "unmounted")
        assert [c.kinds for c in told].count(("unmounted",)) == 1
        assert len(r.watch.mounts) == 1
        write(mnt / "lower2")
        assert set(paths(until(r.watch, mnt / "lower2"))) == {str(mnt / "lower2")}


def test_a_mount_that_is_covered_at_the_beginning(tmpfs: Path, pure: bool, heard: str) -> None:
    """No path leads to it: it is followed when the one above it goes."""
    with _on(tmpfs / "mnt") as mnt:
        write(mnt / "lower")
        with _on(mnt):
            upper = fanwise.identity(mnt)
            reader = watching(tmpfs, pure=pure)
            r = reader.__enter__()
        try:
            assert len(r.watch._groups) == 2
            assert r.watch.unwatched == ()
            told = until(r.watch, mnt, "mounted")
            if ("unmounted",) not in [c.kinds for c in told]:
                told += until(r.watch, mnt, "unmounted")
            assert fanwise.identity(mnt) != upper
            assert len(r.watch.mounts) == 1
            write(mnt / "f")
            until(r.watch, mnt / "f")
        finally:
            reader.__exit__(None, None, None)


def test_moved_into_within_and_out_of_a_root(tmp_path: Path, pure: bool, heard: str) -> None:
    with mounted("tmpfs", tmp_path) as top:
        run("mount", "--make-private", str(top))
        root, outside = top / "root", top / "outside"
        for name in ("root/a", "root/b", "outside"):
            (top / name).mkdir(parents=True)
        run("mount", "-t", "tmpfs", "x", str(outside))
        try:
            with watching(root, pure=pure) as r:
                scanned(r)
                run("mount", "--move", str(outside), str(root / "a"))
                until(r.watch, root / "a", "mounted")
                write(root / "a/f")
                until(r.watch, root / "a/f", "written")
                run("mount", "--move", str(root / "a"), str(root / "b"))
                told = until(r.watch, root / "b", "renamed")
                assert short(told, root) == [("renamed", "b", "a")]
                write(root / "b/g")
                until(r.watch, root / "b/g")
                run("mount", "--move", str(root / "b"), str(outside))
                told = until(r.watch, root / "b", "unmounted")
                write(outside / "h")
                write(root / "end")
                assert set(paths(r.told())) == {str(root / "end")}
                assert r.watch.mounts == ()
        finally:
            for point in (outside, root / "a", root / "b"):
                if os.path.ismount(point):
                    unmount(point)


def test_a_directory_above_the_mount_is_renamed(tmpfs: Path, pure: bool, heard: str) -> None:
    with _on(tmpfs / "a/b/mnt") as mnt, watching(tmpfs, pure=pure) as r:
        scanned(r)
        r.watch.read(0.05)
        os.rename(tmpfs / "a", tmpfs / "z")
        new = tmpfs / "z/b/mnt"
        try:
            write(new / "f")
            told = until(r.watch, new / "f")
            kinds = short(told, tmpfs)
            assert ("renamed", "z/b/mnt", "a/b/mnt") in kinds
            assert [m.path for m in r.watch.mounts] == [str(new)]
            assert not any(c.path.startswith(str(mnt)) for c in told)
        finally:
            unmount(new)


def test_lazily_with_what_is_mounted_in_it(tmpfs: Path, pure: bool, heard: str) -> None:
    with watching(tmpfs, pure=pure) as r:
        scanned(r)
        groups = _groups()
        with _on(tmpfs / "one") as one, _on(one / "two") as two:
            told = until(r.watch, two, "mounted")
            assert {str(one), str(two)} == {c.path for c in told if c.kinds == ("mounted",)}
            run("umount", "-l", str(one))
            told = until(r.watch, two, "unmounted")
            if str(one) not in [c.path for c in told if c.kinds == ("unmounted",)]:
                told += until(r.watch, one, "unmounted")
            r.watch.read(0)
            assert _groups() == groups


def test_the_outer_filesystem_goes_with_the_inner(tmp_path: Path, pure: bool, heard: str) -> None:
    """The stream ends when the last root does, and each mount has its end."""
    with mounted("tmpfs", tmp_path) as top, watching(top, pure=pure) as r:
        with _on(top / "one") as one:
            until(r.watch, one, "mounted")
            write(one / "f")
            run("umount", "-l", str(top))
            told = rest(r.watch)
            ends = [c.path for c in told if c.kinds == ("unmounted",)]
            assert sorted(ends) == [str(top), str(one)]
        assert r.watch.read(0) == []
        assert len(r.watch._groups) == 1


def test_the_root_moves_and_the_mount_with_it(tmpfs: Path, pure: bool) -> None:
    (tmpfs / "root").mkdir()
    with _on(tmpfs / "root/mnt"), watching(tmpfs / "root", pure=pure, exclude=["mnt/no"]) as r:
        scanned(r)
        r.watch.read(0.05)
        os.rename(tmpfs / "root", tmpfs / "other")
        new = tmpfs / "other/mnt"
        try:
            told = until(r.watch, new, "renamed")
            assert not any("unmounted" in c.kinds for c in told)
            (new / "no").mkdir()
            write(new / "no/f")
            write(new / "yes")
            assert set(paths(until(r.watch, new / "yes"))) == {str(new / "yes")}
        finally:
            unmount(new)


@pytest.mark.parametrize("busy", [False, True])
def test_the_directory_is_told_before_what_is_mounted_on_it(
    tmpfs: Path, pure: bool, monkeypatch: pytest.MonkeyPatch, heard: str, busy: bool
) -> None:
    """Both come to be after the last look at changes, and before the one at mounts."""
    changed = MountSource.changed
    with contextlib.ExitStack() as stack, watching(tmpfs, pure=pure) as r:
        scanned(r)
        r.told()
        late: list[Path] = []

        def meanwhile(source: MountSource) -> bool:
            if not late:
                late.append(_made(tmpfs / "mnt"))
                for i in range(20_000 if busy else 0):  # more than a slice
                    os.mkdir(tmpfs / str(i))
                stack.enter_context(_on(late[0]))
            return changed(source)

        monkeypatch.setattr(MountSource, "changed", meanwhile)
        told = until(r.watch, tmpfs / "mnt", "mounted")
        point = str(tmpfs / "mnt")
        assert [c.kinds[0] for c in told if c.path == point] == ["created", "mounted"]
        if busy:
            assert str(tmpfs / "19999") in {c.path for c in told}
        assert r.watch.mounts[0].path == point


def test_paused_meanwhile(tmpfs: Path, pure: bool, heard: str) -> None:
    with watching(tmpfs, pure=pure) as r, _on(tmpfs / "one") as one:
        until(r.watch, one, "mounted")
        r.watch.pause()
        unmount(one)
        with _on(tmpfs / "two") as two:
            assert r.watch.read(0.05) == []
            r.watch.resume()
            told = until(r.watch, two, "mounted")
            assert told[0].kinds in (("lost",), ("unmounted",))
            assert ("lost",) in [c.kinds for c in told]
            if ("unmounted", "one", None) not in short(told, tmpfs):
                until(r.watch, one, "unmounted")
            write(two / "f")
            until(r.watch, two / "f")


# -- bind mounts --


def test_one_filesystem_at_two_paths(tmpfs: Path, pure: bool, heard: str) -> None:
    """Each change is told with each path below a root that leads to it."""
    (tmpfs / "a/d").mkdir(parents=True)
    with watching(tmpfs, pure=pure) as r, _on(tmpfs / "b", "--bind", tmpfs / "a") as b:
        until(r.watch, b, "mounted")
        before = on_disk(tmpfs)
        write(tmpfs / "a/d/f")
        (b / "d/g").mkdir()
        os.rename(tmpfs / "a/d/f", tmpfs / "out")
        os.rename(tmpfs / "out", b.parent / "a/d/in")
        told: list[Change] = []
        for end in (tmpfs / "a/end", b / "end"):
            if not end.exists():
                write(end)
            if str(end) not in paths(told):
                told += until(r.watch, end)
        assert replay(told, before) == on_disk(tmpfs)
        for name in ("a/d/g", "b/d/g"):
            assert paths(told).count(str(tmpfs / name)) == 1
        # Out of what the bind mount shows: deleted there, renamed where both names are.
        assert ("deleted", "b/d/f", None) in short(told, tmpfs)
        assert ("renamed", "out", "a/d/f") in short(told, tmpfs)


def test_who_in_a_mount(tmpfs: Path) -> None:
    with watching(tmpfs, who=True) as r, _on(tmpfs / "mnt") as mnt:
        told = until(r.watch, mnt, "mounted")
        write(mnt / "f")
        told += until(r.watch, mnt / "f")
        (found,) = {c.process for c in told if c.path == str(mnt / "f")}
        assert found is not None
        assert found.name


def test_following_opens_nothing_that_is_told(tmpfs: Path, pure: bool) -> None:
    """The bind mount's filesystem is watched already, for opens too."""
    (tmpfs / "a").mkdir()
    with watching(tmpfs, pure=pure, kinds=["created", "opened"]) as r:
        scanned(r)
        with _on(tmpfs / "b", "--bind", tmpfs / "a") as b:
            told = until(r.watch, b, "mounted")
            run("touch", str(b / "f"))
            told += until(r.watch, b / "f")
            assert not [c for c in told if c.pid == os.getpid() and "opened" in c.kinds]


def test_it_moves_while_it_is_opened(
    tmpfs: Path, pure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory above is renamed between the list and the look, of which nothing tells."""
    (tmpfs / "a").mkdir()
    opened = Group.open

    def late(self: Group) -> None:
        monkeypatch.undo()
        os.rename(tmpfs / "a", tmpfs / "z")
        opened(self)

    with watching(tmpfs, pure=pure) as r:
        scanned(r)
        monkeypatch.setattr(Group, "open", late)
        run("mount", "-t", "tmpfs", "t", str(_made(tmpfs / "a/m")))
        try:
            until(r.watch, tmpfs / "z/m", "mounted")
            assert [m.path for m in r.watch.mounts] == [str(tmpfs / "z/m")]
        finally:
            unmount(tmpfs / "z/m")


def _made(path: Path) -> Path:
    path.mkdir()
    return path


# -- what is not followed --


def test_a_filesystem_that_cannot_be_marked_is_named(tmpfs: Path, pure: bool, heard: str) -> None:
    with _on(tmpfs / "proc", "-t", "proc", "p") as proc, watching(tmpfs, pure=pure) as r:
        (refused,) = r.watch.unwatched
        assert (refused.path, refused.fstype) == (str(proc), "proc")
        assert "does not tell what is created" in refused.reason
        assert not r.watch.tells(str(proc / "1"))
        with _on(tmpfs / "sys", "-t", "sysfs", "s") as sys:
            until(r.watch, sys, "mounted")
            assert [m.fstype for m in r.watch.unwatched] == ["proc", "sysfs"]
        until(r.watch, sys, "unmounted")
        assert [m.fstype for m in r.watch.unwatched] == ["proc"]
        write(tmpfs / "f")
        assert set(paths(r.told())) == {str(tmpfs / "f")}


def test_a_file_that_is_a_mount_point(tmpfs: Path) -> None:
    write(tmpfs / "a")
    write(tmpfs / "b")
    run("mount", "--bind", str(tmpfs / "a"), str(tmpfs / "b"))
    try:
        with watching(tmpfs) as r:
            ((path, _, reason, _),) = r.watch.unwatched
            assert (path, "file" in reason) == (str(tmpfs / "b"), True)
            write(tmpfs / "a", "y")
            assert set(paths(r.told())) == {str(tmpfs / "a")}
    finally:
        unmount(tmpfs / "b")


def test_globs_pids_and_kinds_in_a_mount(tmpfs: Path, pure: bool) -> None:
    options = {"exclude": ["no", "mnt/x/*.o", "*.tmp"], "kinds": ["created"]}
    with (
        _on(tmpfs / "no/mnt") as hidden,
        _on(tmpfs / "a.tmp"),
        watching(tmpfs, pure=pure, **options) as r,
        _on(tmpfs / "mnt") as mnt,
        _on(mnt / "no/deeper") as deeper,
    ):
        until(r.watch, mnt, "mounted")
        assert [m.path for m in r.watch.mounts] == [str(mnt)]
        assert r.watch.unwatched == ()
        for where in (hidden, deeper, mnt):
            (where / "x").mkdir()
            for name in ("a.o", "a.tmp", "a.c"):
                write(where / "x" / name)
        write(mnt / "end")
        told = until(r.watch, mnt / "end")
        assert short(told, mnt) == [
            ("created", "x", None),
            ("created", "x/a.c", None),
            ("created", "end", None),
        ]
    with (
        watching(tmpfs, pure=pure, ignore_pids=[os.getpid()]) as r,
        _on(tmpfs / "mnt") as mnt,
    ):
        until(r.watch, mnt, "mounted")
        write(mnt / "mine")
        run("touch", str(mnt / "other"))
        assert str(mnt / "mine") not in paths(until(r.watch, mnt / "other"))


_PR_SET_SECUREBITS, _PR_GET_SECUREBITS, _NO_SETUID_FIXUP = 28, 27, 1 << 2
_SETRESUID = {"x86_64": 117, "aarch64": 147}[os.uname().machine]


@contextmanager
def _as_another_user() -> Iterator[None]:
    """Keep every capability; the limits are another user's, so that nobody else meets them."""

    def become(uid: int) -> None:
        assert libc.syscall(_SETRESUID, -1, uid, -1) == 0  # this thread alone

    bits = libc.prctl(_PR_GET_SECUREBITS, 0, 0, 0, 0)
    assert libc.prctl(_PR_SET_SECUREBITS, bits | _NO_SETUID_FIXUP, 0, 0, 0) == 0
    try:
        become(1_000_000 + os.getpid())
        yield
    finally:
        become(0)
        libc.prctl(_PR_SET_SECUREBITS, bits, 0, 0, 0)


def _take_all(groups: list[int]) -> None:
    while True:
        try:
            groups.append(fan.init(fan.FAN_REPORT_FID))
        except fanwise.LimitReached:
            return


def test_the_limit_of_groups(tmpfs: Path) -> None:
    """What has no group is named, and followed as soon as there is one."""
    with _on(tmpfs / "one") as one, _as_another_user(), watching(tmpfs) as r:
        assert len(r.watch.mounts) == 1
        taken: list[int] = []
        points = [tmpfs / "two", tmpfs / "three"]
        for point in points:
            point.mkdir()
        try:
            _take_all(taken)
            assert libc.mount(b"t", os.fsencode(points[0]), b"tmpfs", 0, None) == 0
            until(r.watch, points[0], "mounted")
            (refused,) = r.watch.unwatched
            assert refused.path == str(points[0])
            assert "max_user_groups" in refused.reason
            assert refused.remedy is not None
            assert "sysctl" in refused.remedy
            assert [m.path for m in r.watch.mounts] == [str(one)]
            for fd in taken[:2]:
                os.close(fd)
            del taken[:2]
            assert libc.mount(b"t", os.fsencode(points[1]), b"tmpfs", 0, None) == 0
            told = [*until(r.watch, points[1], "mounted"), *r.watch.read(0)]
            assert {c.path for c in told if c.kinds == ("mounted",)} == set(map(str, points))
            assert r.watch.unwatched == ()
            write(points[0] / "f")
            until(r.watch, points[0] / "f")
        finally:
            for fd in taken:
                os.close(fd)
            for point in points:
                libc.umount2(os.fsencode(point), 2)


def test_a_limit_is_met_once_for_all_that_are_refused(
    tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With hundreds of mounts too many each change of mounts would cost seconds."""
    opened = Group.open
    tries: list[Group] = []

    def counted(group: Group) -> None:
        tries.append(group)
        opened(group)

    with _as_another_user(), watching(tmpfs) as r:
        taken: list[int] = []
        points = [_made(tmpfs / f"m{i}") for i in range(6)]
        try:
            _take_all(taken)
            monkeypatch.setattr(Group, "open", counted)
            for count, point in enumerate(points, 1):
                tries.clear()
                assert libc.mount(b"t", os.fsencode(point), b"tmpfs", 0, None) == 0
                until(r.watch, point, "mounted")
                assert len(r.watch.unwatched) == count
                assert "max_user_groups" in r.watch.unwatched[-1].reason
                assert len(tries) <= 1
            os.close(taken.pop())
            os.close(taken.pop())
            assert libc.umount2(os.fsencode(points[5]), 0) == 0
            told = until(r.watch, points[5], "unmounted")
            told += until(r.watch, points[1], "mounted") if len(told) < 3 else []
            assert [m.path for m in r.watch.mounts] == [str(points[0]), str(points[1])]
            assert len(r.watch.unwatched) == 3
        finally:
            for fd in taken:
                os.close(fd)
            for point in points:
                libc.umount2(os.fsencode(point), 2)


def test_no_descriptor_left_for_a_mount(tmpfs: Path, heard: str) -> None:
    """It is no error of reading: the mount is named, and followed when it can be."""
    point, other = _made(tmpfs / "m"), _made(tmpfs / "n")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare: list[int] = []
    with watching(tmpfs) as r:
        scanned(r)
        r.told()
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, limit[1]))
            with contextlib.suppress(OSError):
                while True:
                    spare.append(os.open("/dev/null", os.O_RDONLY))
            assert libc.mount(b"t", os.fsencode(point), b"tmpfs", 0, None) == 0
            until(r.watch, point, "mounted")
            (refused,) = r.watch.unwatched
            assert "descriptors" in refused.reason
            assert refused.remedy is not None
            assert "ulimit" in refused.remedy
            for fd in spare:
                os.close(fd)
            spare.clear()
            assert libc.mount(b"t", os.fsencode(other), b"tmpfs", 0, None) == 0
            until(r.watch, other, "mounted")
            assert r.watch.unwatched == ()
            write(point / "f")
            until(r.watch, point / "f")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            for fd in spare:
                os.close(fd)
            libc.umount2(os.fsencode(point), 2)
            libc.umount2(os.fsencode(other), 2)


def test_an_error_while_mounts_are_followed_loses_nothing(
    tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Below.update

    def fails(below: Below, there: object, rows: list[Change]) -> None:
        monkeypatch.undo()
        update(below, below.look(), rows)
        raise OSError("made up")

    with watching(tmpfs) as r:
        scanned(r)
        with _on(tmpfs / "m") as point:
            monkeypatch.setattr(Below, "update", fails)
            with pytest.raises(OSError, match="made up"):
                until(r.watch, point, "mounted")
            until(r.watch, point, "mounted")
            write(point / "f")
            until(r.watch, point / "f")


def test_an_error_of_mounts_behind_a_slice_loses_nothing(
    tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(source: MountSource) -> bool:
        monkeypatch.undo()
        raise OSError("made up")

    with watching(tmpfs) as r:
        scanned(r)
        r.told()
        r.watch._asked_at = 0.0  # mounts are asked about now and then
        monkeypatch.setattr(MountSource, "changed", fails)
        write(tmpfs / "f")
        told: list[Change] = []
        failed = False
        while not failed:
            try:
                told += r.watch.read(1)
            except OSError:
                failed = True
        told += r.told()
        assert "created" in {kind for c in told if c.path == str(tmpfs / "f") for kind in c.kinds}


@contextmanager
def _silent(point: Path) -> Iterator[int]:
    """A FUSE filesystem whose server answers nothing; closing the descriptor ends the server."""
    server = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
    try:
        assert libc.mount(b"silent", os.fsencode(point), b"fuse", 0, options) == 0
        try:
            yield server
        finally:
            libc.umount2(os.fsencode(point), 2)  # by its path: no look asks the server
    finally:
        with contextlib.suppress(OSError):
            os.close(server)


@pytest.mark.parametrize(
    "kinds", [None, ["created", "deleted", "opened"]], ids=["plain", "helpers"]
)
def test_one_that_does_not_answer_holds_up_nothing(
    tmpfs: Path, kinds: list[str] | None, heard: str
) -> None:
    early, late = _made(tmpfs / "early"), _made(tmpfs / "late")
    with _silent(early) as server, watching(tmpfs, kinds=kinds) as r:
        ((path, fstype, reason, remedy),) = r.watch.unwatched
        assert (path, fstype, reason) == (str(early), "fuse", "it does not answer")
        assert remedy is not None
        r.told()
        with _silent(late):
            until(r.watch, late, "mounted")
            assert [m.path for m in r.watch.unwatched] == [str(early), str(late)]
            asked = [question._process.pid for question in r.watch._below._asked.values()]
            assert len(asked) == 2
            write(tmpfs / "f")
            until(r.watch, tmpfs / "f")
            # The answer wakes the watch, be it an error.
            deadline = time.monotonic() + 20
            while select.select([r.watch.fileno()], [], [], 0.05)[0]:
                assert time.monotonic() < deadline
                r.watch.read(0)
            os.close(server)
            assert select.select([r.watch.fileno()], [], [], 10)[0]
            while "does not answer" in r.watch.unwatched[0].reason:
                assert time.monotonic() < deadline
                r.watch.read(0.1)
            assert len(r.watch._below._asked) == 1
        until(r.watch, late, "unmounted")
        assert r.watch._below._asked == {}
        assert not [c for c in r.told() if c.pid in asked]
    for pid in asked:
        with pytest.raises(ProcessLookupError):
            _wait_gone(pid)


def _wait_gone(pid: int) -> None:
    fd = os.pidfd_open(pid)
    try:
        assert select.select([fd], [], [], 10)[0]
    finally:
        os.close(fd)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    os.kill(pid, 0)


def test_what_is_asked_ends_with_the_watch(tmpfs: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with _silent(_made(tmpfs / "m")):
        with fanwise.watch(tmpfs) as watch:
            (question,) = watch._below._asked.values()
            pid = question._process.pid
            # One that Ctrl-C ends would say that there is an answer.
            assert os.getpgid(pid) == pid
        fds = set(os.listdir("/proc/self/fd"))
        assert len(fds - before) == 1  # the server's
        with pytest.raises(ProcessLookupError):
            _wait_gone(pid)


# -- storms --


def test_a_storm_in_one_mount_does_not_silence_the_others(tmpfs: Path, pure: bool) -> None:
    with _on(tmpfs / "mnt") as mnt, watching(tmpfs, pure=pure) as r:
        scanned(r)
        r.told()
        for i in range(12 * 4096):
            os.close(os.open(tmpfs / f"f{i}", os.O_CREAT | os.O_WRONLY))
        write(mnt / "f")
        assert all(group.empty(10) for group in r.watch._groups)  # both are waiting
        told: list[Change] = []
        while str(mnt / "f") not in paths(told):
            told += r.watch.read(10)
        assert len(told) <= 3 * 4096


def test_fifty_mounts_come_and_go(tmpfs: Path, pure: bool, heard: str) -> None:
    run("mount", "--make-private", str(tmpfs))
    with watching(tmpfs, pure=pure, queue=1 << 20) as r:
        scanned(r)
        groups, fds = _groups(), len(os.listdir("/proc/self/fd"))
        errors: list[BaseException] = []

        def storm() -> None:
            try:
                for i in range(50):
                    point = tmpfs / f"m{i % 10}"
                    point.mkdir(exist_ok=True)
                    run("mount", "-t", "tmpfs", f"t{i}", str(point))
                    (point / "d").mkdir()
                    write(point / "d/f")
                    if i % 3 == 0:
                        run("umount", "-l", str(point))
                    else:
                        unmount(point)
                write(tmpfs / "end")
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=storm)
        thread.start()
        told = []
        deadline = time.monotonic() + 60
        while str(tmpfs / "end") not in paths(told):
            assert time.monotonic() < deadline
            assert not errors
            told += r.watch.read(1)
        thread.join()
        while r.watch.read(0.2):
            pass
        assert (r.watch.mounts, r.watch.unwatched) == ((), ())
        assert _groups() == groups
        assert len(os.listdir("/proc/self/fd")) == fds
        assert threading.active_count() <= 4  # drain, scan, and those of the test
        # Each that was told mounted was told unmounted.
        balance: dict[str, int] = {}
        for change in told:
            if change.kinds == ("mounted",):
                balance[change.path] = balance.get(change.path, 0) + 1
                assert balance[change.path] <= 2  # a lazy one may be told late
            elif change.kinds == ("unmounted",):
                balance[change.path] -= 1
        assert set(balance.values()) <= {0, 1}


def test_an_idle_watch_does_not_keep_them_busy(tmpfs: Path, pure: bool) -> None:
    with watching(tmpfs, pure=pure) as r, _on(tmpfs / "mnt") as mnt:
        until(r.watch, mnt, "mounted")
        scanned(r)
        write(mnt / "f")
        until(r.watch, mnt / "f", "written")
        r.watch.read(0.05)
        unmount(mnt)


# -- the source --


@pytest.fixture(params=[False, True], ids=["mountinfo", "events"])
def source(request: pytest.FixtureRequest) -> Iterator[MountSource]:
    found = MountSource(request.param)
    found.open()
    assert found.events is request.param
    with select.epoll() as epoll:
        epoll.register(*found.waits)
        found.wait = epoll.poll  # type: ignore[attr-defined]
        yield found
    found.close()


def _own(changes: list[MountChange], top: Path) -> list[MountChange]:
    # Others of the machine mount and unmount meanwhile.
    return [c for c in changes if os.fsdecode(c.mount.mount_point).startswith(f"{top}/")]


def _wait(source: MountSource, top: Path) -> list[tuple[str, bytes]]:
    assert source.wait(5)  # type: ignore[attr-defined]
    assert source.changed()
    found = _own(source.read(), top)
    assert not (source.changed() and _own(source.read(), top))
    return [(change.kind, change.mount.mount_point) for change in found]


def test_a_source_of_mounts(source: MountSource, tmp_path: Path) -> None:
    def below(found: list[Mount]) -> list[Mount]:
        return [m for m in found if os.fsdecode(m.mount_point).startswith(f"{tmp_path}/")]

    one = tmp_path / "one"
    two = tmp_path / "two"
    with _on(one):
        run("mount", "--make-private", str(one))
        assert _wait(source, tmp_path) == [("attached", os.fsencode(one))]
        assert below(source.there) == below(mounts())
        with _on(one / "in/m"):
            assert _wait(source, tmp_path) == [("attached", os.fsencode(one / "in/m"))]
            os.rename(one / "in", one / "on")
            # Nothing tells of it; a change of others may bring it to light.
            heard = source.read() if source.changed() else []
            assert not heard or heard != _own(heard, tmp_path)
            assert [(c.kind, c.mount.mount_point, c.before and c.before.mount_point)
                    for c in _own([*heard, *source.look()], tmp_path)] == [
                ("moved", os.fsencode(one / "on/m"), os.fsencode(one / "in/m"))
            ]  # fmt: skip
            unmount(one / "on/m")
        assert _wait(source, tmp_path) == [("detached", os.fsencode(one / "on/m"))]
    assert _wait(source, tmp_path) == [("detached", os.fsencode(one))]
    with _on(tmp_path / "top") as top:
        run("mount", "--make-private", str(top))
        with _on(top / "a"), _on(top / "a/b"):
            (top / "c").mkdir()
            _wait(source, tmp_path)
            run("mount", "--move", str(top / "a"), str(top / "c"))
            # What is mounted on it moves along.
            assert sorted(_wait(source, tmp_path)) == [
                ("moved", os.fsencode(top / "c")),
                ("moved", os.fsencode(top / "c/b")),
            ]
            run("umount", "-R", str(top / "c"))
        _wait(source, tmp_path)
        with _on(two):
            unmount(two)
        _wait(source, tmp_path)
        there = {m.unique_id for m in below(source.there)}
        assert there == {m.unique_id for m in below(mounts())}


def test_without_a_descriptor_left(source: MountSource, tmp_path: Path) -> None:
    point = tmp_path / "one"
    point.mkdir()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        assert libc.mount(b"t", os.fsencode(point), b"tmpfs", 0, None) == 0
        with pytest.raises(OSError, match="Too many open files"):
            os.open("/", os.O_PATH)
        found = [c.mount.mount_point for c in (*source.read(), *source.look())]
        assert found.count(os.fsencode(point)) == 1  # others may mount things, too
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        libc.umount2(os.fsencode(point), 0)


# In a mount namespace of its own, in which every mount below one directory is one below 256 of its
# peers: so few calls fill the queue, and the limit of the machine stays as it is.
OVERFLOW = """
import os, sys
from pathlib import Path
from fanwise.kernel.libc import libc
from fanwise.kernel.records import decode
from fanwise.sources import mounts
top, PEERS, BIND, SHARED = Path(sys.argv[1]), 256, 0x1000, 0x100000
def mount(source, point, kind, flags):
    point.mkdir(exist_ok=True)
    assert libc.mount(source, os.fsencode(point), kind, flags, None) == 0, point
first = top / "first"
mount(b"first", first, b"tmpfs", 0)
assert libc.mount(None, os.fsencode(first), None, SHARED, None) == 0
for i in range(PEERS - 1):
    mount(os.fsencode(first), top / f"peer{i}", None, BIND)
source = mounts.MountSource(True)
source.open()
limit = int(Path("/proc/sys/fs/fanotify/max_queued_events").read_text())
for i in range(limit // (2 * PEERS) + 1):
    mount(b"t", first / "gone", b"tmpfs", 0)
    assert libc.umount2(os.fsencode(first / "gone"), 0) == 0
mount(b"t", first / "stays", b"tmpfs", 0)
seen = []
mounts.decode = lambda data: seen.append(decode(data)) or seen[-1]
drain = source._drain
source._drain = lambda: drain() or seen.append("drained")
found = [change.mount.mount_point for change in source.read()]
assert len(found) == len(set(found)) == PEERS, len(found)
assert {os.path.basename(point) for point in found} == {b"stays"}
assert "drained" in seen, "it did not overflow"
assert not source.changed()
"""


def test_events_that_overflow(tmpfs: Path) -> None:
    argv = ["unshare", "--mount", "--propagation", "private"]
    done = subprocess.run(
        [*argv, sys.executable, "-c", OVERFLOW, str(tmpfs)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_one_mount_is_described_as_in_the_list(tmp_path: Path) -> None:
    with (
        _on(tmp_path / "a", "-t", "tmpfs", "-o", "nosuid,nodev,noexec,noatime,size=1m", "a b") as a,
        _on(tmp_path / "b,c", "-t", "tmpfs", "-o", "ro,nodiratime", "x"),
        _on(tmp_path / "d", "--bind", a) as bind,
    ):
        run("mount", "--make-shared", str(a))
        with _on(bind / "slave", "--bind", a) as slave:
            run("mount", "--make-slave", str(slave))
            run("mount", "--make-unbindable", str(bind))
            there = mounts()
            assert len(there) > 5
            described = {}
            for mount in there:
                assert mount.unique_id is not None
                with contextlib.suppress(fanwise.NoSuchRoot):
                    described[mount.unique_id] = describe(mount.unique_id)
            # Others of the machine unmount meanwhile, and what they change is no longer the same.
            stay = [mount for mount in mounts() if mount in there]
            assert {a, bind, slave} <= {Path(os.fsdecode(mount.mount_point)) for mount in stay}
            for mount in stay:
                assert described[mount.unique_id] == mount
    with pytest.raises(fanwise.NoSuchRoot):
        describe(2**62)


def test_which_mounts_a_path_leads_to(tmp_path: Path) -> None:
    """As look-ups have it."""
    with (
        _on(tmp_path / "a/b/c") as c,
        _on(tmp_path / "a") as a,
        _on(a / "b/c") as other,
        _on(other),
        _on(a / "x/y"),
        _on(tmp_path / "t"),
    ):
        there = mounts()
        seen = visible(there)
        mine = [m for m in there if m.mount_point.startswith(os.fsencode(tmp_path))]
        assert len(mine) == 6
        for mount in mine:
            found = os.stat(mount.mount_point)
            leads = (os.major(found.st_dev), os.minor(found.st_dev)) == mount.dev
            assert leads == (mount.id in seen), mount
        assert c == other


def test_a_forked_child_keeps_no_group(tmp_path: Path) -> None:
    source = MountSource(True)
    source.open()
    try:
        fd, _ = source.waits
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            status = 1
            try:
                os.fstat(fd)
            except OSError:
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        with _on(tmp_path / "here"):  # the parent hears as before
            assert _own(source.read(), tmp_path) != []
    finally:
        source.close()
