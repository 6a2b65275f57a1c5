"""A FUSE server of one file, which fails as it is told. Run as a process of its own.

    python _faultfile.py BACKING POINT

BACKING is a regular file; POINT an empty regular file, over which the filesystem is mounted: its
root *is* the file, so there are no names. Rules are lines on standard input, each answered by one
line on standard output:

    fail OP ERRNO START END [COUNT]   OP is read, write, fsync or any; bytes START to END, exclusive
    hang OP START END                 no answer until `clear`
    clear                             no rules; what hangs is answered
    hits                              how many requests failed

One request at a time, so a rule holds for every request read after its answer. The end of standard
input ends it.

Linux reference: include/uapi/linux/fuse.h, fuse(4).
"""

import ctypes
import errno
import os
import select
import stat
import struct
import sys
import time

GETATTR, SETATTR, OPEN, READ, WRITE, STATFS, RELEASE = 3, 4, 14, 15, 16, 17, 18
FSYNC, FLUSH, INIT, INTERRUPT, DESTROY = 20, 25, 26, 36, 38
FORGET, BATCH_FORGET = 2, 42
SILENT = (FORGET, BATCH_FORGET, INTERRUPT)

HEADER = struct.Struct("=IIQQIIIHH")
OUT = struct.Struct("=IiQ")
MAX_WRITE = 128 << 10
FOPEN_DIRECT_IO = 1
FATTR_SIZE = 1 << 3


class Server:
    def __init__(self, backing, point):
        self.file = os.open(backing, os.O_RDWR)
        self.fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self.rules, self.held, self.hits = [], [], 0
        libc = ctypes.CDLL(None, use_errno=True)
        options = f"fd={self.fuse},rootmode=100600,user_id=0,group_id=0"
        if libc.mount(b"faultfile", os.fsencode(point), b"fuse", 0, options.encode()) < 0:
            raise OSError(ctypes.get_errno(), "mount")

    def loop(self):
        poll = select.poll()
        poll.register(self.fuse, select.POLLIN)
        poll.register(0, select.POLLIN)
        told = b""
        while True:
            ready = dict(poll.poll())
            if 0 in ready:
                more = os.read(0, 4096)
                if not more:
                    return
                *lines, told = (told + more).split(b"\n")
                for line in lines:
                    os.write(1, f"{self.command(line.decode().split())}\n".encode())
            elif self.fuse in ready:
                try:
                    request = os.read(self.fuse, MAX_WRITE + 4096)
                except OSError as error:
                    if error.errno == errno.ENODEV:  # unmounted
                        return
                    if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                        continue
                    raise
                self.answer(request)

    def command(self, words):
        match words:
            case ["clear"]:
                self.rules, held, self.held = [], self.held, []
                for request in held:
                    self.answer(request)
            case ["fail", op, name, start, end, *count]:
                left = int(count[0]) if count else -1
                self.rules.append([op, getattr(errno, name), int(start), int(end), left])
            case ["hang", op, start, end]:
                self.rules.append([op, None, int(start), int(end), -1])
            case ["hits"]:
                return self.hits
            case _:
                return "what?"
        return "ok"

    def rule(self, op, start, length):
        for rule in self.rules:
            name, code, first, end, left = rule
            if name in (op, "any") and start < end and start + length > first and left:
                rule[4] -= 1
                self.hits += 1
                return code
        return 0

    def answer(self, request):
        _, opcode, unique, *_ = HEADER.unpack_from(request)
        if opcode in SILENT:
            return
        try:
            body = self.serve(opcode, request, HEADER.size)
        except OSError as error:
            self.reply(unique, -error.errno)
        else:
            if body is None:
                self.held.append(request)
            else:
                self.reply(unique, 0, body)

    def reply(self, unique, code, body=b""):
        try:
            os.write(self.fuse, OUT.pack(OUT.size + len(body), code, unique) + body)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # interrupted, unmounted
                raise

    def serve(self, opcode, request, at):
        if opcode == INIT:
            _, minor, readahead, _ = struct.unpack_from("=IIII", request, at)
            return struct.pack(
                "=IIIIHHIIHH32x", 7, min(minor, 31), readahead, 0, 16, 12, MAX_WRITE, 1, 0, 0
            )
        if opcode in (GETATTR, SETATTR):
            if opcode == SETATTR:
                valid, _, _, size = struct.unpack_from("=IIQQ", request, at)
                if valid & FATTR_SIZE:
                    os.ftruncate(self.file, size)
            size, now = os.fstat(self.file).st_size, int(time.time())
            attr = struct.pack(
                "=QQQQQQIIIIIIIIII",
                1, size, size // 512, now, now, now, 0, 0, 0, stat.S_IFREG | 0o600, 1, 0, 0, 0,
                4096, 0,
            )  # fmt: skip
            return struct.pack("=QII", 0, 0, 0) + attr
        if opcode == OPEN:
            return struct.pack("=QII", 0, FOPEN_DIRECT_IO, 0)
        if opcode in (READ, WRITE):
            op = "read" if opcode == READ else "write"
            _, start, length = struct.unpack_from("=QQI", request, at)
            code = self.rule(op, start, length)
            if code is None:
                return None
            if code:
                raise OSError(code, op)
            if opcode == READ:
                return os.pread(self.file, length, start)
            done = os.pwrite(self.file, memoryview(request)[at + 40 : at + 40 + length], start)
            return struct.pack("=II", done, 0)
        if opcode == FSYNC:
            code = self.rule("fsync", 0, 1 << 62)
            if code is None:
                return None
            if code:
                raise OSError(code, "fsync")
            return b""
        if opcode == STATFS:
            return struct.pack("=QQQQQIIII24x", 1 << 20, 1 << 19, 1 << 19, 2, 1, 4096, 255, 4096, 0)
        if opcode in (FLUSH, RELEASE, DESTROY):
            return b""
        raise OSError(errno.ENOSYS, "not here")


if __name__ == "__main__":
    server = Server(*sys.argv[1:])
    os.write(1, b"ready\n")
    server.loop()
