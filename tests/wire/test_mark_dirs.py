"""mark_dirs, present_in and mount_at: native and pure answer alike, also when asked nonsense."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fanwise._errors import NotWatchable
from fanwise.kernel import fanotify as fan
from fanwise.kernel.contract import LIST_FILES, LIST_LEAVES
from fanwise.kernel.handles import identify
from fanwise.kernel.mounts import mount_of
from fanwise.sources import inotify
from tests.wire.twins import PURE, native_parts

MASK = fan.FAN_CREATE | fan.FAN_DELETE | fan.FAN_RENAME | fan.FAN_ONDIR | fan.FAN_EVENT_ON_CHILD
NAMES = [b"f", b"dir", b"link", b"away", b"\xff\xfe", b"none", b"n" * 255, b"nowhere"]


@pytest.fixture(params=["fanotify", "inotify"])
def groups(request, tmp_path, cannot_run):
    """One group for each twin."""
    made = []
    try:
        for _ in range(2):
            if request.param == "inotify":
                made.append(inotify.init(str(tmp_path)))
            else:
                made.append(fan.init(fan.FAN_NONBLOCK | fan.FAN_REPORT_DFID_NAME_TARGET))
                fan.mark(made[-1], fan.FAN_MARK_ADD, MASK, path=tmp_path)
    except NotWatchable as error:
        cannot_run(str(error))
    yield (*made, request.param == "inotify")
    for fd in made:
        os.close(fd)


def tree(base, rng):
    """Directories of all kinds below a path; their paths."""
    found = [os.fsencode(base)]
    for number in range(rng.randrange(3, 12)):
        name = rng.choice([b"dir", b"%d" % number, b"\xff%d" % number])
        path = rng.choice(found) + b"/" + name
        if os.path.lexists(path):
            continue
        os.mkdir(path)
        found.append(path)
        for name in rng.sample(NAMES[:5], rng.randrange(5)):
            if not os.path.lexists(path + b"/" + name):
                if name == b"link":
                    os.symlink(b"nowhere", path + b"/link")
                else:
                    os.close(os.open(path + b"/" + name, os.O_CREAT | os.O_WRONLY))
        for number in range(rng.choice([0, 0, 30, 600])):
            os.close(os.open(path + b"/many%d" % number, os.O_CREAT | os.O_WRONLY))
    return found


def questions(found, rng):
    """(key, path) pairs; some paths lead to another directory, or to none."""
    items = []
    for _ in range(rng.randrange(1, 15)):
        path = rng.choice(found)
        key = identify(rng.choice([path, path, path, rng.choice(found)]))[0]
        wrong = [path + b"/f", path + b"/link", path + b"/none", path + b"/" + b"n" * 300, b""]
        items.append((key, rng.choice([path] * 8 + wrong + [path + b"/." * 3000])))
    return items


@pytest.mark.parametrize("seed", range(40))
def test_mark_dirs(groups, tmp_path, cannot_run, seed):
    rng = random.Random(seed)
    items = questions(tree(tmp_path, rng), rng)
    mask = inotify._ALWAYS if groups[2] else MASK
    for what in (0, LIST_FILES, LIST_LEAVES, LIST_FILES | LIST_LEAVES):
        told = []
        for fd, parts in zip(groups, (native_parts(cannot_run), PURE), strict=False):
            found, ends = parts.mark_dirs(fd, groups[2], mask, items, what)
            told.append((sorted(found), ends))
        assert told[0] == told[1]
        codes = [code for code, _ in told[0][1]]
        for (key, path), code in zip(items, codes, strict=True):
            try:
                right = identify(path)[0] == key and not os.path.islink(path)
            except OSError:
                right = False
            if len(path) < 4000:
                assert (code == 0) == right, (path, code)


@pytest.mark.parametrize("seed", range(80))
def test_present_in(tmp_path, cannot_run, seed):
    rng = random.Random(seed)
    mount = identify(tmp_path)[1]
    items = []
    for key, path in questions(tree(tmp_path, rng), rng):
        names = rng.sample(NAMES, rng.randrange(len(NAMES)))
        names += [b"many%d" % n for n in range(rng.choice([0, 0, 9, 700]))]
        items.append((key, path, dict.fromkeys(names) if rng.random() < 0.5 else names))
    native = native_parts(cannot_run).present_in(items, mount)
    assert native == PURE.present_in(items, mount)
    for (_, path, names), found in zip(items, native, strict=True):
        if isinstance(found, list):
            assert found == [n for n in names if os.path.lexists(os.path.normpath(path) + b"/" + n)]
        else:
            assert found in (errno.ESTALE, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
    assert {each if isinstance(each, int) else 0 for each in PURE.present_in(items, -1)} <= {
        errno.ESTALE, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}  # fmt: skip
    assert native_parts(cannot_run).present_in(items, -1) == PURE.present_in(items, -1)


@pytest.mark.parametrize("bad", [[(b"abc", b"/", [])], [(bytes(200), b"/", [])]])
def test_a_key_that_is_none(cannot_run, bad):
    for parts in (native_parts(cannot_run), PURE):
        with pytest.raises(ValueError, match="not a handle key"):
            parts.present_in(bad, 1)


@pytest.mark.parametrize("bad", [[(b"abcd", b"/", [1])], [(b"abcd", b"/", 5)], [(b"abcd",)], 7])
def test_what_is_no_question(cannot_run, bad):
    with pytest.raises(TypeError):
        native_parts(cannot_run).present_in(bad, 1)


def test_a_name_that_cannot_be_looked_at_may_be_there(tmp_path, cannot_run):
    if os.geteuid() != 0:
        cannot_run("becoming another user needs root")
    (tmp_path / "shut").mkdir(mode=0o744)
    (tmp_path / "shut/f").touch()
    items = [(identify(tmp_path / "shut")[0], os.fsencode(tmp_path / "shut"), [b"f", b"none"])]
    mount = identify(tmp_path)[1]
    for above in tmp_path.parents:  # search, and no more
        if above.is_relative_to("/tmp") and above != above.parent and str(above) != "/tmp":
            above.chmod(above.stat().st_mode | 0o011)
    tmp_path.chmod(0o711)
    for parts in (native_parts(cannot_run), PURE):
        os.seteuid(61234)
        try:
            told = parts.present_in(items, mount)
        finally:
            os.seteuid(0)
        assert told == [[b"f", b"none"]]


def test_mount_at(tmp_path, cannot_run):
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to("/proc/self")  # it is not followed
    (tmp_path / "dangling").symlink_to("nowhere")
    there = ["/", b"/proc", "/dev/null", "/sys", tmp_path, *tmp_path.iterdir()]
    nowhere = {
        tmp_path / "none": errno.ENOENT,
        tmp_path / "link/x/y": errno.ENOENT,
        "/dev/null/x": errno.ENOTDIR,
        "/" + "x" * 5000: errno.ENAMETOOLONG,
        "": errno.ENOENT,
    }
    for parts in (native_parts(cannot_run), PURE):
        found = {path: parts.mount_at(path) for path in there}
        assert found == {path: mount_of_link(path) for path in there}
        assert found[tmp_path / "link"] == found[tmp_path] != found[b"/proc"]
        for path, code in nowhere.items():
            with pytest.raises(OSError, match=rf"\[Errno {code}\]"):
                parts.mount_at(path)
        for bad in (7, None, "a\0b"):
            with pytest.raises((TypeError, ValueError)):
                parts.mount_at(bad)


HIDE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/stat.h>

int statx(int fd, const char *restrict path, int flags, unsigned mask, struct statx *restrict st)
{
    int (*real)(int, const char *, int, unsigned, struct statx *) = dlsym(RTLD_NEXT, "statx");
    int failed = real(fd, path, flags, mask, st);
    if (!failed) {
        st->stx_mask &= ~0x1000u;
        st->stx_mnt_id = 0;
    }
    return failed;
}
"""
OLD = """
import errno, json, sys
from fanwise.kernel import native
from tests.kernel import refusals

refuse, code, *paths = sys.argv[1:]
refusals.install_filter(refuse.split(), int(code))
for parts in (native.parts(pure=False), native.parts(pure=True)):
    said = []
    for path in paths:
        try:
            said.append(parts.mount_at(path))
        except OSError as error:
            said.append(errno.errorcode[error.errno])
    print(json.dumps(said))
"""


@pytest.mark.parametrize("code", [None, errno.ENOSYS, errno.EPERM])
def test_mount_at_where_statx_does_not_say(tmp_path, cannot_run, code):
    """Before Linux 5.8, which does not know the flag, 4.11, or under a filter; and no handles."""
    native_parts(cannot_run)
    (tmp_path / "link").symlink_to("/proc/self")
    there = ["/", "/proc", "/dev/null", "/sys", str(tmp_path), str(tmp_path / "link")]
    nowhere = {str(tmp_path / "none"): "ENOENT", "/dev/null/x": "ENOTDIR"}
    refuse, env = "statx name_to_handle_at", dict(os.environ)
    if code is None:
        compiler = shutil.which("cc") or shutil.which("gcc") or cannot_run("no C compiler")
        hide = str(tmp_path / "hide.so")
        command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", hide, "-ldl"]
        subprocess.run(command, input=HIDE, text=True, check=True)
        env["LD_PRELOAD"] = f"{env.get('LD_PRELOAD', '')} {hide}"
        refuse, code = "name_to_handle_at", errno.EOPNOTSUPP
    child = subprocess.run(
        [sys.executable, "-c", OLD, refuse, str(code), *there, *nowhere],
        stdout=subprocess.PIPE, check=True, text=True, env=env, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    expected = [*map(mount_of_link, there), *nowhere.values()]
    assert [json.loads(line) for line in child.stdout.splitlines()] == [expected] * 2


def mount_of_link(path):
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    try:
        return mount_of(fd).id
    finally:
        os.close(fd)
