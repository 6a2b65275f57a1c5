"""``fanwise lab``: designs as models, explored, replayed and shown."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec
from click.core import ParameterSource

from fanwise import Exit, FanwiseError
from fanwise.cli._output import Output
from fanwise.lab import (
    BOUND,
    Design,
    Followed,
    ModelError,
    Pct,
    Result,
    Scenario,
    WrongSchedule,
    chart,
    design_markdown,
    draw,
    explore,
    load,
    load_file,
    names,
    replay,
    replayed,
    sample,
    summary,
    tasks,
    tell,
    template,
)

_file = click.option(
    "--file", type=click.Path(path_type=Path), metavar="FILE", help="Take the scenario from FILE."
)


@click.group(no_args_is_help=True)
def command() -> None:
    """Run design debates as models: every interleaving, or the one that breaks.

    A scenario is a debate, with the designs that were proposed and the properties that they are
    judged by. TARGET is SCENARIO or SCENARIO/DESIGN; with --file it may be left out, or be the name
    of a design alone.
    """


@command.command("list")
@_file
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each design.")
def list_(file: Path | None, as_json: bool) -> int:
    """List the scenarios and their designs."""
    output = Output()
    for scenario in [load(slug) for slug in names()] if file is None else [_scenario(file)]:
        if as_json:
            for design in scenario.designs.values():
                row = {"scenario": scenario.slug, "design": design.slug, "title": design.title}
                output.write(msgspec.json.encode(row) + b"\n")
            continue
        wide = max(map(len, scenario.designs))
        lines = [f"{scenario.slug}: {scenario.title}"]
        lines += [f"  {d.slug:{wide}}  {d.title}" for d in scenario.designs.values()]
        output.write(("\n".join(lines) + "\n\n").encode())
    return Exit.OK


@command.command()
@click.argument("targets", nargs=-1, metavar="[TARGET...]")
@_file
@click.option(
    "--bound",
    type=click.IntRange(0),
    default=BOUND,
    show_default=True,
    metavar="N",
    help="Cover every schedule of up to N preemptions.",
)
@click.option("--unbounded", is_flag=True, help="Cover every schedule: of what is small.")
@click.option(
    "--random", type=click.IntRange(1), metavar="N", help="Run N random schedules instead."
)
@click.option(
    "--pct", type=click.IntRange(1), metavar="N", help="Run N schedules by random priorities."
)
@click.option(
    "--seed", type=int, default=0, show_default=True, metavar="N", help="Where random begins."
)
@click.option("--seconds", type=float, metavar="S", help="Spend at most S seconds on a design.")
@click.option(
    "--plain", is_flag=True, help="Leave nothing out, also where a state was seen before."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each design.")
def run(
    targets: tuple[str, ...],
    file: Path | None,
    bound: int,
    unbounded: bool,
    random: int | None,
    pct: int | None,
    seed: int,
    seconds: float | None,
    plain: bool,
    as_json: bool,
) -> int:
    """Explore designs and say whether they hold: those of each TARGET, or all.

    "holds" means that every schedule within the bounds was covered. A design that breaks is told
    with the property, what was seen, and a schedule that replays it. "sampled" means that nothing
    broke in the schedules that were run, and that there are others.

    The status is 1 when a design breaks, and 3 when one could not be covered.
    """
    if random is not None and pct is not None:
        raise click.UsageError("--random and --pct exclude each other.")
    bounded = click.get_current_context().get_parameter_source("bound") != ParameterSource.DEFAULT
    if unbounded and (bounded or random is not None or pct is not None):
        raise click.UsageError("--unbounded excludes --bound, --random and --pct.")
    output = Output()
    status = Exit.OK
    most = None if unbounded else bound
    for design in _designs(targets, file):
        with _named(design):
            if random is not None:
                result = sample(design, random, seed=seed)
            elif pct is not None:
                result = sample(design, scheduler=Pct(pct, seed=seed))
            else:
                result = explore(design, bound=most, reduce=not plain, seconds=seconds)
        text = f"{result.json()}\n" if as_json else _told(design, result, file)
        output.write(text.encode())
        status = max(status, _status(result, random is not None or pct is not None))
    return status


# Of several designs it is this one whose model is wrong.
@contextmanager
def _named(design: Design) -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{design.name}: {error.reason}", error.remedy) from error


def _told(design: Design, result: Result, file: Path | None) -> str:
    text = summary(result)
    if result.schedule:
        target = design.name if file is None else f"--file {file} {design.slug}"
        text += f"  fanwise lab replay {target} {result.schedule}\n"
    return text


# A design that breaks is worse than one that nobody can tell of.
def _status(result: Result, asked_to_sample: bool) -> Exit:
    if result.verdict == "breaks":
        return Exit.NO
    return Exit.OK if result.verdict == "holds" or asked_to_sample else Exit.CANNOT_TELL


@command.command("replay")
@click.argument("target", metavar="TARGET")
@click.argument("schedule", metavar="SCHEDULE")
@_file
@click.option("--chart", "as_chart", is_flag=True, help="Print a chart: a column for each task.")
@click.option("--mermaid", is_flag=True, help="Print a Mermaid sequence diagram.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print a JSON object for each step, and one for the whole as run does.",
)
def replay_(
    target: str, schedule: str, file: Path | None, as_chart: bool, mermaid: bool, as_json: bool
) -> int:
    """Run one SCHEDULE of SCENARIO/DESIGN, step by step, and say what breaks and where.

    A schedule is letters of tasks, in the order in which the design makes them, each with a number
    of steps: A3B1A2. The status is 1 when a property breaks.
    """
    if as_chart + mermaid + as_json > 1:
        raise click.UsageError("--chart, --mermaid and --json exclude each other.")
    design = _one(target, file)
    followed = _followed(design, schedule)
    broken = followed.broken
    if as_json:
        encode = msgspec.json.encode
        lines = [
            encode(
                {
                    "step": at,
                    "task": followed.names[told.task],
                    "does": told.step,
                    "notes": told.notes,
                }
            )
            for at, told in enumerate(followed.trace, start=1)
        ]
        text = b"\n".join([*lines, replayed(design, followed).json().encode(), b""])
    else:
        text = (_chart if as_chart else draw if mermaid else tell)(design, followed).encode()
    Output().write(text)
    return Exit.NO if broken else Exit.OK


def _followed(design: Design, schedule: str) -> Followed:
    try:
        with _named(design):
            return replay(design, schedule)
    except WrongSchedule as error:
        remedy = f"{error.remedy}; tasks: {', '.join(tasks(design))}"
        raise WrongSchedule(error.reason, remedy) from error


def _chart(design: Design, followed: Followed) -> str:
    steps = 1 + sum(1 + len(told.notes) for told in followed.trace)
    outcome = tell(design, followed).splitlines(keepends=True)[steps:]
    return f"{chart(followed)}\n{''.join(outcome)}"


@command.command()
@click.argument("target", metavar="[TARGET]", required=False)
@_file
def show(target: str | None, file: Path | None) -> int:
    """Show a design's states and transitions, as table and diagram; or a scenario's debate."""
    if target is None and file is None:
        raise click.UsageError("Name a SCENARIO or SCENARIO/DESIGN, or a --file.")
    designs = _designs((target,) if target else (), file)
    if (target and "/" in target) or len(designs) == 1:
        with _named(designs[0]):
            text = design_markdown(designs[0])
    else:
        scenario = designs[0].scenario
        lines = [f"# {scenario.title}", scenario.text.strip(), "## What is checked"]
        lines.append("\n".join(f"- {slug}: {says}" for slug, says in scenario.properties.items()))
        lines.append("## Designs")
        lines.append("\n".join(f"- {d.slug}: {d.title}" for d in designs))
        text = "\n\n".join(lines) + "\n"
    Output().write(text.encode())
    return Exit.OK


@command.command()
@click.argument("name", metavar="NAME")
def new(name: str) -> int:
    """Write NAME.py here: a small scenario that runs, to be made yours."""
    module = name.removesuffix(".py").replace("-", "_")
    if not module.isidentifier():
        raise click.UsageError(f"{name!r} is no name for a Python module.")
    path = Path(f"{module}.py")
    try:
        with path.open("x") as file:
            file.write(template(module))
    except FileExistsError as error:
        raise FanwiseError(f"{path} is there already", "choose another name") from error
    except OSError as error:
        raise FanwiseError(f"{path} cannot be written: {error.strerror}") from error
    Output().write(f"wrote {path}; next: fanwise lab run --file {path}\n".encode())
    return Exit.OK


def _designs(targets: tuple[str, ...], file: Path | None) -> list[Design]:
    if file is None:
        for target in targets:
            if target.endswith(".py"):
                raise click.UsageError(f"A scenario in a file is named by --file {target}.")
        wanted = [(load(target.partition("/")[0]), target) for target in targets or names()]
    else:
        scenario = _scenario(file)
        wanted = [(scenario, target) for target in targets or (scenario.slug,)]
    return [design for scenario, target in wanted for design in _of(scenario, target)]


# What a file raises when it is run is its author's to mend: told with the line, not as our crash.
def _scenario(file: Path) -> Scenario:
    try:
        return load_file(file)
    except FanwiseError:
        raise
    except Exception as error:
        inside = [
            entry.lineno
            for entry in traceback.extract_tb(error.__traceback__)
            if Path(entry.filename) == file.absolute()
        ]
        line = error.lineno if isinstance(error, SyntaxError) else inside[-1] if inside else None
        where = f"{file}:{line}" if line is not None else str(file)
        raise FanwiseError(f"{where}: {type(error).__name__}: {error}") from error


def _of(scenario: Scenario, target: str) -> list[Design]:
    slug, slash, design = target.partition("/")
    if slash and slug == scenario.slug:
        return [scenario[design]]
    if target == scenario.slug:
        return list(scenario.designs.values())
    return [scenario[target]]  # with --file, a design alone


def _one(target: str, file: Path | None) -> Design:
    designs = _designs((target,), file)
    if len(designs) != 1:
        raise click.UsageError(f"{target} has {len(designs)} designs; name one: SCENARIO/DESIGN.")
    return designs[0]
