"""Events: what happened to one object, as a value.

REFS: an event owns copies and never a reference to a mark, a connector or a group, so none of them
has to wait for an event that somebody still holds (designs 2 to 4 of the kernel's error events did
the opposite, and that was a use after free when a group was closed).
LIFETIME: none is declared: events are made and dropped by the hundred thousand.
"""

from collections.abc import Hashable

import msgspec

from .mask import show


class Event(msgspec.Struct, gc=False):
    """One event, as the source told it or as a group keeps it.

    ``mask`` is of `fanwise.notify.mask`. ``fs`` names the superblock; keys of two superblocks mean
    nothing to each other. ``key`` is the object's file handle, None where the kernel gave none.
    ``dir`` and ``name`` are the directory's handle and the entry, both None for an event that names
    none: every event of a directory itself, link counts and last closes of files. ``dir2`` and
    ``name2`` are where a rename led; a rename that a group may see one half of has None for the
    other. ``pid`` is 0 when unknown.

    ``ancestors`` are the handles of the directories above, nearest first: above ``dir``, or, where
    ``dir`` is None, above the directory that ``key`` is. ``ancestors2`` are those above ``dir2``.
    The caller fills them in; what is left out no subtree's mark matches, and no parent of a
    directory is told.

    In a Q_OVERFLOW event ``count`` is the number of events lost, None where the kernel did not say,
    and ``roots`` are the handles of the directories in which they were lost, None when unknown.
    """

    mask: int
    fs: Hashable = None
    key: bytes | None = None
    dir: bytes | None = None
    name: bytes | None = None
    dir2: bytes | None = None
    name2: bytes | None = None
    pid: int = 0
    ancestors: tuple[bytes, ...] = ()
    ancestors2: tuple[bytes, ...] = ()
    count: int | None = None
    roots: tuple[bytes, ...] | None = None

    def __str__(self) -> str:
        names = [repr(name) for name in (self.name, self.name2) if name is not None]
        return " ".join([show(self.mask), *names, f"pid {self.pid}"])


class PermissionEvent(Event, gc=False):
    """An access that waits for a verdict: OPEN_PERM, ACCESS_PERM, OPEN_EXEC_PERM or PRE_ACCESS.

    ``number`` is what `Group.answer` takes; a group never uses one again, so a stale answer can
    only miss. ``range`` is, of PRE_ACCESS, the part that is about to be accessed as (offset,
    count) in bytes, None where the access has none. Linux rounds it out to whole pages, and says
    (0, 0) for a whole file that is cloned; whoever asks gives it.
    """

    number: int = 0
    range: tuple[int, int] | None = None

    def __str__(self) -> str:
        text = f"{self.number}: {Event.__str__(self)}"
        return text if self.range is None else f"{text} [{self.range[0]}, +{self.range[1]}]"


OBJECT = "object"
"""An error of the object that the event names, which is what the mark is on, or below it."""

FS = "fs"
"""An error of the filesystem that names no object."""

UNPLACED = "unplaced"
"""An error of an object of which nobody knows where it is: it may be below the mark."""


class ErrorEvent(Event, gc=False):
    """FS_ERROR: a filesystem found something broken.

    ``error`` is the errno, positive. ``count`` is how many errors this stands for (None: one); then
    errno, object and ``pid``, which is of who tripped over it, are those of the first. ``scope`` is
    OBJECT, FS or UNPLACED: for a group that gets it, how its marks meet it; for who sends it,
    UNPLACED says that ``dir`` and ``ancestors`` are not known, and FS is told by ``key`` None.
    """

    error: int = 0
    scope: str = OBJECT

    def __str__(self) -> str:
        return f"{show(self.mask)} errno {self.error} x{self.count or 1} {self.scope}"
