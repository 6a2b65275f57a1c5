"""CloudEvents by HTTP POST: retried with backoff, signed, and never following a redirect.

REFS      a delivery owns its connection; one connection a try.
LOCKING   none: all in the sink's thread, but for `interrupt`, which shuts the socket down.
LIFETIME  a try has a deadline over all of it, however slowly the server speaks. Between tries the
          thread waits on ``stopping``. Looking the name up has no deadline of its own (the
          resolver's counts), so at the end a thread may be left in it.
"""

import email.utils
import http.client
import io
import os
import random
import socket
import ssl
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fanwise._errors import FanwiseError
from fanwise.sinks import cloudevent
from fanwise.sinks.sink import Delivery, Failed, Sink

_KEPT = 4096  # bytes of an answer
_LATER = {408, 425, 429}  # besides all from 500
_MOST_SECRET = 4096


class Webhook(Sink):
    """Posts each record to ``url`` as a CloudEvent.

    ``secret`` is the file of the key that signs it, ``ca`` one of certificates to trust instead of
    the system's. A try may take ``connect`` seconds to connect and ``limit`` in all. There are
    ``tries`` at most, with about ``backoff`` seconds after the first, doubled each time up to
    ``most``; a server's Retry-After counts instead where it is longer, up to ``most``.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        secret: Path | None = None,
        ca: Path | None = None,
        connect: float = 5.0,
        limit: float = 10.0,
        tries: int = 8,
        backoff: float = 1.0,
        most: float = 300.0,
        host: str | None = None,
        jitter: Callable[[], float] = random.random,
        **options: Any,
    ) -> None:
        super().__init__(name, **options)
        self.url = url
        self._secret, self._ca = secret, ca
        self._connect, self._limit = connect, limit
        self._tries, self._backoff, self._most = tries, backoff, most
        self._host = host or socket.gethostname()
        self._jitter = jitter
        self._keys: tuple[bytes, ...] = ()
        self._tls: ssl.SSLContext | None = None
        self._connection: _Connection | None = None

    def prepare(self) -> None:
        """Check the URL, read the secret and the certificates. Raises FanwiseError."""
        reason = wrong_url(self.url)
        if reason:
            raise FanwiseError(f"sink {self.name}: {reason}")
        if self._secret is not None:
            try:
                self._keys = (read_secret(self._secret),)
            except (OSError, ValueError) as error:
                raise FanwiseError(
                    f"sink {self.name}: the secret {self._secret}: {_said(error)}",
                    "put at least 16 random bytes there, readable for you alone",
                ) from error
        if self.url.startswith("https:"):
            try:
                self._tls = ssl.create_default_context(cafile=self._ca)
            except (OSError, ssl.SSLError) as error:
                raise FanwiseError(f"sink {self.name}: {self._ca}: {_said(error)}") from error

    def deliver(self, delivery: Delivery) -> None:
        """Post it until it is taken, refused for good, or the tries are used up. Raises Failed."""
        id_, body = cloudevent.event(delivery.record, self._host)
        for number in range(1, self._tries + 1):
            delivery.attempts = number
            status, again, reason = self._post(id_, body, delivery)
            if reason is None:
                return
            if status is not None and not _worth_another(status):
                raise Failed(reason)
            if number == self._tries:
                raise Failed(f"{reason} ({number} tries)")
            # Full jitter: many that failed together do not come back together.
            wait = min(self._most, self._backoff * 2 ** (number - 1)) * self._jitter()
            if self.stopping.wait(min(self._most, max(wait, again))):
                raise Failed(f"{reason}; the end came before the next try")

    # One try: (status, Retry-After in seconds, what was wrong).
    def _post(
        self, id_: str, body: bytes, delivery: Delivery
    ) -> tuple[int | None, float, str | None]:
        deadline = time.monotonic() + self._limit
        parts = urlsplit(self.url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {
            "Content-Type": cloudevent.CONTENT_TYPE,
            "User-Agent": "fanwise",
            "Connection": "close",
            **cloudevent.headers(id_, int(time.time()), body, self._keys),
        }
        assert parts.hostname is not None
        port = parts.port or (443 if self._tls else 80)
        connection = _Connection(parts.hostname, port, self._tls, self._connect, deadline)
        self._connection = connection
        try:
            if self.stopping.is_set():
                return None, 0.0, "the end came"
            connection.request("POST", target, body, headers)
            answer = connection.getresponse()
            delivery.output = answer.read(_KEPT)
        except TimeoutError:
            return None, 0.0, f"no answer from {parts.netloc} in time"
        except (OSError, http.client.HTTPException) as error:
            return None, 0.0, f"{parts.netloc}: {_said(error)}"
        finally:
            self._connection = None
            connection.end()
        if 200 <= answer.status < 300:
            return answer.status, 0.0, None
        if 300 <= answer.status < 400:
            where = answer.headers.get("Location", "nowhere")[:200]
            return answer.status, 0.0, f"redirected to {where!r}, which is refused; write that URL"
        said = delivery.output[:200].decode(errors="replace").strip()
        reason = f"{parts.netloc} answered {answer.status}" + (f": {said}" if said else "")
        return answer.status, retry_after(answer.headers.get("Retry-After"), time.time()), reason

    def interrupt(self) -> None:
        """End a try that waits for its server."""
        connection = self._connection
        sock = connection.raw if connection is not None else None
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:  # closed meanwhile, or never connected
                return


def _worth_another(status: int) -> bool:
    return status in _LATER or status >= 500


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def wrong_url(url: str) -> str | None:
    """Return what is wrong with the URL of a webhook, or None."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"{url!r} is no URL: {error}"
    if parts.scheme not in ("http", "https"):
        return f"{url!r} is no http or https URL"
    if not parts.hostname or port == 0:
        return f"{url!r} names no host and port"
    if parts.username is not None or parts.password is not None:
        return f"{parts.hostname}: a URL is no place for a password"
    if parts.fragment or not url.isascii() or any(c.isspace() or not c.isprintable() for c in url):
        return f"{url!r} has characters that do not belong there"
    return None


def read_secret(path: Path) -> bytes:
    """Return the key in a file. Raises OSError, and ValueError when others may read it, too."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        there = os.fstat(fd)
        if not stat.S_ISREG(there.st_mode):
            raise ValueError("it is not a regular file")
        if there.st_mode & 0o077:
            raise ValueError("others may read it")
        return cloudevent.secret(file.read(_MOST_SECRET))


def retry_after(text: str | None, now: float) -> float:
    """Return the seconds that a Retry-After header asks for; 0 when it makes no sense."""
    if text is None:
        return 0.0
    text = text.strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, OverflowError):
        return 0.0


class _Connection(http.client.HTTPConnection):
    """A connection on which every wait ends at one deadline."""

    def __init__(
        self, host: str, port: int, tls: ssl.SSLContext | None, connect: float, deadline: float
    ) -> None:
        super().__init__(host, port)
        self._context, self._deadline, self._most = tls, deadline, connect
        self.default_port = 443 if tls else 80  # is left out of the Host header
        self.raw: socket.socket | None = None

    def connect(self) -> None:
        self.raw = socket.create_connection(
            (self.host, self.port), min(self._most, _left(self._deadline))
        )
        if self._context is not None:
            self.raw.settimeout(_left(self._deadline))
            self.raw = self._context.wrap_socket(self.raw, server_hostname=self.host)
        self.sock = _Timed(self.raw, self._deadline)

    # Not close(): that is called with an answer still to be read.
    def end(self) -> None:
        self.close()
        if self.raw is not None:
            self.raw.close()


# What http.client asks of a socket.
class _Timed:
    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline

    def sendall(self, data: Any) -> None:
        self._sock.settimeout(_left(self._deadline))
        self._sock.sendall(data)  # its timeout is for all of it

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Raw(self._sock, self._deadline))

    def close(self) -> None:
        pass  # the connection closes the socket itself


class _Raw(io.RawIOBase):
    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(_left(self._deadline))
        return self._sock.recv_into(buffer)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
