"""The helper process of `child`: it answers on its standard input, which is a socket, one by one.

It uses the same Lookup and scan as the host would. LIFETIME: it ends when the socket does, that is
when the host closed it or died; between two slices it holds no descriptor of any filesystem.
"""

import contextlib
import os
import pickle
import signal
import socket
import struct
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal

import msgspec

from fanwise._errors import FanwiseError
from fanwise.kernel.libc import libc
from fanwise.kernel.mounts import Mount
from fanwise.kernel.native import parts

from .lookup import Lookup
from .scan import scan_mount

_PR_SET_PDEATHSIG = 1
_LENGTH = struct.Struct("=I")
_SCANS = "scan", "names", "index"


class Ask(msgspec.Struct, array_like=True):
    """A question about a mount; the answer is (pickled error or None, value)."""

    what: Literal["locate", "key_of", "links", "names_in", "scan", "names", "index", "rest"]
    mount: int = 0  # its id
    point: bytes = b""
    keys: list[bytes] = []
    name: bytes = b""


def send(sock: socket.socket, data: bytes) -> None:
    """Send one message. Raises OSError."""
    # Not SIGPIPE: a host may have it kill.
    sock.sendall(_LENGTH.pack(len(data)) + data, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> bytes | None:
    """Receive one message; None when the other side is gone. Raises OSError."""
    head = _exactly(sock, _LENGTH.size)
    return None if head is None else _exactly(sock, *_LENGTH.unpack(head))


def _exactly(sock: socket.socket, size: int) -> bytes | None:
    data = bytearray(size)
    at = 0
    while at < size:
        count = sock.recv_into(memoryview(data)[at:])
        if not count:
            return None
        at += count
    return bytes(data)


def serve(sock: socket.socket, scan_dirs: Callable[..., Any]) -> None:
    """Answer until the other side is gone."""
    decode = msgspec.msgpack.Decoder(Ask).decode
    encode = msgspec.msgpack.Encoder().encode
    lookup = _lookup(0, b"")
    while (data := receive(sock)) is not None:
        ask = decode(data)
        if ask.what == "rest" or (ask.mount, ask.point) != lookup.mount[:5:4]:
            lookup.close()
            lookup = _lookup(ask.mount, ask.point)
        error = value = None
        try:
            value = _answer(ask, lookup, scan_dirs)
        except (FanwiseError, OSError) as reason:
            error = pickle.dumps(reason)
        send(sock, encode((error, value)))


def _lookup(mount: int, point: bytes) -> Lookup:
    # What a Lookup goes by; the rest of a mount may hold text that is not UTF-8.
    return Lookup(Mount(mount, 0, (0, 0), b"", point, (), (), "", b"", ()))


def _answer(ask: Ask, lookup: Lookup, scan_dirs: Callable[..., Any]) -> object:
    if ask.what == "locate":
        return lookup.locate(ask.keys[0], lambda key: False)
    if ask.what == "key_of":
        return lookup.key_of(ask.keys[0], ask.name)
    if ask.what == "links":
        return lookup.links(ask.keys[0])
    if ask.what == "names_in":
        return lookup.names_in(ask.keys[0])
    if ask.what in _SCANS:
        return scan_mount(scan_dirs, lookup.mount, ask.keys, _SCANS.index(ask.what))
    return None


def main(host: int, pure: bool) -> None:
    """Run as a process of its own; ``host`` is the pid of the one that started it."""
    # Those of a terminal or a service manager go to the whole group: the host still has its queue
    # to deliver then, and needs the answers.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    # What the host blocks, as the command does, comes along: the one below must not be among it.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def orphaned(number: int, frame: FrameType | None) -> None:
        # It is sent when the thread that started this process ends, too.
        if os.getppid() != host:
            os._exit(0)

    # Besides the end of the socket, which a fork of the host that is not Python's would keep open.
    signal.signal(signal.SIGUSR1, orphaned)
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGUSR1), 0, 0, 0)
    orphaned(0, None)
    with contextlib.suppress(OSError):  # the host went away while it was answered
        serve(socket.socket(fileno=os.dup(0)), parts(pure).scan_dirs)
    os._exit(0)
