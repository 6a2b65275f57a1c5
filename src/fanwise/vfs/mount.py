"""Mounts: where a filesystem, or a part of it, is seen; and paths, which are places in a mount.

REFS      a mount holds its superblock and its root dentry; it is referenced by being ATTACHED, by
          each path and file in it, and it holds the path that it is mounted on.
LOCKING   the namespace's mutex over mounting and unmounting.
LIFETIME  see MOUNT. Unmounting detaches it if nobody uses it; detached by force (lazily) it lives
          until the last file in it is closed.
Linux reference: fs/namespace.c.
"""

from typing import TYPE_CHECKING, NamedTuple

from fanwise.lifetime import Lifetime

if TYPE_CHECKING:
    from .dentry import Dentry
    from .superblock import Superblock


class Path(NamedTuple):
    """A place: a dentry as seen in a mount. Who has one from an operation gives it to `put`."""

    mount: "Mount"
    dentry: "Dentry"


class Mount:
    """One mount. ``on`` is the place that it covers, None for the root of all."""

    __slots__ = ("covers", "on", "read_only", "refs", "root", "sb", "state")

    state: str

    def __init__(
        self, sb: "Superblock", root: "Dentry", on: Path | None, read_only: bool = False
    ) -> None:
        self.sb = sb
        self.root = root
        self.on = on
        self.covers: dict[Dentry, Mount] = {}  # mounts on this one
        self.read_only = read_only
        self.refs = 1
        MOUNT.start(self)

    def __repr__(self) -> str:
        return f"<Mount of {self.sb.key!r} {self.state}, {self.refs} refs>"


MOUNT: Lifetime[Mount] = Lifetime(
    "Mount",
    states=("ATTACHED", "DETACHED", "FREED"),
    transitions={"detach": "ATTACHED -> DETACHED", "free": "DETACHED -> FREED"},
    invariants={
        "a mount that is seen is referenced": lambda m: m.state != "ATTACHED" or m.refs > 0,
        "a freed mount is used by nobody": lambda m: m.state != "FREED" or not m.refs,
        "what is not seen has nothing mounted on it": lambda m: (
            m.state == "ATTACHED" or not m.covers
        ),
    },
)
