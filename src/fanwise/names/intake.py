"""Intake: the chunks that were read and not yet decoded, and what can be told of them ahead.

Reading ahead is how a look at the disk is brought to the time of a record: when the queue was seen
empty after the look, everything that happened before it stands here.
"""

import time
from collections import deque
from collections.abc import Callable, Container
from typing import Any

import msgspec

from fanwise.kernel.contract import NOTE_SELF, Record

_MOST = 8 << 20  # bytes read ahead of decoding


_OVERFLOW = b"\x18\0\0\0\3\0\x18\0\0\x40\0\0\0\0\0\0\xff\xff\xff\xff"  # up to the pid


def overflow_at(data: bytes, start: int = 0) -> int:
    """Position of the first overflow record in a chunk, from ``start`` on, or -1."""
    found = data.find(_OVERFLOW, start)
    if found < 0:
        return -1
    at = start
    while at < len(data):  # what looks like one may be in a handle
        length = int.from_bytes(data[at : at + 4], "little")
        if at >= found and data.startswith(_OVERFLOW, at):
            return at
        if length < 24:
            return -1  # the decoder says what is wrong with it
        at += length
    return -1


class _Everything:
    def __contains__(self, key: object) -> bool:
        return True


EVERYTHING = _Everything()


class Chunk(msgspec.Struct):
    """What one read brought: whole records, and what a loss before them cost."""

    data: bytes
    when: int  # ns since the epoch, of reading
    drained: bool  # the kernel's queue was seen empty after it
    lost: int  # records discarded before it
    source: str = "ring"  # or "stopped": the marks were gone for a while, nothing was counted
    noted: dict[bytes, int] | None = None  # directories hit by the loss, contract.NOTE_*; None: all
    directories: list[Record] | None = None  # its name records of directories, once asked


class Intake:
    """The chunks of one kernel group, in order; ``ahead`` is a decoder used for noting alone."""

    def __init__(
        self,
        take: Callable[[], tuple[bytes, int, bool, int] | None],
        sync: Callable[[], bool],
        ahead: Any,
        gap: Callable[[], dict[bytes, int] | None] = lambda: None,
    ) -> None:
        self._take, self._sync, self._ahead, self._noted = take, sync, ahead, gap
        self._chunks: deque[Chunk] = deque()
        self.bytes = 0  # of records held here
        self.popped = 0  # chunks taken

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def _next(self) -> Chunk | None:
        taken = self._take()
        if taken is None:
            return None
        return Chunk(*taken, noted=self._noted() if taken[3] else None)

    def pull(self) -> None:
        """Take what the drain has, up to a bound."""
        while self.bytes < _MOST:
            chunk = self._next()
            if chunk is None:
                return
            self._chunks.append(chunk)
            self.bytes += len(chunk.data)

    def pop(self) -> Chunk | None:
        """Take the next chunk."""
        if not self._chunks:
            taken = self._take()
            if taken is None:
                return None
            self.popped += 1
            return Chunk(*taken, noted=self._noted() if taken[3] else None)
        chunk = self._chunks.popleft()
        self.popped += 1
        self.bytes -= len(chunk.data)
        return chunk

    def unpop(self, chunk: Chunk) -> None:
        """Put a chunk back."""
        self._chunks.appendleft(chunk)
        self.popped -= 1
        self.bytes += len(chunk.data)

    @property
    def last(self) -> int:
        """What `popped` is when everything that stands here now was taken."""
        return self.popped + len(self._chunks)

    def push_stop(self, empty: bool) -> None:
        """Queue, behind everything read so far, that the marks were gone for a while.

        ``empty``: nothing that was raised before is unread.
        """
        while (chunk := self._next()) is not None:
            self._chunks.append(chunk)
            self.bytes += len(chunk.data)
        self._chunks.append(Chunk(b"", time.time_ns(), empty, 1, "stopped"))

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

    @property
    def blind(self) -> bool:
        """Whether a loss stands ahead that does not say what it hit."""
        return any(
            (chunk.lost and chunk.noted is None) or overflow_at(chunk.data) >= 0
            for chunk in self._chunks
        )

    def discard(self) -> tuple[int, list[Chunk]]:
        """Drop what stands here; how many records, and the chunks that told of a loss."""
        records, losses = 0, []
        while (chunk := self.pop()) is not None:
            if chunk.data:
                records += self._ahead.add(chunk.data, 0.0)
                self._ahead.finish()
            if chunk.lost:
                losses.append(chunk)
        return records, losses

    def directories(self) -> list[Record]:
        """Name records of directories ahead, up to the next loss that hit them."""
        out: list[Record] = []
        hit: set[bytes | None] = set()
        for chunk in self._chunks:
            if chunk.lost:
                if chunk.noted is None:
                    break
                hit.update(key for key, bits in chunk.noted.items() if bits & NOTE_SELF)
            if chunk.directories is None:
                if chunk.data:
                    self._ahead.add(chunk.data, chunk.when / 1e9)
                chunk.directories = self._ahead.dir_records()
                self._ahead.finish()
            if hit:
                out += [record for record in chunk.directories if record[7] not in hit]
            else:
                out += chunk.directories
        return out

    def inside(self, directories: Container[bytes]) -> list[Record]:
        """Name records of some directories ahead, up to the next loss."""
        for chunk in self._chunks:
            if chunk.lost:
                break
            if chunk.data:
                self._ahead.add(chunk.data, chunk.when / 1e9)
        out: list[Record] = self._ahead.records_in(directories)
        self._ahead.finish()
        return out

    def moved_in_losses(self) -> set[bytes]:
        """The directories that losses ahead moved: where those are now says nothing of before."""
        out: set[bytes] = set()
        for chunk in self._chunks:
            if chunk.lost and chunk.noted:
                out.update(key for key, bits in chunk.noted.items() if bits & NOTE_SELF)
        return out

    def records(self) -> list[Record]:
        """All name records ahead, see `names`."""
        return self.names(EVERYTHING)

    def names(self, keys: Container[bytes]) -> list[Record]:
        """Name records of some objects ahead, over those losses that say what they hit."""
        for chunk in self._chunks:
            if chunk.lost and chunk.noted is None:
                break
            if chunk.data:
                self._ahead.add(chunk.data, chunk.when / 1e9)
        out: list[Record] = self._ahead.name_records(keys)
        self._ahead.finish()
        return out
