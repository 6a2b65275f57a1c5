"""The bench counts and reports truly. Its figures are never tested: a time is not a property."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bench(*args: str) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-m", "bench", *args]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=100)


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import _report

    return _report


def answer(**more) -> dict:
    row = {
        "measure": "a measure | with a bar",
        "bar": "<= 2x",
        "measured": "1 s",
        "c": "0.4 s",
        "ratio": 2.5,
        "pass": False,
        "note": "",
    }
    return {
        "rows": [row],
        "runs": {"c": [{"delivered": 1.0, "cpu_s": s} for s in (1.0, 9.0, 2.0)]},
        "missing": {"watchdog": "could not be installed"},
        "machine": {"kernel": "6.18", "cores": 2},
        "load_at_start": 0.1,
        "quick": False,
        "when": "today",
        "command": "python -m bench burst",
        **more,
    }


def test_report_is_built_from_results(report):
    text = report.markdown({"burst": answer()})
    assert "| a measure \\| with a bar | <= 2x | 1 s | 0.4 s | 2.50x | **no** |" in text
    assert "| c | 100.00% |  | 2.00 |" in text  # the median of the three
    assert "| watchdog | could not be installed |" in text
    assert "`python -m bench burst` on today, medians of 3." in text
    assert "kernel 6.18, cores 2" in text
    assert "--quick" not in text
    assert "--quick" in report.markdown({"burst": answer(quick=True)})


def test_every_question_has_columns(report):
    from bench.__main__ import QUESTIONS

    assert set(QUESTIONS) == set(report.COLUMNS)


def test_plot_shows_a_loss_as_one(report, tmp_path):
    bars = [
        {"name": "c", "value": 0.5, "delivered": 1.0, "peak_mib": 1.0},
        {"name": "<peer>", "value": 200.0, "delivered": 0.99999, "peak_mib": 20.0},
    ]
    report.write({"burst": answer(chart={"title": "cost", "bars": bars})}, tmp_path)
    plot = (tmp_path / "results.svg").read_text()
    assert "100 % delivered, 1 MiB" in plot
    assert "&lt;peer&gt;" in plot
    assert "99.9 % delivered" in plot
    assert (tmp_path / "RESULTS.md").exists()


def test_quick_burst_of_the_c_reader_is_complete(tmp_path, cannot_run):
    if os.geteuid() != 0:
        cannot_run("filesystem marks and mounts need root")
    if shutil.which("cc") is None:
        cannot_run("there is no C compiler")
    done = bench("burst", "--quick", "--only", "c", "--into", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (run,) = json.loads((tmp_path / "results.json").read_text())["burst"]["runs"]["c"]
    assert run["delivered"] == 1
    assert set(run["by_kind"].values()) == {1}
    assert "## burst" in (tmp_path / "RESULTS.md").read_text()
