"""The logs of the proxy and of the service.

Kept here: each request has an id, which is in the answer, in the access log and in each line of the service's log that
belongs to it. Each line is one JSON object, whatever a client does, and has no secrets. A start says whether tokens are
asked for.
"""

import re
import socket
import struct

import pytest

from tests.helpers import ADA, LINE, SECRET, assert_problem, eventually, gunicorn, nginx, request_bytes


class Logged:
    """The service, whose database is not there and which asks for tokens, and the proxy in front of it."""

    def __init__(self, service, proxy):
        self.service, self.proxy = service, proxy

    def of_service(self, request_id):
        """Return what the service's log has of a request."""
        return [entry for entry in self.service.entries() if entry.get("request_id") == request_id]

    def of_proxy(self, request_id):
        """Return what the access log has of a request. It is written after the answer."""
        eventually(lambda: request_id in [entry["request_id"] for entry in self.proxy.entries()])
        return [entry for entry in self.proxy.entries() if entry["request_id"] == request_id]


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The service and the proxy."""
    folder = tmp_path_factory.mktemp("logged")
    with gunicorn(folder / "log", DATABASE_URL="postgresql://u@127.0.0.1:1/d", JWT_KEY=SECRET) as service:
        with nginx(folder, service.url) as proxy:
            yield Logged(service, proxy)


def test_a_request_has_one_id_in_its_answer_and_in_both_logs(logged):
    answer = logged.proxy.request("GET", "/healthz", headers={"X-Request-Id": 'a "b'})

    assert (answer.status_code, answer.headers["X-Request-Id"]) == (503, 'a "b')
    [of_service], [of_proxy] = logged.of_service('a "b'), logged.of_proxy('a "b')
    assert of_service.keys() == {"time", "level", "message", "logger", "pid", "request_id"}
    assert (of_service["level"], of_service["logger"]) == ("ERROR", "cart")
    assert of_proxy.keys() == {"time", "client", "request_id", "method", "path", "status", "seconds", "bytes"}
    assert (of_proxy["method"], of_proxy["path"], of_proxy["status"]) == ("GET", "/healthz", 503)


@pytest.mark.parametrize("sent", ["é".encode("latin-1"), "", "x" * 129, None], ids=["é", "empty", "long", "none"])
def test_a_request_without_a_fit_id_gets_one(logged, sent):
    made = logged.proxy.request("GET", "/healthz", headers={"X-Request-Id": sent}).headers["X-Request-Id"]

    assert re.fullmatch("[0-9a-f]{32}", made)
    assert (len(logged.of_service(made)), len(logged.of_proxy(made))) == (1, 1)


def test_a_refused_token_is_logged_with_the_requests_id(logged):
    headers = {"X-Request-Id": "refused", "Authorization": "Bearer x.y.z"}
    assert logged.proxy.request("GET", ADA, headers=headers).status_code == 401

    [entry] = logged.of_service("refused")
    assert (entry["level"], entry["message"]) == ("INFO", "a token was refused: DecodeError")


def test_the_access_log_has_method_and_path_as_they_were_sent_and_no_secrets(logged):
    headers = {"X-Request-Id": "secret or not", "Authorization": "hunter2"}
    logged.proxy.request("TRACE", "/cart/%0A%22%FF%5C?access_token=hunter2", headers=headers)

    [entry] = logged.of_proxy("secret or not")
    assert (entry["method"], entry["path"]) == ("TRACE", "/cart/%0A%22%FF%5C")
    assert "hunter2" not in logged.proxy.log.read_text() + logged.service.log.read_text()


@pytest.mark.parametrize(
    ("check", "error"), [("product_id <> 'p'", "CheckViolation"), ("quantity / 0 > 0", "DivisionByZero")]
)
def test_what_no_route_expects_is_a_500_and_one_line_with_its_traceback(site, instances, postgres, check, error):
    request_id = f"with {error}"
    postgres.execute(f"ALTER TABLE cart_items ADD CONSTRAINT fault CHECK ({check})")
    try:
        assert_problem(site.request("POST", ADA, json=LINE, headers={"X-Request-Id": request_id}), 500)
    finally:
        postgres.execute("ALTER TABLE cart_items DROP CONSTRAINT fault")

    entries = [entry for instance in instances for entry in instance.entries()]
    [entry] = [entry for entry in entries if entry.get("request_id") == request_id]
    assert entry["level"] == "ERROR" and error in entry["exc_info"]
    assert postgres.stored() == []


NO_TOKENS = ("WARNING", "Tokens are not asked for: all who reach this service may use every cart.")
BY_KEY = ("INFO", "Tokens are asked for: HS256, by JWT_KEY")
BY_ISSUER = ("INFO", "Tokens are asked for: RS256, by JWT_JWKS_URL")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("OPEN", "true", NO_TOKENS), ("JWT_KEY", SECRET, BY_KEY), ("JWT_JWKS_URL", "https://i.example/keys", BY_ISSUER)],
)
def test_a_start_says_by_what_tokens_are_asked_for(tmp_path, name, value, said):
    with gunicorn(tmp_path / "log", **{name: value}) as service:
        assert said in [(entry["level"], entry["message"]) for entry in service.entries()]


@pytest.mark.parametrize("count", [1, 20], ids=["within an answer", "within several answers"])
def test_a_client_that_hangs_up_leaves_no_line_that_is_not_json(logged, count):
    """As `access` in gunicorn.conf.py has it: the status of such a request is no number."""
    for read in (1, 1000, 3000):
        with logged.service.connect() as connection:
            # It ends with a reset instead of an orderly close.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(request_bytes("GET", "/docs/swagger-ui-bundle.js") * count)
            connection.recv(read)
    assert logged.service.request("GET", "/livez").status_code == 200

    logged.service.entries()  # which raises if a line, as of a traceback, is not JSON
