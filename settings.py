"""The settings: environment variables, checked when this is imported. README lists them.

A wrong one ends the start with a message that says what it must be, and does not repeat it: it may be a secret.
NAME_FILE instead of NAME is the path of a file that holds the value, as a container's secrets are.
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


def setting(name: str, default: str | None, parse: Callable[[str], Any], rule: str) -> Any:
    """Return what `parse` makes of an environment variable, or of the file that NAME_FILE names.

    None where neither is set and there is no default.

    :raise SystemExit: `parse` raised ValueError; the message names the variable and the rule
    """
    value, file = os.environ.get(name, default), os.environ.get(f"{name}_FILE")
    if file is not None and name in os.environ:
        sys.exit(f"cart: {name} and {name}_FILE are both set. Set one of them.")
    try:
        if file is not None:
            value = Path(file).read_text().removesuffix("\n")
        if value is None:
            return None
        if value != value.strip() and not value.startswith("-----BEGIN"):  # the form of a key, which ends with a line
            raise ValueError("It begins or ends with a blank or a line break.")
        return parse(value)
    except OSError as error:
        sys.exit(f"cart: {name}_FILE cannot be read: {error.strerror}: {file}")
    except ValueError as error:
        sys.exit(f"cart: {name} must be {rule}. {error}".rstrip())


def parse_pool_size(value: str) -> int:
    """Return a number above 0."""
    if not value.isdecimal() or int(value) < 1:
        raise ValueError
    return int(value)


def parse_database_url(value: str) -> dict[str, str]:
    """Return libpq's parameters for a URL with any driver (PostgreSQL's manual, "Connection URIs")."""
    scheme, _, rest = value.partition("://")
    if scheme.partition("+")[0] not in ("postgresql", "postgres"):
        raise ValueError
    names = [name for name, _ in parse_qsl(rest.partition("?")[2], keep_blank_values=True)]
    if len(names) > len(set(names)):
        raise ValueError("A parameter is given twice.")  # libpq would take the last one
    try:
        parameters = psycopg2.extensions.parse_dsn(f"postgresql://{rest}")
    except psycopg2.Error as error:
        raise ValueError from error
    if not re.fullmatch(r"[0-9,]*", parameters.get("port", "")):
        raise ValueError("The port must be a number.")
    return dict(parameters)


def parse_algorithms(value: str) -> list[str]:
    """Return the names of algorithms that sign tokens (RFC 7518)."""
    names = [name.strip() for name in value.split(",")]
    if not set(names) <= set(ALGORITHMS):
        raise ValueError
    return names


def parse_key(value: str) -> Any:
    """Return the key that verifies tokens, which must fit JWT_ALGORITHM."""
    algorithm = jwt.get_algorithm_by_name(JWT_ALGORITHMS[0])
    try:
        key = algorithm.prepare_key(value)
    except Exception as error:  # each algorithm has its own ways to fail
        raise ValueError from error
    if reason := "It is a private key." if hasattr(key, "public_key") else algorithm.check_key_length(key):
        raise ValueError(reason)
    return key


def parse_jwks_url(value: str) -> str:
    """Return a URL that nobody on the way can change the answer of."""
    url = urlsplit(value)
    if not url.hostname or (url.scheme != "https" and (url.scheme, url.hostname) not in LOCAL):
        raise ValueError
    return value


def parse_text(value: str) -> str:
    """Return a text that is not empty."""
    if not value:
        raise ValueError
    return value


def parse_origins(value: str) -> list[str | re.Pattern[str]]:
    """Return the origins as patterns, because flask-cors compares texts loosely."""
    origins = [origin.strip() for origin in value.split(",")]
    if not all(re.fullmatch(r"\*|https?://([A-Za-z0-9.-]+|\[[0-9a-f:]+\])(:\d+)?", origin) for origin in origins):
        raise ValueError
    return [origin if origin == "*" else re.compile(rf"{re.escape(origin)}\Z") for origin in origins]


ALGORITHMS = [name for name in jwt.algorithms.get_default_algorithms() if name != "none"]
LOCAL = [("http", "localhost"), ("http", "127.0.0.1")]

URL_RULE = "a URL that libpq accepts, like postgresql://user:password@host:port/database"
DATABASE = setting("DATABASE_URL", None, parse_database_url, URL_RULE)
POOL_SIZE = setting("DATABASE_POOL_SIZE", "10", parse_pool_size, "a whole number above 0")
CORS_ORIGINS = setting("CORS_ORIGINS", None, parse_origins, "origins like https://shop.example, http://localhost:3000")

JWT_JWKS_URL = setting("JWT_JWKS_URL", None, parse_jwks_url, "an https URL; http is for localhost")
DEFAULT_ALGORITHM = "HS256" if JWT_JWKS_URL is None else "RS256"
JWT_ALGORITHMS = setting("JWT_ALGORITHM", DEFAULT_ALGORITHM, parse_algorithms, f"one of {', '.join(ALGORITHMS)}")
JWT_KEY = setting("JWT_KEY", None, parse_key, f"a secret or a PEM public key for JWT_ALGORITHM {JWT_ALGORITHMS[0]}")
JWT_AUDIENCE = setting("JWT_AUDIENCE", None, parse_text, "a text that is not empty")
JWT_ISSUER = setting("JWT_ISSUER", None, parse_text, "a text that is not empty")

if JWT_JWKS_URL is None and len(JWT_ALGORITHMS) > 1:
    sys.exit("cart: JWT_ALGORITHM must be one algorithm. Several are for JWT_JWKS_URL.")
if JWT_JWKS_URL is not None and any(name.startswith("HS") for name in JWT_ALGORITHMS):
    sys.exit("cart: JWT_ALGORITHM must be asymmetric, like RS256, where JWT_JWKS_URL publishes the keys.")
if JWT_JWKS_URL is not None and JWT_KEY is not None:
    sys.exit("cart: JWT_KEY and JWT_JWKS_URL are both set. Set one of them.")
if JWT_JWKS_URL is None and JWT_KEY is None:
    for name in ("JWT_ALGORITHM", "JWT_AUDIENCE", "JWT_ISSUER"):
        if name in os.environ or f"{name}_FILE" in os.environ:
            sys.exit(f"cart: {name} is for tokens, which need JWT_KEY or JWT_JWKS_URL.")
