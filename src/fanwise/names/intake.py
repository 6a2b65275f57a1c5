"""Intake: the chunks that were read and not yet decoded, and what can be told of them ahead.

Reading ahead is how a look at the disk is brought to the time of a record: when the queue was seen
empty after the look, everything that happened before it stands here.
"""

import time
from collections import deque
from collections.abc import Callable, Container
from typing import Any

from fanwise.kernel.contract import Record

_MOST = 8 << 20  # bytes read ahead of decoding


class _Everything:
    def __contains__(self, key: object) -> bool:
        return True


EVERYTHING = _Everything()


class Chunk:
    """What one read brought: whole records, and what a loss before them cost."""

    __slots__ = ("data", "directories", "drained", "lost", "source", "when")

    def __init__(
        self, data: bytes, when: int, drained: bool, lost: int, source: str = "ring"
    ) -> None:
        self.data = data
        self.when = when  # ns since the epoch, of reading
        self.drained = drained  # the kernel's queue was seen empty after it
        self.lost = lost  # records discarded before it
        self.source = source  # or "stopped": the marks were gone for a while, nothing was counted
        self.directories: list[Record] | None = None  # its name records of directories, once asked


class Intake:
    """The chunks of one kernel group, in order; ``ahead`` is a decoder used for noting alone."""

    def __init__(
        self,
        take: Callable[[], tuple[bytes, int, bool, int] | None],
        sync: Callable[[], bool],
        ahead: Any,
    ) -> None:
        self._take, self._sync, self._ahead = take, sync, ahead
        self._chunks: deque[Chunk] = deque()
        self.bytes = 0  # of records held here

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def pull(self) -> None:
        """Take what the drain has, up to a bound."""
        while self.bytes < _MOST:
            taken = self._take()
            if taken is None:
                return
            self._chunks.append(Chunk(*taken))
            self.bytes += len(taken[0])

    def pop(self) -> Chunk | None:
        """Take the next chunk."""
        if not self._chunks:
            taken = self._take()
            return Chunk(*taken) if taken else None
        chunk = self._chunks.popleft()
        self.bytes -= len(chunk.data)
        return chunk

    def unpop(self, chunk: Chunk) -> None:
        """Put a chunk back."""
        self._chunks.appendleft(chunk)
        self.bytes += len(chunk.data)

    def push_stop(self) -> None:
        """Queue, behind everything read so far, that the marks were gone for a while."""
        while (taken := self._take()) is not None:
            self._chunks.append(Chunk(*taken))
            self.bytes += len(taken[0])
        self._chunks.append(Chunk(b"", time.time_ns(), True, 1, "stopped"))

    def sync(self) -> bool:
        """Read until the queue is empty: all that was raised before stands here then.

        False when that cannot be said: paths learnt by looking are "current" then, not "exact".
        """
        complete = self._sync()
        self.pull()
        return complete and self.bytes < _MOST

    def names_from(self, first: int) -> tuple[list[Record], int]:
        """Name records of chunks ahead, the ``first`` ones left out, and how many those are then.

        Up to the next loss.
        """
        at = 0
        for at, chunk in enumerate(self._chunks, 1):
            if chunk.lost:
                at -= 1
                break
            if at > first and chunk.data:
                self._ahead.add(chunk.data, chunk.when / 1e9)
        out: list[Record] = self._ahead.name_records(EVERYTHING)
        self._ahead.finish()
        return out, max(at, first)

    @property
    def gap(self) -> bool:
        """Whether a loss stands ahead: what is behind it cannot be read ahead."""
        return any(chunk.lost for chunk in self._chunks)

    def directories(self) -> list[Record]:
        """Name records of directories ahead, up to the next loss."""
        out: list[Record] = []
        for chunk in self._chunks:
            if chunk.lost:
                break
            if chunk.directories is None:
                if chunk.data:
                    self._ahead.add(chunk.data, chunk.when / 1e9)
                chunk.directories = self._ahead.dir_records()
                self._ahead.finish()
            out += chunk.directories
        return out

    def names(self, keys: Container[bytes]) -> list[Record]:
        """Name records of some objects ahead, up to the next loss."""
        for chunk in self._chunks:
            if chunk.lost:
                break
            if chunk.data:
                self._ahead.add(chunk.data, chunk.when / 1e9)
        out: list[Record] = self._ahead.name_records(keys)
        self._ahead.finish()
        return out
