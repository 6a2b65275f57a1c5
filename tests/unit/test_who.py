"""Whose number it was: the rules, on records as the kernel gives them."""

import errno
import json

import pytest

from fanwise import Change, Process
from fanwise.cli import _lines
from fanwise.sources.trace import TraceLoss, TraceRecord
from fanwise.watch import _who
from fanwise.watch._process import GONE, Look
from fanwise.watch._who import EXEC, EXIT, NEWTASK, RENAME, Who, Windows

S = 10**9  # a second
FORK, THREAD = 17, 0x10000


@pytest.fixture
def who(monkeypatch):
    """A Who that traces since second 1 and never looks at /proc."""
    made = Who()
    made._tracing, made._proc = True, False
    made._gaps.append((-(1 << 62), 1 * S))
    return made


def told(who, when, event, *values):
    who._apply(TraceRecord(when, event, values, 0))


def names(process):
    return process.name, process.exe, process.state


def seen(pid, when, name="sh", exe="/bin/sh", uid=0, start=None):
    return Look(pid, when, when, start or when, name, exe, uid, "/c", False)


def test_fork_exec_rename_exit(who):
    who._attach(seen(1, 2 * S))
    told(who, 3 * S, NEWTASK, 1, 7, b"sh", FORK)
    told(who, 4 * S, RENAME, 7, b"sh", b"touch")
    told(who, 4 * S + 1, EXEC, 7, 7, b"/bin/touch")
    told(who, 5 * S, EXIT, 7, b"touch")
    assert names(who._who(7, 3 * S, 3 * S + 5)) == ("sh", "/bin/sh", "traced")
    assert names(who._who(7, 3 * S, 4 * S + 5)) == ("touch", "/bin/touch", "traced")
    # A file may be closed while it exits.
    assert names(who._who(7, 5 * S, 6 * S)) == ("touch", "/bin/touch", "traced")
    assert who._who(7, 60 * S, 61 * S) == GONE
    assert who._who(8, 3 * S, 4 * S) == GONE


def test_user_and_cgroup_are_not_inherited_and_kept_after_death(who):
    who._attach(seen(1, 2 * S))
    told(who, 3 * S, NEWTASK, 1, 7, b"sh", FORK)
    child = who._who(7, 3 * S, 3 * S + 5)
    assert (child.user, child.cgroup) == (None, None)
    told(who, 4 * S, EXIT, 1, b"sh")
    parent = who._who(1, 3 * S, 4 * S)
    assert (parent.user, parent.cgroup, parent.state) == ("root", "/c", "seen")


def test_what_a_thread_forks_is_its_process_child(who):
    who._attach(seen(1, 2 * S, "main", "/bin/main"))
    told(who, 3 * S, NEWTASK, 1, 2, b"main", THREAD)
    told(who, 3 * S, NEWTASK, 2, 3, b"main", THREAD)
    told(who, 3 * S, RENAME, 3, b"main", b"worker")
    told(who, 4 * S, NEWTASK, 3, 9, b"worker", FORK)
    assert names(who._who(9, 4 * S, 5 * S)) == ("worker", "/bin/main", "traced")
    assert names(who._who(1, 4 * S, 5 * S))[:2] == ("main", "/bin/main")
    assert who._who(3, 4 * S, 5 * S) == GONE  # a thread's number is no process's


def test_a_number_that_was_a_threads_is_no_doubt(who):
    told(who, 2 * S, NEWTASK, 1, 7, b"worker", THREAD)
    told(who, 3 * S, EXIT, 7, b"worker")
    told(who, 4 * S, NEWTASK, 1, 7, b"new", FORK)
    assert names(who._who(7, 2 * S, 5 * S))[0] == "new"


def test_exec_by_another_thread(who):
    who._attach(seen(1, 2 * S, "main", "/bin/main"))
    told(who, 3 * S, NEWTASK, 1, 2, b"main", THREAD)
    told(who, 4 * S, EXEC, 1, 2, b"/bin/next")
    assert names(who._who(1, 4 * S, 5 * S))[1] == "/bin/next"
    told(who, 60 * S, NEWTASK, 1, 2, b"new", FORK)
    assert names(who._who(2, 60 * S, 61 * S))[0] == "new"


def test_a_number_used_again(who):
    told(who, 2 * S, NEWTASK, 1, 7, b"first", FORK)
    told(who, 3 * S, EXIT, 7, b"first")
    told(who, 10 * S, NEWTASK, 1, 7, b"second", FORK)
    assert names(who._who(7, 2 * S, 9 * S))[0] == "first"  # read before the second
    assert names(who._who(7, 10 * S, 11 * S))[0] == "second"  # raised behind it
    assert who._who(7, 4 * S, 11 * S) == GONE  # either
    assert names(who._who(7, 9 * S, 11 * S))[0] == "second"  # the first ended long before


def test_who_was_there_before_the_trace_and_ended_unseen_counts(who):
    told(who, 10 * S, EXIT, 7, b"first")
    told(who, 10 * S + 5_000_000, NEWTASK, 1, 7, b"second", FORK)
    assert names(who._who(7, 2 * S, 10 * S)) == ("first", None, "traced")
    assert who._who(7, 2 * S, 11 * S) == GONE


def test_a_loss(who):
    told(who, 2 * S, NEWTASK, 1, 7, b"first", FORK)
    who._lose(TraceLoss(10 * S, 11 * S, 5))
    assert names(who._who(7, 2 * S, 10 * S))[0] == "first"
    assert who._who(7, 9 * S, 10 * S + 1) == GONE
    assert who._who(7, 20 * S, 21 * S) == GONE  # it may be another one now
    # A look finds it, begun before the loss: it is the same, and sure again.
    who._attach(seen(7, 22 * S, "first", "/bin/first", start=2 * S))
    assert names(who._who(7, 20 * S, 21 * S)) == ("first", "/bin/first", "seen")
    # Another one, begun within the loss or behind it.
    who._lose(TraceLoss(30 * S, 31 * S, None))
    who._attach(seen(7, 40 * S, "other", "/bin/other", start=30 * S + 5))
    assert names(who._who(7, 35 * S, 36 * S)) == ("other", "/bin/other", "seen")
    assert who._who(7, 29 * S, 30 * S + 1) == GONE


def test_an_exec_while_it_was_looked_at_says_nothing_of_the_executable(who):
    told(who, 2 * S, NEWTASK, 1, 7, b"sh", FORK)
    told(who, 3 * S, EXEC, 7, 7, b"/bin/next")
    look = seen(7, 4 * S, "sh", "/bin/sh")._replace(begin=3 * S - 5)
    who._attach(look)
    assert names(who._who(7, 3 * S, 4 * S))[1:] == ("/bin/next", "traced")


def test_a_change_of_user_within_the_window(who):
    who._attach(seen(7, 2 * S))
    who._newest(7).run_as(65534, 5 * S)
    assert who._who(7, 4 * S, 6 * S).user is None
    assert who._who(7, 5 * S, 6 * S).user == "nobody"


def test_without_a_trace(who):
    who._tracing = False
    who._gaps.clear()
    who._attach(seen(7, 10 * S, start=5 * S))
    assert names(who._who(7, 6 * S, 9 * S)) == ("sh", "/bin/sh", "seen")
    assert who._who(7, 4 * S, 9 * S) == GONE  # it began within the window
    assert who._who(7, 6 * S, 11 * S) == GONE  # it may have ended since
    # Another one with that number.
    who._attach(seen(7, 20 * S, "other", "/bin/other", start=15 * S))
    assert names(who._who(7, 16 * S, 19 * S))[0] == "other"
    assert who._who(7, 9 * S, 19 * S) == GONE


def test_the_table_is_bounded(who, monkeypatch):
    monkeypatch.setattr(_who, "_MOST_HOLDERS", 100)
    for pid in range(1000):
        told(who, 2 * S + pid, NEWTASK, 1, pid, b"a", FORK)
        told(who, 2 * S + pid, EXIT, pid, b"a")
    assert who.stats()["who_processes"] <= 100
    # Who was forgotten may have been there: a window that reaches back there names nobody.
    told(who, 3 * S, NEWTASK, 1, 5, b"new", FORK)
    assert who._who(5, 2 * S, 4 * S) == GONE
    assert names(who._who(5, 20 * S, 21 * S))[0] == "new"


def test_what_ended_and_was_told_is_forgotten(who):
    told(who, 2 * S, NEWTASK, 1, 7, b"a", FORK)
    told(who, 3 * S, EXIT, 7, b"a")
    who._prune()
    assert who.stats()["who_processes"] == 1
    who._safe = 60 * S
    who._prune()
    assert who.stats()["who_processes"] == 0


def test_windows():
    windows = Windows()
    first = windows.marks[0][0]
    take = iter([(b"", first + 1_000_000, True, 0), (b"", first + 2_000_000, False, 0), None])
    wrapped = windows.taking(lambda: next(take))
    while wrapped() is not None:
        pass
    assert windows.begin(first + 1_000_000) == first
    assert windows.begin(first + 2_000_000) == first + 1_000_000
    assert windows.begin(first + 3_000_000) == first + 1_000_000  # not empty after the second
    # Asked at 4 ms, known at 5 ms: what was read between may be older than the question.
    windows.mark(first + 4_000_000, first + 5_000_000)
    assert windows.begin(first + 4_500_000) == first + 1_000_000
    assert windows.begin(first + 6_000_000) == first + 4_000_000
    assert windows.begin(first - 1) is None


def test_a_process_whose_names_are_not_utf8_costs_no_line():
    process = Process("\udcff", "/bin/\udcff", None, None, "traced")
    change = Change(("created",), "/a", None, False, 7, None, 1.0, "exact", process=process)
    (line,) = _lines.changes_to_lines([change]).splitlines()
    found = json.loads(line)
    assert found["process"] == {
        "name": "\ufffd", "exe": "/bin/\ufffd", "user": None, "cgroup": None, "state": "traced",
    }  # fmt: skip
    assert "path_b64" not in found


class Trace:
    """A trace that somebody disturbs: what looks at it give, one after the other."""

    complete_to = 0

    def __init__(self, *looks):
        self.looks = list(looks)
        self.astray = False

    def take(self):
        return [], []

    def keep(self):
        look = self.looks.pop(0) if self.looks else None
        if isinstance(look, OSError):
            raise look
        return look

    def since_kept(self):
        return TraceLoss(2 * S, 4 * S, None)

    def close(self):
        pass


def test_who_was_looked_at_before_the_trace_was_put_right_is_looked_at_again(who):
    told(who, 1 * S, NEWTASK, 1, 7, b"sh", FORK)
    who.trace = Trace(TraceLoss(2 * S, 3 * S + 9, None))
    who._catch_up([seen(7, 3 * S, start=1 * S)])  # it may have become another one since
    assert who._who(7, 4 * S, 5 * S) == GONE
    who._catch_up([seen(7, 5 * S, "touch", "/bin/touch", start=1 * S)])
    assert names(who._who(7, 4 * S, 5 * S)) == ("touch", "/bin/touch", "seen")


def test_a_disturbance_that_cannot_be_put_right_yet_is_a_gap(who):
    told(who, 1 * S, NEWTASK, 1, 7, b"sh", FORK)
    told(who, 1 * S, EXEC, 7, 7, b"/bin/sh")
    who.trace = Trace(OSError(errno.EMFILE, "no descriptor"), OSError(errno.EMFILE, "none"))
    who._catch_up()
    assert names(who._who(7, 3 * S, 4 * S)) == ("sh", "/bin/sh", "traced")
    who.trace.astray = True
    who._catch_up()
    assert who._who(7, 3 * S, 4 * S) == GONE
    assert who._tracing


def test_a_trace_that_is_disturbed_all_the_time_is_one_gap(who):
    told(who, 1 * S + 1, NEWTASK, 1, 7, b"sh", FORK)
    told(who, 1 * S + 2, EXEC, 7, 7, b"/bin/sh")
    losses = [TraceLoss(2 * S + n, 2 * S + n + 1, None) for n in range(1000)]
    who.trace = Trace(*losses)
    for _ in losses:
        who._catch_up()
    assert list(who._gaps)[1:] == [(2 * S, 2 * S + 1000)]
