"""Organizations of the conformance tests' own, on the shared running portal; and the Node SDK."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from openai import OpenAI

from tests.stack import Stack

HERE = Path(__file__).parent
NEEDS_NODE = pytest.mark.skipif(
    shutil.which("npm") is None, reason="node and npm are not installed"
)


@dataclass
class Tenant:
    stack: Stack
    slug: str
    key: str

    @property
    def client(self) -> OpenAI:
        return self.stack.client(self.key)

    @cached_property
    def organization(self) -> str:
        """Its id, as one of its keys may name it."""
        code = f"from accounts.models import Organization as O; print(O.objects.get(slug={self.slug!r}).pk)"
        return self.stack.manage("shell", "--no-imports", "-c", code).splitlines()[-1]

    def narrow(self, *scopes: str) -> OpenAI:
        """A client whose key has only these scopes."""
        options = [f"--scope={scope}" for scope in scopes]
        key = self.stack.manage("create_api_key", "--org", self.slug, "--name", "narrow", *options)
        return self.stack.client(key)


def tenant_of(stack: Stack, name: str) -> Tenant:
    slug = stack.manage(
        "create_org", name, "--owner", f"owner@{name}.test", stdin="correct horse 9"
    )
    return Tenant(stack, slug, stack.manage("create_api_key", "--org", slug, "--name", "tests"))


@pytest.fixture(scope="session")
def tenant(stack: Stack) -> Tenant:
    return tenant_of(stack, "conformance")


@pytest.fixture(scope="session")
def outsider(stack: Stack) -> Tenant:
    """Another organization, which has a file."""
    made = tenant_of(stack, "outsider")
    made.client.files.create(file=("theirs.jsonl", b"{}\n"), purpose="batch")
    return made


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with our scripts and the pinned SDK, installed as a user would; no lockfile."""
    folder = tmp_path_factory.mktemp("node")
    for each in (HERE / "package.json", *HERE.glob("*.mjs")):
        shutil.copy(each, folder)
    options = ["--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error"]
    done = subprocess.run(
        ["npm", "install", *options], cwd=folder, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
