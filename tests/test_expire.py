"""The command expire.

Kept here: it removes the carts that nobody has changed and the keys that count no longer, and keeps no shopper waiting.
"""

import pytest

from tests.helpers import ADA, KEY, LINE, flask, line, path, run_command


def expire(*options):
    """Run the command, and return what it says."""
    return flask("expire", *options).stdout


def removed(carts, keys):
    """Return what it says if it has removed so many."""
    return f"Removed {carts} carts and {keys} idempotency keys.\n"


@pytest.fixture
def old_carts(client, postgres):
    """The carts of ada, bob and eve, of two lines each, which nobody has changed for nine days."""
    for user_id in ("ada", "bob", "eve"):
        client.post(path(user_id), json=[line("p", 5), line("q")])
    postgres.execute("UPDATE cart_items SET updated_at = now() - interval '9 days'")


def test_carts_that_nobody_has_changed_for_so_many_days_are_removed(old_carts, postgres):
    assert expire() == removed(0, 0)
    assert expire("--days", "10") == removed(0, 0)
    assert expire("--days", "8") == removed(3, 0)
    assert postgres.stored() == []


@pytest.mark.parametrize(("days", "carts"), [("10", 0), ("8", 3)])
def test_the_days_may_come_from_the_setting(old_carts, days, carts):
    assert run_command("flask", "expire", EXPIRE_DAYS=days).stdout == removed(carts, 0)


@pytest.mark.parametrize(("days", "status"), [("0", 2), ("1", 0), ("3650", 0), ("3651", 2)])
def test_it_takes_1_to_3650_days(days, status):
    assert flask("expire", "--days", days).exit_code == status


@pytest.mark.parametrize(("method", "quantity"), [("POST", 1), ("POST", -1), ("PATCH", 5)])
def test_a_change_of_one_line_keeps_the_whole_cart(old_carts, client, postgres, method, quantity):
    client.open(ADA, method=method, json=line("p", quantity))

    assert expire("--days", "8") == removed(2, 0)
    assert [(user_id, product_id) for user_id, product_id, _ in postgres.stored()] == [("ada", "p"), ("ada", "q")]


@pytest.mark.parametrize(("age", "count"), [("23:59", 0), ("24:01", 1)])
def test_keys_that_count_no_longer_are_removed(client, postgres, age, count):
    client.post(ADA, json=LINE, headers=KEY)
    postgres.execute("UPDATE idempotency_keys SET created_at = now() - %(age)s::interval", age=age)

    assert expire() == removed(0, count)
    assert len(postgres.execute("SELECT key FROM idempotency_keys")) == 1 - count
    assert postgres.stored() == [("ada", "p", 1)]


LOCKED_LINE = "SELECT FROM cart_items WHERE user_id = 'ada' AND product_id = 'q' FOR UPDATE"
CHANGE_IN_PROGRESS = "SELECT change_cart('ada', false, '{r}', '{1}', 500, NULL, NULL)"


@pytest.mark.parametrize("use", [LOCKED_LINE, CHANGE_IN_PROGRESS], ids=["a locked line", "a change in progress"])
def test_a_cart_that_is_in_use_is_left_for_the_next_time(old_carts, postgres, use):
    with postgres.holding(use):
        assert expire("--days", "8") == removed(2, 0)

    assert {user_id for user_id, _, _ in postgres.stored()} == {"ada"}
    assert expire("--days", "8") == removed(1, 0)


@pytest.fixture
def pause(postgres):
    """Have the command wait for a lock where it removes what the user `paused` has; return what takes the lock."""
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
    client, postgres, background, pause
):
    users = [f"{name} {n}" for name in ("a", "z") for n in range(10)]
    for user_id in ("paused", *users):
        client.post(path(user_id), json=LINE)
    postgres.execute("UPDATE cart_items SET updated_at = now() - interval '9 days'")

    with postgres.holding(pause):
        expired = background.submit(expire, "--days", "8")
        postgres.await_waiting(1)  # it has removed some carts, and is removing that of `paused`
        assert {client.post(path(user_id), json=LINE).status_code for user_id in users} == {200}

    assert expired.result() not in (removed(1, 0), removed(21, 0))  # it was in the middle of them
    assert {user_id for user_id, _, _ in postgres.stored()} == set(users)


def test_keys_are_removed_in_batches_and_those_that_are_used_again_are_not_held_up(client, postgres, background, pause):
    postgres.execute("""
        INSERT INTO idempotency_keys
        SELECT 'ada', n, sha256(''), ARRAY[1], now() - interval '9 days' FROM generate_series(1, 10000) n
        UNION ALL SELECT 'paused', 0, sha256(''), ARRAY[1], now() - interval '8 days'
        UNION ALL SELECT 'ada', 10001, sha256(''), ARRAY[1], now() - interval '7 days'
    """)

    with postgres.holding(pause):
        expired = background.submit(expire)
        postgres.await_waiting(1)  # it has removed ten thousand keys, and is removing the last two
        assert client.post(ADA, json=LINE, headers={"Idempotency-Key": "1"}).status_code == 200
        assert client.post(ADA, json=LINE, headers={"Idempotency-Key": "10001"}).status_code == 200

    assert expired.result() == removed(0, 10001)
    assert postgres.execute("SELECT user_id, key FROM idempotency_keys") == [("ada", "1"), ("ada", "10001")]
