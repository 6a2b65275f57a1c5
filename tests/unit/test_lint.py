"""The linters are tests, so there is one command; so are rules that no linter knows."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "command",
    [("ruff", "format", "--check", "."), ("ruff", "check", "."), ("mypy",)],
    ids=["format", "check", "types"],
)
def test_lint(command):
    done = subprocess.run(
        [BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_cannot_run_skips():
    pattern = re.compile(r"pytest\.skip\(|mark\.skip|mark\.xfail|importorskip")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path not in (ROOT / "tests/conftest.py", Path(__file__))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if pattern.search(line)
    ]
    assert found == []


def test_requirements_agree_with_the_package():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = {
        name: (ROOT / f"requirements/{name}.in").read_text().splitlines()
        for name in ("run", "build")
    }
    assert [x for x in lines["run"] if not x.startswith("#")] == wanted["project"]["dependencies"]
    assert [x for x in lines["build"] if not x.startswith("#")] == wanted["build-system"][
        "requires"
    ]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda p: p.name
)
def test_requirements_are_pinned_hashed_and_name_no_host(path):
    text = path.read_text().replace("\\\n", " ")
    assert "://" not in text
    for line in text.splitlines():
        assert re.match(r"[\w.-]+==\S+( ; .*)? +--hash=sha256:[0-9a-f]{64}", line), line
