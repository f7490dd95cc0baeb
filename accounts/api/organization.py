"""`/v1/organization`: the organization that the key belongs to."""

from __future__ import annotations

from django.http import HttpRequest
from ninja import Router

from accounts.authentication import caller_of
from accounts.schemas.organization import NameIn, OrganizationOut
from accounts.services import organizations

router = Router(tags=["Organization"])


@router.get("", response=OrganizationOut, summary="Retrieve the organization")
def retrieve_organization(request: HttpRequest) -> OrganizationOut:
    return OrganizationOut.of(caller_of(request, "projects.read").organization)


@router.post("", response=OrganizationOut, summary="Rename the organization")
def rename_organization(request: HttpRequest, given: NameIn) -> OrganizationOut:
    caller = caller_of(request, "organization")
    return OrganizationOut.of(organizations.rename_organization(actor=caller, name=given.name))
