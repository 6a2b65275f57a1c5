"""The core: takes events, and gives each to every group whose marks want it.

Marks are found by the objects that an event names, never by a loop over marks: the filesystem, the
object, its parent, and for subtrees the directories above. All marks of a group that are found have
a say together: bits that one asks for and none ignores. Marks of different groups never meet.

| object of a mark | told |
|---|---|
| filesystem | everything |
| inode | what happens to it; for a directory: also to its entries (CREATE, DELETE, RENAME, MOVED) |
| inode, a directory, EVENT_ON_CHILD | ACCESS to OPEN_EXEC of its children |
| subtree | what a mark with this mask on every directory in it would be told |

FS_ERROR goes by the object that is broken: to filesystem marks; to inode marks on it; to subtrees
that it is in. An error that names no object goes to filesystem marks, and to every subtree's as of
scope FS. One of an object of which nobody knows where it is goes to every subtree's, too, as
UNPLACED: told to too many rather than lost. ONDIR makes no difference, as in Linux.

REFS      holds the groups and, by superblock, the connectors of marked objects.
LOCKING   none: one owner. `send` is atomic: nothing changes a mark meanwhile.
LIFETIME  groups and superblocks come with their first use; a superblock's index stays until
          `unmount`, which takes its marks along.
Linux reference: fsnotify() and send_to_group in fs/notify/fsnotify.c,
fanotify_group_event_mask and fanotify_alloc_event in fs/notify/fanotify/fanotify.c.
"""

from collections.abc import Hashable, Iterable
from functools import partial

import msgspec

from .connector import Connector, Plan
from .event import FS, OBJECT, UNPLACED, ErrorEvent, Event
from .group import MARKS_LIMIT, NOTIF, QUEUE_LIMIT, Group
from .mark import FILESYSTEM, SUBTREE, On
from .mask import DELETE_SELF, DIRENT, EVENTS, FS_ERROR, ON_CHILD, ONDIR, Q_OVERFLOW, RENAME
from .reserve import ERRORS_LIMIT

# Which of the two directories of a rename a group may see; a mark on the filesystem sees both.
_OLD, _NEW = 1, 2

_MOST_WAYS = 1 << 16


class Superblock:
    """The marked objects of one filesystem, by file handle."""

    __slots__ = ("inodes", "own", "trees", "ways")

    def __init__(self) -> None:
        self.inodes: dict[bytes, Connector] = {}
        self.trees: dict[bytes, Connector] = {}
        self.own: Connector | None = None
        # The marked subtrees on a way up, as long as the same subtrees are marked.
        self.ways: dict[tuple[bytes, ...], tuple[Connector, ...]] = {}

    def connector(self, on: On) -> Connector:
        """Return the connector of an object, made if it has none."""
        if on.kind == FILESYSTEM:
            if self.own is None:
                self.own = Connector(self._forget_own)
            return self.own
        index = self.trees if on.kind == SUBTREE else self.inodes
        connector = index.get(on.key)
        if connector is None:
            connector = index[on.key] = Connector(partial(self._forget, index, on.key))
            self.ways.clear()
        return connector

    def above(self, ancestors: tuple[bytes, ...]) -> tuple[Connector, ...]:
        """Return the connectors of the marked subtrees among the directories of a way up."""
        found = self.ways.get(ancestors)
        if found is None:
            if len(self.ways) >= _MOST_WAYS:
                self.ways.clear()
            trees = self.trees
            found = tuple(trees[above] for above in ancestors if above in trees)
            self.ways[ancestors] = found
        return found

    def connectors(self) -> list[Connector]:
        """Return every connector there is."""
        own = [self.own] if self.own is not None else []
        return [*own, *self.inodes.values(), *self.trees.values()]

    def _forget_own(self) -> None:
        self.own = None

    def _forget(self, index: dict[bytes, Connector], key: bytes) -> None:
        del index[key]
        self.ways.clear()


class Fsnotify:
    """Groups, and the marks of every filesystem. Not thread-safe: one owner."""

    __slots__ = ("_superblocks", "groups")

    def __init__(self) -> None:
        self.groups: dict[Group, None] = {}
        self._superblocks: dict[Hashable, Superblock] = {}

    def group(
        self,
        cls: str = NOTIF,
        queue_limit: int = QUEUE_LIMIT,
        marks_limit: int = MARKS_LIMIT,
        errors_limit: int = ERRORS_LIMIT,
    ) -> Group:
        """Make a group; ``queue_limit`` is of events, the others of marks.

        ``errors_limit`` is of those that ask for FS_ERROR. Raises MarkRefused for a class that does
        not exist.
        """
        group = Group(self, cls, queue_limit, marks_limit, errors_limit)
        self.groups[group] = None
        return group

    def superblock(self, fs: Hashable) -> Superblock:
        """Return the index of a filesystem, made if there is none."""
        found = self._superblocks.get(fs)
        if found is None:
            found = self._superblocks[fs] = Superblock()
        return found

    def unmount(self, fs: Hashable) -> None:
        """Forget a filesystem: its marks end. Events already queued stay (fsnotify_sb_delete)."""
        found = self._superblocks.pop(fs, None)
        for connector in found.connectors() if found else ():
            for mark in list(connector.marks):
                mark.destroy()

    def lost(
        self, fs: Hashable, count: int | None = None, roots: tuple[bytes, ...] | None = None
    ) -> None:
        """Tell every group with a mark on ``fs`` that the source lost ``count`` events.

        None: the source does not know how many, or in which directories.
        """
        found = self._superblocks.get(fs)
        groups = {
            mark.group: None
            for connector in (found.connectors() if found else ())
            for mark in connector.marks
        }
        for group in groups:
            if group.queue.lose(count, roots):
                group.wake()

    def send(self, events: Iterable[Event]) -> None:
        """Give each event, in order, to the groups that want it. Nothing of the events is kept."""
        superblocks = self._superblocks
        for event in events:
            mask = event.mask
            found = superblocks.get(event.fs)
            if mask & Q_OVERFLOW:
                self.lost(event.fs, event.count, event.roots)
            elif found is None:
                continue
            elif mask & FS_ERROR:
                assert isinstance(event, ErrorEvent)
                _to_error(found, event)
            elif not mask & DIRENT:
                _to_object(found, event, mask)
            else:
                # One record can hold both, such as a file's CREATE and its OPEN.
                _to_directories(found, event, mask & (DIRENT | ONDIR))
                if mask & EVENTS & ~DIRENT:
                    _to_object(found, event, mask & ~DIRENT)


def _to_object(found: Superblock, event: Event, mask: int) -> None:
    # What happened to an object: it is told, its parent (for what a parent can be told of), and the
    # filesystem. A directory is in the subtrees above it, and its own.
    key, folder = event.key, event.dir
    ancestors = event.ancestors
    on_child, ondir = mask & ON_CHILD, mask & ONDIR
    plans: list[Plan] = []
    if key is not None and (connector := found.inodes.get(key)) is not None:
        plans.append(connector.plan(mask))
    if ondir and folder is None and ancestors:
        folder = ancestors[0]
    if on_child and folder is not None and (connector := found.inodes.get(folder)) is not None:
        plans.append(connector.child_plans.get(mask) or connector.child_plan(mask))
    trees = found.trees
    if trees:
        if ondir and key in trees:
            plans.append(trees[key].plan(mask))
        if on_child and event.dir is not None and event.dir in trees:
            plans.append(trees[event.dir].child_plan(mask))
        ways = found.ways.get(ancestors)
        for connector in found.above(ancestors) if ways is None else ways:
            if ondir:
                plans.append(connector.plan(mask))
            if on_child:
                plans.append(connector.child_plans.get(mask) or connector.child_plan(mask))
    if (connector := found.own) is not None:
        plans.append(connector.plans.get(mask) or connector.plan(mask))
    if plans:
        _deliver(plans, event, mask)
    if mask & DELETE_SELF and key is not None:
        for index in (found.inodes, trees):
            if (connector := index.get(key)) is not None:
                for mark in list(connector.marks):
                    mark.destroy()


def _to_directories(found: Superblock, event: Event, mask: int) -> None:
    # A change of a directory's entries: it is told, the second one of a rename, the filesystem.
    plans = _in(found, event.dir, event.ancestors, mask)
    if mask & RENAME:
        _deliver_rename(found, plans, event, mask)
        return
    if found.own is not None:
        plans.append(found.own.plan(mask))
    if plans:
        _deliver(plans, event, mask)


# What the marks on a directory make of a change of its entries, its own and those of subtrees.
def _in(
    found: Superblock, folder: bytes | None, ancestors: tuple[bytes, ...], mask: int
) -> list[Plan]:
    plans: list[Plan] = []
    if folder is None:
        return plans
    if (connector := found.inodes.get(folder)) is not None:
        plans.append(connector.plan(mask))
    trees = found.trees
    if trees:
        if (connector := trees.get(folder)) is not None:
            plans.append(connector.plan(mask))
        plans += [connector.plan(mask) for connector in found.above(ancestors)]
    return plans


def _deliver(plans: list[Plan], event: Event, mask: int) -> None:
    if len(plans) == 1:
        for group, out in plans[0].alone:
            if group.queue.add(event, out):
                group.wake()
        return
    asked: dict[Group, int] = {}
    ignored: dict[Group, int] = {}
    for plan in plans:
        for group, wanted, ignore, _ in plan.groups:
            asked[group] = asked.get(group, 0) | wanted
            if ignore:
                ignored[group] = ignored.get(group, 0) | ignore
    ondir = mask & ONDIR
    for group, wanted in asked.items():
        out = wanted & ~ignored.get(group, 0)
        if out and group.queue.add(event, out | ondir):
            group.wake()


def _to_error(found: Superblock, event: ErrorEvent) -> None:
    key, trees = event.key, found.trees
    met: list[Connector] = []
    if found.own is not None:
        met.append(found.own)
    elsewhere: Iterable[Connector] = ()
    scope = OBJECT
    if key is None:
        scope, elsewhere = FS, trees.values()
    else:
        met += [index[key] for index in (found.inodes, trees) if key in index]
        if event.scope == UNPLACED:
            elsewhere = [tree for on, tree in trees.items() if on != key]
        else:
            if event.dir is not None and event.dir in trees and event.dir != key:
                met.append(trees[event.dir])
            met += found.above(event.ancestors)
    asked: dict[Group, str] = {}
    ignored: set[Group] = set()
    for connector in met:
        for group, wanted, ignores, _ in connector.plan(FS_ERROR).groups:
            if wanted:
                asked[group] = scope
            if ignores:
                ignored.add(group)
    # What a subtree ignores is what is in it, and this is not known to be.
    for connector in elsewhere:
        for group, wanted, _, _ in connector.plan(FS_ERROR).groups:
            if wanted:
                asked.setdefault(group, FS if key is None else UNPLACED)
    for group, seen in asked.items():
        if group not in ignored and group.queue.add_error(event, seen):
            group.wake()


# A group sees the halves of a rename on whose directory it has a mark that is about such objects,
# whether or not that mark asks for renames (match_mask in fanotify_group_event_mask).
def _deliver_rename(found: Superblock, plans: list[Plan], event: Event, mask: int) -> None:
    halves = [(plan, _OLD) for plan in plans]
    halves += [(plan, _NEW) for plan in _in(found, event.dir2, event.ancestors2, mask)]
    if found.own is not None:
        halves.append((found.own.plan(mask), _OLD | _NEW))
    asked: dict[Group, int] = {}
    ignored: dict[Group, int] = {}
    seen: dict[Group, int] = {}
    for plan, half in halves:
        for group, wanted, ignore, applies in plan.groups:
            asked[group] = asked.get(group, 0) | wanted
            ignored[group] = ignored.get(group, 0) | ignore
            if applies:
                seen[group] = seen.get(group, 0) | half
    for group, wanted in asked.items():
        out = wanted & ~ignored[group]
        if not out:
            continue
        half = seen[group]
        shown = event
        if half != _OLD | _NEW:
            shown = msgspec.structs.replace(event)
            if half & _OLD:
                shown.dir2 = shown.name2 = None
                shown.ancestors2 = ()
            else:
                shown.dir = shown.name = None
                shown.ancestors = ()
        if group.queue.add(shown, out | mask & ONDIR):
            group.wake()
