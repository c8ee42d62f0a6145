"""Changes at the same time, through the proxy and two instances.

Kept here: adds, takes and sets that race all count, as if one after the other. A list is never seen by half. A cart has
at most 500 lines, exactly. A key counts once. A worker that is killed leaves all or nothing.
"""

import psutil
import pytest
import requests

from tests.helpers import ADA, LINE, PLACES, eventually, gunicorn, line, lines_of


def test_two_hundred_adds_to_four_carts_are_all_served(site, postgres, background):
    answers = background.map(site.change, ["ada", "bob", "eve", "joe"] * 50)

    assert [answer.status_code for answer in answers] == [200] * 200
    assert [quantity for _, _, quantity in postgres.stored()] == [50, 50, 50, 50]


def assert_alike(response):
    """Assert that a response has three lines with the same quantity."""
    [first, *others] = [quantity for _, quantity in lines_of(response)]
    assert others == [first, first]


def change_three_lines_and_read(site, products):
    """Add to three lines of ada's, set them, take from them and empty the cart, a few times."""
    for _ in range(6):
        assert_alike(site.change("ada", [line(product) for product in products]))
        assert_alike(site.change("ada", [line(product, 3) for product in products], method="PATCH"))
        assert_alike(site.change("ada", [line(product, -2) for product in products]))
        seen = site.get()
        if seen.status_code != 404:
            assert_alike(seen)
        site.request("DELETE", ADA)


def test_racing_lists_never_deadlock_and_are_never_seen_by_half(site, background):
    racing = [background.submit(change_three_lines_and_read, site, products) for products in ["abc", "cba"] * 8]

    for one in racing:
        one.result()  # raises what the call has raised


def test_adds_after_a_set_all_count(site, postgres, background):
    with postgres.holding_cart("ada"):
        setting = background.submit(site.change, "ada", line("p", 100), method="PATCH")
        postgres.await_waiting(1)
        adding = [background.submit(site.change) for _ in range(20)]
        postgres.await_waiting(PLACES)  # the set and some adds; the lock is given in the order of asking

    assert [one.result().status_code for one in [setting, *adding]] == [200] * 21
    assert postgres.stored() == [("ada", "p", 120)]


@pytest.mark.parametrize("method", ["POST", "PATCH"])
def test_racing_changes_never_overstep_the_bound_of_500_lines(site, postgres, background, method):
    site.change("ada", [line(f"{n:03}") for n in range(499)])

    # One waits for this lock, the others for the cart's. Without that all would count 499 before one adds another.
    with postgres.holding("LOCK cart_items IN EXCLUSIVE MODE"):
        racing = [background.submit(site.change, "ada", line(f"new {n}"), method=method) for n in range(32)]
        postgres.await_waiting(PLACES)

    assert sorted(one.result().status_code for one in racing) == [200] + [409] * 31
    assert len(postgres.stored()) == 500


@pytest.mark.parametrize(("method", "total"), [("POST", 2), ("PATCH", 1)])
def test_racing_retries_count_once(site, postgres, background, method, total):
    racing = [background.submit(site.change, "ada", [LINE, LINE], key="k", method=method) for _ in range(24)]

    assert {one.result().status_code for one in racing} == {200}
    assert len({one.result().text for one in racing}) == 1
    assert postgres.stored() == [("ada", "p", total)]


def test_a_worker_that_is_killed_within_a_statement_leaves_all_or_nothing(tmp_path, postgres, background):
    with gunicorn(tmp_path / "log") as service:
        with postgres.holding_cart("ada"):
            cut_off = background.submit(service.change, "ada", [line("a"), line("b")], key="k")
            postgres.await_waiting(1)
            [worker] = psutil.Process(service.process.pid).children()
            worker.kill()
            assert isinstance(cut_off.exception(), requests.ConnectionError)
        eventually(lambda: postgres.waiting() == 0)

        assert postgres.stored() in ([], [("ada", "a", 1), ("ada", "b", 1)])
        assert lines_of(service.change("ada", [line("a"), line("b")], key="k")) == [("a", 1), ("b", 1)]
        assert postgres.stored() == [("ada", "a", 1), ("ada", "b", 1)]
