import os
import struct

import pytest
from hypothesis import given, strategies as st

from fanwise._errors import DecodeError, NoSuchRoot
from fanwise.kernel import mounts
from fanwise.kernel.mounts import Mount, MountStat, decode_statmount, parse_mountinfo

PLAIN = b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n"


def test_every_field():
    assert parse_mountinfo(PLAIN) == [
        Mount(
            36,
            35,
            (98, 0),
            b"/mnt1",
            b"/mnt2",
            ("rw", "noatime"),
            ("master:1",),
            "ext3",
            b"/dev/root",
            ("rw", "errors=continue"),
        )
    ]


def one(line):
    (mount,) = parse_mountinfo(line)
    return mount


@pytest.mark.parametrize(
    ("fields", "seen"),
    [
        (b"", ()),
        (b"shared:1 ", ("shared:1",)),
        (b"shared:1 master:2 propagate_from:3 ", ("shared:1", "master:2", "propagate_from:3")),
        (b"unbindable later:thing ", ("unbindable", "later:thing")),
    ],
)
def test_optional_fields(fields, seen):
    assert one(b"1 2 0:3 / /m rw " + fields + b"- tmpfs t rw").fields == seen


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (rb"/a\040b", b"/a b"),
        (rb"/a\011b\012c\134d\043e", b"/a\tb\nc\\d#e"),
        (rb"/a\134040b", rb"/a\040b"),  # a name that looks like an escape
        (b"/\xff\xfe", b"/\xff\xfe"),
        (rb"/a\9b\04", rb"/a\9b\04"),  # not an escape
        (rb"/a\400", rb"/a\400"),  # more than a byte
        (b"/-", b"/-"),
    ],
)
def test_escapes(written, name):
    mount = one(b"1 2 0:3 " + written + b" " + written + b" rw - tmpfs " + written + b" rw")
    assert (mount.root, mount.mount_point, mount.source) == (name, name, name)


def test_a_hyphen_as_mount_point_and_source():
    mount = one(b"1 2 0:3 - - rw - tmpfs - rw")
    assert (mount.root, mount.mount_point, mount.source) == (b"-", b"-", b"-")


def test_an_empty_source():
    mount = one(b"1 2 0:3 / /m rw - tmpfs  rw")
    assert (mount.fstype, mount.source, mount.super_options) == ("tmpfs", b"", ("rw",))


def test_options_with_commas_and_bytes():
    mount = one(rb"1 2 0:3 / /m rw - fuse.x\040y s rw,lowerdir=/a\054b:/c,k" + b"=\xff")
    assert mount.fstype == "fuse.x y"
    assert mount.super_options == ("rw", "lowerdir=/a,b:/c", "k=\udcff")


def test_roots_that_are_no_directories():
    assert one(rb"1 2 0:4 mnt:[4026531840] /n rw - nsfs nsfs rw").root == b"mnt:[4026531840]"
    assert one(rb"1 2 0:4 /gone//deleted /n rw - ext4 /dev/a rw").root == b"/gone//deleted"


@pytest.mark.parametrize(
    "line",
    [
        b"garbage",
        b"1 2 0:3 / /m rw tmpfs t rw",
        b"1 2 0:3 / /m rw - tmpfs t",
        b"1 2 0:3 / /m rw - tmpfs t rw more",
        b"1 2 0:3 / /m - tmpfs t rw",
        b"x 2 0:3 / /m rw - tmpfs t rw",
        b"-1 2 0:3 / /m rw - tmpfs t rw",
        b"1_0 2 0:3 / /m rw - tmpfs t rw",
        b"99999999999 2 0:3 / /m rw - tmpfs t rw",
        b"1 2 03 / /m rw - tmpfs t rw",
        b"1 2 0:3:4 / /m rw - tmpfs t rw",
        b"1  2 0:3 / /m rw - tmpfs t rw",
        "1 2 0:\u0663 / /m rw - tmpfs t rw".encode(),
    ],
)
def test_garbage_names_its_line(line):
    with pytest.raises(DecodeError) as caught:
        parse_mountinfo(PLAIN + line + b"\n" + PLAIN)
    assert caught.value.offset == len(PLAIN)
    assert repr(line) in caught.value.reason


@given(st.binary(max_size=200))
def test_any_text(text):
    try:
        parse_mountinfo(text)
    except DecodeError as error:
        assert 0 <= error.offset <= len(text)  # noqa: PT017 - most texts are refused, some are not


@given(st.data())
def test_changed_text(data):
    text = bytearray(PLAIN)
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        parse_mountinfo(bytes(text))
    except DecodeError as error:
        assert error.offset < len(text)  # noqa: PT017 - as above


def test_the_mounts_of_this_machine():
    # Others may be mounting: one reading for the text, another for the list.
    with open("/proc/self/mountinfo", "rb") as file:
        text = file.read()
    assert len(parse_mountinfo(text)) == text.count(b"\n")
    found = mounts.mounts()
    (proc,) = [mount for mount in found if mount.mount_point == b"/proc"]
    assert (proc.fstype, proc.root) == ("proc", b"/")
    # Two ways to the same device number.
    assert proc.dev == (os.major(os.stat("/proc").st_dev), os.minor(os.stat("/proc").st_dev))


def test_mount_of_a_path_and_of_a_descriptor(tmp_path):
    assert mounts.mount_of("/proc/self/status").mount_point == b"/proc"
    link = tmp_path / "link"
    link.symlink_to("/proc")
    assert mounts.mount_of(link) == mounts.mount_of("/proc")
    fd = os.open("/proc", os.O_RDONLY)
    try:
        assert mounts.mount_of(fd) == mounts.mount_of(b"/proc")
        # The fallback of kernels whose statx does not tell the mount.
        assert mounts._fdinfo_mount_id(fd) == mounts.mount_of(fd).id
    finally:
        os.close(fd)


def test_mount_of_what_does_not_exist():
    with pytest.raises(NoSuchRoot) as caught:
        mounts.mount_of("/proc/no/such")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(NoSuchRoot):
        mounts.mount_of("/proc/version/below-a-file")


def statmount_bytes(mask, size=None, strings=b"\0ext4\0/root\0/point\0", **at):
    offsets = {"options": 0, "fstype": 1, "root": 6, "point": 12, "subtype": 0, "source": 0} | at
    fixed = struct.pack(
        "=IIQIIQIIQQIIQQQQQIIQII",
        512 + len(strings) if size is None else size,
        offsets["options"], mask, 7, 1, 0xEF53, 2, offsets["fstype"], 101, 100, 11, 10, 3, 4, 5,
        6, 8, offsets["root"], offsets["point"], 9, offsets["subtype"], offsets["source"],
    )  # fmt: skip
    return fixed + bytes(512 - len(fixed)) + strings


NOTHING = MountStat(*[None] * len(MountStat._fields))


def test_statmount_tells_what_its_mask_says():
    assert decode_statmount(statmount_bytes(0)) == NOTHING
    assert decode_statmount(statmount_bytes(0x3B)) == NOTHING._replace(
        unique_id=101,
        parent_unique_id=100,
        id=11,
        parent_id=10,
        attributes=3,
        propagation=4,
        peer_group=5,
        master=6,
        dev=(7, 1),
        magic=0xEF53,
        super_flags=2,
        root=b"/root",
        mount_point=b"/point",
        fstype="ext4",
    )
    assert decode_statmount(statmount_bytes(0x44)) == NOTHING._replace(
        propagate_from=8, namespace_id=9
    )
    assert decode_statmount(statmount_bytes(0x380, options=1, subtype=6, source=12)) == (
        NOTHING._replace(options=b"ext4", subtype="/root", source=b"/point")
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(511),
        statmount_bytes(0, size=511),
        statmount_bytes(0, size=4096),
        statmount_bytes(0x10, point=19),
        statmount_bytes(0x10, point=2**32 - 1),
        statmount_bytes(0x10, strings=b"never ends", point=0),
        statmount_bytes(0x10, size=512 + 15),  # the string crosses the stated size
    ],
)
def test_malformed_statmount(data):
    with pytest.raises(DecodeError):
        decode_statmount(data)


@given(st.binary(min_size=160, max_size=160), st.binary(max_size=40))
def test_any_statmount(fixed, strings):
    data = bytearray(fixed + bytes(352) + strings)
    data[0:4] = struct.pack("=I", len(data))
    try:
        decode_statmount(bytes(data))
    except DecodeError as error:
        assert error.offset >= 0  # noqa: PT017 - as above
