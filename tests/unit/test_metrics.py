"""Metrics: the text format as promtool sees it, the file, the server, and clients that are slow."""

import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import get_args

import pytest

from fanwise import FanwiseError
from fanwise.health._incident import SEVERITY, State
from fanwise.health._incidents_db import SCHEMA, Incidents, Total
from fanwise.metrics import health, textfile
from fanwise.metrics.health import METRICS, STATES, Delays, samples
from fanwise.metrics.server import Server, parse_address
from fanwise.metrics.text import Histogram, Metric, Sample, render
from fanwise.store.database import Store
from tests.loopback import ADDRESS

_spec = spec_from_file_location("promtool", Path(__file__).with_name("promtool.py"))
promtool = module_from_spec(_spec)
_spec.loader.exec_module(promtool)

FS = {"uuid": "0f00-1", "device": "7:3", "fstype": "ext4", "mounts": ["/srv", '/mnt/\n"b\\']}


def everything():
    delays = Delays()
    for delay in (0.0005, 0.001, 0.003, 9.0, -1.0):
        delays.add(delay)
    return samples(
        totals=[Total("0f00-1", "7:3", "ext4", "EIO", "inode", 3), Total("", "", "", "", "fs", 1)],
        open_incidents=[
            {"fs": FS, "first_seen": 5.5, "last_seen": 9.0},
            {"fs": FS, "first_seen": 4.0, "last_seen": 8.0},
        ],
        filesystems=[FS | {"state": "emergency_ro"}],
        warnings={("0f00-1", "7:3", "ext4"): 2},
        writeback={("7:3", "data"): 1, ("7:3", "metadata"): 2},
        device_errors={("sda", "corruption"): 1 << 62},
        sources={"fserror": True, "trace": False},
        lost={"trace": 7},
        delays=delays,
        listening_until=1700000000.5,
        actions={"page": {"delivered": 3, "failed": 0}},
    )


def test_promtool_finds_nothing_to_say(cannot_run):
    assert promtool.check(cannot_run, "check", "metrics", text=render(everything())) == (0, "")
    status, said = promtool.check(cannot_run, "check", "metrics", text=b"a_total{x=1} y\n")
    assert status != 0
    assert said


def test_values_and_labels():
    lines = render(everything()).decode().splitlines()
    for line in [
        'fanwise_fs_errors_total{uuid="0f00-1",device="7:3",fstype="ext4",errno="EIO",'
        'scope="inode"} 3',
        'fanwise_fs_first_error_timestamp_seconds{uuid="0f00-1",device="7:3",fstype="ext4"} 4',
        'fanwise_fs_last_error_timestamp_seconds{uuid="0f00-1",device="7:3",fstype="ext4"} 9',
        'fanwise_fs_incidents_open{uuid="0f00-1",device="7:3",fstype="ext4"} 2',
        'fanwise_fs_state{uuid="0f00-1",device="7:3",fstype="ext4",state="emergency_ro"} 1',
        'fanwise_fs_state{uuid="0f00-1",device="7:3",fstype="ext4",state="ok"} 0',
        'fanwise_fs_info{uuid="0f00-1",device="7:3",fstype="ext4",mountpoint="/mnt/\\n\\"b\\\\"} 1',
        'fanwise_fs_device_errors_total{device="sda",type="corruption"} 4611686018427387904',
        'fanwise_health_source_up{source="trace"} 0',
        'fanwise_health_event_delay_seconds_bucket{le="0.001"} 3',
        'fanwise_health_event_delay_seconds_bucket{le="5"} 4',
        'fanwise_health_event_delay_seconds_bucket{le="+Inf"} 5',
        "fanwise_health_event_delay_seconds_count 5",
        "fanwise_health_listening_until_timestamp_seconds 1700000000.5",
    ]:
        assert line in lines
    names = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert names == {metric.name for metric in METRICS}


def test_names_are_as_the_conventions_want():
    for metric in METRICS:
        assert metric.name.startswith("fanwise_")
        # The mount point joins node_exporter's series; nothing else that could grow is there.
        assert not {"path", "ino", "pid", "message", "comm"} & set(metric.labels)
        assert ("mountpoint" in metric.labels) == (metric is health.INFO)


def test_an_ok_filesystem_has_its_series_too():
    text = render(samples(filesystems=[FS | {"state": "ok"}])).decode()
    assert 'fanwise_fs_incidents_open{uuid="0f00-1",device="7:3",fstype="ext4"} 0' in text
    assert 'state="ok"} 1' in text


def test_totals_go_on_after_a_restart(tmp_path):
    record = {
        "fs": FS,
        "scope": "fs",
        "errno": "EIO",
        "total": 4,
        "first_seen": 1.0,
        "last_seen": 1.0,
    }
    texts = []
    for total in (4, 6):
        with Store(tmp_path / "i.db", SCHEMA, "write") as store:
            db = Incidents(store)
            stored = db.put(record | {"total": total, "last_seen": float(total)})
            if total == 6:
                db.resolve(stored.id, 10.0, "checked")
                db.prune(11.0)
            texts.append(render(samples(totals=db.totals())).decode())
    values = [re.search(r"fanwise_fs_errors_total\{.*\} (\d+)", text)[1] for text in texts]
    assert values == ["4", "6"]


@pytest.mark.parametrize("name", ["", "1a", "a-b", "a b", "x\n"])
def test_wrong_names_are_refused(name):
    with pytest.raises(ValueError, match="is no name"):
        Metric(name, "gauge", "x")
    with pytest.raises(ValueError, match="is no name"):
        Metric("a", "gauge", "x", (name,))


def test_wrong_samples_are_refused():
    with pytest.raises(ValueError, match="end in _total"):
        Metric("a", "counter", "x")
    metric = Metric("a", "gauge", "x", ("l",))
    with pytest.raises(ValueError, match="has the labels"):
        render({metric: [Sample((), 1)]})
    with pytest.raises(ValueError, match="twice"):
        render({metric: [Sample(("x",), 1), Sample(("x",), 2)]})


def test_odd_numbers_and_texts(cannot_run):
    metric = Metric("a", "gauge", "x\n\\", ("l",))
    values = [float("inf"), float("-inf"), float("nan"), 1e300, -0.0, 1.5e-9, 1 << 70]
    rows = [Sample((f"\udcff\0{n}\u2028",), v) for n, v in enumerate(values)]
    histogram = Metric("h", "histogram", "x")
    text = render({metric: rows, histogram: [Histogram((), (0.5,), (1, 2), 3.0)]})
    text.decode()
    assert len(text.splitlines()) == 2 + 7 + 6
    status, said = promtool.check(cannot_run, "check", "metrics", text=text)
    assert "error" not in said
    assert status in (0, 3)  # 3: its taste in names


def test_the_file_is_old_or_new(tmp_path):
    path = tmp_path / "fanwise.prom"
    textfile.write(path, b"a 1\n")
    textfile.write(path, b"a 2\n")
    assert path.read_bytes() == b"a 2\n"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["fanwise.prom"]
    with pytest.raises(FanwiseError, match=r"end in \.prom only"):
        textfile.write(tmp_path / "x.txt", b"")
    with pytest.raises(FanwiseError, match="cannot be written: No such file"):
        textfile.write(tmp_path / "none" / "x.prom", b"")
    (tmp_path / "d.prom").mkdir()
    with pytest.raises(FanwiseError, match="cannot be written"):
        textfile.write(tmp_path / "d.prom", b"")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.prom", "fanwise.prom"]


def test_a_kill_leaves_the_old_file(tmp_path):
    """A writer that writes without end is killed; the file is always whole."""
    path = tmp_path / "f.prom"
    text = (
        "import sys; from pathlib import Path; from fanwise.metrics import textfile\n"
        "n = 0\nwhile True:\n n += 1; textfile.write(Path(sys.argv[1]), b'%09d\\n' % n * 5000)\n"
        " n == 1 and print(flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", text, path], stdout=subprocess.PIPE)
    process.stdout.readline()
    for _ in range(50):
        assert len(path.read_bytes()) == 50000
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(set(path.read_bytes().split())) == 1


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9899", ("127.0.0.1", 9899)),
        (":9899", ("127.0.0.1", 9899)),
        ("localhost:0", ("localhost", 0)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_addresses(text, address):
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", ":", "x", "::1:80", "h:99999", "h:-1", "[x]:80", "h:8\u0660"])
def test_wrong_addresses(text):
    with pytest.raises(FanwiseError, match="is no address; write"):
        parse_address(text)


@pytest.fixture
def server():
    with Server(f"{ADDRESS}:0", deadline=60.0) as server:
        server.publish(lambda: b"a 1\n")
        yield server


def get(server, path="/metrics", **options):
    url = f"http://{server.host}:{server.port}{path}"
    request = urllib.request.Request(url, **options)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def test_what_was_published_is_served(server):
    status, headers, body = get(server)
    assert (status, body) == (200, b"a 1\n")
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    big = b"x 1\n" * 1_000_000
    server.publish(lambda: big)
    assert get(server)[2] == big
    assert get(server, method="HEAD")[2] == b""
    assert get(server, "/metrics?x=1")[0] == 200
    assert get(server, "/")[0] == 404
    assert get(server, data=b"x")[0] == 405
    server.publish(lambda: 1 // 0)
    assert get(server)[0] == 500
    server.publish(lambda: b"a 2\n")
    assert get(server)[2] == b"a 2\n"


@pytest.mark.parametrize(
    "text", [b"\r\n\r\n", b"x" * 20000, b"GET /metrics\r\n\r\n", b"\xff \0 H\r\n\r\n"]
)
def test_nonsense_is_answered(server, text):
    with socket.create_connection((server.host, server.port), 60) as client:
        client.sendall(text)
        assert client.recv(100).startswith(b"HTTP/1.1 400 ")
    assert get(server)[0] == 200


def test_slow_clients_hold_nobody_up():
    """Some say nothing, some a part, some do not read; a hundred of them."""
    with Server(f"{ADDRESS}:0", deadline=5.0) as server:
        slow_clients(server)


def slow_clients(server):
    server.publish(lambda: b"a 1\n" * 2_000_000)
    slow = []
    for n in range(100):
        client = socket.create_connection((server.host, server.port), 60)
        if n % 3 == 1:
            client.sendall(b"GET /metr")
        elif n % 3 == 2:
            client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        slow.append(client)
    began = time.monotonic()
    assert len(get(server)[2]) == 8_000_000
    assert time.monotonic() - began < 20
    # Each of the slow ones is ended by the server, sooner or later.
    for client in slow:
        try:
            while client.recv(1 << 20):
                pass
        except ConnectionError:
            pass
        client.close()
    assert threading.active_count() < 10


def test_there_are_never_too_many_clients():
    """However long each may take: the oldest ones are ended for the newest."""
    with Server(f"{ADDRESS}:0", deadline=60.0) as server:
        server.publish(lambda: b"a 1\n")
        idle = [socket.create_connection((server.host, server.port), 60) for _ in range(40)]
        assert get(server)[2] == b"a 1\n"
        for client in idle[:8]:
            assert client.recv(1) == b""
        idle[-1].sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert idle[-1].recv(100).startswith(b"HTTP/1.1 200")
        for client in idle:
            client.close()


def test_an_address_that_is_taken(server):
    with pytest.raises(FanwiseError, match="Address already in use"):
        Server(f"{server.host}:{server.port}").start()


def test_a_fork_does_not_keep_the_port():
    text = """
import os, socket, sys
from fanwise.metrics.server import Server
server = Server(sys.argv[1])
server.start()
read, write = os.pipe()
there, say = os.pipe()
pid = os.fork()
if pid == 0:
    os.close(write)
    os.write(say, b"x")
    os.read(read, 1)
    os._exit(0)
os.read(there, 1)
server.close()
socket.create_server((server.host, server.port)).close()
os.close(write)
os.waitpid(pid, 0)
print("free")
"""
    argv = [sys.executable, "-c", text, f"{ADDRESS}:0"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.stdout == "free\n", done.stderr


def test_the_states_are_those_of_incidents():
    """metrics is to the left of health, and has a list of its own."""
    assert tuple(SEVERITY) == STATES
    assert set(STATES) == set(get_args(State))
