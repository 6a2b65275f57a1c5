"""The index: after any loss the changes told lead to exactly the paths on disk."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fanwise
from tests.kernel.conftest import mounted, run
from tests.kernel.losing import LOSSES, Consumer, Storm, exchange, stormed
from tests.kernel.watching import on_disk, short, watching, write


def of_repair(told: list[fanwise.Change]) -> list[fanwise.Change]:
    """What was told between the last loss and its repair."""
    out: list[fanwise.Change] = []
    for change in told:
        if change.source is not None:
            out = []
        elif change.kinds == ("repaired",):
            assert change.count == len(out)
        elif change.pid == 0:
            out.append(change)
    return out


# What these storms found has a test of its own each in test_watch_believed.py.
@pytest.mark.parametrize(("how", "seed"), LOSSES)
def test_paths_told_are_those_on_disk(
    fs: Path, pure: bool, how: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stormed(fs, pure, how, seed, monkeypatch, index=True) as (watch, consumer):
        assert consumer.paths == on_disk(fs)
        assert not [c for c in consumer.told if c.names is not None]
        # What is told of nothing is nothing, when all is known.
        watch.pause()
        watch.resume()
        consumer.settle(watch)
        watch.pause()
        watch.resume()
        told = len(consumer.told)
        consumer.settle(watch)
        assert of_repair(consumer.told[told:]) == []
        assert watch.names == len(on_disk(fs))


def stopped(watch: fanwise.Watch, change: Callable[[], object]) -> list[fanwise.Change]:
    """What is told of changes that are made while the marks are gone."""
    while not watch.scanned:
        watch.read(0.01)
    while watch.read(0.1):
        pass
    watch.pause()
    change()
    watch.resume()
    told: list[fanwise.Change] = []
    while not any(c.kinds == ("repaired",) for c in told):
        told += watch.read(1)
    assert not watch.read(0.2)
    return told


def test_the_difference(fs: Path, pure: bool) -> None:
    for name in ("a/below/deep", "b", "gone/sub"):
        (fs / name).mkdir(parents=True)
    for name in ("keep", "written", "chmod", "replaced", "a/below/file", "gone/sub/f", "same size"):
        write(fs / name)
    os.link(fs / "keep", fs / "b/link")

    def change() -> None:
        write(fs / "written", "more")
        times = os.stat(fs / "same size")
        write(fs / "same size", "y")
        os.utime(fs / "same size", ns=(times.st_atime_ns, times.st_mtime_ns))
        os.chmod(fs / "chmod", 0o600)
        write(fs / "other").rename(fs / "replaced")
        os.rename(fs / "a/below", fs / "b/moved")
        write(fs / "b/moved/deep/made")
        for name in ("gone/sub/f", "gone/sub", "gone"):
            os.rmdir(fs / name) if (fs / name).is_dir() else os.unlink(fs / name)
        (fs / "new/sub").mkdir(parents=True)
        write(fs / "new/sub/f")

    with fanwise.watch(fs, pure=pure, index=True) as watch:
        told = of_repair(stopped(watch, change))
        assert {c.identity for c in told if "renamed" in c.kinds} == {
            fanwise.identity(fs / "b/moved")
        }
        order = short(told, fs)
        inferred = {os.path.relpath(c.path, fs): c.kinds for c in told if c.inferred}
        assert inferred.pop("written") == ("modified",)
        assert inferred.pop("chmod") == ("attributes",)
        assert inferred.pop("same size") == ("attributes",)
        names = [each for each in order if not {"modified", "attributes"} & set(each[0].split("+"))]
        assert sorted(names, key=str) == sorted(
            [
                ("renamed", "b/moved", "a/below"),
                ("created", "b/moved/deep/made", None),
                ("deleted", "replaced", None),
                ("created", "replaced", None),
                ("deleted", "gone/sub/f", None),
                ("deleted", "gone/sub", None),
                ("deleted", "gone", None),
                ("created", "new", None),
                ("created", "new/sub", None),
                ("created", "new/sub/f", None),
            ],
            key=str,
        )
        for first, second in (
            ("gone/sub/f", "gone/sub"), ("gone/sub", "gone"), ("new", "new/sub"),
            ("new/sub", "new/sub/f"), ("b/moved", "b/moved/deep/made"),
        ):  # fmt: skip
            at = [path for _, path, _ in names]
            assert at.index(first) < at.index(second)
        assert of_repair(stopped(watch, lambda: None)) == []


def test_every_file_that_changed_in_a_loss_is_told_modified(fs: Path, pure: bool) -> None:
    for number in range(50):
        write(fs / f"f{number}")
    with fanwise.watch(fs, pure=pure, index=True) as watch:
        for _ in range(3):  # those that changed before, live, are told again

            def change() -> None:
                for number in range(0, 50, 2):
                    write(fs / f"f{number}", "changed")

            told = of_repair(stopped(watch, change))
            found = {c.path for c in told if c.inferred and c.kinds == ("modified",)}
            assert found >= {str(fs / f"f{number}") for number in range(0, 50, 2)}
            for number in range(1, 50, 2):
                write(fs / f"f{number}", "live")


def test_circles_of_directories(fs: Path, pure: bool) -> None:
    for name in ("a/x/one", "b/y/two", "c/z"):
        (fs / name).mkdir(parents=True)
    for name in ("a/1", "b/2", "c/3", "a/x/one/f"):
        write(fs / name)
    consumer = Consumer(fs)
    consumer.paths = on_disk(fs)

    def change() -> None:
        exchange(fs / "a", fs / "b/y")
        exchange(fs / "b/y/x", fs / "a/two")
        exchange(fs / "b", fs / "c")
        os.rename(fs / "a", fs / "b/z/inner")

    with fanwise.watch(fs, pure=pure, index=True) as watch:
        consumer.take(stopped(watch, change))
        assert consumer.paths == on_disk(fs)


def test_a_loss_before_the_first_scan_ended(tmpfs: Path, pure: bool) -> None:
    write(tmpfs / "there")
    with fanwise.watch(tmpfs, pure=pure, index=True) as watch:
        watch.pause()
        write(tmpfs / "new")
        watch.resume()
        told: list[fanwise.Change] = []
        while not watch.scanned:
            told += watch.read(0.1)
        marks = [(c.kinds[0], c.baseline) for c in told if c.roots is not None]
        assert marks == [("lost", "incomplete"), ("repaired", "incomplete")]
        assert of_repair(told) == []
        told = stopped(watch, lambda: os.unlink(tmpfs / "there"))
        assert [c.baseline for c in told if c.roots is not None] == [None, None]
        assert short(of_repair(told), tmpfs) == [("deleted", "there", None)]


def test_what_is_not_watched_is_not_told(tmpfs: Path, pure: bool) -> None:
    (tmpfs / "root/flat").mkdir(parents=True)
    (tmpfs / "root/left.tmp").mkdir()
    (tmpfs / "outside").mkdir()
    write(tmpfs / "outside/file")

    def change() -> None:
        write(tmpfs / "root/left.tmp/x")
        write(tmpfs / "root/x.tmp")
        write(tmpfs / "outside/file", "more")
        write(tmpfs / "outside/another")
        write(tmpfs / "root/y")

    with fanwise.watch(
        tmpfs / "root", tmpfs / "outside/file", exclude=["*.tmp"], pure=pure, index=True
    ) as watch:
        told = of_repair(stopped(watch, change))
        assert sorted(short(told, tmpfs)) == [
            ("created", "root/y", None), ("modified", "outside/file", None)
        ]  # fmt: skip
    with fanwise.watch(tmpfs / "root", recursive=False, pure=pure, index=True) as watch:

        def flat() -> None:
            write(tmpfs / "root/flat/deep")
            write(tmpfs / "root/z")

        told = of_repair(stopped(watch, flat))
        assert short([c for c in told if not c.is_dir], tmpfs) == [("created", "root/z", None)]


def test_what_moves_in_and_out_is_indexed(tmpfs: Path, pure: bool) -> None:
    for name in ("root", "out/in/sub"):
        (tmpfs / name).mkdir(parents=True)
    write(tmpfs / "out/in/sub/f")
    with watching(tmpfs / "root", pure=pure, index=True, kinds=["created", "deleted"]) as r:
        assert stopped(r.watch, lambda: None)
        before = r.watch.names
        os.rename(tmpfs / "out/in", tmpfs / "root/in")
        assert short(r.told(), tmpfs) == [("created", "root/in", None)]
        told = of_repair(stopped(r.watch, lambda: os.unlink(tmpfs / "root/in/sub/f")))
        assert short(told, tmpfs) == [("deleted", "root/in/sub/f", None)]
        assert r.watch.names == before + 2
        os.rename(tmpfs / "root/in", tmpfs / "out/in")
        assert short(r.told(), tmpfs) == [("deleted", "root/in", None)]
        assert r.watch.names == before
        assert r.watch.stats()["index_names"] == before


def test_a_deleted_subvolume_tells_its_files(tmp_path: Path, pure: bool) -> None:
    with mounted("btrfs", tmp_path) as point:
        run("btrfs", "subvolume", "create", str(point / "sub"))
        (point / "sub/d").mkdir()
        write(point / "sub/f")
        write(point / "sub/d/g")
        with watching(point, pure=pure, index=True, kinds=["created", "deleted"]) as r:
            stopped(r.watch, lambda: None)
            write(point / "sub/live")
            os.unlink(point / "sub/f")
            run("btrfs", "subvolume", "delete", str(point / "sub"))
            told = [each for each in short(r.told(), point) if each[0] == "deleted"]
            assert sorted(told) == sorted(
                ("deleted", name, None) for name in ("sub/f", "sub/d/g", "sub/d", "sub/live", "sub")
            )
            assert r.watch.names == 0


# In a mount namespace of its own: what others mount meanwhile is work, too.
IDLE = """
import sys, time
from pathlib import Path
import fanwise
from tests.kernel.test_watch_index import stopped
from tests.kernel.watching import write
where = Path(sys.argv[1])
with fanwise.watch(where, pure=sys.argv[2] == "True", index=True) as watch:
    stopped(watch, lambda: write(where / "one"))
    seconds = []
    for _ in range(5):
        before = time.process_time()
        assert watch.read(1) == []
        seconds.append(time.process_time() - before)
print(min(seconds))
"""


def test_no_work_is_left_when_it_is_repaired(tmpfs: Path, pure: bool) -> None:
    Storm(tmpfs, 3).steps(200)
    idle = [sys.executable, "-c", IDLE, str(tmpfs), str(pure)]
    argv = ["unshare", "--mount", "--propagation", "private", *idle]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.01, "1 % of a core"
