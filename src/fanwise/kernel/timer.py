"""A descriptor that becomes readable again and again: timerfd_create(2)."""

import ctypes
import os
import time

from fanwise.kernel.libc import last_error, libc


# os.timerfd_create came with Python 3.13.
class _Timerspec(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "first_s", "first_ns")]


def timer(seconds: float) -> int:
    """Return a descriptor that is readable every so many seconds; reading it never waits.

    The caller closes it. What is read is a count of eight bytes. Raises OSError.
    """
    fd: int = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        raise last_error()
    whole, part = int(seconds), int(seconds % 1 * 1e9)
    if libc.timerfd_settime(fd, 0, ctypes.byref(_Timerspec(whole, part, whole, part)), None) < 0:
        error = last_error()
        os.close(fd)
        raise error
    return fd
