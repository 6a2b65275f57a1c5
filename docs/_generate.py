"""Write the parts of the pages that come from the program itself.

    .venv/bin/python docs/_generate.py

A page holds them between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``. They are kept in the
repository so that a page can be read without building anything; a test compares them.
"""

import importlib
import inspect
import pkgutil
import re
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click

import fanwise
from fanwise import Exit, Lifetime, config, lab
from fanwise.cli import _lab
from fanwise.cli._main import _group
from fanwise.lifetime import Steps
from fanwise.metrics.health import METRICS
from fanwise.watch._ladder import GUARANTEES

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # the bench is not installed

from bench import _page  # noqa: E402


def commands(context: click.Context | None = None) -> Iterator[click.Context]:
    """A context for every command, the outermost first."""
    if context is None:
        # The width does not depend on the terminal.
        context = click.Context(
            _group,
            info_name="fanwise",
            terminal_width=80,
            max_content_width=80,
            **_group.context_settings,
        )
    yield context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            assert command is not None
            yield from commands(click.Context(command, info_name=name, parent=context))


def lifetimes() -> dict[str, Lifetime | Steps]:
    """Every declared lifetime and protocol, by where it is declared."""
    found = {}
    modules = list(pkgutil.walk_packages(fanwise.__path__, "fanwise."))
    # Scenarios use the lifetimes of others: what is declared elsewhere is named there.
    for module in sorted(modules, key=lambda module: ".scenarios" in module.name):
        if module.name.endswith("__main__"):
            continue
        there = importlib.import_module(module.name)
        for name, value in vars(there).items():
            if not isinstance(value, Lifetime | Steps):
                continue
            # Not where it was only imported to, such as the scenarios of the lab.
            if re.search(
                rf"^{name}\b.*= (Lifetime|Steps)\(", inspect.getsource(there), re.MULTILINE
            ):
                found.setdefault(value, f"{module.name}.{name}")
    return {where: lifetime for lifetime, where in found.items()}


def render_help() -> str:
    parts = []
    for context in commands():
        path = context.command_path
        parts.append(f"### {path}\n\n```text\n{context.get_help().rstrip()}\n```\n")
    return "\n".join(parts)


def render_lifetimes() -> str:
    parts = []
    for where, lifetime in lifetimes().items():
        parts.append(f"## {lifetime.name}\n\nDeclared as `{where}`.\n")
        parts.append(lifetime.render_markdown())
        parts.append(f"```text\n{lifetime.render_mermaid()}```\n")
    return "\n".join(parts)


def render_variables() -> str:
    lines = ["| key | variable | default |", "|---|---|---|"]
    for section, struct in config._SECTIONS.items():
        for field in struct.__struct_fields__:
            variable = f"FANWISE_{section}_{field}".upper()
            default = getattr(struct(), field)
            shown = ", ".join(default) if isinstance(default, tuple) else str(default).lower()
            lines.append(f"| `{section}.{field}` | `{variable}` | {shown or 'none'} |")
    return "\n".join(lines) + "\n"


def render_default_file() -> str:
    return f"```toml\n{config.DEFAULT_FILE}```\n"


def render_statuses() -> str:
    said = {
        Exit.OK: "fine; also when the reader of the output went away",
        Exit.NO: "the answer is no: a path is not watchable",
        Exit.USAGE: "wrong usage, a wrong configuration included",
        Exit.CANNOT_TELL: "the question could not be answered",
        Exit.FAILED: "it was tried and failed",
    }
    lines = ["| status | name | meaning |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {s.value} | `{s.name}` | {said[s]} |" for s in Exit)]) + "\n"


def render_rungs() -> str:
    parts = []
    for rung, kept in GUARANTEES.items():
        rows = [f"| {name} | {text} |" for name, text in kept.items()]
        parts.append(
            "\n".join([f"### {rung}\n", "| about | what holds |", "|---|---|", *rows]) + "\n"
        )
    return "\n".join(parts)


def render_metrics() -> str:
    lines = ["| name | kind | labels | meaning |", "|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "none"
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(lines) + "\n"


def render_scenario(slug: str) -> str:
    """The page of a scenario: every design is explored, as `fanwise lab run` does."""
    scenario = lab.load(slug)
    results = {name: lab.explore(design) for name, design in scenario.designs.items()}
    failing = {
        name: lab.replay(scenario[name], result.schedule)
        for name, result in results.items()
        if result.schedule
    }
    return lab.scenario_markdown(scenario, results, failing)


def new_scenario() -> lab.Scenario:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "my_debate.py")
        path.write_text(lab.template("my_debate"))
        return lab.load_file(path)


def render_template() -> str:
    return f"```py\n{lab.template('my_debate')}```\n"


def render_run() -> str:
    lines = ["$ fanwise lab run --file my_debate.py\n"]
    for design in new_scenario().designs.values():
        lines.append(_lab._told(design, lab.explore(design), Path("my_debate.py")))
    return f"```text\n{''.join(lines)}```\n"


def render_replay() -> str:
    design = new_scenario()["look-then-take"]
    schedule = lab.explore(design).schedule
    chart = _lab._chart(design, lab.replay(design, schedule))
    command = f"$ fanwise lab replay --file my_debate.py {design.slug} {schedule} --chart"
    return f"```text\n{command}\n{chart}```\n"


BLOCKS = {
    "lab/new.md": {"template": render_template, "run": render_run, "replay": render_replay},
    **{f"lab/{slug}.md": {"scenario": partial(render_scenario, slug)} for slug in lab.names()},
    "guarantees.md": {"rungs": render_rungs},
    "cli.md": {"help": render_help, "statuses": render_statuses},
    "configuration.md": {"variables": render_variables, "default": render_default_file},
    "health.md": {"detect": lambda: _page.detect(_page.results())},
    "metrics.md": {"metrics": render_metrics},
    "lifetimes.md": {"lifetimes": render_lifetimes},
    "peers.md": {name: _page.block(name) for name in _page.BLOCKS},
}


def filled(page: str) -> str:
    """The text of a page, with its blocks as they should be."""
    text = (HERE / page).read_text()
    for name, render in BLOCKS[page].items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        block = f"{begin}\n{render()}\n{end}"
        text, count = pattern.subn(lambda _, block=block: block, text)
        assert count == 1, f"{page}: {count} blocks named {name}"
    return text


if __name__ == "__main__":
    for page in BLOCKS:
        (HERE / page).write_text(filled(page))
