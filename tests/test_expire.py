"""The command expire.

Kept here: it removes the carts that nobody has changed and the keys that count no longer, and keeps no shopper waiting.
"""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from flask.testing import FlaskClient

from tests.helpers import (
    ADA,
    LINE,
    await_waiting,
    execute,
    flask,
    holding,
    line,
    lines_of,
    path,
    reconnected,
    run_command,
    stored,
)

KEY = {"Idempotency-Key": "k"}


def expire(*options: str) -> tuple[int, int]:
    """Run the command, and return how many carts and keys it removed."""
    said = flask("expire", *options).stdout
    removed = re.fullmatch(r"Removed (\d+) carts and (\d+) idempotency keys\.\n", said)
    assert removed
    return int(removed[1]), int(removed[2])


def make_old(client: FlaskClient, *user_ids: str) -> None:
    """Give users a cart of two lines that nobody has changed for nine days."""
    for user_id in user_ids:
        client.post(path(user_id), json=[line("p", 5), line("q")])
    execute("UPDATE cart_items SET updated_at = now() - interval '9 days'")


# What it removes


def test_carts_that_nobody_has_changed_for_so_many_days_are_removed(client: FlaskClient) -> None:
    make_old(client, "ada", "bob", "eve")

    assert [expire(), expire("--days", "10"), expire("--days", "8"), expire("--days", "8")] == [
        (0, 0),
        (0, 0),
        (3, 0),
        (0, 0),
    ]
    assert stored() == []


@pytest.mark.parametrize("days", ["10", "8"])
def test_the_days_may_come_from_the_setting(client: FlaskClient, days: str) -> None:
    make_old(client, "ada")

    said = run_command("flask", "expire", EXPIRE_DAYS=days).stdout

    assert said == f"Removed {1 if days == '8' else 0} carts and 0 idempotency keys.\n"


@pytest.mark.parametrize(("method", "quantity"), [("POST", 1), ("POST", -1), ("PATCH", 5)])
def test_a_change_of_one_line_keeps_the_whole_cart(client: FlaskClient, method: str, quantity: int) -> None:
    make_old(client, "ada")

    client.open(ADA, method=method, json=line("p", quantity))

    assert expire("--days", "8") == (0, 0)
    assert len(stored()) == 2


@pytest.mark.parametrize(("age", "removed"), [("23:59", 0), ("24:01", 1)])
def test_keys_that_count_no_longer_are_removed(client: FlaskClient, age: str, removed: int) -> None:
    client.post(ADA, json=LINE, headers=KEY)
    execute("UPDATE idempotency_keys SET created_at = now() - %(age)s::interval", age=age)

    assert expire() == (0, removed)
    assert execute("SELECT count(*) FROM idempotency_keys") == [(1 - removed,)]
    assert stored() == [("ada", "p", 1)]


# Beside shoppers

IN_USE = [
    pytest.param("SELECT FROM cart_items WHERE user_id = 'ada' AND product_id = 'q' FOR UPDATE", id="a locked line"),
    pytest.param("SELECT change_cart('ada', false, '{r}', '{1}', 500, NULL, NULL)", id="a change in progress"),
]


@pytest.mark.parametrize("use", IN_USE)
def test_a_cart_that_is_in_use_is_left_for_the_next_time(client: FlaskClient, use: str) -> None:
    make_old(client, "ada", "bob")

    with holding(use):
        assert expire("--days", "8") == (1, 0)

    assert expire("--days", "8") == (1, 0)


PAUSE_AFTER_ONE_CART = """
    CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF (SELECT count(DISTINCT user_id) FROM cart_items) < 3 THEN PERFORM pg_advisory_xact_lock(1); END IF;
        RETURN OLD;
    END $$;
    CREATE TRIGGER pause BEFORE DELETE ON cart_items FOR EACH ROW EXECUTE FUNCTION pause()
"""
PAUSE_AT_THE_LAST_KEY = """
    CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql
    AS 'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN OLD; END';
    CREATE TRIGGER pause BEFORE DELETE ON idempotency_keys FOR EACH ROW WHEN (OLD.key = 'last')
    EXECUTE FUNCTION pause()
"""


def test_carts_are_removed_one_by_one_and_one_that_is_changed_meanwhile_is_kept(
    client: FlaskClient, background: ThreadPoolExecutor
) -> None:
    make_old(client, "ada", "bob", "eve")
    execute(PAUSE_AFTER_ONE_CART)
    try:
        with holding("SELECT pg_advisory_xact_lock(1)"):
            expired = background.submit(expire, "--days", "8")
            await_waiting(1)  # it has removed one of the three, and holds the lock of another
            left = "SELECT user_id, pg_try_advisory_xact_lock(hashtextextended(user_id, 0)) FROM cart_items GROUP BY 1"
            is_free = dict(execute(left))
            [kept] = [user_id for user_id in is_free if is_free[user_id]]
            client.post(path(kept), json=line("p", 1))
        assert expired.result() == (2, 0)
    finally:
        execute("DROP FUNCTION pause CASCADE")

    assert len(is_free) == 2
    assert lines_of(client.get(path(kept))) == [("p", 6), ("q", 1)]


def test_keys_are_removed_in_batches_and_one_that_is_used_again_is_not_held_up(
    client: FlaskClient, background: ThreadPoolExecutor
) -> None:
    execute("""
        INSERT INTO idempotency_keys
        SELECT 'ada', CASE n WHEN 1 THEN 'k' WHEN 10001 THEN 'last' ELSE n::text END, sha256(''), '{1}',
            now() - interval '2 days' + n * interval '1 second'
        FROM generate_series(1, 10001) n
    """)
    execute(PAUSE_AT_THE_LAST_KEY)
    try:
        with holding("SELECT pg_advisory_xact_lock(1)"):
            expired = background.submit(expire)
            await_waiting(1)  # it has removed ten thousand keys, and is removing the last one
            assert client.post(ADA, json=LINE, headers=KEY).status_code == 200
        assert expired.result() == (0, 10001)
    finally:
        execute("DROP FUNCTION pause CASCADE")

    assert execute("SELECT key FROM idempotency_keys") == [("k",)]


# How it is called


@pytest.mark.parametrize(("days", "status"), [("0", 2), ("1", 0), ("3650", 0), ("3651", 2), ("x", 2)])
def test_it_takes_1_to_3650_days(days: str, status: int) -> None:
    assert flask("expire", "--days", days).exit_code == status


@pytest.mark.parametrize("command", ["expire", "init-db"])
def test_a_command_says_in_one_line_why_it_failed(command: str) -> None:
    with reconnected(host="127.0.0.1", port="1"):
        failed = flask(command)

    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr.startswith("Error: ") and failed.stderr.count("\n") == 1
