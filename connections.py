"""How connections to PostgreSQL are made and waited for."""

import select
import socket
from itertools import cycle
from typing import Any

import gevent
import gevent.monkey
import psycopg2.extensions
from sqlalchemy.exc import DisconnectionError

import settings

TRY_TIMEOUT = 2.5  # seconds for all that a request does with one connection, its wait for it included
# A peer that died is noticed within a second of sending to it, and within 45 seconds of silence.
KEEPALIVES = {"tcp_user_timeout": 1000, "keepalives_idle": 30, "keepalives_interval": 5, "keepalives_count": 3}

# gevent can end any wait. Without it, as under `flask run`, each wait has its own end.
ON_GEVENT = gevent.monkey.is_module_patched("select")
native_poll = gevent.monkey.get_original("select", "poll")


class LateError(psycopg2.OperationalError):
    """The time of a try is over."""


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
        except LateError:
            raise
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
