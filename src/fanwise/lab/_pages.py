"""Pages for people: a schedule as a chart, designs and scenarios as Markdown."""

from collections.abc import Iterable, Mapping
from typing import Any

from fanwise.lifetime import Lifetime, Steps

from ._explore import replay
from ._follow import Followed
from ._result import Result
from ._scenario import Design, Scenario
from ._schedule import LETTERS

_WIDTH = 96


def chart(followed: Followed) -> str:
    """Return a schedule as a chart: a column for each task, time going down."""
    names = followed.names
    columns: list[list[str]] = [[name] for name in names]
    for told in followed.trace:
        columns[told.task].append(told.step)
    widths = [max(map(len, column)) for column in columns]
    while sum(widths) + 2 * len(widths) > _WIDTH and max(widths) > 16:
        widths[widths.index(max(widths))] -= 1
    rows: list[list[str]] = [names, ["-" * width for width in widths]]
    for told in followed.trace:
        for part in _wrapped(told.step, widths[told.task]):
            row = [""] * len(names)
            row[told.task] = part
            rows.append(row)
    return "".join(_row(row, widths) for row in rows)


def tasks(design: Design) -> list[str]:
    """Return the tasks that a design begins with: the letter in schedules, and the name."""
    names = replay(design, "").names
    return [f"{LETTERS[at]} {name}" for at, name in enumerate(names)]


def design_markdown(design: Design) -> str:
    """Return what a design declares: its states and steps, as tables and as diagrams."""
    parts = [f"# {design.name}\n\n{design.title}\n", f"Tasks: {', '.join(tasks(design))}.\n"]
    parts += [_lifetime(lifetime) for lifetime in design.lifetimes]
    if not design.lifetimes:
        parts.append("It declares no lifetimes.\n")
    return "\n".join(parts)


def scenario_markdown(
    scenario: Scenario, results: Mapping[str, Result], failing: Mapping[str, Followed]
) -> str:
    """Return a page on a scenario: the debate, the verdicts, what breaks, the lifetimes.

    ``results`` are by design, and so are ``failing``, the schedules that break one.
    """
    parts = [f"# {scenario.title}\n", scenario.text.strip() + "\n", "## What is checked\n"]
    parts.append(_properties(scenario, results.values()))
    parts.append("## Verdicts\n")
    bounds = {result.bounds.preemptions for result in results.values()}
    most = max((bound for bound in bounds if bound is not None), default=0)
    parts.append(
        f"Every schedule of up to {most} preemptions was covered, or one that breaks was found.\n"
    )
    lines = ["| design | what it is | verdict | breaks | schedule |", "|---|---|---|---|---|"]
    for slug, result in results.items():
        broken = f"`{result.property}`" if result.property else ""
        schedule = f"`{result.schedule}`" if result.schedule else ""
        title = scenario[slug].title
        lines.append(f"| `{slug}` | {title} | {result.verdict} | {broken} | {schedule} |")
    parts.append("\n".join(lines) + "\n")
    parts.append(_figures(results))
    for slug, followed in failing.items():
        design = scenario[slug]
        drawn = f"```text\n{chart(followed)}```\n"
        told = [f"breaks `{results[slug].property}`", *_parts(results[slug].seen)]
        outcome = "\n".join(f"- {part}" for part in told)
        parts.append(f"### How {slug} breaks\n\n{design.title}\n\n{drawn}\n{outcome}\n")
        command = f"fanwise lab replay {design.name} {results[slug].schedule}"
        parts.append(f"```text\n{command}\n```\n")
    parts.append("## States and transitions\n")
    lifetimes = {
        lifetime: None for design in scenario.designs.values() for lifetime in design.lifetimes
    }
    parts += [_lifetime(lifetime, level=3) for lifetime in lifetimes]
    return "\n".join(part for part in parts if part)


def _parts(seen: str | None) -> list[str]:
    return seen.split("; ") if seen else []


def _properties(scenario: Scenario, results: Iterable[Result]) -> str:
    used = dict(scenario.properties)
    for result in results:
        if result.property is not None:
            used.setdefault(result.property, scenario[result.design].sentence(result.property))
    return "\n".join(f"- `{slug}`: {sentence}" for slug, sentence in used.items()) + "\n"


def _figures(results: Mapping[str, Result]) -> str:
    names = list(dict.fromkeys(name for r in results.values() for name in r.counts))
    places = list(dict.fromkeys(place for r in results.values() for place in r.cases))
    if not names and not places:
        return ""
    heads = [*names, *(f"special cases in {place}" for place in places)]
    lines = [f"| design | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for slug, result in results.items():
        cells = []
        for name in names:
            span = result.counts.get(name)
            cells.append(_span(span) if span else "")
        for place in places:
            cases = result.cases.get(place, [])
            cells.append(f"{len(cases)}" + (f": {', '.join(cases)}" if cases else ""))
        lines.append(f"| `{slug}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _span(span: tuple[int, int]) -> str:
    least, most = span
    return str(least) if least == most else f"{least} to {most}"


def _lifetime(lifetime: Lifetime[Any] | Steps, level: int = 2) -> str:
    head = "#" * level
    table, diagram = lifetime.render_markdown(), lifetime.render_mermaid()
    return f"{head} {lifetime.name}\n\n{table}\n```text\n{diagram}```\n"


def _row(cells: list[str], widths: list[int]) -> str:
    text = "  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"{text.rstrip()}\n"


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
