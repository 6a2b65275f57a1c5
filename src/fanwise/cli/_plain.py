"""Changes as text: one line each, in columns, whatever the names hold."""

import time
from collections.abc import Sequence

from fanwise import Change, WatchedRoot
from fanwise.cli._output import Output

_KINDS_WIDTH = 24  # created modified written


class Plain:
    """Lines for a file or another program."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def ready(self, roots: Sequence[WatchedRoot]) -> None:
        """Not told: every line is a change or a loss."""

    def scanned(self, directories: int) -> None:
        """Not told."""

    def changes(self, rows: Sequence[Change]) -> None:
        """Write a batch."""
        self._output.write("".join(f"{text(row)}\n" for row in rows).encode())

    def stopped(self, changes: int, lost: int | None) -> None:
        """Not told."""

    def pause(self) -> float | None:
        """Nothing to show while nothing comes."""
        return None


def text(change: Change, kinds: str | None = None) -> str:
    """Make the line of a change; ``kinds`` stands in for its kinds when that is given."""
    # Seconds are enough to convert once: changes come in bursts.
    when = f"{_clock(int(change.time))}.{int(change.time % 1 * 1000):03}"
    if change.source is not None:
        count = "an unknown number of" if change.count is None else f"{change.count:,}"
        label = kinds or f"{'LOST':{_KINDS_WIDTH}}"
        return f"{when}  {label} {'':7}  {count} records below {_of(change)} ({change.source})"
    if change.kinds == ("repaired",):
        label = kinds or f"{'repaired':{_KINDS_WIDTH}}"
        return f"{when}  {label} {'':7}  {change.count or 0:,} changes told of {_of(change)}"
    label = kinds or f"{' '.join(change.kinds):{_KINDS_WIDTH}}"
    slash = "/" if change.is_dir and change.path != "/" else ""
    path = visible(change.path) + slash
    if change.old_path is not None:
        path = f"{visible(change.old_path)}{slash} -> {path}"
    return f"{when}  {label} {change.pid or '-':>7}  {path}{_remarks(change)}{_by(change)}"


def _of(change: Change) -> str:
    roots = ", ".join(map(visible, change.roots or ()))
    return roots + (", baseline incomplete" if change.baseline is not None else "")


def column(kinds: tuple[str, ...]) -> str:
    """Make the column of kinds, for `text`."""
    label = "LOST" if kinds == ("lost",) else " ".join(kinds)
    return f"{label:{_KINDS_WIDTH}}"


def visible(path: str) -> str:
    """Make a path fit for a terminal: no control characters, no bytes that are not UTF-8."""
    if path.isprintable():
        return path
    return "".join(c if c.isprintable() else _escaped(c) for c in path)


def _escaped(c: str) -> str:
    if "\udc80" <= c <= "\udcff":  # a byte that is not UTF-8
        return f"\\x{ord(c) - 0xDC00:02x}"
    return repr(c)[1:-1]


def _by(change: Change) -> str:
    process = change.process
    if process is None:
        return ""
    if process.state == "gone":
        return "  by ? (not known)"
    user = f" as {visible(process.user)}" if process.user is not None else ""
    return f"  by {visible(process.exe or process.name or '?')}{user}"


def _remarks(change: Change) -> str:
    remarks = []
    if change.names is not None:
        remarks.append(f"{len(change.names):,} names")
    if change.replaced is not None:
        remarks.append("replaced another")
    if change.unlinked:
        remarks.append("name deleted before")
    if change.exists is not None:
        remarks.append("exists" if change.exists else "gone")
    if change.inferred:
        remarks.append("inferred")
    if change.correction:
        remarks.append("correction")
    if change.path_source != "exact":
        remarks.append(f"path {change.path_source}")
    return f"  ({', '.join(remarks)})" if remarks else ""


_last = (-1, "")


def _clock(second: int) -> str:
    global _last
    if _last[0] != second:
        _last = (second, time.strftime("%H:%M:%S", time.localtime(second)))
    return _last[1]
