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

Permission events come by `access`, which asks one group after another and waits; their marks are
matched as those of an open or a read are.

REFS      holds the groups and, by superblock, the connectors of marked objects.
LOCKING   none: one owner. `send` is atomic: nothing changes a mark meanwhile.
LIFETIME  groups and superblocks come with their first use; a superblock's index stays until
          `unmount`, which takes its marks along.
Linux reference: fsnotify() and send_to_group in fs/notify/fsnotify.c,
fanotify_group_event_mask and fanotify_alloc_event in fs/notify/fanotify/fanotify.c.
"""

from collections.abc import Callable, Hashable, Iterable
from functools import partial

import msgspec

from .access import Access
from .connector import Connector, Plan
from .event import FS, OBJECT, UNPLACED, ErrorEvent, Event, PermissionEvent
from .group import MARKS_LIMIT, NOTIF, QUEUE_LIMIT, Group
from .mark import FILESYSTEM, SUBTREE, On
from .mask import (
    DELETE_SELF,
    DIRENT,
    EVENTS,
    FS_ERROR,
    ON_CHILD,
    ONDIR,
    PERMISSION,
    Q_OVERFLOW,
    RENAME,
    show,
)
from .report import Report
from .reserve import ERRORS_LIMIT
from .verdict import QUESTIONS_LIMIT, Policy

# Which of the two directories of a rename a group may see; a mark on the filesystem sees both.
_OLD, _NEW = 1, 2

_MOST_WAYS = 1 << 16

_RARE = Q_OVERFLOW | FS_ERROR | PERMISSION
_OF_CHILD = ON_CHILD | PERMISSION


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
    """Groups, and the marks of every filesystem. Not thread-safe: one owner.

    ``current`` returns who runs now, like the kernel's ``current``: who reads a permission event is
    then told as the one that its access waits for. None where nobody asks that.
    """

    __slots__ = ("_number", "_superblocks", "current", "groups")

    def __init__(self, current: Callable[[], object] | None = None) -> None:
        self.current = current
        self.groups: dict[Group, None] = {}
        self._superblocks: dict[Hashable, Superblock] = {}
        self._number = 0  # of the group made last

    def group(
        self,
        cls: str = NOTIF,
        queue_limit: int = QUEUE_LIMIT,
        marks_limit: int = MARKS_LIMIT,
        errors_limit: int = ERRORS_LIMIT,
        policy: Policy | None = None,
        questions_limit: int = QUESTIONS_LIMIT,
    ) -> Group:
        """Make a group of class ``cls``: NOTIF, CONTENT or PRE_CONTENT.

        ``queue_limit`` is of events, ``marks_limit`` of marks, ``errors_limit`` of those that ask
        for FS_ERROR, ``questions_limit`` of permission events that nobody answered. ``policy`` is
        what an access gets that nobody answers; permission events need one. Raises MarkRefused for
        a class that does not exist, and a policy that it cannot have.
        """
        self._number += 1
        group = Group(
            self, cls, queue_limit, marks_limit, errors_limit, policy, questions_limit, self._number
        )
        self.groups[group] = None
        return group

    def superblock(self, fs: Hashable) -> Superblock:
        """Return the index of a filesystem, made if there is none."""
        found = self._superblocks.get(fs)
        if found is None:
            found = self._superblocks[fs] = Superblock()
        return found

    def marked(self, fs: Hashable, key: bytes) -> bool:
        """Whether some group has a mark on this very object."""
        found = self._superblocks.get(fs)
        return found is not None and (key in found.inodes or key in found.trees)

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

    def has_marks(self, fs: Hashable) -> bool:
        """Whether any group has a mark on anything of a filesystem."""
        found = self._superblocks.get(fs)
        return found is not None and bool(found.own or found.inodes or found.trees)

    # -- permission --

    def access(self, event: PermissionEvent, wake: Callable[[], None] | None = None) -> Access:
        """Make an access that has to be allowed by whoever asked for such events.

        ``event`` is what is about to be done: one bit of `mask.PERMISSION`, with ONDIR for a
        directory, its object, place and ancestors as for `send`, and its ``range``; it is kept.
        ``wake`` is called when a verdict has come; it must not call back into notify. Nobody is
        asked before `Access.ask`. Raises ValueError for another mask.
        """
        if (event.mask & ~ONDIR).bit_count() != 1 or not event.mask & PERMISSION:
            raise ValueError(f"one permission event at a time, not {show(event.mask)}")
        return Access(self, event, wake)

    def asks(self, event: PermissionEvent) -> bool:
        """Whether any group wants to be asked: who need not ask can do without an access."""
        return self.next_asked(event, (-1, 0)) is not None

    def next_asked(
        self, event: PermissionEvent, after: tuple[int, int]
    ) -> tuple[Group, int] | None:
        """Return the group that is asked next, behind the one whose `Group.order` is ``after``.

        With it the mask of its event. By the marks as they are now; None when nobody is left.
        """
        found = self._superblocks.get(event.fs)
        if found is None:
            return None
        mask = event.mask
        asked: dict[Group, int] = {}
        ignored: dict[Group, int] = {}
        for plan in _met(found, event, mask):
            for group, wanted, ignore, _ in plan.groups:
                asked[group] = asked.get(group, 0) | wanted
                ignored[group] = ignored.get(group, 0) | ignore
        left = [group for group in asked if asked[group] & ~ignored[group] and group.order > after]
        return (min(left, key=lambda group: group.order), mask) if left else None

    def tick(self, now: float) -> float | None:
        """Tell the time, in seconds of any clock that does not go back.

        Accesses that have waited for a group's ``patience`` go by its policy. Returns when the next
        one will, None if none: tell the time then, and whenever a question was put.
        """
        times = [at for group in self.groups if (at := group.verdicts.tick(now)) is not None]
        return min(times, default=None)

    # -- telling --

    def prepare(self, events: Iterable[Event]) -> Report:
        """Build the report of an operation while its objects can be named; see `Report`.

        The events are copied. Tell it with `Report.report` once the operation is visible.
        """
        return Report(self, events)

    def send(self, events: Iterable[Event]) -> None:
        """Give each event, in order, to the groups that want it. Nothing of the events is kept.

        Raises ValueError for a permission event: somebody has to wait for it, see `access`.
        """
        superblocks = self._superblocks
        for event in events:
            mask = event.mask
            found = superblocks.get(event.fs)
            if mask & _RARE:
                if mask & PERMISSION:
                    raise ValueError(f"{show(mask)}: a permission event goes by access()")
                if mask & Q_OVERFLOW:
                    self.lost(event.fs, event.count, event.roots)
                elif found is not None:
                    assert isinstance(event, ErrorEvent)
                    _to_error(found, event)
            elif found is None:
                continue
            elif not mask & DIRENT:
                _to_object(found, event, mask)
            else:
                # One record can hold both, such as a file's CREATE and its OPEN.
                _to_directories(found, event, mask & (DIRENT | ONDIR))
                if mask & EVENTS & ~DIRENT:
                    _to_object(found, event, mask & ~DIRENT)


def _to_object(found: Superblock, event: Event, mask: int) -> None:
    if plans := _met(found, event, mask):
        _deliver(plans, event, mask)
    key = event.key
    if mask & DELETE_SELF and key is not None:
        for index in (found.inodes, found.trees):
            if (connector := index.get(key)) is not None:
                for mark in list(connector.marks):
                    mark.destroy()


# What happens to an object: it is told, its parent (for what a parent can be told of), and the
# filesystem. A directory is in the subtrees above it, and its own.
def _met(found: Superblock, event: Event, mask: int) -> list[Plan]:
    key, folder = event.key, event.dir
    ancestors = event.ancestors
    on_child, ondir = mask & _OF_CHILD, mask & ONDIR
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
    return plans


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
