"""Scenario ``evict-read``: taking a file's content away while others may be reading it.

Models; fanwise's own eviction joins them with ``tier``.

REFS      a file counts its users: descriptors, mappings, and the listener's event descriptors.
LOCKING   a write lease: granted to whoever is alone with the file, and every open waits for it.
LIFETIME  `CONTENT`, `LEASE` below.
"""

from collections.abc import Generator
from typing import TypeAlias, TypeVar

from fanwise.lab import Scenario, World
from fanwise.lifetime import Lifetime, Until

T = TypeVar("T")
Task: TypeAlias = Generator[str | Until, None, T]

SCENARIO = Scenario(
    "evict-read",
    "Evicting a file that somebody may be reading",
    """\
A tier keeps files whose content is partly elsewhere. An access to a hole raises a pre-content
event, a listener fills the hole, and the reader goes on and never knows. Eviction is the way back:
punch the hole again to have the space. The kernel has no call that punches only if nobody looks,
so the question is what keeps a reader out between its permission to read and its last byte.

**Nothing does.** The hook comes before the copy. A reader that was allowed, because the content was
there, copies after the punch, and gets zeros without an error. A mapping is worse: its one event
comes with `mmap`, and its page faults raise none for as long as it lives. Measured on ext4, xfs and
btrfs, between 0.8 % and 29 % of the reads were wrong while somebody evicted.

**A lease keeps them out.** A write lease is granted only to whoever is alone with the file: no
descriptor, no mapping. While it is held, an open waits. But the punch raises an event of its own;
to read an event the listener must be given a descriptor of the file, and that open waits for the
lease, whose holder waits for the verdict. All that opens the file then stands still until the
kernel breaks the lease by force, after 45 seconds.

**A lease on a silent descriptor.** The descriptor that comes with an event raises no events. So
fanwise reads no bytes from the file, keeps the descriptor that this event came with, takes the
lease on it and punches through it. What a user wrote is looked for under the lease: stores into a
mapping raise no event, so the change time decides. The map is made to say *absent* first, and
durably, so that a crash at any step leaves either the content or an event.

**When an eviction begins.** A whole file carries an ignore mark, without which each read would cost
an event, and with which a hole reads as zeros for ever. So the mark goes first. But an event that
comes before the lease finds the file whole, and whoever handles it puts the mark back when it is
done. A number that each eviction raises tells it not to; and the number has to be raised under
the lease, when no event is in hand, not where the eviction seems to begin.
""",
    properties={
        "never-wrong-byte": "Who reads the file gets its bytes, never the zeros of a hole.",
        "no-lost-write": "What a user wrote and nobody has pushed is never evicted.",
        "map-not-ahead": "At every step the durable map calls present only what is there, so that"
        " a crash loses time and no bytes.",
        "hole-not-ignored": "At every step a file with a hole still raises events.",
        "comes-to-rest": "At the end no lease and no descriptor is left.",
    },
)


class Lease:
    """The write lease of a file."""

    __slots__ = ("holders", "name", "state")

    def __init__(self) -> None:
        self.name = "lease"
        self.holders: list[object] = []
        self.state = ""
        LEASE.start(self)

    @property
    def free(self) -> bool:
        """Whether nobody holds it."""
        return not self.holders

    def take(self, holder: object) -> None:
        """Take it; it is free."""
        self.holders.append(holder)
        LEASE.advance(self, "take")

    def drop(self) -> None:
        """Give it back."""
        self.holders.clear()
        LEASE.advance(self, "drop")


LEASE: Lifetime[Lease] = Lifetime(
    "Lease",
    states=("FREE", "HELD"),
    transitions={"take": "FREE -> HELD", "drop": "HELD -> FREE"},
    invariants={
        "it is held by one, or free": lambda lease: len(lease.holders) == (lease.state == "HELD")
    },
)


class Verdict:
    """A pending pre-content event, and the verdict that its raiser waits for."""

    __slots__ = ("answered", "holders", "mint", "name")

    def __init__(self, listener: object, *, mint: bool = False) -> None:
        self.name = "verdict"
        self.holders = [listener]
        self.mint = mint  # its descriptor is kept for the evictor
        self.answered = False


class File:
    """A file of the tier: its content, what is known of it, and who has it open."""

    __slots__ = (
        "ctime",
        "durable",
        "events",
        "generation",
        "ignored",
        "lease",
        "present",
        "pushed",
        "state",
        "users",
    )

    def __init__(self) -> None:
        self.lease = Lease()
        self.users = 0  # descriptors, mappings, event descriptors
        self.ctime = self.pushed = 0
        self.present = self.durable = True  # the map, in memory and on disk
        self.ignored = True  # it is whole: its accesses raise no events
        self.generation = 0  # of evictions
        self.events: list[Verdict] = []
        self.state = ""
        CONTENT.start(self)

    @property
    def hole(self) -> bool:
        """Whether who reads now gets zeros."""
        return self.state == "HOLE"


CONTENT: Lifetime[File] = Lifetime(
    "Content",
    states=("WHOLE", "LEAVING", "HOLE", "FILLED"),
    transitions={
        "announce": "WHOLE, FILLED -> LEAVING",
        "punch": "WHOLE, LEAVING, FILLED -> HOLE",
        "fill": "LEAVING, HOLE -> FILLED",
        "commit": "FILLED -> WHOLE",
    },
)


class Tier:
    """What all designs have: the kernel's side of one file, its users, and the listener."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.file = File()
        file = self.file
        world.always("map-not-ahead", lambda: not (file.durable and file.hole))
        world.always("hole-not-ignored", lambda: not (file.ignored and file.hole))
        world.at_end("comes-to-rest", lambda: not file.users and file.lease.free)

    # The kernel.

    def open(self) -> Task[None]:
        """Open the file: wait for who has the lease."""
        yield Until("open", lambda: self.file.lease.free, self.file.lease)
        self.file.users += 1

    def access(self) -> Task[None]:
        """The hook of a read or of an ``mmap``: an event, unless the file is ignore-marked."""
        yield "hook"
        if not self.file.ignored:
            yield self.verdict(self.raise_event())

    def raise_event(self, *, mint: bool = False) -> Verdict:
        """Queue an event for the listener."""
        event = Verdict("listener", mint=mint)
        self.file.events.append(event)
        return event

    def verdict(self, event: Verdict) -> Until:
        """Return the step that waits for the listener's answer."""
        return Until("verdict", lambda: event.answered, event)

    def look(self) -> None:
        """Read what is there."""
        self.world.check("never-wrong-byte", not self.file.hole, "zeros were read")

    def punch(self) -> None:
        """Make the content a hole."""
        file = self.file
        self.world.check("no-lost-write", file.ctime == file.pushed, "a write was punched away")
        CONTENT.advance(file, "punch")

    # The users.

    def reader(self) -> Task[None]:
        """Open, read, close."""
        yield from self.open()
        yield from self.access()
        yield "copy"
        self.look()
        yield "close"
        self.file.users -= 1

    def mapper(self) -> Task[None]:
        """Open, map, close; look, store, and unmap. A fault raises no event."""
        yield from self.open()
        yield from self.access()
        yield "fault"  # the descriptor is closed by now, the mapping is not
        self.look()
        yield "store"
        self.look()
        self.file.ctime += 1
        yield "unmap"
        self.file.users -= 1

    # fanwise.

    def listener(self) -> Task[None]:
        """Read an event, fill if need be, answer; then commit, and silence the whole file."""
        file = self.file
        while True:
            # Reading an event opens its file for the reader of events.
            yield Until("read an event", lambda: bool(file.events) and file.lease.free, file.lease)
            event = file.events.pop(0)
            file.users += 1
            generation = file.generation
            if not event.mint:
                if not file.present:
                    yield "fill"
                    self.fill()
                yield "answer and close"
                file.users -= 1
            event.answered = True
            if not event.mint:
                yield "commit"
                self.commit(generation)

    def fill(self) -> None:
        """Fill the hole, unless somebody else has: one fill of a file at a time."""
        if not self.file.present:
            CONTENT.advance(self.file, "fill")
            self.file.present = True
            self.world.count("fills")

    def commit(self, generation: int) -> None:
        """Say durably that the file is whole, and silence it, unless an eviction began since."""
        file = self.file
        if file.generation == generation and file.present:
            if file.state == "FILLED":
                CONTENT.advance(file, "commit")
            file.durable = file.ignored = True

    def speak_up(self) -> None:
        """Take the ignore mark off: accesses raise events again."""
        self.file.ignored = False

    def renew(self) -> None:
        """Begin a new generation: what was found out before is not acted on any more."""
        self.file.generation += 1
        self.file.ignored = False

    def written(self) -> bool:
        """Whether somebody wrote what was not pushed yet, as the change time says."""
        return self.file.ctime != self.file.pushed

    def announce(self) -> None:
        """Say durably that the content is absent."""
        CONTENT.advance(self.file, "announce")
        self.file.present = self.file.durable = False

    def evictor(self) -> Task[None]:
        """What designs differ in."""
        raise NotImplementedError

    def start(self) -> None:
        """Make the tasks."""
        self.world.count("fills", 0)
        self.world.task("reader", self.reader())
        self.world.task("evictor", self.evictor())
        self.world.task("mapper", self.mapper())
        self.world.task("listener", self.listener(), daemon=True)


class NoLease(Tier):
    """What seems idle is evicted."""

    def evictor(self) -> Task[None]:
        """Evict."""
        yield "speak up"
        self.speak_up()
        yield "evict"  # at once, so that nothing but the readers is to blame
        if not self.written():
            self.renew()
            self.announce()
            self.punch()


class PlainDescriptor(Tier):
    """A lease on a descriptor like any other: what is done through it raises events."""

    def evictor(self) -> Task[None]:
        """Evict through a descriptor, under a lease."""
        file = self.file
        yield "speak up"
        self.speak_up()
        if not (yield from self.descriptor()):
            self.world.case("evict", "no event")
            return
        yield "take the lease"  # F_SETLEASE
        if not self.alone():
            self.world.case("evict", "in use")
            file.users -= 1
            return
        file.lease.take(self.world.current())
        yield "new generation"
        self.renew()
        yield "look for writes"
        if not file.present:
            self.world.case("evict", "a hole already")
        elif self.written():
            self.world.case("evict", "written to")
        else:
            yield from self.evict()
            self.world.case("evict", "done")
        yield "drop the lease"
        file.lease.drop()
        file.users -= 1

    def alone(self) -> bool:
        """Whether nobody else has the file open."""
        return self.file.users == 1

    def descriptor(self) -> Task[bool]:
        """Get a descriptor to evict through; whether there is one."""
        yield from self.open()
        return True

    def evict(self) -> Task[None]:
        """Under the lease: say that the content is absent, then make it so."""
        yield "announce"
        self.announce()
        yield from self.access()  # a punch is an access
        yield "punch"
        self.punch()


class SilentDescriptor(PlainDescriptor):
    """A lease on the descriptor that came with an event: what is done through it raises none."""

    def descriptor(self) -> Task[bool]:
        """Read nothing, and keep the descriptor of the event that this raises."""
        yield from self.open()
        yield "read nothing"
        raised = not self.file.ignored
        if raised:
            yield self.verdict(self.raise_event(mint=True))
        self.file.users -= 1  # the one that was opened; the event's is kept
        return raised

    def evict(self) -> Task[None]:
        """Do the same; this punch raises nothing."""
        yield "announce"
        self.announce()
        yield "punch"
        self.punch()


@SCENARIO.design("no-lease", "What seems idle is evicted.", lifetimes=[CONTENT])
def no_lease(world: World) -> None:
    NoLease(world).start()


@SCENARIO.design(
    "lease-plain-fd",
    "A write lease on an ordinary descriptor, and the punch through it.",
    lifetimes=[CONTENT, LEASE],
)
def lease_plain_fd(world: World) -> None:
    PlainDescriptor(world).start()


@SCENARIO.design(
    "lease-silent-fd",
    "A write lease on a descriptor that raises no events, and the punch through it.",
    lifetimes=[CONTENT, LEASE],
)
def lease_silent_fd(world: World) -> None:
    SilentDescriptor(world).start()
