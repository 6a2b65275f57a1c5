"""The active probe: what no file shows, asked by a helper with a deadline.

REFS      a Probe has at most one helper, for one filesystem.
LOCKING   none: one owner.
LIFETIME  see PROBE. A helper that does not answer in time is a finding: the filesystem hangs. It
          is left where it is (a process in the kernel cannot be ended), no other is started
          meanwhile, and when it answers after all the filesystem hangs no more. `close` kills it;
          if it cannot die now, it is left (see _helpers).
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from fanwise._errors import FanwiseError
from fanwise.health._helpers import end, reap
from fanwise.health._observe import Check
from fanwise.lifetime import Lifetime

DEADLINE = 5.0  # seconds

_CHILD = str(Path(__file__).with_name("_probe_child.py"))


class Finding(msgspec.Struct, frozen=True, gc=False):
    """What a look gave. "unknown": it failed with ``errno``, which need not be a fault.

    ``checked`` is when ext4 was last checked, where it could be read. ``mount`` is the id of the
    mount that was looked at, None where none answered.
    """

    state: Literal["ok", "shutdown", "unknown", "hung"]
    errno: int = 0
    uuid: str | None = None
    label: str | None = None
    checked: Check | None = None
    mount: int | None = None


class Probe:
    """Looks at one filesystem when asked; `answer` never waits."""

    state: str

    def __init__(
        self,
        fstype: str,
        point: str | bytes,
        deadline: float = DEADLINE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.point = os.fsdecode(point)
        self._argv = [sys.executable, "-BIS", _CHILD, fstype, self.point]
        self._deadline, self._clock = deadline, clock
        self._helper: subprocess.Popen[bytes] | None = None
        self._until = 0.0
        PROBE.start(self)

    def ask(self, checked: bool = False) -> bool:
        """Start a look; False while the one before has not come back. Raises FanwiseError.

        ``checked``: also for when it was checked last, which may need the disk.
        """
        if self.state in ("ASKED", "HUNG"):
            return False
        reap()
        try:
            self._helper = subprocess.Popen(
                [*self._argv, "checked"] if checked else self._argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",  # not where the host stands: that may be what hangs
            )
        except OSError as error:
            raise FanwiseError(
                f"the helper process that looks at a filesystem does not start: {error}",
                "it is sys.executable that is run: see whether it is there and may be run",
            ) from error
        assert self._helper.stdout is not None
        os.set_blocking(self._helper.stdout.fileno(), False)
        self._until = self._clock() + self._deadline
        PROBE.advance(self, "ask")
        return True

    def fileno(self) -> int:
        """Readable when the answer is there; -1 when nothing was asked."""
        if self._helper is None or self._helper.stdout is None:
            return -1
        return self._helper.stdout.fileno()

    @property
    def until(self) -> float:
        """When the answer is late, by the clock."""
        return self._until

    @property
    def idle(self) -> bool:
        """Whether nothing is asked."""
        return self.state == "IDLE"

    @property
    def hangs(self) -> bool:
        """Whether the answer is late, and this was told."""
        return self.state == "HUNG"

    def answer(self) -> Finding | None:
        """The finding, once; None while there is none yet, and while it goes on hanging."""
        if self.state not in ("ASKED", "HUNG"):
            return None
        assert self._helper is not None
        assert self._helper.stdout is not None
        data = self._helper.stdout.read()
        if data is None:  # nothing yet
            if self.state == "HUNG" or self._clock() < self._until:
                return None
            PROBE.advance(self, "miss")
            return Finding("hung")
        self._helper.stdout.close()
        self._helper.wait()  # its output ended: it is ending
        self._helper = None
        PROBE.advance(self, "answer")
        try:
            return msgspec.json.decode(data, type=Finding)
        except msgspec.DecodeError:
            return Finding("unknown")  # it was killed

    def close(self) -> None:
        """End the helper; idempotent, and does not wait for one that hangs."""
        if self.state == "CLOSED":
            return
        PROBE.advance(self, "close")
        helper, self._helper = self._helper, None
        if helper is not None:
            if helper.stdout is not None:
                helper.stdout.close()
            end(helper)


PROBE: Lifetime[Probe] = Lifetime(
    "Probe",
    states=("IDLE", "ASKED", "HUNG", "CLOSED"),
    transitions={
        "ask": "IDLE -> ASKED",
        "miss": "ASKED -> HUNG",
        "answer": "ASKED, HUNG -> IDLE",
        "close": "IDLE, ASKED, HUNG -> CLOSED",
    },
    invariants={
        "what was asked has a helper": lambda p: (
            p.state not in ("ASKED", "HUNG") or p._helper is not None
        ),
    },
)
