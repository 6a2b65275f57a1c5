"""What is told of single changes, on every filesystem and with both implementations."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fanwise
from tests.kernel.losing import paced, rest_of, until_paced
from tests.kernel.watching import on_disk, replay, scanned, short, watching, write

libc = ctypes.CDLL(None, use_errno=True)
RENAME_EXCHANGE = 2


def exchange(a: Path, b: Path) -> None:
    """Exchange two names."""
    assert libc.renameat2(-100, os.fsencode(a), -100, os.fsencode(b), RENAME_EXCHANGE) == 0


def link_descriptor(fd: int, path: Path) -> None:
    """Give a name to an O_TMPFILE file."""
    source = f"/proc/self/fd/{fd}".encode()
    assert libc.linkat(-100, source, -100, os.fsencode(path), 0x400) == 0


def test_each_kind(fs: Path, pure: bool) -> None:
    with watching(fs, pure=pure) as r:
        f = write(fs / "f")
        told = r.told()
        assert {c.path for c in told} == {str(f)}
        assert {k for c in told for k in c.kinds} == {"created", "modified", "written"}
        f.rename(fs / "g")
        assert short(r.told(), fs) == [("renamed", "g", "f")]
        (fs / "g").chmod(0o600)
        assert short(r.told(), fs) == [("attributes", "g", None)]
        os.utime(fs / "g")
        assert short(r.told(), fs) == [("attributes", "g", None)]
        (fs / "g").unlink()
        assert short(r.told(), fs) == [("deleted", "g", None)]
        (fs / "d").mkdir()
        (change,) = r.told()
        assert (change.kinds, change.is_dir, change.pid) == (("created",), True, os.getpid())
        (fs / "d").chmod(0o700)
        assert short(r.told(), fs) == [("attributes", "d", None)]
        (fs / "d").rename(fs / "e")
        assert short(r.told(), fs) == [("renamed", "e", "d")]
        (fs / "e").rmdir()
        assert short(r.told(), fs) == [("deleted", "e", None)]


def test_xattr_and_truncate(ext4: Path, pure: bool) -> None:
    f = write(ext4 / "f", "xyz")
    with watching(ext4, pure=pure) as r:
        os.setxattr(f, "user.t", b"1")
        assert short(r.told(), ext4) == [("attributes", "f", None)]
        os.truncate(f, 1)
        kinds = {k for c in r.told() for k in c.kinds}
        assert "modified" in kinds


def test_link_counts_alone_are_not_told(fs: Path, pure: bool) -> None:
    f = write(fs / "f")
    with watching(fs, pure=pure) as r:
        os.link(f, fs / "g")
        assert short(r.told(), fs) == [("created", "g", None)]
        f.unlink()
        assert short(r.told(), fs) == [("deleted", "f", None)]
        (fs / "g").chmod(0o600)
        assert short(r.told(), fs) == [("attributes", "g", None)]


def test_identity_joins_names_of_one_object(fs: Path, pure: bool) -> None:
    f = write(fs / "f")
    with watching(fs, pure=pure) as r:
        os.link(f, fs / "g")
        write(f, "more")
        told = r.told()
        assert {c.identity for c in told} == {fanwise.identity(fs / "g")}
        f.rename(fs / "h")
        (fs / "d").mkdir()
        told = r.told()
        assert [c.identity for c in told] == [
            fanwise.identity(fs / "h"),
            fanwise.identity(fs / "d"),
        ]


def test_replaced(fs: Path, pure: bool) -> None:
    victim = write(fs / "y")
    gone = fanwise.identity(victim)
    with watching(fs, pure=pure) as r:
        write(fs / "x").rename(victim)
        renamed = r.told()[-1]
        assert (renamed.kinds, renamed.replaced) == (("renamed",), gone)
        # Again, all unread: the victim was itself renamed into place in this window.
        middle = fanwise.identity(victim)
        write(fs / "x").rename(victim)
        write(fs / "x").rename(victim)
        renames = [c for c in r.told() if "renamed" in c.kinds]
        assert renames[0].replaced == middle
        assert renames[1].replaced == renames[0].identity
        # An unlink after a rename is not a victim.
        write(fs / "z")
        r.told()
        victim.rename(fs / "q")
        (fs / "z").unlink()
        assert [c.replaced for c in r.told()] == [None, None]


def test_replaced_directory(fs: Path, pure: bool) -> None:
    (fs / "a").mkdir()
    (fs / "b").mkdir()
    gone = fanwise.identity(fs / "b")
    with watching(fs, pure=pure) as r:
        scanned(r)
        (fs / "a").rename(fs / "b")
        write(fs / "b" / "f")
        told = r.told()
        assert short(told, fs)[0] == ("renamed", "b", "a")
        assert told[0].replaced == gone
        assert {c.path for c in told[1:]} == {str(fs / "b/f")}


def test_exchanges_can_be_replayed(fs: Path, pure: bool) -> None:
    """By the rule in the guarantees, also of trees with the same names in them, in one window."""
    for path in ("a/x", "b/x", "b/y/z", "c/x"):
        (fs / path).mkdir(parents=True)
    write(fs / "f")
    write(fs / "g")
    before = on_disk(fs)
    with watching(fs, pure=pure) as r:
        scanned(r)
        for one, two in (("f", "g"), ("a", "b"), ("f", "c"), ("a/y", "b/x"), ("b", "f")):
            exchange(fs / one, fs / two)
        write(fs / "f" / "new")
        told = r.told()
    assert replay(told, before) == on_disk(fs)
    renamed = [c for c in told if "renamed" in c.kinds]
    assert len(renamed) == 10
    for one, two in zip(renamed[::2], renamed[1::2], strict=True):
        assert (one.path, one.old_path) == (two.old_path, two.path)
        assert one.identity != two.identity


def test_exchange_replaces_nothing(fs: Path, pure: bool) -> None:
    write(fs / "a")
    (fs / "b").mkdir()
    with watching(fs, pure=pure) as r:
        scanned(r)
        exchange(fs / "a", fs / "b")
        write(fs / "a" / "in")
        told = r.told()
        assert short(told, fs)[:2] == [("renamed", "b", "a"), ("renamed", "a", "b")]
        assert [c.replaced for c in told[:2]] == [None, None]
        assert {c.path for c in told[2:]} == {str(fs / "a/in")}


def test_unlinked(fs: Path, pure: bool) -> None:
    with watching(fs, pure=pure) as r, open(fs / "f", "w") as file:
        (fs / "f").unlink()
        assert r.told()[-1].kinds[-1] == "deleted"
        for _ in range(2):  # in the same window and in later ones
            file.write("x")
            file.flush()
            told = r.told()
            assert [(c.path, c.unlinked) for c in told] == [(str(fs / "f"), True)]
        # The name comes back as another file: that one is not unlinked.
        write(fs / "f")
        told = r.told()
        assert told
        assert not any(c.unlinked for c in told)
        file.write("y")
        file.flush()
        assert [c.unlinked for c in r.told()] == [True]


def test_unlinked_victim_of_a_rename(fs: Path, pure: bool) -> None:
    with watching(fs, pure=pure) as r, open(fs / "f", "w") as file:
        write(fs / "g").rename(fs / "f")
        r.told()
        file.write("x")
        file.flush()
        told = r.told()
        assert [(c.path, c.unlinked) for c in told] == [(str(fs / "f"), True)]


def test_unlinked_is_bounded_by_open_files(tmpfs: Path, pure: bool) -> None:
    first = write(tmpfs / "first")
    with watching(tmpfs, pure=pure) as r, open(tmpfs / "held", "w") as held:
        for i in range(6000):  # links of an object that lives on are no open files
            os.link(first, tmpfs / f"l{i}")
            (tmpfs / f"l{i}").unlink()
            write(tmpfs / f"t{i}").unlink()
        (tmpfs / "held").unlink()
        r.told()
        gone = r.watch._groups[0].resolver.settler.gone
        assert len(gone) <= 4096
        held.write("x")
        held.flush()
        assert [c.unlinked for c in r.told()] == [True]


def test_tmpfile(fs: Path, pure: bool) -> None:
    real = write(fs / "#12345")
    with watching(fs, pure=pure) as r:
        fd = os.open(fs, os.O_TMPFILE | os.O_RDWR)
        try:
            os.write(fd, b"x")
            assert r.told() == []
            link_descriptor(fd, fs / "linked")
            assert short(r.told(), fs) == [("created", "linked", None)]
            os.write(fd, b"y")
            assert short(r.told(), fs) == [("modified", "linked", None)]
        finally:
            os.close(fd)
        r.told()
        write(real, "more")
        told = r.told()
        assert {c.path for c in told} == {str(real)}
        assert "modified" in {k for c in told for k in c.kinds}


def test_exists(tmpfs: Path, pure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    paced(pure, monkeypatch, 10)  # only a merged record leaves the order open
    (tmpfs / "d").mkdir()
    first = write(tmpfs / "first")
    with watching(tmpfs, pure=pure) as r:
        until_paced(r.watch, tmpfs / "d")
        write(tmpfs / "short").unlink()
        os.link(first, tmpfs / "l")
        (tmpfs / "l").unlink()
        os.link(first, tmpfs / "l")
        told = [c for rows in rest_of(r.watch) for c in rows]
    both = {c.path: c.exists for c in told if {"created", "deleted"} <= set(c.kinds)}
    assert {path: both[path] for path in both if "/d/" not in path} == {
        str(tmpfs / "short"): False,
        str(tmpfs / "l"): True,
    }


def test_names(fs: Path, pure: bool) -> None:
    names = [b"\xff\xfe raw", b"new\nline", b"esc\x1b[31m", b"n" * 255, b"sp ace", "ü€".encode()]
    with watching(fs, pure=pure) as r:
        for name in names:
            directory = os.fsencode(fs) + b"/" + name
            os.mkdir(directory)
            with open(directory + b"/f" + name[:200], "w"):
                pass
        told = {os.fsencode(c.path) for c in r.told()}
        want = {os.fsencode(fs) + b"/" + n for n in names}
        pairs = zip(sorted(want), sorted(names), strict=True)
        assert told == want | {w + b"/f" + n[:200] for w, n in pairs}


def test_deeper_than_path_max(fs: Path, pure: bool) -> None:
    depth = 1000
    here = os.open(fs, os.O_RDONLY)
    for i in range(depth):
        name = f"level{i}"
        os.mkdir(name, dir_fd=here)
        inner = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    deep = str(fs) + "".join(f"/level{i}" for i in range(depth))
    assert len(deep) > 8192
    try:
        with watching(fs, pure=pure) as r:  # at once: the place is found by opening it
            os.close(os.open("first", os.O_CREAT | os.O_WRONLY, dir_fd=here))
            told = r.told()
            assert {(c.path, c.path_source) for c in told} == {(deep + "/first", "exact")}
            scanned(r)
            os.rename(fs / "level0", fs / "top")
            os.close(os.open("second", os.O_CREAT | os.O_WRONLY, dir_fd=here))
            moved = str(fs) + "/top" + deep[len(str(fs)) + len("/level0") :]
            assert r.told()[-1].path == moved + "/second"
    finally:
        os.close(here)
        subprocess.run(["rm", "-rf", *map(str, fs.iterdir())], check=True)


def test_kinds_by_request(tmpfs: Path, pure: bool) -> None:
    f = write(tmpfs / "f")
    with watching(tmpfs, kinds=["created", "deleted"], pure=pure) as r:
        write(tmpfs / "g")
        write(f, "more")
        (tmpfs / "g").rename(tmpfs / "h")
        (tmpfs / "h").unlink()
        told = r.told()
        assert {k for c in told for k in c.kinds} == {"created", "deleted"}


def test_ignore_pids(tmpfs: Path, pure: bool) -> None:
    with watching(tmpfs, ignore_pids=[os.getpid()], pure=pure) as r:
        write(tmpfs / "mine")
        (tmpfs / "mydir").mkdir()
        child = [sys.executable, "-c", f"open({str(tmpfs / 'mydir/theirs')!r}, 'w').close()"]
        with subprocess.Popen(child) as process:
            process.wait()
        changes = r.watch.read(10)
        # Not told, but known: the directory has its name.
        assert {(c.path, c.pid) for c in changes} == {(str(tmpfs / "mydir/theirs"), process.pid)}


@pytest.mark.parametrize(
    ("glob", "hidden"),
    [
        ("skip", {"skip", "skip/f", "keep/skip", "keep/skip/f"}),
        ("*.tmp", {"a.tmp", "keep/b.tmp"}),
        ("keep/skip", {"keep/skip", "keep/skip/f"}),
        ("**/f", {"skip/f", "keep/skip/f", "keep/f"}),
        ("/{root}/keep", {"keep", "keep/f", "keep/skip", "keep/skip/f", "keep/b.tmp"}),
    ],
)
def test_exclude(tmpfs: Path, pure: bool, glob: str, hidden: set[str]) -> None:
    (tmpfs / "skip").mkdir()
    everything = {"a.tmp", "skip/f", "keep", "keep/f", "keep/skip", "keep/skip/f", "keep/b.tmp"}
    glob = glob.replace("/{root}", str(tmpfs))
    with watching(tmpfs, exclude=[glob], pure=pure) as r:
        scanned(r)
        (tmpfs / "keep/skip").mkdir(parents=True)
        for name in sorted(everything - {"keep", "keep/skip"}):
            write(tmpfs / name)
        told = {path for _, path, _ in short(r.told(), tmpfs)}
        assert told == everything - hidden


def test_exclude_and_renames(tmpfs: Path, pure: bool) -> None:
    (tmpfs / "skip").mkdir()
    with watching(tmpfs, exclude=["skip", "*.tmp"], pure=pure) as r:
        write(tmpfs / "f.tmp").rename(tmpfs / "f")
        assert short(r.told(), tmpfs) == [("created", "f", None)]
        (tmpfs / "f").rename(tmpfs / "f.tmp")
        assert short(r.told(), tmpfs) == [("deleted", "f", None)]
        (tmpfs / "skip/in").mkdir()
        write(tmpfs / "skip/in/f")
        (tmpfs / "skip").rename(tmpfs / "open")  # what is in it is told from now on
        assert short(r.told(), tmpfs) == [("created", "open", None)]
        write(tmpfs / "open/in/f", "more")
        assert {p for _, p, _ in short(r.told(), tmpfs)} == {"open/in/f"}
        (tmpfs / "open").rename(tmpfs / "skip")
        write(tmpfs / "skip/in/f", "again")
        assert short(r.told(), tmpfs) == [("deleted", "open", None)]


def test_not_recursive(tmpfs: Path, pure: bool) -> None:
    (tmpfs / "d").mkdir()
    with watching(tmpfs, recursive=False, pure=pure) as r:
        write(tmpfs / "d/f")
        write(tmpfs / "f")
        (tmpfs / "e").mkdir()
        write(tmpfs / "e/f")
        (tmpfs / "d/f").rename(tmpfs / "g")
        told = short(r.told(), tmpfs)
        assert {path for _, path, _ in told} == {"f", "e", "g"}
        assert told[-1] == ("created", "g", None)


def test_no_stale_open_after_deleted(tmpfs: Path) -> None:
    """Whoever receives DELETED can no longer open the old object by that name."""
    target = tmpfs / "f"
    with watching(tmpfs) as r:
        for _ in range(300):
            write(target)
            old = fanwise.identity(target)
            target.unlink()
            if any("deleted" in c.kinds for c in r.watch.read(10)) and target.exists():
                assert fanwise.identity(target) != old


def test_identity_outlives_reuse_of_an_inode_number(fs: Path) -> None:
    seen: dict[int, str] = {}
    reused = 0
    for i in range(200):
        f = write(fs / f"f{i}")
        inode, identity = f.stat().st_ino, fanwise.identity(f)
        if inode in seen:
            reused += 1
            assert seen[inode] != identity
        seen[inode] = identity
        assert fanwise.identity(str(f)) == identity
        with open(f) as file:
            assert fanwise.identity(file.fileno()) == identity
        f.unlink()
    assert len(set(seen.values())) == len(seen)
    if fs.name.startswith(("ext4", "xfs")):
        assert reused, "this filesystem reuses inode numbers, and the test did not see it"


def test_identity_in_a_btrfs_subvolume(tmp_path: Path, pure: bool) -> None:
    from tests.kernel.conftest import mounted, run

    with mounted("btrfs", tmp_path) as point:
        run("btrfs", "subvolume", "create", str(point / "sub"))
        assert (point / "sub").stat().st_dev != point.stat().st_dev
        with watching(point, pure=pure) as r:
            write(point / "sub/f")
            write(point / "f")
            told = {c.path: c.identity for c in r.told()}
        names = [point / "sub/f", point / "f"]
        assert told == {str(n): fanwise.identity(n) for n in names}
        assert len({i.split("/")[0] for i in told.values() if i}) == 1


def test_two_filesystems(tmp_path: Path, pure: bool) -> None:
    from tests.kernel.conftest import mounted

    with (
        mounted("tmpfs", tmp_path) as a,
        mounted("ext4", tmp_path) as b,
        watching(a, b, pure=pure) as r,
    ):
        assert {root.fstype for root in r.watch.roots} == {"tmpfs", "ext4"}
        write(b / "f")
        seen: set[str] = set()
        while str(b / "f") not in seen:
            seen |= {c.path for c in r.watch.read(10)}
        write(a / "g")
        assert {c.path for c in r.told()} - seen == {str(a / "g")}


def test_what_would_be_told(tmpfs: Path) -> None:
    with fanwise.watch(tmpfs, exclude=["*.tmp", "d/e"]) as watch:
        told = ["f", "d/f", "d", "x/d/e"]
        for name in (*told, "a.tmp", "a.tmp/f", "d/e", "d/e/f", ".."):
            assert watch.tells(os.path.normpath(tmpfs / name)) == (name in told)
