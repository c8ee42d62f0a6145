"""The cart in the process: what changes and reads do, and what is refused. It takes seconds.

Kept here: adds, takes and sets count. A list is made whole or not at all, in its order. A cart has its lines in the
order in which they were added, and a line's total is 1 to 2147483647. A change with a key counts once in 24 hours. Bad
input of any kind is a 4xx, and a refused request has changed nothing. Ids are compared exactly.
"""

import json
from collections import Counter
from unittest import mock

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import cart
from tests.helpers import ADA, KEY, LINE, MAX, URL, Postgres, assert_problem, line, lines_of, path

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


# Any changes, at random

USERS = ["ada", "Ada", "e\u0301", '%41 é+b?c#d"\\%(user)s\r\n']  # alike, or special somewhere
PRODUCTS = ["a", "A", "é/%41+b?c#d", "'; DROP TABLE cart_items; --%s", "e\u0301\r\n\u202e\uffff", " ", " 😀 "]
FEW = 4


class CartMachine(RuleBasedStateMachine):
    """Carts of a few lines at most, each beside a Counter, whose keys keep the order in which they were added.

    An example is a new CartMachine: Hypothesis calls up to twelve of the methods with @rule, in a random order and with
    random values, and the invariant after each. The others are helpers.
    """

    users = st.sampled_from(USERS)
    products = st.sampled_from(PRODUCTS)
    additions = st.builds(line, products, st.sampled_from([-MAX, -3, -2, -1, 1, 2, 3, MAX]))
    new_quantities = st.builds(line, products, st.sampled_from([0, 1, 2, 3, MAX]))

    def __init__(self):
        super().__init__()
        Postgres(URL).empty()  # the fixtures run once for all examples
        self.client = cart.app.test_client()
        self.carts = {user: Counter() for user in USERS}
        self.few_lines = mock.patch.object(cart, "MAX_LINES", FEW)
        self.few_lines.start()

    def teardown(self):
        self.few_lines.stop()

    @rule(user=users, changes=st.lists(additions, min_size=1, max_size=5))
    def add(self, user, changes):
        self.change("POST", user, changes)

    @rule(user=users, changes=st.lists(new_quantities, min_size=1, max_size=5))
    def set(self, user, changes):
        self.change("PATCH", user, changes)

    def change(self, method, user, changes):
        """Send a list of changes, and make them in the Counter too, as change_cart in schema.sql says."""
        response = self.client.open(path(user), method=method, json=changes)
        lines, answers = Counter(self.carts[user]), []
        for place, change in enumerate(changes):
            product = change["product_id"]
            before = lines[product] if method == "POST" else 0
            total = max(before + change["quantity"], 0)
            if total > MAX:
                return self.assert_refused(response, "total_too_large", place)
            if total and product not in lines and len(lines) == FEW:
                return self.assert_refused(response, "cart_full", place)
            if total:
                lines[product] = total  # a new one comes last, another stays at its place
            else:
                lines.pop(product, None)
            answers.append((product, total))
        assert lines_of(response) == answers
        self.carts[user] = lines

    def assert_refused(self, response, code, place):
        """Assert that a list is refused because of the change at this place of it."""
        assert_problem(response, 409, code)
        assert response.get_json()["detail"].endswith(f" - at `$[{place}]`")

    @rule(user=users, product=products)
    def remove(self, user, product):
        response = self.client.delete(path(user), query_string={"product_id": product})
        if self.carts[user].pop(product, None):
            assert response.get_json() == {"msg": "Cart item deleted"}
        else:
            assert_problem(response, 404)

    @rule(user=users)
    def empty(self, user):
        response = self.client.delete(path(user))
        if self.carts[user]:
            assert response.get_json() == {"msg": "All cart items deleted"}
        else:
            assert_problem(response, 404)
        self.carts[user].clear()

    @invariant()
    def carts_are_the_counters(self):
        for user, lines in self.carts.items():
            response = self.client.get(path(user))
            if lines:
                assert lines_of(response) == list(lines.items())
            else:
                assert_problem(response, 404)


TestCart = CartMachine.TestCase  # which pytest runs
# A failure prints the rules that ran. Phase.shrink would make them fewer, in minutes.
TestCart.settings = settings(max_examples=30, stateful_step_count=12, deadline=None, phases=[Phase.generate])


def test_a_line_that_a_list_takes_away_makes_room_in_it(client, monkeypatch):
    monkeypatch.setattr(cart, "MAX_LINES", 2)
    client.post(ADA, json=line("a"))

    response = client.post(ADA, json=[line("b"), line("a", -1), line("c")])

    assert lines_of(response) == [("b", 1), ("a", 0), ("c", 1)]


# Keys


@pytest.mark.parametrize("method", ["POST", "PATCH"])
@pytest.mark.parametrize("key", ["k" * 255, " ~,;"])
def test_a_change_with_a_key_counts_once_and_the_key_may_be_quoted(client, postgres, method, key):
    first = client.open(ADA, method=method, json=LINE, headers={"Idempotency-Key": key})
    again = client.open(ADA, method=method, json=LINE, headers={"Idempotency-Key": f'"{key}"'})

    assert again.get_json() == first.get_json() == {"user_id": "ada", "product_id": "p", "quantity": 1}
    assert postgres.stored() == [("ada", "p", 1)]


def test_a_change_with_a_key_may_be_written_in_another_way(client, postgres):
    client.post(ADA, json=line("p", 2), headers=KEY)

    body = b'{"quantity": 2.0, "product_id": "\\u0070", "else": 1}'
    again = client.post(ADA, data=body, headers=KEY, content_type="application/json")

    assert again.get_json()["quantity"] == 2
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
    assert client.post(ADA, json=LINE, headers=KEY).get_json()["quantity"] == total  # it is new, or still counts


# Bad input


@pytest.fixture
def unchanged_cart(client, postgres):
    """A cart of ada's, which must be as it was when the test is over."""
    client.post(ADA, json=LINE)
    yield
    assert postgres.stored() == [("ada", "p", 1)]


BAD_BODIES = {
    "empty": (400, b""),
    "not UTF-8": (400, b'{"product_id": "\xff", "quantity": 1}'),
    "not UTF-8 in an unknown member": (400, b'{"product_id": "p", "quantity": 1, "x": "\xff"}'),
    "a lone surrogate": (400, b'{"product_id": "\\ud800", "quantity": 1}'),
    "too deep for Python in an unknown member": (400, b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a list in a list": (422, b"[[]]"),
    "501 changes": (422, json.dumps([LINE] * 501).encode()),
    "no product": (422, b'{"quantity": 1}'),
    "a long product": (422, json.dumps(line("p" * 256)).encode()),
    "NUL": (422, json.dumps(line("a\0b")).encode()),
    "one and a half": (422, b'{"product_id": "p", "quantity": 1.5}'),
    "too much": (422, b'{"product_id": "p", "quantity": 2147483648}'),
    "too much, as a float": (422, b'{"product_id": "p", "quantity": 2147483648.0}'),
    "too little": (422, b'{"product_id": "p", "quantity": -2147483649}'),
    "1 MiB and a byte": (413, json.dumps(LINE).encode().ljust(1024 * 1024 + 1)),
}
BAD_PATHS = {
    "not UTF-8": (400, "/cart/users/%ff"),
    "a surrogate": (400, "/cart/users/%ed%a0%80"),
    "U+FFFD": (400, "/cart/users/%ef%bf%bd"),
    "NUL": (422, "/cart/users/a%00"),
    "a long id": (422, f"/cart/users/{'x' * 256}"),
    "no id": (404, "/cart/users/"),
    "an empty part before an id": (404, "/cart/users//ada"),
    "a slash in an id": (404, "/cart/users/a%2Fb"),
    "a file": (404, "/static/x"),
}
BAD_QUERIES = [
    "product_id=",
    "product_id=%00",
    f"product_id={'p' * 256}",
    "product_id",
    "&",
    "product=p",
    "product_id=p&product_id=q",
    "product_id=p&x=1",
]


@pytest.mark.parametrize("method", ["POST", "PATCH"])
@pytest.mark.parametrize(("status", "body"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_bad_body_is_refused(client, unchanged_cart, method, status, body):
    assert_problem(client.open(ADA, method=method, data=body, content_type="application/json"), status)


@pytest.mark.parametrize(("method", "quantity"), [("POST", 0), ("POST", -0.0), ("PATCH", -1), ("PATCH", -1.0)])
def test_nothing_cannot_be_added_and_less_cannot_be_set(client, unchanged_cart, method, quantity):
    assert_problem(client.open(ADA, method=method, json=line("p", quantity)), 422)


@pytest.mark.parametrize("media", [None, "application/json-seq"])
def test_a_body_must_be_said_to_be_json(client, unchanged_cart, media):
    assert_problem(client.post(ADA, data=json.dumps(LINE), content_type=media), 415)


@pytest.mark.parametrize("method", ["GET", "POST", "PATCH", "DELETE"])
@pytest.mark.parametrize(("status", "target"), BAD_PATHS.values(), ids=BAD_PATHS)
def test_a_bad_path_is_refused(client, unchanged_cart, method, status, target):
    assert_problem(client.open(target, method=method, json=LINE), status)


@pytest.mark.parametrize("query", BAD_QUERIES)
def test_a_query_must_hold_one_product_and_nothing_else(client, unchanged_cart, query):
    assert_problem(client.delete(ADA, query_string=query), 422)


@pytest.mark.parametrize("key", [" ", '""', '" "', "k" * 256, "ké", "k\tk", "k\x7f"])
def test_a_bad_key_is_refused(client, unchanged_cart, key):
    assert_problem(client.post(ADA, json=LINE, headers={"Idempotency-Key": key}), 400)


def test_another_method_is_refused_and_told_which_there_are(client, unchanged_cart):
    response = client.put(ADA, json=LINE)

    assert_problem(response, 405)
    assert set(response.headers["Allow"].split(", ")) == {"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST"}


# What only looks bad


def test_quantities_are_whole_numbers_as_json_may_write_them(client):
    body = b'[{"product_id": "p", "quantity": 2.0}, {"product_id": "p", "quantity": 1e2}]'

    response = client.post(ADA, data=body, content_type="application/json; charset=utf-8")

    assert response.text == '[{"product_id":"p","quantity":2},{"product_id":"p","quantity":102}]'


def test_a_body_may_have_1_mib_and_members_that_are_ignored(client):
    body = b'{"product_id": "p", "quantity": 1, "else": null}'.ljust(1024 * 1024)

    assert client.post(ADA, data=body, content_type="application/json").status_code == 200
