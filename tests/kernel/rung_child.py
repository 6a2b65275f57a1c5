"""Run as a program by test_watch_rungs: one thing with other rights, told as JSON."""

import json
import os
import resource
import shutil
import sys
from pathlib import Path

import fanwise
from tests.kernel import refusals
from tests.kernel.watching import Reader, on_disk, replay


def storm(root: Path) -> dict[str, object]:
    with fanwise.watch(root, exclude=[".*"]) as watch:
        reader = Reader(watch, root / "s")
        (root / "s").mkdir()
        told = list(watch.read(20))
        for number in range(300):
            below = root / f"c{number}" / "b" / "c"
            below.mkdir(parents=True)
            (below / "f").write_text("x")
            if number % 3 == 0:
                below.rename(root / f"m{number}")
            if number % 5 == 0:
                shutil.rmtree(root / f"c{number}")
        told += _until(watch, root / "end1")
        paths = replay(told, {str(root / "denied")})
        disk = on_disk(root)
        (root / "hidden").mkdir()
        (root / "hidden").chmod(0o000)
        (root / "hidden").rename(root / "later")
        later = [
            [c.kinds[0], c.path, c.source]
            for c in _until(watch, root / "end2")
            if "lost" in c.kinds
        ]
        rung, unwatched = watch.roots[0].rung, [each.path for each in watch.unwatched]
        assert reader
    try:
        with fanwise.watch(root, ignore_pids=[1]):
            refused = "nothing"
    except fanwise.FanwiseError as error:
        refused = type(error).__name__
    try:
        with fanwise.watch(root, who=True):
            who = "nothing"
    except fanwise.PermissionNeeded as error:
        who = str(error.remedy)
    return {
        "who": who,
        "rung": rung,
        "unwatched": unwatched,
        "told": sorted(paths),
        "disk": sorted(disk),
        "later": later,
        "ignoring another's pid": refused,
    }


def names(told: list[fanwise.Change], path: Path) -> bool:
    """Whether a path is told, by itself or in the list of its directory after a loss."""
    return any(
        c.path == str(path) or (c.path == str(path.parent) and path.name in (c.names or ()))
        for c in told
    )


def _until(watch: fanwise.Watch, path: Path) -> list[fanwise.Change]:
    path.touch()
    told: list[fanwise.Change] = []
    while not names(told, path):
        rows = watch.read(20)
        assert rows, "nothing more is told"
        told += rows
    while rows := watch.read(0.3):
        told += rows
    return told


def limit(root: Path) -> dict[str, object]:
    # Another group of this user takes the marks away, on files of its own.
    from fanwise.kernel import fanotify as fan

    (root / "many").mkdir()
    (root / "watched" / "a").mkdir(parents=True)
    fd = fan.init(fan.FAN_REPORT_FID)
    try:
        for number in range(10_000_000):
            path = root / "many" / str(number)
            path.touch()
            fan.mark(fd, fan.FAN_MARK_ADD, fan.FAN_MODIFY, path=path)
    except fanwise.LimitReached:
        pass
    try:
        with fanwise.watch(root / "watched"):
            return {"at open": None}
    except fanwise.LimitReached as error:
        return {"at open": [type(error).__name__, error.sysctl]}


def limit_later(root: Path) -> dict[str, object]:
    """The limit is reached while the watch runs, then before one is open."""
    with fanwise.watch(root) as watch:
        for number in range(10):
            (root / f"d{number}").mkdir()
        told = _until(watch, root / "end")
        lost = [c for c in told if "lost" in c.kinds]
        made = [c.path for c in told if "created" in c.kinds]
        (root / "d0" / "f").touch()  # the first has a mark
        after = _until(watch, root / "end2")
        rung = watch.roots[0].rung
    try:
        with fanwise.watch(root):
            again = None
    except fanwise.LimitReached as error:
        again = error.sysctl
    return {
        "rung": rung,
        "sources": sorted({str(c.source) for c in lost}),
        "silent": sorted(c.path for c in lost),
        "made": sorted(made),
        "after": names(after, root / "d0" / "f"),
        "again": again,
    }


def several(root: Path) -> dict[str, object]:
    """What is said to roots of which one or more may not go together, and to a mere directory."""
    said: dict[str, object] = {}
    for paths in (["denied"], ["plain", "denied"], ["sv"], ["plain", "sv"], [""]):
        try:
            with fanwise.watch(*(root / path for path in paths)) as watch:
                end = watch.roots[0].path + "/end"
                told = _until(watch, Path(end))
                said["+".join(paths)] = [
                    [r.rung for r in watch.roots],
                    sorted(u.path for u in watch.unwatched),
                    any(c.path == end for c in told),
                ]
        except fanwise.FanwiseError as error:
            said["+".join(paths)] = [type(error).__name__, str(error)]
    return said


def overflow(root: Path) -> dict[str, object]:
    with fanwise.watch(root) as watch:
        print("ready", flush=True)  # the test stops this process, and fills the kernel's queue
        lost: list[fanwise.Change] = []
        while not lost:
            lost = [c for c in watch.read(30) if "lost" in c.kinds]
        (root / "late" / "deep").mkdir(parents=True)
        told = _until(watch, root / "late" / "deep" / "end")
        return {
            "lost": sorted({str(c.source) for c in lost}),
            "after": names(told, root / "late" / "deep" / "end"),
        }


def filtered(root: Path, code: int) -> dict[str, object]:
    refusals.install_filter(["fanotify_init", "fanotify_mark"], code)
    before = on_disk(root)
    with fanwise.watch(root) as watch:
        for number in range(100):
            below = root / f"c{number}" / "b" / "c"
            below.mkdir(parents=True)
            (below / "f").write_text("x")
            if number % 3 == 0:
                (root / f"c{number}" / "b").rename(root / f"m{number}")
        told = _until(watch, root / "end")
        return {
            "rung": watch.roots[0].rung,
            "told": sorted(replay(told, before)),
            "disk": sorted(on_disk(root)),
        }


def main() -> None:
    what, _, argument = sys.argv[1].partition(":")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    root = Path(sys.argv[2])
    os.chdir("/")
    if sys.argv[3] != "0":  # only now: the interpreter may be where nobody may look
        os.setgroups([])
        os.setresgid(*[int(sys.argv[3])] * 3)
        os.setresuid(*[int(sys.argv[3])] * 3)
    print(json.dumps(globals()[what](root, *([int(argument)] if argument else []))))


if __name__ == "__main__":
    main()
