"""Files, the uploads that they are put together from, and how long they stay; the bytes are in the
storage."""

from __future__ import annotations

from datetime import timedelta
from typing import ClassVar

from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models import Q
from django.utils import timezone
from django_scopes import ScopedManager

from accounts.ids import new_id
from accounts.models import ApiKey, Organization, Project, User
from models_registry.models import Model

UPLOAD_LIFETIME = timedelta(hours=1)


def file_id() -> str:
    return new_id("file-")


def upload_id() -> str:
    return new_id("upload_")


def part_id() -> str:
    return new_id("part_")


class Purpose(models.TextChoices):
    ASSISTANTS = "assistants"
    BATCH = "batch"
    BATCH_OUTPUT = "batch_output"
    FINE_TUNE = "fine-tune"
    VISION = "vision"
    USER_DATA = "user_data"
    EVALS = "evals"


class File(models.Model):
    """A tenant's file. Deleting hides it at once; its bytes go when no running batch needs them."""

    id = models.CharField(primary_key=True, max_length=48, default=file_id)
    organization = models.ForeignKey(Organization, models.CASCADE, related_name="files")
    project = models.ForeignKey(Project, models.CASCADE, related_name="files")
    user = models.ForeignKey(User, models.SET_NULL, null=True, related_name="files")
    api_key = models.ForeignKey(ApiKey, models.SET_NULL, null=True, related_name="files")
    filename = models.CharField(max_length=255)
    purpose = models.CharField(max_length=16, choices=Purpose)
    bytes = models.BigIntegerField()
    lines = models.BigIntegerField(null=True, help_text="That are not blank; empty: not counted.")
    storage_name = models.CharField(max_length=255)
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(null=True)
    deleted_at = models.DateTimeField(null=True)
    purged_at = models.DateTimeField(null=True)

    objects: ClassVar[models.Manager[File]] = ScopedManager(organization="organization")

    class Meta:
        indexes = [
            models.Index(fields=["organization", "-id"], name="file_by_organization"),
            models.Index(
                fields=["organization", "user", "api_key"],
                include=["bytes"],
                name="file_kept",  # what counts against storage quotas, from the index alone
                condition=models.Q(purged_at__isnull=True),
            ),
            models.Index(
                fields=["deleted_at"],
                name="file_to_purge",
                condition=models.Q(deleted_at__isnull=False, purged_at__isnull=True),
            ),
            models.Index(
                fields=["expires_at"],
                name="file_to_expire",
                condition=models.Q(expires_at__isnull=False, deleted_at__isnull=True),
            ),
        ]

    def __str__(self) -> str:
        return self.filename


class CheckState(models.TextChoices):
    WAITING = "waiting"
    DONE = "done"


class FileCheck(models.Model):
    """What a batch of this file would find wrong, and cost, found out before there is a batch.

    The numbers are estimates, and of a file without bad lines.
    """

    file = models.OneToOneField(File, models.CASCADE, primary_key=True, related_name="checked")
    state = models.CharField(max_length=8, choices=CheckState, default=CheckState.WAITING)
    asked_at = models.DateTimeField(default=timezone.now)
    done_at = models.DateTimeField(null=True)
    bytes_read = models.BigIntegerField(default=0)
    endpoint = models.CharField(max_length=32, blank=True)
    model = models.ForeignKey(Model, models.SET_NULL, null=True, related_name="+")
    requests = models.BigIntegerField(default=0)
    bad_lines = models.BigIntegerField(default=0)
    errors = models.JSONField(default=list, help_text="The first bad lines, as the wire has them.")
    input_tokens = models.BigIntegerField(default=0)
    output_tokens = models.BigIntegerField(default=0, help_text="At most, where lines say it.")

    objects: ClassVar[models.Manager[FileCheck]] = ScopedManager(organization="file__organization")

    class Meta:
        indexes = [
            models.Index(
                fields=["asked_at"], name="file_check_waiting", condition=Q(state="waiting")
            )
        ]

    def __str__(self) -> str:
        return f"{self.file_id}: {self.state}"

    @property
    def is_done(self) -> bool:
        return self.state == CheckState.DONE

    @property
    def is_good(self) -> bool:
        """Whether a batch of it would run, as far as the file goes."""
        return self.is_done and not self.bad_lines and self.model_id is not None

    @property
    def percent(self) -> int:
        return min(100 * self.bytes_read // self.file.bytes, 100) if self.file.bytes else 0


MOST_DAYS = 3650


class Retention(models.Model):
    """After how many days an organization's files go, unless something else was asked for.

    While `applying_at` is set the sweep walks the files that were there before, `cursor` being the
    last one it has seen.
    """

    organization = models.OneToOneField(Organization, models.CASCADE, primary_key=True)
    input_days = models.PositiveIntegerField(
        null=True, validators=[MinValueValidator(1), MaxValueValidator(MOST_DAYS)]
    )
    output_days = models.PositiveIntegerField(
        null=True, validators=[MinValueValidator(1), MaxValueValidator(MOST_DAYS)]
    )
    applying_at = models.DateTimeField(null=True)
    cursor = models.CharField(max_length=48, blank=True)

    objects: ClassVar[models.Manager[Retention]] = ScopedManager(organization="organization")

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=Q(input_days=None) | Q(input_days__gte=1, input_days__lte=MOST_DAYS),
                name="retention_input_days",
            ),
            models.CheckConstraint(
                condition=Q(output_days=None) | Q(output_days__gte=1, output_days__lte=MOST_DAYS),
                name="retention_output_days",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.organization_id}: {self.input_days}, {self.output_days}"

    def days_of(self, purpose: str) -> int | None:
        return self.output_days if purpose == Purpose.BATCH_OUTPUT else self.input_days


class UploadStatus(models.TextChoices):
    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Upload(models.Model):
    """A file that comes in parts."""

    id = models.CharField(primary_key=True, max_length=48, default=upload_id)
    organization = models.ForeignKey(Organization, models.CASCADE, related_name="uploads")
    project = models.ForeignKey(Project, models.CASCADE, related_name="uploads")
    user = models.ForeignKey(User, models.SET_NULL, null=True, related_name="uploads")
    api_key = models.ForeignKey(ApiKey, models.SET_NULL, null=True, related_name="uploads")
    filename = models.CharField(max_length=255)
    purpose = models.CharField(max_length=16, choices=Purpose)
    bytes = models.BigIntegerField()
    mime_type = models.CharField(max_length=255)
    expires_after_seconds = models.IntegerField(null=True)
    status = models.CharField(max_length=16, choices=UploadStatus, default=UploadStatus.PENDING)
    file = models.OneToOneField(File, models.SET_NULL, null=True, related_name="upload")
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField()

    objects: ClassVar[models.Manager[Upload]] = ScopedManager(organization="organization")

    class Meta:
        indexes = [
            models.Index(
                fields=["expires_at"],
                name="upload_to_expire",
                condition=models.Q(status="pending"),
            )
        ]

    def __str__(self) -> str:
        return self.filename


class UploadPart(models.Model):
    """One part; the order of the parts is said when the upload is completed."""

    id = models.CharField(primary_key=True, max_length=48, default=part_id)
    upload = models.ForeignKey(Upload, models.CASCADE, related_name="parts")
    bytes = models.BigIntegerField()
    storage_name = models.CharField(max_length=255)
    created_at = models.DateTimeField(auto_now_add=True)

    objects: ClassVar[models.Manager[UploadPart]] = ScopedManager(
        organization="upload__organization"
    )

    def __str__(self) -> str:
        return self.id
