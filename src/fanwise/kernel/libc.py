"""The C library, loaded once for every system call of this package."""

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)

AT_FDCWD = -100
AT_SYMLINK_FOLLOW = 0x400
AT_NO_AUTOMOUNT = 0x800
AT_EMPTY_PATH = 0x1000


def last_error(path: str | bytes | None = None) -> OSError:
    """Make the OSError of the call that just failed in this thread.

    Call it before anything else that goes through ctypes: errno is that of the last call.
    """
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), path)
