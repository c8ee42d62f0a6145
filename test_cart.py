"""The cart in the process: what changes and reads do, and what is refused. It takes seconds.

Kept here: adds, takes and sets count. A list is made whole or not at all, in its order. A cart has its lines in the
order in which they were added, and a line's total is 1 to 2147483647. A change with a key counts once in 24 hours. Bad
input of any kind is a 4xx, and a refused request has changed nothing. Ids are compared exactly.
"""

from collections import Counter
from unittest import mock

import pytest
import sqlalchemy as sa
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import cart
from tests.helpers import ADA, ENGINE, KEY, LINE, MAX, URL, Postgres, assert_problem, line, lines_of, path

# Adding and setting


def test_adding_the_same_product_sums_its_quantities(client):
    client.post(ADA, json=line("sku-1", 2))

    response = client.post(ADA, json=line("sku-1", 3))

    assert response.get_json() == {"user_id": "ada", "product_id": "sku-1", "quantity": 5}
    assert lines_of(client.get(ADA)) == [("sku-1", 5)]


def test_setting_makes_the_total_what_it_says(client):
    client.post(ADA, json=line("sku-1", 2))

    response = client.patch(ADA, json=line("sku-1", 3))

    assert response.get_json() == {"user_id": "ada", "product_id": "sku-1", "quantity": 3}
    assert lines_of(client.get(ADA)) == [("sku-1", 3)]


def test_a_list_is_changed_in_its_order(client):
    client.post(ADA, json=line("p", 1))

    response = client.post(ADA, json=[line("q", 2), line("p", -1), line("p", 4), line("q", 1), line("r", -1)])

    assert lines_of(response) == [("q", 2), ("p", 0), ("p", 4), ("q", 3), ("r", 0)]
    assert lines_of(client.get(ADA)) == [("q", 3), ("p", 4)]


# Any changes, at random

USERS = ["ada", "Ada", "e\u0301", '%41 é+b?c#d"\\%(user)s\r\n']  # alike, or special somewhere
PRODUCTS = ["a", "A", "é/%41+b?c#d", "'; DROP TABLE cart_items; --%s", "e\u0301\r\n\u202e\uffff", " ", " 😀 "]


class CartMachine(RuleBasedStateMachine):
    """Carts of four lines at most, each beside a Counter, whose keys keep the order in which they were added."""

    users, products = st.sampled_from(USERS), st.sampled_from(PRODUCTS)
    amounts, totals = st.sampled_from([-MAX, -3, -2, -1, 1, 2, 3, MAX]), st.sampled_from([0, 1, 2, 3, MAX])

    def __init__(self):
        super().__init__()
        Postgres(URL).empty()
        self.client, self.carts = cart.app.test_client(), {user: Counter() for user in USERS}
        self.few_lines = mock.patch.object(cart, "MAX_LINES", 4)
        self.few_lines.start()

    def teardown(self):
        self.few_lines.stop()

    @rule(user=users, changes=st.lists(st.builds(line, products, amounts), min_size=1, max_size=5))
    def add(self, user, changes):
        self.change("POST", user, changes)

    @rule(user=users, changes=st.lists(st.builds(line, products, totals), min_size=1, max_size=5))
    def set(self, user, changes):
        self.change("PATCH", user, changes)

    def change(self, method, user, changes):
        """Send a list of changes, and make them in the Counter too, unless one must be refused."""
        response = self.client.open(path(user), method=method, json=changes)
        lines, answers = Counter(self.carts[user]), []
        for place, change in enumerate(changes):
            product = change["product_id"]
            total = max(change["quantity"] + (lines[product] if method == "POST" else 0), 0)
            if total > MAX:
                return self.assert_refused(response, "total_too_large", place)
            if total and product not in lines and len(lines) == 4:
                return self.assert_refused(response, "cart_full", place)
            lines[product] = total
            if total == 0:
                del lines[product]
            answers.append((product, total))
        assert lines_of(response) == answers
        self.carts[user] = lines

    def assert_refused(self, response, code, place):
        """Assert that a list is refused because of the change at this place of it."""
        assert_problem(response, 409, code)
        assert response.get_json()["detail"].endswith(f" - at `$[{place}]`")

    @rule(user=users, product=st.none() | products)
    def remove(self, user, product):
        removed = [one for one in self.carts[user] if product in (None, one)]
        response = self.client.delete(path(user), query_string={"product_id": product} if product else {})
        if removed:
            assert response.get_json() == {"msg": "Cart item deleted" if product else "All cart items deleted"}
        else:
            assert_problem(response, 404)
        for one in removed:
            del self.carts[user][one]

    @invariant()
    def carts_are_the_counters(self):
        for user, lines in self.carts.items():
            response = self.client.get(path(user))
            if lines:
                assert lines_of(response) == list(lines.items())
            else:
                assert_problem(response, 404)


TestCart = CartMachine.TestCase
# A failure prints its steps, which are twelve at most. Phase.shrink would make them fewer, in minutes.
TestCart.settings = settings(max_examples=40, stateful_step_count=12, deadline=None, phases=[Phase.generate])


# Keys


@pytest.mark.parametrize("method", ["POST", "PATCH"])
@pytest.mark.parametrize("key", ["k" * 255, " ~,;"])
def test_a_key_may_be_quoted_and_its_change_written_in_another_way(client, postgres, method, key):
    first = client.open(ADA, method=method, json=line("p", 2), headers={"Idempotency-Key": key})

    body = b'{"quantity": 2.0, "product_id": "\\u0070", "x": 1}'
    quoted = {"Idempotency-Key": f'"{key}"', "Content-Type": "application/json"}
    assert client.open(ADA, method=method, data=body, headers=quoted).get_json() == first.get_json()
    assert postgres.stored() == [("ada", "p", 2)]


OTHER_CHANGES = {
    "another quantity": ("POST", line("p", 2)),
    "another product": ("POST", line("q")),
    "a list": ("POST", [LINE]),
    "a set": ("PATCH", LINE),
    "a list that is set": ("PATCH", [LINE]),
}


@pytest.mark.parametrize(("method", "body"), OTHER_CHANGES.values(), ids=OTHER_CHANGES)
def test_a_key_is_refused_with_another_method_or_body(client, postgres, method, body):
    client.post(ADA, json=LINE, headers=KEY)

    assert_problem(client.open(ADA, method=method, json=body, headers=KEY), 422, "key_reused")
    assert postgres.stored() == [("ada", "p", 1)]


def test_a_refused_change_leaves_its_key_unused(client):
    client.post(ADA, json=line("p", MAX))
    assert_problem(client.post(ADA, json=LINE, headers=KEY), 409, "total_too_large")
    client.delete(ADA)

    assert client.post(ADA, json=LINE, headers=KEY).get_json()["quantity"] == 1


@pytest.mark.parametrize(("age", "total"), [("0:00", 1), ("23:59", 1), ("24:01", 2)])
def test_a_key_counts_for_a_day(client, postgres, age, total):
    client.post(ADA, json=LINE, headers=KEY)
    postgres.execute("UPDATE idempotency_keys SET created_at = now() - %(age)s::interval", age=age)

    assert client.post(ADA, json=LINE, headers=KEY).get_json()["quantity"] == total
    assert client.post(ADA, json=LINE, headers=KEY).get_json()["quantity"] == total


# Bad input


@pytest.fixture
def ada(client, postgres):
    """A client, and a cart of ada's, which is as it was when the test is over."""
    client.post(ADA, json=LINE)
    yield client
    assert postgres.stored() == [("ada", "p", 1)]


BAD_BODIES = {
    "empty": (400, b""),
    "not UTF-8": (400, b'{"product_id": "\xff", "quantity": 1}'),
    "not UTF-8 in an unknown member": (400, b'{"product_id": "p", "quantity": 1, "x": "\xff"}'),
    "lone surrogate": (400, b'{"product_id": "\\ud800", "quantity": 1}'),
    "nested deep in an unknown member": (400, b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "nested deep": (422, b"[" * 8_000 + b"]" * 8_000),
    "501 changes": (422, b"[" + b'{"product_id": "p", "quantity": 1},' * 500 + b'{"product_id": "p", "quantity": 1}]'),
    "no product": (422, b'{"quantity": 1}'),
    "long product": (422, b'{"product_id": "%b", "quantity": 1}' % (b"p" * 256)),
    "NUL": (422, b'{"product_id": "a\\u0000b", "quantity": 1}'),
    "one and a half": (422, b'{"product_id": "p", "quantity": 1.5}'),
    "too much": (422, b'{"product_id": "p", "quantity": 2147483648}'),
    "too much, as a float": (422, b'{"product_id": "p", "quantity": 2147483648.0}'),
    "too little": (422, b'{"product_id": "p", "quantity": -2147483649}'),
    "1 MiB and a byte": (413, b'{"product_id": "p", "quantity": 1}'.ljust(1024 * 1024 + 1)),
}


@pytest.mark.parametrize("method", ["POST", "PATCH"])
@pytest.mark.parametrize(("status", "body"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_bad_body_is_refused(ada, method, status, body):
    assert_problem(ada.open(ADA, method=method, data=body, content_type="application/json"), status)


@pytest.mark.parametrize(("method", "quantity"), [("POST", 0), ("POST", -0.0), ("PATCH", -1), ("PATCH", -1.0)])
def test_nothing_cannot_be_added_and_less_cannot_be_set(ada, method, quantity):
    assert_problem(ada.open(ADA, method=method, json=line("p", quantity)), 422)


@pytest.mark.parametrize("media", [None, "text/plain", "application/json-seq"])
def test_a_body_must_be_said_to_be_json(ada, media):
    assert_problem(ada.post(ADA, data=b'{"product_id": "p", "quantity": 1}', content_type=media), 415)


NO_PRODUCT = ["product_id=", "product_id=%00", f"product_id={'p' * 256}", "product_id", "&", "=", "product=p"]
TWO_FIELDS = ["product_id=p&product_id=q", "product_id=p&x=1"]


@pytest.mark.parametrize("query", NO_PRODUCT + TWO_FIELDS)
def test_a_query_must_hold_one_product_and_nothing_else(ada, query):
    assert_problem(ada.delete(ADA, query_string=query), 422)


BAD_PATHS = {
    400: ["/cart/users/%ff", "/cart/users/%ed%a0%80", "/cart/users/%ef%bf%bd"],
    404: ["/", "/static/x", "/cart/users", "/cart/users/", "/cart//users/ada", "/cart/users//ada", "//cart/users/ada"],
    422: ["/cart/users/a%00", f"/cart/users/{'x' * 256}"],
}


@pytest.mark.parametrize("method", ["GET", "POST", "PATCH", "DELETE"])
@pytest.mark.parametrize(
    ("status", "target"), [(status, target) for status, targets in BAD_PATHS.items() for target in targets]
)
def test_a_bad_path_is_refused(ada, method, status, target):
    assert_problem(ada.open(target, method=method, json=LINE), status)


@pytest.mark.parametrize("method", ["POST", "PATCH"])
@pytest.mark.parametrize("key", ["", " ", '""', '" "', "k" * 256, "é", "\t", "\x7f"])
def test_a_bad_key_is_refused(ada, method, key):
    assert_problem(ada.open(ADA, method=method, json=LINE, headers={"Idempotency-Key": key}), 400)


def test_another_method_is_refused_and_told_which_there_are(ada):
    response = ada.put(ADA, json=LINE)

    assert_problem(response, 405)
    assert set(response.headers["Allow"].split(", ")) == {"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST"}


# What only looks odd, and the model


def test_a_body_has_whole_numbers_as_json_allows_them_and_1_mib(client):
    body = b'[{"product_id": "p", "quantity": 2.0}, {"product_id": "p", "quantity": 1e2, "else": null}]'

    response = client.post(ADA, data=body.ljust(1024 * 1024), content_type="application/json; charset=utf-8")

    assert lines_of(response) == [("p", 2), ("p", 102)]
    assert b"." not in response.data


def test_the_model_is_the_schema():
    schema = sa.Table("cart_items", sa.MetaData(), autoload_with=ENGINE)

    in_model, in_schema = (
        [(one.name, repr(one.type.as_generic()), one.nullable, one.primary_key) for one in table.columns]
        for table in (cart.CartItem.__table__, schema)
    )
    assert in_model == in_schema
