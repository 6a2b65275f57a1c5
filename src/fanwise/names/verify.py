"""Verify: what the merges of a window left open, looked up once each and corrected.

The kernel merges an event into an unread record of the same name, object and process, also across
records of other names: the order of two names of one object is then unknowable. That is so only for
an object (a) whose renames in the window form a cycle of names, or (b) with two or more name
records, or creation and deletion in one, whose link count was reported and which is not gone. These
are looked up after the window; a correction tells what differs.
"""

from typing import TYPE_CHECKING, Any

from fanwise.kernel import _pure_tree as flags
from fanwise.kernel._pure_decode import (
    CREATE,
    DELETE,
    N_ATTRIB,
    N_BOTH,
    N_DIR,
    N_GONE,
    ONDIR,
    RENAME,
    Record,
)

if TYPE_CHECKING:
    from .resolver import Resolver

_BOTH = CREATE | DELETE
Name = tuple[bytes | None, bytes | None]


def cycles(records: list[Record]) -> bool:
    """Say whether the renames among these records lead from a name back to itself."""
    edges: dict[Name, set[Name]] = {}
    for record in records:
        if record[0] & RENAME:
            edges.setdefault((record[3], record[4]), set()).add((record[5], record[6]))
    for start in edges:
        seen: set[Name] = set()
        todo = list(edges[start])
        while todo:
            name = todo.pop()
            if name == start:
                return True
            if name not in seen:
                seen.add(name)
                todo += edges.get(name, ())
    return False


class Verifier:
    """Finds the objects of a window whose order is unknowable, and settles them."""

    def __init__(self, resolver: "Resolver") -> None:
        self._r = resolver
        self.reset()

    def reset(self) -> None:
        """Forget what is unsettled: records were lost, and the loss was told."""
        # Name records of windows that ended without an empty queue, or whose objects were named
        # again while they were looked up: object -> records.
        self._carried: dict[bytes, list[Record]] = {}
        self._flags: dict[bytes, int] = {}
        self._doubtful: dict[bytes, list[Record]] = {}
        self._both: dict[tuple[bytes, bytes, bytes], bool] = {}

    def told_both(self, key: bytes, directory: bytes, name: bytes, exists: bool) -> None:
        """Note how a creation and deletion in one record was told to have ended."""
        self._both[key, directory, name] = exists

    def begin(self) -> None:
        """Look at a window before it is decoded."""
        decoder = self._r.decoder
        self._doubtful = {}
        suspects = {key: notes for key, notes, _, _ in decoder.suspects()}
        for key in self._carried:
            notes, names, _ = decoder.notes(key)
            if names or notes:
                suspects[key] = notes
        if not suspects:
            return
        grouped: dict[bytes, list[Record]] = {
            key: list(self._carried.get(key, ())) for key in suspects
        }
        for record in decoder.name_records(suspects):
            if record[7] is not None:
                grouped[record[7]].append(record)
        for key, records in grouped.items():
            notes = suspects[key] | self._flags.get(key, 0)
            if self._open_question(notes, records):
                self._doubtful[key] = records
                at = self._r.tree.find(key) if notes & N_DIR else -1
                if at >= 0:
                    self._r.mark_current(at)

    @staticmethod
    def _open_question(notes: int, records: list[Record]) -> bool:
        if notes & N_GONE:
            return False
        if cycles(records):
            return True
        many = len(records) >= 2 or bool(notes & N_BOTH)
        return many and bool(notes & N_ATTRIB) and not notes & N_DIR

    def end(self, rows: list[Any], drained: bool) -> None:
        """Settle a window after it is decoded."""
        doubtful, self._doubtful = self._doubtful, {}
        decoder = self._r.decoder
        again: set[bytes] = set()
        if doubtful:
            seen = {key: self._look(key, records) for key, records in doubtful.items()}
            self._r.sync()
            again = {r[7] for r in self._r.later_names(set(doubtful)) if r[7] is not None}
            for key, records in doubtful.items():
                if key not in again:
                    self._correct(rows, key, records, seen[key])
        if not drained:
            for record in decoder.name_records(None):
                if record[7] is not None and record[7] not in doubtful:
                    self._carried.setdefault(record[7], []).append(record)
                    self._flags[record[7]] = (
                        self._flags.get(record[7], 0) | decoder.notes(record[7])[0]
                    )
        else:
            self._carried = {}
            self._flags = {}
        for key in again:
            self._carried[key] = doubtful[key]
            self._flags[key] = decoder.notes(key)[0]
        if drained and not again:
            self._both.clear()

    # -- one object --

    def _look(self, key: bytes, records: list[Record]) -> Any:
        if records[-1][0] & ONDIR:
            way = self._r.lookup.locate(key, lambda _: True)
            return way[0][1:] if way else None
        names = {n for r in records for n in ((r[3], r[4]), (r[5], r[6])) if n[0] and n[1]}
        return {(d, n): self._r.lookup.leads_to(d, n, key) for d, n in names}

    def _correct(self, rows: list[Any], key: bytes, records: list[Record], seen: Any) -> None:
        last = records[-1]
        if last[0] & ONDIR:
            self._correct_directory(rows, key, last, seen)
            return
        told: dict[Name, bool] = {}
        for record in records:
            old: Name = (record[3], record[4])
            if record[0] & RENAME:
                told[old] = False
                told[record[5], record[6]] = True
            elif record[0] & _BOTH == _BOTH:
                told[old] = self._both.get((key, old[0] or b"", old[1] or b""), False)
            else:
                told[old] = bool(record[0] & CREATE)
        missing = [n for n, there in told.items() if not there and seen.get(n) is True]
        extra = [n for n, there in told.items() if there and seen.get(n, True) is None]
        if len(missing) == 1 and len(extra) == 1:
            self._tell(rows, last, RENAME, missing[0], extra[0], key)
            return
        for name in missing:
            self._tell(rows, last, CREATE, name, None, key)
        for name in extra:
            self._tell(rows, last, DELETE, name, None, key)

    def _correct_directory(self, rows: list[Any], key: bytes, last: Record, seen: Any) -> None:
        tree = self._r.tree
        at = tree.find(key)
        if seen is None or at < 0 or seen[0] is None:
            return
        parent, name, _, _, _ = tree.info(at)
        held = (tree.info(parent)[3] if parent >= 0 else None, name)
        if held == tuple(seen) or tree.find(seen[0]) < 0:
            return
        tree.flag(at, 0, flags.CURRENT)
        tree.move(at, tree.find(seen[0]), seen[1])
        self._tell(rows, last, RENAME, seen, held, key)
        self._r.dirs.want_scan(at)

    def _tell(
        self, rows: list[Any], last: Record, bits: int, name: Name, old: Name | None, key: bytes
    ) -> None:
        place = self._r.where(name[0], name[1] or b"")
        before = self._r.where(old[0], old[1] or b"") if old else None
        if old is not None and before is not None and before[0]:
            if place is None or not place[0]:
                self._r.tell(rows, last, DELETE, before[1], None, before[2], correction=True)
                return
            self._r.tell(rows, last, RENAME, place[1], before[1], place[2], correction=True)
            return
        if place is not None and place[0]:
            bits = CREATE if bits & RENAME else bits
            self._r.tell(rows, last, bits, place[1], None, place[2], key=key, correction=True)
