"""The record of an incident, as it is stored: what makes two of them one, and what both say.

A record is a mapping with the fields of the JSON form, its times unix seconds.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

Record = Mapping[str, Any]

# What names an object and does not make it another one.
_NAMES = ("path", "path_b64", "path_source", "paths")


class Fs(msgspec.Struct):
    """What of a filesystem makes a key."""

    uuid: str | None = None
    fstype: str | None = None
    device: Any = None


class Head(msgspec.Struct):
    """What a record must have, typed."""

    fs: Fs
    scope: str
    errno: str | None
    first_seen: float
    last_seen: float
    total: int
    id: str | None = None
    object: dict[str, Any] | None = None
    status: str = "open"
    resolved: str | None = None
    merged_into: str | None = None


class Key(msgspec.Struct, frozen=True):
    """What makes two records one incident.

    ``fs`` is UUID and device: two clones with one UUID are two filesystems. ``object`` is what
    names the object but for its path, which may come later.
    """

    fs: str
    scope: str
    object: str
    errno: str


def key_of(record: Record) -> Key:
    """Return the key of a record. Raises ValueError for what is not the record of an incident."""
    return key_for(head_of(record))


def head_of(record: Record) -> Head:
    """Return what must be in it. Raises ValueError for what is not the record of an incident."""
    try:
        head = msgspec.convert(record, Head)
    except msgspec.ValidationError as error:
        raise ValueError(f"not the record of an incident: {error}") from error
    if head.total < 0:
        raise ValueError("not the record of an incident: its total is negative")
    return head


def key_for(head: Head) -> Key:
    """Return the key of a record, given its head."""
    names = {
        name: value
        for name, value in (head.object or {}).items()
        if name not in _NAMES and value is not None
    }
    text = ",".join(f"{name}={names[name]}" for name in sorted(names))
    return Key(f"{head.fs.uuid or ''} {device_of(head)}", head.scope, text, head.errno or "")


def device_of(head: Head) -> str:
    """Return the device that a record names, "" for none."""
    device = head.fs.device
    if isinstance(device, dict):
        device = device.get("name") or device.get("dev")
    return "" if device is None else str(device)


def merge(old: Record, new: Record) -> dict[str, Any]:
    """Return what is known when ``new`` is told of the incident that ``old`` describes.

    The first time and the first error stay, what was unknown is filled in. What can change (state,
    mounts, advice, ...) and the counts are those of the higher ``revision``, since what was counted
    in one incident may turn out to be another's. Without one, or with the same, it is the record
    last seen, and counts do not fall.
    """
    before, after = (record.get("revision") or 0 for record in (old, new))
    ordered = old.get("id") == new.get("id") and before and after and before != after
    newer = after > before if ordered else new["last_seen"] >= old["last_seen"]
    early, late = (old, new) if newer else (new, old)
    out = {**early, **{name: value for name, value in late.items() if value is not None}}
    out["id"] = old.get("id")
    # The first error: where it was, what it hit, who tripped over it.
    first = old if old["first_seen"] <= new["first_seen"] else new
    other = new if first is old else old
    for name in ("object", "location", "operation", "process"):
        out[name] = _filled(first.get(name), other.get(name))
    out["first_seen"] = min(old["first_seen"], new["first_seen"])
    out["last_seen"] = max(old["last_seen"], new["last_seen"])
    for name in ("total", "lost"):
        out[name] = max(one.get(name) or 0 for one in ((late,) if ordered else (old, new)))
    channels = list(old.get("channels") or ())
    out["channels"] = channels + [x for x in new.get("channels") or () if x not in channels]
    return out


# What is known stays; only what is not is taken from the other. Parts of two different errors
# (the line of one, the function of the other) never mix.
def _filled(first: Any, other: Any) -> Any:
    if not isinstance(first, Mapping) or not isinstance(other, Mapping):
        return other if first is None else first
    out = dict(first)
    same = all(
        first[name] == other[name]
        for name in first.keys() & other.keys()
        if first[name] is not None and other[name] is not None and name not in _NAMES
    )
    if same:
        completes = not out.get("paths") and out.get("path") is None
        completes = completes and bool(other.get("path") or other.get("paths"))
        for name, value in other.items():
            if out.get(name) is None or (completes and name in ("path_source", "paths")):
                out[name] = value
    return out
