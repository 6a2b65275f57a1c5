"""The lines of ``fanwise watch --json``: one object a line, each with its ``type``.

The structs are the published schema. Changes are not built from them but encoded as they come,
a batch at a time, because that is where the time goes; a test checks that both agree.
"""

import base64
import os
from collections.abc import Sequence
from operator import attrgetter
from typing import Literal

import msgspec

from fanwise import Change, Process, WatchedRoot


class Root(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A watched path, as resolved, what serves it, and its filesystem's type."""

    path: str
    rung: str
    fstype: str


class Ready(msgspec.Struct, frozen=True, tag="ready", forbid_unknown_fields=True):
    """Every mark is set: no change is missed from here on. ``v`` is the version of all lines."""

    v: Literal[1]
    roots: tuple[Root, ...]


class Scanned(msgspec.Struct, frozen=True, tag="scanned", forbid_unknown_fields=True):
    """Every directory below the roots is known; told again after a loss."""

    directories: int


class ChangeLine(
    msgspec.Struct,
    frozen=True,
    tag="change",
    omit_defaults=True,
    forbid_unknown_fields=True,
    rename={"is_dir": "dir"},
):
    """One change. The optional fields are there only when set; see `fanwise.Change`.

    ``path_b64`` and ``old_path_b64`` are there when the name is not UTF-8: they hold its bytes, and
    the path beside them is for reading only.
    """

    kinds: tuple[str, ...]
    path: str
    old_path: str | None
    is_dir: bool
    pid: int
    identity: str | None
    time: float
    path_source: Literal["exact", "current", "unknown"]
    replaced: str | None = None
    unlinked: bool = False
    exists: bool | None = None
    correction: bool = False
    path_b64: str | None = None
    old_path_b64: str | None = None
    process: Process | None = None
    inferred: bool = False


class Lost(msgspec.Struct, frozen=True, tag="lost", omit_defaults=True, forbid_unknown_fields=True):
    """Changes below ``roots`` were lost: ``count`` records, or null when nobody counted.

    ``baseline``, with --index, is there when that was before ``scanned``: what changed in
    directories that had not been listed by then is not told.
    """

    roots: tuple[str, ...]
    count: int | None
    source: Literal["ring", "kernel", "stopped"]
    baseline: Literal["incomplete"] | None = None


class Relisted(
    msgspec.Struct, frozen=True, tag="relisted", omit_defaults=True, forbid_unknown_fields=True
):
    """After a loss, one directory that it hit.

    ``names`` are all names in it, a directory's with a slash at the end. What was believed below
    any other name there is gone.

    ``path_b64`` and ``names_b64`` (all of them, in the same order) are there when they are not
    UTF-8: they hold the bytes.
    """

    path: str
    names: tuple[str, ...]
    path_source: Literal["exact", "current", "unknown"]
    path_b64: str | None = None
    names_b64: tuple[str, ...] | None = None


class Repaired(
    msgspec.Struct, frozen=True, tag="repaired", omit_defaults=True, forbid_unknown_fields=True
):
    """Every directory that a loss hit was told: ``changes`` is how many changes that took.

    ``baseline`` as in ``lost``.
    """

    roots: tuple[str, ...]
    changes: int
    baseline: Literal["incomplete"] | None = None


class Stopped(msgspec.Struct, frozen=True, tag="stopped", forbid_unknown_fields=True):
    """The end: how many changes were told, how many records lost (null: not all were counted)."""

    changes: int
    lost: int | None


Line = Ready | Scanned | ChangeLine | Lost | Relisted | Repaired | Stopped

_encoder = msgspec.json.Encoder()
_roots_of = attrgetter("roots")  # set in what tells a loss or of its repair, and only there


def schema() -> bytes:
    """Return the JSON schema of a line."""
    (line,), components = msgspec.json.schema_components([Line])
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "a line of fanwise watch --json",
        **line,
        "$defs": components,
    }
    return msgspec.json.format(_encoder.encode(document)) + b"\n"


def ready(roots: Sequence[WatchedRoot]) -> bytes:
    """Encode the first line."""
    shown = tuple(Root(_readable(path), rung, fstype) for path, rung, fstype in roots)
    # The version comes first, before whoever reads it has to understand anything else.
    return _encoder.encode({"v": 1} | msgspec.to_builtins(Ready(1, shown))) + b"\n"


def line(value: Line) -> bytes:
    """Encode one line."""
    return _encoder.encode(value) + b"\n"


def has_loss(changes: Sequence[Change]) -> bool:
    """Say whether some of these tell a loss, or of its repair."""
    return any(map(_roots_of, changes))


def changes_to_lines(changes: Sequence[Change]) -> bytes:
    """Encode a batch; a name that is not UTF-8 costs its batch time and no line."""
    if not has_loss(changes):
        try:
            return _encoder.encode_lines(changes)
        except UnicodeEncodeError:
            pass  # each by itself
    return b"".join(map(_one, changes))


def _one(change: Change) -> bytes:
    if change.source is not None:
        roots = tuple(map(_readable, change.roots or ()))
        return line(Lost(roots, change.count, change.source, change.baseline))  # type: ignore[arg-type]
    if change.names is not None:
        return line(_relisted(change))
    if change.kinds == ("repaired",):
        roots = tuple(map(_readable, change.roots or ()))
        return line(Repaired(roots, change.count or 0, change.baseline))  # type: ignore[arg-type]
    try:
        return _encoder.encode(change) + b"\n"
    except UnicodeEncodeError:
        pass
    fields = msgspec.structs.asdict(change)
    for name in ("roots", "count", "source", "names", "baseline"):  # of losses only
        del fields[name]
    for name in ("path", "old_path"):
        text = fields[name]
        if text is not None and _readable(text) != text:
            fields[name] = _readable(text)
            fields[f"{name}_b64"] = _b64(text)
    if change.process is not None:
        shown = msgspec.structs.asdict(change.process)
        readable = {key: text and _readable(text) for key, text in shown.items()}
        fields["process"] = msgspec.convert(readable, Process)
    return line(ChangeLine(**fields))


def _relisted(change: Change) -> Relisted:
    names = change.names or ()
    readable = tuple(map(_readable, names))
    path = _readable(change.path)
    return Relisted(
        path,
        readable,
        change.path_source,  # type: ignore[arg-type]
        _b64(change.path) if path != change.path else None,
        tuple(map(_b64, names)) if readable != names else None,
    )


def _b64(text: str) -> str:
    return base64.b64encode(os.fsencode(text)).decode()


# Names that are not UTF-8 come with surrogates, which JSON cannot carry.
def _readable(path: str) -> str:
    return os.fsencode(path).decode(errors="replace")
