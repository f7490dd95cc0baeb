"""What templates have without a `load`, and the select box that renders itself."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

from django import forms
from django.template import Context, Template
from django.test.html import parse_html

from accounts.forms.plain_select import PlainSelect


def rendered(text: str, **values: object) -> str:
    return Template(text).render(Context(values))


def test_a_moment_is_told_in_utc_and_for_machines() -> None:
    moment = datetime(2026, 3, 7, 1, 2, 3, tzinfo=timezone(timedelta(hours=2)))
    assert rendered("{{ at|time_element }}", at=moment) == (
        '<time datetime="2026-03-06T23:02:03+00:00" title="2026-03-06 23:02:03 UTC">'
        "6 Mar 2026, 23:02 UTC</time>"
    )
    assert rendered("{{ at|time_element }}", at=None) == ""


def test_an_icon_is_hidden_from_those_who_hear_the_page() -> None:
    assert rendered('{% icon "check" "text-green" %}') == (
        '<svg class="icon text-green" aria-hidden="true" focusable="false">'
        '<use href="/static/vendor/tabler/icons.svg#check"></use></svg>'
    )
    assert "&quot;&gt;" in rendered("{% icon name %}", name='">')


def test_a_plain_select_is_what_djangos_would_be() -> None:
    class Form(forms.Form):
        plain = forms.ChoiceField(widget=PlainSelect)
        usual = forms.ChoiceField()

    form = Form({"plain": "b<", "usual": "b<"})
    for name in form.fields:
        field: forms.ChoiceField = form.fields[name]  # type: ignore[assignment]
        field.choices = [("", "Any"), (1, "a & b"), ("b<", "<b>")]
    plain, usual = (str(form[name]).replace(name, "") for name in ("plain", "usual"))
    assert parse_html(plain) == parse_html(usual)
    assert " selected" in plain


def test_moments_of_other_zones_are_the_same_moment() -> None:
    moment = datetime(2026, 12, 31, 23, 59, 59, 999_999, UTC)
    assert '"2026-12-31T23:59:59.999999+00:00"' in rendered("{{ at|time_element }}", at=moment)
