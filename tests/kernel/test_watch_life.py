"""Roots that come to an end, losses, and how a watch starts, stops, waits and is shared."""

import errno
import multiprocessing
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import anyio
import pytest

import fanwise
from fanwise.watch._group import Group
from tests.kernel.conftest import loop_device, mounted, run, unmount
from tests.kernel.watching import scanned, short, watching, write


def drain(watch: fanwise.Watch) -> list[fanwise.Change]:
    """Everything up to the end of a watch that ends."""
    return [change for batch in watch.batches() for change in batch]


# -- roots --


def test_an_idle_watch_does_not_keep_a_filesystem_busy(tmp_path: Path, pure: bool) -> None:
    image, point = tmp_path / "image", tmp_path / "mnt"
    point.mkdir()
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    with loop_device(image) as device:
        run("mkfs.ext4", "-q", device)
        run("mount", device, str(point))
        for i in range(30):
            (point / f"d{i}").mkdir()
        with watching(point, pure=pure) as r:
            scanned(r)
            write(point / "d3/f")
            r.told()
            unmount(point)  # EBUSY if a descriptor were held
            run("mkfs.ext4", "-q", device)
            final = drain(r.watch)
            assert [(c.kinds, c.path) for c in final] == [(("unmounted",), str(point))]
            assert r.watch.ended


def test_what_came_before_an_unmount_is_told(tmp_path: Path, pure: bool) -> None:
    with mounted("tmpfs", tmp_path) as point, watching(point, pure=pure) as r:
        for i in range(500):
            write(point / f"f{i}")
        unmount(point)
        told = drain(r.watch)
        assert sum("created" in c.kinds for c in told) == 500
        assert told[-1].kinds == ("unmounted",)


def test_mounted_over(tmp_path: Path, pure: bool) -> None:
    with mounted("tmpfs", tmp_path) as point, watching(point, pure=pure) as r:
        inner = os.open(point, os.O_RDONLY)
        try:
            run("mount", "-t", "tmpfs", "over", str(point))
            (change,) = r.watch.read(10)
            assert (change.kinds, change.path) == (("mounted",), str(point))
            # The covered filesystem is still the one that is watched.
            os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=inner))
            told = r.watch.read(10)
            assert {c.path for c in told} == {str(point / "f")}
        finally:
            os.close(inner)
            unmount(point)


def test_a_moved_mount_is_followed(tmp_path: Path, pure: bool) -> None:
    with mounted("tmpfs", tmp_path) as point:
        other = tmp_path / "other"
        other.mkdir()
        run("mount", "--make-private", str(point))
        with watching(point, pure=pure) as r:
            parent = subprocess.run(
                ["mount", "--move", str(point), str(other)], capture_output=True, text=True
            )
            if parent.returncode:
                # The parent mount is shared: a move needs a private one.
                assert "shared" in parent.stderr or "wrong fs" in parent.stderr
                return
            try:
                (change,) = r.watch.read(10)
                assert (change.kinds, change.old_path) == (("renamed",), str(point))
                assert change.path == str(other)
                write(other / "f")
                assert {c.path for c in r.watch.read(10)} == {str(other / "f")}
            finally:
                unmount(other)


def test_a_removed_root_ends(fs: Path, pure: bool) -> None:
    root = fs / "root"
    (root / "d").mkdir(parents=True)
    with watching(root, pure=pure) as r:
        scanned(r)
        shutil.rmtree(root)
        told = drain(r.watch)
        assert short(told, fs) == [("deleted", "root/d", None), ("deleted", "root", None)]
        assert told[-1].identity is not None


def test_a_removed_root_among_others(tmpfs: Path, pure: bool) -> None:
    (tmpfs / "a").mkdir()
    (tmpfs / "b").mkdir()
    with watching(tmpfs / "a", tmpfs / "b", pure=pure) as r:
        (tmpfs / "a").rmdir()
        write(tmpfs / "b/f")
        told = [*r.watch.read(10)]
        while not any(c.path == str(tmpfs / "b/f") for c in told):
            told += r.watch.read(10)
        assert short(told, tmpfs)[0] == ("deleted", "a", None)


def test_a_moved_root_is_followed(fs: Path, pure: bool) -> None:
    root = fs / "x/root"
    (root / "d").mkdir(parents=True)
    (fs / "y").mkdir()
    with watching(root, pure=pure) as r:
        scanned(r)
        root.rename(fs / "y/moved")
        write(fs / "y/moved/d/f")
        (fs / "y").rename(fs / "z")  # something above it
        write(fs / "z/moved/d/g")
        told: list[fanwise.Change] = []
        while not any(c.path.endswith("/d/g") and "written" in c.kinds for c in told):
            told += r.watch.read(10)
        moves = [t for t in short(told, fs) if t[0] == "renamed"]
        assert moves == [("renamed", "y/moved", "x/root"), ("renamed", "z/moved", "y/moved")]
        assert {p for k, p, _ in short(told, fs) if k != "renamed"} == {
            "y/moved/d/f",
            "z/moved/d/g",
        }


def test_a_file_is_followed_by_its_name(fs: Path, pure: bool) -> None:
    root = write(fs / "f")
    (fs / "d").mkdir()
    with watching(root, pure=pure, sentinel=fs) as r:
        write(fs / "other")
        write(fs / "d/f")
        write(root, "1")
        victim = fanwise.identity(root)
        write(fs / "new").rename(root)
        write(root, "2")
        root.rename(fs / "away")
        write(fs / "away", "not told")
        write(root, "3")
        root.unlink()
        told: list[fanwise.Change] = []
        while sum("deleted" in c.kinds for c in told) < 2:
            told += r.watch.read(10)
        assert {c.path for c in told} == {str(root)}
        created = [c for c in told if "created" in c.kinds]
        assert [c.replaced for c in created] == [victim, None]
        assert "deleted" in told[-1].kinds


def test_a_symbolic_link_is_resolved_once(tmpfs: Path, pure: bool) -> None:
    (tmpfs / "real").mkdir()
    (tmpfs / "link").symlink_to("real")
    with watching(tmpfs / "link", pure=pure, sentinel=tmpfs / "real") as r:
        assert r.watch.roots[0].path == str(tmpfs / "real")
        (tmpfs / "link").unlink()
        (tmpfs / "link").symlink_to("/")
        write(tmpfs / "real/f")
        assert {c.path for c in r.told()} == {str(tmpfs / "real/f")}


# -- loss --


def test_a_full_ring_is_counted_exactly(fs: Path, pure: bool) -> None:
    (fs / "d/e").mkdir(parents=True)
    with watching(fs, pure=pure, queue=64 << 10, kinds=["created", "deleted"]) as r:
        scanned(r)
        source = r.watch._groups[0].source
        for i in range(20_000):
            os.close(os.open(fs / f"f{i}", os.O_CREAT | os.O_WRONLY))
        assert source.drain.sync(20)
        told: list[fanwise.Change] = []
        while not any(c.kinds == ("lost",) for c in told):
            told += r.watch.read(10)
        write(fs / "d/e/after")  # nothing is lost any more
        while not any(c.path == str(fs / "d/e/after") for c in told):
            told += r.watch.read(10)
        lost = [c for c in told if c.kinds == ("lost",)]
        assert lost
        assert {(c.source, c.roots) for c in lost} == {("ring", (str(fs),))}
        created = {c.path for c in told if c.kinds == ("created",)} - {str(fs / "d/e/after")}
        assert sum(c.count or 0 for c in lost) == 20_000 - len(created)
        assert source.drain.stats()["lost"] == sum(c.count or 0 for c in lost)
        after = next(c for c in told if c.path == str(fs / "d/e/after"))
        assert after.path_source == "exact"  # the directory was hit and has not moved
        scanned(r)
        write(fs / "d/e/later")
        assert {(c.path, c.path_source) for c in r.told()} == {(str(fs / "d/e/later"), "exact")}


def test_a_kernel_overflow_is_told(
    tmpfs: Path, pure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real overflow: a bounded queue that is not read meanwhile."""
    from fanwise.sources import fanotify as source

    monkeypatch.setattr(source, "_INIT", source._INIT & ~source.FAN_UNLIMITED_QUEUE)
    opened = source.FanotifySource.open

    def fill_first(self: source.FanotifySource) -> None:
        parts = self._parts

        def late(fd: int, ring: int) -> object:
            # The mark is set and nothing reads yet.
            for i in range(17_000):
                os.close(os.open(tmpfs / f"f{i}", os.O_CREAT | os.O_WRONLY))
            return parts.Drain(fd, ring)

        self._parts = parts._replace(Drain=late)
        opened(self)

    monkeypatch.setattr(source.FanotifySource, "open", fill_first)
    with watching(tmpfs, pure=pure, kinds=["created", "deleted"]) as r:
        # Until the queue is read, what follows is lost as well.
        assert r.watch._groups[0].source.drain.sync(20)
        told = r.told()
        lost = [c for c in told if c.kinds == ("lost",)]
        assert [(c.source, c.count) for c in lost] == [("kernel", None)]
        assert len([c for c in told if "created" in c.kinds]) == 16_384


def test_pause_and_resume(tmpfs: Path, pure: bool) -> None:
    with watching(tmpfs, pure=pure) as r:
        write(tmpfs / "before")
        r.watch.pause()
        (tmpfs / "dir").mkdir()
        write(tmpfs / "dir/missed")
        r.watch.resume()
        write(tmpfs / "dir/after")
        told = r.told()
        paths = [c.path for c in told]
        assert str(tmpfs / "before") in paths
        assert str(tmpfs / "dir/missed") not in paths
        lost = [c for c in told if c.kinds == ("lost",)]
        assert [(c.source, c.count) for c in lost] == [("stopped", None)]
        assert str(tmpfs / "dir/after") in paths[paths.index(lost[0].path) :]


# -- starting, stopping, waiting --


def test_stop_from_another_thread_delivers_what_was_queued(tmpfs: Path, pure: bool) -> None:
    with fanwise.watch(tmpfs, pure=pure) as watch:
        told: list[fanwise.Change] = []
        thread = threading.Thread(target=lambda: told.extend(watch))
        thread.start()
        for i in range(300):
            write(tmpfs / f"f{i}")
        watch.stop()
        thread.join(20)
        assert not thread.is_alive()
        assert sum("created" in c.kinds for c in told) == 300
        assert watch.read(0) == []


def test_timeout_and_fileno(tmpfs: Path, pure: bool) -> None:
    with fanwise.watch(tmpfs, timeout=0.05, pure=pure) as watch:
        assert list(watch) == []
        poll = select.poll()
        poll.register(watch.fileno(), select.POLLIN)
        # Somebody may mount something meanwhile, which wakes as well.
        deadline = time.monotonic() + 20
        while watch.read(0) or not watch.scanned or poll.poll(0):
            assert time.monotonic() < deadline
        for i in range(10_000):
            os.close(os.open(tmpfs / f"f{i}", os.O_CREAT | os.O_WRONLY))
        seen = 0
        while seen < 10_000:
            assert poll.poll(20_000), f"{seen} told, and the descriptor says there is no more"
            seen += sum("created" in c.kinds for c in watch.read(0))


def test_one_consumer(tmpfs: Path, pure: bool) -> None:
    with fanwise.watch(tmpfs, pure=pure) as watch:
        thread = threading.Thread(target=watch.read)
        thread.start()
        while not watch._consumer.locked():
            pass
        with pytest.raises(fanwise.BusyError):
            watch.read(0)
        watch.stop()
        thread.join()


def test_closed_while_another_thread_reads(tmpfs: Path, pure: bool) -> None:
    before = set(os.listdir("/proc/self/fd"))
    for turn in range(30):
        watch = fanwise.watch(tmpfs, pure=pure)
        watch.open()
        raised: list[type[Exception]] = []

        def consume(watch: fanwise.Watch = watch, raised: list[type[Exception]] = raised) -> None:
            try:
                while True:
                    watch.read()
            except Exception as error:
                raised.append(type(error))

        thread = threading.Thread(target=consume, daemon=True)
        thread.start()
        for i in range(0 if turn == 0 else 40):  # the first waits, the others are at work
            write(tmpfs / f"f{i}")
        while turn == 0 and not watch._consumer.locked():
            pass
        watch.close()
        # What it read from is gone: it has left it by now.
        assert set(os.listdir("/proc/self/fd")) == before
        thread.join(20)
        assert raised == [fanwise.ClosedError]
        with pytest.raises(fanwise.ClosedError):
            watch.read(0)


def test_closed_in_a_signal_handler(tmpfs: Path, pure: bool) -> None:
    before = set(os.listdir("/proc/self/fd"))
    watch = fanwise.watch(tmpfs, pure=pure)
    watch.open()
    old = signal.signal(signal.SIGALRM, lambda number, frame: watch.close())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(fanwise.ClosedError):
            list(watch)
    finally:
        signal.signal(signal.SIGALRM, old)
    assert set(os.listdir("/proc/self/fd")) == before
    watch.close()


def test_use_after_close(tmpfs: Path) -> None:
    watch = fanwise.watch(tmpfs)
    with pytest.raises(fanwise.ClosedError):
        watch.read(0)
    with watch:
        pass
    with pytest.raises(fanwise.ClosedError):
        next(watch)
    watch.close()
    with pytest.raises(fanwise.ClosedError):
        watch.open()


def test_a_leaked_watch_warns_and_is_closed(tmpfs: Path, pure: bool) -> None:
    before = set(os.listdir("/proc/self/fd"))
    watch = fanwise.watch(tmpfs, pure=pure)
    watch.open()
    with pytest.warns(ResourceWarning, match="was not closed"):
        del watch
    assert set(os.listdir("/proc/self/fd")) == before


def test_nothing_is_left_open(fs: Path, pure: bool) -> None:
    before = set(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    with watching(fs, pure=pure) as r:
        write(fs / "f")
        r.told()
        scanned(r)
        # Idle: nothing of the watched filesystem is open.
        for fd in set(os.listdir("/proc/self/fd")) - before:
            try:
                assert not os.readlink(f"/proc/self/fd/{fd}").startswith(str(fs))
            except FileNotFoundError:
                continue
    assert set(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() == threads


def _child_of_fork(where: str, done: object, go: object) -> None:
    go.wait(20)  # type: ignore[attr-defined]
    done.set()  # type: ignore[attr-defined]


def test_a_forked_child_does_not_keep_the_group(tmpfs: Path, pure: bool) -> None:
    """A child that kept it would keep it queueing: its fdinfo would show the mark."""
    context = multiprocessing.get_context("fork")
    done, go = context.Event(), context.Event()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns: threads and fork
        with watching(tmpfs, pure=pure) as r:
            child = context.Process(target=_child_of_fork, args=(str(tmpfs), done, go))
            child.start()
            fds = Path(f"/proc/{child.pid}/fd")

            def groups() -> list[str]:
                found = []
                for fd in os.listdir(fds):
                    try:
                        link = os.readlink(fds / fd)
                    except FileNotFoundError:
                        continue
                    if "fanotify" in link:
                        found.append(link)
                return found

            deadline = time.monotonic() + 60
            while groups() and time.monotonic() < deadline:
                pass
            assert groups() == []
            write(tmpfs / "f")
            assert {c.path for c in r.told()} == {str(tmpfs / "f")}  # the parent goes on
            go.set()
            child.join(20)
            assert child.exitcode == 0


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_awatch(tmpfs: Path, pure: bool, backend: str) -> None:
    async def main() -> None:
        async with fanwise.awatch(tmpfs, pure=pure) as changes:
            write(tmpfs / "one")
            seen = set()
            async for change in changes:
                seen |= set(change.kinds)
                assert change.path == str(tmpfs / "one")
                if "written" in change.kinds:
                    break
            assert seen == {"created", "modified", "written"}
            # Cancelled waits lose nothing, and the loop is not blocked by them.
            got = []
            with anyio.fail_after(20):
                write(tmpfs / "two")
                while not any("written" in c.kinds for c in got):
                    with anyio.move_on_after(0.0001):
                        got += await changes.read()
            assert {k for c in got for k in c.kinds} == {"created", "modified", "written"}
            with anyio.move_on_after(0.05) as scope:
                await changes.read()
            assert scope.cancelled_caught
            changes.stop()
            assert [batch async for batch in changes.batches()] == []

    anyio.run(main, backend=backend)


def test_a_scan_is_told_to_a_loop_by_the_descriptor(ext4: Path, pure: bool) -> None:
    for i in range(300):
        (ext4 / f"d{i}").mkdir()
    with fanwise.watch(ext4, pure=pure) as watch:
        poll = select.poll()
        poll.register(watch.fileno(), select.POLLIN)
        while not watch.scanned:
            assert poll.poll(20_000)
            watch.read(0)
        assert watch.directories == 302  # with lost+found


# -- refusals --


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(fanwise.NoSuchRoot, match="does not exist"):
        fanwise.watch(tmp_path / "no").open()
    with pytest.raises(fanwise.FilesystemRefuses):
        fanwise.watch("/proc").open()
    with pytest.raises(fanwise.FanwiseError, match="no such kind"):
        fanwise.watch(tmp_path, kinds=["nothing"])
    with pytest.raises(fanwise.FanwiseError, match="at least one path"):
        fanwise.watch()
    with pytest.raises(fanwise.ConfigError, match="glob"):
        fanwise.watch(tmp_path, exclude=["/"]).open()


def test_without_the_right_to_open_handles(tmpfs: Path) -> None:
    code = (
        "import sys, fanwise\n"
        "with fanwise.watch(sys.argv[1]) as watch: print(watch.roots[0].rung)\n"
        "print(fanwise.capabilities(sys.argv[1]).refused['filesystem-mark'].reason)\n"
    )
    drop = ["setpriv", "--bounding-set=-dac_read_search", "--inh-caps=-dac_read_search"]
    done = subprocess.run(
        [*drop, sys.executable, "-c", code, str(tmpfs)], capture_output=True, text=True
    )
    assert done.stdout.startswith("inode-marks\n"), done.stdout + done.stderr
    assert "CAP_DAC_READ_SEARCH" in done.stdout


def test_a_mounted_file_is_refused(tmpfs: Path) -> None:
    write(tmpfs / "source")
    point = write(tmpfs / "point")
    run("mount", "--bind", str(tmpfs / "source"), str(point))
    try:
        with pytest.raises(fanwise.FilesystemRefuses, match="mount point"):
            fanwise.watch(point).open()
    finally:
        unmount(point)


def test_a_root_whose_end_was_lost(tmpfs: Path, pure: bool) -> None:
    (tmpfs / "root").mkdir()
    with watching(tmpfs / "root", pure=pure) as r:
        r.watch.pause()
        (tmpfs / "root").rmdir()
        r.watch.resume()
        told = drain(r.watch)
        assert [c.kinds for c in told] == [("lost",), ("deleted",), ("repaired",)]
        assert told[1].path == str(tmpfs / "root")
        assert (told[2].roots, told[2].count) == ((), 0)


def test_a_loss_while_the_mount_is_covered(tmpfs: Path, pure: bool) -> None:
    (tmpfs / "d").mkdir()
    with watching(tmpfs, pure=pure, kinds=["created"], queue=64 << 10) as r:
        scanned(r)
        inner = os.open(tmpfs, os.O_RDONLY)
        try:
            run("mount", "-t", "tmpfs", "over", str(tmpfs))
            for i in range(3000):
                os.close(os.open(f"f{i}", os.O_CREAT | os.O_WRONLY, dir_fd=inner))
            assert r.watch._groups[0].source.drain.sync(20)
            told: list[fanwise.Change] = []
            while not any(c.kinds == ("lost",) for c in told):
                told += r.watch.read(10)
            os.close(os.open("after", os.O_CREAT | os.O_WRONLY, dir_fd=inner))
            while not any(c.path == str(tmpfs / "after") for c in told):
                told += r.watch.read(10)
            # Marks that were dropped cannot be set again where the path leads elsewhere.
            r.watch.pause()
            r.watch.resume()
            assert drain(r.watch)[-1].kinds == ("mounted",)
        finally:
            os.close(inner)
            unmount(tmpfs)


def test_what_fails_to_close_keeps_nothing_else_open(
    tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(os.listdir("/proc/self/fd"))
    watch = fanwise.watch(tmpfs)
    watch.open()
    close = Group.close

    def fails(group: Group) -> None:
        close(group)
        raise OSError(errno.EBUSY, "made up")

    monkeypatch.setattr(Group, "close", fails)
    with pytest.raises(OSError, match="made up"):
        watch.close()
    assert set(os.listdir("/proc/self/fd")) == before
