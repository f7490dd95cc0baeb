"""A GPU host has no `portal` extra: what runs there must import without any of its packages."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.stack import ROOT

PROGRAM = """
import importlib.abc, importlib.util, sys

ABSENT = {
    "allauth", "django_htmx", "django_ratelimit", "django_redis", "dns", "fido2", "gunicorn", "jwt",
    "ninja", "oauthlib", "prometheus_client", "qrcode", "template_partials", "whitenoise",
}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(name, name=name)

found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ABSENT else found(name, *rest)
sys.meta_path.insert(0, Absent())
import django
django.setup()
import batches.tasks, portal.celery, worker.__main__, worker.heartbeat, worker.loop, worker.tasks
from django.core.management import get_commands, load_command_class
assert "migrate" in get_commands()
for name in ("drain_worker", "forget_worker", "resume_worker", "workers"):
    load_command_class("worker", name)
from django.core.files.storage import default_storage
assert default_storage.bucket_name == "files"
"""


def test_a_worker_imports_without_the_portals_packages() -> None:
    environment = os.environ | {
        "DJANGO_SETTINGS_MODULE": "portal.settings",
        "STORAGE_URL": "s3://files",
    }
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr.decode()) == (0, "")
