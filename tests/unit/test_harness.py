"""The shared conftest does what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernel.conftest import unmount

CONFTEST = Path(__file__).parents[1] / "conftest.py"


def run_pytest(folder, body, **environ):
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    (folder / "test_it.py").write_text(body)
    base = {k: v for k, v in os.environ.items() if k != "CI" and not k.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
    return subprocess.run(
        [*command, f"--basetemp={folder}/base"],
        cwd=folder,
        env=base | environ,
        capture_output=True,
        text=True,
    )


STOPS = "def test_it(cannot_run):\n    cannot_run('no such filesystem')\n"


def test_what_cannot_run_is_skipped(tmp_path):
    done = run_pytest(tmp_path, STOPS)
    assert (done.returncode, "1 skipped" in done.stdout) == (0, True), done.stdout


def test_what_cannot_run_fails_in_ci(tmp_path):
    done = run_pytest(tmp_path, STOPS, CI="1")
    assert done.returncode == 1
    assert "no such filesystem" in done.stdout


def test_a_child_left_behind_is_an_error(tmp_path):
    body = "import subprocess\ndef test_it():\n    global p\n    p = subprocess.Popen(['true'])\n"
    done = run_pytest(tmp_path, body)
    assert done.returncode == 1
    assert "left behind by this run: process" in done.stdout


def test_a_mount_left_behind_is_an_error(tmp_path, cannot_run):
    if os.geteuid() != 0:
        cannot_run("mounting needs root")
    body = (
        "import subprocess\n"
        "def test_it(tmp_path):\n"
        "    subprocess.run(['mount', '-t', 'tmpfs', 'none', tmp_path], check=True)\n"
    )
    try:
        done = run_pytest(tmp_path, body)
    finally:
        unmount(tmp_path / "base/test_it0")
    assert done.returncode == 1
    assert "left behind by this run: mount" in done.stdout


def test_a_loop_device_left_behind_is_an_error(tmp_path, cannot_run):
    if os.geteuid() != 0:
        cannot_run("loop devices need root")
    body = (
        "import subprocess\n"
        "def test_it(tmp_path):\n"
        "    image = tmp_path / 'image'\n"
        "    image.write_bytes(bytes(1 << 20))\n"
        "    subprocess.run(['losetup', '--find', image], check=True)\n"
    )
    image = tmp_path / "base/test_it0/image"
    try:
        done = run_pytest(tmp_path, body)
    finally:
        listed = subprocess.run(["losetup", "-j", image], capture_output=True, text=True).stdout
        for device in (line.partition(":")[0] for line in listed.splitlines()):
            subprocess.run(["losetup", "-d", device], check=True)
    if not listed:
        pytest.fail(done.stdout)
    assert done.returncode == 1
    assert "left behind by this run: loop" in done.stdout
