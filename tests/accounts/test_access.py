"""The one door to tenant data: who may have which row, and who may change it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from django_scopes.exceptions import ScopeError

from accounts import access, roles
from accounts.access import Caller
from accounts.errors import Forbidden, NotFound
from accounts.models import Role, Scope
from batches.models import Batch, File
from tests import jobs
from tests.conftest import Person

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("own_storage", "wakeups_sent")]

READS = ["files.read", "batches.read", "models.read"]
WRITES = ["files", "batches", "inference"]


# --- Rows -----------------------------------------------------------------------------------


def test_everybody_of_the_organization_gets_its_rows(
    owner: Person, teammate: Person, viewer: Person
) -> None:
    file = jobs.stored(owner.caller, b"{}\n")
    for person in (owner, teammate, viewer):
        assert access.get(person.caller, File, file.pk) == file


def test_a_strangers_row_and_a_missing_one_are_the_same_404(
    owner: Person, stranger: Person
) -> None:
    theirs = jobs.stored(stranger.caller, b"{}\n")
    said = []
    for id in (theirs.pk, "file-missing"):
        with pytest.raises(NotFound) as caught:
            access.get(owner.caller, File, id, param="file_id")
        error = caught.value
        said.append((error.status, error.message.replace(id, "ID"), error.param, error.code))
    assert said == [(404, "No such file: 'ID'", "file_id", "not_found")] * 2
    assert access.get(stranger.caller, File, theirs.pk) == theirs


def test_a_row_of_another_kind_is_no_row(owner: Person) -> None:
    file = jobs.stored(owner.caller, b"{}\n")
    with pytest.raises(NotFound):
        access.get(owner.caller, Batch, file.pk)


def test_further_conditions_hold(owner: Person) -> None:
    file = jobs.stored(owner.caller, b"{}\n")
    with owner.caller.scope():
        File.objects.update(deleted_at=file.created_at)
    with pytest.raises(NotFound):
        access.get(owner.caller, File, file.pk, deleted_at=None)


@pytest.mark.parametrize("id", ["", "\0", "file-\0", "x" * 10_000, "é", "' OR 1=1 --", "%", "\n"])
def test_a_strange_id_is_a_404(owner: Person, id: str) -> None:
    jobs.stored(owner.caller, b"{}\n")
    with pytest.raises(NotFound) as caught:
        access.get(owner.caller, File, id)
    assert len(caught.value.message) < 150


def test_related_rows_come_along(owner: Person, django_assert_num_queries: object) -> None:
    file = jobs.stored(owner.caller, b"{}\n")
    with django_assert_num_queries(1):  # type: ignore[operator]
        found = access.get(owner.caller, File, file.pk, related=("project",))
        assert found.project == owner.caller.project


def test_outside_a_scope_tenants_rows_cannot_be_read(owner: Person) -> None:
    with pytest.raises(ScopeError):
        File.objects.count()
    with owner.caller.scope():
        assert File.objects.count() == 0


# --- Roles and scopes -----------------------------------------------------------------------


@pytest.mark.parametrize("role", Role.values)
@pytest.mark.parametrize("needed", [*READS, *WRITES])
def test_a_role_may_look_and_some_may_touch(owner: Person, role: str, needed: str) -> None:
    caller = replace(owner.caller, role=role)
    if needed in roles.ROLES[role]:
        caller.require(needed)
    else:
        with pytest.raises(Forbidden) as caught:
            caller.require(needed)
        assert (caught.value.status, caught.value.code) == (403, "insufficient_role")


@pytest.mark.parametrize(
    ("scopes", "allowed"),
    [
        ([], set()),
        (["files"], {"files", "files.read"}),
        (["files.read"], {"files.read"}),
        (["batches"], {"batches", "batches.read"}),
        (["batches.read", "files"], {"batches.read", "files", "files.read"}),
        (["models.read"], {"models.read"}),
        (["inference"], {"inference"}),
        (Scope.values, {*READS, *WRITES}),
    ],
)
def test_a_key_may_what_its_scopes_say(owner: Person, scopes: list[str], allowed: set[str]) -> None:
    caller = replace(owner.caller, role="", scopes=tuple(scopes))
    found = set()
    for needed in (*READS, *WRITES):
        try:
            caller.require(needed)
            found.add(needed)
        except Forbidden as error:
            assert (error.status, error.code) == (403, "insufficient_scope")  # noqa: PT017
    assert found == allowed


def test_a_keys_scopes_bind_though_its_maker_may_do_more(owner: Person) -> None:
    caller = replace(owner.caller, scopes=("files.read",))
    with pytest.raises(Forbidden):
        caller.require("files")


@pytest.mark.parametrize("needed", [*READS, *WRITES])
def test_who_is_neither_member_nor_key_may_nothing(owner: Person, needed: str) -> None:
    nobody = Caller(owner.caller.organization, owner.caller.project, owner.user)
    with pytest.raises(Forbidden):
        nobody.require(needed)
