"""Writes of the registry."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from django.conf import settings
from django.db import transaction
from django.utils import timezone

from accounts import secrets
from accounts.errors import BadRequest
from accounts.models import Organization
from models_registry.models import EngineKind, Model, Task

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}")


@transaction.atomic
def register_model(
    *,
    name: str,
    source: str,
    revision: str = "",
    task: str = Task.CHAT,
    engine: str = EngineKind.VLLM,
    base_url: str = "",
    secret: str = "",
    engine_args: dict[str, Any] | None = None,
    organizations: Sequence[Organization] = (),
) -> Model:
    """Make the entry of that name, or change it to this; raises `BadRequest` naming the field."""
    _check(name=name, source=source, task=task, engine=engine, base_url=base_url)
    if engine == EngineKind.VLLM and (folder := Path(source).expanduser()).is_dir():
        # Workers start in other folders than the shell that registered the model.
        source = str(folder.resolve())
    model, _ = Model.objects.update_or_create(
        name=name,
        defaults={
            "source": source,
            "revision": revision,
            "task": task,
            "engine": engine,
            "base_url": base_url,
            "encrypted_secret": secrets.encrypt(secret),
            "engine_args": engine_args or {},
            "load_error": "",
            "load_failed_at": None,
        },
    )
    model.organizations.set(organizations)
    return model


def _check(*, name: str, source: str, task: str, engine: str, base_url: str) -> None:
    if not _NAME.fullmatch(name):
        raise BadRequest(
            "A model's name starts with a letter or digit and has only these: A-Z a-z 0-9 . _ : / -",
            param="name",
        )
    if task not in Task.values:
        raise BadRequest(f"task must be one of {', '.join(Task.values)}", param="task")
    if engine not in EngineKind.values:
        raise BadRequest(f"engine must be one of {', '.join(EngineKind.values)}", param="engine")
    if engine == EngineKind.INSTANT and settings.PRODUCTION:
        raise BadRequest(
            "The instant engine invents its answers: not in production.", param="engine"
        )
    if engine == EngineKind.OPENAI and urlsplit(base_url).scheme not in ("http", "https"):
        raise BadRequest("The openai engine needs a base_url (http or https).", param="base_url")
    if engine == EngineKind.VLLM and source in ("", "none"):
        raise BadRequest("The vllm engine needs a folder or a Hugging Face name.", param="source")


def note_load(name: str, *, error: str) -> None:
    """Remember that the model was loaded, or why it could not be."""
    failed_at = timezone.now() if error else None
    Model.objects.filter(name=name).update(load_error=error, load_failed_at=failed_at)


def note_speed(name: str, tokens_per_second: float) -> None:
    """Remember how fast the model was of late; half of the old figure, half of the new one."""
    model = Model.objects.filter(name=name)
    for known in model.values_list("tokens_per_second", flat=True):
        model.update(
            tokens_per_second=(known + tokens_per_second) / 2 if known else tokens_per_second
        )
