"""MLflow as a team runs it: its own server on PostgreSQL behind passwords, and a gate before it that a test breaks."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.helpers_tracking import wait_for

ADMIN, PASSWORD = "admin", "a-password-of-the-test"
ANSWER_500 = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 6\r\nConnection: close\r\n\r\nbroken"
CONFIG = """[mlflow]
default_permission = READ
database_uri = {database}
admin_username = {admin}
admin_password = {password}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 600
"""


def missing() -> str:
    """What this machine lacks for such a server; "" where it lacks nothing."""
    if binaries() is None:
        return "PostgreSQL (Debian's postgresql)"
    if os.geteuid() == 0 and not shutil.which("runuser"):
        return "runuser"
    for module in ("psycopg2", "flask_wtf"):
        try:
            __import__(module)
        except ImportError:
            return module
    return ""


def binaries() -> Path | None:
    """Where PostgreSQL's programs lie: Debian keeps them out of the way."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((place for place in reversed(places) if (place / "initdb").exists()), None)


@contextlib.contextmanager
def postgres() -> Iterator[Path]:
    """The folder of the socket of a PostgreSQL with the databases `mlflow` and `users`; no port is opened."""
    place, folder = binaries(), Path(tempfile.mkdtemp(prefix="sat-pg-", dir="/tmp"))  # a socket's path must be short
    assert place is not None
    root = os.geteuid() == 0  # as whom it refuses to run
    if root:
        user = pwd.getpwnam("postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)

    def run(program: str, *arguments: str) -> None:
        before = ["runuser", "-u", "postgres", "--"] if root else []
        with open(folder / "out", "a") as log:
            command = [*before, str(place / program), *arguments]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", check=False)
        assert done.returncode == 0, (folder / "out").read_text()

    data = ["-D", str(folder / "data")]
    try:
        run("initdb", *data, "-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync")
        options = f"-c listen_addresses='' -k {folder} -F"
        run("pg_ctl", *data, "-w", "-t", "300", "-o", options, "-l", str(folder / "log"), "start")
        try:
            for name in ("mlflow", "users"):
                run("createdb", "-h", str(folder), "-U", "postgres", name)
            yield folder
        finally:
            run("pg_ctl", *data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def server(folder: Path) -> Iterator[int]:
    """The port of `mlflow server` with passwords, on a PostgreSQL of its own; `folder` holds its artifacts."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with postgres() as place:
        database = f"postgresql+psycopg2://postgres@/{{}}?host={place}"
        (folder / "auth.ini").write_text(
            CONFIG.format(database=database.format("users"), admin=ADMIN, password=PASSWORD)
        )
        environment = os.environ | {
            "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "of the test",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        stores = ["--backend-store-uri", database.format("mlflow"), "--artifacts-destination", str(folder / "files")]
        where = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--app-name", "basic-auth"]
        command = [sys.executable, "-m", "mlflow", "server", *stores, *where]
        with open(folder / "log", "w") as log:
            outputs = {"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL}
            child = subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True, **outputs)

        def answers() -> bool:
            assert child.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
            except OSError:
                return False

        try:
            wait_for(answers, 900)
            yield port
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


class Gate:
    """A port that leads to a server, until a test sets its mode to `500` or `silent`, or closes it."""

    def __init__(self, behind: int) -> None:
        self.behind, self.mode, self.met = behind, "open", Counter[str]()
        self._listener: socket.socket | None = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        self._through: set[socket.socket] = set()
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def set(self, mode: str) -> None:
        """`open`, `500`, `silent` or `refused`; connections that are kept alive end, as a broken server's would."""
        self.mode = mode
        self.met.clear()
        for each in list(self._through):
            _end(each)
        if mode == "refused" and self._listener is not None:
            _end(self._listener)
            self._listener = None
        elif mode != "refused" and self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self._through.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            first, mode = client.recv(1 << 16), self.mode
            self.met[mode] += 1
            if mode == "500":
                client.sendall(ANSWER_500)
            elif mode == "silent":
                while client.recv(1 << 16):  # it listens, and says nothing
                    continue
            elif first:
                with socket.create_connection(("127.0.0.1", self.behind)) as server:
                    self._through.add(server)
                    server.sendall(first)
                    back = threading.Thread(target=_copy, args=(server, client), daemon=True)
                    back.start()
                    _copy(client, server)
                    back.join()
                    self._through.discard(server)
        self._through.discard(client)


def _copy(source: socket.socket, to: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            to.sendall(data)
        to.shutdown(socket.SHUT_WR)


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
