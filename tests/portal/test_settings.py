"""The settings as processes read them: what production refuses, and where defaults come from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECRET = "a secret of at least thirty-two characters"
SHOW = "from django.conf import settings; import json; print(json.dumps([{}], default=str))"


def started(code: str, data_dir: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code that reads the settings in a process of its own."""
    names = ("PATH", "HOME", "DATABASE_URL", "REDIS_URL", "PYTHONDONTWRITEBYTECODE")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    given = {"DATA_DIR": str(data_dir), "DJANGO_SETTINGS_MODULE": "portal.settings"} | variables
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=kept | given,
        capture_output=True,
        text=True,
        timeout=120,
    )


def shown(expression: str, data_dir: Path, **variables: str) -> str:
    done = started(SHOW.replace("{}", expression), data_dir, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def refusal(data_dir: Path, **variables: str) -> str:
    """The last line of why the settings cannot be read."""
    done = started(SHOW.replace("{}", "settings.DEBUG"), data_dir, **variables)
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SECRET_KEY": "too short"},
        {"SECRET_KEY": SECRET, "DEBUG": "1"},
    ],
)
def test_production_refuses_default_secrets_and_debug(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    said = refusal(tmp_path, ENVIRONMENT="production", **variables)
    assert "ENVIRONMENT=production needs DEBUG off and a SECRET_KEY of at least 32" in said
    assert not (tmp_path / "secret_key").exists()


def test_production_starts_with_a_secret_and_serves_its_own_host_only(tmp_path: Path) -> None:
    secret = tmp_path / "given"
    secret.write_text(SECRET)
    said = shown(
        "settings.DEBUG, settings.ALLOWED_HOSTS, settings.SESSION_COOKIE_SECURE, settings.SECRET_KEY",
        tmp_path,
        ENVIRONMENT="production",
        SECRET_KEY_FILE=str(secret),
        BASE_URL="https://batches.example.com/",
    )
    assert said == f'[false, ["batches.example.com"], true, "{SECRET}"]'


def test_production_refuses_the_instant_engine(tmp_path: Path) -> None:
    code = (
        "import django; django.setup()\n"
        "from models_registry.services import register_model\n"
        "register_model(name='echo', source='none', engine='instant')"
    )
    done = started(code, tmp_path, ENVIRONMENT="production", SECRET_KEY=SECRET)
    assert done.returncode == 1
    assert "The instant engine invents its answers: not in production." in done.stderr


def test_development_has_a_secret_of_its_own_and_no_debug(tmp_path: Path) -> None:
    found = {shown("settings.DEBUG, settings.SECRET_KEY", tmp_path) for _ in range(2)}
    secret = (tmp_path / "secret_key").read_text()
    assert found == {f'[false, "{secret}"]'}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ENVIRONMENT": "staging"}, "ENVIRONMENT must be development or production"),
        ({"LEASE_SECONDS": "soon"}, "LEASE_SECONDS must be a whole number"),
        ({"STORAGE_URL": "ftp://host"}, "STORAGE_URL must be"),
        ({"RATE_LIMIT_WHEN_REDIS_IS_DOWN": "maybe"}, "must be open, open-for-reads or closed"),
        ({"GPU_MAX_POWER": "-1"}, "GPU_MAX_TEMPERATURE, _POWER and _MEMORY cannot be negative"),
    ],
)
def test_settings_that_make_no_sense_are_told(
    tmp_path: Path, variables: dict[str, str], said: str
) -> None:
    assert said in refusal(tmp_path, **variables)


def test_rate_limits_have_defaults(tmp_path: Path) -> None:
    names = ("REQUESTS", "BATCHES", "FILES", "ANONYMOUS", "WHEN_REDIS_IS_DOWN")
    expression = ", ".join(f"settings.RATE_LIMIT_{name}" for name in names)
    assert shown(expression, tmp_path) == '[600, 10, 20, 300, "open-for-reads"]'


def test_what_the_databases_url_says_is_heeded(tmp_path: Path) -> None:
    options = "settings.DATABASES['default']['OPTIONS']"
    said = shown(
        f"{options}['sslmode'], {options}['connect_timeout'], {options}['tcp_user_timeout']",
        tmp_path,
        DATABASE_URL="postgresql://portal@db.example.com/portal?sslmode=verify-full",
    )
    assert said == '["verify-full", 5, 25000]'
