"""Who acts, for the log."""

from __future__ import annotations

import os
import pwd
from typing import Annotated, Final, TypeAlias

import typer

from portward.base.characters import from_bytes, shown, unshown
from portward.errors import InputError

# The order in which these say it: sudo's own word first, then as `getpass.getuser`.
_VARIABLES: Final = ("SUDO_USER", "LOGNAME", "USER", "LNAME", "USERNAME")
# A login name has up to 32 characters; a variable may have megabytes, and each entry of the log keeps it.
_LONGEST: Final = 100

ActorOption: TypeAlias = Annotated[
    str | None, typer.Option("--as", metavar="NAME", help="Who changes it, for the log.")
]


def actor_name(named: str | None) -> str:
    """Who the log is to name; raises InputError for what would spoil its lines."""
    if named is None:
        return _login()
    if not named.strip() or unshown(named) is not None:
        raise InputError(f"{named!r} is no name: at least one character, all of them printable", field="--as")
    return named


def _login() -> str:
    """Who is at the keyboard, also behind sudo. The environment is anybody's to set: what could forge a line of
    the log stands in it as an escape."""
    for name in _VARIABLES:
        found = shown(from_bytes(os.environ.get(name, ""))).strip()
        if found:
            return found[:_LONGEST]
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
