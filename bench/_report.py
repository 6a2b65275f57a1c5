"""Writes RESULTS.md and results.svg from what the questions found."""

from __future__ import annotations

import math
import statistics
from html import escape
from pathlib import Path
from typing import Any

Json = dict[str, Any]
VERDICT = {True: "yes", False: "**no**", None: "-"}


def line(row: Json) -> str:
    """One row for a terminal."""
    times = "" if row["ratio"] is None else f" = {row['ratio']:.3g}x"
    c = f" (C {row['c']}{times})" if row["c"] else times
    verdict = {True: "pass", False: "FAIL", None: "  - "}[row["pass"]]
    return f"{verdict}  {row['measure']}: {row['measured']}{c}; bar {row['bar']}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        for cells in (head, ["---"] * len(head), *rows)
    ]


def bars(results: Json) -> list[str]:
    rows = [
        [
            row["measure"],
            row["bar"],
            row["measured"],
            row["c"],
            "" if row["ratio"] is None else f"{row['ratio']:.2f}x",
            VERDICT[row["pass"]],
            row["note"],
        ]
        for answer in results.values()
        for row in answer["rows"]
    ]
    return table(["measure", "bar", "measured", "C reader", "ratio", "reached", "how"], rows)


# What the table of contenders shows of a question's runs: key, heading, format. A question may
# bring its own as `COLUMNS`; one that has none shows every figure of its runs.
COLUMNS: dict[str, list[tuple[str, str, str]]] = {
    "burst": [
        ("delivered", "facts delivered", ".2%"),
        ("named", "files named", ".2%"),
        ("survivors", "survivors named", ".2%"),
        ("loss", "loss", ""),
        ("cpu_s", "CPU s", ".2f"),
        ("cpu_s_per_million", "CPU s a million delivered facts", ".2f"),
        ("peak_mib", "peak MiB", ".1f"),
        ("ended", "ended", ""),
    ],
    "small_root": [("cost", "CPU s a million facts of the filesystem", ".3f")],
    "ready": [
        ("ready_s", "ready after s", ".3f"),
        ("cpu_s", "CPU s", ".2f"),
        ("kernel_mib", "kernel MiB kept when idle", ".2f"),
        ("heard", "then a change is delivered", ".0f"),
    ],
    "scan": [
        ("first_ms", "first change at depth 20, ms", ".2f"),
        ("cpu_s_per_100k", "CPU s per 100,000 directories", ".2f"),
        ("bytes_per_directory", "bytes a directory beyond its name", ".0f"),
    ],
    "ladder": [
        ("ready_cpu_s", "CPU s until ready", ".3f"),
        ("burst_cpu_s", "CPU s of the burst", ".3f"),
        ("delivered", "facts delivered", ".1%"),
        ("chain_files", "chains: files named", ".0f"),
        ("chain_directories", "chains: directories named", ".0f"),
    ],
    "races": [
        ("chain_files", "chains: files named", ".0f"),
        ("chain_directories", "chains: directories named", ".0f"),
        ("pairs_exact", "pairs: exact", ".0f"),
        ("pairs_wrong", "pairs: wrong path", ".0f"),
        ("pairs_none", "pairs: not named", ".0f"),
        ("moves_exact", "one directory: exact", ".0f"),
        ("moves_wrong", "one directory: wrong path", ".0f"),
        ("moves_none", "one directory: not named", ".0f"),
    ],
    "groups": [("us_per_event", "CPU us an event", ".2f")],
    "latency": [("median_ms", "median ms", ".3f"), ("p99_ms", "99 % ms", ".3f")],
    "health": [
        ("median_ms", "median ms", ".3f"),
        ("p99_ms", "99 % ms", ".3f"),
        ("cpu_s", "CPU s of the workload", ".3f"),
        ("wall_s", "wall s of the workload", ".2f"),
    ],
    "who": [
        ("named_share", "writers with name", ".2%"),
        ("exe_share", "with executable", ".2%"),
        ("user_share", "with user", ".2%"),
        ("who_wrong", "named wrong", ".0f"),
        ("us_each", "CPU us a writer", ".1f"),
        ("trace_lost", "trace records lost", ".0f"),
    ],
    "stuck_consumer": [
        ("peak_mib", "peak MiB", ".0f"),
        ("delivered", "delivered", ".0f"),
        ("lost", "reported lost", ".0f"),
        ("done", "done by the storm", ".0f"),
    ],
    "repair": [
        ("repair_cpu_s", "repair of everything, CPU s", ".2f"),
        ("partial_cpu_s", "repair of 1 %, CPU s", ".3f"),
        ("walk_cpu_s", "os.scandir + os.stat, CPU s", ".2f"),
        ("names_cpu_s", "os.scandir, CPU s", ".2f"),
        ("after_percent", "% of a core afterwards", ".2f"),
    ],
}


def columns_of(question: str, answer: Json) -> list[tuple[str, str, str]]:
    found = answer.get("columns") or COLUMNS.get(question)
    if found is None:
        keys = {
            key: None
            for runs in answer["runs"].values()
            for run in runs
            for key, value in run.items()
            if isinstance(value, (int, float))
        }
        found = [(key, key.replace("_", " "), ".4g") for key in keys]
    return [(key, head, style) for key, head, style in found]


def cell(runs: list[Json], key: str, style: str, spread: bool = False) -> str:
    """The median of a figure, with the least and the most if asked for; every text once."""
    values = [run[key] for run in runs if run.get(key) is not None]
    if not values:
        return ""
    texts = [value for value in values if isinstance(value, str)]
    if texts:
        return " / ".join(dict.fromkeys(texts))
    middle = format(statistics.median(values), style)
    low, high = format(min(values), style), format(max(values), style)
    return f"{middle} ({low} to {high})" if spread and low != high else middle


def contenders(question: str, answer: Json) -> list[str]:
    columns = columns_of(question, answer)
    rows = [
        [name, *(cell(runs, key, style) for key, _, style in columns)]
        for name, runs in answer["runs"].items()
    ]
    rows += [[name, why, *[""] * (len(columns) - 1)] for name, why in answer["missing"].items()]
    runs = max((len(r) for r in answer["runs"].values()), default=0)
    told = "single runs" if runs == 1 else f"medians of {runs}"
    text = [f"## {question}", ""]
    if answer.get("about"):
        text += [answer["about"], ""]
    text += [f"`{answer['command']}` on {answer['when']}, {told}.", ""]
    return [*text, *table(["watcher", *(head for _, head, _ in columns)], rows), ""]


def machines(results: Json) -> list[str]:
    """The machine and versions; once, unless the questions ran on different ones."""
    found: dict[str, list[str]] = {}
    for question, answer in results.items():
        text = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in answer["machine"].items())
        found.setdefault(text, []).append(question)
    if len(found) == 1:
        return [next(iter(found))]
    return [f"- {', '.join(questions)}: {text}" for text, questions in found.items()]


def markdown(results: Json) -> str:
    text = ["# Results", "", "Written by `python -m bench`; not to be edited.", ""]
    if any(answer["quick"] for answer in results.values()):
        text += [
            "**Some of these come from `--quick`: they try the bench, they measure nothing.**",
            "",
        ]
    load = ", ".join(f"{q} {a['load_at_start']}" for q, a in results.items())
    text += [*machines(results), "", f"Load average when each question began: {load}.", ""]
    text += ["The C reader is `bench/creader.c`, in the same run.", "", *bars(results), ""]
    text += [line for name in plots(results) for line in (f"![{Path(name).stem}]({name})", "")]
    for question, answer in results.items():
        text += contenders(question, answer)
    return "\n".join(text)


LEFT, WIDTH, STEP = 230, 400, 26


def _plot(height: int, title: str, parts: list[str]) -> str:
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="820" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="820" height="{height}" fill="#ffffff"/>',
        f'<text x="10" y="22" font-size="15">{escape(title)}</text>',
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def svg(chart: Json) -> str:
    """Horizontal bars; on a logarithmic scale where the contenders differ by hundreds.

    `chart`: `title`, `better` ("less" or "more"), `log`, `bars` of `name`, `value`, `label`, and
    `good`, False for one whose figure is not of the whole job.
    """
    bars = [bar for bar in chart["bars"] if bar["value"] > 0 or not chart["log"]]
    values = [bar["value"] for bar in bars] or [1.0]
    base = 50 + STEP * len(bars)
    parts = []
    if chart["log"]:
        low = math.floor(math.log10(min(values)))
        high = max(math.ceil(math.log10(max(values))), low + 1)
        marks = [10.0**power for power in range(low, high + 1)]
    else:
        marks = [max(values) * quarter / 4 for quarter in range(5)]

    def x(value: float) -> float:
        if chart["log"]:
            return LEFT + (math.log10(value) - low) / (high - low) * WIDTH
        return LEFT + (value / marks[-1] if marks[-1] else 0) * WIDTH

    for mark in marks:
        parts += [
            f'<line x1="{x(mark):.1f}" y1="40" x2="{x(mark):.1f}" y2="{base}" stroke="#cccccc"/>',
            f'<text x="{x(mark):.1f}" y="{base + 16}" text-anchor="middle">{mark:g}</text>',
        ]
    for number, bar in enumerate(bars):
        y = 46 + number * STEP
        parts += [
            f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(bar["name"])}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{max(x(bar["value"]) - LEFT, 1):.1f}" height="18" '
            f'fill="{"#4c72b0" if bar["good"] else "#c44e52"}"/>',
            f'<text x="{x(bar["value"]) + 6:.1f}" y="{y + 14}">{escape(bar["label"])}</text>',
        ]
    return _plot(base + 40, f"{chart['title']} ({chart['better']} is better)", parts)


def down(share: float, digits: int = 1) -> str:
    """A share as per cent, rounded down: 99.997 % is not all."""
    scale = 10**digits
    return f"{math.floor(share * 100 * scale + 1e-9) / scale:g} %"


def grid_svg(grid: Json) -> str:
    """A field for each contender and test: the share that was right."""
    tests, width = grid["tests"], 140
    parts = [
        f'<text x="{LEFT + number * width + 4}" y="44">{escape(test)}</text>'
        for number, test in enumerate(tests)
    ]
    for number, entry in enumerate(grid["rows"]):
        y = 54 + number * STEP
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(entry["name"])}</text>'
        )
        for place, share in enumerate(entry["shares"]):
            at, good = LEFT + place * width, share >= 1
            parts += [
                f'<rect x="{at}" y="{y}" width="{width - 6}" height="18" fill="#eeeeee"/>',
                f'<rect x="{at}" y="{y}" width="{share * (width - 6):.1f}" height="18" '
                f'fill="{"#4c72b0" if good else "#c44e52"}"/>',
                f'<text x="{at + width - 10}" y="{y + 14}" text-anchor="end" '
                f'fill="{"#ffffff" if good else "#000000"}">{down(share)}</text>',
            ]
    return _plot(70 + STEP * len(grid["rows"]), grid["title"], parts)


def plots(results: Json) -> dict[str, str]:
    """Every plot by the name of its file: `charts` and `grid` of the answers."""
    found = {}
    for question, answer in results.items():
        for name, chart in answer.get("charts", {}).items():
            if chart["bars"]:
                found[f"{question}-{name}.svg"] = svg(chart)
        if answer.get("grid", {}).get("rows"):
            found[f"{question}.svg"] = grid_svg(answer["grid"])
    return found


def write(results: Json, into: Path) -> None:
    (into / "RESULTS.md").write_text(markdown(results))
    for name, text in plots(results).items():
        (into / name).write_text(text)
