"""A listener that fills, and a freezing filesystem: the verdict on each design."""

import pytest

from fanwise.lab import explore, load
from fanwise.lab.scenarios import freeze
from fanwise.lab.scenarios._freeze_tier import (
    AGAIN,
    DATA,
    EVERYTHING,
    EVERYWHERE,
    Tier,
    TryingGuard,
)
from fanwise.vfs.locks import NOTHING
from fanwise.vfs.superblock import USER
from tests.model.lab_verdicts import judged

SCENARIO = load("freeze")


def test_the_circle_of_the_deadlock_is_named():
    seen = explore(SCENARIO["hook-under-protection"]).seen
    assert "sender waits before 'take the verdict' for the verdict, held by listener" in seen
    assert "listener waits before 'start write' for write gate, held by freezer" in seen
    assert "freezer waits before 'wait for writers' for write, held by sender" in seen


def seeded(build):
    return judged(SCENARIO, build)


def test_an_answer_before_the_fill_shows_a_wrong_byte():
    class Hasty(Tier):
        def filled(self, event):
            self.answer(event, 0)
            yield from super().filled(event)

        def answer(self, event, verdict):
            if event.number in self.group.verdicts.held:
                super().answer(event, verdict)

    result = seeded(lambda world: freeze._base(world, Hasty(world, TryingGuard())))
    assert result.property == "never-a-wrong-byte"


def test_a_freezer_that_does_not_wait_for_writers_freezes_under_them():
    class Hasty(TryingGuard):
        def freeze(self, sb, by):
            yield "freeze"
            for level in sb.freeze.levels.values():
                level.shut()
            sb.freeze.state = "FROZEN"

        def thaw(self, sb, by):
            yield "thaw"
            for level in sb.freeze.levels.values():
                level.unshut()
            sb.freeze.state = "THAWED"

    result = seeded(lambda world: freeze._base(world, Tier(world, Hasty())))
    assert result.property == "no-write-when-frozen"


@pytest.mark.parametrize("way", EVERYTHING)
def test_a_write_that_takes_no_protection_lands_on_a_frozen_filesystem(way):
    class Reckless(TryingGuard):
        def start(self, sb, level):
            if self.vfs.current() not in self.trying:
                return (yield from super().start(sb, level))
            yield "start nothing"
            return NOTHING

    def build(world):
        ways = (way, DATA)
        freeze._base(world, Tier(world, Reckless(), ways=ways, tries=lambda each: each == way))

    result = seeded(build)
    assert result.property == "no-write-when-frozen"


def test_a_listener_that_cannot_make_files_is_told():
    class Refusing(Tier):
        def temporary(self):
            yield "make a file"
            raise OSError(30, "Read-only file system")

    result = seeded(
        lambda world: freeze._base(world, Refusing(world, TryingGuard(), ways=EVERYTHING))
    )
    assert result.property == "all-kinds-of-filling"


def test_a_refusal_that_no_freeze_explains_is_told():
    class Refusing(Tier):
        def filled(self, event):
            yield "refuse"
            return AGAIN

    result = seeded(lambda world: freeze._base(world, Refusing(world, TryingGuard())))
    assert result.property == "filled"


def test_a_snapshot_of_the_device_does_not_ask_the_one_freezer_either():
    """It freezes for user space, beside whoever has done so, before the listener is done."""

    class Nesting(TryingGuard):
        def may_freeze(self, sb, by):
            return True

    def build(world):
        tier = Tier(world, Nesting(EVERYWHERE))
        world.task("sender", tier.sender())
        world.task("listener", tier.listener(), daemon=True)
        world.task("freezer", tier.freezer(USER, lambda: tier.got is not None))
        world.task("device snapshot", tier.freezer(USER))

    assert seeded(build).property == "no-deadlock"
