"""The shell around the commands: what it imports, and with what status it ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fanwise

FANWISE = Path(sys.executable).parent / "fanwise"


@pytest.fixture
def environ(tmp_path):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FANWISE", "XDG"))}
    return kept | {"HOME": str(tmp_path)}


@pytest.fixture
def run(environ):
    def run(*arguments, **changes):
        return subprocess.run(
            [FANWISE, *arguments], env=environ | changes, capture_output=True, text=True
        )

    return run


def test_version(run):
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"fanwise {fanwise.__version__}\n")


def imported(*arguments):
    text = f"import sys; sys.argv[1:] = {list(arguments)}; from fanwise.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", text], capture_output=True, text=True, check=True
    )
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def test_the_version_imports_nothing_heavy():
    modules = imported("--version")
    assert "fanwise.cli" in modules
    assert not {"click", "msgspec", "anyio", "rich", "fanwise.cli._main"} & modules


def test_help_imports_no_command():
    modules = imported("--help")
    assert "fanwise.cli._main" in modules
    assert not {"msgspec", "anyio", "rich", "fanwise.config"} & modules
    assert {name for name in modules if name.startswith("fanwise.cli.")} == {"fanwise.cli._main"}


def test_help_lists_the_commands(run):
    done = run("--help")
    assert done.returncode == 0
    for name in ("watch", "doctor", "config"):
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("arguments", [["nope"], ["--nope"], ["config", "show", "more"]])
def test_wrong_usage_is_2(run, arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert "Error: " in done.stderr
    assert done.stdout == ""


def test_an_error_is_one_line_and_its_status(run, tmp_path):
    file = tmp_path / "wrong.toml"
    file.write_text("[watch]\nqueu = 1\n")
    line = f"fanwise: {file}:2: unknown key 'queu' in [watch]; did you mean 'queue'?\n"
    for done in (
        run("config", "check", str(file)),
        run("--config", str(file), "config", "check"),
        run("config", "show", FANWISE_CONFIG=str(file)),
    ):
        assert (done.returncode, done.stderr, done.stdout) == (2, line, "")


def test_config_check_of_a_right_file(run, tmp_path):
    file = tmp_path / "right.toml"
    file.write_text(run("config", "default").stdout)
    assert run("config", "check", str(file)).stdout == f"{file}: fine\n"
    assert run("--config", str(file), "config", "check").stdout == f"{file}: fine\n"


def test_config_show_says_where_values_come_from(run, tmp_path):
    file = tmp_path / "right.toml"
    file.write_text('[watch]\nexclude = ["*.o"]\n')
    arguments = ("--config", str(file), "config", "show")
    text = run(*arguments, FANWISE_WATCH_QUEUE="1MiB").stdout
    assert "watch.queue = 1048576  # environment FANWISE_WATCH_QUEUE\n" in text
    assert f'watch.exclude = ["*.o"]  # {file}:2\n' in text
    assert "watch.pure = false  # default\n" in text
    shown = json.loads(run(*arguments, "--json").stdout)
    assert (shown["version"], shown["file"]) == (1, str(file))
    assert shown["values"]["watch.exclude"] == {"value": ["*.o"], "from": f"{file}:2"}


@pytest.mark.parametrize("arguments", [["--version"], ["config", "default"], ["--help"]])
def test_a_closed_pipe_is_quiet_and_0(environ, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [FANWISE, *arguments], stdout=writer, stderr=subprocess.PIPE, env=environ
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


# Stands in for a command whose own code does `body`, inside the real shell.
def run_body(body, **options):
    text = (
        "import sys, fanwise.cli as cli\n"
        f"def _run(arguments):\n    {body}\n"
        "cli._run = _run\nsys.exit(cli.main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", text], stdout=-1, stderr=-1, text=True, **options
    )


def test_a_bug_is_a_traceback_and_4():
    with run_body("raise ZeroDivisionError") as process:
        _, errors = process.communicate()
    assert process.returncode == 4
    assert errors.startswith("Traceback")


def test_a_broken_pipe_that_is_not_the_output_is_a_bug():
    with run_body("raise BrokenPipeError('some socket')") as process:
        _, errors = process.communicate()
    assert process.returncode == 4
    assert errors.startswith("Traceback")


def test_the_first_interrupt_closes_in_order_and_the_second_aborts():
    wait = "import time; print(flush=True); time.sleep(60)"
    with run_body(wait) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert (process.returncode, errors) == (130, "")
    stubborn = (
        "import time\n"
        "    try:\n        print(flush=True); time.sleep(60)\n"
        "    finally:\n        print(flush=True); time.sleep(60)"
    )
    with run_body(stubborn) as process:
        for _ in range(2):
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode == -signal.SIGINT
