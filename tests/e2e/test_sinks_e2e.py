"""Sinks against real programs, and real servers on loopback that misbehave."""

import base64
import hmac
import json
import os
import socket
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from fanwise import FanwiseError
from fanwise.sinks.program import Program
from fanwise.sinks.webhook import Webhook
from tests.loopback import ADDRESS

RECORD = {"type": "incident", "id": "abc", "fs": {"uuid": "u"}, "errno": "EIO", "last_seen": 5.0}
BODY = msgspec.json.encode(RECORD)


def outcome_of(sink, body=BODY):
    """Deliver one record; how that ended."""
    outcomes = []
    sink._tell = outcomes.append
    sink.start()
    sink.offer(body)
    assert sink.close(120.0)
    (outcome,) = outcomes
    return outcome


@pytest.fixture
def script(tmp_path):
    def script(text):
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    return script


def test_a_program_gets_the_record_and_nothing_else(script, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "not for children")
    leak = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(leak, True)
    out = tmp_path / "out"
    program = script(f'cat > {out}.in; env > {out}.env; ls /proc/self/fd > {out}.fd; echo "$1|$2"')
    outcome = outcome_of(Program("p", [program, "$(id)", "a b;c"]))
    os.close(leak)
    assert outcome.reason is None
    assert outcome.output == b"$(id)|a b;c\n"  # never through a shell
    assert json.loads(Path(f"{out}.in").read_text()) == RECORD
    env = Path(f"{out}.env").read_text()
    assert "FANWISE_ERRNO=EIO\n" in env
    assert "SECRET" not in env
    # Three, and the one with which ls reads the directory.
    assert Path(f"{out}.fd").read_text().split() == ["0", "1", "2", "3"]


def test_a_program_that_fails_is_told_with_what_it_said(script):
    outcome = outcome_of(Program("p", [script("echo no such mailbox >&2; exit 3")]))
    assert outcome.reason.endswith("program ended with status 3: no such mailbox")
    outcome = outcome_of(Program("p", [script("kill -SEGV $$")]))
    assert outcome.reason.endswith("ended with signal 11")


def test_the_whole_group_of_a_program_ends_with_its_time(script, tmp_path):
    """It ignores SIGTERM, and so does its child, which holds the pipe."""
    pids = tmp_path / "pids"
    program = script(f"trap '' TERM; sleep 1000 & echo $! $$ > {pids}; wait; sleep 1000")
    began = time.monotonic()
    outcome = outcome_of(Program("p", [program], limit=3.0))  # it has begun by then
    assert outcome.reason.endswith("was killed after 3 s")
    assert time.monotonic() - began < 20
    for pid in pids.read_text().split():
        assert ended(int(pid))


def test_what_a_program_leaves_behind_is_ended_too(script, tmp_path):
    pids = tmp_path / "pids"
    outcome = outcome_of(Program("p", [script(f"sleep 1000 & echo $! > {pids}; exit 0")]))
    assert outcome.reason is None
    assert ended(int(pids.read_text()))


def ended(pid):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
    return False


def test_output_without_end_is_cut_off_and_ends_in_time(script):
    outcome = outcome_of(Program("p", [script("exec cat /dev/zero")], limit=3.0))
    assert "was killed after" in outcome.reason
    assert len(outcome.output) == 64 << 10


def test_a_program_that_does_not_read(script):
    body = msgspec.json.encode(RECORD | {"big": "x" * (1 << 20)})
    assert outcome_of(Program("p", [script("exec <&-; exit 0")]), body).reason is None
    outcome = outcome_of(Program("p", [script("sleep 1000")], limit=0.3), body)
    assert "was killed after" in outcome.reason


def test_the_end_stops_a_program(script, tmp_path):
    pids = tmp_path / "pids"
    sink = Program("p", [script(f"echo $$ > {pids}; sleep 1000")], limit=500)
    outcomes = []
    sink._tell = outcomes.append
    sink.start()
    sink.offer(BODY)
    until = time.monotonic() + 20
    while not (pids.exists() and pids.read_text()) and time.monotonic() < until:
        time.sleep(0.01)
    assert sink.close(0.1)
    assert "the end came" in outcomes[0].reason
    assert ended(int(pids.read_text()))


@pytest.mark.parametrize("argv", [["relative"], ["/nonexistent"], ["/etc/passwd"], ["/etc"]])
def test_what_is_no_program_is_refused_at_the_start(argv):
    with pytest.raises(FanwiseError, match="sink p: "):
        Program("p", argv).start()


@contextmanager
def server(*answers, context=None):
    """Takes one connection an answer. An answer gets the request and the connection."""
    listening = socket.create_server(("127.0.0.1", 0))
    requests, ended = [], threading.Event()

    def context_of(accepted):
        return context.wrap_socket(accepted, server_side=True) if context else accepted

    def serve():
        for answer in answers:
            accepted, _ = listening.accept()
            accepted.settimeout(60)
            try:
                with accepted, context_of(accepted) as connection:
                    requests.append(request_on(connection))
                    answer(connection, ended)
            except OSError:
                continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield (
            f"http{'s' if context else ''}://localhost:{listening.getsockname()[1]}/hook?a=b",
            requests,
        )
    finally:
        ended.set()
        thread.join(120)
        listening.close()


def request_on(connection):
    data = b""
    while b"\r\n\r\n" not in data:
        data += received(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
    while len(body) < int(headers["content-length"]):
        body += received(connection)
    return first, headers, body


def received(connection):
    data = connection.recv(65536)
    if not data:
        raise ConnectionError
    return data


def says(status, headers="", body=""):
    text = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{headers}\r\n{body}"
    return lambda connection, ended: connection.sendall(text.encode())


def hangs(connection, ended):
    ended.wait(120)


def drips(connection, ended):
    """A byte at a time: no single wait is long."""
    for byte in b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10000:
        connection.sendall(bytes([byte]))
        if ended.wait(0.05):
            return


def closes(connection, ended):
    connection.close()


def nonsense(connection, ended):
    connection.sendall(b"\0\xff" * 100 + b"\r\n\r\n")


def endless(connection, ended):
    connection.sendall(b"HTTP/1.1 503 X\r\n\r\n")
    while not ended.is_set():
        connection.sendall(b"x" * 65536)


QUICK = {"backoff": 0.01, "limit": 60.0, "host": "h"}


def test_an_event_arrives_signed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"0123456789abcdef")
    secret.chmod(0o600)
    with server(says(204)) as (url, requests):
        outcome = outcome_of(Webhook("w", url, secret=secret, **QUICK))
    assert (outcome.reason, outcome.attempts) == (None, 1)
    ((first, headers, body),) = requests
    assert first == "POST /hook?a=b HTTP/1.1"
    assert headers["content-type"] == "application/cloudevents+json; charset=utf-8"
    event = json.loads(body)
    assert event["data"] == RECORD
    assert event["id"] == headers["webhook-id"]
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    signed = b".".join((event["id"].encode(), headers["webhook-timestamp"].encode(), body))
    mac = base64.b64encode(hmac.digest(b"0123456789abcdef", signed, "sha256")).decode()
    assert headers["webhook-signature"] == f"v1,{mac}"


@pytest.mark.parametrize("answer", [closes, nonsense, says(500), says(503), says(429), says(408)])
def test_what_may_pass_is_tried_again_under_the_same_id(answer):
    with server(answer, answer, says(200)) as (url, requests):
        outcome = outcome_of(Webhook("w", url, tries=3, **QUICK))
    assert (outcome.reason, outcome.attempts) == (None, 3)
    assert len({headers["webhook-id"] for _, headers, _ in requests}) == 1
    assert len({body for *_, body in requests}) == 1


@pytest.mark.parametrize("answer", [hangs, drips, endless])
def test_a_try_has_a_deadline_over_all_of_it(answer):
    with server(answer) as (url, _):
        outcome = outcome_of(Webhook("w", url, tries=1, **QUICK | {"limit": 0.5}))
    assert "in time" in outcome.reason or "503" in outcome.reason
    assert len(outcome.output) <= 4096
    assert outcome.seconds < 10


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_refused_and_not_followed(status):
    with (
        server(says(200)) as (other, never),
        server(says(status, f"Location: {other}\r\n")) as (url, requests),
    ):
        outcome = outcome_of(Webhook("w", url, **QUICK))
        assert never == []
        socket.create_connection(("localhost", int(other.split(":")[2].split("/")[0]))).close()
    assert len(requests) == 1
    assert f"redirected to '{other}', which is refused; write that URL" in outcome.reason


@pytest.mark.parametrize("status", [400, 401, 404, 410])
def test_what_does_not_pass_is_not_tried_again(status):
    with server(says(status, body="go away")) as (url, requests):
        outcome = outcome_of(Webhook("w", url, **QUICK))
    assert len(requests) == 1
    assert outcome.reason.endswith(f"answered {status}: go away")


def test_a_server_says_when_to_come_back():
    began = time.monotonic()
    with server(says(503, "Retry-After: 1\r\n"), says(200)) as (url, _):
        outcome = outcome_of(Webhook("w", url, **QUICK))
    assert outcome.reason is None
    assert time.monotonic() - began >= 1
    began = time.monotonic()
    with server(says(503, "Retry-After: 86400\r\n"), says(200)) as (url, _):
        outcome = outcome_of(Webhook("w", url, most=0.1, **QUICK))
    assert outcome.reason is None
    assert time.monotonic() - began < 20


def test_nobody_listens():
    with socket.create_server((ADDRESS, 0)) as listening:
        port = listening.getsockname()[1]
    outcome = outcome_of(Webhook("w", f"http://{ADDRESS}:{port}/", tries=2, **QUICK))
    assert outcome.reason == f"{ADDRESS}:{port}: Connection refused (2 tries)"


def test_a_server_that_hangs_does_not_hold_up_who_calls_or_the_end():
    with server(hangs) as (url, requests):
        outcomes = []
        sink = Webhook("w", url, limit=500, room=4, tell=outcomes.append)
        sink.start()
        began = time.monotonic()
        for _ in range(1000):
            sink.offer(BODY)
        assert time.monotonic() - began < 5
        until = time.monotonic() + 60
        while not requests and time.monotonic() < until:
            time.sleep(0.01)
        assert sink.close(0.1)
        assert time.monotonic() - began < 30
    counts = sink.counts()
    assert counts.dropped >= 994
    assert counts.failed + counts.dropped == 1000


@pytest.fixture
def certificate(tmp_path, cannot_run):
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    try:
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"),
                *("ec_paramgen_curve:P-256", "-nodes", "-keyout", key, "-out", cert),
                *("-days", "2", "-subj", "/CN=localhost"),
                *("-addext", "subjectAltName=DNS:localhost"),
            ],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        cannot_run("making a certificate needs openssl")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return cert, context


def test_tls_is_checked(certificate):
    cert, context = certificate
    with server(says(200), context=context) as (url, requests):
        assert outcome_of(Webhook("w", url, ca=cert, **QUICK)).reason is None
        assert requests[0][1]["host"] == url.split("/")[2]
    with server(says(200), context=context) as (url, requests):
        outcome = outcome_of(Webhook("w", url, tries=1, **QUICK))
        assert "certificate verify failed" in outcome.reason.lower()
        assert requests == []
