"""How the service is served: `gunicorn cart:app` finds this file by itself. WEB_CONCURRENCY sets the workers."""

import os
import sys
from pathlib import Path

GEVENT_FIRST = "OTEL_PYTHON_AUTO_INSTRUMENTATION_EXPERIMENTAL_GEVENT_PATCH"
LAUNCHER = Path(sys.executable).with_name("opentelemetry-instrument")
if "opentelemetry.instrumentation.auto_instrumentation" in sys.modules and LAUNCHER.exists():
    if GEVENT_FIRST not in os.environ:
        # OpenTelemetry has started threads, for which gevent's patch comes too late. Begin again, with the patch first.
        os.environ[GEVENT_FIRST] = "patch_all"
        os.execv(LAUNCHER, [str(LAUNCHER), *sys.argv])

from gevent import monkey

monkey.patch_all()

import gc
import resource
import select
import threading
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from socket import SHUT_RD, SHUT_WR
from time import monotonic
from typing import Any

import gevent
import orjson
from gunicorn.glogging import Logger
from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine, ParseException
from gunicorn.workers.ggevent import GeventWorker

try:
    workers = int(os.environ.get("WEB_CONCURRENCY", "2"))
    if workers < 1:
        raise ValueError
except ValueError:
    sys.exit("cart: WEB_CONCURRENCY must be a whole number above 0.")

bind = "0.0.0.0:8080"
preload_app = True  # an invalid setting ends the start, and the workers share what is loaded
keepalive = 75  # seconds; longer than a proxy keeps a connection, which would send into one that is closing
graceful_timeout = 8
control_socket_disable = True
forwarded_allow_ips = ""  # no client sets SCRIPT_NAME and its like

REQUEST_TIMEOUT = 10  # seconds in which a client must deliver a request, from its first byte to its last
ANSWER_TIMEOUT = 5  # seconds in which it must take the answer

# A connection costs little, but one file: thousands that do nothing must not keep others out.
files = min(65_536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
worker_connections = max(1000, files - 1000)


def write(file: int, line: bytes) -> bool:
    """Write a line if that is possible without waiting, and tell whether it was."""
    try:
        return bool(writable[file].poll(0)) and os.write(file, line) == len(line)
    except OSError:
        return False


writable = {file: monkey.get_original("select", "poll")() for file in (1, 2)}
for file, poll in writable.items():
    poll.register(file, select.POLLOUT)


class AccessLogger(Logger):
    """Writes one JSON object a request to stdout, without headers and query, where tokens are.

    A line that cannot be written at once is lost and counted: no request fails or waits for its log.
    """

    lost = 0

    def access(self, resp: Any, req: Any, environ: dict[str, Any], request_time: timedelta) -> None:
        entry = {
            "time": datetime.now(UTC),
            "method": req.method,
            "path": req.path[:1024],  # several workers' lines fit into the page that a pipe has free
            "status": resp.status_code,
            "duration_ms": round(request_time.total_seconds() * 1000, 3),
            "bytes": resp.sent,
        }
        if not write(1, orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE)):
            if not self.lost:
                write(2, b"cart: stdout takes no more lines of the access log; they are counted\n")
            self.lost += 1
        elif self.lost:
            self.report()

    def report(self) -> None:
        """Say how many lines were lost since the last report."""
        if self.lost:
            write(2, f"cart: {self.lost} lines of the access log were lost\n".encode())
        self.lost = 0


class Client:
    """A client's socket. It looks closed when a request takes too long to arrive, and sends an answer as a whole."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket
        self.deadline: float | None = monotonic() + REQUEST_TIMEOUT
        self.answer = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.socket, name)

    def recv(self, size: int) -> bytes:
        if is_idle := self.deadline is None:
            idle.add(self)
        self.socket.settimeout(keepalive if self.deadline is None else max(self.deadline - monotonic(), 0.001))
        try:
            data: bytes = self.socket.recv(size)
        except TimeoutError:
            return b""
        finally:
            idle.discard(self)
        if is_idle:
            self.deadline = monotonic() + REQUEST_TIMEOUT
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
        with suppress(OSError), gevent.Timeout(1, False):
            self.flush()
            self.socket.shutdown(SHUT_WR)
            while self.socket.recv(65536):  # what is left unread at the end would take the answer with it
                pass
        self.socket.close()


idle: set[Client] = set()


class Worker(GeventWorker):
    """A gevent worker that does not wait for clients for ever, and refuses what is not HTTP as the service does."""

    def timeout_ctx(self) -> AbstractContextManager[None]:
        return nullcontext()  # the client's deadline serves

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        super().handle(listener, Client(client), addr)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> None:
        try:
            super().handle_request(listener_name, req, sock, addr)
            sock.flush()
        except TimeoutError:
            raise StopIteration from None  # the answer is not being read
        with suppress(Exception):  # a body that nobody read must not be taken for the next request
            while req.body.read(65536):
                pass
        sock.deadline = None
        gevent.sleep(0)  # the other connections' turn, where a quick client would keep its own

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
        super().handle_exit(sig, frame)
        for client in list(idle):
            with suppress(OSError):
                client.socket.shutdown(SHUT_RD)


logger_class = AccessLogger
worker_class = Worker


def pre_fork(server: Any, worker: Any) -> None:
    """Take what is loaded out of the garbage collector's rounds, and leave its memory shared."""
    gc.collect()
    gc.freeze()
    worker.threads = dict(threading._active)  # no public name holds them by their ident


def post_fork(server: Any, worker: Any) -> None:
    """Have the master's threads known here, where they go on as greenlets. OpenTelemetry has some, and ends them."""
    threading._active.update(worker.threads)


def worker_exit(server: Any, worker: Any) -> None:
    """Count what was lost of the access log."""
    worker.log.report()
