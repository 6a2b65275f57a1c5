"""The scenario ``eventfs``: what each design comes to, and what its parts are there for."""

import pytest

from fanwise.lab import load, replay
from fanwise.lab.scenarios import eventfs
from fanwise.lab.scenarios._eventfs_kernel import FILE_INO
from fanwise.lifetime import Until
from tests.model.lab_verdicts import judged

SCENARIO = load("eventfs")


def judge(kind, bound):
    return judged(SCENARIO, lambda world: kind(world).start(), bound)


def test_the_shrinker_comes_between_reading_a_pointer_and_following_it():
    broken = replay(SCENARIO["uncounted-pointers"], "A7B2C2B1").broken
    assert (broken.property, broken.seen) == (
        "no-use-after-free",
        "sched.state is used after it was freed",
    )


# -- what it costs to keep nothing --


class Costs(eventfs.DropAtLastUse):
    must_stay = False  # else the first rebuild ends it


class Dropping(Costs):
    """The same, and memory is never short."""

    def shrinker(self):
        yield "nothing to do"


class Keeping(eventfs.Eventfs):
    shrinker = Dropping.shrinker


def test_dropping_at_last_use_is_safe_and_builds_more():
    assert judge(Costs, 3).verdict == "holds"
    assert judge(Dropping, 3).counts["rebuilds"] == (0, 1)
    assert judge(Keeping, 3).counts["rebuilds"] == (0, 0)


# -- freed-recheck: each part is needed --


class ListedUnderSrcu(eventfs.Eventfs):
    """Linux 6.8 to 6.10: freed after the walkers of paths, and not after those who list."""

    def grace(self, free):
        self.rcu.call(free)


class WalkedUnderRcu(eventfs.Eventfs):
    """Freed after those who list, and not after the walkers of paths."""

    def grace(self, free):
        self.srcu.call(free)


class NoSourceReference(eventfs.Eventfs):
    """The ei does not hold its source: the recheck itself touches what is gone."""

    def create(self, name):
        super().create(name)
        self.root.children[name].source.refs.put()

    def release(self, ei):
        ei.source = None
        super().release(ei)


class NoRevalidation(eventfs.Eventfs):
    def stale(self, dentry):
        return False


class OneNumber(eventfs.Eventfs):
    """The first version: one number for all directories."""

    def next_ino(self):
        return 1


class NumberOfTheFiles(eventfs.Eventfs):
    def next_ino(self):
        return super().next_ino() + FILE_INO - 2


class NumberWithoutLock(eventfs.Eventfs):
    """A listing gives the number without the lock under which a look-up gives it."""

    def emit(self, name, ei):
        yield f"emit {name}"
        ino = ei.ino
        yield f"number {name}"
        if not ino:
            ino = ei.ino = self.next_ino()
        return ino


@pytest.mark.parametrize(
    ("kind", "bound", "prop"),
    [
        (ListedUnderSrcu, 2, "no-use-after-free"),
        (WalkedUnderRcu, 2, "no-use-after-free"),
        (NoSourceReference, 2, "no-use-after-free"),
        (NoRevalidation, 2, "name-leads-to-present"),
        (OneNumber, 0, "unique-directory-inodes"),
        (NumberOfTheFiles, 0, "unique-directory-inodes"),
        (NumberWithoutLock, 2, "loop-free-find"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_freed_recheck_needs(kind, bound, prop):
    result = judge(kind, bound)
    assert (result.verdict, result.property) == ("breaks", prop)


class NoReferenceAtOpen(eventfs.Eventfs):
    def open(self, source):
        with (yield from self.event_mutex.lock("recheck")):
            if not source.flagged:
                self.call(source, "open")
            return not source.flagged

    def close(self, source):
        pass


def test_the_reference_of_the_open_is_covered_by_that_of_its_entry():
    """Found here: an open file holds its entry, that the ei, and that the source."""
    assert judge(NoReferenceAtOpen, 2).verdict == "holds"


# -- serial-numbers: each part is needed --


class Reused(eventfs.Numbers):
    """The lowest free number is given again."""

    def next_number(self):
        number = self.ROOT + 16
        while number in self.table:
            number += 16
        return number


class NotDrained(eventfs.Numbers):
    def drain(self, node):
        yield "do not wait"


class NotTold(eventfs.Numbers):
    """The cache is not told of a removal."""

    def invalidate(self, parent, name, number):
        pass


class ToldTooEarly(eventfs.Numbers):
    """The cache is told while a look-up may still bring the old answer."""

    def notifier(self):
        while True:
            yield Until("invalidate", lambda: bool(self.notices))
            self.invalidate(*self.notices.pop(0))


class ToldByTheServer(eventfs.Numbers):
    """The thread that answers tells the cache as well."""

    def answered(self):
        while self.notices:
            yield Until("invalidate", lambda: not self.lock.holders, self.lock)
            self.invalidate(*self.notices.pop(0))

    def notifier(self):
        yield Until("nothing to do", lambda: False)


@pytest.mark.parametrize(
    ("kind", "bound", "prop"),
    [
        (Reused, 2, "opened-is-read"),
        (NotDrained, 2, "declared-lifetimes"),
        (NotTold, 1, "name-leads-to-present"),
        (ToldTooEarly, 2, "name-leads-to-present"),
        (ToldByTheServer, 1, "no-deadlock"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_serial_numbers_needs(kind, bound, prop):
    result = judge(kind, bound)
    assert (result.verdict, result.property) == ("breaks", prop)
