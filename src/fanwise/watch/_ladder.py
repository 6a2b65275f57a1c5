"""The ladder: by which means a path is watched, found by trying, and what each rung keeps.

From the top: a filesystem mark; marks on single directories; those on a proc-like filesystem, which
tells no names; inotify. A rung is left for the next only where it cannot work here; a limit that is
used up is no reason, because a lower rung would hide it.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from fanwise._errors import (
    FanwiseError,
    FeatureMissing,
    FilesystemRefuses,
    LimitReached,
    NotWatchable,
    PermissionNeeded,
    SyscallBlocked,
)
from fanwise.kernel import fanotify as fan
from fanwise.kernel.caps import CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN, credentials
from fanwise.kernel.handles import identify
from fanwise.kernel.mounts import Mount
from fanwise.names.lookup import AT, open_mount, try_handles
from fanwise.sources import inotify
from fanwise.sources.fanotify import MODEL_MASK, DirectorySource, FanotifySource, mark_filesystem
from fanwise.sources.inotify import InotifySource

# Filesystems whose names come and go by themselves: measured, neither a mark nor a watch hears of
# it (fusectl: of those that come). Opens, reads and writes are told. Names are told, by the same
# measure, on debugfs, tracefs (its instances), devpts, bpf, cgroup, cgroup2, cpuset, mqueue,
# hugetlbfs, ramfs and devtmpfs.
PROC_LIKE = frozenset(("proc", "sysfs", "fusectl"))
PROC_KINDS = ("opened", "accessed", "modified", "written", "attributes", "executed")
NAME_KINDS = ("created", "renamed", "deleted")


class Rung(NamedTuple):
    """One rung: its name, whether each directory has a mark, what makes its source."""

    name: str
    marks: bool
    source: Callable[..., Any]  # arguments as of FanotifySource
    limit: Callable[[str], LimitReached]


def _mark_limit(path: str) -> LimitReached:
    return LimitReached(
        path,
        "fs.fanotify.max_user_marks",
        "each directory takes a mark, and this user has as many as fs.fanotify.max_user_marks"
        " allows",
    )


def _watch_limit(path: str) -> LimitReached:
    return LimitReached(
        path,
        "fs.inotify.max_user_watches",
        "each directory takes a watch, and this user has as many as fs.inotify.max_user_watches"
        " allows",
    )


def _unlimited() -> bool:
    return credentials().holds(CAP_SYS_ADMIN)


def _directory_source(
    path: str, mount: Mount, open_mount: Callable[[], int], mask: int, ring: int, parts: Any
) -> DirectorySource:
    return DirectorySource(path, mount, open_mount, mask, ring, parts, _unlimited())


FILESYSTEM_MARK = Rung("filesystem-mark", False, FanotifySource, _mark_limit)
INODE_MARKS = Rung("inode-marks", True, _directory_source, _mark_limit)
PROC = INODE_MARKS._replace(name="proc-like")
INOTIFY = Rung("inotify", True, InotifySource, _watch_limit)
RUNGS = {rung.name: rung for rung in (FILESYSTEM_MARK, INODE_MARKS, PROC, INOTIFY)}


# What each rung keeps, by what is asked of it; the docs and `fanwise doctor` show this and no other
# table.
_MARKED = {
    "names": "created, renamed and deleted with the exact path; a rename is one change",
    "cost": "a mark and an open for each directory, before the watch is ready",
    "new directories": "marked when they are told; what was made inside before that is told as"
    " created, once, with path_source current and no pid, and not what was written to it",
    "moved in": "the directory is told; all of it is marked before that",
    "moved out": "the directory is told as deleted; its marks stay until the watch ends: nothing"
    " tells where to they could be taken off. Each keeps the inode in memory, counts against the"
    " limit, and what it tells is read and dropped",
    "unreadable directories": "named in unwatched at the start, told as lost with source denied"
    " later",
    "replaced": "not told, but of directories",
    "unlinked": "for the last 4,096 names deleted",
    "roots that move": "followed where the directories above them may be read; one that moves"
    " among what is lost is told as deleted",
    "after delete": "the name is gone or leads to something new",
    "opened, accessed": "all but what the watching process opens and reads of directories",
}
GUARANTEES: dict[str, dict[str, str]] = {
    "filesystem-mark": {
        "needs": "CAP_SYS_ADMIN, CAP_DAC_READ_SEARCH and a filesystem whose handles open",
        "names": "created, renamed and deleted with the exact path; a rename is one change",
        "pids": "of every process",
        "identity": "of files and directories",
        "loss": "the kernel's queue has no limit; what a full ring discards is told, and counted",
        "limits": "fs.fanotify.max_user_groups: one group",
        "cost": "one mark; ready in milliseconds at any size",
        "new directories": "everything in them is told",
        "moved in": "the directory is told",
        "moved out": "the directory is told as deleted",
        "unreadable directories": "there are none",
        "replaced": "told where it is sure",
        "unlinked": "told while the file is open",
        "roots that move": "followed on their filesystem",
        "after delete": "the name is gone or leads to something new",
        "opened, accessed": "all but what the watch itself does",
    },
    "detached-mount": {
        "needs": "as filesystem-mark; a btrfs subvolume",
        "otherwise": "as filesystem-mark: its top level is marked, and mounted nowhere",
    },
    "inode-marks": {
        **_MARKED,
        "needs": "to read the directories; a filesystem with file handles, also ones that only"
        " identify",
        "pids": "with CAP_SYS_ADMIN of every process; else of this one, 0 for others, and who and"
        " ignore_pids are refused",
        "identity": "of files and directories; on FUSE as long as the kernel keeps the inode",
        "loss": "with CAP_SYS_ADMIN as filesystem-mark; without, the kernel's queue ends at"
        " fs.fanotify.max_queued_events, which is told without a count",
        "limits": "without CAP_SYS_ADMIN fs.fanotify.max_user_marks: LimitReached at the start,"
        " lost with source limit later",
        "hard links": "on FUSE what its server makes of them: one that takes two links for two"
        " files reports a rename of one to the other, which does nothing",
        "below a root": "a FUSE mount below a root is named in unwatched, because its server could"
        " hold up the watch; given as a path of its own it is watched",
        "subvolumes": "below the top level of a btrfs they are named in unwatched, and one that is"
        " made later is told as lost with source EXDEV: their marks do not go together. A watch of"
        " its own serves them; how one moves in the top level is not followed",
        "behind it": "changes of the lower filesystem that do not come through this mount are not"
        " told (overlay, FUSE)",
    },
    "proc-like": {
        "needs": "to read the directories",
        "names": "none: created, renamed and deleted are refused",
        "pids": "with CAP_SYS_ADMIN of every process; else of this one, 0 for others, and who and"
        " ignore_pids are refused",
        "identity": "of files and directories, as long as the kernel keeps the inode",
        "loss": "as inode-marks",
        "limits": "as inode-marks",
        "cost": "a mark and an open for each directory, before the watch is ready",
        "served": "proc, sysfs and fusectl (which tells what goes, and not what comes)",
        "new directories": "not watched: nothing tells of them",
        "unreadable directories": "named in unwatched",
        "opened, accessed": "all but what the watching process opens and reads of directories",
    },
    "inotify": {
        **_MARKED,
        "needs": "to read the directories, and file handles that identify them",
        "pids": "none: 0; who and ignore_pids are refused",
        "identity": "of directories",
        "loss": "the kernel's queue ends at fs.inotify.max_queued_events, also while the consumer"
        " does not read; told without a count",
        "limits": "fs.inotify.max_user_watches: LimitReached at the start, lost with source limit"
        " later; fs.inotify.max_user_instances",
        "moved out": "the directory is told as deleted; its watches are taken off",
        "exchanged": "directories that change places before one of them is marked cannot be told"
        " from a rename there and back: corrected, and what is in the new one is not told",
        "renamed while repaired": "a directory that is renamed, more than once, while its watch is"
        " set again after a loss may stay without one, which is not told",
        "replaced": "not told",
        "unlinked": "not told",
        "roots that move": "not followed: a removed root ends, a moved one goes on with its"
        " old path until a loss, and is told as deleted then",
        "opened, accessed": "of files only; executed is refused",
    },
}


class Choice(NamedTuple):
    """The rung that serves a path, or None; and why each one above it does not."""

    rung: Rung | None
    refused: dict[str, FanwiseError]


def choose(path: str, mount: Mount, forced: str | None = None) -> Choice:
    """Try the rungs for a real path, from the top; nothing of the trial stays.

    Raises LimitReached, and NoSuchRoot when the path goes meanwhile.
    """
    refused: dict[str, FanwiseError] = {}
    if forced is not None and forced not in RUNGS:
        raise FanwiseError(
            f"FANWISE_RUNG: there is no rung {forced!r}", f"rungs are: {', '.join(RUNGS)}"
        )
    for rung, trial in _TRIALS:
        if forced is not None and rung.name != forced:
            continue
        try:
            trial(path, mount)
        except LimitReached:
            raise
        except (PermissionNeeded, FilesystemRefuses, SyscallBlocked, FeatureMissing) as error:
            refused[rung.name] = error
            continue
        return Choice(rung, refused)
    return Choice(None, refused)


def _filesystem_mark(path: str, mount: Mount) -> None:
    flags = fan.FAN_REPORT_DFID_NAME_TARGET | fan.FAN_UNLIMITED_QUEUE
    group = fan.init(fan.FAN_CLASS_NOTIF | fan.FAN_CLOEXEC | fan.FAN_NONBLOCK | flags, path=path)
    try:
        fd = open_mount(mount, AT)
        try:
            mark_filesystem(group, MODEL_MASK, mount, fd, path)
        finally:
            os.close(fd)
    finally:
        os.close(group)
    # The kernel took the mark, so its handles open, for whoever may: the trial itself is an open,
    # which another group on that filesystem would tell.
    creds = credentials()
    if creds.holds(CAP_DAC_READ_SEARCH) and not creds.filtered:
        return
    try_handles(mount)


def _inode_marks(path: str, mount: Mount) -> None:
    where = path if os.path.isdir(path) else os.path.dirname(path)
    mask = MODEL_MASK | fan.FAN_EVENT_ON_CHILD
    _group(where, fan.FAN_REPORT_DFID_NAME_TARGET, fan.FAN_MARK_INODE, mask)


def _proc_like(path: str, mount: Mount) -> None:
    if mount.fstype not in PROC_LIKE:
        raise FilesystemRefuses(path, f"{mount.fstype} is not proc-like")
    _inode_marks(path, mount)


def _named(path: str, mount: Mount) -> None:
    if mount.fstype in PROC_LIKE:
        raise FilesystemRefuses(path, f"{mount.fstype} tells nothing of names that come and go")
    _inode_marks(path, mount)


def _inotify(path: str, mount: Mount) -> None:
    if mount.fstype in PROC_LIKE:
        raise FilesystemRefuses(path, f"inotify is not tried on {mount.fstype}")
    identify(path)
    where = path if os.path.isdir(path) else os.path.dirname(path)
    fd = inotify.init(path)
    try:
        inotify.add(fd, where)
    finally:
        os.close(fd)


def _group(path: str, flags: int, kind: int, mask: int) -> None:
    fd = fan.init(fan.FAN_CLASS_NOTIF | fan.FAN_CLOEXEC | fan.FAN_NONBLOCK | flags, path=path)
    try:
        fan.mark(fd, fan.FAN_MARK_ADD | kind, mask, path=path)
    finally:
        os.close(fd)


_TRIALS: tuple[tuple[Rung, Callable[[str, Mount], None]], ...] = (
    (FILESYSTEM_MARK, _filesystem_mark),
    (INODE_MARKS, _named),
    (PROC, _proc_like),
    (INOTIFY, _inotify),
)


def check_asked(
    path: str, mount: Mount, rung: Rung, kinds: tuple[str, ...], pids: tuple[int, ...], who: bool
) -> None:
    """Refuse what a rung cannot tell. Raises FilesystemRefuses, PermissionNeeded."""
    others = [pid for pid in pids if pid != os.getpid()]
    blind = rung.name == INOTIFY.name
    if who and (blind or (rung.marks and not _unlimited())):
        raise PermissionNeeded(
            path,
            "the kernel does not say here which process did it"
            + ("" if blind else ", but for this one"),
            "leave out who, or run as root",
        )
    if (blind and pids) or (rung.marks and others and not _unlimited()):
        raise PermissionNeeded(
            path,
            f"the kernel does not say here which process did it, so that {pids[0]} cannot be"
            " ignored",
            "leave out ignore_pids, or run as root",
        )
    if rung.name == INOTIFY.name and "executed" in kinds:
        raise FilesystemRefuses(
            path, "inotify does not tell what is executed", "leave out the kind: executed"
        )
    if rung.name != PROC.name:
        return
    never = [kind for kind in kinds if kind in NAME_KINDS]
    if never:
        raise FilesystemRefuses(
            path,
            f"{mount.fstype} does not tell what is {', '.join(never)}: its names come and go"
            " by themselves",
            f"ask for kinds that it tells: {', '.join(PROC_KINDS)}",
        )


def check_readable(path: str) -> None:
    """Refuse a root that cannot be marked by itself, without the cost of a trial.

    Raises PermissionNeeded.
    """
    where = path if os.path.isdir(path) else os.path.dirname(path)
    if not os.access(where, os.R_OK, effective_ids=True):
        raise PermissionNeeded(
            path,
            "a mark needs permission to read the directory",
            "change its mode, or run with CAP_DAC_READ_SEARCH",
        )


def why_not(path: str, choice: Choice) -> NotWatchable:
    """Make the error for a path that no rung serves: that of the last one tried."""
    for error in reversed(choice.refused.values()):
        if isinstance(error, NotWatchable):
            return error
    return FilesystemRefuses(path, "no means of watching serves it")
