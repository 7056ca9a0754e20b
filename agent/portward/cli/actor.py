"""Who acts, for the log."""

from __future__ import annotations

import getpass
import os
from typing import Annotated, TypeAlias

import typer

from portward.errors import InputError

ActorOption: TypeAlias = Annotated[
    str | None, typer.Option("--as", metavar="NAME", help="Who changes it, for the log.")
]


def acting(named: str | None) -> str:
    """Who the log is to name; raises InputError for what would spoil its lines."""
    if named is None:
        return _login()
    if not named.strip() or not named.isprintable():
        raise InputError(f"{named!r} is no name: at least one character, all of them printable", field="--as")
    return named


def _login() -> str:
    """Who is at the keyboard, also behind sudo."""
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
