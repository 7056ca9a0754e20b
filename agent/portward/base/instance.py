"""The name of an instance: the agent in a named network namespace, beside the one of the host itself. Pure.

The namespace, the file `NAME.toml` and the unit `portward@NAME` share the name. `ip netns add` accepts every name
without a `/`, but systemd accepts fewer characters in the name of a unit.
"""

from __future__ import annotations

import re
from typing import Final

# The unit of the agent of the host itself, and its file portward.toml.
_HOST: Final = "portward"
# systemd writes every other character of a unit's name as an escape. The unit files use the name as it is written,
# so the folder of an escaped name would not be found. It also takes no name of more than 255 characters, and
# `portward-baseline@.service` has 26 of them.
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9:_.-]{0,228}")

# The instance that this process belongs to; empty for the host's own.
_own: list[str] = []


def problem(name: str) -> str:
    """The reason why this cannot be the name of an instance; empty if it can."""
    if not _NAME.fullmatch(name):
        return f"{name!r} is no name of an instance: letters, digits, '_', and, not first, ':', '.' and '-'"
    if name == _HOST:
        return f"{name!r} is no name of an instance, because portward.toml is the file of the host's own agent"
    return ""


def note(name: str) -> None:
    """Notes the instance that this process belongs to, for `unit`."""
    _own[:] = [name]


def unit() -> str:
    """The unit of the agent that this process belongs to, or asks: `portward`, or `portward@NAME`."""
    return f"{_HOST}@{_own[0]}" if _own else _HOST
