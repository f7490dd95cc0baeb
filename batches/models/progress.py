"""How far a batch was, and when: what the charts of its page are drawn from."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django_scopes import ScopedManager

from batches.models.batches import Batch


class Sample(models.Model):
    """A batch's counters at one moment; `services/progress.py` says how many there may be."""

    batch = models.ForeignKey(
        Batch, models.CASCADE, related_name="samples", db_index=False
    )  # the constraint's index serves
    at = models.DateTimeField()
    answered = models.IntegerField()
    input_tokens = models.BigIntegerField()
    output_tokens = models.BigIntegerField()

    objects: ClassVar[models.Manager[Sample]] = ScopedManager(organization="batch__organization")

    class Meta:
        constraints = [models.UniqueConstraint(fields=["batch", "at"], name="one_sample_a_moment")]

    def __str__(self) -> str:
        return f"{self.batch_id}: {self.answered}"
