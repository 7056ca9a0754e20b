"""What a path in portward.toml means: relative to the folder of the file that names it, for every verb and the
agent, whatever folder they are started in. Paths on the command line are relative to the working folder, as ever.

A path in the file is UTF-8, as the file is. Python translates file names by the locale, so a verb on a Latin-1
terminal would look for another file than the agent. `from_file` and `to_text` go round that.
"""

from __future__ import annotations

import os
from pathlib import Path


def from_file(text: str, file: Path) -> str:
    """The path that `text` in `file` means, absolute. A link is not followed: what counts is the folder of the
    name that `file` was opened by."""
    return os.path.join(file.absolute().parent, os.fsdecode(text.encode()))  # noqa: PTH118 # it may end with a /


def to_text(path: str) -> str:
    """An absolute path as its text, which is the same for every locale."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_path(name: str) -> bool:
    """Whether a preset is named by its path: with a `/`, or ending in `.toml`."""
    return "/" in name or name.endswith(".toml")


def program(word: str, file: Path) -> str:
    """The program that the first word of a command in `file` names: a path if it has a `/`, else a name that is
    looked up in PATH, as a shell does."""
    return from_file(word, file) if "/" in word else word
