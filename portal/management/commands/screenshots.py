"""`screenshots`: the pictures of docs/TOUR.md, taken of a running portal.

Beside `./run demo`, or `./run serve` with an organization that has something to show:

    ./run manage screenshots
"""

from __future__ import annotations

import io
import shutil
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from django.conf import settings
from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
from django.core.management.base import BaseCommand, CommandError
from django.urls import NoReverseMatch, reverse
from django_scopes import scopes_disabled

from accounts.errors import ApiError
from accounts.models import Membership, Organization, User
from accounts.queries import organization_named
from batches.models import Batch
from batches.models.batches import Status
from models_registry.queries import offered_to
from portal import supervisor

SIZE = {"width": 1280, "height": 800}
COLOURS = 96
"""Of the palette: pages have few, and so the files stay below 100 KB."""
BACKEND = "allauth.account.auth_backends.AuthenticationBackend"


@dataclass(frozen=True)
class Shot:
    """One picture. `of` names what the address needs (see `_ids`); `operator`: by one of those."""

    name: str
    url_name: str
    of: str = ""
    operator: bool = False
    dark: bool = False


SHOTS = (
    Shot("home", "home"),
    Shot("batches", "batch_list"),
    Shot("batch", "batch_detail", of="batch"),
    Shot("new-batch", "batch_new"),
    Shot("model", "model", of="model"),
    Shot("usage", "usage"),
    Shot("webhooks", "webhooks"),
    Shot("queue", "operator_queue", operator=True),
    Shot("workers", "operator_workers", operator=True),
    Shot("home-dark", "home", dark=True),
)
"""At most ten; one that shows what is not there yet is left out, and said so."""


class Command(BaseCommand):
    help = "Take the pictures of docs/TOUR.md of the portal that runs on this DATA_DIR."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--organization", default="demo", metavar="SLUG")
        parser.add_argument("--to", type=Path, default=settings.BASE_DIR / "docs" / "tour")

    def handle(self, *args: Any, organization: str, to: Path, **options: Any) -> None:
        chromium = shutil.which("chromium")
        if chromium is None:
            raise CommandError("no chromium on the PATH (Debian: apt install chromium)")
        try:
            whose = organization_named(organization)
            address = supervisor.wait_ready(settings.DATA_DIR, timeout=5)
            with scopes_disabled():
                people, ids = _people(whose), _ids(whose)
        except (ApiError, TimeoutError) as error:
            raise CommandError(f"{error}; start ./run demo first") from error
        to.mkdir(parents=True, exist_ok=True)
        self._take(chromium, address, people, ids, to)

    def _take(
        self,
        chromium: str,
        address: str,
        people: Mapping[bool, User],
        ids: Mapping[str, str],
        to: Path,
    ) -> None:
        try:
            from playwright.sync_api import sync_playwright
        except ImportError as error:
            raise CommandError("playwright is not installed (requirements/test.txt)") from error
        paths = {shot: _path(shot, ids) for shot in SHOTS}
        # Playwright runs an event loop in this thread, in which Django refuses its database.
        cookies = {
            shot: {"name": settings.SESSION_COOKIE_NAME, "url": address, "value": _session(person)}
            for shot in SHOTS
            if (person := people.get(shot.operator))
        }
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=chromium, args=["--headless", "--no-sandbox", "--disable-gpu"]
            )
            for shot in SHOTS:
                if paths[shot] is None or shot not in cookies:
                    self.stderr.write(f"left out: {shot.name}")
                    continue
                context = browser.new_context(
                    viewport=SIZE,  # type: ignore[arg-type]
                    color_scheme="dark" if shot.dark else "light",
                    reduced_motion="reduce",
                )
                context.add_cookies([cookies[shot]])  # type: ignore[list-item]
                page = context.new_page()
                page.goto(f"{address}{paths[shot]}")
                page.wait_for_timeout(500)
                size = _keep(page.screenshot(), to / f"{shot.name}.png")
                self.stdout.write(f"{shot.name}.png {size / 1000:.0f} KB")
                context.close()
            browser.close()


def _people(organization: Organization) -> dict[bool, User]:
    """Who looks: the oldest owner, and (by True) an operator, where there is one."""
    rows = Membership.objects.filter(organization=organization).select_related("user")
    found = {False: rows.order_by("pk")[0].user}
    operator = User.objects.filter(is_staff=True, is_active=True).order_by("pk").first()
    return found | ({True: operator} if operator else {})


def _ids(organization: Organization) -> dict[str, str]:
    """What addresses need: the batch that shows most, and a model."""
    batches = Batch.objects.filter(organization=organization)
    finished = batches.filter(status=Status.COMPLETED).order_by("-total", "-pk").first()
    batch = batches.filter(status=Status.IN_PROGRESS).order_by("-completed").first() or finished
    model = batch.model if batch and batch.model else offered_to(organization).first()
    return {"batch": batch.pk if batch else "", "model": model.name if model else ""}


def _path(shot: Shot, ids: Mapping[str, str]) -> str | None:
    try:
        return reverse(shot.url_name, args=[ids[shot.of]] if shot.of else [])
    except NoReverseMatch:
        return None


def _session(person: User) -> str:
    """A session of the person's, as signing in makes it."""
    session = import_module(settings.SESSION_ENGINE).SessionStore()
    session[SESSION_KEY] = str(person.pk)
    session[BACKEND_SESSION_KEY] = BACKEND
    session[HASH_SESSION_KEY] = person.get_session_auth_hash()
    session.set_expiry(600)
    session.save()
    return str(session.session_key)


def _keep(png: bytes, path: Path) -> int:
    """Write it with a palette; returns the bytes that it has then."""
    from PIL import Image

    few = Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    return path.stat().st_size
