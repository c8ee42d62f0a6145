"""How a statement runs on PostgreSQL: its place in the queue, its connection, its timeouts. It knows no carts.

A statement is one round trip in autocommit, atomic by itself, and prepared on each connection. An ORM session costs
three to four times as much, and SQLAlchemy's pool a tenth of a request.
"""

import select
import socket
import threading
import time
from contextlib import closing, suppress
from itertools import cycle
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import gevent.lock
import gevent.monkey
import gevent.socket
import psycopg2.errors
import psycopg2.extensions
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

import settings

# Each wait of a request has a limit of its own.
QUEUE_TIMEOUT = 2  # seconds for a connection to become free
CONNECT_TIMEOUT = 3  # seconds for a new connection to be ready
STATEMENT_TIMEOUT = 2  # seconds for a statement, after which the server ends it
SILENCE_TIMEOUT = 3  # seconds for the whole answer to arrive; under gevent only, as the next one
CANCEL_TIMEOUT = 1  # seconds for ending what a silent server may still do
USER_LIMIT = 2  # connections of a process that the requests of one user hold at most

# A peer that died is noticed within a second of sending to it, and within 45 seconds of silence.
KEEPALIVES = {"tcp_user_timeout": 1000, "keepalives_idle": 30, "keepalives_interval": 5, "keepalives_count": 3}

# What the service depends on, and a role or a database may have set otherwise. Without row_security a policy that
# hides lines from the role is an error, not a smaller cart.
SESSION = "SET lock_timeout = 0; SET row_security = off; SET default_transaction_isolation = 'read committed'"

# "cached plan must not change result type" and "cannot execute ... in a read-only transaction".
OUTDATED = (psycopg2.errors.FeatureNotSupported, psycopg2.errors.ReadOnlySqlTransaction)

# Under gunicorn, gevent replaces what blocks. Without it, as under `flask run`, psycopg2 blocks the request's thread.
ON_GEVENT = gevent.monkey.is_module_patched("select")
Semaphore: Any = gevent.lock.BoundedSemaphore if ON_GEVENT else threading.BoundedSemaphore
blocking_poll = gevent.monkey.get_original("select", "poll")  # for a look that switches no greenlets


class BusyError(psycopg2.OperationalError):
    """No connection became free in time."""


class SilentError(psycopg2.OperationalError):
    """The server did not answer in time. If it was raised during a statement, psycopg2 has closed the connection."""


class Statement:
    """A statement as text, and in the form of PREPARE and EXECUTE. Values are bound by name.

    SELECT f(%(user_id)s)  ->  PREPARE name AS SELECT f($1)  and  EXECUTE name (%(user_id)s)
    """

    def __init__(self, name: str, expression: sa.ClauseElement) -> None:
        dialect = postgresql.dialect(paramstyle="pyformat")  # type: ignore[no-untyped-call]
        compiled: Any = expression.compile(dialect=dialect)
        numbers = {parameter: f"${number}" for number, parameter in enumerate(compiled.params, 1)}
        values = ", ".join(f"%({parameter})s" for parameter in numbers)
        self.text = str(compiled)
        self.prepare = f"PREPARE {name} AS {self.text % numbers}"
        self.execute = f"EXECUTE {name} ({values})" if values else f"EXECUTE {name}"


class Link(NamedTuple):
    """A connection that is kept."""

    connection: Any
    pid: int | None  # the server's process, which has the statements prepared; None behind a pooler
    poll: Any  # tells at once whether there is something to read


class Database:
    """Runs statements on connections that it keeps, at most POOL_SIZE at a time."""

    def __init__(self, *statements: Statement) -> None:
        self.prepare = "; ".join(statement.prepare for statement in statements)
        self.semaphore = Semaphore(settings.POOL_SIZE)
        self.user_semaphores: WeakValueDictionary[str, Any] = WeakValueDictionary()
        self.idle: list[Link] = []

    def run(self, statement: Statement, user_id: str = "", **values: object) -> list[Any]:
        """Run a statement for a user, committed by the time this returns, and return its rows.

        :raise psycopg2.Error: the database refused the statement, failed, or did not answer in time
        """
        values["user_id"] = user_id
        deadline = time.monotonic() + QUEUE_TIMEOUT
        # The dictionary's references are weak: a user's semaphore goes with the last request that holds it.
        user_semaphore = self.user_semaphores.setdefault(user_id, Semaphore(USER_LIMIT))
        if not user_semaphore.acquire(timeout=QUEUE_TIMEOUT):
            raise BusyError("other requests of the user hold their connections for long")
        try:
            if not self.semaphore.acquire(timeout=max(0, deadline - time.monotonic())):
                raise BusyError("other requests hold all connections for long")
            try:
                return self.run_on(self.take(), statement, values)
            finally:
                self.semaphore.release()
        finally:
            user_semaphore.release()

    def take(self) -> Link:
        """Return an idle connection that the server has not closed, or a new one."""
        while True:
            try:
                link = self.idle.pop()
            except IndexError:
                return self.open()
            if not link.poll.poll(0):  # to an idle client a server hardly sends anything but the end
                return link
            link.connection.close()

    def open(self) -> Link:
        """Return a new connection, with the statements prepared if it is to PostgreSQL itself."""
        with suppress(gevent.Timeout), gevent.Timeout(CONNECT_TIMEOUT if ON_GEVENT else None):
            connection = connect()
            connection.autocommit = True
            pid = connection.info.backend_pid if is_direct(connection) else None
            if pid:
                with connection.cursor() as cursor:
                    cursor.execute(f"{SESSION}; SET statement_timeout = '{STATEMENT_TIMEOUT}s'; {self.prepare}")
            poll = blocking_poll()
            poll.register(connection, select.POLLIN)
            return Link(connection, pid, poll)
        raise SilentError("no connection in time")

    def run_on(self, link: Link, statement: Statement, values: dict[str, Any]) -> list[Any]:
        """Run a statement on a connection, and keep the connection unless it turns out to be unfit."""
        try:
            with link.connection.cursor() as cursor:
                cursor.execute(statement.execute if link.pid else statement.text, values)
                rows: list[Any] = cursor.fetchall()
        except psycopg2.Error as error:
            if isinstance(error, SilentError) and link.pid:
                cancel(link.pid)
            if link.connection.closed or isinstance(error, OUTDATED):
                link.connection.close()
                self.close_idle()
            else:
                self.idle.append(link)
            raise
        self.idle.append(link)
        return rows

    def close_idle(self) -> None:
        """Close the idle connections: after a restart or a failover none of them is fit, and those in use find out."""
        idle, self.idle = self.idle, []
        for link in idle:
            link.connection.close()


def run_command(sql: str, *values: object) -> list[Any]:
    """Run SQL of a command of the service, on a connection of its own and however long it takes; return its rows.

    :raise psycopg2.Error: the database refused it or failed
    """
    with closing(connect()) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        if is_direct(connection):
            cursor.execute(f"{SESSION}; SET statement_timeout = 0")
        cursor.execute(sql, values or None)
        return cursor.fetchall() if cursor.description else []


def is_direct(connection: Any) -> bool:
    """Tell whether a connection is to PostgreSQL itself.

    A pooler, such as PgBouncer, tells an invented process id. There each statement may go to another connection of the
    pooler's, which does not have what was prepared, and what was set on it would stay for others.
    """
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return bool(cursor.fetchone() == (connection.info.backend_pid,))


def cancel(pid: int) -> None:
    """End a statement that waits for a synchronous standby: no timeout of the server does that.

    The request's place in the pool is taken until then, so that such statements do not use up the server's connections.
    What the statement changed stays changed. psycopg2's own `cancel` would have the whole process wait.
    """
    sql = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE pid = %s AND wait_event = 'SyncRep'"
    with (
        suppress(psycopg2.Error, gevent.Timeout),
        gevent.Timeout(CANCEL_TIMEOUT),
        closing(connect()) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute(sql, (pid,))


def connect() -> Any:
    """Return a new connection to the first host that accepts it.

    :raise psycopg2.OperationalError: none does, or the database is not in UTF-8
    """
    parameters = {**KEEPALIVES, "connect_timeout": CONNECT_TIMEOUT, **settings.DATABASE, "client_encoding": "utf8"}
    is_libpq_enough = not ON_GEVENT or "host" not in parameters or "hostaddr" in parameters
    connection = psycopg2.connect(**parameters) if is_libpq_enough else connect_in_turn(parameters)
    if (encoding := connection.info.parameter_status("server_encoding")) != "UTF8":
        connection.close()
        raise psycopg2.OperationalError(f"the database is in {encoding}, and must be in UTF8")
    return connection


def connect_in_turn(parameters: dict[str, Any]) -> Any:
    """Try the hosts and their addresses in turn, each for its share of the time that is left.

    libpq would have all greenlets wait for a name server, and would stay with a host that accepts and is silent.
    """
    deadline = time.monotonic() + CONNECT_TIMEOUT
    hosts, ports = parameters["host"].split(","), parameters.get("port", "").split(",")
    servers = []
    for place, (host, port) in enumerate(zip(hosts, cycle(ports))):
        share = (deadline - time.monotonic()) / (len(hosts) - place + 1)  # the last share is for connecting
        for address in look_up(host, share):
            servers.append({"host": host, "port": port or None, "hostaddr": address})
    failures = [] if servers else [f"no address is known for {', '.join(hosts)}"]
    for place, server in enumerate(servers):
        share = (deadline - time.monotonic()) / (len(servers) - place)
        try:
            with gevent.Timeout(share, SilentError("no answer in time")):
                return psycopg2.connect(**{**parameters, **server})
        except psycopg2.OperationalError as error:
            failures.append(f"{server['host']}: {error}")
    raise psycopg2.OperationalError("; ".join(failures))


def look_up(host: str, timeout: float) -> list[str | None]:
    """Return the addresses of a host: none if it is unknown, and None alone for the folder of a socket."""
    if host.startswith("/"):
        return [None]
    with suppress(OSError), gevent.Timeout(timeout, OSError()):
        return [str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    return []


def wait(connection: Any) -> None:
    """Let other greenlets run until the server has answered: psycopg2's wait callback.

    :raise SilentError: it did not answer in time
    """
    deadline = time.monotonic() + SILENCE_TIMEOUT
    while (state := connection.poll()) != psycopg2.extensions.POLL_OK:
        wait_for = gevent.socket.wait_read if state == psycopg2.extensions.POLL_READ else gevent.socket.wait_write
        seconds_left = max(0.001, deadline - time.monotonic())
        wait_for(connection.fileno(), seconds_left, SilentError("no answer from the database in time"))


if ON_GEVENT:
    psycopg2.extensions.set_wait_callback(wait)
