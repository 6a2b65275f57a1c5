"""Schedules as short strings: ``A3B1A2``: three steps of the first task, one of the second, ...

Tasks are lettered in order of creation: A to Z, then a to z.
"""

import re
import string
from collections.abc import Sequence
from itertools import groupby, pairwise

from fanwise._errors import Exit, FanwiseError

LETTERS = string.ascii_uppercase + string.ascii_lowercase


class WrongSchedule(FanwiseError):
    """A text that is no schedule, or one that the design cannot follow."""

    exit_status: Exit = Exit.USAGE


def render(picks: Sequence[int]) -> str:
    """Return the string of a schedule, given by the index of the task that does each step."""
    return "".join(f"{LETTERS[task]}{len(list(steps))}" for task, steps in groupby(picks))


def parse(text: str) -> list[int]:
    """Return the tasks' indexes, step by step. Raises WrongSchedule."""
    if not re.fullmatch(r"(?:[A-Za-z][0-9]{0,5})*", text, re.ASCII):
        raise WrongSchedule(f"{text!r} is no schedule", "it looks like A3B1A2")
    picks: list[int] = []
    for letter, count in re.findall(r"([A-Za-z])([0-9]*)", text, re.ASCII):
        picks += [LETTERS.index(letter)] * int(count or 1)
    return picks


def switches(picks: Sequence[int]) -> int:
    """Return how often the running task changes."""
    return sum(a != b for a, b in pairwise(picks))
