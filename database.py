"""How a statement runs on PostgreSQL: its turn, its connection, its retry. It knows no carts and no Flask.

A statement is one round trip in autocommit, atomic by itself, compiled once and prepared on each connection: an ORM
session costs three to four times as much.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import gevent.lock
import psycopg2.errors
import psycopg2.extensions
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

import settings
from connections import ON_GEVENT, TRY_TIMEOUT, LateError, connect, replace_closed, wait

STATEMENT_TIMEOUT, COMMAND_TIMEOUT = 2, 30  # seconds
USER_TURNS = 2  # how many connections of a process the requests of one user hold at most
LOAD_TRIES = 10
# What the service depends on, and a role or a database may have set otherwise. Without row_security a policy that
# hides lines from the role is an error, not a smaller cart.
SET_UP = f"""
    SET statement_timeout = '{STATEMENT_TIMEOUT}s'; SET lock_timeout = 0; SET row_security = off;
    SET default_transaction_isolation = 'read committed';
    SELECT pg_backend_pid()
"""
MAINTENANCE = """
    SET TRANSACTION ISOLATION LEVEL READ COMMITTED; SET LOCAL statement_timeout = 0; SET LOCAL row_security = off;
"""
LIST_HOLDERS = """
    SELECT pid, usename, application_name FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start < now() - interval '1 second'
    ORDER BY xact_start LIMIT 3
"""
# "Cached plan must not change result type", and "cannot execute ... in a read-only transaction".
UNFIT = (psycopg2.errors.FeatureNotSupported, psycopg2.errors.ReadOnlySqlTransaction)


Turns = gevent.lock.BoundedSemaphore if ON_GEVENT else threading.BoundedSemaphore


class Statement:
    """A statement, and whether running it twice is as good as once."""

    def __init__(self, name: str, expression: sa.ClauseElement, repeatable: bool = False) -> None:
        numbered: Any = self.compile(expression, "numeric_dollar")
        values = ", ".join(f"%({parameter})s" for parameter in numbered.positiontup or [])
        self.prepare = f"PREPARE {name} AS {numbered}"
        self.execute = f"EXECUTE {name} ({values})" if values else f"EXECUTE {name}"
        self.text = str(self.compile(expression, "pyformat"))
        self.repeatable = repeatable

    @staticmethod
    def compile(expression: sa.ClauseElement, paramstyle: str) -> Any:
        dialect = postgresql.dialect(paramstyle=paramstyle)  # type: ignore[no-untyped-call]
        return expression.compile(dialect=dialect)


class Database:
    """Runs statements on the connections of an engine, first come, first served."""

    def __init__(self, engine: sa.Engine, *statements: Statement) -> None:
        self.engine = engine
        self.prepare = "; ".join(statement.prepare for statement in statements)
        self.turns = Turns(settings.POOL_SIZE)
        self.user_turns: WeakValueDictionary[str, Any] = WeakValueDictionary()
        sa.event.listen(engine, "connect", self.set_up)
        sa.event.listen(engine, "checkout", replace_closed)

    def set_up(self, connection: Any, record: Any) -> None:
        """Set what each connection needs, and prepare the statements."""
        with connection.cursor() as cursor:
            cursor.execute(SET_UP)
            [(pid,)] = cursor.fetchall()
            # A pooler, such as PgBouncer, makes up a pid. Each statement may go to another server there, which knows
            # of no PREPARE: they are sent as text.
            record.info["pid"] = pid if pid == connection.info.backend_pid else None
            if record.info["pid"]:
                cursor.execute(self.prepare)

    def run(self, statement: Statement, user_id: str = "", **values: object) -> list[Any]:
        """Run a statement for a user, committed by the time this returns, and return its rows.

        Where the connection turns out to be dead, out of date or to a server that only reads, the statement is tried
        once more on a new one, if the first try cannot have changed anything.

        :raise psycopg2.Error: the database refused the statement, failed, or did not answer in time
        :raise sqlalchemy.exc.SQLAlchemyError: no connection could be had
        """
        values["user_id"] = user_id
        try:
            return self.attempt(statement, values)
        except psycopg2.Error as error:
            is_lost = error.pgcode is None or isinstance(error, psycopg2.errors.AdminShutdown)
            if not isinstance(error, UNFIT) and not (statement.repeatable and is_lost):
                raise
        return self.attempt(statement, values)

    def attempt(self, statement: Statement, values: dict[str, Any]) -> list[Any]:
        """Run a statement on the next connection. One that fails is given up, with all that are as old."""
        with (
            gevent.Timeout(TRY_TIMEOUT if ON_GEVENT else None, LateError("no answer from the database in time")),
            self.user_turns.setdefault(values["user_id"], Turns(USER_TURNS)),
            self.turns,
            closing(self.engine.raw_connection()) as connection,
        ):
            pool, cursor = self.engine.pool, connection.cursor()
            try:
                cursor.execute(statement.execute if connection.info["pid"] else statement.text, values)
                return list(cursor.fetchall())
            except psycopg2.Error as error:
                if isinstance(error, LateError) and connection.info["pid"]:
                    gevent.spawn(cancel, connection.info["pid"])
                if connection.closed or isinstance(error, UNFIT):
                    connection.invalidate()
                    if self.engine.pool is pool:  # the first to notice
                        self.engine.dispose()
                raise


def cancel(pid: int) -> None:
    """End a statement that waits for a synchronous standby: no timeout of the server does, and it holds a place there.

    psycopg2's own `cancel` has the whole process wait for the server.
    """
    with (
        suppress(psycopg2.Error),
        gevent.Timeout(TRY_TIMEOUT, LateError()),
        closing(connect()) as connection,
    ):
        connection.cursor().execute("SELECT pg_cancel_backend(%s)", (pid,))


@contextmanager
def maintenance() -> Iterator[Callable[..., list[Any]]]:
    """Give a function that runs SQL in a transaction of its own and returns the rows of its last statement.

    :raise psycopg2.Error: the database refused it, failed, or was silent for 30 seconds
    """

    def execute(sql: str, *values: object) -> list[Any]:
        with connection.cursor() as cursor:
            cursor.execute(MAINTENANCE + sql, values or None)  # what is sent at once is a transaction
            return list(cursor.fetchall()) if cursor.description else []

    psycopg2.extensions.set_wait_callback(partial(wait, timeout=COMMAND_TIMEOUT))
    try:
        with closing(connect()) as connection:
            connection.autocommit = True
            yield execute
    finally:
        psycopg2.extensions.set_wait_callback(wait)


def load(schema: str) -> None:
    """Load a schema. It waits for locks a second at a time: the statements that queue behind it wait no longer.

    :raise psycopg2.errors.LockNotAvailable: others hold a lock for long; the text says who may
    :raise psycopg2.Error: the database refused it, failed, or was silent for 30 seconds
    """
    # The first lock is for two of these at once.
    sql = f"SET LOCAL lock_timeout = '1s'; SELECT pg_advisory_xact_lock(0); {schema}"
    holders: list[Any] = []
    with maintenance() as execute:
        for _ in range(LOAD_TRIES):
            try:
                execute(sql)
                return
            except psycopg2.errors.LockNotAvailable:
                holders = execute(LIST_HOLDERS)
                time.sleep(0.5)
    held = "; ".join(f"process {pid} of {user} ({name or 'unnamed'})" for pid, user, name in holders)
    raise psycopg2.errors.LockNotAvailable(f"what it needs is locked, perhaps by {held}")
