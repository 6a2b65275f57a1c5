"""Changes on a terminal: coloured lines, and a status line below them.

A batch and the status after it are one write, so nothing comes between the two; the status is cut
to the terminal's width, so that it is one line and can be taken back.
"""

import time
from collections.abc import Sequence

from rich.cells import set_cell_size
from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

from fanwise import Change, Watch, WatchedRoot
from fanwise.cli._output import Output
from fanwise.cli._plain import column, text, visible

_ERASE = "\r\x1b[K"
_EVERY = 0.25  # seconds between two showings of the status while something comes

# The colour of a change is that of its most telling kind.
_COLOURS = {
    "lost": "bold red",
    "unmounted": "bold red",
    "relisted": "bold yellow",
    "repaired": "bold green",
    "deleted": "red",
    "renamed": "blue",
    "created": "green",
    "written": "yellow",
    "modified": "yellow",
    "attributes": "magenta",
    "mounted": "cyan",
    "executed": "cyan",
    "opened": "cyan",
    "accessed": "cyan",
}


class Terminal:
    """Lines and the status for somebody who looks."""

    def __init__(self, output: Output, watch: Watch) -> None:
        self._output, self._watch = output, watch
        self._console = Console()
        # Knows about NO_COLOR, TERM and COLORTERM.
        name = None if self._console.no_color else self._console.color_system
        self._colours = {
            "standard": ColorSystem.STANDARD,
            "256": ColorSystem.EIGHT_BIT,
            "truecolor": ColorSystem.TRUECOLOR,
        }.get(name or "")
        self._columns: dict[tuple[str, ...], str] = {}
        self._what = ""
        self._changes = self._lost = 0
        self._rate = 0.0
        self._since, self._at = 0, time.monotonic()  # of the last showing

    def ready(self, roots: Sequence[WatchedRoot]) -> None:
        """Show what is watched."""
        self._what = ", ".join(f"{visible(root.path)} ({root.fstype})" for root in roots)
        self._show("")

    def scanned(self, directories: int) -> None:
        """Show that the model is complete."""
        self._show("")

    def changes(self, rows: Sequence[Change]) -> None:
        """Show a batch."""
        if not self._rate and self._changes == self._since:
            self._at = time.monotonic()  # the rate is that of what begins now
        lines = []
        for row in rows:
            lines.append(f"{text(row, self._column(row.kinds))}\n")
            if row.source is not None:
                self._lost += row.count or 0
            elif row.roots is None:
                self._changes += 1
        self._show("".join(lines))

    def pause(self) -> float | None:
        """Bring the status up to date; ask to be called again until the rate is down to 0."""
        if time.monotonic() - self._at >= _EVERY:
            self._show("")
        return _EVERY if self._rate or self._changes > self._since else None

    def stopped(self, changes: int, lost: int | None) -> None:
        """Leave the totals in place of the status."""
        losses = "an unknown number of records lost" if lost is None else f"{lost:,} lost"
        self._output.write(f"{_ERASE}{changes:,} changes, {losses}\n".encode())

    def _column(self, kinds: tuple[str, ...]) -> str:
        found = self._columns.get(kinds)
        if found is None:
            colour = next((c for kind, c in _COLOURS.items() if kind in kinds), "default")
            found = Style.parse(colour).render(column(kinds), color_system=self._colours)
            self._columns[kinds] = found
        return found

    def _show(self, lines: str) -> None:
        now = time.monotonic()
        if now - self._at >= _EVERY:
            self._rate = (self._changes - self._since) / (now - self._at)
            self._since, self._at = self._changes, now
        backlog = self._watch.stats()["backlog_bytes"]
        parts = [
            f"{self._rate:,.0f}/s",
            f"{self._changes:,} changes",
            f"{self._lost:,} lost",
            f"backlog {backlog / 1048576:,.1f} MiB",
            f"{self._watch.directories:,} directories" + ("" if self._watch.scanned else "..."),
            self._what,
        ]
        status = " | ".join(parts)
        # One column is left free: a full line would wrap, and a wrapped one cannot be taken back.
        status = set_cell_size(status, max(self._console.width - 1, 0)).rstrip()
        status = Style.parse("dim").render(status, color_system=self._colours)
        self._output.write(f"{_ERASE}{lines}{status}".encode())
