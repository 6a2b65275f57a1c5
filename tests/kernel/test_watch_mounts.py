"""Mounts that come, go, move and are covered while a watch runs; and how a watch's parts end."""

import errno
import importlib
import inspect
import os
import re
import select
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

import fanwise
from fanwise import Change
from fanwise.cli._signals import Signals
from fanwise.kernel.mounts import mount_of
from tests.kernel.conftest import loop_device, mounted, run, unmount
from tests.kernel.watching import scanned, short, watching, write

# The package's attribute of that name is a function.
_watch = importlib.import_module("fanwise.watch._watch")
_mounts = importlib.import_module("fanwise.sources.mounts")


def until(watch: fanwise.Watch, path: Path, kind: str = "created") -> list[Change]:
    """Read until a change is told; as long as something comes it may take its time."""
    out: list[Change] = []
    while not any(c.path == str(path) and kind in c.kinds for c in out):
        rows = watch.read(20)
        assert rows, out[-5:]
        out += rows
    return out


def rest(watch: fanwise.Watch) -> list[Change]:
    """Everything up to the end of a watch that ends."""
    out: list[Change] = []
    deadline = time.monotonic() + 20
    while not watch.ended:
        assert time.monotonic() < deadline, out[-5:]
        out += watch.read(1)
    return out


@contextmanager
def _over(point: Path) -> Iterator[None]:
    run("mount", "-t", "tmpfs", "over", str(point))
    try:
        yield
    finally:
        unmount(point)


@pytest.fixture(params=[True, False], ids=["unique", "no-unique"])
def unique(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With and without the mount ids that are never reused, as before Linux 6.8."""
    if not request.param:
        real = _mounts.mounts
        monkeypatch.setattr(
            _mounts, "mounts", lambda fd=-1: [mount._replace(unique_id=None) for mount in real(fd)]
        )
    return bool(request.param)


@contextmanager
def _device(where: Path) -> Iterator[tuple[str, Path]]:
    image, point = where / "image", where / "mnt"
    point.mkdir()
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    with loop_device(image) as device:
        run("mkfs.ext4", "-q", device)
        run("mount", device, str(point))
        try:
            yield device, point
        finally:
            if os.path.ismount(point):
                unmount(point)


# -- gone --


def test_unmounted_and_mounted_again_between_two_reads(
    tmp_path: Path, pure: bool, unique: bool
) -> None:
    """The kernel gives the new mount the old one's id, and the device is the same."""
    with _device(tmp_path) as (device, point), watching(point, pure=pure) as r:
        scanned(r)
        with mounted("tmpfs", tmp_path):  # mounts change, this one does not
            assert r.watch.read(0.05) == []
        assert not r.watch.ended
        unmount(point)
        run("mount", device, str(point))
        assert [(c.kinds, c.path) for c in rest(r.watch)] == [(("unmounted",), str(point))]


def test_mounted_anew_while_paused(tmp_path: Path, pure: bool) -> None:
    """The new superblock is not marked: its changes are none of the watch's."""
    with _device(tmp_path) as (device, point), watching(point, pure=pure) as r:
        scanned(r)
        r.watch.pause()
        unmount(point)
        run("mount", device, str(point))
        r.watch.resume()
        write(point / "other")
        assert [c.kinds for c in rest(r.watch)] == [("unmounted",)]


def test_an_end_among_others_leaves_the_rest_idle(tmp_path: Path, pure: bool) -> None:
    with (
        mounted("tmpfs", tmp_path / "a") as a,
        mounted("tmpfs", tmp_path / "b") as b,
        watching(a, b, pure=pure) as r,
    ):
        scanned(r)
        unmount(b)
        assert r.watch.read(10)[-1].kinds == ("unmounted",)
        before = time.process_time()
        assert r.watch.read(0.5) == []
        assert time.process_time() - before < 0.25
        poll = select.poll()
        poll.register(r.watch.fileno(), select.POLLIN)
        deadline = time.monotonic() + 20
        while poll.poll(0):  # somebody may mount something meanwhile, which wakes as well
            assert time.monotonic() < deadline
            r.watch.read(0)
        write(a / "f")
        assert poll.poll(10_000)
        until(r.watch, a / "f")


# -- moved with what is above --


@pytest.fixture
def below(tmpfs: Path) -> Iterator[Path]:
    """A mount point two directories deep in another filesystem."""
    (tmpfs / "a/b/mnt").mkdir(parents=True)
    run("mount", "-t", "tmpfs", "below", str(tmpfs / "a/b/mnt"))
    try:
        yield tmpfs
    finally:
        (found,) = tmpfs.glob("*/b/mnt")
        unmount(found)


def test_a_directory_above_the_mount_point_is_renamed(below: Path, pure: bool) -> None:
    """Nothing wakes for it: mountinfo changes, and its poll does not say so."""
    old, new = below / "a/b/mnt", below / "z/b/mnt"
    (old / "known").mkdir()
    with watching(old, pure=pure) as r:
        scanned(r)
        assert r.watch.read(0.05) == []  # it rests
        os.rename(below / "a", below / "z")
        write(new / "f")
        (new / "known/d").mkdir()
        told = until(r.watch, new / "known/d")
        assert short(told, below)[0] == ("renamed", "z/b/mnt", "a/b/mnt")
        assert {c.path_source for c in told} == {"exact"}
        assert all(c.path.startswith(str(new)) for c in told)
        # And what needs a look at the disk works.
        r.watch.pause()
        r.watch.resume()
        (new / "known/d/e").mkdir()
        told = until(r.watch, new / "known/d/e")
        assert told[0].kinds == ("lost",)
        assert not any("unmounted" in c.kinds for c in told)


def test_it_is_renamed_while_changes_flow(below: Path, pure: bool) -> None:
    old, new = below / "a/b/mnt", below / "z/b/mnt"
    with watching(old, pure=pure) as r:
        write(old / "f")
        told = r.watch.read(10)  # it looked, and does not rest from here on
        os.rename(below / "a", below / "z")
        deadline = time.monotonic() + 60
        while not any(c.kinds == ("renamed",) for c in told):
            assert time.monotonic() < deadline
            write(new / "f")
            told += r.watch.read(10)
        (move,) = [c for c in told if c.kinds == ("renamed",)]
        assert (move.path, move.old_path) == (str(new), str(old))


def test_it_is_renamed_while_paused(below: Path, pure: bool) -> None:
    old, new = below / "a/b/mnt", below / "z/b/mnt"
    with watching(old, pure=pure) as r:
        scanned(r)
        r.watch.pause()
        os.rename(below / "a", below / "z")
        r.watch.resume()
        write(new / "f")
        told = until(r.watch, new / "f")
        assert [c.kinds for c in told[:2]] == [("renamed",), ("lost",)]
        assert (told[0].path, told[1].path) == (str(new), str(new))


# -- covered --


def test_covered_while_paused(tmp_path: Path, pure: bool) -> None:
    """The mark cannot be set again by path, but the mount is there: it is not unmounted."""
    with mounted("tmpfs", tmp_path) as point, watching(point, pure=pure) as r:
        scanned(r)
        r.watch.pause()
        with _over(point):
            r.watch.resume()
            write(point / "other")
            told = rest(r.watch)
        assert {c.kinds for c in told} == {("mounted",)}
        assert told[-1].path == str(point)


def test_only_the_covered_root_is_told(tmpfs: Path, pure: bool) -> None:
    for name in ("a", "b", "d"):
        (tmpfs / name).mkdir()
    write(tmpfs / "d/file")
    roots = [tmpfs / "a", tmpfs / "b", tmpfs / "d/file"]
    with watching(*roots, pure=pure) as r:
        scanned(r)
        with _over(tmpfs / "a"):
            assert short(r.watch.read(10), tmpfs) == [("mounted", "a", None)]
        with _over(tmpfs / "d"):
            assert short(r.watch.read(10), tmpfs) == [("mounted", "d/file", None)]
        with _over(tmpfs):
            assert short(r.watch.read(10), tmpfs) == [
                ("mounted", name, None) for name in ("a", "b", "d/file")
            ]
        assert r.watch.read(0.05) == []
        write(tmpfs / "b/f")
        until(r.watch, tmpfs / "b/f")


# -- a drain that fails --


def test_reading_fails(tmpfs: Path, pure: bool) -> None:
    """What was read is told, then the error: not the end that a stop makes."""
    with watching(tmpfs, pure=pure) as r:
        scanned(r)
        source = r.watch._groups[0].source
        write(tmpfs / "f")
        assert source.drain.sync(20)
        directory = os.open(tmpfs, os.O_RDONLY | os.O_NONBLOCK)
        os.dup2(directory, source.fd, inheritable=False)  # read() of it: EISDIR
        os.close(directory)
        assert not source.drain.sync(20)
        assert source.drain.error == errno.EISDIR
        told = []
        while not any("written" in c.kinds for c in told):
            told += r.watch.read(10)
        assert not r.watch.ended
        with pytest.raises(fanwise.FanwiseError, match="EISDIR") as caught:
            r.watch.read(10)
        assert str(tmpfs) in str(caught.value)
        assert {c.path for c in told} == {str(tmpfs / "f")}
        assert r.watch.read(10) == []  # once
        assert r.watch.ended


# -- identity --


def test_identity_goes_by_one_look_up(tmpfs: Path) -> None:
    """``lnk/..`` is the parent of where the link leads, not of the link."""
    (tmpfs / "other").mkdir()
    with _over(tmpfs / "other"):
        (tmpfs / "other/deep").mkdir()
        (tmpfs / "other/s").symlink_to("nowhere")
        (tmpfs / "lnk").symlink_to(tmpfs / "other/deep")
        assert fanwise.identity(f"{tmpfs}/lnk/../s") == fanwise.identity(tmpfs / "other/s")
        assert (
            fanwise.identity(tmpfs / "lnk").split("/")[0] == fanwise.identity(tmpfs).split("/")[0]
        )
    # Its handles cannot be opened, but identify.
    device = mount_of("/proc").dev
    assert fanwise.identity("/proc/self/status").startswith(f"{device[0]}:{device[1]}/")
    assert fanwise.identity("/proc/self/status") != fanwise.identity("/proc/self/stat")


# -- waking --


def test_nothing_opens_in_a_constructor(tmpfs: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    kept = [_watch._Waker(), Signals(lambda: None), fanwise.watch(tmpfs), fanwise.awatch(tmpfs)]
    assert set(os.listdir("/proc/self/fd")) == before
    assert kept


def test_a_wake_that_close_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another thread or a signal handler does it: the descriptor is open while it is written."""
    waker = _watch._Waker()
    waker.open()
    fd = waker.fd
    seen = []

    def write_late(number: int, value: int) -> None:
        monkeypatch.undo()
        waker.close()  # between the look at the waker and the write
        waker.wake()
        os.fstat(number)
        seen.append(number)
        os.eventfd_write(number, value)

    monkeypatch.setattr(os, "eventfd_write", write_late)
    waker.wake()
    assert seen == [fd]
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
    other = os.eventfd(0, os.EFD_NONBLOCK)  # it has the number now
    try:
        waker.wake()
        waker.clear()
        waker.close()
        with pytest.raises(BlockingIOError):
            os.eventfd_read(other)
    finally:
        os.close(other)


def test_a_forked_child_is_told(tmpfs: Path, pure: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns: threads and fork
        with watching(tmpfs, pure=pure) as r:
            pid = os.fork()
            if not pid:
                status = 1
                try:
                    for use in (lambda: r.watch.read(0), r.watch.fileno, lambda: next(r.watch)):
                        with pytest.raises(fanwise.ClosedError, match="forked"):
                            use()
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            write(tmpfs / "f")
            assert {c.path for c in r.told()} == {str(tmpfs / "f")}


# -- arguments --


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": "*.tmp"}, "exclude: '*.tmp' is not a list; give a list: exclude=['*.tmp']"),
        ({"exclude": b"*.tmp"}, "exclude: b'*.tmp' is not a list"),
        ({"exclude": [b"*.tmp"]}, "exclude: b'*.tmp' is not a string"),
        ({"kinds": "created"}, "kinds: 'created' is not a list; give a list: kinds=['created']"),
        ({"ignore_pids": "12"}, "ignore_pids: '12' is not a list"),
        ({"ignore_pids": 12}, "ignore_pids: 12 is not a list; give a list: ignore_pids=[12]"),
        ({"ignore_pids": ["12"]}, "ignore_pids: '12' is not a process id"),
        ({"queue": 65535}, "queue: 65535 is not a number of bytes that will do; give an integer"),
        ({"queue": -1}, "queue: -1 "),
        ({"queue": 1e6}, "queue: 1000000.0 "),
        ({"queue": True}, "queue: True "),
        ({"timeout": "1"}, "timeout: '1' is no time to wait; give seconds"),
        ({"timeout": -0.1}, "timeout: -0.1 "),
        ({"timeout": float("nan")}, "timeout: nan "),
    ],
)
def test_arguments_are_refused_at_the_call(
    tmpfs: Path, options: dict[str, object], message: str
) -> None:
    for make in (fanwise.watch, fanwise.awatch):
        with pytest.raises(fanwise.FanwiseError, match="^" + re.escape(message)):
            make(tmpfs, **options)  # type: ignore[arg-type]


def test_arguments_at_their_limits(tmpfs: Path) -> None:
    with fanwise.watch(
        tmpfs,
        exclude=(),
        kinds=iter(["created"]),
        ignore_pids={1},
        queue=64 << 10,
        timeout=float("inf"),
    ) as watch:
        write(tmpfs / "f")
        assert next(watch).kinds == ("created",)


# -- awatch --


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_batches_left_by_a_break(tmpfs: Path, backend: str) -> None:
    async def main() -> None:
        async with fanwise.awatch(tmpfs, kinds=["created"]) as changes:
            batches = changes.batches()
            assert not inspect.isasyncgen(batches)
            for name in ("one", "two"):
                write(tmpfs / name)
                async for batch in batches:
                    assert [c.path for c in batch] == [str(tmpfs / name)]
                    break
            changes.stop()
            assert [batch async for batch in batches] == []

    anyio.run(main, backend=backend)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_left_while_another_task_waits(
    tmpfs: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A loop may come to look at the descriptor when it is closed already.
    monkeypatch.setattr(fanwise.Watch, "_wake", lambda watch: None)
    raised: list[fanwise.ClosedError] = []

    async def consume(changes: fanwise.AsyncWatch) -> None:
        try:
            async for _ in changes:
                pass
        except fanwise.ClosedError as error:
            raised.append(error)

    async def main() -> None:
        async with anyio.create_task_group() as tasks, fanwise.awatch(tmpfs) as changes:
            tasks.start_soon(consume, changes)
            with anyio.fail_after(20):
                while not changes._waits:
                    await anyio.sleep(0)

    anyio.run(main, backend=backend)
    assert len(raised) == 1


def test_a_mount_on_a_filesystem_without_handles(tmp_path: Path, pure: bool) -> None:
    """The way up ends there: tmpfs on sysfs, or a volume on the overlay of a container."""
    top = tmp_path / "sys"
    top.mkdir()
    run("mount", "-t", "sysfs", "s", str(top))
    try:
        with _over(top / "fs"):
            (top / "fs/d").mkdir()
            with watching(top / "fs", pure=pure) as r:
                write(top / "fs/d/f")
                assert short(r.told(), top)[0][1] == "fs/d/f"
            with watching(top / "fs/d", pure=pure) as r:
                write(top / "fs/d/g")
                assert short(r.told(), top)[0][1] == "fs/d/g"
    finally:
        unmount(top)
