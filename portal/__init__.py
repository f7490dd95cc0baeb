"""The Django project: settings, URLs, the Celery app, and the services that `./run` embeds."""

from portal.celery import app as celery_app

__all__ = ["celery_app"]
