"""The least that hears of an ext4 error: a group for FS_ERROR and a text trace, read in Python.

Prints a line with the monotonic clock for each time that something was read. Arguments: a path on
the filesystem, and where tracefs is mounted.
"""

from __future__ import annotations

import os
import select
import sys
import time

from fanwise.kernel.fanotify import (
    FAN_CLASS_NOTIF,
    FAN_CLOEXEC,
    FAN_FS_ERROR,
    FAN_MARK_ADD,
    FAN_MARK_FILESYSTEM,
    FAN_NONBLOCK,
    FAN_REPORT_FID,
    init,
    mark,
)


def main(path: str, tracefs: str) -> None:
    group = init(FAN_CLASS_NOTIF | FAN_CLOEXEC | FAN_NONBLOCK | FAN_REPORT_FID)
    mark(group, FAN_MARK_ADD | FAN_MARK_FILESYSTEM, FAN_FS_ERROR, path=path)
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    os.lseek(log, 0, os.SEEK_END)
    instance = f"{tracefs}/instances/fanwise-bench-{os.getpid()}"
    os.mkdir(instance)
    pipe = -1
    try:
        with open(f"{instance}/events/ext4/ext4_error/enable", "w") as file:
            file.write("1")
        pipe = os.open(f"{instance}/trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
        poll = select.epoll()
        for fd in (group, pipe, log):
            poll.register(fd, select.EPOLLIN)
        print("ready", flush=True)
        while not select.select([0], [], [], 0)[0]:
            for fd, _ in poll.poll(0.5):
                try:
                    data = os.read(fd, 65536)
                except BlockingIOError:
                    continue
                if fd == group:
                    print(time.monotonic_ns(), len(data), flush=True)
    finally:
        if pipe >= 0:
            os.close(pipe)
        os.rmdir(instance)


if __name__ == "__main__":
    main(*sys.argv[1:])
