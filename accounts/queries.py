"""Reads that are more than one line: who a caller is, and what was used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from decimal import Decimal
from hmac import compare_digest
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from django.db.models import Count, F, Model, OuterRef, Prefetch, Q, QuerySet, Subquery, Sum
from django.db.models.functions import Coalesce, Now
from django_scopes import scopes_disabled

from accounts import keys, roles, secrets
from accounts.access import Caller
from accounts.errors import NotFound
from accounts.models import (
    ApiKey,
    HourlyUse,
    Membership,
    Organization,
    Project,
    Quota,
    RevokedToken,
    TrustedIssuer,
    UsageRecord,
    User,
)

if TYPE_CHECKING:  # JSON Web Tokens are not read on every host
    from accounts.tokens import Claims


def caller_of_key(text: str) -> Caller | None:
    """The caller that a key speaks for; None for unknown, forged, expired and revoked keys alike,
    and for a person's key once the person is no longer a member."""
    parsed = keys.parse(text)
    if parsed is None:
        return None
    with scopes_disabled():
        key = _key(prefix=parsed.prefix)
    # Compared even when there is no such key, so that both cases take the same time.
    known = secrets.matches(parsed.secret, key.digest if key else "0" * 64)
    return _caller_with(key) if key is not None and known else None


def caller_of_key_id(id: str) -> Caller | None:
    """The same for a key that was shown before, when a token was made of it."""
    with scopes_disabled():
        key = _key(pk=id)
    return _caller_with(key) if key is not None else None


def caller_of_token(claims: Claims) -> Caller | None:
    """Whom a token speaks for, with what they may do now; None once it or its maker is revoked."""
    if RevokedToken.objects.filter(pk=claims.jti).exists():
        return None
    kind, _, id = claims.subject.partition(":")
    if kind == "user":
        caller = _member(int(id), claims)
    elif kind == "issuer":
        caller = _workload(id)
    else:
        caller = caller_of_key_id(claims.subject)
    if caller is None or _home_of(caller) != (claims.organization_id, claims.project_id):
        return None
    return _narrowed(caller, claims)


def _home_of(caller: Caller) -> tuple[str, str]:
    return caller.organization.pk, caller.project.pk


def _narrowed(caller: Caller, claims: Claims) -> Caller:
    """With the token's scopes, as far as what it was made of still has them."""
    wide = caller.scopes
    scopes = tuple(each for each in claims.scopes if wide is None or roles.covers(wide, [each]))
    return replace(caller, scopes=scopes, token_id=claims.jti)


def _member(user_id: int, claims: Claims) -> Caller | None:
    with scopes_disabled():
        members = Membership.objects.select_related("organization", "user")
        membership = members.filter(
            user_id=user_id,
            user__is_active=True,
            organization_id=claims.organization_id,
            organization__deleted_at=None,
        ).first()
        projects = Project.objects.filter(pk=claims.project_id, archived_at=None)
        project = projects.filter(organization_id=claims.organization_id).first()
    if membership is None or project is None:
        return None
    if not compare_digest(stamp_of(membership.user).encode(), claims.stamp.encode()):
        return None
    return Caller(membership.organization, project, membership.user, membership.role)


def stamp_of(person: User) -> str:
    """Another once the person's password is, so that their sessions' tokens end with it."""
    return secrets.digest(person.get_session_auth_hash())[:16]


def _workload(issuer_id: str) -> Caller | None:
    """What comes with a token of an issuer that an organization trusts: neither person nor key."""
    with scopes_disabled():
        rows = TrustedIssuer.objects.select_related("organization", "project")
        issuer = rows.filter(pk=issuer_id).first()
    return workload_caller(issuer) if issuer else None


def workload_caller(issuer: TrustedIssuer) -> Caller | None:
    if issuer.organization.deleted_at or issuer.project.archived_at:
        return None
    return Caller(issuer.organization, issuer.project, scopes=tuple(issuer.scopes))


def key_named(name: str) -> ApiKey | None:
    """The key of this id, or of this prefix, of any organization; never looked for by its text."""
    with scopes_disabled():
        rows = ApiKey.objects.select_related("organization", "project", "created_by")
        return rows.filter(Q(pk=name) | Q(prefix=name.removeprefix("sk-vbp-"))).first()


def keys_of_texts(texts: Sequence[str]) -> list[ApiKey | None]:
    """For each text the key of any organization that it is, whatever its state; one query."""
    parsed = [keys.parse(text.strip()) for text in texts]
    with scopes_disabled():
        rows = ApiKey.objects.select_related("organization", "project", "created_by")
        prefixes = {each.prefix for each in parsed if each}
        known = {key.prefix: key for key in rows.filter(prefix__in=prefixes)}

    def found(text: keys.KeyText | None) -> ApiKey | None:
        key = known.get(text.prefix) if text else None
        return key if key and text and secrets.matches(text.secret, key.digest) else None

    return [found(text) for text in parsed]


def _key(**lookup: str) -> ApiKey | None:
    """The key with its person's role now, in one query."""
    membership = Membership.objects.filter(
        user=OuterRef("created_by"), organization=OuterRef("organization"), user__is_active=True
    )
    rows = ApiKey.objects.select_related("organization", "project", "created_by")
    return rows.annotate(role=Subquery(membership.values("role")[:1])).filter(**lookup).first()


def _caller_with(key: ApiKey) -> Caller | None:
    role: str | None = key.role  # type: ignore[attr-defined]
    orphaned = key.created_by is not None and role is None
    if orphaned or not key.is_usable or key.project.archived_at or key.organization.deleted_at:
        return None
    scopes = tuple(key.scopes)
    return Caller(key.organization, key.project, key.created_by, role or "", key, scopes)


def caller_of_user(user: User, slug: str | None = None) -> Caller | None:
    """A signed-in person in one of their organizations: the named one, else the oldest."""
    with scopes_disabled():
        mine = Membership.objects.filter(user=user, organization__deleted_at=None)
        mine = mine.select_related("organization").order_by("id")
        named = mine.filter(organization__slug=slug).first() if slug else None
        membership = named or mine.first()
        if membership is None:
            return None
        project = default_project(membership.organization)
    return Caller(membership.organization, project, user, membership.role)


def organization_named(slug: str) -> Organization:
    """The organization of this slug, also a deleted one; for commands."""
    found = Organization.objects.filter(slug=slug).first()
    if found is None:
        raise NotFound(f"There is no organization {slug!r}.", param="slug")
    return found


def member_named(organization: Organization, email: str) -> Membership:
    with scopes_disabled():
        mine = Membership.objects.filter(organization=organization, user__email__iexact=email)
        found = mine.select_related("organization", "user").first()
    if found is None:
        raise NotFound(f"{email} is not a member of {organization}.", param="email")
    return found


def organizations_of(user: User) -> list[Organization]:
    """Those that the person can switch to, by name."""
    with scopes_disabled():
        mine = Organization.objects.filter(memberships__user=user, deleted_at=None)
        return list(mine.order_by("name", "pk"))


def with_keys(memberships: QuerySet[Membership]) -> QuerySet[Membership]:
    """The memberships with their people, and as `keys` how many keys would end with each."""
    alive = Q(expires_at=None) | Q(expires_at__gt=Now())
    theirs = ApiKey.objects.filter(
        alive, created_by=OuterRef("user"), organization=OuterRef("organization"), revoked_at=None
    )
    return memberships.select_related("user").annotate(keys=_count_of(theirs, "created_by"))


def organizations_found(text: str, state: str) -> QuerySet[Organization]:
    """For operators: those whose name or slug contains the text, with what they have as counts."""
    with scopes_disabled():
        its = {"organization": OuterRef("pk")}
        found = Organization.objects.annotate(
            members=_count_of(Membership.objects.filter(**its), "organization"),
            projects_active=_count_of(
                Project.objects.filter(archived_at=None, **its), "organization"
            ),
            keys=_count_of(ApiKey.objects.filter(revoked_at=None, **its), "organization"),
        )
    if text:
        found = found.filter(Q(name__icontains=text) | Q(slug__icontains=text))
    states = {
        "active": Q(suspended_at=None, deleted_at=None),
        "suspended": Q(suspended_at__isnull=False),
        "deleted": Q(deleted_at__isnull=False),
    }
    return found.filter(states.get(state, Q()))


def _count_of(rows: QuerySet[Any], by: str) -> Coalesce:
    """How many rows there are, as part of the query that they refer to."""
    counted = rows.order_by().values(by).annotate(count=Count("pk")).values("count")
    return Coalesce(Subquery(counted), 0)


def default_project(organization: Organization) -> Project:
    """The oldest project that is not archived; there is always one."""
    with scopes_disabled():
        active = Project.objects.filter(organization=organization, archived_at=None)
        return active.order_by("id")[0]


@dataclass(frozen=True)
class Used:
    """A sum over usage records; what they were not grouped by is None."""

    day: date | None = None
    project_id: str | None = None
    project_name: str | None = None
    user_id: int | None = None
    email: str | None = None
    api_key_id: str | None = None
    key_name: str | None = None
    key_prefix: str | None = None
    model: str | None = None
    endpoint: str | None = None
    batches: int = 0
    requests: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    gpu_seconds: float = 0
    cost: Decimal = Decimal(0)

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    @property
    def gpu_hours(self) -> float:
        return self.gpu_seconds / 3600


SUMS = (
    "batches",
    "requests",
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "reasoning_tokens",
    "gpu_seconds",
    "cost",
)
GROUPS: Mapping[str, Mapping[str, str]] = {
    "day": {"day": "day"},
    "project": {"project_id": "project_id", "project_name": "project__name"},
    "user": {"user_id": "user_id", "email": "user__email"},
    "key": {
        "api_key_id": "api_key_id",
        "key_name": "api_key__name",
        "key_prefix": "api_key__prefix",
    },
    "model": {"model": "model"},
    "endpoint": {"endpoint": "endpoint"},
}
"""What usage may be grouped by: the fields of `Used` that each fills, and where they come from."""


def usage(
    organization: Organization, since: date, until: date, *, by: Sequence[str], **lookup: Any
) -> Iterator[Used]:
    """What was used from `since` to `until`, both days included (UTC), summed for each group.

    One query whatever there is; in the order of the groups, as `by` (at least one) names them.
    """
    fields = {name: path for group in by for name, path in GROUPS[group].items()}
    names, sums = (*fields, *SUMS), {f"sum_{name}": Sum(name) for name in SUMS}
    with scopes_disabled():
        mine = UsageRecord.objects.filter(organization=organization, day__range=(since, until))
        groups = mine.filter(**lookup).values(*fields.values()).annotate(**sums)
        rows = groups.order_by(*fields.values()).values_list(*fields.values(), *sums)
    for row in rows.iterator(chunk_size=1000):
        yield Used(**dict(zip(names, row, strict=True)))


def usage_by_whom(organization: Organization, since: date, until: date) -> list[Used]:
    """The same summed by project, person and key at once, with their names; in four queries.

    Names are fetched for what comes of it: joined to each record, they would cost most of the time.
    """
    sums = {f"sum_{name}": Sum(name) for name in SUMS}
    ids = ("project_id", "user_id", "api_key_id")
    with scopes_disabled():
        mine = UsageRecord.objects.filter(organization=organization, day__range=(since, until))
        rows = list(mine.values(*ids).annotate(**sums).order_by(*ids))
        projects = _names(Project, {row["project_id"] for row in rows}, "name")
        people = _names(User, {row["user_id"] for row in rows}, "email")
        keys_used = _names(ApiKey, {row["api_key_id"] for row in rows}, "name", "prefix")
    none = (None, None)
    return [
        Used(
            **{name: row[name] for name in ids},
            project_name=projects[row["project_id"]][0],
            email=people.get(row["user_id"], none)[0],
            key_name=keys_used.get(row["api_key_id"], none)[0],
            key_prefix=keys_used.get(row["api_key_id"], none)[1],
            **{name: row[f"sum_{name}"] for name in SUMS},
        )
        for row in rows
    ]


def _names(model: type[Model], ids: set[Any], *fields: str) -> dict[Any, tuple[str, ...]]:
    rows: Any = model._default_manager.filter(pk__in=ids)
    return {id: tuple(names) for id, *names in rows.values_list("pk", *fields)}


class Hour(NamedTuple):
    """What was answered in it; tokens in and out."""

    hour: datetime
    requests: int
    input_tokens: int
    output_tokens: int


def hourly_use(organization: Organization, since: datetime) -> list[Hour]:
    """By when answers came, oldest first; hours without any are left out."""
    with scopes_disabled():
        mine = HourlyUse.objects.filter(organization=organization, hour__gte=since)
        return [Hour(*row) for row in mine.order_by("hour").values_list(*Hour._fields)]


_sums = attrgetter(*SUMS)


def total(rows: Iterable[Used]) -> Used:
    """All of them together."""
    columns = zip(*map(_sums, [Used(), *rows]), strict=True)
    sums: dict[str, Any] = dict(zip(SUMS, map(sum, columns), strict=True))
    return Used(**sums)


def first_day_of_usage(organization: Organization) -> date | None:
    """The day of the oldest usage record, if there is one."""
    with scopes_disabled():
        mine = UsageRecord.objects.filter(organization=organization)
        return mine.order_by("day").values_list("day", flat=True).first()


RANKS: Mapping[str, str] = {"tokens": "tokens", "cost": "cost", "gpu": "gpu_seconds"}
"""By what organizations may be ranked: the sum of it."""


@dataclass(frozen=True)
class Ranked:
    """What an organization used; `share` is its part of all that was, from 0 to 1."""

    organization_id: str
    name: str
    slug: str
    requests: int
    tokens: int
    gpu_seconds: float
    cost: Decimal
    share: float = 0.0

    @property
    def gpu_hours(self) -> float:
        return self.gpu_seconds / 3600


def ranking(since: date, until: date, by: str, *, most: int) -> list[Ranked]:
    """The organizations that used most from `since` to `until`, both included (UTC)."""
    with scopes_disabled():
        rows = UsageRecord.objects.filter(day__range=(since, until))
        sums = {
            "tokens": Sum(F("input_tokens") + F("output_tokens")),
            "cost": Sum("cost"),
            "gpu_seconds": Sum("gpu_seconds"),
        }
        whole = float(rows.aggregate(whole=sums[RANKS[by]])["whole"] or 0)
        # By id alone: grouped by names as well, PostgreSQL would sort every record by them first.
        its: QuerySet[Any, Any] = rows.values("organization_id").annotate(
            all_requests=Sum("requests"),
            tokens=sums["tokens"],
            all_seconds=sums["gpu_seconds"],
            all_cost=sums["cost"],
        )
        order = {"tokens": "-tokens", "cost": "-all_cost", "gpu": "-all_seconds"}[by]
        numbers = ("all_requests", "tokens", "all_seconds", "all_cost")
        first = list(
            its.order_by(order, "organization_id").values_list("organization_id", *numbers)[:most]
        )
        named = Organization.objects.in_bulk([row[0] for row in first])
    found = [Ranked(id, named[id].name, named[id].slug, *used) for id, *used in first]
    return [
        replace(row, share=float(getattr(row, RANKS[by])) / whole if whole else 0.0)
        for row in found
    ]


def people_found(text: str) -> QuerySet[User]:
    """For operators: people whose name or email contains the text, with where they belong."""
    with scopes_disabled():
        belong = Membership.objects.select_related("organization").order_by("organization__name")
    found = User.objects.prefetch_related(Prefetch("memberships", queryset=belong, to_attr="roles"))
    if text:
        found = found.filter(Q(name__icontains=text) | Q(email__icontains=text))
    return found


def own_limits(organizations: Sequence[Organization]) -> dict[str, Quota]:
    """By organization, the limits that operators set for the whole of it."""
    with scopes_disabled():
        rows = Quota.objects.filter(organization__in=organizations, user=None, api_key=None)
        return {row.organization_id: row for row in rows}
