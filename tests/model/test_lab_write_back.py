"""Who learns that written data was lost: the verdict on each design, and what was learned."""

import pytest

from fanwise.lab import Scenario, explore, replay
from fanwise.lab.scenarios import write_back
from fanwise.lab.scenarios.write_back import SCENARIO, ErrSeq, Inode
from fanwise.notify.reserve import Reserve
from tests.model.lab_verdicts import HOLDS, check_reduction, check_verdict

DESIGNS = {
    "last-error": "everyone-told",
    "errseq": "everyone-told",
    "errseq-retry": HOLDS,
    "errseq-evict": "somebody-told",
    "event-merge": HOLDS,
}

# Letters: write-back A and B, descriptors C and D.
SCHEDULES = {
    # D takes along what C is owed.
    ("last-error", "A2B1D2C1"): "everyone-told",
    # C has read EIO; ENOSPC comes in between, so C marks nothing; EIO again; D marks it, and now
    # the value is what C remembers.
    ("errseq", "A2C1B2C1A2D3C1"): "everyone-told",
    # All is lost and the inode gone when C opens the file.
    ("errseq-evict", "A3B2D1C3"): "somebody-told",
}


@pytest.mark.parametrize("slug", SCENARIO.designs)
def test_the_verdict(slug):
    check_verdict(SCENARIO[slug], DESIGNS[slug])


@pytest.mark.parametrize("slug", SCENARIO.designs)
def test_the_reduction_changes_no_verdict(slug):
    check_reduction(SCENARIO[slug])


@pytest.mark.parametrize(("slug", "schedule"), SCHEDULES)
def test_a_schedule_breaks_it_again(slug, schedule):
    assert replay(SCENARIO[slug], schedule).broken.property == SCHEDULES[slug, schedule]


@pytest.mark.parametrize("slug", ["errseq-retry", "event-merge"])
def test_without_a_bound_it_holds_too(slug):
    assert explore(SCENARIO[slug], bound=None).verdict == "holds"


def test_errseq_needs_three_preemptions_to_break():
    assert explore(SCENARIO["errseq"], bound=2).verdict == "holds"


def test_errseq_holds_while_all_losses_have_one_errno(monkeypatch):
    scenario = Scenario("variants", "Variants", "Made here.", SCENARIO.properties)

    @scenario.design("variant", "One of them.")
    def build(world):
        inode = Inode(world)
        inode.begin(ErrSeq(inode))

    monkeypatch.setattr(write_back, "ENOSPC", write_back.EIO)
    assert explore(scenario["variant"], bound=None).verdict == "holds"


def delivered_twice(self, slot):
    self.held -= 1
    self._put_back(slot)


def merged_uncounted(self, event, scope, behind):
    if self._homes[event.fs].queued is None:
        ADD(self, event, scope, behind)


def merged_with_the_last_errno(self, event, scope, behind):
    ADD(self, event, scope, behind)
    self._homes[event.fs].queued.event.error = event.error


ADD = Reserve.add


@pytest.mark.parametrize(
    ("name", "wrong", "broken"),
    [
        ("done", delivered_twice, "told-once"),
        ("add", merged_uncounted, "everyone-told"),
        ("add", merged_with_the_last_errno, "true-errno"),
    ],
)
def test_a_fault_put_into_our_own_reserve_is_found(monkeypatch, name, wrong, broken):
    monkeypatch.setattr(Reserve, name, wrong)
    assert explore(SCENARIO["event-merge"], bound=2).property == broken
