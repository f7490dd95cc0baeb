"""What was used, rolled up by day: the basis of monthly quotas, of budgets and of charts."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django_scopes import ScopedManager

from accounts.models.keys import ApiKey
from accounts.models.people import Organization, Project, User


class UsageRecord(models.Model):
    """One day (UTC) of one project, person, key and model; settled when a batch ends."""

    day = models.DateField()
    organization = models.ForeignKey(Organization, models.CASCADE, related_name="usage")
    project = models.ForeignKey(Project, models.CASCADE, related_name="usage")
    user = models.ForeignKey(User, models.RESTRICT, null=True, related_name="usage")
    api_key = models.ForeignKey(ApiKey, models.RESTRICT, null=True, related_name="usage")
    model = models.CharField(max_length=200)
    endpoint = models.CharField(max_length=32, blank=True)

    batches = models.BigIntegerField(default=0)
    requests = models.BigIntegerField(default=0)
    input_tokens = models.BigIntegerField(default=0)
    cached_tokens = models.BigIntegerField(default=0)
    output_tokens = models.BigIntegerField(default=0)
    reasoning_tokens = models.BigIntegerField(default=0)
    gpu_seconds = models.FloatField(default=0)
    cost = models.DecimalField(max_digits=30, decimal_places=10, default=0)

    objects: ClassVar[models.Manager[UsageRecord]] = ScopedManager(organization="organization")

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["organization", "day", "project", "user", "api_key", "model", "endpoint"],
                nulls_distinct=False,
                name="one_usage_record_a_day",
            )
        ]

    def __str__(self) -> str:
        return f"{self.day} {self.model}"


class HourlyUse(models.Model):
    """One hour of an organization, by when its answers came; only for charts, and soon forgotten.

    A `UsageRecord` has a batch on the day it ends. Here the sweep adds what came since it last
    looked, and settling adds the rest, so that both agree in the end.
    """

    organization = models.ForeignKey(Organization, models.CASCADE, related_name="hours")
    hour = models.DateTimeField(help_text="Its beginning.")
    requests = models.BigIntegerField(default=0)
    input_tokens = models.BigIntegerField(default=0)
    output_tokens = models.BigIntegerField(default=0)

    objects: ClassVar[models.Manager[HourlyUse]] = ScopedManager(organization="organization")

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["organization", "hour"], name="one_hour_of_an_organization"
            )
        ]
        indexes = [models.Index(fields=["hour"], name="hourly_use_by_hour")]

    def __str__(self) -> str:
        return f"{self.hour} {self.organization_id}"
