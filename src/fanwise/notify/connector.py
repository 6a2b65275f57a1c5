"""Connectors: the marks of all groups on one object, and what they make of an event.

A mask is resolved against the marks once and kept until a mark changes, so an event costs what the
groups that want it cost: marks of this object that do not want it are not looked at again.

REFS      the superblock's index holds the connector; it holds its marks that are not yet dying.
LOCKING   none: one owner.
LIFETIME  LIVE while it has a mark. The last mark that leaves detaches it, and the index forgets it.
Linux reference: fs/notify/mark.c (struct fsnotify_mark_connector), send_to_group in
fs/notify/fsnotify.c, fanotify_group_event_mask in fs/notify/fanotify/fanotify.c.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from fanwise.lifetime import Lifetime

from .mark import Mark, clears
from .mask import EVENTS, ON_CHILD, ONDIR

if TYPE_CHECKING:
    from .group import Group

_MOST_PLANS = 512  # masks in use are a few dozen; whoever sends random ones gains nothing


class Plan(NamedTuple):
    """What the marks of one object make of an event's mask.

    ``groups`` are those with a mark that has a say: (group, bits asked for, bits ignored, whether
    the mark is about such objects). ``alone`` is the answer when no other object's marks have a
    say: (group, mask to queue). ``cleared`` are the marks whose ignore mask the event ends.
    """

    groups: tuple[tuple["Group", int, int, bool], ...]
    alone: tuple[tuple["Group", int], ...]
    cleared: tuple[Mark, ...]


NOTHING = Plan((), (), ())


class Connector:
    """The marks on one object. ``forgotten`` is called when the last one has left."""

    __slots__ = ("_child_plans", "_forgotten", "_plans", "marks", "state")

    state: str

    def __init__(self, forgotten: Callable[[], object]) -> None:
        self.marks: dict[Mark, None] = {}
        self._forgotten = forgotten
        self._plans: dict[int, Plan] = {}
        self._child_plans: dict[int, Plan] = {}
        CONNECTOR.start(self)

    def remove(self, mark: Mark) -> None:
        """Take a mark off; with the last one the connector is detached."""
        del self.marks[mark]
        self.forget()
        if not self.marks:
            CONNECTOR.advance(self, "detach")
            self._forgotten()

    def forget(self) -> None:
        """Forget what was resolved: a mark has changed."""
        self._plans.clear()
        self._child_plans.clear()

    def plan(self, mask: int) -> Plan:
        """Resolve an event on this object itself, or in this directory."""
        plan = self._plans.get(mask)
        if plan is None:
            plan = _keep(self._plans, mask, self._resolve(mask, False))
        if plan.cleared:
            self._clear(plan)
            return self.plan(mask)
        return plan

    def child_plan(self, mask: int) -> Plan:
        """Resolve an event on a child of this directory."""
        plan = self._child_plans.get(mask)
        if plan is None:
            plan = _keep(self._child_plans, mask, self._resolve(mask, True))
        if plan.cleared:
            self._clear(plan)
            return self.child_plan(mask)
        return plan

    def _clear(self, plan: Plan) -> None:
        # As in send_to_group: before the event is matched, so it is not ignored itself.
        for mark in plan.cleared:
            mark.ignore = 0
        self.forget()

    def _resolve(self, mask: int, child: bool) -> Plan:
        bits = mask & (ON_CHILD if child else EVENTS)
        ondir = bool(mask & ONDIR)
        groups, alone, cleared = [], [], []
        for mark in self.marks:
            if mark.state != "ATTACHED" or (child and not mark.watches_children()):
                continue
            if clears(mark, bits):
                cleared.append(mark)
            applies = mark.applies(ondir, child)
            wanted = mark.mask & bits if applies else 0
            ignored = mark.ignored(ondir, child) & bits
            if wanted or ignored or applies:
                groups.append((mark.group, wanted, ignored, applies))
            if out := wanted & ~ignored:
                alone.append((mark.group, out | mask & ONDIR))
        return Plan(tuple(groups), tuple(alone), tuple(cleared))


def _keep(plans: dict[int, Plan], mask: int, plan: Plan) -> Plan:
    if len(plans) >= _MOST_PLANS:
        plans.clear()
    plans[mask] = plan
    return plan


CONNECTOR: Lifetime[Connector] = Lifetime(
    "Connector",
    states=("LIVE", "DETACHED"),
    transitions={"detach": "LIVE -> DETACHED"},
    invariants={
        "a detached connector has no marks": lambda c: c.state == "LIVE" or not c.marks,
    },
)
