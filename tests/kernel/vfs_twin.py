"""What the tests of vfs against Linux share: one operation, done on both, must end alike.

A real filesystem with real fanotify groups on one side, `vfs` with `notify` on the other. Both have
the same marks; what their groups read after each operation must be equal, record by record. File
handles are compared as a bijection: whatever Linux calls one object vfs calls one object.
"""

import ctypes
import errno
import os
import struct

from notifying import INIT, fields, plain, read_all, shown

from fanwise import MarkRefused, NotWatchable
from fanwise.kernel import fanotify as fan
from fanwise.kernel.libc import AT_FDCWD, libc
from fanwise.notify import mask as m
from fanwise.notify.fsnotify import Fsnotify
from fanwise.notify.mark import FILESYSTEM, INODE, On
from fanwise.vfs import Disk, File, Vfs, finish
from fanwise.vfs.namei import Stat

FS = "fs"
EVERYTHING = m.EVENTS | m.ONDIR


def failed(code):
    return errno.errorcode[code]


class Linux:
    """The operations as system calls, below a directory."""

    def __init__(self, root):
        self.root = os.fsdecode(root)
        self.opened = set()

    def _at(self, path):
        return self.root + path

    def open(self, path, flags, mode=0o644):
        fd = os.open(self._at(path), flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        self.opened.add(fd)
        return fd

    def close(self, fd):
        os.close(fd)
        self.opened.discard(fd)

    def read(self, fd, count, at=None):
        return os.read(fd, count) if at is None else os.pread(fd, count, at)

    def write(self, fd, data, at=None):
        return os.write(fd, data) if at is None else os.pwrite(fd, data, at)

    def readdir(self, fd):
        buffer = ctypes.create_string_buffer(1 << 15)
        size = libc.getdents64(fd, buffer, len(buffer))  # one call: each of them asks
        if size < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        os.lseek(fd, 0, os.SEEK_SET)  # vfs knows no positions in directories
        names, data = [], buffer.raw[:size]
        while data:
            length = struct.unpack_from("=H", data, 16)[0]
            name = data[19:length].split(b"\0")[0]
            names += [] if name in (b".", b"..") else [name]
            data = data[length:]
        return sorted(names)

    def sendfile(self, out, source, count, at=None):
        return os.sendfile(out, source, at, count)

    def ftruncate(self, fd, length):
        os.ftruncate(fd, length)

    def fsync(self, fd):
        os.fsync(fd)

    def syncfs(self, fd):
        if libc.syncfs(ctypes.c_int(fd)) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def create(self, path, mode=0o644):
        os.mknod(self._at(path), mode)

    def mkdir(self, path, mode=0o755):
        os.mkdir(self._at(path), mode)

    def unlink(self, path):
        os.unlink(self._at(path))

    def rmdir(self, path):
        os.rmdir(self._at(path))

    def link(self, old, new):
        os.link(self._at(old), self._at(new), follow_symlinks=False)

    def rename(self, old, new, flags=0):
        one, other = os.fsencode(self._at(old)), os.fsencode(self._at(new))
        if libc.renameat2(AT_FDCWD, one, AT_FDCWD, other, flags) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def truncate(self, path, length):
        os.truncate(self._at(path), length)

    def setattr(self, path, mode):
        os.chmod(self._at(path), mode)

    def stat(self, path):
        return _stat(os.lstat(self._at(path)))

    def fstat(self, fd):
        return _stat(os.fstat(fd))


def _stat(found):
    is_dir = found.st_mode & 0o170000 == 0o040000
    size = 0 if is_dir else found.st_size
    return Stat(None, "dir" if is_dir else "file", found.st_mode & 0o7777, found.st_nlink, size)


class Groups:
    """Groups of the kernel, used again: there are few, and a closed one is not gone at once."""

    def __init__(self):
        self.idle = {}

    def take(self, *flags):
        idle = self.idle.setdefault(flags, [])
        return idle.pop() if idle else fan.init(*flags)

    def give_back(self, fd, flags, root):
        for kind in (fan.FAN_MARK_FILESYSTEM, fan.FAN_MARK_INODE):
            fan.mark(fd, fan.FAN_MARK_FLUSH | kind, 0, path=root)
        read_all(fd)
        self.idle[flags].append(fd)

    def close(self):
        for idle in self.idle.values():
            while idle:
                os.close(idle.pop())


GROUPS = Groups()


class Twin:
    """Both sides, with a filesystem mark each and a group for marks on objects."""

    def __init__(self, root, memory):
        self.linux = Linux(root)
        self.core = Fsnotify()
        self.vfs = Vfs(notify=self.core, pid=os.getpid)
        self.sb = self.vfs.superblock(FS, Disk(memory=memory))
        self.vfs.mount_root(self.sb)
        self.sb.root.target.node.mode = os.stat(root).st_mode & 0o7777
        self.files = []  # (descriptor, File)
        self.seen = 0
        self.keys = {}
        self.handles = {}
        self.groups = [(GROUPS.take(INIT), self.core.group()) for _ in range(2)]
        fan.mark(
            self.groups[0][0], fan.FAN_MARK_ADD | fan.FAN_MARK_FILESYSTEM, EVERYTHING, path=root
        )
        self.groups[0][1].add(On(FILESYSTEM, FS), EVERYTHING)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for fd in self.linux.opened:
            os.close(fd)
        for fd, _ in self.groups:
            GROUPS.give_back(fd, (INIT,), self.linux.root)

    # -- doing --

    def ours(self, name, *args):
        """What vfs makes of an operation: ("ok", value) or the errno's name."""
        try:
            return "ok", finish(getattr(self.vfs, name)(*args))
        except OSError as error:
            return failed(error.errno)

    def theirs(self, name, *args):
        try:
            return "ok", getattr(self.linux, name)(*args)
        except OSError as error:
            return failed(error.errno)

    def do(self, name, *args, on=()):
        """An operation on both, ``on`` files of `files`; what it gave, the same on both."""
        files = [self.files[at] for at in on]
        real = self.theirs(name, *(fd for fd, _ in files), *args)
        model = self.ours(name, *(file for _, file in files), *args)
        what = f"{name}{args} on {on}: Linux {real}, vfs {model}"
        if name == "open" and real[0] == "ok" and model[0] == "ok":
            self.files.append((real[1], model[1]))
        elif real[0] == "ok" and model[0] == "ok" and isinstance(real[1], Stat):
            assert real[1][1:] == model[1][1:], what
        else:
            assert real == model, what
        if name == "close" and real[0] == "ok":
            for at in sorted(on, reverse=True):
                del self.files[at]
        self.compare(what)
        return model

    def same(self, one, other):
        """Whether two open files are of one object."""
        one, other = (self.files[at][1].path.dentry.inode for at in (one, other))
        return one is other

    def mark(self, path, mask):
        """Put a mark on an object, both sides."""
        try:
            key = finish(self.vfs.stat(path))
        except OSError:
            return False
        fd, group = self.groups[1]
        real = self.linux.root + path
        try:
            fan.mark(fd, fan.FAN_MARK_ADD | fan.FAN_MARK_DONT_FOLLOW, mask, path=real)
        except NotWatchable:
            taken = False
        else:
            taken = True
        try:
            group.add(On(INODE, FS, key.key, key.kind == "dir"), mask)
        except MarkRefused:
            assert not taken
        else:
            assert taken
        return taken

    # -- comparing --

    def compare(self, what):
        for fd, group in self.groups:
            real = [plain(record) for record in read_all(fd)]
            model = [fields(event) for event in group.read()]
            self.seen += len(real)
            text = "\n".join([what, "Linux:", *shown(real), "vfs:", *shown(model)])
            assert [_bare(one) for one in real] == [_bare(one) for one in model], text
            for one, other in zip(real, model, strict=True):
                for handle, key in zip(
                    (one[1], one[2], one[4]), (other[1], other[2], other[4]), strict=True
                ):
                    assert self.keys.setdefault(handle, key) == key, text
                    assert self.handles.setdefault(key, handle) == handle, text

    def tree(self):
        """All that there is must be alike: names, attributes, contents."""
        todo = ["/"]
        found = 0
        for path in todo:
            fd = self.linux.open(path, os.O_RDONLY)
            file = finish(self.vfs.open(path, os.O_RDONLY, silent=True))
            try:
                assert self.linux.fstat(fd)[1:] == finish(self.vfs.fstat(file))[1:], path
                if self.linux.fstat(fd).kind == "dir":
                    names = self.linux.readdir(fd)
                    assert names == finish(self.vfs.readdir(file)), path
                    todo += [f"{path.rstrip('/')}/{os.fsdecode(name)}" for name in names]
                else:
                    assert self.linux.read(fd, 1 << 20, 0) == finish(
                        self.vfs.read(file, 1 << 20, 0)
                    ), path
            finally:
                self.linux.close(fd)
                finish(self.vfs.close(file))
            found += 1
        for fd, _ in self.groups:
            read_all(fd)
        return found


def _bare(one):
    mask, key, folder, name, folder2, name2, pid = one
    return mask, key is None, folder is None, name, folder2 is None, name2, pid


__all__ = ["EVERYTHING", "FS", "GROUPS", "File", "Twin"]
