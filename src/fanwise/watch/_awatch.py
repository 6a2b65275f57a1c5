"""awatch: the same stream for asyncio and trio.

The work is done in a worker thread, so that a look-up on a slow filesystem never blocks the loop;
what a call brought stays with the watch when the call is cancelled.
"""

import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from types import TracebackType

import anyio
from anyio import to_thread

from fanwise._errors import ClosedError

from ._change import Change
from ._watch import Watch


class _Batches:
    # Not a generator: one that is left by a break stays open.

    def __init__(self, read: Callable[[], Awaitable[list[Change]]]) -> None:
        self._read = read

    def __aiter__(self) -> AsyncIterator[list[Change]]:
        return self

    async def __anext__(self) -> list[Change]:
        rows = await self._read()
        if not rows:
            raise StopAsyncIteration
        return rows


class AsyncWatch:
    """A stream of changes for an event loop, made by `awatch`; see `Watch`, which it wraps.

    An async context manager and an async iterator. Cancelling a wait loses nothing.
    """

    def __init__(self, inner: Watch) -> None:
        self.watch = inner
        self._batches: deque[list[Change]] = deque()
        self._changes: deque[Change] = deque()
        self._waits: set[anyio.CancelScope] = set()
        self._closing = False

    async def __aenter__(self) -> "AsyncWatch":
        await to_thread.run_sync(self.watch.open)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # No loop tells who waits for a descriptor that it is closed.
        self._closing = True
        for scope in self._waits:
            scope.cancel()
        with anyio.CancelScope(shield=True):
            while self._waits:
                await anyio.sleep(0)
            await to_thread.run_sync(self.watch.close)

    def __aiter__(self) -> AsyncIterator[Change]:
        return self

    async def __anext__(self) -> Change:
        while not self._changes:
            rows = await self.read()
            if not rows:
                raise StopAsyncIteration
            self._changes.extend(rows)
        return self._changes.popleft()

    def batches(self) -> AsyncIterator[list[Change]]:
        """Iterate over lists of changes, each what could be had at once."""
        return _Batches(self.read)

    async def read(self) -> list[Change]:
        """Wait for changes and return them; [] at the end, or after the watch's timeout.

        Raises as `Watch.read` does; ClosedError also when the watch is closed meanwhile.
        """
        with anyio.move_on_after(self.watch.timeout):
            while True:
                if self._closing:
                    raise ClosedError("the watch is closed", "use it in an async with block")
                if not self._batches:
                    await to_thread.run_sync(self._fetch)
                if self._batches:
                    return self._batches.popleft()
                if self.watch.ended:
                    return []
                with anyio.CancelScope() as scope:
                    self._waits.add(scope)
                    try:
                        await anyio.wait_readable(self.watch.fileno())
                    finally:
                        self._waits.discard(scope)
        return []

    def _fetch(self) -> None:
        rows = self.watch.read(0)
        if rows:
            self._batches.append(rows)

    def stop(self) -> None:
        """End the stream: what was queued before is still delivered, then iteration ends."""
        self.watch.stop()


def awatch(
    *paths: str | os.PathLike[str],
    kinds: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    recursive: bool = True,
    ignore_pids: Iterable[int] = (),
    queue: int = 256 << 20,
    timeout: float | None = None,
    pure: bool | None = None,
    who: bool = False,
    mounts: bool = True,
    index: bool = False,
) -> AsyncWatch:
    """Watch files and directories from asyncio or trio; the arguments are those of `watch`.

        async with fanwise.awatch("/srv/data") as changes:
            async for change in changes:
                print(change.kinds, change.path)

    Raises as `watch` does.
    """
    return AsyncWatch(
        Watch(
            paths, kinds, exclude, recursive, ignore_pids, queue, timeout, pure, who, mounts, index
        )
    )
