"""What the tests of loss and repair share: storms, losses that are real, and a consumer."""

import array
import contextlib
import ctypes
import fcntl
import itertools
import os
import random
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fanwise
from fanwise import Change
from fanwise.kernel.libc import libc
from fanwise.sources import fanotify as source
from tests.kernel.watching import on_disk

RENAME_EXCHANGE = 2
TINY = 64 << 10  # the smallest ring
PACE = 10  # seconds for which a drain stays away from the kernel's queue, unless it is asked
LOSSES = [("ring", 1), ("ring", 2), ("stopped", 1), ("stopped", 2), ("kernel", 1)]


def exchange(a: Path | str, b: Path | str) -> None:
    """Let two names change places."""
    if libc.renameat2(-100, os.fsencode(a), -100, os.fsencode(b), RENAME_EXCHANGE) < 0:
        raise OSError(ctypes.get_errno(), "renameat2")


def paced(pure: bool, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Have drains let the kernel's queue fill for a while after each read."""
    real = fanwise.kernel.native.parts(pure)
    drain = lambda fd, ring: real.Drain(fd, ring, pace_ns=int(seconds * 1e9))  # noqa: E731
    parts = real._replace(Drain=drain)
    monkeypatch.setattr(sys.modules["fanwise.watch._watch"], "parts", lambda _: parts)


def until_paced(watch: fanwise.Watch, where: Path) -> None:
    """Return when a drain has begun to stay away from the queue."""
    drain = watch._groups[0].source.drain
    before, deadline = drain.stats()["paced"], time.monotonic() + 60
    pause = 0.0001
    while drain.stats()["paced"] == before:  # the first few reads are made at once
        assert time.monotonic() < deadline
        flood(where, 10)
        # It stays away from a queue that it has seen empty before, which takes it a while.
        time.sleep(pause)
        pause = min(pause * 2, 0.5)


class Consumer:
    """Knows the paths below a root from what it was told, and from nothing else."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.paths: set[str] = set()
        self.repaired = 0
        self.lost = 0
        self.told: list[Change] = []

    def _drop(self, path: str) -> None:
        self.paths = {p for p in self.paths if p != path and not p.startswith(path + "/")}

    def _drop_below(self, path: str) -> None:
        self.paths = {p for p in self.paths if not p.startswith(path + "/")}

    def take(self, changes: list[Change]) -> None:
        """Apply changes in their order."""
        self.told += changes
        for c in changes:
            if c.path_source == "unknown":
                continue  # in a directory that is nowhere any more
            if c.names is not None:
                self._relist(c.path, c.names)
            elif c.kinds == ("repaired",):
                self.repaired += 1
            elif c.kinds == ("lost",):
                self.lost += 1
            elif "renamed" in c.kinds and c.old_path is not None:
                old = c.old_path
                if not c.is_dir:  # a directory that was believed there went among what was lost
                    self._drop_below(old)
                moved = {p for p in self.paths if p == old or p.startswith(old + "/")}
                self.paths -= moved
                if c.path in self.paths and not any(p.startswith(c.path + "/") for p in self.paths):
                    self.paths.discard(c.path)
                self.paths |= {c.path + p[len(old) :] for p in moved} | {c.path}
                if "deleted" in c.kinds:
                    self._drop(c.path)
            elif "created" in c.kinds and "deleted" in c.kinds:
                if c.exists:
                    self.paths.add(c.path)
                else:
                    self._drop(c.path)
            elif "created" in c.kinds:
                self.paths.add(c.path)
            elif "deleted" in c.kinds:
                self._drop(c.path)

    def _relist(self, path: str, names: tuple[str, ...]) -> None:
        base = path.rstrip("/") + "/"
        here = {name.rstrip("/"): name.endswith("/") for name in names}
        self.paths = {
            p
            for p in self.paths
            if not p.startswith(base)
            or here.get(p[len(base) :].split("/")[0])
            or p[len(base) :] in here
        } | {base + name for name in here}

    def settle(self, watch: fanwise.Watch) -> None:
        """Read until all is told that was raised before, and no repair is on its way."""
        for rows in rest_of(watch):
            self.take(rows)


def rest_of(watch: fanwise.Watch) -> Iterator[list[Change]]:
    """Read until all is told that was raised before, and no repair is on its way."""
    deadline, empty = time.monotonic() + 60, False
    while True:
        rows = watch.read(0.1)
        if rows or not watch.scanned:
            empty = False
            yield rows
        elif empty:
            return
        else:  # a drain may be late, or stay away on purpose
            empty = all(group.empty(20) for group in watch._groups)
        assert time.monotonic() < deadline, "it does not come to rest"


class Storm:
    """Random changes below a root: everything that makes, moves and removes names."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.count = 0

    def _dirs(self) -> list[str]:
        return [base for base, _, _ in os.walk(self.root)]

    def _names(self) -> list[str]:
        return [
            os.path.join(base, name)
            for base, dirs, files in os.walk(self.root)
            for name in dirs + files
        ]

    def step(self) -> None:
        """Do one thing; what the filesystem refuses is not done."""
        with contextlib.suppress(OSError):
            self._do(self.random.randrange(11))

    def _do(self, what: int) -> None:
        pick = self.random.choice
        dirs, names = self._dirs(), self._names()
        new = os.path.join(pick(dirs), f"n{self.random.randrange(12)}")
        if what < 3 or not names:
            os.mkdir(new)
        elif what < 5:
            with open(new, "a") as file:
                file.write("x")
        elif what == 5:
            name = pick(names)
            os.rmdir(name) if os.path.isdir(name) else os.unlink(name)
        elif what < 10:
            os.rename(pick(names), pick([new, pick(names)]))
        else:
            os.link(pick(names), new)

    def steps(self, count: int) -> None:
        """Do several."""
        for _ in range(count):
            self.step()


def overflow(directory: Path, count: int = 18_000) -> None:
    """Fill the kernel's queue, at one record a call: none of them merges with another."""
    names = [os.fspath(directory / f"flood{i}") for i in range(count)]
    os.mknod(names[0])
    for old, new in itertools.pairwise(names):
        os.rename(old, new)
    os.unlink(names[-1])


def flood(directory: Path, count: int = 700) -> None:
    """Fill the smallest ring: records of names that are gone afterwards."""
    for i in range(count):
        path = directory / f"flood{i}"
        path.touch()
        path.unlink()


def until_nothing_fits(watch: fanwise.Watch, where: Path) -> None:
    """Fill the ring of a watch that is not read, so that what follows is lost, however small."""
    drain, full = watch._groups[0].source.drain, 0
    before = at_first = drain.stats()["lost"]
    while full < 20:
        flood(where, 100 if before == at_first else 1)
        assert drain.sync(10)
        lost = drain.stats()["lost"]
        full, before = (full + 1 if lost > before else 0), lost


def is_full(watch: fanwise.Watch) -> bool:
    """Whether the kernel's queue has no room, and something was lost for it."""
    size = array.array("i", [0])
    fcntl.ioctl(watch._groups[0].source.fd, termios.FIONREAD, size)
    limit = int(Path("/proc/sys/fs/fanotify/max_queued_events").read_text())
    return size[0] // 24 > limit  # as FIONREAD counts; the overflow has a place of its own


def until_full(watch: fanwise.Watch, fill: Callable[[], None]) -> None:
    """Fill it; on a machine that has much to do the drain may come in between."""
    for _ in range(30):
        fill()
        if is_full(watch):
            return
    raise AssertionError("the kernel's queue is never full")


@contextlib.contextmanager
def stormed(
    fs: Path, pure: bool, how: str, seed: int, monkeypatch: pytest.MonkeyPatch, index: bool = False
) -> Iterator[tuple[fanwise.Watch, Consumer]]:
    """Storms with losses of one kind, see LOSSES; a watch at rest after them, and its consumer."""
    storm = Storm(fs, seed)
    storm.steps(40)
    consumer = Consumer(fs)
    consumer.paths = on_disk(fs)
    if how == "kernel":
        monkeypatch.setattr(source, "_INIT", source._INIT & ~source.FAN_UNLIMITED_QUEUE)
        paced(pure, monkeypatch, PACE)
    size = TINY if how == "ring" else 256 << 20
    with fanwise.watch(fs, pure=pure, queue=size, index=index) as watch:
        if index:
            consumer.settle(watch)  # before a loss: the baseline is complete
        for round_ in range(1 if how == "kernel" else 6):
            storm.steps(30)
            away = fs / f"away{round_}"
            away.mkdir()
            if how == "ring":
                flood(away)
            elif how == "stopped":
                watch.pause()
            else:
                until_full(watch, lambda: overflow(away))  # noqa: B023
            storm.steps(30)
            if how == "stopped":
                watch.resume()
            # Live changes, and in later rounds another loss, while it is repaired.
            for _ in range(storm.random.randrange(8)):
                consumer.take(watch.read(0))
                storm.steps(3)
        consumer.settle(watch)
        assert consumer.lost
        assert consumer.repaired
        yield watch, consumer
