"""What a consumer believes, what the watch holds and what is there: one cause of a difference each.

Storms found these (test_watch_index.py, test_watch_repair.py); here each is made to happen. The
listings of a repair wait at a gate, so that what happens before them happens always.
"""

import os
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import fanwise
from fanwise.kernel.contract import LISTED, LISTED_DIR, NOTE_NAMES, NOTE_SELF
from fanwise.names import repair
from fanwise.names.marker import Marker
from fanwise.names.scan import Scanner
from fanwise.names.verify import Verifier
from tests.kernel.conftest import run, unmount
from tests.kernel.losing import Consumer, exchange, paced, until_nothing_fits, until_paced
from tests.kernel.watching import on_disk, scanned, short, watching, write

PACE = 10  # seconds; a drain that is asked for what there is does not wait for them


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is listed while it is clear."""
    gate = threading.Event()
    gate.set()
    begin = Scanner.__init__

    def waiting(self: Scanner, scan: Any, wake: Any) -> None:
        def behind(keys: Any, names: int) -> Any:
            assert gate.wait(60)
            return scan(keys, names)

        begin(self, behind, wake)

    monkeypatch.setattr(Scanner, "__init__", waiting)
    yield gate
    gate.set()


def until_listed(watch: fanwise.Watch) -> None:
    """Return when all that was to be listed is; the watch takes it when it is read next."""
    scanner, deadline = watch._groups[0].resolver.scanner, time.monotonic() + 20
    while sum(len(keys) for keys, _ in list(scanner._done)) < scanner.busy:
        assert time.monotonic() < deadline
        time.sleep(0.001)  # nobody else is told


class Watched:
    """A watch, with an index or without, and what a consumer of it believes."""

    def __init__(self, watch: fanwise.Watch, root: Path) -> None:
        self.watch, self.root = watch, root
        self.consumer = Consumer(root)
        self.consumer.paths = on_disk(root)
        self.consumer.settle(watch)

    def until(self, kind: str, path: Path | None = None) -> None:
        """Read until something was told; what was raised before this call is read by the drain."""
        assert all(group.empty(20) for group in self.watch._groups)
        told: list[fanwise.Change] = []
        for _ in range(200):
            if any(kind in c.kinds and (path is None or c.path == str(path)) for c in told):
                return
            told = self.watch.read(0.1)
            self.consumer.take(told)
        raise AssertionError(f"{kind} was not told")

    def check(self) -> None:
        """When all is told, it is what is there; also for the index."""
        self.consumer.settle(self.watch)
        assert self.consumer.paths == on_disk(self.root)
        if self.watch._groups[0].resolver.files is not None:
            assert self.watch.names == len(self.consumer.paths)


class Held:
    """A listing of one directory, kept back once after it was made."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        key = fanwise.kernel.handles.identify(str(directory))[0]
        self.armed, self.listed, self.go_on = (threading.Event() for _ in range(3))
        begin = Scanner.__init__

        def holding(scanner: Scanner, scan: Any, wake: Any) -> None:
            def hold(keys: Any, names: int) -> Any:
                out = scan(keys, names)
                if key in keys and self.armed.is_set():
                    self.armed.clear()
                    self.listed.set()
                    assert self.go_on.wait(60)
                return out

            begin(scanner, hold, wake)

        monkeypatch.setattr(Scanner, "__init__", holding)

    def until(self, w: Watched) -> None:
        """Read until it is listed."""
        for _ in range(200):
            w.consumer.take(w.watch.read(0.05))
            if self.listed.is_set():
                return
        pytest.fail("it is not listed")


def test_files_that_went_in_a_loss_and_then_their_directory(
    tmpfs: Path, pure: bool, gate: threading.Event
) -> None:
    """A rename onto a directory says that it was empty: what is believed in it is told first."""
    (tmpfs / "old/sub").mkdir(parents=True)
    write(tmpfs / "old/f")
    write(tmpfs / "old/sub/g")
    (tmpfs / "new").mkdir()
    write(tmpfs / "new/h")
    with fanwise.watch(tmpfs, pure=pure, index=True) as watch:
        w = Watched(watch, tmpfs)
        gate.clear()
        watch.pause()
        os.unlink(tmpfs / "old/f")
        os.rename(tmpfs / "old/sub", tmpfs / "sub")
        watch.resume()
        w.until("lost")
        os.rename(tmpfs / "new", tmpfs / "old")
        w.until("renamed", tmpfs / "old")
        assert not {p for p in w.consumer.paths if p.startswith(f"{tmpfs}/old/")} - {
            str(tmpfs / "old/h")
        }
        gate.set()
        w.check()


@pytest.mark.parametrize("scanning", [False, True])
def test_a_directory_that_was_emptied_in_the_window_and_replaced(
    tmpfs: Path, pure: bool, scanning: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a loss nothing is told but what happened; also behind a window of the first scan."""
    paced(pure, monkeypatch, PACE)
    (tmpfs / "old/sub").mkdir(parents=True)
    (tmpfs / "new").mkdir()
    write(tmpfs / "new/f")
    with fanwise.watch(tmpfs, pure=pure, index=True) as watch:
        if scanning:
            write(tmpfs / "early")
            assert watch._groups[0].empty(20)
        w = Watched(watch, tmpfs)
        until_paced(watch, tmpfs)
        os.rmdir(tmpfs / "old/sub")
        os.rename(tmpfs / "new", tmpfs / "old")
        w.until("renamed", tmpfs / "old")
        w.check()
        assert all(c.pid for c in w.consumer.told)


def test_what_happened_in_a_directory_outside_is_not_believed(
    tmpfs: Path, pure: bool, gate: threading.Event
) -> None:
    """One that left in a loss, and comes back during its repair with more in it."""
    root, out = tmpfs / "root", tmpfs / "out"
    (root / "d/sub").mkdir(parents=True)
    write(root / "d/sub/f")
    out.mkdir()
    with fanwise.watch(root, pure=pure, index=True) as watch:
        w = Watched(watch, root)
        gate.clear()
        watch.pause()
        os.rename(root / "d", out / "d")
        watch.resume()
        w.until("lost")
        assert w.consumer.paths == set()
        write(out / "d/g")
        write(out / "d/sub/h")
        write(root / "behind")
        w.until("created", root / "behind")
        os.rename(out / "d", root / "e")
        w.until("created", root / "e")
        gate.set()
        w.check()


def test_a_directory_below_one_that_left_in_a_loss_is_not_believed(
    tmpfs: Path, pure: bool, gate: threading.Event
) -> None:
    """It left while nothing was told of it yet, as one that was made in the loss before."""
    root, out = tmpfs / "root", tmpfs / "out"
    root.mkdir()
    out.mkdir()
    with fanwise.watch(root, pure=pure, index=True) as watch:
        w = Watched(watch, root)
        gate.clear()
        watch.pause()
        (root / "d/sub").mkdir(parents=True)
        watch.resume()
        w.until("lost")
        write(root / "d/sub/live")  # by this it is known
        w.until("created", root / "d/sub/live")
        watch.pause()
        os.rename(root / "d/sub", out / "sub")
        watch.resume()
        w.until("lost")
        write(out / "sub/g")
        write(root / "behind")
        w.until("created", root / "behind")
        os.rename(out / "sub", root / "sub")
        w.until("created", root / "sub")
        gate.set()
        w.check()


def test_what_was_told_in_a_window_before_a_directory_came(
    tmpfs: Path, pure: bool, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one window something is made in a directory outside, and it comes in: it is not told."""
    paced(pure, monkeypatch, PACE)
    root, out = tmpfs / "root", tmpfs / "out"
    root.mkdir()
    (out / "d").mkdir(parents=True)
    with fanwise.watch(root, pure=pure, index=True) as watch:
        w = Watched(watch, root)
        gate.clear()
        watch.pause()
        write(root / "lost")
        watch.resume()
        w.until("lost")
        until_paced(watch, tmpfs)
        write(out / "d/f")
        os.rename(out / "d", root / "d")
        write(root / "d/g")
        w.until("created", root / "d/g")
        assert str(root / "d/f") not in w.consumer.paths
        gate.set()
        w.check()


def test_what_was_told_below_a_directory_that_came_is_believed(
    tmpfs: Path, pure: bool, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one window a directory comes back with others below it, and something is made in those."""
    paced(pure, monkeypatch, PACE)
    root, out = tmpfs / "root", tmpfs / "out"
    (root / "d/sub").mkdir(parents=True)
    out.mkdir()
    with fanwise.watch(root, pure=pure, index=True) as watch:
        w = Watched(watch, root)
        gate.clear()
        watch.pause()
        os.rename(root / "d", out / "d")
        watch.resume()
        w.until("lost")
        until_paced(watch, tmpfs)
        os.rename(out / "d", root / "e")
        write(root / "e/sub/f")
        w.until("created", root / "e/sub/f")
        watch.pause()
        os.unlink(root / "e/sub/f")
        watch.resume()
        w.until("lost")
        gate.set()
        w.check()


def test_what_leaves_in_a_window_is_not_believed_in_it(
    tmpfs: Path, pure: bool, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one window a directory leaves, more is made in it, and it comes back."""
    paced(pure, monkeypatch, PACE)
    root, out = tmpfs / "root", tmpfs / "out"
    (root / "d/sub").mkdir(parents=True)
    write(root / "d/sub/f")
    out.mkdir()
    with fanwise.watch(root, pure=pure, index=True) as watch:
        w = Watched(watch, root)
        gate.clear()
        watch.pause()
        write(root / "lost")
        watch.resume()
        w.until("lost")
        until_paced(watch, tmpfs)
        os.rename(root / "d", out / "d")
        write(out / "d/sub/g")
        os.rename(out / "d", root / "e")
        w.until("created", root / "e")
        assert w.consumer.paths == {str(root / "e")} | ({str(root / "lost")} & w.consumer.paths)
        gate.set()
        w.check()


def test_what_a_stop_moved_says_nothing_of_before(tmpfs: Path, pure: bool) -> None:
    """A directory that is not known is looked up, and came where it is among what was lost."""
    root, out = tmpfs / "root", tmpfs / "out"
    (root / "a").mkdir(parents=True)
    write(root / "a/here")
    (out / "d").mkdir(parents=True)
    with fanwise.watch(root, pure=pure, index=True) as watch:
        w = Watched(watch, root)
        write(out / "d/f")
        os.rename(root / "a", root / "b")
        watch.pause()
        os.rename(out / "d", root / "a")
        watch.resume()
        w.check()
        assert not [
            c for c in w.consumer.told if c.pid and c.path.startswith((f"{root}/a/", f"{root}/b/"))
        ]


@pytest.mark.parametrize("index", [False, True])
def test_a_circle_of_names_that_goes_on(
    fs: Path, pure: bool, index: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second a -> b merges into the first: by the records the directory is at a, and b -> d."""
    paced(pure, monkeypatch, PACE)
    (fs / "a/x").mkdir(parents=True)
    write(fs / "a/x/f")
    with fanwise.watch(fs, pure=pure, index=index) as watch:
        w = Watched(watch, fs)
        until_paced(watch, fs)
        for old, new in ("ab", "bc", "ca", "ab", "bd"):
            os.rename(fs / old, fs / new)
        w.until("renamed", fs / "d")
        names = [
            (Path(c.old_path or "").name, Path(c.path).name)
            for c in w.consumer.told
            if "renamed" in c.kinds
        ]
        assert names == [("a", "b"), ("b", "c"), ("c", "a"), ("a", "d")], "the kernel merged"
        w.consumer.settle(watch)
        assert w.consumer.paths == on_disk(fs)
        assert not [c for c in w.consumer.told if c.correction]
        if index:
            w.check()


def test_a_listing_shows_what_the_notes_of_a_loss_do_not(
    tmpfs: Path, pure: bool, gate: threading.Event
) -> None:
    """Directories that came, went and moved are found by the names in those above them."""
    for name in ("a/moved/in", "b", "c/gone", "d/over"):
        (tmpfs / name).mkdir(parents=True)
    for name in ("a/moved/in/f", "c/gone/g"):
        write(tmpfs / name)
    with fanwise.watch(tmpfs, pure=pure, queue=64 << 10, index=True) as watch:
        w = Watched(watch, tmpfs)
        group = watch._groups[0]
        noted, source = group.resolver.intake._noted, group.source
        tops = {fanwise.kernel.handles.identify(str(tmpfs / name))[0] for name in "abcd"}
        group.resolver.intake._noted = lambda: {
            key: NOTE_NAMES for key in noted() or () if key in tops
        }
        gate.clear()
        until_nothing_fits(watch, tmpfs / "b")
        os.rename(tmpfs / "a/moved", tmpfs / "b/here")
        os.unlink(tmpfs / "c/gone/g")
        os.rmdir(tmpfs / "c/gone")
        os.rename(tmpfs / "b/here/in", tmpfs / "d/over")
        (tmpfs / "c/made").mkdir()
        assert source.drain.sync(10)
        w.until("lost")
        gate.set()
        w.check()


def test_the_handle_says_that_a_directory_is_the_same(tmpfs: Path, pure: bool) -> None:
    """The index may have the inode of whatever had the name first."""
    (tmpfs / "d/sub").mkdir(parents=True)
    write(tmpfs / "d/sub/f")
    with fanwise.watch(tmpfs, pure=pure, index=True) as watch:
        w = Watched(watch, tmpfs)
        key = fanwise.kernel.handles.identify(str(tmpfs))[0]
        other = struct.pack(LISTED, 1, 0, 0, 0, LISTED_DIR, 1, 0) + b"d"
        watch._groups[0].resolver.files.index.diff(key, other, None, False)
        told = len(w.consumer.told)
        watch.pause()
        watch.resume()
        w.until("lost")
        w.check()
        assert {c.kinds for c in w.consumer.told[told:]} == {("lost",), ("repaired",)}


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_a_directory_moved_between_losses_into_one_that_they_made_and_moved(
    tmpfs: Path, pure: bool, listed: bool, index: bool, gate: threading.Event
) -> None:
    """The rename says into which directory it went; where that was, only the second loss knows.

    It moved itself in neither, so that only this rename says that its place is to be looked for.
    It goes on before that directory is listed, into one that is listed too, or is not.
    """
    for name in ("d/below", "hit", "other", "to"):
        (tmpfs / name).mkdir(parents=True)
    write(tmpfs / "d/below/f")
    with fanwise.watch(tmpfs, pure=pure, queue=64 << 10, index=index) as watch:
        w = Watched(watch, tmpfs)
        intake, drain = watch._groups[0].resolver.intake, watch._groups[0].source.drain
        until_nothing_fits(watch, tmpfs / "hit")
        (tmpfs / "made").mkdir()
        assert drain.sync(10)
        intake.pull()  # there is room again
        os.rename(tmpfs / "d", tmpfs / "made/d")
        assert drain.sync(10)
        intake.pull()
        until_nothing_fits(watch, tmpfs / "hit")
        os.rename(tmpfs / "made", tmpfs / "moved")
        os.rename(tmpfs / "other", tmpfs / "moved/other")  # by this its place is known at once
        if listed:
            write(tmpfs / "to/f")
        assert drain.sync(10)
        gate.clear()
        w.until("lost")
        w.until("lost")
        os.rename(tmpfs / "moved/d", tmpfs / "to/e")
        gate.set()
        until_listed(watch)
        w.check()
        moves = [
            c for c in w.consumer.told if c.path == str(tmpfs / "to/e") and "renamed" in c.kinds
        ]
        assert [c.old_path for c in moves] == [str(tmpfs / "moved/d")]
        told = len(w.consumer.told)
        write(tmpfs / "to/e/below/f", "more")
        w.until("modified", tmpfs / "to/e/below/f")
        assert {c.path_source for c in w.consumer.told[told:]} == {"exact"}


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("later", [False, True])
def test_a_directory_that_left_one_that_is_gone(
    tmpfs: Path, pure: bool, later: bool, index: bool, gate: threading.Event
) -> None:
    """A loss moves it into another; it leaves that, and a rename puts the other out of its name.

    So that is gone when it is looked for, and no record says where it was. What left it comes back
    with its own rename, in the window that is told next or in one after it.
    """
    for name in ("d/below", "away", "hit", "x", "to"):
        (tmpfs / name).mkdir(parents=True)
    write(tmpfs / "d/below/f")
    with fanwise.watch(tmpfs, pure=pure, queue=64 << 10, index=index) as watch:
        w = Watched(watch, tmpfs)
        intake, drain = watch._groups[0].resolver.intake, watch._groups[0].source.drain

        def read_ahead() -> None:
            assert drain.sync(10)
            intake.pull()  # there is room again

        until_nothing_fits(watch, tmpfs / "hit")
        os.rename(tmpfs / "away", tmpfs / "box")
        os.rename(tmpfs / "d", tmpfs / "box/d")
        read_ahead()
        gate.clear()
        if later:
            write(tmpfs / "to/g")
            read_ahead()
        os.rename(tmpfs / "box/d", tmpfs / "to/d")
        read_ahead()
        os.rename(tmpfs / "x", tmpfs / "box")
        read_ahead()
        w.until("lost")
        gate.set()
        until_listed(watch)
        w.check()
        before = [c for c in w.consumer.told if c.names is not None]
        assert not [c for c in before if c.path.startswith((f"{tmpfs}/away", f"{tmpfs}/box/"))]
        told = [c.kinds[0] for c in w.consumer.told if c.roots is not None and c.names is None]
        assert told == ["lost", "repaired"]


@pytest.mark.parametrize("index", [False, True])
def test_a_directory_that_is_gone_when_it_is_located_once_more(
    tmpfs: Path, pure: bool, index: bool
) -> None:
    """No loss hit the directory that it was in: what is believed below its name is there still."""
    for name in ("to/d/below", "x/y", "there"):
        (tmpfs / name).mkdir(parents=True)
    write(tmpfs / "to/d/below/f")
    with fanwise.watch(tmpfs, pure=pure, index=index) as watch:
        w = Watched(watch, tmpfs)
        resolver = watch._groups[0].resolver
        key = fanwise.kernel.handles.identify(f"{tmpfs}/to/d")[0]
        os.rename(tmpfs / "to/d/below", tmpfs / "there/b")
        os.rename(tmpfs / "x", tmpfs / "to/d")
        rows: list[fanwise.Change] = []
        with resolver.lookup:  # as when the queue was empty, behind a loss and a record of it
            resolver.repair.begin()
            resolver.scanned = resolver._quiet = False
            assert resolver.repair.mend(rows, {key: NOTE_SELF})
        w.consumer.take(rows)
        w.check()
        assert w.consumer.repaired


def test_a_directory_found_where_it_is_going_to_be(
    tmpfs: Path, pure: bool, gate: threading.Event
) -> None:
    """It was known without a way up, and was renamed after it came in with one above it."""
    for name in ("a", "b", "x/y"):
        (tmpfs / name).mkdir(parents=True)
    run("mount", "--bind", str(tmpfs / "a"), str(tmpfs / "b"))
    try:
        with watching(tmpfs / "b", pure=pure) as r:
            scanned(r)
            write(tmpfs / "x/y/outside")  # remembered
            assert r.told() == []
            gate.clear()
            (tmpfs / "x").rename(tmpfs / "a/x")
            assert short(r.watch.read(20), tmpfs) == [("created", "b/x", None)]
            (tmpfs / "a/x/y").rename(tmpfs / "a/x/z")
            gate.set()
            until_listed(r.watch)
            assert short(r.watch.read(20), tmpfs) == [("renamed", "b/x/z", "b/x/y")]
            write(tmpfs / "a/x/z/f")
            assert {p for _, p, _ in short(r.told(), tmpfs)} == {"b/x/z/f"}
    finally:
        unmount(tmpfs / "b")


def test_what_losses_say_of_a_directory_adds_up(tmpfs: Path, pure: bool) -> None:
    """It moved in one and names in it changed in the next: it is located once more all the same."""
    (tmpfs / "d").mkdir()
    with fanwise.watch(tmpfs, pure=pure) as watch:
        Watched(watch, tmpfs)
        resolver, key = watch._groups[0].resolver, fanwise.kernel.handles.identify(f"{tmpfs}/d")[0]
        with resolver.lookup:
            for bits in (NOTE_SELF, NOTE_NAMES):
                resolver.repair.begin()
                assert resolver.repair.mend([], {key: bits})
        assert resolver.repair.unsettled[key] == NOTE_NAMES | NOTE_SELF


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize(
    "what",
    ["renamed", "made and gone", "circle", "out of a circle", "out of a circle, another comes"],
)
def test_what_is_told_while_a_listing_waits_is_newer(
    tmpfs: Path, pure: bool, what: str, index: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory is listed, what changes in it then is told, and only then the listing is."""
    paced(pure, monkeypatch, PACE)
    a = tmpfs / "a"
    for name in ("x/in", "../y/in"):
        (a / name).mkdir(parents=True)
    write(a / "f")
    held, look = Held(a, monkeypatch), Verifier._look
    with fanwise.watch(tmpfs, pure=pure, index=index) as watch:
        w = Watched(watch, tmpfs)
        held.armed.set()
        watch.pause()
        write(a / "g")
        write(a / "f", "longer")
        watch.resume()
        try:
            held.until(w)
            until_paced(watch, tmpfs)
            if what == "renamed":
                os.rename(a / "f", a / "h")
                os.rename(a / "x", tmpfs / "x")
                os.rename(tmpfs / "y", a / "y")
            elif what == "made and gone":
                monkeypatch.setattr(Verifier, "_look", lambda *_: None)  # not yet
                for _ in range(2):
                    os.link(a / "f", a / "z")
                    os.unlink(a / "z")
                os.link(a / "f", a / "z")
            elif what.startswith(
                "out of a circle"
            ):  # the records say from y, and leave x where it was
                monkeypatch.setattr(Verifier, "_look", lambda *_: None)  # not yet
                for old, new in ("xy", "yu", "ux", "xy", "yv"):
                    os.rename(a / old, a / new)
                if what.endswith("another comes"):
                    (a / "x").mkdir()
            else:
                for old, new in ("xy", "yx", "xy"):
                    os.rename(a / old, a / new)
            write(tmpfs / "end")
            w.until("created", tmpfs / "end")
        finally:
            held.go_on.set()
        if what.startswith(("made and gone", "out of a circle")):
            w.until("repaired")
            monkeypatch.setattr(Verifier, "_look", look)
            write(tmpfs / "end again")
        w.check()
        assert w.consumer.repaired
        if what.endswith("another comes"):
            about = [c for c in w.consumer.told if c.path == str(a)]
            assert not [c for c in about if "relisted" in c.kinds and "x/" not in (c.names or ())]
            assert not [
                c for c in w.consumer.told if c.path == str(a / "x") and "deleted" in c.kinds
            ]
        if what == "renamed" and index:
            assert not [c for c in w.consumer.told if c.is_dir and "deleted" in c.kinds]
            found = [c.path for c in w.consumer.told if c.inferred and "modified" in c.kinds]
            assert str(a / "h") in found


def test_names_that_merges_hid_cost_a_window_once(
    tmpfs: Path, pure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many directories went out of a circle while the one above them is listed."""
    paced(pure, monkeypatch, PACE)
    a, circles = tmpfs / "a", 60
    for n in range(circles):
        (a / f"x{n}").mkdir(parents=True)
    held, look, real = Held(a, monkeypatch), Verifier._look, repair.names_of
    seen: list[int] = []

    def names_of(record: Any) -> Any:
        seen.append(1)
        return real(record)

    with fanwise.watch(tmpfs, pure=pure) as watch:
        w = Watched(watch, tmpfs)
        mending = watch._groups[0].resolver.repair
        told_gone, hidden = mending.told_gone, []
        mending.told_gone = lambda *args: (hidden.append(args), told_gone(*args))[1]
        held.armed.set()
        watch.pause()
        write(a / "g")
        watch.resume()
        try:
            held.until(w)
            until_paced(watch, tmpfs)
            monkeypatch.setattr(Verifier, "_look", lambda *_: None)  # not yet
            for n in range(circles):
                for old, new in ("xy", "yu", "ux", "xy", "yv"):
                    os.rename(a / f"{old}{n}", a / f"{new}{n}")
            write(tmpfs / "end")
            monkeypatch.setattr(repair, "names_of", names_of)
            w.until("created", tmpfs / "end")
        finally:
            held.go_on.set()
        assert len(hidden) >= circles
        assert len(seen) < 4 * 5 * circles
        assert mending._window is None
        monkeypatch.setattr(Verifier, "_look", look)
        write(tmpfs / "end again")
        w.check()


@pytest.mark.parametrize("into", ["a directory that is not hit", "its own, twice"])
def test_a_file_that_was_changed_in_a_loss_moves_before_it_is_compared(
    tmpfs: Path, pure: bool, into: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked for where it went, as often as it goes on."""
    a, b = tmpfs / "a", tmpfs / "b"
    for each in (a, b, tmpfs / "hit"):
        each.mkdir()
    write(a / "f")
    held = Held(a, monkeypatch)
    with fanwise.watch(tmpfs, pure=pure, index=True, queue=64 << 10) as watch:
        w = Watched(watch, tmpfs)

        def move(old: Path, new: Path) -> None:
            os.rename(old, new)
            w.until("renamed", new)

        held.armed.set()
        try:
            until_nothing_fits(watch, tmpfs / "hit")
            write(a / "f", "longer")
            assert watch._groups[0].source.drain.sync(20)
            w.until("lost")
            held.until(w)
            if into == "its own, twice":
                move(a / "f", a / "g")
                held.listed.clear()
                held.armed.set()
                held.go_on.set()
                held.go_on.clear()
                held.until(w)
                move(a / "g", a / "h")
            else:
                move(a / "f", b / "g")
                move(b / "g", b / "h")
        finally:
            held.go_on.set()
        w.check()
        assert w.consumer.repaired
        inferred = [c.path for c in w.consumer.told if c.inferred and "modified" in c.kinds]
        assert str((b if into != "its own, twice" else a) / "h") in inferred


@pytest.mark.parametrize("index", [False, True])
def test_more_is_told_while_a_listing_waits_than_is_remembered(
    tmpfs: Path, pure: bool, index: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is listed again; and what is told until then is not remembered any more."""
    monkeypatch.setattr(repair, "_MOST_SINCE", 64)
    a = tmpfs / "a"
    a.mkdir()
    write(a / "f")
    held = Held(a, monkeypatch)
    with fanwise.watch(tmpfs, pure=pure, index=index) as watch:
        w = Watched(watch, tmpfs)
        held.armed.set()
        watch.pause()
        write(a / "g")
        watch.resume()
        try:
            held.until(w)
            for n in range(200):
                write(a / str(n))
                if n % 2:
                    os.unlink(a / str(n))
                if n % 20 == 19:
                    write(tmpfs / f"end{n}")
                    w.until("created", tmpfs / f"end{n}")
            for n in range(0, 200, 2):  # which were made since; but nobody remembers
                os.rename(a / str(n), a / f"{n}+")
            write(tmpfs / "end")
            w.until("created", tmpfs / "end")
            mending = watch._groups[0].resolver.repair
            assert not mending._since
            assert sum(map(len, mending._loose.values())) <= 64
        finally:
            held.go_on.set()
        w.check()
        assert w.consumer.repaired


def test_more_is_told_in_the_first_scan_than_is_remembered(
    tmpfs: Path, pure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair, "_MOST_SINCE", 16)
    a = tmpfs / "a"
    (a / "sub").mkdir(parents=True)
    for n in range(20):
        write(a / f"old{n}")
        write(a / f"sub/old{n}")
    held = Held(a, monkeypatch)
    held.armed.set()
    with fanwise.watch(tmpfs, pure=pure, index=True) as watch:
        try:
            while not held.listed.is_set():
                watch.read(0.05)
            for n in range(20):
                write(a / f"new{n}")
                os.unlink(a / f"old{n}")
            write(tmpfs / "end")  # and only now it is taken
            told: list[fanwise.Change] = []
            while not any(c.path == str(tmpfs / "end") for c in told):
                told += watch.read(0.1)
        finally:
            held.go_on.set()
        w = Watched(watch, tmpfs)
        watch.pause()
        write(a / "sub/old3", "longer")
        os.unlink(a / "sub/old4")
        watch.resume()
        w.check()
        assert w.consumer.repaired
        inferred = [c.path for c in w.consumer.told if c.inferred]
        assert str(a / "sub/old3") in inferred


@pytest.mark.parametrize("lost", ["a name that was told", "the directory's move"])
@pytest.mark.parametrize("index", [False, True])
def test_a_listing_that_a_later_loss_makes_void_is_made_again(
    tmpfs: Path, pure: bool, index: bool, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was told before that loss is older, also where no name in the directory was hit."""
    a = tmpfs / "a"
    for each in (a, tmpfs / "hit"):
        each.mkdir()
    write(a / "f")
    held = Held(a, monkeypatch)
    with fanwise.watch(tmpfs, pure=pure, index=index, queue=64 << 10) as watch:
        w = Watched(watch, tmpfs)
        held.armed.set()
        watch.pause()
        write(a / "g")
        watch.resume()
        try:
            held.until(w)
            if lost == "a name that was told":
                write(a / "z")
                w.until("written", a / "z")
            until_nothing_fits(watch, tmpfs / "hit")
            if lost == "a name that was told":
                os.unlink(a / "z")
            else:
                os.rename(a, tmpfs / "b")
            assert watch._groups[0].source.drain.sync(20)
            w.until("lost")
        finally:
            held.go_on.set()
        w.check()
        assert w.consumer.repaired


def test_directories_each_in_the_other(tmpfs: Path, pure: bool) -> None:
    """What merges hid may say so: both are told gone, and looked for once more."""
    for name in ("a/f", "b/g"):
        (tmpfs / name).mkdir(parents=True)
    with fanwise.watch(tmpfs, pure=pure, index=True) as watch:
        w = Watched(watch, tmpfs)
        resolver = watch._groups[0].resolver
        a, b = (fanwise.kernel.handles.identify(f"{tmpfs}/{name}")[0] for name in "ab")
        rows: list[fanwise.Change] = []
        with resolver.lookup:
            resolver.repair.begin()
            resolver.scanned = resolver._quiet = False
            _, due, whole = resolver.files.rearrange(rows, {a: (b, b"a"), b: (a, b"b")}, [], [])
            assert not whole
            w.consumer.take(rows)
            assert w.consumer.paths == set()
            resolver.repair.want(due)
            resolver.loss_of_all(rows := [])
        w.consumer.take(rows)
        write(tmpfs / "a/h")  # wakes it
        w.check()


@pytest.mark.parametrize("index", [False, True])
def test_losses_before_anything_is_listed(
    tmpfs: Path, pure: bool, index: bool, gate: threading.Event
) -> None:
    """Of listings of one directory only those that were begun before the last loss are void."""
    (tmpfs / "d").mkdir()
    with fanwise.watch(tmpfs, pure=pure, index=index) as watch:
        w = Watched(watch, tmpfs)
        gate.clear()
        for name in "abc":
            watch.pause()
            write(tmpfs / "d" / name)
            watch.resume()
            w.until("lost")
        gate.set()
        w.consumer.settle(watch)
        assert w.consumer.paths == on_disk(tmpfs)


def test_two_directories_change_places_in_a_loss(
    tmpfs: Path, pure: bool, gate: threading.Event
) -> None:
    """While the names in them are not compared, live changes go on in both."""
    for name in "ab":
        (tmpfs / name / "sub").mkdir(parents=True)
        write(tmpfs / name / "f")
    with fanwise.watch(tmpfs, pure=pure, index=True) as watch:
        w = Watched(watch, tmpfs)
        gate.clear()
        watch.pause()
        exchange(tmpfs / "a", tmpfs / "b")
        os.unlink(tmpfs / "a/f")
        watch.resume()
        w.until("lost")
        write(tmpfs / "a/sub/one")
        os.rename(tmpfs / "b", tmpfs / "a/sub/two")
        (tmpfs / "b").mkdir()
        w.until("created", tmpfs / "b")
        gate.set()
        w.check()


@pytest.mark.parametrize("rung", ["inode-marks", "inotify"])
@pytest.mark.parametrize("at", ["A", "K", "L"])
@pytest.mark.parametrize("what", ["A", "A/K", "A into what was renamed", "A, in the first scan"])
def test_a_directory_moved_into_one_without_a_mark_before_it_is_marked(
    tmpfs: Path,
    pure: bool,
    rung: str,
    at: str,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stream says that it left, and to nowhere: it is watched where the listing shows it."""
    monkeypatch.setenv("FANWISE_RUNG", rung)
    first = what.endswith("scan")
    (tmpfs / "A/K/L").mkdir(parents=True)
    if first:
        (tmpfs / "N").mkdir()
    real, armed = Marker.mark, [first]

    def mark(marker: Marker, keys: Sequence[bytes], everything: bool) -> Any:
        names = {os.path.basename(marker.lookup.path(key)) for key in keys}
        if armed[0] and at.encode() in names:
            armed[0] = False
            n = tmpfs / "N"
            n.mkdir(exist_ok=True)
            if what == "A into what was renamed":
                n = n.rename(tmpfs / "M")
            (tmpfs / (what if what == "A/K" else "A")).rename(n / "x")
        return real(marker, keys, everything)

    monkeypatch.setattr(Marker, "mark", mark)
    with fanwise.watch(tmpfs, pure=pure) as watch:
        w = Watched(watch, tmpfs)
        if not first:
            armed[0] = True
            watch.pause()
            (tmpfs / "lost").mkdir()
            watch.resume()
        w.check()
        assert not armed[0]
        made = {Path(directory) / "made" for directory, _, _ in os.walk(tmpfs)}
        for path in made:
            write(path)
        w.check()
        assert {str(path) for path in made} <= {c.path for c in w.consumer.told}


def test_a_directory_that_goes_on_before_it_is_marked(
    tmpfs: Path, pure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It left for where no mark was, and went on between two that have one by then."""
    monkeypatch.setenv("FANWISE_RUNG", "inode-marks")
    for name in ("A/sub", "B", "D"):
        (tmpfs / name).mkdir(parents=True)
    real = Marker.mark
    steps = [
        (),
        ("A", "D/n"),
        ("D/n", "B/m"),
    ]  # before each round of marks

    def mark(marker: Marker, keys: Sequence[bytes], everything: bool) -> Any:
        if armed and steps and (step := steps.pop(0)):
            os.rename(*(tmpfs / name for name in step))
        return real(marker, keys, everything)

    armed: list[bool] = []
    monkeypatch.setattr(Marker, "mark", mark)
    with fanwise.watch(tmpfs, pure=pure) as watch:
        w = Watched(watch, tmpfs)
        armed.append(True)
        watch.pause()
        (tmpfs / "lost").mkdir()
        watch.resume()
        w.check()
        assert not steps
        made = {Path(directory) / "made" for directory, _, _ in os.walk(tmpfs)}
        for path in made:
            write(path)
        w.check()
        assert {str(path) for path in made} <= {c.path for c in w.consumer.told}
