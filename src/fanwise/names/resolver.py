"""Resolver: chunks of records in, changes with paths out, one window at a time.

A window is what was read until the kernel's queue was seen empty; only within one can the kernel
merge a later event into an earlier record. The decoder makes the common changes itself and stops at
records that need a decision; those are settled here. Before a window is decoded every directory
it names is placed (directories.py); after it, what its merges left open is verified (verify.py).

REFS: owned by one group of a watch. LOCKING: none, one consumer. LIFETIME: until the group closes.
"""

import contextlib
import errno
import time
from collections.abc import Callable, Sequence
from os import fsdecode
from typing import Any, NamedTuple

from fanwise._errors import NoSuchRoot, PermissionNeeded
from fanwise.kernel import _pure_tree as flags
from fanwise.kernel._pure_decode import (
    ATTRIB,
    CREATE,
    DELETE,
    DELETE_SELF,
    N_DELETE,
    N_GONE,
    NAMED,
    ONDIR,
    RENAME,
    STOP_BOTH,
    STOP_DIR,
    STOP_FILES,
    STOP_HASH,
    STOP_NAMELESS,
    STOP_OVERFLOW,
    STOP_REPLACED,
    STOP_SELF,
    STOP_UNKNOWN,
    Record,
    kind_index,
)
from fanwise.kernel.fanotify import FAN_CLOSE_WRITE
from fanwise.kernel.handles import identity
from fanwise.kernel.mounts import Mount
from fanwise.kernel.native import Parts

from .directories import Directories, Root
from .intake import Intake
from .lookup import CannotLook
from .scan import Scanner
from .verify import Verifier

WINDOW = 65_536  # records, after which a window ends without an empty queue
_SCAN_AHEAD = 1024  # directories handed to the scan at a time
_BOTH = CREATE | DELETE


class Settings(NamedTuple):
    """What a watch wants told."""

    make: Callable[..., Any]  # builds a change; see Change
    kinds: list[tuple[str, ...]]  # 512 tuples of kinds by kind_index
    want: int  # mask bits to tell
    pids: tuple[int, ...]  # processes to ignore


class Resolver:
    """Turns what one kernel group read into changes."""

    def __init__(
        self,
        parts: Parts,
        directories: Directories,
        scanner: Scanner,
        take: Callable[[], tuple[bytes, int, bool, int] | None],
        sync: Callable[[], bool],
        settings: Settings,
    ) -> None:
        self.dirs = directories
        self.lookup = directories.lookup
        self.tree = directories.tree
        self.scanner = scanner
        self.settings = settings
        self._dev = directories.mount.dev
        # Names deleted of objects that live on: handle key -> {directory key + name}.
        self.gone: dict[bytes, set[bytes]] = {}
        self._gone_limit = 4096
        device = f"{self._dev[0]}:{self._dev[1]}"
        make, kinds, want, pids = settings
        # A rename may lead out of an excluded name or into one, which _filter tells otherwise.
        self._want = want | (RENAME if directories.globs else 0)
        self.decoder = parts.Decoder(self.tree, make, kinds, self._want, device, pids, self.gone)
        ahead = parts.Decoder(self.tree, make, kinds, want, device, pids, {})
        self.intake = Intake(take, sync, ahead)
        self.verifier = Verifier(self)
        self._open = False
        self._quiet = False  # no scan, nothing carried over: a window can be taken at once
        self._drained = True
        self._currents: list[int] = []
        self._unlinked_tmp: dict[bytes, tuple[bytes, bytes] | None] = {}
        self.scanned = False
        self.stale = False  # a loss was told and the tree is not whole again
        # Directories that could not be scanned, and how often: those that wait, those tried again.
        self._unread: dict[bytes, int] = {}
        self._retried: dict[bytes, int] = {}
        self._retry_at = 0.0
        # Places onto which directories were renamed, in this window and the one before.
        self._onto: set[tuple[int, bytes]] = set()
        self._onto_before: set[tuple[int, bytes]] = set()
        self._final: list[Any] = []  # changes of this slice that no glob hides

    # -- intake --

    def start(self) -> None:
        """Find the roots and begin the scan. Call it when the mark is set."""
        with self.lookup:
            for root in self.dirs.roots:
                try:
                    self.lookup.links(root.key)
                except PermissionNeeded as error:  # now, and not at the first change
                    raise PermissionNeeded(root.path, error.reason, error.remedy) from error
            for root in self.dirs.reset():
                raise NoSuchRoot(root.path, "it was removed while the watch began")
        self.dirs.dead = set()
        self._scan_more()

    # -- slices --

    def step(self, limit: int) -> list[Any]:
        """The next slice of changes; [] when there is nothing to do now."""
        rows: list[Any] = []
        stop = 0
        with self.lookup:
            if self._quiet and not self._open:
                # Most windows by far need nothing but decoding; one call does it.
                chunk = self.intake.pop()
                if chunk is None:
                    return rows
                if chunk.lost or not chunk.drained or not chunk.data:
                    self.intake.unpop(chunk)
                else:
                    plain = self.decoder.plain(chunk.data, chunk.when / 1e9, limit)
                    if plain is None:
                        self._open = self._drained = True
                        self._look((), True)
                    else:
                        rows, stop, left = plain
                        if left is not None:
                            if left:
                                self._note_gone(left)
                            return self._filter(rows)
                        self._open = self._drained = True
                        if not stop:
                            return self._filter(rows)
                        self._settle(stop, self.decoder.record(), rows)
                        self.decoder.advance()
            if not self._open:
                if not self._begin(rows):
                    self._scan_more()
                    return self._filter(rows)
                self._open = True
            while len(rows) < limit:
                made, stop = self.decoder.decode(limit - len(rows))
                rows += made
                if stop:
                    self._settle(stop, self.decoder.record(), rows)
                    self.decoder.advance()
                elif not self.decoder.pending:
                    self._end(rows)
                    break
                else:
                    break
            return self._filter(rows)

    def remount(self, mount: Mount, rows: list[Any]) -> None:
        """Follow the mount to another mount point."""
        self.dirs.mount = self.lookup.mount = mount
        for at in self.tree.ids():
            if self.tree.info(at)[2] & flags.TOP:
                self.tree.move(at, -1, mount.mount_point)
        self._follow_roots(rows)

    def tell_roots(self, rows: list[Any], kind: str) -> None:
        """Tell something of every root: what became of its mount."""
        for root in self.dirs.roots:
            rows.append(
                self.settings.make(
                    (kind,), root.path, None, root.file is None, 0, None, time.time(), "exact"
                )
            )

    @property
    def pending(self) -> bool:
        """Whether step() has more to do without anything new."""
        return self._open or bool(self.intake)

    def _begin(self, rows: list[Any]) -> bool:
        found = self.scanner.take()
        complete = self.intake.sync() if found else True
        records = 0
        drained = False
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
                    drained = True
                    break
                count = chunk.lost if chunk.source == "ring" else None
                self._loss(rows, count, chunk.source)
                if chunk.data:
                    chunk.lost = 0
                    self.intake.unpop(chunk)
                return False
            if chunk.data:
                records += self.decoder.add(chunk.data, chunk.when / 1e9)
            drained = chunk.drained
            if drained and records:
                break
        self._drained = drained
        if records:
            self._look(found, complete)
        else:
            self._learn(found, complete, new=False)
        return records > 0

    def _look(self, found: Sequence[Any], complete: bool) -> None:
        # Everything that a window needs before it is decoded.
        self._learn(found, complete, new=True)
        if self._unlinked_tmp:
            for record in self.decoder.name_records(self._unlinked_tmp):
                if record[0] & CREATE:
                    self._unlinked_tmp[record[7]] = record[3], record[4]
        self.verifier.begin()

    def _note_gone(self, left: list[tuple[bytes, bytes, bytes]]) -> None:
        # Names deleted of objects that live on.
        for key, directory, name in left:
            self.gone.setdefault(key, set()).add(directory + name)
        if len(self.gone) > self._gone_limit:
            # Other hard links keep an object without any file being open: those are forgotten.
            with contextlib.suppress(CannotLook):
                for key in list(self.gone):
                    if self.lookup.links(key) != 0:
                        del self.gone[key]
            self._gone_limit = max(4096, 2 * len(self.gone))

    def _end(self, rows: list[Any]) -> None:
        self.verifier.end(rows, self._drained)
        for key in [k for k in self._unlinked_tmp if self.decoder.notes(k)[0] & N_GONE]:
            del self._unlinked_tmp[key]
        self._note_gone(self.decoder.finish())
        for at in self._currents:
            self.tree.flag(at, 0, flags.CURRENT)
        self._currents.clear()
        if self._drained:
            self.tree.sweep()
            self._onto_before, self._onto = self._onto, set()
        self._open = False
        self._scan_more()

    def mark_current(self, at: int) -> None:
        """Say that paths below a directory are not exact until the window ends."""
        if at not in self._currents:
            self.tree.flag(at, flags.CURRENT, 0)
            self._currents.append(at)

    # -- learning --

    def firsts(self) -> dict[bytes, Record]:
        """For each directory the first record, from here on, that names it as an object."""
        out: dict[bytes, Record] = {}
        for record in (*self.decoder.dir_records(), *self.intake.directories()):
            if record[7] is not None:
                out.setdefault(record[7], record)
        return out

    def _learn(self, found: Sequence[Any], complete: bool, new: bool) -> None:
        dirs = self.dirs
        unknown = self.decoder.unknown() if new else []
        if not found and not unknown:
            return
        scanned: list[tuple[bytes, int]] = []
        for children, failed in found:
            for key, code in failed:
                if code not in (errno.ENOENT, errno.ESTALE, errno.ENOTDIR):
                    tries = self._retried.get(key, 0) + 1
                    if tries < 4:  # what cannot be read at all is learnt by its changes
                        self._unread[key] = tries
            for key, parent, name, leaf in children:
                at = self.tree.find(key)
                if at >= 0:
                    self._join(at, parent, name)
                elif not (dirs.dead and key in dirs.dead):
                    dirs.observed[key] = parent, name
                    # What appears in a leaf from now on is in the stream.
                    scanned.append((key, flags.SCANNED if leaf else 0))
        firsts = self.firsts()
        asked: set[bytes] = set()
        for _ in range(64):  # each round goes one unknown directory up, or learns from the stream
            missing = dirs.missing([*unknown, *(key for key, _ in scanned)], firsts) - asked
            if not missing:
                break
            asked |= missing
            complete = dirs.look(missing) and complete
            complete = self.intake.sync() and complete
            firsts = self.firsts()
        for key, extra in scanned:
            dirs.place(key, firsts, extra)
        for key in unknown:
            at = dirs.place(key, firsts)
            if at >= 0 and asked and not complete:
                self.mark_current(at)
        dirs.placed()

    def _join(self, at: int, parent: bytes, name: bytes) -> None:
        # The scan found a directory that is known. It may have been outside of what the mount
        # shows, with no way up, and have come in with a directory above it.
        above, _, now, key, _ = self.tree.info(at)
        if above < 0 and not now & flags.TOP and self.tree.find(parent) >= 0:
            self.dirs.put(key, self.tree.find(parent), name)
        self.dirs.want_scan(at)

    def _scan_more(self) -> None:
        # What there is to scan; called whenever no window is open.
        if self._unread and time.monotonic() >= self._retry_at:
            self._retry_at = time.monotonic() + 1
            self._retried, self._unread = self._unread, {}
            self.scanner.give(list(self._retried))
        room = _SCAN_AHEAD - self.scanner.busy
        if self.dirs.unscanned and room > 0:
            self.scanner.give(self.dirs.scan_keys(room))
        if not (self.dirs.unscanned or self.scanner.busy or self._unread):
            self.dirs.dead = None
            if self.stale:
                self.stale = False
                self._mark_top(0, flags.CURRENT)
            self.scanned = True
        self._quiet = not (
            self.dirs.unscanned
            or self.scanner.busy
            or self._unread
            or self.verifier.carries
            or self._unlinked_tmp
        )

    def _say(self, rows: list[Any], *fields: Any) -> None:
        # Told whatever is asked for or excluded: of the watch and its roots.
        row = self.settings.make(*fields)
        rows.append(row)
        if self.dirs.globs:
            self._final.append(row)

    def _end_root(self, rows: list[Any], root: Root, source: str = "exact", pid: int = 0) -> None:
        # A final change, so that no stream ends without a word.
        self.dirs.roots.remove(root)
        who = identity(self._dev, root.key) if root.file is None else None
        is_dir = root.file is None
        self._say(rows, ("deleted",), root.path, None, is_dir, pid, who, time.time(), source)

    def _mark_top(self, add: int, clear: int) -> None:
        for at in self.tree.ids():
            if self.tree.info(at)[2] & flags.TOP:
                self.tree.flag(at, add, clear)

    def _loss(self, rows: list[Any], count: int | None, source: str) -> None:
        """Tell a loss, drop the model, and scan anew behind the mark."""
        roots = tuple(root.path for root in self.dirs.roots)
        path = roots[0] if roots else ""
        common = None, True, 0, None, time.time(), "current", None, False, None, False
        self._say(rows, ("lost",), path, *common, roots, count, source)
        self.scanner.reset()
        self.gone.clear()
        self._unlinked_tmp.clear()
        self.verifier.reset()
        self.scanned = False
        self.stale = True
        self._currents.clear()
        self._unread.clear()
        self._onto.clear()
        for root in self.dirs.reset():
            self._end_root(rows, root, "current")  # its end was among what was lost
        self._follow_roots(rows)
        self.dirs.dead = set()
        self._mark_top(flags.CURRENT, 0)

    # -- records that need a decision --

    def _settle(self, stop: int, record: Record, rows: list[Any]) -> None:
        if stop == STOP_DIR:
            self._directory(record, rows)
        elif stop == STOP_SELF:
            self._itself(record, rows)
        elif stop == STOP_REPLACED:
            self._replaced(record, rows)
        elif stop == STOP_BOTH:
            self._both(record, rows)
        elif stop == STOP_HASH:
            self._hash(record, rows)
        elif stop == STOP_FILES:
            self._files(record, rows)
        elif stop in (STOP_UNKNOWN, STOP_NAMELESS):
            self._unknown(record, rows)
        elif stop == STOP_OVERFLOW:
            self._overflow(rows)

    def _overflow(self, rows: list[Any]) -> None:
        # What follows in the window was queued after the gap: the tree is of no use for it.
        self._loss(rows, None, "kernel")
        self._learn([], True, new=True)

    def tell(
        self,
        rows: list[Any],
        record: Record,
        bits: int,
        path: str,
        old: str | None,
        source: str,
        *,
        key: bytes | None = None,
        replaced: bytes | None = None,
        unlinked: bool = False,
        exists: bool | None = None,
        correction: bool = False,
    ) -> None:
        """Append one change, unless its kinds or its process are not wanted."""
        mask, pid, when = record[:3]
        bits &= self._want
        if not bits or pid in self.settings.pids:
            return
        if bits & _BOTH != _BOTH:
            exists = None
        key = key or record[7]
        rows.append(
            self.settings.make(
                self.settings.kinds[kind_index(bits)],
                path,
                old,
                bool(mask & ONDIR),
                pid,
                identity(self._dev, key) if key else None,
                when,
                source,
                identity(self._dev, replaced) if replaced else None,
                unlinked,
                exists,
                correction,
            )
        )

    def where(self, directory: bytes | None, name: bytes) -> tuple[bool, str, str] | None:
        """(inside, path, source) of a name in a directory; None when the directory is unknown."""
        at = self.tree.find(directory) if directory else -1
        if at < 0:
            return None
        scope, path = self.tree.resolve(at)
        inside = bool(scope & flags.IN)
        if scope & flags.IN_FILES:
            inside = any(r.key == directory and r.file == name for r in self.dirs.roots)
        text = fsdecode(path + b"/" + name)
        return inside, text, "current" if scope & flags.IN_CURRENT else "exact"

    def _directory(self, record: Record, rows: list[Any]) -> None:
        mask, _, _, directory, name, directory2, name2, target, _ = record
        assert name is not None
        if directory is None or target is None:
            self._unknown(record, rows)
            return
        if mask & RENAME:
            assert directory2 is not None
            assert name2 is not None
            self._move(record, rows)
            return
        place = self.where(directory, name)
        if place is None:
            self._unknown(record, rows)
            if mask & DELETE:
                self._drop(target, record, rows)
            return
        inside, path, source = place
        parent = self.tree.find(directory)
        if mask & CREATE:
            # Born under the mark: what is made in it is in the stream, nothing is to be scanned.
            self.dirs.put(target, parent, name, flags.SCANNED)
        if inside:
            exists = False if mask & _BOTH == _BOTH else None
            self.tell(rows, record, mask, path, None, source, exists=exists)
        if mask & DELETE:
            self._drop(target, record, rows, told=inside)

    def _drop(self, key: bytes, record: Record, rows: list[Any], told: bool = False) -> None:
        at = self.tree.find(key)
        if self.dirs.dead is not None:
            self.dirs.dead.add(key)
        if at < 0:
            return
        told = told and bool(self.settings.want & DELETE) and record[1] not in self.settings.pids
        for root in [r for r in self.dirs.roots if r.key == key]:
            if told and root.file is None:
                self.dirs.roots.remove(root)
            else:
                self._end_root(rows, root, pid=record[1])
        self.tree.drop(at)

    def _move(self, record: Record, rows: list[Any]) -> None:
        _, _, _, directory, name, directory2, name2, target, _ = record
        assert directory is not None
        assert directory2 is not None
        assert name is not None
        assert name2 is not None
        assert target is not None
        old, new = self.where(directory, name), self.where(directory2, name2)
        if new is None:
            self._unknown(record, rows)
            self.dirs.put(target, -1, name2)
            return
        parent = self.tree.find(directory2)
        victim = None
        after = self.decoder.peek()
        if after is not None and after[0] & ONDIR and after[4] == b"." and after[0] & ATTRIB:
            at = self.tree.find(after[3])
            if after[3] != target and at >= 0 and self.tree.info(at)[:2] == (parent, name2):
                victim = after[3]
        self._onto.add((parent, name2))
        at = self.dirs.put(target, parent, name2)
        own = any(r.key == target for r in self.dirs.roots)
        if old is not None and old[0] and new[0]:
            source = "current" if "current" in (old[2], new[2]) else "exact"
            self.tell(rows, record, RENAME, new[1], old[1], source, replaced=victim)
        elif new[0]:
            self.tell(rows, record, CREATE, new[1], None, new[2], replaced=victim)
        elif old is not None and old[0] and not own:
            self.tell(rows, record, DELETE, old[1], None, old[2])
        if victim is not None:
            self._drop(victim, record, rows)
        both = old is not None and old[0] and new[0] and bool(self.settings.want & RENAME)
        told = target if both and record[1] not in self.settings.pids else None
        moved = self._follow_roots(rows, record[1], record[2], told)
        self.dirs.moved(at, moved)
        self.dirs.want_scan(at)

    def _follow_roots(
        self, rows: list[Any], pid: int = 0, when: float = 0.0, told: bytes | None = None
    ) -> bool:
        # Roots whose paths changed, or that left what the mount shows; whether there were any.
        # ``told`` is the key of the one that was told already.
        moved = False
        for root in list(self.dirs.roots):
            at = self.tree.find(root.key)
            if at < 0:
                continue
            _, path = self.tree.resolve(at)
            if not path and not self.tree.info(at)[2] & flags.TOP:
                self._end_root(rows, root, pid=pid)
                continue
            text = fsdecode(path) or "/"
            if root.file is not None:
                text = text.rstrip("/") + "/" + fsdecode(root.file)
            if text == root.path:
                continue
            moved = True
            if root.key != told or root.file is not None:
                who = identity(self._dev, root.key) if root.file is None else None
                is_dir, at_time = root.file is None, when or time.time()
                self._say(rows, ("renamed",), text, root.path, is_dir, pid, who, at_time, "exact")
            root.path = text
        return moved

    def _itself(self, record: Record, rows: list[Any]) -> None:
        mask, _, _, directory, _, _, _, _, _ = record
        at = self.tree.find(directory) if directory else -1
        if at < 0 or directory is None:
            return
        scope, path = self.tree.resolve(at)
        bits = mask & ~(DELETE_SELF | ONDIR)
        gone = bool(mask & DELETE_SELF)
        if mask & (ATTRIB | DELETE_SELF) and self._displaced(directory, at, gone):
            # A rename put another directory in its place: only its link count changed.
            bits &= ~ATTRIB
            self._drop(directory, record, rows)
        if bits and scope & flags.IN:
            source = "current" if scope & flags.IN_CURRENT else "exact"
            self.tell(rows, record, bits, fsdecode(path) or "/", None, source, key=directory)

    def _displaced(self, directory: bytes, at: int, gone: bool) -> bool:
        # Gone, and no DELETE names it, here or in what is still unread.
        place = self.tree.info(at)[:2]
        if not gone and place not in self._onto and place not in self._onto_before:
            return False
        if self.decoder.notes(directory)[0] & N_DELETE:
            return False
        try:
            if self.lookup.links(directory) > 0:
                return False
        except CannotLook:
            return False
        self.intake.sync()
        return not any(record[0] & DELETE for record in self.intake.names({directory}))

    def _rename_file(self, record: Record, rows: list[Any], replaced: bytes | None) -> None:
        _, _, _, directory, name, directory2, name2, target, _ = record
        assert name is not None
        assert directory2 is not None
        assert name2 is not None
        if replaced is not None and not self.decoder.notes(replaced)[0] & N_GONE:
            self.gone.setdefault(replaced, set()).add(directory2 + name2)
        self._name_back(target, directory2, name2)
        old, new = self.where(directory, name), self.where(directory2, name2)
        if new is not None and new[0]:
            if old is not None and old[0]:
                source = "current" if "current" in (old[2], new[2]) else "exact"
                self.tell(rows, record, RENAME, new[1], old[1], source, replaced=replaced)
            else:
                self.tell(rows, record, CREATE, new[1], None, new[2], replaced=replaced)
        elif old is not None and old[0]:
            self.tell(rows, record, DELETE, old[1], None, old[2])

    def _name_back(self, key: bytes | None, directory: bytes, name: bytes) -> None:
        # The name leads to the object again: what is done through it is not "unlinked".
        names = self.gone.get(key or b"")
        if names is not None:
            names.discard(directory + name)
            if not names and key is not None:
                del self.gone[key]

    def _replaced(self, record: Record, rows: list[Any]) -> None:
        self._rename_file(record, rows, self._sure_victim(record))

    def _sure_victim(self, record: Record) -> bytes | None:
        # The candidate's link count fell right after the rename. It is the victim unless this
        # window tells of another reason: its name was deleted, or it was last at another name.
        victim = record[8]
        if victim is None or self.decoder.notes(victim)[0] & N_DELETE:
            return None
        names = self.decoder.name_records({victim})
        if names:
            last = names[-1]
            at = last[5:7] if last[0] & RENAME else last[3:5]
            if at != record[5:7]:
                return None
        return victim

    def _both(self, record: Record, rows: list[Any]) -> None:
        # Created and deleted in one record, in an order that only the disk knows.
        mask, _, _, directory, name, _, _, target, _ = record
        place = self.where(directory, name or b"")
        if place is None or not place[0] or directory is None or name is None or target is None:
            return
        try:
            exists: bool | None = self.lookup.key_of(directory, name) == target
        except CannotLook:
            exists = None
        self.verifier.told_both(target, directory, name, bool(exists))
        if exists is False:
            self.gone.setdefault(target, set()).add(directory + name)
        self.tell(rows, record, mask, place[1], None, place[2], exists=exists)

    def _hash(self, record: Record, rows: list[Any]) -> None:
        # "#123" is what the kernel calls an O_TMPFILE file, and may be a real name as well.
        mask, _, _, directory, name, _, _, target, _ = record
        place = self.where(directory, name or b"")
        if place is None or directory is None or name is None or target is None:
            return
        if target not in self._unlinked_tmp:
            try:
                real = self.lookup.key_of(directory, name) == target
            except CannotLook:
                real = True  # better a name too many than a change too few
            if real or self._named(target):
                self.tell(rows, record, mask, place[1], None, place[2])
                return
            link = None
            for other in self.decoder.name_records({target}):
                if other[0] & CREATE:
                    link = other[3], other[4]
            self._unlinked_tmp[target] = link
        link = self._unlinked_tmp[target]
        linked = self.where(*link) if link is not None else None
        if linked is not None and linked[0]:
            self.tell(rows, record, mask, linked[1], None, linked[2])
        if mask & FAN_CLOSE_WRITE:  # only what is open is remembered
            del self._unlinked_tmp[target]

    def _named(self, target: bytes) -> bool:
        # Deleted or renamed since, but named "#123" in this window: a real file then.
        return any(
            (r[6] if r[0] & RENAME else r[4] or b"").startswith(b"#")
            for r in self.decoder.name_records({target})
        )

    def _files(self, record: Record, rows: list[Any]) -> None:
        # A directory in which only some names are watched.
        mask, _, _, directory, name, _, _, target, _ = record
        if mask & RENAME:
            after = self.decoder.peek()
            victim = None
            if after is not None and after[4] is None and after[0] & ATTRIB:
                victim = self._sure_victim((*record[:8], after[7]))
            self._rename_file(record, rows, victim if victim != target else None)
            return
        place = self.where(directory, name or b"")
        if place is None or not place[0]:
            return
        if mask & _BOTH == _BOTH:
            self._both(record, rows)
        else:
            if mask & DELETE and target and directory and name:
                if not self.decoder.notes(target)[0] & N_GONE:
                    self.gone.setdefault(target, set()).add(directory + name)
            elif mask & CREATE and directory and name:
                self._name_back(target, directory, name)
            unlinked = (
                not mask & NAMED
                and target in self.gone
                and (directory or b"") + (name or b"") in self.gone[target]
            )
            self.tell(rows, record, mask, place[1], None, place[2], unlinked=unlinked)

    def _unknown(self, record: Record, rows: list[Any]) -> None:
        mask, _, _, directory, name, directory2, name2, target, _ = record
        old, new = self.where(directory, name or b""), self.where(directory2, name2 or b"")
        if mask & RENAME:
            if target is not None and mask & ONDIR:
                at = self.tree.find(target)
                if at >= 0 and new is not None and directory2 is not None and name2 is not None:
                    self.tree.move(at, self.tree.find(directory2), name2)
            if new is not None and new[0]:
                self.tell(rows, record, CREATE, new[1], None, new[2])
                return
            if old is not None:
                if old[0]:
                    self.tell(rows, record, DELETE, old[1], None, old[2])
                return
        # Only the last name is known; it stands without a slash.
        bits = mask & ~ATTRIB if name is None else mask
        last = name2 or name or b""
        self.tell(rows, record, bits, fsdecode(last if last != b"." else b""), None, "unknown")

    # -- exclusions of files --

    def _filter(self, rows: list[Any]) -> list[Any]:
        globs = self.dirs.globs
        if not globs or not rows:
            return rows
        final = {id(row) for row in self._final}
        self._final.clear()
        roots = {root.path for root in self.dirs.roots}
        want = self.settings.want
        out = []
        for row in rows:
            path, old_path = row.path, row.old_path
            if id(row) in final:
                out.append(row)
                continue
            new = path not in roots and globs.match(path)
            old = old_path is not None and globs.match(old_path)
            if old_path is None or new == old:
                if not new and ("renamed" not in row.kinds or want & RENAME):
                    out.append(row)
                continue
            # It came out of an excluded name, or went into one.
            bits = DELETE if new else CREATE
            if bits & want:
                out.append(
                    self.settings.make(
                        self.settings.kinds[kind_index(bits)],
                        old_path if new else path,
                        None,
                        row.is_dir,
                        row.pid,
                        row.identity,
                        row.time,
                        row.path_source,
                        None if new else row.replaced,
                    )
                )
        return out
