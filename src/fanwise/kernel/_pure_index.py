"""Index in Python: the twin of `_index.c`, with the same answers.

What a consumer believes of the names below its roots: a directory is held from its first listing
(or `hold`, `put`), or from the record that made it in a held one. Records about other directories
change nothing.

An entry knows its identity (what the scan makes of inode and birth time), its size and mtime, and
its ctime, or not: a record says that they changed and not to what. What is not known keeps the last
ctime that was, as a bound. One owner calls it.
"""

import struct
import sys
from collections.abc import Iterable
from typing import Any

from ._pure_decode import Decoder, parse
from .contract import (
    ATTRIB,
    ATTRIBUTES,
    BOTH,
    CLOSE_WRITE,
    CREATE,
    CREATED,
    DELETE,
    DELETE_SELF,
    DELETED,
    KEY_MAX,
    LISTED,
    LISTED_DIR,
    LISTED_HIDDEN,
    MODIFIED,
    MODIFY,
    NAME_MAX,
    ONDIR,
    Q_OVERFLOW,
    RENAME,
    REPLACED,
    WAS_DIR,
)

_INO, _DATA, _CTIME = 1, 2, 4  # what an entry knows
_AHEAD = 16  # records, between the two of an exchange of names
_head = struct.Struct(LISTED).unpack_from
_HEAD = struct.calcsize(LISTED)


class _Entry:
    __slots__ = ("ctime", "ino", "is_dir", "known", "mtime", "size")

    def __init__(self, is_dir: bool, bound: int) -> None:
        self.is_dir, self.ctime = is_dir, bound
        self.known = self.ino = self.size = self.mtime = 0


Listed = tuple[int, int, int, int, int]  # ino, size, mtime, ctime, flags


def _unpack(listing: bytes) -> dict[bytes, Listed]:
    if not isinstance(listing, bytes):
        raise TypeError("bytes are required")
    out: dict[bytes, Listed] = {}
    at, end = 0, len(listing)
    while at < end:
        if end - at < _HEAD:
            raise ValueError("listing is cut short")
        *data, flags, length, _ = _head(listing, at)
        at += _HEAD
        if not 0 < length <= end - at:
            raise ValueError("name in a listing does not fit")
        out.setdefault(listing[at : at + length], (*data, flags))
        at += length
    return out


class Index:
    """What is believed of names: by directory and name, with inode, size and times."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._dirs: dict[bytes, dict[bytes, _Entry]] = {}
        self._count = self._chars = 0
        self._taken = 0  # records of a window that were taken
        self._done: set[int] = set()  # and those further on that were taken with them

    def __len__(self) -> int:
        return self._count

    def __contains__(self, directory: bytes) -> bool:
        return _key(directory) in self._dirs

    @property
    def nbytes(self) -> int:
        """Bytes of memory held; here, roughly."""
        entry = sys.getsizeof(_Entry(False, 0)) + 4 * 32
        tables = sys.getsizeof(self._dirs) + sum(map(sys.getsizeof, self._dirs.values()))
        return tables + self._chars + self._count * (entry + sys.getsizeof(b""))

    # -- one name --

    def _put(self, names: dict[bytes, _Entry], name: bytes, entry: _Entry) -> None:
        if name not in names:
            self._count += 1
            self._chars += len(name)
        names[name] = entry

    def _take(self, names: dict[bytes, _Entry] | None, name: bytes) -> _Entry | None:
        entry = names.pop(name, None) if names is not None else None
        if entry is not None:
            self._count -= 1
            self._chars -= len(name)
        return entry

    def hold(self, directory: bytes, /) -> None:
        """Hold a directory; it has no names yet, unless it is held."""
        self._dirs.setdefault(_key(directory), {})

    def put(self, directory: bytes, name: bytes, is_dir: bool, bound: int = 0, /) -> None:
        """Put a name of which no more is known than that it is there, told up to ``bound`` (ns)."""
        _key(directory), _name(name)
        _bool(is_dir)
        _ns(bound)
        self._put(self._dirs.setdefault(directory, {}), name, _Entry(is_dir, bound))

    def remove(self, directory: bytes, name: bytes, /) -> bool:
        """Remove a name; whether it was there."""
        return self._take(self._dirs.get(_key(directory)), _name(name)) is not None

    def move(self, directory: bytes, name: bytes, directory2: bytes, name2: bytes, /) -> bool:
        """Move a name with what is known of it, over another if need be; whether it was there."""
        _key(directory), _key(directory2), _name(name), _name(name2)
        entry = self._dirs.get(directory, {}).get(name)
        if entry is None:
            return False
        self._take(self._dirs[directory], name)
        entry.known &= ~_CTIME
        self._put(self._dirs.setdefault(directory2, {}), name2, entry)
        return True

    def find(self, directory: bytes, name: bytes, /) -> bool | None:
        """Whether a name is a directory's; None when it is not there."""
        entry = self._dirs.get(_key(directory), {}).get(_name(name))
        return None if entry is None else entry.is_dir

    def names(self, directory: bytes, /) -> list[tuple[bytes, bool]]:
        """(name, is a directory) of a directory, by name; [] when it is not held."""
        names = self._dirs.get(_key(directory), {})
        return [(name, names[name].is_dir) for name in sorted(names)]

    def forget(self, directory: bytes, /) -> None:
        """Hold a directory no longer, nor its names."""
        names = self._dirs.pop(_key(directory), {})
        self._count -= len(names)
        self._chars -= sum(map(len, names))

    # -- a listing --

    def diff(
        self,
        directory: bytes,
        listing: bytes,
        firsts: dict[bytes, tuple[bool, bool]] | None,
        learn: bool,
        told: int = 0,
        /,
    ) -> list[tuple[int, bytes, bool]]:
        """Make the names of a directory what a listing says; give the differences.

        ``listing``: entries as `LISTED`, each with its name behind it. ``firsts``: name -> (was
        there, is a directory) of what records still unread say; such a name stays or goes by that,
        not by the listing. ``learn``: take what is new, give nothing, remove nothing. ``told``: ns,
        up to which all changes were told before the loss that is repaired.

        [(what, name, is a directory)]: deletions first, each part by name. Raises ValueError, with
        nothing changed, for a listing that is none.
        """
        _key(directory)
        _check_firsts(firsts)
        _bool(learn)
        _ns(told)
        listed = _unpack(listing)
        names = self._dirs.setdefault(directory, {})
        deleted: list[tuple[int, bytes, bool]] = []
        rest: list[tuple[int, bytes, bool]] = []
        there_before = {} if not firsts else {n: f for n, f in firsts.items() if _is_name(n)}
        if not learn:
            for name in sorted(names):
                first = there_before.get(name)
                if not (name in listed if first is None else first[0]):
                    entry = self._take(names, name)
                    deleted.append((DELETED, name, bool(entry and entry.is_dir)))
        for name, (there, is_dir) in there_before.items():
            entry = names.get(name)
            if not there or (entry is not None and (learn or entry.is_dir == is_dir)):
                continue
            self._put(names, name, _Entry(is_dir, 0))
            rest.append((_replaced(entry), name, is_dir))
        for name, data in listed.items():
            if name in there_before:
                continue
            entry, is_dir = names.get(name), bool(data[4] & LISTED_DIR)
            if entry is None:
                entry = _Entry(is_dir, 0)
                self._put(names, name, entry)
                what = CREATED
            elif learn and entry.known:
                continue
            else:
                what = _difference(entry, data, told)
            if what:
                rest.append((what, name, is_dir))
            _set(entry, data)
        return [] if learn else deleted + sorted(rest, key=lambda row: row[1])

    # -- records --

    def apply(self, window: Any, before: int = 0, rest: bool = True, /) -> None:
        """Take every record of a decoder's window, or of one chunk (bytes), in order.

        Of a decoder's, those that were not taken yet: without ``rest`` only those before the one
        at which it stands, and the next call goes on there. A chunk begins a new window.
        ``before``: ns, up to which everything was told before it; the bound of names made in it.
        A name both created and deleted in one record is taken to be gone.
        """
        _ns(before)
        _bool(rest)
        stop = None
        if isinstance(window, Decoder):
            records = window._recs
            stop = None if rest else window._at
        elif isinstance(window, bytes):
            records, rest = parse(window), True
            self._taken, self._done = 0, set()
        else:
            raise TypeError("a Decoder or bytes")
        first, done, dirs = self._taken, self._done, self._dirs
        if rest:
            self._taken, self._done = 0, set()
        else:
            self._taken = max(first, window._at)
        for number, record in enumerate(records[first:stop], first):
            mask, dir1, name1, dir2, name2, target, itself, _ = record
            if name1 is None or mask & Q_OVERFLOW or number in done:
                continue
            if itself:
                if mask & DELETE_SELF and dir1 is not None:
                    self.forget(dir1)
                continue
            names = dirs.get(dir1) if _is_name(name1) else None
            if mask & RENAME:
                names2 = dirs.get(dir2) if name2 and _is_name(name2) else None
                if names is None and names2 is None:
                    continue
                if names is names2 and name1 == name2:
                    self._touch(names, name1, _CTIME)
                    continue
                back = None
                if names2 is not None and name2 in names2:
                    back = _exchange(records, number)
                entry = self._take(names, name1)
                other = self._take(names2, name2)
                if names2 is not None:
                    self._bring(names2, name2, entry, mask, before)
                if back is not None:
                    done.add(back)
                    if names is not None:
                        self._bring(names, name1, other, records[back][0], before)
                continue
            if names is None:
                continue
            if mask & BOTH == CREATE:
                self._put(names, name1, _Entry(bool(mask & ONDIR), before))
                if mask & ONDIR and target is not None:
                    dirs.setdefault(target, {})
            elif mask & DELETE:
                self._take(names, name1)
                if mask & ONDIR and target is not None and not mask & CREATE:
                    self.forget(target)  # else what was made in it follows
            elif mask & (MODIFY | ATTRIB | CLOSE_WRITE):
                self._touch(names, name1, _DATA | _CTIME)

    def _bring(
        self, names: dict[bytes, _Entry], name: bytes, entry: _Entry | None, mask: int, before: int
    ) -> None:
        # The ctime of what is renamed changes, to what it is not said.
        if entry is None or entry.is_dir != bool(mask & ONDIR):
            entry = _Entry(bool(mask & ONDIR), before)
        entry.known &= ~_CTIME
        self._put(names, name, entry)

    def _touch(self, names: dict[bytes, _Entry] | None, name: bytes, lost: int) -> None:
        entry = names.get(name) if names is not None else None
        if entry is not None:
            entry.known &= ~lost


def _key(directory: bytes) -> bytes:
    if not isinstance(directory, bytes):
        raise TypeError("bytes are required")
    if len(directory) > KEY_MAX:
        raise ValueError("handle key longer than 132 bytes")
    return directory


def _is_name(name: bytes) -> bool:
    return 0 < len(name) <= NAME_MAX and name != b"."


def _name(name: bytes) -> bytes:
    if not isinstance(name, bytes):
        raise TypeError("bytes are required")
    if not _is_name(name):
        raise ValueError("not a name")
    return name


def _bool(value: bool) -> None:
    if type(value) is not bool:
        raise TypeError("a bool is required")


def _ns(value: int) -> None:
    if not isinstance(value, int):
        raise TypeError("nanoseconds: an integer is required")
    if not -(1 << 63) <= value < 1 << 63:
        raise OverflowError("nanoseconds: too large")


def _check_firsts(firsts: Any) -> None:
    if firsts is None:
        return
    for name, first in firsts.items() if isinstance(firsts, dict) else ((None, None),):
        pair = isinstance(first, tuple) and [type(each) for each in first] == [bool, bool]
        if type(name) is not bytes or not pair:
            raise TypeError("firsts: bytes -> (bool, bool)")


def _replaced(entry: _Entry | None) -> int:
    if entry is None:
        return CREATED
    return REPLACED | (WAS_DIR if entry.is_dir else 0)


def _difference(entry: _Entry, data: Listed, told: int) -> int:
    ino, size, mtime, ctime, flags = data
    is_dir, known = bool(flags & LISTED_DIR), entry.known
    if entry.is_dir != is_dir:
        return _replaced(entry)
    if flags & LISTED_HIDDEN:  # nothing is seen but the name and the type
        return 0
    if known & _INO and entry.ino != ino:
        return _replaced(entry)
    later = ctime > max(entry.ctime, told)
    if is_dir:
        # Its names change its times; what changes only its ctime is told live as of the directory
        # itself, which no record joins with the name: so only what is later than all that was told.
        return ATTRIBUTES if known & _DATA and entry.mtime == mtime and later else 0
    if known & _DATA and (entry.size != size or entry.mtime != mtime):
        return MODIFIED
    if later if not known & _CTIME else ctime != entry.ctime:
        return ATTRIBUTES if known & _DATA else MODIFIED
    return 0


def _set(entry: _Entry, data: Listed) -> None:
    is_dir = bool(data[4] & LISTED_DIR)
    if data[4] & LISTED_HIDDEN:
        if entry.is_dir != is_dir:
            entry.is_dir, entry.known, entry.ctime = is_dir, 0, 0
        return
    entry.ino, entry.size, entry.mtime, entry.ctime, _ = data
    entry.is_dir, entry.known = is_dir, _INO | _DATA | _CTIME


def _exchange(records: list[Any], number: int) -> int | None:
    # The second record of an exchange of two names (RENAME_EXCHANGE), of which this is the first:
    # the same names the other way round, and another object.
    _, dir1, name1, dir2, name2, target, _, pid = records[number]
    ours = (dir1, name1), (dir2, name2)
    for at in range(number + 1, min(number + 1 + _AHEAD, len(records))):
        mask, *rest, other, _, who = records[at]
        if mask & Q_OVERFLOW:
            return None
        if not mask & (BOTH | RENAME):
            continue
        names: Iterable[Any] = (tuple(rest[:2]), tuple(rest[2:]))
        if mask & RENAME and names == ours[::-1]:
            same = target is None or other is None or target == other or who != pid
            return None if same else at
        if any(name in ours for name in names):
            return None
    return None
