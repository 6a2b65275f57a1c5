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
from .mask import MARKED, ON_CHILD, ONDIR, PERMISSION, RENAME

if TYPE_CHECKING:
    from .group import Group

_MOST_PLANS = 512  # masks in use are a few dozen; whoever sends random ones gains nothing


class Plan(NamedTuple):
    """What the marks of one object make of an event's mask.

    ``groups`` are those with a mark that has a say: (group, bits asked for, bits ignored, whether
    the mark is about such objects). ``alone`` is the answer when no other object's marks have a
    say: (group, mask to queue).
    """

    groups: tuple[tuple["Group", int, int, bool], ...]
    alone: tuple[tuple["Group", int], ...]


class Connector:
    """The marks on one object. ``forgotten`` is called when the last one has left."""

    __slots__ = ("_forgotten", "child_plans", "marks", "plans", "state")

    state: str

    def __init__(self, forgotten: Callable[[], object]) -> None:
        self.marks: dict[Mark, None] = {}
        self._forgotten = forgotten
        self.plans: dict[int, Plan] = {}
        self.child_plans: dict[int, Plan] = {}
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
        self.plans.clear()
        self.child_plans.clear()

    def plan(self, mask: int) -> Plan:
        """Resolve an event on this object itself, or in this directory."""
        return self.plans.get(mask) or _keep(self.plans, mask, self._resolve(mask, False))

    def child_plan(self, mask: int) -> Plan:
        """Resolve an event on a child of this directory."""
        return self.child_plans.get(mask) or _keep(
            self.child_plans, mask, self._resolve(mask, True)
        )

    def _resolve(self, mask: int, child: bool) -> Plan:
        bits = mask & (ON_CHILD | PERMISSION if child else MARKED)
        ondir = bool(mask & ONDIR)
        groups, alone = [], []
        for mark in self.marks:
            if mark.state != "ATTACHED" or (child and not mark.watches_children()):
                continue
            # As in send_to_group: before the event is matched, so it is not ignored itself. A mark
            # that could end so again forgets what is kept when it gets an ignore mask.
            if clears(mark, bits):
                mark.ignore = 0
                self.forget()
            applies = mark.applies(ondir, child)
            wanted = mark.mask & bits if applies else 0
            ignored = mark.ignored(ondir, child) & bits
            if wanted or ignored or (applies and mask & RENAME):
                groups.append((mark.group, wanted, ignored, applies))
            if out := wanted & ~ignored:
                alone.append((mark.group, out | mask & ONDIR))
        return Plan(tuple(groups), tuple(alone))


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
