"""The tables of docs/peers.md, made from results.json; docs/_generate.py puts them there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import _report
from bench._harness import CONTENDERS, HERE, PEERS

Json = dict[str, Any]
# What the page shows of each question, and what the command line is. More is in RESULTS.md.
SHOWN = {
    "burst": ("delivered", "survivors", "loss", "cpu_s", "cpu_s_per_million", "peak_mib", "ended"),
    "ready": ("ready_s", "cpu_s", "kernel_mib", "heard"),
    "latency": ("median_ms", "p99_ms"),
}
PLACE = re.compile(r"/(?:home|root|tmp|work|Users|nix)/[^\s'\"]*")


def results() -> Json:
    """The figures that were kept; none before the bench ran here."""
    kept = HERE / "results.json"
    found: Json = json.loads(kept.read_text()) if kept.exists() else {}
    return found


def not_measured(question: str) -> str:
    return f"Not measured yet: `python -m bench {question}`.\n"


def short(why: str) -> str:
    """The gist of why there is no figure: the last sentence, without the places of a machine."""
    text = PLACE.sub("...", " ".join(why.split()))
    return text if len(text) <= 200 else f"... {text[-200:].partition(' ')[2]}"


def versions(results: Json) -> str:
    rows = []
    for name in PEERS:
        contender = CONTENDERS[name]
        kind, _, package = contender.package.partition(":")
        found = {a["machine"].get(name) for a in results.values()} - {None}
        source = {"pypi": "PyPI", "debian": "Debian"}[kind]
        # A question without peers may have been asked where none is installed.
        said = ", ".join(sorted(found - {"not installed"} or found)) or "not measured yet"
        rows.append([name, f"{source} `{package}`", said, contender.how])
    return (
        "\n".join(_report.table(["peer", "package", "version", "what of it is used"], rows)) + "\n"
    )


def machine(results: Json) -> str:
    """What it ran on, without what the peers are: that is another table."""
    rows, seen = [], {}
    for question, answer in results.items():
        parts = {k: v for k, v in answer["machine"].items() if k not in PEERS}
        # The release of a kernel can have a name of its builder in it: its version is enough.
        parts["kernel"] = str(parts.get("kernel", "unknown")).partition("-")[0]
        text = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in parts.items())
        seen.setdefault(text, []).append(question)
        turns = max((len(runs) for runs in answer["runs"].values()), default=0)
        took = answer.get("took_s")
        rows.append(
            [
                question,
                f"`{answer['command']}`",
                answer["when"],
                str(turns),
                str(answer["load_at_start"]),
                "" if took is None else f"{took:.0f} s",
            ]
        )
    if not rows:
        return "Nothing is measured yet: `make bench`.\n"
    text = [f"{', '.join(questions)}: {about}.\n" for about, questions in seen.items()]
    if any(answer["quick"] for answer in results.values()):
        text.append("**Some of this comes from `--quick`, which measures nothing.**\n")
    head = ["question", "command", "when", "runs", "load average at its start", "took"]
    return "\n".join([*text, *_report.table(head, rows)]) + "\n"


def question(name: str) -> Callable[[Json], str]:
    """Render one question: medians, in brackets the least and the most of the runs."""

    def render(results: Json) -> str:
        answer = results.get(name)
        if not answer:
            return not_measured(name)
        columns = _report.columns_of(name, answer)
        columns = [c for c in columns if c[0] in SHOWN.get(name, (c[0],))]
        rows = [
            [who, *(_report.cell(runs, key, style, spread=True) for key, _, style in columns)]
            for who, runs in answer["runs"].items()
        ]
        empty = [""] * (len(columns) - 1)
        rows += [[who, short(why), *empty] for who, why in answer["missing"].items()]
        rows = [[short(cell) for cell in cells] for cells in rows]
        text = _report.table(["watcher", *(head for _, head, _ in columns)], rows)
        for file in _report.plots({name: answer}):
            text += ["", f"![{Path(file).stem}](../bench/{file})"]
        return "\n".join(text) + "\n"

    return render


def detect(results: Json) -> str:
    """Who tells what of each fault: a row for each fault, because there are more of these."""
    answer = results.get("detect")
    if not answer:
        return not_measured("detect")
    told = {name: runs[0] for name, runs in answer["runs"].items()}
    rows = [
        [heading, *(texts.get(key, "") for texts in told.values())]
        for key, heading, _ in _report.columns_of("detect", answer)
    ]
    rows += [[name, short(why), *[""] * (len(told) - 1)] for name, why in answer["missing"].items()]
    said = f"`{answer['command']}` on {answer['when']}.\n"
    return "\n".join([said, *_report.table(["fault", *told], rows)]) + "\n"


BLOCKS: dict[str, Callable[[Json], str]] = {
    "versions": versions,
    "machine": machine,
    **{name: question(name) for name in ("burst", "correctness", "ready", "latency")},
}


def block(name: str) -> Callable[[], str]:
    """One block of the page, from what is kept in this repository."""
    return lambda: BLOCKS[name](results())
