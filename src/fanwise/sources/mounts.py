"""Mounts that come, go and move in this process's mount namespace.

Two ways of hearing of them, with one answer:

- mountinfo: poll(2) says that something changed, and the list is read again: a cost that grows with
  the number of mounts;
- mount events (a fanotify group with FAN_REPORT_MNT, a mark on the namespace): each names one
  mount, and only that one is asked about. It costs a kernel group, of which a user has 128.

The second is taken where there are many mounts and the kernel has it. Neither wakes anybody when a
directory above a mount point is renamed; `look` finds that.

REFS      the source owns its descriptors, and the list of mounts `there`.
LOCKING   none: one owner.
LIFETIME  see MOUNT_SOURCE. A forked child closes the kernel group at once.

Linux reference: fanotify_mark(2) (FAN_MARK_MNTNS), proc_pid_mountinfo(5), statmount(2).
"""

import os
import select
import weakref
from typing import Literal, NamedTuple

from fanwise._errors import NotWatchable
from fanwise.kernel.fanotify import (
    FAN_CLOEXEC,
    FAN_MARK_ADD,
    FAN_MARK_MNTNS,
    FAN_MNT_ATTACH,
    FAN_MNT_DETACH,
    FAN_NONBLOCK,
    FAN_Q_OVERFLOW,
    FAN_REPORT_MNT,
    init,
    mark,
)
from fanwise.kernel.mounts import Mount, describe, mounts, open_mountinfo
from fanwise.kernel.records import MountId, decode
from fanwise.lifetime import Lifetime

MANY = 256  # mounts, from which on each change is heard of by itself
_NAMESPACE = "/proc/self/ns/mnt"
_READ = 64 << 10  # bytes
_URGENT = select.POLLPRI | select.POLLERR

_live: "weakref.WeakSet[MountSource]" = weakref.WeakSet()


class MountChange(NamedTuple):
    """What became of one mount; ``before`` is how it was, of one that moved."""

    kind: Literal["attached", "detached", "moved"]
    mount: Mount
    before: Mount | None = None


class MountSource:
    """Hears of mounts. ``events``: True for mount events, False for mountinfo, None to choose.

    ``there`` are the mounts as of the last `read` or `look`. ``events`` says, once it is open,
    which way was taken.
    """

    state: str

    def __init__(self, events: bool | None = None) -> None:
        self.events = events
        self.there: list[Mount] = []
        self._unique: dict[int, Mount] = {}
        # One wakes. The other is of mountinfo: it is read again where no descriptor is left to open
        # another, and where there are no events it is polled here alone, which tells reliably.
        self._fd = self._second = -1
        self._poll = select.poll()
        MOUNT_SOURCE.start(self)

    def open(self) -> None:
        """Begin to listen, then read what is there.

        Raises OSError; NotWatchable when mount events were asked for and cannot be had.
        """
        try:
            if self.events is not False:
                self._open_events()
            self._second = open_mountinfo()
            if not self.events:
                self._fd = open_mountinfo()
                self._poll.register(self._second, _URGENT)
                self._poll.poll(0)
            self._take(mounts(self._second))
        except BaseException:
            self.close()
            raise
        _live.add(self)
        MOUNT_SOURCE.advance(self, "open")

    def _open_events(self) -> None:
        wanted = self.events
        self.events = False
        if wanted is None:
            there = mounts()
            # Without unique ids there are no mount events either.
            if len(there) < MANY or any(mount.unique_id is None for mount in there):
                return
        try:
            self._fd = init(FAN_REPORT_MNT | FAN_CLOEXEC | FAN_NONBLOCK, path=_NAMESPACE)
            namespace = os.open(_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
            try:
                mark(
                    self._fd,
                    FAN_MARK_ADD | FAN_MARK_MNTNS,
                    FAN_MNT_ATTACH | FAN_MNT_DETACH,
                    namespace,
                    about=_NAMESPACE,
                )
            finally:
                os.close(namespace)
        except NotWatchable:
            if wanted:
                raise
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            return  # the list tells the same, at a higher cost
        self._poll.register(self._fd, select.POLLIN)
        self.events = True

    @property
    def waits(self) -> tuple[int, int]:
        """The descriptor to wait on, and the epoll events to wait for: then call `read`."""
        return self._fd, select.EPOLLIN if self.events else select.EPOLLPRI | select.EPOLLERR

    def changed(self) -> bool:
        """Whether something changed since the last `read`; with mountinfo, it says so once."""
        return bool(self._poll.poll(0))

    def read(self) -> list[MountChange]:
        """Bring ``there`` up to date and return what changed, in the order of the new list."""
        if not self.events:
            return self.look()
        there = dict(self._unique)
        while True:
            try:
                data = os.read(self._fd, _READ)
            except BlockingIOError:
                break
            for record in decode(data):
                info = next((i for i in record.infos if isinstance(i, MountId)), None)
                again = (
                    info is not None and record.mask & FAN_MNT_ATTACH and info.unique_id in there
                )
                if info is None or again or record.mask & FAN_Q_OVERFLOW:
                    self._drain()
                    return self.look()  # one that moved takes along what is mounted on it
                if record.mask & FAN_MNT_DETACH:
                    there.pop(info.unique_id, None)
                else:
                    try:
                        there[info.unique_id] = describe(info.unique_id)
                    except NotWatchable:
                        continue  # gone again, or not ours to see
        return self._take(list(there.values()))

    def look(self) -> list[MountChange]:
        """Do the same by reading the whole list: also what moved with a directory above it."""
        return self._take(mounts(self._second))

    def listed(self) -> list[Mount]:
        """Read the list as it is now; ``there`` stays. No descriptor is opened."""
        return mounts(self._second)

    def _drain(self) -> None:
        try:
            while os.read(self._fd, _READ):
                pass
        except BlockingIOError:
            pass

    def _take(self, there: list[Mount]) -> list[MountChange]:
        before = {_known(mount): mount for mount in self.there}
        now = {_known(mount): mount for mount in there}
        changes = [MountChange("detached", was) for key, was in before.items() if key not in now]
        for key, mount in now.items():
            was = before.get(key)
            if was is None:
                changes.append(MountChange("attached", mount))
            elif was.mount_point != mount.mount_point:
                changes.append(MountChange("moved", mount, was))
        self.there = there
        self._unique = {m.unique_id: m for m in there if m.unique_id is not None}
        return changes

    def close(self) -> None:
        """Close the descriptors; idempotent."""
        for fd in (self._fd, self._second):
            if fd >= 0:
                os.close(fd)
        self._fd = self._second = -1
        _live.discard(self)
        if self.state != "CLOSED":
            MOUNT_SOURCE.advance(self, "close")


MOUNT_SOURCE: Lifetime[MountSource] = Lifetime(
    "MountSource",
    states=("NEW", "OPEN", "CLOSED"),
    transitions={"open": "NEW -> OPEN", "close": "NEW, OPEN -> CLOSED"},
    invariants={
        "one that listens has a descriptor": lambda s: s.state != "OPEN" or s._fd >= 0,
        "one that is closed has none": lambda s: s.state != "CLOSED" or s._fd < 0,
    },
)


def _known(mount: Mount) -> tuple[object, ...]:
    # By what a mount is known again. Its id is reused; a bind mount over itself has the same root.
    return (mount.unique_id,) if mount.unique_id is not None else (mount.id, mount.dev, mount.root)


def _after_fork() -> None:
    for source in list(_live):
        source.close()


os.register_at_fork(after_in_child=_after_fork)
