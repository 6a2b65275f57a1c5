"""Marks: what a group wants to know of one object, and what of that it does not.

REFS      the mark holds its group and, while it can be found, its connector. A mark is held by its
          group's list and its object's list while attached, and by every reader that took it with
          `get` to use it across a wait. No event holds a mark.
LOCKING   none: one owner; what is found without waiting needs no reference.
LIFETIME  ATTACHED, found by events. DETACHED, off the group's list and matching nothing. DYING, off
          the object's list too, its place in the quota given back. FREED, when the last reader has
          left. Detaching is cheap and happens once, however many ask for it: the user, the group's
          end, the object's end, the filesystem's end.
Linux reference: fs/notify/mark.c, fanotify_mark(2), fs/notify/fanotify/fanotify_user.c.
"""

from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple

from fanwise._errors import MarkRefused
from fanwise.kernel import fanotify as fan
from fanwise.lifetime import Lifetime

from .mask import (
    DIRENT,
    EVENT_ON_CHILD,
    FLAGS,
    FS_ERROR,
    MARKED,
    MODIFY,
    OF_FILES,
    OF_MOUNTS,
    ONDIR,
    PERMISSION,
    PRE_ACCESS,
    Q_OVERFLOW,
    show,
)

if TYPE_CHECKING:
    from .connector import Connector
    from .group import Group

NOTIF = "NOTIF"
CONTENT = "CONTENT"
PRE_CONTENT = "PRE_CONTENT"
CLASSES = (PRE_CONTENT, CONTENT, NOTIF)  # who is asked first

INODE = "inode"
SUBTREE = "subtree"
FILESYSTEM = "filesystem"
MOUNT = "mount"  # refused

# How a mask is meant; the kernel's numbers.
IGNORE = fan.FAN_MARK_IGNORE
IGNORED_MASK = fan.FAN_MARK_IGNORED_MASK
SURV_MODIFY = fan.FAN_MARK_IGNORED_SURV_MODIFY

IGNORES = IGNORE | IGNORED_MASK
_OF_DIRECTORIES = DIRENT | FLAGS


class On(NamedTuple):
    """What a mark is on: an inode, a subtree (a directory and all below it) or a filesystem.

    ``key`` is the file handle, empty for a filesystem. ``directory`` is whether an inode is one.
    """

    kind: str
    fs: Hashable
    key: bytes = b""
    directory: bool = False


class Mark:
    """One mark of one group on one object; made by `Group.add`."""

    __slots__ = (
        "connector",
        "group",
        "ignore",
        "ignore_flags",
        "mask",
        "on",
        "refs",
        "state",
        "survives",
    )

    state: str

    def __init__(self, group: "Group", on: On, connector: "Connector") -> None:
        self.group = group
        self.on = on
        self.connector: Connector | None = connector
        self.mask = 0
        self.ignore = 0
        self.ignore_flags = False  # the ignore mask has event flags of its own (IGNORE)
        self.survives = False  # a modification does not clear the ignore mask
        self.refs = 0  # readers
        connector.marks[self] = None
        MARK.start(self)

    def get(self) -> bool:
        """Take the mark to use it across a wait; False, and nothing is taken, unless attached."""
        if self.state != "ATTACHED":
            return False
        self.refs += 1
        return True

    def put(self) -> None:
        """Give back what `get` took; a dying mark is freed with its last reader."""
        self.refs -= 1
        self._reap()

    def detach(self) -> None:
        """Take it off the group's list; it matches no more. Does nothing the second time."""
        if self.state == "ATTACHED":
            del self.group.marks[self.on]
            self.group.dying[self] = None
            MARK.advance(self, "detach")
            if self.mask & FS_ERROR:
                self.group.errors.unmark(self.on.fs)
            if self.connector is not None:
                self.connector.forget()

    def free(self) -> None:
        """Take a detached mark off its object's list, and free it once no reader has it."""
        if self.state != "DETACHED":
            return
        connector, self.connector = self.connector, None
        MARK.advance(self, "free")
        self.group.marks_used -= 1
        if connector is not None:
            connector.remove(self)
        self._reap()

    def destroy(self) -> None:
        """Detach and free."""
        self.detach()
        self.free()

    def _reap(self) -> None:
        if self.state == "DYING" and not self.refs:
            del self.group.dying[self]
            MARK.advance(self, "reap")

    def change(self, mask: int, flags: int) -> None:
        """Add to the mask or the ignore mask, as fanotify_mark(2) with FAN_MARK_ADD.

        Raises MarkRefused when that would weaken an ignore mask that is there.
        """
        if flags & IGNORED_MASK and self.ignore_flags:
            raise MarkRefused(
                "the mark's ignore mask has event flags of its own, IGNORED_MASK has none",
                "add with IGNORE",
            )
        if flags & IGNORE and not flags & SURV_MODIFY and self.survives:
            raise MarkRefused(
                "the mark's ignore mask survives modifications, and cannot be made not to",
                "add with SURV_MODIFY, or remove the mark first",
            )
        if (both := mask | self.mask) & PRE_ACCESS and both & ONDIR:
            raise MarkRefused("directories have no PRE_ACCESS", "use another group for one of both")
        if flags & IGNORES:
            self.ignore |= mask
            self.ignore_flags |= bool(flags & IGNORE)
            self.survives |= bool(flags & SURV_MODIFY)
        else:
            self.mask |= mask
        if self.connector is not None:
            self.connector.forget()

    def cut(self, mask: int, flags: int) -> bool:
        """Remove from the mask or the ignore mask; whether nothing is left and it has to go."""
        fixed = _fixed(self.on, flags)
        if flags & IGNORES:
            self.ignore &= ~(mask & ~fixed)
        else:
            had, self.mask = self.mask, self.mask & ~(mask & ~fixed)
            if had & ~self.mask & FS_ERROR:
                self.group.errors.unmark(self.on.fs)
        if self.connector is not None:
            self.connector.forget()
        return not (self.mask | self.ignore) & ~fixed

    def applies(self, ondir: bool, child: bool) -> bool:
        """Whether the mask is about directories, and about children, if the event is."""
        return _applies(self.mask, ondir, child)

    def ignored(self, ondir: bool, child: bool) -> int:
        """Return the bits that are ignored for an event of this kind.

        The old kind of ignore mask is about directories always, and about children if the mask is.
        """
        ignore = self.ignore & MARKED
        if not ignore or not (ondir or child):
            return ignore
        flags = self.ignore if self.ignore_flags else ONDIR | (self.mask & EVENT_ON_CHILD)
        return ignore if _applies(flags, ondir, child) else 0

    def watches_children(self) -> bool:
        """Whether the mask or the ignore mask is about children."""
        flags = self.mask | (self.ignore if self.ignore_flags else 0)
        return bool(flags & EVENT_ON_CHILD)

    def __repr__(self) -> str:
        ignore = f" ignore {show(self.ignore)}" if self.ignore else ""
        return (
            f"<Mark on {self.on.kind} {self.on.key.hex()} {show(self.mask)}{ignore} {self.state}>"
        )


MARK: Lifetime[Mark] = Lifetime(
    "Mark",
    states=("ATTACHED", "DETACHED", "DYING", "FREED"),
    transitions={
        "detach": "ATTACHED -> DETACHED",
        "free": "DETACHED -> DYING",
        "reap": "DYING -> FREED",
    },
    invariants={
        "a mark that can be found is on its object's list": lambda m: (
            (m.connector is not None) == (m.state in ("ATTACHED", "DETACHED"))
        ),
        "a mark that is not attached is off its group's list": lambda m: (
            m.state == "ATTACHED" or m.group.marks.get(m.on) is not m
        ),
        "the group waits for a mark until it is freed": lambda m: (
            (m in m.group.dying) == (m.state in ("DETACHED", "DYING"))
        ),
        "a freed mark has no readers": lambda m: m.state != "FREED" or not m.refs,
    },
)


def checked(cls: str, on: On, mask: int, flags: int, adding: bool) -> int:
    """Return what of ``mask`` a mark of a group of class ``cls`` on ``on`` takes.

    By the rules of fanotify_mark(2); which filesystems and files have pre-content events is for
    whoever has them to say. Raises MarkRefused.
    """
    if on.kind == MOUNT:
        raise MarkRefused(
            "a mark on a mount: records do not name the mount", "mark a subtree or the filesystem"
        )
    if on.kind not in (INODE, SUBTREE, FILESYSTEM):
        raise MarkRefused(f"no mark is on a {on.kind!r}")
    if flags & ~(IGNORES | SURV_MODIFY):
        raise MarkRefused(f"unknown flags {flags:#x}", "IGNORE, IGNORED_MASK and SURV_MODIFY are")
    if flags & IGNORES == IGNORES:
        raise MarkRefused("IGNORE and IGNORED_MASK exclude each other")
    if mask & PERMISSION and cls == NOTIF:
        raise MarkRefused(
            f"{show(mask & PERMISSION)} waits for a verdict, and a group of class NOTIF gives none",
            "make the group with class CONTENT or PRE_CONTENT",
        )
    if mask & PRE_ACCESS and cls != PRE_CONTENT:
        raise MarkRefused(
            "PRE_ACCESS comes before the content is there, and class CONTENT is asked after that",
            "make the group with class PRE_CONTENT",
        )
    if mask & OF_MOUNTS:
        raise MarkRefused(f"{show(mask & OF_MOUNTS)} is of a mount namespace, not of a filesystem")
    if mask & Q_OVERFLOW:
        raise MarkRefused("Q_OVERFLOW is told to every group, and cannot be asked for")
    if not mask or mask & ~(MARKED | FLAGS):
        raise MarkRefused(f"not a mask of events: {show(mask)}")
    if cls != NOTIF and (rest := mask & ~(OF_FILES | PERMISSION | FLAGS)):
        raise MarkRefused(
            f"{show(rest)} is not about an open file, and a group of class {cls} is told of these",
            "ask for it in another group, of class NOTIF",
        )
    is_file = on.kind == INODE and not on.directory
    if flags & IGNORED_MASK:
        mask &= ~FLAGS
    if mask & PRE_ACCESS and mask & ONDIR:
        raise MarkRefused("directories have no PRE_ACCESS", "leave out ONDIR")
    # Linux took these flags for files once, and still does where no newer rule is asked for.
    strict = cls == NOTIF or flags & IGNORE
    if adding and strict and is_file and mask & _OF_DIRECTORIES:
        raise MarkRefused(
            f"{show(mask & _OF_DIRECTORIES)} is about directories, and this is none",
            "leave it out, or mark the directory",
        )
    if adding and not flags & SURV_MODIFY and not is_file:
        # One modified file would end it for all of them, unseen.
        if flags & IGNORE:
            what = "directory" if on.kind == INODE else on.kind
            raise MarkRefused(f"IGNORE on a {what} survives modifications", "add SURV_MODIFY")
        if flags & IGNORED_MASK and on.kind == SUBTREE:
            raise MarkRefused(
                "an ignore mask on a subtree survives modifications", "add SURV_MODIFY"
            )
    return mask & ~_fixed(on, 0)


# Bits that a mark of this kind does not have, or that this kind of change does not touch.
def _fixed(on: On, flags: int) -> int:
    if on.kind == FILESYSTEM or (on.kind == INODE and not on.directory):
        return EVENT_ON_CHILD
    return FLAGS if flags & IGNORED_MASK else 0


def _applies(flags: int, ondir: bool, child: bool) -> bool:
    return not (ondir and not flags & ONDIR) and not (child and not flags & EVENT_ON_CHILD)


def clears(mark: Mark, bits: int) -> bool:
    """Whether an event ends the mark's ignore mask: a modification, unless it survives them."""
    return bool(bits & MODIFY and mark.ignore and not mark.survives)
