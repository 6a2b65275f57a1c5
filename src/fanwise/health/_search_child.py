"""Searches a mount for inodes by reading directories, in a process of its own.

Run as a file, by `fanwise.health._search`: arguments are the seconds and the entries that it may
take, the mount point, and inode numbers. The answer is one object of JSON, inode to path, when all
are found or a limit is reached. What is mounted below is not entered.

Imports the standard library only: it must start fast, and whatever the host's path is.
"""

import json
import os
import sys
import time
from collections import deque


def search(seconds: float, entries: int, point: str, wanted: set[int]) -> dict[int, str]:
    """Return the paths of those that were found."""
    until = time.monotonic() + seconds
    found: dict[int, str] = {}
    root = os.stat(point)
    if root.st_ino in wanted:
        found[root.st_ino] = point
    waiting = deque([point])  # what is near the root first
    while waiting and len(found) < len(wanted) and entries > 0 and time.monotonic() < until:
        here = waiting.popleft()
        try:
            with os.scandir(here) as listing:
                for entry in listing:
                    entries -= 1
                    if entry.inode() in wanted:
                        found.setdefault(entry.inode(), entry.path)
                    if entry.is_dir(follow_symlinks=False) and _same(entry.path, root.st_dev):
                        waiting.append(entry.path)
        except OSError:  # broken, or gone: there are others
            continue
    return found


# What is mounted there is another filesystem; so is a directory that cannot be looked at.
def _same(path: str, device: int) -> bool:
    try:
        return os.lstat(path).st_dev == device
    except OSError:
        return False


def _readable(path: str) -> str:
    return os.fsencode(path).decode(errors="replace")


if __name__ == "__main__":
    os.nice(19)
    numbers = {int(text) for text in sys.argv[4:]}
    paths = search(float(sys.argv[1]), int(sys.argv[2]), sys.argv[3], numbers)
    print(json.dumps({ino: _readable(path) for ino, path in paths.items()}), flush=True)
