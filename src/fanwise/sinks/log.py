"""JSON lines, to a descriptor or to a file that may be rotated."""

import errno
import os
import select
import stat
from pathlib import Path
from typing import Any

from fanwise._errors import FanwiseError
from fanwise.sinks.sink import Delivery, Failed, Sink

_WAIT = 0.2  # seconds between looks at whether it must stop


class Log(Sink):
    """Appends one line a record to ``target``: a path, or a descriptor that the caller owns.

    A file is made for its owner alone (0600), never followed through a link, and opened anew when
    it was moved away.
    """

    def __init__(self, name: str, target: Path | int, **options: Any) -> None:
        super().__init__(name, **options)
        self._path = target if isinstance(target, Path) else None
        self._fd = target if isinstance(target, int) else -1
        self._torn = False  # the last line was cut off: the next begins on a line of its own

    def prepare(self) -> None:
        """Open the file. Raises FanwiseError."""
        if self._path is not None:
            try:
                self._open()
            except OSError as error:
                raise FanwiseError(
                    f"sink {self.name}: {self._path}: {error.strerror}",
                    "name a file that can be appended to",
                ) from error

    def _open(self) -> None:
        assert self._path is not None
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self._path, flags | os.O_NONBLOCK, 0o600)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file")
        self._fd = fd

    def deliver(self, delivery: Delivery) -> None:
        """Write one line, whole. Raises Failed with what the filesystem said."""
        try:
            if self._path is not None:
                self._follow(self._path)
            self._write((b"\n" if self._torn else b"") + delivery.body + b"\n")
        except OSError as error:
            raise Failed(f"{self._path or 'descriptor'}: {error.strerror}") from error

    def _follow(self, path: Path) -> None:
        mine = os.fstat(self._fd)
        try:
            there = os.stat(path, follow_symlinks=False)
            if (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino):
                return
        except FileNotFoundError:
            pass
        old = self._fd
        self._open()
        os.close(old)
        self._torn = False

    def _write(self, data: bytes) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        while data:
            # A pipe whose reader is slow: no more than it takes at once without waiting.
            while not poll.poll(_WAIT * 1000):
                if self.stopping.is_set():
                    raise Failed("the reader did not take it before the end")
            written = os.write(self._fd, data[: select.PIPE_BUF] if self._path is None else data)
            self._torn = written < len(data)
            data = data[written:]

    def finish(self) -> None:
        """Close the file; a descriptor of the caller's stays open."""
        if self._path is not None and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
