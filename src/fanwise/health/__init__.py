"""Health: whether a filesystem breaks, which file, since when, and which code found it.

    from fanwise import health

    with health.Follow() as incidents:
        for told in incidents:
            ...                             # health.Incident, or health.Sources

    report = health.look("/srv")            # once, without listening

    with health.writeback_errors("/srv/db") as errors:  # of one's own files, without fsync
        for error in errors:
            ...                             # health.WritebackError

Names are loaded when they are first used.
"""

from importlib import import_module

TYPE_CHECKING = False  # typing.TYPE_CHECKING without importing typing
if TYPE_CHECKING:
    from fanwise.health._doctor import Channel as Channel, channels as channels
    from fanwise.health._engine import Sources as Sources
    from fanwise.health._follow import (
        Follow as Follow,
        Told as Told,
        Writer as Writer,
    )
    from fanwise.health._incident import (
        Filesystem as Filesystem,
        Incident as Incident,
        Location as Location,
        Object as Object,
        TrippedBy as TrippedBy,
    )
    from fanwise.health._look import (
        Entry as Entry,
        FilesystemState as FilesystemState,
        Report as Report,
        acknowledge as acknowledge,
        look as look,
        resolve as resolve,
    )
    from fanwise.health._writeback import (
        WritebackError as WritebackError,
        WritebackErrors as WritebackErrors,
        writeback_errors as writeback_errors,
    )
    from fanwise.sources.state import SourceState as SourceState

# Where each public name lives. A name is public when it stands here and in the block above.
_HOMES = {
    "Channel": "fanwise.health._doctor",
    "Entry": "fanwise.health._look",
    "Filesystem": "fanwise.health._incident",
    "FilesystemState": "fanwise.health._look",
    "Follow": "fanwise.health._follow",
    "Incident": "fanwise.health._incident",
    "Location": "fanwise.health._incident",
    "Object": "fanwise.health._incident",
    "Report": "fanwise.health._look",
    "SourceState": "fanwise.sources.state",
    "Sources": "fanwise.health._engine",
    "Told": "fanwise.health._follow",
    "TrippedBy": "fanwise.health._incident",
    "Writer": "fanwise.health._follow",
    "acknowledge": "fanwise.health._look",
    "channels": "fanwise.health._doctor",
    "look": "fanwise.health._look",
    "WritebackError": "fanwise.health._writeback",
    "WritebackErrors": "fanwise.health._writeback",
    "resolve": "fanwise.health._look",
    "writeback_errors": "fanwise.health._writeback",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fanwise.health' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
