"""Trusted issuers on the wire."""

from __future__ import annotations

from typing import Annotated, Literal

from ninja import Field, Schema
from pydantic import StrictStr

from accounts.models import TrustedIssuer

Text = Annotated[StrictStr, Field(min_length=1, max_length=500)]
Scopes = Annotated[list[StrictStr], Field(min_length=1, max_length=50)]


class IssuerOut(Schema):
    object: Literal["organization.trusted_issuer"] = "organization.trusted_issuer"
    id: str
    name: str
    project_id: str
    issuer: str
    jwks_url: str
    audience: str
    subject_pattern: str
    scopes: list[str]
    created_at: int

    @classmethod
    def of(cls, row: TrustedIssuer) -> IssuerOut:
        return cls(
            id=row.pk,
            name=row.name,
            project_id=row.project_id,
            issuer=row.issuer,
            jwks_url=row.jwks_url,
            audience=row.audience,
            subject_pattern=row.subject_pattern,
            scopes=row.scopes,
            created_at=int(row.created_at.timestamp()),
        )


class IssuerList(Schema):
    object: Literal["list"] = "list"
    data: list[IssuerOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


class IssuerDeleted(Schema):
    object: Literal["organization.trusted_issuer.deleted"] = "organization.trusted_issuer.deleted"
    id: str
    deleted: Literal[True] = True


class IssuerIn(Schema):
    name: Annotated[StrictStr, Field(min_length=1, max_length=150)]
    project_id: StrictStr
    issuer: Text = Field(description="Exactly as in the token's `iss`.")
    jwks_url: Annotated[StrictStr, Field(max_length=500)] = Field(
        "", description="Empty: found by OpenID Connect discovery."
    )
    audience: Text
    subject_pattern: Text = Field(description="Of `sub`; * stands for anything but a colon.")
    scopes: Scopes


class IssuerChange(Schema):
    """What is left out stays."""

    name: Annotated[StrictStr, Field(min_length=1, max_length=150)] | None = None
    project_id: StrictStr | None = None
    issuer: Text | None = None
    jwks_url: Annotated[StrictStr, Field(max_length=500)] | None = None
    audience: Text | None = None
    subject_pattern: Text | None = None
    scopes: Scopes | None = None


class IssuerPage(Schema):
    limit: int = Field(20, ge=1, le=100)
    after: Annotated[str | None, Field(pattern=r"^(iss_[0-9a-f]{32})?$")] = None
