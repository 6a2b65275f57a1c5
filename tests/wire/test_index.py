"""The index of names: what it finds, and that native and pure give the same answers."""

import contextlib
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fanwise._errors import DecodeError
from fanwise.kernel.contract import (
    ATTRIB,
    ATTRIBUTES,
    CLOSE_WRITE,
    CREATE,
    CREATED,
    DELETE,
    DELETE_SELF,
    DELETED,
    LISTED,
    LISTED_DIR,
    LISTED_HIDDEN,
    MODIFIED,
    MODIFY,
    ONDIR,
    Q_OVERFLOW,
    RENAME,
    REPLACED,
    WAS_DIR,
)
from tests.wire import build
from tests.wire.build import DFID, DFID_NAME, FID, NEW_DFID_NAME, OLD_DFID_NAME, event, fid
from tests.wire.twins import PURE, leaks, native_parts

ROOT = Path(__file__).parents[2]
D, E, F = build.key(2), build.key(3), build.key(4)
ANY, OTHER = build.key(70), build.key(71)


@pytest.fixture(params=["native", "pure"])
def parts(request, cannot_run):
    return PURE if request.param == "pure" else native_parts(cannot_run)


@pytest.fixture
def index(parts):
    return parts.Index()


def listed(name, ino=1, size=0, mtime=0, ctime=0, flags=0):
    return struct.pack(LISTED, ino, size, mtime, ctime, flags, len(name), 0) + name


def named(mask, directory, name, target=None, pid=1):
    infos = [fid(DFID_NAME, directory, name)]
    return event(mask, *infos, *([fid(FID, target)] if target else []), pid=pid)


def renamed(dir1, name1, dir2, name2, target=ANY, mask=0, pid=1):
    return event(
        RENAME | mask,
        fid(FID, target),
        fid(OLD_DFID_NAME, dir1, name1),
        fid(NEW_DFID_NAME, dir2, name2),
        pid=pid,
    )


def decoder_of(parts, *chunks):
    decoder = parts.Decoder(parts.Tree(), lambda *_: None, [()] * 512, 0, "0:0", [], {})
    for chunk in chunks:
        decoder.add(chunk, 1.0)
    return decoder


def diff(index, *entries, key=D, firsts=None, learn=False, told=0):
    return index.diff(key, b"".join(entries), firsts, learn, told)


# -- a listing against what is held --


def test_nothing_is_given_of_a_baseline(index):
    assert diff(index, listed(b"f"), listed(b"d", flags=LISTED_DIR), learn=True) == []
    assert index.names(D) == [(b"d", True), (b"f", False)]
    assert (index.find(D, b"d"), index.find(D, b"f"), index.find(D, b"x")) == (True, False, None)
    assert len(index) == 2
    assert D in index
    assert E not in index
    assert diff(index, listed(b"f"), listed(b"d", flags=LISTED_DIR)) == []


def test_a_baseline_keeps_what_is_held(index):
    index.put(D, b"live", False)
    diff(index, listed(b"f", size=1), learn=True)
    assert diff(index, listed(b"f", size=2), learn=True) == []
    assert index.names(D) == [(b"f", False), (b"live", False)]
    assert diff(index, listed(b"f", size=2), listed(b"live")) == [(MODIFIED, b"f", False)]


def test_a_baseline_gives_data_to_what_has_none(index):
    index.put(D, b"f", False)
    diff(index, listed(b"f", size=1, ctime=50), learn=True)
    assert diff(index, listed(b"f", size=1, ctime=50)) == []
    assert diff(index, listed(b"f", size=2, ctime=40)) == [(MODIFIED, b"f", False)]


def test_deletions_first_then_by_name(index):
    before = [listed(name) for name in (b"b", b"a", b"d", b"c")]
    diff(index, *before, listed(b"x", flags=LISTED_DIR), learn=True)
    now = [listed(b"d", size=1), listed(b"aa"), listed(b"zz"), listed(b"c"), listed(b"ab")]
    assert diff(index, *now) == [
        (DELETED, b"a", False),
        (DELETED, b"b", False),
        (DELETED, b"x", True),
        (CREATED, b"aa", False),
        (CREATED, b"ab", False),
        (MODIFIED, b"d", False),
        (CREATED, b"zz", False),
    ]
    assert diff(index, *now) == []
    assert len(index) == 5


@pytest.mark.parametrize(
    ("now", "what"),
    [
        ({}, 0),
        ({"size": 8}, MODIFIED),
        ({"mtime": 4}, MODIFIED),
        ({"mtime": 4, "ctime": 9}, MODIFIED),
        ({"ctime": 9}, ATTRIBUTES),
        ({"ctime": 1}, ATTRIBUTES),
        ({"ino": 2}, REPLACED),
        ({"ino": 2, "flags": LISTED_DIR}, REPLACED),
        ({"flags": LISTED_DIR}, REPLACED),
        ({"ino": 2, "size": 0, "flags": LISTED_HIDDEN}, 0),
        ({"flags": LISTED_HIDDEN | LISTED_DIR}, REPLACED),
    ],
)
def test_what_changed_of_a_file(index, now, what):
    data = {"ino": 1, "size": 7, "mtime": 5, "ctime": 6}
    diff(index, listed(b"f", **data), learn=True)
    is_dir = bool(now.get("flags", 0) & LISTED_DIR)
    assert diff(index, listed(b"f", **data | now)) == ([(what, b"f", is_dir)] if what else [])


@pytest.mark.parametrize(
    ("now", "told", "what"),
    [
        ({}, 0, 0),
        ({"size": 8, "mtime": 9, "ctime": 9}, 0, 0),  # its own names changed
        ({"ctime": 9}, 8, ATTRIBUTES),
        ({"ctime": 9}, 9, 0),
        ({"ino": 2}, 0, REPLACED | WAS_DIR),
        ({"ino": 2, "flags": 0}, 0, REPLACED | WAS_DIR),
        ({"flags": LISTED_HIDDEN}, 0, REPLACED | WAS_DIR),
    ],
)
def test_what_changed_of_a_directory(index, now, told, what):
    data = {"ino": 1, "size": 7, "mtime": 5, "ctime": 6, "flags": LISTED_DIR}
    diff(index, listed(b"d", **data), learn=True)
    data |= now
    is_dir = bool(data["flags"] & LISTED_DIR)
    assert diff(index, listed(b"d", **data), told=told) == ([(what, b"d", is_dir)] if what else [])


def test_what_is_hidden_keeps_its_data(index):
    diff(index, listed(b"f", size=1, ctime=1), learn=True)
    assert diff(index, listed(b"f", flags=LISTED_HIDDEN)) == []
    assert diff(index, listed(b"f", size=1, ctime=1)) == []
    assert diff(index, listed(b"f", size=2, ctime=1)) == [(MODIFIED, b"f", False)]


@pytest.mark.parametrize("mask", [MODIFY, ATTRIB, CLOSE_WRITE, MODIFY | CLOSE_WRITE])
@pytest.mark.parametrize(
    ("ctime", "told", "what"), [(50, 0, 0), (51, 0, MODIFIED), (60, 59, MODIFIED), (60, 60, 0)]
)
def test_what_was_told_live_is_not_told_again(index, mask, ctime, told, what):
    diff(index, listed(b"f", size=1, ctime=50), learn=True)
    index.apply(named(mask, D, b"f"), 0)
    now = listed(b"f", size=2, mtime=2, ctime=ctime)
    assert diff(index, now, told=told) == ([(what, b"f", False)] if what else [])
    assert diff(index, now) == []
    assert diff(index, listed(b"f", size=3)) == [(MODIFIED, b"f", False)]


def test_what_was_born_live_is_bound_by_the_window(index):
    index.hold(D)
    index.apply(named(CREATE, D, b"f"), 100)
    index.apply(named(CREATE, D, b"g"), 100)
    assert diff(index, listed(b"f", ctime=100), listed(b"g", ctime=101)) == [
        (MODIFIED, b"g", False)
    ]


def test_reads_change_nothing(index):
    diff(index, listed(b"f"), learn=True)
    index.apply(named(0x1 | 0x10 | 0x20, D, b"f"))
    assert diff(index, listed(b"f", size=1)) == [(MODIFIED, b"f", False)]


# -- what records still unread say of a name stands above the listing --


def test_firsts(index):
    diff(index, listed(b"gone"), listed(b"was", size=1), listed(b"type"), learn=True)
    firsts = {
        b"gone": (True, False),  # not listed any more: still there
        b"was": (False, False),  # a record will make it
        b"new": (True, True),  # there, although it is not listed
        b"soon": (False, False),  # listed ahead of its record
        b"type": (True, True),
    }
    now = listed(b"was", size=2), listed(b"soon"), listed(b"plain")
    assert diff(index, *now, firsts=firsts) == [
        (DELETED, b"was", False),
        (CREATED, b"new", True),
        (CREATED, b"plain", False),
        (REPLACED, b"type", True),
    ]
    assert index.names(D) == [
        (b"gone", False),
        (b"new", True),
        (b"plain", False),
        (b"type", True),
    ]


def test_firsts_of_a_baseline(index):
    index.put(D, b"live", False)
    firsts = {b"there": (True, True), b"not yet": (False, False), b"live": (False, False)}
    assert diff(index, listed(b"not yet"), firsts=firsts, learn=True) == []
    assert index.names(D) == [(b"live", False), (b"there", True)]


def test_a_directory_told_of_by_firsts_is_replaced(index):
    diff(index, listed(b"x", flags=LISTED_DIR), learn=True)
    assert diff(index, firsts={b"x": (True, False)}) == [(REPLACED | WAS_DIR, b"x", False)]


# -- records --


def test_only_held_directories_take_part(index):
    index.apply(named(CREATE, D, b"f", F) + renamed(D, b"f", E, b"g"))
    assert len(index) == 0
    assert D not in index
    index.hold(D)
    index.hold(D)
    assert index.names(D) == []
    index.apply(named(CREATE, D, b"f", F) + named(CREATE, E, b"g", F))
    assert index.names(D) == [(b"f", False)]
    index.apply(renamed(D, b"f", E, b"g"))  # out
    assert len(index) == 0
    index.apply(renamed(E, b"g", D, b"h", mask=ONDIR))  # in
    assert index.names(D) == [(b"h", True)]


def test_a_directory_is_held_from_the_record_that_makes_it(index):
    index.hold(D)
    index.apply(named(CREATE | ONDIR, D, b"d", E) + named(CREATE, E, b"f", F))
    assert index.names(E) == [(b"f", False)]
    index.apply(named(DELETE | ONDIR, D, b"d", E))
    assert (E in index, len(index)) == (False, 0)
    index.hold(E)
    index.put(E, b"left", False)
    index.apply(event(DELETE_SELF | ONDIR, fid(DFID, E)))
    assert (E in index, len(index)) == (False, 0)
    index.apply(event(DELETE_SELF | ONDIR, fid(DFID_NAME, D, b".")))
    assert D not in index


def test_a_rename_takes_the_data_along(index):
    index.hold(E)
    diff(index, listed(b"f", ino=7, size=1, mtime=2, ctime=3), listed(b"over", ino=8), learn=True)
    index.apply(renamed(D, b"f", D, b"over"))
    assert index.names(D) == [(b"over", False)]
    index.apply(renamed(D, b"over", E, b"g"))
    assert (index.names(D), index.names(E)) == ([], [(b"g", False)])
    same = {"ino": 7, "size": 1, "mtime": 2}
    # The rename changed its ctime, which is not told; what is later than all told is.
    assert diff(index, listed(b"g", **same, ctime=9), key=E, told=9) == []
    index.apply(renamed(E, b"g", E, b"g2"))
    now = listed(b"g2", **same, ctime=12)
    assert diff(index, now, key=E, told=11) == [(ATTRIBUTES, b"g2", False)]
    index.apply(renamed(E, b"g2", E, b"g3"))
    now = listed(b"g3", ino=7, size=2, ctime=1)
    assert diff(index, now, key=E, told=50) == [(MODIFIED, b"g3", False)]
    index.apply(renamed(E, b"g3", E, b"g4"))
    assert diff(index, listed(b"g4", ino=9), key=E) == [(REPLACED, b"g4", False)]


def test_a_rename_onto_itself(index):
    diff(index, listed(b"f", size=1, ctime=3), learn=True)
    index.apply(renamed(D, b"f", D, b"f"))
    assert index.names(D) == [(b"f", False)]
    assert diff(index, listed(b"f", size=1, ctime=9), told=9) == []


def test_a_renamed_directory_keeps_its_names(index):
    index.hold(D)
    index.apply(named(CREATE | ONDIR, D, b"d", E) + named(CREATE, E, b"f", F))
    index.apply(renamed(D, b"d", D, b"d2", E, ONDIR))
    assert index.names(D) == [(b"d2", True)]
    assert index.names(E) == [(b"f", False)]


def test_a_rename_of_what_is_not_held_or_another_type(index):
    diff(index, listed(b"f", ino=5), learn=True)
    index.apply(renamed(D, b"f", D, b"d", E, ONDIR) + renamed(D, b"no", D, b"yes"))
    assert index.names(D) == [(b"d", True), (b"yes", False)]
    now = listed(b"d", ino=6, flags=LISTED_DIR), listed(b"yes", ctime=-1)
    assert diff(index, *now) == []


def exchanged(*between, one=ANY, two=OTHER, second=1):
    return (
        renamed(D, b"a", E, b"b", one)
        + b"".join(between)
        + renamed(E, b"b", D, b"a", two, ONDIR, pid=second)
    )


def fill(index):
    data = {"size": 1, "mtime": 2, "ctime": 3}
    diff(index, listed(b"a", ino=1, **data), learn=True)
    diff(index, listed(b"b", ino=2, flags=LISTED_DIR, **data), key=E, learn=True)


@pytest.mark.parametrize("window", ["chunk", "decoder", "two chunks"])
def test_an_exchange_of_two_names(parts, index, window):
    fill(index)
    other = [named(MODIFY, D, b"c", pid=9), named(CREATE, D, b"x", F, pid=9)]
    if window == "two chunks":
        data = exchanged(*other)
        cut = len(renamed(D, b"a", E, b"b"))
        index.apply(decoder_of(parts, data[:cut], data[cut:]))
    else:
        data = exchanged(*other)
        index.apply(data if window == "chunk" else decoder_of(parts, data))
    assert index.names(D) == [(b"a", True), (b"x", False)]
    assert index.names(E) == [(b"b", False)]
    data = {"size": 1, "mtime": 2, "ctime": 3}
    assert diff(index, listed(b"a", ino=2, flags=LISTED_DIR, **data), listed(b"x"), told=9) == []
    assert diff(index, listed(b"b", ino=1, **data), key=E, told=9) == []


def test_many_exchanges_one_in_another(index):
    dirs = [build.key(200 + i) for i in range(12)]
    for number, key in enumerate(dirs):
        diff(index, listed(b"n", ino=number), key=key, learn=True)
    pairs = list(zip(dirs[::2], dirs[1::2], strict=True))
    there = [renamed(a, b"n", b, b"n", build.key(1)) for a, b in pairs]
    back = [renamed(b, b"n", a, b"n", build.key(2)) for a, b in reversed(pairs)]
    index.apply(b"".join(there + back))
    for number, key in enumerate(dirs):
        assert diff(index, listed(b"n", ino=number ^ 1), key=key) == []


@pytest.mark.parametrize(
    "data",
    [
        exchanged(one=OTHER),  # the same object there and back
        exchanged(second=2),  # another process
        exchanged(named(CREATE, E, b"b", F)),
        exchanged(named(DELETE, D, b"a", F)),
        exchanged(event(Q_OVERFLOW)),
        exchanged(*[named(MODIFY, D, b"c")] * 16),
    ],
)
def test_what_is_no_exchange(index, data):
    fill(index)
    index.apply(data)
    assert index.names(D) == [(b"a", True)]
    assert index.names(E) == []


def test_half_an_exchange_is_held(index):
    diff(index, listed(b"b", ino=2, flags=LISTED_DIR), key=E, learn=True)
    index.apply(exchanged())
    assert index.names(E) == [(b"b", False)]
    assert D not in index


def test_created_and_deleted_in_one_is_gone(index):
    index.hold(D)
    index.put(D, b"f", False)
    index.apply(named(CREATE | DELETE, D, b"f", F))
    assert index.names(D) == []


def test_a_name_made_again_has_no_data(index):
    diff(index, listed(b"f", ino=1, size=1), learn=True)
    index.apply(named(DELETE, D, b"f", F) + named(CREATE, D, b"f", F), 10)
    assert diff(index, listed(b"f", ino=2, size=2, ctime=10)) == []
    index.apply(named(CREATE, D, b"f", F), 20)
    assert diff(index, listed(b"f", ino=3, size=3, ctime=20)) == []


def test_records_without_a_name_and_overflows(index):
    diff(index, listed(b"f"), learn=True)
    index.apply(
        event(Q_OVERFLOW)
        + event(DELETE, fid(FID, F))
        + named(DELETE | Q_OVERFLOW, D, b"f", F)
        + named(DELETE, D, b"", F)
        + named(CREATE, D, b".", F)
    )
    assert index.names(D) == [(b"f", False)]


def test_a_window_of_several_chunks(parts, index):
    index.hold(D)
    chunks = [named(CREATE, D, b"f%d" % i, F) for i in range(5)]
    decoder = decoder_of(parts, *chunks, b"", named(DELETE, D, b"f3", F))
    index.apply(decoder)
    assert [name for name, _ in index.names(D)] == [b"f0", b"f1", b"f2", b"f4"]
    decoder.finish()
    index.apply(decoder)
    assert len(index) == 4


def test_a_malformed_chunk_changes_nothing(index):
    index.hold(D)
    good = named(CREATE, D, b"f", F)
    with pytest.raises(DecodeError) as raised:
        index.apply(good + good[:-4])
    assert str(len(good)) in str(raised.value)
    assert len(index) == 0


# -- corrections --


def test_corrections(index):
    index.put(D, b"f", False, 10)
    index.put(D, b"f", True)
    assert index.names(D) == [(b"f", True)]
    assert index.move(D, b"no", E, b"x") is False
    assert E not in index
    assert index.move(D, b"f", E, b"g") is True
    assert (index.names(D), index.names(E)) == ([], [(b"g", True)])
    index.put(E, b"h", False)
    assert index.move(E, b"h", E, b"g") is True
    assert index.names(E) == [(b"g", False)]
    assert index.move(E, b"g", E, b"g") is True
    assert index.remove(E, b"g") is True
    assert index.remove(E, b"g") is False
    assert index.remove(F, b"g") is False
    assert F not in index
    index.put(E, b"i", False)
    index.forget(E)
    index.forget(E)
    assert (len(index), E in index, D in index) == (0, False, True)
    index.clear()
    assert D not in index


def test_what_is_put_is_bound(index):
    index.put(D, b"f", False, 10)
    index.put(D, b"g", False, 10)
    now = listed(b"f", ctime=10), listed(b"g", ctime=11)
    assert diff(index, *now) == [(MODIFIED, b"g", False)]


# -- what is no argument --


@pytest.mark.parametrize(
    ("listing", "why"),
    [
        (b"x", "cut short"),
        (listed(b"f")[:-1], "does not fit"),
        (listed(b"f") + b"x" * 39, "cut short"),
        (listed(b""), "does not fit"),
        (
            listed(b"f") + struct.pack(LISTED, 0, 0, 0, 0, 0, 65535, 0) + b"y" * 65534,
            "does not fit",
        ),
    ],
)
def test_a_listing_that_is_none_changes_nothing(index, listing, why):
    diff(index, listed(b"kept"), learn=True)
    with pytest.raises(ValueError, match=why):
        index.diff(D, listing, None, False)
    with pytest.raises(ValueError, match=why):
        index.diff(E, listing, None, False)
    assert index.names(D) == [(b"kept", False)]
    assert E not in index


def test_a_name_listed_twice_counts_once(index):
    twice = listed(b"f", size=1), listed(b"g"), listed(b"f", size=2)
    assert diff(index, *twice) == [(CREATED, b"f", False), (CREATED, b"g", False)]
    assert diff(index, *twice) == []
    assert diff(index, listed(b"f", size=2), listed(b"g")) == [(MODIFIED, b"f", False)]
    assert len(index) == 2


def test_long_names(index):
    names = [bytes([number % 256]) * 65535 for number in range(1, 40)]
    names = [b"%d" % number + name[:-3] for number, name in enumerate(names)]
    diff(index, *map(listed, names), learn=True)
    assert [name for name, _ in index.names(D)] == sorted(names)
    for name in names[::2]:
        assert index.remove(D, name)
    assert len(diff(index, *map(listed, names))) == 20


@pytest.mark.parametrize(
    ("call", "args", "error"),
    [
        ("diff", (bytes(133), b"", None, False), ValueError),
        ("diff", ("D", b"", None, False), TypeError),
        ("diff", (D, "", None, False), TypeError),
        ("diff", (D, b"", [], False), TypeError),
        ("diff", (D, b"", {"f": (True, False)}, False), TypeError),
        ("diff", (D, b"", {b"f": (True,)}, False), TypeError),
        ("diff", (D, b"", {b"f": (1, 0)}, False), TypeError),
        ("diff", (D, b"", {b"f": True}, False), TypeError),
        ("diff", (D, b"", None, 1), TypeError),
        ("diff", (D, b"", None, False, 1.5), TypeError),
        ("diff", (D, b"", None, False, 1 << 63), OverflowError),
        ("diff", (D, b"", None), TypeError),
        ("apply", (None,), TypeError),
        ("apply", (b"", -(1 << 63) - 1), OverflowError),
        ("apply", (b"", None), TypeError),
        ("apply", (), TypeError),
        ("hold", (bytes(133),), ValueError),
        ("hold", (None,), TypeError),
        ("put", (D, b"", False), ValueError),
        ("put", (D, b".", False), ValueError),
        ("put", (D, bytes(65536), False), ValueError),
        ("put", (D, "f", False), TypeError),
        ("put", (D, b"f", 1), TypeError),
        ("put", (D, b"f"), TypeError),
        ("move", (D, b"f", E, b""), ValueError),
        ("move", (D, b"f", bytes(133), b"f"), ValueError),
        ("move", (D, b"f", E), TypeError),
        ("remove", (D, b""), ValueError),
        ("remove", (D, None), TypeError),
        ("find", (D, b"."), ValueError),
        ("names", (bytes(200),), ValueError),
        ("forget", (1,), TypeError),
        ("__contains__", (bytes(133),), ValueError),
    ],
)
def test_wrong_arguments(index, call, args, error):
    index.put(D, b"f", False)
    with pytest.raises(error):
        getattr(index, call)(*args)
    assert (len(index), E in index) == (1, False)


def test_the_other_twins_decoder_is_refused(cannot_run):
    native = native_parts(cannot_run)
    for one, other in ((native, PURE), (PURE, native)):
        with pytest.raises(TypeError):
            one.Index().apply(decoder_of(other, b""))


@pytest.mark.parametrize("part", range(5))
def test_a_window_is_taken_in_parts(parts, part):
    """Up to the record that is being decoded, and the rest later: each record once."""
    records = [
        named(CREATE, D, b"f", F),
        exchanged(one=F),
        named(DELETE, D, b"f", F),
    ]
    window = named(CREATE | ONDIR, D, b"a", E) + named(CREATE, E, b"b", OTHER) + b"".join(records)
    whole, index = parts.Index(), parts.Index()
    for each in whole, index:
        each.hold(D)
        each.hold(E)
    whole.apply(window)
    decoder = decoder_of(parts, window)
    for _ in range(part):
        decoder.advance()
    index.apply(decoder, 0, False)
    index.apply(decoder, 0, False)  # nothing is left of that
    index.apply(decoder, 0)
    for key in D, E:
        assert index.names(key) == whole.names(key)
    index.apply(decoder_of(parts, named(CREATE, D, b"next", F)), 0)  # another window
    assert index.find(D, b"next") is False


def test_what_is_not_held_yet_is_passed(parts):
    index = parts.Index()
    decoder = decoder_of(parts, named(CREATE, D, b"before", F) + named(CREATE, D, b"after", F))
    decoder.advance()
    index.apply(decoder, 0, False)
    index.hold(D)
    index.apply(decoder, 0)
    assert index.names(D) == [(b"after", False)]


def test_what_was_made_in_a_directory_stays_that_is_gone_in_one_record(index):
    index.hold(D)
    index.hold(E)
    index.apply(named(CREATE | DELETE | ONDIR, D, b"d", E) + named(CREATE, E, b"f", F))
    assert (index.names(D), index.names(E)) == ([], [(b"f", False)])


# -- the twins --

KEYS = st.sampled_from([D, E, F, build.key(5), b"", bytes(132)])
NAMES = st.sampled_from([b"a", b"b", b"c", b"d", b"long" * 60, b"\xff\n", b"a" * 8, b"a" * 9])
TIMES = st.integers(-1, 4)
ENTRIES = st.lists(
    st.builds(
        listed, NAMES, st.integers(0, 2), st.integers(0, 1), TIMES, TIMES,
        st.sampled_from([0, 0, 0, LISTED_DIR, LISTED_DIR, LISTED_HIDDEN, 3, 1 << 31]),
    ),
    max_size=8,
)  # fmt: skip
LISTINGS = ENTRIES.map(b"".join)
BAD_LISTINGS = st.binary(max_size=90) | st.builds(
    lambda listing, cut, byte: listing[:cut] + byte + listing[cut + 1 :],
    LISTINGS, st.integers(0, 200), st.binary(min_size=1, max_size=1),
)  # fmt: skip
FIRSTS = st.none() | st.dictionaries(
    NAMES | st.sampled_from([b"", b"."]) | st.builds(bytes, st.just(65536)),
    st.tuples(st.booleans(), st.booleans()),
    max_size=4,
)
ODD_NAMES = NAMES | st.sampled_from([b"", b"."])
MASKS = st.sampled_from(
    [CREATE, CREATE | ONDIR, DELETE, DELETE | ONDIR, CREATE | DELETE, MODIFY, ATTRIB, CLOSE_WRITE,
     MODIFY | CREATE, DELETE_SELF | ONDIR, Q_OVERFLOW, RENAME, 0x20, ONDIR | ATTRIB]
)  # fmt: skip
TARGETS = st.none() | st.sampled_from([D, E, F, build.key(5), build.key(6)])
HELD = st.sampled_from([D, E, F])


def there_and_back(dir1, name1, dir2, name2, one, two, between, pid):
    back = renamed(dir2, name2, dir1, name1, two, pid=pid)
    return renamed(dir1, name1, dir2, name2, one) + b"".join(between) + back


RECORDS = st.one_of(
    st.builds(named, MASKS, HELD, ODD_NAMES, TARGETS, st.integers(1, 2)),
    st.builds(
        renamed, HELD, ODD_NAMES, HELD, ODD_NAMES, TARGETS.filter(bool),
        st.sampled_from([0, ONDIR]), st.integers(1, 2),
    ),
    st.builds(
        there_and_back, HELD, NAMES, HELD, NAMES, TARGETS.filter(bool), TARGETS.filter(bool),
        st.lists(st.builds(named, MASKS, HELD, NAMES, TARGETS), max_size=3), st.integers(1, 2),
    ),
    st.builds(lambda mask, key: event(mask, fid(DFID, key)), MASKS, HELD),
    st.builds(lambda mask, key: event(mask, fid(FID, key)), MASKS, HELD),
    st.builds(
        lambda key, name: event(RENAME, fid(NEW_DFID_NAME, key, name), fid(FID, E)), HELD, NAMES
    ),
)  # fmt: skip
CHUNKS = st.lists(RECORDS, max_size=8).map(b"".join)


class Same(RuleBasedStateMachine):
    native = None

    @initialize()
    def begin(self):
        self.both = [self.native.Index(), PURE.Index()]

    def do(self, name, *args):
        told = []
        for index in self.both:
            try:
                told.append(getattr(index, name)(*args))
            except (ValueError, DecodeError) as error:
                told.append((type(error), str(error)))
        assert told[0] == told[1], (name, args, told)

    @rule(key=KEYS, listing=LISTINGS, firsts=FIRSTS, learn=st.booleans(), told=TIMES)
    def diff(self, key, listing, firsts, learn, told):
        self.do("diff", key, listing, firsts, learn, told)

    @rule(key=HELD, listing=LISTINGS, told=TIMES)
    def diff_held(self, key, listing, told):
        self.do("diff", key, listing, None, False, told)

    @rule(key=KEYS, listing=BAD_LISTINGS)
    def diff_anything(self, key, listing):
        self.do("diff", key, listing, None, False)

    @rule(data=CHUNKS, before=TIMES)
    def apply(self, data, before):
        self.do("apply", data, before)

    @rule(chunks=st.lists(CHUNKS, max_size=4), before=TIMES)
    def apply_window(self, chunks, before):
        for index, parts in zip(self.both, (self.native, PURE), strict=True):
            index.apply(decoder_of(parts, *chunks), before)

    @rule(
        chunks=st.lists(CHUNKS, max_size=4),
        before=TIMES,
        steps=st.lists(st.tuples(st.integers(0, 9), HELD, st.booleans()), max_size=4),
    )
    def apply_in_parts(self, chunks, before, steps):
        for index, parts in zip(self.both, (self.native, PURE), strict=True):
            decoder = decoder_of(parts, *chunks)
            for count, key, held in steps:
                for _ in range(count):
                    decoder.advance()
                index.apply(decoder, before, False)
                (index.hold if held else index.forget)(key)
            index.apply(decoder, before)

    @rule(data=CHUNKS, cut=st.integers(0, 400), byte=st.binary(max_size=1))
    def apply_anything(self, data, cut, byte):
        self.do("apply", data[:cut] + byte + data[cut + 1 :])

    @rule(key=KEYS, name=NAMES, is_dir=st.booleans(), bound=TIMES)
    def put(self, key, name, is_dir, bound):
        self.do("put", key, name, is_dir, bound)

    @rule(key=KEYS, name=NAMES)
    def remove(self, key, name):
        self.do("remove", key, name)

    @rule(key=KEYS, name=NAMES, key2=KEYS, name2=NAMES)
    def move(self, key, name, key2, name2):
        self.do("move", key, name, key2, name2)

    @rule(key=KEYS)
    def hold(self, key):
        self.do("hold", key)

    @rule(key=KEYS)
    def forget(self, key):
        self.do("forget", key)

    @rule(odds=st.integers(0, 9))
    def clear(self, odds):
        if not odds:
            self.do("clear")

    @invariant()
    def the_same(self):
        if not hasattr(self, "both"):
            return
        assert len(self.both[0]) == len(self.both[1])
        for key in (D, E, F, build.key(5), build.key(6), b"", bytes(132)):
            self.do("names", key)
            self.do("__contains__", key)
            self.do("find", key, b"a")


def same_under(found, examples, steps):
    class Machine(Same):
        native = found

    case = Machine.TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    case("runTest").runTest()


def test_any_sequence_of_calls(cannot_run):
    same_under(native_parts(cannot_run), 150, 40)


def random_listing(rng, names):
    chosen = rng.sample(names, rng.randrange(len(names)))
    return b"".join(
        listed(name, rng.randrange(3), rng.randrange(2), rng.randrange(3), rng.randrange(3),
               rng.choice((0, 0, LISTED_DIR)))
        for name in chosen
    )  # fmt: skip


@pytest.mark.parametrize("seed", [1, 2])
def test_growth_and_shrinkage(cannot_run, seed):
    """Thousands of directories come and go; memory follows, and no answer differs."""
    rng = random.Random(seed)
    both = [native_parts(cannot_run).Index(), PURE.Index()]
    names = [b"%x" % rng.getrandbits(40) + b"z" * rng.randrange(40) for _ in range(60)]
    keys = [build.key(number) for number in range(3_000)]
    peak = 0
    for phase in range(4):
        for key in rng.sample(keys, len(keys)):
            if phase % 2:
                if rng.random() < 0.97:
                    for index in both:
                        index.forget(key)
                continue
            listing = random_listing(rng, names)
            told = [index.diff(key, listing, None, False, 1) for index in both]
            assert told[0] == told[1]
            if rng.random() < 0.2:
                other, name, name2 = rng.choice(keys), rng.choice(names), rng.choice(names)
                data = renamed(key, name, other, name2) + named(DELETE, key, rng.choice(names), F)
                for index in both:
                    index.apply(data)
        peak = max(peak, both[0].nbytes)
        assert len(both[0]) == len(both[1])
        for key in rng.sample(keys, 100):
            assert both[0].names(key) == both[1].names(key)
    assert len(both[0]) < 6_000
    assert both[0].nbytes < peak / 8
    for key in keys:
        listing = random_listing(rng, names)
        assert both[0].diff(key, listing, None, False) == both[1].diff(key, listing, None, False)


def test_names_changed_often_do_not_pile_up(index):
    for number in range(100):
        index.put(D, b"%d" % number + b"x" * 200, False)
    before = index.nbytes
    for number in range(100_000):
        index.move(D, b"%d" % number + b"x" * 200, D, b"%d" % (number + 100) + b"x" * 200)
    assert len(index) == 100
    assert index.nbytes < before * 3 + 100_000


def test_what_records_delete_gives_its_memory_back(cannot_run):
    index = native_parts(cannot_run).Index()
    names = [b"%06d" % number for number in range(20_000)]
    diff(index, *map(listed, names), learn=True)
    before = index.nbytes
    index.apply(b"".join(named(DELETE, D, name, F) for name in names[10:]))
    assert index.names(D) == [(name, False) for name in names[:10]]
    assert index.nbytes < before / 20


MEMORY = """
import struct, sys
from pathlib import Path
from fanwise.kernel.contract import LISTED
from fanwise.kernel.native import parts

def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024

def listing(directory):
    return b"".join(
        struct.pack(LISTED, directory * 1000 + n, n, n, n, 0, 10, 0) + b"file%06d" % n
        for n in range(1000)
    )

index = parts(pure=False).Index()
listing(0)
before = resident()
for directory in range(1000):
    key = struct.pack("=iQ", 1, directory)
    assert index.diff(key, listing(directory), None, True) == []
rss = resident() - before
for directory in range(0, 1000, 7):  # and in steady use
    key = struct.pack("=iQ", 1, directory)
    index.diff(key, listing(directory)[50_000 // 2 :], None, False)
    index.diff(key, listing(directory), None, False)
print(len(index), index.nbytes, rss, resident() - before)
"""


def test_memory_for_a_million_names(cannot_run):
    """Not more than 160 bytes a file beyond its name (10 bytes here), of what the process holds."""
    native_parts(cannot_run)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True
    )
    count, held, resident, later = map(int, done.stdout.split())
    assert count == 1_000_000
    for total in (held, resident, later):
        assert total <= (160 + 10) * count, done.stdout


def test_nothing_is_leaked(parts):
    def once():
        index = parts.Index()
        diff(index, *(listed(b"f%d" % number) for number in range(50)), firsts={b"x": (True, True)})
        diff(index, listed(b"f7", size=1), listed(b"new"))
        index.names(D)
        index.apply(decoder_of(parts, named(CREATE | ONDIR, D, b"d", E)))
        for bad in (b"x", listed(b"")):
            with contextlib.suppress(ValueError):
                index.diff(D, bad, None, False)
        with contextlib.suppress(DecodeError):
            index.apply(b"x")

    assert not leaks(once)
