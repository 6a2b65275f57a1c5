"""The correlator: which records are one incident, and that the sums are right."""

import errno

import msgspec
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from fanwise.health._case import Ledger
from fanwise.health._correlate import MOST_OPEN, WINDOW, Correlator
from fanwise.health._incident import Filesystem, Incident, TrippedBy, advice_for
from fanwise.health._observe import Check, Observation
from fanwise.sources.counters import BtrfsDevice, ErrorPoint, Ext4Counters

DEV = (7, 3)
FS = Filesystem(device="7:3", fstype="ext4", uuid="u", name="loop3", devices=("7:3",))
EUCLEAN, EIO, EBADMSG = errno.EUCLEAN, errno.EIO, errno.EBADMSG


class Bench:
    """A correlator with a clock and the incidents as a reader of its output has them."""

    def __init__(self, fs=FS, dev=DEV):
        self.now = 1000.0
        self.ids = 0
        self.known = {}
        self.told = []
        self.it = self.make()
        self.dev = dev
        self.take(self.it.mounted(dev, fs))

    def make(self):
        return Correlator(lambda: self.now, self.new_id, "6.18")

    def new_id(self):
        self.ids += 1
        return f"i{self.ids}"

    def take(self, incidents):
        for incident in incidents:
            self.known[incident.id] = incident
        self.told += incidents
        return incidents

    def see(self, channel, what, dev=None, **fields):
        return self.take(
            self.it.feed(
                Observation(
                    channel=channel, what=what, dev=dev or self.dev, time=self.now, **fields
                )
            )
        )

    def fserror(self, ino=None, code=EUCLEAN, count=1, **fields):
        scope = "inode" if ino else "fs"
        return self.see("fserror", "error", ino=ino, scope=scope, errno=code, count=count, **fields)

    def trace(self, function="f", line=1, count=1):
        return self.see("trace", "error", function=function, line=line, count=count)

    def kmsg(self, ino=None, function="f", line=1):
        scope = "inode" if ino else "fs"
        return self.see("kmsg", "error", ino=ino, scope=scope, function=function, line=line)

    def counter(self, errors, first=None, last=None, dev=None):
        counters = Ext4Counters(errors, 0, 0, first or last, last)
        return self.take(self.it.ext4(dev or self.dev, counters, self.now))

    def open(self):
        return [i for i in self.known.values() if i.status == "open"]

    def only(self):
        (incident,) = self.open()
        return incident


def point(ino=0, code=EUCLEAN, function="f", line=1, at=900, block=0):
    return ErrorPoint(at, function, line, ino, block, code)


@pytest.fixture
def bench():
    return Bench()


def test_the_first_record_is_told_at_once_and_others_amend(bench):
    (first,) = bench.trace("ext4_lookup", 1787)
    assert (first.scope, first.errno, first.total) == ("fs", None, 1)
    bench.now += 0.01
    (second,) = bench.fserror(14, process=TrippedBy(pid=9, comm="ls"))
    assert second.id == first.id
    assert (second.scope, second.object.ino, second.errno) == ("inode", 14, "EUCLEAN")
    assert (second.location.function, second.location.line) == ("ext4_lookup", 1787)
    assert second.location.kernel == "6.18"
    bench.now += 0.1
    bench.counter(1, last=point(14))
    bench.kmsg(14)
    incident = bench.only()
    assert (incident.total, incident.channels) == (1, ("trace", "fserror", "kmsg"))
    assert incident.process == TrippedBy(pid=9, comm="ls")


def test_the_same_key_grows_long_after(bench):
    (first,) = bench.fserror(14)
    bench.now += 1000
    (again,) = bench.fserror(14, count=3)
    assert (again.id, again.count, again.total) == (first.id, 3, 4)
    assert (again.first_seen, again.last_seen) == (1000.0, 2000.0)


def test_beyond_the_window_a_record_is_of_its_own(bench):
    bench.fserror(14)
    bench.now += WINDOW + 0.1
    bench.trace()
    assert len(bench.open()) == 2


def test_a_record_without_an_object_is_merged_into_what_it_was_about(bench):
    (first,) = bench.fserror(14)
    bench.now += 100
    (anonymous,) = bench.trace("ext4_lookup", 1787)
    assert anonymous.id != first.id
    bench.fserror(14)
    assert bench.known[anonymous.id].status == "merged"
    assert bench.known[anonymous.id].merged_into == first.id
    incident = bench.only()
    assert (incident.id, incident.total) == (first.id, 2)
    assert incident.location.function == "ext4_lookup"


def test_two_objects_are_two_incidents(bench):
    bench.fserror(14)
    bench.fserror(15)
    bench.fserror(None)
    bench.fserror(15, EBADMSG)
    assert len(bench.open()) == 4


def test_the_first_object_and_location_stay(bench):
    bench.fserror(14, gen=7)
    bench.trace("first", 1)
    bench.trace("second", 2)
    bench.fserror(14, gen=8)
    incident = bench.only()
    assert (incident.object.gen, incident.location.function) == (7, "first")


def test_what_no_event_tells_is_in_the_counter(bench):
    bench.counter(0)
    (incident,) = bench.counter(2, last=point(0, EIO, "ext4_mb_generate_buddy", 1200))
    assert (incident.total, incident.count_source) == (2, "counters")
    assert not incident.at_least
    assert incident.location.function == "ext4_mb_generate_buddy"
    assert bench.counter(2, last=point(0, EIO)) == []


def test_errors_of_before_are_told_with_their_times(bench):
    bench.counter(5, first=point(12, at=500), last=point(13, EBADMSG, at=600))
    by_ino = {i.object.ino: i for i in bench.open()}
    assert {ino: i.first_seen for ino, i in by_ino.items()} == {12: 500.0, 13: 600.0}
    assert sum(i.total for i in by_ino.values()) == 5


def test_a_merged_record_gives_back_what_belongs_to_others(bench):
    bench.counter(0)
    bench.fserror(14, count=3)  # one of them was about 15
    bench.kmsg(14)
    bench.kmsg(15)
    bench.now += 0.2
    bench.counter(3, last=point(15))
    assert {i.object.ino: i.total for i in bench.open()} == {14: 2, 15: 1}


def test_a_counter_read_too_early_takes_nothing_away(bench):
    bench.counter(0)
    bench.fserror(14, count=3)
    assert bench.counter(1, last=point(14)) == []
    assert bench.only().total == 3


def test_a_check_resolves_and_what_comes_after_is_new(bench):
    bench.fserror(14, count=3)
    bench.now += 1
    bench.counter(3, last=point(14))
    bench.now += 60
    (resolved,) = bench.counter(0)
    assert (resolved.status, resolved.resolved) == ("resolved", "the filesystem was checked")
    bench.fserror(14)
    bench.now += 1
    bench.counter(1, last=point(14))
    assert bench.only().id != resolved.id
    assert bench.only().total == 1


# -- checks: the superblock has the second of the last one

A, B, C = 7001, 7002, 7003  # lives of the superblock


def checked(bench, at, mounts=1, life=A, writable=True):
    return bench.take(bench.it.checked(DEV, Check(at, mounts, life, writable)))


def met_at(bench, when, life):
    """An error that no counter counts, read in a life of the superblock."""
    bench.now = when
    return bench.see("trace", "writeback", scope="inode", ino=12, errno=EIO, life=life)


@pytest.fixture
def mounted(bench):
    """Identified after it was made in second 900, in its first mount."""
    checked(bench, 900)
    return bench


def test_a_check_in_a_later_second_ends_what_was_seen_before(mounted):
    met_at(mounted, 1000.9, 0)
    assert checked(mounted, 1000, life=B) == [], "it may have come after the check"
    (resolved,) = checked(mounted, 1001, life=C)
    assert (resolved.status, resolved.resolved) == ("resolved", "the filesystem was checked")


def test_a_check_in_the_second_of_an_error_ends_what_an_earlier_life_saw(mounted):
    met_at(mounted, 1000.2, A)
    (resolved,) = checked(mounted, 1000, life=B)
    assert resolved.status == "resolved"


def test_a_check_in_the_second_of_an_error_spares_what_this_life_saw(mounted):
    """The mount was not noticed yet when its first error was read."""
    met_at(mounted, 1000.5, B)
    assert checked(mounted, 1000, life=B) == []
    assert mounted.only().status == "open"


def test_a_check_in_the_second_of_an_error_of_one_life_spares_it(mounted):
    """A root filesystem that is checked while it is mounted, not writable: no life ended."""
    met_at(mounted, 1000.5, A)
    assert checked(mounted, 1000, mounts=0, life=A) == []
    assert checked(mounted, 1001, mounts=0, life=A)[0].status == "resolved"


def test_what_came_in_the_second_of_a_check_and_later_is_spared(mounted):
    met_at(mounted, 1000.9, A)
    met_at(mounted, 1001.1, A)
    assert checked(mounted, 1000, life=B) == []


def test_mounting_is_no_check_and_what_was_seen_is_remembered_to_be_older(mounted):
    met_at(mounted, 1000.1, A)
    assert checked(mounted, 900, mounts=2, life=B) == []
    assert checked(mounted, 900, mounts=2, life=B) == [], "a follower was started again"
    assert checked(mounted, 1000, mounts=1, life=C)[0].status == "resolved"


def test_a_second_check_in_one_second_shows_in_the_count_of_mounts(mounted):
    checked(mounted, 1000, mounts=1, life=B)
    met_at(mounted, 1000.4, B)
    assert checked(mounted, 1000, mounts=2, life=C) == [], "mounted again, and no check"
    met_at(mounted, 1000.5, C)
    assert checked(mounted, 1000, mounts=1, life=A)[0].status == "resolved"


def test_as_many_mounts_as_before_and_not_counted_is_no_check(mounted):
    checked(mounted, 1000, mounts=1, life=B)
    met_at(mounted, 1000.4, B)
    assert checked(mounted, 1000, mounts=1, life=C, writable=False) == []
    assert checked(mounted, 1000, mounts=0, life=A, writable=False)[0].status == "resolved"


def test_a_count_of_mounts_that_may_have_run_over_shows_nothing(mounted):
    checked(mounted, 1000, mounts=0xFFFF, life=B)
    met_at(mounted, 1000.4, B)
    assert checked(mounted, 1000, mounts=0, life=C) == []


@pytest.mark.parametrize(("before", "now"), [(0, B), (A, 0)])
def test_without_sysfs_the_second_alone_decides(bench, before, now):
    checked(bench, 900, life=before)
    met_at(bench, 1000.4, before)
    assert checked(bench, 1000, life=now) == []
    assert checked(bench, 1001, life=now)[0].status == "resolved"


def test_a_filesystem_made_in_the_second_of_its_first_error(bench):
    """mkfs says that second, too; nobody had read an older one."""
    met_at(bench, 1000.4, A)
    assert checked(bench, 1000, life=A) == []
    assert bench.only().status == "open"


def test_a_check_is_remembered_over_a_restart(mounted):
    met_at(mounted, 1000.2, A)
    ledgers = msgspec.json.decode(msgspec.json.encode(mounted.it.ledgers()), type=list[Ledger])
    mounted.it = mounted.make()
    mounted.it.restore(ledgers)
    assert checked(mounted, 1000, life=B)[0].status == "resolved"


def test_what_joined_a_case_in_another_life_makes_it_of_none_that_is_known(mounted):
    met_at(mounted, 1000.2, A)
    mounted.now = 1000.3
    mounted.see("kmsg", "writeback", scope="inode", ino=12, errno=EIO)  # read after the unmount
    assert checked(mounted, 1000, life=B) == []


def test_another_filesystem_on_the_device(bench):
    bench.fserror(14)
    (resolved,) = bench.take(bench.it.mounted(DEV, msgspec.structs.replace(FS, uuid="another")))
    assert "replaced" in resolved.resolved
    assert bench.open() == []


def test_a_device_error_alone_stays_with_the_device(bench):
    bench.see("trace", "io", scope="device", errno=EIO, start=4096, length=512, count=3)
    incident = bench.only()
    assert (incident.scope, incident.errno, incident.total) == ("device", "EIO", 3)
    bench.now += WINDOW + 1
    bench.fserror(14, EIO)
    assert {i.scope for i in bench.open()} == {"device", "inode"}


def test_a_device_error_and_what_the_filesystem_makes_of_it(bench):
    bench.see("trace", "io", scope="device", errno=EIO, start=4096, length=512)
    bench.now += 0.01
    bench.fserror(14, EIO)
    bench.trace()
    incident = bench.only()
    assert (incident.scope, incident.object.ino, incident.object.start) == ("inode", 14, 4096)
    assert incident.total == 1


def test_write_back_takes_its_errno_from_the_device(bench):
    bench.see("trace", "io", scope="device", errno=errno.ENOSPC, start=0, length=4096)
    for ino in (20, 21):
        bench.see("trace", "writeback", scope="inode", ino=ino, operation="data write-back")
    assert {(i.object.ino, i.errno) for i in bench.open()} == {(20, "ENOSPC"), (21, "ENOSPC")}


def test_write_back_that_comes_first(bench):
    for ino in (20, 21):
        bench.see("trace", "writeback", scope="inode", ino=ino)
    bench.see("trace", "io", scope="device", errno=EIO)
    assert {(i.object.ino, i.errno) for i in bench.open()} == {(20, "EIO"), (21, "EIO")}


def test_a_device_below_several_filesystems():
    bench = Bench()
    sda = {"devices": ("8:1", "8:0")}
    bench.take(bench.it.mounted((8, 1), Filesystem(device="8:1", fstype="ext4", **sda)))
    bench.take(
        bench.it.mounted((8, 2), Filesystem(device="8:2", fstype="xfs", devices=("8:2", "8:0")))
    )
    bench.see("trace", "io", dev=(8, 0), scope="device", errno=EIO)
    assert bench.only().fs.device == "8:0"
    bench.now += 10
    bench.fserror(14, EIO, dev=(8, 1))
    bench.see("trace", "io", dev=(8, 0), scope="device", errno=EIO)
    (incident,) = [i for i in bench.open() if i.fs.device == "8:1"]
    assert incident.channels == ("fserror", "trace")


def test_a_shutdown_is_told_on_what_caused_it(bench):
    bench.see("trace", "sick", scope="group", group=2)
    bench.see("trace", "buffer", scope="block", errno=EBADMSG, start=8192, symbol="x+0x1/0x2")
    bench.see("trace", "shutdown", errno=errno.ESHUTDOWN, state="shutdown")
    incident = bench.only()
    assert (incident.scope, incident.object.group, incident.errno) == ("group", 2, "EBADMSG")
    assert (incident.state, incident.location.symbol) == ("shutdown", "x+0x1/0x2")
    assert incident.advice.startswith("it is shut down")


def test_a_device_error_that_stops_the_filesystem_is_of_the_device(bench):
    bench.see("trace", "io", scope="device", errno=EIO, start=4096)
    bench.see("trace", "shutdown", errno=errno.ESHUTDOWN, state="shutdown")
    incident = bench.only()
    assert (incident.scope, incident.errno, incident.state) == ("device", "EIO", "shutdown")


def test_a_device_that_has_another_number_after_a_restart(bench):
    (before,) = bench.fserror(14)
    bench.it.renumbered(DEV, (7, 9))
    (after,) = bench.fserror(14, dev=(7, 9))
    assert (after.id, after.total) == (before.id, 2)


def test_a_shutdown_alone_ends_when_it_works_again(bench):
    bench.take(bench.it.state(DEV, "shutdown", bench.now))
    incident = bench.only()
    assert (incident.errno, incident.state) == ("ESHUTDOWN", "shutdown")
    assert bench.it.state(DEV, "shutdown", bench.now) == []
    (resolved,) = bench.take(bench.it.state(DEV, "ok", bench.now))
    assert resolved.status == "resolved"


def test_hanging(bench):
    bench.take(bench.it.state(DEV, "hung", bench.now, "probe"))
    incident = bench.only()
    assert (incident.state, incident.errno, incident.channels) == ("hung", None, ("probe",))
    bench.take(bench.it.state(DEV, "ok", bench.now, "probe"))
    assert bench.open() == []


def test_btrfs_counts_by_device_and_kind():
    bench = Bench(Filesystem(device="0:43", fstype="btrfs", uuid="u"), (0, 43))

    def stats(write, corruption):
        devices = [BtrfsDevice(1, write, 0, 0, corruption, 0)]
        return bench.take(bench.it.btrfs((0, 43), devices, bench.now))

    stats(0, 0)
    bench.see("trace", "io", scope="device", errno=EIO)
    stats(15, 4)
    assert {i.errno: i.total for i in bench.open()} == {"EIO": 15, "EBADMSG": 4}
    assert not any(i.at_least for i in bench.open())
    stats(17, 4)
    assert {i.errno: i.total for i in bench.open()} == {"EIO": 17, "EBADMSG": 4}
    stats(0, 0)
    assert bench.open() == []


def test_xfs_says_at_least():
    bench = Bench(Filesystem(device="7:3", fstype="xfs"))
    bench.see("trace", "sick", scope="inode", ino=131)
    assert bench.only().at_least
    bench.take(bench.it.lost([DEV], 7))
    assert bench.only().lost == 7


def test_beyond_a_hundred_open(bench):
    for ino in range(1, 301):
        bench.fserror(ino)
    bench.now += 1
    bench.counter(300, last=point(300))
    assert len(bench.open()) == MOST_OPEN + 1
    (rest,) = [i for i in bench.open() if i.object.ino is None]
    assert (rest.scope, rest.total) == ("fs", 200)
    assert sum(i.total for i in bench.open()) == 300


def test_it_survives_a_restart(bench):
    bench.fserror(14, count=3)
    bench.now += 1
    bench.counter(3, last=point(14))
    before = bench.only()
    saved = msgspec.json.encode(bench.it.ledgers())
    bench.it = bench.make()
    bench.it.restore(msgspec.json.decode(saved, type=list[Ledger]))
    bench.take(bench.it.mounted(DEV, FS))
    assert [i.id for i in bench.it.open()] == [before.id]
    bench.now += 1
    # Two of them while nobody listened.
    bench.counter(5, last=point(14))
    assert (bench.only().id, bench.only().total) == (before.id, 5)


def test_late_records_about_what_was_told_before_a_restart(bench):
    (before,) = bench.fserror(None)
    saved = msgspec.json.encode(bench.it.ledgers())
    bench.it = bench.make()
    bench.it.restore(msgspec.json.decode(saved, type=list[Ledger]))
    bench.trace()
    bench.kmsg(None)
    bench.now += 1
    bench.counter(1, last=point(0))
    assert (bench.only().id, bench.only().total) == (before.id, 1)


def test_the_path_comes_later_and_once(bench):
    (incident,) = bench.fserror(14)
    (located,) = bench.it.located(incident.id, ["/mnt/f", "/mnt/h"], "handle")
    assert (located.object.path, located.object.path_source) == ("/mnt/f", "handle")
    assert located.object.paths == ("/mnt/f", "/mnt/h")
    assert bench.it.located(incident.id, ["/mnt/g"], "search") == []


def test_as_json(bench):
    (incident,) = bench.fserror(14)
    text = msgspec.json.encode(incident)
    assert msgspec.json.decode(text, type=Incident) == incident
    assert msgspec.json.decode(text)["type"] == "incident"


class Channels(RuleBasedStateMachine):
    """One ext4: errors happen, and its channels tell of them when they are read, in any order."""

    @initialize()
    def start(self):
        self.bench = Bench()
        self.happened = 0
        self.first = self.last = None
        self.fserror, self.trace, self.kmsg = {}, [], []
        self.bench.counter(0)
        self.objects = {}

    @rule(
        ino=st.sampled_from([None, 12, 13, 14, 15]),
        code=st.sampled_from([EUCLEAN, EBADMSG, EIO]),
        pid=st.integers(1, 3),
        event=st.sampled_from([True, True, True, False]),
        logged=st.booleans(),
        times=st.integers(1, 4),
    )
    def error(self, ino, code, pid, event, logged, times):
        for _ in range(times):
            self.happened += 1
            where = ("f", code + (ino or 0))
            self.last = point(ino or 0, code, *where, at=int(self.bench.now))
            self.first = self.first or self.last
            self.trace.append(where)
            if event:  # the kernel keeps the first errno and object of what it merges
                self.fserror.setdefault(pid, [ino, code, 0])[2] += 1
            if logged:
                self.kmsg.append((ino, where))

    @rule()
    def read_fserror(self):
        for ino, code, count in self.fserror.values():
            self.bench.fserror(ino, code, count)
        self.fserror = {}

    @rule(most=st.integers(1, 4))
    def read_trace(self, most):
        for where in self.trace[:most]:
            self.bench.trace(*where)
        del self.trace[:most]

    @rule(most=st.integers(1, 4))
    def read_kmsg(self, most):
        for ino, where in self.kmsg[:most]:
            self.bench.kmsg(ino, *where)
        del self.kmsg[:most]

    @rule()
    def read_counter(self):
        self.bench.counter(self.happened, self.first, self.last)

    @rule(seconds=st.sampled_from([0.01, 0.05, 0.2, 1.0, 2.5, 60.0]))
    def wait(self, seconds):
        self.bench.now += seconds

    def settle(self):
        self.read_fserror()
        self.read_trace(len(self.trace))
        self.read_kmsg(len(self.kmsg))
        self.bench.now += 0.2
        self.read_counter()

    @rule()
    def settled(self):
        self.settle()
        assert sum(i.total for i in self.bench.open()) == self.happened
        assert not any(i.at_least for i in self.bench.open())

    @precondition(lambda self: self.happened)
    @rule()
    def restart(self):
        saved = msgspec.json.encode(self.bench.it.ledgers())
        self.bench.it = self.bench.make()
        self.bench.it.restore(msgspec.json.decode(saved, type=list[Ledger]))

    @precondition(lambda self: self.happened)
    @rule()
    def check(self):
        self.settle()
        self.happened, self.first, self.last = 0, None, None
        self.read_counter()
        assert self.bench.open() == []

    @invariant()
    def what_is_told_holds(self):
        if not hasattr(self, "bench"):
            return
        for incident in self.bench.told:
            known = self.objects.setdefault(incident.id, incident)
            # An object, once told, is never another one.
            for old, new in (
                (known.object.ino, incident.object.ino),
                (known.errno, incident.errno),
                (known.location.function, incident.location.function),
            ):
                assert old is None or old == new
            assert known.status == "open"
            self.objects[incident.id] = incident
            assert incident.total >= 1
        self.bench.told.clear()
        ids = [i.id for i in self.bench.it.open()]
        assert sorted(ids) == sorted(i.id for i in self.bench.open())
        assert len(ids) == len(set(ids))


TestChannels = Channels.TestCase
TestChannels.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)


# Linux 7.0, after fs/fserror.c; not run here.
def test_a_burst_in_several_reports_without_a_process(bench):
    for count in (3, 2, 1):
        bench.fserror(14, count=count)
        bench.now += 0.05
    bench.now += 0.2
    bench.counter(6, last=point(14))
    incident = bench.only()
    assert (incident.total, incident.process) == (6, None)


def test_a_shutdown_that_is_reported_and_not_counted(bench):
    bench.counter(0)
    bench.see("trace", "shutdown", errno=errno.ESHUTDOWN, state="shutdown")
    bench.fserror(None, errno.ESHUTDOWN, state="shutdown")
    bench.now += 0.2
    bench.counter(0)
    assert bench.it.unsure(bench.dev)
    bench.now += 2
    bench.counter(0)
    assert not bench.it.unsure(bench.dev)
    incident = bench.only()
    assert (incident.state, incident.total) == ("shutdown", 1)
    bench.fserror(14)
    bench.now += 1
    bench.counter(1, last=point(14))
    assert {i.errno: i.total for i in bench.open()} == {"ESHUTDOWN": 1, "EUCLEAN": 1}
    # What no event tells of is still seen: the shutdown does not stand for it.
    bench.now += 60
    bench.counter(2, last=point(15, EIO))
    assert {i.object.ino for i in bench.open()} == {None, 14, 15}


def test_a_counter_that_is_behind_takes_no_error_away(bench):
    """ext4 moves it from a work queue, whenever that runs; the log had its ten in five seconds."""
    bench.counter(0)
    for ino in (14, 15):
        bench.trace()
        bench.fserror(ino)
    bench.now += 0.12
    bench.counter(0)
    assert bench.it.unsure(bench.dev)
    bench.counter(1, last=point(14))
    bench.trace()
    bench.fserror(16)
    bench.now += 0.12
    bench.counter(2, last=point(15))
    bench.now += 1
    bench.counter(3, last=point(16))
    assert not bench.it.unsure(bench.dev)
    assert {i.object.ino: i.total for i in bench.open()} == {14: 1, 15: 1, 16: 1}


def test_reports_of_xfs_join_what_the_trace_saw():
    bench = Bench(Filesystem(device="7:3", fstype="xfs"))
    bench.see("trace", "sick", scope="inode", ino=131, symbol="xfs_da_read_buf")
    bench.see("trace", "buffer", scope="block", errno=EBADMSG, start=61440, symbol="f+0x1/0x2")
    bench.now += 0.5  # by a worker, later
    bench.fserror(131, EBADMSG, count=2)
    incident = bench.only()
    assert (incident.scope, incident.object.ino, incident.total) == ("inode", 131, 2)
    assert incident.at_least


def test_a_report_of_a_files_data_joins_its_write_back():
    bench = Bench(Filesystem(device="7:3", fstype="xfs"))
    bench.see("trace", "io", scope="device", errno=EIO, start=4096)
    bench.see("trace", "writeback", scope="inode", ino=131)
    bench.fserror(131, EIO)
    assert bench.only().channels == ("trace", "fserror")


def test_an_inode_whose_metadata_and_data_failed_has_both_in_its_total():
    it = Bench()
    it.counter(0)
    it.see("trace", "writeback", scope="inode", ino=14, count=3)
    it.see("trace", "io", scope="device", errno=EIO, operation="block write")
    it.fserror(ino=14, code=EIO)
    it.trace()
    it.now += 1
    it.counter(1)
    incident = it.only()
    assert (incident.total, incident.count_source) == (4, "fserror, trace")
    it.take(it.it.lost([it.dev], 1))
    assert it.only().at_least


def test_what_it_was_for_is_said_although_the_log_came_first():
    it = Bench()
    it.see("kmsg", "io", scope="device", errno=EIO, operation="block write")
    it.see("kmsg", "writeback", scope="inode", ino=14)
    it.see("trace", "io", scope="device", errno=EIO, operation="block write")
    it.see("trace", "writeback", scope="inode", ino=14, operation="data write-back")
    assert it.only().operation == "data write-back"


def test_the_block_of_the_first_error_stays():
    it = Bench()
    it.counter(0)
    it.counter(1, first=point(14, block=1234), last=point(14, block=1234))
    it.now += 60
    it.counter(2, first=point(14, block=1234), last=point(14, block=9999))
    assert (it.only().operation, it.only().total) == ("block 1234", 2)


def test_no_advice_is_given_twice():
    for state in ("aborted", "shutdown", "emergency_ro"):
        for code in (errno.ESHUTDOWN, errno.EROFS, EIO):
            advice = advice_for(code, state)
            assert advice.count("check") == advice.count("unmount") == 1, advice


def test_a_path_that_is_one_of_several_files_is_not_guessed():
    it = Bench()
    it.see("trace", "writeback", scope="inode", ino=257)
    (told,) = it.take(it.it.located(it.only().id, ["/mnt/a", "/mnt/s/b"], "filesystem", True))
    assert (told.object.path, told.object.paths) == (None, ("/mnt/a", "/mnt/s/b"))
