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
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest

from tests.helpers import (
    ADA,
    BODY,
    LINE,
    assert_problem,
    eventually,
    free_port,
    gunicorn,
    line,
    nginx,
    path,
    request_bytes,
    token_for,
)

FIELDS = b" HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"  # with the end of the first line
GET = b"GET /cart/users/ada" + FIELDS  # more fields or a blank line may follow
POST = b"POST /cart/users/ada" + FIELDS
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"  # chunks may follow
LONGEST = b"GET /" + b"x" * (8000 - len(b"GET / HTTP/1.1\r\n"))  # FIELDS follow: a first line of 8,000 bytes


def assert_refused(answer, status, code=None):
    """Assert that an answer is a problem document of the proxy, which pages of any origin can read."""
    assert_problem(answer, status, code)
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert answer.headers["Access-Control-Expose-Headers"] == "Retry-After, X-Request-Id"
    assert answer.headers.get("Allow") == ("DELETE, GET, HEAD, OPTIONS, PATCH, POST" if status == 405 else None)
    assert len(answer.headers["X-Request-Id"]) == 32


@pytest.fixture(scope="module", autouse=True)
def unanswered(tmp_path_factory):
    """A change that a service takes and never answers: it goes on beside the tests of this file, for nine seconds."""
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor() as pool:
        with nginx(tmp_path_factory.mktemp("silent"), f"http://127.0.0.1:{silent.getsockname()[1]}") as proxy:
            yield pool.submit(proxy.change)


# nginx.conf's bounds: 1 MiB for a body, 8,000 bytes for a line of the head, and four such, 90 fields.
HOSTILE = {
    "a body of 1 MiB and a byte": (413, POST + b"Content-Length: 1048577\r\n\r\n" + b"x" * 1048577),
    "large chunks": (413, CHUNKED + (b"%x\r\n%b\r\n" % (2**20, b" " * 2**20)) * 2),
    "an unknown coding": (501, POST + b"Transfer-Encoding: gzip\r\n\r\n{}"),
    "a field of 9 kB": (431, GET + b"X: " + b"x" * 9_000 + b"\r\n\r\n"),
    "a head of 35 kB": (431, GET + (b"X: " + b"x" * 7000 + b"\r\n") * 5 + b"\r\n"),
    "92 fields": (431, GET + b"X: x\r\n" * 90 + b"\r\n"),
    "a first line of 8,001 bytes": (414, LONGEST + b"x" + FIELDS + b"\r\n"),
    "TRACE": (405, b"TRACE /cart/users/ada" + FIELDS + b"\r\n"),
    "another version": (505, b"GET / HTTP/3.0\r\n\r\n"),
    "no HTTP": (400, b"\x16\x03\x01\r\n\r\n"),
    "the proxy's own page": (404, b"GET /problem" + FIELDS + b"\r\n"),
}
TARGETS = [b"\xff\xfe", b"ada\xa0", b"ada?\x85", b"ada?product_id=p\xa0"]


@pytest.mark.parametrize(("status", "sent"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_request_is_refused_by_a_problem_document(site, postgres, status, sent):
    assert_refused(site.send(sent), status)

    assert postgres.stored() == []


@pytest.mark.parametrize("target", TARGETS)
def test_bytes_that_are_not_ascii_are_refused_because_the_service_may_strip_them(site, postgres, target):
    site.change()

    assert_refused(site.send(b"DELETE /cart/users/" + target + FIELDS + b"\r\n"), 400)
    assert postgres.stored() == [("ada", "p", 1)]


def test_a_first_line_of_8000_bytes_is_passed_on(site):
    assert_problem(site.send(LONGEST + FIELDS + b"\r\n"), 404)


@pytest.mark.parametrize("user_id", ["%41", "a+b", "a b", "..", ".", "é", "a%2Fb", "\\", "😀" * 255])
def test_ids_arrive_as_they_were_sent(site, user_id):
    added = site.send(request_bytes("POST", path(user_id), json.dumps(line("a/+%é")).encode()))
    removed = site.send(request_bytes("DELETE", f"{path(user_id)}?product_id={quote('a/+%é')}"))

    assert json.loads(added.text) == {"user_id": user_id, "product_id": "a/+%é", "quantity": 1}
    assert json.loads(removed.text) == {"msg": "Cart item deleted"}


@pytest.mark.parametrize("target", ["/cart//users/ada", "/cart/users//ada"])
def test_slashes_are_not_merged(site, target):
    assert_problem(site.send(request_bytes("POST", target, BODY)), 404)


def test_a_body_in_chunks_is_passed_on(site, postgres):
    assert site.send(CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)).status_code == 200
    assert postgres.stored() == [("ada", "p", 1)]


def test_a_request_is_passed_on_when_it_is_whole(httpserver, tmp_path):
    httpserver.expect_request(path("bob")).respond_with_data("served")
    with nginx(tmp_path, f"http://127.0.0.1:{httpserver.port}") as proxy, proxy.connect() as connection:
        connection.sendall(POST + b"Content-Length: 99\r\n\r\n" + BODY)
        time.sleep(0.2)  # it would have been passed on by then, and would hold up the server, which takes one at a time
        assert proxy.get("bob").text == "served"


def test_requests_on_one_connection_each_get_their_own_answer(site, postgres):
    requests = [
        request_bytes("POST", ADA, BODY),
        request_bytes("POST", ADA, json.dumps([LINE] * 500).encode()),
        request_bytes("POST", "/nothing", b"x" * 200_000),  # whose body nobody reads
        request_bytes("POST", ADA, b"x" * 40_000, "text/plain"),
        request_bytes("GET", "/livez"),
    ]
    answers = b""
    with site.connect() as connection:
        connection.sendall(b"".join(requests))
        while not answers.endswith(b'{"status":"ok"}'):  # of /livez
            answers += connection.recv(65536)

    assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200", b"200", b"404", b"415", b"200"]
    assert postgres.stored() == [("ada", "p", 1 + 500)]


PART_OF_A_BODY = POST + b"Content-Length: 200\r\n\r\n{"
BEGINNINGS = [PART_OF_A_BODY, CHUNKED, GET, b"GET /", b""]
LARGE_ANSWERS = request_bytes("GET", "/docs/swagger-ui-bundle.js") * 100  # which do not fit into the buffers


@pytest.fixture
def begin(guarded_site):
    """Send a beginning of a request over a connection that stays until the test is over, and return it."""
    with contextlib.ExitStack() as stack:

        def send(beginning):
            connection = stack.enter_context(guarded_site.connect())
            connection.sendall(beginning)
            return connection

        yield send


def assert_cut_off(connection):
    """Assert that a connection is closed or reset, after what was sent before. Else TimeoutError is raised."""
    connection.settimeout(1)
    with contextlib.suppress(ConnectionError):
        while connection.recv(65536):
            pass


def test_slow_strangers_keep_no_owner_out_and_are_cut_off_ten_seconds_after_their_last_part(guarded_site, begin):
    silent = [begin(beginning) for beginning in BEGINNINGS * 80]
    reading_nothing = begin(LARGE_ANSWERS)
    dripping = [begin(PART_OF_A_BODY) for _ in range(200)]

    for _ in range(22):  # eleven seconds, in which those that drip are never silent for ten
        for connection in dripping:
            connection.sendall(b" ")
        answer = guarded_site.request("POST", ADA, json=LINE, headers=token_for("ada"), timeout=5)
        assert answer.status_code == 200
        time.sleep(0.5)

    for connection in [*silent, reading_nothing]:
        assert_cut_off(connection)


def test_an_instance_that_is_killed_costs_the_request_that_it_had_in_progress(tmp_path, postgres, background):
    with gunicorn(tmp_path / "1") as one, gunicorn(tmp_path / "2") as two, nginx(tmp_path, one.url, two.url) as proxy:
        with postgres.holding_cart("ada"):
            changes = [background.submit(proxy.change) for _ in range(2)]  # the proxy gives each instance one
            postgres.await_waiting(2)
            one.kill()
            eventually(lambda: any(change.done() for change in changes))
        answers = [change.result() for change in changes]
        [lost] = [answer for answer in answers if answer.status_code != 200]

        assert_refused(lost, 503, "unknown")
        for _ in range(20):  # in two seconds the proxy tries the instance that is gone several times
            assert proxy.change().status_code == 200
            time.sleep(0.1)


def test_an_instance_whose_address_is_silent_costs_no_request(tmp_path, instances):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as silent:
        with socket.create_connection(silent.getsockname()):  # which fills the backlog: others get no answer
            with nginx(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}", instances[0].url) as proxy:
                assert [proxy.change().status_code for _ in range(10)] == [200] * 10


def test_while_no_instance_is_up_the_proxy_answers_503_and_then_serves_the_new_one(tmp_path):
    port = free_port()
    with nginx(tmp_path, f"http://127.0.0.1:{port}") as proxy:
        with gunicorn(tmp_path / "log", port=port):
            assert proxy.change().status_code == 200

        assert_refused(proxy.change(), 503, "unknown")

        with gunicorn(tmp_path / "log", port=port):
            eventually(lambda: proxy.change().status_code == 200, 2)


def test_a_service_that_does_not_answer_is_a_503_within_ten_seconds(unanswered):
    assert_refused(unanswered.result(), 503, "unknown")
