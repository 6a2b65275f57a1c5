"""Health as text: a table for a terminal, lines for all else; whatever names hold."""

import time
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fanwise.cli._plain import visible
from fanwise.health import Entry, FilesystemState, Incident, Report, Sources

_COLOURS = {
    "healthy": "green",
    "incidents": "bold red",
    "cannot tell": "yellow",
    "ok": "green",
    "unknown": "yellow",
    "warning": "yellow",
}
_HEADS = ("device", "type", "mounted on", "state", "verdict", "open", "counters")


def report(found: Report, terminal: bool) -> str:
    """Make the whole text of a look."""
    if terminal:
        console = Console()
        with console.capture() as captured:
            console.print(_table(found))
            for entry in found.entries:
                console.print(Text(one_line(entry.incident), style=_style(entry.incident)))
                for text in _below(entry):
                    console.print(Text(f"    {text}"))
            for text in _notes(found):
                console.print(Text(text, style="yellow"))
        return captured.get()
    lines = ["\t".join(_row(state)) for state in found.filesystems]
    for entry in found.entries:
        lines.append(one_line(entry.incident))
        lines += [f"    {text}" for text in _below(entry)]
    lines += _notes(found)
    return "".join(f"{line}\n" for line in lines)


def _table(found: Report) -> Table:
    table = Table(box=None, pad_edge=False)
    for head in _HEADS:
        table.add_column(head, overflow="fold")
    for state in found.filesystems:
        cells = [Text(cell) for cell in _row(state)]
        cells[3].stylize(_COLOURS.get(state.state, "bold red"))
        cells[4].stylize(_COLOURS[state.verdict])
        table.add_row(*cells)
    return table


def _row(state: FilesystemState) -> tuple[str, ...]:
    counters = " ".join(f"{name}={count}" for name, count in state.counters.items() if count)
    return tuple(
        visible(cell)
        for cell in (
            state.fs.name or state.fs.device,
            state.fs.fstype or "?",
            ", ".join(state.fs.mounts) or "-",
            state.state,
            state.verdict,
            str(state.open),
            counters or "-",
        )
    )


def one_line(incident: Incident) -> str:
    """Make the line of an incident: the same when it is followed and when it is looked at."""
    fs = incident.fs
    where = ", ".join(fs.mounts) or fs.name or fs.device
    parts = [
        clock(incident.last_seen),
        incident.id,
        incident.errno or "no errno",
        f"{'at least ' if incident.at_least else ''}{incident.total}x",
        f"{fs.fstype or 'device'} {fs.name or fs.device} on {where}",
        _object(incident),
    ]
    if found_at := _location(incident):
        parts.append(f"at {found_at}")
    if incident.state != "ok":
        parts.append(f"state {incident.state}")
    if incident.status != "open":
        parts.append(f"{incident.status}: {incident.resolved or incident.merged_into}")
    return "  ".join(visible(part) for part in parts if part)


def _object(incident: Incident) -> str:
    of = incident.object
    if of.path is not None:
        return f"{of.path} (inode {of.ino})" if of.ino is not None else of.path
    if of.ino is not None:
        several = f", one of {len(of.paths)} files" if len(of.paths) > 1 else ""
        return f"inode {of.ino}{several}"
    if of.group is not None:
        return f"group {of.group}"
    if of.start is not None:
        return f"bytes {of.start} to {of.start + (of.length or 0)} of the device"
    return incident.scope


def _location(incident: Incident) -> str:
    at = incident.location
    if at.function is not None:
        return f"{at.function}:{at.line}" if at.line is not None else at.function
    return at.symbol or ""


def _below(entry: Entry) -> list[str]:
    incident = entry.incident
    if incident.status != "open":
        return []
    texts = [f"{incident.meaning}: {incident.advice}"]
    if entry.acked is not None:
        texts.append(f"seen by an operator {clock(entry.acked)}")
    if entry.applies == "unknown":
        texts.append("its path is not known: it may lie elsewhere on the filesystem")
    return [visible(text) for text in texts]


def _notes(found: Report) -> list[str]:
    texts = [*found.notes]
    if found.writer is not None:
        texts.append(f"process {found.writer.pid} ({found.writer.command}) listens")
    for state in found.filesystems:
        if state.why is not None:
            texts.append(f"{state.fs.name or state.fs.device}: {state.why}")
    return [visible(text) for text in dict.fromkeys(texts)]


def details(entry: Entry) -> str:
    """Make the text of one incident, all that is known of it."""
    incident = entry.incident
    fs, of, at, by = incident.fs, incident.object, incident.location, incident.process
    source = f" by {incident.count_source}" if incident.count_source else ""
    rows: list[tuple[str, object]] = [
        ("incident", incident.id),
        ("status", f"{incident.status} {incident.resolved or incident.merged_into or ''}".strip()),
        ("filesystem", f"{fs.fstype or 'none'} {fs.label or ''} {fs.uuid or ''}"),
        ("device", f"{fs.name or ''} {fs.device}"),
        ("stands on", ", ".join(fs.stack)),
        ("mounted on", ", ".join(fs.mounts)),
        ("scope", incident.scope),
        ("inode", of.ino),
        ("generation", of.gen),
        ("path", of.path and f"{of.path} ({of.path_source})"),
        ("all paths" if of.path else "one of", ", ".join(of.paths) if len(of.paths) > 1 else None),
        ("group", of.group),
        ("bytes", of.start if of.start is None else f"{of.start} +{of.length or 0}"),
        ("errno", f"{incident.errno or 'none'}: {incident.meaning}"),
        ("errors", f"{'at least ' if incident.at_least else ''}{incident.total}{source}"),
        ("first seen", clock(incident.first_seen)),
        ("last seen", clock(incident.last_seen)),
        ("found at", _location(incident)),
        ("kernel", at.kernel),
        ("operation", incident.operation),
        ("state", incident.state),
        ("tripped by", by and f"{by.comm or '?'} ({by.pid})"),
        ("heard of it", ", ".join(f"{one.comm or '?'} ({one.pid})" for one in incident.heard)),
        ("told by", ", ".join(incident.channels)),
        ("records lost", incident.lost),
        ("seen", entry.acked and clock(entry.acked)),
        ("kernel said", incident.text),
        ("advice", incident.advice),
    ]
    return "".join(
        f"{name:13} {visible(str(value)).strip()}\n"
        for name, value in rows
        if value not in (None, "")
    )


def sources(said: Sources) -> Iterator[str]:
    """Make a line for each source that is not up; one for all that nobody listens to."""
    reasons = {state.reason for state in said.sources.values()}
    if len(said.sources) > 1 and len(reasons) == 1 and None not in reasons:
        yield visible(f"{', '.join(said.sources)} are down: {reasons.pop()}")
        return
    for name, state in said.sources.items():
        if state.state != "up" or state.lost:
            lost = f", {state.lost} records lost" if state.lost else ""
            yield visible(f"{name} is {state.state}{lost}: {state.reason or 'no reason told'}")


def clock(seconds: float) -> str:
    """Return local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _style(incident: Incident) -> str:
    return "bold red" if incident.status == "open" else "dim"
