"""Storing in a thread of its own, so that whoever finds incidents never waits for a disk.

What comes while a write is under way is put together: of an incident only the newest record is
written, and all of them, with the ledgers that they came from, in one transaction. So after a kill
a ledger and its incidents are of one moment, and what came later is found by the counters.

REFS      owns the keeper and the thread.
LOCKING   one condition guards what waits; it is never held while storing. The keeper belongs to
          the thread while that runs.
LIFETIME  see KEEPING. `close` waits until a deadline; a disk that does not answer by then keeps
          its daemon thread, and the database is mended at the next start.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fanwise._errors import FanwiseError
from fanwise.health._incidents_db import Incidents, Total
from fanwise.health._places import Keeper, Place
from fanwise.lifetime import Lifetime

BEAT = 30.0  # seconds between two words that somebody listens
_RETRY = 60.0  # seconds between two tries of a place that had no room
_DAY = 86400.0

Record = dict[str, Any]
Job = Callable[[list[Total]], None]


class Keeping:
    """Keeps what it is given; ``problem`` says what it could not do last."""

    state: str

    def __init__(self, keeper: Keeper, keep_days: int = 90) -> None:
        self.keeper = keeper
        self.problem: str | None = None
        self._keep = keep_days * _DAY
        self._condition = threading.Condition()
        self._records: dict[str, Record] = {}
        self._notes: dict[str, bytes] = {}
        self._avoid: frozenset[str] = frozenset()
        self._job: Job | None = None
        self._resolutions: dict[str, str] = {}
        self._look = False
        self._closing = False
        self._done = False
        self._thread: threading.Thread | None = None
        KEEPING.start(self)

    def open(self) -> dict[str, bytes]:
        """Open the places, and give the notes of the run before.

        Raises what `Keeper.open` raises: BusyError when another process writes.
        """
        self.keeper.open()
        try:
            notes = self.keeper.incidents.notes()
            self._resolutions = self.keeper.resolutions()
            self._avoid = self.keeper.avoided
            self.keeper.do(_listens(time.time()))
        except BaseException:
            self.keeper.close()
            raise
        KEEPING.advance(self, "open")
        self._thread = threading.Thread(target=self._run, name="fw-health-store", daemon=True)
        self._thread.start()
        return notes

    def put(
        self, records: Iterable[Record], notes: Mapping[str, bytes], avoid: frozenset[str]
    ) -> None:
        """Store these, and never on what stands on the devices to ``avoid``."""
        with self._condition:
            for record in records:
                self._records[record["id"]] = record
            self._notes.update(notes)
            self._avoid = avoid
            self._condition.notify()

    def then(self, job: Job) -> None:
        """Do a job in the thread, with the totals; a later one takes the place of one that waits.

        A FanwiseError that it raises is `problem`.
        """
        with self._condition:
            self._job = job
            self._condition.notify()

    def closed(self) -> dict[str, str]:
        """Return what resolved incidents, by id, as of the call before; and look again."""
        with self._condition:
            self._look = True
            self._condition.notify()
            return self._resolutions

    @property
    def place(self) -> Place:
        """Where incidents are kept now."""
        return self.keeper.place

    def settled(self, deadline: float = 5.0) -> bool:
        """Wait until all that was given is stored; False when it takes too long."""
        with self._condition:
            return self._condition.wait_for(
                lambda: not (self._records or self._notes) and not self._busy, deadline
            )

    def close(self, deadline: float = 5.0) -> bool:
        """Store what waits, say that nobody listens, and close; False when that takes too long."""
        if self.state != "OPEN":
            return True
        KEEPING.advance(self, "close")
        with self._condition:
            self._closing = True
            self._condition.notify()
        assert self._thread is not None
        self._thread.join(deadline)
        return not self._thread.is_alive()

    _busy = False

    def _run(self) -> None:
        beaten = retried = time.monotonic()
        pruned = 0.0
        while True:
            with self._condition:
                self._busy = False
                self._condition.notify_all()
                self._condition.wait_for(
                    lambda: (
                        self._records or self._notes or self._job or self._look or self._closing
                    ),
                    max(0.0, beaten + BEAT - time.monotonic()),
                )
                self._busy = True
                records, self._records = list(self._records.values()), {}
                notes, self._notes = self._notes, {}
                job, self._job = self._job, None
                avoid, closing = self._avoid, self._closing
                look, self._look = self._look, False
            now = time.monotonic()
            try:
                self.keeper.avoid(avoid)
                if now - retried >= _RETRY:
                    retried = now
                    self.keeper.retry()
                if records or notes:
                    self.keeper.do(_puts(records, notes, time.time()))
                if now - beaten >= BEAT:
                    beaten = now
                    self.keeper.do(_listens(time.time()))
                if look:
                    self._resolutions = self.keeper.resolutions()
                if now - pruned >= _DAY or not pruned:
                    pruned = now
                    self.keeper.do(_prunes(time.time() - self._keep))
                self.problem = None
            except FanwiseError as error:
                self.problem = str(error)
            if job is not None:
                self._do(job)
            if closing:
                break
        try:
            self.keeper.do(_ends(time.time()))
            self.keeper.close()
        except FanwiseError as error:
            self.problem = str(error)

    def _do(self, job: Job) -> None:
        try:
            job(self.keeper.incidents.totals())
        except FanwiseError as error:
            self.problem = str(error)


KEEPING: Lifetime[Keeping] = Lifetime(
    "Keeping",
    states=("NEW", "OPEN", "CLOSED"),
    transitions={"open": "NEW -> OPEN", "close": "OPEN -> CLOSED"},
)


# What is done in a place is done in memory too: these have no effect but on what they are given.
def _puts(records: list[Record], notes: Mapping[str, bytes], now: float) -> Callable[[Any], None]:
    def put(incidents: Incidents) -> None:
        incidents.put_all(records, notes, now)

    return put


def _listens(now: float) -> Callable[[Any], None]:
    def listen(incidents: Incidents) -> None:
        incidents.beat(now)

    return listen


def _ends(now: float) -> Callable[[Any], None]:
    def end(incidents: Incidents) -> None:
        incidents.end(now)

    return end


def _prunes(before: float) -> Callable[[Any], None]:
    def prune(incidents: Incidents) -> None:
        incidents.prune(before)

    return prune
