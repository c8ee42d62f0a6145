"""How a statement runs on PostgreSQL: its connection, its turn, its deadlines. It knows no carts and no Flask.

A statement is one round trip in autocommit, atomic by itself, compiled once and prepared on each connection: an ORM
session costs three to four times as much.
"""

import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from itertools import cycle
from typing import Any
from weakref import WeakValueDictionary

import gevent.lock
import gevent.monkey
import psycopg2.errors
import psycopg2.extensions
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DisconnectionError

import settings

# Seconds. A try is all that a request does with one connection, its wait for it included; a request has two at most.
TRY_TIMEOUT, STATEMENT_TIMEOUT, COMMAND_TIMEOUT = 2.5, 2, 30
USER_TURNS = 2  # how many connections of a process the requests of one user hold at most
# A peer that died is noticed within a second of sending to it, and within 45 seconds of silence.
KEEPALIVES = {"tcp_user_timeout": 1000, "keepalives_idle": 30, "keepalives_interval": 5, "keepalives_count": 3}
# What the service depends on, and a role or a database may have set otherwise. Without row_security a policy that
# hides lines from the role is an error, not a smaller cart.
SET_UP = f"""
    SET statement_timeout = '{STATEMENT_TIMEOUT}s'; SET lock_timeout = 0; SET row_security = off;
    SET default_transaction_isolation = 'read committed';
    SELECT pg_backend_pid()
"""
# "Cached plan must not change result type", and "cannot execute ... in a read-only transaction".
UNFIT = (psycopg2.errors.FeatureNotSupported, psycopg2.errors.ReadOnlySqlTransaction)

# gevent can end any wait. Without it, as under `flask run`, each wait has its own end.
ON_GEVENT = gevent.monkey.is_module_patched("select")
Turns = gevent.lock.BoundedSemaphore if ON_GEVENT else threading.BoundedSemaphore
native_poll = gevent.monkey.get_original("select", "poll")


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
        late = psycopg2.OperationalError("no answer from the database in time")
        with (
            gevent.Timeout(TRY_TIMEOUT if ON_GEVENT else None, late),
            self.user_turns.setdefault(values["user_id"], Turns(USER_TURNS)),
            self.turns,
            closing(self.engine.raw_connection()) as connection,
        ):
            pool, cursor = self.engine.pool, connection.cursor()
            try:
                cursor.execute(statement.execute if connection.info["pid"] else statement.text, values)
                return list(cursor.fetchall())
            except psycopg2.Error as error:
                if error is late and connection.info["pid"]:
                    gevent.spawn(cancel, connection.info["pid"])
                if connection.closed or isinstance(error, UNFIT):
                    connection.invalidate()
                    if self.engine.pool is pool:  # the first to notice
                        self.engine.dispose()
                raise


def connect() -> Any:
    """Return a new connection to the first host that lets the service in.

    :raise psycopg2.OperationalError: none does, or the database is not in UTF-8
    """
    connection = connect_to_first({**KEEPALIVES, **settings.DATABASE, "client_encoding": "utf8"})
    if (encoding := connection.info.parameter_status("server_encoding")) != "UTF8":
        connection.close()
        raise psycopg2.OperationalError(f"the database is in {encoding}, and must be in UTF8")
    return connection


def connect_to_first(parameters: dict[str, Any]) -> Any:
    """Try the hosts in turn, each for its share of the time.

    libpq would look names up with the whole worker waiting, and stay with a host that accepts and then is silent.
    """
    if "hostaddr" in parameters:
        return psycopg2.connect(**parameters)
    hosts, ports = (parameters.get(name, "").split(",") for name in ("host", "port"))
    entries = [(host, port, address) for host, port in zip(hosts, cycle(ports)) for address in addresses(host)]
    share = TRY_TIMEOUT / (len(entries) + 1) if ON_GEVENT and len(entries) > 1 else None
    error = psycopg2.OperationalError(f"no address is known for {parameters.get('host')}")
    for host, port, address in entries:
        entry = {"host": host or None, "port": port or None, "hostaddr": address or None}
        try:
            with gevent.Timeout(share, psycopg2.OperationalError(f"no answer from {host}")):
                return psycopg2.connect(**{**parameters, **entry})
        except psycopg2.OperationalError as failure:
            error = psycopg2.OperationalError(f"{host or 'the local socket'}: {failure}")
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


def replace_closed(connection: Any, *_: object) -> None:
    """Have the pool connect anew where the server hung up: an idle server says nothing but goodbye."""
    poll = native_poll()
    poll.register(connection, select.POLLIN)
    if poll.poll(0):
        raise DisconnectionError


def cancel(pid: int) -> None:
    """End a statement that waits for a synchronous standby: no timeout of the server does, and it holds a place there.

    psycopg2's own `cancel` has the whole process wait for the server.
    """
    with (
        suppress(psycopg2.Error),
        gevent.Timeout(TRY_TIMEOUT, psycopg2.OperationalError()),
        closing(connect()) as connection,
    ):
        connection.cursor().execute("SELECT pg_cancel_backend(%s)", (pid,))


def wait(connection: Any, timeout: float | None = None if ON_GEVENT else TRY_TIMEOUT) -> None:
    """Wait until the database has answered.

    :raise psycopg2.OperationalError: it did not answer in time; psycopg2 then closes the connection
    """
    while (state := connection.poll()) != psycopg2.extensions.POLL_OK:
        poll = select.poll()
        poll.register(connection, select.POLLIN if state == psycopg2.extensions.POLL_READ else select.POLLOUT)
        if not poll.poll(timeout and timeout * 1000):
            raise psycopg2.OperationalError(f"no answer from the database in {timeout} seconds")


psycopg2.extensions.set_wait_callback(wait)  # for all connections of the process

ENGINE_OPTIONS = {
    "creator": connect,
    "isolation_level": "AUTOCOMMIT",  # one statement is atomic without BEGIN and COMMIT
    "pool_size": settings.POOL_SIZE,
    "max_overflow": 0,
    "pool_recycle": 300,
    "pool_reset_on_return": None,
    "use_native_hstore": False,
}


@contextmanager
def maintenance() -> Iterator[Callable[..., list[Any]]]:
    """Give a function that runs SQL in a transaction of its own and returns its rows.

    :raise psycopg2.Error: the database refused it, failed, or was silent for 30 seconds
    """

    def execute(sql: str, *values: object) -> list[Any]:
        with connection, connection.cursor() as cursor:
            cursor.execute(f"SET LOCAL statement_timeout = 0; SET LOCAL row_security = off; {sql}", values or None)
            return list(cursor.fetchall()) if cursor.description else []

    psycopg2.extensions.set_wait_callback(partial(wait, timeout=COMMAND_TIMEOUT))
    try:
        with closing(connect()) as connection:
            connection.set_session(isolation_level="READ COMMITTED")
            yield execute
    finally:
        psycopg2.extensions.set_wait_callback(wait)
