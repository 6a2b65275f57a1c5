"""The scenario ``evict-read``: what each design comes to, and what its parts are there for."""

import pytest

from fanwise.lab import explore, load
from fanwise.lab.scenarios import evict_read
from tests.model.lab_verdicts import judged

SCENARIO = load("evict-read")


def judge(kind, bound):
    return judged(SCENARIO, lambda world: kind(world).start(), bound)


def test_the_circle_of_the_deadlock_is_named():
    seen = explore(SCENARIO["lease-plain-fd"], bound=0).seen
    assert "for verdict, held by listener" in seen
    assert "for lease, held by evictor" in seen


def test_every_way_out_of_an_eviction_is_met():
    """The design does not hold because nothing is ever evicted, and holes are filled again."""
    result = explore(SCENARIO["lease-silent-fd"], bound=1)
    assert result.cases["evict"] == ["done", "in use", "no event", "written to"]
    assert result.counts["fills"] == (0, 1)


# -- lease-silent-fd: more of what is there once --


class Pool(evict_read.SilentDescriptor):
    """Two who read events."""

    def start(self):
        super().start()
        self.world.task("listener 2", self.listener(), daemon=True)


class Twice(evict_read.SilentDescriptor):
    def evictor(self):
        yield from super().evictor()
        yield from super().evictor()


@pytest.mark.parametrize("kind", [Pool, Twice])
def test_more_of_it_holds(kind):
    result = judge(kind, None)
    assert result.verdict == "holds"
    assert result.counts["fills"] == (0, 2 if kind is Twice else 1)
    assert ("a hole already" in result.cases["evict"]) == (kind is Twice)


# -- lease-silent-fd: each part is needed --


class OldGeneration(evict_read.SilentDescriptor):
    """The generation begins with the eviction, and not under its lease."""

    def speak_up(self):
        super().speak_up()
        self.file.generation += 1

    def renew(self):
        pass


class StaysSilent(evict_read.SilentDescriptor):
    """What put the ignore mark back before the lease is left as it is."""

    def renew(self):
        self.file.generation += 1


class CommitsWhatever(evict_read.SilentDescriptor):
    """A filler puts map and mark back whatever was begun meanwhile."""

    def commit(self, generation):
        super().commit(self.file.generation)
        self.file.ignored = True


class NoChangeTime(evict_read.SilentDescriptor):
    def written(self):
        return False


class PunchesFirst(evict_read.SilentDescriptor):
    def evict(self):
        yield "punch"
        self.punch()
        yield "announce"
        self.announce()


class NotAlone(evict_read.SilentDescriptor):
    """The lease is granted whoever has the file open."""

    def alone(self):
        return True


class FillsAgain(Pool):
    """Who was told of a hole fills it, whoever has filled it meanwhile."""

    def fill(self):
        self.file.present = False
        super().fill()


@pytest.mark.parametrize(
    ("kind", "bound", "prop"),
    [
        (OldGeneration, 1, "hole-not-ignored"),
        (StaysSilent, 1, "hole-not-ignored"),
        (CommitsWhatever, 1, "hole-not-ignored"),
        (NoChangeTime, 1, "no-lost-write"),
        (PunchesFirst, 1, "map-not-ahead"),
        (NotAlone, 1, "never-wrong-byte"),
        (FillsAgain, 2, "declared-lifetimes"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_lease_silent_fd_needs(kind, bound, prop):
    result = judge(kind, bound)
    assert (result.verdict, result.property) == ("breaks", prop)
