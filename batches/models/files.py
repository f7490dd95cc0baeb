"""Files and the uploads that files are put together from; the bytes are in the storage."""

from __future__ import annotations

from datetime import timedelta
from typing import ClassVar

from django.db import models
from django_scopes import ScopedManager

from accounts.ids import new_id
from accounts.models import Organization, Project

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
    filename = models.CharField(max_length=255)
    purpose = models.CharField(max_length=16, choices=Purpose)
    bytes = models.BigIntegerField()
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
