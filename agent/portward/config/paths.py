"""The meaning of a path in portward.toml: relative to the folder of that file, for every verb and the agent,
whatever their working folder is. Paths on the command line are relative to the working folder, as usual.

A path in the file is UTF-8, like the file. Python encodes file names by the locale, so a verb on a Latin-1
terminal would open another file than the agent. `from_file` and `to_text` avoid that.
"""

from __future__ import annotations

import os
from pathlib import Path


def from_file(text: str, file: Path) -> str:
    """The absolute path that `text` in `file` means. It is relative to the folder in the name of `file`: if that
    is a symbolic link, the folder of the link."""
    return os.path.join(file.absolute().parent, os.fsdecode(text.encode()))  # noqa: PTH118 # it may end with a /


def to_text(path: str) -> str:
    """An absolute path as text that is the same in every locale."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_path(name: str) -> bool:
    """Whether the name of a preset is a path: it contains a `/` or ends in `.toml`."""
    return "/" in name or name.endswith(".toml")


def program(word: str, file: Path) -> str:
    """The program that the first word of a command in `file` names: as in a shell, a path if it contains a `/`,
    else a name for PATH."""
    return from_file(word, file) if "/" in word else word
