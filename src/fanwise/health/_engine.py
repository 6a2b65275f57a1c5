"""The one loop that makes incidents: sources in, incidents out, to whoever reads and to the store.

An error becomes an incident in the same turn in which it was read, and goes out; storing it, and
actions and metrics, happen in other threads. What changes later (other channels, counters, a path)
is told again under the same id, the first times at once, then at most a few times a second.

Counters are read 0.1 s after anything happened to a filesystem (ext4 moves them after it
notified), after a loss, when it is mounted, at the start, and by a timer, because some errors are
counted and told by nothing.

REFS      owns the channels, the filesystems, the keeping, the actions and the exports.
LOCKING   none: one owner calls.
LIFETIME  see ENGINE. `finish` reads what is still there; `close` closes the sources first, so that
          neither a disk nor an action that hangs keeps a trace instance alive.
"""

import os
import select
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import msgspec

from fanwise import config
from fanwise._errors import FanwiseError
from fanwise.health import _intake
from fanwise.health._actions import Actions
from fanwise.health._case import Ledger
from fanwise.health._channels import Channels, Loss
from fanwise.health._correlate import REST, WINDOW, Correlator
from fanwise.health._export import Export, Snapshot
from fanwise.health._filesystems import Filesystems, Known, describe, device_of, readable
from fanwise.health._incident import SEVERITY, Incident
from fanwise.health._keeping import Keeping
from fanwise.health._locate import Found
from fanwise.health._observe import Dev, Observation
from fanwise.health._probe import DEADLINE, Finding
from fanwise.health._rules import Rules
from fanwise.lifetime import Lifetime
from fanwise.sinks.bucket import Bucket
from fanwise.sinks.sink import Outcome
from fanwise.sources.counters import Place, read
from fanwise.sources.state import SourceState

LEDGER = "ledger "  # notes: the state of one filesystem
SOURCES = "sources"  # the note that says what the writer listens to

_AFTER = REST + 0.02  # seconds from an event to a reading of the counters
_CHECK = 5.0  # seconds between two checks of the sources themselves
_SAY = 0.5  # seconds between two words about the sources
_RATE, _BURST = 10.0, 6  # how often one incident is told: a second in the long run, at once


class Sources(msgspec.Struct, frozen=True, tag="sources", tag_field="type"):
    """What each source says of itself, told when it changed; ``database`` and others are there too.

    ``sources`` is by name.
    """

    sources: dict[str, SourceState]


class Listening(msgspec.Struct, frozen=True):
    """What a writer leaves for who reads its database.

    ``points`` are the mount points that it is restricted to, None for all.
    """

    sources: dict[str, SourceState]
    points: tuple[str, ...] | None
    pid: int


class Locator(Protocol):
    """Finds paths of inodes, in helpers of its own: never in this loop, and never for ever."""

    def locate(self, incident: Incident) -> None:
        """Begin to look for the path of its inode, unless it is looked for already."""

    def found(self) -> list[Found]:
        """Return what was found since; never waits."""

    def filenos(self) -> list[int]:
        """Descriptors that are readable when something was found."""

    @property
    def hung(self) -> list[str]:
        """The devices (MAJOR:MINOR) of filesystems whose helper does not return."""

    def close(self) -> None:
        """Give up."""


class Engine:
    """Listens, correlates and tells; a context manager. `read` gives what is new.

    ``points`` restricts it to the filesystems that are mounted there, ``deadline`` is how long one
    may take to answer. Nothing starts before `open`.
    """

    state: str

    def __init__(
        self,
        keeping: Keeping,
        settings: config.Health,
        *,
        points: Iterable[bytes] | None = None,
        rules: Rules | None = None,
        locator: Locator | None = None,
        tracefs: str | None = None,
        deadline: float = DEADLINE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keeping, self._settings, self._clock = keeping, settings, clock
        self.filesystems = Filesystems(points, deadline, clock)
        self.channels = Channels(self.filesystems, tracefs=tracefs)
        self.correlator = Correlator(clock)
        self._locator = locator
        self._actions = None if rules is None else Actions(rules, self._outcome)
        self._export = Export(settings.metrics, settings.textfile)
        self._failed: dict[str, str] = {}  # actions
        self._fresh: dict[str, Incident] = {}
        self._told: dict[str, Incident] = {}  # as it was last
        self._unkept: list[Incident] = []  # told, and not given to the store and the actions yet
        self._same: list[Incident] = []
        self._buckets: dict[str, Bucket] = {}
        self._due: dict[str, float] = {}  # incidents that were told too often, and when they may
        self._notes: dict[str, bytes] = {}
        self._introduced: set[Dev] = set()
        self._damaged: list[str] = []
        self._said: dict[str, SourceState] = {}
        self._next_count = self._next_check = self._next_say = 0.0
        self._export_dirty = self._dirty = True
        ENGINE.start(self)

    # -- life

    def open(self) -> None:
        """Take the writer's lock, listen, and take up what is open since before.

        Returns when every filesystem is marked and known, or is late to say who it is. Raises
        BusyError when another process writes the database, FanwiseError for what cannot be
        started.
        """
        notes = self._keeping.open()
        try:
            self._restore(notes)
            self._export.open()
            if self._actions is not None:
                self._actions.start()
            self.channels.open()
            ENGINE.advance(self, "open")
            self._mounts()
            while not all(known.identified for known in self.filesystems.known.values()):
                self._wait(self._pause(10.0))
                self._turn()
            self._count_all()
            # A ledger may be newer than its incidents' rows, by those that were told too often.
            self._store([], self.open_incidents())
            self._said = self.states()
            self._note_sources()
            self._keeping.settled()  # who reads the database knows it as soon as who called this
        except BaseException:
            self.close()
            raise

    def _restore(self, notes: dict[str, bytes]) -> None:
        ledgers = []
        for name, body in notes.items():
            if not name.startswith(LEDGER) or not body:
                continue
            try:
                ledgers.append(msgspec.json.decode(body, type=Ledger))
            except msgspec.MsgspecError as error:
                self._damaged.append(f"{name}: {error}")  # the counters mend it
                continue
            self._notes[name] = body
        self.correlator.restore(ledgers)
        self._closed(self._keeping.closed())

    # By an operator, who wrote it into the database.
    def _closed(self, resolutions: dict[str, str]) -> None:
        for ledger in self.correlator.ledgers():
            for case in list(ledger.cases):
                if case.id in resolutions:
                    self._keep(self.correlator.resolve(case.id, resolutions[case.id]))

    def finish(self) -> list[Incident | Sources]:
        """Read what is there still; give the rest of what is to be told."""
        self._turn()
        self._count_all()
        for id_ in list(self._due):
            del self._due[id_]
        told = self._tell(at_once=True)
        self._keep_told()
        self._say_sources(self._clock(), told, force=True)
        return told

    def close(self) -> None:
        """Stop listening; store, carry out and publish what waits, each within a deadline."""
        if self.state == "CLOSED":
            return
        if self.state == "OPEN":
            self._keep_told()
        ENGINE.advance(self, "close")
        try:
            self.channels.close()
        finally:
            self.filesystems.close()
            if self._locator is not None:
                self._locator.close()
            if self._actions is not None:
                self._actions.close()
            self._keeping.close()
            self._export.close()

    # -- what is told

    def filenos(self) -> list[int]:
        """Descriptors of which one is readable when there is something to `read`."""
        found = [self.channels.fileno(), *self.filesystems.pending()]
        return found if self._locator is None else [*found, *self._locator.filenos()]

    def pause(self) -> float:
        """Seconds after which `read` has something to do in any case."""
        return self._pause(_CHECK)

    def read(self, timeout: float = 0.0) -> list[Incident | Sources]:
        """Wait until something comes, at most ``timeout`` seconds; give what is to be told.

        An incident's ``count`` is what came since it was told last. What is given is stored and
        carried out as soon as this is called again, so that nothing goes before telling.
        """
        self._keep_told()
        until = self._clock() + timeout
        while True:
            self._turn()
            told = self._tell()
            if told:
                return told
            self._keep_told()
            self._say_sources(self._clock(), told)
            left = until - self._clock()
            if told or left <= 0:
                return told
            self._wait(self._pause(left))

    def open_incidents(self) -> list[Incident]:
        """All that are open now."""
        return [incident for incident in self.correlator.open() if self._ours(incident)]

    def states(self) -> dict[str, SourceState]:
        """What each source says of itself, the database, actions and metrics."""
        found = self.channels.states()
        keeper = self._keeping.keeper
        bad = [*self._damaged, *map(str, keeper.problems.values())]
        if self._keeping.problem is not None:
            bad.append(self._keeping.problem)
        if self._keeping.place != "first":
            bad.insert(0, f"incidents are kept in the {self._keeping.place} place")
        found["database"] = SourceState(
            "database", "degraded" if bad else "up", "; ".join(bad) or None, keeper.dropped
        )
        if self._actions is not None:
            bad = [f"{name}: {why}" for name, why in list(self._failed.items())]
            found["actions"] = SourceState(
                "actions", "degraded" if bad else "up", "; ".join(bad) or None
            )
        if self._export.wanted:
            found["metrics"] = SourceState(
                "metrics", "degraded" if self._export.problem else "up", self._export.problem
            )
        return {name: _sayable(state) for name, state in found.items()}

    def listening(self) -> Listening:
        """What is listened to."""
        points = self.filesystems.points
        names = None if points is None else tuple(sorted(map(_readable, points)))
        return Listening(self.states(), names, os.getpid())

    # -- a turn of the loop

    def _wait(self, seconds: float) -> None:
        poll = select.poll()
        for fd in self.filenos():
            poll.register(fd, select.POLLIN)
        poll.poll(max(0.0, seconds) * 1000)

    def _pause(self, most: float) -> float:
        now = self._clock()
        times = [self._next_count, self._next_check, self.filesystems.next_look()]
        times += self._due.values()
        if self._export.wanted:
            times.append(self._export.next())
        times += [known.due for known in self.filesystems.known.values() if known.due is not None]
        return max(0.0, min(most, min(times) - now))

    def _turn(self) -> None:
        now = self._clock()
        # Errors first: they are about what was mounted when they came.
        for one in self.channels.read():
            if isinstance(one, Loss):
                self._lost(one)
            else:
                self._take(one)
        self._mounts(look=False)
        self._probes(now)
        if self._locator is not None:
            for id_, paths, source, ambiguous in self._locator.found():
                names = tuple(readable(path) for path in paths)  # JSON carries no others
                self._keep(self.correlator.located(id_, names, source, ambiguous))
            for device in self._locator.hung:
                dev = _dev(device)
                self._keep(self.correlator.state(dev, "hung", time.time(), "probe"))
        for known in list(self.filesystems.known.values()):
            if known.due is not None and known.due <= now and known.identified:
                self._count(known)
        if now >= self._next_check:
            self._next_check = now + _CHECK
            self._closed(self._keeping.closed())
            for loss in self.channels.check():
                self._lost(loss)
            if self.channels.retry():
                self.channels.follow()
                self._count_all()
            self._gone()
        if now >= self._next_count:
            self._next_count = now + self._settings.counters
            self._mounts(look=True)
            self._count_all()

    def _mounts(self, look: bool | None = None) -> None:
        if look is not None and not self.channels.mounts_changed(look) and not look:
            return
        self._take_mounts(first=look is None)
        if look:  # what poll(2) does not tell: options that the filesystem itself set
            for known in self.filesystems.known.values():
                self._shown(known)

    # Whoever finds that the mounts changed does all of it: it is found once.
    def _take_mounts(self, first: bool = False) -> None:
        came, changed, went = self.filesystems.update(self.channels.there)
        if came or went or first:
            self.channels.follow()
        for known in went:
            waiting, known.waiting = known.waiting, []
            for seen in waiting:  # it went before it said who it was
                self._keep(self.correlator.feed(seen))
        for known in changed:
            if known.identified:
                self._keep(self.correlator.mounted(known.dev, known.fs))
        if came:
            self.channels.retry()  # a tracefs may be among what was mounted
            self._probes(self._clock())

    def _probes(self, now: float) -> None:
        for known, finding in self.filesystems.answers():
            if not self._is_there(known):
                continue
            if not known.identified:
                self._identify(known, finding)
            elif known.found(finding):
                self._keep(self.correlator.mounted(known.dev, known.fs))
            elsewhere = self._locator is not None and known.fs.device in self._locator.hung
            if finding.state in ("shutdown", "hung") or (finding.state == "ok" and not elsewhere):
                self._keep(self.correlator.state(known.dev, finding.state, time.time(), "probe"))
        try:
            self.filesystems.ask(now, self._settings.probe)
        except FanwiseError as error:
            for known in list(self.filesystems.known.values()):
                if self._is_there(known) and not known.identified:
                    self._identify(known, Finding("unknown"))
            self._failed["probe"] = str(error)

    # To identify or count one shows that others went, or that it went itself.
    def _is_there(self, known: Known) -> bool:
        return self.filesystems.known.get(known.dev) is known

    # Whose filesystem is it? Its incidents may be open under another device number.
    def _identify(self, known: Known, finding: Finding) -> None:
        known.identified = True
        known.found(finding)
        ledgers = {ledger.dev: ledger for ledger in self.correlator.ledgers()}
        here, uuid = ledgers.get(known.dev), known.fs.uuid
        if here is not None and uuid is None and here.fs.stack == known.fs.stack:
            known.found(Finding("unknown", uuid=here.fs.uuid, label=here.fs.label))
        if uuid is not None and (here is None or here.fs.uuid != uuid):
            before = next(
                (
                    dev
                    for dev, ledger in ledgers.items()
                    if ledger.fs.uuid == uuid and dev not in self.filesystems.known
                ),
                None,
            )
            if before is not None:
                if here is not None:
                    self._keep(self.correlator.mounted(known.dev, known.fs))
                self.correlator.renumbered(before, known.dev)
                self._forget(before)
        self._keep(self.correlator.mounted(known.dev, known.fs))
        if finding.checked is not None:
            self._keep(self.correlator.checked(known.dev, finding.checked))
        self._shown(known)
        waiting, known.waiting = known.waiting, []
        for seen in waiting:
            self._keep(self.correlator.feed(seen))
        self._count(known)

    # The ledger stands under another name now.
    def _forget(self, dev: Dev) -> None:
        name = _note(dev)
        if name in self._notes:
            self._keeping.put((), {name: b""}, self._failing())
            del self._notes[name]

    def _shown(self, known: Known) -> None:
        if known.identified:
            shown = _intake.state_of(known.readable)
            self._keep(self.correlator.state(known.dev, shown, time.time()))

    def _take(self, seen: Observation) -> None:
        above = self._above(seen.dev)
        if not above:
            self._mounts(look=False)  # it may have been mounted after the last look
            above = self._above(seen.dev)
        if not above:
            if self.filesystems.points is not None:
                return
            self._introduce(seen.dev)
        if seen.channel == "trace":
            self._export.delays.add(time.time() - seen.time)
        # The log tells of the same, as long as it is not rate-limited.
        if seen.what == "writeback" and (seen.channel == "trace" or not self.channels.traced):
            self._export.wrote(seen)
        for one in above:
            one.due = self._clock() + _AFTER
        if len(above) == 1 and above[0].fstype.startswith("ext"):
            seen = msgspec.structs.replace(seen, life=above[0].life)
        if len(above) == 1 and not above[0].identified:
            above[0].waiting.append(seen)
            return
        self._keep(self.correlator.feed(seen))

    def _above(self, dev: Dev) -> list[Known]:
        known = self.filesystems.known.get(dev)
        return [known] if known is not None else self.filesystems.below(dev)

    # A device that nothing is mounted from, or a filesystem that is not on a device.
    def _introduce(self, dev: Dev) -> None:
        if dev in self._introduced:
            return
        self._introduced.add(dev)
        if any(ledger.dev == dev for ledger in self.correlator.ledgers()):
            return
        fs = device_of(dev)
        mounts = [mount for mount in self.channels.there if mount.dev == dev]
        if mounts:
            fs = describe(dev, Place(fstype=mounts[0].fstype, directory=None, layers=()), mounts)
        if fs is not None:
            self._keep(self.correlator.mounted(dev, fs))

    # What was only a device's trouble ends with the device.
    def _gone(self) -> None:
        for ledger in self.correlator.ledgers():
            if ledger.cases and ledger.fs.fstype is None and ledger.dev[0]:
                there = device_of(ledger.dev)
                if there is None or (ledger.fs.stack and there.stack != ledger.fs.stack):
                    for case in list(ledger.cases):
                        self._keep(self.correlator.resolve(case.id, "the device is gone"))
                    self._introduced.discard(ledger.dev)

    def _lost(self, loss: Loss) -> None:
        devs = self.filesystems.known.keys() if loss.devs is None else loss.devs
        self._keep(self.correlator.lost(list(devs), loss.records))
        for dev in devs:
            known = self.filesystems.known.get(dev)
            if known is not None:
                known.due = self._clock()

    def _count_all(self) -> None:
        for known in list(self.filesystems.known.values()):
            if known.identified:
                self._count(known)

    def _count(self, known: Known) -> None:
        if not self._is_there(known):
            return
        known.due = None
        reading = read(known.place)
        now = time.time()
        if known.place.directory is not None:
            self.channels.understood(known.place.directory)
        for bad in reading.garbage:
            self.channels.garbage(bad.path, bad.why)
        if reading.ext4 is not None:
            self._keep(self.correlator.ext4(known.dev, reading.ext4, now, known.life))
            if self.correlator.unsure(known.dev):
                known.due = self._clock() + WINDOW
        self._keep(self.correlator.btrfs(known.dev, reading.btrfs, now))
        self._export.counted(known.fs, reading)
        if known.fstype.startswith("ext"):
            # Options that tell a state appear with the error and wake nobody.
            self._shown_now(known)

    def _shown_now(self, known: Known) -> None:
        ledger = next((x for x in self.correlator.ledgers() if x.dev == known.dev), None)
        if ledger is None or not ledger.cases:
            return
        if self.channels.mounts_changed(look=True):
            self._take_mounts()
        if self._is_there(known):
            self._shown(known)

    # -- what goes out

    def _keep(self, incidents: list[Incident]) -> None:
        self._dirty = True
        for incident in incidents:
            if not self._ours(incident):
                continue
            before = self._fresh.get(incident.id)
            if before is not None:
                count = before.count + incident.count
                incident = msgspec.structs.replace(incident, count=count)
            self._fresh[incident.id] = incident
            self._due.setdefault(incident.id, 0.0)
        self._export_dirty = self._export_dirty or bool(incidents)

    # Restricted to some filesystems, it tells of no other that it knows from before.
    def _ours(self, incident: Incident) -> bool:
        if self.filesystems.points is None:
            return True
        points = set(map(_readable, self.filesystems.points))
        return bool(points & set(incident.fs.mounts)) or any(
            known.fs.device == incident.fs.device for known in self.filesystems.known.values()
        )

    def _tell(self, at_once: bool = False) -> list[Incident | Sources]:
        now = self._clock()
        told: list[Incident] = []
        same: list[Incident] = []
        for id_, incident in list(self._fresh.items()):
            if _says_the_same(incident, self._told.get(id_)):
                same.append(incident)  # another channel agreed: that is for the database
                del self._fresh[id_]
                self._due.pop(id_, None)
                continue
            bucket = self._buckets.setdefault(id_, Bucket(_RATE, _BURST))
            if not (at_once or incident.status != "open" or bucket.take(now)):
                self._due[id_] = now + bucket.wait(now)
                continue
            told.append(incident)
            del self._fresh[id_]
            self._due.pop(id_, None)
            self._told[id_] = incident
            if incident.status != "open":
                del self._buckets[id_], self._told[id_]
        self._unkept += told
        self._same += same
        return list(told)

    def _keep_told(self) -> None:
        if self._unkept or self._same or self._dirty:
            self._dirty = False
            told, self._unkept = self._unkept, []
            same, self._same = self._same, []
            self._store(told, same)
        if self._export.due(self._clock(), self._export_dirty):
            self._export_dirty = False
            self._keeping.then(self._export.job(self._snapshot()))

    def _store(self, told: list[Incident], same: list[Incident]) -> None:
        records = [msgspec.to_builtins(incident) for incident in told]
        more = [msgspec.to_builtins(incident) for incident in same]
        notes = self._changed_notes()
        if records or more or notes:
            self._keeping.put([*more, *records], notes, self._failing())
            self._notes.update(notes)
        if self._actions is not None:
            for record in records:
                self._actions.offer(record)
        for incident in told:
            known = incident.object.ino is not None or incident.object.start is not None
            unnamed = known and not incident.object.paths
            if self._locator is not None and unnamed and incident.status == "open":
                self._locator.locate(incident)

    def _changed_notes(self) -> dict[str, bytes]:
        changed = {}
        for ledger in self.correlator.ledgers():
            name, body = _note(ledger.dev), msgspec.json.encode(ledger)
            if self._notes.get(name) != body:
                changed[name] = body
        return changed

    # The devices that must not be written to: those of every filesystem with an open incident.
    def _failing(self) -> frozenset[str]:
        found: set[str] = set()
        for ledger in self.correlator.ledgers():
            if ledger.cases:
                found.update((ledger.fs.device, *ledger.fs.devices))
        return frozenset(found)

    def _say_sources(self, now: float, told: list[Incident | Sources], force: bool = False) -> None:
        if now < self._next_say and not force:
            return
        self._next_say = now + _SAY
        states = self.states()
        if states == self._said:
            return
        self._said = states
        self._note_sources()
        told.append(Sources(states))

    # For those who read the database.
    def _note_sources(self) -> None:
        body = msgspec.json.encode(self.listening())
        self._keeping.put((), {SOURCES: body}, self._failing())

    def _snapshot(self) -> Snapshot:
        states: dict[str, str] = {}
        open_records: list[dict[str, Any]] = []
        for incident in self.correlator.open():
            open_records.append(msgspec.to_builtins(incident))
            before = states.get(incident.fs.device, "ok")
            states[incident.fs.device] = _worse(before, incident.state)
        filesystems = [
            {**msgspec.to_builtins(known.fs), "state": states.get(known.fs.device, "ok")}
            for known in self.filesystems.known.values()
        ]
        actions = {} if self._actions is None else self._actions.counts()
        return Snapshot(open_records, filesystems, self.states(), actions, self._failing())

    # In the thread of a sink.
    def _outcome(self, outcome: Outcome) -> None:
        if outcome.reason is None:
            self._failed.pop(outcome.sink, None)
        else:
            self._failed[outcome.sink] = outcome.reason

    def __enter__(self) -> "Engine":
        self.open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


ENGINE: Lifetime[Engine] = Lifetime(
    "Engine",
    states=("NEW", "OPEN", "CLOSED"),
    transitions={"open": "NEW -> OPEN", "close": "NEW, OPEN -> CLOSED"},
    invariants={
        "what listens has its channels": lambda e: e.state != "OPEN" or e.channels.state == "OPEN",
    },
)


def _dev(device: str) -> Dev:
    major, _, minor = device.partition(":")
    return int(major), int(minor)


def _note(dev: Dev) -> str:
    return f"{LEDGER}{dev[0]}:{dev[1]}"


def _says_the_same(incident: Incident, told: Incident | None) -> bool:
    if told is None or incident.count:
        return False
    return incident == msgspec.structs.replace(told, count=0, last_seen=incident.last_seen)


def _readable(point: bytes) -> str:
    return readable(os.fsdecode(point))


# Reasons name files, whose names JSON may not be able to carry.
def _sayable(state: SourceState) -> SourceState:
    if state.reason is None or state.reason.isascii():
        return state
    return msgspec.structs.replace(state, reason=readable(state.reason))


def _worse(one: str, other: str) -> str:
    return max(one, other, key=SEVERITY.__getitem__)
