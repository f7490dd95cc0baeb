"""The permanent cast of people, and the running portal that tests of the whole share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from django.conf import settings as django_settings
from django.test import Client
from django_scopes import scope

from accounts.access import Caller
from accounts.models import Membership, Organization, Project, Role, User
from accounts.queries import caller_of_user
from accounts.services import keys, organizations
from batches import wakeups
from batches.services import leases
from models_registry.models import Model
from models_registry.services import register_model
from portal.storage_url import store_of
from tests import stack as stacks

if TYPE_CHECKING:  # it takes seconds to import, and few tests need it
    from tests.s3 import Bucket, S3Server

PASSWORD = "correct horse 9 battery"

# Argon2 takes its time on purpose, and every test makes people.
django_settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

# The same examples every time, and as long as a busy machine needs for them.
hypothesis.settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")


@dataclass
class Person:
    """Somebody of the cast, with their key and a signed-in browser's client."""

    user: User
    caller: Caller
    key: str

    @property
    def api(self) -> Client:
        return Client(headers={"authorization": f"Bearer {self.key}"})

    @property
    def browser(self) -> Client:
        client = Client()
        client.force_login(self.user, backend="allauth.account.auth_backends.AuthenticationBackend")
        return client


@pytest.fixture(autouse=True)
def _forgotten_looks() -> None:
    """What a worker saw of the queue in one test is not what it sees in the next."""
    leases._last_looks.clear()


@pytest.fixture
def acme(db: None) -> Organization:
    organization, _ = organizations.create_organization(
        name="Acme", owner_email="owner@acme.test", password=PASSWORD
    )
    return organization


@pytest.fixture
def globex(db: None) -> Organization:
    organization, _ = organizations.create_organization(
        name="Globex", owner_email="stranger@globex.test", password=PASSWORD
    )
    return organization


@pytest.fixture
def owner(acme: Organization) -> Person:
    return _person(User.objects.get(email="owner@acme.test"), acme)


@pytest.fixture
def teammate(acme: Organization) -> Person:
    return _joined("teammate@acme.test", acme, Role.MEMBER)


@pytest.fixture
def viewer(acme: Organization) -> Person:
    return _joined("viewer@acme.test", acme, Role.VIEWER)


@pytest.fixture
def admin(acme: Organization) -> Person:
    return _joined("admin@acme.test", acme, Role.ADMIN)


@pytest.fixture
def reviewer(acme: Organization) -> Person:
    return _joined("reviewer@acme.test", acme, Role.REVIEWER)


@pytest.fixture
def stranger(globex: Organization) -> Person:
    """Of another organization, which has data that could leak."""
    return _person(User.objects.get(email="stranger@globex.test"), globex)


@pytest.fixture
def operator(db: None) -> User:
    return User.objects.create_superuser("operator@portal.test", PASSWORD)


@pytest.fixture
def echo(db: None) -> Model:
    """The instant model that repeats what it is told."""
    return register_model(name="echo", source="none", engine="instant")


@pytest.fixture
def wakeups_sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The wake-ups that were to be sent, as (task, *arguments); none of them goes out."""
    sent: list[tuple[str, ...]] = []
    monkeypatch.setattr(wakeups, "_send", lambda *said: sent.append(said))
    return sent


@pytest.fixture
def own_storage(tmp_path: Path, settings: Any) -> Path:
    """A storage of the test's own, empty; returns its folder."""
    root = tmp_path / "storage"
    settings.FILE_UPLOAD_TEMP_DIR = root / "incoming"
    settings.FILE_UPLOAD_TEMP_DIR.mkdir(parents=True)
    default = settings.STORAGES["default"] | {"OPTIONS": {"location": root}}
    settings.STORAGES = settings.STORAGES | {"default": default}
    return root


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    from tests.s3 import S3Server

    server = S3Server()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def bucket(
    s3_server: S3Server, tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> Bucket:
    """A storage of the test's own in an empty bucket."""
    from tests.s3 import CREDENTIALS

    made = s3_server.bucket()
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    store = store_of(made.url, tmp_path)
    store.spool.mkdir()
    settings.FILE_UPLOAD_TEMP_DIR = store.spool
    default = {"BACKEND": store.backend, "OPTIONS": store.options}
    settings.STORAGES = settings.STORAGES | {"default": default}
    made.asked()
    return made


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stacks.Stack]:
    """A whole running portal with the model `echo`; for tests that do not kill its parts."""
    receivers = {"WEBHOOK_PRIVATE_HOSTS": "127.0.0.1"}
    with stacks.running(tmp_path_factory.mktemp("stack"), **receivers) as running:
        running.instant("echo")
        yield running


def _joined(email: str, organization: Organization, role: str) -> Person:
    user = User.objects.create_user(email, PASSWORD)
    with scope(organization=organization):
        Membership.objects.create(organization=organization, user=user, role=role)
    return _person(user, organization)


def _person(user: User, organization: Organization) -> Person:
    caller = caller_of_user(user, organization.slug)
    assert caller is not None
    with scope(organization=organization):
        project = Project.objects.get()
    _, key = keys.create_api_key(project=project, name=user.email, created_by=user)
    return Person(user, caller, key)
