"""Faults seeded into our own group, queue, reserve and verdicts: the explorer finds each of them.

A fault is one change of one function's source, compiled where the function stands.
"""

import ast
import importlib
import inspect
import textwrap

import pytest

from fanwise.lab import explore, load, replay

SCENARIO = load("group-teardown")

FAULTS = {
    # group: the order of the end
    "does-not-stop-queueing": (
        "group:Group.close",
        "self.queue.stopped = True",
        "pass",
    ),
    "answers-nobody": (
        "group:Group.close",
        "self.verdicts.close_one()",
        "break",
    ),
    "answers-before-it-stops": (
        "group:Group.close",
        """\
        if self.state == "OPEN":
            yield "stop queueing"
            self._once("OPEN", "stop")
            self.queue.stopped = True
        while self.verdicts.open:
            yield "answer an access"
            self.verdicts.close_one()
""",
        """\
        while self.verdicts.open:
            yield "answer an access"
            self.verdicts.close_one()
        if self.state == "OPEN":
            yield "stop queueing"
            self._once("OPEN", "stop")
            self.queue.stopped = True
""",
    ),
    "wakes-nobody": ("group:Group.close", "self.wake()", "pass"),
    "does-not-wait-for-waiters": ("group:Group.close", "lambda: not self._waiters", "lambda: True"),
    "does-not-wait-for-askers": (
        "group:Group.close",
        "lambda: not self.verdicts.askers",
        "lambda: True",
    ),
    "does-not-wait-for-marks": ("group:Group.close", "lambda: not self.dying", "lambda: True"),
    "does-not-wait-for-readers": (
        "group:Group.close",
        "lambda: not self.errors.readers",
        "lambda: True",
    ),
    "frees-events-before-marks": (
        "group:Group.close",
        'yield CLOSE.until("wait for marks", lambda: not self.dying)',
        'yield "free events"',
    ),
    "waits-for-marks-before-it-wakes": (
        "group:Group.close",
        """\
            yield "wake waiters"
            self.wake()
            yield CLOSE.until("wait for waiters", lambda: not self._waiters)
""",
        """\
            yield CLOSE.until("wait for waiters", lambda: not self._waiters)
            yield "wake waiters"
            self.wake()
""",
    ),
    "does-each-step-twice": ("group:Group._once", "if self.state == state:", "if True:"),
    "frees-what-the-other-run-closed": (
        "group:Group.close",
        'if self.state == "REAPED":  # the other run may have freed the reserve since',
        "if True:",
    ),
    "leaves-a-mark": ("group:Group.close", "while self.marks:", "if self.marks:"),
    "reads-after-the-end-began": ("group:Group.read", "self._refuse_closed()", "pass"),
    "does-not-wake-for-a-question": (
        "group:Group.ask",
        "if empty and len(self.queue):",
        "if False:",
    ),
    # mark
    "takes-a-dying-mark": ("mark:Mark.get", 'if self.state != "ATTACHED":', "if False:"),
    "does-not-reap": ("mark:Mark.put", "self._reap()", "pass"),
    "reaps-while-a-reader-has-it": ("mark:Mark._reap", "and not self.refs", ""),
    "detaches-twice": ("mark:Mark.detach", 'if self.state == "ATTACHED":', "if True:"),
    "frees-an-attached-mark": ("mark:Mark.destroy", "self.detach()", "pass"),
    # queue
    "queues-after-the-end-began": ("queue:Queue.put", "self._events.append", "list().append"),
    "does-not-count-a-loss": ("queue:Queue.lose", "lost.count + count", "lost.count"),
    "forgets-to-say-that-it-is-not-empty": (
        "queue:Queue.add",
        "return not (waiting or self.errors.queued)",
        "return False",
    ),
    "leaves-a-withdrawn-question": ("queue:Queue.remove", "del self._events[at]", "pass"),
    "does-not-put-back": ("queue:Queue.put_back", "events.insert(at, (event, None))", "pass"),
    "drops-the-newest": ("queue:Queue._pop", "events.clear()", "events.clear(); out = out[:-1]"),
    # reserve
    "forgets-the-count-of-a-merge": (
        "reserve:Reserve.add",
        "slot.event.count = (slot.event.count or 0) + count",
        "pass",
    ),
    "forgets-what-a-failed-reader-had": (
        "reserve:Reserve.leave",
        "self._put_back(slot)",
        "self._empty(slot)",
    ),
    "abandons-in-silence": ("reserve:Reserve.flush", "self.abandoned +=", "0 +"),
    "abandons-a-readers-error-in-silence": ("reserve:Reserve.leave", "self.abandoned +=", "0 +"),
    "a-reader-brings-no-slot": ("reserve:Reserve.enter", "self._free.append", "str"),
    "forgets-the-orphans": ("reserve:Reserve.unmark", "self.orphans += 1", "pass"),
    "delivers-and-keeps": ("reserve:Reserve.done", "self._empty(slot)", "pass"),
    "merges-backwards-and-forgets": (
        "reserve:Reserve._put_back",
        "slot.event.count = (slot.event.count or 0) + (other.event.count or 0)",
        "pass",
    ),
    "forgets-who-came-before": (
        "reserve:Reserve._put_back",
        "other.event.count = (other.event.count or 0) + (slot.event.count or 0)",
        "pass",
    ),
    # reader
    "leaves-with-its-questions": ("reader:Reader.leave", "group.verdicts.give_back(self)", "pass"),
    "leaves-with-its-error": (
        "reader:Reader.leave",
        "slot, self.slot = self.slot, None",
        "slot = None",
    ),
    "wakes-nobody-for-what-it-left": (
        "reader:Reader.leave",
        "if empty and len(group.queue):",
        "if False:",
    ),
    "reads-from-a-group-that-ended": (
        "reader:Reader.take",
        'self.state == "LEFT" or self.group.state != "OPEN"',
        'self.state == "LEFT"',
    ),
    # verdicts
    "an-asker-never-goes": ("verdict:Verdicts.left", "self.askers -= 1", "pass"),
    "forgets-to-count-an-asker": ("verdict:Verdicts.ask", "self.askers += 1", "pass"),
    "asks-a-group-that-ends": ("verdict:Verdicts.ask", "if self._queue.stopped:", "if False:"),
    "allows-when-it-ends": (
        "verdict:Verdicts.close_one",
        "self._policy().closing",
        "0",
    ),
    "keeps-what-a-killed-access-asked": (
        "verdict:Verdicts.left",
        "self._queue.remove(question.event)",
        "pass",
    ),
    "keeps-a-killed-access-open": (
        "verdict:Verdicts._cancel",
        "del self.open[question.number]",
        "pass",
    ),
    "takes-a-late-answer": (
        "verdict:Verdicts.answer",
        'if question.state == "CANCELLED":',
        "if False:",
    ),
    "says-that-a-late-answer-counted": ("verdict:Verdicts.answer", "return False", "return True"),
    "forgets-a-late-number": ("verdict:Verdicts._let_go", "del self.held[question.number]", "pass"),
    "never-late": ("verdict:Verdicts._expire", "question.verdict = verdict", "pass"),
    "does-not-say-who-read": ("verdict:Verdicts.report", "question.reader = reader", "pass"),
    "forgets-numbers-too-late": ("verdict:Verdicts.forget", "self._drop(question)", "pass"),
    # access
    "asks-one-group-again": ("access:Access._ask", "self._order = group.order", "pass"),
    "goes-on-after-a-denial": ("access:Access._take", "if verdict != ALLOW:", "if False:"),
    "is-decided-by-the-first": ("access:Access._take", "if verdict != ALLOW:", "if True:"),
    "does-not-leave-when-killed": ("access:Access.interrupt", "question.leave()", "pass"),
    "takes-no-leave": ("access:Access._take", "question.leave()", "pass"),
    "asks-in-the-wrong-order": ("fsnotify:Fsnotify.next_asked", "min(left", "max(left"),
}


def seeded(monkeypatch, where, old, new):
    """Change one function as FAULTS says."""
    module_name, qualname = where.split(":")
    module = importlib.import_module(f"fanwise.notify.{module_name}")
    owner_name, name = qualname.split(".")
    text = inspect.getsource(module)
    (owner,) = (node for node in ast.parse(text).body if getattr(node, "name", "") == owner_name)
    (node,) = (node for node in owner.body if getattr(node, "name", "") == name)
    first = min(part.lineno for part in (node, *node.decorator_list))
    source = "".join(text.splitlines(keepends=True)[first - 1 : node.end_lineno])
    assert source.count(old) == 1, f"{where} has {old!r} {source.count(old)} times"
    changed = compile(textwrap.dedent(source.replace(old, new)), module.__file__, "exec")
    made = {}
    exec(changed, vars(module), made)  # decorators and names as in the module
    monkeypatch.setattr(getattr(module, owner_name), name, made[name])


def found(bound):
    """The first design that breaks, with its result."""
    for design in SCENARIO.designs.values():
        result = explore(design, bound=bound)
        if result.verdict == "breaks":
            return design, result
    return None


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(monkeypatch, fault):
    seeded(monkeypatch, *FAULTS[fault])
    broken = found(1) or found(2)
    assert broken is not None, "the fault is not found"
    design, result = broken
    again = replay(design, result.schedule)
    assert again.broken.property == result.property
