"""The cart's behaviour in the process, on a real PostgreSQL loaded from schema.sql."""

import contextlib
import hmac
import re
import time
from base64 import urlsafe_b64encode
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import Mock

import psycopg2
import pytest
import sqlalchemy as sa
import yaml
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from flask.testing import FlaskClient
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from werkzeug.test import TestResponse

import cart
import database
import settings
import tokens
from conftest import EMPTY, SECRET, URL, add, assert_problem, execute, path, token

MAX = 2147483647
LOCK_ADA = "SELECT pg_advisory_xact_lock(hashtextextended('ada', 0))"


def change(client: FlaskClient, user_id: str, *changes: tuple[str, int], **headers: str) -> Any:
    lines = [{"product_id": product_id, "quantity": quantity} for product_id, quantity in changes]
    return client.post(path(user_id), json=lines, headers=headers)


def totals(response: Any) -> list[tuple[str, int]]:
    assert response.status_code == 200
    assert all(line.keys() == {"product_id", "quantity"} for line in response.get_json())
    return [(line["product_id"], line["quantity"]) for line in response.get_json()]


def close_connections() -> None:
    while cart.database.idle:
        cart.database.idle.pop().connection.close()


@contextlib.contextmanager
def connected(monkeypatch: pytest.MonkeyPatch, **parameters: str) -> Iterator[None]:
    """Have the service connect anew, with other parameters."""
    try:
        with monkeypatch.context() as patched:
            patched.setattr(settings, "DATABASE", {**settings.DATABASE, **parameters})
            close_connections()
            yield
    finally:
        close_connections()


@contextlib.contextmanager
def holding(statement: str) -> Iterator[Any]:
    """Run a statement in a transaction of another client's, which lasts as long as this."""
    with contextlib.closing(psycopg2.connect(URL)) as connection:
        connection.cursor().execute(statement)
        yield connection


def await_waiting(count: int, milliseconds: int = 0) -> None:
    """Wait until so many statements of the service's wait for a lock, and have done so for some time."""
    waiting = """
        SELECT count(*) FROM pg_stat_activity
        WHERE wait_event_type = 'Lock' AND query_start <= now() - make_interval(secs => %(seconds)s)
    """
    for _ in range(100):
        if execute(waiting, seconds=milliseconds / 1000) == [(count,)]:
            return
        time.sleep(0.01)
    pytest.fail(f"{execute(waiting, seconds=0)} statements wait")


def run_on_all_connections(statement: str) -> None:
    """Have the service open all its connections, and run a statement on each."""
    with contextlib.ExitStack() as stack:
        for _ in range(settings.POOL_SIZE):
            stack.enter_context(cart.database.engine.connect()).exec_driver_sql(statement)


@pytest.fixture
def many_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One user has all connections, as with many workers: the database alone keeps changes apart."""
    monkeypatch.setattr(database, "USER_TURNS", settings.POOL_SIZE)


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
    ("segment", "status"),
    [
        ("%ff", 400),
        ("%ed%a0%80", 400),
        ("%ef%bf%bd", 400),
        ("a%00", 422),
        ("x" * 256, 422),
        ("a%2Fb", 404),
        ("%2F", 404),
    ],
)
def test_a_path_that_names_no_user_is_refused(client: FlaskClient, segment: str, status: int) -> None:
    response = client.post(f"/cart/users/{segment}", json={"product_id": "p", "quantity": 1})

    assert_problem(response, status, {400: "Bad Request", 404: "Not Found", 422: "Unprocessable Entity"}[status])
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
    inspector, dialect = sa.inspect(cart.database.engine), cart.database.engine.dialect
    table = cart.CartItem.__table__

    there = {c["name"]: (c["type"].compile(dialect), c["nullable"]) for c in inspector.get_columns(table.name)}

    assert {c.name: (c.type.compile(dialect), c.nullable) for c in table.columns} == there
    assert [c.name for c in table.primary_key] == inspector.get_pk_constraint(table.name)["constrained_columns"]


def test_init_db_says_what_it_did_and_may_be_repeated(client: FlaskClient) -> None:
    add(client, "ada", "sku-1", 1)

    for _ in range(2):
        result = cart.app.test_cli_runner().invoke(args=["init-db"])
        assert (result.exit_code, result.output) == (0, "The database has the tables and functions of this version.\n")

    assert execute("SELECT quantity FROM cart_items") == [(1,)]


@pytest.fixture
def least_privileged(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The service as a role with no more rights than the operator's document gives."""
    [rights] = re.findall(r"```sql\n(.*?)```", Path(cart.app.root_path, "docs/operating.md").read_text(), re.DOTALL)
    execute(rights)
    with connected(monkeypatch, user="shop"):
        yield
    execute("DROP OWNED BY shop; DROP ROLE shop")


@pytest.mark.usefixtures("least_privileged")
def test_four_rights_on_two_tables_are_enough(client: FlaskClient) -> None:
    assert change(client, "ada", ("p", 2), ("q", 1), **{"Idempotency-Key": "k"}).status_code == 200
    assert client.delete(path("ada"), query_string={"product_id": "p"}).status_code == 200
    assert client.get(path("ada")).status_code == client.get("/healthz").status_code == 200


MISSING = {
    **{
        f"{right} on {table}": (f"REVOKE {right} ON {table} FROM shop", f"GRANT {right} ON {table} TO shop")
        for table in ("cart_items", "idempotency_keys")
        for right in ("SELECT", "INSERT", "UPDATE", "DELETE")
    },
    **{
        f"{function} may not be called": (
            f"REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC",
            f"GRANT EXECUTE ON FUNCTION {function} TO PUBLIC",
        )
        for function in ("change_cart", "empty_cart")
    },
    **{
        f"{function} is missing": (
            f"ALTER FUNCTION {function} RENAME TO hidden",
            f"ALTER FUNCTION hidden RENAME TO {function}",
        )
        for function in ("change_cart", "empty_cart")
    },
    "row security": (
        "ALTER TABLE cart_items ENABLE ROW LEVEL SECURITY",
        "ALTER TABLE cart_items DISABLE ROW LEVEL SECURITY",
    ),
}


@pytest.mark.usefixtures("least_privileged")
@pytest.mark.parametrize(("take", "give"), MISSING.values(), ids=MISSING.keys())
def test_healthz_is_503_where_something_is_missing(client: FlaskClient, take: str, give: str) -> None:
    execute(take)
    try:
        assert_problem(client.get("/healthz"), 503, "Service Unavailable")
    finally:
        execute(give)

    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("setting", ["default_transaction_read_only=on", "search_path=nowhere"])
def test_healthz_is_503_where_the_carts_cannot_be_used(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    with connected(monkeypatch, options=f"-c {setting}"):
        assert_problem(client.get("/healthz"), 503, "Service Unavailable")
        assert client.get("/livez").get_json() == {"status": "ok"}

    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_is_not_in_utf8_is_refused(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    psycopg2.extensions.set_wait_callback(None)  # a slow disk needs longer than a request may take
    with contextlib.closing(psycopg2.connect(URL)) as connection:
        connection.autocommit = True
        for sql in ("DROP DATABASE IF EXISTS other", f"CREATE DATABASE other ENCODING {encoding} TEMPLATE template0"):
            connection.cursor().execute(sql)
    psycopg2.extensions.set_wait_callback(connections.wait)

    with connected(monkeypatch, dbname="other"):
        result = cart.app.test_cli_runner().invoke(args=["init-db"])
        assert client.get("/healthz").status_code == 503

    assert result.exit_code == 1
    assert result.stderr == f"Error: the database is in {encoding}, and must be in UTF8\n"


@pytest.mark.parametrize(
    "setting", ["default_transaction_isolation=serializable", "lock_timeout=100ms", "statement_timeout=100ms"]
)
def test_what_a_role_has_set_does_not_matter(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    add(client, "ada", "p", 1)
    with (
        connected(monkeypatch, options=f"-c {setting}"),
        ThreadPoolExecutor(1) as pool,
        holding("SELECT change_cart('ada', '{p}', '{1}', 500, NULL, NULL)") as other,
    ):
        waited = pool.submit(add, client, "ada", "p", 1)
        await_waiting(1, milliseconds=200)
        other.commit()

    assert waited.result().get_json() == {"user_id": "ada", "product_id": "p", "quantity": 3}


def test_connections_that_a_migration_has_outdated_are_replaced() -> None:
    def use(turn: int) -> set[int]:
        user, codes = cart.app.test_client(), set()
        while True:
            is_last = migrated.is_set()
            codes |= {add(user, f"user {turn}", "p", 1).status_code, user.get(path(f"user {turn}")).status_code}
            if is_last:
                return codes

    migrated = Event()
    run_on_all_connections("SELECT 1")
    try:
        with ThreadPoolExecutor(8) as pool:
            codes = pool.map(use, range(8))
            execute("ALTER TABLE cart_items ALTER quantity TYPE bigint")
            migrated.set()
            assert set.union(*codes) == {200}
    finally:
        execute("ALTER TABLE cart_items ALTER quantity TYPE integer")


@pytest.mark.parametrize("key", [{}, {"Idempotency-Key": "k"}], ids=["no key", "key"])
def test_connections_to_a_server_that_only_reads_are_replaced(client: FlaskClient, key: dict[str, str]) -> None:
    for total in (1, 2):
        run_on_all_connections("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
        assert add(client, "ada", "p", 1, **key).get_json()["quantity"] == (1 if key else total)


def test_a_change_of_a_line_is_a_hot_update() -> None:
    values = {"user_id": "ada", "product_ids": ["p", "q", "p"], "quantities": [3, 1, -1], "key": None, "request": None}
    with contextlib.closing(psycopg2.connect(URL)) as connection, connection.cursor() as cursor:
        for _ in range(5):
            cursor.execute(cart.CHANGE_CART.text, values)
        for counted in ("updated", "hot_updated"):
            cursor.execute(f"SELECT pg_stat_get_xact_tuples_{counted}('cart_items'::regclass)")
            assert cursor.fetchone() == (13,)


@pytest.mark.parametrize(
    ("pid", "executed"),
    [
        ("pg_backend_pid()", {"change_cart": 4, "check_carts": 1, "empty_cart": 2, "read_cart": 1}),
        ("pg_backend_pid() + 1", {}),
    ],
    ids=["direct", "behind a pooler, which makes up a pid"],
)
def test_statements_are_prepared_unless_a_pooler_is_between(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, pid: str, executed: dict[str, int]
) -> None:
    monkeypatch.setattr(database, "SET_UP", database.SET_UP.replace("pg_backend_pid()", pid))
    with connected(monkeypatch):
        add(client, "ada", "p", 2)
        for _ in range(2):
            assert add(client, "ada", "'%s", 3, **{"Idempotency-Key": "k"}).get_json()["quantity"] == 3
        assert totals(change(client, "ada", ("p", -1))) == [("p", 1)]
        assert totals(client.get(path("ada"))) == [("'%s", 3), ("p", 1)]
        assert client.delete(path("ada"), query_string={"product_id": "p"}).status_code == 200
        assert client.delete(path("ada")).status_code == client.get("/healthz").status_code == 200
        with cart.database.engine.connect() as connection:
            uses = connection.exec_driver_sql("SELECT name, generic_plans + custom_plans FROM pg_prepared_statements")
            assert dict(map(tuple, uses)) == executed


def test_one_user_holds_two_connections_at_most(client: FlaskClient) -> None:
    with ThreadPoolExecutor(16) as pool, holding(LOCK_ADA):
        adds = [pool.submit(add, cart.app.test_client(), "ada", "p", 1) for _ in range(16)]
        await_waiting(2)
        for user_id in ("bob", "eve"):
            assert add(client, user_id, "p", 1).status_code == 200
        await_waiting(2)

    assert [answer.result().status_code for answer in adds] == [200] * 16
    assert totals(client.get(path("ada"))) == [("p", 16)]


def test_a_large_body_gives_its_place_back(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cart, "large_bodies", database.Turns(1))
    body = b'{"product_id": "p", "quantity": 1}'.ljust(100_000)

    for size, status in [(100_000, 200), (100_001, 400), (100_000, 200)]:  # the second breaks off
        response = client.post(
            path("ada"), data=body, content_type="application/json", environ_overrides={"CONTENT_LENGTH": str(size)}
        )
        assert response.status_code == status


def test_init_db_says_who_it_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "LOAD_TRIES", 1)
    with holding("SET application_name = 'long report'; SELECT pg_advisory_xact_lock(0)") as other:
        result = cart.app.test_cli_runner().invoke(args=["init-db"])
        pid = other.info.backend_pid

    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1 and f"process {pid} of postgres (long report)" in result.stderr


# Races


@pytest.mark.usefixtures("many_workers")
def test_racing_changes_all_count(client: FlaskClient) -> None:
    def use(turn: int) -> None:
        response = add(cart.app.test_client(), "ada", "sku-1", 3 if turn % 2 else -1)
        assert response.status_code == 200

    add(client, "ada", "sku-1", 1000)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(use, range(400)))

    assert client.get(path("ada")).get_json() == [{"product_id": "sku-1", "quantity": 1000 + 200 * 3 - 200}]


@pytest.mark.usefixtures("many_workers")
def test_racing_takes_never_fall_below_zero_nor_show_a_line_of_zero(client: FlaskClient) -> None:
    def take(_: int) -> int:
        response = add(cart.app.test_client(), "ada", "sku-1", -1)
        seen = cart.app.test_client().get(path("ada"))
        assert seen.status_code == 404 or seen.get_json()[0]["quantity"] > 0
        return int(response.get_json()["quantity"])

    add(client, "ada", "sku-1", 200)
    with ThreadPoolExecutor(16) as pool:
        left = list(pool.map(take, range(300)))

    assert sorted(left) == [0] * 101 + list(range(1, 200))
    assert_problem(client.get(path("ada")), 404, "Not Found", EMPTY)


class Cart(RuleBasedStateMachine):
    """The service beside a Counter for each user, and what each key was sent with and answered."""

    users = st.sampled_from(["ada", "Ada", "bob"])
    products = st.sampled_from(["p", "q", "é/%41"])
    quantities = st.one_of(st.integers(-3, 5), st.sampled_from([MAX, -MAX])).filter(bool)
    lines = st.fixed_dictionaries({"product_id": products, "quantity": quantities})
    bodies = lines | st.lists(lines, min_size=1, max_size=5)

    def __init__(self) -> None:
        super().__init__()
        execute("TRUNCATE cart_items, idempotency_keys")
        self.client = cart.app.test_client()
        self.carts: dict[str, Counter[str]] = {user: Counter() for user in ("ada", "Ada", "bob")}
        self.answered: dict[tuple[str, str], tuple[Any, Any]] = {}

    def send(self, user: str, body: Any, key: str | None = None) -> None:
        """Post a body, and assert that the answer is the expected one."""
        response = self.client.post(path(user), json=body, headers={"Idempotency-Key": key} if key else {})
        sent, answer = self.answered.get((user, key or ""), (body, None))
        if body != sent:
            assert_problem(response, 422, "Unprocessable Entity", "Idempotency-Key was used with another body.")
        elif isinstance(expected := answer or self.expect(user, body), str):
            assert_problem(response, 409, "Conflict", expected)
        else:
            assert (response.status_code, response.get_json()) == (200, expected)
            if key:
                self.answered[user, key] = body, expected

    def expect(self, user: str, body: Any) -> Any:
        """Change the Counter and return the answer, or leave it and return why the change is refused."""
        is_list = isinstance(body, list)
        lines, answers = Counter(self.carts[user]), []
        for place, line in enumerate(body if is_list else [body], 1):
            label, product = f"Line {place}: " if is_list else "", line["product_id"]
            total = max(lines[product] + line["quantity"], 0)
            if total > MAX:
                return f"{label}quantity would bring the line's total above 2147483647."
            if total and product not in lines and len(lines) == 500:
                return f"{label}{FULL}"
            lines[product] = total
            if not total:
                del lines[product]
            answers.append({"product_id": product, "quantity": total})
        self.carts[user] = lines
        return answers if is_list else {"user_id": user, **answers[0]}

    @rule(user=users, body=bodies, key=st.sampled_from([None, "k", "l"]))
    def change(self, user: str, body: Any, key: str | None) -> None:
        self.send(user, body, key)

    @precondition(lambda self: self.answered)
    @rule(data=st.data())
    def use_a_key_again(self, data: st.DataObject) -> None:
        (user, key), (body, _) = data.draw(st.sampled_from(list(self.answered.items())))
        self.send(user, data.draw(st.just(body) | self.bodies), key)

    @rule(user=users, size=st.integers(498, 500))
    def fill(self, user: str, size: int) -> None:
        others = [f"{n:03}" for n in range(500) if f"{n:03}" not in self.carts[user]]
        if body := [{"product_id": product, "quantity": 1} for product in others[: size - len(self.carts[user])]]:
            self.send(user, body)

    @rule(user=users)
    def empty(self, user: str) -> None:
        response = self.client.delete(path(user))
        assert response.status_code == (200 if self.carts[user] else 404)
        self.carts[user].clear()

    @rule(user=users, product=products)
    def remove(self, user: str, product: str) -> None:
        response = self.client.delete(path(user), query_string={"product_id": product})
        assert response.status_code == (200 if product in self.carts[user] else 404)
        del self.carts[user][product]

    @invariant()
    def carts_are_the_counters(self) -> None:
        for user, lines in self.carts.items():
            response = self.client.get(path(user))
            if lines:
                assert totals(response) == sorted(lines.items())
            else:
                assert_problem(response, 404, "Not Found", EMPTY)


TestCart = Cart.TestCase
TestCart.settings = hypothesis_settings(max_examples=10, stateful_step_count=30, deadline=None)


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


@pytest.mark.usefixtures("many_workers")
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


@pytest.mark.parametrize("key", ["", '""', "k" * 256, "é", "\t", "\x7f"])
def test_a_key_is_1_to_255_characters_of_printable_ascii(client: FlaskClient, key: str) -> None:
    response = add(client, "ada", "p", 1, **{"Idempotency-Key": key})

    assert_problem(response, 400, "Bad Request", "Idempotency-Key must be 1 to 255 characters of printable ASCII.")
    assert execute("SELECT * FROM cart_items") == []


@pytest.mark.parametrize("key", ["k" * 255, " ~,;"])
def test_quotes_around_a_key_are_not_part_of_it(client: FlaskClient, key: str) -> None:
    for sent in (key, f'"{key}"'):
        response = add(client, "ada", "p", 1, **{"Idempotency-Key": sent})
        assert response.get_json() == {"user_id": "ada", "product_id": "p", "quantity": 1}


def test_a_key_counts_for_a_day(client: FlaskClient) -> None:
    for age, total in [("0", 1), ("23 hours 59 minutes", 1), ("24 hours 1 minute", 2), ("0", 2)]:
        execute("UPDATE idempotency_keys SET created_at = now() - %(age)s::interval", age=age)
        assert add(client, "ada", "p", 1, **{"Idempotency-Key": "k"}).get_json()["quantity"] == total


# Lists


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


@pytest.mark.usefixtures("many_workers")
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
    with (
        ThreadPoolExecutor(1) as pool,
        holding("SELECT change_cart('ada', '{a,b}', '{1,1}', 500, NULL, NULL)") as other,
    ):
        emptied = pool.submit(client.delete, path("ada"))
        await_waiting(1)
        other.commit()
        assert emptied.result().status_code == 200

    assert client.get(path("ada")).status_code == 404


@pytest.mark.usefixtures("many_workers")
def test_racing_retries_of_a_list_count_once(client: FlaskClient) -> None:
    with ThreadPoolExecutor(24) as pool:
        send = lambda _: totals(change(cart.app.test_client(), "ada", ("a", 2), ("b", 3), **{"Idempotency-Key": "k"}))  # noqa: E731
        answers = list(pool.map(send, range(24)))

    assert answers == [[("a", 2), ("b", 3)]] * 24
    assert totals(client.get(path("ada"))) == [("a", 2), ("b", 3)]


@pytest.mark.usefixtures("many_workers")
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


@pytest.mark.usefixtures("many_workers")
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
    none_left = change(client, "ada", ("004", -2), ("newer", 1), ("nothing", -1), ("newest", 1))
    assert_problem(none_left, 409, "Conflict", f"Line 4: {FULL}")
    assert client.delete(path("ada"), query_string={"product_id": "004"}).status_code == 200
    assert totals(change(client, "ada", ("newer", 1), ("newer", -1), ("newest", 1))) == [
        ("newer", 1),
        ("newer", 0),
        ("newest", 1),
    ]


@pytest.mark.usefixtures("many_workers")
def test_racing_adds_never_overstep_the_bound(client: FlaskClient) -> None:
    def send(turn: int) -> int:
        user, key = cart.app.test_client(), {"Idempotency-Key": f"{turn}"} if turn % 2 else {}
        if turn % 3:
            return add(user, "ada", f"new {turn}", 1, **key).status_code
        return int(change(user, "ada", ("001", 1), (f"new {turn}", 1), **key).status_code)

    assert change(client, "ada", *((f"{n:03}", 1) for n in range(499))).status_code == 200
    with ThreadPoolExecutor(16) as pool, holding("LOCK cart_items IN EXCLUSIVE MODE"):  # nobody writes, all may count
        codes = pool.map(send, range(64))
        await_waiting(settings.POOL_SIZE)

    assert Counter(codes) == {200: 1, 409: 63}
    assert execute("SELECT count(*) FROM cart_items") == [(500,)]


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


@pytest.mark.parametrize(
    "use",
    [
        "SELECT FROM cart_items WHERE user_id = 'ada' FOR UPDATE",
        "SELECT change_cart('ada', '{q}', '{1}', 500, NULL, NULL)",
    ],
    ids=["a line is locked", "a line is added"],
)
def test_a_cart_that_is_in_use_is_left_for_the_next_time(client: FlaskClient, use: str) -> None:
    for user_id in ("ada", "bob"):
        add(client, user_id, "p", 1)
        age(user_id, "p", 9)

    with holding(use):
        assert expire(8).startswith("Removed 1 carts")

    assert expire(8).startswith("Removed 1 carts")


def test_a_cart_that_was_changed_after_it_was_listed_is_kept(client: FlaskClient) -> None:
    change(client, "ada", ("p", 1), ("q", 1))
    age("ada", "p", 9)

    assert execute("SELECT expire_cart('ada', 8)") == [(False,)]

    assert totals(client.get(path("ada"))) == [("p", 1), ("q", 1)]


def test_keys_that_count_no_longer_are_removed_unless_they_are_in_use(client: FlaskClient) -> None:
    for n in range(3):
        add(client, f"user {n}", "p", 1, **{"Idempotency-Key": "k"})
    execute("UPDATE idempotency_keys SET created_at = now() - interval '24 hours 1 minute' WHERE user_id <> 'user 0'")

    with holding("SELECT FROM idempotency_keys WHERE user_id = 'user 1' FOR UPDATE"):
        assert expire(8) == "Removed 0 carts and 1 idempotency keys.\n"

    assert execute("SELECT user_id FROM idempotency_keys ORDER BY 1") == [("user 0",), ("user 1",)]


@pytest.mark.parametrize("days", [[], ["--days", "0"], ["--days", "3651"], ["--days", "x"]])
def test_expire_needs_days_from_1_to_3650(days: list[str]) -> None:
    assert cart.app.test_cli_runner().invoke(args=["expire", *days]).exit_code == 2


@pytest.mark.parametrize("command", [["init-db"], ["expire", "--days", "1"]])
def test_an_error_of_a_command_is_one_line(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.setattr(settings, "DATABASE", {"host": "127.0.0.1", "port": "1", "password": "hunter2"})

    result = cart.app.test_cli_runner().invoke(args=command)

    assert result.exit_code == 1
    assert result.stderr.startswith("Error: 127.0.0.1: ") and result.stderr.count("\n") == 1
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


LINE = {"product_id": "p", "quantity": 1}
REFUSED: dict[str, dict[str, Any]] = {
    "not_json": {"data": b'{"product_id": "p"'},
    "broken_off": {"data": b"{}", "environ_overrides": {"CONTENT_LENGTH": "9"}},
    "path_bytes": {"user_id": "%ff"},
    "query_bytes": {"query_string": "product_id=%ff"},
    "key_length": {"headers": {"Idempotency-Key": ""}},
    "no_token": {"headers": {"Authorization": "Basic eA=="}},
    "expired": {"claims": {"exp": 1}},
    "early": {"claims": {"nbf": 4_000_000_000}},
    "invalid_token": {"claims": {"aud": "else"}},
    "other_user": {"claims": {"sub": "bob"}},
    "no_cart": {"user_id": "bob", "claims": {"sub": "bob"}},
    "no_line": {"query_string": "product_id=p"},
    "total": {"json": {"product_id": "001", "quantity": MAX}},
    "full": {"json": LINE},
    "full_line": {"json": [{"product_id": "001", "quantity": 1}, LINE]},
    "too_large": {"data": b" " * (2 * 1024 * 1024 + 1)},
    "not_said_json": {"data": b"{}", "content_type": "text/plain"},
    "no_change": {"json": "p"},
    "product_id": {"json": {"product_id": "", "quantity": 1}, "query_string": "product_id="},
    "user_id": {"user_id": "%00"},
    "quantity": {"json": {"product_id": "p", "quantity": 0}},
    "quantity_line": {"json": [LINE, {"product_id": "p"}]},
    "list_length": {"json": []},
    "key_reuse": {"headers": {"Idempotency-Key": "used"}},
    "query": {"query_string": "product=p"},
    "database": {"run": Mock(side_effect=psycopg2.OperationalError)},
    "bodies": {"data": b" " * 100_000, "large_bodies": Mock(acquire=Mock(return_value=False))},
    "issuer": {"opens": Mock(side_effect=tokens.KeysUnavailable)},
}


def test_the_examples_of_each_operation_are_what_it_answers(
    guarded: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(guarded, **token(aud="carts"), **{"Idempotency-Key": "used"})
    contract = yaml.safe_load(Path(cart.app.root_path, "openapi.yaml").read_text())

    def resolve(node: dict[str, Any]) -> Any:
        return reduce(dict.__getitem__, node["$ref"].removeprefix("#/").split("/"), contract)

    examples = {
        (method, name): resolve(example)["value"]
        for method in ("get", "post", "delete")
        for code, response in contract["paths"]["/cart/users/{user_id}"][method]["responses"].items()
        if code != "200"
        for name, example in resolve(response)["content"]["application/problem+json"]["examples"].items()
    }

    answers = {}
    for method, name in examples:
        options = {**({"json": LINE} if method == "post" and "data" not in REFUSED[name] else {}), **REFUSED[name]}
        options = {"content_type": "application/json", **options} if "data" in options else options
        claims, user_id = options.pop("claims", {}), options.pop("user_id", "ada")
        headers = {**token(**{"aud": "carts", **claims}), **options.pop("headers", {})}
        with monkeypatch.context() as patched:
            for fault in FAULTS.keys() & options.keys():
                patched.setattr(FAULTS[fault], fault, options.pop(fault))
            answers[method, name] = guarded.open(
                f"/cart/users/{user_id}", method=method, headers=headers, **options
            ).get_json()

    assert answers == examples
    assert {name for _, name in examples} == REFUSED.keys()


FAULTS: dict[str, Any] = {"run": cart.database, "large_bodies": cart, "opens": tokens}


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
    monkeypatch.setattr(settings, "JWT_KEY", settings.parse_key(SECRET))
    monkeypatch.setattr(settings, "JWT_AUDIENCE", "carts")
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
    monkeypatch.setattr(settings, "JWT_ALGORITHMS", ["RS256"])
    monkeypatch.setattr(settings, "JWT_KEY", settings.parse_key(public.decode()))
    head, body = token()["Authorization"].split()[1].split(".")[:2]
    forged = f"{head}.{body}".encode()
    signature = urlsafe_b64encode(hmac.digest(public, forged, "sha256")).rstrip(b"=").decode()

    assert add(client, "ada", "p", 1, **token(pem, "RS256")).status_code == 200
    assert_problem(
        client.get(path("ada"), headers={"Authorization": f"Bearer {forged.decode()}.{signature}"}), 401, "Unauthorized"
    )

    with pytest.raises(ValueError, match="It is a private key"):
        settings.parse_key(pem)
