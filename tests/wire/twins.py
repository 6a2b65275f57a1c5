"""The native parts and their Python twins, for tests that run on both or compare them."""

import shutil

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
