"""What every question needs: scratch filesystems, memory groups, the watchers, and their figures.

All that is made here is owned by the `Bench` context and goes with it, also on Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
PYTHON = ROOT / ".venv/bin/python"
FANWISE = ROOT / ".venv/bin/fanwise"
CACHE = HERE / ".cache"
LOCKS = Path("/run/lock")
LOOP_LOCK = (LOCKS if LOCKS.is_dir() else Path(tempfile.gettempdir())) / "fanwise-loop.lock"
REQUIREMENTS = HERE / "requirements-peers.txt"
KINDS = ("created", "modified", "written", "renamed", "deleted")

Json = dict[str, Any]
Record = tuple[tuple[str, ...], str | None, str | None]  # kinds, path, old path


class Unavailable(Exception):
    """A contender that is not installed here; the report says so in its place."""


# ---- memory groups -------------------------------------------------------------------------------


class Group:
    """A memory cgroup of our own, v1 or v2. It is charged the kernel's event queue too."""

    V1 = Path("/sys/fs/cgroup/memory")
    V2 = Path("/sys/fs/cgroup")

    def __init__(self, name: str) -> None:
        self.v2 = (self.V2 / "cgroup.controllers").exists()
        base = self.V2 if self.v2 else self.V1
        if self.v2:
            control = base / "cgroup.subtree_control"
            if "memory" not in control.read_text().split():
                control.write_text("+memory")
        self.path = base / f"fanwise-bench-{os.getpid()}-{name}"
        self.path.mkdir()

    def enter(self) -> None:
        """Move the calling process here (between fork and exec)."""
        (self.path / "cgroup.procs").write_text("0")

    def _bytes(self, v2: str, v1: str) -> int:
        return int((self.path / (v2 if self.v2 else v1)).read_text())

    def peak(self) -> int:
        return self._bytes("memory.peak", "memory.max_usage_in_bytes")

    def kernel(self) -> int:
        """Bytes of kernel memory that are left when everything that can be reclaimed is."""
        os.sync()  # an inode whose access time was changed by reading it cannot be reclaimed before
        for _ in range(3):
            with contextlib.suppress(OSError):  # EAGAIN: not as much could be reclaimed
                if self.v2:
                    (self.path / "memory.reclaim").write_text("1G")
                else:
                    (self.path / "memory.force_empty").write_text("0")
            # Slab pages that hold one entry still in use by nobody are freed by this alone.
            Path("/proc/sys/vm/drop_caches").write_text("2")
            time.sleep(0.5)  # inodes are freed after an RCU grace period
        if not self.v2:
            return self._bytes("", "memory.kmem.usage_in_bytes")
        lines = (self.path / "memory.stat").read_text().splitlines()
        return int(dict(line.split() for line in lines)["kernel"])

    def close(self) -> None:
        for _ in range(200):
            for pid in (self.path / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            with contextlib.suppress(OSError):  # EBUSY until the last one is reaped
                self.path.rmdir()
                return
            time.sleep(0.01)
        print(f"bench: could not remove {self.path}", file=sys.stderr)


# ---- scratch filesystems -------------------------------------------------------------------------


def sh(*argv: str | os.PathLike[str]) -> str:
    done = subprocess.run([os.fspath(a) for a in argv], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(map(os.fspath, argv))}: {done.stderr.strip()}")
    return done.stdout


class Mount:
    """A tmpfs, or an ext4 in a sparse image; unmounted when closed."""

    def __init__(self, where: Path, image: Path | None) -> None:
        self.path, self.image = where, image
        where.mkdir()
        self._mount()

    def _mount(self) -> None:
        if not self.image:
            sh("mount", "-t", "tmpfs", "-o", "size=4g,nr_inodes=0", "fanwise-bench", self.path)
            return
        # losetup --find and the claim are two steps; other tests here take loop devices too.
        with open(LOOP_LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            device = sh("losetup", "--find", "--show", self.image).strip()
        try:
            sh("mount", device, self.path)
        finally:
            sh("losetup", "--detach", device)  # while mounted: the kernel detaches it at umount

    def _umount(self) -> None:
        for _ in range(100):
            if not os.path.ismount(self.path):
                return
            if not subprocess.run(["umount", self.path], capture_output=True).returncode:
                return
            time.sleep(0.05)
        sh("umount", "--lazy", self.path)

    def cold(self) -> None:
        """Forget every dentry and inode of it."""
        self._umount()
        self._mount()

    def close(self) -> None:
        self._umount()
        self.path.rmdir()
        if self.image:
            self.image.unlink()


# ---- watchers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """How one watcher is started, told to end, and read."""

    name: str
    argv: Callable[[Bench, Path], list[str]]
    ready: bytes
    read: Callable[[bytes], Iterator[Record]]
    drains: bool = False  # a signal makes it deliver what is queued; others need to fall quiet
    package: str = ""  # of a peer: `debian:NAME` or `pypi:NAME`; its version is recorded
    how: str = ""  # of a peer: what of it is used
    asked: bool = False  # it is asked once, at the end: it cannot be timed event by event
    children: bool = False  # it works in processes of its own below the one that is started
    checks: bool = False  # it can open the name of each deletion itself, when it is told


def json_records(output: bytes) -> Iterator[Record]:
    for line in output.splitlines():
        if line.startswith(b'{"') and b'"change"' in line[:40]:
            item = json.loads(line)
            yield tuple(item["kinds"]), item["path"], item.get("old_path")


def last_json(output: bytes) -> Json:
    """The closing line of a watcher that prints one."""
    for line in reversed(output.splitlines()):
        if line.startswith(b"{"):
            found: Json = json.loads(line)
            return found
    return {}


INOTIFY = {
    "CREATE": "created",
    "MODIFY": "modified",
    "CLOSE_WRITE": "written",
    "DELETE": "deleted",
    "MOVED_FROM": "moved_away",
    "MOVED_TO": "renamed",
    "Q_OVERFLOW": "lost",
}


def inotifywait_records(output: bytes) -> Iterator[Record]:
    """Of inotifywait and fsnotifywait; the latter marks a name that has gone since."""
    for line in output.decode(errors="surrogateescape").splitlines():
        flags, bar, path = line.partition("|")
        if bar:
            kinds = tuple(INOTIFY[f] for f in flags.split(",") if f in INOTIFY)
            yield kinds, path.removesuffix(" (deleted)"), None


FATRACE_LINE = re.compile(rb"^.*\(\d+\): ([A-Z+<>]+) +(/.*)$", re.MULTILINE)


def fatrace_records(output: bytes) -> Iterator[Record]:
    """A letter for each event. Of +, D, < and > the path is the directory's: no name is told."""
    for match in FATRACE_LINE.finditer(output):
        letters = match[1].decode()
        path = os.fsdecode(match[2]).removesuffix(" (deleted)")
        kinds = []
        if "W" in letters:
            kinds.append("written" if "C" in letters else "modified")
        if set(letters) & set("+D<>"):
            kinds.append("directory_changed")
        yield tuple(kinds), path, None


EVENTS = "create,modify,close_write,move,delete"


def _program(name: str, package: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if not found:
        who = "" if os.geteuid() == 0 else " (as root)"
        raise Unavailable(f"{name} is not installed: apt-get install {package}{who}")
    return found


def _inotifywait(bench: Bench, root: Path) -> list[str]:
    found = _program("inotifywait", "inotify-tools")
    return [found, "-m", "-r", "-e", EVENTS, "--format", "%e|%w%f", str(root)]


def _fsnotifywait(bench: Bench, root: Path) -> list[str]:
    found = _program("fsnotifywait", "inotify-tools 3.22 or newer")
    # By lines: it loses what is in its buffer when it is told to end.
    argv = [found, "-m", "-S", "-e", EVENTS, "--format", "%e|%w%f", str(root)]
    return [_program("stdbuf", "coreutils"), "-oL", *argv]


def _fatrace(bench: Bench, root: Path) -> list[str]:
    # It says nothing when it is ready: the shell says so, and the start is waited for by `settle`.
    found = _program("fatrace", "fatrace")
    script = f'cd "$1" && (sleep 1; echo READY) & cd "$1" && exec {found} -c -f "CWD+<>"'
    return ["/bin/sh", "-c", script, "fatrace", str(root)]


def _watchman(bench: Bench, root: Path) -> list[str]:
    _program("watchman", "watchman")
    return [sys.executable, str(HERE / "_peer.py"), "watchman", str(root)]


def _peer(name: str) -> Callable[[Bench, Path], list[str]]:
    def argv(bench: Bench, root: Path) -> list[str]:
        return [str(bench.peer_python(name)), str(HERE / "_peer.py"), name, str(root)]

    return argv


def _library(*more: str) -> Callable[[Bench, Path], list[str]]:
    def argv(bench: Bench, root: Path) -> list[str]:
        need(PYTHON)
        return [str(PYTHON), str(HERE / "_library.py"), *more, str(root)]

    return argv


def _without_tracefs(bench: Bench, root: Path) -> list[str]:
    hide = ["unshare", "--mount", "sh", "-c", 'umount -a -t tracefs; exec "$@"', "sh"]
    return [*hide, *_library("who")(bench, root)]


def _command(*more: str) -> Callable[[Bench, Path], list[str]]:
    def argv(bench: Bench, root: Path) -> list[str]:
        need(FANWISE)
        return [str(FANWISE), "watch", "--json", *more, str(root)]

    return argv


def need(program: Path) -> None:
    if not program.exists():
        raise Unavailable(f"{program} is missing (run make)")


def _c(*more: str) -> Callable[[Bench, Path], list[str]]:
    return lambda bench, root: [str(bench.creader), str(root), *more]


def _pypi(name: str, how: str, **more: bool) -> Contender:
    return Contender(
        name, _peer(name), READY, json_records, package=f"pypi:{name}", how=how, checks=True, **more
    )


NOBODY = ("--user", "nobody")  # no rights: marks on directories
RUNG = ("--rung", "inotify")
READY, JSON_READY = b"READY\n", b'"type":"ready"'
CONTENDERS = {
    c.name: c
    for c in (
        Contender("c", _c(), READY, json_records, drains=True),
        Contender("c lines", _c("--lines"), READY, json_records, drains=True),
        Contender("library", _library("count"), READY, json_records, drains=True),
        Contender(
            "library names", _library("record"), READY, json_records, drains=True, checks=True
        ),
        Contender("library scan", _library("scan"), READY, json_records, drains=True),
        Contender("nobody", _library("count", *NOBODY), READY, json_records, drains=True),
        Contender("nobody names", _library("record", *NOBODY), READY, json_records, drains=True),
        Contender("inotify", _library("count", *RUNG), READY, json_records, drains=True),
        Contender("inotify names", _library("record", *RUNG), READY, json_records, drains=True),
        Contender("pure", _library("count", "--pure"), READY, json_records, drains=True),
        Contender(
            "pure names",
            _library("record", "--pure"),
            READY,
            json_records,
            drains=True,
            checks=True,
        ),
        Contender("library who", _library("who"), READY, json_records, drains=True),
        Contender("library who, no tracefs", _without_tracefs, READY, json_records, drains=True),
        Contender("watch --json", _command(), JSON_READY, json_records, drains=True),
        Contender(
            "inotifywait",
            _inotifywait,
            b"Watches established.",
            inotifywait_records,
            package="debian:inotify-tools",
            how="`inotifywait -m -r`",
        ),
        Contender(
            "fsnotifywait",
            _fsnotifywait,
            b"Watches established.",
            inotifywait_records,
            package="debian:inotify-tools",
            how="`fsnotifywait -m -S`, its output by lines (`stdbuf -oL`)",
        ),
        Contender(
            "fatrace",
            _fatrace,
            READY,
            fatrace_records,
            package="debian:fatrace",
            how="`fatrace -c -f 'CWD+<>'`; ready is taken to be 1 s after the start",
        ),
        Contender(
            "watchman",
            _watchman,
            READY,
            json_records,
            package="debian:watchman",
            how="a server of its own; one `query` `since` the clock of the start, at the end",
            asked=True,
            children=True,
        ),
        _pypi("watchdog", "`Observer`, recursive"),
        _pypi("watchfiles", "`RustNotify`, with the defaults of `watch()`"),
        _pypi("inotify-simple", "with the plain recursion of bench/_peer.py"),
        _pypi("asyncinotify", "`RecursiveWatcher`, with `Q_OVERFLOW` in its mask"),
        _pypi("pyfanotify", "`Fanotify(init_fid=True)`, filesystem mark", children=True),
        _pypi("wtr-watcher", "`Watch`"),
    )
}
PEERS = tuple(name for name, contender in CONTENDERS.items() if contender.package)


def session(leader: int) -> list[int]:
    """The processes of a session that was started by `leader`."""
    found = []
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == leader:
                found.append(pid)
    return found


class Watcher:
    """A started watcher. Its output is read at once and kept, so that it never waits for us."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        ready: bytes,
        group: Group | None,
        reading: bool,
        children: bool = False,
    ) -> None:
        self.name, self.chunks, self.cpu_ready, self.ended = name, [], 0.0, ""
        self._children = children
        self.arrived: Callable[[bytes], None] | None = None  # called with each piece of output
        self.reading = threading.Event()
        if reading:
            self.reading.set()
        self._pattern, self._ready, self._head = ready, threading.Event(), b""
        self.usage: Any = None
        self.started = time.monotonic_ns()
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            cwd=ROOT,
            # What the caller's shell prefers must not decide which twin is measured.
            env={k: v for k, v in os.environ.items() if not k.startswith("FANWISE_")},
            # A session of its own: what it starts is found, and ended, by its group.
            start_new_session=True,
            preexec_fn=group.enter if group else None,
        )
        self.pid = self.process.pid
        self.ready_at = 0
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    chunks: list[tuple[int, bytes]]  # when each piece arrived (CLOCK_MONOTONIC), and the piece

    def _read(self) -> None:
        assert self.process.stdout
        fd = self.process.stdout.fileno()
        while chunk := os.read(fd, 1 << 20):
            now = time.monotonic_ns()
            self.chunks.append((now, chunk))
            if self.arrived:
                self.arrived(chunk)
            if not self._ready.is_set():
                self._head += chunk
                if self._pattern in self._head:
                    self.ready_at = now
                    self._ready.set()
            if self._ready.is_set():
                self.reading.wait()
        self._ready.set()

    @property
    def output(self) -> bytes:
        return b"".join(chunk for _, chunk in self.chunks)

    def wait_ready(self, timeout: float = 120) -> float:
        """Return the seconds from the start until it said that it watches."""
        self._ready.wait(timeout)
        if not self.ready_at:
            self.kill()
            raise Unavailable(f"{self.name} did not become ready: {self._tail()}")
        self.cpu_ready = self.cpu()
        return (self.ready_at - self.started) / 1e9

    def cpu(self) -> float:
        # The processor-time clock of another process: ~pid << 3 | CPUCLOCK_SCHED.
        if self.usage is not None:
            return float(self.usage.ru_utime + self.usage.ru_stime)
        if not self._children:
            return time.clock_gettime((~self.pid << 3) | 2)
        total = 0.0
        for pid in session(self.pid):
            with contextlib.suppress(OSError):  # ended meanwhile
                total += time.clock_gettime((~pid << 3) | 2)
        return total

    def quiet(self, timeout: float = 120) -> bool:
        """Wait until it uses under 1 % of a core for a second; False when it never does."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if not self.running():
                return True
            before = self.cpu()
            time.sleep(1)
            if self.cpu() - before < 0.01:
                return True
        return False

    def stop(self, timeout: float = 300) -> Json:
        """Tell it to end, wait until it has, and return what it used.

        One that has not ended in time is killed, and `ended` says so; so does that of one that
        ended by itself. Raises Unavailable when it failed otherwise.
        """
        if self.running():
            os.kill(self.pid, signal.SIGINT)
            self._reap(timeout)
        elif self.process.returncode:
            self.ended = f"ended by itself with status {self.process.returncode}: {self._tail()}"
        self._end_group()
        self.reading.set()
        self._thread.join(60)
        status = self.process.returncode
        if status not in (0, -signal.SIGINT) and not self.ended:
            raise Unavailable(f"{self.name} ended with status {status}: {self._tail()}")
        closing = last_json(self.output)
        return {
            # A peer that prints what it kept says what it had used before the printing.
            "cpu_s": closing.get("cpu_s", self.usage.ru_utime + self.usage.ru_stime),
            "cpu_ready_s": self.cpu_ready,
            "ended": self.ended or closing.get("error", ""),
        }

    def _tail(self) -> str:
        return " / ".join(self.output.decode(errors="replace").strip().splitlines()[-3:])[-300:]

    def running(self) -> bool:
        # Never through Popen, whose poll(), kill() and send_signal() would reap it without rusage.
        if self.usage is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.process.returncode = os.waitstatus_to_exitcode(status)
                self.usage = usage
        return self.usage is None

    def _reap(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while self.running():
            if time.monotonic() > end and not self.ended:
                self.ended = f"killed: it did not end within {timeout:.0f} s"
                self._end_group()
            time.sleep(0.005)

    def _end_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # all of it has ended
            os.killpg(self.pid, signal.SIGKILL)

    def kill(self) -> None:
        self.reading.set()
        self._end_group()
        if self.running():
            self._reap(10)
        self._thread.join(10)
        if self.process.stdout:
            self.process.stdout.close()


# ---- the bench -----------------------------------------------------------------------------------


@dataclass
class Bench(contextlib.ExitStack):
    quick: bool = False
    turns: int = 3
    only: frozenset[str] = frozenset()  # contenders, when not all are wanted
    missing: dict[str, str] = field(default_factory=dict)
    _count: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __enter__(self) -> Bench:
        super().__enter__()
        # A SIGTERM must unwind like a Ctrl-C, or mounts and groups stay behind.
        old = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        self.callback(signal.signal, signal.SIGTERM, old)
        # Started in the background of a shell SIGINT is ignored, and so it would be in every child.
        old = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.callback(signal.signal, signal.SIGINT, old)
        self.scratch = Path(tempfile.mkdtemp(prefix="fanwise-bench-"))
        self.scratch.chmod(0o755)  # some rows run as another user
        self.callback(shutil.rmtree, self.scratch, ignore_errors=True)
        for name in ("creader", "storm"):
            sh("cc", "-O2", "-Wall", "-o", self.scratch / name, HERE / f"{name}.c")
        self.creader, self._storm = self.scratch / "creader", self.scratch / "storm"
        return self

    @property
    def runs(self) -> int:
        return 1 if self.quick else self.turns

    def plain(self, text: str) -> str:
        """A reason without the places of this machine."""
        return text.replace(f"{self.scratch}/", "").replace(f"{ROOT}/", "")

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _name(self, what: str) -> str:
        self._count += 1
        return f"{what}{self._count}"

    @contextlib.contextmanager
    def tmpfs(self) -> Iterator[Path]:
        with contextlib.closing(Mount(self.scratch / self._name("tmpfs"), None)) as mount:
            yield mount.path

    @contextlib.contextmanager
    def overlay(self) -> Iterator[Path]:
        """An overlayfs with default options, its parts on a tmpfs."""
        with self.tmpfs() as parts:
            for part in ("lower", "upper", "work", "merged"):
                (parts / part).mkdir()
            options = ",".join(f"{p}dir={parts / p}" for p in ("lower", "upper", "work"))
            sh("mount", "-t", "overlay", "-o", options, "fanwise-bench", parts / "merged")
            try:
                yield parts / "merged"
            finally:
                sh("umount", "--lazy", parts / "merged")

    @contextlib.contextmanager
    def subvolume(self) -> Iterator[Path]:
        """A subvolume of a btrfs, mounted alone, as several distributions mount their root."""
        image = self.scratch / f"{self._name('btrfs')}.img"
        with open(image, "wb") as file:
            file.truncate(256 << 20)
        sh("mkfs.btrfs", "-q", image)
        with contextlib.closing(Mount(self.scratch / self._name("btrfs"), image)) as top:
            sh("btrfs", "subvolume", "create", top.path / "sub")
            where = self.scratch / self._name("subvolume")
            where.mkdir()
            sh("mount", "-o", "subvol=sub", sh("findmnt", "-no", "SOURCE", top.path).strip(), where)
            try:
                yield where
            finally:
                sh("umount", "--lazy", where)
                where.rmdir()

    @contextlib.contextmanager
    def ext4(self, directories: int) -> Iterator[Mount]:
        """An ext4 with room for that many directories of one block each."""
        name = self._name("ext4")
        image = self.scratch / f"{name}.img"
        with open(image, "wb") as file:
            file.truncate((64 << 20) + directories * 6000)
        sh("mkfs.ext4", "-q", "-N", str(directories + 20_000), image)
        with contextlib.closing(Mount(self.scratch / name, image)) as mount:
            yield mount

    @contextlib.contextmanager
    def group(self, what: str) -> Iterator[Group]:
        with contextlib.closing(Group(self._name(what))) as group:
            yield group

    def storm(
        self,
        mode: str,
        root: Path,
        *numbers: float,
        group: Group | None = None,
        user: str | None = None,
    ) -> Json:
        output = self.storm_lines(mode, root, *numbers, group=group, user=user)
        found: Json = json.loads(output[-1])
        return found

    def storm_lines(
        self,
        mode: str,
        root: Path,
        *numbers: float,
        group: Group | None = None,
        user: str | None = None,
    ) -> list[str]:
        argv = [str(self._storm), mode, str(root), *(f"{n:.12g}" for n in numbers)]
        enter = group.enter if group else None
        # Not run(): on Ctrl-C it waits for a child that has had the same signal.
        with subprocess.Popen(
            argv, stdout=subprocess.PIPE, text=True, preexec_fn=enter, user=user
        ) as child:
            try:
                output, _ = child.communicate()
            except BaseException:
                child.kill()
                raise
        if child.returncode:
            raise RuntimeError(f"{shlex.join(argv)}: status {child.returncode}")
        return output.splitlines()

    @contextlib.contextmanager
    def watch(
        self, name: str, root: Path, group: Group | None = None, *more: str, reading: bool = True
    ) -> Iterator[Watcher]:
        """Start a contender; it is killed at the end unless it was stopped."""
        contender = CONTENDERS[name]
        argv = contender.argv(self, root) + list(more)
        watcher = Watcher(name, argv, contender.ready, group, reading, contender.children)
        try:
            yield watcher
        finally:
            watcher.kill()

    def wanted(self, names: Iterable[str]) -> list[str]:
        return [n for n in names if not self.only or n in self.only]

    def each(self, names: Iterable[str], run: Callable[[str], Json]) -> dict[str, list[Json]]:
        """Run A B C A B C A B C, so that a ratio compares what ran side by side."""
        results: dict[str, list[Json]] = {}
        for turn in range(self.runs):
            for name in self.wanted(names):
                if name in self.missing:
                    continue
                try:
                    result = run(name)
                except Unavailable as why:
                    self.missing[name] = self.plain(str(why))
                    self.say(f"  {name}: {self.missing[name]}")
                    continue
                if result.get("ended"):
                    result["ended"] = self.plain(result["ended"])
                results.setdefault(name, []).append(result)
                shown = {k: v for k, v in result.items() if isinstance(v, (int, float, str))}
                self.say(f"  [{turn + 1}] {name}: {brief(shown)}")
        return results

    def peer_python(self, name: str) -> Path:
        """The interpreter of a peer's own environment, made once; none shares one with another."""
        wanted = "\n".join(environments(REQUIREMENTS.read_text())[name])
        home = CACHE / "peers" / name
        python, stamp = home / "bin/python", home / "installed"
        if not (stamp.exists() and stamp.read_text() == wanted):
            self.say(f"  installing {name}")
            try:
                sh(sys.executable, "-m", "venv", "--clear", home)
                pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
                sh(*pip, *wanted.split())
            except RuntimeError as error:
                why = str(error).splitlines()[-1]
                raise Unavailable(f"could not be installed: {why}") from error
            stamp.write_text(wanted)
        return python


def environments(text: str) -> dict[str, list[str]]:
    """The requirements of each peer, by the headings `# [NAME]` of the file."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        if heading := re.fullmatch(r"# \[(.+)\]", line):
            name = heading[1]
            found[name] = []
        elif not line.startswith("#"):
            found[name].append(line)
    return found


# ---- figures -------------------------------------------------------------------------------------


def brief(values: Json) -> str:
    return ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()
    )


def median(runs: Iterable[Json], key: str) -> float | None:
    found = [r[key] for r in runs if r.get(key) is not None]
    return statistics.median(found) if found else None


def worst(runs: Iterable[Json], key: str, pick: Callable[[list[float]], float]) -> float | None:
    """For what must hold every time, where a median would hide the run in which it did not."""
    found = [r[key] for r in runs if r.get(key) is not None]
    return pick(found) if found else None


def ratio(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else value / other


def row(
    measure: str,
    bar: str,
    passed: bool | None,
    measured: str,
    c: str = "",
    ratio: float | None = None,
    note: str = "",
) -> Json:
    """One line of the table of bars; passed is None for what could not be measured."""
    return {
        "measure": measure,
        "bar": bar,
        "measured": measured,
        "c": c,
        "ratio": ratio,
        "pass": passed,
        "note": note,
    }


def below(value: float | None, bar: float) -> bool | None:
    return None if value is None else value <= bar


def show(value: float | None, unit: str = "", digits: int = 3) -> str:
    return "not measured" if value is None else f"{value:.{digits}g} {unit}".strip()


def machine() -> Json:
    cpu = "unknown"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    return {
        "kernel": platform.release(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "python": _version(PYTHON, "import platform; print(platform.python_version())"),
        "fanwise": _version(PYTHON, "import importlib.metadata as m; print(m.version('fanwise'))"),
        **{name: peer_version(name) for name in PEERS},
        "cc": _first_line(["cc", "--version"]),
    }


def _first_line(argv: list[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True)
    except OSError:
        return "not installed"
    return (done.stdout + done.stderr).strip().split("\n")[0] if done.returncode < 2 else "unknown"


def _version(python: Path, code: str) -> str:
    return _first_line([str(python), "-c", code]) if python.exists() else "not installed"


def peer_version(name: str) -> str:
    """The version of what is installed, asked of the package manager that installed it."""
    kind, _, package = CONTENDERS[name].package.partition(":")
    if kind == "pypi":
        code = f"import importlib.metadata as m; print(m.version({package!r}))"
        return _version(CACHE / "peers" / name / "bin/python", code)
    line = _first_line(["dpkg-query", "-W", "-f", "${Version}", package])
    if line[:1].isdigit():
        return line
    found = shutil.which(name)
    return f"{found}, not from a package" if found else "not installed"
