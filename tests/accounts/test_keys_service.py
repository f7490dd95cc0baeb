"""Services of keys: what their limits, their rotation and their commands come to."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from allauth.mfa.totp.internal.auth import TOTP, generate_totp_secret
from django.core.management import CommandError, call_command
from django.test import Client
from django.utils import timezone
from django_scopes import scope

from accounts.access import Caller
from accounts.errors import BadRequest, Forbidden
from accounts.models import ApiKey, Project, Quota
from accounts.queries import caller_of_key
from accounts.services import keys
from accounts.services.keys import checked_networks
from tests.conftest import Person

pytestmark = pytest.mark.django_db


def make(person: Person, **fields: Any) -> tuple[ApiKey, str]:
    return keys.create_api_key(
        **{
            "actor": person.caller,
            "project": person.caller.project,
            "name": "CI",
            "created_by": person.user,
            **fields,
        }
    )


def run(*arguments: str) -> str:
    """Exactly what the command printed on stdout."""
    out = io.StringIO()
    call_command(*arguments, stdout=out)
    return out.getvalue()


# --- Making ---------------------------------------------------------------------------------


def test_without_scopes_a_key_gets_the_usual_ones_that_its_maker_may_give(
    owner: Person, teammate: Person
) -> None:
    usual = ["files", "batches", "models.read", "inference"]
    assert [make(person)[0].scopes for person in (owner, teammate)] == [usual, usual]
    _, text = make(owner, scopes=["admin.write", "models.read"])
    admin = caller_of_key(text)
    assert keys.create_api_key(
        actor=admin, project=owner.caller.project, name="x", created_by=owner.user
    )[0].scopes == ["models.read"]


def test_a_key_for_somebody_else_is_not_made(owner: Person, teammate: Person) -> None:
    with pytest.raises(Forbidden, match="for oneself or for the project"):
        make(owner, created_by=teammate.user)


def test_a_service_key_needs_who_looks_after_all_keys(owner: Person, teammate: Person) -> None:
    with pytest.raises(Forbidden, match="everybody's keys"):
        make(teammate, created_by=None)
    assert make(owner, created_by=None)[0].created_by is None


def test_the_scope_operator_is_for_the_own_keys_of_operators(owner: Person) -> None:
    with pytest.raises(Forbidden, match="Only a platform operator's own key"):
        make(owner, scopes=["operator"])
    owner.user.is_staff = True
    owner.user.save()
    with pytest.raises(Forbidden, match="Only a platform operator's own key"):
        make(owner, scopes=["operator"], created_by=None)
    _, text = make(owner, scopes=["operator"])
    caller = caller_of_key(text)
    assert caller is not None
    assert caller.is_platform_operator


def test_an_operator_gets_the_scope_operator_only_with_the_second_factor(
    owner: Person, settings: Any
) -> None:
    owner.user.is_staff = True
    owner.user.save()
    settings.OPERATOR_MFA_REQUIRED = True
    with pytest.raises(Forbidden, match="two-factor authentication"):
        make(owner, scopes=["operator"])
    assert "operator" not in keys.scopes_to_give(owner.caller)
    TOTP.activate(owner.user, generate_totp_secret())
    assert make(owner, scopes=["operator"])[0].scopes == ["operator"]
    assert "operator" in keys.scopes_to_give(owner.caller)


def test_an_archived_project_gets_no_keys(owner: Person) -> None:
    with owner.caller.scope():
        project = Project.objects.create(
            organization=owner.caller.organization, name="Old", archived_at=timezone.now()
        )
    with pytest.raises(BadRequest, match="archived"):
        make(owner, project=project)


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("10.1.2.3/8", "10.0.0.0/8"),
        (" 192.0.2.7 ", "192.0.2.7/32"),
        ("2001:DB8::1/32", "2001:db8::/32"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("10.0.0.0/255.0.0.0", "10.0.0.0/8"),
    ],
)
def test_networks_have_one_spelling(text: str, network: str) -> None:
    assert checked_networks([text, text]) == [network]


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("10.9.9.9", True),
        ("::ffff:10.9.9.9", True),
        ("11.0.0.1", False),
        ("2001:db8::1", True),
        ("2001:db9::1", False),
        ("", False),
        ("unknown", False),
    ],
)
def test_a_key_works_from_its_networks_alone(address: str, allowed: bool) -> None:
    key = ApiKey(allowed_ips=["10.0.0.0/8", "2001:db8::/32"])
    assert key.allows_address(address) is allowed


# --- Rotating -------------------------------------------------------------------------------


def test_a_new_key_has_the_old_ones_settings_limits_and_lifetime(owner: Person) -> None:
    ends = timezone.now() + timedelta(days=10)
    old, _ = make(owner, scopes=["files"], allowed_ips=["127.0.0.1"], expires_at=ends)
    with owner.caller.scope():
        Quota.objects.create(
            organization=owner.caller.organization, api_key=old, requests_per_minute=7
        )
    new, _ = keys.rotate_api_key(actor=owner.caller, key=old, overlap=timedelta(hours=1))
    for name in ("name", "project", "created_by", "scopes", "allowed_ips"):
        assert getattr(new, name) == getattr(old, name)
    assert new.expires_at is not None
    assert timedelta(0) <= new.expires_at - ends < timedelta(minutes=1)
    with owner.caller.scope():
        quotas = Quota.objects.exclude(api_key=None).order_by("pk")
        assert [(each.api_key, each.requests_per_minute) for each in quotas] == [(old, 7), (new, 7)]
        old.refresh_from_db()
    assert old.expires_at is not None
    assert old.expires_at - timezone.now() < timedelta(hours=1, seconds=1)


def test_an_overlap_does_not_outlast_the_old_keys_own_end(owner: Person) -> None:
    ends = timezone.now() + timedelta(hours=1)
    old, _ = make(owner, expires_at=ends)
    keys.rotate_api_key(actor=owner.caller, key=old)
    with owner.caller.scope():
        assert ApiKey.objects.get(pk=old.pk).expires_at == ends


def revoke(person: Person, key: ApiKey) -> None:
    keys.revoke_api_key(actor=person.caller, key=key)


def rotate(person: Person, key: ApiKey) -> None:
    keys.rotate_api_key(actor=person.caller, key=key)


@pytest.mark.parametrize(("end", "state"), [(revoke, "revoked"), (rotate, "replaced")])
def test_a_key_that_has_ended_is_not_rotated(
    owner: Person, end: Callable[[Person, ApiKey], None], state: str
) -> None:
    key, _ = make(owner)
    end(owner, key)
    with pytest.raises(BadRequest, match=f"This key is {state}"):
        rotate(owner, key)


def test_rotating_anothers_key_gives_nobody_more_than_they_may(
    owner: Person, admin: Person
) -> None:
    owner.user.is_staff = True
    owner.user.save()
    key, _ = make(owner, scopes=["operator", "files"])
    with pytest.raises(Forbidden, match="another person's"):
        rotate(admin, key)


def test_nobody_gets_another_persons_secret_by_rotating_their_key(
    owner: Person, admin: Person
) -> None:
    theirs, service = make(owner)[0], make(owner, created_by=None)[0]
    with pytest.raises(Forbidden, match="revoke it, and they make a new one"):
        rotate(admin, theirs)
    new, _ = keys.rotate_api_key(actor=admin.caller, key=service)
    assert new.created_by is None
    revoke(admin, theirs)


def test_a_key_that_ends_with_the_calendar_can_be_rotated(owner: Person) -> None:
    key, _ = make(owner, expires_at=datetime.max.replace(tzinfo=UTC))
    assert keys.rotate_api_key(actor=owner.caller, key=key)[0].expires_at == key.expires_at


# --- What no key gives itself ----------------------------------------------------------------


def caller_by(person: Person, **fields: Any) -> Caller:
    """The caller of a new key of the person's that may make keys."""
    caller = caller_of_key(make(person, scopes=["admin.write", "files"], **fields)[1])
    assert caller is not None
    return caller


def test_a_token_makes_changes_and_rotates_no_key(owner: Person) -> None:
    key, _ = make(owner)
    for maker in (owner.caller, caller_by(owner)):
        by = replace(maker, token_id="t", scopes=("admin.write", "files"))
        for attempt in (
            lambda by=by: make(owner, actor=by, scopes=["files"]),
            lambda by=by: changed(by, key, name="x"),
            lambda by=by: keys.rotate_api_key(actor=by, key=key),
        ):
            with pytest.raises(Forbidden, match="A token cannot make, change or rotate"):
                attempt()


def changed(by: Caller, key: ApiKey, **fields: Any) -> ApiKey:
    now = {"name": key.name, "allowed_ips": key.allowed_ips, "expires_at": key.expires_at}
    return keys.update_api_key(actor=by, key=key, **now | fields)


def test_what_a_key_makes_has_its_networks_and_its_end_at_the_widest(owner: Person) -> None:
    ends = timezone.now() + timedelta(days=1)
    by = caller_by(owner, allowed_ips=["10.0.0.0/8"], expires_at=ends)
    key, _ = make(owner, actor=by, scopes=["files"])
    assert (key.allowed_ips, key.expires_at) == (["10.0.0.0/8"], ends)
    sooner = ends - timedelta(hours=1)
    key, _ = make(owner, actor=by, scopes=["files"], allowed_ips=["10.1.0.0/16"], expires_at=sooner)
    assert (key.allowed_ips, key.expires_at) == (["10.1.0.0/16"], sooner)
    for wider in (
        {"allowed_ips": ["0.0.0.0/0"]},
        {"allowed_ips": ["10.0.0.1", "::/0"]},
        {"expires_at": ends + timedelta(seconds=1)},
    ):
        with pytest.raises(Forbidden, match="more networks or a later end"):
            make(owner, actor=by, scopes=["files"], **wider)


def test_a_key_does_not_loosen_itself(owner: Person) -> None:
    ends = timezone.now() + timedelta(days=1)
    by = caller_by(owner, allowed_ips=["10.0.0.0/8"], expires_at=ends)
    assert by.api_key is not None
    for wider in ({"allowed_ips": []}, {"expires_at": None}, {"allowed_ips": ["::1"]}):
        with pytest.raises(Forbidden, match="more networks or a later end"):
            changed(by, by.api_key, **wider)
    assert changed(by, by.api_key, allowed_ips=["10.1.1.1"]).allowed_ips == ["10.1.1.1/32"]
    assert changed(owner.caller, by.api_key, allowed_ips=[], expires_at=None).allowed_ips == []


def test_a_key_does_not_outlive_itself_by_rotating(owner: Person) -> None:
    ends = timezone.now() + timedelta(days=1)
    by = caller_by(owner, expires_at=ends)
    assert by.api_key is not None
    assert keys.rotate_api_key(actor=by, key=by.api_key)[0].expires_at == ends


def test_a_bound_key_rotates_none_that_works_from_elsewhere(owner: Person) -> None:
    by, free = caller_by(owner, allowed_ips=["10.0.0.0/8"]), make(owner, scopes=["files"])[0]
    with pytest.raises(Forbidden, match="more networks or a later end"):
        keys.rotate_api_key(actor=by, key=free)


def test_another_persons_key_is_tightened_but_not_loosened(owner: Person, admin: Person) -> None:
    ends = timezone.now() + timedelta(days=1)
    key, _ = make(owner, allowed_ips=["10.0.0.0/8"], expires_at=ends)
    for wider in ({"allowed_ips": []}, {"allowed_ips": ["9.0.0.0/8"]}, {"expires_at": None}):
        with pytest.raises(Forbidden, match="may be tightened, not loosened"):
            changed(admin.caller, key, **wider)
    assert changed(admin.caller, key, allowed_ips=["10.0.0.1"]).allowed_ips == ["10.0.0.1/32"]


# --- Revoking is at once, everywhere ---------------------------------------------------------


def test_nothing_of_a_key_is_remembered_between_requests(owner: Person) -> None:
    """Each request reads the key from the database: there is no cache that could be late."""
    one, other = (Client(headers={"authorization": f"Bearer {owner.key}"}) for _ in range(2))
    assert [client.get("/v1/files").status_code for client in (one, other)] == [200, 200]
    with owner.caller.scope():
        key = ApiKey.objects.get(created_by=owner.user)
    keys.revoke_api_key(actor=owner.caller, key=key)
    assert [client.get("/v1/files").status_code for client in (one, other)] == [401, 401]


# --- Commands -------------------------------------------------------------------------------


def key_of(text: str) -> ApiKey:
    caller = caller_of_key(text.removesuffix("\n"))
    assert caller is not None
    assert caller.api_key is not None
    return caller.api_key


def test_create_api_key_takes_all_that_a_key_has(owner: Person) -> None:
    with scope(organization=owner.caller.organization):
        project = Project.objects.create(organization=owner.caller.organization, name="Evals")
    options = ["--org", "acme", "--name", "CI", "--expires-days", "7", "--allow-ip", "10.0.0.1/8"]
    for named in ("Evals", project.pk):
        key = key_of(run("create_api_key", *options, "--project", named, "--service"))
        assert (key.project, key.created_by, key.allowed_ips) == (project, None, ["10.0.0.0/8"])
        assert key.expires_at is not None
        assert key.expires_at - timezone.now() > timedelta(days=6, hours=23)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--project", "Nowhere"], "There is no project 'Nowhere'"),
        (["--expires-days", "0"], "--expires-days must be"),
        (["--allow-ip", "x"], "No IP address or network: 'x'"),
    ],
)
def test_create_api_key_says_what_is_wrong(owner: Person, option: list[str], said: str) -> None:
    with pytest.raises(CommandError, match=said):
        run("create_api_key", "--org", "acme", "--name", "CI", *option)


def test_keys_are_revoked_by_command_by_id_and_by_prefix(owner: Person) -> None:
    for by in ("pk", "prefix", "redacted"):
        key, text = make(owner)
        named = "-".join(text.split("-")[:3]) if by == "redacted" else getattr(key, by)
        assert run("revoke_api_key", named) == f"{key.pk}\n"
        assert caller_of_key(text) is None


def test_a_key_is_rotated_by_command(owner: Person) -> None:
    key, old = make(owner)
    new = run("rotate_api_key", key.prefix, "--overlap-hours", "0")
    assert caller_of_key(old) is None
    assert key_of(new).name == "CI"
    with pytest.raises(CommandError, match="This key is expired"):
        run("rotate_api_key", key.pk)


@pytest.mark.parametrize("command", ["revoke_api_key", "rotate_api_key"])
def test_a_key_that_is_not_there_is_told(command: str) -> None:
    with pytest.raises(CommandError, match="There is no such key"):
        run(command, "key_0")
