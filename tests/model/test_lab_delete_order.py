"""When a delete is told: the verdict on each design."""

import pytest

from fanwise.lab import Scenario, explore, load
from fanwise.lab.scenarios import delete_order
from fanwise.notify.mask import DELETE
from fanwise.vfs import Deleting
from tests.model.lab_verdicts import HOLDS, check_reduction, check_verdict

EXPECTED = {
    "notify-first": "gone-when-told",
    "inside-drop": "names-its-object",
    "mark-flag": HOLDS,
    "mark-flag-unasked": "gone-when-told",
    "pre-delete-event": HOLDS,
    "pre-delete-event-late-mark": "names-its-object",
    "prepare-report": HOLDS,
    "prepare-report-late-mark": HOLDS,
    "pin-drop-notify": HOLDS,
    "pin-drop-notify-late-mark": HOLDS,
    "hold-until-gone": HOLDS,
}
SCENARIO = load("delete-order")

design = pytest.mark.parametrize("slug", SCENARIO.designs)


def test_every_design_has_an_expected_verdict():
    assert list(SCENARIO.designs) == list(EXPECTED)


@design
def test_the_verdict(slug):
    check_verdict(SCENARIO[slug], EXPECTED[slug])


@design
def test_the_reduction_changes_no_verdict(slug):
    check_reduction(SCENARIO[slug])


def test_what_it_costs_when_nobody_listens():
    costs = {}
    for slug in ("notify-first", "pre-delete-event", "prepare-report", "pin-drop-notify"):
        counts = explore(SCENARIO[slug], bound=0).counts
        references, questions = "references taken for it", "questions asked for it"
        events = "events built for it"
        costs[slug] = [counts[name][1] for name in (references, questions, events)]
    first = costs["notify-first"]
    assert costs["pre-delete-event"] == [first[0], 1, 0]
    assert costs["prepare-report"] == first  # a filesystem without marks builds nothing
    assert costs["pin-drop-notify"] == [first[0] + 1, 0, 0]


def test_an_event_told_twice_is_told():
    class Twice(Deleting):
        def remove(self, parent, dentry, take_away):
            inode, name = dentry.target, dentry.name
            yield from super().remove(parent, dentry, take_away)
            self.vfs.pid = lambda: 7  # so that they do not merge
            yield from self.vfs.tell_entry(DELETE, parent, name, inode)

    scenario = Scenario("seeded", "A seeded fault", "", SCENARIO.properties)

    @scenario.design("twice", "Told twice")
    def build(world):
        files = delete_order._model(world, Twice)
        world.task("another reader", files.reader(), daemon=True)

    assert explore(scenario["twice"]).property == "told-once"
