"""What of one provoked fault each tells an operator, who asks it a moment later?"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from bench._harness import FANWISE, Bench, Json, Unavailable, row, sh
from tests.kernel.faults import Volume, code_of, fsync, read, volume

EIO = 5
SETTLE = 2.0  # seconds that everybody has
NOTHING, SOMETHING, INODE, FILE = "nothing", "the filesystem", "the inode", "the file"


def tree(point: Path) -> None:
    (point / "d").mkdir()
    for name in ("f", "g", "h"):
        (point / "d" / name).write_bytes(name.encode() * 65536)


def ext4_inode(it: Volume) -> None:
    with it.unmounted():
        it.debugfs("sif /d/f block[0] 0x1111")


def xfs_inode(it: Volume) -> None:
    ino = (it.point / "d/f").stat().st_ino
    with it.unmounted():
        it.scribble(it.xfs_at(f"inode {ino}") + 80, 16)


def meet(it: Volume) -> str:
    return code_of(lambda: read(it.point / "d/f"))


def not_written(it: Volume) -> str:
    it.faults.fail("write", EIO, *it.extent(it.point / "d/f"))
    said = code_of(lambda: fsync(it.point / "d/f", b"z" * 8192))
    it.faults.clear()
    return said


def nothing_written(it: Volume) -> str:
    it.faults.fail("write", EIO)
    said = code_of(lambda: fsync(it.point / "d/f", b"z" * 8192))
    it.faults.clear()
    return said


def not_read(it: Volume) -> str:
    it.faults.fail("read", EIO, *it.extent(it.point / "d/f"))
    said = meet(it)
    it.faults.clear()
    return said


def checksum(it: Volume) -> None:
    at = it.image.read_bytes().find(b"f" * 4096)
    with it.unmounted():
        it.scribble(at)


def shut_down(it: Volume) -> str:
    it.shut_down()
    return code_of(lambda: fsync(it.point / "d/new", b"z"))


# Key, heading, filesystem, mount options, damage beforehand, how it is met.
Fault = tuple[str, str, str, str, Callable[[Volume], None] | None, Callable[[Volume], str]]
FAULTS: tuple[Fault, ...] = (
    ("ext4_inode", "ext4: broken inode", "ext4", "", ext4_inode, meet),
    ("ext4_ro", "ext4: the same, errors=remount-ro", "ext4", "errors=remount-ro", ext4_inode, meet),
    ("ext4_data", "ext4: data not written back", "ext4", "", None, not_written),
    ("ext4_shutdown", "ext4: shut down", "ext4", "", None, shut_down),
    ("ext4_read", "ext4: data not read", "ext4", "", None, not_read),
    ("xfs_inode", "xfs: broken inode", "xfs", "", xfs_inode, meet),
    ("xfs_data", "xfs: data not written back", "xfs", "", None, not_written),
    ("xfs_shutdown", "xfs: shut down", "xfs", "", None, shut_down),
    ("btrfs_data", "btrfs: nothing written", "btrfs", "", None, nothing_written),
    ("btrfs_checksum", "btrfs: data checksum", "btrfs", "", checksum, meet),
)
COLUMNS = [(key, heading, "") for key, heading, *_ in FAULTS]


class Peer:
    """Asked before and after; what it tells is the difference."""

    def __init__(self, it: Volume, ino: int) -> None:
        self.it, self.ino = it, ino
        self.before = self.look()

    def look(self) -> str:
        raise NotImplementedError

    def told(self) -> str:
        return NOTHING if self.look() == self.before else SOMETHING


class Log(Peer):
    """dmesg, and what a journal has: the new lines that name the device."""

    def look(self) -> str:
        lines = sh("dmesg").splitlines()
        return "\n".join(line for line in lines if self.it.name in line)

    def told(self) -> str:
        before = set(self.before.splitlines())  # the oldest may be gone from the log by now
        new = "\n".join(line for line in self.look().splitlines() if line not in before)
        named = re.search(rf"(?:inode|ino|I_ino) #?(?:{self.ino}|{self.ino:#x})\b", new)
        return NOTHING if not new.strip() else INODE if named else SOMETHING


class Tune2fs(Peer):
    """tune2fs -l: the superblock's count and its last error."""

    def look(self) -> str:
        if self.it.kind != "ext4":
            return ""
        lines = sh("tune2fs", "-l", self.it.device).splitlines()
        return "\n".join(line for line in lines if "rror" in line and "behavior" not in line)

    def told(self) -> str:
        new = self.look()
        if new == self.before:
            return NOTHING
        return INODE if re.search(rf"inode.*\b{self.ino}\b|Last error ino.*{self.ino}", new) else (
            SOMETHING
        )  # fmt: skip


class DeviceStats(Peer):
    """btrfs device stats."""

    def look(self) -> str:
        point = str(self.it.point)
        return sh("btrfs", "device", "stats", point) if self.it.kind == "btrfs" else ""


class ReadOnly(Peer):
    """The read-only flag of statvfs, which checks of mounts look at."""

    def look(self) -> str:
        try:
            return str(os.statvfs(self.it.point).f_flag & os.ST_RDONLY)
        except OSError as error:
            return str(error)


class NodeExporter(Peer):
    """Its metrics of this filesystem: read-only, not answering, btrfs's errors."""

    port = 0
    FAMILIES = ("node_filesystem_readonly", "node_filesystem_device_error", "node_btrfs_device_err")

    def look(self) -> str:
        return "\n".join(line for line in self.mine() if line.startswith(self.FAMILIES))

    def mine(self) -> list[str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=20) as answer:
            lines = answer.read().decode().splitlines()
        names = (self.it.device, str(self.it.point), self.it.name)
        found = [line for line in lines if any(f'"{name}"' in line for name in names)]
        if not found:
            raise RuntimeError("node_exporter does not know of the filesystem")
        return found


class Fanwise(Peer):
    """fanwise health --json, beside a listener."""

    environ: ClassVar[dict[str, str]] = {}

    def look(self) -> str:
        argv = [str(FANWISE), "health", "--json", str(self.it.point)]
        environ = os.environ | self.environ
        return subprocess.run(argv, capture_output=True, text=True, env=environ).stdout

    def told(self) -> str:
        lines = [json.loads(line) for line in self.look().splitlines()]
        found = [line for line in lines if line["type"] == "incident"]
        if not found:
            return NOTHING
        of = [one for one in found if one["object"]["path"] == str(self.it.point / "d/f")]
        inode = [one for one in found if one["object"]["ino"] == self.ino]
        best = (of or inode or found)[0]
        text = FILE if of else INODE if inode else SOMETHING
        code = any(best["location"][name] for name in ("function", "symbol"))
        return f"{text}, {best['errno']}" + (", the code" if code else "")


PEERS: dict[str, type[Peer]] = {
    "the kernel's log": Log,
    "tune2fs -l": Tune2fs,
    "btrfs device stats": DeviceStats,
    "the read-only flag": ReadOnly,
    "node_exporter": NodeExporter,
    "fanwise health": Fanwise,
}


def exporter(bench: Bench) -> str:
    """The program, as Debian has it: installed, or unpacked for this."""
    name = "prometheus-node-exporter"
    program = shutil.which(name)
    if program is None:
        where = bench.scratch / "unpacked"
        where.mkdir()
        done = subprocess.run(["apt-get", "download", "-qq", name], cwd=where, capture_output=True)
        found = list(where.glob("*.deb"))
        if done.returncode or not found:
            raise Unavailable(f"{name} is not installed, and apt-get cannot download it")
        sh("dpkg", "-x", found[0], where)
        program = str(where / "usr/bin" / name)
    return program


@contextlib.contextmanager
def exporting(program: str) -> Iterator[None]:
    """It runs; it ends before its filesystems do, because it keeps btrfs ones busy."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        NodeExporter.port = server.getsockname()[1]
    collectors = ["--collector.disable-defaults", "--collector.filesystem", "--collector.btrfs"]
    address = f"--web.listen-address=127.0.0.1:{NodeExporter.port}"
    child = subprocess.Popen([program, address, *collectors], stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", NodeExporter.port)).close()
                break
            time.sleep(0.1)
        yield
    finally:
        child.terminate()
        child.wait(30)


@contextlib.contextmanager
def listener(bench: Bench, at: Path, trace: Path) -> Iterator[None]:
    where = bench.scratch / f"state{time.monotonic_ns()}"
    Fanwise.environ = {
        "FANWISE_HEALTH_STATE": str(where),
        "FANWISE_HEALTH_SECOND": str(where / "second.db"),
        "FANWISE_HEALTH_TRACEFS": str(trace),
        "FANWISE_HEALTH_ONLY": str(at),
        "FANWISE_HEALTH_PROBE": "1",
    }
    argv = [str(FANWISE), "health", "--follow", "--json"]
    child = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=os.environ | Fanwise.environ
    )
    assert child.stdout is not None
    try:
        if b"ready" not in child.stdout.readline():
            raise RuntimeError("the listener did not get ready")
        yield
    finally:
        child.terminate()
        child.stdout.read()
        child.wait(30)
        child.stdout.close()


def one(bench: Bench, fault: Fault, names: list[str], trace: Path, program: str) -> dict[str, str]:
    key, _, kind, options, damage, met = fault
    where = bench.scratch / key
    with volume(kind, where, faulty=True, prepare=tree, options=options) as it:
        ino = (it.point / "d/f").stat().st_ino
        if damage is not None:
            damage(it)
        else:  # cold, so that the device is asked
            with it.unmounted():
                pass
        with contextlib.ExitStack() as stack:
            stack.enter_context(listener(bench, it.point, trace))
            if program:
                stack.enter_context(exporting(program))
            asked = {name: PEERS[name](it, ino) for name in names}
            said = {"the program": met(it)}
            time.sleep(SETTLE)
            said |= {name: peer.told() for name, peer in asked.items()}
    return said


def run(bench: Bench) -> Json:
    found: dict[str, Json] = {}
    trace = bench.scratch / "tracefs"
    trace.mkdir()
    with contextlib.ExitStack() as stack:
        sh("mount", "-t", "tracefs", "fanwise-bench", trace)
        stack.callback(sh, "umount", "--lazy", trace)
        names, program = list(bench.wanted(PEERS)), ""
        if "node_exporter" in names:
            try:
                program = exporter(bench)
            except Unavailable as why:
                bench.missing["node_exporter"] = str(why)
                names.remove("node_exporter")
        for fault in FAULTS:
            said = one(bench, fault, names, trace, program)
            bench.say(f"  {fault[0]}: {said}")
            for name, text in said.items():
                found.setdefault(name, {})[fault[0]] = text
    ours: dict[str, Any] = found.get("fanwise health", {})
    told = sum(text != NOTHING for text in ours.values())
    others = {
        name: sum(text != NOTHING for text in texts.values())
        for name, texts in found.items()
        if name not in ("fanwise health", "the program")
    }
    return {
        "about": "One fault each, provoked on a loop device; everybody is asked two seconds later."
        " The first row is what the program was told by the call that met it.",
        "runs": {name: [texts] for name, texts in found.items()},
        "rows": [
            row(
                "provoked faults that fanwise health tells of",
                "all",
                told == len(FAULTS) if ours else None,
                f"{told} of {len(FAULTS)}",
                note="; ".join(f"{name} {count}" for name, count in others.items()),
            )
        ],
    }


if __name__ == "__main__":
    from bench.__main__ import main

    main(["detect", *sys.argv[1:]])
