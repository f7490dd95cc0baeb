"""The GPU workers that there are, as they last said themselves."""

from __future__ import annotations

from django.db import models


class WorkerState(models.TextChoices):
    STARTING = "starting"
    IDLE = "idle"
    LOADING = "loading"
    RUNNING = "running"
    STOPPED = "stopped"


class Worker(models.Model):
    """One GPU worker; its row is written by its heartbeat."""

    name = models.CharField(max_length=100, unique=True)
    host = models.CharField(max_length=255)
    pid = models.IntegerField()
    gpu = models.IntegerField(null=True)
    state = models.CharField(max_length=16, choices=WorkerState, default=WorkerState.STARTING)
    loaded_model = models.CharField(max_length=200, blank=True)
    in_flight = models.IntegerField(default=0)
    tokens_per_second = models.FloatField(default=0)
    swaps = models.IntegerField(default=0, help_text="Model loads in this life of the worker.")
    draining = models.BooleanField(default=False)
    error = models.TextField(blank=True)
    started_at = models.DateTimeField()
    heartbeat_at = models.DateTimeField()

    def __str__(self) -> str:
        return self.name
