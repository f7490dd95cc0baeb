"""Wake-ups when Redis is away: the caller loses nothing, and not its time again and again."""

from __future__ import annotations

from typing import Any

import pytest
from celery import current_app
from kombu.exceptions import OperationalError

from accounts.ids import new_id
from batches import wakeups


def test_after_one_that_failed_none_is_tried_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, tried = [100.0], []

    def send_task(task: str, **options: Any) -> None:
        tried.append((clock[0], task))
        if clock[0] < 105:
            raise OperationalError("away")

    monkeypatch.setattr(wakeups, "_silent_until", 0.0)
    monkeypatch.setattr(wakeups.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(current_app, "send_task", send_task)
    for clock[0] in (100, 101, 104.9, 105, 105.1):
        wakeups._send("batches.tasks.finalize", "batch_1")
    wakeups._send("worker.tasks.wake")
    assert tried == [
        (100, "batches.tasks.finalize"),
        (105, "batches.tasks.finalize"),
        (105.1, "batches.tasks.finalize"),
        (105.1, "worker.tasks.wake"),
    ]


def test_a_delivery_is_woken_once_until_its_wake_up_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(wakeups, "_silent_until", 0.0)
    monkeypatch.setattr(current_app, "send_task", lambda _, args, **__: sent.append(args))
    one, two = (new_id("we_") for _ in range(2))
    for id in (one, one, two, one):
        wakeups._send("batches.tasks.deliver", id)
    assert sent == [(one,), (two,)]
    wakeups.delivery_taken(one)
    wakeups._send("batches.tasks.deliver", one)
    assert sent == [(one,), (two,), (one,)]
