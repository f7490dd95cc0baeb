"""The check of leaked keys: for operators alone, and it says and logs nothing of the texts."""

from __future__ import annotations

from typing import Any

import pytest
from allauth.mfa.totp.internal.auth import TOTP, generate_totp_secret
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from accounts import keys as form
from accounts.keys import KeyText
from accounts.models import ApiKey, AuditEvent
from accounts.services import keys
from tests.conftest import Person
from tests.wire import assert_refused, post

pytestmark = pytest.mark.django_db
API, PAGE = "/v1/operator/leaked_keys", "/operator/leaked-keys"


@pytest.fixture
def staff(owner: Person) -> Person:
    """An operator who is also of an organization, so that they can have a key."""
    owner.user.is_staff = True
    owner.user.save()
    return owner


def api_of(person: Person, *scopes: str) -> Client:
    _, text = keys.create_api_key(
        project=person.caller.project,
        name="ops",
        created_by=person.user,
        scopes=scopes or ["operator"],
    )
    return Client(headers={"authorization": f"Bearer {text}"})


def key_of(person: Person) -> ApiKey:
    with person.caller.scope():
        return ApiKey.objects.filter(created_by=person.user).order_by("pk")[0]


def of_another_secret(person: Person) -> str:
    return str(KeyText(key_of(person).prefix, form.make().secret))


def asked(client: Client, *texts: str, **more: Any) -> list[dict[str, Any]]:
    response = post(client, API, {"keys": list(texts), **more})
    assert response.status_code == 200, response.content
    return list(response.json()["data"])


def test_a_key_of_any_organization_is_found_and_nothing_else(
    staff: Person, stranger: Person
) -> None:
    texts = [
        "hello",
        stranger.key,
        of_another_secret(stranger),
        str(form.make()),
        f" {staff.key}\n",
    ]
    found = asked(api_of(staff), *texts)
    assert [each["known"] for each in found] == [False, True, False, False, True]
    key = key_of(stranger)
    assert found[1] == {
        "index": 1,
        "known": True,
        "live": True,
        "state": "active",
        "id": key.pk,
        "name": "stranger@globex.test",
        "redacted_value": f"sk-vbp-{key.prefix}-•••",
        "organization_id": stranger.caller.organization.pk,
        "organization_name": "Globex",
        "project_id": stranger.caller.project.pk,
        "project_name": "Default",
    }


def test_a_thousand_texts_take_one_look(staff: Person, stranger: Person) -> None:
    api = api_of(staff)
    asked(api, "x")

    def count(*texts: str) -> int:
        with CaptureQueriesContext(connection) as queries:
            asked(api, *texts)
        return len(queries)

    many = [stranger.key, staff.key, *(str(form.make()) for _ in range(998))]
    assert count(*many) == count(stranger.key)


def test_what_works_is_revoked_when_asked_and_its_organization_reads_so(
    staff: Person, stranger: Person
) -> None:
    (found,) = asked(api_of(staff), stranger.key, revoke=True)
    assert (found["state"], found["live"]) == ("revoked", False)
    assert stranger.api.get("/v1/files").status_code == 401
    with stranger.caller.scope():
        event = AuditEvent.objects.order_by("-number")[0]
    assert (event.action, event.actor, event.target_id) == (
        "api_key.revoked_as_leaked",
        staff.user,
        key_of(stranger).pk,
    )


def test_without_being_asked_nothing_is_revoked(staff: Person, stranger: Person) -> None:
    asked(api_of(staff), stranger.key)
    assert stranger.api.get("/v1/files").status_code == 200


def test_an_expired_key_is_known_but_not_live(staff: Person, stranger: Person) -> None:
    with stranger.caller.scope():
        ApiKey.objects.update(expires_at=timezone.now())
    (found,) = asked(api_of(staff), stranger.key)
    assert (found["known"], found["live"], found["state"]) == (True, False, "expired")


def test_only_operators_may_look(owner: Person, stranger: Person) -> None:
    assert_refused(post(owner.api, API, {"keys": ["x"]}), 403, None, "insufficient_scope")
    keyed = api_of(owner, "admin.write")
    with owner.caller.scope():  # the scope alone makes nobody an operator
        ApiKey.objects.filter(name="ops").update(scopes=["operator"])
    assert_refused(post(keyed, API, {"keys": ["x"]}), 403, None, "insufficient_scope")
    owner.user.is_staff = True
    owner.user.save()
    assert_refused(post(owner.api, API, {"keys": ["x"]}), 403, None, "insufficient_scope")
    assert post(keyed, API, {"keys": ["x"]}).status_code == 200


@pytest.mark.parametrize(
    "texts", [[], ["x"] * 1001, [7], ["x" * 501], "sk-vbp-x", None, [["x"]], {"a": "b"}]
)
def test_bad_input_is_told(staff: Person, texts: Any) -> None:
    response = post(api_of(staff), API, {"keys": texts})
    assert response.status_code == 400
    assert response.json()["error"]["param"].partition(".")[0] == "keys"


def test_hostile_texts_are_no_keys(staff: Person) -> None:
    hostile = ["", "\0", "sk-vbp-\0", "é" * 60, str(KeyText("0123456789abcde\0", "s" * 40))]
    assert {each["known"] for each in asked(api_of(staff), *hostile)} == {False}


def test_the_texts_are_in_no_log_and_no_answer(
    staff: Person, stranger: Person, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    response = post(api_of(staff), API, {"keys": [stranger.key], "revoke": True})
    refused = post(api_of(staff), API, {"keys": [stranger.key, 7]})
    page = staff.browser.post(PAGE, {"keys": stranger.key})
    secret = stranger.key[-46:]
    said = [each.content.decode() for each in (response, refused, page)]
    assert not [text for text in [*said, caplog.text, *capfd.readouterr()] if secret in text]


# --- The page -------------------------------------------------------------------------------


def test_the_page_says_which_texts_are_keys(staff: Person, stranger: Person) -> None:
    texts = f"{stranger.key}\nhello\n{of_another_secret(stranger)}"
    response = staff.browser.post(PAGE, {"keys": texts})
    page = response.content.decode()
    assert "1 of 3 texts is a key of ours." in page
    assert "Globex" in page
    assert "no-store" in response["Cache-Control"]
    assert stranger.api.get("/v1/files").status_code == 200


def test_the_page_revokes_when_asked(staff: Person, stranger: Person) -> None:
    response = staff.browser.post(PAGE, {"keys": stranger.key, "revoke": "on"})
    assert "1 of them worked and are revoked." in response.content.decode()
    assert stranger.api.get("/v1/files").status_code == 401
    with stranger.caller.scope():
        event = AuditEvent.objects.order_by("-number")[0]
    assert (event.action, event.via) == ("api_key.revoked_as_leaked", "operator")


def test_the_page_asks_before_it_revokes(staff: Person) -> None:
    page = staff.browser.get(PAGE).content.decode()
    before, _, asked_for = page.partition("Revoke every key among these texts?")
    assert 'name="revoke"' not in before
    assert '<button class="btn btn-danger" name="revoke" value="on">' in asked_for


def test_the_page_takes_at_most_a_thousand(staff: Person) -> None:
    texts = "\n".join(f"x{number}" for number in range(1001))
    response = staff.browser.post(PAGE, {"keys": texts})
    assert response.status_code == 400
    assert "These are more than 1,000." in response.content.decode()


def test_the_page_is_for_operators(owner: Person) -> None:
    assert owner.browser.get(PAGE).status_code == 404
    assert owner.browser.post(PAGE, {"keys": "x"}).status_code == 404


def test_an_operators_key_opens_nothing_without_the_second_factor(
    staff: Person, settings: Any
) -> None:
    api = api_of(staff)
    settings.OPERATOR_MFA_REQUIRED = True
    assert_refused(post(api, API, {"keys": ["hello"]}), 403, None, "second_factor_missing")
    TOTP.activate(staff.user, generate_totp_secret())
    assert asked(api, "hello")[0]["known"] is False
