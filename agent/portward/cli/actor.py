"""The name of the person who acts, for the log."""

from __future__ import annotations

import os
import pwd
from typing import Annotated, Final, TypeAlias

import typer

from portward.base.characters import from_bytes, shown, unshown
from portward.errors import InputError

# The person behind sudo first, then in the order of `getpass.getuser`.
_VARIABLES: Final = ("SUDO_USER", "LOGNAME", "USER", "LNAME", "USERNAME")
# A login name has up to 32 characters. A variable may have megabytes, and each entry of the log stores the name.
_MAX_CHARS: Final = 100

ActorOption: TypeAlias = Annotated[
    str | None, typer.Option("--as", metavar="NAME", help="The author of the change, for the log.")
]


def actor_name(named: str | None) -> str:
    """The name for the log: `named`, or else that of the login. Raises InputError for a name that is empty or not
    printable."""
    if named is None:
        return _login()
    if not named.strip() or unshown(named) is not None:
        raise InputError(f"{named!r} is no name: at least one character, all of them printable", field="--as")
    return named


def _login() -> str:
    """The login name, also behind sudo. The user controls the environment, so characters that could forge a line
    of the log are escaped."""
    for name in _VARIABLES:
        found = shown(from_bytes(os.environ.get(name, ""))).strip()
        if found:
            return found[:_MAX_CHARS]
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
