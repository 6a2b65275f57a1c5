"""`fanwise doctor` and `capabilities`: what they say is what then happens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import fanwise as public
from fanwise.cli import _doctor

FEATURES = [
    "target_fid", "unlimited_queue", "filesystem_mark", "rename", "handles", "open_by_handle",
]  # fmt: skip


def features(place):
    return {name: f["works"] for name, f in place["capabilities"]["features"].items()}


def test_a_path_that_can_be_watched(run, scratch):
    status, out, err = run("doctor", "--json", scratch)
    assert (status, err) == (0, "")
    assert out.count("\n") == 1
    report = json.loads(out)
    assert report["v"] == 1
    assert report["uid"] == 0
    assert report["kernel"] == os.uname().release
    (place,) = report["paths"]
    assert features(place) == dict.fromkeys(FEATURES, True)
    found = place["capabilities"]
    assert (found["path"], found["fstype"]) == (str(scratch), "tmpfs")
    assert (found["rung"], found["reason"], found["remedy"]) == ("filesystem-mark", None, None)
    assert found["decoder"] in ("native", "pure")
    assert found["capabilities"] == ["CAP_SYS_ADMIN", "CAP_DAC_READ_SEARCH"]
    for name, value in found["limits"].items():
        assert value == int(Path("/proc/sys", name.replace(".", "/")).read_text())
    assert "fs.fanotify.max_user_groups" in found["limits"]
    with public.watch(scratch) as changes:  # as it said
        assert changes.roots == ((str(scratch), found["rung"], "tmpfs"),)


def test_the_same_for_people(run, scratch):
    status, out, err = run("doctor", scratch)
    assert (status, err) == (0, "")
    assert f"{scratch} on tmpfs: can be watched (filesystem-mark)\n" in out
    for head in ("kernel   ", "user     uid 0 with CAP_SYS_ADMIN", "decoder  ", "limits   fs."):
        assert f"\n{head}" in f"\n{out}"
    assert out.count("\n  yes  ") - out.count("\n  yes  health:") == len(FEATURES)
    for name in ("errors by fanotify", "error tracepoints", "error counters", "the kernel's log"):
        assert f"  health: {name}" in out


@pytest.mark.parametrize("path", ["/proc", "/sys"])
def test_a_filesystem_that_tells_no_names(run, path):
    status, out, err = run("doctor", "--json", path)
    assert (status, err) == (0, "")
    found = json.loads(out)["paths"][0]["capabilities"]
    assert (found["rung"], found["reason"], found["remedy"]) == ("proc-like", None, None)
    assert set(found["refused"]) == {"filesystem-mark", "inode-marks"}
    assert found["guarantees"]["names"].startswith("none")
    status, out, _ = run("doctor", path)
    assert status == 0
    assert f"{path} on {found['fstype']}: can be watched (proc-like)" in out
    assert f"    names: {found['guarantees']['names']}\n" in out
    assert f"  not by inode-marks: {found['refused']['inode-marks']['reason']}" in out


def test_a_path_that_does_not_exist(run, scratch):
    status, out, err = run("doctor", "--json", scratch, "/nonexistent")
    assert (status, err) == (1, "")
    fine, missing = json.loads(out)["paths"]
    assert fine["type"] == "place"
    assert missing == {
        "type": "unreachable",
        "path": "/nonexistent",
        "reason": "it does not exist",
        "remedy": "give an existing file or directory",
    }
    status, out, err = run("doctor", "/nonexistent")
    assert (status, err) == (1, "")
    assert "/nonexistent: cannot be watched: it does not exist; give an existing" in out


def test_without_a_path_it_is_the_first_filesystem_and_fine(run):
    status, out, err = run("doctor")
    assert (status, err) == (0, "")
    assert "\n/ on " in out


def test_why_it_is_pure(run):
    _, out, _ = run("doctor", environ={"FANWISE_PURE": "1"})
    assert "\ndecoder  pure, because FANWISE_PURE=1\n" in out


def test_the_schema_is_published_and_true(run):
    status, out, err = run("doctor", "--schema")
    assert (status, err) == (0, "")
    assert {"Report", "Place", "Unreachable", "Capabilities", "Feature", "Channel"} == set(
        json.loads(out)["$defs"]
    )
    _, out, _ = run("doctor", "--json", "/", "/proc", "/nonexistent")
    assert msgspec.json.encode(msgspec.json.decode(out, type=_doctor.Report)) == out[:-1].encode()


def test_nothing_of_the_trial_stays(scratch):
    def ours():
        return {
            (fd.name, os.readlink(fd)) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()
        }

    before = ours()
    public.capabilities(scratch)
    assert ours() == before
    # Nothing holds the filesystem either: the fixture unmounts it.


def test_nobody(cannot_run):
    if os.geteuid():
        cannot_run("becoming nobody needs root")
    text = (
        "import os, sys, locale, fanwise, fanwise.cli._main, fanwise.cli._doctor\n"
        "from fanwise.cli import main\n"
        "[getattr(fanwise, name) for name in fanwise.__all__]\n"
        "fanwise.capabilities('/')\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", text, "doctor", "--json", "/"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    (place,) = json.loads(done.stdout)["paths"]
    assert features(place) | {"rename": None} == {
        "target_fid": True,
        "unlimited_queue": False,
        "filesystem_mark": False,
        "rename": None,  # as the mode of / has it
        "handles": True,
        "open_by_handle": False,
    }
    found = place["capabilities"]
    assert found["rung"] == "inode-marks"
    refused = found["refused"]["filesystem-mark"]
    assert "needs CAP_SYS_ADMIN" in refused["reason"]
    assert refused["remedy"] == "run as root or grant CAP_SYS_ADMIN"
    assert "else of this one" in found["guarantees"]["pids"]
    assert found["capabilities"] == []
