"""All sources of health on some volumes, and the correlator behind them: what the engine does."""

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fanwise.health import _intake
from fanwise.health._correlate import Correlator
from fanwise.health._incident import Filesystem, Incident
from fanwise.health._observe import Observation
from fanwise.kernel.mounts import mounts
from fanwise.sources.counters import Place, place_of, read
from fanwise.sources.errortrace import ErrorTrace, TracedError
from fanwise.sources.fserror import FsErrorReport, FsErrors
from fanwise.sources.kmsg import Kmsg, KmsgRecord
from tests.kernel.conftest import run
from tests.kernel.faults import Volume


class Station:
    """Listens to the volumes it is given, and to nothing of anybody else on the machine."""

    def __init__(self, tracefs: str, *volumes: Volume) -> None:
        self.volumes = volumes
        self.errors, self.kmsg = FsErrors(), Kmsg()
        self.trace = ErrorTrace(tracefs=tracefs)
        self.correlator = Correlator()
        self.told: list[Incident] = []
        self.saw: dict[str, list[Observation]] = defaultdict(list)
        self.places: dict[tuple[int, int], Place] = {}
        self.blocks: dict[tuple[int, int], tuple[int, int]] = {}
        self._before: dict[tuple[int, int], int] = {}

    def open(self) -> None:
        self.trace.open()
        assert self.trace.status().state == "up", self.trace.status()
        self.errors.open()
        self.kmsg.open()
        self.mounted()

    def close(self) -> None:
        for source in (self.trace, self.errors, self.kmsg):
            source.close()

    def mounted(self) -> None:
        """Take note of what is mounted now."""
        points = {os.fsencode(v.point): v for v in self.volumes}
        found = [m for m in mounts() if m.mount_point in points]
        self.errors.follow(found)
        for mount in found:
            block = points[mount.mount_point].dev
            self.blocks[block] = mount.dev
            self.places[mount.dev] = place = place_of(mount)
            self._errors(mount.dev)
            self._take(
                self.correlator.mounted(
                    mount.dev,
                    Filesystem(
                        device=f"{mount.dev[0]}:{mount.dev[1]}",
                        fstype=mount.fstype,
                        uuid=place.uuid,
                        devices=tuple(layer.dev for layer in place.layers),
                        mounts=(os.fsdecode(mount.mount_point),),
                    ),
                )
            )
            self._take(self.correlator.state(mount.dev, _intake.state_of(mount), time.time()))
        self.count()

    def count(self) -> None:
        """Read the counters."""
        for dev, place in self.places.items():
            reading = read(place)
            if reading.ext4 is not None:
                self._take(self.correlator.ext4(dev, reading.ext4, time.time()))
            self._take(self.correlator.btrfs(dev, reading.btrfs, time.time()))

    def listen(self, quiet: float = 0.25) -> "Station":
        """Read everything, until nothing came for a while; then the counters.

        A work queue brings ext4's up to date: until it has, they are waited for.
        """
        last = began = time.monotonic()
        while time.monotonic() - last < quiet:
            if self._read() or (self._lags() and last - began < 60):
                last = time.monotonic()
            time.sleep(0.01)  # four kinds of descriptors, and kmsg of everybody
        self.mounted()
        return self

    def _lags(self) -> bool:
        told: dict[tuple[int, int], int] = defaultdict(int)
        for via in ("fserror.error", "trace.error"):
            for dev in self.places:
                count = sum(seen.count for seen in self.saw.get(via, ()) if seen.dev == dev)
                told[dev] = max(told[dev], count)
        return any(self._errors(dev) < self._before[dev] + count for dev, count in told.items())

    # What was counted when it was seen first is of before, and up to date since the unmount.
    def _errors(self, dev: tuple[int, int]) -> int:
        reading = read(self.places[dev])
        found = 0 if reading.ext4 is None else reading.ext4.errors or 0
        self._before.setdefault(dev, found)
        return found

    def _read(self) -> int:
        found: list[Observation | None] = []
        for report in self.errors.read():
            if isinstance(report, FsErrorReport):
                found.append(_intake.from_fserror(report))
        for record in self.trace.errors():
            if isinstance(record, TracedError):
                found.append(_intake.from_trace(record, self._fstype))
        for message in self.kmsg.read():
            if isinstance(message, KmsgRecord):
                found.append(_intake.from_kmsg(message, _device, self._filesystem))
        ours = [
            seen for seen in found if seen and (seen.dev in self.places or seen.dev in self.blocks)
        ]
        for seen in ours:
            self.saw[seen.via].append(seen)
            self._take(self.correlator.feed(seen))
        return len(ours)

    def _filesystem(self, dev: tuple[int, int]) -> tuple[int, int]:
        return self.blocks.get(dev, dev)

    def _fstype(self, dev: tuple[int, int]) -> str | None:
        place = self.places.get(dev)
        return None if place is None else place.fstype

    def _take(self, incidents: list[Incident]) -> None:
        self.told += incidents

    def open_incidents(self) -> list[Incident]:
        return self.correlator.open()

    def only(self) -> Incident:
        (incident,) = self.open_incidents()
        return incident

    def worst(self, **fields: object) -> Incident:
        """The one open incident with these attributes."""
        found = [
            incident
            for incident in self.open_incidents()
            if all(getattr(incident, name) == value for name, value in fields.items())
        ]
        assert len(found) == 1, self.open_incidents()
        return found[0]

    def counts(self) -> dict[str, int]:
        """How many records came, by channel and what they saw."""
        return {via: len(seen) for via, seen in self.saw.items()}


def _device(name: str) -> tuple[int, int] | None:
    path = Path("/sys/class/block") / name / "dev"
    try:
        major, minor = path.read_text().split(":")
    except OSError:
        return None
    return int(major), int(minor)


@contextmanager
def station(where: Path, *volumes: Volume) -> Iterator[Station]:
    """A Station on these volumes, with a tracefs mount of its own."""
    point = where / "tracefs"
    point.mkdir()
    with ExitStack() as stack:
        run("mount", "-t", "tracefs", "fanwise-test", str(point))
        stack.callback(run, "umount", "--lazy", str(point))
        it = Station(str(point), *volumes)
        stack.callback(it.close)
        it.open()
        yield it
