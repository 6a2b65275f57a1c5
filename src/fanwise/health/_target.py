"""What a PATH is: looked up by a helper with a deadline, because it may be on what is sick.

REFS      a helper process, for as long as `targets` runs.
LIFETIME  one that is late is killed; one that the kernel does not let die is reaped by a later
          call, or by init.
"""

import errno
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from fanwise._errors import FanwiseError, NoSuchRoot
from fanwise.kernel.mounts import Mount, mounts

DEADLINE = 5.0  # seconds

_stuck: list[subprocess.Popen[bytes]] = []

_CHILD = str(Path(__file__).with_name("_target_child.py"))


class Target(msgspec.Struct, frozen=True):
    """A path as it was when it was looked up.

    ``path`` is absolute, without symbolic links where these could be read. ``key`` is device and
    inode as stat has them, None where the filesystem did not tell; ``hung`` when it did not answer
    in time.
    """

    path: str
    mount: Mount
    key: tuple[int, int] | None
    folder: bool = True
    hung: bool = False

    @property
    def device(self) -> str:
        """MAJOR:MINOR of the superblock."""
        return "{}:{}".format(*self.mount.dev)

    @property
    def whole(self) -> bool:
        """Whether it is the root of its filesystem."""
        return os.fsencode(self.path) == self.mount.mount_point and self.mount.root == b"/"


class _Said(msgspec.Struct):
    errno: int
    path: str
    mount: int | None
    key: tuple[int, int] | None
    folder: bool


def targets(
    paths: Iterable[str | os.PathLike[str]], deadline: float = DEADLINE
) -> tuple[Target, ...]:
    """Look paths up, all within ``deadline`` seconds.

    What does not answer is known by its name only, and so are the paths behind it. Raises
    NoSuchRoot for a path that is not there.
    """
    absolute = [os.path.abspath(path) for path in paths]
    if not absolute:
        return ()
    said = _ask([os.fsencode(path).hex() for path in absolute], deadline)
    there = mounts()
    by_id = {mount.id: mount for mount in there}
    found: list[Target] = []
    for path, answer in zip(absolute, said, strict=True):
        if answer is None:
            first = not any(target.hung for target in found)  # those behind it were not asked
            found.append(Target(path, _over(path, there), None, hung=first))
            continue
        if answer.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise NoSuchRoot(path, os.strerror(answer.errno))
        real = os.fsdecode(bytes.fromhex(answer.path))
        mount = by_id.get(answer.mount or -1) or _over(real, there)
        found.append(Target(real, mount, answer.key, answer.folder))
    return tuple(found)


def _ask(arguments: Sequence[str], deadline: float) -> list[_Said | None]:
    until = time.monotonic() + deadline
    _stuck[:] = [helper for helper in _stuck if helper.poll() is None]
    try:
        helper = subprocess.Popen(
            [sys.executable, "-BIS", _CHILD, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",  # not where the host stands: that may be what hangs
        )
    except OSError as error:
        raise FanwiseError(
            f"the helper process that looks paths up does not start: {error}",
            "it is sys.executable that is run: see whether it is there and may be run",
        ) from error
    assert helper.stdout is not None
    data = b""
    try:
        while (left := until - time.monotonic()) > 0:
            if select.select([helper.stdout], [], [], left)[0]:
                more = os.read(helper.stdout.fileno(), 64 << 10)
                if not more:
                    break
                data += more
    finally:
        helper.stdout.close()
        helper.kill()
        try:
            helper.wait(0.2)
        except subprocess.TimeoutExpired:
            _stuck.append(helper)
    lines = data.split(b"\n")[:-1]
    found: list[_Said | None] = [msgspec.json.decode(line, type=_Said) for line in lines]
    return found + [None] * (len(arguments) - len(found))


# The mount that a name leads through, the last where several cover each other.
def _over(path: str, there: Sequence[Mount]) -> Mount:
    name = os.fsencode(path)
    over = [m for m in there if name == m.mount_point or name.startswith(_folder(m.mount_point))]
    if not over:
        raise NoSuchRoot(path, "no mount leads to it")
    return max(enumerate(over), key=lambda one: (len(one[1].mount_point), one[0]))[1]


def _folder(point: bytes) -> bytes:
    return point.rstrip(b"/") + b"/"
