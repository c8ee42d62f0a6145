"""How a statement reaches PostgreSQL: over which connection, in whose turn, and for how long it is waited for."""

import re
from contextlib import closing
from typing import Any
from weakref import WeakValueDictionary

import click
import gevent
import psycopg2.errors
from flask_sqlalchemy import SQLAlchemy
from gevent.lock import BoundedSemaphore
from gevent.socket import wait_read, wait_write
from psycopg2.extensions import POLL_OK, POLL_READ
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase
from werkzeug.exceptions import TooManyRequests

from settings import DATABASE, SETTINGS

QUEUE_TIMEOUT = 2  # seconds for a place to become free
SILENCE_TIMEOUT = 3  # seconds for each answer of the database; above statement_timeout
ISOLATION = r"default_transaction_isolation=read\ committed"
OPTIONS = ["statement_timeout=2s", "lock_timeout=0", "row_security=off", ISOLATION]
PARAMETERS: dict[str, Any] = {
    "connect_timeout": 3,  # seconds, for commands; a worker's is SILENCE_TIMEOUT
    "tcp_user_timeout": 3000,  # milliseconds for a peer to confirm what was sent
    "keepalives_idle": 30,  # seconds
    "client_encoding": "utf8",
    "load_balance_hosts": "random",  # so that a silent host is not always the first
    **({"target_session_attrs": "read-write"} if "," in DATABASE.get("host", "") else {}),
    **DATABASE,
    "options": " ".join([*(f"-c {option}" for option in OPTIONS), DATABASE.get("options", "")]),  # the last one wins
}
STATEMENTS = {
    "read_cart": "SELECT product_id, quantity FROM cart_items WHERE user_id = $1 ORDER BY added_at, product_id",
    "change_cart": "SELECT change_cart($1, $2, $3::text[], $4::integer[], $5, $6, $7)",
    "empty_cart": "SELECT empty_cart($1, $2)",
    "check_carts": "SELECT check_carts()",
}
OUTDATED = (psycopg2.errors.FeatureNotSupported, psycopg2.errors.ReadOnlySqlTransaction)  # an old plan; a standby


def connect() -> Any:
    """Return a new connection for the pool, in autocommit: one statement is atomic by itself.

    :raise SQLAlchemyError: no server accepts it, or a table or a function is missing
    """
    try:
        connection = psycopg2.connect(**PARAMETERS)
        connection.autocommit = True
        if SETTINGS.database_prepare:
            connection.cursor().execute("; ".join(f"PREPARE {name} AS {text}" for name, text in STATEMENTS.items()))
        return connection
    except psycopg2.Error as error:
        raise SQLAlchemyError(f"no connection: {error}") from error


class Base(DeclarativeBase):
    """The models' base."""


POOL_SIZE = SETTINGS.database_pool_size
POOL = {"creator": connect, "pool_size": POOL_SIZE, "max_overflow": 0}
# In autocommit there is nothing to reset, and hstore, which each new connection would look for, is not used.
db = SQLAlchemy(model_class=Base, engine_options={**POOL, "pool_reset_on_return": None, "use_native_hstore": False})
# Requests wait here for a connection, first come, first served: SQLAlchemy's pool is not fair.
pool_places = BoundedSemaphore(POOL_SIZE)
# Changes wait here before, for a place of their cart, so that one cart leaves connections to the others.
cart_places: WeakValueDictionary[tuple[object, ...], BoundedSemaphore] = WeakValueDictionary()


def run_locking(name: str, *values: object) -> list[Any]:
    """Run a statement that takes a cart's lock, with one of the cart's places: a quarter of the pool's connections.

    :raise TooManyRequests: none of the cart's places became free in time, so the statement was not sent
    :raise SQLAlchemyError, psycopg2.Error: as `run` says
    """
    places = cart_places.setdefault(values[:1], BoundedSemaphore(max(1, POOL_SIZE // 4)))  # the first value is the user
    if not places.acquire(timeout=QUEUE_TIMEOUT):
        raise TooManyRequests("Too many requests for this cart at once. Nothing was changed. Try again.", retry_after=1)
    try:
        return run(name, *values)
    finally:
        places.release()


def run(name: str, *values: object) -> list[Any]:
    """Run a statement, committed by the time this returns, and return its rows.

    It uses the driver's cursor: SQLAlchemy Core costs 15 % of a request more, an ORM session several times that.

    :raise SQLAlchemyError: there is no connection in time, so the statement was not sent
    :raise psycopg2.Error: the database refused the statement, failed, or did not answer in time
    """
    if SETTINGS.database_prepare:
        sql = f"EXECUTE {name} ({', '.join(['%s'] * len(values))})" if values else f"EXECUTE {name}"
    else:  # through a pooler the next statement may reach a connection on which nothing is prepared
        sql = re.sub(r"\$\d", "%s", STATEMENTS[name])
    if not pool_places.acquire(timeout=QUEUE_TIMEOUT):
        raise SQLAlchemyError("no connection became free in time")
    try:
        pool: Any = db.engine.pool
        with closing(pool.connect()) as connection, connection.cursor() as cursor:
            try:
                cursor.execute(sql, values)
                return list(cursor.fetchall())
            except psycopg2.Error as error:
                if cursor.connection.closed or isinstance(error, OUTDATED):
                    connection.invalidate()
                    if pool is db.engine.pool:  # after a restart, a failover or a migration its idle ones fail too
                        db.engine.dispose()  # once: the next pool may be in use already
                raise
    finally:
        pool_places.release()


def wait(connection: Any) -> None:
    """Let other requests run until the database answers (gunicorn.conf.py sets it). A timeout ends the connection."""
    with gevent.Timeout(SILENCE_TIMEOUT, psycopg2.OperationalError("no answer from the database in time")):
        while (state := connection.poll()) != POLL_OK:
            (wait_read if state == POLL_READ else wait_write)(connection.fileno())


def execute(sql: str, *values: object) -> list[Any]:
    """Run SQL of a command for as long as it takes, over a connection of its own, and return its rows.

    :raise ClickException: the database refused it or failed; what it said is put into one line
    """
    parameters = {**PARAMETERS, "options": f"{PARAMETERS['options']} -c statement_timeout=0"}
    try:
        with closing(psycopg2.connect(**parameters)) as connection, connection.cursor() as cursor:
            connection.autocommit = True
            cursor.execute(sql, values or None)
            return list(cursor.fetchall()) if cursor.description else []
    except psycopg2.Error as error:
        raise click.ClickException(error.diag.message_primary or " ".join(str(error).split())) from error
