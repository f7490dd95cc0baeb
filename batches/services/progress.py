"""Samples of how far batches are, for the charts of their pages; taken by the sweep.

Only batches that a worker is at are sampled, ever more seldom: every `STEP` seconds at first, and
at most `POINTS` times in as long as the batch has run. That is 10 minutes of samples, and then
`POINTS` more for each time that its age grows e-fold: some 1,000 after 14 days. When the batch ends
they are thinned to `KEPT`.
"""

from __future__ import annotations

from django.db import connection

from batches.models import Batch, Sample

STEP = 5.0
POINTS = 120
KEPT = 60

_SAMPLE = """
INSERT INTO batches_sample (batch_id, at, answered, input_tokens, output_tokens)
SELECT batch.id, clock_timestamp(), batch.completed + batch.failed, batch.input_tokens,
    batch.output_tokens
FROM batches_batch AS batch JOIN batches_backlog AS backlog ON backlog.batch_id = batch.id
WHERE batch.status = 'in_progress'
    AND batch.id IN (SELECT batch_id FROM batches_chunk WHERE state = 'leased')
    AND NOT EXISTS (
        SELECT FROM batches_sample AS sample
        WHERE sample.batch_id = batch.id AND sample.at > clock_timestamp() - greatest(
            %(step)s * interval '1 second', (clock_timestamp() - backlog.started_at) / %(points)s
        )
    )
ON CONFLICT DO NOTHING
"""
_THIN = """
DELETE FROM batches_sample WHERE id IN (
    SELECT id FROM (
        SELECT id, row_number() OVER (ORDER BY at) AS number, count(*) OVER () AS many
        FROM batches_sample WHERE batch_id = %s
    ) AS numbered
    WHERE many > %s AND (number - 1) %% ceil(many::float8 / %s)::int <> 0
)
"""


def sample() -> None:
    """Note how far the batches are that are being worked on, of all tenants."""
    with connection.cursor() as cursor:
        cursor.execute(_SAMPLE, {"step": STEP, "points": POINTS})


def close(batch: Batch) -> None:
    """Thin what was sampled of a batch that is about to end, and add how it ended.

    In the transaction that ends it, before what was never run is counted as failed.
    """
    with connection.cursor() as cursor:
        cursor.execute(_THIN, [batch.pk, KEPT, KEPT])
    stopped = batch.finalizing_at or batch.cancelling_at
    if stopped and Sample.objects.filter(batch=batch, at__lt=stopped).exists():
        Sample.objects.update_or_create(
            batch=batch,
            at=stopped,
            defaults={
                "answered": batch.answered,
                "input_tokens": batch.input_tokens,
                "output_tokens": batch.output_tokens,
            },
        )
