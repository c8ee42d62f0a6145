"""Shopping carts over HTTP, kept in PostgreSQL.

    POST   /cart/users/{user_id}                   add to a line of the cart, or to a list of lines together
    PATCH  /cart/users/{user_id}                   set the quantity of a line, or of a list of lines together
    GET    /cart/users/{user_id}                   read the cart
    DELETE /cart/users/{user_id}[?product_id=...]  empty the cart, or remove one line
    GET    /healthz                                tell whether the carts can be used
    GET    /livez                                  tell that the process answers
    GET    /docs and /openapi.yaml                 the contract, to try out and to read

A request is checked, runs one SQL statement, and is answered. database.py sends it; schema.sql has the functions.
"""

import hashlib
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl

import click
import msgspec
import psycopg2.errors
import sqlalchemy as sa
from flask import Flask, Response, abort, request
from flask_cors import CORS
from flask_swagger_ui import get_swaggerui_blueprint
from msgspec import Meta
from sqlalchemy.orm import Mapped, mapped_column
from werkzeug.exceptions import Conflict, HTTPException, ServiceUnavailable, UnprocessableEntity

import tokens
from database import db, execute, run, run_locking
from settings import SETTINGS

app = Flask(__name__, static_folder=None)
app.url_map.merge_slashes = False  # a path with an empty id is not found, and redirects nowhere
app.config["MAX_CONTENT_LENGTH"] = 1024 * 1024  # bytes, as in nginx.conf
app.config["SQLALCHEMY_DATABASE_URI"] = "postgresql+psycopg2://"
db.init_app(app)
if SETTINGS.cors_origins is not None:
    # As patterns, because flask-cors takes a text with brackets, as IPv6 has, for a pattern of its own.
    origins = [o if o == "*" else re.compile(rf"{re.escape(o)}\Z") for o in re.split(", *", SETTINGS.cors_origins)]
    exposed = ["Retry-After", "WWW-Authenticate", "X-Request-Id"]
    CORS(app, origins=origins, methods=["GET", "POST", "PATCH", "DELETE"], expose_headers=exposed, max_age=600)


class CartItem(db.Model):  # type: ignore[name-defined, misc]
    """A line of a cart: how many of a product a user wants. schema.sql has its constraints."""

    __tablename__ = "cart_items"

    user_id: Mapped[str] = mapped_column(sa.Text(collation="C"), primary_key=True)
    product_id: Mapped[str] = mapped_column(sa.Text(collation="C"), primary_key=True)
    quantity: Mapped[int]
    updated_at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True), server_default=sa.func.now())
    added_at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True), server_default=sa.func.clock_timestamp())


# What a request may hold

MAX_LINES = 500
MAX = 2**31 - 1  # of PostgreSQL's integer
Id = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[^\0]*$")]
# JSON Schema counts 2.0 as an integer.
Amount = Annotated[int, Meta(ge=-MAX - 1, le=MAX)] | Annotated[float, Meta(ge=-MAX - 1, le=MAX, multiple_of=1)]
Quantity = Annotated[int, Meta(ge=0, le=MAX)] | Annotated[float, Meta(ge=0, le=MAX, multiple_of=1)]


class Addition(msgspec.Struct):
    """A product, and how many are added, or taken away if the quantity is negative."""

    product_id: Id
    quantity: Amount

    def __post_init__(self) -> None:
        if self.quantity == 0:
            raise ValueError("`quantity` must not be 0")


class NewQuantity(msgspec.Struct):
    """A product, and its quantity from now on; 0 removes its line."""

    product_id: Id
    quantity: Quantity


add_decoder = msgspec.json.Decoder(Addition | Annotated[list[Addition], Meta(min_length=1, max_length=MAX_LINES)])
set_decoder = msgspec.json.Decoder(NewQuantity | Annotated[list[NewQuantity], Meta(min_length=1, max_length=MAX_LINES)])


# Errors

UNKNOWN = "It is not known whether the change was made. POST and PATCH with an Idempotency-Key are safe to repeat."


@app.errorhandler(HTTPException)
def problem(error: HTTPException, code: str | None = None) -> Response:
    """Answer an error with a problem document (RFC 9457). `code` names the reason, if the status has several."""
    document = {"type": "about:blank", "title": error.name, "status": error.code, "detail": error.description}
    if code := code or {422: "invalid", 503: "unchanged"}.get(error.code or 0):
        document["code"] = code
    headers = {**dict(error.get_headers()), "Content-Type": "application/problem+json", "Cache-Control": "no-store"}
    return Response(msgspec.json.encode(document), error.code, headers)


@app.errorhandler(sa.exc.SQLAlchemyError)
@app.errorhandler(psycopg2.Error)
def unavailable(error: Exception) -> Response:
    """Answer a failure of the database with 503, and leave what the database said to the log.

    A change was not made if its statement was not sent, or if the server says that it failed.

    :raise IntegrityError, DataError: no route expects it, so it is a fault of the service: 500
    """
    if isinstance(error, psycopg2.IntegrityError | psycopg2.DataError):
        raise error
    app.logger.error("%r", error)
    # No SQLSTATE, class 08 and 57P...: the connection was lost, and nobody knows what became of the statement.
    is_lost = isinstance(error, psycopg2.Error) and (not error.pgcode or error.pgcode.startswith(("08", "57P")))
    is_known = not is_lost or request.method in ("GET", "HEAD")
    detail = f"The carts are not available at the moment. {'Nothing was changed. Try again.' if is_known else UNKNOWN}"
    return problem(ServiceUnavailable(detail, retry_after=1), "unchanged" if is_known else "unknown")


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
    :raise Unauthorized, Forbidden, ServiceUnavailable: as tokens.py says, if the settings ask for tokens
    """
    user_id = (request.view_args or {}).get("user_id")
    if user_id is None or request.method == "OPTIONS":
        return
    if "\ufffd" in user_id:
        abort(400, "user_id must be UTF-8, without U+FFFD.")
    check_id("user_id", user_id)
    if tokens.KEY or tokens.ISSUER:
        tokens.check(request.headers.get("Authorization", ""), user_id)


def parse_key() -> str | None:
    """Return the request's Idempotency-Key (draft-ietf-httpapi-idempotency-key-header), or None.

    :raise BadRequest: it is not 1 to 255 characters of printable ASCII, or only blanks and quotes
    """
    key = request.headers.get("Idempotency-Key")
    if key is not None and not re.fullmatch(r"(?=.*[!#-~])[ -~]{1,255}", key := key.strip('"')):
        abort(400, "Idempotency-Key must be 1 to 255 characters of printable ASCII, not only blanks and quotes.")
    return key


def parse_body(decoder: msgspec.json.Decoder[Any]) -> Any:
    """Return what a decoder makes of the request's body, in JSON (RFC 8259): a line or a list of them.

    :raise UnsupportedMediaType: the body is not said to be JSON
    :raise RequestEntityTooLarge: it is larger than 1 MiB
    :raise BadRequest: it is not JSON
    :raise UnprocessableEntity: a field is missing, of the wrong type or out of range
    """
    if request.mimetype != "application/json":
        abort(415, "The body must be application/json.")
    try:
        return decoder.decode(request.get_data(cache=False).decode())  # or members that are ignored might not be UTF-8
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
    """Return a JSON response that browsers do not store."""
    headers = {"Content-Type": "application/json", "Cache-Control": "no-store"}
    return Response(msgspec.json.encode(document), headers=headers)


@app.post("/cart/users/<user_id>")
@app.patch("/cart/users/<user_id>")
def change_cart(user_id: str) -> Response:
    """Add to a line of the cart (POST) or set it (PATCH), and return its new total. A list's lines change together.

    :raise Conflict: a total would be above 2147483647, or a new line would be one too many
    :raise UnprocessableEntity: a line is invalid, or the key was used with another method or body
    """
    is_set = request.method == "PATCH"
    key, body = parse_key(), parse_body(set_decoder if is_set else add_decoder)
    is_list = isinstance(body, list)
    lines = [(line.product_id, int(line.quantity)) for line in (body if is_list else [body])]
    product_ids, quantities = [product_id for product_id, _ in lines], [quantity for _, quantity in lines]
    # A key belongs to the method and the parsed changes: 2.0 is 2. For POST the digest is the one of 3.0.0.
    changes = lines if is_list else lines[0]
    digest = hashlib.sha256(msgspec.json.encode({"set": changes} if is_set else changes)).digest() if key else None
    try:
        [(totals,)] = run_locking("change_cart", user_id, is_set, product_ids, quantities, MAX_LINES, key, digest)
    except psycopg2.errors.UniqueViolation:  # 23505
        return problem(UnprocessableEntity("Idempotency-Key was used with another method or body."), "key_reused")
    except (psycopg2.errors.NumericValueOutOfRange, psycopg2.errors.ProgramLimitExceeded) as error:  # 22003, 54000
        is_full = isinstance(error, psycopg2.errors.ProgramLimitExceeded)
        reason = f"The cart is full: {MAX_LINES} lines" if is_full else f"The line's total would be above {MAX}"
        # DETAIL is the place of the change, from 1. Places are named as msgspec names them.
        detail = f"{reason} - at `$[{int(error.diag.message_detail or 1) - 1}]`" if is_list else reason
        return problem(Conflict(detail), "cart_full" if is_full else "total_too_large")
    answers = [{"product_id": product, "quantity": total} for product, total in zip(product_ids, totals, strict=True)]
    return answer(answers if is_list else {"user_id": user_id, **answers[0]})


@app.get("/cart/users/<user_id>")
def get_cart(user_id: str) -> Response:
    """Return the lines of the cart, in the order in which they were added.

    :raise NotFound: the cart is empty
    """
    lines = run("read_cart", user_id)
    if not lines:
        abort(404, "No cart items found for this user")
    return answer([{"product_id": product_id, "quantity": quantity} for product_id, quantity in lines])


@app.delete("/cart/users/<user_id>")
def empty_cart(user_id: str) -> Response:
    """Empty the cart, or remove the one line that the query names.

    :raise NotFound: there was nothing to remove
    """
    product_id = parse_query()
    [(was_there,)] = run_locking("empty_cart", user_id, product_id)
    if not was_there:
        abort(404, f"No {'cart items' if product_id is None else 'such cart item'} found for this user")
    return answer({"msg": "All cart items deleted" if product_id is None else "Cart item deleted"})


@app.get("/healthz")
def healthz() -> Response:
    """Return ok if the database has the carts and lets the service change them."""
    run_locking("check_carts")
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
# Without this, Flask redirects /docs to /docs/ with the host and the port that the service has behind the proxy.
app.add_url_rule("/docs", endpoint="swagger_ui.show")


# The commands


@app.cli.command("init-db")
def init_db() -> None:
    """Load schema.sql into the database, or upgrade what is there. Repeating it does no harm."""
    execute(Path(app.root_path, "schema.sql").read_text())
    click.echo("The database has the tables and functions of this version.")


@app.cli.command("expire")
@click.option("--days", type=click.IntRange(1, 3650), default=SETTINGS.expire_days, help="As EXPIRE_DAYS.")
def expire(days: int | None) -> None:
    """Remove expired keys and, if days are given, the carts that nobody changed for so long."""
    [(carts, keys)] = execute("CALL expire(%s)", days)
    click.echo(f"Removed {carts} carts and {keys} idempotency keys.")
