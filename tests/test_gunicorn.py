"""Serving and stopping, metrics and traces: gunicorn.conf.py.

Kept here: new connections are taken beside busy ones. At SIGTERM requests in progress are answered, and it is over in
ten seconds; the proxy answers by another instance. Traces and metrics need no code.
"""

import socket
import time

from tests.helpers import URL, Shoppers, gunicorn, nginx, request_bytes

LIVEZ = request_bytes("GET", "/livez")


def read_answers(connection, count):
    """Read so many answers."""
    answers = b""
    while answers.count(b"HTTP/1.1 200") < count:
        answers += (received := connection.recv(2**20))
        assert received


def test_a_client_that_sends_thousands_of_requests_at_once_holds_up_nobody(instances, background):
    """As `finish` in gunicorn.conf.py lets others run after each answer."""
    with instances[0].connect() as hasty:
        hasty.sendall(LIVEZ * 5000)
        reading = background.submit(read_answers, hasty, 5000)

        assert instances[0].request("GET", "/livez").status_code == 200
        assert not reading.done()  # thousands are still to come
        reading.result()


def test_a_stop_answers_what_is_in_progress(tmp_path, postgres, background):
    # The request takes longer than others may (2 s), and shorter than SILENCE_TIMEOUT (3 s) and graceful_timeout (5 s).
    patient = f"{URL}&options=-c%20statement_timeout%3D2900ms"
    with gunicorn(tmp_path / "log", DATABASE_URL=patient) as service:
        with postgres.holding_cart("ada"):
            in_progress = background.submit(service.change)
            postgres.await_waiting(1)
            service.begin_stop()
            time.sleep(2.2)

        assert in_progress.result().json() == {"user_id": "ada", "product_id": "p", "quantity": 1}
        assert service.process.wait(10) == 0
    assert postgres.stored() == [("ada", "p", 1)]


def test_a_stop_beside_a_client_that_stays_is_over_in_ten_seconds(tmp_path):
    with gunicorn(tmp_path / "log") as service, service.connect() as client:
        client.sendall(LIVEZ)
        client.recv(1000)
        service.begin_stop()

        assert service.process.wait(10) == 0


def test_a_stop_under_load_loses_nothing_and_logs_no_error(tmp_path, postgres):
    with gunicorn(tmp_path / "1") as one, gunicorn(tmp_path / "2") as two, nginx(tmp_path, one.url, two.url) as proxy:
        with Shoppers(proxy, 8) as shoppers:
            shoppers.await_answers(100)
            one.begin_stop()
            shoppers.await_answers(300)
        assert one.process.wait(10) == 0

    assert shoppers.codes["unknown"] <= 8  # one each, sent just as the instance closed the connection
    assert postgres.total() == shoppers.codes["made"]
    assert not {"ERROR", "CRITICAL"} & {entry["level"] for entry in one.entries()}


def test_metrics_go_to_statsd(tmp_path):
    with socket.socket(type=socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(5)
        with gunicorn(tmp_path / "log", "--statsd-host", f"127.0.0.1:{receiver.getsockname()[1]}") as service:
            assert service.request("GET", "/nothing").status_code == 404
            received = [receiver.recv(1000)]
            while not received[-1].startswith(b"gunicorn.request.status.404:1"):  # the last one of a request
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
        assert [service.get(f"user-{n}").status_code for n in range(20)] == [404] * 20  # fewer than it sends at a time
        service.begin_stop()
        assert service.process.wait(10) == 0

    sent = b"".join(request.data for request, _ in httpserver.log)
    assert all(f"/cart/users/user-{n}".encode() in sent for n in range(20))
    assert "Traceback" not in service.log.read_text()
