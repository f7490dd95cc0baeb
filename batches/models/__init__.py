"""Files, uploads, batches, chunks and results: fields, constraints and transitions."""

from batches.models.batches import (
    Batch,
    Chunk,
    IdempotencyKey,
    Result,
    Suspect,
)
from batches.models.files import File, Upload, UploadPart

__all__ = [
    "Batch",
    "Chunk",
    "File",
    "IdempotencyKey",
    "Result",
    "Suspect",
    "Upload",
    "UploadPart",
]
