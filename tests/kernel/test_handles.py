import errno
import os
import subprocess

import pytest
from hypothesis import given, strategies as st

from fanwise._errors import DecodeError, FilesystemRefuses
from fanwise.kernel import fanotify as fan, handles, records
from fanwise.kernel.handles import identity, inode_of, name_to_handle, open_by_handle

SIZES = {"tmpfs": None, "ext4": 32 << 20, "xfs": 320 << 20, "btrfs": 120 << 20}


@pytest.fixture
def mounted(tmp_path):
    points = []

    def mount(fstype, options="rw"):
        point = tmp_path / f"m{len(points)}"
        point.mkdir()
        source = tmp_path / f"m{len(points)}.img"
        if SIZES.get(fstype):
            with source.open("wb") as file:
                file.truncate(SIZES[fstype])
            subprocess.run([f"mkfs.{fstype}", "-q", source], check=True)
            options = f"loop,{options}"
        subprocess.run(["mount", "-t", fstype, "-o", options, source, point], check=True)
        points.append(point)
        return point

    yield mount
    for point in reversed(points):
        subprocess.run(["umount", "-l", point], check=True)


def one_creation(point, mark, directory, name):
    """The information of the one event of creating a file."""
    fd = fan.init(fan.FAN_REPORT_DFID_NAME_TARGET | fan.FAN_CLOEXEC)
    try:
        fan.mark(fd, fan.FAN_MARK_ADD | mark, fan.FAN_CREATE | fan.FAN_EVENT_ON_CHILD, path=point)
        (directory / name).touch()
        (record,) = records.decode(os.read(fd, 4096))
    finally:
        os.close(fd)
    assert record.mask == fan.FAN_CREATE
    assert record.pid == os.getpid()
    return record.infos


@pytest.mark.parametrize("fstype", SIZES)
def test_a_key_is_what_records_hold(mounted, fstype):
    point = mounted(fstype)
    directory = point / "d"
    directory.mkdir()
    parent, target = one_creation(point, fan.FAN_MARK_FILESYSTEM, directory, "new")
    assert (parent.type, parent.name) == (records.DFID_NAME, b"new")
    assert (target.type, target.name) == (records.FID, None)
    assert parent.key == name_to_handle(directory)[0]
    assert target.key == name_to_handle(directory / "new")[0]


@pytest.mark.parametrize(
    ("fstype", "options"),
    [(fstype, "rw") for fstype in SIZES] + [("tmpfs", "inode32"), ("xfs", "inode32")],
)
def test_the_inode_number_inside_a_key(mounted, fstype, options):
    point = mounted(fstype, options)
    (point / "d").mkdir()
    (point / "f").touch()
    for path in (point, point / "d", point / "f"):
        assert inode_of(name_to_handle(path)[0]) == path.stat().st_ino
    # With AT_HANDLE_FID the same.
    assert name_to_handle(point, fid=True) == name_to_handle(point)


@pytest.mark.parametrize("path", ["/proc", "/proc/version", "/sys/kernel"])
def test_filesystems_whose_handles_only_identify(path):
    with pytest.raises(FilesystemRefuses) as caught:
        name_to_handle(path)
    assert caught.value.__cause__.errno == errno.EOPNOTSUPP
    assert inode_of(name_to_handle(path, fid=True)[0]) == os.stat(path).st_ino


def test_a_control_group(mounted):
    point = mounted("cgroup2")
    assert inode_of(name_to_handle(point)[0]) == point.stat().st_ino


def test_an_overlay(mounted):
    base = mounted("tmpfs")
    for name in ("lower", "upper", "work"):
        (base / name).mkdir()
    point = mounted("overlay", f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work")
    with pytest.raises(FilesystemRefuses, match="no file handles that can be opened"):
        name_to_handle(point)
    parent, target = one_creation(point, fan.FAN_MARK_INODE, point, "new")
    assert parent.key == name_to_handle(point, fid=True)[0]
    assert target.key == name_to_handle(point / "new", fid=True)[0]
    assert inode_of(parent.key) is None


def test_opening_by_key(mounted):
    point = mounted("ext4")
    (point / "f").write_text("content")
    key, _ = name_to_handle(point / "f")
    mount_fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
    path_fd = os.open(point, os.O_PATH)
    try:
        fd = open_by_handle(mount_fd, key)
        assert os.readlink(f"/proc/self/fd/{fd}") == str(point / "f")
        assert not os.get_inheritable(fd)
        os.close(fd)
        fd = open_by_handle(mount_fd, key, os.O_RDONLY)
        assert os.read(fd, 100) == b"content"
        os.close(fd)
        # The kernel refuses a descriptor of O_PATH here (measured on 6.18).
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            open_by_handle(path_fd, key)
        assert caught.value.errno == errno.EBADF
        (point / "f").unlink()
        with pytest.raises(OSError, match="Stale") as caught:
            open_by_handle(mount_fd, key)
        assert caught.value.errno == errno.ESTALE
    finally:
        os.close(mount_fd)
        os.close(path_fd)


def test_names_links_and_descriptors(mounted):
    point = mounted("tmpfs")
    (point / "f").touch()
    (point / "l").symlink_to("f")
    key, mount_id = name_to_handle(point / "f")
    assert name_to_handle(point / "l") != (key, mount_id)
    assert name_to_handle(point / "l", follow=True) == (key, mount_id)
    fd = os.open(point, os.O_RDONLY)
    try:
        assert name_to_handle(b"f", fd) == (key, mount_id)
        assert name_to_handle("", fd, empty=True) == name_to_handle(point)
    finally:
        os.close(fd)
    with pytest.raises(FileNotFoundError):
        name_to_handle(point / "none")
    with open("/proc/self/mountinfo", "rb") as file:
        assert mount_id in [int(line.split()[0]) for line in file]


# Identities: no kernel needed, but together with the keys they are about


def test_the_text_of_an_identity():
    key = bytes.fromhex("01000000" + "0b0000001a2b3c4d")
    assert identity((7, 0), key) == "7:0/1/0b0000001a2b3c4d"
    assert identity((0, 4095), bytes.fromhex("ffffffff")) == "0:4095/ffffffff/"


@given(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    st.binary(min_size=4, max_size=132),
)
def test_an_identity_reads_back(dev, key):
    assert handles.parse_identity(identity(dev, key)) == (dev, key)


@given(st.text() | st.from_regex(r"\d+:\d+/[0-9a-f]+/([0-9a-f]+)?"))
def test_one_file_has_one_text(text):
    try:
        read = handles.parse_identity(text)
    except DecodeError:
        return
    assert identity(*read) == text


@pytest.mark.parametrize(
    "text",
    ["", "7:0/1/0", "07:0/1/00", "7:0/01/00", "7:0/1/0A", "7:0/100000000/", "7:0/1/00\n", "7/1/00",
     "7:0/1/" + "00" * 129, "\u0667:0/1/00"],
)  # fmt: skip
def test_what_is_no_identity(text):
    with pytest.raises(DecodeError):
        handles.parse_identity(text)


@pytest.mark.parametrize("key", [b"", b"abc", bytes(133)])
def test_what_is_no_key(key):
    with pytest.raises(DecodeError):
        identity((0, 1), key)
    with pytest.raises(DecodeError):
        open_by_handle(0, key)
    assert inode_of(key) is None


@given(st.binary(max_size=140))
def test_any_key_has_an_inode_number_or_none(key):
    found = inode_of(key)
    assert found is None or 0 <= found < 2**64
