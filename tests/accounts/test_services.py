"""Writes about callers."""

from __future__ import annotations

import pytest
from django.db import IntegrityError, connection, transaction
from django_scopes import scope, scopes_disabled

from accounts.errors import BadRequest
from accounts.models import ApiKey, Membership, Organization, Project, Scope, User
from accounts.services import keys, organizations
from batches.models import File
from tests.conftest import Person

pytestmark = pytest.mark.django_db


def test_an_organization_comes_with_its_project_and_its_owner() -> None:
    organization, owner = organizations.create_organization(
        name="Acme & Söhne", owner_email="Ann@Acme.Test", password="correct horse"
    )
    assert (organization.name, organization.slug) == ("Acme & Söhne", "acme-sohne")
    assert owner.check_password("correct horse")
    with scope(organization=organization):
        assert [project.name for project in Project.objects.all()] == ["Default"]
        assert [(each.user, each.role) for each in Membership.objects.all()] == [(owner, "owner")]


def test_a_person_who_is_known_stays_who_they_are(owner: Person) -> None:
    _, again = organizations.create_organization(
        name="Second", owner_email="OWNER@acme.test", password="something else"
    )
    assert again == owner.user
    assert not again.check_password("something else")
    assert User.objects.count() == 1


def test_without_a_password_nobody_signs_in() -> None:
    _, owner = organizations.create_organization(name="Acme", owner_email="ann@acme.test")
    assert not owner.has_usable_password()


@pytest.mark.parametrize("name", ["", "  ", "!!!", "---", "東京"])
def test_a_name_needs_letters_or_digits(name: str) -> None:
    with pytest.raises(BadRequest) as caught:
        organizations.create_organization(name=name, owner_email="ann@acme.test")
    assert caught.value.param == "name"
    assert (Organization.objects.count(), User.objects.count()) == (0, 0)


def test_a_name_that_is_taken_changes_nothing(owner: Person) -> None:
    with pytest.raises(BadRequest, match="There is already an organization 'acme'"):
        organizations.create_organization(name="ACME!", owner_email="new@acme.test")
    assert User.objects.count() == 1


def test_emails_are_one_whatever_their_case(owner: Person) -> None:
    with pytest.raises(IntegrityError), transaction.atomic():
        User.objects.create_user("OWNER@ACME.TEST", "x")


def test_a_key_has_the_scopes_that_were_asked_for(owner: Person) -> None:
    project = owner.caller.project
    some, _ = keys.create_api_key(project=project, name="some", scopes=["files.read"])
    full, text = keys.create_api_key(project=project, name="full", created_by=owner.user)
    assert some.scopes == ["files.read"]
    assert set(full.scopes) == {Scope.FILES, Scope.BATCHES, Scope.MODELS_READ, Scope.INFERENCE}
    assert full.scopes == keys.FULL_SCOPES
    assert (full.created_by, full.organization) == (owner.user, owner.caller.organization)
    assert f"-{full.prefix}-" in text


def test_an_unknown_scope_is_refused(owner: Person) -> None:
    with pytest.raises(BadRequest) as caught:
        keys.create_api_key(project=owner.caller.project, name="x", scopes=["files", "root"])
    assert caught.value.param == "scope"
    assert caught.value.message.startswith("Unknown scope 'root'")
    with scopes_disabled():
        assert ApiKey.objects.filter(name="x").count() == 0


def test_a_row_cannot_join_two_tenants(owner: Person, stranger: Person) -> None:
    """A scoped manager would not stop this; the database does."""

    @transaction.atomic
    def join() -> None:
        File(
            organization=owner.caller.organization,
            project=stranger.caller.project,
            filename="x",
            purpose="batch",
            bytes=1,
            storage_name="x",
        ).save()
        connection.check_constraints()

    with pytest.raises(IntegrityError, match="same_organization"):
        join()
