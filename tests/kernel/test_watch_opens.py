"""Opens, reads and executions: all of them are told, but those of fanwise's own look-ups."""

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fanwise
from fanwise.names._child import Ask
from fanwise.names.child import _LINKS, Helper, Helpers
from fanwise.names.scan import Scanner
from fanwise.watch._change import DEFAULT_KINDS
from tests.kernel.conftest import mounted, run, unmount
from tests.kernel.watching import Reader, scanned, short, watching, write

OPENS = ("opened", "accessed", "executed")
KINDS = ("created", "deleted", *OPENS)  # the first two for the sentinels


@pytest.fixture(autouse=True)
def nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the directories that others open: `fanwise health` looks at every filesystem."""
    ours = {os.getpid()}
    begin, read = subprocess.Popen.__init__, fanwise.Watch.read

    def started(process: subprocess.Popen[bytes], *args: Any, **options: Any) -> None:
        begin(process, *args, **options)
        ours.add(process.pid)

    def without_others(watch: fanwise.Watch, timeout: float | None = None) -> list[fanwise.Change]:
        while rows := read(watch, timeout):
            kept = [c for c in rows if c.pid in ours or not c.is_dir or c.kinds != ("opened",)]
            if kept:
                return kept
        return []

    monkeypatch.setattr(subprocess.Popen, "__init__", started)
    monkeypatch.setattr(fanwise.Watch, "read", without_others)


@pytest.fixture(params=["ext4", "tmpfs"])
def fs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with mounted(request.param, tmp_path) as point:
        yield point


@pytest.fixture
def no_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories are known only when they were looked up."""
    monkeypatch.setattr(Scanner, "give", lambda self, keys, names: None)


def helpers(r: Reader) -> Helpers:
    found = r.watch._helpers
    assert found is not None
    return found


def kill(helper: Helper) -> None:
    assert helper.process is not None
    helper.process.kill()


def children() -> set[int]:
    """Processes whose parent is this one, zombies included."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_bytes().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == os.getpid():
            found.add(int(stat.parts[2]))
    return found


def until_scanned(r: Reader) -> list[fanwise.Change]:
    """What is told until the whole tree is known."""
    told = []
    deadline = time.monotonic() + 60
    while not r.watch.scanned:
        told += r.watch.read(0.01)
        assert time.monotonic() < deadline, "the scan does not end"
    return told + r.told()


def tree(root: Path, count: int) -> list[Path]:
    """Directories, some deep, each with a file."""
    made = [root / f"d{i % 10}" / f"e{i}" / f"f{i}" for i in range(count)]
    for directory in made:
        directory.mkdir(parents=True)
        write(directory / "file")
    return made


# -- what is told --


def test_opens_reads_and_executions(fs: Path, pure: bool) -> None:
    (fs / "d").mkdir()
    f = write(fs / "d/f", "text")
    tool = fs / "d/tool"
    shutil.copy2("/bin/true", tool)
    with watching(fs, kinds=KINDS, pure=pure) as r:
        assert until_scanned(r) == []
        with subprocess.Popen(["cat", str(f)], stdout=subprocess.DEVNULL) as cat:
            cat.wait()
        with subprocess.Popen([tool]) as run_tool:
            run_tool.wait()
        told = r.told()
        of_cat = [c for c in told if c.path == str(f)]
        assert {k for c in of_cat for k in c.kinds} == {"opened", "accessed"}
        assert {(c.pid, c.identity) for c in of_cat} == {(cat.pid, fanwise.identity(f))}
        of_tool = [c for c in told if c.path == str(tool)]
        assert {k for c in of_tool for k in c.kinds} == set(OPENS)
        assert {c.pid for c in of_tool} == {run_tool.pid}
        assert len(told) == len(of_cat) + len(of_tool)


def test_the_host_is_told_of_itself(fs: Path, pure: bool) -> None:
    (fs / "d").mkdir()
    f = write(fs / "d/f", "text")
    with watching(fs, kinds=KINDS, pure=pure) as r:
        scanned(r)
        assert os.listdir(fs / "d") == ["f"]
        told = r.told()
        assert {(c.path, c.is_dir, c.pid) for c in told} == {(str(fs / "d"), True, os.getpid())}
        assert {k for c in told for k in c.kinds} == {"opened", "accessed"}
        assert os.listdir(fs)
        assert {(c.path, c.is_dir) for c in r.told()} == {(str(fs), True)}
        assert f.read_text() == "text"
        told = r.told()
        assert {(c.path, c.is_dir, c.pid) for c in told} == {(str(f), False, os.getpid())}
        assert {k for c in told for k in c.kinds} == {"opened", "accessed"}


def test_together_with_the_default_kinds(fs: Path, pure: bool) -> None:
    with watching(fs, kinds=[*DEFAULT_KINDS, *OPENS], pure=pure) as r:
        scanned(r)  # no helper is on its way, which has what we have open until its exec
        (fs / "d").mkdir()
        f = write(fs / "d/f")
        f.rename(fs / "g")
        (fs / "g").read_text()
        told = r.told()
        assert short(told, fs)[0] == ("created", "d", None)
        assert ("renamed", "g", "d/f") in short(told, fs)
        assert {k for c in told if c.path == str(f) for k in c.kinds} == {
            "created", "opened", "modified", "written",
        }  # fmt: skip
        kinds = {k for c in told if c.path == str(fs / "g") for k in c.kinds}
        assert kinds == {"renamed", "opened", "accessed"}
        # Unknowable orders are verified by look-ups; they are not told.
        for _ in range(50):
            (fs / "g").rename(fs / "h")
            (fs / "h").rename(fs / "g")
        assert {k for c in r.told() for k in c.kinds} == {"renamed"}


def test_executions_alone_need_no_helper(tmpfs: Path, pure: bool) -> None:
    shutil.copy2("/bin/true", tmpfs / "tool")
    with watching(tmpfs, kinds=["created", "deleted", "executed"], pure=pure) as r:
        assert r.watch._helpers is None
        run(str(tmpfs / "tool"))
        assert short(r.told(), tmpfs) == [("executed", "tool", None)]


# -- what is not --


def test_nothing_of_the_scan_is_told(fs: Path, pure: bool) -> None:
    tree(fs, 400)
    with watching(fs, kinds=KINDS, pure=pure) as r:
        assert until_scanned(r) == []
        assert r.watch.stats()["records"] >= 400  # they were raised


def test_nothing_of_a_look_up_is_told(fs: Path, pure: bool, no_scan: None) -> None:
    files = [directory / "file" for directory in tree(fs, 60)]
    with watching(fs, kinds=KINDS, pure=pure) as r:
        for f in files:
            f.read_text()
        told = r.told()
        assert {c.path for c in told} == set(map(str, files))
        assert {(c.pid, c.path_source) for c in told} == {(os.getpid(), "exact")}
        assert r.told() == []


def test_opens_during_the_scan(fs: Path, pure: bool) -> None:
    files = [directory / "file" for directory in tree(fs, 1500)]
    with watching(fs, kinds=KINDS, pure=pure) as r:
        told = []
        for f in files[::7]:
            f.read_text()
            told += r.watch.read(0)
        told += until_scanned(r)
        assert {c.path for c in told} == set(map(str, files[::7]))
        assert {(c.pid, c.path_source) for c in told} == {(os.getpid(), "exact")}


def test_a_helper_that_starts_is_not_told(
    tmpfs: Path, pure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own start opens, reads and executes: here, a program on the watched filesystem."""
    script = write(tmpfs / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    tree(tmpfs, 200)
    monkeypatch.setattr(sys, "executable", str(script))
    with watching(tmpfs, kinds=KINDS, pure=pure) as r:
        assert until_scanned(r) == []
        # One that starts anew, for a look-up.
        kill(helpers(r).looks)
        assert helpers(r).looks.ask(Ask("rest"), _LINKS) is None
        assert r.told() == []
        run(str(script), "-c", "")
        assert {"opened", "executed"} <= {k for c in r.told() for k in c.kinds}


# -- the processes --


def test_an_error_of_a_helper_is_the_hosts(tmpfs: Path, pure: bool) -> None:
    with watching(tmpfs, kinds=KINDS, pure=pure) as r:
        with pytest.raises(fanwise.DecodeError, match="a key has"):
            r.watch._groups[0].resolver.lookup.links(b"no")
        assert helpers(r).looks.process is not None  # it goes on


def test_helpers_hold_nothing_and_leave_nothing(fs: Path, pure: bool) -> None:
    before = children()
    files = os.listdir("/proc/self/fd")
    tree(fs, 20)
    with watching(fs, kinds=KINDS, pure=pure) as r:
        scanned(r)
        (fs / "d1/e1/f1/file").read_text()
        assert r.told()
        started = children() - before
        assert len(started) == 2
        for pid in started:
            links = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
            assert {link.partition(":")[0] for link in links} == {"socket", "/dev/null"}
            assert os.readlink(f"/proc/{pid}/cwd") == "/"
            os.kill(pid, signal.SIGTERM)  # as a service manager does to all of a service
            os.kill(pid, signal.SIGINT)
        unmount(fs)
        told = [c for batch in r.watch.batches() for c in batch]
        assert [c.kinds for c in told] == [("unmounted",)]
        assert children() - before == started
    assert children() == before
    assert os.listdir("/proc/self/fd") == files


def test_a_look_up_whose_helper_is_killed_is_done_again(
    fs: Path, pure: bool, no_scan: None
) -> None:
    before = children()
    files = [directory / "file" for directory in tree(fs, 30)]
    with watching(fs, kinds=KINDS, pure=pure) as r:
        told = []
        for number, f in enumerate(files):
            f.read_text()
            looks = helpers(r).looks
            if number % 10 == 0:
                kill(looks)  # while nothing is asked
                told += r.told()
            elif number % 10 == 5:
                # While it is asked: it is stopped, and so has not answered yet.
                assert looks.process is not None
                looks.process.send_signal(signal.SIGSTOP)
                asked: list[fanwise.Change] = []
                thread = threading.Thread(target=lambda: asked.extend(r.told()))  # noqa: B023
                thread.start()
                deadline = time.monotonic() + 20
                while not looks._lock.locked():
                    assert time.monotonic() < deadline
                kill(looks)
                thread.join(60)
                told += asked
        told += r.told()
        assert {c.path for c in told} == set(map(str, files))
        assert {c.path_source for c in told} == {"exact"}
        # Those that were killed are reaped: what they did is decoded.
        assert r.watch.read(0) == []
        assert len(children() - before) == 1
        assert helpers(r).pids == children() - before
    assert children() == before


def test_a_scan_whose_helper_is_killed_goes_on(fs: Path, pure: bool) -> None:
    made = tree(fs, 2000)
    known = len({parent for d in made for parent in [d, *d.parents] if fs in parent.parents})
    with watching(fs, kinds=KINDS, pure=pure) as r:
        killed: set[int] = set()
        told = []
        while not r.watch.scanned:
            process = helpers(r).scans.process
            # Two of three that it may take to answer one question.
            if process is not None and r.watch.directories > 100 and len(killed) < 2:
                process.kill()
                killed.add(process.pid)
            told += r.watch.read(0.01)
        assert told + r.told() == []
        assert killed
        extra = 1 if (fs / "lost+found").exists() else 0
        assert r.watch.directories == 1 + known + extra


@pytest.mark.parametrize(
    ("executable", "reason"),
    [
        ("/nonexistent", r"does not start.*sys\.executable"),
        ("/bin/false", "again and again.*false"),
    ],
)
def test_no_helper_can_be_started(
    tmpfs: Path, monkeypatch: pytest.MonkeyPatch, executable: str, reason: str
) -> None:
    before = children()
    (tmpfs / "root").mkdir()
    tree(tmpfs / "other", 1)
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(fanwise.FanwiseError, match=reason):
        fanwise.watch(tmpfs / "root", kinds=KINDS).open()
    monkeypatch.undo()
    with watching(tmpfs / "root", kinds=KINDS) as r:
        scanned(r)
        kill(helpers(r).scans)
        monkeypatch.setattr(sys, "executable", executable)
        (tmpfs / "other").rename(tmpfs / "root/d")  # which is to be scanned
        assert r.watch.read(20)
        with pytest.raises(fanwise.FanwiseError, match=reason):
            r.watch.read(20)
        # The watch goes on: what is below is looked up when something happens there.
        monkeypatch.undo()
        write(tmpfs / "root/d/d0/e0/f0/file")
        assert {c.path for c in r.told()} == {str(tmpfs / "root/d/d0/e0/f0/file")}
    assert children() == before


def test_no_helper_can_be_started_again(
    tmpfs: Path, monkeypatch: pytest.MonkeyPatch, no_scan: None
) -> None:
    before = children()
    (d,) = tree(tmpfs, 1)
    with watching(tmpfs, kinds=KINDS) as r:
        kill(helpers(r).looks)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", "/nonexistent")
            (d / "file").read_text()
            with pytest.raises(fanwise.FanwiseError, match="does not start"):
                r.watch.read(20)
        # What could not be looked up then is told, and where it is or that this is unknown.
        for c in r.told():
            assert c.path == (str(d / "file") if c.path_source == "exact" else "file")
    assert children() == before


def host(fs: Path, more: str) -> subprocess.Popen[str]:
    """A program that watches, tells the pid of its helper, and waits."""
    code = (
        "import os, sys, fanwise\n"
        f"with fanwise.watch({str(fs)!r}, kinds=['opened']) as watch:\n"
        "    print(watch._helpers.looks.process.pid, flush=True)\n"
        f"    {more}\n"
        "    sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("more", ["", "os.fork()"], ids=["alone", "forked"])
def test_helpers_end_with_the_host(tmpfs: Path, more: str) -> None:
    with host(tmpfs, more) as process:
        assert process.stdout is not None
        helper = os.pidfd_open(int(process.stdout.readline()))
        try:
            process.kill()
            ended = select.poll()
            ended.register(helper, select.POLLIN)
            assert ended.poll(20_000)
        finally:
            os.close(helper)
            assert process.stdin is not None
            process.stdin.close()  # which ends the forked one


def test_helpers_do_not_block_what_the_host_blocks(tmpfs: Path) -> None:
    blocked = {signal.SIGUSR1, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        with watching(tmpfs, kinds=["created", "opened", "deleted"]) as r:
            scanned(r)
            r.told()
            for pid in r.watch._helpers.pids:  # type: ignore[union-attr]
                status = Path(f"/proc/{pid}/status").read_text()
                (mask,) = re.findall(r"^SigBlk:\s*([0-9a-f]+)$", status, re.MULTILINE)
                assert int(mask, 16) == 0
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_forked_child_leaves_the_helpers_alone(tmpfs: Path, pure: bool) -> None:
    tree(tmpfs, 5)
    with watching(tmpfs, kinds=KINDS, pure=pure) as r:
        scanned(r)
        pid = os.fork()
        if not pid:
            status = 1
            try:
                r.watch.close()  # it is not its to end them
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        looks = helpers(r).looks.process
        assert looks is not None
        (tmpfs / "d1/e1/f1/file").read_text()
        assert {c.path for c in r.told()} == {str(tmpfs / "d1/e1/f1/file")}
        assert looks.poll() is None


def test_a_fork_while_helpers_start_holds_nothing_up(tmpfs: Path, pure: bool) -> None:
    (d,) = tree(tmpfs, 1)
    for _ in range(10):
        gate, go = os.pipe()
        with watching(tmpfs, kinds=KINDS, pure=pure) as r:
            # The scan has just begun, in a thread: its helper is being started.
            pid = os.fork()
            if not pid:
                os.close(go)
                os.read(gate, 1)
                os._exit(0)
            os.close(gate)
            scanned(r)
            (d / "file").read_text()
            assert {c.path for c in r.told()} == {str(d / "file")}
        os.close(go)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_file_that_a_starting_helper_closes_last(tmpfs: Path, pure: bool, ignored: bool) -> None:
    """Until exec a helper has what other threads have open: its close is the host's."""
    kinds = [*DEFAULT_KINDS, *OPENS]
    pids = [os.getpid()] if ignored else []
    with watching(tmpfs, kinds=kinds, ignore_pids=pids, pure=pure) as r:
        scanned(r)
        file = os.open(tmpfs / "f", os.O_CREAT | os.O_WRONLY)
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(theirs)
            os.read(ours, 1)
            os._exit(0)
        helpers(r).pids.add(pid)
        os.write(file, b"x")
        os.close(file)
        os.close(theirs)  # now it ends, and closes the file
        os.waitpid(pid, 0)
        os.close(ours)
        run("touch", str(tmpfs / "g"))
        told: list[fanwise.Change] = []
        while "written" not in {k for c in told if c.path == str(tmpfs / "g") for k in c.kinds}:
            told += r.watch.read(10)
        written = [c for c in told if c.path == str(tmpfs / "f") and "written" in c.kinds]
        assert [c.pid for c in written] == ([] if ignored else [os.getpid()])
        helpers(r).pids.discard(pid)
