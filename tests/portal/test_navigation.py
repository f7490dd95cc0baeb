"""Where in the menu a page is."""

from __future__ import annotations

import pytest

from portal.navigation import place_of
from tests.conftest import Person

pytestmark = pytest.mark.django_db


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/", "home"),
        ("/batches", "batch_list"),
        ("/batches/new/file-1/table", "batch_list"),
        ("/models/some/name", "models"),
        ("/organization", "organization_settings"),
        ("/organization/webhooks/deliveries/whd_1", "webhooks"),
        ("/operator/queue/change", "operator_queue"),
        ("/operator/pauses", ""),
        ("/accounts/login/", ""),
        ("", ""),
    ],
)
def test_a_page_is_under_the_nearest_link_above_it(path: str, name: str) -> None:
    assert place_of(path) == name


def test_the_menu_tells_the_page_itself_from_one_below_it(owner: Person) -> None:
    def current(path: str) -> list[str]:
        page = owner.browser.get(path).content.decode()
        menu = page.partition('id="menu"')[2].partition("</nav>")[0]
        return [tag for tag in menu.split("<a ") if "aria-current" in tag]

    [itself] = current("/organization/webhooks")
    [above] = current("/organization/webhooks/new")
    assert 'href="/organization/webhooks"' in itself
    assert 'aria-current="page"' in itself
    assert 'href="/organization/webhooks"' in above
    assert 'aria-current="true"' in above
