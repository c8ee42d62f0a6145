"""The cart in the process: what changes and reads do, and what is refused. It takes seconds.

Kept here: adds, takes and sets count, and a 200 to one is stored. A list is made whole or not at all, in its order. A
cart has at most 500 lines, in the order in which they were added, and a line's total is 1 to 2147483647. A change with
a key counts once in 24 hours. Bad input of any kind is a 4xx, and a refused request has changed nothing. Ids are
compared exactly. Each answer is JSON that no cache stores, each refusal a problem document that names the place, with a
code where a page must choose.
"""

from collections import Counter
from typing import Any

import pytest
import sqlalchemy as sa
from flask.testing import FlaskClient
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import cart
from tests.helpers import (
    ADA,
    EMPTY,
    ENGINE,
    FULL,
    LINE,
    MAX,
    TOO_LARGE,
    assert_problem,
    execute,
    line,
    lines_of,
    path,
    stored,
)

KEY = {"Idempotency-Key": "k"}
OTHER_KEY = {"Idempotency-Key": "l"}
KEY_REUSED = "Idempotency-Key was used with another method or body."

# Adding


def test_adding_the_same_product_sums_its_quantities(client: FlaskClient) -> None:
    client.post(ADA, json=line("sku-1", 2))

    response = client.post(ADA, json=line("sku-1", 3))

    assert response.status_code == 200
    assert response.headers["Cache-Control"] == "no-store"
    assert response.get_json() == {"user_id": "ada", "product_id": "sku-1", "quantity": 5}
    assert lines_of(client.get(ADA)) == [("sku-1", 5)]


def test_a_list_is_added_in_its_order(client: FlaskClient) -> None:
    client.post(ADA, json=line("p", 1))

    response = client.post(ADA, json=[line("q", 2), line("p", -1), line("p", 4), line("q", 1), line("r", -1)])

    assert lines_of(response) == [("q", 2), ("p", 0), ("p", 4), ("q", 3), ("r", 0)]
    assert lines_of(client.get(ADA)) == [("q", 3), ("p", 4)]


# Setting


@pytest.mark.parametrize("quantity", [1, 2, 3, MAX])
def test_setting_makes_the_total_what_it_says(client: FlaskClient, quantity: int) -> None:
    client.post(ADA, json=line("sku-1", 2))

    response = client.patch(ADA, json=line("sku-1", quantity))

    assert response.status_code == 200
    assert response.headers["Cache-Control"] == "no-store"
    assert response.get_json() == {"user_id": "ada", "product_id": "sku-1", "quantity": quantity}
    assert lines_of(client.get(ADA)) == [("sku-1", quantity)]


def test_a_list_is_set_in_its_order(client: FlaskClient) -> None:
    client.post(ADA, json=[line("p", 1), line("q", 9)])

    response = client.patch(ADA, json=[line("q", 2), line("p", 0), line("p", 4), line("q", 3), line("r", 0)])

    assert lines_of(response) == [("q", 2), ("p", 0), ("p", 4), ("q", 3), ("r", 0)]
    assert lines_of(client.get(ADA)) == [("q", 3), ("p", 4)]


# Removing


def test_one_line_is_removed_by_its_product(client: FlaskClient) -> None:
    client.post(ADA, json=[line("sku-1"), line("sku 2/é"), line("sku-3")])

    response = client.delete(ADA, query_string={"product_id": "sku 2/é"})

    assert response.get_json() == {"msg": "Cart item deleted"}
    assert response.headers["Cache-Control"] == "no-store"
    assert lines_of(client.get(ADA)) == [("sku-1", 1), ("sku-3", 1)]


# The order of a cart


def test_lines_come_in_the_order_in_which_they_were_added(client: FlaskClient) -> None:
    client.post(ADA, json=line("c"))
    client.patch(ADA, json=line("a"))
    client.post(ADA, json=[line("d"), line("b")])
    client.post(ADA, json=[line("b", 2), line("c", 1)])  # which leaves them at their places

    assert lines_of(client.get(ADA)) == [("c", 2), ("a", 1), ("d", 1), ("b", 3)]


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [("DELETE", f"{ADA}?product_id=c", None), ("PATCH", ADA, line("c", 0)), ("POST", ADA, line("c", -1))],
    ids=["removed", "set to 0", "taken away"],
)
def test_a_line_that_is_removed_and_added_again_comes_last(
    client: FlaskClient, method: str, target: str, body: object
) -> None:
    client.post(ADA, json=[line("c"), line("a"), line("b")])

    client.open(target, method=method, json=body)
    client.post(ADA, json=line("c"))

    assert lines_of(client.get(ADA)) == [("a", 1), ("b", 1), ("c", 1)]


# All of it together, at random: the service beside a model

USERS = ["ada", "Ada", "..", " ", "\u00e9", "e\u0301", '%41 a+b?c#d"\\%(user)s\r\n']  # alike, or special somewhere
PRODUCTS = ["a", "A", "é/%41+b?c#d", "'; DROP TABLE cart_items; --%s", "e\u0301\r\n\u202e\uffff", " ", " 😀 "]


def lists_or_one(lines: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return bodies: one of the lines, or a list of them."""
    return lines | st.lists(lines, min_size=1, max_size=5)


class CartMachine(RuleBasedStateMachine):
    """The service beside a Counter for each user, whose keys keep their order, and what each key was answered."""

    users, products, keys = st.sampled_from(USERS), st.sampled_from(PRODUCTS), st.sampled_from([None, "k", "l"])
    amounts = st.sampled_from([-MAX, -3, -2, -1, 1, 2, 3, 4, 5, MAX])
    totals = st.sampled_from([0, 1, 2, 3, MAX])

    def __init__(self) -> None:
        super().__init__()
        execute("DELETE FROM cart_items; DELETE FROM idempotency_keys")
        self.client = cart.app.test_client()
        self.carts: dict[str, Counter[str]] = {user: Counter() for user in USERS}
        self.answered: dict[tuple[str, str], tuple[str, Any, Any]] = {}

    @rule(user=users, body=lists_or_one(st.builds(line, products, amounts)), key=keys)
    def add(self, user: str, body: Any, key: str | None) -> None:
        self.change("POST", user, body, key)

    @rule(user=users, body=lists_or_one(st.builds(line, products, totals)), key=keys)
    def set(self, user: str, body: Any, key: str | None) -> None:
        self.change("PATCH", user, body, key)

    @precondition(lambda self: self.answered)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        (user, key), (method, body, _) = data.draw(st.sampled_from(list(self.answered.items())))
        self.change(method, user, body, key)

    @rule(user=users, size=st.integers(498, 500), method=st.sampled_from(["POST", "PATCH"]))
    def fill(self, user: str, size: int, method: str) -> None:
        others = [f"{n:03}" for n in range(500) if f"{n:03}" not in self.carts[user]]
        if lines := [line(product) for product in others[: max(size - len(self.carts[user]), 0)]]:
            self.change(method, user, lines, None)

    @rule(user=users, product=st.none() | products)
    def remove(self, user: str, product: str | None) -> None:
        removed = [one for one in self.carts[user] if product is None or one == product]
        response = self.client.delete(path(user), query_string={"product_id": product} if product else {})
        if removed:
            assert response.get_json() == {"msg": "Cart item deleted" if product else "All cart items deleted"}
        else:
            assert_problem(response, 404)
        for one in removed:
            del self.carts[user][one]

    @invariant()
    def carts_are_the_counters(self) -> None:
        for user, lines in self.carts.items():
            response = self.client.get(path(user))
            if lines:
                assert lines_of(response) == list(lines.items())
            else:
                assert_problem(response, 404, detail=EMPTY)

    def change(self, method: str, user: str, body: Any, key: str | None) -> None:
        """Send a change, and hold its answer against the model's."""
        headers = {"Idempotency-Key": key} if key else {}
        response = self.client.open(path(user), method=method, json=body, headers=headers)
        if key and (user, key) in self.answered:
            *sent, answer = self.answered[user, key]
            if sent != [method, body]:
                assert_problem(response, 422, "key_reused", KEY_REUSED)
                return
        else:
            code, answer = self.apply(method, user, body)
            if code:
                assert_problem(response, 409, code, answer)
                return
        assert (response.status_code, response.get_json()) == (200, answer)
        if key:
            self.answered[user, key] = method, body, answer

    def apply(self, method: str, user: str, body: Any) -> tuple[str, Any]:
        """Change the Counter and return "" and the answer, or leave it and return the refusal's code and detail."""
        is_list = isinstance(body, list)
        lines, answers = Counter(self.carts[user]), []
        for place, change in enumerate(body if is_list else [body]):
            where, product = f" - at `$[{place}]`" if is_list else "", change["product_id"]
            total = max(change["quantity"] + (lines[product] if method == "POST" else 0), 0)
            if total > MAX:
                return "total_too_large", f"{TOO_LARGE}{where}"
            if total and product not in lines and len(lines) == 500:
                return "cart_full", f"{FULL}{where}"
            if total:
                lines[product] = total
            else:
                del lines[product]
            answers.append({"product_id": product, "quantity": total})
        self.carts[user] = lines
        return "", answers if is_list else {"user_id": user, **answers[0]}


TestCart = CartMachine.TestCase
# A failure prints its steps, which are twelve at most. Phase.shrink would make them fewer, in minutes.
TestCart.settings = settings(max_examples=15, stateful_step_count=12, deadline=None, phases=[Phase.generate])


# The bound of 500 lines, and the largest total


@pytest.fixture
def full(client: FlaskClient) -> FlaskClient:
    """A client, and ada's cart is full: 500 lines of 2."""
    lines_of(client.post(ADA, json=[line(f"{n:03}", 2) for n in range(500)]))
    return client


REFUSED_LISTS = [
    pytest.param([line("new"), line("001", -2)], "cart_full", f"{FULL} - at `$[0]`", id="a new line first"),
    pytest.param(
        [line("002", -2), line("new"), line("gone", -1), line("newer")],
        "cart_full",
        f"{FULL} - at `$[3]`",
        id="two new",
    ),
    pytest.param([line("001"), line("002", MAX - 1)], "total_too_large", f"{TOO_LARGE} - at `$[1]`", id="one too much"),
]


@pytest.mark.parametrize(("body", "code", "detail"), REFUSED_LISTS)
def test_a_list_that_a_cart_cannot_take_is_refused_whole(full: FlaskClient, body: Any, code: str, detail: str) -> None:
    assert_problem(full.post(ADA, json=body), 409, code, detail)

    assert stored() == [("ada", f"{n:03}", 2) for n in range(500)]


def test_a_full_cart_takes_a_new_line_for_one_that_the_same_list_takes_away(full: FlaskClient) -> None:
    changes = [line("001"), line("gone", -1), line("002", -9), line("new"), line("new", -1), line("newer")]

    response = full.post(ADA, json=changes)

    assert lines_of(response) == [("001", 3), ("gone", 0), ("002", 0), ("new", 1), ("new", 0), ("newer", 1)]
    assert len(stored()) == 500


# Keys


@pytest.mark.parametrize("method", ["POST", "PATCH"])
@pytest.mark.parametrize("key", ["k" * 255, " ~,;"])
def test_a_key_may_be_quoted_and_its_change_written_in_another_way(client: FlaskClient, method: str, key: str) -> None:
    first = client.open(ADA, method=method, json=line("p", 2), headers={"Idempotency-Key": key})
    body = b'{"quantity": 2.0, "product_id": "\\u0070", "x": 1}'
    quoted = {"Idempotency-Key": f'"{key}"', "Content-Type": "application/json"}

    assert client.open(ADA, method=method, data=body, headers=quoted).get_json() == first.get_json()
    assert stored() == [("ada", "p", 2)]


@pytest.mark.parametrize(
    ("method", "body"),
    [("POST", line("p", 2)), ("POST", line("q")), ("POST", [LINE]), ("PATCH", LINE), ("PATCH", [LINE])],
    ids=["another quantity", "another product", "a list", "a set", "a list that is set"],
)
def test_a_key_is_refused_with_another_method_or_body(client: FlaskClient, method: str, body: Any) -> None:
    client.post(ADA, json=LINE, headers=KEY)

    assert_problem(client.open(ADA, method=method, json=body, headers=KEY), 422, "key_reused", KEY_REUSED)
    assert stored() == [("ada", "p", 1)]


def test_a_late_retry_of_a_set_changes_nothing(client: FlaskClient) -> None:
    client.patch(ADA, json=line("p", 3), headers=KEY)
    client.patch(ADA, json=line("p", 0), headers=OTHER_KEY)

    late = client.patch(ADA, json=line("p", 3), headers=KEY)

    assert late.get_json() == {"user_id": "ada", "product_id": "p", "quantity": 3}
    assert stored() == []


def test_a_refused_change_leaves_its_key_unused(full: FlaskClient) -> None:
    assert_problem(full.post(ADA, json=LINE, headers=KEY), 409, "cart_full", FULL)
    full.delete(ADA)

    assert full.post(ADA, json=LINE, headers=KEY).status_code == 200
    assert stored() == [("ada", "p", 1)]


@pytest.mark.parametrize(("age", "total"), [("0:00", 1), ("23:59", 1), ("24:01", 2)])
def test_a_key_counts_for_a_day(client: FlaskClient, age: str, total: int) -> None:
    client.post(ADA, json=LINE, headers=KEY)
    execute("UPDATE idempotency_keys SET created_at = now() - %(age)s::interval", age=age)

    answers = [client.post(ADA, json=LINE, headers=KEY).get_json()["quantity"] for _ in range(2)]

    assert answers == [total, total]
    assert stored() == [("ada", "p", total)]


# Bad input: a 4xx with a problem document, and nothing has changed

BAD_BODIES = [
    pytest.param(400, b"", id="empty"),
    pytest.param(400, b'{"product_id": "\xff", "quantity": 1}', id="not UTF-8"),
    pytest.param(400, b'{"product_id": "p", "quantity": 1, "x": "\xff"}', id="not UTF-8 in an unknown member"),
    pytest.param(400, b'{"product_id": "\\ud800", "quantity": 1}', id="lone surrogate"),
    pytest.param(400, b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", id="nested deep in an unknown member"),
    pytest.param(422, b"[" * 8_000 + b"]" * 8_000, id="nested deep"),
    pytest.param(422, b"[]", id="empty list"),
    pytest.param(
        422, b"[" + b'{"product_id": "p", "quantity": 1},' * 500 + b'{"product_id": "p", "quantity": 1}]', id="501"
    ),
    pytest.param(422, b'{"quantity": 1}', id="no product"),
    pytest.param(422, b'{"product_id": "p"}', id="no quantity"),
    pytest.param(422, b'{"product_id": 1, "quantity": 1}', id="a number as a product"),
    pytest.param(422, b'{"product_id": "", "quantity": 1}', id="empty product"),
    pytest.param(422, b'{"product_id": "%b", "quantity": 1}' % (b"p" * 256), id="long product"),
    pytest.param(422, b'{"product_id": "a\\u0000b", "quantity": 1}', id="NUL"),
    pytest.param(422, b'{"product_id": "p", "quantity": true}', id="true"),
    pytest.param(422, b'{"product_id": "p", "quantity": "1"}', id="a text as a quantity"),
    pytest.param(422, b'{"product_id": "p", "quantity": 1.5}', id="one and a half"),
    pytest.param(422, b'{"product_id": "p", "quantity": 2147483648}', id="too much"),
]
BAD_QUERIES = [
    *[(422, query) for query in ("product_id=", "product_id=%00", f"product_id={'p' * 256}", "product_id", "&", "=")],
    *[(422, query) for query in ("product=p", "product_id=p&product_id=q", "product_id=p&x=1")],
    (400, "product_id=%ff"),
    (404, "product_id=\xff"),
]
BAD_PATHS = [
    *[(400, target) for target in ("/cart/users/%ff", "/cart/users/%ed%a0%80", "/cart/users/%ef%bf%bd")],
    *[(422, target) for target in ("/cart/users/a%00", f"/cart/users/{'x' * 256}")],
    *[(404, target) for target in ("/", "/static/x", "/cart/users", "/cart/users/", "/cart/users/a/b")],
    *[(404, target) for target in ("/cart/users/a%2Fb", "/cart/users/%2F", "/cart//users/ada", "/cart/users//ada")],
    (404, "//cart/users/ada"),
]


@pytest.fixture
def unchanged(client: FlaskClient) -> Any:
    """A cart of ada, which is as it was when the test is over."""
    client.post(ADA, json=LINE)
    yield
    assert stored() == [("ada", "p", 1)]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("method", ["POST", "PATCH"])
@pytest.mark.parametrize(("status", "body"), BAD_BODIES)
def test_a_bad_body_is_refused(client: FlaskClient, method: str, status: int, body: bytes) -> None:
    assert_problem(client.open(ADA, method=method, data=body, content_type="application/json"), status)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("method", "quantity"),
    [
        ("POST", "0"),
        ("POST", "-0.0"),
        ("POST", "-2147483649"),
        ("PATCH", "-1"),
        ("PATCH", "-1.0"),
        ("PATCH", "2147483648.0"),
    ],
)
def test_a_quantity_out_of_range_is_refused(client: FlaskClient, method: str, quantity: str) -> None:
    body = f'{{"product_id": "p", "quantity": {quantity}}}'

    assert_problem(client.open(ADA, method=method, data=body, content_type="application/json"), 422)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("media", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_must_be_said_to_be_json(client: FlaskClient, media: str | None) -> None:
    assert_problem(client.post(ADA, data=b'{"product_id": "p", "quantity": 1}', content_type=media), 415)


@pytest.mark.usefixtures("unchanged")
def test_a_body_of_1_mib_and_a_byte_is_refused(client: FlaskClient) -> None:
    body = b'{"product_id": "p", "quantity": 1}'.ljust(1024 * 1024 + 1)

    assert_problem(client.post(ADA, data=body, content_type="application/json"), 413)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(("status", "query"), BAD_QUERIES)
def test_a_bad_query_is_refused(client: FlaskClient, status: int, query: str) -> None:
    assert_problem(client.delete(ADA, query_string=query), status)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize(("status", "target"), BAD_PATHS)
def test_a_bad_path_is_refused(client: FlaskClient, method: str, status: int, target: str) -> None:
    assert_problem(client.open(target, method=method, json=LINE), status)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("method", ["POST", "PATCH"])
@pytest.mark.parametrize("key", ["", " ", '""', '" "', "k" * 256, "é", "\t", "\x7f"])
def test_a_bad_key_is_refused(client: FlaskClient, method: str, key: str) -> None:
    assert_problem(client.open(ADA, method=method, json=LINE, headers={"Idempotency-Key": key}), 400)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("method", ["PUT", "BREW"])
def test_another_method_is_refused_and_told_which_there_are(client: FlaskClient, method: str) -> None:
    response = client.open(ADA, method=method, json=LINE)

    assert_problem(response, 405)
    assert set(response.headers["Allow"].split(", ")) == {"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST"}


def test_a_body_has_whole_numbers_as_json_allows_them_and_1_mib(client: FlaskClient) -> None:
    body = b'[{"product_id": "p", "quantity": 2.0}, {"product_id": "p", "quantity": 1e2, "else": null}]'

    response = client.post(ADA, data=body.ljust(1024 * 1024), content_type="application/json; charset=utf-8")

    assert lines_of(response) == [("p", 2), ("p", 102)]
    assert b"." not in response.data


# The model of SQLAlchemy


def test_the_model_is_the_schema() -> None:
    inspector, model, dialect = sa.inspect(ENGINE), cart.CartItem.__table__, ENGINE.dialect
    columns = inspector.get_columns("cart_items")
    [of_schema, of_model] = [
        [(one["name"], one["type"].compile(dialect), one["nullable"]) for one in columns],
        [(one.name, one.type.compile(dialect), one.nullable) for one in model.columns],
    ]

    assert of_model == of_schema
    assert [one.name for one in model.primary_key] == inspector.get_pk_constraint("cart_items")["constrained_columns"]
