"""Notify against Linux: the same marks, the same operations, the same events."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from conftest import mounted
from notifying import FILESYSTEM, INODE, SUBTREE, Pair, exchange

from fanwise.kernel import fanotify as fan
from fanwise.notify import mask as m
from fanwise.notify.mark import IGNORE, IGNORED_MASK, SURV_MODIFY

NAMED = [bit for name, bit in m.NAMES.items() if bit & m.EVENTS]
ALL = m.EVENTS | m.FLAGS


@pytest.fixture(params=["tmpfs", "ext4"])
def disk(request, tmp_path):
    with mounted(request.param, tmp_path) as point:
        if request.param == "ext4":
            (point / "lost+found").rmdir()  # the tests' model of directories begins empty
        yield point


class Storm:
    """Random operations and random marks below a directory."""

    def __init__(self, pair, seed):
        self.pair, self.random = pair, random.Random(seed)
        self.open = []  # (fd, path, for writing)
        self.no_replacing = False
        self.kept = None  # a directory that stays where it is
        for name in ("d0", "d1", "d0/e", "d1/e"):
            pair.do(os.mkdir, pair.root / name)
        for name in ("f", "d0/a", "d0/b", "d1/a", "d0/e/a"):
            self.close(pair.do(os.open, pair.root / name, os.O_CREAT | os.O_WRONLY))

    def close(self, fd):
        if fd is not None:
            self.pair.do(os.close, fd)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        while self.open:
            self.close(self.open.pop()[0])

    def dirs(self):
        return self._listed()[0]

    def files(self):
        return self._listed()[1]

    def _listed(self):
        dirs, files = [], []
        for where, below, names in os.walk(self.pair.root):
            dirs += [f"{where}/{name}" for name in below]
            files += [f"{where}/{name}" for name in names if os.path.isfile(f"{where}/{name}")]
        self.pair.feed()  # walking opens directories
        return sorted(dirs), sorted(files)

    def any_dir(self):
        return self.random.choice([str(self.pair.root), *self.dirs()])

    def new_name(self):
        return f"{self.any_dir()}/{self.random.choice('abcde')}"

    def step(self):
        pair, rand = self.pair, self.random
        files = self.files() or [str(pair.root / "none")]
        dirs = [path for path in self.dirs() if path != self.kept] or [str(pair.root / "none")]
        file, folder, either = rand.choice(files), rand.choice(dirs), rand.choice(files + dirs)
        what = rand.randrange(24)
        if what < 2:
            self._open(self.new_name(), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        elif what < 4:
            self._open(file, rand.choice([os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC]))
        elif what < 7 and self.open:
            fd, _, writes = rand.choice(self.open)
            if os.path.isdir(f"/proc/self/fd/{fd}"):
                pair.do(os.listdir, fd)
            else:
                pair.do(os.write, fd, b"x") if writes else pair.do(os.read, fd, 1)
        elif what < 9 and self.open:
            self.close(self.open.pop(rand.randrange(len(self.open)))[0])
        elif what == 9:
            pair.do(os.chmod, either, rand.choice([0o700, 0o755]))
        elif what == 10:
            pair.do(os.truncate, file, rand.randrange(9))
        elif what == 11:
            pair.do(os.utime, either)
        elif what == 12:
            pair.do(os.setxattr, either, "user.x", b"%d" % rand.randrange(99))
        elif what < 15:
            pair.do(os.unlink, file)
        elif what == 15:
            pair.do(os.link, file, self.new_name())
        elif what == 16:
            pair.do(os.mkdir, self.new_name())
        elif what == 17:
            pair.do(os.rmdir, folder)
        elif what < 20:
            new = self.new_name()
            if not (self.no_replacing and os.path.isdir(new)):
                pair.do(os.rename, either, new)
        elif what == 20 and not self.no_replacing:
            pair.do(exchange, either, rand.choice(files + dirs))
        elif what == 21:
            self._open(folder, os.O_RDONLY | os.O_DIRECTORY)
        elif what == 22:
            pair.elsewhere(*rand.choice([("chmod", either, 0o711), ("truncate", file, 3)]))
        else:
            pair.do(os.symlink, "nowhere", self.new_name())

    def _open(self, path, flags):
        if len(self.open) < 6:
            fd = self.pair.do(os.open, path, flags)
            if fd is not None:
                self.open.append((fd, path, bool(flags & (os.O_WRONLY | os.O_RDWR))))

    def written(self, path):
        """Whether a file is open for writing here: then Linux adds no ignore mask that ends."""
        info = os.stat(path)
        return any(writes and os.path.samestat(os.fstat(fd), info) for fd, _, writes in self.open)

    def mask(self):
        mask = 0
        for bit in self.random.sample(NAMED, self.random.randrange(1, 8)):
            mask |= bit
        if self.random.random() < 0.6:
            mask |= m.ONDIR
        if self.random.random() < 0.6:
            mask |= m.EVENT_ON_CHILD
        return mask

    def mark(self):
        rand = self.random
        kind = FILESYSTEM if rand.random() < 0.15 else INODE
        files = self.files()
        path = rand.choice(files) if files and rand.random() < 0.4 else self.any_dir()
        mask = self.mask()
        if kind == INODE and os.path.isfile(path) and rand.random() < 0.9:
            mask &= m.ON_CHILD | m.SELF
            mask = mask or m.MODIFY
        flags = rand.choice(
            [0, 0, 0, IGNORE | SURV_MODIFY, IGNORED_MASK, IGNORED_MASK | SURV_MODIFY, IGNORE]
        )
        remove = rand.random() < 0.25
        ends = flags and not flags & SURV_MODIFY
        if ends and not remove and kind == INODE and os.path.isfile(path) and self.written(path):
            return False
        return self.pair.mark(kind, path, mask, flags, remove)


@pytest.mark.parametrize("seed", range(10))
def test_random_marks_and_operations(disk, seed):
    """Masks, names, children, ignore masks and merges equal Linux's."""
    with Pair(disk) as pair:
        with Storm(pair, seed) as storm:
            rand = random.Random(-seed)
            taken = sum(storm.mark() for _ in range(6))
            for _ in range(500):
                if rand.random() < 0.12:
                    taken += storm.mark()
                storm.step()
                if rand.random() < (0.9 if seed % 2 else 0.15):
                    pair.compare()
        pair.compare()
        assert taken > 20
        assert pair.seen > 100
        assert pair.fed > pair.seen / 3


def test_the_two_agree_on_which_marks_are_refused(disk):
    with Pair(disk) as pair:
        (disk / "f").write_bytes(b"")
        (disk / "d").mkdir()
        pair.feed()
        rand = random.Random(1)
        took = []
        for _ in range(1500):
            kind = rand.choice([INODE, INODE, FILESYSTEM])
            mask = rand.choice(
                [rand.choice(NAMED) | rand.choice([0, *NAMED]), m.ONDIR, m.EVENT_ON_CHILD, 0]
            ) | rand.choice([0, 0, m.ONDIR, m.EVENT_ON_CHILD, m.FLAGS])
            flags = rand.choice([0, IGNORE, IGNORED_MASK]) | rand.choice([0, SURV_MODIFY])
            if rand.random() < 0.02:
                flags |= IGNORE | IGNORED_MASK
            path = disk / rand.choice("fd")
            took.append(pair.mark(kind, path, mask, flags, rand.random() < 0.4))
        assert 300 < sum(took) < 1400


def test_a_rename_shows_the_halves_that_are_marked(disk):
    with Pair(disk) as pair:
        for name in "xy":
            (disk / name).mkdir()
        (disk / "x/a").touch()
        pair.feed()
        pair.mark(INODE, disk / "y", m.RENAME)
        for old, new in (("x/a", "y/b"), ("y/b", "x/a"), ("x/a", "y/b"), ("y/b", "x/a")):
            pair.do(os.rename, disk / old, disk / new)
        # One that shows no first directory merges with none; the others do.
        assert [found[3] for found in pair.compare()] == [None, b"b", None]
        pair.mark(INODE, disk / "x", m.MODIFY)  # asks for no rename, and its half is shown
        pair.do(os.rename, disk / "x/a", disk / "y/b")
        assert [found[3::2] for found in pair.compare()] == [(b"a", b"b")]


def test_an_ignore_mask_ends_with_a_modification(disk):
    with Pair(disk) as pair:
        file = disk / "f"
        file.write_bytes(b"x")
        pair.feed()
        pair.mark(FILESYSTEM, disk, m.OPEN | m.MODIFY | m.CLOSE_WRITE)
        pair.mark(INODE, file, m.OPEN | m.CLOSE_WRITE, IGNORED_MASK)
        for expected in (m.MODIFY | m.CLOSE_WRITE, m.OPEN | m.MODIFY | m.CLOSE_WRITE):
            fd = pair.do(os.open, file, os.O_WRONLY)
            pair.do(os.write, fd, b"y")
            pair.do(os.close, fd)
            assert [found[0] for found in pair.compare()] == [expected]


def test_an_execution(disk):
    with Pair(disk) as pair:
        shutil.copy("/bin/true", disk / "true")
        pair.feed()
        pair.mark(INODE, disk, m.OPEN_EXEC | m.EVENT_ON_CHILD)
        subprocess.run([disk / "true"], check=True)
        pair.feed()
        assert [found[0] for found in pair.compare()] == [m.OPEN_EXEC]


def test_more_than_buckets_full_of_events_do_not_merge(disk):
    """128 newer events in its bucket hide an event; 40,000 are beyond that in every bucket."""
    with Pair(disk) as pair:
        count = 40_000
        for number in range(count):
            os.close(os.open(disk / f"{number}", os.O_CREAT))
        pair.mark(INODE, disk, m.ATTRIB | m.EVENT_ON_CHILD)
        for number in range(count):
            os.chmod(disk / f"{number}", 0o700)
        pair.do(os.chmod, disk / "0", 0o711)
        pair.do(os.chmod, disk / f"{count - 1}", 0o711)
        found = [name for _, _, _, name, *_ in pair.compare()]
        assert len(found) == count + 1
        assert found.count(b"0") == 2


@pytest.mark.parametrize("seed", range(6))
def test_a_subtree_is_the_union_of_its_directories(disk, seed):
    """A mark on a subtree has no counterpart: B has inode marks on every directory in it.

    Left out: what a directory that was moved or replaced tells of itself in the same system call,
    when it is no longer in its old place for us, and Linux still has the mark that we would move.
    """
    with Pair(disk) as pair, Storm(pair, seed) as storm:
        top = pair.on(SUBTREE, disk / "d0")
        mask = (storm.mask() | m.MODIFY | m.CREATE | m.EVENT_ON_CHILD) & ~m.SELF
        ignore = storm.mask() & ~(m.SELF | m.CREATE | m.MODIFY) | m.ACCESS
        marks = [(mask, 0), (ignore, IGNORE | SURV_MODIFY)]
        for wanted, flags in marks:
            pair.group.add(top, wanted, flags)
        marked = set()

        def follow():
            model = pair.model
            inside = model.within(top.key)
            for key in inside ^ (marked & model.place.keys()):
                command = fan.FAN_MARK_ADD if key in inside else fan.FAN_MARK_REMOVE
                for wanted, flags in marks:
                    fan.mark(pair.b, command | flags, wanted, path=disk / model.path(key))
            marked.clear()
            marked.update(inside)

        storm.no_replacing, storm.kept = True, str(disk / "d0")
        for _ in range(400):
            follow()
            storm.step()
            pair.compare()
        assert pair.seen > 20
