"""Scan: one background thread that lists the subdirectories of directories, by handle.

It knows nothing but handles: the consumer hands out work when it has nothing to deliver, and
applies what comes back, so the scan yields to delivery and the tree has one owner. The descriptor
of the mount lives for one piece of work.

LOCKING: `_lock` covers the two queues. LIFETIME: `stop` joins; work in hand is dropped.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence

from fanwise._errors import FanwiseError
from fanwise.kernel.mounts import Mount

from .lookup import open_mount

# [(key, parent key, name, leaf)], [(key, errno)], [(key, names)]: see scan_dirs
Found = tuple[
    list[tuple[bytes, bytes, bytes, bool]], list[tuple[bytes, int]], list[tuple[bytes, bytes]]
]

PIECE = 128  # directories


def scan_mount(
    scan_dirs: Callable[[int, Sequence[bytes], int], Found],
    mount: Mount,
    keys: Sequence[bytes],
    names: int = 0,
) -> Found:
    """List subdirectories and names, with the mount open meanwhile; if it cannot be, all failed."""
    try:
        fd = open_mount(mount)
    except (FanwiseError, OSError):
        return [], [(key, 0) for key in keys], []
    try:
        return scan_dirs(fd, keys, names)
    finally:
        os.close(fd)


class Scanner:
    """Lists subdirectories; `wake` is called in its thread when a result is ready."""

    def __init__(
        self, scan: Callable[[Sequence[bytes], int], Found], wake: Callable[[], None]
    ) -> None:
        self._scan, self._wake = scan, wake
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._keys: deque[tuple[int, bytes]] = deque()
        self._done: deque[tuple[list[bytes], Found]] = deque()
        self._busy = 0  # directories handed out and not yet taken back
        self._round = 0
        self._stop = False
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> int:
        """Directories handed out whose results were not taken yet."""
        return self._busy

    def give(self, keys: Sequence[bytes], names: int = 0) -> None:
        """Hand out directories; ``names`` as of scan_dirs. The thread starts with the first."""
        if not keys:
            return
        with self._lock:
            self._keys.extend((names, key) for key in keys)
            self._busy += len(keys)
            self._work.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fw-scan", daemon=True)
            self._thread.start()

    def take(self) -> list[tuple[list[bytes], Found]]:
        """Take the results that are ready: the directories asked for, and what was found."""
        with self._lock:
            done = list(self._done)
            self._done.clear()
            self._busy -= sum(len(keys) for keys, _ in done)
        return done

    def reset(self) -> None:
        """Forget work and results: the tree was dropped."""
        with self._lock:
            self._round += 1
            self._keys.clear()
            self._done.clear()
            self._busy = 0

    def stop(self) -> None:
        """End the thread."""
        with self._lock:
            self._stop = True
            self._keys.clear()
            self._work.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._work.wait_for(lambda: self._stop or self._keys)
                if self._stop:
                    return
                now = self._round
                names, key = self._keys.popleft()
                piece = [key]
                while self._keys and len(piece) < PIECE and self._keys[0][0] == names:
                    piece.append(self._keys.popleft()[1])
            try:
                result = self._scan(piece, names)
            except (FanwiseError, OSError) as error:
                code = error.errno if isinstance(error, OSError) else 0
                result = [], [(key, code or 0) for key in piece], []
            with self._lock:
                if now != self._round:
                    continue
                self._done.append((piece, result))
            self._wake()
