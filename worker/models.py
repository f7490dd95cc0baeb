"""The GPU workers that there are, as they last said themselves."""

from __future__ import annotations

from django.db import models


class WorkerState(models.TextChoices):
    STARTING = "starting"
    IDLE = "idle"
    LOADING = "loading"
    RUNNING = "running"
    DRAINED = "drained"
    STOPPED = "stopped"


class Health(models.TextChoices):
    """How the worker's GPUs are (see `worker/guard.py`), from best to worst."""

    OK = "ok"
    PAUSED = "paused", "paused: feeds nothing for now"
    RESTING = "resting", "resting: has given its chunks back, and comes back by itself"
    SICK = "sick", "sick: drained until an operator resumes it"


class Worker(models.Model):
    """One GPU worker; its row is written by its heartbeat.

    Columns that came later have their defaults in the database: during an upgrade, workers of the
    version before write rows, too.
    """

    name = models.CharField(max_length=100, unique=True)
    host = models.CharField(max_length=255)
    pid = models.IntegerField()
    life = models.CharField(max_length=100, db_default="", help_text="Whose the name is now.")
    version = models.CharField(max_length=100, db_default="", help_text="Build, or commit.")
    gpu = models.CharField(max_length=100, null=True, help_text="Indexes: 0, or 0,1; null: none.")
    gpu_kind = models.CharField(max_length=100, blank=True, help_text="Its name; empty: no GPU.")
    state = models.CharField(max_length=16, choices=WorkerState, default=WorkerState.STARTING)
    loaded_model = models.CharField(max_length=200, blank=True)
    asleep = models.JSONField(
        default=list,
        db_default=models.Value([], models.JSONField()),
        help_text="Models that sleep in the host's memory.",
    )
    in_flight = models.IntegerField(default=0)
    tokens_per_second = models.FloatField(default=0)
    swaps = models.IntegerField(default=0, help_text="Model loads in this life of the worker.")
    draining = models.BooleanField(default=False, help_text="It leases nothing until resumed.")
    exit_when_drained = models.BooleanField(db_default=False)
    unload_asked = models.BooleanField(
        db_default=False, help_text="Its models are to leave the GPU once nothing is in hand."
    )
    error = models.TextField(blank=True)
    health = models.CharField(
        max_length=16, choices=Health, blank=True, db_default="", help_text="Empty: not watched."
    )
    health_why = models.CharField(max_length=500, blank=True, db_default="")
    # Over all its GPUs; null: none, or the driver does not say.
    memory_used = models.IntegerField(null=True, help_text="MiB, of all its GPUs.")
    memory_total = models.IntegerField(null=True, help_text="MiB, of all its GPUs.")
    temperature = models.IntegerField(null=True, help_text="°C, of the hottest.")
    power = models.FloatField(null=True, help_text="Watts, of all its GPUs.")
    utilization = models.FloatField(null=True, help_text="Per cent, on average.")
    started_at = models.DateTimeField()
    heartbeat_at = models.DateTimeField()

    def __str__(self) -> str:
        return self.name
