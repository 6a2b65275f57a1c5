"""What do many groups on one source cost: 100 that want 1 % each, and 1,000 that want nothing?

Processor time of matching, queueing and reading, per event, for events as a source makes them. The
events are in 100 directories, each four deep; none is merged.
"""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Callable, Iterator

from bench._harness import Bench, Json, below, median, ratio, row, show
from fanwise.notify import mask as m
from fanwise.notify.event import Event
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.group import Group
from fanwise.notify.mark import FILESYSTEM, INODE, SUBTREE, On

FS = (7, 0)
MASK = m.CREATE | m.MODIFY | m.CLOSE_WRITE | m.DELETE | m.EVENT_ON_CHILD | m.ONDIR
SLICE = 1000  # events between two reads, as of a drain's piece
ONE = "one group, all events"
BY_DIRECTORY = "100 groups, a directory each"
BY_SUBTREE = "100 groups, a subtree each"
NOTHING = "1,000 groups that want nothing, and one"


def key(*numbers: int) -> bytes:
    return b"\x01\0\0\0" + b"".join(n.to_bytes(4, "little") for n in numbers)


def made(count: int) -> list[Event]:
    """Events of random directories; each names a file of its own."""
    rand = random.Random(1)
    kinds = (m.CREATE, m.MODIFY, m.CLOSE_WRITE, m.DELETE)
    events = []
    # One tuple a directory, as who has the model of directories keeps it.
    ways = [(key(top, 2), key(top, 1), key(top, 0), key(1 << 20)) for top in range(100)]
    for number in range(count):
        top = rand.randrange(100)
        above = ways[top]
        name = b"file%d" % number
        events.append(
            Event(rand.choice(kinds), FS, key(number, 9), key(top, 3), name, pid=7, ancestors=above)
        )
    return events


def one(core: Fsnotify) -> Iterator[Group]:
    group = core.group()
    group.add(On(FILESYSTEM, FS), MASK)
    yield group


def by_directory(core: Fsnotify) -> Iterator[Group]:
    for top in range(100):
        group = core.group()
        group.add(On(INODE, FS, key(top, 3), True), MASK)
        yield group


def by_subtree(core: Fsnotify) -> Iterator[Group]:
    for top in range(100):
        group = core.group()
        group.add(On(SUBTREE, FS, key(top, 0)), MASK)
        yield group


def nothing(core: Fsnotify) -> Iterator[Group]:
    yield from one(core)
    for number in range(1000):
        group = core.group()
        if number % 2:
            group.add(On(FILESYSTEM, FS), m.ACCESS)
        else:
            group.add(On(SUBTREE, FS, key(1000 + number, 0)), MASK)
        yield group


CASES: dict[str, Callable[[Fsnotify], Iterator[Group]]] = {
    ONE: one,
    BY_DIRECTORY: by_directory,
    BY_SUBTREE: by_subtree,
    NOTHING: nothing,
}


def run(bench: Bench) -> Json:
    events = made(20_000 if bench.quick else 300_000)

    def once(name: str) -> Json:
        core = Fsnotify()
        groups = list(CASES[name](core))
        told = 0
        ready: dict[Group, None] = {}
        for group in groups:
            group.wait(lambda group=group: ready.setdefault(group))  # type: ignore[misc]
        gc.collect()
        start = time.process_time()
        for at in range(0, len(events), SLICE):
            core.send(events[at : at + SLICE])
            for group in ready:
                told += len(group.read())
            ready.clear()
        spent = time.process_time() - start
        if told != len(events):
            raise RuntimeError(f"{name}: {told} of {len(events)} events were told")
        return {"us_per_event": spent / len(events) * 1e6}

    runs = bench.each(CASES, once)
    base = median(runs.get(ONE, ()), "us_per_event")
    rows = []
    for name in CASES:
        cost = median(runs.get(name, ()), "us_per_event")
        times = ratio(cost, base)
        bar = "" if name == ONE else "<= 1.5x"
        passed = None if name == ONE else below(times, 1.5)
        rows.append(
            row(
                f"{name}, CPU per event",
                bar,
                passed,
                show(cost, "us"),
                ratio=None if name == ONE else times,
                note="" if name == ONE else f"the ratio is to one group, {show(base, 'us')}",
            )
        )
    return {"runs": runs, "rows": rows}


if __name__ == "__main__":
    from bench.__main__ import main

    main(["groups", *sys.argv[1:]])
