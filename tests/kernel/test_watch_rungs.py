"""Every rung of the ladder on a real filesystem or for a real user of its kind."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import fanwise
from fanwise.sources import inotify
from fanwise.watch import _group
from tests.kernel.conftest import loop_device, mounted, run, unmount
from tests.kernel.notifying import exchange
from tests.kernel.test_watch_mounts import rest, until
from tests.kernel.test_watch_storms import PATHS, Step, one_storm
from tests.kernel.watching import on_disk, replay, scanned, short, watching, write

HERE = Path(__file__)
NOBODY = 1_000_000 + os.getpid()  # somebody without privileges, and with limits of his own


@contextmanager
def overlay(where: Path) -> Iterator[Path]:
    """An overlay with the default options, over a tmpfs, with something in its lower layer."""
    with mounted("tmpfs", where) as base:
        point = base / "merged"
        for name in ("lower/low/sub", "upper", "work", "merged"):
            (base / name).mkdir(parents=True)
        (base / "lower/low/file").write_text("lower")
        options = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
        run("mount", "-t", "overlay", "fanwise-test", "-o", options, str(point))
        try:
            yield point
        finally:
            if os.path.ismount(point):
                unmount(point)


@contextmanager
def fuse(where: Path) -> Iterator[Path]:
    """A FUSE filesystem that mirrors a directory on a tmpfs."""
    with mounted("tmpfs", where) as base:
        (base / "source").mkdir()
        (base / "fuse").mkdir()
        point = base / "fuse"
        with subprocess.Popen(["bindfs", "-f", str(base / "source"), str(point)]) as server:
            deadline = time.monotonic() + 60
            while not os.path.ismount(point):
                assert server.poll() is None, "bindfs ended"
                assert time.monotonic() < deadline, "bindfs does not mount"
                time.sleep(0.01)  # nothing tells of it but its mount
            try:
                yield point
            finally:
                if os.path.ismount(point):
                    unmount(point)
                server.wait(60)  # it keeps the tmpfs busy until then


@contextmanager
def plain(where: Path) -> Iterator[Path]:
    with mounted("tmpfs", where) as point:
        yield point


KINDS = {"overlay": overlay, "fuse": fuse, "forced": plain, "inotify": plain}


@pytest.fixture(params=KINDS)
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A root on a lower rung: by its filesystem, or because that rung is asked for."""
    if request.param in ("forced", "inotify"):
        monkeypatch.setenv(
            "FANWISE_RUNG", "inotify" if request.param == "inotify" else "inode-marks"
        )
    with KINDS[request.param](tmp_path) as point:
        yield point


def rung_of(root: Path) -> str:
    with fanwise.watch(root) as watch:
        return watch.roots[0].rung


def test_the_rung_is_found_by_trying(tmp_path: Path, fs: Path) -> None:
    assert rung_of(fs) == "filesystem-mark"


def test_overlay_and_fuse_are_served_by_marks_on_directories(tmp_path: Path) -> None:
    for kind in (overlay, fuse):
        with kind(tmp_path / kind.__name__) as point:
            assert rung_of(point) == "inode-marks"
            told = fanwise.capabilities(point)
            assert told.rung == "inode-marks"


def test_what_is_made_in_a_new_directory_is_told_once(place: Path, pure: bool) -> None:
    with watching(place, pure=pure) as r:
        for number in range(200):
            below = place / f"c{number}" / "b" / "c" / "d"
            below.mkdir(parents=True)
            write(below / "f")
        made = [c.path for c in r.told() if "created" in c.kinds]
        want = on_disk(place) - {str(place / "low")}
        want = {path for path in want if "/low" not in path}
        assert sorted(made) == sorted(want)
        seen: set[str] = set()
        for path in made:
            parent = os.path.dirname(path)
            assert parent == str(place) or parent in seen, "a child before its directory"
            seen.add(path)
        # And all of them are watched now.
        for number in range(200):
            write(place / f"c{number}" / "b" / "c" / "d" / "g")
        told = {c.path for c in r.told() if "created" in c.kinds}
        assert told == {str(place / f"c{n}" / "b/c/d/g") for n in range(200)}


def test_files_and_directories_that_come_go_and_move(place: Path, pure: bool) -> None:
    (place / "in" / "deep").mkdir(parents=True)
    (place / "out").mkdir()
    root = place / "in"
    with watching(root, pure=pure) as r:
        (place / "out" / "tree" / "leaf").mkdir(parents=True)
        write(place / "out" / "tree" / "leaf" / "old")
        (place / "out" / "tree").rename(root / "tree")
        assert short(r.told(), root) == [("created", "tree", None)]  # nothing beyond it
        write(root / "tree" / "leaf" / "new")
        kinds = short(r.told(), root)
        assert kinds[0][0].startswith("created")
        assert {path for _, path, _ in kinds} == {"tree/leaf/new"}
        (root / "tree").rename(root / "deep" / "tree")
        assert short(r.told(), root) == [("renamed", "deep/tree", "tree")]
        (root / "deep" / "tree").rename(place / "out" / "tree")
        assert short(r.told(), root) == [("deleted", "deep/tree", None)]
        (place / "out" / "tree" / "leaf" / "more").mkdir()
        write(place / "out" / "tree" / "leaf" / "more" / "x")
        assert r.told() == []
        (place / "out" / "tree").rename(root / "back")
        assert short(r.told(), root) == [("created", "back", None)]
        write(root / "back" / "leaf" / "more" / "y")
        assert {p for _, p, _ in short(r.told(), root)} == {"back/leaf/more/y"}
        shutil.rmtree(root / "back")
        assert all(kinds == "deleted" for kinds, _, _ in short(r.told(), root))


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_server_below_a_root_is_not_depended_on(tmpfs: Path, when: str) -> None:
    (tmpfs / "source").mkdir()
    (tmpfs / "fuse").mkdir()
    point = tmpfs / "fuse"

    def serve() -> subprocess.Popen[bytes]:
        server = subprocess.Popen(["bindfs", "-f", str(tmpfs / "source"), str(point)])
        deadline = time.monotonic() + 60
        while not os.path.ismount(point):
            assert server.poll() is None, "bindfs ended"
            assert time.monotonic() < deadline, "bindfs does not mount"
            time.sleep(0.01)  # nothing tells of it but its mount
        return server

    server = serve() if when == "before" else None
    try:
        with watching(tmpfs) as r:
            if server is None:
                server = serve()
                until(r.watch, point, "mounted")
            r.told()
            deadline = time.monotonic() + 60
            while "does not answer" in r.watch.unwatched[0].reason:  # not yet
                assert time.monotonic() < deadline
                r.watch.read(0.1)
            (refused,) = r.watch.unwatched
            assert refused.path == str(point)
            # Whatever it answered when it was asked, its directories are not opened one by one.
            assert refused.remedy == "give it as a PATH of its own"
            server.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, server.pid, os.WSTOPPED)
            write(tmpfs / "f")
            assert str(tmpfs / "f") in {c.path for c in r.told()}
            server.send_signal(signal.SIGCONT)
        assert rung_of(point) == "inode-marks"
    finally:
        if server is not None:
            server.send_signal(signal.SIGCONT)
            unmount(point)
            server.wait(60)


def test_excluded_directories_have_no_mark(tmpfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FANWISE_RUNG", "inode-marks")
    (tmpfs / "node_modules" / "a").mkdir(parents=True)
    (tmpfs / "src").mkdir()
    with watching(tmpfs, exclude=["node_modules"]) as r:
        fd = r.watch._groups[0].source.fd
        (tmpfs / "src" / "node_modules").mkdir()
        (tmpfs / "src" / "kept").mkdir()
        r.told()
        marks = Path(f"/proc/self/fdinfo/{fd}").read_text().count("fanotify ino:")
        assert marks == 3  # the root, src, src/kept
        (tmpfs / "node_modules").rename(tmpfs / "kept")
        r.told()
        write(tmpfs / "kept" / "a" / "f")
        assert str(tmpfs / "kept" / "a" / "f") in {c.path for c in r.told()}


@pytest.mark.parametrize("rung", ["inode-marks", "inotify"])
def test_a_count_of_links_that_is_not_true(
    tmp_path: Path, pure: bool, rung: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two links on a directory with subdirectories: what many a FUSE server tells."""
    monkeypatch.setenv("FANWISE_RUNG", rung)
    asked: list[str] = []
    monkeypatch.setattr(_group, "may_wait", lambda fstype: not asked.append(fstype))
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    run("mkfs.ext4", "-q", "-F", str(image))
    point = tmp_path / "fs"
    point.mkdir()
    with loop_device(image) as device:
        run("mount", device, str(point))
        (point / "d" / "e" / "f").mkdir(parents=True)
        unmount(point)
        run("debugfs", "-w", "-R", "set_inode_field /d links_count 2", device)
        run("mount", device, str(point))
        try:
            assert (point / "d").stat().st_nlink == 2
            with watching(point, pure=pure) as r:
                write(point / "d" / "e" / "f" / "new")
                assert str(point / "d" / "e" / "f" / "new") in {c.path for c in r.told()}
                assert asked == ["ext4"]
        finally:
            unmount(point)


def test_directories_that_change_places(place: Path) -> None:
    one, two = place / "one", place / "p" / "two"
    for directory in (one / "1", two / "2", place / "empty"):
        directory.mkdir(parents=True)
    if place.name == "fuse":  # bindfs does not do it
        with pytest.raises(OSError, match="renameat2"):
            exchange(one, two)
        return
    with watching(place) as r:
        exchange(one, two)
        for path in (one / "2" / "f", two / "1" / "f", one / "g", two / "g"):
            write(path)
        told = r.told()
        assert {c.path for c in told if "created" in c.kinds} == {
            *(str(one / name) for name in ("2/f", "g")),
            *(str(two / name) for name in ("1/f", "g")),
        }
        assert [(c.old_path, c.path) for c in told if "renamed" in c.kinds] == [
            (str(one), str(two)),
            (str(two), str(one)),
        ]
        # There and back again over one that is empty is no exchange.
        (one / "2").rename(place / "empty")
        (place / "empty").rename(one / "2")
        write(one / "2" / "h")
        told = r.told()
        assert [c.path for c in told if "created" in c.kinds] == [str(one / "2" / "h")]
        assert replay(told, {str(one / "2"), str(place / "empty")}) == {
            str(one / "2"),
            str(one / "2" / "h"),
        }


def test_a_directory_moved_into_one_that_was_not_marked_yet(place: Path, pure: bool) -> None:
    """And that one was renamed: no path leads to either where their creations are decoded."""
    with watching(place, pure=pure) as r:
        before = on_disk(place)
        (place / "e" / "a").mkdir(parents=True)
        (place / "c").mkdir()
        assert r.watch._groups[0].empty(20)
        (place / "c").rename(place / "f")
        (place / "e").rename(place / "f" / "x")
        told = r.told()
        assert replay(told, before) == on_disk(place)
        write(place / "f" / "x" / "a" / "new")
        assert {c.path for c in r.told()} == {str(place / "f/x/a/new")}
        (place / "last").mkdir()
        r.told()
        assert not r.watch._groups[0].resolver._astray  # none is looked for any more


def test_identity_is_that_of_the_changes(place: Path) -> None:
    with watching(place) as reader:
        (place / "d").mkdir()
        write(place / "d" / "f")
        told = {c.path: c.identity for c in reader.told() if "created" in c.kinds}
        for path in (place / "d", place / "d" / "f"):
            if told[str(path)] is not None:  # inotify: of directories
                assert told[str(path)] == fanwise.identity(path)
        assert told[str(place / "d")] is not None


def test_marks_do_not_keep_a_filesystem_busy(place: Path) -> None:
    (place / "a" / "b").mkdir(parents=True)
    with fanwise.watch(place) as watch:
        while not watch.scanned:
            watch.read(0.01)
        unmount(place)
        assert [c.kinds for c in rest(watch)] == [("unmounted",)]


def storm_of(rng: random.Random, links: bool) -> list[Step]:
    what = ["write", "unlink", "rename", "mkdir", "rmdir", "rename", *(["link"] if links else [])]
    return [
        (rng.choice(what), rng.choice(PATHS), rng.choice(PATHS))
        for _ in range(rng.randrange(5, 120))
    ]


@pytest.mark.parametrize("seed", range(3))
def test_after_any_storm_the_paths_told_are_those_on_disk(
    place: Path, pure: bool, seed: int
) -> None:
    (place / "root").mkdir()
    rng = random.Random(seed)
    # Not on FUSE: this server takes two links of one file for two files, and tells the kernel that
    # a rename of one to the other, which does nothing, moved it.
    links = place.name != "fuse"
    for _ in range(15):
        one_storm(place / "root", storm_of(rng, links), pure)


def test_opens_of_files_are_told_and_those_of_the_watch_are_not(place: Path, pure: bool) -> None:
    (place / "d").mkdir()
    write(place / "d" / "f")
    with watching(place, pure=pure, kinds=["created", "deleted", "opened", "accessed"]) as r:
        scanned(r)
        assert [c for c in r.told() if c.is_dir] == []
        subprocess.run(["cat", str(place / "d" / "f")], check=True, capture_output=True)
        told = r.told()
        assert {k for c in told if c.path == str(place / "d/f") for k in c.kinds} == {
            "opened",
            "accessed",
        }


@pytest.mark.parametrize("rung", ["inode-marks", "inotify"])
def test_a_loss_is_told_and_everything_is_marked_again(
    tmpfs: Path, rung: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FANWISE_RUNG", rung)
    with watching(tmpfs) as r:
        r.watch.pause()
        (tmpfs / "a" / "b").mkdir(parents=True)
        r.watch.resume()
        assert r.watch.read(20)[0].kinds == ("lost",)
        write(tmpfs / "a" / "b" / "f")
        told = r.told()
        made = {c.path for c in told} | {f"{c.path}/{n}" for c in told for n in c.names or ()}
        assert str(tmpfs / "a/b/f") in made
        while not r.watch.scanned:
            r.watch.read(0.01)
        write(tmpfs / "a" / "b" / "g")  # every directory is marked again
        assert str(tmpfs / "a/b/g") in {c.path for c in r.told() if "created" in c.kinds}


def test_proc_like(tmp_path: Path) -> None:
    for root, file in (("/proc/sys/fs", "file-max"), ("/sys/kernel/mm", "")):
        with (
            pytest.raises(fanwise.FilesystemRefuses, match="does not tell") as caught,
            fanwise.watch(root),
        ):
            pass
        assert "opened" in str(caught.value.remedy)
        with fanwise.watch(root, kinds=["opened", "accessed"]) as watch:
            assert watch.roots[0].rung == "proc-like"
            path = os.path.join(root, file) if file else _some_file(root)
            Path(path).read_bytes()
            deadline = time.monotonic() + 20
            told = []
            while time.monotonic() < deadline and path not in told:
                told += [c.path for c in watch.read(0.5)]
            assert path in told


def test_what_the_kernel_makes_is_told_on_debugfs_and_not_on_fusectl(tmp_path: Path) -> None:
    for name in ("debugfs", "fusectl"):
        with mounted_pseudo(name, tmp_path / name) as point:
            root = point / "bdi" if name == "debugfs" else point
            if name == "fusectl":
                with pytest.raises(fanwise.FilesystemRefuses, match="fusectl does not tell"):
                    fanwise.watch(root).open()
                continue
            with fanwise.watch(root) as watch, fuse(tmp_path / "mnt") as mnt:
                made = os.stat(mnt).st_dev
                name = f"{os.major(made)}:{os.minor(made)}"
                until(watch, root / name)  # others may mount and unmount, too
    # Which is so because the kernel tells nobody of a connection that comes.
    with mounted_pseudo("fusectl", tmp_path / "fusectl") as point:
        fd = inotify.init(str(point))
        try:
            assert inotify.libc.inotify_add_watch(fd, os.fsencode(point), inotify.IN_CREATE) >= 0
            before = set(os.listdir(point))
            with fuse(tmp_path / "other"):
                assert set(os.listdir(point)) - before
            with pytest.raises(BlockingIOError):
                os.read(fd, 4096)
        finally:
            os.close(fd)


@contextmanager
def mounted_pseudo(fstype: str, where: Path) -> Iterator[Path]:
    where.mkdir(exist_ok=True)
    run("mount", "-t", fstype, "fanwise-test", str(where))
    try:
        yield where
    finally:
        unmount(where)


def _some_file(root: str) -> str:
    for base, _, files in os.walk(root):
        for name in files:
            path = os.path.join(base, name)
            if os.stat(path).st_mode & 0o444:
                return path
    raise AssertionError(root)


def child(what: str, root: Path, user: int | None = NOBODY) -> dict[str, object]:
    """Run one of the functions below in a process of its own, as another user."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernel.rung_child", what, str(root), str(user or 0)],
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


@pytest.fixture
def open_to_all(tmpfs: Path) -> Path:
    """A root that anybody may write in, and one directory in it that only root may read."""
    tmpfs.chmod(0o777)
    for above in tmpfs.parents:
        if above.stat().st_mode & 0o5 != 0o5:
            above.chmod(above.stat().st_mode | 0o55)
    (tmpfs / "denied").mkdir(mode=0o700)
    return tmpfs


def test_a_user_without_privileges(open_to_all: Path) -> None:
    told = child("storm", open_to_all)
    assert told["rung"] == "inode-marks"
    assert told["unwatched"] == [str(open_to_all / "denied")]
    assert told["told"] == told["disk"]
    (kind, path, source) = told["later"][0]  # type: ignore[index]
    assert (kind, source) == ("lost", "denied")
    assert os.path.basename(path) in ("hidden", "later")
    assert told["ignoring another's pid"] == "PermissionNeeded"
    assert told["who"] == "leave out who, or run as root"


def test_subvolumes_and_several_roots_for_a_user_without_privileges(tmp_path: Path) -> None:
    with mounted("btrfs", tmp_path) as top:
        run("btrfs", "-q", "subvolume", "create", str(top / "sv"))
        (top / "plain").mkdir()
        for path in (top, top / "plain", top / "sv"):
            path.chmod(0o777)
        for above in top.parents:
            above.chmod(above.stat().st_mode | 0o55)
        (top / "denied").mkdir(mode=0o700)
        said = child("several", top)
    for paths in ("denied", "plain+denied"):  # no root is left out without an error
        kind, text = said[paths]  # type: ignore[misc]
        assert kind == "PermissionNeeded"
        assert text.startswith(f"{top}/denied: ")
    assert said["sv"] == [["inode-marks"], [], True]
    kind, text = said["plain+sv"]  # type: ignore[misc]
    assert kind == "FilesystemRefuses"
    assert text.startswith(f"{top}/sv: ")
    assert "a watch of its own" in text
    assert said[""] == [["inode-marks"], [f"{top}/denied", f"{top}/sv"], True]


def test_the_limit_of_marks(open_to_all: Path) -> None:
    told = child("limit", open_to_all)
    assert told["at open"] == ["LimitReached", "fs.fanotify.max_user_marks"]


@pytest.mark.parametrize(
    ("rung", "limit", "sysctl"),
    [
        ("inode-marks", "max_fanotify_marks", "fs.fanotify.max_user_marks"),
        ("inotify", "max_inotify_watches", "fs.inotify.max_user_watches"),
    ],
)
def test_a_limit_reached_while_the_watch_runs(
    tmpfs: Path, rung: str, limit: str, sysctl: str
) -> None:
    # In a user namespace with a limit of its own: nobody else meets it.
    script = f'echo 7 > /proc/sys/user/{limit} && exec setpriv --bounding-set=-all "$@"'
    done = subprocess.run(
        [
            *("unshare", "--user", "--map-root-user", "sh", "-c", script, "sh"),
            *(sys.executable, "-m", "tests.kernel.rung_child", "limit_later", str(tmpfs), "0"),
        ],
        cwd=HERE.parents[2],
        env=os.environ | {"FANWISE_RUNG": rung},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["rung"] == rung
    assert told["sources"] == ["limit"]
    assert told["after"] is True
    assert told["again"] == sysctl
    made = {path for path in told["made"] if "/d" in path}
    assert made == {str(tmpfs / f"d{n}") for n in range(10)}  # each is told, marked or not
    assert set(told["silent"]) < made
    assert 0 < len(told["silent"]) < 10


def test_a_real_overflow_of_a_user_without_privileges(open_to_all: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.kernel.rung_child", "overflow", open_to_all, str(NOBODY)],
        cwd=HERE.parents[2],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)  # all its threads
            limit = int(Path("/proc/sys/fs/fanotify/max_queued_events").read_text())
            for number in range(limit + 1000):
                (open_to_all / f"f{number}").touch()
            process.send_signal(signal.SIGCONT)
            told = json.loads(process.communicate(timeout=100)[0])
        finally:
            process.kill()
    assert told == {"lost": ["kernel"], "after": True}


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS])
def test_inotify_where_a_filter_refuses_fanotify(tmpfs: Path, code: int) -> None:
    told = child(f"filtered:{code}", tmpfs, None)
    assert told["rung"] == "inotify"
    assert told["told"] == told["disk"]


def test_what_needs_a_pid_is_refused_where_there_is_none(
    tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FANWISE_RUNG", "inotify")
    for asked in ({"who": True}, {"ignore_pids": [os.getpid()]}):
        with pytest.raises(fanwise.PermissionNeeded, match="which process"):
            fanwise.watch(tmpfs, **asked).open()  # type: ignore[arg-type]
    monkeypatch.setenv("FANWISE_RUNG", "inode-marks")
    with watching(tmpfs, who=True) as r:  # with CAP_SYS_ADMIN they have pids
        write(tmpfs / "f")
        assert {c.process.name for c in r.told() if c.process} != set()
