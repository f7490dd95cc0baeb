"""`/v1/organization/trusted_issuers`: whose tokens are exchanged for ours, and for what."""

from __future__ import annotations

from django.http import HttpRequest
from ninja import Query, Router

from accounts import access
from accounts.access import Caller
from accounts.authentication import caller_of
from accounts.models import Project, TrustedIssuer
from accounts.paging import ends, page_of
from accounts.schemas.issuers import (
    IssuerChange,
    IssuerDeleted,
    IssuerIn,
    IssuerList,
    IssuerOut,
    IssuerPage,
)
from accounts.services import issuers

router = Router(tags=["Trusted issuers"])
_FIELDS = ("name", "issuer", "jwks_url", "audience", "subject_pattern", "scopes")


@router.get("/trusted_issuers", response=IssuerList, summary="List trusted issuers")
def list_trusted_issuers(request: HttpRequest, page: Query[IssuerPage]) -> IssuerList:
    caller = caller_of(request, "keys.read")
    with caller.scope():
        rows = TrustedIssuer.objects.all()
        found, more = page_of(rows, page.after, page.limit, descending=True)
    return IssuerList(data=[IssuerOut.of(row) for row in found], has_more=more, **ends(found))


@router.post("/trusted_issuers", response=IssuerOut, summary="Trust an issuer")
def create_trusted_issuer(request: HttpRequest, given: IssuerIn) -> IssuerOut:
    caller = caller_of(request, "keys.all")
    fields = given.model_dump()
    project = _project(caller, fields.pop("project_id"))
    return IssuerOut.of(issuers.create_trusted_issuer(actor=caller, project=project, **fields))


@router.get("/trusted_issuers/{issuer_id}", response=IssuerOut, summary="Retrieve an issuer")
def retrieve_trusted_issuer(request: HttpRequest, issuer_id: str) -> IssuerOut:
    return IssuerOut.of(_issuer(caller_of(request, "keys.read"), issuer_id))


@router.post("/trusted_issuers/{issuer_id}", response=IssuerOut, summary="Change an issuer")
def update_trusted_issuer(request: HttpRequest, issuer_id: str, given: IssuerChange) -> IssuerOut:
    caller = caller_of(request, "keys.all")
    row = _issuer(caller, issuer_id)
    project = _project(caller, given.project_id) if given.project_id else row.project
    fields = {name: getattr(row, name) for name in _FIELDS}
    fields |= given.model_dump(include=set(_FIELDS), exclude_none=True)
    changed = issuers.update_trusted_issuer(actor=caller, row=row, project=project, **fields)
    return IssuerOut.of(changed)


@router.delete(
    "/trusted_issuers/{issuer_id}", response=IssuerDeleted, summary="Stop trusting an issuer"
)
def delete_trusted_issuer(request: HttpRequest, issuer_id: str) -> IssuerDeleted:
    caller = caller_of(request, "keys.all")
    issuers.delete_trusted_issuer(actor=caller, row=_issuer(caller, issuer_id))
    return IssuerDeleted(id=issuer_id)


def _project(caller: Caller, project_id: str) -> Project:
    return access.get(caller, Project, project_id, param="project_id")


def _issuer(caller: Caller, issuer_id: str) -> TrustedIssuer:
    related = ("project",)
    return access.get(caller, TrustedIssuer, issuer_id, param="issuer_id", related=related)
