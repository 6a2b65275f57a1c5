"""One operation in a process of its own, because it may sleep uninterruptibly: see freezing.py.

argv: the operation and its arguments. It prepares what it needs, says "ready", waits for a line,
and says how it ended. A freeze it undoes at the next line, or when nobody is there any more.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import sys

FIFREEZE = 0xC0045877
FITHAW = 0xC0045878


def main(name, *args):
    flags = int(args[1]) if name == "open" else 0
    fd = -1
    if name in (
        "freeze",
        "read",
        "write",
        "fsync",
        "syncfs",
        "store",
        "close",
        "ftruncate",
        "sendfile",
    ):
        fd = os.open(args[0], os.O_RDONLY if name == "freeze" else os.O_RDWR)
    if name == "sendfile":
        source = os.open(args[1], os.O_RDONLY)
    if name == "store":
        area = mmap.mmap(fd, 0)
    if name == "close":
        os.unlink(args[0])
    calls = {
        "freeze": lambda: fcntl.ioctl(fd, FIFREEZE, 0),
        "read": lambda: os.pread(fd, 3, 0),
        "write": lambda: os.pwrite(fd, b"xyz", 0),
        "fsync": lambda: os.fsync(fd),
        "syncfs": lambda: ctypes.CDLL(None).syncfs(fd),
        "store": lambda: area.__setitem__(0, 65),
        "close": lambda: os.close(fd),
        "ftruncate": lambda: os.ftruncate(fd, 1),
        "sendfile": lambda: os.sendfile(fd, source, 0, 3),
        "stat": lambda: os.stat(args[0]),
        "open": lambda: os.open(args[0], flags),
        "create": lambda: os.mknod(args[0]),
        "mkdir": lambda: os.mkdir(args[0]),
        "unlink": lambda: os.unlink(args[0]),
        "rmdir": lambda: os.rmdir(args[0]),
        "rename": lambda: os.rename(args[0], args[1]),
        "link": lambda: os.link(args[0], args[1]),
        "truncate": lambda: os.truncate(args[0], 1),
        "setattr": lambda: os.chmod(args[0], 0o700),
    }
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        calls[name]()
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
    else:
        print("ok", flush=True)
    if name == "freeze":
        sys.stdin.readline()  # or its end
        fcntl.ioctl(fd, FITHAW, 0)
        print("thawed", flush=True)


main(*sys.argv[1:])
