"""Writing down which Celery tasks failed, for the operators' page of the system."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import structlog
from django.conf import settings
from django.db import Error

logger = structlog.get_logger(__name__)
KEPT = 200


def note(sender: Any, task_id: str, exception: BaseException, args: Any, trace: Any) -> None:
    """Keep a failure, and forget all but the newest; that it cannot be kept is only logged."""
    if isinstance(exception, tuple(getattr(sender, "throws", ()) or ())):
        return  # one that the task is expected to have
    from portal.models import FailedTask

    try:
        FailedTask.objects.create(
            task=str(sender.name)[:200],
            task_id=str(task_id)[:64],
            arguments=", ".join(map(str, args or ()))[:200].replace("\0", ""),
            error=type(exception).__name__[:200],
            place=_place(trace)[:300],
        )
        old = FailedTask.objects.order_by("-pk").values_list("pk", flat=True)[KEPT : KEPT + 1]
        FailedTask.objects.filter(pk__lte=next(iter(old), 0)).delete()
    except Error as error:
        logger.warning("failure not kept", task=sender.name, error=type(error).__name__)


def _place(trace: TracebackType | None) -> str:
    """The innermost line of ours; of none of ours, the innermost."""
    frames = traceback.extract_tb(trace)
    ours = [each for each in frames if Path(each.filename).is_relative_to(settings.BASE_DIR)]
    ours = [each for each in ours if "site-packages" not in each.filename] or list(frames)
    if not ours:
        return ""
    last, root = ours[-1], str(settings.BASE_DIR)
    return f"{last.filename.removeprefix(root).lstrip('/')}:{last.lineno} in {last.name}"
