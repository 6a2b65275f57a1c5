"""What every scenario is asked: that its schedules replay, and what a plain search says."""

from fanwise.lab import explore, replay


def same_without_reduction(design, bound, seconds=None):
    """Compare the searches with the reduction and without it; returns the result with it.

    With a time limit that the plain search does not keep, nothing is compared.
    """
    reduced = explore(design, bound=bound)
    plain = explore(design, bound=bound, reduce=False, seconds=seconds)
    if plain.verdict == "sampled" and seconds is not None:
        return reduced
    assert reduced.verdict == plain.verdict, (reduced, plain)
    assert reduced.reduced, reduced.not_keyed
    if reduced.verdict == "holds":
        assert (reduced.counts, reduced.cases) == (plain.counts, plain.cases)
    return reduced


def replays(design, result):
    """Assert that the schedule of what breaks breaks it again, in its last step."""
    done = replay(design, result.schedule)
    assert done.broken is not None, result
    assert (done.broken.property, done.broken.seen or None) == (result.property, result.seen)
    return done
