"""How the service is served: `gunicorn cart:app` finds this file by itself."""

from gevent import monkey

monkey.patch_all()

import gc
import os
from datetime import UTC, datetime, timedelta
from typing import Any

import gevent
import orjson
from gunicorn.glogging import Logger

bind = "0.0.0.0:8080"
workers = int(os.environ.get("WEB_CONCURRENCY", "2"))
worker_class = "gevent"
preload_app = True
keepalive = 5
graceful_timeout = 8
control_socket_disable = True
forwarded_allow_ips = ""


class AccessLogger(Logger):
    """Writes the access log as one JSON object a line, and no header or query, where tokens are."""

    def access(self, resp: Any, req: Any, environ: dict[str, Any], request_time: timedelta) -> None:
        entry = {
            "time": datetime.now(UTC),
            "method": req.method,
            "path": req.path,
            "status": resp.status_code,
            "duration_ms": request_time.total_seconds() * 1000,
            "bytes": resp.sent,
        }
        os.write(1, orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))


logger_class = AccessLogger


def pre_fork(server: Any, worker: Any) -> None:
    """Take what is loaded out of the garbage collector's rounds, and leave its memory shared."""
    gc.collect()
    gc.freeze()


def post_request(worker: Any, req: Any, environ: dict[str, Any], resp: Any) -> None:
    """Let the other connections have their turn, where a quick client would keep its own."""
    gevent.sleep(0)
