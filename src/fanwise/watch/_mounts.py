"""Mounts below the roots of a watch: each is a group of its own, opened and closed as they come.

A mount is followed when a path below a root leads to it, no glob excludes that path, and its
filesystem can be marked. What cannot be followed is named with the reason. The mark stands before
``mounted`` is told: who lists the directory then misses nothing.

One that may not answer (a network, a program) is asked by another process before it is touched.

REFS      the groups are in the watch's list with the others; here is which mount each is for. The
          questions are ours.
LOCKING   none: the consumer. LIFETIME  a group is closed here when its last change was told.
"""

import errno
import os
import select
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from fanwise._errors import FanwiseError, LimitReached, NoSuchRoot, NotWatchable
from fanwise.kernel.mounts import Mount, describe, visible
from fanwise.names.globs import Globs

from ._answers import Question, may_wait, wait
from ._change import Change
from ._group import Group

# Filesystems that are as good as a program of an ordinary user; and "fuse.NAME".
_SERVED = frozenset(("fuse", "fuseblk"))


class UnwatchedMount(NamedTuple):
    """A mount below a root whose changes are not told: ``path``, ``fstype``, and why.

    ``reason`` says what stands in the way, ``remedy`` what to do about it (None: nothing).
    """

    path: str
    fstype: str
    reason: str
    remedy: str | None


# What a mount is known by while it stands. Its point may change.
_Key = tuple[int | None, int, tuple[int, int], bytes]


def _key(mount: Mount) -> _Key:
    return mount.unique_id, mount.id, mount.dev, mount.root


class Below:
    """The mounts below the roots: which are followed, by what group, and which are not, and why."""

    # It knows the watch's groups, not the watch: one that is dropped is to be noticed at once.

    def __init__(
        self, groups: list[Group], exclude: Sequence[str], recursive: bool, follow: bool
    ) -> None:
        self._groups = groups  # those of the roots, and those made here
        self._exclude, self._recursive, self._follow = exclude, recursive, follow
        self.look: Callable[[], list[Mount]]  # the list of mounts, without opening a descriptor
        self.ask: Callable[[bytes], Question]  # whether what is mounted at a path answers
        self.epoll: select.epoll  # to be woken by answers
        self._asked: dict[_Key, Question] = {}  # those that did not answer yet
        self.make: Callable[[Mount, list[str], Callable[[], list[str]] | None], Group]
        self.inner: dict[_Key, Group] = {}  # the mounts that are followed
        self._refused: dict[_Key, UnwatchedMount] = {}
        self._limited: set[_Key] = set()  # of the refused: to be tried again
        self.unwatched: tuple[UnwatchedMount, ...] = ()  # the refused; changes when they do
        self.again = False  # `update` left something open
        self._at: list[str] = []  # the roots, when last looked
        self.past: dict[str, int] = {}  # what closed groups counted

    @property
    def followed(self) -> list[Group]:
        """The groups of the mounts that are followed."""
        return list(self.inner.values())

    def roots(self) -> list[str]:
        """Give the directories that are watched, as they are called now."""
        return [
            root.path
            for group in self._groups
            if not group.inner
            for root in group.resolver.dirs.roots
            if root.file is None
        ]

    def tells(self, path: str) -> bool:
        """Say whether a path is in a root, as those are called now, and not excluded."""
        return in_scope(path, self._all_roots(), self._exclude, self._recursive)

    def _all_roots(self) -> list[str]:
        return [
            root.path
            for group in self._groups
            if not group.inner
            for root in group.resolver.dirs.roots
        ]

    def wanted(self, there: Iterable[Mount]) -> list[Mount]:
        """Which mounts are seen below the roots."""
        there = list(there)
        roots = [os.fsencode(root) for root in self.roots()]
        if not roots or not self._recursive:
            return []
        seen = visible(there)
        every = self._all_roots()
        return [
            mount
            for mount in there
            if mount.id in seen
            if any(_is_below(mount.mount_point, root) for root in roots)
            if in_scope(os.fsdecode(mount.mount_point), every, self._exclude, True)
        ]

    def adopt(self, roots: list[tuple[Mount, list[str]]]) -> list[tuple[Mount, list[str]]]:
        """Give the paths that the group of each mount with a root has to watch.

        Where such a mount is itself below another root, all of it is to be told and not only
        its own roots: its group does that, too.
        """
        if not self._follow or not self._recursive:
            return roots
        paths = [path for _, some in roots for path in some]
        above = [path for path in paths if os.path.isdir(path)]
        out = []
        for mount, some in roots:
            point = os.fsdecode(mount.mount_point)
            more = point not in paths and in_scope(point, above, self._exclude, True)
            out.append((mount, [*some, point] if more else some))
        return out

    def open(self, there: Iterable[Mount]) -> None:
        """Follow what is there when the watch begins; of these nothing is told."""
        self._add(there, None)

    @property
    def stale(self) -> bool:
        """Whether `update` is to be called although no mount changed: a root did."""
        if self.again or any(map(self._has_answered, self._asked)):
            return True
        return self._recursive and self.roots() != self._at

    def follow(self, group: Group, there: Iterable[Mount], rows: list[Any]) -> None:
        """Learn where a followed mount is now, or let go of it."""
        if group.leaving:
            return
        mount = group.find(there)
        if mount is None or self._sees(mount):
            group.follow(there, rows)
        elif self._behind():
            self.again = True  # a root may have moved with it, and that is not told yet
        else:
            group.leave("unmounted")

    def _sees(self, mount: Mount) -> bool:
        return any(_is_below(mount.mount_point, os.fsencode(root)) for root in self.roots())

    def _behind(self) -> bool:
        outer = [group for group in self._groups if not group.inner]
        for group in outer:
            group.sync()
        return any(group.pending for group in outer)

    def update(self, there: Iterable[Mount], rows: list[Any]) -> None:
        """Follow what came, and let go of what went."""
        there = list(there)
        self.again = False
        for group in self.followed:
            self.follow(group, there, rows)
        stay = {_key(mount): mount for mount in there}
        for key, entry in list(self._refused.items()):
            mount = stay.get(key)
            point = os.fsdecode(mount.mount_point) if mount is not None else ""
            if mount is None or not (self._sees(mount) or self._behind()):
                del self._refused[key]
                self._limited.discard(key)
                rows.append(_row("unmounted", entry.path))
            elif point != entry.path:
                self._refused[key] = entry._replace(path=point)
        for key in [key for key in self._asked if key not in self._refused]:
            self._end(key)
        self._add(there, rows)

    def close(self) -> None:
        """End what is asked."""
        for question in self._asked.values():
            question.end()
        self._asked.clear()

    def _add(self, there: Iterable[Mount], rows: list[Any] | None) -> None:
        self._at = self.roots()
        # Those of the roots are followed by the roots' own groups.
        mine = {_key(group.mount) for group in self._groups if not group.inner}
        todo = [
            (key, mount)
            for mount in self.wanted(there)
            if (key := _key(mount)) not in mine
            if key not in self.inner
            if key not in self._refused or key in self._limited or self._has_answered(key)
        ]
        # Where something was unmounted that is told first.
        leaving = [group.mount.mount_point for group in self.followed if group.leaving]
        if leaving:
            ready = [each for each in todo if not _covers(each[1].mount_point, leaving)]
            self.again = self.again or len(ready) < len(todo)
            todo = ready
        held = self._ask(todo)
        full: UnwatchedMount | None = None  # what was refused because a limit is reached
        for key, mount in todo:
            known = key in self._refused
            path = os.fsdecode(mount.mount_point)
            if key in held:
                refused: UnwatchedMount | None = held[key]
            elif full is not None:  # one try tells for all: there may be hundreds, at each change
                refused = full._replace(path=path, fstype=mount.fstype)
                self._limited.add(key)
            else:
                refused = self._open(key, mount)
                if key in self._limited:
                    full = refused
            if refused is not None:
                self._refused[key] = refused
                if known:
                    continue
            elif key not in self.inner:
                continue  # it went away meanwhile
            elif known:
                del self._refused[key]
                self._limited.discard(key)
            if rows is not None:
                rows.append(_row("mounted", path))
        now = tuple(sorted(self._refused.values()))
        if now != self.unwatched:
            self.unwatched = now

    def _has_answered(self, key: _Key) -> bool:
        return key in self._asked and self._asked[key].answered

    def _end(self, key: _Key) -> None:
        question = self._asked.pop(key)
        self.epoll.unregister(question.fd)
        question.end()

    def _ask(self, todo: Iterable[tuple[_Key, Mount]]) -> dict[_Key, UnwatchedMount]:
        # Ask those that may not answer, give them a moment, and tell which are not to be touched.
        held: dict[_Key, UnwatchedMount] = {}
        new: list[Question] = []
        again = False
        for key, mount in todo:
            if key in self._asked:
                self._end(key)  # that was the answer
                continue
            if not self._follow or not may_wait(mount.fstype):
                continue
            if key in self._limited:
                if again:  # one try tells for all
                    held[key] = self._refused[key]
                    continue
                again = True
            held[key] = UnwatchedMount(
                os.fsdecode(mount.mount_point),
                mount.fstype,
                "it does not answer",
                "see whether its server runs: it is tried again when it answers",
            )
            try:
                question = self.ask(mount.mount_point)
            except OSError as error:
                self._limited.add(key)
                held[key] = held[key]._replace(
                    reason=f"no process can ask whether it answers: {error.strerror or error}",
                    remedy="it is tried again when mounts change",
                )
                continue
            new.append(question)
            self._asked[key] = question
            self.epoll.register(question.fd, select.EPOLLIN)
        wait(new)
        for key in list(held):
            if self._has_answered(key):
                del held[key]
                self._end(key)
            elif key in self._asked:
                self._limited.discard(key)
        return held

    def _open(self, key: _Key, mount: Mount) -> UnwatchedMount | None:
        path = os.fsdecode(mount.mount_point)

        def refused(reason: str, remedy: str | None = None) -> UnwatchedMount:
            return UnwatchedMount(path, mount.fstype, reason, remedy)

        if not self._follow:
            return refused("it is another filesystem, and those are left out, as asked")
        if mount.fstype == "autofs":
            # Opening it would mount something, and it never has anything in it.
            return refused("autofs mounts what is asked for; that is followed when it is there")
        if mount.fstype in _SERVED or mount.fstype.startswith("fuse."):
            # Each of its directories would be opened and marked, and nobody asked for just that.
            return refused(
                "a program serves it, and one that hangs would hold up all of the watch",
                "give it as a PATH of its own",
            )
        try:
            group = self.make(mount, [path], self.roots)
            group.open()
        except (FanwiseError, OSError) as error:
            # Where it went away, or is covered, that is heard of next.
            now = self._find(key)
            if now is None or now.mount_point != mount.mount_point:
                self.again = now is not None or self.again  # nothing tells of what moved
                return None
            if isinstance(error.__cause__, NotADirectoryError):
                return refused(
                    "a file that is itself a mount point has no name on its filesystem to follow",
                    "watch the file where it was mounted from",
                )
            self._limited.discard(key)
            if _is_limit(error):
                self._limited.add(key)
            if isinstance(error, FanwiseError):
                return refused(error.reason, error.remedy)
            return refused(error.strerror or str(error))
        self._limited.discard(key)
        self.inner[key] = group
        self._groups.append(group)
        return None

    def _find(self, key: _Key) -> Mount | None:
        if key[0] is not None:
            try:
                return describe(key[0])  # where there are many the list is long
            except NoSuchRoot:
                return None
            except NotWatchable:
                pass  # the kernel tells too little of one mount: the list has it
        return next((each for each in self.look() if _key(each) == key), None)

    def reap(self) -> None:
        """Close the groups whose last change was told."""
        if not self.roots():
            for group in self.inner.values():
                if not group.leaving:
                    group.leave("unmounted")
        for key, group in list(self.inner.items()):
            if not group.ended:
                continue
            for name, value in group.source.drain.stats().items():
                self.past[name] = self.past.get(name, 0) + value
            del self.inner[key]
            self._groups.remove(group)
            group.close()


# It may pass, so what was refused for it is tried again.
_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)


def _is_limit(error: FanwiseError | OSError) -> bool:
    if isinstance(error, LimitReached):
        return True
    cause = error if isinstance(error, OSError) else error.__cause__
    return isinstance(cause, OSError) and cause.errno in _LIMITS


def _covers(point: bytes, others: Iterable[bytes]) -> bool:
    return any(other == point or other.startswith(point.rstrip(b"/") + b"/") for other in others)


def _row(kind: str, path: str) -> Change:
    return Change((kind,), path, None, True, 0, None, time.time(), "exact")


def in_scope(path: str, roots: Sequence[str], exclude: Sequence[str], recursive: bool) -> bool:
    """Say whether a path is in a root and no glob leaves it out."""
    globs = Globs(exclude, roots)
    for root in roots:
        base = root.rstrip("/")
        if path == root:
            return True
        if not path.startswith(base + "/"):
            continue
        below = path[len(base) + 1 :].split("/")
        steps = [base + "/" + "/".join(below[: i + 1]) for i in range(len(below))]
        if (recursive or len(below) == 1) and not any(map(globs.match, steps)):
            return True
    return False


def _is_below(path: bytes, directory: bytes) -> bool:
    return path != directory and path.startswith(directory.rstrip(b"/") + b"/")
