"""The cart's behaviour in the process, on a real PostgreSQL loaded from schema.sql."""

import contextlib
import hmac
import re
import time
from base64 import urlsafe_b64encode
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psycopg2
import pytest
import sqlalchemy as sa
import yaml
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from flask.testing import FlaskClient
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from werkzeug.test import Client, TestResponse

import cart
from conftest import EMPTY, SECRET, URL, add, assert_problem, execute, path, token

MAX = 2147483647


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
    assert_problem(client.get(path("ada")), 404, "Not Found", EMPTY)


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

    assert_problem(response, 409, "Conflict", "quantity would bring the line's total above 2147483647.")
    assert client.get(path("ada")).get_json() == [{"product_id": "sku-1", "quantity": MAX}]


def test_a_cart_is_ordered_by_the_code_points_of_its_products(client: FlaskClient) -> None:
    products = ["a", "B", "b", "A", "é", "-", "10", "9", "😀", "\uffff"]
    for product_id in products:
        add(client, "ada", product_id, 1)

    response = client.get(path("ada"))

    assert response.status_code == 200
    assert response.get_json() == [{"product_id": product_id, "quantity": 1} for product_id in sorted(products)]


def test_an_empty_cart_is_not_found(client: FlaskClient) -> None:
    assert_problem(client.get(path("ada")), 404, "Not Found", EMPTY)
    assert_problem(client.delete(path("ada")), 404, "Not Found", EMPTY)


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
    assert_problem(again, 404, "Not Found", "No such cart item found for this user")
    assert client.get(path("ada")).get_json() == [{"product_id": "sku-1", "quantity": 1}]


def test_healthz_answers_ok(client: FlaskClient) -> None:
    response = client.get("/healthz")

    assert response.status_code == 200
    assert response.get_json() == {"status": "ok"}


# Refusals

OBJECT = "A change must be an object with product_id and quantity."
PRODUCT = "product_id must be a text of 1 to 255 characters, none of them NUL."
QUANTITY = "quantity must be a whole number from -2147483648 to 2147483647 other than 0."
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
    "empty list": (b"[]", 422, "The list must have 1 to 500 lines."),
    "list of 501": (
        b"[" + b",".join([b'{"product_id": "p", "quantity": 1}'] * 501) + b"]",
        422,
        "The list must have 1 to 500 lines.",
    ),
    "list in a list": (b'[{"product_id": "p", "quantity": 1}, []]', 422, f"Line 2: {OBJECT}"),
    "bad product_id in a list": (b'[{"product_id": "", "quantity": 1}]', 422, f"Line 1: {PRODUCT}"),
    "bad quantity in a list": (
        b'[{"product_id": "p", "quantity": 1}, {"product_id": "p", "quantity": 1}, {"product_id": "p", "quantity": 0}]',
        422,
        f"Line 3: {QUANTITY}",
    ),
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

    assert_problem(response, status, {400: "Bad Request", 422: "Unprocessable Entity"}[status], detail)
    assert execute("SELECT * FROM cart_items") == []


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_is_not_said_to_be_json_is_refused(client: FlaskClient, content_type: str | None) -> None:
    response = client.post(path("ada"), data=b'{"product_id": "p", "quantity": 1}', content_type=content_type)

    assert_problem(response, 415, "Unsupported Media Type", "The body must be application/json.")
    assert execute("SELECT * FROM cart_items") == []


@pytest.mark.parametrize(("size", "status"), [(2 * 1024 * 1024, 200), (2 * 1024 * 1024 + 1, 413)])
def test_a_body_is_at_most_2_mib(client: FlaskClient, size: int, status: int) -> None:
    body = b'{"product_id": "p", "quantity": 1}'.ljust(size)

    response = client.post(path("ada"), data=body, content_type="application/json")

    assert response.status_code == status
    if status == 413:
        assert_problem(response, 413, "Request Entity Too Large")


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
    assert_problem(client.get(url), 404, "Not Found")
    assert_problem(client.post(url, json={"product_id": "p", "quantity": 1}), 404, "Not Found")


@pytest.mark.parametrize(
    ("url", "allowed"), [(path("ada"), "DELETE GET HEAD OPTIONS POST"), ("/healthz", "GET HEAD OPTIONS")]
)
def test_another_method_is_told_which_are_allowed(client: FlaskClient, url: str, allowed: str) -> None:
    response = client.put(url)

    assert_problem(response, 405, "Method Not Allowed")
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

    assert_problem(response, status, {400: "Bad Request", 422: "Unprocessable Entity"}[status])
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


def test_init_db_says_what_it_did_and_may_be_repeated(client: FlaskClient) -> None:
    add(client, "ada", "sku-1", 1)

    for _ in range(2):
        result = cart.app.test_cli_runner().invoke(args=["init-db"])
        assert (result.exit_code, result.output) == (0, "The database has the tables and functions of this version.\n")

    assert execute("SELECT quantity FROM cart_items") == [(1,)]


VERSION_1 = """
    DROP TABLE cart_items, idempotency_keys;
    CREATE TABLE cart_items (
        user_id text COLLATE "C" NOT NULL, product_id text COLLATE "C" NOT NULL, quantity integer NOT NULL,
        CONSTRAINT cart_items_pkey PRIMARY KEY (user_id, product_id)
    );
    CREATE TABLE idempotency_keys (
        user_id text COLLATE "C" NOT NULL, key text COLLATE "C" NOT NULL,
        product_id text COLLATE "C" NOT NULL, change integer NOT NULL, quantity integer NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT idempotency_keys_pkey PRIMARY KEY (user_id, key),
        CONSTRAINT idempotency_keys_product_id_length CHECK (char_length(product_id) BETWEEN 1 AND 255),
        CONSTRAINT idempotency_keys_change_not_zero CHECK (change <> 0),
        CONSTRAINT idempotency_keys_quantity_not_negative CHECK (quantity >= 0)
    );
    CREATE INDEX idempotency_keys_created_at ON idempotency_keys (created_at);
    INSERT INTO cart_items VALUES ('ada', 'p', 5);
"""


def test_init_db_upgrades_a_database_of_version_1_with_its_carts_and_keys(client: FlaskClient) -> None:
    odd = "".join(map(chr, range(1, 128))) + "é\u2028😀/"
    try:
        execute(VERSION_1)
        execute("INSERT INTO idempotency_keys VALUES ('ada', 'k', %(product)s, 2, 7)", product=odd)
        assert client.get("/healthz").status_code == 503
    finally:
        assert cart.app.test_cli_runner().invoke(args=["init-db"]).exit_code == 0

    assert client.get("/healthz").status_code == 200
    assert client.get(path("ada")).get_json() == [{"product_id": "p", "quantity": 5}]
    again = add(client, "ada", odd, 2, **{"Idempotency-Key": "k"})
    assert again.get_json() == {"user_id": "ada", "product_id": odd, "quantity": 7}
    assert add(client, "ada", odd, 3, **{"Idempotency-Key": "k"}).status_code == 422
    test_the_model_is_the_schema()


@pytest.mark.parametrize("table", ["cart_items", "idempotency_keys"])
@pytest.mark.parametrize("right", ["SELECT", "INSERT", "UPDATE", "DELETE"])
def test_healthz_is_503_where_a_right_is_missing(client: FlaskClient, table: str, right: str) -> None:
    execute(f"""
        CREATE ROLE shop; GRANT SELECT, INSERT, UPDATE, DELETE ON cart_items, idempotency_keys TO shop;
        REVOKE {right} ON {table} FROM shop
    """)
    try:
        with cart.engine.connect() as connection:  # the connection that the pool hands out next
            connection.exec_driver_sql("SET SESSION AUTHORIZATION shop")
        assert client.get("/healthz").status_code == 503
        execute(f"GRANT {right} ON {table} TO shop")
        assert client.get("/healthz").status_code == 200
    finally:
        cart.engine.dispose()
        execute("DROP OWNED BY shop; DROP ROLE shop")


@pytest.mark.parametrize("setting", ["default_transaction_read_only=on", "search_path=nowhere"])
def test_healthz_is_503_where_the_carts_cannot_be_used(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(cart, "DATABASE", {**cart.DATABASE, "options": f"-c {setting}"})
        cart.engine.dispose()
        assert_problem(client.get("/healthz"), 503, "Service Unavailable")

    cart.engine.dispose()
    assert client.get("/healthz").status_code == 200


def test_connections_that_a_migration_has_outdated_are_replaced(client: FlaskClient) -> None:
    def use(_: int) -> set[int]:
        codes = set()
        while time.monotonic() < end:
            user = cart.app.test_client()
            codes |= {add(user, "ada", "p", 1).status_code, user.get(path("ada")).status_code}
        return codes

    end = time.monotonic() + 1.5
    with ThreadPoolExecutor(8) as pool:
        codes = pool.map(use, range(8))
        try:
            time.sleep(0.5)
            execute("ALTER TABLE cart_items ALTER quantity TYPE bigint")
            assert set.union(*codes) == {200}
        finally:
            execute("ALTER TABLE cart_items ALTER quantity TYPE integer")


@pytest.mark.parametrize("key", [{}, {"Idempotency-Key": "k"}], ids=["no key", "key"])
def test_a_connection_to_a_server_that_only_reads_is_replaced(client: FlaskClient, key: dict[str, str]) -> None:
    for total in (1, 2):
        with cart.engine.connect() as connection:  # the one that the pool hands out next
            connection.exec_driver_sql("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
        assert add(client, "ada", "p", 1, **key).get_json()["quantity"] == (1 if key else total)


def test_a_change_of_a_line_is_a_hot_update() -> None:
    line = {"user_id": "ada", "product_id": "p", "quantity": 1}
    lines = {"user_id": "ada", "product_ids": ["p", "q", "p"], "quantities": [3, 1, -1], "key": None, "request": None}
    with contextlib.closing(psycopg2.connect(URL)) as connection, connection.cursor() as cursor:
        for _ in range(5):
            cursor.execute(cart.ADD_LINE.text, line)
            cursor.execute(cart.CHANGE_LINES.text, lines)
        for counted in ("updated", "hot_updated"):
            cursor.execute(f"SELECT pg_stat_get_xact_tuples_{counted}('cart_items'::regclass)")
            assert cursor.fetchone() == (18,)


def test_the_statements_also_run_as_text(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def connected(connection: Any, record: Any) -> None:
        record.info["prepared"] = None  # as behind PgBouncer

    cart.engine.dispose()
    sa.event.listen(cart.engine, "connect", connected)
    try:
        add(client, "ada", "p", 2)
        for _ in range(2):
            assert add(client, "ada", "'%s", 3, **{"Idempotency-Key": "k"}).get_json()["quantity"] == 3
        assert client.post(path("ada"), json=[{"product_id": "p", "quantity": -1}]).get_json()[0]["quantity"] == 1
        assert [line["quantity"] for line in client.get(path("ada")).get_json()] == [3, 1]
        assert client.delete(path("ada"), query_string={"product_id": "p"}).status_code == 200
        assert client.delete(path("ada")).status_code == 200
        assert client.get("/healthz").status_code == 200
        assert execute("SELECT count(*) FROM pg_prepared_statements") == [(0,)]
    finally:
        sa.event.remove(cart.engine, "connect", connected)
        cart.engine.dispose()


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
    assert_problem(client.get(path("ada")), 404, "Not Found", EMPTY)


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
            assert_problem(response, 409, "Conflict")
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
                assert_problem(response, 404, "Not Found", EMPTY)


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

    assert_problem(response, 422, "Unprocessable Entity", "Idempotency-Key was used with another body.")
    assert client.get(path("ada")).get_json() == [{"product_id": "p", "quantity": 2}]


def test_a_key_belongs_to_its_user(client: FlaskClient) -> None:
    add(client, "ada", "p", 2, **{"Idempotency-Key": "k"})

    response = add(client, "bob", "q", 7, **{"Idempotency-Key": "k"})

    assert response.get_json() == {"user_id": "bob", "product_id": "q", "quantity": 7}


def test_a_refused_add_leaves_its_key_unused(client: FlaskClient) -> None:
    add(client, "ada", "p", MAX)
    assert_problem(add(client, "ada", "p", 1, **{"Idempotency-Key": "k"}), 409, "Conflict")
    assert_problem(add(client, "ada", "p", 0, **{"Idempotency-Key": "k"}), 422, "Unprocessable Entity")

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


def test_a_key_counts_for_a_day(client: FlaskClient) -> None:
    for age, total in [("0", 1), ("23 hours 59 minutes", 1), ("24 hours 1 minute", 2), ("0", 2)]:
        execute("UPDATE idempotency_keys SET created_at = now() - %(age)s::interval", age=age)
        assert add(client, "ada", "p", 1, **{"Idempotency-Key": "k"}).get_json()["quantity"] == total


# Lists


def change(client: FlaskClient, user_id: str, *changes: tuple[str, int], **headers: str) -> Any:
    lines = [{"product_id": product_id, "quantity": quantity} for product_id, quantity in changes]
    return client.post(path(user_id), json=lines, headers=headers)


def totals(response: Any) -> list[tuple[str, int]]:
    assert response.status_code == 200
    assert all(line.keys() == {"product_id", "quantity"} for line in response.get_json())
    return [(line["product_id"], line["quantity"]) for line in response.get_json()]


def test_a_list_answers_with_each_lines_total_in_the_order_sent(client: FlaskClient) -> None:
    add(client, "ada", "b", 5)

    response = change(client, "ada", ("b", -1), ("a", 2), ("c", -1), ("a", 3), ("b", -9), ("b", 2))

    assert totals(response) == [("b", 4), ("a", 2), ("c", 0), ("a", 5), ("b", 0), ("b", 2)]
    assert totals(client.get(path("ada"))) == [("a", 5), ("b", 2)]


def test_a_list_of_one_gets_a_list_of_one(client: FlaskClient) -> None:
    assert totals(change(client, "ada", ("a", 2))) == [("a", 2)]
    assert totals(change(client, "ada", ("a", -5))) == [("a", 0)]


@pytest.mark.parametrize(
    ("changes", "place"), [([("a", 1), ("b", 1)], 2), ([("b", 1)], 1), ([("c", MAX), ("c", 1)], 2)]
)
def test_a_list_with_a_total_that_is_too_large_changes_nothing(
    client: FlaskClient, changes: list[tuple[str, int]], place: int
) -> None:
    add(client, "ada", "b", MAX)

    response = change(client, "ada", *changes)

    detail = f"Line {place}: quantity would bring the line's total above 2147483647."
    assert_problem(response, 409, "Conflict", detail)
    assert totals(client.get(path("ada"))) == [("b", MAX)]


@pytest.mark.parametrize(
    "product_id", ["{:04}", "{:04}" + "\x01" * 251, "{:04}" + "😀" * 251], ids=["short", "escaped", "long"]
)
def test_every_cart_can_be_posted_as_it_came(client: FlaskClient, product_id: str) -> None:
    lines = [(product_id.format(n), n) for n in range(1, 501)]
    assert totals(change(client, "ada", *lines)) == lines

    sent = client.post(path("bob"), data=client.get(path("ada")).data, content_type="application/json")

    assert totals(sent) == totals(client.get(path("bob"))) == lines


def test_a_list_with_a_key_counts_once(client: FlaskClient) -> None:
    key = {"Idempotency-Key": "k"}
    first = change(client, "ada", ("a", 2), ("b", 1), **key)
    add(client, "ada", "a", 5)
    again = change(client, "ada", ("a", 2), ("b", 1), **key)

    assert totals(first) == totals(again) == [("a", 2), ("b", 1)]
    for others in ([("b", 1), ("a", 2)], [("a", 2)], [("a", 2), ("b", 1), ("b", 1)]):
        refused = change(client, "ada", *others, **key)
        assert_problem(refused, 422, "Unprocessable Entity", "Idempotency-Key was used with another body.")
    assert totals(client.get(path("ada"))) == [("a", 7), ("b", 1)]


def test_one_change_and_a_list_of_it_are_different_bodies(client: FlaskClient) -> None:
    add(client, "ada", "a", 2, **{"Idempotency-Key": "k"})
    assert change(client, "ada", ("a", 2), **{"Idempotency-Key": "k"}).status_code == 422


def test_racing_lists_never_deadlock_and_are_never_seen_by_half(client: FlaskClient) -> None:
    def use(turn: int) -> None:
        user = cart.app.test_client()
        for step in range(25):
            products = [("a", 1), ("b", 1), ("c", 1)] if (turn + step) % 2 else [("c", 1), ("b", 1), ("a", 1)]
            assert change(user, "ada", *products).status_code == 200
            if turn < 4:
                assert user.delete(path("ada")).status_code in (200, 404)
            seen = user.get(path("ada"))
            assert seen.status_code == 404 or len({line["quantity"] for line in seen.get_json()}) == 1
            assert seen.status_code == 404 or len(seen.get_json()) == 3

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(use, range(16)))


def test_emptying_takes_all_of_a_list_that_is_under_way(client: FlaskClient) -> None:
    add(client, "ada", "a", 1)
    with contextlib.closing(psycopg2.connect(URL)) as connection, ThreadPoolExecutor(1) as pool:
        connection.cursor().execute("SELECT change_cart('ada', '{a,b}', '{1,1}', 500, NULL, NULL)")
        emptied = pool.submit(client.delete, path("ada"))
        time.sleep(0.3)
        connection.commit()
        assert emptied.result().status_code == 200

    assert client.get(path("ada")).status_code == 404


def test_racing_retries_of_a_list_count_once(client: FlaskClient) -> None:
    with ThreadPoolExecutor(24) as pool:
        send = lambda _: totals(change(cart.app.test_client(), "ada", ("a", 2), ("b", 3), **{"Idempotency-Key": "k"}))  # noqa: E731
        answers = list(pool.map(send, range(24)))

    assert answers == [[("a", 2), ("b", 3)]] * 24
    assert totals(client.get(path("ada"))) == [("a", 2), ("b", 3)]


def test_a_guests_cart_is_merged_at_login_while_both_are_used(client: FlaskClient) -> None:
    def shop(user_id: str) -> int:
        return sum(add(cart.app.test_client(), user_id, f"p{turn % 5}", 1).status_code == 200 for turn in range(60))

    def log_in(_: int) -> None:
        user = cart.app.test_client()
        guests = user.get(path("guest"))
        if guests.status_code == 200:
            merged = user.post(path("ada"), data=guests.data, content_type="application/json", headers=key)
            assert merged.status_code in (200, 422)  # 422: the other try of this login was faster, with another cart

    key = {"Idempotency-Key": "login-1"}
    assert shop("guest") == 60
    with ThreadPoolExecutor(16) as pool:
        added = pool.map(shop, ["ada"] * 4)
        list(pool.map(log_in, range(8)))
        assert sum(added) == 240
    client.delete(path("guest"))

    assert sum(quantity for _, quantity in totals(client.get(path("ada")))) == 300


def test_a_checkout_takes_what_was_ordered_and_leaves_what_was_added_meanwhile(client: FlaskClient) -> None:
    def shop(turn: int) -> int:
        user = cart.app.test_client()
        return sum(add(user, "ada", f"p{step % 7}", 1).status_code == 200 for step in range(40))

    def check_out(order: int) -> int:
        user = cart.app.test_client()
        read = user.get(path("ada"))
        if read.status_code == 404:
            return 0
        taken = [(product_id, -quantity) for product_id, quantity in totals(read)]
        for _ in range(2):  # a retry
            assert change(user, "ada", *taken, **{"Idempotency-Key": f"order-{order}"}).status_code == 200
        return -sum(quantity for _, quantity in taken)

    with ThreadPoolExecutor(9) as pool:
        added = pool.map(shop, range(8))
        ordered = sum(check_out(order) for order in range(20))
        left = client.get(path("ada"))
        assert sum(added) == 320
    left = client.get(path("ada"))

    assert ordered + (sum(quantity for _, quantity in totals(left)) if left.status_code == 200 else 0) == 320


# A cart's bound

FULL = "The cart is full: 500 lines."


def fill(client: FlaskClient, **headers: str) -> None:
    assert change(client, "ada", *((f"{n:03}", 2) for n in range(500)), **headers).status_code == 200


def test_a_cart_holds_500_lines(client: FlaskClient) -> None:
    fill(client)

    assert_problem(add(client, "ada", "new", 1), 409, "Conflict", FULL)
    assert_problem(add(client, "ada", "new", 1, **{"Idempotency-Key": "k"}), 409, "Conflict", FULL)
    assert_problem(change(client, "ada", ("001", 1), ("new", 1)), 409, "Conflict", f"Line 2: {FULL}")
    assert len(client.get(path("ada")).get_json()) == 500
    assert execute("SELECT DISTINCT quantity FROM cart_items") == [(2,)]


def test_the_lines_of_a_full_cart_change(client: FlaskClient) -> None:
    fill(client)

    assert add(client, "ada", "001", 3).get_json()["quantity"] == 5
    assert totals(change(client, "ada", ("002", 1), ("nothing", -1))) == [("002", 3), ("nothing", 0)]
    assert totals(change(client, "ada", ("003", -2), ("new", 1))) == [("003", 0), ("new", 1)]
    assert change(client, "ada", ("newer", 1), ("004", -2)).status_code == 409
    assert client.delete(path("ada"), query_string={"product_id": "004"}).status_code == 200
    assert totals(change(client, "ada", ("newer", 1), ("newer", -1), ("newest", 1))) == [
        ("newer", 1),
        ("newer", 0),
        ("newest", 1),
    ]


def test_racing_adds_overstep_the_bound_by_no_more_than_are_under_way(client: FlaskClient) -> None:
    assert change(client, "ada", *((f"{n:03}", 1) for n in range(490))).status_code == 200
    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(lambda n: add(cart.app.test_client(), "ada", f"new {n}", 1).status_code, range(80)))

    assert set(codes) == {200, 409}
    assert 500 <= execute("SELECT count(*) FROM cart_items")[0][0] == 490 + codes.count(200) < 508


# Carts that end


def age(user_id: str, product_id: str, days: int) -> None:
    execute(
        "UPDATE cart_items SET updated_at = now() - make_interval(days => %(days)s)"
        " WHERE user_id = %(user_id)s AND product_id = %(product_id)s",
        days=days, user_id=user_id, product_id=product_id,
    )  # fmt: skip


def expire(days: int) -> str:
    result = cart.app.test_cli_runner().invoke(args=["expire", "--days", str(days)])
    assert result.exit_code == 0
    return result.stdout


def test_carts_that_nobody_changed_are_removed_whole(client: FlaskClient) -> None:
    execute("""
        INSERT INTO cart_items SELECT 'user ' || n, unnest('{p,q}'::text[]), 1, now() - interval '8 days'
        FROM generate_series(1, 401) n
    """)
    for user_id in ("ada", "bob"):
        change(client, user_id, ("p", 1), ("q", 1))
        age(user_id, "p", 8)
    age("bob", "q", 6)

    assert expire(7) == "Removed 401 carts and 0 idempotency keys.\n"

    assert execute("SELECT DISTINCT user_id FROM cart_items ORDER BY 1") == [("ada",), ("bob",)]
    assert expire(7) == "Removed 0 carts and 0 idempotency keys.\n"


@pytest.mark.parametrize("by", ["adding", "taking", "a list"])
def test_every_change_of_a_line_keeps_its_cart(client: FlaskClient, by: str) -> None:
    change(client, "ada", ("p", 5), ("q", 1))
    for product_id in "pq":
        age("ada", product_id, 9)

    if by == "a list":
        change(client, "ada", ("p", 1), ("r", -1))
    else:
        add(client, "ada", "p", {"adding": 1, "taking": -1}[by])

    assert expire(8).startswith("Removed 0 carts")


def test_a_cart_that_is_in_use_is_left_for_the_next_time(client: FlaskClient) -> None:
    for user_id in ("ada", "bob"):
        add(client, user_id, "p", 1)
        age(user_id, "p", 9)
    with contextlib.closing(psycopg2.connect(URL)) as connection, connection:
        connection.cursor().execute("SELECT FROM cart_items WHERE user_id = 'ada' FOR UPDATE")
        assert expire(8).startswith("Removed 1 carts")

    assert expire(8).startswith("Removed 1 carts")


def test_keys_that_count_no_longer_are_removed_unless_they_are_in_use(client: FlaskClient) -> None:
    for n in range(3):
        add(client, f"user {n}", "p", 1, **{"Idempotency-Key": "k"})
    execute("UPDATE idempotency_keys SET created_at = now() - interval '24 hours 1 minute' WHERE user_id <> 'user 0'")
    with contextlib.closing(psycopg2.connect(URL)) as connection, connection:
        connection.cursor().execute("SELECT FROM idempotency_keys WHERE user_id = 'user 1' FOR UPDATE")
        assert expire(8) == "Removed 0 carts and 1 idempotency keys.\n"

    assert execute("SELECT user_id FROM idempotency_keys ORDER BY 1") == [("user 0",), ("user 1",)]


@pytest.mark.parametrize("days", [[], ["--days", "0"], ["--days", "3651"], ["--days", "x"]])
def test_expire_needs_days_from_1_to_3650(days: list[str]) -> None:
    assert cart.app.test_cli_runner().invoke(args=["expire", *days]).exit_code == 2


@pytest.mark.parametrize("command", [["init-db"], ["expire", "--days", "1"]])
def test_an_error_of_a_command_is_one_line(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.setattr(cart, "DATABASE", {"host": "127.0.0.1", "port": "1", "user": "u", "password": "hunter2"})

    result = cart.app.test_cli_runner().invoke(args=command)

    assert result.exit_code == 1
    assert result.stderr.startswith("Error: connection to server at") and result.stderr.count("\n") == 1
    assert "hunter2" not in result.output


# The page


def fetch(client: FlaskClient, url: str) -> TestResponse:
    response = client.get(url)
    response.get_data()
    response.close()  # the file that it came from
    return response


def test_the_page_shows_the_contract_with_nothing_from_elsewhere(client: FlaskClient) -> None:
    page, contract = fetch(client, "/docs"), fetch(client, "/openapi.yaml")

    assert page.status_code == 200 and '"url": "/openapi.yaml"' in page.text
    links = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert links and {fetch(client, link).status_code for link in links} == {200}
    assert contract.content_type == "application/yaml"
    assert contract.data == Path(cart.app.root_path, "openapi.yaml").read_bytes()


def test_the_examples_of_refusals_are_what_is_answered(guarded: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(user_id: str = "ada", claims: dict[str, Any] | None = None, **options: Any) -> None:
        headers = {**token(**{"aud": "carts", **(claims or {})}), **options.pop("headers", {})}
        options = {"content_type": "application/json", **options}
        answers.append(guarded.open(f"/cart/users/{user_id}", headers=headers, **options).get_json())

    answers: list[Any] = []
    post: dict[str, Any] = {"method": "POST"}
    line = {"product_id": "p", "quantity": 1}
    answer(**post, data=b'{"product_id": "p"')
    answer(**post, environ_overrides={"CONTENT_LENGTH": "9"}, data=b"{}")
    answer(user_id="%ff")
    answer(method="DELETE", query_string="product_id=%ff")
    answer(**post, json=line, headers={"Idempotency-Key": ""})
    answer(headers={"Authorization": "Basic eA=="})
    answer(claims={"exp": 1})
    answer(claims={"nbf": time.time() + 60})
    answer(claims={"aud": "else"})
    answer(claims={"sub": "bob"})
    answer()
    answer(method="DELETE", query_string="product_id=p")
    fill(guarded, **token(aud="carts"))
    answer(**post, json={"product_id": "001", "quantity": MAX})
    answer(**post, json=line)
    answer(**post, json=[{"product_id": "001", "quantity": 1}, line])
    answer(**post, data=b" " * (2 * 1024 * 1024 + 1))
    answer(**post, data=b"{}", content_type="text/plain")
    answer(**post, json="p")
    answer(**post, json={"product_id": "", "quantity": 1})
    answer(user_id="%00")
    answer(**post, json={"product_id": "p", "quantity": 0})
    answer(**post, json=[{"product_id": "001", "quantity": 1}, {"product_id": "p"}])
    answer(**post, json=[])
    for quantity in (1, 2):
        answer(**post, json={"product_id": "001", "quantity": quantity}, headers={"Idempotency-Key": "k"})
    answers.remove({"user_id": "ada", "product_id": "001", "quantity": 3})
    answer(method="DELETE", query_string="product=p")
    monkeypatch.setattr(cart, "run", Mock(side_effect=psycopg2.OperationalError))
    answer()

    contract = yaml.safe_load(Path(cart.app.root_path, "openapi.yaml").read_text())
    documents = [
        response["content"]["application/problem+json"] for response in contract["components"]["responses"].values()
    ]
    assert answers == [example["value"] for document in documents for example in document["examples"].values()]


def test_ids_are_exact_under_a_server_that_hands_on_no_raw_path() -> None:
    def server(environ: dict[str, Any], start_response: Any) -> Any:
        del environ["RAW_URI"], environ["REQUEST_URI"]
        return cart.app(environ, start_response)

    client = Client(server)
    for user_id in ("ada", "a b", "é😀", "%41", "a+b"):
        response = client.post(path(user_id), json={"product_id": "p", "quantity": 1})
        assert response.get_json() == {"user_id": user_id, "product_id": "p", "quantity": 1}
    assert client.get("/", environ_overrides={"PATH_INFO": "/cart/users/\xff"}).status_code == 400
    assert client.get("/cart/users/a/b").status_code == 404


@pytest.mark.parametrize("url", ["/docs", "/docs/", "/openapi.yaml"])
def test_the_page_is_only_read_and_needs_no_token(guarded: FlaskClient, url: str) -> None:
    assert fetch(guarded, url).status_code == 200
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        refused = guarded.open(url, method=method)
        assert_problem(refused, 405, "Method Not Allowed")
        assert sorted(refused.headers["Allow"].split(", ")) == ["GET", "HEAD", "OPTIONS"]


# Tokens


@pytest.fixture
def guarded(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> FlaskClient:
    """A client of the service with JWT_KEY set."""
    monkeypatch.setattr(cart, "JWT_KEY", cart.parse_jwt_key(SECRET))
    monkeypatch.setattr(cart, "JWT_AUDIENCE", "carts")
    return client


@pytest.mark.parametrize(
    "claims",
    [
        {},
        {"sub": "shop", "scope": "x carts:all"},
        {"sub": None, "scope": "carts:all"},
        {"aud": ["x", "carts"]},
        {"nbf": int(time.time()) + 25, "iat": int(time.time()) + 25},
    ],
)
def test_a_token_for_the_user_or_for_all_carts_is_let_in(guarded: FlaskClient, claims: dict[str, Any]) -> None:
    response = add(guarded, "ada", "p", 1, **token(**{"aud": "carts", **claims}))

    assert response.status_code == 200


def test_blanks_after_bearer_do_not_matter(guarded: FlaskClient) -> None:
    header = token(aud="carts")["Authorization"].replace(" ", "  ") + " "
    assert guarded.get(path("ada"), headers={"Authorization": header}).status_code == 404


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


REFUSALS = [
    "Authorization must be a bearer token.",
    *(
        f"The token is {why}."
        for why in ("expired", "not valid yet", "malformed, wrongly signed or not for this service")
    ),
]


@pytest.mark.filterwarnings("ignore::jwt.InsecureKeyLengthWarning")
@pytest.mark.parametrize("headers", BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
def test_without_a_valid_token_no_one_gets_in(guarded: FlaskClient, headers: dict[str, str]) -> None:
    for response in (add(guarded, "ada", "p", 1, **headers), guarded.delete(path("ada"), headers=headers)):
        assert_problem(response, 401, "Unauthorized")
        assert response.headers["WWW-Authenticate"].split()[0] == "Bearer"
        assert response.get_json()["detail"] in REFUSALS
    assert execute("SELECT * FROM cart_items") == []


@pytest.mark.parametrize(
    "claims",
    [
        {"sub": "bob"},
        {"sub": "Ada"},
        {"sub": None},
        {"sub": "b", "scope": ["carts:all"]},
        {"sub": "b", "scope": {"carts:all": 1}},
    ],
)
def test_a_token_for_another_user_is_refused(guarded: FlaskClient, claims: dict[str, Any]) -> None:
    response = guarded.get(path("ada"), headers=token(**{"aud": "carts", **claims}))

    assert_problem(response, 403, "Forbidden", "The token is for another user, and without the scope carts:all.")


def test_healthz_needs_no_token(guarded: FlaskClient) -> None:
    assert guarded.get("/healthz").status_code == 200


def test_a_public_key_verifies_and_is_no_secret(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    private = rsa.generate_private_key(65537, 2048)
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    monkeypatch.setattr(cart, "JWT_ALGORITHM", "RS256")
    monkeypatch.setattr(cart, "JWT_KEY", cart.parse_jwt_key(public.decode()))
    head, body = token()["Authorization"].split()[1].split(".")[:2]
    forged = f"{head}.{body}".encode()
    signature = urlsafe_b64encode(hmac.digest(public, forged, "sha256")).rstrip(b"=").decode()

    assert add(client, "ada", "p", 1, **token(pem, "RS256")).status_code == 200
    assert_problem(
        client.get(path("ada"), headers={"Authorization": f"Bearer {forged.decode()}.{signature}"}), 401, "Unauthorized"
    )

    with pytest.raises(ValueError, match="It is a private key"):
        cart.parse_jwt_key(pem)
