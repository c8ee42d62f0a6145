"""How a statement reaches PostgreSQL: database.py, mostly in this process. test_postgres_faults.py crashes PostgreSQL.

Kept here: one hot or held cart does not stop the others, and reads need none of its places. Requests are served in
their order. Rights and settings that are missing are noticed by /healthz. A migration or a failover costs one error. A
503 says whether a change may have been made. Through a pooler nothing is prepared.
"""

import contextlib
import re
import time

import pytest

import cart
import database
from settings import SETTINGS
from tests.helpers import (
    ADA,
    BODY,
    ENGINE,
    HERE,
    KEY,
    LINE,
    PLACES,
    assert_problem,
    eventually,
    gunicorn,
    line,
    lines_of,
    path,
    reconnected,
    request_bytes,
)

# The places of a cart


def assert_quick(site, user_id):
    """Assert that twenty adds to a cart, and twenty reads of it, are answered within a second each."""
    for _ in range(20):
        assert site.request("POST", path(user_id), json=LINE, timeout=1).status_code == 200
        assert site.request("GET", path(user_id), timeout=1).status_code == 200


def test_a_held_cart_leaves_the_others_quick_and_refuses_whom_it_has_no_place_for(site, postgres, background):
    with postgres.holding_cart("ada"):
        held = [background.submit(site.change) for _ in range(60)]
        postgres.await_waiting(PLACES)
        assert_quick(site, "bob")
        assert site.request("GET", ADA, timeout=1).status_code == 404  # to read it takes none of its places
        eventually(lambda: sum(one.done() for one in held) > 40)
        assert postgres.waiting() <= PLACES

    # After two seconds the 4 with a place are 503, at most 4 others get these places, and the other 52 or more are 429:
    # more than 40, even if some are late.
    answers = [one.result() for one in held]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) > 40
    assert_problem(refused[0], 429)
    assert postgres.total() == sum(answer.ok for answer in answers) + 20  # bob's, of assert_quick


def test_clients_of_a_held_cart_that_hang_up_leave_the_others_quick(site, postgres):
    with postgres.holding_cart("ada"):
        for _ in range(60):
            with site.connect() as connection:
                connection.sendall(request_bytes("POST", ADA, BODY))
        postgres.await_waiting(PLACES)
        assert_quick(site, "bob")

    eventually(lambda: postgres.waiting() == 0)
    # What is whole is made, also if nobody waits for the answer.
    assert {user_id for user_id, _, _ in postgres.stored()} == {"ada", "bob"}


def test_a_flood_of_healthz_leaves_the_carts_quick(site, postgres, background):
    with postgres.holding_cart(""):  # which check_carts locks, as each cart is locked by its user
        flood = [background.submit(site.request, "GET", "/healthz") for _ in range(60)]
        postgres.await_waiting(PLACES)
        assert_quick(site, "ada")

    assert {one.result().status_code for one in flood} <= {200, 429, 503}


def test_requests_that_wait_for_a_connection_are_served_in_their_order(tmp_path, postgres):
    users = ["ada", *(f"user {turn:02}" for turn in range(20))]
    with gunicorn(tmp_path / "log", DATABASE_POOL_SIZE="1") as service, contextlib.ExitStack() as clients:
        with postgres.holding_cart("ada"):
            for user in users:
                client = clients.enter_context(service.connect())
                client.sendall(request_bytes("POST", path(user), BODY))
                time.sleep(0.03)  # the next one comes later, and waits behind it for the one connection
        eventually(lambda: len(postgres.stored()) == 21)

    assert postgres.execute("SELECT user_id FROM cart_items ORDER BY added_at") == [(user,) for user in users]


# Rights


@pytest.fixture
def least_privileged(client, postgres):
    """A client of the service, which has the role `shop` that the SQL in operating.md makes, with few rights."""
    [rights] = re.findall(r"```sql\n(.*?)```", (HERE / "docs/operating.md").read_text(), re.DOTALL)
    postgres.execute(rights)
    with reconnected(user="shop"):
        yield client
    postgres.execute("DROP OWNED BY shop; DROP ROLE shop")


def test_four_rights_on_two_tables_are_enough(least_privileged):
    assert least_privileged.post(ADA, json=[line("p", 2), line("q")], headers=KEY).status_code == 200
    assert least_privileged.patch(ADA, json=line("q", 3)).status_code == 200
    assert least_privileged.delete(ADA, query_string={"product_id": "p"}).status_code == 200
    assert lines_of(least_privileged.get(ADA)) == [("q", 3)]
    assert least_privileged.get("/healthz").get_json() == {"status": "ok"}


@pytest.mark.parametrize("table", ["cart_items", "idempotency_keys"])
@pytest.mark.parametrize("right", ["SELECT", "INSERT", "UPDATE", "DELETE"])
def test_healthz_is_503_if_a_right_is_missing(least_privileged, postgres, right, table):
    postgres.execute(f"REVOKE {right} ON {table} FROM shop")

    assert_problem(least_privileged.get("/healthz"), 503, "unchanged")


@pytest.mark.parametrize("setting", ["default_transaction_read_only=on", "search_path=nowhere"])
def test_healthz_is_503_and_livez_200_if_the_carts_cannot_be_used(client, setting):
    with reconnected(options=f"-c {setting}"):
        assert_problem(client.get("/healthz"), 503, "unchanged")
        assert client.get("/livez").get_json() == {"status": "ok"}


# Connections and errors


@contextlib.contextmanager
def connection_of_the_pool():
    """Give a cursor on the pool's only connection, which the service in this process gets next.

    `reconnected` has closed the others, and one request at a time opens no second. What is SET stays: nothing is reset.
    """
    with contextlib.closing(ENGINE.raw_connection()) as connection, connection.cursor() as cursor:
        yield cursor


ROLE_SETTINGS = [
    ("default_transaction_isolation", "serializable", "read committed"),
    ("lock_timeout", "50s", "0"),
    ("statement_timeout", "50s", "2s"),
    ("row_security", "on", "off"),
    ("client_encoding", "latin1", "UTF8"),
]


@pytest.mark.parametrize(("name", "of_the_role", "shown"), ROLE_SETTINGS)
def test_what_a_role_has_set_does_not_matter(postgres, name, of_the_role, shown):
    postgres.execute(f"ALTER ROLE postgres SET {name} = '{of_the_role}'")
    try:
        with reconnected(), connection_of_the_pool() as cursor:
            cursor.execute(f"SHOW {name}")
            assert cursor.fetchone() == (shown,)
    finally:
        postgres.execute("ALTER ROLE postgres RESET ALL")


def test_a_command_may_take_its_time():
    assert database.execute("SHOW statement_timeout") == [("0",)]


@pytest.mark.parametrize(("database_prepare", "prepared"), [(True, len(database.STATEMENTS)), (False, 0)])
def test_statements_are_prepared_unless_a_setting_says_otherwise(client, monkeypatch, database_prepare, prepared):
    monkeypatch.setattr(SETTINGS, "database_prepare", database_prepare)
    with reconnected():
        assert client.get("/healthz").status_code == 200
        assert client.post(ADA, json=[line("'%s$1", 3), line("q", 1)], headers=KEY).status_code == 200
        assert client.delete(ADA, query_string={"product_id": "q"}).status_code == 200
        assert lines_of(client.get(ADA)) == [("'%s$1", 3)]  # an id that looks like a placeholder

        with connection_of_the_pool() as cursor:
            cursor.execute("SELECT count(*) FROM pg_prepared_statements")
            assert cursor.fetchall() == [(prepared,)]


def test_a_connection_that_is_outdated_by_a_migration_costs_one_error(client, postgres):
    with reconnected():
        assert client.get(ADA).status_code == 404
        postgres.execute("ALTER TABLE cart_items ALTER quantity TYPE bigint")  # the prepared read returns an integer
        try:
            assert [client.get(ADA).status_code for _ in range(3)] == [503, 404, 404]  # by a new connection
        finally:
            postgres.execute("ALTER TABLE cart_items ALTER quantity TYPE integer")


def test_a_connection_to_a_server_that_only_reads_now_costs_one_error(client):
    with reconnected():
        with connection_of_the_pool() as cursor:
            cursor.execute("SET default_transaction_read_only = on")  # as after a failover, for all its statements

        assert [client.delete(ADA).status_code for _ in range(3)] == [503, 404, 404]  # by a new connection


def test_a_statement_that_the_server_ends_has_changed_nothing(client, postgres):
    with reconnected(options="-c statement_timeout=50ms"), postgres.holding_cart("ada"):
        assert_problem(client.post(ADA, json=LINE), 503, "unchanged")

    assert postgres.stored() == []


@pytest.mark.parametrize(
    ("method", "code", "detail"), [("POST", "unknown", cart.UNKNOWN), ("GET", "unchanged", "Nothing was changed.")]
)
def test_a_connection_that_is_lost_leaves_open_whether_a_change_was_made(client, postgres, method, code, detail):
    with reconnected(application_name="lost"):
        client.get(ADA)
        postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'lost'")

        response = client.open(ADA, method=method, json=LINE)

    assert_problem(response, 503, code)
    assert detail in response.text
