"""The clients' side of gunicorn: none of them holds a worker up, whatever it sends, takes or leaves out."""

import os
from contextlib import nullcontext, suppress
from http import HTTPStatus
from socket import SHUT_RD, SHUT_WR
from time import monotonic
from typing import Any, ClassVar

import gevent
import orjson
from gevent.lock import BoundedSemaphore
from gevent.monkey import get_original
from gunicorn.http.errors import InvalidHeader, LimitRequestHeaders, LimitRequestLine, ParseException
from gunicorn.workers.ggevent import GeventWorker

# Seconds: for a request from its first byte to its last, for its answer to be taken, for a client's last words, and
# for the last request of a kept connection when the worker stops.
REQUEST_TIMEOUT, ANSWER_TIMEOUT, CLOSE_TIMEOUT, LAST_REQUEST_TIMEOUT = 10, 5, 1, 2
# Bytes. A token has some thousand; a body in small chunks has their sizes between them; what is left of a body that
# nobody read is read for the sake of the next request, where it is short.
MAX_HEAD, MAX_REQUEST, MAX_REST = 32 * 1024, 4 * 1024 * 1024, 16 * 1024
MUCH, MAX_PAUSE = 16 * 1024, 0.1  # bytes of a request, and seconds that it pauses between the next ones


class Client:
    """A client's socket. A request that takes too long looks broken off, and an answer is sent as a whole."""

    idle: ClassVar[set["Client"]] = set()  # the kept connections that wait for their next request
    lane: ClassVar = BoundedSemaphore()  # those who send much pass one by one

    def __init__(self, socket: Any, keepalive: int) -> None:
        self.socket, self.keepalive, self.answer, self.taken_at = socket, keepalive, b"", 0.0
        self.start()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.socket, name)

    def start(self) -> None:
        """Begin a request."""
        self.idle.discard(self)
        self.deadline, self.left, self.taken = monotonic() + REQUEST_TIMEOUT, MAX_HEAD, 0

    def recv(self, size: int) -> bytes:
        """Return what comes next, or nothing where it does not come in time.

        :raise LimitRequestHeaders: too much has come
        """
        is_idle = self in self.idle
        if self.taken > MUCH:  # it gives back the time that its last bytes took, so that half is for the others
            pause = min(monotonic() - self.taken_at, MAX_PAUSE)
            with self.lane:
                gevent.sleep(pause)
        elif not is_idle:
            gevent.sleep(0)  # the others' turn: one who sends without a pause would keep it
        timeout = self.keepalive if is_idle else self.deadline - monotonic()
        if self.left <= 0:
            raise LimitRequestHeaders("The request is too large.")
        if timeout <= 0:
            return b""
        self.socket.settimeout(timeout)
        try:
            data: bytes = self.socket.recv(size)
        except TimeoutError:
            return b""
        if is_idle:
            self.start()
        self.left, self.taken, self.taken_at = self.left - len(data), self.taken + len(data), monotonic()
        return data

    def sendall(self, data: bytes) -> None:
        """Keep what is small until `flush`: the head and the body of an answer are one call of the system then."""
        self.answer += data
        if len(self.answer) > 65536:
            self.flush()

    def flush(self) -> None:
        if self.answer:
            self.socket.settimeout(ANSWER_TIMEOUT)
            data, self.answer = self.answer, b""
            if (sent := self.socket.send(data)) < len(data):
                self.socket.sendall(data[sent:])

    def sendfile(self, *args: Any, **kwargs: Any) -> Any:
        self.flush()
        return self.socket.sendfile(*args, **kwargs)

    def close(self) -> None:
        """Send what is kept, and leave a little time for what is on its way: unread, it would take the answer along."""
        self.start()
        with suppress(OSError, LimitRequestHeaders):
            self.flush()
            self.socket.shutdown(SHUT_WR)
            self.deadline, self.left = monotonic() + CLOSE_TIMEOUT, MAX_REQUEST
            while self.recv(65536):
                pass
        self.socket.close()

    def hang_up(self) -> None:
        """Have a greenlet that waits in `recv` see the end. gevent's own `shutdown` would raise an error there."""
        with suppress(OSError), get_original("socket", "socket")(fileno=os.dup(self.socket.fileno())) as socket:
            socket.shutdown(SHUT_RD)


class Worker(GeventWorker):
    """A gevent worker that does not wait for clients for ever, and refuses what is not HTTP as the service does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.requests: set[Any] = set()  # in progress

    def timeout_ctx(self) -> Any:
        return nullcontext()  # the client's deadline serves

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        kept: Any = Client(client, self.cfg.keepalive)
        super().handle(listener, kept, addr)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> bool:
        if req.version >= (1, 1) and not any(name == "HOST" for name, _ in req.headers):
            raise InvalidHeader("HOST is missing", req=req)  # RFC 9112, section 3.2
        sock.left = MAX_REQUEST
        self.requests.add(req)
        try:
            try:
                super().handle_request(listener_name, req, sock, addr)
            finally:
                self.requests.discard(req)
            sock.flush()
            sock.left = MAX_REST
            while req.body.read(MAX_REST):
                pass
        except (ParseException, OSError):
            raise StopIteration from None  # the answer is not being read, or the body does not end
        if sock.deadline <= monotonic():
            raise StopIteration
        sock.idle.add(sock)
        gevent.sleep(0)  # the others' turn: its next request may be here already
        return True

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        if not isinstance(exc, ParseException):
            super().handle_error(req, client, addr, exc)
            return
        self.log.warning("Invalid request from %s: %s", addr[0] if addr else "a socket", exc)
        codes = {LimitRequestLine: HTTPStatus.REQUEST_URI_TOO_LONG, LimitRequestHeaders: HTTPStatus(431)}
        status = codes.get(type(exc), HTTPStatus.BAD_REQUEST)
        problem = {"type": "about:blank", "title": status.phrase, "status": status, "detail": str(exc)}
        body = orjson.dumps(problem)
        head = f"HTTP/1.1 {status} {status.phrase}\r\nContent-Type: application/problem+json\r\nConnection: close\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Answer what is in progress, and the next request of each kept connection, as the last one there."""
        super().handle_exit(sig, frame)
        gevent.spawn(self.end_requests)  # not at once, where the signal may come after an answer said otherwise
        gevent.spawn_later(LAST_REQUEST_TIMEOUT, self.hang_up)

    def end_requests(self) -> None:
        for request in self.requests:
            request.force_close()

    def hang_up(self) -> None:
        """Close the kept connections that sent no last request, now and again until the worker ends."""
        for client in Client.idle:
            client.hang_up()
        gevent.spawn_later(LAST_REQUEST_TIMEOUT, self.hang_up)
