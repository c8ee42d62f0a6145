"""The logs: one JSON object a line, below 4,096 bytes. No request fails or waits for their reader."""

import io
import json
import logging
import os
import select
import stat
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from gevent.monkey import get_original
from gunicorn.instrument.statsd import Statsd
from pythonjsonlogger.json import JsonFormatter

MAX_TEXT = 1500  # bytes in JSON of a text; a pipe takes lines below 4,096 bytes whole or not at all (PIPE_BUF)


class Stream(io.TextIOBase):
    """A standard stream that loses what cannot be written at once."""

    def __init__(self, file: int) -> None:
        self.file = file
        mode = os.fstat(file).st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            # O_NONBLOCK is for all who share an open file, so this opens it anew. If that is not allowed, the look
            # before each write must do: a pipe that can be written to has room for a line.
            with suppress(OSError):
                self.file = os.open(f"/dev/fd/{file}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        self.poll = get_original("select", "poll")()
        self.poll.register(self.file, select.POLLOUT)

    def fileno(self) -> int:
        return self.file

    def write(self, text: str) -> int:
        with suppress(OSError):
            if self.poll.poll(0):
                os.write(self.file, text.encode(errors="replace"))
        return len(text)


def shorten(text: str) -> str:
    """Return the start and the end of a text, as much as a line has room for."""
    short, half = text, MAX_TEXT // 2
    while len(json.dumps(short)) > MAX_TEXT:
        half = half * 3 // 4
        short = f"{text[:half]} ... {text[-half:]}"
    return short


def trace_id() -> str | None:
    """Return the id of the trace that OpenTelemetry records at the moment, if it does."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry.trace import format_trace_id, get_current_span

    context = get_current_span().get_span_context()
    return format_trace_id(context.trace_id) if context.is_valid else None


class Formatter(JsonFormatter):
    """Makes a line of the error log of a record."""

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        shortened = {name: shorten(value) if isinstance(value, str) else value for name, value in log_data.items()}
        return {**shortened, "trace_id": trace_id()}


class Logger(Statsd):
    """gunicorn's logger, with its metrics if --statsd-host is set."""

    error_fmt = "%(message)s"

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        sys.stdout, sys.stderr = stdout, stderr
        handler = logging.StreamHandler(stderr)
        names = {"levelname": "level", "name": "logger", "process": "pid", "exc_info": "traceback"}
        handler.setFormatter(
            Formatter(["levelname", "message", "name", "process"], rename_fields=names, timestamp="time")
        )
        self.error_log.handlers = logging.getLogger().handlers = [handler]
        logging.captureWarnings(True)

    def access(self, resp: Any, req: Any, environ: Any, request_time: timedelta) -> None:
        """Write a line of the access log, without headers and query, which may have tokens."""
        headers = {name.lower(): value for name, value in resp.headers}
        entry = {
            "time": datetime.now(UTC),
            "client": environ.get("REMOTE_ADDR"),
            "request_id": environ.get("HTTP_X_REQUEST_ID"),
            "trace_id": headers.get("traceresponse", "--").split("-")[1] or None,  # as in W3C's Trace Context
            "method": req.method,
            "path": (req.path or "")[:1024],
            "status": int(resp.status.split()[0]),
            "duration_ms": round(request_time.total_seconds() * 1000, 3),
            "bytes": resp.sent,
        }
        stdout.write(f"{msgspec.json.encode(entry).decode()}\n")
        if self.sock:
            super().access(resp, req, environ, request_time)


stdout, stderr = Stream(1), Stream(2)
