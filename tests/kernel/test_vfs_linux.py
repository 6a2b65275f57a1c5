"""Vfs against Linux: the same operations, the same results, the same errnos, the same events."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from conftest import mounted
from vfs_twin import GROUPS, Twin

from fanwise.notify import mask as m


@pytest.fixture(scope="module", params=["tmpfs", "ext4"])
def disk(request, tmp_path_factory):
    with mounted(request.param, tmp_path_factory.mktemp("vfs")) as point:
        yield point, request.param == "tmpfs"
        GROUPS.close()


def clear(point):
    for entry in os.scandir(point):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


# A path is drawn as what it shall be, and becomes one when its turn comes: most operations should
# get somewhere. A few are what they are, whatever there is.
number = st.integers(0, 11)
files = st.tuples(st.just("file"), number)
dirs = st.tuples(st.just("dir"), number)
new = st.tuples(st.sampled_from("abcd"), number)
wild = st.sampled_from(
    [
        "/.",
        "/a",
        "/a/b",
        "/a/b/c",
        "/a/..",
        "/a/.",
        "/a/../b",
        "/b/./a",
        "/a/b/../c",
        "/" + "x" * 256,
    ]
)
either = st.one_of(files, dirs)
anything = st.one_of(files, dirs, new, wild)
modes = st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
extra = st.sampled_from(
    [
        0,
        0,
        os.O_TRUNC,
        os.O_APPEND,
        os.O_CREAT,
        os.O_CREAT | os.O_TRUNC,
        os.O_CREAT | os.O_EXCL,
        os.O_DIRECTORY,
    ]
)
flags = st.tuples(modes, extra).map(sum)
create = modes.map(lambda mode: mode | os.O_CREAT | os.O_EXCL)
opened = st.integers(0, 5)
count = st.sampled_from([0, 1, 5, 4096, 5000, 9000])
data = st.tuples(st.binary(min_size=1, max_size=1), count).map(lambda p: p[0] * p[1])
at = st.one_of(st.none(), count)
moves = st.sampled_from([0, 0, 0, 1, 2, 3])


def op(name, *args):
    return st.tuples(st.just(name), *args)


STEPS = st.one_of(
    op("open", files, flags),
    op("open", either, flags),
    op("open", anything, flags),
    op("open", new, create),
    op("open", new, create),
    op("open", dirs, st.just(os.O_RDONLY)),
    op("mkdir", new),
    op("mkdir", new),
    op("create", new),
    st.tuples(st.sampled_from(["mkdir", "create", "unlink", "rmdir", "stat"]), anything),
    op("unlink", files),
    op("unlink", files),
    op("rmdir", dirs),
    op("rmdir", dirs),
    op("rename", either, new, moves),
    op("rename", files, files, moves),
    op("rename", dirs, dirs, moves),
    op("rename", anything, anything, moves),
    op("link", files, new),
    op("link", anything, anything),
    op("truncate", files, st.sampled_from([-1, 0, 3, 4096, 4100, 9000])),
    op("truncate", anything, st.sampled_from([0, 3])),
    op("setattr", anything, st.sampled_from([0o700, 0o755, 0o644])),
    op("close", opened),
    op("read", opened, count, at),
    op("write", opened, data, at),
    op("write", opened, data, at),
    op("readdir", opened),
    op("fstat", opened),
    op("ftruncate", opened, count),
    op("sendfile", opened, opened, count, at),
    op("mark", either, st.integers(0, 1 << 30)),
)

# How many files an operation takes.
ON_FILES = {
    "close": 1,
    "read": 1,
    "write": 1,
    "readdir": 1,
    "fstat": 1,
    "ftruncate": 1,
    "sendfile": 2,
}
NAMED = [bit for bit in m.NAMES.values() if bit & m.EVENTS]


def resolved(twin, arg):
    """A drawn path, as the tree is now."""
    if type(arg) is not tuple:
        return arg
    kind, number = arg
    paths = {"file": [], "dir": ["/."]}
    nodes = twin.sb.disk.nodes
    todo = [("", twin.sb.root.target.number)]
    for path, folder in todo:
        for name, child in nodes[folder].entries.items():
            below = f"{path}/{name.decode()}"
            paths[nodes[child].kind].append(below)
            if nodes[child].kind == "dir":
                todo.append((below, child))
    if kind not in paths:
        return f"{paths['dir'][number % len(paths['dir'])]}/{kind}"
    return paths[kind][number % len(paths[kind])] if paths[kind] else "/none"


def apply(twin, step):
    """Do a drawn step, unless it has nothing to be done on."""
    name, *args = step
    args = [resolved(twin, arg) for arg in args]
    if name == "mark":
        path, seed = args
        mask = sum(bit for i, bit in enumerate(NAMED) if seed >> i & 1) or m.OPEN
        mask |= m.ONDIR if seed >> 20 & 1 else 0
        twin.mark(path, mask | (m.EVENT_ON_CHILD if seed >> 21 & 1 else 0))
        return
    many = ON_FILES.get(name, 0)
    if many and not twin.files:
        return
    on = [number % len(twin.files) for number in args[:many]]
    if name == "sendfile" and twin.same(*on):
        return  # within one file it depends on which pages are shared with the pipe
    if name == "open" and len(twin.files) >= 6:
        return
    if name == "close":
        twin.do(name, on=on)
    else:
        twin.do(name, *args[many:], on=on)


FIRST = [("mkdir", "/a"), ("mkdir", "/b"), ("open", "/a/b", os.O_CREAT | os.O_RDWR)]


@settings(
    max_examples=int(os.environ.get("VFS_EXAMPLES", "150")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(first=st.booleans(), steps=st.lists(STEPS, min_size=20, max_size=60))
def test_the_same_operations_end_alike(disk, first, steps):
    point, memory = disk
    clear(point)
    with Twin(point, memory) as twin:
        for step in [*(FIRST if first else []), *steps]:
            apply(twin, step)
        twin.tree()
        while twin.files:
            twin.do("close", on=[0])


def test_a_removed_directory(disk):
    point, memory = disk
    clear(point)
    with Twin(point, memory) as twin:
        twin.do("mkdir", "/d")
        twin.do("open", "/d", os.O_RDONLY)
        assert twin.do("readdir", on=[0]) == ("ok", [])
        twin.do("rmdir", "/d")
        assert twin.do("readdir", on=[0]) == "ENOENT"
        assert twin.do("fstat", on=[0])[1].nlink == 0
        twin.do("mkdir", "/d")
        twin.do("close", on=[0])
