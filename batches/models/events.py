"""What happened to a tenant's rows, who is told of it by webhook, and how the telling went."""

from __future__ import annotations

from typing import ClassVar

from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models import F, Q
from django.utils import timezone
from django_scopes import ScopedManager

from accounts.ids import new_id
from accounts.models import Organization, Project, Quota
from batches.models.batches import Batch


def event_id() -> str:
    return new_id("evt_")


def endpoint_id() -> str:
    return new_id("we_")


def delivery_id() -> str:
    return new_id("whd_")


class EventType(models.TextChoices):
    """The first four are OpenAI's, the others ours; those of a batch may go to its own webhook."""

    BATCH_COMPLETED = "batch.completed"
    BATCH_FAILED = "batch.failed"
    BATCH_EXPIRED = "batch.expired"
    BATCH_CANCELLED = "batch.cancelled"
    BATCH_IN_PROGRESS = "batch.in_progress"
    BATCH_PROGRESS = "batch.progress"
    FILE_EXPIRED = "file.expired"
    MODEL_READY = "model.ready"
    MODEL_FAILED = "model.failed"
    QUOTA_THRESHOLD = "quota.threshold"
    WEBHOOK_DISABLED = "webhook.disabled"


class Event(models.Model):
    """Something that happened; written in the transaction in which it did, and never changed."""

    id = models.CharField(primary_key=True, max_length=48, default=event_id)
    organization = models.ForeignKey(Organization, models.CASCADE, related_name="events")
    project = models.ForeignKey(Project, models.CASCADE, null=True, related_name="events")
    type = models.CharField(max_length=32, choices=EventType)
    created_at = models.DateTimeField(default=timezone.now)
    body = models.TextField(help_text="The exact JSON that every delivery of it carries.")

    objects: ClassVar[models.Manager[Event]] = ScopedManager(organization="organization")

    class Meta:
        indexes = [models.Index(fields=["organization", "-id"], name="event_by_organization")]

    def __str__(self) -> str:
        return f"{self.type} {self.pk}"


class WebhookEndpoint(models.Model):
    """An address that is told of a project's events, of all projects', or of one batch's.

    Only one process sends to an endpoint at a time, so that a slow receiver holds up nobody else:
    it holds the endpoint until `busy_until`.
    """

    id = models.CharField(primary_key=True, max_length=48, default=endpoint_id)
    organization = models.ForeignKey(Organization, models.CASCADE, related_name="webhooks")
    project = models.ForeignKey(Project, models.CASCADE, null=True, related_name="webhooks")
    batch = models.OneToOneField(Batch, models.CASCADE, null=True, related_name="webhook")
    name = models.CharField(max_length=150)
    url = models.CharField(max_length=2000)
    event_types = models.JSONField(help_text="Those that it is told of.")
    encrypted_headers = models.TextField(blank=True, help_text="Sent along, as a JSON object.")
    encrypted_secret = models.TextField()
    secret_hint = models.CharField(max_length=20)
    encrypted_old_secret = models.TextField(blank=True)
    old_secret_until = models.DateTimeField(null=True, help_text="Until then both sign.")
    timeout = models.PositiveSmallIntegerField(
        default=15, validators=[MinValueValidator(5), MaxValueValidator(30)], help_text="Seconds."
    )
    per_minute = models.PositiveIntegerField(null=True, help_text="Deliveries; empty: no limit.")
    disabled_at = models.DateTimeField(null=True)
    disabled_why = models.CharField(max_length=200, blank=True)
    failing_since = models.DateTimeField(null=True)
    failures = models.PositiveIntegerField(default=0, help_text="In a row.")
    resume_at = models.DateTimeField(default=timezone.now, help_text="Nothing is sent before.")
    busy_until = models.DateTimeField(null=True)
    created_at = models.DateTimeField(default=timezone.now)
    updated_at = models.DateTimeField(default=timezone.now)

    objects: ClassVar[models.Manager[WebhookEndpoint]] = ScopedManager(organization="organization")

    class Meta:
        verbose_name = "webhook endpoint"
        indexes = [
            models.Index(fields=["organization", "-id"], name="webhook_by_organization"),
            # Every batch may have one of its own: those that are told of more are few among them.
            models.Index(
                fields=["organization", "-id"], name="webhook_of_no_batch", condition=Q(batch=None)
            ),
        ]
        constraints = [
            models.CheckConstraint(
                condition=Q(timeout__gte=5, timeout__lte=30), name="webhook_timeout_5_to_30"
            ),
            models.CheckConstraint(
                condition=Q(per_minute=None) | Q(per_minute__gt=0), name="webhook_rate_positive"
            ),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def enabled(self) -> bool:
        return self.disabled_at is None


class QuotaNotice(models.Model):
    """That a quota's threshold was told of this month; it is told of once."""

    quota = models.ForeignKey(Quota, models.CASCADE, related_name="notices")
    limit = models.CharField(max_length=32, help_text="The quota's field.")
    percent = models.PositiveSmallIntegerField()
    month = models.DateField(help_text="Its first day.")

    objects: ClassVar[models.Manager[QuotaNotice]] = ScopedManager(
        organization="quota__organization"
    )

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["quota", "limit", "percent", "month"], name="one_quota_notice_a_month"
            )
        ]

    def __str__(self) -> str:
        return f"{self.quota} {self.limit} {self.percent} % in {self.month:%Y-%m}"


class DeliveryState(models.TextChoices):
    RETRYING = "retrying"
    DELIVERED = "delivered"
    DEAD = "dead"


class WebhookDelivery(models.Model):
    """One event on its way to one endpoint: due at `next_attempt_at` until it arrives or is dead."""

    id = models.CharField(primary_key=True, max_length=48, default=delivery_id)
    organization = models.ForeignKey(Organization, models.CASCADE, related_name="deliveries")
    event = models.ForeignKey(Event, models.CASCADE, related_name="deliveries")
    endpoint = models.ForeignKey(WebhookEndpoint, models.CASCADE, related_name="deliveries")
    state = models.CharField(max_length=10, choices=DeliveryState, default=DeliveryState.RETRYING)
    tries = models.PositiveSmallIntegerField(
        default=0, help_text="Since it was made or last replayed; its place in the schedule."
    )
    next_attempt_at = models.DateTimeField(null=True, default=timezone.now)
    ended_at = models.DateTimeField(null=True)
    error = models.CharField(max_length=500, blank=True, help_text="Of the last attempt.")

    objects: ClassVar[models.Manager[WebhookDelivery]] = ScopedManager(organization="organization")

    class Meta:
        verbose_name_plural = "webhook deliveries"
        constraints = [
            models.UniqueConstraint(fields=["event", "endpoint"], name="one_delivery_an_endpoint"),
            models.CheckConstraint(
                condition=Q(state="retrying") ^ Q(next_attempt_at__isnull=True),
                name="delivery_due_while_retrying",
            ),
        ]
        indexes = [
            models.Index(
                fields=["endpoint", "next_attempt_at", "id"],
                name="delivery_due",
                condition=Q(state="retrying"),
            ),
            models.Index(
                F("organization"), F("id").desc(), name="delivery_dead", condition=Q(state="dead")
            ),
            models.Index(fields=["-id"], name="delivery_dead_of_all", condition=Q(state="dead")),
            models.Index(fields=["endpoint", "-id"], name="delivery_by_endpoint"),
        ]

    def __str__(self) -> str:
        return self.pk


class WebhookAttempt(models.Model):
    """One try of one delivery, and what came of it."""

    delivery = models.ForeignKey(WebhookDelivery, models.CASCADE, related_name="attempts")
    at = models.DateTimeField(default=timezone.now)
    milliseconds = models.PositiveIntegerField()
    status = models.PositiveSmallIntegerField(null=True, help_text="HTTP; empty: no answer.")
    answer = models.TextField(blank=True, help_text="The first 4 KB of the body.")
    error = models.CharField(max_length=500, blank=True)

    objects: ClassVar[models.Manager[WebhookAttempt]] = ScopedManager(
        organization="delivery__organization"
    )

    class Meta:
        indexes = [models.Index(fields=["delivery", "id"], name="attempt_by_delivery")]

    def __str__(self) -> str:
        return f"{self.delivery_id} {self.status or self.error}"
