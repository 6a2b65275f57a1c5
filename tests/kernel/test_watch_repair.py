"""Loss and repair: whatever is lost, a consumer ends with exactly the paths on disk."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import fanwise
from fanwise.kernel.handles import name_to_handle
from fanwise.sources import fanotify as source
from tests.kernel.losing import (
    LOSSES,
    PACE,
    TINY,
    Consumer,
    Storm,
    exchange,
    is_full,
    overflow,
    paced,
    rest_of,
    stormed,
    until_nothing_fits,
    until_paced,
)
from tests.kernel.watching import on_disk, scanned, watching, write


def relisted(told: list[fanwise.Change]) -> dict[str, tuple[str, ...]]:
    return {c.path: c.names for c in told if c.names is not None}


def kinds(told: list[fanwise.Change]) -> list[str]:
    return [c.kinds[0] for c in told if c.roots is not None]


@pytest.mark.parametrize(("how", "seed"), LOSSES)
def test_paths_told_are_those_on_disk(
    fs: Path, pure: bool, how: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stormed(fs, pure, how, seed, monkeypatch) as (watch, consumer):
        assert consumer.paths == on_disk(fs)
        # And every path is right from now on, in each directory.
        for base, _, _ in os.walk(fs):
            Path(base, "probe").touch()
        told = list(chain.from_iterable(rest_of(watch)))
        probes = {c.path for c in told if c.path.endswith("probe") and "created" in c.kinds}
        assert probes == {p for p in on_disk(fs) if p.endswith("probe")}
        assert {c.path_source for c in told} == {"exact"}


def test_only_what_was_hit_is_listed(tmpfs: Path, pure: bool) -> None:
    for name in ("hit", "quiet", "from/moved/below", "to"):
        (tmpfs / name).mkdir(parents=True)
    write(tmpfs / "from/moved/below/file")
    with watching(tmpfs, pure=pure, queue=TINY) as r:
        scanned(r)
        until_nothing_fits(r.watch, tmpfs / "hit")
        os.rename(tmpfs / "from/moved", tmpfs / "to/moved")
        assert r.watch._groups[0].source.drain.sync(20)  # it is discarded
        told = list(chain.from_iterable(rest_of(r.watch)))
        assert kinds(told) == ["lost", *["relisted"] * 5, "repaired"]
        assert relisted(told) == {
            str(tmpfs / "hit"): (),
            str(tmpfs / "from"): (),
            str(tmpfs / "to"): ("moved/",),
            str(tmpfs / "to/moved"): ("below/",),
            str(tmpfs / "to/moved/below"): ("file",),
        }
        assert told[-1].count == 5
        assert told[-1].roots == (str(tmpfs),)


def test_a_stop_relists_everything_that_is_watched(tmpfs: Path, pure: bool) -> None:
    for name in ("a/b", "out/of/it"):
        (tmpfs / name).mkdir(parents=True)
    with watching(tmpfs, pure=pure, exclude=["out", "*.tmp"]) as r:
        scanned(r)
        r.watch.pause()
        write(tmpfs / "a/x.tmp")
        os.symlink("nowhere", os.fsencode(tmpfs) + b"/a/\xff")
        r.watch.resume()
        told = list(chain.from_iterable(rest_of(r.watch)))
        assert relisted(told) == {
            str(tmpfs): ("a/",),
            str(tmpfs / "a"): ("b/", "\udcff"),
            str(tmpfs / "a/b"): (),
        }


def test_roots_that_are_not_trees(tmpfs: Path, pure: bool) -> None:
    (tmpfs / "flat/sub").mkdir(parents=True)
    (tmpfs / "other").mkdir()
    write(tmpfs / "other/file")
    write(tmpfs / "other/not this")
    with fanwise.watch(tmpfs / "flat", tmpfs / "other/file", recursive=False, pure=pure) as watch:
        watch.pause()
        write(tmpfs / "flat/new")
        watch.resume()
        told = list(chain.from_iterable(rest_of(watch)))
        assert relisted(told) == {
            str(tmpfs / "flat"): ("new", "sub/"),
            str(tmpfs / "other"): ("file",),
        }


def test_an_exchange_of_two_trees_in_what_was_lost(fs: Path, pure: bool) -> None:
    for name in ("a/x/one", "b/y/two", "hit"):
        (fs / name).mkdir(parents=True)
    consumer = Consumer(fs)
    consumer.paths = on_disk(fs)
    with fanwise.watch(fs, pure=pure, queue=TINY) as watch:
        consumer.settle(watch)
        until_nothing_fits(watch, fs / "hit")
        exchange(fs / "a", fs / "b/y")
        exchange(fs / "b/y/x", fs / "a/two")
        assert watch._groups[0].source.drain.sync(20)  # they are discarded
        consumer.settle(watch)
        assert consumer.lost
        assert consumer.paths == on_disk(fs)


# In a mount namespace of its own: what others mount meanwhile is work, too.
IDLE = """
import sys, time
import fanwise
from tests.kernel.test_watch_repair import kinds
where = sys.argv[1]
with fanwise.watch(
    where, pure=sys.argv[2] == "True", kinds=["created", "opened", "accessed"]
) as watch:
    while not watch.scanned:
        watch.read(0.01)
    watch.pause()
    watch.resume()
    told = []
    while "repaired" not in kinds(told):
        told += watch.read(1)
    # The listing raises opens and reads: none of them is told, none lists anything again.
    assert set(kinds(told)) == {"lost", "relisted", "repaired"}, told
    assert len(told) == len(kinds(told)), told
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


def test_a_directory_moved_onto_a_name_that_is_not_listed_yet(
    tmpfs: Path, pure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmpfs / "1/2/3/4/target"
    (target / "there/gone").mkdir(parents=True)
    (tmpfs / "moved/there").mkdir(parents=True)
    slow, listed = name_to_handle(os.fsencode(target.parent))[0], threading.Event()
    real = fanwise.kernel.native.parts(pure)

    def scan_dirs(fd: int, keys: Sequence[bytes], names: bool = False) -> Any:
        assert not (names and slow in keys) or listed.wait(20)
        return real.scan_dirs(fd, keys, names)

    parts = real._replace(scan_dirs=scan_dirs)
    monkeypatch.setattr(sys.modules["fanwise.watch._watch"], "parts", lambda _: parts)
    consumer = Consumer(tmpfs)
    consumer.paths = on_disk(tmpfs)
    with fanwise.watch(tmpfs, pure=pure) as watch:
        consumer.settle(watch)
        watch.pause()
        shutil.rmtree(target)
        watch.resume()
        try:
            while str(tmpfs / "moved/there") not in relisted(consumer.told):
                consumer.take(watch.read(1))
            os.rename(tmpfs / "moved", target)
            while "renamed" not in consumer.told[-1].kinds:
                consumer.take(watch.read(1))
        finally:
            listed.set()
        consumer.settle(watch)
        assert consumer.repaired
        assert consumer.paths == on_disk(tmpfs)


def test_what_was_queued_before_a_stop_is_told_before_it(
    tmpfs: Path, pure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    paced(pure, monkeypatch, PACE)
    (tmpfs / "a/below").mkdir(parents=True)
    consumer = Consumer(tmpfs)
    consumer.paths = on_disk(tmpfs)
    with fanwise.watch(tmpfs, pure=pure) as watch:
        consumer.settle(watch)
        until_paced(watch, tmpfs)
        os.rename(tmpfs / "a", tmpfs / "b")  # waits in the kernel
        watch.pause()
        os.rename(tmpfs / "b", tmpfs / "c")
        watch.resume()
        consumer.settle(watch)
        first = [c.kinds[0] for c in consumer.told if c.kinds[0] in ("renamed", "lost")]
        assert first == ["renamed", "lost"]
        assert consumer.paths == on_disk(tmpfs)


def test_a_move_behind_an_overflow_merged_into_one_before_it(
    ext4: Path, pure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_INIT", source._INIT & ~source.FAN_UNLIMITED_QUEUE)
    paced(pure, monkeypatch, PACE)
    a, b, away = ext4 / "a", ext4 / "b", ext4 / "away"
    (a / "below").mkdir(parents=True)
    away.mkdir()
    consumer = Consumer(ext4)
    consumer.paths = on_disk(ext4)
    with fanwise.watch(ext4, pure=pure) as watch:
        consumer.settle(watch)
        for _ in range(10):
            until_paced(watch, ext4)
            overflow(away, 12_000)
            os.rename(a, b)  # late: a merge is sought among the newest only
            overflow(away)
            if is_full(watch):
                break
            os.rename(b, a)  # the drain came in between
        # As if some had been read: there is room again.
        assert os.read(watch._groups[0].source.fd, 4096)
        os.rename(b, a)
        os.rename(a, b)  # goes into the first
        consumer.settle(watch)
        assert consumer.lost
        assert consumer.repaired
        assert consumer.paths == on_disk(ext4)
        write(b / "below/probe")
        told = list(chain.from_iterable(rest_of(watch)))
        assert {c.path for c in told} == {str(b / "below/probe")}
