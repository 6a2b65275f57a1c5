"""``fanwise health`` as a process, on filesystems that really break: totals against the superblock.

Each test has a database of its own, and follows its own filesystems only.
"""

import contextlib
import http.server
import json
import os
import select
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.kernel.conftest import loop_device, run as must, unmount
from tests.kernel.faults import code_of, counted, fsync, volume
from tests.loopback import ADDRESS

DEADLINE = 60


@pytest.fixture(scope="module", autouse=True)
def _root(cannot_run):
    if os.geteuid():
        cannot_run("breaking filesystems needs root")


@pytest.fixture
def environ(tmp_path, tracefs):
    return {
        "FANWISE_HEALTH_STATE": str(tmp_path / "state"),
        "FANWISE_HEALTH_SECOND": str(tmp_path / "second.db"),
        "FANWISE_HEALTH_TRACEFS": tracefs,
        "FANWISE_HEALTH_COUNTERS": "1",
    }


@pytest.fixture
def follow(fanwise, environ):
    """Start a follower of some paths; it is ready when this returns.

    It listens to their filesystems only: others on the machine are others' business.
    """

    def start(*paths, environ=environ, options=(), only=None):
        points = ",".join(map(str, paths if only is None else only))
        environ = {"FANWISE_HEALTH_ONLY": points} | environ
        running = fanwise("health", "--follow", "--json", *options, *paths, environ=environ)
        running.ready = running.record()
        assert running.ready is not None, running.errors()
        assert (running.ready["type"], running.ready["v"]) == ("ready", 1)
        return running

    return start


@pytest.fixture
def look(run, environ):
    """One look: its status, the states and the incidents."""

    def once(*arguments, environ=environ):
        status, out, err = run("health", "--json", *arguments, environ=environ)
        lines = [json.loads(line) for line in out.splitlines()]
        states = [line for line in lines if line["type"] == "state"]
        return status, states, [line for line in lines if line["type"] == "incident"], err

    return once


def tree(point):
    (point / "d").mkdir()
    for name in ("f", "g", "h"):
        (point / "d" / name).write_text("x" * 9000)


@contextlib.contextmanager
def broken(where, *names, **options):
    """An ext4 in which these files of d have a broken extent header."""
    with volume("ext4", where, prepare=tree, **options) as it:
        with it.unmounted():
            for name in names:
                it.debugfs(f"sif /d/{name} block[0] 0x1111")
        yield it


def met(it, name):
    assert code_of((it.point / "d" / name).read_text) == "EUCLEAN"


def settled(running, *totals, before=()):
    """The open incidents by id, read until these are their totals; the newest record of each.

    On the way there errors may be counted on another, or on one that becomes part of another: a
    channel without objects told of them first. ``before`` are those that were told before: one that
    does not grow is not told again.
    """
    return _until(running, before, lambda found: sorted(found) == sorted(totals))


def summed(running, total, before=()):
    """The same, where only the sum is known: the counter names the last that nobody heard."""
    return _until(running, before, lambda found: sum(found) == total)


def _until(running, before, enough):
    found = dict(before)

    def wanted(record):
        if record["type"] == "incident":
            found[record["id"]] = record
            if record["status"] != "open":
                del found[record["id"]]
        return enough([record["total"] for record in found.values()])

    running.until(wanted)
    return found


def checked(it):
    """Unmount it and check it, in a later second than what happened before; it is mounted again.

    Of what was seen in the second of a check it is known only sometimes whether that was before:
    records that are read after the unmount tell of no life of the superblock.
    """
    it.unmount()
    time.sleep(1.1 - time.time() % 1)  # e2fsck asks time(2), which is a tick behind
    for _ in range(2):  # the second finds nothing left
        done = subprocess.run(["e2fsck", "-fy", it.device], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    it.mount()


def lose(it, name):
    """Data that is not written back, and nothing else: a journal is written when it likes."""
    file = it.point / "d" / name
    it.faults.fail("write", 5, *it.extent(file))
    assert code_of(lambda: fsync(file, b"x" * 9000)) == "EIO"
    it.faults.clear()


def listed(look, path, *ids):
    """What a look lists, when these are the ids of what is open: storing goes beside telling."""
    found = []

    def there():
        found[:] = look(path)
        return {i["id"] for i in found[2] if i["status"] == "open"} == set(ids)

    eventually(there)
    return found


def instances(tracefs):
    return [name for name in os.listdir(Path(tracefs, "instances")) if name.startswith("fanwise-")]


def states(record):
    """What the sources in a record say of themselves, all together."""
    return {source["state"] for source in record["sources"].values()}


def trace_is(state):
    """Whether a record says that the trace is in this state."""
    return lambda r: r["type"] == "sources" and r["sources"]["trace"]["state"] == state


def of_both(record):
    """Whether it is an incident that both the channels of an error of ext4 told of."""
    return record["type"] == "incident" and {"fserror", "trace"} <= set(record["channels"])


def of_an_object(record):
    """Whether it is an incident of which it is known where its object is."""
    return record["type"] == "incident" and record["applies"] in ("object", "elsewhere")


def of_process(tracefs, pid):
    return [name for name in instances(tracefs) if name.startswith(f"fanwise-{pid}-")]


def test_an_error_becomes_an_incident_that_is_told_stored_shown_and_seen(
    tmp_path, follow, look, run, environ, tracefs
):
    with broken(tmp_path, "f") as it:
        ino = (it.point / "d").stat().st_ino
        running = follow(it.point)
        sources = running.ready["sources"]
        assert {name: sources[name]["state"] for name in sources} == dict.fromkeys(
            ("fserror", "trace", "counters", "mounts", "kmsg", "database"), "up"
        )
        assert of_process(tracefs, running.pid)
        met(it, "f")
        # Whichever channel is the first makes it, the others amend it.
        told = [r for r in running.until(of_both) if r["type"] == "incident"]
        record = told[-1]
        assert record["fs"]["mounts"] == [str(it.point)]
        assert (record["fs"]["fstype"], record["fs"]["device"]) == ("ext4", f"7:{it.dev[1]}")
        assert len(record["fs"]["uuid"]) == 36
        assert record["scope"] == "inode"
        assert record["object"]["ino"] not in (None, ino)
        assert set(record["object"]) >= {"ino", "gen", "path", "path_source"}
        assert (record["errno"], record["total"]) == ("EUCLEAN", 1)
        assert sum(r["count"] for r in told) == 1  # each since the report before it
        assert record["location"]["function"] == "ext4_ext_check_inode"
        assert record["location"]["line"] > 0
        assert record["process"]["pid"] == os.getpid()
        assert "image" in record["advice"]
        counted(it, 1)
        status, states, incidents, err = listed(look, it.point, record["id"])
        assert (status, err) == (1, "")
        (state,) = states
        assert (state["verdict"], state["open"], state["counters"]["errors"]) == (
            "incidents", 1, 1,
        )  # fmt: skip
        assert state["writer"]["pid"] == running.pid
        (incident,) = incidents
        assert (incident["id"], incident["total"]) == (record["id"], 1)
        assert running.stop()[-1] == {"type": "stopped", "incidents": 1}
        assert not of_process(tracefs, running.pid)

        status, out, _ = run("health", "show", record["id"], environ=environ)
        assert status == 0
        assert "ext4_ext_check_inode" in out
        assert run("health", "ack", record["id"], environ=environ)[0] == 0
        assert run("health", "ack", "nothing", environ=environ)[0] == 1
        (_, _, (incident,), _) = look(it.point)
        assert incident["acked"] > record["last_seen"]
        status, out, _ = run("health", it.point, environ=environ)
        assert status == 1
        assert "nobody has listened since" in out
        assert record["id"] in out

        # Repaired: the counter goes back, and the next look says that all is well.
        checked(it)
        assert look(it.point)[:1] == (0,)
        follow(it.point).stop()
        status, _, incidents, _ = look("--since", "1h", it.point)
        assert [(i["id"], i["status"], i["resolved"]) for i in incidents] == [
            (record["id"], "resolved", "the filesystem was checked")
        ]
        assert status == 0


def test_a_healthy_filesystem_and_one_that_nobody_can_tell_of(tmp_path, look, follow):
    with volume("ext4", tmp_path) as it:
        status, (state,), incidents, _ = look(it.point)
        assert (status, state["verdict"], incidents) == (0, "healthy", [])
        assert state["listened"] is None
    with volume("xfs", tmp_path) as it:
        status, (state,), incidents, _ = look(it.point)
        assert (status, state["verdict"]) == (3, "cannot tell")
        assert "nobody listens" in state["why"]
        running = follow(it.point)
        assert look(it.point)[0] == 0
        running.stop()
        assert look(it.point)[0] == 3


def test_without_tracefs_it_says_so_and_goes_on(tmp_path, follow, look, environ):
    without = environ | {"FANWISE_HEALTH_TRACEFS": str(tmp_path / "nothing")}
    with broken(tmp_path, "f") as it:
        running = follow(it.point, environ=without)
        trace = running.ready["sources"]["trace"]
        assert trace["state"] == "down"
        assert "mount" in trace["reason"]
        # ext4 counts its own errors.
        status, (state,), _, _ = look(it.point, environ=without)
        assert (status, state["verdict"]) == (0, "healthy")
        met(it, "f")
        record = running.until(lambda r: r["type"] == "incident" and "fserror" in r["channels"])[-1]
        assert (record["errno"], record["total"]) == ("EUCLEAN", 1)
        running.stop()


def test_xfs_needs_a_trace(tmp_path, follow, look, environ):
    without = environ | {"FANWISE_HEALTH_TRACEFS": str(tmp_path / "nothing")}
    with volume("xfs", tmp_path) as it:
        running = follow(it.point, environ=without)
        status, (state,), _, _ = look(it.point, environ=without)
        assert (status, state["verdict"]) == (3, "cannot tell")
        assert "trace is down" in state["why"]
        running.stop()


def test_a_restart_in_the_middle_and_a_kill_in_the_middle(tmp_path, follow, look, tracefs):
    with broken(tmp_path, "f", "g", "h") as it:
        running = follow(it.point)
        for _ in range(3):
            met(it, "f")
        first = settled(running, 3)
        running.stop()
        met(it, "f")  # nobody listens
        met(it, "g")
        counted(it, 5)
        running = follow(it.point)
        second = settled(running, 2, 3)
        assert set(first) <= set(second)
        for _ in range(7):
            met(it, "h")
            met(it, "f")
        running.type("incident")
        (name,) = of_process(tracefs, running.pid)
        # What is open is not removed: not by others that start here, before this looks.
        with open(Path(tracefs, "instances", name, "tracing_on")):
            os.kill(running.pid, signal.SIGKILL)
            running.wait()
            assert of_process(tracefs, running.pid), "a killed process cannot remove its instance"
        met(it, "g")
        counted(it, 20)
        again = follow(it.point)
        assert not of_process(tracefs, running.pid)
        third = summed(again, 20)
        assert set(first) <= set(third)
        again.stop()
        status, _, incidents, _ = look(it.point)
        assert (status, sum(i["total"] for i in incidents)) == (1, 20)


def test_errors_that_the_kernel_merged_count_once_everywhere(tmp_path, follow, look, environ):
    prom = tmp_path / "fanwise.prom"
    with broken(tmp_path, "f", "g", "h") as it:
        running = follow(it.point, environ=environ | {"FANWISE_HEALTH_TEXTFILE": str(prom)})
        second = follow(it.point)
        os.kill(running.pid, signal.SIGSTOP)
        try:
            os.waitid(os.P_PID, running.pid, os.WSTOPPED)  # all its threads
            for name in "ffgh":
                met(it, name)
            counted(it, 4)
        finally:
            os.kill(running.pid, signal.SIGCONT)
        settled(running, 1, 1, 2)
        settled(second, 1, 1, 2)
        eventually(lambda: metric(prom, "fanwise_fs_errors_total") == 4)
        second.send(signal.SIGTERM)
        second.rest()
        checked(it)
        running.until(lambda r: r["type"] == "incident" and r["status"] == "resolved")
        running.stop()
        status, _, incidents, _ = look("--since", "1h", it.point)
        assert (status, {i["status"] for i in incidents} - {"merged"}) == (0, {"resolved"})
        assert sorted(i["total"] for i in incidents if i["status"] == "resolved") == [1, 1, 2]


def metric(file, name):
    """The sum of a series over all its labels."""
    lines = file.read_text().splitlines() if file.exists() else ()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))


def test_killed_at_any_time_the_sum_is_the_superblocks(tmp_path, follow, look):
    total = 0
    with broken(tmp_path, "f", "g") as it:
        for n in range(4):
            running = follow(it.point)
            stop = threading.Event()

            def storm(stop=stop):
                nonlocal total
                while not stop.is_set():
                    met(it, "f")
                    met(it, "g")
                    total += 2

            thread = threading.Thread(target=storm)
            thread.start()
            try:
                for _ in range(n + 1):
                    running.type("incident")
                os.kill(running.pid, signal.SIGKILL)
                running.wait()
            finally:
                stop.set()
                thread.join()
            running.close()
        last = follow(it.point)
        summed(last, total)
        counted(it, total)
        last.stop()
        assert sum(i["total"] for i in look(it.point)[2]) == total


def test_a_check_ends_what_no_counter_counts(tmp_path, follow, look):
    with volume("ext4", tmp_path, faulty=True, prepare=tree) as it:
        running = follow(it.point)

        def lost():
            lose(it, "f")
            return running.until(
                lambda r: r["type"] == "incident" and r["errno"] == "EIO" and r["object"]["ino"]
            )[-1]

        first = lost()
        assert it.sysfs("errors_count") == "0"
        it.unmount()
        it.mount()
        assert listed(look, it.point, first["id"])[0] == 1, "mounting it anew is no check"
        checked(it)
        said = running.until(lambda r: r["type"] == "incident" and r["status"] == "resolved")[-1]
        assert (said["id"], said["resolved"]) == (first["id"], "the filesystem was checked")
        assert listed(look, it.point)[0] == 0
        lost()
        running.stop()
        assert [i["status"] for i in look(it.point)[2]] == ["open"]
        checked(it)
        assert look(it.point)[0] == 0, "nobody listened"


def test_an_operator_ends_what_nothing_tells_of(tmp_path, follow, look, run, environ):
    with volume("xfs", tmp_path, faulty=True, prepare=tree) as it:
        running = follow(it.point)
        found = []
        for name in "fgh":
            lose(it, name)
            found.append(running.until(
                lambda r: r["type"] == "incident" and r["id"] not in found
            )[-1]["id"])  # fmt: skip
        first, second, third = found
        listed(look, it.point, *found)
        assert run("health", "resolve", first, environ=environ)[0] == 0
        assert {i["id"] for i in look(it.point)[2]} == {second, third}
        said = running.until(lambda r: r["type"] == "incident" and r["status"] == "resolved")[-1]
        assert (said["id"], said["resolved"]) == (first, "by an operator")
        running.stop()
        assert run("health", "resolve", second, environ=environ)[0] == 0
        assert run("health", "resolve", second, environ=environ)[0] == 1, "it is not open"
        assert {i["id"] for i in look(it.point)[2]} == {third}
        running = follow(it.point)
        assert {i["id"] for i in look(it.point)[2]} == {third}
        assert run("health", "resolve", third, environ=environ)[0] == 0
        assert look(it.point)[0] == 0
        lose(it, "f")
        again = running.until(
            lambda r: r["type"] == "incident" and r["status"] == "open" and r["count"]
        )[-1]
        assert again["id"] not in found
        running.stop()


def test_a_second_follower_reads_what_the_first_writes(tmp_path, follow, fanwise, environ):
    with broken(tmp_path, "f", "g") as it:
        first = follow(it.point)
        met(it, "f")
        told = first.type("incident")
        second = fanwise("health", "--follow", "--json", it.point, environ=environ)
        ready = second.record()
        assert ready["writer"]["pid"] == first.pid
        assert ready["sources"]["fserror"]["state"] == "up"
        assert second.type("incident")["id"] == told["id"]
        met(it, "g")
        other = second.type("incident")
        assert (other["total"], other["count"]) == (1, 1) or other["id"] == told["id"]
        met(it, "f")
        second.until(lambda r: r["type"] == "incident" and r["total"] == 2)
        first.stop()
        second.until(lambda r: r["type"] == "sources" and states(r) == {"down"})
        second.send(signal.SIGTERM)
        second.rest()
        assert second.wait() == 0
        assert f"process {first.pid} (fanwise) listens" in second.errors()


def test_two_thousand_errors_of_one_process_and_300_processes(tmp_path, follow, look):
    with broken(tmp_path, "f", "g") as it:
        running = follow(it.point)
        for _ in range(2000):
            met(it, "f")
        script = 'for i in $(seq 300); do sh -c "exec 3<$1" 2>/dev/null; done; true'
        subprocess.run(["sh", "-c", script, "sh", it.point / "d/g"], check=True)
        settled(running, 300, 2000)
        counted(it, 2300)
        running.stop()
        assert sum(i["total"] for i in look(it.point)[2]) == 2300


def test_xfs_and_btrfs(tmp_path, follow, look):
    with volume("xfs", tmp_path) as one, volume("btrfs", tmp_path, faulty=True) as two:
        fsync(two.point / "f", b"a" * 65536)
        running = follow(one.point, two.point)
        one.shut_down()
        record = running.type("incident")
        assert (record["fs"]["fstype"], record["state"]) == ("xfs", "shutdown")
        assert record["at_least"]
        two.faults.fail("write", 5)
        code_of(lambda: fsync(two.point / "f", b"b" * 65536))
        found = running.until(
            lambda r: (
                r["type"] == "incident"
                and r["fs"]["fstype"] == "btrfs"
                and "counters" in r["channels"]
            )
        )[-1]
        assert found["errno"] == "EIO"
        running.stop()
        status, states, _, _ = look(one.point, two.point)
        assert status == 1
        assert {state["fs"]["fstype"]: state["state"] for state in states}["xfs"] == "shutdown"


def test_what_is_mounted_later_and_mounted_again(tmp_path, follow, look):
    with broken(tmp_path, "f", "g") as it:
        running = follow(it.point)
        met(it, "f")
        told = settled(running, 1)
        it.unmount()
        it.mount()
        met(it, "f")
        met(it, "g")
        # Which of the two has the second error: before the new mount is marked, the counter alone
        # tells of it, with its last object.
        found = summed(running, 3, before=told)
        assert set(told) <= set(found)
        counted(it, 3)
        # An idle follower holds nothing: unmounting works.
        it.unmount()
        running.stop()
        it.mount()


def test_two_filesystems_with_one_uuid_keep_their_counts(tmp_path, follow):
    uuid = "11111111-2222-3333-4444-555555555555"
    with (
        broken(tmp_path / "a", "f", mkfs=("-U", uuid)) as one,
        broken(tmp_path / "b", "f", mkfs=("-U", uuid)) as two,
    ):
        running = follow(one.point, two.point)
        for _ in range(2):
            met(one, "f")
        for _ in range(3):
            met(two, "f")
        found = settled(running, 2, 3)
        totals = {r["fs"]["mounts"][0]: r["total"] for r in found.values()}
        assert totals == {str(one.point): 2, str(two.point): 3}
        assert (one.sysfs("errors_count"), two.sysfs("errors_count")) == ("2", "3")
        running.stop()


def test_a_trace_that_somebody_switches_off_is_said_and_switched_on_again(
    tmp_path, follow, tracefs, look
):
    with broken(tmp_path, "f") as it:
        running = follow(it.point)
        (name,) = of_process(tracefs, running.pid)
        Path(tracefs, "instances", name, "tracing_on").write_text("0")
        said = running.until(trace_is("degraded"))[-1]["sources"]["trace"]
        assert "switched it off" in said["reason"]
        met(it, "f")
        traced = running.until(of_both)[-1]
        assert traced["errno"] == "EUCLEAN"
        assert Path(tracefs, "instances", name, "tracing_on").read_text() == "1\n"
        said = running.until(trace_is("up"))[-1]["sources"]["trace"]
        assert said["uncounted"]
        running.stop()


def test_a_path_below_the_mount_point_selects_its_objects_and_the_whole_filesystems(
    tmp_path, follow, look
):
    def more(point):
        tree(point)
        (point / "e").mkdir()
        (point / "e/f").write_text("x" * 9000)

    with volume("ext4", tmp_path, prepare=more) as it:
        with it.unmounted():
            it.debugfs("sif /d/f block[0] 0x1111", "sif /e/f block[0] 0x1111")
        bind = tmp_path / "bind"
        bind.mkdir()
        must("mount", "--bind", str(it.point / "d"), str(bind))
        try:
            running = follow(bind)
            it.trigger()
            record = running.type("incident")
            assert (record["scope"], record["applies"]) == ("fs", "fs")
            met(it, "f")
            # That is told when it is known what lies above its path.
            record = running.until(lambda r: r["type"] == "incident" and r["applies"] == "object")[
                -1
            ]
            assert (record["scope"], record["object"]["path"]) == ("inode", str(it.point / "d/f"))
            assert code_of((it.point / "e/f").read_text) == "EUCLEAN"
            elsewhere = running.until(
                lambda r: r["type"] == "incident" and r["applies"] == "unknown"
            )[-1]
            assert elsewhere["id"] != record["id"]
            # Until its path is known it may lie below, and then it is told that it does not.
            corrected = running.until(lambda r: r.get("applies") == "elsewhere")[-1]
            assert (corrected["id"], corrected["object"]["path"]) == (
                elsewhere["id"], str(it.point / "e/f"),
            )  # fmt: skip
            running.stop()
            _, (state,), incidents, _ = look(bind)
            assert state["fs"]["device"] == record["fs"]["device"]
            assert [i["id"] for i in incidents if i["applies"] == "object"] == [record["id"]]
            assert elsewhere["id"] not in {i["id"] for i in incidents}
            assert len(look(it.point / "e")[2]) == 2
            assert len(look(it.point)[2]) == 3
        finally:
            unmount(bind)


def test_what_is_followed_is_the_directory_and_not_its_name(tmp_path, follow):
    with broken(tmp_path, "f") as it:
        running = follow(it.point / "d", only=[it.point])
        (it.point / "d").rename(it.point / "e")
        assert code_of((it.point / "e/f").read_text) == "EUCLEAN"
        # First, when the trace alone told of it, it may be about the whole filesystem.
        record = running.until(of_an_object)[-1]
        assert (record["applies"], record["object"]["path"]) == ("object", str(it.point / "e/f"))
        running.stop()


def test_paths_select_what_is_told_and_not_what_is_listened_to(tmp_path, follow, look, fanwise):
    with broken(tmp_path / "1", "f") as one, broken(tmp_path / "2", "f") as two:
        running = follow(one.point, only=[one.point, two.point])
        met(two, "f")
        eventually(lambda: [i["total"] for i in look(two.point)[2]] == [1])
        met(one, "f")
        assert running.type("incident")["fs"]["mounts"] == [str(one.point)]
        assert look(two.point)[1][0]["listened"]
        running.stop()


def test_a_reader_says_what_its_writer_does_not_listen_to(tmp_path, follow, fanwise, environ):
    with broken(tmp_path / "1") as one, broken(tmp_path / "2") as two:
        first = follow(one.point)
        second = fanwise("health", "--follow", "--json", two.point, environ=environ)
        assert second.record()["writer"]["pid"] == first.pid
        first.stop()
        said = second.until(lambda r: r["type"] == "sources" and states(r) == {"down"})[-1]
        assert {state["reason"] for state in said["sources"].values()} == {"nobody listens"}
        second.send(signal.SIGTERM)
        second.rest()
        assert second.wait() == 0
        assert f"{two.point}: it is not listened to" in second.errors()


def test_a_path_on_what_hangs_is_answered_in_time(tmp_path, follow, look):
    with broken(tmp_path, "f", faulty=True) as it:
        running = follow(it.point)
        met(it, "f")
        running.until(lambda r: r["type"] == "incident" and r["object"]["path"])
        running.stop()
        with it.unmounted():
            pass
        it.faults.hang("read")
        try:
            began = time.monotonic()
            status, (state,), incidents, _ = look(it.point / "d")
            assert time.monotonic() - began < 10
        finally:
            it.faults.clear()
        assert (status, state["state"]) == (1, "hung")
        assert [i["applies"] for i in incidents if i["scope"] == "inode"] == ["object"]


def test_on_another_device_number_it_is_the_same_filesystem(tmp_path, follow, look):
    with broken(tmp_path, "f") as it:
        running = follow(it.point)
        met(it, "f")
        first = settled(running, 1)
        running.stop()
        it.unmount()
        with loop_device(it.image) as other:
            must("mount", other, str(it.point))
            try:
                again = follow(it.point)
                met(it, "f")
                second = settled(again, 2)
                assert list(second) == list(first)
                (record,) = second.values()
                assert record["fs"]["name"] == os.path.basename(other)
                again.stop()
            finally:
                unmount(it.point)
        it.mount()
        _, _, (incident,), _ = look(it.point)
        assert (incident["id"], incident["total"]) == (record["id"], 2)
        assert incident["fs"]["name"] == it.name


class Deaf(http.server.BaseHTTPRequestHandler):
    """Takes what is posted, and answers when the test is over."""

    over = threading.Event()

    def do_POST(self):
        Deaf.over.wait(DEADLINE)

    def log_message(self, *arguments):
        pass


def test_hostile_rules_and_a_deaf_webhook(tmp_path, follow, run, environ):
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nname = "x"\nactions = ["none"]\n')
    status, _, err = run("health", "--follow", "--rules", rules, environ=environ)
    assert status == 2
    assert f"{rules}:3:" in err
    status, _, err = run("health", "--rules", rules, environ=environ)
    assert (status, "--follow" in err) == (2, True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Deaf)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    log = tmp_path / "log.jsonl"
    rules.write_text(
        f'[action.hook]\nkind = "webhook"\nurl = "http://127.0.0.1:{server.server_port}/"\n'
        f'tries = 1\nlimit = 1.0\n[action.log]\nkind = "log"\nfile = "{log}"\n'
        f'[action.run]\nkind = "exec"\nprogram = "/bin/sh"\n'
        f'arguments = ["-c", "grep SigBlk /proc/self/status > {tmp_path}/mask"]\n'
        '[[rule]]\nname = "all"\nactions = ["run", "hook", "log"]\nmatch.errno = ["EUCLEAN"]\n'
    )
    try:
        with broken(tmp_path, "f") as it:
            running = follow(it.point, options=("--rules", rules))
            met(it, "f")
            record = running.type("incident")
            said = running.until(
                lambda r: r["type"] == "sources" and r["sources"]["actions"]["reason"]
            )[-1]
            assert "hook" in said["sources"]["actions"]["reason"]
            # Each action has a thread of its own.
            eventually(lambda: all(f.exists() and f.read_text() for f in (tmp_path / "mask", log)))
            # It may be ended by signals: fanwise blocks none in it.
            assert int((tmp_path / "mask").read_text().split()[1], 16) == 0
            assert json.loads(log.read_text().splitlines()[0])["id"] == record["id"]
            running.stop()
    finally:
        Deaf.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


def test_metrics_by_http_and_as_a_file(tmp_path, follow, look):
    import urllib.request

    file = tmp_path / "fanwise.prom"
    with broken(tmp_path, "f", faulty=True) as it:
        address = f"{ADDRESS}:9899"
        running = follow(it.point, options=("--metrics", address, "--textfile", file))
        met(it, "f")
        met(it, "f")
        settled(running, 2)
        wanted = 'errno="EUCLEAN",scope="inode"} 2'
        eventually(lambda: file.exists() and wanted in file.read_text())
        assert 'fanwise_health_source_up{source="trace"} 1' in file.read_text()
        answer = urllib.request.urlopen(f"http://{address}/metrics").read().decode()
        assert wanted in answer
        lose(it, "g")
        # Once each, although the log has them too.
        eventually(
            lambda: (
                metric(file, "fanwise_fs_writeback_errors_total")
                == sum(i["total"] for i in look(it.point)[2] if i["errno"] == "EIO")
                > 0
            )
        )
        running.stop()


def stored(database):
    """How many errors the incidents in a database have."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return connection.execute("SELECT coalesce(sum(total), 0) FROM incident").fetchone()[0]


def eventually(wanted):
    until = time.monotonic() + DEADLINE
    while not wanted():
        assert time.monotonic() < until
        select.select([], [], [], 0.05)


def test_the_failing_filesystem_is_not_written_to(tmp_path, follow, environ, run):
    with broken(tmp_path, "f") as it:
        home = environ | {"FANWISE_HEALTH_STATE": str(it.point / "state")}
        running = follow(it.point, environ=home)
        met(it, "f")
        record = running.type("incident")
        said = running.until(
            lambda r: r["type"] == "sources" and r["sources"]["database"]["state"] != "up"
        )[-1]
        assert "second place" in said["sources"]["database"]["reason"]
        eventually(lambda: stored(tmp_path / "second.db") == 1)
        files = [it.point / "state" / f"health.db{side}" for side in ("", "-wal")]
        before = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        met(it, "f")
        settled(running, 2)
        eventually(lambda: stored(tmp_path / "second.db") == 2)
        running.stop()
        assert before == [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        running = follow(it.point, environ=home)
        assert "second place" in running.ready["sources"]["database"]["reason"]
        assert running.type("incident")["id"] == record["id"]
        running.stop()
        assert before == [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        status, out, _ = run("health", "--json", it.point, environ=home)
        assert status == 1
        assert record["id"] in out
        assert run("health", "show", record["id"], environ=home)[0] == 0
        status, _, err = run("health", "ack", record["id"], environ=home)
        assert (status, err) == (0, "")


def test_where_no_place_is_left_memory_keeps(tmp_path, follow, environ):
    with broken(tmp_path, "f") as it:
        both = environ | {
            "FANWISE_HEALTH_STATE": str(it.point / "state"),
            "FANWISE_HEALTH_SECOND": str(it.point / "second.db"),
        }
        running = follow(it.point, environ=both)
        met(it, "f")
        said = running.until(
            lambda r: r["type"] == "sources" and r["sources"]["database"]["state"] != "up"
        )[-1]
        assert "memory" in said["sources"]["database"]["reason"]
        met(it, "f")
        settled(running, 2)
        running.stop()
        assert stored(it.point / "state/health.db") == 0


def test_signals_and_a_reader_that_leaves(tmp_path, follow, tracefs):
    with volume("ext4", tmp_path) as it:
        for signum in (signal.SIGINT, signal.SIGTERM):
            running = follow(it.point)
            running.stop(signum)
        running = follow(it.point)
        running.process.stdout.close()
        assert running.wait() == 0
        assert not of_process(tracefs, running.pid)
        running.process.stdout = None
        running.process.stderr.close()
        running.process.stderr = None


def test_not_root_it_says_what_it_cannot_see(tmp_path, fanwise, environ):
    with broken(tmp_path, "f") as it:
        met(it, "f")
        for at in (tmp_path, *tmp_path.parents):
            if at.stat().st_mode & 0o001 == 0:
                at.chmod(at.stat().st_mode | 0o011)
        home = tmp_path / "home"
        home.mkdir()
        os.chown(home, 65534, 65534)
        mine = {
            "FANWISE_HEALTH_STATE": str(home / "state"),
            "FANWISE_HEALTH_TRACEFS": environ["FANWISE_HEALTH_TRACEFS"],
            "FANWISE_HEALTH_COUNTERS": "0.5",
            "FANWISE_HEALTH_ONLY": str(it.point),
        }
        # The tests' interpreter may be in a directory of root's.
        caps = "+dac_read_search"
        prefix = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
                  f"--inh-caps={caps}", f"--ambient-caps={caps}")  # fmt: skip
        running = fanwise("health", "--follow", "--json", it.point, environ=mine, prefix=prefix)
        ready = running.record()
        assert ready is not None, running.errors()
        down = {name for name, s in ready["sources"].items() if s["state"] == "down"}
        assert down >= {"fserror", "trace"}
        assert all(ready["sources"][name]["reason"] for name in down)
        record = running.type("incident")
        assert (record["total"], record["count_source"]) == (1, "counters")
        met(it, "f")
        summed(running, 2, before={record["id"]: record})
        running.stop()


def test_schema_and_wrong_usage(run, tmp_path, environ):
    status, out, _ = run("health", "--schema")
    assert status == 0
    assert {"ready", "state", "incident", "sources", "stopped"} == {
        value["properties"]["type"].get("const") or value["properties"]["type"]["enum"][0]
        for value in json.loads(out)["$defs"].values()
        if "type" in value.get("properties", {})
    }
    assert run("health", "--since", "yesterday", environ=environ)[0] == 2
    assert run("health", "--follow", "--metrics", "1:2:3", environ=environ)[0] == 2
    # That it is not there is no incident.
    assert run("health", tmp_path / "nothing", environ=environ)[0] == 3
    assert run("health", "show", "nothing", environ=environ)[0] == 1


def test_names_that_are_hostile(tmp_path, follow, run, environ):
    where = tmp_path / "a\x1b[31m\nb\udcff"
    where.mkdir()
    with broken(where, "f") as it:
        running = follow(it.point)
        met(it, "f")
        record = running.type("incident")
        assert "\x1b[31m\nb" in record["fs"]["mounts"][0]
        running.stop()
        status, out, err = run("health", it.point, environ=environ)
        assert (status, err) == (1, "")
        assert "\x1b" not in out
        assert len(out.splitlines()) >= 3


def test_a_file_whose_name_is_not_text(tmp_path, follow, look):
    def prepare(point):
        with open(os.path.join(os.fsencode(point), b"caf\xe9\n"), "w") as file:
            file.write("x" * 9000)

    with volume("ext4", tmp_path, prepare=prepare) as it:
        name = os.path.join(os.fsencode(it.point), b"caf\xe9\n")
        ino = os.stat(name).st_ino
        with it.unmounted():
            it.debugfs(f"sif <{ino}> block[0] 0x1111")
        running = follow(it.point)
        script = (
            "import os, sys\n"
            "open('/proc/self/comm', 'wb').write(b'\\xff\\xfe')\n"
            "try: os.stat(os.fsencode(sys.argv[1]))\n"
            "except OSError: sys.stdin.read()"  # it can be looked at
        )
        argv = [sys.executable, "-BIS", "-c", script, name]
        with subprocess.Popen(argv, stdin=subprocess.PIPE):
            # The counter may be the first, and knows of no process.
            met_by = running.until(lambda r: r["type"] == "incident" and r["process"])[-1]
            assert met_by["process"]["comm"] == "��"
        record = running.until(lambda r: r["type"] == "incident" and r["object"]["path"])[-1]
        assert record["object"]["path"] == f"{it.point}/caf�\n"
        running.stop()
        assert [i["id"] for i in look(it.point)[2]] == [record["id"]]
