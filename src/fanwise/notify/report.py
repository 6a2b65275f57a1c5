"""Reports in two phases: built while the object can be named, told when the change is visible.

    with core.prepare([Event(mask.DELETE, fs, key, folder, name)]) as report:
        drop(name)              # from here on the name leads to nothing
        report.report()

So whoever reads DELETE cannot reach the old object by its name any more. Told before the name was
dropped, as in Linux 5.3 to 5.16, a reader could open what had been deleted. Leaving the block
without `report`, because the operation failed, abandons it: nobody is told of what did not happen.

REFS      a report holds copies of its events and the core: no mark, group or object. So nothing
          has to wait for it, and it may be told after any of them has gone.
LOCKING   none: one owner. Marks decide when it is told, not when it was prepared: a group that came
          in between may get it, one that left does not.
LIFETIME  see REPORT.
Linux reference: d_delete_notify (a37d9a17f099, "fsnotify: invalidate dcache before IN_DELETE
event", in v5.17).
"""

from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING

from fanwise._errors import ClosedError
from fanwise.lifetime import Lifetime

from .event import Event

if TYPE_CHECKING:
    from .fsnotify import Fsnotify


class Report:
    """Events of one operation; made by `Fsnotify.prepare`. A context manager that abandons it."""

    __slots__ = ("_core", "events", "state")

    state: str

    def __init__(self, core: "Fsnotify", events: Iterable[Event]) -> None:
        self._core = core
        # Copied only if anybody could be told, which is what it costs when nobody listens.
        self.events: tuple[Event, ...] = tuple(
            event.__copy__()  # type: ignore[attr-defined]
            for event in events
            if core.has_marks(event.fs)
        )
        REPORT.start(self)

    def report(self) -> None:
        """Tell it, all events in order: the operation is visible. Raises ClosedError afterwards."""
        if self.state != "PREPARED":
            raise ClosedError(f"the report was {self.state.lower()} already")
        events, self.events = self.events, ()
        REPORT.advance(self, "report")
        self._core.send(events)

    def abandon(self) -> None:
        """Tell nobody: the operation failed. Does nothing once it is reported or abandoned."""
        if self.state == "PREPARED":
            self.events = ()
            REPORT.advance(self, "abandon")

    def __enter__(self) -> "Report":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abandon()

    def __repr__(self) -> str:
        return f"<Report {self.state}, {len(self.events)} events>"


REPORT: Lifetime[Report] = Lifetime(
    "Report",
    states=("PREPARED", "REPORTED", "ABANDONED"),
    transitions={"report": "PREPARED -> REPORTED", "abandon": "PREPARED -> ABANDONED"},
    invariants={
        "nothing is told twice": lambda r: r.state == "PREPARED" or not r.events,
    },
)
