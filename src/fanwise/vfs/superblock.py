"""Superblocks: one mounted filesystem, its caches, its freeze levels and its errors.

REFS      ``active`` counts the mounts, and one for all freezers together; with the last the
          filesystem is shut down. The superblock holds its root dentry while it is ACTIVE.
LOCKING   ``rename`` over every move between two directories; ``umount`` (s_umount) over freezing,
          thawing and shutting down.
LIFETIME  see SUPERBLOCK and FREEZE. A frozen filesystem whose last mount is gone stays ACTIVE.
Linux reference: fs/super.c, struct sb_writers in include/linux/fs/super_types.h.
"""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from fanwise.lifetime import Lifetime

from .disk import Disk
from .locks import Level, Mutex, RwSem
from .protocol import Current

if TYPE_CHECKING:
    from .dentry import Dentry
    from .inode import Inode

WRITE = "write"
PAGEFAULT = "page fault"
FS = "internal"
LEVELS = (WRITE, PAGEFAULT, FS)
"""What is shut by a freeze, in this order: SB_FREEZE_WRITE, SB_FREEZE_PAGEFAULT, SB_FREEZE_FS."""

USER = "user"
KERNEL = "kernel"
"""Who freezes: FREEZE_HOLDER_USERSPACE, FREEZE_HOLDER_KERNEL."""


class Freeze:
    """How far a filesystem is frozen; ``by`` counts for each kind of freezer."""

    __slots__ = ("by", "levels", "state")

    state: str

    def __init__(self, levels: Sequence[str], current: Current) -> None:
        self.levels = {name: Level(name, current) for name in levels}
        self.by: dict[str, int] = {}
        FREEZE.start(self)

    def settled(self) -> bool:
        """Whether no freeze is under way."""
        return self.state != "FREEZING"

    def __repr__(self) -> str:
        return f"<Freeze {self.state} by {self.by}>"


FREEZE: Lifetime[Freeze] = Lifetime(
    "Freeze",
    states=("THAWED", "FREEZING", "FROZEN"),
    transitions={
        "begin": "THAWED -> FREEZING",
        "give up": "FREEZING -> THAWED",
        "finish": "FREEZING -> FROZEN",
        "freeze again": "FROZEN -> FROZEN",
        "thaw one": "FROZEN -> FROZEN",
        "thaw": "FROZEN -> THAWED",
    },
    invariants={
        "a filesystem is frozen exactly while somebody has frozen it": lambda f: (
            (f.state == "FROZEN") == any(f.by.values())
        ),
        "nobody writes to a frozen filesystem": lambda f: (
            f.state != "FROZEN"
            or not any(level.holders for level in f.levels.values() if level.gate.holders)
        ),
        "a thawed filesystem keeps nobody out": lambda f: (
            f.state != "THAWED" or not any(level.gate.holders for level in f.levels.values())
        ),
    },
)


class Superblock:
    """One filesystem in use; made by `Vfs.superblock`. ``key`` names it to notify.

    ``pending`` counts error reports that are on their way, for which an unmount waits.
    """

    __slots__ = (
        "active", "deferred", "disk", "errors", "first_error", "freeze", "inodes", "key", "pending",
        "read_only", "rename", "root", "state", "umount", "wb_err",
    )  # fmt: skip

    state: str

    def __init__(
        self, key: Hashable, disk: Disk, current: Current, levels: Sequence[str], read_only: bool
    ) -> None:
        self.key = key
        self.disk = disk
        self.read_only = read_only
        self.inodes: dict[int, Inode] = {}
        self.root: Dentry | None = None
        self.active = 0
        self.deferred: list[Inode] = []  # without name and user, to be evicted when it is thawed
        self.freeze = Freeze(levels, current)
        self.rename = Mutex("rename", current)
        self.umount = RwSem("s_umount", current)
        self.wb_err = 0
        self.errors = self.first_error = self.pending = 0
        SUPERBLOCK.start(self)

    @property
    def freezable(self) -> bool:
        """Whether it can be frozen: a tmpfs cannot."""
        return not self.disk.memory

    def quiet(self) -> bool:
        """Whether no error report is on its way."""
        return not self.pending

    def __repr__(self) -> str:
        return f"<Superblock {self.key!r} {self.state}, {self.active} active>"


SUPERBLOCK: Lifetime[Superblock] = Lifetime(
    "Superblock",
    states=("BORN", "ACTIVE", "DYING", "DEAD"),
    transitions={
        "activate": "BORN -> ACTIVE",
        "shut down": "ACTIVE -> DYING",
        "free": "DYING -> DEAD",
    },
    invariants={
        "a superblock is active as long as somebody uses it": lambda s: (
            (s.state == "ACTIVE") == bool(s.active)
        ),
        "a frozen filesystem is not shut down": lambda s: (
            s.state == "ACTIVE" or s.freeze.state == "THAWED"
        ),
        "a dead superblock has nothing cached": lambda s: (
            s.state != "DEAD" or (not s.inodes and s.root is None)
        ),
        "no error report is on its way from a dead superblock": lambda s: (
            s.state != "DEAD" or not s.pending
        ),
    },
)
