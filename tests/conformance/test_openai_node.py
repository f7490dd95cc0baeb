"""The official Node SDK, unmodified, against the running portal; its calls are in openai.test.mjs."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conformance.conftest import NEEDS_NODE, Tenant

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("stack"),
    NEEDS_NODE,
]

SCRIPT = "openai.test.mjs"


def test_the_node_sdk_works_unmodified(node: Path, tenant: Tenant) -> None:
    tenant.stack.instant("node/echo")
    variables = {
        "PORTAL_URL": f"{tenant.stack.base_url}/v1",
        "PORTAL_KEY": tenant.key,
        "NARROW_KEY": tenant.narrow("files.read").api_key,
    }
    done = subprocess.run(
        ["node", "--test", "--test-reporter=tap", SCRIPT],
        cwd=node,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"^# (pass|fail|skipped) (\d+)$", done.stdout, re.MULTILINE)
    assert dict(counts) == {"pass": "8", "fail": "0", "skipped": "0"}
