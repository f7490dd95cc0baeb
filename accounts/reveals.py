"""A secret that is shown once, on a page that may be loaded again without making another.

The POST that makes it keeps it here and redirects; the page that it leads to takes it. Meanwhile it
lies encrypted in the session, so in the database: in no cookie, no address and no log.
"""

from __future__ import annotations

import time

from django.http import HttpRequest
from django.views.decorators.debug import sensitive_variables

from accounts import secrets

SECONDS = 600
"""How long the page may take to be opened."""
_NAME = "reveal"


@sensitive_variables("text")
def keep(request: HttpRequest, about: str, text: str) -> None:
    """Keep the secret of the row of this id for this session's next look; one at a time."""
    encrypted = secrets.encrypt(text)
    request.session[_NAME] = {"about": about, "text": encrypted, "until": time.time() + SECONDS}


@sensitive_variables()
def take(request: HttpRequest, about: str) -> str:
    """The secret, which nobody gets a second time; '' if there is none, or its time is over."""
    kept = request.session.get(_NAME)
    if request.method != "GET" or not kept or kept["about"] != about:
        return ""
    del request.session[_NAME]
    return secrets.decrypt(kept["text"]) if kept["until"] > time.time() else ""
