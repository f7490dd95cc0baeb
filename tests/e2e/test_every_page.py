"""Every page there is, in Chromium: axe-core finds nothing serious, the console stays empty, and
nothing sticks out at the side of a phone; light and dark.

The routes are read from the URL resolver: a new page fails here until it has a row in `PAGES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from django.urls import get_resolver
from django.utils import timezone
from django_scopes import scopes_disabled
from playwright.sync_api import Browser, Page

from accounts.models import HourlyUse, Organization, Quota, UsageRecord, User
from accounts.services import invitations, issuers, keys, projects
from batches.models.batches import Status
from models_registry.models import Measurement
from models_registry.services import note_failure, register_model
from tests import test_tenancy
from tests.batches.conftest import Disk, disk  # noqa: F401 a fixture
from tests.batches.test_batch_pages import batch_of
from tests.conftest import Person
from tests.e2e.test_batches_page import DESKTOP, PHONE, SCHEMES
from tests.test_tenancy import Rows, routes, rows_of
from worker.models import Worker, WorkerState

pytestmark = [pytest.mark.slow, pytest.mark.django_db(transaction=True)]

AXE = Path(__file__).parent / "vendor" / "axe-core" / "axe.min.js"
RUN_AXE = """
async () => (await axe.run(document, { resultTypes: ["violations"] })).violations
    .filter((it) => ["serious", "critical"].includes(it.impact))
    .map((it) => `${it.id}: ${it.nodes.slice(0, 3).map((node) => node.target.join(" ")).join(" | ")}`)
"""
NOBODY, OWNER, OPERATOR = "nobody", "owner", "operator"
ONE_WORD, FROM_THE_RIGHT = "W" * 150, "مشروع الليل"
"""Names that are allowed, and that a page has to bear."""


@dataclass(frozen=True)
class Known:
    """What the addresses of pages are made of."""

    rows: Rows
    organization: str
    invitation: str


Address = Callable[[Known], str]


def same(route: str) -> Address:
    return lambda _: f"/{route}"


ADDRESSES: Mapping[str, tuple[str, Address]] = {
    "organization/handlers/new/<str:kind>": (OWNER, lambda _: "/organization/handlers/new/sql"),
    "operator/queue/change": (
        OPERATOR,
        lambda known: f"/operator/queue/change?action=hold&batch={known.rows.batch_id}",
    ),
    "invitations/<str:secret>": (NOBODY, lambda known: f"/invitations/{known.invitation}"),
    "accounts/^password/reset/key/(?P<uidb36>[0-9A-Za-z]+)-(?P<key>.+)/$": (
        NOBODY,
        lambda _: "/accounts/password/reset/key/1-bad/",
    ),
}
"""The pages with something of their own in their address: who looks at one, and where."""

OF_AN_ORGANIZATION = (
    "operator/organizations/<str:organization_id>",
    "operator/organizations/<str:organization_id>/limits",
    "operator/organizations/<str:organization_id>/moderation",
    "operator/organizations/<str:organization_id>/share",
)

PLAIN: Mapping[str, tuple[str, ...]] = {
    OWNER: (
        "",
        "batches",
        "batches/new",
        "files",
        "models",
        "organization",
        "organization/audit",
        "organization/handlers",
        "organization/keys",
        "organization/keys/new",
        "organization/limits",
        "organization/members",
        "organization/new",
        "organization/projects",
        "organization/retention",
        "organization/roles",
        "organization/sign-in",
        "organization/trusted-issuers",
        "organization/usage",
        "organization/webhooks",
        "organization/webhooks/deliveries",
        "organization/webhooks/new",
        "accounts/2fa/",
        "accounts/2fa/reauthenticate/",
        "accounts/2fa/totp/activate/",
        "accounts/2fa/webauthn/",
        "accounts/2fa/webauthn/add/",
        "accounts/3rdparty/",
        "accounts/email/",
        "accounts/logout/",
        "accounts/password/change/",
        "accounts/reauthenticate/",
        "accounts/sessions/",
    ),
    NOBODY: (
        "accounts/3rdparty/login/cancelled/",
        "accounts/3rdparty/login/error/",
        "accounts/inactive/",
        "accounts/login/",
        "accounts/organization/",
        "accounts/password/reset/",
        "accounts/password/reset/done/",
        "accounts/password/reset/key/done/",
        "accounts/signup/",
    ),
    OPERATOR: (
        "operator/audit",
        "operator/domains",
        "operator/leaked-keys",
        "operator/moderation",
        "operator/organizations",
        "operator/pauses",
        "operator/people",
        "operator/queue",
        "operator/system",
        "operator/usage",
        "operator/webhooks",
        "operator/workers",
    ),
}
"""The others, by who looks."""

NO_PAGES = {
    "healthz",
    "readyz",
    "metrics",
    ".well-known/jwks.json",
    "files/<str:file_id>/content",
    "organization/audit.jsonl",
    "organization/usage.csv",
    "operator/audit.jsonl",
    "accounts/2fa/recovery-codes/download/",
    "invitations/accept",  # where the link of an invitation leads to
    # What somebody sees only half-way: opened in test_sign_in.py.
    "accounts/2fa/authenticate/",
    "accounts/2fa/recovery-codes/",
    "accounts/2fa/recovery-codes/generate/",
    "accounts/2fa/totp/deactivate/",
    "accounts/2fa/webauthn/keys/<int:pk>/edit/",
    "accounts/2fa/webauthn/keys/<int:pk>/remove/",
    "accounts/2fa/webauthn/login/",
    "accounts/2fa/webauthn/reauthenticate/",
    "accounts/3rdparty/signup/",
    "accounts/confirm-email/",
    "accounts/login/code/confirm/",
    "accounts/oidc/^(?P<provider_id>[^/]+)/login/",
    "accounts/oidc/^(?P<provider_id>[^/]+)/login/callback/",
    "accounts/password/set/",
    # Older addresses of pages above.
    "accounts/social/connections/",
    "accounts/social/login/cancelled/",
    "accounts/social/login/error/",
    "accounts/social/signup/",
}
"""What a browser gets, but not as a page of ours that stands by itself."""


def of_rows(path: Callable[[Rows], str]) -> Address:
    return lambda known: path(known.rows)


def of_an_organization(route: str) -> Address:
    return lambda known: "/" + route.replace("<str:organization_id>", known.organization)


PAGES = {
    **ADDRESSES,
    **{route: (who, same(route)) for who in PLAIN for route in PLAIN[who]},
    **{route: (OPERATOR, of_an_organization(route)) for route in OF_AN_ORGANIZATION},
    # Those with the id of a tenant's row have an address where strangers are kept out.
    **{
        route: (OWNER, of_rows(path))
        for route, (method, path) in test_tenancy.PAGES.items()
        if method == "GET" and route not in NO_PAGES
    },
}

MISSING: Mapping[str, tuple[str, str]] = {
    "nothing here": (OWNER, "/nothing/here"),
    "no such model": (OWNER, "/models/none"),
    "first steps": ("newcomer", "/"),
    "first steps of batches": ("newcomer", "/batches"),
    "no organization": ("alone", "/batches"),
}
"""Pages that are no route's own."""


def answers_get(route: str, client: Client) -> bool:
    plain = re.sub(r"[$^]", "", re.sub(r"<int:.+?>", "0", route))
    path = "/" + re.sub(r"<.+?>|\(.+\)", "none_0", plain)
    return client.get(path).status_code != 405


def test_every_page_has_its_row_here(owner: Person, operator: User) -> None:
    desk = Client()
    desk.force_login(operator, backend="allauth.account.auth_backends.AuthenticationBackend")
    found = set()
    for route in set(routes(get_resolver().url_patterns)) - NO_PAGES:
        if not route.startswith(("v1/", "static/")) and answers_get(
            route, desk if route.startswith("operator/") else owner.browser
        ):
            found.add(route)
    assert found == set(PAGES)


@pytest.fixture
def known(owner: Person, disk: Disk, wakeups_sent: list[tuple[str, ...]]) -> Known:  # noqa: F811
    """An organization with something on every page."""
    rows, organization = rows_of(owner), owner.caller.organization
    _, link = invitations.invite(
        actor=owner.caller, organization=organization, email="new@acme.test", role="member"
    )
    now = timezone.now()
    model = register_model(name="vendor/large-model-70b-instruct", source="none", engine="instant")
    for at, status in enumerate(Status):
        fields = {
            "model": model,
            "status": status,
            "total": 1000,
            "completed": 90 * at,
            "failed": at % 3,
            f"{status}_at" if status != Status.VALIDATING else "created_at": now,
        }
        batch_of(
            owner, name="long-name-of-a-file-" * 4 + ".jsonl", metadata={"a": "b" * 200}, **fields
        )
    with scopes_disabled():
        Measurement.objects.create(
            model=model, gpu="NVIDIA H200", tokens_per_second=21_000, load_seconds=75
        )
        Quota.objects.create(organization=organization, tokens_per_month=50_000_000)
        numbers = {"requests": 7, "input_tokens": 700, "output_tokens": 900}
        UsageRecord.objects.create(
            organization=organization,
            project=owner.caller.project,
            day=now.date(),
            model=model.name,
            **numbers,
        )
        HourlyUse.objects.create(
            organization=organization,
            hour=now.replace(minute=0, second=0, microsecond=0),
            **numbers,
        )
        Worker.objects.create(
            name="gpu0",
            host="host-with-a-long-name.example",
            pid=1,
            state=WorkerState.RUNNING,
            loaded_model=model.name,
            started_at=now,
            heartbeat_at=now,
        )
    note_failure(model.name, why="does not fit")
    for name in (ONE_WORD, FROM_THE_RIGHT):
        project = projects.create_project(actor=owner.caller, name=name)
        keys.create_api_key(project=project, name=name, created_by=owner.user)
        trust = {"issuer": "https://ci.test", "audience": name, "subject_pattern": name}
        issuers.create_trusted_issuer(
            actor=owner.caller, project=project, name=name, scopes=["files"], **trust
        )
    User.objects.filter(pk=owner.user.pk).update(name=FROM_THE_RIGHT)
    Organization.objects.filter(pk=organization.pk).update(name=ONE_WORD)
    return Known(rows, organization.pk, link)


@pytest.fixture
def clients(owner: Person, operator: User, stranger: Person) -> Mapping[str, Client | None]:
    """A signed-in client for each who looks."""
    found: dict[str, Client | None] = {NOBODY: None, OWNER: owner.browser}
    others = {OPERATOR: operator, "alone": User.objects.create_user("alone@nowhere.test", "x")}
    for who, user in others.items():
        client = found[who] = Client()
        client.force_login(user, backend="allauth.account.auth_backends.AuthenticationBackend")
    return found | {"newcomer": stranger.browser}


class Look:
    """A page in every size and scheme; keeps what is wrong with it."""

    def __init__(self, page: Page, base_url: str) -> None:
        self.page, self.base_url = page, base_url
        self.wrong: list[str] = []
        page.on("pageerror", lambda error: self._complain(str(error)))
        page.on("console", lambda said: self._hear(said.type, said.text))

    def _hear(self, kind: str, text: str) -> None:
        # That a page which is not there has status 404 is no fault of the page.
        if kind in ("error", "warning") and "the server responded with a status of 4" not in text:
            self._complain(text)

    def _complain(self, text: str) -> None:
        self.wrong.append(f"{self.page.url}: {text}")

    def at(self, path: str) -> None:
        self.page.goto(self.base_url + path)
        for size, scheme in product((DESKTOP, PHONE), SCHEMES):
            self.page.set_viewport_size(size)
            self.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            for violation in self.page.evaluate(RUN_AXE):
                self._complain(f"{size['width']} {scheme}: {violation}")
            wide = self.page.evaluate("document.documentElement.scrollWidth")
            if wide != size["width"]:
                self._complain(f"{size['width']} {scheme}: {wide} pixels wide")


@pytest.fixture
def look(browser: Browser, live_server: Any) -> Iterator[Callable[[Client | None], Look]]:
    contexts = []

    def begin(client: Client | None) -> Look:
        context = browser.new_context()
        contexts.append(context)
        context.add_init_script(path=AXE)
        if client is not None:
            session = {"name": "sessionid", "value": client.cookies["sessionid"].value}
            context.add_cookies([{**session, "url": live_server.url}])
        return Look(context.new_page(), live_server.url)

    yield begin
    for context in contexts:
        context.close()


@pytest.mark.parametrize("who", [NOBODY, OWNER, OPERATOR, "newcomer", "alone"])
def test_nothing_is_wrong_with_any_page_of(
    who: str, known: Known, clients: Mapping[str, Client | None], look: Any
) -> None:
    here = look(clients[who])
    for _, path in (row for row in PAGES.values() if row[0] == who):
        here.at(path(known))
    for _, address in (row for row in MISSING.values() if row[0] == who):
        here.at(address)
    assert here.wrong == [], "\n".join(here.wrong)
