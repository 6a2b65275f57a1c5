"""What a full queue tells: the verdicts, and what was learned on the way."""

import pytest

from fanwise.lab import explore
from fanwise.lab.scenarios.note_queue import SCENARIO, Counted, Desk, Inline, Pipe
from fanwise.notify.queue import Queue
from tests.model.lab_verdicts import judged


def test_without_a_bound_counting_holds_too():
    assert explore(SCENARIO["counted-loss"], bound=None).verdict == "holds"


def variant(queue, **reader):
    def build(world):
        desk = Desk(world, **reader)
        desk.begin(queue(desk))

    return judged(SCENARIO, build)


def test_a_flag_is_in_the_right_place_when_no_note_takes_two_slots():
    assert variant(lambda desk: Pipe(desk, longest=1)).verdict == "holds"


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_reader_that_starts_anew_is_right_with_one_overflow_event(limit):
    assert variant(lambda desk: Inline(desk, limit), anew=True).verdict == "holds"


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_counting_holds_with_any_limit(limit):
    assert variant(lambda desk: Counted(desk, limit)).verdict == "holds"


ADD, POP, LOSE = Queue.add, Queue._pop, Queue.lose


def add_and_keep_the_gap_open(self, event, mask):
    lost = self._lost
    woken = ADD(self, event, mask)
    self._lost = self._lost or lost
    return woken


def pop_and_keep_the_gap_open(self, most=None):
    lost = self._lost
    out = POP(self, most)
    self._lost = lost
    return out


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("add", add_and_keep_the_gap_open),
        ("lose", lambda self, count, roots: False),
        ("lose", lambda self, count, roots: LOSE(self, count + 1, roots)),
        ("_pop", pop_and_keep_the_gap_open),
    ],
)
def test_a_fault_put_into_our_own_queue_is_found(monkeypatch, name, wrong):
    monkeypatch.setattr(Queue, name, wrong)
    result = explore(SCENARIO["counted-loss"], bound=2)
    assert result.property in ("loss-in-place", "loss-counted"), result
