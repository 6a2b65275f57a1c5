"""The native parts and their Python twins, for tests that run on both or compare them."""

import gc
import shutil
import sys
from collections.abc import Callable

from fanwise._errors import FeatureMissing
from fanwise.kernel import native

PURE = native.parts(pure=True)


def native_parts(cannot_run):
    """The native parts; where they could be built their absence is a failure."""
    try:
        return native.parts(pure=False)
    except FeatureMissing:
        if shutil.which("cc") or shutil.which("gcc"):
            raise
        return cannot_run("no C compiler")


def leaks(once: Callable[[], object]) -> bool:
    """Whether each call keeps a block of Python's allocator, found in whatever process this is.

    What other threads and earlier tests allocate or free, and free lists and caches that fill for
    some hundred calls, move the count in a few of the tries; a leak does in all.
    """
    calls, clean = 100, 0
    for _ in range(9):
        gc.collect()
        before = sys.getallocatedblocks()
        for _ in range(calls):
            once()
        gc.collect()
        clean += sys.getallocatedblocks() - before < calls // 2
        if clean == 2:
            return False
    return True
