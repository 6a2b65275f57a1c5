"""Inode to path on real filesystems: cold, with hard links, in subvolumes, gone, hanging."""

import contextlib
import os
import select
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from fanwise import NoSuchRoot
from fanwise.health import _locate
from fanwise.health._helpers import end, reap
from fanwise.health._incident import Filesystem
from fanwise.health._locate import MARGIN, SECONDS, Locate, Paths, Question
from fanwise.health._selection import Selection
from fanwise.health._target import _stuck, targets
from fanwise.kernel.handles import name_to_handle
from tests.kernel.conftest import loop_device, mounted, run, unmount
from tests.kernel.faults import Volume, volume


def answer(locate, tag, most=60):
    """Wait for one answer, as a loop would."""
    end = time.monotonic() + most
    while time.monotonic() < end:
        for one in locate.results():
            if one.tag == tag:
                return one
        until = locate.until
        wait = 0.05 if until is None else max(0.0, min(0.5, until - time.monotonic()))
        select.select(locate.filenos(), [], [], wait)
    raise AssertionError("no answer")


def ask(it, path_or_ino, ways=("handle", "filesystem", "search"), **more):
    limits = {k: more.pop(k) for k in ("seconds", "entries", "model") if k in more}
    ino = path_or_ino if isinstance(path_or_ino, int) else os.lstat(path_or_ino).st_ino
    with Locate(**limits) as locate:
        locate.submit(
            Question(
                tag="q",
                device=device_of(it),
                fstype=it.kind,
                point=os.fsencode(it.point),
                ino=ino,
                ways=ways,
                **more,
            )
        )
        return answer(locate, "q")


def device_of(it):
    return "{}:{}".format(*it.entry().dev)


def fill(point):
    (point / "a/b").mkdir(parents=True)
    (point / "a/b/file").write_text("x" * 5000)
    (point / "a/one").write_text("y")
    os.link(point / "a/b/file", point / "a/hard")


@pytest.fixture(params=["ext4", "xfs", "btrfs"])
def disk(request, tmp_path):
    with volume(request.param, tmp_path, prepare=fill) as it:
        yield it


def numbers(it, *names):
    """Inode numbers, and the caches cold again."""
    found = [os.lstat(it.point / name).st_ino for name in names]
    with it.unmounted():
        pass
    return found


def paths(it, *names):
    return {os.fsencode(it.point / name) for name in names}


def test_on_cold_caches_a_path_is_found(disk):
    one, both, folder = numbers(disk, "a/one", "a/b/file", "a/b")
    single = ask(disk, one)
    assert set(single.paths) == paths(disk, "a/one")
    assert single.source == ("filesystem" if disk.kind == "btrfs" else "search")
    with disk.unmounted():
        pass
    assert set(ask(disk, both).paths) == paths(disk, "a/b/file", "a/hard"), "all hard links"
    with disk.unmounted():
        pass
    directory = ask(disk, folder, ways=("handle", "filesystem"))
    assert set(directory.paths) == paths(disk, "a/b"), "a directory's handle is enough when cold"
    assert directory.source == ("handle" if disk.kind == "ext4" else "filesystem")


def test_a_cached_entry_is_found_by_its_handle(disk):
    key = name_to_handle(disk.point / "a/one")[0]
    found = ask(disk, disk.point / "a/one", key=key)
    assert (set(found.paths), found.source) == (paths(disk, "a/one"), "handle")


def test_xfs_tells_the_generation(tmp_path):
    with volume("xfs", tmp_path, prepare=fill) as it:
        path = it.point / "a/one"
        generation = int.from_bytes(name_to_handle(path)[0][12:16], "little")
        found = ask(it, path)
        assert (found.source, found.gen) == ("filesystem", generation)
        assert ask(it, path, gen=generation).source == "handle"


def test_what_is_deleted_says_so(disk):
    (ino,) = numbers(disk, "a/one")
    os.unlink(disk.point / "a/one")
    os.sync()
    found = ask(disk, ino)
    assert found.paths == ()
    assert found.source is None
    assert found.reason


def test_what_is_deleted_and_still_open_is_not_searched_for(tmp_path):
    with volume("ext4", tmp_path, prepare=fill) as it:
        with open(it.point / "a/one") as file:
            os.unlink(file.name)
            found = ask(it, os.fstat(file.fileno()).st_ino)
        assert found.reason == "handle: it is deleted, and has no name any more"


def test_subvolumes_and_a_number_that_several_have(tmp_path):
    with volume("btrfs", tmp_path) as it:
        for name in ("sub", "dir/deep"):
            (it.point / name).parent.mkdir(exist_ok=True)
            run("btrfs", "subvolume", "create", str(it.point / name))
            (it.point / name / "file").write_text(name)
        ino = os.stat(it.point / "sub/file").st_ino
        assert os.stat(it.point / "dir/deep/file").st_ino == ino
        key = name_to_handle(it.point / "dir/deep/file")[0]
        with it.unmounted():
            pass
        found = ask(it, ino)
        assert found.ambiguous
        assert paths(it, "sub/file", "dir/deep/file") <= set(found.paths)
        with it.unmounted():
            pass
        exact = ask(it, ino, key=key)
        assert set(exact.paths) == paths(it, "dir/deep/file")
        assert not exact.ambiguous


def test_a_broken_inode_is_found_by_its_name(tmp_path):
    with volume("ext4", tmp_path, prepare=fill) as it:
        ino = os.stat(it.point / "a/one").st_ino
        with it.unmounted():
            it.debugfs(f"set_inode_field <{ino}> mode 0")
        with pytest.raises(OSError, match="one"):
            os.stat(it.point / "a/one")
        found = ask(it, ino)
        assert (found.source, set(found.paths)) == ("search", paths(it, "a/one"))
        assert found.reason == "handle: it is gone, or broken; filesystem: ext4 has none"


def test_a_search_is_bounded_and_stays_on_its_filesystem(tmp_path):
    with volume("ext4", tmp_path / "one", prepare=fill) as it:
        for number in range(300):
            (it.point / f"f{number}").touch()
        found = ask(it, 1 << 30, ways=("search",), entries=200)
        assert found.reason == "search: not among 200 entries of names"
        found = ask(it, 1 << 30, ways=("search",), seconds=0.0)
        assert found.reason == "search: not among 0.0 seconds of names"
        found = ask(it, 1 << 30, ways=("search",))
        assert found.reason == "search: no name leads to it"
        with mounted("tmpfs", it.point / "a" / "b"):
            other = it.point / "a/b/tmpfs-mnt"
            (other / "far").touch()
            ino = os.stat(other / "far").st_ino
            assert ask(it, ino, ways=("search",)).paths == () or ino < 1000


def test_what_lies_over_the_mount_point_is_not_searched(tmp_path):
    """Or below it, when it was unmounted meanwhile: its numbers are others."""
    with (
        volume("ext4", tmp_path / "one", prepare=fill) as it,
        volume("ext4", tmp_path / "two", prepare=fill) as other,
    ):
        ino, device = os.stat(it.point / "a/one").st_ino, device_of(it)
        assert ino == os.stat(other.point / "a/one").st_ino
        with Locate() as locate:
            locate.submit(
                Question(
                    tag="q", device=device, fstype="ext4", point=os.fsencode(other.point), ino=ino
                )
            )
            found = answer(locate, "q")
        assert (found.paths, found.reason) == ((), "another filesystem is mounted there")


def test_a_model_answers_at_once(tmp_path):
    with volume("ext4", tmp_path, prepare=fill) as it:
        known = {12: "/as/the/model/says"}
        model = lambda device, ino, key: known.get(ino)  # noqa: E731
        found = ask(it, 12, model=model)
        assert (found.paths, found.source) == ((b"/as/the/model/says",), "model")
        assert ask(it, it.point / "a/one", model=model).source == "handle"


def reading(it):
    """Wait until somebody reads, and hangs."""
    until = time.monotonic() + 60
    while not it.faults.hits():
        assert time.monotonic() < until
        time.sleep(0.02)  # the server is asked


@contextmanager
def hanging(tmp_path):
    with volume("ext4", tmp_path, faulty=True, prepare=fill) as it:
        ino = os.stat(it.point / "a/one").st_ino
        with it.unmounted():
            pass
        it.faults.hang("read")
        try:
            yield it, ino
        finally:
            it.faults.clear()


def test_whose_bytes_of_the_device_are(tmp_path):
    with volume("xfs", tmp_path, prepare=fill, mkfs=("-m", "rmapbt=1")) as it:
        first, last = it.extent(it.point / "a/b/file")
        found = ask(it, 0, ("search",), start=last - 512)
        assert found.paths  # one of its names
        assert set(found.paths) <= paths(it, "a/b/file", "a/hard")
        found = ask(it, 0, ("search",), start=0)
        assert (found.paths, "no file has the bytes" in found.reason) == ((), True)
        # Of a request over several files it is not known which one it was for.
        (it.point / "other").write_text("z" * 5000)
        os.sync()
        start, end = it.extent(it.point / "other")
        both = min(first, start), max(last, end)
        found = ask(it, 0, ("search",), start=both[0], length=both[1] - both[0])
        assert (found.paths, "of several files" in found.reason) == ((), True)
    with volume("ext4", tmp_path / "2", prepare=fill) as it:
        assert "ext4 tells no owner" in ask(it, 0, ("search",), start=4096).reason


def test_whose_bytes_of_the_whole_disk_are(tmp_path, cannot_run):
    """A failed request names the disk, also where the filesystem is on a partition of it."""
    image = tmp_path / "disk.img"
    with open(image, "wb") as file:
        file.truncate(400 << 20)
        entry = struct.pack("<B3sB3sII", 0, b"", 0x83, b"", 4096, (390 << 20) // 512)
        file.seek(446)
        file.write(entry + bytes(48) + b"\x55\xaa")
    with loop_device(image) as disk:
        run("partx", "--add", disk)
        part, point = f"{disk}p1", tmp_path / "mnt"
        try:
            if not os.path.exists(part):
                cannot_run("a partition has no device node here")
            run("mkfs.xfs", "-q", "-f", "-m", "rmapbt=1", part)
            point.mkdir()
            run("mount", part, str(point))
            try:
                fill(point)
                it = Volume("xfs", image, part, point, "")
                subprocess.run(["sync", "-f", str(point)], check=True)
                inside, _ = it.extent(point / "a/b/file")
                found = ask(it, 0, ("search",), start=4096 * 512 + inside)
                assert found.paths
                assert set(found.paths) <= paths(it, "a/b/file", "a/hard")
                assert ask(it, 0, ("search",), start=inside).paths == ()
            finally:
                unmount(point)
        finally:
            run("partx", "--delete", disk)


def test_a_helper_that_hangs_is_told_and_nothing_waits(tmp_path):
    with hanging(tmp_path) as (it, ino):
        fs = {"device": device_of(it), "fstype": "ext4", "point": os.fsencode(it.point)}
        late = []
        with Locate(clock=lambda: time.monotonic() + sum(late)) as locate:
            begin = time.monotonic()
            for tag in ("first", "second"):
                locate.submit(Question(tag=tag, ino=ino, **fs))
            assert time.monotonic() - begin < 0.5
            assert len(locate._helpers) == 1, "one helper a filesystem"
            reading(it)
            late.append(SECONDS + MARGIN)
            one = answer(locate, "first")
            assert one.hung
            assert "hangs" in one.reason
            assert locate.hung == [fs["device"]]
            locate.submit(Question(tag="third", ino=ino, **fs))
            third = answer(locate, "third")
            assert third.hung, "no second helper beside one that hangs"
            process = locate._helpers[fs["device"]].process
            assert process.poll() is None
            it.faults.clear()
            process.wait(60)
            locate.submit(Question(tag="fourth", ino=ino, **fs))
            assert answer(locate, "fourth").paths == tuple(paths(it, "a/one"))
            assert locate.hung == []


def test_closing_does_not_wait_for_one_that_hangs(tmp_path):
    with hanging(tmp_path) as (it, ino):
        locate = Locate()
        locate.submit(
            Question(
                tag="q",
                device=device_of(it),
                fstype="ext4",
                point=os.fsencode(it.point),
                ino=ino,
                ways=("search",),
            )
        )
        pid = locate._helpers[device_of(it)].process.pid
        reading(it)
        begin = time.monotonic()
        locate.close()
        locate.close()
        assert time.monotonic() - begin < 2
        it.faults.clear()
        until = time.monotonic() + 60
        while os.path.exists(f"/proc/{pid}"):  # reaped, when another one begins or ends
            assert time.monotonic() < until
            reap()
            time.sleep(0.02)


def test_closing_waits_for_one_that_only_needs_the_processor(monkeypatch):
    """A zombie that nobody reaps stays for as long as the host lives."""
    helper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
    times = iter([False, False, True])

    def late(seconds):
        if not next(times):
            raise subprocess.TimeoutExpired("", seconds)
        return wait(60)

    wait = helper.wait
    monkeypatch.setattr(helper, "wait", late)
    end(helper)
    assert helper.returncode == -9
    assert not os.path.exists(f"/proc/{helper.pid}")
    helper.stdin.close()


def test_a_helper_that_is_killed_is_an_answer(tmp_path):
    with hanging(tmp_path) as (it, ino), Locate() as locate:
        locate.submit(
            Question(
                tag="q", device=device_of(it), fstype="ext4", point=os.fsencode(it.point), ino=ino
            )
        )
        process = locate._helpers[device_of(it)].process
        process.kill()
        it.faults.clear()
        assert answer(locate, "q").reason == "the helper ended without an answer"


def test_incidents_are_completed(tmp_path):
    with volume("ext4", tmp_path, prepare=fill) as it:
        (ino,) = numbers(it, "a/one")
        fs = SimpleNamespace(device=device_of(it), fstype="ext4", mounts=(str(it.point),))
        locator = Paths()
        try:
            for id_, number in (("inc", ino), ("none", 1 << 30)):
                locator.locate(
                    SimpleNamespace(
                        id=id_, fs=fs, state="ok", object=SimpleNamespace(ino=number, gen=0)
                    )
                )
            found = []
            end = time.monotonic() + 60
            while time.monotonic() < end and not (found and locator.reasons):
                select.select(locator.filenos(), [], [], 0.1)
                found += locator.found()
            assert found == [("inc", (str(it.point / "a/one"),), "search", False)]
            assert "no name leads to it" in locator.reasons["none"]
        finally:
            locator.close()


def test_the_helper_stands_back(tmp_path):
    """Its disk requests are on the idle class, and it is nice."""
    with hanging(tmp_path) as (it, ino), Locate() as locate:
        locate.submit(
            Question(
                tag="q", device=device_of(it), fstype="ext4", point=os.fsencode(it.point), ino=ino
            )
        )
        pid = locate._helpers[device_of(it)].process.pid
        reading(it)
        assert os.getpriority(os.PRIO_PROCESS, pid) == 19
        said = subprocess.run(["ionice", "-p", str(pid)], capture_output=True, text=True)
        assert said.stdout.strip().startswith("idle")
        it.faults.clear()


@pytest.fixture
def let_go(tmp_path, monkeypatch):
    """Helpers that look for paths begin when they are let go: so many, or all there will be."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    waiting = tmp_path / "waiting"
    waiting.write_text(f'#!/bin/sh\nread line <"{gate}"\nexec "{sys.executable}" "$@"\n')
    waiting.chmod(0o755)

    @contextmanager
    def closed():
        monkeypatch.setattr(_locate, "sys", SimpleNamespace(executable=str(waiting)))
        fd = os.open(gate, os.O_RDWR)
        try:
            yield lambda number=1000: os.write(fd, b"\n" * number)
        finally:
            os.close(fd)
            monkeypatch.undo()

    return closed


def test_a_path_on_what_hangs_is_known_by_its_name(tmp_path, let_go):
    with volume("ext4", tmp_path, faulty=True, prepare=fill) as it:
        with it.unmounted():
            pass
        it.faults.hang("read")
        try:
            before = time.monotonic()
            hung, above, other = targets([it.point / "a/b", it.point, tmp_path], 1.0)
            assert time.monotonic() - before < 3
        finally:
            it.faults.clear()
        assert (hung.key, hung.path, hung.device) == (None, str(it.point / "a/b"), above.device)
        assert (above.whole, other.key) == (True, None)
        assert [one.hung for one in (hung, above, other)] == [True, False, False]
        for _ in range(100):
            assert targets([it.point], 60.0)[0].key
            if not _stuck:
                break
        assert not _stuck, "it is reaped once it can be"
        fs = Filesystem(device=hung.device, fstype="ext4", mounts=(str(it.point),))
        incident = SimpleNamespace(
            fs=fs, scope="inode", object=SimpleNamespace(ino=99, path=str(it.point / "a/b/c"))
        )
        with let_go() as go, contextlib.closing(Selection([it.point / "a/b"], 60.0)) as selection:
            assert selection.applies(incident) == "unknown"
            go()
            selection.settle(60)
            assert selection.applies(incident) == "object"


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(NoSuchRoot):
        targets([tmp_path / "none"])


def test_an_answer_that_comes_while_another_is_asked_for_is_not_overlooked(tmp_path, let_go):
    with volume("ext4", tmp_path, prepare=fill) as it:
        fs = Filesystem(device=device_of(it), fstype="ext4", mounts=(str(it.point),))

        def incident(path):
            return SimpleNamespace(
                fs=fs, scope="inode", object=SimpleNamespace(ino=99, path=str(it.point / path))
            )

        with let_go() as go, contextlib.closing(Selection([it.point / "a/b"], 60.0)) as selection:
            assert selection.applies(incident("a/b/file")) == "unknown"
            go(1)
            select.select(selection.filenos(), (), (), 60)
            assert selection.applies(incident("a/one")) == "unknown"
            go()
            for n in range(100):
                if not selection.places(incident("a/b/file")):
                    break
                select.select(selection.filenos(), (), (), 0.1)
                selection.applies(incident(f"a/none{n}"))
            assert selection.placed()
            assert selection.applies(incident("a/b/file")) == "object"
            selection.settle(60)
            assert selection.applies(incident("a/one")) == "elsewhere"
