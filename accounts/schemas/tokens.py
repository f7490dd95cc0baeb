"""Access tokens on the wire: OAuth 2's names (RFC 6749, 8693, 7009)."""

from __future__ import annotations

from typing import Annotated, Literal

from ninja import Field, Schema
from pydantic import StrictStr

from accounts.services.tokens import LONGEST, SHORTEST, USUAL, Issued

EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
JWT = "urn:ietf:params:oauth:token-type:jwt"
ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"

Text = Annotated[StrictStr, Field(max_length=1000)]


class TokenIn(Schema):
    """All is optional for who brings a key or a session; an exchange needs the subject's token."""

    # An OAuth form has numbers as text, so these are read leniently.
    expires_in: Annotated[int, Field(ge=SHORTEST, le=LONGEST, description="Seconds.")] = USUAL
    scopes: Annotated[list[Text], Field(max_length=50)] = []
    scope: Text = Field("", description="The same as `scopes`, with spaces between them.")
    project_id: Text | None = Field(None, description="For people: of which project it is.")
    grant_type: Text | None = Field(None, description=f"For an exchange: {EXCHANGE}")
    subject_token: Annotated[StrictStr, Field(max_length=16_384)] | None = None
    subject_token_type: Text | None = Field(None, description=f"For an exchange: {JWT}")
    organization: Text | None = Field(None, description="For an exchange: org_…")

    @property
    def asked(self) -> list[str]:
        return [*self.scopes, *self.scope.split()]


class TokenOut(Schema):
    access_token: str
    issued_token_type: str = ACCESS_TOKEN
    token_type: Literal["Bearer"] = "Bearer"
    expires_in: int = Field(description="Seconds.")
    scope: str

    @classmethod
    def of(cls, issued: Issued) -> TokenOut:
        claims = issued.claims
        lifetime = claims.expires_at - claims.issued_at
        return cls(
            access_token=issued.text,
            expires_in=int(lifetime.total_seconds()),
            scope=" ".join(claims.scopes),
        )


class RevokeIn(Schema):
    token: Annotated[StrictStr, Field(max_length=16_384)] | None = Field(
        None, description="Without it: the token that the request itself brings."
    )
    token_type_hint: Text | None = None


class Revoked(Schema):
    revoked: Literal[True] = True
