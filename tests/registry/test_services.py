"""Writes of the registry, and who is offered which model."""

from __future__ import annotations

import math
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from django.utils import timezone
from django_scopes import scopes_disabled

from accounts import secrets
from accounts.errors import BadRequest, NotFound
from accounts.models import AuditEvent, User
from accounts.services.audit import MASK
from models_registry import queries, services
from models_registry.models import Change, Measurement, Model, ModelLoad
from models_registry.queries import offered_to
from models_registry.services import register_model
from tests.conftest import Person

pytestmark = pytest.mark.django_db


def test_a_model_is_registered_and_changed_under_its_name() -> None:
    first = register_model(name="m", source="org/model", revision="abc", engine_args={"a": 1})
    services.note_failure("m", why="no room")
    again = register_model(name="m", source="org/other")
    assert (again.pk, again.source, again.revision) == (first.pk, "org/other", "")
    assert (again.load_error, again.load_failed_at) == ("", None)
    assert Model.objects.count() == 1


def test_a_folder_is_kept_as_its_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert register_model(name="m", source="model").source == str(tmp_path / "model")
    assert register_model(name="m", source="org/not-a-folder").source == "org/not-a-folder"


def test_a_secret_is_kept_encrypted() -> None:
    model = register_model(
        name="m", source="x", engine="openai", base_url="https://host/v1", secret="sk-secret"
    )
    assert "sk-secret" not in str(vars(model))
    assert secrets.decrypt(model.encrypted_secret) == "sk-secret"
    assert "secret" not in model.spec_fields


@pytest.mark.parametrize(
    "name", ["a", "qwen3-8b", "Qwen/Qwen3-8B", "a.b_c:d", "0", "x" * 200, "a/../b"]
)
def test_names_of_models(name: str) -> None:
    assert register_model(name=name, source="none", engine="instant").name == name


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        *[
            ("name", {"name": name})
            for name in ("", "-a", "/a", "a b", "a\n", "a\0", "é", "x" * 201, "a;b", "'", "{a}")
        ],
        ("task", {"task": "sing"}),
        ("engine", {"engine": "magic"}),
        ("base_url", {"engine": "openai"}),
        ("base_url", {"engine": "openai", "base_url": "file:///etc/passwd"}),
        ("base_url", {"engine": "openai", "base_url": "host/v1"}),
        ("source", {"engine": "vllm", "source": ""}),
        ("source", {"engine": "vllm", "source": "none"}),
    ],
)
def test_what_cannot_be_is_refused_naming_the_field(field: str, changes: dict[str, Any]) -> None:
    given: dict[str, Any] = {"name": "m", "source": "none", "engine": "instant"} | changes
    with pytest.raises(BadRequest) as caught:
        register_model(**given)
    assert caught.value.param == field
    assert Model.objects.count() == 0


def test_invented_answers_are_refused_in_production(settings: Any) -> None:
    settings.PRODUCTION = True
    with pytest.raises(BadRequest, match="not in production"):
        register_model(name="m", source="none", engine="instant")


def test_a_model_is_offered_to_everybody_or_to_those_it_names(
    owner: Person, stranger: Person
) -> None:
    acme, globex = owner.caller.organization, stranger.caller.organization
    for name, organizations in (("all", []), ("both", [acme, globex]), ("ours", [acme])):
        register_model(name=name, source="none", engine="instant", organizations=organizations)
    assert [model.name for model in offered_to(acme)] == ["all", "both", "ours"]
    assert [model.name for model in offered_to(globex)] == ["all", "both"]
    register_model(name="ours", source="none", engine="instant", organizations=[])
    assert [model.name for model in offered_to(globex)] == ["all", "both", "ours"]


def test_who_may_use_it_its_secret_and_its_arguments_stay_unless_given(owner: Person) -> None:
    acme = owner.caller.organization
    given: dict[str, Any] = {"name": "m", "source": "x"}
    register_model(**given, secret="s", engine_args={"a": 1}, organizations=[acme])

    def kept() -> tuple[str, dict[str, Any], list[Any], bool]:
        model = Model.objects.get()
        secret = secrets.decrypt(model.encrypted_secret)
        return secret, model.engine_args, list(model.organizations.all()), model.restricted

    register_model(**given)
    assert kept() == ("s", {"a": 1}, [acme], True)
    register_model(**given, secret="", engine_args={}, organizations=[])
    assert kept() == ("", {}, [], False)


def test_a_restricted_model_without_organizations_is_nobodys(
    owner: Person, stranger: Person
) -> None:
    acme, globex = owner.caller.organization, stranger.caller.organization
    register_model(name="ours", source="none", engine="instant", organizations=[globex])
    globex.delete()
    assert list(offered_to(acme)) == []
    register_model(name="ours", source="none", engine="instant")
    assert list(offered_to(acme)) == []


def loaded(seconds: float, change: Change = Change.LOAD, **given: Any) -> None:
    options = {"worker": "gpu0", "gpu": "H100"} | given
    services.note_load("m", change, seconds=seconds, **options)


def test_failures_are_noted_until_it_loads() -> None:
    register_model(name="m", source="none", engine="instant")
    services.note_failure("m", why="no room")
    failed = Model.objects.get()
    assert (failed.load_error, failed.load_failed_at is not None) == ("no room", True)
    loaded(1.0, error="again")
    assert Model.objects.get().load_error == "no room"
    loaded(1.0)
    assert (Model.objects.get().load_error, Model.objects.get().load_failed_at) == ("", None)
    services.note_failure("gone", why="x")
    services.note_load("gone", Change.LOAD, worker="gpu0", gpu="", seconds=1.0)


def test_what_succeeded_is_measured_and_everything_is_kept_as_history() -> None:
    register_model(name="m", source="none", engine="instant")
    loaded(60.0)
    loaded(20.0, error="no room", settled={"max-num-seqs": 8})
    loaded(80.0)
    loaded(4.0, Change.SLEEP)
    loaded(3.0, Change.WAKE)
    loaded(9.0, Change.WAKE, error="gibberish")
    loaded(1.0, Change.UNLOAD)
    known = Measurement.objects.get()
    assert (known.gpu, known.load_seconds, known.wake_seconds) == ("H100", 70.0, 3.0)
    rows = ModelLoad.objects.order_by("pk").values_list("change", "seconds", "error")
    assert list(rows) == [
        ("load", 60.0, ""),
        ("load", 20.0, "no room"),
        ("load", 80.0, ""),
        ("sleep", 4.0, ""),
        ("wake", 3.0, ""),
        ("wake", 9.0, "gibberish"),
        ("unload", 1.0, ""),
    ]


def test_the_history_of_loads_goes_back_a_month() -> None:
    register_model(name="m", source="none", engine="instant")
    for days in (31, 29):
        loaded(float(days))
        newest = ModelLoad.objects.filter(seconds=days)
        newest.update(at=timezone.now() - timedelta(days=days))
    loaded(1.0)
    assert sorted(ModelLoad.objects.values_list("seconds", flat=True)) == [1.0, 29.0]


def learned() -> list[tuple[str, dict[str, Any], str]]:
    return list(Measurement.objects.order_by("gpu").values_list("gpu", "settled", "unfit_why"))


def test_what_is_learned_of_its_memory_is_kept_until_the_entry_is_touched() -> None:
    model = register_model(name="m", source="none", engine="instant")
    services.note_unfit("m", "4090", why="too large", seen=model.updated_at)
    services.note_settled("m", "H100", settled={"max-num-seqs": 8}, seen=model.updated_at)
    assert learned() == [("4090", {}, "too large"), ("H100", {"max-num-seqs": 8}, "")]
    assert queries.settled_on("m", "H100") == {"max-num-seqs": 8}
    assert (queries.settled_on("m", "A100"), queries.settled_on("gone", "H100")) == ({}, {})
    services.note_settled("m", "4090", settled={"max-num-seqs": 4}, seen=model.updated_at)
    assert learned()[0] == ("4090", {"max-num-seqs": 4}, "")
    again = register_model(name="m", source="none", engine="instant")
    assert learned() == [("4090", {}, ""), ("H100", {}, "")]
    services.note_unfit("m", "4090", why="of the entry before", seen=model.updated_at)
    services.note_unfit("gone", "4090", why="x", seen=model.updated_at)
    assert learned() == [("4090", {}, ""), ("H100", {}, "")]
    assert again.updated_at > model.updated_at


def test_a_model_is_given_another_chance() -> None:
    model = register_model(name="m", source="none", engine="instant")
    services.note_speed("m", 100.0, "H100")
    services.note_failure("m", why="no room")
    services.note_unfit("m", "H100", why="no room", seen=model.updated_at)
    again = services.retry_model(name="m")
    assert (again.load_error, again.load_failed_at, learned()) == ("", None, [("H100", {}, "")])
    assert again.updated_at > model.updated_at
    assert Measurement.objects.get().tokens_per_second == 100.0
    assert [event.action for event in audited()] == ["model.registered", "model.retried"]
    with pytest.raises(NotFound, match="There is no model 'gone'"):
        services.retry_model(name="gone")


def test_a_speed_counts_by_the_seconds_for_which_it_was_measured() -> None:
    """So it is a mean of the last five minutes, whichever and however many workers they are of."""
    register_model(name="m", source="none", engine="instant")
    speeds = []
    for speed, seconds in ((100.0, 10.0), (300.0, 300 * math.log(2)), (600.0, 300 * math.log(4))):
        services.note_speed("m", speed, seconds=seconds)
        speeds.append(Model.objects.get().tokens_per_second)
    assert speeds == pytest.approx([100.0, 200.0, 500.0])
    assert Measurement.objects.get().tokens_per_second == pytest.approx(500.0)
    services.note_speed("gone", 1.0)


def test_many_short_measurements_weigh_as_much_as_a_long_one() -> None:
    for name in "ab":
        register_model(name=name, source="none", engine="instant")
        services.note_speed(name, 100.0)
    services.note_speed("a", 300.0, seconds=60)
    for _ in range(6):
        services.note_speed("b", 300.0, seconds=10)
    a, b = Model.objects.order_by("name").values_list("tokens_per_second", flat=True)
    assert a == pytest.approx(b) == pytest.approx(136.25, rel=1e-3)


def test_a_changed_entry_keeps_its_speed() -> None:
    register_model(name="m", source="none", engine="instant")
    services.note_speed("m", 100.0)
    assert register_model(name="m", source="none", engine="instant").tokens_per_second == 100.0


# --- Prices and the audit -----------------------------------------------------------------------


def audited() -> list[AuditEvent]:
    with scopes_disabled():
        return list(AuditEvent.objects.filter(organization=None).order_by("number"))


def test_a_price_that_is_not_given_stays() -> None:
    register_model(name="m", source="x", input_price=Decimal("1.5"), output_price=Decimal(3))
    register_model(name="m", source="y", output_price=Decimal(4))
    model = Model.objects.get()
    assert (model.input_price, model.cached_price, model.output_price) == (
        Decimal("1.5"),
        None,
        Decimal(4),
    )


def test_registering_and_changing_a_model_is_audited(owner: Person, operator: User) -> None:
    model = register_model(
        name="m",
        source="gpt",
        engine="openai",
        base_url="https://host/v1",
        secret="sk-1",
        engine_args={"hf_token": "hf_1", "api_key": "k", "max_tokens": 5},
        organizations=[owner.caller.organization],
        input_price=Decimal("0.5"),
    )
    made = audited()[0]
    assert (made.action, made.via, made.target_kind, made.target_label) == (
        "model.registered",
        "system",
        "model",
        "m",
    )
    assert made.changes == {
        "source": [None, "gpt"],
        "revision": [None, ""],
        "task": [None, "chat"],
        "engine": [None, "openai"],
        "base_url": [None, "https://host/v1"],
        "input_price": [None, "0.500000"],
        "output_price": [None, 0],
        "restricted": [None, True],
        "engine_args": [None, {"hf_token": MASK, "api_key": MASK, "max_tokens": 5}],
        "secret": [None, MASK],
        "organizations": [None, ["acme"]],
    }
    register_model(
        name="m",
        source="gpt",
        engine="openai",
        base_url="https://host/v1",
        secret="sk-2",
        engine_args={},
        organizations=[],
        actor=operator,
    )
    changed = audited()[1]
    assert (changed.action, changed.actor, changed.target_id) == (
        "model.changed",
        operator,
        str(model.pk),
    )
    assert changed.changes == {
        "engine_args": [{"hf_token": MASK, "api_key": MASK, "max_tokens": 5}, {}],
        "restricted": [True, False],
        "secret": [MASK, MASK],
        "organizations": [["acme"], []],
    }
    said = str([each.changes for each in audited()])
    assert not any(secret in said for secret in ("sk-1", "sk-2", "hf_1"))


def test_registering_a_model_again_as_it_was_is_no_change() -> None:
    for _ in range(2):
        register_model(name="m", source="x", secret="s", input_price=Decimal("0.5"))
    assert [each.action for each in audited()] == ["model.registered"]


def test_what_is_refused_is_not_audited() -> None:
    with pytest.raises(BadRequest):
        register_model(name="m", source="none")
    assert audited() == []


def test_the_audit_has_no_secret_out_of_an_address_or_from_deep_inside() -> None:
    register_model(
        name="m",
        source="gpt",
        engine="openai",
        base_url="https://user:hunter2@host/v1",
        engine_args={
            "hf_overrides": {"api_key": "hunter2", "deep": [{"Password": 12345, "size": 5}]},
            "token_file": "hunter2",
            "hf_tokens": ["hunter2"],
            "tokenizer": "org/model",
            "max_num_batched_tokens": 8192,
            "cache": ["redis://:hunter2@host/0", "https://host/a@b", None, True],
        },
    )
    (made,) = audited()
    assert made.changes["base_url"] == [None, f"https://{MASK}@host/v1"]
    assert made.changes["engine_args"][1] == {
        "hf_overrides": {"api_key": MASK, "deep": [{"Password": MASK, "size": 5}]},
        "token_file": MASK,
        "hf_tokens": MASK,
        "tokenizer": "org/model",
        "max_num_batched_tokens": 8192,
        "cache": [f"redis://{MASK}@host/0", "https://host/a@b", None, True],
    }


def test_a_secret_of_another_secret_key_can_be_replaced(settings: Any) -> None:
    register_model(name="m", source="x", secret="old")
    settings.SECRET_KEY = "y" * 50
    register_model(name="m", source="y")
    model = register_model(name="m", source="y", secret="new")
    assert secrets.decrypt(model.encrypted_secret) == "new"
    assert [each.changes for each in audited()][1:] == [
        {"source": ["x", "y"]},
        {"secret": [MASK, MASK]},
    ]
