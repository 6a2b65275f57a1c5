"""All sources of errors, opened together and read together.

A source that cannot be had, or that breaks, is down, with the reason and the remedy; the others go
on. Down ones are tried again when the mounts change and by a timer: tracefs may be mounted later.

REFS      owns the sources and an epoll of their descriptors.
LOCKING   none: one owner.
LIFETIME  see CHANNELS. `close` closes every source, also when one of them fails to.
"""

import os
import select
from contextlib import suppress
from typing import NamedTuple

import msgspec

from fanwise._errors import FanwiseError
from fanwise.health import _intake
from fanwise.health._filesystems import Filesystems
from fanwise.health._observe import Dev, Observation
from fanwise.kernel.mounts import Mount, mounts
from fanwise.lifetime import Lifetime
from fanwise.sources.errortrace import ErrorTrace, TracedError
from fanwise.sources.fserror import FsErrorLoss, FsErrors
from fanwise.sources.kmsg import Kmsg, KmsgLoss
from fanwise.sources.mounts import MountSource
from fanwise.sources.state import SourceState

_MOMENT = 2  # milliseconds
NAMES = ("fserror", "trace", "counters", "mounts", "kmsg")


class Loss(NamedTuple):
    """Records of these filesystems (None: of all) were lost; ``records`` None if not counted."""

    devs: tuple[Dev, ...] | None
    records: int | None


class Channels:
    """The sources. ``there`` are all mounts, as of the last `mounts_changed`."""

    state: str

    def __init__(self, filesystems: Filesystems, *, tracefs: str | None = None) -> None:
        self._filesystems, self._tracefs = filesystems, tracefs
        self.there: list[Mount] = []
        self._fserror: FsErrors | None = None
        self._trace: ErrorTrace | None = None
        self._kmsg: Kmsg | None = None
        self._mounts: MountSource | None = None
        self._down: dict[str, str] = dict.fromkeys(("fserror", "trace", "mounts", "kmsg"), "")
        self._lost = {"trace": 0, "kmsg": 0}  # of those that were closed
        self._garbage: dict[str, str] = {}
        self._epoll: select.epoll | None = None
        CHANNELS.start(self)

    def open(self) -> None:
        """Open what can be had; see `states`. Raises nothing but for a lack of descriptors."""
        self._epoll = select.epoll()
        CHANNELS.advance(self, "open")
        self.retry()
        self.there = mounts() if self._mounts is None else self._mounts.there

    def retry(self) -> bool:
        """Open what is down; say whether something came up."""
        before = len(self._down)
        for name in list(self._down):
            opened = {
                "fserror": self._open_fserror,
                "trace": self._open_trace,
                "mounts": self._open_mounts,
                "kmsg": self._open_kmsg,
            }[name]
            try:
                opened()
            except (FanwiseError, OSError) as error:
                self._down[name] = _why(error)
        return len(self._down) < before

    def _open_fserror(self) -> None:
        source = FsErrors()
        source.open()
        self._fserror = source
        self._up("fserror", source.fileno())

    def _open_trace(self) -> None:
        if self._tracefs is not None and not os.path.isdir(f"{self._tracefs}/instances"):
            self._down["trace"] = f"{self._tracefs} is no tracefs; mount it there"
            return
        source = ErrorTrace(tracefs=self._tracefs)
        source.open()
        if not source.up:
            reason = "; ".join(text for text in (source.reason, source.remedy) if text)
            source.close()
            self._down["trace"] = reason
            return
        self._trace = source
        self._up("trace", *source.filenos())

    def _open_mounts(self) -> None:
        source = MountSource()
        source.open()
        self._mounts = source
        fd, events = source.waits
        assert self._epoll is not None
        self._epoll.register(fd, events)
        del self._down["mounts"]

    def _open_kmsg(self) -> None:
        source = Kmsg()
        source.open()
        self._kmsg = source
        self._up("kmsg", source.fileno())

    def _up(self, name: str, *fds: int) -> None:
        assert self._epoll is not None
        for fd in fds:
            self._epoll.register(fd, select.EPOLLIN)
        del self._down[name]

    # Closed, and its descriptors with it, which takes them out of the epoll.
    def _fail(self, name: str, error: FanwiseError | OSError) -> None:
        source = {
            "fserror": self._fserror,
            "trace": self._trace,
            "mounts": self._mounts,
            "kmsg": self._kmsg,
        }[name]
        self._down[name] = _why(error)
        if name in self._lost and source is not None:
            self._lost[name] += self._count(name)
        setattr(self, f"_{name}", None)
        if source is not None:
            with suppress(FanwiseError, OSError):
                source.close()

    def fileno(self) -> int:
        """Readable when any source has something."""
        assert self._epoll is not None
        return self._epoll.fileno()

    def follow(self) -> None:
        """Mark the filesystems that are known now."""
        if self._fserror is None:
            return
        try:
            self._fserror.follow(self._filesystems.local(self.there))
        except (FanwiseError, OSError) as error:
            self._fail("fserror", error)

    def mounts_changed(self, look: bool = False) -> bool:
        """Bring `there` up to date; say whether something changed. ``look``: read the whole."""
        before = self.there
        try:
            if self._mounts is None:
                self.there = mounts() if look else before
            elif look:
                self._mounts.look()
                self.there = self._mounts.there
            elif self._mounts.changed():
                self._mounts.read()
                self.there = self._mounts.there
        except (FanwiseError, OSError) as error:
            self._fail("mounts", error)
            self.there = mounts()
        return before != self.there

    def read(self) -> list[Observation | Loss]:
        """Everything that is there now, the records that name objects first. Raises nothing.

        ext4 writes its trace record and its log line before it notifies, so that a reader who is
        woken by those waits a moment (2 ms at most) for the report that names the object.
        """
        found = self._read()
        if self._fserror is not None and _report_follows(found):
            poll = select.poll()
            poll.register(self._fserror.fileno(), select.POLLIN)
            if poll.poll(_MOMENT):
                found += self._read()
            found.sort(key=lambda one: isinstance(one, Loss) or one.channel != "fserror")
        return found

    def _read(self) -> list[Observation | Loss]:
        found: list[Observation | Loss | None] = []
        for name, reading in (
            ("fserror", self._read_fserror),
            ("trace", self._read_trace),
            ("kmsg", self._read_kmsg),
        ):
            try:
                found += reading()
            except (FanwiseError, OSError) as error:
                self._fail(name, error)
                # What it had is not known.
                found.append(Loss(None, None) if name != "kmsg" else None)
        return [one for one in found if one is not None]

    def _read_fserror(self) -> list[Observation | Loss | None]:
        found: list[Observation | Loss | None] = []
        for report in self._fserror.read() if self._fserror is not None else ():
            if isinstance(report, FsErrorLoss):
                found.append(Loss(report.devs, None))
            else:
                found.append(_intake.from_fserror(report))
        return found

    def _read_trace(self) -> list[Observation | Loss | None]:
        found: list[Observation | Loss | None] = []
        for record in self._trace.errors() if self._trace is not None else ():
            if isinstance(record, TracedError):
                found.append(_intake.from_trace(record, self._filesystems.fstype))
            else:
                found.append(Loss(None, record.count))
        return found

    def _read_kmsg(self) -> list[Observation | Loss | None]:
        found: list[Observation | Loss | None] = []
        for message in self._kmsg.read() if self._kmsg is not None else ():
            if not isinstance(message, KmsgLoss):  # of anybody's messages: see `states`
                seen = _intake.from_kmsg(
                    message, block_device, self._filesystems.block_to_filesystem
                )
                found.append(seen)
        return found

    @property
    def traced(self) -> bool:
        """Whether the trace is there."""
        return self._trace is not None

    def check(self) -> list[Loss]:
        """See that the trace still records, and look for losses that no record tells of."""
        if self._trace is None:
            return []
        try:
            lost, off = self._trace.lost_unseen(), self._trace.keep()
        except (FanwiseError, OSError) as error:
            self._fail("trace", error)
            return [Loss(None, None)]
        return [Loss(None, each.records) for each in (lost, off) if each is not None]

    def garbage(self, path: str, why: str) -> None:
        """A counter's file made no sense; said until it is `understood`."""
        self._garbage[path] = why

    def understood(self, below: str) -> None:
        """The files below a directory made sense."""
        for path in [path for path in self._garbage if path.startswith(f"{below}/")]:
            del self._garbage[path]

    def states(self) -> dict[str, SourceState]:
        """What each source says of itself."""
        found: dict[str, SourceState] = {}
        for name in NAMES:
            if name == "counters":
                bad = "; ".join(f"{path} {why}" for path, why in list(self._garbage.items())[:8])
                found[name] = SourceState(name, "degraded" if bad else "up", bad or None)
            elif name in self._down:
                found[name] = SourceState(name, "down", self._down[name], self._lost.get(name, 0))
            elif name == "mounts":
                found[name] = SourceState(name, "up")
            elif name == "fserror" and self._fserror is not None:
                found[name] = self._fserror.status()
            elif name == "trace" and self._trace is not None:
                found[name] = self._with_lost(self._trace.status())
            elif name == "kmsg" and self._kmsg is not None:
                found[name] = self._with_lost(self._kmsg.status())
        return found

    def _with_lost(self, state: SourceState) -> SourceState:
        before = self._lost[state.name]
        return msgspec.structs.replace(state, lost=state.lost + before) if before else state

    def _count(self, name: str) -> int:
        source = self._trace if name == "trace" else self._kmsg
        return 0 if source is None else source.status().lost

    def close(self) -> None:
        """Close all; idempotent. Raises the first error after everything is closed."""
        if self.state == "CLOSED":
            return
        CHANNELS.advance(self, "close")
        failed: OSError | None = None
        sources = (self._trace, self._fserror, self._kmsg, self._mounts)
        self._trace = self._fserror = self._kmsg = self._mounts = None
        for source in sources:
            if source is not None:
                try:
                    source.close()
                except OSError as error:
                    failed = failed or error
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
        if failed is not None:
            raise failed


CHANNELS: Lifetime[Channels] = Lifetime(
    "Channels",
    states=("NEW", "OPEN", "CLOSED"),
    transitions={"open": "NEW -> OPEN", "close": "NEW, OPEN -> CLOSED"},
    invariants={
        "what is open can be waited for": lambda c: c.state != "OPEN" or c._epoll is not None,
    },
)


def _report_follows(found: list[Observation | Loss]) -> bool:
    told = [one for one in found if not isinstance(one, Loss)]
    reported = {one.dev for one in told if one.channel == "fserror"}
    return any(one.via in ("trace.error", "kmsg.error") and one.dev not in reported for one in told)


def _why(error: FanwiseError | OSError) -> str:
    if isinstance(error, FanwiseError):
        return str(error)
    return f"{error.filename or 'it'}: {error.strerror or error}"


def block_device(name: str) -> Dev | None:
    """Return the number of a block device by its name."""
    try:
        with open(f"/sys/class/block/{name}/dev", "rb") as file:
            major, minor = file.read().split(b":")
    except (OSError, ValueError):
        return None
    return int(major), int(minor)
