"""The metrics of health, declared once, and how they are filled from encoded records.

No label holds a path below a mount point, an inode, a pid or a message: those have no end. Counters
come from what is stored, so they go on after a restart.
"""

import bisect
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar

from fanwise.metrics.text import Histogram, Metric, Sample, Samples

K = TypeVar("K", bound=tuple[str, ...])

_FS = ("uuid", "device", "fstype")

ERRORS = Metric(
    "fanwise_fs_errors_total",
    "counter",
    "Errors of a filesystem, over all incidents there ever were.",
    (*_FS, "errno", "scope"),
)
WARNINGS = Metric(
    "fanwise_fs_warnings_total", "counter", "Warnings that a filesystem counted.", _FS
)
FIRST_ERROR = Metric(
    "fanwise_fs_first_error_timestamp_seconds",
    "gauge",
    "When the first error of the incidents that are open was seen.",
    _FS,
)
LAST_ERROR = Metric(
    "fanwise_fs_last_error_timestamp_seconds",
    "gauge",
    "When the last error of the incidents that are open was seen.",
    _FS,
)
OPEN = Metric("fanwise_fs_incidents_open", "gauge", "Incidents that are not resolved.", _FS)
WRITEBACK = Metric(
    "fanwise_fs_writeback_errors_total",
    "counter",
    "Write-back errors, of file data or of metadata.",
    ("device", "kind"),
)
DEVICE_ERRORS = Metric(
    "fanwise_fs_device_errors_total",
    "counter",
    "Errors that a filesystem counts for one of its devices, by type.",
    ("device", "type"),
)
STATE = Metric(
    "fanwise_fs_state", "gauge", "1 for the state that a filesystem is in.", (*_FS, "state")
)
INFO = Metric(
    "fanwise_fs_info",
    "gauge",
    "1; joins a filesystem to its mount points.",
    ("uuid", "device", "fstype", "mountpoint"),
)
SOURCE_UP = Metric(
    "fanwise_health_source_up", "gauge", "1 where a source of errors is read.", ("source",)
)
LOST = Metric(
    "fanwise_health_lost_records_total",
    "counter",
    "Records of a source that are known to be lost.",
    ("source",),
)
DELAY = Metric(
    "fanwise_health_event_delay_seconds",
    "histogram",
    "Time from a record's own time to the incident that tells of it.",
)
LISTENING = Metric(
    "fanwise_health_listening_until_timestamp_seconds",
    "gauge",
    "Until when a writer is known to have listened.",
)
ACTIONS = Metric(
    "fanwise_health_actions_total",
    "counter",
    "Records given to an action, by what became of them.",
    ("action", "result"),
)

METRICS = (
    ERRORS,
    WARNINGS,
    FIRST_ERROR,
    LAST_ERROR,
    OPEN,
    WRITEBACK,
    DEVICE_ERRORS,
    STATE,
    INFO,
    SOURCE_UP,
    LOST,
    DELAY,
    LISTENING,
    ACTIONS,
)
STATES = (
    "ok",
    "unknown",
    "warning",
    "read_only",
    "emergency_ro",
    "aborted",
    "shutdown",
    "hung",
)

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Total(Protocol):
    """Errors by errno and scope, as the incidents' database sums them up."""

    @property
    def uuid(self) -> str: ...  # noqa: D102
    @property
    def device(self) -> str: ...  # noqa: D102
    @property
    def fstype(self) -> str: ...  # noqa: D102
    @property
    def errno(self) -> str: ...  # noqa: D102
    @property
    def scope(self) -> str: ...  # noqa: D102
    @property
    def total(self) -> int: ...  # noqa: D102


class Delays:
    """The distribution of delays since the start; one owner."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one delay; a clock that went back makes it 0."""
        seconds = max(0.0, seconds)
        self._counts[bisect.bisect_left(BOUNDS, seconds)] += 1
        self._sum += seconds

    def taken(self) -> Histogram:
        """Return what was counted so far; it does not change any more."""
        return Histogram((), BOUNDS, tuple(self._counts), self._sum)


def samples(
    *,
    totals: Iterable[Total] = (),
    open_incidents: Iterable[Mapping[str, Any]] = (),
    filesystems: Iterable[Mapping[str, Any]] = (),
    warnings: Mapping[tuple[str, str, str], int] | None = None,
    writeback: Mapping[tuple[str, str], int] | None = None,
    device_errors: Mapping[tuple[str, str], int] | None = None,
    sources: Mapping[str, bool] | None = None,
    lost: Mapping[str, int] | None = None,
    delays: Delays | None = None,
    listening_until: float | None = None,
    actions: Mapping[str, Mapping[str, int]] | None = None,
) -> Samples:
    """Return the samples of all metrics, for `fanwise.metrics.text.render`.

    ``open_incidents`` are records. ``filesystems`` are mappings with ``uuid``, ``device``,
    ``fstype``, ``mounts`` and ``state``. ``warnings`` is by (uuid, device, fstype), ``writeback``
    by (device, ``data`` or ``metadata``), ``device_errors`` by (device, type), ``sources`` and
    ``lost`` by source, ``actions`` by action and result.
    """
    seen: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for record in open_incidents:
        seen.setdefault(_fs_labels(record.get("fs") or {}), []).append(record)
    known = {_fs_labels(fs): fs for fs in filesystems}
    return {
        ERRORS: [
            Sample((t.uuid, t.device, t.fstype, t.errno or "none", t.scope), t.total)
            for t in totals
        ],
        WARNINGS: _by_keys(warnings),
        FIRST_ERROR: [Sample(k, min(r["first_seen"] for r in v)) for k, v in seen.items()],
        LAST_ERROR: [Sample(k, max(r["last_seen"] for r in v)) for k, v in seen.items()],
        OPEN: [Sample(key, len(seen.get(key, ()))) for key in known | seen],
        WRITEBACK: _by_keys(writeback),
        DEVICE_ERRORS: _by_keys(device_errors),
        STATE: [
            Sample((*key, state), fs.get("state", "unknown") == state)
            for key, fs in known.items()
            for state in STATES
        ],
        INFO: [
            Sample((*key, str(mount)), 1)
            for key, fs in known.items()
            for mount in dict.fromkeys(fs.get("mounts") or ())
        ],
        SOURCE_UP: [Sample((name,), up) for name, up in (sources or {}).items()],
        LOST: [Sample((name,), count) for name, count in (lost or {}).items()],
        DELAY: [delays.taken()] if delays is not None else [],
        LISTENING: [Sample((), listening_until)] if listening_until is not None else [],
        ACTIONS: [
            Sample((action, result), count)
            for action, results in (actions or {}).items()
            for result, count in results.items()
        ],
    }


def _fs_labels(fs: Mapping[str, Any]) -> tuple[str, str, str]:
    uuid, device, fstype = (str(fs.get(name) or "") for name in _FS)
    return uuid, device, fstype


def _by_keys(values: Mapping[K, int] | None) -> list[Sample]:
    return [Sample(key, value) for key, value in (values or {}).items()]
