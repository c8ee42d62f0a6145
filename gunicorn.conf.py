"""How the service is served: `gunicorn cart:app` finds this file by itself. WEB_CONCURRENCY sets the workers."""

from gevent import monkey

monkey.patch_all()

import gc
import os
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from socket import SHUT_WR
from typing import Any

import gevent
import orjson
from gunicorn.glogging import Logger
from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine, ParseException
from gunicorn.workers.ggevent import GeventWorker

bind = "0.0.0.0:8080"
workers = int(os.environ.get("WEB_CONCURRENCY", "2"))
preload_app = True  # a wrong setting ends the start, and the workers share what is loaded
graceful_timeout = 8
control_socket_disable = True
forwarded_allow_ips = ""  # no client sets SCRIPT_NAME and its like


class AccessLogger(Logger):
    """Writes one JSON object a request, without headers and query, where tokens are."""

    def access(self, resp: Any, req: Any, environ: dict[str, Any], request_time: timedelta) -> None:
        entry = {
            "time": datetime.now(UTC),
            "method": req.method,
            "path": req.path,
            "status": resp.status_code,
            "duration_ms": round(request_time.total_seconds() * 1000, 3),
            "bytes": resp.sent,
        }
        os.write(1, orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))


class Worker(GeventWorker):
    """A gevent worker that does not wait for clients for ever, and refuses what is not HTTP as the service does."""

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> None:
        sock.settimeout(5)
        try:
            super().handle_request(listener_name, req, sock, addr)
        except TimeoutError:
            raise StopIteration from None  # the answer is not being read
        gevent.sleep(0)  # the other connections' turn, where a quick client would keep its own

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        if not isinstance(exc, ParseException):
            super().handle_error(req, client, addr, exc)
            return
        codes = {LimitRequestLine: HTTPStatus.REQUEST_URI_TOO_LONG, LimitRequestHeaders: HTTPStatus(431)}
        status = codes.get(type(exc), HTTPStatus.BAD_REQUEST)
        problem = {"type": "about:blank", "title": status.phrase, "status": status, "detail": str(exc)}
        body = orjson.dumps(problem)
        head = f"HTTP/1.1 {status} {status.phrase}\r\nContent-Type: application/problem+json\r\nConnection: close\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        client.shutdown(SHUT_WR)
        with gevent.Timeout(1, False):  # what is left unread at the end would take the answer with it
            while client.recv(65536):
                pass


logger_class = AccessLogger
worker_class = Worker


def pre_fork(server: Any, worker: Any) -> None:
    """Take what is loaded out of the garbage collector's rounds, and leave its memory shared."""
    gc.collect()
    gc.freeze()
