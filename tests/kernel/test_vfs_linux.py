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


names = st.sampled_from(["a", "b", "c"])
paths = st.one_of(
    names.map(lambda a: f"/{a}"),
    st.tuples(names, names).map(lambda p: "/" + "/".join(p)),
    st.tuples(names, names, names).map(lambda p: "/" + "/".join(p)),
    st.sampled_from(["/.", "/a/..", "/a/.", "/a/../b", "/b/./a", "/a/b/../c"]),
)
modes = st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
extra = st.lists(
    st.sampled_from([os.O_CREAT, os.O_CREAT, os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_DIRECTORY]),
    max_size=2,
)
flags = st.tuples(modes, extra).map(lambda p: p[0] | sum(set(p[1])))
file = st.integers(0, 5)
count = st.sampled_from([0, 1, 5, 4096, 5000, 9000])
data = st.tuples(st.binary(min_size=1, max_size=1), count).map(lambda p: p[0] * p[1])
at = st.one_of(st.none(), count)

STEPS = st.one_of(
    st.tuples(st.just("open"), paths, flags),
    st.tuples(st.just("open"), paths, flags),
    st.tuples(st.sampled_from(["mkdir", "create", "mkdir"]), paths),
    st.tuples(st.sampled_from(["unlink", "rmdir", "stat"]), paths),
    st.tuples(st.just("rename"), paths, paths, st.sampled_from([0, 0, 0, 1, 2, 3])),
    st.tuples(st.just("link"), paths, paths),
    st.tuples(st.just("truncate"), paths, st.sampled_from([-1, 0, 3, 4096, 4100, 9000])),
    st.tuples(st.just("setattr"), paths, st.sampled_from([0o700, 0o755, 0o644])),
    st.tuples(st.just("close"), file),
    st.tuples(st.just("read"), file, count, at),
    st.tuples(st.just("write"), file, data, at),
    st.tuples(st.sampled_from(["readdir", "fstat"]), file),
    st.tuples(st.just("ftruncate"), file, count),
    st.tuples(st.just("sendfile"), file, file, count, at),
    st.tuples(st.just("mark"), paths, st.integers(0, 1 << 30)),
)

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


def apply(twin, step):
    name, *args = step
    if name == "mark":
        path, seed = args
        mask = sum(bit for i, bit in enumerate(NAMED) if seed >> i & 1) or m.OPEN
        twin.mark(
            path,
            mask | (m.ONDIR if seed >> 20 & 1 else 0) | (m.EVENT_ON_CHILD if seed >> 21 & 1 else 0),
        )
        return
    many = ON_FILES.get(name, 0)
    if many:
        if not twin.files:
            return
        on = [number % len(twin.files) for number in args[:many]]
        if name == "sendfile" and twin.same(*on):
            return  # within one file it depends on which pages are shared with the pipe
        if name == "close":
            twin.do(name, on=on)
        else:
            twin.do(name, *args[many:], on=on)
        return
    if name == "open" and len(twin.files) >= 6:
        return
    twin.do(name, *args)


FIRST = [("mkdir", "/a"), ("mkdir", "/b"), ("open", "/a/b", os.O_CREAT | os.O_RDWR)]


@settings(
    max_examples=int(os.environ.get("VFS_EXAMPLES", "150")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(first=st.booleans(), steps=st.lists(STEPS, min_size=1, max_size=50))
def test_the_same_operations_end_alike(disk, first, steps):
    point, memory = disk
    clear(point)
    with Twin(point, memory) as twin:
        for step in [*(FIRST if first else []), *steps]:
            apply(twin, step)
        twin.tree()
        while twin.files:
            twin.do("close", on=[0])
