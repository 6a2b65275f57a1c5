"""Inodes: objects of a filesystem while they are cached, with the pages of their content.

REFS      an inode is referenced by each positive dentry, and by whoever works with it. It owns its
          pages, and shares its `Node` with the disk.
LOCKING   ``lock`` (i_rwsem) over content and, for a directory, over its names.
LIFETIME  see INODE. The last reference leaves an inode with a name cached, without references; one
          without a name is evicted, and its number is free after that. Who looks for an inode that
          is being evicted waits until it is gone. What was not written back and what a write-back
          error has said so far is lost with the inode.
Linux reference: fs/inode.c, mm/filemap.c.
"""

from typing import TYPE_CHECKING

from fanwise.lifetime import Lifetime

from .disk import DIR, Node
from .locks import RwSem
from .protocol import Current

if TYPE_CHECKING:
    from .dentry import Dentry
    from .superblock import Superblock


class Page:
    """One page of a file's content; shorter than a page where the rest is zeros."""

    __slots__ = ("data", "dirty")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.dirty = False

    def __repr__(self) -> str:
        return f"<Page {self.data[:16]!r}{' dirty' if self.dirty else ''}>"


class Inode:
    """One cached object. ``key`` is its file handle: number and generation.

    ``dead`` is of a directory that was removed. ``writers`` counts files open for writing.
    """

    __slots__ = (
        "dead", "dentries", "generation", "key", "kind", "lock", "node", "number", "pages", "refs",
        "sb", "state", "wb_err", "writers",
    )  # fmt: skip

    state: str

    def __init__(self, sb: "Superblock", node: Node, current: Current) -> None:
        self.sb = sb
        self.node = node
        self.number, self.generation, self.kind = node.number, node.generation, node.kind
        self.key = b"%d.%d" % (node.number, node.generation)
        self.refs = 1
        self.dentries: list[Dentry] = []
        self.pages: dict[int, Page] = {}
        self.lock = RwSem(f"inode {node.number}", current)
        self.wb_err = 0
        self.writers = 0
        self.dead = False
        sb.inodes[node.number] = self
        INODE.start(self)

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return self.kind == DIR

    @property
    def links(self) -> int:
        """How many names it has."""
        return self.node.nlink

    @property
    def dirty(self) -> bool:
        """Whether a page has to be written back."""
        return any(page.dirty for page in self.pages.values())

    def gone(self) -> bool:
        """Whether it is freed."""
        return self.state == "FREED"

    def __repr__(self) -> str:
        return f"<Inode {self.key.decode()} {self.kind} {self.state}, {self.refs} refs>"


INODE: Lifetime[Inode] = Lifetime(
    "Inode",
    states=("LIVE", "EVICTING", "FREED"),
    transitions={"evict": "LIVE -> EVICTING", "free": "EVICTING -> FREED"},
    invariants={
        "each name in the cache holds a reference": lambda i: i.refs >= len(i.dentries),
        "nobody has an inode that is being evicted": lambda i: i.state == "LIVE" or not i.refs,
        "a freed inode has no page": lambda i: i.state != "FREED" or not i.pages,
    },
)
