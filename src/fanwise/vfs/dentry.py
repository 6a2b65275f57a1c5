"""Dentries: cached names. A name leads to an inode, or says that there is none.

REFS      a dentry is referenced by whoever works with it (a path, a file, a mount) and by each of
          its children; on a tmpfs also by being a name. A positive one holds its inode, and each
          holds its parent. Without references it stays cached; the shrinker takes it.
LOCKING   the directory's lock over what its names lead to. Counting and hashing are atomic.
LIFETIME  see DENTRY. A dentry that others use when its name is removed is UNHASHED: no look-up
          finds it, and its inode stays until they let go. Otherwise it becomes NEGATIVE.
Linux reference: fs/dcache.c.
"""

from typing import TYPE_CHECKING

from fanwise.lifetime import Lifetime

if TYPE_CHECKING:
    from .inode import Inode
    from .superblock import Superblock


class Dentry:
    """One cached name; the root has no parent. ``mounted`` counts the mounts on it."""

    __slots__ = ("children", "inode", "mounted", "name", "parent", "refs", "sb", "state")

    state: str

    def __init__(self, sb: "Superblock", parent: "Dentry | None", name: bytes) -> None:
        self.sb = sb
        self.parent = parent
        self.name = name
        self.inode: Inode | None = None
        self.children: dict[bytes, Dentry] = {}  # hashed ones
        self.refs = 1
        self.mounted = 0
        if parent is not None:
            parent.refs += 1
        DENTRY.start(self)

    @property
    def target(self) -> "Inode":
        """The inode; only for a dentry that has one."""
        inode = self.inode
        assert inode is not None
        return inode

    def above(self) -> tuple[bytes, ...]:
        """Return the file handles of the directories above, nearest first."""
        keys = []
        parent = self.parent
        while parent is not None:
            if parent.inode is not None:
                keys.append(parent.inode.key)
            parent = parent.parent
        return tuple(keys)

    def within(self, other: "Dentry") -> bool:
        """Whether it is ``other`` or below it."""
        here: Dentry | None = self
        while here is not None and here is not other:
            here = here.parent
        return here is other

    def __repr__(self) -> str:
        return f"<Dentry {self.name!r} {self.state}, {self.refs} refs>"


DENTRY: Lifetime[Dentry] = Lifetime(
    "Dentry",
    states=("NEW", "NEGATIVE", "POSITIVE", "UNHASHED", "FREED"),
    transitions={
        "add negative": "NEW -> NEGATIVE",
        "add": "NEW -> POSITIVE",
        "make": "NEGATIVE -> POSITIVE",
        "delete": "POSITIVE -> NEGATIVE",
        "move": "POSITIVE -> POSITIVE",
        "drop": "NEGATIVE, POSITIVE -> UNHASHED",
        "kill": "NEW, NEGATIVE, POSITIVE, UNHASHED -> FREED",
    },
    invariants={
        "references are never fewer than none": lambda d: d.refs >= 0,
        "a freed dentry has no references": lambda d: d.state != "FREED" or not d.refs,
        "a positive dentry has an inode, a negative one has none": lambda d: (
            d.state not in ("POSITIVE", "NEGATIVE")
            or (d.inode is not None) == (d.state == "POSITIVE")
        ),
        "look-ups find a dentry exactly while it is hashed": lambda d: (
            d.parent is None
            or d.state == "NEW"
            or (d.parent.children.get(d.name) is d) == (d.state in ("POSITIVE", "NEGATIVE"))
        ),
        "a dentry with children in the cache is referenced by them": lambda d: (
            d.refs >= len(d.children)
        ),
    },
)
