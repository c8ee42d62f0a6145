"""The clients' side of gunicorn: none of them holds a worker up, whatever it sends, takes or leaves out.

Read in gunicorn 27.0: what a worker calls of a socket, and the methods of GeventWorker that are extended here.
"""

import re
from contextlib import nullcontext, suppress
from errno import EPIPE
from random import getrandbits
from socket import SHUT_WR
from time import monotonic
from typing import Any

import gevent
from gunicorn.http.errors import InvalidHeader, LimitRequestHeaders
from gunicorn.workers.ggevent import GeventWorker

MAX_HEAD = 32 * 1024  # bytes; a token has some thousand
MAX_SENT = 2 * 1024 * 1024  # bytes of a body that come at all; cart.py bounds what it reads
MAX_REST = 16 * 1024  # bytes of a body that are read for the next request's sake if nobody wanted them
REQUEST_TIMEOUT = 10  # seconds for the head of a connection's first request, and for each body
ANSWER_TIMEOUT = 10  # seconds for each part of an answer to be taken
LINGER_TIMEOUT = 1  # seconds for what is on its way when the connection closes
MAX_PART = 64 * 1024  # bytes of an answer that are kept until there is more, or all
STOP_TIMEOUT = 5  # seconds for requests in progress at a stop


class Client:
    """A client's socket. What comes too late looks as if the client had gone, and an answer is sent as a whole."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket
        self.answer = b""
        self.expect(MAX_HEAD, REQUEST_TIMEOUT)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.socket, name)

    def expect(self, size: int, seconds: float) -> None:
        """Let so many bytes come, all of them within so many seconds."""
        self.bytes_left = size
        self.deadline = monotonic() + seconds
        self.is_late = False

    def recv(self, size: int) -> bytes:
        """Return what comes next, or nothing if it does not come in time. gunicorn takes nothing for the client's end.

        :raise LimitRequestHeaders: too much has come; gunicorn answers it with 431
        """
        if self.bytes_left <= 0:
            raise LimitRequestHeaders("The request is too large.")
        seconds_left, data = self.deadline - monotonic(), b""
        with suppress(OSError):  # a timeout, or the connection was reset
            if seconds_left > 0:
                self.socket.settimeout(seconds_left)
                data = self.socket.recv(min(size, MAX_PART))
        self.bytes_left -= len(data)
        self.is_late = not data
        return data

    def sendall(self, data: bytes) -> None:
        """Keep a part of an answer until `flush`: one packet for head and body is 5 % of the throughput."""
        self.answer += data
        if len(self.answer) > MAX_PART:
            self.flush()

    def flush(self) -> None:
        """Send what is kept.

        :raise BrokenPipeError: the client does not take it in time, or is gone; gunicorn then closes the connection
        """
        data, self.answer = self.answer, b""
        try:
            self.socket.settimeout(ANSWER_TIMEOUT)
            while data:  # gevent's `sendall` costs 2 % of a request more
                data = data[self.socket.send(data) :]
        except OSError as error:
            raise BrokenPipeError(EPIPE, "the answer is not read") from error

    def close(self) -> None:
        """Send what is kept, then read what is still on its way: unread, it would reset the connection, and the client
        would lose the answer."""
        with suppress(OSError, LimitRequestHeaders):
            self.flush()
            self.socket.shutdown(SHUT_WR)
            self.expect(MAX_SENT, LINGER_TIMEOUT)
            while self.recv(MAX_PART):
                pass
        self.socket.close()


class Worker(GeventWorker):
    """A gevent worker that waits for no client for ever."""

    def run(self) -> None:
        self.cfg.set("graceful_timeout", STOP_TIMEOUT)  # the master waits longer, for the last traces too
        super().run()

    def timeout_ctx(self) -> Any:
        return nullcontext()  # the client's deadline serves

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        wrapped: Any = Client(client)
        super().handle(listener, wrapped, addr)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> bool:
        self.check_head(req)
        self.add_request_id(req)
        sock.expect(MAX_SENT, REQUEST_TIMEOUT)
        super().handle_request(listener_name, req, sock, addr)  # raises StopIteration if the connection shall close
        sock.flush()
        req.body.read(MAX_REST)
        if sock.is_late:
            raise StopIteration  # the body did not arrive whole: what comes next is not a head
        sock.expect(MAX_HEAD, self.cfg.keepalive)
        gevent.sleep(0)  # a client that sends many requests at once must not keep others waiting
        return True

    @staticmethod
    def check_head(req: Any) -> None:
        """Refuse a request without a Host (RFC 9112, section 3.2) or with a body of unknown length.

        One that announces a large body is the last on its connection: its answer waits for no body that nobody reads.

        :raise InvalidHeader: gunicorn answers it with 400
        """
        headers = dict(req.headers)
        if "HOST" not in headers and req.version >= (1, 1):
            raise InvalidHeader("HOST is missing", req=req)
        if "TRANSFER-ENCODING" in headers:
            raise InvalidHeader("TRANSFER-ENCODING: a body comes with a Content-Length", req=req)
        if int(headers.get("CONTENT-LENGTH", 0)) > MAX_REST:
            req.force_close()

    @staticmethod
    def add_request_id(req: Any) -> None:
        """Give the request an id, unless its X-Request-Id is up to 128 characters of printable ASCII."""
        sent = [value for name, value in req.headers if name == "X-REQUEST-ID"]
        if len(sent) != 1 or not re.fullmatch(r"[ -~]{1,128}", sent[0]):
            req.headers = [header for header in req.headers if header[0] != "X-REQUEST-ID"]
            req.headers.append(("X-REQUEST-ID", f"{getrandbits(128):032x}"))

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        if not isinstance(exc, gevent.GreenletExit):  # gevent raises it in the handlers of idle clients at a stop
            super().handle_error(req, client, addr, exc)
