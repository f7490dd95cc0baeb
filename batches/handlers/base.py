"""What a result handler is written against; docs/RESULT_HANDLERS.md shows how.

A distribution offers its handlers as entry points of the group `vllm_batch_portal.result_handlers`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from batches.handlers.results import Answer, HandlerFailed, Results
from batches.models import Batch

__all__ = ["Answer", "Batch", "Handler", "HandlerFailed", "Results", "Settings"]


class Settings(BaseModel):
    """What somebody sets for a handler: the page's form and the API's checks come from it.

    Fields are `str`, `int`, `bool`, `SecretStr`, `Literal`s of strings, `list[str]` or
    `dict[str, str]`, with a default or without, each with `Field(title=…, description=…)`. What is
    a `SecretStr` is encrypted at rest and never shown again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


S = TypeVar("S", bound=BaseModel)


class Handler(ABC, Generic[S]):
    """One kind of handler; an instance has the settings of one use of it.

    **It must be idempotent.** A batch's results come at least once, not exactly once: after a
    failure or the death of the process `handle` is called again, from the first answer on, and it
    may be that everything had been done already. Write what is keyed (by `batch.pk` and
    `custom_id`), so that doing it twice leaves what doing it once does.
    """

    name: ClassVar[str]
    """By which it is configured; the entry point's name is the same."""
    title: ClassVar[str]
    summary: ClassVar[str]
    """What it does, in a sentence, for the page that offers it."""
    settings_schema: ClassVar[type[BaseModel]]
    destination: ClassVar[Sequence[str]] = ()
    """The settings that say where secrets are shown: whoever changes one of them has to give the
    secrets anew, so that nobody has another's password sent to themselves."""

    do_not_call_in_templates: ClassVar[bool] = True  # Django would call a class that it is shown

    def __init__(self, settings: S) -> None:
        self.settings = settings

    @property
    def wants_requests(self) -> bool:
        """Whether answers are to come with their requests."""
        return False

    def check(self, organization_id: str) -> None:
        """Look closer at the settings than their schema can, whenever they are saved.

        Raises `HandlerFailed`, whose words are shown beside the form. It should take no longer
        than a few seconds.
        """

    @abstractmethod
    def handle(self, batch: Batch, results: Results) -> str | None:
        """Do it, for one batch that has ended; returns what was made, in a few words, if anything.

        Called in a process of its own kind, outside any transaction, inside the scope of the
        batch's organization. It has 55 minutes; an attempt that takes no answer (and calls
        `results.beat` not once) for nearly five is interrupted. Whatever it raises ends the attempt, and
        the words of it are shown to the organization: never put into it what is not theirs.
        """

    @classmethod
    def secret_fields(cls) -> frozenset[str]:
        """The names of the settings that are secrets."""
        fields = cls.settings_schema.model_fields
        return frozenset(name for name, field in fields.items() if _is_secret(field.annotation))


def _is_secret(annotation: Any) -> bool:
    return "SecretStr" in str(annotation)
