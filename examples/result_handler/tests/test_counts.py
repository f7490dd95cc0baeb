"""Run these in the portal's environment: `./run test examples/result_handler`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batches.handlers.base import Answer, HandlerFailed
from examples.result_handler.batch_result_counts import CountsHandler, CountsSettings

BATCH: Any = SimpleNamespace(pk="batch_1", organization_id="org_1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RESULT_COUNTS_DIR", str(tmp_path))
    return tmp_path


def answer(text: str | None) -> Answer:
    body = {"choices": [{"message": {"content": text}}]}
    ok = text is not None
    return Answer("1", ok, 200 if ok else 400, body if ok else None, None, b"{}")


def counted(folder: Path, *answers: Answer, **settings: Any) -> dict[str, int]:
    results: Any = list(answers)
    CountsHandler(CountsSettings(**settings)).handle(BATCH, results)
    found: dict[str, int] = json.loads((folder / "org_1" / "batch_1.json").read_text())
    return found


def test_answers_are_counted(folder: Path) -> None:
    given = [answer("Yes"), answer(" yes\n"), answer("no"), answer("long " * 20), answer(None)]
    expected = {"yes": 2, "no": 1, "other": 1, "failed": 1}
    assert counted(folder, *given) == expected
    assert counted(folder, *given) == expected  # a second time, as after a crash


def test_letters_can_count(folder: Path) -> None:
    given = [answer("Yes"), answer("yes")]
    assert counted(folder, *given, letters="as they are") == {"Yes": 1, "yes": 1}


def test_without_a_folder_it_cannot_be_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESULT_COUNTS_DIR", raising=False)
    with pytest.raises(HandlerFailed):
        CountsHandler(CountsSettings()).check("org_1")
