"""CloudEvents 1.0 in structured JSON, and the signature of webhooks. No I/O.

Reference: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md and
https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md.
"""

import base64
import binascii
import datetime
import hashlib
import hmac
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import msgspec

TYPE = "io.fanwise.health.{}.v1"
CONTENT_TYPE = "application/cloudevents+json; charset=utf-8"
_LEAST_SECRET = 16  # bytes


def event(record: Mapping[str, Any], host: str) -> tuple[str, bytes]:
    """Return the id and the JSON of the event that tells of an incident's record.

    The id is that of the incident and a hash of the record: the same for each try and after a
    restart, another when the incident grew. What was suppressed or dropped before stands in the
    extension attributes ``fanwisesuppressed`` and ``fanwisedropped``.
    """
    data = {k: v for k, v in record.items() if k not in ("suppressed", "dropped")}
    canonical = msgspec.json.encode(data, order="deterministic")
    id_ = f"{data.get('id') or 'none'}.{hashlib.sha256(canonical).hexdigest()[:16]}"
    fs = data.get("fs") if isinstance(data.get("fs"), dict) else {}
    assert isinstance(fs, dict)
    uuid = fs.get("uuid") or fs.get("device") or "unknown"
    out: dict[str, Any] = {
        "specversion": "1.0",
        "id": id_,
        "source": f"/{quote(host, safe='')}/fs/{quote(str(uuid), safe='')}",
        "type": TYPE.format(data.get("type") or "incident"),
        "subject": _subject(data),
        "datacontenttype": "application/json",
        "data": data,
    }
    seen = data.get("last_seen")
    if isinstance(seen, int | float) and 0 <= seen < 1 << 37:
        when = datetime.datetime.fromtimestamp(seen, datetime.UTC)
        out["time"] = when.isoformat(timespec="microseconds").replace("+00:00", "Z")
    for name in ("suppressed", "dropped"):
        if record.get(name):
            out[f"fanwise{name}"] = min(int(record[name]), (1 << 31) - 1)  # 32 bits in the spec
    return id_, msgspec.json.encode(out)


def _subject(data: Mapping[str, Any]) -> str:
    what = data.get("object")
    if isinstance(what, dict):
        if what.get("path"):
            return str(what["path"])
        if what.get("ino") is not None:
            return f"ino:{what['ino']}"
    return str(data.get("scope") or "fs")


def secret(text: bytes) -> bytes:
    """Return the key that the content of a secret's file stands for.

    ``whsec_`` and base64, as Standard Webhooks has it, else the bytes as they are, without white
    space around them. Raises ValueError for one that is no such thing, or shorter than 16 bytes.
    """
    text = text.strip()
    if text.startswith(b"whsec_"):
        try:
            key = base64.b64decode(text[6:], validate=True)
        except binascii.Error as error:
            raise ValueError(f"what follows whsec_ is not base64: {error}") from error
    else:
        key = text
    if len(key) < _LEAST_SECRET:
        raise ValueError(f"it is shorter than {_LEAST_SECRET} bytes")
    return key


def headers(id_: str, when: int, body: bytes, keys: tuple[bytes, ...]) -> dict[str, str]:
    """Return the headers of one try: id, time (unix seconds), and a signature for each key."""
    out = {"webhook-id": id_, "webhook-timestamp": str(when)}
    if keys:
        signed = b".".join((id_.encode(), str(when).encode(), body))
        out["webhook-signature"] = " ".join(
            "v1," + base64.b64encode(hmac.digest(key, signed, "sha256")).decode() for key in keys
        )
    return out
