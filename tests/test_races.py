"""Changes at the same time, through the proxy and two instances.

Kept here: adds, takes and sets that race all count, as if one after the other. A list is made whole or not at all, and
is never seen by half. A cart has at most 500 lines, exactly. A key counts once. A worker that is killed leaves all or
nothing.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.helpers import (
    LINE,
    Site,
    at_once,
    await_waiting,
    eventually,
    execute,
    gunicorn,
    holding,
    line,
    lines_of,
    lock_of,
    stored,
)


def test_two_hundred_adds_to_four_carts_are_all_served_at_once(site: Site) -> None:
    answers = at_once(site.post, [f"user {turn % 4}" for turn in range(200)])

    assert [answer.status_code for answer in answers] == [200] * 200
    assert execute("SELECT quantity FROM cart_items") == [(50,)] * 4


class Client:
    """A client that changes ada's lines a, b and c together, in one order or the other, and looks at them."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def see(self) -> None:
        """Read the cart: it is empty, or its lines are alike."""
        seen = self.site.get()
        if seen.status_code != 404:
            assert len(lines := lines_of(seen)) == 3
            assert len({quantity for _, quantity in lines}) == 1

    def change(self, turn: int) -> None:
        """Add, take, set and empty, always all three lines or none."""
        for step in range(12):
            products = "abc" if (turn + step) % 2 else "cba"
            added = self.site.post("ada", [line(product, -2 if step % 4 == 3 else 1) for product in products])
            assert len({total for _, total in lines_of(added)}) == 1
            self.see()
            assert self.site.patch("ada", [line(product, turn) for product in products]).status_code == 200
            self.see()
            if turn < 3:
                assert self.site.delete().status_code in (200, 404)


def test_racing_lists_never_deadlock_and_are_never_seen_by_half(site: Site) -> None:
    at_once(Client(site).change, list(range(16)))


def test_adds_after_a_set_all_count(site: Site, background: ThreadPoolExecutor) -> None:
    with holding(lock_of("ada")):
        setting = background.submit(site.patch, "ada", line("p", 100))
        await_waiting(1)
        adding = [background.submit(site.post) for _ in range(20)]
        await_waiting(3)

    assert [one.result().status_code for one in [setting, *adding]] == [200] * 21
    assert stored() == [("ada", "p", 120)]


@pytest.mark.parametrize("method", ["post", "patch"])
def test_racing_changes_never_overstep_the_bound(site: Site, background: ThreadPoolExecutor, method: str) -> None:
    site.post("ada", [line(f"{n:03}") for n in range(499)])

    with holding("LOCK cart_items IN EXCLUSIVE MODE"):  # nobody writes, all may count
        racing = [background.submit(getattr(site, method), "ada", line(f"new {turn}")) for turn in range(32)]
        await_waiting(4)
    statuses = [one.result().status_code for one in racing]

    assert statuses.count(200) == 1 and set(statuses) <= {200, 409}
    assert len(stored()) == 500


@pytest.mark.parametrize("method", ["post", "patch"])
@pytest.mark.parametrize(("body", "total"), [(LINE, 1), ([LINE, LINE], 2)], ids=["one", "list"])
def test_racing_retries_count_once(site: Site, method: str, body: Any, total: int) -> None:
    answers = at_once(getattr(site, method), ["ada"] * 24, [body] * 24, ["k"] * 24)

    [(status, _)] = {(answer.status_code, answer.text) for answer in answers}
    assert status == 200
    assert stored() == [("ada", "p", total if method == "post" else 1)]


def test_a_worker_that_is_killed_within_a_statement_leaves_all_or_nothing(
    tmp_path: Path, background: ThreadPoolExecutor
) -> None:
    unfinished = "SELECT FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'EXECUTE change_cart%'"
    with gunicorn(tmp_path / "log") as service:
        with holding(lock_of("ada")):
            cut_off = background.submit(service.post, "ada", [line("a"), line("b")], "k")
            await_waiting(1)
            psutil.Process(service.pid).children()[0].kill()
            assert isinstance(cut_off.exception(), requests.ConnectionError)
        eventually(lambda: execute(unfinished) == [])

        assert stored() in ([], [("ada", "a", 1), ("ada", "b", 1)])
        assert lines_of(service.post("ada", [line("a"), line("b")], "k")) == [("a", 1), ("b", 1)]
        assert stored() == [("ada", "a", 1), ("ada", "b", 1)]
