"""A case: an incident while it is put together. And the ledger of a filesystem's cases.

LIFETIME  see CASE. A case is open until its filesystem was checked or replaced, or until it turns
          out to be part of another one; then only what it counted is kept, in its ledger.
"""

import msgspec

from fanwise.health._incident import (
    SEVERITY,
    Filesystem,
    Incident,
    Location,
    Object,
    Scope,
    State,
    TrippedBy,
    advice_for,
    meaning_of,
    name_of,
)
from fanwise.health._observe import Channel, Dev, Observation
from fanwise.lifetime import Lifetime

# What ext4's errors_count counts, when it is seen by another channel. The first two name the
# object; the third does not.
NAMED = ("fserror.error", "kmsg.error")
COUNTED = (*NAMED, "trace.error")
# What names an object, or says that there is none: two of these agree or are two incidents.
IDENTIFYING = (*NAMED, "counters.error")
# Whose number stands, the best first.
_PRECEDENCE = (
    "counters.stats",
    "fserror.error",
    "trace.sick",
    "trace.writeback",
    "kmsg.error",
    "trace.error",
    "trace.buffer",
    "trace.io",
    "trace.shutdown",
    "kmsg.writeback",
    "kmsg.buffer",
    "kmsg.io",
)
_MOST_TEXT = 2000
_MOST_HEARD = 16
LONG_AGO = -1e18  # JSON has no infinity

# What stops a filesystem is told on what broke it.
CONSEQUENCES = ("shutdown", "state", "hung")

Key = tuple[str, int | None, int | None, int | None, str | None, int]


class Case(msgspec.Struct, kw_only=True):
    """What is known of one incident. ``born`` and ``touched`` are the correlator's clock's.

    ``evidence`` counts records by channel and what they saw, ``data`` by channel those about a
    file's data, which no filesystem's error counter counts. ``held`` are errors that a counter
    or an anonymous record knows of and no record of an object explains, since ``held_at``;
    ``cut`` are those that merged records counted here and that belong elsewhere. ``beyond``: the
    filesystem's counter does not count what this is about. ``life`` is one of the superblock's,
    and its last record was read in it or in one before; 0 where not known.
    """

    id: str
    dev: Dev
    scope: Scope
    ino: int | None
    gen: int | None
    group: int | None
    start: int | None
    length: int | None
    part: str | None
    errno: int
    born: float
    touched: float
    first_seen: float
    last_seen: float
    path: str | None = None
    path_source: str | None = None
    paths: tuple[str, ...] = ()
    evidence: dict[str, int] = {}
    data: dict[str, int] = {}
    held: int = 0
    held_at: float = 0.0
    cut: int = 0
    beyond: bool = False
    collective: bool = False
    function: str | None = None
    line: int | None = None
    symbol: str | None = None
    operation: str | None = None
    condition: State = "ok"
    process: TrippedBy | None = None
    heard: list[TrippedBy] = []
    channels: list[Channel] = []
    text: str | None = None
    told: int = 0
    revision: int = 0
    resolved: str | None = None
    merged_into: str | None = None
    life: int = 0
    state: str = ""

    @property
    def key(self) -> Key:
        """What makes it this incident among those of its filesystem."""
        start = self.start if self.scope == "block" else None
        return (self.scope, self.ino, self.group, start, self.part, self.errno)

    @property
    def own(self) -> int:
        """Counted errors that records of this very object tell of."""
        return max(self.evidence.get(via, 0) for via in NAMED)

    @property
    def counted(self) -> bool:
        """Whether the filesystem's own error counter counts what this is about."""
        if self.beyond:
            return False
        return self.held > 0 or any(via in self.evidence for via in (*COUNTED, "counters.error"))

    @property
    def _leading(self) -> str:
        if self.counted and self.held:
            return "counters" if "counters.error" in self.evidence else "trace.error"
        return next(
            (via for via in _PRECEDENCE if self.evidence.get(via)),
            next(iter(self.evidence), "counters"),
        )

    @property
    def source(self) -> str:
        """The channel whose number `total` is; a second one counted the file's data."""
        first = self._leading.partition(".")[0]
        more = [channel for channel, count in self.data.items() if count == self.written]
        return f"{first}, {more[0]}" if self.counted and more and more[0] != first else first

    @property
    def written(self) -> int:
        """Failures to write a file's data back."""
        return max(self.data.values(), default=0)

    @property
    def errors(self) -> int:
        """What it has of the filesystem's error counter."""
        return max(self.own + self.held - self.cut, 1) if self.counted else 0

    @property
    def total(self) -> int:
        """Errors since it began; never less than one."""
        if self.counted:
            return self.errors + self.written
        return max(self.evidence.get(self._leading, 0), 1)

    @property
    def named(self) -> bool:
        """Whether a record said what object it is about, or that it is about none."""
        return any(via in self.evidence for via in IDENTIFYING)

    def add(self, seen: Observation, now: float) -> None:
        """Take a record in. What is known already stays; the first error is never overwritten."""
        self.touched = max(self.touched, now)
        self.first_seen = min(self.first_seen, seen.time)
        self.last_seen = max(self.last_seen, seen.time)
        if seen.what not in ("state", "hung"):  # they are looks, and no errors
            self.life = seen.life
        # The block layer knows what was asked of the device, others know what for.
        device_only = all(via.endswith(".io") for via in self.evidence)
        device_only = device_only or _of_device(self.operation or "")
        if seen.operation and (self.operation is None or (device_only and seen.what != "io")):
            self.operation = seen.operation
        self.evidence[seen.via] = self.evidence.get(seen.via, 0) + seen.count
        if seen.what == "writeback" and seen.ino is not None:
            self.data[seen.channel] = self.data.get(seen.channel, 0) + seen.count
        if seen.channel not in self.channels:
            self.channels.append(seen.channel)
        self.refine(seen)
        if self.function is None and self.symbol is None:
            self.function, self.line, self.symbol = seen.function, seen.line, seen.symbol
        elif self.function is None:
            self.function, self.line = seen.function, seen.line
        if seen.what != "told":
            self.process = self.process or seen.process
        elif seen.process is not None and seen.process not in self.heard:
            self.heard = [*self.heard, seen.process][-_MOST_HEARD:]
        if self.text is None and seen.text is not None:
            self.text = seen.text[:_MOST_TEXT]
        if seen.state is not None and SEVERITY[seen.state] > SEVERITY[self.condition]:
            self.condition = seen.state

    def refine(self, seen: Observation) -> None:
        """Fill in what was not known of the object."""
        if self.collective:
            return
        self.errno = self.errno or seen.errno
        if self.ino is None and seen.ino is not None:
            self.ino, self.gen, self.scope = seen.ino, seen.gen, "inode"
        elif self.ino is not None and not self.gen:
            self.gen = seen.gen if seen.gen is not None else self.gen
        if self.group is None and seen.group is not None:
            self.group = seen.group
            self.scope = "group" if self.ino is None else self.scope
        if self.start is None and seen.start is not None:
            self.start, self.length = seen.start, seen.length
            if seen.scope == "block" and self.scope in ("fs", "device"):
                self.scope = "block"
        # What a filesystem says of itself is nearer than its device; what became of it is not.
        if self.scope == "device" and seen.what not in CONSEQUENCES:
            self.scope = seen.scope
        self.part = self.part or seen.part

    def incident(self, ledger: "Ledger", kernel: str | None) -> Incident:
        """Say it; what is counted after this is `count` of the next time."""
        total = self.total
        new, self.told = max(total - self.told, 0), total
        anywhere = self.collective
        return Incident(
            id=self.id,
            revision=self.revision,
            fs=ledger.fs,
            scope=self.scope,
            object=Object(
                ino=self.ino,
                gen=self.gen,
                path=self.path,
                path_source=self.path_source,
                paths=self.paths,
                group=self.group,
                start=self.start,
                length=self.length,
            ),
            errno=name_of(self.errno),
            meaning=(
                "more objects are broken than are told one by one"
                if anywhere
                else meaning_of(self.errno)
            ),
            count=new,
            total=total,
            count_source=self.source,
            at_least=ledger.at_least(self),
            first_seen=self.first_seen,
            last_seen=self.last_seen,
            location=Location(
                function=self.function,
                line=self.line,
                symbol=self.symbol,
                kernel=kernel if self.function or self.symbol else None,
            ),
            operation=self.operation,
            state=self.condition,
            process=self.process,
            heard=tuple(self.heard),
            channels=tuple(self.channels),
            lost=ledger.lost,
            advice=advice_for(self.errno, self.condition),
            text=self.text,
            status="merged"
            if self.state == "MERGED"
            else "resolved"
            if self.state == "RESOLVED"
            else "open",
            resolved=self.resolved,
            merged_into=self.merged_into,
        )


# What the block layer was asked, in its words; the superblock has the number of a block.
def _of_device(operation: str) -> bool:
    return operation.startswith("block ") and not operation.removeprefix("block ").isdigit()


CASE: Lifetime[Case] = Lifetime(
    "Case",
    states=("OPEN", "RESOLVED", "MERGED"),
    transitions={"resolve": "OPEN -> RESOLVED", "merge": "OPEN -> MERGED"},
    invariants={
        "what is resolved says why": lambda c: c.state != "RESOLVED" or bool(c.resolved),
        "what is merged says into what": lambda c: c.state != "MERGED" or bool(c.merged_into),
    },
)


class Ledger(msgspec.Struct, kw_only=True):
    """A filesystem's open cases, and the counters that are the truth about them.

    ``counter`` is ext4's errors_count as last read, ``closed`` what cases that are no longer open
    have of it, ``checked`` when it was checked last, in seconds since the epoch, as read in the
    ``life`` of its superblock, with ``mounts`` since the check. ``stats`` are btrfs's, by device
    and kind. ``lost`` counts records known to be lost for this filesystem,
    ``uncounted`` says that there were more.
    """

    dev: Dev
    fs: Filesystem
    cases: list[Case] = []
    counter: int | None = None
    closed: int = 0
    checked: int = 0
    mounts: int | None = None
    life: int = 0
    stats: dict[str, int] = {}
    lost: int = 0
    uncounted: bool = False
    last_event: float = LONG_AGO
    last_io: int = 0
    last_io_at: float = LONG_AGO

    @property
    def counted(self) -> int:
        """The errors that its cases have of the counter."""
        return self.closed + sum(case.errors for case in self.cases)

    def at_least(self, case: Case) -> bool:
        """Whether there may have been more than `case` says."""
        if case.counted:
            unheard = case.written > 0 and (self.lost > 0 or self.uncounted)
            return self.counter is None or unheard
        if "counters.stats" in case.evidence:
            return False
        # The rest is records: exact unless some were lost, except on xfs, where not every error
        # makes one.
        return self.fs.fstype == "xfs" or self.lost > 0 or self.uncounted
