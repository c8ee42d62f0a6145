"""Serving and stopping, metrics and traces: gunicorn.conf.py.

Kept here: new connections are taken beside busy ones. At SIGTERM requests in progress are answered, and it is over in
ten seconds; the proxy answers by another instance, or 503. Traces and metrics need no code.
"""

import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pytest_httpserver import HTTPServer

from tests.helpers import (
    UNKNOWN,
    URL,
    Service,
    Shoppers,
    assert_problem,
    await_waiting,
    execute,
    gunicorn,
    holding,
    lock_of,
    nginx,
    request_bytes,
    stored,
)

PATIENT = f"{URL}&options=-c%20statement_timeout%3D2900ms"

# Serving


def read_answers(client: socket.socket, count: int) -> None:
    """Read so many answers."""
    answers = b""
    while answers.count(b"HTTP/1.1 200") < count:
        answers += client.recv(2**20)


def test_a_client_that_sends_thousands_of_requests_at_once_holds_up_nobody(
    instances: list[Service], background: ThreadPoolExecutor
) -> None:
    with instances[0].connect() as hasty:
        hasty.sendall(request_bytes("GET /livez", connection="keep-alive") * 5000)
        reading = background.submit(read_answers, hasty, 5000)

        assert instances[0].request("GET", "/livez").status_code == 200
        assert not reading.done()
        reading.result()


# Stopping


def test_a_stop_answers_what_is_in_progress(tmp_path: Path, background: ThreadPoolExecutor) -> None:
    with gunicorn(tmp_path / "log", DATABASE_URL=PATIENT) as service:
        with holding(lock_of("ada")):
            in_progress = background.submit(service.post)
            await_waiting(1)
            service.terminate()

        assert in_progress.result().json() == {"user_id": "ada", "product_id": "p", "quantity": 1}
        assert service.wait(10) == 0
    assert stored() == [("ada", "p", 1)]
    assert not {"ERROR", "CRITICAL"} & {entry["level"] for entry in service.entries()}


def test_a_stop_beside_a_client_that_stays_is_over_in_ten_seconds(tmp_path: Path) -> None:
    with gunicorn(tmp_path / "log") as service, service.connect() as idle:
        idle.sendall(request_bytes("GET /livez", connection="keep-alive"))
        idle.recv(1000)
        service.terminate()

        assert service.wait(10) == 0


def test_a_stop_under_load_loses_nothing_and_the_proxy_answers_503(tmp_path: Path) -> None:
    with gunicorn(tmp_path / "log") as service, nginx(tmp_path, service.url) as proxy:
        with Shoppers(proxy, 8) as shoppers:
            shoppers.await_answers(100)
            service.terminate()
            assert service.wait(10) == 0
            shoppers.await_status(503)
        assert_problem(proxy.post(), 503, "unknown", UNKNOWN)

    assert shoppers.statuses.keys() == {200, 503}
    assert execute("SELECT sum(quantity) FROM cart_items") == [(shoppers.statuses[200],)]
    assert not {"ERROR", "CRITICAL"} & {entry["level"] for entry in service.entries()}


def test_a_stop_beside_another_instance_costs_a_shopper_one_503_at_most(tmp_path: Path) -> None:
    with gunicorn(tmp_path / "1") as one, gunicorn(tmp_path / "2") as two, nginx(tmp_path, one.url, two.url) as proxy:
        with Shoppers(proxy, 8) as shoppers:
            shoppers.await_answers(100)
            one.terminate()
            shoppers.await_answers(300)

    assert shoppers.statuses[503] <= 8  # one whose connection was not taken yet when the instance closed its socket
    assert execute("SELECT sum(quantity) FROM cart_items") == [(shoppers.statuses[200],)]


# Metrics and traces


def test_metrics_go_to_statsd(tmp_path: Path) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(5)
        address = f"127.0.0.1:{receiver.getsockname()[1]}"
        with gunicorn(tmp_path / "log", "--statsd-host", address) as service:
            assert [service.request("GET", "/nothing").status_code for _ in range(5)] == [404] * 5
            seen: Counter[bytes] = Counter()
            while seen[b"gunicorn.request.status.404"] < 5:
                seen[receiver.recv(1000).partition(b":")[0]] += 1

    assert seen[b"gunicorn.request.duration"] >= 5 and seen[b"gunicorn.requests"] >= 5


def test_traces_go_to_a_collector_and_the_last_ones_at_the_stop(httpserver: HTTPServer, tmp_path: Path) -> None:
    httpserver.expect_request("/v1/traces").respond_with_data()
    settings: Any = {"OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}
    settings |= {"OTEL_EXPORTER_OTLP_ENDPOINT": httpserver.url_for(""), "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}

    with gunicorn(tmp_path / "log", **settings) as service:
        assert [service.get(f"user-{n}").status_code for n in range(20)] == [404] * 20
        service.terminate()
        assert service.wait(10) == 0

    sent = b"".join(request.data for request, _ in httpserver.log)
    assert all(f"/cart/users/user-{n}".encode() in sent for n in range(20))
    assert "raceback" not in service.log.read_text()
