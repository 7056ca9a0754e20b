"""The corpus: files that operators, or other tools, got wrong, and what is told of each.

`told.toml` beside the files of a kind says for each of them what follows the file's name in the one line on
stderr. Files that begin with `ok-` look wrong and are right: nothing is told of them.
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
    """A file of the corpus; `told` is empty where it is right."""

    path: Path
    told: str


class Result(NamedTuple):
    """What a run of the program gave."""

    code: int
    stdout: str
    stderr: str


def cases(kind: str) -> list[Case]:
    """All files of a kind, each with what is told of it; a file that is not in `told.toml` is told nothing."""
    told: dict[str, str] = tomllib.loads((HERE / kind / "told.toml").read_text())
    paths = sorted(path for path in (HERE / kind).iterdir() if path.name != "told.toml")
    assert told.keys() == {path.name for path in paths if not path.name.startswith("ok-")}
    return [Case(path, told.get(path.name, "")) for path in paths]


def portward(*arguments: str) -> Result:
    """Runs the program's own `main` in this process, which takes a hundredth of a process's time; an exception
    that is none of the program's own comes through."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with patch.object(sys, "argv", ["portward", *arguments]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return Result(code, out.getvalue(), err.getvalue())


def first_line(text: str) -> str:
    """The first of the lines that a text is, each of printable characters: one for each mistake."""
    first, *others = text.removesuffix("\n").split("\n")
    for line in others:
        one_line(line)
    return one_line(first)


def one_line(text: str) -> str:
    """The one line of printable characters that a text is."""
    line = text.removesuffix("\n")
    assert line, "nothing was told"
    assert unshown(line) is None, f"a terminal would obey: {line!r}"
    return line
