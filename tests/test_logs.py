"""The logs of the proxy and of the service.

Kept here: each request has an id, which is in the answer, in the access log and in each line of the service's log that
belongs to it. Each line is one JSON object, whatever a client does, and has no secrets. A start says whether tokens are
asked for.
"""

import json
import re
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers import ADA, LINE, SECRET, Service, assert_problem, eventually, execute, gunicorn, nginx

BUNDLE = b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: h\r\nX-Request-Id: hung up\r\n\r\n"


class Logged:
    """The service, whose database is not there and which asks for tokens, and the proxy in front of it."""

    def __init__(self, service: Service, proxy: Service) -> None:
        self.service, self.proxy = service, proxy

    def of_service(self, request_id: str) -> list[dict[str, Any]]:
        """Return what the service's log has of a request."""
        return [entry for entry in self.service.entries() if entry.get("request_id") == request_id]

    def of_proxy(self, request_id: str) -> list[dict[str, Any]]:
        """Return what the access log has of a request. It is written after the answer."""
        eventually(lambda: json.dumps(request_id) in self.proxy.log.read_text())
        return [entry for entry in self.proxy.entries() if entry["request_id"] == request_id]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logged]:
    """The service and the proxy."""
    folder = tmp_path_factory.mktemp("logged")
    with gunicorn(folder / "log", DATABASE_URL="postgresql://u@127.0.0.1:1/d", JWT_KEY=SECRET) as service:
        with nginx(folder, service.url) as proxy:
            yield Logged(service, proxy)


def test_a_request_has_one_id_in_its_answer_and_in_both_logs(logged: Logged) -> None:
    answer = logged.proxy.request("GET", "/healthz", headers={"X-Request-Id": 'a "b'})

    assert (answer.status_code, answer.headers["X-Request-Id"]) == (503, 'a "b')
    [of_service], [of_proxy] = logged.of_service('a "b'), logged.of_proxy('a "b')
    assert of_service.keys() == {"time", "level", "message", "logger", "pid", "request_id"}
    assert (of_service["level"], of_service["logger"]) == ("ERROR", "cart")
    assert (of_proxy["method"], of_proxy["path"], of_proxy["status"]) == ("GET", "/healthz", 503)
    assert of_proxy.keys() == {"time", "client", "request_id", "method", "path", "status", "seconds", "bytes"}


@pytest.mark.parametrize("sent", ["é", "", "x" * 129, None])
def test_a_request_without_a_fit_id_gets_one(logged: Logged, sent: str | None) -> None:
    headers = {} if sent is None else {"X-Request-Id": sent.encode("latin-1")}
    made = logged.proxy.request("GET", "/healthz", headers=headers).headers["X-Request-Id"]

    assert re.fullmatch("[0-9a-f]{32}", made)
    assert (len(logged.of_service(made)), len(logged.of_proxy(made))) == (1, 1)


def test_a_refused_token_is_logged_with_the_requests_id(logged: Logged) -> None:
    headers = {"X-Request-Id": "refused", "Authorization": "Bearer x.y.z"}
    assert logged.proxy.request("GET", ADA, headers=headers).status_code == 401

    [entry] = logged.of_service("refused")
    assert (entry["level"], entry["message"]) == ("INFO", "a token was refused: DecodeError")


def test_the_access_log_has_the_path_as_it_was_sent_and_no_secrets(logged: Logged) -> None:
    headers = {"X-Request-Id": "secret or not", "Authorization": "hunter2"}
    logged.proxy.request("GET", '/cart/%0A"%ff\\?access_token=hunter2', headers=headers)

    [entry] = logged.of_proxy("secret or not")
    assert entry["path"] == "/cart/%0A%22%FF%5C"
    assert "hunter2" not in logged.proxy.log.read_text() + logged.service.log.read_text()


def test_a_fault_is_one_line_with_its_traceback_and_the_requests_id(site: Service, instances: list[Service]) -> None:
    execute("ALTER TABLE cart_items ADD CONSTRAINT odd CHECK (product_id <> 'p')")
    try:
        assert_problem(site.request("POST", ADA, json=LINE, headers={"X-Request-Id": "fault"}), 500)
    finally:
        execute("ALTER TABLE cart_items DROP CONSTRAINT odd")

    entries = [entry for instance in instances for entry in instance.entries()]
    [entry] = [entry for entry in entries if entry.get("request_id") == "fault"]
    assert entry["level"] == "ERROR" and "CheckViolation" in entry["exc_info"]


def test_a_start_says_that_no_tokens_are_asked_for(instances: list[Service]) -> None:
    said = [(entry["level"], entry["message"]) for entry in instances[0].entries()]

    assert ("WARNING", "Tokens are not asked for: all who reach this service may use every cart.") in said


def test_a_start_says_by_what_tokens_are_asked_for(logged: Logged) -> None:
    said = [(entry["level"], entry["message"]) for entry in logged.service.entries()]

    assert ("INFO", "Tokens are asked for: HS256, by JWT_KEY") in said


def hang_up(service: Service, request: bytes, count: int) -> None:
    """Send a request, read a part of the answer, and reset the connection."""
    with service.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(request)
        connection.recv(count)


@pytest.mark.parametrize("request_", [BUNDLE, BUNDLE * 20], ids=["one", "twenty"])
def test_a_client_that_hangs_up_leaves_no_line_that_is_not_json(logged: Logged, request_: bytes) -> None:
    for count in (1, 1000, 3000):
        hang_up(logged.service, request_, count)
    assert logged.service.request("GET", "/livez").status_code == 200

    assert all("level" in entry for entry in logged.service.entries())
