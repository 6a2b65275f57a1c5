"""`fanwise watch`, as a program and as a person see it."""

import base64
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import msgspec
import pytest

import fanwise as public
from fanwise.cli import _lines
from tests.e2e.conftest import mounted
from tests.kernel.conftest import unmount

DEADLINE = 60  # seconds for anything that must happen
SIGNALS = [signal.SIGINT, signal.SIGTERM]


def write(path, text="x"):
    path.write_text(text)
    return path


def changes(records, **wanted):
    return [
        r
        for r in records
        if r["type"] == "change" and all(r.get(k) == v for k, v in wanted.items())
    ]


def by(path):
    return lambda record: record.get("path") == str(path)


# Fills the pipe, which nobody reads, so that the command is stuck in a write.
def stuck(running, root, files=4000):
    for i in range(files):
        write(root / f"stuck-{i:05}")
    fd = running.process.stdout.fileno()
    limit = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) // 2
    until = time.monotonic() + DEADLINE
    while True:
        used = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4))[0]
        if used > limit:
            return
        assert time.monotonic() < until
        os.sched_yield()


def test_the_lines_of_a_life(fanwise, scratch):
    (scratch / "d").mkdir()
    running = fanwise("watch", "--json", scratch)
    assert running.record() == {
        "v": 1,
        "type": "ready",
        "roots": [{"path": str(scratch), "rung": "filesystem-mark", "fstype": "tmpfs"}],
    }
    # Promptly, although nothing changes.
    assert running.record() == {"type": "scanned", "directories": 2}
    before = time.time()
    write(scratch / "d/a")
    found = running.until(lambda r: "written" in r["kinds"])
    assert {kind for r in found for kind in r["kinds"]} == {"created", "modified", "written"}
    for record in found:
        assert before - 1 <= record.pop("time") <= time.time()
        record.pop("kinds")
        assert record == {
            "type": "change",
            "path": str(scratch / "d/a"),
            "old_path": None,
            "dir": False,
            "pid": os.getpid(),
            "identity": public.identity(scratch / "d/a"),
            "path_source": "exact",
        }
    (scratch / "d").rename(scratch / "e")
    (record,) = running.until(lambda r: r["kinds"] == ["renamed"])
    assert (record["old_path"], record["path"]) == (str(scratch / "d"), str(scratch / "e"))
    assert record["dir"] is True
    rest = running.stop()
    assert rest == [{"type": "stopped", "changes": len(found) + 1, "lost": 0}]


@pytest.mark.parametrize("signum", SIGNALS)
def test_what_was_queued_before_the_signal_is_told(fanwise, scratch, signum):
    running = fanwise("watch", "--json", scratch)
    running.type("ready")
    for i in range(5000):
        (scratch / f"f{i}").touch()
    told = running.stop(signum)
    names = {r["path"] for r in told if "created" in r.get("kinds", ())}
    assert names == {str(scratch / f"f{i}") for i in range(5000)}
    assert told[-1] == {"type": "stopped", "changes": len(changes(told)), "lost": 0}


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_second_signal_aborts_at_once(fanwise, scratch, signum):
    running = fanwise("watch", "--json", scratch)
    running.type("ready")
    stuck(running, scratch)
    # Two that are sent at once may arrive as one, so more than two may be needed.
    until = time.monotonic() + DEADLINE
    sent = 0
    while running.process.poll() is None:
        assert time.monotonic() < until
        running.send(signum)
        sent += 1
        try:
            running.process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    assert sent >= 2
    assert running.process.returncode == -signum  # a shell says 128 + signum


def test_a_reader_that_leaves_ends_it_quietly(fanwise, scratch):
    idle, busy = (fanwise("watch", "--json", scratch) for _ in range(2))
    for running in (idle, busy):
        running.type("scanned")
    idle.process.stdout.close()  # nothing changes, and it ends all the same
    assert (idle.wait(), idle.errors()) == (0, "")
    stuck(busy, scratch)
    busy.process.stdout.close()
    assert (busy.wait(), busy.errors()) == (0, "")


def test_suspended_and_continued(fanwise, scratch):
    running = fanwise("watch", "--json", scratch)
    running.type("scanned")
    for turn in range(2):
        write(scratch / f"before-{turn}")
        running.send(signal.SIGTSTP)
        _, status = os.waitpid(running.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert os.WSTOPSIG(status) == signal.SIGTSTP
        assert running.state() == "T"
        write(scratch / f"unseen-{turn}")
        running.send(signal.SIGCONT)
        told = running.until(lambda r: r["type"] == "lost")
        assert changes(told, path=str(scratch / f"before-{turn}"))
        assert told[-1] == {
            "type": "lost",
            "roots": [str(scratch)],
            "count": None,
            "source": "stopped",
        }
        running.type("scanned")  # the model is whole again
        write(scratch / f"after-{turn}")
        told += running.until(by(scratch / f"after-{turn}"))
        assert not changes(told, path=str(scratch / f"unseen-{turn}"))
    assert running.stop()[-1]["lost"] is None  # nobody counted


def test_what_a_stop_hit_is_relisted(fanwise, scratch):
    (scratch / "dir").mkdir()
    running = fanwise("watch", "--json", scratch)
    running.type("scanned")
    running.send(signal.SIGTSTP)
    os.waitpid(running.pid, os.WUNTRACED)
    write(scratch / "unseen")
    os.close(os.open(os.fsencode(scratch) + b"/dir/\xff", os.O_CREAT | os.O_WRONLY))
    running.send(signal.SIGCONT)
    told = running.until(lambda r: r["type"] == "repaired")
    assert [r for r in told if r["type"] == "relisted"] == [
        {
            "type": "relisted",
            "path": str(scratch),
            "names": ["dir/", "unseen"],
            "path_source": "current",
        },
        {
            "type": "relisted",
            "path": str(scratch / "dir"),
            "names": ["\ufffd"],
            "path_source": "current",
            "names_b64": ["/w=="],
        },
    ]
    assert told[-1] == {"type": "repaired", "roots": [str(scratch)], "changes": 2}
    assert running.stop()[-1]["changes"] == 0, "they are no changes of the disk"


def test_suspended_after_its_root_was_moved(fanwise, scratch):
    (scratch / "old").mkdir()
    running = fanwise("watch", "--json", scratch / "old")
    running.type("scanned")
    (scratch / "old").rename(scratch / "new")
    running.until(lambda r: r["type"] == "change")
    running.send(signal.SIGTSTP)
    os.waitpid(running.pid, os.WUNTRACED)
    running.send(signal.SIGCONT)
    assert running.type("lost")["roots"] == [str(scratch / "new")]
    write(scratch / "new/file")
    running.until(by(scratch / "new/file"))
    running.stop()


def test_suspended_while_its_reader_is_slow(fanwise, scratch):
    running = fanwise("watch", "--json", scratch)
    running.type("ready")
    stuck(running, scratch)
    running.send(signal.SIGTSTP)
    _, status = os.waitpid(running.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    running.send(signal.SIGCONT)
    assert running.type("lost")["source"] == "stopped"
    running.stop()


def test_a_full_ring_is_told_with_its_count(fanwise, scratch):
    running = fanwise("watch", "--json", "--queue", "64KiB", scratch)
    running.type("scanned")
    stuck(running, scratch, files=20_000)
    told = running.stop()
    losses = [r for r in told if r["type"] == "lost"]
    assert losses
    for loss in losses:
        assert loss["source"] == "ring"
        assert loss["roots"] == [str(scratch)]
        assert loss["count"] > 0
    assert told[-1] == {
        "type": "stopped",
        "changes": len(changes(told)),
        "lost": sum(loss["count"] for loss in losses),
    }


def test_names_that_are_not_utf8_and_their_batch(fanwise, scratch):
    odd = os.fsencode(scratch) + b"/\xff\n\x1b[31m"
    new = os.fsencode(scratch) + b"/\xfe"
    running = fanwise("watch", "--json", scratch)
    running.type("scanned")
    plain = fanwise("watch", scratch)
    # It says nothing when it is ready, so it is asked until it answers.
    while not select.select([plain.process.stdout], [], [], 0.05)[0]:
        write(scratch / "probe")
    running.freeze()  # so that all of it is one batch
    write(scratch / "good-1")
    os.close(os.open(odd, os.O_CREAT | os.O_WRONLY))
    os.rename(odd, new)
    write(scratch / "good-2")
    running.send(signal.SIGCONT)
    told = running.until(by(scratch / "good-2"))
    assert changes(told, path=str(scratch / "good-1"))
    (created,) = changes(told, path_b64=base64.b64encode(odd).decode(), old_path=None)
    assert created["path"] == f"{scratch}/\N{REPLACEMENT CHARACTER}\n\x1b[31m"
    (renamed,) = changes(told, kinds=["renamed"])
    assert base64.b64decode(renamed["old_path_b64"]) == odd
    assert base64.b64decode(renamed["path_b64"]) == new
    assert all("path_b64" not in r for r in changes(told, path=str(scratch / "good-2")))
    running.stop()
    while b" renamed " not in (line := plain.line()):
        assert b"\x1b" not in line
    assert line.endswith(rb"/\xff\n\x1b[31m -> " + os.fsencode(scratch) + rb"/\xfe")
    plain.send(signal.SIGTERM)
    assert plain.wait() == 0


def test_what_is_set_only_where_it_applies(fanwise, scratch):
    running = fanwise("watch", "--json", scratch)
    running.type("scanned")
    victim = public.identity(write(scratch / "victim"))
    write(scratch / "new").rename(scratch / "victim")
    with open(scratch / "open", "w") as file:
        (scratch / "open").unlink()
        running.until(lambda r: r["type"] == "change" and "deleted" in r["kinds"])
        file.write("x")
        file.flush()
        told = running.until(lambda r: "unlinked" in r)
    assert told[-1]["unlinked"] is True
    write(scratch / "w").rename(scratch / "victim2")
    running.freeze()
    for _ in range(2):  # link, unlink, link again: one record
        os.link(scratch / "victim2", scratch / "l")
        (scratch / "l").unlink()
    os.link(scratch / "victim2", scratch / "l")
    running.send(signal.SIGCONT)
    told = running.until(lambda r: "exists" in r)
    assert told[-1]["exists"] is True
    told = running.stop()
    assert victim not in [r.get("replaced") for r in told]  # it was told before, and once


def test_replaced(fanwise, scratch):
    running = fanwise("watch", "--json", scratch)
    running.type("scanned")
    victim = public.identity(write(scratch / "victim"))
    write(scratch / "new").rename(scratch / "victim")
    told = running.until(lambda r: r["kinds"] == ["renamed"])
    assert [r["replaced"] for r in told if "replaced" in r] == [victim]
    running.stop()


def test_the_schema_is_published_and_true(run, fanwise, scratch):
    status, out, err = run("watch", "--schema")
    assert (status, err) == (0, "")
    schema = json.loads(out)
    assert schema["discriminator"]["mapping"].keys() == {
        "ready", "scanned", "change", "lost", "relisted", "repaired", "stopped",
    }  # fmt: skip
    running = fanwise("watch", "--json", "--who", scratch)
    lines = [running.line(), running.line()]
    write(scratch / "a").rename(scratch / "b")
    os.close(os.open(os.fsencode(scratch) + b"/\xff", os.O_CREAT | os.O_WRONLY))
    running.send(signal.SIGTSTP)
    os.waitpid(running.pid, os.WUNTRACED)
    running.send(signal.SIGCONT)
    while b'"repaired"' not in lines[-1]:
        lines.append(running.line())
    running.send(signal.SIGTERM)
    lines += iter(running.line, None)
    decoder = msgspec.json.Decoder(_lines.Line)  # strict: no field that it does not know
    kinds = {type(decoder.decode(line)).__name__ for line in lines}
    assert kinds == set(schema["$defs"]) - {"Root", "Process"}


def test_output_below_a_root_is_refused(fanwise, scratch, tmp_path):
    (scratch / "sub").mkdir()
    for options in ((), ("--json",)):
        with open(scratch / "sub/out", "w") as out:
            running = fanwise("watch", *options, scratch, stdout=out)
            assert running.wait() == 2
        assert running.errors() == (
            f"fanwise: standard output: {scratch}/sub/out is below a path that is watched: it"
            " would tell of itself; write elsewhere, or add --exclude out\n"
        )
        assert (scratch / "sub/out").stat().st_size == 0
    allowed = [
        (scratch / "sub/out", ["--exclude", "out"]),
        (scratch / "sub/out", ["--exclude", "sub"]),
        (scratch / "sub/out", ["--no-recursive"]),
        (tmp_path / "out", []),
    ]
    for path, options in allowed:
        with open(path, "w") as out:
            running = fanwise("watch", "--json", *options, scratch, stdout=out)
            _wait_for(path, "scanned")
            running.send(signal.SIGTERM)
            assert running.wait() == 0
        assert path.read_text().splitlines()[2:] == ['{"type":"stopped","changes":0,"lost":0}']


# A file cannot be waited for with select; the clock of the scheduler is good enough.
def _wait_for(path, text):
    until = time.monotonic() + DEADLINE
    while text not in path.read_text():
        assert time.monotonic() < until
        os.sched_yield()


def test_it_does_not_tell_of_itself(fanwise, scratch):
    fifo = scratch / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    # Its own writes are changes of a name below the root.
    with open(fifo, "w") as out, open(reader, "rb", closefd=True) as stream:
        running = fanwise("watch", "--json", scratch, stdout=out)
        found = b""
        until = time.monotonic() + DEADLINE
        for name in ("a", "b"):
            while f'{scratch}/{name}"'.encode() not in found:
                if b'"scanned"' in found:
                    write(scratch / name)
                assert select.select([stream], [], [], until - time.monotonic())[0]
                found += os.read(reader, 65536)
        running.send(signal.SIGTERM)
        assert running.wait() == 0
    records = [json.loads(line) for line in found.splitlines()]
    assert changes(records, pid=os.getpid())
    assert not changes(records, pid=running.pid)


def test_the_options(fanwise, scratch):
    (scratch / "sub").mkdir()
    running = fanwise(
        "watch", "--json", "--pure", "--no-recursive", "--kinds", "created,deleted",
        "--exclude", "*.tmp", "--exclude", "old", scratch,
    )  # fmt: skip
    running.type("scanned")
    for name in ("sub/deep", "a.tmp", "old", "new"):
        write(scratch / name)
    (scratch / "new").unlink()
    told = changes(running.stop())
    assert {r["path"] for r in told} == {str(scratch / "new")}
    assert {kind for r in told for kind in r["kinds"]} == {"created", "deleted"}


def test_ignored_processes(fanwise, scratch):
    other = subprocess.Popen(["sh", "-c", f"read go; echo > {scratch}/other"], stdin=-1)
    running = fanwise("watch", "--json", "--ignore-pid", other.pid, scratch)
    running.type("scanned")
    other.communicate(b"\n")
    write(scratch / "mine")
    assert {r["path"] for r in changes(running.stop())} == {str(scratch / "mine")}


def test_options_fall_back_to_the_configuration(fanwise, scratch, tmp_path):
    file = write(tmp_path / "c.toml", '[watch]\nkinds = ["deleted"]\nexclude = ["x"]\n')
    running = fanwise("--config", file, "watch", "--json", "--exclude", "y", scratch)
    running.type("scanned")
    for name in "xyz":
        write(scratch / name).unlink()
    told = changes(running.stop())
    assert {(r["path"], *r["kinds"]) for r in told} == {
        (f"{scratch}/x", "deleted"),
        (f"{scratch}/z", "deleted"),
    }


def test_it_ends_when_all_roots_are_gone(fanwise, scratch):
    (scratch / "one").mkdir()
    (scratch / "two").mkdir()
    write(scratch / "two/last")
    running = fanwise("watch", "--json", scratch / "one", scratch / "two")
    running.type("scanned")
    (scratch / "one").rmdir()
    (scratch / "two/last").unlink()
    (scratch / "two").rmdir()
    told = running.rest()
    assert (running.wait(), running.errors()) == (0, "")
    deleted = [r["path"] for r in told if "deleted" in r.get("kinds", ())]
    assert deleted == [f"{scratch}/{name}" for name in ("one", "two/last", "two")]
    assert told[-1]["type"] == "stopped"


def test_it_ends_when_the_filesystem_is_unmounted(fanwise, scratch):
    running = fanwise("watch", "--json", scratch)
    running.type("scanned")
    write(scratch / "last")
    unmount(scratch)
    told = running.rest()
    assert (running.wait(), running.errors()) == (0, "")
    assert changes(told, path=str(scratch / "last"))
    (final,) = changes(told, kinds=["unmounted"])
    assert final["path"] == str(scratch)
    assert told[-1] == {"type": "stopped", "changes": len(changes(told)), "lost": 0}


def test_kinds_of_mounts_only(fanwise, scratch):
    running = fanwise("watch", "--json", "--kinds", "unmounted", scratch)
    running.type("scanned")
    write(scratch / "a").unlink()
    unmount(scratch)
    told = running.rest()
    assert [r.get("kinds") for r in told] == [["unmounted"], None]
    assert told[-1]["changes"] == 1


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["/nonexistent"], 1, "/nonexistent: it does not exist; give an existing file or dir"),
        (["/proc"], 1, "/proc: proc does not tell what is created, renamed, deleted: its names"),
        (["--kinds", "wrotten", "/"], 2, "--kinds: watch.kinds: unknown kind 'wrotten'; did you"),
        (["--queue", "many", "/"], 2, "--queue: watch.queue: not a size: 'many'; write bytes"),
        (["--exclude", "/", "/"], 2, "exclude: not a glob: '/'; give a name or a path"),
    ],
)
def test_an_error_is_one_line_with_reason_and_remedy(run, arguments, status, line):
    for options in ((), ("--json",)):
        ended, out, err = run("watch", *options, *arguments)
        assert (ended, out) == (status, "")
        assert err.startswith(f"fanwise: {line}")
        assert err.count("\n") == 1


# As nobody, who may not be able to read the modules: they are loaded before.
NOBODY = """
import os, sys, locale
import fanwise, fanwise.cli._main, fanwise.cli._watch, fanwise.cli._doctor
from fanwise.cli import main
[getattr(fanwise, name) for name in fanwise.__all__]
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.argv = ["fanwise", *sys.argv[1:]]
sys.exit(main())
"""


def test_without_permission(tmp_path, cannot_run):
    if os.geteuid():
        cannot_run("becoming nobody needs root")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    inside = closed / "inside"
    inside.mkdir()
    # The home is root's, as it is after sudo -u nobody.
    done = subprocess.run(
        [sys.executable, "-c", NOBODY, "watch", "--json", str(inside)],
        capture_output=True,
        text=True,
        env={"HOME": str(closed)},
        cwd="/",
    )
    assert (done.returncode, done.stdout) == (1, "")
    reason = f"{inside}: a directory above it may not be searched; run as root"
    assert done.stderr.startswith(f"fanwise: {reason}")
    assert done.stderr.count("\n") == 1


def test_no_path_is_wrong_usage(run):
    status, out, err = run("watch")
    assert (status, out) == (2, "")
    assert "Missing argument 'PATH...'" in err


def test_text_for_a_pipe(fanwise, scratch):
    running = fanwise("watch", scratch)
    while not select.select([running.process.stdout], [], [], 0.05)[0]:
        write(scratch / "probe")
    running.line()
    (scratch / "dir").mkdir()
    (scratch / "dir").rename(scratch / "moved")
    until = b"renamed"
    lines = []
    while not lines or until not in lines[-1]:
        lines.append(running.line())
    clock = rb"\d\d:\d\d:\d\d\.\d\d\d  "
    head = f"{os.getpid():>7}  {scratch}".encode()
    assert re.fullmatch(clock + b"created {18}" + re.escape(head) + b"/dir/", lines[-2])
    assert re.fullmatch(
        clock + b"renamed {18}" + re.escape(head + f"/dir/ -> {scratch}/moved/".encode()), lines[-1]
    )
    running.send(signal.SIGINT)
    assert running.wait() == 0


class Screen:
    """A terminal, of which only what is needed is understood: a line that is erased is gone."""

    def __init__(self, fd):
        self.fd, self.raw = fd, b""

    def until(self, text):
        until = time.monotonic() + DEADLINE
        while text not in self.raw:
            assert select.select([self.fd], [], [], until - time.monotonic())[0], self.raw
            self.raw += os.read(self.fd, 65536)

    def until_status(self, pattern):
        """Read until the last line is a status like that: what is read may end anywhere."""
        until = time.monotonic() + DEADLINE
        while not re.match(pattern, self.lines()[-1]):
            assert select.select([self.fd], [], [], until - time.monotonic())[0], self.raw
            self.raw += os.read(self.fd, 65536)

    def lines(self):
        text = self.raw.decode().replace("\r\n", "\n")
        lines = [line.rpartition("\r\x1b[K")[2] for line in text.split("\n")]
        return [re.sub(r"\x1b\[[\d;]*m", "", line) for line in lines]


@pytest.mark.parametrize("colour", [True, False])
def test_on_a_terminal(fanwise, scratch, colour):
    main, other = pty.openpty()
    try:
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("4H", 24, 90, 0, 0))
        environ = {"TERM": "xterm-256color"} | ({} if colour else {"NO_COLOR": "1"})
        running = fanwise("watch", scratch, stdout=other, environ=environ)
        screen = Screen(main)
        screen.until_status(r".* directories \| /")  # without dots: all are known
        write(scratch / "evil\x1b[2J\nname").unlink()
        for i in range(50):
            write(scratch / f"f{i}")
        screen.until(b"/f49")
        screen.until_status(r"[\d,]+/s \| \d+ changes \| 0 lost \| backlog ")
        assert (b"\x1b[32mcreated" in screen.raw) == colour
        lines = screen.lines()
        status = lines[-1]
        assert len(status) < 90
        for line in lines[:-1]:  # the status never got into a line, nor a name out of one
            assert re.match(r"\d\d:\d\d:\d\d\.\d{3}  [a-z ]{24,} +\d+  /", line), line
        assert any(rf"{scratch}/evil\x1b[2J\nname" in line for line in lines)
        assert b"\x1b[2J" not in screen.raw
        screen.raw = b""
        screen.until_status(r"0/s \| ")  # the rate comes down by itself
        running.send(signal.SIGINT)
        screen.until(b" lost\r\n")
        assert running.wait() == 0
        assert re.search(r"^\d+ changes, 0 lost$", "\n".join(screen.lines()), re.MULTILINE)
    finally:
        os.close(main)
        os.close(other)


def test_mounts_below_a_path(fanwise, scratch):
    """What is followed is told; what is not is named with the reason, also when it comes later."""
    with mounted(scratch / "proc", "proc"), mounted(scratch / "tmp"):
        running = fanwise("watch", "--json", scratch)
        running.type("ready")
        write(scratch / "tmp/f")
        running.until(by(scratch / "tmp/f"))
        with mounted(scratch / "sys", "sysfs"), mounted(scratch / "new"):
            record = running.until(
                lambda r: (r.get("kinds"), r.get("path")) == (["mounted"], str(scratch / "new"))
            )[-1]
            assert record["dir"] is True
            write(scratch / "new/g")
            running.until(by(scratch / "new/g"))
        running.until(lambda r: r.get("kinds") == ["unmounted"])
        running.send(signal.SIGTERM)
        running.rest()
        assert running.wait() == 0
        lines = running.errors().splitlines()
        assert [line.split(": ")[:3] for line in lines] == [
            ["fanwise", "not watched", str(scratch / name)] for name in ("proc", "sys")
        ]
        assert all("does not tell what is created" in line for line in lines)


def test_one_file_system(fanwise, scratch):
    with mounted(scratch / "tmp"):
        running = fanwise("watch", "--json", "--one-file-system", scratch)
        running.type("ready")
        write(scratch / "tmp/f")
        write(scratch / "g")
        found = running.until(by(scratch / "g"))
        # "scanned" is among them, or not: the scan runs beside.
        assert not [r for r in found if by(scratch / "tmp/f")(r)]
        running.send(signal.SIGTERM)
        running.rest()
        assert running.wait() == 0
        assert running.errors() == (
            f"fanwise: not watched: {scratch}/tmp: it is another filesystem, and those are left"
            " out, as asked\n"
        )
