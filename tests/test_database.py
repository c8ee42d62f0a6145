"""How a statement reaches PostgreSQL that is well: database.py. What PostgreSQL suffers is in test_postgres_faults.py.

Kept here: one hot or held cart does not stop the others, and reads need none of its places. Under overload requests are
served in their order. Rights and settings that are missing are noticed by /healthz. A migration or a failover costs one
error. A 503 says whether a change may have been made; what only a fault of the service can cause is a 500. Through a
pooler nothing is prepared.
"""

import contextlib
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flask.testing import FlaskClient
from gevent.lock import BoundedSemaphore

import database
from settings import SETTINGS
from tests.helpers import (
    ADA,
    BUSY,
    ENGINE,
    HERE,
    LINE,
    UNCHANGED,
    UNKNOWN,
    Service,
    assert_problem,
    await_waiting,
    eventually,
    execute,
    gunicorn,
    holding,
    line,
    lines_of,
    lock_of,
    path,
    reconnected,
    request_bytes,
    stored,
)

BODY = b'{"product_id": "p", "quantity": 1}'

# The places of a cart


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    """All places of ada's cart, and of the carts' check, are taken."""
    places = {(): BoundedSemaphore(0), ("ada",): BoundedSemaphore(0)}
    monkeypatch.setattr(database, "cart_places", places)
    monkeypatch.setattr(database, "QUEUE_TIMEOUT", 0.01)


@pytest.mark.usefixtures("crowded")
def test_reads_and_other_carts_need_no_place_of_a_crowded_cart(client: FlaskClient) -> None:
    assert client.get(ADA).status_code == 404
    assert client.post(path("bob"), json=LINE).status_code == 200


@pytest.mark.usefixtures("crowded")
def test_healthz_that_finds_no_place_is_a_429(client: FlaskClient) -> None:
    assert_problem(client.get("/healthz"), 429, detail=BUSY)


@pytest.mark.parametrize("target", ["/cart/users/ada", "//cart/users/ada", "/cart/users/%61d%61"])
def test_a_held_cart_leaves_the_others_quick(site: Service, background: ThreadPoolExecutor, target: str) -> None:
    request = request_bytes(f"POST {target}", BODY)
    with holding(lock_of("ada")):
        held = [background.submit(site.send, request) for _ in range(60)]
        for _ in range(20):
            assert site.request("POST", path("bob"), json=LINE, timeout=1).status_code == 200
            assert site.request("GET", ADA, timeout=1).status_code == 404

    assert {one.result().status_code for one in held} <= {200, 404, 429, 503}


def test_of_many_changes_of_a_held_cart_some_are_429_and_those_that_are_200_count(
    site: Service, background: ThreadPoolExecutor
) -> None:
    with holding(lock_of("ada")):
        held = [background.submit(site.post) for _ in range(60)]
        await_waiting(4)  # a quarter of the ten connections of each instance
        eventually(lambda: any(one.done() and one.result().status_code == 429 for one in held))
        assert execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")[0][0] <= 4

    answers = [one.result() for one in held]
    counted = sum(answer.status_code == 200 for answer in answers)
    assert stored() == ([("ada", "p", counted)] if counted else [])
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    for answer in refused:
        assert_problem(answer, 429, detail=BUSY)


def test_clients_of_a_held_cart_that_hang_up_leave_the_others_quick(site: Service) -> None:
    with holding(lock_of("ada")):
        for _ in range(60):
            with site.connect() as connection:
                connection.sendall(request_bytes(f"POST {ADA}", BODY))
        await_waiting(4)
        for _ in range(20):
            assert site.request("POST", path("bob"), json=LINE, timeout=1).status_code == 200

    eventually(lambda: execute("SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'") == [])
    [(ada, _, made), bob] = stored()  # what is whole is made, also if nobody waits for the answer
    assert ada == "ada" and made <= 60
    assert bob == ("bob", "p", 20)


def test_a_flood_of_healthz_leaves_the_carts_quick(site: Service, background: ThreadPoolExecutor) -> None:
    with holding(lock_of("")):  # which /healthz takes, as a slow database would hold it up
        flood = [background.submit(site.request, "GET", "/healthz") for _ in range(60)]
        await_waiting(4)
        for _ in range(20):
            assert site.request("POST", ADA, json=LINE, timeout=1).status_code == 200

    assert {one.result().status_code for one in flood} <= {200, 429, 503}


# The turn of a request


def test_requests_that_wait_for_a_connection_are_served_in_their_order(tmp_path: Path) -> None:
    users = ["ada", *(f"user {turn:02}" for turn in range(20))]
    with gunicorn(tmp_path / "log", DATABASE_POOL_SIZE="1") as service, contextlib.ExitStack() as clients:
        with holding(lock_of("ada")):
            for user in users:
                client = clients.enter_context(service.connect())
                client.sendall(request_bytes(f"POST {path(user)}", BODY))
                time.sleep(0.03)  # the next one comes later
        eventually(lambda: len(stored()) == 21)

    assert execute("SELECT user_id FROM cart_items ORDER BY added_at") == [(user,) for user in users]


# Rights


@pytest.fixture
def least_privileged() -> Iterator[None]:
    """The service in this process as a role with no more rights than the operator's document gives."""
    [rights] = re.findall(r"```sql\n(.*?)```", (HERE / "docs/operating.md").read_text(), re.DOTALL)
    execute(rights)
    with reconnected(user="shop"):
        yield
    execute("DROP OWNED BY shop; DROP ROLE shop")


@pytest.mark.usefixtures("least_privileged")
def test_four_rights_on_two_tables_are_enough(client: FlaskClient) -> None:
    assert client.post(ADA, json=[line("p", 2), line("q")], headers={"Idempotency-Key": "k"}).status_code == 200
    assert client.patch(ADA, json=line("q", 3)).status_code == 200
    assert client.delete(ADA, query_string={"product_id": "p"}).status_code == 200
    assert lines_of(client.get(ADA)) == [("q", 3)]
    assert client.get("/healthz").get_json() == {"status": "ok"}


RIGHTS = [
    f"{right} ON {table}"
    for table in ("cart_items", "idempotency_keys")
    for right in ("SELECT", "INSERT", "UPDATE", "DELETE")
]


@pytest.mark.usefixtures("least_privileged")
@pytest.mark.parametrize("right", RIGHTS)
def test_healthz_is_503_if_a_right_is_missing(client: FlaskClient, right: str) -> None:
    execute(f"REVOKE {right} FROM shop")

    assert_problem(client.get("/healthz"), 503, "unchanged", UNCHANGED)


@pytest.mark.parametrize("setting", ["default_transaction_read_only=on", "search_path=nowhere"])
def test_healthz_is_503_and_livez_200_if_the_carts_cannot_be_used(client: FlaskClient, setting: str) -> None:
    with reconnected(f"-c {setting}"):
        assert_problem(client.get("/healthz"), 503, "unchanged", UNCHANGED)
        assert client.get("/livez").get_json() == {"status": "ok"}


# The parameters of a connection


def test_what_a_role_has_set_does_not_matter() -> None:
    settings = {"default_transaction_isolation": "serializable", "lock_timeout": "50s", "statement_timeout": "50s"}
    for name, value in settings.items():
        execute(f"ALTER ROLE postgres SET {name} = '{value}'")
    try:
        with reconnected(), contextlib.closing(ENGINE.raw_connection()) as connection:
            cursor = connection.cursor()
            cursor.execute(f"SELECT {', '.join(f'current_setting({name!r})' for name in settings)}")
            assert cursor.fetchone() == ("read committed", "0", "2s")
            assert database.execute("SHOW statement_timeout") == [("0",)]  # of a command
    finally:
        execute("ALTER ROLE postgres RESET ALL")


@pytest.mark.parametrize("is_prepared", [True, False])
def test_statements_are_prepared_unless_a_setting_says_otherwise(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, is_prepared: bool
) -> None:
    monkeypatch.setattr(SETTINGS, "database_prepare", is_prepared)
    with reconnected(application_name="checked"):
        changed = client.post(ADA, json=[line("'%s$1", 3), line("q", 1)], headers={"Idempotency-Key": "k"})
        removed = client.delete(ADA, query_string={"product_id": "q"})
        assert [changed.status_code, removed.status_code, client.get("/healthz").status_code] == [200, 200, 200]
        assert lines_of(client.get(ADA)) == [("'%s$1", 3)]

        sent = execute("SELECT query FROM pg_stat_activity WHERE application_name = 'checked'")
        with contextlib.closing(ENGINE.raw_connection()) as connection:
            cursor = connection.cursor()
            cursor.execute("SELECT count(*) FROM pg_prepared_statements")
            [(prepared,)] = cursor.fetchall()
    assert [query.split()[0] for (query,) in sent] == ["EXECUTE" if is_prepared else "SELECT"]
    assert prepared == (len(database.STATEMENTS) if is_prepared else 0)


# Errors


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


def test_a_statement_that_the_server_ends_has_changed_nothing(client: FlaskClient) -> None:
    with reconnected("-c statement_timeout=50ms"), holding(lock_of("ada")):
        assert_problem(client.post(ADA, json=LINE), 503, "unchanged", UNCHANGED)

    assert stored() == []


@pytest.mark.parametrize(("method", "code", "detail"), [("POST", "unknown", UNKNOWN), ("GET", "unchanged", UNCHANGED)])
def test_a_connection_that_is_lost_leaves_open_whether_a_change_was_made(
    client: FlaskClient, method: str, code: str, detail: str
) -> None:
    with reconnected(application_name="lost"):
        client.get(ADA)
        execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'lost'")

        assert_problem(client.open(ADA, method=method, json=LINE), 503, code, detail)


@pytest.mark.parametrize("check", ["product_id <> 'p'", "1 / (char_length(product_id) - 1) > 0"])
def test_an_error_that_no_route_expects_is_a_500(client: FlaskClient, check: str) -> None:
    execute(f"ALTER TABLE cart_items ADD CONSTRAINT odd CHECK ({check})")
    try:
        assert_problem(client.post(ADA, json=LINE), 500)
    finally:
        execute("ALTER TABLE cart_items DROP CONSTRAINT odd")
    assert stored() == []
