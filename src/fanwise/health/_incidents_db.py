"""Incidents in a database: one row each, under a stable id, merged so that nothing is taken back.

An incident comes and goes as a record: a mapping with the fields of the JSON form, its times unix
seconds. Writing the same record twice changes nothing, and in any order the result is the same
but for who came first: so records may be written again after a crash, and what stood in memory or
in a second place can be brought home later.

REFS      an `Incidents` borrows its store; whoever opened the store closes it.
LOCKING   that of the store: one owner at a time. Any call may wait for a disk.
LIFETIME  that of the store.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from fanwise._errors import DamagedStore
from fanwise.health._record import Head, Key, Record, device_of, head_of, key_for, key_of, merge
from fanwise.store.database import Row, Store
from fanwise.store.schema import Migration, Schema

Change = Literal["opened", "grown", "amended", "same"]

MOST = (1 << 63) - 1  # what SQLite can count to; kernel counters are unsigned

SCHEMA = Schema(
    "incidents",
    0x66616E68,  # "fanh"
    [
        Migration(
            "incidents",
            (
                """CREATE TABLE incident (
                    id TEXT PRIMARY KEY,
                    fs TEXT NOT NULL, scope TEXT NOT NULL, object TEXT NOT NULL,
                    errno TEXT NOT NULL,
                    uuid TEXT NOT NULL, device TEXT NOT NULL, fstype TEXT NOT NULL,
                    first_seen REAL NOT NULL, last_seen REAL NOT NULL,
                    total INTEGER NOT NULL,
                    acked REAL, resolved REAL, resolution TEXT,
                    record BLOB NOT NULL
                ) STRICT""",
                """CREATE INDEX incident_open ON incident (fs, scope, object, errno)
                    WHERE resolved IS NULL""",
                "CREATE INDEX incident_seen ON incident (last_seen)",
                """CREATE TABLE retired (
                    uuid TEXT, device TEXT, fstype TEXT, errno TEXT, scope TEXT,
                    total INTEGER NOT NULL,
                    PRIMARY KEY (uuid, device, fstype, errno, scope)
                ) STRICT""",
                """CREATE TABLE listening (
                    id INTEGER PRIMARY KEY, since REAL NOT NULL, until REAL NOT NULL,
                    ended INTEGER NOT NULL DEFAULT 0
                ) STRICT""",
                """CREATE TABLE counter (
                    fs TEXT, name TEXT, raw INTEGER NOT NULL, total INTEGER NOT NULL,
                    resets INTEGER NOT NULL, seen REAL NOT NULL,
                    PRIMARY KEY (fs, name)
                ) STRICT""",
                """CREATE TABLE note (
                    name TEXT PRIMARY KEY, body BLOB NOT NULL, seen REAL NOT NULL
                ) STRICT""",
            ),
        )
    ],
)


class Stored(msgspec.Struct, frozen=True):
    """An incident as it is stored: its record, and what operators did about it.

    ``acked`` and ``resolved`` are unix seconds or None, ``resolution`` says what resolved it;
    ``change`` is what the call that gave this did.
    """

    id: str
    record: dict[str, Any]
    acked: float | None
    resolved: float | None
    resolution: str | None
    change: Change = "same"


class Interval(msgspec.Struct, frozen=True):
    """A time in which a writer listened, unix seconds; ``ended`` in order, or by a kill."""

    since: float
    until: float
    ended: bool


class Total(msgspec.Struct, frozen=True):
    """The errors of one filesystem by errno and scope, over all incidents there ever were."""

    uuid: str
    device: str
    fstype: str
    errno: str
    scope: str
    total: int


class Incidents:
    """The incidents of one open store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._listening: int | None = None

    def put(self, record: Record) -> Stored:
        """Write a record: it grows the open incident of its id or key, or opens one.

        The id is that of the row, else the record's, else one made of the key and the first time.
        A record whose id is that of a resolved incident amends that one. Raises ValueError for
        what is no record, and what `Store.execute` raises.
        """
        (stored,) = self.put_all((record,))
        return stored

    def put_all(
        self,
        records: Iterable[Record],
        notes: Mapping[str, bytes] = MappingProxyType({}),
        now: float = 0.0,
    ) -> list[Stored]:
        """Write several, all or none, for the price of one wait for the disk; else as `put`.

        ``notes`` are kept with them, as `note` does at the time ``now``.
        """
        heads = [(dict(record), head_of(record)) for record in records]
        with self.store.transaction():
            for name, body in notes.items():
                self.note(name, body, now)
            return [self._put(record, head, key_for(head)) for record, head in heads]

    def _put(self, record: dict[str, Any], head: Head, key: Key) -> Stored:
        row = self._row("id = ?", head.id) if head.id else None
        if row is None:
            row = self._row(
                "resolved IS NULL AND fs = ? AND scope = ? AND object = ? AND errno = ?",
                key.fs,
                key.scope,
                key.object,
                key.errno,
            )
        if row is None:
            record["id"] = head.id or _new_id(key, head.first_seen)
            record["total"] = min(head.total, MOST)
            if (again := self._row("id = ?", record["id"])) is None:
                self._insert(record, key, head)
                return self._settled(Stored(record["id"], record, None, None, None, "opened"), head)
            row = again
        merged = merge(row.record, record)
        merged["total"] = min(merged["total"], MOST)
        if merged == row.record:
            return self._settled(row, head)
        change: Change = "grown" if merged["total"] > row.record["total"] else "amended"
        self.store.execute(
            "UPDATE incident SET scope = ?, errno = ?, first_seen = ?, last_seen = ?, total = ?,"
            " record = ? WHERE id = ?",
            (
                merged["scope"],
                merged["errno"] or "",
                merged["first_seen"],
                merged["last_seen"],
                merged["total"],
                msgspec.json.encode(merged),
                row.id,
            ),
        )
        return self._settled(msgspec.structs.replace(row, record=merged, change=change), head)

    # A record may say itself that it is resolved, or that it is counted by another one now.
    def _settled(self, row: Stored, head: Head) -> Stored:
        if head.status == "open" or row.resolved is not None:
            return row
        why = head.resolved or head.status
        if head.merged_into is not None:
            why = f"part of {head.merged_into}"
        self.store.execute(
            "UPDATE incident SET resolved = ?, resolution = ?,"
            " total = CASE WHEN ? THEN 0 ELSE total END WHERE id = ?",
            (head.last_seen, why, head.merged_into is not None, row.id),
        )
        return msgspec.structs.replace(row, resolved=head.last_seen, resolution=why)

    def _insert(
        self,
        record: dict[str, Any],
        key: Key,
        head: Head,
        resolved: float | None = None,
        resolution: str | None = None,
    ) -> None:
        self.store.execute(
            "INSERT INTO incident (id, fs, scope, object, errno, uuid, device, fstype,"
            " first_seen, last_seen, total, resolved, resolution, record)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                record["id"],
                key.fs,
                key.scope,
                key.object,
                key.errno,
                head.fs.uuid or "",
                device_of(head),
                head.fs.fstype or "",
                head.first_seen,
                head.last_seen,
                record["total"],
                resolved,
                resolution,
                msgspec.json.encode(record),
            ),
        )

    def get(self, id: str) -> Stored | None:
        """Return the incident of this id, or None."""
        return self._row("id = ?", id)

    def listing(self, *, since: float | None = None, open_only: bool = False) -> list[Stored]:
        """Return incidents, the newest last: those seen at or after ``since``, those open."""
        where, values = ["1"], []
        if since is not None:
            where.append("last_seen >= ?")
            values.append(since)
        if open_only:
            where.append("resolved IS NULL")
        return list(self._rows(" AND ".join(where), *values))

    def open_count(self, record: Record) -> int:
        """Say how many incidents are open on the filesystem of this record."""
        ((count,),) = self.store.execute(
            "SELECT count(*) FROM incident WHERE resolved IS NULL AND fs = ?", (key_of(record).fs,)
        )
        assert isinstance(count, int)
        return count

    def ack(self, id: str, when: float) -> bool:
        """Say that an operator has seen it; the first time stays. False when there is no such."""
        return self._touch("acked = coalesce(acked, ?) WHERE id = ?", when, id)

    def resolve(self, id: str, when: float, resolution: str) -> bool:
        """Close it: the next record of its key opens a new one. False when it was not open."""
        return self._touch(
            "resolved = ?, resolution = ? WHERE id = ? AND resolved IS NULL", when, resolution, id
        )

    def resolutions(self) -> dict[str, str]:
        """Return what resolved each incident that is resolved, by id."""
        rows = self.store.execute("SELECT id, resolution FROM incident WHERE resolved IS NOT NULL")
        return {str(id): str(why or "resolved") for id, why in rows}

    def _touch(self, what: str, *values: str | float) -> bool:
        with self.store.transaction():
            self.store.execute(f"UPDATE incident SET {what}", values)
            ((changed,),) = self.store.execute("SELECT changes()")
        return bool(changed)

    def prune(self, before: float) -> int:
        """Drop what was resolved before then; its errors stay in `totals`. Give the number."""
        with self.store.transaction():
            self.store.execute(
                "INSERT INTO retired SELECT uuid, device, fstype, errno, scope, sum(total)"
                " FROM incident WHERE resolved < ? GROUP BY 1, 2, 3, 4, 5 ON CONFLICT DO UPDATE"
                " SET total = total + excluded.total",
                (before,),
            )
            self.store.execute("DELETE FROM incident WHERE resolved < ?", (before,))
            ((count,),) = self.store.execute("SELECT changes()")
        assert isinstance(count, int)
        return count

    def totals(self) -> list[Total]:
        """Return the errors ever counted; they fall only when an incident had too many."""
        rows = self.store.execute(
            "SELECT uuid, device, fstype, errno, scope, sum(total) FROM"
            " (SELECT uuid, device, fstype, errno, scope, total FROM incident"
            " UNION ALL SELECT * FROM retired) GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5"
        )
        return [msgspec.convert(row, Total) for row in map(_totalled, rows)]

    def begin(self, now: float) -> None:
        """A writer listens from now on. `beat` and `end` say for how long."""
        with self.store.transaction():
            self.store.execute("INSERT INTO listening (since, until) VALUES (?, ?)", (now, now))
            ((self._listening,),) = self.store.execute(  # type: ignore[assignment]
                "SELECT last_insert_rowid()"
            )

    def beat(self, now: float) -> None:
        """It still listens; what is not said here is not known after a kill."""
        if self._listening is None:  # another place was used so far
            self.begin(now)
            return
        self.store.execute(
            "UPDATE listening SET until = max(until, ?) WHERE id = ?", (now, self._listening)
        )

    def end(self, now: float) -> None:
        """It listens no more."""
        self.store.execute(
            "UPDATE listening SET until = max(until, ?), ended = 1 WHERE id = ?",
            (now, self._listening),
        )

    def listened(self, since: float = 0.0) -> list[Interval]:
        """Return when writers listened, the earliest first, as far as it touches ``since``.

        Since the end of the last one nobody listens, unless the store `has_writer`.
        """
        rows = self.store.execute(
            "SELECT since, until, ended FROM listening WHERE until >= ? ORDER BY since", (since,)
        )
        return [
            msgspec.convert({"since": a, "until": b, "ended": bool(ended)}, Interval)
            for a, b, ended in rows
        ]

    def count(self, fs: str, name: str, raw: int, now: float) -> int:
        """Take a reading of a kernel counter; give the total, which never falls.

        A reading below the last one means that the counter was reset (repaired, replaced,
        rebooted): all of it is new. The first reading counts in full.
        """
        raw = min(raw, MOST)
        self.store.execute(
            "INSERT INTO counter VALUES (?1, ?2, ?3, ?3, 0, ?4) ON CONFLICT DO UPDATE SET"
            " total = min(total, ?5 - ?3) + CASE WHEN ?3 >= raw THEN ?3 - raw ELSE ?3 END,"
            " resets = resets + (?3 < raw), raw = ?3, seen = ?4",
            (fs, name, raw, now, MOST),
        )
        return self.counter(fs, name)[1]

    def counter(self, fs: str, name: str) -> tuple[int, int, int]:
        """Return raw value, total and number of resets of a counter; zeros when never read."""
        rows = self.store.execute(
            "SELECT raw, total, resets FROM counter WHERE fs = ? AND name = ?", (fs, name)
        )
        return msgspec.convert(rows[0], tuple[int, int, int]) if rows else (0, 0, 0)

    def note(self, name: str, body: bytes, now: float) -> None:
        """Keep some bytes under a name, in place of those that were there: a ledger's state."""
        self.store.execute(
            "INSERT INTO note VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET"
            " body = excluded.body, seen = excluded.seen WHERE excluded.seen >= seen",
            (name, body, now),
        )

    def notes(self) -> dict[str, bytes]:
        """Return what `note` kept."""
        rows = self.store.execute("SELECT name, body FROM note ORDER BY name")
        return msgspec.convert({str(name): body for name, body in rows}, dict[str, bytes])

    def absorb(self, other: "Incidents") -> int:
        """Take over all that another one holds; what both have is merged. Give the number.

        All of it or nothing, and doing it again changes nothing (but for retired totals, of which
        the larger stays).
        """
        rows = list(other._rows("1"))
        copy = other.store.execute
        with self.store.transaction():
            for row in rows:
                head = head_of(row.record)
                if row.resolved is not None and self._row("id = ?", row.id) is None:
                    self._insert(row.record, key_for(head), head, row.resolved, row.resolution)
                    stored = row
                else:
                    stored = self._put(dict(row.record), head, key_for(head))
                self.store.execute(
                    "UPDATE incident SET acked = coalesce(min(acked, ?1), acked, ?1),"
                    " resolution = coalesce(resolution, ?3), resolved = coalesce(resolved, ?2)"
                    " WHERE id = ?4",
                    (row.acked, row.resolved, row.resolution, stored.id),
                )
            for values in copy("SELECT * FROM retired"):
                self.store.execute(
                    "INSERT INTO retired VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE"
                    " SET total = max(total, excluded.total)",
                    values,  # type: ignore[arg-type]
                )
            for values in copy("SELECT since, until, ended FROM listening"):
                self.store.execute(
                    "INSERT INTO listening (since, until, ended) SELECT ?1, ?2, ?3 WHERE NOT EXISTS"
                    " (SELECT 1 FROM listening WHERE since <= ?1 AND until >= ?2)",
                    values,  # type: ignore[arg-type]
                )
            for values in copy("SELECT * FROM counter"):
                self.store.execute(
                    "INSERT INTO counter VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
                    " raw = CASE WHEN excluded.seen > seen THEN excluded.raw ELSE raw END,"
                    " total = max(total, excluded.total), resets = max(resets, excluded.resets),"
                    " seen = max(seen, excluded.seen)",
                    values,  # type: ignore[arg-type]
                )
            for name, body in other.notes().items():
                ((seen,),) = copy("SELECT seen FROM note WHERE name = ?", (name,))
                self.note(name, body, float(str(seen)))
        return len(rows)

    def clear(self) -> None:
        """Drop everything: it stands elsewhere now."""
        with self.store.transaction():
            for table in ("incident", "retired", "listening", "counter", "note"):
                self.store.execute(f"DELETE FROM {table}")
        self._listening = None

    def drop_oldest(self) -> int:
        """Make room where there is none to be had: a tenth goes, the resolved first."""
        with self.store.transaction():
            self.store.execute(
                "DELETE FROM incident WHERE id IN (SELECT id FROM incident"
                " ORDER BY resolved IS NULL, last_seen"
                " LIMIT (SELECT count(*) / 10 + 1 FROM incident))"
            )
            ((count,),) = self.store.execute("SELECT changes()")
        assert isinstance(count, int)
        return count

    def _row(self, where: str, *values: str) -> Stored | None:
        return next(self._rows(where, *values), None)

    def _rows(self, where: str, *given: str | float) -> Iterator[Stored]:
        rows: Iterable[Row] = self.store.execute(
            "SELECT id, record, acked, resolved, resolution FROM incident"
            f" WHERE {where} ORDER BY last_seen, id",
            given,
        )
        for row in rows:
            values: dict[str, Any] = dict(zip(Stored.__struct_fields__, row, strict=False))
            try:
                values["record"] = msgspec.json.decode(values["record"])
                yield msgspec.convert(values, Stored)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise DamagedStore(
                    self.store.path,
                    f"incident {row[0]}: {error}",
                    "move it away; a new one is made",
                ) from error


def _totalled(row: Row) -> dict[str, object]:
    return dict(zip(Total.__struct_fields__, row, strict=True))


def _new_id(key: Key, first_seen: float) -> str:
    text = "\0".join((key.fs, key.scope, key.object, key.errno, repr(first_seen)))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]
