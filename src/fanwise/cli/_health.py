"""``fanwise health``: whether filesystems break, for people and for programs."""

import datetime
import os
import re
import select
import signal
import time
from types import FrameType

import click

from fanwise import Exit, FanwiseError, NoSuchRoot, config, health
from fanwise.cli import _health_lines
from fanwise.cli._output import Output

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


class _Command(click.Command):
    # `show`, `ack` and `resolve` take the place of a PATH; a path of that name is written ./show.
    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: object,
    ) -> click.Context:
        command = {"show": show, "ack": ack, "resolve": resolve}.get(args[0]) if args else None
        if command is None:
            return super().make_context(info_name, args, parent, **extra)
        return command.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)


@click.command(cls=_Command)
@click.argument("paths", nargs=-1, metavar="[PATH...]")
@click.option("--follow", is_flag=True, help="Listen, and print incidents until SIGINT or SIGTERM.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@click.option(
    "--since", metavar="TIME", help="Show resolved incidents too, seen since then: 2h, 2026-11-30."
)
@click.option("--rules", metavar="FILE", help="Carry out the actions of these rules.")
@click.option("--metrics", metavar="ADDRESS", help="Serve metrics for Prometheus: [HOST:]PORT.")
@click.option("--textfile", metavar="FILE", help="Write metrics to NAME.prom for node_exporter.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of a line, and nothing else.")
@click.pass_obj
def command(
    file: str | None,
    paths: tuple[str, ...],
    follow: bool,
    as_json: bool,
    since: str | None,
    rules: str | None,
    metrics: str | None,
    textfile: str | None,
    schema: bool,
) -> int:
    """Say whether filesystems break: which file, since when, and which code found it.

    All filesystems of this machine's devices, or those of each PATH. A PATH below a mount point, or
    on a bind mount of a part, selects the errors of what lies below it, and those of the whole
    filesystem. The status is 0 when all are healthy, 1 when incidents are open, 3 when it cannot be
    told.

    `fanwise health show ID` prints all of one incident, `fanwise health ack ID` notes that somebody
    has seen it, `fanwise health resolve ID` that it is over, where no counter tells.
    """
    output = Output()
    if schema:
        output.write(_health_lines.schema())
        return Exit.OK
    flags = {"health.rules": rules, "health.metrics": metrics, "health.textfile": textfile}
    if not follow:
        for flag, value in flags.items():
            if value is not None:
                raise click.UsageError(f"--{flag.partition('.')[2]} needs --follow.")
        settings = config.load(file).config.health
        return _once(output, paths, settings, as_json, None if since is None else _time(since))
    if since is not None:
        raise click.UsageError("--since and --follow exclude each other.")
    return _follow(output, paths, config.load(file, flags=flags).config.health, as_json)


def _once(
    output: Output,
    paths: tuple[str, ...],
    settings: config.Health,
    as_json: bool,
    since: float | None,
) -> int:
    try:
        found = health.look(*paths, settings=settings, since=since)
    except NoSuchRoot as error:  # it is no incident that it is not there
        raise NoSuchPath(error.path, error.reason, error.remedy) from error
    if as_json:
        for state in found.filesystems:
            output.write(_health_lines.line(state))
        for entry in found.entries:
            extra = {"applies": entry.applies} if paths else {}
            output.write(_health_lines.incident(entry.incident, acked=entry.acked, **extra))
    else:
        from fanwise.cli import _health_text

        output.write(_health_text.report(found, output.terminal).encode())
    if not found.filesystems:
        click.echo(
            "fanwise: no filesystem of a device of this machine is there: nothing can be told",
            err=True,
        )
    return verdict(found, bool(paths))


def verdict(found: health.Report, named: bool) -> Exit:
    """Say it as an exit status; ``named`` says whether there were PATHs."""
    if any(entry.incident.status == "open" for entry in found.entries):
        return Exit.NO
    # A boot partition with vfat must not keep a machine from ever being healthy.
    asked = [state for state in found.filesystems if named or state.covered]
    if not found.filesystems or any(state.verdict != "healthy" for state in asked):
        return Exit.CANNOT_TELL
    return Exit.OK


def _follow(output: Output, paths: tuple[str, ...], settings: config.Health, as_json: bool) -> int:
    following = health.Follow(*paths, settings=settings)
    signals = _Stop()
    following.open()
    try:
        if following.writer is not None:
            click.echo(
                f"fanwise: process {following.writer.pid} ({following.writer.command}) listens;"
                " its database is read",
                err=True,
            )
        for path in following.unheard:
            click.echo(
                f"fanwise: {path}: it is not listened to, only what health.only names is", err=True
            )
        told = _Told(output, following, as_json, bool(paths))
        told.ready()
        return _run(following, told, output, signals)
    finally:
        following.close()


class _Told:
    """How the stream is shown."""

    def __init__(
        self, output: Output, following: health.Follow, as_json: bool, restricted: bool
    ) -> None:
        self._output, self._following = output, following
        self._json, self._restricted = as_json, restricted
        self._ids: set[str] = set()
        self._bad: set[str] = set()  # sources that were said not to be up

    def ready(self) -> None:
        following = self._following
        if self._json:
            self._output.write(_health_lines.ready(following.sources, following.writer))
        else:
            self._sources(health.Sources(following.sources))
            if following.listens:
                click.echo("fanwise: listening", err=True)

    def news(self, found: list[health.Told]) -> None:
        for one in found:
            if isinstance(one, health.Incident):
                self._ids.add(one.id)
            elif not self._json:
                self._sources(one)
        if self._json:
            data = b"".join(map(self._line, found))
        else:
            from fanwise.cli._health_text import one_line

            lines = [one_line(one) for one in found if isinstance(one, health.Incident)]
            data = "".join(f"{line}\n" for line in lines).encode()
        if data:
            self._output.write(data)

    def _line(self, one: health.Told) -> bytes:
        if isinstance(one, health.Incident) and self._restricted:
            return _health_lines.incident(one, applies=self._following.applies(one))
        return _health_lines.line(one)

    def _sources(self, said: health.Sources) -> None:
        from fanwise.cli._health_text import sources

        bad = {name for name, state in said.sources.items() if state.state != "up"}
        for text in sources(said):
            click.echo(f"fanwise: {text}", err=True)
        for name in sorted(self._bad - bad):
            click.echo(f"fanwise: {name} is up again", err=True)
        self._bad = bad

    def stopped(self) -> None:
        if self._json:
            self._output.write(_health_lines.line(_health_lines.Stopped(len(self._ids))))


class _Stop:
    """What SIGINT and SIGTERM ask for: the first sets ``asked``, the second ends the process.

    They are handled and not blocked, as `watch` does it: the programs that rules name would inherit
    that, and could not be ended by SIGTERM. ``fd`` is readable after the first.
    """

    def __init__(self) -> None:
        self.asked = False
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        os.eventfd_write(self.fd, 1)


def _run(following: health.Follow, told: _Told, output: Output, signals: _Stop) -> int:
    while True:
        if signals.asked:
            told.news(following.finish())
            told.stopped()
            return Exit.OK
        found = following.read(0)
        if found:
            told.news(found)
            continue
        poll = select.poll()
        poll.register(signals.fd, select.POLLIN)
        poll.register(output.fd, 0)  # POLLERR, POLLHUP: its reader left
        for fd in following.filenos():
            poll.register(fd, select.POLLIN)
        for fd, event in poll.poll(following.pause() * 1000):
            if fd == output.fd and event & (select.POLLERR | select.POLLHUP):
                return Exit.OK


@click.command()
@click.argument("id")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def show(file: str | None, id: str, as_json: bool) -> int:
    """Print all that is known of the incident ID."""
    output = Output()
    found = health.look(settings=config.load(file).config.health, since=0.0)
    for entry in found.entries:
        if entry.incident.id == id:
            if as_json:
                output.write(_health_lines.incident(entry.incident, acked=entry.acked))
            else:
                from fanwise.cli._health_text import details

                output.write(details(entry).encode())
            return Exit.OK
    raise _no_such(id)


@click.command()
@click.argument("id")
@click.pass_obj
def ack(file: str | None, id: str) -> int:
    """Note that somebody has seen the incident ID; it stays open until it is resolved."""
    if not health.acknowledge(id, settings=config.load(file).config.health):
        raise _no_such(id)
    return Exit.OK


@click.command()
@click.argument("id")
@click.pass_obj
def resolve(file: str | None, id: str) -> int:
    """Note that the incident ID is over, where no counter or check tells: after xfs_repair."""
    if not health.resolve(id, settings=config.load(file).config.health):
        raise _no_such(id, "open incident")
    return Exit.OK


class NoSuchPath(NoSuchRoot):
    """There is no such path, so that nothing can be told of it."""

    exit_status = Exit.CANNOT_TELL


class NoSuchIncident(FanwiseError):
    """There is no incident of this id in the database."""

    exit_status = Exit.NO


def _no_such(id: str, what: str = "incident") -> NoSuchIncident:
    remedy = "fanwise health --since 1w lists those that there are"
    if id.startswith("live-"):
        remedy = "it is seen in counters and not stored yet: run fanwise health --follow"
    return NoSuchIncident(f"there is no {what} {id}", remedy)


def _time(text: str) -> float:
    if match := re.fullmatch(r"(\d{1,9})([smhdw])", text):
        return time.time() - int(match[1]) * _UNITS[match[2]]
    if re.fullmatch(r"\d{1,12}(\.\d+)?", text):
        return float(text)
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise click.UsageError(
            f"--since: {text!r} is no time: write 90m, 2h, 3d, or 2026-11-30T08:00"
        ) from None
