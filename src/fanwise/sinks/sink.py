"""A sink: encoded records go in without waiting, a thread of its own brings them out.

What a sink is asked to deliver is a JSON object as bytes. `Sink.offer` never waits: a record that
comes too often is suppressed, one that finds the queue full is dropped, both are counted, and the
next delivery says how many. The last record that was suppressed is delivered as soon as the rate
allows, so that the final state of a storm is always told.

REFS      a sink owns its thread and its queue; a delivery owns what it opens.
LOCKING   one condition guards the queue and the counters. It is never held while delivering.
LIFETIME  see SINK. `close` waits until a deadline for what is queued; then the delivery that runs
          is told to stop, and what is left is counted as dropped. A delivery that does not even
          stop then is left to its daemon thread, and `close` says so. A forked child has no
          thread: there the sink is forgotten.
"""

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

import msgspec

from fanwise._errors import ClosedError
from fanwise.lifetime import Lifetime
from fanwise.sinks.bucket import Bucket

_STOPPING = 2.0  # seconds that a delivery has to notice that it must stop

_live: "weakref.WeakSet[Sink]" = weakref.WeakSet()


class Failed(Exception):
    """A delivery failed for good: ``reason`` says why."""


class Counts(msgspec.Struct, frozen=True):
    """What became of the records of one sink since it was started.

    ``offered`` is the sum of all others: ``delivered``, ``failed``, ``suppressed`` (too often),
    ``dropped`` (no room, or no time at the end) and ``queued`` (neither yet).
    """

    offered: int
    delivered: int
    failed: int
    suppressed: int
    dropped: int
    queued: int


class Outcome(msgspec.Struct, frozen=True):
    """How one delivery ended: ``reason`` is None when it went well; ``seconds`` it took.

    ``output`` is what a program printed, or a server answered, cut off.
    """

    sink: str
    reason: str | None
    seconds: float
    attempts: int = 1
    output: bytes = b""


class Delivery:
    """One record on its way out.

    ``record`` is the object, ``body`` its JSON (with ``"suppressed"`` and ``"dropped"`` in it
    when there were any). ``attempts`` and ``output`` are for the sink to fill in.
    """

    __slots__ = ("attempts", "body", "dropped", "output", "record", "suppressed")

    def __init__(self, body: bytes, suppressed: int, dropped: int) -> None:
        try:
            record = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Failed(f"the record is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise Failed("the record is not a JSON object")
        if suppressed:
            record["suppressed"] = suppressed
        if dropped:
            record["dropped"] = dropped
        self.record: dict[str, Any] = record
        self.body = msgspec.json.encode(record)
        self.suppressed = suppressed
        self.dropped = dropped
        self.attempts = 1
        self.output = b""


class Sink:
    """The base of all sinks; a context manager. A subclass says in `deliver` how.

    ``bucket`` limits the rate, ``room`` the queue (records). ``tell`` is called with every
    `Outcome`, in the sink's thread.
    """

    state: str

    def __init__(
        self,
        name: str,
        *,
        bucket: Bucket | None = None,
        room: int = 256,
        tell: Callable[[Outcome], None] | None = None,
    ) -> None:
        self.name = name
        self.stopping = threading.Event()
        self._bucket, self._room, self._tell = bucket, room, tell
        self._condition = threading.Condition()
        self._queue: deque[bytes] = deque()
        self._held: bytes | None = None  # the last that was suppressed, while nothing newer went
        self._busy = False
        self._closing = False
        self._offered = self._delivered = self._failed = self._suppressed = self._dropped = 0
        self._untold_suppressed = self._untold_dropped = 0
        self._thread: threading.Thread | None = None
        SINK.start(self)

    def deliver(self, delivery: Delivery) -> None:
        """Bring one record out; runs in the sink's thread.

        Raises Failed. Must return soon after ``stopping`` is set.
        """
        raise NotImplementedError

    def prepare(self) -> None:
        """Check or open what deliveries need; runs in `start`. Raises FanwiseError."""

    def finish(self) -> None:
        """Close what `prepare` opened."""

    def start(self) -> None:
        """Start the thread. Raises what `prepare` raises."""
        self.prepare()
        SINK.advance(self, "start")
        _live.add(self)
        self._thread = threading.Thread(target=self._run, name=f"sink {self.name}", daemon=True)
        self._thread.start()

    def offer(self, body: bytes) -> bool:
        """Give it a record; False when it is not delivered for now. Never waits.

        Raises ClosedError when the sink is not running.
        """
        with self._condition:
            if self.state != "RUNNING" or self._closing:
                raise ClosedError(f"sink {self.name} is {self.state}")
            self._offered += 1
            if self._bucket is not None and (
                self._held is not None or not self._bucket.take(time.monotonic())
            ):
                if self._held is not None:
                    self._suppress()
                self._held = body
                self._condition.notify()
                return False
            return self._append(body)

    def _append(self, body: bytes) -> bool:
        if len(self._queue) >= self._room:
            self._dropped += 1
            self._untold_dropped += 1
            return False
        self._queue.append(body)
        self._condition.notify()
        return True

    def _suppress(self) -> None:
        self._suppressed += 1
        self._untold_suppressed += 1

    def counts(self) -> Counts:
        """Return the counters, taken at one moment."""
        with self._condition:
            queued = len(self._queue) + self._busy + (self._held is not None)
            return Counts(
                self._offered,
                self._delivered,
                self._failed,
                self._suppressed,
                self._dropped,
                queued,
            )

    def close(self, deadline: float = 5.0) -> bool:
        """Deliver what is queued within ``deadline`` seconds, then stop; idempotent.

        False when a delivery did not stop even then: its thread is left alone.
        """
        if self.state != "RUNNING":
            if self.state == "NEW":
                SINK.advance(self, "close")
            return True
        until = time.monotonic() + deadline
        with self._condition:
            self._closing = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._idle(), deadline)
        assert self._thread is not None
        self._thread.join(max(0.0, until - time.monotonic()))
        self.stopping.set()
        self.interrupt()
        with self._condition:
            self._condition.notify_all()
        self._thread.join(_STOPPING)
        with self._condition:
            left = len(self._queue) + (self._held is not None)
            self._dropped += left
            self._queue.clear()
            self._held = None
        SINK.advance(self, "close")
        _live.discard(self)
        if self._thread.is_alive():
            return False
        self.finish()
        return True

    def interrupt(self) -> None:
        """End the wait of a delivery that runs; called from another thread, after ``stopping``."""

    def _idle(self) -> bool:
        return not self._queue and not self._busy and self._held is None

    def _run(self) -> None:
        while (body := self._next()) is not None:
            with self._condition:
                suppressed, dropped = self._untold_suppressed, self._untold_dropped
            began = time.monotonic()
            reason: str | None = None
            delivery = None
            try:
                delivery = Delivery(body, suppressed, dropped)
                self.deliver(delivery)
            except Failed as error:
                reason = str(error)
            except Exception as error:
                # A defect of one delivery must not end all the others.
                reason = f"{type(error).__name__}: {error}"
            outcome = Outcome(
                self.name,
                reason,
                time.monotonic() - began,
                delivery.attempts if delivery else 0,
                delivery.output if delivery else b"",
            )
            with self._condition:
                if reason is None:
                    self._delivered += 1
                    # What could not be told now is told by the next.
                    self._untold_suppressed -= suppressed
                    self._untold_dropped -= dropped
                else:
                    self._failed += 1
                self._busy = False
                self._condition.notify_all()
            if self._tell is not None:
                self._tell(outcome)

    # The next record; None when the sink is to end.
    def _next(self) -> bytes | None:
        with self._condition:
            while not self.stopping.is_set():
                wait = None
                if self._held is not None and self._bucket is not None:
                    wait = self._bucket.wait(time.monotonic())
                    # At the end it is told at once: nothing comes after it.
                    if self._closing or (wait <= 0 and self._bucket.take(time.monotonic())):
                        held, self._held = self._held, None
                        self._append(held)
                if self._queue:
                    self._busy = True
                    return self._queue.popleft()
                if self._closing and self._held is None:
                    return None
                self._condition.wait(wait)
            return None

    def __enter__(self) -> "Sink":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


SINK: Lifetime[Sink] = Lifetime(
    "Sink",
    states=("NEW", "RUNNING", "CLOSED"),
    transitions={"start": "NEW -> RUNNING", "close": "NEW, RUNNING -> CLOSED"},
)


def _after_fork() -> None:
    for sink in list(_live):
        sink.state = "CLOSED"
        sink._condition = threading.Condition()  # another thread may have held it
    _live.clear()


os.register_at_fork(after_in_child=_after_fork)
