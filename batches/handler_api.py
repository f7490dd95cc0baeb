"""`/v1/result_handlers`, and `/v1/batches/{batch_id}/handler_runs`: what is done with results."""

from __future__ import annotations

from django.http import HttpRequest
from ninja import Router

from accounts import access
from accounts.access import Caller
from accounts.authentication import caller_of
from accounts.models import Project
from accounts.paging import ends
from batches.handler_schemas import (
    HandlerChange,
    HandlerDeleted,
    HandlerIn,
    HandlerList,
    HandlerOut,
    KindList,
    KindOut,
    RunList,
    RunOut,
)
from batches.handlers import registry
from batches.models import Batch, HandlerRun, ResultHandler
from batches.queries import handlers as queries
from batches.services import handler_runs, handlers

router = Router(tags=["Result handlers"])


@router.get("/result_handler_kinds", response=KindList, summary="List kinds of handlers")
def list_kinds(request: HttpRequest) -> KindList:
    caller_of(request, "webhooks.read")
    return KindList(data=[KindOut.of(name, kind) for name, kind in registry.kinds().items()])


@router.get("/result_handlers", response=HandlerList, summary="List result handlers")
def list_handlers(request: HttpRequest) -> HandlerList:
    caller = caller_of(request, "webhooks.read")
    with caller.scope():
        found = queries.result_handlers()
    return HandlerList(data=[HandlerOut.of(row) for row in found], **ends(found))


@router.post("/result_handlers", response=HandlerOut, summary="Create a result handler")
def create_handler(request: HttpRequest, given: HandlerIn) -> HandlerOut:
    caller = caller_of(request, "webhooks")
    fields = given.model_dump(exclude={"project_id"})
    project = _project(caller, given.project_id)
    return HandlerOut.of(handlers.create_handler(actor=caller, project=project, **fields))


def _project(caller: Caller, id: str | None) -> Project | None:
    if id == "all":
        return None
    return access.get(caller, Project, id, param="project_id") if id else caller.project


@router.get(
    "/result_handlers/{handler_id}", response=HandlerOut, summary="Retrieve a result handler"
)
def retrieve_handler(request: HttpRequest, handler_id: str) -> HandlerOut:
    return HandlerOut.of(_handler(caller_of(request, "webhooks.read"), handler_id))


@router.post(
    "/result_handlers/{handler_id}", response=HandlerOut, summary="Change a result handler"
)
def update_handler(request: HttpRequest, handler_id: str, given: HandlerChange) -> HandlerOut:
    caller = caller_of(request, "webhooks")
    row, fields = _handler(caller, handler_id), given.model_dump(exclude_none=True)
    return HandlerOut.of(handlers.update_handler(actor=caller, row=row, **fields))


@router.delete(
    "/result_handlers/{handler_id}", response=HandlerDeleted, summary="Delete a result handler"
)
def delete_handler(request: HttpRequest, handler_id: str) -> HandlerDeleted:
    caller = caller_of(request, "webhooks")
    handlers.delete_handler(actor=caller, row=_handler(caller, handler_id))
    return HandlerDeleted(id=handler_id)


@router.get(
    "/batches/{batch_id}/handler_runs", response=RunList, summary="List a batch's handler runs"
)
def list_runs(request: HttpRequest, batch_id: str) -> RunList:
    caller = caller_of(request, "webhooks.read")
    batch = access.get(caller, Batch, batch_id, param="batch_id")
    with caller.scope():
        found = queries.handler_runs(batch)
    return RunList(data=[RunOut.of(row) for row in found], **ends(found))


@router.post(
    "/batches/{batch_id}/handler_runs/{run_id}/retry", response=RunOut, summary="Run it again"
)
def retry_run(request: HttpRequest, batch_id: str, run_id: str) -> RunOut:
    caller = caller_of(request, "webhooks")
    batch = access.get(caller, Batch, batch_id, param="batch_id")
    run = access.get(caller, HandlerRun, run_id, param="run_id", batch=batch)
    return RunOut.of(handler_runs.retry_run(actor=caller, run=run))


def _handler(caller: Caller, id: str) -> ResultHandler:
    return access.get(caller, ResultHandler, id, param="handler_id", related=("project",))
