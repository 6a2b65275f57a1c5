"""When a delete is told: the verdict on each design."""

from fanwise.lab import explore, load
from fanwise.lab.scenarios import delete_order
from fanwise.notify.mask import DELETE
from fanwise.vfs import Deleting
from tests.model.lab_verdicts import judged

SCENARIO = load("delete-order")


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

    def build(world):
        files = delete_order._model(world, Twice)
        world.task("another reader", files.reader(), daemon=True)

    assert judged(SCENARIO, build).property == "told-once"
