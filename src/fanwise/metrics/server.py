"""Metrics by HTTP: one thread, bounded connections, each with a deadline.

REFS      the server owns its sockets and its thread.
LOCKING   none: `publish` swaps one reference, which the thread takes at each request.
LIFETIME  see SERVER. A connection answers one request and is closed; one that is slower than its
          deadline is dropped, and so is the oldest when there are too many. A forked child closes
          its copies.
"""

import ipaddress
import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType

from fanwise._errors import ConfigError, FanwiseError
from fanwise.lifetime import Lifetime
from fanwise.metrics.text import CONTENT_TYPE

_MOST_HEAD = 8192  # bytes of a request
_MOST_CONNECTIONS = 32

_live: "weakref.WeakSet[Server]" = weakref.WeakSet()


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of ``PORT``, ``:PORT``, ``HOST:PORT`` or ``[ADDRESS]:PORT``.

    Without a host it is the loopback address. Raises ConfigError.
    """
    host, _, port = text.rpartition(":")
    host = host.strip()
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise _wrong(text) from None
    elif ":" in host:
        raise _wrong(text)
    if not (port.isascii() and port.isdigit() and len(port) < 6 and int(port) < 65536):
        raise _wrong(text)
    return host or "127.0.0.1", int(port)


def _wrong(text: str) -> FanwiseError:
    remedy = "write [HOST:]PORT, such as 127.0.0.1:9899"
    return ConfigError("health.metrics", None, f"{text!r} is no address", remedy)


class _Client:
    __slots__ = ("answer", "head", "sock", "until")

    def __init__(self, sock: socket.socket, until: float) -> None:
        self.sock, self.until = sock, until
        self.head, self.answer = b"", b""


class Server:
    """Serves what was published last at ``/metrics``; a context manager.

    ``address`` is as `parse_address` has it, ``deadline`` the seconds that a client has.
    """

    state: str

    def __init__(self, address: str, *, deadline: float = 5.0) -> None:
        self.host, self.port = parse_address(address)
        self._deadline = deadline
        self._render: Callable[[], bytes] = lambda: b""
        self._listening: socket.socket | None = None
        self._wake: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None
        SERVER.start(self)

    def publish(self, render: Callable[[], bytes]) -> None:
        """Serve from now on what ``render`` gives; it is called in the server's thread.

        So it works on what does not change any more.
        """
        self._render = render

    def start(self) -> None:
        """Listen; ``port`` is the real one then, also where 0 was asked for.

        Raises FanwiseError when the address cannot be had.
        """
        try:
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            self._listening = socket.create_server((self.host, self.port), family=family)
        except OSError as error:
            raise FanwiseError(
                f"metrics cannot be served on {self.host}:{self.port}: {error.strerror or error}",
                "name another address",
            ) from error
        self._listening.setblocking(False)
        self.port = self._listening.getsockname()[1]
        self._wake = socket.socketpair()
        SERVER.advance(self, "start")
        _live.add(self)
        self._thread = threading.Thread(target=self._serve, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving; idempotent."""
        if self.state != "SERVING":
            if self.state == "NEW":
                SERVER.advance(self, "close")
            return
        SERVER.advance(self, "close")
        assert self._wake is not None
        assert self._thread is not None
        self._wake[1].send(b"x")
        self._thread.join()
        self._drop()
        _live.discard(self)

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _drop(self) -> None:
        for sock in (self._listening, *(self._wake or ())):
            if sock is not None:
                sock.close()

    def _serve(self) -> None:
        assert self._listening is not None
        assert self._wake is not None
        clients: dict[int, _Client] = {}
        with selectors.DefaultSelector() as selector:
            selector.register(self._listening, selectors.EVENT_READ)
            selector.register(self._wake[0], selectors.EVENT_READ)

            def end(client: _Client) -> None:
                del clients[client.sock.fileno()]
                selector.unregister(client.sock)
                client.sock.close()

            while self.state == "SERVING":
                now = time.monotonic()
                for client in [c for c in clients.values() if c.until <= now]:
                    end(client)
                first = min((c.until for c in clients.values()), default=now + 3600)
                for key, _ in selector.select(max(0.0, first - now)):
                    if key.fileobj is self._listening:
                        if len(clients) >= _MOST_CONNECTIONS:
                            end(next(iter(clients.values())))
                        self._accept(selector, clients)
                    elif (one := clients.get(key.fd)) and not self._go_on(selector, one):
                        end(one)
            for client in clients.values():
                client.sock.close()

    def _accept(self, selector: selectors.BaseSelector, clients: dict[int, _Client]) -> None:
        assert self._listening is not None
        try:
            sock, _ = self._listening.accept()
        except OSError:  # gone again, or no descriptor is free: the next one may be luckier
            return
        sock.setblocking(False)
        clients[sock.fileno()] = _Client(sock, time.monotonic() + self._deadline)
        selector.register(sock, selectors.EVENT_READ)

    # Read or write what can be without waiting; False when the connection is done with.
    def _go_on(self, selector: selectors.BaseSelector, client: _Client) -> bool:
        try:
            if client.answer:
                client.answer = client.answer[client.sock.send(client.answer) :]
                return bool(client.answer)
            data = client.sock.recv(_MOST_HEAD)
        except BlockingIOError:
            return True
        except OSError:
            return False
        client.head += data
        if b"\r\n\r\n" in client.head or len(client.head) > _MOST_HEAD:
            client.answer = self._answer(client.head)
            selector.modify(client.sock, selectors.EVENT_WRITE)
            return True
        return bool(data)

    def _answer(self, head: bytes) -> bytes:
        parts = head.split(b"\r\n", 1)[0].split(b" ")
        if len(head) > _MOST_HEAD or len(parts) != 3 or not parts[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request", b"not a request\n")
        if parts[0] not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", b"GET or HEAD\n", "Allow: GET, HEAD\r\n")
        if parts[1].split(b"?")[0] != b"/metrics":
            return _response("404 Not Found", b"/metrics is here\n")
        try:
            body = self._render()
        except Exception as error:
            # A defect there must not end the thread; the scrape fails and says why.
            body = f"{type(error).__name__}: {error}\n".encode(errors="replace")
            return _response("500 Internal Server Error", body)
        answer = _response("200 OK", body, kind=CONTENT_TYPE)
        return answer[: -len(body)] if parts[0] == b"HEAD" and body else answer


def _response(
    status: str, body: bytes, extra: str = "", kind: str = "text/plain; charset=utf-8"
) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        f"Connection: close\r\n{extra}\r\n"
    )
    return head.encode() + body


SERVER: Lifetime[Server] = Lifetime(
    "Server",
    states=("NEW", "SERVING", "CLOSED"),
    transitions={"start": "NEW -> SERVING", "close": "NEW, SERVING -> CLOSED"},
)


def _after_fork() -> None:
    for server in list(_live):
        server.state = "CLOSED"
        server._drop()
    _live.clear()


os.register_at_fork(after_in_child=_after_fork)
