import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fanwise
from fanwise._errors import (
    FeatureMissing,
    FilesystemRefuses,
    NoSuchRoot,
    NotWatchable,
)
from fanwise.kernel import fanotify as fan
from fanwise.kernel.caps import CAP_SYS_ADMIN, Credentials, credentials

REFUSALS = Path(__file__).with_name("refusals.py")
PATH = str(Path(fanwise.__file__).parents[1])


def refusal(name, *arguments):
    """How the named function of refusals.py ended, in a process of its own."""
    done = subprocess.run(
        [sys.executable, REFUSALS, name, *arguments],
        env={**os.environ, "PYTHONPATH": PATH},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def group():
    fds = []

    def make(flags=fan.FAN_REPORT_DFID_NAME_TARGET):
        fds.append(fan.init(flags | fan.FAN_CLOEXEC))
        return fds[-1]

    yield make
    for fd in fds:
        os.close(fd)


@pytest.fixture
def mounted(tmp_path):
    points = []

    def mount(*arguments, size=None):
        point = tmp_path / f"m{len(points)}"
        point.mkdir()
        if size:
            image = tmp_path / f"m{len(points)}.img"
            with image.open("wb") as file:
                file.truncate(size)
            subprocess.run([f"mkfs.{arguments[1]}", "-q", image], check=True)
            arguments = (*arguments[:2], "-o", "loop", image)
        subprocess.run(["mount", *arguments, point], check=True)
        points.append(point)
        return point

    yield mount
    for point in reversed(points):
        subprocess.run(["umount", "-l", point], check=True)


ADD = fan.FAN_MARK_ADD
WHOLE = fan.FAN_MARK_ADD | fan.FAN_MARK_FILESYSTEM


# Privileges


def test_a_missing_capability():
    told = refusal("nobody_unlimited")
    assert (told["type"], told["errno"]) == ("PermissionNeeded", "EPERM")
    assert "CAP_SYS_ADMIN" in told["reason"]
    assert "FAN_UNLIMITED_QUEUE" in told["reason"]
    assert "namespace" not in told["reason"]
    assert told["path"] == "/root/of/watch"


def test_a_mark_without_the_capability():
    told = refusal("nobody_marks_a_filesystem")
    assert (told["type"], told["errno"], told["path"]) == ("PermissionNeeded", "EPERM", "/")
    assert "CAP_SYS_ADMIN" in told["reason"]
    assert "FAN_MARK_FILESYSTEM" in told["reason"]


def test_a_mark_on_what_may_not_be_read(tmp_path):
    tmp_path.chmod(0o700)
    told = refusal("nobody_marks_unreadable", tmp_path)
    assert (told["type"], told["errno"]) == ("PermissionNeeded", "EACCES")
    assert told["path"] == str(tmp_path)


@pytest.mark.parametrize("name", ["namespace_root_unlimited", "namespace_root_marks_a_filesystem"])
def test_a_capability_of_a_user_namespace(name):
    told = refusal(name)
    assert (told["type"], told["errno"]) == ("PermissionNeeded", "EPERM")
    assert "user namespace" in told["reason"]


def test_the_audit_capability():
    told = refusal("audit_without_its_capability")
    assert told["type"] == "PermissionNeeded"
    assert "CAP_AUDIT_WRITE" in told["reason"]


def test_a_refusal_although_the_capability_is_held():
    # Only a security module can cause it here, and none is loaded: the explanation alone.
    root = Credentials(effective=2**41 - 1, filtered=False, initial=True)
    error = fan._needs("/", CAP_SYS_ADMIN, root, "FAN_MARK_FILESYSTEM")
    assert "CAP_SYS_ADMIN is held" in error.reason


def test_the_credentials_of_this_process():
    status = Path("/proc/thread-self/status").read_text()
    found = credentials()
    assert f"CapEff:	{found.effective:016x}" in status
    assert f"Seccomp:	{2 if found.filtered else 0}" in status
    assert found.initial == (os.readlink("/proc/self/ns/user") == "user:[4026531837]")


# Seccomp


@pytest.mark.parametrize(
    ("name", "call", "code"),
    [
        ("filter_init", "fanotify_init", "EPERM"),
        ("filter_init_as_if_absent", "fanotify_init", "ENOSYS"),
        ("filter_init_of_nobody", "fanotify_init", "EPERM"),
        ("filter_one_kind_of_group", "fanotify_init", "EPERM"),
        ("filter_mark", "fanotify_mark", "EPERM"),
        ("filter_mark_as_if_absent", "fanotify_mark", "ENOSYS"),
        ("filter_statmount", "listmount", "ENOSYS"),
    ],
)
def test_a_filter(name, call, code):
    told = refusal(name)
    assert (told["type"], told["errno"]) == ("SyscallBlocked", code)
    assert "seccomp" in told["reason"]
    assert call in told["reason"]


def test_a_filter_that_is_not_the_reason():
    assert refusal("filter_something_else_and_nobody")["type"] == "PermissionNeeded"


def test_a_filter_of_the_handle_calls(tmp_path):
    for name, call in (
        ("filter_handles", "name_to_handle_at"),
        ("filter_open_by_handle", "open_by_handle_at"),
    ):
        told = refusal(name, tmp_path)
        assert told["type"] == "SyscallBlocked"
        assert call in told["reason"]
    told = refusal("open_by_handle_without_its_capability", tmp_path)
    assert told["type"] == "PermissionNeeded"
    assert "CAP_DAC_READ_SEARCH" in told["reason"]


# Limits


@pytest.mark.parametrize("name", ["nobody_seizes_groups", "namespace_root_seizes_groups"])
def test_the_limit_of_groups(name):
    told = refusal(name)
    assert (told["type"], told["errno"]) == ("LimitReached", "EMFILE")
    assert told["sysctl"] == "fs.fanotify.max_user_groups"
    limit = Path("/proc/sys/fs/fanotify/max_user_groups").read_text().strip()
    assert f"({limit})" in told["reason"]
    assert "sysctl -w fs.fanotify.max_user_groups=" in told["remedy"]
    assert ("user.max_fanotify_groups" in told["remedy"]) == name.startswith("namespace")


def test_the_limit_of_marks(tmp_path):
    told = refusal("marks_up_to_a_limit", tmp_path)
    assert (told["type"], told["errno"]) == ("LimitReached", "ENOSPC")
    assert told["sysctl"] == "fs.fanotify.max_user_marks"
    assert "user.max_fanotify_marks (3)" in told["reason"]
    assert "user.max_fanotify_marks" in told["remedy"]


def test_the_limit_of_descriptors():
    told = refusal("seize_descriptors")
    assert (told["type"], told["errno"], told["sysctl"]) == (
        "LimitReached",
        "EMFILE",
        "RLIMIT_NOFILE",
    )
    assert "ulimit" in told["remedy"]


# Features


def refused(kind, call, *arguments, **named):
    with pytest.raises(NotWatchable) as caught:
        call(*arguments, **named)
    assert type(caught.value) is kind, caught.value
    assert isinstance(caught.value.__cause__, OSError)
    return caught.value


def test_an_unknown_flag_is_named():
    flags = fan.FAN_REPORT_DFID_NAME_TARGET | 0x4000_0000
    error = refused(FeatureMissing, fan.init, flags, path="/somewhere")
    assert error.reason.endswith("does not know 0x40000000")
    assert error.path == "/somewhere"
    assert error.__cause__.errno == errno.EINVAL


def test_a_combination_is_not_an_unknown_flag():
    error = refused(FeatureMissing, fan.init, fan.FAN_REPORT_MNT | fan.FAN_REPORT_FID)
    assert "combination" in error.reason
    assert "FAN_REPORT_MNT" in error.reason
    error = refused(FeatureMissing, fan.init, fan.FAN_CLASS_NOTIF, 0x8000_0000)
    assert "0x80000000" in error.reason


@pytest.mark.parametrize(
    ("flags", "mask", "says"),
    [
        (ADD | 0x8000, fan.FAN_MODIFY, "fanotify_mark does not know 0x8000"),
        (WHOLE, fan.FAN_MODIFY | 0x8_0000, "does not know the events 0x80000"),
        (ADD | fan.FAN_MARK_MOUNT, fan.FAN_CREATE | fan.FAN_MODIFY, "no FAN_CREATE"),
        (ADD, fan.FAN_FS_ERROR, "needs a filesystem mark"),
        (ADD, fan.FAN_OPEN_PERM, "FAN_OPEN_PERM needs a group of class"),
        (WHOLE, fan.FAN_MNT_ATTACH, "mount namespace"),
        (ADD | fan.FAN_MARK_MNTNS, fan.FAN_MODIFY, "mount namespace"),
        (WHOLE | fan.FAN_MARK_EVICTABLE, fan.FAN_MODIFY, "FAN_MARK_EVICTABLE"),
    ],
)
def test_why_a_mark_is_invalid(group, tmp_path, flags, mask, says):
    error = refused(FeatureMissing, fan.mark, group(), flags, mask, path=tmp_path)
    assert says in error.reason
    assert error.path == str(tmp_path)


def test_events_that_need_another_group(group, tmp_path):
    error = refused(FeatureMissing, fan.mark, group(0), WHOLE, fan.FAN_CREATE, path=tmp_path)
    assert "reports file handles" in error.reason
    fd = group(fan.FAN_REPORT_FID)
    error = refused(FeatureMissing, fan.mark, fd, WHOLE, fan.FAN_RENAME, path=tmp_path)
    assert "FAN_REPORT_NAME" in error.reason


# Filesystems


@pytest.mark.parametrize("path", ["/proc", "/sys"])
def test_filesystems_that_cannot_open_handles(group, path):
    error = refused(FilesystemRefuses, fan.mark, group(), WHOLE, fan.FAN_MODIFY, path=path)
    assert error.__cause__.errno == errno.EOPNOTSUPP
    assert "cannot open file handles" in error.reason
    assert {"/proc": "proc", "/sys": "sysfs"}[path] in error.reason
    assert "marks on single directories" in error.remedy


def test_pre_content_events_of_tmpfs(group, mounted):
    point = mounted("-t", "tmpfs", "t")
    fd = group(fan.FAN_CLASS_PRE_CONTENT)
    error = refused(FilesystemRefuses, fan.mark, fd, WHOLE, fan.FAN_PRE_ACCESS, path=point)
    assert "tmpfs has no pre-content events" in error.reason


def test_a_btrfs_subvolume_and_a_second_filesystem(group, mounted):
    point = mounted("-t", "btrfs", size=120 << 20)
    subprocess.run(["btrfs", "-q", "subvolume", "create", point / "sv"], check=True)
    fd = group()
    error = refused(FilesystemRefuses, fan.mark, fd, WHOLE, fan.FAN_MODIFY, path=point / "sv")
    assert error.__cause__.errno == errno.EXDEV
    assert "btrfs subvolume" in error.reason
    assert "subvolid=5" in error.remedy
    fan.mark(fd, ADD, fan.FAN_MODIFY, path=point / "sv")
    other = mounted("-t", "tmpfs", "t")
    error = refused(FilesystemRefuses, fan.mark, fd, WHOLE, fan.FAN_MODIFY, path=other)
    assert error.__cause__.errno == errno.EXDEV
    assert "group of its own" in error.remedy
    # The other way round it is the inode mark in the subvolume that is one too many.
    fd = group()
    fan.mark(fd, WHOLE, fan.FAN_MODIFY, path=other)
    error = refused(FilesystemRefuses, fan.mark, fd, ADD, fan.FAN_MODIFY, path=point / "sv")
    assert "group of its own" in error.remedy


# Paths and descriptors


def test_paths_that_do_not_exist(group, tmp_path):
    (tmp_path / "file").touch()
    fd = group()
    for flags, path, code in (
        (WHOLE, tmp_path / "none", errno.ENOENT),
        (ADD | fan.FAN_MARK_ONLYDIR, tmp_path / "file", errno.ENOTDIR),
        (WHOLE, tmp_path / ("x" * 300), errno.ENAMETOOLONG),
    ):
        error = refused(NoSuchRoot, fan.mark, fd, flags, fan.FAN_MODIFY, path=path)
        assert error.path == str(path)
        assert error.__cause__.errno == code


def test_removing_a_mark_that_is_not_there(group, tmp_path):
    fd = group()
    error = refused(NotWatchable, fan.mark, fd, fan.FAN_MARK_REMOVE, fan.FAN_MODIFY, path=tmp_path)
    assert "no such mark" in error.reason


def test_a_relative_path_in_an_error(group):
    base = os.open("/proc/self", os.O_PATH)
    try:
        fd = group()
        error = refused(FilesystemRefuses, fan.mark, fd, WHOLE, fan.FAN_MODIFY, base, "fd")
        assert error.path == f"/proc/self/fd/{base}/fd"
        # The kernel takes no descriptor of O_PATH as the object itself (measured on 6.18).
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            fan.mark(fd, WHOLE, fan.FAN_MODIFY, base)
        assert caught.value.errno == errno.EBADF
    finally:
        os.close(base)
    base = os.open("/proc", os.O_RDONLY)
    try:
        error = refused(FilesystemRefuses, fan.mark, fd, WHOLE, fan.FAN_MODIFY, base)
        assert error.path == f"/proc/self/fd/{base}"
        assert "proc cannot" in error.reason
    finally:
        os.close(base)


def test_a_closed_descriptor_is_the_callers_mistake(tmp_path):
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        fan.mark(-1, WHOLE, fan.FAN_MODIFY, path=tmp_path)
    assert caught.value.errno == errno.EBADF


# Constants


def test_the_kernel_knows_every_constant(tmp_path):
    # Asked in the way in which init and mark ask when something failed.
    for bit in fan.EVENTS:
        of = fan.FAN_MARK_MNTNS if bit & 0x300_0000 else 0
        asked = fan._try_mark(ADD | of, bit)
        assert asked == (errno.EINVAL if bit == fan.FAN_Q_OVERFLOW else errno.EBADF), hex(bit)
    for bit in fan.INIT_FLAGS:
        assert fan._try_init(fan._TOGETHER.get(bit, 0) | bit, 0) == 0, hex(bit)
    assert fan.INIT_FLAGS[0x1000] == "FAN_REPORT_TARGET_FID"
    assert fan.MARK_FLAGS[0x400] == "FAN_MARK_IGNORE"
    assert fan.EVENTS[0x1000_0000] == "FAN_RENAME"
    assert (len(fan.INIT_FLAGS), len(fan.MARK_FLAGS), len(fan.EVENTS)) == (15, 11, 24)


def test_asking_leaves_no_descriptor():
    before = len(os.listdir("/proc/self/fd"))
    refused(FeatureMissing, fan.init, fan.FAN_REPORT_FID | 0x4000_0000)
    assert len(os.listdir("/proc/self/fd")) == before
