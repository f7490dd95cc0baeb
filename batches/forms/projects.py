"""The choice of a project, for forms of what lands in one."""

from __future__ import annotations

from collections.abc import Sequence

from django import forms

from accounts.models import Project


def offer_projects(
    form: forms.Form, projects: Sequence[Project], *, usual: str = "", help_text: str = ""
) -> None:
    """Give the form a field `project`, where there is a choice, with `usual` (an id) chosen, else
    the first."""
    if len(projects) < 2:
        return
    ids = [project.pk for project in projects]
    form.fields["project"] = forms.ChoiceField(
        choices=[(project.pk, project.name) for project in projects],
        initial=usual if usual in ids else ids[0],
        required=False,  # the form may be older than the second project
        help_text=help_text,
    )
