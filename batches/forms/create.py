"""What the forms of a new batch hold; services check what it means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from django import forms
from django.forms import BoundField

from accounts.models import Project
from batches.forms.projects import offer_projects
from batches.models.batches import Endpoint
from batches.prompts import GENERATING, INSTRUCTED, OFFERED, Recipe, Template, UnknownColumns
from batches.services.batches import MAX_KEY, MAX_PAIRS, MAX_VALUE
from batches.services.validation import ENDPOINTS
from models_registry.models import Model, Task

PAIRS_SHOWN = 2
_WINDOWS = ("1h", "6h", "24h", "72h", "168h")
MOST_PLACES = 1000
"""So often a prompt may name columns: each is filled in for every row while somebody waits."""
_PROJECT = "Its use counts there; its results go to that project's handlers and webhooks."
_BRACES = "Each <code>{{column}}</code> is replaced by the row's cell, as it is."


class RecipeForm(forms.Form):
    """How each row of a table becomes a request."""

    model = forms.ChoiceField()
    endpoint = forms.ChoiceField(choices=[(each.value, each.value) for each in OFFERED])
    prompt = forms.CharField(
        max_length=100_000,
        strip=False,
        widget=forms.Textarea({"rows": 5, "spellcheck": "true"}),
        help_text=_BRACES,
    )
    system = forms.CharField(
        required=False,
        max_length=100_000,
        strip=False,
        label="System prompt",
        widget=forms.Textarea({"rows": 2}),
        help_text="May be empty, and may have columns in it, too.",
    )
    custom_id = forms.ChoiceField(
        required=False,
        label="Id of each request",
        help_text="A column whose cells are all different, to find answers by.",
    )
    max_tokens = forms.IntegerField(
        required=False,
        min_value=1,
        max_value=10_000_000,
        label="Most tokens of an answer",
        help_text="Empty: as the model does by itself.",
    )
    temperature = forms.FloatField(
        required=False,
        min_value=0,
        max_value=2,
        widget=forms.NumberInput({"step": "0.1"}),
        help_text="From 0 to 2. Empty: as the model does by itself.",
    )

    def __init__(
        self, data: Any = None, *, models: Iterable[Model], columns: Sequence[str], **options: Any
    ) -> None:
        super().__init__(data, **options)
        self._columns = columns
        self._tasks = {model.name: Task(model.task) for model in models}
        chosen: Any = self.fields["model"]
        chosen.choices = [(name, name) for name in self._tasks]
        named: Any = self.fields["custom_id"]
        named.choices = [("", "The row's number"), *((name, name) for name in columns)]

    def clean_prompt(self) -> str:
        return self._template("prompt")

    def clean_system(self) -> str:
        return self._template("system")

    def clean(self) -> dict[str, Any]:
        given: dict[str, Any] = super().clean() or {}
        endpoint, task = given.get("endpoint"), self._tasks.get(given.get("model", ""))
        if endpoint and task and endpoint not in ENDPOINTS[task]:
            self.add_error(
                "endpoint", f"{given['model']} is a {task} model: it does not answer {endpoint}."
            )
        if endpoint not in INSTRUCTED and given.get("system"):
            self.add_error("system", f"{endpoint} takes no system prompt: leave it empty.")
        for name in ("max_tokens", "temperature"):
            if endpoint not in GENERATING and given.get(name) is not None:
                self.add_error(name, f"{endpoint} writes no answer: leave it empty.")
        return given

    @property
    def recipe(self) -> Recipe:
        return Recipe(**self.cleaned_data)

    def _template(self, name: str) -> str:
        text = str(self.cleaned_data[name])
        if text.count("{{") > MOST_PLACES:
            raise forms.ValidationError(f"Columns are named more than {MOST_PLACES:,} times.")
        try:
            Template(text, self._columns)
        except UnknownColumns as error:
            names = ", ".join(each[:80] for each in error.names[:5])
            raise forms.ValidationError(f"The table has no column called {names}.") from None
        return text if text.strip() else ""


def recipe_to_begin_with(columns: Sequence[str], models: Sequence[Model]) -> dict[str, Any]:
    """What the form holds at first: the first column as the prompt."""
    task = Task(models[0].task) if models else Task.CHAT
    endpoint = Endpoint.EMBEDDINGS if task == Task.EMBEDDING else Endpoint.CHAT_COMPLETIONS
    return {"prompt": f"{{{{{columns[0]}}}}}", "endpoint": endpoint.value}


class BatchForm(forms.Form):
    """How a batch is to be run."""

    priority = forms.ChoiceField(
        choices=[("high", "High"), ("normal", "Normal"), ("low", "Low")], initial="normal"
    )
    completion_window = forms.CharField(
        max_length=16,
        label="Window",
        initial="24h",
        widget=forms.TextInput({"list": "windows"}),
        help_text="Hours or minutes after which what is left is not run: 24h, 90m; at most 336h.",
    )
    output_days = forms.IntegerField(
        required=False,
        min_value=1,
        max_value=30,
        label="Delete the output after how many days",
    )

    windows = _WINDOWS

    def __init__(
        self,
        data: Any = None,
        *,
        usual_days: int | None,
        projects: Sequence[Project],
        project: str,
        **options: Any,
    ) -> None:
        """`project` is the id of the one that the file is in."""
        super().__init__(data, **options)
        offer_projects(self, projects, usual=project, help_text=_PROJECT)
        kept = f"after {usual_days:,} days" if usual_days else "never"
        self.fields["output_days"].help_text = f"From 1 to 30. Empty: {kept}, by your settings."
        for at in range(MAX_PAIRS):
            self.fields[f"key_{at}"] = forms.CharField(
                required=False,
                max_length=MAX_KEY,
                label=f"Key {at + 1}",
                widget=forms.TextInput({"placeholder": "Key"}),
            )
            self.fields[f"value_{at}"] = forms.CharField(
                required=False,
                max_length=MAX_VALUE,
                label=f"Value {at + 1}",
                widget=forms.TextInput({"placeholder": "Value"}),
            )

    @property
    def pairs(self) -> list[tuple[BoundField, BoundField]]:
        return [(self[f"key_{at}"], self[f"value_{at}"]) for at in range(MAX_PAIRS)]

    @property
    def first_pairs(self) -> list[tuple[BoundField, BoundField]]:
        return self.pairs[:PAIRS_SHOWN]

    @property
    def more_pairs(self) -> list[tuple[BoundField, BoundField]]:
        return self.pairs[PAIRS_SHOWN:]

    @property
    def has_more(self) -> bool:
        return any(field.value() for pair in self.more_pairs for field in pair)

    def clean(self) -> dict[str, Any]:
        given: dict[str, Any] = super().clean() or {}
        metadata: dict[str, str] = {}
        for key, value, at in self._given_pairs(given):
            if not key:
                self.add_error(f"key_{at}", "Name the value.")
            elif key in metadata:
                self.add_error(f"key_{at}", "This key is given twice.")
            metadata[key] = value
        given["metadata"] = metadata or None
        return given

    @staticmethod
    def _given_pairs(given: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
        for at in range(MAX_PAIRS):
            key, value = given.get(f"key_{at}", ""), given.get(f"value_{at}", "")
            if key or value:
                yield key, value, at
