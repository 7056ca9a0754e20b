"""From the words of the command line to a verb, and from its usage errors to one line.

To the system, arguments and environment variables are bytes that need not be UTF-8: a verb gets text. A usage
error is reported like every other mistake, with the field and what would be right; typer itself prints three lines
in words of its own.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any, Final

import typer

from portward.base.characters import from_bytes, shown, unreadable
from portward.cli.options import STOPPED
from portward.cli.streams import echo
from portward.errors import InputError, PortwardError

# Names of files and interfaces are bytes to the kernel, so any bytes are valid here.
_BYTES: Final = frozenset(("FILE", "PRESET", "SEGMENT", "SUBSCRIPTION|SEGMENT"))

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


def run(app: typer.Typer) -> int:
    """Runs the verb of `app` that the command line names, and returns the exit code. Raises PortwardError."""
    _drop_unreadable_variables()
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


# --- arguments as text ---


def _text_only(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a verb so that its text arguments are decoded as UTF-8. The wrapper raises InputError with the name of
    an argument that is not UTF-8."""

    @functools.wraps(verb)
    def checked(**given: Any) -> Any:
        return verb(**{name: _read(verb, name, value) for name, value in given.items()})

    return checked


def text(word: str, field: str) -> str:
    """A word of the command line, decoded as UTF-8; raises InputError."""
    word = from_bytes(word)
    if unreadable(word):
        sign = next(sign for sign in word if unreadable(sign))
        raise InputError(f"'{shown(word)}': byte {ord(sign) & 0xFF:#04x} is not UTF-8", field=field)
    return word


def decode_arguments(app: typer.Typer) -> None:
    """Wraps all verbs of `app` with `_text_only`."""
    for info in app.registered_commands:
        if info.callback is not None:
            info.callback = _text_only(info.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            decode_arguments(group.typer_instance)


def _drop_unreadable_variables() -> None:
    """Removes environment variables with values that would make a library fail with a traceback."""
    for name in ("COLUMNS", "LINES"):  # rich reads "²" as a number
        if not _is_number(os.environ.get(name, "0")):
            del os.environ[name]
    if not _is_number(os.environ.get("COMP_CWORD", "0")):  # typer's completions for bash
        os.environ["COMP_CWORD"] = "0"


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 4


def _read(verb: Callable[..., Any], name: str, value: Any) -> Any:
    if isinstance(value, str) and not value.isascii():
        field = _parameter(verb, name)
        return value if field in _BYTES else text(value, field)
    if isinstance(value, list):
        return [_read(verb, name, one) for one in value]
    return value


def _parameter(verb: Callable[..., Any], name: str) -> str:
    """The name of a parameter on the command line: `--reason`, `ADDRESS`."""
    annotation = inspect.signature(verb, eval_str=True).parameters[name].annotation
    for found in getattr(annotation, "__metadata__", ()):
        if isinstance(found, typer.models.ArgumentInfo):
            return str(found.metavar)
        if isinstance(found, typer.models.OptionInfo) and str(found.default).startswith("--"):
            return str(found.default)  # typer stores the first name of an annotated option here
    return f"--{name.replace('_', '-')}"
