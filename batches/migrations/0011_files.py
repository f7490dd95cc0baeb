"""What a file holds, what a batch of it would find, and after how many days files go."""

import django.core.validators
import django.db.models.deletion
import django.utils.timezone
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("accounts", "0005_verified_emails"),
        ("batches", "0010_holds"),
        ("models_registry", "0005_loads"),
    ]

    operations = [
        migrations.AddField(
            model_name="file",
            name="lines",
            field=models.BigIntegerField(
                help_text="That are not blank; empty: not counted.", null=True
            ),
        ),
        migrations.CreateModel(
            name="Retention",
            fields=[
                (
                    "organization",
                    models.OneToOneField(
                        on_delete=django.db.models.deletion.CASCADE,
                        primary_key=True,
                        serialize=False,
                        to="accounts.organization",
                    ),
                ),
                (
                    "input_days",
                    models.PositiveIntegerField(
                        null=True,
                        validators=[
                            django.core.validators.MinValueValidator(1),
                            django.core.validators.MaxValueValidator(3650),
                        ],
                    ),
                ),
                (
                    "output_days",
                    models.PositiveIntegerField(
                        null=True,
                        validators=[
                            django.core.validators.MinValueValidator(1),
                            django.core.validators.MaxValueValidator(3650),
                        ],
                    ),
                ),
                ("applying_at", models.DateTimeField(null=True)),
                ("cursor", models.CharField(blank=True, max_length=48)),
            ],
            options={
                "constraints": [
                    models.CheckConstraint(
                        condition=models.Q(
                            ("input_days", None),
                            models.Q(("input_days__gte", 1), ("input_days__lte", 3650)),
                            _connector="OR",
                        ),
                        name="retention_input_days",
                    ),
                    models.CheckConstraint(
                        condition=models.Q(
                            ("output_days", None),
                            models.Q(("output_days__gte", 1), ("output_days__lte", 3650)),
                            _connector="OR",
                        ),
                        name="retention_output_days",
                    ),
                ],
            },
        ),
        migrations.CreateModel(
            name="FileCheck",
            fields=[
                (
                    "file",
                    models.OneToOneField(
                        on_delete=django.db.models.deletion.CASCADE,
                        primary_key=True,
                        related_name="checked",
                        serialize=False,
                        to="batches.file",
                    ),
                ),
                (
                    "state",
                    models.CharField(
                        choices=[("waiting", "Waiting"), ("done", "Done")],
                        default="waiting",
                        max_length=8,
                    ),
                ),
                ("asked_at", models.DateTimeField(default=django.utils.timezone.now)),
                ("done_at", models.DateTimeField(null=True)),
                ("bytes_read", models.BigIntegerField(default=0)),
                ("endpoint", models.CharField(blank=True, max_length=32)),
                ("requests", models.BigIntegerField(default=0)),
                ("bad_lines", models.BigIntegerField(default=0)),
                (
                    "errors",
                    models.JSONField(
                        default=list, help_text="The first bad lines, as the wire has them."
                    ),
                ),
                ("input_tokens", models.BigIntegerField(default=0)),
                (
                    "output_tokens",
                    models.BigIntegerField(default=0, help_text="At most, where lines say it."),
                ),
                (
                    "model",
                    models.ForeignKey(
                        null=True,
                        on_delete=django.db.models.deletion.SET_NULL,
                        related_name="+",
                        to="models_registry.model",
                    ),
                ),
            ],
            options={
                "indexes": [
                    models.Index(
                        condition=models.Q(("state", "waiting")),
                        fields=["asked_at"],
                        name="file_check_waiting",
                    )
                ],
            },
        ),
    ]
