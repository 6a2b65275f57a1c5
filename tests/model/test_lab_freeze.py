"""A listener that fills, and a freezing filesystem: the verdict on each design."""

import pytest

from fanwise.lab import Scenario, explore, load
from fanwise.lab.scenarios import freeze
from tests.model.lab_verdicts import HOLDS, check_reduction, check_verdict

EXPECTED = {
    "hook-under-protection": "no-deadlock",
    "hook-under-protection-loop": "no-deadlock",
    "hook-outside": HOLDS,
    "hook-outside-but-truncate": "no-deadlock",
    "hook-outside-but-overlay": "no-deadlock",
    "nowait-write": "no-deadlock",
    "nowait-write-data-only": HOLDS,
    "open-flag": "no-deadlock",
    "task-nowait": HOLDS,
    "listener-context": "no-deadlock",
    "listener-context-explicit": HOLDS,
    "inherited-nonotify": HOLDS,
    "nested-one-thread": "no-deadlock",
    "nested-two-threads": HOLDS,
    "auto-reject": "nested-faults",
    "look-up-handler": HOLDS,
    "look-up-handler-locked": "no-deadlock",
    "freeze-level": HOLDS,
    "freeze-level-page-fault": "no-deadlock",
    "exclusive-freezer": "no-deadlock",
    "listener-registered": "freezer-gets-its-turn",
    "deadline-workers": HOLDS,
}
SCENARIO = load("freeze")

design = pytest.mark.parametrize("slug", SCENARIO.designs)


def test_every_design_has_an_expected_verdict():
    assert list(SCENARIO.designs) == list(EXPECTED)


@design
def test_the_verdict(slug):
    check_verdict(SCENARIO[slug], EXPECTED[slug])


@design
def test_the_reduction_changes_no_verdict(slug):
    check_reduction(SCENARIO[slug])


def test_the_circle_of_the_deadlock_is_named():
    seen = explore(SCENARIO["hook-under-protection"]).seen
    assert "sender waits before 'take the verdict' for the verdict, held by listener" in seen
    assert "listener waits before 'start write' for write gate, held by freezer" in seen
    assert "freezer waits before 'wait for writers' for write, held by sender" in seen


def seeded(build):
    scenario = Scenario("seeded", "A seeded fault", "", SCENARIO.properties)
    scenario.design("design", "With a fault")(build)
    return explore(scenario["design"])


def test_an_answer_before_the_fill_shows_a_wrong_byte():
    class Hasty(freeze._Tier):
        def filled(self, event):
            self.answer(event, 0)
            yield from super().filled(event)

        def answer(self, event, verdict):
            if event.number in self.group.verdicts.held:
                super().answer(event, verdict)

    result = seeded(lambda world: freeze._base(world, Hasty(world, freeze._Guard())))
    assert result.property == "never-a-wrong-byte"


def test_a_freezer_that_does_not_wait_for_writers_freezes_under_them():
    class Hasty(freeze._Guard):
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

    result = seeded(lambda world: freeze._base(world, freeze._Tier(world, Hasty())))
    assert result.property == "no-write-when-frozen"


def test_a_listener_that_cannot_make_files_is_told():
    class Refusing(freeze._Tier):
        def temporary(self):
            yield "make a file"
            raise OSError(30, "Read-only file system")

    result = seeded(
        lambda world: freeze._base(world, Refusing(world, freeze._Guard(), ways=freeze.EVERYTHING))
    )
    assert result.property == "all-kinds-of-filling"


def test_a_refusal_that_no_freeze_explains_is_told():
    class Refusing(freeze._Tier):
        def filled(self, event):
            yield "refuse"
            return freeze.AGAIN

    result = seeded(lambda world: freeze._base(world, Refusing(world, freeze._Guard())))
    assert result.property == "filled"
