"""What people may call what they make: organizations, projects. No database here."""

from __future__ import annotations

from accounts.errors import BadRequest

LONGEST = 150


def clean(name: str, *, param: str = "name", longest: int = LONGEST) -> str:
    """The text on one line, without what cannot be seen; raises `BadRequest`."""
    plain = " ".join("".join(char if char.isprintable() else " " for char in name).split())
    if not plain:
        raise BadRequest(f"The {param} is empty.", param=param)
    if len(plain) > longest:
        raise BadRequest(f"The {param} may have at most {longest} characters.", param=param)
    return plain
