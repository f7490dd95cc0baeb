"""What a person does about their own signing in that allauth has no page for."""

from __future__ import annotations

from allauth.usersessions.internal.flows.sessions import end_sessions
from allauth.usersessions.models import UserSession
from django.contrib import messages
from django.http.response import HttpResponseBase
from django.shortcuts import get_object_or_404, redirect
from django.views.decorators.http import require_POST

from accounts.models import User
from accounts.pages import PageRequest, person_page


@require_POST
@person_page
def session_end(request: PageRequest, user: User, session_id: int) -> HttpResponseBase:
    """Sign out one browser, this one or another."""
    session = get_object_or_404(UserSession, pk=session_id, user=user)
    end_sessions(request, [session])
    messages.success(request, "That browser is signed out.")
    return redirect("usersessions_list")
