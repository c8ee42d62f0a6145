"""The cart's behaviour in the process, on a real PostgreSQL loaded from schema.sql."""

import contextlib
import hmac
import re
import time
from base64 import urlsafe_b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from threading import Event
from typing import Any

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
from conftest import (
    EMPTY,
    FULL,
    HERE,
    MAX,
    SECRET,
    URL,
    add,
    assert_problem,
    await_waiting,
    connected,
    eventually,
    execute,
    holding,
    path,
    run_command,
    token,
)

LOCK_ADA = "SELECT pg_advisory_xact_lock(hashtextextended('ada', 0))"
CHANGE_ADA = "SELECT change_cart('ada', '{a,b}', '{1,1}', 500, NULL, NULL)"


def change(client: FlaskClient, user_id: str, *changes: tuple[str, int], **headers: str) -> Any:
    lines = [{"product_id": product_id, "quantity": quantity} for product_id, quantity in changes]
    return client.post(path(user_id), json=lines, headers=headers)


def totals(response: Any) -> list[tuple[str, int]]:
    assert response.status_code == 200
    assert all(line.keys() == {"product_id", "quantity"} for line in response.get_json())
    return [(line["product_id"], line["quantity"]) for line in response.get_json()]


def fill(client: FlaskClient, **headers: str) -> None:
    assert change(client, "ada", *((f"{n:03}", 2) for n in range(500)), **headers).status_code == 200


@contextlib.contextmanager
def reconnected(monkeypatch: pytest.MonkeyPatch, **parameters: str) -> Iterator[None]:
    """Have the service connect with other parameters as long as this lasts."""
    kept = list(cart.database.idle)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(settings, "DATABASE", {**settings.DATABASE, **parameters})
            cart.database.idle.clear()
            yield
    finally:
        for link in cart.database.idle:
            link.connection.close()
        cart.database.idle[:] = kept


def all_at_once(count: int, call: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


@pytest.fixture
def many_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One user has all connections, as with many workers: the database alone keeps changes apart."""
    monkeypatch.setattr(database, "USER_LIMIT", settings.POOL_SIZE)


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

LIST_OF_501 = b"[" + b",".join([b'{"product_id": "p", "quantity": 1}'] * 501) + b"]"
DEEP = b'{"product_id": "p", "quantity": 1, "x": ' + b"[" * 2_000 + b"]" * 2_000 + b"}"
BAD_BODIES = {
    "empty": (b"", 400),
    "cut off": (b'{"product_id": "p"', 400),
    "not UTF-8": (b'{"product_id": "\xff", "quantity": 1}', 400),
    "UTF-16": ('{"product_id": "p", "quantity": 1}'.encode("utf-16"), 400),
    "lone surrogate": (rb'{"product_id": "\ud800", "quantity": 1}', 400),
    "NaN": (b'{"product_id": "p", "quantity": NaN}', 400),
    "nested deep in a member that does not count": (DEEP, 400),
    "nested deep": (b"[" * 8_000 + b"]" * 8_000, 422),
    "null": (b"null", 422),
    "string": (b'"p"', 422),
    "empty list": (b"[]", 422),
    "list of 501": (LIST_OF_501, 422),
    "list in a list": (b'[{"product_id": "p", "quantity": 1}, []]', 422),
    "no product_id": (b'{"quantity": 1}', 422),
    "null product_id": (b'{"product_id": null, "quantity": 1}', 422),
    "number as product_id": (b'{"product_id": 7, "quantity": 1}', 422),
    "empty product_id": (b'{"product_id": "", "quantity": 1}', 422),
    "long product_id": (b'{"product_id": "%s", "quantity": 1}' % (b"p" * 256), 422),
    "NUL in product_id": (rb'{"product_id": "a\u0000b", "quantity": 1}', 422),
    "NUL and a line break in product_id": (rb'{"product_id": "a\u0000\n", "quantity": 1}', 422),
    "no quantity": (b'{"product_id": "p"}', 422),
    "null quantity": (b'{"product_id": "p", "quantity": null}', 422),
    "true": (b'{"product_id": "p", "quantity": true}', 422),
    "text as quantity": (b'{"product_id": "p", "quantity": "2"}', 422),
    "fraction": (b'{"product_id": "p", "quantity": 1.5}', 422),
    "zero": (b'{"product_id": "p", "quantity": 0}', 422),
    "minus zero": (b'{"product_id": "p", "quantity": -0.0}', 422),
    "too much": (b'{"product_id": "p", "quantity": 2147483648}', 422),
    "too little": (b'{"product_id": "p", "quantity": -2147483649}', 422),
    "ten thousand digits": (b'{"product_id": "p", "quantity": ' + b"9" * 10_000 + b"}", 422),
    "1e300": (b'{"product_id": "p", "quantity": 1e300}', 422),
    "1e400": (b'{"product_id": "p", "quantity": 1e400}', 422),
}


@pytest.mark.parametrize(("body", "status"), BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_a_bad_body_is_refused_and_stores_nothing(client: FlaskClient, body: bytes, status: int) -> None:
    response = client.post(path("ada"), data=body, content_type="application/json")

    assert_problem(response, status, {400: "Bad Request", 422: "Unprocessable Entity"}[status])
    assert execute("SELECT * FROM cart_items") == []


@pytest.mark.parametrize(
    ("bad", "place"),
    [
        ({"product_id": "p", "quantity": 1.5}, "`$[2].quantity`"),
        ({"product_id": "", "quantity": 1}, "`$[2].product_id`"),
        ({"product_id": "p", "quantity": 0}, "`$[2]`"),
        ({"product_id": "p"}, "`$[2]`"),
    ],
)
def test_a_refusal_of_a_list_names_the_place(client: FlaskClient, bad: dict[str, Any], place: str) -> None:
    good = {"product_id": "p", "quantity": 1}

    response = client.post(path("ada"), json=[good, good, bad])

    assert_problem(response, 422, "Unprocessable Entity")
    assert place in response.get_json()["detail"]


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_is_not_said_to_be_json_is_refused(client: FlaskClient, content_type: str | None) -> None:
    response = client.post(path("ada"), data=b'{"product_id": "p", "quantity": 1}', content_type=content_type)

    assert_problem(response, 415, "Unsupported Media Type", "The body must be application/json.")
    assert execute("SELECT * FROM cart_items") == []


@pytest.mark.parametrize(("size", "status"), [(1024 * 1024, 200), (1024 * 1024 + 1, 413)])
def test_a_body_is_at_most_1_mib(client: FlaskClient, size: int, status: int) -> None:
    body = b'{"product_id": "p", "quantity": 1}'.ljust(size)

    response = client.post(path("ada"), data=body, content_type="application/json")

    assert response.status_code == status
    if status == 413:
        assert_problem(response, 413, "Request Entity Too Large", "The body must be at most 1048576 bytes.")


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("product_id=", 422),
        ("product_id=%00", 422),
        ("product_id=" + "p" * 256, 422),
        ("product_id=p&product_id=q", 422),
        ("product=p", 422),
        ("product_id=p&x=1", 422),
        ("product_id", 422),
        ("&", 422),
        ("=", 422),
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
    with cart.app.app_context():
        inspector, dialect = sa.inspect(cart.db.engine), cart.db.engine.dialect
        table = cart.CartItem.__table__
        there = {c["name"]: (c["type"].compile(dialect), c["nullable"]) for c in inspector.get_columns(table.name)}
        primary_key = inspector.get_pk_constraint(table.name)["constrained_columns"]
        cart.db.engine.dispose()

    assert {c.name: (c.type.compile(dialect), c.nullable) for c in table.columns} == there
    assert [c.name for c in table.primary_key] == primary_key


LOADED = "The database has the tables and functions of this version.\n"


def run(*words: str) -> Any:
    """Run a command of the service."""
    return cart.app.test_cli_runner().invoke(args=words)


def test_init_db_says_what_it_did_and_may_be_repeated(client: FlaskClient) -> None:
    add(client, "ada", "sku-1", 1)

    for _ in range(2):
        result = run("init-db")
        assert (result.exit_code, result.output) == (0, LOADED)

    assert execute("SELECT quantity FROM cart_items") == [(1,)]


def test_init_db_waits_for_a_lock_only_a_second_and_may_be_run_again() -> None:
    with holding("SELECT pg_advisory_xact_lock(0)"):  # as another init-db does
        result = run("init-db")

    assert result.exit_code == 1
    assert result.stderr == "Error: other transactions hold what this needs. Run it again.\n"
    assert run("init-db").exit_code == 0


@contextlib.contextmanager
def other_database(monkeypatch: pytest.MonkeyPatch, schema: str, options: str = "") -> Iterator[str]:
    """Have the service use another database as long as this lasts, and give its URL."""
    with connected(autocommit=True) as connection, connection.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE other {options} TEMPLATE template0")
        try:
            url = URL.replace("/postgres?", "/other?")
            execute(schema or "SELECT", url)
            with reconnected(monkeypatch, dbname="other"):
                yield url
        finally:
            cursor.execute("DROP DATABASE other WITH (FORCE)")


def test_init_db_upgrades_the_schema_of_1_0_0_and_leaves_it_fit_for_1_0_0(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = {"Idempotency-Key": "k"}
    with other_database(monkeypatch, (HERE / "testdata/schema-1.0.0.sql").read_text()) as url:
        assert add(client, "ada", "p", 2, **key).status_code == 200  # the functions of 1.0.0
        assert run("init-db").exit_code == 0

        assert add(client, "ada", "p", 2, **key).get_json()["quantity"] == 2
        assert change(client, "ada", ("p", 1), ("q", 1)).status_code == 200
        assert run("expire", "--days", "1").stdout == "Removed 0 carts and 0 idempotency keys.\n"
        assert client.get("/healthz").status_code == 200
        execute((HERE / "testdata/schema-1.0.0.sql").read_text(), url)  # back
        assert add(client, "ada", "p", 2, **key).get_json()["quantity"] == 2
        assert execute("SELECT expire_cart('ada', 1), sweep_keys()", url) == [(False, 0)]


@pytest.mark.parametrize(("one", "sent"), [(True, '["p",2]'), (False, '[["p",2]]')])
def test_a_key_that_was_used_before_an_upgrade_counts_after_it(client: FlaskClient, one: bool, sent: str) -> None:
    execute("INSERT INTO idempotency_keys VALUES ('ada', 'k', sha256(convert_to(%(sent)s, 'UTF8')), '{7}')", sent=sent)
    key = {"Idempotency-Key": "k"}

    response = add(client, "ada", "p", 2, **key) if one else change(client, "ada", ("p", 2), **key)

    assert (response.get_json() if one else response.get_json()[0])["quantity"] == 7
    assert execute("SELECT * FROM cart_items") == []


@pytest.fixture
def least_privileged(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The service as a role with no more rights than the operator's document gives."""
    [rights] = re.findall(r"```sql\n(.*?)```", Path(cart.app.root_path, "docs/operating.md").read_text(), re.DOTALL)
    execute(rights)
    with reconnected(monkeypatch, user="shop"):
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
def test_healthz_is_503_if_something_is_missing(client: FlaskClient, take: str, give: str) -> None:
    execute(take)
    try:
        assert_problem(client.get("/healthz"), 503, "Service Unavailable")
    finally:
        execute(give)

    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("setting", ["default_transaction_read_only=on", "search_path=nowhere"])
def test_healthz_is_503_if_the_carts_cannot_be_used(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    with reconnected(monkeypatch, options=f"-c {setting}"):
        assert_problem(client.get("/healthz"), 503, "Service Unavailable")
        assert client.get("/livez").get_json() == {"status": "ok"}

    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_is_not_in_utf8_is_refused(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    with other_database(monkeypatch, "", f"ENCODING {encoding}"):
        result = run("init-db")
        assert client.get("/healthz").status_code == 503

    assert result.exit_code == 1
    assert result.stderr == f"Error: the database is in {encoding}, and must be in UTF8\n"


@pytest.mark.parametrize(
    "setting", ["default_transaction_isolation=serializable", "lock_timeout=100ms", "statement_timeout=100ms"]
)
def test_what_a_role_has_set_does_not_matter(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    has_waited = """
        SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query_start < now() - interval '200 ms'
    """
    add(client, "ada", "a", 1)
    with (
        reconnected(monkeypatch, options=f"-c {setting}"),
        ThreadPoolExecutor(1) as pool,
        holding(CHANGE_ADA) as other,
    ):
        waited = pool.submit(add, client, "ada", "a", 1)
        eventually(lambda: execute(has_waited))
        other.commit()

    assert waited.result().get_json() == {"user_id": "ada", "product_id": "a", "quantity": 3}


def test_a_migration_costs_a_503_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    def use(turn: int) -> set[int]:
        user, codes = cart.app.test_client(), set()
        while not migrated.is_set():
            codes |= {add(user, f"user {turn}", "p", 1).status_code, user.get(path(f"user {turn}")).status_code}
        return codes

    migrated = Event()
    with reconnected(monkeypatch):
        try:
            with ThreadPoolExecutor(8) as pool:
                codes = [pool.submit(use, turn) for turn in range(8)]
                eventually(lambda: execute("SELECT 1 FROM cart_items"))
                execute("ALTER TABLE cart_items ALTER quantity TYPE bigint")
                migrated.set()
            assert set.union(*(one.result() for one in codes)) <= {200, 503}
            for turn in range(8):  # as many as there are connections that may be outdated
                cart.app.test_client().get(path(f"user {turn}"))
            assert set(all_at_once(8, lambda turn: cart.app.test_client().get(path(f"user {turn}")).status_code)) == {
                200
            }
        finally:
            execute("ALTER TABLE cart_items ALTER quantity TYPE integer")


def test_all_connections_to_a_server_that_only_reads_are_given_up_at_once(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reconnected(monkeypatch):
        with monkeypatch.context() as patched:
            patched.setattr(
                settings, "DATABASE", {**settings.DATABASE, "options": "-c default_transaction_read_only=on"}
            )
            with holding("LOCK cart_items") as other, ThreadPoolExecutor(4) as pool:
                reads = [pool.submit(cart.app.test_client().get, path(f"user {turn}")) for turn in range(4)]
                await_waiting(4)
                other.rollback()
            assert [read.result().status_code for read in reads] == [404] * 4

        assert [add(client, "ada", "p", 1).status_code for _ in range(4)] == [503, 200, 200, 200]


def test_a_change_of_a_line_is_a_hot_update() -> None:
    with connected() as connection, connection.cursor() as cursor:
        for _ in range(5):
            cursor.execute("SELECT change_cart('ada', '{p,q,p}', '{3,1,-1}', 500, NULL, NULL)")
        for counted in ("updated", "hot_updated"):
            cursor.execute(f"SELECT pg_stat_get_xact_tuples_{counted}('cart_items'::regclass)")
            assert cursor.fetchone() == (13,)


@pytest.mark.parametrize(("is_direct", "sent"), [(True, "EXECUTE"), (False, "SELECT")], ids=["direct", "pooler"])
def test_statements_are_prepared_unless_a_pooler_is_between(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, is_direct: bool, sent: str
) -> None:
    last = """
        SELECT split_part(query, ' ', 1) FROM pg_stat_activity WHERE pid <> pg_backend_pid()
        ORDER BY query_start DESC NULLS LAST LIMIT 1
    """
    monkeypatch.setattr(database, "is_direct", lambda _: is_direct)
    with reconnected(monkeypatch):
        add(client, "ada", "p", 2)
        for _ in range(2):
            assert add(client, "ada", "'%s", 3, **{"Idempotency-Key": "k"}).get_json()["quantity"] == 3
        assert totals(change(client, "ada", ("p", -1))) == [("p", 1)]
        assert client.delete(path("ada"), query_string={"product_id": "p"}).status_code == 200
        assert client.get("/healthz").status_code == 200
        assert totals(client.get(path("ada"))) == [("'%s", 3)]
        assert execute(last) == [(sent,)]


def test_one_user_holds_two_connections_at_most(client: FlaskClient) -> None:
    with ThreadPoolExecutor(16) as pool, holding(LOCK_ADA):
        adds = [pool.submit(add, cart.app.test_client(), "ada", "p", 1) for _ in range(16)]
        await_waiting(2)
        for user_id in ("bob", "eve"):
            assert add(client, user_id, "p", 1).status_code == 200
        await_waiting(2)

    assert [answer.result().status_code for answer in adds] == [200] * 16
    assert totals(client.get(path("ada"))) == [("p", 16)]


# Races


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


# Settings


def test_readme_lists_each_setting_and_its_default() -> None:
    readme, source = (HERE / "README.md").read_text(), (HERE / "settings.py").read_text()
    listed = dict(re.findall(r"^\| `([A-Z_]+)` \|.*\| *([^|]*?) *\|$", readme, re.MULTILINE))
    code = "import settings as s; print(s.WORKERS, s.POOL_SIZE, *s.JWT_ALGORITHMS, s.CORS_ORIGINS, s.JWT_KEY)"
    unset: dict[str, Any] = {name: None for name in listed if name != "DATABASE_URL"}

    defaults = run_command("python", "-c", code, **unset).stdout.split()

    assert listed.keys() == set(re.findall(r'setting\("([A-Z_]+)"', source))
    named = [listed[name] for name in ("WEB_CONCURRENCY", "DATABASE_POOL_SIZE", "JWT_ALGORITHM")]
    assert defaults == [named[0], named[1], named[2].split(";")[0], "None", "None"]


# Retries


def test_an_add_with_a_key_counts_once(client: FlaskClient) -> None:
    first = add(client, "ada", "p", 2, **{"Idempotency-Key": "k"})
    add(client, "ada", "p", 3)
    again = add(client, "ada", "p", 2, **{"Idempotency-Key": "k"})

    assert first.get_json() == again.get_json() == {"user_id": "ada", "product_id": "p", "quantity": 2}
    assert client.get(path("ada")).get_json() == [{"product_id": "p", "quantity": 5}]


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


@pytest.mark.parametrize(
    "product_id", ["{:04}", "{:04}" + "\x01" * 251, "{:04}" + "😀" * 251], ids=["short", "escaped", "long"]
)
def test_every_cart_can_be_posted_as_it_came(client: FlaskClient, product_id: str) -> None:
    lines = [(product_id.format(n), n) for n in range(1, 501)]
    execute(
        "INSERT INTO cart_items SELECT 'ada', unnest(%(products)s), unnest(%(counts)s)",
        products=[product for product, _ in lines],
        counts=[count for _, count in lines],
    )

    sent = client.post(path("bob"), data=client.get(path("ada")).data, content_type="application/json")

    assert totals(sent) == totals(client.get(path("bob"))) == lines


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
@pytest.mark.parametrize("body", [{"product_id": "a", "quantity": 2}, [{"product_id": "a", "quantity": 2}] * 2])
def test_racing_retries_count_once(client: FlaskClient, body: Any) -> None:
    def retry(_: int) -> Any:
        response = cart.app.test_client().post(path("ada"), json=body, headers={"Idempotency-Key": "k"})
        return response.status_code, response.get_data()

    answers = set(all_at_once(24, retry))

    assert len(answers) == 1 and answers.pop()[0] == 200
    assert totals(client.get(path("ada"))) == [("a", 4 if isinstance(body, list) else 2)]


@pytest.mark.usefixtures("many_workers")
def test_a_guests_cart_is_merged_at_login_while_both_are_used(client: FlaskClient) -> None:
    def shop(user_id: str) -> int:
        return sum(add(cart.app.test_client(), user_id, f"p{turn % 5}", 1).status_code == 200 for turn in range(60))

    def log_in(_: int) -> None:
        """As in README: add what was read, then take it away from the guest, each with its key."""
        user = cart.app.test_client()
        added = change(user, "ada", *read, **{"Idempotency-Key": "login-add"})
        taken = change(
            user, "guest", *((product, -count) for product, count in read), **{"Idempotency-Key": "login-take"}
        )
        assert added.status_code == taken.status_code == 200

    assert shop("guest") == 60
    read = totals(client.get(path("guest")))
    with ThreadPoolExecutor(12) as pool:
        shoppers = [pool.submit(shop, user_id) for user_id in ("ada", "guest") * 2]
        list(pool.map(log_in, range(8)))
        assert [shopper.result() for shopper in shoppers] == [60] * 4

    assert sum(count for _, count in totals(client.get(path("ada")))) == 180
    assert sum(count for _, count in totals(client.get(path("guest")))) == 120


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


def test_carts_that_nobody_changed_are_removed_whole(client: FlaskClient) -> None:
    execute("""
        INSERT INTO cart_items SELECT 'user ' || n, unnest('{p,q}'::text[]), 1, now() - interval '8 days'
        FROM generate_series(1, 401) n
    """)
    for user_id in ("ada", "bob"):
        change(client, user_id, ("p", 1), ("q", 1))
        age(user_id, "p", 8)
    age("bob", "q", 6)

    assert run("expire", "--days", "7").stdout == "Removed 401 carts and 0 idempotency keys.\n"

    assert execute("SELECT DISTINCT user_id FROM cart_items ORDER BY 1") == [("ada",), ("bob",)]
    assert run("expire", "--days", "7").stdout == "Removed 0 carts and 0 idempotency keys.\n"


@pytest.mark.parametrize("by", ["adding", "taking", "a list"])
def test_every_change_of_a_line_keeps_its_cart(client: FlaskClient, by: str) -> None:
    change(client, "ada", ("p", 5), ("q", 1))
    for product_id in "pq":
        age("ada", product_id, 9)

    if by == "a list":
        change(client, "ada", ("p", 1), ("r", -1))
    else:
        add(client, "ada", "p", {"adding": 1, "taking": -1}[by])

    assert run("expire", "--days", "8").stdout.startswith("Removed 0 carts")


@pytest.mark.parametrize(
    "use",
    [
        "SELECT FROM cart_items WHERE user_id = 'ada' FOR UPDATE",
        "SELECT FROM cart_items WHERE user_id = 'ada' AND product_id = 'q' FOR UPDATE",
        "SELECT change_cart('ada', '{r}', '{1}', 500, NULL, NULL)",
    ],
    ids=["its lines are locked", "a line is locked", "a line is added"],
)
def test_a_cart_that_is_in_use_is_left_for_the_next_time(client: FlaskClient, use: str) -> None:
    for user_id in ("ada", "bob"):
        change(client, user_id, ("p", 1), ("q", 1))
        age(user_id, "p", 9)
        age(user_id, "q", 9)

    with holding(use):
        assert run("expire", "--days", "8").stdout.startswith("Removed 1 carts")

    assert run("expire", "--days", "8").stdout.startswith("Removed 1 carts")


def test_a_cart_that_is_changed_after_it_was_listed_is_kept(client: FlaskClient) -> None:
    for user_id in ("ada", "bob"):
        change(client, user_id, ("p", 1), ("q", 1))
        age(user_id, "p", 9)
        age(user_id, "q", 9)
    execute("""
        CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql
        AS 'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN OLD; END';
        CREATE TRIGGER pause BEFORE DELETE ON cart_items FOR EACH ROW EXECUTE FUNCTION pause()
    """)
    try:
        with ThreadPoolExecutor(1) as pool, holding("SELECT pg_advisory_xact_lock(1)") as other:
            expired = pool.submit(run, "expire", "--days", "8")
            await_waiting(1)  # it is removing one of the two
            is_free = "SELECT pg_try_advisory_xact_lock(hashtextextended(%(user_id)s, 0))"
            [kept] = [user_id for user_id in ("ada", "bob") if execute(is_free, user_id=user_id) == [(True,)]]
            add(client, kept, "p", 1)
            other.rollback()
        assert expired.result().stdout == "Removed 1 carts and 0 idempotency keys.\n"
    finally:
        execute("DROP FUNCTION pause CASCADE")

    assert totals(client.get(path(kept))) == [("p", 2), ("q", 1)]


def test_keys_that_count_no_longer_are_removed(client: FlaskClient) -> None:
    for n in range(3):
        add(client, f"user {n}", "p", 1, **{"Idempotency-Key": "k"})
    execute("UPDATE idempotency_keys SET created_at = now() - interval '24 hours 1 minute' WHERE user_id <> 'user 0'")

    assert run("expire", "--days", "8").stdout == "Removed 0 carts and 2 idempotency keys.\n"

    assert execute("SELECT user_id FROM idempotency_keys") == [("user 0",)]


@pytest.mark.parametrize("days", [[], ["--days", "0"], ["--days", "3651"], ["--days", "x"]])
def test_expire_needs_days_from_1_to_3650(days: list[str]) -> None:
    assert run("expire", *days).exit_code == 2


@pytest.mark.parametrize("command", [["init-db"], ["expire", "--days", "1"]])
def test_an_error_of_a_command_is_one_line(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.setattr(settings, "DATABASE", {"host": "127.0.0.1", "port": "1", "password": "hunter2"})

    result = run(*command)

    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
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


NOWHERE = {"host": "127.0.0.1", "port": "1"}
LINE = {"product_id": "p", "quantity": 1}
REFUSED: dict[str, dict[str, Any]] = {
    "not_json": {"data": b'{"product_id": "p"'},
    "broken_off": {"data": b"{}", "environ_overrides": {"CONTENT_LENGTH": "9", "wsgi.input_terminated": True}},
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
    "too_large": {"data": b" " * (1024 * 1024 + 1)},
    "not_said_json": {"data": b"{}", "content_type": "text/plain"},
    "no_change": {"json": "p"},
    "product_id": {"json": {"product_id": "", "quantity": 1}},
    "query_product_id": {"query_string": "product_id="},
    "user_id": {"user_id": "%00"},
    "quantity": {"json": {"product_id": "p", "quantity": 1.5}},
    "quantity_zero": {"json": {"product_id": "p", "quantity": 0}},
    "quantity_line": {"json": [LINE, {"product_id": "p", "quantity": 2**31}]},
    "list_length": {"json": []},
    "key_reuse": {"headers": {"Idempotency-Key": "used"}},
    "query": {"query_string": "product=p"},
    "database": {"broken": (settings, "DATABASE", NOWHERE)},
    "database_change": {"broken": (settings, "DATABASE", NOWHERE)},
    "issuer": {"broken": (tokens, "issuer", tokens.IssuerKeys("http://127.0.0.1:1/keys"))},
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
        with reconnected(monkeypatch), monkeypatch.context() as patched:
            if broken := options.pop("broken", None):
                patched.setattr(*broken)
            answers[method, name] = guarded.open(
                f"/cart/users/{user_id}", method=method, headers=headers, **options
            ).get_json()

    assert answers == examples
    assert {name for _, name in examples} == REFUSED.keys()


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
    monkeypatch.setattr(settings, "JWT_KEY", settings.parse_key(SECRET, "HS256"))
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
    "not yet valid": token(aud="carts", nbf=4_000_000_000),
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
        {"sub": "b", "scope": "xcarts:all"},
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
    monkeypatch.setattr(settings, "JWT_KEY", settings.parse_key(public.decode(), "RS256"))
    head, body = token()["Authorization"].split()[1].split(".")[:2]
    forged = f"{head}.{body}".encode()
    signature = urlsafe_b64encode(hmac.digest(public, forged, "sha256")).rstrip(b"=").decode()

    assert add(client, "ada", "p", 1, **token(pem, "RS256")).status_code == 200
    assert_problem(
        client.get(path("ada"), headers={"Authorization": f"Bearer {forged.decode()}.{signature}"}), 401, "Unauthorized"
    )

    with pytest.raises(ValueError, match="It is a private key"):
        settings.parse_key(pem, "RS256")
