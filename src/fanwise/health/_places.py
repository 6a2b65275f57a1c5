"""Where incidents are kept: at home, in a second place, or in memory; never where it fails.

Memory mirrors what is written, so that moving needs nothing of the old place: even a reader of a
write-ahead log writes, to the log's index (measured).

REFS      the keeper owns the stores of its places, and through the first the writer's lock.
LOCKING   one owner at a time. Any call may wait for a disk: call it from a worker thread.
LIFETIME  see KEEPER. A place to be avoided is not even closed, because closing writes: it is
          abandoned at the end, and what was committed stays in its log.
"""

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

from fanwise._errors import ClosedError, DamagedStore, NoRoom, StoreError, StoreMissing
from fanwise.health._incidents_db import SCHEMA, Incidents
from fanwise.lifetime import Lifetime
from fanwise.store.database import Store

Place = Literal["first", "second", "memory"]
T = TypeVar("T")

_PASSED = (NoRoom, DamagedStore)  # with these, the next place is used


class Keeper:
    """The incidents of the one writer; a context manager.

    ``first`` and ``second`` are paths of databases, ``memory`` bytes for when neither will do.
    ``problems`` says why a place is not used; ``dropped`` how many incidents had to make room in
    memory.
    """

    state: str

    def __init__(self, first: Path, second: Path | None = None, memory: int = 8 << 20) -> None:
        self.paths: dict[Place, Path] = {"first": first}
        if second is not None:
            self.paths["second"] = second
        self.place: Place = "memory"
        self.problems: dict[Place, StoreError] = {}
        self.dropped = 0
        self._size = memory
        self._open: dict[Place, Incidents] = {}
        self._avoided: frozenset[str] = frozenset()
        KEEPER.start(self)

    def open(self) -> None:
        """Open the places, and bring home what an earlier run left elsewhere.

        Nothing is written to what had an open incident when the last run ended, but for the lock
        and the log's index, without which nobody knows.

        Raises BusyError when another process writes; ForeignFile and NewerFormat, which an
        operator must look at. A full, read-only or damaged place is passed over.
        """
        try:
            for place, path in self.paths.items():
                store = Store(path, SCHEMA, "write")
                try:
                    store.open()
                except _PASSED as error:
                    self.problems[place] = error
                    continue
                self._open[place] = Incidents(store)
            memory = Store.memory(SCHEMA, self._size)
            memory.open()
            self._open["memory"] = Incidents(memory)
            for incidents in list(self._open.values())[:-1]:
                self._mirror(incidents)
            # What failed when a run ended fails until somebody says otherwise.
            self._avoided = failing(self._open["memory"])
        except BaseException:
            KEEPER.advance(self, "close")
            self._release()
            raise
        KEEPER.advance(self, "open")
        self._choose()

    @property
    def incidents(self) -> Incidents:
        """The place in use, for reading; write through `do`."""
        if self.state != "OPEN":
            raise ClosedError(f"the keeper of incidents is {self.state}")
        return self._open[self.place]

    def do(self, work: Callable[[Incidents], T]) -> T:
        """Do some work where incidents are kept now, or in the next place that has room.

        It is done in memory as well, so it has no effects but on what it is given. Raises what it
        raises, but for NoRoom and DamagedStore of a place that is not the last.
        """
        while True:
            place, incidents = self.place, self.incidents
            if place == "memory":
                return self._remember(work)
            try:
                result = work(incidents)
            except _PASSED as error:
                self.problems[place] = error
                self._choose()
                continue
            self._remember(work)
            return result

    def resolutions(self) -> dict[str, str]:
        """Return what resolved each incident that is resolved, in any place that may be read."""
        found: dict[str, str] = {}
        for place, incidents in self._open.items():
            if place == "memory" or self._usable(place):
                found.update(incidents.resolutions())
        return found

    def _remember(self, work: Callable[[Incidents], T]) -> T:
        memory = self._open["memory"]
        while True:
            try:
                return work(memory)
            except NoRoom:
                gone = memory.drop_oldest()
                if self.place == "memory":  # elsewhere it is a mirror, and nothing is lost
                    self.dropped += gone
                if not gone:
                    raise

    def _mirror(self, incidents: Incidents) -> None:
        memory = self._open["memory"]
        try:
            memory.absorb(incidents)
        except NoRoom:  # a long history: the open ones are what matters
            for stored in incidents.listing(open_only=True):
                self._remember(partial(_put, record=stored.record))

    @property
    def avoided(self) -> frozenset[str]:
        """The devices that are not written to."""
        return self._avoided

    def avoid(self, devices: Iterable[str]) -> Place:
        """Never write to what stands on these devices (``MAJOR:MINOR``), from now on.

        Replaces what was to be avoided before. Gives the place that is used now.
        """
        self._avoided = frozenset(devices)
        self._choose()
        return self.place

    def retry(self) -> Place:
        """Try places again that had no room; for a timer. Gives the place used now."""
        self.problems = {
            place: error for place, error in self.problems.items() if place not in self._open
        }
        self._choose()
        return self.place

    def _choose(self) -> None:
        best: Place = next((p for p in self.paths if self._usable(p)), "memory")
        changed, self.place = best != self.place, best
        if best == "memory" or not changed:
            return
        target, second = self._open[best], self._open.get("second")
        try:
            if best == "first" and second is not None and self._usable("second"):
                target.absorb(second)
                second.clear()
            target.absorb(self._open["memory"])
        except _PASSED as error:
            self.problems[best] = error
            self._choose()

    def _usable(self, place: Place) -> bool:
        if place not in self._open or place in self.problems:
            return False
        return not self._open[place].store.devices & self._avoided

    def close(self) -> None:
        """Close the places; those to be avoided are left as they are. Idempotent."""
        if self.state == "CLOSED":
            return
        KEEPER.advance(self, "close")
        self._release()

    def _release(self) -> None:
        for place, incidents in self._open.items():
            store = incidents.store
            if store.devices & self._avoided:
                store.abandon()
                continue
            try:
                store.close()
            except _PASSED as error:  # what was committed is in the log
                self.problems[place] = error
        self._open = {}

    def __enter__(self) -> "Keeper":
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


KEEPER: Lifetime[Keeper] = Lifetime(
    "Keeper",
    states=("NEW", "OPEN", "CLOSED"),
    transitions={"open": "NEW -> OPEN", "close": "NEW, OPEN -> CLOSED"},
    invariants={
        "there is always a place": lambda k: k.state != "OPEN" or "memory" in k._open,
    },
)


def failing(incidents: Incidents) -> frozenset[str]:
    """Return the devices of filesystems with an open incident, and of what these stand on."""
    return frozenset(
        device
        for stored in incidents.listing(open_only=True)
        for device in (
            stored.record["fs"].get("device"),
            *(stored.record["fs"].get("devices") or ()),
        )
        if isinstance(device, str)
    )


def _put(incidents: Incidents, record: dict[str, Any]) -> None:
    incidents.put(record)


def read(first: Path, second: Path | None = None) -> Incidents:
    """Open what writers left in both places, for reading: one list, each incident once.

    The caller closes ``.store``. Raises StoreMissing when there is neither, and what opening a
    `Store` raises.
    """
    found = []
    for path in (first, second):
        if path is not None and os.path.lexists(path):
            store = Store(path, SCHEMA, "read")
            store.open()
            found.append(Incidents(store))
    if not found:
        raise StoreMissing(first, "there is no database here yet", "run fanwise health --follow")
    if len(found) == 1:
        return found[0]
    together = Store.memory(SCHEMA, 1 << 30)
    together.open()
    merged = Incidents(together)
    for incidents in found:
        merged.absorb(incidents)
        incidents.store.close()
    return merged
