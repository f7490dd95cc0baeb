"""Counts how often each answer was given, and keeps the counts as a JSON file in a folder.

Meant for batches that classify: each answer is a word or two.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Literal

from pydantic import Field

from batches.handlers.base import Answer, Batch, Handler, HandlerFailed, Results, Settings

FOLDER = "RESULT_COUNTS_DIR"
"""The variable that names the folder: the operator's to say, never a tenant's."""
MOST_KINDS = 10_000


class CountsSettings(Settings):
    letters: Literal["as they are", "small"] = Field(
        "small", title="Letters", description="Whether Yes and yes are the same."
    )
    longest: int = Field(
        50, title="Longest answer", ge=1, le=500, description="Longer ones count as “other”."
    )


class CountsHandler(Handler[CountsSettings]):
    name = "counts"
    title = "Counts of answers"
    summary = "Counts how often each answer was given, for batches that classify."
    settings_schema = CountsSettings

    def check(self, organization_id: str) -> None:
        """Called when somebody saves the settings: say what could not work."""
        if not os.environ.get(FOLDER):
            raise HandlerFailed("The portal's operator has set no folder for counts.", final=True)

    def handle(self, batch: Batch, results: Results) -> str:
        counts: Counter[str] = Counter()
        for answer in results:  # one at a time: a batch may have a million
            counts[self._word(answer)] += 1
            if len(counts) > MOST_KINDS:
                raise HandlerFailed("There are too many different answers to count.", final=True)
        self._keep(batch, counts)
        return f"{len(counts)} different answers"

    def _word(self, answer: Answer) -> str:
        if not answer.ok or answer.response is None:
            return "failed"
        text = answer.response["choices"][0]["message"]["content"].strip()
        text = text if self.settings.letters == "as they are" else text.lower()
        return text if len(text) <= self.settings.longest else "other"

    def _keep(self, batch: Batch, counts: Counter[str]) -> None:
        """By the batch's id, and whole or not at all: doing it twice leaves what once does."""
        folder = Path(os.environ[FOLDER]) / batch.organization_id
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{batch.pk}.part"
        unfinished.write_text(json.dumps(dict(counts.most_common())))
        unfinished.replace(folder / f"{batch.pk}.json")
