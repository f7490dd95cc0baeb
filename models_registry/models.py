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


class Halt(models.TextChoices):
    """How an operator keeps work from being begun, of a model or of an organization."""

    PAUSED = "paused", "paused: what runs is given back"
    DRAINING = "draining", "draining: what runs is finished"


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
    restricted = models.BooleanField(
        default=False, help_text="Only the organizations named may use it, even if none is left."
    )
    organizations = models.ManyToManyField(
        Organization, blank=True, help_text="Who may use it, if it is restricted."
    )
    input_price = models.DecimalField(
        max_digits=14, decimal_places=6, default=0, help_text="Money for a million tokens."
    )
    cached_price = models.DecimalField(
        max_digits=14,
        decimal_places=6,
        null=True,
        blank=True,
        help_text="For a million input tokens found in the cache; empty: as other input.",
    )
    output_price = models.DecimalField(
        max_digits=14, decimal_places=6, default=0, help_text="Money for a million tokens."
    )
    tokens_per_second = models.FloatField(null=True, help_text="Measured; sizes the chunks.")
    load_error = models.TextField(blank=True, help_text="Why the last load failed.")
    load_failed_at = models.DateTimeField(null=True)
    halt = models.CharField(max_length=8, choices=Halt, blank=True, default="", db_default="")
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


class Measurement(models.Model):
    """How a model did on one kind of GPU; the queue plans with it."""

    model = models.ForeignKey(Model, models.CASCADE, related_name="measurements")
    gpu = models.CharField(max_length=100, blank=True, help_text="The kind; empty: no GPU.")
    tokens_per_second = models.FloatField(null=True, help_text="In and out, when busy.")
    load_seconds = models.FloatField(null=True, help_text="From nothing loaded to ready.")
    wake_seconds = models.FloatField(null=True, help_text="From asleep to ready.")
    settled = models.JSONField(
        default=dict,
        db_default=models.Value({}, models.JSONField()),
        help_text="vLLM options that it needs there for want of memory; they go before engine_args.",
    )
    unfit_why = models.TextField(blank=True, help_text="Why it cannot run there; empty: it can.")
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["model", "gpu"], name="one_measurement_a_gpu_kind")
        ]

    def __str__(self) -> str:
        return f"{self.model} on {self.gpu or 'no GPU'}"


class Change(models.TextChoices):
    """What happened to a model on a worker."""

    LOAD = "load"
    WAKE = "wake"
    SLEEP = "sleep"
    UNLOAD = "unload"


class ModelLoad(models.Model):
    """One time that a model came to a worker's GPU or left it, or failed to; history for people."""

    model = models.ForeignKey(Model, models.CASCADE, related_name="loads")
    worker = models.CharField(max_length=100)
    gpu = models.CharField(max_length=100, blank=True, help_text="The kind; empty: no GPU.")
    change = models.CharField(max_length=8, choices=Change)
    seconds = models.FloatField()
    settled = models.JSONField(default=dict, help_text="As in Measurement, as it was tried.")
    error = models.TextField(blank=True)
    at = models.DateTimeField(auto_now_add=True, db_index=True)

    def __str__(self) -> str:
        return f"{self.change} of {self.model} on {self.worker}"
