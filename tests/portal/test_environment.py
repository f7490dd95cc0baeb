"""Typed reading of settings from the environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured

from portal.environment import own_secret, read, read_bool, read_int, read_list, read_seconds


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THING", raising=False)
    monkeypatch.delenv("THING_FILE", raising=False)


def test_what_is_not_set_is_its_default() -> None:
    assert (read("THING"), read("THING", "x"), read_int("THING", 3)) == ("", "x", 3)
    assert (read_bool("THING"), read_bool("THING", True), read_list("THING")) == (False, True, [])


def test_a_file_may_hold_the_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("  from the file\n")
    monkeypatch.setenv("THING_FILE", str(tmp_path / "secret"))
    assert read("THING", "default") == "from the file"
    monkeypatch.setenv("THING", "from the environment")
    assert read("THING") == "from the environment"
    monkeypatch.setenv("THING", "")
    assert read("THING") == "from the file"


def test_a_file_that_cannot_be_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THING_FILE", "/nowhere/secret")
    with pytest.raises(ImproperlyConfigured, match=r"^THING_FILE: cannot read /nowhere/secret"):
        read("THING")


@pytest.mark.parametrize("text", ["x", "1.5", "1 2", "0x10"])
def test_a_number_must_be_whole(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("THING", text)
    with pytest.raises(ImproperlyConfigured, match="THING must be a whole number"):
        read_int("THING", 3)


def test_numbers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THING", "-7")
    assert read_int("THING", 3) == -7


@pytest.mark.parametrize(
    ("text", "value"),
    [(each, True) for each in ("1", "true", "True", "YES", "on")]
    + [(each, False) for each in ("0", "false", "FALSE", "no", "Off")],
)
def test_truth_is_read(monkeypatch: pytest.MonkeyPatch, text: str, value: bool) -> None:
    monkeypatch.setenv("THING", text)
    assert (read_bool("THING"), read_bool("THING", True)) == (value, value)


@pytest.mark.parametrize("text", ["maybe", "2", "t", "enabled"])
def test_what_is_neither_true_nor_false_is_told(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("THING", text)
    with pytest.raises(ImproperlyConfigured, match="THING must be true or false"):
        read_bool("THING")


@pytest.mark.parametrize("text", ["x", "1,x", "-1", "1 2", "inf", ","])
def test_waits_must_be_seconds(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("THING", text)
    with pytest.raises(ImproperlyConfigured, match="THING must be seconds"):
        read_seconds("THING", "1,5")


def test_waits_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THING", "0, 2.5")
    assert read_seconds("THING", "1,5") == (0.0, 2.5)
    monkeypatch.delenv("THING")
    assert read_seconds("THING", "1,5") == (1.0, 5.0)


def test_lists_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THING", " a, b ,,c,")
    assert read_list("THING") == ["a", "b", "c"]
    monkeypatch.delenv("THING")
    assert read_list("THING", "x,y") == ["x", "y"]


def test_a_secret_of_our_own_is_made_once_and_for_us_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "secret_key"
    first = own_secret(path)
    assert len(first) >= 50
    assert own_secret(path) == first
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["secret_key"]
    assert own_secret(tmp_path / "other") != first


def test_processes_that_start_at_once_have_the_same_secret(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from portal.environment import own_secret;"
        "sys.stdin.readline(); print(own_secret(Path(sys.argv[1])))"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "secret_key")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for _ in range(4)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = {process.communicate(timeout=60)[0] for process in started}
    assert len(said) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["secret_key"]
