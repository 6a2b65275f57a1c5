"""Where an error event's memory lives: the verdicts, and what was learned on the way."""

import pytest

from fanwise.lab import Scenario, explore, replay
from fanwise.lab.scenarios import error_event
from fanwise.lab.scenarios._error_memory import (
    Details,
    Pool,
    SlotBounceBuffer,
    SlotErrCount,
    SlotHoldsMark,
    SlotMarkAlive,
    SlotRefcount,
    SlotReplace,
)
from fanwise.lab.scenarios.error_event import SCENARIO
from fanwise.notify.mark import MARK, Mark
from fanwise.notify.reserve import Reserve
from tests.model.lab_verdicts import HOLDS, check_reduction, check_verdict

DESIGNS = {
    "slot-holds-mark": "destruction-order",
    "slot-mark-alive": "no-use-after-free",
    "slot-bounce-buffer": HOLDS,
    "slot-err-count": HOLDS,
    "slot-replace": HOLDS,
    "slot-replace-posted": "no-use-after-free",
    "slot-refcount": HOLDS,
    "group-reserve": HOLDS,
    "group-reserve-short": "no-lost-error",
    "detailed-records": HOLDS,
}

# Letters: errors A and B, reader C, remover D, closer E, reaper F; of slot-replace errors A,
# readers B and C.
SCHEDULES = {
    # An error is queued and holds the mark; the closer waits only for marks that nobody holds.
    ("slot-holds-mark", "A4E7"): "destruction-order",
    # The slot is claimed, not queued, when the closer frees the mark and the slot with it.
    ("slot-mark-alive", "A2E4A1"): "no-use-after-free",
    # The same with the remover, and while the group stays open.
    ("slot-mark-alive", "B2D2B1"): "no-use-after-free",
    # Queued, read and freed, and the dead mark still points to it.
    ("slot-err-count-posted", "A4B1D2C1B1"): "no-use-after-free",
    # Claimed, and the group has stopped: nobody frees it.
    ("slot-err-count-posted", "E3D1A4C1E1F2E3B1"): "no-leak",
    # An event is queued, its mark is freed, and the event along with it.
    ("slot-replace-posted", "A2E4F2E2"): "no-use-after-free",
    # The reader holds the one event there is.
    ("group-reserve-short", "A2C1B2"): "no-lost-error",
}


@pytest.mark.parametrize("slug", DESIGNS)
def test_the_verdict(slug):
    check_verdict(SCENARIO[slug], DESIGNS[slug])


def test_the_sketch_of_the_error_count_breaks_in_either_way():
    result = explore(SCENARIO["slot-err-count-posted"])
    assert result.verdict == "breaks"
    assert result.property in ("no-leak", "no-use-after-free")
    assert {*DESIGNS, "slot-err-count-posted"} == set(SCENARIO.designs)


@pytest.mark.parametrize("slug", SCENARIO.designs)
def test_the_reduction_changes_no_verdict(slug):
    check_reduction(SCENARIO[slug])


@pytest.mark.parametrize(("slug", "schedule"), SCHEDULES)
def test_a_schedule_breaks_it_again(slug, schedule):
    assert replay(SCENARIO[slug], schedule).broken.property == SCHEDULES[slug, schedule]


@pytest.mark.parametrize(
    "slug", ["slot-bounce-buffer", "slot-err-count", "slot-refcount", "detailed-records"]
)
def test_without_a_bound_it_holds_too(slug):
    assert explore(SCENARIO[slug], bound=None).verdict == "holds"


def test_what_was_merged_has_the_fewest_special_cases():
    cases = {}
    for slug, broken in DESIGNS.items():
        if broken is HOLDS:
            cases[slug] = sum(map(len, explore(SCENARIO[slug], bound=1).cases.values()))
    assert cases == {
        "slot-bounce-buffer": 4,
        "slot-err-count": 6,
        "slot-replace": 6,
        "slot-refcount": 4,
        "group-reserve": 0,
        "detailed-records": 1,
    }


def test_details_cannot_say_which_file():
    assert explore(SCENARIO["detailed-records"]).counts == {
        "errors told without their object": (0, 2)
    }


def variant(design, **tasks):
    """Explore a design that is not in the catalogue; at a bound of 2."""
    scenario = Scenario("variants", "Variants", "Made here.", SCENARIO.properties)

    @scenario.design("variant", "One of them.")
    def build(world):
        error_event._kernel(world, design(), **tasks)

    return explore(scenario["variant"], bound=2)


def test_the_slot_that_holds_its_mark_is_safe_as_to_memory():
    # A mark holds its group until it is freed; only the order of the end is turned round.
    assert variant(SlotHoldsMark, order=False, remover=False).verdict == "holds"


def test_its_reference_may_be_of_a_mark_that_has_none():
    # Taken all the same, as posted, or not: then the error that another counted meanwhile is lost.
    posted, mended = (lambda: SlotHoldsMark(plainly=True)), SlotHoldsMark
    assert variant(posted, order=False).property == "refcount"
    assert variant(mended, order=False).property == "no-lost-error"


@pytest.mark.parametrize(
    "design", [SlotBounceBuffer, SlotErrCount, SlotRefcount, lambda: Pool(2), lambda: Details(1)]
)
def test_an_unmounting_that_holds_a_mark_turns_the_order_round_in_each_design(design):
    # So does the kernel's, and no event is needed for it: nothing but the order breaks.
    unmounted = {"remover": False, "unmount": True}
    assert variant(design, **unmounted).property == "destruction-order"
    assert variant(design, **unmounted, order=False).verdict == "holds"


def test_the_lock_that_is_dropped_matters_and_not_the_flag():
    # With the mark removed by nobody before the group has stopped, the closer does it.
    assert variant(SlotMarkAlive, remover=False).property == "no-use-after-free"


def test_a_pool_needs_an_event_for_each_reader_too():
    assert variant(lambda: Pool(1)).property == "no-lost-error"
    assert variant(lambda: Pool(2)).verdict == "holds"


def test_a_pool_from_which_is_taken_before_merging_needs_more():
    tasks = {"errors": (1, 1, 1), "remover": False}
    first = [variant(lambda size=size: Pool(size, merge_first=False), **tasks) for size in (2, 3)]
    assert [result.property for result in first] == ["no-lost-error", None]
    assert variant(lambda: Pool(2), **tasks).verdict == "holds"


def test_who_replaces_the_slot_may_have_to_do_it_again():
    assert (
        variant(SlotReplace, errors=(1,), readers=2, reads=1, remover=False).counts["retries"][1]
        >= 1
    )


ADD = Reserve.add


def allocated_when_raised(self, event, scope, behind):
    self._free.append(self.allocate())
    ADD(self, event, scope, behind)


def no_room_for_readers(self):
    self.readers += 1


def emptied_late(self, slot):
    self.delivered += slot.event.count or 0
    self.held -= 1
    self._free.append(slot)


def reaped_while_held(self):
    if self.state == "DYING":
        del self.group.dying[self]
        MARK.advance(self, "reap")


FAULTS = [
    (Reserve, "add", allocated_when_raised, "atomic-context"),
    (Reserve, "enter", no_room_for_readers, "declared-lifetimes"),
    (Reserve, "done", emptied_late, "declared-lifetimes"),
    (Reserve, "unmark", lambda self, fs: None, "declared-lifetimes"),
    (Reserve, "flush", lambda self: None, "declared-lifetimes"),
    (Mark, "_reap", lambda self: None, "no-deadlock"),
    (Mark, "_reap", reaped_while_held, "declared-lifetimes"),
    (Mark, "free", lambda self: None, "no-deadlock"),
]


@pytest.mark.parametrize(("cls", "name", "wrong", "broken"), FAULTS)
def test_a_fault_put_into_our_own_code_is_found(monkeypatch, cls, name, wrong, broken):
    monkeypatch.setattr(cls, name, wrong)
    assert explore(SCENARIO["group-reserve"], bound=2).property == broken
