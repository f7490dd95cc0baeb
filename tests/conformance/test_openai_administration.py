"""OpenAI's own SDK reads usage, costs and the audit, and finds its lists' pages by itself."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime
from typing import Any

import openai
import pytest
from django_scopes import scopes_disabled

from accounts.models import ApiKey, Scope
from accounts.services import audit
from tests.accounts.usage_rows import used
from tests.conftest import Person

pytestmark = pytest.mark.django_db(transaction=True)
FIRST = int(datetime(2026, 3, 1, tzinfo=UTC).timestamp())


@pytest.fixture
def organization(live_server: Any, owner: Person) -> Iterator[Any]:
    """The SDK's administration of the owner's organization."""
    with scopes_disabled():
        ApiKey.objects.filter(created_by=owner.user).update(scopes=[Scope.ADMIN_READ])
    with openai.OpenAI(
        admin_api_key=owner.key, base_url=f"{live_server.url}/v1", max_retries=0
    ) as client:
        yield client.admin.organization


def test_usage_and_costs_are_read(organization: Any, owner: Person) -> None:
    used(owner, date(2026, 3, 1))
    used(owner, date(2026, 3, 2), "other")
    page = organization.usage.completions(
        start_time=FIRST, end_time=FIRST + 2 * 86_400, group_by=["model", "user_id"]
    )
    assert [[each.model for each in bucket.results] for bucket in page.data] == [
        ["echo"],
        ["other"],
    ]
    result = page.data[0].results[0]
    assert (type(result).__name__, result.input_cached_tokens) == (
        "DataResultOrganizationUsageCompletionsResult",
        40,
    )
    costs = organization.usage.costs(start_time=FIRST, limit=1, group_by=["line_item"])
    assert (costs.has_more, costs.next_page) == (True, "page_20260302")
    cost = costs.data[0].results[0]
    assert (cost.line_item, cost.amount.value, cost.amount.currency) == ("echo", 0.5, "usd")


def test_the_audit_is_read_page_by_page(organization: Any, owner: Person) -> None:
    events = [audit.record("a.b", actor=owner.caller).pk for _ in range(5)]
    found = list(organization.audit_logs.list(event_types=["a.b"], limit=2))
    assert [each.id for each in found] == events[::-1]
    assert found[0].actor.session.user.email == "owner@acme.test"
    after = found[0].effective_at
    assert list(organization.audit_logs.list(effective_at={"gt": after})) == []
