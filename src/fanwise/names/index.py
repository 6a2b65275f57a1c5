"""Index: every name that a consumer believes in, and what differs after a loss.

The names are in the kernel part's `Index`, by directory handle; where the directories are is in the
tree. Both change with the records, a window at a time. After a loss the directories that it hit are
put where they are now (told as renamed, or deleted with all that is believed below them), so that
the tree is again what the consumer believes; then each is listed, and the difference is told.

A move onto a place that something else holds waits until that moved or went; in a cycle of such
moves one directory is told deleted, and then created with all that is in it.

REFS      owned by the resolver. LOCKING: none, one consumer.
LIFETIME  incomplete (names are learnt, nothing is told of them) -> whole, with the first scan.
"""

import time
from collections.abc import Sequence
from os import fsdecode
from typing import TYPE_CHECKING, Any

from fanwise.kernel import contract as flags
from fanwise.kernel.contract import (
    ATTRIB,
    ATTRIBUTES,
    CREATE,
    CREATED,
    DELETE,
    DELETED,
    MODIFIED,
    MODIFY,
    RENAME,
    REPLACED,
    WAS_DIR,
    Record,
    kind_index,
)
from fanwise.kernel.handles import identity

from .intake import EVERYTHING
from .verify import names_of

if TYPE_CHECKING:
    from .resolver import Resolver

_BOTH = CREATE | DELETE
# A ctime is as of the last tick of the clock: the longest that it is apart.
_TICK_NS = 10_000_000
Name = tuple[bytes, bytes]  # directory key, name


class Files:
    """The index of one group of a watch."""

    def __init__(self, resolver: "Resolver", index: Any) -> None:
        self._r = resolver
        self.index = index
        self._empty_ns = 0  # all that happened before it was told, once what is read is decoded
        self._told_ns = 0  # that, as it was at the first loss that is being repaired
        self.whole = False
        self._news: set[bytes] = set()  # told as created before the first scan ended
        self.unlisted: set[bytes] = set()  # held, but no listing of it was taken
        self._taken = False  # all of the window
        self._ended: dict[int, int] = {}  # how many are gone of those in a directory, and held
        self._misnamed: tuple[Name, Name, bool | None] | None = None
        self._merged: list[bytes] = []  # made and gone in one record
        self._exist: dict[tuple[bytes, Name], bool] = {}
        self._now = 0.0
        self._told = 0

    def __len__(self) -> int:
        return len(self.index)

    def __bool__(self) -> bool:
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        size: int = self.index.nbytes
        return size

    def hold(self, at: int, unlisted: bool) -> None:
        """Hold the names in a directory from now on, if it is watched; see Directories.came."""
        tree = self._r.tree
        if not tree.resolve(at)[0] & (flags.IN | flags.IN_FILES):
            return
        key = tree.info(at)[3]
        if key not in self.index:
            if unlisted:  # else it is born, and no record before this one is about it
                self.catch_up()
                self.unlisted.add(key)
            self.index.hold(key)

    def entered(self, at: int) -> None:
        """Hold a directory that came in, with all that is known below it."""
        for each in self._below(at, self._children()):
            self.hold(each, True)

    def misnamed(self, record: Record, held: Name) -> None:
        """A rename was told from another name than its record has; see `settled`."""
        self.catch_up()
        at = (record[3] or b"", record[4] or b"")
        # What stands under the name in the record is something else, and stays.
        self._misnamed = held, at, self.index.find(*at) if at[1] else None

    def settled(self) -> None:
        """The record that needed a decision is passed."""
        if self._misnamed is None:
            return
        held, at, other = self._misnamed
        self._misnamed = None
        self.catch_up()
        self.index.remove(*held)
        if other is not None and self.index.find(*at) is None:
            self.index.put(*at, other, self._empty_ns)

    def catch_up(self) -> None:
        """Take what is told already of the window, before what is held changes.

        What was told in a directory is taken, and what was not, as it was elsewhere then, is not.
        """
        # What expands tells of one record, which is passed: it is taken when all of it is told.
        if self._r.decoder.records and not self._taken and not self._r.expander.pending:
            self.index.apply(self._r.decoder, self._empty_ns, False)

    # -- live --

    def emptied(self, when: int) -> None:
        """The queue was seen empty after what was read at ``when`` (ns)."""
        self._empty_ns = max(self._empty_ns, when - _TICK_NS)

    def plain(self, data: bytes) -> None:
        """Take a window that needed no decision."""
        self.index.apply(data, self._empty_ns)

    def window(self, rows: list[Any]) -> None:
        """Take the records of the decoder's window, when all of them are decoded."""
        r = self._r
        tree, dirs, index = r.tree, r.dirs, self.index
        index.apply(r.decoder, self._empty_ns)
        self._taken = True
        for record in r.decoder.dir_records():
            at = tree.find(record[7]) if record[7] is not None else -1
            if at >= 0 and not dirs.inside(at):
                self._forget(record[7])
        for key in self._merged:
            # What a loss hides, that stands behind this window, is told here.
            at = tree.find(key)
            if at >= 0 and tree.info(at)[2] & flags.ZOMBIE:
                self.displaced(rows, at)
            self._forget(key)
        self._merged.clear()
        if self._exist:
            self._put_existing()

    def begun(self) -> None:
        """A new window is decoded."""
        self._taken = False

    def void(self) -> None:
        """The decoder's window is dropped, and told no further."""
        self._exist.clear()
        self._merged.clear()
        self._misnamed = None
        self.index.apply(b"")  # a new one begins

    def both(self, key: bytes, directory: bytes, name: bytes, exists: bool) -> None:
        """Note how a creation and deletion in one record was told to have ended."""
        self._exist[key, (directory, name)] = exists

    def _put_existing(self) -> None:
        told, self._exist = self._exist, {}
        wanted = {name for _, name in told}
        there: dict[Name, bool] = {}
        for record in self._r.decoder.name_records(EVERYTHING):
            mask = record[0]
            for i, name in enumerate(names_of(record)):
                if name in wanted:
                    if mask & RENAME:
                        there[name] = i == 1
                    elif mask & _BOTH == _BOTH:
                        there[name] = told.get((record[7] or b"", name), False)
                    else:
                        there[name] = bool(mask & CREATE)
        for (directory, last), now in there.items():
            if now and directory in self.index and self.index.find(directory, last) is None:
                self.index.put(directory, last, False, self._empty_ns)

    def came(self, directory: bytes, name: bytes, is_dir: bool, child: bytes | None) -> None:
        """A name was told that came with a tree (a snapshot)."""
        self.index.put(directory, name, is_dir, self._empty_ns)
        if child is not None:
            self.index.hold(child)

    def dropped(self, key: bytes, merged: bool) -> None:
        """A directory is told to be gone, and all that is believed below it with it.

        ``merged``: in the record of its creation, so that what was in it is yet to be told.
        """
        if merged:
            self._merged.append(key)
            return
        self.catch_up()
        self._forget(key)
        at = self._r.tree.find(key)
        if at < 0:
            return
        if self._r.tree.info(at)[4] > self._ended.get(at, 0) and not self._r.expander.pending:
            children = self._children()
            self._stray(children.get(at, ()), children)
        self._end(at)

    def _end(self, at: int) -> None:
        parent, _, now, _, _ = self._r.tree.info(at)
        if not now & flags.ZOMBIE:
            self._ended[parent] = self._ended.get(parent, 0) + 1

    def swept(self) -> None:
        """The tree has let go of the directories that are gone, but those above others."""
        self._ended.clear()

    def _stray(self, tops: Sequence[int], children: dict[int, list[int]]) -> None:
        # These are told to be gone, and gone or elsewhere: a loss was to say so. What is there
        # is told anew when they are located.
        for top in tops:
            for each in self._below(top, children):
                self._forget(self._r.tree.info(each)[3])
            key = self._r.tree.info(top)[3]
            self._r.dirs.put(key, -1, b"")
            self._r.repair.stray(key)

    def displaced(self, rows: list[Any], at: int) -> None:
        """A rename is about to be told onto a directory: what is believed in it went in a loss."""
        self.catch_up()
        self._now = time.time()
        self._delete_below(rows, at, self._children() if self._r.tree.info(at)[4] else {})

    def vanished(self, rows: list[Any], at: int) -> None:
        """A directory is gone, and another one in its place: what is believed of both is mixed."""
        tree = self._r.tree
        _, _, now, key, kids = tree.info(at)
        if now & flags.ZOMBIE or not self._r.repair.active:
            return  # it was told; or nothing can be believed in it
        self.catch_up()
        if kids <= self._ended.get(at, 0) and not self.index.names(key):
            return
        self._now = time.time()
        self._retell_twins(rows, at, self._children())
        self.displaced(rows, at)

    def left(self, at: int) -> None:
        """A directory left the roots, with all below it."""
        self.catch_up()
        below = self._below(at, self._children()) if self._r.tree.info(at)[4] else [at]
        for each in below:
            self._forget(self._r.tree.info(each)[3])

    def _forget(self, key: bytes) -> None:
        self.index.forget(key)
        self.unlisted.discard(key)

    def corrected(self, old: Name | None, new: Name | None, is_dir: bool) -> None:
        """A correction was told: a name came, went or moved."""
        index = self.index
        moved = old is not None and new is not None and new[0] in index and index.move(*old, *new)
        if moved:
            return
        if old is not None:
            index.remove(*old)
        if new is not None and new[0] in index and index.find(*new) is None:
            index.put(*new, is_dir, self._empty_ns)

    def files_in(self, directory: bytes) -> list[tuple[bytes, bytes | None]]:
        """What `Expander.files_of` asks: the files in a directory, at the record being decoded."""
        return [(name, None) for name, is_dir in self.index.names(directory) if not is_dir]

    # -- a loss --

    def begin(self, active: bool) -> None:
        """A loss is told, while another one is repaired or not."""
        if not active:
            self._told_ns = self._empty_ns

    @property
    def baseline(self) -> str | None:
        """What `lost` says of the first scan."""
        return None if self.whole else "incomplete"

    def rearrange(
        self,
        rows: list[Any],
        places: dict[bytes, Name],
        gone: Sequence[bytes],
        new: Sequence[int],
    ) -> tuple[set[int], set[bytes], bool]:
        """Put directories where they are now, and tell it; those that moved, those to be listed.

        ``new``: those that were put in the tree for it, and are not told yet. False when some are
        nowhere, because each is to be in the other: what merges hid is not of one time.
        """
        r = self._r
        tree = r.tree
        self._now = time.time()
        nowhere: set[int] = set(new)  # not told, or told deleted, to break a cycle
        pending: dict[int, tuple[int, bytes]] = {at: tree.info(at)[:2] for at in new}
        for at in new:
            r.dirs.put(tree.info(at)[3], -1, b"")
        children = self._children()
        at_place: dict[tuple[int, bytes], set[int]] = {}
        for parent, all_here in children.items():
            for each in all_here:
                at_place.setdefault((parent, tree.info(each)[1]), set()).add(each)
        for key, (parent_key, name) in places.items():
            at = tree.find(key)
            goal = (tree.find(parent_key) if parent_key else -1), name
            if at >= 0 and at not in pending and tree.info(at)[:2] != goal:
                pending[at] = goal
        going = {at for at in map(tree.find, gone) if at >= 0}
        moved: set[int] = set()
        due: set[bytes] = set()

        def leave(at: int) -> None:
            at_place.get(tree.info(at)[:2], set()).discard(at)

        def ready(at: int, goal: tuple[int, bytes]) -> bool:
            if self._above(goal[0], at) or any(self._above(goal[0], each) for each in nowhere):
                return False
            others = at_place.get(goal, set()) - {at} if goal[0] >= 0 else set()
            for other in list(others):
                if other in pending:
                    return False
                if other in going:
                    if any(self._above(each, other) for each in pending):
                        return False
                    leave(other)
                    self.gone(rows, other, children)
                    going.discard(other)
                else:  # seen at another time: told anew
                    due.update(self._retell(rows, other, children))
            return True

        while pending:
            progress = False
            for at, goal in list(pending.items()):
                if not ready(at, goal):
                    continue
                progress = True
                here = tree.info(at)[:2]
                for other in at_place.get(here, set()) - {at} if here[0] >= 0 else ():
                    # Of two at one place a consumer believes that they are one.
                    due.update(self._retell(rows, other, children))
                    due.update(self._retell(rows, at, children))
                leave(at)
                del pending[at]
                nowhere.discard(at)
                due.update(self._place(rows, at, goal, children))
                children.setdefault(goal[0], []).append(at)
                at_place.setdefault(goal, set()).add(at)
                moved.add(at)
            if not progress:
                at = next((at for at in pending if at not in nowhere), -1)
                if at < 0:
                    break
                leave(at)
                nowhere.add(at)
                due.update(self._retell(rows, at, children))
                r.dirs.put(tree.info(at)[3], -1, b"")
        for at in going:
            self.gone(rows, at, children)
        return moved, due, not pending

    def _above(self, at: int, top: int) -> bool:
        # Whether a directory is another one, or below it.
        tree = self._r.tree
        for _ in range(len(tree) + 1):
            if at == top:
                return True
            if at < 0:
                return False
            at = tree.info(at)[0]
        return False

    def _place(
        self, rows: list[Any], at: int, goal: tuple[int, bytes], children: dict[int, list[int]]
    ) -> set[bytes]:
        # Move one directory; which are to be listed for it.
        r = self._r
        tree, dirs, index = r.tree, r.dirs, self.index
        parent, name, _, key, _ = tree.info(at)
        old_scope, old_path = tree.resolve(at)
        above = tree.info(parent)[3] if parent >= 0 else b""
        held = above in index
        own = any(root.key == key and root.file is None for root in dirs.roots)
        was = bool(old_scope & flags.IN) and (
            own or not held or index.find(above, name) is not None
        )
        if old_scope & flags.IN and not was:  # not told yet, but something in it was
            self._delete(rows, at, children)
        if goal[0] >= 0:
            self.told_above(rows, goal[0])
            into = tree.info(goal[0])[3]
            if index.find(into, goal[1]) is not None and dirs.inside(goal[0]):
                self._tell(rows, goal[0], goal[1], DELETE, False)
                index.remove(into, goal[1])
        dirs.put(key, *goal)
        if not dirs.inside(at) and was and not own:
            dirs.put(key, parent, name)
            self._retell(rows, at, children)
            dirs.put(key, *goal)
            self.left(at)
            return set()
        if not dirs.inside(at):
            self.left(at)
            return set()
        tree.flag(at, flags.CURRENT, 0)
        if was:
            if held and goal[0] >= 0:
                index.move(above, name, into, goal[1])
            elif held:
                index.remove(above, name)
            if goal[0] >= 0 and dirs.inside(goal[0]) and index.find(into, goal[1]) is None:
                index.put(into, goal[1], True, self._told_ns)
            if not own:
                _, path = tree.resolve(at)
                self._row(rows, RENAME, fsdecode(path), "current", True, fsdecode(old_path), key)
            return set()
        self.told_above(rows, at)
        below = self._below(at, children)
        for each in below:  # what came with it was not watched where it was
            self.hold(each, True)
        return {tree.info(each)[3] for each in below}

    def _retell(self, rows: list[Any], at: int, children: dict[int, list[int]]) -> set[bytes]:
        # Tell a directory deleted that is there: it is told anew when it is listed.
        keys = {self._r.tree.info(each)[3] for each in self._below(at, children)}
        self._delete(rows, at, children)
        return keys

    def _anew(self, at: int, children: dict[int, list[int]]) -> None:
        # What was told in a directory before it was told itself went with what was in its place.
        for each in self._below(at, children):
            key = self._r.tree.info(each)[3]
            self.index.forget(key)
            self.index.hold(key)
            self._r.repair.want([key])

    def gone(self, rows: list[Any], at: int, children: dict[int, list[int]] | None = None) -> None:
        """Tell that a directory is gone, with all that is believed below it, children first."""
        tree = self._r.tree
        if tree.info(at)[2] & flags.ZOMBIE:
            return  # it was told
        children = self._children() if children is None else children
        below = self._below(at, children)
        self._retell_twins(rows, at, children)
        self._delete(rows, at, children)
        for each in below:
            self._forget(tree.info(each)[3])
        if self._r.repair.detach(tree.info(at)[3]):
            self._r.repair.drop(rows, tree.info(at)[3])
            return
        for each in reversed(below):
            self._end(each)
            self._r.repair.drop(rows, tree.info(each)[3], dead=each == at)

    def _retell_twins(self, rows: list[Any], at: int, children: dict[int, list[int]]) -> None:
        # What is believed of another directory in the same place goes with it, and is told anew.
        tree = self._r.tree
        place = tree.info(at)[:2]
        for each in children.get(place[0], ()) if place[0] >= 0 else ():
            parent, name, now, _, _ = tree.info(each)
            if each != at and (parent, name) == place and not now & flags.ZOMBIE:
                self._r.repair.want(self._retell(rows, each, children))

    def _delete_below(self, rows: list[Any], at: int, children: dict[int, list[int]]) -> None:
        tree, index = self._r.tree, self.index
        for each in reversed(self._below(at, children)):
            key = tree.info(each)[3]
            for name, is_dir in index.names(key):
                self._tell(rows, each, name, DELETE, is_dir)
            index.forget(key)
            index.hold(key)

    def _delete(self, rows: list[Any], at: int, children: dict[int, list[int]]) -> None:
        tree, index = self._r.tree, self.index
        self._delete_below(rows, at, children)
        parent, name, _, key, _ = tree.info(at)
        if parent >= 0 and index.remove(tree.info(parent)[3], name):
            own = any(root.key == key and root.file is None for root in self._r.dirs.roots)
            if not own:
                self._tell(rows, parent, name, DELETE, True)

    def told_above(self, rows: list[Any], at: int) -> None:
        """Tell the directories, down to this one, that were not told yet."""
        tree, index, dirs = self._r.tree, self.index, self._r.dirs
        chain = []
        while at >= 0 and dirs.inside(at):
            parent, name, _, key, _ = tree.info(at)
            if parent < 0 or not dirs.inside(parent):
                break
            chain.append((parent, name, key))
            if index.find(tree.info(parent)[3], name) is not None:
                break
            at = parent
        for parent, name, key in reversed(chain):
            above = tree.info(parent)[3]
            is_dir = index.find(above, name)
            if is_dir:
                continue
            if above in self.unlisted and not self.whole:
                continue  # nothing is known of what was in it
            if is_dir is not None:
                self._tell(rows, parent, name, DELETE, False)
                index.remove(above, name)
                self._anew(tree.find(key), self._children())
            index.put(above, name, True, self._told_ns)
            self._news.add(key)
            self._tell(rows, parent, name, CREATE, True)

    # -- listings --

    def found(self, key: bytes, parent: bytes) -> None:
        """The scan found a directory in another one."""
        if parent in self._news:
            self._news.add(key)

    def scanned(self) -> None:
        """The first scan is complete."""
        self.whole = True
        self._news.clear()

    def learn(self, key: bytes, listing: bytes, firsts: Any) -> None:
        """Take a listing of which nothing is told."""
        self.unlisted.discard(key)
        self.index.diff(key, listing, firsts, True, self._empty_ns)

    def listed(
        self,
        rows: list[Any],
        at: int,
        listing: bytes,
        firsts: dict[bytes, tuple[bool, bool]] | None,
        inside: dict[bytes, bytes],
    ) -> int:
        """Tell in what a directory differs from what is believed; how many changes that took.

        ``inside``: the directories in it, name -> key.
        """
        r = self._r
        tree, index = r.tree, self.index
        key = tree.info(at)[3]
        # What was in a directory that was never listed before the loss cannot be known.
        silent = not self.whole and key in self.unlisted and key not in self._news
        self.unlisted.discard(key)
        self._now, self._told = time.time(), 0
        if not silent:
            self.told_above(rows, at)
        known = self._known(rows, at, inside)
        for what, name, is_dir in index.diff(key, listing, firsts, False, self._told_ns):
            if silent and what == CREATED:
                continue
            was_dir = what & WAS_DIR or (what == DELETED and is_dir)
            if what & WAS_DIR and is_dir and name in known:
                continue  # the handle says that it is the same
            if what & (DELETED | REPLACED):
                self._tell(rows, at, name, DELETE, bool(was_dir))
            if what & REPLACED and is_dir and name in known:
                self._anew(known[name], self._children())
            if what & (CREATED | REPLACED):
                self._tell(rows, at, name, CREATE, is_dir)
            elif what & (MODIFIED | ATTRIBUTES):
                bits = MODIFY if what & MODIFIED else ATTRIB
                self._tell(rows, at, name, bits, is_dir, inferred=True)
        return self._told

    def _known(self, rows: list[Any], at: int, inside: dict[bytes, bytes]) -> dict[bytes, int]:
        # The directories in this one that are in the tree there. Others that the tree has there
        # are gone or elsewhere, others that are there are elsewhere in the tree: astray.
        tree = self._r.tree
        known: dict[bytes, int] = {}
        for name, key in inside.items():
            each = tree.find(key)
            if each < 0:
                continue
            if tree.info(each)[:2] == (at, name):
                known[name] = each
            else:
                self._r.repair.stray(key)
        if len(known) + self._ended.get(at, 0) < tree.info(at)[4]:
            children = self._children()
            here = known.values()
            strays = [each for each in children.get(at, ()) if each not in here]
            for each in strays:
                place = tree.info(each)[1]
                for twin in [known[place]] if place in known else []:
                    self._r.repair.want(self._retell(rows, twin, children))
                self._retell(rows, each, children)
            self._stray(strays, children)
        return known

    # -- telling --

    def _tell(
        self,
        rows: list[Any],
        at: int,
        name: bytes,
        bits: int,
        is_dir: bool,
        inferred: bool = False,
    ) -> None:
        r = self._r
        scope, path = r.tree.resolve(at)
        if scope & flags.IN_FILES and not scope & flags.IN:
            key = r.tree.info(at)[3]
            if not any(root.key == key and root.file == name for root in r.dirs.roots):
                return
        elif not scope & flags.IN:
            return
        source = "current" if scope & flags.IN_CURRENT else "exact"
        text = fsdecode((path.rstrip(b"/") if path == b"/" else path) + b"/" + name)
        self._row(rows, bits, text, source, is_dir, inferred=inferred)

    def _row(
        self,
        rows: list[Any],
        bits: int,
        path: str,
        source: str,
        is_dir: bool,
        old: str | None = None,
        key: bytes | None = None,
        inferred: bool = False,
    ) -> None:
        r = self._r
        globs = r.dirs.globs
        if globs and globs.match(path) and (old is None or globs.match(old)):
            return
        if not bits & r.teller.want:
            return
        self._told += 1
        r.repair.told_rows += r.repair.active
        who = identity(r.teller.dev, key) if key else None
        kinds = r.teller.settings.kinds[kind_index(bits)]
        rows.append(
            r.teller.settings.make(
                kinds, path, old, is_dir, 0, who, self._now, source, inferred=inferred
            )
        )

    # -- the tree --

    def _children(self) -> dict[int, list[int]]:
        tree = self._r.tree
        children: dict[int, list[int]] = {}
        for at in tree.ids():
            children.setdefault(tree.info(at)[0], []).append(at)
        return children

    def _below(self, top: int, children: dict[int, list[int]]) -> list[int]:
        # A directory and all below it, parents first. Some may have moved since.
        tree = self._r.tree
        out, todo, seen = [], [top], {top}
        while todo:
            here = todo.pop()
            out.append(here)
            for at in children.get(here, ()):
                try:
                    parent, _, now, _, _ = tree.info(at)
                except KeyError:
                    continue
                if parent == here and not now & flags.ZOMBIE and at not in seen:
                    seen.add(at)
                    todo.append(at)
        return out
