"""The errors of fanwise, and the statuses with which its commands exit.

    FanwiseError               everything below; has a reason, a remedy and an exit status
    ├── ConfigError            a configuration file, variable or flag is wrong
    ├── NotWatchable           this path cannot be watched, because ...
    │   ├── NoSuchRoot         ... it does not exist
    │   ├── PermissionNeeded   ... a capability is missing
    │   ├── SyscallBlocked     ... a seccomp filter refuses the system call
    │   ├── FeatureMissing     ... this kernel cannot do it
    │   ├── FilesystemRefuses  ... this filesystem cannot do it
    │   └── LimitReached       ... a limit of the kernel is used up
    ├── MarkRefused            a group cannot have this mark, because ...
    ├── AnswerRefused          an answer to a permission event cannot be taken, because ...
    ├── StoreError             a database cannot be used, because ...
    │   ├── StoreMissing       ... there is none yet
    │   ├── ForeignFile        ... its file is not one of fanwise's, or others may change it
    │   ├── NewerFormat        ... a newer fanwise wrote it
    │   ├── DamagedStore       ... its file is damaged
    │   └── NoRoom             ... its filesystem is full, read-only or refuses
    ├── ClosedError            used after it was closed
    ├── BusyError              a second consumer where there can be one
    ├── DecodeError            bytes from the kernel that make no sense
    └── LifetimeError          a transition that the object's lifetime does not declare

An error that began as an OSError keeps it as ``__cause__``, with its errno.
"""

import enum
import os


class Exit(enum.IntEnum):
    """The exit statuses of every fanwise command."""

    OK = 0  # fine; also when the reader of the output went away
    NO = 1  # the answer is no: not watchable, an incident is open, a property breaks
    USAGE = 2  # wrong usage, a wrong configuration included
    CANNOT_TELL = 3  # the question could not be answered
    FAILED = 4  # it was tried and failed


class FanwiseError(Exception):
    """The base of every error that fanwise raises on purpose.

    ``reason`` says what is wrong and ``remedy`` what to do about it (None when nothing can be
    done); ``str()`` is both on one line. ``exit_status`` is what a command ends with.
    """

    exit_status: Exit = Exit.FAILED

    def __init__(self, reason: str, remedy: str | None = None) -> None:
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        text = self._where() + self.reason
        return _one_line(f"{text}; {self.remedy}" if self.remedy else text)

    # What stands before the reason: a path, a position. Ends with ": ".
    def _where(self) -> str:
        return ""


class ConfigError(FanwiseError):
    """The configuration is wrong.

    ``path`` is the file, or the name of the environment variable or flag; ``line`` counts from 1
    and is None when there is no line to name.
    """

    exit_status = Exit.USAGE

    def __init__(
        self, path: str | os.PathLike[str], line: int | None, reason: str, remedy: str | None = None
    ) -> None:
        super().__init__(reason, remedy)
        self.path = os.fspath(path)
        self.line = line
        self.args = (self.path, line, reason, remedy)  # what unpickling calls it with

    def _where(self) -> str:
        path = _shown(self.path)
        return f"{path}: " if self.line is None else f"{path}:{self.line}: "


class NotWatchable(FanwiseError):
    """``path`` cannot be watched; the subclass says what stands in the way."""

    exit_status = Exit.NO

    def __init__(
        self,
        path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
        reason: str,
        remedy: str | None = None,
    ) -> None:
        super().__init__(reason, remedy)
        self.path = os.fsdecode(path)
        self.args = (self.path, reason, remedy)

    def _where(self) -> str:
        return f"{_shown(self.path)}: "


class NoSuchRoot(NotWatchable):
    """The path to watch does not exist."""


class PermissionNeeded(NotWatchable):
    """The process lacks a capability; the reason names it."""


class SyscallBlocked(NotWatchable):
    """A seccomp filter refuses the system call; the reason names it."""


class FeatureMissing(NotWatchable):
    """The running kernel lacks a feature; the reason names it."""


class FilesystemRefuses(NotWatchable):
    """The filesystem of the path does not support what was asked."""


class LimitReached(NotWatchable):
    """A limit of the kernel is used up; ``sysctl`` is the dotted name of the one to raise."""

    def __init__(
        self,
        path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
        sysctl: str,
        reason: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(
            path,
            reason or f"the kernel's limit {sysctl} is reached",
            remedy or f"raise it with: sysctl -w {sysctl}=NUMBER",
        )
        self.sysctl = sysctl
        self.args = (self.path, sysctl, self.reason, self.remedy)


class MarkRefused(FanwiseError):
    """A group of `fanwise.notify` cannot have this mark, or not so; the reason says why."""


class AnswerRefused(FanwiseError):
    """An answer to a permission event of `fanwise.notify` cannot be taken; the reason says why.

    Nothing has changed: an event that waited still waits.
    """


class StoreError(FanwiseError):
    """A database cannot be used; ``path`` is its file, the subclass says what stands in the way."""

    def __init__(
        self, path: str | os.PathLike[str], reason: str, remedy: str | None = None
    ) -> None:
        super().__init__(reason, remedy)
        self.path = os.fspath(path)
        self.args = (self.path, reason, remedy)

    def _where(self) -> str:
        return f"{_shown(self.path)}: "


class StoreMissing(StoreError):
    """There is no database yet: nobody ever wrote one."""


class ForeignFile(StoreError):
    """The file is not a database of this kind, or others than its owner may change it."""


class NewerFormat(StoreError):
    """A newer fanwise wrote the database; this one would misread it."""


class DamagedStore(StoreError):
    """The bytes of the database are damaged."""


class NoRoom(StoreError):
    """The filesystem of the database is full, read-only, or refuses to write for another reason."""


class ClosedError(FanwiseError):
    """The object was used after it was closed."""


class BusyError(FanwiseError):
    """A second consumer asked for something that has exactly one, such as a watch's changes."""


class DecodeError(FanwiseError):
    """Bytes from the kernel are malformed at ``offset``, in bytes from the buffer's start."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(reason)
        self.offset = offset
        self.args = (offset, reason)

    def _where(self) -> str:
        return f"byte {self.offset}: "


class LifetimeError(FanwiseError):
    """An object was asked for a transition that its lifetime does not declare, or broke a rule."""


# A path or a text from outside may hold anything, line feeds and escape sequences included, and
# must not forge a second line on a terminal or in a log.
def _shown(path: str) -> str:
    return path if path.isprintable() else repr(path)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
