"""Reading without waiting, as the command and foreign loops do it, to the very end."""

import select
import subprocess
import time

import fanwise

DEADLINE = 60


def until(holds):
    limit = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < limit


def scanned(watch):
    def look():
        watch.read(0)
        return watch.scanned

    until(look)


def test_fileno_is_quiet_when_everything_was_read(scratch):
    (scratch / "d").mkdir()
    with fanwise.watch(scratch) as changes:
        scanned(changes)
        changes.resume()  # wakes, and has nothing to tell
        assert select.select([changes.fileno()], [], [], DEADLINE)[0]
        # Somebody may mount something meanwhile, which wakes as well.
        until(lambda: changes.read(0) == [] and not select.select([changes.fileno()], [], [], 0)[0])


def test_a_window_without_news_does_not_end_the_stream(scratch):
    other = subprocess.Popen(["sh", "-c", f"read go; echo > {scratch}/other"], stdin=-1)
    with fanwise.watch(scratch, ignore_pids=[other.pid]) as changes:
        scanned(changes)

        def records():
            return changes.stats()["records"]

        before = records()
        other.communicate(b"\n")
        until(lambda: records() > before)  # in a window of its own, read while nobody looks
        (scratch / "mine").touch()
        changes.stop()
        assert str(scratch / "mine") in [change.path for change in changes]
        assert changes.ended


def test_pausing_after_the_end_is_harmless(scratch):
    with fanwise.watch(scratch) as changes:
        changes.stop()
        assert changes.read() == []
        changes.pause()
        changes.resume()
