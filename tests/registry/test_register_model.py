"""`register_model`: what it prints, what it reads, what it refuses."""

from __future__ import annotations

import io
from decimal import Decimal
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from accounts import secrets
from models_registry.models import Model
from tests.conftest import Person

pytestmark = pytest.mark.django_db
INSTANT = ["--source=none", "--engine=instant"]


def run(*arguments: str) -> str:
    out = io.StringIO()
    call_command("register_model", *arguments, stdout=out)
    return out.getvalue()


def test_it_prints_the_name_and_nothing_else() -> None:
    assert run("echo", *INSTANT) == "echo\n"
    assert run("echo", *INSTANT) == "echo\n"
    assert Model.objects.count() == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("auto", "auto"),
        ('"8"', "8"),
        ('{"a": [1]}', {"a": [1]}),
        ("a=b", "a=b"),
        ("", ""),
        ("{", "{"),
    ],
)
def test_engine_arguments_are_json_or_text(text: str, value: Any) -> None:
    run("echo", *INSTANT, f"--engine-arg=key={text}", "--engine-arg=other=1")
    assert Model.objects.get().engine_args == {"key": value, "other": 1}


@pytest.mark.parametrize("text", ["key", "=1", "", "="])
def test_engine_arguments_need_a_key_and_a_value(text: str) -> None:
    with pytest.raises(CommandError, match="--engine-arg takes key=value"):
        run("echo", *INSTANT, f"--engine-arg={text}")


def test_the_secret_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOTE_TOKEN", "sk-remote")
    openai = ["--source=gpt", "--engine=openai", "--base-url=https://host/v1"]
    run("remote", *openai, "--secret-env=REMOTE_TOKEN")
    model = Model.objects.get()
    assert secrets.decrypt(model.encrypted_secret) == "sk-remote"
    assert model.base_url == "https://host/v1"


def test_a_secret_that_is_not_in_the_environment_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("REMOTE_TOKEN", raising=False)
    with pytest.raises(CommandError, match="REMOTE_TOKEN"):
        run("echo", *INSTANT, "--secret-env=REMOTE_TOKEN")
    assert Model.objects.count() == 0


def test_it_may_be_offered_to_some_only(owner: Person, stranger: Person) -> None:
    run("ours", *INSTANT, "--org=acme")
    assert list(Model.objects.get().organizations.all()) == [owner.caller.organization]
    with pytest.raises(CommandError, match=r"^There is no organization 'nobody'\.$"):
        run("theirs", *INSTANT, "--org=nobody")


def test_registering_again_changes_only_what_is_named(
    owner: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMOTE_TOKEN", "sk-remote")

    def kept() -> tuple[bool, list[str], str, dict[str, Any]]:
        model = Model.objects.get()
        slugs = list(model.organizations.values_list("slug", flat=True))
        return (
            model.restricted,
            slugs,
            secrets.decrypt(model.encrypted_secret),
            model.engine_args,
        )

    run("ours", *INSTANT, "--org=acme", "--secret-env=REMOTE_TOKEN", "--engine-arg=a=1")
    run("ours", *INSTANT, "--input-price=1")
    assert kept() == (True, ["acme"], "sk-remote", {"a": 1})
    run("ours", *INSTANT, "--everybody", "--no-secret", "--no-engine-args")
    assert kept() == (False, [], "", {})


@pytest.mark.parametrize(
    "flags",
    [
        ["--org=acme", "--everybody"],
        ["--secret-env=HOME", "--no-secret"],
        ["--engine-arg=a=1", "--no-engine-args"],
    ],
)
def test_one_cannot_ask_for_both(flags: list[str], owner: Person) -> None:
    with pytest.raises(CommandError, match="not allowed with argument"):
        run("ours", *INSTANT, *flags)


def test_what_the_service_refuses_is_told() -> None:
    with pytest.raises(CommandError, match="The openai engine needs a base_url"):
        run("remote", "--source=gpt", "--engine=openai")


@pytest.mark.parametrize("flag", ["--task=sing", "--engine=magic"])
def test_what_there_is_to_choose_from_is_bound(flag: str) -> None:
    with pytest.raises(CommandError, match="invalid choice"):
        run("echo", "--source=none", flag)


def test_prices_are_money_for_a_million_tokens() -> None:
    run("echo", *INSTANT, "--input-price=0.15", "--cached-price=0", "--output-price=1e2")
    model = Model.objects.get()
    assert (model.input_price, model.cached_price, model.output_price) == (
        Decimal("0.15"),
        Decimal(0),
        Decimal(100),
    )


@pytest.mark.parametrize(
    ("price", "why"),
    [
        ("free", "A price is a number, not 'free'."),
        ("", "A price is a number, not ''."),
        ("-1", "input_price must be a number from 0 to 99999999."),
        ("nan", "input_price must be a number from 0 to 99999999."),
        ("inf", "input_price must be a number from 0 to 99999999."),
        ("1e9", "input_price must be a number from 0 to 99999999."),
        ("1e999999", "input_price must be a number from 0 to 99999999."),
        ("0.0000001", "input_price has more than six decimals."),
    ],
)
def test_what_is_no_price_is_refused(price: str, why: str) -> None:
    with pytest.raises(CommandError) as caught:
        run("echo", *INSTANT, f"--input-price={price}")
    assert str(caught.value) == why
    assert Model.objects.count() == 0
