import pytest

from fanwise import LifetimeError
from fanwise.lifetime import Steps

WORK = Steps("Thing.work", {"one": "one is done", "two": "two is done", "three": "all is done"})


class Thing:
    def __init__(self):
        self.done = []
        self.free = True

    @WORK
    def work(self):
        """Work."""
        yield "one"
        self.done.append(1)
        yield WORK.until("two", lambda: self.free)
        self.done.append(2)
        try:
            yield "three"
        except OSError:
            self.done.append("fault")
        self.done.append(3)
        return len(self.done)

    @WORK
    def wrong(self):
        yield "one"
        yield "four"


def test_a_run_does_the_steps_in_order():
    thing = Thing()
    run = thing.work()
    assert (run.at, run.waits, thing.done) == ("one", False, [])
    assert run.step() == "one"
    assert (run.at, thing.done) == ("two", [1])
    assert run.run()
    assert (run.at, run.result, thing.done) == (None, 3, [1, 2, 3])
    with pytest.raises(LifetimeError, match=r"Thing\.work: has ended"):
        run.step()
    assert Thing.work.__doc__ == "Work."


def test_a_step_that_waits_is_not_done_before_it_can_be():
    thing = Thing()
    thing.free = False
    run = thing.work()
    assert not run.run()
    assert (run.at, run.ready, run.waits, thing.done) == ("two", False, True, [1])
    with pytest.raises(LifetimeError, match="cannot do 'two' yet"):
        run.step()
    with pytest.raises(LifetimeError, match="has no result; it stands before 'two'"):
        _ = run.result
    calls = []

    def wait(waiting):
        calls.append(waiting.at)
        thing.free = len(calls) == 2

    assert run.run(wait=wait)
    assert calls == ["two", "two"]


@pytest.mark.parametrize(("step", "done"), [("one", []), ("two", [1]), ("three", [1, 2])])
def test_a_kill_ends_it_before_the_step(step, done):
    thing = Thing()
    run = thing.work()
    assert not run.run(kill=step)
    assert (run.at, thing.done) == (None, done)
    assert not run.run()


def test_a_fault_comes_out_or_is_taken():
    thing = Thing()
    with pytest.raises(OSError, match="disk"):
        thing.work().run(faults={"two": OSError("disk")})
    assert thing.done == [1]
    thing = Thing()
    run = thing.work()
    assert run.run(faults={"three": OSError("disk")})
    assert thing.done == [1, 2, "fault", 3]
    with pytest.raises(LifetimeError, match="has ended"):
        run.fault(OSError("disk"))


def test_steps_that_are_not_declared_are_refused():
    thing = Thing()
    with pytest.raises(LifetimeError, match="not declared: 'four'"):
        thing.wrong().run()
    with pytest.raises(LifetimeError, match="has no step 'four'"):
        thing.work().run(kill="four")
    with pytest.raises(LifetimeError, match="has no step 'four'"):
        thing.work().run(faults={"four": OSError("disk")})


def test_rendering():
    assert WORK.render_markdown().splitlines()[2] == "| 1 | one | one is done |"
    assert WORK.render_mermaid().splitlines() == [
        "flowchart LR",
        '    s1["one"]',
        '    s2["two"]',
        '    s3["three"]',
        "    s1 --> s2",
        "    s2 --> s3",
    ]
