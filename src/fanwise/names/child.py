"""Child: look-ups and scans in helper processes, for a watch that tells of opens and accesses.

To look somewhere by handle the mount must be opened, to scan a directory it must be read, and both
raise events with the pid of whoever does it. Done in processes of their own, they are told apart
from what the host program does by pid alone.

Two processes: a scan never delays a look-up, each serves one question at a time, and one that
is killed takes nothing of the other along. Questions change nothing: what a process that died left
unanswered is asked again of the next.

REFS      Helpers belong to one watch and serve all its groups.
LOCKING   a Helper's lock covers its socket: one question at a time. `_lock`, taken inside, covers
          the pids. It is held while a process starts, so that `drop` knows the pid of each record;
          and while the host forks: a fork would keep the pipe that Popen waits for, and the other
          end of the socket, for as long as it lives.
LIFETIME  exec'ed with one socket, at the first question or at `start`; `close` kills and reaps.
          One that died stays a zombie until what it did is decoded: no other has its pid till then.
          The end of the socket ends it.
"""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

import fanwise._errors
from fanwise._errors import ClosedError, FanwiseError
from fanwise.kernel.mounts import Mount

from ._child import Ask, receive, send
from .lookup import Link, Lookup
from .scan import Found

_TRIES = 3  # processes that die over one question

# Only what is needed to import: no site, no directory that the host happens to stand in.
_CODE = (
    "import sys; host, pure, *sys.path[:] = sys.argv[1:]; "
    "from fanwise.names._child import main; main(int(host), pure == 'pure')"
)

T = TypeVar("T")
# (what went wrong or None, the answer)
_WAY = msgspec.msgpack.Decoder(tuple[bytes | None, list[Link] | None])
_KEY = msgspec.msgpack.Decoder(tuple[bytes | None, bytes | None])
_LINKS = msgspec.msgpack.Decoder(tuple[bytes | None, int | None])
_NAMES = msgspec.msgpack.Decoder(tuple[bytes | None, list[tuple[bytes, bytes, bool]] | None])
_FOUND = msgspec.msgpack.Decoder(tuple[bytes | None, Found | None])
_encode = msgspec.msgpack.Encoder().encode

# What a helper is asked for, by what scan_dirs is to bring of the names.
_SCANS: tuple[Literal["scan"], Literal["names"], Literal["index"]] = "scan", "names", "index"
_DONE = ("opened", "accessed", "executed")  # what a helper does

_lock = threading.RLock()  # a signal handler may fork, too
_live: "weakref.WeakSet[Helpers]" = weakref.WeakSet()


class Helper:
    """One helper process, started when it is needed and again when it died."""

    def __init__(self, helpers: "Helpers") -> None:
        self._helpers = helpers
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it is ready some 0.1 s later. Raises FanwiseError."""
        with self._lock:
            self._start()

    def ask(self, question: Ask, decoder: "msgspec.msgpack.Decoder[tuple[bytes | None, T]]") -> T:
        """Wait for the answer. Raises what the helper did; FanwiseError when there is none."""
        data = _encode(question)
        with self._lock:
            for _ in range(_TRIES):
                if self._sock is None:
                    self._start()
                answer = self._exchange(data)
                if answer is not None:
                    error, value = decoder.decode(answer)
                    if error is not None:
                        raised: Exception = pickle.loads(error)  # by our own code and rights
                        raise raised
                    return value
        raise FanwiseError(
            "the helper process that looks at the filesystem ends again and again",
            f"see whether {sys.executable} runs, and whether something kills it",
        )

    def rest(self) -> None:
        """Have it close what it has open; without one there is nothing to close."""
        with self._lock:
            if self._sock is not None:
                self._exchange(_encode(Ask("rest")))

    def _exchange(self, data: bytes) -> bytes | None:
        # None: it died.
        assert self._sock is not None
        answer = None
        try:
            send(self._sock, data)
            answer = receive(self._sock)
        except OSError:
            pass
        finally:
            # Also when a signal interrupted: the next answer would be to this question.
            if answer is None:
                self._drop()
        return answer

    def _start(self) -> None:
        helpers = self._helpers
        with _lock:
            if helpers.closed:
                raise ClosedError("the watch is closed")
            ours, theirs = socket.socketpair()
            try:
                self.process = subprocess.Popen(
                    helpers.command(),
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",  # not where the host stands: that may be below a watched mount
                )
            except OSError as error:
                ours.close()
                raise FanwiseError(
                    f"the helper process that looks at the filesystem does not start: {error}",
                    "it is sys.executable that is run: see whether it is there and may be run",
                ) from error
            finally:
                theirs.close()
            helpers.pids.add(self.process.pid)
            self._sock = ours

    def _drop(self) -> None:
        with _lock:
            if self._sock is not None:
                self._sock.close()
                self._sock = None
            if self.process is not None:
                _kill(self.process)
                self._helpers.dead += (self.process,)
                self.process = None

    def close(self) -> None:
        """Kill and reap it; a thread that waits for its answer gets ClosedError."""
        with _lock:
            if self.process is not None:
                _kill(self.process)
        with self._lock:
            self._drop()

    def forget(self) -> None:
        """Leave it to the parent: this is a forked process."""
        self._lock = threading.Lock()
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self.process is not None:
            self.process.returncode = 0  # not ours to wait for, nor to kill
            self.process = None


class Helpers:
    """The helper processes of a watch, and what is known by their pids."""

    def __init__(self, implementation: str) -> None:
        self._implementation = implementation
        self.closed = False
        self.pids: set[int] = set()
        self.dead: tuple[subprocess.Popen[bytes], ...] = ()
        self.looks, self.scans = Helper(self), Helper(self)
        self._error: Exception | None = None  # of the scan, to be raised where it is heard
        _live.add(self)

    def start(self) -> None:
        """Start the process of the look-ups: they wait less. Raises FanwiseError."""
        self.looks.start()

    def command(self) -> list[str]:
        """What to execute: the same interpreter, and it imports from where the host does."""
        home = Path(fanwise._errors.__file__).parents[1]
        return [
            sys.executable,
            "-BPS",
            *(["-E"] if sys.flags.ignore_environment else []),
            "-c",
            _CODE,
            str(os.getpid()),
            self._implementation,
            *(os.path.abspath(path) for path in sys.path),
            str(home),
        ]

    def scan(self, mount: Mount, keys: Sequence[bytes], names: int = 0) -> Found:
        """List subdirectories and names, for a Scanner: what fails is raised by `check`."""
        try:
            what = _SCANS[names]
            found = self.scans.ask(Ask(what, mount.id, mount.mount_point, list(keys)), _FOUND)
        except (FanwiseError, OSError) as error:
            if not self.closed:
                self._error = error
            found = None
        return found or ([], [(key, 0) for key in keys], [])

    def check(self) -> None:
        """Raise what the scan ran into, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def drop(self, rows: list[Any], ignored: Container[int]) -> list[Any]:
        """Leave out what the helpers did.

        They write nothing. But one that starts has, until exec, what other threads of the host have
        open, and if those close it meanwhile it is the last: that is told as the host's.
        """
        with _lock:
            ours = self.pids
            if not any(row.pid in ours and "written" in row.kinds for row in rows):
                return [row for row in rows if row.pid not in ours]
            out = []
            host = os.getpid()
            for row in rows:
                if row.pid not in ours:
                    out.append(row)
                elif "written" in row.kinds and host not in ignored:
                    put = msgspec.structs.force_setattr
                    put(row, "pid", host)
                    put(row, "kinds", tuple(k for k in row.kinds if k not in _DONE))
                    out.append(row)
            return out

    def bury(self, dead: tuple[subprocess.Popen[bytes], ...]) -> None:
        """Reap some of `dead`, when all that was raised before they died is decoded."""
        for process in dead:
            process.wait()
        with _lock:
            self.dead = tuple(process for process in self.dead if process not in dead)
            self.pids -= {process.pid for process in dead}

    def leave(self, process: "subprocess.Popen[bytes]") -> None:
        """Take over one that `spawn` started and that ended: it is reaped like the others."""
        if self.closed:
            process.wait()
        else:
            with _lock:
                self.dead += (process,)

    def close(self) -> None:
        """End the processes; idempotent. Whoever waits for an answer is told by ClosedError."""
        with _lock:
            self.closed = True
        self.looks.close()
        self.scans.close()
        self.bury(self.dead)
        _live.discard(self)

    def forget(self) -> None:
        """Leave everything to the parent: this is a forked process."""
        self.closed = True
        for process in self.dead:
            process.returncode = 0
        self.dead = ()
        self.looks.forget()
        self.scans.forget()


class ChildLookup(Lookup):
    """A Lookup whose questions a helper answers."""

    def __init__(self, mount: Mount, helpers: Helpers) -> None:
        super().__init__(mount)
        self._helper = helpers.looks
        self._asked = False

    def close(self) -> None:
        """Have the helper close the mount."""
        if self._asked:
            self._asked = False
            self._helper.rest()

    def _ask(
        self,
        what: Any,
        key: bytes,
        decoder: "msgspec.msgpack.Decoder[tuple[bytes | None, T]]",
        name: bytes = b"",
    ) -> T:
        self._asked = True
        question = Ask(what, self.mount.id, self.mount.mount_point, [key], name)
        return self._helper.ask(question, decoder)

    def locate(self, key: bytes, known: Callable[[bytes], bool]) -> list[Link] | None:
        """See Lookup. The helper goes all the way up, because it cannot ask what is known."""
        way = self._ask("locate", key, _WAY)
        for at, (_, parent, _) in enumerate(way or ()):
            if way is not None and parent is not None and known(parent):
                return way[: at + 1]
        return way

    def key_of(self, directory: bytes, name: bytes) -> bytes | None:
        """See Lookup."""
        return self._ask("key_of", directory, _KEY, name)

    def names_in(self, key: bytes) -> list[tuple[bytes, bytes, bool]]:
        """See Lookup."""
        return self._ask("names_in", key, _NAMES) or []

    def links(self, key: bytes) -> int:
        """See Lookup."""
        links = self._ask("links", key, _LINKS)
        return -1 if links is None else links


def spawn(command: Sequence[str], helpers: Helpers | None) -> "subprocess.Popen[bytes]":
    """Start a process that has nothing of ours open. Raises OSError.

    It is a process group of its own: what a terminal sends to the host's ends that, and not this.
    Where there are helpers, what it does is dropped as well; hand it to `Helpers.leave`.
    """
    with _lock:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            process_group=0,
        )
        if helpers is not None:
            helpers.pids.add(process.pid)
    return process


def _kill(process: "subprocess.Popen[bytes]") -> None:
    # Not Popen.kill(), which reaps one that is dead already. It is ours until we wait for it; only
    # a host that ignores SIGCHLD, or waits for any child, takes it from us.
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)


def _after_fork() -> None:
    _lock.release()
    for helpers in list(_live):
        helpers.forget()
    _live.clear()


os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork)
