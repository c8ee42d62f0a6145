"""The logs: one JSON object a line. No request fails or waits for their reader: what it does not take is counted."""

import io
import logging
import os
import select
import stat
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
from gevent.monkey import get_original
from gunicorn.instrument.statsd import Statsd

MAX_LINE = 4096  # bytes that a pipe takes whole or not at all (PIPE_BUF)


class Stream(io.TextIOBase):
    """A standard stream that loses and counts the lines that cannot be written at once."""

    def __init__(self, file: int, name: str) -> None:
        self.name, self.file, self.lost = name, file, 0
        if stat.S_ISFIFO(os.fstat(file).st_mode):
            with suppress(OSError):  # not to wait must not be set for others who have the pipe
                self.file = os.open(f"/dev/fd/{file}", os.O_WRONLY | os.O_NONBLOCK)
        self.poll = get_original("select", "poll")()
        self.poll.register(self.file, select.POLLOUT)

    def fileno(self) -> int:
        return self.file

    def put(self, text: str) -> bool:
        """Write a text if that is possible without waiting, and tell whether it was."""
        data = text.encode(errors="replace")
        try:
            return bool(self.poll.poll(0)) and os.write(self.file, data) == len(data)
        except OSError:
            return False

    def write(self, text: str) -> int:
        if not self.put(text):
            if not self.lost:
                stderr.put(line("WARNING", f"{self.name} takes no more lines. They are counted."))
            self.lost += 1
        elif self.lost:
            self.report()
        return len(text)

    def report(self) -> None:
        """Say how many lines were lost since the last report."""
        if self.lost and stderr.put(line("WARNING", f"{self.lost} lines of {self.name} were lost.")):
            self.lost = 0


def line(level: str, message: str, traceback: str = "", **others: object) -> str:
    """Return a line of the error log. Of what is too long it keeps the message's start and the traceback's end."""
    for length in (2000, 300):
        entry = {"time": datetime.now(UTC), "level": level, "message": message[:length], **others}
        if traceback:
            entry["traceback"] = traceback[-length:]
        data = orjson.dumps(entry, default=str, option=orjson.OPT_APPEND_NEWLINE)
        if len(data) <= MAX_LINE:
            break
    return data.decode()


def trace_id() -> str | None:
    """Return the id of the trace that OpenTelemetry records for the request, if it does."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry.trace import format_trace_id, get_current_span

    context = get_current_span().get_span_context()
    return format_trace_id(context.trace_id) if context.is_valid else None


class Formatter(logging.Formatter):
    """Makes a line of the error log of a record."""

    def format(self, record: logging.LogRecord) -> str:
        traceback = self.formatException(record.exc_info) if record.exc_info else ""
        others = {"logger": record.name, "pid": record.process}
        if request_id := getattr(record, "request_id", None):
            others |= {"request_id": request_id, "trace_id": trace_id()}
        return line(record.levelname, record.getMessage(), traceback, **others).rstrip()


class Logger(Statsd):
    """gunicorn's logger, with its metrics where --statsd-host is set."""

    error_fmt = "%(message)s"

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        sys.stdout, sys.stderr = stdout, stderr
        handler = logging.StreamHandler(stderr)
        handler.setFormatter(Formatter())
        self.error_log.handlers = logging.getLogger().handlers = [handler]
        logging.captureWarnings(True)

    def access(self, resp: Any, req: Any, environ: Any, request_time: timedelta) -> None:
        """Write a line of the access log, without headers and query, where tokens are."""
        headers = {name.lower(): value for name, value in resp.headers}
        entry = {
            "time": datetime.now(UTC),
            "client": environ.get("REMOTE_ADDR"),
            "request_id": headers.get("x-request-id"),
            "trace_id": headers.get("traceresponse", "--").split("-")[1] or None,  # as W3C's Trace Context has it
            "method": req.method,
            "path": (req.path or "")[:1024],
            "status": int(resp.status.split()[0]),
            "duration_ms": round(request_time.total_seconds() * 1000, 3),
            "bytes": resp.sent,
        }
        stdout.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE).decode())
        if self.sock:
            super().access(resp, req, environ, request_time)


stdout, stderr = Stream(1, "stdout"), Stream(2, "stderr")
