"""Public ids."""

from __future__ import annotations

import re
import time

import pytest

from accounts import ids
from batches.models import batches, files


def test_an_id_is_its_prefix_the_time_and_chance() -> None:
    before = time.time_ns() // 1_000_000
    found = re.fullmatch(r"batch_([0-9a-f]{12})([0-9a-f]{20})", ids.new_id("batch_"))
    assert found is not None
    assert before <= int(found[1], 16) <= time.time_ns() // 1_000_000


def test_ids_sort_by_the_time_they_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for now in (0, 10**18, 1_700_000_000 * 10**9, 10**18 + 10**6):
        monkeypatch.setattr(ids.time, "time_ns", lambda now=now: now)
        made.append((now, ids.new_id("x_")))
    assert [id for _, id in sorted(made)] == sorted(id for _, id in made)


def test_ids_of_one_moment_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids.time, "time_ns", lambda: 5)
    assert len({ids.new_id("x_") for _ in range(1_000)}) == 1_000


@pytest.mark.parametrize(
    ("make", "prefix"),
    [
        (ids.organization_id, "org_"),
        (ids.project_id, "proj_"),
        (ids.key_id, "key_"),
        (batches.batch_id, "batch_"),
        (files.file_id, "file-"),
        (files.upload_id, "upload_"),
        (files.part_id, "part_"),
    ],
)
def test_every_kind_has_its_prefix_and_fits_its_column(make: object, prefix: str) -> None:
    id = make()  # type: ignore[operator]
    assert id.startswith(prefix)
    assert len(id) == len(prefix) + 32 <= 48
