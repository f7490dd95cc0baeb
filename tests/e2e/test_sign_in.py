"""Signing in with more than a password, in a real browser: codes, passkeys, sessions.

Every test ends with an empty console, so the content security policy holds as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
from allauth.mfa.totp.internal.auth import (
    format_hotp_value,
    hotp_value,
    yield_hotp_counters_from_time,
)
from playwright.sync_api import Page, ViewportSize, expect

from tests.e2e.conftest import Visit
from tests.stack import Stack, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("stack")]

PASSWORD = "correct horse 9 battery"
DESKTOP = ViewportSize(width=1280, height=800)
PHONE = ViewportSize(width=360, height=740)
ACCOUNT_PAGES = ("Password", "Email", "Two-factor", "Passkeys", "Sessions", "Connected accounts")


@pytest.fixture
def address(stack: Stack) -> str:
    """By name: browsers take passkeys for names only, and localhost counts as safe."""
    return stack.base_url.replace("127.0.0.1", "localhost")


@pytest.fixture(scope="module")
def people(stack: Stack) -> Callable[[str], str]:
    """People with a password, each the owner of an organization of their own, by name."""

    @cache
    def person(name: str) -> str:
        email = f"{name}@sign-in.test"
        stack.manage("create_org", f"Sign-in {name}", "--owner", email, stdin=PASSWORD)
        return email

    return person


@pytest.fixture(autouse=True)
def _silent(complaints: list[str]) -> Iterator[None]:
    yield
    assert complaints == []


def enter(page: Page, email: str) -> None:
    page.get_by_label("Email").fill(email)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in", exact=True).click()


def signed_in(page: Page) -> None:
    expect(page.get_by_role("heading", name="Home", exact=True)).to_be_visible()


def sign_out(page: Page) -> None:
    page.get_by_label("Your account: ").click()
    page.get_by_role("button", name="Sign out", exact=True).click()
    expect(page.get_by_role("heading", name="Sign in", exact=True)).to_be_visible()


def account(page: Page, section: str) -> None:
    page.get_by_label("Your account: ").click()
    page.get_by_role("link", name="Your account", exact=True).click()
    page.get_by_role("navigation", name="Your account").get_by_role("link", name=section).click()


def confirm_password(page: Page) -> None:
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Confirm").click()


def authenticator(secret: str) -> str:
    counter = next(iter(yield_hotp_counters_from_time()))
    return str(format_hotp_value(hotp_value(secret, counter)))


def test_an_app_is_set_up_and_its_code_and_a_recovery_code_sign_in(
    address: str, people: Callable[[str], str], visit: Visit
) -> None:
    email = people("ann")
    page = visit(address)
    enter(page, email)
    signed_in(page)
    account(page, "Two-factor")
    page.get_by_role("link", name="Set up").click()
    confirm_password(page)
    expect(page.locator("img.portal-qr")).to_be_visible()
    secret = page.get_by_label("Authenticator secret").input_value()
    used = authenticator(secret)
    page.get_by_label("Authenticator code").fill(used)
    page.get_by_role("button", name="Activate").click()
    codes = page.get_by_label("Unused codes").input_value().split()
    assert len(codes) == 10
    page.get_by_label("I have saved my recovery codes").check()
    sign_out(page)

    enter(page, email)
    wait_for(lambda: authenticator(secret) != used, seconds=60, pause=1)  # each counts once
    page.get_by_label("Code", exact=False).first.fill(authenticator(secret))
    page.get_by_role("button", name="Sign In").click()
    signed_in(page)
    sign_out(page)

    enter(page, email)
    page.get_by_label("Code", exact=False).first.fill(codes[0])
    page.get_by_role("button", name="Sign In").click()
    signed_in(page)


@pytest.fixture
def passkeys(address: str, visit: Visit) -> Page:
    """A page whose browser has a fingerprint reader that always says yes."""
    page = visit(address)
    session = page.context.new_cdp_session(page)
    session.send("WebAuthn.enable")
    options = {
        "protocol": "ctap2",
        "transport": "internal",
        "hasResidentKey": True,
        "hasUserVerification": True,
        "isUserVerified": True,
        "automaticPresenceSimulation": True,
    }
    session.send("WebAuthn.addVirtualAuthenticator", {"options": options})
    return page


def test_a_passkey_is_added_and_signs_in_by_itself(
    people: Callable[[str], str], passkeys: Page
) -> None:
    page = passkeys
    enter(page, people("bob"))
    signed_in(page)
    account(page, "Passkeys")
    page.get_by_role("link", name="Add a passkey").click()
    confirm_password(page)
    page.get_by_role("button", name="Add the passkey").click()
    expect(page.get_by_label("Unused codes")).to_be_visible()
    page.get_by_label("I have saved my recovery codes").check()
    account(page, "Passkeys")
    expect(page.get_by_text("Signs you in by itself")).to_be_visible()
    sign_out(page)

    page.get_by_role("button", name="Sign in with a passkey").click()
    signed_in(page)


def test_a_passkey_is_the_second_factor_after_a_password(
    people: Callable[[str], str], passkeys: Page
) -> None:
    page, email = passkeys, people("cat")
    enter(page, email)
    signed_in(page)
    account(page, "Passkeys")
    page.get_by_role("link", name="Add a passkey").click()
    confirm_password(page)
    page.get_by_label("Sign in with it alone").uncheck()
    page.get_by_role("button", name="Add the passkey").click()
    page.get_by_label("I have saved my recovery codes").check()
    sign_out(page)
    enter(page, email)
    page.get_by_role("button", name="Use a security key").click()
    signed_in(page)


def test_without_a_passkey_the_page_says_so(address: str, visit: Visit) -> None:
    page = visit(address + "/accounts/login/")
    page.evaluate("() => { navigator.credentials.get = () => Promise.reject(new Error('no')) }")
    page.get_by_role("button", name="Sign in with a passkey").click()
    expect(page.get_by_text("The passkey was not used")).to_be_visible()


def test_another_browser_is_signed_out_from_here(
    address: str, people: Callable[[str], str], visit: Visit
) -> None:
    email = people("dan")
    here, there = visit(address), visit(address, user_agent="Other/1.0")
    for page in (here, there):
        enter(page, email)
        signed_in(page)
    account(here, "Sessions")
    row = here.get_by_role("row").filter(has_text="Other/1.0")
    expect(here.get_by_text("This browser")).to_be_visible()
    row.get_by_role("button", name="Sign out").click()
    expect(row).to_have_count(0)
    there.goto(address)
    expect(there.get_by_role("heading", name="Sign in", exact=True)).to_be_visible()
    here.goto(address)
    signed_in(here)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_pages_fit(
    address: str,
    people: Callable[[str], str],
    visit: Visit,
    size: ViewportSize,
    scheme: Any,
    tmp_path: Any,
) -> None:
    page = visit(address, viewport=size, color_scheme=scheme)
    shots = tmp_path / "pages"
    names = iter(range(100))

    def fits() -> None:
        page.screenshot(path=shots / f"{next(names):02}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], page.url

    fits()
    for path in ("/accounts/organization/", "/accounts/password/reset/", "/accounts/signup/"):
        page.goto(address + path)
        fits()
    page.goto(address)
    enter(page, people("eve"))
    signed_in(page)
    account(page, "Password")
    for section in ACCOUNT_PAGES:
        account(page, section)
        expect(
            page.get_by_role("navigation", name="Your account").get_by_role("link", name=section)
        ).to_have_class(re.compile("active"))
        fits()
    account(page, "Two-factor")
    page.get_by_role("link", name="Set up").click()
    fits()
    confirm_password(page)
    fits()
    page.goto(address + "/organization/sign-in")
    fits()
