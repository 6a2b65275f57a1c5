"""Masks: the event bits of fanotify, named without their prefix, and which objects each goes to.

Linux reference: include/uapi/linux/fanotify.h, include/linux/fsnotify_backend.h.
"""

from fanwise._errors import MarkRefused
from fanwise.kernel import fanotify as fan

NAMES = {name.removeprefix("FAN_"): bit for bit, name in fan.EVENTS.items()}
"""Every bit by its name, in the order of the bits; plain integers, never an enum."""

ACCESS = fan.FAN_ACCESS
MODIFY = fan.FAN_MODIFY
ATTRIB = fan.FAN_ATTRIB
CLOSE_WRITE = fan.FAN_CLOSE_WRITE
CLOSE_NOWRITE = fan.FAN_CLOSE_NOWRITE
OPEN = fan.FAN_OPEN
MOVED_FROM = fan.FAN_MOVED_FROM
MOVED_TO = fan.FAN_MOVED_TO
CREATE = fan.FAN_CREATE
DELETE = fan.FAN_DELETE
DELETE_SELF = fan.FAN_DELETE_SELF
MOVE_SELF = fan.FAN_MOVE_SELF
OPEN_EXEC = fan.FAN_OPEN_EXEC
Q_OVERFLOW = fan.FAN_Q_OVERFLOW
FS_ERROR = fan.FAN_FS_ERROR
OPEN_PERM = fan.FAN_OPEN_PERM
ACCESS_PERM = fan.FAN_ACCESS_PERM
OPEN_EXEC_PERM = fan.FAN_OPEN_EXEC_PERM
PRE_ACCESS = fan.FAN_PRE_ACCESS
MNT_ATTACH = fan.FAN_MNT_ATTACH
MNT_DETACH = fan.FAN_MNT_DETACH
EVENT_ON_CHILD = fan.FAN_EVENT_ON_CHILD
RENAME = fan.FAN_RENAME
ONDIR = fan.FAN_ONDIR

DIRENT = CREATE | DELETE | MOVED_FROM | MOVED_TO | RENAME
"""Changes of a directory's entries: told to the directory, never to a parent or the entry itself
(ALL_FSNOTIFY_DIRENT_EVENTS)."""

ON_CHILD = ACCESS | MODIFY | ATTRIB | CLOSE_WRITE | CLOSE_NOWRITE | OPEN | OPEN_EXEC
"""What a directory can be told of its children (FS_EVENTS_POSS_ON_CHILD)."""

SELF = DELETE_SELF | MOVE_SELF
"""Told to the object alone: no name, no parent."""

EVENTS = DIRENT | ON_CHILD | SELF
"""What is done to objects."""

REPORTED = EVENTS | FS_ERROR
"""What a mark can ask for."""

FLAGS = EVENT_ON_CHILD | ONDIR
"""What is no event: whether a mark cares about its children, and about directories."""

PERMISSION = OPEN_PERM | ACCESS_PERM | OPEN_EXEC_PERM | PRE_ACCESS
"""What waits for a verdict (FANOTIFY_PERM_EVENTS)."""

OF_FILES = ACCESS | MODIFY | CLOSE_WRITE | CLOSE_NOWRITE | OPEN | OPEN_EXEC
"""What is done with open files: all that a group which gives verdicts is told besides
(FANOTIFY_PATH_EVENTS)."""

MARKED = REPORTED | PERMISSION
"""The events of a mark's mask."""

OF_MOUNTS = MNT_ATTACH | MNT_DETACH


def show(mask: int) -> str:
    """Return a mask as text such as ``CREATE|ONDIR``; bits without a name are hexadecimal."""
    words = [name for name, bit in NAMES.items() if mask & bit]
    if rest := mask & ~sum(NAMES.values()):
        words.append(hex(rest))
    return "|".join(words) or "0"


def parse(text: str) -> int:
    """Return the mask of a text such as ``CREATE|ONDIR``.

    Raises MarkRefused for a word that is no bit's name.
    """
    mask = 0
    for word in text.split("|"):
        bit = NAMES.get(word.strip())
        if bit is None:
            raise MarkRefused(
                f"no event is named {word.strip()!r}", f"valid are: {', '.join(NAMES)}"
            )
        mask |= bit
    return mask
