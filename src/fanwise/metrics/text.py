"""The Prometheus text format, version 0.0.4. No I/O.

Reference: https://github.com/prometheus/docs, exposition formats.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Kind = Literal["counter", "gauge", "histogram"]

_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


class Metric(msgspec.Struct, frozen=True):
    """The declaration of one metric: its name, kind, help, and the names of its labels."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (self.name, *self.labels):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name in Prometheus")
        if (self.kind == "counter") != self.name.endswith("_total"):
            raise ValueError(f"{self.name}: counters, and only they, end in _total")


class Sample(msgspec.Struct, frozen=True):
    """One value, with one text for each label of its metric."""

    labels: tuple[str, ...]
    value: float


class Histogram(msgspec.Struct, frozen=True):
    """One distribution: how many were at most each bound, their number and their sum."""

    labels: tuple[str, ...]
    bounds: tuple[float, ...]
    counts: tuple[int, ...]  # one a bound, not cumulative, and one for what is larger
    sum: float


Samples = Mapping[Metric, Iterable[Sample | Histogram]]


def render(samples: Samples) -> bytes:
    """Return the text of these metrics, in their order.

    Raises ValueError for a sample whose labels are not those declared, or that is there twice.
    """
    lines: list[str] = []
    for metric, values in samples.items():
        rows: dict[tuple[str, ...], Sample | Histogram] = {}
        for value in values:
            if len(value.labels) != len(metric.labels):
                raise ValueError(f"{metric.name} has the labels {metric.labels}")
            if value.labels in rows:
                raise ValueError(f"{metric.name}{value.labels} is there twice")
            rows[value.labels] = value
        if not rows:
            continue
        lines.append(f"# HELP {metric.name} {_escaped(metric.help, quotes=False)}")
        lines.append(f"# TYPE {metric.name} {metric.kind}")
        for value in rows.values():
            pairs = dict(zip(metric.labels, value.labels, strict=True))
            if isinstance(value, Sample):
                lines.append(f"{metric.name}{_labels(pairs)} {_number(value.value)}")
            else:
                lines += _histogram(metric.name, pairs, value)
    return "".join(f"{line}\n" for line in lines).encode()


def _histogram(name: str, pairs: Mapping[str, str], value: Histogram) -> list[str]:
    lines, total = [], 0
    for bound, count in zip((*value.bounds, math.inf), value.counts, strict=True):
        total += count
        lines.append(f"{name}_bucket{_labels({**pairs, 'le': _number(bound)})} {total}")
    lines.append(f"{name}_sum{_labels(pairs)} {_number(value.sum)}")
    lines.append(f"{name}_count{_labels(pairs)} {total}")
    return lines


def _labels(pairs: Mapping[str, str]) -> str:
    inside = ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs.items())
    return f"{{{inside}}}" if inside else ""


# The format knows three escapes; a surrogate (a name that is not UTF-8) has no place in UTF-8.
def _escaped(text: str, *, quotes: bool = True) -> str:
    text = text.encode(errors="surrogateescape").decode(errors="replace")
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if math.isnan(value):
        return "NaN"
    return str(int(value)) if value == int(value) and abs(value) < 1 << 63 else repr(float(value))
