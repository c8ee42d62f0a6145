"""schema.sql: its rules, the command init-db, and the upgrade from each version that was released.

Kept here: the database holds the rules too. init-db repeats, upgrades beside a running service of the version before,
and fails in one line if it cannot. A key counts once, also across an upgrade.
"""

import contextlib
from collections.abc import Iterator

import psycopg2
import pytest
from flask.testing import FlaskClient

from tests.helpers import ADA, HERE, URL, execute, flask, holding, line, lines_of, path, reconnected

KEY = {"Idempotency-Key": "k"}
SCHEMA = (HERE / "schema.sql").read_text()
DONE = "The database has the tables and functions of this version.\n"
VERSIONS = ["1.0.0", "2.0.0", "3.0.0"]


def released(version: str) -> str:
    """Return the schema of a version that was released."""
    return (HERE / f"testdata/schema-{version}.sql").read_text()


@contextlib.contextmanager
def other_database(options: str = "") -> Iterator[str]:
    """Have the service in this process use another, empty database as long as this lasts, and give its URL."""
    execute(f"CREATE DATABASE other {options} TEMPLATE template0")
    try:
        with reconnected(dbname="other"):
            yield URL.replace("/postgres?", "/other?")
    finally:
        execute("DROP DATABASE other WITH (FORCE)")


@pytest.fixture
def other() -> Iterator[str]:
    """The URL of another, empty database, which the service in this process uses."""
    with other_database() as url:
        yield url


# The rules

ROWS = [
    pytest.param("cart_items", "'', 'p', 1", id="no user"),
    pytest.param("cart_items", "repeat('u', 256), 'p', 1", id="a long user"),
    pytest.param("cart_items", "'u', '', 1", id="no product"),
    pytest.param("cart_items", "'u', repeat('p', 256), 1", id="a long product"),
    pytest.param("cart_items", "'u', 'p', 0", id="no quantity"),
    pytest.param("idempotency_keys", "'u', '', sha256(''), '{1}'", id="no key"),
    pytest.param("idempotency_keys", "'u', repeat('k', 256), sha256(''), '{1}'", id="a long key"),
    pytest.param("idempotency_keys", "'u', 'k', 'x', '{1}'", id="a request that is no digest"),
]


@pytest.mark.parametrize(("table", "row"), ROWS)
def test_the_database_holds_the_rules_too(table: str, row: str) -> None:
    with pytest.raises(psycopg2.errors.CheckViolation):
        execute(f"INSERT INTO {table} VALUES ({row})")


# init-db


def test_init_db_may_be_repeated_beside_a_reader_that_takes_long_and_leaves_the_carts(client: FlaskClient) -> None:
    client.post(ADA, json=[line("q"), line("p", 2)])

    with holding("SELECT FROM cart_items, idempotency_keys"):
        repeated = flask("init-db")

    assert (repeated.exit_code, repeated.output) == (0, DONE)
    assert lines_of(client.get(ADA)) == [("q", 1), ("p", 2)]


@pytest.mark.parametrize("lock", ["SELECT pg_advisory_xact_lock(0)", "LOCK cart_items"], ids=["init-db", "a request"])
def test_init_db_gives_up_after_a_second_if_another_holds_a_lock(lock: str) -> None:
    with holding(lock):
        refused = flask("init-db")

    assert (refused.exit_code, refused.output) == (1, "Error: canceling statement due to lock timeout\n")


def test_init_db_refuses_a_database_that_is_not_in_utf8() -> None:
    with other_database("ENCODING LATIN1"):
        refused = flask("init-db")

    assert (refused.exit_code, refused.output) == (1, "Error: the database is in LATIN1, and must be in UTF8\n")


# The upgrade


@pytest.mark.parametrize("version", VERSIONS)
def test_all_is_at_work_and_a_key_counts_once_through_an_upgrade_and_the_way_back(
    client: FlaskClient, other: str, version: str
) -> None:
    insert = "INSERT INTO idempotency_keys VALUES (%(user)s, 'k', sha256(convert_to(%(sent)s, 'UTF8')), '{7}')"
    execute(released(version), other)
    execute(insert, other, user="one", sent='["p",2]')
    execute(insert, other, user="list", sent='[["p",2]]')

    for schema in (SCHEMA, released(version), SCHEMA):
        execute(schema, other)
        one = client.post(path("one"), json=line("p", 2), headers=KEY)
        several = client.post(path("list"), json=[line("p", 2)], headers=KEY)
        assert (one.get_json()["quantity"], lines_of(several)) == (7, [("p", 7)])
        assert client.post(ADA, json=line("p", 2), headers=KEY).get_json()["quantity"] == 2
        assert client.get("/healthz").status_code == 200

    assert flask("expire", "--days", "1").output == "Removed 0 carts and 0 idempotency keys.\n"
    if version == "1.0.0":
        assert execute("SELECT expire_cart('ada', 1), sweep_keys()", other) == [(0, 0)]


def test_lines_that_are_there_at_the_upgrade_keep_their_order_before_new_ones(client: FlaskClient, other: str) -> None:
    execute(released("3.0.0"), other)
    execute("INSERT INTO cart_items VALUES ('ada', 'c', 1), ('ada', 'b', 1), ('ada', 'd', 1)", other)

    execute(SCHEMA, other)
    client.post(ADA, json=[line("e"), line("a")])

    assert lines_of(client.get(ADA)) == [("b", 1), ("c", 1), ("d", 1), ("e", 1), ("a", 1)]


def test_an_upgraded_table_is_like_a_new_one(other: str) -> None:
    execute(released("3.0.0"), other)
    execute(SCHEMA, other)

    columns = """
        SELECT column_name, data_type, collation_name, is_nullable, column_default FROM information_schema.columns
        WHERE table_name IN ('cart_items', 'idempotency_keys') ORDER BY table_name, ordinal_position
    """
    assert execute(columns, other) == execute(columns)


# 3.0.0 goes on beside the new schema: its statements, prepared before the upgrade, on the connection that it has

OF_3_0_0 = """
    PREPARE read_cart AS SELECT product_id, quantity FROM cart_items WHERE user_id = $1 ORDER BY product_id;
    PREPARE change_cart AS SELECT change_cart($1, $2::text[], $3::integer[], 500, $4, $5);
    PREPARE empty_cart AS SELECT empty_cart($1, $2);
    PREPARE check_carts AS SELECT check_carts()
"""


@pytest.fixture
def version_3(other: str) -> Iterator[psycopg2.extensions.cursor]:
    """A connection of 3.0.0, which added to ada's cart with a key, before the upgrade."""
    execute(released("3.0.0"), other)
    with contextlib.closing(psycopg2.connect(other)) as connection:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute(OF_3_0_0)
        cursor.execute("""EXECUTE change_cart('ada', '{p}', '{2}', 'k', sha256('["p",2]'))""")
        execute(SCHEMA, other)
        yield cursor


def test_each_statement_of_3_0_0_goes_on_after_the_upgrade(
    client: FlaskClient, version_3: psycopg2.extensions.cursor
) -> None:
    version_3.execute("EXECUTE check_carts")
    version_3.execute("EXECUTE change_cart('ada', '{q,p}', '{1,3}', NULL, NULL)")
    assert version_3.fetchall() == [([1, 5],)]
    version_3.execute("EXECUTE empty_cart('ada', 'p')")
    version_3.execute("EXECUTE read_cart('ada')")
    assert version_3.fetchall() == [("q", 1)]

    assert lines_of(client.get(ADA)) == [("q", 1)]


def test_a_key_of_3_0_0_counts_once_with_both_versions(
    client: FlaskClient, version_3: psycopg2.extensions.cursor
) -> None:
    assert client.post(ADA, json=line("p", 2), headers=KEY).get_json()["quantity"] == 2
    version_3.execute("""EXECUTE change_cart('ada', '{p}', '{2}', 'k', sha256('["p",2]'))""")

    assert version_3.fetchall() == [([2],)]
    assert lines_of(client.get(ADA)) == [("p", 2)]
