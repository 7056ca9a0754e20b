"""The name of an instance: the agent in a named network namespace, beside the one of the host itself. Pure.

The namespace, the file `NAME.toml` and the unit `portward@NAME` share the name. `ip netns add` accepts every name
without a `/`, but systemd accepts fewer characters in the name of a unit.

Messages name the unit and the commands of the agent that they are about. `unit` and `command` are the one place
that knows them.
"""

from __future__ import annotations

import re
import shlex
from typing import Final, NamedTuple

# The unit of the agent of the host itself, and its file portward.toml.
_HOST: Final = "portward"
# systemd writes every other character of a unit's name as an escape. The unit files use the name as it is written,
# so the folder of an escaped name would not be found.
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9:_.-]*")
# systemd takes no name of more than 255 characters, and `portward-baseline@.service` has 26 of them.
MAX_NAME_CHARACTERS: Final = 255 - 26
# How much of a longer name a message shows.
_SHOWN: Final = 20
# The verbs about one gateway, which take --instance. All others work on a store, and take --config alone.
GATEWAY_VERBS: Final = frozenset(("check", "diagnose", "explain", "rules", "run", "status", "top"))


class Own(NamedTuple):
    """The instance that a process belongs to, by its name and the path of its configuration."""

    name: str
    config: str


# The instance that this process belongs to; empty for the host's own.
_own: list[Own] = []


def problem(name: str) -> str:
    """The reason why this cannot be the name of an instance; empty if it can."""
    if len(name) > MAX_NAME_CHARACTERS:
        return (
            f"{name[:_SHOWN]!r}… is no name of an instance: it has {len(name)} characters, and systemd takes "
            f"{MAX_NAME_CHARACTERS} in the names of its units"
        )
    if not _NAME.fullmatch(name):
        return f"{name!r} is no name of an instance: letters, digits, '_', and, not first, ':', '.' and '-'"
    if name == _HOST:
        return f"{name!r} is no name of an instance, because portward.toml is the file of the host's own agent"
    return ""


def note(own: Own | None) -> None:
    """Notes the instance that this process belongs to, for `unit` and `command`; None for the host's own."""
    _own[:] = [] if own is None else [own]


def noted() -> Own | None:
    """The instance that this process belongs to; None for the host's own. A process that it starts must note the
    same one."""
    return _own[0] if _own else None


def options() -> list[str]:
    """The command-line option by which a process that this one starts notes the same instance: `--instance NAME
    FILE`, or nothing."""
    return ["--instance", *_own[0]] if _own else []


def unit() -> str:
    """The unit of the agent that this process belongs to, or asks: `portward`, or `portward@NAME`."""
    return f"{_HOST}@{_own[0].name}" if _own else _HOST


def command(words: str) -> str:
    """The command line `portward WORDS` about the agent that this process belongs to, or asks. `words` begin with
    the verb. For an instance it ends with the option that names it."""
    if not _own:
        return f"portward {words}"
    if words.partition(" ")[0] in GATEWAY_VERBS:
        return of(_own[0].name, words)
    return f"portward {words} --config {shlex.quote(_own[0].config)}"


def of(name: str, words: str) -> str:
    """The command line `portward WORDS` of a gateway verb about the agent of the instance `name`, or about the
    host's own if that is empty."""
    return f"portward {words} --instance {name}" if name else f"portward {words}"
