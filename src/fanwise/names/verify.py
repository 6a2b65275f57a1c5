"""Verify: what the merges of a window left open, looked up once each and corrected.

The kernel merges an event into an unread record of the same name, object and process, also across
records of other names: the order of two names of one object is then unknowable. That is so only for
an object
(a) to which a rename gives a name that an earlier rename of the window took from it (a cycle),
(b) with two or more name records, or creation and deletion in one, whose link count was reported
    and which is not gone,
(c) which is gone, while its records, replayed in order, leave it a name.
These are looked up after the window; a correction tells what differs.
"""

from typing import TYPE_CHECKING, Any

from fanwise.kernel import contract as flags
from fanwise.kernel.contract import (
    CREATE,
    DELETE,
    N_ATTRIB,
    N_BOTH,
    N_DIR,
    N_GONE,
    NOTE_NAMES,
    NOTE_SELF,
    ONDIR,
    RENAME,
    Record,
)

from .bypath import PathLookup
from .intake import EVERYTHING
from .lookup import CannotLook

if TYPE_CHECKING:
    from .resolver import Resolver

_BOTH = CREATE | DELETE
# So many bytes ahead, a look would most likely show what is not decoded yet: it waits.
_BEHIND = 1 << 20
Name = tuple[bytes, bytes]  # directory key, name


def names_of(record: Record) -> list[Name]:
    """The names in a record: of a rename the old one, then the new one."""
    names = []
    if record[3] is not None and record[4] is not None:
        names.append((record[3], record[4]))
    if record[5] is not None and record[6] is not None:
        names.append((record[5], record[6]))
    return names


def _one_sided(record: Record) -> bool:
    # Of marks on single directories, when the other directory has none.
    return bool(record[0] & RENAME) and (record[3] is None or record[5] is None)


def _is_dir(records: list[Record]) -> bool:
    return bool(records[-1][0] & ONDIR)


def comes_back(records: list[Record]) -> bool:
    """Say whether a rename among these records gives an object a name that an earlier one took.

    Every cycle of names does; so does a rename of another hard link to a name that was left.
    """
    left: set[Name] = set()
    for record in records:
        names = names_of(record)
        if record[0] & RENAME and len(names) == 2:
            if names[1] in left:
                return True
            left.add(names[0])
    return False


class Verifier:
    """Finds the objects of a window whose order is unknowable, and settles them."""

    def __init__(self, resolver: "Resolver") -> None:
        self._r = resolver
        lookup = resolver.lookup
        self._paths = lookup if isinstance(lookup, PathLookup) else None
        self.reset()

    def reset(self) -> None:
        """Forget what is unsettled: records were lost, and the loss was told."""
        # Name records of windows that ended without an empty queue, or whose objects were named
        # again while they were looked up: object -> records.
        self._carried: dict[bytes, list[Record]] = {}
        self._flags: dict[bytes, int] = {}
        self._again: set[bytes] = set()  # those that were named again
        self._doubtful: dict[bytes, list[Record]] = {}
        self._both: dict[tuple[bytes, bytes, bytes], bool] = {}
        self._gone: set[Name] = set()  # told to lead to nothing, whatever the records say

    def unsettled(self) -> dict[bytes, int]:
        """The directories of what is unsettled, as a drain notes them: a loss makes it theirs."""
        out: dict[bytes, int] = {}
        for records in self._carried.values():
            for record in records:
                for directory, _ in names_of(record):
                    out[directory] = out.get(directory, 0) | NOTE_NAMES
                if record[0] & ONDIR and record[7] is not None:
                    out[record[7]] = out.get(record[7], 0) | NOTE_SELF
        return out

    @property
    def carries(self) -> bool:
        """Whether something is unsettled from one window to the next."""
        return bool(self._carried)

    def told_both(self, key: bytes, directory: bytes, name: bytes, exists: bool) -> None:
        """Note how a creation and deletion in one record was told to have ended."""
        self._both[key, directory, name] = exists
        self._r.repair.told(directory, name, key if exists else None)

    def told_gone(self, directory: bytes, name: bytes, record: Record) -> None:
        """Note that a directory's name was told to have gone at a record that does not say so."""
        self._gone.add((directory, name))
        self._r.repair.told_gone(directory, name, record)

    def told_back(self, directory: bytes, name: bytes) -> None:
        """Note that a record says that it is there again."""
        self._gone.discard((directory, name))

    def begin(self) -> None:
        """Look at a window before it is decoded."""
        decoder = self._r.decoder
        self._doubtful = {}
        if self._paths is not None and not self._carried:
            self._begin_blind(self._paths)
            return
        suspects = {key: notes for key, notes, _, _ in decoder.suspects()}
        for key in self._carried:
            notes, names, _ = decoder.notes(key)
            if names or notes or key in self._again:
                suspects[key] = notes
        if not suspects:
            return
        grouped: dict[bytes, list[Record]] = {
            key: list(self._carried.get(key, ())) for key in suspects
        }
        for record in decoder.name_records(suspects):
            if record[7] is not None:
                grouped[record[7]].append(record)
        if self._paths is not None:
            files = {
                key: records
                for key, records in grouped.items()
                if not (suspects[key] | self._flags.get(key, 0)) & N_DIR
            }
            for key in self._doubts(self._paths, files) | (self._again & files.keys()):
                self._doubtful[key] = files[key]
            grouped = {key: grouped[key] for key in grouped.keys() - files.keys()}
        self._judge(grouped, suspects)

    def _begin_blind(self, paths: PathLookup) -> None:
        # No link counts here, and most windows by far carry nothing over: the decoder itself says
        # what there is to ask of their files.
        decoder = self._r.decoder
        files, dirs, gone = decoder.doubts()
        doubts = set(files)
        for directory, names in paths.present(gone) if gone else ():
            doubts.update(gone[directory][name] for name in names)
        notes = dict(dirs)
        if not doubts and not notes:
            return
        grouped: dict[bytes, list[Record]] = {key: [] for key in notes}
        self._doubtful = {key: [] for key in files}
        self._doubtful.update((key, []) for key in doubts)
        for record in decoder.name_records({*doubts, *notes}):
            (grouped if record[7] in notes else self._doubtful)[record[7]].append(record)
        self._judge(grouped, notes)

    def _judge(self, grouped: dict[bytes, list[Record]], suspects: dict[bytes, int]) -> None:
        for key, records in grouped.items():
            notes = suspects[key] | self._flags.get(key, 0)
            if key in self._again or self._open_question(key, notes, records):
                self._doubtful[key] = records
                at = self._r.tree.find(key) if notes & N_DIR else -1
                if at >= 0:
                    self._r.mark_current(at)

    def _open_question(self, key: bytes, notes: int, records: list[Record]) -> bool:
        if notes & N_GONE:
            return any(self._told(key, records).values())
        if comes_back(records):
            return True
        if notes & N_DIR and any(map(_one_sided, records)):
            names = [name for record in records for name in names_of(record)]
            return len(set(names)) < len(names)
        many = len(records) >= 2 or bool(notes & N_BOTH)
        return many and bool(notes & N_ATTRIB) and not notes & N_DIR

    def _doubts(self, paths: PathLookup, grouped: dict[bytes, list[Record]]) -> set[bytes]:
        # No link counts here. A name in one record alone, of one kind, hides no other; one that
        # was last told to have gone, and leads to nothing, has gone. In line, and a directory at a
        # time: it is of every file that is renamed or removed in the window that it was made in.
        doubts: set[bytes] = set()
        gone: dict[bytes, dict[bytes, bytes]] = {}  # directory -> name -> object
        for key, records in grouped.items():
            held: dict[Name, bool] = {}
            again: set[Name] = set()
            for mask, _, _, directory, name, directory2, name2, _, _ in records:
                if directory is not None and name is not None:
                    old = directory, name
                    if old in held:
                        again.add(old)
                    if mask & _BOTH == _BOTH:
                        doubts.add(key)
                    held[old] = bool(mask & CREATE)
                if directory2 is not None and name2 is not None:
                    new = directory2, name2
                    if new in held:
                        again.add(new)
                    held[new] = True
            for each in again:
                if held[each]:
                    doubts.add(key)
                else:
                    gone.setdefault(each[0], {})[each[1]] = key
        for directory, present in paths.present(gone):
            doubts.update(gone[directory][name] for name in present)
        return doubts

    def end(self, rows: list[Any], drained: bool) -> None:
        """Settle a window after it is decoded."""
        doubtful, self._doubtful = self._doubtful, {}
        decoder = self._r.decoder
        again: set[bytes] = set()
        seen = self._look(doubtful) if doubtful and self._r.intake.bytes <= _BEHIND else None
        if seen is None:
            again |= doubtful.keys()
        else:
            names, ways, truth = seen
            self._r.intake.sync()
            if self._r.intake.gap or self._r.intake.blind:
                again |= doubtful.keys()  # the loss is of their directories, see unsettled()
            # Named again since: what was seen is newer than the records. The next window settles.
            for record in self._r.intake.names(EVERYTHING):
                if record[7] in doubtful or not names.isdisjoint(names_of(record)):
                    again |= doubtful.keys()
                    break
            if not again:
                self._correct(rows, doubtful, ways, truth)
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
        self._again = again
        for key in again:
            self._carried[key] = doubtful[key]
            self._flags[key] = decoder.notes(key)[0]
        if drained and not again:
            self._both.clear()
            self._gone.clear()

    def _look(
        self, doubtful: dict[bytes, list[Record]]
    ) -> tuple[set[Name], dict[bytes, Name | None], dict[Name, bytes | None]] | None:
        # Where the objects are and what their names lead to; None when that cannot be seen now.
        names = {
            name for records in doubtful.values() for record in records for name in names_of(record)
        }
        moved = [key for key, records in doubtful.items() if _is_dir(records)]
        if self._paths is not None:
            self._paths.hints = {
                key: [n for record in reversed(doubtful[key]) for n in reversed(names_of(record))]
                for key in moved
            }
        try:
            truth = {name: self._r.lookup.key_of(*name) for name in names}
            if self._paths is None:
                return names, {key: self._way(key) for key in moved}, truth
            at = {key: name for name, key in truth.items() if key is not None}
            return names, {key: at.get(key) for key in moved}, truth
        except CannotLook:
            return None
        finally:
            if self._paths is not None:
                self._paths.hints = {}

    def _way(self, key: bytes) -> Name | None:
        way = self._r.lookup.locate(key, lambda _: True)
        if not way or way[0][1] is None:
            return None
        return way[0][1], way[0][2]

    def _correct(
        self,
        rows: list[Any],
        doubtful: dict[bytes, list[Record]],
        ways: dict[bytes, Name | None],
        truth: dict[Name, bytes | None],
    ) -> None:
        # What a consumer believes of these names, who took the changes in the order told.
        told: dict[Name, bytes | None] = {}
        ordered = [r for records in self._carried.values() for r in records]
        for record in [*ordered, *self._r.decoder.name_records(EVERYTHING)]:
            for name, key in self._told(record[7] or b"", [record]).items():
                if name in truth:
                    told[name] = key
        files = self._r.files
        for name, found in truth.items():
            self._r.repair.told(*name, found)
        told.update((name, None) for name in self._gone if name in truth)
        for key, way in ways.items():
            last = doubtful[key][-1]
            if way is None and self._paths is not None:
                self._lost_sight(key)
            moved = self._correct_directory(rows, key, last, way)
            if moved:
                told[moved[0]], told[moved[1]] = None, key
                if files is not None:
                    files.corrected(*moved, True)
        missing = [n for n, key in truth.items() if key is not None and told.get(n, key) != key]
        extra = [n for n, key in truth.items() if key is None and told.get(n) is not None]
        last = list(doubtful.values())[-1][-1]
        if len(missing) == 1 and len(extra) == 1 and truth[missing[0]] == told[extra[0]]:
            record = doubtful.get(truth[missing[0]] or b"", [last])[-1]
            self._tell(rows, record, RENAME, missing[0], extra[0], truth[missing[0]] or b"")
            if files is not None:
                files.corrected(extra[0], missing[0], bool(record[0] & ONDIR))
            return
        for name in extra:
            key = told[name] or b""
            self._tell(rows, doubtful.get(key, [last])[-1], DELETE, name, None, key)
            if files is not None:
                files.corrected(name, None, False)
        for name in missing:
            key = truth[name] or b""
            record = doubtful.get(key, [last])[-1]
            self._tell(rows, record, CREATE, name, None, key)
            if files is not None:
                files.corrected(None, name, bool(record[0] & ONDIR))

    # -- one object --

    def _told(self, key: bytes, records: list[Record]) -> dict[Name, bytes | None]:
        # Which names lead to the object, after these records in their order.
        told: dict[Name, bytes | None] = {}
        for record in records:
            if record[3] is None or record[4] is None:
                for new in names_of(record):  # it came from where nothing is watched
                    told[new] = key
                continue
            old: Name = (record[3], record[4])
            if record[0] & RENAME:
                told[old] = None
                for new in names_of(record)[1:]:
                    told[new] = key
            elif record[0] & _BOTH == _BOTH:
                told[old] = key if self._both.get((key, *old)) else None
            else:
                told[old] = key if record[0] & CREATE else None
        return told

    def _lost_sight(self, key: bytes) -> None:
        # None of its names leads to it: it left for where nothing is watched, or is gone.
        at = self._r.tree.find(key)
        if at >= 0:
            self._r.tree.move(at, -1, self._r.tree.info(at)[1])

    def _correct_directory(
        self, rows: list[Any], key: bytes, last: Record, way: Name | None
    ) -> tuple[Name, Name] | None:
        # The names between which it was moved.
        tree = self._r.tree
        at = tree.find(key)
        if way is None or at < 0:
            return None
        parent, name, _, _, _ = tree.info(at)
        held = (tree.info(parent)[3] if parent >= 0 else b"", name)
        if held == way or tree.find(way[0]) < 0:
            return None
        before = self._r.teller.where(*held)
        tree.flag(at, 0, flags.CURRENT)
        if self._r.files is None:
            tree.move(at, tree.find(way[0]), way[1])
        else:
            was = self._r.dirs.inside(at)
            self._r.dirs.put(key, tree.find(way[0]), way[1])
            if was and not self._r.dirs.inside(at):
                self._r.files.left(at)
            elif not was and self._r.dirs.inside(at):
                self._r.dirs.entered.append(key)
        self._r.dirs.note_move(key, way[0])
        self._tell(rows, last, RENAME, way, held, key, before)
        self._r.dirs.want_scan(at)
        return held, way

    def _tell(
        self,
        rows: list[Any],
        last: Record,
        bits: int,
        name: Name,
        old: Name | None,
        key: bytes,
        before: tuple[bool, str, str] | None = None,
    ) -> None:
        place = self._r.teller.where(*name)
        if old is not None and before is None:
            before = self._r.teller.where(*old)
        inside = place is not None and place[0]
        was = before is not None and before[0]
        if old is not None and was and before is not None:
            if inside and place is not None:
                self._r.teller.tell(
                    rows, last, RENAME, place[1], before[1], place[2], key=key, correction=True
                )
            else:
                self._r.teller.tell(rows, last, DELETE, before[1], None, before[2], correction=True)
        elif inside and place is not None:
            bits = CREATE if bits & RENAME else bits
            self._r.teller.tell(
                rows, last, bits, place[1], None, place[2], key=key, correction=True
            )
