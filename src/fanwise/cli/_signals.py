"""Signals for a command that runs until it is stopped.

They are blocked everywhere and awaited in one thread: no handler interrupts anything, no signal
falls between a check and a wait, and a command that is stuck in a write to a slow reader can still
be suspended and killed.

LIFETIME: the thread ends with the process. Start it first: threads inherit what is blocked.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable

from fanwise import FanwiseError

_STOP = {signal.SIGINT, signal.SIGTERM}
_ALL = _STOP | {signal.SIGTSTP}


class Signals:
    """What was asked for by signals; ``fd`` is readable when that changed.

    The first SIGINT or SIGTERM sets ``stop``, a second one ends the process at once. SIGTSTP calls
    ``suspend``, in the thread, and then suspends; ``resumed`` is set when that is over. ``lock`` is
    held in between: whoever undoes what ``suspend`` did takes it.
    """

    def __init__(self, suspend: Callable[[], None]) -> None:
        self.fd = -1
        self.lock = threading.Lock()
        self.stop = self.resumed = False
        self._suspend = suspend

    def start(self) -> None:
        """Block the signals, open ``fd`` and start the thread; from the main thread."""
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        signal.pthread_sigmask(signal.SIG_BLOCK, _ALL)
        for signum in _ALL:
            signal.signal(signum, signal.SIG_DFL)
        threading.Thread(target=self._run, name="fw-signals", daemon=True).start()

    def clear(self) -> None:
        """Make ``fd`` unreadable; look at the attributes afterwards."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def _run(self) -> None:
        while True:
            if signal.sigwait(_ALL) in _STOP:
                self.stop = True
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)  # the next one kills
            else:
                with self.lock:
                    # The watch may be opening or closing at this moment; then there is no mark.
                    with contextlib.suppress(FanwiseError, OSError):
                        self._suspend()
                    # The default action, which knows whether there is a shell to continue it.
                    signal.pthread_kill(threading.get_ident(), signal.SIGTSTP)
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTSTP})
                    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTSTP})
                    self.resumed = True
            os.eventfd_write(self.fd, 1)
