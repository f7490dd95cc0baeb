"""Writes of the registry, and who is offered which model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from accounts import secrets
from accounts.errors import BadRequest
from models_registry import services
from models_registry.models import Model
from models_registry.queries import offered_to
from models_registry.services import register_model
from tests.conftest import Person

pytestmark = pytest.mark.django_db


def test_a_model_is_registered_and_changed_under_its_name() -> None:
    first = register_model(name="m", source="org/model", revision="abc", engine_args={"a": 1})
    services.note_load("m", error="no room")
    again = register_model(name="m", source="org/other")
    assert (again.pk, again.source, again.revision, again.engine_args) == (
        first.pk,
        "org/other",
        "",
        {},
    )
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
    register_model(name="ours", source="none", engine="instant")
    assert [model.name for model in offered_to(globex)] == ["all", "both", "ours"]


def test_loads_are_noted() -> None:
    register_model(name="m", source="none", engine="instant")
    services.note_load("m", error="no room")
    failed = Model.objects.get()
    assert (failed.load_error, failed.load_failed_at is not None) == ("no room", True)
    services.note_load("m", error="")
    loaded = Model.objects.get()
    assert (loaded.load_error, loaded.load_failed_at) == ("", None)
    services.note_load("gone", error="x")


def test_the_speed_is_half_old_and_half_new() -> None:
    register_model(name="m", source="none", engine="instant")
    speeds = []
    for speed in (100.0, 300.0, 0.5):
        services.note_speed("m", speed)
        speeds.append(Model.objects.get().tokens_per_second)
    assert speeds == [100.0, 200.0, 100.25]
    services.note_speed("gone", 1.0)


def test_a_changed_entry_keeps_its_speed() -> None:
    register_model(name="m", source="none", engine="instant")
    services.note_speed("m", 100.0)
    assert register_model(name="m", source="none", engine="instant").tokens_per_second == 100.0
