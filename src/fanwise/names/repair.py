"""Repair: after a loss, which directories are affected, and what is told of them.

After a loss that says which directories it hit (a full ring: the drain notes them) the tree is
kept: the directories that came, went or moved among what was lost are located at once, and the
affected ones are listed again. After any other loss the tree is dropped, and every directory below
the roots is listed as it is found. What is listed is told (``relisted``) as it stood at the record
being decoded: names that records still unread name are put back to what the first of those says.

REFS      owned by the resolver; the listing is the scanner's.
LOCKING   none, one consumer.
LIFETIME  idle -> active (`begin`) -> idle (`end`, told as ``repaired``); a loss adds to it.
"""

import errno
import time
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from os import fsdecode, fsencode
from typing import TYPE_CHECKING, Any

from fanwise.kernel import contract as flags
from fanwise.kernel.contract import CREATE, DELETE, NOTE_NAMES, NOTE_SELF, ONDIR, RENAME, Record
from fanwise.kernel.handles import identity

from .intake import EVERYTHING
from .lookup import CannotLook, Link
from .verify import names_of

if TYPE_CHECKING:
    from .resolver import Resolver

_AGAIN = 0.05  # seconds between attempts to mend the tree
_MOST_SINCE = 1 << 17  # names told in directories while they are listed, some 300 bytes each
BEHIND = 1 << 20  # bytes unread, above which nothing more is listed: live changes go first
Name = tuple[bytes, bytes]


class Repair:
    """The repair of one group of a watch."""

    def __init__(self, resolver: "Resolver") -> None:
        self._r = resolver
        self.active = False
        self.told_rows = 0  # changes told by it
        self._roots: tuple[str, ...] = ()
        self._due: dict[bytes, None] = {}  # directories to list, besides those found by listing
        self._out: dict[bytes, int] = {}  # handed out, results not taken
        self._void: dict[bytes, int] = {}  # of those, listed before a loss that hit them
        # Of directories handed out: what was told of names in them since, name -> (is there, is a
        # directory, key). The listing may be of before that.
        self._since: dict[bytes, dict[bytes, tuple[bool, bool, bytes | None]]] = {}
        # Of the window being decoded: record -> its place, name -> the last that names it; or None.
        self._window: tuple[dict[Any, int], dict[Name, int]] | None = None
        self._over: set[bytes] = set()  # too many: void, and listed again when that listing is here
        self._late: dict[bytes, dict[bytes, tuple[bool, bool, bytes | None]]] = {}  # of `_lists`
        self._twice: set[bytes] = set()  # listed once more for it
        # With an index: names that a rename brought out of where nothing is compared yet, by the
        # directory that they are in; and those for which alone a directory is handed out.
        self._loose: dict[bytes, set[bytes]] = {}
        self._only: dict[bytes, set[bytes]] = {}
        self._parked: dict[bytes, None] = {}  # had no way up to a root when their turn came
        # What was listed: a directory, its names, and the directories among them.
        self._lists: list[tuple[bytes, bytes, dict[bytes, bytes]]] = []
        self._gone: list[bytes] = []
        self._until = 0  # what was read when a look was taken: it ends when all that is told
        self._moved: list[bytes] = []  # located after the loss: current until the end
        # Until the queue was seen empty, records may be older than what was merged into others
        # that are lost: directories so named are located once more then, and listing waits.
        self.unsettled: dict[bytes, int] = {}
        self.put_off = False  # with an index: the tree could not be mended yet
        self._again_at = 0.0
        self._baseline: str | None = None  # of the first scan, when the loss was told

    # -- a loss --

    def begin(self) -> None:
        """Become active; what is born from now on is listed, too."""
        files = self._r.files
        if files is not None:
            files.begin(self.active)
            self._baseline = self._baseline or files.baseline
        if not self.active:
            self._twice.clear()  # of the first scan
        self.active = True
        self.unsettled.setdefault(b"", 0)
        if files is not None:
            return
        # What a consumer still believes of a name that is made anew must not stay below it.
        self._r.dirs.born = 0

    @property
    def listing(self) -> int:
        """What the scanner is to bring of names, as of scan_dirs."""
        return 2 if self._r.files is not None else int(self.active)

    @property
    def late(self) -> bool:
        """Whether a mend that was put off is to be tried again."""
        if time.monotonic() < self._again_at:
            return False
        self._again_at = time.monotonic() + _AGAIN
        return True

    def mend_all(self, rows: list[Any]) -> bool:
        """Put right all of the tree, or, when that cannot be seen now, put it off; whether done."""
        tree = self._r.tree
        noted = {tree.info(at)[3]: NOTE_NAMES | NOTE_SELF for at in tree.ids()}
        self.put_off = not self.mend(rows, noted)
        self.unsettled.setdefault(b"", 0)
        return not self.put_off

    def forget(self) -> None:
        """The tree was dropped: everything is affected."""
        self._due.clear()
        self._out.clear()
        self._void.clear()
        self._since.clear()
        self._over.clear()
        self._loose.clear()
        self._only.clear()
        self._late.clear()
        self._lists.clear()
        self._gone.clear()
        self._moved.clear()
        self.unsettled = {b"": 0}
        self._due.update((root.key, None) for root in self._r.dirs.roots)

    def mend(self, rows: list[Any], noted: dict[bytes, int]) -> bool:
        """Put right what a loss did to the tree; False when that cannot be seen."""
        r, tree, dirs = self._r, self._r.tree, self._r.dirs
        if r.files is not None and r.intake.blind:
            return False
        adrift = {key for key in dirs.adrift if (at := tree.find(key)) >= 0 > tree.info(at)[0]}
        moving = {k for k, bits in noted.items() if bits & NOTE_SELF and tree.find(k) >= 0}
        moving |= adrift
        if r.files is not None:  # what was told deleted is not told again
            moving = {k for k in moving if not tree.info(tree.find(k))[2] & flags.ZOMBIE}
        ways: dict[bytes, list[Link] | None] = {}
        located: dict[bytes, Any] = ways if r.files is not None else {}  # of all, parents first
        try:
            for key in moving:
                ways[key] = r.lookup.locate(
                    key, lambda at: at in located or (at not in moving and tree.find(at) >= 0)
                )
                if ways[key] is None and r.lookup.links(key) > 0:
                    return False  # it is there, and moves all the time
        except CannotLook:
            return False
        if not r.intake.sync():
            return False
        self._until = r.intake.last
        firsts = r.firsts()
        if r.files is not None and r.intake.blind:
            return False
        places: dict[bytes, Name | None] = {}
        above = self._above_roots()
        for key, way in ways.items():
            for child, parent, name in way or ():
                if child not in moving:
                    dirs.observed[child] = parent, name
            first = firsts.get(key)
            if first is not None and first[3] is not None and first[4] is not None:
                places[key] = first[3], first[4]
            elif key in dirs.hidden and r.files is not None:
                return False
            elif key in dirs.hidden and key not in above:
                dirs.put(key, -1, b"")  # nowhere, until the loss ahead that moved it
            elif way is None:
                places[key] = None
            else:
                places[key] = (way[0][1] or b"", way[0][2]) if way else (b"", b"")
        if r.files is not None:
            return self._rearrange(rows, places, firsts, noted)
        moved: set[int] = set()
        hit: set[int] = set()
        gone: list[bytes] = []
        still: set[bytes] = set()
        for key, place in places.items():
            at = tree.find(key)
            if place is None:
                gone.append(key)
                continue
            if tree.info(at)[2] & flags.TOP:
                continue
            parent_at = dirs.place(place[0], firsts) if place[0] else -1
            if place[0] and parent_at < 0:
                if key in adrift:  # until the next loss
                    still.add(key)
                    continue
                return False
            hit.add(at)
            if tree.info(at)[:2] != (parent_at, place[1]):
                dirs.put(key, parent_at, place[1])
                moved.add(at)
                tree.flag(at, flags.CURRENT, 0)
                self._moved.append(key)
        dirs.placed()
        dirs.adrift = still
        for key in gone:
            self._vanished(rows, key)
        self._judge(rows, moved)
        # Also those that are where they were: it may have been learnt ahead of the loss.
        self._due.update((tree.info(at)[3], None) for at in self._below(hit))
        self._relist(noted)
        return True

    def _judge(self, rows: list[Any], moved: Iterable[int]) -> None:
        if moved:
            roots_moved = self._r.teller.follow_roots(rows)
            for at in moved:
                self._r.dirs.moved(at, roots_moved)

    def _relist(self, noted: dict[bytes, int]) -> None:
        tree = self._r.tree
        for key, bits in noted.items():
            if bits & NOTE_NAMES and tree.find(key) >= 0:
                self._due[key] = None
            if key in self._out:
                self._void[key] = self._out[key]
                self._due[key] = None
            # What was told before may have been undone in the loss.
            self._since.pop(key, None)
            self._twice.discard(key)
        if self.unsettled:
            for key, bits in noted.items():
                self.unsettled[key] = self.unsettled.get(key, 0) | bits

    def _rearrange(
        self,
        rows: list[Any],
        places: dict[bytes, Name | None],
        firsts: dict[bytes, Record],
        noted: dict[bytes, int],
    ) -> bool:
        # The same with an index: the directories are told where they are now.
        r, tree, dirs = self._r, self._r.tree, self._r.dirs
        assert r.files is not None
        goals: dict[bytes, Name] = {}
        gone: list[bytes] = []
        known = set(tree.ids())
        for key, place in places.items():
            if tree.info(tree.find(key))[2] & flags.TOP:
                continue
            if place is None:
                gone.append(key)
            elif place[0] and dirs.place(place[0], firsts) < 0:
                return False
            else:
                goals[key] = place
        dirs.placed()
        dirs.adrift.clear()
        new = [at for at in tree.ids() if at not in known]
        moved, due, whole = r.files.rearrange(rows, goals, gone, new)
        for at in moved:
            self._moved.append(tree.info(at)[3])
        self._judge(rows, moved)
        self._due.update(dict.fromkeys(due))
        self._due.update((key, None) for key in goals if key in r.files.unlisted)
        self._relist(noted)
        return whole

    def note(self, decoder: Any) -> None:
        """Note what a window is about to tell of directories that are being listed.

        And the directories that a window behind the loss names, until the queue was empty.
        """
        self._window = None
        if self._out and self.listing:
            out, void = self._out, self._void
            if void:  # nobody takes what comes of those
                out = {key: count for key, count in out.items() if count > void.get(key, 0)}
            for record in decoder.records_in(out):
                mask = record[0]
                for name in names_of(record):
                    if name[0] in out:
                        came = name == record[5:7] if mask & RENAME else mask & _BOTH == CREATE
                        here = self._since.setdefault(name[0], {})
                        here[name[1]] = came, bool(mask & ONDIR), record[7]
            if sum(map(len, self._since.values())) > _MOST_SINCE:
                for key in self._since:
                    self._void[key] = self._out[key]
                self._over.update(self._since)
                self._since.clear()
        if self.active and self._r.files is not None and (self._due or self._out or self._loose):
            self._take_along(decoder)
        if self.unsettled:
            for record in decoder.dir_records():
                if record[7] is not None:
                    self.unsettled[record[7]] = self.unsettled.get(record[7], 0) | NOTE_SELF

    def _take_along(self, decoder: Any) -> None:
        # What was lost of a file's data is not told yet when a rename takes it out of a directory
        # that waits to be compared: where it went is listed, too, if only for that.
        for record in decoder.records_in(_Waiting(self._due, self._out, self._loose)):
            names = names_of(record)
            loose = record[0] & RENAME and len(names) == 2 and self._uncompared(*names[0])
            for directory, name in names:
                for each in (self._loose, self._only):
                    if directory in each:
                        each[directory].discard(name)
            if loose and names[1][0] not in self._due:
                self._loose.setdefault(names[1][0], set()).add(names[1][1])
        if sum(map(len, self._loose.values())) > _MOST_SINCE:
            self.want(self._loose)
            self._loose.clear()

    def _uncompared(self, directory: bytes, name: bytes) -> bool:
        if directory in self._due or name in self._loose.get(directory, ()):
            return True
        only = self._only.get(directory)
        return directory in self._out if only is None else name in only

    def told(self, directory: bytes, name: bytes, key: bytes | None) -> None:
        """Take what a name was told to lead to, where its records do not say."""
        names = self._since.get(directory, {})
        if name in names:
            names[name] = key is not None, names[name][1], key

    def told_gone(self, directory: bytes, name: bytes, record: Record) -> None:
        """Take that a directory's name was told to have gone at a record that does not say so.

        What `note` took from that record's window may be of before it, and then it is not so.
        """
        if not self.listing or self._out.get(directory, 0) <= self._void.get(directory, 0):
            return
        if self._window is None:
            places: dict[Any, int] = {}
            last: dict[Name, int] = {}
            for place, each in enumerate(self._r.decoder.name_records(EVERYTHING)):
                places.setdefault(each[:8], place)
                last.update((named, place) for named in names_of(each))
            self._window = places, last
        places, last = self._window
        at = places.get(record[:8])  # without the victim, which only the record in hand says
        if at is None or last.get((directory, name), -1) <= at:
            self._since.setdefault(directory, {})[name] = False, True, None

    def window_ended(self) -> None:
        """Forget what was noted of the window that was decoded."""
        self._window = None

    def rest(self, rows: list[Any]) -> bool:
        """The queue was empty, all before it is decoded; False when the tree cannot be mended."""
        if self.put_off:
            return True
        unsettled, self.unsettled = self.unsettled, {}
        unsettled.pop(b"", None)
        return not unsettled or self.mend(rows, unsettled)

    def enter(self, keys: Iterable[bytes]) -> None:
        """What is below directories that came in is listed, if a loss is being repaired."""
        if self.active or self._r.files is not None:
            tops = {at for at in map(self._r.tree.find, keys) if at >= 0}
            below = list(self._below(tops))
            self._due.update((self._r.tree.info(at)[3], None) for at in below)
            if self._r.files is not None:
                for at in below:
                    self._r.files.hold(at, True)

    def moved(self, moves: list[tuple[bytes, bytes]]) -> None:
        """Of the directories that a window moved, list what may stand where more is believed.

        A consumer believes things below names that are gone until their directory is listed. What
        a rename puts there is mixed with those, though it was listed where it came from; and it
        may take them along to other names.
        """
        if self.active and any(self._waits(parent) for _, parent in moves):
            self.enter(key for key, _ in moves)

    def _waits(self, key: bytes) -> bool:
        # Not listed yet; or gone, and nobody knows.
        at = self._r.tree.find(key)
        waits = key in self._due or key in self._out or key in self._parked
        return waits or at < 0 or at in self._r.dirs.unscanned or self._r.unread(key)

    def _above_roots(self) -> set[bytes]:
        out = set()
        for root in self._r.dirs.roots:
            at = self._r.tree.find(root.key)
            while at >= 0:
                at, _, _, key, _ = self._r.tree.info(at)
                if key in out:
                    break
                out.add(key)
        return out

    def _below(self, tops: set[int]) -> Iterable[int]:
        # Some directories with all that is known below them.
        tree = self._r.tree
        if not any(tree.info(at)[4] for at in tops):
            return tops
        children: dict[int, list[int]] = {}
        for at in tree.ids():
            children.setdefault(tree.info(at)[0], []).append(at)
        out, todo = set(tops), list(tops)
        while todo:
            for at in children.get(todo.pop(), ()):
                if at not in out:
                    out.add(at)
                    todo.append(at)
        return out

    def drop(self, rows: list[Any], key: bytes, dead: bool = True) -> None:
        """Drop a directory that is gone; ``dead``: no scan brings it back."""
        r = self._r
        at = r.tree.find(key)
        if at < 0 or r.tree.info(at)[2] & flags.TOP:
            return
        if dead and r.dirs.dead is not None:
            r.dirs.dead.add(key)
        for root in [root for root in r.dirs.roots if root.key == key]:
            r.teller.end_root(rows, root, "current")
        r.tree.drop(at)

    def detach(self, key: bytes) -> bool:
        """Put a directory that is gone nowhere; False when a root is below, which says more.

        What left it, and is not told to have, is nowhere with it: its record brings it back.
        """
        if key in self._above_roots():
            return False
        self._r.dirs.put(key, -1, b"")
        return True

    def stray(self, key: bytes) -> None:
        """Locate a directory once more: it is not where it was believed to be."""
        if self.active:
            self.unsettled[key] = self.unsettled.get(key, 0) | NOTE_SELF

    def want(self, keys: Iterable[bytes]) -> None:
        """List these directories, too."""
        self._due.update(dict.fromkeys(keys))

    # -- listing --

    def _watched(self, at: int) -> bool:
        return bool(self._r.tree.resolve(at)[0] & (flags.IN | flags.IN_FILES))

    @property
    def done(self) -> bool:
        """Whether nothing of it is left to list or to tell."""
        if self._due or self._lists or self._gone or self.unsettled or self.put_off:
            return False
        if self._loose:
            return False
        if self._r.behind(self._until):
            return False  # a directory that they bring is listed
        tree = self._r.tree
        for key in self._parked:
            at = tree.find(key)
            if at >= 0 and self._watched(at):
                self._due[key] = None
        self._parked.clear()
        return not self._due

    def keys(self, most: int) -> list[bytes]:
        """Take directories to list again: those in the tree whose names are watched."""
        out: list[bytes] = []
        tree = self._r.tree
        while self._due and len(out) < most:
            key = next(iter(self._due))
            del self._due[key]
            self._loose.pop(key, None)
            at = tree.find(key)
            if at < 0 or not self._watched(at):
                self._parked[key] = None
                continue
            tree.flag(at, flags.SCANNED, 0)
            out.append(key)
        # Those that are out are listed when that listing is here: the names are told behind it.
        for key in [key for key in self._loose if key not in self._out][: most - len(out)]:
            names = self._loose.pop(key)
            at = tree.find(key)
            if names and at >= 0 and self._watched(at):
                self._only[key] = names
                out.append(key)
        return out

    def given(self, keys: Iterable[bytes]) -> None:
        """Note what the scanner was given."""
        for key in keys:
            self._due.pop(key, None)
            if key in self._out:
                self._only.pop(key, None)  # now it is for all of it
            self._out[key] = self._out.get(key, 0) + 1

    def take(self, results: Sequence[Any]) -> list[Any]:
        """Take what the scanner brought: [(children, failed)]; names are kept for `tell`."""
        out = []
        for keys, (children, failed, lists) in results:
            void = set()
            for key, count in Counter(keys).items():
                self._out[key] -= count
                if not self._out[key]:
                    del self._out[key]
                    self._only.pop(key, None)
                old = self._void.pop(key, 0)
                if old >= count:
                    void.add(key)
                    if old > count:
                        self._void[key] = old - count
                # Else it was handed out again since, and all of these were listed after that.
                if key in self._over and key not in self._out:
                    self._over.discard(key)
                    if key in void:
                        self._due[key] = None
                late = self._since.get(key) if key in self._out else self._since.pop(key, None)
                if late and key not in void:
                    self._late[key] = dict(late)
            if void:
                children = [child for child in children if child[1] not in void]
                failed = [each for each in failed if each[0] not in void]
                lists = [each for each in lists if each[0] not in void]
            if self.listing:
                inside: dict[bytes, dict[bytes, bytes]] = {}
                if self._r.files is not None and self.active:
                    for child, parent, name, _ in children:
                        inside.setdefault(parent, {})[name] = child
                self._lists += [(key, blob, inside.get(key, {})) for key, blob in lists]
            if self.active:
                self._gone += [key for key, code in failed if code in _ABSENT]
            out.append((children, failed))
        return out

    # -- telling --

    def tell(self, rows: list[Any], complete: bool) -> None:
        """Tell what was listed, before the next window is decoded.

        ``complete``: everything raised before the listing stands in the intake.
        """
        late, self._late = self._late, {}
        if not self._lists and not self._gone:
            return
        lists, self._lists = self._lists, []
        gone, self._gone = self._gone, []
        r = self._r
        if (
            not complete or r.intake.gap or (r.files is not None and r.intake.blind)
        ):  # it cannot be brought to the time of the records: once more
            self._due.update((key, None) for key, _, _ in lists)
            self._due.update((key, None) for key in gone)
            return
        self._until = r.intake.last
        ahead = [*r.decoder.name_records(EVERYTHING), *r.intake.records()]
        if gone:
            named = {record[7] for record in ahead}
            for key in gone:
                if key not in named:
                    self._is_gone(rows, key)
        unread = first_names(ahead, {key for key, _, _ in lists})
        firsts = {
            key: {name: there[:2] for name, there in late.get(key, {}).items()}
            | unread.get(key, {})
            for key, _, _ in lists
            if key in late or key in unread
        }
        now = time.time()
        targets: dict[bytes, dict[bytes, bytes | None]] = {}
        self._roots = tuple(root.path for root in r.dirs.roots)
        if r.files is not None:
            for directory, names in late.items():
                for name, (there, is_dir, target) in names.items():
                    targets.setdefault(directory, {})[name] = target if there and is_dir else None
                if directory not in self._twice:  # the data of what came is not compared
                    self._twice.add(directory)
                    self._due[directory] = None
            for (directory, name), target in _first_targets(ahead, unread).items():
                targets.setdefault(directory, {})[name] = target
        for key, blob, inside in lists:
            if r.files is not None:
                for name, target in targets.get(key, {}).items():
                    inside.pop(name, None)
                    if target is not None:
                        inside[name] = target
                self._difference(rows, key, blob, firsts.get(key), inside)
            else:
                self._tell_one(rows, key, blob, firsts.get(key), now)
        if r.files is not None and self.active:
            # A name that is renamed behind the listing takes along what is not compared yet.
            self._due.update(
                (record[5], None)
                for record in ahead
                if record[0] & RENAME and record[5] is not None
                if firsts.get(record[3] or b"", {}).get(record[4] or b"", (False,))[0]
                if r.tree.find(record[5]) >= 0
            )
            self._find_strays(rows)

    def _find_strays(self, rows: list[Any]) -> None:
        # At once, if it can be: nothing says that another window follows.
        strays = {key: bits for key, bits in self.unsettled.items() if key}
        if strays and b"" not in self.unsettled and not self._r.intake.gap:
            self.unsettled.clear()
            if not self.mend(rows, strays):
                if self._r.intake.gap:
                    self.unsettled.update(strays)  # behind that loss
                else:
                    self._r.loss_of_all(rows)

    def _is_gone(self, rows: list[Any], key: bytes) -> None:
        files, at = self._r.files, self._r.tree.find(key)
        if files is None or at < 0 or self._r.tree.info(at)[2] & flags.TOP:
            self._vanished(rows, key)
        else:
            files.gone(rows, at)

    def _vanished(self, rows: list[Any], key: bytes) -> None:
        # A directory is gone, and no record will say where it was. Nothing is believed in it any
        # more when its name is not.
        at = self._r.tree.find(key)
        if at < 0 or self._r.tree.info(at)[2] & (flags.TOP | flags.ZOMBIE):
            return
        parent = self._r.tree.info(at)[0]
        if parent >= 0:
            self._due[self._r.tree.info(parent)[3]] = None
        self.detach(key)
        self.drop(rows, key)

    def _difference(
        self,
        rows: list[Any],
        key: bytes,
        blob: bytes,
        firsts: dict[bytes, tuple[bool, bool]] | None,
        inside: dict[bytes, bytes],
    ) -> None:
        r = self._r
        assert r.files is not None
        at = r.tree.find(key)
        if at < 0 or not self._watched(at):
            self._parked[key] = None
        elif self.active:
            r.files.listed(rows, at, blob, firsts, inside)
        else:
            r.files.learn(key, blob, firsts)

    def _tell_one(
        self,
        rows: list[Any],
        key: bytes,
        blob: bytes,
        firsts: dict[bytes, tuple[bool, bool]] | None,
        now: float,
    ) -> None:
        r = self._r
        at = r.tree.find(key)
        if at < 0 or not self._watched(at):
            self._parked[key] = None
            return
        scope, where = r.tree.resolve(at)
        path = fsdecode(where) or "/"
        names = fsdecode(blob).split("\0")
        names.pop()  # behind the last NUL
        if firsts:
            kept = [name for name in names if fsencode(name.rstrip("/")) not in firsts]
            names = kept + [
                fsdecode(name) + ("/" if is_dir else "")
                for name, (present, is_dir) in firsts.items()
                if present
            ]
        if not scope & flags.IN:
            watched = {
                fsdecode(root.file) for root in r.dirs.roots if root.key == key and root.file
            }
            names = [name for name in names if name.rstrip("/") in watched]
        elif r.dirs.globs:
            base = path.rstrip("/")
            match = r.dirs.globs.match
            names = [name for name in names if not match(f"{base}/{name.rstrip('/')}")]
        source = "current" if scope & flags.IN_CURRENT else "exact"
        who = identity(r.teller.dev, key)
        rows.append(
            r.teller.settings.make(
                ("relisted",),
                path,
                None,
                True,
                0,
                who,
                now,
                source,
                roots=self._roots,
                names=tuple(sorted(names)),
            )
        )
        self.told_rows += 1

    def end(self, rows: list[Any]) -> None:
        """Everything is told: paths are exact again."""
        r = self._r
        for key in self._moved:
            at = r.tree.find(key)
            if at >= 0:
                r.tree.flag(at, 0, flags.CURRENT)
        self._moved.clear()
        r.dirs.born = flags.SCANNED
        self.active = False
        roots = tuple(root.path for root in r.dirs.roots)
        path = roots[0] if roots else ""
        row = r.teller.settings.make(
            ("repaired",), path, None, True, 0, None, time.time(), "exact",
            roots=roots, count=self.told_rows, baseline=self._baseline,
        )  # fmt: skip
        r.teller.say_row(rows, row)
        self.told_rows = 0
        self._baseline = None
        self._twice.clear()


class _Waiting:
    """Directories in any of some."""

    def __init__(self, *them: Container[bytes]) -> None:
        self._them = them

    def __contains__(self, key: object) -> bool:
        return any(key in each for each in self._them)


_BOTH = CREATE | DELETE
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


def _first_targets(records: Iterable[Record], wanted: Container[bytes]) -> dict[Name, bytes | None]:
    # The directory that a name led to before the first record about it; None: to none.
    out: dict[Name, bytes | None] = {}
    for record in records:
        mask = record[0]
        for i, name in enumerate(names_of(record)):
            if name[0] in wanted and name not in out:
                there = i == 0 if mask & RENAME else not mask & CREATE and bool(mask & DELETE)
                out[name] = record[7] if there and mask & ONDIR else None
    return out


def first_names(
    records: Iterable[Record], wanted: set[bytes]
) -> dict[bytes, dict[bytes, tuple[bool, bool]]]:
    """What the first record about each name in some directories says of the time before it.

    directory key -> name -> (it was there, it is a directory).
    """
    out: dict[bytes, dict[bytes, tuple[bool, bool]]] = {}
    for record in records:
        mask = record[0]
        for i, (directory, name) in enumerate(names_of(record)):
            if directory not in wanted:
                continue
            there = i == 0 if mask & RENAME else not mask & CREATE and bool(mask & DELETE)
            out.setdefault(directory, {}).setdefault(name, (there, bool(mask & ONDIR)))
    return out
