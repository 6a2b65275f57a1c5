"""The filesystems that are mounted here, and what each one is.

Mountinfo says which there are, sysfs what they stand on, and a helper process (see _probe) asks
each for its UUID, because asking may hang. Until that is answered, or is late, what is told of the
filesystem waits: device numbers are used again, and its incidents must not be another's.

REFS      each `Known` owns its probe.
LOCKING   none: one owner.
LIFETIME  a `Known` lives while its filesystem is mounted; `close` closes the probes.
"""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from fanwise.health._incident import Filesystem
from fanwise.health._observe import Dev, Observation
from fanwise.health._probe import DEADLINE, Finding, Probe
from fanwise.kernel.mounts import Mount
from fanwise.sources.counters import Layer, Place, place_of
from fanwise.sources.fserror import is_local

MOST_AT_ONCE = 8  # helper processes


class Known:
    """A mounted filesystem.

    ``fs`` is how incidents name it. It is not `identified` before its first probe answered or was
    late; ``waiting`` are the records that came until then. ``next`` is when it is probed again.
    """

    def __init__(self, mounts: list[Mount], deadline: float, clock: Callable[[], float]) -> None:
        self.dev = mounts[0].dev
        self.waiting: list[Observation] = []
        self.identified = False
        self.uuid: str | None = None
        self.label: str | None = None
        self.next = 0.0
        self.due: float | None = None  # when its counters are to be read, out of turn
        self._deadline, self._clock = deadline, clock
        self.probe: Probe | None = None
        self.take(mounts)

    def take(self, mounts: list[Mount]) -> bool:
        """Take its mounts as they are now; say whether what names it changed."""
        before = getattr(self, "fs", None)
        self.mounts = mounts
        self.fstype = mounts[0].fstype
        self.place = place_of(mounts[0])
        self._describe()
        point = mounts[0].mount_point
        if self.probe is None or self.probe.point != os.fsdecode(point):
            if self.probe is not None:
                self.probe.close()
            self.probe = Probe(self.fstype, point, self._deadline, self._clock)
        return before != self.fs

    def found(self, finding: Finding) -> bool:
        """Take what the probe found; say whether what names it changed."""
        before = self.fs
        self.uuid = finding.uuid or self.uuid
        self.label = finding.label if finding.state == "ok" else self.label
        self._describe()
        return before != self.fs

    def of_its_own(self, finding: Finding) -> Finding:
        """Give the finding; "unknown" when another filesystem was looked at.

        A helper goes by the name of the mount point: what was mounted there may be gone by then, or
        covered.
        """
        here = finding.mount is None or finding.mount in {mount.id for mount in self.mounts}
        return finding if here else Finding("unknown")

    @property
    def life(self) -> int:
        """Which life of the superblock is the present one, see `Check`; 0 where not known."""
        try:
            return os.stat(self.place.directory).st_ino if self.place.directory else 0
        except OSError:
            return 0  # just unmounted

    def _describe(self) -> None:
        self.fs = describe(
            self.dev, self.place, self.mounts, self.uuid or self.place.uuid, self.label
        )

    @property
    def readable(self) -> Mount:
        """The mount whose line says what state it is in: any of them does."""
        return self.mounts[0]


def describe(
    dev: Dev,
    place: Place,
    mounts: Iterable[Mount] = (),
    uuid: str | None = None,
    label: str | None = None,
) -> Filesystem:
    """Say how incidents name a filesystem, or a device without one."""
    return Filesystem(
        device=f"{dev[0]}:{dev[1]}",
        fstype=place.fstype or None,
        uuid=uuid,
        label=label,
        name=place.layers[0].name if place.layers else None,
        stack=tuple(_layer(layer) for layer in place.layers),
        devices=tuple(dict.fromkeys(layer.dev for layer in place.layers)),
        mounts=tuple(dict.fromkeys(readable(os.fsdecode(m.mount_point)) for m in mounts)),
    )


def _layer(layer: Layer) -> str:
    return f"{layer.kind} {layer.name}" + (f" ({layer.detail})" if layer.detail else "")


def readable(text: str) -> str:
    """Return the text as JSON can carry it: what is not UTF-8 is replaced."""
    return os.fsencode(text).decode(errors="replace")


def device_of(dev: Dev) -> Filesystem | None:
    """Describe a block device that no filesystem is mounted from; None when it is gone."""
    here = Path(f"/sys/dev/block/{dev[0]}:{dev[1]}")
    if not here.exists() or (
        (here / "loop").parent.name.startswith("loop") and not (here / "loop").is_dir()
    ):
        return None
    mount = Mount(0, 0, dev, b"/", b"/", (), (), "", b"", ())
    return describe(dev, place_of(mount))


class Filesystems:
    """Every filesystem of this machine's devices that is mounted, by its superblock's device.

    ``points`` restricts it to the filesystems that are mounted there. ``checks``: each is asked
    when it was checked last, until it is identified.
    """

    def __init__(
        self,
        points: Iterable[bytes] | None = None,
        deadline: float = DEADLINE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.checks = True
        self.points = None if points is None else frozenset(points)
        self.known: dict[Dev, Known] = {}
        self._deadline, self._clock = deadline, clock
        self._asked: list[Known] = []

    def local(self, there: Iterable[Mount]) -> list[Mount]:
        """Of these mounts, those that are looked after, those that can be reached first."""
        found = [mount for mount in there if is_local(mount)]
        if self.points is not None:
            # The last that is mounted on a point covers those before it.
            top = {m.mount_point: m for m in there if m.mount_point in self.points}
            devs = {mount.dev for mount in top.values()}
            found = [mount for mount in found if mount.dev in devs]
        over = {mount.mount_point: mount for mount in there}
        return sorted(
            found, key=lambda m: (over[m.mount_point] is not m, m.root != b"/", len(m.mount_point))
        )

    def update(self, there: list[Mount]) -> tuple[list[Known], list[Known], list[Known]]:
        """Take the mounts as they are; give those that came, those that changed, those that went.

        Those that went are closed.
        """
        by_dev: dict[Dev, list[Mount]] = {}
        for mount in self.local(there):
            by_dev.setdefault(mount.dev, []).append(mount)
        came, changed = [], []
        went = [self.known.pop(dev) for dev in list(self.known) if dev not in by_dev]
        for dev, mounts in by_dev.items():
            known = self.known.get(dev)
            if known is not None and _same_superblock(known, mounts):
                if known.take(mounts):
                    changed.append(known)
                continue
            if known is not None:
                went.append(self.known.pop(dev))
            known = self.known[dev] = Known(mounts, self._deadline, self._clock)
            came.append(known)
        for known in went:
            if known.probe is not None:
                known.probe.close()
            if known in self._asked:
                self._asked.remove(known)
        return came, changed, went

    def ask(self, now: float, again: float) -> list[Known]:
        """Start the probes that are due, a few at a time; give those that were started.

        Raises FanwiseError when no helper can be started.
        """
        started = []
        # Who waits longest is asked first: no other keeps it from saying who it is.
        for known in sorted(self.known.values(), key=lambda k: (k.identified, k.next)):
            if self._busy() >= MOST_AT_ONCE:
                break
            if known.next <= now and known not in self._asked and known.probe is not None:
                known.next = now + again
                if known.probe.ask(self.checks and not known.identified):
                    self._asked.append(known)
                    started.append(known)
        return started

    def answers(self) -> list[tuple[Known, Finding]]:
        """Return what was found since; each answer, or that it is late, once."""
        found = []
        for known in list(self._asked):
            assert known.probe is not None
            if known.probe.idle:  # it is another one: the mount moved
                self._asked.remove(known)
                known.next = 0.0
                continue
            finding = known.probe.answer()
            if finding is not None:
                found.append((known, known.of_its_own(finding)))
                if finding.state != "hung":
                    self._asked.remove(known)
        return found

    def pending(self) -> list[int]:
        """The descriptors of the helpers that have not answered."""
        fds = [known.probe.fileno() for known in self._asked if known.probe is not None]
        return [fd for fd in fds if fd >= 0]

    def next_look(self) -> float:
        """When something is to be asked, or is late, by the clock."""
        late = [k.probe.until for k in self._asked if k.probe is not None and not k.probe.hangs]
        more = self._busy() < MOST_AT_ONCE
        due = [k.next for k in self.known.values() if k not in self._asked] if more else []
        return min((*late, *due), default=float("inf"))

    # What hangs keeps no other from being asked.
    def _busy(self) -> int:
        return sum(known.probe is not None and not known.probe.hangs for known in self._asked)

    def block_to_filesystem(self, dev: Dev) -> Dev:
        """The superblock on a block device; the device itself where there is none."""
        if dev in self.known:
            return dev
        text = f"{dev[0]}:{dev[1]}"
        for known in self.known.values():
            top = known.place.layers[:1] if known.fstype != "btrfs" else known.place.layers
            if any(layer.dev == text for layer in top):
                return known.dev
        return dev

    def fstype(self, dev: Dev) -> str | None:
        """The type of the filesystem with this device number."""
        known = self.known.get(dev)
        return None if known is None else known.fstype

    def below(self, dev: Dev) -> list[Known]:
        """The filesystems that stand on a block device, however far above it."""
        text = f"{dev[0]}:{dev[1]}"
        return [known for known in self.known.values() if text in known.fs.devices]

    def close(self) -> None:
        """Close all probes."""
        for known in self.known.values():
            if known.probe is not None:
                known.probe.close()
        self.known, self._asked = {}, []


# A device that was unmounted and mounted again has another mount, with another id.
def _same_superblock(known: Known, mounts: list[Mount]) -> bool:
    if known.fstype != mounts[0].fstype:
        return False
    before = {m.unique_id or m.id for m in known.mounts}
    return bool(before & {m.unique_id or m.id for m in mounts})
