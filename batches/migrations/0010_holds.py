"""Holds, pauses and moderation: fields beside the status, which the wire does not know."""

import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("accounts", "0005_verified_emails"),
        ("batches", "0009_result_handlers"),
        ("models_registry", "0006_halt"),
    ]

    operations = [
        migrations.CreateModel(
            name="Moderation",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("everything", models.BooleanField(default=False)),
                (
                    "over_tokens",
                    models.BigIntegerField(help_text="Estimated, in and out.", null=True),
                ),
                (
                    "newer_than_days",
                    models.PositiveIntegerField(help_text="Of the organization's age.", null=True),
                ),
            ],
        ),
        migrations.AddField(
            model_name="batch",
            name="front_at",
            field=models.DateTimeField(
                help_text="When an operator moved it to the front.", null=True
            ),
        ),
        migrations.AddField(
            model_name="batch",
            name="held_at",
            field=models.DateTimeField(help_text="Since when none of it may be leased.", null=True),
        ),
        migrations.AddField(
            model_name="batch",
            name="held_note",
            field=models.CharField(
                blank=True,
                db_default="",
                default="",
                help_text="Shown to its organization.",
                max_length=500,
            ),
        ),
        migrations.AddField(
            model_name="batch",
            name="held_why",
            field=models.CharField(
                blank=True,
                choices=[
                    ("moderation", "held: waits for an operator's approval"),
                    ("operator", "held by an operator"),
                ],
                db_default="",
                default="",
                max_length=16,
            ),
        ),
        migrations.AddField(
            model_name="share",
            name="halt",
            field=models.CharField(
                blank=True,
                choices=[
                    ("paused", "paused: what runs is given back"),
                    ("draining", "draining: what runs is finished"),
                ],
                db_default="",
                default="",
                max_length=8,
            ),
        ),
        migrations.AddConstraint(
            model_name="batch",
            constraint=models.CheckConstraint(
                condition=models.Q(
                    ("held_at__isnull", True),
                    models.Q(("held_why", ""), _negated=True),
                    _connector="XOR",
                ),
                name="batch_held_with_reason",
            ),
        ),
        migrations.AddField(
            model_name="moderation",
            name="chosen_models",
            field=models.ManyToManyField(
                blank=True, related_name="moderated", to="models_registry.model"
            ),
        ),
        migrations.AddField(
            model_name="moderation",
            name="organization",
            field=models.ForeignKey(
                null=True,
                on_delete=django.db.models.deletion.CASCADE,
                related_name="moderations",
                to="accounts.organization",
            ),
        ),
        migrations.AddConstraint(
            model_name="moderation",
            constraint=models.UniqueConstraint(
                fields=("organization",), name="one_moderation_a_subject", nulls_distinct=False
            ),
        ),
    ]
