"""What every operation is: a generator of steps.

It yields the name of the step that it is about to do (an `Until` where that step has to wait), does
it when it is resumed, and returns the operation's result. What goes wrong is an OSError with the
errno that Linux gives. Code before the first yield only reads its arguments.

What gives something back (a lock, a reference that cannot be the last) is done with the step before
it and yields nothing: nobody can tell the difference, because it only makes others ready.
"""

import errno
import os
from collections.abc import Callable, Generator, Hashable
from typing import NoReturn, TypeAlias, TypeVar

from fanwise.lifetime import Until

T = TypeVar("T")

Op: TypeAlias = Generator[str | Until, None, T]
"""An operation in flight, which returns a T."""

Current: TypeAlias = Callable[[], Hashable]
"""Who runs now: the kernel's ``current``. Holders of locks are named by it."""


def fail(code: int) -> NoReturn:
    """Raise the OSError of an errno."""
    raise OSError(code, os.strerror(code))


def finish(operation: Op[T]) -> T:
    """Do all steps of an operation, when nobody else acts; its result.

    Raises what the operation raises, and OSError(EDEADLK) when a step would wait for ever.
    """
    while True:
        try:
            step = next(operation)
        except StopIteration as end:
            result: T = end.value
            return result
        if isinstance(step, Until) and not step.ready():
            operation.close()
            fail(errno.EDEADLK)
