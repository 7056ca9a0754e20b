"""Runs a verb, and reports bad usage like every other mistake: in one line, with the field and what would be
right. typer itself prints three lines in words of its own."""

from __future__ import annotations

import re
import sys
from typing import Any, Final

import typer

from portward.cli.arguments import drop_unreadable_variables
from portward.cli.options import STOPPED
from portward.cli.program import app
from portward.cli.streams import echo
from portward.errors import InputError, PortwardError

# typer's texts → field and problem, as in `portward.errors`.
_MISSING: Final = re.compile(r"Missing (?:argument|option|parameter) (?P<field>'.+')\.")
_INVALID: Final = re.compile(r"Invalid value for (?P<field>'[^:]+'): (?P<problem>.*)", re.DOTALL)
_WORDS: Final = tuple(
    (re.compile(theirs, re.DOTALL), ours)
    for theirs, ours in (
        (r"Input should be greater than or equal to (\S+)", r"expected a number of at least \1"),
        (r"Input should be less than or equal to (\S+)", r"expected a number of at most \1"),
        (r"Input should be a valid integer\b.*", "expected a whole number"),
        (r"Input should be a valid number\b.*", "expected a number"),
        (r"Value error, (.*)", r"\1"),
        (r"\. Did you mean (.*)\?$", r"; did you mean \1?"),
        (r" \(Possible options: (.*)\)$", r"; did you mean \1?"),
        (r"Got unexpected extra argument\(s\) \((.*)\)", r"unexpected argument: \1"),
        (r"\.$", ""),
    )
)


def run() -> int:
    """Runs the verb that the command line names, and returns the exit code. Raises PortwardError."""
    drop_unreadable_variables()
    try:
        code = app(_words(sys.argv[1:]), prog_name="portward", standalone_mode=False)
    except typer.Abort:
        echo("")  # ends the question's line
        raise PortwardError(STOPPED) from None
    except typer.TyperException as error:
        raised: Any = error
        if type(error).__name__ == "NoArgsIsHelpError":  # a group without a verb: its help
            raised.show()
            return int(raised.exit_code)
        raise InputError(_reworded(raised.format_message()) + _help(getattr(raised, "ctx", None))) from None
    return code if isinstance(code, int) else 0


def _words(given: list[str]) -> list[str]:
    """The words of the command line, with `help VERB` as `VERB --help`."""
    return [*given[1:], "--help"] if given[:1] == ["help"] else given


def _reworded(message: str) -> str:
    """typer's message in portward's words, with the field first."""
    if found := _MISSING.match(message):
        return f"{_field(found['field'])}: is missing"
    if found := _INVALID.match(message):
        return f"{_field(found['field'])}: {_ours(found['problem'])}"
    ours = _ours(message)
    return ours[:1].lower() + ours[1:]


def _ours(problem: str) -> str:
    for theirs, ours in _WORDS:
        problem = theirs.sub(ours, problem)
    return problem


def _field(hint: str) -> str:
    """`'--config' / '-c'` → `--config`."""
    return hint.partition(" / ")[0].strip("'")


def _help(context: Any) -> str:
    return "" if context is None else f" (see `{context.command_path} --help`)"
