"""`/v1/organization/projects/{project_id}/api_keys`: parse, ask a service, answer."""

from __future__ import annotations

from datetime import timedelta

from django.http import HttpRequest, HttpResponse
from django.utils.cache import add_never_cache_headers
from ninja import Query, Router

from accounts import access
from accounts.access import Caller
from accounts.authentication import caller_of
from accounts.models import ApiKey, Project
from accounts.paging import ends, page_of
from accounts.schemas.keys import (
    KeyChange,
    KeyDeleted,
    KeyIn,
    KeyList,
    KeyOut,
    KeyPage,
    KeyWithValue,
    RotateIn,
    moment,
)
from accounts.services import keys

router = Router(tags=["API keys"])
KEYS = "/projects/{project_id}/api_keys"


@router.get(KEYS, response=KeyList, summary="List a project's API keys")
def list_api_keys(request: HttpRequest, project_id: str, page: Query[KeyPage]) -> KeyList:
    caller = caller_of(request, "keys.read")
    project = _project(caller, project_id)
    with caller.scope():
        rows = ApiKey.objects.filter(project=project, revoked_at=None).select_related("created_by")
        found, more = page_of(rows, page.after, page.limit, descending=True)
    return KeyList(data=[KeyOut.of(key) for key in found], has_more=more, **ends(found))


@router.post(KEYS, response=KeyWithValue, summary="Create an API key")
def create_api_key(
    request: HttpRequest, response: HttpResponse, project_id: str, given: KeyIn
) -> KeyWithValue:
    caller = caller_of(request, "keys")
    add_never_cache_headers(response)
    key, text = keys.create_api_key(
        actor=caller,
        project=_project(caller, project_id),
        created_by=None if given.service_account else caller.user,
        name=given.name,
        scopes=given.scopes,
        allowed_ips=given.allowed_ips,
        expires_at=moment(given.expires_at),
    )
    return KeyWithValue.made(key, text)


@router.get(KEYS + "/{key_id}", response=KeyOut, summary="Retrieve an API key")
def retrieve_api_key(request: HttpRequest, project_id: str, key_id: str) -> KeyOut:
    return KeyOut.of(_key(caller_of(request, "keys.read"), project_id, key_id))


@router.post(KEYS + "/{key_id}", response=KeyOut, summary="Change an API key")
def update_api_key(request: HttpRequest, project_id: str, key_id: str, given: KeyChange) -> KeyOut:
    caller = caller_of(request, "keys")
    key = _key(caller, project_id, key_id)
    expires = "expires_at" in given.model_fields_set
    changed = keys.update_api_key(
        actor=caller,
        key=key,
        name=key.name if given.name is None else given.name,
        allowed_ips=key.allowed_ips if given.allowed_ips is None else given.allowed_ips,
        expires_at=moment(given.expires_at) if expires else key.expires_at,
    )
    return KeyOut.of(changed)


@router.post(KEYS + "/{key_id}/rotate", response=KeyWithValue, summary="Replace an API key")
def rotate_api_key(
    request: HttpRequest, response: HttpResponse, project_id: str, key_id: str, given: RotateIn
) -> KeyWithValue:
    caller = caller_of(request, "keys")
    add_never_cache_headers(response)
    key = _key(caller, project_id, key_id)
    overlap = timedelta(seconds=given.overlap_seconds)
    return KeyWithValue.made(*keys.rotate_api_key(actor=caller, key=key, overlap=overlap))


@router.delete(KEYS + "/{key_id}", response=KeyDeleted, summary="Revoke an API key")
def delete_api_key(request: HttpRequest, project_id: str, key_id: str) -> KeyDeleted:
    caller = caller_of(request, "keys")
    keys.revoke_api_key(actor=caller, key=_key(caller, project_id, key_id))
    return KeyDeleted(id=key_id)


def _project(caller: Caller, project_id: str) -> Project:
    return access.get(caller, Project, project_id, param="project_id", related=("organization",))


def _key(caller: Caller, project_id: str, key_id: str) -> ApiKey:
    project = _project(caller, project_id)
    related = ("created_by", "project", "organization")
    lookup = {"project": project, "revoked_at": None}
    return access.get(caller, ApiKey, key_id, param="key_id", related=related, **lookup)
