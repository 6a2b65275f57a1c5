"""Standard output as a descriptor: whole batches at a time, nothing buffered."""

import os
import select
import sys

from fanwise import FanwiseError


class Output:
    """Where a command that runs on and on writes. Raises FanwiseError when it is closed."""

    def __init__(self) -> None:
        if sys.stdout is None:  # then the next descriptor to be opened becomes 1
            raise FanwiseError("standard output is closed", "send it to /dev/null")
        self.fd = sys.stdout.fileno()
        self.terminal = os.isatty(self.fd) and os.environ.get("TERM") != "dumb"

    def write(self, data: bytes) -> None:
        """Write all of it. Raises BrokenPipeError when the reader left, else FanwiseError."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self.fd, rest) :]
            except BlockingIOError:  # somebody else who has the same pipe made it so
                poll = select.poll()
                poll.register(self.fd, select.POLLOUT)
                poll.poll()
            except BrokenPipeError:
                raise
            except OSError as error:
                raise FanwiseError(f"cannot write the output: {error.strerror}") from error
