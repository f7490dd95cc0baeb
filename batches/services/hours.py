"""What organizations used by the hour, for charts: noted by the sweep while their batches run.

Saving results is left alone: it is busy enough. What comes after the last look is noted when the
batch is settled (`accounts/services/quotas.py`), so that nothing is missed or counted twice.
"""

from __future__ import annotations

from datetime import timedelta

from django.db import connection
from django.utils import timezone

from accounts.models import HourlyUse

KEPT = timedelta(days=31)

_NOTE = """
WITH changed AS (
    SELECT reserved.batch_id, reserved.organization_id,
        batch.completed + batch.failed AS requests, batch.input_tokens, batch.output_tokens,
        reserved.noted_requests, reserved.noted_input_tokens, reserved.noted_output_tokens
    FROM accounts_reservation AS reserved
    JOIN batches_batch AS batch ON batch.id = reserved.batch_id
    WHERE batch.status IN ('in_progress', 'finalizing', 'cancelling')
        AND batch.completed + batch.failed > reserved.noted_requests
    FOR NO KEY UPDATE OF reserved SKIP LOCKED
), noted AS (
    UPDATE accounts_reservation AS reserved
    SET noted_requests = changed.requests,
        noted_input_tokens = changed.input_tokens,
        noted_output_tokens = changed.output_tokens
    FROM changed WHERE reserved.batch_id = changed.batch_id
)
INSERT INTO accounts_hourlyuse AS kept (
    organization_id, hour, requests, input_tokens, output_tokens
)
SELECT organization_id, date_trunc('hour', clock_timestamp(), 'UTC'),
    sum(requests - noted_requests), sum(input_tokens - noted_input_tokens),
    sum(output_tokens - noted_output_tokens)
FROM changed GROUP BY organization_id ORDER BY organization_id
ON CONFLICT (organization_id, hour) DO UPDATE SET
    requests = kept.requests + EXCLUDED.requests,
    input_tokens = kept.input_tokens + EXCLUDED.input_tokens,
    output_tokens = kept.output_tokens + EXCLUDED.output_tokens
"""
"""One row more of each organization an hour, whatever runs; a batch that is being settled is left
to that."""


def note_use() -> None:
    """Add what came since the last look; across tenants, in one statement."""
    with connection.cursor() as cursor:
        cursor.execute(_NOTE)


def forget_old() -> None:
    HourlyUse.objects.filter(hour__lt=timezone.now() - KEPT).delete()
