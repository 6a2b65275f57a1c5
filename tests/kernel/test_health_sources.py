"""Every kind of damage that this kernel can show, made for real: what each source sees of it, and
the one incident that it becomes.

The table of facts, row by row: who sees what differs between rows, and no source sees all.
"""

import errno
import os
import re
import select
import subprocess
from pathlib import Path

import pytest

from fanwise.health._probe import Probe
from fanwise.sources.counters import place_of
from tests.kernel.faults import (
    code_of,
    fsync,
    read,
    small_tmpfs,
    syncfs,
    volume,
)
from tests.kernel.station import station

EIO = errno.EIO
SAME = ("fserror.error", "trace.error", "kmsg.error")


def tree(at):
    """Directory d with a file and some names; files in the root, which share its inode table."""
    (at / "d").mkdir()
    (at / "d/f").write_text("x" * 9000)
    os.setxattr(at / "d/f", "user.big", b"q" * 700)
    for n in range(60):
        (at / f"d/n{n}").touch()
    for n in range(400):
        (at / f"r{n}").touch()


def many(at):
    (at / "d").mkdir()
    for n in range(400):
        (at / f"d/name-{n}").touch()
    for n in range(64):
        (at / f"f{n}").write_text("a" * 5000)


def one_file(at):
    fsync(at / "f", b"a" * 65536)


def inode_field(text):
    return lambda it, _: it.debugfs(f"sif /d/f {text}")


def ext4_directory(it, _):
    it.scribble(int(it.debugfs("blocks /d").split()[-1]) * it.block_size() + 100)


def ext4_xattr(it, _):
    block = int(re.search(r"File ACL: (\d+)", it.debugfs("stat /d/f"))[1])
    it.scribble(block * it.block_size() + 40)


def ext4_bitmap(which):
    return lambda it, _: it.scribble(it.ext4_block(f"{which} bitmap at"), it.block_size())


def look(name="d/f"):
    return lambda it: code_of((it.point / name).stat)


def listing(it):
    return code_of(lambda: os.listdir(it.point / "d"))


def attribute(it):
    return code_of(lambda: os.getxattr(it.point / "d/f", "user.big"))


def new_file(it):
    return code_of(lambda: fsync(it.point / "d/new", b"z" * 200000))


# What is broken; how it is met; what the program sees; where (None: the whole filesystem);
# the errno; the code.
METADATA = [
    ("mode", inode_field("mode 0"), look(), "EUCLEAN", "d/f", "EUCLEAN", "ext4_lookup"),
    ("checksum", inode_field("checksum 0x1234"), look(), "EBADMSG", "d/f", "EBADMSG", None),
    # The kernel names the directory in which it found the name.
    ("links", inode_field("links_count 0"), look(), "EUCLEAN", "d", "EUCLEAN", "ext4_lookup"),
    ("extent", inode_field("block[0] 0x1111"), look(), "EUCLEAN", "d/f", "EUCLEAN",
     "ext4_ext_check_inode"),
    ("listed", ext4_directory, listing, "EBADMSG", "d", "EBADMSG", "htree_dirblock_to_tree"),
    ("looked up", ext4_directory, look("d/n5"), "EBADMSG", "d", "EBADMSG", "__ext4_find_entry"),
    ("xattr", ext4_xattr, attribute, "EBADMSG", "d/f", "EBADMSG", "ext4_xattr_block_get"),
    # Nothing fails, and yet.
    ("block bitmap", ext4_bitmap("Block"), new_file, "ok", None, "EUCLEAN",
     "ext4_validate_block_bitmap"),
    ("inode bitmap", ext4_bitmap("Inode"), new_file, "ok", None, "EUCLEAN",
     "ext4_validate_inode_bitmap"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "meet", "seen", "name", "code", "function"),
    [row[1:] for row in METADATA],
    ids=[row[0] for row in METADATA],
)
def test_damaged_metadata_of_ext4(damage, meet, seen, name, code, function, tmp_path):
    with volume("ext4", tmp_path, prepare=tree) as it:
        ino = (it.point / name).stat().st_ino if name else None
        with it.unmounted():
            damage(it, None)
        with station(tmp_path, it) as at:
            assert meet(it) == seen
            at.listen()
            assert set(at.counts()) == set(SAME)
            (report,) = at.saw["fserror.error"]
            assert (report.ino, report.errno) == (ino, getattr(errno, code))
            incident = at.only()
            assert (incident.scope, incident.object.ino) == ("inode" if name else "fs", ino)
            assert (incident.errno, incident.total, incident.at_least) == (code, 1, False)
            assert incident.state == "ok"
            assert set(incident.channels) == {"fserror", "trace", "kmsg"}
            assert incident.location.function == (function or "ext4_lookup")
            assert incident.location.line > 0
            assert incident.location.kernel == os.uname().release
            assert incident.process.pid == os.getpid()
            assert f"(device {it.name})" in incident.text
            assert it.sysfs("errors_count") == "1"


def test_an_error_that_is_met_three_times(tmp_path):
    with volume("ext4", tmp_path, prepare=tree) as it:
        with it.unmounted():
            it.debugfs("sif /d/f block[0] 0x1111")
        with station(tmp_path, it) as at:
            assert [look()(it) for _ in range(3)] == ["EUCLEAN"] * 3
            incident = at.listen().only()
            assert at.counts() == {"fserror.error": 1, "trace.error": 3, "kmsg.error": 3}
            assert (incident.total, incident.count_source) == (3, "fserror")


def test_trigger(tmp_path):
    with volume("ext4", tmp_path) as it, station(tmp_path, it) as at:
        it.trigger("what happened")
        incident = at.listen().only()
        assert (incident.scope, incident.errno, incident.total) == ("fs", "EUCLEAN", 1)
        assert incident.location.function == "trigger_test_error"
        assert "what happened" in incident.text


def test_errors_remount_ro(tmp_path):
    with volume("ext4", tmp_path, prepare=tree, options="errors=remount-ro") as it:
        with it.unmounted():
            ext4_bitmap("Block")(it, None)
        with station(tmp_path, it) as at:
            assert new_file(it) == "EROFS"
            incident = at.listen().only()
            # The journal is aborted for it, and the mount's own options say rw as before.
            assert incident.state == "aborted"
            assert "emergency_ro" in it.entry().super_options
            assert "rw" in it.entry().options
            assert incident.channels == ("fserror", "trace", "kmsg", "mounts")
            assert incident.location.function == "ext4_validate_block_bitmap"


def test_an_inode_table_that_cannot_be_read(tmp_path):
    with volume("ext4", tmp_path, faulty=True, prepare=tree) as it:
        table = it.ext4_block("Inode table at")
        with station(tmp_path, it) as at:
            start, end = table + (64 << 10), table + (128 << 10)  # beyond what was read ahead
            it.faults.fail("read", EIO, start, end)
            assert look("r390")(it) == "EIO"
            incident = at.listen().only()
            assert {"fserror.error", "trace.io", "trace.error"} <= set(at.counts())
            assert (incident.scope, incident.errno, incident.object.gen) == ("inode", "EIO", 0)
            assert start <= incident.object.start < end
            assert incident.total == int(it.sysfs("errors_count"))
            assert incident.location.function.startswith("__ext4_get_inode_loc")


def test_a_directory_that_cannot_be_read_is_only_a_warning(tmp_path):
    with volume("ext4", tmp_path, faulty=True, prepare=tree) as it:
        ino = (it.point / "d").stat().st_ino
        it.unmount()
        it.mount()
        block = int(it.debugfs("blocks /d").split()[-1]) * it.block_size()
        with station(tmp_path, it) as at:
            it.faults.fail("read", EIO, block, block + it.block_size())
            assert listing(it) == "EIO"
            incident = at.listen().only()
            # The log has ten failed requests in five seconds, of all devices.
            assert set(at.counts()) | {"kmsg.io"} == {"trace.io", "kmsg.io", "kmsg.warning"}
            assert (incident.object.ino, incident.errno, incident.state) == (ino, "EIO", "warning")
            assert incident.object.start == block
            assert it.sysfs("errors_count") == "0"
            assert int(it.sysfs("warning_count")) > 0


def test_a_device_that_became_shorter(tmp_path):
    # A directory without an index: with one, the same look only warns (dx_probe).
    def prepare(at):
        (at / "d").mkdir()
        (at / "d/f").touch()

    with volume("ext4", tmp_path, prepare=prepare, options="errors=continue") as it:
        os.truncate(it.image, 1 << 20)
        try:
            with station(tmp_path, it) as at:
                assert [look()(it) for _ in range(5)] == ["EIO"] * 5
                incident = at.listen().only()
                assert (incident.object.ino, incident.errno) == (2, "EIO")
                assert incident.total == int(it.sysfs("errors_count")) == 5
                assert incident.location.function == "__ext4_find_entry"
                assert {"fserror.error", "trace.io"} <= set(at.counts())
        finally:
            os.truncate(it.image, 64 << 20)


def everything_fails(it):
    it.faults.fail("write", EIO)
    (it.point / "n").touch()
    fd = os.open(it.point, os.O_RDONLY)
    try:
        told = [code_of(lambda: os.fsync(fd)), code_of(lambda: os.fsync(fd))]
        told.append(code_of(lambda: syncfs(fd)))
    finally:
        os.close(fd)
    return [*told, code_of((it.point / "later").mkdir)]


def test_a_journal_that_cannot_be_written(tmp_path):
    with volume("ext4", tmp_path, faulty=True) as it, station(tmp_path, it) as at:
        assert everything_fails(it)[:2] == ["EIO", "ok"]  # nobody is told twice
        at.listen()
        assert {"fserror.error", "trace.io", "trace.writeback"} <= set(at.counts())
        incident = at.worst(state="aborted")
        assert (incident.errno, incident.scope) == ("EIO", "fs")
        assert incident.total == int(it.sysfs("errors_count"))
        assert incident.location.function == "ext4_journal_check_start"


def test_many_objects_in_one_report(tmp_path):
    with (
        volume(
            "ext4", tmp_path, faulty=True, mkfs=("-O", "^has_journal"), options="errors=continue"
        ) as it,
        station(tmp_path, it) as at,
    ):
        assert everything_fails(it) == ["EIO", "EIO", "EIO", "ok"]
        at.listen()
        # One process, so one report; its first object is the root.
        assert len(at.saw["fserror.error"]) == 1
        assert sum(i.total for i in at.open_incidents()) == int(it.sysfs("errors_count")) > 1
        root = at.worst(scope="inode")
        assert (root.object.ino, root.errno) == (2, "EIO")
        assert root.total < int(it.sysfs("errors_count"))
        (rest,) = [i for i in at.open_incidents() if i.id != root.id]
        assert (rest.errno, rest.location.function) == ("EIO", "ext4_check_bdev_write_error")


def test_abort(tmp_path):
    with volume("ext4", tmp_path) as it, station(tmp_path, it) as at:
        it.abort()
        incident = at.listen().only()
        assert (incident.errno, incident.scope, incident.total) == ("ESHUTDOWN", "fs", 1)
        assert incident.location.function == "__ext4_remount"
        assert it.sysfs("errors_count") == "1"


@pytest.mark.parametrize("flags", [0, 1, 2])
def test_shutdown_of_ext4_is_no_event_and_no_count(flags, tmp_path):
    with volume("ext4", tmp_path) as it, station(tmp_path, it) as at:
        it.shut_down(flags)
        incident = at.listen().only()
        assert set(at.counts()) == {"trace.shutdown", "kmsg.state"}
        assert (incident.errno, incident.state, incident.total) == ("ESHUTDOWN", "shutdown", 1)
        assert "mounts" in incident.channels
        assert it.sysfs("errors_count") == "0"
        it.unmount()
        it.mount()
        at.mounted()
        assert at.open_incidents() == []
        assert at.told[-1].resolved == "the filesystem works again"


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_data_that_cannot_be_written(kind, tmp_path):
    with volume(kind, tmp_path, faulty=True, prepare=one_file) as it:
        file = it.point / "f"
        ino, extent = file.stat().st_ino, it.extent(file)
        with station(tmp_path, it) as at:
            it.faults.fail("write", EIO, *extent)
            assert code_of(lambda: fsync(file, b"b" * 65536)) == "EIO"
            incident = at.listen().only()
            assert {"trace.io", "trace.writeback", "trace.told"} <= set(at.counts())
            assert "fserror.error" not in at.saw
            assert (incident.scope, incident.object.ino, incident.errno) == ("inode", ino, "EIO")
            assert incident.object.start == extent[0]
            assert incident.operation == "data write-back"
            assert incident.count_source == "trace"
            assert incident.process is None  # whose interrupt it was says nothing
            assert [p.pid for p in incident.heard] == [os.getpid()]


def test_what_was_not_written_is_not_hidden_by_what_comes_at_once(tmp_path):
    def prepare(at):
        many(at)
        (at / "f41").write_bytes(os.urandom(1 << 20))

    with (
        volume("ext4", tmp_path, faulty=True, prepare=prepare) as it,
        station(tmp_path, it) as at,
    ):
        lost = (it.point / "f40").stat().st_ino
        it.faults.fail("write", EIO, *it.extent(it.point / "f40"))
        assert code_of(lambda: fsync(it.point / "f40", b"x" * 9000)) == "EIO"
        it.faults.clear()
        it.faults.fail("read", EIO, *it.extent(it.point / "f41"))
        assert code_of(lambda: read(it.point / "f41")) == "EIO"
        it.trigger()
        at.listen()
        written = at.worst(scope="inode")
        assert (written.object.ino, written.operation) == (lost, "data write-back")
        assert (written.total, written.count_source) == (at.counts()["trace.writeback"], "trace")
        assert at.worst(scope="device").operation.endswith("read")
        assert at.worst(errno="EUCLEAN").total == int(it.sysfs("errors_count"))


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_data_that_cannot_be_read_is_an_error_of_the_device(kind, tmp_path):
    with volume(kind, tmp_path, faulty=True, prepare=one_file) as it:
        start, end = it.extent(it.point / "f")
        with station(tmp_path, it) as at:
            it.faults.fail("read", EIO, start, end)
            assert code_of(lambda: read(it.point / "f")) == "EIO"
            incident = at.listen().only()
            assert set(at.counts()) | {"kmsg.io"} == {"trace.io", "kmsg.io"}
            assert (incident.scope, incident.errno) == ("device", "EIO")
            assert incident.object.start == start
            assert incident.operation == "block read"


def test_a_sparse_image_on_a_full_tmpfs(tmp_path):
    with (
        small_tmpfs(tmp_path / "small") as small,
        volume("ext4", tmp_path, image=small / "i", options="errors=continue") as it,
        station(tmp_path, it) as at,
    ):
        assert code_of(lambda: fsync(it.point / "f", os.urandom(12 << 20))) == "ENOSPC"
        at.listen()
        incident = at.worst(errno="ENOSPC")
        assert incident.object.ino == (it.point / "f").stat().st_ino
        assert "not a quota" in incident.advice


XFS = [
    ("directory", "d", lambda it, ino: it.scribble(it.xfs_at(f"inode {ino}", "dblock 0") + 200),
     listing, "EBADMSG"),
    ("inode", "f41", lambda it, ino: it.xfs_db(f"inode {ino}", "write core.format 7"),
     look("f41"), "EUCLEAN"),
    ("extent", "f41",
     lambda it, ino: it.xfs_db(f"inode {ino}", "write u3.bmx[0].startblock 99999999999"),
     lambda it: code_of(lambda: read(it.point / "f41")), "EUCLEAN"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "damage", "meet", "code"), [row[1:] for row in XFS], ids=[row[0] for row in XFS]
)
def test_damaged_metadata_of_xfs(name, damage, meet, code, tmp_path):
    with volume("xfs", tmp_path, prepare=many) as it:
        ino = (it.point / name).stat().st_ino
        with it.unmounted():
            damage(it, ino)
        with station(tmp_path, it) as at:
            assert meet(it) == "EUCLEAN"
            incident = at.listen().only()
            assert {"trace.sick", "kmsg.buffer"} <= set(at.counts())
            assert "fserror.error" not in at.saw  # until Linux 7.0
            assert (incident.scope, incident.object.ino, incident.errno) == ("inode", ino, code)
            assert incident.at_least
            assert incident.count_source == "trace"
            assert re.fullmatch(r"xfs_\w+(\+0x[0-9a-f]+/0x[0-9a-f]+)?", incident.location.symbol)


def test_a_free_space_tree_of_xfs_that_overlaps(tmp_path):
    def prepare(at):
        many(at)
        for n in range(0, 64, 2):
            (at / f"f{n}").unlink()  # so that there is more than one free extent

    with volume("xfs", tmp_path, prepare=prepare) as it:
        ino = (it.point / "f41").stat().st_ino
        with it.unmounted():
            at = it.xfs_db(f"inode {ino}", "print u3.bmx[0].startblock")
            block = int(re.search(r"= (\d+)", at)[1])
            tree = ("agf 0", "addr bnoroot")
            starts = re.findall(r":\[(\d+),\d+\]", it.xfs_db(*tree, "print recs"))
            over = max(n for n, start in enumerate(starts, 1) if int(start) < block)
            length = block - int(starts[over - 1]) + 1
            it.xfs_db(*tree, f"write recs[{over}].blockcount {length}")
        with station(tmp_path, it) as listening:
            codes = {code_of((it.point / f"f{n}").unlink) for n in range(1, 64, 2)}
            fd = os.open(tmp_path, os.O_RDONLY)
            os.close(fd)
            code_of(lambda: fsync(it.point / "new", b"x"))
            incident = listening.listen().worst(scope="group")
            assert codes & {"EUCLEAN", "EIO", "ok"}
            assert incident.object.group == 0
            assert incident.state == "shutdown"
            assert {"trace.sick", "trace.shutdown", "kmsg.shutdown"} <= set(listening.counts())
            assert incident.at_least


def test_a_log_of_xfs_that_cannot_be_written(tmp_path):
    with volume("xfs", tmp_path, faulty=True) as it, station(tmp_path, it) as at:
        assert everything_fails(it)[0] == "EIO"
        incident = at.listen().only()
        assert (incident.errno, incident.state) == ("EIO", "shutdown")
        assert "xfs_force_shutdown" not in str(at.saw["trace.shutdown"])


def test_shutdown_of_xfs_shows_nowhere_but_in_the_probe(tmp_path):
    with volume("xfs", tmp_path) as it, station(tmp_path, it) as at:
        it.shut_down()
        incident = at.listen().only()
        assert set(at.counts()) == {"trace.shutdown", "kmsg.shutdown"}
        assert (incident.errno, incident.state) == ("ESHUTDOWN", "shutdown")
        assert incident.location.function.endswith("xfs_fsops.c")
        options = it.entry().super_options
        assert "shutdown" not in options
        assert probe(it).state == "shutdown"


def test_writes_of_btrfs_that_fail(tmp_path):
    with volume("btrfs", tmp_path, faulty=True) as it, station(tmp_path, it) as at:
        assert everything_fails(it)[0] == "EIO"
        incident = at.listen().only()
        stats = subprocess.run(
            ["btrfs", "device", "stats", it.point], capture_output=True, text=True, check=True
        ).stdout
        assert incident.total == int(re.search(r"write_io_errs\s+(\d+)", stats)[1]) > 0
        assert (incident.errno, incident.count_source) == ("EIO", "counters")
        assert incident.state in ("emergency_ro", "read_only")
        assert not incident.at_least


def test_a_checksum_of_btrfs(tmp_path):
    marker = b"MARKER-TIDE" * 50000
    with volume("btrfs", tmp_path, prepare=lambda at: fsync(at / "f", marker)) as it:
        ino = (it.point / "f").stat().st_ino
        with it.unmounted():
            it.scribble(it.image.read_bytes().find(b"MARKER-TIDE") + 20, 4)
        with station(tmp_path, it) as at:
            assert code_of(lambda: read(it.point / "f")) == "EIO"
            incident = at.listen().only()
            assert "trace.io" not in at.saw
            assert (incident.errno, incident.object.ino) == ("EBADMSG", ino)
            assert incident.count_source == "counters"
            subprocess.run(
                ["btrfs", "device", "stats", "-z", it.point], capture_output=True, check=True
            )
            at.count()
            assert at.open_incidents() == []


def test_reads_of_btrfs_that_fail(tmp_path):
    with (
        volume("btrfs", tmp_path, faulty=True, prepare=one_file) as it,
        station(tmp_path, it) as at,
    ):
        it.faults.fail("read", EIO)
        assert code_of(lambda: read(it.point / "f")) == "EIO"
        incident = at.listen().only()
        assert (incident.errno, incident.count_source) == ("EIO", "counters")


def test_errors_of_before_the_mount_and_a_check(tmp_path):
    with volume("ext4", tmp_path) as it:
        it.trigger()
        it.trigger()
        with it.unmounted():
            pass
        with station(tmp_path, it) as at:
            incident = at.listen().only()
            assert at.counts() == {}
            assert (incident.total, incident.count_source) == (2, "counters")
            assert incident.location.function == "trigger_test_error"
            assert abs(incident.first_seen - Path(it.image).stat().st_mtime) < 60
            with it.unmounted():
                subprocess.run(["e2fsck", "-fy", it.image], capture_output=True)
            at.mounted()
            assert at.told[-1].resolved == "the filesystem was checked"
            assert at.open_incidents() == []


def test_two_thousand_errors_are_one_incident(tmp_path):
    with volume("ext4", tmp_path) as it, station(tmp_path, it) as at:
        for _ in range(2000):
            it.trigger()
        incident = at.listen().only()
        assert incident.total == int(it.sysfs("errors_count")) == 2000
        assert len(at.saw["kmsg.error"]) < 2000


def test_300_processes_are_one_incident(tmp_path):
    with volume("ext4", tmp_path) as it, station(tmp_path, it) as at:
        trigger = f"/sys/fs/ext4/{it.name}/trigger_fs_error"
        subprocess.run(
            [
                "sh",
                "-c",
                f"i=0; while [ $i -lt 300 ]; do sh -c 'echo x >{trigger}'; i=$((i+1)); done",
            ],
            check=True,
        )
        incident = at.listen().only()
        assert len(at.saw["fserror.error"]) == 300
        assert incident.total == int(it.sysfs("errors_count")) == 300


def probe(it, deadline=60.0):
    asked = Probe(it.kind, str(it.point), deadline)
    try:
        assert asked.ask()
        assert not asked.ask()
        return wait(asked)
    finally:
        asked.close()


def wait(asked):
    while True:
        ready = select.select([asked], [], [], 0.2)[0]
        found = asked.answer()
        if found is not None:
            return found
        assert not ready or asked.state != "IDLE"


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_the_probe_of_a_healthy_filesystem(kind, tmp_path):
    with volume(kind, tmp_path) as it:
        found = probe(it)
        uuid = subprocess.run(
            ["blkid", "-p", "-s", "UUID", "-o", "value", it.device], capture_output=True, text=True
        ).stdout.strip()
        # btrfs does not answer to FS_IOC_GETFSUUID; its directory in sysfs is named so.
        known = place_of(it.entry()).uuid if kind == "btrfs" else found.uuid
        assert (found.state, known) == ("ok", uuid)


def test_a_probe_that_does_not_come_back(tmp_path):
    with volume("ext4", tmp_path, faulty=True, prepare=tree) as it:
        it.unmount()
        it.mount()
        hanging = Probe("ext4", str(it.point / "d"), deadline=0.3)
        try:
            it.faults.hang("read")
            assert hanging.ask()
            assert wait(hanging).state == "hung"
            assert hanging.state == "HUNG"
            assert not hanging.ask()
            assert hanging.answer() is None
            it.faults.clear()
            assert wait(hanging).state == "ok"
            assert hanging.ask()
        finally:
            it.faults.clear()
            hanging.close()
