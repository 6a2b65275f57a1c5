"""The demo: what it shows is right, and nothing of it stays."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "demo/demo.py"
DEADLINE = 90


@pytest.fixture
def demo(tmp_path, cannot_run):
    if os.geteuid():
        cannot_run("mounting a scratch filesystem needs root")
    started = []

    def start(*arguments, **environ):
        process = subprocess.Popen(
            [sys.executable, DEMO, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"} | environ,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=DEADLINE)
    assert left(tmp_path) == set()


def left(base):
    """What a demo below a directory has made and not removed."""
    found = set(map(str, base.iterdir()))
    for line in Path("/proc/self/mountinfo").read_bytes().split(b"\n"):
        if os.fsencode(base) in line:
            found.add(os.fsdecode(line))
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if os.fsencode(base) in backing.read_bytes():
                found.add(str(backing))
        except OSError:  # another's, detached meanwhile
            continue
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(base).encode() in command.read_bytes():
                found.add(str(command))
        except OSError:  # ended meanwhile
            continue
    return found


def shown(text):
    """The rows of the table: name -> done, told."""
    rows = re.findall(r"^(\w.*?)  +([\d,]+) +([\d,]+)$", text, re.MULTILINE)
    return {name: tuple(int(n.replace(",", "")) for n in row) for name, *row in rows}


def check(text, files):
    rows = shown(text)
    made = files + 3 * 2 * -(-files // 2000)  # the directories too
    for name, count in {
        "created": made,
        "modified": files,
        "written": files,
        "renamed": files,
        "deleted": files * 9 // 10,
        "by any other process": 0,
    }.items():
        assert rows[name] == (count, count), text
    writers = [
        row for name, row in rows.items() if re.fullmatch(r"by process \d+, writer-\d", name)
    ]
    assert len(writers) == 2
    assert sum(done for done, _ in writers) == rows["all"][0]
    assert all(done == told for done, told in writers)
    assert re.search(r"^([\d,]+) of \1 paths are exact; 0 records were lost$", text, re.MULTILINE)
    assert re.search(r"ready after \d+\.\d{3} s", text)
    assert re.search(r"fanwise watch --json +\d+\.\d\d s, told 100.00 % and by whom", text)
    assert re.search(r"inotifywait +(\d+\.\d\d s, told |not shown: )", text)


def test_what_was_done_is_what_was_told(demo):
    process = demo("--files", "2000")
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, err) == (0, ""), out
    check(out, 2000)
    act = out.partition("The second act: ")[2]
    assert re.search(r"^  what +EUCLEAN, ", act, re.MULTILINE), out
    assert re.search(r"^  file +\S+/fs/photos/summer.raw \(inode \d+, by", act, re.MULTILINE), out
    assert re.search(r"^  code +ext4_ext_check_inode:\d+ of Linux ", act, re.MULTILINE), out
    assert re.search(r"^  errors +3 \(the superblock says 3\)$", act, re.MULTILINE), out


def test_on_tmpfs_where_ext4_cannot_be_made(demo, tmp_path_factory):
    tools = tmp_path_factory.mktemp("tools")
    (tools / "mkfs.ext4").write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    (tools / "mkfs.ext4").chmod(0o755)
    process = demo("--files", "200", PATH=f"{tools}:{os.environ['PATH']}")
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, err) == (0, ""), out
    assert out.startswith("a tmpfs (no ext4: mkfs.ext4 ")
    check(out, 200)
    assert "cannot be shown here:\n  mkfs.ext4 " in out


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_storm_it_cleans_up(demo, tmp_path, signum):
    process = demo("--files", "2000000")
    process.stdout.readline()
    until = time.monotonic() + DEADLINE
    while not list(tmp_path.glob("fanwise-demo-*/fs/one/writer-*")):
        assert process.poll() is None
        assert time.monotonic() < until
    process.send_signal(signum)
    process.send_signal(signum)  # impatience does no harm
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, err) == (128 + signum, "")
    assert out.endswith("interrupted; cleaning up\n")


def test_interrupted_at_once_it_cleans_up(demo, tmp_path):
    process = demo("--files", "2000")
    until = time.monotonic() + DEADLINE
    while not list(tmp_path.iterdir()):
        assert process.poll() is None
        assert time.monotonic() < until
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, err) == (130, "")


def test_an_ordinary_user_is_told_why_not(cannot_run):
    if os.geteuid():
        cannot_run("becoming nobody needs root")
    text = (
        "import os, sys, runpy, fanwise\n"
        "[getattr(fanwise, name) for name in fanwise.__all__]\n"
        "fanwise.capabilities('/')\n"
        "import argparse, fcntl, json, shutil, subprocess, tempfile, threading, locale, pathlib\n"
        "code = compile(open(sys.argv[1]).read(), sys.argv[1], 'exec')\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "sys.argv = ['demo']\n"
        "exec(code, {'__name__': '__main__'})"
    )
    done = subprocess.run([sys.executable, "-c", text, DEMO], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cannot show that here:" in done.stdout
    assert "needs root; run as root\n" in done.stdout


PROBED = """
import os, signal
real = os.open
def interrupted(path, *rest, **more):
    fd = real(path, *rest, **more)
    if os.path.dirname(path) == os.environ["TMPDIR"]:
        os.kill(os.getpid(), signal.SIGINT)
    return fd
os.open = interrupted
"""


def test_interrupted_while_a_place_is_tried_it_leaves_no_file(demo, tmp_path_factory):
    # tempfile tries a directory with a file, which an exception would leave there.
    hooks = tmp_path_factory.mktemp("hooks")
    (hooks / "sitecustomize.py").write_text(PROBED)
    process = demo("--files", "200", PYTHONPATH=str(hooks))
    _, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, err) == (130, "")
