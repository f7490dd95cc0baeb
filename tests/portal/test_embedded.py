"""The embedded services, run for real: what they survive, as whom they run, who owns them.

What is built on them (restarts, commands) is tested in test_supervisor.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

from portal import embedded
from portal.embedded import Account, Postgres, Services, Valkey

ROOT = Path(__file__).resolve().parents[2]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

# Runs the services until its standard input ends, and says where they are.
OWNER = """
import dataclasses, json, sys
from pathlib import Path
from portal import embedded
with embedded.running(Path(sys.argv[1])) as services:
    print(json.dumps(dataclasses.asdict(services)), flush=True)
    sys.stdin.read()
"""


def forget_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABASE_URL", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(autouse=True)
def _nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_what_is_given(monkeypatch)


@contextmanager
def an_open_folder() -> Iterator[Path]:
    """One that every user may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    with an_open_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def used_before() -> Iterator[Path]:
    """A folder whose first start is over, as that takes a second each time."""
    with an_open_folder() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        forget_what_is_given(monkeypatch)
        with embedded.running(folder / "var"):
            pass
        yield folder / "var"


@pytest.fixture
def data_dir(open_folder: Path, used_before: Path) -> Path:
    subprocess.run(["cp", "-a", str(used_before), str(open_folder)], check=True)
    return open_folder / "var"


def save(services: Services, word: str) -> None:
    with psycopg.connect(services.database_url) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS kept (word text)")
        connection.execute("INSERT INTO kept VALUES (%s)", [word])
    client: Any = redis.Redis.from_url(services.redis_url)
    client.rpush("kept", word)
    client.close()


def saved(services: Services) -> tuple[list[str], list[str]]:
    with psycopg.connect(services.database_url) as connection:
        rows = connection.execute("SELECT word FROM kept").fetchall()
    client: Any = redis.Redis.from_url(services.redis_url)
    words = [word.decode() for word in client.lrange("kept", 0, -1)]
    client.close()
    return [row[0] for row in rows], words


def pids(data_dir: Path, services: Services) -> list[int]:
    client: Any = redis.Redis.from_url(services.redis_url)
    valkey = int(client.info("server")["process_id"])
    client.close()
    return [int((data_dir / "postgres" / "postmaster.pid").read_text().split()[0]), valkey]


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def all_end(numbers: list[int]) -> bool:
    return embedded.wait_until(lambda: not any(is_alive(pid) for pid in numbers), 60)


def port_of(data_dir: Path, name: str) -> int:
    return int(embedded.read_json(data_dir / "services.json")[name]["port"])


def start_owner(data_dir: Path, flags: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*flags, sys.executable, "-c", OWNER, str(data_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )


def told(owner: subprocess.Popen[str]) -> Services:
    assert owner.stdout
    return Services(**json.loads(owner.stdout.readline()))


def test_what_was_saved_is_there_after_a_restart_on_the_same_ports(data_dir: Path) -> None:
    with embedded.running(data_dir) as first:
        save(first, "one")
        numbers = pids(data_dir, first)
    assert all_end(numbers)
    with embedded.running(data_dir) as second:
        assert second == first == embedded.urls(data_dir)
        assert saved(second) == (["one"], ["one"])
    assert (data_dir / "services.json").stat().st_mode & 0o777 == 0o600


def test_the_database_is_utf8_durable_and_asks_for_the_password(data_dir: Path) -> None:
    with embedded.running(data_dir) as services:
        with psycopg.connect(services.database_url) as connection:
            names = ("server_encoding", "fsync", "synchronous_commit", "max_connections")
            values = [connection.execute(f"SHOW {name}").fetchone() for name in names]
        assert values == [("UTF8",), ("on",), ("on",), ("1000",)]
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(f"postgresql://portal:x@127.0.0.1:{port_of(data_dir, 'postgres')}")
        with socket.create_connection(("127.0.0.1", port_of(data_dir, "valkey"))) as link:
            link.sendall(b"PING\r\n")
            assert link.recv(100) == b"-NOAUTH Authentication required.\r\n"


def test_kill_9_of_both_servers_loses_nothing(data_dir: Path) -> None:
    with embedded.running(data_dir) as services:
        save(services, "one")
        for pid in pids(data_dir, services):
            os.kill(pid, signal.SIGKILL)
    with embedded.running(data_dir) as services:
        assert saved(services) == (["one"], ["one"])


def test_kill_9_of_the_owner_ends_the_servers_and_loses_nothing(data_dir: Path) -> None:
    owner = start_owner(data_dir, [])
    services = told(owner)
    save(services, "one")
    numbers = pids(data_dir, services)
    owner.kill()
    owner.communicate()
    assert all_end(numbers)
    with embedded.running(data_dir) as services:
        assert saved(services) == (["one"], ["one"])


def test_a_busy_session_of_a_killed_server_does_not_stop_the_next(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "LEAVE_SECONDS", 1.0)
    with embedded.running(data_dir) as services:
        save(services, "one")
        busy = psycopg.connect(services.database_url)
        busy.pgconn.send_query(b"SELECT count(*) FROM generate_series(1, 1e12)")
        session = busy.info.backend_pid
        os.kill(pids(data_dir, services)[0], signal.SIGKILL)
        assert is_alive(session)
    with embedded.running(data_dir) as services:
        assert not is_alive(session)
        assert saved(services) == (["one"], ["one"])
    busy.close()


def test_a_stale_pid_file_that_names_a_living_stranger_is_no_obstacle(data_dir: Path) -> None:
    with embedded.running(data_dir) as services:
        save(services, "one")
        pid_file = data_dir / "postgres" / "postmaster.pid"
        _, *rest = pid_file.read_text().splitlines()
    stranger = subprocess.Popen(["sleep", "600"])
    pid_file.write_text("\n".join([str(stranger.pid), *rest]) + "\n")
    with embedded.running(data_dir) as services:
        assert saved(services) == (["one"], ["one"])
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_a_first_start_that_was_interrupted_is_begun_again(open_folder: Path) -> None:
    data_dir = open_folder / "var"
    half = data_dir / "postgres.new" / "data"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    with embedded.running(data_dir) as services:
        save(services, "one")
    assert not half.exists()


def test_lost_passwords_are_replaced_and_the_data_is_kept(data_dir: Path) -> None:
    with embedded.running(data_dir) as first:
        save(first, "one")
    (data_dir / "services.json").write_text('{"postgres": ')
    with embedded.running(data_dir) as second:
        assert second.database_url != first.database_url
        assert saved(second) == (["one"], ["one"])


@pytest.mark.parametrize(
    ("damage", "left"), [(b"", ["one", "two"]), (b"*3\r\n$5\r\nRPU", ["one", "two"]), (b"x", [])]
)
def test_a_damaged_append_only_file_does_not_stop_valkey(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes, left: list[str]
) -> None:
    """A torn end is dropped; what cannot be read at all is set aside."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://elsewhere/portal")
    with embedded.running(data_dir) as services:
        client: Any = redis.Redis.from_url(services.redis_url)
        client.rpush("kept", "one", "two")
    [log] = (data_dir / "valkey" / "appendonlydir").glob("*.incr.aof")
    kept = log.read_bytes()
    log.write_bytes(damage * 40 + kept if damage == b"x" else kept + damage)
    with embedded.running(data_dir) as services:
        client = redis.Redis.from_url(services.redis_url, decode_responses=True)
        assert client.lrange("kept", 0, -1) == left


def test_a_port_that_somebody_else_took_is_replaced(data_dir: Path) -> None:
    with embedded.running(data_dir) as services:
        save(services, "one")
    old = port_of(data_dir, "postgres")
    with socket.create_server(("127.0.0.1", old)), embedded.running(data_dir) as services:
        assert port_of(data_dir, "postgres") != old
        assert saved(services) == (["one"], ["one"])


def test_a_second_process_uses_the_servers_of_the_first(data_dir: Path) -> None:
    first, second = (start_owner(data_dir, []) for _ in range(2))
    services = told(first)
    assert told(second) == services
    save(services, "one")
    numbers = pids(data_dir, services)
    second.communicate()
    first.communicate()
    assert (first.returncode, second.returncode) == (0, 0)
    assert all_end(numbers)


def test_a_guest_leaves_the_servers_running(data_dir: Path) -> None:
    with embedded.running(data_dir) as services:
        guest = start_owner(data_dir, [])
        assert told(guest) == services
        guest.communicate()
        save(services, "one")
        assert saved(services) == (["one"], ["one"])


@pytest.mark.parametrize("variable", ["DATABASE_URL", "REDIS_URL", "REDIS_URL_FILE"])
def test_what_the_environment_names_is_not_started(
    open_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    data_dir = open_folder / "var"
    (tmp_path / "url").write_text("scheme://elsewhere/0\n")
    is_file = variable.endswith("_FILE")
    monkeypatch.setenv(variable, str(tmp_path / "url") if is_file else "scheme://elsewhere/0")
    with embedded.running(data_dir) as services:
        given_database = services.database_url == "scheme://elsewhere/0"
        given_redis = services.redis_url == "scheme://elsewhere/0"
    assert (given_database, given_redis) == (variable[:5] == "DATAB", variable[:5] == "REDIS")
    assert (data_dir / "postgres").exists() is not given_database
    assert (data_dir / "valkey").exists() is not given_redis


@as_root
def test_root_becomes_an_ordinary_user_without_any_capability(data_dir: Path) -> None:
    account = embedded.account_for(data_dir)
    assert account
    assert account.uid != 0
    with embedded.running(data_dir) as services:
        for pid in pids(data_dir, services):
            status = Path(f"/proc/{pid}/status").read_text()
            assert f"Uid:\t{account.uid}\t{account.uid}\t" in status
            assert "CapEff:\t0000000000000000" in status


@as_root
def test_a_closed_folder_above_costs_one_capability_and_stays_closed(open_folder: Path) -> None:
    closed = open_folder / "home"
    closed.mkdir(mode=0o700)
    with embedded.running(closed / "var") as services:
        save(services, "one")
        assert saved(services) == (["one"], ["one"])
        for pid in pids(closed / "var", services):
            status = Path(f"/proc/{pid}/status").read_text()
            assert "CapEff:\t0000000000000004" in status  # CAP_DAC_READ_SEARCH
            assert "CapBnd:\t0000000000000004" in status
    assert closed.stat().st_mode & 0o777 == 0o700


@as_root
def test_an_ordinary_user_runs_them_as_itself(open_folder: Path) -> None:
    nobody = Account(65534, 65534)
    home = open_folder / "home"
    home.mkdir()
    os.chown(home, nobody.uid, nobody.gid)
    flags = embedded.privileges(nobody, home, Path(sys.executable))
    owner = start_owner(home / "var", ["setpriv", *flags])
    services = told(owner)
    save(services, "one")
    for pid in pids(home / "var", services):
        assert "Uid:\t65534\t65534\t" in Path(f"/proc/{pid}/status").read_text()
    owner.communicate()
    with embedded.running(home / "var") as services:  # root goes on as the data's owner
        assert saved(services) == (["one"], ["one"])


def test_two_servers_get_two_ports_below_the_ephemeral_range(open_folder: Path) -> None:
    data_dir = open_folder / "var"
    assert embedded.free_port() in embedded.PORTS
    embedded.make_data_dir(data_dir)
    postgres, valkey = embedded.servers(data_dir)
    assert (type(postgres), type(valkey)) == (Postgres, Valkey)
    assert postgres.port != valkey.port
