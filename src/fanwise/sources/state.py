"""What a source of health says about itself."""

from typing import Literal, Protocol

import msgspec


class SourceState(msgspec.Struct, frozen=True, gc=False):
    """Whether a source works.

    ``state`` is "up"; "degraded" when it sees less than it could, or "down" when it sees nothing,
    both with the ``reason`` and, when there is one, the remedy. ``lost`` counts records known to
    be lost since it was opened; ``uncounted`` says that there were losses without a number.
    """

    name: str
    state: Literal["up", "degraded", "down"]
    reason: str | None = None
    lost: int = 0
    uncounted: bool = False


class HealthSource(Protocol):
    """What the sources of health have in common, whatever their records are.

    ``open`` raises a FanwiseError when there can be no such source here, or the source is down and
    says why; ``fileno`` is readable when there is something; ``close`` is idempotent.
    """

    def open(self) -> None: ...  # noqa: D102

    def fileno(self) -> int: ...  # noqa: D102

    def status(self) -> SourceState: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102
