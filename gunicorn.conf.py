"""How the service is served behind nginx: `gunicorn cart:app` finds this file. WEB_CONCURRENCY sets the workers."""

from gevent import monkey

monkey.patch_all()

import gc
import logging
import os
from typing import Any

import gevent
import psycopg2
from gevent.socket import wait_read, wait_write
from gunicorn.instrument.statsd import Statsd
from psycopg2.extensions import POLL_OK, POLL_READ, set_wait_callback
from pythonjsonlogger.json import JsonFormatter

import tokens  # a wrong setting ends the start here, before there are workers

SILENCE_TIMEOUT = 3  # seconds for the database to answer; above cart.py's statement_timeout
LOG_FIELDS = {"levelname": "level", "message": "message", "name": "logger", "process": "pid"}
IS_TRACED = bool({"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"} & set(os.environ))


class Logger(Statsd):
    """gunicorn's logger, which sends metrics if --statsd-host is set, in JSON; for the service's log too."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        logging.root.handlers = self.error_log.handlers
        logging.root.setLevel(self.loglevel)
        for handler in self.error_log.handlers:
            handler.setFormatter(JsonFormatter(list(LOG_FIELDS), rename_fields=LOG_FIELDS, timestamp="time"))


bind = "0.0.0.0:8080"
worker_class = "gevent_pywsgi"  # a fifth faster than "gevent"; max_requests and hooks for requests do not work with it
logger_class = Logger
preload_app = not IS_TRACED  # the workers share what is loaded; OpenTelemetry must start in each of them
graceful_timeout = 5  # seconds for requests in progress at a stop
control_socket_disable = True


def wait(connection: Any) -> None:
    """Let other requests run until the database answers. If it does not in time psycopg2 closes the connection."""
    with gevent.Timeout(SILENCE_TIMEOUT, psycopg2.OperationalError("no answer from the database in time")):
        while (state := connection.poll()) != POLL_OK:
            (wait_read if state == POLL_READ else wait_write)(connection.fileno())


set_wait_callback(wait)


def pre_fork(server: Any, worker: Any) -> None:
    """Keep what is loaded out of the garbage collector's full rounds, which stop a worker for 50 ms."""
    gc.collect()
    gc.freeze()


def post_fork(server: Any, worker: Any) -> None:
    """Start OpenTelemetry, of the package opentelemetry-distro, if its exporter is set."""
    if IS_TRACED:
        from opentelemetry.instrumentation.auto_instrumentation import initialize

        initialize()


def post_worker_init(worker: Any) -> None:
    """Warn if the carts are open to all, and have a worker that stops close each connection after its answer."""
    if not (tokens.KEY or tokens.ISSUER):
        worker.log.warning("Tokens are not asked for: all who reach this service may use every cart.")

    @worker.wsgi.after_request  # type: ignore[untyped-decorator]
    def drain(response: Any) -> Any:
        if not worker.alive:
            response.headers["Connection"] = "close"
        return response
