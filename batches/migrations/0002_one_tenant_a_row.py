"""Foreign keys that also compare the organization: a row cannot join two tenants' rows.

Scoped managers guard reads; this guards writes. Django has no composite foreign keys, hence SQL.
"""

from django.db import migrations

UNIQUE = "ALTER TABLE {table} ADD CONSTRAINT {table}_of_organization UNIQUE (organization_id, id)"
FOREIGN = (
    "ALTER TABLE {table} ADD CONSTRAINT {table}_{column}_same_organization "
    "FOREIGN KEY (organization_id, {column}) REFERENCES {other} (organization_id, id) "
    "DEFERRABLE INITIALLY DEFERRED"
)
PAIRS = [
    ("accounts_apikey", "project_id", "accounts_project"),
    ("batches_file", "project_id", "accounts_project"),
    ("batches_upload", "project_id", "accounts_project"),
    ("batches_upload", "file_id", "batches_file"),
    ("batches_batch", "project_id", "accounts_project"),
    ("batches_batch", "input_file_id", "batches_file"),
    ("batches_batch", "output_file_id", "batches_file"),
    ("batches_batch", "error_file_id", "batches_file"),
]


class Migration(migrations.Migration):
    dependencies = [("batches", "0001_initial"), ("accounts", "0001_initial")]
    operations = [
        migrations.RunSQL(
            UNIQUE.format(table=table),
            f"ALTER TABLE {table} DROP CONSTRAINT {table}_of_organization",
        )
        for table in ("accounts_project", "batches_file")
    ] + [
        migrations.RunSQL(
            FOREIGN.format(table=table, column=column, other=other),
            f"ALTER TABLE {table} DROP CONSTRAINT {table}_{column}_same_organization",
        )
        for table, column, other in PAIRS
    ]
