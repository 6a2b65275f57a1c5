"""Decoder in Python: the twin of `_decode.c`, with the same answers.

A window is what was read until the queue was seen empty. `add` validates a chunk and notes what
happened to each object in it (pass 1); `decode` makes the changes in order (pass 2) and stops at
each record that needs a decision; the owner takes it with `record`, settles it, and goes on with
`advance`. One owner calls it; notes live until `finish`.
"""

import os
import struct
from collections.abc import Callable, Container
from sys import byteorder
from typing import Any

from fanwise._errors import DecodeError

from . import contract as pt
from ._pure_tree import Tree
from .contract import (
    ATTRIB,
    BOTH,
    CREATE,
    DELETE,
    DELETE_SELF,
    N_ATTRIB,
    N_BORN,
    N_BOTH,
    N_CREATE,
    N_DELETE,
    N_DIR,
    N_GONE,
    N_TWICE,
    N_UNKNOWN,
    NAMED,
    ONDIR,
    Q_OVERFLOW,
    RENAME,
    STOP_BOTH,
    STOP_DIR,
    STOP_FILES,
    STOP_HASH,
    STOP_NAMELESS,
    STOP_NONE,
    STOP_OVERFLOW,
    STOP_REPLACED,
    STOP_SELF,
    STOP_UNKNOWN,
    Record,
    kind_index,
)

_meta = struct.Struct("=IBBHQii").unpack_from
_info = struct.Struct("=BxH8xI").unpack_from
_head = struct.Struct("=BxH").unpack_from
_first = struct.Struct("=IBBHQiiBxH8xI").unpack_from  # _meta and the _info behind it
_KEYED = frozenset((1, 2, 3, 10, 12))  # infos with a file handle


def parse(data: bytes) -> list[tuple[int, Any, Any, Any, Any, Any, bool, int]]:
    """Records of one chunk: (mask, dir, name, dir2, name2, target, self event, pid).

    Lengths are multiples of 4, as the kernel makes them (FANOTIFY_EVENT_ALIGN), so an info header
    always fits. A handle of no bytes is no handle. Raises DecodeError for a malformed chunk, with
    the position of the record.
    """
    out = []
    off, size = 0, len(data)
    while off < size:
        if size - off < 44:  # the shortest record with a handle
            record, off = _parse_one(data, off)
            out.append(record)
            continue
        length, version, _, meta, mask, _, pid, kind, span, count = _first(data, off)
        if version != 3 or meta != 24 or not 44 <= length <= size - off or length & 3:
            record, off = _parse_one(data, off)
            out.append(record)
            continue
        at, end = off + 24, off + length
        dir1 = name1 = dir2 = name2 = target = None
        while True:
            stop = at + 20 + count
            after = at + span
            if kind not in _KEYED or stop > after or after > end or count > 128 or span & 3:
                at = -1  # anything but a handle that fits
                break
            key = data[at + 16 : stop] if count else None
            if kind == 1:
                target = key
            elif kind == 3:
                dir1, name1 = key, b""
            else:
                nul = data.find(b"\0", stop, after)
                if nul < 0:
                    nul = after
                if kind == 12:
                    dir2, name2 = key, data[stop:nul]
                else:
                    dir1, name1 = key, data[stop:nul]
            at = after
            if at == end:
                break
            if end - at < 20:
                at = -1
                break
            kind, span, count = _info(data, at)
        if at < 0:
            record, off = _parse_one(data, off)
            out.append(record)
            continue
        if name1 is None and dir2 is not None and mask & RENAME:
            mask, dir1, name1, dir2, name2 = _one_sided(mask, dir2, name2)
        itself = target is None and (name1 == b"." or name1 == b"")
        out.append((mask, dir1, name1, dir2, name2, target, itself, pid))
        off = end
    return out


def _parse_one(data: bytes, off: int) -> tuple[Any, int]:
    # Any record, checked step by step: the record and where it ends.
    size = len(data)
    if size - off < 24:
        raise DecodeError(off, "record header is cut short")
    length, version, _, meta, mask, _, pid = _meta(data, off)
    if length < 24 or length > size - off or length % 4:
        raise DecodeError(off, "record length does not fit")
    if version != 3:
        raise DecodeError(off, "metadata version is not 3")
    if meta < 24 or meta > length or meta % 4:
        raise DecodeError(off, "metadata length does not fit")
    at, end = off + meta, off + length
    dir1 = name1 = dir2 = name2 = target = None
    while at < end:
        kind, span = _head(data, at)
        if span < 4 or span > end - at or span % 4:
            raise DecodeError(off, "info length does not fit")
        if kind in _KEYED:
            if span < 20:
                raise DecodeError(off, "file handle is cut short")
            _, _, count = _info(data, at)
            if count > 128 or 20 + count > span:
                raise DecodeError(off, "file handle does not fit")
            stop = at + 20 + count
            key = data[at + 16 : stop] if count else None
            if kind == 1:
                target = key
            else:
                if kind == 3:
                    name = b""
                else:
                    nul = data.find(b"\0", stop, at + span)
                    name = data[stop : nul if nul >= 0 else at + span]
                if kind == 12:
                    dir2, name2 = key, name
                else:
                    dir1, name1 = key, name
        at += span
    if name1 is None and dir2 is not None and mask & RENAME:
        mask, dir1, name1, dir2, name2 = _one_sided(mask, dir2, name2)
    itself = target is None and (name1 == b"." or name1 == b"")
    return (mask, dir1, name1, dir2, name2, target, itself, pid), end


def _one_sided(mask: int, dir2: bytes, name2: Any) -> tuple[int, Any, Any, Any, Any]:
    # Marks on single directories: what came from a directory without one has no old name.
    if mask & ONDIR:
        return mask, None, b"", dir2, name2
    return mask & ~RENAME | CREATE, dir2, name2, None, None


def _identity(device: str, key: bytes | None) -> str | None:
    if key is None:
        return None
    return f"{device}/{int.from_bytes(key[:4], byteorder):x}/{key[4:].hex()}"


def _is_tmp(name: bytes) -> bool:
    return len(name) > 1 and name[0] == 35 and name[1:].isdigit() and name.isascii()


class _Note:
    __slots__ = ("deldir", "delname", "flags", "names", "renames")

    def __init__(self) -> None:
        self.flags = self.names = self.renames = 0
        self.deldir: bytes | None = None
        self.delname: bytes | None = None


class Decoder:
    """Records of one window to changes."""

    def __init__(
        self,
        tree: Tree,
        make: Callable[..., Any],
        kinds: list[tuple[str, ...]],
        want: int,
        device: str,
        pids: Container[int],
        gone: dict[bytes, set[bytes]],
        blind: bool = False,
    ) -> None:
        if not isinstance(tree, Tree) or len(kinds) != 512 or len(device) >= 32:
            raise TypeError("Decoder(Tree, make, list of 512, mask, device, pids, {})")
        self._tree, self._make, self._kinds = tree, make, kinds
        self._want, self._device, self._pids, self._gone = want, device, pids, gone
        self._blind = blind  # link counts are not reported
        self._by_mask: dict[int, tuple[str, ...]] = {}
        self._busy = False  # other code runs: nothing may change the window under it
        self._clear()

    def _clear(self) -> None:
        self._recs: list[Any] = []
        self._times: list[tuple[int, float]] = []  # (first record of the chunk, its time)
        self._at = 0
        self._notes: dict[bytes, _Note] = {}
        self._dirrecs: list[int] = []
        self._victim: bytes | None = None

    @property
    def pending(self) -> bool:
        """Whether records are left in the window."""
        return self._at < len(self._recs)

    @property
    def records(self) -> int:
        """Records added to the window."""
        return len(self._recs)

    # -- pass 1 --

    def add(self, data: bytes, time: float) -> int:
        """Validate a chunk and note it; its records."""
        self._refuse_busy()
        recs = parse(data)
        self._times.append((len(self._recs), time))
        notes, index = self._notes, self._tree._index
        first = len(self._recs)
        self._recs += recs
        fresh = _Note
        for number, (mask, dir1, name1, dir2, _, target, itself, _) in enumerate(recs, first):
            if name1 is None:  # no name: link counts and last closes
                if target is not None and mask & (ATTRIB | DELETE_SELF) and not mask & Q_OVERFLOW:
                    note = notes.get(target)
                    if note is None:
                        note = notes[target] = fresh()
                    note.flags |= (N_ATTRIB if mask & ATTRIB else 0) | (
                        N_GONE if mask & DELETE_SELF else 0
                    )
                continue
            if mask & Q_OVERFLOW:
                continue
            if dir1 is not None and dir1 not in index:
                self._note_unknown(dir1)
            if dir2 is not None and dir2 not in index:
                self._note_unknown(dir2)
            if itself:
                if dir1 is not None and mask & DELETE_SELF:
                    notes.setdefault(dir1, fresh()).flags |= N_GONE | N_DIR
            elif mask & NAMED and target is not None:
                if mask & ONDIR:
                    self._dirrecs.append(number)
                elif self._outside(dir1, dir2):
                    continue
                note = notes.get(target)
                if note is None:
                    note = notes[target] = fresh()
                if note.flags & N_DELETE or (mask & CREATE and note.names):
                    note.flags |= N_TWICE
                note.names = min(note.names + 1, 0xFFFF)
                if mask & ONDIR:
                    note.flags |= N_BORN | N_DIR
                if mask & RENAME:
                    note.renames = min(note.renames + 1, 0xFFFF)
                if mask & CREATE:
                    note.flags |= N_CREATE
                if mask & DELETE:
                    note.flags |= N_DELETE | (N_BOTH if mask & CREATE else 0)
        return len(recs)

    def _refuse_busy(self) -> None:
        if self._busy:
            raise RuntimeError("the decoder is in use")

    def _note_unknown(self, key: bytes) -> None:
        note = self._notes.get(key)
        if note is None:
            note = self._notes[key] = _Note()
        if not note.flags & N_BORN:
            note.flags |= N_UNKNOWN

    def _outside(self, *keys: bytes | None) -> bool:
        # An unknown directory may turn out to be inside.
        for key in keys:
            if key is not None:
                scope, _ = self._path(key)
                if scope is None or scope & (pt.IN | pt.IN_FILES):
                    return False
        return True

    def _path(self, key: bytes) -> tuple[int | None, str]:
        hit = self._tree.paths.get(key)
        if hit is not None:
            return hit
        at = self._tree._index.get(key)
        if at is None:
            return None, ""
        scope, path = self._tree.resolve(at)
        hit = self._tree.paths[key] = scope, os.fsdecode(path) + "/"
        return hit

    def unknown(self) -> list[bytes]:
        """Keys of directories that nothing explains."""
        return [key for key, note in self._notes.items() if note.flags & N_UNKNOWN]

    def suspects(self) -> list[tuple[bytes, int, int, int]]:
        """(key, notes, names, renames) of objects whose order may be unknowable."""
        return [
            (key, n.flags, n.names, n.renames)
            for key, n in self._notes.items()
            if (self._blind and not n.flags & N_DIR and (n.names >= 2 or n.flags & N_BOTH))
            or n.renames >= 2
            or (n.flags & N_GONE and n.flags & N_TWICE)
            or ((n.names >= 2 or n.flags & N_BOTH) and n.flags & N_ATTRIB and not n.flags & N_GONE)
        ]

    def notes(self, key: bytes) -> tuple[int, int, int]:
        """(notes, names, renames) of an object."""
        note = self._notes.get(key)
        return (note.flags, note.names, note.renames) if note else (0, 0, 0)

    def _time(self, number: int) -> float:
        time = 0.0
        for first, when in self._times:
            if first > number:
                break
            time = when
        return time

    def _tuple(self, number: int, victim: bytes | None = None) -> Record:
        mask, dir1, name1, dir2, name2, target, _, pid = self._recs[number]
        if dir2 is None:
            name2 = None
        return mask, pid, self._time(number), dir1, name1, dir2, name2, target, victim

    def dir_records(self) -> list[Record]:
        """Name records of directories, in order."""
        return [self._tuple(number) for number in self._dirrecs]

    def name_records(self, wanted: Container[bytes] | None) -> list[Record]:
        """Name records in order: of some objects, or of all that may still be there."""
        self._refuse_busy()
        self._busy = True
        try:
            return self._name_records(wanted)
        finally:
            self._busy = False

    def _name_records(self, wanted: Container[bytes] | None) -> list[Record]:
        out = []
        for number, (mask, _, _, _, _, target, _, _) in enumerate(self._recs):
            if not mask & NAMED or target is None:
                continue
            if wanted is None:
                note = self._notes.get(target)
                if note is None or note.flags & N_GONE:
                    continue
            elif target not in wanted:
                continue
            out.append(self._tuple(number))
        return out

    def records_in(self, wanted: Container[bytes]) -> list[Record]:
        """Name records in order: of some directories."""
        self._refuse_busy()
        self._busy = True
        try:
            return [
                self._tuple(number)
                for number, (mask, dir1, _, dir2, _, target, _, _) in enumerate(self._recs)
                if mask & NAMED and target is not None
                if (dir1 is not None and dir1 in wanted) or (dir2 is not None and dir2 in wanted)
            ]
        finally:
            self._busy = False

    # -- pass 2 --

    def plain(
        self, data: bytes, time: float, limit: int
    ) -> tuple[list[Any], int, list[tuple[bytes, bytes, bytes]] | None] | None:
        """Add, decode and finish a whole window, where nothing in it needs a look.

        None: it does, and the window is open, noted and not decoded. Else (changes, stop, what
        finish() gives, or None when the window is still open).
        """
        self.add(data, time)
        if self.unknown() or self.suspects():
            return None
        rows, stop = self.decode(limit)
        return rows, stop, None if stop or self.pending else self.finish()

    def decode(self, limit: int) -> tuple[list[Any], int]:
        """(changes, stop) of the next slice."""
        self._refuse_busy()
        self._busy = True
        try:
            return self._slice(limit)
        finally:
            self._busy = False

    def _slice(self, limit: int) -> tuple[list[Any], int]:
        rows: list[Any] = []
        append, make, want, device = rows.append, self._make, self._want, self._device
        paths, by_mask, notes, pids = self._tree.paths, self._by_mask, self._notes, self._pids
        gone, recs, fsdecode, from_bytes = self._gone, self._recs, os.fsdecode, int.from_bytes
        odd = Q_OVERFLOW | ONDIR
        count = len(recs)
        at = self._at
        last = min(count, at + limit * 8)
        time, change_at = self._clock(at)
        self._victim = None
        try:
            while at < last and len(rows) < limit:
                if at >= change_at:
                    time, change_at = self._clock(at)
                mask, dir1, name1, dir2, name2, target, itself, pid = rec = recs[at]
                # The common records in line: files in known directories inside the roots, and what
                # has no name. Whatever is not plain goes through _step, which has all the rules.
                if name1 is None:
                    if not mask & (want & ~ATTRIB | Q_OVERFLOW) and not gone:
                        at += 1
                        continue
                elif not mask & odd and mask & BOTH != BOTH and target and not gone and not itself:
                    hit = paths.get(dir1) or self._path(dir1)
                    note = notes.get(target)
                    if hit[0] == pt.IN and (note is None or note.delname is None):
                        bits = mask & want
                        path = old = None
                        if mask & RENAME:
                            to = paths.get(dir2) or self._path(dir2)
                            after = recs[at + 1] if at + 1 < count else rec
                            plain = after[7] == pid and (after[2] is not None or after[5] == target)
                            if to[0] == pt.IN and plain:
                                path, old = to[1] + fsdecode(name2), hit[1] + fsdecode(name1)
                                bits = bits and RENAME
                        elif mask & BOTH or name1[:1] != b"#":
                            if mask & DELETE and note is not None:
                                note.deldir, note.delname = dir1, name1
                            path = hit[1] + fsdecode(name1)
                        if path is not None:
                            if bits and pid not in pids:
                                kind = from_bytes(target[:4], byteorder)
                                append(
                                    make(
                                        by_mask.get(bits) or self._kind(bits),
                                        path,
                                        old,
                                        False,
                                        pid,
                                        f"{device}/{kind:x}/{target[4:].hex()}",
                                        time,
                                        "exact",
                                    )
                                )
                            at += 1
                            continue
                self._at = at
                stop = self._step(rec, time, rows)
                if stop:
                    return rows, stop
                at += 1
        finally:
            self._at = at
        return rows, STOP_NONE

    def _clock(self, number: int) -> tuple[float, int]:
        # The time of the chunk that a record is in, and where the next chunk begins.
        time, until = 0.0, len(self._recs)
        for first, when in self._times:
            if first > number:
                until = first
                break
            time = when
        return time, until

    def _kind(self, bits: int) -> tuple[str, ...]:
        kinds = self._by_mask[bits] = self._kinds[kind_index(bits)]
        return kinds

    def _step(self, rec: Any, time: float, rows: list[Any]) -> int:
        mask, dir1, name1, dir2, name2, target, itself, pid = rec
        bits = mask & self._want
        self._victim = None
        if mask & Q_OVERFLOW:
            return STOP_OVERFLOW
        if name1 is None:
            if mask & DELETE_SELF and target is not None:
                self._gone.pop(target, None)
            return STOP_NAMELESS if bits & ~ATTRIB and target is not None else 0
        quiet = pid in self._pids
        scope, prefix = self._path(dir1) if dir1 is not None else (None, "")
        if itself:
            if mask & (ATTRIB | DELETE_SELF):
                return STOP_SELF
            if not bits or quiet:
                return 0
            if scope is None:
                return STOP_UNKNOWN
            if scope & pt.IN:
                path = prefix[:-1] or "/"
                self._emit(rows, bits, path, None, True, pid, dir1, time, scope)
            return 0
        if mask & ONDIR and mask & NAMED:
            return STOP_DIR
        if scope is None:
            return STOP_UNKNOWN
        if mask & RENAME:
            scope2, prefix2 = self._path(dir2) if dir2 is not None else (None, "")
            if scope2 is None:
                return STOP_UNKNOWN
            if not (scope | scope2) & (pt.IN | pt.IN_FILES):
                return 0
            if (scope | scope2) & pt.IN_FILES:
                return STOP_FILES
            if target is not None:
                self._name_back(target, dir2, name2)
            self._victim = self._victim_of(target, pid)
            if self._victim is not None:
                return STOP_REPLACED
            if quiet:
                return 0
            if scope & scope2 & pt.IN:
                if not bits:
                    return 0
                path, old = prefix2 + os.fsdecode(name2), prefix + os.fsdecode(name1)
                self._emit(rows, RENAME, path, old, False, pid, target, time, scope | scope2)
                return 0
            if scope2 & pt.IN:
                bits, path, scope = CREATE, prefix2 + os.fsdecode(name2), scope2
            else:
                bits, path = DELETE, prefix + os.fsdecode(name1)
            if self._want & bits:
                self._emit(rows, bits, path, None, False, pid, target, time, scope)
            return 0
        if scope & pt.IN_FILES:
            return STOP_FILES
        if not scope & pt.IN:
            return 0
        exists: bool | None = None
        unlinked = False
        if mask & BOTH and target is not None:
            note = self._notes.get(target)
            if mask & BOTH == BOTH:
                if note is None or not note.flags & N_GONE:
                    return STOP_BOTH
                exists = False
            elif mask & CREATE:
                self._name_back(target, dir1, name1)
            if note is not None and mask & DELETE:
                note.deldir, note.delname = dir1, name1
        elif target is not None:
            note = self._notes.get(target)
            if note is not None and note.deldir == dir1 and note.delname == name1:
                unlinked = True
            else:
                unlinked = self._is_gone(target, dir1, name1)
        # A name that was deleted had been a name, and is not that of an O_TMPFILE file.
        if not unlinked and not mask & NAMED and _is_tmp(name1):
            return STOP_HASH
        if not bits or quiet:
            return 0
        if bits & BOTH != BOTH:
            exists = None
        path = prefix + os.fsdecode(name1)
        more = (None, unlinked, exists) if unlinked or exists is not None else ()
        is_dir = bool(mask & ONDIR)
        self._emit(rows, bits, path, None, is_dir, pid, target, time, scope, *more)
        return 0

    def _emit(
        self,
        rows: list[Any],
        bits: int,
        path: str,
        old: str | None,
        is_dir: bool,
        pid: int,
        key: bytes | None,
        time: float,
        scope: int,
        *more: Any,
    ) -> None:
        source = "current" if scope & pt.IN_CURRENT else "exact"
        kinds = self._by_mask.get(bits) or self._kind(bits)
        who = _identity(self._device, key)
        rows.append(self._make(kinds, path, old, is_dir, pid, who, time, source, *more))

    def _victim_of(self, target: bytes | None, pid: int) -> bytes | None:
        # The object that a rename put out of its name: its nameless ATTRIB is the next record of
        # that process, and is not the first half of an unlink or a link (ATTRIB, then DELETE or
        # CREATE). The owner decides; this only finds the candidate.
        found = None
        for mask, _, name1, _, _, other, _, who in self._recs[self._at + 1 : self._at + 65]:
            if who != pid or mask & Q_OVERFLOW:
                continue
            if found is not None:
                return None if mask & BOTH and other == found else found
            if name1 is not None or not mask & ATTRIB or other is None or other == target:
                return None
            found = other
        return found

    def _is_gone(self, key: bytes, directory: bytes, name: bytes) -> bool:
        names = self._gone.get(key)
        return names is not None and directory + name in names

    def _name_back(self, key: bytes, directory: bytes, name: bytes) -> None:
        note = self._notes.get(key)
        if note is not None and note.deldir == directory and note.delname == name:
            note.deldir = note.delname = None
        if self._gone and self._is_gone(key, directory, name):
            del self._gone[key]

    def record(self) -> Record:
        """The record at which decode() stopped."""
        if not self.pending:
            raise IndexError("no record left")
        return self._tuple(self._at, self._victim)

    def peek(self) -> Record | None:
        """The next record of the process whose record decode() stopped at."""
        pid = self._recs[self._at][7] if self.pending else None
        for number in range(self._at + 1, min(self._at + 65, len(self._recs))):
            if self._recs[number][7] == pid:
                return self._tuple(number)
        return None

    def advance(self) -> None:
        """Pass over that record."""
        self._refuse_busy()
        if self.pending:
            self._at += 1
            self._victim = None

    def finish(self) -> list[tuple[bytes, bytes, bytes]]:
        """End the window; (key, directory key, name) deleted of objects that live on."""
        self._refuse_busy()
        left = [
            (key, note.deldir or b"", note.delname)
            for key, note in self._notes.items()
            if note.delname is not None and not note.flags & N_GONE
        ]
        self._clear()
        return left
