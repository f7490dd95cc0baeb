"""The form of a result handler: a few fields of its own, and those of its kind's settings."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from django import forms
from django.utils.html import escape
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

BEFORE = "settings-"
"""Before the names of settings, among which there may be a `name`."""


class PairsField(forms.CharField):
    """A dictionary, as `name = value` on lines."""

    widget = forms.Textarea({"rows": 5, "spellcheck": "false"})

    def clean(self, value: Any) -> dict[str, str]:
        found = {}
        for line in str(super().clean(value)).splitlines():
            name, equals, rest = line.partition("=")
            if not line.strip():
                continue
            if not equals:
                raise forms.ValidationError(f"“{line.strip()[:100]}” has no “=”.")
            found[name.strip()] = rest.strip()
        return found

    def prepare_value(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return "\n".join(f"{name} = {each}" for name, each in value.items())
        return value


class ListField(forms.CharField):
    """A list, with commas."""

    def clean(self, value: Any) -> list[str]:
        return [each.strip() for each in str(super().clean(value)).split(",") if each.strip()]

    def prepare_value(self, value: Any) -> Any:
        return ", ".join(map(str, value)) if isinstance(value, list) else value


class HandlerForm(forms.Form):
    name = forms.CharField(
        max_length=64, help_text="By which a batch can ask for it, as <code>warehouse</code>."
    )
    project = forms.ChoiceField(required=False, help_text="Whose batches it handles.")

    def __init__(
        self, *args: Any, schema: type[BaseModel], projects: Any, kept: Any = (), **options: Any
    ) -> None:
        super().__init__(*args, **options)
        field: Any = self.fields["project"]
        field.choices = [("", "All projects"), *((each.pk, each.name) for each in projects)]
        for name, info in schema.model_fields.items():
            self.fields[BEFORE + name] = field_of(name, info, is_kept=name in kept)
        self.fields["by_default"] = forms.BooleanField(
            required=False, label="Handle every batch, also without being asked for"
        )
        self.fields["enabled"] = forms.BooleanField(required=False, label="Switched on")

    @property
    def settings_fields(self) -> list[forms.BoundField]:
        return [self[name] for name in self.fields if name.startswith(BEFORE)]

    @property
    def given(self) -> dict[str, Any]:
        """The settings, without those that were left empty."""
        found = {
            name.removeprefix(BEFORE): value
            for name, value in self.cleaned_data.items()
            if name.startswith(BEFORE)
        }
        return {name: value for name, value in found.items() if value not in ("", None)}


def field_of(name: str, info: FieldInfo, *, is_kept: bool = False) -> forms.Field:
    """A field for this setting; `is_kept`: a secret that is there, and stays when left empty."""
    kind = _plain(info.annotation)
    options: dict[str, Any] = {
        "label": info.title or name.replace("_", " ").capitalize(),
        "help_text": escape(info.description or ""),
        "required": info.is_required() and not is_kept,
        "initial": None if info.is_required() else info.get_default(call_default_factory=True),
    }
    if kind is bool:
        return forms.BooleanField(**{**options, "required": False})
    if kind is int:
        return forms.IntegerField(**options)
    if kind is SecretStr:
        return _secret_field(options, is_kept)
    if get_origin(kind) is Literal:
        return forms.ChoiceField(choices=[(each, each) for each in get_args(kind)], **options)
    if get_origin(kind) is dict:
        return PairsField(**options, max_length=100_000)
    if get_origin(kind) is list:
        return ListField(**options, max_length=10_000)
    return forms.CharField(**options, max_length=10_000)


def _secret_field(options: dict[str, Any], is_kept: bool) -> forms.Field:
    options = options | {"initial": None}
    if is_kept:
        said = options["help_text"]
        options["help_text"] = f"{said} Empty: the one that is there stays.".strip()
    widget = forms.PasswordInput({"autocomplete": "off"})
    return forms.CharField(**options, widget=widget, max_length=10_000, strip=False)


def _plain(annotation: Any) -> Any:
    """The type itself, of one that may be missing, too."""
    kinds = [each for each in get_args(annotation) if each is not NoneType]
    is_optional = NoneType in get_args(annotation)
    return kinds[0] if is_optional and kinds else annotation
