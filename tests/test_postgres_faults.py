"""What PostgreSQL may suffer: it crashes, ends sessions, is silent or slow, or one of several hosts is.

Kept here: a 200 is stored and a key counts once through crashes. While the database is down, silent or slow each
request is answered within 10 seconds, and is served again as soon as it is back, with no restart. Under overload
requests are served or refused, and no connection is thrown away.
"""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers import (
    MAX,
    UNCHANGED,
    UNKNOWN,
    Postgres,
    Shoppers,
    Site,
    assert_problem,
    at_once,
    eventually,
    gunicorn,
    line,
)


def stored_of(postgres: Postgres, name: str) -> int:
    """Return how much shoppers with a name have in their carts."""
    sql = "SELECT coalesce(sum(quantity), 0)::integer FROM cart_items WHERE user_id LIKE %(users)s"
    [(total,)] = postgres.execute(sql, users=f"{name} %")
    return int(total)


@pytest.mark.parametrize("fault", ["crash_and_recover", "end_sessions"])
def test_with_a_key_each_addition_counts_once_through_faults(postgres: Postgres, on_postgres: Site, fault: str) -> None:
    with Shoppers(on_postgres, 24, f"keyed {fault}", with_keys=True) as shoppers:
        shoppers.await_answers(100)
        getattr(postgres, fault)()
        shoppers.await_answers(100)

    assert stored_of(postgres, f"keyed {fault}") == len(shoppers.answers)


@pytest.mark.parametrize("fault", ["crash_and_recover", "end_sessions"])
def test_a_200_is_stored_and_a_503_says_what_is_known_through_faults(
    postgres: Postgres, on_postgres: Site, fault: str
) -> None:
    with Shoppers(on_postgres, 16, f"plain {fault}") as shoppers:
        shoppers.await_answers(100)
        getattr(postgres, fault)()
        shoppers.await_answers(100)

    made, unknown = shoppers.codes["made"], shoppers.codes["unknown"]
    assert shoppers.codes.keys() <= {"made", "unchanged", "unknown"}
    assert made <= stored_of(postgres, f"plain {fault}") <= made + unknown
    assert len(postgres.sessions()) <= 5


def test_while_it_is_down_each_request_is_a_503_and_then_all_is_as_before(
    postgres: Postgres, on_postgres: Site
) -> None:
    on_postgres.post("down")
    postgres.crash()
    try:
        lost, refused = on_postgres.post("down"), on_postgres.post("down")
    finally:
        postgres.start()

    assert_problem(lost, 503, "unknown", UNKNOWN)  # over a connection that is not known to be lost
    assert_problem(refused, 503, "unchanged", UNCHANGED)
    assert on_postgres.post("down").json()["quantity"] == 2


def test_sessions_that_ended_while_idle_cost_one_error(postgres: Postgres, on_postgres: Site) -> None:
    assert [one.status_code for one in at_once(on_postgres.post, [f"idle {n}" for n in range(5)])] == [200] * 5

    postgres.end_sessions()

    assert_problem(on_postgres.post("idle"), 503, "unknown", UNKNOWN)
    assert [on_postgres.post("idle").status_code for _ in range(3)] == [200, 200, 200]


@pytest.fixture
def slow(postgres: Postgres) -> Iterator[None]:
    """Each new line takes a quarter of a second."""
    postgres.execute(
        "CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.25); RETURN NEW; END';"
        "CREATE TRIGGER pause BEFORE INSERT ON cart_items FOR EACH ROW EXECUTE FUNCTION pause()"
    )
    yield
    postgres.execute("DROP FUNCTION pause CASCADE")


@pytest.mark.usefixtures("slow")
def test_under_overload_requests_are_served_or_refused_and_no_connection_is_thrown_away(
    postgres: Postgres, on_postgres: Site
) -> None:
    at_once(on_postgres.post, [f"user {n}" for n in range(10)])
    before = postgres.sessions()

    with Shoppers(on_postgres, 80, "overload") as shoppers:
        shoppers.await_answers(120)

    assert len(before) == 5 and postgres.sessions() == before
    assert shoppers.codes.keys() == {"made", "unchanged"}
    assert stored_of(postgres, "overload") == shoppers.codes["made"]


def test_a_refusal_by_the_database_throws_no_connection_away(postgres: Postgres, on_postgres: Site) -> None:
    on_postgres.post("rich", line("p", MAX))
    before = postgres.sessions()

    refused = at_once(on_postgres.post, ["rich"] * 20)

    assert {one.status_code for one in refused} == {409}
    assert postgres.sessions() == before


def test_a_silent_database_is_given_up_and_holds_up_nobody_else(
    postgres: Postgres, on_postgres: Site, background: ThreadPoolExecutor
) -> None:
    assert on_postgres.post("silent").status_code == 200

    with postgres.frozen():
        waiting = [background.submit(on_postgres.post, f"silent {turn}") for turn in range(32)]
        while not all(one.done() for one in waiting):
            assert on_postgres.request("GET", "/livez", timeout=2).status_code == 200
            time.sleep(0.05)  # others need the processor too

    assert {one.result().json()["code"] for one in waiting} == {"unchanged", "unknown"}
    eventually(lambda: on_postgres.post("silent").status_code == 200)


def test_of_several_hosts_a_silent_one_is_not_the_first_for_ever(tmp_path: Path, postgres: Postgres) -> None:
    several = postgres.url.replace("?host=", f"?host={tmp_path},")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{tmp_path}/.s.PGSQL.5432")
        silent.listen(200)
        with gunicorn(tmp_path / "log", DATABASE_URL=several) as service, Shoppers(service, 8, "several") as shoppers:
            shoppers.await_status(200)
