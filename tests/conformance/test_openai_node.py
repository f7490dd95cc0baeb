"""The official Node SDK, unmodified, against the running portal; its calls are in openai.test.mjs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conformance.conftest import Tenant

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("stack"),
    pytest.mark.skipif(shutil.which("npm") is None, reason="node and npm are not installed"),
]

HERE = Path(__file__).parent
SCRIPT = "openai.test.mjs"


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pinned SDK, installed as a user would; no lockfile."""
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", SCRIPT):
        shutil.copy(HERE / name, folder)
    options = ["--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error"]
    done = subprocess.run(
        ["npm", "install", *options], cwd=folder, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_node_sdk_works_unmodified(project: Path, tenant: Tenant) -> None:
    tenant.stack.instant("node/echo")
    variables = {
        "PORTAL_URL": f"{tenant.stack.base_url}/v1",
        "PORTAL_KEY": tenant.key,
        "NARROW_KEY": tenant.narrow("files.read").api_key,
    }
    done = subprocess.run(
        ["node", "--test", "--test-reporter=tap", SCRIPT],
        cwd=project,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"^# (pass|fail|skipped) (\d+)$", done.stdout, re.MULTILINE)
    assert dict(counts) == {"pass": "8", "fail": "0", "skipped": "0"}
