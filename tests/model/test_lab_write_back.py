"""Who learns that written data was lost: the verdict on each design, and what was learned."""

import pytest

from fanwise.lab import explore
from fanwise.lab.scenarios import write_back
from fanwise.lab.scenarios.write_back import SCENARIO, ErrSeq, Inode
from fanwise.notify.reserve import Reserve
from tests.model.lab_verdicts import judged


@pytest.mark.parametrize("slug", ["errseq-retry", "event-merge"])
def test_without_a_bound_it_holds_too(slug):
    assert explore(SCENARIO[slug], bound=None).verdict == "holds"


def test_errseq_needs_three_preemptions_to_break():
    assert explore(SCENARIO["errseq"], bound=2).verdict == "holds"


def test_errseq_holds_while_all_losses_have_one_errno(monkeypatch):
    def build(world):
        inode = Inode(world)
        inode.begin(ErrSeq(inode))

    monkeypatch.setattr(write_back, "ENOSPC", write_back.EIO)
    assert judged(SCENARIO, build, None).verdict == "holds"


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
