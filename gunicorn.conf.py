"""How the service is served: `gunicorn cart:app` finds this file by itself. WEB_CONCURRENCY sets the workers."""

from gevent import monkey

monkey.patch_all()

import gc
import os
import resource
import sys
from typing import Any

import settings  # a wrong one ends the start here, before there are workers

os.environ.setdefault("OTEL_EXPORTER_OTLP_TIMEOUT", "3")  # seconds that a worker that stops waits for a collector
TRACING = any(name in os.environ for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))
if TRACING:
    try:
        import opentelemetry.instrumentation.auto_instrumentation as opentelemetry
        from opentelemetry.instrumentation import propagators
    except ImportError:
        sys.exit(
            "cart: OTEL_EXPORTER_OTLP_ENDPOINT is set, and needs `pip install opentelemetry-distro` and an exporter."
        )

workers = settings.WORKERS
bind = "0.0.0.0:8080"
worker_class = "clients.Worker"
logger_class = "logs.Logger"
preload_app = not TRACING  # the workers share what is loaded; OpenTelemetry must start in each of them
keepalive = 75  # seconds; a proxy must keep a connection for less (nginx: 60), or it would send into one that closes
graceful_timeout = 12  # seconds of the master; the workers' is clients.STOP_TIMEOUT, and 3 for their last traces
control_socket_disable = True
forwarded_allow_ips = ""  # no client sets SCRIPT_NAME and its like
limit_request_line = 8190  # the longest honest one, with two ids of 255 emoji, has about 6,200 bytes
sendfile = False  # it would overtake what Client.sendall keeps

# A connection costs one file and 18 KiB: thousands that do nothing must not keep others out, nor fill the memory.
_, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
files = 32_768 if hard_limit == resource.RLIM_INFINITY else min(hard_limit, 32_768)
resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard_limit))
worker_connections = max(1000, files - 1000)


def on_starting(server: Any) -> None:
    """Warn if the carts are open to all."""
    if settings.JWT_KEY is None and settings.JWT_JWKS_URL is None:
        server.log.warning("Tokens are not asked for: all who reach this service may use every cart.")


def pre_fork(server: Any, worker: Any) -> None:
    """Take what is loaded out of the garbage collector's rounds, and leave its memory shared."""
    gc.collect()
    gc.freeze()


def post_fork(server: Any, worker: Any) -> None:
    """Start OpenTelemetry if its exporter is set."""
    if TRACING:
        opentelemetry.initialize()
        # For the access log.
        propagators.set_global_response_propagator(propagators.TraceResponsePropagator())  # type: ignore[no-untyped-call]
