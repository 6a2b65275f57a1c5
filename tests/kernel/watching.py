"""What the tests of watch share: a watch that is read until a sentinel shows up."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fanwise
from fanwise import Change


class Reader:
    """Reads a watch up to a file made for that purpose: everything before it was told then."""

    def __init__(self, watch: fanwise.Watch, where: Path) -> None:
        self.watch = watch
        self._where = where
        self._count = 0

    def told(self) -> list[Change]:
        """Changes so far, without those of the sentinel."""
        self._count += 1
        name = self._where / f".sentinel{self._count}"
        name.touch()
        out = self._until(name, "created")
        name.unlink()  # in a window of its own: what the one before left open is settled now
        out += self._until(name, "deleted")
        return [c for c in out if ".sentinel" not in c.path]

    def _until(self, name: Path, kind: str) -> list[Change]:
        # As long as something comes it may be a storm on a machine that has much to do.
        out: list[Change] = []
        while batch := self.watch.read(20):
            out += batch
            if any(c.path == str(name) and kind in c.kinds for c in batch):
                return out
        raise AssertionError(f"the sentinel was not {kind}; told {len(out)}: {out[-3:]}")


@contextmanager
def watching(*paths: Path, sentinel: Path | None = None, **options: object) -> Iterator[Reader]:
    """Watch paths; sentinels are made in the first one, or in ``sentinel``."""
    with fanwise.watch(*paths, **options) as watch:  # type: ignore[arg-type]
        yield Reader(watch, sentinel or paths[0])


def scanned(reader: Reader) -> None:
    """Read until the whole tree is known."""
    deadline = time.monotonic() + 20
    while not reader.watch.scanned:
        reader.watch.read(0.01)
        assert time.monotonic() < deadline, "the scan does not end"


def short(changes: list[Change], root: Path) -> list[tuple[str, str, str | None]]:
    """(kinds, path, old path) of each change, paths below the root."""

    def cut(path: str | None) -> str | None:
        return None if path is None else os.path.relpath(path, root)

    return [("+".join(c.kinds), cut(c.path) or "", cut(c.old_path)) for c in changes]


def replay(changes: list[Change], paths: set[str]) -> set[str]:
    """The paths that a consumer ends up with, that began with ``paths``."""
    last: Change | None = None  # a rename
    out: set[str] = set()  # what it displaced
    came: set[str] = set()
    for c in changes:
        if last is not None and c.path == last.path and {"created", "deleted"} & set(c.kinds):
            last = None
        if "renamed" in c.kinds:
            assert c.old_path is not None
            back = last is not None and (c.path, c.old_path) == (last.old_path, last.path)
            if last is not None and back and c.identity != last.identity:
                # An exchange: what the first one displaced is still there.
                paths = (paths - out) | came
                paths |= {c.path + p[len(c.old_path) :] for p in out} | {c.path}
                last = None
                continue
            below = {p for p in paths if p == c.old_path or p.startswith(c.old_path + "/")}
            paths -= below
            last, out = c, {p for p in paths if p == c.path or p.startswith(c.path + "/")}
            came = {c.path + p[len(c.old_path) :] for p in below} | {c.path}
            paths = (paths - {c.path}) | came
        elif "created" in c.kinds and "deleted" in c.kinds:
            (paths.add if c.exists else paths.discard)(c.path)
        elif "created" in c.kinds:
            paths.add(c.path)
        elif "deleted" in c.kinds:
            paths.discard(c.path)
            if c.is_dir:  # with all that is in it: one that left is not empty
                paths = {p for p in paths if not p.startswith(c.path + "/")}
    return paths


def on_disk(root: Path) -> set[str]:
    """Every path below a root."""
    found = set()
    for base, dirs, files in os.walk(root):
        found |= {os.path.join(base, name) for name in dirs + files}
    return found


def write(path: Path, text: str = "x") -> Path:
    """Create or overwrite a file."""
    path.write_text(text)
    return path
