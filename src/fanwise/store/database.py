"""A database that is open: one owner, WAL, and errors that say what to do.

REFS      a store owns its SQLite connection, and a writer the descriptor of its lock.
LOCKING   one owner at a time, of any thread. Between processes: one writer (see _lock), any
          number of readers and of amenders, who write single short transactions.
LIFETIME  see STORE. A forked child must not even close the connection, because closing folds the
          log into the file: it forgets it instead (the connection is leaked there on purpose),
          and closes its copy of the lock. `abandon` does the same in the process itself, for a
          filesystem that must not be written any more. What was committed stays in the log, and
          the next who opens the file has it.
"""

import ctypes
import os
import sqlite3
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal

from fanwise._errors import (
    BusyError,
    ClosedError,
    DamagedStore,
    FanwiseError,
    ForeignFile,
    NewerFormat,
    NoRoom,
    StoreError,
    StoreMissing,
)
from fanwise.kernel.stacking import lives_on
from fanwise.lifetime import Lifetime
from fanwise.store import _lock, _place
from fanwise.store.schema import Schema

Mode = Literal["write", "amend", "read"]
Row = tuple[object, ...]
Value = str | int | float | bytes | None

_BUSY = 5.0  # seconds to wait for another process's transaction
_PAGE = 4096

_live: "weakref.WeakSet[Store]" = weakref.WeakSet()


class Store:
    """One open database; a context manager.

    ``mode`` is ``"write"`` (takes the writer's lock, makes and migrates the file), ``"amend"``
    (single rows beside a writer) or ``"read"``. `memory` makes one that lives in memory only.
    """

    state: str

    def __init__(self, path: str | os.PathLike[str], schema: Schema, mode: Mode) -> None:
        self.path = Path(path)
        self.schema = schema
        self.mode = mode
        self.lock = -1
        self.devices: frozenset[str] = frozenset()
        self._connection: sqlite3.Connection | None = None
        self._pages = 0  # for memory
        STORE.start(self)

    @classmethod
    def memory(cls, schema: Schema, size: int) -> "Store":
        """Make a store that lives in memory and takes no more than ``size`` bytes.

        It is like any other, but that a full one raises NoRoom.
        """
        store = cls(":memory:", schema, "write")
        store._pages = max(size // _PAGE, 16)
        return store

    def open(self) -> None:
        """Open it, and bring it to the newest version first where that is this one's part.

        Raises BusyError (another writer, named), StoreMissing, ForeignFile, NewerFormat,
        DamagedStore, NoRoom.
        """
        for _ in self.opening():
            pass

    def opening(self) -> Iterator[str]:
        """Open it as a protocol of named steps; `open` runs them all.

        A process that is killed at any step leaves the old version or the new one, never a part.
        """
        try:
            yield from self._opening()
        except BaseException:
            if self.state == "NEW":
                STORE.advance(self, "close")
            self._release()
            raise

    def _opening(self) -> Iterator[str]:
        if self._pages:
            self._connect(":memory:")
            self._execute(f"PRAGMA max_page_count={self._pages}")
            yield from self._migrating(0)
            STORE.advance(self, "open")
            return
        if self.mode == "write":
            yield "prepare"
            _place.prepare(self.path)
            yield "lock"
            self.lock = _lock.take(self._lock_path, self.path)
            _live.add(self)
        self._look()
        yield "connect"
        version = self._version()
        if self.mode != "write" and version < self.schema.version:
            yield from self._lent(version)
            version = self._version()
        if version > self.schema.version:
            raise NewerFormat(
                self.path,
                f"has version {version}, and this fanwise knows {self.schema.version}",
                "use the newer fanwise, or another state directory",
            )
        if self._connection is None:
            self._connect("rw" if self.mode != "read" else "ro")
        if self.mode == "write":
            self._check()
            if self._execute("PRAGMA journal_mode=WAL") != [("wal",)]:
                raise StoreError(
                    self.path, "its filesystem cannot have a write-ahead log", "use another one"
                )
            yield "wal"
            yield from self._migrating(version)
        self.devices = lives_on(self.path)
        _live.add(self)
        STORE.advance(self, "open")

    # A file of an older version: whoever gets the writer's lock brings it up, then lets it go.
    def _lent(self, version: int) -> Iterator[str]:
        if version == 0:
            raise StoreMissing(self.path, "there is no database here yet")
        self._disconnect()
        other = Store(self.path, self.schema, "write")
        try:
            yield from other.opening()
        except BusyError as error:
            raise BusyError(
                f"{error.reason}, which is of an older version ({version})",
                "restart that process with this version of fanwise",
            ) from error
        other.close()

    @property
    def _lock_path(self) -> Path:
        return Path(f"{self.path}.lock")

    def _look(self) -> None:
        if self.mode != "write":
            _place.check_file(self.path)
            _place.check_directory(self.path)
        _place.check_header(self.path, self.schema.application_id)

    # The version of the file, read without the right to write; 0 for one that is new. The writer's
    # connection stays: closing it would fold the log into the file, and so write.
    def _version(self) -> int:
        if os.stat(self.path).st_size == 0 and not Path(f"{self.path}-wal").exists():
            return 0
        # A read-only connection writes no content; it may make the log's index. The writer's may
        # have to undo what a killed one began.
        self._connect("rw" if self.mode == "write" else "ro")
        try:
            said = self._number("PRAGMA application_id")
            if said not in (0, self.schema.application_id):
                raise ForeignFile(
                    self.path, f"is a database of another kind ({said:#010x})", "use another path"
                )
            if said == 0 and self._number("SELECT count(*) FROM sqlite_master"):
                raise ForeignFile(
                    self.path, "is a database that fanwise did not make", "use another path"
                )
            return self._number("PRAGMA user_version") if said else 0
        finally:
            if self.mode != "write":
                self._disconnect()

    def _migrating(self, version: int) -> Iterator[str]:
        for number, migration in enumerate(self.schema.migrations, start=1):
            if number <= version:
                continue
            with self.transaction():
                yield f"{migration.name}: begun"
                self._execute(f"PRAGMA application_id={self.schema.application_id}")
                for statement in migration.statements:
                    self._execute(statement)
                    yield f"{migration.name}: a statement ran"
                self._execute(f"PRAGMA user_version={number}")
                yield f"{migration.name}: to be committed"
            yield f"{migration.name}: committed"

    def _connect(self, mode: str) -> None:
        memory = mode == ":memory:"
        name = mode if memory else f"{self.path.absolute().as_uri()}?mode={mode}"
        if mode == "ro" and self._cannot_change():
            name += "&immutable=1"
        with self._explained():
            self._connection = sqlite3.connect(
                name, uri=not memory, timeout=_BUSY, isolation_level=None, check_same_thread=False
            )
        self._execute("PRAGMA trusted_schema=OFF")
        self._execute("PRAGMA foreign_keys=ON")
        if mode == "rw":
            self._execute("PRAGMA synchronous=FULL")

    # On a filesystem that is mounted read-only SQLite cannot make the log's index, and needs none.
    def _cannot_change(self) -> bool:
        log = Path(f"{self.path}-wal")
        return bool(os.statvfs(self.path).f_flag & os.ST_RDONLY) and not (
            log.exists() and log.stat().st_size
        )

    def _check(self) -> None:
        for (said,) in self._execute("PRAGMA quick_check(1)"):
            if said != "ok":
                raise DamagedStore(self.path, str(said), self._damaged())

    def _damaged(self) -> str:
        return f"move {self.path} away, and what is named like it; a new one is then made"

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is executed inside happens, or nothing of it.

        Raises what `execute` raises; also at the end, when it cannot be committed.
        """
        self._execute("BEGIN IMMEDIATE")
        try:
            yield
            self._execute("COMMIT")
        except BaseException:
            connection = self._connection
            if connection is not None and connection.in_transaction:
                connection.rollback()
            raise

    def execute(self, sql: str, values: Sequence[Value] = ()) -> list[Row]:
        """Run one statement, and give its rows.

        Raises BusyError after 5 s of another's transaction, DamagedStore, NoRoom, StoreError;
        ClosedError when the store is not open.
        """
        if self.state != "OPEN":
            raise ClosedError(
                f"{self.path}: the store is not open ({self.state})",
                "open it anew" if self.state != "FORGOTTEN" else "open one in this process",
            )
        return self._execute(sql, values)

    def _execute(self, sql: str, values: Sequence[Value] = ()) -> list[Row]:
        connection = self._connection
        if connection is None:
            raise ClosedError(f"{self.path}: the store is not open")
        with self._explained():
            return connection.execute(sql, values).fetchall()

    def _number(self, sql: str) -> int:
        ((value,),) = self._execute(sql)
        if not isinstance(value, int):
            raise DamagedStore(self.path, f"{sql} says {value!r}", self._damaged())
        return value

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._named(error) from error

    def _named(self, error: sqlite3.Error) -> FanwiseError:
        # Python knows the code only of errors that SQLite itself raised.
        code: int = getattr(error, "sqlite_errorcode", 0)
        name: str = getattr(error, "sqlite_errorname", type(error).__name__)
        text = f"{error} ({name})"
        match code & 0xFF:
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                return BusyError(
                    f"{self.path}: another process has been writing for {_BUSY:.0f} s",
                    "try again when it has ended",
                )
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                return DamagedStore(self.path, text, self._damaged())
            case sqlite3.SQLITE_FULL:
                return NoRoom(self.path, "its filesystem is full", "make room")
            case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
                return NoRoom(self.path, text, "make it and its directory writable")
            case sqlite3.SQLITE_IOERR:
                return NoRoom(self.path, text, "look at the device of its filesystem")
            case _:
                return StoreError(self.path, text)

    def depends_on(self, device: str) -> bool:
        """Say whether the file's content is written to ``device`` (``MAJOR:MINOR``)."""
        return device in self.devices

    def holder(self) -> "_lock.Holder | None":
        """Return who holds the writer's lock now, where that can be named."""
        return _lock.holder(self._lock_path)

    def has_writer(self) -> bool:
        """Say whether any process holds the writer's lock now."""
        return _lock.held(self._lock_path)

    def close(self) -> None:
        """Close it and give the lock back; idempotent.

        Raises NoRoom and others when the log cannot be folded into the file; closed it is.
        """
        if self.state not in ("NEW", "OPEN"):
            return
        STORE.advance(self, "close")
        self._release()

    def abandon(self) -> None:
        """Let go of it without one more write to its filesystem; idempotent."""
        if self.state != "OPEN":
            return
        STORE.advance(self, "abandon")
        self._leak()

    def _release(self) -> None:
        _live.discard(self)
        try:
            self._disconnect()
        finally:
            self._unlock()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with self._explained():
                connection.close()

    def _unlock(self) -> None:
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def _leak(self) -> None:
        _live.discard(self)
        connection, self._connection = self._connection, None
        if connection is not None:
            # Not even the end of the interpreter may close it.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
        self._unlock()

    def __enter__(self) -> "Store":
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


STORE: Lifetime[Store] = Lifetime(
    "Store",
    states=("NEW", "OPEN", "CLOSED", "FORGOTTEN"),
    transitions={
        "open": "NEW -> OPEN",
        "close": "NEW, OPEN -> CLOSED",
        "abandon": "NEW, OPEN -> FORGOTTEN",
    },
    invariants={
        "a writer of a file that is open has its lock": lambda s: (
            s.state != "OPEN" or s.mode != "write" or bool(s._pages) or s.lock >= 0
        ),
    },
)


def _after_fork() -> None:
    for store in list(_live):
        STORE.advance(store, "abandon")
        store._leak()


os.register_at_fork(after_in_child=_after_fork)
