"""capabilities: what can be watched here, found by trying.

Every trial makes a group of its own, asks the one thing, and closes the group; a mark goes with its
group, and none is ever a permission mark, so nobody waits for an answer that does not come.
"""

import os
from collections.abc import Callable

import msgspec

from fanwise._errors import FanwiseError, FilesystemRefuses, NotWatchable
from fanwise.kernel import fanotify as fan
from fanwise.kernel.caps import CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN, credentials
from fanwise.kernel.handles import name_to_handle
from fanwise.kernel.mounts import Mount, mount_of
from fanwise.kernel.native import why_pure
from fanwise.names.lookup import AT, open_mount, try_handles
from fanwise.sources.fanotify import (
    FILESYSTEM_MARK,
    MODEL_MASK,
    mark_filesystem,
)

from ._ladder import GUARANTEES, Choice, choose, why_not
from ._watch import real_path

_NAMES = fan.FAN_REPORT_DFID_NAME
_TARGET = fan.FAN_REPORT_DFID_NAME_TARGET
_LIMITS = ("max_queued_events", "max_user_groups", "max_user_marks")


class Feature(msgspec.Struct, frozen=True):
    """One thing that was tried: ``works``, or else the ``reason`` and, if there is one, the remedy.

    ``works`` is None, with a reason, when it could not be tried.
    """

    works: bool | None
    reason: str | None = None
    remedy: str | None = None


class Capabilities(msgspec.Struct, frozen=True):
    """What this kernel, this process and the filesystem of one path can do.

    ``path`` is resolved. ``rung`` is how `watch` serves it, ``"filesystem-mark"``,
    ``"detached-mount"``, ``"inode-marks"``, ``"proc-like"`` or ``"inotify"``, or None with the
    ``reason`` and the ``remedy``; ``refused`` says why each rung above it does not, and
    ``guarantees`` what this one keeps. ``fstype`` is the filesystem's type. ``features`` were
    tried, in the order in which one needs the other: ``target_fid`` (records name the object
    itself),
    ``unlimited_queue``, ``filesystem_mark``, ``rename`` (a rename is one record with both names),
    ``handles`` (files have handles) and ``open_by_handle``.

    ``decoder`` is ``"native"`` or ``"pure"``, and ``decoder_reason`` says why it is pure.
    ``capabilities`` are those held of the two that a watch needs, ``initial_namespace`` whether
    they count for the whole machine, ``seccomp`` whether a filter is installed. ``limits`` are the
    kernel's, by the name of their sysctl; one that cannot be read is missing.
    """

    path: str
    fstype: str
    rung: str | None
    reason: str | None
    remedy: str | None
    features: dict[str, Feature]
    decoder: str
    decoder_reason: str | None
    capabilities: tuple[str, ...]
    initial_namespace: bool
    seccomp: bool
    limits: dict[str, int]
    refused: dict[str, Feature]
    guarantees: dict[str, str]


def capabilities(path: str | os.PathLike[str]) -> Capabilities:
    """Try what can be done with ``path``; nothing of the trial stays.

    Raises NoSuchRoot when the path does not exist, PermissionNeeded when it may not be reached.
    Everything else that stands in the way is in the answer.
    Linux reference: fanotify_init(2), fanotify_mark(2).
    """
    real = real_path(path)
    mount = mount_of(real)
    rungs: list[str] = []
    features = {
        "target_fid": _try(lambda: _group(real, _TARGET)),
        "unlimited_queue": _try(lambda: _group(real, fan.FAN_UNLIMITED_QUEUE | fan.FAN_REPORT_FID)),
        "filesystem_mark": _try(lambda: rungs.append(_mark(real, mount))),
    }
    # A kernel may know the event while the filesystem takes no filesystem mark.
    # So does a subvolume, whose filesystem is marked by its top level.
    kind = fan.FAN_MARK_FILESYSTEM if rungs == [FILESYSTEM_MARK] else fan.FAN_MARK_INODE
    where = real if os.path.isdir(real) else os.path.dirname(real)
    features["rename"] = _try(lambda: _group(where, _NAMES, kind, fan.FAN_RENAME | fan.FAN_ONDIR))
    features["handles"] = _try(lambda: _handle(real, mount))
    features["open_by_handle"] = (
        _try(lambda: try_handles(mount))
        if features["handles"].works
        else Feature(None, "there is no handle to open")
    )
    try:
        choice = choose(real, mount)
        stop: NotWatchable | None = None if choice.rung else why_not(real, choice)
    except NotWatchable as error:
        choice, stop = Choice(None, {}), error
    rung = choice.rung.name if choice.rung else None
    if rung == FILESYSTEM_MARK and rungs:
        rung = rungs[0]
    creds = credentials()
    pure = why_pure()
    return Capabilities(
        path=real,
        fstype=mount.fstype,
        rung=rung,
        reason=stop.reason if stop else None,
        remedy=stop.remedy if stop else None,
        features=features,
        decoder="pure" if pure else "native",
        decoder_reason=pure,
        capabilities=tuple(
            name
            for bit, name in (
                (CAP_SYS_ADMIN, "CAP_SYS_ADMIN"),
                (CAP_DAC_READ_SEARCH, "CAP_DAC_READ_SEARCH"),
            )
            if creds.effective >> bit & 1
        ),
        initial_namespace=creds.initial,
        seccomp=creds.filtered,
        refused={
            name: Feature(
                False, getattr(error, "reason", str(error)), getattr(error, "remedy", None)
            )
            for name, error in choice.refused.items()
        },
        guarantees=dict(GUARANTEES[rung]) if rung else {},
        limits=_limits(),
    )


def _try(trial: Callable[[], object]) -> Feature:
    try:
        trial()
    except FanwiseError as error:
        return Feature(False, error.reason, error.remedy)
    except OSError as error:
        return Feature(False, error.strerror)
    return Feature(True)


def _group(path: str, flags: int, kind: int = 0, mask: int = 0) -> None:
    fd = fan.init(fan.FAN_CLASS_NOTIF | fan.FAN_CLOEXEC | fan.FAN_NONBLOCK | flags, path=path)
    try:
        if mask:
            fan.mark(fd, fan.FAN_MARK_ADD | kind, mask, path=path)
    finally:
        os.close(fd)


def _mark(path: str, mount: Mount) -> str:
    fd = fan.init(fan.FAN_CLASS_NOTIF | fan.FAN_CLOEXEC | fan.FAN_NONBLOCK | _NAMES, path=path)
    try:
        root = open_mount(mount, AT)
        try:
            return mark_filesystem(fd, MODEL_MASK & ~fan.FAN_RENAME, mount, root, path)
        finally:
            os.close(root)
    finally:
        os.close(fd)


def _handle(path: str, mount: Mount) -> None:
    try:
        name_to_handle(path)
    except FilesystemRefuses as error:
        raise FilesystemRefuses(path, f"{mount.fstype} has none that can be opened") from error


def _limits() -> dict[str, int]:
    limits = {}
    for name in _LIMITS:
        try:
            with open(f"/proc/sys/fs/fanotify/{name}", encoding="ascii") as file:
                limits[f"fs.fanotify.{name}"] = int(file.read())
        except OSError:
            continue  # no /proc, or an old kernel
    return limits
