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
import re
from datetime import datetime
from logging import LogRecord
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl

import click
import msgspec
import psycopg2.errors
import sqlalchemy as sa
from flask import Flask, Response, abort, has_request_context, request
from flask_cors import CORS
from flask_sqlalchemy import SQLAlchemy
from flask_swagger_ui import get_swaggerui_blueprint
from msgspec import Meta
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge, ServiceUnavailable

import settings
import tokens
from database import Database, Statement, connect, run_command

MAX_LINES = 500
MAX_BODY = 1024 * 1024  # bytes; 500 lines with the longest ids need half of it if no character is escaped


# The app

app = Flask(__name__, static_folder=None)
app.url_map.merge_slashes = False  # a path with an empty id is not found, and redirects nowhere
app.config.update(
    MAX_CONTENT_LENGTH=MAX_BODY,
    # For `flask shell` alone: requests use the connections of database.py.
    SQLALCHEMY_DATABASE_URI="postgresql+psycopg2://",
    SQLALCHEMY_ENGINE_OPTIONS={"creator": connect},
)
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
READ_CART = Statement("read_cart", LINES.where(CartItem.user_id == sa.bindparam("user_id")))
CHANGE_CART = Statement(
    "change_cart", sa.text(f"SELECT change_cart(:user_id, :product_ids, :quantities, {MAX_LINES}, :key, :request)")
)
EMPTY_CART = Statement("empty_cart", sa.text("SELECT empty_cart(:user_id, :product_id)"))
CHECK_CARTS = Statement("check_carts", sa.text("SELECT check_carts()"))

database = Database(READ_CART, CHANGE_CART, EMPTY_CART, CHECK_CARTS)


# What a request may hold

Id = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[^\0]*$")]
WholeNumber = Annotated[float, Meta(ge=-(2**31), le=2**31 - 1, multiple_of=1)]  # msgspec's int refuses 2.0


class Change(msgspec.Struct):
    """By how much the quantity of a product changes."""

    product_id: Id
    quantity: WholeNumber

    def __post_init__(self) -> None:
        if self.quantity == 0:
            raise ValueError("`quantity` must not be 0")


ChangeList = Annotated[list[Change], Meta(min_length=1, max_length=MAX_LINES)]
body_decoder = msgspec.json.Decoder(Change | ChangeList)


# Errors

UNAVAILABLE = "The carts are not available at the moment."
UNKNOWN = "It is not known whether the change was made. DELETE, and POST with an Idempotency-Key, are safe to repeat."


@app.errorhandler(HTTPException)
def problem(error: HTTPException) -> Response:
    """Answer an error with a problem document (RFC 9457), and with the headers of its status."""
    document = {"type": "about:blank", "title": error.name, "status": error.code, "detail": error.description}
    headers = {**dict(error.get_headers()), "Content-Type": "application/problem+json"}
    return Response(msgspec.json.encode(document), error.code, headers)


@app.errorhandler(psycopg2.Error)
def unavailable(error: psycopg2.Error) -> Response:
    """Answer a failure of the database with 503, and leave what the database said to the log."""
    app.logger.error("database: %r", error)
    is_change = request.method in ("POST", "DELETE")
    return problem(ServiceUnavailable(f"{UNAVAILABLE} {UNKNOWN if is_change else 'Try again.'}", retry_after=1))


# The id of a request, which the caller or clients.py gives it: in the answer and in the logs


@app.after_request
def add_request_id(response: Response) -> Response:
    """Put the request's id into the answer."""
    if "X-Request-Id" in request.headers:
        response.headers["X-Request-Id"] = request.headers["X-Request-Id"]
    return response


def log_request_id(record: LogRecord) -> bool:
    """Put the request's id on its line of the log."""
    record.request_id = request.headers.get("X-Request-Id") if has_request_context() else None
    return True


app.logger.addFilter(log_request_id)


# The checks of a request


def check_id(name: str, value: str) -> str:
    """Return an id of the path or the query, which must be 1 to 255 characters other than NUL.

    :raise UnprocessableEntity: it is anything else
    """
    try:
        return msgspec.convert(value, Id)
    except msgspec.ValidationError as error:
        abort(422, f"{name}: {error}")


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
    check_id("user_id", user_id)
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
    key = key.strip('"')
    if not re.fullmatch(r"[ -~]{1,255}", key):
        abort(400, "Idempotency-Key must be 1 to 255 characters of printable ASCII.")
    return key


def parse_body() -> Any:
    """Return the Change, or the list of them, that is the request's body in JSON (RFC 8259).

    :raise UnsupportedMediaType: the body is not said to be JSON
    :raise RequestEntityTooLarge: it is larger than 1 MiB
    :raise BadRequest: it is not JSON, or breaks off
    :raise UnprocessableEntity: a field is missing, of the wrong type or out of range
    """
    if request.mimetype != "application/json":
        abort(415, "The body must be application/json.")
    try:
        body = request.get_data(cache=False)
        if len(body) < (request.content_length or 0):  # which Werkzeug leaves to the server, and gunicorn to the app
            abort(400, "The body did not arrive whole.")
        return body_decoder.decode(body)
    except RequestEntityTooLarge:
        abort(413, f"The body must be at most {MAX_BODY} bytes.")
    except msgspec.ValidationError as error:
        abort(422, str(error))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        abort(400, f"The body must be JSON: {error}")


def parse_query() -> str | None:
    """Return the product that the query names, or None if there is no query.

    :raise BadRequest: the query is not UTF-8
    :raise UnprocessableEntity: it holds anything but one product_id, so that a slip does not empty a cart
    """
    if not request.query_string:
        return None
    try:
        fields = parse_qsl(request.query_string.decode(), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        abort(400, "The query must be UTF-8.")
    if [name for name, _ in fields] != ["product_id"]:
        abort(422, "The query must hold product_id, once, and nothing else.")
    return check_id("product_id", fields[0][1])


# The routes


def answer(document: object) -> Response:
    """Return a JSON response."""
    return Response(msgspec.json.encode(document), content_type="application/json")


@app.post("/cart/users/<user_id>")
def add_item(user_id: str) -> Response:
    """Add to a line of the cart, or take from it, and return its new total. The changes of a list are made together.

    :raise Conflict: a total would be above 2147483647, or a new line would be one too many
    :raise UnprocessableEntity: a change is invalid, or the key was used with another body
    """
    key, body = parse_key(), parse_body()
    is_list = isinstance(body, list)
    changes = [(change.product_id, int(change.quantity)) for change in (body if is_list else [body])]
    product_ids, quantities = [product_id for product_id, _ in changes], [quantity for _, quantity in changes]
    # A key belongs to the changes, however they were written: 2.0 is 2.
    digest = hashlib.sha256(msgspec.json.encode(changes if is_list else changes[0])).digest() if key else None
    label = "Line {}: " if is_list else ""  # the error's DETAIL is the place of the change
    try:
        [(totals,)] = database.run(
            CHANGE_CART, user_id, product_ids=product_ids, quantities=quantities, key=key, request=digest
        )
    except psycopg2.errors.NumericValueOutOfRange as error:  # 22003
        abort(409, f"{label.format(error.diag.message_detail)}quantity would bring the line's total above 2147483647.")
    except psycopg2.errors.ProgramLimitExceeded as error:  # 54000
        abort(409, f"{label.format(error.diag.message_detail)}The cart is full: {MAX_LINES} lines.")
    except psycopg2.errors.UniqueViolation:  # 23505
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
    """Return ok if the database has the carts and lets the service change them."""
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
app.add_url_rule("/docs", endpoint="swagger_ui.show")  # or it would redirect, to the address behind a proxy


# The commands


def execute(sql: str, *values: object) -> list[Any]:
    """Run SQL and return its rows.

    :raise ClickException: the database refused it or failed; what it said is put into one line
    """
    try:
        return run_command(sql, *values)
    except psycopg2.errors.LockNotAvailable as error:
        raise click.ClickException("other transactions hold what this needs. Run it again.") from error
    except psycopg2.Error as error:
        raise click.ClickException(" ".join(str(error).split())) from error


@app.cli.command("init-db")
def init_db() -> None:
    """Load schema.sql into the database, or upgrade what is there. Repeating it does no harm."""
    execute(Path(app.root_path, "schema.sql").read_text())
    click.echo("The database has the tables and functions of this version.")


@app.cli.command("expire")
@click.option("--days", type=click.IntRange(1, 3650), required=True, help="For how many days no line changed.")
def expire(days: int) -> None:
    """Remove the carts in which no line was added or changed for some days, and the keys that count no longer."""
    [(carts, keys)] = execute("CALL expire(%s)", days)
    click.echo(f"Removed {carts} carts and {keys} idempotency keys.")
