"""Rule files: what they match, and every way in which they are wrong."""

import errno
import itertools
import os
import random
import re
from pathlib import Path

import msgspec
import pytest

from fanwise import ConfigError
from fanwise.health import _rules
from fanwise.health._rules import load, wrong_glob

RECORD = {
    "id": "abc",
    "fs": {"uuid": "0f00-1", "fstype": "ext4", "label": None, "mounts": ["/srv", "/mnt/b"]},
    "scope": "inode",
    "object": {"ino": 14, "gen": 7, "path": "/srv/a/b.db"},
    "errno": "EIO",
    "count": 2,
    "total": 10,
    "location": {"function": "ext4_find_entry", "line": 5},
    "operation": "data write-back",
    "state": "emergency_ro",
    "process": {"pid": 5, "comm": "cat"},
    "channels": ["fserror", "trace"],
    "lost": 0,
}
ACTION = '[action.a]\nkind = "log"\nfile = "/tmp/x"\n\n'


@pytest.fixture
def rules(tmp_path):
    def rules(text):
        path = tmp_path / "rules.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(0o600)
        return load(path)

    return rules


def matching(*lines):
    text = "\n".join(lines)
    return f'{ACTION}[[rule]]\nname = "r"\nactions = ["a"]\n{text}\n'


@pytest.mark.parametrize(
    ("line", "yes"),
    [
        ("", True),
        ('match.errno = "EIO"', True),
        ('match.errno = ["EBADMSG", "EIO"]', True),
        ('match.errno = ["EBADMSG", "EUCLEAN"]', False),
        ('match.scope = "inode"', True),
        ('match.scope = "fs"', False),
        ('match.state = ["aborted", "emergency_ro"]', True),
        ('match.channels = "trace"', True),
        ('match.channels = ["kmsg", "counters"]', False),
        ('match.operation = "data *"', True),
        ('match.fs.fstype = ["xfs", "ext?"]', True),
        ('match.fs.label = "*"', False),  # it has none
        ('match.fs.mounts = "/srv"', True),
        ('match.fs.mounts = "/mnt/*"', True),
        ('match.fs.mounts = "/s"', False),
        ('match.object.path = "/srv/**"', True),
        ('match.object.path = "/srv/*"', False),
        ('match.object.path = "/srv/**/*.[dx]b"', True),
        ("match.object.ino = 14", True),
        ("match.object.ino = 15", False),
        ('match.location.function = "ext4_*"', True),
        ('match.location.symbol = "*"', False),
        ('match.process.comm = "c?t"', True),
        ("match.total_at_least = 10", True),
        ("match.total_at_least = 11", False),
        ("match.count_at_least = 2", True),
        ("match.count_at_least = 3", False),
        ("match.lost_at_least = 1", False),
        ('match.errno = "EIO"\nmatch.scope = "fs"', False),
    ],
)
def test_what_matches(rules, line, yes):
    assert rules(matching(line)).actions_for(RECORD) == (["a"] if yes else [])
    # A record that has nothing matches only what asks for nothing.
    assert rules(matching(line)).actions_for({}) == (["a"] if line == "" else [])


def test_actions_of_several_rules_come_once_in_order(rules):
    text = (
        ACTION
        + ACTION.replace("action.a", "action.b")
        + '[[rule]]\nname = "1"\nactions = ["b"]\n[[rule]]\nname = "2"\nactions = ["a", "b"]\n'
        + '[[rule]]\nname = "3"\nactions = ["a"]\n[rule.match]\nerrno = "EBADMSG"\n'
    )
    found = rules(text)
    assert found.actions_for(RECORD) == ["b", "a"]
    assert set(found.actions) == {"a", "b"}


def test_once_is_once_for_each_incident(rules, monkeypatch):
    monkeypatch.setattr(_rules, "_MOST_REMEMBERED", 2)
    found = rules(matching("once = true", "match.total_at_least = 5"))
    said = [
        found.actions_for(RECORD | {"id": id_, "total": total}) != []
        for id_, total in [("x", 1), ("x", 5), ("x", 6), ("y", 5), ("x", 7), ("y", 6)]
    ]
    assert said == [False, True, False, True, False, False]
    for id_ in "pq":
        assert found.actions_for(RECORD | {"id": id_})
    assert found.actions_for(RECORD | {"id": "x"})  # long ago; the memory has an end


WRONG = [
    ("[[rule]\n", 1, "not TOML"),
    ("x = 1\n", 1, "unknown section 'x'; valid are: rule, action"),
    ("[rules]\n", 1, "unknown section 'rules'; did you mean 'rule'?"),
    ("[rule]\nname = 'x'\n", 1, "rule is a list of tables; write [[rule]]"),
    ("action = 3\n", 1, "action is a table; write [action.NAME]"),
    ("[action]\na = 3\n", 2, "the action 'a' is a table; write [action.a]"),
    ("rule = [1]\n", 1, "a rule is a table; write [[rule]]"),
    ("[action.a]\nfile = '/tmp/x'\n", 1, "has no kind; valid are: exec, webhook, log"),
    ("[action.a]\nkind = 'mail'\n", 2, "an unknown kind 'mail'; valid are: exec, webhook, log"),
    ("[action.a]\nkind = 3\n", 2, "an unknown kind 3"),
    ("[action.a]\nkind = 'log'\n", 1, "missing required field `file`"),
    ("[action.a]\nkind = 'log'\nfile = 'x'\n", 3, "'x' is not an absolute path; begin it with"),
    ("[action.a]\nkind = 'log'\nfile = '/nonexistent/x'\n", 3, "directory is not there; make it"),
    ("[action.a]\nkind = 'log'\nfile = '/tmp/x'\nfiel = 1\n", 4, "unknown key 'fiel'; did you"),
    ("[action.a]\nkind = 'log'\nfile = '/tmp/x'\nrate = 0\n", 4, "rate: expected `float` > 0"),
    ("[action.a]\nkind = 'log'\nfile = '/tmp/x'\nrate = 'x'\n", 4, "rate: expected `float`, got"),
    ("[action.a]\nkind = 'log'\nfile = '/tmp/x'\nburst = 0\n", 4, "burst: expected `int` >= 1"),
    (ACTION, 1, "no rule uses the action 'a'; remove it"),
    ("[action.a]\nkind = 'exec'\nprogram = 'mail'\n", 3, "'mail' is not an absolute path"),
    ("[action.a]\nkind = 'exec'\nprogram = '/nonexistent'\n", 3, "no program that can be run"),
    ("[action.a]\nkind = 'exec'\nprogram = '/etc'\n", 3, "no program that can be run"),
    (
        "[action.a]\nkind = 'exec'\nprogram = '/bin/sh'\narguments = 'x'\n",
        4,
        'expected `array`, got `str`; write arguments = ["TEXT"]',
    ),
    (
        '[action.a]\nkind = "exec"\nprogram = "/bin/sh"\narguments = ["a\\u0000"]\n',
        4,
        "an argument has a NUL",
    ),
    (
        "[action.a]\nkind = 'exec'\nprogram = '/bin/sh'\nlimit = -1\n",
        4,
        "limit: expected `float` > 0.0; write limit = 0.5, in seconds",
    ),
    ("[action.a]\nkind = 'webhook'\nurl = 'ftp://x'\n", 3, "no http or https URL; write http(s)"),
    ("[action.a]\nkind = 'webhook'\nurl = 'http://u:p@x/'\n", 3, "no place for a password"),
    (
        "[action.a]\nkind = 'webhook'\nurl = 'http://x/'\nsecret_file = '/nonexistent'\n",
        4,
        "/nonexistent: No such file or directory; put at least 16 random bytes there",
    ),
    (
        "[action.a]\nkind = 'webhook'\nurl = 'http://x/'\nsecret_file = '/etc/passwd'\n",
        4,
        "/etc/passwd: others may read it",
    ),
    (
        "[action.a]\nkind = 'webhook'\nurl = 'http://x/'\nca_file = '/nonexistent'\n",
        4,
        "/nonexistent is no file",
    ),
    (ACTION + "[[rule]]\nactions = ['a']\n", 5, "missing required field `name`"),
    (ACTION + "[[rule]]\nname = ''\nactions = ['a']\n", 6, "expected `str` of length >= 1"),
    (ACTION + "[[rule]]\nname = 'r'\n", 5, "missing required field `actions`"),
    (ACTION + "[[rule]]\nname = 'r'\nactions = []\n", 7, "of length >= 1"),
    (ACTION + "[[rule]]\nname = 'r'\nactions = ['b']\n", 7, "no action 'b'; valid are: a"),
    ("[[rule]]\nname = 'r'\nactions = ['b']\n", 3, "no action 'b'; write [action.b]"),
    (matching("matches.errno = 'EIO'"), 8, "unknown key 'matches'; did you mean 'match'?"),
    (matching("match = 3"), 8, "match: expected `object`, got `int`"),
    (matching("match.erno = 'EIO'"), 8, "unknown key 'erno'; did you mean 'errno'?"),
    (matching("match.object.inode = 3"), 8, "unknown key 'inode'; did you mean 'ino'?"),
    (matching("match.fs = 'ext4'"), 8, "match.fs: expected `object`, got `str`"),
    (matching("match.errno = 'EUCLAEN'"), 8, "'EUCLAEN' is none; did you mean 'EUCLEAN'?"),
    (matching("match.errno = 'eio'"), 8, "'eio' is none; did you mean 'EIO'?"),
    (matching("match.errno = 5"), 8, "match.errno: expected `str | array | null`, got `int`"),
    (matching("match.errno = []"), 8, "match.errno: expected `array` of length >= 1"),
    (matching("match.errno = ['EIO', 5]"), 8, "expected `str`, got `int`"),
    (matching("match.scope = 'inodes'"), 8, "did you mean 'inode'?"),
    (matching("match.state = 'emergency'"), 8, "did you mean 'emergency_ro'?"),
    (matching("match.channels = 'dmesg'"), 8, "'dmesg' is none; did you mean 'kmsg'?"),
    (matching("match.object.ino = '14'"), 8, "match.object.ino: expected `int"),
    (matching("match.object.ino = -1"), 8, "expected `int` >= 0"),
    (matching("match.total_at_least = '5'"), 8, "write total_at_least = 10"),
    (matching("match.total_at_least = 5.5"), 8, "match.total_at_least: expected `int"),
    (matching("match.object.path = '/a[b'"), 8, "is no glob: a set of characters that does not"),
    (matching("match.object.path = '/a[z-a]'"), 8, "is no glob: bad character range z-a"),
    (matching("match.fs.mounts = ['/ok', '/a[']"), 8, "match.fs.mounts: '/a[' is no glob"),
    (matching("[rule.match]", "errno = 'EIOO'"), 9, "did you mean 'EIO'?"),
    (matching("[rule.match.fs]", "uuid = ''"), 9, "expected `str` of length >= 1"),
    (matching("once = 1"), 8, "once: expected `bool`, got `int`"),
    (
        matching() + "\n[[rule]]\nactions = ['a']\nname = 'r'\n",
        12,
        "two rules are named 'r'; give each a name of its own",
    ),
    (
        matching() + "\n[[rule]]\nname = 's'\nactions = ['a']\nmatch.errno = 'X'\n",
        13,
        "match.errno: 'X' is none",
    ),
    (b"\xff\n", 1, "not UTF-8"),
    ("x = " + "[" * 5000, None, "not TOML"),
]


@pytest.mark.parametrize(("text", "line", "message"), WRONG, ids=range(len(WRONG)))
def test_every_way_of_being_wrong_is_told_with_its_line(rules, text, line, message):
    with pytest.raises(ConfigError) as caught:
        rules(text)
    assert message in str(caught.value)
    assert caught.value.line == line
    assert caught.value.path.endswith("rules.toml")


def test_files_that_others_may_change_are_refused(rules, tmp_path, cannot_run):
    rules(matching())
    path = tmp_path / "rules.toml"
    for mode in (0o620, 0o602):
        path.chmod(mode)
        with pytest.raises(ConfigError, match="others may write it; chmod go-w"):
            load(path)
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o757)
    with pytest.raises(ConfigError, match="others may change"):
        rules(f"[action.a]\nkind = 'exec'\nprogram = '{program}'\n")
    if os.geteuid():
        cannot_run("giving a file to another user needs root")
    path.chmod(0o600)
    os.chown(path, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        load(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(tmp_path / "none")


@pytest.mark.parametrize("glob", ["*", "a[]]b", "[!a]", "**/x", "a[[]b", "]"])
def test_globs_that_are_right(glob):
    assert wrong_glob(glob) is None


def test_every_errno_has_its_name():
    assert set(_rules.ERRNOS) == set(errno.errorcode.values())
    assert "EUCLEAN" in _rules.ERRNOS


def test_random_damage_is_refused_or_read_never_worse(rules):
    rng = random.Random(3)
    good = matching('match.errno = ["EIO"]', 'match.object.path = "/srv/**"', "once = true")
    pieces = ["[", "]", '"', "=", "\n", ".", "[[rule]]", "match", "\0", "\u2028", "'''", "1e9"]
    refused = 0
    for _ in range(1500):
        text = list(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text))
            text[at : at + rng.randint(0, 4)] = rng.choice(pieces)
        try:
            rules("".join(text)).actions_for(RECORD)
        except ConfigError:
            refused += 1
    assert refused > 500


def test_records_may_hold_anything(rules):
    lines = [
        'match.fs.mounts = "*"',
        'match.object.path = "*"',
        'match.errno = "EIO"',
        "match.total_at_least = 1",
        "match.object.ino = 1",
    ]
    odd = [None, 3, "x", [], [1, {}], {}, {"path": 3}, {"ino": []}, {"mounts": {}}, True, 1.5]
    for line, (a, b) in itertools.product(lines, itertools.product(odd, odd)):
        found = rules(matching(line))
        for record in ({"fs": a, "object": b}, {"errno": a, "total": b}):
            found.actions_for(record)


def test_the_example_of_the_page_is_right_but_for_its_files(rules, tmp_path):
    text = (Path(__file__).parents[2] / "docs/health-rules.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    secret = tmp_path / "secret"
    secret.write_bytes(b"0123456789abcdef")
    secret.chmod(0o600)
    for there, here in {
        "/etc/fanwise/hook.secret": str(secret),
        "/usr/local/lib/fanwise/mail": "/bin/sh",
        "/var/log/fanwise.jsonl": str(tmp_path / "log"),
    }.items():
        assert there in example
        example = example.replace(there, here)
    found = rules(example)
    assert found.actions_for(RECORD) == ["file", "page", "mail"]
    assert found.actions_for(RECORD | {"total": 9, "id": "z"}) == ["file"]


def test_every_key_is_in_the_page():
    text = (Path(__file__).parents[2] / "docs/health-rules.md").read_text()
    for field in msgspec.structs.fields(_rules.Match):
        inner = getattr(_rules.Match(), field.name)
        names = (
            [f"{field.name}.{x}" for x in inner.__struct_fields__]
            if isinstance(inner, msgspec.Struct)
            else [field.name]
        )
        for name in names:
            assert f"`{name}`" in text
    for kind in _rules._KINDS.values():
        for name in kind.__struct_fields__:
            assert f"`{name}`" in text or name in ("kind", "backoff")
