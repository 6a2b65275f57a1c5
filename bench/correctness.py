"""Who names what, and names it rightly: every peer, and each rung of ours?

Every watcher gets the same: chains of directories made at once (mkdir -p), five renames,
directories renamed and written into at once, and deletions. A file counts as named by whatever
kind of event.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bench._harness import (
    CONTENDERS,
    PEERS,
    Bench,
    Contender,
    Json,
    Record,
    Unavailable,
    last_json,
    row,
    worst,
)

RUNS = 2
BTRFS = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
GONE = {"deleted", "moved_away"}


@dataclass(frozen=True)
class Row:
    """How a row of the table is started: which contender, as which user, on which filesystem.

    `rung` is what must serve it: a row that another one serves is left out with that reason.
    """

    name: str
    contender: str
    user: str = "root"
    filesystem: str = "tmpfs"
    options: tuple[str, ...] = ()
    rung: str = ""


RUNGS = (
    Row("library, root on tmpfs", "library names", rung="filesystem-mark"),
    Row("library, root on tmpfs, pure Python", "pure names", rung="filesystem-mark"),
    Row(
        "library, root on a btrfs subvolume",
        "library names",
        filesystem="subvolume",
        rung="detached-mount",
    ),
    Row("library, root on overlayfs", "library names", filesystem="overlay", rung="inode-marks"),
    Row("library, nobody on tmpfs", "library names", user="nobody", rung="inode-marks"),
    Row(
        "library, nobody, fanotify refused",
        "library names",
        user="nobody",
        options=("--refuse-fanotify",),
        rung="inotify",
    ),
)
ROWS = {
    r.name: r for r in (*RUNGS, Row("watch --json", "watch --json"), *(Row(p, p) for p in PEERS))
}
COLUMNS = [
    ("chains_missed", "mkdir -p: files never named", ".0f"),
    ("cases", "renames right, of 5", ".0f"),
    ("cases_wrong", "not right", ""),
    ("pairs_exact", "rename + create: exact", ".0f"),
    ("pairs_wrong", "wrong path", ".0f"),
    ("pairs_none", "not named", ".0f"),
    ("moves_exact", "one directory renamed on: exact", ".0f"),
    ("moves_wrong", "wrong path", ".0f"),
    ("moves_none", "not named", ".0f"),
    ("deletes_told", "deletions told", ".0f"),
    ("stale", "name still opened", ".0f"),
    ("ended", "ended", ""),
    ("rungs", "served by", ""),
]


def named(records: Iterable[Record]) -> set[str]:
    """Every path that was told, with any kind of event that is about the path itself."""
    return {path for kinds, path, _ in records if path and set(kinds) - {"directory_changed"}}


def judge(what: str, right: set[str], told: set[str]) -> Json:
    """Score files: told where they are, only elsewhere, or never.

    A file told both where it is and elsewhere is exact: a program that follows later events has it.
    """
    exact = len(right & told)
    places: dict[str, list[str]] = {}
    for path in right:
        places.setdefault(Path(path).name, []).append(path)
    if len(places) == len(right):
        found = {places[Path(path).name][0] for path in told - right if Path(path).name in places}
        wrong = len(found - told)
    else:  # one name in many directories: which one was meant cannot be told, only counted
        elsewhere = sum(Path(path).name in places for path in told - right)
        wrong = min(elsewhere, len(right) - exact)
    return {
        f"{what}_exact": exact,
        f"{what}_wrong": wrong,
        f"{what}_none": len(right) - exact - wrong,
    }


CASES = ("file", "over", "directory", "ancestor", "exchange")


def judge_cases(root: Path, records: Iterable[Record]) -> Json:
    """Of a file: new name told, old one told gone. Of a directory: what is made in it, exact."""
    records = list(records)
    told = named(records)
    gone = {path for kinds, path, _ in records if path and GONE & set(kinds)}
    gone |= {old for kinds, _, old in records if old and "renamed" in kinds}
    made = {
        "directory": f"{root}/directory/new/f-directory",
        "ancestor": f"{root}/ancestor/new/below/f-ancestor",
        "exchange": f"{root}/exchange/one/f-exchange",
    }
    right = {
        case: {f"{root}/{case}/b"} <= told and f"{root}/{case}/a" in gone for case in CASES[:2]
    }
    for case, path in made.items():
        others = {p for p in told if Path(p).name == Path(path).name} - {path}
        right[case] = path in told and not others
    wrong = [case for case in CASES if not right[case]]
    return {"cases": len(CASES) - len(wrong), "cases_wrong": ", ".join(wrong) or "-"}


def filesystem(bench: Bench, kind: str) -> AbstractContextManager[Path]:
    if kind == "subvolume" and not shutil.which(
        "mkfs.btrfs", path=f"{os.environ['PATH']}:/usr/sbin"
    ):
        raise Unavailable("mkfs.btrfs is not installed: apt-get install btrfs-progs")
    made: AbstractContextManager[Path] = getattr(bench, kind)()
    return made


class Deletions:
    """Opens the name of each deletion when its line arrives, for programs that only print."""

    def __init__(self, contender: Contender) -> None:
        self._contender, self._rest = contender, b""
        self.told = self.stale = 0

    def __call__(self, chunk: bytes) -> None:
        whole, _, self._rest = (self._rest + chunk).rpartition(b"\n")
        for kinds, path, _ in self._contender.read(whole):
            if "deleted" in kinds and path:
                self.told += 1
                with contextlib.suppress(OSError):
                    os.close(os.open(path, os.O_RDONLY))
                    self.stale += 1


def run(bench: Bench) -> Json:
    chains, pairs, deletions = (100, 20, 200) if bench.quick else (2000, 200, 5000)

    def told(row: Row, root: Path, mode: str, number: int, *more: str) -> tuple[list[Record], Json]:
        """What this watcher told of one storm, and its closing line."""
        contender = CONTENDERS[row.contender]
        options = list(row.options) + ([] if row.user == "root" else ["--user", row.user])
        with bench.watch(row.contender, root, None, *options, *more) as watcher:
            deletions = Deletions(contender)
            if mode == "unlink" and not more:
                watcher.arrived = deletions
            watcher.wait_ready()
            bench.storm(mode, root, number, user=row.user)
            if contender.drains:
                # Only so that some read the storm while it runs and some after it.
                time.sleep(0.05)
            else:
                watcher.quiet(20)
            ended = watcher.stop(60)["ended"]
            closing = last_json(watcher.output)
            if mode == "unlink" and not more:
                closing.update(deletes_told=deletions.told, stale=deletions.stale)
        closing["ended"] = ended
        return list(contender.read(watcher.output)), closing

    def once(name: str) -> Json:
        row = ROWS[name]
        with filesystem(bench, row.filesystem) as root:
            if row.user != "root":
                shutil.chown(root, row.user)
            result: Json = {}
            endings = []

            def part(what: str, *make: str) -> Path:
                """A directory for one storm, with directories (`/` at the end) and files in it."""
                place = root / what
                place.mkdir()
                for entry in make:
                    if entry.endswith("/"):
                        (place / entry).mkdir(parents=True)
                    else:
                        (place / entry).write_bytes(b"")
                if row.user != "root":
                    for path in (place, *place.rglob("*")):
                        shutil.chown(path, row.user)
                return place

            top = part("chains")
            records, closing = told(row, top, "chains", chains)
            endings.append(closing["ended"])
            rungs = closing.get("rungs", [])
            if row.rung and rungs != [row.rung]:
                raise Unavailable(f"served by {', '.join(rungs)} and not by {row.rung}")
            result["rungs"] = ", ".join(rungs)
            files = {f"{top}/c{n:07d}/b/c/d/f" for n in range(chains)}
            result["chains_missed"] = len(files - named(records))
            result["chains"] = chains

            top = part(
                "cases",
                *("file/", "file/a", "over/", "over/a", "over/b", "directory/old/"),
                *("ancestor/old/below/", "exchange/one/", "exchange/two/"),
            )
            records, closing = told(row, top, "cases", 300)
            endings.append(closing["ended"])
            result.update(judge_cases(top, records))

            top = part("pairs", *(f"p{n:07d}/" for n in range(pairs)))
            records, closing = told(row, top, "pairs", pairs)
            endings.append(closing["ended"])
            right = {f"{top}/q{n:07d}/f" for n in range(pairs)}
            result.update(judge("pairs", right, named(records)))

            top = part("moves", "m0000000/")
            records, closing = told(row, top, "moves", pairs)
            endings.append(closing["ended"])
            right = {f"{top}/m{n + 1:07d}/f{n:07d}" for n in range(pairs)}
            result.update(judge("moves", right, named(records)))
            result["pairs"] = pairs

            top = part("deletions", *(f"x{n:07d}" for n in range(deletions)))
            checks = CONTENDERS[row.contender].checks
            _, closing = told(row, top, "unlink", deletions, *(["--check"] if checks else []))
            endings.append(closing["ended"])
            result["deletes_told"] = closing.get("deletes_told")
            # Of one that tells no deletion by name there is nothing to open.
            result["stale"] = closing.get("stale") if result["deletes_told"] else None
            result["ended"] = "; ".join(sorted(set(filter(None, endings))))
            return result

    runs = bench.each(ROWS, once)
    return {"runs": runs, "rows": rows(runs), "grid": grid(runs), "about": ABOUT}


ABOUT = (
    "Renames: `file` a > b, `over` a > b which existed, `directory` and `ancestor` renamed and a "
    "file made in it or below it at once, `exchange` of two directories and a file made in one. "
    "Deletions: `name still opened` counts names that could be opened when their deletion had been "
    "told; none is made again. watchman is asked once, after each storm: of the one directory that "
    "is renamed on it tells where the files are in the end, as it promises, which counts as wrong "
    "here. Rows of ours that could not run say why."
)


def rows(runs: dict[str, list[Json]]) -> list[Json]:
    """Our bars: everything named, nothing wrong, on every rung that there is."""
    found = []
    for name in (r.name for r in RUNGS):
        results = runs.get(name, [])
        bad = {
            key: worst(results, key, max)
            for key in (
                *("chains_missed", "pairs_wrong", "pairs_none", "moves_wrong", "moves_none"),
                "stale",
            )
        }
        cases = worst(results, "cases", min)
        said = ", ".join(f"{k.replace('_', ' ')} {v:.0f}" for k, v in bad.items() if v)
        passed = None if not results else not said and cases == len(CASES)
        found.append(
            row(
                f"correctness ({name})",
                "nothing missed, wrong or stale; 5 of 5 renames",
                passed,
                "not measured" if not results else said or f"all right, {cases:.0f} of 5 renames",
                note="worst run",
            )
        )
    return found


def grid(runs: dict[str, list[Json]]) -> Json:
    """The plot: for each watcher the share of each test that was right, in its worst run."""
    tests = ["mkdir -p race", "5 renames", "rename + create", "one directory"]
    found = []
    for name, results in runs.items():
        shares = [
            min(1 - r["chains_missed"] / r["chains"] for r in results),
            min(r["cases"] / len(CASES) for r in results),
            min(r["pairs_exact"] / r["pairs"] for r in results),
            min(r["moves_exact"] / r["pairs"] for r in results),
        ]
        found.append({"name": name, "shares": shares})
    return {"title": "named, and named rightly", "tests": tests, "rows": found}


if __name__ == "__main__":
    from bench.__main__ import main

    main(["correctness", *sys.argv[1:]])
