"""Typed reading of settings from the environment; every NAME may also come as NAME_FILE.

Only reading lives here; what the settings are is in `portal/settings.py`.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from django.core.exceptions import ImproperlyConfigured


def read(name: str, default: str = "") -> str:
    """The value of NAME, or the content of the file that NAME_FILE names, or `default`."""
    if value := os.environ.get(name, ""):
        return value
    if path := os.environ.get(f"{name}_FILE", ""):
        try:
            return Path(path).read_text().strip()
        except OSError as error:
            raise ImproperlyConfigured(f"{name}_FILE: cannot read {path}: {error}") from error
    return default


def read_int(name: str, default: int) -> int:
    value = read(name)
    try:
        return int(value) if value else default
    except ValueError as error:
        raise ImproperlyConfigured(f"{name} must be a whole number, not {value!r}") from error


def read_bool(name: str, default: bool = False) -> bool:
    value = read(name).lower()
    if value in ("", "0", "1", "true", "false", "yes", "no", "on", "off"):
        return value in ("1", "true", "yes", "on") if value else default
    raise ImproperlyConfigured(f"{name} must be true or false, not {value!r}")


def read_list(name: str, default: str = "") -> list[str]:
    return [part.strip() for part in read(name, default).split(",") if part.strip()]


def read_seconds(name: str, default: str) -> tuple[float, ...]:
    """A list of waits, at least one of them; none is negative."""
    try:
        found = tuple(map(float, read_list(name, default)))
    except ValueError:
        found = ()
    if not found or not all(0 <= each < 10**9 for each in found):
        raise ImproperlyConfigured(f"{name} must be seconds with commas between, {default} say")
    return found


def own_secret(path: Path) -> str:
    """A secret kept in a file of ours, made at first use, so that no default one exists.

    Several processes may start at once: the first to create the file decides.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        made = path.with_name(f"{path.name}.{os.getpid()}")
        made.touch(mode=0o600)
        made.write_text(secrets.token_urlsafe(50))
        try:
            os.link(made, path)
        except FileExistsError:
            pass
        finally:
            made.unlink()
    return path.read_text().strip()
