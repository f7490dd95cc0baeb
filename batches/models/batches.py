"""Batches, the chunks they are leased in, and the journal of their results.

Lock order everywhere: chunks first, by id, then the organization's share and their backlogs, then
their batch, then its organization's result handlers, then (for quotas) the organization, then the
chain of its audit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from django.contrib.postgres.fields import ArrayField
from django.contrib.postgres.indexes import GinIndex, OpClass
from django.db import models
from django.db.models import F, Q
from django.utils import timezone
from django_scopes import ScopedManager

from accounts.ids import new_id
from accounts.models import ApiKey, Organization, Project, User
from batches.models.files import File
from models_registry.models import Model

if TYPE_CHECKING:
    from batches.models.events import WebhookEndpoint


def batch_id() -> str:
    return new_id("batch_")


def usual_percents() -> list[int]:
    """Where a batch tells of its progress unless it is asked for something else."""
    return [25, 50, 75]


class Status(models.TextChoices):
    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress", "In progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


NEXT: Mapping[str, frozenset[str]] = {
    Status.VALIDATING: frozenset({Status.FAILED, Status.IN_PROGRESS, Status.CANCELLING}),
    Status.IN_PROGRESS: frozenset({Status.FINALIZING, Status.CANCELLING}),
    Status.FINALIZING: frozenset({Status.COMPLETED, Status.EXPIRED}),
    Status.CANCELLING: frozenset({Status.CANCELLED}),
}
"""Every allowed change of a batch's status; a status without an entry is an end."""

UNFINISHED = frozenset(NEXT)


class Priority(models.IntegerChoices):
    LOW = -1
    NORMAL = 0
    HIGH = 1


class HeldWhy(models.TextChoices):
    """Who keeps a batch from running. It is no status: on the wire there are none but OpenAI's."""

    MODERATION = "moderation", "held: waits for an operator's approval"
    OPERATOR = "operator", "held by an operator"


class Endpoint(models.TextChoices):
    CHAT_COMPLETIONS = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"
    RESPONSES = "/v1/responses"
    SCORE = "/v1/score"
    RERANK = "/v1/rerank"


class Batch(models.Model):
    """One input file on its way through one model."""

    id = models.CharField(primary_key=True, max_length=48, default=batch_id)
    organization = models.ForeignKey(Organization, models.CASCADE, related_name="batches")
    project = models.ForeignKey(Project, models.CASCADE, related_name="batches")
    api_key = models.ForeignKey(ApiKey, models.SET_NULL, null=True, related_name="batches")
    user = models.ForeignKey(User, models.SET_NULL, null=True, related_name="batches")

    endpoint = models.CharField(max_length=32, choices=Endpoint)
    completion_window = models.CharField(max_length=16)
    priority = models.SmallIntegerField(choices=Priority, default=Priority.NORMAL)
    metadata = models.JSONField(null=True)
    output_expires_after_seconds = models.IntegerField(null=True)
    progress_percents = ArrayField(
        models.PositiveSmallIntegerField(),
        default=usual_percents,
        db_default=models.Value([25, 50, 75], ArrayField(models.PositiveSmallIntegerField())),
        help_text="Reaching each of them is an event; in order.",
    )

    input_file = models.ForeignKey(File, models.PROTECT, related_name="input_of")
    output_file = models.ForeignKey(File, models.PROTECT, null=True, related_name="output_of")
    error_file = models.ForeignKey(File, models.PROTECT, null=True, related_name="errors_of")
    index_name = models.CharField(max_length=255, blank=True)
    results_name = models.CharField(
        max_length=255,
        blank=True,
        default="",
        db_default="",
        help_text="Where its answers lie (batches/places.py).",
    )
    model = models.ForeignKey(Model, models.PROTECT, null=True, related_name="batches")
    errors = models.JSONField(null=True, help_text="The bad lines, as the wire shows them.")
    error_kinds = models.JSONField(null=True, help_text="Failed requests by kind, once it ended.")

    status = models.CharField(max_length=16, choices=Status, default=Status.VALIDATING)
    created_at = models.DateTimeField(default=timezone.now)
    in_progress_at = models.DateTimeField(null=True)
    expires_at = models.DateTimeField()
    finalizing_at = models.DateTimeField(null=True)
    completed_at = models.DateTimeField(null=True)
    failed_at = models.DateTimeField(null=True)
    expired_at = models.DateTimeField(null=True)
    cancelling_at = models.DateTimeField(null=True)
    cancelled_at = models.DateTimeField(null=True)

    held_at = models.DateTimeField(null=True, help_text="Since when none of it may be leased.")
    held_why = models.CharField(
        max_length=16, choices=HeldWhy, blank=True, default="", db_default=""
    )
    held_note = models.CharField(
        max_length=500,
        blank=True,
        default="",
        db_default="",
        help_text="Shown to its organization.",
    )
    front_at = models.DateTimeField(null=True, help_text="When an operator moved it to the front.")

    total = models.IntegerField(default=0)
    completed = models.IntegerField(default=0)
    failed = models.IntegerField(default=0)
    input_tokens = models.BigIntegerField(default=0)
    cached_tokens = models.BigIntegerField(default=0)
    output_tokens = models.BigIntegerField(default=0)
    reasoning_tokens = models.BigIntegerField(default=0)
    gpu_seconds = models.FloatField(default=0, help_text="Its requests' shares of busy GPU time.")
    cost = models.DecimalField(
        max_digits=30, decimal_places=10, null=True, help_text="What it was settled at."
    )

    objects: ClassVar[models.Manager[Batch]] = ScopedManager(organization="organization")

    class Meta:
        verbose_name_plural = "batches"
        indexes = [
            models.Index(fields=["organization", "-id"], name="batch_by_organization"),
            models.Index(fields=["organization", "status", "-id"], name="batch_by_status"),
            GinIndex(OpClass("metadata", name="jsonb_path_ops"), name="batch_by_metadata"),
            models.Index(
                fields=["status", "expires_at"],
                name="batch_unfinished",
                condition=Q(status__in=sorted(UNFINISHED)),
            ),
            models.Index(
                fields=["organization", "id"],
                name="batch_unfinished_of_one",
                condition=Q(status__in=sorted(UNFINISHED)),
            ),
        ]
        constraints = [
            models.CheckConstraint(
                condition=Q(held_at__isnull=True) ^ ~Q(held_why=""), name="batch_held_with_reason"
            )
        ]

    def __str__(self) -> str:
        return self.id

    def move_to(self, status: str) -> None:
        """Change the status and its timestamp; the row must be locked, saving is the caller's.

        Raises `ValueError` for a change that `NEXT` does not list.
        """
        if status not in NEXT.get(self.status, frozenset()):
            raise ValueError(f"{self.id} cannot go from {self.status} to {status}")
        self.status = status
        setattr(self, f"{status}_at", timezone.now())

    @property
    def own_webhook(self) -> WebhookEndpoint | None:
        """The one that is told of this batch alone."""
        return getattr(self, "webhook", None)

    @property
    def is_finished(self) -> bool:
        return self.status not in UNFINISHED

    @property
    def is_held(self) -> bool:
        """Whether it is kept from running; its deadline runs all the same."""
        return self.held_at is not None and self.status in (Status.VALIDATING, Status.IN_PROGRESS)

    @property
    def held_reason(self) -> str:
        """In words, for its organization."""
        said = HeldWhy(self.held_why).label if self.held_why else ""
        return f"{said}: {self.held_note}" if self.held_note else said

    @property
    def answered(self) -> int:
        return self.completed + self.failed

    @property
    def percent(self) -> int:
        return 100 * self.answered // self.total if self.total else 0


class ChunkState(models.TextChoices):
    READY = "ready"
    LEASED = "leased"
    DONE = "done"


class Chunk(models.Model):
    """Lines `start` to `end` (exclusive) of a batch's execution order: the quantum of leasing.

    `fencing_token` grows whenever the lease changes hands; a save must show the current one.
    `attempts` counts leases in a row that ended by their owner's death without a saved result.
    `worker` is who leased it last, and stays when the lease ends.
    """

    batch = models.ForeignKey(Batch, models.CASCADE, related_name="chunks")
    start = models.IntegerField()
    end = models.IntegerField()
    tokens = models.BigIntegerField(help_text="Estimated.")
    state = models.CharField(max_length=8, choices=ChunkState, default=ChunkState.READY)
    lease_owner = models.CharField(max_length=100, blank=True)
    lease_expires_at = models.DateTimeField(null=True)
    fencing_token = models.IntegerField(default=0)
    attempts = models.IntegerField(default=0)
    worker = models.CharField(max_length=100, blank=True, db_default="")
    leases = models.IntegerField(default=0, db_default=0, help_text="How often it was leased.")
    leased_at = models.DateTimeField(null=True, help_text="When it was leased last.")
    done_at = models.DateTimeField(null=True)

    objects: ClassVar[models.Manager[Chunk]] = ScopedManager(organization="batch__organization")

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["batch", "start"], name="chunk_start_in_batch"),
            models.CheckConstraint(condition=Q(start__lt=F("end")), name="chunk_not_empty"),
            models.CheckConstraint(
                condition=Q(state="leased") ^ Q(lease_expires_at__isnull=True),
                name="chunk_leased_with_expiry",
            ),
        ]
        indexes = [
            models.Index(fields=["batch", "start"], name="chunk_ready", condition=Q(state="ready")),
            models.Index(
                fields=["lease_expires_at"], name="chunk_leased", condition=Q(state="leased")
            ),
        ]

    def __str__(self) -> str:
        return f"{self.batch_id}[{self.start}:{self.end}]"


class Result(models.Model):
    """The journal: one finished output line; (batch, line) is unique, so the first one wins."""

    pk = models.CompositePrimaryKey("batch_id", "line")
    batch = models.ForeignKey(Batch, models.CASCADE, related_name="results")
    line = models.IntegerField(help_text="Line number in the input file, from 1.")
    ok = models.BooleanField()
    payload = models.BinaryField(help_text="The whole line of the output or error file.")

    objects: ClassVar[models.Manager[Result]] = ScopedManager(organization="batch__organization")

    class Meta:
        indexes = [
            models.Index(fields=["batch", "line"], name="result_failed", condition=Q(ok=False))
        ]

    def __str__(self) -> str:
        return f"{self.batch_id}:{self.line}"


class Suspect(models.Model):
    """A request that was in flight when an engine died, or was tried alone, and how often."""

    batch = models.ForeignKey(Batch, models.CASCADE, related_name="suspects")
    line = models.IntegerField()
    deaths = models.IntegerField(default=1)

    objects: ClassVar[models.Manager[Suspect]] = ScopedManager(organization="batch__organization")

    class Meta:
        constraints = [models.UniqueConstraint(fields=["batch", "line"], name="one_suspect_a_line")]

    def __str__(self) -> str:
        return f"{self.batch_id}:{self.line} ({self.deaths})"


class IdempotencyKey(models.Model):
    """The answer that a POST with this Idempotency-Key had; kept for 24 hours."""

    organization = models.ForeignKey(Organization, models.CASCADE)
    key = models.CharField(max_length=255)
    fingerprint = models.CharField(max_length=64, help_text="Of the path and the body.")
    answer = models.JSONField(null=True)
    created_at = models.DateTimeField(default=timezone.now, db_index=True)

    objects: ClassVar[models.Manager[IdempotencyKey]] = ScopedManager(organization="organization")

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["organization", "key"], name="idempotency_key_in_organization"
            )
        ]

    def __str__(self) -> str:
        return self.key
