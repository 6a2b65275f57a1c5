"""Resolver: chunks of records in, changes with paths out, one window at a time.

A window is what was read until the kernel's queue was seen empty; only within one can the kernel
merge a later event into an earlier record. The decoder makes the common changes itself and stops at
records that need a decision (settler.py). Before a window is decoded every directory it names is
placed (directories.py); after it, what its merges left open is verified (verify.py).

REFS: owned by one group of a watch. LOCKING: none, one consumer. LIFETIME: until the group closes.
"""

import errno
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from fanwise._errors import NoSuchRoot, PermissionNeeded
from fanwise.kernel import contract as flags
from fanwise.kernel.contract import CREATE, DELETE, ONDIR, RENAME, STOP_OVERFLOW, Record
from fanwise.kernel.mounts import Mount
from fanwise.kernel.native import Parts

from .bypath import PathLookup
from .directories import Directories
from .index import Files
from .intake import Chunk, Intake, overflow_at
from .marker import Marker, describe
from .repair import BEHIND, Repair
from .scan import Scanner
from .settler import Settler
from .teller import Settings, Teller
from .verify import Verifier

WINDOW = 65_536  # records, after which a window ends without an empty queue
_SCAN_AHEAD = 1024  # directories handed to the scan at a time
_ASTRAY = 8  # looks at a directory that is not where the stream says, before it waits a second


class Resolver:
    """Turns what one kernel group read into changes."""

    def __init__(
        self,
        parts: Parts,
        directories: Directories,
        scanner: Scanner | Marker,
        take: Callable[[], tuple[bytes, int, bool, int] | None],
        sync: Callable[[], bool],
        settings: Settings,
        gap: Callable[[], dict[bytes, int] | None] = lambda: None,
        index: bool = False,
    ) -> None:
        self.dirs = directories
        self.lookup = directories.lookup
        self.tree = directories.tree
        self.scanner = scanner
        self.marker = scanner if isinstance(scanner, Marker) else None
        self.teller = Teller(settings, directories)
        make, kinds, _, pids = settings
        device = "{}:{}".format(*directories.mount.dev)
        gone: dict[bytes, set[bytes]] = {}
        told = make, kinds, self.teller.want, device, pids
        # Marks on directories hear nothing of a file's link count, nor of its end.
        blind = self.marker is not None
        self.decoder = parts.Decoder(self.tree, *told, gone, blind)
        self.intake = Intake(take, sync, parts.Decoder(self.tree, *told, {}, blind), gap)
        self.verifier = Verifier(self)
        self.repair = Repair(self)
        self.settler = Settler(
            self.teller,
            directories,
            self.decoder,
            self.intake,
            gone,
            self.verifier.told_both,
            self.verifier.told_gone,
            self.verifier.told_back,
        )
        self.expander = self.settler.expander
        self.files = Files(self, parts.Index()) if index else None
        if self.files is not None:
            self.settler.files = self.files
            directories.came = self.files.hold
            directories.came_with = self.files.entered
            self.expander.files_of = self.files.files_in
            self.expander.came = self.files.came
        self._open = False
        self._empty_at = 0  # when what stands before an empty queue was read, ns
        self._quiet = False  # no scan, nothing carried over: a window can be taken at once
        self._drained = True  # nothing can be merged into what was read
        self._empty = True  # the queue was seen empty behind it
        self._currents: list[int] = []
        self.scanned = False
        self.stale = False  # a loss was told and the tree is not whole again
        # Directories that could not be scanned, and how often: those that wait, those tried again.
        self._unread: dict[bytes, int] = {}
        self._retried: dict[bytes, int] = {}
        self._retry_at = 0.0
        self._opened = False  # what could not be marked is told from then on
        self._murky_until = 0  # the last chunk that may be older than a mark
        self._astray: dict[bytes, int] = {}  # not where they should be, and how often
        self._silent: set[bytes] = set()  # directories told not to be watched
        self.teller.roots_moved = self._mark_above
        if isinstance(self.lookup, PathLookup):
            self.lookup.unread = self._unread_directories

    def _unread_directories(self) -> list[Record]:
        self.intake.sync()
        return [*self.decoder.dir_records(), *self.intake.directories()]

    def start(self) -> None:
        """Find the roots and begin the scan. Call it when the mark is set."""
        with self.lookup:
            for root in self.dirs.roots if self.marker is None else ():
                try:
                    self.lookup.links(root.key)
                except PermissionNeeded as error:  # now, and not at the first change
                    raise PermissionNeeded(root.path, error.reason, error.remedy) from error
            self._mark_above()
            for root in self.dirs.reset():
                raise NoSuchRoot(root.path, "it was removed while the watch began")
        self.dirs.dead = set()
        if self.files is not None:  # also where no scan looks for directories
            self.repair.want(root.key for root in self.dirs.roots)
        self._scan_more([])

    def _mark_above(self) -> None:
        if self.marker is not None:
            self.marker.mark_above([root.path for root in self.dirs.roots])

    # -- slices --

    def step(self, limit: int) -> list[Any]:
        """The next slice of changes; [] when there is nothing to do now."""
        # An idle consumer is woken with cold caches: few calls stand between a record and its
        # change, and the descriptor of looks is closed without a context manager.
        try:
            rows = self._step(limit)
        finally:
            if self.lookup.held:
                self.lookup.close()
        return self.teller.filter(rows) if self.dirs.globs else rows

    def _step(self, limit: int) -> list[Any]:
        rows: list[Any] = []
        stop = 0
        if self._quiet and not self._open:
            # Most windows by far need nothing but decoding; one call does it.
            chunk = self.intake.pop()
            if chunk is None:
                return rows
            self.dirs.murky = self.intake.popped <= self._murky_until
            special = chunk.lost or not chunk.drained or not chunk.data
            if special or (self.files is not None and overflow_at(chunk.data) >= 0):
                self.intake.unpop(chunk)
            else:
                plain = self.decoder.plain(chunk.data, chunk.when / 1e9, limit)
                self._empty_at = chunk.when
                if plain is None:
                    self._open = self._drained = self._empty = True
                    self._look((), True)
                else:
                    rows, stop, left = plain
                    if left is not None:
                        if left:
                            self.settler.note_gone(left)
                        if self.files is not None:
                            self.files.plain(chunk.data)
                            self.files.emptied(chunk.when)
                        return rows
                    self._open = self._drained = self._empty = True
                    if self.files is not None:
                        self.files.begun()
                    if not stop:
                        return rows
                    self._settle(stop, rows)
        if not self._open:
            if not self._begin(rows):
                self._mark_fresh(rows)
                self._scan_more(rows)
                return rows
            self._open = True
        while len(rows) < limit:
            if self.expander.pending:
                rows += self.expander.step(limit - len(rows))
                continue
            made, stop = self.decoder.decode(limit - len(rows))
            rows += made
            if stop:
                self._settle(stop, rows)
            elif not self.decoder.pending:
                self._end(rows)
                break
            else:
                break
        return rows

    def remount(self, mount: Mount, rows: list[Any]) -> None:
        """Follow the mount to another mount point."""
        self.dirs.mount = self.lookup.mount = mount
        for at in self.tree.ids():
            if self.tree.info(at)[2] & flags.TOP:
                self.tree.move(at, -1, mount.mount_point)
                self.dirs.moved(at, self.teller.follow_roots(rows))
                break

    @property
    def unmarked(self) -> bool:
        """Whether directories that came, or were there, wait for their marks."""
        return bool(self.scanner.busy or self.dirs.unscanned)

    def refused_at_start(self) -> list[tuple[bytes, int]]:
        """Take the directories that could not be marked, (key, errno)."""
        assert self.marker is not None
        refused, self.marker.refused = self.marker.refused, []
        self._opened = True
        self._silent.update(key for key, _ in refused)
        return list(dict.fromkeys(refused))

    @property
    def pending(self) -> bool:
        """Whether step() has more to do without anything new."""
        waits = self.marker is not None and bool(self.marker.busy or self.dirs.fresh)
        return self._open or bool(self.intake) or waits

    def behind(self, last: int) -> bool:
        """Whether what stood in `intake` up to a position (its `last`) is not all told."""
        return self._open or self.intake.popped < last

    def _begin(self, rows: list[Any]) -> bool:
        if self.repair.put_off:
            self._extend_loss(rows)
            if self.repair.put_off:
                return False
        found = self.repair.take(self.scanner.take())
        complete = self.intake.sync() if found else True
        records = 0
        drained = cut = False
        self.dirs.murky = self.intake.popped < self._murky_until
        while records < WINDOW:
            chunk = self.intake.pop()
            if chunk is None:
                if not records or drained:
                    break
                # The reader is between two reads, or a full ring hid that the queue was empty.
                self.intake.sync()
                drained = not self.intake
                continue
            if chunk.lost:
                if records:  # the window ends before the gap
                    self.intake.unpop(chunk)
                    cut = True
                    break
                if found:
                    self.intake.unpop(chunk)
                    self._learn(found, complete, new=False)
                    self.repair.tell(rows, complete)
                    self.intake.pop()
                count = chunk.lost if chunk.source == "ring" else None
                if chunk.data:  # what follows the gap; the repair looks ahead at it
                    chunk.lost = 0
                    self.intake.unpop(chunk)
                self._loss(rows, count, chunk.source, chunk.noted)
                if not chunk.data and chunk.drained:
                    self._rest(rows)
                return False
            if chunk.data:
                if self.files is not None:
                    # What follows an overflow is a window of its own: the repair begins there.
                    first = overflow_at(chunk.data)
                    if not first and records:
                        self.intake.unpop(chunk)
                        break
                    second = first if first else overflow_at(chunk.data, 24)
                    if second > 0:
                        chunk = self._cut(chunk, second)
                        records += self.decoder.add(chunk.data, chunk.when / 1e9)
                        break
                records += self.decoder.add(chunk.data, chunk.when / 1e9)
            self._empty_at = chunk.when
            drained = chunk.drained
            if drained and records:
                break
        self._drained, self._empty = drained or cut, drained
        if records:
            self._look(found, complete)
        else:
            self._learn(found, complete, new=False)
            if drained:
                self._rest(rows)
        self.repair.tell(rows, complete)
        self.repair.note(self.decoder)
        return records > 0

    def _cut(self, chunk: Chunk, at: int) -> Chunk:
        # Take the records of a chunk up to a position; the others are queued again.
        rest = Chunk(chunk.data[at:], chunk.when, chunk.drained, 0)
        self.intake.unpop(rest)
        return Chunk(chunk.data[:at], chunk.when, False, 0)

    def _extend_loss(self, rows: list[Any]) -> None:
        # The tree could not be looked at, so what was read since belongs to the loss.
        if not self.repair.late:
            return
        records, losses = self.intake.discard()
        for chunk in losses:
            count = chunk.lost if chunk.source == "ring" else None
            self._say_lost(rows, count, chunk.source)
        if records:
            self._say_lost(rows, records, "ring")
        if self.repair.mend_all(rows):
            self._mark_top(0, flags.CURRENT)
            if not self.intake:
                self._rest(rows)

    def _rest(self, rows: list[Any]) -> None:
        # The queue was seen empty, and all that was read before it is decoded.
        if not self.repair.rest(rows):
            self.loss_of_all(rows)

    def _look(self, found: Sequence[Any], complete: bool) -> None:
        # Everything that a window needs before it is decoded.
        if self.files is not None:
            self.files.begun()
        self._learn(found, complete, new=True)
        self.settler.begin()
        self.verifier.begin()

    def _end(self, rows: list[Any]) -> None:
        if self.files is not None:
            self.files.window(rows)
            if self._empty:
                self.files.emptied(self._empty_at)
        self.verifier.end(rows, self._drained)
        self.settler.end(self._drained)
        self.repair.window_ended()
        for at in self._currents:
            self.tree.flag(at, 0, flags.CURRENT)
        self._currents.clear()
        if self._empty:
            self._rest(rows)
        if self._drained:
            self.tree.sweep()
            if self.files is not None:
                self.files.swept()
        self._open = False
        self._mark_fresh(rows)
        self._scan_more(rows)

    def mark_current(self, at: int) -> None:
        """Say that paths below a directory are not exact until the window ends."""
        if at not in self._currents:
            self.tree.flag(at, flags.CURRENT, 0)
            self._currents.append(at)

    # -- learning --

    def unread(self, key: bytes) -> bool:
        """Say whether a directory could not be read, and is to be tried again."""
        return key in self._unread

    def firsts(self) -> dict[bytes, Record]:
        """For each directory the first record, from here on, that names it as an object."""
        out: dict[bytes, Record] = {}
        for record in (*self.decoder.dir_records(), *self.intake.directories()):
            if record[7] is not None:
                out.setdefault(record[7], record)
        self.dirs.hidden = self.intake.moved_in_losses()
        return out

    def _learn(self, found: Sequence[Any], complete: bool, new: bool) -> None:
        dirs = self.dirs
        unknown = self.decoder.unknown() if new else []
        if not found and not unknown:
            return
        # What is seen behind a loss that does not say what it hit says nothing of before it.
        blind = self.intake.blind
        if blind:
            found = ()
        scanned: list[tuple[bytes, int]] = []
        firsts = self.firsts()
        leaving = self._leaving() if found else set()
        for children, failed in found:
            for key, code in failed:
                if code not in (errno.ENOENT, errno.ESTALE, errno.ENOTDIR):
                    tries = self._retried.get(key, 0) + 1
                    if tries < 4:  # what cannot be read at all is learnt by its changes
                        self._unread[key] = tries
            for key, parent, name, leaf in children:
                if key in leaving:  # it may have left for here: found once more when that is told
                    self.repair.want([parent])
                at = self.tree.find(key)
                if at >= 0:
                    self._join(at, parent, name, firsts.get(key))
                elif not (dirs.dead and key in dirs.dead):
                    dirs.observed[key] = parent, name
                    # What appears in a leaf from now on is in the stream.
                    leaf = leaf and not self.repair.listing  # then its names are wanted
                    if self.files is not None:
                        self.files.found(key, parent)
                    scanned.append((key, flags.SCANNED if leaf else 0))
        if self.marker is not None:
            # What the stream is about to tell is told by it, and marked then.
            scanned = [each for each in scanned if not _arrives(firsts.get(each[0]))]
        asked: set[bytes] = set()
        for _ in range(64):  # each round goes one unknown directory up, or learns from the stream
            missing = dirs.missing([*unknown, *(key for key, _ in scanned)], firsts) - asked
            if blind or not missing:
                break
            asked |= missing
            complete = dirs.look(missing) and complete
            complete = self.intake.sync() and complete
            blind = self.intake.blind
            if blind:
                dirs.placed()
            firsts = self.firsts()
        for key, extra in scanned:
            dirs.place(key, firsts, extra)
        for key in unknown:
            at = dirs.place(key, firsts)
            if at >= 0 and asked and not complete:
                self.mark_current(at)
        dirs.placed()

    def _join(self, at: int, parent: bytes | None, name: bytes, first: Record | None) -> None:
        # The scan found a directory that is known. It may have been outside of what the mount
        # shows, with no way up, and have come in with a directory above it. It is put where it
        # was before the first record that is unread: a rename is told from there.
        above, _, now, key, _ = self.tree.info(at)
        if first is not None:
            parent, name = first[3], first[4] or b""
        elif key in self.dirs.hidden:
            parent = None
        to = self.tree.find(parent) if parent is not None else -1
        if above < 0 and not now & flags.TOP and to >= 0:
            self.dirs.put(key, to, name)
            self.dirs.entered.append(key)
            if self.marker is not None:  # what no path led to has no mark
                self.dirs.back(at)
        self.dirs.want_scan(at)

    def _leaving(self) -> set[bytes]:
        # Directories of which unread records say that they left for where no mark was.
        if self.marker is None:
            return set()
        records = *self.decoder.dir_records(), *self.intake.directories()
        return {r[7] for r in records if r[7] is not None and r[0] & RENAME and r[5] is None}

    def _mark_fresh(self, rows: list[Any]) -> None:
        """Mark directories that were made, and tell of what is inside them already.

        What stands in the list was there before the mark, unless the first that the stream, unread
        behind the mark, tells of its name is that it came; what the stream tells to have gone
        first was there too. Level by level: children come after their directory.
        """
        if self.marker is None or not self.dirs.fresh or self.intake.bytes > BEHIND:
            return
        keys, self.dirs.fresh = self.dirs.fresh, []
        if self._astray:  # the others were found since, or are gone
            self._astray = {key: self._astray[key] for key in keys if key in self._astray}
        while keys:
            ats = [(self.tree.find(key), key) for key in dict.fromkeys(keys)]
            keys = [k for at, k in ats if at >= 0 and self._wants_mark(at)]
            if not keys:
                return
            found, failed = self.marker.mark(keys, True)
            for key, code in failed:
                if code in (errno.EAGAIN, errno.ESTALE):
                    self._astray[key] = tries = self._astray.get(key, 0) + 1
                    if tries < _ASTRAY:
                        self.dirs.fresh.append(key)
                    else:  # gone most likely, with no word of it: a rename put another in its place
                        del self._astray[key]
                        self._unread[key] = 1
            self.intake.sync()
            self._murky_until = self.intake.last
            keys = self._tell_inside(rows, set(keys), found)

    def _wants_mark(self, at: int) -> bool:
        return not self.tree.info(at)[2] & flags.ZOMBIE and self.dirs.inside(at)

    def _tell_inside(
        self, rows: list[Any], keys: set[bytes], found: Sequence[tuple[bytes, bytes, bytes, bool]]
    ) -> list[bytes]:
        # The directories among what was told.
        first: dict[tuple[bytes, bytes], Record | None] = {}  # None: it came
        for record in self.intake.inside(keys):
            mask, _, _, directory, name, directory2, name2, _, _ = record
            if directory is not None and name is not None:
                came = bool(mask & CREATE) and not mask & RENAME
                first.setdefault((directory, name), None if came else record)
            if directory2 is not None and name2 is not None:
                first.setdefault((directory2, name2), None)
        there: list[tuple[bytes, bytes, bytes, bool]] = []
        for each in found:
            key, parent, name, is_dir = each
            if (parent, name) not in first:
                there.append(each)
                continue
            left = first.pop((parent, name))
            if left is not None:
                there.append((left[7] or key, parent, name, bool(left[0] & ONDIR)))
        for (directory, name), left in first.items():
            if left is not None and directory in keys:
                there.append((left[7] or b"", directory, name, bool(left[0] & ONDIR)))
        more: list[bytes] = []
        now = time.time()
        for key, parent, name, is_dir in there:
            place = self.teller.where(parent, name)
            if place is None or not place[0]:
                continue
            mask = CREATE | (ONDIR if is_dir else 0)
            record = mask, 0, now, parent, name, None, None, key or None, None
            self.teller.tell(rows, record, mask, place[1], None, "current")
            if is_dir and key:
                at = self.tree.find(key)
                if at >= 0 and self.tree.info(at)[0] >= 0:
                    count = sum(1 for r in self.intake.names({key}) if r[0] & RENAME and not r[5])
                    if count:
                        self.dirs.ahead[key] = count
                self.dirs.put(key, self.tree.find(parent), name, flags.SCANNED)
                more.append(key)
        return more

    def _tell_refused(self, rows: list[Any]) -> None:
        if self.marker is None or not self._opened or not self.marker.refused:
            return
        refused, self.marker.refused = self.marker.refused, []
        for key, code in refused:
            at = self.tree.find(key)
            if at < 0 or key in self._silent or not self.dirs.inside(at):
                continue
            self._silent.add(key)
            path = os.fsdecode(self.tree.resolve(at)[1]) or "/"
            common = None, True, 0, None, time.time(), "current", None, False, None, False
            self.teller.say(rows, ("lost",), path, *common, (path,), None, describe(code))

    def _scan_more(self, rows: list[Any]) -> None:
        # What there is to scan; called whenever no window is open.
        if self._unread and time.monotonic() >= self._retry_at:
            self._retry_at = time.monotonic() + 1
            self._retried, self._unread = self._unread, {}
            self._give(list(self._retried))
        room = _SCAN_AHEAD - self.scanner.busy
        repair = self.repair
        if self.dirs.entered:
            repair.enter(self.dirs.entered)
            self.dirs.entered.clear()
        if self.dirs.onto:
            repair.moved(self.dirs.onto)
            self.dirs.onto.clear()
        waits = repair.unsettled or self.intake.gap or self.intake.bytes > BEHIND
        if room > 0 and not waits:
            keys = self.dirs.scan_keys(room)
            self._give(keys)
            self._give(repair.keys(room - len(keys)))
        self._tell_refused(rows)
        if not (self.dirs.unscanned or self.scanner.busy or self._unread) and repair.done:
            self.dirs.dead = None
            if self.stale:
                self.stale = False
                self._mark_top(0, flags.CURRENT)
            if repair.active:
                repair.end(rows)
            self.scanned = True
            if self.files is not None:
                self.files.scanned()
        self._quiet = not (
            self.dirs.unscanned
            or self.scanner.busy
            or self._unread
            or repair.active
            or self.dirs.fresh
            or self.verifier.carries
            or self.settler.unlinked_tmp
        )

    def _give(self, keys: list[bytes]) -> None:
        self.repair.given(keys)
        self.scanner.give(keys, self.repair.listing)

    def _mark_top(self, add: int, clear: int) -> None:
        for at in self.tree.ids():
            if self.tree.info(at)[2] & flags.TOP:
                self.tree.flag(at, add, clear)

    def _loss(
        self, rows: list[Any], count: int | None, source: str, noted: dict[bytes, int] | None
    ) -> None:
        """Tell a loss; mend the model where it says what it hit, else scan anew behind the mark."""
        self._say_lost(rows, count, source)
        unsettled = self.verifier.unsettled()
        if noted is not None:
            for key, bits in unsettled.items():
                noted[key] = noted.get(key, 0) | bits
        self.settler.reset()
        self.verifier.reset()
        self.scanned = False
        if self.dirs.dead is None:
            self.dirs.dead = set()
        self.repair.begin()
        if noted is None or not self.repair.mend(rows, noted):
            self.loss_of_all(rows)
            self.repair.unsettled.update(unsettled)

    def _say_lost(self, rows: list[Any], count: int | None, source: str) -> None:
        roots = tuple(root.path for root in self.dirs.roots)
        path = roots[0] if roots else ""
        common = None, True, 0, None, time.time(), "current", None, False, None, False
        more = () if self.files is None else (None, None, False, self.files.baseline)
        self.teller.say(rows, ("lost",), path, *common, roots, count, source, *more)

    def loss_of_all(self, rows: list[Any]) -> None:
        """Nothing of the tree is certain: have it mended, or read anew."""
        if self.files is not None:  # what a consumer believes is in the tree
            if not self.repair.mend_all(rows):
                self.stale = True
                self._mark_top(flags.CURRENT, 0)
            return
        self.scanner.reset()
        self.stale = True
        self._mark_above()
        self._currents.clear()
        self._unread.clear()
        for root in self.dirs.reset():
            self.teller.end_root(rows, root, "current")  # its end was among what was lost
        self.teller.follow_roots(rows)
        self.dirs.dead = set()
        self.repair.forget()
        self._mark_top(flags.CURRENT, 0)

    def _settle(self, stop: int, rows: list[Any]) -> None:
        if stop == STOP_OVERFLOW:
            self._overflow(rows)
        else:
            self.settler.settle(stop, self.decoder.record(), rows)
        self.decoder.advance()
        if self.files is not None:
            self.files.settled()

    def _overflow(self, rows: list[Any]) -> None:
        # What follows in the window was queued after the gap: the tree is of no use for it.
        self._loss(rows, None, "kernel", None)
        if self.repair.put_off:
            self.decoder.finish()  # what follows belongs to the loss
            if self.files is not None:
                self.files.void()
            return
        # What was raised behind the gap may be merged into records before it.
        self.repair.note(self.decoder)
        self._learn([], True, new=True)


def _arrives(record: Record | None) -> bool:
    # The directory's first record is that it was made, or came from where nothing is watched.
    if record is None:
        return False
    return record[3] is None if record[0] & RENAME else record[0] & (CREATE | DELETE) == CREATE
