"""The configuration: one typed TOML file, below the environment, below the flags.

Every value remembers where it came from, and every mistake is a ConfigError that names the file,
the line, what is wrong and what to write instead. There is one file: the one that was asked for
(``--config`` or ``FANWISE_CONFIG``), else ``$XDG_CONFIG_HOME/fanwise/config.toml``, else
``/etc/fanwise/config.toml``, else none.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import msgspec

from fanwise._errors import ConfigError

Size = Annotated[int, msgspec.Meta(ge=64 << 10, le=1 << 40)]
"""A number of bytes; in TOML, in the environment and in flags also text such as "256MiB"."""

Kind = Literal[
    "created",
    "modified",
    "written",
    "attributes",
    "renamed",
    "deleted",
    "opened",
    "accessed",
    "executed",
    "mounted",
    "unmounted",
]
"""A kind of change that can be asked for. Losses are always told, so they are not among them."""


class Watch(msgspec.Struct, frozen=True, kw_only=True):
    """The section ``[watch]``."""

    queue: Size = 256 << 20
    exclude: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = (
        "created",
        "modified",
        "written",
        "attributes",
        "renamed",
        "deleted",
        "mounted",
        "unmounted",
    )
    pure: bool = False
    who: bool = False
    index: bool = False


Seconds = Annotated[float, msgspec.Meta(ge=0.1, le=86400)]
"""A time; in TOML, in the environment and in flags a number."""

Days = Annotated[int, msgspec.Meta(ge=1, le=36500)]
"""A number of days."""


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The section ``[health]``. A path that is empty is chosen, or is for what is not wanted."""

    state: str = ""
    second: str = ""
    only: tuple[str, ...] = ()
    memory: Size = 8 << 20
    counters: Seconds = 10.0
    probe: Seconds = 60.0
    tracefs: str = ""
    keep: Days = 90
    rules: str = ""
    metrics: str = ""
    textfile: str = ""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The whole configuration: one attribute a section."""

    watch: Watch = Watch()
    health: Health = Health()


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """What `load` found.

    ``origins`` says for every key, such as ``"watch.queue"``, where its value came from:
    ``"default"``, ``"FILE:LINE"``, ``"environment NAME"`` or ``"flag --name"``. ``file`` is the
    file that was read, or None.
    """

    config: Config
    origins: Mapping[str, str]
    file: Path | None


DEFAULT_FILE = """\
# The configuration of fanwise. Every value below is the default; environment variables
# (FANWISE_WATCH_QUEUE and so on) and flags go before this file.

[watch]
# Room for changes that nobody has read yet: bytes, or text such as "64MiB". At least 64 KiB. What
# does not fit is counted and told as lost.
queue = "256MiB"

# Globs of names that are not reported, such as ["*.tmp", ".git"].
exclude = []

# Kinds of change to report. Also: "opened", "accessed", "executed".
kinds = [
    "created", "modified", "written", "attributes", "renamed", "deleted", "mounted", "unmounted",
]

# Leave the native part aside and use pure Python. FANWISE_PURE=1 does the same.
pure = false

# Tell which process did each change: its name, executable, user and cgroup.
who = false

# Keep every name with its size and times, and tell after a loss what differs.
index = false

[health]
# Directory of the database of incidents. Empty: /var/lib/fanwise for root, else the user's own
# state directory.
state = ""

# The database to write to while the first one's filesystem is the one that fails. It should be on
# another device. Empty: one in /run/fanwise for root, else in XDG_RUNTIME_DIR.
second = ""

# Mount points of the filesystems that are listened to. Empty: all of this machine's devices.
only = []

# Room in memory for incidents when neither can be written to: bytes, or text such as "8MiB".
memory = "8MiB"

# Seconds between two readings of the counters, which are read after each error as well: some
# errors are counted and told by nothing.
counters = 10.0

# Seconds between two looks at each filesystem by a helper process, for what no file shows.
probe = 60.0

# Where tracefs is mounted. Empty: its first mount.
tracefs = ""

# Days for which incidents that are resolved are kept.
keep = 90

# File of rules: which incidents lead to which actions. Empty: none.
rules = ""

# Address on which metrics are served, such as "127.0.0.1:9899". Empty: none.
metrics = ""

# File to which metrics are written for node_exporter, in its textfile directory: NAME.prom.
textfile = ""
"""

_SECTIONS: dict[str, type[msgspec.Struct]] = {"watch": Watch, "health": Health}
_FIELDS = {
    f"{section}.{field.name}": field
    for section, struct in _SECTIONS.items()
    for field in msgspec.structs.fields(struct)
}
# Variables that do not follow the pattern FANWISE_SECTION_KEY; where both are set, that one wins.
_SHORT_NAMES = {"FANWISE_PURE": "watch.pure"}

_MOST_BYTES = 1 << 20  # of a file; /dev/zero is not read to its end
_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def load(
    file: str | os.PathLike[str] | None = None,
    *,
    flags: Mapping[str, object] = MappingProxyType({}),
    environ: Mapping[str, str] = os.environ,
) -> Loaded:
    """Read the configuration in effect: flags over environment over file over defaults.

    ``file`` is the file to read instead of looking for one. ``flags`` maps keys such as
    ``"watch.queue"`` to what was given on the command line; None means not given.

    Raises ConfigError for anything wrong in any of them, used or overridden.
    """
    path = find(file, environ)
    values: dict[str, object] = {}
    origins = dict.fromkeys(_FIELDS, "default")
    layers = [_from_file(path)] if path else []
    layers += [_from_environment(environ), _from_flags(flags)]
    for layer in layers:
        for key, (value, origin) in layer.items():
            values[key] = value
            origins[key] = origin
    sections: dict[str, dict[str, object]] = {section: {} for section in _SECTIONS}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections[section][name] = value
    return Loaded(config=msgspec.convert(sections, Config), origins=origins, file=path)


def find(
    file: str | os.PathLike[str] | None = None, environ: Mapping[str, str] = os.environ
) -> Path | None:
    """Return the file that `load` reads, or None when there is none.

    A file that was asked for is returned whether it exists or not.
    """
    asked = file or environ.get("FANWISE_CONFIG")
    if asked:
        return Path(asked)
    user = environ.get("XDG_CONFIG_HOME", "")
    # The XDG specification has relative paths ignored.
    base = Path(user) if user.startswith("/") else Path(environ.get("HOME", "/"), ".config")
    for path in (base / "fanwise/config.toml", Path("/etc/fanwise/config.toml")):
        if os.path.exists(path):  # Path.exists() raises where a directory may not be searched
            return path
    return None


def state_directory(environ: Mapping[str, str] = os.environ, *, root: bool | None = None) -> Path:
    """Return where state is kept: ``/var/lib/fanwise`` for root, else in the XDG state directory.

    ``root`` overrides the look at the effective user id. The directory may not exist yet.

    Raises ConfigError when a user has neither ``XDG_STATE_HOME`` nor ``HOME``.
    """
    if os.geteuid() == 0 if root is None else root:
        return Path("/var/lib/fanwise")
    user = environ.get("XDG_STATE_HOME", "")
    if user.startswith("/"):  # the XDG specification has relative paths ignored
        return Path(user, "fanwise")
    home = environ.get("HOME", "")
    if not home.startswith("/"):
        raise ConfigError("HOME", None, "not set to an absolute path", "set HOME or XDG_STATE_HOME")
    return Path(home, ".local/state/fanwise")


def check(file: str | os.PathLike[str]) -> None:
    """Read ``file`` alone, for its mistakes; raises ConfigError for the first."""
    _from_file(Path(file))


def read_toml(path: Path) -> tuple[str, dict[str, object]]:
    """Read a TOML file of at most 1 MiB: its text, and what it says.

    Raises ConfigError, with the line where there is one, for a file that cannot be read or is not
    TOML.
    """
    text = _read(path)
    try:
        return text, tomllib.loads(text)
    except RecursionError:
        raise ConfigError(path, None, "not TOML: nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, and what int() says of 5000 digits
        reason, line = _split_position(str(error), text)
        raise ConfigError(path, line, f"not TOML: {reason}") from error


# One layer: for each key that it sets, the valid value and its origin.
_Layer = dict[str, tuple[object, str]]


def _from_file(path: Path) -> _Layer:
    text, document = read_toml(path)
    layer: _Layer = {}
    for section, table in document.items():
        line = _line_of(text, section)
        if section not in _SECTIONS:
            raise ConfigError(
                path, line, f"unknown section {section!r}", nearest(section, _SECTIONS)
            )
        if not isinstance(table, dict):
            raise ConfigError(
                path, line, f"{section} is a section, not a value", f"write [{section}]"
            )
        names = [key.partition(".")[2] for key in _FIELDS if key.startswith(f"{section}.")]
        for name, value in table.items():
            line = _line_of(text, section, name)
            key = f"{section}.{name}"
            if key not in _FIELDS:
                raise ConfigError(
                    path, line, f"unknown key {name!r} in [{section}]", nearest(name, names)
                )
            layer[key] = (_valid(key, value, path, line), f"{path}:{line}" if line else f"{path}")
    return layer


def _from_environment(environ: Mapping[str, str]) -> _Layer:
    names = _SHORT_NAMES | {f"FANWISE_{key.upper().replace('.', '_')}": key for key in _FIELDS}
    ours = tuple(f"FANWISE_{section.upper()}_" for section in _SECTIONS)
    for name in environ:
        if name.startswith(ours) and name not in names:
            raise ConfigError(name, None, "unknown environment variable", nearest(name, names))
    layer: _Layer = {}
    for name, key in names.items():
        if name in environ:
            value = _from_text(key, environ[name], name)
            layer[key] = (_valid(key, value, name, None), f"environment {name}")
    return layer


def _from_flags(flags: Mapping[str, object]) -> _Layer:
    layer: _Layer = {}
    for key, value in flags.items():
        if value is not None:
            flag = "--" + key.partition(".")[2].replace("_", "-")
            layer[key] = (_valid(key, value, flag, None), f"flag {flag}")
    return layer


def _read(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(path, None, f"cannot be read: {error.strerror}") from error
    if len(data) > _MOST_BYTES:
        raise ConfigError(path, None, "larger than 1 MiB, so not a configuration file")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(path, line, "not UTF-8", "save the file as UTF-8") from error


# What an environment variable means: a boolean, a list with commas, or text (sizes are text).
def _from_text(key: str, text: str, name: str) -> object:
    kind = _FIELDS[key].type
    if kind is bool:
        words = {"1": True, "true": True, "0": False, "false": False}
        if text.lower() not in words:
            raise ConfigError(name, None, f"not a boolean: {text!r}", "write 1 or 0")
        return words[text.lower()]
    if kind in (Size, str):
        return text
    if kind in (Seconds, Days):
        try:
            return int(text) if kind == Days else float(text)
        except ValueError:
            raise ConfigError(name, None, f"not a number: {text!r}", "write a number") from None
    return [part.strip() for part in text.split(",") if part.strip()]


def _valid(key: str, value: object, source: str | os.PathLike[str], line: int | None) -> object:
    kind = _FIELDS[key].type
    remedy = None
    if kind == Size:
        remedy = 'write bytes or text such as "256MiB", from 64KiB to 1TiB'
        if isinstance(value, str):
            value = _size(key, value, source, line, remedy)
    if kind == tuple[Kind, ...] and isinstance(value, list | tuple):
        kinds = Kind.__args__  # type: ignore[attr-defined]
        for item in value:
            if isinstance(item, str) and item not in kinds:
                raise ConfigError(
                    source, line, f"{key}: unknown kind {item!r}", nearest(item.lower(), kinds)
                )
    if kind == Seconds and type(value) is int:
        value = float(value)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        reason = str(error)
        raise ConfigError(
            source, line, f"{key}: {reason[0].lower()}{reason[1:]}", remedy
        ) from error


def _size(
    key: str, text: str, source: str | os.PathLike[str], line: int | None, remedy: str
) -> int:
    match = re.fullmatch(r"([0-9]{1,15})\s*([A-Za-z]*)", text.strip())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(source, line, f"{key}: not a size: {text!r}", remedy)
    return int(match[1]) * _UNITS[match[2]]


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return the remedy for a word that is not valid: the nearest valid one, or all of them."""
    choices = list(valid)
    close = difflib.get_close_matches(word, choices, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid are: {', '.join(choices)}"


# tomllib has the position in its message only (attributes came with Python 3.14).
def _split_position(message: str, text: str) -> tuple[str, int | None]:
    if match := re.search(r" \(at line (\d+), column \d+\)$", message):
        return message[: match.start()], int(match[1])
    if match := re.search(r" \(at end of document\)$", message):
        return message[: match.start()], len(text.splitlines()) or 1
    return message, None


# The line of a section or of a key in it, by a scan that knows headers and keys and nothing of
# multi-line strings: it serves messages only. None when it was written in some rarer way.
def _line_of(text: str, section: str, name: str | None = None) -> int | None:
    header, found = "", None
    for number, line in enumerate(text.splitlines(), start=1):
        if match := re.match(r"\s*\[+([^\]]*)\]", line):
            header = _bare(match[1])
            key = header
        elif match := re.match(r"\s*([^=#]+?)\s*=", line):
            key = f"{header}.{_bare(match[1])}".lstrip(".")
        else:
            continue
        if name is not None and (
            key == f"{section}.{name}" or key.startswith(f"{section}.{name}.")
        ):
            return number
        if found is None and (key == section or key.startswith(f"{section}.")):
            found = number
    return found


def _bare(key: str) -> str:
    return re.sub(r"[\s\"']", "", key)
