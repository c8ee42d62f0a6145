"""schema.sql: its rules, the command init-db, and the upgrade from each version that was released.

Kept here: the database holds the rules too. init-db repeats, upgrades beside a running service of the version before,
and fails in one line if it cannot. A key counts once, also across an upgrade.
"""

import contextlib

import psycopg2
import pytest
import sqlalchemy as sa

import cart
from tests.helpers import ADA, ENGINE, HERE, KEY, URL, Postgres, invoke, line, lines_of, path, reconnected

SCHEMA = (HERE / "schema.sql").read_text()
DONE = "The database has the tables and functions of this version.\n"


def released(version):
    """Return the schema of a version that was released."""
    return (HERE / f"testdata/schema-{version}.sql").read_text()


@contextlib.contextmanager
def other_database(options=""):
    """Have the service in this process use another, empty database as long as this lasts, and give it."""
    Postgres(URL).execute(f"CREATE DATABASE other {options} TEMPLATE template0")
    try:
        with reconnected(dbname="other"):
            yield Postgres(URL.replace("/postgres?", "/other?"))
    finally:
        Postgres(URL).execute("DROP DATABASE other WITH (FORCE)")


@pytest.fixture
def other():
    """Another, empty database, which the service in this process uses."""
    with other_database() as database:
        yield database


ROWS = {
    "no user": ("cart_items", "'', 'p', 1"),
    "a long user": ("cart_items", "repeat('u', 256), 'p', 1"),
    "no product": ("cart_items", "'u', '', 1"),
    "a long product": ("cart_items", "'u', repeat('p', 256), 1"),
    "no quantity": ("cart_items", "'u', 'p', 0"),
    "no key": ("idempotency_keys", "'u', '', sha256(''), '{1}'"),
    "a long key": ("idempotency_keys", "'u', repeat('k', 256), sha256(''), '{1}'"),
    "a request that is no digest": ("idempotency_keys", "'u', 'k', 'x', '{1}'"),
}


@pytest.mark.parametrize(("table", "row"), ROWS.values(), ids=ROWS)
def test_the_database_holds_the_rules_too(postgres, table, row):
    with pytest.raises(psycopg2.errors.CheckViolation):
        postgres.execute(f"INSERT INTO {table} VALUES ({row})")


def columns_of(table):
    """Return names, types and what may be NULL or is in the primary key."""
    return [(one.name, repr(one.type.as_generic()), one.nullable, one.primary_key) for one in table.columns]


def test_the_model_in_cart_py_is_the_schema():
    in_database = sa.Table("cart_items", sa.MetaData(), autoload_with=ENGINE)

    assert columns_of(cart.CartItem.__table__) == columns_of(in_database)


def test_init_db_may_be_repeated_beside_a_reader_that_takes_long_and_leaves_the_carts(client, postgres):
    client.post(ADA, json=[line("q"), line("p", 2)])

    with postgres.holding("SELECT FROM cart_items, idempotency_keys"):  # as pg_dump holds its locks
        repeated = invoke("init-db")

    assert (repeated.exit_code, repeated.output) == (0, DONE)
    assert lines_of(client.get(ADA)) == [("q", 1), ("p", 2)]


@pytest.mark.parametrize("lock", ["SELECT pg_advisory_xact_lock(0)", "LOCK cart_items"], ids=["init-db", "a request"])
def test_init_db_gives_up_after_a_second_if_another_holds_a_lock(postgres, lock):
    with postgres.holding(lock):
        refused = invoke("init-db")

    assert (refused.exit_code, refused.output) == (1, "Error: canceling statement due to lock timeout\n")


def test_init_db_refuses_a_database_that_is_not_in_utf8():
    with other_database("ENCODING LATIN1"):
        refused = invoke("init-db")

    assert (refused.exit_code, refused.output) == (1, "Error: the database is in LATIN1, and must be in UTF8\n")


@pytest.mark.parametrize("command", ["expire", "init-db"])
def test_a_command_says_in_one_line_why_it_failed(command):
    with reconnected(host="127.0.0.1", port="1"):
        failed = invoke(command)

    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr.startswith("Error: ") and failed.stderr.count("\n") == 1


# The upgrade

INSERT_KEY = """
    INSERT INTO idempotency_keys (user_id, key, request, quantities)
    VALUES (%(user)s, 'k', sha256(%(digested)s::bytea), '{7}')
"""


def assert_at_work(client):
    """Assert that the service works, and that keys count.

    Those of INSERT_KEY have the answer 7 to the same changes. Ada's is made by the first call, and repeated by others.
    """
    assert client.post(path("by line"), json=line("p", 2), headers=KEY).get_json()["quantity"] == 7
    assert lines_of(client.post(path("by list"), json=[line("p", 2)], headers=KEY)) == [("p", 7)]
    assert client.post(ADA, json=line("p", 2), headers=KEY).get_json()["quantity"] == 2
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0", "3.0.0"])
def test_all_is_at_work_and_a_key_counts_once_through_an_upgrade_and_the_way_back(client, other, version):
    other.execute(released(version))
    other.execute(INSERT_KEY, user="by line", digested='["p",2]')  # as that version does for a line, and for a list
    other.execute(INSERT_KEY, user="by list", digested='[["p",2]]')

    other.execute(SCHEMA)
    assert_at_work(client)
    other.execute(released(version))
    assert_at_work(client)
    other.execute(SCHEMA)
    assert_at_work(client)

    assert invoke("expire", "--days", "1").output == "Removed 0 carts and 0 idempotency keys.\n"


def test_lines_that_are_there_at_the_upgrade_keep_their_order_before_new_ones(client, other):
    other.execute(released("3.0.0"))
    other.execute("INSERT INTO cart_items VALUES ('ada', 'c', 1), ('ada', 'b', 1), ('ada', 'd', 1)")

    other.execute(SCHEMA)
    client.post(ADA, json=[line("e"), line("a")])

    # Those that were there have one time, and so are ordered by product.
    assert lines_of(client.get(ADA)) == [("b", 1), ("c", 1), ("d", 1), ("e", 1), ("a", 1)]


COMPARED = {
    "columns": """
        SELECT table_name, ordinal_position, column_name, data_type, collation_name, is_nullable, column_default
        FROM information_schema.columns WHERE table_schema = 'public' ORDER BY table_name, ordinal_position
    """,
    "indexes": "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY indexdef",
    "constraints": "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint ORDER BY conname",
    "functions": "SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER BY 1",
}


@pytest.mark.parametrize("sql", COMPARED.values(), ids=COMPARED)
def test_an_upgraded_database_is_like_a_new_one(other, postgres, sql):
    other.execute(released("3.0.0"))
    other.execute(SCHEMA)

    assert other.execute(sql) == postgres.execute(sql)


PREPARED_BY_3_0_0 = """
    PREPARE read_cart AS SELECT product_id, quantity FROM cart_items WHERE user_id = $1 ORDER BY product_id;
    PREPARE change_cart AS SELECT change_cart($1, $2::text[], $3::integer[], 500, $4, $5);
    PREPARE empty_cart AS SELECT empty_cart($1, $2);
    PREPARE check_carts AS SELECT check_carts()
"""


def test_3_0_0_goes_on_beside_the_new_schema_with_the_statements_that_it_prepared_before(client, other):
    other.execute(released("3.0.0"))
    with contextlib.closing(psycopg2.connect(other.url)) as connection, connection.cursor() as version_3:
        connection.autocommit = True
        version_3.execute(PREPARED_BY_3_0_0)
        other.execute(SCHEMA)

        client.post(ADA, json=line("p", 2), headers=KEY)
        version_3.execute("""EXECUTE change_cart('ada', '{p}', '{2}', 'k', sha256('["p",2]'))""")  # the same change
        assert version_3.fetchall() == [([2],)]

        version_3.execute("EXECUTE change_cart('ada', '{q,p}', '{1,3}', NULL, NULL)")
        assert version_3.fetchall() == [([1, 5],)]

        version_3.execute("EXECUTE empty_cart('ada', 'p'); EXECUTE check_carts")
        version_3.execute("EXECUTE read_cart('ada')")
        assert version_3.fetchall() == [("q", 1)]
