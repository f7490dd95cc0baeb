"""The URL map: the API under /v1, sign-in under /accounts, and the pages."""

from __future__ import annotations

from django.urls import include, path

from batches import views as batches
from portal import health
from portal.api import api

urlpatterns = [
    path("healthz", health.healthz),
    path("readyz", health.readyz),
    path("v1/", api.urls),
    path("accounts/", include("allauth.urls")),
    path("", batches.batch_list, name="home"),
    path("batches/<str:batch_id>/cancel", batches.cancel_batch, name="cancel_batch"),
    path("files/<str:file_id>/content", batches.file_content, name="file_content"),
]
