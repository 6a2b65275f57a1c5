"""The error trace and the log of this kernel: losses, what is missing, what stays."""

import os
import select
from pathlib import Path

import pytest

from fanwise._errors import LifetimeError
from fanwise.kernel.tracing import parse_format
from fanwise.sources.errortrace import EVENTS, ErrorTrace, TracedError, TracedLoss
from fanwise.sources.fserror import FsErrors
from fanwise.sources.kmsg import Kmsg, KmsgLoss, KmsgRecord
from fanwise.sources.state import HealthSource
from fanwise.sources.trace import TraceEvent
from tests.kernel.faults import counted, volume


def test_every_event_is_here_and_has_the_fields_that_its_line_needs(tracefs):
    with ErrorTrace(tracefs=tracefs) as trace:
        assert trace.status().state == "up"
        assert not trace.missing
    for event in EVENTS:
        parse_format(Path(tracefs, "events", event.name, "format").read_text())


def test_an_event_that_is_not_here_is_said_and_the_others_work(tracefs, tmp_path):
    events = (*EVENTS, TraceEvent("fanwise/no_such_event"))
    with ErrorTrace(events, tracefs=tracefs) as trace, volume("ext4", tmp_path) as it:
        assert trace.status().state == "degraded"
        assert "fanwise/no_such_event" in trace.status().reason
        it.trigger()
        (record,) = [e for e in trace.errors() if isinstance(e, TracedError) and e.dev == it.dev]
        assert (record.event, record.function) == ("ext4_error", "trigger_test_error")
        assert record.pid == os.getpid()
        assert "__ext4_error" in record.stack
        assert not any(symbol.startswith("0x") for symbol in record.stack)


def test_what_is_overwritten_is_counted(tracefs, tmp_path):
    # On one CPU, so that it is one buffer that runs over.
    with volume("ext4", tmp_path) as it:
        ours = TraceEvent("ext4/ext4_error", filter=f"dev == {it.dev[0] << 20 | it.dev[1]}")
        trace = ErrorTrace((ours,), kb=64, tracefs=tracefs)
        trace.open()
        try:
            cpu = min(os.sched_getaffinity(0))
            before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {cpu})
            try:
                for _ in range(6000):
                    it.trigger()
            finally:
                os.sched_setaffinity(0, before)
            found = trace.errors()
            read = sum(isinstance(e, TracedError) for e in found)
            lost = sum(e.count for e in found if isinstance(e, TracedLoss))
            assert lost > 0
            assert read + lost == 6000
            counted(it, 6000)
            assert trace.status().lost == lost
        finally:
            trace.close()


def test_the_instance_is_gone_afterwards(tracefs):
    with ErrorTrace(tracefs=tracefs) as trace:
        path = Path(trace.path)
        assert path.is_dir()
    assert not path.exists()
    assert trace.status().state == "down"
    assert trace.errors() == []


def test_the_log(tmp_path):
    with Kmsg() as log, volume("ext4", tmp_path) as it:
        it.trigger("say it")
        found = [r for r in log.read() if isinstance(r, KmsgRecord) and r.device == it.name]
        (record,) = [r for r in found if r.what == "error"]
        assert (record.source, record.function) == ("ext4", "trigger_test_error")
        assert record.text.endswith("say it")
        assert log.status().state == "up"


def test_a_gap_in_the_log_is_counted(tmp_path):
    with volume("ext4", tmp_path) as it, Kmsg() as log:
        it.trigger()
        log.read()
        for _ in range(3):
            it.trigger()
        os.lseek(log.fileno(), 0, os.SEEK_END)  # as if they had been overwritten
        it.trigger()
        (loss,) = [r for r in log.read() if isinstance(r, KmsgLoss)]
        assert loss.count >= 3  # and what others said
        assert log.status().lost == loss.count


def test_all_sources_are_driven_alike(tracefs, tmp_path):
    sources: list[HealthSource] = [ErrorTrace(tracefs=tracefs), Kmsg(), FsErrors()]
    with volume("ext4", tmp_path) as it, select.epoll() as poll:
        try:
            for source in sources:
                source.open()
                assert source.status().state == "up"
            sources[2].follow([it.entry()])
            sources[1].read()
            for source in sources:
                poll.register(source.fileno(), select.EPOLLIN)
            it.trigger()
            ready: set[int] = set()
            while len(ready) < 3:
                found = {fd for fd, _ in poll.poll(5)}
                assert found
                ready |= found
        finally:
            for source in sources:
                source.close()
                source.close()
        assert {source.status().state for source in sources} == {"down"}


def test_closed():
    log = Kmsg()
    log.close()
    with pytest.raises(LifetimeError):
        log.read()
    assert log.status().state == "down"
