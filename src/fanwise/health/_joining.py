"""Which case a record is about: the rules of `_correlate`, as questions without effects."""

from fanwise.health._case import CONSEQUENCES, IDENTIFYING, Case, Ledger
from fanwise.health._observe import Observation

# What joins whatever its device's filesystem said, because it names no object of the filesystem.
ANONYMOUS = ("io", "told", "warning", *CONSEQUENCES)
_FOUND = ("error", "sick")  # what a filesystem finds in its own structures
_FOUND_BY_ANY = tuple(f".{what}" for what in _FOUND)


def same_key(ledger: Ledger, seen: Observation) -> Case | None:
    """Return the case of a record's own key: filesystem, scope, object, errno."""
    start = seen.start if seen.scope == "block" else None
    what = (seen.scope, seen.ino, seen.group, start, seen.part)
    # The log and write-back records tell no errno.
    loose = seen.via in IDENTIFYING or seen.what == "writeback"
    found = [
        case
        for case in ledger.cases
        if case.key[:-1] == what
        and not case.collective
        and (case.errno == seen.errno or (loose and not (case.errno and seen.errno)))
    ]
    if not seen.errno and loose:
        # First the one that has fewer records of this kind than of others: it lacks this one.
        found.sort(key=lambda c: (not c.named, c.evidence.get(seen.via, 0) >= c.total))
    else:
        found.sort(key=lambda c: c.errno != seen.errno)
    return found[0] if found else None


def part_of(ledger: Ledger, case: Case) -> Case | None:
    """Return the case that this one is about too, when there are more than errors."""
    if not case.counted or "fserror.error" in case.evidence:
        return None
    others = [each for each in ledger.cases if each is not case and each.counted]
    if case.named:
        others = [
            each
            for each in others
            if each.ino == case.ino and (not case.errno or case.errno == each.errno)
        ]
    return others[-1] if others else None


def agree(case: Case, seen: Observation, young: bool) -> bool:
    """Say whether a record can be about what a case is about.

    ``young``: the case began within the window, so that what was not known of it may be filled in.
    """
    if seen.what in CONSEQUENCES:
        return not case.collective
    if case.collective or (case.errno and seen.errno and case.errno != seen.errno):
        return False
    for mine, its in ((case.ino, seen.ino), (case.group, seen.group), (case.part, seen.part)):
        if mine is not None and its is not None and mine != its:
            return False
    if case.written and seen.what == "io" and (seen.operation or "").endswith("read"):
        return False
    if case.ino != seen.ino and (
        (case.written and (seen.what in _FOUND or seen.via == "trace.buffer"))
        or (seen.what == "writeback" and seen.ino is not None and _is_of_metadata(case))
    ):
        return False  # a file's data is one thing, what is wrong with the filesystem another
    if seen.what in ANONYMOUS or seen.via == "trace.error":
        return True
    if seen.via in IDENTIFYING and case.named and case.ino != seen.ino:
        return False
    if seen.via in case.evidence:  # the same channel tells two things apart
        fresh = (seen.ino is not None and case.ino is None) or (
            seen.group is not None and case.group is None
        )
        return not fresh and _same_block(case, seen)
    more = (
        (seen.ino is not None and case.ino is None)
        or (seen.group is not None and case.group is None)
        or (seen.errno and not case.errno)
    )
    return young or not more


def _is_of_metadata(case: Case) -> bool:
    return "trace.buffer" in case.evidence or any(
        via.endswith(_FOUND_BY_ANY) for via in case.evidence
    )


def _same_block(case: Case, seen: Observation) -> bool:
    return seen.what != "buffer" or seen.start is None or case.start in (None, seen.start)
