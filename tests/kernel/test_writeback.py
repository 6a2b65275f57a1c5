"""Write-back errors told to a program that did not call fsync, on devices that really fail."""

import errno
import os
import resource
import select
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from fanwise import ClosedError, FeatureMissing, NoSuchRoot
from fanwise.health import _writeback, writeback_errors
from fanwise.health._below import Below
from fanwise.health._locate_child import above
from tests.kernel.conftest import own_instances, run, unmount
from tests.kernel.faults import small_tmpfs, volume

DATABASE = """
import os, sys
from fanwise.health._writeback import writeback_errors
with writeback_errors(sys.argv[1], tracefs=sys.argv[2]) as errors:
    fd = os.open(sys.argv[1], os.O_RDWR)
    os.pwrite(fd, b"z" * 8192, 0)
    print("written", flush=True)
    error = next(iter(errors))
    print(error.scope, error.errno, error.path, flush=True)
"""


def fill(point):
    (point / "db").mkdir()
    for name in ("db/table", "db/other", "elsewhere"):
        (point / name).write_bytes(b"x" * 65536)


@pytest.fixture(params=["ext4", "xfs"])
def disk(request, tmp_path):
    with volume(request.param, tmp_path, faulty=True, prepare=fill) as it:
        yield it


def break_file(it, name):
    it.faults.fail("write", errno.EIO, *it.extent(it.point / name))


def write_out(it, name, data=b"y" * 4096):
    """Write, without fsync: sync(1) of the machine would be slow, a sync of the range is not."""
    with open(it.point / name, "r+b") as file:
        file.write(data)
        file.flush()
        subprocess.run(["sync", "-f", str(it.point)], capture_output=True)


def test_a_database_that_never_calls_fsync_gets_its_eio(disk, tracefs):
    break_file(disk, "db/table")
    child = subprocess.Popen(
        [sys.executable, "-c", DATABASE, str(disk.point / "db/table"), tracefs],
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            assert child.stdout.readline() == "written\n"
            subprocess.run(["sync", "-f", str(disk.point)], capture_output=True)
            said = child.stdout.readline().split()
        finally:
            child.kill()  # or one that is told nothing is waited for
    assert said == ["object", str(errno.EIO), str(disk.point / "db/table")]


def test_another_files_error_is_not_told(disk, tracefs):
    break_file(disk, "db/other")
    with writeback_errors(disk.point / "db/table", tracefs=tracefs) as errors:
        write_out(disk, "db/other")
        assert [e for e in errors.wait(0.3) if e.scope != "fs"] == []


@pytest.mark.parametrize("how", ["tracing_on", "events/enable"])
def test_a_trace_that_somebody_switches_off_is_switched_on_again(disk, tracefs, how):
    break_file(disk, "db/table")
    with writeback_errors(disk.point / "db/table", tracefs=tracefs) as errors:
        Path(errors._trace.path, how).write_text("0")
        write_out(disk, "db/table")  # nobody hears of this
        ready, _, _ = select.select([errors.fileno()], [], [], 60)
        assert ready, "it is looked now and then, also for who waits with the descriptor"
        found = errors.wait(60)
        assert [(e.scope, e.count) for e in found] == [("lost", None)]
        write_out(disk, "db/table", b"z" * 4096)
        assert any(e.scope == "object" for e in errors.wait(60))


def test_who_iterates_is_told_that_the_trace_is_gone(disk, tracefs):
    errors = writeback_errors(disk.point / "db/table", tracefs=tracefs)
    with errors:
        trace = errors._trace
        trace._close_fds()  # nobody can remove it before
        os.rmdir(trace.path)
        quiet, end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        trace._fds = [quiet]
        with pytest.raises(FeatureMissing, match="trace instance is gone"):
            next(iter(errors))
    os.close(end)
    assert errors.state == "CLOSED"


def test_who_was_told_by_fsync(disk, tracefs):
    break_file(disk, "db/table")
    with writeback_errors(disk.point / "db/table", tracefs=tracefs) as errors:
        fd = os.open(disk.point / "db/table", os.O_RDWR)
        try:
            write_out(disk, "db/table")
            (error, *_) = [e for e in errors.wait(60) if e.scope == "object"]
            assert (error.errno, error.told, error.ino) == (errno.EIO, (), os.fstat(fd).st_ino)
            assert error.count >= 1
            assert error.length
            with pytest.raises(OSError, match="Input/output"):
                os.fsync(fd)
        finally:
            os.close(fd)
        (update,) = [e for e in errors.wait(60) if e.count == 0]
        assert [(told.pid, told.errno) for told in update.told] == [(os.getpid(), errno.EIO)]


def test_who_was_told_by_syncfs(disk, tracefs):
    break_file(disk, "db/table")
    path = disk.point / "db/table"
    with writeback_errors(path, syncfs=True, tracefs=tracefs) as errors:
        fd = os.open(path, os.O_RDWR)
        try:
            os.pwrite(fd, b"y" * 4096, 0)
            child = subprocess.Popen(["sync", "-f", str(path)], stderr=subprocess.DEVNULL)
            assert child.wait(60) == 1
        finally:
            os.close(fd)
        told = []
        for _ in range(120):
            told += [t for e in errors.wait(0.5) if e.scope == "object" for t in e.told]
            if told:
                break
        assert (told[0].how, told[0].pid, told[0].errno) == ("syncfs", child.pid, errno.EIO)


def test_a_device_without_room(tmp_path, tracefs):
    """A sparse image on a full tmpfs: what a thin pool does to who never calls fsync."""
    with (
        small_tmpfs(tmp_path / "small") as small,
        volume("ext4", tmp_path, image=small / "i", options="errors=continue") as it,
    ):
        (it.point / "db").mkdir()
        (it.point / "db/table").touch()
        with writeback_errors(it.point / "db", tracefs=tracefs) as errors:
            write_out(it, "db/table", os.urandom(12 << 20))
            found = errors.wait(60)
            while not any(error.scope == "object" for error in found):
                found = errors.wait(60)
                assert found, "nothing was told"
        (error,) = [error for error in found if error.scope == "object"]
        assert (error.errno, error.path) == (errno.ENOSPC, str(it.point / "db/table"))


NOBODY = """
import sys
from fanwise import PermissionNeeded
from fanwise.health._writeback import writeback_errors
try:
    writeback_errors("/", tracefs=sys.argv[1]).open()
except PermissionNeeded as error:
    print(type(error).__name__, error)
"""


def test_who_may_not_trace_is_told_what_it_takes(tracefs):
    # The tests' interpreter may be in a directory of root's.
    caps = "+dac_read_search"
    argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", f"--inh-caps={caps}",
            f"--ambient-caps={caps}", sys.executable, "-c", NOBODY, tracefs]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.stdout.startswith("PermissionNeeded /: write-back errors cannot be listened"), done
    assert "root" in done.stdout or "tracefs" in done.stdout


def test_metadata_is_the_filesystems(tmp_path, tracefs):
    """The block device's own inode failed: no file's data, and told as the filesystem's."""
    with volume("ext4", tmp_path, faulty=True, mkfs=("-O", "^has_journal"), prepare=fill) as it:
        with writeback_errors(it.point / "db/table", tracefs=tracefs) as errors:
            it.faults.fail("write", errno.EIO)
            (it.point / "new").mkdir()
            subprocess.run(["sync", "-f", str(it.point)], capture_output=True)
            found = errors.wait(60)
            it.faults.clear()
        assert {e.scope for e in found} == {"fs"}
        assert found[0].errno == errno.EIO
        assert found[0].ino is None


def send(below, file, errno=5, count=1):
    """An error of a file, as it is told when its path was found."""
    ways = above(os.fsencode(file))
    ino = file.stat().st_ino
    below.send(below.device, ino, str(file), above=ways, errno=errno, count=count)


def test_on_btrfs_a_number_is_of_a_subvolume(tmp_path, tracefs):
    def prepare(point):
        fill(point)
        run("btrfs", "subvolume", "create", str(point / "sub"))
        for _ in range(20):  # until the numbers are alike
            name = point / "sub" / f"f{_}"
            name.write_bytes(b"x" * 65536)
            if name.stat().st_ino == (point / "elsewhere").stat().st_ino:
                break

    with volume("btrfs", tmp_path, faulty=True, prepare=prepare) as it:
        ino = os.stat(it.point / "elsewhere").st_ino
        twins = [n for n in (it.point / "sub").iterdir() if n.stat().st_ino == ino]
        with writeback_errors(it.point / "db/table", tracefs=tracefs) as errors:
            it.faults.fail("write", errno.EIO)
            write_out(it, "db/table", b"y" * 65536)
            found = errors.wait(60)
            assert "object" in {e.scope for e in found} or "unplaced" in {e.scope for e in found}
            it.faults.clear()
        with Below(it.point / "elsewhere") as below:
            send(below, twins[0])
            assert below.read() == [], "the same number in another subvolume"
            send(below, it.point / "elsewhere")
            assert [s.scope for s in below.read()] == ["object"]
            below.send(below.device, ino, None, errno=5)
            assert [s.scope for s in below.read()] == ["unplaced"]


def test_files_below_a_directory_and_none_beside_it(disk, tracefs):
    for name in ("db/other", "elsewhere"):
        break_file(disk, name)
    with writeback_errors(disk.point / "db", tracefs=tracefs) as errors:
        write_out(disk, "elsewhere")
        assert [e for e in errors.wait(0.5) if e.scope != "fs"] == []
        write_out(disk, "db/other")
        found = [e for e in errors.wait(60) if e.scope == "object"]
        assert {e.path for e in found} == {str(disk.point / "db/other")}


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_in_a_loop(tmp_path, tracefs, backend):
    async def main():
        with writeback_errors(it.point / "db/table", tracefs=tracefs) as errors:
            await anyio.to_thread.run_sync(write_out, it, "db/table")
            with anyio.fail_after(60):
                return await anext(errors)

    with volume("ext4", tmp_path, faulty=True, prepare=fill) as it:
        break_file(it, "db/table")
        error = anyio.run(main, backend=backend)
    assert (error.scope, error.errno) == ("object", errno.EIO)


def test_without_a_descriptor_left_it_says_so_and_leaves_nothing(tmpfs, tracefs, monkeypatch):
    """However far it comes; what looks the path up is done before."""
    below = Below(tmpfs)
    monkeypatch.setattr(_writeback, "Below", lambda path: below)
    with writeback_errors(tmpfs, tracefs=tracefs):
        pass  # what is imported and opened once, is
    fds = len(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free, said = 0, set()
    while free < 100:
        below = Below(tmpfs)
        errors = writeback_errors(tmpfs, tracefs=tracefs, syncfs=True)
        at = os.open("/", os.O_PATH)  # the lowest that is free
        os.close(at)
        resource.setrlimit(resource.RLIMIT_NOFILE, (at + free, limits[1]))
        try:
            errors.open()
            break
        except FeatureMissing as error:
            said.add((error.reason.partition(":")[0], "Too many open files" in error.reason))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert own_instances(tracefs) == []
        assert len(os.listdir("/proc/self/fd")) <= fds
        free += 1
    errors.close()
    assert own_instances(tracefs) == []
    assert len(os.listdir("/proc/self/fd")) <= fds
    assert said == {
        ("write-back errors cannot be listened to", True),
        ("it cannot be listened to who syncfs tells", True),
        ("write-back errors cannot be waited for", True),
    }


def test_a_forked_child_has_none_of_it(tmpfs, tracefs):
    with writeback_errors(tmpfs, tracefs=tracefs) as errors:
        held = [errors.fileno(), errors._timer, *errors._trace.filenos()]
        links = [os.readlink(f"/proc/self/fd/{fd}") for fd in held]
        pid = os.fork()
        if pid == 0:
            status = 2
            try:
                left = [fd for fd in held if os.path.exists(f"/proc/self/fd/{fd}")]
                with pytest.raises(ClosedError):
                    errors.read()
                errors.close()
                status = 1 if left else 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert [os.readlink(f"/proc/self/fd/{fd}") for fd in held] == links
        assert errors.wait(0) == []


def test_without_tracefs_it_says_what_to_do(tmp_path):
    with pytest.raises(FeatureMissing, match="write-back errors cannot be listened to"):
        writeback_errors(tmp_path, tracefs=str(tmp_path)).open()
    with pytest.raises(NoSuchRoot):
        writeback_errors(tmp_path / "none").open()


def test_below_a_bind_mount(tmp_path):
    """Object errors of the subtree, the filesystem's marked as such, and nobody else's."""
    with volume("ext4", tmp_path, prepare=fill) as it:
        bound = tmp_path / "bound"
        bound.mkdir()
        run("mount", "--bind", str(it.point / "db"), str(bound))
        try:
            with Below(bound) as below:
                device = below.device
                table, other = (
                    os.stat(it.point / name).st_ino for name in ("db/table", "elsewhere")
                )
                send(below, it.point / "elsewhere")
                assert below.read() == []
                send(below, it.point / "db/table", errno=117, count=2)
                below.send(device, None, None, errno=5)
                (seen,) = below.read()
                assert (seen.scope, seen.ino, seen.errno, seen.count) == ("object", table, 117, 3)
                below.send(device, None, None, errno=5)
                assert [s.scope for s in below.read()] == ["fs"]
                below.send(device, other, None, errno=5)
                below.send("1:1", None, None, errno=5)
                below.lost(None)
                assert [s.scope for s in below.read()] == ["unplaced", "lost"]
        finally:
            unmount(bound)
