"""What belongs to the installation itself, not to a tenant."""

from __future__ import annotations

from django.db import models
from django.utils import timezone


class FailedTask(models.Model):
    """A Celery task that ended in an error that nobody expected; the newest few are kept.

    Where it happened, never what the error said: messages may quote what a tenant sent.
    """

    task = models.CharField(max_length=200)
    task_id = models.CharField(max_length=64)
    arguments = models.CharField(max_length=200, blank=True, help_text="Ids: tasks take no more.")
    error = models.CharField(max_length=200, help_text="The exception's class.")
    place = models.CharField(max_length=300, blank=True, help_text="File, line and function.")
    at = models.DateTimeField(default=timezone.now, db_index=True)

    def __str__(self) -> str:
        return f"{self.task}: {self.error}"
