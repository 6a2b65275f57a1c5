"""The engine on real filesystems, in this process: many at once, and hostile company."""

import contextlib
import errno
import os
import re
import select
import subprocess
import threading
import time

import msgspec
import pytest

from fanwise import FanwiseError, config, health
from fanwise.health import _engine, _places as places
from fanwise.health._engine import Engine, Sources
from fanwise.health._follow import said
from fanwise.health._incident import Incident, Object
from fanwise.health._keeping import Keeping
from fanwise.health._locate import MARGIN, SECONDS, Paths
from fanwise.health._observe import Observation
from fanwise.health._places import Keeper
from fanwise.health._probe import Finding
from fanwise.health._probe_child import look as look_at
from fanwise.kernel import fanotify as fan
from tests.kernel.conftest import run
from tests.kernel.faults import code_of, counted, fsync, read, volume

OK = Finding("ok")
SETTINGS = msgspec.structs.replace(config.Health(), counters=0.5, probe=0.3)


class Listener:
    """An engine with a database of its own, and what it told."""

    def __init__(self, engine):
        self.engine = engine
        self.incidents = {}
        self.sources = {}

    def until(self, wanted, seconds=60.0):
        """Read until it holds, or fail with what there is."""
        until = time.monotonic() + seconds
        while not wanted(self):
            assert time.monotonic() < until, (self.incidents, self.sources)
            self.take(self.engine.read(0.2))
        return self

    def take(self, told):
        for one in told:
            if isinstance(one, Sources):
                self.sources = one.sources
            else:
                self.incidents[one.id] = one

    def open(self):
        return [one for one in self.incidents.values() if one.status == "open"]

    def total(self):
        return sum(one.total for one in self.open())


@contextlib.contextmanager
def listening(where, *points, trace=True, settings=SETTINGS, deadline=60.0, locator=None):
    with contextlib.ExitStack() as stack:
        tracefs = where / "tracefs"
        tracefs.mkdir(exist_ok=True)
        if trace:
            run("mount", "-t", "tracefs", "fanwise-test", str(tracefs))
            stack.callback(run, "umount", "--lazy", str(tracefs))
        engine = Engine(
            Keeping(Keeper(where / "state" / "health.db", where / "second.db")),
            settings,
            points=[os.fsencode(point) for point in points],
            locator=locator or Paths(),
            tracefs=str(tracefs),
            deadline=deadline,
        )
        stack.callback(engine.close)
        engine.open()
        it = Listener(engine)
        it.sources = engine.states()
        yield it


def tree(point):
    (point / "d").mkdir()
    for name in ("f", "g"):
        (point / "d" / name).write_text("x" * 9000)


def test_forty_filesystems(tmp_path):
    with contextlib.ExitStack() as stack:
        volumes = [
            stack.enter_context(
                volume("ext4", tmp_path / str(n), size=8 << 20, mkfs=("-O", "^has_journal"))
            )
            for n in range(40)
        ]
        at = stack.enter_context(listening(tmp_path, *(v.point for v in volumes)))
        for _ in range(3):
            for it in volumes:
                it.trigger()
        at.until(lambda at: [one.total for one in at.open()] == [3] * 40)
        assert {one.fs.mounts[0] for one in at.open()} == {str(v.point) for v in volumes}
        for it in volumes:
            counted(it, 3)
        assert len({one.fs.uuid for one in at.open()}) == 40


def test_a_queue_that_somebody_else_filled(tmp_path):
    with volume("ext4", tmp_path, size=128 << 20, mkfs=("-N", "40000")) as it:
        flags = fan.FAN_CLASS_NOTIF | fan.FAN_NONBLOCK | fan.FAN_CLOEXEC
        other = fan.init(flags | fan.FAN_REPORT_DFID_NAME_TARGET)
        try:
            mask = fan.FAN_CREATE | fan.FAN_FS_ERROR
            fan.mark(other, fan.FAN_MARK_ADD | fan.FAN_MARK_FILESYSTEM, mask, path=str(it.point))
            with listening(tmp_path, it.point) as at:
                for n in range(16_500):  # fs.fanotify.max_queued_events is 16,384
                    os.close(os.open(it.point / f"n{n}", os.O_CREAT | os.O_WRONLY))
                for _ in range(8):
                    it.trigger()
                at.until(lambda at: [one.count_source for one in at.open()] == ["fserror"])
                at.until(lambda at: at.total() == 8)
                assert at.open()[0].count_source == "fserror"
                assert at.open()[0].lost == 0
                counted(it, 8)
        finally:
            os.close(other)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_broken_before_its_mount_was_noticed(tmp_path, kind):
    """What no counter counts, of a filesystem that was not there at the last look."""
    with (
        volume(kind, tmp_path, faulty=True, prepare=tree) as it,
        listening(tmp_path, it.point) as at,
    ):
        it.unmount()
        at.until(lambda at: not at.engine.filesystems.known)
        it.mount()
        it.faults.fail("write", errno.EIO, *it.extent(it.point / "d/f"))
        assert code_of(lambda: fsync(it.point / "d/f", b"y" * 4096)) == "EIO"
        at.until(lambda at: any(one.operation == "data write-back" for one in at.open()))
        (it_was,) = [one for one in at.open() if one.operation == "data write-back"]
        assert "trace" in it_was.channels
        assert (it_was.fs.mounts, it_was.fs.fstype) == ((str(it.point),), kind)


def test_whose_data_could_not_be_read(tmp_path):
    """The device alone tells of it; xfs knows whose the bytes are, when it was made so."""
    with (
        volume("xfs", tmp_path, faulty=True, prepare=tree, mkfs=("-m", "rmapbt=1")) as it,
        listening(tmp_path, it.point) as at,
    ):
        it.faults.fail("read", errno.EIO, *it.extent(it.point / "d/g"))
        assert code_of(lambda: read(it.point / "d/g")) == "EIO"
        at.until(lambda at: any(one.object.path for one in at.open()))
        (one,) = at.open()
        assert (one.scope, one.operation, one.errno) == ("device", "block read", "EIO")
        assert one.object.path == str(it.point / "d/g")


def test_whose_data_could_not_be_read_is_not_known(tmp_path):
    locator = Paths()
    with (
        volume("xfs", tmp_path, faulty=True, prepare=tree, mkfs=("-m", "rmapbt=0")) as it,
        listening(tmp_path, it.point, locator=locator) as at,
    ):
        it.faults.fail("read", errno.EIO, *it.extent(it.point / "d/g"))
        assert code_of(lambda: read(it.point / "d/g")) == "EIO"
        at.until(lambda at: locator.reasons)
        (one,) = at.open()
        assert "rmapbt" in locator.reasons[one.id]
        assert one.object.path is None


def test_what_tells_that_ext4_was_checked(tmp_path):
    """Mounts are counted since the check, and each mount is a life of its own."""

    def checked():
        return look_at("ext4", str(it.point), "checked")["checked"]

    with volume("ext4", tmp_path) as it:
        first = checked()
        assert abs(first["at"] - time.time()) < 60
        assert first["life"] == os.stat(f"/sys/fs/ext4/{it.name}").st_ino
        assert (first["writable"], checked()) == (True, first)
        with it.unmounted():
            pass
        second = checked()
        assert second["mounts"] == first["mounts"] + 1
        assert second["life"] != first["life"]
        it.unmount()
        subprocess.run(["e2fsck", "-fy", it.device], capture_output=True)
        it.mount("ro")
        third = checked()
        assert (third["mounts"], third["writable"]) == (0, False)
        assert third["at"] >= first["at"]
        run("mount", "-o", "remount,rw", str(it.point))
        assert checked() == third | {"mounts": 1, "writable": True}


def test_unmounted_with_a_report_pending(tmp_path):
    with volume("ext4", tmp_path) as it, listening(tmp_path, it.point) as at:
        it.trigger()
        it.trigger()
        it.unmount()
        at.until(lambda at: at.total() == 2)
        assert at.open()[0].fs.mounts == (str(it.point),)
        it.mount()
        it.trigger()
        at.until(lambda at: [one.total for one in at.open()] == [3])
        counted(it, 3)


def test_mounted_again_when_the_counters_are_read(tmp_path):
    """Who reads counters looks at the mounts too; what is new there is marked and asked."""
    with volume("ext4", tmp_path) as it, listening(tmp_path, it.point) as at:
        it.trigger()
        at.until(lambda at: at.total() == 1)
        it.unmount()
        it.mount()
        at.engine._count_all()
        assert at.engine.channels._fserror.followed() == {it.dev}
        at.until(lambda at: all(known.identified for known in known_to(at)))
        it.trigger()
        at.until(lambda at: at.total() == 2 and at.open()[0].count_source == "fserror")


def test_who_is_asked_is_known_by_its_mount_and_not_by_its_name(tmp_path):
    """Another is there when the helper has begun: unmounted meanwhile, or covered."""
    settings = msgspec.structs.replace(SETTINGS, probe=600.0)
    with (
        volume("ext4", tmp_path / "1") as it,
        volume("ext4", tmp_path / "2") as other,
        listening(tmp_path, it.point, other.point, settings=settings) as at,
    ):
        it.trigger()
        at.until(lambda at: at.total() == 1)
        (one,) = at.open()
        known = next(known for known in known_to(at) if known.dev == it.dev)
        at.until(lambda at: known.probe.idle)
        known.next = 0.0
        run("mount", "--bind", str(other.point), str(it.point))
        try:
            assert known in at.engine.filesystems.ask(time.monotonic(), 60.0)
            select.select([known.probe], [], [], 60)
            found = at.engine.filesystems.answers()
        finally:
            run("umount", str(it.point))
        (finding,) = (told for whose, told in found if whose is known)
        assert (finding.state, finding.uuid, finding.checked) == ("unknown", None, None)
        known.next = 0.0
        at.until(lambda at: known.next > 0.0 and known.probe.idle)
        assert [each.id for each in at.open()] == [one.id]
        assert known.fs.uuid == at.open()[0].fs.uuid == one.fs.uuid


def once(function, first):
    """The function; before it is called for the first time, ``first`` is."""
    todo = [first]

    def called(*args):
        if todo:
            todo.pop()()
        return function(*args)

    return called


@pytest.fixture
def two(tmp_path):
    """Two filesystems of an engine that was in the middle of something when they were mounted."""
    settings = msgspec.structs.replace(SETTINGS, counters=600.0, probe=600.0)
    with (
        volume("ext4", tmp_path / "1") as it,
        volume("xfs", tmp_path / "2") as other,
        listening(tmp_path, it.point, other.point, settings=settings) as at,
    ):
        it.trigger()
        at.until(lambda at: at.total() == 1)
        at.until(lambda at: all(k.probe.idle and k.due is None for k in known_to(at)))
        it.unmount()
        other.unmount()
        at.engine._mounts(look=False)
        yield at, it, other


def test_unmounted_while_another_is_identified(two, monkeypatch):
    """What waits for the name of one that went is told once."""
    at, it, other = two
    it.mount()
    other.mount()
    at.engine._mounts(look=False)
    one, gone = sorted(known_to(at), key=lambda known: known.dev != it.dev)
    for known in (one, gone):
        assert not known.identified
        assert select.select([known.probe], [], [], 60)[0]
    seen = Observation(
        channel="fserror", what="error", dev=other.dev, time=time.time(), scope="inode", ino=131,
        errno=errno.EUCLEAN,
    )  # fmt: skip
    gone.waiting.append(seen)
    monkeypatch.setattr(at.engine.filesystems, "answers", lambda: [(one, OK), (gone, OK)])
    monkeypatch.setattr(_engine, "read", once(_engine.read, other.unmount))
    at.engine._probes(time.monotonic())
    assert one.identified
    assert not gone.identified
    (ledger,) = (each for each in at.engine.correlator.ledgers() if each.dev == other.dev)
    assert [case.total for case in ledger.cases] == [1]


def test_mounted_while_no_helper_can_be_started(two, monkeypatch):
    at, it, other = two

    def none(*args):
        raise FanwiseError("no helper", "let more processes be")

    it.mount()
    monkeypatch.setattr(at.engine.filesystems, "ask", none)
    monkeypatch.setattr(_engine, "read", once(_engine.read, other.mount))
    at.engine._turn()
    assert {known.dev for known in known_to(at) if known.identified} == {it.dev, other.dev}


def known_to(at):
    return list(at.engine.filesystems.known.values())


def test_a_counter_that_was_behind_is_read_again(tmp_path, monkeypatch):
    """The work queue that moves it comes when it likes; the timer here never does."""
    real, behind = _engine.read, []

    def late(place):
        return behind.pop() if behind else real(place)

    monkeypatch.setattr(_engine, "read", late)
    settings = msgspec.structs.replace(SETTINGS, counters=600.0)
    with volume("ext4", tmp_path) as it, listening(tmp_path, it.point, settings=settings) as at:
        behind.append(real(known_to(at)[0].place))
        it.trigger()
        counted(it, 1)
        at.until(lambda at: not behind)
        (ledger,) = at.engine.correlator.ledgers()
        at.until(lambda at: ledger.counter == 1)
        assert at.total() == 1


def test_who_reads_the_database_knows_what_is_listened_to_when_it_is_open(tmp_path, monkeypatch):
    do = Keeper.do

    def late(self, job):
        time.sleep(0.2)  # a disk
        return do(self, job)

    monkeypatch.setattr(Keeper, "do", late)
    with volume("xfs", tmp_path) as it, listening(tmp_path, it.point) as at:
        incidents = places.read(tmp_path / "state" / "health.db", tmp_path / "second.db")
        try:
            told = said(incidents)
            assert (told.pid, told.points) == (os.getpid(), (str(it.point),))
            assert told.sources.keys() == at.engine.states().keys()
        finally:
            incidents.store.close()


def test_a_counter_that_is_garbage(tmp_path):
    with volume("ext4", tmp_path) as it, listening(tmp_path, it.point) as at:
        garbage = tmp_path / "garbage"
        garbage.write_bytes(b"\xff\x00 many\n")
        file = f"/sys/fs/ext4/{it.name}/errors_count"
        run("mount", "--bind", str(garbage), file)
        try:
            at.until(lambda at: at.sources["counters"].state == "degraded")
            assert file in at.sources["counters"].reason
            it.trigger()
            at.until(lambda at: at.total() == 1)
            assert at.open()[0].at_least is False or "fserror" in at.open()[0].channels
        finally:
            run("umount", file)
        counted(it, 1)
        at.until(lambda at: at.sources["counters"].state == "up")
        assert at.total() == 1


def test_a_trace_line_that_is_cut_short(tmp_path):
    with volume("ext4", tmp_path) as it, listening(tmp_path, it.point) as at:
        trace = at.engine.channels._trace
        # The kernel's pipe goes, and another brings what the kernel would never write.
        ours, theirs = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.dup2(ours, trace.filenos()[0], inheritable=False)
        os.close(ours)
        try:
            line = b" python-1 [000] ..... 12.5: ext4_error: dev 7,1 function f line 1\n"
            os.write(theirs, b"\xff\n" + line[:40] + b"\n" + b" => \n" + line[:30])
            it.trigger()
            at.until(lambda at: at.total() == 1)
            at.until(lambda at: at.sources["trace"].state == "degraded")
            assert "no sense" in at.sources["trace"].reason
        finally:
            os.close(theirs)


def test_a_source_that_breaks_is_down_and_the_others_go_on(tmp_path):
    with volume("ext4", tmp_path) as it, listening(tmp_path, it.point) as at:
        broken = at.engine.channels._trace
        root = os.open("/", os.O_RDONLY)
        os.dup2(root, broken.filenos()[0])  # a directory: EISDIR at each read
        os.close(root)
        it.trigger()
        at.until(lambda at: any("fserror" in one.channels for one in at.open()))
        at.until(lambda at: at.total() == 1)
        # It is opened anew, as soon as that can be done.
        at.until(lambda at: at.engine.channels._trace not in (None, broken))
        at.until(lambda at: at.sources["trace"].state == "up")
        assert broken.state == "CLOSED"


def test_a_filesystem_that_does_not_answer(tmp_path):
    with (
        volume("ext4", tmp_path, faulty=True, mkfs=("-O", "^has_journal")) as it,
        listening(tmp_path, it.point, deadline=0.5) as at,
    ):
        # The superblock is written by whoever meets an error, and never gets there; meanwhile its
        # buffer is locked, which the label is read from.
        meeting = threading.Thread(target=it.trigger)
        try:
            it.faults.hang("write")
            meeting.start()
            at.until(lambda at: any(one.state == "hung" for one in at.open()))
            at.until(lambda at: sum(one.total for one in at.open() if one.errno == "EUCLEAN") == 1)
        finally:
            it.faults.clear()
            meeting.join()
        at.until(lambda at: not any(one.state == "hung" for one in at.open()))


def test_a_search_that_does_not_return(tmp_path):
    """The root is in memory, so the probe gets an answer; what looks for a path gets none."""
    late = []
    locator = Paths(clock=lambda: time.monotonic() + sum(late))
    with (
        volume("ext4", tmp_path, faulty=True, prepare=tree) as it,
        listening(tmp_path, it.point, locator=locator) as at,
    ):
        try:
            it.faults.hang("read")
            it.trigger()
            at.until(lambda at: at.total() == 1)
            incident = msgspec.structs.replace(at.open()[0], object=Object(ino=99))
            locator.locate(msgspec.structs.replace(incident, id="another"))
            at.until(lambda at: it.faults.hits())  # it reads
            late.append(SECONDS + MARGIN)
            at.until(lambda at: any(one.state == "hung" for one in at.open()))
            (known,) = known_to(at)
            for _ in range(2):  # what is asked again was answered
                asked = known.next
                at.until(lambda at, asked=asked: known.next > asked)
            assert any(one.state == "hung" for one in at.open()), "although the probe is answered"
        finally:
            it.faults.clear()
        at.until(lambda at: not any(one.state == "hung" for one in at.open()))
        assert at.total() == 1


def test_who_knows_paths_is_asked_first(tmp_path):
    asked = []

    def model(device, ino, key):
        asked.append((device, ino))
        return "/the/model/knows"

    with volume("ext4", tmp_path, prepare=tree) as it:
        ino = (it.point / "d/f").stat().st_ino
        with it.unmounted():
            it.debugfs("sif /d/f block[0] 0x1111")
        settings = msgspec.structs.replace(
            SETTINGS, state=str(tmp_path / "state"), only=(str(it.point),)
        )
        with health.Follow(it.point, settings=settings, model=model) as incidents:
            assert code_of((it.point / "d/f").read_text) == "EUCLEAN"
            found = next(one for one in incidents if isinstance(one, Incident) and one.object.path)
        assert (found.object.path, found.object.path_source) == ("/the/model/knows", "model")
        assert asked == [(found.fs.device, ino)]


def test_data_that_is_not_written_back(tmp_path):
    with volume("ext4", tmp_path, faulty=True) as it:
        fsync(it.point / "f", b"a" * 65536)
        ino = (it.point / "f").stat().st_ino
        first, last = it.extent(it.point / "f")
        with listening(tmp_path, it.point) as at:
            it.faults.fail("write", errno.EIO, first, last)
            assert code_of(lambda: fsync(it.point / "f", b"b" * 65536)) == "EIO"
            at.until(
                lambda at: any(
                    one.object.ino == ino and one.errno == "EIO" and one.object.path
                    for one in at.open()
                )
            )
            (one,) = [one for one in at.open() if one.object.ino == ino]
            assert one.operation == "data write-back"
            assert one.object.path == str(it.point / "f")
            assert "told" not in (one.text or "")
            it.faults.clear()


def test_metrics_are_of_what_is_listened_to(tmp_path):
    file = tmp_path / "fanwise.prom"
    settings = msgspec.structs.replace(SETTINGS, textfile=str(file))

    def devices():
        text = file.read_text() if file.exists() else ""
        return set(re.findall(r'_fs_writeback_errors_total.*device="([^"]+)"', text))

    with (
        volume("ext4", tmp_path / "1", faulty=True, prepare=tree) as it,
        volume("ext4", tmp_path / "2", faulty=True, prepare=tree) as other,
        listening(tmp_path, it.point, settings=settings) as at,
    ):
        for broken in (other, it):
            name = broken.point / "d/f"
            broken.faults.fail("write", errno.EIO, *broken.extent(name))
            assert code_of(lambda name=name: fsync(name, b"y" * 4096)) == "EIO"
        at.until(lambda at: devices())
        assert devices() == {f"7:{it.dev[1]}"}


def test_a_reading_error_of_data_names_the_device(tmp_path):
    with volume(
        "ext4", tmp_path, faulty=True, prepare=lambda p: fsync(p / "f", b"a" * 65536)
    ) as it:
        first, last = it.extent(it.point / "f")
        with listening(tmp_path, it.point) as at:
            it.faults.fail("read", errno.EIO, first, last)
            subprocess.run(["blockdev", "--flushbufs", it.device], check=True)
            assert code_of(lambda: read(it.point / "f")) == "EIO"
            at.until(lambda at: at.open())
            (one,) = at.open()
            assert (one.scope, one.errno, one.fs.fstype) == ("device", "EIO", "ext4")
            it.faults.clear()


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_an_idle_listener_holds_nothing_and_says_nothing(kind, tmp_path):
    with volume(kind, tmp_path) as it, listening(tmp_path, it.point) as at:
        told = []
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            told += at.engine.read(0.2)
        assert [one for one in told if isinstance(one, Incident)] == []
        it.unmount()
        at.engine.read(0.5)
        it.mount()
        at.engine.read(0.5)
        assert at.engine.open_incidents() == []
