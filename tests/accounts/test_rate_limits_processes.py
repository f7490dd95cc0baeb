"""Several web processes count together: real processes, on the real Valkey."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from accounts import ids

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize(("limit", "calls"), [(150, 200), (1, 50)])
def test_two_processes_together_let_exactly_the_limit_through(limit: int, calls: int) -> None:
    arguments = [ids.organization_id(), str(limit), str(calls), str(time.time())]
    command = [sys.executable, "-m", "tests.accounts.counting", *arguments]
    environment = os.environ | {"DJANGO_SETTINGS_MODULE": "portal.settings"}
    with ExitStack() as stack:
        counting = [
            stack.enter_context(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(2)
        ]
        for process in counting:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in counting:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        passed = [int(process.communicate(timeout=60)[0]) for process in counting]
    assert sum(passed) == limit
