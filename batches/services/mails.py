"""What is mailed to people about their work; sending it never holds up the work itself."""

from __future__ import annotations

import smtplib

import structlog
from django.conf import settings
from django.core.mail import send_mail
from django.template.loader import render_to_string
from django_scopes import scopes_disabled

from accounts.models import Membership, Organization, Role
from batches.models import WebhookEndpoint

logger = structlog.get_logger(__name__)


def webhook_disabled(endpoint_id: str) -> None:
    """Tell the owners and admins that an endpoint is sent nothing more; each in a mail of their own.

    Nothing to do once it is enabled again, or gone.
    """
    with scopes_disabled():
        rows = WebhookEndpoint.objects.select_related("organization")
        endpoint = rows.filter(pk=endpoint_id, disabled_at__isnull=False).first()
        if endpoint is None:
            return
        people = _in_charge(endpoint.organization)
    said = {"endpoint": endpoint, "base_url": settings.BASE_URL}
    subject = render_to_string("batches/mail/webhook_disabled_subject.txt", said).strip()
    text = render_to_string("batches/mail/webhook_disabled.txt", said)
    for email in people:
        try:
            send_mail(subject, text, None, [email])
        except (OSError, UnicodeError, smtplib.SMTPException) as error:
            logger.error("mail not sent", webhook=endpoint_id, error=str(error))


def _in_charge(organization: Organization) -> list[str]:
    """The addresses of those who may look after it."""
    members = Membership.objects.filter(
        organization=organization, role__in=(Role.OWNER, Role.ADMIN), user__is_active=True
    )
    return list(members.order_by("pk").values_list("user__email", flat=True))
