"""What a browser is told in production: cookies, TLS, framing, scripts, referrers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from django.test import Client

from tests.portal.test_settings import ROOT, SECRET, refusal, shown

PRODUCTION = {
    "ENVIRONMENT": "production",
    "SECRET_KEY": SECRET * 2,
    "BASE_URL": "https://batch.acme.test",
    "TRUSTED_PROXY_COUNT": "1",
}
NAMES = [
    "ALLOWED_HOSTS",
    "CSRF_COOKIE_HTTPONLY",
    "CSRF_COOKIE_NAME",
    "CSRF_COOKIE_SAMESITE",
    "CSRF_COOKIE_SECURE",
    "CSRF_TRUSTED_ORIGINS",
    "OPERATOR_MFA_REQUIRED",
    "SECURE_HSTS_INCLUDE_SUBDOMAINS",
    "SECURE_HSTS_SECONDS",
    "SECURE_PROXY_SSL_HEADER",
    "SECURE_REDIRECT_EXEMPT",
    "SECURE_SSL_REDIRECT",
    "SESSION_COOKIE_NAME",
    "SESSION_COOKIE_SECURE",
    "TRUSTED_PROXY_COUNT",
]


@pytest.fixture(scope="module")
def production(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings that differ in production, as a process there reads them."""
    asked = f"{{name: getattr(settings, name) for name in {NAMES}}}"
    said = shown(asked, tmp_path_factory.mktemp("production"), **PRODUCTION)
    return dict(json.loads(said)[0])


@pytest.fixture
def browser(db: None, production: dict[str, Any], settings: Any) -> Client:
    """Of somebody who comes over TLS, by the proxy."""
    for name, value in production.items():
        setattr(settings, name, value)
    settings.SECURE_PROXY_SSL_HEADER = tuple(production["SECURE_PROXY_SSL_HEADER"])
    return Client(
        SERVER_NAME="batch.acme.test",
        HTTP_X_FORWARDED_PROTO="https",
        HTTP_X_FORWARDED_FOR="192.0.2.1",
    )


def test_djangos_own_check_finds_nothing_to_say(tmp_path: Path) -> None:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "DATABASE_URL", "REDIS_URL")}
    done = subprocess.run(
        [sys.executable, "manage.py", "check", "--deploy", "--fail-level=WARNING"],
        cwd=ROOT,
        env=kept | {"DATA_DIR": str(tmp_path)} | PRODUCTION,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "System check identified no issues (1 silenced).\n"


def test_every_answer_says_what_browsers_may_do(browser: Client) -> None:
    headers = browser.get("/accounts/login/").headers
    expected = {
        "Content-Security-Policy": (
            "default-src 'self'; img-src 'self' data:; style-src 'self'; object-src 'none';"
            " base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
        ),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Permissions-Policy": (
            "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(),"
            " serial=(), usb=()"
        ),
        "Referrer-Policy": "same-origin",
        "Strict-Transport-Security": "max-age=31536000; includeSubDomains",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }
    assert {name: headers.get(name) for name in expected} == expected


@pytest.mark.parametrize("path", ["/", "/nothing-here", "/v1/models", "/healthz"])
def test_errors_the_api_and_redirects_say_it_too(browser: Client, path: str) -> None:
    headers = browser.get(path).headers
    assert headers["X-Frame-Options"] == "DENY"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["Strict-Transport-Security"].startswith("max-age=31536000")


def test_cookies_are_for_this_host_over_tls_and_not_for_scripts(browser: Client) -> None:
    browser.get("/accounts/login/")
    browser.post("/accounts/login/", {"login": "nobody@acme.test", "password": "x"})
    browser.get("/accounts/confirm-email/")
    cookie = browser.cookies["__Host-csrf"]
    said = {name: cookie[name] for name in ("secure", "httponly", "samesite", "path", "domain")}
    assert said == {
        "secure": True,
        "httponly": True,
        "samesite": "Lax",
        "path": "/",
        "domain": "",
    }


def test_the_sessions_cookie_is_such_a_one(browser: Client, django_user_model: Any) -> None:
    django_user_model.objects.create_user("ann@acme.test", "correct horse 9")
    answer = browser.post(
        "/accounts/login/", {"login": "ann@acme.test", "password": "correct horse 9"}
    )
    cookie = answer.cookies["__Host-session"]
    said = {name: cookie[name] for name in ("secure", "httponly", "samesite", "path", "domain")}
    assert said == {
        "secure": True,
        "httponly": True,
        "samesite": "Lax",
        "path": "/",
        "domain": "",
    }


def test_what_comes_without_tls_is_led_to_it_but_for_probes(browser: Client) -> None:
    plain = {"HTTP_X_FORWARDED_PROTO": "http"}
    answer = browser.get("/accounts/login/?next=/", **plain)
    assert (answer.status_code, answer["Location"]) == (
        301,
        "https://batch.acme.test/accounts/login/?next=/",
    )
    assert browser.get("/healthz", **plain).status_code == 200


def test_another_host_is_not_answered(browser: Client) -> None:
    assert browser.get("/accounts/login/", SERVER_NAME="evil.test").status_code == 400


def test_a_form_of_another_site_is_not_taken(production: dict[str, Any], browser: Client) -> None:
    strict = Client(enforce_csrf_checks=True, SERVER_NAME="batch.acme.test")
    form = {"login": "nobody@acme.test", "password": "x"}
    origin = {"HTTP_ORIGIN": "https://evil.test", "HTTP_X_FORWARDED_PROTO": "https"}
    assert strict.post("/accounts/login/", form, **origin).status_code == 403


def test_without_a_proxy_its_headers_are_not_believed(tmp_path: Path) -> None:
    """Anybody could send them; and a redirect to TLS that we cannot see would never end."""
    asked = "settings.SECURE_PROXY_SSL_HEADER, settings.SECURE_SSL_REDIRECT"
    said = shown(asked, tmp_path, **PRODUCTION | {"TRUSTED_PROXY_COUNT": "0"})
    assert said == "[null, false]"


def test_production_wants_a_second_factor_of_operators(production: dict[str, Any]) -> None:
    assert production["OPERATOR_MFA_REQUIRED"]


def test_development_without_tls_has_plain_cookies(tmp_path: Path) -> None:
    asked = "settings.SESSION_COOKIE_NAME, settings.SESSION_COOKIE_SECURE, settings.REGISTRATION"
    assert shown(asked, tmp_path) == '["sessionid", false, "invite"]'


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"REGISTRATION": "everybody"}, "REGISTRATION must be open, invite or closed"),
        ({"OIDC_ISSUER": "https://login.acme.test"}, "OIDC_ISSUER needs OIDC_CLIENT_ID"),
        ({"EMAIL_URL": "pigeon://roof"}, "Invalid email schema pigeon"),
    ],
)
def test_sign_in_settings_that_make_no_sense_are_told(
    tmp_path: Path, variables: dict[str, str], said: str
) -> None:
    assert said in refusal(tmp_path, **variables)


def test_mail_goes_where_the_environment_says(tmp_path: Path) -> None:
    asked = (
        "settings.EMAIL_BACKEND, settings.EMAIL_HOST, settings.EMAIL_PORT, settings.EMAIL_USE_TLS,"
        " settings.EMAIL_HOST_USER, settings.EMAIL_HOST_PASSWORD, settings.DEFAULT_FROM_EMAIL"
    )
    said = shown(
        asked,
        tmp_path,
        EMAIL_URL="smtp+tls://portal:p%40ss@mail.acme.test:587",
        DEFAULT_FROM_EMAIL="Batches <batches@acme.test>",
    )
    assert json.loads(said) == [
        "django.core.mail.backends.smtp.EmailBackend",
        "mail.acme.test",
        587,
        True,
        "portal",
        "p@ss",
        "Batches <batches@acme.test>",
    ]


def test_mail_is_printed_where_nothing_is_said(tmp_path: Path) -> None:
    said = shown("settings.EMAIL_BACKEND", tmp_path)
    assert said == '["django.core.mail.backends.console.EmailBackend"]'
