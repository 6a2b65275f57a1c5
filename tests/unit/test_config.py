import tomllib

import msgspec
import pytest
from hypothesis import given, strategies as st

from fanwise import ConfigError, config

MIB = 1 << 20


@pytest.fixture
def write(tmp_path):
    path = tmp_path / "config.toml"

    def write(text):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_defaults(tmp_path):
    loaded = config.load(environ={"HOME": str(tmp_path)})
    assert loaded.file is None
    assert loaded.config.watch.queue == 256 * MIB
    assert loaded.config.watch.exclude == ()
    assert "opened" not in loaded.config.watch.kinds
    assert loaded.config.watch.pure is False
    assert loaded.config.watch.who is False
    assert loaded.config.watch.index is False
    assert set(loaded.origins.values()) == {"default"}


def test_the_default_file_is_the_defaults_and_has_every_key(write):
    loaded = config.load(write(config.DEFAULT_FILE), environ={})
    assert loaded.config == config.Config()
    assert "default" not in loaded.origins.values()


def test_flags_over_environment_over_file_over_defaults(write):
    file = write('[watch]\n\nqueue = "1MiB"\nexclude = ["a"]\npure = true\n')
    environ = {"FANWISE_WATCH_QUEUE": "2MiB", "FANWISE_WATCH_EXCLUDE": "b, c,"}
    flags = {"watch.queue": "3 MiB", "watch.exclude": None}
    loaded = config.load(file, flags=flags, environ=environ)
    watch = loaded.config.watch
    assert (watch.queue, watch.exclude, watch.pure) == (3 * MIB, ("b", "c"), True)
    of_watch = {key: value for key, value in loaded.origins.items() if key.startswith("watch.")}
    assert of_watch == {
        "watch.queue": "flag --queue",
        "watch.exclude": "environment FANWISE_WATCH_EXCLUDE",
        "watch.kinds": "default",
        "watch.pure": f"{file}:5",
        "watch.who": "default",
        "watch.index": "default",
    }


def test_the_short_name_of_pure():
    assert config.load(environ={"FANWISE_PURE": "1"}).config.watch.pure is True
    both = {"FANWISE_PURE": "1", "FANWISE_WATCH_PURE": "0"}
    assert config.load(environ=both).config.watch.pure is False


@pytest.mark.parametrize(
    ("text", "size"),
    [("65536", 65536), ('"64KiB"', 65536), ('"2 GiB"', 2 << 30), ('"70000B"', 70000)],
)
def test_sizes(write, text, size):
    assert config.load(write(f"watch.queue = {text}"), environ={}).config.watch.queue == size


def test_where_the_file_is_looked_for(tmp_path, write):
    user = tmp_path / "fanwise" / "config.toml"
    user.parent.mkdir()
    user.write_text("")
    home = tmp_path / "home" / ".config" / "fanwise" / "config.toml"
    home.parent.mkdir(parents=True)
    home.write_text("")
    asked = write("")
    xdg = {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path / "home")}
    assert config.find(environ=xdg) == user
    assert config.find(environ=xdg | {"XDG_CONFIG_HOME": "relative"}) == home
    assert config.find(environ=xdg | {"FANWISE_CONFIG": str(asked)}) == asked
    assert config.find(user, environ={"FANWISE_CONFIG": str(asked)}) == user


@pytest.mark.parametrize(
    ("text", "line", "reason", "remedy"),
    [
        ("[watch]\n\nqueu = 1\n", 3, "unknown key 'queu' in [watch]", "did you mean 'queue'?"),
        (
            "[watch]\nzzz = 1",
            2,
            "unknown key 'zzz'",
            "valid are: queue, exclude, kinds, pure, who, index",
        ),
        ("\n[wtach]\n", 2, "unknown section 'wtach'", "did you mean 'watch'?"),
        ("watch = 3", 1, "watch is a section, not a value", "write [watch]"),
        ("[[watch]]", 1, "watch is a section, not a value", "write [watch]"),
        ("[watch]\npure = 1", 2, "watch.pure: expected `bool`, got `int`", None),
        ("[watch]\npure = 'yes'", 2, "watch.pure: expected `bool`, got `str`", None),
        ("[watch]\nqueue = true", 2, "watch.queue: expected `int`, got `bool`", "write bytes"),
        ("[watch]\nqueue = '1MB'", 2, "watch.queue: not a size: '1MB'", "write bytes"),
        ("[watch]\nqueue = 65535", 2, "watch.queue: expected `int` >= 65536", "write bytes"),
        ("[watch]\nqueue = '2TiB'", 2, "watch.queue: expected `int` <= 1099511627776", "write"),
        ("[watch]\nexclude = '*.o'", 2, "watch.exclude: expected `array`, got `str`", None),
        ("[watch]\nexclude = [1]", 2, "watch.exclude: expected `str`, got `int`", None),
        ("[watch]\nkinds = ['RENAMED']", 2, "unknown kind 'RENAMED'", "did you mean 'renamed'?"),
        ("[watch]\nkinds = [\n1]", 2, "watch.kinds: expected `str`, got `int`", None),
        ("# x\nwatch = {queue = 1}", 2, "watch.queue: expected `int` >= 65536", "write bytes"),
        (b"[watch]\n# \xff", 2, "not UTF-8", "save the file as UTF-8"),
        ("[watch]\nqueue = ", 2, "not TOML: Invalid value", None),
        ("[watch]\nqueue = 1\nqueue = 2\n", 3, "not TOML: Cannot overwrite a value", None),
        ("a = [\n\n", 2, "not TOML: Invalid value", None),
        ("a = " + "[" * 100_000, None, "not TOML: nested too deeply", None),
        ("a = " + "1" * 5000, None, "not TOML: Exceeds the limit", None),
        ("#" * (MIB + 1), None, "larger than 1 MiB", None),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_wrong_file(write, text, line, reason, remedy):
    file = write(text)
    with pytest.raises(ConfigError) as caught:
        config.check(file)
    error = caught.value
    assert (error.path, error.line) == (str(file), line)
    assert reason in error.reason
    assert (error.remedy or "").startswith(remedy or "")
    assert bool(error.remedy) == bool(remedy)


def test_a_missing_file_is_an_error_that_keeps_its_cause(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file") as caught:
        config.load(environ={"FANWISE_CONFIG": str(tmp_path / "none.toml")})
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"FANWISE_WATCH_QUEU": "1"}, "FANWISE_WATCH_QUEU: .* did you mean 'FANWISE_WATCH_QUEUE'"),
        ({"FANWISE_PURE": "maybe"}, "FANWISE_PURE: not a boolean: 'maybe'; write 1 or 0"),
        ({"FANWISE_WATCH_QUEUE": ""}, "FANWISE_WATCH_QUEUE: watch.queue: not a size: ''"),
        ({"FANWISE_WATCH_KINDS": "renamd"}, "FANWISE_WATCH_KINDS: .* did you mean 'renamed'"),
    ],
)
def test_a_wrong_environment(environ, message):
    with pytest.raises(ConfigError, match=message):
        config.load(environ=environ)


def test_a_wrong_flag():
    with pytest.raises(ConfigError, match=r"^--queue: watch\.queue: not a size: 'big'"):
        config.load(flags={"watch.queue": "big"}, environ={})


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@given(
    st.binary(max_size=200)
    | st.text(alphabet="watch[]=.\"'{}\n \\u0#1queue", max_size=80).map(str.encode)
)
def test_any_bytes_are_loaded_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(data)
    try:
        config.check(path)
    except ConfigError as error:
        line = error.line
    else:
        line = None
        assert set(tomllib.loads(data.decode())) <= {"watch"}
    assert line is None or 1 <= line <= len(data.decode(errors="replace").splitlines()) + 1


@given(st.sampled_from(["queue", "exclude", "kinds", "pure"]), values)
def test_any_value_is_valid_or_refused(name, value):
    try:
        loaded = config.load(flags={f"watch.{name}": value}, environ={})
    except ConfigError:
        return
    assert msgspec.convert(msgspec.to_builtins(loaded.config), config.Config) == loaded.config
