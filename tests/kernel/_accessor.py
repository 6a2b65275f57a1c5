"""Who accesses files and may have to wait: told one operation a line, answers with its outcome.

A process of its own, exec'ed, so that it holds no descriptor of a listener: whoever reads the
events must not be the one who waits for their answers.
"""

import json
import mmap
import os
import sys

held = {}


def _open(slot, path, flags):
    held[slot] = os.open(path, flags, 0o755)


def _close(slot):
    os.close(held.pop(slot))


def _map(slot, count):
    if size := os.fstat(held[slot]).st_size:  # Python maps nothing beyond the end
        mmap.mmap(held[slot], min(count, size), mmap.MAP_PRIVATE, mmap.PROT_READ).close()


def _run(path):
    return os.waitpid(os.posix_spawn(path, [path], {}), 0)[1]


OPS = {
    "open": _open,
    "close": _close,
    "read": lambda slot, count: len(os.read(held[slot], count)),
    "pread": lambda slot, count, at: len(os.pread(held[slot], count, at)),
    "write": lambda slot, count: os.write(held[slot], b"w" * count),
    "pwrite": lambda slot, count, at: os.pwrite(held[slot], b"p" * count, at),
    "truncate": os.truncate,
    "ftruncate": lambda slot, size: os.ftruncate(held[slot], size),
    "fallocate": lambda slot, at, count: os.posix_fallocate(held[slot], at, count),
    "sendfile": lambda to, slot, at, count: os.sendfile(held[to], held[slot], at, count),
    "copy": lambda slot, to, count, at: os.copy_file_range(held[slot], held[to], count, at, at),
    "map": _map,
    "list": lambda path: len(os.listdir(path)),
    "run": _run,
    "unlink": os.unlink,
}

for line in sys.stdin:
    name, *args = json.loads(line)
    try:
        outcome = ["ok", OPS[name](*args)]
    except OSError as error:
        outcome = ["failed", error.errno]
    print(json.dumps(outcome), flush=True)
