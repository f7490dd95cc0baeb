"""The supervisor with stand-ins for the project's processes: restarts, stopping, its commands.

The services themselves are tested in test_embedded.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from portal import embedded, supervisor
from portal.supervisor import Child, Supervisor

ROOT = Path(__file__).resolve().parents[2]

# A portal of one process that answers everything with 200, and a manage.py that shows what it got.
STAND_IN = """
import os, sys
from functools import partial
from pathlib import Path
from portal import supervisor

WEB = '''
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
'''

def children(options, variables, data_dir):
    web = [sys.executable, "-c", WEB, str(options.port)]
    return [supervisor.Child("web", partial(supervisor.spawn, web, variables))]

supervisor.children = children
supervisor.ROOT = Path(sys.argv[1])
sys.exit(supervisor.main(sys.argv[2:]))
"""
MANAGE = """
import os, sys
import psycopg
if sys.argv[1] == "migrate":
    print("noise", os.environ["DJANGO_SETTINGS_MODULE"])
    with psycopg.connect(os.environ["DATABASE_URL"]) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS django_migrations (number serial)")
        connection.execute("INSERT INTO django_migrations DEFAULT VALUES")
else:
    with psycopg.connect(os.environ["DATABASE_URL"]) as connection:
        [runs] = connection.execute("SELECT count(*) FROM django_migrations").fetchone()
    print(sys.argv[1:], sys.stdin.read(), runs)
    sys.exit(7)
"""


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("DATABASE_URL", "DATABASE_URL_FILE", "REDIS_URL", "REDIS_URL_FILE", "BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "manage.py").write_text(MANAGE)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "var"))
    return tmp_path / "var"


def stand_in(data_dir: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-c", STAND_IN, str(data_dir.parent), *arguments]


@contextmanager
def serving(data_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    serve = subprocess.Popen(stand_in(data_dir, "serve", "--port", "0"), stdout=subprocess.DEVNULL)
    try:
        yield serve
    finally:
        serve.kill()
        serve.wait()


def child(name: str, script: str, **options: Any) -> Child:
    return Child(name, partial(supervisor.spawn, ["sh", "-c", script], dict(os.environ)), **options)


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def all_end(numbers: list[int]) -> bool:
    return embedded.wait_until(lambda: not any(is_alive(pid) for pid in numbers), 60)


def pid_in(file: Path) -> int:
    assert embedded.wait_until(lambda: file.exists() and file.read_text().endswith("\n"), 30)
    return int(file.read_text())


def current(data_dir: Path) -> dict[str, Any]:
    return embedded.read_json(data_dir / "serve.json")


def keep_until(kept: Supervisor, name: str, not_pid: int) -> int:
    """Tend until `name` runs as another process than `not_pid`; its pid."""

    def is_new() -> bool:
        kept.tend()
        return children_of(kept).get(name, not_pid) != not_pid

    assert embedded.wait_until(is_new, 60)
    return children_of(kept)[name]


def children_of(kept: Supervisor) -> dict[str, int]:
    found: dict[str, int] = embedded.read_json(kept.state)["children"]
    return found


def test_a_child_that_is_killed_is_started_again_and_the_state_names_it(tmp_path: Path) -> None:
    kept = Supervisor(tmp_path / "serve.json", 8123)
    kept.keep([child("one", "exec sleep 600"), child("two", "exec sleep 600")])
    before = children_of(kept)
    os.kill(before["one"], signal.SIGKILL)
    after = keep_until(kept, "one", before["one"])
    assert json.loads(kept.state.read_text()) == {
        "address": "http://127.0.0.1:8123",
        "port": 8123,
        "pid": os.getpid(),
        "ready": False,
        "children": {"one": after, "two": before["two"]},
    }
    kept.stop()
    assert not any(is_alive(pid) for pid in (after, before["two"]))
    assert not kept.state.exists()


def test_pauses_grow_with_each_death_until_one_has_lived_long() -> None:
    broken = child("one", "exit 1")
    pauses = []
    for _ in range(8):
        broken.born = time.monotonic()
        pauses.append(broken.pause)
        broken.put_off()
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    broken.born = time.monotonic() - 31
    broken.put_off()
    assert broken.pause == 0.4
    assert not broken.tend()


def test_a_child_that_cannot_be_started_is_tried_again_later() -> None:
    absent = Child("one", lambda: subprocess.Popen(["/nowhere"]))
    assert absent.tend()
    assert absent.process is None
    assert absent.due > time.monotonic()


def test_what_a_dead_child_left_in_its_group_ends_before_the_next_start(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    kept = Supervisor(tmp_path / "serve.json", 8123)
    kept.keep([child("one", f"sleep 600 & echo $! > {file}; wait")])
    orphan = pid_in(file)
    before = children_of(kept)["one"]
    os.kill(before, signal.SIGKILL)
    keep_until(kept, "one", before)
    assert not is_alive(orphan)
    kept.stop()


def test_stop_signals_only_the_main_process_and_kills_the_whole_group_that_stays(
    tmp_path: Path,
) -> None:
    file, said = tmp_path / "pid", tmp_path / "said"
    below = f"trap 'echo below >> {said}' TERM; echo $$ > {file}; while :; do sleep 0.1; done"
    stubborn = f'trap "echo main >> {said}" TERM; sh -c "{below}" & while :; do wait; done'
    kept = Supervisor(tmp_path / "serve.json", 8123)
    kept.keep([child("one", stubborn, patience=2.0)])
    numbers = [pid_in(file), children_of(kept)["one"]]
    kept.stop()
    assert not any(is_alive(pid) for pid in numbers)
    assert said.read_text() == "main\n"


def test_the_last_layer_is_stopped_first(tmp_path: Path) -> None:
    said, up = tmp_path / "said", tmp_path / "up"
    kept = Supervisor(tmp_path / "serve.json", 8123)
    for name in ("database", "web"):
        script = (
            f"trap 'echo {name} >> {said}; exit' TERM; echo >> {up}; while :; do sleep 0.1; done"
        )
        kept.keep([child(name, script)])
    assert embedded.wait_until(lambda: up.exists() and up.read_text() == "\n\n", 30)
    kept.stop()
    assert said.read_text() == "web\ndatabase\n"


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    up = tmp_path / "up"
    kept = Supervisor(tmp_path / "serve.json", 8123, signals=2)
    kept.keep(
        [child("one", f"trap '' TERM; echo > {up}; while :; do sleep 0.1; done", patience=1e9)]
    )
    assert embedded.wait_until(up.exists, 30)
    pid = children_of(kept)["one"]
    kept.stop()
    assert not is_alive(pid)


def test_serve_brings_everything_back_and_leaves_nothing(data_dir: Path) -> None:
    with serving(data_dir) as serve:
        address = supervisor.wait_ready(data_dir, 120)
        before = current(data_dir)
        assert address == f"http://127.0.0.1:{before['port']}"
        assert before["pid"] == serve.pid
        assert sorted(before["children"]) == ["postgres", "valkey", "web"]
        services = embedded.urls(data_dir)
        for pid in before["children"].values():
            os.kill(pid, signal.SIGKILL)

        def all_new() -> bool:
            now = current(data_dir)["children"]
            return len(now) == 3 and not set(now.values()) & set(before["children"].values())

        assert embedded.wait_until(all_new, 60)
        assert embedded.wait_until(lambda: supervisor.is_ready(address, address), 60)
        with embedded.running(data_dir) as again:  # answering, and not ours: serve has the lock
            assert again == services
        numbers = list(current(data_dir)["children"].values())
        serve.terminate()
        assert serve.wait(60) == 0
    assert not any(is_alive(pid) for pid in numbers)
    assert not (data_dir / "serve.json").exists()


def test_kill_9_of_serve_ends_all_and_the_next_one_starts(data_dir: Path) -> None:
    for _ in range(2):
        with serving(data_dir) as serve:
            supervisor.wait_ready(data_dir, 120)
            assert current(data_dir)["pid"] == serve.pid
            numbers = list(current(data_dir)["children"].values())
        assert all_end(numbers)


def test_a_second_serve_on_the_same_folder_says_so(data_dir: Path) -> None:
    embedded.make_data_dir(data_dir)
    lock = embedded.take_lock(data_dir / "serve.lock")
    assert lock
    (data_dir / "serve.json").write_text('{"pid": 4321}')
    with lock:
        done = subprocess.run(
            stand_in(data_dir, "serve"), capture_output=True, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == f"serve: another serve (pid 4321) already runs on {data_dir}\n"


def test_a_taken_port_is_named_in_one_line(data_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            stand_in(data_dir, "serve", "--port", port), capture_output=True, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == f"serve: port {port} is taken: choose another with --port\n"


def test_a_failing_migration_is_shown_and_nothing_is_left(data_dir: Path) -> None:
    (data_dir.parent / "manage.py").write_text("raise SystemExit('no such column')")
    done = subprocess.run(
        stand_in(data_dir, "serve", "--port", "0"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "serve: migrate failed:\nno such column\n"
    assert not (data_dir / "postgres" / "postmaster.pid").exists()


def test_manage_migrates_once_and_prints_only_what_the_command_prints(data_dir: Path) -> None:
    for _ in range(2):
        done = subprocess.run(
            stand_in(data_dir, "manage", "create_org", "--name", "a b"),
            input="typed",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 7
        assert (done.stdout, done.stderr) == ("['create_org', '--name', 'a b'] typed 1\n", "")


def test_wait_ready_is_not_fooled_by_what_a_dead_serve_left(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / "serve.json").write_text(
        json.dumps({"port": 1, "pid": dead.pid, "ready": True, "children": {}})
    )
    with pytest.raises(TimeoutError):
        supervisor.wait_ready(tmp_path, 0.3)


def test_gpu_workers_get_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "gpu_count", lambda: 1)
    assert supervisor._gpu_worker(0) == ["worker", "--name", "gpu0", "--gpu", "0"]
    assert supervisor._gpu_worker(1) == ["worker", "--name", "gpu1"]
