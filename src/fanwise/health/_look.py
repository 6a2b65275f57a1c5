"""One look, without listening: the database, the counters as they are, and the mounts.

What the counters have and the database has not is told here as well, and not written: the next
who listens does that. Nothing is marked, and no trace is made.
"""

import os
import select
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import msgspec

from fanwise import config
from fanwise._errors import FanwiseError, StoreError, StoreMissing
from fanwise.health import _intake, _places
from fanwise.health._case import Ledger
from fanwise.health._correlate import Correlator
from fanwise.health._engine import LEDGER
from fanwise.health._filesystems import Filesystems, Known
from fanwise.health._follow import Writer, databases, said, writer_of
from fanwise.health._incident import SEVERITY, Filesystem, Incident, State
from fanwise.health._incidents_db import SCHEMA, Incidents, Stored
from fanwise.health._observe import Dev
from fanwise.health._probe import Finding
from fanwise.health._selection import Applies, Selection
from fanwise.kernel.mounts import mounts
from fanwise.kernel.stacking import lives_on
from fanwise.sources.counters import Reading, read
from fanwise.sources.state import SourceState
from fanwise.store.database import Store

# What shows that a filesystem breaks: of each group one source has to be up. ext4 counts its own
# errors, not data that is not written back, which stands in the log as well. btrfs counts both.
# xfs counts nothing, and the log's text is no more than a last resort there.
_EXT4 = (("counters", "fserror"), ("trace", "kmsg"), ("mounts",))
NEEDED: Mapping[str, tuple[tuple[str, ...], ...]] = MappingProxyType(
    {
        "ext2": _EXT4,
        "ext3": _EXT4,
        "ext4": _EXT4,
        "btrfs": (("counters",), ("mounts",)),
    }
)
_ELSE = (("trace",), ("mounts",))
COVERED = (*NEEDED, "xfs")


class Verdict(msgspec.Struct, frozen=True):
    """Whether a filesystem is healthy: "healthy", "incidents" (some are open) or "cannot tell".

    ``why`` says what is not known, None when nothing is.
    """

    verdict: str
    why: str | None


class FilesystemState(msgspec.Struct, frozen=True, kw_only=True, tag="state", tag_field="type"):
    """A mounted filesystem as it is now.

    ``covered`` says whether it is of a type whose errors are understood: ext4, xfs, btrfs; of
    others, such as vfat, only failed requests of the device and of write-back are seen. ``state``
    is the worst that is known of it. ``counters`` are those of the filesystem and of its devices,
    by name. ``open`` is how many incidents are open. ``listened`` says until when somebody listened
    to it, in seconds since the epoch, None for never; ``writer`` is who listens now.
    """

    v: int = 1
    fs: Filesystem
    covered: bool
    state: State
    verdict: str
    why: str | None
    open: int
    counters: dict[str, int]
    listened: float | None
    writer: Writer | None
    sources: dict[str, SourceState]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An incident and what an operator did: ``acked`` is in seconds since the epoch, or None.

    ``applies`` says how it concerns the paths that were asked about, see `Follow.applies`.
    """

    incident: Incident
    acked: float | None
    applies: Applies


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a look gave. ``notes`` are what an operator should know of the look itself."""

    filesystems: tuple[FilesystemState, ...]
    entries: tuple[Entry, ...]
    writer: Writer | None
    listened: float | None
    sources: dict[str, SourceState]
    notes: tuple[str, ...]


def look(
    *paths: str | os.PathLike[str],
    settings: config.Health | None = None,
    since: float | None = None,
    deadline: float = 5.0,
) -> Report:
    """Look at the filesystems of ``paths``, or at all; ``since`` adds incidents that are resolved.

    ``since`` is in seconds since the epoch, ``deadline`` how long a filesystem may take to answer.
    Raises NoSuchRoot, ConfigError, and StoreError for a database that cannot be read.
    """
    settings = settings if settings is not None else config.load().config.health
    selection = Selection(paths, deadline)
    try:
        return _Look(selection, settings, since).run(deadline)
    finally:
        selection.close()


class _Look:
    def __init__(self, selection: Selection, settings: config.Health, since: float | None) -> None:
        self._selection, self._since = selection, since
        self._places = databases(settings)
        self._filesystems = Filesystems(selection.points)
        self._stored: dict[str, Stored] = {}
        self._notes: list[str] = []
        self._readings: dict[Dev, Reading] = {}
        self._findings: dict[Dev, Finding] = {}
        self._live = 0
        self._naming = ""
        self._correlator = Correlator(new_id=self._new_id)

    # The same at each look, so that `show` finds what the table named.
    def _new_id(self) -> str:
        self._live += 1
        return f"live-{self._naming}-{self._live}"

    def run(self, deadline: float) -> Report:
        writer = writer_of(self._places[0])
        self._filesystems.checks = writer is None  # it asked already
        listened, points, sources = self._database(writer)
        self._filesystems.update(mounts())
        try:
            self._probe(deadline)
            for known in self._filesystems.known.values():
                self._count(known)
            entries = self._entries(deadline)
            states = tuple(
                self._state(known, entries, writer, listened, points, sources)
                for known in self._filesystems.known.values()
            )
        finally:
            self._filesystems.close()
        return Report(
            filesystems=states,
            entries=tuple(entries),
            writer=writer,
            listened=listened,
            sources=sources,
            notes=tuple(self._notes),
        )

    def _database(
        self, writer: Writer | None
    ) -> tuple[float | None, tuple[str, ...] | None, dict[str, SourceState]]:
        try:
            incidents = _places.read(*self._places)
        except StoreMissing:
            self._notes.append("nobody ever listened: run fanwise health --follow")
            return None, None, {}
        try:
            for stored in incidents.listing(since=self._since):
                self._stored[stored.id] = stored
            for stored in incidents.listing(open_only=True):
                self._stored[stored.id] = stored
            self._correlator.restore(
                msgspec.json.decode(body, type=Ledger)
                for name, body in incidents.notes().items()
                if name.startswith(LEDGER) and body
            )
            resolutions = incidents.resolutions()
            for incident in self._correlator.open():
                if incident.id in resolutions:  # by an operator; the writer has not seen it yet
                    self._correlator.resolve(incident.id, resolutions[incident.id])
            intervals = incidents.listened()
            listened = intervals[-1].until if intervals else None
            note = said(incidents)
        finally:
            incidents.store.close()
        if writer is None:
            if listened is not None:
                when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(listened))
                self._notes.append(f"nobody has listened since {when}")
            return listened, None, {}
        if note is None:
            return listened, None, {}
        for name, state in note.sources.items():
            if state.state != "up":
                self._notes.append(f"{name} is {state.state}: {state.reason}")
        return time.time(), note.points, note.sources

    # All at once, within one deadline.
    def _probe(self, deadline: float) -> None:
        until = time.monotonic() + deadline
        hung = {target.mount.dev for target in self._selection.targets if target.hung}
        waiting = set(self._filesystems.known) - hung
        try:
            while waiting:
                self._filesystems.ask(time.monotonic(), deadline * 10)
                for known, finding in self._filesystems.answers():
                    self._findings[known.dev] = finding
                    known.found(finding)
                    waiting.discard(known.dev)
                left = until - time.monotonic()
                if not waiting or left <= 0:
                    break
                pending = self._filesystems.pending()
                select.select(pending, (), (), min(left, 1.0))
        except FanwiseError as error:
            self._notes.append(str(error))
        for dev in waiting | (hung & set(self._filesystems.known)):
            self._findings[dev] = Finding("hung")

    def _count(self, known: Known) -> None:
        self._naming, self._live = known.fs.device, 0
        now = time.time()
        correlator = self._correlator
        ledgers = {ledger.dev: ledger for ledger in correlator.ledgers()}
        here = ledgers.get(known.dev)
        if known.fs.uuid is not None and (here is None or here.fs.uuid != known.fs.uuid):
            for dev, ledger in ledgers.items():
                mounted = dev in self._filesystems.known
                if ledger.fs.uuid == known.fs.uuid and not mounted:
                    correlator.mounted(known.dev, known.fs)
                    correlator.renumbered(dev, known.dev)
                    break
        correlator.mounted(known.dev, known.fs)
        check = self._findings[known.dev].checked
        if check is not None:
            correlator.checked(known.dev, check)
        reading = self._readings[known.dev] = read(known.place)
        if reading.ext4 is not None:
            correlator.ext4(known.dev, reading.ext4, now)
        correlator.btrfs(known.dev, reading.btrfs, now)
        for mount in known.mounts:
            correlator.state(known.dev, _intake.state_of(mount), now)
        correlator.state(known.dev, self._findings[known.dev].state, now, "probe")

    def _entries(self, deadline: float) -> list[Entry]:
        both = []
        told = set()
        for incident in self._correlator.open():
            told.add(incident.id)
            stored = self._stored.get(incident.id)
            both.append((incident, None if stored is None else stored.acked))
        for stored in self._stored.values():
            if self._since is None or stored.resolved is None or stored.id in told:
                continue
            status = "merged" if stored.record.get("merged_into") else "resolved"
            record = {**stored.record, "status": status, "resolved": stored.resolution, "count": 0}
            both.append((msgspec.convert(record, Incident), stored.acked))
        for incident, _ in both:
            self._selection.applies(incident)  # asks
        self._selection.settle(deadline)
        found = []
        for incident, acked in both:
            applies = self._selection.applies(incident)
            if applies not in (None, "elsewhere"):
                found.append(Entry(incident=incident, acked=acked, applies=applies))
        return sorted(found, key=lambda entry: (entry.incident.last_seen, entry.incident.id))

    def _state(
        self,
        known: Known,
        entries: Sequence[Entry],
        writer: Writer | None,
        listened: float | None,
        points: tuple[str, ...] | None,
        sources: dict[str, SourceState],
    ) -> FilesystemState:
        mine = [
            entry.incident
            for entry in entries
            if entry.incident.fs.device == known.fs.device and entry.incident.status == "open"
        ]
        state: State = "ok"
        for incident in mine:
            if SEVERITY[incident.state] > SEVERITY[state]:
                state = incident.state
        if points is not None and not set(known.fs.mounts) & set(points):
            writer, sources = None, {}  # it listens, but not to this one
        reading = self._readings[known.dev]
        verdict = self._verdict(known, reading, bool(mine), writer, sources)
        return FilesystemState(
            fs=known.fs,
            covered=known.fstype in COVERED,
            state=state,
            verdict=verdict.verdict,
            why=verdict.why,
            open=len(mine),
            counters=counters_of(reading),
            listened=listened,
            writer=writer,
            sources=sources,
        )

    def _verdict(
        self,
        known: Known,
        reading: Reading,
        broken: bool,
        writer: Writer | None,
        sources: dict[str, SourceState],
    ) -> Verdict:
        lacks = [str(bad.path) + " " + bad.why for bad in reading.garbage]
        finding = self._findings[known.dev]
        if finding.state == "unknown":
            lacks.append(f"it does not answer: {os.strerror(finding.errno)}")
        counts = reading.ext4 is not None and reading.ext4.errors is not None
        counts = counts or bool(reading.btrfs)
        if writer is None and not counts:
            lacks.append(f"{known.fstype} counts nothing, and nobody listens")
        elif writer is not None:
            lacks += missing(known.fstype, sources)
        why = "; ".join(lacks) or None
        if broken:
            return Verdict("incidents", why)
        return Verdict("cannot tell" if lacks else "healthy", why)


def missing(fstype: str, sources: Mapping[str, SourceState]) -> list[str]:
    """Say what is needed to tell whether a filesystem of this type is healthy, and is down."""
    found = []
    for group in NEEDED.get(fstype, _ELSE):
        states = [sources.get(name) for name in group]
        if any(state is not None and state.state != "down" for state in states):
            continue
        reasons = [state.reason for state in states if state is not None and state.reason]
        verb = "is" if len(group) == 1 else "are"
        why = f": {'; '.join(dict.fromkeys(reasons))}" if reasons else ""
        found.append(f"{' and '.join(group)} {verb} down{why}")
    return found


def counters_of(reading: Reading) -> dict[str, int]:
    """Return the counters of a reading by name; those that are not told are not there."""
    found: dict[str, int | None] = {}
    if reading.ext4 is not None:
        found["errors"] = reading.ext4.errors
        found["warnings"] = reading.ext4.warnings
    for device in reading.btrfs:
        for kind in ("write", "read", "flush", "corruption", "generation"):
            found[f"devid {device.id} {kind}"] = getattr(device, kind)
    for name, block in reading.block.items():
        found[f"{name} io"] = block.io_errors
    return {name: count for name, count in found.items() if count is not None}


def acknowledge(id: str, *, settings: config.Health | None = None) -> bool:
    """Say that an operator has seen an incident; False when there is none of this id.

    It is one row, written beside whoever listens. Raises StoreError, and FanwiseError when the
    database stands on a filesystem that fails.
    """
    return _amend(id, settings, lambda incidents: incidents.ack(id, time.time()))


def resolve(id: str, *, settings: config.Health | None = None) -> bool:
    """Say that an incident is over; False when none of this id is open.

    For what no counter, mount or check tells: the next record of it begins a new incident. Whoever
    listens takes note within some seconds. Raises what `acknowledge` raises.
    """
    return _amend(
        id, settings, lambda incidents: incidents.resolve(id, time.time(), "by an operator")
    )


def _amend(id: str, settings: config.Health | None, change: Callable[[Incidents], bool]) -> bool:
    settings = settings if settings is not None else config.load().config.health
    for path in databases(settings):
        if not os.path.lexists(path):
            continue
        with Store(path, SCHEMA, "read") as store:
            incidents = Incidents(store)
            if incidents.get(id) is None:
                continue
            broken = _places.failing(incidents)
        if broken & lives_on(path):
            raise StoreError(
                path, "it stands on a filesystem that fails, and is not written to", "repair that"
            )
        with Store(path, SCHEMA, "amend") as store:
            return change(Incidents(store))
    return False
