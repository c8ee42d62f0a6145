"""Serving and stopping, metrics and traces: gunicorn.conf.py.

Kept here: new connections are taken beside busy ones. At SIGTERM requests in progress are answered, and it is over in
ten seconds; the proxy answers by another instance, or 503. Traces and metrics need no code.
"""

import socket
import time

from tests.helpers import URL, Shoppers, eventually, gunicorn, nginx, request_bytes

LIVEZ = request_bytes("GET /livez", connection="keep-alive")


def assert_no_errors(service):
    """Assert that the service has logged no error."""
    assert not {"ERROR", "CRITICAL"} & {entry["level"] for entry in service.entries()}


def read_answers(connection, count):
    """Read so many answers."""
    answers = b""
    while answers.count(b"HTTP/1.1 200") < count:
        answers += connection.recv(2**20)


def test_a_client_that_sends_thousands_of_requests_at_once_holds_up_nobody(instances, background):
    with instances[0].connect() as hasty:
        hasty.sendall(LIVEZ * 5000)
        reading = background.submit(read_answers, hasty, 5000)

        assert instances[0].request("GET", "/livez").status_code == 200
        assert not reading.done()
        reading.result()


def test_a_stop_answers_what_is_in_progress_and_is_over_in_ten_seconds(tmp_path, postgres, background):
    patient = f"{URL}&options=-c%20statement_timeout%3D2900ms"
    with gunicorn(tmp_path / "log", DATABASE_URL=patient) as service, service.connect() as client_that_stays:
        client_that_stays.sendall(LIVEZ)
        client_that_stays.recv(1000)
        with postgres.holding_cart("ada"):
            in_progress = background.submit(service.change)
            postgres.await_waiting(1)
            service.process.terminate()
            time.sleep(2.2)  # longer than a statement may take by default

        assert in_progress.result().json() == {"user_id": "ada", "product_id": "p", "quantity": 1}
        assert service.process.wait(10) == 0
    assert postgres.stored() == [("ada", "p", 1)]
    assert_no_errors(service)


def test_a_stop_under_load_loses_nothing_and_the_proxy_answers_503(tmp_path, postgres):
    with gunicorn(tmp_path / "log") as service, nginx(tmp_path, service.url) as proxy:
        with Shoppers(proxy, 8) as shoppers:
            shoppers.await_answers(100)
            assert service.stop() == 0
            eventually(lambda: "unknown" in shoppers.codes)

    assert shoppers.codes.keys() == {"made", "unknown"}
    assert postgres.total() == shoppers.codes["made"]
    assert_no_errors(service)


def test_a_stop_beside_another_instance_costs_a_shopper_one_503_at_most(tmp_path, postgres):
    with gunicorn(tmp_path / "1") as one, gunicorn(tmp_path / "2") as two, nginx(tmp_path, one.url, two.url) as proxy:
        with Shoppers(proxy, 8) as shoppers:
            shoppers.await_answers(100)
            one.process.terminate()
            shoppers.await_answers(300)

    assert shoppers.codes["unknown"] <= 8  # one whose connection was not taken yet when the instance closed its socket
    assert postgres.total() == shoppers.codes["made"]


def test_metrics_go_to_statsd(tmp_path):
    with socket.socket(type=socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(5)
        with gunicorn(tmp_path / "log", "--statsd-host", f"127.0.0.1:{receiver.getsockname()[1]}") as service:
            assert service.request("GET", "/nothing").status_code == 404
            received = [receiver.recv(1000)]
            while not received[-1].startswith(b"gunicorn.request.status.404:1"):
                received.append(receiver.recv(1000))

    assert any(metric.startswith(b"gunicorn.request.duration:") for metric in received)


def test_traces_go_to_a_collector_and_the_last_ones_at_the_stop(httpserver, tmp_path):
    httpserver.expect_request("/v1/traces").respond_with_data()
    settings = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": httpserver.url_for(""),
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
    }
    with gunicorn(tmp_path / "log", **settings) as service:
        assert [service.get(f"user-{n}").status_code for n in range(20)] == [404] * 20
        assert service.stop() == 0

    sent = b"".join(request.data for request, _ in httpserver.log)
    assert all(f"/cart/users/user-{n}".encode() in sent for n in range(20))
    assert "Traceback" not in service.log.read_text()
