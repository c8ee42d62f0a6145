"""The cart in the process, on a real PostgreSQL loaded from schema.sql. The order is that of what is promised."""

import contextlib
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any
from unittest import mock

import psycopg2
import pytest
import sqlalchemy as sa
import yaml
from cryptography.hazmat.primitives.asymmetric import rsa
from flask.testing import FlaskClient
from gevent.lock import BoundedSemaphore
from hypothesis import Phase
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from werkzeug.test import TestResponse

import cart
import database
import tokens
from conftest import *
from settings import SETTINGS

ADA = path("ada")
with cart.app.app_context():
    ENGINE = database.db.engine
NOWHERE = {"host": "127.0.0.1", "port": "1"}
FULL, TOO_MUCH = "The cart is full: 500 lines", "The line's total would be above 2147483647"


def add_list(client: FlaskClient, user_id: str, *changes: tuple[str, int], **headers: str) -> TestResponse:
    return client.post(path(user_id), json=[change(*one) for one in changes], headers=headers)


def flask(*words: str) -> Any:
    """Run a command of the service, and return how it ended."""
    return cart.app.test_cli_runner().invoke(args=words)


@contextlib.contextmanager
def reconnected(options: str = "", **parameters: str) -> Iterator[None]:
    """Have the service connect anew, with other parameters, as long as this lasts."""
    options = f"{database.PARAMETERS['options']} {options}"  # a later -c wins
    ENGINE.dispose()
    try:
        with mock.patch.dict(database.PARAMETERS, parameters, options=options):
            yield
    finally:
        ENGINE.dispose()


@contextlib.contextmanager
def other_database(options: str = "") -> Iterator[str]:
    """Have the service use another, empty database as long as this lasts, and give its URL."""
    execute(f"CREATE DATABASE other {options} TEMPLATE template0")
    try:
        with reconnected(dbname="other"):
            yield URL.replace("/postgres?", "/other?")
    finally:
        execute("DROP DATABASE other WITH (FORCE)")


# Changes: adds and takes count, a list is made whole or not at all, a cart has at most 500 lines


def test_adding_sums_and_a_line_at_zero_or_below_is_removed(client: FlaskClient) -> None:
    add(client, "ada", "sku-1", 2)
    response = add(client, "ada", "sku-1", 3)

    assert response.status_code == 200
    assert response.get_json() == {"user_id": "ada", "product_id": "sku-1", "quantity": 5}
    assert lines_of(client.get(ADA)) == [("sku-1", 5)]
    assert [add(client, "ada", "sku-1", taken).get_json()["quantity"] for taken in (-3, -MAX - 1, -1)] == [2, 0, 0]
    assert_problem(client.get(ADA), 404, EMPTY)


def test_one_line_is_removed_by_its_product_and_all_without(client: FlaskClient) -> None:
    for user_id, product_id in (("ada", "sku-1"), ("ada", "sku 2/é"), ("ada", "sku-3"), ("bob", "sku-1")):
        add(client, user_id, product_id, 1)

    assert client.delete(ADA, query_string={"product_id": "sku 2/é"}).get_json() == {"msg": "Cart item deleted"}
    assert lines_of(client.get(ADA)) == [("sku-1", 1), ("sku-3", 1)]
    assert client.delete(ADA).get_json() == {"msg": "All cart items deleted"}
    assert execute("SELECT user_id, product_id, quantity FROM cart_items") == [("bob", "sku-1", 1)]


USERS = ["ada", "Ada", "..", " ", "\u00e9", "e\u0301", '%41 a+b?c#d"\\%(user)s\r\n']  # alike, or special somewhere
PRODUCTS = ["a", "A", "é/%41+b?c#d", "'; DROP TABLE cart_items; --%s", "e\u0301\r\n\u202e\uffff", " ", " 😀 "]


class CartMachine(RuleBasedStateMachine):
    """The service beside a Counter for each user, and what was sent and answered with each key."""

    users, products = st.sampled_from(USERS), st.sampled_from(PRODUCTS)
    quantities = st.one_of(st.integers(-3, 5), st.sampled_from([MAX, -MAX])).filter(bool)
    lines = st.builds(change, products, quantities)
    bodies = lines | st.lists(lines, min_size=1, max_size=5)

    def __init__(self) -> None:
        super().__init__()
        execute("TRUNCATE cart_items, idempotency_keys")
        self.client = cart.app.test_client()
        self.carts: dict[str, Counter[str]] = {user: Counter() for user in USERS}
        self.answered: dict[tuple[str, str | None], tuple[Any, Any]] = {}

    @rule(user=users, body=bodies, key=st.sampled_from([None, "k", "l"]))
    def change(self, user: str, body: Any, key: str | None = None) -> None:
        response = self.client.post(path(user), json=body, headers={"Idempotency-Key": key} if key else {})
        sent, answer = self.answered.get((user, key), (body, None))
        expected = None if body != sent else answer or self.apply(user, body)
        if expected is None:
            assert_problem(response, 422, "Idempotency-Key was used with another body.")
        elif isinstance(expected, str):
            assert_problem(response, 409, expected)
        else:
            assert (response.status_code, response.get_json()) == (200, expected)
            if key:
                self.answered[user, key] = body, expected

    def apply(self, user: str, body: Any) -> Any:
        """Change the Counter and return the answer, or leave it and return why the change is refused."""
        is_list = isinstance(body, list)
        lines, answers = Counter(self.carts[user]), []
        for place, one in enumerate(body if is_list else [body]):
            where, product = f" - at `$[{place}]`" if is_list else "", one["product_id"]
            total = max(lines[product] + one["quantity"], 0)
            if total > MAX:
                return f"{TOO_MUCH}{where}"
            if total and product not in lines and len(lines) == 500:
                return f"{FULL}{where}"
            lines[product] = total
            if not total:
                del lines[product]
            answers.append({"product_id": product, "quantity": total})
        self.carts[user] = lines
        return answers if is_list else {"user_id": user, **answers[0]}

    @precondition(lambda self: self.answered)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        (user, key), (body, _) = data.draw(st.sampled_from(list(self.answered.items())))
        self.change(user=user, body=body, key=key)

    @rule(user=users, size=st.integers(498, 500))
    def fill(self, user: str, size: int) -> None:
        others = [f"{n:03}" for n in range(500) if f"{n:03}" not in self.carts[user]]
        if body := [change(product) for product in others[: max(size - len(self.carts[user]), 0)]]:
            self.change(user=user, body=body)

    @rule(user=users, product=st.none() | products)
    def remove(self, user: str, product: str | None) -> None:
        removed = [one for one in self.carts[user] if product is None or one == product]
        response = self.client.delete(path(user), query_string={"product_id": product} if product else {})
        assert response.status_code == (200 if removed else 404)
        for one in removed:
            del self.carts[user][one]

    @invariant()
    def carts_are_the_counters(self) -> None:
        for user, lines in self.carts.items():
            response = self.client.get(path(user))
            if lines:
                assert lines_of(response) == sorted(lines.items())
            else:
                assert_problem(response, 404, EMPTY)


TestCart = CartMachine.TestCase
# A failure prints its steps, which are twelve at most. Phase.shrink would make them fewer, in minutes.
TestCart.settings = hypothesis_settings(max_examples=15, stateful_step_count=12, deadline=None, phases=[Phase.generate])


def test_a_full_cart_takes_no_new_line_until_one_is_gone(client: FlaskClient) -> None:
    assert add_list(client, "ada", *((f"{n:03}", 2) for n in range(500))).status_code == 200

    assert_problem(add(client, "ada", "new", 1), 409, FULL)
    assert_problem(add_list(client, "ada", ("new", 1), ("001", -2)), 409, f"{FULL} - at `$[0]`")
    assert_problem(add_list(client, "ada", ("001", 1), ("002", MAX - 1)), 409, f"{TOO_MUCH} - at `$[1]`")
    refused = add_list(client, "ada", ("002", -2), ("new", 1), ("absent", -1), ("newer", 1))
    assert_problem(refused, 409, f"{FULL} - at `$[3]`")
    changes = [("001", 1), ("absent", -1), ("002", -9), ("new", 1), ("new", -1), ("newer", 1)]
    totals = [("001", 3), ("absent", 0), ("002", 0), ("new", 1), ("new", 0), ("newer", 1)]
    assert lines_of(add_list(client, "ada", *changes)) == totals


def test_the_database_holds_the_rules_too() -> None:
    for row in ("'', 'p', 1", "repeat('u', 256), 'p', 1", "'u', '', 1", "'u', repeat('p', 256), 1", "'u', 'p', 0"):
        with pytest.raises(psycopg2.errors.CheckViolation):
            execute(f"INSERT INTO cart_items VALUES ({row})")


def test_the_model_is_the_schema() -> None:
    inspector, model, dialect = sa.inspect(ENGINE), cart.CartItem.__table__, ENGINE.dialect
    there = inspector.get_columns("cart_items")
    columns = [(one["name"], one["type"].compile(dialect), one["nullable"]) for one in there]
    assert [(one.name, one.type.compile(dialect), one.nullable) for one in model.columns] == columns
    assert [one.name for one in model.primary_key] == inspector.get_pk_constraint("cart_items")["constrained_columns"]


# Keys: a POST with an Idempotency-Key counts once in 24 hours


def test_a_key_may_be_quoted_and_its_changes_written_in_another_way(client: FlaskClient) -> None:
    for key in ("k" * 255, " ~,;"):
        for sent, quantity in ((key, 1), (f'"{key}"', 1.0)):
            response = client.post(ADA, json={**CHANGE, "quantity": quantity}, headers={"Idempotency-Key": sent})
            assert response.get_json()["quantity"] == 1
        assert_problem(add_list(client, "ada", ("p", 1), **{"Idempotency-Key": key}), 422)
        client.delete(ADA)


def test_a_key_counts_for_a_day(client: FlaskClient) -> None:
    for age, quantity, total in (("0:00", 1, 1), ("23:59", 1, 1), ("24:01", 2, 3)):
        execute("UPDATE idempotency_keys SET created_at = now() - %(age)s::interval", age=age)
        answers = [add(client, "ada", "p", quantity, **IDEMPOTENT).get_json() for _ in range(2)]
        assert [answer["quantity"] for answer in answers] == [total, total]


# expire removes what is old and keeps no shopper waiting


def make_old(client: FlaskClient, *user_ids: str) -> None:
    """Give users a cart of two lines, and make it nine days old."""
    for user_id in user_ids:
        add_list(client, user_id, ("p", 5), ("q", 1))
    execute("UPDATE cart_items SET updated_at = now() - interval '9 days'")


def expire(days: int | None = None) -> tuple[int, int]:
    """Run the command, and return how many carts and keys it removed."""
    said = flask("expire", *(["--days", str(days)] if days else [])).stdout
    removed = re.fullmatch(r"Removed (\d+) carts and (\d+) idempotency keys\.\n", said)
    assert removed
    return int(removed[1]), int(removed[2])


def test_carts_that_nobody_changed_and_keys_that_count_no_longer_are_removed(client: FlaskClient) -> None:
    execute("""
        INSERT INTO cart_items SELECT 'user ' || n, unnest('{p,q}'::text[]), 1, now() - interval '9 days'
        FROM generate_series(1, 3) n;
        INSERT INTO cart_items SELECT 'half', product, 1, now() - days * interval '1 day'
        FROM unnest('{p,q}'::text[], '{9,7}'::integer[]) line(product, days)
    """)
    for user_id, hours in (("old", "24:01"), ("young", "23:59")):
        add(client, user_id, "p", 1, **IDEMPOTENT)
        execute(f"UPDATE idempotency_keys SET created_at = now() - interval '{hours}' WHERE user_id = '{user_id}'")

    assert [expire(), expire(8), expire(8)] == [(0, 1), (3, 0), (0, 0)]
    assert execute("SELECT count(*) FROM cart_items WHERE user_id = 'half'") == [(2,)]
    assert execute("SELECT user_id FROM idempotency_keys") == [("young",)]


@pytest.mark.parametrize("quantity", [1, -1])
def test_a_change_of_a_line_keeps_its_cart(client: FlaskClient, quantity: int) -> None:
    make_old(client, "ada")
    add(client, "ada", "p", quantity)

    assert expire(8) == (0, 0)


IN_USE = [
    "SELECT FROM cart_items WHERE user_id = 'ada' AND product_id = 'q' FOR UPDATE",
    "SELECT change_cart('ada', '{r}', '{1}', 500, NULL, NULL)",
]


@pytest.mark.parametrize("use", IN_USE)
def test_a_cart_that_is_in_use_is_left_for_the_next_time(client: FlaskClient, use: str) -> None:
    make_old(client, "ada", "bob")

    with holding(use):
        assert expire(8) == (1, 0)
    assert expire(8) == (1, 0)


def test_expire_removes_carts_one_by_one_and_keeps_one_that_is_changed_meanwhile(client: FlaskClient) -> None:
    make_old(client, "ada", "bob", "eve")
    execute("""
        CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF (SELECT count(DISTINCT user_id) FROM cart_items) < 3 THEN PERFORM pg_advisory_xact_lock(1); END IF;
            RETURN OLD;
        END $$;
        CREATE TRIGGER pause BEFORE DELETE ON cart_items FOR EACH ROW EXECUTE FUNCTION pause()
    """)
    try:
        with ThreadPoolExecutor(1) as pool, holding("SELECT pg_advisory_xact_lock(1)") as pause:
            expired = pool.submit(expire, 8)
            await_waiting(1)  # it has removed one of the three, and is removing another
            # It holds the lock of the one that it removes; the last one's is free.
            left = "SELECT DISTINCT pg_try_advisory_xact_lock(hashtextextended(user_id, 0)), user_id FROM cart_items"
            users = execute(left)
            [kept] = [user_id for is_free, user_id in users if is_free]
            assert len(users) == 2
            add(client, kept, "p", 1)
            pause.rollback()
        assert expired.result() == (2, 0)
    finally:
        execute("DROP FUNCTION pause CASCADE")

    assert lines_of(client.get(path(kept))) == [("p", 6), ("q", 1)]


def test_expire_takes_1_to_3650_days_and_a_command_says_an_error_in_one_line() -> None:
    for days in ("0", "3651", "x"):
        assert flask("expire", "--days", days).exit_code == 2
    assert (expire(1), expire(3650)) == ((0, 0), (0, 0))
    for command in ("init-db", "expire"):
        with reconnected(**NOWHERE):
            result = flask(command)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1


# init-db repeats, upgrades beside a running service of the version before, and fails in one line if it cannot


@pytest.mark.parametrize("lock", ["SELECT pg_advisory_xact_lock(0)", "LOCK cart_items"], ids=["init-db", "a request"])
def test_init_db_gives_up_if_another_holds_a_lock_and_may_be_repeated(client: FlaskClient, lock: str) -> None:
    add(client, "ada", "p", 1)
    with holding(lock):
        refused = flask("init-db")
    again = flask("init-db")

    assert (refused.exit_code, refused.output) == (1, "Error: canceling statement due to lock timeout\n")
    assert (again.exit_code, again.output) == (0, "The database has the tables and functions of this version.\n")
    assert lines_of(client.get(ADA)) == [("p", 1)]


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
def test_init_db_upgrades_a_released_schema_and_leaves_it_fit_for_that(client: FlaskClient, version: str) -> None:
    released = (HERE / f"testdata/schema-{version}.sql").read_text()
    insert_key = "INSERT INTO idempotency_keys VALUES (%(user_id)s, 'k', sha256(convert_to(%(sent)s, 'UTF8')), '{7}')"
    with other_database() as url:
        execute(released, url)
        execute(insert_key, url, user_id="one", sent='["p",2]')
        execute(insert_key, url, user_id="list", sent='[["p",2]]')
        for schema in (SCHEMA.read_text(), released):  # the last one is the way back
            execute(schema, url)
            assert add(client, "one", "p", 2, **IDEMPOTENT).get_json()["quantity"] == 7
            assert lines_of(add_list(client, "list", ("p", 2), **IDEMPOTENT)) == [("p", 7)]
            assert add(client, "ada", "p", 2, **IDEMPOTENT).get_json()["quantity"] == 2
            assert client.get("/healthz").status_code == 200
        assert flask("init-db").exit_code == 0
        assert expire(1) == (0, 0)
        expire_of_then = "SELECT expire_cart('ada', 1), sweep_keys()" if version == "1.0.0" else "CALL expire(1)"
        assert execute(expire_of_then, url) == [(0, 0)]
        assert lines_of(client.get(ADA)) == [("p", 2)]


def test_a_database_that_is_not_in_utf8_is_refused() -> None:
    with other_database("ENCODING LATIN1"):
        result = flask("init-db")

    assert (result.exit_code, result.output) == (1, "Error: the database is in LATIN1, and must be in UTF8\n")


# Bad input of any kind is a 4xx with a problem document, and has changed nothing; ids are compared exactly


def json_line(product_id: bytes = b'"p"', quantity: bytes = b"1") -> bytes:
    return b'{"product_id": %b, "quantity": %b}' % (product_id, quantity)


BAD_BODIES = {
    "empty": (400, b""),
    "not UTF-8": (400, json_line(b'"\xff"')),
    "lone surrogate": (400, json_line(rb'"\ud800"')),
    "nested deep in an unknown field": (400, b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "nested deep": (422, b"[" * 8_000 + b"]" * 8_000),
    "list of 501": (422, b"[" + b",".join([json_line()] * 501) + b"]"),
    "long product_id": (422, json_line(b'"%b"' % (b"p" * 256))),
    "NUL in product_id": (422, json_line(rb'"a\u0000b"')),
    "true": (422, json_line(quantity=b"true")),
    "minus zero": (422, json_line(quantity=b"-0.0")),
    "too much": (422, json_line(quantity=b"2147483648")),
    "too little": (422, json_line(quantity=b"-2147483649")),
    "not UTF-8 in an unknown field": (400, b'{"product_id": "p", "quantity": 1, "x": "\xff"}'),
}
BAD_QUERIES = [
    (422, ["product_id=", "product_id=%00", f"product_id={'p' * 256}", "product_id", "product=p", "&", "="]),
    (422, ["product_id=p&product_id=q", "product_id=p&x=1"]),
    (400, ["product_id=%ff"]),
    (404, ["product_id=\xff"]),
]
BAD_PATHS = [
    (400, ["/cart/users/%ff", "/cart/users/%ed%a0%80", "/cart/users/%ef%bf%bd"]),
    (422, ["/cart/users/a%00", f"/cart/users/{'x' * 256}"]),
    (404, ["/", "/static/x", "/cart/users", "/cart/users/", "/cart/users/a/b", "/cart/users/a%2Fb", "/cart/users/%2F"]),
    (404, ["//cart/users/ada", "/cart//users/ada", "/cart/users//ada"]),
]
BAD_MEDIA = [None, "text/plain", "application/x-www-form-urlencoded"]
BAD_KEYS = ["", '""', '" "', "k" * 256, "é", "\t", "\x7f"]
BAD_REQUESTS: dict[str, tuple[int, dict[str, Any]]] = {
    **{name: (code, {"data": body, "content_type": "application/json"}) for name, (code, body) in BAD_BODIES.items()},
    **{f"as {media}": (415, {"data": json_line(), "content_type": media}) for media in BAD_MEDIA},
    **{f"?{it:.60}": (code, {"method": "DELETE", "query_string": it}) for code, bad in BAD_QUERIES for it in bad},
    **{f"{it:.60}": (code, {"path": it, "json": CHANGE}) for code, bad in BAD_PATHS for it in bad},
    **{f"key {key!a:.9}": (400, {"json": CHANGE, "headers": {"Idempotency-Key": key}}) for key in BAD_KEYS},
    "1 MiB and a byte": (413, {"data": json_line().ljust(1024 * 1024 + 1), "content_type": "application/json"}),
    "another method": (405, {"method": "PUT", "json": CHANGE}),
}


@pytest.mark.parametrize(("status", "sent"), BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_a_bad_request_is_refused_and_changes_nothing(client: FlaskClient, status: int, sent: dict[str, Any]) -> None:
    add(client, "ada", "p", 1)

    assert_problem(client.open(**{"path": ADA, "method": "POST", **sent}), status)
    assert execute("SELECT user_id, product_id, quantity FROM cart_items") == [("ada", "p", 1)]


def test_a_body_has_whole_numbers_as_json_allows_them_and_1_mib(client: FlaskClient) -> None:
    body = b'[{"product_id": "p", "quantity": 2.0}, {"product_id": "p", "quantity": 1e2, "else": null}]'
    response = client.post(ADA, data=body.ljust(1024 * 1024), content_type="application/json; charset=utf-8")

    assert lines_of(response) == [("p", 2), ("p", 102)]
    assert b"." not in response.data


# Tokens: only the cart's owner, or carts:all, gets in


@pytest.fixture
def guarded(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> FlaskClient:
    """A client of the service with JWT_KEY and JWT_AUDIENCE set."""
    monkeypatch.setattr(tokens, "KEY", SECRET.encode())
    monkeypatch.setattr(SETTINGS, "jwt_audience", "carts")
    return client


TOKENS: dict[str, tuple[int, dict[str, Any]]] = {  # exp, nbf and iat are seconds from now
    "for the user": (200, {}),
    "for all carts": (200, {"sub": "shop", "scope": "x carts:all"}),
    "for all carts, without sub": (200, {"sub": None, "scope": "carts:all"}),
    "for two services": (200, {"aud": ["x", "carts"]}),
    "of a clock that is ahead": (200, {"nbf": 29, "iat": 29}),
    "expired": (401, {"exp": -1}),
    "without exp": (401, {"exp": None}),
    "not yet valid": (401, {"nbf": 40}),
    "another audience": (401, {"aud": "else"}),
    "another algorithm": (401, {"algorithm": "HS512"}),
    "for a user in capitals": (403, {"sub": "Ada"}),
    "scope that only ends alike": (403, {"sub": "b", "scope": "xcarts:all"}),
    "scope a list": (403, {"sub": "b", "scope": ["carts:all"]}),
}
NO_TOKENS = ["", "Basic eA==", "Basic \xff", "Bearer", "Bearer \xff.\xff.\xff", f"Bearer {'W1tb' * 999}.e30.x"]


@pytest.mark.parametrize(("status", "options"), TOKENS.values(), ids=TOKENS.keys())
def test_a_cart_opens_with_a_valid_token_for_it(guarded: FlaskClient, status: int, options: dict[str, Any]) -> None:
    times = {name: time.time() + options[name] for name in ("exp", "nbf", "iat") if options.get(name)}
    response = add(guarded, "ada", "p", 1, **token(**{"aud": "carts", **options, **times}))

    if status != 200:
        assert_problem(response, status)
    assert response.status_code == status
    assert execute("SELECT count(*) FROM cart_items") == [(1 if status == 200 else 0,)]


def test_no_cart_opens_without_a_token(guarded: FlaskClient) -> None:
    for sent in NO_TOKENS:
        response = guarded.delete(ADA, headers={"Authorization": sent} if sent else {})
        assert_problem(response, 401)
        assert response.headers["WWW-Authenticate"].split()[0] == "Bearer"
    header = token(aud="carts")["Authorization"].replace("Bearer ", "bearer  ")  # is valid too
    assert_problem(guarded.get(ADA, headers={"Authorization": f"{header} "}), 404)


def test_a_public_key_verifies(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    private = rsa.generate_private_key(65537, 2048)
    monkeypatch.setattr(tokens, "ALGORITHM", "RS256")
    monkeypatch.setattr(tokens, "KEY", private.public_key())

    assert add(client, "ada", "p", 1, **token(private, "RS256")).status_code == 200
    assert_problem(add(client, "ada", "p", 1, **token()), 401)


# The contract is true, and /docs shows it


def test_only_carts_need_a_token_and_the_page_takes_nothing_from_elsewhere(guarded: FlaskClient) -> None:
    def fetch(url: str) -> TestResponse:
        response = guarded.get(url)
        assert response.status_code == 200 and response.data
        response.close()  # the file that it came from
        return response

    page, contract = fetch("/docs"), fetch("/openapi.yaml")
    assert {guarded.get(url).status_code for url in ("/healthz", "/livez")} == {200}
    assert page.data == fetch("/docs/").data and b'"url": "/openapi.yaml"' in page.data
    links = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert links and [fetch(link) for link in links]
    assert contract.content_type == "application/yaml"
    assert contract.data == (HERE / "openapi.yaml").read_bytes()


# How each example of the contract comes about: what differs from a change of one line, with a valid token.
REFUSED: dict[str, dict[str, Any]] = {
    "not_json": {"data": b'{"product_id": "p"', "content_type": "application/json"},
    "path_bytes": {"user_id": "%ff"},
    "query_bytes": {"query_string": "product_id=%ff"},
    "key_length": {"headers": {"Idempotency-Key": ""}},
    "no_token": {"headers": {"Authorization": "Basic eA=="}},
    "expired": {"claims": {"exp": 1}},
    "early": {"claims": {"nbf": 4_000_000_000}},
    "invalid_token": {"key": "another secret of thirty-two characters"},
    "other_user": {"claims": {"sub": "bob"}},
    "no_cart": {"user_id": "bob", "claims": {"sub": "bob"}},
    "no_line": {"query_string": "product_id=p"},
    "total": {"json": change("001", MAX)},
    "full": {"json": CHANGE},
    "full_line": {"json": [change("001"), CHANGE]},
    "not_said_json": {"data": b"{}", "content_type": "text/plain"},
    "no_change": {"json": "p"},
    "product_id": {"json": change("")},
    "query_product_id": {"query_string": "product_id="},
    "user_id": {"user_id": "x" * 256},
    "quantity": {"json": {"product_id": "p", "quantity": 1.5}},
    "quantity_zero": {"json": change("p", 0)},
    "quantity_line": {"json": [CHANGE, change("p", 2**31)]},
    "list_length": {"json": []},
    "key_reuse": {"headers": IDEMPOTENT},
    "query": {"query_string": "product=p"},
    "database": {"database": NOWHERE},
    "too_many": {"places": 0},
    "issuer": {"issuer": tokens.IssuerKeys("http://127.0.0.1:1/keys")},
}
# nginx answers these, "unknown" too.
ELSEWHERE = {"bad_request", "too_large", "unknown"}


def test_the_examples_of_each_operation_are_what_it_answers(guarded: FlaskClient) -> None:
    def resolve(node: dict[str, Any]) -> Any:
        return reduce(dict.__getitem__, node["$ref"].removeprefix("#/").split("/"), contract)

    def call(method: str, user_id: str = "ada", **options: Any) -> Any:
        claims, parameters = options.pop("claims", {}), options.pop("database", {})
        places = {("ada",): BoundedSemaphore(options.pop("places"))} if "places" in options else {}
        sent = token(**{"aud": "carts", "key": options.pop("key", SECRET), **claims})
        headers = {**sent, **options.pop("headers", {})}
        with (
            reconnected(**parameters),
            mock.patch.multiple(database, cart_places=places, QUEUE_TIMEOUT=0.01),
            mock.patch.object(tokens, "ISSUER", options.pop("issuer", None)),
        ):
            return guarded.open(f"/cart/users/{user_id}", method=method, headers=headers, **options).get_json()

    assert len(call("POST", json=[change(f"{n:03}", 2) for n in range(500)], headers=IDEMPOTENT)) == 500
    contract = yaml.safe_load((HERE / "openapi.yaml").read_text())
    examples = {
        (method.upper(), name): resolve(example)["value"]
        for method in ("get", "post", "delete")
        for code, response in contract["paths"]["/cart/users/{user_id}"][method]["responses"].items()
        if code != "200"
        for name, example in resolve(response)["content"]["application/problem+json"]["examples"].items()
    }

    proxy = (HERE / "nginx.conf").read_text()

    assert {name for _, name in examples} - ELSEWHERE == REFUSED.keys()
    assert all(example["detail"] in proxy for (_, name), example in examples.items() if name in ELSEWHERE)
    for method, name in [key for key in examples if key[1] not in ELSEWHERE]:
        options = {"json": CHANGE} if method == "POST" and "data" not in REFUSED[name] else {}
        assert call(method, **{**options, **REFUSED[name]}) == examples[method, name], name


# The database is down, slow, or not as it should be: 503, and 200 again as soon as it is back


@pytest.fixture
def least_privileged() -> Iterator[None]:
    """The service as a role with no more rights than the operator's document gives."""
    [rights] = re.findall(r"```sql\n(.*?)```", (HERE / "docs/operating.md").read_text(), re.DOTALL)
    execute(rights)
    with reconnected(user="shop"):
        yield
    execute("DROP OWNED BY shop; DROP ROLE shop")


@pytest.mark.usefixtures("least_privileged")
def test_four_rights_on_two_tables_are_enough(client: FlaskClient) -> None:
    assert lines_of(add_list(client, "ada", ("p", 2), ("q", 1), **IDEMPOTENT)) == [("p", 2), ("q", 1)]
    assert client.delete(ADA, query_string={"product_id": "p"}).status_code == 200
    assert lines_of(client.get(ADA)) == [("q", 1)]
    assert client.get("/healthz").get_json() == {"status": "ok"}


@pytest.mark.usefixtures("least_privileged")
@pytest.mark.parametrize("right", ["SELECT ON cart_items", "INSERT ON cart_items", "DELETE ON idempotency_keys"])
def test_healthz_is_503_if_a_right_is_missing(client: FlaskClient, right: str) -> None:
    execute(f"REVOKE {right} FROM shop")

    assert_problem(client.get("/healthz"), 503, UNCHANGED)


@pytest.mark.parametrize("setting", ["default_transaction_read_only=on", "search_path=nowhere"])
def test_healthz_is_503_and_livez_200_if_the_carts_cannot_be_used(client: FlaskClient, setting: str) -> None:
    with reconnected(f"-c {setting}"):
        assert_problem(client.get("/healthz"), 503, UNCHANGED)
        assert client.get("/livez").get_json() == {"status": "ok"}


def test_what_a_role_has_set_does_not_matter() -> None:
    settings = {"default_transaction_isolation": "serializable", "lock_timeout": "50s", "statement_timeout": "50s"}
    for name, value in settings.items():
        execute(f"ALTER ROLE postgres SET {name} = '{value}'")
    try:
        with reconnected(), contextlib.closing(ENGINE.raw_connection()) as connection:
            cursor = connection.cursor()
            cursor.execute(f"SELECT {', '.join(f'current_setting({name!r})' for name in settings)}")
            assert cursor.fetchone() == ("read committed", "0", "2s")
            assert database.execute("SHOW statement_timeout") == [("0",)]
    finally:
        execute("ALTER ROLE postgres RESET ALL")


def test_a_connection_that_is_outdated_by_a_migration_costs_one_error(client: FlaskClient) -> None:
    with reconnected():
        assert client.get(ADA).status_code == 404
        execute("ALTER TABLE cart_items ALTER quantity TYPE bigint")
        try:
            assert [client.get(ADA).status_code for _ in range(3)] == [503, 404, 404]
        finally:
            execute("ALTER TABLE cart_items ALTER quantity TYPE integer")


def test_a_connection_to_a_server_that_only_reads_now_costs_one_error(client: FlaskClient) -> None:
    with reconnected():
        with contextlib.closing(ENGINE.raw_connection()) as connection:
            connection.cursor().execute("SET default_transaction_read_only = on")
        assert [client.delete(ADA).status_code for _ in range(3)] == [503, 404, 404]


def test_a_503_says_that_nothing_was_changed_if_that_is_known(client: FlaskClient) -> None:
    with reconnected("-c statement_timeout=50ms"), holding(LOCK_ADA):
        assert_problem(add(client, "ada", "p", 1), 503, UNCHANGED)
    assert_problem(client.get(ADA), 404)


def test_a_fault_of_the_service_is_a_500_and_a_problem_document(client: FlaskClient) -> None:
    with mock.patch.object(cart, "run", None):
        assert_problem(client.get(ADA), 500)


# More than one machine: through a pooler nothing is prepared


@pytest.mark.parametrize("is_prepared", [True, False])
def test_statements_are_prepared_unless_a_setting_says_otherwise(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, is_prepared: bool
) -> None:
    last = """
        SELECT split_part(query, ' ', 1) FROM pg_stat_activity
        WHERE pid <> pg_backend_pid() AND query_start IS NOT NULL AND backend_type = 'client backend'
        ORDER BY query_start DESC LIMIT 1
    """
    monkeypatch.setattr(SETTINGS, "database_prepare", is_prepared)
    with reconnected():
        for _ in range(2):
            assert add(client, "ada", "'%s$1", 3, **IDEMPOTENT).get_json()["quantity"] == 3
        assert lines_of(add_list(client, "ada", ("p", 2), ("p", -1), ("q", -MAX - 1))) == [("p", 2), ("p", 1), ("q", 0)]
        assert client.delete(ADA, query_string={"product_id": "p"}).status_code == 200
        assert client.get("/healthz").status_code == 200
        assert lines_of(client.get(ADA)) == [("'%s$1", 3)]
        assert execute(last) == [("EXECUTE" if is_prepared else "SELECT",)]
