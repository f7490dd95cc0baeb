"""`Idempotency-Key`: the same key with the same body within 24 hours gets the first answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from django.core.files.uploadedfile import UploadedFile
from django.db import transaction
from django.http import HttpRequest
from ninja import Schema

from accounts.access import Caller
from accounts.errors import BadRequest
from batches.models import IdempotencyKey

S = TypeVar("S", bound=Schema)


def once(
    request: HttpRequest,
    caller: Caller,
    create: Callable[[], S],
    *,
    said: Any = None,
    content: UploadedFile | None = None,
    only_once: Mapping[str, Any] | None = None,
) -> S | dict[str, Any]:
    """Call `create`, or repeat what it answered when this key came before, but for what is to be
    said `only_once` (as pydantic's `exclude`): others of the organization may bring the key, too.

    The key's row and what it stands for commit together. A second request with the key waits for
    the first one's transaction and then sees its answer. Without the header: just `create()`.
    """
    key = request.headers.get("Idempotency-Key")
    if not key:
        return create()
    if len(key) > 255 or not key.isprintable():
        raise BadRequest("Idempotency-Key has at most 255 printable characters.")
    fingerprint = _fingerprint(request.path, said, content)
    with transaction.atomic(), caller.scope():
        row, first = IdempotencyKey.objects.get_or_create(
            organization=caller.organization, key=key, defaults={"fingerprint": fingerprint}
        )
        if not first:
            return _repeat(row, fingerprint)
        answer = create()
        row.answer = answer.model_dump(mode="json", exclude=only_once)
        row.save(update_fields=["answer"])
    return answer


def _repeat(row: IdempotencyKey, fingerprint: str) -> dict[str, Any]:
    if row.fingerprint != fingerprint or row.answer is None:
        raise BadRequest(
            "This Idempotency-Key was used for another request; take a new one.",
            code="idempotency_key_reused",
        )
    answer: dict[str, Any] = row.answer
    return answer


def _fingerprint(path: str, said: Any, content: UploadedFile | None) -> str:
    digest = hashlib.sha256(f"{path}\n{json.dumps(said, sort_keys=True)}".encode())
    if content is not None:
        for block in content.chunks():
            digest.update(block)
        content.seek(0)
    return digest.hexdigest()
