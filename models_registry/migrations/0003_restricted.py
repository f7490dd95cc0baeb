"""Whether a model is for some organizations only is a column: theirs may be purged, all of them."""

from django.db import migrations, models


def restrict(apps, schema_editor):
    apps.get_model("models_registry", "Model").objects.filter(organizations__isnull=False).update(
        restricted=True
    )


class Migration(migrations.Migration):
    dependencies = [
        ("models_registry", "0002_prices"),
    ]

    operations = [
        migrations.AddField(
            model_name="model",
            name="restricted",
            field=models.BooleanField(
                default=False,
                help_text="Only the organizations named may use it, even if none is left.",
            ),
        ),
        migrations.AlterField(
            model_name="model",
            name="organizations",
            field=models.ManyToManyField(
                blank=True,
                help_text="Who may use it, if it is restricted.",
                to="accounts.organization",
            ),
        ),
        migrations.RunPython(restrict, migrations.RunPython.noop),
    ]
