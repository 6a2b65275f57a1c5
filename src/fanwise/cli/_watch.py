"""``fanwise watch``: print what changes, for people and for programs."""

import os
import select
import stat
from collections.abc import Sequence
from typing import Protocol

import click

from fanwise import (
    Change,
    ConfigError,
    Exit,
    FanwiseError,
    UnwatchedMount,
    Watch,
    WatchedRoot,
    config,
    watch,
)
from fanwise.cli import _lines
from fanwise.cli._output import Output
from fanwise.cli._plain import visible
from fanwise.cli._signals import Signals

_OF_MOUNTS = ("mounted", "unmounted")  # told of a root whatever is asked for, so hidden here


@click.command()
@click.argument("paths", nargs=-1, metavar="PATH...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@click.option("--kinds", metavar="KIND,...", help="Tell these kinds of change only.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave out a name or a path.")
@click.option("--queue", metavar="BYTES", help="Room for what nobody has read yet (256MiB).")
@click.option("--pure", is_flag=True, help="Use pure Python instead of the native part.")
@click.option("--no-recursive", is_flag=True, help="Watch only the names directly in PATH.")
@click.option("--one-file-system", is_flag=True, help="Do not follow what is mounted below PATH.")
@click.option(
    "--ignore-pid", type=int, multiple=True, metavar="PID", help="Leave out what a process does."
)
@click.option("--who", is_flag=True, help="Tell the process: name, executable, user, cgroup.")
@click.option("--index", is_flag=True, help="Keep every name; after a loss, tell what differs.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of a line, and nothing else.")
@click.pass_obj
def command(
    file: str | None,
    paths: tuple[str, ...],
    as_json: bool,
    kinds: str | None,
    exclude: tuple[str, ...],
    queue: str | None,
    pure: bool,
    no_recursive: bool,
    one_file_system: bool,
    ignore_pid: tuple[int, ...],
    who: bool,
    index: bool,
    schema: bool,
) -> int:
    """Print what changes at and below each PATH, until SIGINT or SIGTERM.

    Kinds: created, modified, written, attributes, renamed, deleted, mounted, unmounted; and, by
    request, opened, accessed, executed. A GLOB with a slash in it means a path below PATH, any
    other a name at any depth.
    """
    output = Output()
    if schema:
        output.write(_lines.schema())
        return Exit.OK
    if not paths:
        raise click.UsageError("Missing argument 'PATH...'.")
    flags = {
        "watch.kinds": kinds.split(",") if kinds is not None else None,
        "watch.exclude": exclude or None,
        "watch.queue": queue,
        "watch.pure": pure or None,
        "watch.who": who or None,
        "watch.index": index or None,
    }
    settings = config.load(file, flags=flags).config.watch
    changes = watch(
        *paths,
        kinds=settings.kinds,
        exclude=settings.exclude,
        recursive=not no_recursive,
        ignore_pids=[os.getpid(), *ignore_pid],
        queue=settings.queue,
        pure=settings.pure or None,
        who=settings.who,
        mounts=not one_file_system,
        index=settings.index,
    )
    signals = Signals(changes.pause)
    signals.start()
    try:
        changes.open()
    except OSError as error:
        raise FanwiseError(
            f"{error.filename or ', '.join(paths)}: cannot be watched: {error.strerror}"
        ) from error
    try:
        _refuse_feedback(output, changes)
        unwatched = _Unwatched()
        unwatched.show(changes)
        if changes.who_limits is not None:
            click.echo(
                "fanwise: only processes that live long enough to be looked at are named: "
                + changes.who_limits,
                err=True,
            )
        told: _Told
        if as_json:
            told = _Json(output)
        elif output.terminal:
            from fanwise.cli._terminal import Terminal

            told = Terminal(output, changes)
        else:
            from fanwise.cli._plain import Plain

            told = Plain(output)
        hidden = frozenset((k,) for k in _OF_MOUNTS if k not in settings.kinds)
        return _run(changes, told, output, signals, hidden, unwatched)
    finally:
        changes.close()


class _Told(Protocol):
    """How the stream is shown."""

    def ready(self, roots: Sequence[WatchedRoot]) -> None: ...
    def scanned(self, directories: int) -> None: ...
    def changes(self, rows: Sequence[Change]) -> None: ...
    def stopped(self, changes: int, lost: int | None) -> None: ...
    def pause(self) -> float | None:
        """Nothing comes now; return for how long that needs no showing, in seconds."""


class _Json:
    def __init__(self, output: Output) -> None:
        self._write = output.write

    def ready(self, roots: Sequence[WatchedRoot]) -> None:
        self._write(_lines.ready(roots))

    def scanned(self, directories: int) -> None:
        self._write(_lines.line(_lines.Scanned(directories)))

    def changes(self, rows: Sequence[Change]) -> None:
        self._write(_lines.changes_to_lines(rows))

    def stopped(self, changes: int, lost: int | None) -> None:
        self._write(_lines.line(_lines.Stopped(changes, lost)))

    def pause(self) -> float | None:
        return None


def _run(
    changes: Watch,
    told: _Told,
    output: Output,
    signals: Signals,
    hidden: frozenset[tuple[str, ...]],
    unwatched: "_Unwatched",
) -> int:
    poll = select.poll()
    poll.register(changes.fileno(), select.POLLIN)
    poll.register(signals.fd, select.POLLIN)
    poll.register(output.fd, 0)  # POLLERR, POLLHUP: its reader left
    told.ready(changes.roots)
    scanned = False
    count, lost = 0, 0
    counted = True  # whether every loss had a count
    while True:
        signals.clear()
        if signals.stop:
            changes.stop()
        if signals.resumed:
            with signals.lock:  # not while it is suspended again
                signals.resumed = False
                changes.resume()
        found = changes.read(0)
        rows = [row for row in found if row.kinds not in hidden] if hidden else found
        unwatched.show(changes)
        if rows:
            count += len(rows)
            if _lines.has_loss(rows):
                scanned = scanned and all(row.source is None for row in rows)
                for row in rows:
                    if row.roots is not None:
                        count -= 1  # of the watch itself
                    if row.source is not None:
                        lost += row.count or 0
                        counted = counted and row.count is not None
            told.changes(rows)
        if not scanned and changes.scanned:
            scanned = True
            told.scanned(changes.directories)
        if found:
            continue
        if changes.ended:
            break
        timeout = told.pause()
        for fd, event in poll.poll(None if timeout is None else timeout * 1000):
            if fd == output.fd and event & (select.POLLERR | select.POLLHUP):
                return Exit.OK
    told.stopped(count, lost if counted else None)
    return Exit.OK


# A file below a root that holds the output would be changed by each change that it tells of.
def _refuse_feedback(output: Output, changes: Watch) -> None:
    if not stat.S_ISREG(os.fstat(output.fd).st_mode):
        return
    path = os.readlink(f"/proc/self/fd/{output.fd}")
    if changes.tells(path):
        raise ConfigError(
            "standard output",
            None,
            f"{path} is below a path that is watched: it would tell of itself",
            f"write elsewhere, or add --exclude {os.path.basename(path)}",
        )


class _Unwatched:
    # No silence: who watches / may well think of what is mounted below it.

    def __init__(self) -> None:
        self._shown: tuple[UnwatchedMount, ...] = ()

    def show(self, changes: Watch) -> None:
        """Name the mounts that are not followed, those named before left out."""
        now = changes.unwatched
        if now is self._shown:
            return
        by_reason: dict[tuple[str, str | None], list[str]] = {}
        for mount in now:
            if mount not in self._shown:
                by_reason.setdefault((mount.reason, mount.remedy), []).append(mount.path)
        self._shown = now
        for (reason, remedy), paths in by_reason.items():
            shown = ", ".join(map(visible, paths[:8]))
            more = f" and {len(paths) - 8} more" if len(paths) > 8 else ""
            text = visible(f"{reason}; {remedy}" if remedy else reason)
            click.echo(f"fanwise: not watched: {shown}{more}: {text}", err=True)
