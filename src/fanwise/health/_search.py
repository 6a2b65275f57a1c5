"""Paths of inodes by a bounded search, in a helper of low priority: the last resort.

Names of directories are read, and no inode is looked at: a broken one may not be readable, and a
disk that fails should not be asked for more than is needed. On btrfs an inode number alone says
little, so nothing is searched there.

REFS      one helper for each filesystem at most; what comes meanwhile waits for the next.
LOCKING   none: one owner.
LIFETIME  a helper ends by itself within its limits; `close` kills those that run.
"""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import msgspec

from fanwise.health._incident import Incident

SECONDS, ENTRIES = 20, 500_000  # limits of one search

_CHILD = str(Path(__file__).with_name("_search_child.py"))


class Search:
    """Searches the mount points of incidents; the `Locator` that an engine has by default."""

    def __init__(self) -> None:
        self._wanted: dict[str, dict[int, str]] = {}  # mount point -> inode -> incident
        self._tried: set[str] = set()
        self._running: dict[str, tuple[subprocess.Popen[bytes], dict[int, str]]] = {}

    def locate(self, incident: Incident) -> None:
        """Begin to look for its inode, once."""
        ino, fs = incident.object.ino, incident.fs
        if ino is None or not fs.mounts or fs.fstype not in ("ext2", "ext3", "ext4", "xfs"):
            return
        if incident.id in self._tried or incident.state in ("shutdown", "hung"):
            return
        self._tried.add(incident.id)
        self._wanted.setdefault(fs.mounts[0], {})[ino] = incident.id
        self._next()

    def _next(self) -> None:
        for point in [point for point in self._wanted if point not in self._running]:
            wanted = self._wanted.pop(point)
            argv = [sys.executable, "-BIS", _CHILD, str(SECONDS), str(ENTRIES), point]
            try:
                child = subprocess.Popen(
                    [*argv, *map(str, wanted)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                )
            except OSError:  # no process to be had: the incident goes without its path
                continue
            assert child.stdout is not None
            os.set_blocking(child.stdout.fileno(), False)
            self._running[point] = child, wanted

    def found(self) -> list[tuple[str, str, str]]:
        """What was found since: incident, path, "search"."""
        answers = []
        for point, (child, wanted) in list(self._running.items()):
            assert child.stdout is not None
            data = child.stdout.read()
            if data is None:  # nothing yet
                continue
            child.stdout.close()
            child.wait()
            del self._running[point]
            with suppress(msgspec.MsgspecError):  # it was killed
                for ino, path in msgspec.json.decode(data, type=dict[int, str]).items():
                    if ino in wanted:
                        answers.append((wanted[ino], path, "search"))
        self._next()
        return answers

    def filenos(self) -> list[int]:
        """Readable when a helper is done."""
        return [child.stdout.fileno() for child, _ in self._running.values() if child.stdout]

    def close(self) -> None:
        """End the helpers, without waiting for one that the kernel holds."""
        for child, _ in self._running.values():
            with suppress(ProcessLookupError):
                child.kill()
            if child.stdout is not None:
                child.stdout.close()
            with suppress(subprocess.TimeoutExpired):
                child.wait(0.2)
            child.returncode = child.returncode or 0  # or init's to reap
        self._running = {}
