"""`/v1/auth/token`: who gets an access token, for what, and how it ends."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client
from django_scopes import scope

from accounts.models import AuditEvent, Project, RevokedToken
from accounts.services import keys, tokens
from tests.conftest import Person
from tests.wire import assert_refused, post

pytestmark = pytest.mark.django_db
HERE = "/v1/auth/token"
JWT_TYPE = "urn:ietf:params:oauth:token-type:access_token"


@pytest.fixture(autouse=True)
def forgotten() -> None:
    tokens._known.clear()


def bearer(text: str) -> Client:
    return Client(headers={"authorization": f"Bearer {text}"})


def made(api: Client, body: Any = b"", path: str = HERE) -> dict[str, Any]:
    response = post(api, path, body)
    assert response.status_code == 200, response.content
    return dict(response.json())


def works(text: str, path: str = "/v1/files") -> bool:
    return bool(bearer(text).get(path).status_code == 200)


def signed_in(person: Person, csrf: str = "t" * 32, *, header: str | None = None) -> Client:
    """A browser that checks what a real one would be checked for."""
    sent = {"x-csrftoken": csrf if header is None else header}
    client = Client(enforce_csrf_checks=True, headers=sent)
    client.force_login(person.user, backend="allauth.account.auth_backends.AuthenticationBackend")
    client.cookies["csrftoken"] = csrf
    return client


# --- Keys -----------------------------------------------------------------------------------


def test_a_key_becomes_a_token_of_all_its_scopes(owner: Person) -> None:
    response = post(owner.api, HERE, b"")
    answer = response.json()
    assert works(answer.pop("access_token"))
    assert answer == {
        "issued_token_type": JWT_TYPE,
        "token_type": "Bearer",
        "expires_in": 900,
        "scope": "files batches models.read inference",
    }
    assert "no-store" in response["Cache-Control"]


@pytest.mark.parametrize(
    "asked", [{"scopes": ["files.read", "files.read"]}, {"scope": "files.read"}]
)
def test_a_token_may_have_narrower_scopes(owner: Person, asked: dict[str, Any]) -> None:
    answer = made(owner.api, {"expires_in": 300, **asked})
    assert (answer["scope"], answer["expires_in"]) == ("files.read", 300)
    assert works(answer["access_token"])
    assert not works(answer["access_token"], "/v1/batches")


def test_an_oauth_form_does_as_well_as_json(owner: Person) -> None:
    form = "expires_in=600&scope=files.read+batches.read"
    response = owner.api.post(HERE, form, content_type="application/x-www-form-urlencoded")
    answer = response.json()
    assert (answer["scope"], answer["expires_in"]) == ("files.read batches.read", 600)


@pytest.mark.parametrize("scope", ["labels", "operator", "admin.read", "root", "\0"])
def test_a_token_has_no_scope_that_its_key_has_not(owner: Person, scope: str) -> None:
    refused = post(owner.api, HERE, {"scopes": [scope]})
    assert_refused(refused, 403, None, "scope_too_wide")


@pytest.mark.parametrize("seconds", [299, 3601, -1, 10**18, "soon", None])
def test_a_token_lives_5_to_60_minutes(owner: Person, seconds: Any) -> None:
    refused = post(owner.api, HERE, {"expires_in": seconds})
    assert_refused(refused, 400, "expires_in", "invalid_value")


def test_the_token_of_a_key_is_of_the_keys_project(owner: Person, stranger: Person) -> None:
    with scope(organization=owner.caller.organization):
        other = Project.objects.create(organization=owner.caller.organization, name="Other")
    own = {"project_id": owner.caller.project.pk}
    assert works(made(owner.api, own)["access_token"])
    refused = post(owner.api, HERE, {"project_id": other.pk})
    assert_refused(refused, 400, "project_id", "invalid_value")
    refused = post(owner.api, HERE, {"project_id": stranger.caller.project.pk})
    assert_refused(refused, 404, "project_id", "not_found")


def test_a_token_makes_no_token(owner: Person) -> None:
    text = made(owner.api)["access_token"]
    assert_refused(post(bearer(text), HERE, {}), 403, None, "token_from_token")


@pytest.mark.parametrize("body", [b"[]", b"{", b'"x"', b"\xff", b"{" * 1000, b"null"])
def test_a_body_that_is_no_object_is_told(owner: Person, body: bytes) -> None:
    assert post(owner.api, HERE, body).status_code == 400


def test_a_form_with_files_is_not_read(owner: Person) -> None:
    for client in (owner.api, signed_in(owner)):
        assert_refused(client.post(HERE, {"scope": "files"}), 400, None, "invalid_json")


@pytest.mark.parametrize("method", ["get", "put", "delete"])
def test_other_methods_are_not_answered(owner: Person, method: str) -> None:
    assert getattr(owner.api, method)(HERE).status_code == 405


def test_a_suspended_organization_gets_no_token(owner: Person) -> None:
    owner.caller.organization.suspended_at = owner.user.date_joined
    owner.caller.organization.save()
    assert_refused(post(owner.api, HERE, {}), 403, None, "organization_suspended")
    assert_refused(post(signed_in(owner), HERE, {}), 403, None, "organization_suspended")


# --- Sessions -------------------------------------------------------------------------------


def test_who_brings_nothing_is_told_what_to_bring() -> None:
    assert_refused(post(Client(), HERE, {}), 401, None, "missing_api_key")


def test_a_bad_key_is_refused_though_there_is_a_session(owner: Person) -> None:
    client = signed_in(owner)
    refused = post(client, HERE, {}, authorization="Bearer sk-no")
    assert_refused(refused, 401, None, "invalid_api_key")


def test_a_session_becomes_a_token_of_what_the_person_may_do(viewer: Person) -> None:
    answer = made(signed_in(viewer))
    assert answer["scope"] == "files.read batches.read models.read labels.read webhooks.read" + (
        " usage.read"
    )
    assert works(answer["access_token"])
    refused = post(bearer(answer["access_token"]), "/v1/batches", {})
    assert refused.status_code in (400, 403)


@pytest.mark.parametrize("header", ["", "wrong", "u" * 32])
def test_a_cookie_alone_does_not_do(owner: Person, header: str) -> None:
    assert_refused(post(signed_in(owner, header=header), HERE, {}), 403, None, "csrf_failed")


def test_a_session_from_another_site_does_not_do(owner: Person) -> None:
    client = signed_in(owner)
    refused = post(client, HERE, {}, origin="https://evil.test")
    assert_refused(refused, 403, None, "csrf_failed")
    assert post(client, HERE, {}, origin="http://testserver").status_code == 200


def test_a_person_chooses_one_of_their_projects(owner: Person, stranger: Person) -> None:
    with scope(organization=owner.caller.organization):
        other = Project.objects.create(organization=owner.caller.organization, name="Other")
    client = signed_in(owner)
    text = made(client, {"project_id": other.pk})["access_token"]
    claims = tokens.read_token(text)
    assert claims is not None
    assert claims.project_id == other.pk
    refused = post(client, HERE, {"project_id": stranger.caller.project.pk})
    assert_refused(refused, 404, "project_id", "not_found")


def test_a_member_gets_no_scope_above_their_role(teammate: Person) -> None:
    refused = post(signed_in(teammate), HERE, {"scopes": ["admin.read"]})
    assert_refused(refused, 403, None, "scope_too_wide")


def test_the_scope_of_operators_is_theirs_and_only_when_asked_for(owner: Person) -> None:
    client = signed_in(owner)
    refused = post(client, HERE, {"scopes": ["operator"]})
    assert_refused(refused, 403, None, "insufficient_role")
    owner.user.is_staff = True
    owner.user.save()
    assert "operator" not in made(client)["scope"].split()
    assert made(client, {"scopes": ["operator"]})["scope"] == "operator"


# --- Revoking -------------------------------------------------------------------------------

REVOKE = f"{HERE}/revoke"


def test_a_token_revokes_itself(owner: Person) -> None:
    text = made(owner.api)["access_token"]
    assert made(bearer(text), path=REVOKE) == {"revoked": True}
    assert not works(text)
    assert_refused(post(bearer(text), REVOKE, {}), 401, None, "invalid_token")


def test_its_maker_revokes_a_token(owner: Person) -> None:
    by_key = made(owner.api)["access_token"]
    by_person = made(signed_in(owner))["access_token"]
    for client, text in ((owner.api, by_key), (signed_in(owner), by_person)):
        assert works(text)
        for _ in range(2):
            assert made(client, {"token": text}, REVOKE) == {"revoked": True}
        assert not works(text)
    assert RevokedToken.objects.count() == 2


@pytest.mark.parametrize("text", ["", "x", "a.b.c", "\0.\0.\0", "sk-vbp-x", "x" * 16_384])
def test_what_is_no_token_counts_as_revoked(owner: Person, text: str) -> None:
    assert made(owner.api, {"token": text}, REVOKE) == {"revoked": True}
    assert RevokedToken.objects.count() == 0


def test_a_key_says_which_token(owner: Person) -> None:
    refused = post(owner.api, REVOKE, {})
    assert_refused(refused, 400, "token", "missing_required_parameter")


def test_somebody_elses_token_is_not_revoked(
    owner: Person, teammate: Person, stranger: Person
) -> None:
    text = made(owner.api)["access_token"]
    sister = made(owner.api)["access_token"]
    for client in (teammate.api, stranger.api, bearer(sister), signed_in(stranger)):
        refused = post(client, REVOKE, {"token": text})
        assert_refused(refused, 403, "token", "not_your_token")
    assert works(text)
    # Who looks after all keys may.
    their = made(teammate.api)["access_token"]
    assert made(signed_in(owner), {"token": their}, REVOKE) == {"revoked": True}
    assert not works(their)


def test_who_brings_nothing_revokes_nothing(owner: Person) -> None:
    text = made(owner.api)["access_token"]
    assert_refused(post(Client(), REVOKE, {"token": text}), 401, None, "missing_api_key")
    refused = post(signed_in(owner, header=""), REVOKE, {"token": text})
    assert_refused(refused, 403, None, "csrf_failed")


# --- The audit ------------------------------------------------------------------------------


def test_the_audit_tells_which_key_a_token_came_of_and_what_was_done_with_it(
    owner: Person,
) -> None:
    _, text = keys.create_api_key(
        project=owner.caller.project,
        name="admin",
        created_by=owner.user,
        scopes=["admin.write", "files"],
    )
    token = made(bearer(text))["access_token"]
    claims = tokens.read_token(token)
    assert claims is not None
    other, _ = keys.create_api_key(
        project=owner.caller.project, name="CI", created_by=owner.user, actor=owner.caller
    )
    there = f"/v1/organization/projects/{owner.caller.project.pk}/api_keys/{other.pk}"
    assert bearer(token).delete(there).status_code == 200
    made(bearer(token), path=REVOKE)
    with scope(organization=owner.caller.organization):
        events = [
            event
            for event in AuditEvent.objects.order_by("number")
            if event.action != "api_key.created"
        ][-3:]
    said = [(each.action, each.via, each.credential, each.target_label) for each in events]
    assert said == [
        ("token.created", "api_key", claims.subject, claims.jti),
        ("api_key.revoked", "token", claims.jti, str(other)),
        ("token.revoked", "token", claims.jti, claims.jti),
    ]
    assert token not in str([vars(event) for event in events])


def test_a_session_gets_no_operators_token_without_the_second_factor(
    owner: Person, settings: Any
) -> None:
    owner.user.is_staff = True
    owner.user.save()
    settings.OPERATOR_MFA_REQUIRED = True
    refused = post(signed_in(owner), HERE, {"scopes": ["operator"]})
    assert_refused(refused, 403, None, "second_factor_missing")


def test_a_sessions_token_ends_with_the_persons_password(owner: Person) -> None:
    token = made(signed_in(owner), {})["access_token"]
    of_key = made(owner.api)["access_token"]
    assert works(token)
    owner.user.set_password("another horse 7 staple")
    owner.user.save()
    assert (works(token), works(of_key)) == (False, True)
