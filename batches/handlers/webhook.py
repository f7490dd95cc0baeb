"""Results by POST, some lines at a time, signed as webhooks are."""

from __future__ import annotations

from collections.abc import Iterator

import orjson
from django.utils import timezone
from pydantic import Field, SecretStr

from accounts.errors import BadRequest
from batches import webhooks
from batches.handlers.base import Answer, Batch, Handler, HandlerFailed, Results, Settings
from batches.services.deliveries import GONE
from batches.services.webhooks import checked_secret

USER_AGENT = "vLLM-Batch-Portal-Results/1"
LARGEST = 1024 * 1024
"""Bytes of lines after which a request is full, however few they are."""


class WebhookSettings(Settings):
    url: str = Field(
        title="URL", max_length=webhooks.LONGEST_URL, description="Where the results are posted."
    )
    secret: SecretStr = Field(
        title="Signing secret",
        max_length=200,
        description="“whsec_” and 24 to 64 bytes in base64; you verify requests with it.",
    )
    lines: int = Field(
        100, title="Lines a request", ge=1, le=1000, description="Fewer where lines are long."
    )
    timeout: int = Field(15, title="Timeout", ge=5, le=30, description="In seconds.")


class WebhookHandler(Handler[WebhookSettings]):
    name = "webhook"
    title = "Webhook"
    summary = "Posts the results to an address of yours, some lines at a time, signed."
    settings_schema = WebhookSettings

    def check(self, organization_id: str) -> None:
        try:
            checked_secret(self.settings.secret.get_secret_value())
            webhooks.require_reachable(self.settings.url)
        except BadRequest as error:
            raise HandlerFailed(error.message, final=True) from None

    def handle(self, batch: Batch, results: Results) -> str:
        number = 0
        for lines in self._parts(results):
            number += 1
            self._post(batch, number, lines)
            results.beat()
        return f"{number:,} request{'' if number == 1 else 's'}"

    def _parts(self, results: Results) -> Iterator[list[Answer]]:
        """The same parts every time, so that their ids mean the same."""
        part: list[Answer] = []
        size = 0
        for answer in results:
            part.append(answer)
            size += len(answer.line)
            if len(part) >= self.settings.lines or size >= LARGEST:
                yield part
                part, size = [], 0
        if part:
            yield part

    def _post(self, batch: Batch, number: int, lines: list[Answer]) -> None:
        """One request; the receiver knows a repeated one by its `webhook-id`."""
        body = orjson.dumps(
            {
                "type": "batch.results",
                "data": {
                    "batch_id": batch.pk,
                    "part": number,
                    "results": [orjson.Fragment(answer.line) for answer in lines],
                },
            }
        )
        id, secret = f"{batch.pk}.{number}", self.settings.secret.get_secret_value()
        headers = {
            "content-type": "application/json",
            "user-agent": USER_AGENT,
            **webhooks.signed(body, id=id, at=timezone.now(), secrets=[secret]),
        }
        receipt = webhooks.send(self.settings.url, body, headers, timeout=self.settings.timeout)
        if not receipt.ok:
            said, gone = f"Request {number}: {receipt.why}", receipt.status == GONE
            raise HandlerFailed(said, retry_after=receipt.retry_after, final=gone)
