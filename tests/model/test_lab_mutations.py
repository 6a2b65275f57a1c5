"""Faults seeded into our own group, queue, reserve and verdicts: the explorer finds each of them.

A fault is one change of one function's source, compiled where the function stands. Beside it stands
the smallest design that finds it; without faults each design holds (test_lab_group_teardown.py).
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
        "ours-killed",
        "group:Group.close",
        "self.queue.stopped = True",
        "pass",
    ),
    "answers-nobody": (
        "ours-killed",
        "group:Group.close",
        "self.verdicts.close_one()",
        "break",
    ),
    "answers-before-it-stops": (
        "ours-killed",
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
    "wakes-nobody": ("ours-killed", "group:Group.close", "self.wake()", "pass"),
    "does-not-wait-for-waiters": (
        "ours-killed",
        "group:Group.close",
        "lambda: not self._waiters",
        "lambda: True",
    ),
    "does-not-wait-for-askers": (
        "ours-killed",
        "group:Group.close",
        "lambda: not self.verdicts.askers",
        "lambda: True",
    ),
    "does-not-wait-for-marks": (
        "ours",
        "group:Group.close",
        "lambda: not self.dying",
        "lambda: True",
    ),
    "does-not-wait-for-readers": (
        "ours-failing-readers",
        "group:Group.close",
        "lambda: not self.errors.readers",
        "lambda: True",
    ),
    "frees-events-before-marks": (
        "ours",
        "group:Group.close",
        'yield CLOSE.until("wait for marks", lambda: not self.dying)',
        'yield "free events"',
    ),
    "waits-for-marks-before-it-wakes": (
        "ours-killed",
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
    "does-each-step-twice": (
        "ours-cut-off",
        "group:Group._once",
        "if self.state == state:",
        "if True:",
    ),
    "frees-what-the-other-run-closed": (
        "ours-cut-off",
        "group:Group.close",
        'if self.state == "REAPED":  # the other run may have freed the reserve since',
        "if True:",
    ),
    "leaves-a-mark": ("ours-cut-off", "group:Group.close", "while self.marks:", "if self.marks:"),
    "reads-after-the-end-began": (
        "ours-killed",
        "group:Group.read",
        "self._refuse_closed()",
        "pass",
    ),
    "does-not-wake-for-a-question": (
        "ours-denied",
        "group:Group.ask",
        "if empty and len(self.queue):",
        "if False:",
    ),
    # mark
    "takes-a-dying-mark": ("ours", "mark:Mark.get", 'if self.state != "ATTACHED":', "if False:"),
    "does-not-reap": ("ours", "mark:Mark.put", "self._reap()", "pass"),
    "reaps-while-a-reader-has-it": ("ours", "mark:Mark._reap", "and not self.refs", ""),
    "detaches-twice": (
        "ours-cut-off",
        "mark:Mark.detach",
        'if self.state == "ATTACHED":',
        "if True:",
    ),
    "frees-an-attached-mark": ("ours", "mark:Mark.destroy", "self.detach()", "pass"),
    # queue
    "queues-after-the-end-began": (
        "ours-killed",
        "queue:Queue.put",
        "self._events.append",
        "list().append",
    ),
    "does-not-count-a-loss": ("ours", "queue:Queue.lose", "lost.count + count", "lost.count"),
    "forgets-to-say-that-it-is-not-empty": (
        "ours-woken",
        "queue:Queue.add",
        "return not (waiting or self.errors.queued)",
        "return False",
    ),
    "leaves-a-withdrawn-question": (
        "ours-killed",
        "queue:Queue.remove",
        "del self._events[at]",
        "pass",
    ),
    "does-not-put-back": (
        "ours-quits",
        "queue:Queue.put_back",
        "events.insert(at, (event, None))",
        "pass",
    ),
    "drops-the-newest": (
        "ours-woken",
        "queue:Queue._pop",
        "events.clear()",
        "events.clear(); out = out[:-1]",
    ),
    # reserve
    "forgets-the-count-of-a-merge": (
        "ours-failing-readers",
        "reserve:Reserve.add",
        "slot.event.count = (slot.event.count or 0) + count",
        "pass",
    ),
    "forgets-what-a-failed-reader-had": (
        "ours-woken",
        "reserve:Reserve.leave",
        "self._put_back(slot)",
        "self._empty(slot)",
    ),
    "abandons-in-silence": (
        "ours-failing-readers",
        "reserve:Reserve.flush",
        "self.abandoned +=",
        "0 +",
    ),
    "abandons-a-readers-error-in-silence": (
        "ours-failing-readers",
        "reserve:Reserve.leave",
        "self.abandoned +=",
        "0 +",
    ),
    "a-reader-brings-no-slot": ("ours-woken", "reserve:Reserve.enter", "self._free.append", "str"),
    "forgets-the-orphans": (
        "ours-failing-readers",
        "reserve:Reserve.unmark",
        "self.orphans += 1",
        "pass",
    ),
    "delivers-and-keeps": ("ours-woken", "reserve:Reserve.done", "self._empty(slot)", "pass"),
    "merges-backwards-and-forgets": (
        "ours-failing-readers",
        "reserve:Reserve._put_back",
        "slot.event.count = (slot.event.count or 0) + (other.event.count or 0)",
        "pass",
    ),
    "forgets-who-came-before": (
        "ours-failing-readers",
        "reserve:Reserve._put_back",
        "other.event.count = (other.event.count or 0) + (slot.event.count or 0)",
        "pass",
    ),
    # reader
    "leaves-with-its-questions": (
        "ours-quits",
        "reader:Reader.leave",
        "group.verdicts.give_back(self)",
        "pass",
    ),
    "leaves-with-its-error": (
        "ours-woken",
        "reader:Reader.leave",
        "slot, self.slot = self.slot, None",
        "slot = None",
    ),
    "wakes-nobody-for-what-it-left": (
        "ours-woken",
        "reader:Reader.leave",
        "if empty and len(group.queue):",
        "if False:",
    ),
    "reads-from-a-group-that-ended": (
        "ours-late",
        "reader:Reader.take",
        'self.state == "LEFT" or self.group.state != "OPEN"',
        'self.state == "LEFT"',
    ),
    # verdicts
    "an-asker-never-goes": ("ours-killed", "verdict:Verdicts.left", "self.askers -= 1", "pass"),
    "forgets-to-count-an-asker": (
        "ours-killed",
        "verdict:Verdicts.ask",
        "self.askers += 1",
        "pass",
    ),
    "asks-a-group-that-ends": (
        "ours-killed",
        "verdict:Verdicts.ask",
        "if self._queue.stopped:",
        "if False:",
    ),
    "allows-when-it-ends": (
        "ours-killed",
        "verdict:Verdicts.close_one",
        "self._policy().closing",
        "0",
    ),
    "keeps-what-a-killed-access-asked": (
        "ours-killed",
        "verdict:Verdicts.left",
        "self._queue.remove(question.event)",
        "pass",
    ),
    "keeps-a-killed-access-open": (
        "ours-killed",
        "verdict:Verdicts._cancel",
        "del self.open[question.number]",
        "pass",
    ),
    "takes-a-late-answer": (
        "ours-killed",
        "verdict:Verdicts.answer",
        'if question.state == "CANCELLED":',
        "if False:",
    ),
    "says-that-a-late-answer-counted": (
        "ours-killed",
        "verdict:Verdicts.answer",
        "return False",
        "return True",
    ),
    "forgets-a-late-number": (
        "ours-killed",
        "verdict:Verdicts._let_go",
        "del self.held[question.number]",
        "pass",
    ),
    "never-late": ("ours-late", "verdict:Verdicts._expire", "question.verdict = verdict", "pass"),
    "does-not-say-who-read": (
        "ours-late",
        "verdict:Verdicts.report",
        "question.reader = reader",
        "pass",
    ),
    "forgets-numbers-too-late": (
        "ours-killed",
        "verdict:Verdicts.forget",
        "self._drop(question)",
        "pass",
    ),
    # access
    "asks-one-group-again": (
        "ours-killed",
        "access:Access._ask",
        "self._order = group.order",
        "pass",
    ),
    "goes-on-after-a-denial": (
        "ours-killed",
        "access:Access._take",
        "if verdict != ALLOW:",
        "if False:",
    ),
    "is-decided-by-the-first": (
        "ours-two-classes",
        "access:Access._take",
        "if verdict != ALLOW:",
        "if True:",
    ),
    "does-not-leave-when-killed": (
        "ours-killed",
        "access:Access.interrupt",
        "question.leave()",
        "pass",
    ),
    "takes-no-leave": ("ours-killed", "access:Access._take", "question.leave()", "pass"),
    "asks-in-the-wrong-order": (
        "ours-denied",
        "fsnotify:Fsnotify.next_asked",
        "min(left",
        "max(left",
    ),
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


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(monkeypatch, fault):
    slug, *change = FAULTS[fault]
    design = SCENARIO[slug]
    seeded(monkeypatch, *change)
    result = explore(design)
    assert result.verdict == "breaks", "the fault is not found"
    again = replay(design, result.schedule)
    assert again.broken.property == result.property
