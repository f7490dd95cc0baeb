"""`/v1/organization/audit_logs`: the organization's audit, newest first."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import reduce
from operator import or_

from django.db.models import Q, QuerySet, Subquery
from django.http import HttpRequest
from ninja import Query, Router

from accounts import ids
from accounts.authentication import caller_of
from accounts.errors import BadRequest
from accounts.models import AuditEvent
from accounts.paging import ends
from accounts.schemas.audit import AuditLogList, AuditLogOut, AuditQuery

router = Router(tags=["Audit"])
Events = QuerySet[AuditEvent]


@router.get("/audit_logs", response=AuditLogList, summary="List audit events")
def list_audit_logs(request: HttpRequest, asked: Query[AuditQuery]) -> AuditLogList:
    caller = caller_of(request, "audit.read")
    if asked.after and asked.before:
        raise BadRequest("Either after or before, not both.", param="before")
    with caller.scope():
        chain = AuditEvent.objects.filter(organization=caller.organization)
        found, more = _page(chain, chain.filter(_wanted(asked)), asked)
    return AuditLogList(data=[AuditLogOut.of(each) for each in found], has_more=more, **ends(found))


def _page(chain: Events, wanted: Events, asked: AuditQuery) -> tuple[list[AuditEvent], bool]:
    """One page in the chain's own order, which ids made within a millisecond do not have."""
    if asked.after:
        wanted = wanted.filter(number__lt=_number(chain, asked.after))
    if asked.before:
        wanted = wanted.filter(number__gt=_number(chain, asked.before))
    found = list(wanted.order_by("number" if asked.before else "-number")[: asked.limit + 1])
    page = found[: asked.limit]
    return page[::-1] if asked.before else page, len(found) > asked.limit


def _number(chain: Events, id: str) -> Subquery:
    return Subquery(chain.filter(pk=id).values("number"))


def _wanted(asked: AuditQuery) -> Q:
    wanted = _within(asked)
    if types := asked.event_types + asked.more_event_types:
        wanted &= Q(action__in=_texts(types))
    if resources := asked.resource_ids + asked.more_resource_ids:
        wanted &= Q(target_id__in=_texts(resources))
    if emails := asked.actor_emails + asked.more_actor_emails:
        named = [Q(actor_label__iexact=email) for email in _texts(emails)]
        wanted &= reduce(or_, named, Q(pk=None)) & Q(actor__isnull=False)
    if actors := asked.actor_ids + asked.more_actor_ids:
        people = [pk for id in actors if (pk := ids.parse_user_id(id))]
        wanted &= Q(actor__in=people) | Q(credential__in=_texts(actors))
    return wanted


def _within(asked: AuditQuery) -> Q:
    """`effective_at` is said in whole seconds, so that is what is compared."""
    wanted = Q()
    for bound, seconds, more in (
        ("gte", asked.effective_at_gt, 1),
        ("gte", asked.effective_at_gte, 0),
        ("lt", asked.effective_at_lt, 0),
        ("lt", asked.effective_at_lte, 1),
    ):
        if seconds is not None:
            moment = datetime.fromtimestamp(seconds + more, UTC)
            wanted &= Q(**{f"created_at__{bound}": moment})
    return wanted


def _texts(values: list[str]) -> list[str]:
    """Those that a row could hold: PostgreSQL keeps no NUL."""
    return [value for value in values if "\0" not in value]
