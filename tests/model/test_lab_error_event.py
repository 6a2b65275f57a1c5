"""Where an error event's memory lives: the verdicts, and what was learned on the way."""

import pytest

from fanwise.lab import explore
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
from tests.model.lab_verdicts import HOLDS, VERDICTS, judged


@pytest.mark.parametrize(
    "slug", ["slot-bounce-buffer", "slot-err-count", "slot-refcount", "detailed-records"]
)
def test_without_a_bound_it_holds_too(slug):
    assert explore(SCENARIO[slug], bound=None).verdict == "holds"


def test_what_was_merged_has_the_fewest_special_cases():
    cases = {
        slug: sum(map(len, explore(SCENARIO[slug], bound=1).cases.values()))
        for slug, broken in VERDICTS["error-event"].items()
        if broken is HOLDS
    }
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

    def build(world):
        error_event._kernel(world, design(), **tasks)

    return judged(SCENARIO, build, 2)


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
