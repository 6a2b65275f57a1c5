"""What PATHs select: a `notify` group for each, with an FS_ERROR mark on what it is.

An incident of an inode is told at once, as "unknown" while nobody knows where the inode is, and
what lies above its path is asked of a helper: the answer corrects that. Where nobody can tell
(the filesystem hangs) names are compared.

REFS      a Selection owns its groups and, through Locate, its helpers.
LOCKING   none: one owner.
LIFETIME  until `close`; nothing starts before the first incident that has to be placed.
"""

import os
import select
import time
from collections.abc import Iterable
from typing import Literal

from fanwise.health._below import Below
from fanwise.health._filesystems import readable
from fanwise.health._incident import Incident
from fanwise.health._locate import Above, Locate, Question
from fanwise.health._target import DEADLINE, Target, targets

Applies = Literal["object", "fs", "unknown", "elsewhere"]

_MOST = 10_000  # paths that are remembered
_BEST: tuple[Applies, ...] = ("object", "fs", "unknown", "elsewhere")


class Selection:
    """What ``paths`` select: whole filesystems, or what lies below a directory of one.

    ``points`` are the mount points of the filesystems, None for all. Raises NoSuchRoot for a path
    that is not there.
    """

    def __init__(
        self, paths: Iterable[str | os.PathLike[str]] = (), deadline: float = DEADLINE
    ) -> None:
        self.targets: tuple[Target, ...] = targets(paths, deadline)
        self.paths = tuple(target.path for target in self.targets)
        self.points = {target.mount.mount_point for target in self.targets} or None
        self._below = [(target, Below(target)) for target in self.targets]
        self._locate = Locate(seconds=deadline / 2, margin=0.0)
        # What lies above a path: None while it is asked, () where nobody can tell.
        self._above: dict[tuple[str, str], Above | None] = {}
        self._answered = False

    def applies(self, incident: Incident) -> Applies | None:
        """Say how it concerns the paths; None for another filesystem's. Never waits.

        "object": it is of what was asked for, or below it. "fs": it is about the whole filesystem.
        "unknown": of an object of which it is not known (yet) where it is. "elsewhere": it is of
        another part of the filesystem.
        """
        if not self.targets:
            return "fs"
        said = {self._of_one(target, below, incident) for target, below in self._below}
        return next((one for one in _BEST if one in said), None)

    def _of_one(self, target: Target, below: Below, incident: Incident) -> Applies | None:
        point = readable(os.fsdecode(target.mount.mount_point))
        if target.device != incident.fs.device and point not in incident.fs.mounts:
            return None
        ino, path = incident.object.ino, incident.object.path
        ino = ino if incident.scope == "inode" else None
        above: Above | None = None
        if ino is not None and path is not None and not target.whole:
            # Where the filesystem does not say what the path is, there is nothing to ask for.
            above = () if target.key is None else self._above_of(incident)
            if above is not None and not any(above):
                return "object" if _inside(path, target) else "elsewhere"
        below.send(target.device, ino, path, above=above, errno=0)
        for seen in below.read():
            if seen.scope == "unplaced":
                return "unknown"
            return "fs" if ino is None else "object"
        return "elsewhere"

    def _above_of(self, incident: Incident) -> Above | None:
        asked = incident.fs.device, incident.object.path or ""
        if asked not in self._above:
            if len(self._above) >= _MOST:
                self._above.clear()
            self._above[asked] = None
            self._locate.submit(
                Question(
                    tag="\0".join(asked), device=incident.fs.device, point=b"", ino=0,
                    fstype=incident.fs.fstype or "", path=os.fsencode(asked[1]),
                )
            )  # fmt: skip
            self._take()  # nobody may be there to answer
        return self._above[asked]

    def placed(self) -> bool:
        """Say whether answers came since the last call: then `applies` may say something else."""
        self._take()
        answered, self._answered = self._answered, False
        return answered

    def _take(self) -> None:
        for answer in self._locate.results():
            device, _, path = answer.tag.partition("\0")
            self._above[device, path] = answer.above[0] if answer.above else ()
            self._answered = True

    def places(self, incident: Incident) -> bool:
        """Say whether it is being asked where the path of an incident is."""
        path = incident.object.path
        return path is not None and self._above.get((incident.fs.device, path), ()) is None

    @property
    def asks(self) -> bool:
        """Whether an answer is waited for."""
        return self._locate.until is not None

    def filenos(self) -> list[int]:
        """Descriptors that are readable when an answer came."""
        return self._locate.filenos()

    def settle(self, deadline: float) -> None:
        """Wait for the answers to what `applies` asked, ``deadline`` seconds at most."""
        until = time.monotonic() + deadline
        while self.asks and (left := until - time.monotonic()) > 0:
            select.select(self.filenos(), (), (), min(left, 0.1))
            self._take()

    def close(self) -> None:
        """End the helpers and the groups; idempotent."""
        self._locate.close()
        for _, below in self._below:
            below.close()
        self._below = []


# By names alone, from the filesystem's root.
def _inside(path: str, target: Target) -> bool:
    wanted = readable(target.path)
    return path == wanted or path.startswith(f"{wanted.rstrip('/')}/")
