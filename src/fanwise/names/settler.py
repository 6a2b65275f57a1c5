"""Settler: the records at which the decoder stops, because they need a decision.

Directories that come, go and move; objects that a rename put out of their names; names created and
deleted in one record; O_TMPFILE files; watched names in directories that are not watched; and what
cannot be placed.

REFS: owned by the resolver. LOCKING: none. LIFETIME: that of the resolver; `reset` after a loss.
"""

import contextlib
from collections.abc import Callable
from os import fsdecode
from typing import Any

from fanwise.kernel import contract as flags
from fanwise.kernel.contract import (
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
    STOP_REPLACED,
    STOP_SELF,
    STOP_UNKNOWN,
    Record,
)
from fanwise.kernel.fanotify import FAN_CLOSE_WRITE

from .directories import Directories
from .expand import Expander
from .index import Files
from .intake import Intake
from .lookup import CannotLook
from .teller import Teller

_BOTH = CREATE | DELETE


class Settler:
    """Settles the records that need a decision; `gone` is shared with the decoder."""

    def __init__(
        self,
        teller: Teller,
        directories: Directories,
        decoder: Any,
        intake: Intake,
        gone: dict[bytes, set[bytes]],
        told_both: Callable[[bytes, bytes, bytes, bool], None],
        told_gone: Callable[[bytes, bytes, Record], None],
        told_back: Callable[[bytes, bytes], None],
    ) -> None:
        self._teller = teller
        self.dirs = directories
        self.tree = directories.tree
        self.lookup = directories.lookup
        self.decoder = decoder
        self._intake = intake
        self.told_both, self.told_gone, self.told_back = told_both, told_gone, told_back
        self.expander = Expander(teller, directories, decoder, intake)
        self.files: Files | None = None
        # Names deleted of objects that live on: handle key -> {directory key + name}.
        self.gone = gone
        self._gone_limit = 4096
        # O_TMPFILE files that are open, and the name that each was given.
        self.unlinked_tmp: dict[bytes, tuple[bytes, bytes] | None] = {}
        # Places onto which directories were renamed, in this window and the one before.
        self._onto: set[tuple[int, bytes]] = set()
        self._onto_before: set[tuple[int, bytes]] = set()

    def reset(self) -> None:
        """Forget everything: the tree was dropped."""
        self.gone.clear()
        self.unlinked_tmp.clear()
        self._onto.clear()
        self.expander.reset()

    def begin(self) -> None:
        """Look for the names that O_TMPFILE files are given in a window."""
        if self.unlinked_tmp:
            for record in self.decoder.name_records(self.unlinked_tmp):
                if record[0] & CREATE:
                    self.unlinked_tmp[record[7]] = record[3], record[4]

    def end(self, drained: bool) -> None:
        """End a window."""
        for key in [k for k in self.unlinked_tmp if self.decoder.notes(k)[0] & N_GONE]:
            del self.unlinked_tmp[key]
        self.note_gone(self.decoder.finish())
        if drained:
            self._onto_before, self._onto = self._onto, set()

    def settle(self, stop: int, record: Record, rows: list[Any]) -> None:
        """Decide what one record means, and tell it."""
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

    def _directory(self, record: Record, rows: list[Any]) -> None:
        mask, _, _, directory, name, _, _, target, _ = record
        assert name is not None
        if target is not None and mask & RENAME:
            self._move(record, rows)
            return
        if directory is None or target is None:
            self._unknown(record, rows)
            return
        place = self._teller.where(directory, name)
        if place is None:
            self._unknown(record, rows)
            if mask & DELETE:
                self._remove(target, record, rows, False, lambda out: None)
            return
        inside, path, source = place
        parent = self.tree.find(directory)
        whole = not (mask & DELETE or self.dirs.marks) and self.expander.comes_whole(target)
        if mask & CREATE:
            # Born under the mark: what is made in it is in the stream, nothing is to be scanned.
            at = self.dirs.put(target, parent, name, self.dirs.born)
            self.dirs.want_scan(at)
            # Where each directory has a mark of its own, it gets one when the window ends.
            if self.dirs.marks and self.dirs.born and self.tree.recursive and self.dirs.inside(at):
                self.dirs.fresh.append(target)

        def tell(out: list[Any]) -> None:
            if inside:
                exists = False if mask & _BOTH == _BOTH else None
                self._teller.tell(out, record, mask, path, None, source, exists=exists)

        if mask & DELETE:
            self._remove(target, record, rows, inside, tell)
            return
        tell(rows)
        if mask & CREATE and whole:
            self.expander.created(record, at)

    def _remove(
        self,
        key: bytes,
        record: Record,
        rows: list[Any],
        inside: bool,
        tell: Callable[[list[Any]], None],
    ) -> None:
        def last(out: list[Any]) -> None:
            tell(out)
            self._drop(key, record, out, told=inside)

        def drop(at: int, out: list[Any]) -> None:
            told = self.dirs.inside(at)
            self._drop(self.tree.info(at)[3], record, out, told)

        at = self.tree.find(key)
        if (
            at >= 0
            and not (record[0] & CREATE or self.dirs.marks)
            and self.expander.comes_whole(key)
        ):
            if self.files is not None:
                self.files.catch_up()
            self.expander.deleted(record, at, drop, last)
        else:
            last(rows)

    def _drop(self, key: bytes, record: Record, rows: list[Any], told: bool = False) -> None:
        at = self.tree.find(key)
        if self.dirs.dead is not None:
            self.dirs.dead.add(key)
        if self.files is not None:
            self.files.dropped(key, record[0] & _BOTH == _BOTH)
        if at < 0:
            return
        told = (
            told
            and bool(self._teller.settings.want & DELETE)
            and record[1] not in self._teller.settings.pids
        )
        for root in [r for r in self.dirs.roots if r.key == key]:
            if told and root.file is None:
                self.dirs.roots.remove(root)
            else:
                self._teller.end_root(rows, root, pid=record[1])
        self.tree.drop(at)

    def _move(self, record: Record, rows: list[Any]) -> None:
        _, _, _, directory, name, directory2, name2, target, _ = record
        assert target is not None
        # Either side is None where no mark told of it: it came from outside, or went there.
        old = self._teller.where(directory, name or b"")
        new = self._teller.where(directory2, name2 or b"")
        if target in self.dirs.ahead:
            self._behind(record, rows, old, new)
            return
        held = self._held_elsewhere(target, directory, name) if directory is not None else None
        if held is not None:
            old = self._teller.where(*held)
            self.told_gone(*held, record)
            if self.files is not None:
                self.files.misnamed(record, held)
        if directory2 is not None and name2 is not None:
            self.told_back(directory2, name2)
        if held is not None and old is not None and new is None:
            self._teller.tell(rows, record, DELETE, old[1], None, old[2])
            self._put(target, -1, name2 or b"")
            self._adrift(record)
            return
        if new is None or name2 is None:
            if new is None and directory2 is None:
                self._left_from(record, rows)
            self._unknown(record, rows)
            at = self._put(target, -1, name2 or b"")
            self._adrift(record)
            if directory2 is None:
                self._left(at, record, rows)
            return
        parent = self.tree.find(directory2)
        victim = None
        after = self.decoder.peek()
        if after is not None and after[0] & ONDIR and after[4] == b"." and after[0] & ATTRIB:
            at = self.tree.find(after[3])
            if after[3] != target and at >= 0 and self.tree.info(at)[:2] == (parent, name2):
                victim = after[3]
                if self.files is not None:
                    self.files.displaced(rows, at)
        self._onto.add((parent, name2))
        known = self.tree.find(target) >= 0
        nowhere = known and self._is_nowhere(target)
        at = self._put(target, parent, name2)
        own = any(r.key == target for r in self.dirs.roots)
        if old is not None and old[0] and new[0]:
            source = "current" if "current" in (old[2], new[2]) else "exact"
            self._teller.tell(rows, record, RENAME, new[1], old[1], source, replaced=victim)
        elif new[0]:
            self._teller.tell(rows, record, CREATE, new[1], None, new[2], replaced=victim)
        elif old is not None and old[0] and not own:
            self._teller.tell(rows, record, DELETE, old[1], None, old[2])
        if victim is not None:
            self._drop(victim, record, rows)
        both = old is not None and old[0] and new[0] and bool(self._teller.settings.want & RENAME)
        told = target if both and record[1] not in self._teller.settings.pids else None
        moved = self._teller.follow_roots(rows, record[1], record[2], told)
        self.dirs.moved(at, moved)
        if directory is None and (self.dirs.fresh or self.dirs.murky) and self.dirs.inside(at):
            # It may have come from a directory that is inside and has no mark yet, and be told to
            # have left for there: what it holds is told again.
            self.tree.flag(at, flags.SCANNED, 0)
            self.dirs.fresh.append(target)
        elif known and (directory is None or (nowhere and self.dirs.marks)):
            self.dirs.back(at)
        self.dirs.want_scan(at)
        if new[0] and (old is None or not old[0]):
            self.dirs.entered.append(target)
        self.dirs.note_move(target, directory2 or b"")

    # It left for where no mark was; where each directory has one of its own it has none then.
    def _is_nowhere(self, key: bytes) -> bool:
        above, _, now, _, _ = self.tree.info(self.tree.find(key))
        return above < 0 and not now & flags.TOP

    def _adrift(self, record: Record) -> None:
        # It went into a directory that cannot be placed. That may be one of which only a loss
        # ahead could say where it was; the loss says nothing of what went into it before.
        if record[5] is not None and record[7] is not None and self._intake.gap:
            self.dirs.adrift.add(record[7])

    def _held_elsewhere(
        self, key: bytes, directory: bytes, name: bytes | None
    ) -> tuple[bytes, bytes] | None:
        # The place that the changes told gave a directory, where its rename speaks of another: one
        # that a record gave it which a merge hid. What is believed below it is in that place.
        at = self.tree.find(key)
        if at < 0 or not self.dirs.inside(at):
            return None
        parent, last, now, _, _ = self.tree.info(at)
        if parent < 0 or now & (flags.ZOMBIE | flags.TOP) or not self.dirs.inside(parent):
            return None
        held = self.tree.info(parent)[3], last
        return None if held == (directory, name) else held

    def _put(self, key: bytes, parent: int, name: bytes) -> int:
        # Move a directory; what is believed below one that leaves the roots goes with it.
        at = self.tree.find(key)
        was = self.files is not None and at >= 0 and self.dirs.inside(at)
        at = self.dirs.put(key, parent, name)
        if was and self.files is not None and not self.dirs.inside(at):
            self.files.left(at)
        return at

    def _behind(
        self,
        record: Record,
        rows: list[Any],
        old: tuple[bool, str, str] | None,
        new: tuple[bool, str, str] | None,
    ) -> None:
        # The way to where it was found already, and stands: it is told, and nothing is moved.
        target = record[7]
        assert target is not None
        if record[5] is None:
            self.dirs.ahead[target] -= 1
            if not self.dirs.ahead[target]:
                del self.dirs.ahead[target]
        if old is not None and old[0] and new is not None and new[0]:
            self._teller.tell(rows, record, RENAME, new[1], old[1], "current")
        elif new is not None and new[0]:
            self._teller.tell(rows, record, CREATE, new[1], None, "current")
        elif old is not None and old[0]:
            self._teller.tell(rows, record, DELETE, old[1], None, "current")

    def _left_from(self, record: Record, rows: list[Any]) -> None:
        # Where the changes told have it is not where it left from: an order that merges hid.
        _, _, _, directory, name, _, _, target, _ = record
        at = self.tree.find(target) if target else -1
        if at < 0:
            return
        parent, held, _, _, _ = self.tree.info(at)
        if parent < 0 or (self.tree.info(parent)[3], held) == (directory, name):
            return
        above = self.tree.info(parent)[3]
        place = self._teller.where(above, held)
        if place is not None and place[0]:
            self._teller.tell(rows, record, DELETE, place[1], None, place[2], correction=True)
            self.told_gone(above, held, record)

    def _left(self, at: int, record: Record, rows: list[Any]) -> None:
        # It went to where no mark is. It stays in the tree, outside of every root: its own mark
        # stands, and what that tells of is still understood when it comes back.
        self.dirs.moved(at, self._teller.follow_roots(rows, record[1], record[2]))

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
            if self.files is not None:
                self.files.vanished(rows, at)
            self._drop(directory, record, rows)
        if bits and scope & flags.IN:
            source = "current" if scope & flags.IN_CURRENT else "exact"
            self._teller.tell(
                rows, record, bits, fsdecode(path) or "/", None, source, key=directory
            )

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
        self._intake.sync()
        return not any(record[0] & DELETE for record in self._intake.names({directory}))

    def _rename_file(self, record: Record, rows: list[Any], replaced: bytes | None) -> None:
        _, _, _, directory, name, directory2, name2, target, _ = record
        assert name is not None
        assert directory2 is not None
        assert name2 is not None
        if replaced is not None and not self.decoder.notes(replaced)[0] & N_GONE:
            self.gone.setdefault(replaced, set()).add(directory2 + name2)
        self._name_back(target, directory2, name2)
        old, new = self._teller.where(directory, name), self._teller.where(directory2, name2)
        if new is not None and new[0]:
            if old is not None and old[0]:
                source = "current" if "current" in (old[2], new[2]) else "exact"
                self._teller.tell(rows, record, RENAME, new[1], old[1], source, replaced=replaced)
            else:
                self._teller.tell(rows, record, CREATE, new[1], None, new[2], replaced=replaced)
        elif old is not None and old[0]:
            self._teller.tell(rows, record, DELETE, old[1], None, old[2])

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
        place = self._teller.where(directory, name or b"")
        if place is None or not place[0] or directory is None or name is None or target is None:
            return
        try:
            exists: bool | None = self.lookup.key_of(directory, name) == target
        except CannotLook:
            exists = None
        self.told_both(target, directory, name, bool(exists))
        if self.files is not None:
            self.files.both(target, directory, name, bool(exists))
        if exists is False:
            self.gone.setdefault(target, set()).add(directory + name)
        self._teller.tell(rows, record, mask, place[1], None, place[2], exists=exists)

    def _hash(self, record: Record, rows: list[Any]) -> None:
        # "#123" is what the kernel calls an O_TMPFILE file, and may be a real name as well.
        mask, _, _, directory, name, _, _, target, _ = record
        place = self._teller.where(directory, name or b"")
        if place is None or directory is None or name is None or target is None:
            return
        if target not in self.unlinked_tmp:
            try:
                real = self.lookup.key_of(directory, name) == target
            except CannotLook:
                real = True  # better a name too many than a change too few
            if real or self._named(target):
                self._teller.tell(rows, record, mask, place[1], None, place[2])
                return
            link = None
            for other in self.decoder.name_records({target}):
                if other[0] & CREATE:
                    link = other[3], other[4]
            self.unlinked_tmp[target] = link
        link = self.unlinked_tmp[target]
        linked = self._teller.where(*link) if link is not None else None
        if linked is not None and linked[0]:
            self._teller.tell(rows, record, mask, linked[1], None, linked[2])
        if mask & FAN_CLOSE_WRITE:  # only what is open is remembered
            del self.unlinked_tmp[target]

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
        place = self._teller.where(directory, name or b"")
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
            self._teller.tell(rows, record, mask, place[1], None, place[2], unlinked=unlinked)

    def _unknown(self, record: Record, rows: list[Any]) -> None:
        mask, _, _, directory, name, directory2, name2, target, _ = record
        old, new = (
            self._teller.where(directory, name or b""),
            self._teller.where(directory2, name2 or b""),
        )
        if mask & RENAME:
            if target is not None and mask & ONDIR:
                at = self.tree.find(target)
                if at >= 0 and new is not None and directory2 is not None and name2 is not None:
                    self.tree.move(at, self.tree.find(directory2), name2)
            if new is not None and new[0]:
                self._teller.tell(rows, record, CREATE, new[1], None, new[2])
                return
            if old is not None:
                if old[0]:
                    self._teller.tell(rows, record, DELETE, old[1], None, old[2])
                return
        # Only the last name is known; it stands without a slash.
        bits = mask & ~ATTRIB if name is None else mask
        last = name2 or name or b""
        self._teller.tell(
            rows, record, bits, fsdecode(last if last != b"." else b""), None, "unknown"
        )

    def note_gone(self, left: list[tuple[bytes, bytes, bytes]]) -> None:
        """Note names deleted of objects that live on."""
        if self.dirs.marks:
            # Nothing tells when an object ends: the oldest are forgotten, many at a time.
            left = left[-self._gone_limit :]
        for key, directory, name in left:
            self.gone.setdefault(key, set()).add(directory + name)
        if self.dirs.marks:
            if len(self.gone) > 2 * self._gone_limit:
                for key in list(self.gone)[: -self._gone_limit]:
                    del self.gone[key]
            return
        if len(self.gone) > self._gone_limit:
            # Other hard links keep an object without any file being open: those are forgotten.
            with contextlib.suppress(CannotLook):
                for key in list(self.gone):
                    if self.lookup.links(key) != 0:
                        del self.gone[key]
            self._gone_limit = max(4096, 2 * len(self.gone))
