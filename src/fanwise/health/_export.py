"""Metrics of a running engine: what is counted on the way, and how it goes out.

REFS      owns the server; the file belongs to nobody.
LOCKING   the engine's owner counts; `job` works, in the thread of the store, on a snapshot.
LIFETIME  that of its server.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from fanwise._errors import FanwiseError
from fanwise.health._incident import Filesystem
from fanwise.health._incidents_db import Total
from fanwise.health._observe import Observation
from fanwise.kernel.stacking import lives_on
from fanwise.metrics import textfile
from fanwise.metrics.health import DELAY, Delays, samples
from fanwise.metrics.server import Server
from fanwise.metrics.text import render
from fanwise.sources.counters import Reading
from fanwise.sources.state import SourceState

# Seconds after a change, and between two when nothing changes. Not at once: what merged reports
# counted too much is put right when the counters were read, and a series must not fall.
_SOON, _LATE = 1.0, 15.0


class Snapshot(msgspec.Struct, frozen=True):
    """What an engine knows at one moment; nothing of it changes any more."""

    open_incidents: list[dict[str, Any]]
    filesystems: list[dict[str, Any]]
    sources: Mapping[str, SourceState]
    actions: Mapping[str, Mapping[str, int]]
    failing: frozenset[str]


class Export:
    """Publishes by HTTP on ``address`` and to the file ``path``; either may be empty."""

    def __init__(self, address: str, path: str) -> None:
        self._server = Server(address) if address else None
        self._path = Path(path) if path else None
        self._standing: frozenset[str] = frozenset()
        self._file_problem: str | None = None
        self.delays = Delays()
        self._warnings: dict[tuple[str, str, str], int] = {}
        self._writeback: dict[tuple[str, str], int] = {}
        self._devices: dict[tuple[str, str], int] = {}
        self._last = -_LATE
        self._changed: float | None = None

    @property
    def wanted(self) -> bool:
        """Whether there is anything to publish to."""
        return self._server is not None or self._path is not None

    @property
    def problem(self) -> str | None:
        """Why the file could not be written."""
        return self._file_problem

    def open(self) -> None:
        """Serve. Raises FanwiseError for an address or a directory that cannot be had."""
        if self._path is not None:
            if self._path.suffix != ".prom" or not self._path.parent.is_dir():
                raise FanwiseError(
                    f"{self._path}: metrics are written to NAME.prom in a directory that is there",
                    "name another file",
                )
            # Now, because later a look at the path may wait for the disk that fails.
            self._standing = lives_on(self._path.parent)
        if self._server is not None:
            self._server.start()

    def counted(self, fs: Filesystem, reading: Reading) -> None:
        """Take a reading of counters."""
        if reading.ext4 is not None and reading.ext4.warnings is not None:
            self._warnings[fs.uuid or "", fs.device, fs.fstype or ""] = reading.ext4.warnings
        for device in reading.btrfs:
            for kind in ("write", "read", "flush", "corruption", "generation"):
                count = getattr(device, kind)
                if count is not None:
                    self._devices[f"{fs.name or fs.device} devid {device.id}", kind] = count
        for name, block in reading.block.items():
            if block.io_errors is not None:
                self._devices[name, "io"] = block.io_errors

    def wrote(self, seen: Observation) -> None:
        """Count a write-back error."""
        kind = "metadata" if (seen.operation or "").startswith("metadata") else "data"
        key = f"{seen.dev[0]}:{seen.dev[1]}", kind
        self._writeback[key] = self._writeback.get(key, 0) + seen.count

    def due(self, now: float, changed: bool) -> bool:
        """Say whether it is time to publish; then it counts as done."""
        if not self.wanted:
            return False
        if changed and self._changed is None:
            self._changed = now
        if now < self.next():
            return False
        self._last, self._changed = now, None
        return True

    def next(self) -> float:
        """When it is time, as far as is known."""
        late = self._last + _LATE
        return late if self._changed is None else min(late, self._changed + _SOON)

    def job(self, snapshot: Snapshot) -> Callable[[list[Total]], None]:
        """Return what publishes a snapshot, given the totals; it raises FanwiseError."""
        delays = self.delays.taken()
        warnings, writeback = dict(self._warnings), dict(self._writeback)
        devices = dict(self._devices)

        def publish(totals: list[Total]) -> None:
            filled = samples(
                totals=totals,
                open_incidents=snapshot.open_incidents,
                filesystems=snapshot.filesystems,
                warnings=warnings,
                writeback=writeback,
                device_errors=devices,
                sources={n: s.state != "down" for n, s in snapshot.sources.items()},
                lost={n: s.lost for n, s in snapshot.sources.items()},
                listening_until=time.time(),
                actions=snapshot.actions,
            )
            text = render({**filled, DELAY: [delays]})
            if self._server is not None:
                self._server.publish(lambda: text)
            if self._path is not None:
                self._write(self._path, text, snapshot.failing)

        return publish

    def _write(self, path: Path, text: bytes, failing: frozenset[str]) -> None:
        # Output never goes to the filesystem that is failing.
        if failing & self._standing:
            self._file_problem = f"{path} is on a filesystem that fails: it is not written"
            return
        try:
            textfile.write(path, text)
        except FanwiseError as error:
            self._file_problem = str(error)
        else:
            self._file_problem = None

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.close()
