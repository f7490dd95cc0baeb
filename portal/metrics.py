"""What the web processes count and time, and GET /metrics, which tells a Prometheus of it.

Each process writes to PROMETHEUS_MULTIPROC_DIR (set by the supervisor); any of them adds up all.
What belongs to one part (rate limits, say) is counted there. Workers may be on other hosts: what
they say of their GPUs is read from their rows, by the process that answers.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import time
from collections.abc import Callable, Iterator

import structlog
from django.conf import settings
from django.db import DatabaseError
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.views.decorators.http import require_safe
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from accounts.origin import address_of
from worker import queries
from worker.models import Health, Worker

logger = structlog.get_logger(__name__)

REQUESTS = Counter("portal_requests", "HTTP requests answered.", ["route", "method", "status"])
SECONDS = Histogram(
    "portal_request_seconds",
    "Seconds until an HTTP request's answer began.",
    ["route", "method"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120),
)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def measure(
    get_response: Callable[[HttpRequest], HttpResponseBase],
) -> Callable[[HttpRequest], HttpResponseBase]:
    """Count every request and how long its answer took, by labels of which there are few."""

    def middleware(request: HttpRequest) -> HttpResponseBase:
        began = time.perf_counter()
        response = get_response(request)
        method = request.method if request.method in METHODS else "other"
        route = route_of(request)
        REQUESTS.labels(route, method, response.status_code).inc()
        SECONDS.labels(route, method).observe(time.perf_counter() - began)
        return response

    return middleware


def route_of(request: HttpRequest) -> str:
    """The beginning of the route that answered, never of the path that was asked for."""
    if request.resolver_match is None:
        return "static" if request.path_info.startswith("/static/") else "none"
    steps = request.resolver_match.route.split("/")
    named = [step for step in steps[: 2 if steps[0] == "v1" else 1] if "<" not in step]
    return "/".join(named) or "home"


MIB = 1024 * 1024
GPU_GAUGES: dict[str, tuple[str, Callable[[Worker], float | None]]] = {
    "worker_gpu_temperature_celsius": ("Of the hottest GPU.", lambda row: row.temperature),
    "worker_gpu_power_watts": ("Of all GPUs of the worker.", lambda row: row.power),
    "worker_gpu_utilization_ratio": (
        "Part of the time in which something ran.",
        lambda row: None if row.utilization is None else row.utilization / 100,
    ),
    "worker_gpu_memory_used_bytes": (
        "Of all GPUs of the worker.",
        lambda row: None if row.memory_used is None else row.memory_used * MIB,
    ),
    "worker_gpu_memory_total_bytes": (
        "Of all GPUs of the worker.",
        lambda row: None if row.memory_total is None else row.memory_total * MIB,
    ),
}


class Gpus(Collector):
    """What workers that are alive last said of their GPUs; labels: the worker's name and GPU kind."""

    def collect(self) -> Iterator[GaugeMetricFamily]:
        try:
            rows = list(queries.with_gpus())
        except DatabaseError as error:  # what is counted here can be told all the same
            logger.warning("no metrics of GPUs", error=str(error).strip())
            return
        for name, (words, value) in GPU_GAUGES.items():
            gauge = GaugeMetricFamily(name, words, labels=["worker", "gpu"])
            for row in rows:
                if (said := value(row)) is not None:
                    gauge.add_metric([row.name, row.gpu_kind], said)
            yield gauge
        health = GaugeMetricFamily(
            "worker_gpu_health", "1 at what its health is.", labels=["worker", "gpu", "health"]
        )
        for row in rows:
            for each in Health.values:
                health.add_metric([row.name, row.gpu_kind, each], each == row.health)
        yield health


@require_safe
def metrics(request: HttpRequest) -> HttpResponse:
    """Everything in Prometheus's text format, for this host and for who has the token."""
    if not (_has_token(request) or _is_local(request)):
        return HttpResponse("Only for this host, or with METRICS_TOKEN.\n", "text/plain", 403)
    registry = REGISTRY
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    rows = CollectorRegistry()
    rows.register(Gpus())
    text = generate_latest(registry) + generate_latest(rows)
    return HttpResponse(text, content_type=CONTENT_TYPE_LATEST)


def _has_token(request: HttpRequest) -> bool:
    wanted: str = settings.METRICS_TOKEN
    sent = request.headers.get("Authorization", "").removeprefix("Bearer ")
    return bool(wanted) and secrets.compare_digest(sent.encode(), wanted.encode())


def _is_local(request: HttpRequest) -> bool:
    """Whether the request began on this host: not one that a proxy on it has passed on."""
    if "X-Forwarded-For" in request.headers or "Forwarded" in request.headers:
        return False
    try:
        return ipaddress.ip_address(address_of(request)).is_loopback
    except ValueError:
        return False
