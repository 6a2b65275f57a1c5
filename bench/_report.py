"""Writes RESULTS.md and results.svg from what the questions found."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import Any

from bench._harness import median

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


# What the table of contenders shows of a question's runs: key, heading, format.
COLUMNS: dict[str, list[tuple[str, str, str]]] = {
    "burst": [
        ("delivered", "facts delivered", ".2%"),
        ("named", "files named", ".2%"),
        ("cpu_s", "CPU s", ".2f"),
        ("cpu_s_per_million", "CPU s a million delivered facts", ".2f"),
        ("peak_mib", "peak MiB", ".1f"),
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
}


def contenders(question: str, answer: Json) -> list[str]:
    columns = COLUMNS[question]
    rows = []
    for name, runs in answer["runs"].items():
        cells = [median(runs, key) for key, _, _ in columns]
        rows.append(
            [name]
            + [
                "" if cell is None else format(cell, style)
                for cell, (_, _, style) in zip(cells, columns, strict=True)
            ]
        )
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
    text += ["![burst](results.svg)", ""]
    for question, answer in results.items():
        text += contenders(question, answer)
    return "\n".join(text)


def svg(chart: Json) -> str:
    """Horizontal bars on a logarithmic scale: the contenders differ by hundreds."""
    found = chart["bars"]
    left, width, step = 130, 470, 26
    height = 60 + step * len(found) + 30
    values = [bar["value"] for bar in found] or [1.0]
    low = math.floor(math.log10(min(values)))
    high = max(math.ceil(math.log10(max(values))), low + 1)

    def x(value: float) -> float:
        return left + (math.log10(value) - low) / (high - low) * width

    base = 50 + step * len(found)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="820" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="820" height="{height}" fill="#ffffff"/>',
        f'<text x="10" y="22" font-size="15">{escape(chart["title"])} (less is better)</text>',
    ]
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts += [
            f'<line x1="{at:.1f}" y1="40" x2="{at:.1f}" y2="{base}" stroke="#cccccc"/>',
            f'<text x="{at:.1f}" y="{base + 16}" text-anchor="middle">{10.0**power:g}</text>',
        ]
    for number, bar in enumerate(found):
        y = 46 + number * step
        lost = bar["delivered"] < 1
        peak = f", {bar['peak_mib']:.0f} MiB" if bar.get("peak_mib") else ""
        # Rounded down: 99.997 % is not all.
        share = math.floor(bar["delivered"] * 1000) / 10
        label = f"{bar['value']:.3g} s, {share:g} % delivered{peak}"
        parts += [
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(bar["name"])}</text>',
            f'<rect x="{left}" y="{y}" width="{max(x(bar["value"]) - left, 1):.1f}" height="18" '
            f'fill="{"#c44e52" if lost else "#4c72b0"}"/>',
            f'<text x="{x(bar["value"]) + 6:.1f}" y="{y + 14}">{escape(label)}</text>',
        ]
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def write(results: Json, into: Path) -> None:
    (into / "RESULTS.md").write_text(markdown(results))
    chart = results.get("burst", {}).get("chart")
    if chart:
        (into / "results.svg").write_text(svg(chart))
