"""Writes of the registry."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography.fernet import InvalidToken
from django.conf import settings
from django.db import transaction
from django.utils import timezone

from accounts import secrets
from accounts.errors import BadRequest, NotFound
from accounts.models import Organization, User
from accounts.services import audit
from models_registry.models import Change, EngineKind, Measurement, Model, ModelLoad, Task
from models_registry.signals import model_changed

DEAREST = Decimal(100_000_000)
LOADS_KEPT = timedelta(days=30)
"""How long the history of loads goes back."""
SPEED_SECONDS = 300.0
"""A model's speed is a mean of about so many busy seconds."""
_PRICES = ("input_price", "cached_price", "output_price")
_AUDITED = ("source", "revision", "task", "engine", "base_url", "restricted", *_PRICES)
_SECRETIVE = re.compile("key|password|secret|token(?!i[sz])", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^/\s]*@")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}")


@transaction.atomic
def register_model(
    *,
    name: str,
    source: str,
    revision: str = "",
    task: str = Task.CHAT,
    engine: str = EngineKind.VLLM,
    base_url: str = "",
    secret: str | None = None,
    engine_args: dict[str, Any] | None = None,
    organizations: Sequence[Organization] | None = None,
    input_price: Decimal | None = None,
    cached_price: Decimal | None = None,
    output_price: Decimal | None = None,
    actor: User | None = None,
) -> Model:
    """Make the entry of that name, or change it to this; raises `BadRequest` naming the field.

    A secret, engine arguments, organizations or a price that is not given stays what it was. At
    first there is none of them: the model is everybody's, as with an empty list, and costs nothing
    (cached input: as other input). Prices are money for a million tokens. `actor` is None when the
    shell does it. What was learned of its memory on each kind of GPU is forgotten: it is tried
    anew.
    """
    _check(name=name, source=source, task=task, engine=engine, base_url=base_url)
    prices = dict(zip(_PRICES, (input_price, cached_price, output_price), strict=True))
    given = _given(secret, engine_args, organizations, prices)
    before = _as_audited(Model.objects.filter(name=name).first())
    model, made = Model.objects.update_or_create(
        name=name,
        defaults={
            "source": _absolute(source) if engine == EngineKind.VLLM else source,
            "revision": revision,
            "task": task,
            "engine": engine,
            "base_url": base_url,
            **given,
        },
    )
    _forget_troubles(model)
    if organizations is not None:
        model.organizations.set(organizations)
    _record(model, before, made=made, actor=actor)
    return model


def _given(
    secret: str | None,
    engine_args: dict[str, Any] | None,
    organizations: Sequence[Organization] | None,
    prices: Mapping[str, Decimal | None],
) -> dict[str, Any]:
    """The columns that were named; the others stay as they are."""
    columns = {
        "encrypted_secret": None if secret is None else secrets.encrypt(secret),
        "engine_args": engine_args,
        "restricted": None if organizations is None else bool(organizations),
        **{
            field: None if price is None else _price(field, price)
            for field, price in prices.items()
        },
    }
    return {name: value for name, value in columns.items() if value is not None}


def _absolute(source: str) -> str:
    """A folder's full path: workers start in other folders than the shell that named it."""
    folder = Path(source).expanduser()
    return str(folder.resolve()) if folder.is_dir() else source


def _price(field: str, price: Decimal) -> Decimal:
    """The price as its column has it."""
    if not price.is_finite() or not 0 <= price < DEAREST:
        raise BadRequest(f"{field} must be a number from 0 to {DEAREST - 1}.", param=field)
    if price != (kept := price.quantize(Decimal("0.000001"))):
        raise BadRequest(f"{field} has more than six decimals.", param=field)
    return kept


def _record(model: Model, before: dict[str, Any], *, made: bool, actor: User | None) -> None:
    """Audit what is another than before; what was registered again as it was is no change."""
    now = _as_audited(model)
    changes = {
        field: [_shown(field, before[field]), _shown(field, now[field])]
        for field in now
        if before[field] != now[field]
    }
    if made or changes:
        action = "model.registered" if made else "model.changed"
        audit.record(action, actor=actor, target=model, changes=changes)


def _as_audited(model: Model | None) -> dict[str, Any]:
    if model is None:
        return dict.fromkeys([*_AUDITED, "engine_args", "secret", "organizations"])
    return audit.snapshot(model, _AUDITED) | {
        "engine_args": model.engine_args,
        "secret": _secret_of(model),
        "organizations": sorted(model.organizations.values_list("slug", flat=True)),
    }


def _secret_of(model: Model) -> str:
    """The secret, for comparing only; one of another SECRET_KEY is unlike every other."""
    try:
        return secrets.decrypt(model.encrypted_secret)
    except InvalidToken:
        return model.encrypted_secret


def _shown(field: str, value: Any) -> Any:
    """The value without what is secret in it."""
    if field == "secret":
        return audit.MASK if value else None
    return _masked(value)


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: audit.MASK if _is_secret(str(name), each) else _masked(each)
            for name, each in value.items()
        }
    if isinstance(value, list):
        return [_masked(each) for each in value]
    return _USERINFO.sub(f"{audit.MASK}@", value) if isinstance(value, str) else value


def _is_secret(name: str, value: Any) -> bool:
    """By its name; so many tokens, as in `max_tokens`, are a number."""
    is_count = isinstance(value, int) and name.lower().endswith("tokens")
    return _SECRETIVE.search(name) is not None and not is_count


def _check(*, name: str, source: str, task: str, engine: str, base_url: str) -> None:
    if not _NAME.fullmatch(name):
        raise BadRequest(
            "A model's name starts with a letter or digit and has only these: A-Z a-z 0-9 . _ : / -",
            param="name",
        )
    if task not in Task.values:
        raise BadRequest(f"task must be one of {', '.join(Task.values)}", param="task")
    if engine not in EngineKind.values:
        raise BadRequest(f"engine must be one of {', '.join(EngineKind.values)}", param="engine")
    if engine == EngineKind.INSTANT and settings.PRODUCTION:
        raise BadRequest(
            "The instant engine invents its answers: not in production.", param="engine"
        )
    if engine == EngineKind.OPENAI and urlsplit(base_url).scheme not in ("http", "https"):
        raise BadRequest("The openai engine needs a base_url (http or https).", param="base_url")
    if engine == EngineKind.VLLM and source in ("", "none"):
        raise BadRequest("The vllm engine needs a folder or a Hugging Face name.", param="source")


@transaction.atomic
def retry_model(*, name: str, actor: User | None = None) -> Model:
    """Forget why it did not load or fit, and what it settled on; raises `NotFound`.

    Workers that wait before they try it again try it at once.
    """
    model = Model.objects.select_for_update().filter(name=name).first()
    if model is None:
        raise NotFound(f"There is no model {name!r}.", param="name")
    _forget_troubles(model)
    audit.record("model.retried", actor=actor, target=model)
    return model


def _forget_troubles(model: Model) -> None:
    """Saving the entry is what tells the workers (`updated_at`)."""
    model.load_error, model.load_failed_at = "", None
    model.save(update_fields=["load_error", "load_failed_at", "updated_at"])
    model.measurements.update(settled={}, unfit_why="")


def note_load(
    name: str,
    change: Change,
    *,
    worker: str,
    gpu: str,
    seconds: float,
    settled: Mapping[str, Any] | None = None,
    error: str = "",
) -> None:
    """Write down that the model came to a worker's GPU or left it, or with `error` that it did not.

    The seconds of a load or a wake that succeeded are what the queue plans with from now on.
    """
    ModelLoad.objects.filter(at__lt=timezone.now() - LOADS_KEPT).delete()
    measured = {Change.LOAD: "load_seconds", Change.WAKE: "wake_seconds"}.get(change)
    loaded = measured is not None and not error
    with transaction.atomic():
        for model in Model.objects.select_for_update(no_key=True).filter(name=name):
            is_news = loaded and _is_news(model)
            ModelLoad.objects.create(
                model=model,
                worker=worker,
                gpu=gpu,
                change=change,
                seconds=seconds,
                settled=dict(settled or {}),
                error=error,
            )
            if loaded:
                Model.objects.filter(pk=model.pk).update(load_error="", load_failed_at=None)
            if is_news:
                model_changed.send(Model, model=model, is_ready=True)
    if measured and not error:
        _measured(name, gpu, measured, seconds)


def _is_news(model: Model) -> bool:
    """Whether a load that succeeds is the entry's first, or the first after one that failed."""
    since = ModelLoad.objects.filter(model=model, error="", at__gte=model.updated_at)
    return bool(model.load_error) or not since.filter(change__in=_COMING).exists()


_COMING = (Change.LOAD, Change.WAKE)


@transaction.atomic
def note_failure(name: str, *, why: str) -> None:
    """Remember why the model could not be loaded, until it can or is registered again."""
    model = Model.objects.select_for_update(no_key=True).filter(name=name).first()
    if model is None:
        return
    Model.objects.filter(pk=model.pk).update(load_error=why, load_failed_at=timezone.now())
    if not model.load_error:
        model_changed.send(Model, model=model, is_ready=False)


def note_unfit(name: str, gpu: str, *, why: str, seen: datetime) -> None:
    """Remember that it does not fit this kind of GPU: the queue leaves such workers out."""
    _learn(name, gpu, seen, unfit_why=why)


def note_settled(name: str, gpu: str, *, settled: Mapping[str, Any], seen: datetime) -> None:
    """Remember the options with which it fits this kind of GPU."""
    _learn(name, gpu, seen, settled=dict(settled), unfit_why="")


@transaction.atomic
def _learn(name: str, gpu: str, seen: datetime, **found: Any) -> None:
    """Only of the entry as it was when it was tried (`seen` is its `updated_at`)."""
    model = Model.objects.select_for_update().filter(name=name, updated_at=seen).first()
    if model is not None:
        Measurement.objects.update_or_create(model=model, gpu=gpu, defaults=found)


def note_speed(
    name: str, tokens_per_second: float, gpu: str = "", *, seconds: float = 60.0
) -> None:
    """Remember how fast the model was of late, for so many busy seconds of one worker.

    The figure is a mean in which what was measured t busy seconds ago, of all workers together,
    counts e^(-t / SPEED_SECONDS) as much as what is measured now.
    """
    share = 1 - math.exp(-seconds / SPEED_SECONDS)
    model = Model.objects.filter(name=name)
    for known in model.values_list("tokens_per_second", flat=True):
        model.update(tokens_per_second=_blended(known, tokens_per_second, share))
    _measured(name, gpu, "tokens_per_second", tokens_per_second, share)


def _measured(name: str, gpu: str, field: str, value: float, share: float = 0.5) -> None:
    """Blend a figure into the model's measurement on this kind of GPU; none for a gone model."""
    model = Model.objects.filter(name=name).first()
    if model is not None:
        row, _ = Measurement.objects.get_or_create(model=model, gpu=gpu)
        setattr(row, field, _blended(getattr(row, field), value, share))
        row.save(update_fields=[field, "updated_at"])


def _blended(known: float | None, new: float, share: float) -> float:
    return new if known is None else known + share * (new - known)
