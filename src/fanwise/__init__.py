"""Filesystem notification for Linux without silent loss.

Names are loaded when they are first used: importing fanwise costs next to nothing.
"""

import sys
from importlib import import_module
from types import ModuleType

TYPE_CHECKING = False  # typing.TYPE_CHECKING without importing typing
if TYPE_CHECKING:
    from fanwise._errors import (
        AnswerRefused as AnswerRefused,
        BusyError as BusyError,
        ClosedError as ClosedError,
        ConfigError as ConfigError,
        DamagedStore as DamagedStore,
        DecodeError as DecodeError,
        Exit as Exit,
        FanwiseError as FanwiseError,
        FeatureMissing as FeatureMissing,
        FilesystemRefuses as FilesystemRefuses,
        ForeignFile as ForeignFile,
        LifetimeError as LifetimeError,
        LimitReached as LimitReached,
        MarkRefused as MarkRefused,
        NewerFormat as NewerFormat,
        NoRoom as NoRoom,
        NoSuchRoot as NoSuchRoot,
        NotWatchable as NotWatchable,
        PermissionNeeded as PermissionNeeded,
        StoreError as StoreError,
        StoreMissing as StoreMissing,
        SyscallBlocked as SyscallBlocked,
    )
    from fanwise.lifetime import Lifetime as Lifetime
    from fanwise.watch._awatch import AsyncWatch as AsyncWatch, awatch as awatch
    from fanwise.watch._capabilities import (
        Capabilities as Capabilities,
        Feature as Feature,
        capabilities as capabilities,
    )
    from fanwise.watch._change import Change as Change
    from fanwise.watch._identity import identity as identity
    from fanwise.watch._mounts import UnwatchedMount as UnwatchedMount
    from fanwise.watch._process import Process as Process
    from fanwise.watch._watch import Watch as Watch, WatchedRoot as WatchedRoot, watch as watch

__version__ = "0.1.0"

# Where each public name lives. A name is public when it stands here and in the block above.
_HOMES = {
    "AnswerRefused": "fanwise._errors",
    "AsyncWatch": "fanwise.watch._awatch",
    "BusyError": "fanwise._errors",
    "Capabilities": "fanwise.watch._capabilities",
    "Change": "fanwise.watch._change",
    "ClosedError": "fanwise._errors",
    "ConfigError": "fanwise._errors",
    "DamagedStore": "fanwise._errors",
    "DecodeError": "fanwise._errors",
    "Exit": "fanwise._errors",
    "FanwiseError": "fanwise._errors",
    "Feature": "fanwise.watch._capabilities",
    "FeatureMissing": "fanwise._errors",
    "FilesystemRefuses": "fanwise._errors",
    "ForeignFile": "fanwise._errors",
    "Lifetime": "fanwise.lifetime",
    "LifetimeError": "fanwise._errors",
    "LimitReached": "fanwise._errors",
    "MarkRefused": "fanwise._errors",
    "NewerFormat": "fanwise._errors",
    "NoRoom": "fanwise._errors",
    "NoSuchRoot": "fanwise._errors",
    "NotWatchable": "fanwise._errors",
    "PermissionNeeded": "fanwise._errors",
    "Process": "fanwise.watch._process",
    "StoreError": "fanwise._errors",
    "StoreMissing": "fanwise._errors",
    "SyscallBlocked": "fanwise._errors",
    "UnwatchedMount": "fanwise.watch._mounts",
    "Watch": "fanwise.watch._watch",
    "WatchedRoot": "fanwise.watch._watch",
    "awatch": "fanwise.watch._awatch",
    "capabilities": "fanwise.watch._capabilities",
    "identity": "fanwise.watch._identity",
    "watch": "fanwise.watch._watch",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name in ("health", "lab"):  # modules of their own, with names of their own
        return import_module(f"fanwise.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'fanwise' has no attribute {name!r}")
    # The one place where public names are made to say `fanwise` as their module. The errors come
    # with whatever is asked for first, because everything may raise them.
    for public, home in _HOMES.items():
        if public == name or home == "fanwise._errors":
            value = getattr(import_module(home), public)
            value.__module__ = "fanwise"
            globals()[public] = value
    return globals()[name]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


# When a sub-package is first loaded, the import system sets it as an attribute of fanwise. The
# package fanwise.watch would so hide the public function of the same name; public names win.
class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
