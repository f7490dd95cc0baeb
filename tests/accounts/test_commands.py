"""`create_org` and `create_api_key`: what they print, and what they refuse."""

from __future__ import annotations

import io

import pytest
from django.core.management import CommandError, call_command
from django_scopes import scope

from accounts.models import ApiKey, Organization, User
from accounts.queries import caller_of_key
from tests.conftest import PASSWORD, Person

pytestmark = pytest.mark.django_db


def run(*arguments: str) -> str:
    """Exactly what the command printed on stdout."""
    out = io.StringIO()
    call_command(*arguments, stdout=out)
    return out.getvalue()


def stdin(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_create_org_prints_the_slug_and_nothing_else() -> None:
    assert run("create_org", "Acme Inc.", "--owner", "ann@acme.test") == "acme-inc\n"
    assert not User.objects.get(email="ann@acme.test").has_usable_password()


@pytest.mark.parametrize("end", ["\n", "\r\n", "", "\nsecond line\n"])
def test_the_password_is_the_first_line_of_stdin(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    stdin(monkeypatch, PASSWORD + end)
    run("create_org", "Acme", "--owner", "ann@acme.test", "--password-stdin")
    assert User.objects.get(email="ann@acme.test").check_password(PASSWORD)


@pytest.mark.parametrize("password", ["", "short", "password123"])
def test_a_weak_password_makes_nothing(monkeypatch: pytest.MonkeyPatch, password: str) -> None:
    stdin(monkeypatch, password)
    with pytest.raises(CommandError, match="password"):
        run("create_org", "Acme", "--owner", "ann@acme.test", "--password-stdin")
    assert (Organization.objects.count(), User.objects.count()) == (0, 0)


@pytest.mark.parametrize("email", ["", "ann", "ann@", "a b@acme.test", "a@\u0660a\u05d0.test"])
def test_an_email_that_is_none_makes_nothing(email: str) -> None:
    with pytest.raises(CommandError, match="not an email address"):
        run("create_org", "Acme", "--owner", email)
    assert Organization.objects.count() == 0


def test_a_name_that_is_taken_is_told(owner: Person) -> None:
    with pytest.raises(CommandError, match=r"^There is already an organization 'acme'\.$"):
        run("create_org", "acme", "--owner", "ann@acme.test")


def test_create_api_key_prints_a_key_that_works_and_nothing_else(owner: Person) -> None:
    printed = run("create_api_key", "--org", "acme", "--name", "CI")
    caller = caller_of_key(printed.removesuffix("\n"))
    assert caller is not None
    assert (caller.organization.slug, caller.user) == ("acme", owner.user)
    assert printed.count("\n") == 1


def test_create_api_key_makes_the_key_of_a_member_that_is_named(
    owner: Person, teammate: Person
) -> None:
    printed = run("create_api_key", "--org=acme", "--name=CI", "--owner=Teammate@acme.test")
    caller = caller_of_key(printed.removesuffix("\n"))
    assert caller is not None
    assert (caller.user, caller.role) == (teammate.user, "member")


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ([], "owner who can sign in"),
        (["--owner=owner@acme.test"], "member 'owner@acme.test'"),
        (["--owner=stranger@globex.test"], "member 'stranger@globex.test'"),
    ],
)
def test_create_api_key_makes_no_service_key_unasked(
    flags: list[str], missing: str, owner: Person, stranger: Person
) -> None:
    User.objects.filter(pk=owner.user.pk).update(is_active=False)
    with pytest.raises(CommandError) as caught:
        run("create_api_key", "--org=acme", "--name=CI", *flags)
    assert str(caught.value) == f"acme has no {missing}: use --service, or --owner EMAIL."
    run("create_api_key", "--org=acme", "--name=CI", "--service")
    with scope(organization=owner.caller.organization):
        assert ApiKey.objects.get(name="CI").created_by is None


def test_create_api_key_takes_scopes(owner: Person) -> None:
    scopes = ["--scope", "files", "--scope", "batches.read"]
    run("create_api_key", "--org", "acme", "--name", "CI", *scopes)
    with scope(organization=owner.caller.organization):
        assert ApiKey.objects.get(name="CI").scopes == ["files", "batches.read"]


def test_create_api_key_refuses_an_unknown_scope(owner: Person) -> None:
    with pytest.raises(CommandError, match="Unknown scope 'root'"):
        run("create_api_key", "--org", "acme", "--name", "CI", "--scope", "root")


def test_create_api_key_needs_an_organization_that_is_there() -> None:
    with pytest.raises(CommandError, match=r"^There is no organization 'nobody'\.$"):
        run("create_api_key", "--org", "nobody", "--name", "CI")
