"""Looks up paths, in a process of its own: whoever asks a sick filesystem may never return.

Run as a file by `fanwise.health._target`: arguments are absolute paths in hexadecimal. One line of
JSON for each, in order, as soon as it is known.

Imports the standard library only: it must start fast, and whatever the host's path is.
"""

import json
import os
import stat
import sys


def look(path: bytes) -> dict[str, object]:
    """Answer with ``errno`` (0: it is there), ``path``, ``mount`` (its id), ``key`` and ``folder``.

    ``key`` is device and inode as stat has them, None where the filesystem does not tell.
    """
    real = os.path.realpath(path)
    answer: dict[str, object] = {"errno": 0, "path": real.hex(), "mount": None, "key": None}
    answer["folder"] = True
    try:
        fd = os.open(real, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        return answer | {"errno": error.errno}
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
            for line in file:
                if line.startswith(b"mnt_id:"):
                    answer["mount"] = int(line.split()[1])
        seen = os.fstat(fd)
        answer["key"] = seen.st_dev, seen.st_ino
        answer["folder"] = stat.S_ISDIR(seen.st_mode)
    except OSError:  # shut down: it does not even say what it is
        pass
    finally:
        os.close(fd)
    return answer


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(json.dumps(look(bytes.fromhex(argument))), flush=True)
