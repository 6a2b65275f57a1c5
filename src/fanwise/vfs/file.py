"""Files: open objects.

REFS      a file holds its path: the mount and the dentry, and by it the inode.
LOCKING   none: a file is used by one task at a time.
LIFETIME  see FILE. One that was refused is closed without ever being open, and nothing is told.
Linux reference: fs/open.c, fs/file_table.c.
"""

import os

from fanwise.lifetime import Lifetime

from .mount import Path


class File:
    """One open file. ``flags`` are O_*. A ``silent`` one raises no event (FMODE_NONOTIFY).

    ``asks`` are the permission events that it may raise, fixed when it is opened. ``wb_err`` and
    ``sb_err`` are what it knows of write-back errors.
    """

    __slots__ = ("asks", "flags", "path", "pos", "sb_err", "silent", "state", "wb_err")

    state: str

    def __init__(self, path: Path, flags: int, silent: bool = False) -> None:
        self.path = path
        self.flags = flags
        self.silent = silent
        self.pos = self.asks = 0
        self.wb_err = self.sb_err = 0
        FILE.start(self)

    @property
    def readable(self) -> bool:
        """Whether it was opened for reading."""
        return self.flags & os.O_ACCMODE != os.O_WRONLY

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    def __repr__(self) -> str:
        return f"<File {self.path.dentry.name!r} {self.state}>"


FILE: Lifetime[File] = Lifetime(
    "File",
    states=("NEW", "OPEN", "CLOSED"),
    transitions={"open": "NEW -> OPEN", "refuse": "NEW -> CLOSED", "close": "OPEN -> CLOSED"},
    invariants={
        "an open file is referenced by nobody but leads to something": lambda f: (
            f.state != "OPEN" or (f.path.dentry.refs > 0 and f.path.mount.refs > 0)
        ),
    },
)
