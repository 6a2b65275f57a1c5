"""The bench counts and reports truly. Its figures are never tested: a time is not a property."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
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
    assert "| c | 100.00% |  |  |  | 2.00 |" in text  # the median of the three
    assert "| watchdog | could not be installed |" in text
    assert "`python -m bench burst` on today, medians of 3." in text
    assert "kernel 6.18, cores 2" in text
    assert "--quick" not in text
    assert "--quick" in report.markdown({"burst": answer(quick=True)})


def test_every_question_is_discovered_and_has_columns(report):
    from bench.__main__ import FIRST, QUESTIONS

    files = {p.stem for p in (ROOT / "bench").glob("*.py") if not p.name.startswith("_")}
    assert set(QUESTIONS) == files
    assert set(FIRST) <= files
    for question in QUESTIONS:
        module = importlib.import_module(f"bench.{question}")
        assert callable(module.run)
        for key, head, style in getattr(module, "COLUMNS", ()) or report.COLUMNS[question]:
            assert key
            assert head
            assert isinstance(style, str)


def test_a_new_file_is_a_question_with_its_table(report, tmp_path):
    from bench.__main__ import discover

    for name in ("novel.py", "burst.py", "_harness.py", "README.md"):
        (tmp_path / name).touch()
    assert discover(tmp_path) == ("burst", "novel")
    runs = {"library": [{"named_share": 0.5, "text": "x"}, {"named_share": 0.75, "text": "x"}]}
    text = report.markdown({"novel": answer(runs=runs, missing={})})
    assert "## novel" in text
    assert "| watcher | named share |" in text  # it brought no columns
    assert "| library | 0.625 |" in text
    columns = [["named_share", "named", ".0%"], ["text", "said", ""]]
    text = report.markdown({"novel": answer(runs=runs, missing={"c": "no C"}, columns=columns)})
    assert "| library | 62% | x |" in text
    assert "| c | no C |  |" in text


def test_a_new_question_is_run_and_reported(tmp_path, cannot_run):
    """The whole way, with the machinery of the bench."""
    if os.geteuid() != 0:
        cannot_run("the bench needs root")
    if shutil.which("cc") is None:
        cannot_run("there is no C compiler")
    shutil.copytree(ROOT / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns(".cache"))
    (tmp_path / "bench/novel.py").write_text(
        "COLUMNS = [('n', 'how many', '.0f')]\n"
        "def run(bench):\n"
        "    return {'runs': bench.each(['one'], lambda name: {'n': 7}), 'rows': []}\n"
    )
    argv = [sys.executable, "-m", "bench", "novel", "--quick", "--into", str(tmp_path / "out")]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "| one | 7 |" in (tmp_path / "out/RESULTS.md").read_text()


def test_spread_is_shown_where_there_is_one(report):
    runs = [{"s": 1.0, "t": "a"}, {"s": 3.0, "t": "b"}, {"s": 2.0, "t": "a"}, {"s": None}]
    assert report.cell(runs, "s", ".1f", spread=True) == "2.0 (1.0 to 3.0)"
    assert report.cell(runs[:1], "s", ".1f", spread=True) == "1.0"
    assert report.cell(runs, "s", ".1f") == "2.0"
    assert report.cell(runs, "t", "") == "a / b"
    assert report.cell(runs, "x", ".1f") == ""


def test_plots_show_a_loss_as_one(report, tmp_path):
    from bench.burst import charts, loss

    def run(share, cost):
        return {
            "delivered": share,
            "cpu_s_per_million": cost,
            "survivors": share,
            "loss": loss(share < 1, False),
        }

    runs = {
        "c": [run(1.0, 0.5)],
        "watchdog": [run(0.99999, 200.0)],
        "mute": [{"delivered": 0, "loss": "not reported"}],
    }
    grid = {"title": "right", "tests": ["race"], "rows": [{"name": "<peer>", "shares": [0.9999]}]}
    answers = {"burst": answer(charts=charts(runs)), "correctness": answer(grid=grid)}
    report.write(answers, tmp_path)
    plot = (tmp_path / "burst-cpu.svg").read_text()
    assert "0.5 s, 100 % delivered" in plot
    assert "99.9 % delivered" in plot
    assert plot.count("#c44e52") == 1
    assert "mute" not in plot  # nothing delivered has no cost each
    assert "mute" in (tmp_path / "burst-delivered.svg").read_text()
    plot = (tmp_path / "correctness.svg").read_text()
    assert "&lt;peer&gt;" in plot
    assert "99.9 %" in plot
    text = (tmp_path / "RESULTS.md").read_text()
    assert {f"({p.name})" for p in tmp_path.glob("*.svg")} == set(re.findall(r"\(\S+svg\)", text))


ROOTED = "/srv/r"


def test_files_are_exact_elsewhere_or_not_named(report):
    from bench.correctness import judge

    right = {f"{ROOTED}/m{n + 1}/f{n}" for n in range(4)}
    told = {f"{ROOTED}/m1/f0", f"{ROOTED}/m9/f0", f"{ROOTED}/m9/f1", f"{ROOTED}/m9/f2", "/other"}
    scores = {"x_exact": 1, "x_wrong": 2, "x_none": 1}  # f0 was told both ways
    assert judge("x", right, told) == scores
    right = {f"{ROOTED}/q{n}/f" for n in range(4)}
    told = {f"{ROOTED}/q0/f", f"{ROOTED}/p1/f", f"{ROOTED}/p2/f"}
    assert judge("x", right, told) == scores
    told |= {f"{ROOTED}/p{n}/f" for n in range(9)}
    assert judge("x", right, told) == {"x_exact": 1, "x_wrong": 3, "x_none": 0}


def test_renames_are_judged(report):
    from bench.correctness import judge_cases

    root = Path(ROOTED)
    told = [
        (("renamed",), f"{root}/file/b", f"{root}/file/a"),
        (("deleted",), f"{root}/over/a", None),
        (("modified",), f"{root}/over/b", None),
        (("written",), f"{root}/directory/new/f-directory", None),
        (("created",), f"{root}/ancestor/new/below/f-ancestor", None),
        (("created",), f"{root}/exchange/one/f-exchange", None),
    ]
    assert judge_cases(root, told) == {"cases": 5, "cases_wrong": "-"}
    assert judge_cases(root, [])["cases"] == 0
    one_wrong = [*told, (("written",), f"{root}/exchange/two/f-exchange", None)]
    assert judge_cases(root, one_wrong)["cases_wrong"] == "exchange"
    old_kept = [(("renamed",), f"{root}/file/b", None), *told[1:]]
    assert judge_cases(root, old_kept)["cases_wrong"] == "file"
    of_a_directory = [(("directory_changed",), path, old) for _, path, old in told]
    assert judge_cases(root, of_a_directory)["cases"] == 0


def test_a_correctness_bar_fails_for_one_wrong_run(report):
    from bench.correctness import RUNGS, grid, rows

    good = {
        "chains": 10,
        "chains_missed": 0,
        "cases": 5,
        "pairs": 4,
        "stale": 0,
        **{f"{a}_{b}": 0 for a in ("pairs", "moves") for b in ("wrong", "none")},
        "pairs_exact": 4,
        "moves_exact": 4,
    }
    name = RUNGS[0].name
    verdicts = [
        rows({name: [good, {**good, **change}]})[0]["pass"]
        for change in ({}, {"stale": 1}, {"moves_wrong": 1}, {"chains_missed": 1}, {"cases": 4})
    ]
    assert verdicts == [True, False, False, False, False]
    assert rows({})[0]["pass"] is None
    (entry,) = grid({name: [good, {**good, "chains_missed": 5}]})["rows"]
    assert entry["shares"] == [0.5, 1, 1, 1]


def test_a_rung_that_is_not_there_is_a_row_with_its_reason(report):
    from bench._harness import CONTENDERS, PEERS
    from bench.correctness import ROWS, RUNGS

    assert all(row.contender in CONTENDERS for row in ROWS.values())
    assert set(PEERS) <= set(ROWS)
    assert {row.user for row in RUNGS} == {"root", "nobody"}
    assert {row.filesystem for row in RUNGS} == {"tmpfs", "subvolume", "overlay"}


def test_losses_are_none_told_or_silent(report):
    from bench._harness import CONTENDERS
    from bench.burst import loss, said

    assert (loss(False, False), loss(True, True), loss(True, False)) == (
        *("none", "reported"),
        "not reported",
    )
    peer, shell, mark = (CONTENDERS[n] for n in ("watchdog", "inotifywait", "fsnotifywait"))
    assert said(peer, b'READY\n{"type": "stopped", "lost": 3}\n')
    assert not said(peer, b'READY\n{"type": "stopped", "lost": 0}\n')
    assert said(peer, b"Inotify queue overflowed; filesystem events were lost\n")
    assert said(CONTENDERS["watch --json"], b'{"v":1,"type":"lost","count":4}\n')
    assert said(shell, b"Q_OVERFLOW|/srv/\n")
    assert not said(shell, b"CREATE|/srv/a\n")
    assert said(mark, b"No fid in fanotify event.\n")


def test_what_folds_by_design_is_scored_by_survivors(report):
    from bench._harness import CONTENDERS, KINDS
    from bench.burst import delivered, truth

    root, files = Path(ROOTED), 20
    facts = {kind: len(paths) for kind, paths in truth(root, files).items()}
    alive = sorted(truth(root, files)["renamed"] - truth(root, files)["deleted"])
    assert len(alive) == 2
    line = {"type": "change", "kinds": ["created"], "path": alive[0]}
    output = json.dumps(line).encode() + b'\n{"type": "stopped", "lost": 0}\n'
    score = delivered(CONTENDERS["watchfiles"], output, root, files, facts)
    assert score["survivors"] == 0.5
    assert score["by_kind"]["renamed"] == 1 / files  # a new name is what it has for a rename
    assert score["loss"] == "not reported"
    more = {**line, "path": alive[1]}
    output = json.dumps(more).encode() + b"\n" + output
    score = delivered(CONTENDERS["watchfiles"], output, root, files, facts)
    assert (score["survivors"], score["loss"]) == (1, "none")
    score = delivered(CONTENDERS["watchdog"], output, root, files, facts)
    assert score["by_kind"]["renamed"] == 0
    everything = b"".join(
        json.dumps({"type": "change", "kinds": [kind], "path": path}).encode() + b"\n"
        for kind in KINDS
        for path in truth(root, files)[kind]
    )
    score = delivered(CONTENDERS["watchdog"], everything, root, files, facts)
    assert (score["delivered"], score["survivors"], score["loss"]) == (1, 1, "none")


def test_output_of_the_programs_is_read(report):
    from bench._harness import fatrace_records, inotifywait_records

    text = b"Watches established.\nCREATE,ISDIR|/srv/a\n[fid=1.2.3;name='a'] /srv/a\n"
    text += b"MOVED_FROM|/srv/b (deleted)\nMODIFY,CLOSE_WRITE,CLOSE|/srv/\xff\n"
    assert list(inotifywait_records(text)) == [
        (("created",), "/srv/a", None),
        (("moved_away",), "/srv/b", None),
        (("modified", "written"), "/srv/\udcff", None),
    ]
    text = b"storm(15): CW  /srv/a b\nREADY\nmv(16): <>  /srv\nx(y)(17): W   /srv/c (deleted)\n"
    text += b"rm(9): D   /srv\nsh(10): CO  device 8:2 inode 65\n"
    assert list(fatrace_records(text)) == [
        (("written",), "/srv/a b", None),
        (("directory_changed",), "/srv", None),
        (("modified",), "/srv/c", None),
        (("directory_changed",), "/srv", None),
    ]


def test_each_python_peer_has_an_environment_and_no_other(report):
    from bench._harness import CONTENDERS, PEERS, REQUIREMENTS, environments

    found = environments(REQUIREMENTS.read_text())
    pypi = {n for n in PEERS if CONTENDERS[n].package.startswith("pypi:")}
    assert set(found) == pypi
    for name, wanted in found.items():
        assert any(line.startswith(f"{name}==") for line in wanted)
        assert all("==" in line for line in wanted)
        assert not any(line.startswith(f"{other}==") for other in pypi - {name} for line in wanted)


def test_the_page_is_made_of_results(report):
    from bench import _page

    columns = [["delivered", "facts delivered", ".0%"], ["extra", "not shown", ".0f"]]
    runs = {"c": [{"delivered": d, "extra": 1} for d in (0.5, 1.0, 1.0)]}
    why = {"watchfiles": "Traceback in /tmp/x/y.py: OSError: limit reached", "fatrace": "no | such"}
    kept = {"burst": answer(runs=runs, columns=columns, missing=why)}
    text = _page.BLOCKS["burst"](kept)
    assert "| c | 100% (50% to 100%) |" in text
    assert "not shown" not in text
    assert "/tmp" not in text
    assert "limit reached" in text
    assert "no \\| such" in text
    assert _page.BLOCKS["latency"](kept) == _page.not_measured("latency")
    assert "`python -m bench burst` | today | 3 |" in _page.BLOCKS["machine"](kept)
    assert "--quick" in _page.BLOCKS["machine"]({"burst": answer(quick=True)})
    kept["burst"]["machine"]["watchfiles"] = "9.9"
    assert "| watchfiles | PyPI `watchfiles` | 9.9 |" in _page.BLOCKS["versions"](kept)
    assert "9.9" not in _page.BLOCKS["machine"](kept)
    for render in _page.BLOCKS.values():
        assert render({})


def test_what_hangs_is_killed_with_all_it_started(report, tmp_path):
    """Also what it started itself, and its output until then counts."""
    from bench._harness import READY, Watcher, session

    script = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('READY', flush=True)\n"
        "time.sleep(600)\n"
    )
    watcher = Watcher("x", [sys.executable, "-c", script], READY, None, True, children=True)
    try:
        watcher.wait_ready(60)
        assert len(session(watcher.pid)) == 2
        assert watcher.cpu() > 0
        result = watcher.stop(timeout=0.2)
    finally:
        watcher.kill()
    assert result["ended"] == "killed: it did not end within 0 s"
    assert watcher.output == READY
    end = time.monotonic() + 10
    while session(watcher.pid) and time.monotonic() < end:  # the orphan is reaped by another
        time.sleep(0.01)
    assert session(watcher.pid) == []


def test_what_ends_by_itself_is_said(report):
    from bench._harness import READY, Watcher

    script = "print('READY', flush=True); input(); raise SystemExit(2)"
    watcher = Watcher("x", [sys.executable, "-c", script], READY, None, True)
    try:
        watcher.wait_ready(60)
        assert watcher.quiet(60)
        result = watcher.stop()
    finally:
        watcher.kill()
    assert result["ended"].startswith("ended by itself with status 1")  # EOFError
    assert result["cpu_s"] > 0


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
