"""Who did it: short-lived writers, exec, numbers used again, privileges dropped, no tracefs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fanwise
from fanwise import Change
from fanwise.watch import _who
from tests.kernel.conftest import own_instances, run
from tests.kernel.test_watch_hard import no_descriptors
from tests.kernel.watching import watching

EXE = os.readlink("/proc/self/exe")


def of(changes: list[Change], path: Path) -> list[Change]:
    return [c for c in changes if c.path == str(path)]


def python(script: str, *argv: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, argv)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def read_by(watch: fanwise.Watch) -> None:
    """Have the drain read all that is queued, so that what begins now begins after it."""
    assert all(group.empty(20) for group in watch._groups)
    time.sleep(0.01)  # more than the clocks are trusted with


def test_without_who_there_is_no_process(tmpfs, tracefs):
    with watching(tmpfs) as reader:
        (tmpfs / "a").touch()
        assert all(c.process is None for c in reader.told())
        assert reader.watch.who_limits is None
        assert not own_instances(tracefs)


def test_short_lived_writers_are_named(tmpfs, tracefs, pure):
    with watching(tmpfs, who=True, pure=pure) as reader:
        assert reader.watch.who_limits is None
        run("/bin/sh", "-c", f"/usr/bin/touch {tmpfs}/a; (: > {tmpfs}/b); /bin/mkdir {tmpfs}/c")
        (tmpfs / "d").touch()
        told = reader.told()
        for name, comm, exe in (
            ("a", "touch", "touch"),
            ("b", "sh", "sh"),
            ("c", "mkdir", "mkdir"),
        ):
            found = {c.process for c in of(told, tmpfs / name)}
            assert len(found) == 1, found
            process = found.pop()
            assert process is not None
            assert (process.name, os.path.basename(process.exe or "")) == (comm, exe)
            assert process.state in ("traced", "seen")
            if process.state == "traced":
                assert (process.user, process.cgroup) == (None, None)
        (own,) = {c.process for c in of(told, tmpfs / "d")}
        assert own is not None
        assert (own.exe, own.user, own.state) == (EXE, "root", "seen")
        assert own.cgroup is not None
        assert own.name == Path("/proc/self/comm").read_text().strip()
    assert not own_instances(tracefs)


def test_a_name_is_inherited_over_forks_and_kept_after_death(tmpfs, tracefs):
    script = """
import os, sys
with open("/proc/self/comm", "w") as f: f.write("fw-parent")
for depth in range(3):
    if os.fork():
        os.wait()
        os._exit(0)
open(sys.argv[1], "w").close()
"""
    with watching(tmpfs, who=True) as reader:
        child = python(script, tmpfs / "a")
        child.communicate()
        (found,) = {c.process for c in of(reader.told(), tmpfs / "a")}
        assert found is not None
        assert (found.name, found.state) == ("fw-parent", "traced")
        assert os.path.basename(found.exe or "").startswith("python")


EXEC = """
import os, sys
os.mkdir(sys.argv[1])  # one record, however it is read
print("done", flush=True)
sys.stdin.readline()
os.execv("/bin/sleep", ["sleep", "60"])
"""


def test_exec_between_the_change_and_the_look(tmpfs, tracefs):
    with watching(tmpfs, who=True) as reader:
        child = python(EXEC, tmpfs / "a")
        try:
            assert child.stdout is not None
            assert child.stdin is not None
            child.stdout.readline()
            read_by(reader.watch)  # the exec is after that
            child.stdin.write("\n")
            child.stdin.flush()
            deadline = time.monotonic() + 20
            while Path(f"/proc/{child.pid}/comm").read_text() != "sleep\n":
                assert time.monotonic() < deadline
            (found,) = {c.process for c in of(reader.told(), tmpfs / "a")}
            assert found is not None
            assert found.name is not None
            assert found.name.startswith("python")
            assert os.path.basename(found.exe or "").startswith("python")
            with open(f"/proc/{child.pid}/root{tmpfs}/b", "w"):
                pass
        finally:
            child.kill()
            child.communicate()


DROPS = """
import os, sys
for step in range(3):
    sys.stdin.readline()
    if step == 1:
        os.setgid(65534); os.setuid(65534)
    os.utime(sys.argv[1]) if step == 0 else open(sys.argv[1], "a").write("x")
    print("done", flush=True)
sys.stdin.readline()
"""


def test_privileges_dropped(tmpfs, tracefs):
    file = tmpfs / "a"
    file.touch()
    file.chmod(0o666)
    for parent in (tmpfs, *tmpfs.parents[:2]):
        parent.chmod(0o755)  # directories of pytest let nobody else in
    with watching(tmpfs, who=True) as reader:
        child = python(DROPS, file)
        users = []
        try:
            assert child.stdout is not None
            assert child.stdin is not None
            for _ in range(3):
                child.stdin.write("\n")
                child.stdin.flush()
                child.stdout.readline()
                users.append({c.process.user for c in of(reader.told(), file) if c.process})
        finally:
            child.kill()
            child.communicate()
        # In the first window after it the user may have been either: neither is told.
        assert users[0] == {"root"}
        assert None in users[1]
        assert users[1] <= {None, "nobody"}
        assert users[2] == {"nobody"}


# Makes a process with a number of our choice (clone3 with set_tid): it runs a program.
REUSE = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
class Args(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint64) for n in ("flags", "pidfd", "child_tid", "parent_tid",
        "exit_signal", "stack", "stack_size", "tls", "set_tid", "set_tid_size", "cgroup")]
def clone(pid, *argv):
    tids = (ctypes.c_int * 1)(pid)
    args = Args(exit_signal=17, set_tid=ctypes.addressof(tids), set_tid_size=1)
    got = libc.syscall(435, ctypes.byref(args), ctypes.sizeof(args))
    if got == 0:
        os.execv(argv[0], argv)
    assert got == pid, (got, ctypes.get_errno())
"""
# The kernel gives numbers in turn: half a round ahead nobody gets one, and nobody had one just now.
FREE = """
def free():
    most = int(open("/proc/sys/kernel/pid_max").read())
    pid = (os.getpid() + most // 2) % most
    while pid < 1000 or os.path.exists(f"/proc/{pid}"):
        pid += 1
    return pid
"""
FIRST_AND_SECOND = (
    REUSE
    + FREE
    + """
where = sys.argv[1]
pid = free()
clone(pid, "/usr/bin/touch", where + "/first")
os.waitpid(pid, 0)
print(pid, flush=True)
sys.stdin.readline()
clone(pid, "/bin/sleep", "60")
print("again", flush=True)
sys.stdin.readline()
os.kill(pid, 9)
os.waitpid(pid, 0)
"""
)


def test_a_number_used_again(tmpfs, tracefs):
    with watching(tmpfs, who=True) as reader:
        child = python(FIRST_AND_SECOND, tmpfs)
        try:
            assert child.stdout is not None
            assert child.stdin is not None
            pid = int(child.stdout.readline())
            read_by(reader.watch)
            child.stdin.write("\n")
            child.stdin.flush()
            child.stdout.readline()
            deadline = time.monotonic() + 20
            while Path(f"/proc/{pid}/comm").read_text() != "sleep\n":
                assert time.monotonic() < deadline
            told = of(reader.told(), tmpfs / "first")
            assert {c.pid for c in told} == {pid}
            (found,) = {c.process for c in told}
            assert found is not None
            # Never sleep, which has the number now.
            assert (found.name, found.exe, found.state) == ("touch", "/usr/bin/touch", "traced")
            with open(tmpfs / "second", "w"):
                pass
            child.stdin.write("\n")
            child.stdin.flush()
            child.wait(20)
        finally:
            child.kill()
            child.communicate()


STOPPED = (
    REUSE
    + FREE
    + """
import signal, subprocess
where, watcher = sys.argv[1], int(sys.argv[2])
os.kill(watcher, signal.SIGSTOP)
def state(thread):
    with open(f"/proc/{watcher}/task/{thread}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]
while {state(thread) for thread in os.listdir(f"/proc/{watcher}/task")} != {"T"}:
    time.sleep(0.001)
pid = free()
clone(pid, "/usr/bin/touch", where + "/first")
os.waitpid(pid, 0)
time.sleep(1.5)
clone(pid, "/usr/bin/tee", where + "/second")
while not os.path.exists(where + "/second"):
    time.sleep(0.001)
os.kill(watcher, signal.SIGCONT)
print(pid, flush=True)
sys.stdin.readline()
os.kill(pid, 9)
os.waitpid(pid, 0)
"""
)


def command(*argv: object, under: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    program = Path(sys.executable).with_name("fanwise")
    return subprocess.Popen(
        [*under, str(program), "watch", "--json", "--who", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines(child: "subprocess.Popen[str]", last: str) -> list[dict]:
    """Lines of the command up to a change of some path."""
    assert child.stdout is not None
    out = []
    for text in child.stdout:
        out.append(json.loads(text))
        if out[-1].get("path", "").endswith(last):
            return out
    raise AssertionError(f"it ended: {out} {child.stderr.read() if child.stderr else ''}")


def test_a_number_used_again_while_nobody_read_is_nobodys(tmpfs, tracefs):
    watcher = command(tmpfs)
    try:
        assert watcher.stdout is not None
        while json.loads(watcher.stdout.readline())["type"] != "scanned":
            pass
        child = python(STOPPED, tmpfs, watcher.pid)
        try:
            assert child.stdout is not None
            child.stdout.readline()
            found = lines(watcher, "/second")
        finally:
            child.communicate("\n")
        for line in found:
            if line.get("path", "").endswith(("/first", "/second")):
                assert line["process"] == {
                    "name": None, "exe": None, "user": None, "cgroup": None, "state": "gone",
                }  # fmt: skip
    finally:
        watcher.terminate()
        watcher.communicate()


NO_TRACEFS = ("unshare", "--mount", "sh", "-c", 'umount -a -t tracefs; exec "$@"', "sh")


def test_without_tracefs_only_who_is_still_there_is_named(tmpfs):
    watcher = command(tmpfs, under=NO_TRACEFS)
    long = python("import sys\nfor line in sys.stdin: open(line.strip(), 'w').close()")
    try:
        assert watcher.stdout is not None
        assert watcher.stderr is not None
        assert "tracefs is not mounted; mount it with" in watcher.stderr.readline()
        while json.loads(watcher.stdout.readline())["type"] != "scanned":
            pass
        watcher.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, watcher.pid, os.WSTOPPED)
        run("/usr/bin/touch", str(tmpfs / "short"))
        watcher.send_signal(signal.SIGCONT)
        assert long.stdin is not None
        deadline, number, seen = time.monotonic() + 60, 0, False
        while not seen:  # once the queue was looked at since it began
            assert time.monotonic() < deadline
            number += 1
            long.stdin.write(f"{tmpfs}/long{number}\n")
            long.stdin.flush()
            for line in lines(watcher, f"/long{number}"):
                process = line["process"]
                if line["path"].endswith("/short") or process["state"] == "gone":
                    assert (process["state"], process["name"]) == ("gone", None)
                else:
                    seen = True
                    assert process["state"] == "seen"
                    assert process["exe"] == EXE
                    assert process["user"] == "root"
    finally:
        long.communicate()
        watcher.terminate()
        watcher.communicate()


SPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
# What clones is a process of its own: a thread of the watch may hold a lock, which the clone keeps.
IN_SPACE = """
import subprocess, sys, time
import fanwise
where, script = sys.argv[1:]
pipe = subprocess.PIPE
with fanwise.watch(where, who=True) as watch:
    assert "initial pid namespace" in watch.who_limits, watch.who_limits
    maker = [sys.executable, "-c", script, where]
    with subprocess.Popen(maker, stdin=pipe, stdout=pipe, text=True) as maker:
        pid = int(maker.stdout.readline())
        assert watch._groups[0].empty(20)
        time.sleep(0.01)
        maker.stdin.write("\\n")
        maker.stdin.flush()
        maker.stdout.readline()
        while open(f"/proc/{pid}/comm").read() != "sleep\\n":
            time.sleep(0.001)
        time.sleep(1.2)
        told = {(c.pid == pid, c.process.state, c.process.name) for c in watch.read(20)}
        print(*told, flush=True)
        maker.communicate("\\n")
"""


def test_a_number_used_again_without_a_trace_is_nobodys(tmpfs):
    argv = [*SPACE, sys.executable, "-c", IN_SPACE, str(tmpfs), FIRST_AND_SECOND]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.stdout == "(True, 'gone', None)\n", done


OUTSIDE = """
import sys, fanwise
with fanwise.watch(sys.argv[1], who=True) as watch:
    print("ready", flush=True)
    print(*{(c.pid, c.process) for c in watch.read(20)}, flush=True)
"""


def test_a_process_outside_of_the_pid_namespace_has_no_process(tmpfs):
    child = subprocess.Popen(
        [*SPACE, sys.executable, "-c", OUTSIDE, str(tmpfs)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    (tmpfs / "a").touch()
    assert child.communicate()[0] == "(0, None)\n"


def test_a_proc_of_another_namespace_names_nobody(tmpfs):
    # Its numbers are those of other processes: every look there would be wrong.
    child = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", OUTSIDE, str(tmpfs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    if child.stdout.readline() == "ready\n":
        (tmpfs / "a").touch()
    out, err = child.communicate()
    assert "seen" not in out, (out, err)


def test_a_lost_trace_names_nobody_wrong(tmpfs, tracefs):
    with watching(tmpfs, who=True) as reader:
        watch = reader.watch
        (tmpfs / "before").touch()
        assert {c.process.state for c in reader.told() if c.process} == {"seen"}
        trace = watch._who.trace
        # A storm of names that fills the buffers, and a short-lived writer before it.
        run("/usr/bin/touch", str(tmpfs / "short"))
        run(
            sys.executable,
            "-c",
            "import os\nfd = os.open('/proc/self/comm', os.O_WRONLY)\n"
            "for i in range(60_000): os.write(fd, b'fw-storm')",
        )
        (tmpfs / "own").touch()
        told = reader.told()
        assert trace.lost
        short = {c.process for c in of(told, tmpfs / "short")}
        assert all(p.state == "gone" or p.name == "touch" for p in short if p)
        # After it, who is there is named again.
        time.sleep(0.01)
        (tmpfs / "after").touch()
        (own,) = {c.process for c in of(reader.told(), tmpfs / "after")}
        assert own is not None
        assert (own.exe, own.state) == (EXE, "seen")


def test_it_does_not_grow(tmpfs, tracefs, monkeypatch):
    with watching(tmpfs, who=True) as reader:
        holders = reader.watch._who._holders
        pids = set()
        with monkeypatch.context() as patch:
            patch.setattr(_who, "_GRACE", 1 << 60)  # however long it takes to start them
            for _ in range(200):
                child = subprocess.Popen(["/bin/true"])
                child.wait()
                pids.add(child.pid)
            reader.told()
            assert pids <= holders.keys()
        deadline = time.monotonic() + 30
        # Others may have some of the numbers by now.
        while len(pids & holders.keys()) > 20:
            reader.watch.read(0.5)
            assert time.monotonic() < deadline, reader.watch.stats()


def test_awatch(tmpfs, tracefs):
    import asyncio

    async def first() -> Change:
        async with fanwise.awatch(tmpfs, who=True, timeout=20) as changes:
            run("/usr/bin/touch", str(tmpfs / "a"))
            async for change in changes:
                return change
        raise AssertionError("nothing was told")

    change = asyncio.run(first())
    assert change.process is not None
    assert change.process.exe == "/usr/bin/touch"


def test_a_name_of_any_bytes(tmpfs, tracefs):
    odd = os.fsencode(tmpfs) + b"/\xff"
    run("cp", "/usr/bin/touch", odd.decode(errors="surrogateescape"))
    watcher = command(tmpfs)
    try:
        assert watcher.stdout is not None
        while json.loads(watcher.stdout.readline())["type"] != "scanned":
            pass
        run(os.fsdecode(odd), str(tmpfs / "a"))
        (line, *_) = [x for x in lines(watcher, "/a") if x["type"] == "change"]
        assert line["process"]["name"] == "\ufffd"
        assert line["process"]["exe"].endswith("/\ufffd")
    finally:
        watcher.terminate()
        watcher.communicate()


def test_without_a_descriptor_left(tmpfs, tracefs):
    with watching(tmpfs, who=True) as reader:
        reader.told()
        (tmpfs / "a").touch()
        child = python("import sys; open(sys.argv[1], 'w').close()", tmpfs / "b")
        child.communicate()
        with no_descriptors():
            # Not read(): it looks at mountinfo whenever anybody mounts something.
            told = []
            deadline = time.monotonic() + 20
            while not of(told, tmpfs / "b"):
                told += reader.watch._slice()
                assert time.monotonic() < deadline
            reader.watch._tick(reader.watch._who)
        (by,) = {c.process for c in of(told, tmpfs / "b")}
        assert by is not None
        assert by.state == "traced"


@pytest.mark.parametrize("how", ["tracing_on", "events/enable"])
def test_a_trace_that_somebody_switches_off_names_nobody_wrong(tmpfs, tracefs, pure, how):
    """Its events too: it is switched on again, and who cannot be known is nobody."""
    script = f"echo > {tmpfs}/a && read go && exec /usr/bin/touch {tmpfs}/b"
    with watching(tmpfs, who=True, pure=pure) as reader:
        shell = subprocess.Popen(["/bin/sh", "-c", script], stdin=subprocess.PIPE)
        while not of(told := reader.told(), tmpfs / "a"):
            pass
        (by,) = {c.process for c in of(told, tmpfs / "a")}
        assert by is not None
        assert by.name == "sh"
        (name,) = own_instances(tracefs)
        Path(tracefs, "instances", name, how).write_text("0")
        shell.communicate(b"\n")  # what it became is not seen
        run("/usr/bin/touch", f"{tmpfs}/c")
        told = reader.told()
        for path in (tmpfs / "b", tmpfs / "c"):
            assert {c.process.state for c in of(told, path) if c.process} == {"gone"}
        assert reader.watch.stats()["who_trace_lost"] >= 1
        # From here on they are named again, also those that are gone when they are looked at.
        assert reader.watch.who_limits is None
        run("/usr/bin/touch", f"{tmpfs}/d")
        (by,) = {c.process for c in of(reader.told(), tmpfs / "d")}
        assert by is not None
        assert (by.name, by.exe, by.state) == ("touch", "/usr/bin/touch", "traced")
    assert name not in os.listdir(f"{tracefs}/instances")


def test_a_trace_that_cannot_be_switched_on_again_ends(tmpfs, tracefs):
    with watching(tmpfs, who=True) as reader:
        assert reader.watch._who is not None
        trace = reader.watch._who.trace
        os.close(trace._dir)
        trace._dir = os.open("/proc/self/fdinfo", os.O_PATH | os.O_CLOEXEC)
        (tmpfs / "a").touch()
        assert of(reader.told(), tmpfs / "a")
        limits = reader.watch.who_limits
        assert limits is not None
        assert "cannot be kept as it was made" in limits
        # Who is there is told by looking, as without a trace, once that is sure.
        deadline = time.monotonic() + 20
        state = ""
        while state != "seen":
            assert time.monotonic() < deadline
            (tmpfs / "c").touch()
            state = reader.told()[-1].process.state
