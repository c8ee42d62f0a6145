"""How the service is served behind nginx: `gunicorn cart:app` finds this file."""

from gevent import monkey, sleep

monkey.patch_all()

import gc
import logging
import os
from contextlib import suppress
from typing import Any

import flask
from gunicorn.instrument.statsd import Statsd
from psycopg2.extensions import set_wait_callback
from pythonjsonlogger.json import JsonFormatter

import database
import tokens
from settings import SETTINGS  # a wrong setting ends the start here, before there are workers

LOG_FIELDS = {"levelname": "level", "message": "message", "name": "logger", "process": "pid"}
IS_TRACED = bool({"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"} & set(os.environ))


def add_request_id(record: logging.LogRecord) -> bool:
    """Add the request's id to a record, if there is a request."""
    if flask.has_request_context():
        record.request_id = flask.request.headers.get("X-Request-Id")
    return True


class Logger(Statsd):
    """Writes gunicorn's and the service's log in JSON, and sends metrics if --statsd-host is set."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        logging.root.handlers = self.error_log.handlers
        logging.root.setLevel(self.loglevel)
        for handler in self.error_log.handlers:
            handler.addFilter(add_request_id)
            handler.setFormatter(JsonFormatter(list(LOG_FIELDS), rename_fields=LOG_FIELDS, timestamp="time"))

    def access(self, resp: Any, req: Any, environ: Any, request_time: Any) -> None:
        with suppress(ValueError):  # after a hang-up gevent's status is no number
            super().access(resp, req, environ, request_time)


bind = "0.0.0.0:8080"
workers = SETTINGS.web_concurrency
worker_class = "gevent_pywsgi"  # a fifth faster than "gevent"; max_requests and hooks for requests do not work with it
worker_connections = 10000  # requests that wait, for a cart or for the issuer, keep nobody else out
logger_class = Logger
preload_app = not IS_TRACED  # the workers share what is loaded; OpenTelemetry must start in each of them
graceful_timeout = 5  # seconds for requests in progress at a stop
control_socket_disable = True
set_wait_callback(database.wait)


def when_ready(server: Any) -> None:
    """Before the workers are forked: log whether tokens are asked for, and spare them long garbage collections."""
    gc.collect()
    gc.freeze()  # what is loaded; full rounds over it would stop a worker for 50 ms
    if not (tokens.KEY or tokens.ISSUER):
        server.log.warning("Tokens are not asked for: all who reach this service may use every cart.")
    else:
        source = "JWT_KEY" if tokens.KEY else "JWT_JWKS_URL"
        server.log.info("Tokens are asked for: %s, by %s", tokens.ALGORITHM, source)


def post_fork(server: Any, worker: Any) -> None:
    """Start OpenTelemetry, of the package opentelemetry-distro, if its exporter is set."""
    if IS_TRACED:
        from opentelemetry.instrumentation.auto_instrumentation import initialize

        initialize()


def post_worker_init(worker: Any) -> None:
    """Let the worker's other requests run after each answer; close each connection after its answer at a stop."""

    @worker.wsgi.after_request  # type: ignore[untyped-decorator]
    def finish(response: Any) -> Any:
        response.call_on_close(lambda: sleep(0))  # before the next request of the same client
        if not worker.alive:
            response.headers["Connection"] = "close"
        return response
