"""The end of a helper process: killed, and reaped as soon as it is gone.

A process that the kernel holds (a filesystem hangs) cannot be ended. Nobody waits for it: it is
left, and reaped when it is gone at the end or the start of any other helper; or it is init's.
"""

import os
import subprocess
import time
from contextlib import suppress

_STEP = 0.2  # seconds for one that the kernel holds
_MOST = 2.0  # and for one that it does not: a busy machine

_left: set[int] = set()


def end(helper: subprocess.Popen[bytes]) -> None:
    """Kill it; it has an exit status then, also where it is left."""
    reap()
    with suppress(ProcessLookupError):
        helper.kill()
    until = time.monotonic() + _MOST
    while helper.returncode is None:
        try:
            helper.wait(_STEP)
        except subprocess.TimeoutExpired:
            if _held(helper.pid) or time.monotonic() > until:
                _left.add(helper.pid)
                helper.returncode = 0


def reap() -> None:
    """Take leave of those that were left, and are gone by now."""
    for pid in list(_left):
        try:
            gone, _ = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # somebody waited for all children
            gone = pid
        if gone:
            _left.discard(pid)


# In a sleep that no signal ends.
def _held(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"D"
    except OSError:
        return False
