"""From a rule file to what arrives: every kind of action, and a file on what fails."""

import json
import os
from pathlib import Path

import pytest

from fanwise import FanwiseError
from fanwise.health._actions import Actions
from fanwise.health._rules import load

from .test_sinks_e2e import says, server


def record(**changes):
    return {
        "type": "incident",
        "id": "abc",
        "fs": {"uuid": "u", "fstype": "ext4", "device": "7:250", "devices": ["8:250"]},
        "object": {"ino": 14},
        "errno": "EIO",
        "total": 1,
        "last_seen": 5.0,
    } | changes


@pytest.fixture
def rules(tmp_path):
    def rules(text):
        path = tmp_path / "rules.toml"
        path.write_text(text)
        path.chmod(0o600)
        return load(path)

    return rules


def test_every_kind_of_action_is_carried_out(rules, tmp_path):
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\necho "$1 $FANWISE_ERRNO" > {tmp_path}/said\n')
    program.chmod(0o755)
    secret = tmp_path / "secret"
    secret.write_bytes(b"0123456789abcdef")
    secret.chmod(0o600)
    outcomes = []
    with server(says(200)) as (url, requests):
        found = rules(
            f"""
[action.mail]
kind = "exec"
program = "{program}"
arguments = ["x"]
[action.page]
kind = "webhook"
url = "{url}"
secret_file = "{secret}"
[action.file]
kind = "log"
file = "{tmp_path}/log"
[[rule]]
name = "all"
actions = ["mail", "page", "file"]
match.errno = "EIO"
"""
        )
        with Actions(found, outcomes.append) as actions:
            assert actions.offer(record(errno="EBADMSG")) == []
            assert actions.offer(record()) == ["mail", "page", "file"]
            assert actions.close(120.0) == []
            counts = actions.counts()
    assert sorted((x.sink, x.reason) for x in outcomes) == [
        ("file", None),
        ("mail", None),
        ("page", None),
    ]
    assert {name: c["delivered"] for name, c in counts.items()} == dict.fromkeys(counts, 1)
    assert (tmp_path / "said").read_text() == "x EIO\n"
    assert json.loads((tmp_path / "log").read_text()) == record()
    ((_, headers, body),) = requests
    assert json.loads(body)["data"] == record()
    assert "webhook-signature" in headers


def test_a_log_on_what_fails_is_not_written(rules, tmp_path):
    found = rules(
        f'[action.file]\nkind = "log"\nfile = "{tmp_path}/log"\n'
        '[[rule]]\nname = "all"\nactions = ["file"]\n'
    )
    dev = os.stat(tmp_path).st_dev
    here = f"{os.major(dev)}:{os.minor(dev)}"
    with Actions(found) as actions:
        assert actions.offer(record(fs={"uuid": "u", "device": here})) == []
        assert actions.offer(record(fs={"uuid": "u", "device": "9:9", "devices": [here]})) == []
        assert actions.offer(record()) == ["file"]
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    assert actions.counts()["file"]["withheld"] == 2


def test_one_that_cannot_start_stops_the_others(rules, tmp_path):
    found = rules(
        f'[action.a]\nkind = "log"\nfile = "{tmp_path}/log"\n'
        f'[action.b]\nkind = "log"\nfile = "{tmp_path}/dir"\n'
        '[[rule]]\nname = "all"\nactions = ["a", "b"]\n'
    )
    Path(tmp_path / "dir").mkdir()
    actions = Actions(found)
    with pytest.raises(FanwiseError, match=r"sink b: .*/dir: .*name a file that can be"):
        actions.start()
    assert [sink.state for sink in actions._sinks.values()] == ["CLOSED", "CLOSED"]
