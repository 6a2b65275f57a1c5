"""Real processes: the installed command on filesystems that each test mounts for itself."""

import collections
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel.conftest import unmount

FANWISE = Path(sys.executable).parent / "fanwise"
DEADLINE = 60  # seconds for anything that must happen


@contextmanager
def mounted(point, kind="tmpfs"):
    point.mkdir()
    subprocess.run(["mount", "-t", kind, "fanwise-e2e", str(point)], check=True)
    try:
        yield point
    finally:
        if os.path.ismount(point):
            unmount(point)


@pytest.fixture
def scratch(tmp_path, cannot_run):
    """A tmpfs of this test's own."""
    if os.geteuid():
        cannot_run("mounting a tmpfs needs root")
    with mounted(tmp_path / "fs") as point:
        yield point


class Running:
    """A running command; its output is read by lines, each with a deadline."""

    def __init__(self, arguments, stdout=subprocess.PIPE, **options):
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("FANWISE", "XDG"))}
        environ |= {"HOME": "/nonexistent", "TZ": "UTC"} | options.pop("environ", {})
        prefix = options.pop("prefix", ())
        self.process = subprocess.Popen(
            [*prefix, FANWISE, *map(str, arguments)],
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=environ,
            # A group of its own whose parent is in the same session: as a shell's job, it can be
            # suspended by SIGTSTP.
            process_group=0,
            **options,
        )
        self.pid = self.process.pid
        self._rest = b""
        self._last = collections.deque(maxlen=8)  # lines, for who asks why nothing more comes

    def line(self):
        """The next line, without its end; None at the end of the output."""
        until = time.monotonic() + DEADLINE
        fd = self.process.stdout.fileno()
        while b"\n" not in self._rest:
            ready, _, _ = select.select([fd], [], [], until - time.monotonic())
            assert ready, f"nothing came for {DEADLINE} s after {[*self._last, self._rest]}"
            data = os.read(fd, 65536)
            if not data:
                assert not self._rest
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        self._last.append(line)
        return line

    def record(self):
        line = self.line()
        return None if line is None else json.loads(line)

    def until(self, wanted):
        """Records up to the first one for which ``wanted`` holds."""
        found = []
        while True:
            record = self.record()
            assert record is not None, f"the output ended: {found} {self.errors()}"
            found.append(record)
            if wanted(record):
                return found

    def type(self, name):
        """The next record of a type; what comes before it is dropped."""
        return self.until(lambda record: record["type"] == name)[-1]

    def rest(self):
        return list(iter(self.record, None))

    def send(self, signum):
        os.kill(self.pid, signum)

    def wait(self):
        return self.process.wait(DEADLINE)

    def errors(self):
        return self.process.stderr.read().decode()

    def stop(self, signum=signal.SIGTERM):
        """Signal it; the records up to its end, which must be orderly."""
        self.send(signum)
        rest = self.rest()
        assert (self.wait(), self.errors()) == (0, "")
        return rest

    def freeze(self):
        """Stop it with all its threads, so that it reads nothing until SIGCONT."""
        self.send(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def state(self):
        """The process's state, as the kernel has it: "T" is stopped."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture
def fanwise():
    """Start the command; it is gone when the test ends."""
    started = []

    def start(*arguments, **options):
        started.append(Running(arguments, **options))
        return started[-1]

    yield start
    for running in started:
        running.close()


@pytest.fixture
def run(fanwise):
    """Run the command to its end: status, standard output, standard error."""

    def run(*arguments, **options):
        running = fanwise(*arguments, **options)
        out, err = running.process.communicate(timeout=DEADLINE)
        return running.process.returncode, (out or b"").decode(), err.decode()

    return run
