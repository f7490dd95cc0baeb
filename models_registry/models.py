"""Which models exist and who may use them.

A model is a platform row, not a tenant's: `queries.offered_to` decides who sees it.
"""

from __future__ import annotations

from typing import Any

from django.db import models

from accounts.models import Organization


class Task(models.TextChoices):
    CHAT = "chat"
    EMBEDDING = "embedding"
    SCORE = "score"


class EngineKind(models.TextChoices):
    VLLM = "vllm"
    OPENAI = "openai"
    INSTANT = "instant"


class Model(models.Model):
    """A name that requests may carry in `model`, and what answers them."""

    name = models.CharField(max_length=200, unique=True)
    source = models.CharField(max_length=1000, help_text="A folder or a Hugging Face name.")
    revision = models.CharField(max_length=200, blank=True)
    task = models.CharField(max_length=16, choices=Task, default=Task.CHAT)
    engine = models.CharField(max_length=16, choices=EngineKind, default=EngineKind.VLLM)
    engine_args = models.JSONField(default=dict, blank=True)
    base_url = models.URLField(max_length=500, blank=True)
    encrypted_secret = models.TextField(blank=True)
    organizations = models.ManyToManyField(
        Organization, blank=True, help_text="Who may use it; nobody named: everybody."
    )
    tokens_per_second = models.FloatField(null=True, help_text="Measured; sizes the chunks.")
    load_error = models.TextField(blank=True, help_text="Why the last load failed.")
    load_failed_at = models.DateTimeField(null=True)
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    def __str__(self) -> str:
        return self.name

    @property
    def spec_fields(self) -> dict[str, Any]:
        """What an engine needs to know, but for the secret."""
        return {
            "name": self.name,
            "source": self.source,
            "revision": self.revision,
            "task": self.task,
            "engine": self.engine,
            "engine_args": self.engine_args,
            "base_url": self.base_url,
        }
