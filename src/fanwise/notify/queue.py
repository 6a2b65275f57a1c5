"""The queue of a group: bounded, first in first out, merging, and exact about what it lost.

Two events merge as in fanotify: same object, directory, name, process and kind of record (ONDIR and
RENAME must match), unless 128 newer ones are in the same of 128 hash buckets. The mask of the later
one is OR-ed into the earlier one. Merging is tried before the limit, which fanotify does after:
what needs no room is never lost for want of it.

What finds no room is counted in one OVERFLOW event at the end of the queue. There is one for each
gap: as long as nothing else was queued behind it, it takes further losses too; fanotify has one a
queue, which stays where it is when something is lost again behind it.

Permission events stand here too, each with an access that waits for it: they never merge, take no
room of the others, and a full queue takes none of them (`fanwise.notify.verdict`).

Errors have a queue and room of their own, `Reserve`; each is read where it stands among the other
events, as one queue would give it. They take no room of these, and a full queue takes none of them.

REFS      owns its events; those that were read belong to the reader.
LOCKING   none: one owner.
LIFETIME  the group's: `stop`, `flush` and `free_overflow` are steps of its end.
"""

from collections import deque
from typing import TypeAlias

from .event import ErrorEvent, Event, PermissionEvent
from .mask import ONDIR, Q_OVERFLOW, RENAME
from .reserve import Reserve, Slot

BUCKETS = 128  # 1 << FANOTIFY_HTABLE_BITS
MERGE_DEPTH = 128  # FANOTIFY_MAX_MERGE_EVENTS, per bucket
MOST_ROOTS = 256  # of an overflow; beyond it says None, which is everywhere

_KIND = ONDIR | RENAME

_Key: TypeAlias = tuple[object, ...]


class Queue:
    """Events that nobody has read yet. ``limit`` is their number; an overflow may stand behind."""

    __slots__ = (
        "_added", "_events", "_found", "_lost", "_out", "_roots", "errors", "limit", "questions",
        "stopped",
    )  # fmt: skip

    def __init__(self, limit: int, errors: Reserve | None = None) -> None:
        self.limit = limit
        self.stopped = False
        self.questions = 0  # permission events among the others
        self.errors = Reserve() if errors is None else errors
        self._out = 0  # events, errors not counted, that were taken out so far
        self._events: deque[tuple[Event, _Key | None]] = deque()
        # The newest event of each key that is still queued, and its number in its bucket.
        self._found: dict[_Key, tuple[Event, int]] = {}
        self._added: list[int] = []  # by bucket, made for the first event
        self._lost: Event | None = None  # the overflow, while it is the last in the queue
        self._roots: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._events) + self.errors.queued

    def add(self, event: Event, mask: int) -> bool:
        """Queue a copy of ``event`` with ``mask``, merge it, or count it as lost.

        Whether the queue was empty, and a reader has to be woken.
        """
        if self.stopped:
            return False
        obj, name = event.key, event.name
        if mask & RENAME:
            key: _Key = (
                obj,
                event.dir,
                name,
                event.pid,
                mask & _KIND,
                event.fs,
                event.dir2,
                event.name2,
            )
            # A record without its first directory merges with none (fanotify_name_event_equal).
            merges = event.dir is not None
        else:
            key = (obj, event.dir, name, event.pid, mask & _KIND, event.fs)
            merges = obj is not None or event.dir is not None
        bucket = (hash(obj) ^ hash(name) ^ event.pid) % BUCKETS
        added = self._added
        if not added:
            added += [0] * BUCKETS
        if merges:
            found = self._found.get(key)
            if found is not None and added[bucket] - found[1] < MERGE_DEPTH:
                found[0].mask |= mask
                return False
        events = self._events
        waiting = len(events)
        if waiting - self.questions >= self.limit:
            return self.lose(1, (event.dir or obj,))
        number = added[bucket] = added[bucket] + 1
        copy: Event = event.__copy__()  # type: ignore[attr-defined]
        copy.mask = mask
        if merges:
            self._found[key] = (copy, number)
            events.append((copy, key))
        else:
            events.append((copy, None))
        self._lost = None
        return not (waiting or self.errors.queued)

    def add_error(self, event: ErrorEvent, scope: str) -> bool:
        """Take an error in, however full the queue is.

        Whether the queue was empty, and a reader has to be woken.
        """
        if self.stopped:
            return False
        waiting = len(self)
        self.errors.add(event, scope, self._out + len(self._events))
        return not waiting

    def put(self, event: PermissionEvent) -> None:
        """Queue a permission event itself, however full the queue is."""
        self._events.append((event, None))
        self.questions += 1
        self._lost = None

    def put_back(self, event: PermissionEvent) -> None:
        """Put a permission event that was taken back to the head, older ones before it."""
        events, at = self._events, 0
        while at < len(events):
            before = events[at][0]
            if type(before) is not PermissionEvent or before.number > event.number:
                break
            at += 1
        events.insert(at, (event, None))
        self.questions += 1
        self._out -= 1  # so that errors stay behind what they were behind

    def remove(self, event: PermissionEvent) -> None:
        """Take a queued permission event out: nobody waits for it any more."""
        at = next(n for n, (queued, _) in enumerate(self._events) if queued is event)
        del self._events[at]
        self.questions -= 1
        self.errors.moved_up(self._out + at)

    def lose(self, count: int | None, roots: tuple[bytes | None, ...] | None) -> bool:
        """Tell of ``count`` events lost below ``roots``, None where unknown.

        Whether the queue was empty, and a reader has to be woken.
        """
        if self.stopped:
            return False
        lost = self._lost
        if lost is None:
            lost = self._lost = Event(Q_OVERFLOW, count=0, roots=())
            self._roots.clear()
            self._events.append((lost, None))
        lost.count = None if count is None or lost.count is None else lost.count + count
        if roots is None or None in roots:
            lost.roots = None
        elif lost.roots is not None:
            new = [root for root in roots if root is not None and root not in self._roots]
            self._roots.update(new)
            lost.roots = (*lost.roots, *new) if len(self._roots) <= MOST_ROOTS else None
        return len(self) == 1

    def pop(self, most: int | None = None) -> list[Event]:
        """Take up to ``most`` events out (None: all), oldest first; they are the caller's."""
        if not self.errors.queued:
            return self._pop(most)
        # Nothing is taken before everything is copied.
        out: list[Event] = []
        events, slot, errors = iter(self._events), self.errors.first, 0
        while most is None or len(out) < most:
            if slot is not None and slot.behind <= self._out + len(out) - errors:
                out.append(slot.event.__copy__())  # type: ignore[attr-defined]
                slot, errors = slot.next, errors + 1
                continue
            entry = next(events, None)
            if entry is None:
                break
            out.append(entry[0])
        self._pop(len(out) - errors)
        self.errors.deliver(errors)
        return out

    def take(self, most: int | None = None) -> tuple[list[Event], Slot | None]:
        """Take events out as `pop` does, up to the first error, which is taken in its slot."""
        slot = self.errors.first
        if slot is None:
            return self._pop(most), None
        before = max(0, slot.behind - self._out)  # one that was put back may be late
        if most is not None and most <= before:
            return self._pop(most), None
        out = self._pop(before)
        slot = self.errors.take()
        out.append(slot.event)
        return out, slot

    def _pop(self, most: int | None) -> list[Event]:
        events, found = self._events, self._found
        if most is None or most >= len(events):
            out = [event for event, _ in events]
            events.clear()
            found.clear()
            self._lost = None
            self._out += len(out)
            self.questions = 0
            return out
        out = []
        for _ in range(most):
            event, key = events.popleft()
            if key is not None and found[key][0] is event:
                del found[key]
            out.append(event)
        self._out += most
        if self.questions:
            self.questions -= sum(type(event) is PermissionEvent for event in out)
        return out

    def flush(self) -> None:
        """Free every event but the overflows; errors that nobody read are counted as abandoned."""
        self.errors.flush()
        self._events = deque(entry for entry in self._events if entry[0].mask & Q_OVERFLOW)
        self._found.clear()

    def free_overflow(self) -> None:
        """Free the overflows, and what counts for the next one."""
        self._events.clear()
        self._lost = None
        self._roots.clear()
