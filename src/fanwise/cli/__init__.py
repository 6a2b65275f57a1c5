"""The command ``fanwise``.

This file is the outermost shell: it answers ``--version`` without importing anything heavy, and
decides what becomes of an error, a closed pipe, a signal and a bug.
"""

import os
import select
import signal
import sys
import traceback
from types import FrameType

from fanwise import Exit, FanwiseError, __version__


def main() -> int:
    """Run the command line of this process and return its exit status."""
    signal.signal(signal.SIGINT, _interrupted)
    try:
        status = _run(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except FanwiseError as error:
        print(f"fanwise: {error}", file=sys.stderr)
        status = error.exit_status
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            status = Exit.OK
            # What is still buffered has no reader; Python would complain of it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:  # a bug
            traceback.print_exc()
            status = Exit.FAILED
    return status


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"fanwise {__version__}")
        return Exit.OK
    from fanwise.cli._main import run

    return run(arguments)


# A broken pipe may also be some other one, such as a socket, and that is not fine.
def _reader_left() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


# The first interrupt lets everything close in order; the second takes the process down at once.
def _interrupted(signum: int, frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_DFL)
    raise KeyboardInterrupt
