"""Error sequences: a write-back error is told to every opener once.

A value is an int: bits 0 to 11 the errno, bit 12 whether somebody has seen it, above that a counter
that moves only for an error that follows one that was seen. Values never say when.

Linux reference: lib/errseq.c.
"""

ERRNO = 0xFFF
SEEN = 0x1000
STEP = 0x2000
_BITS = 0xFFFF_FFFF


def record(value: int, error: int) -> int:
    """Return the value after an error happened (errseq_set)."""
    new = value & ~(ERRNO | SEEN) | error
    return (new + STEP) & _BITS if value & SEEN else new


def sample(value: int) -> int:
    """Return what an opener remembers: what nobody saw is still to be told (errseq_sample)."""
    return value if value & SEEN else 0


def check(value: int, since: int) -> int:
    """Return the errno of what happened ``since`` then, 0 for nothing (errseq_check)."""
    return 0 if value == since else value & ERRNO


def advance(value: int, since: int) -> tuple[int, int]:
    """Return (errno, new value), which the caller remembers too (errseq_check_and_advance)."""
    if value == since:
        return 0, value
    return value & ERRNO, value | SEEN
