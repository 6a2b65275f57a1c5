"""Correlation: records of all channels in, incidents out. No input or output, no clock of its own.

One error is seen by several channels, each with a part of the truth: FS_ERROR has the inode and
counts exactly, but merges; ext4's trace record has the line of code and no inode; the counter in
the superblock counts what no event tells; xfs says what is sick in one record and where in another.
The rules:

- A record joins the open incident of its own key (filesystem, scope, object, errno); else one on
  its device that was touched within two seconds and that it does not contradict; else it is a new
  one, told at once. What joins amends: it fills in what was not known, and overwrites nothing.
- Two channels that name objects must agree, also in that there is none. What names nothing (a trace
  record, a failed request of the block layer, a shutdown) joins what is there.
- An incident that turns out to be part of another is `merged` into it.
- On ext4 the sum over all incidents is the superblock's errors_count, as last read. An error that
  it has and no record explains is held by the incident that the superblock's last error names, or
  that is open; a record that comes within two seconds explains it. Sums that are too high, because
  merged records counted errors of several objects in one, are cut when the counter was read after
  things came to rest (0.1 s: ext4 moves the counter after it notified).
- An error that ext4 has not counted after two seconds is one that it never counts.
- Beyond 100 open incidents of a filesystem, what would be new is counted in one of scope "fs".
- A counter that went back was checked or reset: what it counted is resolved.

REFS      a ledger for each filesystem, with its cases.
LOCKING   none: one owner.
LIFETIME  see CASE in _case.
"""

import errno
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence

import msgspec

from fanwise.health._case import (
    CASE,
    CONSEQUENCES,
    COUNTED,
    IDENTIFYING,
    LONG_AGO,
    NAMED,
    Case,
    Ledger,
)
from fanwise.health._incident import SEVERITY, Filesystem, Incident, State
from fanwise.health._joining import ANONYMOUS, agree, part_of, same_key
from fanwise.health._observe import Check, Dev, Observation
from fanwise.sources.counters import BtrfsDevice, ErrorPoint, Ext4Counters, advance

WINDOW = 2.0  # seconds within which records are about one thing
REST = 0.1  # seconds after an event until ext4's counter has it
CHECKED = "the filesystem was checked"
MOST_OPEN = 100  # incidents of one filesystem
_MOST_MOUNTS = 0xF000  # beyond, a smaller number may be one that ran over

_STATS = {
    "write": errno.EIO,
    "read": errno.EIO,
    "flush": errno.EIO,
    "corruption": errno.EBADMSG,
    "generation": errno.EUCLEAN,
}
_STATE_ERRNO = {
    "read_only": errno.EROFS,
    "emergency_ro": errno.EROFS,
    "aborted": errno.ESHUTDOWN,
    "shutdown": errno.ESHUTDOWN,
}


class Correlator:
    """Everything that is open. Each method returns the incidents that changed, as they are now.

    ``clock`` (monotonic seconds) is what two seconds are measured by; ``new_id`` makes ids.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        new_id: Callable[[], str] = lambda: os.urandom(6).hex(),
        kernel: str | None = None,
    ) -> None:
        self._clock, self._new_id = clock, new_id
        self._kernel = platform.release() if kernel is None else kernel
        self._ledgers: dict[Dev, Ledger] = {}
        self._changed: dict[str, tuple[Ledger, Case]] = {}

    # -- filesystems

    def mounted(self, dev: Dev, fs: Filesystem) -> list[Incident]:
        """A filesystem is there, or is told again with more known.

        With another UUID than the device had, what was open there is resolved: it was replaced. A
        UUID that is open under a device that is mounted no more takes its incidents along.
        """
        ledger = self._ledgers.get(dev)
        if ledger is None:
            self._ledgers[dev] = Ledger(dev=dev, fs=fs)
        elif ledger.fs.uuid and fs.uuid and ledger.fs.uuid != fs.uuid:
            self._resolve(ledger, ledger.cases, "the filesystem was replaced by another")
            self._ledgers[dev] = Ledger(dev=dev, fs=fs)
        else:
            ledger.fs = fs
        return self._flush()

    def renumbered(self, old: Dev, new: Dev) -> None:
        """The filesystem of one device number has another now: its incidents go along."""
        ledger = self._ledgers.pop(old)
        ledger.dev = new
        for case in ledger.cases:
            case.dev = new
        self._ledgers[new] = ledger

    def ledgers(self) -> list[Ledger]:
        """Everything that is known: what a restart needs. They encode with msgspec."""
        return list(self._ledgers.values())

    def restore(self, ledgers: Iterable[Ledger]) -> None:
        """Take up what was known before a restart; two seconds do not reach back over it."""
        for ledger in ledgers:
            ledger.last_event = ledger.last_io_at = LONG_AGO
            for case in ledger.cases:
                case.born = case.touched = case.held_at = LONG_AGO
            self._ledgers[ledger.dev] = ledger

    def open(self, dev: Dev | None = None) -> list[Incident]:
        """The open incidents, of a device or of all. Their `count` is 0: they are not news."""
        found = []
        for ledger in self._ledgers.values():
            if dev is None or ledger.dev == dev:
                for case in ledger.cases:
                    case.told = case.total
                    found.append(case.incident(ledger, self._kernel))
        return found

    # -- records

    def feed(self, seen: Observation) -> list[Incident]:
        """A record of any channel."""
        now = self._clock()
        ledger = self._ledger_of(seen, now)
        if seen.what == "io":
            ledger.last_io, ledger.last_io_at = seen.errno, now
        elif seen.what == "writeback" and not seen.errno and now - ledger.last_io_at <= WINDOW:
            seen = msgspec.structs.replace(seen, errno=ledger.last_io)
        if seen.what == "warning" and self._join(ledger, seen, now) is None:
            return []  # it says nothing but that somebody may want to know
        self._place(ledger, seen, now)
        if seen.what == "io" and seen.errno:
            self._name_errno(ledger, seen.errno, now)
        return self._flush()

    def lost(self, devs: Iterable[Dev], count: int | None = None) -> list[Incident]:
        """Records of these filesystems were lost: so many, or None. Read their counters then."""
        for dev in devs:
            ledger = self._ledgers.get(dev)
            if ledger is not None:
                ledger.lost += count or 0
                ledger.uncounted = ledger.uncounted or count is None
                for case in ledger.cases:
                    self._touch(ledger, case)
        return self._flush()

    def located(
        self, incident: str, paths: Sequence[str], source: str, ambiguous: bool = False
    ) -> list[Incident]:
        """The paths of an incident's inode were found. The first ones stay.

        ``ambiguous``: they are of several inodes, and which of them it is nobody knows.
        """
        for ledger in self._ledgers.values():
            for case in ledger.cases:
                if case.id == incident and not case.paths and paths:
                    case.paths, case.path_source = tuple(paths), source
                    case.path = None if ambiguous else paths[0]
                    self._touch(ledger, case)
        return self._flush()

    # -- counters

    def ext4(self, dev: Dev, counters: Ext4Counters, at: float, life: int = 0) -> list[Incident]:
        """A reading of ext4's counters, at a time (seconds since the epoch)."""
        now = self._clock()
        ledger = self._ledgers.get(dev)
        if ledger is None or counters.errors is None:
            return []
        before = ledger.counter
        if advance(before, counters.errors).went_back:
            self._resolve(ledger, [c for c in ledger.cases if c.counted], CHECKED)
            ledger.closed = 0
        ledger.counter = counters.errors
        for point in (counters.first, counters.last):
            if point is not None:
                self._name_by(ledger, point)
        difference = counters.errors - ledger.counted
        if difference > 0:
            self._hold(ledger, counters, before is None, at, now, life)
        elif difference < 0 and now - ledger.last_event >= REST:
            self._cut(ledger, now)
        return self._flush()

    def unsure(self, dev: Dev) -> bool:
        """Whether the counter may be behind what was told of it just now: then read it again."""
        ledger = self._ledgers.get(dev)
        return (
            ledger is not None
            and ledger.counter is not None
            and ledger.counted > ledger.counter
            and self._clock() - ledger.last_event < WINDOW
        )

    def checked(self, dev: Dev, check: Check) -> list[Incident]:
        """When the filesystem was checked last, as its superblock says.

        What was seen before is resolved, also what no counter counts. The superblock knows the
        second only. Of what was seen in that very second goes what was read in the life of the
        superblock that was there at the reading before this one: it had to end before the check,
        which had not been then. And a second check in one second shows in the count of mounts.
        """
        ledger = self._ledgers.get(dev)
        if ledger is None or check.at < ledger.checked:
            return []
        at, past = check.at, ledger.life if ledger.life != check.life else 0
        if not check.life:
            past = 0
        if at > ledger.checked or (past and _counted_anew(ledger.mounts, check)):
            before = [
                case
                for case in ledger.cases
                if case.last_seen < at or (case.last_seen < at + 1 and past and case.life == past)
            ]
            if ledger.checked or before:
                self._resolve(ledger, before, CHECKED)
                ledger.counter, ledger.closed = 0, 0  # the check set it back
        for case in ledger.cases:
            if case.life and check.life:
                case.life = check.life  # of it, or of one before
        ledger.checked, ledger.mounts, ledger.life = at, check.mounts, check.life
        return self._flush()

    def btrfs(self, dev: Dev, devices: Iterable[BtrfsDevice], at: float) -> list[Incident]:
        """A reading of btrfs's counters. What they had at the first reading is told as well."""
        now = self._clock()
        ledger = self._ledgers.get(dev)
        if ledger is None:
            return []
        for device in devices:
            part = f"devid {device.id}"
            for kind, code in _STATS.items():
                count: int | None = getattr(device, kind)
                if count is None:
                    continue
                step = advance(ledger.stats.get(f"{part} {kind}", 0), count)
                ledger.stats[f"{part} {kind}"] = count
                if step.went_back:
                    gone = [c for c in ledger.cases if c.part == part and c.errno == code]
                    self._resolve(ledger, gone, "the device's counters were reset")
                if step.new:
                    seen = Observation(
                        channel="counters",
                        what="stats",
                        dev=dev,
                        time=at,
                        scope="device",
                        errno=code,
                        count=step.new,
                        part=part,
                        operation=f"{kind} on {part}",
                    )
                    self._place(ledger, seen, now)
        return self._flush()

    # -- states

    def state(
        self, dev: Dev, state: State, at: float, channel: str = "mounts", text: str | None = None
    ) -> list[Incident]:
        """What a mount's options or the probe (``channel``) say.

        "ok" ends what was only about the state, where this channel said it before; a probe that
        opened an xfs shows that it is not shut down. "unknown" says nothing.
        """
        ledger = self._ledgers.get(dev)
        if ledger is None:
            return []
        if SEVERITY[state] <= SEVERITY["unknown"]:
            if state == "ok":
                self._recovered(ledger, channel)
            return self._flush()
        seen = Observation(
            channel="probe" if channel == "probe" else "mounts",
            what="hung" if state == "hung" else "state",
            dev=dev,
            time=at,
            errno=_STATE_ERRNO.get(state, 0),
            state=state,
            text=text,
        )
        for case in ledger.cases:
            if SEVERITY[case.condition] >= SEVERITY[state]:
                # It says so already; that this channel agrees is told once.
                if seen.via not in case.evidence:
                    case.add(seen, case.touched)
                    self._touch(ledger, case)
                return self._flush()
        self._place(ledger, seen, self._clock())
        return self._flush()

    def resolve(self, incident: str, why: str) -> list[Incident]:
        """End an incident, by an operator's word."""
        for ledger in self._ledgers.values():
            self._resolve(ledger, [case for case in ledger.cases if case.id == incident], why)
        return self._flush()

    # -- where a record goes

    def _ledger_of(self, seen: Observation, now: float) -> Ledger:
        ledger = self._ledgers.get(seen.dev)
        if ledger is not None and ledger.fs.fstype is not None:
            return ledger
        text = f"{seen.dev[0]}:{seen.dev[1]}"
        above = [each for each in self._ledgers.values() if text in each.fs.devices]
        if len(above) > 1:  # partitions of one disk: the one that said something
            said = [each for each in above if self._join(each, seen, now) is not None]
            above = said or above
        if len(above) == 1:
            return above[0]
        if ledger is None:
            ledger = self._ledgers[seen.dev] = Ledger(dev=seen.dev, fs=Filesystem(device=text))
        return ledger

    def _place(self, ledger: Ledger, seen: Observation, now: float) -> None:
        exact = same_key(ledger, seen)
        joined = self._join(ledger, seen, now)
        if seen.what in ANONYMOUS or seen.via == "trace.error":
            case = joined or exact
        else:
            case = exact or joined
        if case is None:
            case = self._new(ledger, seen, now)
        own = case.own
        case.add(seen, now)
        if seen.via in COUNTED:
            ledger.last_event = now
            self._explain(ledger, case, case.own - own, seen, now)
        self._touch(ledger, case)
        self._absorb(ledger, case, seen, now)

    def _join(self, ledger: Ledger, seen: Observation, now: float) -> Case | None:
        found = [
            case
            for case in ledger.cases
            if now - case.touched <= WINDOW and agree(case, seen, now - case.born <= WINDOW)
        ]
        # The one that has fewer records of this kind than of others lacks this one.
        found.sort(key=lambda c: (c.evidence.get(seen.via, 0) >= c.total, c.born))
        return found[0] if found else None

    def _new(self, ledger: Ledger, seen: Observation, now: float) -> Case:
        full = len(ledger.cases) >= MOST_OPEN
        if full:
            for case in ledger.cases:
                if case.collective:
                    return case
        case = Case(
            id=self._new_id(),
            dev=ledger.dev,
            scope="fs" if full else seen.scope,
            ino=None if full else seen.ino,
            gen=None if full else seen.gen,
            group=None if full else seen.group,
            start=None if full else seen.start,
            length=None if full else seen.length,
            part=None if full else seen.part,
            errno=0 if full else seen.errno,
            born=now,
            touched=now,
            first_seen=seen.time,
            last_seen=seen.time,
            collective=full,
        )
        CASE.start(case)
        ledger.cases.append(case)
        return case

    # A block layer's errno is the device's: what was written back and failed just now has it too.
    def _name_errno(self, ledger: Ledger, code: int, now: float) -> None:
        for case in ledger.cases:
            wrote = any(via.endswith(".writeback") for via in case.evidence)
            if wrote and not case.errno and now - case.touched <= WINDOW:
                case.errno = code
                self._touch(ledger, case)

    # -- counts

    # `new` errors of `case` have a name now: others that hold errors without one hold fewer.
    def _explain(self, ledger: Ledger, case: Case, new: int, seen: Observation, now: float) -> None:
        if seen.via not in NAMED:
            missing = case.evidence[seen.via] - case.own - case.held
            if missing > 0:
                case.held, case.held_at = case.held + missing, now
            return
        for each in (case, *reversed(ledger.cases)):
            if new <= 0:
                return
            if not each.held or now - each.held_at > WINDOW:
                continue
            spare = min(each.held if each.own else each.held - 1, new)
            if spare > 0:
                each.held -= spare
                new -= spare
                self._touch(ledger, each)

    # The log told of an error without its errno; the superblock has it.
    def _name_by(self, ledger: Ledger, point: ErrorPoint) -> None:
        for case in ledger.cases:
            if (
                case.counted
                and not case.errno
                and not case.collective
                and (case.ino or 0, case.function) == (point.ino, point.function)
            ):
                taken = {other.key for other in ledger.cases}
                case.errno = point.errno
                if case.key in taken:
                    case.errno = 0
                else:
                    self._touch(ledger, case)

    # The counter has more than the incidents: who holds them?
    def _hold(
        self,
        ledger: Ledger,
        counters: Ext4Counters,
        first: bool,
        at: float,
        now: float,
        life: int,
    ) -> None:
        # What it had before anybody listened is explained by no record that comes now.
        since = LONG_AGO if first else now
        points = [counters.last]
        if first and counters.first is not None and counters.last is not None:
            same = (counters.first.ino, counters.first.errno) == (
                counters.last.ino,
                counters.last.errno,
            )
            points = [counters.first] if same else [counters.first, counters.last]
        case = None
        for point in points:
            missing = (ledger.counter or 0) - ledger.counted
            if missing <= 0:
                break
            seen = Observation(
                channel="counters",
                what="error",
                dev=ledger.dev,
                time=at if point is None else float(point.time),
                scope="inode" if point is not None and point.ino else "fs",
                errno=0 if point is None else point.errno,
                count=0,
                ino=None if point is None else point.ino or None,
                function=None if point is None else point.function or None,
                line=None if point is None else point.line or None,
                operation=None if point is None or not point.block else f"block {point.block}",
                life=life,
            )
            case = same_key(ledger, seen) or self._join(ledger, seen, now)
            known = case is not None and case.counted
            if case is None:
                case = self._new(ledger, seen, now)
            case.add(seen, now)
            if not known:
                case.held, case.held_at = case.held + 1, since
            self._touch(ledger, case)
        missing = (ledger.counter or 0) - ledger.counted
        if case is not None and missing > 0:
            if first and counters.last is not None:
                case.last_seen = max(case.last_seen, float(counters.last.time))
            case.held, case.held_at = case.held + missing, since

    # The incidents have more than the counter, which is right.
    def _cut(self, ledger: Ledger, now: float) -> None:
        right = ledger.counter or 0
        for case in reversed(ledger.cases):  # held, and explained elsewhere
            spare = min(case.held if case.own > case.cut else case.held - 1, ledger.counted - right)
            if spare > 0:
                case.held -= spare
                self._touch(ledger, case)
        self._share(ledger)
        # What has no object of its own, or came late about one that has an incident.
        for case in list(ledger.cases):
            if ledger.counted <= right:
                return
            into = part_of(ledger, case)
            if into is not None:
                self._merge(ledger, case, into)
        self._share(ledger)
        # Reported, and no error to the superblock: from Linux 7.0 on shutdowns, and failures of a
        # file's data. ext4's own errors have a record in the trace and the log; where these have
        # none (the log has a limit) the counter is behind: a work queue moves it, without a bound.
        if now - ledger.last_event < WINDOW:
            return
        for case in sorted(ledger.cases, key=lambda c: (c.errno != errno.ESHUTDOWN, -c.born)):
            reported = not any(via in case.evidence for via in ("trace.error", "kmsg.error"))
            if case.counted and reported and case.errors <= ledger.counted - right:
                case.beyond = True
                self._touch(ledger, case)

    # Merged reports count errors here that belong elsewhere.
    def _share(self, ledger: Ledger) -> None:
        for case in sorted(ledger.cases, key=lambda c: -c.own):
            spare = min(case.errors - 1, ledger.counted - (ledger.counter or 0))
            if case.counted and case.own and spare > 0:
                case.cut += spare
                self._touch(ledger, case)

    # -- ends

    # A record without an object came first, and what it was about has an incident already.
    def _absorb(self, ledger: Ledger, case: Case, seen: Observation, now: float) -> None:
        if seen.via not in IDENTIFYING or now - case.born <= WINDOW:
            return
        for other in list(ledger.cases):
            if (
                other is not case
                and list(other.evidence) == ["trace.error"]
                and now - other.born <= WINDOW
                and other.errno in (0, case.errno)
                and other.evidence["trace.error"] <= case.evidence.get(seen.via, 0)
            ):
                self._merge(ledger, other, case)

    def _merge(self, ledger: Ledger, case: Case, into: Case) -> None:
        case.merged_into = into.id
        CASE.advance(case, "merge")
        ledger.cases.remove(case)
        for via, count in case.evidence.items():
            into.evidence[via] = into.evidence.get(via, 0) + count
        for channel, count in case.data.items():
            into.data[channel] = into.data.get(channel, 0) + count
        into.channels += [c for c in case.channels if c not in into.channels]
        into.last_seen = max(into.last_seen, case.last_seen)
        into.life = into.life if into.life == case.life else 0
        if into.function is None:
            into.function, into.line = case.function, case.line
        self._touch(ledger, case)
        self._touch(ledger, into)

    def _resolve(self, ledger: Ledger, cases: list[Case], why: str) -> None:
        for case in list(cases):
            ledger.closed += case.errors
            case.resolved = why
            CASE.advance(case, "resolve")
            ledger.cases.remove(case)
            self._touch(ledger, case)

    # Mounted again, or answering again: what said only that it did not is over.
    def _recovered(self, ledger: Ledger, channel: str) -> None:
        knows = channel == "probe" and ledger.fs.fstype == "xfs"
        able = [
            case
            for case in ledger.cases
            if knows or any(via.startswith(f"{channel}.") for via in case.evidence)
        ]
        over = [
            case
            for case in able
            if all(via.partition(".")[2] in CONSEQUENCES for via in case.evidence)
        ]
        self._resolve(ledger, over, "the filesystem works again")
        for case in [case for case in able if case not in over]:
            if case.condition not in ("ok", "warning"):
                case.condition = "ok"
                self._touch(ledger, case)

    def _touch(self, ledger: Ledger, case: Case) -> None:
        case.revision += case.id not in self._changed
        self._changed[case.id] = (ledger, case)

    def _flush(self) -> list[Incident]:
        changed, self._changed = self._changed, {}
        return [case.incident(ledger, self._kernel) for ledger, case in changed.values()]


# Each mount adds one, and a check sets it to 0; as 16 bits.
def _counted_anew(mounts: int | None, check: Check) -> bool:
    if mounts is None or mounts > _MOST_MOUNTS:
        return False
    return check.mounts < mounts or (check.mounts == mounts and check.writable)
