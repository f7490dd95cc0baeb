"""How much an organization, a person or a key may use, and what of it is spoken for."""

from __future__ import annotations

from typing import ClassVar

from django.core.validators import MinValueValidator
from django.db import models
from django.db.models import Q
from django.utils import timezone
from django_scopes import ScopedManager

from accounts.ids import user_id
from accounts.models.keys import ApiKey
from accounts.models.people import Organization, Project, User


def _limit(help_text: str) -> models.BigIntegerField[int | None, int | None]:
    return models.BigIntegerField(
        null=True, blank=True, validators=[MinValueValidator(0)], help_text=help_text
    )


class Quota(models.Model):
    """The limits of one subject: an organization, a person in it, or one of its keys.

    An empty field sets no limit of its own (for rates: the installation's default holds for the
    organization). Where several subjects apply, the tightest wins.
    """

    organization = models.ForeignKey(Organization, models.CASCADE, related_name="quotas")
    user = models.ForeignKey(User, models.CASCADE, null=True, blank=True, related_name="quotas")
    api_key = models.ForeignKey(
        ApiKey, models.CASCADE, null=True, blank=True, related_name="quotas"
    )

    requests_per_minute = _limit("Calls of the API.")
    batches_per_minute = _limit("POST /v1/batches.")
    files_per_minute = _limit("POST /v1/files and /v1/uploads.")

    tokens_per_month = _limit("Tokens, in and out, each calendar month (UTC).")
    enqueued_tokens = _limit("Tokens of unfinished batches, for each model, by estimate.")
    concurrent_batches = _limit("Unfinished batches.")
    requests_per_batch = _limit("Requests in one batch.")
    storage_bytes = _limit("Bytes of files that are kept.")
    budget_per_month = models.DecimalField(
        max_digits=14,
        decimal_places=2,
        null=True,
        blank=True,
        validators=[MinValueValidator(0)],
        help_text="Money each calendar month (UTC), by the models' prices.",
    )

    objects: ClassVar[models.Manager[Quota]] = ScopedManager(organization="organization")

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["organization", "user", "api_key"],
                nulls_distinct=False,
                name="one_quota_a_subject",
            ),
            models.CheckConstraint(
                condition=Q(user__isnull=True) | Q(api_key__isnull=True),
                name="quota_of_one_subject",
            ),
        ]

    def __str__(self) -> str:
        return str(self.api_key or self.user or self.organization)

    @property
    def subject_id(self) -> str:
        """As the wire names whose it is: `key_…`, `user_…` or `org_…`."""
        of_person = user_id(self.user_id) if self.user_id else ""
        return self.api_key_id or of_person or self.organization_id


REAL_TIME = Q(batch_id__startswith="req_")
"""Reservations of real-time requests, not of batches."""


class Reservation(models.Model):
    """What an unfinished batch is expected to use; gone once what it used is a `UsageRecord`.

    Made with the batch (so the number of rows is the number of unfinished batches), filled in by
    its validation. Prices are those of that moment: later changes do not touch it. A real-time
    request has one too while it is under way, under its own id (`REAL_TIME`).
    """

    batch_id = models.CharField(primary_key=True, max_length=48)
    organization = models.ForeignKey(Organization, models.CASCADE, related_name="reservations")
    project = models.ForeignKey(Project, models.CASCADE, related_name="reservations")
    user = models.ForeignKey(User, models.RESTRICT, null=True, related_name="reservations")
    api_key = models.ForeignKey(ApiKey, models.RESTRICT, null=True, related_name="reservations")
    model = models.CharField(max_length=200, blank=True)
    tokens = models.BigIntegerField(default=0, help_text="Estimated, in and out.")
    cost = models.DecimalField(max_digits=30, decimal_places=10, default=0)
    input_price = models.DecimalField(max_digits=14, decimal_places=6, default=0)
    cached_price = models.DecimalField(max_digits=14, decimal_places=6, default=0)
    output_price = models.DecimalField(max_digits=14, decimal_places=6, default=0)
    created_at = models.DateTimeField(default=timezone.now)
    # What of it is in `HourlyUse`. Defaults of the database: the version before makes rows, too.
    noted_requests = models.BigIntegerField(default=0, db_default=0)
    noted_input_tokens = models.BigIntegerField(default=0, db_default=0)
    noted_output_tokens = models.BigIntegerField(default=0, db_default=0)

    objects: ClassVar[models.Manager[Reservation]] = ScopedManager(organization="organization")

    def __str__(self) -> str:
        return self.batch_id
