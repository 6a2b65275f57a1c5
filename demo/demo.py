"""What was done to a filesystem, beside what fanwise told of it.

    make demo        or: .venv/bin/python demo/demo.py [--files N]

Makes a scratch filesystem, lets two processes storm it under `fanwise watch --json`, and compares;
then the same under inotifywait, where it is installed. In a second act another one is damaged while
`fanwise health --follow` listens. Everything it made goes again, also after
Ctrl-C. Needs root; without, it says what stands in the way.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fanwise

KINDS = ("created", "modified", "written", "renamed", "deleted")
INOTIFY = {
    "CREATE": "created",
    "MODIFY": "modified",
    "CLOSE_WRITE": "written",
    "MOVED_TO": "renamed",
    "DELETE": "deleted",
}
WRITERS = 2
DEADLINE = 60  # seconds for anything that must happen


class Unavailable(Exception):
    """Something cannot be shown here; the text says why."""


# ---- the storm: this file again, as another process ----------------------------------------------


def write(root: str, files: int, name: str) -> None:
    """Create, write, close and rename files, unlink nine in ten, and print what was done."""
    Path("/proc/self/comm").write_text(name)
    sys.stdin.readline()  # all begin together
    created = modified = renamed = deleted = 0
    for i in range(files):
        if i % 1000 == 0:  # a new chain of directories, used at once
            where = f"{root}/{name}-{i // 1000}"
            for part in ("", "/deep", "/deep/er"):
                os.mkdir(where + part)
                created += 1
            where += "/deep/er"
        fd = os.open(f"{where}/new-{i}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        created += 1
        os.write(fd, b"content")
        modified += 1
        os.close(fd)
        os.rename(f"{where}/new-{i}", f"{where}/file-{i}")
        renamed += 1
        if i % 10:
            os.unlink(f"{where}/file-{i}")
            deleted += 1
    print(json.dumps([os.getpid(), name, [created, modified, modified, renamed, deleted]]))


class Done(NamedTuple):
    """What the writers say they did: by kind, and how much by which process."""

    kinds: Counter[str]
    pids: dict[int, tuple[str, int]]
    seconds: float


def storm(stack: contextlib.ExitStack, root: Path, files: int) -> Done:
    writers = [
        start(
            stack,
            [sys.executable, __file__, "--write", str(root), str(files // WRITERS), f"writer-{n}"],
            stdin=subprocess.PIPE,
        )
        for n in range(1, WRITERS + 1)
    ]
    began = time.monotonic()
    for writer in writers:
        assert writer.stdin
        writer.stdin.write(b"\n")
        writer.stdin.close()
    kinds: Counter[str] = Counter()
    pids = {}
    for writer in writers:
        assert writer.stdout
        pid, name, counts = json.loads(writer.stdout.read())
        kinds.update(dict(zip(KINDS, counts, strict=True)))
        pids[pid] = (name, sum(counts))
        writer.wait(DEADLINE)
    return Done(kinds, pids, time.monotonic() - began)


# ---- what is made here, and goes again -----------------------------------------------------------


class Signals:
    """Turns SIGINT and SIGTERM into KeyboardInterrupt, but not while something is half made."""

    def __init__(self) -> None:
        self._held, self._came = 0, 0

    def __call__(self, signum: int, frame: object) -> None:
        if self._held:
            self._came = signum
        else:
            raise KeyboardInterrupt(signum)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if self._came and not self._held:
                raise KeyboardInterrupt(self._came)

    def hold(self) -> None:
        """Hold them for good."""
        self._held += 1


SIGNALS = Signals()


def start(
    stack: contextlib.ExitStack,
    argv: list[str],
    stdin: int | None = None,
    stderr: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> "subprocess.Popen[bytes]":
    """Start a process that is gone when the stack is; Ctrl-C reaches this process only."""
    with SIGNALS.held():
        process = subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            process_group=0,
            env=environ,
        )
        stack.callback(end, process)
    return process


def end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None and not stream.closed:
            stream.close()


def tool(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def sh(*argv: str) -> str:
    program = tool(argv[0])
    if program is None:
        raise Unavailable(f"there is no {argv[0]}")
    done = subprocess.run([program, *argv[1:]], capture_output=True, text=True, process_group=0)
    if done.returncode:
        raise Unavailable(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout.strip()


def scratch(stack: contextlib.ExitStack, files: int) -> tuple[Path, str]:
    """Mount an ext4 of our own, or else a tmpfs; where, and what it is."""
    with SIGNALS.held():
        base = Path(tempfile.mkdtemp(prefix="fanwise-demo-"))
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        point = base / "fs"
        point.mkdir()
        what = "ext4 on a loop device"
        try:
            mount_ext4(base / "image", point, files)
        except Unavailable as reason:
            what = f"a tmpfs (no ext4: {reason})"
            sh("mount", "-t", "tmpfs", "-o", "nr_inodes=0", "fanwise-demo", str(point))
        stack.callback(sh, "umount", str(point))
    return point, what


def mount_ext4(image: Path, point: Path, files: int, megabytes: int = 256) -> None:
    with open(image, "wb") as file:
        file.truncate(megabytes << 20)
    sh("mkfs.ext4", "-q", "-F", "-N", str(max(20_000 * megabytes // 256, files)), str(image))
    attach(image, point)


def attach(image: Path, point: Path) -> None:
    # Finding a free device and taking it are two steps; others may be at it.
    locks = Path("/run/lock") if Path("/run/lock").is_dir() else Path(tempfile.gettempdir())
    with open(locks / "fanwise-loop.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        device = sh("losetup", "--find", "--show", str(image))
    try:
        sh("mount", device, str(point))
    finally:
        sh("losetup", "--detach", device)  # when it is mounted: with the umount


# ---- the watchers --------------------------------------------------------------------------------


class Watched(NamedTuple):
    """A watcher's run."""

    done: Done
    lines: list[bytes]
    ready: float  # seconds from its start
    cpu: float  # seconds, without its start


class Output(threading.Thread):
    """Takes everything that a watcher says, so that it never waits for us."""

    def __init__(self, fd: int) -> None:
        super().__init__(daemon=True)
        self._fd, self._data, self._more = fd, bytearray(), threading.Condition()
        self._end = False
        self.start()

    def run(self) -> None:
        while data := os.read(self._fd, 1 << 20):
            with self._more:
                self._data += data
                self._more.notify()
        with self._more:
            self._end = True
            self._more.notify()

    def wait_for(self, text: bytes, seconds: float = DEADLINE) -> bool:
        """Whether it says this in time."""
        seen = 0

        def said() -> bool:
            nonlocal seen
            found = self._data.find(text, max(0, seen - len(text)))
            seen = len(self._data)
            return found >= 0 or self._end

        with self._more:
            return self._more.wait_for(said, seconds) and text in self._data

    def so_far(self) -> list[bytes]:
        """Every whole line, without waiting."""
        with self._more:
            return bytes(self._data).splitlines(keepends=True)[: self._data.count(b"\n")]

    def lines(self) -> list[bytes]:
        self.join(DEADLINE)
        return bytes(self._data).splitlines()


def run(
    stack: contextlib.ExitStack,
    argv: list[str],
    files: int,
    root: Path,
    is_ready: Callable[["subprocess.Popen[bytes]", Output], None],
    last: Callable[[Output], None],
) -> Watched:
    root.mkdir()
    began = time.monotonic()
    process = start(stack, argv, stderr=subprocess.PIPE)
    assert process.stdout
    output = Output(process.stdout.fileno())
    is_ready(process, output)
    ready = time.monotonic() - began
    before = cpu_of(process.pid)
    done = storm(stack, root, files)
    last(output)
    process.terminate()
    lines = output.lines()
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    return Watched(done, lines, ready, usage.ru_utime + usage.ru_stime - before)


def cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def with_fanwise(stack: contextlib.ExitStack, root: Path, files: int) -> Watched:
    command = str(Path(sys.executable).parent / "fanwise")

    def is_ready(process: "subprocess.Popen[bytes]", output: Output) -> None:
        if not output.wait_for(b'"ready"'):
            assert process.stderr
            raise Unavailable(process.stderr.read().decode().strip())

    argv = [command, "watch", "--json", "--kinds", ",".join(KINDS), str(root)]
    # On SIGTERM it tells everything that was queued before.
    return run(stack, argv, files, root, is_ready, lambda output: None)


def with_inotifywait(stack: contextlib.ExitStack, root: Path, files: int) -> Watched:
    if not tool("inotifywait"):
        raise Unavailable("it is not installed (Debian: inotify-tools)")

    def is_ready(process: "subprocess.Popen[bytes]", output: Output) -> None:
        assert process.stderr
        for line in process.stderr:
            if b"Watches established" in line:
                return
        raise Unavailable("it ended before its watches were established")

    def last(output: Output) -> None:
        (root / "the-last-one").touch()
        output.wait_for(b"the-last-one", 10)

    argv = ["inotifywait", "-m", "-r", "--format", "%e %w%f"]
    argv += [part for name in INOTIFY for part in ("-e", name.lower())]
    return run(stack, [*argv, str(root)], files, root, is_ready, last)


# ---- the comparison ------------------------------------------------------------------------------


def compare(stack: contextlib.ExitStack, files: int) -> int:
    point, what = scratch(stack, files)
    print(f"{what}; {WRITERS} writers, {files:,} files: each is created, written, closed, renamed,")
    print("and nine in ten are unlinked\n", flush=True)
    watched = with_fanwise(stack, point / "one", files)
    done = watched.done
    records = [json.loads(line) for line in watched.lines]
    if not records or records[-1]["type"] != "stopped":
        print(f"fanwise watch ended too early, after {len(records):,} lines")
        return 4
    changes = [record for record in records if record["type"] == "change"]
    kinds = Counter(kind for change in changes for kind in change["kinds"])
    pids = Counter[int]()
    for change in changes:
        pids[change["pid"]] += len(change["kinds"])
    sources = Counter(change["path_source"] for change in changes)

    print(
        f"fanwise watch was ready after {watched.ready:.3f} s; the storm took {done.seconds:.1f} s"
    )
    print(f"\n{'':28}{'done':>12}{'told':>12}")
    same = True
    rows = [(kind, done.kinds[kind], kinds[kind]) for kind in KINDS]
    rows.append(("all", done.kinds.total(), kinds.total()))
    rows += [(f"by process {pid}, {n}", count, pids[pid]) for pid, (n, count) in done.pids.items()]
    rows.append(("by any other process", 0, pids.total() - sum(pids[pid] for pid in done.pids)))
    for name, count, told in rows:
        same = same and count == told
        print(f"{name:28}{count:12,}{told:12,}{'' if count == told else '   <- differs'}")
    exact = sources["exact"]
    print(
        f"\n{exact:,} of {len(changes):,} paths are exact; {records[-1]['lost']} records were lost"
    )

    print("\nCPU seconds for a million facts, without the start:")
    share = f"{100 * kinds.total() / done.kinds.total():.2f} %"
    cost = per_million(watched.cpu, kinds.total())
    print(f"  {'fanwise watch --json':24}{cost}, told {share} and by whom")
    try:
        other = with_inotifywait(stack, point / "two", files)
    except Unavailable as reason:
        print(f"  {'inotifywait':24}not shown: {reason}")
    else:
        told = sum(
            name in INOTIFY
            for line in other.lines
            if not line.endswith(b"the-last-one")
            for name in line.partition(b" ")[0].decode().split(",")
        )
        share = f"{100 * told / other.done.kinds.total():.2f} %"
        print(f"  {'inotifywait':24}{per_million(other.cpu, told)}, told {share} and no process,")
        print(f"  {'':24}ready after {other.ready:.3f} s with an empty tree")
    return 0 if same and exact == len(changes) else 4


# ---- the second act: a filesystem breaks ---------------------------------------------------------

BROKEN = "photos/summer.raw"
READS = 3


def breaking(stack: contextlib.ExitStack) -> int:
    """Damage a filesystem while somebody listens, and compare what is told with the superblock."""
    with SIGNALS.held():
        base = Path(tempfile.mkdtemp(prefix="fanwise-demo-"))
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        image, point = base / "image", base / "fs"
        point.mkdir()
        mount_ext4(image, point, 0, megabytes=64)
        stack.callback(unmount, point)
    file = point / BROKEN
    file.parent.mkdir()
    file.write_bytes(b"summer" * 10_000)
    command = str(Path(sys.executable).parent / "fanwise")
    keep = {"FANWISE_HEALTH_STATE": str(base), "FANWISE_HEALTH_SECOND": str(base / "second.db")}
    health = start(
        stack, [command, "health", "--follow", "--json", str(point)], environ=os.environ | keep
    )
    assert health.stdout
    output = Output(health.stdout.fileno())
    if not output.wait_for(b'"ready"'):
        raise Unavailable("fanwise health ended before it was ready")
    sources = json.loads(output.so_far()[0])["sources"]
    up = [name for name, source in sources.items() if source["state"] != "down"]
    print("\nThe second act: an ext4 is damaged while `fanwise health --follow` listens.")
    print(f"It listens by {', '.join(name for name in up if name != 'database')}", end="")
    for name, source in sources.items():
        if source["state"] == "down":
            print(f"\n  and not by {name}: {source['reason']}", end="")
    print("\n", flush=True)

    # What has no channel of its own: somebody unmounts it, one inode rots, it is mounted again.
    unmount(point)
    sh("debugfs", "-w", "-R", f"sif /{BROKEN} block[0] 0x1111", str(image))
    attach(image, point)
    said, began = "nothing", 0.0
    for _ in range(READS):
        began = began or time.monotonic()
        try:
            file.read_bytes()
        except OSError as error:
            said = error.strerror or str(error)
    if not output.wait_for(b'"incident"'):
        raise Unavailable("no incident came")
    first = time.monotonic() - began
    device = f"{os.stat(point).st_dev >> 8}:{os.stat(point).st_dev & 0xFF}"
    counter = Path(f"/sys/dev/block/{device}").resolve().name
    count = int(Path(f"/sys/fs/ext4/{counter}/errors_count").read_text())
    until = time.monotonic() + DEADLINE
    incident: dict[str, Any] = {}
    while time.monotonic() < until:
        found = [r for r in map(json.loads, output.so_far()) if r["type"] == "incident"]
        incident = found[-1]
        if incident["total"] == count and incident["object"]["path"]:
            break
        time.sleep(0.05)
    health.terminate()
    where, at = incident["object"], incident["location"]
    total = f"{incident['total']:,}"
    print(f"a program reads {BROKEN} {READS} times and is told: {said}")
    print(f"first line of the incident {first * 1000:.1f} ms after the first of these, and in all:")
    for name, text in (
        ("what", f"{incident['errno']}, {incident['meaning']}"),
        ("file", f"{where['path']} (inode {where['ino']}, by {where['path_source']})"),
        ("code", f"{at['function']}:{at['line']} of Linux {at['kernel']}"),
        ("errors", f"{total} (the superblock says {count})"),
        ("told by", ", ".join(incident["channels"])),
        ("advice", incident["advice"]),
    ):
        print(f"  {name:8}{text}")
    right = incident["total"] == count == READS and where["path"] == str(file)
    return 0 if right else 4


def unmount(point: Path) -> None:
    if os.path.ismount(point):
        sh("umount", str(point))


def per_million(cpu: float, facts: int) -> str:
    return f"{cpu / max(facts, 1) * 1e6:.2f} s"


def cannot_show() -> str | None:
    """Say why there is nothing to show, or None."""
    found = fanwise.capabilities(tempfile.gettempdir())
    if found.rung is None:
        return f"{found.reason}; {found.remedy}" if found.remedy else found.reason
    if os.geteuid():
        return "mounting a scratch filesystem needs root; run as root"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", type=int, default=40_000, help="of the storm (40000)")
    parser.add_argument("--write", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        root, files, name = arguments.write
        write(root, int(files), name)
        return 0
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, SIGNALS)
    stack = contextlib.ExitStack()
    try:
        with SIGNALS.held():
            tempfile.gettempdir()  # tries it with a file, the first time
        reason = cannot_show()
        if reason is not None:
            raise Unavailable(reason)
        status = compare(stack, arguments.files)
        try:
            return breaking(stack) or status
        except Unavailable as error:
            print(f"\nThe second act, a filesystem that breaks, cannot be shown here:\n  {error}")
            return status
    except Unavailable as error:
        print("The demo watches a scratch filesystem while two processes change it, and compares")
        print("what was done with what was told. It cannot show that here:")
        print(f"  {error}")
        print("`fanwise doctor` says what can be done here.")
        return 0
    except KeyboardInterrupt as stop:
        print("\ninterrupted; cleaning up", flush=True)
        return 128 + int(stop.args[0])
    finally:
        SIGNALS.hold()
        stack.close()


if __name__ == "__main__":
    sys.exit(main())
