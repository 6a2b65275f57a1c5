"""What exploring a design came to: as a struct, as JSON, as text."""

import msgspec


class Bounds(msgspec.Struct, frozen=True):
    """What was explored: at most so many preemptions, and steps a schedule; None is no bound.

    ``sampled`` is the number of schedules that were drawn when not all were run.
    """

    preemptions: int | None
    steps: int
    sampled: int | None = None


class Result(msgspec.Struct, kw_only=True):
    """The verdict on one design.

    ``holds``: every schedule within the bounds was covered and nothing broke. ``breaks``: one
    broke ``property``, and ``schedule`` replays it. ``sampled``: nothing broke in the schedules
    that were run, and they are not all.
    """

    scenario: str
    design: str
    verdict: str
    property: str | None
    schedule: str | None
    bounds: Bounds
    schedules: int
    states: int
    steps: int = 0
    seen: str | None = None
    reduced: bool = False
    not_keyed: str | None = None
    counts: dict[str, tuple[int, int]] = {}
    cases: dict[str, list[str]] = {}

    def json(self) -> str:
        """Return it as one line of JSON."""
        return msgspec.json.encode(self).decode()
