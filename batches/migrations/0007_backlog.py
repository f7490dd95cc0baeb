"""What waits of each batch is added up by the database itself, so that no code can get it wrong."""

import django.db.models.deletion
from django.db import migrations, models

ROWS = """SELECT batch_id, "end" - start AS requests, tokens,
            {sign} * (state = 'ready')::int AS ready, {sign} * (state = 'leased')::int AS leased
        FROM {table}"""
NEW, OLD = ROWS.format(sign=1, table="new_chunks"), ROWS.format(sign=-1, table="old_chunks")
# Batch by batch in order, so that two statements that change several cannot deadlock.
KEEP = """
CREATE FUNCTION batches_backlog_{event}() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    moved record;
BEGIN
    FOR moved IN
        SELECT batch_id, sum(ready) AS chunks, sum(ready * requests) AS requests,
            sum(ready * tokens) AS tokens,
            CASE WHEN sum(leased) > 0 THEN clock_timestamp() END AS leased_at
        FROM ({rows}) AS changed
        GROUP BY batch_id
        HAVING (sum(ready), sum(ready * requests), sum(ready * tokens)) <> (0, 0, 0)
        ORDER BY batch_id
    LOOP
        UPDATE batches_backlog SET
            chunks = chunks + moved.chunks,
            requests = requests + moved.requests,
            tokens = tokens + moved.tokens,
            started_at = coalesce(started_at, moved.leased_at),
            served_at = coalesce(moved.leased_at, served_at)
        WHERE batch_id = moved.batch_id;
        IF NOT FOUND AND moved.chunks > 0 THEN
            INSERT INTO batches_backlog (batch_id, chunks, requests, tokens)
            VALUES (moved.batch_id, moved.chunks, moved.requests, moved.tokens);
        END IF;
    END LOOP;
    RETURN NULL;
END $$;
CREATE TRIGGER batches_backlog_{event} AFTER {event} ON batches_chunk
REFERENCING {tables} FOR EACH STATEMENT EXECUTE FUNCTION batches_backlog_{event}();
"""
FORGET = """
DROP TRIGGER batches_backlog_{event} ON batches_chunk;
DROP FUNCTION batches_backlog_{event}();
"""
EVENTS = {
    "insert": ("NEW TABLE AS new_chunks", NEW),
    "update": ("OLD TABLE AS old_chunks NEW TABLE AS new_chunks", f"{NEW} UNION ALL {OLD}"),
    "delete": ("OLD TABLE AS old_chunks", OLD),
}
ADD_UP = """
INSERT INTO batches_backlog (batch_id, chunks, requests, tokens, served_at, started_at)
SELECT batch.id, count(*) FILTER (WHERE chunk.state = 'ready'),
    coalesce(sum(chunk.end - chunk.start) FILTER (WHERE chunk.state = 'ready'), 0),
    coalesce(sum(chunk.tokens) FILTER (WHERE chunk.state = 'ready'), 0),
    batch.served_at, batch.served_at
FROM batches_batch AS batch JOIN batches_chunk AS chunk ON chunk.batch_id = batch.id
WHERE batch.status IN ('in_progress', 'finalizing', 'cancelling') GROUP BY batch.id;
"""


class Migration(migrations.Migration):
    dependencies = [("batches", "0006_events")]
    operations = [
        migrations.CreateModel(
            name="Backlog",
            fields=[
                (
                    "batch",
                    models.OneToOneField(
                        on_delete=django.db.models.deletion.CASCADE,
                        primary_key=True,
                        related_name="backlog",
                        serialize=False,
                        to="batches.batch",
                    ),
                ),
                ("chunks", models.IntegerField(default=0)),
                ("requests", models.IntegerField(default=0)),
                ("tokens", models.BigIntegerField(default=0, help_text="Estimated.")),
                (
                    "started_at",
                    models.DateTimeField(help_text="When a chunk was first leased.", null=True),
                ),
                (
                    "served_at",
                    models.DateTimeField(help_text="When a chunk was last leased.", null=True),
                ),
            ],
            options={
                "constraints": [
                    models.CheckConstraint(
                        condition=models.Q(("chunks__gte", 0)), name="backlog_not_below_0"
                    )
                ],
            },
        ),
        *(
            migrations.RunSQL(
                KEEP.format(event=event, tables=tables, rows=rows), FORGET.format(event=event)
            )
            for event, (tables, rows) in EVENTS.items()
        ),
        migrations.RunSQL(ADD_UP, migrations.RunSQL.noop),
        migrations.RemoveField("batch", "served_at"),
    ]
