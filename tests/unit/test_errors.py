import copy
import pickle
from pathlib import Path

import pytest

import fanwise
from fanwise import (
    BusyError,
    ConfigError,
    DecodeError,
    Exit,
    FanwiseError,
    LimitReached,
    NoRoom,
    NoSuchRoot,
    NotWatchable,
    PermissionNeeded,
    _errors,
)

SAMPLES = [
    (FanwiseError("it broke"), "it broke", Exit.FAILED),
    (BusyError("two readers", "make another"), "two readers; make another", Exit.FAILED),
    (ConfigError("a.toml", 3, "bad", "fix it"), "a.toml:3: bad; fix it", Exit.USAGE),
    (ConfigError(Path("a.toml"), None, "bad"), "a.toml: bad", Exit.USAGE),
    (NotWatchable(b"/x", "no"), "/x: no", Exit.NO),
    (
        PermissionNeeded("/x", "needs CAP_SYS_ADMIN", "run as root"),
        "/x: needs CAP_SYS_ADMIN; run as root",
        Exit.NO,
    ),
    (
        LimitReached("/x", "fs.fanotify.max_user_groups"),
        "/x: the kernel's limit fs.fanotify.max_user_groups is reached;"
        " raise it with: sysctl -w fs.fanotify.max_user_groups=NUMBER",
        Exit.NO,
    ),
    (DecodeError(24, "record too short"), "byte 24: record too short", Exit.FAILED),
    (
        NoSuchRoot("/a\nfanwise: fine", "no such directory"),
        "'/a\\nfanwise: fine': no such directory",
        Exit.NO,
    ),
    (NoSuchRoot(b"/\xff", "gone"), "'/\\udcff': gone", Exit.NO),
    (NoRoom("/x/a.db", "full", "make room"), "/x/a.db: full; make room", Exit.FAILED),
    (FanwiseError("two\nlines \x1b[1m"), "two\\nlines \\x1b[1m", Exit.FAILED),
]


@pytest.mark.parametrize(("error", "text", "status"), SAMPLES, ids=lambda x: type(x).__name__)
def test_an_error_is_one_line_and_has_a_status(error, text, status):
    assert str(error) == text
    assert error.exit_status is status
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert str(twin) == text
        assert vars(twin) == vars(error)


def test_the_exit_statuses_are_the_published_ones():
    assert {x.name: x.value for x in Exit} == {
        "OK": 0,
        "NO": 1,
        "USAGE": 2,
        "CANNOT_TELL": 3,
        "FAILED": 4,
    }


def test_the_tree_at_the_head_of_the_module_is_the_tree():
    drawn, path = {}, []
    for line in _errors.__doc__.splitlines():
        stripped = line.lstrip(" │├└─")
        name = stripped.split(" ")[0]
        if name in fanwise.__all__ and line.startswith("    "):
            depth = (len(line) - len(stripped) - 4) // 4
            path = [*path[:depth], name]
            drawn[name] = path[depth - 1] if depth else "Exception"
    real = {
        name: getattr(fanwise, name).__base__.__name__
        for name in fanwise.__all__
        if isinstance(getattr(fanwise, name), type)
        and issubclass(getattr(fanwise, name), FanwiseError)
    }
    assert drawn == real
