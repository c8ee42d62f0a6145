"""How the service is served: `gunicorn cart:app` finds this file by itself. WEB_CONCURRENCY sets the workers."""

from gevent import monkey

monkey.patch_all()

import gc
import os
import resource
import sys
from typing import Any

os.environ.setdefault("OTEL_EXPORTER_OTLP_TIMEOUT", "3")  # seconds; a worker that stops waits for its last spans
TRACING = any(name in os.environ for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))

try:
    workers = int(os.environ.get("WEB_CONCURRENCY", "2"))
    if workers < 1:
        raise ValueError
except ValueError:
    sys.exit("cart: WEB_CONCURRENCY must be a whole number above 0.")

bind = "0.0.0.0:8080"
worker_class = "clients.Worker"
logger_class = "logs.Logger"
preload_app = not TRACING  # the workers share what is loaded; OpenTelemetry must start in each of them
keepalive = 75  # seconds; longer than a proxy keeps a connection, which would send into one that is closing
graceful_timeout = 8
control_socket_disable = True
forwarded_allow_ips = ""  # no client sets SCRIPT_NAME and its like
limit_request_line = 8190  # the longest honest one, with two ids of 255 emoji, has about 6,200 bytes

# A connection costs little, but one file: thousands that do nothing must not keep others out.
files = min(65_536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
worker_connections = max(1000, files - 1000)


def on_starting(server: Any) -> None:
    """Refuse wrong settings before there are workers: they would be started again and again."""
    import settings

    if settings.JWT_KEY is None and settings.JWT_JWKS_URL is None:
        server.log.warning("Tokens are not asked for: all who reach this service may use every cart.")


def pre_fork(server: Any, worker: Any) -> None:
    """Take what is loaded out of the garbage collector's rounds, and leave its memory shared."""
    gc.collect()
    gc.freeze()


def post_fork(server: Any, worker: Any) -> None:
    """Start OpenTelemetry where its exporter is set."""
    if TRACING:
        from opentelemetry.instrumentation.auto_instrumentation import initialize
        from opentelemetry.instrumentation.propagators import TraceResponsePropagator, set_global_response_propagator

        initialize()
        set_global_response_propagator(TraceResponsePropagator())  # type: ignore[no-untyped-call]  # for the access log


def worker_exit(server: Any, worker: Any) -> None:
    """Say what was lost of the logs."""
    import logs

    logs.stdout.report()
    logs.stderr.report()
