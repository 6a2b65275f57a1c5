"""The private tracefs instance: its life, what it leaves alone, and its losses."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fanwise import DecodeError
from fanwise.sources import trace
from fanwise.sources.trace import STACK, TraceEvent, TraceSource, remove_dead
from tests.kernel.conftest import own_instances, run

RENAME = TraceEvent("task/task_rename", ("pid", "newcomm"))
HOLD = """
import sys
from fanwise.sources.trace import TraceEvent, TraceSource
source = TraceSource([TraceEvent("task/task_rename")], tracefs=sys.argv[1])
source.open()
print(source.state, source.path, flush=True)
sys.stdin.read()
"""


def rename_self(*names: str) -> None:
    """Raise one record for each name."""
    with open("/proc/self/comm") as file:
        before = file.read().strip()
    fd = os.open("/proc/self/comm", os.O_WRONLY)
    try:
        for name in (*names, before):
            os.write(fd, name.encode())
    finally:
        os.close(fd)


def machine(tracefs: str) -> dict[str, str]:
    """What is set outside of instances."""
    found = {}
    names = ("set_event", "tracing_on", "current_tracer", "trace_clock", "buffer_size_kb")
    for name in (*names, "buffer_percent", "trace_options", "events/enable", "set_event_pid"):
        found[name] = Path(tracefs, name).read_text()
    return found


def test_records_come_with_time_and_fields(tracefs):
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    with TraceSource([RENAME], tracefs=tracefs) as source:
        assert (source.state, source.reason, source.missing) == ("UP", None, {})
        rename_self("fw-one", "fw-two")
        records, losses = source.take()
        after = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        ours = [r for r in records if r.values[0] == os.getpid()]
        assert [r.values[1] for r in ours][:2] == [b"fw-one", b"fw-two"]
        assert losses == []
        assert all(r.event == "task/task_rename" for r in ours)
        assert before <= ours[0].time <= ours[1].time <= source.complete_to <= after
        assert abs(source.wall(ours[0].time) - time.time()) < 60


def test_nothing_outside_of_the_instance_changes(tracefs):
    before = machine(tracefs)
    source = TraceSource([RENAME._replace(filter="pid > 0", stacks=1)], tracefs=tracefs)
    with source:
        assert source.state == "UP"
        assert machine(tracefs) == before
        assert len(own_instances(tracefs)) == 1
        rename_self("fw-one")
        source.take()
    assert source.state == "CLOSED"
    assert machine(tracefs) == before
    assert own_instances(tracefs) == []


def test_two_at_once(tracefs):
    with TraceSource([RENAME], tracefs=tracefs) as one:
        with TraceSource([RENAME], tracefs=tracefs) as two:
            rename_self("fw-one")
            for source in (one, two):
                assert b"fw-one" in [r.values[1] for r in source.take()[0]]
        rename_self("fw-two")
        assert b"fw-two" in [r.values[1] for r in one.take()[0]]


def test_a_filter_and_a_limited_number_of_stacks(tracefs):
    event = RENAME._replace(filter='newcomm == "fw-yes"', stacks=2)
    with TraceSource([event], tracefs=tracefs) as source:
        rename_self("fw-yes", "fw-no", "fw-yes", "fw-yes")
        records, _ = source.take()
    assert [r.values[1] for r in records if r.event != STACK] == [b"fw-yes"] * 3
    stacks = [r for r in records if r.event == STACK]
    assert len(stacks) == 2
    assert all(len(r.values[0]) > 3 and min(r.values[0]) > 0 for r in stacks)
    first = records.index(stacks[0])
    assert records[first - 1].cpu == stacks[0].cpu


def test_it_wakes_for_a_single_record(tracefs):
    import select

    with TraceSource([RENAME._replace(filter='newcomm == "fw-yes"')], tracefs=tracefs) as source:
        poll = select.poll()
        for fd in source.filenos():
            poll.register(fd, select.POLLIN)
        assert poll.poll(0) == []
        rename_self("fw-yes")
        assert poll.poll(60_000)


def test_what_is_written_while_it_reads_does_not_wait_for_the_next(tracefs, monkeypatch):
    """Its time is after the beginning: another CPU may have an earlier one that was not read."""
    late = ["fw-late"]

    def clock(which):
        now = time.clock_gettime_ns(which)
        if late:
            rename_self(late.pop())
        return now

    event = RENAME._replace(filter=f"pid == {os.getpid()}")
    with TraceSource([event], tracefs=tracefs) as source:
        times = SimpleNamespace(
            clock_gettime_ns=clock, CLOCK_BOOTTIME=time.CLOCK_BOOTTIME, time_ns=time.time_ns
        )
        monkeypatch.setattr(trace, "time", times)
        records, losses = source.take()
        assert [r.values[1] for r in records][:1] == [b"fw-late"]
        assert (losses, source._held) == ([], [])
        assert records[-1].time <= source.complete_to


def test_losses_are_counted(tracefs):
    # 20,000 records of some 60 bytes in buffers of 64 KiB.
    event = TraceEvent("task/task_rename", ("newcomm",), filter=f"pid == {os.getpid()}")
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    with TraceSource([event], kb=64, tracefs=tracefs) as source:
        rename_self(*["fw-storm"] * 19_999)
        records, losses = source.take()
        assert losses
        assert len(records) + sum(loss.records or 0 for loss in losses) == 20_000
        assert source.lost == 20_000 - len(records)
        assert source.counters()["overrun"] == source.lost
        for loss in losses:
            assert before < loss.after < records[0].time < records[-1].time < loss.before
        rename_self("fw-after")
        records, losses = source.take()
        assert next(r.values[0] for r in records) == b"fw-after"
        assert losses == []


def test_a_missing_event_degrades(tracefs):
    absent = TraceEvent("fanwise/nonsense")
    wrong = RENAME._replace(fields=("nonsense",))
    with TraceSource([RENAME, absent], tracefs=tracefs) as source:
        assert source.state == "DEGRADED"
        assert list(source.missing) == ["fanwise/nonsense"]
        rename_self("fw-one")
        assert source.take()[0]
    for events in ([absent], [wrong], [RENAME._replace(filter="nonsense == 1")]):
        with TraceSource(events, tracefs=tracefs) as source:
            assert source.state == "DOWN"
            assert events[0].name in str(source.reason)
            assert source.take() == ([], [])
            assert own_instances(tracefs) == []


def test_no_tracefs(tmp_path):
    with TraceSource([RENAME], tracefs=str(tmp_path)) as source:
        assert source.state == "DOWN"
        assert str(tmp_path) in str(source.reason)


def hold(tracefs: str) -> "tuple[subprocess.Popen[str], str]":
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, tracefs],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    state, path = child.stdout.readline().split()
    assert state == "UP"
    return child, path


def test_a_killed_one_is_removed_by_the_next_and_a_live_one_is_not(tracefs):
    dead, left = hold(tracefs)
    live, kept = hold(tracefs)
    try:
        # What is open is not removed: not by others that start here, before this looks.
        with open(f"{left}/tracing_on") as file:
            dead.send_signal(signal.SIGKILL)
            dead.communicate()
            assert os.path.isdir(left)
            # The second net: the kernel stopped it when the process was gone.
            assert file.read() == "0\n"
        with TraceSource([RENAME], tracefs=tracefs):
            assert not os.path.exists(left)
            assert os.path.isdir(kept)
            assert Path(kept, "tracing_on").read_text() == "1\n"
    finally:
        for child in (dead, live):
            child.kill()
            child.communicate()
        remove_dead(tracefs)
    assert not os.path.exists(kept)


def test_one_that_is_not_ours_stays(tracefs):
    names = [f"fanwise-1-1-1-{os.getpid()}", f"fanwise-test-{os.getpid()}"]
    paths = [f"{tracefs}/instances/{name}" for name in names]
    try:
        for path in paths:
            os.mkdir(path)
        assert not set(remove_dead(tracefs)) & set(names)
        assert all(map(os.path.isdir, paths))
    finally:
        for path in paths:
            os.rmdir(path)


def test_one_that_somebody_reads_is_closed_and_removed_by_the_next(tracefs):
    source = TraceSource([RENAME], tracefs=tracefs)
    source.open()
    path, fds = source.path, source.filenos()
    with open(f"{path}/trace_pipe"):
        source.close()
        assert source.state == "CLOSED"
        assert not any(os.path.exists(f"/proc/self/fd/{fd}") for fd in fds)
        assert Path(path, "tracing_on").read_text() == "0\n"
        with TraceSource([RENAME], tracefs=tracefs):
            assert os.path.basename(path) in own_instances(tracefs)  # still read
    with TraceSource([RENAME], tracefs=tracefs) as other:
        assert own_instances(tracefs) == [os.path.basename(other.path)]
    assert own_instances(tracefs) == []


def test_one_that_somebody_removed_is_closed(tracefs):
    source = TraceSource([RENAME], tracefs=tracefs)
    source.open()
    fds = source.filenos()
    source._close_fds()  # rmdir is EBUSY before
    os.rmdir(source.path)
    source.close()
    assert source.state == "CLOSED"
    assert not any(os.path.exists(f"/proc/self/fd/{fd}") for fd in fds)


def cat_free_buffer(path):
    with open(f"{path}/free_buffer"):
        pass


@pytest.mark.parametrize(
    ("disturb", "said"),
    [
        (lambda path: Path(path, "tracing_on").write_text("0"), "switched it off (tracing_on)"),
        (lambda path: Path(path, "events/enable").write_text("0"), "disabled task/task_rename"),
        (lambda path: Path(path, "set_event").write_text(""), "disabled task/task_rename"),
        (lambda path: Path(path, "buffer_size_kb").write_text("8"), "the size of its buffers to"),
        (cat_free_buffer, "the size of its buffers to"),
    ],
    ids=["tracing_on", "events", "set_event", "size", "free_buffer"],
)
def test_what_somebody_did_to_it_is_put_right(tracefs, disturb, said):
    with TraceSource([RENAME._replace(stacks=4000)], tracefs=tracefs) as source:
        assert (source.keep(), source.disturbed) == (None, None)
        sizes = Path(source.path, "buffer_size_kb").read_text()
        before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        disturb(source.path)
        source.take()  # what it gives is not all up to now, as nobody knows yet
        loss = source.keep()
        assert loss.after <= before < loss.before
        assert loss.records is None
        assert said in source.disturbed
        rename_self("fw-after")
        records = source.take()[0]
        assert b"fw-after" in [r.values[1] for r in records if r.event != STACK]
        assert STACK in [r.event for r in records]
        assert Path(source.path, "buffer_size_kb").read_text() == sizes
        assert (source.keep(), source.disturbed, source.disturbances) == (None, None, 1)


def test_what_was_put_right_by_half_is_told_when_it_is_whole(tracefs, monkeypatch):
    with TraceSource([RENAME], tracefs=tracefs) as source:
        before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        Path(source.path, "events/enable").write_text("0")
        write = source._write

        def refused(name, text):
            if name == "tracing_on":
                raise OSError(errno.EMFILE, "Too many open files")
            write(name, text)

        with monkeypatch.context() as patch:
            patch.setattr(source, "_write", refused)
            with pytest.raises(OSError, match="Too many"):
                source.keep()
        assert Path(source.path, "events", RENAME.name, "enable").read_text() == "1\n"
        loss = source.keep()
        assert loss.after <= before
        assert "disabled task/task_rename" in source.disturbed
        assert source.keep() is None


def test_nobody_can_remove_one_that_records(tracefs):
    with TraceSource([RENAME], tracefs=tracefs) as source:
        with pytest.raises(OSError, match="busy"):
            os.rmdir(source.path)
        rename_self("fw-one")
        assert source.take()[0]


def test_the_mount_that_it_was_made_through_goes(tracefs, tmp_path):
    """As when it is another's: there is one tracefs, whoever mounts it where."""
    other = tmp_path / "other"
    other.mkdir()
    run("mount", "-t", "tracefs", "fanwise-test", str(other))
    with TraceSource([RENAME], tracefs=str(other)) as source:
        run("umount", "--lazy", str(other))
        assert not os.path.exists(source.path)
        assert source.recording
        Path(tracefs, "instances", os.path.basename(source.path), "tracing_on").write_text("0")
        assert source.keep() is not None
        rename_self("fw-one")
        assert source.take()[0]
        assert source.counters()["entries"] >= 0
        with open(f"{tracefs}/instances/{os.path.basename(source.path)}/trace_pipe"):
            source.close()
        assert own_instances(tracefs) != []  # read when it was to be removed
    with TraceSource([RENAME], tracefs=tracefs):
        pass
    assert own_instances(tracefs) == []


def test_the_mount_goes_while_it_is_made(tracefs, tmp_path, monkeypatch):
    """It is made anew through another one, and the first is not left."""
    other = tmp_path / "other"
    other.mkdir()
    run("mount", "-t", "tracefs", "fanwise-test", str(other))
    descriptors = set(os.listdir("/proc/self/fd"))
    source = TraceSource([RENAME._replace(stacks=1)])
    ways, read = iter([str(other), tracefs]), source._read

    def and_it_goes(name):
        if os.path.ismount(other):
            run("umount", "--lazy", str(other))
        return read(name)

    monkeypatch.setattr(source, "_find", lambda: next(ways))
    monkeypatch.setattr(source, "_read", and_it_goes)
    with source:
        assert (source.state, source.reason) == ("UP", None)
        assert os.path.dirname(source.path) == f"{tracefs}/instances"
        assert len(own_instances(tracefs)) == 1
        rename_self("fw-one")
        assert STACK in [r.event for r in source.take()[0]]
    assert own_instances(tracefs) == []
    assert set(os.listdir("/proc/self/fd")) <= descriptors


RACE = """
import os, sys
from fanwise.sources.trace import TraceEvent, TraceSource
for n in range(6):
    print("ready", flush=True)
    sys.stdin.readline()
    source = TraceSource([TraceEvent("task/task_rename")], tracefs=sys.argv[1])
    source.open()
    print(source.state, source.reason, flush=True)
    sys.stdin.readline()
    print(source.recording, flush=True)
    if len(sys.argv) > 2:
        os.kill(os.getpid(), 9)
    source.close()
"""


def test_many_that_start_and_end_at_once_while_others_are_killed(tracefs):
    """Whoever starts removes the dead ones; all want the same ones, and some are just going."""
    argv = [sys.executable, "-c", RACE, tracefs]
    children = []

    def start(*more):
        child = subprocess.Popen(
            [*argv, *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        children.append(child)
        assert child.stdout.readline() == "ready\n"
        return child

    def all_say(said, these):
        for child in these:
            child.stdin.write("go\n")
            child.stdin.flush()
        for child in these:
            assert child.stdout.readline() == said

    try:
        living = [start() for _ in range(4)]
        for n in range(6):
            killed = [start("dies") for _ in range(4)]
            all_say("UP None\n", killed)
            all_say("True\n", killed)
            for child in killed:
                assert child.wait(60) == -signal.SIGKILL
            all_say("UP None\n", living)
            all_say("True\n", living)
            if n < 5:
                assert [child.stdout.readline() for child in living] == ["ready\n"] * 4
        for child in living:
            assert child.wait(60) == 0
    finally:
        for child in children:
            child.kill()
            child.communicate()
        remove_dead(tracefs)


def test_a_page_header_that_makes_no_sense(tracefs, monkeypatch):
    def refuse(text):
        raise DecodeError(0, "header_page without 'commit'")

    monkeypatch.setattr("fanwise.sources.trace.parse_header_page", refuse)
    with TraceSource([RENAME], tracefs=tracefs) as source:
        assert source.state == "DOWN"
        assert "header_page" in source.reason
        assert own_instances(tracefs) == []


def test_a_forked_child_lets_go_and_removes_nothing(tracefs):
    with TraceSource([RENAME], tracefs=tracefs) as source:
        fds = source.filenos()
        pid = os.fork()
        if pid == 0:
            closed = all(not os.path.exists(f"/proc/self/fd/{fd}") for fd in fds)
            source.close()
            os._exit(0 if closed and source.state == "CLOSED" else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        rename_self("fw-one")
        assert source.take()[0]


def test_an_unprivileged_user_is_told(tracefs):
    script = (
        "import os, sys; os.setgid(65534); os.setuid(65534)\n"
        "from fanwise.sources.trace import TraceEvent, TraceSource\n"
        "source = TraceSource([TraceEvent('task/task_rename')])\n"
        "source.open(); print(source.state, source.reason, source.remedy)"
    )
    told = subprocess.run(
        [sys.executable, "-c", "import fanwise.sources.trace\n" + script],
        capture_output=True,
        text=True,
    )
    assert told.stdout.startswith("DOWN "), told
    assert "root" in told.stdout


def test_without_a_descriptor_left_it_is_down_or_closed_and_leaves_nothing(tracefs):
    """However far it comes; and one that is up can be closed."""
    with TraceSource([RENAME], tracefs=tracefs):
        pass  # what is imported and opened once, is
    fds = os.listdir("/proc/self/fd")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free, up = 0, False
    while not up:
        source = TraceSource([RENAME], tracefs=tracefs)
        at = os.open("/", os.O_PATH)  # the lowest that is free
        os.close(at)
        resource.setrlimit(resource.RLIMIT_NOFILE, (at + free, limits[1]))
        try:
            source.open()
            up = source.up
            assert up or (source.state == "DOWN" and "Too many open files" in source.reason)
            if "no instance" in (source.reason or ""):
                assert "ulimit -n" in source.remedy
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert up or own_instances(tracefs) == []
        free += 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
    try:
        source.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert own_instances(tracefs) == []
    assert len(os.listdir("/proc/self/fd")) == len(fds)
