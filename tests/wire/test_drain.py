"""The drain without fanotify: a SOCK_SEQPACKET pair stands in for the group.

One packet is one read(): like the kernel's reads it never splits a record.
"""

import contextlib
import errno
import gc
import importlib
import os
import random
import select
import shutil
import socket
import struct
import threading
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from tests.wire import build

META = struct.Struct("=IBBHQii")
SO_SNDBUFFORCE = 32
KIB = 1 << 10
MIB = 1 << 20


@pytest.fixture(params=["native", "pure"], scope="module")
def twin(request, cannot_run):
    if request.param == "pure":
        return importlib.import_module("fanwise.kernel._pure_drain").Drain
    try:
        return importlib.import_module("fanwise.kernel._native").Drain
    except ImportError:
        if shutil.which("cc") or shutil.which("gcc"):
            raise
        cannot_run("no C compiler")


def record(serial, size=24, fill=b""):
    """Make a record; the mask field carries a serial number."""
    body = (fill * size)[: size - 24] if fill else bytes(size - 24)
    return META.pack(size, 3, 0, 24, serial, -1, 1) + body


def serials(data):
    at, out = 0, []
    while at < len(data):
        size, _, _, _, serial, _, _ = META.unpack_from(data, at)
        out.append(serial)
        at += size
    assert at == len(data), "a record was split"
    return out


def readable(drain, timeout=0):
    poll = select.poll()
    poll.register(drain.fileno(), select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def take_all(drain):
    return list(iter(drain.take, None))


@contextlib.contextmanager
def running(twin, ring=MIB, pace=5_000_000, start=True):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours, theirs:
        with contextlib.suppress(PermissionError):
            theirs.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 8 * MIB)
        drain = twin(ours.fileno(), ring, pace)
        try:
            if start:
                drain.start()
            yield drain, theirs
        finally:
            drain.close()


def in_child(body):
    """Run in a forked child and return its wait status; the child never returns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork() beside threads, meant here
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def threads():
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.append((task / "comm").read_text().strip())
    return names.count("fw-drain") + [t.name for t in threading.enumerate()].count("fw-drain")


def test_one_packet(twin):
    with running(twin) as (drain, peer):
        assert not readable(drain)
        assert drain.take() is None
        before = time.time_ns()
        packet = record(1) + record(2, 40)
        peer.send(packet)
        assert readable(drain, 10)
        data, when, drained, lost = drain.take()
        assert (data, drained, lost) == (packet, True, 0)
        assert before <= when <= time.time_ns()
        assert not readable(drain)
        assert drain.take() is None
        stats = drain.stats()
        assert (stats["records"], stats["bytes"], stats["reads"]) == (2, 64, 1)
        assert (stats["lost"], stats["backlog_bytes"], stats["paced"]) == (0, 0, 0)
        assert stats["ring_bytes"] == MIB


@pytest.mark.parametrize(
    ("ring", "packet_max", "outstanding_max", "total"),
    [(64 * KIB, 4 * KIB, 28 * KIB, 100 * MIB), (MIB, 60 * KIB, 700 * KIB, 300 * MIB)],
)
def test_every_byte_in_order_through_many_wraps(twin, ring, packet_max, outstanding_max, total):
    """While what is unread fits nothing is lost, wherever the ring wraps."""
    rng = random.Random(ring)
    noise = rng.randbytes(packet_max)
    with running(twin, ring) as (drain, peer):
        sent, waiting, unread = 0, [], 0
        while sent < total:
            while True:
                size = rng.randrange(24, packet_max)
                if unread + size + 32 > outstanding_max:
                    break
                packet = META.pack(size, 3, 0, 24, sent, -1, 1) + noise[24:size]
                peer.send(packet)
                waiting.append(packet)
                unread += size + 32
                sent += size
            assert drain.sync(10)
            keep = rng.randrange(len(waiting))
            while len(waiting) > keep:
                data, _, _, lost = drain.take()
                packet = waiting.pop(0)
                assert data == packet
                assert lost == 0
                unread -= len(packet) + 32
        stats = drain.stats()
        assert stats["bytes"] == sent
        assert stats["lost"] == 0
        assert stats["peak_bytes"] <= ring


def test_loss_is_one_marker_and_exact(twin):
    with running(twin, 64 * KIB, start=False) as (drain, peer):
        sent = 0
        for _ in range(30):  # before it reads: it must not find the queue empty between two
            peer.send(b"".join(record(sent + i, 64) for i in range(50)))
            sent += 50
        drain.start()
        assert drain.sync(10)
        chunks = take_all(drain)
        *stored, (data, when, drained, lost) = chunks
        assert stored
        got = [s for c in stored for s in serials(c[0])]
        assert got == list(range(len(got)))
        assert all(c[3] == 0 for c in stored)
        assert not stored[-1][2], "the records after it were lost, the edge is not its own"
        assert (data, drained, lost) == (b"", True, sent - len(got))
        assert abs(time.time_ns() - when) < 60 * 10**9
        assert drain.stats()["lost"] == lost
        assert drain.stats()["records"] == sent
        assert not readable(drain)
        # and it is told once
        peer.send(record(sent))
        assert readable(drain, 10)
        assert drain.take()[2:] == (True, 0)


def test_stores_again_only_when_a_quarter_is_free(twin):
    with running(twin, 64 * KIB) as (drain, peer):
        packet = b"".join(record(0, 64) for _ in range(16))  # 1,024 bytes
        while not drain.stats()["lost"]:
            peer.send(packet)
            assert drain.sync(10)
        lost = drain.stats()["lost"]
        quarter = 64 * KIB * 3 // 4
        while drain.stats()["backlog_bytes"] > quarter:
            peer.send(packet)
            assert drain.sync(10)
            lost += 16
            assert drain.stats()["lost"] == lost
            drain.take()
        while drain.stats()["lost"] == lost:  # free, and soon a contiguous part of it is enough
            drain.take()
            peer.send(packet)
            assert drain.sync(10)
            if drain.stats()["lost"] == lost:
                break
            lost += 16
        told = [c[3] for c in take_all(drain) if c[3]]
        assert told == [lost], "one loss, one marker, with the data that follows it"


def test_a_late_empty_queue_is_told(twin):
    """No room for the second read: the edge comes with the chunk or, when that is gone, alone."""
    packet = record(9, 50 * KIB)
    with running(twin, 64 * KIB, pace=0) as (drain, peer):
        peer.send(packet)
        assert drain.sync(10)
        assert [c[2:] for c in take_all(drain)] == [(True, 0)]
        for _ in range(500):
            peer.send(packet)
            assert readable(drain, 10)
            chunks = take_all(drain)
            assert drain.sync(10)
            chunks += take_all(drain)
            assert chunks[0][0] == packet
            assert [c[2:] for c in chunks] in ([(True, 0)], [(False, 0), (True, 0)])
            assert [c[0] for c in chunks[1:]] in ([], [b""])
            assert not readable(drain)
        assert drain.stats()["lost"] == 0


_keys = st.sampled_from([build.key(i) for i in range(4)])
_infos = st.one_of(
    st.builds(build.fid, st.sampled_from([build.FID, build.DFID]), _keys),
    st.builds(
        build.fid,
        st.sampled_from([build.DFID_NAME, build.OLD_DFID_NAME, build.NEW_DFID_NAME]),
        _keys,
        st.sampled_from([b"a", b"."]),
    ),
    st.just(build.error(5)),
    st.just(build.fid(build.DFID, build.key(9)[:4])),  # a handle of no bytes
    st.just(build.fid(build.DFID_NAME, build.key(9), b"x", handle_bytes=200)),  # one that lies
    st.just(build.info(build.DFID, b"")),
)
_bits = st.sampled_from([0x2, 0x4, 0x100, 0x200, 0x400, 0x4000, 0x10000000])
_events = st.builds(
    lambda bits, on_dir, infos: build.event(sum(set(bits)) | (0x40000000 if on_dir else 0), *infos),
    st.lists(_bits, min_size=1, max_size=2),
    st.booleans(),
    st.lists(_infos, max_size=3),
)


@given(st.lists(_events, min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_both_note_the_same_of_a_loss(events):
    """What is noted of discarded records, well-formed or not, is the same from both twins."""
    told = []
    for name in ("_pure_drain", "_native"):
        twin = importlib.import_module(f"fanwise.kernel.{name}").Drain
        with running(twin, 64 * KIB) as (drain, peer):
            # Fill the ring, so that the next packet is discarded: with as much as it still takes.
            filler = build.event(0x2, build.fid(build.DFID_NAME, build.key(7), b"f" * 200))
            while not drain.stats()["lost"]:
                peer.send(filler * 50)
                assert drain.sync(10)
            peer.send(b"".join(events))
            assert drain.sync(10)
            gaps = [drain.gap() for *_, lost in take_all(drain) if lost]
            told.append(gaps)
    assert told[0] == told[1]
    assert len(told[0]) == 1


def test_the_end_of_a_directory_is_noted_of_itself(twin):
    """A rename put another in its place, which no record of a name says."""
    one, other, file = build.key(2), build.key(3), build.key(4)
    with running(twin, 64 * KIB) as (drain, peer):
        filler = build.event(0x2, build.fid(build.DFID_NAME, build.key(7), b"f" * 200))
        while not drain.stats()["lost"]:
            peer.send(filler * 50)
            assert drain.sync(10)
        peer.send(
            build.event(0x40000400, build.fid(build.DFID_NAME, one, b"."))
            + build.event(0x40000004, build.fid(build.DFID_NAME, other, b"."))
            + build.event(0x400, build.fid(build.FID, file))
        )
        assert drain.sync(10)
        (gap,) = [drain.gap() for *_, lost in take_all(drain) if lost]
        names, itself = 1, 2
        assert gap == {build.key(7): names, one: names | itself, other: names}


def test_a_malformed_rest_is_never_no_loss(twin):
    with running(twin, 64 * KIB) as (drain, peer):
        while not drain.stats()["lost"]:
            peer.send(record(0, 8 * KIB))
            assert drain.sync(10)
        before = drain.stats()["lost"]
        for junk in (b"\0" * 24, b"\xff" * 100, b"x", record(1) + b"\x17\0\0\0" + bytes(40)):
            peer.send(junk)
        assert drain.sync(10)
        assert drain.stats()["lost"] == before + 5


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    ops=st.lists(
        st.tuples(
            st.integers(0, 12),  # packets to send
            st.integers(1, 40),  # records in each
            st.integers(24, 400),  # bytes in each record
            st.booleans(),  # wait for the drain
            st.integers(0, 30),  # chunks to take
        ),
        min_size=1,
        max_size=60,
    )
)
def test_delivered_and_lost_account_for_everything(twin, ops):
    with running(twin, 64 * KIB) as (drain, peer):
        sent = expected = told = 0

        def check(chunk):
            nonlocal expected, told
            data, _, _, lost = chunk
            assert data or lost or chunk[2]
            expected += lost
            told += lost
            for serial in serials(data):
                assert serial == expected
                expected += 1

        for packets, count, size, wait, takes in ops:
            for _ in range(packets):
                peer.send(b"".join(record(sent + i, size) for i in range(count)))
                sent += count
            if wait:
                assert drain.sync(10)
            for _ in range(takes):
                chunk = drain.take()
                if chunk is None:
                    break
                check(chunk)
        assert drain.sync(10)
        last = None
        while (chunk := drain.take()) is not None:
            check(chunk)
            last = chunk
        assert expected == sent
        assert drain.stats()["lost"] == told
        assert last is None or last[2], "the queue is empty: the last thing told says so"
        assert not readable(drain)


def test_no_wake_up_is_lost(twin):
    count = 20_000
    with running(twin, 16 * MIB, pace=0) as (drain, peer):

        def write():
            for serial in range(count):
                peer.send(record(serial))

        writer = threading.Thread(target=write)
        writer.start()
        got = []
        while len(got) < count:
            assert readable(drain, 20), f"nothing after {len(got)}"
            for data, _, _, lost in iter(drain.take, None):
                assert lost == 0
                got += serials(data)
        writer.join()
        assert got == list(range(count))


def test_readiness_ends_with_the_last_chunk(twin):
    with running(twin, pace=0) as (drain, peer):
        for _ in range(200):
            peer.send(record(1))
            assert readable(drain, 10)
            assert [c[2:] for c in take_all(drain)] == [(True, 0)]
            assert not readable(drain)


def test_several_threads_taking_share_the_chunks(twin):
    count = 5_000
    with running(twin, 16 * MIB) as (drain, peer):
        for serial in range(count):
            peer.send(record(serial))
        drain.stop()
        got = [[], [], []]

        def consume(mine):
            while True:
                try:
                    chunk = drain.take()
                except RuntimeError:  # without an interpreter lock: one at a time
                    continue
                if chunk is None:
                    return
                mine.extend(serials(chunk[0]))

        workers = [threading.Thread(target=consume, args=(g,)) for g in got]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert sorted(got[0] + got[1] + got[2]) == list(range(count))


def test_sync_means_that_it_can_be_taken(twin):
    with running(twin, 4 * MIB, pace=1_000_000_000) as (drain, peer):
        for round_ in range(300):  # far more than the bucket: sync does not wait for the pace
            peer.send(record(round_))
            assert drain.sync(timeout=10)
            assert serials(drain.take()[0]) == [round_]


def test_sync_without_a_thread_is_false(twin):
    with running(twin, start=False) as (drain, _):
        assert drain.sync(1) is False
        drain.start()
        assert drain.sync(10) is True
        assert drain.sync(float("inf")) is True
        drain.stop()
        assert drain.sync(1) is False
        drain.close()
        assert drain.sync(1) is False


def test_sync_is_released_by_close(twin):
    with running(twin) as (drain, peer):
        stop = threading.Event()

        def flood():
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    peer.send(record(0), socket.MSG_DONTWAIT)

        def syncs():
            while drain.sync(60):
                pass

        workers = [threading.Thread(target=t) for t in (flood, syncs, syncs)]
        for worker in workers:
            worker.start()
        assert readable(drain, 10)
        drain.close()
        stop.set()
        for worker in workers:
            worker.join(30)
            assert not worker.is_alive()


def test_stop_reads_what_is_queued(twin):
    with running(twin, 4 * MIB, pace=10**9) as (drain, peer):
        for serial in range(500):
            peer.send(record(serial))
        drain.stop()
        assert drain.ended
        assert drain.error == 0
        chunks = take_all(drain)
        assert [s for c in chunks for s in serials(c[0])] == list(range(500))
        assert chunks[-1][2]
        assert readable(drain), "an ended drain stays readable"
        assert drain.take() is None
        drain.stop()
        drain.stop(drain=False)


def test_stop_at_once_keeps_the_ring(twin):
    with running(twin) as (drain, peer):
        peer.send(record(7))
        assert drain.sync(10)
        drain.stop(drain=False)
        peer.send(record(8))
        assert drain.ended
        assert [serials(c[0]) for c in take_all(drain)] == [[7]]


def test_stop_does_not_chase_a_writer_for_ever(twin):
    with running(twin, 64 * KIB) as (drain, peer):
        packet = b"".join(record(0) for _ in range(2000))
        over = threading.Event()

        def flood():
            while not over.is_set():
                with contextlib.suppress(BlockingIOError):
                    peer.send(packet, socket.MSG_DONTWAIT)

        writers = [threading.Thread(target=flood) for _ in range(2)]
        for writer in writers:
            writer.start()
        assert readable(drain, 10)
        begun = time.monotonic()
        drain.stop()
        took = time.monotonic() - begun
        over.set()
        for writer in writers:
            writer.join()
        assert drain.ended
        assert took < 20
        lost = sum(c[3] for c in take_all(drain))
        assert lost == drain.stats()["lost"]


@pytest.mark.parametrize(
    ("sent", "stored", "lost", "emptied"),
    [(20, 20, 0, True), (50, 50, 0, True), (51, 50, 1, True), (80, 50, 30, True),
     (100, 50, 50, False), (200, 50, 50, False)],
)  # fmt: skip
def test_what_a_stop_leaves_unread_is_lost(twin, sent, stored, lost, emptied):
    """A stand-in has no marks to remove: what is left is counted, up to the same bound."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours, theirs:
        drain = twin(ours.fileno(), MIB, 10 * 10**9, stop_records=50)
        theirs.send(b"".join(record(0) for _ in range(300)))
        drain.start()
        assert readable(drain, 10)
        assert len(serials(drain.take()[0])) == 300
        for serial in range(sent):  # paced now: these wait for the stop
            theirs.send(record(serial))
        drain.stop()
        chunks = take_all(drain)
        assert [s for c in chunks for s in serials(c[0])] == list(range(stored))
        assert [c[3] for c in chunks if c[3]] == ([lost] if lost else [])
        assert chunks[-1][2] is emptied
        assert drain.stats()["lost"] == lost
        assert (drain.ended, drain.error, drain.take()) == (True, 0, None)
        drain.close()


def test_stops_from_many_threads(twin):
    with running(twin) as (drain, peer):
        peer.send(record(1))
        workers = [
            threading.Thread(target=call)
            for call in (drain.stop, drain.close, drain.stop, drain.close, drain.stop)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(20)
            assert not worker.is_alive()
        assert drain.ended


def test_close(twin):
    with running(twin) as (drain, peer):
        peer.send(record(1))
        assert drain.sync(10)
        fd = drain.fileno()
        drain.close()
        drain.close()
        assert drain.ended
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        for call in (drain.take, drain.fileno, drain.start):
            with pytest.raises(ValueError, match="closed"):
                call()
        drain.stop()
        assert drain.stats()["records"] == 1
        assert drain.stats()["backlog_bytes"] == 0


def test_before_start(twin):
    before = set(os.listdir("/proc/self/fd"))
    with running(twin, start=False) as (drain, peer):
        assert len(set(os.listdir("/proc/self/fd")) - before) == 2, "the constructor opens nothing"
        assert threads() == 0
        peer.send(record(1))
        assert drain.take() is None
        assert not drain.ended
        with pytest.raises(ValueError, match="not started"):
            drain.fileno()
        drain.stop()
        drain.start()
        assert readable(drain, 10)
        with pytest.raises(RuntimeError, match="already"):
            drain.start()
        drain.stop()
        with pytest.raises(RuntimeError, match="already"):
            drain.start()


def test_arguments(twin):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        with pytest.raises(ValueError, match="non-blocking"):
            twin(ours.fileno(), MIB)
        ours.setblocking(False)
        for ring in (-1, 0, 64 * KIB - 1):
            with pytest.raises(ValueError, match="ring_bytes"):
                twin(ours.fileno(), ring)
        for pace in (-1, 10**10 + 1):
            with pytest.raises(ValueError, match="pace_ns"):
                twin(ours.fileno(), MIB, pace)
        for bound in (-1, 0):
            with pytest.raises(ValueError, match="stop_records"):
                twin(ours.fileno(), MIB, stop_records=bound)
        with pytest.raises(TypeError):
            twin(ours.fileno())
        odd = twin(fd=ours.fileno(), ring_bytes=64 * KIB + 1, pace_ns=0)
        assert odd.stats()["ring_bytes"] == 64 * KIB + os.sysconf("SC_PAGESIZE")
    with pytest.raises(OSError, match="Bad file descriptor"):
        twin(ours.fileno() if ours.fileno() >= 0 else 10**6, MIB)


def test_end_of_file_ends_it(twin):
    with running(twin) as (drain, peer):
        peer.send(record(1))
        peer.close()
        while not drain.ended:
            assert readable(drain, 10)
            drain.take()
        assert drain.error == 0
        assert drain.sync(1) is False
        assert readable(drain)


def test_a_read_error_ends_it(twin):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours, theirs:
        drain = twin(ours.fileno(), MIB)
        drain.start()
        theirs.send(record(5))
        assert drain.sync(10)
        ours.close()
        drain.sync(10)  # wakes it, and is released by the end
        assert drain.ended
        assert drain.error == errno.EBADF
        assert serials(drain.take()[0]) == [5]
        assert readable(drain)
        drain.close()
        assert drain.error == errno.EBADF


def test_a_dropped_drain_stops_its_thread(twin):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours, theirs:
        before = sorted(os.listdir("/proc/self/fd"))
        drain = twin(ours.fileno(), MIB)
        drain.start()
        theirs.send(record(1))
        assert readable(drain, 10)
        del drain
        gc.collect()
        assert sorted(os.listdir("/proc/self/fd")) == before
        assert threads() == 0


@pytest.mark.parametrize("told", [True, False], ids=["forget", "unaware"])
def test_a_forked_child_has_no_thread(twin, told):
    with running(twin) as (drain, peer):
        peer.send(record(1))
        assert drain.sync(10)

        def child():
            if told:
                drain.forget()
                drain.forget()
            assert drain.ended
            assert drain.sync(5) is False
            drain.stop()
            with pytest.raises(ValueError, match="closed"):
                drain.take()
            assert drain.stats()["backlog_bytes"] == 0
            drain.close()
            drain.close()

        assert in_child(child) == 0
        # and the parent's goes on
        assert serials(drain.take()[0]) == [1]
        peer.send(record(2))
        assert drain.sync(10)
        assert serials(drain.take()[0]) == [2]


def test_a_forked_child_may_just_drop_it(twin):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours, theirs:
        held = [twin(ours.fileno(), MIB)]
        held[0].start()

        def child():
            held.clear()
            gc.collect()

        assert in_child(child) == 0
        assert held[0].sync(10)
        held[0].close()


def test_forget_is_refused_where_the_thread_exists(twin):
    with running(twin) as (drain, _):
        with pytest.raises(RuntimeError, match="forked child"):
            drain.forget()
        assert drain.sync(10)


def test_single_events_are_never_paced_and_a_storm_is(twin):
    with running(twin, 16 * MIB, pace=20_000_000) as (drain, peer):
        for serial in range(5):
            peer.send(record(serial))
            assert readable(drain, 10)
            drain.take()
        assert drain.stats()["paced"] == 0
        big = b"".join(record(i) for i in range(300))
        for _ in range(6):
            peer.send(big)
            assert readable(drain, 10)
            take_all(drain)
        assert drain.stats()["paced"] >= 3


@pytest.mark.parametrize("twin", ["native"], indirect=True)  # the other's memory is malloc's
def test_an_emptied_ring_gives_its_pages_back(twin):
    def resident():
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * KIB

    with running(twin, 64 * MIB) as (drain, peer):
        packet = record(1, 60 * KIB, b"x")
        before = resident()
        while drain.stats()["backlog_bytes"] < 32 * MIB:
            peer.send(packet)
        assert drain.sync(10)
        assert resident() - before > 24 * MIB
        while drain.take():
            pass
        assert drain.sync(10)
        assert resident() - before < 12 * MIB
