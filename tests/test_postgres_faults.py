"""What PostgreSQL may suffer: it crashes, ends sessions, is silent or slow, or one of several hosts is.

Kept here: a 200 is stored and a key counts once through crashes. Meanwhile each request is answered within 10 seconds,
and is served again as soon as PostgreSQL is back, with no restart. No connection is thrown away under overload.
"""

import socket
import time

import pytest

from tests.helpers import MAX, FaultyPostgres, Shoppers, assert_problem, eventually, gunicorn, line


@pytest.mark.parametrize("fault", [FaultyPostgres.crash_and_recover, FaultyPostgres.end_sessions])
def test_with_a_key_each_addition_counts_once_through_faults(faulty, on_faulty, fault):
    with Shoppers(on_faulty, 24, with_keys=True) as shoppers:
        shoppers.await_answers(100)
        fault(faulty)
        shoppers.await_answers(100)

    assert faulty.total() == shoppers.codes["made"]


@pytest.mark.parametrize("fault", [FaultyPostgres.crash_and_recover, FaultyPostgres.end_sessions])
def test_a_200_is_stored_and_a_503_says_what_is_known_through_faults(faulty, on_faulty, fault):
    with Shoppers(on_faulty, 16) as shoppers:
        shoppers.await_answers(100)
        fault(faulty)
        shoppers.await_answers(100)

    assert shoppers.codes.keys() <= {"made", "unchanged", "unknown"}
    made, maybe_made = shoppers.codes["made"], shoppers.codes["unknown"]
    assert made <= faulty.total() <= made + maybe_made
    eventually(lambda: len(faulty.sessions()) <= 5)  # those that were ended are gone


def test_while_it_is_down_each_request_is_a_503_and_then_all_is_as_before(faulty, on_faulty):
    assert on_faulty.change().status_code == 200

    faulty.crash()
    try:
        lost, refused = on_faulty.change(), on_faulty.change()
    finally:
        faulty.start()

    assert_problem(lost, 503, "unknown")  # over a connection that is not known to be lost
    assert_problem(refused, 503, "unchanged")
    assert on_faulty.change().json()["quantity"] == 2


def test_sessions_that_ended_while_idle_cost_one_error(faulty, on_faulty, background):
    list(background.map(on_faulty.change, ["ada", "bob", "eve", "joe", "kim"]))  # over several connections

    faulty.end_sessions()

    assert_problem(on_faulty.change(), 503, "unknown")  # the first error ends the other connections too
    assert [on_faulty.change().status_code for _ in range(3)] == [200, 200, 200]


@pytest.fixture
def slow(faulty):
    """A PostgreSQL in which each addition takes a quarter of a second, also one to a line that is there."""
    faulty.execute("""
        CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.25); RETURN NEW; END';
        CREATE TRIGGER pause BEFORE INSERT ON cart_items FOR EACH ROW EXECUTE FUNCTION pause()
    """)
    yield faulty
    faulty.execute("DROP FUNCTION pause CASCADE")


def test_under_overload_requests_are_served_or_refused_and_no_connection_is_thrown_away(slow, on_faulty, background):
    list(background.map(on_faulty.change, ["ada", "bob", "eve", "joe", "kim"] * 2))  # which opens all connections
    before, others = slow.sessions(), slow.total()

    # Five connections serve twenty requests a second. So of 80 shoppers, each with a cart of their own, 40 wait for two
    # seconds, and are refused.
    with Shoppers(on_faulty, 80) as shoppers:
        shoppers.await_answers(100)

    assert len(before) == 5 and slow.sessions() == before
    assert shoppers.codes.keys() == {"made", "unchanged"}
    assert slow.total() == others + shoppers.codes["made"]


def test_a_refusal_by_the_database_throws_no_connection_away(faulty, on_faulty, background):
    on_faulty.change("ada", line("p", MAX))
    before = faulty.sessions()

    assert [one.status_code for one in background.map(on_faulty.change, ["ada"] * 20)] == [409] * 20

    assert faulty.sessions() == before


def test_a_silent_database_is_given_up_and_holds_up_nobody_else(faulty, on_faulty, background):
    assert on_faulty.change().status_code == 200

    with faulty.frozen():
        waiting = [background.submit(on_faulty.change, f"user {n}") for n in range(32)]
        while not all(one.done() for one in waiting):
            assert on_faulty.request("GET", "/livez", timeout=2).status_code == 200
            time.sleep(0.05)  # others need the processor too

    # Some were sent over a connection, the others waited for one.
    assert {one.result().json()["code"] for one in waiting} == {"unknown", "unchanged"}
    eventually(lambda: on_faulty.change().status_code == 200)


def test_of_several_hosts_a_silent_one_is_not_the_first_for_ever(tmp_path, faulty):
    # Two hosts, which are folders with a socket. `load_balance_hosts` in database.py has libpq begin with either.
    silent_first = faulty.url.replace("?host=", f"?host={tmp_path},")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{tmp_path}/.s.PGSQL.5432")
        silent.listen(200)
        with gunicorn(tmp_path / "log", DATABASE_URL=silent_first) as service, Shoppers(service, 8) as shoppers:
            eventually(lambda: "made" in shoppers.codes, 30)
