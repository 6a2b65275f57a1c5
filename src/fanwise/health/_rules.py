"""Rules: which incidents lead to which actions. Typed tables, no expression language.

    [action.page]
    kind = "webhook"
    url = "https://hooks.example/fanwise"
    secret_file = "/etc/fanwise/hook.secret"
    rate = 0.1

    [[rule]]
    name = "data is going"
    actions = ["page"]
    match.errno = ["EIO", "EBADMSG"]
    match.fs.mounts = ["/srv", "/srv/**"]
    match.total_at_least = 10

Every key of ``match`` must hold; a list holds when any of its members does. A file with a mistake
is refused as a whole, with line, reason and remedy.
"""

import errno as errnos
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec

from fanwise._errors import ConfigError
from fanwise.config import nearest, read_toml
from fanwise.health._incident import SEVERITY, Scope
from fanwise.health._observe import Channel
from fanwise.names.globs import translate
from fanwise.sinks.webhook import read_secret, wrong_url

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
Globs = Text | Annotated[tuple[Text, ...], msgspec.Meta(min_length=1, max_length=1000)]
Words = Globs
Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]

SCOPES, STATES, CHANNELS = get_args(Scope), tuple(SEVERITY), get_args(Channel)
ERRNOS = tuple(sorted(errnos.errorcode.values()))
_MOST_REMEMBERED = 10_000  # incidents for which a rule with ``once`` was carried out


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file: a key that is not among its fields is a mistake."""


class FsMatch(Strict, frozen=True, kw_only=True):
    """``match.fs``: globs over what names the filesystem; ``mounts`` holds for any mount point."""

    uuid: Globs | None = None
    fstype: Globs | None = None
    label: Globs | None = None
    device: Globs | None = None
    mounts: Globs | None = None


class ObjectMatch(Strict, frozen=True, kw_only=True):
    """``match.object``: ``path`` holds only where the path is known."""

    ino: Count | None = None
    path: Globs | None = None


class LocationMatch(Strict, frozen=True, kw_only=True):
    """``match.location``: where in the kernel the error was found."""

    function: Globs | None = None
    symbol: Globs | None = None
    kernel: Globs | None = None


class ProcessMatch(Strict, frozen=True, kw_only=True):
    """``match.process``: who tripped over it."""

    comm: Globs | None = None


class Match(Strict, frozen=True, kw_only=True):
    """``match``: what an incident must look like."""

    fs: FsMatch = FsMatch()
    object: ObjectMatch = ObjectMatch()
    location: LocationMatch = LocationMatch()
    process: ProcessMatch = ProcessMatch()
    scope: Words | None = None
    errno: Words | None = None
    state: Words | None = None
    channels: Words | None = None
    operation: Globs | None = None
    count_at_least: Count | None = None
    total_at_least: Count | None = None
    lost_at_least: Count | None = None


class Rule(Strict, frozen=True, kw_only=True):
    """``[[rule]]``: its actions are carried out whenever an incident that matches is told.

    ``once`` has them carried out once for each incident while this process runs.
    """

    name: Name
    actions: Annotated[tuple[Name, ...], msgspec.Meta(min_length=1, max_length=100)]
    match: Match = Match()
    once: bool = False


class Action(Strict, frozen=True, kw_only=True):
    """What every action has: at most ``rate`` a second in the long run, ``burst`` at once."""

    rate: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 0.1
    burst: Annotated[int, msgspec.Meta(ge=1, le=10000)] = 10
    queue: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 256


class ExecAction(Action, frozen=True, kw_only=True):
    """``kind = "exec"``: a program, its arguments, and how many seconds it may take."""

    kind: Literal["exec"]
    program: Text
    arguments: tuple[str, ...] = ()
    limit: Seconds = 30.0


class WebhookAction(Action, frozen=True, kw_only=True):
    """``kind = "webhook"``: where a CloudEvent is posted to, and how patiently."""

    kind: Literal["webhook"]
    url: Text
    secret_file: Text | None = None
    ca_file: Text | None = None
    connect: Seconds = 5.0
    limit: Seconds = 10.0
    tries: Annotated[int, msgspec.Meta(ge=1, le=100)] = 8
    backoff: Seconds = 1.0


class LogAction(Action, frozen=True, kw_only=True):
    """``kind = "log"``: a file to which JSON lines are appended."""

    kind: Literal["log"]
    file: Text
    rate: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 10.0
    burst: Annotated[int, msgspec.Meta(ge=1, le=10000)] = 1000


_KINDS: dict[str, type[Action]] = {
    "exec": ExecAction,
    "webhook": WebhookAction,
    "log": LogAction,
}
# Fields whose words are known, and what they are.
_KNOWN = {"scope": SCOPES, "errno": ERRNOS, "state": STATES, "channels": CHANNELS}

T = TypeVar("T", bound=msgspec.Struct)
Test = Callable[[Mapping[str, Any]], bool]


class Rules:
    """The rules of one file, ready to be asked; ``actions`` are those that any rule names."""

    def __init__(self, rules: Sequence[Rule], actions: Mapping[str, Action]) -> None:
        self.rules = tuple(rules)
        self.actions = dict(actions)
        self._tests = [_tests(rule.match) for rule in rules]
        self._told: OrderedDict[tuple[str, object], None] = OrderedDict()

    def actions_for(self, record: Mapping[str, Any]) -> list[str]:
        """Return the names of the actions for this record, each once, in the rules' order."""
        out: dict[str, None] = {}
        for rule, tests in zip(self.rules, self._tests, strict=True):
            if all(test(record) for test in tests) and not (
                rule.once and self._again(rule.name, record.get("id"))
            ):
                out.update(dict.fromkeys(rule.actions))
        return list(out)

    def _again(self, rule: str, id_: object) -> bool:
        key = rule, id_
        if key in self._told:
            self._told.move_to_end(key)
            return True
        self._told[key] = None
        if len(self._told) > _MOST_REMEMBERED:
            self._told.popitem(last=False)
        return False


def load(file: str | os.PathLike[str]) -> Rules:
    """Read a file of rules, and check all that can be checked before an incident happens.

    Raises ConfigError with file, line, reason and remedy for the first mistake.
    """
    path = Path(file)
    text, document = read_toml(path)
    _Loader(path, text).owner()
    return _Loader(path, text).load(document)


class _Loader:
    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._lines = _Lines(text)

    # Root carries out what the file says: nobody else may write it.
    def owner(self) -> None:
        there = self._path.stat()
        if there.st_uid not in (0, os.geteuid()):
            raise ConfigError(
                self._path, None, f"belongs to user {there.st_uid}", "make it your own"
            )
        if there.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigError(self._path, None, "others may write it", f"chmod go-w {self._path}")

    def load(self, document: Mapping[str, object]) -> Rules:
        for key in document:
            if key not in ("rule", "action"):
                raise self._wrong(
                    (key,), f"unknown section {key!r}", nearest(key, ("rule", "action"))
                )
        tables = document.get("action", {})
        if not isinstance(tables, dict):
            raise self._wrong(("action",), "action is a table", "write [action.NAME]")
        actions = {name: self._action(name, table) for name, table in tables.items()}
        listed = document.get("rule", [])
        if not isinstance(listed, list):
            raise self._wrong(("rule",), "rule is a list of tables", "write [[rule]]")
        rules: list[Rule] = []
        for number, table in enumerate(listed):
            rule = self._rule(number, table, actions)
            if rule.name in {other.name for other in rules}:
                raise self._wrong(
                    ("rule", number, "name"),
                    f"two rules are named {rule.name!r}",
                    "give each a name of its own",
                )
            rules.append(rule)
        used = {name for rule in rules for name in rule.actions}
        for name in actions:
            if name not in used:
                raise self._wrong(
                    ("action", name), f"no rule uses the action {name!r}", "remove it"
                )
        return Rules(rules, actions)

    def _action(self, name: str, table: object) -> Action:
        where = ("action", name)
        if not isinstance(table, dict):
            raise self._wrong(where, f"the action {name!r} is a table", f"write [action.{name}]")
        kind = table.get("kind")
        if not isinstance(kind, str) or kind not in _KINDS:
            reason = "has no kind" if kind is None else f"has an unknown kind {kind!r}"
            raise self._wrong(
                (*where, "kind"), f"the action {name!r} {reason}", nearest(str(kind), _KINDS)
            )
        action = self._typed(where, table, _KINDS[kind])
        if isinstance(action, ExecAction):
            self._program((*where, "program"), action.program)
            for argument in action.arguments:
                if "\0" in argument:
                    raise self._wrong((*where, "arguments"), "an argument has a NUL", "remove it")
        elif isinstance(action, WebhookAction):
            self._webhook(where, action)
        elif isinstance(action, LogAction):
            self._absolute((*where, "file"), action.file)
            if not os.path.isdir(os.path.dirname(action.file)):
                raise self._wrong(
                    (*where, "file"), f"{action.file}: its directory is not there", "make it"
                )
        return action

    def _absolute(self, where: tuple[str | int, ...], path: str) -> None:
        if not path.startswith("/") or "\0" in path:
            raise self._wrong(where, f"{path!r} is not an absolute path", "begin it with a slash")

    def _program(self, where: tuple[str | int, ...], path: str) -> None:
        self._absolute(where, path)
        if not os.path.isfile(path) or not os.access(path, os.X_OK):
            raise self._wrong(where, f"{path} is no program that can be run", f"chmod +x {path}")
        there = os.stat(path)
        if there.st_mode & stat.S_IWOTH or there.st_uid not in (0, os.geteuid()):
            raise self._wrong(where, f"others may change {path}", f"chown it and chmod o-w {path}")

    def _webhook(self, where: tuple[str | int, ...], action: WebhookAction) -> None:
        reason = wrong_url(action.url)
        if reason:
            raise self._wrong((*where, "url"), reason, "write http(s)://HOST[:PORT]/PATH")
        if action.secret_file is not None:
            self._absolute((*where, "secret_file"), action.secret_file)
            try:
                read_secret(Path(action.secret_file))
            except (OSError, ValueError) as error:
                said = error.strerror if isinstance(error, OSError) else error
                raise self._wrong(
                    (*where, "secret_file"),
                    f"{action.secret_file}: {said}",
                    "put at least 16 random bytes there, readable for you alone",
                ) from error
        if action.ca_file is not None:
            self._absolute((*where, "ca_file"), action.ca_file)
            if not os.path.isfile(action.ca_file):
                raise self._wrong((*where, "ca_file"), f"{action.ca_file} is no file", "name one")

    def _rule(self, number: int, table: object, actions: Mapping[str, Action]) -> Rule:
        where = ("rule", number)
        if not isinstance(table, dict):
            raise self._wrong(where, "a rule is a table", "write [[rule]]")
        rule = self._typed(where, table, Rule)
        for name in rule.actions:
            if name not in actions:
                raise self._wrong(
                    (*where, "actions"),
                    f"there is no action {name!r}",
                    nearest(name, actions) if actions else f"write [action.{name}]",
                )
        for field, known in _KNOWN.items():
            for word in _listed(getattr(rule.match, field)):
                if word not in known:
                    raise self._wrong(
                        (*where, "match", field),
                        f"match.{field}: {word!r} is none",
                        nearest(word.upper() if field == "errno" else word.lower(), known),
                    )
        for keys, value in _globs_of(rule.match):
            for glob in _listed(value):
                reason = wrong_glob(glob)
                if reason:
                    raise self._wrong(
                        (*where, "match", *keys),
                        f"match.{'.'.join(keys)}: {glob!r} is no glob: {reason}",
                        "write [[] for a bracket",
                    )
        return rule

    def _typed(self, where: tuple[str | int, ...], table: Mapping[str, object], kind: type[T]) -> T:
        self._known(where, table, kind)
        try:
            return msgspec.convert(table, kind)
        except msgspec.ValidationError as error:
            reason, _, at = str(error).partition(" - at `$")
            keys = tuple(key for key in re.split(r"[.\[\]`]+", at) if key and key != "...")
            name = ".".join(keys)
            reason = f"{reason[0].lower()}{reason[1:]}"
            raise self._wrong(
                (*where, *keys), f"{name}: {reason}" if name else reason, _example(keys)
            ) from error

    # Unknown keys first: msgspec says which, but not what was meant.
    def _known(
        self, where: tuple[str | int, ...], table: Mapping[str, object], kind: type[msgspec.Struct]
    ) -> None:
        fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
        for key, value in table.items():
            if key not in fields:
                raise self._wrong((*where, key), f"unknown key {key!r}", nearest(key, fields))
            inner = fields[key]
            if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, Strict):
                self._known((*where, key), value, inner)

    def _wrong(
        self, where: tuple[str | int, ...], reason: str, remedy: str | None = None
    ) -> ConfigError:
        return ConfigError(self._path, self._lines.of(where), reason, remedy)


# How each kind of value is written, by the name of its key.
def _example(keys: Sequence[str]) -> str | None:
    name = keys[0] if keys else ""
    if name == "match":
        name = keys[-1] if keys[-1] in Match.__struct_fields__ else "match"
    if name.endswith("_at_least") or name in ("tries", "burst", "queue"):
        return f"write {name} = 10"
    if name in ("limit", "connect", "backoff", "rate"):
        return f"write {name} = 0.5, in seconds" if name != "rate" else "write rate = 0.1, a second"
    if name in ("actions", "arguments"):
        return f'write {name} = ["TEXT"]'
    return "write text, or a list of texts" if name == "match" or name in _KNOWN else None


def wrong_glob(glob: str) -> str | None:
    """Return what is wrong with a glob, or None."""
    at = 0
    while (at := glob.find("[", at)) >= 0:
        # The first character of a set may be a bracket itself.
        end = glob.find("]", at + 2)
        if end < 0:
            return "a set of characters that does not end"
        at = end + 1
    if "\0" in glob:
        return "it has a NUL"
    try:
        re.compile(translate(glob))
    except re.error as error:
        return str(error)
    return None


def _listed(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else value


# Each field that holds globs, by its keys below ``match``.
def _globs_of(match: Match) -> list[tuple[tuple[str, ...], str | tuple[str, ...]]]:
    out: list[tuple[tuple[str, ...], str | tuple[str, ...]]] = []
    for field in msgspec.structs.fields(Match):
        value = getattr(match, field.name)
        if isinstance(value, Strict):
            out += [
                ((field.name, inner.name), given)
                for inner in msgspec.structs.fields(type(value))
                if isinstance(given := getattr(value, inner.name), str | tuple)
            ]
        elif field.name not in _KNOWN and isinstance(value, str | tuple):
            out.append(((field.name,), value))
    return out


# One test for each key that is given.
def _tests(match: Match) -> list[Test]:
    tests: list[Test] = []
    for keys, value in _globs_of(match):
        pattern = "|".join(f"(?:{translate(glob)})" for glob in _listed(value))
        tests.append(_matching(keys, re.compile(pattern, re.DOTALL)))
    for name in _KNOWN:
        words = frozenset(_listed(getattr(match, name)))
        if words:
            tests.append(_among((name,), words))
    if match.object.ino is not None:
        tests.append(_among(("object", "ino"), frozenset((match.object.ino,))))
    for name in ("count", "total", "lost"):
        least = getattr(match, f"{name}_at_least")
        if least is not None:
            tests.append(_at_least(name, least))
    return tests


def _matching(keys: tuple[str, ...], pattern: "re.Pattern[str]") -> Test:
    return lambda record: any(
        isinstance(value, str) and pattern.fullmatch(value) for value in _values(record, keys)
    )


def _among(keys: tuple[str, ...], words: frozenset[str | int]) -> Test:
    return lambda record: any(
        isinstance(value, str | int) and value in words for value in _values(record, keys)
    )


def _at_least(name: str, least: int) -> Test:
    return lambda record: any(
        isinstance(value, int) and value >= least for value in _values(record, (name,))
    )


# What stands under these keys: one value, each of a list, or nothing.
def _values(record: Mapping[str, Any], keys: tuple[str, ...]) -> Sequence[Any]:
    value: Any = record
    for key in keys:
        if not isinstance(value, Mapping):
            return ()
        value = value.get(key)
    return value if isinstance(value, list | tuple) else (value,)


class _Lines:
    """Where things stand in a file, by a scan that knows headers and keys.

    It knows nothing of strings over several lines; it serves messages only.
    """

    def __init__(self, text: str) -> None:
        self._at: dict[tuple[str | int, ...], int] = {}
        header: tuple[str | int, ...] = ()
        rules = -1
        for number, line in enumerate(text.splitlines(), start=1):
            if found := re.match(r"\s*\[+([^\]]*)\]", line):
                keys = _keys(found[1])
                if keys[:1] == ("rule",):
                    rules += line.lstrip().startswith("[[") and len(keys) == 1
                    keys = ("rule", max(rules, 0), *keys[1:])
                header = keys
            elif found := re.match(r"\s*([^=#]+?)\s*=", line):
                keys = (*header, *_keys(found[1]))
            else:
                continue
            for length in range(1, len(keys) + 1):
                self._at.setdefault(keys[:length], number)

    def of(self, where: tuple[str | int, ...]) -> int | None:
        """Return the line of a key, else of the nearest thing around it."""
        return next(
            (self._at[where[:n]] for n in range(len(where), 0, -1) if where[:n] in self._at), None
        )


def _keys(text: str) -> tuple[str | int, ...]:
    parts = re.findall(r"\"([^\"]*)\"|'([^']*)'|([^.\s\"']+)", text)
    return tuple(next(filter(None, part), "") for part in parts)
