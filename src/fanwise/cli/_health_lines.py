"""The lines of ``fanwise health --json``: one object a line, each with its ``type``.

The structs are the published schema. ``v`` is the version of all lines; it stands in the first.
"""

from collections.abc import Mapping
from typing import Literal

import msgspec

from fanwise.health import (
    FilesystemState,
    Incident,
    Sources,
    SourceState,
    Writer,
)


class Ready(msgspec.Struct, frozen=True, tag="ready", tag_field="type"):
    """Every filesystem is marked: no error is missed from here on that a source shows.

    ``writer`` is the process that listens where this one only reads its database, else null.
    """

    v: Literal[1]
    sources: Mapping[str, SourceState]
    writer: Writer | None


class IncidentLine(Incident, frozen=True, kw_only=True, tag="incident", tag_field="type"):
    """An incident; see `fanwise.health.Incident`.

    ``applies`` is there when PATHs were given: "object", "fs" (it is about the whole filesystem),
    "unknown" (its path is not known) or "elsewhere" (it was unknown, and is of none of them).
    ``acked`` is when an operator saw it.
    """

    applies: Literal["object", "fs", "unknown", "elsewhere"] | msgspec.UnsetType = msgspec.UNSET
    acked: float | msgspec.UnsetType | None = msgspec.UNSET


class Stopped(msgspec.Struct, frozen=True, tag="stopped", tag_field="type"):
    """The end: how many incidents were told, each counted once."""

    incidents: int


Line = Ready | FilesystemState | IncidentLine | Sources | Stopped

_encoder = msgspec.json.Encoder()


def schema() -> bytes:
    """Return the JSON schema of a line."""
    (line,), components = msgspec.json.schema_components([Line])
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "a line of fanwise health --json",
        **line,
        "$defs": components,
    }
    return msgspec.json.format(_encoder.encode(document)) + b"\n"


def ready(sources: Mapping[str, SourceState], writer: Writer | None) -> bytes:
    """Encode the first line."""
    return line(Ready(1, sources, writer))


def line(value: Ready | FilesystemState | Incident | Sources | Stopped) -> bytes:
    """Encode one line."""
    return _encoder.encode(value) + b"\n"


def incident(value: Incident, **extra: object) -> bytes:
    """Encode an incident, with what is only known of it here."""
    return _encoder.encode({**msgspec.to_builtins(value), **extra}) + b"\n"
