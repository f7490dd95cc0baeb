"""As 0002, for the tables that came since: a row cannot join two tenants' rows.

Batches that are unfinished get the reservation that newer ones are made with; what ended ones
used is booked.
"""

from django.db import migrations

UNIQUE = "ALTER TABLE {table} ADD CONSTRAINT {table}_of_organization UNIQUE (organization_id, id)"
FOREIGN = (
    "ALTER TABLE {table} ADD CONSTRAINT {table}_{column}_same_organization "
    "FOREIGN KEY (organization_id, {column}) REFERENCES {other} (organization_id, id) "
    "DEFERRABLE INITIALLY DEFERRED"
)
PAIRS = [
    ("accounts_apikey", "replaced_by_id", "accounts_apikey"),
    ("accounts_quota", "api_key_id", "accounts_apikey"),
    ("accounts_reservation", "project_id", "accounts_project"),
    ("accounts_reservation", "api_key_id", "accounts_apikey"),
    ("accounts_usagerecord", "project_id", "accounts_project"),
    ("accounts_usagerecord", "api_key_id", "accounts_apikey"),
    ("accounts_trustedissuer", "project_id", "accounts_project"),
    ("batches_file", "api_key_id", "accounts_apikey"),
    ("batches_upload", "api_key_id", "accounts_apikey"),
    ("batches_batch", "api_key_id", "accounts_apikey"),
]
RESERVE = """
INSERT INTO accounts_reservation (
    batch_id, organization_id, project_id, user_id, api_key_id, model, tokens, cost,
    input_price, cached_price, output_price, created_at
)
SELECT batch.id, batch.organization_id, batch.project_id, batch.user_id, batch.api_key_id,
    coalesce(model.name, ''),
    coalesce((SELECT sum(tokens) FROM batches_chunk WHERE batch_id = batch.id), 0), 0,
    0, 0, 0, batch.created_at
FROM batches_batch AS batch LEFT JOIN models_registry_model AS model ON model.id = batch.model_id
WHERE batch.status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
"""
BOOK = """
INSERT INTO accounts_usagerecord (
    day, organization_id, project_id, user_id, api_key_id, model, endpoint, batches, requests,
    input_tokens, cached_tokens, output_tokens, reasoning_tokens, gpu_seconds, cost
)
SELECT
    (coalesce(completed_at, cancelled_at, expired_at) AT TIME ZONE 'UTC')::date,
    batch.organization_id, project_id, user_id, api_key_id, model.name, batch.endpoint,
    count(*), sum(completed + failed), sum(input_tokens), sum(cached_tokens), sum(output_tokens),
    sum(reasoning_tokens), sum(gpu_seconds), 0
FROM batches_batch AS batch JOIN models_registry_model AS model ON model.id = batch.model_id
WHERE status IN ('completed', 'cancelled', 'expired') AND completed + failed > 0
GROUP BY 1, 2, 3, 4, 5, 6, 7
"""


class Migration(migrations.Migration):
    dependencies = [
        ("batches", "0003_usage"),
        ("accounts", "0002_teams"),
        ("models_registry", "0001_initial"),
    ]
    operations = [
        migrations.RunSQL(
            UNIQUE.format(table="accounts_apikey"),
            "ALTER TABLE accounts_apikey DROP CONSTRAINT accounts_apikey_of_organization",
        ),
        *(
            migrations.RunSQL(
                FOREIGN.format(table=table, column=column, other=other),
                f"ALTER TABLE {table} DROP CONSTRAINT {table}_{column}_same_organization",
            )
            for table, column, other in PAIRS
        ),
        # Last: rows whose foreign keys are still to be checked keep a table from being altered.
        migrations.RunSQL(RESERVE, "DELETE FROM accounts_reservation"),
        migrations.RunSQL(BOOK, "DELETE FROM accounts_usagerecord"),
    ]
