"""Writes of trusted issuers, and the exchange of their tokens for ours."""

from __future__ import annotations

from collections.abc import Sequence

import structlog
from django.db import transaction
from django_scopes import scopes_disabled

from accounts import federation, names, queries
from accounts.access import Caller
from accounts.errors import BadRequest, Forbidden, NotFound, Unauthorized
from accounts.federation import Unreachable, Untrusted
from accounts.models import Organization, Project, Scope, TrustedIssuer
from accounts.services import audit, keys, tokens
from accounts.services.tokens import Issued

logger = structlog.get_logger(__name__)
MOST = 100
_FIELDS = (
    "name",
    "project_id",
    "issuer",
    "jwks_url",
    "audience",
    "subject_pattern",
    "scopes",
)


@transaction.atomic
def create_trusted_issuer(
    *,
    actor: Caller,
    project: Project,
    name: str,
    issuer: str,
    audience: str,
    subject_pattern: str,
    scopes: Sequence[str],
    jwks_url: str = "",
) -> TrustedIssuer:
    """Let tokens of this issuer, audience and subject be exchanged for ours with these scopes."""
    actor.require("keys.all")
    with scopes_disabled():
        mine = Organization.objects.select_for_update(no_key=True).get(pk=actor.organization.pk)
        if TrustedIssuer.objects.filter(organization=mine).count() >= MOST:
            said = f"An organization trusts at most {MOST} issuers."
            raise BadRequest(said, code="too_many_issuers")
    row = TrustedIssuer(organization=actor.organization)
    before = dict.fromkeys(_FIELDS)
    _fill(row, actor, project, name, issuer, audience, subject_pattern, scopes, jwks_url)
    row.save(force_insert=True)
    changes = audit.difference(row, before)
    audit.record("trusted_issuer.created", actor=actor, target=row, changes=changes)
    return row


@transaction.atomic
def update_trusted_issuer(
    *,
    actor: Caller,
    row: TrustedIssuer,
    project: Project,
    name: str,
    issuer: str,
    audience: str,
    subject_pattern: str,
    scopes: Sequence[str],
    jwks_url: str = "",
) -> TrustedIssuer:
    """Tokens that were made before go on, with no more than the scopes that there are now."""
    actor.require("keys.all")
    row = _locked(row)
    before = audit.snapshot(row, _FIELDS)
    _fill(row, actor, project, name, issuer, audience, subject_pattern, scopes, jwks_url)
    if changes := audit.difference(row, before):
        row.save(force_update=True)
        audit.record("trusted_issuer.updated", actor=actor, target=row, changes=changes)
    return row


@transaction.atomic
def delete_trusted_issuer(*, actor: Caller, row: TrustedIssuer) -> None:
    """End the trust, and with it every token that was made by it."""
    actor.require("keys.all")
    row = _locked(row)
    with scopes_disabled():
        TrustedIssuer.objects.filter(pk=row.pk).delete()
    audit.record("trusted_issuer.deleted", actor=actor, target=row)


def _locked(row: TrustedIssuer) -> TrustedIssuer:
    """The row as it is now, held until the transaction ends; `NotFound` if it is gone."""
    with scopes_disabled():
        rows = TrustedIssuer.objects.select_related("organization", "project")
        found = rows.select_for_update(of=("self",)).filter(pk=row.pk).first()
    if found is None:
        said = f"No such trusted issuer: {row.pk!r}"
        raise NotFound(said, param="issuer_id", code="not_found")
    return found


def exchange(*, organization_id: str, text: str, scopes: Sequence[str], expires_in: int) -> Issued:
    """A token of ours for one of an issuer that the organization trusts.

    Whatever is wrong is answered alike: who has no good token learns nothing of the organization.
    """
    try:
        row = _trusted(organization_id, text)
    except Untrusted as error:
        logger.info("token not exchanged", organization=organization_id[:48], why=str(error)[:300])
        raise Unauthorized(
            "This token cannot be exchanged: its issuer, audience and subject must be trusted by"
            " the organization, and it must be valid and at most an hour old.",
            param="subject_token",
            code="untrusted_token",
        ) from None
    caller = queries.workload_caller(row)
    assert caller is not None
    if row.organization.suspended_at:
        raise Forbidden("This organization is suspended.", code="organization_suspended")
    return tokens.issue_token(
        actor=caller, scopes=scopes, expires_in=expires_in, subject=f"issuer:{row.pk}"
    )


def _trusted(organization_id: str, text: str) -> TrustedIssuer:
    """The oldest trust that the token satisfies; raises `Untrusted`."""
    said = federation.unverified(text)
    for row in _of_issuer(organization_id, said["iss"]):
        if federation.matches(row.subject_pattern, said["sub"]) and _is_for(row, said.get("aud")):
            federation.verified(
                text, issuer=row.issuer, audience=row.audience, jwks_url=row.jwks_url
            )
            return row
    raise Untrusted("no issuer, audience and subject pattern match")


def _of_issuer(organization_id: str, issuer: str) -> list[TrustedIssuer]:
    if "\0" in organization_id + issuer:  # PostgreSQL cannot store a NUL
        return []
    with scopes_disabled():
        rows = TrustedIssuer.objects.filter(
            organization_id=organization_id,
            issuer=issuer,
            organization__deleted_at=None,
            project__archived_at=None,
        )
        return list(rows.select_related("organization", "project").order_by("pk"))


def _is_for(row: TrustedIssuer, audience: object) -> bool:
    return row.audience == audience or (isinstance(audience, list) and row.audience in audience)


def _fill(
    row: TrustedIssuer,
    actor: Caller,
    project: Project,
    name: str,
    issuer: str,
    audience: str,
    subject_pattern: str,
    scopes: Sequence[str],
    jwks_url: str,
) -> None:
    if project.archived_at:
        raise BadRequest("This project is archived.", param="project_id", code="project_archived")
    if not scopes or Scope.OPERATOR in scopes:
        raise BadRequest("Name scopes, not 'operator'.", param="scopes", code="invalid_value")
    keys.require_scopes(actor, scopes)
    row.project = project
    row.name = names.clean(name)
    row.issuer = _url(issuer, "issuer")
    row.jwks_url = _url(jwks_url, "jwks_url") if jwks_url else ""
    row.audience = _text(audience, "audience")
    row.subject_pattern = _text(subject_pattern, "subject_pattern")
    row.scopes = list(dict.fromkeys(scopes))
    if any("*" in part.partition("/")[0] for part in row.subject_pattern.split(":")[:2]):
        # At GitHub, say, repo:*:… would be everybody's repositories, repo:acme*:… acme-evil's.
        said = "The first two parts of the pattern begin with a whole name: no * before a /."
        raise BadRequest(said, param="subject_pattern", code="invalid_value")


def _url(text: str, param: str) -> str:
    text = text.strip()
    try:
        federation.checked_url(text)
    except Unreachable as error:
        raise BadRequest(f"{param}: {error}.", param=param, code="invalid_value") from None
    return _text(text, param)


def _text(text: str, param: str) -> str:
    text = text.strip()
    if not text or len(text) > 500 or not text.isprintable():
        said = f"{param} must be 1 to 500 printable characters."
        raise BadRequest(said, param=param, code="invalid_value")
    return text
