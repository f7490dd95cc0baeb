"""A storage of the test's own, to see what stays behind in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


class Disk:
    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def files(self) -> list[str]:
        """Everything that lies there, half-written or whole."""
        found = sorted(path for path in self.root.rglob("*") if path.is_file())
        return [str(path.relative_to(self.root)) for path in found]


@pytest.fixture
def disk(settings: Any, tmp_path: Path) -> Disk:
    """An empty storage."""
    incoming = tmp_path / "incoming"
    incoming.mkdir()
    default = settings.STORAGES["default"] | {"OPTIONS": {"location": tmp_path}}
    settings.STORAGES = settings.STORAGES | {"default": default}
    settings.FILE_UPLOAD_TEMP_DIR = incoming
    return Disk(tmp_path)
