"""What every scenario of the lab is tested for: verdicts, replays, and the reduction left out."""

from fanwise.lab import explore, replay

HOLDS = None


def check_verdict(design, broken):
    """The verdict at bound 3 is the expected one, exhaustively, and a schedule breaks it again."""
    result = explore(design, bound=3)
    assert result.not_keyed is None
    assert len(replay(design, "").names) >= 3  # tasks
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
