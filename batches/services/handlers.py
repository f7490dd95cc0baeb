"""Result handlers as organizations set them up. Running them is `handler_runs`'s."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson
from django.db import transaction
from django.utils import timezone
from django_scopes import scopes_disabled
from pydantic import SecretStr, ValidationError

from accounts import secrets
from accounts.access import Caller
from accounts.errors import BadRequest, NotFound
from accounts.models import Organization, Project
from accounts.services import audit
from batches.handlers import registry
from batches.handlers.base import Handler
from batches.handlers.results import HandlerFailed
from batches.models import ResultHandler
from batches.services import handler_runs

MOST = 50
"""Handlers of one organization."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_FIELDS = ("name", "project_id", "settings", "position", "enabled", "by_default")


def create_handler(
    *,
    actor: Caller,
    name: str,
    kind: str,
    settings: Mapping[str, Any],
    project: Project | None,
    enabled: bool = True,
    by_default: bool = True,
) -> ResultHandler:
    """Have the results of the project's batches handled (of all projects', without one), last of
    all; raises `BadRequest` naming the field."""
    actor.require("webhooks")
    row = ResultHandler(organization=actor.organization, kind=kind, enabled=enabled)
    row.by_default, row.project = by_default, project
    _configure(row, settings)
    with transaction.atomic():
        mine = _all(actor.organization)
        if len(mine) >= MOST:
            said = f"An organization has at most {MOST} result handlers."
            raise BadRequest(said, code="too_many_handlers")
        row.name = _checked_name(name, mine)
        row.position = len(mine) + 1
        row.save(force_insert=True)
        changes = audit.difference(row, dict.fromkeys(("kind", *_FIELDS)))
        audit.record("result_handler.created", actor=actor, target=row, changes=changes)
    return row


def update_handler(
    *,
    actor: Caller,
    row: ResultHandler,
    settings: Mapping[str, Any] | None = None,
    position: int | None = None,
    **fields: Any,
) -> ResultHandler:
    """Change what is given of `create_handler`'s fields, or the place in the order, from 1.

    `settings` are all of them; secrets that are left out stay, unless a setting changes that says
    where they are sent.
    """
    actor.require("webhooks")
    new = None if settings is None else _configured(row, settings)
    with transaction.atomic():
        mine = _all(actor.organization)
        row = _among(mine, row)
        before = audit.snapshot(row, _FIELDS)
        had = row.encrypted_secrets
        if new is not None:
            row.settings, row.encrypted_secrets = new.settings, new.encrypted_secrets
        if "name" in fields:
            fields["name"] = _checked_name(fields["name"], [each for each in mine if each != row])
        for name, value in fields.items():
            setattr(row, name, value)
        if position is not None:
            _place(mine, row, position)
        changes = audit.difference(row, before)
        if row.encrypted_secrets != had:
            changes["secrets"] = [audit.MASK, audit.MASK]
        if changes:
            row.updated_at = timezone.now()
            row.save(force_update=True)
            audit.record("result_handler.updated", actor=actor, target=row, changes=changes)
    return row


@transaction.atomic
def delete_handler(*, actor: Caller, row: ResultHandler) -> None:
    """Forget the handler with all of its runs; one that is running stops."""
    actor.require("webhooks")
    mine = _all(actor.organization)
    row = _among(mine, row)
    with scopes_disabled():
        ResultHandler.objects.filter(pk=row.pk).delete()
        _number([each for each in mine if each != row])
    audit.record("result_handler.deleted", actor=actor, target=row)


def _all(organization: Organization) -> list[ResultHandler]:
    """The organization's handlers in order, which nobody else changes until the transaction ends."""
    handler_runs.hold_handlers(organization.pk)
    with scopes_disabled():
        rows = ResultHandler.objects.filter(organization=organization)
        return list(rows.select_related("project").order_by("position", "pk"))


def _among(mine: list[ResultHandler], row: ResultHandler) -> ResultHandler:
    found = next((each for each in mine if each.pk == row.pk), None)
    if found is None:
        said = f"No such result handler: {row.pk!r}"
        raise NotFound(said, param="handler_id", code="not_found")
    return found


def _place(mine: list[ResultHandler], row: ResultHandler, position: int) -> None:
    others = [each for each in mine if each != row]
    at = min(max(position, 1), len(mine)) - 1
    _number([*others[:at], row, *others[at:]])


def _number(rows: list[ResultHandler]) -> None:
    with scopes_disabled():
        for at, each in enumerate(rows, start=1):
            if each.position != at:
                each.position = at
                ResultHandler.objects.filter(pk=each.pk).update(position=at)


def _checked_name(name: str, others: list[ResultHandler]) -> str:
    """A name that metadata can hold; raises `BadRequest`."""
    if not _NAME.fullmatch(name) or name == "none":
        said = "A name has letters, digits, “-”, “_” and “.”, at most 64; and is not “none”."
        raise BadRequest(said, param="name", code="invalid_value")
    if name in {each.name for each in others}:
        raise BadRequest("Another handler has this name.", param="name", code="name_taken")
    return name


# --- Settings -----------------------------------------------------------------------------------


def kind_of(name: str) -> type[Handler[Any]]:
    """The kind of that name; raises `BadRequest` for what is none."""
    kind = registry.kinds().get(name)
    if kind is None:
        known = ", ".join(registry.kinds())
        raise BadRequest(f"kind must be one of: {known}.", param="kind", code="invalid_value")
    return kind


def made(row: ResultHandler) -> Handler[Any]:
    """The handler with its settings, ready to be run; raises `HandlerFailed`.

    Its distribution may have been removed since, or want other settings now.
    """
    kind = registry.kinds().get(row.kind)
    if kind is None:
        raise HandlerFailed(f"The portal has no handler {row.kind!r} any more.", final=True)
    try:
        return kind(kind.settings_schema.model_validate(row.settings | _secrets_of(row)))
    except ValidationError as error:
        where, said = _first(error)
        raise HandlerFailed(f"Its settings do not fit any more: {where}: {said}") from None


def _secrets_of(row: ResultHandler) -> dict[str, str]:
    found: dict[str, str] = orjson.loads(secrets.decrypt(row.encrypted_secrets) or "{}")
    return found


def secrets_set(row: ResultHandler) -> list[str]:
    """The names of the secrets that it has."""
    return sorted(_secrets_of(row))


def _configured(row: ResultHandler, settings: Mapping[str, Any]) -> ResultHandler:
    """A row like this one with these settings; looked at outside of any lock, as names resolve."""
    new = ResultHandler(organization=row.organization, kind=row.kind)
    kind = kind_of(row.kind)
    kept = {name: text for name, text in _secrets_of(row).items() if not settings.get(name)}
    moved = [
        name for name in kind.destination if settings.get(name, "") != row.settings.get(name, "")
    ]
    if moved and kept:
        said = f"Give {min(kept)} again, as {moved[0]} has changed: it would be sent there."
        raise BadRequest(said, param=f"settings.{min(kept)}", code="secret_needed")
    _configure(new, {**settings, **kept})
    return new


def _configure(row: ResultHandler, settings: Mapping[str, Any]) -> None:
    """Take settings over into the row, if the handler would; raises `BadRequest`."""
    kind = kind_of(row.kind)
    given = {name: value for name, value in settings.items() if value is not None}
    if "\\u0000" in orjson.dumps(given).decode():  # which PostgreSQL cannot keep
        raise BadRequest("Settings may have no NUL.", param="settings", code="invalid_value")
    try:
        checked = kind.settings_schema.model_validate(given)
        kind(checked).check(row.organization_id)
    except ValidationError as error:
        where, said = _first(error)
        param = f"settings.{where}" if where else "settings"
        raise BadRequest(said, param=param, code="invalid_value") from None
    except HandlerFailed as error:
        raise BadRequest(str(error), param="settings", code="invalid_value") from None
    hidden = kind.secret_fields()
    row.settings = checked.model_dump(mode="json", exclude=set(hidden))
    texts = {name: _text(getattr(checked, name)) for name in hidden}
    kept = {name: text for name, text in texts.items() if text}
    row.encrypted_secrets = secrets.encrypt(orjson.dumps(kept).decode()) if kept else ""


def _text(secret: SecretStr | None) -> str:
    return "" if secret is None else secret.get_secret_value()


def _first(error: ValidationError) -> tuple[str, str]:
    """Where the first thing that is wrong is, and what; never what was given, which may be a
    secret."""
    first = error.errors(include_input=False, include_url=False)[0]
    said = first["msg"].removeprefix("Value error, ")
    return ".".join(map(str, first["loc"]))[:100], said[:1].upper() + said[1:]
