"""Incidents as rows: growth, order, repetition, kills; and the places where they are kept."""

import itertools
import random
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from fanwise import BusyError, ForeignFile, NoRoom, StoreError, StoreMissing
from fanwise.health._incidents_db import MOST, SCHEMA, Incidents
from fanwise.health._places import Keeper, read
from fanwise.health._record import key_of, merge
from fanwise.store.database import Store


def record(**changes):
    return {
        "type": "incident",
        "id": None,
        "fs": {
            "uuid": "0f00-1",
            "fstype": "ext4",
            "label": None,
            "device": "7:3",
            "mounts": ["/srv"],
        },
        "scope": "inode",
        "object": {"ino": 14, "gen": 7, "path": None, "path_source": "unknown"},
        "errno": "EUCLEAN",
        "count": 1,
        "total": 1,
        "first_seen": 1000.0,
        "last_seen": 1000.0,
        "location": {"function": "ext4_find_entry", "line": 1500},
        "operation": "metadata read",
        "state": "ok",
        "process": {"pid": 5, "comm": "cat"},
        "channels": ["fserror"],
        "lost": 0,
        "advice": "fsck",
    } | changes


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "incidents.db"


@pytest.fixture
def db(path):
    with Store(path, SCHEMA, "write") as store:
        yield Incidents(store)


def test_the_same_key_grows_one_incident_under_its_id(db):
    first = db.put(record())
    assert first.change == "opened"
    grown = db.put(record(total=5, last_seen=1010.0, state="emergency_ro"))
    assert (grown.id, grown.change) == (first.id, "grown")
    assert grown.record["total"] == 5
    assert grown.record["state"] == "emergency_ro"
    assert (grown.record["first_seen"], grown.record["last_seen"]) == (1000.0, 1010.0)
    assert len(db.listing()) == 1
    assert db.get(first.id).record == grown.record
    assert db.get("nothing") is None


def test_the_same_record_twice_changes_nothing(db):
    first = db.put(record())
    assert db.put(record()).change == "same"
    assert db.put(first.record).change == "same"
    assert db.put(record(total=0)).record["total"] == 1


def test_the_first_error_is_never_overwritten(db):
    first = db.put(record())
    later = db.put(
        record(
            id=first.id,
            total=2,
            last_seen=1001.0,
            object={"ino": 99, "gen": 1, "path": "/srv/x", "path_source": "exact"},
            location={"function": "other", "line": 9},
            operation="journal",
            process={"pid": 6, "comm": "dd"},
            channels=["trace", "fserror"],
        )
    ).record
    for name in ("object", "location", "operation", "process"):
        assert later[name] == record()[name], name
    assert later["channels"] == ["fserror", "trace"]


def test_what_was_unknown_is_filled_in(db):
    first = db.put(record(location=None, process=None))
    later = db.put(
        record(
            id=first.id,
            object={"ino": 14, "gen": 7, "path": "/srv/f", "path_source": "current"},
        )
    )
    assert later.change == "amended"
    assert later.record["object"]["path"] == "/srv/f"
    assert later.record["object"]["path_source"] == "current"
    assert later.record["location"]["function"] == "ext4_find_entry"
    again = db.put(
        record(object={"ino": 14, "gen": 7, "path": "/elsewhere", "path_source": "exact"})
    )
    assert again.change == "same"


def test_of_two_totals_that_of_the_higher_revision_is_right(db):
    first = db.put(record(total=9, revision=4))
    known = {"id": first.id, "last_seen": 1000.0}
    assert db.put(record(total=2, revision=5, **known)).record["total"] == 2
    assert db.put(record(total=9, revision=4, **known)).change == "same"
    assert sum(one.total for one in db.totals()) == 2
    assert db.put(record(total=3, **known)).record["total"] == 3, "from a version without"


@pytest.mark.parametrize(
    "changes",
    [
        {"errno": "EIO"},
        {"scope": "fs", "object": None},
        {"object": {"ino": 15, "gen": 7}},
        {"object": {"ino": 14, "gen": 8}},
        {"fs": {"uuid": "0f00-1", "device": "7:4"}},
        {"fs": {"uuid": "0f00-2", "device": "7:3"}},
        {"fs": {"uuid": "0f00-1", "device": {"name": "sda", "dev": "8:0"}}},
    ],
)
def test_another_key_is_another_incident(db, changes):
    first, second = db.put(record()), db.put(record(**changes))
    assert first.id != second.id
    assert second.change == "opened"
    assert db.open_count(record()) == 1 + ("fs" not in changes)


def test_a_resolved_one_stays_and_the_next_error_opens_another(db):
    first = db.put(record())
    assert db.resolve(first.id, 1500.0, "checked")
    assert not db.resolve(first.id, 1600.0, "replaced")
    second = db.put(record(first_seen=2000.0, last_seen=2000.0))
    assert second.id != first.id
    # What comes late for the first amends it, and does not open it.
    late = db.put(record(id=first.id, channels=["kmsg"]))
    assert (late.id, late.resolved, late.resolution) == (first.id, 1500.0, "checked")
    assert [x.id for x in db.listing(open_only=True)] == [second.id]
    assert [x.id for x in db.listing(since=1999.0)] == [second.id]
    assert [x.id for x in db.listing()] == [first.id, second.id]


def test_ack_beside_a_writer_and_only_the_first_counts(db, path):
    first = db.put(record())
    with Store(path, SCHEMA, "amend") as store:
        other = Incidents(store)
        assert other.ack(first.id, 1200.0)
        assert other.ack(first.id, 1300.0)
        assert not other.ack("nothing", 1300.0)
    assert db.get(first.id).acked == 1200.0
    assert db.put(record(total=9, last_seen=1400.0)).acked == 1200.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"errno": 5},
        {"fs": None},
        {"total": -1},
        {"total": "many"},
        {"first_seen": "yesterday"},
        {"object": 14},
        {"scope": 1},
    ],
)
def test_what_is_no_record_is_refused(db, wrong):
    with pytest.raises(ValueError, match="not the record of an incident"):
        db.put(record(**wrong))
    assert db.listing() == []


def test_a_count_that_sqlite_cannot_hold_is_cut_off(db):
    db.put(record(total=(1 << 64) - 1, object={"ino": (1 << 64) - 1, "gen": 0}))
    assert db.listing()[0].record["total"] == MOST


def test_any_order_and_any_repetition_gives_the_same():
    """Ten records of one incident; what any order makes of them is what the right one makes."""
    rng = random.Random(7)
    records = [
        record(
            id="i",
            total=n + 1,
            first_seen=1000.0,
            last_seen=1000.0 + n,
            state=f"s{n}",
            lost=n % 3,
            channels=["fserror"],
        )
        for n in range(10)
    ]
    expected = None
    for _ in range(200):
        order = rng.sample(records, 10) + rng.choices(records, k=5)
        out = order[0]
        for new in order[1:]:
            out = merge(out, new)
        values = {k: out[k] for k in ("total", "first_seen", "last_seen", "state", "lost")}
        expected = expected or values
        assert values == expected
    assert expected == {
        "total": 10,
        "first_seen": 1000.0,
        "last_seen": 1009.0,
        "state": "s9",
        "lost": 2,
    }


def test_totals_never_fall(db):
    a = db.put(record(total=5))
    b = db.put(record(total=7, object={"ino": 15}))
    db.put(record(total=2, errno="EIO"))

    def totals():
        return {x.errno: x.total for x in db.totals()}

    assert totals() == {"EUCLEAN": 12, "EIO": 2}
    db.resolve(a.id, 1500.0, "checked")
    db.resolve(b.id, 1500.0, "checked")
    assert db.prune(1400.0) == 0
    assert db.prune(1501.0) == 2
    assert len(db.listing()) == 1
    assert totals() == {"EUCLEAN": 12, "EIO": 2}
    c = db.put(record(total=1, first_seen=2000.0, last_seen=2000.0))
    assert totals() == {"EUCLEAN": 13, "EIO": 2}
    db.resolve(c.id, 2001.0, "checked")
    db.prune(3000.0)
    assert totals() == {"EUCLEAN": 13, "EIO": 2}


def test_a_counter_that_goes_back(db):
    readings = [3, 3, 5, 1, 1, 4, 0, 2]
    assert [db.count("fs", "errors_count", raw, n) for n, raw in enumerate(readings)] == [
        3,
        3,
        5,
        6,
        6,
        9,
        9,
        11,
    ]
    assert db.counter("fs", "errors_count") == (2, 11, 2)
    assert db.counter("fs", "other") == (0, 0, 0)
    assert db.count("fs", "huge", (1 << 64) - 1, 0.0) == MOST
    assert db.count("fs", "huge", 5, 1.0) == MOST


def test_since_when_nobody_listened(db, path):
    assert db.listened() == []
    db.begin(100.0)
    db.beat(150.0)
    db.end(160.0)
    other = Incidents(db.store)
    other.begin(200.0)
    other.beat(250.0)
    said = [(x.since, x.until, x.ended) for x in db.listened()]
    assert said == [(100.0, 160.0, True), (200.0, 250.0, False)]
    assert len(db.listened(since=170.0)) == 1


KILLED = """
import os, sys
from fanwise.health._incidents_db import SCHEMA, Incidents
from fanwise.store.database import Store
import msgspec
record = msgspec.json.decode(sys.argv[2])
with Store(sys.argv[1], SCHEMA, "write") as store:
    db = Incidents(store)
    db.begin(50.0)
    n = 0
    while True:
        n += 1
        db.put(record | {"total": n, "last_seen": 1000.0 + n})
        os.write(1, b"%d\\n" % n)
"""


def test_what_was_stored_before_a_kill_is_there(path):
    """The writer says each count after it is stored; it is killed somewhere in the stream."""
    for wait in (1, 7, 40):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, path, msgspec.json.encode(record())],
            stdout=subprocess.PIPE,
        )
        said = [int(process.stdout.readline()) for _ in range(wait)]
        process.send_signal(signal.SIGKILL)
        said += [int(x) for x in process.stdout.read().splitlines()]
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        with Store(path, SCHEMA, "write") as store:
            (stored,) = Incidents(store).listing()
            assert stored.record["total"] in (said[-1], said[-1] + 1)
            assert not Incidents(store).listened()[-1].ended
        path.unlink()


@pytest.fixture
def places(tmp_path):
    return tmp_path / "one" / "i.db", tmp_path / "two" / "i.db"


def keeper_of(places, **options):
    return Keeper(*places, **options)


def fake_devices(keeper, **devices):
    """Both places are on one filesystem here: say that they are on two."""
    for place, names in devices.items():
        keeper._open[place].store.devices = frozenset(names)


def test_nothing_is_written_where_it_fails(places):
    first, second = places
    with keeper_of(places) as keeper:
        fake_devices(keeper, first={"7:1", "8:0"}, second={"7:2"})
        assert keeper.place == "first"
        opened = keeper.do(lambda db: db.put(record()))
        before = {p: p.read_bytes() for p in first.parent.iterdir()}
        assert keeper.avoid(["8:0"]) == "second"
        for n in range(20):
            grown = keeper.do(lambda db, n=n: db.put(record(total=n + 2, last_seen=1001.0 + n)))
        assert grown.id == opened.id
        keeper.avoid(["8:0", "7:2"])
        assert keeper.place == "memory"
        two = {p: p.read_bytes() for p in second.parent.iterdir()}
        last = keeper.do(lambda db: db.put(record(total=100, last_seen=1100.0)))
        assert last.id == opened.id
        assert {p: p.read_bytes() for p in first.parent.iterdir()} == before
        assert {p: p.read_bytes() for p in second.parent.iterdir()} == two
        with pytest.raises(BusyError):
            keeper_of(places).open()
        # Memory is brought to the second place when that will do, and home when home will.
        assert keeper.avoid(["8:0"]) == "second"
        assert keeper.incidents.get(opened.id).record["total"] == 100
        assert {p: p.read_bytes() for p in first.parent.iterdir()} == before
        assert keeper.avoid([]) == "first"
        assert keeper.incidents.get(opened.id).record["total"] == 100
        assert keeper._open["second"].listing() == []


def test_an_end_in_a_bad_place_does_not_write_it_either(places):
    first, _ = places
    keeper = keeper_of(places)
    keeper.open()
    fake_devices(keeper, first={"7:1"}, second={"7:2"})
    opened = keeper.do(lambda db: db.put(record()))
    keeper.avoid(["7:1"])
    keeper.do(lambda db: db.put(record(total=3, last_seen=1003.0)))
    before = {p: p.read_bytes() for p in first.parent.iterdir()}
    keeper.close()
    assert {p: p.read_bytes() for p in first.parent.iterdir()} == before
    # A reader sees both as one, and the next writer brings the second home.
    incidents = read(*places)
    (stored,) = incidents.listing()
    assert (stored.id, stored.record["total"]) == (opened.id, 3)
    incidents.store.close()
    with keeper_of(places) as keeper:
        assert keeper.place == "first"
        assert keeper.incidents.get(opened.id).record["total"] == 3
    incidents = read(first)
    assert len(incidents.listing()) == 1
    incidents.store.close()


def test_a_damaged_place_is_passed_over_and_said(places):
    first, _ = places
    with keeper_of(places):
        pass
    first.write_bytes(first.read_bytes()[:4096] + b"\xa5" * (len(first.read_bytes()) - 4096))
    with keeper_of(places) as keeper:
        assert keeper.place == "second"
        assert "move" in keeper.problems["first"].remedy
        keeper.do(lambda db: db.put(record()))


def test_a_foreign_file_is_for_the_operator(places):
    places[0].parent.mkdir(mode=0o700)
    places[0].write_text("my notes")
    with pytest.raises(ForeignFile):
        keeper_of(places).open()


def test_memory_is_bounded_and_says_what_had_to_go():
    """No place at all: below a file nothing can be made."""
    with keeper_of((Path("/proc/nowhere/i.db"),), memory=1 << 18) as keeper:
        assert keeper.place == "memory"
        assert isinstance(keeper.problems["first"], NoRoom)
        for n in range(2000):
            keeper.do(lambda db, n=n: db.put(record(object={"ino": n}, last_seen=1000.0 + n)))
        assert keeper.dropped > 0
        kept = keeper.incidents.listing()
        assert len(kept) + keeper.dropped == 2000
        assert len(kept) > 50
        assert kept[-1].record["object"]["ino"] == 1999


def test_nothing_to_read(places):
    with pytest.raises(StoreMissing, match="run fanwise health --follow"):
        read(*places)


def test_absorbing_again_changes_nothing(tmp_path):
    stores = [Store(tmp_path / f"{n}.db", SCHEMA, "write") for n in range(2)]
    a, b = (Incidents(store) for store in stores)
    for store in stores:
        store.open()
    for n in range(5):
        stored = b.put(record(object={"ino": n}, total=n + 1))
        if n % 2:
            b.resolve(stored.id, 1100.0, "checked")
    b.ack(stored.id, 1050.0)
    a.put(record(object={"ino": 1}, total=50, first_seen=1200.0, last_seen=1200.0))
    b.count("fs", "errors_count", 5, 1.0)
    b.begin(10.0)
    b.prune(1.0)

    def image():
        tables = ("incident", "retired", "counter")
        return [a.store.execute(f"SELECT * FROM {t} ORDER BY 1, 2") for t in tables] + [
            a.listened()
        ]

    a.absorb(b)
    first = image()
    for _ in range(2):
        a.absorb(b)
        assert image() == first
    assert len(first[0]) == 6  # the resolved one, and the one that is open under the same key
    assert a.get(stored.id).acked == 1050.0
    for store in stores:
        store.close()


def test_keys():
    keys = {
        key_of(record(**dict(zip(("scope", "errno"), pair, strict=True))))
        for pair in itertools.product(("fs", "inode"), ("EIO", "EUCLEAN"))
    }
    assert len(keys) == 4
    paths = [record(object={"ino": 1, "path": path}) for path in (None, "/a", "/b")]
    assert len({key_of(r) for r in paths}) == 1


def test_a_full_place_is_left_for_the_next_and_tried_again(places):
    with keeper_of(places) as keeper:
        opened = keeper.do(lambda db: db.put(record()))
        keeper.do(lambda db: db.count("fs", "errors_count", 5, 1.0))
        pages = keeper.incidents.store.execute("PRAGMA page_count")[0][0]
        keeper.incidents.store.execute(f"PRAGMA max_page_count={pages}")
        for n in range(200):
            keeper.do(lambda db, n=n: db.put(record(object={"ino": n}, first_seen=900.0)))
        assert keeper.place == "second"
        assert "full" in keeper.problems["first"].reason
        assert len(keeper.incidents.listing()) == 201
        assert keeper.incidents.get(opened.id) is not None
        assert keeper.do(lambda db: db.count("fs", "errors_count", 6, 2.0)) == 6
        assert keeper.retry() == "second"  # still full
        keeper._open["first"].store.execute("PRAGMA max_page_count=1000000")
        assert keeper.retry() == "first"
        assert keeper.problems == {}
        assert len(keeper.incidents.listing()) == 201
        assert keeper.incidents.counter("fs", "errors_count") == (6, 6, 0)


def test_totals_do_not_fall_when_the_place_changes(places):
    with keeper_of(places) as keeper:
        old = keeper.do(lambda db: db.put(record(total=5)))
        keeper.do(lambda db: db.resolve(old.id, 1100.0, "checked"))
    with keeper_of(places) as keeper:
        fake_devices(keeper, first={"7:1"}, second={"7:1"})
        keeper.do(lambda db: db.put(record(total=2, first_seen=2000.0, last_seen=2000.0)))
        before = keeper.incidents.totals()
        assert sum(x.total for x in before) == 7
        assert keeper.avoid(["7:1"]) == "memory"
        assert keeper.incidents.totals() == before


def test_listening_goes_on_in_another_place(places):
    with keeper_of(places) as keeper:
        fake_devices(keeper, first={"7:1"}, second={"7:2"})
        keeper.do(lambda db: db.begin(100.0))
        keeper.do(lambda db: db.beat(110.0))
        keeper.avoid(["7:1"])
        keeper.do(lambda db: db.beat(120.0))
        keeper.avoid([])
        keeper.do(lambda db: db.beat(130.0))
        keeper.do(lambda db: db.end(140.0))
    incidents = read(*places)
    said = incidents.listened()
    incidents.store.close()
    assert (min(x.since for x in said), max(x.until for x in said)) == (100.0, 140.0)
    assert said[0].ended


def test_a_record_that_says_it_is_resolved_is(db):
    first = db.put(record())
    done = db.put(record(id=first.id, status="resolved", resolved="checked", last_seen=1100.0))
    assert (done.resolved, done.resolution) == (1100.0, "checked")
    assert db.get(first.id).resolution == "checked"
    assert db.put(record(first_seen=2000.0, last_seen=2000.0)).id != first.id


def test_what_is_counted_by_another_is_not_counted_twice(db):
    a = db.put(record(id="a", total=3, errno=None))
    db.put(record(id="b", total=3, object={"ino": 15}))
    db.put(a.record | {"status": "merged", "merged_into": "b", "last_seen": 1001.0})
    assert sum(x.total for x in db.totals()) == 3
    assert db.get("a").resolution == "part of b"
    assert [x.id for x in db.listing(open_only=True)] == ["b"]


def test_an_errno_that_is_known_later_is_filled_in(db):
    first = db.put(record(errno=None))
    assert db.put(record(id=first.id, last_seen=1001.0)).record["errno"] == "EUCLEAN"
    assert db.put(record(last_seen=1002.0)).id == first.id
    assert db.put(record(id=first.id, errno=None, last_seen=1003.0)).record["errno"] == "EUCLEAN"


def test_notes_are_kept_and_move_along(places):
    with keeper_of(places) as keeper:
        fake_devices(keeper, first={"7:1"}, second={"7:2"})
        keeper.do(lambda db: db.note("a", b"old", 1.0))
        keeper.do(lambda db: db.note("a", b"older", 0.5))
        keeper.avoid(["7:1"])
        assert keeper.incidents.notes() == {"a": b"old"}
        keeper.do(lambda db: db.note("a", b"new", 2.0))
        keeper.avoid([])
        assert keeper.incidents.notes() == {"a": b"new"}


def test_several_are_written_all_or_none(db):
    said = db.put_all([record(), record(total=2), record(object={"ino": 15})])
    assert [x.change for x in said] == ["opened", "grown", "opened"]
    with pytest.raises(ValueError, match="not the record"):
        db.put_all([record(total=3), record(total=-1)])
    ids = db.store.execute("SELECT count(*) FROM incident")
    db.store.execute(
        "CREATE TRIGGER no BEFORE INSERT ON incident BEGIN SELECT raise(ABORT, 'no'); END"
    )
    with pytest.raises(StoreError, match="no"):
        db.put_all([record(total=9), record(object={"ino": 16})])
    assert db.store.execute("SELECT count(*) FROM incident") == ids
    assert max(x.record["total"] for x in db.listing()) == 2
