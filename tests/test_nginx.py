"""The proxy and its clients: nginx.conf.

Kept here: slow, endless, huge, malformed or very many clients stop nobody, and what they get is a problem document too
(a slow one is cut off unanswered). A request is passed on only when it is whole, and as it came. Nobody without a
cart's token can keep its owner out. An instance that is killed costs the requests that it had in progress, and
the proxy answers by another one, or 503 until one is up. Pages of any origin can read its refusals.
"""

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests
from pytest_httpserver import HTTPServer

from tests.helpers import (
    ADA,
    LINE,
    UNKNOWN,
    Service,
    Shoppers,
    assert_problem,
    eventually,
    execute,
    free_port,
    gunicorn,
    line,
    nginx,
    path,
    request_bytes,
    stored,
    token_for,
)

BODY = json.dumps(LINE).encode()
FIELDS = b"Host: h\r\nContent-Type: application/json\r\nConnection: close\r\n"
POST, GET = b"POST /cart/users/ada HTTP/1.1\r\n" + FIELDS, b"GET /cart/users/ada HTTP/1.1\r\n" + FIELDS
DELETE = b"DELETE /cart/users/ada HTTP/1.1\r\n" + FIELDS
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


def assert_refused(answer: Any, status: int, code: str | None = None, detail: str | None = None) -> None:
    """Assert that an answer is a problem document of the proxy, which pages of any origin can read."""
    assert_problem(answer, status, code, detail)
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert answer.headers["Access-Control-Expose-Headers"] == "Retry-After, X-Request-Id"
    assert answer.headers.get("Allow") == ("DELETE, GET, HEAD, OPTIONS, PATCH, POST" if status == 405 else None)
    assert len(answer.headers["X-Request-Id"]) == 32


@pytest.fixture(scope="module", autouse=True)
def unanswered(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Future[requests.Response]"]:
    """A change that a service takes and does not answer. It takes nine seconds, beside the other tests of this file."""
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor() as pool:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with nginx(tmp_path_factory.mktemp("silent"), url) as proxy:
            yield pool.submit(proxy.post)


# Requests that are refused

HOSTILE = [
    pytest.param(413, POST + b"Content-Length: 1048577\r\n\r\n" + b"x" * 1048577, id="large body"),
    pytest.param(413, POST + CHUNKED + (b"100000\r\n" + b" " * 2**20 + b"\r\n") * 3, id="large chunks"),
    pytest.param(501, POST + b"Transfer-Encoding: gzip\r\n\r\n{}", id="unknown coding"),
    pytest.param(431, GET + b"X: " + b"x" * 9_000 + b"\r\n\r\n", id="large field"),
    pytest.param(431, GET + (b"X: " + b"x" * 7000 + b"\r\n") * 5 + b"\r\n", id="large head"),
    pytest.param(431, GET + b"X: x\r\n" * 101 + b"\r\n", id="many fields"),
    pytest.param(414, GET.replace(b"ada", b"x" * 9_000) + b"\r\n", id="long path"),
    pytest.param(414, GET.replace(b"ada", b"x" * 7974) + b"\r\n", id="first line of 8,001 bytes"),
    pytest.param(405, GET.replace(b"GET", b"TRACE") + b"\r\n", id="TRACE"),
    pytest.param(505, GET.replace(b"HTTP/1.1", b"HTTP/3.0") + b"\r\n", id="another version"),
    pytest.param(400, b"\x16\x03\x01\r\n\r\n", id="no HTTP"),
    pytest.param(404, GET.replace(ADA.encode(), b"/problem") + b"\r\n", id="the proxy's own page"),
]
STRIPPED = [
    pytest.param(GET.replace(b"ada", b"\xff\xfe"), id="bytes of no encoding"),
    pytest.param(GET.replace(b"ada", b"ada\xa0"), id="A0 after a user"),
    pytest.param(DELETE.replace(b"ada", b"ada\x85"), id="85 after a user"),
    pytest.param(DELETE.replace(b"ada", b"ada?\xa0"), id="A0 for a query"),
    pytest.param(DELETE.replace(b"ada", b"ada?\x85"), id="85 for a query"),
    pytest.param(DELETE.replace(b"ada", b"ada?product_id=p\xa0"), id="A0 after a product"),
    pytest.param(DELETE.replace(b"ada", b"ada?product_id=p\x85"), id="85 after a product"),
]


@pytest.mark.parametrize(("status", "request_"), HOSTILE)
def test_a_hostile_request_is_refused_by_a_problem_document(site: Service, status: int, request_: bytes) -> None:
    assert_refused(site.send(request_), status)

    assert stored() == []


@pytest.mark.parametrize("request_", STRIPPED)
def test_bytes_that_the_service_would_strip_are_refused_and_change_nothing(site: Service, request_: bytes) -> None:
    site.post()

    assert_refused(site.send(request_ + b"\r\n"), 400)
    assert stored() == [("ada", "p", 1)]


# Requests that are passed on


def test_a_first_line_of_8000_bytes_is_passed_on(site: Service) -> None:
    answer = site.send(GET.replace(b"ada", b"x" * 7973) + b"\r\n")

    assert_problem(answer, 422, "invalid", "user_id: Expected `str` of length <= 255")


@pytest.mark.parametrize("user_id", ["%41", "a+b", "a b", "..", ".", "é", "a%2Fb", "\\", "😀" * 255])
def test_ids_arrive_as_they_were_sent(site: Service, user_id: str) -> None:
    product_id = f"a/+%{user_id[:9]}"
    added = site.send(request_bytes(f"POST {path(user_id)}", json.dumps(line(product_id)).encode()))
    removed = site.send(request_bytes(f"DELETE {path(user_id)}?product_id={quote(product_id)}"))

    assert json.loads(added.text) == {"user_id": user_id, "product_id": product_id, "quantity": 1}
    assert json.loads(removed.text) == {"msg": "Cart item deleted"}


def test_a_body_in_chunks_is_passed_on(site: Service) -> None:
    assert site.send(POST + CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)).status_code == 200
    assert stored() == [("ada", "p", 1)]


def test_a_request_is_passed_on_when_it_is_whole(tmp_path: Path) -> None:
    with HTTPServer() as server:  # it serves one request at a time, and so half a one would hold it up
        with nginx(tmp_path, f"http://127.0.0.1:{server.port}") as proxy, proxy.connect() as connection:
            connection.sendall(POST + b"Content-Length: 99\r\n\r\n" + BODY)
            time.sleep(0.2)  # it would have been passed on by then
            assert proxy.post("bob").status_code == 500  # as the server answers what it does not expect


SMALL = request_bytes("POST /cart/users/ada", BODY, connection="keep-alive")
SEVERAL = [
    SMALL,
    SMALL,
    request_bytes("POST /cart/users/bob", json.dumps([LINE] * 500).encode(), connection="keep-alive"),
    request_bytes("POST /nothing", b"x" * 200_000, connection="keep-alive"),  # whose body nobody reads
    request_bytes("POST /cart/users/ada", b"x" * 40_000, "text/plain", connection="keep-alive"),
    SMALL,
    request_bytes("GET /livez"),
]


@pytest.mark.parametrize("parts", [[b"".join(SEVERAL)], SEVERAL], ids=["all at once", "one after the other"])
def test_requests_on_one_connection_each_get_their_own_answer(site: Service, parts: list[bytes]) -> None:
    answers = b""
    with site.connect() as connection:
        for part in parts:
            connection.sendall(part)
            answers += connection.recv(65536)
        while more := connection.recv(65536):
            answers += more

    assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200", b"200", b"200", b"404", b"415", b"200", b"200"]
    assert answers.endswith(b'{"status":"ok"}')
    assert stored() == [("ada", "p", 3), ("bob", "p", 500)]


# Clients that are slow, or never end

BEGINNINGS = [b"GET /", GET, POST + b"Content-Length: 31\r\n\r\n{", POST + CHUNKED, b""]
ENDLESS = [
    pytest.param(POST + CHUNKED, b"1\r\nx\r\n" * 2000, id="chunks"),
    pytest.param(POST + b"Content-Length: 99999999999\r\n\r\n", b"x" * 65536, id="body"),
    pytest.param(GET + b"Y: ", b"y" * 1000, id="field"),
]


@pytest.fixture
def slow_clients(site: Service) -> Iterator[list[socket.socket]]:
    """Six hundred clients that have begun a request. The last one reads none of a hundred large answers."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(site.connect()) for _ in range(600)]
        for turn, client in enumerate(clients):
            client.sendall(BEGINNINGS[turn % len(BEGINNINGS)].replace(b"ada", b"%d" % turn))
        clients[-1].sendall(request_bytes("GET /docs/swagger-ui-bundle.js", connection="keep-alive") * 100)
        yield clients


def is_cut_off(client: socket.socket) -> bool:
    """Tell whether a client's connection is closed, after what was sent before."""
    client.settimeout(1)
    with contextlib.suppress(ConnectionError):
        while client.recv(65536):  # TimeoutError, unless it is closed
            pass
    return True


def test_slow_clients_hold_up_nobody_and_silent_ones_are_cut_off(
    site: Service, slow_clients: list[socket.socket]
) -> None:
    dripping, silent = slow_clients[:200], slow_clients[200:]

    for _ in range(22):  # eleven seconds
        for client in dripping:
            with contextlib.suppress(ConnectionError):  # it is cut off
                client.sendall(b" ")
        assert site.request("GET", "/healthz", timeout=5).status_code == 200
        time.sleep(0.5)

    assert all(is_cut_off(client) for client in silent)


def send_endlessly(site: Service, begin: bytes, part: bytes) -> None:
    """Send a request that does not end, until the proxy has enough of it."""
    with contextlib.suppress(OSError), site.connect() as connection:
        connection.settimeout(0.5)
        connection.sendall(begin)
        for _ in range(1000):
            connection.sendall(part)


@pytest.mark.parametrize(("begin", "part"), ENDLESS)
def test_endless_requests_hold_up_nobody(
    site: Service, background: ThreadPoolExecutor, begin: bytes, part: bytes
) -> None:
    endless = [background.submit(send_endlessly, site, begin, part) for _ in range(20)]

    while not all(one.done() for one in endless):
        assert site.request("GET", "/healthz", timeout=5).status_code == 200
    assert stored() == []


@pytest.mark.parametrize(
    "begun", [POST + b"Content-Length: 200\r\n\r\n{", POST + CHUNKED, GET], ids=["body", "chunks", "head"]
)
def test_slow_strangers_without_a_token_do_not_keep_the_owner_out(guarded_site: Service, begun: bytes) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(150):
            stack.enter_context(guarded_site.connect()).sendall(begun)

        owner = token_for("ada")
        for _ in range(10):
            assert guarded_site.request("POST", ADA, json=LINE, headers=owner, timeout=2).status_code == 200


# Instances that end and come


def test_an_instance_that_is_killed_costs_the_requests_that_it_had_in_progress(tmp_path: Path) -> None:
    with gunicorn(tmp_path / "1") as one, gunicorn(tmp_path / "2") as two, nginx(tmp_path, one.url, two.url) as proxy:
        with Shoppers(proxy, 8) as shoppers:
            shoppers.await_answers(100)
            one.kill()
            shoppers.await_answers(100)
        with Shoppers(proxy, 8, "later") as later:
            time.sleep(2)  # the proxy tries the one that is gone each second

    made, unknown = shoppers.codes["made"], shoppers.codes["unknown"]
    assert shoppers.codes.keys() <= {"made", "unknown"} and unknown <= 8
    [(total,)] = execute("SELECT sum(quantity) FROM cart_items WHERE user_id LIKE 'shopper %'")
    assert made <= total <= made + unknown
    assert later.codes.keys() == {"made"}


def test_while_no_instance_is_up_the_proxy_answers_503_and_then_serves_the_new_one(tmp_path: Path) -> None:
    port = free_port()
    with nginx(tmp_path, f"http://127.0.0.1:{port}") as proxy:
        with gunicorn(tmp_path / "log", port=port):
            assert proxy.post().status_code == 200

        assert_refused(proxy.post(), 503, "unknown", UNKNOWN)

        with gunicorn(tmp_path / "log", port=port):
            eventually(lambda: proxy.post().status_code == 200, 2)


def test_a_service_that_does_not_answer_is_a_503_within_ten_seconds(unanswered: "Future[requests.Response]") -> None:
    assert_refused(unanswered.result(), 503, "unknown", UNKNOWN)
