"""`/.well-known/jwks.json`: the public keys by which anybody can check our access tokens."""

from __future__ import annotations

from django.http import HttpRequest, JsonResponse
from django.views.decorators.cache import cache_control
from django.views.decorators.http import require_safe

from accounts.services import tokens


@require_safe
@cache_control(public=True, max_age=tokens.JWKS_SECONDS)
def jwks(request: HttpRequest) -> JsonResponse:
    return JsonResponse(tokens.jwks())
