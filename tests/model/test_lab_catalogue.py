"""The catalogue: the verdict on each design, with the reduction and without, and its schedules.

What else a design shows, and what its parts are there for, stands in the test of its scenario.
"""

import pytest

from fanwise.lab import find, load, names, replay
from tests.model.lab_verdicts import VERDICTS, check_reduction, check_verdict

# Who runs is told by letters, in the order in which the tasks are made. Every design that breaks
# has one here, and more where it breaks in several ways.
SCHEDULES = {
    # Errors A and B, reader C, remover D, closer E, reaper F; of slot-replace errors A, readers B
    # and C. An error is queued and holds the mark; the closer waits only for marks that nobody has.
    ("error-event/slot-holds-mark", "A4E7"): "destruction-order",
    # The slot is claimed, not queued, when the closer frees the mark and the slot with it.
    ("error-event/slot-mark-alive", "A2E4A1"): "no-use-after-free",
    # The same with the remover, and while the group stays open.
    ("error-event/slot-mark-alive", "B2D2B1"): "no-use-after-free",
    # Queued, read and freed, and the dead mark still points to it.
    ("error-event/slot-err-count-posted", "A4B1D2C1B1"): "no-use-after-free",
    # Claimed, and the group has stopped: nobody frees it.
    ("error-event/slot-err-count-posted", "E3D1A4C1E1F2E3B1"): "no-leak",
    # An event is queued, its mark is freed, and the event along with it.
    ("error-event/slot-replace-posted", "A2E4F2E2"): "no-use-after-free",
    # The reader holds the one event there is.
    ("error-event/group-reserve-short", "A2C1B2"): "no-lost-error",
    # Remover A, reader B, shrinker C, looker D, marker E. Told, and only then the name is dropped.
    ("delete-order/notify-first", "A6B4"): "gone-when-told",
    ("delete-order/mark-flag-unasked", "A6B4"): "gone-when-told",
    # Told when the name leads to nothing.
    ("delete-order/inside-drop", "A7B1"): "names-its-object",
    # Nobody wanted the object kept when it was asked; the mark comes later.
    ("delete-order/pre-delete-event-late-mark", "A3E1A6B1"): "names-its-object",
    # Sender A, listener B, freezer C. Protected, asked, and frozen before it is filled.
    ("freeze/hook-under-protection", "A2C1B1"): "no-deadlock",
    ("freeze/hook-under-protection-loop", "A1D3C1B1"): "no-deadlock",
    ("freeze/hook-outside-but-truncate", "A3C1B1"): "no-deadlock",
    ("freeze/hook-outside-but-overlay", "A2C1B1"): "no-deadlock",
    # The content is written; the name is not made.
    ("freeze/nowait-write", "A2B7C1"): "no-deadlock",
    ("freeze/open-flag", "A2B11C1"): "no-deadlock",
    # The reader hands the job on to D, whom nobody knows.
    ("freeze/listener-context", "A2B1C1D1"): "no-deadlock",
    # No freeze is needed: the listener asks itself.
    ("freeze/nested-one-thread", "A1B8C9"): "no-deadlock",
    ("freeze/auto-reject", "A1B5"): "nested-faults",
    # The look-up holds the directory in which the listener makes the file.
    ("freeze/look-up-handler-locked", "A2B2C1"): "no-deadlock",
    ("freeze/freeze-level-page-fault", "A2C6B1"): "no-deadlock",
    # D is the one that does not ask.
    ("freeze/exclusive-freezer", "A2D1B1"): "no-deadlock",
    ("freeze/listener-registered", "C1"): "freezer-gets-its-turn",
    # Opener A, remover B, shrinker C, find D.
    ("eventfs/drop-at-last-use", "D5A2"): "cached-stays-cached",
    ("eventfs/leave-alone", "A3B4A1"): "no-callback-after-removal",
    ("eventfs/uncounted-pointers", "A3B4A1"): "no-use-after-free",
    ("eventfs/freed-flag", "A4B4A1"): "no-callback-after-removal",
    # Posters A and B, reader C. The second part of b2 finds no slot.
    ("note-queue/fixed-slots", "B3C5"): "whole-or-absent",
    # The overflow event stands before a1 when a2 and a3 are lost behind it.
    ("note-queue/inline-overflow", "B3C4A3C5"): "loss-in-place",
    # Write-back A and B, descriptors C and D. D takes along what C is owed.
    ("write-back/last-error", "A2B1D2C1"): "everyone-told",
    # C has read EIO; ENOSPC comes in between, so C marks nothing; EIO again; D marks it, and now
    # the value is what C remembers.
    ("write-back/errseq", "A2C1B2C1A2D3C1"): "everyone-told",
    # All is lost and the inode gone when C opens the file.
    ("write-back/errseq-evict", "A3B2D1C3"): "somebody-told",
    # Reader A, evictor B, mapper C, listener D.
    ("evict-read/no-lease", "C2B2C1"): "never-wrong-byte",
    ("evict-read/lease-plain-fd", "B7"): "no-deadlock",
}

DESIGNS = [design for slug in names() for design in find(slug)]
each_design = pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.name)


@pytest.mark.parametrize("slug", names())
def test_a_scenario_says_what_it_is_about(slug):
    scenario = load(slug)
    assert scenario.slug == slug
    assert scenario.title
    assert scenario.text.strip()
    assert all(_one_sentence(sentence) for sentence in scenario.properties.values())
    assert all(design.title.endswith(".") for design in scenario.designs.values())
    assert list(scenario.designs) == list(VERDICTS[slug])


def _one_sentence(text):
    return text.endswith(".") and ". " not in text


@each_design
def test_the_verdict(design):
    check_verdict(design, VERDICTS[design.scenario.slug][design.slug])


@each_design
def test_at_least_three_tasks_take_part(design):
    assert len(replay(design, "").names) >= 3


@each_design
def test_the_reduction_changes_no_verdict(design):
    check_reduction(design, 1)


@pytest.mark.soak
@each_design
def test_the_reduction_changes_no_verdict_at_two_preemptions(design):
    check_reduction(design, 2)


@pytest.mark.parametrize(("name", "schedule"), SCHEDULES)
def test_a_schedule_breaks_it_again(name, schedule):
    (design,) = find(name)
    assert replay(design, schedule).broken.property == SCHEDULES[name, schedule]


def test_every_design_that_breaks_has_a_schedule():
    breaks = {
        f"{slug}/{design}"
        for slug, designs in VERDICTS.items()
        for design, broken in designs.items()
        if broken
    }
    assert {name for name, _ in SCHEDULES} == breaks
