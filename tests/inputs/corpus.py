"""The corpus: files with mistakes of operators or other tools, and the message that each must give.

`expected.toml` beside the files of a kind has, for each of them, the text that follows the file's name in the one
line on stderr. Files that begin with `ok-` look wrong but are right, so they give no message.
"""

from __future__ import annotations

import io
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from portward.base.characters import unshown
from portward.cli import main

HERE = Path(__file__).parent


class Case(NamedTuple):
    """A file of the corpus; `expected` is its message, or empty if the file is right."""

    path: Path
    expected: str


class Result(NamedTuple):
    """The exit code and the output of a run of the program."""

    code: int
    stdout: str
    stderr: str


def cases(kind: str) -> list[Case]:
    """All files of a kind, each with its message; empty for a file that is not in `expected.toml`."""
    expected: dict[str, str] = tomllib.loads((HERE / kind / "expected.toml").read_text())
    paths = sorted(path for path in (HERE / kind).iterdir() if path.name != "expected.toml")
    assert expected.keys() == {path.name for path in paths if not path.name.startswith("ok-")}
    return [Case(path, expected.get(path.name, "")) for path in paths]


def portward(*arguments: str) -> Result:
    """Runs the program's own `main` in this process, a hundred times faster than in a new one. Raises any
    exception that the program does not handle."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with patch.object(sys, "argv", ["portward", *arguments]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return Result(code, out.getvalue(), err.getvalue())


def first_line(text: str) -> str:
    """The first line of a text. Each line must have printable characters only."""
    first, *others = text.removesuffix("\n").split("\n")
    for line in others:
        one_line(line)
    return one_line(first)


def one_line(text: str) -> str:
    """The text, without its line end. It must be one line of printable characters."""
    line = text.removesuffix("\n")
    assert line, "nothing was printed"
    assert unshown(line) is None, f"a terminal would obey: {line!r}"
    return line
