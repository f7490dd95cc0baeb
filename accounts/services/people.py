"""What platform operators decide about people: whether they may come in, and who operates."""

from __future__ import annotations

from django.db import transaction

from accounts.errors import BadRequest, NotFound
from accounts.models import User
from accounts.services import audit

DECISIONS: dict[str, dict[str, bool]] = {
    "shut_out": {"is_active": False},
    "let_in": {"is_active": True},
    "made_operator": {"is_staff": True},
    "made_no_operator": {"is_staff": False, "is_superuser": False},
}
"""What each makes of a person. One who is shut out is signed out, and their keys and tokens stop, at
their next request; all of it works again once they are let in."""


@transaction.atomic
def decide(decision: str, *, actor: User, person_id: int) -> User:
    """Carry out one of `DECISIONS`, which a second time changes nothing.

    Nobody decides about themselves, so that an operator is always left. Raises `BadRequest` or
    `NotFound`.
    """
    # All at once, or two operators could end each other at the same moment.
    operators = list(User.objects.filter(is_staff=True).select_for_update().order_by("pk"))
    if not any(each.pk == actor.pk and each.is_active for each in operators):
        raise BadRequest("You are no operator any more.")
    if person_id == actor.pk:
        raise BadRequest("Another operator has to do this: it is about yourself.")
    person = User.objects.select_for_update().filter(pk=person_id).first()
    if person is None:
        raise NotFound("There is no such person.")
    if decision == "made_operator" and not person.is_active:
        raise BadRequest(f"{person.email} is shut out: let them in first.")
    fields = DECISIONS[decision]
    before = audit.snapshot(person, fields)
    for name, value in fields.items():
        setattr(person, name, value)
    person.save(update_fields=list(fields))
    if changes := audit.difference(person, before):
        audit.record(
            f"person.{decision}", actor=actor, target=person, label=person.email, changes=changes
        )
    return person
