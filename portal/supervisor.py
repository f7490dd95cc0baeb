"""One process that runs all of a host's processes and starts again whichever dies.

What each of them does is its own; how the two services keep their data is in `embedded.py`.
"""

from __future__ import annotations

import argparse
import fcntl
import http.client
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import psycopg
import structlog

from portal import embedded, logs
from portal.embedded import ServiceError
from portal.environment import read_int

ROOT = Path(__file__).resolve().parent.parent
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0  # seconds between a death and the next start
SETTLED = 30.0  # seconds of life after which a death counts as the first again
LOCK_SECONDS = 30.0
MEMORY = Path("/dev/shm")  # noqa: S108 a file system in memory, where Linux has one

log = structlog.get_logger("portal.supervisor")


class Stopped(Exception):
    """SIGTERM or Ctrl-C came before everything was up."""


@dataclass
class Child:
    """A process to be kept alive. `patience` is the seconds from its stop signal to SIGKILL."""

    name: str
    spawn: Callable[[], subprocess.Popen[bytes]]
    stop_signal: signal.Signals = signal.SIGTERM
    patience: float = 15.0
    forced_patience: float = 0.0
    clear: Callable[[], None] = lambda: None  # sees to what outlives its process group
    process: subprocess.Popen[bytes] | None = None
    born: float = 0.0
    due: float = 0.0
    pause: float = FIRST_PAUSE

    def start(self) -> None:
        self.born = time.monotonic()
        try:
            self.process = self.spawn()
        except (OSError, ServiceError) as error:
            log.error("cannot start", child=self.name, reason=str(error))
            self.put_off()

    def ended(self) -> bool:
        """Whether it is dead; what it left behind in its process group then is as well.

        waitid leaves the zombie, which keeps the group's number from being given to others.
        """
        if self.process is None or self.process.returncode is not None:
            return True
        flags = os.WEXITED | os.WNOWAIT | os.WNOHANG
        if os.waitid(os.P_PID, self.process.pid, flags) is None:
            return False
        embedded.kill_group(self.process.pid)
        self.process.wait()
        return True

    def put_off(self) -> None:
        """Wait longer after each death, until one lives long enough to count as well."""
        now = time.monotonic()
        if now - self.born > SETTLED:
            self.pause = FIRST_PAUSE
        self.due = now + self.pause
        self.pause = min(self.pause * 2, LONGEST_PAUSE)

    def tend(self) -> bool:
        """Notice its death, or start it when that is due; whether anything changed."""
        if self.process is None:
            due = time.monotonic() >= self.due
            if due:
                self.start()
            return due
        if not self.ended():
            return False
        self.put_off()
        log.warning("died", child=self.name, exit=self.process.returncode)
        self.process = None
        return True

    def ask_to_stop(self) -> None:
        """Its own stop signal, to its main process only: an engine below must outlive the task."""
        if self.process and not self.ended():
            os.kill(self.process.pid, self.stop_signal)


@dataclass
class Supervisor:
    """Layers of children, the ones that others need first; stopped in the opposite order."""

    state: Path
    port: int
    host: str = "127.0.0.1"
    layers: list[list[Child]] = field(default_factory=list)
    ready: bool = False
    signals: int = 0
    starting: bool = True

    @property
    def address(self) -> str:
        anywhere = self.host == "0.0.0.0"  # noqa: S104 compared, not bound
        return f"http://{'127.0.0.1' if anywhere else self.host}:{self.port}"

    def catch_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1
        if self.starting:
            self.starting = False
            raise Stopped

    def keep(self, layer: list[Child]) -> None:
        self.layers.append(layer)
        self.tend()

    def tend(self) -> None:
        changes = [child.tend() for layer in self.layers for child in layer]
        if any(changes):
            self.write()

    def write(self) -> None:
        """DATA_DIR/serve.json: who runs now, for tests and tools."""
        alive = {c.name: c.process.pid for layer in self.layers for c in layer if c.process}
        now = {"address": self.address, "port": self.port, "pid": os.getpid()}
        text = json.dumps({**now, "ready": self.ready, "children": alive})
        embedded.write_private(self.state, text + "\n")

    def watch(self, is_ready: Callable[[], bool] = lambda: True) -> None:
        """Tend everything until a signal comes."""
        self.starting = False
        for turn in itertools.count():
            if self.signals:
                return
            self.tend()
            if not self.ready and turn % 5 == 0 and is_ready():
                self.ready = True
                self.write()
                log.info(f"ready at {self.address}")
            time.sleep(0.1)

    def stop(self) -> None:
        self.starting = False
        for layer in reversed(self.layers):
            self._stop_layer(layer)
        self.state.unlink(missing_ok=True)

    def _stop_layer(self, layer: list[Child]) -> None:
        began = time.monotonic()
        for child in layer:
            child.ask_to_stop()
        while alive := [child for child in layer if not child.ended()]:
            for child in alive:
                patience = child.forced_patience if self.signals > 1 else child.patience
                if child.process and time.monotonic() - began > patience:
                    embedded.kill_group(child.process.pid)
            time.sleep(0.05)
        for child in layer:
            child.clear()


# --- What runs ------------------------------------------------------------------------------


def spawn(argv: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A child in its own process group, which ends when we do, whatever happens to us."""
    return subprocess.Popen(
        embedded.guarded(argv), env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, process_group=0
    )


def environment(data_dir: Path, services: embedded.Services) -> dict[str, str]:
    """Ours, and what the services' start has decided."""
    found = {**os.environ, "DATA_DIR": str(data_dir), "PYTHONUNBUFFERED": "1"}
    found["DJANGO_SETTINGS_MODULE"] = "portal.settings"
    # Celery warns root because of pickled messages; ours are JSON only.
    found.setdefault("PYTHONWARNINGS", "ignore:You're running the worker with superuser")
    for variable, url in (
        ("DATABASE_URL", services.database_url),
        ("REDIS_URL", services.redis_url),
    ):
        if not embedded.given(variable):
            found[variable] = url
    return found


def service_child(server: embedded.Server) -> Child:
    """Started here and answering already, as everybody else needs it."""
    process = embedded.start(server)
    return Child(
        server.name,
        server.spawn,
        server.stop_signal,
        patience=embedded.STOP_SECONDS,
        forced_patience=5.0,
        clear=server.clear,
        process=process,
        born=time.monotonic(),
    )


def children(options: argparse.Namespace, variables: dict[str, str], data_dir: Path) -> list[Child]:
    """The project's own processes."""
    schedule = str(data_dir / "celerybeat-schedule")
    commands = {
        "web": _web(options),
        "cpu": _cpu_worker(options),
        "webhooks": _webhook_worker(),
        "handlers": _handler_worker(),
        "beat": ["celery", "-q", "-A", "portal", "beat", "--pidfile=", "-s", schedule],
        **{f"gpu{index}": _gpu_worker(index) for index in range(options.gpu_workers)},
    }
    patience = {"web": 15.0, "beat": 10.0}
    own = {"web": {"PROMETHEUS_MULTIPROC_DIR": str(_empty_folder(data_dir / "metrics"))}}
    return [
        Child(
            name,
            partial(spawn, [sys.executable, "-m", *command], variables | own.get(name, {})),
            patience=patience.get(name, 30.0),
        )
        for name, command in commands.items()
    ]


def _empty_folder(path: Path) -> Path:
    """What processes of an earlier life have counted would be counted again."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


def _web(options: argparse.Namespace) -> list[str]:
    # A thread of gthread answers its worker's heartbeat, so a long upload is no timeout. Each
    # real-time request holds a thread while it is answered.
    threads = 8 + read_int("LANE_THREADS", 8)
    command = (
        "gunicorn portal.wsgi:application -c python:portal.gunicorn"
        f" -k gthread --threads {threads} --timeout 120"
        " --graceful-timeout 10 --keep-alive 15 --log-level warning --no-control-socket"
        f" --workers {options.web_workers} --bind {options.host}:{options.port}"
    ).split()
    # The heartbeat is a file: on a disk that stalls, gunicorn would kill healthy workers.
    return [*command, "--worker-tmp-dir", str(MEMORY)] if MEMORY.is_dir() else command


def _cpu_worker(options: argparse.Namespace) -> list[str]:
    return (
        "celery -q -A portal worker -Q cpu -P prefork -n cpu@%h --loglevel INFO"
        f" --without-gossip --without-mingle -c {options.cpu_workers}"
    ).split()


WEBHOOK_THREADS = 32
"""How many endpoints are sent to at once."""


def _webhook_worker() -> list[str]:
    # Threads: it waits for others' servers nearly all of its time.
    return (
        "celery -q -A portal worker -Q webhooks -P threads -n webhooks@%h --loglevel INFO"
        f" --without-gossip --without-mingle -c {WEBHOOK_THREADS}"
    ).split()


HANDLER_PROCESSES = 4
"""How many result handlers run at once."""


def _handler_worker() -> list[str]:
    # Processes: what a handler hangs in can only be ended with the process that it is in.
    return (
        "celery -q -A portal worker -Q handlers -P prefork -n handlers@%h --loglevel INFO"
        f" --without-gossip --without-mingle -c {HANDLER_PROCESSES}"
    ).split()


def _gpu_worker(index: int) -> list[str]:
    command = ["worker", "--name", f"gpu{index}"]
    return [*command, "--gpu", str(index)] if index < gpu_count() else command


def gpu_count() -> int:
    """NVIDIA GPUs that this host (or container) can see."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


# --- The database's tables ------------------------------------------------------------------


def migrate(variables: dict[str, str], data_dir: Path) -> None:
    """Bring the tables up to date; one process at a time."""
    with (data_dir / "migrate.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _migrate(variables)


def migrate_if_new(variables: dict[str, str], data_dir: Path, database_url: str) -> None:
    """Make the tables where there are none, and wait for another process that is making them."""
    with (data_dir / "migrate.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not has_tables(database_url):
            _migrate(variables)


def _migrate(variables: dict[str, str]) -> None:
    _quietly(variables, "migrate", "--noinput")


def collect_static(variables: dict[str, str]) -> None:
    """Production serves files under names with their hashes, which have to be made first."""
    if variables.get("ENVIRONMENT") == "production":
        _quietly(variables, "collectstatic", "--noinput")


def _quietly(variables: dict[str, str], *arguments: str) -> None:
    command = [sys.executable, str(ROOT / "manage.py"), *arguments, "-v", "0"]
    done = subprocess.run(
        embedded.guarded(command),
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise ServiceError(f"{arguments[0]} failed:\n{done.stdout}{done.stderr}".strip())


def has_tables(database_url: str) -> bool:
    """Whether migrate has ever run there."""
    question = "SELECT to_regclass('django_migrations') IS NOT NULL"
    try:
        with psycopg.connect(database_url, connect_timeout=10) as connection:
            row = connection.execute(question).fetchone()
    except psycopg.OperationalError as error:
        raise ServiceError(f"the database does not answer: {error}") from error
    return bool(row and row[0])


# --- Commands -------------------------------------------------------------------------------


def serve(options: argparse.Namespace) -> int:
    """Run everything until a signal comes; ServiceError when it cannot be started."""
    logs.configure("INFO")
    data_dir = embedded.make_data_dir(options.data_dir)
    options.port = options.port or embedded.free_port()
    supervisor = Supervisor(data_dir / "serve.json", options.port, options.host)
    supervisor.catch_signals()
    with ExitStack() as stack, suppress(Stopped):
        _claim_folder(stack, data_dir)
        if not embedded.is_free(options.port, options.host):
            raise ServiceError(f"port {options.port} is taken: choose another with --port")
        if embedded.wanted():
            _claim_services(stack, data_dir)
        stack.callback(supervisor.stop)
        variables = _bring_up(supervisor, data_dir, options)
        supervisor.watch(partial(is_ready, supervisor.address, variables["BASE_URL"]))
        log.info("stopping; once more to force it")
    log.info("stopped")
    return 0


def _claim_folder(stack: ExitStack, data_dir: Path) -> None:
    if (lock := embedded.take_lock(data_dir / "serve.lock")) is None:
        pid = embedded.read_json(data_dir / "serve.json").get("pid", "unknown")
        raise ServiceError(f"another serve (pid {pid}) already runs on {data_dir}")
    stack.enter_context(lock)


def _claim_services(stack: ExitStack, data_dir: Path) -> None:
    """Wait for a short command that may be running with services of its own."""
    deadline = time.monotonic() + LOCK_SECONDS
    while (lock := embedded.own(data_dir)) is None:
        if time.monotonic() > deadline:
            raise ServiceError(f"another command still uses the services of {data_dir}")
        time.sleep(0.2)
    stack.enter_context(lock)


def _bring_up(
    supervisor: Supervisor, data_dir: Path, options: argparse.Namespace
) -> dict[str, str]:
    layer: list[Child] = []
    supervisor.keep(layer)
    for server in embedded.servers(data_dir):
        layer.append(service_child(server))
    services = embedded.urls(data_dir)
    assert services is not None
    variables = environment(data_dir, services)
    variables["BASE_URL"] = embedded.given("BASE_URL") or supervisor.address
    log.info("bringing the database's tables up to date")
    migrate(variables, data_dir)
    collect_static(variables)
    supervisor.starting = False
    supervisor.keep(children(options, variables, data_dir))
    return variables


def is_ready(address: str, base_url: str) -> bool:
    """Whether GET /readyz says 200; asked by the one name that production answers to."""
    target, name = urlsplit(address), urlsplit(base_url).netloc
    link = http.client.HTTPConnection(target.netloc, timeout=2)
    try:
        link.request("GET", "/readyz", headers={"Host": name})
        return link.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        link.close()


def wait_ready(data_dir: Path, timeout: float = 180.0) -> str:
    """The address of the portal that serves `data_dir`, once it is ready; or TimeoutError."""
    found: dict[str, Any] = {}

    def ready() -> bool:
        found.update(embedded.read_json(data_dir / "serve.json"))
        return bool(found.get("ready")) and Path(f"/proc/{found['pid']}").exists()

    if not embedded.wait_until(ready, timeout, pause=0.2):
        raise TimeoutError(f"nothing that serves {data_dir} became ready within {timeout:g} s")
    return str(found["address"])


def manage(data_dir: Path, arguments: list[str]) -> int:
    """Run manage.py beside the services, which are started for it where none run yet."""
    with embedded.running(data_dir) as services:
        variables = environment(data_dir.resolve(), services)
        if arguments[:1] != ["migrate"]:
            migrate_if_new(variables, data_dir, services.database_url)
        return _run_manage(arguments, {"LOG_STREAM": "stderr", **variables})


def _run_manage(arguments: list[str], variables: dict[str, str]) -> int:
    command = [sys.executable, str(ROOT / "manage.py"), *arguments]
    process = subprocess.Popen(embedded.guarded(command), env=variables)
    # A terminal's Ctrl-C reaches the command by itself; its answer to that is the one that counts.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    code = process.wait()
    return code if code >= 0 else 128 - code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run")
    commands = parser.add_subparsers(dest="command", required=True)
    serve_ = commands.add_parser("serve", help="run the portal and its workers on this host")
    serve_.add_argument("--host", default="127.0.0.1")
    serve_.add_argument("--port", type=int, default=8000, help="0: any free one")
    serve_.add_argument("--data-dir", type=Path, default=default_data_dir())
    serve_.add_argument("--gpu-workers", type=int, default=1)
    serve_.add_argument("--cpu-workers", type=int, default=2)
    serve_.add_argument("--web-workers", type=int, default=2)
    commands.add_parser("manage", help="run a manage.py command")
    return parser


def default_data_dir() -> Path:
    return Path(os.environ.get("DATA_DIR") or ROOT / "var")


def main(arguments: list[str]) -> int:
    try:
        if arguments[:1] == ["manage"]:  # whose own --help and options are not ours to read
            return manage(default_data_dir(), arguments[1:])
        return serve(_parser().parse_args(arguments))
    except ServiceError as error:
        print(f"{arguments[0]}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
