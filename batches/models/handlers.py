"""Result handlers: what a project does with the results of its batches, and how each run went."""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar

from django.db import models
from django.db.models import Q
from django.utils import timezone
from django_scopes import ScopedManager

from accounts.ids import new_id
from accounts.models import Organization, Project
from batches.models.batches import Batch


def handler_id() -> str:
    return new_id("rh_")


def run_id() -> str:
    return new_id("hrun_")


class ResultHandler(models.Model):
    """One use of a kind of handler (`batches/handlers/`) by a project, or by all of them."""

    id = models.CharField(primary_key=True, max_length=48, default=handler_id)
    organization = models.ForeignKey(Organization, models.CASCADE, related_name="result_handlers")
    project = models.ForeignKey(Project, models.CASCADE, null=True, related_name="result_handlers")
    name = models.CharField(max_length=64)
    kind = models.CharField(max_length=64)
    settings = models.JSONField(default=dict, help_text="Without the secrets.")
    encrypted_secrets = models.TextField(blank=True, help_text="As a JSON object.")
    position = models.PositiveIntegerField(help_text="Those with a lower one run first.")
    enabled = models.BooleanField(default=True)
    by_default = models.BooleanField(
        default=True, help_text="For every batch; otherwise for those that name it."
    )
    created_at = models.DateTimeField(default=timezone.now)
    updated_at = models.DateTimeField(default=timezone.now)

    objects: ClassVar[models.Manager[ResultHandler]] = ScopedManager(organization="organization")

    class Meta:
        verbose_name = "result handler"
        constraints = [
            models.UniqueConstraint(fields=["organization", "name"], name="handler_name"),
        ]

    def __str__(self) -> str:
        return self.name


class RunState(models.TextChoices):
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class HandlerRun(models.Model):
    """One batch's results on their way through one handler.

    Who runs it holds it until `busy_until`, and says again and again that it still does; what is
    past that was left by a process that died, and is run again.
    """

    id = models.CharField(primary_key=True, max_length=48, default=run_id)
    organization = models.ForeignKey(Organization, models.CASCADE, related_name="handler_runs")
    batch = models.ForeignKey(Batch, models.CASCADE, related_name="handler_runs")
    handler = models.ForeignKey(ResultHandler, models.CASCADE, related_name="runs")
    position = models.PositiveIntegerField(help_text="The handler's when the batch ended.")
    state = models.CharField(max_length=8, choices=RunState, default=RunState.WAITING)
    attempts = models.PositiveSmallIntegerField(
        default=0, help_text="Begun since it was made or last retried."
    )
    next_attempt_at = models.DateTimeField(null=True, default=timezone.now)
    busy_until = models.DateTimeField(null=True)
    rows = models.PositiveIntegerField(default=0, help_text="Handled by the last attempt.")
    result = models.CharField(max_length=500, blank=True, help_text="What it says it made.")
    error = models.CharField(max_length=1000, blank=True, help_text="Of the last attempt.")
    created_at = models.DateTimeField(default=timezone.now)
    started_at = models.DateTimeField(null=True)
    ended_at = models.DateTimeField(null=True)

    objects: ClassVar[models.Manager[HandlerRun]] = ScopedManager(organization="organization")

    class Meta:
        verbose_name = "handler run"
        constraints = [
            models.UniqueConstraint(fields=["batch", "handler"], name="one_run_a_handler"),
            models.CheckConstraint(
                condition=Q(state="waiting") ^ Q(next_attempt_at__isnull=True),
                name="handler_run_due_while_waiting",
            ),
            models.CheckConstraint(
                condition=Q(state="running") ^ Q(busy_until__isnull=True),
                name="handler_run_held_while_running",
            ),
        ]
        indexes = [
            models.Index(
                fields=["next_attempt_at"],
                name="handler_run_due",
                condition=Q(state="waiting"),
            ),
            models.Index(
                fields=["organization", "busy_until"],
                name="handler_run_held",
                condition=Q(state="running"),
            ),
        ]

    def __str__(self) -> str:
        return self.pk

    def is_due(self, now: datetime) -> bool:
        """Whether an attempt may begin: it is time for one, or the last one's process is dead."""
        waited = self.next_attempt_at is not None and self.next_attempt_at <= now
        left = self.busy_until is not None and self.busy_until < now
        return waited or left

    @property
    def is_first_attempt(self) -> bool:
        """Whether those after it still wait for this one."""
        return self.state == RunState.RUNNING and self.attempts == 1

    @property
    def is_over(self) -> bool:
        return self.state in (RunState.DONE, RunState.FAILED)

    @property
    def can_retry(self) -> bool:
        """Whether retrying changes anything: it is over, or waits for its next attempt."""
        return self.is_over or (self.state == RunState.WAITING and self.attempts > 0)
