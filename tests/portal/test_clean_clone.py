"""What is committed is all that it takes: a clean clone starts, with nothing beside it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
_OF_THE_TESTS = ("DATABASE_URL", "REDIS_URL", "DATA_DIR", "SECRET_KEY")


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_trap_17_a_clean_clone_starts(tmp_path: Path) -> None:
    clone = tmp_path / "a clean clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    # The packages are those of this run; making them anew is what ./run test itself began with.
    (clone / ".venv").symlink_to(ROOT / ".venv")
    environment = {name: value for name, value in os.environ.items() if name not in _OF_THE_TESTS}
    made = subprocess.run(
        ["./run", "manage", "create_org", "Acme Inc.", "--owner", "owner@acme.test"],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (made.returncode, made.stdout) == (0, "acme-inc\n"), made.stderr
