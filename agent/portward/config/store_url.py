"""The URL of the policy store, `sqlite:PATH`: its parts, and its mistakes. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

DEFAULT_STORE: Final = "sqlite:/var/lib/portward/portward.db"
# The forms that `store` may have, for messages and the template.
FORMS: Final = "sqlite:PATH"
_SQLITE: Final = re.compile(r"sqlite:(.+)", re.DOTALL)


def path_of(url: str) -> str | None:
    """The path of the SQLite file; None for another kind of URL."""
    found = _SQLITE.fullmatch(url)
    return found[1] if found else None


def located(url: str, absolute: Callable[[str], str]) -> str:
    """The URL with its path made `absolute`; another kind of URL as it is."""
    path = path_of(url)
    return url if path is None else f"sqlite:{absolute(path)}"


def unknown(url: str) -> str:
    """The error text for a URL without a backend."""
    return f"{url!r} is no store that this version knows: {FORMS}"


def problem(url: str) -> str:
    """The problem of the URL; empty if there is none."""
    written = path_of(url)
    path = "" if written is None else written.lstrip("/")
    if written is None or not path:
        return unknown(url)
    # In a URL, a host follows two slashes. Linux would read `//x` as `/x`, which `sqlite://x` does not look like.
    if written.startswith("//") and not written.startswith("///"):
        return (
            f"{url!r} has two slashes, after which a URL has a host: 'sqlite:{path}' is a file beside this one, "
            f"'sqlite:/{path}' one in /"
        )
    return ""
