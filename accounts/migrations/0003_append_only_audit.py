"""The audit is append-only for everybody who comes through SQL, ourselves included."""

from django.db import migrations

GUARD = """
CREATE FUNCTION accounts_auditevent_is_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the audit is append-only' USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER accounts_auditevent_append_only BEFORE UPDATE OR DELETE ON accounts_auditevent
FOR EACH ROW EXECUTE FUNCTION accounts_auditevent_is_append_only();
"""
UNGUARD = """
DROP TRIGGER accounts_auditevent_append_only ON accounts_auditevent;
DROP FUNCTION accounts_auditevent_is_append_only();
"""


class Migration(migrations.Migration):
    dependencies = [("accounts", "0002_teams")]
    operations = [migrations.RunSQL(GUARD, UNGUARD)]
