"""What STORAGE_URL means: a folder that all hosts share, or a bucket.

Only reading and refusing lives here; `batches/storage.py` keeps the bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

from django.core.exceptions import ImproperlyConfigured

from portal.environment import read

SHAPE = "STORAGE_URL must be file:FOLDER or s3://BUCKET/PREFIX?endpoint_url=…&region=…"
OPTIONS = {
    "endpoint_url": "endpoint_url",
    "region": "region_name",
    "addressing_style": "addressing_style",
}
"""What may stand behind the `?`, and django-storages' name for it."""
# Only what every store takes, so that no name means one thing here and another there.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}")
_PREFIX = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*)?")
_REGION = re.compile(r"[a-z0-9-]{1,63}")


@dataclass(frozen=True)
class Store:
    """Django's backend with its options, and the local folder where uploads are spooled."""

    backend: str
    options: dict[str, Any]
    spool: Path


def store_of(url: str, data_dir: Path) -> Store:
    """Raises `ImproperlyConfigured`, which never repeats what may be a secret."""
    parts = _split(url)
    if parts.scheme == "file":
        return _folder(url)
    if parts.scheme == "s3":
        return _bucket(parts, data_dir)
    raise ImproperlyConfigured(SHAPE)


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        raise ImproperlyConfigured(f"{SHAPE}: {error}") from error


def _folder(url: str) -> Store:
    path = url.removeprefix("file:").removeprefix("//")
    if not path:
        raise ImproperlyConfigured("STORAGE_URL: file: needs a folder")
    root = Path(path).resolve()
    # Spooled on the storage's own filesystem, so that keeping an upload is a rename.
    return Store(
        "django.core.files.storage.FileSystemStorage", {"location": root}, root / "incoming"
    )


def _bucket(parts: SplitResult, data_dir: Path) -> Store:
    if "@" in parts.netloc:
        raise ImproperlyConfigured(
            "STORAGE_URL may hold no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if not _BUCKET.fullmatch(parts.netloc):
        raise ImproperlyConfigured(f"STORAGE_URL: {parts.netloc!r} is no name of a bucket")
    prefix = parts.path.strip("/")
    if not _PREFIX.fullmatch(prefix) or parts.fragment:
        raise ImproperlyConfigured(
            "STORAGE_URL: the prefix takes letters, digits, and between them - _ . and /"
        )
    options = {"bucket_name": parts.netloc, "location": prefix, **_options(parts.query)}
    return Store("batches.s3.S3", options | _credentials(), data_dir / "incoming")


def _options(query: str) -> dict[str, str]:
    try:
        given = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise ImproperlyConfigured(f"{SHAPE}: {error}") from error
    for name, value in given:
        if name not in OPTIONS:
            raise ImproperlyConfigured(
                f"STORAGE_URL: there is no option {name!r}; there are {', '.join(OPTIONS)}"
            )
        _check(name, value)
    if len(dict(given)) < len(given):
        raise ImproperlyConfigured("STORAGE_URL: an option is given twice")
    return {OPTIONS[name]: value for name, value in given}


def _check(name: str, value: str) -> None:
    if name == "endpoint_url" and not _is_address(value):
        raise ImproperlyConfigured(
            "STORAGE_URL: endpoint_url must be http://HOST or https://HOST, without credentials"
        )
    if name == "region" and not _REGION.fullmatch(value):
        raise ImproperlyConfigured(f"STORAGE_URL: {value!r} is no region")
    if name == "addressing_style" and value not in ("auto", "path", "virtual"):
        raise ImproperlyConfigured("STORAGE_URL: addressing_style must be auto, path or virtual")


def _is_address(value: str) -> bool:
    try:
        parts = urlsplit(value)
        plain = not (parts.query or parts.fragment or "@" in parts.netloc)
        return (
            parts.scheme in ("http", "https") and bool(parts.hostname) and plain and parts.port != 0
        )
    except ValueError:  # a port that is no number
        return False


def _credentials() -> dict[str, str]:
    """AWS's own variables, each also as NAME_FILE; without them boto3 looks where it always does:
    profiles, and the role of the host or container."""
    key, secret = read("AWS_ACCESS_KEY_ID"), read("AWS_SECRET_ACCESS_KEY")
    if bool(key) != bool(secret):
        raise ImproperlyConfigured("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY go together")
    if not key:
        return {}
    known = {"access_key": key, "secret_key": secret}
    token = read("AWS_SESSION_TOKEN")
    return known | {"security_token": token} if token else known
