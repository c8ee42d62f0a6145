"""The command expire.

Kept here: it removes the carts that nobody has changed and the keys that count no longer, and keeps no shopper waiting.
"""

import re

import pytest

from tests.helpers import ADA, KEY, LINE, invoke, line, path, run_command


def expire(*options):
    """Run the command, and return how many carts and keys it says it has removed."""
    said = re.fullmatch(r"Removed (\d+) carts and (\d+) idempotency keys\.\n", invoke("expire", *options).stdout)
    return int(said[1]), int(said[2])


@pytest.fixture
def old_carts(client, postgres):
    """The carts of ada, bob and eve, of two lines each, which nobody has changed for nine days."""
    for user_id in ("ada", "bob", "eve"):
        client.post(path(user_id), json=[line("p", 5), line("q")])
    postgres.execute("UPDATE cart_items SET updated_at = now() - interval '9 days'")


def test_carts_that_nobody_has_changed_for_so_many_days_are_removed(old_carts, postgres):
    assert expire() == (0, 0)
    assert expire("--days", "10") == (0, 0)
    assert expire("--days", "8") == (3, 0)
    assert postgres.stored() == []


def test_the_days_may_come_from_the_setting(old_carts):
    assert run_command("flask", "expire", EXPIRE_DAYS="8").stdout == "Removed 3 carts and 0 idempotency keys.\n"


@pytest.mark.parametrize(("days", "status"), [("0", 2), ("1", 0), ("3650", 0), ("3651", 2)])
def test_it_takes_1_to_3650_days(days, status):
    assert invoke("expire", "--days", days).exit_code == status


@pytest.mark.parametrize(("method", "quantity"), [("POST", 1), ("POST", -1), ("PATCH", 5)])
def test_a_change_of_one_line_keeps_the_whole_cart(old_carts, client, postgres, method, quantity):
    client.open(ADA, method=method, json=line("p", quantity))

    assert expire("--days", "8") == (2, 0)
    assert [(user_id, product_id) for user_id, product_id, _ in postgres.stored()] == [("ada", "p"), ("ada", "q")]


@pytest.mark.parametrize(("age", "gone", "left"), [("23:59", 0, 1), ("24:01", 1, 0)])
def test_keys_that_count_no_longer_are_removed(client, postgres, age, gone, left):
    client.post(ADA, json=LINE, headers=KEY)
    postgres.execute("UPDATE idempotency_keys SET created_at = now() - %(age)s::interval", age=age)

    assert expire() == (0, gone)
    assert len(postgres.execute("SELECT key FROM idempotency_keys")) == left
    assert postgres.stored() == [("ada", "p", 1)]


def test_a_cart_that_is_being_changed_is_left_for_the_next_time(old_carts, postgres):
    with postgres.holding_cart("ada"):
        assert expire("--days", "8") == (2, 0)

    assert {user_id for user_id, _, _ in postgres.stored()} == {"ada"}
    assert expire("--days", "8") == (1, 0)


def test_a_cart_with_a_locked_line_is_left_whole(old_carts, postgres):
    with postgres.holding("SELECT FROM cart_items WHERE user_id = 'ada' AND product_id = 'q' FOR UPDATE"):
        assert expire("--days", "8") == (2, 0)

    assert [(user_id, product_id) for user_id, product_id, _ in postgres.stored()] == [("ada", "p"), ("ada", "q")]


@pytest.fixture
def lock_of_paused(postgres):
    """SQL that takes a lock: while it is held, the command waits where it removes a row of the user `paused`."""
    postgres.execute("""
        CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql
        AS 'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN OLD; END';
        CREATE TRIGGER pause BEFORE DELETE ON cart_items
        FOR EACH ROW WHEN (OLD.user_id = 'paused') EXECUTE FUNCTION pause();
        CREATE TRIGGER pause BEFORE DELETE ON idempotency_keys
        FOR EACH ROW WHEN (OLD.user_id = 'paused') EXECUTE FUNCTION pause()
    """)
    yield "SELECT pg_advisory_xact_lock(1)"
    postgres.execute("DROP FUNCTION pause CASCADE")


def test_carts_are_removed_one_by_one_and_those_that_are_changed_meanwhile_are_kept(
    client, postgres, background, lock_of_paused
):
    users = [f"{name} {n}" for name in ("a", "z") for n in range(10)]
    for user_id in ("paused", *users):
        client.post(path(user_id), json=LINE)
    postgres.execute("UPDATE cart_items SET updated_at = now() - interval '9 days'")

    with postgres.holding(lock_of_paused):
        expired = background.submit(expire, "--days", "8")
        postgres.await_waiting(1)
        # PostgreSQL chooses the order: some carts are gone, which are made anew now, and some are still to be removed,
        # which are changed now.
        assert {client.post(path(user_id), json=LINE).status_code for user_id in users} == {200}
    carts, _ = expired.result()

    assert 1 < carts < 21  # `paused`, and those that were gone before
    assert {user_id for user_id, _, _ in postgres.stored()} == set(users)


INSERT_KEYS = """
    INSERT INTO idempotency_keys (user_id, key, request, quantities, created_at)
    SELECT %(user)s, n, sha256(''), ARRAY[1], now() - %(age)s::interval FROM generate_series(%(first)s, %(last)s) n
"""


def test_keys_are_removed_in_batches_and_those_that_are_used_again_are_not_held_up(
    client, postgres, background, lock_of_paused
):
    postgres.execute(INSERT_KEYS, user="ada", age="9 days", first=1, last=10000)  # the first batch
    postgres.execute(INSERT_KEYS, user="paused", age="8 days", first=1, last=1)  # the second one begins
    postgres.execute(INSERT_KEYS, user="late", age="7 days", first=1, last=1)  # and ends

    with postgres.holding(lock_of_paused):
        expired = background.submit(expire)
        postgres.await_waiting(1)  # the first batch is committed
        assert client.post(ADA, json=LINE, headers={"Idempotency-Key": "1"}).status_code == 200
        # The DELETE, which waits, has chosen this one too. It looks at it again when it gets there.
        assert client.post(path("late"), json=LINE, headers={"Idempotency-Key": "1"}).status_code == 200

    assert expired.result() == (0, 10_000 + 1)
    left = postgres.execute("SELECT user_id, key FROM idempotency_keys ORDER BY user_id")
    assert left == [("ada", "1"), ("late", "1")]
