"""Following incidents: as the one writer of a database, or as a reader beside it.

REFS      a `Follow` owns the engine, or what it read of the database; nothing when it is closed.
LOCKING   none: one owner calls.
LIFETIME  see FOLLOW. Whoever opens first writes; the lock is in the database (store).
"""

import hashlib
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import msgspec

from fanwise import config
from fanwise._errors import BusyError, ClosedError, StoreMissing
from fanwise.health import _places, _rules
from fanwise.health._channels import NAMES
from fanwise.health._engine import SOURCES, Engine, Listening, Sources
from fanwise.health._filesystems import readable
from fanwise.health._incident import Incident
from fanwise.health._incidents_db import SCHEMA, Incidents
from fanwise.health._keeping import Keeping
from fanwise.health._locate import Model, Paths
from fanwise.health._selection import Applies, Selection
from fanwise.lifetime import Lifetime
from fanwise.sources.state import SourceState
from fanwise.store.database import Store

_EVERY = 0.25  # seconds between two looks of a reader at the database
_PLACED = 2.0  # seconds that the incidents told first may take to be placed
_PLACING = 0.05  # and between two at helpers that look where something is

Told = Incident | Sources


class Writer(msgspec.Struct, frozen=True):
    """The process that listens and writes the database; ``since`` is in seconds since the epoch."""

    pid: int
    command: str
    since: float


def databases(settings: config.Health) -> tuple[Path, Path]:
    """Return the first and the second place of the database of incidents.

    Raises ConfigError when a user has no state directory.
    """
    standard = config.state_directory()
    first = Path(settings.state or standard) / "health.db"
    if settings.second:
        return first, Path(settings.second)
    base = Path("/run/fanwise")
    if os.geteuid():
        runtime = os.environ.get("XDG_RUNTIME_DIR", "")
        base = Path(runtime, "fanwise") if runtime.startswith("/") else first.parent
    # Two databases must not share a second place.
    mark = hashlib.sha256(os.fsencode(first.absolute())).hexdigest()[:12]
    same = first.parent == standard and base != first.parent
    return first, base / ("health.db" if same else f"health-{mark}.db")


class Follow:
    """Incidents as they come; a context manager, and an iterator over what is told.

    It is told of each open incident first (``count`` is 0), then of each that begins, grows,
    changes or ends, and of sources that go down or come back (`Sources`). ``paths`` select what is
    told, see `applies`; listened to are all filesystems (or those of the setting ``health.only``).
    ``sources`` is what each source said last. ``writer`` is the process that listens where this one
    only reads the database, None when this one listens; ``unheard`` are the paths that nobody
    listens to, because the writer is restricted to others. ``model`` knows paths: it is asked for
    device (MAJOR:MINOR), inode and the key of its handle (None where not known) before any disk is,
    in this thread, and gives an absolute path or None.

    Nothing is opened before `open` or the ``with`` block.
    """

    state: str

    def __init__(
        self,
        *paths: str | os.PathLike[str],
        settings: config.Health | None = None,
        model: Model | None = None,
    ) -> None:
        self._model = model
        self.settings = settings if settings is not None else config.load().config.health
        self.paths = tuple(os.fspath(path) for path in paths)
        self.unheard: tuple[str, ...] = ()
        self.sources: dict[str, SourceState] = {}
        self.writer: Writer | None = None
        self._engine: Engine | None = None
        self._reader: _Reader | None = None
        self._selection: Selection | None = None
        self._applies: dict[str, Applies] = {}  # as it was told last
        # As "unknown"; and whether it was told so, or waits for an answer.
        self._unplaced: dict[str, tuple[Incident, bool]] = {}
        self._first: list[Told] = []
        self._iterated: list[Told] = []
        FOLLOW.start(self)

    def open(self) -> None:
        """Listen; or read, when another process does.

        Raises NoSuchRoot, ConfigError for wrong rules, StoreError for a database that cannot be
        used, and FanwiseError for an address or an action that cannot be had.
        """
        if self.paths:
            self._selection = Selection(self.paths)
        first, second = databases(self.settings)
        rules = _rules.load(self.settings.rules) if self.settings.rules else None
        keeper = _places.Keeper(first, second, self.settings.memory)
        engine = Engine(
            Keeping(keeper, self.settings.keep),
            self.settings,
            points=[os.fsencode(point) for point in self.settings.only] or None,
            rules=rules,
            locator=Paths(model=self._model),
            tracefs=self.settings.tracefs or None,
        )
        try:
            engine.open()
        except BusyError:
            self._reader = _Reader(first, second)
            self._first = list(self._reader.begin())
            self.sources, self.writer = self._reader.sources, self._reader.writer
        else:
            self._engine = engine
            self._first = list(engine.open_incidents())
            self.sources = engine.states()
        if self._selection is not None:
            for one in self._first:
                if isinstance(one, Incident):
                    self._selection.applies(one)  # asks
            self._selection.settle(_PLACED)
        heard = engine.listening().points if self.listens else self._reader_points()
        if heard is not None and self._selection is not None:
            self.unheard = tuple(
                target.path
                for target in self._selection.targets
                if readable(os.fsdecode(target.mount.mount_point)) not in heard
            )
        FOLLOW.advance(self, "open")

    def _reader_points(self) -> tuple[str, ...] | None:
        return None if self._reader is None else self._reader.points

    @property
    def listens(self) -> bool:
        """Whether this process is the one that listens and writes."""
        return self._engine is not None

    def filenos(self) -> list[int]:
        """Descriptors of which one is readable when there is something to `read`."""
        found = [] if self._engine is None else self._engine.filenos()
        return found if self._selection is None else [*found, *self._selection.filenos()]

    def pause(self) -> float:
        """Seconds after which `read` should be called in any case."""
        pause = _EVERY if self._engine is None else self._engine.pause()
        return min(pause, _PLACING) if self._placing else pause

    def read(self, timeout: float | None = None) -> list[Told]:
        """Wait for news, at most ``timeout`` seconds (None: for ever), and give it.

        Raises ClosedError when it is not open; StoreError when a reader's database cannot be read.
        """
        if self.state != "OPEN":
            raise ClosedError(f"this follower of incidents is {self.state}")
        until = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            first, self._first = self._first, []
            left = 0.0 if first else max(0.0, min(until - time.monotonic(), 3600.0))
            if self._placing:
                left = min(left, _PLACING)
            found = first + self._news(left)
            told = [one for one in found if self._concerns(one)] + self._corrected()
            if told or time.monotonic() >= until:
                return told

    def _news(self, seconds: float) -> list[Told]:
        if self._engine is not None:
            return self._engine.read(seconds)
        assert self._reader is not None
        found = self._reader.look()
        if not found and seconds > 0:
            select.select((), (), (), min(seconds, _EVERY))
        return found

    def _concerns(self, one: Told) -> bool:
        if isinstance(one, Sources):
            self.sources = one.sources
            return True
        if self._selection is None:
            return True
        applies = self._selection.applies(one)
        before = self._applies.pop(one.id, None)
        self._unplaced.pop(one.id, None)
        if applies is None or (applies == "elsewhere" and before in (None, "elsewhere")):
            return False
        self._applies[one.id] = applies
        if applies == "unknown" and one.status == "open":
            told = before != "unknown" or not self._selection.places(one)
            self._unplaced[one.id] = one, told
            return told
        return True

    @property
    def _placing(self) -> bool:
        return self._selection is not None and self._selection.asks

    # What was told as "unknown", and is known now.
    def _corrected(self) -> list[Told]:
        if self._selection is None or not self._selection.placed():
            return []
        found = []
        for one, told in list(self._unplaced.values()):
            if self._selection.places(one) or (told and self._selection.applies(one) == "unknown"):
                continue
            if self._concerns(one):
                found.append(msgspec.structs.replace(one, count=0) if told else one)
        return list(found)

    def applies(self, incident: Incident) -> Applies | None:
        """Say how an incident that was told concerns the paths; None when there are no paths.

        "object": it is of what was asked for, or below it. "fs": it is about the whole filesystem.
        "unknown": of an object of which it is not known (yet) where it is. "elsewhere": of another
        part of the filesystem; that is told of one only that was "unknown" before.
        """
        return self._applies.get(incident.id)

    def finish(self) -> list[Told]:
        """Read what is there still, before `close`; give the rest."""
        if self._engine is None:
            return []
        return [one for one in self._first + self._engine.finish() if self._concerns(one)]

    def close(self) -> None:
        """Stop; idempotent."""
        if self.state == "CLOSED":
            return
        FOLLOW.advance(self, "close")
        if self._engine is not None:
            self._engine.close()
        if self._reader is not None:
            self._reader.close()
        if self._selection is not None:
            self._selection.close()

    def __enter__(self) -> "Follow":
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Told]:
        return self

    def __next__(self) -> Told:
        """Wait for the next, for ever. Raises StopIteration when it is closed."""
        while not self._iterated:
            if self.state != "OPEN":
                raise StopIteration
            self._iterated = self.read(1.0)
        return self._iterated.pop(0)


FOLLOW: Lifetime[Follow] = Lifetime(
    "Follow",
    states=("NEW", "OPEN", "CLOSED"),
    transitions={"open": "NEW -> OPEN", "close": "NEW, OPEN -> CLOSED"},
    invariants={
        "what is open listens or reads": lambda f: (
            f.state != "OPEN" or (f._engine is None) != (f._reader is None)
        ),
    },
)


class _Reader:
    # The database beside its writer: looked at again when its files changed.
    def __init__(self, first: Path, second: Path) -> None:
        self._places = (first, second)
        self._seen: object = None
        self._told: dict[str, dict[str, object]] = {}
        self.sources: dict[str, SourceState] = {}
        self.points: tuple[str, ...] | None = None
        self.writer: Writer | None = None

    def begin(self) -> list[Incident]:
        self._seen = self._signature()
        return [one for one in self._changed(news=False) if one.status == "open"]

    def look(self) -> list[Told]:
        signature = self._signature()
        alive = self.writer is not None
        if signature == self._seen and alive == self._alive():
            return []
        self._seen = signature
        before = self.sources
        found: list[Told] = list(self._changed())
        if self.sources != before:
            found.append(Sources(self.sources))
        return found

    def _alive(self) -> bool:
        return writer_of(self._places[0]) is not None

    def _signature(self) -> object:
        found: list[tuple[int, int, int] | None] = []
        for place in self._places:
            for name in (place, Path(f"{place}-wal")):
                try:
                    stat = os.stat(name)
                except OSError:
                    found.append(None)
                else:
                    found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
        return found

    # `news` is False for what was there before the first look.
    def _changed(self, news: bool = True) -> list[Incident]:
        try:
            incidents = _places.read(*self._places)
        except StoreMissing:
            return []
        try:
            changed = []
            for stored in incidents.listing():
                record = stored.record
                if stored.resolved is not None:
                    status = "merged" if record.get("merged_into") else "resolved"
                    record = {**record, "status": status, "resolved": stored.resolution}
                before = self._told.get(stored.id)
                if before == record:
                    continue
                told = int(str(before["total"])) if before is not None else 0
                self._told[stored.id] = record
                if before is None and stored.resolved is not None:
                    continue  # history
                count = max(int(record["total"]) - told, 0) if news else 0
                changed.append(msgspec.convert({**record, "count": count}, Incident))
            self.writer = writer_of(self._places[0])
            note = said(incidents)
            self.points = None if note is None else note.points
            self.sources = sources_of(note, self.writer)
            return changed
        finally:
            incidents.store.close()

    def close(self) -> None:
        self._told = {}


def writer_of(first: Path) -> Writer | None:
    """Return who listens and writes the database at ``first``; None when nobody does."""
    found = Store(first, SCHEMA, "read").holder()
    return None if found is None else Writer(found.pid, found.command, found.since)


def sources_of(note: Listening | None, writer: Writer | None) -> dict[str, SourceState]:
    """Return what the writer says of its sources; without one, that nobody listens."""
    if writer is not None:
        return {} if note is None else note.sources
    names = NAMES if note is None else note.sources
    return {name: SourceState(name, "down", "nobody listens") for name in names}


def said(incidents: Incidents) -> Listening | None:
    """Return the last word of a writer about what it listens to."""
    body = incidents.notes().get(SOURCES)
    return None if body is None else msgspec.json.decode(body, type=Listening)
