"""Result handlers, their kinds and their runs on the wire."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ninja import Field, Schema
from pydantic import StrictBool, StrictInt, StrictStr

from batches.handlers.base import Handler
from batches.models import HandlerRun, ResultHandler
from batches.models.handlers import RunState
from batches.schemas import epoch
from batches.services import handlers

Name = Annotated[StrictStr, Field(min_length=1, max_length=64)]
Given = Annotated[dict[StrictStr, Any], Field(max_length=100)]


class KindOut(Schema):
    name: str
    object: Literal["result_handler_kind"] = "result_handler_kind"
    title: str
    summary: str
    settings_schema: dict[str, Any] = Field(description="A JSON schema of `settings`.")

    @classmethod
    def of(cls, name: str, kind: type[Handler[Any]]) -> KindOut:
        schema = kind.settings_schema.model_json_schema()
        return cls(name=name, title=kind.title, summary=kind.summary, settings_schema=schema)


class KindList(Schema):
    object: Literal["list"] = "list"
    data: list[KindOut]


class HandlerOut(Schema):
    id: str
    object: Literal["result_handler"] = "result_handler"
    created_at: int
    updated_at: int | None
    name: str
    kind: str
    settings: dict[str, Any] = Field(description="Without its secrets.")
    secrets: list[str] = Field(description="The names of the secrets that it has.")
    project_id: str | None = Field(description="Null: of all projects' batches.")
    position: int = Field(description="Its place in the order, from 1.")
    enabled: bool
    by_default: bool

    @classmethod
    def of(cls, row: ResultHandler) -> HandlerOut:
        return cls(
            id=row.pk,
            created_at=int(row.created_at.timestamp()),
            updated_at=epoch(row.updated_at),
            name=row.name,
            kind=row.kind,
            settings=row.settings,
            secrets=handlers.secrets_set(row),
            project_id=row.project_id,
            position=row.position,
            enabled=row.enabled,
            by_default=row.by_default,
        )


class HandlerList(Schema):
    """All of them: an organization has at most 50."""

    object: Literal["list"] = "list"
    data: list[HandlerOut]
    first_id: str | None
    last_id: str | None
    has_more: Literal[False] = False


class HandlerDeleted(Schema):
    id: str
    object: Literal["result_handler.deleted"] = "result_handler.deleted"
    deleted: Literal[True] = True


class HandlerIn(Schema):
    name: Name
    kind: Name
    settings: Given = Field(default_factory=dict)
    project_id: StrictStr | None = Field(
        None, description="Left out: the key's project; `all`: every project of the organization."
    )
    enabled: StrictBool = True
    by_default: StrictBool = Field(
        True, description="For every batch; otherwise for those whose metadata name it."
    )


class HandlerChange(Schema):
    """What is left out stays."""

    name: Name | None = None
    settings: Given | None = Field(
        None, description="All of them, but for secrets, which stay when they are left out."
    )
    position: Annotated[StrictInt, Field(ge=1, le=1000)] | None = None
    enabled: StrictBool | None = None
    by_default: StrictBool | None = None


class RunOut(Schema):
    id: str
    object: Literal["handler_run"] = "handler_run"
    created_at: int
    batch_id: str
    handler_id: str
    handler_name: str
    kind: str
    state: RunState
    attempts: int
    next_attempt_at: int | None
    started_at: int | None
    ended_at: int | None
    rows: int = Field(description="Results that the last attempt has handled.")
    result: str | None = Field(description="What it says it made.")
    error: str | None = Field(description="Of the last attempt.")

    @classmethod
    def of(cls, row: HandlerRun) -> RunOut:
        return cls(
            id=row.pk,
            created_at=int(row.created_at.timestamp()),
            batch_id=row.batch_id,
            handler_id=row.handler_id,
            handler_name=row.handler.name,
            kind=row.handler.kind,
            state=RunState(row.state),
            attempts=row.attempts,
            next_attempt_at=epoch(row.next_attempt_at),
            started_at=epoch(row.started_at),
            ended_at=epoch(row.ended_at),
            rows=row.rows,
            result=row.result or None,
            error=row.error or None,
        )


class RunList(Schema):
    """All of them, in order: one for each handler that has the batch's results."""

    object: Literal["list"] = "list"
    data: list[RunOut]
    first_id: str | None
    last_id: str | None
    has_more: Literal[False] = False
