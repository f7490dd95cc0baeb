"""The queue's own rows: what waits of each batch, and what each organization is due and has had."""

from __future__ import annotations

from typing import ClassVar

from django.core.validators import MinValueValidator
from django.db import models
from django.db.models import Q
from django.utils import timezone
from django_scopes import ScopedManager

from accounts.models import Organization
from batches.models.batches import Batch
from models_registry.models import Halt, Model


class Backlog(models.Model):
    """What of a batch is ready to be leased, added up.

    Triggers on its chunks keep it (migration `0007_backlog`), whoever changes them; code only reads.
    A row of its own, so that claims do not wait for saves, which lock the batch.
    """

    batch = models.OneToOneField(Batch, models.CASCADE, primary_key=True, related_name="backlog")
    chunks = models.IntegerField(default=0)
    requests = models.IntegerField(default=0)
    tokens = models.BigIntegerField(default=0, help_text="Estimated.")
    started_at = models.DateTimeField(null=True, help_text="When a chunk was first leased.")
    served_at = models.DateTimeField(null=True, help_text="When a chunk was last leased.")

    objects: ClassVar[models.Manager[Backlog]] = ScopedManager(organization="batch__organization")

    class Meta:
        constraints = [
            models.CheckConstraint(condition=Q(chunks__gte=0), name="backlog_not_below_0")
        ]

    def __str__(self) -> str:
        return f"{self.batch_id}: {self.chunks}"


class Share(models.Model):
    """Weight and limit are set by people; what was served is written with every lease.

    Without a row an organization weighs 1, has no limit, and has had nothing yet.
    """

    organization = models.OneToOneField(Organization, models.CASCADE, primary_key=True)
    weight = models.FloatField(
        default=1.0, validators=[MinValueValidator(0.01)], help_text="Against 1 of the others."
    )
    chunks_at_once = models.PositiveIntegerField(
        null=True, blank=True, help_text="How many GPU workers it may keep busy; empty: all."
    )
    served = models.FloatField(
        default=0.0, help_text="GPU seconds leased, fading (policy.HALF_LIFE), as of served_at."
    )
    served_at = models.DateTimeField(default=timezone.now)
    halt = models.CharField(max_length=8, choices=Halt, blank=True, default="", db_default="")

    objects: ClassVar[models.Manager[Share]] = ScopedManager(organization="organization")

    class Meta:
        constraints = [
            models.CheckConstraint(condition=Q(weight__gt=0), name="share_weight_positive")
        ]

    def __str__(self) -> str:
        return f"{self.organization_id}: {self.weight:g}"


class Moderation(models.Model):
    """Which batches an operator has to approve before they run: those that any of the rules is for.

    An organization's own row stands instead of the platform's (the one without an organization).
    """

    organization = models.ForeignKey(
        Organization, models.CASCADE, null=True, related_name="moderations"
    )
    everything = models.BooleanField(default=False)
    over_tokens = models.BigIntegerField(null=True, help_text="Estimated, in and out.")
    newer_than_days = models.PositiveIntegerField(null=True, help_text="Of the organization's age.")
    chosen_models = models.ManyToManyField(Model, blank=True, related_name="moderated")

    objects: ClassVar[models.Manager[Moderation]] = ScopedManager(organization="organization")

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["organization"], nulls_distinct=False, name="one_moderation_a_subject"
            )
        ]

    def __str__(self) -> str:
        return f"moderation of {self.organization or 'the platform'}"
