"""The usage page in a real browser: its charts, what the policy allows, and life without scripts."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from tests.accounts.usage_rows import used
from tests.conftest import Person
from tests.e2e.conftest import Visit

pytestmark = pytest.mark.django_db(transaction=True)


def shown(visit: Visit, live_server: Any, person: Person, **options: Any) -> Any:
    """The page, as somebody who is signed in."""
    page = visit("about:blank", **options)
    value = person.browser.cookies["sessionid"].value
    page.context.add_cookies([{"name": "sessionid", "value": value, "url": live_server.url}])
    page.goto(f"{live_server.url}/organization/usage")
    return page


@pytest.mark.parametrize("width", [360, 1280])
def test_charts_are_drawn_and_nothing_is_blocked(
    width: int, live_server: Any, visit: Visit, complaints: list[str], owner: Person
) -> None:
    for days in range(5):
        used(owner, timezone.now().date() - timedelta(days=days))
    page = shown(visit, live_server, owner, viewport={"width": width, "height": 800})
    drawn = """id => {
        const canvas = document.getElementById(id);
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        return pixels.some((value, index) => index % 4 === 3 && value > 0);
    }"""
    assert [page.evaluate(drawn, f"chart-{name}") for name in ("tokens", "second")] == [True, True]
    page.click("#theme")
    page.wait_for_function("document.documentElement.dataset.bsTheme === 'dark'")
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert (page.evaluate(wide), complaints) == (0, [])


def test_without_scripts_the_tables_say_the_same(
    live_server: Any, visit: Visit, owner: Person
) -> None:
    used(owner, timezone.now().date())
    page = shown(visit, live_server, owner, java_script_enabled=False)
    assert page.locator("#charts").is_hidden()
    page.click("#table-day summary")
    assert page.locator("#table-day tbody tr").is_visible()
