"""The parts of sinks that need no other process: rates, counts, events, signatures."""

import base64
import hashlib
import hmac
import json
import os
import random
import subprocess
import sys
import threading
import time

import msgspec
import pytest

from fanwise import ClosedError, FanwiseError
from fanwise.sinks import cloudevent
from fanwise.sinks.bucket import Bucket
from fanwise.sinks.log import Log
from fanwise.sinks.program import environment
from fanwise.sinks.sink import Delivery, Failed, Sink
from fanwise.sinks.webhook import Webhook, read_secret, retry_after, wrong_url

RECORD = {
    "type": "incident",
    "id": "abc",
    "fs": {"uuid": "0f00 1/2", "fstype": "ext4", "mounts": ["/srv", "/mnt\n2"]},
    "object": {"ino": 14, "path": None},
    "errno": "EIO",
    "total": 3,
    "last_seen": 1700000000.25,
}


def encoded(**changes):
    return msgspec.json.encode(RECORD | changes)


def test_a_bucket_lets_through_what_it_says():
    bucket = Bucket(2.0, 3)
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False]
    assert bucket.wait(100.0) == pytest.approx(0.5)
    assert bucket.take(100.5)
    assert not bucket.take(100.5)
    assert not bucket.take(50.0)  # a clock that goes back gives nothing
    assert [bucket.take(1000.0) for _ in range(4)] == [True, True, True, False]


def test_over_a_long_time_a_bucket_keeps_its_rate():
    rng, now = random.Random(1), 0.0
    bucket, passed = Bucket(5.0, 10), 0
    while now < 1000:
        passed += bucket.take(now)
        now += rng.expovariate(50)
    assert 4990 < passed <= 5011


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (-1, 1), (1, 0)])
def test_a_bucket_that_lets_nothing_through_is_refused(rate, burst):
    with pytest.raises(ValueError, match="a rate is more than 0"):
        Bucket(rate, burst)


class Gate(Sink):
    """Delivers when it is let, and keeps what it delivered."""

    def __init__(self, **options):
        super().__init__("gate", **options)
        self.let = threading.Semaphore(0)
        self.began = threading.Semaphore(0)
        self.got = []

    def deliver(self, delivery):
        self.began.release()
        while not self.let.acquire(timeout=0.01):
            if self.stopping.is_set():
                raise Failed("stopped")
        if delivery.record["errno"] == "BAD":
            raise Failed("bad")
        if delivery.record["errno"] == "BUG":
            raise ZeroDivisionError("bug")
        self.got.append(delivery.record)


def test_offering_never_waits_and_what_has_no_room_is_counted_and_told():
    outcomes = []
    sink = Gate(room=2, tell=outcomes.append)
    with pytest.raises(ClosedError):
        sink.offer(encoded())
    sink.start()
    assert sink.offer(encoded(n=0))
    assert sink.began.acquire(timeout=30)
    assert [sink.offer(encoded(n=n)) for n in range(1, 6)] == [True, True, False, False, False]
    counts = sink.counts()
    assert (counts.offered, counts.dropped, counts.queued) == (6, 3, 3)
    for _ in range(3):
        sink.let.release()
    assert sink.close()
    assert [(r["n"], r.get("dropped")) for r in sink.got] == [(0, None), (1, 3), (2, None)]
    assert [x.reason for x in outcomes] == [None] * 3
    with pytest.raises(ClosedError):
        sink.offer(encoded())
    assert sink.counts().queued == 0


class Standing(Bucket):
    """Its clock is told the time."""

    now = 0.0

    def take(self, now):
        return super().take(self.now)

    def wait(self, now):
        return super().wait(self.now)


def test_what_comes_too_often_is_counted_and_the_last_of_it_is_told():
    bucket = Standing(20.0, 2)
    sink = Gate(bucket=bucket)
    for _ in range(10):
        sink.let.release()
    with sink:
        taken = [sink.offer(encoded(n=n)) for n in range(9)]
        assert taken == [True, True] + [False] * 7
        bucket.now = 0.05
        until = time.monotonic() + 30
        while len(sink.got) < 3 and time.monotonic() < until:
            sink.began.acquire(timeout=0.1)
    assert [r["n"] for r in sink.got] == [0, 1, 8]
    assert sum(r.get("suppressed", 0) for r in sink.got) == 6
    counts = sink.counts()
    assert (counts.suppressed, counts.delivered, counts.queued) == (6, 3, 0)


def test_at_the_end_the_last_one_does_not_wait_for_its_turn():
    sink = Gate(bucket=Bucket(0.001, 1))
    for _ in range(10):
        sink.let.release()
    sink.start()
    for n in range(5):
        sink.offer(encoded(n=n))
    assert sink.close(30.0)
    assert [r["n"] for r in sink.got] == [0, 4]
    assert sum(r.get("suppressed", 0) for r in sink.got) == 3


def test_a_failure_is_told_and_the_rest_goes_on():
    outcomes = []
    sink = Gate(tell=outcomes.append)
    for _ in range(10):
        sink.let.release()
    bodies = [encoded(errno="BAD"), encoded(errno="BUG"), b"{", b"[1]", b"\xff", encoded()]
    with sink:
        for body in bodies:
            sink.offer(body)
    assert [x.reason and x.reason[:20] for x in outcomes] == [
        "bad",
        "ZeroDivisionError: b",
        "the record is not JS",
        "the record is not a ",
        "the record is not JS",
        None,
    ]
    counts = sink.counts()
    assert (counts.failed, counts.delivered, counts.offered) == (5, 1, 6)


def test_what_a_failed_delivery_should_have_told_the_next_one_tells():
    sink = Gate(room=1)
    sink.start()
    sink.offer(encoded(errno="BAD"))
    assert sink.began.acquire(timeout=30)
    sink.offer(encoded(errno="BAD"))
    sink.offer(encoded())  # dropped
    sink.let.release(2)
    assert sink.began.acquire(timeout=30)
    until = time.monotonic() + 30
    while sink.counts().queued and time.monotonic() < until:
        time.sleep(0)
    sink.offer(encoded())
    sink.let.release()
    sink.close(30.0)
    assert [r.get("dropped") for r in sink.got] == [1]


def test_closing_has_a_deadline_and_counts_what_is_left():
    sink = Gate()
    sink.start()
    for _ in range(4):
        sink.offer(encoded())
    assert sink.began.acquire(timeout=30)
    began = time.monotonic()
    assert sink.close(0.05)
    assert time.monotonic() - began < 10
    counts = sink.counts()
    assert (counts.failed, counts.dropped, counts.queued) == (1, 3, 0)


class Deaf(Gate):
    def deliver(self, delivery):
        self.began.release()
        self.let.acquire()


def test_a_delivery_that_does_not_stop_is_left_alone_and_said():
    sink = Deaf()
    sink.start()
    sink.offer(encoded())
    assert sink.began.acquire(timeout=30)
    assert sink.close(0.01) is False
    sink.let.release()


def test_a_forked_child_has_no_sink():
    text = """
import os
from fanwise.sinks.log import Log
from fanwise import ClosedError
sink = Log("l", 1)
sink.start()
sink.offer(b'{"n":1}')
if os.fork() == 0:
    try:
        sink.offer(b'{"n":2}')
    except ClosedError:
        os.write(1, b"closed\\n")
    sink.close()
    os._exit(0)
os.wait()
sink.close()
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert sorted(done.stdout.splitlines()) == ["closed", '{"n":1}'], done.stderr


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_log_appends_and_follows_a_rotation(tmp_path):
    path = tmp_path / "log"
    path.write_text('{"n":"old"}\n')
    done = threading.Semaphore(0)
    with Log("l", path, tell=lambda _: done.release()) as sink:
        sink.offer(encoded(n=1))
        assert done.acquire(timeout=30)
        path.rename(tmp_path / "log.1")
        sink.offer(encoded(n=2))
        assert done.acquire(timeout=30)
        path.unlink()
        sink.offer(encoded(n=3))
    assert [r["n"] for r in lines(tmp_path / "log.1")] == ["old", 1]
    assert [r["n"] for r in lines(path)] == [3]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/null", p)])
def test_log_writes_to_plain_files_only(tmp_path, make):
    make(tmp_path / "log")
    with pytest.raises(FanwiseError, match=r"sink l: .*log"):
        Log("l", tmp_path / "log").start()


def test_log_to_a_reader_that_does_not_read(tmp_path):
    """A full pipe: nothing waits but the sink's thread, and the end comes in time."""
    read, write = os.pipe()
    outcomes = []
    sink = Log("l", write, tell=outcomes.append)
    sink.start()
    for n in range(100):
        sink.offer(encoded(n=n, padding="x" * 5000))
    assert sink.close(0.1)
    assert "did not take it" in outcomes[-1].reason
    counts = sink.counts()
    assert counts.delivered + counts.failed + counts.dropped == 100
    assert counts.dropped > 50
    os.close(read)
    os.close(write)


def test_log_to_a_closed_pipe_fails_and_says_so():
    read, write = os.pipe()
    os.close(read)
    outcomes = []
    with Log("l", write, tell=outcomes.append) as sink:
        sink.offer(encoded())
    os.close(write)
    assert outcomes[0].reason == "descriptor: Broken pipe"


def test_the_environment_of_a_program():
    body = encoded(weird={"a-b": 1, "c": {"d": True}}, nul="a\0b", big="x" * 40000)
    out = environment(Delivery(body, 5, 2))
    assert out["FANWISE_FS_UUID"] == "0f00 1/2"
    assert out["FANWISE_FS_MOUNTS"] == '["/srv","/mnt\\n2"]'
    assert out["FANWISE_OBJECT_INO"] == "14"
    assert "FANWISE_OBJECT_PATH" not in out
    assert (out["FANWISE_WEIRD_A_B"], out["FANWISE_WEIRD_C_D"]) == ("1", "true")
    assert out["FANWISE_NUL"] == "a\N{REPLACEMENT CHARACTER}b"
    assert (out["FANWISE_SUPPRESSED"], out["FANWISE_DROPPED"]) == ("5", "2")
    assert len(out["FANWISE_BIG"]) == 32 << 10
    assert out["FANWISE_CUT"] == "FANWISE_BIG"
    assert "HOME" not in out
    many = environment(Delivery(encoded(**{f"k{n}": "y" * 30000 for n in range(100)}), 0, 0))
    assert sum(len(k) + len(v) for k, v in many.items()) < 700_000


def test_an_event_has_what_the_specification_wants():
    record = RECORD | {"suppressed": 4}
    id_, body = cloudevent.event(record, "host a")
    event = json.loads(body)
    assert event["specversion"] == "1.0"
    assert event["id"] == id_
    assert event["source"] == "/host%20a/fs/0f00%201%2F2"
    assert event["type"] == "io.fanwise.health.incident.v1"
    assert event["subject"] == "ino:14"
    assert event["time"] == "2023-11-14T22:13:20.250000Z"
    assert event["datacontenttype"] == "application/json"
    assert event["data"] == RECORD
    assert event["fanwisesuppressed"] == 4
    # Attribute names are lower-case letters and digits.
    assert all(name.isalnum() and name == name.lower() for name in event)
    again, _ = cloudevent.event(dict(reversed(RECORD.items())), "host a")
    assert again == id_
    assert cloudevent.event(RECORD | {"total": 4}, "host a")[0] != id_
    with_path = RECORD | {"object": {"ino": 14, "path": "/srv/f"}}
    assert json.loads(cloudevent.event(with_path, "h")[1])["subject"] == "/srv/f"
    bare = json.loads(cloudevent.event({}, "h")[1])
    assert (bare["source"], bare["subject"]) == ("/h/fs/unknown", "fs")


def test_a_signature_is_that_of_standard_webhooks():
    """The example of its specification, and the formula written out anew."""
    key = cloudevent.secret(b"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n")
    out = cloudevent.headers(
        "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}', (key,)
    )
    assert out["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    key = cloudevent.secret(b" 0123456789abcdef \n")
    body = os.urandom(100)
    signed = hmac.new(b"0123456789abcdef", b"id.5." + body, hashlib.sha256).digest()
    assert cloudevent.headers("id", 5, body, (key,))["webhook-signature"] == (
        "v1," + base64.b64encode(signed).decode()
    )
    assert "webhook-signature" not in cloudevent.headers("id", 5, body, ())


@pytest.mark.parametrize("text", [b"", b"short", b"whsec_!!!!", b"whsec_c2hvcnQ="])
def test_a_weak_secret_is_refused(text):
    with pytest.raises(ValueError, match=r"shorter than 16 bytes|not base64"):
        cloudevent.secret(text)


def test_a_secret_that_others_may_read_is_refused(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(b"0123456789abcdef")
    path.chmod(0o640)
    with pytest.raises(FanwiseError, match="others may read it; put at least 16 random"):
        Webhook("w", "http://localhost:1/", secret=path).start()
    path.chmod(0o600)
    assert read_secret(path) == b"0123456789abcdef"
    with pytest.raises(FanwiseError, match="No such file"):
        Webhook("w", "http://localhost:1/", secret=tmp_path / "none").start()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://host/x",
        "host:80",
        "http://",
        "http:///x",
        "http://host:99999/",
        "http://host:0/",
        "http://user:word@host/",
        "http://host/#part",
        "http://host/a b",
        "http://host/\r\nX: y",
        "http://[::1/",
        "http://h\u00f6st/",
    ],
)
def test_a_wrong_url_is_refused(url):
    assert wrong_url(url)
    with pytest.raises(FanwiseError, match="sink w: "):
        Webhook("w", url).start()


@pytest.mark.parametrize("url", ["http://localhost", "https://[::1]:8443/a?b=c", "http://1.2.3.4/"])
def test_a_right_url_is_not(url):
    assert wrong_url(url) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, 0),
        ("120", 120),
        ("-5", 0),
        ("soon", 0),
        ("9" * 400, 0),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0),
        ("Tue, 14 Nov 2023 22:13:50 GMT", 30),
        ("Fri, 31 Dec 99999 23:59:59 GMT", 0),
    ],
)
def test_retry_after(text, seconds):
    assert retry_after(text, 1700000000.0) == seconds


def test_certificates_that_are_not_there():
    with pytest.raises(FanwiseError, match="sink w: "):
        Webhook("w", "https://localhost/", ca="/nonexistent").start()
