"""People made before emails were confirmed keep signing in: the shell that made them knew them."""

from django.apps import apps as installed
from django.db import migrations

_HAS_ALLAUTH = installed.is_installed("allauth.account")


def verify(apps, schema_editor):
    if not _HAS_ALLAUTH:  # a GPU host
        return
    EmailAddress = apps.get_model("account", "EmailAddress")
    known = EmailAddress.objects.values("user")
    for user in apps.get_model("accounts", "User").objects.exclude(pk__in=known).iterator():
        EmailAddress.objects.create(
            user=user, email=user.email.lower(), verified=True, primary=True
        )


class Migration(migrations.Migration):
    dependencies = [("accounts", "0004_single_sign_on")]
    if _HAS_ALLAUTH:
        dependencies += [("account", "0009_emailaddress_unique_primary_email")]

    operations = [migrations.RunPython(verify, migrations.RunPython.noop)]
