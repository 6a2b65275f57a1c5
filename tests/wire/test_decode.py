"""The decoder of windows, record by record, on both twins with the same expectations."""

import contextlib
import os
import struct

import pytest

from fanwise._errors import DecodeError
from fanwise.kernel import records
from fanwise.kernel.contract import (
    CURRENT,
    EXCLUDED,
    FILES,
    IN,
    N_ATTRIB,
    N_BORN,
    N_BOTH,
    N_CREATE,
    N_DELETE,
    N_DIR,
    N_GONE,
    N_TWICE,
    N_UNKNOWN,
    ROOT,
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
    TOP,
)
from fanwise.kernel.fanotify import (
    FAN_ACCESS as ACCESS,
    FAN_ATTRIB as ATTRIB,
    FAN_CLOSE_WRITE as CLOSE_WRITE,
    FAN_CREATE as CREATE,
    FAN_DELETE as DELETE,
    FAN_DELETE_SELF as DELETE_SELF,
    FAN_MODIFY as MODIFY,
    FAN_ONDIR as ONDIR,
    FAN_OPEN as OPEN,
    FAN_OPEN_EXEC as OPEN_EXEC,
    FAN_Q_OVERFLOW as Q_OVERFLOW,
    FAN_RENAME as RENAME,
)
from fanwise.kernel.handles import identity
from fanwise.watch._change import KIND_TABLE
from tests.wire import build
from tests.wire.build import DFID, DFID_NAME, FID, NEW_DFID_NAME, OLD_DFID_NAME, fid
from tests.wire.twins import PURE, leaks, native_parts

TOLD = CREATE | MODIFY | CLOSE_WRITE | ATTRIB | RENAME | DELETE
ALL = TOLD | OPEN | ACCESS | OPEN_EXEC

MNT, SUB, OUT, ONE, CUT, NEW, F, G, H = (build.key(number) for number in range(2, 11))


@pytest.fixture(params=["native", "pure"])
def parts(request, cannot_run):
    return PURE if request.param == "pure" else native_parts(cannot_run)


@pytest.fixture
def window(parts):
    return lambda *args, **more: Window(parts, *args, **more)


class Window:
    """A decoder over /mnt: /mnt/sub is watched, /mnt/out is not, of /mnt/one only some names."""

    def __init__(self, parts, *recs, want=TOLD, pids=(), make=lambda *row: row, top=b"/mnt"):
        self.tree = parts.Tree()
        self.top = self.tree.put(MNT, -1, top, TOP)
        self.sub = self.tree.put(SUB, self.top, b"sub", ROOT)
        self.out = self.tree.put(OUT, self.top, b"out", 0)
        self.one = self.tree.put(ONE, self.top, b"one", FILES)
        self.cut = self.tree.put(CUT, self.sub, b"cut", EXCLUDED)
        self.gone = {}
        self.d = parts.Decoder(self.tree, make, KIND_TABLE, want, "8:1", pids, self.gone)
        if recs:
            assert self.d.add(b"".join(recs), 1.5) == len(recs)

    def rows(self, limit=1000):
        """Everything up to the end; nothing may stop it."""
        rows, stop = self.d.decode(limit)
        assert stop == STOP_NONE
        assert not self.d.pending
        return rows

    def stops(self):
        """What it stops at, each passed over, and the rows in between."""
        out = []
        while True:
            rows, stop = self.d.decode(1000)
            out += rows
            if not stop:
                assert not self.d.pending
                return out
            out.append(stop)
            self.d.advance()


def named(mask, directory, name, target, pid=1):
    info = [fid(DFID_NAME, directory, name)]
    return build.event(mask, *info, *([fid(FID, target)] if target else []), pid=pid)


def renamed(directory, name, directory2, name2, target=F, pid=1, mask=RENAME):
    return build.event(
        mask,
        fid(OLD_DFID_NAME, directory, name),
        fid(NEW_DFID_NAME, directory2, name2),
        *([fid(FID, target)] if target else []),
        pid=pid,
    )


def nameless(mask, target, pid=1):
    return build.event(mask, fid(FID, target), pid=pid)


def itself(mask, directory, name=b".", pid=1):
    return build.event(mask, fid(DFID_NAME, directory, name), pid=pid)


def row(kinds, path, old=None, key=F, is_dir=False, pid=1, source="exact", time=1.5, more=()):
    kinds = tuple(kinds.split())
    who = key and identity((8, 1), key)
    return (kinds, path, old, is_dir, pid, who, time, source, *more)


# -- rows --


@pytest.mark.parametrize(
    ("mask", "kinds"),
    [(CREATE, "created"), (MODIFY, "modified"), (CLOSE_WRITE, "written"), (ATTRIB, "attributes"),
     (DELETE, "deleted"), (OPEN, "opened"), (ACCESS, "accessed"), (OPEN_EXEC, "executed"),
     (CREATE | MODIFY | CLOSE_WRITE, "created modified written"),
     (ALL & ~(RENAME | DELETE), "created modified written attributes opened accessed executed")],
)  # fmt: skip
def test_a_file(window, mask, kinds):
    assert window(named(mask, SUB, b"f", F, pid=77), want=ALL).rows() == [
        row(kinds, "/mnt/sub/f", pid=77)
    ]


def test_the_bytes_of_one_record(window):
    # What a kernel writes for creating "f" in a directory, with the pid 4660, byte by byte.
    data = bytes.fromhex(
        "54000000 03 00 1800 0801000000000000 ffffffff 34120000"
        "02 00 2000 0102030405060708 08000000 01000000 0300000001000000 66000000"
        "01 00 1c00 0102030405060708 08000000 01000000 0800000001000000"
    )
    assert data == named(CREATE | CLOSE_WRITE, SUB, b"f", F, pid=4660)
    w = window()
    assert w.d.add(data, 2.25) == 1
    kinds = ("created", "written")
    assert w.rows() == [
        (kinds, "/mnt/sub/f", None, False, 4660, "8:1/1/0800000001000000", 2.25, "exact")
    ]


def test_identities(window):
    for kind in (0, 1, 0x4D, 0x7FFFFFFF, -1, -0x80000000):
        for size in (5, 12, 132):
            key = struct.pack("=i", kind) + bytes(range(100, 100 + size - 4))
            (made,) = window(named(MODIFY, SUB, b"f", key)).rows()
            assert made == row("modified", "/mnt/sub/f", key=key)
    assert window(named(MODIFY, SUB, b"f", None)).rows() == [
        row("modified", "/mnt/sub/f", key=None)
    ]


@pytest.mark.parametrize(
    "name", [b"\xff\xfe", b"a\nb", b"\xc3", b"n" * 255, b" ", "\u00fc".encode()]
)
def test_names_are_bytes(window, name):
    w = window(named(MODIFY, SUB, name, F), renamed(SUB, name, SUB, b"x" + name))
    text = os.fsdecode(name)
    assert w.rows() == [
        row("modified", f"/mnt/sub/{text}"),
        row("renamed", f"/mnt/sub/x{text}", f"/mnt/sub/{text}"),
    ]
    w = window(named(MODIFY, NEW, b"f", F))
    w.tree.put(NEW, w.sub, name, 0)
    assert w.rows() == [row("modified", f"/mnt/sub/{text}/f")]


@pytest.mark.parametrize("top", [b"/", b"/mnt", b"/a/b"])
def test_below_any_mount_point(window, top):
    w = window(
        named(MODIFY, MNT, b"f", F), itself(MODIFY, MNT), renamed(MNT, b"f", SUB, b"g"), top=top
    )
    w.tree.flag(w.top, ROOT, 0)
    base = "" if top == b"/" else top.decode()
    assert w.rows() == [
        row("modified", f"{base}/f"),
        row("modified", base or "/", key=MNT, is_dir=True),
        row("renamed", f"{base}/sub/g", f"{base}/f"),
    ]


def test_a_directory_that_is_no_name_event(window):
    w = window(named(ATTRIB | ONDIR, SUB, b"d", NEW), itself(MODIFY | ONDIR, SUB, b""))
    assert w.rows() == [
        row("attributes", "/mnt/sub/d", key=NEW, is_dir=True),
        row("modified", "/mnt/sub", key=SUB, is_dir=True),
    ]
    w = window(build.event(MODIFY | ONDIR, fid(DFID, SUB)))
    assert w.rows() == [row("modified", "/mnt/sub", key=SUB, is_dir=True)]


def test_a_rename(window):
    assert window(renamed(SUB, b"a", SUB, b"b")).rows() == [
        row("renamed", "/mnt/sub/b", "/mnt/sub/a")
    ]
    assert window(renamed(OUT, b"a", SUB, b"b")).rows() == [row("created", "/mnt/sub/b")]
    assert window(renamed(SUB, b"a", OUT, b"b")).rows() == [row("deleted", "/mnt/sub/a")]
    assert window(renamed(SUB, b"a", CUT, b"b")).rows() == [row("deleted", "/mnt/sub/a")]
    assert window(renamed(OUT, b"a", MNT, b"b")).rows() == []
    assert window(renamed(SUB, b"a", SUB, b"b", None)).rows() == [
        row("renamed", "/mnt/sub/b", "/mnt/sub/a", key=None)
    ]
    w = window(named(CREATE, SUB, b"c", G), renamed(SUB, b"a", SUB, b"b", None))
    assert w.rows()[1] == row("renamed", "/mnt/sub/b", "/mnt/sub/a", key=None)
    assert window(renamed(SUB, b"a", SUB, b"b"), want=MODIFY).rows() == []
    assert window(renamed(OUT, b"a", SUB, b"b"), want=RENAME | DELETE).rows() == []
    assert window(renamed(SUB, b"a", OUT, b"b"), want=RENAME | CREATE).rows() == []
    assert window(renamed(SUB, b"a", OUT, b"b"), want=DELETE).rows() == [
        row("deleted", "/mnt/sub/a")
    ]


def test_a_rename_is_nothing_else(window):
    w = window(renamed(SUB, b"f", SUB, b"g", mask=RENAME | MODIFY))
    assert [r[0] for r in w.rows()] == [("renamed",)]


def test_a_rename_between_directories_that_share_a_place_in_the_cache(window):
    w = window()
    keys = [build.key(number) for number in range(1000, 3100)]
    at = [w.tree.put(k, w.sub, b"%d" % i, 0) for i, k in enumerate(keys)]
    other = at.index(at[1] + 1024)
    w.d.add(renamed(keys[1], b"a", keys[other], b"b") + renamed(keys[other], b"b", OUT, b"c"), 1.5)
    assert w.rows() == [
        row("renamed", f"/mnt/sub/{other}/b", "/mnt/sub/1/a"),
        row("deleted", f"/mnt/sub/{other}/b"),
    ]


def test_outside_of_the_roots_nothing_is_told(window):
    w = window(
        named(MODIFY, OUT, b"f", F), named(CREATE | DELETE, CUT, b"f", F), itself(MODIFY, MNT),
        named(MODIFY, OUT, b"#12", F), want=ALL,
    )  # fmt: skip
    assert w.rows() == []
    assert w.d.notes(F) == (0, 0, 0)  # nothing needs to be known of it


def test_current_paths(window):
    recs = (named(MODIFY, SUB, b"f", F), itself(MODIFY, SUB), renamed(SUB, b"a", SUB, b"b"),
            renamed(SUB, b"a", OUT, b"b"), renamed(OUT, b"a", SUB, b"b"))  # fmt: skip
    w = window(*recs)
    w.tree.flag(w.sub, CURRENT, 0)
    assert [made[7] for made in w.rows()] == ["current"] * 5
    w = window(*recs)
    w.tree.flag(w.out, CURRENT, 0)
    assert [made[7] for made in w.rows()] == ["exact"] * 5
    w = window(renamed(SUB, b"a", NEW, b"b"), renamed(NEW, b"a", SUB, b"b"))
    w.tree.put(NEW, w.sub, b"new", CURRENT)
    assert [made[7] for made in w.rows()] == ["current"] * 2


def test_wanted_kinds(window):
    rec = named(CREATE | MODIFY | CLOSE_WRITE, SUB, b"f", F)
    assert window(rec, want=MODIFY | DELETE).rows() == [row("modified", "/mnt/sub/f")]
    assert window(rec, want=DELETE).rows() == []
    assert window(rec, want=0).rows() == []


def test_ignored_processes(window):
    recs = (
        named(MODIFY, SUB, b"a", F, pid=5), named(MODIFY, SUB, b"b", F, pid=6),
        renamed(SUB, b"a", SUB, b"b", pid=5), itself(MODIFY, SUB, pid=5),
        renamed(OUT, b"a", SUB, b"b", pid=5), named(CREATE, SUB, b"b", F, pid=5),
    )  # fmt: skip
    assert window(*recs, pids=(5, 9)).rows() == [row("modified", "/mnt/sub/b", pid=6)]
    # What they do to names still counts.
    w = window(named(DELETE, SUB, b"a", F, pid=5), named(MODIFY, SUB, b"a", F), pids=(5,))
    assert w.rows() == [row("modified", "/mnt/sub/a", more=(None, True, None))]
    w = window(named(CREATE | ONDIR, SUB, b"d", NEW, pid=5), pids=(5,))
    assert w.stops() == [STOP_DIR]


# -- stops --


def test_where_it_stops(window):
    for rec, stop in [
        (named(CREATE | ONDIR, SUB, b"d", NEW), STOP_DIR),
        (named(DELETE | ONDIR, OUT, b"d", NEW), STOP_DIR),
        (renamed(NEW, b"d", H, b"e", mask=RENAME | ONDIR), STOP_DIR),
        (itself(ATTRIB | ONDIR, SUB), STOP_SELF),
        (itself(DELETE_SELF | ONDIR, NEW), STOP_SELF),
        (itself(MODIFY, NEW), STOP_UNKNOWN),
        (named(MODIFY, NEW, b"f", F), STOP_UNKNOWN),
        (renamed(NEW, b"f", SUB, b"g"), STOP_UNKNOWN),
        (renamed(OUT, b"f", NEW, b"g"), STOP_UNKNOWN),
        (build.event(RENAME, fid(OLD_DFID_NAME, SUB, b"f"), fid(FID, F)), STOP_UNKNOWN),
        (named(MODIFY, SUB, b"#12", F), STOP_HASH),
        (named(ATTRIB | ONDIR, SUB, b"#0", F), STOP_HASH),
        (named(CREATE | DELETE, SUB, b"f", F), STOP_BOTH),
        (named(CREATE | DELETE | MODIFY, SUB, b"#1", F), STOP_BOTH),
        (build.event(Q_OVERFLOW, pid=0), STOP_OVERFLOW),
        (named(MODIFY, ONE, b"f", F), STOP_FILES),
        (renamed(ONE, b"f", SUB, b"g"), STOP_FILES),
        (renamed(OUT, b"f", ONE, b"g"), STOP_FILES),
        (nameless(MODIFY, F), STOP_NAMELESS),
        (nameless(MODIFY | ATTRIB, F), STOP_NAMELESS),
    ]:
        w = window(named(MODIFY, SUB, b"x", G), rec, named(MODIFY, SUB, b"y", G))
        rows, code = w.d.decode(100)
        assert (rows, code) == ([row("modified", "/mnt/sub/x", key=G)], stop)
        assert w.d.decode(100) == ([], stop)  # until it is settled
        assert w.d.pending
        assert w.d.record()[0] == records.decode(rec)[0].mask
        w.d.advance()
        assert w.rows() == [row("modified", "/mnt/sub/y", key=G)]


def test_where_it_does_not_stop(window):
    w = window(
        named(MODIFY, SUB, b"#", F), named(MODIFY, SUB, b"#1a", F), named(CREATE, SUB, b"#1", F),
        nameless(ATTRIB, F), nameless(DELETE_SELF, F), nameless(OPEN, F),
        build.event(MODIFY), build.event(ATTRIB, fid(FID, b"\1\0\0\0")),
    )  # fmt: skip
    assert [made[1] for made in w.rows()] == ["/mnt/sub/#", "/mnt/sub/#1a", "/mnt/sub/#1"]


def test_both_where_the_object_is_gone(window):
    w = window(named(CREATE | DELETE | MODIFY, SUB, b"f", F), nameless(DELETE_SELF, F))
    more = (None, False, False)
    assert w.rows() == [row("created modified deleted", "/mnt/sub/f", more=more)]
    w = window(named(CREATE | DELETE, SUB, b"f", F), nameless(DELETE_SELF, F), want=CREATE)
    assert w.rows() == [row("created", "/mnt/sub/f")]
    assert window(named(CREATE | DELETE, SUB, b"f", None)).rows() == [
        row("created deleted", "/mnt/sub/f", key=None)
    ]


def test_the_record_at_a_stop(window):
    w = window()
    w.d.add(renamed(SUB, b"a", SUB, b"b", F, pid=3), 1.0)
    w.d.add(b"", 1.1)
    w.d.add(nameless(ATTRIB, G, pid=3) + named(MODIFY, NEW, b"n", None), 2.0)
    w.d.add(itself(ATTRIB, SUB) + build.event(Q_OVERFLOW, pid=0), 3.0)
    assert w.d.records == 5
    assert w.d.decode(10) == ([], STOP_REPLACED)
    assert w.d.record() == (RENAME, 3, 1.0, SUB, b"a", SUB, b"b", F, G)
    w.d.advance()
    assert w.d.record() == (ATTRIB, 3, 2.0, None, None, None, None, G, None)
    assert w.d.decode(10) == ([], STOP_UNKNOWN)
    assert w.d.record() == (MODIFY, 1, 2.0, NEW, b"n", None, None, None, None)
    w.d.advance()
    assert w.d.decode(10) == ([], STOP_SELF)
    assert w.d.record() == (ATTRIB, 1, 3.0, SUB, b".", None, None, None, None)
    w.d.advance()
    assert w.d.decode(10) == ([], STOP_OVERFLOW)
    assert w.d.record() == (Q_OVERFLOW, 0, 3.0, None, None, None, None, None, None)
    w.d.advance()
    assert not w.d.pending
    with pytest.raises(IndexError, match="no record left"):
        w.d.record()
    w.d.advance()  # there is nothing to pass over
    assert w.d.decode(10) == ([], STOP_NONE)


# -- who was replaced --


def victim(window, *recs, chunks=False):
    first = renamed(SUB, b"a", SUB, b"b", F, pid=3)
    w = window(first)
    if chunks:
        for rec in recs:
            w.d.add(rec, 1.5)
    else:
        w.d.add(b"".join(recs), 1.5)
    rows, stop = w.d.decode(1)
    if stop == STOP_REPLACED:
        assert rows == []
        return w.d.record()[8]
    assert (rows, stop) == ([row("renamed", "/mnt/sub/b", "/mnt/sub/a", pid=3)], STOP_NONE)
    return None


@pytest.mark.parametrize("chunks", [False, True])
def test_the_replaced_one(window, chunks):
    def find(*recs):
        return victim(window, *recs, chunks=chunks)

    others = [named(CREATE, SUB, b"%d" % i, H, pid=4) for i in range(64)]
    fell = nameless(ATTRIB, G, pid=3)
    assert find() is None
    assert find(fell) == G
    assert find(nameless(ATTRIB | DELETE_SELF, G, pid=3)) == G
    assert find(*others[:63], fell) == G
    assert find(*others, fell) is None  # beyond 64 records it is not looked for
    assert find(build.event(Q_OVERFLOW, pid=3), fell) == G
    assert find(nameless(ATTRIB, F, pid=3)) is None  # the renamed one itself
    assert find(nameless(DELETE_SELF, G, pid=3)) is None
    assert find(named(ATTRIB, SUB, b"c", G, pid=3), fell) is None
    assert find(nameless(ATTRIB, G, pid=4)) is None
    # The first half of an unlink or of a link of that process, whatever others do in between.
    for half in (DELETE, CREATE):
        assert find(fell, named(half, SUB, b"c", G, pid=3)) is None
        assert find(fell, *others[:60], named(half, SUB, b"c", G, pid=3)) is None
        assert find(fell, named(half, SUB, b"c", H, pid=3)) == G
        assert find(fell, named(half, SUB, b"c", G, pid=4)) == G
        assert find(fell, *others[:63], named(half, SUB, b"c", G, pid=3)) == G  # not seen
    assert find(fell, named(MODIFY, SUB, b"c", G, pid=3), named(DELETE, SUB, b"c", G, pid=3)) == G


def test_the_replaced_one_is_forgotten_with_its_record(window):
    recs = renamed(SUB, b"a", SUB, b"b"), nameless(ATTRIB, G)
    w = window(*recs)
    assert w.d.decode(9) == ([], STOP_REPLACED)
    assert w.d.decode(0) == ([], STOP_NONE)
    assert w.d.record()[8] is None
    w = window(*recs)
    assert w.d.decode(9) == ([], STOP_REPLACED)
    assert w.d.finish() == []
    w.d.add(named(MODIFY, SUB, b"f", F), 2.0)
    assert w.d.record() == (MODIFY, 1, 2.0, SUB, b"f", None, None, F, None)


def test_the_next_record_of_the_process(window):
    others = [named(MODIFY, SUB, b"%d" % i, H, pid=4) for i in range(64)]
    for between, found in ((0, True), (63, True), (64, False)):
        w = window(named(CREATE | ONDIR, SUB, b"d", NEW, pid=3))
        for other in others[:between]:
            w.d.add(other, 1.5)
        w.d.add(itself(ATTRIB | ONDIR, OUT, pid=3), 2.5)
        assert w.d.decode(9) == ([], STOP_DIR)
        told = (ATTRIB | ONDIR, 3, 2.5, OUT, b".", None, None, None, None)
        assert w.d.peek() == (told if found else None)
    assert window().d.peek() is None
    assert window(named(MODIFY, SUB, b"f", F)).d.peek() is None


# -- names deleted while the object lives --


def test_unlinked_in_the_window(window):
    w = window(
        named(DELETE, SUB, b"f", F), named(MODIFY, SUB, b"f", F), named(MODIFY, SUB, b"g", F),
        named(MODIFY, SUB, b"f", G), named(CREATE, SUB, b"f", F), named(MODIFY, SUB, b"f", F),
    )  # fmt: skip
    assert w.rows() == [
        row("deleted", "/mnt/sub/f"),
        row("modified", "/mnt/sub/f", more=(None, True, None)),
        row("modified", "/mnt/sub/g"),
        row("modified", "/mnt/sub/f", key=G),
        row("created", "/mnt/sub/f"),
        row("modified", "/mnt/sub/f"),
    ]
    assert w.d.finish() == []


def test_unlinked_before_the_window(window):
    rec = named(MODIFY, SUB, b"f", F)
    w = window(rec, named(MODIFY, SUB, b"g", F), named(MODIFY, SUB, b"f", G))
    w.gone[F] = {SUB + b"f"}
    w.gone[H] = {SUB + b"f"}
    assert w.rows() == [
        row("modified", "/mnt/sub/f", more=(None, True, None)),
        row("modified", "/mnt/sub/g"),
        row("modified", "/mnt/sub/f", key=G),
    ]
    w.d.finish()
    w.d.add(nameless(DELETE_SELF, F), 1.5)
    assert w.rows() == []
    assert w.gone == {H: {SUB + b"f"}}
    w.d.add(rec, 1.5)
    assert w.rows() == [row("modified", "/mnt/sub/f")]


def test_unlinked_with_a_name_like_that_of_a_tmpfile(window):
    unlinked = (None, True, None)
    write = named(MODIFY, SUB, b"#5", F)
    # In the window: exactly this name of this object.
    w = window(named(DELETE, SUB, b"#5", F), write, named(CLOSE_WRITE, SUB, b"#5", F))
    assert w.rows() == [
        row("deleted", "/mnt/sub/#5"),
        row("modified", "/mnt/sub/#5", more=unlinked),
        row("written", "/mnt/sub/#5", more=unlinked),
    ]
    assert w.d.finish() == [(F, SUB, b"#5")]
    # Before it.
    w = window(write)
    w.gone[F] = {SUB + b"#5"}
    assert w.rows() == [row("modified", "/mnt/sub/#5", more=unlinked)]
    # Made and deleted at once, with what holds it open in between.
    w = window(named(CREATE | DELETE, SUB, b"#5", F), write, nameless(DELETE_SELF, F))
    assert w.rows() == [
        row("created deleted", "/mnt/sub/#5", more=(None, False, False)),
        row("modified", "/mnt/sub/#5", more=unlinked),
    ]
    # An ignored process, or nothing that is asked for: still no stop.
    recs = named(DELETE, SUB, b"#5", F), write
    assert window(*recs, pids=(1,)).rows() == []
    assert window(*recs, want=OPEN).rows() == []


def test_other_names_like_that_of_a_tmpfile_stop(window):
    write = named(MODIFY, SUB, b"#5", F)
    told = row("modified", "/mnt/sub/#5", more=(None, True, None))
    for other in (named(DELETE, SUB, b"#6", F), named(DELETE, SUB, b"#5", G),
                  named(DELETE, MNT, b"#5", F), named(DELETE, SUB, b"5", F),
                  named(DELETE, SUB, b"#5", None)):  # fmt: skip
        w = window(other, write)
        w.tree.flag(w.top, ROOT, 0)
        assert w.stops()[1:] == [STOP_HASH]
    for gone in ({F: {SUB + b"#6"}}, {G: {SUB + b"#5"}}, {F: {MNT + b"#5"}}):
        w = window(write)
        w.gone.update(gone)
        assert w.stops() == [STOP_HASH]
    # The name leads to it again, and is then deleted once more.
    w = window(named(DELETE, SUB, b"#5", F), write, named(CREATE, SUB, b"#5", F), write)
    assert w.stops() == [row("deleted", "/mnt/sub/#5"), told, row("created", "/mnt/sub/#5"),
                         STOP_HASH]  # fmt: skip
    assert window(named(DELETE, SUB, b"#5", F), named(MODIFY, SUB, b"#5", None)).stops() == [
        row("deleted", "/mnt/sub/#5"), STOP_HASH,
    ]  # fmt: skip


def test_a_name_that_is_back(window):
    for back in (named(CREATE, SUB, b"f", F), renamed(SUB, b"x", SUB, b"f", F),
                 renamed(OUT, b"x", SUB, b"f", F)):  # fmt: skip
        w = window(back, named(MODIFY, SUB, b"f", F))
        w.gone[F] = {SUB + b"f"}
        assert w.rows()[1] == row("modified", "/mnt/sub/f")
        assert w.gone == {}
        w = window(named(DELETE, SUB, b"f", F), back, named(MODIFY, SUB, b"f", F))
        assert w.rows()[2] == row("modified", "/mnt/sub/f")
        assert w.d.finish() == []
    for other in (named(CREATE, SUB, b"g", F), named(CREATE, SUB, b"f", G),
                  renamed(SUB, b"f", SUB, b"g", F), named(MODIFY, SUB, b"f", F)):  # fmt: skip
        w = window(other)
        w.gone[F] = {SUB + b"f"}
        w.rows()
        assert w.gone == {F: {SUB + b"f"}}


def test_finish(window):
    w = window(
        named(DELETE, SUB, b"f", F), named(DELETE, SUB, b"g", G), nameless(DELETE_SELF, G),
        named(DELETE, SUB, b"h", H), named(CREATE, SUB, b"h", H),
        named(DELETE, OUT, b"x", NEW), named(DELETE, SUB, b"2", F),
    )  # fmt: skip
    w.rows()
    assert w.d.finish() == [(F, SUB, b"2")]  # the last name
    assert (w.d.records, w.d.pending, w.d.finish()) == (0, False, [])
    assert w.d.notes(F) == (0, 0, 0)
    w.d.add(named(MODIFY, SUB, b"2", F), 9.0)
    assert w.rows() == [row("modified", "/mnt/sub/2", time=9.0)]
    w.d.add(named(DELETE, SUB, b"f", F), 1.0)
    assert w.d.finish() == []  # what was not decoded says nothing
    assert not w.d.pending


# -- notes --


def test_notes(window):
    w = window(
        named(CREATE, SUB, b"a", F), named(DELETE, SUB, b"a", F), renamed(SUB, b"a", SUB, b"b", F),
        nameless(ATTRIB, F), named(CREATE | DELETE, SUB, b"g", G), nameless(DELETE_SELF, G),
        named(MODIFY, SUB, b"h", H), nameless(MODIFY, H), itself(DELETE_SELF, CUT),
        named(CREATE | ONDIR, OUT, b"n", NEW), named(MODIFY, NEW, b"x", H),
    )  # fmt: skip
    assert w.d.notes(F) == (N_CREATE | N_DELETE | N_ATTRIB | N_TWICE, 3, 1)
    assert w.d.notes(G) == (N_CREATE | N_DELETE | N_BOTH | N_GONE, 1, 0)
    assert w.d.notes(H) == (0, 0, 0)
    assert w.d.notes(CUT) == (N_GONE | N_DIR, 0, 0)
    assert w.d.notes(NEW) == (N_CREATE | N_BORN | N_DIR, 1, 0)  # and so not unknown
    assert w.d.notes(b"") == w.d.notes(b"1") == w.d.notes(bytes(300)) == (0, 0, 0)
    assert w.d.unknown() == []


def test_notes_of_an_overflow_and_of_nothing(window):
    w = window(
        build.event(Q_OVERFLOW | CREATE, fid(DFID_NAME, NEW, b"x"), fid(FID, F)),
        named(CREATE, SUB, b"f", None), nameless(CREATE | RENAME | ONDIR, G),
        build.event(MODIFY, fid(NEW_DFID_NAME, NEW, b"x")),
    )  # fmt: skip
    assert (w.d.unknown(), w.d.dir_records(), w.d.suspects()) == ([], [], [])
    assert w.d.notes(F) == w.d.notes(G) == (0, 0, 0)


def test_counts_stop_at_the_most_they_hold(window):
    w = window()
    data = renamed(SUB, b"a", SUB, b"b", F) * 1000
    for _ in range(66):
        w.d.add(data, 1.0)
    assert w.d.notes(F) == (0, 0xFFFF, 0xFFFF)
    assert w.d.records == 66_000
    assert w.d.suspects() == [(F, 0, 0xFFFF, 0xFFFF)]
    assert w.d.finish() == []


def test_unknown(window):
    w = window(
        named(MODIFY, NEW, b"a", F), renamed(G, b"a", H, b"b", F), named(MODIFY, NEW, b"a", F),
        itself(MODIFY, ONE), named(CREATE | ONDIR, SUB, b"g", G),
    )  # fmt: skip
    assert w.d.unknown() == [NEW, G, H]
    assert w.d.notes(G) == (N_UNKNOWN | N_CREATE | N_BORN | N_DIR, 1, 0)
    assert w.d.notes(F) == (0, 1, 1)  # it may turn out to be inside


def test_suspects(window):
    fell, died = nameless(ATTRIB, F), nameless(DELETE_SELF, F)
    twice = named(CREATE, SUB, b"a", F), named(DELETE, SUB, b"b", F)
    both = named(CREATE | DELETE, SUB, b"a", F)
    once = renamed(SUB, b"a", SUB, b"b", F)
    for recs, told in [
        ((once,), False), ((once, once), True), ((once, once, died), True),
        ((*twice, fell), True), (twice, False), ((*twice, fell, died), False),
        ((both,), False), ((both, fell), True), ((fell,), False), ((once, fell), False),
        ((once, twice[0], fell), True),
        ((twice[1], twice[0], died), True), ((twice[1], once, died), True),  # named again
        ((twice[0], twice[0], died), True), ((once, twice[0], died), True),  # a second name
        ((twice[0], once, died), False), ((twice[0], once, twice[1], died), False),
        ((twice[1], twice[0]), False), ((both, died), False), ((both, once, died), True),
    ]:  # fmt: skip
        w = window(*recs)
        assert w.d.suspects() == ([(F, *w.d.notes(F))] if told else [])


def test_dir_records_and_name_records(window):
    made = named(CREATE | ONDIR, OUT, b"d", NEW)
    moved = renamed(OUT, b"d", SUB, b"e", NEW, mask=RENAME | ONDIR)
    w = window(made, named(CREATE, SUB, b"f", F), named(MODIFY | ONDIR, SUB, b"e", NEW))
    w.d.add(moved + named(DELETE, SUB, b"g", G) + nameless(DELETE_SELF, G), 2.5)
    first = (CREATE | ONDIR, 1, 1.5, OUT, b"d", None, None, NEW, None)
    second = (CREATE, 1, 1.5, SUB, b"f", None, None, F, None)
    third = (RENAME | ONDIR, 1, 2.5, OUT, b"d", SUB, b"e", NEW, None)
    fourth = (DELETE, 1, 2.5, SUB, b"g", None, None, G, None)
    assert w.d.dir_records() == [first, third]
    assert w.d.name_records(None) == [first, second, third]
    assert w.d.name_records({F, G}) == [second, fourth]
    assert w.d.name_records({F: 1}) == [second]
    assert w.d.name_records(()) == []
    w.stops()
    assert w.d.dir_records() == [first, third]  # until the end of the window


# -- a whole window at once --


def test_plain(window):
    w = window()
    told = row("modified", "/mnt/sub/f", time=2.5)
    assert w.d.plain(GOOD + named(DELETE, SUB, b"g", G), 2.5, 100) == (
        [told, row("deleted", "/mnt/sub/g", key=G, time=2.5)], STOP_NONE, [(G, SUB, b"g")],
    )  # fmt: skip
    assert (w.d.pending, w.d.records, w.d.finish()) == (False, 0, [])
    assert w.d.plain(b"", 2.5, 100) == ([], STOP_NONE, [])
    # It stops, or is cut off: the window is open.
    assert w.d.plain(GOOD + named(MODIFY, SUB, b"#1", F), 2.5, 100) == ([told], STOP_HASH, None)
    assert w.d.record() == (MODIFY, 1, 2.5, SUB, b"#1", None, None, F, None)
    w.d.finish()
    assert w.d.plain(GOOD + GOOD, 2.5, 1) == ([told], STOP_NONE, None)
    assert w.d.pending
    assert w.rows() == [told]
    w.d.finish()
    # Something needs a look: noted, and not decoded.
    for data, count in [(named(MODIFY, NEW, b"f", F), 1), (renamed(SUB, b"a", SUB, b"b") * 2, 2)]:
        assert w.d.plain(GOOD + data, 2.5, 100) is None
        assert w.d.records == count + 1
        assert w.d.unknown() or w.d.suspects()
        assert w.d.decode(1) == ([told], STOP_NONE)
        w.d.finish()
    with pytest.raises(DecodeError):
        w.d.plain(GOOD + b"bad", 2.5, 100)
    assert w.d.records == 0


# -- slices --


def test_slices(window):
    w = window(*(named(MODIFY, SUB, b"%d" % i, F) for i in range(10)))
    assert [made[1][-1] for made in w.d.decode(3)[0]] == ["0", "1", "2"]
    for none in (0, -1, -(2**63)):
        assert w.d.decode(none) == ([], STOP_NONE)
    assert [made[1][-1] for made in w.d.decode(6)[0]] == ["3", "4", "5", "6", "7", "8"]
    assert w.d.pending
    assert len(w.d.decode(2**63 - 1)[0]) == 1
    assert not w.d.pending


@pytest.mark.parametrize("pids", [(), (1,)])
def test_a_slice_passes_over_few_records(window, pids):
    # Nothing is made of these, and each slice still ends.
    want = TOLD if pids else DELETE
    w = window(want=want, pids=pids)
    for _ in range(4):
        w.d.add(named(MODIFY, SUB, b"f", F) * 10, 1.5)
    w.d.add(named(DELETE, SUB, b"f", F, pid=2), 1.5)
    for _ in range(5):
        assert w.d.decode(1) == ([], STOP_NONE)
        assert w.d.pending
    assert len(w.d.decode(1)[0]) == 1


def test_time_is_that_of_the_chunk(window):
    w = window()
    for when in range(5):
        w.d.add(named(MODIFY, SUB, b"f", F) * when, float(when))
    assert [made[6] for made in w.rows()] == [1, 2, 2, 3, 3, 3, 4, 4, 4, 4]


def test_large_windows_and_small_ones_in_turn(window):
    w = window()
    for size in (3000, 1, 40_000, 2, 5, 0, 3000):
        keys = [build.key(100 + i) for i in range(size)]
        data = b"".join(named(DELETE, SUB, b"n", k) for k in keys)
        w.d.add(data, 1.0)
        assert len(w.rows(100_000)) == size
        assert w.d.name_records(None)[-1:] == [
            (DELETE, 1, 1.0, SUB, b"n", None, None, k, None) for k in keys[-1:]
        ]
        assert w.d.finish() == [(k, SUB, b"n") for k in keys]


# -- malformed chunks --


GOOD = named(MODIFY, SUB, b"f", F)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(GOOD[:23], "record header is cut short"), (b"\0", "record header is cut short"),
     (GOOD[:-1], "record length does not fit"), (GOOD[:-4], "record length does not fit"),
     (build.event(0, length=20), "record length does not fit"),
     (build.event(0, length=0), "record length does not fit"),
     (build.event(0, length=2**32 - 4), "record length does not fit"),
     (build.event(0, length=26) + b"??", "record length does not fit"),
     (build.event(0, version=2), "metadata version is not 3"),
     (build.event(0, header=20), "metadata length does not fit"),
     (build.event(0, header=26) , "record length does not fit"),
     (build.event(0, bytes(4), header=26)[:-2] + bytes(2), "record length does not fit"),
     (build.event(0, length=28, header=26) + bytes(2), "metadata length does not fit"),
     (build.event(0, header=65), "metadata length does not fit"),
     (build.event(0, build.info(9, b"", 0)), "info length does not fit"),
     (build.event(0, build.info(9, b"", 3)), "info length does not fit"),
     (build.event(0, build.info(9, b"", 8)), "info length does not fit"),
     (build.event(0, build.info(9, bytes(4), 6)), "info length does not fit"),
     (build.event(0, build.info(9, bytes(4), 65535)), "info length does not fit"),
     (build.event(0, build.info(FID, bytes(12))), "file handle is cut short"),
     (build.event(0, fid(FID, F, handle_bytes=9)), "file handle does not fit"),
     (build.event(0, fid(DFID, F, handle_bytes=2**32 - 1)), "file handle does not fit"),
     (build.event(0, fid(FID, bytes(136))), "file handle does not fit"),
     (build.event(0, fid(NEW_DFID_NAME, F, handle_bytes=2**32 - 20)), "file handle does not fit")],
)  # fmt: skip
def test_malformed(window, data, reason):
    w = window(GOOD, named(DELETE, SUB, b"g", G))
    before = (w.d.records, w.d.name_records(None), w.d.notes(G), w.d.unknown())
    for good in (0, 1, 3):
        chunk = named(CREATE, NEW, b"f", G) * good + data
        with pytest.raises(DecodeError) as caught:
            w.d.add(chunk, 9.0)
        at = len(chunk) - len(data)
        assert (caught.value.offset, caught.value.reason) == (at, reason)
        assert (w.d.records, w.d.name_records(None), w.d.notes(G), w.d.unknown()) == before
        with pytest.raises(DecodeError):
            records.decode(chunk)
    assert len(w.rows()) == 2


def test_what_is_well_formed_all_the_same(window):
    empty = fid(FID, b"\1\0\0\0")  # a handle of no bytes is none
    odd = [
        build.event(
            MODIFY, build.pidfd(-1), fid(DFID_NAME, SUB, b"f"), build.error(5), fid(FID, F)
        ),
        build.event(MODIFY, build.info(200, bytes(8)), fid(DFID_NAME, SUB, b"f"), fid(FID, F)),
        build.event(MODIFY, fid(DFID_NAME, SUB, b"f"), fid(FID, F), header=40),
        build.event(MODIFY, build.info(2, GOOD[28:52] + b"ffff"), fid(FID, F)),
        build.event(MODIFY, fid(DFID_NAME, SUB, b"f"), empty),
        build.event(MODIFY, fid(DFID_NAME, b"\1\0\0\0", b"f"), fid(FID, F)),
        build.event(MODIFY, fid(DFID_NAME, b"\1\0\0\0", b"."), empty),
        build.event(MODIFY, empty),
        build.event(MODIFY, fid(DFID_NAME, OUT, b"x"), fid(DFID_NAME, SUB, b"f"), fid(FID, F)),
        build.event(RENAME | MODIFY, fid(DFID_NAME, SUB, b".")),
        b"",
    ]
    f = row("modified", "/mnt/sub/f")
    told = [
        [f], [f], [f], [row("modified", "/mnt/sub/ffff")],
        [row("modified", "/mnt/sub/f", key=None)], [STOP_UNKNOWN], [STOP_UNKNOWN], [], [f],
        [row("modified renamed", "/mnt/sub", key=SUB, is_dir=True)], [],
    ]  # fmt: skip
    assert [window(rec).stops() if rec else window().stops() for rec in odd] == told
    w = window()
    assert w.d.add(b"".join(odd), 1.0) == 10
    assert len(records.decode(b"".join(odd))) == 10


# -- rough use --


def test_constructor(parts):
    tree = parts.Tree()
    good = (tree, tuple, KIND_TABLE, 1, "8:1", (), {})

    class Liar:
        __class__ = parts.Tree

    for place, bad in [(0, None), (2, KIND_TABLE[:-1]), (4, "x" * 32)]:
        with pytest.raises(TypeError):
            parts.Decoder(*good[:place], bad, *good[place + 1 :])
    if parts.name == "native":
        for place, bad in [(0, Liar()), (0, PURE.Tree()), (2, None), (5, None), (5, ("x",)),
                           (6, None), (3, "x"), (4, None)]:  # fmt: skip
            with pytest.raises(TypeError):
                parts.Decoder(*good[:place], bad, *good[place + 1 :])


def test_an_error_of_make_is_passed_on(window):
    calls = []

    def make(*made):
        calls.append(made[1])
        if len(calls) == 2:
            raise ZeroDivisionError
        return made[1]

    w = window(*(named(MODIFY, SUB, b"%d" % i, F) for i in range(4)), make=make)
    with pytest.raises(ZeroDivisionError):
        w.d.decode(9)
    assert w.d.decode(9) == (["/mnt/sub/1", "/mnt/sub/2", "/mnt/sub/3"], STOP_NONE)
    with pytest.raises(TypeError):
        w.d.add(bytearray(GOOD) if w.d.__class__ is not PURE.Decoder else None, 1.0)


def test_a_window_in_use_does_not_change(window):
    refused = []

    def meddle(*made):
        for call in (lambda: w.d.add(GOOD, 1.0), w.d.finish, w.d.advance, lambda: w.d.decode(1),
                     lambda: w.d.name_records(None)):  # fmt: skip
            with pytest.raises(RuntimeError, match="in use"):
                call()
            refused.append(call)
        return made

    class Keys:
        def __contains__(self, key):
            meddle()
            return True

    w = window(named(CREATE, SUB, b"f", F), GOOD, make=meddle)
    assert len(w.d.name_records(Keys())) == 1
    assert len(w.rows()) == 2
    assert len(refused) == 15
    assert w.d.finish() == []


def test_nothing_is_leaked(parts):
    def once():
        w = Window(parts, want=ALL, pids=(9,))
        recs = [
            named(CREATE, SUB, b"f", F), named(DELETE, SUB, b"f", F), named(MODIFY, SUB, b"f", F),
            named(CREATE | DELETE, SUB, b"g", G), nameless(DELETE_SELF, G),
            renamed(SUB, b"a", SUB, b"b", H), renamed(OUT, b"a", SUB, b"b", H),
            renamed(SUB, b"a", OUT, b"b", H), nameless(ATTRIB, NEW), itself(MODIFY, SUB),
            named(CREATE | ONDIR, SUB, b"d", NEW), named(MODIFY, CUT, b"q", None, pid=9),
            named(MODIFY, NEW, b"x", F), itself(ATTRIB, SUB), build.event(Q_OVERFLOW),
        ]  # fmt: skip
        for turn in range(3):
            w.gone[F] = {SUB + b"f"}
            w.d.add(b"".join(recs), float(turn))
            w.d.suspects(), w.d.unknown(), w.d.dir_records(), w.d.notes(F)
            w.d.name_records(None), w.d.name_records({F})
            while w.d.pending:
                _, stop = w.d.decode(2)
                if stop:
                    w.d.record(), w.d.peek()
                    w.d.advance()
            with contextlib.suppress(DecodeError):
                w.d.add(b"bad", 1.0)
            w.d.finish()
        w.d.add(b"".join(recs), 1.0)  # a window that is never finished

    assert not leaks(once)


def test_in_scope_by_a_flag_set_after_the_record_was_noted(window):
    w = window(named(CREATE, OUT, b"f", F), named(MODIFY, OUT, b"f", F))
    assert w.tree.resolve(w.out) == (0, b"/mnt/out")
    w.tree.flag(w.out, ROOT, 0)
    assert w.tree.resolve(w.out) == (IN, b"/mnt/out")
    assert w.rows() == [row("created", "/mnt/out/f"), row("modified", "/mnt/out/f")]
