"""What the catalogue is expected to come to, and what every design of it is tested for."""

from fanwise.lab import Scenario, explore, replay

HOLDS = None

VERDICTS = {
    "error-event": {
        "slot-holds-mark": "destruction-order",
        "slot-mark-alive": "no-use-after-free",
        "slot-bounce-buffer": HOLDS,
        "slot-err-count": HOLDS,
        "slot-err-count-posted": "no-leak",  # or no-use-after-free, with two preemptions
        "slot-replace": HOLDS,
        "slot-replace-posted": "no-use-after-free",
        "slot-refcount": HOLDS,
        "group-reserve": HOLDS,
        "group-reserve-short": "no-lost-error",
        "detailed-records": HOLDS,
    },
    "delete-order": {
        "notify-first": "gone-when-told",
        "inside-drop": "names-its-object",
        "mark-flag": HOLDS,
        "mark-flag-unasked": "gone-when-told",
        "pre-delete-event": HOLDS,
        "pre-delete-event-late-mark": "names-its-object",
        "prepare-report": HOLDS,
        "prepare-report-late-mark": HOLDS,
        "pin-drop-notify": HOLDS,
        "pin-drop-notify-late-mark": HOLDS,
        "hold-until-gone": HOLDS,
    },
    "freeze": {
        "hook-under-protection": "no-deadlock",
        "hook-under-protection-loop": "no-deadlock",
        "hook-outside": HOLDS,
        "hook-outside-but-truncate": "no-deadlock",
        "hook-outside-but-overlay": "no-deadlock",
        "nowait-write": "no-deadlock",
        "nowait-write-data-only": HOLDS,
        "open-flag": "no-deadlock",
        "task-nowait": HOLDS,
        "listener-context": "no-deadlock",
        "listener-context-explicit": HOLDS,
        "inherited-nonotify": HOLDS,
        "nested-one-thread": "no-deadlock",
        "nested-two-threads": HOLDS,
        "auto-reject": "nested-faults",
        "look-up-handler": HOLDS,
        "look-up-handler-locked": "no-deadlock",
        "freeze-level": HOLDS,
        "freeze-level-page-fault": "no-deadlock",
        "exclusive-freezer": "no-deadlock",
        "listener-registered": "freezer-gets-its-turn",
        "deadline-workers": HOLDS,
    },
    "eventfs": {
        "drop-at-last-use": "cached-stays-cached",
        "leave-alone": "no-callback-after-removal",
        "uncounted-pointers": "no-use-after-free",
        "freed-flag": "no-callback-after-removal",
        "freed-recheck": HOLDS,
        "serial-numbers": HOLDS,
    },
    "note-queue": {
        "fixed-slots": "whole-or-absent",
        "inline-overflow": "loss-in-place",
        "counted-loss": HOLDS,
    },
    "write-back": {
        "last-error": "everyone-told",
        "errseq": "everyone-told",
        "errseq-retry": HOLDS,
        "errseq-evict": "somebody-told",
        "event-merge": HOLDS,
    },
    "group-teardown": {
        "ours": HOLDS,
        "ours-cut-off": HOLDS,
        "ours-with-errors": HOLDS,
        "ours-failing-readers": HOLDS,
        "ours-woken": HOLDS,
        "ours-with-verdicts": HOLDS,
        "ours-quits": HOLDS,
        "ours-killed": HOLDS,
        "ours-late": HOLDS,
        "ours-two-classes": HOLDS,
        "ours-denied": HOLDS,
    },
    "evict-read": {
        "no-lease": "never-wrong-byte",
        "lease-plain-fd": "no-deadlock",
        "lease-silent-fd": HOLDS,
    },
}


def judged(scenario, build, bound=3):
    """The verdict on a design that is not in the catalogue, by a scenario's properties."""
    other = Scenario("other", "Another", "", scenario.properties)
    other.design("design", "Another.")(build)
    return explore(other["design"], bound=bound)


def check_verdict(design, broken):
    """The verdict at bound 3 is the expected one, exhaustively, and a schedule breaks it again."""
    result = explore(design, bound=3)
    assert result.not_keyed is None
    assert (result.verdict, result.property) == ("breaks" if broken else "holds", broken), result
    if broken:
        again = replay(design, result.schedule)
        assert again.broken.property == broken
        assert again.broken.seen == (result.seen or "")


def check_reduction(design, bound=1):
    """Every schedule one by one comes to the same verdict as the search that leaves some out."""
    reduced, plain = (explore(design, bound=bound, reduce=each) for each in (True, False))
    assert (reduced.verdict, plain.reduced) == (plain.verdict, False)
    if plain.verdict == "breaks":
        assert replay(design, reduced.schedule).broken.property == reduced.property
    else:
        assert (reduced.counts, reduced.cases) == (plain.counts, plain.cases)
    assert reduced.schedules <= plain.schedules or reduced.verdict == "breaks"
