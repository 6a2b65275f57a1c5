"""Change: what a watch tells, and its kinds."""

import os

import msgspec

from fanwise.kernel import fanotify as fan

from ._process import Process

# The kinds that records can hold, in the order in which one change names them, and their bits.
_BITS = {
    "created": fan.FAN_CREATE,
    "modified": fan.FAN_MODIFY,
    "written": fan.FAN_CLOSE_WRITE,
    "attributes": fan.FAN_ATTRIB,
    "renamed": fan.FAN_RENAME,
    "deleted": fan.FAN_DELETE,
    "opened": fan.FAN_OPEN,
    "accessed": fan.FAN_ACCESS,
    "executed": fan.FAN_OPEN_EXEC,
}
KINDS = tuple(_BITS)
DEFAULT_KINDS = KINDS[:6]
_READS = frozenset(("opened", "accessed"))
# Told of a root whatever is asked for: they end its stream, or change what it means.
MOUNT_KINDS = ("mounted", "unmounted")

# By kernel._pure_decode.kind_index: bit i of the index is the i-th kind.
KIND_TABLE = [tuple(kind for i, kind in enumerate(KINDS) if index >> i & 1) for index in range(512)]


def mask_of(kinds: tuple[str, ...]) -> int:
    """Return the event bits of some kinds; those of mounts have none."""
    mask = 0
    for kind in kinds:
        mask |= _BITS.get(kind, 0)
    return mask


def own_work_shows(mask: int) -> bool:
    """Say whether looking at a watched filesystem raises some of these events."""
    return bool(mask & (fan.FAN_OPEN | fan.FAN_ACCESS))  # fanwise executes nothing there


class Change(
    msgspec.Struct,
    frozen=True,
    gc=False,
    omit_defaults=True,
    tag="change",
    tag_field="type",
    rename={"is_dir": "dir"},
):
    """One change, as the kernel recorded it: one object, one name, one process, one or more kinds.

    ``kinds``: what happened, of ``created modified written attributes renamed deleted`` and, when
    asked for, ``opened accessed executed``; or one of ``mounted unmounted lost relisted
    repaired``. The kernel merges what happens to a name before it is read, so that a new file that
    was written and closed is one change ``("created", "modified", "written")``; the order of kinds
    says nothing.

    ``path``: absolute, the path that the object had when it happened. A rename is one change with
    ``old_path`` and ``path``; a move into the watched tree is ``created``, out of it ``deleted``.
    ``path_source`` is ``"exact"``, or ``"current"`` (a path that was right a moment later, or while
    the tree is read again after a loss), or ``"unknown"``: then ``path`` is only the last name.

    ``is_dir``: whether it is a directory. ``pid``: the process that did it (0 when not known).
    ``identity``: names the object for as long as its filesystem is mounted; see `identity`.
    ``time``: seconds since the epoch, of reading; the kernel gives none.

    ``process``: with ``who``, the process of that pid; see `Process`. None when ``pid`` is 0.

    ``replaced``: the identity of the object that a rename put out of its name, None when there was
    none or it is not known. ``unlinked``: done through an open file whose name was deleted before.
    ``exists``: for created and deleted in one change, how it ended. ``correction``: told because
    the order of merged records was unknowable and the disk said otherwise.

    Of ``lost``: ``roots`` are the watched paths below which changes were lost, ``count`` how many
    records (None when the kernel did not say), ``source`` ``"ring"``, ``"kernel"`` or
    ``"stopped"``. On rungs with a mark for each directory also ``"denied"``, ``"limit"`` or an
    errno's name: the directory ``path`` came and could not be marked, so that nothing is told of
    what is in it. Of ``relisted``, which follows for each directory affected: ``names``, all names
    in it now, a directory's with a slash at the end; what a consumer believed below other names is
    gone. Of ``repaired``, the end: ``roots``, and ``count``, how many changes the repair told.

    With ``index`` the differences follow a loss instead of ``relisted``, with ``pid`` 0.
    ``inferred``: that it changed is concluded from its size and times. ``baseline`` is
    ``"incomplete"`` in the ``lost`` and ``repaired`` of a loss before `Watch.scanned`: what changed
    in directories that had not been listed by then is not told.
    """

    kinds: tuple[str, ...]
    path: str
    old_path: str | None
    is_dir: bool
    pid: int
    identity: str | None
    time: float
    path_source: str
    replaced: str | None = None
    unlinked: bool = False
    exists: bool | None = None
    correction: bool = False
    roots: tuple[str, ...] | None = None
    count: int | None = None
    source: str | None = None
    process: Process | None = None
    names: tuple[str, ...] | None = None
    inferred: bool = False
    baseline: str | None = None


def own_dropped(rows: list[Change]) -> list[Change]:
    """Leave out what this process opened and read of directories, as marking them does."""
    pid = os.getpid()
    out = []
    for row in rows:
        if row.is_dir and row.pid == pid and not _READS.isdisjoint(row.kinds):
            kinds = tuple(kind for kind in row.kinds if kind not in _READS)
            if kinds:
                out.append(msgspec.structs.replace(row, kinds=kinds))
        else:
            out.append(row)
    return out
