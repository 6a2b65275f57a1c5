"""A program for each record: JSON on its standard input, fields in its environment.

REFS      a delivery owns the child, its pidfd and the ends of its pipes.
LOCKING   none: all in the sink's thread.
LIFETIME  the child is exec'ed in a session of its own with exactly three descriptors. When it
          ends, or its time is up, what is left of its process group is killed, before the child
          is reaped: until then its number cannot be another's.
"""

import os
import select
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from fanwise._errors import FanwiseError
from fanwise.sinks.sink import Delivery, Failed, Sink

_KEPT = 64 << 10  # bytes of output that are kept; the rest is read and counted
_MOST_VALUE = 32 << 10  # bytes of one variable; execve(2) refuses more than 128 KiB
_MOST_ALL = 512 << 10
_WAIT = 0.2  # seconds between looks at whether it must stop
_GRACE = 1.0  # seconds between SIGTERM and SIGKILL
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C"}


class Program(Sink):
    """Runs ``argv`` (its first is an absolute path) for each record, never through a shell.

    ``limit`` is the seconds that it may take. Its exit status is not 0: the delivery failed.
    """

    def __init__(self, name: str, argv: Sequence[str], *, limit: float = 30.0, **options: Any):
        super().__init__(name, **options)
        self.argv = tuple(argv)
        self.limit = limit

    def prepare(self) -> None:
        """Check that the program can be run. Raises FanwiseError."""
        program = self.argv[0]
        if not os.path.isabs(program):
            raise FanwiseError(f"sink {self.name}: {program} is not an absolute path")
        if not os.path.isfile(program) or not os.access(program, os.X_OK):
            raise FanwiseError(
                f"sink {self.name}: {program} is no program that can be run", f"chmod +x {program}"
            )

    def deliver(self, delivery: Delivery) -> None:
        """Run it to its end or its limit. Raises Failed with the status and what it printed."""
        try:
            child = subprocess.Popen(
                self.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment(delivery),
                cwd="/",
                close_fds=True,
                start_new_session=True,
            )
        except OSError as error:
            raise Failed(f"{self.argv[0]} cannot be run: {error.strerror}") from error
        late = stopped = False
        output = bytearray()
        try:
            late, stopped = self._attend(child, delivery.body + b"\n", output)
        finally:
            status = _reap(child)
        delivery.output = bytes(output[:_KEPT])
        if stopped:
            raise Failed(f"{self.argv[0]} was killed: the end came")
        if late:
            raise Failed(f"{self.argv[0]} was killed after {self.limit:g} s")
        if status:
            how = f"signal {-status}" if status < 0 else f"status {status}"
            said = bytes(output[:200]).decode(errors="replace").strip()
            raise Failed(f"{self.argv[0]} ended with {how}" + (f": {said}" if said else ""))

    # Feed and listen until the program has ended; (its time was up, the sink must stop).
    def _attend(
        self, child: "subprocess.Popen[bytes]", body: bytes, output: bytearray
    ) -> tuple[bool, bool]:
        assert child.stdin is not None
        assert child.stdout is not None
        until = time.monotonic() + self.limit
        pidfd = os.pidfd_open(child.pid)
        inward, outward = child.stdin.fileno(), child.stdout.fileno()
        os.set_blocking(inward, False)
        os.set_blocking(outward, False)
        with selectors.DefaultSelector() as selector:
            try:
                selector.register(pidfd, selectors.EVENT_READ)
                selector.register(outward, selectors.EVENT_READ)
                selector.register(inward, selectors.EVENT_WRITE)
                while True:
                    left = until - time.monotonic()
                    if left <= 0 or self.stopping.is_set():
                        _end(child.pid, pidfd)
                        _listen(outward, output)
                        return left <= 0, left > 0
                    ready = {key.fd for key, _ in selector.select(min(left, _WAIT))}
                    if inward in ready:
                        body = _feed(inward, body)
                        if not body:
                            selector.unregister(inward)
                            child.stdin.close()
                    if outward in ready and not _listen(outward, output):
                        selector.unregister(outward)
                    if pidfd in ready:
                        _listen(outward, output)
                        return False, False
            finally:
                os.close(pidfd)


def _feed(fd: int, body: bytes) -> bytes:
    try:
        return body[os.write(fd, body) :]
    except BlockingIOError:
        return body
    except BrokenPipeError:  # it does not want to know
        return b""


# All that is there to read; False at the end of the output.
def _listen(fd: int, output: bytearray) -> bool:
    for _ in range(64):  # a program that prints without end must not keep us from its limit
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return True
        if not data:
            return False
        output += data[: max(0, _KEPT - len(output))]
    return True


# Ask the group to end, and see that it does. The child is not reaped yet, so the number is its own.
def _end(pid: int, pidfd: int) -> None:
    _signal(pid, signal.SIGTERM)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll(_GRACE * 1000)


def _signal(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:  # nobody left but the one that waits to be reaped
        return


def _reap(child: "subprocess.Popen[bytes]") -> int:
    _signal(child.pid, signal.SIGKILL)
    status = child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            try:
                stream.close()
            except BrokenPipeError:
                continue
    return status


def environment(delivery: Delivery) -> dict[str, str]:
    """Return the environment of a program: nothing inherited, the record's fields flattened.

    ``fs.uuid`` is FANWISE_FS_UUID; lists are JSON; what is null is not there. A value of more than
    32 KiB is cut off, and FANWISE_CUT names it; all of it stands on standard input.
    """
    out = dict(ENVIRONMENT)
    cut = []
    size = 0
    for name, value in _flat("FANWISE", delivery.record):
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        text = text.replace("\0", "\N{REPLACEMENT CHARACTER}")
        data = text.encode(errors="surrogateescape")
        size += len(name) + len(data)
        if len(data) > _MOST_VALUE or size > _MOST_ALL:
            size -= len(data)
            data = data[: _MOST_VALUE if size <= _MOST_ALL else 0]
            text = data.decode(errors="ignore")
            size += len(data)
            cut.append(name)
        if size > _MOST_ALL:
            break
        out[name] = text
    out["FANWISE_SUPPRESSED"] = str(delivery.suppressed)
    out["FANWISE_DROPPED"] = str(delivery.dropped)
    if cut:
        out["FANWISE_CUT"] = " ".join(cut)[:_MOST_VALUE]
    return out


def _flat(prefix: str, record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        part = "".join(c if c.isascii() and c.isalnum() else "_" for c in key[:64]).upper()
        name = f"{prefix}_{part}"
        if isinstance(value, dict):
            yield from _flat(name, value)
        elif value is not None:
            yield name, value
