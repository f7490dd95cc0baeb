"""Files, uploads, batches, chunks and results: fields, constraints and transitions."""

from batches.models.batches import (
    Batch,
    Chunk,
    IdempotencyKey,
    Result,
    Suspect,
)
from batches.models.events import (
    Event,
    QuotaNotice,
    WebhookAttempt,
    WebhookDelivery,
    WebhookEndpoint,
)
from batches.models.files import File, FileCheck, Retention, Upload, UploadPart
from batches.models.handlers import HandlerRun, ResultHandler
from batches.models.progress import Sample
from batches.models.queue import Backlog, Moderation, Share

__all__ = [
    "Backlog",
    "Batch",
    "Chunk",
    "Event",
    "File",
    "FileCheck",
    "HandlerRun",
    "IdempotencyKey",
    "Moderation",
    "QuotaNotice",
    "Result",
    "ResultHandler",
    "Retention",
    "Sample",
    "Share",
    "Suspect",
    "Upload",
    "UploadPart",
    "WebhookAttempt",
    "WebhookDelivery",
    "WebhookEndpoint",
]
