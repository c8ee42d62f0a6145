"""Measure the service beside Flask's floor and a FastAPI peer: two processes each, 16 connections, in turns.

    python3 -m venv .venv && .venv/bin/pip install -r bench/requirements.txt
    DATABASE_URL=postgresql://... .venv/bin/python bench/run.py

Needs wrk, and a PostgreSQL whose carts may be lost. ADDS=1 in the environment measures adds alone.
"""

import os
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psycopg2

BENCH = Path(__file__).parent
BINARIES = Path(sys.executable).parent
PORT, ROUNDS = "8089", 5
GUNICORN = ["gunicorn", "--bind", f"127.0.0.1:{PORT}"]
CONTENDERS = {
    "cart": ([*GUNICORN, "cart:app"], BENCH.parent),
    "floor": ([*GUNICORN, "--worker-class", "gevent", "floor:app"], BENCH),
    "peer": (["uvicorn", "--port", PORT, "--workers", "2", "--no-access-log", "peer:app"], BENCH),
}
FILL = """
    TRUNCATE cart_items;
    INSERT INTO cart_items SELECT 'u' || u, 'p' || p, 1 FROM generate_series(1, 10000) u, generate_series(1, 3) p;
    ANALYZE cart_items
"""


def measure(command: list[str], folder: Path) -> tuple[float, float]:
    """Return requests a second, and the 99th percentile of their latency in milliseconds."""
    words = [str(BINARIES / command[0]), *command[1:]]
    with psycopg2.connect(os.environ["DATABASE_URL"]) as connection:
        connection.cursor().execute(FILL)
    connection.close()
    env = {**os.environ, "WEB_CONCURRENCY": "2"}
    server = subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/cart/users/u1")
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        wrk = ["wrk", "-t1", "-c16", "-s", str(BENCH / "mix.lua"), f"http://127.0.0.1:{PORT}"]
        subprocess.run([*wrk, "-d1s"], check=True, stdout=subprocess.DEVNULL)
        said = subprocess.run([*wrk, "-d4s"], check=True, capture_output=True, text=True).stdout
        rate, latency = said.splitlines()[-1].split()
        return float(rate), float(latency)
    finally:
        server.terminate()
        server.wait(20)


def main() -> None:
    subprocess.run([BINARIES / "flask", "--app", "cart", "init-db"], cwd=BENCH.parent, check=True)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(ROUNDS):
        for name, contender in CONTENDERS.items():
            runs[name].append(measure(*contender))
    print("          requests/s    p99 ms    cart is")
    for name, rounds in runs.items():
        rate, latency = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(ours[0] / theirs[0] for ours, theirs in zip(runs["cart"], rounds, strict=True))
        print(f"{name:8} {rate:11.0f} {latency:9.1f} {ratio:9.2f}x")


if __name__ == "__main__":
    main()
