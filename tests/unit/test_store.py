"""Databases on files of this test's own: what is refused, who may write, what a kill leaves."""

import gc
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fanwise import (
    BusyError,
    ClosedError,
    DamagedStore,
    ForeignFile,
    NewerFormat,
    NoRoom,
    StoreMissing,
)
from fanwise.store import _lock
from fanwise.store.database import Store
from fanwise.store.schema import Migration, Schema

ONE = Migration("one", ("CREATE TABLE a (x INTEGER PRIMARY KEY)", "INSERT INTO a VALUES (1)"))
TWO = Migration(
    "two",
    (
        "CREATE TABLE b (x INTEGER)",
        "INSERT INTO b SELECT x FROM a",
        "ALTER TABLE a ADD COLUMN y TEXT",
    ),
)
OLD = Schema("test", 0x66610001, [ONE])
NEW = Schema("test", 0x66610001, [ONE, TWO])
OTHER = Schema("other", 0x66610002, [ONE])

HEAD = """
import os, select, signal, sys
from fanwise.store.database import Store
from fanwise.store.schema import Migration, Schema
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("test_store", {file!r})
t = module_from_spec(spec)
spec.loader.exec_module(t)
path = sys.argv[1]
"""


def child(text, *arguments, **options):
    """Run a text as another process; it may end by a signal."""
    text = HEAD.format(file=__file__) + textwrap.dedent(text)
    return subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "x.db"


def made(path, schema=OLD):
    with Store(path, schema, "write"):
        pass
    return path


def whole(path):
    """The version of a file that SQLite alone finds whole, and whether each part of it is there."""
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        columns = len(connection.execute("PRAGMA table_info(a)").fetchall())
        assert (version, tables, columns) in [
            (0, set(), 0),
            (1, {"a"}, 1),
            (2, {"a", "b"}, 2),
        ]
        return version
    finally:
        connection.close()


def test_a_new_one_is_made_for_its_owner_alone(path):
    with Store(path, NEW, "write") as store:
        assert store.execute("SELECT x FROM b") == [(1,)]
        assert store.execute("PRAGMA journal_mode") == [("wal",)]
        for name in path.parent.iterdir():
            assert name.stat().st_mode & 0o777 == 0o600, name
        assert path.parent.stat().st_mode & 0o777 == 0o700
    assert whole(path) == 2
    assert path.read_bytes()[68:72] == (0x66610001).to_bytes(4, "big")


def test_an_old_one_is_migrated_once(path):
    made(path, OLD)
    for _ in range(2):
        with Store(path, NEW, "write") as store:
            assert store.execute("SELECT x, y FROM a") == [(1, None)]
            assert store.execute("SELECT count(*) FROM b") == [(1,)]


def test_a_reader_of_an_old_one_migrates_it_when_nobody_writes(path):
    made(path, OLD)
    with Store(path, NEW, "read") as store:
        assert store.execute("SELECT x FROM b") == [(1,)]
    made(path.with_name("y.db"), OLD)
    with (
        Store(path.with_name("y.db"), OLD, "write"),
        pytest.raises(BusyError, match=r"older version .*restart that process"),
    ):
        Store(path.with_name("y.db"), NEW, "read").open()


def test_a_newer_one_is_refused_by_every_mode_and_left_as_it_is(path):
    made(path, NEW)
    before = path.read_bytes()
    for mode in ("write", "amend", "read"):
        with pytest.raises(NewerFormat, match="has version 2, and this fanwise knows 1; use the"):
            Store(path, OLD, mode).open()
    assert path.read_bytes() == before
    with Store(path, NEW, "write"):  # the lock was given back
        pass


def sqlite_file(path, application=0):
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA application_id={application}")
    connection.execute("CREATE TABLE mine (x)")
    connection.commit()
    connection.close()


@pytest.mark.parametrize("mode", ["write", "amend", "read"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_text("x" * 5000), "is not a database"),
        (lambda p: p.write_text("short"), "is not a database"),
        (lambda p: sqlite_file(p), "a database that fanwise did not make"),
        (lambda p: sqlite_file(p, 77), "of another kind"),
        (lambda p: made(p, OTHER), "of another kind"),
        (lambda p: p.mkdir(), "is not a regular file"),
        (lambda p: os.mkfifo(p), "is not a regular file"),
        (lambda p: p.symlink_to("/etc/passwd"), "is a symbolic link"),
        (lambda p: (p.touch(), p.chmod(0o666)), "others may write it; chmod go-w"),
        (lambda p: (made(p), Path(f"{p}.lock").chmod(0o666)), "others may write it; chmod go-w"),
        (
            lambda p: (made(p), Path(f"{p}-wal").symlink_to("/etc/passwd")),
            "-wal: is a symbolic link",
        ),
        (lambda p: (made(p), p.parent.chmod(0o777)), "others may write to its directory"),
    ],
)
def test_a_foreign_file_is_refused_and_not_touched(path, make, message, mode):
    path.parent.mkdir(mode=0o700)
    make(path)
    before = path.read_bytes() if path.is_file() and not path.is_symlink() else None
    with pytest.raises(ForeignFile, match=message):
        Store(path, OLD, mode).open()
    if before is not None:
        assert path.read_bytes() == before


def test_a_lock_that_is_a_link_is_refused(path, tmp_path):
    path.parent.mkdir(mode=0o700)
    Path(f"{path}.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ForeignFile, match="symbolic link"):
        Store(path, OLD, "write").open()
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("mode", ["amend", "read"])
def test_without_a_file_there_is_nothing_to_read(path, mode):
    path.parent.mkdir(mode=0o700)
    with pytest.raises(StoreMissing, match="no database here yet"):
        Store(path, OLD, mode).open()
    path.touch(mode=0o600)
    with pytest.raises(StoreMissing, match="no database here yet"):
        Store(path, OLD, mode).open()
    assert path.stat().st_size == 0


def test_one_writer_and_the_second_is_told_who(path):
    with Store(path, OLD, "write") as first:
        with pytest.raises(BusyError, match=rf"written by process {os.getpid()} \(\S+\) since 20"):
            Store(path, OLD, "write").open()
        done = child("Store(path, t.OLD, 'write').open()", path)
        assert f"is written by process {os.getpid()} (" in done.stderr
        assert first.holder().pid == os.getpid()
        assert first.has_writer()
        with Store(path, OLD, "read") as reader, Store(path, OLD, "amend") as amender:
            amender.execute("INSERT INTO a VALUES (2)")
            first.execute("INSERT INTO a VALUES (3)")
            assert reader.execute("SELECT x FROM a ORDER BY x") == [(1,), (2,), (3,)]
    assert not first.has_writer()
    with Store(path, OLD, "write") as second:
        assert second.execute("SELECT count(*) FROM a") == [(3,)]


def test_a_reader_cannot_write(path):
    made(path)
    with Store(path, OLD, "read") as store, pytest.raises(NoRoom, match="readonly"):
        store.execute("INSERT INTO a VALUES (2)")


def test_a_killed_writer_holds_nothing(path):
    made(path)
    done = child("Store(path, t.OLD, 'write').open(); os.kill(os.getpid(), 9)", path)
    assert done.returncode == -signal.SIGKILL
    with Store(path, OLD, "write") as store:
        assert store.holder().pid == os.getpid()


def test_a_pid_that_is_another_process_now_is_not_named(path):
    with Store(path, OLD, "write") as store:
        lock = Path(f"{path}.lock")
        said = lock.read_text()
        lock.write_text(said.replace(f'"started":{store.holder().started}', '"started":1'))
        assert store.holder() is None
        with pytest.raises(BusyError, match="written by another process"):
            Store(path, OLD, "write").open()


def test_looking_who_writes_never_makes_a_writer_fail(path):
    """A process looks without end while this one takes the lock and gives it back."""
    made(path)
    text = HEAD.format(file=__file__) + "\n".join(
        [
            "from pathlib import Path",
            "print(flush=True)",
            "while True:",
            "    t._lock.held(Path(path + '.lock')), t._lock.holder(Path(path + '.lock'))",
        ]
    )
    process = subprocess.Popen([sys.executable, "-c", text, path], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        for _ in range(2000):
            os.close(_lock.take(Path(f"{path}.lock"), path))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_lock_whose_file_was_removed_is_taken_anew(path, monkeypatch):
    path.parent.mkdir(mode=0o700)
    lock, real = Path(f"{path}.lock"), _lock._open
    turns = []

    def open_and_lose(name):
        fd = real(name)
        if not turns:
            lock.unlink()
        turns.append(fd)
        return fd

    monkeypatch.setattr(_lock, "_open", open_and_lose)
    fd = _lock.take(lock, path)
    assert len(turns) == 2
    assert os.fstat(fd).st_ino == lock.stat().st_ino
    os.close(fd)


STEPS = list(range(15))


def steps(path, schema):
    with Store(path, schema, "write") as store:
        assert store
    found = []
    store = Store(path.with_name("counted.db"), schema, "write")
    for step in store.opening():
        found.append(step)
    store.close()
    return found


def test_the_steps_are_the_ones_the_kill_tests_kill_at(path):
    assert len(steps(path, NEW)) == len(STEPS)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("first", ["none", "old"])
def test_a_kill_at_any_step_leaves_old_or_new(path, step, first):
    if first == "old":
        made(path, OLD)
    done = child(
        """
        for number, step in enumerate(Store(path, t.NEW, "write").opening()):
            if number == int(sys.argv[2]):
                print(step, flush=True)
                os.kill(os.getpid(), 9)
        """,
        path,
        step,
    )
    assert done.returncode in (-signal.SIGKILL, 0), done.stderr
    if done.returncode == 0:  # fewer steps from the old version
        assert first == "old"
    if path.exists():
        version = whole(path)
        assert version >= (first == "old")
        if done.stdout == "two: committed\n":
            assert version == 2
        if done.stdout in ("two: to be committed\n", "two: a statement ran\n"):
            assert version == 1
    with Store(path, NEW, "write") as store:
        assert store.execute("SELECT x FROM b") == [(1,)]


def test_a_kill_in_the_middle_of_a_write_leaves_all_or_nothing(path):
    made(path)
    for last, count in ((False, 1), (True, 3)):
        done = child(
            """
            with Store(path, t.OLD, "write") as store:
                with store.transaction():
                    store.execute("INSERT INTO a VALUES (2)")
                    store.execute("INSERT INTO a VALUES (3)")
                    if sys.argv[2] == "False":
                        os.kill(os.getpid(), 9)
                os.kill(os.getpid(), 9)
            """,
            path,
            last,
        )
        assert done.returncode == -signal.SIGKILL
        with Store(path, OLD, "write") as store:
            assert store.execute("SELECT count(*) FROM a") == [(count,)]


def test_an_exception_undoes_a_transaction(path):
    with Store(path, OLD, "write") as store:

        def broken():
            with store.transaction():
                store.execute("INSERT INTO a VALUES (2)")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            broken()
        assert store.execute("SELECT count(*) FROM a") == [(1,)]


def test_damage_is_told(path):
    with Store(path, OLD, "write") as store:
        store.execute("CREATE INDEX i ON a (x)")
        with store.transaction():
            for n in range(2, 3000):
                store.execute("INSERT INTO a VALUES (?)", (n,))
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(DamagedStore, match=r"move .* away"):
        Store(path, OLD, "write").open()
    with Store(path, OLD, "read") as store, pytest.raises(DamagedStore):
        store.execute("SELECT * FROM a NOT INDEXED")
    data[100:4096] = b"\xff" * 3996
    path.write_bytes(data)
    with pytest.raises(DamagedStore, match=r"move .* away"):
        Store(path, OLD, "write").open()


def test_a_fork_shares_neither_connection_nor_lock(path):
    """The child outlives its parent, uses the store, and ends as interpreters end."""
    done = child(
        """
        store = Store(path, t.OLD, "write")
        store.open()
        store.execute("INSERT INTO a VALUES (2)")
        parent = os.pidfd_open(os.getpid())
        if os.fork() == 0:
            # A pipe to it may end before its lock does: files are closed last to first.
            select.select([parent], [], [])
            try:
                store.execute("SELECT 1")
            except t.ClosedError as error:
                print(error.remedy, store.state)
            with Store(path, t.OLD, "write") as mine:  # the lock died with the parent
                print(mine.execute("SELECT count(*) FROM a"))
            del store
            sys.exit(0)
        os.kill(os.getpid(), 9)
        """,
        path,
    )
    assert done.stdout == "open one in this process FORGOTTEN\n[(2,)]\n", done.stderr
    assert done.stderr == ""
    assert whole(path) == 1


def test_a_child_that_ends_first_leaves_the_log_alone(path):
    done = child(
        """
        store = Store(path, t.OLD, "write")
        store.open()
        store.execute("INSERT INTO a VALUES (2)")
        pid = os.fork()
        if pid == 0:
            store.close()
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert os.path.getsize(path + "-wal") > 0
        assert store.has_writer()
        store.execute("INSERT INTO a VALUES (3)")
        store.close()
        """,
        path,
    )
    assert done.stderr == ""
    with Store(path, OLD, "read") as store:
        assert store.execute("SELECT count(*) FROM a") == [(3,)]


def test_abandoned_is_not_written_and_nothing_is_lost(path):
    store = Store(path, OLD, "write")
    store.open()
    store.execute("INSERT INTO a VALUES (2)")
    before = path.read_bytes(), Path(f"{path}-wal").read_bytes()
    store.abandon()
    gc.collect()  # a connection that nobody holds would be closed, and so written
    assert (path.read_bytes(), Path(f"{path}-wal").read_bytes()) == before
    assert not store.has_writer()
    with pytest.raises(ClosedError):
        store.execute("SELECT 1")
    store.close()
    with Store(path, OLD, "write") as other:
        assert other.execute("SELECT count(*) FROM a") == [(2,)]


def test_memory_has_the_same_interface_and_a_limit():
    with Store.memory(NEW, 256 << 10) as store:
        assert store.execute("SELECT x FROM b") == [(1,)]
        assert not store.depends_on("8:1")

        def fill():
            with store.transaction():
                for n in range(2, 100_000):
                    store.execute("INSERT INTO a (x, y) VALUES (?, ?)", (n, "y" * 100))

        with pytest.raises(NoRoom, match="full"):
            fill()
        assert store.execute("SELECT count(*) FROM a") == [(1,)]


def test_closed_is_closed(path):
    store = Store(path, OLD, "write")
    with pytest.raises(ClosedError):
        store.execute("SELECT 1")
    with store:
        pass
    store.close()
    with pytest.raises(ClosedError, match="CLOSED"):
        store.execute("SELECT 1")


@pytest.mark.parametrize(
    ("application", "migrations"), [(0, [ONE]), (1 << 31, [ONE]), (5, []), (5, [ONE, ONE])]
)
def test_a_wrong_schema_is_refused(application, migrations):
    with pytest.raises(ValueError, match="wrong"):
        Schema("wrong", application, migrations)
